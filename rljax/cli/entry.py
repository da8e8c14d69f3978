"""Runs a script: parses its flags, checks them and prints its errors."""

import os
import sys
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from absl import app, flags

from rljax.cli import terminal
from rljax.storage import calls, paths
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


def run(main: Callable[[], int | None]) -> None:
  """Parses the flags, runs a script's main function, and exits.

  A flag that cannot be parsed, a word that is no flag, a number that is not
  finite, a path that is none of this machine, a disk that is full, a ValueError
  of the script, and a run that its checks have ended, are one line on standard
  error, and the exit status is 1; `--verbosity=1` shows where the error came
  from. A path that begins with ~ is expanded.

  Args:
    main: takes nothing, and returns the exit status.
  """

  def checked(argv):
    values = flags.FLAGS
    try:
      check(values, argv[1:])
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
    ValueError: if there are any, a number is not finite, or a path is none of
      this machine, such as gs://bucket.
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
        paths.check_local(path, f"--{name}")
    if isinstance(flag.value, str) and flag.value.startswith("~"):
      flag.value = os.path.expanduser(flag.value)
    if isinstance(flag.value, float) and not abs(flag.value) <= _LARGEST:
      raise ValueError(
        f"--{flag.name} must be a finite number, as float32 holds it, got "
        f"{flag.value}."
      )


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
