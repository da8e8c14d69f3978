"""Logged responses: prompts, replies and their rewards, of files and tasks."""

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rljax.text import asked, chats, files, forms, keywords

Row = forms.Row


# Files.


class Loaded(NamedTuple):
  """Rows of a file or of a task.

  Attributes:
    rows: those that can be used, in order.
    skipped: a message with the place of each that cannot.
    notes: what the file holds, in lines; see `forms.Reader.notes`.
  """

  rows: list[Row]
  skipped: list[str]
  notes: list[str]


def load(
  name: str,
  split: str = "train",
  *,
  data_dir: str | os.PathLike | None = None,
  limit: int | None = None,
) -> Loaded:
  """Loads logged responses in any of the forms that `forms.parse` knows.

  Args:
    name: a file, a folder, "tfds:<name>" or "hub:<name>"; see
      `files.load_rows`.
    split: such as "train".
    data_dir: folder that relative paths start from; for tfds its data folder.
    limit: rows after which the file is read no further; None or 0: all.

  Returns:
    The rows in order. How many cannot be used and the first three are logged.

  Raises:
    ValueError: if there is no such file or split, or no row can be used.
  """
  return _load(name, split, data_dir, answered=True, limit=limit)


def load_or_draw(
  name: str,
  task: Any,
  split: str,
  seed: int,
  options: Mapping[str, Any],
  *,
  limit: int | None = None,
) -> Loaded:
  """Loads the rows of a file if one is named, else those of a task's log.

  Args:
    name: see `load`; may be empty.
    task: see `task_rows`, likewise `seed` and `options`.
    split: of either.
    seed: of the task's draw.
    options: of the task.
    limit: see `load`.

  Raises:
    ValueError: as `load` or `task_rows`.
  """
  if name:
    return load(name, split, limit=limit)
  return Loaded(task_rows(task, split, seed, options), [], [])


def load_or_ask(
  name: str, task: Any, split: str, seed: int, options: Mapping[str, Any]
) -> Loaded:
  """Loads the prompts of a file if one is named, else draws those of a task.

  Args:
    name: see `load_prompts`; may be empty.
    task: module with `prompts`.
    split: of either.
    seed: of the task's draw.
    options: keyword arguments of the task's `prompts`.

  Returns:
    Rows without candidates.

  Raises:
    ValueError: as `load_prompts`, or if the task has no such option.
  """
  if name:
    return load_prompts(name, split)
  keywords.check(task.prompts, options)
  prompts = task.prompts(split, seed, **options)
  rows = from_prompts(prompts, f"{_task_name(task)}, {split}")
  return Loaded(rows, [], [])


def task_rows(
  task: Any, split: str, seed: int, options: Mapping[str, Any]
) -> list[Row]:
  """Returns the replies that a task has logged.

  Args:
    task: module with `logged`.
    split: of the task.
    seed: of the draw.
    options: keyword arguments of the task's `logged`.

  Raises:
    ValueError: if the task has no log, or not such an option.
  """
  if not hasattr(task, "logged"):
    raise ValueError(
      f"The task {_task_name(task)} has no logged replies; give --data."
    )
  keywords.check(task.logged, options)
  return from_rows(
    task.logged(split, seed, **options), f"{_task_name(task)}, {split}"
  )


def task_prompts(task: Any, split: str, seed: int, num: int) -> list[Row]:
  """Returns prompts of a task, as rows without candidates."""
  prompts = task.prompts(split, seed, num=num)
  return from_prompts(prompts, f"{_task_name(task)}, {split}")


def task_examples(
  task: Any, split: str, seed: int, num: int, options: Mapping[str, Any]
) -> list[Row]:
  """Draws prompts of a task, each with the response to learn from.

  Args:
    task: module with `supervised`. Its prompts may be empty, so that the whole
      text is a response.
    split: of the task.
    seed: of the draw.
    num: number of prompts.
    options: further keyword arguments of the task's `supervised`.

  Raises:
    ValueError: if the task has no examples, or not such an option.
  """
  if not hasattr(task, "supervised"):
    raise ValueError(
      f"The task {_task_name(task)} has no examples to learn from: give --data."
    )
  keywords.check(task.supervised, options)
  name = f"{_task_name(task)}, {split}"
  pairs = task.supervised(split, seed, num=num, **options)
  return [
    Row(prompt, (response,), None, None, None, f"{name}, row {i}", None)
    for i, (prompt, response) in enumerate(pairs)
  ]


def _task_name(task: Any) -> str:
  return task.__name__.rpartition(".")[2]


def from_rows(rows: Iterable[Mapping[str, Any]], name: str) -> list[Row]:
  """Reads rows that a program made, such as a task, by `forms.parse`.

  Raises:
    ValueError: naming the first row that cannot be used.
  """
  return [forms.parse(row, f"{name}, row {i}") for i, row in enumerate(rows)]


def from_prompts(prompts: Iterable[str], name: str) -> list[Row]:
  """Makes rows without candidates of prompts."""
  return [
    forms.unanswered(p, f"{name}, row {i}") for i, p in enumerate(prompts)
  ]


def load_prompts(
  name: str, split: str = "train", *, data_dir: str | os.PathLike | None = None
) -> Loaded:
  """Loads the prompts of a file, with or without replies.

  Args:
    name: as for `load`; rows may have a `prompt` alone.
    split: such as "train".
    data_dir: folder that relative paths start from.

  Returns:
    Rows without candidates.

  Raises:
    ValueError: as `load`.
  """
  return _load(name, split, data_dir, answered=False)


def _load(name, split, data_dir, *, answered, limit=None) -> Loaded:
  """Reads a file once, see `load` and `load_prompts`."""
  reader = forms.Reader(name)
  rows = reader.read(
    files.load_placed_rows(name, split, data_dir=data_dir),
    answered=answered,
    limit=limit or None,
  )
  what = "rows" if answered else "prompts"
  chats.report(reader.skipped, len(rows), f"{what} of {name} cannot be used")
  return Loaded(rows, reader.skipped, reader.notes())


# Rows.


def joined(rows: Iterable[Row]) -> list[Row]:
  """Joins rows with one scored reply each to rows with all those of a prompt.

  So samples of an online run, of which each is a row, become replies that can
  be compared. Other rows, and those whose prompt has one reply, stay as they
  are; a joined row stands where its first reply stood, and has the place, the
  columns and the ids of that one.
  """
  found: dict[Any, list[Row]] = {}
  for number, row in enumerate(rows):
    alone = len(row.candidates) != 1 or row.rewards is None
    name = number if alone else asked.key(row.prompt)
    found.setdefault(name, []).append(row)
  return [
    several[0]
    if len(several) == 1
    else dataclasses.replace(
      several[0],
      candidates=tuple(row.candidates[0] for row in several),
      rewards=tuple(row.rewards[0] for row in several),
      finished=tuple((row.finished or (True,))[0] for row in several),
      advantage=None,
    )
    for several in found.values()
  ]


def first_replies(rows: Iterable[Row]) -> list[Row]:
  """Keeps of each row the reply to learn from."""
  return [
    dataclasses.replace(
      row,
      candidates=row.candidates[:1],
      rewards=None if row.rewards is None else row.rewards[:1],
    )
    for row in rows
  ]


def best_first(row: Row) -> Row:
  """Sorts the candidates of a row by reward, the best one first.

  Equal ones keep their order. An advantage and ids of a reply that is no longer
  the first are dropped.

  Raises:
    ValueError: if the row has no rewards.
  """
  if row.rewards is None:
    raise ValueError(f'{row.place}: "reward" is missing.')
  order = sorted(range(len(row.rewards)), key=lambda i: -row.rewards[i])
  changes = {
    "candidates": tuple(row.candidates[i] for i in order),
    "rewards": tuple(row.rewards[i] for i in order),
    "finished": row.finished and tuple(row.finished[i] for i in order),
  }
  if order[0] != 0:
    changes |= {"advantage": None, "response_ids": None}
  return dataclasses.replace(row, **changes)


def reward_array(rows: Sequence[Row]) -> np.ndarray:
  """Returns the rewards of all candidates, `[N, K]` float32.

  NaN where a candidate was not scored, and where a row has fewer than K.
  """
  rewards = np.full(
    (len(rows), max(len(row.candidates) for row in rows)), np.nan, np.float32
  )
  for i, row in enumerate(rows):
    if row.rewards is not None:
      rewards[i, : len(row.rewards)] = row.rewards
  return rewards


def advantage_array(rows: Sequence[Row]) -> np.ndarray:
  """Returns the advantages of all candidates, `[N, K]` float32.

  A row's own `advantage` is that of its first candidate; elsewhere it is the
  reward minus the row's `value`. NaN where neither is known.
  """
  values = [np.nan if row.value is None else row.value for row in rows]
  advantages = reward_array(rows) - np.float32(values)[:, None]
  for i, row in enumerate(rows):
    if row.advantage is not None:
      advantages[i, 0] = row.advantage
  return advantages


def check_rewards(rewards: np.ndarray, max_value: float = np.inf) -> None:
  """Raises ValueError if rewards are not in [0, max_value]; NaN passes."""
  low, high = np.nanmin(rewards), np.nanmax(rewards)
  if low < 0 or high > max_value:
    raise ValueError(
      f"Rewards must lie in [0, {max_value:g}], got {low:g} to {high:g}. A "
      "classifier's logits need a sigmoid (--reward_transform, --rescore); a "
      "larger scale needs another --max_value."
    )


def present(rows: Sequence[Row]) -> np.ndarray:
  """Returns which of K candidates there are, `[N, K]` bool."""
  counts = np.array([len(row.candidates) for row in rows])
  return np.arange(counts.max()) < counts[:, None]


def fingerprint(rows: Iterable[Row]) -> str:
  """Hashes prompts, candidates and rewards in order, but not places.

  Results such as values may be used for rows with the same fingerprint.
  """
  return forms.digest([row.prompt, row.candidates, row.rewards] for row in rows)
