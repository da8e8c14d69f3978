#!/usr/bin/env bash
# The study of board games: a small policy learns the language from changed games
# of ludax, then by PPO with games that are compiled and played; how many of its
# games can be read, compiled and played, are good, and are new, before and after
# each, with and without the grammar as a constraint, over several seeds.
#
#   bash launch/games_study.sh              # three seeds on two cores
#   SEEDS=0 bash launch/games_study.sh      # one seed
#
# Needs an environment with rljax and its extra "games" in it ($PYTHON). Seeds run
# one after another, since each keeps $WORKERS processes busy that play games;
# $RUNS/<seed>/log.txt has what a seed prints. A run that was stopped goes on
# where it was, and one that is finished is not repeated.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/study.sh
source launch/study.sh

RUNS="${RUNS:-runs/games}"       # Where the results go.
SEEDS="${SEEDS:-0 1 2}"
WORKERS="${WORKERS:-2}"          # Processes that play games.
NUM_TRAIN="${NUM_TRAIN:-140}"    # Games of the corpus.
NUM_EVAL="${NUM_EVAL:-64}"       # Validation prompts.
CORPUS="${CORPUS:-$RUNS/corpus.jsonl}"
CONSTRAINTS="${CONSTRAINTS:-none grammar}"
flags=experiments/flags/padula
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}"

make_corpus() {
  if [[ -e "$CORPUS" ]]; then return; fi
  mkdir -p "$(dirname "$CORPUS")"
  "$PYTHON" experiments/games/expand.py "--output=$CORPUS" \
    "--num_train=$NUM_TRAIN" --num_validation=24 "--num_workers=$WORKERS" \
    --seconds=8
}

one_seed() {
  local seed="$1" base="$RUNS/$1" constraint
  local games="corpus=$CORPUS,max_sites=37,max_words=126"
  local task="$games,max_gap=63"
  # What games/expand.py has measured need not be played again.
  local score="corpus=$CORPUS,cache=$CORPUS.cache,max_sites=37"
  score+=",num_games=32,seconds=8,num_workers=$WORKERS"

  # The start is a policy with random weights: an update of size 0.
  local whole=(experiments/sft.py "--seed=$seed"
    "--flagfile=$flags/games_cpu_base.flags" "--task_options=$games,form=whole")
  once "$base/start" "${whole[@]}" --steps=1 --warmup=0 --learning_rate=0
  once "$base/base" "${whole[@]}"
  once "$base/sft" experiments/sft.py "--seed=$seed" "--policy=$base/base" \
    "--flagfile=$flags/games_cpu_sft.flags" "--task_options=$task,min_share=0"
  local ppo=(experiments/ppo.py "--seed=$seed" "--policy=$base/sft"
    "--flagfile=$flags/games_cpu_ppo.flags" "--task_options=$task"
    "--score_options=$score")
  once "$base/ppo" "${ppo[@]}"
  once "$base/ppo_grammar" "${ppo[@]}" --constraint=grammar

  local policies="start=$base/start,sft=$base/sft,ppo=$base/ppo"
  policies+=",ppo_grammar=$base/ppo_grammar"
  for constraint in $CONSTRAINTS; do
    once "$base/$constraint" experiments/evaluate.py --seed=0 --nogreedy \
      "--policies=$policies" \
      --task=games --split=validation "--task_options=$task" \
      "--score_options=$score" "--num_prompts=$NUM_EVAL" --stop_at_eos \
      --max_length=64 --batch_size=32 --metrics=text \
      "--constraint=$constraint"
  done
  local arm
  for arm in ppo ppo_grammar; do
    "$PYTHON" experiments/games/draw.py "--samples=$base/$arm/samples.jsonl" \
      "--output=$base/$arm/games.html" "--corpus=$CORPUS" --max_sites=37 \
      "--num_workers=$WORKERS"
  done
  echo "== seed $seed is done, $(date +%T)" >&3
}

mkdir -p "$RUNS"
make_corpus
# shellcheck disable=SC2086 # Several words.
run_seeds in_turn "$RUNS" $SEEDS
"$PYTHON" -m benchmarks.games_study "--runs=$RUNS" "--seeds=${SEEDS// /,}" \
  "--constraints=${CONSTRAINTS// /,}"
