#!/usr/bin/env bash
# From a fresh clone to a trained policy: installs rljax into .venv, warms a
# small language model up on 256 sums, trains it by PPO with no bonus, with
# token entropy and with batch entropy, and compares the three arms.
#
#   bash launch/quickstart.sh            # CPU; a few minutes after the install
#   STEPS=256 SEEDS="0 1 2" bash launch/quickstart.sh
#
# Needs Python 3.11 or later and a package registry; nothing else is fetched.
# A run that was stopped goes on where it was.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON="${PYTHON:-python3}"       # The interpreter that makes the environment.
VENV="${VENV:-.venv}"             # Where the environment goes.
RUNS="${RUNS:-runs/quickstart}"   # Where the results go.
STEPS="${STEPS:-1024}"            # PPO rollouts per arm.
SEEDS="${SEEDS:-0}"

if [[ ! -x "$VENV/bin/python" ]]; then
  "$PYTHON" -m venv "$VENV"
fi
"$VENV/bin/python" -m pip install --quiet --editable .
run() { "$VENV/bin/python" "$@"; }

started=$SECONDS
policies=""
for seed in $SEEDS; do
  start="$RUNS/start-$seed"
  echo "== Warm start on 256 examples, seed $seed"
  run experiments/sft.py --flagfile=experiments/flags/padula/sft_cpu.flags \
    --workdir="$start" --seed="$seed"
  policies+="warm start=$start,"
  for arm in none token batch; do
    case "$arm" in
      none) name="no bonus" bonus=() ;;
      token) name="token entropy" bonus=(--entropy_coef=0.3) ;;
      batch) name="batch entropy" bonus=(--batch_entropy_coef=0.3) ;;
    esac
    echo "== PPO with $name, seed $seed"
    run experiments/ppo.py --flagfile=experiments/flags/padula/arithmetic_cpu.flags \
      --policy="$start" --workdir="$RUNS/$arm-$seed" --seed="$seed" \
      --steps="$STEPS" "${bonus[@]}"
    policies+="$name=$RUNS/$arm-$seed,"
  done
done
echo "== All arms on 2000 prompts of the test split"
run experiments/evaluate.py --workdir="$RUNS/evaluation" \
  --task=arithmetic --task_options=style=last --max_length=1 \
  --stop_at_eos=false --policies="${policies%,}"
echo "Done in $((SECONDS - started)) s after the install. Open" \
  "$RUNS/evaluation/arms.png, and $RUNS/*/curves.png for each arm."
