"""Scores that are kept on disk until the work that asked for them is done."""

import collections
import contextlib
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from rljax.distributed import processes
from rljax.scoring import scorers
from rljax.storage import calls, paths, rows, signals, stages
from rljax.text import asked as asked_lib
from rljax.text import files

_AT_A_TIME = 32  # Responses, between which a kill loses nothing.


def scorer(
  score: scorers.Scorer, workdir: str | os.PathLike[str]
) -> scorers.Scorer:
  """Makes a scorer that keeps what it has been told, in `scores.jsonl`.

  For scripts without checkpoints: a task that asks a service, and fails or is
  stopped after hours, is not asked again about what it has answered. Scores of
  a task that has changed meanwhile are set aside.

  Args:
    score: the scorer; one that scores responses together is only kept from
      losing what it was asked.
    workdir: of the run, which exists when it is called.

  Returns:
    The same scorer, with the same description.
  """
  path = pathlib.Path(workdir, rows.SCORES)
  source = getattr(score, "source", None)
  known: dict[tuple[str, str], list[Any]] | None = None

  def keep(found):
    # All wait for it.
    processes.from_first(lambda: files.append_jsonl(path, found))

  def ask(prompts, responses):
    """Scores some, and files what was answered before an error, too."""
    try:
      return score(prompts, responses)
    except (calls.CallError, calls.Ended) as error:
      if jax.process_count() == 1 and error.rows:
        asked = map(_row, prompts, responses)
        keep([new | row for row, new in zip(error.rows, asked, strict=False)])
        if error.args:
          error.args = (f"{error.args[0]} What was answered is in {path}.",)
      raise

  def kept(prompts: Sequence[str], responses: Sequence[str]):
    if source is None:
      return ask(prompts, responses)
    with contextlib.ExitStack() as stack:
      if not calls.CATCHERS and jax.process_count() == 1:
        stack.enter_context(signals.Preemption())
      return look_up(prompts, responses)

  def look_up(prompts, responses):
    """Asks for what is not known yet, and files it."""
    nonlocal known
    if known is None:
      made_of = {"score": score.description, "source": source}
      known = processes.from_first(lambda: _known(path, made_of))
      known = {tuple(pair): found for pair, found in known}
    used, missing = collections.Counter(), []
    pairs = [(_name(p), r) for p, r in zip(prompts, responses, strict=True)]
    for i, pair in enumerate(
      pairs
    ):  # A text that stands twice is scored twice.
      used[pair] += 1
      if used[pair] > len(known.get(pair, [])):
        missing.append(i)
    for start in range(0, len(missing), _AT_A_TIME):
      some = missing[start : start + _AT_A_TIME]
      scores, parts = ask(
        [prompts[i] for i in some], [responses[i] for i in some]
      )
      found = [
        _row(prompts[i], responses[i]) | {"reward": float(x), "parts": part}
        for i, x, part in zip(some, scores, parts, strict=True)
      ]
      keep(found)
      calls.check_stop()
      for i, row in zip(some, found, strict=True):
        outcome = [row["reward"], row["parts"]]
        known.setdefault(pairs[i], []).append(outcome)
    used, outcomes = collections.Counter(), []
    for pair in pairs:
      outcomes.append(known[pair][used[pair]])
      used[pair] += 1
    scores = np.asarray([x for x, _ in outcomes], np.float32)
    return scores, [dict(parts) for _, parts in outcomes]

  kept.description = score.description
  return kept


def _row(prompt, response):
  """What is filed of a response, before it is scored."""
  row = {"prompt": str(prompt), "response": response}
  return row | ({"asked": _name(prompt)} if _name(prompt) != prompt else {})


def _name(prompt):
  """A text that is the same for equal prompts of equal rows."""
  if not asked_lib.columns(prompt):
    return asked_lib.key(prompt)
  return json.dumps(
    [asked_lib.key(prompt), asked_lib.columns(prompt)],
    sort_keys=True,
    default=str,
  )


def _known(path, made_of):
  """Reads what a file holds of this scorer, as pairs with their outcomes."""
  if stages.is_of(path, made_of):
    files.append_jsonl(path, [])  # Cuts off what a killed writer left behind.
  elif path.exists():
    aside = paths.set_aside(path)
    print(f"{path} is of another score, and now {aside.name}.", flush=True)
  stages.describe(path, made_of)
  found = collections.defaultdict(list)
  if path.exists() and path.stat().st_size:
    for row in files.read_jsonl(path):
      if "reward" in row:
        pair = row.get("asked", row["prompt"]), row["response"]
        found[pair].append([row["reward"], row["parts"]])
  return list(found.items())
