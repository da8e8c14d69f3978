"""The study of reasoning: its table, its curves, and the claims it supports.

  python -m benchmarks.reasoning --runs=runs/reasoning --seeds=0,1,2
  python -m benchmarks.reasoning            # the same table, from the results

With --runs, gathers what launch/reasoning_study.sh left, into
benchmarks/results/reasoning.json and reasoning.png. Without, prints the table
and the claims from that file.

A claim is judged as specified before the study was run: by differences between
arms of the same seed and their standard error over seeds, s / sqrt(n). It is
"inconclusive" where the difference lies within two of them of the bound and the
bound is not met, and with fewer than three seeds.
"""

import json
import pathlib

import numpy as np
from absl import app, flags

from rljax import report

flags.DEFINE_string("runs", "", "Where the study is; empty: read the results.")
flags.DEFINE_list("seeds", ["0", "1", "2"], "Of the study.")
FLAGS = flags.FLAGS

RESULTS = pathlib.Path(__file__).parent / "results"
FILE, PICTURE = RESULTS / "reasoning.json", RESULTS / "reasoning.png"

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
  if FLAGS.runs:
    found = gather(pathlib.Path(FLAGS.runs), FLAGS.seeds)
    RESULTS.mkdir(exist_ok=True)
    FILE.write_text(json.dumps(found, indent=1) + "\n")
    draw(found)
    print(f"Written: {FILE}, {PICTURE}\n")
  else:
    found = json.loads(FILE.read_text())
  print(table(found["metrics"]))
  print()
  for name, verdict, text in claims(found):
    print(f"- **{name}: {verdict}.** {text}")


def gather(runs, seeds):
  """What a reader needs of a study, small enough to keep."""
  metrics, other, models, curves = {}, {}, {}, {}
  rollouts = {}
  for seed in seeds:
    folder = runs / seed
    for target, name in ((metrics, "test"), (other, "test_orm_ppo")):
      for arm, values in read(folder / name / "metrics.json").items():
        for metric, by_seed in values.items():
          target.setdefault(arm, {}).setdefault(metric, []).append(by_seed[0])
    for name in ("orm", "orm_ei", "orm_ppo"):
      models.setdefault(name, []).append(read(folder / name / "summary.json"))
    for arm in CURVES:
      series = report.read_metrics(folder / arm / "metrics.jsonl")
      steps, values = series["eval/is_correct"]
      at = dict(zip(*map(np.ndarray.tolist, series["rollouts"]), strict=True))
      curves.setdefault(arm, []).append(
        [
          [at[step], value]
          for step, value in zip(steps.tolist(), values.tolist(), strict=True)
        ]
      )
      rollouts.setdefault(arm, []).append(max(at.values()))
  return {
    "metrics": metrics,
    "metrics, ORM of PPO samples": other,
    "outcome models": models,
    "rollouts": rollouts,
    "validation accuracy by rollouts": curves,
  }


def read(path):
  return json.loads(path.read_text())


def table(metrics):
  """The means over seeds, in Markdown, with the seeds of maj@1."""
  titles = [title for title, _ in COLUMNS.values()]
  lines = [
    f"| | {' | '.join(titles)} | maj@1 by seed |",
    "|---" * (len(titles) + 2) + "|",
  ]
  for arm, title in ARMS.items():
    if arm not in metrics:
      continue
    cells = []
    for metric, (_, decimals) in COLUMNS.items():
      values = [v for v in metrics[arm].get(metric, []) if v is not None]
      cells.append(number(np.mean(values), decimals) if values else "")
    seeds = " ".join(number(v, 3) for v in metrics[arm]["maj@1"])
    lines.append(f"| {title} | {' | '.join(cells)} | {seeds} |")
  return "\n".join(lines)


def number(value, decimals):
  """Without the zero in front of the point, as the tables of the README."""
  text = f"{value:.{decimals}f}"
  return text.removeprefix("0") if text.startswith("0.") else text


def claims(found):
  """Name, verdict and numbers of the claims C1 to C8 of the specification."""
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

  ei, ei_error = differ("ei", "ppo", "maj@1")
  yield (
    "C1, EI best or on par",
    judge(ei >= -ei_error, ei < -2 * ei_error),
    f"maj@1 of EI minus sparse PPO: {signed(ei, ei_error)}; not below -1 "
    "standard error is asked for.",
  )
  arms = ("ppo_steps", "ppo_orm", "ppo_dense_orm")
  gaps = {arm: differ(arm, "ppo", "maj@1") for arm in arms}
  best = max(gaps, key=lambda arm: gaps[arm][0])
  gap, error = gaps[best]
  yield (
    "C2, sparse is enough",
    judge(gap <= 2 * error, gap > 3 * error),
    "maj@1 minus that of sparse PPO: "
    + "; ".join(f"{ARMS[a]} {signed(*gaps[a])}" for a in arms)
    + ". The best may lead by 2 standard errors at most.",
  )
  for arm in ("ei", "ppo"):
    (one, one_error), (many, many_error) = (
      differ(arm, START, metric) for metric in ("maj@1", "pass@8")
    )
    last, last_error = differ(arm, START, "pass@32")
    yield (
      f"C3, RL lifts both ({ARMS[arm]})",
      judge(
        one > 2 * one_error and many >= -many_error,
        one <= 0 or many < -2 * many_error,
      ),
      f"Over SFT: maj@1 {signed(one, one_error)}, pass@8 "
      f"{signed(many, many_error)}, pass@32 {signed(last, last_error)}.",
    )
  peak = max(EPOCHS, key=lambda arm: values(arm, "pass@8").mean())
  peak_one = max(EPOCHS, key=lambda arm: values(arm, "maj@1").mean())
  sample, sample_error = differ("sft_100", peak, "p@1")
  greedy, greedy_error = differ(peak_one, peak, "maj@1")
  spread, spread_error = differ("sft_100", peak, "unique correct")
  lost, lost_error = differ("sft_100", peak, "pass@8")
  yield (
    "C4, SFT trades them",
    judge(
      greedy > 0 and lost < -2 * lost_error and spread < -2 * spread_error,
      greedy < 0 or lost > 0,
    ),
    f"pass@8 is best after {ARMS[peak]} epochs, maj@1 after {ARMS[peak_one]} "
    f"({signed(greedy, greedy_error)} between them). From the former to 100 "
    f"epochs: pass@8 {signed(lost, lost_error)}, unique correct traces "
    f"{signed(spread, spread_error)}, p@1 {signed(sample, sample_error)}.",
  )
  for arm in ("ei", "ppo"):
    texts, within = [], []
    gain, _ = differ(arm, START, "maj@1")
    for metric in ("pass@8", "pass@32"):
      start = max(EPOCHS, key=lambda name: values(name, metric).mean())
      over, error = differ(arm, start, metric)
      within.append(over <= max(gain, 0) / 2)
      texts.append(f"{metric} {signed(over, error)}")
    yield (
      f"C5, exploration is bounded ({ARMS[arm]})",
      judge(all(within), not any(within)),
      f"Over the best SFT by that metric: {', '.join(texts)}; at most half of "
      f"the gain in maj@1, {number(gain, 3)}, is asked for.",
    )
  gap, error = differ("ei", "ei_continued", "maj@1")
  more, more_error = differ("ei", "ei_continued", "unique correct")
  yield (
    "C6, restart matters",
    judge(
      gap >= -error and more > 0, gap < -2 * error or more < -2 * more_error
    ),
    f"Restarting minus continuing: maj@1 {signed(gap, error)}, unique correct "
    f"traces {signed(more, more_error)}.",
  )
  gaps = {
    arm: differ(arm, "ei", "maj@1")
    for arm in ("rcrl_50", "rcrl_75", "rcrl_100")
  }
  more, more_error = differ("rcrl_100", "rcrl_50", "maj@1")
  yield (
    "C7, RCRL is not better",
    judge(
      max(gap for gap, _ in gaps.values()) <= 0 and more > 0,
      any(gap > 2 * error for gap, error in gaps.values())
      or more < -2 * more_error,
    ),
    "maj@1 minus that of EI: "
    + "; ".join(f"{ARMS[a]} {signed(*gaps[a])}" for a in gaps)
    + f". 100 % over 50 % right: {signed(more, more_error)}.",
  )
  other = found["metrics, ORM of PPO samples"]
  by_model = [
    np.array(part["ei"]["rerank@32"]) - np.array(part["ppo"]["rerank@32"])
    for part in (metrics, other)
  ]
  bias, error = mean_and_error(by_model[0] - by_model[1])
  yield (
    "C8, reranking favours the ORM's own policy",
    judge(bias > 2 * error, bias < -2 * error),
    f"rerank@32 of EI minus PPO is {number(by_model[0].mean(), 3)} with an ORM "
    f"of EI's samples and {number(by_model[1].mean(), 3)} with one of PPO's: "
    f"{signed(bias, error)}.",
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


def draw(found):
  """Greedy accuracy on validation prompts, by samples drawn in training."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot

  curves = found["validation accuracy by rollouts"]
  groups = {
    "From SFT": [arm for arm in CURVES if "base" not in arm],
    "From the base model": [arm for arm in CURVES if "base" in arm],
  }
  figure, panels = pyplot.subplots(
    1, 2, figsize=(9.5, 3.4), sharey=True, layout="constrained"
  )
  for panel, (title, arms) in zip(panels, groups.items(), strict=True):
    for colour, arm in zip(report.COLOURS, arms, strict=False):
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
  figure.savefig(PICTURE, dpi=150)
  pyplot.close(figure)


if __name__ == "__main__":
  app.run(main)
