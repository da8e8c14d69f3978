"""Tests of the advantages of whole responses and the weights made of them."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

from rljax.ops import advantages

_ADVANTAGES = np.float32([0.3, -0.1, 0.1, 0.0, 0.6])


class SequenceTest(parameterized.TestCase):
  @chex.variants(with_jit=True, without_jit=True)
  def test_hand_computed(self):
    rewards, values = np.float32([0.8, 0.35]), np.float32([0.5, 0.6])
    actual = self.variant(advantages.sequence)(rewards, values)
    np.testing.assert_allclose(actual, [0.3, -0.25], rtol=1e-6)
    self.assertEqual(actual.dtype, jnp.float32)
    actual = self.variant(advantages.positive_filter)(actual)
    np.testing.assert_allclose(actual, [0.3, 0.0], rtol=1e-6)

  def test_half_precision_is_left_before_the_difference(self):
    rewards, values = jnp.bfloat16([1.0]), jnp.bfloat16([0.001])
    actual = advantages.sequence(rewards, values)
    np.testing.assert_allclose(actual, 1.0 - np.float32(values), rtol=1e-6)

  def test_no_gradient(self):
    grads = jax.grad(
      lambda *args: jnp.sum(
        advantages.positive_filter(advantages.sequence(*args))
      ),
      argnums=(0, 1),
    )(jnp.ones(3), jnp.zeros(3))
    chex.assert_trees_all_equal(grads, (jnp.zeros(3), jnp.zeros(3)))
    grad = jax.grad(lambda x: jnp.sum(advantages.positive_filter(x)))(
      jnp.ones(3)
    )
    np.testing.assert_array_equal(grad, np.zeros(3))

  def test_bad_input(self):
    with self.assertRaises(AssertionError):
      advantages.sequence(jnp.ones(3), jnp.ones(2))
    with self.assertRaises(AssertionError):
      advantages.sequence(jnp.ones(3, jnp.int32), jnp.ones(3))


class PriorityWeightsTest(parameterized.TestCase):
  @chex.variants(with_jit=True, without_jit=True)
  @parameterized.parameters(
    ("good_priority", [0.3, 0.0, 0.1, 0.0, 0.6]),
    ("good_random", [1 / 3, 0.0, 1 / 3, 0.0, 1 / 3]),
    ("all_priority", [0.3, 0.0, 0.1, 0.0, 0.6]),
    ("none", [0.2, 0.2, 0.2, 0.2, 0.2]),
  )
  def test_one_response_per_prompt(self, mode, expected):
    weights_fn = self.variant(
      lambda x: advantages.priority_weights(x, mode=mode)
    )
    np.testing.assert_allclose(weights_fn(_ADVANTAGES), expected, atol=1e-7)

  @chex.variants(with_jit=True, without_jit=True)
  @parameterized.parameters(
    ("good_priority", [[0.75, 0.0], [0.0, 0.0], [0.25, 0.0]]),
    ("good_random", [[0.5, 0.0], [0.0, 0.0], [0.5, 0.0]]),
    # The rejected one of the second prompt is better than expected.
    ("all_priority", [[0.375, 0.0], [0.0, 0.5], [0.125, 0.0]]),
    ("none", [[1 / 3, 0.0], [1 / 3, 0.0], [1 / 3, 0.0]]),
  )
  def test_candidates(self, mode, expected):
    candidates = np.float32([[0.3, -0.2], [-0.1, 0.4], [0.1, 0.0]])
    weights_fn = self.variant(
      lambda x: advantages.priority_weights(x, mode=mode)
    )
    np.testing.assert_allclose(weights_fn(candidates), expected, atol=1e-7)

  def test_by_reward(self):
    actual = advantages.priority_weights(
      jnp.array([0.2, 0.9, 0.5]), mode="good_priority"
    )
    np.testing.assert_allclose(actual, [0.125, 0.5625, 0.3125], atol=1e-7)

  @parameterized.parameters("good_priority", "good_random", "all_priority")
  def test_nothing_positive(self, mode):
    weights = advantages.priority_weights(-jnp.abs(_ADVANTAGES), mode=mode)
    np.testing.assert_array_equal(weights, np.zeros(5))

  @parameterized.parameters("good_priority", "good_random", "all_priority")
  def test_nan_is_not_dropped_in_silence(self, mode):
    broken = jnp.array(_ADVANTAGES).at[1].set(jnp.nan)
    weights = advantages.priority_weights(broken, mode=mode)
    self.assertTrue(np.isnan(weights[1]))

  def test_bad_input(self):
    with self.assertRaisesRegex(
      ValueError,
      "mode must be one of good_priority, good_random, all_priority, none, "
      "got 'best'",
    ):
      advantages.priority_weights(jnp.ones(3), mode="best")
    for wrong in (jnp.ones(()), jnp.ones((1, 1, 1)), jnp.ones(3, jnp.int32)):
      with self.assertRaises(AssertionError):
        advantages.priority_weights(wrong, mode="none")


class DrawnScoresTest(parameterized.TestCase):
  @chex.variants(with_jit=True, without_jit=True)
  def test_hand_computed(self):
    weights = advantages.priority_weights(_ADVANTAGES, mode="good_priority")

    def both(scores, weights):
      return [
        advantages.drawn_scores(scores, weights, double_weighting=double)
        for double in (True, False)
      ]

    double, single = self.variant(both)(_ADVANTAGES, weights)
    np.testing.assert_array_equal(double, _ADVANTAGES)
    # Every expected update: as A², 0.09, 0, 0.01, 0, 0.36.
    np.testing.assert_allclose(
      weights * double, [0.09, 0.0, 0.01, 0.0, 0.36], atol=1e-7
    )
    # Once: the mean 1 / 3 of what is positive, which times p is A / 3.
    np.testing.assert_allclose(single, [1 / 3, 0, 1 / 3, 0, 1 / 3], rtol=1e-6)
    np.testing.assert_allclose(
      weights * single, [0.1, 0.0, 1 / 30, 0.0, 0.2], rtol=1e-6
    )

  @parameterized.parameters("good_random", "none")
  def test_uniform_draws_weigh_once_already(self, mode):
    weights = advantages.priority_weights(_ADVANTAGES, mode=mode)
    single = advantages.drawn_scores(
      _ADVANTAGES, weights, double_weighting=False
    )
    expected = np.where(np.asarray(weights) > 0, _ADVANTAGES, 0.0)
    np.testing.assert_allclose(single, expected, rtol=1e-6)

  def test_no_gradient(self):
    for double in (True, False):
      grads = jax.grad(
        lambda *args, double=double: jnp.sum(
          advantages.drawn_scores(*args, double_weighting=double)
        ),
        argnums=(0, 1),
      )(jnp.ones(3), jnp.full(3, 1 / 3))
      chex.assert_trees_all_equal(grads, (jnp.zeros(3), jnp.zeros(3)))
