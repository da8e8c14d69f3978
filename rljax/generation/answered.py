"""Files of responses that were paid for, also where their scorer has failed."""

import os
from collections.abc import Sequence
from typing import Any

import jax

from rljax.text import files

Row = dict[str, Any]


def so_far(path: str | os.PathLike[str]) -> list[Row]:
  """Reads the rows of a file that may be absent, or damaged.

  Behind the first row that cannot be read, none counts: the file as it was is
  kept under another name, which is printed.
  """
  if not os.path.exists(path):
    return []
  files.append_jsonl(path, [])  # Cuts off what a killed writer left behind.
  if not os.path.getsize(path):
    return []
  rows: list[Row] = []
  for _, row in files.placed_lines(path):
    if isinstance(row, ValueError):
      aside = files.keep_aside(path)
      print(f"{row} The file as it was is now {aside}.", flush=True)
      files.write_jsonl(path, rows)
      break
    rows.append(row)
  return rows


def keep(
  path: str | os.PathLike[str], rows: Sequence[Row], error: Exception
) -> None:
  """Files what was scored before an error, and lets the error tell of it.

  Args:
    path: of the file, which is replaced.
    rows: all that are scored.
    error: which is raised on.
  """
  if jax.process_count() > 1:  # The others do not know of it.
    return
  files.write_jsonl(path, rows)
  if error.args:
    error.args = (
      f"{error.args[0]} {len(rows)} responses with their scores are in {path}: "
      "the same command goes on behind them.",
    )
