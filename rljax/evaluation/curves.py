"""Draws curves and makes tables of what a run has written."""

import json
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from rljax.storage import paths
from rljax.storage import rows as rows_lib

Path = str | os.PathLike[str]
Panels = Mapping[str, Sequence[str]]

# Okabe and Ito's colours, which colour-blind readers can tell apart, without
# the yellow, which is hard to see on white.
COLOURS = (
  "#0072B2",
  "#D55E00",
  "#009E73",
  "#CC79A7",
  "#E69F00",
  "#56B4E9",
  "#000000",
)
# What a run's picture shows: the panels of which it has logged something.
_LOSSES = ("offline", "nll", "token", "imitation", "pairwise", "bce", "fit")
_PREFERENCES = ("dpo", "ipo", "kto", "simpo", "orpo", "pro")
PANELS = {
  "Reward": ["reward/mean", "eval/reward"],
  "Reward terms": [
    *("reward/reward_model", "reward/steps", "reward/dense_reward_model"),
  ],
  "Reward functions": ["task/rewards/*"],
  "Reward functions, held out": ["eval/rewards/*", "dev/rewards/*"],
  "Left out of what is learnt": ["response/left_out", "response/unscored"],
  "Reward of the dev prompts": ["dev/reward"],
  "Correct": ["task/is_correct", "eval/is_correct", "samples/is_correct"],
  "Prompts with a right sample": ["samples/solved"],
  "Distinct right solutions of a prompt": ["samples/distinct_traces"],
  "Solutions in the data": ["data/size", "data/new"],
  "Correct, by the tag that is forced": [
    *("eval/good", "eval/bad", "eval/free"),
  ],
  "Loss": [
    *(f"{name}/loss" for name in (*_LOSSES, *_PREFERENCES)),
    "eval/loss",
  ],
  "In the right order, or right": [
    *(f"{name}/accuracy" for name in ("pairwise", "bce", *_PREFERENCES)),
    *("eval/accuracy", "eval/auc"),
  ],
  "Samples of a prompt": ["eval/rerank", "eval/sample_accuracy"],
  "Groups": ["groups/acceptance", "groups/without_signal"],
  "Entropy (nats)": ["entropy/token", "entropy/batch"],
  "Different answers": ["answers/distinct"],
  "Length (tokens)": ["response/length"],
  "KL to the reference (nats a response)": ["kl/sequence_k1"],
  "KL to the policy that sampled (nats a token)": ["ppo/approx_kl"],
  "Share that is clipped": [
    *("ppo/clip_fraction", "value/clip_fraction"),
    *("offline/clip_low_fraction", "offline/clip_high_fraction"),
  ],
  "Log-probability of a reply": [
    *("offline/sequence_log_prob_mean",),
    *(f"{name}/chosen_log_prob" for name in _PREFERENCES),
    *(f"{name}/rejected_log_prob" for name in _PREFERENCES),
  ],
  "Implicit reward of a reply": [
    *("dpo/chosen_reward", "dpo/rejected_reward"),
    *("kto/desirable_reward", "kto/undesirable_reward"),
  ],
  "Ratio to the first policy": ["token/ratio_mean"],
  "Lowest log-probability of a penalised token": [
    "token/penalized_log_prob_min"
  ],
  "Different pairs of words (dev)": ["dev/distinct_2"],
  "Words of a reply (dev)": ["dev/words"],
}
# What a picture of several policies shows, where all lines share a panel.
ARM_PANELS = {
  "Reward of samples": ["reward/mean"],
  "Reward of replies to dev prompts": ["dev/reward"],
  "Different pairs of words (dev)": ["dev/distinct_2"],
  "Words of a reply (dev)": ["dev/words"],
  "Correct, greedy, on test prompts": ["eval/is_correct"],
  "Entropy of an answer (nats)": ["entropy/token"],
  "Entropy of the batch's answers (nats)": ["entropy/batch"],
  "Different answers in a batch": ["answers/distinct"],
  "Largest share of one answer": ["entropy/batch_max_prob"],
}
_STYLES = ("-", "--", ":", "-.")
_MAX_POINTS = 400
_PANEL_INCHES = (4.0, 2.6)
_MAX_PANELS_ACROSS = 3
_GREY = "#555555"


def read_metrics(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """Reads a `metrics.jsonl`, which may still be written to.

  Args:
    path: the file; a missing one counts as empty.

  Returns:
    For each metric its steps `[N]` int64 and values `[N]` float64, in order of
    step. What is no number is left out, and so are lines that cannot be read.
  """
  found = {}
  for row in rows_lib.readable(path):
    for name, value in row.items():
      if name != "step" and isinstance(value, (int, float)):
        found.setdefault(name, {})[row["step"]] = value
  series = {}
  for name, values in found.items():
    steps = sorted(values)
    series[name] = (
      np.array(steps, np.int64),
      np.array([values[step] for step in steps], np.float64),
    )
  return series


def smooth(values: np.ndarray, window: int) -> np.ndarray:
  """Averages each value with its neighbours.

    y_n = mean of x_k over |k - n| <= window // 2

  Neighbours that do not exist are left out, so the line spans all of the data
  and, unlike a running average of the past, does not lag behind it.

  Args:
    values: `[N]` float.
    window: how many values count; 0 and 1 change nothing.

  Returns:
    `[N]` float64.
  """
  sums = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
  index = np.arange(len(values))
  first = np.maximum(index - window // 2, 0)
  last = np.minimum(index + window // 2 + 1, len(values))
  return (sums[last] - sums[first]) / (last - first)


def curves(
  metrics_path: Path, png_path: Path, panels: Panels, *, title: str = ""
) -> None:
  """Draws the metrics of one run: faint points, and a smoothed line.

  Metrics and panels without records are left out; if none is left, nothing is
  drawn. The picture replaces the old one whole.

  Args:
    metrics_path: a `metrics.jsonl`.
    png_path: the picture.
    panels: title of each panel to the metrics in it.
    title: of the picture, such as the run's name.
  """
  series = read_metrics(metrics_path)
  panels = present(panels, series)
  if not panels:
    return
  figure, axes = _figure(len(panels), title=title)
  for panel, (head, names) in zip(axes, panels.items(), strict=True):
    for colour, name in zip(_cycle(COLOURS), names, strict=False):
      steps, values = _thin(*series[name])
      if len(steps) > 1:
        panel.plot(
          steps, values, ".", color=colour, markersize=3.5, alpha=0.3, mew=0
        )
      panel.plot(
        steps,
        smooth(values, len(values) // 20),
        color=colour,
        linewidth=1.5,
        marker="o" if len(steps) < 12 else "",
        markersize=3,
        label=_label(name, names),
      )
    _finish(panel, head, legend=len(names) > 1)
    if all(_are_counts(series[name][1]) for name in names):
      panel.yaxis.get_major_locator().set_params(integer=True)
  _save(figure, png_path)


def compare(
  runs: Mapping[str, Sequence[Path]], png_path: Path, panels: Panels
) -> None:
  """Draws several arms of a study, each with all of its seeds.

  An arm's line is the mean of its seeds after each was smoothed; the band goes
  from the lowest seed to the highest. A step counts the seeds that have it.

  Args:
    runs: name of each arm to the `metrics.jsonl` of its seeds.
    png_path: the picture.
    panels: title of each panel to the metrics in it; a second metric in a
      panel is dashed.
  """
  arms = {
    arm: [read_metrics(path) for path in paths] for arm, paths in runs.items()
  }
  everything = {
    name for seeds in arms.values() for seed in seeds for name in seed
  }
  panels = present(panels, everything)
  if not panels:
    return
  figure, axes = _figure(len(panels), legend_rows=1)
  handles = {}
  for panel, (title, names) in zip(axes, panels.items(), strict=True):
    for colour, (arm, seeds) in zip(
      _cycle(COLOURS), arms.items(), strict=False
    ):
      for style, name in zip(_cycle(_STYLES), names, strict=False):
        found = [seed[name] for seed in seeds if name in seed]
        if not found:
          continue
        steps, low, mean, high = _band(found)
        if len(found) > 1:
          panel.fill_between(
            steps, low, high, color=colour, alpha=0.18, linewidth=0
          )
        (line,) = panel.plot(
          steps,
          mean,
          style,
          color=colour,
          linewidth=1.6,
          marker="o" if len(steps) < 12 else "",
          markersize=3,
        )
        handles.setdefault(f"{arm} ({_seeds(len(seeds))})", line)
    if len(names) > 1:
      for style, name in zip(_cycle(_STYLES), names, strict=False):
        panel.plot([], [], style, color=_GREY, label=_label(name, names))
    _finish(panel, title, legend=len(names) > 1)
  figure.legend(
    handles.values(),
    handles.keys(),
    loc="outside upper center",
    ncols=min(len(handles), 4),
    frameon=False,
    fontsize=10,
  )
  _save(figure, png_path)


def samples_table(samples_path: Path, limit: int = 10):
  """Makes a table of the last samples of a run, for rich to print.

  Args:
    samples_path: a `samples.jsonl`.
    limit: how many rows, from the end.

  Returns:
    A `rich.table.Table`: step, prompt, response, then the rest as it came; a
    nested mapping, such as the parts of a score, has a column for each entry.

  Raises:
    ValueError: if there is no such file.
  """
  from rich import table, text

  path = pathlib.Path(samples_path)
  if not path.exists():
    raise ValueError(f"{path} does not exist; the run has written no samples.")
  rows = []
  for line in path.read_text(encoding="utf-8").split("\n"):
    try:
      rows.append(_flat(json.loads(line)))
    except ValueError:
      continue
  rows = rows[-limit:] if limit > 0 else []
  first = ["step", "prompt", "response"]
  names = [name for name in first if any(name in row for row in rows)]
  for row in rows:
    names += [name for name in row if name not in names]
  numeric = {
    name
    for name in names
    if all(isinstance(row.get(name, 0), (int, float)) for row in rows)
  }
  shown = table.Table(show_lines=True)
  for name in names:
    shown.add_column(
      text.Text(name),
      justify="right" if name in numeric else "left",
      overflow="fold",
      no_wrap=name in numeric,
    )
  for row in rows:
    shown.add_row(*(text.Text(_cell(row.get(name, ""))) for name in names))
  return shown


def _cycle(items):
  while True:
    yield from items


def present(panels: Panels, names: Iterable[str]) -> dict[str, list[str]]:
  """Returns the panels with nothing but what is among `names`.

  A metric that ends in "*" stands for all that begin so and have no further
  "/" behind.
  """

  def matching(wanted):
    if not wanted.endswith("*"):
      return [wanted] if wanted in names else []
    start = wanted[:-1]
    return [
      name
      for name in names
      if name.startswith(start) and "/" not in name[len(start) :]
    ]

  names = list(names)
  kept = {
    title: [name for one in wanted for name in matching(one)]
    for title, wanted in panels.items()
  }
  return {title: wanted for title, wanted in kept.items() if wanted}


def _label(name, names):
  """Returns a metric without the part of its name that the panel shares."""
  shared = {other.rpartition("/")[0] for other in names}
  return name.rpartition("/")[2] if len(shared) == 1 else name


def _seeds(count):
  return "1 seed" if count == 1 else f"{count} seeds"


def _thin(steps, values):
  """Returns at most `_MAX_POINTS` points, each the mean of its neighbours."""
  if len(steps) <= _MAX_POINTS:
    return steps, values
  edges = np.linspace(0, len(steps), _MAX_POINTS + 1).astype(int)[:-1]
  counts = np.diff(np.append(edges, len(steps)))
  return (
    np.add.reduceat(steps, edges) / counts,
    np.add.reduceat(values, edges) / counts,
  )


def _band(found):
  """Returns steps, lowest, mean and highest of several seeds of one metric."""
  smoothed = [
    (steps, smooth(values, len(values) // 20)) for steps, values in found
  ]
  steps = np.unique(np.concatenate([steps for steps, _ in smoothed]))
  values = np.full((len(smoothed), len(steps)), np.nan)
  for row, (own_steps, own_values) in zip(values, smoothed, strict=True):
    row[np.searchsorted(steps, own_steps)] = own_values
  low, high = np.nanmin(values, axis=0), np.nanmax(values, axis=0)
  return steps, low, np.nanmean(values, axis=0), high


def _are_counts(values):
  """Whether values are whole numbers, and more than truth values."""
  return bool((values == np.round(values)).all() and (abs(values) > 1).any())


def _figure(num_panels, legend_rows=0, title=""):
  """Makes a figure with so many panels, side by side and in rows."""
  # Through matplotlib's objects: pyplot keeps state that threads would share.
  from matplotlib.backends import backend_agg
  from matplotlib.figure import Figure

  across = 2 if num_panels == 4 else min(num_panels, _MAX_PANELS_ACROSS)
  down = -(-num_panels // across)
  width, height = _PANEL_INCHES
  figure = Figure(
    figsize=(
      width * across,
      height * down + 0.35 * legend_rows + 0.3 * bool(title),
    ),
    dpi=110,
    layout="constrained",
  )
  backend_agg.FigureCanvasAgg(figure)
  if title:
    figure.suptitle(title, fontsize=12, x=0.01, ha="left", fontweight="bold")
  axes = figure.subplots(down, across, squeeze=False, sharex=True).ravel()
  for unused in axes[num_panels:]:
    unused.set_axis_off()
  return figure, axes[:num_panels]


def _finish(panel, title, *, legend):
  panel.set_title(title, loc="left", fontsize=11, fontweight="bold")
  panel.set_xlabel("step", fontsize=9, color=_GREY)
  panel.tick_params(labelsize=9, colors=_GREY, length=3, labelbottom=True)
  panel.grid(axis="y", color="#dddddd", linewidth=0.6)
  panel.set_axisbelow(True)
  panel.margins(x=0.02)
  panel.spines[["top", "right"]].set_visible(False)
  panel.spines[["left", "bottom"]].set_color("#aaaaaa")
  panel.xaxis.get_major_locator().set_params(integer=True, nbins=6)
  if legend:
    panel.legend(fontsize=8.5, frameon=False)


def _save(figure, path):
  with paths.whole(path) as partial:
    figure.savefig(partial, format="png")


def _flat(row):
  """Returns the row with the entries of nested mappings beside the others."""
  flat = {}
  for name, value in row.items():
    if isinstance(value, dict):
      flat.update(_flat(value))
    else:
      flat[name] = value
  return flat


def _cell(value):
  if isinstance(value, float):
    return f"{value:.3g}"
  return str(value)
