"""When a run may go on with more steps than it began with."""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

from absl import flags

from rljax.storage import mirrors, workdirs


def filed(workdir: str | os.PathLike[str]) -> dict[str, Any]:
  """Returns the flags that the run in a folder was started with, or nothing."""
  path = pathlib.Path(workdir, "flags.json")
  return workdirs.read_object(path) if path.exists() else {}


def check(values: flags.FlagValues, growing: Mapping[str, str]) -> None:
  """Holds flags of the length of a run against those that it began with.

  Args:
    values: the flags of this start.
    growing: name of a flag that may grow -> "steps" if the schedule of the
      learning rate is spread over them, "parts" if each has its own.

  Raises:
    ValueError: if one fell, or if the steps before would have been others had
      the run been longer from its start.
  """
  old = filed(values.workdir)
  for name, kind in sorted(growing.items()):
    was, now = old.get(name), values[name].value
    if name not in old or was == now:
      continue
    start = (
      f"{mirrors.shown(values.workdir)} was started with --{name}={was}, now "
      f"{now}"
    )
    if not now > was:
      raise ValueError(
        f"{start}: it may grow, not fall. Give --{name}={was}, or another "
        "--workdir."
      )
    if kind == "steps" and (reason := _reason(values)):
      raise ValueError(
        f"{start}: {reason}, so that the steps that are done would have been "
        f"others. Give --{name}={was}, or start another --workdir from the "
        "parameters of this one."
      )


def check_done(
  first_step: int, total_steps: int | None, workdir: str | os.PathLike[str]
) -> None:
  """Raises ValueError if a run has done more steps than it is to have.

  Args:
    first_step: number of steps that are done.
    total_steps: of the whole run; None: nobody knows yet.
    workdir: of the run.
  """
  if total_steps is not None and first_step > total_steps:
    raise ValueError(
      f"The run in {os.fspath(workdir)} has done {first_step} steps, and is to "
      f"have {total_steps}: give as many or more, or another --workdir."
    )


def _reason(values: flags.FlagValues) -> str:
  """Says why earlier steps depend on the number of all; empty: they do not."""
  if _value(values, "schedule_steps"):
    return ""
  if _value(values, "schedule") not in (None, "constant"):
    return f"--schedule={values.schedule} is spread over all of them"
  if 0 < (_value(values, "warmup") or 0) < 1:
    return f"--warmup={values.warmup} is a share of all of them"
  return ""


def _value(values: flags.FlagValues, name: str) -> Any:
  """Returns the value of a flag; None where the script has none."""
  return values[name].value if name in values else None
