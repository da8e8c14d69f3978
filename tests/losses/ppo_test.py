"""Tests of the clipped policy and value losses."""

import functools
import math

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized
from hypothesis import strategies as st

from rljax.losses import ppo
from tests import oracles

_SEEDS = st.integers(0, 2**32 - 1)
_NORMALIZERS = ("token_mean", "sequence_mean", "constant")

# The worked example: two responses, of which the second has two tokens.
_OLD_LOG_PROBS = np.float32([[-1.0, -0.7, -0.3], [-2.0, -1.5, -0.1]])
_LOG_PROBS = np.float32([[-0.8, -0.9, -0.3], [-1.5, -1.9, -0.05]])
_ADVANTAGES = np.float32([[1.0, 1.0, -1.0], [0.5, -2.0, 0.3]])
_OLD_VALUES = np.float32([[0.5, 0.4, 0.3], [0.1, 0.0, -0.2]])
_VALUES = np.float32([[0.9, 0.35, 0.3], [-0.3, 0.15, 0.4]])
_RETURNS = np.float32([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
_MASK = np.array([[True, True, True], [True, True, False]])


def _policy_batch(seed, shape=(8, 5)):
  """Log-probabilities, old ones, advantages and a mask with an empty row."""
  rng = np.random.default_rng(seed)
  old_log_probs = -rng.exponential(size=shape)
  log_probs = old_log_probs + rng.normal(0.0, 0.3, size=shape)
  mask = rng.random(shape) < 0.7
  mask[rng.integers(shape[0])] = False
  return log_probs, old_log_probs, rng.normal(size=shape), mask


def _value_batch(seed, shape=(8, 5)):
  """Values, old ones, returns and a mask with an empty row."""
  rng = np.random.default_rng(seed)
  old_values = rng.normal(size=shape)
  values = old_values + rng.normal(0.0, 0.4, size=shape)
  mask = rng.random(shape) < 0.7
  mask[rng.integers(shape[0])] = False
  return values, old_values, rng.normal(size=shape), mask


def _float32(batch):
  """The batch with floats in float32, on the device."""
  return [jnp.array(x) if x.dtype == bool else jnp.float32(x) for x in batch]


@functools.cache
def _jitted(loss_fn, **settings):
  """Value and gradient of a loss, compiled once for all drawn examples."""
  loss_fn = functools.partial(loss_fn, clip_epsilon=0.2, **settings)
  return jax.jit(jax.value_and_grad(loss_fn, has_aux=True))


def _spread(how, step, params, batch):
  """Runs `step(params, *shard)` on eight shards of the batch's rows.

  Args:
    how: "vmap", "pmap" or "shard_map", all over the axis "data".
    step: a function whose results agree on every shard.
    params: the same on every shard.
    batch: arrays with the rows in front.

  Returns:
    The results of the last shard.
  """
  if how == "shard_map":
    mesh = jax.make_mesh(
      (8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)
    )
    whole, rows = (
      jax.sharding.PartitionSpec(),
      jax.sharding.PartitionSpec("data"),
    )
    sharded = jax.shard_map(
      step,
      mesh=mesh,
      in_specs=(whole, *[rows] * len(batch)),
      out_specs=whole,
    )
    return jax.jit(sharded)(params, *batch)
  transform = {"vmap": jax.vmap, "pmap": jax.pmap}[how]
  shards = [x.reshape(8, -1, *x.shape[1:]) for x in batch]
  results = transform(
    step, axis_name="data", in_axes=(None, *[0] * len(batch))
  )(params, *shards)
  return jax.tree.map(lambda x: x[-1], results)


def _linear_step(loss_fn, axis_name):
  """Loss, metrics and the mean gradient for outputs linear in the params."""

  def step(params, features, *batch):
    def of_params(params):
      outputs = jnp.einsum("btf,f->bt", features, params)
      return loss_fn(outputs, *batch, axis_name=axis_name)

    (loss, metrics), grads = jax.value_and_grad(of_params, has_aux=True)(params)
    if axis_name is not None:
      grads = jax.lax.pmean(grads, axis_name)
    return loss, metrics, grads

  return step


class ClippedPolicyLossTest(parameterized.TestCase):
  @chex.all_variants
  @parameterized.parameters(
    # Token losses -1.2, -0.818731, 1 and -0.6, 1.6; the sixth is padding.
    # Their sum is -0.018731: by 5; by 3 and 1.0 by 2, halved; by 2 * 3.
    ("token_mean", None, -0.003746),
    ("sequence_mean", None, 0.080212),
    ("constant", None, -0.003122),
    # Up to 1.28: -1.221403, -0.818731, 1 and -0.64, 1.6.
    ("token_mean", 0.28, -0.016027),
    ("sequence_mean", 0.28, 0.066644),
    ("constant", 0.28, -0.013356),
  )
  def test_hand_computed(self, normalizer, high, expected):
    loss_fn = self.variant(
      functools.partial(
        ppo.clipped_policy_loss,
        clip_epsilon=0.2,
        clip_epsilon_high=high,
        normalizer=normalizer,
      )
    )
    loss, metrics = loss_fn(_LOG_PROBS, _OLD_LOG_PROBS, _ADVANTAGES, _MASK)
    np.testing.assert_allclose(loss, expected, atol=1e-6)
    # Ratios 1.221403, 0.818731, 1, 1.648721, 0.670320. With 1.2 above, the
    # clip binds on the first (barely), the fourth and the last.
    expected_metrics = {
      "ppo/policy_loss": expected,
      "ppo/clip_fraction": 0.6 if high is None else 0.4,
      "ppo/ratio_mean": 1.071835,
      "ppo/ratio_min": 0.670320,
      "ppo/ratio_max": 1.648721,
      "ppo/approx_kl": 0.051835,
      "ppo/approx_kl_k2": 0.049,
      "ppo/count": 5.0,
    }
    self.assertEqual(set(metrics), set(expected_metrics))
    for name, value in expected_metrics.items():
      np.testing.assert_allclose(metrics[name], value, atol=1e-6, err_msg=name)

  @chex.all_variants
  @parameterized.parameters(
    # d l / d log π = -A ρ where the unclipped term counts, else 0.
    ("token_mean", [[0.0, -0.163746, 0.2], [0.0, 0.0, 0.0]]),
    ("sequence_mean", [[0.0, -0.136455, 0.166667], [0.0, 0.0, 0.0]]),
    ("constant", [[0.0, -0.136455, 0.166667], [0.0, 0.0, 0.0]]),
  )
  def test_hand_computed_gradient(self, normalizer, expected):
    grad_fn = self.variant(
      jax.grad(
        lambda *args: ppo.clipped_policy_loss(
          *args, clip_epsilon=0.2, normalizer=normalizer
        )[0]
      )
    )
    grads = grad_fn(_LOG_PROBS, _OLD_LOG_PROBS, _ADVANTAGES, _MASK)
    np.testing.assert_allclose(grads, expected, atol=1e-6)

  @chex.all_variants
  @parameterized.parameters(
    (1.0, 1.5, -1.2, 0.0),  # Too likely already.
    (-1.0, 1.5, 1.5, 1.5),  # Too likely, and should not be: alive.
    (-1.0, 0.5, 0.8, 0.0),  # Unlikely enough.
    (1.0, 0.5, -0.5, -0.5),  # Too unlikely, and should not be: alive.
    (1.0, 1.1, -1.1, -1.1),  # Inside, both ways.
    (-1.0, 0.9, 0.9, 0.9),
  )
  def test_every_branch(self, advantage, ratio, expected, expected_grad):
    loss_and_grad = self.variant(
      jax.value_and_grad(
        functools.partial(ppo.clipped_policy_loss, clip_epsilon=0.2),
        has_aux=True,
      )
    )
    (loss, metrics), grad = loss_and_grad(
      np.full((1, 1), np.log(ratio), np.float32),
      np.zeros((1, 1), np.float32),
      np.full((1, 1), advantage, np.float32),
      np.ones((1, 1), bool),
    )
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    np.testing.assert_allclose(grad[0, 0], expected_grad, rtol=1e-6)
    np.testing.assert_allclose(
      metrics["ppo/clip_fraction"], float(expected_grad == 0.0)
    )

  @chex.all_variants
  def test_equal_policies(self):
    # Ratio 1: the loss is -mean(A), 0 for centred advantages, and its
    # gradient is that of the plain policy gradient.
    log_probs, _, advantages, mask = _float32(_policy_batch(3))
    advantages = advantages - jnp.mean(advantages[mask])
    loss_and_grad = self.variant(
      jax.value_and_grad(
        functools.partial(ppo.clipped_policy_loss, clip_epsilon=0.2),
        has_aux=True,
      )
    )
    (loss, metrics), grad = loss_and_grad(
      log_probs, log_probs, advantages, mask
    )
    np.testing.assert_allclose(loss, 0.0, atol=1e-6)
    np.testing.assert_allclose(
      grad, jnp.where(mask, -advantages / float(mask.sum()), 0.0), rtol=1e-5
    )
    for name, expected in (
      ("ppo/ratio_mean", 1.0),
      ("ppo/ratio_max", 1.0),
      ("ppo/clip_fraction", 0.0),
      ("ppo/approx_kl", 0.0),
      ("ppo/approx_kl_k2", 0.0),
    ):
      np.testing.assert_allclose(metrics[name], expected, rtol=1e-6)

  @hypothesis.given(
    seed=_SEEDS,
    low=st.floats(0.05, 0.5),
    high=st.floats(0.05, 0.5),
    normalizer=st.sampled_from(_NORMALIZERS),
  )
  def test_matches_oracle(self, seed, low, high, normalizer):
    batch = _policy_batch(seed)
    loss, metrics = ppo.clipped_policy_loss(
      *_float32(batch),
      clip_epsilon=low,
      clip_epsilon_high=high,
      normalizer=normalizer,
    )
    expected = oracles.clipped_policy_loss(*batch, low, high, normalizer)
    actual = [loss] + [
      metrics[f"ppo/{name}"]
      for name in ("clip_fraction", "ratio_mean", "ratio_max")
    ]
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)

  @hypothesis.given(seed=_SEEDS, normalizer=st.sampled_from(_NORMALIZERS))
  def test_masked_entries_and_order_are_inert(self, seed, normalizer):
    *arrays, mask = _float32(_policy_batch(seed))
    loss_and_grad = _jitted(
      ppo.clipped_policy_loss, normalizer=normalizer, ratio_guard=10.0
    )
    expected, expected_grad = loss_and_grad(*arrays, mask)
    poisoned = [jnp.where(mask, x, jnp.nan) for x in arrays]
    actual, grad = loss_and_grad(*poisoned, mask)
    chex.assert_trees_all_equal((actual, grad), (expected, expected_grad))
    np.testing.assert_array_equal(np.asarray(grad)[~mask], 0.0)

    order = np.random.default_rng(seed).permutation(mask.shape[0])
    actual, grad = loss_and_grad(*[x[order] for x in arrays], mask[order])
    chex.assert_trees_all_close(
      (actual, grad), (expected, expected_grad[order]), rtol=1e-4, atol=1e-6
    )

  @parameterized.parameters("token_mean", "sequence_mean")
  def test_more_padding_changes_nothing(self, normalizer):
    arrays = _float32(_policy_batch(5))
    loss_fn = functools.partial(
      ppo.clipped_policy_loss, clip_epsilon=0.2, normalizer=normalizer
    )
    # Two columns and an empty row more.
    padded = [jnp.pad(x, ((0, 1), (0, 2))) for x in arrays]
    chex.assert_trees_all_close(loss_fn(*padded), loss_fn(*arrays), rtol=1e-6)

  @parameterized.product(
    how=("vmap", "pmap", "shard_map"), normalizer=_NORMALIZERS
  )
  def test_split_batch(self, how, normalizer):
    # One row a shard: token counts differ, and one shard has none.
    _, old_log_probs, advantages, mask = _float32(_policy_batch(7))
    rng = np.random.default_rng(7)
    features = jnp.float32(rng.normal(0.0, 0.3, size=(8, 5, 3)))
    features = features.at[..., 0].set(old_log_probs)
    params = jnp.array([1.1, 0.7, -0.4])
    loss_fn = functools.partial(
      ppo.clipped_policy_loss,
      clip_epsilon=0.2,
      normalizer=normalizer,
      ratio_guard=5.0,
    )
    batch = (features, old_log_probs, advantages, mask)
    expected = _linear_step(loss_fn, None)(params, *batch)
    actual = _spread(how, _linear_step(loss_fn, "data"), params, batch)
    chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-6)
    self.assertGreater(float(jnp.linalg.norm(expected[2])), 1e-3)

  @parameterized.parameters(*_NORMALIZERS)
  def test_numerical_gradient(self, normalizer):
    log_probs, old_log_probs, advantages, mask = _float32(_policy_batch(11))
    # Away from the kinks at 0.8 and 1.2, on both sides of each.
    ratios = jnp.array([0.6, 0.9, 1.0, 1.1, 1.5])
    log_probs = old_log_probs + jnp.log(ratios)[None, :]

    def loss_fn(log_probs):
      return ppo.clipped_policy_loss(
        log_probs,
        old_log_probs,
        advantages,
        mask,
        clip_epsilon=0.2,
        normalizer=normalizer,
      )[0]

    chex.assert_numerical_grads(
      loss_fn, (log_probs,), order=1, atol=2e-3, rtol=1e-2
    )

  def test_one_step_moves_the_right_way(self):
    batch = _LOG_PROBS, _LOG_PROBS, _ADVANTAGES, _MASK
    grad = jax.grad(
      lambda *args: ppo.clipped_policy_loss(*args, clip_epsilon=0.2)[0]
    )(*batch)
    np.testing.assert_array_equal(
      np.sign(-grad), np.where(_MASK, np.sign(_ADVANTAGES), 0.0)
    )

  @parameterized.parameters(1, 2)
  def test_no_gradient_to_constants(self, argnum):
    grad = jax.grad(
      lambda *args: ppo.clipped_policy_loss(*args, clip_epsilon=0.2)[0],
      argnums=argnum,
    )(_LOG_PROBS, _OLD_LOG_PROBS, _ADVANTAGES, _MASK)
    np.testing.assert_array_equal(grad, np.zeros((2, 3)))

  def test_no_gradient_through_metrics(self):
    def total(log_probs):
      _, metrics = ppo.clipped_policy_loss(
        log_probs, _OLD_LOG_PROBS, _ADVANTAGES, _MASK, clip_epsilon=0.2
      )
      return sum(metrics.values())

    np.testing.assert_array_equal(jax.grad(total)(_LOG_PROBS), np.zeros((2, 3)))

  @parameterized.parameters(*_NORMALIZERS)
  def test_empty_mask(self, normalizer):
    (loss, metrics), grad = jax.value_and_grad(
      functools.partial(
        ppo.clipped_policy_loss, clip_epsilon=0.2, normalizer=normalizer
      ),
      has_aux=True,
    )(_LOG_PROBS, _OLD_LOG_PROBS, _ADVANTAGES, np.zeros((2, 3), bool))
    chex.assert_trees_all_equal(
      (loss, metrics, grad), jax.tree.map(jnp.zeros_like, (loss, metrics, grad))
    )

  @parameterized.parameters((1.0, -1.2), (-1.0, math.exp(60)))
  def test_huge_ratio_stays_finite(self, advantage, expected):
    # exp(200) is no float32. The gradient of the discarded branch is not NaN.
    (loss, metrics), grad = jax.value_and_grad(
      functools.partial(ppo.clipped_policy_loss, clip_epsilon=0.2),
      has_aux=True,
    )(
      jnp.zeros((1, 1)),
      jnp.full((1, 1), -200.0),
      jnp.full((1, 1), advantage),
      jnp.ones((1, 1), bool),
    )
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_array_equal(grad, np.zeros((1, 1)))
    chex.assert_tree_all_finite(metrics)

  def test_float32_inside(self):
    # bfloat16 cannot tell -1.001 from -1.
    batch = [jnp.bfloat16(x) for x in _policy_batch(0)[:3]]
    mask = jnp.ones(batch[0].shape, bool)
    loss, metrics = ppo.clipped_policy_loss(*batch, mask, clip_epsilon=0.2)
    expected, _ = ppo.clipped_policy_loss(
      *[x.astype(jnp.float32) for x in batch], mask, clip_epsilon=0.2
    )
    chex.assert_type([loss, *metrics.values()], jnp.float32)
    np.testing.assert_array_equal(loss, expected)

  def test_bad_input(self):
    batch = _LOG_PROBS, _OLD_LOG_PROBS, _ADVANTAGES, _MASK
    for settings, message in (
      ({"clip_epsilon": 0.0}, "clip_epsilon must be positive, got 0.0"),
      (
        {"clip_epsilon": 0.2, "clip_epsilon_high": -0.1},
        "clip_epsilon_high must be positive, got -0.1",
      ),
      (
        {"clip_epsilon": 0.2, "normalizer": "mean"},
        "normalizer must be one of token_mean, sequence_mean, constant, "
        "got 'mean'",
      ),
      (
        {"clip_epsilon": 0.2, "ratio_guard": 0.0},
        "threshold must be positive, got 0.0",
      ),
    ):
      with self.assertRaisesRegex(ValueError, message):
        ppo.clipped_policy_loss(*batch, **settings)
    for position in range(4):
      wrong_shape, wrong_type = list(batch), list(batch)
      wrong_shape[position] = batch[position][:, :2]
      wrong_type[position] = np.ones((2, 3), np.int32)
      for wrong in (wrong_shape, wrong_type):
        with self.assertRaises(AssertionError):
          ppo.clipped_policy_loss(*wrong, clip_epsilon=0.2)


class ClippedValueLossTest(parameterized.TestCase):
  @chex.all_variants
  def test_hand_computed(self):
    loss_fn = self.variant(
      functools.partial(ppo.clipped_value_loss, clip_epsilon=0.2)
    )
    loss, metrics = loss_fn(_VALUES, _OLD_VALUES, _RETURNS, _MASK)
    # Clipped values .7, .35, .3 and -.1, .15; largest squares .09, .4225, .49
    # and .09, .0225: 1.115 / 5 / 2. Only the first is the clipped one's.
    np.testing.assert_allclose(loss, 0.1115, atol=1e-6)
    np.testing.assert_allclose(metrics["value/loss"], 0.1115, atol=1e-6)
    np.testing.assert_allclose(metrics["value/clip_fraction"], 0.2, atol=1e-6)
    # G - V = .1, .65, .7, .3, -.15: mean .32, mean square .207, variance
    # .1046. G = 1, 1, 1, 0, 0: variance .24.
    np.testing.assert_allclose(
      metrics["value/explained_variance"], 1 - 0.1046 / 0.24, atol=1e-6
    )
    for name, value in (
      ("returns_mean", 0.6),
      ("returns_variance", 0.24),
      ("errors_mean", 0.32),
      ("errors_variance", 0.1046),
      ("count", 5.0),
    ):
      np.testing.assert_allclose(metrics[f"value/{name}"], value, atol=1e-6)
    policy_loss, _ = ppo.clipped_policy_loss(
      _LOG_PROBS, _OLD_LOG_PROBS, _ADVANTAGES, _MASK, clip_epsilon=0.2
    )
    np.testing.assert_allclose(policy_loss + 0.1 * loss, 0.007404, atol=1e-6)

  @chex.all_variants
  def test_hand_computed_without_clipping(self):
    # Squares .01, .4225, .49, .09, .0225: 1.035 / 5 / 2.
    loss, metrics = self.variant(
      functools.partial(ppo.clipped_value_loss, clip_epsilon=math.inf)
    )(_VALUES, _OLD_VALUES, _RETURNS, _MASK)
    np.testing.assert_allclose(loss, 0.1035, atol=1e-6)
    np.testing.assert_allclose(metrics["value/clip_fraction"], 0.0)

  @chex.all_variants
  def test_hand_computed_gradient(self):
    # (V - G) / 5, or 0 where the clipped square is the larger one.
    grad = self.variant(
      jax.grad(lambda *args: ppo.clipped_value_loss(*args, clip_epsilon=0.2)[0])
    )(_VALUES, _OLD_VALUES, _RETURNS, _MASK)
    np.testing.assert_allclose(
      grad, [[0.0, -0.13, -0.14], [-0.06, 0.03, 0.0]], atol=1e-6
    )

  @chex.all_variants
  def test_clipped_away(self):
    # V_old 0, V 1, G 1: square 0, clipped (0.2 - 1)² = 0.64; no gradient.
    loss_and_grad = self.variant(
      jax.value_and_grad(
        lambda *args: ppo.clipped_value_loss(*args, clip_epsilon=0.2)[0]
      )
    )
    one = np.ones((1, 1), np.float32)
    loss, grad = loss_and_grad(one, np.zeros_like(one), one, one > 0)
    np.testing.assert_allclose(loss, 0.32, rtol=1e-6)
    np.testing.assert_array_equal(grad, [[0.0]])

  @hypothesis.given(seed=_SEEDS, epsilon=st.floats(0.05, 1.0))
  def test_matches_oracle(self, seed, epsilon):
    batch = _value_batch(seed)
    loss, metrics = ppo.clipped_value_loss(
      *_float32(batch), clip_epsilon=epsilon
    )
    expected = oracles.clipped_value_loss(*batch, epsilon)
    actual = [
      loss,
      metrics["value/clip_fraction"],
      metrics["value/explained_variance"],
    ]
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)

  @hypothesis.given(seed=_SEEDS)
  def test_masked_entries_and_order_are_inert(self, seed):
    *arrays, mask = _float32(_value_batch(seed))
    loss_and_grad = _jitted(ppo.clipped_value_loss)
    expected, expected_grad = loss_and_grad(*arrays, mask)
    poisoned = [jnp.where(mask, x, jnp.nan) for x in arrays]
    actual, grad = loss_and_grad(*poisoned, mask)
    chex.assert_trees_all_equal((actual, grad), (expected, expected_grad))
    np.testing.assert_array_equal(np.asarray(grad)[~mask], 0.0)

    order = np.random.default_rng(seed).permutation(mask.shape[0])
    actual, grad = loss_and_grad(*[x[order] for x in arrays], mask[order])
    chex.assert_trees_all_close(
      (actual, grad), (expected, expected_grad[order]), rtol=1e-4, atol=1e-6
    )

  @parameterized.parameters("vmap", "pmap", "shard_map")
  def test_split_batch(self, how):
    _, old_values, returns, mask = _float32(_value_batch(7))
    rng = np.random.default_rng(7)
    features = jnp.float32(rng.normal(0.0, 0.3, size=(8, 5, 3)))
    features = features.at[..., 0].set(old_values)
    params = jnp.array([1.1, 0.7, -0.4])
    loss_fn = functools.partial(ppo.clipped_value_loss, clip_epsilon=0.2)
    batch = (features, old_values, returns, mask)
    expected = _linear_step(loss_fn, None)(params, *batch)
    actual = _spread(how, _linear_step(loss_fn, "data"), params, batch)
    chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-6)
    self.assertGreater(float(jnp.linalg.norm(expected[2])), 1e-3)

  def test_numerical_gradient(self):
    _, old_values, returns, mask = _float32(_value_batch(11))
    # Away from the kinks at ±0.2.
    shift = jnp.array([-0.5, -0.1, 0.0, 0.1, 0.5])
    values = old_values + shift[None, :]
    chex.assert_numerical_grads(
      lambda values: ppo.clipped_value_loss(
        values, old_values, returns, mask, clip_epsilon=0.2
      )[0],
      (values,),
      order=1,
      atol=2e-3,
      rtol=1e-2,
    )

  @parameterized.parameters(1, 2)
  def test_no_gradient_to_constants(self, argnum):
    grad = jax.grad(
      lambda *args: ppo.clipped_value_loss(*args, clip_epsilon=0.2)[0],
      argnums=argnum,
    )(_VALUES, _OLD_VALUES, _RETURNS, _MASK)
    np.testing.assert_array_equal(grad, np.zeros((2, 3)))

  def test_no_gradient_through_metrics(self):
    def total(values):
      _, metrics = ppo.clipped_value_loss(
        values, _OLD_VALUES, _RETURNS, _MASK, clip_epsilon=0.2
      )
      return sum(metrics.values())

    np.testing.assert_array_equal(jax.grad(total)(_VALUES), np.zeros((2, 3)))

  def test_explained_variance_at_its_limits(self):
    def explained(values, returns, mask=_MASK):
      return ppo.clipped_value_loss(
        values, _OLD_VALUES, returns, mask, clip_epsilon=0.2
      )[1]["value/explained_variance"]

    np.testing.assert_allclose(explained(_RETURNS, _RETURNS), 1.0)
    constant = np.ones_like(_RETURNS)
    np.testing.assert_allclose(explained(constant, _RETURNS), 0.0, atol=1e-6)
    np.testing.assert_allclose(explained(_VALUES, constant), 0.0)
    np.testing.assert_allclose(explained(_VALUES, _RETURNS, ~_MASK), 0.0)

  def test_empty_mask(self):
    (loss, metrics), grad = jax.value_and_grad(
      functools.partial(ppo.clipped_value_loss, clip_epsilon=0.2), has_aux=True
    )(_VALUES, _OLD_VALUES, _RETURNS, np.zeros((2, 3), bool))
    chex.assert_trees_all_equal(
      (loss, metrics, grad), jax.tree.map(jnp.zeros_like, (loss, metrics, grad))
    )

  def test_bad_input(self):
    batch = _VALUES, _OLD_VALUES, _RETURNS, _MASK
    with self.assertRaisesRegex(
      ValueError, "clip_epsilon must be positive, got -0.2"
    ):
      ppo.clipped_value_loss(*batch, clip_epsilon=-0.2)
    for position in range(4):
      wrong_shape, wrong_type = list(batch), list(batch)
      wrong_shape[position] = batch[position][:, :2]
      wrong_type[position] = np.ones((2, 3), np.int32)
      for wrong in (wrong_shape, wrong_type):
        with self.assertRaises(AssertionError):
          ppo.clipped_value_loss(*wrong, clip_epsilon=0.2)


class KLFromOldTest(parameterized.TestCase):
  @chex.all_variants
  def test_hand_computed(self):
    old = jnp.log(jnp.array([[0.5, 0.4, 0.2]]))
    new = jnp.log(jnp.array([[0.6, 0.2, 0.9]]))
    mask = jnp.array([[True, True, False]])
    # ρ = 1.2, 0.5: mean(0.2 - ln 1.2, -0.5 - ln 0.5) = (0.017678 + 0.193147)/2.
    value = self.variant(ppo.kl_from_old)(new, old, mask)
    np.testing.assert_allclose(value, 0.105413, atol=1e-6)
    # (ρ - 1) / n: towards the old policy, and not 0 as a stopped one would be.
    gradient = self.variant(jax.grad(ppo.kl_from_old))(new, old, mask)
    np.testing.assert_allclose(gradient, [[0.1, -0.25, 0.0]], atol=1e-6)
    gradient = self.variant(jax.grad(ppo.kl_from_old, argnums=1))(
      new, old, mask
    )
    np.testing.assert_array_equal(gradient, np.zeros((1, 3)))

  def test_first_update_has_no_gradient(self):
    old = jnp.array([[-1.0, -2.0]])
    gradient = jax.grad(ppo.kl_from_old)(old, old, jnp.ones((1, 2), bool))
    np.testing.assert_array_equal(gradient, np.zeros((1, 2)))

  def test_masked_nan_and_split_batches(self):
    rng = np.random.default_rng(0)
    new, old = (jnp.float32(-rng.random((8, 3)) - 0.1) for _ in range(2))
    mask = jnp.asarray(rng.random((8, 3)) < 0.6)
    holes = jnp.where(mask, new, jnp.nan)
    whole = jax.value_and_grad(ppo.kl_from_old)(new, old, mask)
    with_holes = jax.value_and_grad(ppo.kl_from_old)(holes, old, mask)
    chex.assert_trees_all_equal(whole, with_holes)
    split = lambda x: x.reshape(4, 2, 3)
    run = jax.vmap(lambda *a: ppo.kl_from_old(*a, axis_name="i"), axis_name="i")
    parts = run(split(new), split(old), split(mask))
    np.testing.assert_allclose(parts, np.full(4, whole[0]), rtol=1e-5)


class RatioGuardTest(parameterized.TestCase):
  @chex.variants(with_jit=True, without_jit=True)
  def test_hand_computed(self):
    # Ratios 1 and 20 (mean 10.5); the third is padding.
    log_probs = jnp.array([[-1.0, 0.0, 0.0]])
    old_log_probs = jnp.array([[-1.0, -math.log(20.0), -50.0]])
    mask = jnp.array([[True, True, False]])
    for threshold, expected in ((10.4, 0.0), (10.6, 1.0)):
      guard = self.variant(
        functools.partial(ppo.ratio_guard, threshold=threshold)
      )(log_probs, old_log_probs, mask)
      self.assertEqual(guard.dtype, jnp.float32)
      self.assertEqual(float(guard), expected)

  @chex.all_variants
  @parameterized.parameters((2.0, 1.0), (3.0, 0.0), (200.0, 0.0))
  def test_zeroes_every_part(self, log_ratio, expected):
    # e² = 7.4 is below ten, e³ = 20 above, and e^200 is no float32.
    old_log_probs = np.full((2, 3), -log_ratio, np.float32)
    advantages = -np.ones((2, 3), np.float32)

    def loss_fn(log_probs, values):
      policy_loss, metrics = ppo.clipped_policy_loss(
        log_probs,
        old_log_probs,
        advantages,
        _MASK,
        clip_epsilon=0.2,
        ratio_guard=10.0,
      )
      guard = ppo.ratio_guard(log_probs, old_log_probs, _MASK, threshold=10.0)
      value_loss, _ = ppo.clipped_value_loss(
        values, _OLD_VALUES, _RETURNS, _MASK, clip_epsilon=0.2
      )
      other_parts = guard * (value_loss - jnp.mean(log_probs + 1.0))
      return policy_loss + other_parts, (policy_loss, guard, metrics)

    (loss, (policy_loss, guard, metrics)), grads = self.variant(
      jax.value_and_grad(loss_fn, argnums=(0, 1), has_aux=True)
    )(np.zeros((2, 3), np.float32), _VALUES)
    self.assertEqual(float(guard), expected)
    if expected:
      np.testing.assert_allclose(policy_loss, math.exp(log_ratio), rtol=1e-5)
      self.assertGreater(float(jnp.min(jnp.abs(grads[0][_MASK]))), 0.0)
    else:
      self.assertEqual(float(loss), 0.0)
      self.assertEqual(float(policy_loss), 0.0)
      chex.assert_trees_all_equal(grads, jax.tree.map(jnp.zeros_like, grads))
      # What was measured stays visible.
      self.assertGreater(float(metrics["ppo/ratio_mean"]), 10.0)

  @parameterized.parameters("token_mean", "sequence_mean", "constant")
  def test_loss_is_zero_under_every_normalizer(self, normalizer):
    loss, _ = ppo.clipped_policy_loss(
      _LOG_PROBS,
      _OLD_LOG_PROBS - 5.0,
      _ADVANTAGES,
      _MASK,
      clip_epsilon=0.2,
      normalizer=normalizer,
      ratio_guard=10.0,
    )
    self.assertEqual(float(loss), 0.0)

  @parameterized.parameters("vmap", "pmap", "shard_map")
  def test_split_batch(self, how):
    # One shard's ratio is e³, the others' 1: 3.39 over the whole batch.
    log_ratio = jnp.zeros((8, 2)).at[5].set(3.0)
    mask = jnp.ones((8, 2), bool)
    for threshold, expected in ((3.3, 0.0), (3.5, 1.0)):

      def step(shift, log_ratio, mask, threshold=threshold):
        return ppo.ratio_guard(
          log_ratio + shift,
          jnp.zeros_like(log_ratio),
          mask,
          threshold=threshold,
          axis_name="data",
        )

      guard = _spread(how, step, jnp.zeros(()), (log_ratio, mask))
      self.assertEqual(float(guard), expected)

  def test_no_gradient_and_empty_mask(self):
    def guard_fn(log_probs, old_log_probs, mask=_MASK):
      return ppo.ratio_guard(log_probs, old_log_probs, mask, threshold=10.0)

    grads = jax.grad(guard_fn, argnums=(0, 1))(_LOG_PROBS, _OLD_LOG_PROBS)
    chex.assert_trees_all_equal(grads, jax.tree.map(jnp.zeros_like, grads))
    nan = np.full((2, 3), np.nan, np.float32)
    self.assertEqual(float(guard_fn(nan, nan, np.zeros((2, 3), bool))), 1.0)

  def test_bad_input(self):
    with self.assertRaisesRegex(
      ValueError, "threshold must be positive, got -1"
    ):
      ppo.ratio_guard(_LOG_PROBS, _OLD_LOG_PROBS, _MASK, threshold=-1)
    with self.assertRaises(AssertionError):
      ppo.ratio_guard(_LOG_PROBS, _OLD_LOG_PROBS[:1], _MASK, threshold=10.0)
