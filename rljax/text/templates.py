"""Renders conversations by a tokenizer's chat template, within bounds.

A template is a program that comes with a model, and may loop or grow without an
end. It has a few seconds, and its text a length that no context reaches.
"""

import contextlib
import resource
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

SECONDS = 10.0
MOST_CHARACTERS = 2**24
_MOST_BYTES = 2**32


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
    seconds: how long the template may take; None: `SECONDS`. Python can only be
      stopped in the main thread; elsewhere there is no limit.

  Raises:
    ValueError: if the template refuses the messages, or takes too much time or
      memory.
  """
  seconds = SECONDS if seconds is None else seconds
  try:
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


@contextlib.contextmanager
def _limits(seconds: float) -> Iterator[None]:
  """Bounds the time and the further memory of a block, in the main thread."""
  if threading.current_thread() is not threading.main_thread():
    yield
    return

  def stop(signum, frame):
    raise _Late

  former = signal.signal(signal.SIGALRM, stop)
  soft, hard = resource.getrlimit(resource.RLIMIT_AS)
  try:
    with contextlib.suppress(OSError, ValueError):
      most = _address_space() + _MOST_BYTES
      if soft == resource.RLIM_INFINITY or soft > most:
        resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    yield
  finally:
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, former)
    with contextlib.suppress(OSError, ValueError):
      resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _address_space() -> int:
  """Returns the bytes that the process has mapped."""
  with open("/proc/self/statm") as file:
    return int(file.read().split()[0]) * resource.getpagesize()
