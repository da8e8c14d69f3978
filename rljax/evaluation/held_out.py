"""Averages the metrics of a loss over held-out rows."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np


def means(
  metrics_of: Callable[[np.ndarray], Mapping[str, Any]],
  num_rows: int,
  batch_size: int,
) -> dict[str, float]:
  """Returns the loss, and the accuracy if there is one, over all rows.

  All batches have one size, so that the loss compiles once: the last one is
  filled up with the first rows.

  Args:
    metrics_of: takes the numbers of a batch's rows, and returns metrics, of
      which "<name>/loss" and "<name>/accuracy" are means over the batch.
    num_rows: N.
    batch_size: rows at the same time.

  Returns:
    "eval/loss" and "eval/accuracy".
  """
  found = {}
  for start in range(0, num_rows, batch_size):
    rows = np.arange(start, start + batch_size) % num_rows
    for name, value in jax.device_get(metrics_of(rows)).items():
      last = name.rpartition("/")[2]
      if last in ("loss", "accuracy"):
        found.setdefault(f"eval/{last}", []).append(float(value))
  return {name: float(np.mean(values)) for name, values in found.items()}
