"""What a difference of two arms shows, over questions and over seeds.

Two kinds of chance are kept apart. The *questions* of a test are drawn, and a
test over those of all seeds tells whether the trained policies differ. The
*seeds* draw the training too; with three of them a difference must be 4.3
standard errors from 0 for p < .05, as two standard errors are p = .18.
"""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from rljax.evaluation import metrics

LEVEL = 0.95


class Difference(NamedTuple):
  """Of two arms.

  Attributes:
    mean: over seeds.
    by_seed: `[S]`, in each.
    low, high: ends of the t interval over seeds, at 95 %.
    p_seeds: two-sided p-value of the t test over seeds.
    p_questions: two-sided p-value over the questions of all seeds; None where
      the results do not say which ones were answered right.
  """

  mean: float
  by_seed: np.ndarray
  low: float
  high: float
  p_seeds: float
  p_questions: float | None = None

  @property
  def p(self) -> float:
    """Of the test over questions; of that over seeds where there is none."""
    return self.p_seeds if self.p_questions is None else self.p_questions

  @property
  def is_above(self) -> bool:
    """Whether it is larger than 0, at the level of 5 %."""
    return self.mean > 0 and self.p < 1 - LEVEL

  @property
  def is_below(self) -> bool:
    """Whether it is smaller than 0, at the level of 5 %."""
    return self.mean < 0 and self.p < 1 - LEVEL

  def __str__(self) -> str:
    """Writes mean, test over questions, seeds, and t interval with its df."""
    sign = "-" if self.mean < 0 else "+"
    over = "" if self.p_questions is None else f"{p_value(self.p_questions)}, "
    return (
      f"{sign}{number(abs(self.mean))} ({over}seeds "
      f"{' '.join(number(x) for x in self.by_seed)}, "
      f"t({len(self.by_seed) - 1}) [{number(self.low)}, {number(self.high)}])"
    )


def over_seeds(a: Sequence[float], b: Sequence[float]) -> Difference:
  """Compares two arms by a number that each seed has of both.

  Args:
    a: `[S]`, of one arm.
    b: `[S]`, of the other, in the order of the same seeds.
  """
  gaps = np.asarray(a, float) - np.asarray(b, float)
  mean, freedom = float(gaps.mean()), len(gaps) - 1
  if freedom < 1:
    return Difference(mean, gaps, -math.inf, math.inf, math.nan)
  error = gaps.std(ddof=1) / math.sqrt(len(gaps))
  half = error * stats.t.ppf((1 + LEVEL) / 2, freedom)
  p_seeds = 2 * stats.t.sf(abs(mean) / error, freedom) if error else math.nan
  return Difference(mean, gaps, mean - half, mean + half, float(p_seeds))


def paired(a: Sequence[str], b: Sequence[str]) -> Difference:
  """Compares two arms by which questions each has answered right.

  Args:
    a: for each seed a text of "1" (right) and "0" for each question.
    b: likewise, of the other arm, for the same questions.

  Returns:
    The difference, with McNemar's exact test over the questions of all seeds.
  """
  by_seed = [
    [np.array(list(seed)) == "1" for seed in seeds] for seeds in (a, b)
  ]
  means = [[seed.mean() for seed in seeds] for seeds in by_seed]
  _, p_questions = metrics.mcnemar(*map(np.concatenate, by_seed))
  return over_seeds(*means)._replace(p_questions=p_questions)


def p_value(p: float) -> str:
  """Writes a p-value."""
  if p < 1e-9:
    return "p < 1e-9"
  return f"p = {number(p, 2)}" if p >= 0.01 else f"p = {p:.0e}"


def number(value: float, decimals: int = 3) -> str:
  """Writes a number without the zero in front of the point."""
  text = f"{value:,.{decimals}f}"
  if not text.strip("-0."):
    text = text.removeprefix("-")
  return re.sub(r"^(-?)0\.", r"\1.", text)
