"""Responses with outcomes, which outcome reward models learn from.

A label says of a whole response whether it is right, or of each step whether it
can still lead to a right answer; a step is a line, see `steps.steps`.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from rljax.text import (
  chats,
  encoding,
  files,
  forms,
  logged,
  tokens,
  vocabularies,
)
from rljax.text import steps as steps_lib

LABELS = ("outcome", "sorm")
TARGETS = ("tokens", "step_ends", "last")


@dataclasses.dataclass(frozen=True)
class Solution(forms.Row):
  """Holds a response of known outcome, the only one of its `candidates`.

  Attributes:
    labels: one number in [0, 1] per step; the last is the outcome.
    has_answer: whether a final answer was found in it, so that it can be
      chosen among others. False only if its `parts` say so.
  """

  labels: tuple[float, ...]
  has_answer: bool

  @property
  def is_positive(self) -> bool:
    return self.labels[-1] >= 0.5


@dataclasses.dataclass(frozen=True)
class Labelled(encoding.Encoded):
  """Holds N solutions as ids, with labels for tokens.

  Attributes:
    labels: `[N, T]` float32, of the step that a token belongs to.
    is_target: `[N, T]` bool, True on the tokens to learn from.
    steps: `[N, T]` int32, which step that is.
  """

  labels: np.ndarray
  is_target: np.ndarray
  steps: np.ndarray


# Data.


def read(
  tokenizer: Any,
  data: str,
  eval_data: str = "",
  *,
  eval_share: float = 0.1,
  num_eval_rows: int,
  first_row: int = 0,
  num_rows: int = 0,
  task: Any = None,
  seed: int,
  options: Mapping[str, Any],
  labels: str = "outcome",
  targets: str = "tokens",
  balance_labels: bool = True,
  prompt_format: str = "plain",
  **limits: Any,
) -> encoding.Split:
  """Reads solutions to learn from and held-out ones, with labels for tokens.

  No held-out prompt is among those to learn from, and of the latter every
  (prompt, response) is taken once. Held-out samples count as often as they
  were drawn, balanced or not.

  Args:
    tokenizer: encodes them.
    data: files with commas between them, see `load`; empty: the task's log.
    eval_data: the same, of the held-out ones.
    eval_share: share of the different prompts in `data` that is held out,
      where there is no `eval_data`.
    num_eval_rows: held-out solutions that are used at most, the first ones.
    first_row: solutions of `data` that are passed over at its beginning.
    num_rows: solutions that are used from there on; 0 uses all.
    task: module with `logged`, where no file is named.
    seed: of every draw.
    options: of the task's log.
    labels: see `parse`.
    targets: see `label_tokens`.
    balance_labels: whether to `balance` those to learn from, by steps for
      "sorm".
    prompt_format: see `chats.render`.
    **limits: of `encoding.encode`.

  Returns:
    Both as `Labelled`, with what was left out.

  Raises:
    ValueError: if there is nothing to learn from, or the held-out solutions
      have all one outcome.
  """
  skipped: list[str] = []
  notes: list[str] = []

  def scored(names, split):
    if names:
      found = load(names.split(","), split, labels)
      skipped.extend(found.skipped)
      notes.extend(found.notes)
      return found.rows
    return from_rows(logged.task_rows(task, split, seed, options))

  def rendered(rows):
    rows, unusable = chats.render(rows, tokenizer, prompt_format)
    skipped.extend(unusable)
    return rows

  def labelled(rows):
    encoded = encoding.encode(tokenizer, rows, **limits)
    skipped.extend(encoded.skipped)
    return label_tokens(encoded, tokenizer, targets)

  rows = scored(data, "train")[first_row:]
  rows = rendered(rows[: num_rows or None])
  num_shared = 0
  if data and not eval_data:
    rows, held_out = split_prompts(rows, eval_share, seed=seed)
  else:
    held_out = rendered(scored(eval_data, "validation"))
    num_shared, rows = len(rows), _without_prompts(rows, held_out)
    num_shared -= len(rows)
  held_out = labelled(held_out[:num_eval_rows])
  if len({row.is_positive for row in held_out.rows}) < 2:
    raise ValueError(
      f"All {len(held_out.rows)} held-out solutions have the same outcome; "
      "give more (--num_eval_rows)."
    )
  different = distinct(rows)
  train = whole = labelled(different)
  if balance_labels:
    train = balance(whole, by_step=labels == "sorm", seed=seed)
  num_targets = int(train.is_target.sum())
  counts = {
    "solutions of held-out prompts left out": num_shared,
    "duplicates left out": len(rows) - len(different),
    "solutions left out for balance": len(whole.rows) - len(train.rows),
    "targets left out for balance": int(whole.is_target.sum()) - num_targets,
    "good solutions": sum(row.is_positive for row in train.rows),
    "targets": num_targets,
    "good targets": int(np.sum(train.labels[train.is_target] >= 0.5)),
  }
  return encoding.Split(train, held_out, skipped, counts, notes)


def batch(
  part: Labelled, rows: Sequence[int], lengths: Sequence[int]
) -> dict[str, np.ndarray]:
  """Pads B solutions to a batch.

  Args:
    part: N solutions.
    rows: B row numbers.
    lengths: columns P and T of prompts and responses.

  Returns:
    The arrays of `encoding.batch`, `labels` `[B, T]` float32 and `is_target`
    `[B, T]` bool.
  """
  missing = ((0, 0), (0, lengths[1] - part.labels.shape[1]))
  return {
    **encoding.batch(
      part,
      rows,
      np.zeros(len(rows), int),
      prompt_length=lengths[0],
      response_length=lengths[1],
    ),
    "labels": np.pad(part.labels[rows], missing),
    "is_target": np.pad(part.is_target[rows], missing),
  }


# Rows.


def load(names: Sequence[str], split: str, labels: str) -> logged.Loaded:
  """Loads scored responses.

  Args:
    names: of files, see `logged.load`.
    split: such as "train".
    labels: see `parse`.

  Returns:
    Solutions in order, and what was left out.

  Raises:
    ValueError: if there is no such file or split, no row can be used, or an
      outcome is not in [0, 1].
  """
  solutions, skipped, notes = [], [], []
  for name in names:
    reader = forms.Reader(name)
    for found in reader.read(
      files.load_placed_rows(name, split),
      read=lambda row, place, _: parse(row, place, labels),
      needed=False,
    ):
      solutions += found
    skipped += reader.skipped
    notes += reader.notes()
  if not solutions:
    raise ValueError(
      f"{', '.join(names)}: no row can be used: {' '.join(skipped[:3])}"
    )
  return logged.Loaded(_checked(solutions), skipped, notes)


def from_rows(rows: Sequence[forms.Row]) -> list[Solution]:
  """Makes a solution of every scored candidate of rows.

  Raises:
    ValueError: if a row has no rewards, or one is not in [0, 1].
  """
  return _checked([found for row in rows for found in _of_row(row)])


def parse(row: Mapping[str, Any], place: str, labels: str) -> list[Solution]:
  """Reads the solutions of one row.

  "outcome" gives every step the label of the whole response: its reward, or
  `is_correct` where it has none. "sorm" asks whether a step can still lead to a
  right answer, by `values`, the shares of right ones among completions of the
  prefix that ends in the step: `steps.possible_labels`. A response that ran out
  of length (`finished` is false) is wrong, whatever its reward.

  Args:
    row: JSON values by field: `prompt`, `response` and `reward` as
      `responders.collect` writes them, or any form of `forms.parse` with
      rewards. For "sorm" `prompt`, `response` and `values`.
    place: of the row, for messages.
    labels: "outcome" or "sorm".

  Returns:
    One solution per scored response of the row.

  Raises:
    ValueError: naming the place and what is wrong.
  """
  if labels not in LABELS:
    raise ValueError(f"labels must be {' or '.join(LABELS)}, got {labels!r}.")
  found = forms.parse(row, place)
  if labels == "outcome":
    if "reward" not in row and isinstance(row.get("is_correct"), bool):
      reward = float(row["is_correct"])
      found = dataclasses.replace(found, rewards=(reward,))
    solutions = _of_row(found)
    if row.get("finished") is False:
      solutions = [_wrong(solution) for solution in solutions]
  elif len(found.candidates) != 1:
    raise ValueError(f'{place}: labels=sorm needs one "response".')
  else:
    values = _values(row, found.candidates[0], place)
    if row.get("finished") is False:
      values[-1] = 0.0
    found_labels = map(float, steps_lib.possible_labels(values))
    solutions = [_solution(found, found_labels)]
  parts = row.get("parts")
  if isinstance(parts, Mapping) and parts.get("answer", "") is None:
    solutions = [dataclasses.replace(x, has_answer=False) for x in solutions]
  return solutions


def split_prompts(
  solutions: Sequence[Solution], share: float, *, seed: int
) -> tuple[list[Solution], list[Solution]]:
  """Splits off all solutions of some prompts.

  Args:
    solutions: N, whose prompts are texts.
    share: of the different prompts, in (0, 1); at least one, and not all.
    seed: of the choice.

  Returns:
    The solutions that are left, and those that were split off.

  Raises:
    ValueError: if `share` is not in (0, 1), or there is only one prompt.
  """
  if not 0 < share < 1:
    raise ValueError(f"share must lie between 0 and 1, got {share}.")
  prompts = list(dict.fromkeys(solution.prompt for solution in solutions))
  if len(prompts) < 2:
    raise ValueError(f"A split needs 2 prompts or more, got {len(prompts)}.")
  order = np.random.default_rng(seed).permutation(len(prompts))
  number = min(max(round(share * len(prompts)), 1), len(prompts) - 1)
  apart = {prompts[i] for i in order[:number]}
  return (
    [solution for solution in solutions if solution.prompt not in apart],
    [solution for solution in solutions if solution.prompt in apart],
  )


def distinct(solutions: Sequence[Solution]) -> list[Solution]:
  """Keeps the first solution of each (prompt, response)."""
  found = {}
  for solution in solutions:
    found.setdefault((solution.prompt, solution.candidates), solution)
  return list(found.values())


# Tokens.


def label_tokens(
  encoded: encoding.Encoded, tokenizer: Any, targets: str
) -> Labelled:
  """Labels the tokens of solutions by their steps.

  A step ends in the token with its line feed; a token that ends two belongs to
  the later one. The last step goes on to the end token.

  Args:
    encoded: N rows that are solutions.
    tokenizer: the one that encoded them.
    targets: the tokens to learn from: all "tokens" of the response, the
      "step_ends" and the "last" one, or the "last" one alone.

  Returns:
    The same rows with `[N, T]` arrays, where T is the longest response.

  Raises:
    ValueError: if a response has several lines, and the tokenizer cannot
      write a line feed.
  """
  if targets not in TARGETS:
    raise ValueError(
      f"targets must be one of {', '.join(TARGETS)}, got {targets!r}."
    )
  line_feeds = {}
  if any("\n" in row.candidates[0] for row in encoded.rows):
    tokens.require_tokens(tokenizer, text="\n")
    pieces = vocabularies.token_bytes(tokenizer)
    line_feeds = {
      i: piece.count(b"\n") for i, piece in enumerate(pieces) if b"\n" in piece
    }
  length = max(len(ids) for (ids,) in encoded.response_ids)
  shape = (len(encoded.rows), length)
  labels, is_target = np.zeros(shape, np.float32), np.zeros(shape, bool)
  steps = np.zeros(shape, np.int32)
  for n, (row, (ids,)) in enumerate(
    zip(encoded.rows, encoded.response_ids, strict=True)
  ):
    # A step is over after so many line feeds; a step without any goes on.
    parts = steps_lib.steps(row.candidates[0])
    ends = np.cumsum([part.count("\n") for part in parts], dtype=float)
    if "\n" not in parts[-1]:
      ends[-1] = math.inf
    counts = np.cumsum([line_feeds.get(token, 0) for token in ids])
    num_over = np.searchsorted(ends, counts, side="right")  # [t]
    ends_step = np.diff(num_over, prepend=0) > 0
    step = np.minimum(num_over - ends_step, len(parts) - 1)
    steps[n, : len(ids)] = step
    # A chat template may have stripped blank lines from the front.
    labels[n, : len(ids)] = np.float32(row.labels[-len(parts) :])[step]
    if targets == "tokens":
      is_target[n, : len(ids)] = True
    elif targets == "step_ends":
      is_target[n, : len(ids)] = ends_step
    is_target[n, len(ids) - 1] = True
  return Labelled(
    **_fields(encoded), labels=labels, is_target=is_target, steps=steps
  )


def balanced(
  is_positive: np.ndarray, groups: np.ndarray, *, seed: int
) -> np.ndarray:
  """Chooses items so that each group has as many positive as negative ones.

  Args:
    is_positive: `[N]` bool.
    groups: `[N]` int.
    seed: of the draw among the surplus.

  Returns:
    `[N]` bool.
  """
  is_positive, groups = np.asarray(is_positive, bool), np.asarray(groups)
  keep = np.zeros(is_positive.shape, bool)
  rng = np.random.default_rng(seed)
  for group in np.unique(groups):
    sides = [
      np.flatnonzero((groups == group) & (is_positive == side))
      for side in (True, False)
    ]
    number = min(map(len, sides))
    for side in sides:
      keep[rng.permutation(side)[:number]] = True
  return keep


def balance(part: Labelled, *, by_step: bool, seed: int) -> Labelled:
  """Drops solutions, or targets, until labels are balanced.

  Args:
    part: N solutions with labels for tokens.
    by_step: whether the targets of steps are dropped, so that among the first
      steps as many are positive as negative, and so on; a solution without a
      target is dropped with them. Otherwise whole solutions are.
    seed: of the draw.

  Returns:
    The solutions and targets that are left.

  Raises:
    ValueError: if nothing is left.
  """
  if by_step:
    rows, columns = np.nonzero(part.is_target)
    items = np.stack([rows, part.steps[rows, columns]])  # [2, targets]
    items, first, item_of = np.unique(
      items, axis=1, return_index=True, return_inverse=True
    )
    is_positive = part.labels[rows, columns][first] >= 0.5
    keep = balanced(is_positive, items[1], seed=seed)
    is_target = part.is_target.copy()
    is_target[rows, columns] = keep[item_of.reshape(-1)]
    part = dataclasses.replace(part, is_target=is_target)
    kept = is_target.any(axis=1)
  else:
    is_positive = np.array([row.is_positive for row in part.rows])
    kept = balanced(is_positive, np.zeros(len(part.rows), int), seed=seed)
  if not kept.any():
    raise ValueError(
      f"{int(is_positive.sum())} of {len(is_positive)} labels are positive: "
      "there is nothing to balance."
    )
  return encoding.take(part, np.flatnonzero(kept))


# Helpers.


def _without_prompts(
  rows: Sequence[Solution], others: Sequence[Solution]
) -> list[Solution]:
  """Solutions whose prompts others do not have."""
  asked = {row.prompt for row in others}
  left = [row for row in rows if row.prompt not in asked]
  if not left:
    raise ValueError("All prompts of the training rows are held out.")
  return left


def _of_row(row: forms.Row) -> list[Solution]:
  """Makes a solution of every candidate, its reward the label of all steps."""
  if row.rewards is None:
    raise ValueError(f'{row.place}: "reward" is missing.')
  return [
    _solution(
      dataclasses.replace(row, candidates=(text,), rewards=(reward,)),
      [reward] * len(steps_lib.steps(text)),
    )
    for text, reward in zip(row.candidates, row.rewards, strict=True)
  ]


def _solution(row: forms.Row, labels: Iterable[float]) -> Solution:
  # Encoded from its text, end token included, as a reward model will read it,
  # not from the ids that were drawn.
  fields = _fields(row) | {"response_ids": None}
  return Solution(**fields, labels=tuple(labels), has_answer=True)


def _wrong(solution: Solution) -> Solution:
  return dataclasses.replace(solution, labels=(0.0,) * len(solution.labels))


def _values(row: Mapping[str, Any], response: str, place: str) -> list[float]:
  """Returns the values of a response's steps, which must fit them."""
  values = row.get("values")
  if not isinstance(values, list):
    raise ValueError(f'{place}: "values" is missing; labels=sorm needs it.')
  for value in values:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= 1:
      raise ValueError(
        f'{place}: "values" must be shares in [0, 1], got {value!r:.20}.'
      )
  steps = steps_lib.steps(response)
  if row.get("steps", steps) != steps or len(values) != len(steps):
    raise ValueError(
      f"{place}: there are {len(values)} values, but the response has "
      f'{len(steps)} lines, or its "steps" are not its lines.'
    )
  return [float(value) for value in values]


def _checked(solutions: list[Solution]) -> list[Solution]:
  for solution in solutions:
    if not all(0 <= label <= 1 for label in solution.labels):
      raise ValueError(
        f"{solution.place}: an outcome must lie in [0, 1], got "
        f"{solution.labels[-1]:g}."
      )
  return solutions


def _fields(row: Any) -> dict[str, Any]:
  """Returns the fields of a dataclass, not copied."""
  return {
    field.name: getattr(row, field.name) for field in dataclasses.fields(row)
  }
