"""Scores answers to held-out prompts, and describes samples of training."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from rljax.distributed import processes
from rljax.evaluation import metrics
from rljax.generation import responders, responses
from rljax.text import steps

Scorer = Callable[..., tuple[np.ndarray, list[dict[str, Any]]]]


def evaluate(
  answer: responders.Responder, params: Any, score: Scorer
) -> list[dict[str, Any]]:
  """Scores one answer to each held-out prompt.

  Args:
    answer: answers N prompts, whose texts it holds, one response each.
    params: of the policy.
    score: `(prompts, responses) -> (scores, parts)`.

  Returns:
    N rows of `responses.records`, with `finished`.
  """
  _, texts, finished = zip(*answer.batches(params), strict=True)
  texts = [text for batch in texts for text in batch]
  finished = np.concatenate(finished)
  scores, parts = responses.score_responses(
    score,
    answer.texts,
    texts,
    finished,
    unfinished=answer.unfinished_score,
  )
  return [
    row | {"finished": bool(is_finished)}
    for row, is_finished in zip(
      responses.records(answer.texts, texts, scores, parts),
      finished,
      strict=True,
    )
  ]


def means(
  rows: Sequence[Mapping[str, Any]], *, prefix: str = "eval/"
) -> dict[str, float]:
  """Averages the rows of `evaluate`: the reward, and every numeric part.

  Responses without a reward are not in its mean; if there are any, "unscored"
  counts them.
  """
  scores = [row["reward"] for row in rows if row["reward"] is not None]
  found = {
    "reward": float(np.mean(scores)) if scores else math.nan,
    **mean_parts([row["parts"] for row in rows]),
  }
  if len(scores) < len(rows):
    found["unscored"] = len(rows) - len(scores)
  return {f"{prefix}{name}": value for name, value in found.items()}


def wording(
  rows: Sequence[Mapping[str, Any]], *, prefix: str = "eval/"
) -> dict[str, float]:
  """Describes the texts of the rows of `evaluate`.

  Returns:
    "<prefix>words", their mean number of words, and "<prefix>distinct_2", the
    share of pairs of neighbouring words that are different.
  """
  texts = [row["response"] for row in rows]
  return {
    f"{prefix}words": metrics.mean_words(texts),
    f"{prefix}distinct_2": metrics.distinct_n(texts, 2),
  }


def mean_parts(
  parts: Sequence[Mapping[str, Any]], *, prefix: str = ""
) -> dict[str, float]:
  """Averages every part that is a number or a truth value everywhere.

  What a reward function returns, "rewards/...", may be None for some: its mean
  is over the others.
  """
  if not parts:
    return {}
  kinds = (bool, int, float, np.bool_, np.integer, np.floating)
  found = {}
  for name in parts[0]:
    values = [part.get(name) for part in parts]
    if name.startswith("rewards/"):
      values = [value for value in values if value is not None]
    if values and all(isinstance(value, kinds) for value in values):
      found[f"{prefix}{name}"] = float(np.mean(values))
  return found


def of_several(
  rows: Sequence[Mapping[str, Any]],
  *,
  num_prompts: int,
  prefix: str = "samples/",
) -> dict[str, float]:
  """Describes several samples of each prompt.

  Args:
    rows: of `responders.collect`.
    num_prompts: that they answer.
    prefix: of the names.

  Returns:
    Means of the parts; "is_correct" and "finished", means over the samples, a
    sample without an end being wrong; "solved", the share of prompts with a
    right sample; "distinct_traces", how many different right samples a prompt
    has, as a mean over the prompts.
  """
  right = [row for row in rows if steps.is_kept(row)]
  different = {
    (row["prompt"], steps.whitespace_key(row["response"])) for row in right
  }
  found = mean_parts([row["parts"] for row in rows]) | {
    "is_correct": len(right) / len(rows),
    "finished": float(np.mean([row["finished"] for row in rows])),
    "solved": len({row["prompt"] for row in right}) / num_prompts,
    "distinct_traces": len(different) / num_prompts,
  }
  return {f"{prefix}{name}": value for name, value in found.items()}


def of_samples(
  samples: responses.Samples,
  seconds: float,
  *,
  drawn: responses.Samples | None = None,
) -> dict[str, float]:
  """Describes a step's samples and its speed.

  Args:
    samples: N scored responses.
    seconds: that the step took.
    drawn: all that the step drew, where the samples are a choice among it.

  Returns:
    "task/<part>", means over all that was drawn; "answers/distinct", the
    number of different answers among the samples; "step_seconds", and
    "tokens_per_second" of all responses that were drawn; and where some may be
    left out of what is learnt, "response/left_out" counts those of the samples,
    and "response/unscored" those of them without a score.
  """
  drawn = drawn or samples
  may_leave_out = samples.settings.mask_unfinished or any(
    name.startswith("rewards/") for part in samples.parts for name in part
  )
  left_out = {}
  if may_leave_out:
    left_out = {
      "response/left_out": int(np.isnan(samples.learnt_scores).sum()),
      "response/unscored": int(np.isnan(samples.scores).sum()),
    }
  num_tokens = processes.gather(drawn.rollout.response_mask).sum()
  return (
    mean_parts(drawn.parts, prefix="task/")
    | left_out
    | {
      "answers/distinct": metrics.distinct_answers(
        part.get("answer", text)
        for part, text in zip(samples.parts, samples.texts, strict=True)
      ),
      "tokens_per_second": num_tokens / seconds,
      "step_seconds": seconds,
    }
  )
