"""What scores, answers and texts say: intervals, diversity, overlap."""

import collections
import statistics
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Literal

import numpy as np


def mean_interval(
  values: Sequence[float],
  *,
  num_resamples: int = 2000,
  seed: int = 0,
  level: float = 0.95,
) -> tuple[float, float, float]:
  """The mean and its bootstrap percentile interval.

  The interval covers what another draw of as many values would give. It is
  too narrow below some 20 values, and has no width for one.

  Args:
    values: `[N]` float, N >= 1, drawn independently.
    num_resamples: how often N values are drawn anew, with replacement.
    seed: of these draws.
    level: share of the resampled means inside the interval, in (0, 1).

  Returns:
    Mean, low end, high end.

  Raises:
    ValueError: if there are no values or one is not finite.

  Source:
    Efron (1979), "Bootstrap Methods: Another Look at the Jackknife".
  """
  values = np.asarray(values, np.float64)
  if values.ndim != 1 or not values.size:
    raise ValueError(f"An interval needs [N] values, got {values.shape}.")
  if not np.all(np.isfinite(values)):
    index = int(np.argmin(np.isfinite(values)))
    raise ValueError(f"Value {index} is {values[index]}, not a finite number.")
  _check_level(level)
  rng = np.random.default_rng(seed)
  # One resample at a time: N may be large, N * num_resamples must not matter.
  means = [
    values[rng.integers(values.size, size=values.size)].mean()
    for _ in range(num_resamples)
  ]
  low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
  return float(values.mean()), float(low), float(high)


def paired_interval(
  values: Sequence[float],
  baseline: Sequence[float],
  *,
  num_resamples: int = 2000,
  seed: int = 0,
  level: float = 0.95,
) -> tuple[float, float, float]:
  """The mean of `values - baseline` over pairs, with its interval.

  Two policies that answered the same prompts differ by less chance than two
  that answered different ones; the pairs are resampled together.

  Args:
    values: `[N]` float.
    baseline: `[N]` float, of the same prompts in the same order.
    num_resamples: see `mean_interval`; likewise `seed` and `level`.
    seed: of the draws.
    level: share of the resampled means inside the interval.

  Returns:
    Mean difference, low end, high end.
  """
  values, baseline = np.asarray(values), np.asarray(baseline)
  if values.shape != baseline.shape:
    raise ValueError(
      f"Pairs need equal shapes, got {values.shape} and {baseline.shape}."
    )
  return mean_interval(
    values.astype(np.float64) - baseline.astype(np.float64),
    num_resamples=num_resamples,
    seed=seed,
    level=level,
  )


def proportion_interval(
  num_successes: int, num_trials: int, *, level: float = 0.95
) -> tuple[float, float, float]:
  """A share and its score interval, which has width at 0 and at 1 too.

    (p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n)

  Args:
    num_successes: k, between 0 and n.
    num_trials: n >= 1.
    level: probability mass between -z and z under the standard normal.

  Returns:
    Share k/n, low end, high end.

  Source:
    Wilson (1927), "Probable Inference, the Law of Succession, and Statistical
    Inference".
  """
  if not 0 <= num_successes <= num_trials or num_trials < 1:
    raise ValueError(
      f"A share needs 0 <= successes <= trials and a trial, got "
      f"{num_successes} of {num_trials}."
    )
  _check_level(level)
  z = statistics.NormalDist().inv_cdf((1 + level) / 2)
  share, n = num_successes / num_trials, num_trials
  center = share + z**2 / (2 * n)
  half_width = z * (share * (1 - share) / n + z**2 / (4 * n**2)) ** 0.5
  scale = 1 + z**2 / n
  # At no successes the low end is 0, at nothing else the high end is 1; say
  # so, or rounding steps over them.
  low = (center - half_width) / scale if num_successes else 0.0
  high = (center + half_width) / scale if num_successes < n else 1.0
  return share, low, high


def answer_histogram(answers: Iterable[Hashable | None]) -> dict:
  """How often each answer was given, in order, and None (no answer) last."""
  counts = collections.Counter(answers)
  known = sorted(answer for answer in counts if answer is not None)
  histogram = {answer: counts[answer] for answer in known}
  if None in counts:
    histogram[None] = counts[None]
  return histogram


def distinct_answers(answers: Iterable[Hashable | None]) -> int:
  """How many different answers were given; None is no answer."""
  return len(set(answers) - {None})


def top_share(histogram: Mapping[Hashable | None, int]) -> float:
  """The share of the commonest entry of a histogram; 0 if it is empty."""
  total = sum(histogram.values())
  return max(histogram.values()) / total if total else 0.0


def distinct_n(
  texts: Iterable[str | Sequence[Hashable]],
  n: int,
  *,
  definition: Literal["corpus", "words"] = "corpus",
) -> float:
  """Different n-grams of a corpus over all its n-grams.

  The count is over the corpus: n-grams, which never reach across two texts,
  are pooled before they are counted.

  Args:
    texts: texts, or sequences of words or ids, which are taken as they are.
    n: length of the n-grams; >= 1.
    definition: how texts become words, and what is divided by.
      "corpus" splits texts at white space, in lower case, and divides by the
      number of n-grams: the diversity of the A-LoL paper's smaller tasks.
      "words" splits texts at every single blank, in their own case, and
      divides by the number of words whatever n is: the other one in that
      paper's code.

  Returns:
    A share in (0, 1], or 0 if no text has n words.

  Source:
    Li et al. (2016), "A Diversity-Promoting Objective Function for Neural
    Conversation Models", section 5, which divides by the number of words;
    Baheti et al. (2024), "Leftover Lunch: Advantage-based Offline
    Reinforcement Learning for Language Models".
  """
  if n < 1:
    raise ValueError(f"n must be positive, got {n}.")
  if definition not in ("corpus", "words"):
    raise ValueError(
      f'definition must be "corpus" or "words", got {definition!r}.'
    )
  seen, total = set(), 0
  for text in texts:
    if not isinstance(text, str):
      words = list(text)
    else:
      words = text.split(" ") if definition == "words" else text.lower().split()
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    seen.update(grams)
    total += len(words) if definition == "words" else len(grams)
  return len(seen) / total if total else 0.0


def mean_words(texts: Iterable[str]) -> float:
  """Words per text, split at white space; 0 if there are no texts."""
  counts = [len(text.split()) for text in texts]
  return sum(counts) / len(counts) if counts else 0.0


def coverage_and_density(
  source: str, response: str, *, published: bool = False
) -> tuple[float, float]:
  """How much of a response is copied from a source, and in how long pieces.

    coverage = Σ_f |f| / n,   density = Σ_f |f|² / n

  n is the number of words of the response, and f runs over its fragments: from
  the left, the longest run of words that also stands in the source, wherever
  that is. Words are split at white space and compared as they are written.

  Args:
    source: text that the response should be grounded in.
    response: text.
    published: whether to count as the code of the A-LoL paper does, for
      numbers that are to stand beside it. It overlooks fragments of one word,
      and a match that is just one word longer than the longest so far.

  Returns:
    Coverage in [0, 1] and density in [0, n]; 0 for an empty response.

  Source:
    Grusky, Naaman and Artzi (2018), "Newsroom: A Dataset of 1.3 Million
    Summaries with Diverse Extractive Strategies", section 4; Baheti et al.
    (2024), "Leftover Lunch: Advantage-based Offline Reinforcement Learning for
    Language Models".
  """
  source_words, words = source.split(), response.split()
  if not words:
    return 0.0, 0.0
  fragments = []
  i = 0
  while i < len(words):
    longest = 0
    for start in range(len(source_words)):
      length = _common_start(words[i:], source_words[start:])
      if length - bool(published) > longest:
        longest = length
    fragments.append(longest)
    i += max(longest, 1)
  return (
    sum(fragments) / len(words),
    sum(length**2 for length in fragments) / len(words),
  )


def perplexity(log_probs: np.ndarray, mask: np.ndarray) -> dict[str, float]:
  """Perplexity of replies, by the two means that papers take.

    per token = exp(-Σ_bt log p_bt / Σ_b n_b),
    per reply = exp(-mean_b Σ_t log p_bt / n_b)

  n_b is the number of tokens of reply b. The second gives every reply the same
  weight, however short.

  Args:
    log_probs: `[B, T]` float, in nats.
    mask: `[B, T]` bool, True where a token counts. Masked entries may hold
      anything; a reply without tokens counts in neither mean.

  Returns:
    `perplexity`, over tokens, and `perplexity_per_reply`.

  Raises:
    ValueError: if no token counts.

  Source:
    Per reply: Baheti et al. (2024), "Leftover Lunch: Advantage-based Offline
    Reinforcement Learning for Language Models", its dialogue task.
  """
  log_probs, mask = np.asarray(log_probs, np.float64), np.asarray(mask)
  if log_probs.ndim != 2 or log_probs.shape != mask.shape:
    raise ValueError(
      f"perplexity needs log_probs and a mask of one [B, T] shape, got "
      f"{log_probs.shape} and {mask.shape}."
    )
  if mask.dtype != np.bool_ or not mask.any():
    raise ValueError("perplexity needs a bool mask with a token that counts.")
  losses = -np.where(mask, log_probs, 0.0).sum(axis=1)  # [B]
  counts = mask.sum(axis=1)
  losses, counts = losses[counts > 0], counts[counts > 0]
  return {
    "perplexity": float(np.exp(losses.sum() / counts.sum())),
    "perplexity_per_reply": float(np.exp(np.mean(losses / counts))),
  }


def _common_start(a: Sequence[str], b: Sequence[str]) -> int:
  """How many words two sequences begin with alike."""
  pairs = enumerate(zip(a, b, strict=False))
  return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


def _check_level(level: float) -> None:
  if not 0 < level < 1:
    raise ValueError(f"level must lie between 0 and 1, got {level}.")
