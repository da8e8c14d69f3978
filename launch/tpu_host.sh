#!/usr/bin/env bash
# The half of launch/tpu_vm.sh that runs on every host of a TPU slice, where it
# is copied to ~/tpu_host.sh. Prints one line, which begins with "host 0 of 2:",
# or what the job prints.
#
#   bash tpu_host.sh setup [ADDRESS:/PATH]   environment, and the shared folder
#   bash tpu_host.sh sync COMMIT             the code, from ~/COMMIT.bundle
#   bash tpu_host.sh commit                  what is checked out
#   bash tpu_host.sh run COMMAND ...         in the foreground
#   bash tpu_host.sh start COMMAND ...       in the background
#   bash tpu_host.sh status | logs | stop    of what was started
#
# ~/rljax holds the code, ~/venv the environment, ~/shared what all hosts see
# and what is there after a preemption, ~/job what is known of the job.
set -euo pipefail

NAME="${NAME:-tpu}"
PORT="${PORT:-8476}"
PYTHON_VERSION="${PYTHON_VERSION:-3.12}"
EXTRAS="${EXTRAS:-tpu,gcs}"
TAIL="${TAIL:-50}"
PATIENCE="${PATIENCE:-300}"
code="$HOME/rljax" venv="$HOME/venv" shared="$HOME/shared" job="$HOME/job"
# Variables of the one who starts the job, which are written nowhere.
for name in ${PASSED:-}; do
  hidden="LC_RLJAX_$name"
  if [[ -z "${!hidden:-}" ]]; then
    echo "The sshd of this host did not take $hidden (AcceptEnv LC_* in" \
      "sshd_config): $name does not reach the job." >&2
    exit 1
  fi
  export "$name=${!hidden}"
  unset "$hidden"
done
unset PASSED
export PATH="$venv/bin:$HOME/.local/bin:$PATH"

metadata() {
  local url=http://metadata.google.internal/computeMetadata/v1/instance
  if ! curl --silent --show-error --fail --header "Metadata-Flavor: Google" \
    "$url/attributes/$1"; then
    echo "No $1 in the metadata of this machine: is it a host of a TPU slice?" \
      >&2
    return 1
  fi
}

# Where jax itself looks for them on a TPU VM.
id="$(metadata agent-worker-number)"
endpoints="$(metadata worker-network-endpoints)"
IFS=, read -ra hosts <<<"$endpoints"
num="${#hosts[@]}"
# A host is its address, or name:number:address.
export RLJAX_COORDINATOR="${hosts[0]##*:}:$PORT"
export RLJAX_NUM_PROCESSES="$num" RLJAX_PROCESS_ID="$id"

say() { echo "host $id of $num: $*"; }
is_shared() { mountpoint --quiet "$shared"; }
log="$job/log"
if is_shared; then log="$shared/logs/$NAME-$id.log"; fi

# The folder of this host that stands for a workdir in a bucket.
folder_of() {
  if [[ "$1" != *://* ]]; then
    echo "$1"
  else
    (cd "$code" && "$venv/bin/python" -m rljax.storage.mirrors "$1")
  fi
}

job_pid() {
  local pid
  pid="$(cat "$job/pid" 2>/dev/null)" || return 1
  # After a restart of the machine the number may be another program's.
  ps -o args= -p "$pid" 2>/dev/null | grep -q "tpu_host.sh job" || return 1
  echo "$pid"
}

# Makes runs/ of the checkout a link to the share, and moves there what this
# host has written without one.
link_runs() {
  local path runs="$code/runs"
  if ! is_shared || [[ ! -d "$code/.git" ]]; then return; fi
  if [[ -d "$runs" && ! -L "$runs" ]]; then
    if job_pid >/dev/null; then
      say "a job writes to ~/rljax/runs: run the verb stop first." >&2
      exit 1
    fi
    shopt -s dotglob nullglob
    for path in "$runs"/*; do
      if [[ -e "$shared/runs/${path##*/}" ]]; then
        say "${path##*/} is in ~/rljax/runs of this host and in runs of the" \
          "share: remove or rename one of them." >&2
        exit 1
      fi
      mv "$path" "$shared/runs/"
    done
    shopt -u dotglob nullglob
    rmdir "$runs"
  fi
  ln -sfn "$shared/runs" "$runs"
}

verb="${1:-}"
shift || true
case "$verb" in
  setup)
    if ! command -v uv >/dev/null; then
      python3 -m pip install --quiet --user uv
    fi
    if [[ ! -x "$venv/bin/python" ]]; then
      # The Python of the TPU images is older than rljax asks for.
      uv venv --quiet --python "$PYTHON_VERSION" "$venv"
    fi
    if [[ -n "${1:-}" ]] && ! is_shared; then
      mkdir -p "$shared"
      sudo apt-get -qq update
      sudo apt-get -qq install --yes nfs-common >/dev/null
      sudo mount -t nfs "$1" "$shared"
      sudo mkdir -p "$shared/runs" "$shared/logs"
      # A new share belongs to root.
      sudo chown "$(id -u):$(id -g)" "$shared/runs" "$shared/logs"
    fi
    link_runs
    if is_shared; then say "is set up, with ~/shared"; else say "is set up"; fi
    ;;
  sync)
    if [[ ! -d "$code/.git" ]]; then git init --quiet "$code"; fi
    git -C "$code" fetch --quiet "$HOME/$1.bundle" HEAD
    git -C "$code" checkout --quiet --force --detach "$1"
    rm -f "$HOME"/*.bundle
    link_runs
    uv pip install --quiet --python "$venv/bin/python" \
      --editable "${code}[$EXTRAS]"
    say "has commit ${1:0:12}"
    ;;
  commit)
    state=clean
    if ! git -C "$code" diff --quiet HEAD; then state=changed; fi
    say "commit $(git -C "$code" rev-parse HEAD) $state"
    ;;
  run)
    cd "$code"
    exec "$@"
    ;;
  start)
    if job_pid >/dev/null; then
      if [[ "$(cat "$job/command")" == "$(printf '%q ' "$@")" ]]; then
        say "runs it already"
        exit
      fi
      say "another job is running: $(cat "$job/command")" >&2
      exit 1
    fi
    # Done is a script that has written its summary, as in the other launchers:
    # one that a signal stopped has saved its state and ends well, too.
    workdir="" flagfile="" previous=""
    for word in "$@"; do
      case "$word" in
        --workdir=* | -workdir=*) workdir="${word#*=}" ;;
        --flagfile* | -flagfile*) flagfile=1 ;;
      esac
      case "$previous" in
        --workdir | -workdir) workdir="$word" ;;
      esac
      previous="$word"
    done
    if [[ -n "$flagfile" && -z "$workdir" ]]; then
      say "--workdir must be on the command line: in a flagfile it is not" \
        "seen, and a job that was stopped would count as finished." >&2
      exit 1
    fi
    if ((num > 1)) && ! is_shared && [[ "$workdir" != *://* ]]; then
      say "several hosts need one place for checkpoints: give a --workdir in a" \
        "bucket, such as gs://BUCKET/runs/x, or set SHARED=ADDRESS:/PATH and" \
        "run the verb setup." >&2
      exit 1
    fi
    link_runs
    mkdir -p "$job" "$(dirname "$log")"
    rm -f "$job/status" "$job/stopped"
    printf '%q ' "$@" >"$job/command"
    echo "$workdir" >"$job/workdir"
    setsid bash "$HOME/tpu_host.sh" job "$@" >>"$log" 2>&1 </dev/null &
    echo $! >"$job/pid"
    say "has started it"
    ;;
  job)
    cd "$code"
    echo "== $(date '+%F %T'), host $id of $num: $(cat "$job/command")"
    # This shell outlives the signal that ends the job.
    trap : TERM
    status=0
    "$@" || status=$?
    echo "== $(date '+%F %T'), host $id of $num: ended with status $status"
    echo "$status" >"$job/status"
    ;;
  status)
    if [[ ! -e "$job/pid" ]]; then
      say "idle"
    elif job_pid >/dev/null; then
      say "running"
    else
      # Without a status its shell was killed with it.
      status="$(cat "$job/status" 2>/dev/null || echo 137)"
      outcome=finished
      workdir="$(folder_of "$(cat "$job/workdir")")"
      cd "$code"
      if [[ -e "$job/stopped" ]]; then
        outcome=stopped
      elif [[ -n "$workdir" && -e "$workdir/flags.json" &&
        ! -e "$workdir/summary.json" ]]; then
        # The doctor and its like write neither.
        outcome=unfinished
      fi
      say "ended $status $outcome"
    fi
    ;;
  logs)
    if [[ -n "${FOLLOW:-}" ]]; then
      exec tail --lines="$TAIL" --follow=name "$log"
    fi
    tail --lines="$TAIL" "$log"
    ;;
  stop)
    if ! pid="$(job_pid)"; then
      say "nothing is running"
      exit
    fi
    touch "$job/stopped"
    kill -TERM -- "-$pid"
    deadline=$((SECONDS + PATIENCE))
    while job_pid >/dev/null; do
      if ((SECONDS >= deadline)); then
        kill -KILL -- "-$pid" 2>/dev/null || true
        say "did not end in $PATIENCE s, and was killed"
        exit
      fi
      sleep 0.2
    done
    say "has stopped"
    ;;
  *)
    sed -n '2,/^set/{/^#/p}' "$0" >&2
    exit 2
    ;;
esac
