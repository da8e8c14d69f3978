"""What a run leaves for a person to look at, while it goes on and after.

  metrics.jsonl   one JSON object a line: {"step": 3, "reward/mean": 0.5, ...}
  metrics.csv     the same as a table
  samples.jsonl   prompts, responses and scores
  histograms.jsonl  how often each answer was given
  skipped.txt     the rows of the data that could not be used, and why
  tensorboard/    the same curves for TensorBoard
  curves.png      a picture of them, redrawn as the run goes on
  summary.json    the numbers of the end

and one line in the terminal. Only the first process writes; in the others
every method does nothing.

What a run must keep (rows, tables, the summary) raises where it cannot be
written; what is only for looking (TensorBoard, Weights & Biases, the picture)
is left out with a note.
"""

import csv
import io
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from rljax.storage import paths
from rljax.storage import rows as rows_lib
from rljax.training import trackers

_SECONDS_BETWEEN_LINES = 5.0
# Files of rows by step, which a resumed run goes on with.
_FILES = (
  *("metrics.jsonl", "samples.jsonl", "histograms.jsonl"),
  "evaluations.jsonl",
)


class Logs:
  """Writes the metrics and samples of one run. Use it in a `with` block.

  Attributes:
    num_rows: file -> rows that are in it, in the first process.
    is_complete: whether no row was missing when the files were opened.
  """

  def __init__(
    self,
    workdir: str | os.PathLike[str],
    *,
    total_steps: int,
    first_step: int = 0,
    columns: Sequence[str] | Mapping[str, str] = (),
    wandb_project: str | None = None,
    tensorboard: bool = True,
    about: trackers.About | None = None,
    num_rows: Mapping[str, int] | None = None,
    repeats: int | None = None,
    keep: bool = False,
  ):
    """Opens the files; a run that is resumed goes on in them.

    Rows of `first_step` and later, left by a run that was killed after its
    last checkpoint, are dropped: they are about to be computed again. So is a
    last line that was cut short. Where more is lost, `rows.reopen` keeps the
    old file beside, and says so.

    Args:
      workdir: folder of the run.
      total_steps: number of steps of the whole run.
      first_step: the step that this start begins with.
      columns: metrics that the progress line shows, or a mapping from metrics
        to shorter names for them.
      wandb_project: Weights & Biases project to log to as well; None for none.
      tensorboard: whether to write TensorBoard files.
      about: name, tags and flags of the run, for trackers and pictures.
      num_rows: of `num_rows` when the checkpoint of `first_step` was saved, by
        which rows that are missing are told.
      repeats: steps that a kill makes a run repeat, at most; see `rows.reopen`.
      keep: see `rows.reopen`.

    Raises:
      ValueError: if wandb is asked for and not installed.
      DiskError: if a file cannot be written.
    """
    self._on = jax.process_index() == 0
    self._workdir = pathlib.Path(workdir)
    self._metrics_path = self._workdir / "metrics.jsonl"
    self._num_not_finite = {}
    self._curves = None
    self.num_rows, self.is_complete = {}, True
    if not self._on:
      return
    self._workdir.mkdir(parents=True, exist_ok=True)
    if not isinstance(columns, Mapping):
      columns = {name: name for name in columns}
    self._progress = _progress(total_steps, first_step, columns)
    self._trackers = []
    if wandb_project:
      self._trackers.append(
        trackers.wandb(wandb_project, self._workdir, self.note, about)
      )
    known = dict(num_rows or {})
    found = {
      name: rows_lib.reopen(
        self._workdir / name,
        first_step,
        self.note,
        num_rows=known.get(name),
        repeats=repeats,
        keep=keep,
      )
      for name in _FILES
    }
    self.num_rows = {name: len(rows) for name, rows in found.items()}
    self.is_complete = all(
      number >= known.get(name, 0) for name, number in self.num_rows.items()
    )
    rows = found["metrics.jsonl"]
    self._csv_names = ["step"]
    for row in rows:
      self._csv_names += [name for name in row if name not in self._csv_names]
    # The table is made from the lines, which are written first: a line that
    # was cut short shows, a number in a table that was does not.
    table = self._workdir / "metrics.csv"
    rows_lib.keep_table(table, rows, first_step, self.note)
    self._csv = None
    self._rewrite_csv(rows)
    self._files = {
      name: rows_lib.Appender(self._workdir / name) for name in _FILES[:2]
    }
    if tensorboard:
      folder = self._workdir / "tensorboard"
      started = trackers.tensorboard(folder, first_step, self.note, about)
      self._trackers += filter(None, [started])

  def write(self, step: int, metrics: Mapping[str, Any]) -> None:
    """Records the metrics of a step and moves the progress line to it.

    A value that is not finite is null in `metrics.jsonl` and said once.

    Args:
      step: counted from 0, as the loop counts.
      metrics: name to number, or to an array with one element.

    Raises:
      ValueError: if a value is not a number, naming it.
    """
    if not self._on:
      return
    step = int(step)
    values = {name: _number(name, value) for name, value in metrics.items()}
    row = {"step": step}
    for name, value in values.items():
      row[name] = value if math.isfinite(value) else None
      if row[name] is None:
        if name not in self._num_not_finite:
          self.note(f"step {step}: {name} is {value}; written as null.")
        self._num_not_finite[name] = self._num_not_finite.get(name, 0) + 1
    self._add("metrics.jsonl", [row])
    self._write_csv(row)
    for tracker in self._trackers:
      tracker.write(step, values)
    self._progress.update(step, values)
    if self._curves is not None:
      self._curves.changed.set()

  def samples(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
    """Records samples, each a mapping such as prompt, response and score."""
    if not self._on:
      return
    rows = [strict({"step": int(step), **row}) for row in rows]
    self._add("samples.jsonl", rows)
    if rows:
      for tracker in self._trackers:
        tracker.write(int(step), trackers.Samples(rows))

  def evaluations(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
    """Records what an evaluation said of each held-out prompt."""
    if self._on:
      rows = [strict({"step": int(step), **row}) for row in rows]
      self._add("evaluations.jsonl", rows)

  def histograms(self, step: int, counts: Mapping[str, Mapping]) -> None:
    """Records histograms: name to a mapping from value to count."""
    if not self._on:
      return
    row = {"step": int(step)}
    for name, histogram in counts.items():
      row[name] = {str(value): int(n) for value, n in histogram.items()}
    self._add("histograms.jsonl", [row])

  def skipped(self, messages: Sequence[str]) -> None:
    """Names rows that were left out, in `skipped.txt`, and counts them."""
    if not self._on or not messages:
      return
    path = self._workdir / "skipped.txt"
    paths.write_whole(path, "".join(f"{message}\n" for message in messages))
    self.note(f"{len(messages)} rows were left out: {path} names them.")

  def note(self, text: str) -> None:
    """Prints a line above the progress line."""
    if self._on:
      self._progress.note(text)

  def curves(
    self,
    render: Callable[[pathlib.Path, pathlib.Path], None],
    *,
    every_seconds: float = 10.0,
  ) -> None:
    """Keeps `curves.png` up to date from a thread of its own.

    It is redrawn only if something was written, seldom enough to cost a small
    part of a core's time, and once more by `close`.

    Args:
      render: draws the file at the second path from the metrics at the first,
        as `functools.partial(curves.curves, panels=...)` does.
      every_seconds: least time between two pictures.
    """
    if self._on and self._curves is None:
      self._curves = trackers.Curves(
        lambda: render(self._metrics_path, self._workdir / "curves.png"),
        every_seconds,
        self.note,
      )

  def summary(
    self,
    values: Mapping[str, Any],
    title: str = "Summary",
    file: str = "summary.json",
  ) -> None:
    """Prints the last table of a run and writes it to a file.

    Args:
      values: name to number or text, or name to such a mapping: then each name
        is a row and the keys of the mappings are the columns.
      title: stands above the table.
      file: name in the workdir.
    """
    if not self._on:
      return
    path = self._workdir / file
    text = json.dumps(strict(dict(values)), indent=2, ensure_ascii=False)
    paths.write_whole(path, text + "\n")
    self._progress.stop()
    print_table(values, title)

  def close(self) -> None:
    """Draws the last picture and closes the files."""
    if not self._on:
      return
    self._progress.stop()
    for name, count in self._num_not_finite.items():
      if count > 1:
        self.note(f"{name} was not finite in {count} rows.")
    if self._curves is not None:
      self._curves.close()
    for file in (*self._files.values(), self._csv):
      file.close()
    for tracker in self._trackers:
      tracker.close()
    self._on = False

  def __enter__(self):
    return self

  def __exit__(self, *error):
    self.close()

  def _add(self, name, rows):
    """Appends rows to a file, all of them or none."""
    if name not in self._files:  # Few runs have it.
      self._files[name] = rows_lib.Appender(self._workdir / name)
    lines = [
      json.dumps(row, allow_nan=False, ensure_ascii=name == "metrics.jsonl")
      for row in rows
    ]
    self._files[name].write("".join(line + "\n" for line in lines))
    self.num_rows[name] += len(lines)

  def _write_csv(self, row):
    new = [name for name in row if name not in self._csv_names]
    if new:
      self._csv_names += new
      self._rewrite_csv(read_rows(self._workdir))
    else:
      self._csv.write(self._csv_lines([row]))

  def _rewrite_csv(self, rows):
    """Writes the table anew, whole or not at all, and leaves it open."""
    if self._csv is not None:
      self._csv.close()
    path = self._workdir / "metrics.csv"
    names = self._csv_lines([{name: name for name in self._csv_names}])
    paths.write_whole(path, names + self._csv_lines(rows))
    self._csv = rows_lib.Appender(path)

  def _csv_lines(self, rows):
    """Returns rows as lines of the table."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, self._csv_names)
    writer.writerows(_csv_row(row) for row in rows)
    return text.getvalue()


def read_rows(workdir: str | os.PathLike[str]) -> list[dict[str, Any]]:
  """Returns the rows of a run's `metrics.jsonl` that can be read, by step."""
  return rows_lib.readable(pathlib.Path(workdir, "metrics.jsonl"))


class _Lines:
  """Progress as plain lines, for a log file."""

  def __init__(self, total_steps, first_step, columns):
    self._total_steps = total_steps
    self._columns = columns
    self._latest = {}
    self._timer = _Timer(total_steps)
    self._printed = -math.inf
    self._step = first_step - 1
    self._pending = False

  def update(self, step, values):
    self._latest.update(values)
    self._timer.update(step)
    self._step = step
    self._pending = True
    if time.monotonic() - self._printed >= _SECONDS_BETWEEN_LINES:
      self._print()

  def note(self, text):
    print(text, flush=True)

  def stop(self):
    if self._pending:
      self._print()

  def _print(self):
    self._printed = time.monotonic()
    self._pending = False
    done = min(self._step + 1, self._total_steps)
    shown = _shown_columns(self._columns, self._latest)
    print(
      f"step {done}/{self._total_steps}  "
      + "".join(f"{label} {value}  " for label, value in shown)
      + f"left {self._timer.left()}",
      flush=True,
    )


class _Bar:
  """Progress as one line that rich keeps at the foot of a terminal."""

  def __init__(self, total_steps, first_step, columns):
    from rich import progress

    self._columns = columns
    self._latest = {}
    self._timer = _Timer(total_steps)
    self._total_steps = total_steps
    self._bar = progress.Progress(
      progress.TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
      progress.BarColumn(bar_width=20),
      progress.TextColumn("{task.fields[metrics]}", markup=False),
      progress.TextColumn("left {task.fields[left]}"),
      refresh_per_second=2,
    )
    self._task = self._bar.add_task(
      "", total=total_steps, completed=first_step, metrics="", left="?"
    )
    self._bar.start()

  def update(self, step, values):
    self._latest.update(values)
    self._timer.update(step)
    shown = _shown_columns(self._columns, self._latest)
    self._bar.update(
      self._task,
      completed=min(step + 1, self._total_steps),
      metrics="  ".join(f"{label} {value}" for label, value in shown),
      left=self._timer.left(),
    )

  def note(self, text):
    self._bar.console.print(text, markup=False, highlight=False)

  def stop(self):
    self._bar.stop()


class _Timer:
  """Time left, from the pace since the first step (which compiles)."""

  def __init__(self, total_steps):
    self._total_steps = total_steps
    self._first = None
    self._step = 0
    self._now = 0.0

  def update(self, step):
    self._step = step
    self._now = time.monotonic()
    if self._first is None:
      self._first = (step, self._now)

  def left(self):
    if self._first is None or self._step <= self._first[0]:
      return "?"
    pace = (self._now - self._first[1]) / (self._step - self._first[0])
    seconds = round(pace * max(self._total_steps - self._step - 1, 0))
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
      return f"{hours}:{minutes:02d}:{seconds:02d}"
    return f"{minutes}:{seconds:02d}"


def _progress(total_steps, first_step, columns):
  kind = _Bar if sys.stdout.isatty() else _Lines
  return kind(total_steps, first_step, columns)


def _shown_columns(columns, latest):
  return [
    (label, _short(latest[name]))
    for name, label in columns.items()
    if name in latest
  ]


def _short(value):
  """A number in few characters."""
  if isinstance(value, str):
    return value
  if not math.isfinite(value):
    return str(value)
  for least, unit, suffix in (
    (1e9, 1e9, "G"),
    (1e6, 1e6, "M"),
    (1e4, 1e3, "k"),
  ):
    if abs(value) >= least:
      return f"{value / unit:.3g}{suffix}"
  return f"{value:d}" if isinstance(value, int) else f"{value:.3g}"


def _number(name, value):
  """A Python number of a metric."""
  array = np.asarray(value)
  is_number = array.dtype.kind in "biuf" or array.dtype.name == "bfloat16"
  if array.size != 1 or not is_number:
    raise ValueError(
      f'metric "{name}" must be one number, got '
      f"{type(value).__name__} of shape {array.shape} and dtype {array.dtype}."
    )
  if array.dtype.kind in "biu":
    return int(array.item())
  return float(array.item())


def strict(value: Any) -> Any:
  """Returns a value as strict JSON takes it: no arrays, NaN or infinity."""
  if isinstance(value, Mapping):
    return {str(name): strict(item) for name, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [strict(item) for item in value]
  if isinstance(value, (np.ndarray, np.generic, jax.Array)):
    return strict(np.asarray(value).tolist())
  if isinstance(value, float) and not math.isfinite(value):
    return None
  if isinstance(value, os.PathLike):
    return os.fspath(value)
  return value


def _csv_row(row):
  return {
    name: "nan" if value is None else value for name, value in row.items()
  }


def print_table(values: Mapping[str, Any], title: str) -> None:
  """Prints a table, see `Logs.summary`, in parts that fit the terminal."""
  from rich import console, table, text

  terminal = console.Console()
  if not terminal.is_terminal:  # A file has room for whole words.
    terminal = console.Console(width=120)
  columns = []
  for value in values.values():
    if isinstance(value, Mapping):
      columns += [name for name in value if name not in columns]
  rows = {
    str(name): [_cell(value.get(column, "")) for column in columns]
    if isinstance(value, Mapping)
    else [_cell(value)]
    for name, value in values.items()
  }
  # Columns that would not fit side by side go into tables below each other.
  for part in _fitting(columns or [""], rows, terminal.width):
    shown = table.Table(title=title, title_justify="left")
    shown.add_column("", overflow="fold")
    for i in part:
      shown.add_column(
        text.Text(str(columns[i]) if columns else ""),
        justify="right" if columns else "left",
        overflow="fold",
      )
    for name, cells in rows.items():
      found = [cells[i] if i < len(cells) else "" for i in part]
      shown.add_row(*map(text.Text, (name, *found)))
    terminal.print(shown)
    title = None


def _fitting(columns, rows, width):
  """Lists of column numbers whose tables are no wider than `width`."""
  border = 3
  left = max(map(len, rows), default=0) + border + 1
  parts, used = [[]], left
  for i, column in enumerate(columns):
    cells = [cells[i] for cells in rows.values() if i < len(cells)]
    needed = max(map(len, (str(column), *cells))) + border
    if parts[-1] and used + needed > width:
      parts.append([])
      used = left
    parts[-1].append(i)
    used += needed
  return parts


def _cell(value):
  if isinstance(value, (np.ndarray, np.generic, jax.Array)):
    value = np.asarray(value).tolist()
  if isinstance(value, float):
    return f"{value:.4g}"
  return str(value)
