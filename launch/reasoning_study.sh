#!/usr/bin/env bash
# The study of reasoning: expert iteration, PPO with four rewards, GRPO and
# return-conditioned RL on merge sums, from a supervised start and from the base
# model, over several seeds, in one table with the claims of the paper.
#
#   bash launch/reasoning_study.sh              # three seeds on two cores
#   SEEDS=0 bash launch/reasoning_study.sh      # one seed
#
# Needs an environment with rljax in it ($PYTHON). All seeds run at the same
# time, one thread each; $RUNS/<seed>/log.txt has what a seed prints. A run that
# was stopped goes on where it was, and one that is finished is not repeated.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/study.sh
source launch/study.sh

RUNS="${RUNS:-runs/reasoning}"   # Where the results go.
SEEDS="${SEEDS:-0 1 2}"
NUM_TEST="${NUM_TEST:-400}"      # Test prompts.
flags=experiments/flags
export XLA_FLAGS="${XLA_FLAGS:---xla_cpu_multi_thread_eigen=false}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# Samples of policies, and what they are worth: labels, then flags.
measure() {
  local workdir="$1" policies="$2"
  shift 2
  once "$workdir" experiments/evaluate.py --policies="$policies" \
    --task=merge_sums --stop_at_eos --max_length=24 --num_samples=32 \
    --temperature=0.7 --batch_size=1024 --reward_length=64 "$@"
}

# An outcome reward model of what a policy writes.
judge() {
  local base="$1" name="$2" label="$3" policy="$4"
  measure "$base/${name}_samples" "$label=$policy" --seed="${base##*/}" \
    --split=train --num_prompts=4000 --num_samples=4 --temperature=1.0
  once "$base/$name" experiments/outcome_reward_model.py \
    --flagfile=$flags/havrilla/merge_sums_orm.flags --seed="${base##*/}" \
    --policy="$base/sft_8" \
    --data="$base/${name}_samples/samples/$label-0-sampled.jsonl"
}

one_seed() {
  local seed="$1" base="$RUNS/$1"
  local sft="$base/sft_8" policies="base=$base/base"
  local seeded=(--seed="$seed")

  # The base model, and supervised learning for ever longer: claim 4.
  once "$base/base" experiments/sft.py "${seeded[@]}" \
    --flagfile=$flags/havrilla/merge_sums_base.flags
  for epochs in 4 8 16 40 100; do
    once "$base/sft_$epochs" experiments/sft.py "${seeded[@]}" \
      --flagfile=$flags/havrilla/merge_sums_sft.flags --policy="$base/base" \
      --steps=$(((300 * epochs + 63) / 64)) --save_every=1000
    policies+=",sft_$epochs=$base/sft_$epochs"
  done

  # Expert iteration: from the supervised start, going on instead of starting
  # anew (claim 6), and from the base model without any supervised pair.
  local ei=("${seeded[@]}" --flagfile="$flags/havrilla/merge_sums_ei.flags"
    --base="$base/base")
  once "$base/ei" experiments/expert_iteration.py "${ei[@]}" \
    --policy="$sft" --num_examples=300
  once "$base/ei_continued" experiments/expert_iteration.py "${ei[@]}" \
    --policy="$sft" --num_examples=300 --norestart
  once "$base/ei_from_base" experiments/expert_iteration.py "${ei[@]}" \
    --policy="$base/base" --rounds=4
  for arm in ei ei_continued ei_from_base; do
    policies+=",$arm=$base/$arm/best"
  done

  # An outcome reward model of samples of the supervised start. So small a
  # model learns nothing from 300 problems: it sees 4000 of the train split.
  judge "$base" orm sft_8 "$sft"

  # PPO with each reward, from the supervised start and from the base, and
  # GRPO, with as many samples as three rounds of expert iteration.
  local rl=("${seeded[@]}" --flagfile="$flags/havrilla/merge_sums_ppo.flags")
  once "$base/ppo" experiments/ppo.py "${rl[@]}" --policy="$sft"
  once "$base/ppo_steps" experiments/ppo.py "${rl[@]}" --policy="$sft" \
    --reward_terms=score,steps
  once "$base/ppo_orm" experiments/ppo.py "${rl[@]}" --policy="$sft" \
    --reward_terms=score,reward_model --reward_model="$base/orm" \
    --reward_length=64
  once "$base/ppo_dense_orm" experiments/ppo.py "${rl[@]}" --policy="$sft" \
    --reward_terms=score,dense_reward_model --reward_model="$base/orm"
  once "$base/ppo_from_base" experiments/ppo.py "${rl[@]}" \
    --policy="$base/base"
  for arm in ppo ppo_steps ppo_orm ppo_dense_orm ppo_from_base; do
    policies+=",$arm=$base/$arm/best"
  done
  once "$base/grpo" experiments/grpo.py "${seeded[@]}" \
    --flagfile=$flags/grpo/merge_sums_grpo.flags --policy="$sft"
  policies+=",grpo=$base/grpo"

  # Return-conditioned RL with three mixes of right and wrong solutions.
  local rcrl=("${seeded[@]}" --flagfile="$flags/havrilla/merge_sums_rcrl.flags"
    --policy="$base/ei/best" --base="$base/base") labels=()
  for share in 50 75 100; do
    once "$base/rcrl_$share" experiments/return_conditioned.py "${rcrl[@]}" \
      --right_share="$(printf '%d.%02d' $((share / 100)) $((share % 100)))" \
      ${labels[@]+"${labels[@]}"}
    labels=(--labels="$base/rcrl_50/labels.jsonl")
    policies+=",rcrl_$share=$base/rcrl_$share"
  done

  # Outcome models of what expert iteration and PPO write: claim 8.
  judge "$base" orm_ei ei "$base/ei/best"
  judge "$base" orm_ppo ppo "$base/ppo/best"

  # What the supervised start writes by itself, and everything on test prompts:
  # every seed has its own, so that their spread holds that of the questions.
  measure "$base/known" "sft_8=$sft" "${seeded[@]}" \
    --num_prompts="$NUM_TEST" --num_samples=128
  measure "$base/test" "$policies" "${seeded[@]}" --num_prompts="$NUM_TEST" \
    --k=1,8,32 --rerank_model="$base/orm_ei" --reference="$sft" \
    --new_vs_samples="$base/known/samples/sft_8-0-sampled.jsonl"
  measure "$base/test_orm_ppo" "ei=$base/ei/best,ppo=$base/ppo/best" \
    "${seeded[@]}" --num_prompts="$NUM_TEST" --k=32 \
    --rerank_model="$base/orm_ppo"
  echo "== seed $seed is done, $(date +%T)" >&3
}

# shellcheck disable=SC2086 # Several words.
run_seeds together "$RUNS" $SEEDS
"$PYTHON" -m benchmarks.reasoning --runs="$RUNS" --seeds="${SEEDS// /,}"
