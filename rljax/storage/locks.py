"""Locks on what one process writes at a time."""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import socket
import struct
import weakref
from typing import IO, Any

_NAME = ".lock"
_HELD = (errno.EAGAIN, errno.EACCES)

# What this process holds: (process, real path) -> the open file. On systems
# without locks of open files, the kernel gives a lock back when *any* file of
# its process on the same path is closed, so that there must be one alone.
_OPEN: weakref.WeakValueDictionary[tuple[int, str], "_File"] = (
  weakref.WeakValueDictionary()
)


class Lock:
  """A lock that is held until `close`, or until the process ends."""

  def __init__(self, file: "_File"):
    """See `take` and `beside`."""
    self._file: _File | None = file

  def close(self) -> None:
    """Gives the lock back, unless the process has taken it once more."""
    self._file = None

  def __enter__(self) -> "Lock":
    return self

  def __exit__(self, *unused: Any) -> None:
    self.close()


def take(folder: str | os.PathLike[str]) -> Lock:
  """Takes the lock of a folder, in its file `.lock`.

  The kernel gives the lock back when the process is gone, however it ended.
  The same process may take it again.

  Args:
    folder: which exists.

  Returns:
    The lock; keep it, for it is given back when nobody refers to it.

  Raises:
    ValueError: if another process has it, naming host and process.
  """
  return _take(os.path.join(folder, _NAME), os.fspath(folder), is_ours=False)


def beside(path: str | os.PathLike[str]) -> Lock:
  """Takes the lock of a file or folder, in the file `.<name>.lock` beside it.

  For what is replaced as a whole, or holds nothing but its content. The file
  is deleted with the lock.

  Args:
    path: it need not exist; its folder does.

  Returns:
    As `take`.

  Raises:
    ValueError: as `take`.
  """
  path = pathlib.Path(os.path.abspath(path))
  name = os.path.join(path.parent, f".{path.name}{_NAME}")
  return _take(name, os.fspath(path), is_ours=True)


class _File:
  """An open file that is locked; closed when nobody refers to it."""

  def __init__(self, file: IO[str], path: str, is_ours: bool):
    self.file = file
    self._close = weakref.finalize(
      self, _give_back, file, path, is_ours, os.getpid()
    )


def _give_back(file: IO[str], path: str, is_ours: bool, owner: int) -> None:
  if is_ours and os.getpid() == owner:
    with contextlib.suppress(OSError):
      os.unlink(path)  # While it is held: the next one finds another file.
  file.close()


def _take(path: str, name: str, *, is_ours: bool) -> Lock:
  """Locks a file of this path, which stands for `name`."""
  folder, file_name = os.path.split(path)
  path = os.path.join(os.path.realpath(folder), file_name)
  key = (os.getpid(), path)
  if (held := _OPEN.get(key)) is not None:
    return Lock(held)
  while True:
    try:
      file = open(path, "a+", encoding="utf-8", opener=_opened)  # noqa: SIM115
    except OSError as error:
      raise ValueError(
        f"{name} cannot be locked: {error.strerror}; choose a folder that can "
        "be written to."
      ) from error
    _lock(file, name)
    # Whoever held it may have deleted it in the meantime.
    with contextlib.suppress(FileNotFoundError):
      if os.path.samestat(os.stat(path), os.fstat(file.fileno())):
        break
    file.close()
  with contextlib.suppress(OSError):  # On a disk that is full, it has no name.
    file.seek(0)
    file.truncate()
    json.dump({"host": socket.gethostname(), "pid": os.getpid()}, file)
    file.flush()
  held = _OPEN[key] = _File(file, path, is_ours)
  return Lock(held)


def _opened(path: str, flags: int) -> int:
  """Opens a file that is about to be overwritten, but none behind a link."""
  return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def _set(file: IO[str]) -> None:
  """Takes the lock of an open file, which that of a process is if need be.

  A lock of the process would be gone as soon as it reads or copies the file.
  """
  command = getattr(fcntl, "F_OFD_SETLK", None)
  if command is not None:
    wanted = struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    try:
      fcntl.fcntl(file, command, wanted)
      return
    except OSError as error:
      if error.errno in _HELD:
        raise  # Not every file system has such locks.
  fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _leave() -> None:
  """Closes in a fork what its parent holds, which else would outlive that."""
  for held in list(_OPEN.values()):
    held.file.close()
  _OPEN.clear()


os.register_at_fork(after_in_child=_leave)


def _lock(file: IO[str], name: str) -> None:
  """Locks an open file, or closes it and says who holds the lock."""
  try:
    _set(file)
  except OSError as error:
    file.seek(0)
    holder = {}
    with contextlib.suppress(ValueError, TypeError, OSError):
      holder = dict(json.loads(file.read()))
    file.close()
    if error.errno not in _HELD:
      raise ValueError(
        f"{name} cannot be locked: {error.strerror}; choose a folder on "
        "another file system."
      ) from error
    raise ValueError(
      f"{name} is being written by process {holder.get('pid', 'unknown')} on "
      f"{holder.get('host', 'some host')}; wait for its end, or choose another "
      "folder."
    ) from None
