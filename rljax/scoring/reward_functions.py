"""Reward functions of a user's own, called in worker processes with a limit.

  def length(prompts, responses, **columns):
    return [-abs(len(text) - 40) / 40 for text in responses]

`--rewards=my_rewards.py:length,my_package.rewards:style*0.5` names them. A
function is called with N prompts and N responses, and with the columns of the
data as keyword arguments, N values each, in the same order. It returns N items:
a number; None, for a response that it has nothing to say of; or a pair of a
number and a dict of parts, such as `is_correct`. It is given the arguments that
it names, or all of them if it takes `**columns`. A function whose responses are
called `completions` is one of TRL: prompts that are messages then come with
completions that are messages, too.

This file is imported by the workers: it needs no jax.
"""

import asyncio
import contextlib
import inspect
import itertools
import math
import os
import pathlib
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from rljax import tasks
from rljax.tasks import own, sandbox
from rljax.text import asked, files

_LARGEST = float(np.finfo(np.float32).max)
_SPEC = re.compile(
  r"(?P<source>[^*]+?):(?P<name>[A-Za-z_]\w*)(?:\*(?P<weight>.+))?"
)
# Seconds that a worker may take to import a function.
_START_SECONDS = 600.0

# Arguments of TRL's functions that are of its trainer.
_TRAINERS = ("completion_ids", "trainer_state", "log_extra", "log_metric")

Parts = dict[str, Any]
# What a function says of a response: a number or None, its parts, and why it
# failed or None.
Said = tuple[float | None, Parts, str | None]


class Reward(NamedTuple):
  """A reward function as a flag names it.

  Attributes:
    source: a path that ends in .py, or a module.
    function: name in it.
    weight: by which its rewards are multiplied.
    name: under which it is logged.
  """

  source: str
  function: str
  weight: float
  name: str

  @property
  def place(self) -> str:
    """How messages name it."""
    return f"{self.source}:{self.function}"


def parse(specs: Sequence[str]) -> list[Reward]:
  """Reads `file.py:function*weight` texts.

  Args:
    specs: of a flag --rewards. The weight may be left out, and is then 1.

  Raises:
    ValueError: if one has another form, or is given twice.
  """
  found = []
  for spec in specs:
    match = _SPEC.fullmatch(spec.strip())
    try:
      weight = float(match["weight"] or 1.0) if match else math.nan
    except ValueError:
      weight = math.nan
    if not abs(weight) <= _LARGEST:
      raise ValueError(
        "--rewards names functions as file.py:function or module:function, "
        f"each with a weight behind it or none, such as *0.5; got {spec!r}."
      )
    source, function = os.path.expanduser(match["source"]), match["name"]
    found.append(Reward(source, function, weight, function))
  functions = [reward.function for reward in found]
  named = [
    reward
    if functions.count(reward.function) == 1
    else reward._replace(
      name=f"{pathlib.Path(reward.source).stem}.{reward.function}"
    )
    for reward in found
  ]
  names = [reward.name for reward in named]
  for reward in named:
    if names.count(reward.name) > 1:
      raise ValueError(
        f"--rewards names {reward.name} twice: give the functions names "
        "that differ."
      )
  return named


class Functions:
  """Scores responses by the weighted sum of reward functions.

  A response is worth the sum over the functions that return a number for it,
  and NaN if none does: it is then left out of what is learnt.
  """

  def __init__(
    self,
    specs: Sequence[str],
    *,
    timeout: float = 60.0,
    batch_size: int = 256,
    num_workers: int = 1,
    skip_unscored: bool = False,
    right_at: float | None = None,
  ):
    """Starts nothing yet.

    Args:
      specs: see `parse`.
      timeout: seconds that a call may take.
      batch_size: responses of a call.
      num_workers: processes of each function.
      skip_unscored: whether a response for which a function fails or takes too
        long counts as one of which it has nothing to say; else it is an error.
      right_at: the least reward of a response that is right, for functions
        that do not say `is_correct`; None: nobody says it.

    Raises:
      ValueError: as `parse`.
    """
    self._rewards = parse(specs)
    self._batch_size, self._timeout = batch_size, timeout
    self._skip_unscored, self._right_at = skip_unscored, right_at
    self._pools = [
      sandbox.Pool(
        "rljax.scoring.reward_functions:call",
        timeout=timeout,
        setup="rljax.scoring.reward_functions:prepare",
        setup_arguments=(reward.source, reward.function),
        num_workers=num_workers,
        max_memory_bytes=None,
        start_timeout=_START_SECONDS,
      )
      for reward in self._rewards
    ]

  @property
  def description(self) -> dict[str, Any]:
    """Says, in plain values, where the scores come from."""
    return {
      "rewards": [list(reward) for reward in self._rewards],
      "files": [own.digest(reward.source) for reward in self._rewards],
      "right_at": self._right_at,
    }

  def score_batch(
    self, prompts: Sequence[Any], responses: Sequence[str]
  ) -> tuple[np.ndarray, list[Parts]]:
    """Scores N responses.

    Args:
      prompts: N texts; those that are `asked.Prompt` bring columns along.
      responses: N texts.

    Returns:
      `[N]` float32, NaN where no function returns a number, and N dicts: by
      "rewards/<name>" and "rewards/<name>/weighted" what each function returns,
      or None, and the parts that functions add.

    Raises:
      ValueError: naming the function, the prompt and the response, if a
        function fails, takes too long or returns something else.
    """
    if len(prompts) != len(responses):
      raise ValueError(
        f"There are {len(prompts)} prompts, but {len(responses)} responses."
      )
    with futures.ThreadPoolExecutor(len(self._rewards)) as threads:
      said = list(
        threads.map(
          lambda both: self._ask(*both, prompts, responses),
          zip(self._rewards, self._pools, strict=True),
        )
      )
    scores = np.full(len(prompts), np.nan, np.float32)
    parts: list[Parts] = [{} for _ in prompts]
    for reward, column in zip(self._rewards, said, strict=True):
      for i, (value, more, _) in enumerate(column):
        weighted = None if value is None else reward.weight * value
        name = f"rewards/{reward.name}"
        parts[i] |= {name: value, name + "/weighted": weighted}
        for key, part in more.items():
          taken = key in parts[i]
          parts[i][f"{reward.name}/{key}" if taken else key] = part
        if weighted is not None:
          scores[i] = np.nan_to_num(scores[i]) + weighted
    self._say_what_is_right(scores, parts)
    return scores, parts

  def _say_what_is_right(self, scores, parts):
    """Completes the part `is_correct`, where anybody says it."""
    said = any("is_correct" in part for part in parts)
    for score, part in zip(scores, parts, strict=True):
      if self._right_at is not None and "is_correct" not in part:
        part["is_correct"] = bool(score >= self._right_at)
      elif said:
        part.setdefault("is_correct", False)

  def _ask(self, reward, pool, prompts, responses) -> list[Said]:
    """What one function says of all responses."""
    rows = [
      (asked.given(prompt), asked.columns(prompt), str(text))
      for prompt, text in zip(prompts, responses, strict=True)
    ]
    size = self._batch_size
    pieces = [rows[i : i + size] for i in range(0, len(rows), size)]
    said: list[Said] = []
    for piece, outcome in zip(
      pieces, self._map(reward, pool, pieces), strict=True
    ):
      found, failure = _read(outcome, self._timeout)
      if failure is None:
        said += found
      elif found is None:  # It can be called with nothing.
        raise ValueError(f"--rewards={reward.place} {failure}")
      else:
        said += self._one_by_one(reward, pool, piece, failure)
    failed = [failure for _, _, failure in said if failure is not None]
    if failed:
      logging.warning(
        "--rewards=%s left out %d of %d responses: it %s.",
        reward.place,
        len(failed),
        len(said),
        failed[0],
      )
    return said

  def _one_by_one(self, reward, pool, rows, failure) -> list[Said]:
    """Finds the responses of a call that fails."""
    said: list[Said] = []
    for row in rows:
      if len(rows) > 1:
        (outcome,) = self._map(reward, pool, [[row]])
        found, failure_of_row = _read(outcome, self._timeout)
      else:
        found, failure_of_row = None, failure
      if failure_of_row is None:
        said += found
      elif self._skip_unscored:
        said.append((None, {}, failure_of_row))
      else:
        raise _failed(reward, failure_of_row, row)
    if not self._skip_unscored:
      text = f"{failure}, for {len(rows)} responses together"
      raise _failed(reward, text, rows[0])
    return said

  def _map(self, reward, pool, pieces):
    try:
      return pool.map([(piece,) for piece in pieces])
    except RuntimeError as error:
      raise ValueError(f"--rewards={reward.place}: {error}") from error


def _read(outcome: sandbox.Outcome, timeout: float):
  """What a call returned, and why it failed; None twice if it always will."""
  if outcome.failure == "timeout":
    return [], f"took more than the {timeout:g} seconds of --reward_timeout"
  if outcome.failure == "died":
    return [], "ended its process"
  if outcome.failure is not None:
    return [], f"failed ({outcome.failure.removeprefix('error: ')})"
  kind, value = outcome.value
  if kind == "unusable":
    return None, value
  return (value, None) if kind == "said" else ([], value)


def _failed(reward: Reward, failure: str, row: Any) -> ValueError:
  prompt, _, response = row
  return ValueError(
    f"--rewards={reward.place} {failure}. The prompt: "
    f"{files.shorten(prompt, 200)}; the response: "
    f"{files.shorten(response, 200)}. (--skip_unscored leaves such responses "
    "out.)"
  )


# In the worker.


# The function under "function", or under "wrong" why there is none.
_worker: dict[str, Any] = {}


def prepare(source: str, name: str) -> None:
  """Imports the function that this worker calls.

  Args:
    source: see `own.load`.
    name: in it.
  """
  # The devices are the script's.
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  with contextlib.redirect_stdout(sys.stderr):
    try:
      _worker["function"] = load(source, name)
    except ValueError as error:
      _worker["wrong"] = str(error)


def call(rows: Sequence[tuple[Any, Parts, str]]) -> tuple[str, Any]:
  """Calls the function with prompts, columns and responses.

  Args:
    rows: N prompts as they were given, their columns, and responses.

  Returns:
    "said" and N `Said`; "failed" and why; or "unusable" and why, if no rows of
    these columns would do.
  """
  if "wrong" in _worker:
    return "unusable", f"cannot be called: {_worker['wrong']}"
  function = _worker["function"]
  try:
    chosen = arguments(function, rows)
  except (TypeError, ValueError) as error:
    return "unusable", str(error)
  with contextlib.redirect_stdout(sys.stderr):
    try:
      returned = function(**chosen)
      if inspect.isawaitable(returned):
        returned = asyncio.run(_awaited(returned))
    except MemoryError:
      raise
    except (Exception, SystemExit) as error:
      return "failed", f"raised {_where(error)}"
  try:
    return "said", _checked(returned, len(rows))
  except ValueError as error:
    return "failed", str(error)


def load(source: str, name: str) -> Callable[..., Any]:
  """Imports a reward function.

  Raises:
    ValueError: if there is no such file, module or function, with those that
      there are.
  """
  module = own.load(source, "--rewards")
  function = getattr(module, name, None)
  if not callable(function):
    there = [
      key
      for key, value in vars(module).items()
      if callable(value)
      and not key.startswith("_")
      and getattr(value, "__module__", None) == module.__name__
    ]
    raise ValueError(
      f"{source} has no function {name}; it has {', '.join(there) or 'none'}."
    )
  return function


def arguments(
  function: Callable[..., Any], rows: Sequence[tuple[Any, Parts, str]]
) -> dict[str, list[Any]]:
  """Makes the keyword arguments of a reward function.

  Args:
    function: see the head of this file.
    rows: see `call`.

  Raises:
    ValueError: if it needs an argument that there is not.
  """
  names = dict.fromkeys(name for _, columns, _ in rows for name in columns)
  # A column that only some of the rows have is None in the others.
  known = {name: [row[1].get(name) for row in rows] for name in names}
  known["prompts"] = [prompt for prompt, _, _ in rows]
  known["responses"] = [text for _, _, text in rows]
  known["completions"] = [
    text
    if isinstance(prompt, str)
    else [{"role": "assistant", "content": text}]
    for prompt, _, text in rows
  ]
  parameters = inspect.signature(function).parameters.values()
  named = {
    p.name: p.default is p.empty
    for p in parameters
    if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
  }
  missing = [name for name, needed in named.items() if needed > (name in known)]
  if missing:
    raise ValueError(
      f"needs the argument {missing[0]!r}, which is neither prompts, responses "
      "nor a column of the data; their columns are "
      f"{', '.join(names) or 'none'}."
      + (
        f" TRL's trainer alone has {missing[0]}: functions of texts work here."
        if missing[0] in _TRAINERS
        else ""
      )
    )
  if not any(p.kind is p.VAR_KEYWORD for p in parameters):
    return {name: known[name] for name in named if name in known}
  if "completions" in named:
    del known["responses"]
  elif "responses" in named:
    del known["completions"]
  return known


async def _awaited(returned):
  return await returned


def _where(error: BaseException) -> str:
  """The type and message of an error, with the line that raised it."""
  text = " ".join(str(error).split())[:300]
  frames = traceback.extract_tb(error.__traceback__)
  place = f" (line {frames[-1].lineno} of {frames[-1].filename})"
  return f"{type(error).__name__}: {text}{place if len(frames) > 1 else ''}"


def _checked(returned: Any, num: int) -> list[Said]:
  """Reads what a function returned; ValueError says what is wrong with it."""
  items = returned
  if isinstance(items, Iterator):  # It may have no end.
    items = list(itertools.islice(items, num + 1))
  items = tasks.listed(items)
  if not isinstance(items, list):
    kind = type(returned).__name__
    raise ValueError(f"returned a {kind} rather than a list of {num} rewards")
  if num != 1 and len(items) == 1 and isinstance(items[0], list):
    items = items[0]  # Of shape [1, N].
  if len(items) != num:
    raise ValueError(f"returned {len(items)} rewards for {num} responses")
  said: list[Said] = []
  for item in items:
    value, parts = item, {}
    if isinstance(item, (tuple, list)) and len(item) != 1:
      if len(item) != 2 or not isinstance(item[1], Mapping):
        raise ValueError(
          "returned a pair that is not a number and a dict: "
          f"{files.shorten(item)}"
        )
      value, parts = item
    if value is not None:
      found = tasks.finite(tasks.listed(value))
      if found is None:  # NaN as well.
        raise ValueError(
          f"returned {files.shorten(item)}, which is neither a finite number "
          "nor None"
        )
      value = found
    parts = {str(key): tasks.plain(part) for key, part in parts.items()}
    said.append((value, parts, None))
  return said
