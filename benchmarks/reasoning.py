"""The study of reasoning: its table, its curves, and the claims it supports.

  python -m benchmarks.reasoning --runs=runs/reasoning --seeds=0,1,2
  python -m benchmarks.reasoning --from_results   # the same, from the file

The first gathers what launch/reasoning_study.sh left, into
benchmarks/results/reasoning.json and reasoning.png; the second prints the table
and the claims from that file alone.

A difference of two arms is the mean over seeds of the difference within a seed.
Beside it stand the seeds, their t interval, and the p-value of a test over the
test questions of all seeds; see benchmarks/comparisons.py. A claim fails if the
contrary is significant at 5 %; it passes if it is seen as the table of claims
asks for it, with a significant difference where that asks for one; "not
rejected" is one that asks for no difference, where none was found. The test of
maj@1 pairs the greedy answers to a question. What is no share of right answers
is judged by the seeds alone.
"""

import json
import pathlib

import numpy as np
from absl import app, flags

from benchmarks import comparisons
from benchmarks.comparisons import number
from rljax.evaluation import curves as curves_lib
from rljax.text import files

RESULTS = pathlib.Path(__file__).parent / "results"

flags.DEFINE_string("runs", "runs/reasoning", "Where the study is.")
flags.DEFINE_list("seeds", ["0", "1", "2"], "Of the study.")
flags.DEFINE_string(
  "out",
  str(RESULTS / "reasoning.json"),
  "Results; the picture lies beside them.",
)
flags.DEFINE_bool("from_results", False, "Read --out instead of --runs.")
FLAGS = flags.FLAGS

ARMS = {
  "base": "base",
  "sft_4": "SFT, 4 epochs",
  "sft_8": "SFT, 8",
  "sft_16": "SFT, 16",
  "sft_40": "SFT, 40",
  "sft_100": "SFT, 100",
  "ei": "EI",
  "ei_continued": "EI, continued",
  "ei_from_base": "EI from base",
  "ppo": "PPO, sparse",
  "ppo_steps": "PPO, dense heuristic",
  "ppo_orm": "PPO, sparse ORM",
  "ppo_dense_orm": "PPO, dense ORM",
  "ppo_from_base": "PPO from base, sparse",
  "grpo": "GRPO",
  "rcrl_50": "RCRL, 50 % right",
  "rcrl_75": "RCRL, 75 %",
  "rcrl_100": "RCRL, 100 %",
}
# Problems with whose answers an arm was trained: 300 in SFT, 300 in RL, and
# 4,000 of which an outcome model saw answers.
PROBLEMS = {
  **dict.fromkeys(("ei", "ei_continued", "ppo", "ppo_steps", "grpo"), 600),
  **dict.fromkeys(("rcrl_50", "rcrl_75", "rcrl_100"), 600),
  **dict.fromkeys(("ppo_orm", "ppo_dense_orm"), 4600),
  **dict.fromkeys(("ei_from_base", "ppo_from_base"), 300),
  "base": 0,
}
EPOCHS = ("sft_4", "sft_8", "sft_16", "sft_40", "sft_100")
START = "sft_8"
# Metric of evaluate.py -> column and decimals.
COLUMNS = {
  "maj@1": ("maj@1", 3),
  "maj@32": ("maj@32", 3),
  "rerank@32": ("rerank@32", 3),
  "p@1": ("p@1", 3),
  "pass@8": ("pass@8", 3),
  "pass@32": ("pass@32", 3),
  "unique valid": ("unique valid", 2),
  "valid of correct": ("valid", 2),
  "new traces": ("new", 2),
}
CURVES = (
  "ei",
  "ei_from_base",
  "ppo",
  "ppo_steps",
  "ppo_orm",
  "ppo_dense_orm",
  "ppo_from_base",
  "grpo",
)


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
  print(table(found))
  print()
  for name, verdict, text in claims(found):
    print(f"- **{name}: {verdict}.** {text}")


def gather(runs, seeds):
  """What a reader needs of a study, small enough to keep."""
  metrics, other, models, curves, drawn = {}, {}, {}, {}, {}
  right = {}
  for seed in seeds:
    folder = runs / seed
    for target, name in ((metrics, "test"), (other, "test_orm_ppo")):
      for arm, values in read(folder / name / "metrics.json").items():
        for metric, by_seed in values.items():
          target.setdefault(arm, {}).setdefault(metric, []).append(by_seed[0])
    for arm, verdicts in greedy_verdicts(folder / "test").items():
      right.setdefault(arm, []).append(verdicts)
    for name in ("orm", "orm_ei", "orm_ppo"):
      summary = read(folder / name / "summary.json")
      del summary["reward model"]  # Its place on this machine.
      models.setdefault(name, []).append(summary)
    # An outcome model has learnt from samples, too: they count.
    for_orm = count(
      folder / "orm_samples" / "samples" / "sft_8-0-sampled.jsonl"
    )
    for arm in CURVES:
      series = curves_lib.read_metrics(folder / arm / "metrics.jsonl")
      steps, values = (x.tolist() for x in series["eval/is_correct"])
      rollouts = (x.tolist() for x in series["rollouts"])
      at = dict(zip(*rollouts, strict=True))
      before = for_orm if "orm" in arm else 0
      curves.setdefault(arm, []).append(
        [[before + at[s], v] for s, v in zip(steps, values, strict=True)]
      )
      drawn.setdefault(arm, []).append(before + max(at.values()))
    drawn.setdefault("ei_continued", []).append(drawn["ei"][-1])
    labels = folder / "rcrl_50"
    for_labels = count(labels / "solutions.jsonl") + sum(
      map(count, (labels / "completions").iterdir())
    )
    for arm in ("rcrl_50", "rcrl_75", "rcrl_100"):
      drawn.setdefault(arm, []).append(drawn["ei"][-1] + for_labels)
  return {
    "test prompts": list(map(len, right[START])),
    "right": right,
    "metrics": metrics,
    "metrics, ORM of PPO samples": other,
    "outcome models": models,
    "samples drawn": drawn,
    "validation accuracy by samples drawn": curves,
  }


def greedy_verdicts(folder):
  """For each arm a text with "1" for a question answered right, "0" else."""
  right = {}
  for row in files.read_jsonl(folder / "questions.jsonl"):
    for arm, (seed,) in row["policies"].items():
      right[arm] = right.get(arm, "") + str(int(seed["greedy"]))
  return right


def count(path):
  """Lines of a file."""
  with open(path, "rb") as file:
    return sum(1 for _ in file)


def read(path):
  return json.loads(path.read_text())


def table(found):
  """The means over seeds, in Markdown, with the seeds of maj@1."""
  metrics = found["metrics"]
  titles = [title for title, _ in COLUMNS.values()]
  lines = [
    f"| | problems | samples drawn | {' | '.join(titles)} | maj@1 by seed |",
    "|---" * (len(titles) + 4) + "|",
  ]
  for arm, title in ARMS.items():
    if arm not in metrics:
      continue
    drawn = np.mean(found["samples drawn"].get(arm, [0]))
    cells = [f"{PROBLEMS.get(arm, 300):,}", f"{drawn:,.0f}"]
    for metric, (_, decimals) in COLUMNS.items():
      values = [v for v in metrics[arm].get(metric, []) if v is not None]
      # What the supervised start writes again is its own.
      own = arm == START and metric == "new traces"
      known = values and not own
      cells.append(number(np.mean(values), decimals) if known else "")
    seeds = " ".join(number(v, 3) for v in metrics[arm]["maj@1"])
    lines.append(f"| {title} | {' | '.join(cells)} | {seeds} |")
  return "\n".join(lines)


def claims(found):
  """Name, verdict and numbers of the claims C1 to C8."""
  metrics, right = found["metrics"], found["right"]

  def values(arm, metric):
    return np.array(metrics[arm][metric], float)

  def differ(a, b, metric):
    """Difference of two arms, over questions where verdicts are known."""
    if metric == "maj@1":
      return comparisons.paired(right[a], right[b])
    return comparisons.over_seeds(values(a, metric), values(b, metric))

  def judge(passes, fails, otherwise="inconclusive"):
    if len(right[START]) < 3:
      return "inconclusive"
    return "fail" if fails else "pass" if passes else otherwise

  def not_below(gap):
    """Whether it is at least minus one standard error over the seeds."""
    return gap.mean >= -gap.by_seed.std(ddof=1) / np.sqrt(len(gap.by_seed))

  gap = differ("ei", "ppo", "maj@1")
  yield (
    "C1, EI best or on par",
    judge(
      False,
      gap.is_below,
      "not rejected" if not_below(gap) else "inconclusive",
    ),
    f"maj@1 of EI minus sparse PPO: {gap}; not below -1 standard error is "
    "asked for.",
  )

  arms = ("ppo_steps", "ppo_orm", "ppo_dense_orm")
  gaps = {arm: differ(arm, "ppo", "maj@1") for arm in arms}
  yield (
    "C2, sparse is enough",
    judge(False, any(gap.is_above for gap in gaps.values()), "not rejected"),
    "maj@1 minus that of sparse PPO after as many rollouts: "
    + "; ".join(f"{ARMS[arm]} {gap}" for arm, gap in gaps.items())
    + ". None may lead. That none does is no proof that none would.",
  )

  for arm in ("ei", "ppo"):
    one = differ(arm, START, "maj@1")
    many = {k: differ(arm, START, k) for k in ("pass@8", "pass@32")}
    yield (
      f"C3, RL lifts both ({ARMS[arm]})",
      judge(
        one.is_above and all(map(not_below, many.values())),
        one.is_below or any(gap.is_below for gap in many.values()),
      ),
      f"Over SFT: maj@1 {one}, "
      + ", ".join(f"{k} {gap}" for k, gap in many.items())
      + ". A gain of maj@1, and no more than 1 standard error of pass@k lost, "
      "are asked for.",
    )

  peak = max(EPOCHS, key=lambda arm: values(arm, "pass@8").mean())
  names = ("maj@1", "pass@8", "unique correct")
  one, *many = (differ(EPOCHS[-1], peak, name) for name in names)
  middle = EPOCHS[EPOCHS.index(peak) + 1]
  yield (
    "C4, SFT trades them",
    judge(
      one.is_above and all(gap.is_below for gap in many),
      one.is_below or any(gap.is_above for gap in many),
    ),
    f"pass@8 is best after {epochs(peak)} epochs; from there to "
    f"{epochs(EPOCHS[-1])} epochs "
    + ", ".join(
      f"{k} {gap}" for k, gap in zip(names, (one, *many), strict=True)
    )
    + ". maj@1 is to go up, and the others down. Observed beside it: to "
    f"{epochs(middle)} epochs the mean p@1 changes by "
    f"{differ(middle, peak, 'p@1')} and maj@1 by "
    f"{differ(middle, peak, 'maj@1')}.",
  )

  for arm in ("ei", "ppo"):
    limit = max(differ(arm, START, "maj@1").mean, 0) / 2
    gaps = {}
    for metric in ("pass@8", "pass@32"):
      start = max(EPOCHS, key=lambda name: values(name, metric).mean())
      gaps[metric] = differ(arm, start, metric)
    yield (
      f"C5, exploration is bounded ({ARMS[arm]})",
      judge(
        all(gap.high <= limit for gap in gaps.values()),
        any(gap.low > limit for gap in gaps.values()),
        "not rejected"
        if all(gap.mean <= limit for gap in gaps.values())
        else "inconclusive",
      ),
      "Over the best SFT by that metric: "
      + ", ".join(f"{metric} {gap}" for metric, gap in gaps.items())
      + f"; at most half of the gain in maj@1, {number(limit, 3)}, is asked "
      "for.",
    )

  gap, more = (
    differ("ei", "ei_continued", name) for name in ("maj@1", "unique correct")
  )
  yield (
    "C6, restart matters",
    judge(not_below(gap) and more.is_above, gap.is_below or more.is_below),
    f"Restarting minus continuing: maj@1 {gap}, unique correct traces {more}; "
    "not below -1 standard error, and more traces, are asked for.",
  )

  arms = ("rcrl_50", "rcrl_75", "rcrl_100")
  gaps = {arm: differ(arm, "ei", "maj@1") for arm in arms}
  more = differ("rcrl_100", "rcrl_50", "maj@1")
  yield (
    "C7, RCRL is not better",
    judge(
      max(gap.mean for gap in gaps.values()) <= 0 and more.is_above,
      any(gap.is_above for gap in gaps.values()) or more.is_below,
    ),
    "maj@1 minus that of EI: "
    + "; ".join(f"{ARMS[arm]} {gap}" for arm, gap in gaps.items())
    + f". 100 % over 50 % right: {more}. Not above EI, and more with more "
    "right solutions, is asked for.",
  )

  own, other = (
    np.subtract(part["ei"]["rerank@32"], part["ppo"]["rerank@32"])
    for part in (metrics, found["metrics, ORM of PPO samples"])
  )
  bias = comparisons.over_seeds(own, other)
  yield (
    "C8, reranking favours the ORM's own policy",
    judge(bias.is_above, bias.is_below),
    f"rerank@32 of EI minus PPO is {number(own.mean(), 3)} with an ORM of EI's "
    f"samples and {number(other.mean(), 3)} with one of PPO's: {bias}; more "
    "than 0 is asked for.",
  )


def epochs(arm):
  """How many epochs a supervised arm has learnt."""
  return arm.removeprefix("sft_")


def draw(found, path):
  """Greedy accuracy on validation prompts, by samples drawn in training."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot

  curves = found["validation accuracy by samples drawn"]
  groups = {
    "From SFT": [arm for arm in CURVES if "base" not in arm],
    "From the base model": [arm for arm in CURVES if "base" in arm],
  }
  figure, panels = pyplot.subplots(
    1, 2, figsize=(9.5, 3.4), sharey=True, layout="constrained"
  )
  for panel, (title, arms) in zip(panels, groups.items(), strict=True):
    for colour, arm in zip(curves_lib.COLOURS, arms, strict=False):
      seeds = np.array(curves[arm])  # [seeds, points, 2]
      rollouts, accuracy = seeds[..., 0].mean(axis=0), seeds[..., 1]
      panel.plot(
        rollouts,
        accuracy.mean(axis=0),
        color=colour,
        label=ARMS[arm],
        marker="o" if arm.startswith("ei") else None,
        markersize=4,
      )
      panel.fill_between(
        rollouts,
        accuracy.min(axis=0),
        accuracy.max(axis=0),
        color=colour,
        alpha=0.12,
        linewidth=0,
      )
    panel.set_title(title, fontsize=10)
    panel.set_xlabel("samples drawn for training")
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False, fontsize=8, loc="lower right")
  panels[0].set_ylabel("greedy accuracy, validation")
  figure.savefig(path, dpi=150)
  pyplot.close(figure)


if __name__ == "__main__":
  app.run(main)
