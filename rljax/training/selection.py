"""Selects parameters: by the reward of new replies, or by a held-out loss."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from rljax.evaluation import answers, held_out
from rljax.training import runs

Params = Mapping[str, Any]


class Selection:
  """Evaluates parameters, and keeps the best of a run.

  Attributes:
    score: what scores replies; None where nothing does.
    dev: the prompts that are answered, in a list; empty likewise.
    program: what was compiled for it, for `Run.steps`.
  """

  def __init__(
    self,
    run: runs.Run,
    *,
    answer: Any = None,
    score: Callable[..., Any] | None = None,
    dev: Sequence[Any] = (),
    batch_size: int,
  ):
    """Takes what replies and scores, or None for both.

    Args:
      run: whose parameters they are.
      answer: a `responders.Responder` for the dev prompts, or None.
      score: a `scorers.Scorer`, or None: a held-out loss selects.
      dev: the prompts.
      batch_size: held-out rows at the same time.
    """
    self.score, self.dev, self.program = score, list(dev), answer
    self._run, self._batch_size = run, batch_size
    self._batch_of, self._num_rows, self._more = None, 0, ()

  def by_loss(
    self,
    metrics_of: Callable[..., Mapping[str, Any]],
    batch_of: Callable[[np.ndarray], Any],
    num_rows: int,
    *more: Any,
  ) -> None:
    """Says what the held-out loss is, where nothing scores replies.

    Args:
      metrics_of: (params, batch, *more) -> metrics; jitted here.
      batch_of: numbers of held-out rows -> their batch, see `held_out.means`.
      num_rows: of them.
      *more: arrays for `metrics_of`.
    """
    if self.score is None:
      self.program = self._run.compile(metrics_of, name="held-out loss")
      self._batch_of, self._num_rows, self._more = batch_of, num_rows, more

  def evaluate(self, step: int, params: Params) -> dict[str, float]:
    """Returns the metrics of an evaluation, by which `Run.keep_best` goes.

    Replies are filed. Where nothing scores them, it is the loss on held-out
    rows, and the lowest is the best.

    Args:
      step: updates so far.
      params: of the run, with "policy".
    """
    if self.score is None:
      metrics = held_out.means(
        lambda rows: self.program(
          params, self._run.shard(self._batch_of(rows)), *self._more
        ),
        self._num_rows,
        self._batch_size,
      )
      self._run.keep_best(step, -metrics["eval/loss"], params)
      return metrics
    rows = answers.evaluate(self.program, params["policy"], self.score)
    self._run.evaluated(step, rows)
    self._run.samples(step, rows)
    metrics = answers.means(rows, prefix="dev/")
    self._run.keep_best(step, metrics["dev/reward"], params)
    return metrics | answers.wording(rows, prefix="dev/")

  def summarise(self) -> None:
    """Writes the summary of the run, and by what it was selected."""
    if self.score is not None:
      self._run.summarise(prefix="dev/")
      return
    self._run.summarise(
      prefix="eval/",
      title=f"{self._run.workdir}, selected by held-out loss: nothing scores "
      "new replies",
    )
