"""Draws responses while others are scored: the devices do not wait for rewards.

What is drawn does not depend on what was scored, so the results are the same to
the bit; only the order of waiting differs. Scoring stays in the thread of the
caller, with the limits and the signals that it has there. With several
processes nothing is drawn ahead: their programs must run in one order.
"""

import contextvars
import dataclasses
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any, TypeVar

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
    start = lambda: _submit(thread, next, source, _END)
    coming = start()
    while (item := coming.result()) is not _END:
      coming = start()
      yield item


@dataclasses.dataclass
class Pace:
  """How long the last round took, in seconds; what `rounds` goes by.

  Attributes:
    draw: of drawing, where nothing else was done.
    score: of scoring.
  """

  draw: float = 0.0
  score: float = 0.0


def rounds(
  draw: Callable[[int], Any],
  score: Callable[..., Any],
  max_rounds: int,
  pace: Pace,
) -> Iterator[Any]:
  """Draws and scores rounds, of which the caller may need only the first.

  Where scoring has taken longer than drawing, the next round is drawn
  meanwhile, and thrown away if it is not asked for: that costs no time.

  Args:
    draw: maps the number of a round to its samples.
    score: of `Samples.scored`.
    max_rounds: most rounds.
    pace: is kept up to date, and handed over again in the next step.

  Yields:
    Scored samples, round by round. Closing it waits for what is being drawn.
  """
  with futures.ThreadPoolExecutor(1) as thread:
    coming = None
    for number in range(max_rounds):
      started = time.perf_counter()
      if coming is None:
        samples = draw(number)
        pace.draw = time.perf_counter() - started
      else:
        samples, coming = coming.result(), None
      is_last = number + 1 == max_rounds
      if not is_last and pace.score > pace.draw and _may_draw_ahead():
        coming = _submit(thread, draw, number + 1)
      started = time.perf_counter()
      scored = samples.scored(score)
      pace.score = time.perf_counter() - started
      yield scored


def _may_draw_ahead() -> bool:
  """Whether this process alone decides what its devices do, and they do it."""
  return jax.process_count() == 1 and planning.current() is None


def _submit(thread, function, *args):
  """Calls a function in a thread, with the context of this one."""
  return thread.submit(contextvars.copy_context().run, function, *args)
