"""Scalars from hidden states: values per token, rewards per text."""

import math

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

Array = jax.Array


class ValueHead(nn.Module):
  """One number per hidden state: w · h + b, in float32.

  Attributes:
    zero_init: start at w = 0, so that all values start at 0; otherwise w is
      normal with standard deviation 1 / √(D + 1).
  """

  zero_init: bool = True

  @nn.compact
  def __call__(self, hidden: Array) -> Array:
    """`[..., D]` float to `[...]` float32."""
    return _scalar(self.zero_init, hidden)


class RewardHead(nn.Module):
  """One number per text, read at its last real token: w · h + b, in float32.

  Attributes:
    zero_init: as for `ValueHead`.
  """

  zero_init: bool = False

  @nn.compact
  def __call__(self, hidden: Array, mask: Array) -> Array:
    """Scores whole texts.

    Args:
      hidden: `[B, S, D]` float.
      mask: `[B, S]` bool, True at real tokens; padding on either side.

    Returns:
      `[B]` float32. For a row without a real token, the score of the bias
      alone.
    """
    chex.assert_rank([hidden, mask], [3, 2])
    chex.assert_equal_shape_prefix([hidden, mask], 2)
    chex.assert_type(mask, bool)
    length = mask.shape[1]
    last = length - 1 - jnp.argmax(mask[:, ::-1], axis=1)  # [B]
    hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
    hidden = jnp.where(jnp.any(mask, axis=1)[:, None], hidden, 0)
    return _scalar(self.zero_init, hidden)


def _scalar(zero_init: bool, hidden: Array) -> Array:
  """One dense layer to one number, inside a compact method."""
  if zero_init:
    kernel_init = nn.initializers.zeros
  else:
    kernel_init = nn.initializers.normal(1 / math.sqrt(hidden.shape[-1] + 1))
  dense = nn.Dense(1, dtype=jnp.float32, kernel_init=kernel_init, name="dense")
  return dense(hidden)[..., 0]
