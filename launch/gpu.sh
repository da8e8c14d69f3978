#!/usr/bin/env bash
# A script on all GPUs of this host, in one process.
#
#   bash launch/gpu.sh doctor          # what is there, and does it work?
#   bash launch/gpu.sh experiments/sft.py \
#     --flagfile=experiments/flags/padula/sft_cpu.flags --workdir=runs/sft
#   bash launch/gpu.sh --env NAME ...  # stops if this variable is not set
#   DRY_RUN=1 bash launch/gpu.sh ...   # prints the command and touches nothing
#
# Needs an environment with rljax and its extra cuda12 or cuda13 ($PYTHON).
# CUDA_VISIBLE_DEVICES=0,1 leaves the others alone. Ctrl-C and SIGTERM reach the
# script, which saves its state; the same command goes on.
set -euo pipefail

PYTHON="${PYTHON:-python3}"

# shellcheck source=launch/variables.sh
source "$(dirname "$0")/variables.sh"
if [[ "${1:-}" == -- ]]; then shift; fi
if (($# == 0)); then
  sed -n '2,/^set/{/^#/p}' "$0" >&2
  exit 2
fi

# Not a silent run on the CPU, if the driver and jax do not get on.
export JAX_PLATFORMS="${JAX_PLATFORMS:-cuda}"
# The host is ours: more than the three quarters that jax takes by itself, and
# less than all, which the libraries of NVIDIA need a part of.
export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.9}"
# Sends parameters and gradients while it computes (for fsdp and tensor). See
# https://docs.jax.dev/en/latest/gpu_performance_tips.html
flag=--xla_gpu_enable_latency_hiding_scheduler
if [[ " ${XLA_FLAGS:-}" != *" $flag"* ]]; then
  XLA_FLAGS="${XLA_FLAGS:+$XLA_FLAGS }$flag=true"
fi
export XLA_FLAGS

query=(nvidia-smi --query-gpu="name,memory.total,driver_version"
  --format="csv,noheader")
if [[ -n "${DRY_RUN:-}" ]]; then
  echo "+ ${query[*]}"
  num=ALL
elif ! command -v nvidia-smi >/dev/null; then
  echo "nvidia-smi is not there: install the NVIDIA driver, or run the script" \
    "itself on the CPU." >&2
  exit 1
elif ! gpus="$("${query[@]}")" || [[ -z "$gpus" ]]; then
  echo "nvidia-smi finds no GPU that works:" >&2
  nvidia-smi >&2 || true
  exit 1
else
  echo "$gpus" >&2
  num="$(wc -l <<<"$gpus")"
  if [[ -n "${CUDA_VISIBLE_DEVICES:-}" ]]; then
    IFS=, read -ra visible <<<"$CUDA_VISIBLE_DEVICES"
    num="${#visible[@]}"
  fi
fi

if [[ "$1" == doctor ]]; then
  shift
  set -- -m rljax.doctor --platform=gpu --devices="$num" "$@"
fi
# As in the other launchers, the command may begin with the interpreter.
if [[ "$1" == python || "$1" == python3 ]]; then shift; fi
if [[ -n "${DRY_RUN:-}" ]]; then
  printf '+ env JAX_PLATFORMS=%q XLA_PYTHON_CLIENT_MEM_FRACTION=%q' \
    "$JAX_PLATFORMS" "$XLA_PYTHON_CLIENT_MEM_FRACTION"
  printf ' XLA_FLAGS=%q' "$XLA_FLAGS"
  printf ' %q' "$PYTHON" "$@"
  echo
  exit
fi
exec "$PYTHON" "$@"
