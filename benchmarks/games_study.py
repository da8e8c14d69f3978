"""The study of board games: what the policies write, before and after training.

  python -m benchmarks.games_study --runs=runs/games --seeds=0,1,2
  python -m benchmarks.games_study --from_results  # the same tables again

The first gathers what launch/games_study.sh left, into
benchmarks/results/games_study.json; the second prints the table from that file
alone. Of each policy one response to each prompt was drawn, at temperature 1.
Shares are of all responses; novelty is the mean over games that can be played,
and a response is new and good if its game is good, can be played, and differs
from all of the corpus in 5 % of its words or more. A response without an end is
scored as it stands, where training gives it 0. Numbers are means over seeds
with the lowest and the highest. A good game is one that either side wins at
times and that lasts two plies; up to half of its playouts may be stuck. A
playable one lasts four plies and is stuck in a tenth of them at most. So a game
can be good and not playable.
"""

import json
import math
import pathlib

import numpy as np
from absl import app, flags

from benchmarks import comparisons
from rljax.evaluation import curves
from rljax.text import files

RESULTS = pathlib.Path(__file__).parent / "results"
NEW = 0.05  # Distance to the corpus.
POLICIES = {
  "start": "before SFT",
  "sft": "after SFT",
  "ppo": "after PPO",
  "ppo_grammar": "after PPO within the grammar",
}
COLUMNS = {
  "parses": "parsing",
  "passes_checks": "passing checks",
  "compiles": "compiling",
  "is_playable": "playable",
  "is_good": "good",
  "new": "new and good",
  "different": "different of them",
  "novelty": "novelty of playable",
  "reward": "reward",
}
# Shares of responses, which are known one by one, and who is compared.
COMPARED = ("parses", "is_playable", "is_good", "new")
PAIRS = (("ppo", "sft"), ("ppo_grammar", "sft"), ("ppo_grammar", "ppo"))

flags.DEFINE_string("runs", "runs/games", "Where the study is.")
flags.DEFINE_list("seeds", ["0", "1", "2"], "Of the study.")
flags.DEFINE_list("constraints", ["none", "grammar"], "Of the evaluations.")
flags.DEFINE_string("out", str(RESULTS / "games_study.json"), "Results.")
flags.DEFINE_bool("from_results", False, "Read --out instead of --runs.")
FLAGS = flags.FLAGS


def main(_):
  out = pathlib.Path(FLAGS.out)
  if FLAGS.from_results:
    found = json.loads(out.read_text())
  else:
    found = gather(pathlib.Path(FLAGS.runs), FLAGS.seeds, FLAGS.constraints)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=2) + "\n")
  for line in table(found):
    print(line)
  print("\nDifferences, with a test over the responses and a t interval\n")
  for line in differences_table(found):
    print(line)
  print("\nPPO, samples of the first and the last five steps\n")
  for line in training_table(found):
    print(line)


def gather(runs, seeds, constraints):
  """Numbers of all evaluations, by constraint, policy and metric by seed."""
  evaluations = {
    constraint: {policy: [] for policy in POLICIES}
    for constraint in constraints
  }
  for constraint in constraints:
    for seed in seeds:
      path = runs / seed / constraint / "samples.jsonl"
      rows = files.read_jsonl(
        path, required=("arm", "prompt", "reward", "parts")
      )
      prompts = None
      for policy, found in evaluations[constraint].items():
        own = [row for row in rows if row["arm"] == policy]
        if not own:
          raise ValueError(f"{path} has no response of the policy {policy!r}.")
        if prompts not in (None, [row["prompt"] for row in own]):
          raise ValueError(
            f"{path}: {policy!r} has answered other prompts than the policies "
            "before it, so that their responses cannot be paired."
          )
        prompts = [row["prompt"] for row in own]
        found.append(measure(own))
  return {
    "seeds": list(seeds),
    "evaluations": {
      constraint: {
        policy: {name: [row[name] for row in found] for name in found[0]}
        for policy, found in policies.items()
      }
      for constraint, policies in evaluations.items()
    },
    "training": {
      arm: [ends(runs / seed / arm / "metrics.jsonl") for seed in seeds]
      for arm in ("ppo", "ppo_grammar")
    },
  }


def measure(rows):
  """Shares and means over the responses of one policy."""
  parts = [row["parts"] for row in rows]
  playable = [part for part in parts if part["is_playable"]]
  new = [part["game"] for part in parts if is_new(part)]
  return {
    "responses": len(rows),
    **{
      name: mean(part[name] for part in parts)
      for name in (
        *("parses", "passes_checks", "compiles", "is_playable", "is_good"),
      )
    },
    "new": len(new) / max(len(rows), 1),
    "different": len(set(new)) / max(len(rows), 1),
    # Nothing can be said of the novelty of games that are none.
    "novelty": mean(part["novelty"] for part in playable),
    "reward": mean(row["reward"] for row in rows),
    "verdicts": verdicts_of(rows),
  }


def is_new(part):
  """Whether a game is good, can be played, and differs from the corpus."""
  return part["is_playable"] and part["is_good"] and part["novelty"] >= NEW


def verdicts_of(rows):
  """For each share a text with "1" for a prompt whose response has it."""
  return {
    name: "".join(
      str(int(is_new(row["parts"]) if name == "new" else row["parts"][name]))
      for row in rows
    )
    for name in COMPARED
  }


def mean(values):
  """None for no values, which JSON can hold."""
  values = list(values)
  return float(np.mean(values)) if values else None


def ends(path):
  """What the first and the last steps of a run of PPO sampled."""
  metrics = curves.read_metrics(path)
  names = {"reward/mean": "reward"} | {
    f"task/{name}": name
    for name in ("parses", "compiles", "is_playable", "is_good")
  }
  return {
    title: [float(np.nanmean(metrics[name][1][part])) for part in PARTS]
    for name, title in names.items()
    if name in metrics
  } | {"step_seconds": float(np.nanmedian(metrics["step_seconds"][1]))}


PARTS = (slice(None, 5), slice(-5, None))


def table(found):
  """A table in Markdown, a line a policy and constraint."""
  yield "| policy | constraint | " + " | ".join(COLUMNS.values()) + " |"
  yield "| --- " * (len(COLUMNS) + 2) + "|"
  for constraint, policies in found["evaluations"].items():
    for policy, metrics in policies.items():
      cells = [show(metrics[name]) for name in COLUMNS]
      yield (
        f"| {POLICIES[policy]} | {constraint} | " + " | ".join(cells) + " |"
      )


def differences_table(found):
  """What PPO changes, in Markdown: the responses of all seeds, and the seeds.

  All policies have answered the same prompts, so that the test pairs their
  responses: McNemar's, over the prompts of all seeds.
  """
  yield "| constraint | | " + " | ".join(map(COLUMNS.get, COMPARED)) + " |"
  yield "| --- " * (len(COMPARED) + 2) + "|"
  for constraint, policies in found["evaluations"].items():
    for policy, other in PAIRS:
      a, b = policies[policy]["verdicts"], policies[other]["verdicts"]
      cells = [
        str(comparisons.paired(*([seed[name] for seed in x] for x in (a, b))))
        for name in COMPARED
      ]
      yield (
        f"| {constraint} | {POLICIES[policy]} minus {POLICIES[other]} | "
        + " | ".join(cells)
        + " |"
      )


def training_table(found):
  """What PPO sampled at its start and its end, by metric."""
  (first, *_), *_ = found["training"].values()
  names = [name for name in first if name != "step_seconds"]
  yield "| | | " + " | ".join(names) + " |"
  yield "| --- " * (len(names) + 2) + "|"
  for arm, seeds in found["training"].items():
    for i, title in enumerate(("first steps", "last steps")):
      cells = [show([seed[name][i] for seed in seeds]) for name in names]
      yield f"| {POLICIES[arm]} | {title} | " + " | ".join(cells) + " |"


def show(values):
  """Mean, lowest and highest of the seeds that have a number."""
  values = [v for v in values if v is not None and math.isfinite(v)]
  if not values:
    return "-"
  text = f"{np.mean(values):.2f}"
  if len(values) > 1:
    text += f" [{min(values):.2f}, {max(values):.2f}]"
  return text


if __name__ == "__main__":
  app.run(main)
