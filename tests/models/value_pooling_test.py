"""Tests of the attention-pooling value head."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

from rljax.losses import ppo
from rljax.models import heads
from tests import oracles_offline as oracles

_PROJECTIONS = (
  "query_projection",
  "key_projection",
  "value_projection",
  "output_projection",
)


def _identity(query, kernel, bias):
  """Variables with identity projections and zero biases."""
  width = len(query)
  dense = {"kernel": jnp.eye(width), "bias": jnp.zeros(width)}
  params = {name: dense for name in _PROJECTIONS}
  params["query"] = jnp.float32(query)
  params["dense"] = {
    "kernel": jnp.float32(kernel)[:, None],
    "bias": jnp.float32([bias]),
  }
  return {"params": params}


def _random(seed, width=16, batch=3, length=5):
  """A head of eight heads with random parameters, hidden states and a mask."""
  rng = np.random.default_rng(seed)
  hidden = jnp.float32(rng.normal(size=(batch, length, width)))
  mask = np.arange(length) >= rng.integers(0, length, size=batch)[:, None]
  head = heads.AttentionPoolingHead(max_value=4.0)
  variables = head.init(jax.random.key(seed), hidden, jnp.array(mask))
  variables = jax.tree.map(
    lambda x: x + jnp.float32(rng.normal(0.0, 0.3, x.shape)), variables
  )
  return head, variables, hidden, jnp.array(mask)


class AttentionPoolingHeadTest(parameterized.TestCase):
  @chex.variants(with_jit=True, without_jit=True)
  @parameterized.parameters(
    # The first row real, or padding; the published head looks at it anyway.
    (True, True, 0.716458),
    (False, True, 0.742049),
    (False, False, 0.716458),
  )
  def test_one_head_by_hand(self, first, pad_mask, expected):
    # Attention 0.283995, 0.140029, 0.575975, pooled 1.435946, -0.435946; or
    # 0, 0.195570, 0.804430, pooled 1.608859, -0.608859.
    hidden = jnp.array([[[1.0, 0.0], [0.0, 1.0], [2.0, -1.0]]])
    mask = jnp.array([[first, True, True]])
    variables = _identity([1.0, 0.0], [0.5, -0.25], 0.1)
    for max_value in (1.0, 4.0):
      head = heads.AttentionPoolingHead(
        max_value=max_value, num_heads=1, pad_mask=pad_mask
      )
      values = self.variant(head.apply)(variables, hidden, mask)
      np.testing.assert_allclose(values, [max_value * expected], rtol=2e-6)
      self.assertEqual(values.dtype, jnp.float32)
    if not first and pad_mask:
      # Dropping the row is the same.
      values = self.variant(head.apply)(variables, hidden[:, 1:], mask[:, 1:])
      np.testing.assert_allclose(values, [4.0 * expected], rtol=2e-6)

  @chex.variants(with_jit=True, without_jit=True)
  def test_two_heads_by_hand(self):
    # Attention 0.669762, 0.330238 and 0.091281, 0.908719; pooled 0.669762,
    # 0.330238, -0.863079, 1.771798.
    hidden = jnp.array([[[1.0, 0.0, 0.5, -0.5], [0.0, 1.0, -1.0, 2.0]]])
    variables = _identity([1.0, 0.0, -0.5, 1.0], [0.5, -0.25, 1.0, 0.2], 0.0)
    head = heads.AttentionPoolingHead(num_heads=2)
    values = self.variant(head.apply)(variables, hidden, jnp.ones((1, 2), bool))
    np.testing.assert_allclose(values, [0.436249], atol=1e-6)

  def test_squared_error_by_hand(self):
    # (0.25² + 0.3²) / 2. The critic's loss is half of it.
    values = jnp.array([[0.55], [0.40]])
    loss, _ = ppo.clipped_value_loss(
      values,
      values,
      jnp.array([[0.80], [0.10]]),
      jnp.ones((2, 1), bool),
      clip_epsilon=math.inf,
    )
    np.testing.assert_allclose(2 * loss, 0.076250, atol=1e-7)

  @parameterized.parameters(0, 1, 2)
  def test_matches_oracle(self, seed):
    head, variables, hidden, mask = _random(seed)
    values = jax.jit(head.apply)(variables, hidden, mask)
    params = jax.tree.map(
      lambda x: np.asarray(x, np.float64), variables["params"]
    )
    expected = oracles.attention_pooling(
      np.asarray(hidden, np.float64), np.asarray(mask), params, 8, 4.0
    )
    np.testing.assert_allclose(values, expected, rtol=1e-5)

  def test_padding_and_batch_are_inert(self):
    head, variables, hidden, mask = _random(3)
    values = head.apply(variables, hidden, mask)
    padded = head.apply(
      variables,
      jnp.pad(hidden, ((0, 0), (2, 1), (0, 0)), constant_values=jnp.nan),
      jnp.pad(mask, ((0, 0), (2, 1))),
    )
    np.testing.assert_allclose(padded, values, rtol=1e-5)
    for row in range(3):
      alone = head.apply(variables, hidden[row : row + 1], mask[row : row + 1])
      np.testing.assert_allclose(alone[0], values[row], rtol=1e-5)
    # The published head is not like that.
    published = heads.AttentionPoolingHead(max_value=4.0, pad_mask=False)
    whole = published.apply(variables, hidden, mask)
    padded = published.apply(
      variables,
      jnp.pad(hidden, ((0, 0), (2, 0), (0, 0))),
      mask=jnp.pad(mask, ((0, 0), (2, 0))),
    )
    self.assertGreater(float(jnp.max(jnp.abs(whole - padded))), 1e-3)

  def test_masked_nan_is_inert_in_the_gradient(self):
    head, variables, hidden, mask = _random(4)
    mask = mask.at[0].set(False)

    def total(variables, hidden):
      return jnp.sum(head.apply(variables, hidden, mask))

    grad_fn = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))
    expected = grad_fn(variables, hidden)
    actual = grad_fn(variables, jnp.where(mask[:, :, None], hidden, jnp.nan))
    chex.assert_trees_all_equal(actual, expected)
    chex.assert_tree_all_finite(actual)
    np.testing.assert_array_equal(actual[1][1][~np.asarray(mask)], 0.0)
    # A row without a token has the value of the biases.
    params = variables["params"]
    output = params["output_projection"]["bias"] @ params["dense"]["kernel"]
    np.testing.assert_allclose(
      head.apply(variables, hidden, mask)[0],
      4.0 * jax.nn.sigmoid(output + params["dense"]["bias"])[0],
      rtol=1e-6,
    )

  def test_dropout(self):
    head, variables, hidden, _ = _random(5, batch=64, length=8)
    mask = jnp.ones((64, 8), bool)

    def noisy(head, seed):
      return head.apply(
        variables,
        hidden,
        mask,
        deterministic=False,
        rngs={"dropout": jax.random.key(seed)},
        capture_intermediates=lambda module, _: module.name == "Dropout_0",
        mutable=["intermediates"],
      )

    values, state = noisy(head, 0)
    # A tenth of the hidden states' entries, and of the pooled ones'.
    dropped = state["intermediates"]["Dropout_0"]["__call__"]
    self.assertEqual([x.shape for x in dropped], [(64, 8, 16), (64, 16)])
    for x in dropped:
      np.testing.assert_allclose(jnp.mean(x == 0), 0.1, atol=0.03)
    again, _ = noisy(head, 0)
    np.testing.assert_array_equal(again, values)
    other, _ = noisy(head, 1)
    self.assertGreater(float(jnp.max(jnp.abs(other - values))), 0.01)
    without = heads.AttentionPoolingHead(max_value=4.0, dropout_rate=0.0)
    still = head.apply(variables, hidden, mask)
    np.testing.assert_allclose(noisy(without, 0)[0], still, rtol=1e-6)
    self.assertGreater(float(jnp.max(jnp.abs(still - values))), 0.01)

  def test_initial_parameters(self):
    hidden = jnp.zeros((1, 2, 512), jnp.bfloat16)
    head = heads.AttentionPoolingHead()
    values, variables = head.init_with_output(
      jax.random.key(0), hidden, jnp.ones((1, 2), bool)
    )
    chex.assert_type(jax.tree.leaves(variables), jnp.float32)
    self.assertEqual(values.dtype, jnp.float32)
    params = variables["params"]
    self.assertEqual(set(params), {"query", "dense", *_PROJECTIONS})
    np.testing.assert_allclose(jnp.std(params["query"]), 1.0, rtol=0.15)
    np.testing.assert_allclose(jnp.mean(params["query"]), 0.0, atol=0.15)
    for name in _PROJECTIONS:
      self.assertEqual(params[name]["kernel"].shape, (512, 512))
      np.testing.assert_array_equal(params[name]["bias"], np.zeros(512))
    # The biases are zero, and so are these values: half way.
    np.testing.assert_allclose(values, [0.5])

  def test_bad_input(self):
    hidden, mask = jnp.zeros((1, 2, 12)), jnp.ones((1, 2), bool)
    key = jax.random.key(0)
    with self.assertRaisesRegex(
      ValueError, "num_heads must divide the width 12, got 8"
    ):
      heads.AttentionPoolingHead().init(key, hidden, mask)
    with self.assertRaisesRegex(
      ValueError, "max_value must be positive, got 0.0"
    ):
      heads.AttentionPoolingHead(max_value=0.0, num_heads=2).init(
        key, hidden, mask
      )
    for wrong in (jnp.ones((1, 3), bool), jnp.ones((1, 2))):
      with self.assertRaises(AssertionError):
        heads.AttentionPoolingHead(num_heads=2).init(key, hidden, wrong)
