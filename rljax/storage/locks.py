"""A lock on a folder that one process writes at a time."""

import contextlib
import fcntl
import json
import os
import socket
from typing import IO

_NAME = ".lock"


def take(folder: str | os.PathLike[str]) -> IO[str]:
  """Takes the lock of a folder until the process ends.

  The kernel gives the lock back when the process is gone, however it ended.
  The same process may take it again.

  Args:
    folder: which exists.

  Returns:
    The open file; keep it, for closing it gives the lock back.

  Raises:
    ValueError: if another process has it, naming host and process.
  """
  path = os.path.join(folder, _NAME)
  file = open(path, "a+", encoding="utf-8")  # noqa: SIM115
  try:
    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError as error:
    file.seek(0)
    holder = {}
    with contextlib.suppress(ValueError):
      holder = json.loads(file.read())
    file.close()
    if error.errno not in (11, 13):  # EAGAIN, EACCES: held by another.
      raise ValueError(
        f"{os.fspath(folder)} cannot be locked: {error.strerror}; choose a "
        "folder on another file system."
      ) from error
    raise ValueError(
      f"{os.fspath(folder)} is being written by process "
      f"{holder.get('pid', 'unknown')} on {holder.get('host', 'some host')}; "
      "wait for its end, or choose another folder."
    ) from None
  file.seek(0)
  file.truncate()
  json.dump({"host": socket.gethostname(), "pid": os.getpid()}, file)
  file.flush()
  return file
