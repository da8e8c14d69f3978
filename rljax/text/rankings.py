"""Replies to one prompt in their order: what reward models compare."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rljax.text import encoding, forms, logged, splits

# What ranks the replies of a row: its rewards where it has them and else its
# own order, its order, or its rewards.
ORDERS = ("", "logged", "reward")


def read(
  tokenizer: Any,
  data: str,
  eval_data: str = "",
  *,
  eval_share: float = 0.1,
  num_eval_rows: int,
  first_row: int = 0,
  num_rows: int = 0,
  task: Any = None,
  seed: int,
  options: Mapping[str, Any],
  order: str = "",
  **settings: Any,
) -> encoding.Split:
  """Reads comparisons to learn from and held-out ones.

  Args:
    tokenizer: encodes them.
    data: a file, see `logged.load`; empty: the task's log.
    eval_data: the same, of the held-out ones.
    eval_share: share of the different prompts in `data` that is held out,
      where there is no `eval_data`.
    num_eval_rows: held-out rows that are used at most, the first ones.
    first_row: rows of `data` that are passed over at its beginning.
    num_rows: rows that are used from there on; 0 uses all.
    task: module with `logged`, where no file is named.
    seed: of the task's draw.
    options: of the task's log.
    order: see `ranked`.
    **settings: of `encoding.prepare`.

  Returns:
    Both, with the best candidate of a row first; rows that compare nothing are
    among those that were skipped.

  Raises:
    ValueError: if a part has no comparison, or as `logged` does.
  """
  skipped: list[str] = []
  notes: list[str] = []

  def compared(name, split, first, limit):
    rows, unusable, holds = logged.load_or_draw(
      name, task, split, seed, options
    )
    notes.extend(holds)
    kept = []
    for row in rows[first:][: limit or None]:
      try:
        kept.append(ranked(row, order))
      except NothingToCompare as error:
        unusable.append(str(error))
    if not kept:
      source = name or f"the log of {task.__name__}"
      raise ValueError(
        f"{source} holds no comparison: {' '.join(unusable[:3])}"
      )
    skipped.extend(unusable)
    return kept

  def encoded(rows):
    found = encoding.prepare(tokenizer, rows, **settings)
    skipped.extend(found.skipped)
    notes.extend(found.notes)
    return found

  rows = compared(data, "train", first_row, num_rows)
  if data and not eval_data:
    prompts = [row.prompt for row in rows]
    apart = splits.held_out(prompts, eval_share, seed=seed)
    held_out = [row for row, x in zip(rows, apart, strict=True) if x]
    left = [row for row, x in zip(rows, apart, strict=True) if not x]
    held_out = held_out[:num_eval_rows]
  else:
    held_out = compared(eval_data, "validation", 0, num_eval_rows)
    # The splits of a task are its own business.
    left = splits.without(rows, held_out) if data else rows
  num_shared = len(rows) - len(left) if eval_data else 0
  counts = {"comparisons of held-out prompts left out": num_shared}
  return encoding.Split(
    encoded(left), encoded(held_out), skipped, counts, notes
  )


class NothingToCompare(ValueError):
  """A row without a better and a worse reply."""


def ranked(row: forms.Row, order: str = "") -> forms.Row:
  """Puts the candidates of a row in order, the best one first.

  Args:
    row: with candidates.
    order: one of `ORDERS`. In the row's own order there are no ties: its
      rewards become 0, -1, -2, ...

  Raises:
    NothingToCompare: if there is no pair of a better and a worse one.
    ValueError: if rewards are asked for and missing, or there is no such order.
  """
  if order not in ORDERS:
    raise ValueError(f"order must be empty, logged or reward, got {order!r}.")
  if order == "reward" and row.rewards is None:
    raise ValueError(f'{row.place}: "reward" is missing, for --order=reward.')
  if len(set(row.candidates)) < 2:
    raise NothingToCompare(f"{row.place}: there is nothing to compare.")
  if row.rewards is None or order == "logged":
    places = tuple(-float(i) for i in range(len(row.candidates)))
    return dataclasses.replace(row, rewards=places)
  if len(set(row.rewards)) < 2:
    raise NothingToCompare(f"{row.place}: all rewards are the same.")
  return logged.best_first(row)


def most_candidates(*parts: encoding.Encoded) -> int:
  """Returns how many replies the longest row of several parts has."""
  return max(len(row.candidates) for part in parts for row in part.rows)


def batch(
  part: encoding.Encoded,
  rows: Sequence[int],
  lengths: Sequence[int],
  num_candidates: int,
) -> dict[str, np.ndarray]:
  """Pads the K candidates of B rows to a batch.

  Args:
    part: N rows, see `read`.
    rows: B row numbers.
    lengths: columns P and T of prompts and responses.
    num_candidates: K; a row with fewer is filled up.

  Returns:
    The arrays of `encoding.batch`, `[B, K, P]` and `[B, K, T]`; `present`
    `[B, K]` bool, True where there is a candidate; `rewards` `[B, K]` float32.
  """
  arrays = encoding.batch(
    part,
    np.repeat(rows, num_candidates),
    np.tile(np.arange(num_candidates), len(rows)),
    prompt_length=lengths[0],
    response_length=lengths[1],
  )
  shape = (len(rows), num_candidates)
  arrays = {name: x.reshape(*shape, -1) for name, x in arrays.items()}
  rewards = np.zeros(shape, np.float32)
  for i, row in enumerate(rows):
    rewards[i, : len(part.rows[row].rewards)] = part.rows[row].rewards
  return {
    **arrays,
    "present": arrays["response_mask"].any(axis=2),
    "rewards": rewards,
  }
