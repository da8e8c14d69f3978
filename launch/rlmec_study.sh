#!/usr/bin/env bash
# The study of RLMEC: token-level rewards of a generative reward model on chains
# of sums, beside other methods that learn from the same samples and with each of
# its parts taken away, over several seeds, in one table.
#
#   bash launch/rlmec_study.sh              # three seeds on two cores
#   SEEDS=0 bash launch/rlmec_study.sh      # one seed
#
# Needs an environment with rljax in it ($PYTHON). All seeds run at the same
# time, one thread each; $RUNS/<seed>/log.txt has what a seed prints. A run that
# was stopped goes on where it was, and one that is finished is not repeated.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/study.sh
source launch/study.sh

RUNS="${RUNS:-runs/rlmec}"       # Where the results go.
SEEDS="${SEEDS:-0 1 2}"
NUM_TEST="${NUM_TEST:-1000}"     # Test prompts.
flags=experiments/flags/rlmec
export XLA_FLAGS="${XLA_FLAGS:---xla_cpu_multi_thread_eigen=false}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

one_seed() {
  local seed="$1" base="$RUNS/$1" arm
  local seeded=("--seed=$seed") from=("--policy=$base/base")
  local policies="start=$base/base"

  once "$base/base" experiments/sft.py "${seeded[@]}" \
    "--flagfile=$flags/chains_base.flags"
  once "$base/grm" experiments/rlmec_reward_model.py "${seeded[@]}" \
    "--flagfile=$flags/chains_grm.flags" "${from[@]}" "--stages=$base/stages"

  # The method, and the method without one of its parts.
  rlmec() {
    local name="$1"
    shift
    once "$base/$name" experiments/rlmec.py "${seeded[@]}" "${from[@]}" \
      "--flagfile=$flags/chains_rlmec.flags" "--reward_model=$base/grm" \
      "--stages=$base/stages" "$@"
    policies+=",$name=$base/$name"
  }
  rlmec rlmec
  rlmec no_token_rewards --token_rewards=none
  rlmec no_imitation --imitation_coef=0
  rlmec uniform_weights --edited_weight=0.5
  rlmec gold_instead --imitate=gold
  rlmec sequence_reward --token_rewards=sequence
  rlmec sequence_no_imitation --token_rewards=sequence --imitation_coef=0
  rlmec oracle_reward --token_rewards=alignment
  rlmec surrogate --rl_mode=ppo
  rlmec surrogate_no_imitation --rl_mode=ppo --imitation_coef=0

  # Other methods: on gold solutions, on right samples, on pairs of rewrite and
  # sample; and PPO, which draws as many samples of its own.
  local found="$base/stages/supervision"
  for arm in gold right; do
    once "$base/sft_$arm" experiments/sft.py "${seeded[@]}" "${from[@]}" \
      "--flagfile=$flags/chains_sft.flags" "--data=$found/$arm.jsonl"
    policies+=",sft_$arm=$base/sft_$arm"
  done
  once "$base/dpo" experiments/preference.py "${seeded[@]}" "${from[@]}" \
    "--flagfile=$flags/chains_dpo.flags" "--data=$found/pairs.jsonl"
  once "$base/ppo" experiments/ppo.py "${seeded[@]}" "${from[@]}" \
    "--flagfile=$flags/chains_ppo.flags"
  policies+=",dpo=$base/dpo,ppo=$base/ppo"

  once "$base/test" experiments/evaluate.py "${seeded[@]}" \
    "--policies=$policies" --task=chains "--num_prompts=$NUM_TEST" \
    --stop_at_eos --max_length=32 --batch_size=250
  echo "== seed $seed is done, $(date +%T)" >&3
}

# shellcheck disable=SC2086 # Several words.
run_seeds together "$RUNS" $SEEDS
"$PYTHON" -m benchmarks.rlmec "--runs=$RUNS" "--seeds=${SEEDS// /,}"
