"""Numbers as the cells of a table."""

from collections.abc import Iterable, Mapping

import numpy as np


def interval(numbers: tuple[float, float, float]) -> str:
  """Writes a mean with the low and the high end of its interval."""
  mean, low, high = numbers
  return f"{mean:.3f} [{low:.3f}, {high:.3f}]"


def mean_and_range(seeds: Iterable[Mapping[str, float]]) -> dict[str, str]:
  """Averages columns over seeds, with the lowest and highest of several.

  Args:
    seeds: column to number, of each seed; all have the same columns.

  Returns:
    Column to "mean" for one seed, and "mean [lowest, highest]" for several.
  """
  table, seeds = {}, list(seeds)
  for name in seeds[0]:
    values = [float(seed[name]) for seed in seeds]
    table[name] = f"{np.mean(values):.3f}"
    if len(values) > 1:
      table[name] += f" [{min(values):.3f}, {max(values):.3f}]"
  return table
