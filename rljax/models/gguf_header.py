"""Holds the header of a GGUF file against the size of the file.

A reader that believes a count of 2^60 never comes back. `check` walks the
metadata and the descriptions of the tensors first: each count and length must
fit into what is left of the file, so it takes no longer than reading them.
"""

import os
import pathlib
import struct
from typing import BinaryIO

# Bytes of a value of each type; strings (8) and arrays (9) have their own.
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9
_LEAST_FIELD, _LEAST_TENSOR = 8 + 4 + 1, 8 + 4 + 4 + 8
_MOST_DIMENSIONS, _MOST_DEPTH = 8, 4


def check(path: str | os.PathLike[str]) -> None:
  """Raises ValueError for a header that says more than the file holds.

  Args:
    path: of a file that begins as GGUF does, in the byte order of this host;
      others are left to the reader.
  """
  path = pathlib.Path(path)
  with path.open("rb") as file:
    header = _Header(file, path)
    if file.read(4) != b"GGUF" or header.number("<I", "version") not in (2, 3):
      return
    num_tensors = header.count("tensors", _LEAST_TENSOR)
    num_fields = header.count("metadata fields", _LEAST_FIELD)
    for _ in range(num_fields):
      name = header.text("the name of a metadata field")
      header.value(header.number("<I", name), name)
    for _ in range(num_tensors):
      name = header.text("the name of a tensor")
      num_dimensions = header.number("<I", name)
      if num_dimensions > _MOST_DIMENSIONS:
        header.refuse(f"the tensor {name} has {num_dimensions} dimensions")
      size = 1
      for _ in range(num_dimensions):
        size *= header.number("<Q", name)
      header.number("<I", name)
      header.number("<Q", name)
      # The smallest quantisation has more than one bit for each number.
      if size > 8 * header.size:
        header.refuse(f"the tensor {name} has {size} numbers")


class _Header:
  """Reads a file piece by piece, and never over its end."""

  def __init__(self, file: BinaryIO, path: pathlib.Path):
    self.size = path.stat().st_size
    self._file, self._path = file, path

  def refuse(self, what: str) -> None:
    raise ValueError(
      f"{self._path} is damaged: {what}, and the file has {self.size} bytes."
    )

  def _left(self) -> int:
    return self.size - self._file.tell()

  def number(self, form: str, name: str) -> int:
    """Reads a whole number of the field or tensor of this name."""
    content = self._file.read(struct.calcsize(form))
    if len(content) < struct.calcsize(form):
      self.refuse(f"it ends within {name}")
    return struct.unpack(form, content)[0]

  def count(self, name: str, least_bytes: int) -> int:
    """Reads how many things follow, of at least so many bytes each."""
    found = self.number("<Q", f"the number of {name}")
    if found * least_bytes > self.size:
      self.refuse(f"it claims to have {found} {name}")
    return found

  def text(self, name: str) -> str:
    """Reads a length and so many bytes."""
    length = self.number("<Q", name)
    if length > self._left():
      self.refuse(f"{name} claims a text of {length} bytes")
    try:
      return self._file.read(length).decode("utf-8")
    except UnicodeDecodeError:
      self.refuse(f"{name} is not UTF-8")

  def value(self, kind: int, name: str, depth: int = 0) -> None:
    """Walks over a value of a metadata field."""
    if kind == _STRING:
      length = self.number("<Q", name)
      if length > self._left():
        self.refuse(f"{name} claims a text of {length} bytes")
      self._file.seek(length, os.SEEK_CUR)
    elif kind == _ARRAY:
      inner = self.number("<I", name)
      length = self.number("<Q", name)
      each = _SIZES.get(inner, 8)
      if length * each > self._left():
        self.refuse(f"{name} claims {length} values")
      if depth == _MOST_DEPTH:
        self.refuse(f"{name} is nested more than {_MOST_DEPTH} deep")
      if inner in _SIZES:
        self._file.seek(length * each, os.SEEK_CUR)
        return
      for _ in range(length):
        self.value(inner, name, depth + 1)
    elif kind in _SIZES:
      if _SIZES[kind] > self._left():
        self.refuse(f"it ends within {name}")
      self._file.seek(_SIZES[kind], os.SEEK_CUR)
    else:
      self.refuse(f"{name} is of the unknown type {kind}")
