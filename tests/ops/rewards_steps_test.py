"""Tests of rewards for steps, and of penalties for length."""

import functools

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
# "15\n#42" with its end token and a pad.
_TOKENS = ["1", "5", "\n", "#", "4", "2", "EOS", "PAD"]
_ENDS = np.array([[token == "\n" for token in _TOKENS]])
_MASK = np.array([[token != "PAD" for token in _TOKENS]])


def _batch(seed, shape=(6, 9)):
  """Step ends anywhere, masks with holes, one row without tokens."""
  rng = np.random.default_rng(seed)
  mask = rng.random(shape) < 0.7
  mask[rng.integers(shape[0])] = False
  return rng, rng.random(shape) < 0.4, mask


class PlaceStepRewardsTest(parameterized.TestCase):
  @_jit_and_not
  def test_hand_computed(self):
    place = self.variant(rewards.place_step_rewards)
    np.testing.assert_allclose(
      place(np.float32([[0.1, 0.2]]), _ENDS, _MASK),
      [[0, 0, 0.1, 0, 0, 0, 0.2, 0]],
      atol=1e-7,
    )
    # Two steps have no end: both on the last token. An end in the padding is
    # none; one after the last step earns nothing.
    np.testing.assert_allclose(
      place(
        np.float32([[0.1, 0.2, 0.3], [0.1, 0.0, 0.0], [1.0, 2.0, 3.0]]),
        np.array([[False, True, False, True]] * 2 + [[True, True, True, True]]),
        np.array([[True, True, True, False]] * 2 + [[True, True, True, True]]),
      ),
      [[0, 0.1, 0.5, 0], [0, 0.1, 0, 0], [1, 2, 3, 0]],
      atol=1e-6,
    )

  def test_score_is_one_step(self):
    # A right answer: 0 0 0 0 0 0 1 0.
    np.testing.assert_array_equal(
      rewards.place_step_rewards(np.float32([[1.0]]), ~_MASK, _MASK),
      rewards.place_score(np.float32([1.0]), _MASK),
    )

  def test_dense_heuristic(self):
    # Generated 15, 28, 42, 42 against 15, 27, 42: three lines of one token
    # and the last, "#42" with its end token; each line feed is a token.
    matches = np.float32([[1, 0, 1, 0]])
    ends = np.array([[False, True] * 3 + [False, False]])
    placed = rewards.place_step_rewards(
      0.1 * matches, ends, np.ones((1, 8), bool)
    )
    np.testing.assert_allclose(
      placed, [[0, 0.1, 0, 0, 0, 0.1, 0, 0]], atol=1e-7
    )

  @hypothesis.given(seed=_SEEDS, num_steps=st.sampled_from([1, 3, 7]))
  def test_matches_oracle_and_loses_nothing(self, seed, num_steps):
    rng, ends, mask = _batch(seed)
    earned = rng.normal(size=(len(mask), num_steps))
    expected = np.zeros(mask.shape)
    for i, row in enumerate(mask):
      tokens = np.flatnonzero(row)
      if not len(tokens):
        continue
      places = [t for t in tokens if ends[i, t]]
      for k, reward in enumerate(earned[i]):
        expected[i, places[k] if k < len(places) else tokens[-1]] += reward
    actual = rewards.place_step_rewards(jnp.float32(earned), ends, mask)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
      actual.sum(axis=1), earned.sum(axis=1) * mask.any(axis=1), atol=1e-5
    )

  def test_bad_input(self):
    with self.assertRaises(AssertionError):
      rewards.place_step_rewards(np.float32([0.1]), _ENDS, _MASK)
    with self.assertRaises(AssertionError):
      rewards.place_step_rewards(np.float32([[0.1]] * 2), _ENDS, _MASK)
    with self.assertRaises(AssertionError):
      rewards.place_step_rewards(np.float32([[0.1]]), _ENDS[:, :3], _MASK)


class PotentialRewardsTest(parameterized.TestCase):
  @_jit_and_not
  def test_hand_computed(self):
    # .5 -> .6 -> .3 -> .9, the last at a token that ends no step.
    potentials = np.float32([[np.nan, 0.6, 0.3, np.nan, 0.9, np.nan]])
    ends = np.array([[False, True, True, False, False, True]])
    mask = np.array([[True] * 5 + [False]])
    actual = self.variant(rewards.potential_rewards)(potentials, ends, mask)
    np.testing.assert_allclose(actual, [[0, 0.1, -0.3, 0, 0.6, 0]], atol=1e-6)
    twice = rewards.potential_rewards(
      potentials, ends, mask, initial=0.6, scale=2.0
    )
    np.testing.assert_allclose(twice, [[0, 0, -0.6, 0, 1.2, 0]], atol=1e-6)

  @hypothesis.given(seed=_SEEDS)
  def test_telescopes_and_ignores_other_tokens(self, seed):
    rng, ends, mask = _batch(seed)
    potentials = rng.random(mask.shape)
    actual = rewards.potential_rewards(jnp.float32(potentials), ends, mask)
    points = ends & mask
    for i, row in enumerate(mask):
      total = 0.0
      if row.any():
        last = np.flatnonzero(row)[-1]
        points[i, last] = True
        total = potentials[i, last] - 0.5
      np.testing.assert_allclose(actual[i].sum(), total, atol=1e-5)
    np.testing.assert_array_equal(np.asarray(actual)[~points], 0.0)
    poisoned = jnp.where(points, jnp.float32(potentials), jnp.nan)
    np.testing.assert_array_equal(
      rewards.potential_rewards(poisoned, ends, mask), actual
    )

  def test_no_gradient(self):
    grads = jax.grad(
      lambda x: rewards.potential_rewards(x, _ENDS, _MASK)[0, 2]
    )(jnp.ones((1, 8)))
    np.testing.assert_array_equal(grads, np.zeros((1, 8)))


class OverlongPenaltyTest(parameterized.TestCase):
  @_jit_and_not
  @parameterized.parameters(
    (20480, 4096, [1, 16384, 17408, 18432, 20480, 20481]),
    (40, 8, [1, 32, 34, 36, 40, 41]),
  )
  def test_hand_computed(self, max_length, buffer, lengths):
    penalty = self.variant(
      functools.partial(
        rewards.overlong_penalty, max_length=max_length, buffer=buffer
      )
    )(np.array(lengths, np.int32))
    np.testing.assert_allclose(penalty, [0, 0, -0.25, -0.5, -1, -1], atol=1e-7)
    chex.assert_type(penalty, jnp.float32)

  def test_first_token_in_the_buffer(self):
    penalty = rewards.overlong_penalty(
      np.array([33, 32], np.int32), max_length=40, buffer=8
    )
    np.testing.assert_array_equal(penalty, [-0.125, 0.0])

  def test_bad_input(self):
    for buffer in (0, 41):
      with self.assertRaisesRegex(
        ValueError, f"between 1 and max_length=40, got {buffer}"
      ):
        rewards.overlong_penalty(
          np.array([1], np.int32), max_length=40, buffer=buffer
        )
    with self.assertRaises(AssertionError):
      rewards.overlong_penalty(np.float32([1]), max_length=40, buffer=8)
