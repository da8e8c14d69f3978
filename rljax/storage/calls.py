"""Calls of functions that are the user's own: they may fail, hang or be slow.

A scorer or a teacher may ask a service for hours. `guard` limits the time of a
call, lets a signal that asks for the end interrupt one that hangs, and keeps
what was answered before: both of its exceptions carry that as `done`.
"""

import signal
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from rljax.storage import paths

# After a signal: until a loop ends behind an answer, and until one that is
# still waited for is given up. Schedulers kill after half a minute.
SECONDS_TO_ANSWER = 4.0
SECONDS_TO_GIVE_UP = 10.0
_SECONDS_BETWEEN_LOOKS = 0.2
_SHOWN = 200  # Characters of a text in a message.
# Ignored by default, so that a late one hurts nobody.
_SIGNAL = signal.SIGURG

# What catches the signals that ask for the end, the innermost last: objects
# with `requested_at`, a time or None, and `stopped`, which makes an exception.
CATCHERS: list[Any] = []


class CallError(ValueError):
  """A function of the user's own has failed, or took too long.

  Attributes:
    done: what was answered before.
    rows: what was asked, with what was answered, where `tasks` has asked it.
  """

  def __init__(self, message: str, done: Sequence[Any] = ()):
    """Takes the message, and what was answered before."""
    super().__init__(message)
    self.done = list(done)
    self.rows: list[dict[str, Any]] = []


class Ended(Exception):
  """Ends work for a signal; the base of `signals.Stopped`.

  Attributes:
    done: answers to the call that was interrupted; `rows`: as of `CallError`.
    exit_status: of the process.
  """

  done = ()
  rows = ()
  exit_status = 0


class _Interrupt(BaseException):
  """Ends a call from outside; not an Exception, which a call may catch."""


def shown(text: str) -> str:
  """Returns the beginning of a text, for a message."""
  return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...")


def check_stop(done: Sequence[Any] = (), seconds: float = 0.0) -> None:
  """Ends the work if a signal asked for that some time ago.

  Args:
    done: what was answered, which the exception carries.
    seconds: since the signal.

  Raises:
    Exception: `signals.Stopped`, with `done`.
  """
  if _seconds_since_signal() > seconds:
    stopped = CATCHERS[-1].stopped()
    stopped.done = list(done)
    stopped.exit_status = CATCHERS[-1].exit_status
    raise stopped


def guard(
  call: Callable[[], Any],
  *,
  what: str,
  about: Callable[[], str],
  seconds: float = 0.0,
  done: Sequence[Any] = (),
) -> Any:
  """Calls a function that may fail or hang, and returns its result.

  In the main thread, a call that takes too long is interrupted where Python
  can be: in its own code, in a sleep or in the wait for an answer. Elsewhere it
  only is named where it fails.

  Args:
    call: the function.
    what: who is called, as a message begins.
    about: says what it was called for, when something is wrong; "" if the
      errors of the function name that themselves.
    seconds: that it may take, counted anew where `done` grows; 0: no limit.
    done: what it has answered, if it answers piece by piece.

  Raises:
    CallError: if it raises, or takes too long.
    Exception: `signals.Stopped`, if a signal asked for the end and the call
      goes on for longer than a scheduler waits.
  """
  watch = _Watch(seconds, done)
  try:
    with watch:
      return call()
  except _Interrupt:
    if not watch.is_overdue:
      check_stop(done)
    raise CallError(
      f"{what} took more than {seconds:g} seconds {about()}.", done
    ) from None
  except (CallError, Ended, paths.DiskError):
    raise
  except Exception as error:
    if isinstance(error, ValueError) and not about():
      raise CallError(str(error), done) from error
    message = str(error).rstrip(".") or "no message"
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    raise CallError(f"{what} failed {about()}: {kind}{message}.", done) from (
      error
    )


def tell(
  error: CallError | Ended, prompts: Sequence[str], responses: Sequence[str]
) -> None:
  """Lets an error carry what was asked, with what was answered, as `rows`."""
  error.rows = [
    {"prompt": str(prompt), "response": response}
    for prompt, response in zip(prompts, responses, strict=True)
  ]
  for row, outcome in zip(error.rows, error.done, strict=False):
    pair = outcome if isinstance(outcome, tuple) else (outcome, {})
    row["reward"], row["parts"] = pair


def one_by_one(
  function: Callable[..., Any],
  items: Sequence[tuple[Any, ...]],
  *,
  what: str,
  about: Callable[[int], str],
  seconds: float = 0.0,
) -> list[Any]:
  """Calls a function with one item after another; see `guard`.

  After a signal it ends behind an answer, with what was answered so far.

  Args:
    function: of the user's own.
    items: arguments of each call.
    what: see `guard`.
    about: says what the call of this number was for.
    seconds: that a call may take; 0: no limit.

  Returns:
    What the function returned for each item.

  Raises:
    CallError: as `guard`, naming the item.
    Exception: `signals.Stopped`.
  """
  done: list[Any] = []

  def call():
    for item in items:
      done.append(function(*item))
      check_stop(done, SECONDS_TO_ANSWER)

  guard(
    call,
    what=what,
    about=lambda: about(min(len(done), len(items) - 1)),
    seconds=seconds,
    done=done,
  )
  return done


class _Watch:
  """Interrupts the main thread when a call in it takes too long."""

  def __init__(self, seconds: float, done: Sequence[Any]):
    self._seconds, self._done = seconds, done
    self._lock = threading.Lock()
    self._ended = threading.Event()
    self.is_overdue = False

  def __enter__(self) -> None:
    self._active = threading.current_thread() is threading.main_thread() and (
      bool(self._seconds) or bool(CATCHERS)
    )
    if self._active:
      self._previous = signal.signal(_SIGNAL, self._interrupt)
      # A thread costs a tenth of a millisecond; a call that is over by then
      # needs none.
      self._timer = threading.Timer(_SECONDS_BETWEEN_LOOKS, self._look)
      self._timer.daemon = True
      self._timer.start()

  def __exit__(self, *unused: Any) -> None:
    if not self._active:
      return
    with self._lock:  # From here on no signal is sent.
      self._ended.set()
    self._timer.cancel()
    signal.signal(_SIGNAL, self._previous)

  def _interrupt(self, number: int, frame: Any) -> None:
    if not self._ended.is_set():
      raise _Interrupt

  def _look(self) -> None:
    started, known = time.monotonic() - _SECONDS_BETWEEN_LOOKS, len(self._done)
    while not self._ended.wait(_SECONDS_BETWEEN_LOOKS):
      now = time.monotonic()
      if len(self._done) != known:
        started, known = now, len(self._done)
      self.is_overdue = 0 < self._seconds < now - started
      if self.is_overdue or _seconds_since_signal() > SECONDS_TO_GIVE_UP:
        with self._lock:
          if not self._ended.is_set():
            signal.pthread_kill(threading.main_thread().ident, _SIGNAL)
        # It may be where nothing can interrupt it; then once more.
        self._ended.wait(1.0)


def _seconds_since_signal() -> float:
  """Returns how long ago a signal asked for the end; below 0 if none did."""
  if not CATCHERS or CATCHERS[-1].requested_at is None:
    return -1.0
  return time.monotonic() - CATCHERS[-1].requested_at
