"""What measurements share: ceilings of a roofline, and tables of results."""

import json
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

flags.DEFINE_string("json", "", "File to write the rows to; empty for none.")
flags.DEFINE_bool(
  "from_results",
  False,
  "Whether to print the tables of benchmarks/results instead of measuring.",
)
flags.DEFINE_float(
  "max_load",
  1.0,
  "Most processes that may have run at the same time in the last minute, the "
  "load of the machine, before anything is measured; 0 measures on any, for "
  "ratios of sides that take turns.",
  0.0,
)
FLAGS = flags.FLAGS

RESULTS = pathlib.Path(__file__).parent / "results"


def seconds(
  run: Callable[[], Any], repeats: int = 5, *, warm: bool = True
) -> list[float]:
  """Wall times of `run`, which blocks until it is done, after a warm-up."""
  if warm:
    run()
  times = []
  for _ in range(repeats):
    start = time.perf_counter()
    run()
    times.append(time.perf_counter() - start)
  return times


def median_ratio(a: list[float], b: list[float]) -> float:
  """Median over pairs of a / b, for runs that were timed in turn."""
  return statistics.median(x / y for x, y in zip(a, b, strict=True))


def matmul_peak(size: int = 2048) -> float:
  """FLOP/s of the best of ten float32 products of two square matrices."""
  x = jax.random.normal(jax.random.key(0), (size, size))
  multiply = jax.jit(jnp.matmul)
  best = min(seconds(lambda: multiply(x, x).block_until_ready(), 10))
  return 2 * size**3 / best


def memory_bandwidth(megabytes: int = 512) -> float:
  """Bytes/s of the best of ten sums over an array that fits no cache."""
  x = jnp.ones(megabytes * 2**20 // 4)
  add = jax.jit(jnp.sum)
  best = min(seconds(lambda: add(x).block_until_ready(), 10))
  return x.nbytes / best


def check_load(most: float) -> None:
  """Prints the load of the machine.

  Args:
    most: of the last minute; 0 for any.

  Raises:
    ValueError: if there is more.
  """
  load = os.getloadavg()[0]
  print(f"load {load:.1f} on {os.cpu_count()} cores", flush=True)
  if most and load > most:
    raise ValueError(
      f"The load of the machine is {load:.1f}, and --max_load={most:g}: wait "
      "until it is quiet, or give --max_load=0 and trust the ratios alone."
    )


def report(
  name: str, titles: Mapping[str, str], measure: Callable[[], Any]
) -> None:
  """Measures, and prints tables; --json keeps what they are made of.

  With --from_results nothing is measured: the tables are those of
  `benchmarks/results/<name>.json`.

  Args:
    name: of the benchmark.
    titles: name of an entry of the results -> title of its table; "" for
      results that are a list of rows.
    measure: makes the results: a list of rows, or a dict of such lists or rows.

  Raises:
    ValueError: if there are no results of this name, or the machine is busy.
  """
  path = RESULTS / f"{name}.json"
  if not FLAGS.from_results:
    check_load(FLAGS.max_load)
    found = measure()
    print(f"load {os.getloadavg()[0]:.1f} at the end")
    if FLAGS.json:
      pathlib.Path(FLAGS.json).write_text(json.dumps(found, indent=2) + "\n")
  elif path.exists():
    found = json.loads(path.read_text())
  else:
    raise ValueError(f"There are no results at {path}: measure with --json.")
  for entry, title in titles.items():
    rows = found[entry] if entry else found
    print_table(title, rows if isinstance(rows, list) else [rows])


def print_table(title: str, rows: list[dict[str, Any]]) -> None:
  """Rows with the same keys as a table."""
  from rich import console, table

  shown = table.Table(title=title, title_justify="left")
  for name in rows[0]:
    shown.add_column(name, justify="right")
  for row in rows:
    cells = ("" if v is None else v for v in row.values())
    shown.add_row(
      *(f"{v:.3g}" if isinstance(v, float) else str(v) for v in cells)
    )
  console.Console(width=120).print(shown)
