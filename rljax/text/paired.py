"""Batches of compared replies, step by step: of a log in memory, or a stream.

Both have `batch`, `first`, `held_out`, `held_out_batch`, `place` and `go_to`,
as the feeds of supervised rows, see `feeds`. What compares replies of different
rows, such as samples of an online run, needs the whole log in memory; a stream
compares the replies of one row.
"""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

from rljax.text import (
  comparisons,
  encoding,
  feeds,
  files,
  forms,
  rankings,
  vocabularies,
)

LABELLED = "labelled completions"
# Least reward of a good reply that is labelled, 1 or 0.
_OF_LABELS = 0.5


class Table:
  """Comparisons of a log in memory, in an order of their own for every epoch.

  Attributes:
    lengths: columns P and T that hold every prompt, and every reply.
    num_replies: K of a comparison.
    num_held_out: how many comparisons are not learnt from.
    threshold: least reward of a good reply, or None; see `of_labels`.
    notes: what was read and is compared, in lines.
    skipped: one message for each row that cannot be used.
    place: what a checkpoint keeps of it: nothing.
    metrics: numbers of a step: none.
  """

  metrics: feeds.Place = {}

  def __init__(
    self,
    log: encoding.Log,
    compared: comparisons.Comparisons,
    known: Mapping[str, np.ndarray],
    *,
    batch_size: int,
    seed: int,
    threshold: float | None = None,
  ):
    """Takes a log, and what is compared of it.

    Args:
      log: N rows of up to C replies.
      compared: comparisons of its rows.
      known: `[N, C, ...]` of the replies, by name, which batches get.
      batch_size: comparisons of a step.
      seed: of their order.
      threshold: see above.

    Raises:
      ValueError: if there are fewer than that, or none is held out.
    """
    self._log, self._known = log, dict(known)
    self._batch_size, self._seed = batch_size, seed
    self._train, self._held_out = compared.split(log.is_held_out)
    self._train.check_batch(batch_size)
    self.threshold, self.lengths = threshold, log.lengths
    self.num_replies = compared.ranks.shape[1]
    self.num_held_out = len(self._held_out.rows)
    self.notes, self.skipped = [*compared.notes, *log.notes], log.skipped
    self.place: feeds.Place = {}
    self._asked, self._said = encoding.counts(log.encoded)

  def add(self, known: Mapping[str, np.ndarray]) -> None:
    """Adds what is known of the replies, `[N, C, ...]`, by name."""
    self._known |= known

  def go_to(self, place: feeds.Place) -> None:
    """Does nothing: a step says which comparisons are its own."""

  def batch(self, step: int) -> feeds.Batch:
    """Returns a step's replies and prompts, `[B, K, ...]`, the best first."""
    return self._make(self._train, self._drawn(step))

  def first(self) -> feeds.Batch:
    """Returns the batch of the first step, to be looked at."""
    return self.batch(0)

  def held_out_batch(self, numbers: np.ndarray) -> feeds.Batch:
    """Returns held-out comparisons by their numbers."""
    return self._make(self._held_out, numbers)

  def counts(self, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the tokens of a step's prompts `[B, 1]` and replies `[B, K]`."""
    rows, candidates = self._train.at(self._drawn(step))
    none = self._said.shape[1] - 1  # Of any number behind the last.
    return self._asked[rows], self._said[rows, np.minimum(candidates, none)]

  def _drawn(self, step):
    return self._train.draw(self._batch_size, step, self._seed)

  def _make(self, part, drawn):
    at = part.at(drawn)
    return self._log.batch(*at) | {
      name: x[at] for name, x in self._known.items()
    }


class Stream(feeds.Stream):
  """Comparisons that are read while they are learnt from, see `Table`."""

  num_replies: int
  threshold: float | None

  @property
  def num_held_out(self) -> int:
    """How many comparisons are not learnt from."""
    return len(self.held_out.rows)


def stream(
  tokenizer: Any,
  name: str,
  *,
  by_reward: bool,
  threshold: float | None,
  settings: Mapping[str, Any],
  **options: Any,
) -> Stream:
  """Opens a file of which every row compares its best reply with its worst.

  Args:
    tokenizer: of the policy.
    name: of the file.
    by_reward: whether rewards rank replies, rather than the order of the row.
    threshold: least reward of a good reply, where every reply is taken by
      itself; None: they are compared.
    settings: keyword arguments of `encoding.prepare`, whose limits are the
      columns of batches.
    **options: of `feeds.Stream`.

  Raises:
    ValueError: as `feeds.Stream`.
  """
  num_replies = 2 if threshold is None else 1
  pad_id = vocabularies.pad_id(tokenizer)

  def arrange(rows):
    if threshold is not None:
      return [one for row in rows for one in _alone(row)], []
    found, messages = [], []
    for row in rows:
      try:
        found.append(_best_and_worst(row, "reward" if by_reward else "logged"))
      except rankings.NothingToCompare as error:
        messages.append(str(error))
    return found, messages

  def make(part, rows, lengths):
    batch = replies_of(part, rows, lengths, num_replies, pad_id=pad_id)
    if threshold is not None:
      rewards = np.array([part.rows[i].rewards for i in rows], np.float32)
      batch["rewards"] = rewards
    return batch

  found = Stream(
    name,
    lambda rows: feeds.encoded(tokenizer, rows, **settings),
    arrange=arrange,
    make=make,
    lengths=(settings["max_prompt_length"], settings["max_response_length"]),
    **options,
  )
  found.num_replies, found.threshold = num_replies, threshold
  if threshold is not None:
    _check_both(name, arrange(_head(name)[0])[0], threshold)
  return found


def of_labels(threshold: float | None, rows: list[forms.Row]) -> float | None:
  """Returns the least reward of a good reply, where all rows have labels.

  Args:
    threshold: as it was given; None where it was not.
    rows: of a file.
  """
  if all(row.form == LABELLED for row in rows):
    return threshold or _OF_LABELS
  return threshold


def of_first_labels(threshold: float | None, name: str) -> float | None:
  """Does so by the first rows of a file."""
  return of_labels(threshold, _head(name)[0])


def ranked_stream(
  tokenizer: Any,
  name: str,
  *,
  order: str,
  settings: Mapping[str, Any],
  **options: Any,
) -> Stream:
  """Opens a file of which every row ranks all of its replies.

  Args:
    tokenizer: of the model.
    name: of the file.
    order: see `rankings.ranked`.
    settings: keyword arguments of `encoding.prepare`.
    **options: of `feeds.Stream`.

  Returns:
    The stream, whose batches are those of `rankings.batch`. K is the most
    replies that one of the first rows has; later ones with more are left out.
  """
  rows, _ = _head(name)
  num_replies = max(2, *(len(row.candidates) for row in rows))

  def arrange(rows):
    found, messages = [], []
    for row in rows:
      try:
        if len(row.candidates) > num_replies:
          raise rankings.NothingToCompare(
            f"{row.place}: {len(row.candidates)} replies are more than the "
            f"{num_replies} of the first rows."
          )
        found.append(rankings.ranked(row, order))
      except rankings.NothingToCompare as error:
        messages.append(str(error))
    return found, messages

  found = Stream(
    name,
    lambda rows: feeds.encoded(tokenizer, rows, **settings),
    arrange=arrange,
    make=lambda part, rows, lengths: rankings.batch(
      part, rows, lengths, num_replies
    ),
    lengths=(settings["max_prompt_length"], settings["max_response_length"]),
    **options,
  )
  found.num_replies, found.threshold = num_replies, None
  return found


def ranked_table(
  data: encoding.Split, batch_size: int, seed: int
) -> feeds.Table:
  """Makes batches of `rankings.batch` of rows in memory, see `feeds.Table`."""
  num_replies = rankings.most_candidates(data.train, data.held_out)
  return feeds.Table(
    *(data, batch_size, seed),
    make=lambda part, rows, lengths: rankings.batch(
      part, rows, lengths, num_replies
    ),
    num_replies=num_replies,
    unit="comparisons",
  )


def replies_of(
  part: encoding.Encoded,
  rows: np.ndarray,
  lengths: np.ndarray,
  num_replies: int,
  *,
  pad_id: int = 0,
) -> feeds.Batch:
  """Pads the first K replies of B rows, and their prompts, to a batch.

  Returns:
    The arrays of `encoding.batch`, `[B, K, P]` and `[B, K, T]`.
  """
  arrays = encoding.batch(
    part,
    np.repeat(rows, num_replies),
    np.tile(np.arange(num_replies), len(rows)),
    prompt_length=lengths[0],
    response_length=lengths[1],
    pad_id=pad_id,
  )
  shape = len(rows), num_replies
  return {name: x.reshape(*shape, -1) for name, x in arrays.items()}


# Helpers.


def _best_and_worst(row: forms.Row, order: str) -> forms.Row:
  """Returns a row with two replies, the better one first."""
  row = rankings.ranked(row, order)
  if row.candidates[0] == row.candidates[-1]:
    raise rankings.NothingToCompare(
      f"{row.place}: there is nothing to compare."
    )
  return _with(row, (0, -1))


def _alone(row: forms.Row) -> list[forms.Row]:
  """Returns a row for every reply of one."""
  if row.rewards is None:
    raise ValueError(f'{row.place}: "reward" is missing, for --kto_threshold.')
  if len(row.candidates) == 1:
    return [row]
  return [
    dataclasses.replace(
      _with(row, (i,)),
      place=f"{row.place}, reply {i}",
      response_ids=row.response_ids if i == 0 else None,
    )
    for i in range(len(row.candidates))
  ]


def _with(row: forms.Row, numbers: tuple[int, ...]) -> forms.Row:
  """Returns a row with some of its replies."""
  take = lambda values: values and tuple(values[i] for i in numbers)
  return dataclasses.replace(
    row,
    candidates=take(row.candidates),
    rewards=take(row.rewards),
    finished=take(row.finished),
  )


def _head(name: str) -> tuple[list[forms.Row], forms.Reader]:
  """Returns the first rows of a file, and what has read them."""
  reader = forms.Reader(name)
  placed = files.load_placed_rows(name, "train", streaming=True)
  return reader.read(itertools.islice(placed, feeds.HEAD)), reader


def _check_both(name, rows, threshold):
  """Raises ValueError if the first rows are all good, or all bad."""
  good = [row.rewards[0] >= threshold for row in rows]
  if all(good) or not any(good):
    raise ValueError(
      f"{name}: of the first {len(good)} replies {sum(good)} are good ones by "
      f"the threshold of {threshold}, and a stream is shuffled within "
      "--stream_buffer alone: shuffle the file, or give another threshold."
    )
