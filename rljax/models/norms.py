"""Norms over the last axis, in float32 whatever the model's dtype."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

Array = jax.Array


class RMSNorm(nn.Module):
  """Computes x / √(mean(x²) + ε) * scale, in float32.

  Attributes:
    epsilon: ε.
    param_dtype: of a new scale.
    plus_one: whether the factor is 1 + scale, with a scale that starts at 0.
  """

  epsilon: float
  param_dtype: Any
  plus_one: bool = False

  @nn.compact
  def __call__(self, x: Array) -> Array:
    start = nn.initializers.zeros if self.plus_one else nn.initializers.ones
    scale = self.param("scale", start, (x.shape[-1],), self.param_dtype)
    y = x.astype(jnp.float32)
    y *= jax.lax.rsqrt(
      jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.epsilon
    )
    scale = jnp.expand_dims(scale.astype(jnp.float32), range(x.ndim - 1))
    if self.plus_one:
      scale += 1
    return (y * scale).astype(x.dtype)


class LayerNorm(nn.Module):
  """Computes (x - mean(x)) / √(var(x) + ε) * scale + bias, in float32.

  Attributes:
    epsilon: ε.
    param_dtype: of new parameters.
    use_bias: whether there is a bias.
  """

  epsilon: float
  param_dtype: Any
  use_bias: bool = True

  @nn.compact
  def __call__(self, x: Array) -> Array:
    shape = (x.shape[-1],)
    scale = self.param("scale", nn.initializers.ones, shape, self.param_dtype)
    y = x.astype(jnp.float32)
    y -= jnp.mean(y, axis=-1, keepdims=True)
    y *= jax.lax.rsqrt(
      jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.epsilon
    )
    widen = lambda p: jnp.expand_dims(p.astype(jnp.float32), range(x.ndim - 1))
    y *= widen(scale)
    if self.use_bias:
      zeros = nn.initializers.zeros
      y += widen(self.param("bias", zeros, shape, self.param_dtype))
    return y.astype(x.dtype)
