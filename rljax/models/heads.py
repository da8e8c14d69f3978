"""Numbers from hidden states: values per token, rewards per text."""

import math
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

Array = jax.Array

# Finite, so that a row without a real token has no NaN.
_MASKED_SCORE = -1e9


class ValueHead(nn.Module):
  """Computes one number per hidden state: w · h + b, in float32.

  Attributes:
    zero_init: start at w = 0, so that all values start at 0; otherwise w is
      normal with standard deviation 1 / √(D + 1).
  """

  zero_init: bool = True

  @nn.compact
  def __call__(self, hidden: Array) -> Array:
    """Maps `[..., D]` float to `[...]` float32."""
    return _scalar(self.zero_init, hidden)


class LabelHead(nn.Module):
  """Computes W h of each text's last real token, in float32.

  W starts normal with standard deviation 1 / √(D + 1).

  Attributes:
    num_labels: L, rows of W; 1 for the reward of a text.
    param_dtype: of new parameters.
  """

  num_labels: int = 1
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, hidden: Array, mask: Array) -> Array:
    """Scores whole texts.

    Args:
      hidden: `[B, S, D]` float.
      mask: `[B, S]` bool, True at real tokens; padding on either side.

    Returns:
      `[B, L]` float32, 0 for a row without a real token.
    """
    chex.assert_rank([hidden, mask], [3, 2])
    chex.assert_equal_shape_prefix([hidden, mask], 2)
    chex.assert_type(mask, bool)
    width, length = hidden.shape[-1], mask.shape[1]
    kernel = self.param(
      "kernel",
      nn.initializers.normal(1 / math.sqrt(width + 1)),
      (width, self.num_labels),
      self.param_dtype,
    )
    last = length - 1 - jnp.argmax(mask[:, ::-1], axis=1)  # [B]
    hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
    hidden = jnp.where(jnp.any(mask, axis=1)[:, None], hidden, 0)
    return hidden.astype(jnp.float32) @ kernel.astype(jnp.float32)


class AttentionPoolingHead(nn.Module):
  """Computes the value of a prompt by attention over its hidden states.

    h = attention(query q, keys H, values H)
    V = max_value σ(w · h + b)

  Everything is in float32. Gradient reaches `hidden`: to keep the model below
  frozen, differentiate by the head's parameters alone.

  Attributes:
    max_value: the largest possible reward; > 0.
    num_heads: attention heads, which share the learned query's D numbers.
    dropout_rate: of the hidden states, and of the pooled one.
    pad_mask: whether padding is left out of the attention. False is the
      published behaviour, in which the value of a prompt depends on the
      length of the others in its batch.

  Source:
    Baheti et al. (2024), "Leftover Lunch: Advantage-based Offline
    Reinforcement Learning for Language Models", in the authors' code. The
    mask is ours, and so are the initial values of the dense layers.
  """

  max_value: float = 1.0
  num_heads: int = 8
  dropout_rate: float = 0.1
  pad_mask: bool = True

  @nn.compact
  def __call__(
    self, hidden: Array, mask: Array, *, deterministic: bool = True
  ) -> Array:
    """Computes the values of prompts.

    Args:
      hidden: `[B, P, D]` float, the last hidden states at prompt tokens.
      mask: `[B, P]` bool, True at real tokens; padding on either side.
      deterministic: whether to leave out dropout; if False, `apply` needs
        `rngs={"dropout": key}`.

    Returns:
      `[B]` float32 in [0, max_value]. A row without a real token gets the value
      of the biases alone.

    Raises:
      ValueError: if the width does not divide by the heads, or `max_value` is
        not positive.
    """
    chex.assert_rank([hidden, mask], [3, 2])
    chex.assert_equal_shape_prefix([hidden, mask], 2)
    chex.assert_type([hidden, mask], [float, bool])
    width = hidden.shape[-1]
    if width % self.num_heads:
      raise ValueError(
        f"num_heads must divide the width {width}, got {self.num_heads}."
      )
    if not self.max_value > 0:
      raise ValueError(f"max_value must be positive, got {self.max_value}.")

    hidden = jnp.asarray(hidden, jnp.float32)
    if self.pad_mask:
      hidden = jnp.where(mask[:, :, None], hidden, 0.0)
    dropout = nn.Dropout(self.dropout_rate, deterministic=deterministic)
    hidden = dropout(hidden)

    def project(name, x):
      x = nn.Dense(width, dtype=jnp.float32, name=name)(x)
      return x.reshape(*x.shape[:-1], self.num_heads, width // self.num_heads)

    query = self.param("query", nn.initializers.normal(1.0), (width,))
    query = project("query_projection", query)  # [H, d]
    keys = project("key_projection", hidden)  # [B, P, H, d]
    values = project("value_projection", hidden)
    scores = jnp.einsum("hd,bphd->bhp", query, keys)
    scores = scores / math.sqrt(width // self.num_heads)
    if self.pad_mask:
      scores = jnp.where(mask[:, None, :], scores, _MASKED_SCORE)
    attention = jax.nn.softmax(scores, axis=-1)
    if self.pad_mask:
      attention = jnp.where(mask[:, None, :], attention, 0.0)
    pooled = jnp.einsum("bhp,bphd->bhd", attention, values)
    pooled = pooled.reshape(-1, width)  # [B, D]
    output = nn.Dense(width, dtype=jnp.float32, name="output_projection")
    pooled = dropout(output(pooled))
    return self.max_value * jax.nn.sigmoid(_scalar(False, pooled))


def _scalar(zero_init: bool, hidden: Array) -> Array:
  """One dense layer to one number, inside a compact method."""
  if zero_init:
    kernel_init = nn.initializers.zeros
  else:
    kernel_init = nn.initializers.normal(1 / math.sqrt(hidden.shape[-1] + 1))
  dense = nn.Dense(1, dtype=jnp.float32, kernel_init=kernel_init, name="dense")
  return dense(hidden)[..., 0]
