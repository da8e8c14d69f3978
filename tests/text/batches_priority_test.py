"""Tests of drawing rows in proportion to their weights."""

import itertools
import time
from unittest import mock

import hypothesis
import numpy as np
from absl.testing import parameterized
from hypothesis import strategies as st

from rljax.text import batches

_WEIGHTS = np.array([0.3, 0.0, 0.1, 0.0, 0.6])


def _draw_at(sampler, uniforms):
  """What the sampler draws when its generator gives these numbers."""
  with mock.patch.object(np.random, "default_rng") as default_rng:
    default_rng.return_value.random.return_value = np.array(uniforms)
    return sampler.draw(len(uniforms), 0)


class ReplacementTest(parameterized.TestCase):
  def test_borders(self):
    sampler = batches.PrioritySampler(_WEIGHTS, seed=0)
    # Up to 0.3, 0.4 and 1.
    rows = _draw_at(sampler, [0.0, 0.29, 0.35, 0.99])
    np.testing.assert_array_equal(rows, [0, 0, 2, 4])
    self.assertEqual(rows.dtype, np.int64)
    # A border belongs to the row behind it, and 0 to no row without weight.
    sampler = batches.PrioritySampler(np.array([0.0, 1.0, 0.0, 3.0]), seed=0)
    rows = _draw_at(sampler, [0.0, 0.25, np.nextafter(1.0, 0.0)])
    np.testing.assert_array_equal(rows, [1, 3, 3])
    self.assertEqual(sampler.num_rows, 2)

  def test_shares(self):
    rows = batches.PrioritySampler(_WEIGHTS, seed=1).draw(100_000, 0)
    shares = np.bincount(rows, minlength=5) / 100_000
    np.testing.assert_allclose(shares, _WEIGHTS, atol=0.01)
    np.testing.assert_array_equal(shares[[1, 3]], 0.0)

  def test_small_rows_are_not_lost(self):
    # In float32 a million and 0.01 are a million.
    weights = np.full(1001, 0.01, np.float32)
    weights[0] = 1e6
    sampler = batches.PrioritySampler(weights, seed=0)
    edge = (1e6 + 9.995) / (1e6 + 10)
    np.testing.assert_array_equal(_draw_at(sampler, [0.9, edge]), [0, 1000])

  def test_a_step_does_not_depend_on_the_number_of_rows(self):
    def seconds(num_rows):
      sampler = batches.PrioritySampler(np.ones(num_rows), seed=0)
      times = []
      for step in range(30):
        start = time.perf_counter()
        sampler.draw(16, step)
        times.append(time.perf_counter() - start)
      return min(times)

    self.assertLess(seconds(1_000_000), 10 * seconds(100) + 1e-3)


class WithoutReplacementTest(parameterized.TestCase):
  def test_by_hand(self):
    sampler = batches.PrioritySampler(_WEIGHTS, seed=0, replace=False)
    # 0.5 of 1 is row 4; 0.8 of the 0.4 that are left, row 2; then row 0.
    np.testing.assert_array_equal(_draw_at(sampler, [0.5, 0.8, 0.9]), [4, 2, 0])
    # 0.1 of 1 is row 0; 0.1 of 0.7, moved by 0.3, row 2.
    np.testing.assert_array_equal(_draw_at(sampler, [0.1, 0.1, 0.0]), [0, 2, 4])

  def test_orders_have_the_right_frequency(self):
    # P(a, b) = p_a p_b / (1 - p_a).
    sampler = batches.PrioritySampler(_WEIGHTS, seed=2, replace=False)
    draws = np.array([sampler.draw(2, step) for step in range(20_000)])
    for a, b in itertools.permutations((0, 2, 4), 2):
      expected = _WEIGHTS[a] * _WEIGHTS[b] / (1 - _WEIGHTS[a])
      share = np.mean((draws[:, 0] == a) & (draws[:, 1] == b))
      np.testing.assert_allclose(share, expected, atol=0.012)

  @hypothesis.given(seed=st.integers(0, 2**32 - 1), scale=st.integers(-12, 12))
  def test_rows_differ_and_all_come(self, seed, scale):
    rng = np.random.default_rng(seed)
    weights = rng.random(30) * 10.0 ** rng.integers(-9, 10, size=30)
    weights *= 10.0**scale
    weights[rng.random(30) < 0.3] = 0.0
    weights[rng.integers(30)] = 1.0
    sampler = batches.PrioritySampler(weights, seed=seed, replace=False)
    rows = sampler.draw(sampler.num_rows, 0)
    np.testing.assert_array_equal(np.sort(rows), np.flatnonzero(weights))

  @parameterized.parameters(([1.0, 1e-30],), ([1e-30, 1.0, 1e-30],))
  def test_rows_too_small_to_add_up_come_last(self, weights):
    sampler = batches.PrioritySampler(np.array(weights), seed=0, replace=False)
    rows = sampler.draw(len(weights), 3)
    self.assertEqual(rows[0], np.argmax(weights))
    self.assertLen(set(rows), len(weights))


class ResumeTest(parameterized.TestCase):
  @parameterized.parameters(True, False)
  def test_any_step_is_told_again(self, replace):
    weights = np.random.default_rng(0).random(50)
    first = batches.PrioritySampler(weights, seed=7, replace=replace)
    steps = [first.draw(8, step) for step in range(5)]
    again = batches.PrioritySampler(weights, seed=7, replace=replace)
    for step in (3, 0, 4):
      np.testing.assert_array_equal(again.draw(8, step), steps[step])
    self.assertFalse(np.array_equal(steps[0], steps[1]))
    other = batches.PrioritySampler(weights, seed=8, replace=replace)
    self.assertFalse(np.array_equal(other.draw(8, 0), steps[0]))

  def test_the_global_generator_is_left_alone(self):
    np.random.seed(0)
    expected = np.random.random()
    np.random.seed(0)
    batches.PrioritySampler(_WEIGHTS, seed=0).draw(4, 0)
    self.assertEqual(np.random.random(), expected)


class ScaleStepsTest(parameterized.TestCase):
  def test_hand_computed(self):
    # Three of five are positive.
    self.assertEqual(batches.scale_steps(9000, _WEIGHTS), 5400)
    self.assertEqual(batches.scale_steps(900, _WEIGHTS), 540)
    two_thirds = np.arange(100) < 67
    self.assertEqual(batches.scale_steps(9000, two_thirds), 6030)
    self.assertEqual(batches.scale_steps(900, two_thirds), 603)
    # int(9000 * 0.7), with a 0.7 of float32, is 6299.
    self.assertEqual(batches.scale_steps(9000, np.arange(10) < 7), 6300)
    # Two prompts with three positive candidates: more than one in each.
    pooled = np.array([[0.5, 0.2], [0.0, 0.3]])
    self.assertEqual(batches.scale_steps(100, pooled, num_rows=2), 150)


class BadInputTest(parameterized.TestCase):
  def test_weights(self):
    for weights, message in (
      (np.zeros(4), "None of the 4 weights is positive"),
      (np.zeros(0), "None of the 0 weights is positive"),
      (
        np.array([0.1, -0.2, np.nan]),
        "weights must be finite and not negative, got -0.2 in row 1",
      ),
      (np.array([0.1, np.nan]), "got nan in row 1"),
      (np.array([np.inf, 1.0]), "got inf in row 0"),
      (np.ones((2, 2)), r"weights must be a vector, got shape \(2, 2\)"),
    ):
      with self.assertRaisesRegex(ValueError, message):
        batches.PrioritySampler(weights, seed=0)

  def test_batch_size(self):
    sampler = batches.PrioritySampler(_WEIGHTS, seed=0)
    self.assertLen(sampler.draw(9, 0), 9)
    with self.assertRaisesRegex(
      ValueError, "batch_size must be positive, got 0"
    ):
      sampler.draw(0, 0)
    sampler = batches.PrioritySampler(_WEIGHTS, seed=0, replace=False)
    with self.assertRaisesRegex(
      ValueError, "batch_size must be at most 3, the rows with a positive"
    ):
      sampler.draw(4, 0)
