"""Tests of advantages and returns."""

import functools

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized
from hypothesis import strategies as st

from rljax.ops import advantages, masking
from tests import oracles

_SEEDS = st.integers(0, 2**32 - 1)
_UNIT = st.floats(0.0, 1.0)
_jitted_gae = jax.jit(
  functools.partial(advantages.gae, discount=0.97, gae_lambda=0.9)
)


def _batch(seed, shape=(4, 6)):
  """Random rewards, values and masks with holes; float64 and bool numpy."""
  rng = np.random.default_rng(seed)
  return rng.normal(size=shape), rng.normal(size=shape), rng.random(shape) < 0.7


class GAETest(parameterized.TestCase):
  @chex.variants(with_jit=True, without_jit=True)
  @parameterized.parameters(
    (1.0, 0.95, [0.43675, 0.565, 0.7, 0], [0.93675, 0.965, 1, 0]),
    (0.99, 0.95, [0.418307, 0.55535, 0.7, 0], [0.918307, 0.95535, 1, 0]),
    (1.0, 1.0, [0.5, 0.6, 0.7, 0], [1, 1, 1, 0]),
    (1.0, 0.0, [-0.1, -0.1, 0.7, 0], [0.4, 0.3, 1, 0]),
  )
  def test_hand_computed(self, discount, gae_lambda, advantage, ret):
    # The last column is padding. With its value leaking into the third the
    # first case would read 0.445775, 0.5745, 0.71, -0.2.
    # δ = (.4 - .5, .3 - .4, 1 - .3) for γ = 1, so
    # A_2 = -.1 + .95 * .7 = .565 and A_1 = -.1 + .95 * .565 = .43675.
    rewards = jnp.array([[0.0, 0.0, 1.0, 0.0]])
    values = jnp.array([[0.5, 0.4, 0.3, 0.2]])
    mask = jnp.array([[True, True, True, False]])
    gae = self.variant(
      functools.partial(
        advantages.gae, discount=discount, gae_lambda=gae_lambda
      )
    )
    actual = gae(rewards, values, mask)
    np.testing.assert_allclose(actual[0], [advantage], atol=1e-6)
    np.testing.assert_allclose(actual[1], [ret], atol=1e-6)

  @chex.variants(with_jit=True, without_jit=True)
  def test_constant_values(self):
    # δ = (0, 0, .5): A = (.95² * .5, .95 * .5, .5).
    gae = self.variant(
      functools.partial(advantages.gae, discount=1.0, gae_lambda=0.95)
    )
    advantage, ret = gae(
      jnp.array([[0.0, 0.0, 1.0]]),
      jnp.full((1, 3), 0.5),
      jnp.ones((1, 3), bool),
    )
    np.testing.assert_allclose(advantage, [[0.45125, 0.475, 0.5]], atol=1e-6)
    np.testing.assert_allclose(ret, [[0.95125, 0.975, 1.0]], atol=1e-6)

  @chex.variants(with_jit=True, without_jit=True)
  def test_one_token_responses_are_a_bandit(self):
    # A = R - v and G = R whatever γ and λ; whitened with v = 0,
    # (±1/2) / sqrt(1/3) = ±0.866025.
    gae = self.variant(
      functools.partial(advantages.gae, discount=0.9, gae_lambda=0.3)
    )
    rewards = jnp.array([[1.0], [0.0], [0.0], [1.0]])
    mask = jnp.ones((4, 1), bool)
    advantage, ret = gae(rewards, jnp.zeros((4, 1)), mask)
    np.testing.assert_allclose(
      masking.masked_whiten(advantage, mask)[:, 0],
      [0.866025, -0.866025, -0.866025, 0.866025],
      atol=1e-5,
    )
    values = jnp.array([[0.3], [-0.2], [0.1], [2.0]])
    advantage, ret = gae(rewards, values, mask)
    np.testing.assert_allclose(advantage, rewards - values, rtol=1e-6)
    np.testing.assert_allclose(ret, rewards, atol=1e-6)

  def test_interior_mask_is_stepped_over(self):
    # A hole in the middle is as if its column did not exist.
    gae = functools.partial(advantages.gae, discount=0.9, gae_lambda=0.8)
    mask = jnp.array([[True, False, False, True, True]])
    rewards = jnp.array([[1.0, 5.0, jnp.nan, 2.0, 3.0]])
    values = jnp.array([[0.1, 7.0, jnp.nan, 0.2, 0.3]])
    actual = gae(rewards, values, mask)
    kept = jnp.array([0, 3, 4])
    expected = gae(rewards[:, kept], values[:, kept], jnp.ones((1, 3), bool))
    for a, e in zip(actual, expected, strict=True):
      np.testing.assert_allclose(a[:, kept], e, rtol=1e-6)
      np.testing.assert_array_equal(a[:, 1:3], 0.0)

  @hypothesis.given(seed=_SEEDS, discount=_UNIT, gae_lambda=_UNIT)
  def test_matches_oracle(self, seed, discount, gae_lambda):
    rewards, values, mask = _batch(seed)
    actual = advantages.gae(
      jnp.float32(rewards),
      jnp.float32(values),
      mask,
      discount=discount,
      gae_lambda=gae_lambda,
    )
    expected = oracles.gae(rewards, values, mask, discount, gae_lambda)
    np.testing.assert_allclose(actual[0], expected[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(actual[1], expected[1], rtol=1e-4, atol=1e-5)

  @hypothesis.given(seed=_SEEDS, discount=st.sampled_from([0.0, 0.9, 1.0]))
  def test_lambda_one_is_monte_carlo(self, seed, discount):
    rewards, values, mask = _batch(seed)
    rewards, values = jnp.float32(rewards), jnp.float32(values)
    advantage, ret = advantages.gae(
      rewards, values, mask, discount=discount, gae_lambda=1.0
    )
    expected = advantages.returns_to_go(rewards, mask, discount=discount)
    np.testing.assert_allclose(ret, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
      advantage,
      np.where(mask, expected - values, 0.0),
      rtol=1e-4,
      atol=1e-5,
    )

  @hypothesis.given(seed=_SEEDS)
  def test_padding_and_order_are_inert(self, seed):
    rewards, values, mask = _batch(seed)
    rewards, values = jnp.float32(rewards), jnp.float32(values)
    expected = _jitted_gae(rewards, values, mask)

    def poison(x):
      return jnp.where(mask, x, jnp.nan)

    order = np.random.default_rng(seed).permutation(rewards.shape[0])
    poisoned = _jitted_gae(poison(rewards), poison(values), mask)
    permuted = _jitted_gae(rewards[order], values[order], mask[order])
    for e, n, p in zip(expected, poisoned, permuted, strict=True):
      np.testing.assert_array_equal(n, e)
      np.testing.assert_array_equal(np.asarray(n)[~mask], 0.0)
      np.testing.assert_allclose(p, e[order], rtol=1e-6, atol=1e-7)

  @parameterized.parameters(0, 1)
  def test_no_gradient(self, argnum):
    rewards, values, mask = _batch(0)
    arrays = [jnp.float32(rewards), jnp.float32(values)]

    def total(x):
      args = list(arrays)
      args[argnum] = x
      results = advantages.gae(*args, mask, discount=1.0, gae_lambda=0.95)
      return sum(jnp.sum(r) for r in results)

    grad = jax.grad(total)(arrays[argnum])
    np.testing.assert_array_equal(grad, np.zeros_like(grad))

  def test_float32_inside(self):
    # 0.5 + 1000 bfloat16 additions of 1/8 would stop at 32.
    rewards = jnp.full((1, 1000), 0.125, jnp.bfloat16)
    _, ret = advantages.gae(
      rewards,
      jnp.zeros_like(rewards),
      jnp.ones(rewards.shape, bool),
      discount=1.0,
      gae_lambda=1.0,
    )
    self.assertEqual(ret.dtype, jnp.float32)
    np.testing.assert_allclose(ret[0, 0], 125.0)

  def test_inside_shard_map(self):
    rewards, values, mask = _batch(1, (8, 5))
    rewards, values = jnp.float32(rewards), jnp.float32(values)
    gae = functools.partial(advantages.gae, discount=0.9, gae_lambda=0.8)
    mesh = jax.make_mesh(
      (8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)
    )
    rows = jax.sharding.PartitionSpec("data")
    sharded = jax.shard_map(gae, mesh=mesh, in_specs=rows, out_specs=rows)
    for a, e in zip(
      sharded(rewards, values, jnp.array(mask)),
      gae(rewards, values, mask),
      strict=True,
    ):
      np.testing.assert_allclose(a, e, rtol=1e-6, atol=1e-7)

  def test_bad_input(self):
    x, mask = jnp.zeros((2, 3)), jnp.ones((2, 3), bool)
    with self.assertRaisesRegex(
      ValueError, r"discount must lie in \[0, 1\], got 1.5"
    ):
      advantages.gae(x, x, mask, discount=1.5, gae_lambda=0.9)
    with self.assertRaisesRegex(
      ValueError, r"gae_lambda must lie in \[0, 1\], got -0.1"
    ):
      advantages.gae(x, x, mask, discount=1.0, gae_lambda=-0.1)
    with self.assertRaises(AssertionError):
      advantages.gae(x, x[:, :2], mask, discount=1.0, gae_lambda=0.9)
    with self.assertRaises(AssertionError):
      advantages.gae(x, x, x, discount=1.0, gae_lambda=0.9)


class ReturnsToGoTest(parameterized.TestCase):
  @chex.variants(with_jit=True, without_jit=True)
  def test_hand_computed(self):
    # γ = 1/2: 4; 2 + 4/2 = 4; the hole is free; 1 + 4/2 = 3.
    returns_to_go = self.variant(
      functools.partial(advantages.returns_to_go, discount=0.5)
    )
    returns = returns_to_go(
      jnp.array([[1.0, 9.0, 2.0, 4.0, 9.0]]),
      jnp.array([[True, False, True, True, False]]),
    )
    np.testing.assert_allclose(returns, [[3.0, 0.0, 4.0, 4.0, 0.0]])

  @chex.variants(with_jit=True, without_jit=True)
  def test_reinforce_plus_plus_advantages(self):
    # Score 1 on the third token, β = .05, k1 = (.2, -.1, .3).
    returns_to_go = self.variant(
      functools.partial(advantages.returns_to_go, discount=1.0)
    )
    returns = returns_to_go(
      jnp.array([[-0.01, 0.005, 0.985, 0.0]]),
      jnp.array([[True, True, True, False]]),
    )
    np.testing.assert_allclose(returns, [[0.98, 0.99, 0.985, 0.0]], atol=1e-6)

  @hypothesis.given(seed=_SEEDS, discount=_UNIT)
  def test_matches_oracle(self, seed, discount):
    rewards, _, mask = _batch(seed)
    poisoned = np.where(mask, rewards, np.nan)
    returns = advantages.returns_to_go(
      jnp.float32(poisoned), mask, discount=discount
    )
    expected = oracles.returns_to_go(rewards, mask, discount)
    np.testing.assert_allclose(returns, expected, rtol=1e-4, atol=1e-5)

  def test_no_gradient(self):
    mask = jnp.ones((2, 3), bool)
    grad = jax.grad(
      lambda x: jnp.sum(advantages.returns_to_go(x, mask, discount=1.0))
    )(jnp.ones((2, 3)))
    np.testing.assert_array_equal(grad, np.zeros((2, 3)))

  def test_bad_input(self):
    with self.assertRaisesRegex(
      ValueError, r"discount must lie in \[0, 1\], got -1"
    ):
      advantages.returns_to_go(
        jnp.zeros((2, 3)), jnp.ones((2, 3), bool), discount=-1.0
      )
