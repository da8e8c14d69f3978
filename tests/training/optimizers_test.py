"""Tests of optimizers: learning rates and steps against numbers by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import absltest, parameterized

from rljax.training import optimizers


def _rates(num_updates, **settings):
  """The learning rates of all updates."""
  schedule = optimizers.schedule(num_updates, **settings)
  return [float(schedule(update)) for update in range(num_updates)]


class WarmupTest(parameterized.TestCase):
  @parameterized.parameters(
    (0.0, 40, 0),
    (1.0, 40, 1),
    (7.0, 40, 7),
    (7.9, 40, 7),
    (60.0, 40, 60),
    (0.1, 40, 4),
    (0.5, 7, 3),
    # A share that is not 0 is one update at least.
    (0.001, 40, 1),
    (0.999, 10, 9),
  )
  def test_updates(self, warmup, num_updates, expected):
    self.assertEqual(optimizers.warmup_updates(warmup, num_updates), expected)


class ScheduleTest(parameterized.TestCase):
  def test_constant(self):
    self.assertEqual(_rates(3, learning_rate=0.5), [0.5, 0.5, 0.5])

  @parameterized.parameters(4, 0.5)
  def test_constant_after_a_warmup(self, warmup):
    # From 0 by a quarter of 0.8 an update, and then 0.8.
    rates = _rates(8, learning_rate=0.8, warmup=warmup)
    np.testing.assert_allclose(
      rates, [0.0, 0.2, 0.4, 0.6, 0.8, 0.8, 0.8, 0.8], rtol=1e-6
    )

  def test_constant_has_no_final_rate(self):
    rates = _rates(4, learning_rate=0.8, final_learning_rate=0.1)
    np.testing.assert_allclose(rates, 0.8, rtol=1e-6)

  def test_linear(self):
    # 0.8 less 0.2 an update: 0 would be that of a fifth update.
    rates = _rates(4, learning_rate=0.8, kind="linear")
    np.testing.assert_allclose(rates, [0.8, 0.6, 0.4, 0.2], rtol=1e-6)

  def test_linear_after_a_warmup(self):
    # Two updates up, then over four from 0.8 to 0.4.
    rates = _rates(
      6, learning_rate=0.8, kind="linear", warmup=2, final_learning_rate=0.4
    )
    np.testing.assert_allclose(rates, [0.0, 0.4, 0.8, 0.7, 0.6, 0.5], rtol=1e-6)

  def test_cosine(self):
    # 0.2 + (1 - 0.2) (1 + cos(π n / 4)) / 2.
    half = math.sqrt(0.5)
    expected = [1.0, 0.6 + 0.4 * half, 0.6, 0.6 - 0.4 * half]
    rates = _rates(4, learning_rate=1.0, kind="cosine", final_learning_rate=0.2)
    np.testing.assert_allclose(rates, expected, rtol=1e-6)

  def test_cosine_after_a_warmup(self):
    half = math.sqrt(0.5)
    expected = [0.0, 0.5, 1.0, 0.5 + 0.5 * half, 0.5, 0.5 - 0.5 * half]
    rates = _rates(6, learning_rate=1.0, kind="cosine", warmup=2)
    np.testing.assert_allclose(rates, expected, rtol=1e-6)

  @parameterized.parameters(*optimizers.SCHEDULES)
  def test_stays_where_it_ends(self, kind):
    settings = {"learning_rate": 1.0, "kind": kind, "warmup": 0.25}
    schedule = optimizers.schedule(8, final_learning_rate=0.5, **settings)
    last = 1.0 if kind == "constant" else 0.5
    for update in (8, 9, 100):
      np.testing.assert_allclose(schedule(update), last, rtol=1e-6)

  @parameterized.parameters(*optimizers.SCHEDULES)
  def test_a_warmup_may_be_longer_than_the_run(self, kind):
    rates = _rates(3, learning_rate=1.0, kind=kind, warmup=10)
    np.testing.assert_allclose(rates, [0.0, 0.1, 0.2], rtol=1e-6)

  def test_unknown(self):
    with self.assertRaisesRegex(
      ValueError, "one of constant, linear, cosine, got 'step'"
    ):
      optimizers.schedule(3, learning_rate=0.1, kind="step")


class AdamWTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    # optax raises decays to the power of an integer.
    self.enter_context(jax.numpy_dtype_promotion("standard"))

  def updates(self, grads, params=None, num_updates=10, **settings):
    """The updates that follow gradients, one after the other."""
    transform = optimizers.make(num_updates, **settings)
    params = jnp.zeros(2) if params is None else params
    state, found = transform.init(params), []
    for grad in grads:
      update, state = transform.update(jnp.float32(grad), state, params)
      params = optax.apply_updates(params, update)
      found.append(update)
    return np.stack(found)

  def test_two_steps(self):
    # m = 0.5 (g1 / 2 + g2), v = 0.25 (0.75 g1² + g2²); corrected by 1 - β^n:
    # n = 1: m = g1, v = g1². n = 2: m / 0.75, v / (1 - 0.75²).
    settings = {"b1": 0.5, "b2": 0.75, "epsilon": 0.5, "learning_rate": 0.1}
    found = self.updates([[1.0, -2.0], [3.0, 0.0]], **settings)
    np.testing.assert_allclose(
      found[0], [-0.1 * 1 / (1 + 0.5), 0.1 * 2 / (2 + 0.5)], rtol=1e-5
    )
    means = np.array([0.5 * (0.5 + 3.0), 0.5 * -1.0]) / 0.75
    squares = 0.25 * np.array([0.75 + 9.0, 0.75 * 4.0]) / (1 - 0.75**2)
    np.testing.assert_allclose(
      found[1], -0.1 * means / (np.sqrt(squares) + 0.5), rtol=1e-5
    )

  def test_clips_by_the_norm_of_all(self):
    # (3, 4) has the norm 5: cut to 1 it is (0.6, 0.8), cut to 6 it stays.
    settings = {"b1": 0.0, "b2": 0.0, "epsilon": 1.0, "learning_rate": 1.0}
    for max_grad_norm, grad in ((1.0, [0.6, 0.8]), (6.0, [3, 4]), (0, [3, 4])):
      grad = np.array(grad)
      (found,) = self.updates(
        [[3.0, 4.0]], max_grad_norm=max_grad_norm, **settings
      )
      np.testing.assert_allclose(found, -grad / (grad + 1.0), rtol=1e-5)

  def test_weight_decay_is_decoupled(self):
    # Of a gradient of 0 nothing is left but -η λ w.
    (found,) = self.updates(
      [[0.0, 0.0]],
      params=jnp.array([2.0, -4.0]),
      learning_rate=0.1,
      weight_decay=0.5,
    )
    np.testing.assert_allclose(found, [-0.1, 0.2], rtol=1e-6)

  def test_follows_the_schedule(self):
    # A constant gradient: every step is the learning rate, but for ε.
    found = self.updates(
      [[1.0, 1.0]] * 4,
      num_updates=4,
      learning_rate=0.8,
      kind="linear",
      warmup=0.25,
      epsilon=0.0,
    )
    np.testing.assert_allclose(
      found[:, 0], [0.0, -0.8, -0.8 * 2 / 3, -0.8 / 3], rtol=1e-5, atol=1e-7
    )

  def test_unknown_optimizer(self):
    with self.assertRaisesRegex(ValueError, "adafactor, muon, got 'lion'"):
      optimizers.make(3, name="lion", learning_rate=0.1)

  def test_unknown_schedule(self):
    with self.assertRaisesRegex(ValueError, "schedule must be one of"):
      optimizers.make(3, learning_rate=0.1, kind="step")


class AdafactorTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.enter_context(jax.numpy_dtype_promotion("standard"))
    # A product of a column and a row: its factors hold all of its square.
    column, row = np.arange(1.0, 129.0)[:, None], np.arange(2.0, 130.0)[None]
    self.grads = {"kernel": jnp.float32(column * -row), "bias": jnp.ones(4)}
    self.params = jax.tree.map(lambda x: 2 * jnp.ones_like(x), self.grads)

  def updates(self, **settings):
    transform = optimizers.make(
      10, name="adafactor", learning_rate=0.1, **settings
    )
    state = transform.init(self.params)
    return transform.update(self.grads, state, self.params)

  def test_first_step(self):
    # At the first step the moments are those of the gradient itself, so that
    # it is its sign, whose root mean square is 1: nothing is clipped.
    updates, state = self.updates()
    np.testing.assert_allclose(updates["kernel"], 0.1, rtol=1e-4)
    np.testing.assert_allclose(updates["bias"], -0.1, rtol=1e-4)
    sizes = [x.size for x in jax.tree.leaves(state.inner)]
    # Of the matrix a row and a column; all of the bias, and scalars.
    self.assertLess(sum(sizes), 128 + 128 + 4 + 10)

  def test_weight_decay_is_decoupled(self):
    updates, _ = self.updates(weight_decay=0.5)
    np.testing.assert_allclose(
      updates["kernel"], 0.1 - 0.1 * 0.5 * 2.0, atol=1e-5
    )


class MuonTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.enter_context(jax.numpy_dtype_promotion("standard"))

  def first_step(self, params):
    transform = optimizers.make(10, name="muon", learning_rate=0.1)
    keys = jax.random.split(jax.random.key(0), 4)
    grads = jax.tree.unflatten(
      jax.tree.structure(params),
      [
        jax.random.normal(key, x.shape)
        for key, x in zip(keys, jax.tree.leaves(params), strict=False)
      ],
    )
    return transform.update(grads, transform.init(params), params), grads

  @parameterized.parameters(
    ((16, 24),), ((24, 16),), ((3, 16, 24),), ((3, 24, 16),)
  )
  def test_matrices_of_blocks_become_orthogonal(self, shape):
    params = {"policy": {"layers_0": {"mlp": {"kernel": jnp.zeros(shape)}}}}
    (updates, state), grads = self.first_step(params)
    found = jax.tree.leaves(updates)[0]
    singular = np.linalg.svd(found, compute_uv=False)
    # Five iterations leave the singular values between 0.7 and 1.2, times the
    # learning rate and 0.2 sqrt(24); the root mean square is 0.02.
    scale = 0.1 * 0.2 * np.sqrt(24)
    self.assertTrue((singular > 0.6 * scale).all(), singular / scale)
    self.assertTrue((singular < 1.3 * scale).all(), singular / scale)
    # Against the gradient.
    self.assertLess((found * jax.tree.leaves(grads)[0]).sum(), 0)
    # One moment; counts aside.
    sizes = sum(x.size for x in jax.tree.leaves(state.inner))
    self.assertLess(sizes, np.prod(shape) + 10)

  def test_the_rest_takes_adamw(self):
    params = {
      "embed_tokens": {"embedding": jnp.zeros((8, 4))},
      "layers_0": {"norm": {"scale": jnp.ones(4)}},
      "lm_head": {"kernel": jnp.zeros((4, 8))},
      "value": {"kernel": jnp.zeros((4, 1))},
    }
    (updates, _), grads = self.first_step(params)
    # The first step of Adam is the sign of the gradient.
    for update, grad in zip(
      jax.tree.leaves(updates), jax.tree.leaves(grads), strict=True
    ):
      np.testing.assert_allclose(update, -0.1 * np.sign(grad), rtol=1e-4)


if __name__ == "__main__":
  absltest.main()
