"""What is only for looking at: it never stops a run, nor keeps it waiting.

TensorBoard, Weights & Biases and pictures get what a run logs from threads of
their own. Where one fails, or does not answer, that is said once, and the run
goes on without it.
"""

import importlib
import json
import math
import pathlib
import queue
import sys
import threading
import time
import types
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

Note = Callable[[str], None]

_MOST_SAMPLES = 8  # Rows of a table in TensorBoard.
_MOST_WAITING = 10_000  # Rows that a tracker may be behind.
_SECONDS_TO_CLOSE = 15.0
# The picture may take one part in this many of a core's time.
_SHARE_OF_DRAWING = 20


class About(NamedTuple):
  """What a run is, for people.

  Attributes:
    name: of the run; "": that of its folder.
    tags: of the run.
    flags: in force, name -> value.
  """

  name: str = ""
  tags: Sequence[str] = ()
  flags: Mapping[str, Any] = types.MappingProxyType({})

  def named(self, workdir: pathlib.Path) -> str:
    """Returns the name of the run in a folder."""
    return self.name or workdir.resolve().name


class Samples(NamedTuple):
  """Rows of `samples.jsonl`, to be shown as a table."""

  rows: Sequence[Mapping[str, Any]]

  COLUMNS = ("prompt", "response", "reward", "parts")

  def cells(self) -> list[list[Any]]:
    """Returns the cells of the table, numbers and texts."""
    return [[_cell(row.get(x, "")) for x in self.COLUMNS] for row in self.rows]


def _cell(value):
  if isinstance(value, str) or type(value) in (int, float):
    return value
  return json.dumps(value, ensure_ascii=False)


def _markdown(columns, rows):
  """Returns a table in Markdown, as TensorBoard shows it."""
  cell = lambda x: str(x).replace("|", "\\|").replace("\n", "<br>")
  lines = [columns, ["---"] * len(columns), *rows]
  return "\n".join(f"| {' | '.join(map(cell, line))} |" for line in lines)


class Tracker:
  """Passes rows on to something that may fail, hang or be slow."""

  def __init__(
    self,
    name: str,
    start: Callable[[], Any],
    write: Callable[[Any, int, Any], None],
    close: Callable[[Any], None],
    note: Note,
    *,
    seconds_to_close: float = _SECONDS_TO_CLOSE,
  ):
    """Starts a thread.

    Args:
      name: of the tracker, for what is said of it.
      start: makes what `write` and `close` get, in the thread.
      write: takes that, a step, and its values or `Samples`.
      close: called once, behind the last row.
      note: is told, once, if it is given up.
      seconds_to_close: that `close` waits for it.
    """
    self._name, self._note = name, note
    self._steps = (start, write, close)
    self._seconds_to_close = seconds_to_close
    self._rows: queue.Queue = queue.Queue(_MOST_WAITING)
    self._is_given_up = False
    self._lock = threading.Lock()
    self._thread = threading.Thread(target=self._run, daemon=True)
    self._thread.start()

  def write(self, step: int, values: Mapping[str, float] | Samples) -> None:
    """Hands a row of metrics over, or samples; returns at once."""
    if self._is_given_up:
      return
    try:
      is_row = not isinstance(values, Samples)
      self._rows.put_nowait((step, dict(values) if is_row else values))
    except queue.Full:
      self._give_up(f"it is {_MOST_WAITING} rows behind")

  def close(self) -> None:
    """Waits for the last row, but not for ever."""
    if self._is_given_up:
      return
    try:
      self._rows.put_nowait(None)
      self._thread.join(self._seconds_to_close)
    except queue.Full:
      pass
    if self._thread.is_alive():
      self._give_up(f"it does not end within {self._seconds_to_close:g} s")

  def _run(self):
    start, write, close = self._steps
    try:
      target = start()
      while (row := self._rows.get()) is not None:
        write(target, *row)
      close(target)
    except BaseException as error:  # A library may call sys.exit.
      self._give_up(f"{type(error).__name__}: {error}")

  def _give_up(self, reason):
    with self._lock:
      if self._is_given_up:
        return
      self._is_given_up = True
    reason = " ".join(reason.split())[:300].rstrip(".")
    self._note(f"{self._name} is left out from here on: {reason}.")


def tensorboard(
  folder: pathlib.Path,
  first_step: int,
  note: Note,
  about: About | None = None,
) -> Tracker | None:
  """Starts to write TensorBoard files; None where that is not installed."""
  # tensorboardX imports torch where there is one: five seconds, for kinds of
  # plots that are not drawn here.
  hide_torch = "torch" not in sys.modules
  if hide_torch:
    sys.modules["torch"] = None
  try:
    library = importlib.import_module("tensorboardX")
  except ImportError:
    note("No TensorBoard files: tensorboardX is not installed.")
    return None
  finally:
    if hide_torch:
      del sys.modules["torch"]

  def start():
    writer = library.SummaryWriter(str(folder), purge_step=first_step or None)
    if about and not first_step:
      writer.add_text(
        "run", " ".join([about.named(folder.parent), *about.tags])
      )
      flags = [[name, _cell(value)] for name, value in about.flags.items()]
      writer.add_text("flags", _markdown(("flag", "value"), flags))
    return writer, _keep_alive(writer)

  def write(target, step, values):
    writer, failures = target
    if isinstance(values, Samples):
      cells = values.cells()[:_MOST_SAMPLES]
      writer.add_text("samples", _markdown(values.COLUMNS, cells), step)
      values = {}
    for name, value in values.items():
      if math.isfinite(value):  # Else it would complain each time.
        writer.add_scalar(name, value, step)
    if failures:
      raise failures[0]

  def close(target):
    writer, failures = target
    writer.close()
    if failures:
      raise failures[0]

  return Tracker("TensorBoard", start, write, close, note)


def wandb(
  project: str, workdir: pathlib.Path, note: Note, about: About | None = None
) -> Tracker:
  """Starts to log to Weights & Biases.

  Raises:
    ValueError: if it is not installed.
  """
  try:
    library = importlib.import_module("wandb")
  except ImportError as error:
    raise ValueError(
      "--wandb_project needs the package wandb, which is not installed."
    ) from error

  def start():
    # The same name after a restart makes it the same run over there.
    path = workdir / "wandb_run"
    if not path.exists():
      path.write_text(uuid.uuid4().hex[:12])
    return library.init(
      project=project,
      id=path.read_text(),
      resume="allow",
      name=about and about.named(workdir),
      tags=list(about.tags) if about and about.tags else None,
      config=dict(about.flags) if about else None,
      dir=str(workdir),
    )

  def write(target, step, values):
    if isinstance(values, Samples):
      columns = list(values.COLUMNS)
      table = library.Table(columns=columns, data=values.cells())
      values = {"samples": table}
    target.log(values, step=step)

  return Tracker(
    "Weights & Biases",
    start,
    write,
    lambda target: target.finish(),
    note,
  )


class Curves:
  """Redraws a picture in a thread, and once more at the end."""

  def __init__(
    self, draw: Callable[[], None], every_seconds: float, note: Note
  ):
    """Starts the thread; `changed` is to be set where there is more to draw."""
    self.changed = threading.Event()
    self._draw = draw
    self._every_seconds = every_seconds
    self._note = note
    self._failed = False
    self._stop = threading.Event()
    self._thread = threading.Thread(target=self._run, daemon=True)
    self._thread.start()

  def close(self, seconds: float = 4 * _SECONDS_TO_CLOSE) -> None:
    """Draws the last picture, and waits for it, but not for ever."""
    self._stop.set()
    self.changed.set()
    self._thread.join(seconds)
    if self._thread.is_alive():
      self._fail(f"it is not drawn within {seconds:g} s")

  def _run(self):
    while True:
      self.changed.wait()
      if self._stop.is_set():
        break
      self.changed.clear()
      started = time.monotonic()
      self._redraw()
      took = time.monotonic() - started
      if self._stop.wait(max(self._every_seconds, _SHARE_OF_DRAWING * took)):
        break
    self._redraw()

  def _redraw(self):
    # A picture is not worth a run: say what went wrong, once, and go on.
    try:
      self._draw()
    except BaseException as error:
      self._fail(repr(error))

  def _fail(self, reason):
    if not self._failed:
      self._note(f"curves.png could not be drawn: {reason}")
    self._failed = True


class _Lasting:
  """Stands for a file of events, and remembers an error instead of raising it.

  tensorboardX writes from a thread, which an error would end: its queue would
  fill, and whoever adds to it would wait for ever.
  """

  def __init__(self, file: Any, failures: list[Exception]):
    self._file, self._failures = file, failures

  def __getattr__(self, name: str) -> Any:
    found = getattr(self._file, name)
    if not callable(found):
      return found

    def call(*arguments):
      try:
        if not self._failures:
          return found(*arguments)
      except Exception as error:
        self._failures.append(error)
      return None

    return call


def _keep_alive(writer: Any) -> list[Exception]:
  """Puts a `_Lasting` into a writer of tensorboardX; returns its failures."""
  failures: list[Exception] = []
  events = getattr(getattr(writer, "file_writer", None), "event_writer", None)
  file = getattr(events, "_ev_writer", None)
  worker = getattr(events, "_worker", None)
  if isinstance(worker, threading.Thread) and hasattr(worker, "_record_writer"):
    events._ev_writer = worker._record_writer = _Lasting(file, failures)
  return failures
