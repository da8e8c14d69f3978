"""Tasks: `prompts(split, seed)` and `score(prompt, response)`.

A task is a module of this folder, or one of the user's own, by its name or its
path.
"""

import dataclasses
import decimal
import functools
import importlib
import numbers
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
  one response at a time, `score(prompt, response, **options) -> (score, part)`.
  Arrays of numpy, jax and torch, of shape [N] or [N, 1], lists, generators and
  truth values are taken for scores; without parts, the scores alone will do.

  Args:
    task: module or object with `score` or `score_batch`.
    prompts: N texts.
    responses: N texts.
    **options: passed on to the task.

  Returns:
    `[N]` float32 scores, and N dicts of their parts.

  Raises:
    ValueError: if a score is not a finite number, naming its prompt; or if
      there are not N of them, or parts that are no dicts, naming the task.
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
    Exception: `signals.Stopped`, if a signal asked for the end meanwhile.
  """
  if len(prompts) != len(responses):
    raise ValueError(
      f"There are {len(prompts)} prompts, but {len(responses)} responses."
    )
  name = _name(task)
  if hasattr(task, "score_batch"):
    found = _scored(task, prompts, responses, options, len(prompts) * seconds)
    scores, parts = _of_batch(found, len(prompts), name)
  else:
    outcomes = [
      _of_one(found, name)
      for found in _scored(task, prompts, responses, options, seconds)
    ]
    scores = [score for score, _ in outcomes]
    parts = [part for _, part in outcomes]
  for prompt, response, score in zip(prompts, responses, scores, strict=True):
    if finite(score) is None:
      raise ValueError(
        f"The score must be a finite number, as float32 holds it, got "
        f"{_shown(score)} of {name} for the prompt {prompt[-200:]!r} and the "
        f"response {response[:200]!r}."
      )
  return np.array([finite(score) for score in scores], np.float32), parts


# What tasks return.

_CONTRACT = (
  "score_batch(prompts, responses) returns N scores and N dicts of their "
  "parts, or the scores alone; score(prompt, response) a score and a dict, or "
  "the score alone"
)


def _name(task: Any) -> str:
  """The name of a task for messages: of its module, or of its class."""
  name = getattr(task, "__name__", None) or type(task).__name__
  return name.rpartition(".")[2]


def listed(values: Any) -> Any:
  """Arrays of numpy, torch and jax, and generators, as lists."""
  if isinstance(values, (str, bytes, Mapping)) or values is None:
    return values
  if hasattr(values, "detach"):  # Of torch, with a gradient or on a device.
    values = values.detach().cpu()
    if hasattr(values, "float"):
      values = values.float()  # numpy knows no bfloat16.
  if hasattr(values, "tolist"):
    return values.tolist()
  return list(values) if isinstance(values, Iterable) else values


def _of_batch(
  found: Any, number: int, name: str
) -> tuple[list[Any], list[dict[str, Any]]]:
  """Reads what `score_batch` returned, as scores and dicts.

  Raises:
    ValueError: naming the task and the contract, if it can be read in no way.
  """
  parts = None
  if isinstance(found, (tuple, list)):  # A generator can be read once.
    found = type(found)(
      [list(x) if isinstance(x, Iterator) else x for x in found]
    )
  if isinstance(found, (tuple, list)) and len(found) == 2:
    # Two scores, or scores and parts?
    is_list = isinstance(found, list) and any(map(_is_one, found))
    if not is_list and not (number == 2 and all(map(_is_one, found))):
      found, parts = found
  elif isinstance(found, tuple) and not all(map(_is_one, found)):
    raise ValueError(
      f"score_batch of {name} returned {len(found)} values: {_CONTRACT}."
    )
  scores = listed(found)
  if number == 1 and _is_score(scores):
    scores = [scores]
  if not isinstance(scores, list):
    raise ValueError(
      f"score_batch of {name} returned {_shown(found)} as scores: {_CONTRACT}."
    )
  scores = [listed(score) for score in scores]
  if number != 1 and len(scores) == 1 and isinstance(scores[0], list):
    scores = scores[0]  # Of shape [1, N].
  scores = [
    score[0] if isinstance(score, list) and len(score) == 1 else score
    for score in scores
  ]
  if isinstance(parts, Mapping) and number == 1:
    parts = [parts]
  parts = [{} for _ in scores] if parts is None else listed(parts)
  if not isinstance(parts, list):
    raise ValueError(
      f"score_batch of {name} returned {_shown(parts)} as its parts: "
      f"{_CONTRACT}."
    )
  if len(scores) != number or len(parts) != number:
    raise ValueError(
      f"score_batch of {name} was given {number} responses and returned "
      f"{len(scores)} scores and {len(parts)} parts: {_CONTRACT}."
    )
  return scores, [_part(part, name) for part in parts]


def _of_one(found: Any, name: str) -> tuple[Any, dict[str, Any]]:
  """Reads what `score` returned, as a score and a dict."""
  if isinstance(found, (tuple, list)) and len(found) == 2:
    score, part = found
    return listed(score), _part(part, name)
  score = listed(found)
  while isinstance(score, list) and len(score) == 1:
    score = score[0]
  if score is not None and not _is_score(score):
    raise ValueError(f"score of {name} returned {_shown(found)}: {_CONTRACT}.")
  return score, {}


def _part(part: Any, name: str) -> dict[str, Any]:
  """Returns a dict of parts that files can hold; None stands for none."""
  if part is None:
    return {}
  if dataclasses.is_dataclass(part) and not isinstance(part, type):
    part = dataclasses.asdict(part)
  elif hasattr(part, "_asdict"):
    part = part._asdict()
  if not isinstance(part, Mapping):
    raise ValueError(
      f"The parts of a score of {name} are {_shown(part)}, and must be a dict: "
      f"{_CONTRACT}."
    )
  try:
    return {str(key): plain(value) for key, value in part.items()}
  except RecursionError as error:
    raise ValueError(
      f"The parts of a score of {name} are nested too deeply to be written."
    ) from error


def plain(value: Any) -> Any:
  """Returns a value of a score's parts as JSON can hold it.

  Args:
    value: numbers, texts, lists and dicts stay; sets become lists, arrays
      what they hold, and anything else a text.
  """
  if value is None or isinstance(value, (bool, int, float, str)):
    return value
  if isinstance(value, Mapping):
    return {str(key): plain(item) for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    items = [plain(item) for item in value]
    return tuple(items) if type(value) is tuple else items
  if isinstance(value, (set, frozenset)):
    return sorted(map(plain, value), key=repr)
  if isinstance(value, (bytes, bytearray)):
    return bytes(value).decode("utf-8", "replace")
  if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
    return value.item()  # Of numpy, jax or torch.
  return value.tolist() if hasattr(value, "tolist") else str(value)


def _is_score(value: Any) -> bool:
  """Whether a value is a number, however large, or a truth value."""
  return isinstance(value, (numbers.Real, decimal.Decimal, np.bool_))


def _is_one(value: Any) -> bool:
  """Whether a value is a score, or an array or list of one."""
  value = listed(value)
  if isinstance(value, list) and len(value) == 1:
    value = value[0]
  return _is_score(value)


def finite(score: Any) -> float | None:
  """Returns a score as float32 can hold it; None for anything else."""
  while isinstance(score, list) and len(score) == 1:
    score = score[0]
  try:
    number = float(score) if _is_score(score) else float("nan")
  except (OverflowError, TypeError, ValueError):
    return None
  return number if abs(number) <= _LARGEST else None


def _shown(value: Any) -> str:
  """The beginning of what a value looks like."""
  try:
    return repr(value)[:60]
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
