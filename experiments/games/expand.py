"""New board games from the few that ludax ships, for `--task=games`.

A file of training, validation and test games on small boards, for a study on
two CPU cores; about two seconds of computing for each game that is played:
  python experiments/games/expand.py --output=runs/corpus.jsonl \
    --num_train=250 --num_validation=24 --num_workers=2

Each split comes from shipped games of its own, and no game of one is in
another. Every game is compiled and played in a worker process with limits; what
was measured is kept in --cache, so that a run that was stopped goes on where it
was, and writes the same file. Scripts read it by
--task_options=corpus=runs/corpus.jsonl.
"""

import os
import time

import numpy as np
from absl import flags

from rljax import cli
from rljax.distributed import processes
from rljax.storage import locks
from rljax.tasks import games
from rljax.tasks.games import rules, variants

flags.DEFINE_string(
  "output",
  None,
  "File of the games that are made, in JSON lines.",
  required=True,
)
for split, number in (("train", 250), ("validation", 24), ("test", 0)):
  flags.DEFINE_integer(
    f"num_{split}",
    number,
    f"Games of the split {split}; 0 makes none.",
    lower_bound=0,
  )
flags.DEFINE_integer(
  "seed", 0, "Seed of every source of randomness.", lower_bound=0
)
flags.DEFINE_integer(
  "max_sites",
  variants.MAX_SITES,
  "Most sites of a board; games with more are shrunk.",
  lower_bound=variants.MIN_SITES,
  upper_bound=rules.MAX_SITES,
)
flags.DEFINE_float(
  "min_quality",
  0.1,
  "Least quality of a game that is kept, in [0, 1].",
  lower_bound=0,
  upper_bound=1,
)
flags.DEFINE_integer(
  "num_games", 32, "Games that are played to measure one.", lower_bound=2
)
flags.DEFINE_integer(
  "max_plies", 300, "Moves after which a game is stopped.", lower_bound=2
)
flags.DEFINE_integer(
  "max_tries",
  0,
  "Changed games that are tried for a split; 0: 50 for each that is wanted.",
  lower_bound=0,
)
flags.DEFINE_float(
  "seconds",
  10.0,
  "Seconds of computing that measuring a game may take; above 0.",
  lower_bound=1e-3,
)
flags.DEFINE_float(
  "memory_gb",
  2.0,
  "Gigabytes of memory that a game may take; above 0.",
  lower_bound=1e-3,
)
flags.DEFINE_integer(
  "num_workers",
  0,
  "Processes in which games are played; 0 takes one for each core.",
  lower_bound=0,
)
flags.DEFINE_string(
  "cache",
  "",
  "Folder of what was measured, for a run that is started again; empty: that "
  "of --output, with .cache behind its name.",
)
FLAGS = flags.FLAGS


def main():
  processes.check_joined()
  numbers = {
    split: FLAGS[f"num_{split}"].value
    # The training games come last: none of them is one of the others.
    for split in reversed(games.SPLITS)
    if FLAGS[f"num_{split}"].value
  }
  check(numbers)
  lock = locks.beside(FLAGS.output)  # Its cache is this script's alone, too.
  rows = []
  for split, num in numbers.items():
    started = time.perf_counter()

    def tell(num_kept, num_played, split=split, num=num, started=started):
      seconds = time.perf_counter() - started
      print(
        f"{split}: {num_kept} of {num} games, {num_played} played, "
        f"{seconds:.0f} s, {seconds / max(num_kept, 1):.1f} s a game",
        flush=True,
      )

    rows += variants.expand(
      num=num,
      split=split,
      seed=FLAGS.seed,
      min_quality=FLAGS.min_quality,
      max_sites=FLAGS.max_sites,
      num_games=FLAGS.num_games,
      max_plies=FLAGS.max_plies,
      max_tries=FLAGS.max_tries or None,
      apart_from=[row["text"] for row in rows],
      cache=FLAGS.cache or f"{FLAGS.output}.cache",
      seconds=FLAGS.seconds,
      memory_gb=FLAGS.memory_gb,
      num_workers=FLAGS.num_workers or None,
      progress=tell,
    )
  variants.write(FLAGS.output, rows)
  lock.close()
  for split in numbers:
    kept = [row for row in rows if row["split"] == split]
    gaps = len(games.prompts(split, 0, corpus=FLAGS.output))
    quality, plies, words = (
      np.median(values)
      for values in (
        [row["quality"] for row in kept],
        [row["plies"] for row in kept],
        [len(rules.words(row["text"])) for row in kept],
      )
    )
    print(
      f"{FLAGS.output}: {len(kept)} games for {split} with {gaps} prompts; "
      f"medians: quality {quality:.2f}, {plies:.0f} plies, {words:.0f} words"
    )


def check(numbers):
  """Says what is wrong with the flags before any worker starts."""
  if not numbers:
    raise ValueError("--num_train, --num_validation and --num_test are all 0.")
  rules.shipped()  # Is ludax installed?
  os.makedirs(os.path.dirname(FLAGS.output) or ".", exist_ok=True)
  if os.path.isdir(FLAGS.output):
    raise ValueError(f"--output={FLAGS.output} is a folder; name a file.")


if __name__ == "__main__":
  cli.run(main)
