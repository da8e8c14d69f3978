import math

import hypothesis
import hypothesis.strategies as st
import numpy as np
from absl.testing import parameterized

from rljax.evaluation import metrics


class MeanIntervalTest(parameterized.TestCase):
  def test_two_values(self):
    # A resample of {0, 1} has mean 0, 1/2, 1 with probability 1/4, 1/2, 1/4:
    # 95 % of them reach from 0 to 1, 40 % lie at 1/2.
    self.assertEqual(metrics.mean_interval([0, 1]), (0.5, 0.0, 1.0))
    self.assertEqual(metrics.mean_interval([0, 1], level=0.4), (0.5, 0.5, 0.5))

  def test_one_value(self):
    self.assertEqual(metrics.mean_interval([3.0]), (3.0, 3.0, 3.0))

  def test_width_of_a_large_sample(self):
    # mean ± 1.96 sd / sqrt(N).
    values = np.random.default_rng(0).normal(5, 2, size=2000)
    mean, low, high = metrics.mean_interval(values)
    self.assertAlmostEqual(mean, values.mean())
    half = 1.96 * values.std() / math.sqrt(2000)
    self.assertAlmostEqual(mean - low, half, delta=0.06 * half)
    self.assertAlmostEqual(high - mean, half, delta=0.06 * half)

  def test_coverage(self):
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
      _, low, high = metrics.mean_interval(
        rng.random(60) < 0.3, num_resamples=200, seed=trial
      )
      hits += low <= 0.3 <= high
    # 95 % give or take three standard deviations of 200 trials.
    self.assertBetween(hits / 200, 0.90, 0.99)

  @hypothesis.given(
    values=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20),
    seed=st.integers(0, 99),
  )
  def test_properties(self, values, seed):
    mean, low, high = metrics.mean_interval(values, num_resamples=50, seed=seed)
    slack = 1e-9 * max(map(abs, values))
    self.assertBetween(low, min(values) - slack, high)
    self.assertLessEqual(high, max(values) + slack)
    again = metrics.mean_interval(values, num_resamples=50, seed=seed)
    self.assertEqual((mean, low, high), again)

  @parameterized.parameters(
    ([], {}, r"needs \[N\] values"),
    ([1, 2, math.nan], {}, "Value 2 is nan"),
    ([math.inf, 1], {}, "Value 0 is inf"),
    ([1.0], {"level": 95}, "level must lie between 0 and 1, got 95"),
  )
  def test_bad_input(self, values, settings, message):
    with self.assertRaisesRegex(ValueError, message):
      metrics.mean_interval(values, **settings)


class PairedIntervalTest(parameterized.TestCase):
  def test_pairs_cancel_what_they_share(self):
    prompts = np.random.default_rng(0).normal(0, 10, size=50)
    mean, low, high = metrics.paired_interval(prompts + 1, prompts)
    np.testing.assert_allclose([mean, low, high], 1)

  def test_booleans(self):
    mean, low, high = metrics.paired_interval([True, True], [True, False])
    self.assertEqual((mean, low, high), (0.5, 0.0, 1.0))

  def test_bad_input(self):
    with self.assertRaisesRegex(ValueError, r"equal shapes, got \(2,\)"):
      metrics.paired_interval([1, 2], [1, 2, 3])


class ProportionIntervalTest(parameterized.TestCase):
  def test_hand_computed(self):
    # n = 10, k = 5, z = 1.959964: z² = 3.841459.
    # center (0.5 + 0.192073) / 1.384146 = 0.5,
    # half width 1.959964 sqrt(0.025 + 0.00960365) / 1.384146 = 0.263407.
    share, low, high = metrics.proportion_interval(5, 10)
    np.testing.assert_allclose(
      [share, low, high], [0.5, 0.236593, 0.763407], atol=1e-6
    )

  def test_ends(self):
    # k = 0: from 0 to (z²/n) / (1 + z²/n) = 0.384146 / 1.384146 = 0.277533.
    share, low, high = metrics.proportion_interval(0, 10)
    self.assertEqual((share, low), (0.0, 0.0))
    self.assertAlmostEqual(high, 0.277533, places=6)
    share, low, high = metrics.proportion_interval(10, 10)
    self.assertEqual((share, high), (1.0, 1.0))
    self.assertAlmostEqual(low, 1 - 0.277533, places=6)

  def test_level(self):
    _, low, high = metrics.proportion_interval(5, 10, level=0.5)
    self.assertLess(high - low, 0.25)

  @parameterized.parameters((1, 0), (3, 2), (-1, 2))
  def test_bad_input(self, num_successes, num_trials):
    with self.assertRaisesRegex(ValueError, "0 <= successes <= trials"):
      metrics.proportion_interval(num_successes, num_trials)


class CorrelationTest(parameterized.TestCase):
  def test_hand_computed(self):
    x = np.array([1.0, 2.0, 3.0])
    self.assertAlmostEqual(metrics.correlation(x, 5 - 2 * x), -1)
    # Deviations -1, 0, 1 and -1, 2, -1: their products add up to 0.
    self.assertAlmostEqual(metrics.correlation(x, np.array([0.0, 3, 0])), 0)
    # Two points lie on a line.
    found = metrics.correlation(np.float32([0, 1]), np.float32([2, 7]))
    self.assertAlmostEqual(found, 1)
    self.assertIsInstance(found, float)

  def test_what_does_not_vary(self):
    for x, y in (([1, 1], [0, 1]), ([0, 1], [2, 2])):
      self.assertTrue(math.isnan(metrics.correlation(np.array(x), np.array(y))))


class DiversityTest(parameterized.TestCase):
  def test_histogram(self):
    histogram = metrics.answer_histogram([25, None, 7, 25, None, 25])
    self.assertEqual(list(histogram.items()), [(7, 1), (25, 3), (None, 2)])
    self.assertEqual(metrics.top_share(histogram), 0.5)
    self.assertEqual(metrics.top_share({}), 0.0)

  def test_distinct_answers(self):
    self.assertEqual(metrics.distinct_answers([25, None, 7, 25]), 2)
    self.assertEqual(metrics.distinct_answers([None]), 0)

  @parameterized.parameters((1, 3 / 5), (2, 1.0), (3, 1.0), (4, 0.0))
  def test_distinct_n(self, n, expected):
    # Five words of three kinds; pairs ab ba, ca; one triple.
    texts = ["a b a", "c  a"]
    self.assertAlmostEqual(metrics.distinct_n(texts, n), expected)

  def test_distinct_n_of_ids(self):
    # Pairs 12 21 | 12: two kinds of three.
    self.assertAlmostEqual(metrics.distinct_n([[1, 2, 1], [1, 2]], 2), 2 / 3)
    self.assertEqual(metrics.distinct_n([[1, 2], [1, 3]], 1), 0.75)

  @parameterized.parameters(
    (1, 5 / 7, 6 / 7), (2, 4 / 5, 5 / 7), (3, 3 / 3, 3 / 7)
  )
  def test_distinct_n_definitions(self, n, corpus, words):
    # the cat sat | the cat ran away: seven words, five pairs, three triples.
    texts = ["The cat sat", "the cat ran away"]
    for definition, expected in (("corpus", corpus), ("words", words)):
      found = metrics.distinct_n(texts, n, definition=definition)
      self.assertAlmostEqual(found, expected)
    self.assertAlmostEqual(metrics.distinct_n(texts, n), corpus)

  def test_distinct_n_splits(self):
    # A line feed splits words by the first definition, and two blanks are one.
    self.assertEqual(metrics.distinct_n(["a\nb  a"], 1), 2 / 3)
    # "a\nb", "" and "a".
    found = metrics.distinct_n(["a\nb  a"], 1, definition="words")
    self.assertEqual(found, 1.0)

  def test_distinct_n_bad_input(self):
    with self.assertRaisesRegex(ValueError, "n must be positive"):
      metrics.distinct_n(["a"], 0)
    with self.assertRaisesRegex(ValueError, '"corpus" or "words", got \'ids\''):
      metrics.distinct_n(["a"], 1, definition="ids")

  def test_mean_words(self):
    self.assertEqual(metrics.mean_words(["a b\n\nc ", ""]), 1.5)
    self.assertEqual(metrics.mean_words([]), 0.0)


class OverlapTest(parameterized.TestCase):
  @parameterized.parameters(
    # Fragments "the cat sat" and "on the mat": 6/7 and (9 + 9)/7.
    (
      "the cat sat on the mat today",
      "the cat sat quietly on the mat",
      (6 / 7, 18 / 7),
      (6 / 7, 18 / 7),
    ),
    # One fragment of one word among two.
    ("the cat sat", "cat quietly", (0.5, 0.5), (0, 0)),
    # "a b c" is one word longer than the "a b" before it.
    ("a b x a b c", "a b c", (1, 3), (2 / 3, 4 / 3)),
    ("a b", "A b", (0.5, 0.5), (0, 0)),
    ("a b", "", (0, 0), (0, 0)),
    ("", "a", (0, 0), (0, 0)),
    # Twice the same words count twice; the end of the source ends a fragment.
    ("a b", "a b a b c", (4 / 5, 8 / 5), (4 / 5, 8 / 5)),
  )
  def test_hand_computed(self, source, response, standard, published):
    np.testing.assert_allclose(
      metrics.coverage_and_density(source, response), standard
    )
    np.testing.assert_allclose(
      metrics.coverage_and_density(source, response, published=True),
      published,
    )

  @hypothesis.given(
    source=st.text("ab ", max_size=12), response=st.text("ab ", max_size=12)
  )
  def test_properties(self, source, response):
    coverage, density = metrics.coverage_and_density(source, response)
    num_words = len(response.split())
    self.assertBetween(coverage, 0, 1)
    self.assertBetween(density, coverage, num_words * coverage)
    known = [word in source.split() for word in response.split()]
    self.assertAlmostEqual(coverage, sum(known) / max(num_words, 1))
    whole = metrics.coverage_and_density(response, response)
    self.assertEqual(whole, (float(num_words > 0), num_words))


class PerplexityTest(parameterized.TestCase):
  def test_hand_computed(self):
    log_probs = np.log([[0.5, 0.5, 0.5], [0.125, 1, 1], [1, 1, 1]])
    log_probs[1, 2] = np.nan
    mask = np.array([[1, 1, 1], [1, 0, 0], [0, 0, 0]], np.bool_)
    found = metrics.perplexity(log_probs, mask)
    # Four tokens of 6 bits: 2^(6/4). Two replies of 1 and 3 bits: 2^(4/2).
    self.assertAlmostEqual(found["perplexity"], 2**1.5)
    self.assertAlmostEqual(found["perplexity_per_reply"], 4)

  def test_bad_input(self):
    with self.assertRaisesRegex(ValueError, r"one \[B, T\] shape, got \(1, 2"):
      metrics.perplexity(np.zeros((1, 2)), np.ones((2, 1), np.bool_))
    for mask in (np.zeros((1, 2), np.bool_), np.ones((1, 2))):
      with self.assertRaisesRegex(ValueError, "bool mask with a token"):
        metrics.perplexity(np.zeros((1, 2)), mask)
