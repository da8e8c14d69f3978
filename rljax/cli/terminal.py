"""What is printed, where the terminal may be gone before the run is."""

import contextlib
import os
import sys
from typing import Any, TextIO


class Lasting:
  """Stands for a text stream that may end: what then is printed is lost.

  A terminal that was closed, a pipe whose reader has left and a log file on a
  disk that is full would otherwise end the run that prints to them.
  """

  def __init__(self, stream: TextIO):
    """Takes the stream, such as `sys.stdout`."""
    self._stream = stream

  def write(self, text: str) -> int:
    """Writes a text, if there is still somebody to read it."""
    try:
      return self._stream.write(text)
    except UnicodeEncodeError:  # A terminal that knows Latin letters alone.
      name = getattr(self._stream, "encoding", None) or "ascii"
      return self.write(text.encode(name, "backslashreplace").decode(name))
    except (OSError, ValueError):
      self._lose()
      return len(text)

  def flush(self) -> None:
    """Flushes the stream."""
    try:
      self._stream.flush()
    except (OSError, ValueError):
      self._lose()

  def __getattr__(self, name: str) -> Any:
    return getattr(self._stream, name)

  def _lose(self):
    """Leads the stream to nowhere, with what it has not written yet."""
    with contextlib.suppress(OSError, ValueError):
      nowhere = os.open(os.devnull, os.O_WRONLY)
      os.dup2(nowhere, self._stream.fileno())
      os.close(nowhere)


def keep_printing() -> None:
  """Makes standard output and standard error `Lasting`."""
  sys.stdout, sys.stderr = map(Lasting, (sys.stdout, sys.stderr))
