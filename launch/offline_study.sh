#!/usr/bin/env bash
# The study of offline methods: logged word lists of mixed quality, learnt by
# every method of A-LoL and its baselines, over several seeds, in one table.
#
#   bash launch/offline_study.sh               # five seeds; an hour on two cores
#   SEEDS=0 bash launch/offline_study.sh       # one seed
#   ARMS="nll a_lol dpo" bash launch/offline_study.sh
#
# Needs an environment with rljax in it ($PYTHON). A run that was stopped goes
# on where it was, and one that is finished is not repeated.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/study.sh
source launch/study.sh

RUNS="${RUNS:-runs/offline_study}"   # Where the results go.
SEEDS="${SEEDS:-0 1 2 3 4}"
# The nine of the paper, likelihood of the better replies alone, A-LoL without
# a priority and with its weight counted once, and six preference methods.
ARMS="${ARMS:-nll wbc r_gold r_lol r_lol_kl a_lol a_lol_ref_free a_lol_seq \
a_lol_kl nll_filtered a_lol_uniform a_lol_single dpo dpo_reward ipo pro kto \
simpo orpo}"
flags=experiments/flags/a_lol

for seed in $SEEDS; do
  base="$RUNS/$seed"
  once "$base/reference" experiments/sft.py \
    --flagfile=$flags/word_lists_sft.flags --seed="$seed"
  once "$base/values" experiments/offline_value.py \
    --flagfile=$flags/word_lists_value.flags --seed="$seed" \
    --policy="$base/reference"
  for arm in $ARMS; do
    script=offline options=("--algorithm=$arm")
    case "$arm" in
      r_lol_kl | a_lol_kl) options+=(--kl_coef=0.1) ;;
      nll_filtered) options=(--algorithm=nll --priority=good_random) ;;
      a_lol_uniform) options=(--algorithm=a_lol --priority=good_random) ;;
      a_lol_single) options=(--algorithm=a_lol --nodouble_weighting) ;;
      dpo | kto | simpo | orpo) script=preference ;;
      ipo) script=preference options+=(--noipo_per_token) ;;
      dpo_reward)
        script=preference options=(--algorithm=dpo --order=reward)
        ;;
      pro) script=preference options+=(--order=reward) ;;
    esac
    file=$flags/word_lists.flags
    if [[ $script == preference ]]; then
      file=$flags/word_lists_preference.flags
    fi
    once "$base/$arm" "experiments/$script.py" --flagfile="$file" \
      --seed="$seed" --policy="$base/reference" --cache="$base/values" \
      "${options[@]}"
  done
done

policies="" references=""
for arm in reference $ARMS; do
  best=/best
  if [[ $arm == reference ]]; then best=""; fi
  for seed in $SEEDS; do
    policies+="$arm=$RUNS/$seed/$arm$best,"
  done
done
for seed in $SEEDS; do
  references+="$RUNS/$seed/reference,"
done
for mode in sampled greedy; do
  options=(--nogreedy "--metrics=answers,text,log")
  if [[ $mode == greedy ]]; then
    options=(--greedy "--metrics=answers,text")
  fi
  "$PYTHON" experiments/evaluate.py --workdir="$RUNS/$mode" "${options[@]}" \
    --task=word_lists --num_prompts=267 --stop_at_eos --max_length=16 \
    --max_prompt_length=16 --max_response_length=16 --batch_size=267 \
    --reference="${references%,}" --policies="${policies%,}"
done
