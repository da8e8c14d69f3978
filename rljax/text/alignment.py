"""Aligns token ids of two texts by the fewest edits.

A wrong sample and its corrected rewrite are aligned with the fewest insertions,
deletions and substitutions. The alignment says which tokens of the rewrite are
new, and which tokens of the sample were dropped. Both sequences include their
end token.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

MODES = ("clean", "reference")
_KEEP, _SUBSTITUTE, _DELETE, _INSERT = range(4)


# Arrays have no single truth value: comparing field by field would raise.
@dataclasses.dataclass(frozen=True, eq=False)
class Alignment:
  """Holds the fewest edits that turn n sample tokens into m rewrite tokens."""

  distance: int  # Insertions + deletions + substitutions.
  edited: np.ndarray  # [m] bool, rewrite tokens substituted or inserted.
  dropped: np.ndarray  # [n] bool, sample tokens substituted or deleted.


def align(
  sample: Sequence[int], rewrite: Sequence[int], *, mode: str = "clean"
) -> Alignment:
  """Aligns one pair, see `align_pairs`, which is much faster for many."""
  return align_pairs([sample], [rewrite], mode=mode)[0]


def align_pairs(
  samples: Sequence[Sequence[int]],
  rewrites: Sequence[Sequence[int]],
  *,
  mode: str = "clean",
  max_cells: int = 2**24,
) -> list[Alignment]:
  """Aligns each sample with its rewrite at the Levenshtein distance.

    f[i, 0] = i,   f[0, j] = j
    f[i, j] = min(f[i-1, j-1] + 1{x_i ≠ y_j}, f[i-1, j] + 1, f[i, j-1] + 1)

  The distance is f[n, m]. Several paths through the table may have this cost;
  the mode says which of them is walked, from (n, m) back:

    "clean": at each cell a match if the tokens are equal, else the cheapest of
      substitution, deletion and insertion, ties in this order; until (0, 0).
    "reference": as the authors' code. Ties go to deletion, insertion and
      substitution, in this order. The rewrite token of every cell on the path
      whose two tokens differ counts as edited, so that the kept token before
      deleted ones does too. The walk stops as soon as one of the two sequences
      is used up, so that what is inserted at the very start does not count.

  Args:
    samples: N sequences of token ids, of any length.
    rewrites: N sequences of token ids, of any length.
    mode: "clean" or "reference".
    max_cells: table cells held at once, at a byte each for long pairs and up to
      three for short ones; one pair at least is held. It changes no result.

  Returns:
    N alignments. In reference mode `edited` is the mask of the tokens that get
    the higher weight, and `distance` and `dropped` are those of the clean mode:
    the authors' code has no mask of sample tokens.

  Raises:
    ValueError: if the mode is unknown, the numbers of samples and rewrites
      differ, or a sequence is not 1-D or does not hold integers.

  Source:
    Wagner and Fischer (1974), "The String-to-String Correction Problem". The
    modes: Chen et al. (2024), "Improving Large Language Models via Fine-grained
    Reinforcement Learning with Minimum Editing Constraint", and its code.
  """
  if mode not in MODES:
    raise ValueError(f'mode must be "clean" or "reference", got {mode!r}.')
  samples, rewrites = _checked(samples, rewrites)
  alignments = [None] * len(samples)
  for rows in _chunks(samples, rewrites, max_cells):
    found, edited, dropped = _align_chunk(
      [samples[row] for row in rows], [rewrites[row] for row in rows], mode
    )
    for k, row in enumerate(rows):
      alignments[row] = Alignment(
        distance=int(found[k]),
        # Copies, or one alignment would keep those of its whole chunk.
        edited=edited[k, : len(rewrites[row])].copy(),
        dropped=dropped[k, : len(samples[row])].copy(),
      )
  return alignments


def distances(
  samples: Sequence[Sequence[int]],
  rewrites: Sequence[Sequence[int]],
  *,
  max_cells: int = 2**24,
) -> np.ndarray:
  """Computes Levenshtein distances alone, `[N]` int64; see `align_pairs`."""
  samples, rewrites = _checked(samples, rewrites)
  found = np.zeros(len(samples), np.int64)
  for rows in _chunks(samples, rewrites, max_cells):
    found[rows] = _Chunk(
      [samples[row] for row in rows], [rewrites[row] for row in rows]
    ).fill()
  return found


def imitation_weights(
  alignment: Alignment, *, edited: float = 1.0, kept: float = 0.5
) -> np.ndarray:
  """Computes the weights of a rewrite's tokens in the imitation loss.

  Args:
    alignment: of a sample and its rewrite.
    edited: weight of the tokens that the rewrite changed.
    kept: weight of all others.

  Returns:
    `[m]` float32.

  Source:
    Chen et al. (2024), as in `align_pairs`.
  """
  return np.where(alignment.edited, edited, kept).astype(np.float32)


def _checked(samples, rewrites):
  """Returns both as lists of int64 arrays."""
  if len(samples) != len(rewrites):
    raise ValueError(
      "Each sample needs its rewrite, got "
      f"{len(samples)} samples and {len(rewrites)} rewrites."
    )
  return _checked_ids("samples", samples), _checked_ids("rewrites", rewrites)


def _checked_ids(name, sequences):
  checked = []
  for row, sequence in enumerate(sequences):
    ids = np.asarray(sequence)
    # numpy takes an empty list for floats.
    is_integer = ids.size == 0 or np.issubdtype(ids.dtype, np.integer)
    if ids.ndim != 1 or not is_integer:
      raise ValueError(
        f"{name}[{row}] must be a sequence of integer token ids, got "
        f"{ids.dtype} of shape {ids.shape}."
      )
    checked.append(ids.astype(np.int64))
  return checked


def _chunks(samples, rewrites, max_cells) -> Iterator[list[int]]:
  """Yields row numbers of pairs that are padded to one size and fit."""
  sizes = [
    (len(x) + 1, len(y) + 1) for x, y in zip(samples, rewrites, strict=True)
  ]
  rows, height, width = [], 0, 0
  # Neighbours in this order have about the same size.
  for row in sorted(range(len(sizes)), key=lambda row: max(sizes[row])):
    height = max(height, sizes[row][0])
    width = max(width, sizes[row][1])
    if rows and (len(rows) + 1) * height * width > max_cells:
      yield rows
      rows, (height, width) = [], sizes[row]
    rows.append(row)
  if rows:
    yield rows


def _align_chunk(samples, rewrites, mode):
  """Returns distances `[B]`, edited tokens `[B, m]` and dropped `[B, n]`."""
  chunk = _Chunk(samples, rewrites)
  found = chunk.fill()
  edited, dropped = chunk.walk()
  if mode == "reference":
    chunk.fill(prefer_substitution=False)
    edited, _ = chunk.walk(as_reference=True)
  return found, edited, dropped


class _Chunk:
  """Holds B pairs, padded to n and m tokens, and tables of their distances.

  Cells (i, j) with the same d = i + j do not depend on each other, so a
  diagonal is computed at once, for all pairs. Pairs lie on the last axis: each
  operation then runs over one block of memory. Padding comes after a pair's own
  tokens and cannot change its part of the table.
  """

  def __init__(self, samples, rewrites):
    self.samples, self.num_sample = _padded(samples)  # [n, B], [B]
    self.rewrites, self.num_rewrite = _padded(rewrites)  # [m, B], [B]
    n, m = len(self.samples), len(self.rewrites)
    # The move back from each cell. Diagonals lie one after another: cell (i, j)
    # with 1 <= i <= n and 1 <= j <= m is row first[i + j] + i.
    self.moves = np.empty((n * m, len(samples)), np.uint8)
    d = np.arange(n + m + 1)
    low, high = np.maximum(1, d - m), np.minimum(n, d - 1)
    counts = np.maximum(0, high - low + 1)
    self.first = np.cumsum(counts) - counts - low

  def fill(self, prefer_substitution=True):
    """Fills in the moves and returns the distances, `[B]`."""
    n, num_pairs = self.samples.shape
    m = len(self.rewrites)
    # On a diagonal j falls as i grows: backwards, both are plain slices.
    backwards = np.ascontiguousarray(self.rewrites[::-1])
    # Cell (i, d - i) of diagonals d - 2, d - 1 and d is row i of these. The
    # largest number is that of a border cell, plus one.
    shape, dtype = (n + 1, num_pairs), np.min_scalar_type(max(n, m) + 1)
    before, last, this = (np.zeros(shape, dtype) for _ in range(3))
    last[:2] = 1
    aside_buffer = np.empty(shape, dtype)
    flag_buffers = np.empty((2, *shape), bool)
    ends = self.num_sample + self.num_rewrite
    # Already right in diagonals 0 and 1, which the loop skips.
    found = ends.copy()
    for d in range(2, n + m + 1):
      low, high = max(1, d - m), min(n, d - 1)
      inner = slice(low, high + 1)
      size = high + 1 - low
      aside = aside_buffer[:size]
      differ, is_aside = flag_buffers[:, :size]
      deleted, inserted = last[low - 1 : high], last[inner]
      np.not_equal(
        self.samples[low - 1 : high],
        backwards[m - d + low : m - d + high + 1],
        out=differ,
      )
      np.minimum(deleted, inserted, out=aside)
      aside += 1
      straight = before[low - 1 : high]
      straight += differ
      np.minimum(straight, aside, out=this[inner])
      # A match never costs more than an insertion or a deletion, but may cost
      # the same.
      if prefer_substitution:
        np.less(aside, straight, out=is_aside)
      else:
        np.less_equal(aside, straight, out=is_aside)
        is_aside &= differ
      # Keep 0, substitute 1, delete 2, insert 3.
      start = self.first[d] + low
      move = self.moves[start : start + size]
      np.add(differ.view(np.uint8), is_aside.view(np.uint8), out=move)
      np.less(inserted, deleted, out=differ)
      differ &= is_aside
      move += differ.view(np.uint8)
      if d <= m:
        this[0] = d
      if d <= n:
        this[d] = d
      (pairs,) = np.nonzero(ends == d)
      found[pairs] = this[self.num_sample[pairs], pairs]
      before, last, this = last, this, before
    return found

  def walk(self, as_reference=False):
    """Returns edited and dropped tokens, `[B, m]` and `[B, n]` bool."""
    edited = np.zeros(self.rewrites.shape, bool)
    dropped = np.zeros(self.samples.shape, bool)
    rows, columns = self.num_sample.copy(), self.num_rewrite.copy()
    pairs = np.arange(len(rows))
    while True:
      pairs = pairs[(rows[pairs] > 0) & (columns[pairs] > 0)]
      if not pairs.size:
        break
      i, j = rows[pairs], columns[pairs]
      move = self.moves[self.first[i + j] + i, pairs]
      marks = move != _KEEP
      if not as_reference:
        marks &= move != _DELETE
      edited[j - 1, pairs] |= marks
      dropped[i - 1, pairs] |= (move == _SUBSTITUTE) | (move == _DELETE)
      rows[pairs] -= move != _INSERT
      columns[pairs] -= move != _DELETE
    if not as_reference:
      # One of the two is used up: the rest of the other are edits.
      edited |= np.arange(len(edited))[:, None] < columns
      dropped |= np.arange(len(dropped))[:, None] < rows
    return edited.T, dropped.T


def _padded(sequences):
  """Returns ids `[length, B]`, padded at the end, and lengths `[B]`."""
  lengths = np.array([len(ids) for ids in sequences])
  padded = np.zeros((len(sequences), lengths.max()), np.int64)
  for row, ids in zip(padded, sequences, strict=True):
    row[: len(ids)] = ids
  return np.ascontiguousarray(padded.T), lengths
