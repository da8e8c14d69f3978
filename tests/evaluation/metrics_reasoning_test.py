"""What many samples of a question say: votes, pass@k, new traces."""

import functools
import itertools
import math
import operator

import hypothesis
import hypothesis.strategies as st
import numpy as np
from absl.testing import parameterized

from rljax.evaluation import metrics


class PassAtKTest(parameterized.TestCase):
  @parameterized.parameters(
    (10, 3, 1, 0.300000),
    (10, 3, 2, 0.533333),
    (10, 3, 5, 0.916667),
    (10, 3, 8, 1.0),
    (5, 2, 3, 0.900000),
    (96, 2, 10, 0.198465),
    (96, 5, 48, 0.971986),
    (96, 0, 96, 0.0),
    (96, 1, 96, 1.0),
  )
  def test_values(self, num_samples, num_correct, k, expected):
    found = metrics.pass_at_k(num_samples, num_correct, k)
    self.assertAlmostEqual(float(found), expected, delta=5e-7)

  def test_is_not_the_naive_estimate(self):
    # c = 0, 1, 3 of n = 4: pass@2 is 0, 1/2 and 1.
    found = metrics.pass_at_k(4, np.array([0, 1, 3]), 2)
    np.testing.assert_allclose(found, [0, 0.5, 1])
    naive = 1 - (1 - np.array([0, 1, 3]) / 4) ** 2
    np.testing.assert_allclose(naive.mean(), 0.458333, atol=5e-7)
    self.assertEqual(found.mean(), 0.5)

  def test_questions_may_have_different_numbers_of_samples(self):
    found = metrics.pass_at_k([10, 5, 96], [3, 2, 1], 3)
    for i, (n, c) in enumerate([(10, 3), (5, 2), (96, 1)]):
      expected = 1 - math.comb(n - c, 3) / math.comb(n, 3)
      self.assertAlmostEqual(found[i], expected)

  @hypothesis.given(data=st.data(), n=st.integers(1, 7))
  def test_is_the_mean_over_all_subsets(self, data, n):
    c = data.draw(st.integers(0, n))
    k = data.draw(st.integers(1, n))
    samples = [True] * c + [False] * (n - c)
    subsets = list(itertools.combinations(samples, k))
    expected = sum(map(any, subsets)) / len(subsets)
    self.assertAlmostEqual(float(metrics.pass_at_k(n, c, k)), expected)

  @parameterized.parameters((16, 0.559873), (96, 0.992731))
  def test_is_unbiased(self, k, expected):
    # Right with probability .05: one of k draws is with 1 - .95^k. From n
    # draws, E[pass@k] is a sum over the numbers of right ones.
    self.assertAlmostEqual(1 - 0.95**k, expected, delta=5e-7)
    n = 100
    chances = [
      math.comb(n, c) * 0.05**c * 0.95 ** (n - c) for c in range(n + 1)
    ]
    found = metrics.pass_at_k(n, np.arange(n + 1), k)
    self.assertAlmostEqual(float(found @ chances), expected, delta=5e-7)

  @parameterized.parameters(
    (4, 2, 5, "k=5 for 4 samples"),
    ([4, 3], [1, 1], 4, "k=4 for 3 samples"),
    (4, 2, 0, "k must lie between 1"),
    (4, 5, 1, "num_correct must lie between 0 and num_samples"),
    (4, -1, 1, "num_correct must lie"),
    (4, 0.5, 1, "whole numbers, got int64, float64"),
  )
  def test_bad_input(self, num_samples, num_correct, k, message):
    with self.assertRaisesRegex(ValueError, message):
      metrics.pass_at_k(num_samples, num_correct, k)


ANSWERS = ["7", "5", "7", "5", "9", None]
IS_FIVE = [answer == "5" for answer in ANSWERS]
SCORES = [0.2, 0.9, 0.3, 0.1, 0.8, 0.99]


class VoteTest(parameterized.TestCase):
  def test_tie(self):
    self.assertEqual(metrics.majority_vote(ANSWERS, IS_FIVE), 0.5)
    first = metrics.majority_vote(ANSWERS, IS_FIVE, ties="first_seen")
    self.assertEqual(first, 0)
    other = metrics.majority_vote(
      ANSWERS[1:] + ["7"], IS_FIVE[1:] + [False], ties="first_seen"
    )
    self.assertEqual(other, 1)

  def test_who_does_not_vote(self):
    right = [False] * 5 + [True]
    self.assertEqual(metrics.majority_vote([None] * 5 + [3], right), 1)
    self.assertEqual(metrics.majority_vote([None] * 6, [False] * 6), 0)
    self.assertEqual(metrics.majority_vote([], []), 0)

  def test_weights(self):
    # 7: .2 + .3 = .5, 5: .9 + .1 = 1.0, 9: .8; None's .99 does not count.
    vote = metrics.majority_vote(ANSWERS, IS_FIVE, weights=SCORES)
    self.assertEqual(vote, 1)
    # 9 wins once 5 has but .7.
    scores = [0.2, 0.6, 0.3, 0.1, 0.8, 0.99]
    vote = metrics.majority_vote(ANSWERS, IS_FIVE, weights=scores)
    self.assertEqual(vote, 0)

  def test_equal_weights_tie_in_any_order(self):
    # .1 + .2 + .3 is not .3 + .2 + .1 in floating point.
    weights = [0.1, 0.2, 0.3, 0.3, 0.2, 0.1]
    total = functools.partial(functools.reduce, operator.add)
    self.assertNotEqual(total(weights[:3]), total(weights[3:]))
    vote = metrics.majority_vote(
      list("aaabbb"), [True] * 3 + [False] * 3, weights=weights
    )
    self.assertEqual(vote, 0.5)

  def test_answer_is_right_if_a_voter_is(self):
    # Right answer by wrong steps: the answer is the same.
    for is_correct in ([False, True, False], [True, False, False]):
      vote = metrics.majority_vote(["4", "4", "5"], is_correct)
      self.assertEqual(vote, 1)

  @hypothesis.given(data=st.data())
  def test_expected_accuracy_ignores_the_order(self, data):
    answers = data.draw(
      st.lists(st.sampled_from(["1", "2", "3", None]), max_size=8)
    )
    order = data.draw(st.permutations(range(len(answers))))
    shuffled = [answers[i] for i in order]
    vote = lambda a: metrics.majority_vote(a, [x == "1" for x in a])
    self.assertEqual(vote(answers), vote(shuffled))
    # What choosing at random among the most frequent ones earns.
    counts = [answers.count(a) for a in "123"]
    if max(counts):
      winners = [a for a in "123" if answers.count(a) == max(counts)]
      self.assertEqual(vote(answers), winners.count("1") / len(winners))

  def test_rerank(self):
    # The unparsable one has .99; of the others "5" has .9.
    self.assertEqual(metrics.rerank(ANSWERS, IS_FIVE, SCORES), 1)
    wrong = [answer == "9" for answer in ANSWERS]
    self.assertEqual(metrics.rerank(ANSWERS, wrong, SCORES), 0)
    self.assertEqual(metrics.rerank([None], [True], [1.0]), 0)
    self.assertEqual(metrics.rerank([], [], []), 0)
    # Logits may be negative.
    self.assertEqual(metrics.rerank([1, 2], [True, False], [-1, -3]), 1)

  def test_rerank_shares_ties(self):
    found = metrics.rerank(list("abc"), [True, False, True], [2, 2, 1])
    self.assertEqual(found, 0.5)

  @parameterized.parameters(
    ({"ties": "coin"}, 'ties must be "expected" or "first_seen", got .coin'),
    ({"weights": [1.0, -0.5]}, "weights must not be negative, got -0.5"),
    ({"weights": [1.0, math.nan]}, "weights must be finite"),
    ({"weights": [1.0]}, r"one for each of 2 answers, got \(1,\)"),
  )
  def test_bad_votes(self, settings, message):
    with self.assertRaisesRegex(ValueError, message):
      metrics.majority_vote(["1", "2"], [True, False], **settings)

  def test_bad_rerank(self):
    with self.assertRaisesRegex(ValueError, "scores must be finite"):
      metrics.rerank(["1"], [True], [math.inf])
    with self.assertRaises(ValueError):
      metrics.rerank(["1"], [True, False], [1.0])


class TracesTest(parameterized.TestCase):
  def test_unique_correct(self):
    # Two alike, one with a blank behind, one ran out of length, one wrong.
    texts = ["3+4\n#7", "3+4\n#7", "3+4\n#7 ", "4+3\n#7", "3+4\n#8"]
    is_correct = [True, True, True, False, False]
    self.assertEqual(metrics.unique_correct(texts, is_correct), 1)
    self.assertEqual(metrics.correct_traces(texts, is_correct), ["3+4\n#7"])
    is_correct[3] = True
    self.assertEqual(metrics.unique_correct(texts, is_correct), 2)
    self.assertEqual(metrics.unique_correct(texts, [False] * 5), 0)

  def test_key(self):
    texts = ["so 1+1=2", "then 1+1=2", "2"]
    equations = lambda text: "".join(c for c in text if c in "0123456789+=")
    found = metrics.unique_correct(texts, [True] * 3, key=equations)
    self.assertEqual(found, 2)

  def test_solved_fraction(self):
    is_correct = [[0, 0], [0, 1], [1, 1], [0, 0]]
    self.assertEqual(metrics.solved_fraction(is_correct), 0.5)
    with self.assertRaisesRegex(ValueError, r"\[N, K\] samples, got \(2,\)"):
      metrics.solved_fraction([True, False])

  def test_new_traces(self):
    texts = ["a", "a ", "b ", "c", "d"]
    is_correct = [True, True, True, True, False]
    found = metrics.new_traces(texts, is_correct, [" b", "d", "e"])
    self.assertEqual(found, (2, 3))
    self.assertEqual(metrics.new_traces(texts, is_correct, texts), (0, 3))
    self.assertEqual(metrics.new_traces(texts, is_correct, []), (3, 3))
    self.assertEqual(metrics.new_traces(texts, [False] * 5, []), (0, 0))


class RatioIntervalTest(parameterized.TestCase):
  def test_two_questions(self):
    # 1 of 1 and 0 of 3: 1/4. Resamples: 1, 1/4 twice as often, 0.
    self.assertEqual(metrics.ratio_interval([1, 0], [1, 3]), (0.25, 0.0, 1.0))
    self.assertEqual(
      metrics.ratio_interval([1, 0], [1, 3], level=0.4), (0.25, 0.25, 0.25)
    )

  def test_equal_wholes_are_a_mean(self):
    parts = np.random.default_rng(0).integers(0, 5, size=30)
    np.testing.assert_allclose(
      metrics.ratio_interval(parts, [4] * 30),
      metrics.mean_interval(parts / 4),
    )
    base = np.random.default_rng(1).integers(0, 5, size=30)
    np.testing.assert_allclose(
      metrics.ratio_interval(parts, [4] * 30, baseline=(base, [4] * 30)),
      metrics.paired_interval(parts / 4, base / 4),
      atol=1e-12,
    )

  def test_pairs_cancel_what_they_share(self):
    parts, wholes = [1, 5, 2], [4, 6, 2]
    found = metrics.ratio_interval(parts, wholes, baseline=(parts, wholes))
    self.assertEqual(found, (0.0, 0.0, 0.0))

  def test_questions_without_a_whole(self):
    # Both resamples of question 0 alone are empty and left out.
    found = metrics.ratio_interval([0, 1], [0, 2])
    self.assertEqual(found, (0.5, 0.5, 0.5))

  @parameterized.parameters(
    ([0, 0], [0, 0], {}, "nor all 0"),
    ([0, 0], [1, -1], {}, "must not be negative"),
    ([0, math.nan], [1, 1], {}, "must be finite"),
    ([], [], {}, r"one shape \[N\], N > 0"),
    ([1, 2], [1], {}, r"one shape"),
    ([1], [1], {"baseline": ([0], [0])}, "nor all 0"),
    ([1], [1], {"level": 95}, "level must lie between 0 and 1"),
  )
  def test_bad_input(self, parts, wholes, settings, message):
    with self.assertRaisesRegex(ValueError, message):
      metrics.ratio_interval(parts, wholes, **settings)


class McNemarTest(parameterized.TestCase):
  def test_hand_computed(self):
    # Only the first is right on 1 question, only the second on 5:
    # 2 (C(6, 0) + C(6, 1)) / 64 = 14 / 64.
    first = [True] * 3 + [False] * 7
    second = [True] * 2 + [False] + [True] * 5 + [False] * 2
    counts, p = metrics.mcnemar(first, second)
    self.assertEqual(
      counts, {"both": 2, "only_first": 1, "only_second": 5, "neither": 2}
    )
    self.assertEqual(p, 14 / 64)
    counts, again = metrics.mcnemar(second, first)
    self.assertEqual((counts["only_first"], again), (5, p))

  @parameterized.parameters(
    (0, 0, 1.0), (1, 0, 1.0), (3, 3, 1.0), (5, 0, 1 / 16)
  )
  def test_small_numbers(self, only_first, only_second, expected):
    first = [True] * only_first + [False] * only_second + [True]
    second = [False] * only_first + [True] * only_second + [True]
    self.assertEqual(metrics.mcnemar(first, second)[1], expected)

  def test_many_questions(self):
    # Beyond what a float can count: b = c + 0, and far apart.
    even = np.arange(4000) % 2 == 0
    self.assertEqual(metrics.mcnemar(even, ~even)[1], 1.0)
    none = np.zeros(4000, bool)
    self.assertEqual(metrics.mcnemar(~none, none)[1], 0.0)

  def test_bad_input(self):
    with self.assertRaisesRegex(ValueError, r"bool \(1,\) and bool \(2,\)"):
      metrics.mcnemar([True], [True, False])
    with self.assertRaisesRegex(ValueError, "arrays of bool, got float64"):
      metrics.mcnemar([0.5], [True])


class LocalizationTest(parameterized.TestCase):
  def test_shares_are_over_all_tokens(self):
    flagged = [np.array([1, 1, 0, 0], bool), np.array([0, 1], bool)]
    changed = [np.array([1, 0, 1, 0], bool), np.array([0, 1], bool)]
    found = metrics.localization(flagged, changed)
    expected = {
      "precision": 2 / 3, "recall": 2 / 3, "chance": 3 / 6, "flagged": 3 / 6,
    }  # fmt: skip
    self.assertEqual(found, expected)

  def test_precision_and_recall_differ(self):
    found = metrics.localization(
      [np.array([1, 1, 1, 1], bool)], [np.array([0, 0, 0, 1], bool)]
    )
    self.assertEqual((found["precision"], found["recall"]), (0.25, 1.0))
    self.assertEqual((found["chance"], found["flagged"]), (0.25, 1.0))

  def test_shares_of_nothing_are_nan(self):
    none = [np.zeros(3, bool)]
    found = metrics.localization(none, none)
    self.assertTrue(np.isnan(found["precision"]) and np.isnan(found["recall"]))
    self.assertEqual(found["chance"], 0.0)

  def test_texts_must_fit(self):
    for flagged, changed in (([np.ones(2)], [np.ones(3)]), ([], [])):
      with self.assertRaisesRegex(ValueError, "as many flags"):
        metrics.localization(flagged, changed)
