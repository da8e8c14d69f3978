"""Arms of a comparison: policies by label, one for each seed, and their runs.

seeds = arms.read(["start=runs/sft", "ppo=runs/ppo_0", "ppo=runs/ppo_1"])
# Two arms: start with one seed, ppo with two.
"""

import os
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from rljax.evaluation import curves, tables
from rljax.text import forms

# Metric of a training run -> column of the table of its last steps.
TAIL_METRICS = {
  "reward/mean": "reward",
  "task/is_correct": "correct",
  "entropy/token": "entropy of an answer",
  "entropy/batch": "batch entropy",
  "entropy/batch_max_prob": "top share",
  "answers/distinct": "answers in a batch",
}
# A run that logged one of these was trained by rewards.
_REWARDS = {"reward/mean", "dev/reward"}


class Seed(NamedTuple):
  """One policy of an arm.

  Attributes:
    label: of the arm.
    number: of the policy within it, from 0.
    model: name of the policy.
    reference: name of the model that it is compared with, or "".
  """

  label: str
  number: int
  model: str
  reference: str = ""

  @property
  def file_name(self) -> str:
    """Label and number, as part of a file's name."""
    return f"{_file_name(self.label)}-{self.number}"


def read(policies: Sequence[str], references: Sequence[str] = ()) -> list[Seed]:
  """Reads which policies are compared.

  Args:
    policies: "label=model", or a model alone, which is its own label. A label
      that comes again is another seed of it.
    references: no model, one, or as many as each arm has seeds.

  Returns:
    The seeds, those of a label behind each other.

  Raises:
    ValueError: if there is no policy, one has no label or no name, or an arm
      has neither one seed for each reference nor one reference for all.
  """
  arms: dict[str, list[str]] = {}
  for entry in policies:
    label, equals, name = entry.rpartition("=")
    label = label if equals else entry
    if not label or not name:
      raise ValueError(
        f"--policies takes entries label=model, got {entry!r} without a label "
        "or without a model."
      )
    arms.setdefault(label, []).append(name)
  if not arms:
    raise ValueError("--policies names no model; give label=model,...")
  names = list(references) or [""]
  for label, models in arms.items():
    if len(names) not in (1, len(models)):
      raise ValueError(
        f"--reference names {len(names)} models, and {label} has "
        f"{len(models)} seeds; give one for all, or one for each."
      )
  return [
    Seed(label, number, model, names[number % len(names)])
    for label, models in arms.items()
    for number, model in enumerate(models)
  ]


def models(seeds: Sequence[Seed]) -> list[str]:
  """Returns the names of all policies and references, each once."""
  names = [name for seed in seeds for name in (seed.model, seed.reference)]
  return list(dict.fromkeys(filter(None, names)))


def check_file_names(seeds: Sequence[Seed]) -> None:
  """Raises ValueError if two labels would have the same files."""
  labels = list(dict.fromkeys(seed.label for seed in seeds))
  if len(set(map(_file_name, labels))) < len(labels):
    raise ValueError(
      f"The labels {', '.join(labels)} would share files; give others."
    )


def check_same_rows(
  model: str, rows: Sequence[forms.Row], others: Sequence[forms.Row] | None
) -> None:
  """Raises ValueError unless a policy is asked what another one is asked.

  Args:
    model: name of the policy.
    rows: that it is asked.
    others: that another policy is asked, or None.
  """
  if others is not None and [r.place for r in rows] != [
    r.place for r in others
  ]:
    raise ValueError(
      f"{model} was left {len(rows)} prompts that are not those of another "
      "policy; give --too_long=cut or a larger --max_prompt_length."
    )


def notes(prompts: Sequence[str]) -> list[str]:
  """Returns a sentence if prompts are asked twice."""
  num_different = len(set(prompts))
  if num_different == len(prompts):
    return []
  return [
    f"{num_different} of {len(prompts)} prompts are different, and the others "
    "repeat them: intervals are narrower than they should be."
  ]


def histories(seeds: Sequence[Seed]) -> dict[str, list[str]]:
  """Finds the metrics of the runs that trained the policies by rewards.

  Args:
    seeds: of all arms.

  Returns:
    Label to a `metrics.jsonl` of each seed. Arms of which a seed has logged no
    reward are left out: they have no curve.
  """
  found: dict[str, list[str]] = {}
  for seed in seeds:
    found.setdefault(seed.label, []).append(_history(seed.model))
  return {
    label: paths
    for label, paths in found.items()
    if all(map(_has_rewards, paths))
  }


def tails(
  paths: Mapping[str, Sequence[str]], *, num_steps: int = 50
) -> dict[str, dict[str, str]]:
  """Averages the last steps of training runs.

  Args:
    paths: label to a `metrics.jsonl` of each seed, see `histories`.
    num_steps: rows of each metric that count, the last ones.

  Returns:
    Label to columns of `TAIL_METRICS`: the mean over seeds, with the lowest and
    the highest. What no seed has logged is left out, and so are arms of which
    nothing is left.
  """
  table = {}
  for label, seeds in paths.items():
    series = [curves.read_metrics(path) for path in seeds]
    columns = {}
    for name, title in TAIL_METRICS.items():
      ends = [found[name][1][-num_steps:] for found in series if name in found]
      if ends:
        columns |= tables.mean_and_range(
          [{title: float(np.nanmean(values))} for values in ends]
        )
    if columns:
      table[label] = columns
  return table


def _file_name(label):
  """A label as part of a file's name."""
  return re.sub(r"[^\w.-]+", "_", label)


def _history(model):
  """The metrics of the run that a policy comes from."""
  folder, best = os.path.split(os.path.normpath(model))
  if best != "best":  # Where scripts keep the best parameters.
    folder = model
  return os.path.join(folder, "metrics.jsonl")


def _has_rewards(path):
  """Whether a run has logged rewards."""
  return os.path.exists(path) and not _REWARDS.isdisjoint(
    curves.read_metrics(path)
  )
