"""Ends a process at a signal where Python does not get to handle it.

A handler of Python runs between two of its instructions. A program that
compiles for minutes is one call of C++, so that `timeout`, a scheduler or an
impatient user would wait for it. The number of a signal is written to a pipe at
once, though, and a thread can read it.
"""

import os
import select
import signal
import threading
import time
from collections.abc import Callable, Collection

_SECONDS_BETWEEN_LOOKS = 0.2
# For the main thread to handle a second signal by itself.
_SECONDS_TO_HANDLE = 1.0
_ACTIVE: list["Watcher"] = []


class Watcher:
  """Reads signals in a thread, and ends the process if it is stuck.

  Only the main thread may make and close it.
  """

  def __init__(
    self,
    numbers: Collection[int],
    *,
    num_handled: Callable[[], int],
    may_end: Callable[[], bool],
    end: Callable[[int, str], None] | None = None,
  ):
    """Begins to watch.

    Args:
      numbers: of the signals.
      num_handled: how many of them a handler has seen.
      may_end: whether a first signal may end the process where it is.
      end: takes the last signal and the reason; by default it ends the process
        without any clean-up, as a kill does: with status 130 after SIGINT or a
        second signal, else 0.
    """
    self._numbers = frozenset(numbers)
    self._num_handled, self._may_end = num_handled, may_end
    self._end = end or _end
    self._read, self._write = os.pipe()
    os.set_blocking(self._write, False)
    self._previous = signal.set_wakeup_fd(
      self._write, warn_on_full_buffer=False
    )
    self._thread = threading.Thread(target=self._watch, daemon=True)
    self._thread.start()
    _ACTIVE.append(self)

  def close(self) -> None:
    """Stops watching."""
    signal.set_wakeup_fd(self._previous)
    _ACTIVE.remove(self)
    os.close(self._write)
    self._thread.join()
    os.close(self._read)

  def _watch(self):
    seen: list[int] = []
    second_at = 0.0
    while True:
      seconds = _SECONDS_BETWEEN_LOOKS if seen else None
      if select.select([self._read], [], [], seconds)[0]:
        found = os.read(self._read, 64)
        if not found:
          return
        before = len(seen)
        seen += [number for number in found if number in self._numbers]
        if before < 2 <= len(seen):
          second_at = time.monotonic()
      if not seen:
        continue
      if len(seen) == 1 and self._may_end():
        self._end(seen[0], "nothing was to be saved")
        return
      waited = time.monotonic() - second_at
      if len(seen) > 1 and waited > _SECONDS_TO_HANDLE:
        if self._num_handled() < 2:
          self._end(signal.SIGINT, "asked twice")
        return


def _end(number, reason):
  text = f"{signal.Signals(number).name}: stopped at once, {reason}.\n"
  os.write(2, text.encode())
  os._exit(130 if number == signal.SIGINT else 0)


def _forget():
  """In a child that was forked: its signals are not those of its parent."""
  if _ACTIVE:
    signal.set_wakeup_fd(-1)
    _ACTIVE.clear()


os.register_at_fork(after_in_child=_forget)
