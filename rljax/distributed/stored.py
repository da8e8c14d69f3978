"""Arrays that stay on disk until they are placed, part by part."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Index = tuple[slice, ...]


class Stored:
  """An array on disk: its shape and dtype, and a reader of its parts.

  `meshes.place` reads what each device of this host gets; numpy reads it whole.

  Attributes:
    shape: of the whole array.
    dtype: of what is read.
  """

  def __init__(
    self,
    shape: tuple[int, ...],
    dtype: Any,
    read: Callable[[Index], np.ndarray],
  ):
    """Takes a function that reads a part, by one slice for each dimension."""
    self.shape, self.dtype = tuple(shape), np.dtype(dtype)
    self._read = read

  def __getitem__(self, index: Index) -> np.ndarray:
    """Reads a part."""
    return self._read(index)

  def __array__(self, dtype=None, copy=None) -> np.ndarray:
    whole = self._read((slice(None),) * self.ndim)
    return whole if dtype is None else whole.astype(dtype, copy=False)

  @property
  def ndim(self) -> int:
    """Number of dimensions."""
    return len(self.shape)

  @property
  def size(self) -> int:
    """Number of elements."""
    return math.prod(self.shape)

  @property
  def nbytes(self) -> int:
    """Bytes of the whole array, once read."""
    return self.size * self.dtype.itemsize


def joined(parts: Mapping[tuple[int, ...], Stored]) -> Stored:
  """Puts arrays on disk together, along new axes in front.

  Args:
    parts: place along each of these axes -> array, all of one shape; the place
      () is that of an array which is whole.
  """
  if () in parts:
    return parts[()]
  firsts = sorted({place[0] for place in parts})
  rows = [
    joined({place[1:]: x for place, x in parts.items() if place[0] == first})
    for first in firsts
  ]

  def read(index):
    return np.stack([row[index[1:]] for row in rows[index[0]]])

  return Stored((len(rows), *rows[0].shape), rows[0].dtype, read)
