"""Tests of scores placed on tokens, KL penalties and their controller."""

import functools

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized
from hypothesis import strategies as st

from rljax.ops import advantages, rewards
from tests import oracles

_SEEDS = st.integers(0, 2**32 - 1)
_jit_and_not = chex.variants(with_jit=True, without_jit=True)


def _batch(seed, shape=(4, 6)):
  """Random log-probabilities of two policies and a mask; numpy."""
  rng = np.random.default_rng(seed)
  log_probs = -rng.exponential(size=shape)
  ref_log_probs = log_probs + rng.normal(0.0, 0.5, size=shape)
  return log_probs, ref_log_probs, rng.random(shape) < 0.7


class PlaceScoreTest(parameterized.TestCase):
  @_jit_and_not
  def test_hand_computed(self):
    scores = jnp.array([1.0, 2.0, 3.0, jnp.nan])
    mask = jnp.array(
      [
        [True, True, True],  # Cut off: the last token.
        [True, False, False],
        [False, True, False],
        [False, False, False],  # Nowhere to place it.
      ]
    )
    np.testing.assert_array_equal(
      self.variant(rewards.place_score)(scores, mask),
      [[0, 0, 1], [2, 0, 0], [0, 3, 0], [0, 0, 0]],
    )

  @hypothesis.given(seed=_SEEDS)
  def test_matches_oracle(self, seed):
    _, _, mask = _batch(seed)
    scores = np.random.default_rng(seed).normal(size=mask.shape[0])
    np.testing.assert_allclose(
      rewards.place_score(jnp.float32(scores), mask),
      oracles.place_score(scores, mask),
      rtol=1e-6,
    )

  def test_bad_input(self):
    mask = jnp.ones((2, 3), bool)
    with self.assertRaises(AssertionError):
      rewards.place_score(jnp.zeros(3), mask)
    with self.assertRaises(AssertionError):
      rewards.place_score(jnp.zeros((2, 3)), mask)
    with self.assertRaises(AssertionError):
      rewards.place_score(jnp.zeros(2), mask.astype(jnp.float32))


class KLPenaltyTest(parameterized.TestCase):
  @chex.variants(with_jit=True, without_jit=True)
  @parameterized.parameters(
    ("k1", [0.2, -0.1, 0.3]),
    ("k2", [0.02, 0.005, 0.045]),  # 0.2² / 2, ...
    ("k3", [0.018731, 0.005171, 0.040818]),  # e^-0.2 - 1 + 0.2, ...
  )
  def test_hand_computed(self, kind, estimates):
    log_probs = jnp.array([[-1.0, -0.5, -0.2, 0.0]])
    ref_log_probs = jnp.array([[-1.2, -0.4, -0.5, 1.0]])
    mask = jnp.array([[True, True, True, False]])
    penalty = self.variant(
      functools.partial(rewards.kl_penalty, kl_coef=0.05, kind=kind)
    )(log_probs, ref_log_probs, mask)
    expected = [[-0.05 * e for e in estimates] + [0.0]]
    np.testing.assert_allclose(penalty, expected, atol=1e-7)

  @_jit_and_not
  def test_shaped_reward_then_gae(self):
    log_probs = jnp.array([[-1.0, -0.5, -0.2, 0.0]])
    ref_log_probs = jnp.array([[-1.2, -0.4, -0.5, 0.0]])
    values = jnp.array([[0.5, 0.4, 0.3, 0.2]])
    mask = jnp.array([[True, True, True, False]])

    def shape_and_estimate(log_probs, ref_log_probs, values, mask):
      shaped = rewards.place_score(jnp.ones(1), mask) + rewards.kl_penalty(
        log_probs, ref_log_probs, mask, kl_coef=0.05
      )
      return shaped, *advantages.gae(
        shaped, values, mask, discount=1.0, gae_lambda=0.95
      )

    shaped, advantage, ret = self.variant(shape_and_estimate)(
      log_probs, ref_log_probs, values, mask
    )
    np.testing.assert_allclose(shaped, [[-0.01, 0.005, 0.985, 0]], atol=1e-6)
    np.testing.assert_allclose(
      advantage, [[0.4179625, 0.55575, 0.685, 0]], atol=1e-6
    )
    np.testing.assert_allclose(ret, [[0.9179625, 0.95575, 0.985, 0]], atol=1e-6)

  @hypothesis.given(
    seed=_SEEDS,
    kl_coef=st.floats(0.0, 2.0),
    kind=st.sampled_from(["k1", "k2", "k3"]),
  )
  def test_matches_oracle(self, seed, kl_coef, kind):
    log_probs, ref_log_probs, mask = _batch(seed)
    expected = oracles.kl_penalty(log_probs, ref_log_probs, mask, kl_coef, kind)
    # Also with a coefficient that is an array, and NaN where masked.
    penalty = rewards.kl_penalty(
      jnp.float32(np.where(mask, log_probs, np.nan)),
      jnp.float32(np.where(mask, ref_log_probs, -np.inf)),
      mask,
      kl_coef=jnp.float32(kl_coef),
      kind=kind,
    )
    np.testing.assert_allclose(penalty, expected, rtol=1e-4, atol=1e-6)

  @parameterized.parameters("k1", "k2", "k3")
  def test_identical_policies_cost_nothing(self, kind):
    log_probs, _, mask = _batch(0)
    log_probs = jnp.float32(log_probs)
    penalty = rewards.kl_penalty(
      log_probs, log_probs, mask, kl_coef=0.2, kind=kind
    )
    np.testing.assert_array_equal(penalty, np.zeros(mask.shape))

  def test_k1_sums_to_the_sequence_log_ratio(self):
    log_probs, ref_log_probs, mask = _batch(1)
    penalty = rewards.kl_penalty(
      jnp.float32(log_probs), jnp.float32(ref_log_probs), mask, kl_coef=1.0
    )
    expected = np.where(mask, ref_log_probs - log_probs, 0.0).sum(1)
    np.testing.assert_allclose(jnp.sum(penalty, 1), expected, atol=1e-6)

  @parameterized.parameters("k1", "k2", "k3")
  def test_no_gradient(self, kind):
    log_probs, ref_log_probs, mask = _batch(2)

    def total(log_probs, ref_log_probs, kl_coef):
      return jnp.sum(
        rewards.kl_penalty(
          log_probs, ref_log_probs, mask, kl_coef=kl_coef, kind=kind
        )
      )

    grads = jax.grad(total, argnums=(0, 1, 2))(
      jnp.float32(log_probs), jnp.float32(ref_log_probs), jnp.float32(0.3)
    )
    chex.assert_trees_all_equal(grads, jax.tree.map(jnp.zeros_like, grads))

  def test_bad_input(self):
    x, mask = jnp.zeros((2, 3)), jnp.ones((2, 3), bool)
    with self.assertRaisesRegex(ValueError, "k1, k2, k3"):
      rewards.kl_penalty(x, x, mask, kl_coef=0.1, kind="k4")
    with self.assertRaises(AssertionError):
      rewards.kl_penalty(x, x[:1], mask, kl_coef=0.1)
    with self.assertRaises(AssertionError):
      rewards.kl_penalty(x, x, x, kl_coef=0.1)
    with self.assertRaises(AssertionError):
      rewards.kl_penalty(x, x, mask, kl_coef=jnp.ones(2))


class AdaptiveKLTest(parameterized.TestCase):
  @_jit_and_not
  def test_sequence_of_batches(self):
    # n = 64: errors -0.2 (clipped), +0.2 (clipped), 1/12, +0.2 (clipped), so
    # β: .15 * (1 - .00128), then * (1 + .00128), * (1 + .0064 / 12), ...
    update = self.variant(
      lambda controller, kl: controller.update(
        kl, 64, target=6.0, horizon=10_000
      )
    )
    controller = rewards.AdaptiveKL.create(0.15)
    for kl, expected in (
      (3.0, 0.149808),
      (12.0, 0.149999754),
      (6.5, 0.150079754),
      (60.0, 0.150271856),
    ):
      controller = update(controller, jnp.float32(kl))
      self.assertEqual(controller.coef.dtype, jnp.float32)
      self.assertEqual(controller.coef.shape, ())
      np.testing.assert_allclose(controller.coef, expected, rtol=3e-7)

  @chex.variants(with_jit=True, without_jit=True)
  @parameterized.parameters((0.0, 0.199488), (12.0, 0.200512), (6.0, 0.2))
  def test_one_batch(self, kl, expected):
    # 128 samples, error at most 0.2: a factor of 1 ± 0.00256.
    update = self.variant(
      lambda controller, kl, num_samples: controller.update(
        kl, num_samples, target=6.0, horizon=10_000.0
      )
    )
    before = rewards.AdaptiveKL.create(0.2)
    after = update(before, jnp.float32(kl), jnp.int32(128))
    np.testing.assert_allclose(after.coef, expected, rtol=3e-7)
    np.testing.assert_allclose(before.coef, 0.2, rtol=1e-7)

  @hypothesis.given(
    coef=st.floats(1e-3, 1.0),
    kl=st.floats(-5.0, 50.0),
    num_samples=st.integers(1, 512),
    target=st.floats(0.1, 10.0),
    horizon=st.floats(1e3, 1e5),
  )
  def test_matches_oracle(self, coef, kl, num_samples, target, horizon):
    controller = rewards.AdaptiveKL.create(coef).update(
      kl, num_samples, target=target, horizon=horizon
    )
    expected = oracles.adaptive_kl(coef, kl, num_samples, target, horizon)
    np.testing.assert_allclose(controller.coef, expected, rtol=1e-6)

  def test_is_a_pytree_of_arrays(self):
    leaves = jax.tree.leaves(rewards.AdaptiveKL.create(0.2))
    self.assertLen(leaves, 2)
    for leaf in leaves:
      self.assertIsInstance(leaf, jax.Array)

  @parameterized.parameters(
    # Of 64, 320 and 2048 responses: 1 - 0.2 n / 100, but 0.01 at least.
    (64, 0.2 * 0.872),
    (320, 0.2 * 0.36),
    (500, 0.2 * 0.01),
    (1025, 0.2 * 0.01),
  )
  def test_is_never_negative(self, num_samples, expected):
    update = functools.partial(
      rewards.AdaptiveKL.update,
      num_samples=num_samples,
      target=6.0,
      horizon=100.0,
    )
    controller = update(rewards.AdaptiveKL.create(0.2), 0.0)
    np.testing.assert_allclose(controller.coef, expected, rtol=1e-5)
    self.assertGreater(update(controller, 60.0).coef, controller.coef)

  @_jit_and_not
  @parameterized.parameters(np.nan, np.inf, -np.inf)
  def test_a_kl_that_is_not_finite_is_ignored_and_counted(self, kl):
    update = self.variant(
      lambda controller, kl: controller.update(kl, 8, target=6.0, horizon=50.0)
    )
    before = rewards.AdaptiveKL.create(0.2)
    after = update(update(before, jnp.float32(kl)), jnp.float32(kl))
    self.assertEqual(float(after.coef), float(before.coef))
    self.assertEqual(int(after.num_ignored), 2)
    # The next one counts as ever: 0.2 (1 + 0.2 * 8 / 50).
    after = update(after, jnp.float32(60.0))
    np.testing.assert_allclose(after.coef, 0.2064, rtol=1e-5)
    self.assertEqual(int(after.num_ignored), 2)

  def test_no_gradient_from_the_kl(self):
    controller = rewards.AdaptiveKL.create(0.2)
    grad = jax.grad(
      lambda kl: controller.update(kl, 8, target=6.0, horizon=100.0).coef
    )(6.1)
    self.assertEqual(float(grad), 0.0)

  def test_bad_input(self):
    with self.assertRaisesRegex(ValueError, "coef must not be negative"):
      rewards.AdaptiveKL.create(-0.1)
    controller = rewards.AdaptiveKL.create(0.1)
    with self.assertRaisesRegex(ValueError, "target must be positive, got 0"):
      controller.update(1.0, 8, target=0.0, horizon=10.0)
    with self.assertRaisesRegex(ValueError, "horizon must be positive, got -1"):
      controller.update(1.0, 8, target=1.0, horizon=-1.0)
    with self.assertRaises(AssertionError):
      controller.update(jnp.ones(3), 8, target=1.0, horizon=10.0)
