# shellcheck shell=bash
# Takes --env NAME off the words of the launcher that sources it, and stops where
# a variable is not set. A command gets the environment of its launcher as it is,
# HF_TOKEN, WANDB_API_KEY and all else: --env says what must be there.
while [[ "${1:-}" == --env || "${1:-}" == --env=* ]]; do
  if [[ "$1" == --env ]]; then shift; fi
  name="${1-}" && name="${name#--env=}"
  if [[ ! "$name" =~ ^[A-Za-z_][A-Za-z0-9_]*$ ]]; then
    echo "--env takes the name of a variable, such as --env HF_TOKEN, got" \
      "$(printf %q "${name%%=*}")." >&2
    exit 2
  elif [[ -z "${!name:-}" ]]; then
    echo "--env $name: it is not set here; export it first." >&2
    exit 1
  fi
  shift
done
