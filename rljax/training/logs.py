"""What a run leaves for a person to look at, while it goes on and after.

  metrics.jsonl   one JSON object a line: {"step": 3, "reward/mean": 0.5, ...}
  metrics.csv     the same as a table
  samples.jsonl   prompts, responses and scores
  evaluations.jsonl  what each evaluation said of each held-out prompt
  histograms.jsonl  how often each answer was given
  skipped.txt     the rows of the data that could not be used, and why
  tensorboard/    the same curves for TensorBoard
  curves.png      a picture of them, redrawn as the run goes on
  summary.json    the numbers of the end

and one line in the terminal. Only the first process writes; in the others
every method does nothing.
"""

import csv
import json
import math
import os
import pathlib
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from rljax.storage import paths

_SECONDS_BETWEEN_LINES = 5.0
# Columns of the tables of samples that wandb and TensorBoard show, and the rows
# of TensorBoard's.
_TABLE = ("prompt", "response", "reward", "parts")
_MOST_ROWS = 8
# The picture may take one part in this many of a core's time.
_SHARE_OF_DRAWING = 20


class Logs:
  """Writes the metrics and samples of one run. Use it in a `with` block."""

  def __init__(
    self,
    workdir: str | os.PathLike[str],
    *,
    total_steps: int,
    first_step: int = 0,
    columns: Sequence[str] | Mapping[str, str] = (),
    wandb_project: str | None = None,
    tensorboard: bool = True,
    name: str = "",
    tags: Sequence[str] = (),
    flags: Mapping[str, Any] | None = None,
  ):
    """Opens the files; a run that is resumed goes on in them.

    Rows of `first_step` and later, left by a run that was killed after its
    last checkpoint, are dropped: they are about to be computed again. So is a
    last line that was cut short.

    Args:
      workdir: folder of the run.
      total_steps: number of steps of the whole run.
      first_step: the step that this start begins with.
      columns: metrics that the progress line shows, or a mapping from metrics
        to shorter names for them.
      wandb_project: Weights & Biases project to log to as well; None for none.
      tensorboard: whether to write TensorBoard files.
      name: of the run, for wandb, TensorBoard and pictures; "": that of the
        folder.
      tags: of the run, likewise.
      flags: in force, likewise.

    Raises:
      ValueError: if wandb is asked for and not installed.
    """
    self._on = jax.process_index() == 0
    self._workdir = pathlib.Path(workdir)
    self.name = name or self._workdir.resolve().name
    self._about = {"tags": list(tags), "flags": dict(flags or {})}
    self._metrics_path = self._workdir / "metrics.jsonl"
    self._num_not_finite = {}
    self._curves = None
    if not self._on:
      return
    self._workdir.mkdir(parents=True, exist_ok=True)
    self._wandb = self._start_wandb(wandb_project) if wandb_project else None
    if not isinstance(columns, Mapping):
      columns = {name: name for name in columns}
    self._progress = _progress(total_steps, first_step, columns)

    rows = self._keep_before(self._metrics_path, first_step)
    self._keep_before(self._workdir / "samples.jsonl", first_step)
    for file in ("histograms.jsonl", "evaluations.jsonl"):
      self._keep_before(self._workdir / file, first_step)
    self._csv_names = ["step"]
    for row in rows:
      self._csv_names += [name for name in row if name not in self._csv_names]
    # The table is made from the lines, which are written first: a line that
    # was cut short shows, a number in a table that was does not.
    self._rewrite_csv(rows)
    self._jsonl = open(self._metrics_path, "a", encoding="utf-8")  # noqa: SIM115
    self._samples = open(  # noqa: SIM115
      self._workdir / "samples.jsonl", "a", encoding="utf-8"
    )
    self._tensorboard = (
      self._start_tensorboard(first_step) if tensorboard else None
    )

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
    self._jsonl.write(json.dumps(row, allow_nan=False) + "\n")
    self._jsonl.flush()
    self._write_csv(row)
    if self._tensorboard is not None:
      for name, value in values.items():
        if math.isfinite(value):  # Else it would complain each time.
          self._tensorboard.add_scalar(name, value, step)
    if self._wandb is not None:
      self._wandb.log(values, step=step)
    self._progress.update(step, values)
    if self._curves is not None:
      self._curves.changed.set()

  def samples(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
    """Records samples, each a mapping such as prompt, response and score."""
    if not self._on:
      return
    rows = [_strict({"step": int(step), **row}) for row in rows]
    for row in rows:
      line = json.dumps(row, allow_nan=False, ensure_ascii=False)
      self._samples.write(line + "\n")
    self._samples.flush()
    shown = [[_shown(row.get(name, "")) for name in _TABLE] for row in rows]
    if self._wandb is not None and rows:
      import wandb

      table = wandb.Table(columns=list(_TABLE), data=shown)
      self._wandb.log({"samples": table}, step=int(step))
    if self._tensorboard is not None and rows:
      text = _markdown(_TABLE, shown[:_MOST_ROWS])
      self._tensorboard.add_text("samples", text, int(step))

  def evaluations(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
    """Records what an evaluation said of each held-out prompt."""
    if not self._on:
      return
    path = self._workdir / "evaluations.jsonl"
    with open(path, "a", encoding="utf-8") as file:
      for row in rows:
        row = _strict({"step": int(step), **row})
        file.write(json.dumps(row, allow_nan=False, ensure_ascii=False) + "\n")

  def histograms(self, step: int, counts: Mapping[str, Mapping]) -> None:
    """Records histograms: name to a mapping from value to count."""
    if not self._on:
      return
    row = {"step": int(step)}
    for name, histogram in counts.items():
      row[name] = {str(value): int(n) for value, n in histogram.items()}
    path = self._workdir / "histograms.jsonl"
    with open(path, "a", encoding="utf-8") as file:
      file.write(json.dumps(row, ensure_ascii=False) + "\n")

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
      self._curves = _Curves(
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
    text = json.dumps(_strict(dict(values)), indent=2, ensure_ascii=False)
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
    self._jsonl.close()
    self._samples.close()
    self._csv.close()
    if self._tensorboard is not None:
      self._tensorboard.close()
    if self._wandb is not None:
      self._wandb.finish()
    self._on = False

  def __enter__(self):
    return self

  def __exit__(self, *error):
    self.close()

  def _keep_before(self, path, first_step):
    """Drops rows of `first_step` and later from a file; returns the rest."""
    if not path.exists():
      return []
    lines = path.read_bytes().split(b"\n")
    torn = lines.pop()
    rows, kept, num_bad, num_late = [], [], 0, 0
    for line in lines:
      try:
        row = json.loads(line)
        late = row["step"] >= first_step
      except (ValueError, KeyError, TypeError):
        num_bad += 1
        continue
      if late:
        num_late += 1
      else:
        rows.append(row)
        kept.append(line + b"\n")
    if torn:
      self.note(f"{path.name}: dropped a last line that was cut short.")
    if num_bad:
      self.note(f"{path.name}: dropped {num_bad} lines that cannot be read.")
    if num_late:
      self.note(
        f"{path.name}: dropped {num_late} rows of step {first_step} and later."
      )
    if torn or num_bad or num_late:
      paths.write_whole(path, b"".join(kept))
    return rows

  def _write_csv(self, row):
    new = [name for name in row if name not in self._csv_names]
    if new:
      self._csv.close()
      self._csv_names += new
      with open(self._metrics_path, encoding="utf-8") as file:
        self._rewrite_csv([json.loads(line) for line in file])
    else:
      self._csv_writer.writerow(_csv_row(row))
      self._csv.flush()

  def _rewrite_csv(self, rows):
    """Writes the table anew, whole or not at all, and leaves it open."""
    path = self._workdir / "metrics.csv"
    partial = path.with_name(".metrics.csv.partial")
    self._csv = open(partial, "w", newline="", encoding="utf-8")  # noqa: SIM115
    self._csv_writer = csv.DictWriter(self._csv, self._csv_names)
    self._csv_writer.writeheader()
    self._csv_writer.writerows(_csv_row(row) for row in rows)
    self._csv.flush()
    os.replace(partial, path)

  def _start_tensorboard(self, first_step):
    # tensorboardX imports torch where there is one: five seconds, for kinds of
    # plots that are not drawn here.
    hide_torch = "torch" not in sys.modules
    if hide_torch:
      sys.modules["torch"] = None
    try:
      import tensorboardX
    except ImportError:
      self.note("No TensorBoard files: tensorboardX is not installed.")
      return None
    finally:
      if hide_torch:
        del sys.modules["torch"]
    writer = tensorboardX.SummaryWriter(
      str(self._workdir / "tensorboard"), purge_step=first_step or None
    )
    if not first_step:
      flags = [[k, _shown(v)] for k, v in self._about["flags"].items()]
      writer.add_text("run", f"{self.name} {' '.join(self._about['tags'])}", 0)
      writer.add_text("flags", _markdown(("flag", "value"), flags), 0)
    return writer

  def _start_wandb(self, project):
    try:
      import wandb
    except ImportError as error:
      raise ValueError(
        "--wandb_project needs the package wandb, which is not installed."
      ) from error
    # The same name after a restart makes it the same run over there.
    path = self._workdir / "wandb_run"
    if not path.exists():
      path.write_text(uuid.uuid4().hex[:12])
    return wandb.init(
      project=project,
      id=path.read_text(),
      resume="allow",
      name=self.name,
      tags=self._about["tags"] or None,
      config=self._about["flags"],
      dir=str(self._workdir),
    )


def _shown(value):
  """A value as a cell of a table of samples or flags."""
  if isinstance(value, (int, float)) and not isinstance(value, bool):
    return value
  return value if isinstance(value, str) else json.dumps(value)


def _markdown(columns, rows):
  """A table in Markdown, as TensorBoard shows it."""
  cell = lambda x: str(x).replace("|", "\\|").replace("\n", "<br>")
  lines = [columns, ["---"] * len(columns), *rows]
  return "\n".join(f"| {' | '.join(map(cell, line))} |" for line in lines)


def read_rows(workdir: str | os.PathLike[str]) -> list[dict[str, Any]]:
  """Returns the rows of a run's `metrics.jsonl`, in their order."""
  path = pathlib.Path(workdir, "metrics.jsonl")
  with path.open(encoding="utf-8") as file:
    return [json.loads(line) for line in file]


class _Curves:
  """Redraws a picture in a thread, and once more at the end."""

  def __init__(self, draw, every_seconds, note):
    self.changed = threading.Event()
    self._draw = draw
    self._every_seconds = every_seconds
    self._note = note
    self._failed = False
    self._stop = threading.Event()
    self._thread = threading.Thread(target=self._run, daemon=True)
    self._thread.start()

  def close(self):
    self._stop.set()
    self.changed.set()
    self._thread.join()
    self._redraw()

  def _run(self):
    while True:
      self.changed.wait()
      if self._stop.is_set():
        return
      self.changed.clear()
      started = time.monotonic()
      self._redraw()
      took = time.monotonic() - started
      if self._stop.wait(max(self._every_seconds, _SHARE_OF_DRAWING * took)):
        return

  def _redraw(self):
    # A picture is not worth a run: say what went wrong, once, and go on.
    try:
      self._draw()
    except Exception as error:
      if not self._failed:
        self._note(f"curves.png could not be drawn: {error!r}")
      self._failed = True


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


def _strict(value):
  """The value as strict JSON takes it: without arrays, NaN and infinity."""
  if isinstance(value, Mapping):
    return {str(name): _strict(item) for name, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [_strict(item) for item in value]
  if isinstance(value, (np.ndarray, np.generic, jax.Array)):
    return _strict(np.asarray(value).tolist())
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
