"""One function that scores responses: a task's own, or a reward model's."""

import functools
import hashlib
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from rljax import tasks
from rljax.distributed import processes
from rljax.scoring import reward_functions, reward_models
from rljax.storage import calls
from rljax.text import keywords

Scorer = Callable[
  [Sequence[str], Sequence[str]], tuple[np.ndarray, list[dict[str, Any]]]
]


def scorer(
  task: str,
  score_options: Mapping[str, Any],
  reward_model: str = "",
  *,
  seconds: float = 0.0,
  **reward_options: Any,
) -> Scorer:
  """Makes the scorer that the flags of a script name.

  Args:
    task: name of a task, whose `score` is taken if no reward model is named.
    score_options: keyword arguments of that function.
    reward_model: anything that `reward_model.RewardModel` loads, or empty.
    seconds: see `of_task`.
    **reward_options: keyword arguments of `RewardModel`.

  Returns:
    A function of N prompts and N responses that returns `[N]` scores, and N
    dicts of what they are made of. Its attribute `description` says, in plain
    values, where the scores come from; `source`, where each response is scored
    by itself, names the code of the task.

  Raises:
    ValueError: if there is no such task, option or model, or neither is named.
  """
  if reward_model:
    if score_options:
      raise ValueError(
        "--score_options belongs to a task's score; with --reward_model="
        f"{reward_model} it must be empty, got {dict(score_options)}."
      )
    scored_by = reward_models.RewardModel(reward_model, **reward_options)
    description = {
      "reward_model": reward_model,
      "fingerprint": scored_by.fingerprint,
    }
  elif task:
    return _of_task(tasks.load(task), score_options, seconds)
  else:
    raise ValueError(
      "Nothing scores the responses: name a --reward_model or a --task."
    )
  # The devices share the texts of a model, so that all processes call it alike.
  function = functools.partial(tasks.score_all, scored_by)
  function.description = description
  return function


def of_task(
  task: Any, options: Sequence[str] = (), seconds: float = 0.0
) -> Scorer:
  """Makes the scorer of a task, whose processes share the responses.

  Args:
    task: module with `score` or `score_batch`.
    options: keyword arguments of it, as texts: name=value.
    seconds: that scoring a response may take, see `tasks.score_rows`; 0: no
      limit.

  Returns:
    As `scorer`.

  Raises:
    ValueError: if the task has no such option.
  """
  return _of_task(task, keywords.parse(options), seconds)


def _of_task(task: Any, options: Mapping[str, Any], seconds: float) -> Scorer:
  """Makes the scorer of a task from parsed options."""
  keywords.check(getattr(task, "score_batch", None) or task.score, options)
  function = divided(
    functools.partial(
      tasks.score_rows, task, options=dict(options), seconds=seconds
    )
  )
  path = getattr(task, "__file__", None)
  if path and not hasattr(task, "score_batch"):  # Each is scored by itself.
    source = pathlib.Path(path).read_bytes()
    function.source = hashlib.sha256(source).hexdigest()
  function.description = {
    "task": task.__name__.rpartition(".")[2],
    **options,
  }
  return function


def of_functions(specs: Sequence[str], **options: Any) -> Scorer:
  """Makes the scorer of reward functions, whose processes share the responses.

  Args:
    specs: see `reward_functions.parse`.
    **options: of `reward_functions.Functions`.

  Returns:
    As `scorer`; a score is NaN where no function returns a number.

  Raises:
    ValueError: as `reward_functions.parse`.
  """
  functions = reward_functions.Functions(specs, **options)

  def score(prompts, responses):
    try:
      return calls.guard(  # Each call has a limit of its own.
        lambda: functions.score_batch(prompts, responses),
        what="--rewards",
        about=lambda: "",
      )
    except (calls.CallError, calls.Ended) as error:
      calls.tell(error, prompts, responses)
      raise

  function = divided(score)
  function.description = functions.description
  return function


def once(score: Scorer) -> Scorer:
  """The same scorer, which says again what it has said of its last texts.

  For one that says always the same of a text, such as a reward model, where
  two readers ask it of the same responses, one after the other.
  """
  asked: tuple[list[str], list[str]] | None = None
  said: tuple[np.ndarray, list[dict[str, Any]]] | None = None

  def last(prompts, responses):
    nonlocal asked, said
    texts = list(prompts), list(responses)
    if texts != asked:
      asked, said = None, score(prompts, responses)
      asked = texts
    scores, parts = said
    return scores.copy(), [dict(part) for part in parts]

  last.description = score.description
  return last


def divided(score: Scorer) -> Scorer:
  """The same scorer, of which every process does its share of the responses.

  Args:
    score: not one that runs on the mesh, which all processes must call alike.

  Returns:
    A function of the same N prompts and N responses in every process, with the
    same result in all of them. With one process it is `score`.
  """

  def score_rows(prompts, responses):
    def score_own(own):
      scores, parts = score(prompts[own], responses[own])
      return [float(x) for x in scores], parts

    found = processes.share(len(responses), score_own)
    scores, parts = (sum(column, []) for column in zip(*found, strict=True))
    return np.asarray(scores, np.float32), parts

  return lambda prompts, responses: (
    score_rows if jax.process_count() > 1 and len(responses) else score
  )(prompts, responses)
