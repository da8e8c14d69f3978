#!/usr/bin/env bash
# Starts one command as N processes of one run, on the CPUs of this machine.
#
#   bash launch/local_processes.sh 2 -- python experiments/sft.py \
#     --flagfile=experiments/flags/padula/sft_cpu.flags --workdir=runs/sft
#   bash launch/local_processes.sh 2 --env NAME -- ...   # stops if it is not set
#   DRY_RUN=1 bash launch/local_processes.sh 2 -- ...   # says what it would do
#
# Every process finds in its environment where process 0 listens, how many they
# are, and which of them it is: RLJAX_COORDINATOR, RLJAX_NUM_PROCESSES and
# RLJAX_PROCESS_ID. Process 0 writes to the terminal, the others to $LOGS/1.log
# and so on. When one dies, the others are stopped: asked first, and killed
# $GRACE seconds later. Ctrl-C and SIGTERM reach all of them, which are waited
# for: a script saves its state, and the same command goes on with it.
set -euo pipefail

GRACE="${GRACE:-20}"          # Seconds to end in, after another one died.
PATIENCE="${PATIENCE:-300}"   # Seconds to save in, after Ctrl-C or SIGTERM.
LOGS="${LOGS:-runs/processes/$(date +%Y%m%d-%H%M%S)-$$}"
# The transport between CPU processes, gloo, comes with jax.
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"

num="${1-}"
shift || true
# shellcheck source=launch/variables.sh
source "$(dirname "$0")/variables.sh"
if [[ $# -lt 2 || ! "$num" =~ ^[1-9][0-9]*$ || "$1" != -- ]]; then
  echo "Usage: bash launch/local_processes.sh N [--env NAME] -- COMMAND ..." >&2
  exit 2
fi
shift

listens() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }
if [[ -z "${PORT:-}" ]]; then
  # Below the ports that the system hands out by itself.
  PORT=$((10000 + RANDOM % 20000))
  while listens "$PORT"; do PORT=$((10000 + RANDOM % 20000)); done
elif [[ -z "${DRY_RUN:-}" ]] && listens "$PORT"; then
  echo "Port $PORT is in use; choose another PORT, or leave it out." >&2
  exit 1
fi
export RLJAX_COORDINATOR="127.0.0.1:$PORT" RLJAX_NUM_PROCESSES="$num"

if [[ -n "${DRY_RUN:-}" ]]; then
  for ((id = 0; id < num; id++)); do
    printf '+ env JAX_PLATFORMS=%q RLJAX_COORDINATOR=%q' "$JAX_PLATFORMS" \
      "$RLJAX_COORDINATOR"
    printf ' RLJAX_NUM_PROCESSES=%q RLJAX_PROCESS_ID=%q' "$num" "$id"
    printf ' %q' "$@"
    if ((id)); then printf ' >%q 2>&1' "$LOGS/$id.log"; fi
    echo
  done
  exit
fi

scratch="$(mktemp -d)"
touch "$scratch/ended"
mkdir -p "$LOGS"
pids=() statuses=()

# One process, and a line in `ended` when it has come to its end.
one() {
  local id="$1" status=0
  shift
  # This shell outlives the signals that end its process.
  trap : TERM INT HUP
  RLJAX_PROCESS_ID="$id" "$@" || status=$?
  echo "$id $status" >>"$scratch/ended"
}

signal_all() {
  local pid
  for pid in "${pids[@]}"; do
    kill "-$1" -- "-$pid" 2>/dev/null || true
  done
}

# shellcheck disable=SC2329  # The traps call it.
clean_up() {
  if ((${#pids[@]})); then signal_all KILL; fi
  rm -rf "$scratch"
}
trap clean_up EXIT

deadline="" asked="" failed=""
# shellcheck disable=SC2329
pass_on() {
  asked="$1"
  deadline=$((SECONDS + PATIENCE))
  echo "$1: waiting for $num processes; once more to pass it on again." >&2
  signal_all "$1"
}
trap 'pass_on INT' INT
trap 'pass_on TERM' TERM HUP

# Every process is a process group of its own, which ends as a whole.
set -m
for ((id = 0; id < num; id++)); do
  if ((id)); then
    one "$id" "$@" </dev/null >"$LOGS/$id.log" 2>&1 &
  else
    one "$id" "$@" </dev/null &
  fi
  pids+=($!)
done
set +m
if ((num == 2)); then
  echo "Process 1 writes to $LOGS/1.log" >&2
elif ((num > 2)); then
  echo "Processes 1 to $((num - 1)) write to $LOGS/<process>.log" >&2
fi

explain() {
  local id="$1" status="$2" what="ended with status $2" name
  if ((status > 128)) && name="$(kill -l "$((status - 128))" 2>/dev/null)"; then
    what="was killed by SIG$name"
  fi
  if ((id)); then
    echo "Process $id of $num $what; the end of $LOGS/$id.log:" >&2
    tail -n 20 "$LOGS/$id.log" | sed 's/^/  /' >&2
  else
    echo "Process 0 of $num $what; its output is above." >&2
  fi
}

while ((${#statuses[@]} < num)); do
  sleep 0.1
  for ((id = 0; id < num; id++)); do
    # One whose shell was killed as well has noted nothing.
    if ! kill -0 "${pids[id]}" 2>/dev/null; then
      status=0
      wait "${pids[id]}" 2>/dev/null || status=$?
      if ! grep -q "^$id " "$scratch/ended"; then
        echo "$id $status" >>"$scratch/ended"
      fi
    fi
  done
  # In the order in which they ended: the first that failed is the culprit.
  while read -r id status; do
    if [[ -n "${statuses[id]:-}" ]]; then continue; fi
    statuses[id]="$status"
    if ((status)) && [[ -z "$failed" ]]; then
      failed="$id"
      if [[ -z "$asked" ]]; then
        explain "$id" "$status"
        deadline=$((SECONDS + GRACE))
        signal_all TERM
      fi
    fi
  done <"$scratch/ended"
  if [[ -n "$deadline" ]] && ((SECONDS >= deadline)); then
    echo "Killing the processes that have not ended." >&2
    signal_all KILL
    deadline=""
  fi
done
if [[ -z "$failed" ]]; then exit 0; fi
if [[ -z "$asked" ]]; then
  echo "All $num processes have ended; the same command goes on from the" \
    "last checkpoint." >&2
fi
exit "${statuses[failed]}"
