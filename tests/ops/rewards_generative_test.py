"""Tests of the rewards that a generative reward model gives to tokens."""

import functools
import math

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized
from hypothesis import strategies as st

from rljax.ops import rewards

_SEEDS = st.integers(0, 2**32 - 1)
_jit_and_not = chex.variants(with_jit=True, without_jit=True)
_PROBS = np.float32([[0.99, 0.8, 0.55, 0.5, 0.49, 0.45, 0.4, 0.3, 0.01]])
_TWICE = np.tile(_PROBS, (2, 1))
_ONE_OF_EACH = np.array([True, False])
_ALL = np.ones_like(_TWICE, dtype=bool)


class GenerativeRewardsTest(parameterized.TestCase):
  @_jit_and_not
  def test_hand_computed(self):
    actual = self.variant(rewards.generative_rewards)(
      _TWICE, _ONE_OF_EACH, _ALL
    )
    chex.assert_type(actual, jnp.float32)
    np.testing.assert_allclose(
      actual,
      [
        [0.49, 0.3, 0.05, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, -0.01, -0.05, -0.1, -0.1, -0.1],
      ],
      atol=1e-6,
    )

  @_jit_and_not
  def test_worked_batch(self):
    # The first response wrong, the second right.
    probs = np.float32([[0.95, 0.42, 0.05, 0.8], [0.9, 0.6, 0.7, 0.3]])
    actual = self.variant(rewards.generative_rewards)(
      probs, np.array([False, True]), np.ones((2, 4), bool)
    )
    np.testing.assert_allclose(
      actual, [[0, -0.08, -0.1, 0], [0.4, 0.1, 0.2, 0]], atol=1e-6
    )

  @_jit_and_not
  def test_other_settings(self):
    actual = self.variant(
      functools.partial(
        rewards.generative_rewards,
        threshold=0.45,
        max_reward=0.2,
        max_penalty=0.3,
      )
    )(_TWICE, _ONE_OF_EACH, _ALL)
    np.testing.assert_allclose(
      actual,
      [
        [0.2, 0.2, 0.1, 0.05, 0.04, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, -0.05, -0.15, -0.3],
      ],
      atol=1e-6,
    )

  def test_a_bound_of_zero_silences_one_kind(self):
    for settings, silent in (({"max_reward": 0.0}, 0), ({"max_penalty": 0}, 1)):
      actual = rewards.generative_rewards(
        _TWICE, _ONE_OF_EACH, _ALL, **settings
      )
      np.testing.assert_array_equal(actual[silent], np.zeros(9))
      self.assertTrue(np.any(np.asarray(actual[1 - silent]) != 0))

  @hypothesis.given(seed=_SEEDS, threshold=st.sampled_from([0.0, 0.3, 1.0]))
  def test_matches_oracle_and_signs(self, seed, threshold):
    rng = np.random.default_rng(seed)
    probs, mask = rng.random((6, 9)), rng.random((6, 9)) < 0.7
    is_right = rng.random(6) < 0.5
    actual = np.asarray(
      rewards.generative_rewards(
        jnp.float32(np.where(mask, probs, rng.choice([np.nan, np.inf]))),
        is_right,
        mask,
        threshold=threshold,
      )
    )
    for i, t in np.ndindex(6, 9):
      expected = 0.0
      if mask[i, t] and is_right[i]:
        expected = min(max(probs[i, t] - threshold, 0.0), 0.5)
      elif mask[i, t]:
        expected = max(min(probs[i, t] - threshold, 0.0), -0.1)
      np.testing.assert_allclose(actual[i, t], expected, atol=1e-6)
    self.assertTrue(np.all(actual[is_right] >= 0))
    self.assertTrue(np.all(actual[~is_right] <= 0))
    # To the last bit: a loss counts what is not 0.
    np.testing.assert_array_equal(actual[~mask], 0.0)

  def test_float32_inside(self):
    # In bfloat16, -0.1 is -0.10009766, and 0.99 - 0.5 is rounded again.
    probs = jnp.bfloat16(_TWICE)
    actual = rewards.generative_rewards(probs, _ONE_OF_EACH, _ALL)
    chex.assert_type(actual, jnp.float32)
    self.assertEqual(float(actual[1, -1]), float(np.float32(-0.1)))
    np.testing.assert_array_equal(
      actual,
      rewards.generative_rewards(probs.astype(jnp.float32), _ONE_OF_EACH, _ALL),
    )

  def test_no_gradient(self):
    grad = jax.grad(
      lambda probs: jnp.sum(
        rewards.generative_rewards(probs, _ONE_OF_EACH, _ALL)
      )
    )(_TWICE)
    np.testing.assert_array_equal(grad, np.zeros_like(_TWICE))

  def test_bad_input(self):
    for settings, message in (
      ({"threshold": 1.5}, r"threshold must lie in \[0, 1\], got 1.5"),
      ({"threshold": -0.1}, r"threshold must lie in \[0, 1\], got -0.1"),
      ({"threshold": math.nan}, r"threshold must lie in \[0, 1\], got nan"),
      ({"max_reward": -0.5}, "max_reward must not be negative, got -0.5"),
      ({"max_penalty": -0.1}, "max_penalty must not be negative, got -0.1"),
      ({"max_penalty": math.nan}, "max_penalty must not be negative, got nan"),
    ):
      with self.assertRaisesRegex(ValueError, message):
        rewards.generative_rewards(_TWICE, _ONE_OF_EACH, _ALL, **settings)
    for args in (
      (_TWICE[0], _ONE_OF_EACH, _ALL[0]),
      (_TWICE, _ONE_OF_EACH[:1], _ALL),
      (_TWICE, _ALL, _ALL),
      (_TWICE, _ONE_OF_EACH, _ALL[:, :3]),
      (_TWICE, np.float32([1.0, 0.0]), _ALL),
      (_TWICE, _ONE_OF_EACH, _TWICE),
      (_ALL, _ONE_OF_EACH, _ALL),
    ):
      with self.assertRaises(AssertionError):
        rewards.generative_rewards(*args)
