"""The best evaluation of a run, with the parameters that it was of."""

import math
import os
import pathlib
from collections.abc import Callable
from typing import Any

from rljax.storage import checkpoint
from rljax.training import guards

Tree = Any


class Best:
  """Keeps the parameters of the best evaluation in `<folder>/checkpoints`.

  The first evaluation, of what the run starts from, is to be beaten; if none
  does, the last parameters count as the best.

  Attributes:
    folder: which flags that name models take.
    checkpoints: in it; one at most stays.
    found: `{"step", "value", "kept"}` of the best evaluation so far, or None.
      `kept` is the step of the parameters in the folder; None, of none.
  """

  def __init__(
    self, folder: str | os.PathLike[str], note: Callable[[str], None]
  ):
    """Opens the folder.

    Args:
      folder: of the best.
      note: is told in a line what is unusual.
    """
    self.folder = pathlib.Path(folder)
    self.checkpoints = checkpoint.Checkpoints(folder, keep=1)
    self.found: dict[str, Any] | None = None
    self._note = note

  @property
  def kept(self) -> int | None:
    """The step of the parameters in the folder."""
    return (self.found or {}).get("kept")

  def restore(
    self,
    found: dict[str, Any] | None,
    first_step: int,
    total_steps: int,
    *,
    keep: bool = False,
  ) -> None:
    """Goes back to the best of the steps that are not repeated.

    Args:
      found: filed with the checkpoint that the run goes on from.
      first_step: the first that is done again.
      total_steps: of the run.
      keep: sets aside what is of later steps, where it was deleted else.
    """
    self.found = found
    if first_step < total_steps:
      # A shorter run has evaluated its end, too, behind its last checkpoint.
      last = self.checkpoints.read_meta(first_step)
      if last and last["step"] == last["kept"] == first_step:
        self.found = last
    self.checkpoints.forget_after(self.kept or 0, keep=keep)
    if self.kept is not None and self.kept not in self.checkpoints.all_steps():
      # A better one of the steps that are repeated had taken its place.
      self.found = self.found | {"kept": None}

  def update(
    self, step: int, value: float, params: Tree, *, is_last: bool
  ) -> None:
    """Keeps the parameters of an evaluation, if it is the best so far.

    Args:
      step: of the evaluation.
      value: the larger, the better. One that is not finite is no evaluation.
      params: that were evaluated.
      is_last: whether no other evaluation comes after it.

    Raises:
      guards.NotFinite: if parameters that are to be kept are not finite.
    """
    value = float(value)
    if not math.isfinite(value):
      self._note(f"step {step}: the evaluation is {value}, and never the best.")
      # Whatever comes after the start is then better than that.
      self.found = self.found or {"step": step, "value": None, "kept": None}
      return
    if self.found is None:
      self.found = {"step": step, "value": value, "kept": None}
    if self.found["value"] is None or value > self.found["value"]:
      self.found = {"step": step, "value": value, "kept": step}
    elif is_last and self.kept is None:
      self._note("Nothing beat the start: the last parameters are the best.")
      self.found = self.found | {"kept": step}
    else:
      return
    guards.check_finite(params, f"The best of step {step} is not kept")
    self.checkpoints.save(step, {"params": params}, self.found)
    # Before the state that says so: a kill between them repeats these steps.
    self.checkpoints.wait()

  def titled(self, title: str, total_steps: int) -> str:
    """Adds to the title of a summary of the last step which one is best."""
    if self.found is None:
      return title
    step, kept = self.found["step"], self.kept
    if kept is None:
      return f"{title}; the start, step {step}, is the best, and best has none"
    if kept != step:
      return (
        f"{title}, step {total_steps}; the start, step {step}, is the best, "
        f"and best has the last, step {kept}"
      )
    return f"{title}, step {total_steps}; the best, step {kept}, is in best"
