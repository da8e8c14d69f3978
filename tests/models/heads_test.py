"""Tests of the value and reward heads."""

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


class RewardHeadTest(parameterized.TestCase):
  def test_reads_the_last_real_token(self):
    hidden = jnp.arange(8.0).reshape(1, 4, 2).repeat(5, axis=0)
    mask = (
      jnp.array(
        [[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 1, 1], [0, 1, 1, 0], [0, 0, 0, 0]]
      )
      > 0
    )
    scores = heads.RewardHead().apply(
      _variables([1.0, 10.0], 0.5), hidden, mask
    )
    # Token t holds (2t, 2t + 1): 22t + 10.5. No token: the bias.
    np.testing.assert_allclose(scores, [76.5, 32.5, 76.5, 54.5, 0.5])
    self.assertEqual(scores.dtype, jnp.float32)

  def test_padding_is_inert_even_if_nan(self):
    hidden = jnp.ones((2, 3, 2)).at[0, 2].set(jnp.nan).at[1].set(jnp.nan)
    mask = jnp.array([[True, True, False], [False, False, False]])
    variables = _variables([1.0, 2.0], 0.0)

    def total(variables, hidden):
      return jnp.sum(heads.RewardHead().apply(variables, hidden, mask))

    value, gradients = jax.value_and_grad(total, argnums=(0, 1))(
      variables, hidden
    )
    np.testing.assert_allclose(value, 3.0)
    np.testing.assert_array_equal(gradients[1][0], [[0, 0], [1, 2], [0, 0]])
    np.testing.assert_array_equal(gradients[1][1], 0)
    np.testing.assert_array_equal(
      gradients[0]["params"]["dense"]["kernel"], [[1], [1]]
    )

  def test_wrong_shapes_are_refused(self):
    with self.assertRaises(AssertionError):
      heads.RewardHead().init(
        jax.random.key(0), jnp.zeros((2, 3, 4)), jnp.ones((2, 4), bool)
      )
