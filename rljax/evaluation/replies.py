"""Columns of a table about replies: rewards, answers, words, likelihood."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rljax.evaluation import metrics, tables

# By prompt and reply, an array `[n]` with an entry a token, the end included.
LogProbs = Sequence[Sequence[np.ndarray]]


def mean_scores(seeds: Sequence[np.ndarray]) -> np.ndarray:
  """Averages the rewards of seeds, `[N]` each; NaN without any."""
  known = ~np.isnan(seeds)
  total = np.where(known, seeds, 0.0).sum(axis=0)
  counts = known.sum(axis=0)
  return np.where(counts, total / np.maximum(counts, 1), np.nan)


def paired_interval(first: np.ndarray, second: np.ndarray) -> Any:
  """Compares rewards of the same N prompts, of those that both have.

  Args:
    first: `[N]` rewards, NaN where there is none.
    second: likewise.

  Returns:
    As `metrics.paired_interval`, for `first - second`.
  """
  both = ~np.isnan(first) & ~np.isnan(second)
  return metrics.paired_interval(first[both], second[both])


def rewards(
  seeds: Sequence[np.ndarray],
  parts: Sequence[Sequence[Mapping[str, Any]]] = (),
) -> dict[str, Any]:
  """Averages what the seeds of a policy earn on the same prompts.

  Args:
    seeds: `[N]` rewards of each seed; NaN where a reply has none.
    parts: N parts of a score, of each seed.

  Returns:
    "reward", the mean with its interval over prompts, which each count with
    their mean over seeds; "seeds", their number; "reward by seed"; "unscored",
    the replies without a reward, if there are any; and "rewards/<name>", the
    mean of what each reward function returned.

  Raises:
    ValueError: if no reply has a reward.
  """
  mean = mean_scores(seeds)
  known = mean[~np.isnan(mean)]
  if not len(known):
    raise ValueError("None of the replies has a reward: there is no mean.")
  found = {
    "reward": tables.interval(metrics.mean_interval(known)),
    "seeds": len(seeds),
    "reward by seed": " ".join(
      f"{np.mean(seed[~np.isnan(seed)]):.3f}" for seed in map(np.asarray, seeds)
    ),
  }
  if unscored := int(np.isnan(seeds).sum()):
    found["unscored"] = unscored
  several = [part for seed in parts for part in seed]
  for name in several[0] if several else ():
    if name.startswith("rewards/") and not name.endswith("/weighted"):
      values = [part.get(name) for part in several]
      values = [value for value in values if value is not None]
      if values:
        found[name] = float(np.mean(values))
  return found


def answers(
  parts: Sequence[Sequence[Mapping[str, Any]]], texts: Sequence[Sequence[str]]
) -> dict[str, str]:
  """Counts the replies that are right, and how many of them differ.

  Args:
    parts: N parts of a score, of each seed.
    texts: N replies, of each seed.

  Returns:
    "correct", with its interval over prompts; "correct by seed"; "different
    answers", how many there are of each seed.

  Raises:
    ValueError: if the score does not say what is right.
  """
  if "is_correct" not in parts[0][0]:
    raise ValueError(
      "--metrics=answers needs replies that are right or wrong, which the "
      "scorer does not say; take --metrics=text."
    )
  correct = [[part["is_correct"] for part in seed] for seed in parts]
  mean = np.mean(correct, axis=0)
  return {
    "correct": tables.interval(metrics.mean_interval(mean)),
    "correct by seed": " ".join(f"{np.mean(seed):.3f}" for seed in correct),
    "different answers": " ".join(
      str(metrics.distinct_answers(seed)) for seed in texts
    ),
  }


def words(prompts: Sequence[str], texts: Sequence[str]) -> dict[str, float]:
  """Measures the length and diversity of replies, and what they copy.

  Args:
    prompts: N texts.
    texts: N replies.

  Returns:
    "words" of a reply; "distinct-n", different n-grams over n-grams, and
    "distinct-n per word", over words, for n of 1, 2 and 3; "prompt coverage"
    and "prompt density", see `metrics.coverage_and_density`.
  """
  overlap = [
    metrics.coverage_and_density(prompt, text)
    for prompt, text in zip(prompts, texts, strict=True)
  ]
  coverage, density = np.mean(overlap, axis=0)
  found = {"words": metrics.mean_words(texts)}
  for n in (1, 2, 3):
    found[f"distinct-{n}"] = metrics.distinct_n(texts, n)
  for n in (1, 2, 3):
    found[f"distinct-{n} per word"] = metrics.distinct_n(
      texts, n, definition="words"
    )
  return found | {
    "prompt coverage": float(coverage),
    "prompt density": float(density),
  }


def perplexity(
  log_probs: LogProbs, *, of: str, with_end: bool = True
) -> dict[str, float]:
  """Measures how likely a model finds replies; see `metrics.perplexity`.

  Args:
    log_probs: of the tokens of the replies to each prompt, in nats.
    of: what the columns end in.
    with_end: whether the last token of a reply, its end, counts.

  Returns:
    "perplexity <of>" and "perplexity_per_reply <of>"; NaN if there is no token.
  """
  values, mask = _padded(log_probs, with_end)
  if mask.any():
    found = metrics.perplexity(values, mask)
  else:
    found = dict.fromkeys(("perplexity", "perplexity_per_reply"), math.nan)
  return {f"{name} {of}": value for name, value in found.items()}


def logged(
  log_probs: LogProbs,
  reference: LogProbs | None = None,
  *,
  clip_epsilon: float,
) -> dict[str, float]:
  """Measures how likely a policy finds logged replies, and how far it moved.

  A ratio of probabilities, of a token or of a reply, is at a bound if it is at
  most 1 - ε, or at least 1 + ε.

  Args:
    log_probs: of the tokens of the replies to each prompt, in nats.
    reference: the same under another policy; None: nothing is compared.
    clip_epsilon: ε in [0, 1]; 0: ratios have no bounds, and none is counted.

  Returns:
    The columns of `perplexity`, and "replies at the lower bound", "tokens at
    the lower bound" and likewise for the upper one, which are shares.

  Raises:
    ValueError: if ε is not in [0, 1].
  """
  if not 0 <= clip_epsilon <= 1:
    raise ValueError(f"clip_epsilon must lie in [0, 1], got {clip_epsilon}.")
  found = perplexity(log_probs, of="of logged replies")
  if reference is None or not clip_epsilon:
    return found
  values, mask = _padded(log_probs)
  ratios = values - _padded(reference)[0]  # Logarithms, `[N, T]`.
  with np.errstate(divide="ignore"):  # Of ε = 1, which nothing falls below.
    low, high = np.log1p([-clip_epsilon, clip_epsilon])
  for name, some in (("replies", ratios.sum(axis=1)), ("tokens", ratios[mask])):
    found[f"{name} at the lower bound"] = float(np.mean(some <= low))
    found[f"{name} at the upper bound"] = float(np.mean(some >= high))
  return found


def _padded(log_probs, with_end=True):
  """`[N, T]` float32 of all N replies, 0 beside them, and a bool mask."""
  rows = [ids if with_end else ids[:-1] for row in log_probs for ids in row]
  counts = np.array([len(row) for row in rows], int)
  mask = np.arange(counts.max(initial=0)) < counts[:, None]
  values = np.zeros(mask.shape, np.float32)
  values[mask] = np.concatenate([np.zeros(0, np.float32), *rows])
  return values, mask
