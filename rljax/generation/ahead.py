"""Draws responses while others are scored: the devices do not wait for rewards.

What is drawn does not depend on what was scored, so the results are the same to
the bit; only the order of waiting differs. Scoring stays in the thread of the
caller, with the limits and the signals that it has there. With several
processes nothing is drawn ahead: their programs must run in one order.
"""

import contextvars
from collections.abc import Iterator
from concurrent import futures
from typing import TypeVar

import jax

from rljax.distributed import planning

Item = TypeVar("Item")

_END = object()


def items(source: Iterator[Item]) -> Iterator[Item]:
  """Computes each item while the caller works on the one before it.

  An error of an item is raised where the item would have come. A caller that
  stops early waits for the item that is being computed.

  Args:
    source: such as `Responder.batches`.

  Yields:
    Its items, in order.
  """
  if not _may_draw_ahead():
    yield from source
    return
  with futures.ThreadPoolExecutor(1) as thread:
    start = lambda: thread.submit(
      contextvars.copy_context().run, next, source, _END
    )
    coming = start()
    while (item := coming.result()) is not _END:
      coming = start()
      yield item


def _may_draw_ahead() -> bool:
  """Whether this process alone decides what its devices do, and they do it."""
  return jax.process_count() == 1 and planning.current() is None
