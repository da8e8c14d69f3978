"""What stops a run that has left the finite numbers, or its sampler.

The device skips updates that are not finite (`optimizers.guarded`) and counts
them; `Watch` reads the counts on the host, and ends the run when they do not
end. Nothing that is not finite is saved: `first_not_finite` finds it.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from rljax.distributed import planning, processes
from rljax.training import precision

Tree = Any

_NUM_GAPS = 3
# Metrics by which sampler and trainer are compared -> fields of a tolerance.
_GAPS = {
  "sampler/log_prob_gap_mean": "mean",
  "sampler/log_prob_k3": "kl",
  "sampler/log_prob_gap_99": "quantile",
}


class NotFinite(RuntimeError):
  """Numbers of the run are not finite, and it does not go on."""


class Stale(RuntimeError):
  """Sampler and trainer have come to disagree, and the run does not go on."""


class Watch:
  """Looks at the metrics of every step, and raises when a run is lost.

  Attributes:
    skipping_since: `{"step", "name", "value"}` of what was not finite first
      among the updates that are being skipped; None after one was applied.
    num_gaps: steps in a row in which sampler and trainer disagree.
    tolerance: see `__init__`; the run sets it when it knows its models.
  """

  def __init__(
    self,
    note: Callable[[str], None],
    *,
    max_skipped: int,
    tolerance: precision.Tolerance | None = None,
    is_strict: bool = False,
  ):
    """Begins a run without a fault.

    Args:
      note: shows a sentence.
      max_skipped: updates in a row that are skipped before the run ends; 0 is
        as 1.
      tolerance: how far the sampler's log-probabilities may differ from the
        trainer's; None: nothing is compared.
      is_strict: whether three steps in a row that differ by more end the run.
    """
    self._note, self._max_skipped = note, max_skipped
    self.tolerance, self._is_strict = tolerance, is_strict
    self.skipping_since: dict[str, Any] | None = None
    self.num_gaps = 0

  @property
  def state(self) -> dict[str, Any]:
    """What goes into a checkpoint: empty, unless there is a fault."""
    state = {"skipping": self.skipping_since, "gaps": self.num_gaps}
    return {"watch": state} if any(state.values()) else {}

  def restore(self, meta: Mapping[str, Any]) -> None:
    """Goes on from the `state` that a checkpoint has."""
    state = meta.get("watch", {})
    self.skipping_since = state.get("skipping")
    self.num_gaps = state.get("gaps", 0)

  def look(self, step: int, metrics: Mapping[str, Any]) -> None:
    """Looks at the metrics of a step; those that are not there say nothing.

    Raises:
      NotFinite: if too many updates in a row were skipped.
      Stale: if sampler and trainer disagree for the third time in a row.
    """
    self._look_at_updates(int(step), metrics)
    self._look_at_gaps(int(step), metrics)

  def check_end(self, step: int) -> None:
    """Raises NotFinite at the end of a run that several steps taught nothing.

    Args:
      step: the last one.
    """
    if self.skipping_since and self.skipping_since["step"] < step:
      raise NotFinite(self._lost("the run has ended like this"))

  def _look_at_updates(self, step, metrics):
    count = int(metrics.get("updates/skipped_in_a_row", -1))
    if count < 0:
      return
    if count == 0:
      self.skipping_since = None
      return
    if self.skipping_since is None:
      name, value = _first_of(metrics)
      # As text: JSON has no NaN.
      self.skipping_since = {"step": step, "name": name, "value": value}
      self._note(
        f"step {step}: {name} is {value}; the update is skipped, and the "
        "parameters stay as they are."
      )
    if count >= max(1, self._max_skipped):
      raise NotFinite(
        self._lost(
          f"{count} in a row were skipped (--max_skipped={self._max_skipped})"
        )
      )

  def _lost(self, how):
    since = self.skipping_since
    return (
      f"{since['name']} was {since['value']} in step {since['step']}, and no "
      f"update since could be applied: {how}. Nothing of this was saved; the "
      "last checkpoint stays. Lower --learning_rate, set --max_grad_norm, or "
      "look at what that step has learnt from."
    )

  def _look_at_gaps(self, step, metrics):
    if self.tolerance is None:
      return
    found = {
      name: (float(metrics[name]), getattr(self.tolerance, field))
      for name, field in _GAPS.items()
      if name in metrics
    }
    beyond = [name for name, (x, limit) in found.items() if not x <= limit]
    if not beyond:
      if found:
        self.num_gaps = 0
      return
    self.num_gaps += 1
    value, limit = found[beyond[0]]
    text = (
      f"step {step}: sampler and trainer differ by {value:.3g} nats in the "
      f"log-probabilities of tokens ({beyond[0]}), more than {limit:.3g}: the "
      "sampler has other weights, another temperature or other tokens than the "
      "loss"
    )
    if self._is_strict and self.num_gaps >= _NUM_GAPS:
      raise Stale(
        f"{text}, for {self.num_gaps} steps in a row. Fix it, or pass "
        "--preflight=warn to train anyway."
      )
    if self.num_gaps == 1 or self._is_strict:
      self._note(f"WARNING: {text}.")


def _first_of(metrics):
  """Name and value of what is not finite: a loss, if there is one."""
  bad = {}
  for name, value in metrics.items():
    try:
      if not math.isfinite(value):
        bad[name] = str(float(value))
    except (OverflowError, TypeError, ValueError):
      continue
  for name in sorted(bad, key=lambda name: not name.endswith("loss")):
    return name, bad[name]
  return "a parameter that the update would have made", "not finite"


def first_not_finite(tree: Tree) -> str | None:
  """Returns the path of the first array that is not finite, or None.

  Args:
    tree: arrays on the host or on devices; all processes call this alike.
  """
  if planning.current():  # There are no numbers.
    return None
  floats = {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    if jnp.issubdtype(leaf.dtype, jnp.inexact)
  }
  found = processes.gather(_are_finite(floats))
  return next((name for name in floats if not found[name]), None)


def check_finite(tree: Tree, what: str) -> None:
  """Refuses arrays that are not finite.

  Args:
    tree: see `first_not_finite`.
    what: begins the error: what is not done for that.

  Raises:
    NotFinite: naming the first array that is not.
  """
  if (bad := first_not_finite(tree)) is not None:
    raise NotFinite(f"{what}: {bad} is not finite.")


@jax.jit
def _are_finite(floats):
  return {name: jnp.all(jnp.isfinite(x)) for name, x in floats.items()}
