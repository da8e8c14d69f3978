"""How many answers to word problems are judged in a second.

  python -m benchmarks.verdicts --json=benchmarks/results/verdicts.json

Plain numbers are compared in this process, by exact arithmetic; expressions by
math-verify in worker processes. The problems are made up here: four lines of
sums each, with calculator notes, so that a reply to them is as long as one to
GSM8K. Rates of the plain path are the best of `--repeats` runs; numbers that
were read before are remembered, except where the row says "cold". Those of
math-verify are of one run over expressions that are all different, behind the
start of the workers, and of runs that have met them. Seconds of the clock, and
of this process alone: on a busy machine the latter tell more. The load is how
many processes wanted a core in the minute before.
"""

import os
import pathlib
import tempfile
import time

import numpy as np
from absl import app, flags

from benchmarks import machine
from rljax.tasks import math_word_problems
from rljax.tasks.answers import comparison, numbers
from rljax.text import files

flags.DEFINE_integer("plain", 5_000, "Replies of the plain path.")
flags.DEFINE_integer("expressions", 400, "Replies that math-verify judges.")
flags.DEFINE_integer("repeats", 20, "Runs of the plain path.")
FLAGS = flags.FLAGS


def main(_):
  machine.report("verdicts", {"": "Verdicts a second"}, measure_all)


def measure_all():
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "gsm8k_test.jsonl"
    files.write_jsonl(path, make_problems(FLAGS.plain))
    pairs = math_word_problems.supervised("test", 0, data=folder)
  prompts, solutions = zip(*pairs, strict=True)
  answers = [text.rpartition("#### ")[2] for text in solutions]
  steps = [text.rpartition("\n#### ")[0] for text in solutions]
  rows = [
    measure("four steps, ####", prompts, solutions),
    measure("four steps, ####, cold", prompts, solutions, cold=True),
    measure("#### alone", prompts, [f"#### {n}" for n in answers]),
    measure("boxed", prompts, [rf"So it is \boxed{{{n}}}." for n in answers]),
    measure("answer is", prompts, [f"The answer is {n}." for n in answers]),
    measure("last number", prompts, [f"That is {n}." for n in answers]),
    measure("four steps, last number", prompts, steps),
    measure(
      "four steps, answer is",
      prompts,
      [f"{s}\nThe answer is {n}." for s, n in zip(steps, answers, strict=True)],
    ),
    measure(
      "four steps, boxed",
      prompts,
      [
        rf"{s}\nIt is $\boxed{{{n}}}$."
        for s, n in zip(steps, answers, strict=True)
      ],
    ),
  ]
  num = FLAGS.expressions
  replies = [
    rf"It is $\boxed{{{n} \times \sqrt{{{(i + 1) ** 2}}} / {i + 1}}}$"
    for i, n in enumerate(answers[:num])
  ]
  # The workers start, and import sympy.
  math_word_problems.score(prompts[0], "#### 1+1")
  new = measure("math-verify, new", prompts[:num], replies, repeats=1)
  rows.append(new | {"per own second": None})  # The workers did it.
  rows.append(measure("math-verify, met before", prompts[:num], replies))
  return rows


def make_problems(num):
  """Rows as GSM8K has them, all different."""
  rng = np.random.default_rng(0)
  for i in range(num):
    total, lines = int(rng.integers(10, 1000)), []
    for x in map(int, rng.integers(10, 1000, 4)):
      lines.append(
        f"Then there come {x} more of them, and {total}+{x} = "
        f"<<{total}+{x}={total + x}>>{total + x} are on the table."
      )
      total += x
    yield {
      "question": f"How many are on the table number {i}?",
      "answer": "\n".join([*lines, f"#### {total}"]),
    }


def measure(name, prompts, replies, *, cold=False, repeats=None):
  """Verdicts a second on replies that are all right."""
  times, own_times = [], []
  for _ in range(repeats or FLAGS.repeats):
    if cold:
      numbers.number.cache_clear()
      comparison.compare.cache_clear()
    start, own_start = time.perf_counter(), time.process_time()
    scores, _ = math_word_problems.score_batch(prompts, replies)
    times.append(time.perf_counter() - start)
    own_times.append(time.process_time() - own_start)
  return {
    "reply": name,
    "characters": sum(map(len, replies)) / len(replies),
    "replies": len(replies),
    "right": sum(scores) / len(scores),
    "verdicts/s": len(replies) / min(times),
    "per own second": len(replies) / min(own_times),
    "load": os.getloadavg()[0],
  }


if __name__ == "__main__":
  app.run(main)
