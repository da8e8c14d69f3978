"""Tasks: `prompts(split, seed)` and `score(prompt, response)`.

A task is a module of this folder, or one of the user's own, by its name or its
path.
"""

import importlib
import types
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rljax.tasks import own

_LARGEST = float(np.finfo(np.float32).max)
_MODULES = {
  "arithmetic": "rljax.tasks.arithmetic",
  "arithmetic_format": "rljax.tasks.arithmetic_format",
  "chains": "rljax.tasks.chains",
  "diversity": "rljax.tasks.diversity",
  "games": "rljax.tasks.games",
  "math_word_problems": "rljax.tasks.math_word_problems",
  "merge_sums": "rljax.tasks.merge_sums",
  "reasoning_gym": "rljax.tasks.reasoning_gym",
  "sentiment": "rljax.tasks.sentiment",
  "word_lists": "rljax.tasks.word_lists",
}


def load(name: str) -> types.ModuleType:
  """Imports a task.

  Args:
    name: one of those of rljax; or a path that ends in .py, or a module with a
      dot in its name, see `own.load`.

  Raises:
    ValueError: if there is no such task, with the names that there are; or if
      it has no `prompts`, or nothing that scores.
  """
  if name in _MODULES:
    return importlib.import_module(_MODULES[name])
  if not own.is_file(name) and "." not in name:
    raise ValueError(
      f"Unknown task {name!r}; known tasks are {', '.join(sorted(_MODULES))}. "
      "One of your own is named by its path, such as ./my_task.py, or its "
      "module, such as my_package.my_task."
    )
  task = own.load(name, "--task")
  for needed in (("prompts",), ("score", "score_batch")):
    if not any(callable(getattr(task, x, None)) for x in needed):
      raise ValueError(
        f"--task={name} has no function {' or '.join(needed)}; docs/tasks.md "
        "says what a task has."
      )
  return task


def tokenizer(task: types.ModuleType, kind: str) -> Any:
  """Makes a tokenizer of a task.

  Args:
    task: module, from `load`.
    kind: such as "word" or "character", of `<kind>_tokenizer` in the module.

  Raises:
    ValueError: if the task has no such tokenizer, with those that it has.
  """
  ending = "_tokenizer"
  if not hasattr(task, f"{kind}{ending}"):
    kinds = [
      name.removesuffix(ending)
      for name in vars(task)
      if name.endswith(ending) and not name.startswith("_")
    ]
    raise ValueError(
      f"The task {task.__name__.rpartition('.')[2]} has no tokenizer {kind!r}; "
      f"it has {', '.join(sorted(kinds)) or 'none'}."
    )
  return getattr(task, f"{kind}{ending}")()


def check_parts(
  scorer: Mapping[str, Any], parts: Sequence[Mapping[str, Any]], *needed: str
) -> None:
  """Raises ValueError unless scores have these parts.

  Args:
    scorer: what it is, its `description`.
    parts: of any response.
    *needed: names of the parts.
  """
  missing = [part for part in needed if part not in parts[0]]
  if missing:
    has = f"has {', '.join(parts[0]) or 'none'}"
    if "rewards" in scorer:
      raise ValueError(
        f"This needs rewards with the parts {', '.join(missing)}; that of "
        f"--rewards {has}. A function returns parts in a pair, (reward, "
        '{"is_correct": True, "answer": "4"}); --right_at says is_correct '
        "of rewards alone."
      )
    raise ValueError(
      f"This needs a task whose score has the parts {', '.join(missing)}; that "
      f"of {scorer.get('task', 'this one')} {has}."
    )


def score_all(
  task: Any, prompts: Sequence[str], responses: Sequence[str], **options: Any
) -> tuple[np.ndarray, list[dict[str, Any]]]:
  """Scores a batch of responses, and checks what the task returns.

  A task that is faster on batches, such as a classifier, may define
  `score_batch(prompts, responses, **options) -> (scores, parts)`; others score
  one response at a time.

  Args:
    task: module or object with `score` or `score_batch`.
    prompts: N texts.
    responses: N texts.
    **options: passed on to the task.

  Returns:
    `[N]` float32 scores, and N dicts of their parts.

  Raises:
    ValueError: if a score is not a finite number, naming its prompt; or if
      there are not N of them.
  """
  if len(prompts) != len(responses):
    raise ValueError(
      f"There are {len(prompts)} prompts, but {len(responses)} responses."
    )
  if hasattr(task, "score_batch"):
    scores, parts = task.score_batch(prompts, responses, **options)
    if len(scores) != len(prompts) or len(parts) != len(prompts):
      raise ValueError(
        f"score_batch was given {len(prompts)} responses and returned "
        f"{len(scores)} scores and {len(parts)} parts."
      )
  else:
    pairs = zip(prompts, responses, strict=True)
    outcomes = [
      # A score may come without parts.
      outcome if isinstance(outcome, tuple) else (outcome, {})
      for outcome in (task.score(p, r, **options) for p, r in pairs)
    ]
    scores = [score for score, _ in outcomes]
    parts = [part for _, part in outcomes]
  for prompt, response, score in zip(prompts, responses, scores, strict=True):
    try:
      is_finite = abs(score) <= _LARGEST  # False for NaN.
    except (TypeError, OverflowError):
      is_finite = False
    if not is_finite:
      raise ValueError(
        "The score must be a finite number, as float32 holds it, got "
        f"{_shown(score)} for the prompt {prompt[-200:]!r} and the response "
        f"{response[:200]!r}."
      )
  return np.asarray(scores, np.float32), list(parts)


def _shown(score: Any) -> str:
  try:
    return repr(score)[:60]
  except ValueError:  # Python writes out no number of so many digits.
    return "an integer of thousands of digits"
