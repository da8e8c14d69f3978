"""How long it takes to score descriptions of board games.

  python -m benchmarks.games --json=benchmarks/results/games.json

First the stages that are text alone, in this process: the canonical form, the
grammar and the checks, in texts per second. Then a batch as a policy may write
it: a third are changed games that pass all checks and are compiled and played,
a third are games that fail a check, and a third are no games. All differ, and
none was met before; the workers have started. Seconds of the clock, and those
of computing: on a busy machine the latter tell more.
"""

import collections
import os
import resource
import time

import numpy as np
from absl import app, flags

from benchmarks import machine
from rljax.tasks import games
from rljax.tasks.games import pool as pool_lib
from rljax.tasks.games import rules, variants

SITES = rules.MAX_SITES

flags.DEFINE_integer("batch", 128, "Texts of a batch.")
flags.DEFINE_integer("repeats", 20, "Runs of the stages that are text alone.")
flags.DEFINE_integer("seed", 0, "Of the changes.")
flags.DEFINE_integer("workers", 2, "Processes.")
flags.DEFINE_float("seconds", 20.0, "Of computing that a game may take.")
FLAGS = flags.FLAGS


def main(_):
  titles = {"texts": "Texts alone", "batch": "A batch"}
  machine.report("games", titles, measure_all)


def measure_all():
  sound, faulty, broken = make_texts(FLAGS.batch // 3 + 1, FLAGS.seed)
  shipped = list(rules.shipped().values())
  rows = [
    measure_text("games of ludax", shipped),
    measure_text("a check fails", faulty),
    measure_text("no games", broken),
  ]
  texts = [*sound, *faulty, *broken][: FLAGS.batch]
  return {"texts": rows, "batch": measure_batch(texts)}


def make_texts(num, seed):
  """Changed games: such as pass all checks, fail one, or are no games."""
  rng = np.random.default_rng(seed)
  shipped = games.texts("train")
  donors = variants._Donors()
  for i, text in enumerate(shipped):
    donors.add(text, i)
  found = ({}, {}, {})  # As ordered sets.
  while min(map(len, found)) < num:
    text = shipped[rng.integers(len(shipped))]
    text, _, _ = variants._changed(text, donors, rng, SITES)
    if rng.random() < 0.3:  # A word is missing.
      lexemes = rules.words(text)
      del lexemes[rng.integers(len(lexemes))]
      text = rules.join(lexemes)
    if not rules.progress(text)[1]:
      kind = 2
    else:
      kind = 0 if all(rules.checks(text).values()) else 1
    if text not in shipped:
      found[kind][text] = None
  return [list(texts)[:num] for texts in found]


def measure_text(name, texts):
  """Texts a second of the stages without processes."""
  times = []
  for _ in range(FLAGS.repeats):
    start = time.process_time()
    for text in texts:
      text = rules.canonical(text)
      if rules.progress(text)[1]:
        rules.checks(text)
    times.append(time.process_time() - start)
  return {
    "texts": name,
    "characters": sum(map(len, texts)) / len(texts),
    "texts/s, best": len(texts) / min(times),
    "texts/s, median": len(texts) / float(np.median(times)),
  }


def measure_batch(texts):
  """One batch, behind the start of the workers."""
  options = {"num_workers": FLAGS.workers, "seconds": FLAGS.seconds}
  pool = pool_lib._pool(FLAGS.seconds, 2.0, FLAGS.workers)
  warm = rules.shipped()["tic_tac_toe"]
  games.score_batch(
    [games.WHOLE] * 2, [warm, warm.replace('" 3', '" 2')], **options
  )
  start, own = time.perf_counter(), time.process_time()
  _, parts = games.score_batch([games.WHOLE] * len(texts), texts, **options)
  seconds, own = time.perf_counter() - start, time.process_time() - own
  pool.close()  # Now the system tells what the workers have used.
  used = resource.getrusage(resource.RUSAGE_CHILDREN)
  return {
    "texts": len(texts),
    "reaching the compiler": sum(part["passes_checks"] for part in parts),
    "workers": FLAGS.workers,
    "seconds": seconds,
    "own computing": own,
    "workers' computing, with start": used.ru_utime + used.ru_stime,
    "load": os.getloadavg()[0],
    "stages": ", ".join(
      f"{n} {stage}"
      for stage, n in sorted(
        collections.Counter(part["stage"] for part in parts).items()
      )
    ),
  }


if __name__ == "__main__":
  app.run(main)
