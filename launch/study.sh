# shellcheck shell=bash
# What the studies of this folder share; they source it. Each says which flags a
# seed takes; here is that a run which was stopped goes on, that one which is
# finished is not repeated, and that Ctrl-C ends all that was started.

PYTHON="${PYTHON:-python3}"
pids=()
in_a_log="" # Then what a user is to see goes to descriptor 3.

# once WORKDIR SCRIPT FLAGS...: runs a script unless its summary is there already.
once() {
  local workdir="$1"
  shift
  if [[ -e "$workdir/summary.json" ]]; then return; fi
  echo "== $workdir, $(date +%T)"
  if [[ -n "$in_a_log" ]]; then echo "== $workdir, $(date +%T)" >&3; fi
  "$PYTHON" "$@" --workdir="$workdir"
  # A script that a signal stopped has saved its state and ends well.
  if [[ ! -e "$workdir/summary.json" ]]; then
    echo "$workdir was stopped before its end; start again to go on." >&2
    exit 1
  fi
}

# run_seeds ORDER FOLDER SEED...: calls `one_seed SEED` for every seed, "together"
# or "in_turn"; FOLDER/SEED/log.txt has what it prints. Every seed is a process
# group of its own, which ends as a whole.
run_seeds() {
  local order="$1" folder="$2" seed pid status=0
  shift 2
  exec 3>&1
  in_a_log=1
  set -m
  trap stop_seeds INT TERM
  for seed in "$@"; do
    mkdir -p "$folder/$seed"
    one_seed "$seed" >>"$folder/$seed/log.txt" 2>&1 &
    pids+=($!)
    if [[ "$order" == in_turn ]]; then wait_for_seeds || status=$?; fi
    if ((status)); then break; fi
  done
  wait_for_seeds || status=$?
  trap - INT TERM
  if ((status)); then
    echo "A seed did not finish: the ends of $folder/*/log.txt say why." >&2
    exit "$status"
  fi
}

wait_for_seeds() {
  local pid status=0
  for pid in ${pids[@]+"${pids[@]}"}; do
    wait "$pid" || status=$?
  done
  pids=()
  return "$status"
}

stop_seeds() {
  local pid
  for pid in ${pids[@]+"${pids[@]}"}; do
    kill -- "-$pid" 2>/dev/null || true
  done
  echo "Stopped; the same command goes on." >&2
  exit 130
}
