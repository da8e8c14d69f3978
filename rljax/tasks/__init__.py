"""Tasks: `prompts(split, seed)` and `score(prompt, response)`.

A task is a module of this folder, or one of the user's own, by its name or its
path.
"""

import functools
import importlib
import types
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rljax.storage import calls
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
  return score_rows(task, prompts, responses, options)


def score_rows(
  task: Any,
  prompts: Sequence[str],
  responses: Sequence[str],
  options: Mapping[str, Any],
  *,
  seconds: float = 0.0,
) -> tuple[np.ndarray, list[dict[str, Any]]]:
  """Does what `score_all` does, and limits the time that it takes.

  Args:
    task: see `score_all`; likewise `prompts` and `responses`.
    prompts: N texts.
    responses: N texts.
    options: passed on to the task.
    seconds: that one response may take, and a batch that many times its
      responses; 0: no limit.

  Returns:
    As `score_all`.

  Raises:
    ValueError: as `score_all`; `calls.CallError` if the task fails or takes too
      long, naming the prompt and the response.
    Exception: `checkpoint.Stopped`, if a signal asked for the end meanwhile.
  """
  if len(prompts) != len(responses):
    raise ValueError(
      f"There are {len(prompts)} prompts, but {len(responses)} responses."
    )
  if hasattr(task, "score_batch"):
    scores, parts = _scored(
      task, prompts, responses, options, len(prompts) * seconds
    )
    if len(scores) != len(prompts) or len(parts) != len(prompts):
      raise ValueError(
        f"score_batch was given {len(prompts)} responses and returned "
        f"{len(scores)} scores and {len(parts)} parts."
      )
  else:
    outcomes = _scored(task, prompts, responses, options, seconds)
    # A score may come without parts.
    outcomes = [
      outcome if isinstance(outcome, tuple) else (outcome, {})
      for outcome in outcomes
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


def _scored(task, prompts, responses, options, seconds):
  """Calls what a task scores with; an error carries what was asked."""
  name = getattr(task, "__name__", type(task).__name__).rpartition(".")[2]
  what = f"The score of {name}"
  about = lambda i: (
    f"for the prompt {calls.shown(prompts[i])} and the response "
    f"{calls.shown(responses[i])}"
  )
  try:
    if hasattr(task, "score_batch"):
      return calls.guard(
        lambda: task.score_batch(prompts, responses, **options),
        what=what,
        about=lambda: (
          f"{about(0)}, the first of {len(prompts)}" if prompts else "for none"
        ),
        seconds=seconds,
      )
    return calls.one_by_one(
      functools.partial(task.score, **options),
      list(zip(prompts, responses, strict=True)),
      what=what,
      about=about,
      seconds=seconds,
    )
  except (calls.CallError, calls.Ended) as error:
    calls.tell(error, prompts, responses)
    raise
