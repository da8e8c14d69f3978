"""Reads and writes rows: JSON lines, JSON, folders of splits, tfds."""

import gzip
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from rljax.storage import paths
from rljax.text import asked

Row = dict[str, Any]


def read_jsonl(
  path: str | os.PathLike,
  *,
  required: Sequence[str] = (),
  optional: Mapping[str, Any] | None = None,
) -> list[Row]:
  """Reads one JSON object per line; a name ending in `.gz` is unpacked.

  Blank lines are skipped. Fields that are not asked for are kept.

  Args:
    path: file to read.
    required: fields that every row must have.
    optional: field -> value to give to the rows that lack it.

  Returns:
    The rows in the file's order.

  Raises:
    ValueError: naming the line, if it is not a JSON object or lacks a field; or
      if there are no rows.
  """
  return [
    _checked(_raised(row), place, required, optional)
    for place, row in _placed_lines(path)
  ]


def write_jsonl(path: str | os.PathLike, rows: Iterable[Mapping]) -> None:
  """Writes one JSON object per line; a reader sees the old file or the new.

  Args:
    path: file to replace; its folder is made if it is missing. A name ending
      in `.gz` is packed.
    rows: mappings of JSON values and numpy scalars or arrays.
  """
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  content = "".join(map(_json_line, rows)).encode("utf-8")
  if path.suffix == ".gz":
    content = gzip.compress(content, mtime=0)
  paths.write_whole(path, content, fsync=True, shared=True)


def append_jsonl(path: str | os.PathLike, rows: Iterable[Mapping]) -> None:
  """Adds rows at the end of a file, which need not exist yet.

  A last line without its line feed, which a killed writer leaves, is cut off
  with a warning, so that the new rows stay readable.

  Args:
    path: uncompressed file to add to.
    rows: as for `write_jsonl`.
  """
  path = pathlib.Path(path)
  if path.suffix == ".gz":
    raise ValueError(f"append_jsonl writes uncompressed files, got {path}.")
  path.parent.mkdir(parents=True, exist_ok=True)
  content = "".join(map(_json_line, rows)).encode("utf-8")
  with path.open("a+b") as file:
    end = file.seek(0, os.SEEK_END)
    if end and _last_byte(file) != b"\n":
      file.seek(0)
      kept = file.read().rfind(b"\n") + 1
      file.truncate(kept)
      logging.warning("%s: cut off a half-written last line.", path)
    file.write(content)


def load_rows(
  name: str,
  split: str,
  *,
  data_dir: str | os.PathLike | None = None,
  required: Sequence[str] = (),
) -> list[Row]:
  """Loads the rows of a data set from a file, a folder or tfds.

  Args:
    name: one of
      a `.jsonl` or `.json` file, possibly ending in `.gz` (a `.json` file
      holds one list of objects); "{split}" in its name is replaced, and
      without it the whole file is the split;
      a folder with a file named after the split;
      "tfds:<name>", a tensorflow-datasets data set that was prepared with
      `file_format="array_record"`. Nothing is downloaded.
    split: such as "train"; tfds also understands "train[:10%]".
    data_dir: folder that relative paths start from; for tfds its data folder.
    required: fields that every row must have.

  Returns:
    One dict per row; tfds bytes are decoded to text.

  Raises:
    ValueError: if there is no such file, split or prepared data set.
  """
  return [
    _checked(_raised(row), place, required, None)
    for place, row in load_placed_rows(name, split, data_dir=data_dir)
  ]


def load_placed_rows(
  name: str, split: str, *, data_dir: str | os.PathLike | None = None
) -> Iterator[tuple[str, Row | ValueError]]:
  """Loads rows with their places, so that a caller may skip bad ones.

  Args:
    name: see `load_rows`; likewise `split` and `data_dir`.
    split: such as "train".
    data_dir: folder that relative paths start from.

  Yields:
    A place such as "logged.jsonl:17", and the row. A row that cannot be read
    comes as the ValueError that `load_rows` would raise, which names its
    place.

  Raises:
    ValueError: if there is no such file, split or prepared data set, or it
      holds no rows at all.
  """
  if name.startswith("tfds:"):
    yield from _placed_tfds(name.removeprefix("tfds:"), split, data_dir)
    return
  path = pathlib.Path(data_dir or "") / name.replace("{split}", split)
  if path.is_dir():
    endings = (".jsonl", ".jsonl.gz", ".json", ".json.gz")
    candidates = [path / f"{split}{ending}" for ending in endings]
    found = [file for file in candidates if file.is_file()]
    if not found:
      raise ValueError(
        f"{path}: no file for split {split!r} (looked for "
        f"{', '.join(file.name for file in candidates)})."
      )
    path = found[0]
  if not path.is_file():
    raise ValueError(f"{path}: no such file or folder.")
  stem = path.name.removesuffix(".gz")
  if stem.endswith(".jsonl"):
    yield from _placed_lines(path)
  elif stem.endswith(".json"):
    yield from _placed_items(path)
  else:
    raise ValueError(f"{path}: expected .jsonl or .json, possibly with .gz.")


# Helpers.


def _read_bytes(path: str | os.PathLike) -> bytes:
  """Reads a file, unpacked if its name ends in `.gz`."""
  content = pathlib.Path(path).read_bytes()
  if not str(path).endswith(".gz"):
    return content
  try:
    return gzip.decompress(content)
  except (OSError, EOFError) as error:
    raise ValueError(f"{path}: not a gzip file ({error}).") from error


def _placed_lines(
  path: str | os.PathLike,
) -> Iterator[tuple[str, Row | ValueError]]:
  """Yields the rows of a .jsonl file, see `load_placed_rows`."""
  place = None
  for number, line in enumerate(_read_bytes(path).split(b"\n"), start=1):
    if not line.strip():
      continue
    place = f"{path}:{number}"
    try:
      row = json.loads(line.decode("utf-8"))
    except ValueError as error:  # Bad UTF-8 as well as bad JSON.
      yield place, ValueError(f"{place}: not JSON ({error}).")
    else:
      yield place, _object(row, place)
  if place is None:
    raise ValueError(f"{path}: no rows.")


def _placed_items(
  path: pathlib.Path,
) -> Iterator[tuple[str, Row | ValueError]]:
  """Yields the rows of a .json file, see `load_placed_rows`."""
  try:
    rows = json.loads(_read_bytes(path).decode("utf-8"))
  except ValueError as error:
    raise ValueError(f"{path}: not JSON ({error}).") from error
  if not isinstance(rows, list):
    raise ValueError(f"{path}: expected a list of JSON objects.")
  if not rows:
    raise ValueError(f"{path}: no rows.")
  for i, row in enumerate(rows):
    yield f"{path}, row {i}", _object(row, f"{path}, row {i}")


def _object(row: Any, place: str) -> Row | ValueError:
  if isinstance(row, dict):
    return row
  return ValueError(f"{place}: expected a JSON object, got {shorten(row)}.")


def _raised(row: Row | ValueError) -> Row:
  if isinstance(row, ValueError):
    raise row
  return row


def _last_byte(file) -> bytes:
  file.seek(-1, os.SEEK_END)
  return file.read(1)


def _json_line(row: Mapping) -> str:
  def plain(value):
    if isinstance(value, (np.ndarray, np.generic)):
      return value.tolist()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON.")

  row = {
    name: asked.given(value) if isinstance(value, asked.Prompt) else value
    for name, value in row.items()
  }
  return json.dumps(row, ensure_ascii=False, default=plain) + "\n"


def _checked(
  row: Row,
  place: str,
  required: Sequence[str],
  optional: Mapping[str, Any] | None,
) -> Row:
  for field in required:
    if field not in row:
      raise ValueError(f'{place}: "{field}" is missing.')
  return {**(optional or {}), **row}


def _placed_tfds(
  name: str, split: str, data_dir: str | os.PathLike | None
) -> Iterator[tuple[str, Row | ValueError]]:
  """Yields the rows of a tfds data set, see `load_placed_rows`."""
  try:
    import tensorflow_datasets as tfds
    import tensorflow_datasets.text  # Registers gsm8k and others.
  except ImportError as error:
    raise ValueError(
      f'"tfds:{name}" needs the package tensorflow-datasets ({error}).'
    ) from error
  try:
    source = tfds.data_source(
      name,
      split=split,
      data_dir=data_dir,
      download=False,
      builder_kwargs={"file_format": "array_record"},
    )
  except Exception as error:  # tfds raises a dozen unrelated types here.
    raise ValueError(
      f'"tfds:{name}" has no prepared split {split!r} in '
      f"{data_dir or 'the default folder of tfds'} "
      f"({type(error).__name__}: {first_line(error)}). Prepare it once with "
      f'tfds.builder("{name}", file_format="array_record")'
      ".download_and_prepare()."
    ) from error
  if not len(source):
    raise ValueError(f'"tfds:{name}": split {split!r} has no rows.')
  for i in range(len(source)):
    place = f"tfds:{name}, row {i}"
    try:
      row = _plain(source[i])
    except UnicodeDecodeError as error:
      row = ValueError(f"{place}: not UTF-8 ({error}).")
    yield place, row


def _plain(value: Any) -> Any:
  """Converts numpy and bytes, as tfds gives them, to what JSON holds."""
  if isinstance(value, Mapping):
    return {key: _plain(item) for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [_plain(item) for item in value]
  if isinstance(value, (np.ndarray, np.generic)):
    return _plain(value.tolist())
  return value.decode("utf-8") if isinstance(value, bytes) else value


def shorten(value: Any, limit: int = 60) -> str:
  """Returns the repr of a value, cut to `limit` characters."""
  text = repr(value)
  return text if len(text) <= limit else f"{text[: limit - 3]}..."


def first_line(error: Exception) -> str:
  """Returns the first line of an error's message, without its full stop."""
  return (str(error).splitlines() or [""])[0].rstrip(".")
