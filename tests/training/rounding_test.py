"""Tests of numbers that are kept in bfloat16."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import absltest, parameterized

from rljax.training import optimizers, rounding


class StochasticallyTest(parameterized.TestCase):
  @parameterized.parameters(1.0, -3.5, 0.0, -0.0, 2.0**-130, 3.3895314e38)
  def test_a_bfloat16_stays(self, number):
    x = jnp.full(64, number, jnp.bfloat16)
    found = rounding.stochastically(x.astype(jnp.float32), jnp.uint32(0))
    np.testing.assert_array_equal(
      np.asarray(found).view(np.uint16), np.asarray(x).view(np.uint16)
    )

  @parameterized.parameters(1.001, -1.001, 3e-5, -1e-39, 0.00390626)
  def test_one_of_two_neighbours_with_the_right_mean(self, number):
    x = np.full(20_000, number, np.float32)
    found = np.asarray(
      rounding.stochastically(jnp.asarray(x), jnp.uint32(7)), np.float32
    )
    towards_zero = (x.view(np.uint32) & 0xFFFF0000).view(np.float32)[0]
    away = ((x.view(np.uint32) & 0xFFFF0000) + 0x10000).view(np.float32)[0]
    self.assertContainsSubset(set(found.tolist()), {towards_zero, away})
    # The share of those away from 0: a standard error is at most 0.0036.
    share = (x[0] - towards_zero) / (away - towards_zero)
    self.assertAlmostEqual((found == away).mean(), share, delta=0.016)

  def test_draws_of_places_and_seeds_are_independent(self):
    x = jnp.full((64, 256), 1 + 2.0**-8)  # Half way between two.
    draw = lambda seed: rounding.stochastically(x, jnp.uint32(seed))
    found = np.stack([draw(seed) for seed in range(8)]).astype(np.float32) > 1
    # Of 2^14 pairs half agree; a standard error is 0.004.
    pairs = [(found[i], found[j]) for i in range(8) for j in range(i)]
    pairs += [(one[1:], one[:-1]) for one in found]
    pairs += [(one[:, 1:], one[:, :-1]) for one in found]
    for a, b in pairs:
      self.assertAlmostEqual((a == b).mean(), 0.5, delta=0.02)


class StoredTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.enter_context(jax.numpy_dtype_promotion("standard"))
    keys = jax.random.split(jax.random.key(0), 2)
    self.params = {
      "kernel": jax.random.normal(keys[0], (32, 16)),
      "scale": jnp.ones(16),
    }
    self.grads = {
      "kernel": jax.random.normal(keys[1], (32, 16)),
      "scale": jnp.full(16, 0.5),
    }

  def test_float32_is_the_optimizer_itself(self):
    plain = optax.adamw(0.1, weight_decay=0.01)
    found = rounding.stored(plain, jnp.float32)
    expected, state = plain.update(
      self.grads, plain.init(self.params), self.params
    )
    updates, new = found.update(
      self.grads, found.init(self.params), self.params
    )
    jax.tree.map(np.testing.assert_array_equal, updates, expected)
    jax.tree.map(np.testing.assert_array_equal, new, state)

  def test_moments_of_matrices_are_small(self):
    transform = rounding.stored(optax.adamw(0.1), jnp.bfloat16)
    state = transform.init(self.params)
    update = jax.jit(transform.update)
    for _ in range(3):
      updates, state = update(self.grads, state, self.params)
    for moment in (state[0].mu, state[0].nu):
      self.assertEqual(moment["kernel"].dtype, jnp.bfloat16)
      self.assertEqual(moment["scale"].dtype, jnp.float32)
    self.assertEqual(updates["kernel"].dtype, jnp.float32)
    # A gradient that stays the same has itself and its square as moments: a
    # step is the learning rate, up to a step of bfloat16.
    np.testing.assert_allclose(np.abs(updates["kernel"]), 0.1, rtol=0.01)

  def test_a_second_moment_falls(self):
    # By a thousandth an update: 1 - e^-1 of it are gone after 1,000. Rounded to
    # the nearest, it would stay 1.
    transform = rounding.stored(optax.scale_by_adam(), jnp.bfloat16)
    state = transform.init(self.params)
    ones = jnp.ones_like(self.params["kernel"], jnp.bfloat16)
    state = state._replace(nu=state.nu | {"kernel": ones})
    grads = jax.tree.map(lambda x: 1e-4 * x, self.grads)

    def body(state, size):
      scaled = jax.tree.map(lambda x: size * x, grads)
      return transform.update(scaled, state, self.params)[1], None

    sizes = jnp.linspace(1.0, 2.0, 1000)
    state, _ = jax.jit(lambda s: jax.lax.scan(body, s, sizes))(state)
    mean = np.asarray(state.nu["kernel"], np.float32).mean()
    self.assertAlmostEqual(mean, np.exp(-1.0), delta=0.01)

  def test_parameters_move_by_less_than_their_step(self):
    # 1 + 2^-9 has no bfloat16: of 512 parameters a quarter moves by 2^-7.
    params = {"kernel": jnp.ones((32, 16), jnp.bfloat16)}
    grads = {"kernel": jnp.full((32, 16), -1.0, jnp.bfloat16)}
    transform = optimizers.guarded(
      rounding.stored(optax.sgd(2.0**-9), jnp.float32)
    )
    new, _ = transform.apply(grads, transform.init(params), params)
    self.assertEqual(new["kernel"].dtype, jnp.bfloat16)
    found = np.asarray(new["kernel"], np.float32)
    self.assertEqual(set(found.flat), {1.0, 1.0078125})
    self.assertAlmostEqual((found > 1).mean(), 0.25, delta=0.08)
    again, _ = transform.apply(grads, transform.init(params), params)
    np.testing.assert_array_equal(again["kernel"], new["kernel"])
    # Other gradients draw others.
    other = jax.tree.map(lambda x: x.at[0, 0].set(-1.0625), grads)
    other, _ = transform.apply(other, transform.init(params), params)
    differ = np.asarray(other["kernel"]) != np.asarray(new["kernel"])
    self.assertGreater(differ.mean(), 0.1)


if __name__ == "__main__":
  absltest.main()
