"""How many samples are aligned with their rewrites in a minute, on one core.

  python -m benchmarks.edits

The rewrites are the samples with one token in fifteen replaced, removed or
added, so that the tables are full and the paths through them are not trivial.
Beside it the same table by two plain loops, which find the distance alone, and
`rapidfuzz`, compiled code, where it is installed: it has the distance and some
path, not the one that the modes ask for. Seconds of this process, the best of
`--repeats` runs.
"""

import json
import time

import numpy as np
from absl import app, flags

from benchmarks import machine
from rljax.text import alignment

flags.DEFINE_integer("pairs", 1_000, "Pairs that are aligned in one call.")
flags.DEFINE_integer("plain", 5, "Pairs of the plain loops.")
flags.DEFINE_list("tokens", ["20", "300"], "Lengths of the samples.")
flags.DEFINE_integer("repeats", 3, "Runs, of which the best counts.")
FLAGS = flags.FLAGS


def main(_):
  machine.report("edits", {"": "Alignments on one core"}, measure_all)


def measure_all():
  return [row for length in map(int, FLAGS.tokens) for row in measure(length)]


def measure(length):
  """Rows of the table for samples of one length."""
  samples, rewrites = make_pairs(FLAGS.pairs, length)
  lists = [
    (x.tolist(), y.tolist()) for x, y in zip(samples, rewrites, strict=True)
  ]
  few = lists[: FLAGS.plain]
  sides = {
    "align_pairs": lambda: [
      one.distance for one in alignment.align_pairs(samples, rewrites)
    ],
    "align_pairs, reference": lambda: [
      one.distance
      for one in alignment.align_pairs(samples, rewrites, mode="reference")
    ],
    "distances": lambda: alignment.distances(samples, rewrites).tolist(),
    "align, one by one": lambda: [
      alignment.align(*pair).distance for pair in few
    ],
    "plain loops": lambda: [double_loop(*pair) for pair in few],
  }
  try:
    from rapidfuzz.distance import Levenshtein

    sides["rapidfuzz"] = lambda: [
      len(Levenshtein.editops(*pair)) for pair in lists
    ]
  except ImportError:
    print("rapidfuzz is not installed.")
  expected = sides["plain loops"]()
  rows = []
  for name, run in sides.items():
    times = []
    for _ in range(FLAGS.repeats):
      start = time.process_time()
      found = run()
      times.append(time.process_time() - start)
    if found[: len(expected)] != expected:
      raise ValueError(f"{name} counts other edits than the plain loops.")
    rows.append(
      {
        "by": name,
        "tokens": length,
        "pairs": len(found),
        "us/pair": min(times) / len(found) * 1e6,
        "pairs/minute": round(60 * len(found) / min(times)),
      }
    )
    print(json.dumps(rows[-1]), flush=True)
  return rows


def make_pairs(num_pairs, length):
  """Samples, and rewrites with `length // 15` random edits."""
  rng = np.random.default_rng(0)
  vocab_size = 50_000
  samples = list(rng.integers(0, vocab_size, (num_pairs, length)))
  rewrites = []
  for sample in samples:
    rewrite = sample.tolist()
    for _ in range(length // 15):
      at, kind = rng.integers(len(rewrite)), rng.integers(3)
      new = [int(rng.integers(vocab_size))]
      # Replaced, removed, added.
      rewrite[at : at + (kind < 2)] = [] if kind == 1 else new
    rewrites.append(np.array(rewrite))
  return samples, rewrites


def double_loop(sample, rewrite):
  """The distance, row by row."""
  last = list(range(len(rewrite) + 1))
  for i, x in enumerate(sample, 1):
    this = [i]
    for j, y in enumerate(rewrite, 1):
      this.append(min(last[j - 1] + (x != y), last[j] + 1, this[j - 1] + 1))
    last = this
  return last[-1]


if __name__ == "__main__":
  app.run(main)
