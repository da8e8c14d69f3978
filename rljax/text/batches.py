"""Pads rows, and chooses the rows of a batch, in numpy."""

import bisect
import functools
import math
from collections.abc import Sequence

import numpy as np


def bucket_length(length: int, buckets: Sequence[int] | None = None) -> int:
  """Returns the smallest allowed length that is not below the given one.

  A compiled function is compiled once per shape. Buckets limit the number of
  shapes: 1, 2, 3, 4, 6, 8, 12, ... (powers of two and 1.5 times them) pad by
  less than a half, with two buckets per doubling.

  Args:
    length: number of tokens; >= 0.
    buckets: allowed lengths in any order; the ones above by default.

  Raises:
    ValueError: if every bucket is too short.
  """
  if buckets is not None:
    enough = [bucket for bucket in buckets if bucket >= length]
    if not enough:
      raise ValueError(
        f"Length {length} is above the largest bucket of {sorted(buckets)}."
      )
    return min(enough)
  power = 1
  while power < length:
    power *= 2
  return power * 3 // 4 if power >= 4 and power * 3 // 4 >= length else power


def longest_in_bucket(limit: int) -> int:
  """Returns the longest row that is padded to `limit` at most."""
  length = max(limit, 0)
  while length and bucket_length(length) > limit:
    length -= 1
  return length


def pad_left(
  ids: Sequence[Sequence[int]],
  *,
  length: int | None = None,
  buckets: Sequence[int] | None = None,
  pad_id: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
  """Pads rows on the left, as prompts are.

  Args:
    ids: B sequences of ids.
    length: P; by default the bucket of the longest row.
    buckets: see `bucket_length`.
    pad_id: what fills the rest. It may be the id of a real token, as the mask
      is made from lengths.

  Returns:
    `[B, P]` int32 ids and `[B, P]` bool mask, True for real tokens.

  Raises:
    ValueError: if a row is longer than `length` or than every bucket.
  """
  return _pad(ids, length, buckets, pad_id, left=True)


def pad_right(
  ids: Sequence[Sequence[int]],
  *,
  length: int | None = None,
  buckets: Sequence[int] | None = None,
  pad_id: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
  """Pads rows on the right, as responses are; see `pad_left`."""
  return _pad(ids, length, buckets, pad_id, left=False)


def supervised_batch(
  rows: Sequence[tuple[Sequence[int], ...]],
  *,
  prompt_length: int | None = None,
  response_length: int | None = None,
  pad_id: int = 0,
  num_rows: int | None = None,
) -> dict[str, np.ndarray]:
  """Pads (prompt ids, response ids) to a batch.

  Args:
    rows: at most B pairs of id sequences; the response includes its end token.
      A third item, if all have one, says which tokens of it are learnt.
    prompt_length: P; by default the bucket of the longest prompt.
    response_length: T, likewise.
    pad_id: what fills the rest.
    num_rows: B; rows that are missing get responses without any token, from
      which nothing is learnt. None: as many as there are `rows`.

  Returns:
    `prompt_ids`, `prompt_mask` `[B, P]`, left-padded, and `response_ids`,
    `response_mask` `[B, T]`, right-padded; and `learnt_mask` `[B, T]`, if the
    rows say so.
  """
  if not rows:
    raise ValueError("A batch needs at least one row.")
  # An empty prompt would leave a row of attention without any key.
  missing = ([pad_id], [], [])[: len(rows[0])]
  num_missing = max(0, (num_rows or 0) - len(rows))
  prompts, responses, *learnt = zip(
    *rows, *[missing] * num_missing, strict=True
  )
  prompt_ids, prompt_mask = pad_left(
    prompts, length=prompt_length, pad_id=pad_id
  )
  response_ids, response_mask = pad_right(
    responses, length=response_length, pad_id=pad_id
  )
  batch = {
    "prompt_ids": prompt_ids,
    "prompt_mask": prompt_mask,
    "response_ids": response_ids,
    "response_mask": response_mask,
  }
  for column in learnt:
    flags, mask = pad_right(column, length=response_ids.shape[1])
    batch["learnt_mask"] = mask & (flags > 0)
  return batch


def supervised_shape(
  rows: Sequence[tuple[Sequence[int], ...]],
  *,
  prompt_length: int = 0,
  response_length: int = 0,
) -> dict[str, int]:
  """The one shape in which `supervised_batch` pads all batches.

  Args:
    rows: (prompt ids, response ids, ...), of which there may be none.
    prompt_length: tokens of a prompt for which there is room in any case.
    response_length: tokens of a response, likewise.

  Returns:
    `prompt_length` and `response_length`, the buckets of the longest.
  """
  return {
    "prompt_length": bucket_length(
      max([prompt_length, *(len(row[0]) for row in rows)])
    ),
    "response_length": bucket_length(
      max([response_length, *(len(row[1]) for row in rows)])
    ),
  }


def epoch_order(num_rows: int, *, seed: int, epoch: int) -> np.ndarray:
  """Returns the permutation in which an epoch visits the rows, int64."""
  return np.random.default_rng([seed, epoch]).permutation(num_rows)


def batch_indices(
  num_rows: int, batch_size: int, step: int, *, seed: int
) -> np.ndarray:
  """Returns the rows of a step's batch, from the step and seed alone.

  Epochs follow each other without a gap: a batch may hold the end of one and
  the start of the next, and every row is seen once per epoch.

  Args:
    num_rows: rows of the data set.
    batch_size: B; at most `num_rows`.
    step: 0 for the first batch.
    seed: of the orders.

  Returns:
    `[B]` int64 row numbers.

  Raises:
    ValueError: if the batch is larger than the data set.
  """
  if not 0 < batch_size <= num_rows:
    raise ValueError(
      f"batch_size must lie between 1 and the {num_rows} rows of data, got "
      f"{batch_size}."
    )
  epoch, start = divmod(step * batch_size, num_rows)
  rows = _kept_order(num_rows, seed, epoch)[start : start + batch_size]
  missing = batch_size - len(rows)
  following = _kept_order(num_rows, seed, epoch + bool(missing))[:missing]
  return np.concatenate([rows, following])


@functools.lru_cache(2)
def _kept_order(num_rows, seed, epoch):
  """`epoch_order`, which the steps of an epoch share."""
  return epoch_order(num_rows, seed=seed, epoch=epoch)


def indices_or_all(
  num_rows: int, batch_size: int, step: int, *, seed: int
) -> np.ndarray:
  """The rows of `batch_indices`; all of them where there are not B.

  Args:
    num_rows: rows of the data set.
    batch_size: B, which may be more.
    step: 0 for the first batch.
    seed: of the orders.

  Returns:
    `[min(B, num_rows)]` int64 row numbers.
  """
  if num_rows <= batch_size:
    return np.arange(num_rows)
  return batch_indices(num_rows, batch_size, step, seed=seed)


def num_updates(num_rows: int, batch_size: int, epochs: float) -> int:
  """The updates of a number of passes, by the batches of `indices_or_all`.

    ⌈E n / min(B, n)⌉

  Args:
    num_rows: n >= 1.
    batch_size: B.
    epochs: E.
  """
  return math.ceil(num_rows * epochs / min(batch_size, num_rows))


# Priorities.


class PrioritySampler:
  """Draws rows in proportion to their weights.

  A draw is made from the seed and the step alone: a resumed run needs no saved
  state, and any step's rows can be drawn again. Its cost grows with the
  logarithm of the number of rows; only making the sampler visits all of them.

  With replacement, every draw is independent of the others. Without it, the
  rows of a batch differ: each is drawn in proportion to the weights that are
  left. Batches are independent of each other either way.

  Attributes:
    num_rows: rows with a positive weight; no others are drawn.

  Source:
    Baheti et al. (2024), "Leftover Lunch: Advantage-based Offline
    Reinforcement Learning for Language Models", whose code seeds another
    generator than it draws from.
  """

  def __init__(self, weights: np.ndarray, *, seed: int, replace: bool = True):
    """Adds up the weights, in float64.

    Args:
      weights: `[N]` numbers >= 0, not all 0; they need not sum to 1. A matrix
        of candidates is given as `np.ravel(weights)`, and `np.unravel_index`
        splits the rows drawn.
      seed: of the draws.
      replace: whether a batch may hold a row twice.

    Raises:
      ValueError: naming the first weight that is negative or not finite; or
        if none is positive.
    """
    # In float32, the sum of a hundred thousand rows would lose the small ones.
    weights = np.asarray(weights, np.float64)
    if weights.ndim != 1:
      raise ValueError(f"weights must be a vector, got shape {weights.shape}.")
    bad = np.flatnonzero(~(np.isfinite(weights) & (weights >= 0)))
    if bad.size:
      raise ValueError(
        "weights must be finite and not negative, got "
        f"{weights[bad[0]]} in row {bad[0]}."
      )
    self._rows = np.flatnonzero(weights > 0)
    if not self._rows.size:
      raise ValueError(
        f"None of the {weights.size} weights is positive: no response is "
        "better than expected. Check the rewards and the values, or sample "
        "without priorities."
      )
    self._weights = weights[self._rows]
    self._ends = np.cumsum(self._weights)
    self._seed = seed
    self._replace = replace
    self.num_rows = self._rows.size

  def draw(self, batch_size: int, step: int) -> np.ndarray:
    """Returns the rows of a step's batch, from the step and seed alone.

    Args:
      batch_size: B; without replacement at most `num_rows`.
      step: 0 for the first batch.

    Returns:
      `[B]` int64 row numbers.

    Raises:
      ValueError: if the batch is empty, or larger than there are rows to draw
        without replacement.
    """
    if batch_size < 1:
      raise ValueError(f"batch_size must be positive, got {batch_size}.")
    if not self._replace and batch_size > self.num_rows:
      raise ValueError(
        f"batch_size must be at most {self.num_rows}, the rows with a positive "
        f"weight, to draw without replacement, got {batch_size}."
      )
    uniforms = np.random.default_rng([self._seed, step]).random(batch_size)
    return self._rows[self._select(uniforms)]

  def _select(self, uniforms: np.ndarray) -> np.ndarray:
    """Returns positions among the positive weights, for numbers in [0, 1)."""
    if self._replace:
      return self._position(uniforms * self._ends[-1])
    taken = []  # In order.
    chosen = np.empty(uniforms.size, np.int64)
    remaining = self._ends[-1]
    for i, uniform in enumerate(uniforms):
      # A point of what is left, moved past the rows that were taken out.
      point = uniform * max(remaining, 0.0)
      for row in taken:
        if point < self._ends[row] - self._weights[row]:
          break
        point += self._weights[row]
      row = int(self._position(point))
      # Rounding may leave the point on the edge of a row that was taken.
      while row in taken:
        row = (row + 1) % self.num_rows
      bisect.insort(taken, row)
      remaining -= self._weights[row]
      chosen[i] = row
    return chosen

  def _position(self, points: np.ndarray) -> np.ndarray:
    # The right side: a point on the border of two rows is in the second.
    found = np.searchsorted(self._ends, points, side="right")
    return np.minimum(found, self.num_rows - 1)


def scale_steps(
  num_steps: int, weights: np.ndarray, *, num_rows: int | None = None
) -> int:
  """Scales steps by the share ρ of rows that can be drawn: ⌊ρ n⌋.

  Args:
    num_steps: n, for all rows.
    weights: any shape, as for `PrioritySampler`.
    num_rows: rows of the data set; the number of weights by default. For
      `[N, K]` candidates it is N, so that ρ adds up over the K.

  Returns:
    The number of steps, computed in integers: the product with a rounded share
    may fall just short.
  """
  weights = np.asarray(weights)
  if num_rows is None:
    num_rows = weights.size
  return num_steps * int(np.count_nonzero(weights > 0)) // num_rows


def _pad(
  ids: Sequence[Sequence[int]],
  length: int | None,
  buckets: Sequence[int] | None,
  pad_id: int,
  *,
  left: bool,
) -> tuple[np.ndarray, np.ndarray]:
  lengths = np.array([len(row) for row in ids], np.int64)
  longest = int(lengths.max(initial=0))
  if length is None:
    length = bucket_length(longest, buckets)
  if longest > length:
    raise ValueError(
      f"Row {int(lengths.argmax())} has {longest} tokens, the length is "
      f"{length}."
    )
  columns = np.arange(length)
  if left:
    mask = columns >= length - lengths[:, None]  # [B, P]
  else:
    mask = columns < lengths[:, None]
  padded = np.full(mask.shape, pad_id, np.int32)
  # True entries are visited row by row, which is the order of the tokens.
  padded[mask] = [token for row in ids for token in row]
  return padded, mask
