#!/usr/bin/env bash
# A TPU slice on Google Cloud, from a request in the queue to a finished run.
#
#   export NAME=demo ZONE=us-east5-b TYPE=v6e-16 VERSION=v2-alpha-tpuv6e
#   export SHARED=10.0.0.2:/share         # NFS, if --workdir is no bucket
#   bash launch/tpu_vm.sh queue           # asks for the slice, does not wait
#   bash launch/tpu_vm.sh create          # asks if need be, waits for it
#   bash launch/tpu_vm.sh create -- python SCRIPT --policy=NAME
#                                         # plans the script first: where it
#                                         # does not fit, nothing is asked for
#   bash launch/tpu_vm.sh setup           # every host: Python, ~/shared
#   bash launch/tpu_vm.sh sync            # every host: this commit, installed
#   bash launch/tpu_vm.sh doctor          # do the hosts fit together?
#   bash launch/tpu_vm.sh run -- python experiments/sft.py \
#     --flagfile=experiments/flags/padula/sft_cpu.flags --workdir=runs/sft
#   bash launch/tpu_vm.sh run --env NAME -- ...  # passes this variable on
#   bash launch/tpu_vm.sh status          # of the slice and the job
#   bash launch/tpu_vm.sh logs [HOST]     # the last $TAIL; FOLLOW=1 stays
#   bash launch/tpu_vm.sh stop            # lets the job save, and ends it
#   bash launch/tpu_vm.sh delete          # ends the costs
#
# HF_TOKEN, WANDB_API_KEY and the variables of --env reach the job through ssh:
# they stand in no file, in no log and on no command line.
#
# DRY_RUN=1 prints every command, as if all went well, and touches nothing.
# A slice costs money from `create` to `delete`, whether it computes or not.
# `run` stays and watches: when a spot slice is taken away, it asks for another
# one, sets it up and starts the same command, which goes on from its last
# checkpoint. See launch/README.md.
#
# The commands are those of
# https://docs.cloud.google.com/tpu/docs/queued-resources
# https://docs.cloud.google.com/sdk/gcloud/reference/compute/tpus/tpu-vm/ssh
set -euo pipefail
cd "$(dirname "$0")/.."

NAME="${NAME:-}" ZONE="${ZONE:-}" TYPE="${TYPE:-}" VERSION="${VERSION:-}"
SPOT="${SPOT:-1}"              # 0 asks for a slice that is not taken away.
PORT="${PORT:-8476}"           # Open between the hosts of a slice by default.
SHARED="${SHARED:-}"           # NFS, ADDRESS:/PATH, mounted as ~/shared.
POLL="${POLL:-30}"             # Seconds between two looks.
RESTARTS="${RESTARTS:-100}"    # After as many, `run` gives up.
PATIENCE="${PATIENCE:-300}"    # Seconds to save in after `stop`.
VERDICT="${VERDICT:-120}"      # Seconds in which a slice that was taken away
                               # shows, after its job has failed.
TAIL="${TAIL:-50}"            # Lines of the log to show.

say() { echo "== $*"; }
fail() {
  echo "$*" >&2
  exit 1
}

# Runs a command, or prints it.
run() {
  if [[ -n "${DRY_RUN:-}" ]]; then
    printf '+'
    printf ' %q' "$@"
    echo
  else
    "$@"
  fi
}

# Sets `answer` to what a command prints; a dry run assumes the first argument.
answer=""
ask() {
  answer="$1"
  shift
  if [[ -n "${DRY_RUN:-}" ]]; then run "$@"; else answer="$("$@")"; fi
}

need() {
  local name
  for name in "$@"; do
    if [[ -n "${!name:-}" ]]; then continue; fi
    case "$name" in
      NAME) fail "Set NAME: what the slice is called, such as NAME=demo." ;;
      ZONE) fail "Set ZONE: where the slice is, such as ZONE=us-east5-b." ;;
      TYPE) fail "Set TYPE: the kind and size of the slice, such as" \
        "TYPE=v6e-16; see gcloud compute tpus accelerator-types list." ;;
      VERSION) fail "Set VERSION: the image of the hosts, such as" \
        "VERSION=v2-alpha-tpuv6e for a v6e; see" \
        "https://docs.cloud.google.com/tpu/docs/runtimes." ;;
    esac
  done
  if [[ -z "${DRY_RUN:-}" ]] && ! command -v gcloud >/dev/null; then
    fail "gcloud is not there: https://docs.cloud.google.com/sdk/docs/install"
  fi
  scope=(--zone="$ZONE")
  if [[ -n "${PROJECT:-}" ]]; then scope+=(--project="$PROJECT"); fi
}

# The state of the request, in `answer`: ACTIVE once the slice is up, NONE if
# there is no request. `known` says that there was one that we did not delete.
known=""
get_state() {
  if ask "${1:-ACTIVE}" gcloud compute tpus queued-resources describe "$NAME" \
    "${scope[@]}" --format="value(state.state)" 2>"$scratch/error"; then
    if [[ "$answer" != DELETING ]]; then known=1; fi
    return
  elif grep -q NOT_FOUND "$scratch/error"; then
    answer=NONE
    return
  fi
  cat "$scratch/error" >&2
  return 1
}

request() {
  local options=()
  if [[ "$SPOT" != 0 ]]; then options+=(--spot); fi
  # Where files are shared, a user must have the same number on all hosts.
  if [[ -n "$SHARED" ]]; then options+=(--metadata=enable-oslogin=TRUE); fi
  run gcloud compute tpus queued-resources create "$NAME" --node-id="$NAME" \
    "${scope[@]}" --accelerator-type="$TYPE" --runtime-version="$VERSION" \
    ${options[@]+"${options[@]}"} --async
}

# A request that cannot be deleted may be gone by another's hand: it stays known.
delete() {
  run gcloud compute tpus queued-resources delete "$NAME" "${scope[@]}" \
    --force --quiet && known=""
}

# Compiles what is to run for the slice, which need not be there; free of cost.
plan() {
  local script=("$@")
  if [[ $# == 0 ]]; then return; fi
  run "${script[0]}" -m rljax.plan --target="$TYPE" -- "${script[@]:1}"
}

# Asks for the slice, unless that was done.
queue() {
  get_state NONE || return 1
  case "$answer" in
    NONE) ;;
    FAILED | SUSPENDED | SUSPENDING)
      say "$NAME is $answer; asking again."
      delete || return 1
      ;;
    *)
      say "$NAME is $answer already."
      return
      ;;
  esac
  request
}

wait_until_active() {
  local last="" failures=0
  while :; do
    if get_state; then
      failures=0
    elif ((++failures >= 10)); then
      echo "The state of $NAME cannot be found out." >&2
      return 1
    else
      sleep "$POLL"
      continue
    fi
    if [[ "$answer" != "$last" ]]; then say "$NAME is $answer, $(date +%T)"; fi
    last="$answer"
    case "$answer" in
      ACTIVE) return ;;
      NONE | FAILED | SUSPENDED | SUSPENDING)
        echo "$NAME did not come up: gcloud compute tpus queued-resources" \
          "describe $NAME ${scope[*]} says why." >&2
        return 1
        ;;
    esac
    sleep "$POLL"
  done
}

# What the job gets of this environment. The sshd of a host takes variables
# whose names begin with LC_, and tpu_host.sh takes that away again.
secrets=() passed=()
pass_on() {
  local name
  for name in HF_TOKEN WANDB_API_KEY "$@"; do
    if [[ ! "$name" =~ ^[A-Za-z_][A-Za-z0-9_]*$ ]]; then
      fail "--env takes the name of a variable, such as --env HF_TOKEN, got" \
        "$(printf %q "${name%%=*}")."
    elif [[ -z "${!name:-}" ]]; then
      if [[ " $* " == *" $name "* ]]; then
        fail "--env $name: it is not set here; export it first."
      fi
    elif [[ " ${secrets[*]-} " != *" $name "* ]]; then
      secrets+=("$name")
      export "LC_RLJAX_$name=${!name}"
    fi
  done
}

# The command line of tpu_host.sh, for the shell of a host.
host_command() {
  local settings=(NAME="$NAME" PORT="$PORT" TAIL="$TAIL" PATIENCE="$PATIENCE")
  if [[ -n "${EXTRAS:-}" ]]; then settings+=(EXTRAS="$EXTRAS"); fi
  if [[ -n "${PYTHON_VERSION:-}" ]]; then
    settings+=(PYTHON_VERSION="$PYTHON_VERSION")
  fi
  if [[ -n "${FOLLOW:-}" ]]; then settings+=(FOLLOW="$FOLLOW"); fi
  passed=()
  if ((${#secrets[@]})) && [[ "$1" == start || "$1" == run ]]; then
    settings+=(PASSED="${secrets[*]}")
    passed=(--ssh-flag="-oSendEnv=LC_RLJAX_*")
  fi
  remote="$(printf '%q ' "${settings[@]}" bash tpu_host.sh "$@")"
  remote="${remote% }"
}

on_hosts() {
  local remote worker="$1"
  shift
  host_command "$@"
  run gcloud compute tpus tpu-vm ssh "$NAME" "${scope[@]}" \
    --worker="$worker" ${passed[@]+"${passed[@]}"} --command="$remote"
}

ask_hosts() {
  local remote assumed="$1"
  shift
  host_command "$@"
  ask "$assumed" gcloud compute tpus tpu-vm ssh "$NAME" "${scope[@]}" \
    --worker=all --command="$remote"
}

copy_to_hosts() {
  run gcloud compute tpus tpu-vm scp "$@" "$NAME:" "${scope[@]}" --worker=all
}

setup() {
  copy_to_hosts launch/tpu_host.sh && on_hosts all setup "$SHARED"
}

pack() {
  bundle="build/$head.bundle"
  if [[ -z "${DRY_RUN:-}" ]]; then
    if [[ -n "$(git status --porcelain --untracked-files=no)" ]]; then
      fail "There are changes that no commit holds; commit them, so that what" \
        "runs can be named."
    fi
    mkdir -p build
  fi
  run git bundle create --quiet "$bundle" HEAD
}

sync() {
  copy_to_hosts launch/tpu_host.sh "$bundle" && on_hosts all sync "$head"
}

# Stops unless all hosts are there, on this commit, with no changes.
check_commit() {
  local line id hosts=0 seen=0
  local pattern="^host ([0-9]+) of ([0-9]+): commit ([0-9a-f]+) ([a-z]+)"
  if ! ask_hosts "host 0 of 1: commit $head clean" commit; then
    fail "The hosts do not say what they have checked out: run the verbs" \
      "setup and sync."
  fi
  while read -r line; do
    [[ "$line" =~ $pattern ]] || continue
    id="${BASH_REMATCH[1]}" hosts="${BASH_REMATCH[2]}"
    seen=$((seen + 1))
    if [[ "${BASH_REMATCH[3]}" != "$head" ]]; then
      fail "Host $id has commit ${BASH_REMATCH[3]:0:12}, you have" \
        "${head:0:12}: run the verb sync."
    elif [[ "${BASH_REMATCH[4]}" != clean ]]; then
      fail "Host $id has changes in ~/rljax that no commit holds: run the" \
        "verb sync, which drops them."
    fi
  done <<<"$answer"
  if ((seen == 0 || seen != hosts)); then
    fail "$seen of $hosts hosts have said which commit they have: run the" \
      "verbs setup and sync."
  fi
}

# What the job does, by the word of all hosts, in `verdict`: running, finished,
# stopped, unfinished, idle, failed, or unknown.
judge() {
  local line id hosts=0 seen=0 running=0 idle=0 outcome=""
  verdict=unknown culprit="" status=""
  ask_hosts "host 0 of 1: ended 0 finished" status || return 0
  while read -r line; do
    [[ "$line" =~ ^host\ ([0-9]+)\ of\ ([0-9]+):\ (.*)$ ]] || continue
    id="${BASH_REMATCH[1]}" hosts="${BASH_REMATCH[2]}"
    seen=$((seen + 1))
    # shellcheck disable=SC2086  # Words of a line.
    set -- ${BASH_REMATCH[3]}
    case "$1" in
      running) running=$((running + 1)) ;;
      idle) idle=$((idle + 1)) ;;
      ended)
        # Host 0 writes the summary; the others may see it later.
        if ((id == 0)); then outcome="$3"; fi
        if [[ "$2" != 0 && "$3" != stopped && -z "$culprit" ]]; then
          culprit="$id" status="$2"
        fi
        ;;
    esac
  done <<<"$answer"
  if ((seen == 0 || seen != hosts)); then
    return
  elif [[ -n "$culprit" ]]; then
    verdict=failed
  elif ((running)); then
    verdict=running
  elif ((idle)); then
    verdict=idle
  else
    verdict="$outcome"
  fi
}

restarts=0
count_restart() {
  restarts=$((restarts + 1))
  if ((restarts > RESTARTS)); then
    fail "$RESTARTS restarts are enough; the same command goes on."
  fi
  say "Restart $restarts, $(date '+%F %T')"
}

# Another slice in the place of the one that is gone.
recreate() {
  count_restart
  { queue && wait_until_active && setup && sync &&
    on_hosts all start "$@"; } || say "That did not work; trying again."
}

# Waits for the end of the job, through preemptions.
watch() {
  local failures=0 deadline taken
  known=1  # The hosts have just answered.
  while :; do
    if ! get_state; then
      answer=UNKNOWN
    elif [[ -n "$known" && "$answer" =~ ^(NONE|DELETING)$ ]]; then
      # What a spot slice leaves behind is SUSPENDED.
      fail "$NAME was deleted, and no other one is asked for. After create," \
        "setup and sync the same command goes on."
    elif [[ "$answer" != ACTIVE ]]; then
      say "$NAME is $answer: it was taken away."
      recreate "$@"
      sleep "$POLL"
      continue
    fi
    verdict=unknown
    if [[ "$answer" == ACTIVE ]]; then judge; fi
    if [[ "$verdict" != unknown ]]; then failures=0; fi
    case "$verdict" in
      running) ;;
      finished)
        say "The job has finished. The slice still costs money: run the verb" \
          "delete."
        return
        ;;
      stopped)
        say "The job was stopped; the same command goes on."
        return
        ;;
      idle | unfinished)
        say "The job has stopped before its end, and the slice is there."
        count_restart
        on_hosts all start "$@" || say "That did not work; trying again."
        ;;
      failed)
        # The first hosts that go take the job of the others with them.
        say "Host $culprit ended with status $status; was it taken away?"
        deadline=$((SECONDS + VERDICT)) taken=""
        while ((SECONDS < deadline)) && [[ -z "$taken" ]]; do
          if get_state && [[ "$answer" != ACTIVE ]]; then taken=1; fi
          if [[ -z "$taken" ]]; then sleep "$POLL"; fi
        done
        if [[ -z "$taken" ]]; then
          on_hosts all stop || true
          on_hosts "$culprit" logs >&2 || true
          fail "No: host $culprit ended with status $status, see above. The" \
            "others are stopped. Once it is mended, the same command goes on."
        fi
        ;;
      unknown)
        failures=$((failures + 1))
        if ((failures >= 20)); then
          fail "$NAME does not answer. Its job may go on: see the verb" \
            "status; the same command watches it again."
        fi
        ;;
    esac
    sleep "$POLL"
  done
}

verb="${1:-}"
shift || true
names=()
while [[ "${1:-}" == --env || "${1:-}" == --env=* ]]; do
  if [[ "$1" == --env ]]; then shift; fi
  if (($# == 0)); then
    fail "--env takes the name of a variable, such as --env HF_TOKEN."
  fi
  names+=("${1#--env=}")
  shift
done
if [[ "$verb" =~ ^(run|doctor)$ ]]; then
  pass_on ${names[@]+"${names[@]}"}
elif ((${#names[@]})); then
  fail "--env belongs to the verbs run and doctor."
fi
if [[ "${1:-}" == -- ]]; then shift; fi
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
case "$verb" in
  queue | create)
    need NAME ZONE TYPE VERSION
    plan "$@" || fail "The plan for a $TYPE failed or does not fit, and nothing" \
      "is asked for. Without -- COMMAND, $verb plans nothing."
    queue || fail "$NAME could not be asked for."
    if [[ "$verb" == create ]]; then wait_until_active; fi
    ;;
  setup)
    need NAME ZONE
    setup
    if [[ -z "$SHARED" ]]; then
      say "SHARED is not set: give a --workdir in a bucket, such as" \
        "gs://BUCKET/runs/x, or checkpoints stay on the hosts' own disks, which" \
        "a preemption takes with it."
    fi
    ;;
  sync)
    need NAME ZONE
    head="$(git rev-parse HEAD)"
    pack
    sync
    ;;
  doctor)
    need NAME ZONE
    # The last --workdir counts.
    on_hosts all run python -m rljax.doctor --platform=tpu --workdir=runs \
      "$@"
    ;;
  run)
    need NAME ZONE TYPE VERSION
    if (($# == 0)); then
      fail "Usage: bash launch/tpu_vm.sh run -- python experiments/X.py ..."
    fi
    head="$(git rev-parse HEAD)"
    # A restart needs the code as it is now, whatever is committed meanwhile.
    pack
    check_commit
    on_hosts all start "$@" ||
      fail "The job was not started on every host, see above; the verb stop" \
        "ends it where it was."
    trap 'echo "The job goes on, and nobody restarts it: the same command" \
      "watches it again, the verb stop ends it." >&2; exit 130' INT TERM
    say "Watching; Ctrl-C leaves the job alone. The verb logs shows its output."
    watch "$@"
    ;;
  status)
    need NAME ZONE
    get_state || exit 1
    say "$NAME is $answer"
    if [[ "$answer" == ACTIVE ]]; then on_hosts all status; fi
    ;;
  logs)
    need NAME ZONE
    on_hosts "${1:-0}" logs
    ;;
  stop)
    need NAME ZONE
    on_hosts all stop
    ;;
  delete)
    need NAME ZONE
    delete
    ;;
  *)
    sed -n '2,/^set/{/^#/p}' "$0" >&2
    exit 2
    ;;
esac
