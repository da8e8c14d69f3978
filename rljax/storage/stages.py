"""Stages of a pipeline, each with a folder of its own beside its inputs.

A stage whose inputs have not changed is not repeated; one that was stopped
continues, if its writer can; one whose inputs have changed starts over, and its
old folder is renamed, not deleted. One process makes a stage at a time: a
second one is told who does. An output that was edited by hand counts as
changed, for the stages that read it.

Rounds are simpler: each has a folder, and ends once.
"""

import hashlib
import json
import os
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

from rljax.storage import locks, mirrors, paths

_INPUTS, _DONE = "inputs.json", "done.json"
_ROUND = "round.json"


class Stage:
  """Keeps one stage: its folder, its inputs, and whether it is finished.

  Attributes:
    folder: where the stage writes; it exists.
    facts: the arguments of `finish`, or None while the stage is not finished.
  """

  def __init__(
    self,
    workdir: str | os.PathLike[str],
    name: str,
    inputs: Mapping[str, Any],
    note: Callable[[str], None] = print,
    once: Callable[[Callable[[], Any]], Any] = lambda function: function(),
  ):
    """Opens the folder `<workdir>/<name>`.

    Args:
      workdir: folder of the pipeline.
      name: of the stage.
      inputs: all that the outputs depend on, as values that `json` can write:
        settings, `digest` of earlier stages, fingerprints of models. None of
        them may depend on where or when the stage runs.
      note: called with a line if an old folder is renamed.
      once: calls the functions that read or write the folder, and returns their
        results. Of several processes that share the stage only one may do so:
        see `processes.from_first`.

    Raises:
      ValueError: if the folder holds files that no stage has written, or
        another process is making the stage.
    """
    paths.check_local(workdir, "The folder of stages")
    mirrors.check_one_disk(workdir)
    self.name = name
    self.folder = pathlib.Path(workdir, name)
    self._once = once
    self._lock: locks.Lock | None = None  # Until it is finished.
    inputs = json.loads(json.dumps(dict(inputs)))
    self.facts: dict[str, Any] | None = once(lambda: self._open(inputs, note))

  def path(self, file: str) -> str:
    """Returns the path of a file of the stage."""
    return os.fspath(self.folder / file)

  def finish(self, **facts: Any) -> None:
    """Marks the stage as finished, with numbers for its reader."""

    def write():
      _write(self.folder / _DONE, facts | {"finished_at": time.time()})
      self._lock = None
      return _read(self.folder / _DONE)

    self.facts = self._once(write)

  def digest(self, *files: str) -> str:
    """Hashes outputs as they are now, as an input of later stages.

    Args:
      *files: names in the stage's folder.

    Raises:
      ValueError: if the stage is not finished, or a file is gone.
    """
    if self.facts is None:
      raise ValueError(f"The stage {self.name} is not finished.")
    total = hashlib.sha256()
    for file in files:
      try:
        content = (self.folder / file).read_bytes()
      except OSError as error:
        raise ValueError(
          f"{self.folder / file} cannot be read ({error.strerror}); delete "
          f"{self.folder / _DONE} to make it again."
        ) from error
      total.update(hashlib.sha256(content).digest())
    return total.hexdigest()

  def _open(self, inputs, note):
    """Finds or makes the folder; returns the facts of a finished stage."""
    # Several may read one that is finished.
    if _read(self.folder / _INPUTS) == inputs and _read(self.folder / _DONE):
      return _read(self.folder / _DONE)
    with paths.writing(self.folder):
      self.folder.parent.mkdir(parents=True, exist_ok=True)
    self._lock = locks.beside(self.folder)
    if self.folder.exists() and set(os.listdir(self.folder)) - {
      f".{_INPUTS}.partial"  # A kill may leave this file.
    }:
      found = _read(self.folder / _INPUTS)
      if found is None:
        raise ValueError(
          f"{self.folder} is not a folder of the stage {self.name}: it has no "
          f"whole {_INPUTS}. Choose another folder."
        )
      if found == inputs:
        facts = _read(self.folder / _DONE)
        if facts is not None:  # By another one, until just now.
          self._lock = None
        return facts
      changed = [
        key
        for key in dict.fromkeys([*found, *inputs])
        if found.get(key) != inputs.get(key)
      ]
      aside = paths.set_aside(self.folder)
      note(
        f"{self.name}: {', '.join(changed)} changed; it starts over, and the "
        f"old folder is now {aside}."
      )
    with paths.writing(self.folder):
      self.folder.mkdir(parents=True, exist_ok=True)
    _write(self.folder / _INPUTS, inputs)
    return None


class Rounds:
  """Rounds of a run: `<workdir>/rounds/<number>`, whole once they have ended.

  A round that was stopped goes on with what its folder holds, if its writers
  can; one that has ended is not repeated.

  Attributes:
    finished: what `finish` was told of each round, from 0 on.
  """

  def __init__(
    self,
    workdir: str | os.PathLike[str],
    once: Callable[[Callable[[], Any]], Any] = lambda function: function(),
  ):
    """Reads which rounds have ended.

    Args:
      workdir: folder of the run.
      once: see `Stage`.
    """
    self._folder = pathlib.Path(workdir, "rounds")
    self._once = once
    self.finished: list[dict[str, Any]] = once(self._read_all)

  def path(self, number: int, file: str = "") -> str:
    """Where a round, or a file of it, lies."""
    return os.fspath(self._folder / str(number) / file)

  def finish(self, **facts: Any) -> None:
    """Files the next round as finished, at once or not at all.

    Args:
      **facts: what `json` can write; read again by a later start.
    """

    def write():
      folder = self._folder / str(len(self.finished))
      folder.mkdir(parents=True, exist_ok=True)
      _write(folder / _ROUND, facts)
      return _read(folder / _ROUND)

    self.finished.append(self._once(write))

  def best(self, name: str) -> int:
    """Returns the round in which a number was largest; the first of several."""
    values = [facts[name] for facts in self.finished]
    return values.index(max(values))

  def _read_all(self):
    found = []
    while facts := _read(self._folder / str(len(found)) / _ROUND):
      found.append(facts)
    return found


def set_aside_unless(
  path: str | os.PathLike[str],
  made_of: Mapping[str, Any],
  note: Callable[[str], None] = print,
) -> None:
  """Sets a file aside that was made of something else than what is named.

  What a file is made of stands beside it, in `<path>` with the suffix .json,
  before the first line of the file: no line is ever beside another's manifest.

  Args:
    path: the file, which may be absent. Its folder is made.
    made_of: all that its content depends on, as values that `json` can write.
    note: called with a line if the file is set aside.
  """
  path = pathlib.Path(path)
  if path.exists():
    if is_of(path, made_of):
      return
    aside = paths.set_aside(path)
    note(
      f"{path} is of another policy or other flags: drawn again; the old file "
      f"is now {aside.name}."
    )
  describe(path, made_of)


def is_of(path: str | os.PathLike[str], made_of: Mapping[str, Any]) -> bool:
  """Tells whether a file is there, and made of what is named."""
  path = pathlib.Path(path)
  made_of = json.loads(json.dumps(made_of))
  return path.exists() and _read(path.with_suffix(".json")) == made_of


def describe(path: str | os.PathLike[str], made_of: Mapping[str, Any]) -> None:
  """Files what a file is about to be made of, beside it; makes its folder."""
  path = pathlib.Path(path)
  with paths.writing(path.parent):
    path.parent.mkdir(parents=True, exist_ok=True)
  _write(path.with_suffix(".json"), json.loads(json.dumps(made_of)))


def _read(path: pathlib.Path) -> dict[str, Any] | None:
  """Reads a JSON object; None where there is no whole one."""
  try:
    found = json.loads(path.read_text())
  except (OSError, ValueError):
    return None
  return found if isinstance(found, dict) else None


def _write(path: pathlib.Path, values: Mapping[str, Any]) -> None:
  content = json.dumps(dict(values), indent=2) + "\n"
  paths.write_whole(path, content, fsync=True)
