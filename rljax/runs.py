"""What every script does before its own work begins."""

import os
import sys
from collections.abc import Collection, Sequence
from typing import Any

import jax
from absl import flags, logging

from rljax import checkpoint


def start(
  values: flags.FlagValues, may_change: Collection[str] = ()
) -> dict[str, Any]:
  """Opens the workdir of a script and holds its flags against it.

  Reads two flags that all scripts have: `workdir`, and `compilation_cache`,
  where compiled programs are kept between runs. A script files its flags by
  `checkpoint.write_flags` once all else that may be wrong with them is known.

  Args:
    values: the absl flags of the script.
    may_change: flags that may differ when the run is started again.

  Returns:
    Name to value of the script's own flags.

  Raises:
    ValueError: if the workdir cannot be written to, or holds a run with other
      flags.
  """
  logging.set_verbosity(logging.WARNING)  # Orbax has much to say.
  if values.compilation_cache:
    cache = os.path.expanduser(values.compilation_cache)
    jax.config.update("jax_compilation_cache_dir", cache)
  in_force = {
    flag.name: flag.value
    for flag in values.get_key_flags_for_module(sys.argv[0])
  }
  checkpoint.prepare_workdir(values.workdir)
  checkpoint.check_flags(values.workdir, in_force, may_change)
  return in_force


def unescaped(texts: Sequence[str]) -> list[str]:
  """Texts of a flag, in which a backslash and an n are a line feed."""
  return [text.replace("\\n", "\n") for text in texts]


def check_positive(values: flags.FlagValues, *names: str) -> None:
  """Raises ValueError if one of the named flags is below 1."""
  for name in names:
    if values[name].value < 1:
      raise ValueError(f"--{name} must be positive, got {values[name].value}.")
