"""Files of rows by step, which a run appends to and reads again.

What a resumed run finds there may be cut, garbled or gone. Rows that can be
read are kept, what is missing is said, and no file is changed beyond what a
kill explains without a copy of it beside: `<name>.old1`, and so on.
"""

import contextlib
import csv
import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from rljax.storage import paths

Row = dict[str, Any]

# What scores are kept in until the work that asked for them is done.
SCORES = "scores.jsonl"
_BOM = b"\xef\xbb\xbf"


class Appender:
  """Adds lines to a file, each whole or not at all, and at once."""

  def __init__(self, path: str | os.PathLike[str]):
    """Opens the file, which is made if it is missing.

    Raises:
      DiskError: if it cannot be.
    """
    self._path = pathlib.Path(path)
    with paths.writing(self._path):
      # Unbuffered: what could not be written is not tried again by `close`.
      self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115

  def write(self, text: str) -> None:
    """Writes lines; a file that was deleted meanwhile is made again.

    Raises:
      DiskError: if they cannot be written; the file is then as it was.
    """
    content = text.encode(*paths.TEXT)
    with paths.writing(self._path):
      if not self._is_there():
        self._file.close()
        self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115
      size = os.fstat(self._file.fileno()).st_size
      try:
        while content:
          content = content[self._file.write(content) :]
      except OSError:
        # A device has no size, and a disk may be gone.
        with contextlib.suppress(OSError):
          self._file.truncate(size)
        raise

  def close(self) -> None:
    """Closes the file; a second call does nothing."""
    self._file.close()

  def _is_there(self):
    """Tells whether the path still leads to the open file."""
    try:
      return os.path.samestat(
        os.stat(self._path), os.fstat(self._file.fileno())
      )
    except FileNotFoundError:
      return False


class _Found(NamedTuple):
  """What is in a file: lines by step, and what is wrong with it."""

  rows: list[tuple[Row, bytes]]
  num_bad: int
  has_torn: bool  # Half a line at its end, as a kill leaves it.
  is_sorted: bool
  is_plain: bool  # Nothing but these lines is there.


def readable(path: str | os.PathLike[str]) -> list[Row]:
  """Reads the rows of a file that can be read, by step; none if it is gone."""
  path = pathlib.Path(path)
  if not path.is_file():
    return []
  return [row for row, _ in _read(path.read_bytes()).rows]


def reopen(
  path: str | os.PathLike[str],
  first_step: int,
  note: Callable[[str], None],
  *,
  num_rows: int | None = None,
  repeats: int | None = None,
  keep: bool = False,
) -> list[Row]:
  """Drops the rows of `first_step` and later, which are computed again.

  Lines that cannot be read are left out, rows are put in order, and the file
  is written anew if it differs. It is kept beside, under another name, if that
  loses more than half a line or the rows that are repeated.

  Args:
    path: file of JSON objects with a "step"; it may be absent.
    first_step: that the run goes on with.
    note: is told what was found.
    num_rows: rows before `first_step` that the run had written; None if nobody
      knows.
    repeats: steps that a kill makes a run repeat, at most; None for any number.
    keep: whether to keep the file beside in any case, if a row is dropped.

  Returns:
    The rows that stay.

  Raises:
    DiskError: if the file cannot be written anew; the old one then stays.
  """
  path = pathlib.Path(path)
  name = path.name
  if not path.is_file():  # Gone, or none that could be read to its end.
    if num_rows:
      note(
        f"{name}: all {num_rows} rows that this run had written are missing."
      )
    return []
  found = _read(path.read_bytes())
  kept = [(row, line) for row, line in found.rows if row["step"] < first_step]
  late = [row["step"] for row, _ in found.rows if row["step"] >= first_step]
  num_missing = max(0, (num_rows or 0) - len(kept))
  if num_missing:
    note(
      f"{name}: {num_missing} of {num_rows} rows that this run had written are "
      "missing."
    )
  if found.has_torn:
    note(f"{name}: dropped a last line that was cut short.")
  if found.num_bad:
    note(f"{name}: dropped {found.num_bad} lines that cannot be read.")
  if not found.is_sorted:
    note(f"{name}: the rows were out of order, and are sorted by their steps.")
  if late:
    note(f"{name}: dropped {len(late)} rows of step {first_step} and later.")
  if late or found.has_torn or not (found.is_plain and found.is_sorted):
    is_long = repeats is not None and late and max(late) - first_step >= repeats
    loses = found.num_bad or num_missing or not found.is_sorted
    if loses or is_long or (keep and late):
      note(f"{name}: the file as it was is now {paths.keep_copy(path).name}.")
    paths.write_whole(path, b"".join(line + b"\n" for _, line in kept))
  return [row for row, _ in kept]


def keep_table(
  path: str | os.PathLike[str],
  rows: Sequence[Row],
  first_step: int,
  note: Callable[[str], None],
) -> None:
  """Keeps a table beside, if it has rows before a step that `rows` lack.

  Args:
    path: of a CSV file with a column "step", about to be written anew; it may
      be absent.
    rows: what it is about to hold.
    first_step: rows of this step and later do not count.
    note: is told what the file is called now.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    return
  known = {row["step"] for row in rows}
  steps = set()
  text = path.read_text(encoding="utf-8", errors="replace").replace("\0", "")
  for row in csv.DictReader(text.splitlines()):
    try:
      steps.add(int(row.get("step") or ""))
    except ValueError:
      continue
  num_lost = sum(step < first_step and step not in known for step in steps)
  if num_lost:
    note(
      f"{path.name} has {num_lost} steps that are not in the rows; it is now "
      f"{paths.keep_copy(path).name}."
    )


def _read(content: bytes) -> _Found:
  """Reads lines, however damaged."""
  is_plain = not content.startswith(_BOM)
  *lines, last = content.removeprefix(_BOM).split(b"\n")
  rows, num_bad, has_torn = [], 0, False
  for line in lines:
    row = _row(line)
    if row is not None:
      rows.append((row, line))
    else:
      is_plain = False
      num_bad += bool(line.strip())
  if last.strip():
    row = _row(last)
    is_plain, has_torn = False, row is None
    if row is not None:  # Only its line feed is missing.
      rows.append((row, last))
  steps = [row["step"] for row, _ in rows]
  is_sorted = steps == sorted(steps)
  if not is_sorted:
    rows.sort(key=lambda pair: pair[0]["step"])
  return _Found(rows, num_bad, has_torn, is_sorted, is_plain)


def _row(line: bytes) -> Row | None:
  """Reads one line; None if it is no object with a step."""
  try:
    row = json.loads(line.decode("utf-8"))
  except (ValueError, RecursionError):
    return None
  if not isinstance(row, dict) or type(row.get("step")) is not int:
    return None
  return row
