"""Dense layers and tables of vectors, as the config of a model has them.

A config holds `dtype`, `param_dtype` and `initializer_range`.
"""

import math
from typing import Any

import jax
from flax import linen as nn

from rljax.distributed import planning

Array = jax.Array


def dense(
  config: Any,
  features: int,
  use_bias: bool = True,
  *,
  into_residual: bool = False,
) -> nn.Dense:
  """Returns a dense layer.

  Args:
    config: of the model.
    features: width of what it computes.
    use_bias: whether it has a bias.
    into_residual: whether its output is added to the residual stream: its new
      weights are then smaller, by the square root of twice `num_layers`.
  """
  scale = config.initializer_range
  if into_residual:
    scale /= math.sqrt(2 * config.num_layers)
  return nn.Dense(
    features,
    use_bias=use_bias,
    dtype=config.dtype,
    param_dtype=config.param_dtype,
    kernel_init=nn.initializers.normal(scale),
    dot_general=_merged if planning.machine() == "cpu" else None,
  )


def _merged(left: Array, right: Array, dimensions: Any, **options: Any):
  """As `jax.lax.dot_general`, with rows and positions as one dimension.

  The gradient of a kernel sums over both. For sums over two dimensions XLA
  copies the activations transposed on a CPU; over one it reads them as they
  lie. The bits are the same.
  """
  if left.ndim > 2 and dimensions == (((left.ndim - 1,), (0,)), ((), ())):
    rows = left.reshape(-1, left.shape[-1])
    dimensions = ((1,), (0,)), ((), ())
    found = jax.lax.dot_general(rows, right, dimensions, **options)
    return found.reshape(*left.shape[:-1], right.shape[1])
  return jax.lax.dot_general(left, right, dimensions, **options)


def embed(config: Any, rows: int, width: int) -> nn.Embed:
  """Returns a table of `rows` vectors of a width."""
  return nn.Embed(
    rows,
    width,
    param_dtype=config.param_dtype,
    embedding_init=nn.initializers.normal(config.initializer_range),
  )
