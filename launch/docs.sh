#!/usr/bin/env bash
# Builds the docs as a site: the pages of docs/ and an API reference from the
# docstrings. A warning is an error.
#
#   bash launch/docs.sh    # then open docs/_build/html/index.html
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON="${PYTHON:-python3}"   # The interpreter that makes the environment.
VENV="${VENV:-.venv-docs}"    # Where the environment goes.
OUT="${OUT:-docs/_build/html}"

if [[ ! -x "$VENV/bin/python" ]]; then
  "$PYTHON" -m venv "$VENV"
fi
"$VENV/bin/python" -m pip install --quiet --editable ".[docs]"
JAX_PLATFORMS=cpu "$VENV/bin/python" -m sphinx -W --keep-going --quiet \
  --builder html docs "$OUT"
echo "The site is in $OUT/index.html."
