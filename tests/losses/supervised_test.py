"""Tests of the likelihood loss."""

import functools
import math

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized
from hypothesis import strategies as st

from rljax.losses import supervised
from tests import oracles

_SEEDS = st.integers(0, 2**32 - 1)
_NORMALIZERS = ("token_mean", "sequence_mean", "sequence_sum")

# Two responses, of two tokens and of four.
_LOG_PROBS = np.float32([[-0.1, -0.2, -9.0, -9.0], [-0.3, -0.4, -0.5, -0.6]])
_WEIGHTS = np.float32([[2.0, 1.0, 5.0, 5.0], [0.0, 1.0, 1.0, -1.0]])
_MASK = np.array([[True, True, False, False], [True, True, True, True]])


def _batch(seed, shape=(8, 5)):
  """Log-probabilities, weights and a mask with an empty row; numpy."""
  rng = np.random.default_rng(seed)
  mask = rng.random(shape) < 0.7
  mask[rng.integers(shape[0])] = False
  return -rng.exponential(size=shape), rng.normal(size=shape), mask


def _float32(batch):
  """The batch with floats in float32, on the device."""
  return [jnp.array(x) if x.dtype == bool else jnp.float32(x) for x in batch]


def _weighted_loss(normalizer, axis_name=None):
  def loss_fn(log_probs, weights, mask):
    return supervised.nll_loss(
      log_probs,
      mask,
      normalizer=normalizer,
      weights=weights,
      axis_name=axis_name,
    )

  return loss_fn


@functools.cache
def _jitted(normalizer):
  """Value and gradient, compiled once for all drawn examples."""
  return jax.jit(jax.value_and_grad(_weighted_loss(normalizer), has_aux=True))


class NLLLossTest(parameterized.TestCase):
  @chex.all_variants
  @parameterized.parameters(
    ("token_mean", 0.35),  # 2.1 / 6
    ("sequence_mean", 0.3),  # (0.3 / 2 + 1.8 / 4) / 2
    ("sequence_sum", 1.05),  # (0.3 + 1.8) / 2
  )
  def test_hand_computed(self, normalizer, expected):
    loss, metrics = self.variant(
      functools.partial(supervised.nll_loss, normalizer=normalizer)
    )(_LOG_PROBS, _MASK)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    self.assertEqual(set(metrics), {"nll/loss", "nll/perplexity", "nll/tokens"})
    np.testing.assert_allclose(metrics["nll/loss"], expected, rtol=1e-6)
    np.testing.assert_allclose(
      metrics["nll/perplexity"], math.exp(0.35), rtol=1e-6
    )
    np.testing.assert_allclose(metrics["nll/tokens"], 6.0)

  @chex.all_variants
  @parameterized.parameters(
    # Weighted: .2, .2 and 0, .4, .5, -.6, together .7.
    ("token_mean", 0.7 / 6, [[2, 1, 0, 0], [0, 1, 1, -1]], [6, 6]),
    ("sequence_mean", 0.1375, [[2, 1, 0, 0], [0, 1, 1, -1]], [4, 8]),
    ("sequence_sum", 0.35, [[2, 1, 0, 0], [0, 1, 1, -1]], [2, 2]),
  )
  def test_weights_and_gradient(self, normalizer, expected, weights, divisors):
    loss_and_grad = self.variant(
      jax.value_and_grad(_weighted_loss(normalizer), has_aux=True)
    )
    (loss, metrics), grad = loss_and_grad(_LOG_PROBS, _WEIGHTS, _MASK)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(
      grad, -np.float32(weights) / np.float32(divisors)[:, None], rtol=1e-6
    )
    # The perplexity is the policy's, whatever the weights.
    np.testing.assert_allclose(
      metrics["nll/perplexity"], math.exp(0.35), rtol=1e-6
    )

  def test_token_mean_by_default(self):
    loss, _ = supervised.nll_loss(_LOG_PROBS, _MASK)
    np.testing.assert_allclose(loss, 0.35, rtol=1e-6)

  @hypothesis.given(seed=_SEEDS, normalizer=st.sampled_from(_NORMALIZERS))
  def test_matches_oracle(self, seed, normalizer):
    log_probs, weights, mask = _batch(seed)
    loss, metrics = supervised.nll_loss(
      jnp.float32(log_probs), mask, normalizer=normalizer
    )
    np.testing.assert_allclose(
      loss, oracles.nll_loss(log_probs, mask, normalizer), rtol=1e-5
    )
    mean = oracles.nll_loss(log_probs, mask, "token_mean")
    np.testing.assert_allclose(
      metrics["nll/perplexity"], math.exp(mean), rtol=1e-5
    )
    np.testing.assert_allclose(metrics["nll/tokens"], mask.sum())
    loss, _ = _weighted_loss(normalizer)(
      jnp.float32(log_probs), jnp.float32(weights), mask
    )
    np.testing.assert_allclose(
      loss,
      oracles.nll_loss(log_probs, mask, normalizer, weights),
      rtol=1e-4,
      atol=1e-5,
    )

  @hypothesis.given(seed=_SEEDS, normalizer=st.sampled_from(_NORMALIZERS))
  def test_masked_entries_and_order_are_inert(self, seed, normalizer):
    log_probs, weights, mask = _float32(_batch(seed))
    loss_and_grad = _jitted(normalizer)
    expected, expected_grad = loss_and_grad(log_probs, weights, mask)
    actual, grad = loss_and_grad(
      jnp.where(mask, log_probs, jnp.nan),
      jnp.where(mask, weights, jnp.nan),
      mask,
    )
    chex.assert_trees_all_equal((actual, grad), (expected, expected_grad))
    np.testing.assert_array_equal(np.asarray(grad)[~mask], 0.0)

    order = np.random.default_rng(seed).permutation(mask.shape[0])
    actual, grad = loss_and_grad(log_probs[order], weights[order], mask[order])
    chex.assert_trees_all_close(
      (actual, grad), (expected, expected_grad[order]), rtol=1e-4, atol=1e-6
    )

  @parameterized.parameters(*_NORMALIZERS)
  def test_split_batch(self, normalizer):
    # One row a shard: token counts differ, and one shard has none.
    _, weights, mask = _float32(_batch(7))
    rng = np.random.default_rng(7)
    features = jnp.float32(rng.normal(size=(8, 5, 3)))
    params = jnp.array([1.1, 0.7, -0.4])

    def step(params, features, weights, mask, axis_name=None):
      def loss_fn(params):
        log_probs = jax.nn.log_sigmoid(
          jnp.einsum("btf,f->bt", features, params)
        )
        return _weighted_loss(normalizer, axis_name)(log_probs, weights, mask)

      results, grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
      if axis_name is not None:
        grads = jax.lax.pmean(grads, axis_name)
      return results, grads

    expected = step(params, features, weights, mask)
    actual = jax.vmap(
      functools.partial(step, axis_name="data"),
      axis_name="data",
      in_axes=(None, 0, 0, 0),
    )(params, *[x[:, None] for x in (features, weights, mask)])
    for shard in (0, 7):
      chex.assert_trees_all_close(
        jax.tree.map(lambda x, shard=shard: x[shard], actual),
        expected,
        rtol=1e-4,
        atol=1e-6,
      )

  @parameterized.parameters(*_NORMALIZERS)
  def test_numerical_gradient(self, normalizer):
    log_probs, weights, mask = _float32(_batch(1))
    chex.assert_numerical_grads(
      lambda x: _weighted_loss(normalizer)(x, weights, mask)[0],
      (log_probs,),
      order=1,
      atol=2e-3,
      rtol=1e-2,
    )

  def test_no_gradient_to_weights_and_metrics(self):
    grad = jax.grad(
      lambda weights: _weighted_loss("token_mean")(_LOG_PROBS, weights, _MASK)[
        0
      ]
    )(_WEIGHTS)
    np.testing.assert_array_equal(grad, np.zeros((2, 4)))
    grad = jax.grad(
      lambda log_probs: sum(supervised.nll_loss(log_probs, _MASK)[1].values())
    )(_LOG_PROBS)
    np.testing.assert_array_equal(grad, np.zeros((2, 4)))

  @parameterized.parameters(*_NORMALIZERS)
  def test_empty_mask(self, normalizer):
    (loss, metrics), grad = jax.value_and_grad(
      _weighted_loss(normalizer), has_aux=True
    )(_LOG_PROBS, _WEIGHTS, np.zeros((2, 4), bool))
    np.testing.assert_array_equal(loss, 0.0)
    np.testing.assert_array_equal(grad, np.zeros((2, 4)))
    np.testing.assert_array_equal(metrics["nll/perplexity"], 1.0)
    np.testing.assert_array_equal(metrics["nll/tokens"], 0.0)

  def test_bad_input(self):
    with self.assertRaisesRegex(
      ValueError,
      "normalizer must be one of token_mean, sequence_mean, sequence_sum, "
      "got 'constant'",
    ):
      supervised.nll_loss(_LOG_PROBS, _MASK, normalizer="constant")
    for args, weights in (
      ((_LOG_PROBS[:1], _MASK), None),
      ((_LOG_PROBS, _LOG_PROBS), None),
      ((_LOG_PROBS, _MASK), _WEIGHTS[:1]),
      ((_LOG_PROBS, _MASK), _MASK),
    ):
      with self.assertRaises(AssertionError):
        supervised.nll_loss(*args, weights=weights)
