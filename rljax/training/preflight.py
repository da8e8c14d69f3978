"""Checks before the first update: do sampler and trainer mean the same thing?

Most silent bugs of this field show at step 0, where every ratio must be 1 and
every KL 0: a temperature that one side forgot, a pad that is attended to, an
end token that the mask drops, a shift by one. A script runs these checks on
its first rollout, prints them as a table and refuses to train on red.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from rljax.distributed import processes
from rljax.generation import rollouts, samplers
from rljax.ops import log_probs as log_probs_lib
from rljax.training import precision, sketches

Array = chex.Array


class Refused(RuntimeError):
  """Sampler and trainer disagree: nothing is trained."""


@dataclasses.dataclass(frozen=True)
class Check:
  """One line of the table.

  Attributes:
    name: what must hold.
    value: what was found.
    limit: the largest value that is fine, or None where nothing is compared.
    note: what the number is, or what to look at when it is red.
  """

  name: str
  value: float
  limit: float | None
  note: str = ""

  @property
  def passed(self) -> bool:
    # A NaN is not smaller than anything, so it is red.
    return self.limit is None or self.value <= self.limit


def check(
  log_probs_of: Callable[[Any, rollouts.Rollout], Array],
  params: Any,
  rollout: rollouts.Rollout,
  *,
  stop_ids: Sequence[int] = (),
  has_stop_strings: bool = False,
  gradients: Callable[[int], tuple[Any, dict[str, Array]]] | None = None,
  num_micro_batches: int = 2,
  tolerance: precision.Tolerance | None = None,
  parts_add_up: bool = True,
) -> list[Check]:
  """Checks that sampler, trainer and masks agree on one rollout.

  Log-probabilities are compared by the mean of their gaps, by k3 and by the gap
  that one token in a hundred exceeds; the largest gap is only shown, for one
  token may round far.

  Args:
    log_probs_of: maps parameters and rows to the log-probabilities `[N, T]` of
      the response tokens, exactly as the trainer computes them.
    params: those that drew the rollout.
    rollout: N rows.
    stop_ids: token ids that end a response.
    has_stop_strings: whether texts may end a response, too.
    gradients: maps a number of micro-batches to the gradients, or sketches of
      them, and metrics of one minibatch, exactly as the update makes them.
      Metrics that are looked at: `ppo/ratio_mean` and `ppo/approx_kl`; shown
      are `ppo/ratio_max` and `ppo/ratio_min`.
    num_micro_batches: compared with one; 1 to compare nothing.
    tolerance: what rounding may do; None: in float32.
    parts_add_up: False where a part of the loss is no sum over rows, and the
      difference of the accumulated gradient is only shown.

  Returns:
    The checks, in the order in which they should be fixed.
  """

  tolerance = tolerance or precision.tolerance("float32", params)
  statistics = jax.jit(log_probs_of)
  found = processes.gather(rollout.replace(allowed=None))
  mask = found.response_mask
  trainer = processes.gather(statistics(params, rollout))
  again = processes.gather(statistics(params, rollout))

  checks = [
    _agreement(
      "sampler and trainer log-probs agree",
      precision.gaps(found.log_probs, trainer, mask),
      tolerance,
      "else temperature, allowed tokens or positions differ",
    ),
    Check(
      "dropout is off",
      precision.gaps(trainer, again, mask).largest,
      0.0,
      "nats between two passes with the same parameters",
    ),
    Check(
      "KL of the policy to itself is 0",
      float(np.max(np.abs(_kl(trainer, again, mask)))),
      1e-6,
      "nats, k3 estimate",
    ),
  ]

  checks += _invariances(
    lambda rows: processes.gather(statistics(params, rows)),
    rollout,
    trainer,
    mask,
    tolerance,
  )
  checks.append(_end_token(found, stop_ids, has_stop_strings))
  if gradients is not None:
    whole, metrics = gradients(1)
    checks.append(_first_ratio(metrics, tolerance))
    if num_micro_batches > 1:
      parts, _ = gradients(num_micro_batches)
      checks.append(
        Check(
          f"{num_micro_batches} micro-batches equal one batch",
          sketches.relative_gap(whole, parts),
          tolerance.gradient if parts_add_up else None,
          "relative difference of the gradients"
          + ("" if parts_add_up else "; entropies differ, as they must"),
        )
      )
  return checks


def _agreement(name, gaps, tolerance, note) -> Check:
  """A check of that measure which is furthest beyond its limit."""
  measure, value, limit = gaps.worst(tolerance)
  return Check(name, value, limit, f"nats, {measure}; {gaps}; {note}")


def _first_ratio(metrics, tolerance) -> Check:
  """Checks that the ratios of the first update are 1, but for rounding."""
  of = lambda name: float(metrics.get(f"ppo/{name}", math.nan))
  low, high = of("ratio_min"), of("ratio_max")
  value, limit = abs(of("ratio_mean") - 1.0), tolerance.mean
  if not of("approx_kl") <= tolerance.kl:
    value, limit = of("approx_kl"), tolerance.kl
  return Check(
    "first ratio is 1",
    value,
    limit,
    f"|mean - 1|, or k3, before the first update; ratios {low:.4g} to "
    f"{high:.4g}",
  )


def _invariances(statistics, rollout, trainer, mask, tolerance) -> list[Check]:
  """Pads and the order of rows must change nothing."""
  # More pads on the left: positions and attention must come from the mask.
  extra = 3
  padded = rollout.replace(
    prompt_ids=jnp.pad(rollout.prompt_ids, ((0, 0), (extra, 0))),
    prompt_mask=jnp.pad(rollout.prompt_mask, ((0, 0), (extra, 0))),
  )
  order = np.random.default_rng(0).permutation(mask.shape[0])
  permuted = jax.tree.map(lambda x: x[order], rollout)
  return [
    _agreement(
      "pads change nothing",
      precision.gaps(trainer, statistics(padded), mask),
      tolerance,
      f"{extra} more pads on the left",
    ),
    _agreement(
      "order of rows changes nothing",
      precision.gaps(trainer[order], statistics(permuted), mask[order]),
      tolerance,
      "else rows mix",
    ),
  ]


def _kl(log_probs, ref_log_probs, mask):
  estimate = log_probs_lib.kl_estimate(
    jnp.where(mask, log_probs, 0.0),
    jnp.where(mask, ref_log_probs, 0.0),
    kind="k3",
  )
  return np.asarray(estimate)


def _end_token(rollout, stop_ids, has_stop_strings) -> Check:
  """Rows that ended by a stop id must have it inside their mask."""
  mask = np.asarray(rollout.response_mask)
  ids = np.asarray(rollout.response_ids)
  finished = np.asarray(rollout.finished)
  lengths = mask.sum(axis=1)
  prefix = np.arange(mask.shape[1])[None, :] < lengths[:, None]
  wrong = np.any(mask != prefix, axis=1) | (lengths == 0)
  if stop_ids:
    is_stop = np.isin(ids, list(stop_ids))
    # A stop id before the last real token, or one hidden behind the mask.
    last = np.maximum(lengths - 1, 0)
    before = is_stop & (np.arange(mask.shape[1])[None, :] < last[:, None])
    wrong |= np.any(before & mask, axis=1)
    at_end = np.take_along_axis(is_stop, last[:, None], axis=1)[:, 0]
    wrong |= at_end & ~finished
    if not has_stop_strings:
      wrong |= finished & ~at_end
  return Check(
    "masks end with the end token",
    float(wrong.sum()),
    0.0,
    f"rows that do not; {int(finished.sum())} of {len(finished)} responses "
    "ended by themselves",
  )


def tree_bytes(tree: Any) -> int:
  """Bytes of a pytree's arrays, each counted once."""
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def device_bytes(tree: Any) -> int:
  """Bytes that a pytree's arrays take on one device, the fullest of all."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    for x in jax.tree.leaves(tree)
  )


def show(
  checks: Sequence[Check],
  compilations: Sequence[dict[str, Any]] = (),
  memory: dict[str, Any] | None = None,
) -> None:
  """Prints the checks, what was compiled, and memory by part.

  Of several processes, the first one does.

  Args:
    checks: from `check`; none: no table of them.
    compilations: of `Compiled` programs; their memory is that of one device.
    memory: part -> tree of jax arrays, or of their shapes, or None.
  """
  if not processes.is_first():
    return
  from rich import console, table, text  # Only when it is shown.

  terminal = console.Console()
  if not terminal.is_terminal:
    terminal = console.Console(width=110)
  if checks:
    found = table.Table(title="Preflight", title_justify="left")
    for column in ("check", "found", "limit", "", "what the number is"):
      found.add_column(column)
    for line in checks:
      mark = text.Text("ok", "green")
      if not line.passed:
        mark = text.Text("RED", "red")
      limit = "" if line.limit is None else f"{line.limit:.3g}"
      found.add_row(line.name, f"{line.value:.3g}", limit, mark, line.note)
    terminal.print(found)
  sizes = ("argument", "output", "temporary")
  if compilations:
    compiled = table.Table(
      title="Compiled, memory per device", title_justify="left"
    )
    compiled.add_column("program")
    for column in ("seconds", *sizes):
      compiled.add_column(column, justify="right")
    for row in compilations:
      columns = (_megabytes(row[f"{part}_bytes"]) for part in sizes)
      compiled.add_row(row["name"], f"{row['seconds']:.1f}", *columns)
    terminal.print(compiled)
  if memory:
    parts = table.Table(title="Memory", title_justify="left")
    parts.add_column("part")
    for column in ("in all", "per device"):
      parts.add_column(column, justify="right")
    for name, tree in memory.items():
      sizes = tree_bytes(tree), device_bytes(tree)
      parts.add_row(name, *map(_megabytes, sizes))
    terminal.print(parts)


def _megabytes(size: int) -> str:
  return f"{size / 2**20:,.1f} MB"


def enforce(checks: Sequence[Check], mode: str) -> None:
  """Stops a run whose checks are red.

  Args:
    checks: from `check`.
    mode: "strict" raises, "warn" does not.

  Raises:
    Refused: in mode "strict", if a check did not pass.
  """
  red = [line for line in checks if not line.passed]
  if red and mode == "strict":
    names = "; ".join(
      f"{line.name}: {line.value:.3g} > {line.limit:.3g}" for line in red
    )
    raise Refused(
      f"preflight found {len(red)} of {len(checks)} checks red ({names}). "
      "Training on this would optimise something else than was sampled. Fix "
      "it, or pass --preflight=warn to train anyway."
    )


def run(
  mode: str,
  prepare: Callable[..., tuple[dict[str, Any], Any]],
  state: dict[str, Any],
  reference: Any,
  rollout: rollouts.Rollout,
  earned: Any,
  *,
  sampler: samplers.Sampler,
  gradients: Callable[[int], Callable[..., tuple[Any, dict[str, Array]]]],
  more: Sequence[Any] = (),
  micro_batch: int,
  num_shards: int = 1,
  tolerance: precision.Tolerance,
  parts_add_up: bool = True,
  programs: Sequence[Any] = (),
) -> None:
  """Checks sampler against trainer on a script's first rollout, and shows it.

  Everything is the script's own: what `prepare` makes of what was just sampled
  is compared with what the sampler wrote down, and gradients are those of the
  update. They are taken of rows that show a fault if there is one: every second
  one ends early, by an end token, and no two rows have the same advantage.

  Args:
    mode: "strict" stops if a check fails, "warn" goes on.
    prepare: maps state, reference, rollout and earnings to the batch that is
      learnt from, with `rollout`, `old_log_probs` and `advantages`, and to
      metrics.
    state: of the script, with `params`.
    reference: likewise, or None.
    rollout: N rows, drawn by `sampler`.
    earned: of the rollout.
    sampler: the script's own.
    gradients: maps a number of parts to the gradient of parameters, a batch and
      `more`, exactly as the update takes it.
    more: its further arguments.
    micro_batch: rows of a pass.
    num_shards: devices that share them.
    tolerance: what rounding may do, as `Run.tolerance` has it.
    parts_add_up: False where a part of the loss is no sum over rows: the
      difference is then only shown.
    programs: whose `compilations` are shown.

  Raises:
    Refused: in mode "strict", if a check failed.
  """
  # What a step takes is shown before anything of its size is run.
  compilations = [row for x in programs for row in x.compilations]
  show([], compilations, state | {"reference": reference})
  stop_ids = sampler.stop_ids
  synthetic = with_ends(rollout, stop_ids)
  batch, _ = jax.jit(prepare)(state, reference, synthetic, earned)
  rows = jax.tree.map(lambda x: x[:micro_batch], batch)
  mask = rows["rollout"].response_mask
  number = jnp.arange(len(mask))
  sizes = jnp.where(number % 2, -1.0, 1.0) * (1.0 + number / len(mask))
  rows["advantages"] = jnp.where(mask, sizes[:, None], 0.0)
  # Parts of which every device still has a row.
  num_parts = smallest_divisor(micro_batch // num_shards)
  of_parts = {
    n: jax.jit(sketched(gradients(n))) for n in dict.fromkeys((1, num_parts))
  }

  def gradients_of(num_parts, rows=rows):
    return of_parts[num_parts](state["params"], rows, *more)

  checks = check(
    lambda given, rollout: prepare(*given[:2], rollout, given[2])[0][
      "old_log_probs"
    ],
    (state, reference, earned),
    rollout,
    stop_ids=stop_ids,
    has_stop_strings=bool(sampler.settings.stop_strings),
    gradients=gradients_of,
    num_micro_batches=num_parts,
    tolerance=tolerance,
    parts_add_up=parts_add_up,
  )
  if rollout.allowed is None:  # Else the end may be the one token allowed.
    checks.append(_end_is_learnt(rows, gradients_of, has_ends=bool(stop_ids)))
  show(checks)
  enforce(checks, mode)


def sketched(gradients):
  """Turns the gradient that a function returns into its sketch.

  A gradient is then a temporary of one program, as in an update, and none lies
  beside the state while the next one is computed.
  """

  def sketched(*args):
    found, metrics = gradients(*args)
    return sketches.sketch(found), metrics

  return sketched


def _end_is_learnt(rows, gradients_of, *, has_ends):
  """Checks that other ratios at the ends of rows give another gradient."""
  mask, old = rows["rollout"].response_mask, rows["old_log_probs"]
  length = mask.sum(axis=1, keepdims=True)
  is_end = (jnp.arange(mask.shape[1])[None] == length - 1) & (
    rows["rollout"].finished[:, None] if has_ends else True
  )
  moved = rows | {"old_log_probs": jnp.where(is_end, old - 0.05, old)}
  gap = sketches.relative_gap(gradients_of(1)[0], gradients_of(1, moved)[0])
  return Check(
    "the end of a response is learnt from",
    float(gap <= 1e-6),
    0.0,
    "1 if the gradient does not change with the ratio there",
  )


def with_ends(
  rollout: rollouts.Rollout, stop_ids: Sequence[int]
) -> rollouts.Rollout:
  """Ends every second row of a rollout at half of its length.

  Args:
    rollout: N rows. One with tokens that are allowed place by place stays as it
      is.
    stop_ids: token ids that end a response; the first one is put there.
  """
  if rollout.allowed is not None:
    return rollout
  mask = rollout.response_mask
  column = jnp.arange(mask.shape[1])[None]
  is_cut = (jnp.arange(len(mask)) % 2 == 0)[:, None]
  half = jnp.minimum(
    mask.sum(axis=1, keepdims=True), max(1, len(column[0]) // 2)
  )
  ids = rollout.response_ids
  if stop_ids:
    is_end = is_cut & (column == half - 1)
    ids = jnp.where(is_end, jnp.asarray(stop_ids[0], ids.dtype), ids)
  return rollout.replace(
    response_ids=ids,
    response_mask=jnp.where(is_cut, column < half, mask),
    finished=is_cut[:, 0] | rollout.finished,
  )


def smallest_divisor(number: int) -> int:
  """Returns the smallest divisor above 1, and 1 for 1."""
  return next((n for n in range(2, number + 1) if number % n == 0), 1)
