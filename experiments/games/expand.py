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
from absl import app, flags

from rljax.distributed import processes
from rljax.tasks import games
from rljax.tasks.games import rules, variants

flags.DEFINE_string("output", None, "A file of JSON lines.", required=True)
for split, number in (("train", 250), ("validation", 24), ("test", 0)):
  flags.DEFINE_integer(
    f"num_{split}", number, f"Games of the split {split}.", lower_bound=0
  )
flags.DEFINE_integer("seed", 0, "Of the changes, and of the games played.")
flags.DEFINE_integer(
  "max_sites", variants.MAX_SITES, "Of a board; larger games are shrunk."
)
flags.DEFINE_float("min_quality", 0.1, "Of a game that is kept, 0 to 1.")
flags.DEFINE_integer("num_games", 32, "Played to measure a game.", 2)
flags.DEFINE_integer("max_plies", 300, "Where a game is stopped.", 2)
flags.DEFINE_integer("max_tries", 0, "Changed games a split; 0: 50 a game.", 0)
flags.DEFINE_float("seconds", 10.0, "Of computing that a game may take.")
flags.DEFINE_float("memory_gb", 2.0, "That a game may take.")
flags.DEFINE_integer("num_workers", 0, "Processes; 0: one per core.", 0)
flags.DEFINE_string("cache", "", "Folder of what was measured; <output>.cache.")
FLAGS = flags.FLAGS


def main(_):
  processes.check_joined()
  numbers = {
    split: FLAGS[f"num_{split}"].value
    # The training games come last: none of them is one of the others.
    for split in reversed(games.SPLITS)
    if FLAGS[f"num_{split}"].value
  }
  check(numbers)
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
  for num in numbers.values():
    variants.check_options(
      num=num, min_quality=FLAGS.min_quality, max_sites=FLAGS.max_sites
    )
  for name in ("seconds", "memory_gb"):
    if not FLAGS[name].value > 0:
      raise ValueError(f"--{name} must be positive, got {FLAGS[name].value}.")
  rules.shipped()  # Is ludax installed?
  os.makedirs(os.path.dirname(FLAGS.output) or ".", exist_ok=True)
  if os.path.isdir(FLAGS.output):
    raise ValueError(f"--output={FLAGS.output} is a folder; name a file.")


if __name__ == "__main__":
  app.run(main)
