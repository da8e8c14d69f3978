"""Tests of the value and label heads."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

from rljax.models import heads


def _variables(kernel, bias):
  kernel = jnp.asarray(kernel, jnp.float32)[:, None]
  bias = jnp.asarray([bias], jnp.float32)
  return {"params": {"dense": {"kernel": kernel, "bias": bias}}}


class ValueHeadTest(parameterized.TestCase):
  @parameterized.parameters(jnp.float32, jnp.bfloat16)
  def test_hand_computed(self, dtype):
    hidden = jnp.array([[[1.0, 2.0], [3.0, -4.0]]], dtype)
    values = heads.ValueHead().apply(_variables([0.5, 0.25], 1.0), hidden)
    # 0.5 * 1 + 0.25 * 2 + 1 = 2. 0.5 * 3 - 0.25 * 4 + 1 = 1.5.
    np.testing.assert_allclose(values, [[2.0, 1.5]])
    self.assertEqual(values.dtype, jnp.float32)

  def test_initial_values(self):
    hidden = jax.random.normal(jax.random.key(0), (5, 63))
    head = heads.ValueHead()
    values, _ = head.init_with_output(jax.random.key(1), hidden)
    np.testing.assert_array_equal(values, np.zeros(5))
    wide = jnp.zeros((1, 4095))
    head = heads.ValueHead(zero_init=False)
    kernel = head.init(jax.random.key(1), wide)["params"]["dense"]["kernel"]
    # 1 / √(4095 + 1) = 1 / 64.
    np.testing.assert_allclose(jnp.std(kernel), 1 / 64, rtol=0.05)


class LabelHeadTest(parameterized.TestCase):
  @parameterized.parameters(jnp.float32, jnp.bfloat16)
  def test_reads_the_last_real_token(self, dtype):
    hidden = jnp.arange(8.0, dtype=dtype).reshape(1, 4, 2).repeat(5, axis=0)
    mask = (
      jnp.array(
        [[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 1, 1], [0, 1, 1, 0], [0, 0, 0, 0]]
      )
      > 0
    )
    kernel = jnp.array([[1.0, -1.0], [10.0, 0.5]])
    head = heads.LabelHead(num_labels=2)
    scores = head.apply({"params": {"kernel": kernel}}, hidden, mask)
    # Token t holds (2t, 2t + 1): 22t + 10 and -t + 0.5. No token: 0.
    expected = [[76, -2.5], [32, -0.5], [76, -2.5], [54, -1.5], [0, 0]]
    np.testing.assert_allclose(scores, expected)
    self.assertEqual(scores.dtype, jnp.float32)

  def test_padding_is_inert_even_if_nan(self):
    hidden = jnp.ones((2, 3, 2)).at[0, 2].set(jnp.nan).at[1].set(jnp.nan)
    mask = jnp.array([[True, True, False], [False, False, False]])
    variables = {"params": {"kernel": jnp.array([[1.0], [2.0]])}}

    def total(variables, hidden):
      return jnp.sum(heads.LabelHead().apply(variables, hidden, mask))

    value, gradients = jax.value_and_grad(total, argnums=(0, 1))(
      variables, hidden
    )
    np.testing.assert_allclose(value, 3.0)
    np.testing.assert_array_equal(gradients[1][0], [[0, 0], [1, 2], [0, 0]])
    np.testing.assert_array_equal(gradients[1][1], 0)
    np.testing.assert_array_equal(gradients[0]["params"]["kernel"], [[1], [1]])

  def test_initial_values(self):
    head = heads.LabelHead(num_labels=3, param_dtype=jnp.bfloat16)
    wide = jnp.zeros((1, 1, 4095))
    params = head.init(jax.random.key(1), wide, jnp.ones((1, 1), bool))
    kernel = params["params"]["kernel"]
    self.assertEqual((kernel.shape, kernel.dtype), ((4095, 3), jnp.bfloat16))
    # 1 / √(4095 + 1) = 1 / 64.
    spread = jnp.std(kernel.astype(jnp.float32))
    np.testing.assert_allclose(spread, 1 / 64, rtol=0.05)

  def test_wrong_shapes_are_refused(self):
    with self.assertRaises(AssertionError):
      heads.LabelHead().init(
        jax.random.key(0), jnp.zeros((2, 3, 4)), jnp.ones((2, 4), bool)
      )
