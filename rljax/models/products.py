"""Products in a model's own precision, forwards and backwards."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from rljax.models import stacked

Array = jax.Array


def einsum(equation: str, left: Array, right: Array) -> Array:
  """Computes a product of two arrays, added up and returned in float32.

  With narrower operands the gradient is computed in their precision, too: the
  float32 cotangent of the result is rounded to it first. Otherwise both
  products of the backward pass would be float32 ones, at a fraction of an
  accelerator's speed.

  Args:
    equation: of `jnp.einsum`, with two operands.
    left: float array.
    right: of the same dtype.

  Returns:
    Float32 array.
  """
  if left.dtype == jnp.float32:
    return _product(equation, left, right)
  return _narrow(equation, left, right)


def is_exact(dtype: Any) -> bool:
  """Returns whether products of a dtype read all bits of their operands.

  Products of float32 do on a CPU, and elsewhere where JAX is asked for the
  highest precision: a TPU rounds their operands to bfloat16 otherwise, a GPU
  to TF32.

  Args:
    dtype: of the operands.
  """
  if jnp.dtype(dtype) != jnp.float32:
    return False
  asked = jax.config.jax_default_matmul_precision
  if asked is None:
    return jax.default_backend() == "cpu"
  return asked in ("highest", "float32")


def rounded(x: Array) -> Array:
  """Rounds an array to its own dtype, where a compiler may leave that out.

  XLA keeps the float32 result of a bfloat16 addition that is used in the same
  loop, and whether it is depends on the program: a sampler and a trainer would
  read different numbers. Nothing changes for float32.

  Args:
    x: float array.
  """
  if x.dtype == jnp.float32:
    return x
  info = jnp.finfo(x.dtype)
  return jax.lax.reduce_precision(x, info.nexp, info.nmant)


def narrowed(params: Any, dtype: Any, wide: tuple[str, ...] = ()) -> Any:
  """Converts the parameters that a model only uses in its compute dtype.

  These are the arrays of two and more dimensions in a layer: kernels and
  embeddings. A
  loop that reads them in each round then reads half of the bytes.

  Args:
    params: of one of `rljax.models`.
    dtype: of its computation.
    wide: names in a path, of matrices that it uses in their own precision.

  Returns:
    The same tree; nothing changes where the dtype is that of the parameters.
  """

  def one(path, leaf):
    names = {getattr(key, "key", None) for key in path}
    ndim = stacked.own_ndim(stacked.path_of(path), leaf)
    if ndim < 2 or names & set(wide):
      return leaf
    return leaf.astype(dtype)

  return jax.tree_util.tree_map_with_path(one, params)


def _product(equation, left, right):
  return jnp.einsum(equation, left, right, preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _narrow(equation, left, right):
  return _product(equation, left, right)


def _forward(equation, left, right):
  return _product(equation, left, right), (left, right)


def _backward(equation, operands, cotangent):
  product = functools.partial(jnp.einsum, equation)
  _, pull = jax.vjp(product, *operands)
  return pull(cotangent.astype(operands[0].dtype))


_narrow.defvjp(_forward, _backward)
