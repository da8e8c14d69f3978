"""Runs a script: parses its flags, checks them and prints its errors."""

import os
import sys
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from absl import app, flags

from rljax.cli import terminal
from rljax.storage import buckets, calls, mirrors, paths
from rljax.training import guards, preflight

_LARGEST = float(np.finfo(np.float32).max)
_STOPPED = (ValueError, preflight.Refused, guards.NotFinite, guards.Stale)
# Flags that hold paths, or texts with paths in them.
PATHS = frozenset(
  (
    *("workdir", "compilation_cache", "stages", "cache", "output", "corpus"),
    *("data", "dev_data", "eval_data", "value_data", "samples"),
    *("new_vs_samples", "labels", "solutions", "profile_file"),
    *("task", "rewards"),
    *("policy", "policies", "reference", "base", "critic", "frozen"),
    *("reward_model", "rerank_model", "teacher_model", "teacher", "rewards"),
    *("task_options", "score_options", "example_options", "solutions"),
  )
)
# Those of them that are no workdir, model or data: code, and places that are
# written to as the work goes on.
_LOCAL = frozenset(
  ("compilation_cache", "stages", "output", "profile_file", "task", "rewards")
)
# Flags of a few scripts, and why others have not got them.
_ELSEWHERE = {
  "stream": "; sft.py, preference.py and outcome_reward_model.py read streams; "
  "others rank, filter or draw from all rows before they begin."
}


def run(main: Callable[[], int | None]) -> None:
  """Parses the flags, runs a script's main function, and exits.

  A flag that cannot be parsed, a word that is no flag, a number that is not
  finite, a path that is none of this machine, a disk that is full, a ValueError
  of the script, and a run that its checks have ended, are one line on standard
  error, and the exit status is 1; `--verbosity=1` shows where the error came
  from. A path that begins with ~ is expanded. For a workdir in a bucket, the
  script sees the folder that stands for it, see `storage.mirrors`; what it has
  left there is uploaded at its end, whatever that is.

  Args:
    main: takes nothing, and returns the exit status.
  """

  def checked(argv):
    values = flags.FLAGS
    try:
      check(values, argv[1:])
      with mirrors.closing():
        return main()
    except calls.Ended as error:
      print("Stopped by a signal; everything so far is saved.", flush=True)
      return error.exit_status
    except (OSError, *_STOPPED) as error:
      if isinstance(error, OSError) and not isinstance(error, paths.DiskError):
        if not paths.is_full_or_closed(error):
          raise
        error = paths.DiskError(error.filename or "A file", error)
      if values.verbosity >= 1:
        raise
      _print_error(argv[0], f"{error} (--verbosity=1 shows where.)")
      if jax.distributed.is_initialized():
        os._exit(1)  # The other processes would wait for this one.
      return 1

  terminal.keep_printing()
  app.run(checked, flags_parser=_parse)


def _parse(argv):
  """Parses the flags, or prints what is wrong with them and exits."""
  try:
    return flags.FLAGS(argv)
  except flags.Error as error:
    text = "; ".join(str(error).splitlines())
    if isinstance(error, flags.UnrecognizedFlagError):
      text += _ELSEWHERE.get(error.flagname, "")
    _print_error(argv[0], f"{text.rstrip('.')}. (--help lists the flags.)")
    sys.exit(1)


def _print_error(script, text):
  sys.stdout.flush()
  print(f"{os.path.basename(script)}: {text}", file=sys.stderr, flush=True)


def check(values: flags.FlagValues, words: Sequence[str] = ()) -> None:
  """Expands paths, and refuses what cannot be meant.

  Args:
    values: parsed flags.
    words: of the command line that are no flags.

  Raises:
    ValueError: if there are any, a number is not finite, or a path is a URL
      that cannot be reached, or where none can be.
  """
  if words:
    name = words[0].partition("=")[0]
    hint = f"; write --{words[0]}" if name in values else ""
    raise ValueError(
      f"{words[0]!r} on the command line is not a flag: flags begin with "
      f"-- and look like --name=value{hint}."
    )
  for name in values:
    flag = values[name]
    if name in PATHS:
      several = isinstance(flag.value, (list, tuple))
      for path in flag.value if several else [flag.value or ""]:
        _check_path(name, path)
      if name == "workdir" and buckets.is_url(flag.value or ""):
        flag.value = mirrors.folder_of(flag.value)
    if isinstance(flag.value, str) and flag.value.startswith("~"):
      flag.value = os.path.expanduser(flag.value)
    if isinstance(flag.value, float) and not abs(flag.value) <= _LARGEST:
      raise ValueError(
        f"--{flag.name} must be a finite number, as float32 holds it, got "
        f"{flag.value}."
      )


def _check_path(name: str, path: str) -> None:
  """Refuses a path that cannot be reached, or is none of this machine."""
  if name in _LOCAL:
    paths.check_local(path, f"--{name}")
  else:  # Some are name=path.
    _, _, rest = path.partition("=")
    buckets.check(rest if "://" in rest else path, f"--{name}")


def may_change(*names: str) -> None:
  """Marks flags that may differ when a run is started again."""
  for name in names:
    flags.FLAGS[name].may_change = True


def may_grow(*names: str, kind: str = "steps") -> None:
  """Marks flags that may be larger when a run is started again.

  Args:
    *names: of the flags.
    kind: "steps" or "parts", see `training.longer.check`.
  """
  for name in names:
    flags.FLAGS[name].may_grow = kind


def require(names, holds, message):
  """Registers a condition over several flags."""
  flags.register_multi_flags_validator(names, holds, message)


def check_read(
  values: flags.FlagValues, chooser: str, reads: Mapping[str, Sequence[str]]
) -> None:
  """Refuses flags that are set, and that the chosen method does not read.

  Args:
    values: parsed flags.
    chooser: name of the flag that chooses the method.
    reads: method -> names of flags that it reads. Flags that no method names
      are read by all.

  Raises:
    ValueError: naming the flag and its methods.
  """
  chosen = values[chooser].value
  for name in sorted({name for names in reads.values() for name in names}):
    flag = values[name]
    if flag.value != flag.default and name not in reads[chosen]:
      methods = [method for method, names in reads.items() if name in names]
      raise ValueError(
        f"--{name}={flag.value} belongs to --{chooser}="
        f"{' or '.join(methods)}; leave it out for {chosen}."
      )


def unescaped(texts: Sequence[str]) -> list[str]:
  """Texts of a flag, in which a backslash and an n are a line feed."""
  return [text.replace("\\n", "\n") for text in texts]
