"""Reads and writes rows: files, folders of splits, tfds and the hub.

Files are read row by row: one that is larger than memory is read as far as its
rows are asked for. What the rows hold is the business of `forms`.
"""

import codecs
import csv
import gzip
import io
import json
import os
import pathlib
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from rljax.storage import buckets, paths
from rljax.text import asked

Row = dict[str, Any]

# Endings of files, in the order in which a folder is searched for a split.
ENDINGS = (
  *(".jsonl", ".jsonl.gz", ".json", ".json.gz"),
  *(".csv", ".csv.gz", ".parquet"),
)
# What a message says of names that can be read.
NAMES = (
  "a .jsonl, .json, .csv or .parquet file (all but the last possibly with "
  ".gz), a folder with such a file for each split, tfds:<name> or hub:<name>"
)
# Cells of a .csv file that hold numbers or truth values, and those that may
# hold a list or messages as JSON; all others are texts as they stand.
_NUMBERS = frozenset(
  {"reward", "value", "advantage", "label", "finished", "score", "rating"}
)
_LISTS = frozenset(
  {"prompt", "completion", "chosen", "rejected", "messages", "conversations"}
  | {"candidates", "rewards", "response_ids", "values", "steps"}
)


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
    for place, row in placed_lines(path)
  ]


def write_jsonl(path: str | os.PathLike, rows: Iterable[Mapping]) -> None:
  """Writes one JSON object per line; a reader sees the old file or the new.

  Args:
    path: file to replace; its folder is made if it is missing. A name ending
      in `.gz` is packed.
    rows: mappings of JSON values and numpy scalars or arrays.
  """
  paths.check_local(path, "The path")
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  content = "".join(map(_json_line, rows)).encode(*paths.TEXT)
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
  paths.check_local(path, "The path")
  path = pathlib.Path(path)
  if path.suffix == ".gz":
    raise ValueError(f"append_jsonl writes uncompressed files, got {path}.")
  path.parent.mkdir(parents=True, exist_ok=True)
  content = "".join(map(_json_line, rows)).encode(*paths.TEXT)
  with paths.writing(path), path.open("a+b") as file:
    end = file.seek(0, os.SEEK_END)
    if end and _last_byte(file) != b"\n":
      file.seek(0)
      kept = file.read().rfind(b"\n") + 1
      file.truncate(kept)
      logging.warning("%s: cut off a half-written last line.", path)
    file.write(content)


def keep_aside(path: str | os.PathLike) -> str:
  """Keeps a file that is about to be replaced under another name.

  Returns:
    Where it is kept.
  """
  return os.fspath(paths.keep_copy(path))


def load_rows(
  name: str,
  split: str,
  *,
  data_dir: str | os.PathLike | None = None,
  required: Sequence[str] = (),
) -> list[Row]:
  """Loads the rows of a data set from a file, a folder, tfds or the hub.

  Args:
    name: one of
      the URL of such a file or folder in a bucket, or a `.jsonl`, `.json`,
      `.csv` or `.parquet` file, all but the last possibly
      ending in `.gz` (a `.json` file holds one list of objects, or an object a
      line; the cells of a `.csv` file are texts, but for the columns of numbers
      and lists that `forms` knows); "{split}" in its name is replaced, and
      without it the whole file is the split;
      a folder with a file named after the split, or with its shards
      (`train-00000-of-00002.parquet`, in the folder or in its `data`), or one
      that `save_to_disk` of `datasets` has written;
      "tfds:<name>", a tensorflow-datasets data set that was prepared with
      `file_format="array_record"`, of which nothing is downloaded;
      "hub:<name>", "hub:<name>:<configuration>" or either with "@<revision>"
      behind it, a data set of the Hugging Face hub, or a local folder of its
      layout, which `datasets` loads.
    split: such as "train"; tfds and the hub also understand "train[:10%]".
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
  name: str,
  split: str,
  *,
  data_dir: str | os.PathLike | None = None,
  streaming: bool = False,
) -> Iterator[tuple[str, Row | ValueError]]:
  """Loads rows with their places, so that a caller may skip bad ones.

  Args:
    name: see `load_rows`; likewise `split` and `data_dir`.
    split: such as "train".
    data_dir: folder that relative paths start from.
    streaming: whether data of the hub are read as they come, rather than put on
      the disk before; files always are, but for .json.

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
  if name.startswith("hub:"):
    yield from _placed_hub(
      name.removeprefix("hub:"), split, data_dir, streaming
    )
    return
  if buckets.is_url(name):
    path = _fetched(name.replace("{split}", split), split)
  else:
    paths.check_local(name, "The file of rows")
    path = pathlib.Path(data_dir or "") / name.replace("{split}", split)
  if not path.exists():
    raise ValueError(
      f"{path}: no such file or folder. Data is {NAMES}; hub:{name} would be "
      "looked for on the hub."
    )
  if path.is_dir() and any(
    (path / mark).is_file() for mark in ("dataset_dict.json", "state.json")
  ):
    yield from _placed_saved(path, split)
    return
  for file in _files_of_split(path, split) if path.is_dir() else [path]:
    yield from _reader(file)(file)


# Helpers.


def _fetched(url: str, split: str = "") -> pathlib.Path:
  """Copies a file at a URL into the cache, or what a folder has of a split."""

  def wanted(objects):
    if "dataset_dict.json" in objects or "state.json" in objects:
      return objects
    name = lambda x: x.rpartition("/")[2]
    found = [x for x in objects if name(x).startswith(split)]
    return found or [x for x in objects if "/" not in x]

  return buckets.fetch(url, wanted, name="The data")


def _files_of_split(folder: pathlib.Path, split: str) -> list[pathlib.Path]:
  """Returns the file of a split in a folder, or its shards in order."""
  candidates = [folder / f"{split}{ending}" for ending in ENDINGS]
  for file in candidates:
    if file.is_file():
      return [file]
  for place in (folder, folder / "data"):
    for ending in ENDINGS:
      if shards := sorted(place.glob(f"{split}-*{ending}")):
        return shards
  there = sorted(file.name for file in folder.iterdir())
  raise ValueError(
    f"{folder}: no file for split {split!r} (looked for "
    f"{', '.join(file.name for file in candidates)} and {split}-*.parquet; "
    f"there are {', '.join(there[:8]) or 'no files'}"
    f"{', ...' if len(there) > 8 else ''}): name the file itself, or rename it."
  )


def _reader(path: pathlib.Path):
  """Returns the function that reads a file, by its ending."""
  stem = path.name.removesuffix(".gz")
  for ending, read in (
    (".jsonl", placed_lines),
    (".json", _placed_items),
    (".csv", _placed_cells),
    (".parquet", _placed_records),
  ):
    if stem.endswith(ending) and not (
      ending == ".parquet" and path.name.endswith(".gz")
    ):
      return read
  raise ValueError(
    f"{path}: the ending says nothing of what is in it; expected .jsonl, "
    ".json or .csv, possibly with .gz, or .parquet."
  )


def _opened(path: str | os.PathLike) -> io.BufferedIOBase:
  """Opens a file to read bytes, unpacked if its name ends in `.gz`."""
  path = buckets.here(path, name="The data")
  is_packed = str(path).endswith(".gz")
  file = (gzip.open if is_packed else open)(path, "rb")
  start = file.peek(2)[:2]
  if start == b"\x1f\x8b" and not is_packed:
    raise ValueError(f"{path}: it is packed by gzip; name it {path}.gz.")
  if start in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
    raise ValueError(f"{path}: its text is UTF-16, and must be UTF-8.")
  return file


def _byte_lines(path: str | os.PathLike) -> Iterator[bytes]:
  """Yields the lines of a file, the first without a byte order mark.

  Raises:
    ValueError: if it is to be unpacked, and is damaged.
  """
  try:
    with _opened(path) as file:
      for number, line in enumerate(file):
        yield line.removeprefix(b"\xef\xbb\xbf") if number == 0 else line
  except (gzip.BadGzipFile, EOFError, zlib.error) as error:
    raise ValueError(f"{path}: not a gzip file ({error}).") from error


def placed_lines(
  path: str | os.PathLike,
) -> Iterator[tuple[str, Row | ValueError]]:
  """Yields the rows of a file of JSON lines, as `load_placed_rows` does.

  Args:
    path: the file; a name ending in `.gz` is unpacked.
  """
  place = None
  for number, line in enumerate(_byte_lines(path), start=1):
    if not line.strip():
      continue
    place = f"{path}:{number}"
    try:
      row = _parsed(line)
    except (ValueError, RecursionError) as error:  # Also bad UTF-8, and depth.
      yield place, ValueError(f"{place}: not JSON ({error}).")
    else:
      yield place, _object(row, place)
  if place is None:
    raise ValueError(f"{path}: no rows.")


def _placed_items(
  path: pathlib.Path,
) -> Iterator[tuple[str, Row | ValueError]]:
  """Yields the rows of a .json file, see `load_placed_rows`."""
  lines = list(_byte_lines(path))
  try:
    rows = _parsed(b"".join(lines))
  except (ValueError, RecursionError) as error:
    # Others call a file of JSON lines so.
    if lines and lines[0].strip().endswith(b"}"):
      yield from placed_lines(path)
      return
    raise ValueError(f"{path}: not JSON ({error}).") from error
  if not isinstance(rows, list):
    inner = rows if isinstance(rows, dict) else {}
    lists = [shorten(name) for name, x in inner.items() if isinstance(x, list)]
    hint = f", such as what it has under {lists[0]}" if lists else ""
    raise ValueError(f"{path}: expected a list of JSON objects{hint}.")
  if not rows:
    raise ValueError(f"{path}: no rows.")
  for i, row in enumerate(rows):
    yield f"{path}, row {i}", _object(row, f"{path}, row {i}")


def _placed_cells(
  path: pathlib.Path,
) -> Iterator[tuple[str, Row | ValueError]]:
  """Yields the rows of a .csv file, see `load_placed_rows`."""
  csv.field_size_limit(sys.maxsize)  # Of a cell; a reply may be long.
  number = None
  try:
    with io.TextIOWrapper(_opened(path), "utf-8-sig", newline="") as file:
      rows = csv.DictReader(file, strict=True)
      _check_columns(rows.fieldnames or (), path)
      for number, row in enumerate(rows):
        place = f"{path}, row {number}"
        if None in row:
          yield place, ValueError(f"{place}: more cells than columns.")
          continue
        # An empty cell is one that is missing.
        cells = {name: _cell(name, x) for name, x in row.items() if x}
        yield place, cells
  except (gzip.BadGzipFile, EOFError, zlib.error) as error:
    raise ValueError(f"{path}: not a gzip file ({error}).") from error
  except (csv.Error, UnicodeDecodeError) as error:
    raise ValueError(f"{path}: not a .csv file in UTF-8 ({error}).") from error
  if number is None:
    raise ValueError(f"{path}: no rows.")


def _check_columns(names: Sequence[str], path: pathlib.Path) -> None:
  """Raises for a header of which a part would be passed over."""
  # Without a name are the empty columns that spreadsheets leave at the end.
  named = list(filter(None, names))
  twice = [name for name in dict.fromkeys(named) if named.count(name) > 1]
  if twice:
    raise ValueError(f"{path}: two columns are called {shorten(twice[0])}.")
  for sign, what in ((";", "semicolons"), ("\t", "tabs")):
    if len(names) == 1 and sign in names[0]:
      raise ValueError(
        f"{path}: its cells are separated by {what}, and must be by commas."
      )


def _parsed(content: bytes) -> Any:
  """Reads JSON; a name that stands twice in an object is no JSON."""
  return json.loads(content.decode("utf-8"), object_pairs_hook=_unambiguous)


def _unambiguous(pairs: list[tuple[str, Any]]) -> Row:
  found = dict(pairs)
  if len(found) < len(pairs):
    for name, value in pairs:
      if found[name] is not value and found[name] != value:
        raise ValueError(f'"{name}" stands twice in one object')
  return found


def _cell(name: str, text: str) -> Any:
  """Returns what a cell of a .csv file stands for."""
  is_number = name in _NUMBERS or name.endswith(("_score", "_reward"))
  if is_number or name.startswith(("score_", "reward_")):
    lower = text.strip().lower()
    if lower in ("true", "false"):
      return lower == "true"
    try:
      return int(text) if text.strip().isdecimal() else float(text)
    except ValueError:
      return text
  if name in _LISTS and text.lstrip().startswith("["):
    try:
      found = json.loads(text)
    except (ValueError, RecursionError):
      return text
    # A prompt may be about lists.
    is_text = name in ("prompt", "completion", "chosen", "rejected")
    is_messages = found and all(isinstance(item, dict) for item in found)
    return text if is_text and not is_messages else found
  return text


def _placed_records(
  path: pathlib.Path,
) -> Iterator[tuple[str, Row | ValueError]]:
  """Yields the rows of a .parquet file, see `load_placed_rows`."""
  try:
    from pyarrow import parquet
  except ImportError as error:
    raise ValueError(
      f"{path}: a .parquet file is read by pyarrow, which is not installed "
      f"({first_line(error)}): pip install pyarrow."
    ) from error
  number = -1
  try:
    with parquet.ParquetFile(path) as file:
      for part in file.iter_batches(batch_size=1024):
        for row in part.to_pylist():
          number += 1
          place = f"{path}, row {number}"
          yield place, _decoded(row, place)
  except Exception as error:  # pyarrow raises a dozen types.
    raise ValueError(
      f"{path}: not a .parquet file that pyarrow reads ({first_line(error)})."
    ) from error
  if number < 0:
    raise ValueError(f"{path}: no rows.")


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
    yield place, _decoded(source[i], place)


def _hub_library():
  """Imports `datasets`, or says how to get it."""
  try:
    import datasets
  except ImportError as error:
    raise ValueError(
      "Data of the hub is read by the package datasets, which is not "
      f"installed ({first_line(error)}): pip install datasets, or save the "
      "rows as .jsonl."
    ) from error
  return datasets


def _placed_hub(
  name: str, split: str, data_dir: str | os.PathLike | None, streaming: bool
) -> Iterator[tuple[str, Row | ValueError]]:
  """Yields the rows of a data set of the hub, see `load_placed_rows`."""
  datasets = _hub_library()
  source, _, revision = name.partition("@")
  source, _, configuration = source.partition(":")
  folder = pathlib.Path(data_dir or "") / source
  try:
    rows = datasets.load_dataset(
      str(folder) if folder.is_dir() else source,
      configuration or None,
      split=split,
      revision=revision or None,
      streaming=streaming,
    )
  except Exception as error:  # It raises what its parts raise.
    raise ValueError(
      f'"hub:{name}" has no split {split!r} that datasets can load '
      f"({type(error).__name__}: {first_line(error)})."
    ) from error
  yield from _placed_dataset(rows, f"hub:{name}")


def _placed_saved(
  path: pathlib.Path, split: str
) -> Iterator[tuple[str, Row | ValueError]]:
  """Yields the rows of a folder that `datasets` has saved."""
  datasets = _hub_library()
  try:
    rows = datasets.load_from_disk(str(path))
  except Exception as error:  # As above.
    raise ValueError(
      f"{path}: datasets cannot load it ({first_line(error)})."
    ) from error
  if isinstance(rows, dict):
    if split not in rows:
      raise ValueError(
        f"{path}: no split {split!r}; there are {', '.join(sorted(rows))}."
      )
    rows = rows[split]
  yield from _placed_dataset(rows, str(path))


def _placed_dataset(rows, name: str) -> Iterator[tuple[str, Row | ValueError]]:
  """Yields the rows of a data set of `datasets`, which are left on the disk."""
  place = None
  for i, row in enumerate(rows):
    place = f"{name}, row {i}"
    yield place, _decoded(row, place)
  if place is None:
    raise ValueError(f"{name}: no rows.")


def _decoded(row: Mapping[str, Any], place: str) -> Row | ValueError:
  """Returns a row as JSON would hold it, or what is wrong with it."""
  try:
    return _plain(row)
  except UnicodeDecodeError as error:
    return ValueError(f"{place}: not UTF-8 ({error}).")


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
  try:
    text = repr(value)
  except Exception:  # A number of thousands of digits, or an object of others.
    text = f"a {type(value).__name__} that cannot be shown"
  return text if len(text) <= limit else f"{text[: limit - 3]}..."


def first_line(error: Exception) -> str:
  """Returns the first line of an error's message, without its full stop."""
  return (str(error).splitlines() or [""])[0].rstrip(".")
