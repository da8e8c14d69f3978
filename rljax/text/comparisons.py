"""Which replies of a log are set against each other."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rljax.text import batches, forms, logged


class Comparisons(NamedTuple):
  """M comparisons of K replies each.

  Attributes:
    rows: `[M]` int, row numbers.
    ranks: `[M, K]` int, candidate numbers, the best reply first. One that the
      row does not have stands for a missing reply.
    notes: what is compared, and which rows are not.
  """

  rows: np.ndarray
  ranks: np.ndarray
  notes: list[str]

  def split(
    self, is_held_out: np.ndarray
  ) -> tuple["Comparisons", "Comparisons"]:
    """Returns the comparisons of rows to learn from, and of held-out rows.

    Args:
      is_held_out: `[N]` bool, of all rows.

    Raises:
      ValueError: if some rows are held out, and none can be compared.
    """
    apart = is_held_out[self.rows]
    if is_held_out.any() and not apart.any():
      raise ValueError(
        f"None of the {is_held_out.sum()} held-out rows can be compared: give "
        "a larger --eval_share, or --eval_data."
      )
    left, held_out = (
      self._replace(rows=self.rows[x], ranks=self.ranks[x])
      for x in (~apart, apart)
    )
    return left, held_out

  def check_batch(self, batch_size: int) -> None:
    """Raises ValueError if there are fewer than a batch."""
    if batch_size > len(self.rows):
      raise ValueError(
        f"--batch_size={batch_size} is more than the {len(self.rows)} rows "
        "that can be compared."
      )

  def at(self, drawn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the rows `[B, 1]` and candidates `[B, K]` of B comparisons."""
    return self.rows[drawn, None], self.ranks[drawn]

  def draw(self, batch_size: int, step: int, seed: int) -> np.ndarray:
    """Returns the numbers of a step's comparisons, see `batch_indices`."""
    return batches.batch_indices(len(self.rows), batch_size, step, seed=seed)


def ranked(
  rows: Sequence[forms.Row],
  rewards: np.ndarray | None = None,
  *,
  all_replies: bool = False,
) -> Comparisons:
  """Ranks the replies of each row, but for those that hold one reply twice.

  Args:
    rows: N logged rows of up to C candidates; those with fewer than two are
      left out.
    rewards: `[N, C]` float, by which replies are ranked; equal ones keep their
      order. None: the order in which they stand is their rank.
    all_replies: whether all replies of a row are compared, K = C; else the best
      with the worst, K = 2, unless their rewards are equal.

  Raises:
    ValueError: if nothing is left.
  """
  compared, ranks, few, tied, same = [], [], [], [], []
  most = max(len(row.candidates) for row in rows)
  for i, row in enumerate(rows):
    candidates = list(range(len(row.candidates)))
    if len(candidates) < 2:
      few.append(row.place)
      continue
    if rewards is not None:
      candidates.sort(key=lambda k: -rewards[i, k])
    if all_replies:
      # The number after the last: no reply has it, and arrays have a column.
      candidates += [len(candidates)] * (most - len(candidates))
    else:
      candidates = [candidates[0], candidates[-1]]
      if rewards is not None and np.ptp(rewards[i, candidates]) == 0:
        tied.append(row.place)
        continue
      if len({row.candidates[k] for k in candidates}) < 2:
        same.append(row.place)
        continue
    compared.append(i)
    ranks.append(candidates)
  left_out = [
    f"{len(places)} of {len(rows)} rows have {what}: {', '.join(places[:3])}"
    + (", ..." if len(places) > 3 else ".")
    for places, what in (
      (few, "fewer than two replies"),
      (tied, "replies of equal reward"),
      (same, "one reply twice"),
    )
    if places
  ]
  if not compared:
    raise ValueError(f"Nothing can be compared: {' '.join(left_out)}")
  note = f"{len(compared)} comparisons out of {len(rows)} rows."
  return Comparisons(np.array(compared), np.array(ranks), [note, *left_out])


def singles(
  rows: Sequence[forms.Row], rewards: np.ndarray, threshold: float
) -> Comparisons:
  """Takes every reply by itself, a good or a bad one: K = 1.

  Args:
    rows: N logged rows of up to C candidates.
    rewards: `[N, C]` float.
    threshold: least reward of a good reply.

  Raises:
    ValueError: if all are good, or all bad.
  """
  compared, candidates = np.nonzero(logged.present(rows))
  good = rewards[compared, candidates] >= threshold
  note = f"{good.sum()} of {len(good)} replies are good ones."
  if good.all() or not good.any():
    raise ValueError(
      f"The threshold of {threshold} makes all replies alike: {note}"
    )
  return Comparisons(compared, candidates[:, None], [note])


def others(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Puts behind each prompt the replies of the next one, if it is another.

  Args:
    batch: `prompt_ids` and `prompt_mask`, `[B, K, P]`, and `response_ids` and
      `response_mask`, `[B, K, T]`.

  Returns:
    `other_ids` and `other_mask`, `[B, K, T]`.
  """
  asked = np.where(batch["prompt_mask"], batch["prompt_ids"], -1)[:, 0]
  following = np.roll(np.arange(len(asked)), -1)
  is_other = (asked != asked[following]).any(axis=1)[:, None, None]
  return {
    "other_ids": batch["response_ids"][following],
    "other_mask": batch["response_mask"][following] & is_other,
  }
