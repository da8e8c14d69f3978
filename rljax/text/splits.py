"""Holds rows out, by distinct prompt: none is on both sides."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from rljax.text import asked, batches, forms, logged


def held_out(
  prompts: Sequence[Any], share: float, *, seed: int, most: int | None = None
) -> np.ndarray:
  """Chooses a share of the different prompts, shuffled by the seed.

  Args:
    prompts: N texts or lists of messages, of which some may be the same.
    share: of the different prompts, in (0, 1); at least one, and not all.
    seed: of the shuffle.
    most: most prompts that are chosen; None: any number.

  Returns:
    `[N]` bool, True where the prompt is one of those.

  Raises:
    ValueError: if there is only one prompt, or `share` is not in (0, 1).
  """
  if not 0 < share < 1:
    raise ValueError(
      f"--eval_share must lie between 0 and 1, got {share}: it is the share of "
      "the prompts that are held out."
    )
  keys = [_question(prompt) for prompt in prompts]
  different = list(dict.fromkeys(keys))
  if len(different) < 2:
    raise ValueError(
      "There is one prompt, of which none can be held out: give more, or "
      "--eval_data."
    )
  number = min(max(1, round(share * len(different))), len(different) - 1)
  order = np.random.default_rng([seed, 3]).permutation(len(different))
  chosen = {different[i] for i in order[: min(number, most or number)]}
  return np.array([key in chosen for key in keys])


def shuffled(
  prompts: Sequence[Any], share: float, *, seed: int
) -> tuple[np.ndarray, np.ndarray]:
  """Shuffles rows by their prompts, and cuts off a share of the prompts.

  Args:
    prompts: N texts, of which some may be the same.
    share: of the different ones.
    seed: of the order, that of the first epoch; see `batches.epoch_order`.

  Returns:
    Numbers of the rows that are held out, and of the others, in order; rows of
    one prompt stand together.
  """
  places: dict[str, list[int]] = {}
  for i, prompt in enumerate(prompts):
    places.setdefault(_question(prompt), []).append(i)
  order = batches.epoch_order(len(places), seed=seed, epoch=0)
  groups = list(places.values())
  cut = round(share * len(groups))
  apart, left = (
    np.array([i for group in part for i in groups[group]], np.int64)
    for part in (order[:cut], order[cut:])
  )
  return apart, left


def without(
  rows: Sequence[forms.Row], others: Sequence[forms.Row]
) -> list[forms.Row]:
  """Leaves out rows whose prompts others have.

  Raises:
    ValueError: if nothing is left.
  """
  keys = {_question(row.prompt) for row in others}
  left = [row for row in rows if _question(row.prompt) not in keys]
  if not left:
    raise ValueError("All prompts of the training rows are held out.")
  return left


def rows(
  data: str,
  eval_data: str = "",
  *,
  share: float,
  most: int,
  seed: int,
  first_row: int = 0,
  num_rows: int = 0,
) -> tuple[list[forms.Row], list[forms.Row], logged.Loaded]:
  """Loads the rows of a file to learn from, and held-out ones.

  Args:
    data: see `logged.load`.
    eval_data: the same, of the held-out ones; empty: a share of `data`.
    share: see `held_out`, likewise `seed`.
    most: most prompts that are held out; of `eval_data` most rows, the first.
    seed: of the shuffle.
    first_row: rows of `data` that are passed over at its beginning.
    num_rows: rows that are used from there on; 0 uses all.

  Returns:
    Both, and what else is known: messages and notes, and no rows.

  Raises:
    ValueError: as `logged.load` and `held_out`.
  """
  limit = num_rows and first_row + num_rows
  loaded = logged.load(data, limit=limit)
  used = loaded.rows[first_row:][: num_rows or None]
  if eval_data:
    other = logged.load(eval_data, "validation", limit=most)
    apart = other.rows
    left = without(used, apart)
    notes = [*loaded.notes, *other.notes]
    if len(left) < len(used):
      notes.append(
        f"{data}: {len(used) - len(left)} rows are left out, for their prompts "
        "are held out."
      )
    return left, apart, logged.Loaded([], loaded.skipped + other.skipped, notes)
  is_apart = held_out([row.prompt for row in used], share, seed=seed, most=most)
  left, apart = (
    [row for row, x in zip(used, is_apart, strict=True) if x == side]
    for side in (False, True)
  )
  return left, apart, loaded._replace(rows=[])


def _question(prompt: Any) -> str:
  """Returns a text that is the same for prompts that ask the same.

  Blanks and line feeds make no other question, nor does the form of a message.
  """
  found = asked.given(prompt)
  if not isinstance(found, str) and len(found) == 1:
    (message,) = found
    if message.get("role") == "user" and isinstance(message["content"], str):
      found = message["content"]
  text = found if isinstance(found, str) else asked.key(prompt)
  return " ".join(text.split())


def of_shares(
  shares: np.ndarray, is_held_out: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Takes the replies of held-out rows out of those that are drawn.

  Args:
    shares: `[N, K]` float, how often each reply is drawn; 0 for never.
    is_held_out: `[N]` bool.

  Returns:
    `[N, K]` shares of the other rows, 0 for those held out; and the numbers,
    in the flat `[N * K]`, of the held-out replies that could be drawn.

  Raises:
    ValueError: if rows are held out, and none of their replies could be.
  """
  held_out = np.flatnonzero(shares * is_held_out[:, None])
  if is_held_out.any() and not len(held_out):
    raise ValueError("No held-out reply can be drawn: give --eval_data.")
  return shares * ~is_held_out[:, None], held_out
