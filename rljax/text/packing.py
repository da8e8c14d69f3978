"""Joins texts of different lengths to rows of one length, in numpy.

A batch stays what it is, B replies and their prompts, padded: the losses read
it as before, and so do the seeds that draw it. Beside it stand the same texts
in fewer and fuller rows, which are what the model reads; `generation/packed.py`
brings what it says back into the places of the batch.
"""

import bisect
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

Batch = dict[str, Any]

# What a batch holds of its prompts and replies.
TEXTS = ("prompt_ids", "prompt_mask", "response_ids", "response_mask")


@dataclasses.dataclass(frozen=True)
class Packer:
  """Adds packed rows to batches, all in one shape; see `plan`.

  Attributes:
    length: S, tokens of a row; 0: batches are left as they are.
    num_rows: R, rows of a part of a batch.
    num_reads: U, response tokens of a row for which there is room.
    num_parts: micro-batches of a batch, which are packed each by itself.
    multiple: what R is divisible by.
    notes: how full the rows are, in lines.
  """

  length: int = 0
  num_rows: int = 0
  num_reads: int = 0
  num_parts: int = 1
  multiple: int = 1
  notes: tuple[str, ...] = ()

  def __call__(self, batch: Mapping[str, Any]) -> Batch:
    """Returns the batch with its texts in packed rows beside it.

    Args:
      batch: `prompt_ids`, `prompt_mask` `[B, ..., P]`, left-padded, and
        `response_ids`, `response_mask` `[B, ..., T]`, right-padded; and
        anything else, which is kept. Of n parts, part i has the rows i, i + n,
        ..., as in `microbatch.split`.

    Returns:
      The batch and `packed_ids` and `packed_segments`
      `[n R, S]`: prompts with their responses, and which text of its row a
      token belongs to, from 1 on, 0 at padding; `packed_reads` `[n R, U]`, the
      columns of response tokens; `packed_places` `[B, ..., T]`, where a token
      of the batch stands in `packed_reads`, flat, of its part.

    Raises:
      ValueError: if a text is longer than a row, or the batch needs more rows
        than were planned.
    """
    if not self.length:
      return dict(batch)
    num_parts = self.num_parts
    masks = batch["prompt_mask"], batch["response_mask"]
    size = len(masks[0])
    rows = lambda *shape: np.zeros((self.num_rows, num_parts, *shape), np.int32)
    ids, segments = rows(self.length), rows(self.length)
    reads = rows(self.num_reads)
    places = np.zeros(masks[1].shape, np.int32)
    for part in range(num_parts):
      mine = slice(part, size, num_parts)
      fold = lambda x, mine=mine: x[mine].reshape(-1, x.shape[-1])
      found = self._pack(*(fold(batch[name]) for name in TEXTS))
      ids[:, part], segments[:, part], reads[:, part], at = found
      places[mine] = at.reshape(places[mine].shape)
    joined = lambda x: x.reshape(-1, x.shape[-1])
    return dict(batch) | {
      "packed_ids": joined(ids),
      "packed_segments": joined(segments),
      "packed_reads": joined(reads),
      "packed_places": places,
    }

  def holds(self, asked: np.ndarray, said: np.ndarray) -> bool:
    """Whether a batch of so many tokens has room in the rows.

    Args:
      asked: `[B]` int, tokens of the prompts.
      said: `[B]` int, tokens of the responses.
    """
    needed = plan(self.length, [(asked, said)], num_parts=self.num_parts)
    return (
      needed.num_rows <= self.num_rows and needed.num_reads <= self.num_reads
    )

  def alone(self, batch: Mapping[str, Any]) -> Batch:
    """Packs any batch, in as many rows as it needs, as one part."""
    asked, said = (
      batch[f"{name}_mask"].sum(axis=-1) for name in ("prompt", "response")
    )
    packer = plan(self.length, [(asked, said)], multiple=self.multiple)
    return packer(batch)

  def _pack(self, prompt_ids, prompt_mask, response_ids, response_mask):
    """The arrays of one part: `[R, S]` twice, `[R, U]` and `[N, T]`."""
    num_asked, num_said = prompt_mask.sum(axis=1), response_mask.sum(axis=1)
    row_of = best_fit(_sizes(num_asked, num_said), self.length)
    if row_of.max(initial=-1) >= self.num_rows:
      raise ValueError(
        f"A batch needs {row_of.max() + 1} packed rows, and {self.num_rows} "
        "were planned."
      )
    ids = np.zeros((self.num_rows, self.length), np.int32)
    segments = np.zeros_like(ids)
    reads = np.zeros((self.num_rows, self.num_reads), np.int32)
    places = np.zeros(response_mask.shape, np.int32)
    used, read = np.zeros((2, self.num_rows), np.int32)
    counts = np.zeros(self.num_rows, np.int32)
    for i in np.flatnonzero(row_of >= 0):
      row, said = row_of[i], num_said[i]
      start = used[row]
      middle, end = start + num_asked[i], start + num_asked[i] + said
      counts[row] += 1
      ids[row, start:middle] = prompt_ids[i, prompt_mask[i]]
      ids[row, middle:end] = response_ids[i, :said]
      segments[row, start:end] = counts[row]
      reads[row, read[row] : read[row] + said] = np.arange(middle, end)
      places[i, :said] = row * self.num_reads + read[row] + np.arange(said)
      used[row], read[row] = end, read[row] + said
    return ids, segments, reads, places


def best_fit(counts: np.ndarray, length: int) -> np.ndarray:
  """Puts texts into rows, the longest first, each into the fullest that fits.

  Args:
    counts: `[N]` int, tokens of each text; 0 for none, which needs no row.
    length: tokens of a row.

  Returns:
    `[N]` int, the row of each text, from 0 on; -1 where there is none.

  Raises:
    ValueError: if a text is longer than a row.
  """
  counts = np.asarray(counts)
  if counts.max(initial=0) > length:
    raise ValueError(
      f"--packed_length={length} is less than the {counts.max()} tokens of the "
      "longest prompt with its reply: give that or more, 0 to join no rows, or "
      "--too_long=skip or cut with lower limits."
    )
  row_of = np.full(counts.shape, -1, np.int64)
  rooms: list[tuple[int, int]] = []  # What is left of each row, in order.
  for i in np.argsort(-counts, kind="stable").tolist():
    count = int(counts[i])
    if not count:
      break
    at = bisect.bisect_left(rooms, (count, -1))
    room, row = rooms.pop(at) if at < len(rooms) else (length, len(rooms))
    row_of[i] = row
    bisect.insort(rooms, (room - count, row))
  return row_of


def plan(
  length: int,
  draws: Iterable[tuple[np.ndarray, np.ndarray]],
  *,
  num_parts: int = 1,
  multiple: int = 1,
  padded: int | None = None,
) -> Packer:
  """Finds the one shape in which the batches of all steps can be packed.

  Args:
    length: S, tokens of a row; 0: nothing is packed.
    draws: for each step, the tokens of its prompts and of its responses,
      int of shapes that go together, `[B, ...]`; a response of none needs no
      row.
    num_parts: micro-batches of a step.
    multiple: what R must be divisible by, such as the devices that share rows.
    padded: columns of an unpacked row, for the notes.

  Returns:
    What packs the batches.

  Raises:
    ValueError: if a text is longer than a row.
  """
  if not length:
    return Packer()
  num_rows = num_reads = num_tokens = num_texts = num_steps = 0
  for asked, said in draws:
    num_steps += 1
    asked, said = np.broadcast_arrays(asked, said)
    for part in range(num_parts):
      mine = slice(part, None, num_parts)
      counts = said[mine].ravel()
      sizes = _sizes(asked[mine].ravel(), counts)
      row_of = best_fit(sizes, length)
      is_there = row_of >= 0
      reads = np.bincount(row_of[is_there], counts[is_there])
      num_rows = max(num_rows, len(reads))
      num_reads = max(num_reads, int(reads.max(initial=0)))
      num_tokens += int(sizes.sum())
      num_texts += counts.size
  num_rows = -(-max(num_rows, 1) // multiple) * multiple
  all_rows = num_rows * num_parts
  share = num_tokens / max(num_steps * all_rows * length, 1)
  note = (
    f"Packing: the texts of a step are joined to {all_rows} rows of {length} "
    f"tokens; {share:.0%} of these are no padding"
  )
  if padded:
    note += f", {num_tokens / max(num_texts * padded, 1):.0%} without packing"
  return Packer(
    length,
    num_rows,
    max(num_reads, 1),
    num_parts,
    multiple,
    (f"{note}.",),
  )


def room_for(
  length: int, num_tokens: float, *, num_parts: int = 1, multiple: int = 1
) -> Packer:
  """Makes rows for batches that are not known yet.

  Args:
    length: S, tokens of a row.
    num_tokens: of a part, for which there is room at least.
    num_parts: see `plan`; likewise `multiple`.
    multiple: what R must be divisible by.
  """
  num_rows = -(-max(num_tokens, 1) // (length * multiple)) * multiple
  num_rows = int(num_rows)
  note = (
    f"Packing: the texts of a step are joined to {num_rows * num_parts} rows "
    f"of {length} tokens; those that do not fit wait for the next step."
  )
  return Packer(length, num_rows, length, num_parts, multiple, (note,))


def _sizes(num_asked: np.ndarray, num_said: np.ndarray) -> np.ndarray:
  """Tokens of whole texts; none where there is no response."""
  return np.where(num_said > 0, num_asked + num_said, 0)
