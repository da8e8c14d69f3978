"""Checks of what a script learns from given texts, before the first update.

A script hands over its own gradient and a batch. The batch is changed in ways
that must not matter (pads, the order of rows, micro-batches) or that must (the
last token), and the gradients are compared. Scores, and the lengths of every
second row, are replaced, so that there is something to see in any data.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from rljax.distributed import processes
from rljax.training import microbatch, precision, preflight, sketches

Batch = dict[str, np.ndarray]
Tree = Any

# Metrics of a policy that is its own reference, where a batch has that.
AT_THE_START = {
  "offline/ratio_mean": 1.0,
  "offline/log_ratio_mean": 0.0,
  "token/ratio_mean": 1.0,
  "dpo/chosen_reward": 0.0,
  "dpo/rejected_reward": 0.0,
  "kto/desirable_reward": 0.0,
  "kto/undesirable_reward": 0.0,
}
# A gradient that moves by less has not moved.
_SAME = 1e-6
_EXTRA_PADS = 3


def check(
  gradients: microbatch.Gradient,
  params: Tree,
  batch: Mapping[str, Any],
  *,
  more: Callable[[Batch], tuple[Any, ...]] = lambda batch: (),
  place: Callable[[Batch], Batch] = lambda batch: batch,
  num_parts: int = 2,
  tolerance: precision.Tolerance | None = None,
  is_start: bool = True,
  pads_count: bool = False,
  texts: Sequence[str] | None = None,
  pack: Callable[[Batch], Batch] | None = None,
) -> list[preflight.Check]:
  """Checks that a script's gradient is of the texts that it was given.

  Args:
    gradients: of the script, from `microbatch.grad`.
    params: that it differentiates.
    batch: N rows: `prompt_ids`, `prompt_mask`, `response_ids` and
      `response_mask`, `[N, ..., T]`; of a further text x, `x_ids` and `x_mask`;
      and whatever else the loss reads.
    more: maps a batch to the further arguments of the gradient.
    place: puts a batch on the devices.
    num_parts: micro-batches that are compared with one; 1: none are.
    tolerance: what rounding may do; None: in float32.
    is_start: whether `params` are those of the reference.
    pads_count: whether the loss is known to read padding.
    texts: names x that the loss reads; None: all that the batch has.
    pack: adds packed rows to a batch, if the script has any, such as
      `packing.Packer.alone`; None: it has none.

  Returns:
    The checks, in the order in which they should be fixed.
  """
  batch = with_signal(processes.gather(dict(batch)))
  tolerance = tolerance or precision.tolerance("float32", params)
  compiled = {}

  def gradient_of(batch, parts=1):
    if parts not in compiled:
      compiled[parts] = jax.jit(preflight.sketched(gradients.in_parts(parts)))
    batch = place(batch)
    return processes.gather(compiled[parts](params, batch, *more(batch)))

  whole, metrics = gradient_of(batch)
  limit = tolerance.gradient

  def gap(other, parts=1):
    return sketches.relative_gap(whole, gradient_of(other, parts)[0])

  size = sketches.relative_gap(whole, jax.tree.map(np.zeros_like, whole))
  checks = [
    preflight.Check(
      "the loss has a gradient",
      float(not size > 0),
      0.0,
      "1 if it is 0 or not finite",
    )
  ]
  found = [
    abs(float(metrics[name]) - value)
    for name, value in AT_THE_START.items()
    if name in metrics and "ref_log_probs" in batch and is_start
  ]
  if found:
    num_tokens = batch["response_ids"].shape[-1]
    checks.append(
      preflight.Check(
        "the policy starts as its reference",
        max(found),
        # Of a sum over tokens, which round as if at random.
        1.5 * tolerance.mean * num_tokens**0.5,
        "nats, or |ratio - 1|; else temperature or texts differ",
      )
    )
  same = []
  if not pads_count:
    text = f"gradient; {_EXTRA_PADS} more pads, and other tokens in all of them"
    same.append(("pads change nothing", _padded(batch), text))
  if pack is not None and "packed_ids" in (packed := pack(batch)):
    same.append(("packed rows equal rows by themselves", packed, "gradient"))
  order = np.random.default_rng(0).permutation(len(batch["prompt_ids"]))
  shuffled = {name: x[order] for name, x in batch.items()}
  same.append(("order of rows changes nothing", shuffled, "gradient"))
  checks += [
    preflight.Check(name, gap(changed), limit, text)
    for name, changed, text in same
  ]
  for name, changed in _other_ends(batch, texts):
    checks.append(
      preflight.Check(
        name,
        float(gap(changed) <= _SAME),
        0.0,
        "1 if the gradient does not change with it",
      )
    )
  if num_parts > 1:
    checks.append(
      preflight.Check(
        f"{num_parts} micro-batches equal one batch",
        gap(batch, num_parts),
        limit,
        "relative difference of the gradients",
      )
    )
  return checks


def check_rows(
  function: Callable[[tuple[np.ndarray, np.ndarray]], Any],
  arrays: np.ndarray,
  mask: np.ndarray,
  *,
  tolerance: precision.Tolerance | None = None,
) -> list[preflight.Check]:
  """Checks that a function reads each row by itself, and no padding.

  Args:
    function: maps `[N, P, D]` floats and their mask to `[N]` floats.
    arrays: `[N, P, D]`.
    mask: `[N, P]` bool.
    tolerance: what rounding may do; None: in float32.
  """
  arrays, mask = processes.gather((arrays, mask))
  of = lambda *inputs: processes.gather(function(inputs))
  values = of(arrays, mask)
  scale = float(np.max(np.abs(values))) or 1.0
  other = np.where(mask[..., None], arrays, arrays[::-1, ::-1] + 1)
  order = np.random.default_rng(0).permutation(len(mask))
  limit = (tolerance or precision.tolerance("float32")).values
  return [
    preflight.Check(
      name,
      float(np.max(np.abs(found - expected))) / scale,
      limit,
      "relative difference of the values",
    )
    for name, found, expected in (
      ("pads change nothing", of(other.astype(arrays.dtype), mask), values),
      (
        "order of rows changes nothing",
        of(arrays[order], mask[order]),
        values[order],
      ),
    )
  ]


def with_signal(batch: Batch) -> Batch:
  """Replaces what could hide a fault: equal lengths, and scores of 0.

  Every second row is cut to half of its tokens. Scores of rows are spread
  around 1, and those of tokens differ from one to the next.

  Args:
    batch: see `check`.
  """
  batch = dict(batch)
  for ids, mask, others in _texts(batch):
    count = np.cumsum(batch[mask], axis=-1)
    half = np.maximum(count[..., -1:] // 2, 1)
    half[~_is_cut(batch[mask])] = count.shape[-1]
    batch[mask] = batch[mask] & (count <= half)
    for name in others:
      batch[name] = batch[name] & batch[mask]
    shape, column = batch[ids].shape, np.arange(batch[ids].shape[-1])
    # Some tokens of every second row earn nothing, but never the last one.
    is_last = count == np.minimum(count[..., -1:], half)
    earns = is_last | (column % 2 == 1)
    earns[~_is_cut(batch[mask])] = True
    signs = np.where(column % 2, -0.25, 0.3) * earns
    weights = (0.5 + 0.5 * (column % 2)) * earns
    for name, values in (("rewards", signs), ("weights", weights)):
      of = "imitated" if name == "weights" else "response"
      if ids == f"{of}_ids" and batch.get(name, count[:1]).shape == shape:
        batch[name] = np.where(batch[mask], values, 0).astype(np.float32)
  for name in ("rewards", "advantages"):
    if name in batch and batch[name].ndim == 1:
      num_rows = len(batch[name])
      batch[name] = np.linspace(0.6, 1.4, num_rows, dtype=np.float32)
  return batch


def _texts(batch) -> Iterator[tuple[str, str, list[str]]]:
  """Names of ids, of their mask, and of masks within it, for every text."""
  for mask in sorted(batch):
    ids = f"{mask[:-5]}_ids"
    if mask[-5:] != "_mask" or mask[:-5] in ("prompt", "other"):
      continue
    if ids in batch:
      yield (
        *(ids, mask),
        [
          name
          for name, x in batch.items()
          if ids == "response_ids"
          and x.dtype == bool
          and x.shape == batch[mask].shape
          and f"{name[:-5]}_ids" not in batch
        ],
      )


def _padded(batch):
  """More pads in front of prompts, and other tokens in all pads."""
  batch = dict(batch)
  for name in ("prompt_ids", "prompt_mask"):
    width = [(0, 0)] * (batch[name].ndim - 1) + [(_EXTRA_PADS, 0)]
    batch[name] = np.pad(batch[name], width)
  other = int(batch["response_ids"].flat[0])
  for name in [name for name in batch if f"{name[:-4]}_mask" in batch]:
    mask = batch[f"{name[:-4]}_mask"]
    batch[name] = np.where(mask, batch[name], other).astype(batch[name].dtype)
  return batch


def _other_ends(batch, names):
  """The batch with another last token, and without it, for every text."""
  for ids, mask, others in _texts(batch):
    text = ids.removesuffix("_ids")
    if names is not None and text not in names:
      continue
    learnt = batch[others[0] if others else mask]
    # Of rows that are whole: where they end, there is an end token.
    rows = ~_is_cut(learnt)
    if not learnt[rows].any():
      rows[:] = True
    rows = rows.reshape(-1, *[1] * (learnt.ndim - 1))
    is_last = _is_last(learnt) & rows
    choice = np.unique(batch[ids])
    first, second = choice[0], choice[-1]
    changed = np.where(batch[ids] == first, second, first)
    yield (
      f"the last token of a {text} is learnt",
      batch
      | {ids: np.where(is_last, changed, batch[ids]).astype(batch[ids].dtype)},
    )
    yield (
      f"the mask of a {text} decides about its end",
      batch
      | {m: batch[m] & ~(_is_last(batch[m]) & rows) for m in [mask, *others]},
    )


def _is_cut(rows):
  """`[N]` bool: every second row, if there are several."""
  number = np.arange(len(rows))
  return (number % 2 == 0) & (len(rows) > 1)


def _is_last(mask):
  """True on the last True along the last axis."""
  return mask & (np.cumsum(mask[..., ::-1], axis=-1)[..., ::-1] == 1)
