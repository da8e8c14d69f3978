"""Metrics of scores, answers and texts: intervals, votes, diversity, copies."""

import collections
import math
import statistics
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Literal

import numpy as np

from rljax.text import steps


def mean_interval(
  values: Sequence[float],
  *,
  num_resamples: int = 2000,
  seed: int = 0,
  level: float = 0.95,
) -> tuple[float, float, float]:
  """Computes a mean and its bootstrap percentile interval.

  The interval covers what another draw of as many values would give. It is too
  narrow for fewer than about 20 values, and has no width for one.

  Args:
    values: `[N]` float, N >= 1, drawn independently.
    num_resamples: how often N values are drawn, with replacement.
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
  # One resample at a time: N * num_resamples numbers may not fit into memory.
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
  """Computes the mean of `values - baseline` over pairs, and its interval.

  On the same prompts, the difference of two policies varies less by chance than
  on different ones; the pairs are resampled together.

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
  """Computes a share and its Wilson score interval.

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
      f"A share needs 0 <= successes <= trials and trials >= 1, got "
      f"{num_successes} of {num_trials}."
    )
  _check_level(level)
  z = statistics.NormalDist().inv_cdf((1 + level) / 2)
  share, n = num_successes / num_trials, num_trials
  center = share + z**2 / (2 * n)
  half_width = z * (share * (1 - share) / n + z**2 / (4 * n**2)) ** 0.5
  scale = 1 + z**2 / n
  # Without successes the low end is exactly 0, without failures the high end
  # exactly 1; rounding would miss them.
  low = (center - half_width) / scale if num_successes else 0.0
  high = (center + half_width) / scale if num_successes < n else 1.0
  return share, low, high


def ratio_interval(
  parts: Sequence[float],
  wholes: Sequence[float],
  *,
  baseline: tuple[Sequence[float], Sequence[float]] | None = None,
  num_resamples: int = 2000,
  seed: int = 0,
  level: float = 0.95,
) -> tuple[float, float, float]:
  """Computes a ratio of two sums over questions, and its interval.

    r = Σ_i parts_i / Σ_i wholes_i,   or r minus that of the baseline

  Each question weighs as much as its whole. `mean_interval` of the ratios would
  weigh all alike, and is undefined where a whole is 0. Questions are resampled
  with both numbers.

  Args:
    parts: `[N]` float.
    wholes: `[N]` float, >= 0.
    baseline: parts and wholes of another policy on the same questions, which
      are resampled together with these.
    num_resamples: see `mean_interval`; likewise `seed` and `level`. Resamples
      whose wholes add up to 0 are left out.
    seed: of the draws.
    level: share of the resampled ratios inside the interval.

  Returns:
    The ratio or the difference of two, low end, high end.

  Raises:
    ValueError: if shapes differ, a number is not finite, or wholes are
      negative or all 0.
  """
  columns = [parts, wholes, *(baseline or ())]
  shapes = [np.shape(column) for column in columns]
  if len(shapes[0]) != 1 or len(set(shapes)) > 1 or not shapes[0][0]:
    raise ValueError(
      f"Parts and wholes must have one shape [N], N > 0, got {shapes}."
    )
  rows = np.array(columns, np.float64)
  if not np.all(np.isfinite(rows)):
    raise ValueError("Parts and wholes must be finite.")
  if rows[1::2].min() < 0 or not rows[1::2].sum(axis=1).all():
    raise ValueError("Wholes must not be negative, nor all 0.")
  _check_level(level)

  def ratios(sums):
    """Of `[2, ...]` or, with a baseline, `[4, ...]` sums."""
    found = sums[0] / sums[1]
    return found - sums[2] / sums[3] if baseline else found

  rng = np.random.default_rng(seed)
  num_rows = rows.shape[1]
  # In blocks: memory must not grow with N * num_resamples.
  num_together = max(65_536 // num_rows, 1)
  drawn = []
  for start in range(0, num_resamples, num_together):
    size = (min(num_together, num_resamples - start), num_rows)
    picks = rng.integers(num_rows, size=size)
    picks += num_rows * np.arange(size[0])[:, None]
    counts = np.bincount(picks.ravel(), minlength=picks.size).reshape(size)
    sums = rows @ counts.astype(np.float64).T
    drawn.append(ratios(sums[:, sums[1::2].all(axis=0)]))
  found = float(ratios(rows.sum(axis=1)))
  drawn = np.concatenate(drawn)
  low, high = np.quantile(
    drawn if drawn.size else [found], [(1 - level) / 2, (1 + level) / 2]
  )
  return found, float(low), float(high)


def mcnemar(
  is_correct: Sequence[bool], other: Sequence[bool]
) -> tuple[dict[str, int], float]:
  """Compares two policies on the same questions by McNemar's exact test.

    p = min(1, 2 Σ_{i ≤ min(b, c)} C(b + c, i) / 2^(b + c))

  b and c are the numbers of questions that only one of the two got right. If
  neither is better, they are distributed like heads and tails of a fair coin.

  Args:
    is_correct: `[N]` bool, of one policy.
    other: `[N]` bool, of another, in the same order.

  Returns:
    `both`, `only_first`, `only_second` and `neither`, and the exact two-sided
    p-value.

  Raises:
    ValueError: if the shapes differ.

  Source:
    McNemar (1947), "Note on the Sampling Error of the Difference between
    Correlated Proportions or Percentages", in its exact binomial form.
  """
  a, b = np.asarray(is_correct), np.asarray(other)
  if (
    a.ndim != 1 or a.shape != b.shape or {a.dtype, b.dtype} != {np.dtype(bool)}
  ):
    raise ValueError(
      "mcnemar needs two [N] arrays of bool, got "
      f"{a.dtype} {a.shape} and {b.dtype} {b.shape}."
    )
  counts = {
    "both": int(np.sum(a & b)),
    "only_first": int(np.sum(a & ~b)),
    "only_second": int(np.sum(~a & b)),
    "neither": int(np.sum(~a & ~b)),
  }
  fewer, more = sorted([counts["only_first"], counts["only_second"]])
  tail = sum(math.comb(fewer + more, i) for i in range(fewer + 1))
  return counts, min(1.0, 2 * tail / 2 ** (fewer + more))


# Samples of a question, each right or wrong.


def pass_at_k(
  num_samples: int | Sequence[int], num_correct: int | Sequence[int], k: int
) -> np.ndarray:
  """Computes the probability that one of k samples is right (c of n were).

    pass@k = 1 - C(n - c, k) / C(n, k)

  It is the mean over all subsets of k, and unbiased for k draws of the policy;
  `1 - (1 - c/n)^k` is not.

  Args:
    num_samples: n, an int or `[N]` ints.
    num_correct: c, an int or `[N]` ints, between 0 and n.
    k: between 1 and the smallest n.

  Returns:
    Float in [0, 1], of the shape of the arguments.

  Raises:
    ValueError: if k or c is outside these bounds.

  Source:
    Chen et al. (2021), "Evaluating Large Language Models Trained on Code",
    equation 1.
  """
  n, c = np.broadcast_arrays(num_samples, num_correct)
  if n.dtype.kind not in "iu" or c.dtype.kind not in "iu":
    raise ValueError(f"pass@k needs whole numbers, got {n.dtype}, {c.dtype}.")
  if np.any(c < 0) or np.any(c > n):
    raise ValueError("num_correct must lie between 0 and num_samples.")
  if k < 1 or np.any(n < k):
    raise ValueError(
      f"k must lie between 1 and the number of samples, got k={k} for "
      f"{n.min(initial=k)} samples."
    )
  # C(n - c, k) / C(n, k), a factor at a time; one is 0 where k > n - c.
  none_right = np.ones(n.shape)
  for i in range(k):
    none_right = none_right * (n - c - i) / (n - i)
  return 1.0 - none_right


def majority_vote(
  answers: Sequence[Hashable | None],
  is_correct: Sequence[bool],
  *,
  ties: Literal["expected", "first_seen"] = "expected",
  weights: Sequence[float] | None = None,
) -> float:
  """Scores the answer that most samples of a question give.

  An answer is right if a sample that voted for it is. A sample that is wrong
  whatever its answer, such as one that ran out of length, should get the answer
  None.

  Args:
    answers: K answers, normalised; None does not vote.
    is_correct: K bool, of the samples.
    ties: "expected" is the share of right answers among those with the most
      votes: the expected score of choosing one at random. "first_seen" takes
      the one that was given first.
    weights: K votes, finite and >= 0, such as the scores of a reward model;
      None: one each.

  Returns:
    A number in [0, 1]; 0 if there are no votes.

  Raises:
    ValueError: if lengths differ or a weight is negative or not finite.

  Source:
    Wang et al. (2023), "Self-Consistency Improves Chain of Thought Reasoning
    in Language Models".
  """
  if ties not in ("expected", "first_seen"):
    raise ValueError(f'ties must be "expected" or "first_seen", got {ties!r}.')
  if weights is None:
    weights = [1.0] * len(answers)
  weights = _numbers("weights", weights, len(answers))
  if min(weights, default=0.0) < 0:
    raise ValueError(f"weights must not be negative, got {min(weights)}.")
  votes, right = {}, {}
  for answer, correct, weight in zip(answers, is_correct, weights, strict=True):
    if answer is not None:
      votes.setdefault(answer, []).append(weight)
      right[answer] = right.get(answer, False) or bool(correct)
  if not votes:
    return 0.0
  # Rounded once: equal votes stay equal, whatever their order.
  totals = {answer: math.fsum(votes[answer]) for answer in votes}
  most = max(totals.values())
  winners = [answer for answer, total in totals.items() if total == most]
  if ties == "first_seen":
    winners = winners[:1]
  return sum(right[answer] for answer in winners) / len(winners)


def rerank(
  answers: Sequence[Hashable | None],
  is_correct: Sequence[bool],
  scores: Sequence[float],
) -> float:
  """Tells whether the sample with the highest score is right.

  Args:
    answers: K answers; a sample with None is never chosen.
    is_correct: K bool.
    scores: K finite numbers, such as the logits of a reward model.

  Returns:
    1 or 0, or the share of right ones among samples with the same highest
    score; 0 if there is no answer.

  Raises:
    ValueError: if lengths differ or a score is not finite.
  """
  scores = _numbers("scores", scores, len(answers))
  rows = zip(answers, is_correct, scores, strict=True)
  rows = [(bool(ok), score) for answer, ok, score in rows if answer is not None]
  highest = max((score for _, score in rows), default=None)
  best = [ok for ok, score in rows if score == highest]
  return sum(best) / len(best) if best else 0.0


def solved_fraction(is_correct: np.ndarray) -> float:
  """Computes the share of questions with a right sample; `[N, K]` bool."""
  is_correct = np.asarray(is_correct)
  if is_correct.ndim != 2 or not is_correct.size:
    raise ValueError(
      f"solved_fraction needs [N, K] samples, got {is_correct.shape}."
    )
  return float(np.mean(is_correct.astype(bool).any(axis=1)))


def correct_traces(
  texts: Sequence[str],
  is_correct: Sequence[bool],
  *,
  key: Callable[[str], Hashable] = steps.whitespace_key,
) -> list[str]:
  """Returns the different right samples of a question, in order.

  Args:
    texts: K texts.
    is_correct: K bool.
    key: texts with the same key are the same trace; see `text.steps`.

  Returns:
    The first text of each.
  """
  found = {}
  for text, correct in zip(texts, is_correct, strict=True):
    if correct:
      found.setdefault(key(text), text)
  return list(found.values())


def unique_correct(
  texts: Sequence[str],
  is_correct: Sequence[bool],
  *,
  key: Callable[[str], Hashable] = steps.whitespace_key,
) -> int:
  """Counts the different right samples of a question; see `correct_traces`."""
  return len(correct_traces(texts, is_correct, key=key))


def new_traces(
  texts: Sequence[str],
  is_correct: Sequence[bool],
  reference_texts: Iterable[str],
  *,
  key: Callable[[str], Hashable] = steps.whitespace_key,
) -> tuple[int, int]:
  """Counts the right samples of a question that another policy did not draw.

  Summed over questions, first over second is the share of right traces that are
  new; see `ratio_interval`. A trace that the other policy draws with
  probability p is missing from its K' samples with (1 - p)^K', and then counts
  as new: K' should be 4 K or more.

  Args:
    texts: K texts of one policy.
    is_correct: K bool.
    reference_texts: K' texts of the other policy, right or wrong.
    key: texts with the same key are the same trace.

  Returns:
    The number of new ones, and that of all different right samples.
  """
  known = {key(text) for text in reference_texts}
  found = correct_traces(texts, is_correct, key=key)
  return sum(key(trace) not in known for trace in found), len(found)


def answer_histogram(answers: Iterable[Hashable | None]) -> dict:
  """Counts how often each answer was given; None (no answer) comes last."""
  counts = collections.Counter(answers)
  known = sorted(answer for answer in counts if answer is not None)
  histogram = {answer: counts[answer] for answer in known}
  if None in counts:
    histogram[None] = counts[None]
  return histogram


def distinct_answers(answers: Iterable[Hashable | None]) -> int:
  """Counts the different answers; None is no answer."""
  return len(set(answers) - {None})


def top_share(histogram: Mapping[Hashable | None, int]) -> float:
  """Returns the share of a histogram's most common entry; 0 if it is empty."""
  total = sum(histogram.values())
  return max(histogram.values()) / total if total else 0.0


def distinct_n(
  texts: Iterable[str | Sequence[Hashable]],
  n: int,
  *,
  definition: Literal["corpus", "words"] = "corpus",
) -> float:
  """Computes the share of different n-grams among those of a corpus.

  The count is over the corpus: n-grams, which never reach across two texts,
  are pooled before they are counted.

  Args:
    texts: texts, or sequences of words or ids, which are taken as they are.
    n: length of the n-grams; >= 1.
    definition: how texts become words, and what is divided by. "corpus" splits
      texts at white space, in lower case, and divides by the number of n-grams:
      the diversity of the A-LoL paper's smaller tasks. "words" splits texts at
      every single blank, in their own case, and divides by the number of words
      whatever n is: the other definition in that paper's code.

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
  """Counts words per text, split at white space; 0 if there are no texts."""
  counts = [len(text.split()) for text in texts]
  return sum(counts) / len(counts) if counts else 0.0


def coverage_and_density(
  source: str, response: str, *, published: bool = False
) -> tuple[float, float]:
  """Measures how much of a response is copied from a source.

    coverage = Σ_f |f| / n,   density = Σ_f |f|² / n

  n is the number of words of the response, and f runs over its fragments: from
  the left, the longest run of words that also occurs in the source. Words are
  split at white space and compared as written.

  Args:
    source: text that the response should be grounded in.
    response: text.
    published: whether to count as the code of the A-LoL paper does, for numbers
      to compare with it. It misses fragments of one word, and a match that is
      only one word longer than the longest so far.

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
  """Computes the perplexity of replies, by the two means that papers take.

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


def correlation(x: np.ndarray, y: np.ndarray) -> float:
  """Returns Pearson's correlation of `[N]` and `[N]` numbers.

  NaN where one of them does not vary.
  """
  if np.std(x) == 0 or np.std(y) == 0:
    return math.nan
  return float(np.corrcoef(x, y)[0, 1])


def area_under_curve(
  scores: Sequence[float], is_positive: Sequence[bool]
) -> float:
  """Computes the area under the ROC curve; a tie counts half.

    AUC = (Σ_{i positive} rank_i - P (P + 1) / 2) / (P M)

  Ranks count from 1 at the lowest score, and equal scores share the mean of
  theirs; P and M are the numbers of positive and negative items.

  Args:
    scores: `[N]` finite floats, such as the logits of a reward model.
    is_positive: `[N]` bool.

  Returns:
    A number in [0, 1]: the area under the receiver operating characteristic.
    1/2 is chance.

  Raises:
    ValueError: if shapes differ, a score is not finite, or all items are
      positive or all negative.

  Source:
    Mann and Whitney (1947), "On a Test of Whether one of Two Random Variables
    is Stochastically Larger than the Other".
  """
  scores = np.asarray(scores, np.float64)
  is_positive = np.asarray(is_positive, bool)
  if scores.ndim != 1 or scores.shape != is_positive.shape:
    raise ValueError(
      f"The curve needs [N] scores and as many labels, got {scores.shape} and "
      f"{is_positive.shape}."
    )
  if not np.all(np.isfinite(scores)):
    raise ValueError("scores must be finite.")
  num_positive = int(is_positive.sum())
  num_negative = len(scores) - num_positive
  if not num_positive or not num_negative:
    raise ValueError(
      f"The curve needs items of both kinds, got {num_positive} positive and "
      f"{num_negative} negative ones."
    )
  _, groups, counts = np.unique(scores, return_inverse=True, return_counts=True)
  ranks = np.cumsum(counts) - (counts - 1) / 2
  total = float(ranks[groups][is_positive].sum())
  area = total - num_positive * (num_positive + 1) / 2
  return area / (num_positive * num_negative)


def of_verdicts(
  scores: np.ndarray,
  is_correct: np.ndarray,
  prompts: Sequence[Hashable],
  has_answer: Sequence[bool],
) -> dict[str, float]:
  """Describes how well scores tell right samples from wrong ones.

  Args:
    scores: `[N]` float, above 0 for a verdict of "right", such as logits.
    is_correct: `[N]` bool.
    prompts: N, which tell whose sample each is.
    has_answer: N bool; a sample without an answer is never chosen.

  Returns:
    "accuracy" of the verdicts and "auc", see `area_under_curve`. Where prompts
    have several samples, over these prompts: "rerank", the share on which the
    sample with the highest score is right, "sample_accuracy", that of a sample
    by chance, and "samples_per_prompt". With scores that are not finite, the
    ranks are NaN.
  """
  scores = np.asarray(scores, np.float64)
  is_correct = np.asarray(is_correct, bool)
  is_finite = bool(np.all(np.isfinite(scores)))
  found = {
    "accuracy": float(np.mean((scores > 0) == is_correct)),
    "auc": area_under_curve(scores, is_correct) if is_finite else np.nan,
  }
  samples = collections.defaultdict(list)
  for i, prompt in enumerate(prompts):
    samples[prompt].append(i)
  several = [rows for rows in samples.values() if len(rows) > 1]
  if several:
    # What the answers are does not matter here, but whether there is one.
    answers = [answered or None for answered in has_answer]
    chosen = [
      rerank([answers[i] for i in rows], is_correct[rows], scores[rows])
      for rows in several
      if is_finite
    ]
    found |= {
      "rerank": float(np.mean(chosen)) if is_finite else np.nan,
      "sample_accuracy": float(
        np.mean([is_correct[rows].mean() for rows in several])
      ),
      "samples_per_prompt": float(np.mean(list(map(len, several)))),
    }
  return found


def doubts(
  verdicts: Mapping[str, float], *, prefix: str = "", least_auc: float = 0.8
) -> list[str]:
  """Returns why a policy should not be trained against a reward model.

  Args:
    verdicts: of `of_verdicts`, on held-out samples.
    prefix: of their names, such as "eval/".
    least_auc: below it, such a policy finds the errors of the model.

  Returns:
    Reasons, in words; none where the model may be used.
  """
  found = []
  auc = verdicts[f"{prefix}auc"]
  if not auc > least_auc:
    found.append(f"the held-out AUC is {auc:.3f}, not above {least_auc}")
  if f"{prefix}rerank" in verdicts:
    chosen = verdicts[f"{prefix}rerank"]
    by_chance = verdicts[f"{prefix}sample_accuracy"]
    if not chosen > by_chance:
      found.append(
        f"the sample with the highest score is right on {chosen:.3f} of the "
        f"prompts, a sample by chance on {by_chance:.3f}"
      )
  return found


def localization(
  flagged: Sequence[np.ndarray], changed: Sequence[np.ndarray]
) -> dict[str, float]:
  """Computes how well flagged tokens match those that an edit changes.

    precision = |F ∩ C| / |F|,   recall = |F ∩ C| / |C|,   chance = |C| / n

  Counts are over the tokens of all texts. Random flags have the precision
  `chance`, and as recall their share of the tokens.

  Args:
    flagged: N arrays `[n]` bool, F.
    changed: N arrays `[n]` bool, C.

  Returns:
    "precision", "recall", "chance" and "flagged", the share |F| / n. A share of
    nothing is NaN.

  Raises:
    ValueError: if the arrays of a text differ in length, or there are none.
  """
  lengths = [[np.shape(x) for x in arrays] for arrays in (flagged, changed)]
  if not len(flagged) or lengths[0] != lengths[1]:
    raise ValueError(
      "Each text needs as many flags as tokens that change or stay, got "
      f"{lengths[0][:3]} and {lengths[1][:3]} for the first of "
      f"{len(flagged)} and {len(changed)} texts."
    )
  flags, changes = (
    np.concatenate([np.asarray(x, bool) for x in arrays])
    for arrays in (flagged, changed)
  )
  hits, share = (
    float(np.sum(flags & changes)),
    lambda a, b: a / b if b else np.nan,
  )
  return {
    "precision": share(hits, float(flags.sum())),
    "recall": share(hits, float(changes.sum())),
    "chance": share(float(changes.sum()), len(changes)),
    "flagged": share(float(flags.sum()), len(flags)),
  }


def _common_start(a: Sequence[str], b: Sequence[str]) -> int:
  """Counts the words that two sequences begin with alike."""
  pairs = enumerate(zip(a, b, strict=False))
  return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


def _numbers(name: str, values: Sequence[float], length: int) -> list[float]:
  """Returns K finite numbers as Python's own."""
  values = np.asarray(values, np.float64)
  if values.shape != (length,):
    raise ValueError(
      f"{name} must be [K], one for each of {length} answers, got "
      f"{values.shape}."
    )
  if not np.all(np.isfinite(values)):
    raise ValueError(f"{name} must be finite.")
  return values.tolist()


def _check_level(level: float) -> None:
  if not 0 < level < 1:
    raise ValueError(f"level must lie between 0 and 1, got {level}.")
