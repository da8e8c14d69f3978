"""Compares training runs: their curves, and their last evaluations in pairs.

  python -m rljax.compare runs/a runs/b
  python -m rljax.compare none=runs/a none=runs/a_1 batch=runs/b --out=both.png

A run is its workdir, with a label in front or none; a label that comes twice is
another seed of it. The picture has every panel of which a run has logged
something. The table has, of the prompts that the last evaluations of the first
label and of another one share, the mean difference and its 95 % bootstrap
interval over prompts, whose seeds are averaged first.
"""

import argparse
import json
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rljax.evaluation import curves, metrics, tables
from rljax.storage import buckets
from rljax.text import asked, files
from rljax.training import logs

# What is compared of a row of `evaluations.jsonl`.
MEASURES = ("reward", "is_correct")


def last_evaluation(
  workdir: str | os.PathLike[str],
) -> tuple[int, dict[tuple[str, int], dict[str, Any]]]:
  """Reads what a run's last evaluation said of each prompt.

  Args:
    workdir: of the run.

  Returns:
    The step, and by prompt and number of its repetition a row of
    `evaluations.jsonl`; -1 and nothing if the run has filed none.
  """
  path = pathlib.Path(workdir, "evaluations.jsonl")
  if not path.is_file() or not path.stat().st_size:
    return -1, {}
  rows = files.read_jsonl(path)
  step = max(row["step"] for row in rows)
  found: dict[tuple[str, int], dict[str, Any]] = {}
  for row in rows:
    if row["step"] == step:
      name, number = asked.key(row["prompt"]), 0
      while (name, number) in found:
        number += 1
      found[name, number] = row
  return step, found


def differences(
  arms: Mapping[str, Sequence[str]],
) -> dict[str, dict[str, Any]]:
  """Compares the last evaluations of arms with those of the first one.

  Args:
    arms: label -> workdirs of its seeds.

  Returns:
    By label: its steps, how many prompts it shares with the first, the mean of
    each of `MEASURES`, and the mean difference with its interval.
  """
  several = {
    label: [last_evaluation(workdir) for workdir in workdirs]
    for label, workdirs in arms.items()
  }
  first, *_ = several
  table = {}
  for label, evaluations in several.items():
    steps = sorted({step for step, _ in evaluations if step >= 0})
    table[label] = {"step": ", ".join(map(str, steps)) or "none"}
    everywhere = [rows for _, rows in (*several[first], *evaluations)]
    shared = set.intersection(*map(set, everywhere))
    table[label]["prompts"] = len(shared)
    for measure in MEASURES:
      own = _means(evaluations, shared, measure)
      base = _means(several[first], shared, measure)
      both = ~np.isnan(own) & ~np.isnan(base)
      if not both.any():
        continue
      table[label][measure] = float(own[both].mean())
      if label != first:
        table[label][f"{measure} - {first}"] = tables.interval(
          metrics.paired_interval(own[both], base[both])
        )
  return table


def _means(evaluations, shared, measure) -> np.ndarray:
  """The mean over seeds of a measure of each shared prompt; NaN if unknown."""
  values = np.array(
    [
      [
        np.nan if rows[key].get(measure) is None else float(rows[key][measure])
        for key in sorted(shared)
      ]
      for _, rows in evaluations
    ]
  ).reshape(len(evaluations), -1)
  return values.mean(axis=0)


def parse(names: Sequence[str]) -> dict[str, list[str]]:
  """Reads `label=workdir` or `workdir` words.

  Raises:
    ValueError: if one is no workdir of a run.
  """
  arms: dict[str, list[str]] = {}
  for name in names:
    label, equals, workdir = name.partition("=")
    if not equals or os.path.isdir(name):
      label, workdir = name.rstrip("/"), name
    named = workdir
    if buckets.is_url(workdir):
      workdir = os.fspath(buckets.fetch(workdir, _rows_of, name="The run"))
    if not pathlib.Path(workdir, "metrics.jsonl").is_file():
      raise ValueError(
        f"{named} has no metrics.jsonl: it is not the workdir of a training "
        "run."
      )
    arms.setdefault(label, []).append(workdir)
  if len(arms) < 2:
    raise ValueError(
      "Give two runs or more with different labels to be compared, got "
      f"{', '.join(arms) or 'none'}."
    )
  return arms


def _rows_of(objects):
  """Chooses what is compared among the objects of a workdir at a URL."""
  return [
    x for x in objects if x.endswith((".jsonl", ".json")) and "/" not in x
  ]


def panels(arms: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
  """Returns a panel for every metric that a run's own picture shows."""
  known = {
    name
    for workdirs in arms.values()
    for workdir in workdirs
    for name in curves.read_metrics(pathlib.Path(workdir, "metrics.jsonl"))
  }
  shown = curves.present(curves.PANELS, known)
  return {
    title if len(names) == 1 else f"{title}: {name}": [name]
    for title, names in shown.items()
    for name in names
  }


def main(arguments: Sequence[str] | None = None) -> int:
  """Reads the command line; returns the exit status."""
  parser = argparse.ArgumentParser(
    prog="python -m rljax.compare", description=__doc__.split("\n")[0]
  )
  parser.add_argument("runs", nargs="+", help="label=workdir, or a workdir.")
  parser.add_argument(
    "--out", default="compare.png", help="Picture of the curves."
  )
  parser.add_argument("--json", help="File for the table as JSON.")
  options = parser.parse_args(arguments)
  try:
    arms = parse(options.runs)
    table = differences(arms)
  except ValueError as error:
    print(f"rljax.compare: {error}", file=sys.stderr)
    return 1
  paths = {
    label: [pathlib.Path(workdir, "metrics.jsonl") for workdir in workdirs]
    for label, workdirs in arms.items()
  }
  curves.compare(paths, options.out, panels(arms))
  print(f"Curves: {options.out}")
  logs.print_table(table, "Last evaluations, prompt by prompt")
  if any(row["step"] == "none" for row in table.values()):
    print(
      "A run without evaluations.jsonl has no evaluation on held-out prompts."
    )
  if options.json:
    pathlib.Path(options.json).write_text(json.dumps(table, indent=2) + "\n")
  return 0


if __name__ == "__main__":
  sys.exit(main())
