"""Renders conversations by a tokenizer's chat template, within bounds.

A template is a program that comes with a model, and may loop or grow without an
end. It has a few seconds, and its text a length that no context reaches.
"""

import contextlib
import ctypes
import functools
import resource
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

SECONDS = 10.0
MOST_CHARACTERS = 2**24
_MOST_BYTES = 2**32
_MOST_POWER = 64
# The limit of memory is that of the process: one template at a time.
_ONE = threading.Lock()


def render(
  tokenizer: Any,
  messages: Sequence[Mapping[str, Any]],
  *,
  add_generation_prompt: bool = False,
  continue_final_message: bool = False,
  variables: Mapping[str, Any] | None = None,
  seconds: float | None = None,
) -> str:
  """Returns messages as the text that a model reads.

  Args:
    tokenizer: Hugging Face tokenizer with a chat template.
    messages: dicts with `role` and `content`.
    add_generation_prompt: whether the text goes on to where the assistant
      begins.
    continue_final_message: whether it ends in the last message, which goes on.
    variables: further ones of the template, such as enable_thinking.
    seconds: how long the template may take, in whatever thread; None:
      `SECONDS`.

  Raises:
    ValueError: if the template refuses the messages, or takes too much time or
      memory.
  """
  seconds = SECONDS if seconds is None else seconds
  try:
    _check_powers(tokenizer)
    with _limits(seconds):
      text = tokenizer.apply_chat_template(
        list(messages),
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=continue_final_message,
        **variables or {},
      )
  except _Late as error:
    raise ValueError(
      f"the chat template took more than {seconds:g} seconds"
    ) from error
  except (MemoryError, OverflowError, RecursionError) as error:
    raise ValueError(
      f"the chat template is too large a program: {type(error).__name__}"
    ) from error
  except Exception as error:  # Templates may raise anything.
    raise ValueError(str(error).rstrip(".") or type(error).__name__) from error
  if not isinstance(text, str):
    raise ValueError("the chat template gives no text")
  if len(text) > MOST_CHARACTERS:
    raise ValueError(
      f"the chat template wrote {len(text)} characters, and the limit is "
      f"{MOST_CHARACTERS}"
    )
  return text


class _Late(BaseException):
  """Passes what catches every Exception, as a template's caller may."""


def _check_powers(tokenizer: Any) -> None:
  """Raises ValueError for powers, which nobody can stop while they are made."""
  found = getattr(tokenizer, "chat_template", None)
  for source in found.values() if isinstance(found, Mapping) else [found]:
    if isinstance(source, str) and "**" in source and _has_powers(source):
      raise ValueError(
        "the chat template takes powers other than of a number by a number up "
        f"to {_MOST_POWER}"
      )


@functools.lru_cache(8)
def _has_powers(source: str) -> bool:
  """Whether a template has a power that may be too large to be finished."""
  import jinja2

  pieces = [
    (kind, text)
    for _, kind, text in jinja2.Environment().lex(source)
    if kind != "whitespace"
  ]
  for before, (kind, text), after, later in zip(
    pieces, pieces[1:], pieces[2:], [*pieces[3:], ("", "")], strict=False
  ):
    is_power = (kind, text) == ("operator", "**")
    if not is_power or before in (("operator", "("), ("operator", ",")):
      continue  # Or the arguments of a call.
    is_small = (
      (before[0], after[0]) == ("integer", "integer")
      and len(after[1]) < 4
      and int(after[1]) <= _MOST_POWER
    )
    if not is_small or later == ("operator", "**"):
      return True
  return False


@contextlib.contextmanager
def _limits(seconds: float) -> Iterator[None]:
  """Bounds the time and the further memory of a block."""
  is_main = threading.current_thread() is threading.main_thread()
  with _ONE:
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    try:
      with (_alarm if is_main else _late)(seconds):
        with contextlib.suppress(OSError, ValueError):
          most = _address_space() + _MOST_BYTES
          if soft == resource.RLIM_INFINITY or soft > most:
            resource.setrlimit(resource.RLIMIT_AS, (most, hard))
        yield
    finally:
      with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextlib.contextmanager
def _alarm(seconds: float) -> Iterator[None]:
  """Raises `_Late` in the main thread, by a signal."""

  def stop(signum, frame):
    raise _Late

  former = signal.signal(signal.SIGALRM, stop)
  try:
    signal.setitimer(signal.ITIMER_REAL, seconds)
    yield
  finally:
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, former)


@contextlib.contextmanager
def _late(seconds: float) -> Iterator[None]:
  """Raises `_Late` in another thread, which gets no signals."""
  thread = ctypes.c_ulong(threading.get_ident())
  raise_in = ctypes.pythonapi.PyThreadState_SetAsyncExc
  lock, is_over = threading.Lock(), False

  def stop():
    with lock:
      if not is_over:
        raise_in(thread, ctypes.py_object(_Late))

  timer = threading.Timer(seconds, stop)
  timer.daemon = True
  timer.start()
  try:
    yield
  finally:
    with lock:
      is_over = True
      raise_in(thread, None)  # What was sent and has not arrived.
    timer.cancel()


def _address_space() -> int:
  """Returns the bytes that the process has mapped."""
  with open("/proc/self/statm") as file:
    return int(file.read().split()[0]) * resource.getpagesize()
