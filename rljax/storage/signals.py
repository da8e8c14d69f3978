"""Turns the signals that end a machine or a job into a clean stop."""

import signal
import time
from collections.abc import Callable

import jax
import numpy as np
from absl import logging

from rljax.storage import calls, stuck


class Stopped(calls.Ended):
  """Ends work that a signal has stopped; what it wrote so far is on disk."""


class Preemption:
  """Turns the signal that ends a machine into a clean stop.

  Inside the `with` block the first SIGTERM, SIGINT or SIGHUP sets `requested`,
  for the loop to save and stop at the end of the step; a second one raises
  KeyboardInterrupt at once. A call of `calls.guard` that goes on for longer is
  interrupted. Where Python cannot handle them, as in a long compilation, the
  first one ends the process if it `may_end`, and the second one in any case:
  see `stuck`. The previous handlers return at the end. Only the main thread may
  enter. A SIGHUP that is ignored, as behind nohup, stays so.

  Attributes:
    requested: True once this process was asked to stop.
    requested_at: by `time.monotonic`; None before.
    exit_status: what to exit with after saving: 0 after SIGTERM, which a
      scheduler sent, and SIGHUP, of a terminal that was closed; 130 after
      SIGINT, so that a shell script stops too.
  """

  stopped = Stopped

  def __init__(self, may_end: Callable[[], bool] = lambda: False):
    """Begins unasked.

    Args:
      may_end: whether the process may end where it is, with nothing to save; a
        thread asks that.
    """
    self.requested = False
    self.requested_at: float | None = None
    self.exit_status = 0
    self._previous = {}
    self._may_end, self._num_handled = may_end, 0
    self._watcher: stuck.Watcher | None = None

  def should_stop(self) -> bool:
    """Returns True, in all processes at once, if any was asked to stop."""
    if jax.process_count() == 1:
      return self.requested
    from jax.experimental import multihost_utils

    asked = multihost_utils.process_allgather(
      np.int32([self.requested, self.exit_status])
    )
    self.exit_status = int(asked[:, 1].max())
    return bool(asked[:, 0].any())

  def __enter__(self):
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
      if number == signal.SIGHUP and (
        signal.getsignal(number) == signal.SIG_IGN
      ):
        continue
      self._previous[number] = signal.signal(number, self._handle)
    if jax.process_count() == 1:  # Several have to end together.
      calls.CATCHERS.append(self)
    self._watcher = stuck.Watcher(
      self._previous,
      num_handled=lambda: self._num_handled,
      may_end=self._may_end,
    )
    return self

  def __exit__(self, *error):
    self._watcher.close()
    if self in calls.CATCHERS:
      calls.CATCHERS.remove(self)
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def _handle(self, number, frame):
    del frame
    self._num_handled += 1
    if self.requested:
      raise KeyboardInterrupt
    self.requested, self.requested_at = True, time.monotonic()
    self.exit_status = 130 if number == signal.SIGINT else 0
    logging.warning(
      "%s: stopping at the end of this step; once more to stop at once.",
      signal.Signals(number).name,
    )
