"""The study of reasoning: its table, its curves, and the claims it supports.

  python -m benchmarks.reasoning --runs=runs/reasoning --seeds=0,1,2
  python -m benchmarks.reasoning --from_results   # the same, from the file

The first gathers what launch/reasoning_study.sh left, into
benchmarks/results/reasoning.json and reasoning.png; the second prints the table
and the claims from that file alone.

A difference of two arms is the mean over seeds of the difference within a seed,
± its standard error s / sqrt(n). Every seed has training and test prompts of
its own, so that their spread holds that of the questions. What each claim asks
for was written down before the study; one that misses it is "fail" if it does
so by more than two standard errors, or as its text says, and else
"inconclusive".
"""

import json
import pathlib
import re

import numpy as np
from absl import app, flags

from rljax.evaluation import curves as curves_lib

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
  for seed in seeds:
    folder = runs / seed
    for target, name in ((metrics, "test"), (other, "test_orm_ppo")):
      for arm, values in read(folder / name / "metrics.json").items():
        for metric, by_seed in values.items():
          target.setdefault(arm, {}).setdefault(metric, []).append(by_seed[0])
    for name in ("orm", "orm_ei", "orm_ppo"):
      models.setdefault(name, []).append(read(folder / name / "summary.json"))
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
    "metrics": metrics,
    "metrics, ORM of PPO samples": other,
    "outcome models": models,
    "samples drawn": drawn,
    "validation accuracy by samples drawn": curves,
  }


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
    f"| | samples drawn | {' | '.join(titles)} | maj@1 by seed |",
    "|---" * (len(titles) + 3) + "|",
  ]
  for arm, title in ARMS.items():
    if arm not in metrics:
      continue
    cells = [f"{np.mean(found['samples drawn'].get(arm, [0])):,.0f}"]
    for metric, (_, decimals) in COLUMNS.items():
      values = [v for v in metrics[arm].get(metric, []) if v is not None]
      # What the supervised start writes again is its own.
      own = arm == START and metric == "new traces"
      known = values and not own
      cells.append(number(np.mean(values), decimals) if known else "")
    seeds = " ".join(number(v, 3) for v in metrics[arm]["maj@1"])
    lines.append(f"| {title} | {' | '.join(cells)} | {seeds} |")
  return "\n".join(lines)


def number(value, decimals):
  """Without the zero in front of the point, as the tables of the README."""
  text = f"{value:.{decimals}f}"
  return re.sub(r"^(-?)0\.", r"\1.", text)


def claims(found):
  """Name, verdict and numbers of the claims C1 to C8."""
  metrics = found["metrics"]
  several = len(metrics[START]["maj@1"]) >= 3

  def values(arm, metric):
    return np.array(metrics[arm][metric], float)

  def differ(a, b, metric):
    """Mean difference of two arms over seeds, and its standard error."""
    return mean_and_error(values(a, metric) - values(b, metric))

  def judge(passes, fails):
    if not several or (not passes and not fails):
      return "inconclusive"
    return "pass" if passes else "fail"

  gap, error = differ("ei", "ppo", "maj@1")
  yield (
    "C1, EI best or on par",
    judge(gap >= -error, gap < -2 * error),
    f"maj@1 of EI minus sparse PPO: {signed(gap, error)}; not below -1 "
    "standard error is asked for.",
  )

  arms = ("ppo_steps", "ppo_orm", "ppo_dense_orm")
  gaps = {arm: differ(arm, "ppo", "maj@1") for arm in arms}
  over = [gap - 2 * error for gap, error in gaps.values()]
  yield (
    "C2, sparse is enough",
    judge(max(over) <= 0, max(over) > 0),
    "maj@1 minus that of sparse PPO after as many rollouts: "
    + "; ".join(f"{ARMS[a]} {signed(*gaps[a])}" for a in arms)
    + ". None may lead by more than 2 standard errors.",
  )

  for arm in ("ei", "ppo"):
    one, one_error = differ(arm, START, "maj@1")
    many = {k: differ(arm, START, k) for k in ("pass@8", "pass@32")}
    kept = all(gap >= -error for gap, error in many.values())
    lost = any(gap < -2 * error for gap, error in many.values())
    yield (
      f"C3, RL lifts both ({ARMS[arm]})",
      judge(one > 2 * one_error and kept, one < -2 * one_error or lost),
      f"Over SFT: maj@1 {signed(one, one_error)}, "
      + ", ".join(f"{k} {signed(*many[k])}" for k in many)
      + ". More than 2 standard errors up, and no more than 1 down, are asked "
      "for.",
    )

  peak = max(EPOCHS, key=lambda arm: values(arm, "pass@8").mean())
  later = EPOCHS[EPOCHS.index(peak) + 1 :]
  texts, trades, opposed = [], False, False
  for arm in later:
    found_differences = {
      name: differ(arm, peak, name)
      for name in ("maj@1", "p@1", "pass@8", "unique correct")
    }
    (one, one_error), (mean, mean_error), (many, many_error), _ = (
      found_differences.values()
    )
    falls = many < -2 * many_error
    trades |= falls and (one > 2 * one_error or mean > 2 * mean_error)
    opposed |= one > 0 or mean > 0
    texts.append(
      f"to {ARMS[arm].removeprefix('SFT, ')} epochs "
      + ", ".join(f"{k} {signed(*v)}" for k, v in found_differences.items())
    )
  yield (
    "C4, SFT trades them",
    judge(trades, not opposed),
    f"pass@8 is best after {ARMS[peak].removeprefix('SFT, ').split()[0]} "
    f"epochs; from there {'; '.join(texts)}. At one of them maj@1 or the mean "
    "p@1 is to be up, and pass@8 down, by more than 2 standard errors.",
  )

  for arm in ("ei", "ppo"):
    texts, over = [], []
    gain, _ = differ(arm, START, "maj@1")
    for metric in ("pass@8", "pass@32"):
      start = max(EPOCHS, key=lambda name: values(name, metric).mean())
      gap, error = differ(arm, start, metric)
      over.append((gap - max(gain, 0) / 2, error))
      texts.append(f"{metric} {signed(gap, error)}")
    yield (
      f"C5, exploration is bounded ({ARMS[arm]})",
      judge(
        all(gap <= 0 for gap, _ in over),
        any(gap > 2 * error for gap, error in over),
      ),
      f"Over the best SFT by that metric: {', '.join(texts)}; at most half of "
      f"the gain in maj@1, which is {number(gain, 3)}, is asked for.",
    )

  gap, error = differ("ei", "ei_continued", "maj@1")
  more, more_error = differ("ei", "ei_continued", "unique correct")
  yield (
    "C6, restart matters",
    judge(
      gap >= -error and more > 0, gap < -2 * error or more < -2 * more_error
    ),
    f"Restarting minus continuing: maj@1 {signed(gap, error)}, unique correct "
    f"traces {signed(more, more_error)}; not below -1 standard error, and more "
    "traces, are asked for.",
  )

  arms = ("rcrl_50", "rcrl_75", "rcrl_100")
  gaps = {arm: differ(arm, "ei", "maj@1") for arm in arms}
  more, more_error = differ("rcrl_100", "rcrl_50", "maj@1")
  yield (
    "C7, RCRL is not better",
    judge(
      max(gap for gap, _ in gaps.values()) <= 0 and more > 0,
      any(gap > 2 * error for gap, error in gaps.values())
      or more < -2 * more_error,
    ),
    "maj@1 minus that of EI: "
    + "; ".join(f"{ARMS[a]} {signed(*gaps[a])}" for a in arms)
    + f". 100 % over 50 % right: {signed(more, more_error)}. Not above EI, and "
    "more with more right solutions, is asked for.",
  )

  other = found["metrics, ORM of PPO samples"]
  by_model = [
    np.array(part["ei"]["rerank@32"]) - np.array(part["ppo"]["rerank@32"])
    for part in (metrics, other)
  ]
  bias, error = mean_and_error(by_model[0] - by_model[1])
  yield (
    "C8, reranking favours the ORM's own policy",
    judge(bias > error, bias < -2 * error),
    f"rerank@32 of EI minus PPO is {number(by_model[0].mean(), 3)} with an ORM "
    f"of EI's samples and {number(by_model[1].mean(), 3)} with one of PPO's: "
    f"{signed(bias, error)}; more than 1 standard error is asked for.",
  )


def mean_and_error(by_seed):
  """Mean, and standard error of it; NaN for one seed."""
  by_seed = np.asarray(by_seed, float)
  if len(by_seed) < 2:
    return by_seed.mean(), np.nan
  return by_seed.mean(), by_seed.std(ddof=1) / np.sqrt(len(by_seed))


def signed(mean, error):
  sign = "-" if mean < 0 else "+"
  return f"{sign}{number(abs(mean), 3)} ± {number(error, 3)}"


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
