"""Batches of supervised rows, step by step: of rows in memory, or of a stream.

A stream is read while it is learnt from, so a file may be larger than memory.
Its rows are read a buffer at a time, and those of a buffer are shuffled by the
seed; where a run stands in it is three numbers, from which it goes on with the
same rows in the same order.
"""

import collections
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from rljax.text import asked, batches, chats, encoding, files, forms, logged

Batch = dict[str, np.ndarray]
# Makes a batch of rows by number, see `batch_of`.
Make = Callable[[encoding.Encoded, np.ndarray, np.ndarray], Batch]
# Rows as they are learnt from, and messages about those that cannot be.
Arrange = Callable[[list[forms.Row]], tuple[list[forms.Row], list[str]]]

# Rows that are encoded at the same time.
_CHUNK = 64
# Rows by which it is decided what all rows are, and among which the first
# held-out ones are looked for.
HEAD = 1000

Place = dict[str, int]


class Table:
  """Rows in memory, in an order of their own for every epoch.

  Attributes:
    held_out: rows that are not learnt from.
    lengths: columns P and T that hold every prompt, and every reply.
    size: how many rows are learnt from.
    known: what else was left out or found, in words -> number.
    notes: what was read, in lines.
    skipped: one message for each row that cannot be used.
    place: what a checkpoint keeps of it: nothing.
    metrics: numbers of a step: none.
  """

  metrics: Place = {}

  def __init__(
    self,
    data: encoding.Split,
    batch_size: int,
    seed: int,
    *,
    make: Make | None = None,
    num_replies: int = 1,
    unit: str = "examples",
  ):
    """Takes rows to learn from and held-out ones.

    Args:
      data: both, as ids.
      batch_size: rows of a step.
      seed: of their order.
      make: makes a batch of them; None: `batch_of`.
      num_replies: K that a batch has of each row.
      unit: what the rows are, for messages.

    Raises:
      ValueError: if there are fewer rows than that.
    """
    self._train, self._batch_size, self._seed = data.train, batch_size, seed
    self._make, self._num_replies = make or batch_of, num_replies
    self.held_out = data.held_out
    self.notes, self.skipped = data.notes, data.skipped
    self.place: Place = {}
    self.size, self.known = len(self._train.rows), data.counts
    if self.size < batch_size:
      raise ValueError(
        f"--batch_size={batch_size} is more than the {self.size} {unit}."
      )
    parts = (data.train, data.held_out)
    self.lengths = np.max([encoding.lengths(part) for part in parts], 0)

  def go_to(self, place: Place) -> None:
    """Does nothing: a step says which rows are its own."""

  def batch(self, step: int) -> dict[str, np.ndarray]:
    """Returns the rows of a step, see `encoding.batch`."""
    return self._make(self._train, self._rows(step), self.lengths)

  def first(self) -> dict[str, np.ndarray]:
    """Returns a batch of the first rows, to be looked at."""
    return self._make(self._train, np.arange(self._batch_size), self.lengths)

  def held_out_batch(self, rows: np.ndarray) -> Batch:
    """Returns held-out rows by their numbers."""
    return self._make(self.held_out, rows, self.lengths)

  def counts(self, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the tokens of a step's prompts `[B, 1]` and replies `[B, K]`."""
    rows = self._rows(step)
    asked, said = self._counts
    return asked[rows, None], said[rows, : self._num_replies]

  @functools.cached_property
  def _counts(self):
    return encoding.counts(self._train)

  def _rows(self, step):
    return batches.batch_indices(
      len(self._train.rows), self._batch_size, step, seed=self._seed
    )


class _Example(NamedTuple):
  """An encoded row, and where the stream stands behind it."""

  place: Place
  row: forms.Row
  prompt_ids: list[int]
  response_ids: list[list[int]]
  learnt: list[bool] | None


class Stream:
  """Rows that are read while they are learnt from, see `Table`.

  Attributes:
    held_out: those of its first rows whose prompts are not learnt from.
    lengths: columns P and T, as the settings limit them.
    size: that nobody knows how many rows are learnt from, in words.
    known: nothing.
    notes: what was read, in lines.
    skipped: one message for each of its first rows that cannot be used.
    place: what a checkpoint keeps: the epoch, the row of it at which the
      buffer begins, how many rows of the buffer have been learnt from, and
      how many rows were left out so far, for they cannot be used.
    fits: whether rows make a batch; those that do not wait for the next step.
  """

  size = "as many as the stream has"
  known: Place = {}

  def __init__(
    self,
    name: str,
    encode: Callable[[list[forms.Row]], encoding.Encoded],
    *,
    arrange: Arrange | None = None,
    make: Make | None = None,
    lengths: tuple[int, int],
    batch_size: int,
    buffer: int,
    share: float | None,
    most: int,
    seed: int,
    eval_data: str = "",
    first_row: int = 0,
    num_rows: int = 0,
  ):
    """Reads as many rows as it takes to hold some out.

    Args:
      name: of a file, see `files.load_placed_rows`.
      encode: turns rows into ids, and leaves out those that cannot be used.
      arrange: turns rows of the file into those that are encoded; None: they
        are the same.
      make: makes a batch of encoded rows; None: `batch_of`.
      lengths: columns P and T of batches.
      batch_size: rows of a step.
      buffer: rows that are read ahead and shuffled among themselves; >= 1.
      share: of the prompts that are held out, chosen by their hash; in (0, 1),
        or None, which holds none out.
      most: different prompts that are held out at most, the first ones; others
        with such a hash are not learnt from either.
      seed: of the order and of the hash.
      eval_data: a file of held-out rows, in place of a share.
      first_row: rows that are passed over at the beginning.
      num_rows: rows that are read from there on; 0 reads all.

    Raises:
      ValueError: if there is no such file, no row can be used, or none of the
        first rows is held out.
    """
    self._name, self._seed, self._buffer = name, seed, buffer
    self._batch_size, self.lengths = batch_size, np.asarray(lengths)
    self._span = first_row, first_row + num_rows if num_rows else None
    self._reader, self._encode = forms.Reader(name), encode
    self._arrange = arrange or (lambda rows: (rows, []))
    self._make = make or batch_of
    self._share, self._apart = share, None
    self.fits: Callable[[encoding.Encoded], bool] = lambda part: True
    if eval_data:
      other = logged.load(eval_data, "validation", limit=most).rows
      self._apart = {asked.key(row.prompt) for row in other}
    elif share is not None and not 0 < share < 1:
      raise ValueError(
        f"--eval_share must lie between 0 and 1, got {share}: it is the share "
        "of the prompts that are held out."
      )
    placed = self._placed()
    head = self._reader.read(itertools.islice(placed, HEAD))
    num_read = len(head) + len(self._reader.skipped)
    _, unusable = self._arrange(head)
    if len(unusable) == len(head):
      raise ValueError(
        f"None of the first {num_read} rows of {name} can be used: "
        f"{' '.join(unusable[:3])}"
      )
    if eval_data:
      other, _ = self._arrange(other)
    elif share is None:
      other = []
    else:
      other, num_read = self._look_for_held_out(head, placed, most)
    with _quiet():
      self.held_out = encode(other)
    if not self.held_out.rows and (eval_data or share is not None):
      such = f", such as {other[0].place}" if other else ""
      raise ValueError(
        f"None of the {len(other)} held-out rows can be encoded{such}: raise "
        "--max_prompt_length and --max_response_length, or give other "
        "--eval_data."
      )
    left_out = f"{len(unusable)} of them are left out: {' '.join(unusable[:1])}"
    self.notes = [
      f"{name} is read as a stream, {buffer} rows at a time. Of its first "
      f"{num_read} rows:",
      *self._reader.notes(),
      *([left_out] if unusable else []),
      *self.held_out.notes,
      f"{len(self.held_out.rows)} rows are held out.",
    ]
    self.skipped = [*self._reader.skipped, *unusable]
    self.go_to({})

  def go_to(self, place: Place) -> None:
    """Goes on behind the rows that had been learnt from at a place.

    Args:
      place: `place` of that time; empty: the beginning.
    """
    start = {"epoch": 0, "row": 0, "taken": 0, "left_out": 0}
    self.place = start | place
    self._examples = self._read(**self.place)
    self._waiting: collections.deque[_Example] = collections.deque()

  @property
  def metrics(self) -> Place:
    """Numbers of a step: where the stream stands."""
    names = ("epoch", "row", "left_out")
    return {f"data/{name}": self.place[name] for name in names}

  def batch(self, step: int) -> dict[str, np.ndarray]:
    """Returns the next rows; steps are asked for one after the other."""
    del step
    while len(self._waiting) < self._batch_size:
      self._waiting.append(next(self._examples))
    number = self._batch_size
    while number > 1 and not self.fits(self._part(number)):
      number -= 1
    part = self._part(number)
    self.place = self._waiting[number - 1].place
    for _ in range(number):
      self._waiting.popleft()
    return self._make(part, np.arange(self._batch_size), self.lengths)

  def first(self) -> dict[str, np.ndarray]:
    """Returns the batch that comes next, to be looked at."""
    place = self.place
    found = self.batch(0)
    self.go_to(place)
    return found

  def held_out_batch(self, rows: np.ndarray) -> Batch:
    """Returns held-out rows by their numbers."""
    return self._make(self.held_out, rows, self.lengths)

  def _part(self, number):
    """The first examples that wait, as rows."""
    some = list(itertools.islice(self._waiting, number))
    return encoding.Encoded(
      [x.prompt_ids for x in some],
      [x.response_ids for x in some],
      [x.row for x in some],
      [],
      learnt=[x.learnt for x in some],
    )

  def _placed(self):
    """All rows of the file, from its beginning, with their places."""
    rows = files.load_placed_rows(self._name, "train", streaming=True)
    return itertools.islice(rows, *self._span)

  def _is_apart(self, row):
    """Whether a row is not learnt from, for its prompt."""
    key = asked.key(row.prompt)
    if self._apart is not None:
      return key in self._apart
    if self._share is None:
      return False
    digest = hashlib.sha256(f"{self._seed}:{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < self._share * 2**64

  def _look_for_held_out(self, rows, placed, most):
    """The first rows that are held out, and how many rows were read."""
    found, prompts, num_read = [], set(), 0
    limit = HEAD + math.ceil(4 * most / self._share)
    while True:
      num_read = sum(self._reader.forms.values()) + len(self._reader.skipped)
      for row in self._arrange(list(filter(self._is_apart, rows)))[0]:
        key = asked.key(row.prompt)
        if key in prompts or len(prompts) < most:
          prompts.add(key)
          found.append(row)
      rows = list(itertools.islice(placed, _CHUNK))
      if not rows or len(prompts) >= most or num_read >= limit:
        break
      rows = self._reader.more(rows)
    if not found:
      raise ValueError(
        f"--eval_share={self._share} holds out none of the first {num_read} "
        f"rows of {self._name}: give a larger one, or --eval_data."
      )
    return found, num_read

  def _buffers(self, epoch: int, row: int) -> Iterator[tuple]:
    """Yields, for ever: epoch, first row, shuffled rows, number skipped."""
    while True:
      placed, num_used = self._placed(), 0
      num_passed = sum(1 for _ in itertools.islice(placed, row))
      if num_passed < row:
        raise ValueError(
          f"{self._name} has {num_passed} rows, and had more than {row} when "
          "this run was saved: it must be the same file."
        )
      started = row
      while some := list(itertools.islice(placed, self._buffer)):
        self._reader.skipped.clear()  # Not kept for ever.
        rows = [x for x in self._reader.more(some) if not self._is_apart(x)]
        rows, unusable = self._arrange(rows)
        order = np.random.default_rng([self._seed, epoch, row])
        rows = [rows[i] for i in order.permutation(len(rows))]
        yield epoch, row, rows, len(self._reader.skipped) + len(unusable)
        num_used, row = num_used + len(rows), row + len(some)
      if not started and not num_used:
        raise ValueError(f"{self._name}: all rows are held out.")
      epoch, row = epoch + 1, 0

  def _read(
    self, epoch: int, row: int, taken: int, left_out: int
  ) -> Iterator[_Example]:
    """Yields encoded rows from a place on."""
    num_without = 0
    for at_epoch, first, rows, num_skipped in self._buffers(epoch, row):
      left_out += 0 if taken else num_skipped  # Else they are counted already.
      for start in range(taken, len(rows), _CHUNK):
        some = rows[start : start + _CHUNK]
        with _quiet():
          part = self._encode(some)
        numbers = {x.place: i for i, x in enumerate(some)}
        for number, fields in enumerate(
          zip(
            part.rows,
            part.prompt_ids,
            part.response_ids,
            part.learnt,
            strict=True,
          )
        ):
          at = numbers[fields[0].place]
          place = {
            "epoch": at_epoch,
            "row": first,
            "taken": start + at + 1,
            "left_out": left_out + at - number,
          }
          yield _Example(place, *fields)
        left_out += len(some) - len(part.rows)
        num_without = 0 if part.rows else num_without + len(some)
        if num_without > 100 * HEAD:
          raise ValueError(
            f"{self._name}: none of {num_without} rows in a row can be "
            f"encoded, such as {some[-1].place}."
          )
      taken = 0


def batch_of(
  part: encoding.Encoded, rows: np.ndarray, lengths: np.ndarray
) -> dict[str, np.ndarray]:
  """Pads rows by number to a batch; those behind the last row are empty.

  Args:
    part: N rows.
    rows: `[B]` int.
    lengths: columns P and T.
  """
  is_there = rows < len(part.rows)
  return encoding.batch(
    part,
    np.where(is_there, rows, 0),
    np.where(is_there, 0, 1),  # There is no second response.
    prompt_length=lengths[0],
    response_length=lengths[1],
  )


def stream(
  tokenizer: Any, name: str, *, settings: dict[str, Any], **options: Any
) -> Stream:
  """Opens a file whose first replies, and all turns of dialogues, are learnt.

  Args:
    tokenizer: of the policy.
    name: of the file.
    settings: keyword arguments of `encoding.prepare`, whose limits are the
      columns of batches.
    **options: of `Stream`.

  Raises:
    ValueError: as `Stream`.
  """

  def encode(rows):
    found = encoded(
      tokenizer, logged.first_replies(rows), all_turns=True, **settings
    )
    # Of all batches alike, so that they have one structure.
    masks = [
      learnt or [True] * len(ids)
      for learnt, (ids,) in zip(found.learnt, found.response_ids, strict=True)
    ]
    return dataclasses.replace(found, learnt=masks)

  limits = settings["max_prompt_length"], settings["max_response_length"]
  if not settings.get("assistant_only", True):
    limits = 1, sum(limits)
  return Stream(name, encode, lengths=limits, **options)


def encoded(
  tokenizer: Any, rows: list[forms.Row], **settings: Any
) -> encoding.Encoded:
  """Does what `encoding.prepare` does, also where no row is left."""
  if not rows:
    return encoding.Encoded([], [], [], [])
  try:
    return encoding.prepare(tokenizer, rows, **settings)
  except chats.NoRowLeft:
    return encoding.Encoded([], [], [], [])


@contextlib.contextmanager
def _quiet():
  """Keeps back what is logged of rows, which would come again and again."""
  level = logging.get_verbosity()
  logging.set_verbosity(logging.ERROR)
  try:
    yield
  finally:
    logging.set_verbosity(level)
