"""The study of RLMEC: accuracies, the reward model, and what was expected.

  python -m benchmarks.rlmec --runs=runs/rlmec --seeds=0,1,2
  python -m benchmarks.rlmec --from_results    # the same tables, from the file

The first gathers what launch/rlmec_study.sh left, into
benchmarks/results/rlmec.json and rlmec.png; the second prints the tables and
the checks from that file alone.

A difference of two arms is over the test questions of all seeds, which both
have answered; its interval is the 95 % bootstrap interval over these questions,
its p-value McNemar's. Both hold the chance of the questions, not that of the
training: the seeds beside them tell of that, and their t interval, t(2) of two
degrees of freedom.
"""

import json
import os
import pathlib
import platform

import jax
import numpy as np
from absl import app, flags

from benchmarks import comparisons
from benchmarks.comparisons import number
from rljax.evaluation import curves, metrics
from rljax.tasks import chains
from rljax.text import alignment as alignment_lib
from rljax.text import files

RESULTS = pathlib.Path(__file__).parent / "results"

flags.DEFINE_string("runs", "runs/rlmec", "Where the study is.")
flags.DEFINE_list("seeds", ["0", "1", "2"], "Of the study.")
flags.DEFINE_string(
  "out", str(RESULTS / "rlmec.json"), "Results; the picture lies beside them."
)
flags.DEFINE_bool("from_results", False, "Read --out instead of --runs.")
FLAGS = flags.FLAGS

START = "start"
METHODS = {
  START: "start",
  "rlmec": "RLMEC",
  "sft_right": "SFT on right samples (RFT)",
  "sft_gold": "SFT on gold solutions",
}
# At the one setting that was tried first: no measure of these methods.
UNTUNED = {
  "dpo": "DPO, rewrite over sample",
  "ppo": "PPO, one reward a sequence",
}
PARTS = {
  "rlmec": "RLMEC",
  "no_token_rewards": "no token rewards",
  "uniform_weights": "edited tokens weigh no more",
  "gold_instead": "gold imitated, not the rewrite",
  "sequence_reward": "one reward a sequence",
  "oracle_reward": "rewards of the rewrite's edits",
  "surrogate": "PPO's clipped loss",
  "no_imitation": "no imitation",
  "sequence_no_imitation": "one reward, no imitation",
  "surrogate_no_imitation": "PPO's clipped loss, no imitation",
}
GROUPS = {"methods": METHODS, "parts taken away": PARTS, "not tuned": UNTUNED}
TITLES = METHODS | PARTS | UNTUNED
BASELINES = (START, "rlmec", "no_token_rewards", "no_imitation")
LAST = 20  # Updates whose metrics are taken together.
# Numbers of a seed's reward model -> title and decimals.
MODEL_ROWS = {
  "samples": ("samples drawn", 0),
  "distinct": ("different ones", 0),
  "wrong": ("wrong ones among these", 0),
  "held-out loss": ("held-out loss (nats a token)", 3),
  "first wrong step": ("first wrong step found, held-out questions", 3),
  "verified": ("rewrites that are right, all questions", 3),
  "verified, unseen": ("rewrites that are right, unseen questions", 3),
  "as near, unseen": ("right with the fewest edits, unseen questions", 3),
  "same text, unseen": ("the task's own rewrite, unseen questions", 3),
  "samples kept": ("samples kept", 3),
  "supervision, wrong": ("wrong samples to learn from", 0),
  "supervision, right": ("right samples to learn from", 0),
  "distance, smallest": ("edits, fewest possible", 2),
  "distance": ("edits to the rewrite", 2),
  "distance to gold": ("edits to the gold solution", 2),
  "precision": ("penalised tokens that the fewest edits change", 3),
  "recall": ("tokens changed by the fewest edits: penalised", 3),
  "chance": ("precision by chance", 3),
  "flagged": ("recall by chance: tokens that are penalised", 3),
  "precision, own rewrite": ("precision for the model's own rewrite", 3),
  "recall, own rewrite": ("recall for the model's own rewrite", 3),
  "chance, own rewrite": ("precision by chance for it", 3),
  "reward in right samples": ("mean non-zero reward in right samples", 3),
}


def main(_):
  out = pathlib.Path(FLAGS.out)
  if FLAGS.from_results:
    found = json.loads(out.read_text())
  else:
    found = gather(pathlib.Path(FLAGS.runs), FLAGS.seeds)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=1) + "\n")
    draw(found, out.with_suffix(".png"))
    print(f"Written: {out}, {out.with_suffix('.png')}\n")
  about = ", ".join(f"{k} {v}" for k, v in found["made with"].items())
  print(f"Test questions by seed: {found['test prompts']}; {about}\n")
  for title, group in GROUPS.items():
    print(arms_table(found, title, group), end="\n\n")
  print(model_table(found), end="\n\n")
  print(training_table(found), end="\n\n")
  for name, verdict, text in checks(found):
    print(f"- **{name}: {verdict}.** {text}")


# What a study has left.


def gather(runs, seeds):
  """What a reader needs of a study, small enough to keep."""
  verdicts = [test_verdicts(runs / seed / "test") for seed in seeds]
  for seed, by_arm in zip(seeds, verdicts, strict=True):
    if set(by_arm) != set(verdicts[0]):
      raise ValueError(
        f"Seeds {seeds[0]} and {seed} of {runs} have different arms: "
        f"{sorted(set(by_arm) ^ set(verdicts[0]))} are in one of them alone."
      )
  unknown = set(verdicts[0]) - set(TITLES)
  if unknown or START not in verdicts[0]:
    raise ValueError(
      f"{runs} needs arms of {sorted(TITLES)}, {START!r} among them, got "
      f"{sorted(verdicts[0])}."
    )
  pooled = {
    arm: np.concatenate([by_arm[arm] for by_arm in verdicts])
    for arm in TITLES
    if arm in verdicts[0]
  }
  arms = {}
  for arm, all_seeds in pooled.items():
    own = [by_arm[arm] for by_arm in verdicts]
    arms[arm] = {
      "correct": [int(seed.sum()) for seed in own],
      "accuracy": [float(seed.mean()) for seed in own],
      "minus": {
        other: difference_of(all_seeds, pooled[other])
        for other in BASELINES
        if other in pooled and other != arm
      },
    }
    histories = [
      curves.read_metrics(runs / seed / arm / "metrics.jsonl") for seed in seeds
    ]
    if all("token/ratio_mean" in history for history in histories):
      arms[arm] |= training(histories)
  return {
    "made with": {
      "python": platform.python_version(),
      "jax": jax.__version__,
      "device": jax.devices()[0].device_kind,
      "machine": platform.machine(),
      "cores": os.cpu_count(),
    },
    "seeds": list(seeds),
    "test prompts": [len(by_arm[START]) for by_arm in verdicts],
    "arms": arms,
    "reward model": by_name([reward_model(runs / seed) for seed in seeds]),
  }


def test_verdicts(folder):
  """For each arm `[N]` bool: whether its answer to a question is right."""
  prompts, right = {}, {}
  for row in files.read_jsonl(folder / "samples.jsonl"):
    prompts.setdefault(row["arm"], []).append(row["prompt"])
    right.setdefault(row["arm"], []).append(row["parts"]["is_correct"])
  summary = read(folder / "summary.json")
  first = next(iter(prompts))
  for arm, asked in prompts.items():
    if asked != prompts[first]:
      raise ValueError(f"{folder}: {arm} and {first} answered other prompts.")
    stated = summary.get(arm, {}).get("correct by seed")
    if stated != f"{np.mean(right[arm]):.3f}":
      raise ValueError(
        f"{folder}: the answers of {arm} are right in "
        f"{np.mean(right[arm]):.3f} of all cases, its summary says {stated}: "
        "the files are of different runs, or two models have one label."
      )
  return {arm: np.array(values, bool) for arm, values in right.items()}


def difference_of(right, other):
  """Of two arms' verdicts on the same questions."""
  mean, low, high = metrics.paired_interval(right, other)
  counts, p_value = metrics.mcnemar(right, other)
  return {
    "difference": mean,
    "low": low,
    "high": high,
    "only this": counts["only_first"],
    "only the other": counts["only_second"],
    "p": p_value,
  }


def training(histories):
  """Where token rewards have led, over the last updates of each seed."""

  def last(history, name):
    return history[name][1][-LAST:]

  name = "token/penalized_log_prob_min"
  return {
    "ratio": [
      float(last(history, "token/ratio_mean").mean()) for history in histories
    ],
    "lowest log-prob": [
      float(last(history, name).min()) for history in histories
    ],
    "lowest log-prob, first update": [
      float(history[name][1][0]) for history in histories
    ],
  }


def reward_model(folder):
  """What a seed's reward model can do, as numbers by name."""
  stages = folder / "stages"
  done = {
    name: read(stages / name / "done.json")
    for name in ("samples", "rewrites", "supervision")
  }
  test = read(folder / "grm" / "summary.json")
  settings = read(folder / "rlmec" / "flags.json")

  # On questions of which it has seen no rewrite.
  taught = {
    row["prompt"]
    for row in files.read_jsonl(stages / "teacher" / "rewrites.jsonl")
  }
  unseen = [
    row
    for row in files.read_jsonl(stages / "rewrites" / "rewrites.jsonl")
    if not row["is_right"] and row["prompt"] not in taught
  ]
  texts = characters([row["response"] for row in unseen])
  own = nearest(unseen)
  fewest = alignment_lib.distances(texts, characters(own))
  needed = alignment_lib.distances(
    texts, characters([r["rewrite"] for r in unseen])
  )
  verified = np.array([row["is_verified"] for row in unseen])

  # A token is a character, and there is the end.
  rows = files.read_jsonl(stages / "supervision" / "supervision.jsonl")
  wrong = [row for row in rows if not row["is_right"]]
  alignments = alignment_lib.align_pairs(
    characters([row["response"] for row in wrong]), characters(nearest(wrong))
  )
  threshold = settings["threshold"]
  penalised = [np.array(row["probs"]) < threshold for row in wrong]
  found = metrics.localization(
    penalised, [alignment.dropped for alignment in alignments]
  )
  by_own = metrics.localization(
    penalised, [np.array(row["dropped"]) for row in wrong]
  )
  earned = np.concatenate([row["probs"] for row in rows if row["is_right"]])
  earned = np.clip(earned - threshold, 0, settings["max_reward"])
  return {
    "samples": done["samples"]["samples"],
    "distinct": done["rewrites"]["kept"],
    "wrong": done["rewrites"]["wrong"],
    "held-out loss": test["held-out loss (nats a token)"],
    "held-out wrong samples": test["wrong solutions"],
    "held-out verified": test["right rewrites"],
    "first wrong step": test["the teacher's first wrong step"],
    "verified": done["rewrites"]["verified"],
    "unseen wrong samples": len(unseen),
    "verified, unseen": float(verified.mean()),
    "as near, unseen": float((verified & (needed <= fewest)).mean()),
    "same text, unseen": float(
      np.mean([a == r["rewrite"] for a, r in zip(own, unseen, strict=True)])
    ),
    "samples kept": done["supervision"]["samples kept"],
    "supervision, wrong": done["supervision"]["wrong"],
    "supervision, right": done["supervision"]["right"],
    "distance, smallest": float(np.mean([a.distance for a in alignments])),
    "distance": float(np.mean([row["rewrite_distance"] for row in wrong])),
    "distance to gold": float(np.mean([row["gold_distance"] for row in wrong])),
    **found,
    **{
      f"{name}, own rewrite": by_own[name]
      for name in ("precision", "recall", "chance")
    },
    "reward in right samples": float(earned[earned > 0].mean()),
  }


def nearest(rows):
  """The right texts with the fewest edits."""
  return [chains.rewrite(row["prompt"], row["response"]) for row in rows]


def characters(texts):
  """Code points, and an end."""
  return [[*map(ord, text), 0] for text in texts]


def by_name(dicts):
  """A list of dicts as a dict of lists."""
  return {name: [one[name] for one in dicts] for name in dicts[0]}


def read(path):
  return json.loads(path.read_text())


# Tables.


def arms_table(found, title, group):
  """Accuracies and differences of some arms, in Markdown."""
  lines = [
    f"| {title} | correct | by seed | minus start | minus RLMEC |",
    "|---|---|---|---|---|",
  ]
  for arm, name in group.items():
    if arm not in found["arms"]:
      continue
    values = found["arms"][arm]["accuracy"]
    cells = [number(np.mean(values)), " ".join(map(number, values))]
    for other in (START, "rlmec"):
      minus = found["arms"][arm]["minus"].get(other)
      cells.append(signed(minus) if minus else "")
    lines.append(f"| {name} | {' | '.join(cells)} |")
  return "\n".join(lines)


def model_table(found):
  """What the reward model does, in Markdown."""
  lines = ["| reward model | mean | by seed |", "|---|---|---|"]
  for name, (title, decimals) in MODEL_ROWS.items():
    values = found["reward model"][name]
    seeds = " ".join(number(v, decimals) for v in values)
    lines.append(f"| {title} | {number(np.mean(values), decimals)} | {seeds} |")
  return "\n".join(lines)


def training_table(found):
  """What the arms with token rewards end with, in Markdown."""
  lines = [
    "| token rewards | ratio | lowest log-prob of a penalised token, by seed "
    "| in the first update |",
    "|---|---|---|---|",
  ]
  for arm, name in PARTS.items():
    values = found["arms"].get(arm, {})
    if "ratio" in values:
      cells = [number(np.mean(values["ratio"]))]
      for when in ("lowest log-prob", "lowest log-prob, first update"):
        cells.append(" ".join(number(v, 1) for v in values[when]))
      lines.append(f"| {name} | {' | '.join(cells)} |")
  return "\n".join(lines)


def signed(minus):
  """A difference with its interval."""
  sign = "-" if minus["difference"] < 0 else "+"
  return (
    f"{sign}{number(abs(minus['difference']))} "
    f"[{number(minus['low'])}, {number(minus['high'])}]"
  )


# Checks.


def checks(found):
  """Name, verdict and numbers of all that was expected of the study."""
  arms, model = found["arms"], found["reward model"]

  def minus(a, b):
    """Difference of two arms, one of them a baseline, with its interval."""
    if b in BASELINES:
      return arms[a]["minus"][b]
    one = arms[b]["minus"][a]
    return {
      "difference": -one["difference"],
      "low": -one["high"],
      "high": -one["low"],
      "p": one["p"],
    }

  def by_seed(a, b):
    return np.subtract(arms[a]["accuracy"], arms[b]["accuracy"])

  def over_seeds(a, b):
    """The differences by seed, and their t interval."""
    found = comparisons.over_seeds(arms[a]["accuracy"], arms[b]["accuracy"])
    return (
      f"by seed {show(found.by_seed)}, t({len(found.by_seed) - 1}) "
      f"[{number(found.low)}, {number(found.high)}]"
    )

  def show(values, decimals=3):
    return " ".join(number(v, decimals) for v in values)

  def check(name, needs, judge, passed="pass"):
    """What `judge` finds, if the arms it needs are there."""
    missing = [arm for arm in needs if arm not in arms]
    if missing:
      return name, "not run", f"There is no {', '.join(missing)}."
    passes, text = judge()
    return name, passed if passes else "fail", text

  def is_above(a, b):
    gaps = by_seed(a, b)
    gap = minus(a, b)
    return min(gaps) >= 0.05 - 1e-9 and gap["p"] < 0.05, (
      f"{TITLES[a]} minus {TITLES[b]}: {signed(gap)}, "
      f"{comparisons.p_value(gap['p'])}, {over_seeds(a, b)}; .05 or more in "
      "each seed is asked for."
    )

  ordered = ("rlmec", START, "no_imitation", "sequence_no_imitation")
  for a, b in zip(ordered, ordered[1:], strict=False):
    yield check(
      f"Order: {TITLES[a]} > {TITLES[b]}",
      (a, b),
      lambda a=a, b=b: is_above(a, b),
    )

  def cannot_tell(*others):
    gaps = {arm: minus("rlmec", arm) for arm in others}
    texts = [
      f"{TITLES[arm]}: {signed(gap)}, {comparisons.p_value(gap['p'])}, "
      f"{over_seeds('rlmec', arm)}"
      for arm, gap in gaps.items()
    ]
    return all(gap["low"] <= 0 <= gap["high"] for gap in gaps.values()), (
      f"RLMEC minus {'; '.join(texts)}. Intervals that hold 0 are asked for."
    )

  yield check(
    "RLMEC and no token rewards cannot be told apart",
    ("rlmec", "no_token_rewards"),
    lambda: cannot_tell("no_token_rewards"),
    "not rejected",
  )
  variants = ("uniform_weights", "sequence_reward", "surrogate")
  yield check(
    "Nor can the variants with imitation",
    ("rlmec", *variants),
    lambda: cannot_tell(*variants),
    "not rejected",
  )

  def imitation_gains():
    alone, whole = (
      minus(arm, START)["difference"] for arm in ("no_token_rewards", "rlmec")
    )
    return whole > 0 and alone >= 0.8 * whole, (
      f"Over start, no token rewards gain {number(alone)} and RLMEC gains "
      f"{number(whole)}; a gain, and 80 % of it, are asked for."
    )

  yield check(
    "Nearly all of the gain is that of imitation",
    ("rlmec", "no_token_rewards"),
    imitation_gains,
  )

  def surrogate_holds():
    gap, other = (
      minus("surrogate_no_imitation", arm) for arm in (START, "no_imitation")
    )
    return gap["low"] >= 0 and other["low"] > 0, (
      f"Without imitation, PPO's clipped loss minus start is {signed(gap)}, "
      f"{comparisons.p_value(gap['p'])}, "
      f"{over_seeds('surrogate_no_imitation', START)}, and minus RLMEC's loss "
      f"{signed(other)}; lower ends of 0 or more, and above 0, are asked for."
    )

  without = ("surrogate_no_imitation", "no_imitation")
  yield check(
    "PPO's loss does not collapse without imitation", without, surrogate_holds
  )

  def falls_without():
    lowest = {
      arm: np.array(arms[arm]["lowest log-prob"])
      for arm in ("no_imitation", "rlmec", "surrogate_no_imitation")
    }
    first, *others = lowest.values()
    return all(np.all(first < other) for other in others), (
      "Lowest log-probability of a penalised token: "
      + "; ".join(f"{TITLES[arm]} {show(v, 1)}" for arm, v in lowest.items())
      + ". The first is to be lowest in each seed."
    )

  yield check(
    "Without imitation, nothing bounds the penalty",
    ("rlmec", *without),
    falls_without,
  )

  def ahead_of_rft():
    gap = minus("rlmec", "sft_right")
    return gap["low"] > 0, (
      f"RLMEC minus SFT on right samples: {signed(gap)}, "
      f"{comparisons.p_value(gap['p'])}, {over_seeds('rlmec', 'sft_right')}; "
      "an interval above 0 is asked for."
    )

  yield check("RLMEC is ahead of RFT", ("rlmec", "sft_right"), ahead_of_rft)

  def gold_is_strong():
    gap = minus("sft_gold", "rlmec")
    return gap["high"] >= 0, (
      f"SFT on gold solutions minus RLMEC: {signed(gap)}, "
      f"{comparisons.p_value(gap['p'])}, {over_seeds('sft_gold', 'rlmec')}; an "
      "interval that is not below 0 is asked for."
    )

  yield check(
    "SFT on gold solutions is a strong baseline",
    ("rlmec", "sft_gold"),
    gold_is_strong,
    "not rejected",
  )

  def ratio_stays():
    ratios = np.array(arms["rlmec"]["ratio"])
    return bool(np.all(np.abs(ratios - 1) <= 0.1)), (
      f"Mean over the last {LAST} updates of RLMEC, by seed: {show(ratios)}; "
      "within .1 of 1 is asked for."
    )

  yield check("The ratio stays near 1", ("rlmec",), ratio_stays)

  yield check(
    "The reward model corrects what it has never seen",
    (),
    lambda: (
      min(model["verified, unseen"]) >= 0.95,
      f"Of {show(model['unseen wrong samples'], 0)} wrong samples of unseen "
      f"questions {show(model['verified, unseen'])} are made right, "
      f"{show(model['as near, unseen'])} with the fewest edits; .95 right in "
      "each seed is asked for.",
    ),
  )
  yield check(
    "Its edits are few",
    (),
    lambda: (
      bool(np.all(np.less(model["distance"], model["distance to gold"]))),
      f"Edits to its rewrite {show(model['distance'], 2)}, to the gold "
      f"solution {show(model['distance to gold'], 2)}, fewest possible "
      f"{show(model['distance, smallest'], 2)}; fewer than to gold in each "
      "seed are asked for.",
    ),
  )
  yield check(
    "Penalties are where the fewest edits are",
    (),
    lambda: (
      bool(
        np.all(np.array(model["precision"]) >= 2 * np.array(model["chance"]))
        and min(model["recall"]) >= 0.8
      ),
      f"Precision {show(model['precision'])} (chance "
      f"{show(model['chance'])}), recall {show(model['recall'])} (chance "
      f"{show(model['flagged'])}); twice the precision of chance, and a recall "
      "of .8, are asked for in each seed.",
    ),
  )
  yield check(
    "Rewards of right samples are almost one constant",
    (),
    lambda: (
      min(model["reward in right samples"]) >= 0.45,
      f"Mean non-zero reward {show(model['reward in right samples'])}, at most "
      ".5; .45 in each seed is asked for.",
    ),
  )


# The picture.


def draw(found, path):
  """Accuracies of all arms: seeds as dots, means as bars, a line at start."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot

  groups = {
    title: [arm for arm in group if arm in found["arms"]]
    for title, group in GROUPS.items()
  }
  groups = {title: arms for title, arms in groups.items() if arms}
  sizes = [len(arms) for arms in groups.values()]
  figure, panels = pyplot.subplots(
    len(groups),
    1,
    figsize=(7.5, 1.2 + 0.28 * sum(sizes)),
    sharex=True,
    squeeze=False,
    layout="constrained",
    gridspec_kw={"height_ratios": [size + 1 for size in sizes]},
  )
  start = np.mean(found["arms"][START]["accuracy"])
  for panel, colour, (title, arms) in zip(
    panels[:, 0], curves.COLOURS, groups.items(), strict=False
  ):
    panel.axvline(start, color="#555555", linestyle="--", linewidth=1)
    for row, arm in enumerate(arms):
      values = found["arms"][arm]["accuracy"]
      panel.plot(
        np.mean(values), row, "|", color="black", markersize=13, mew=1.6
      )
      panel.plot(
        values, [row] * len(values), "o", color=colour, alpha=0.7, markersize=5
      )
    panel.set_yticks(range(len(arms)), [TITLES[arm] for arm in arms])
    panel.set_ylim(len(arms) - 0.4, -0.6)  # The first one on top.
    panel.set_title(title, loc="left", fontsize=10, fontweight="bold")
    panel.tick_params(labelsize=9, length=3)
    panel.grid(axis="x", color="#dddddd", linewidth=0.6)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
  panels[-1, 0].set_xlabel(
    "greedy accuracy, test (dots: seeds, bars: means, dashed: start)",
    fontsize=9,
  )
  figure.savefig(path, dpi=150)
  pyplot.close(figure)


if __name__ == "__main__":
  app.run(main)
