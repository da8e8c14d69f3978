"""Draws the best new games among samples: a position, the rules, the numbers.

Of a run of PPO, whose samples.jsonl has the games that its policy wrote:
  python experiments/games/draw.py --samples=runs/games/samples.jsonl \
    --output=runs/games/games.html --corpus=runs/corpus.jsonl

Also of an evaluation, where --arm names one of several policies. New are games
that are no copies of those of ludax or of --corpus; the best have the highest
reward and can be played, and no two that are drawn are almost the same. Each is
played for a while, at random, in a worker process with limits.
"""

import os

from absl import flags

from rljax import cli
from rljax.distributed import processes
from rljax.storage import locks
from rljax.tasks import games
from rljax.tasks.games import pages, pool, rewards, rules
from rljax.text import files

flags.DEFINE_list(
  "samples",
  None,
  "Files of samples whose games are drawn, separated by commas: samples.jsonl "
  "of runs or evaluations.",
  required=True,
)
flags.DEFINE_string(
  "output", None, "File of the page that is written, in HTML.", required=True
)
flags.DEFINE_string(
  "corpus",
  "",
  "File of known games, of experiments/games/expand.py; empty: those of ludax "
  "alone are known.",
)
flags.DEFINE_string(
  "arm",
  "",
  "Policy of an evaluation whose samples are taken; empty takes those of all.",
)
flags.DEFINE_string(
  "title", "The best new games", "Title at the head of the page."
)
flags.DEFINE_integer("num", 12, "Most games that are drawn.", lower_bound=1)
flags.DEFINE_float(
  "min_novelty",
  0.05,
  "Least share of words in which a game differs from all known ones.",
  lower_bound=0,
  upper_bound=1,
)
flags.DEFINE_float(
  "apart",
  0.1,
  "Least share of words in which two games that are drawn differ.",
  lower_bound=0,
  upper_bound=1,
)
flags.DEFINE_integer(
  "max_sites",
  rules.MAX_SITES,
  "Most sites of a board; games with more are not drawn.",
  lower_bound=1,
)
flags.DEFINE_integer(
  "seed", 0, "Seed of every source of randomness.", lower_bound=0
)
flags.DEFINE_float(
  "seconds",
  20.0,
  "Seconds of computing that the moves of a drawn game may take; above 0.",
  lower_bound=1e-3,
)
flags.DEFINE_integer(
  "num_workers",
  0,
  "Processes in which games are played; 0 takes one for each core.",
  lower_bound=0,
)
FLAGS = flags.FLAGS


def main():
  processes.check_joined()
  os.makedirs(os.path.dirname(FLAGS.output) or ".", exist_ok=True)
  lock = locks.beside(FLAGS.output)
  known = names_of_known()
  rows = [
    row
    for name in FLAGS.samples
    for row in files.read_jsonl(name, required=("reward", "parts"))
    if not FLAGS.arm or row.get("arm") == FLAGS.arm
  ]
  if not rows:
    raise ValueError(
      f"{','.join(FLAGS.samples)} has no sample"
      + (f" of the policy {FLAGS.arm}." if FLAGS.arm else ".")
    )
  texts, found = list(known), []
  novelty = rules.Novelty(texts)
  good = [row for row in rows if is_good(row["parts"])]
  for row in sorted(good, key=lambda row: -row["reward"]):
    if len(found) == FLAGS.num:
      break
    text = rules.neutral(row["parts"]["game"])
    distance, closest = novelty.closest(text)
    if distance < FLAGS.min_novelty:
      continue
    others = [game.text for game in found]
    if others and rules.Novelty(others)(text) < FLAGS.apart:
      continue
    parts = row["parts"]
    facts = {"reward": float(row["reward"])} | {
      title: float(parts[name])
      for name, title in (
        ("balance", "balance"),
        ("decisive", "decided"),
        ("plies", "plies"),
        ("branching", "moves a ply"),
      )
    }
    facts["novelty"] = distance
    if "step" in row:
      facts["step"] = int(row["step"])
    nearest = texts[closest]
    found.append(pages.Game(text, None, "", facts, nearest, known[nearest]))

  # A position in the second half of a usual game.
  plies = [max(2, round(0.6 * game.facts["plies"])) for game in found]
  boards = pool.positions(
    [game.text for game in found],
    plies,
    seed=FLAGS.seed,
    seconds=FLAGS.seconds,
    num_workers=FLAGS.num_workers or None,
  )
  drawn = [
    pages.Game(
      game.text,
      board.get("board"),
      caption(board),
      game.facts,
      game.closest,
      game.closest_name,
    )
    for game, board in zip(found, boards, strict=True)
  ]
  different = {row["parts"]["game"] for row in good}
  pages.write(
    FLAGS.output,
    FLAGS.title,
    drawn,
    [
      f"Of {len(rows)} samples {len(good)} are good games, {len(different)} of "
      f"them different, and {len(drawn)} are shown. Novelty is the share of "
      f"words in which a game differs from the closest of {len(texts)} known "
      "ones. The numbers on a board are those by which rules name its sites."
    ],
  )
  lock.close()
  print(f"{FLAGS.output}: {len(drawn)} games of {len(rows)} samples")


def caption(board):
  """What a position is, or why there is none."""
  if board["stage"] == "played":
    return f"after {board['plies']} random moves"
  reasons = {"timeout": "out of time", "memory": "out of memory"}
  return f"not played: {reasons.get(board['stage'], 'an error')}"


def is_good(parts):
  """Whether a sample is a game that can be drawn, and is good."""
  text = parts.get("game")
  return (
    bool(parts.get("is_playable"))
    and bool(parts.get("is_good"))
    and isinstance(text, str)
    and rules.canonical(text) == text
    and rules.progress(text)[1]
    and all(rules.checks(text, max_sites=FLAGS.max_sites).values())
    and set(rewards.unread("")) <= set(parts)
  )


def names_of_known():
  """Texts of the known games, all different, with their names."""
  known = {}
  for name, text in rules.shipped().items():
    known.setdefault(rules.neutral(text), name.replace("_", " "))
  if FLAGS.corpus:
    for row in games.corpus_rows(FLAGS.corpus):
      known.setdefault(row["text"], row.get("name", row["split"]))
  return known


if __name__ == "__main__":
  cli.run(main)
