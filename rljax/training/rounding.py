"""Numbers that are kept in bfloat16 and change by less than one of its steps.

A bfloat16 has 8 bits of precision: 1.0 is followed by 1.0078. Adam at a
learning rate of 1e-6 never moves such a number if the sum is rounded to the
nearest. Rounded up or down by chance, in proportion to what lies on either
side, it moves by the right amount on average.

The draws depend on the gradient alone, so that a run that was stopped goes on
with the same bits, and no state is needed.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from rljax.models import stacked

Array = chex.Array
Tree = Any

_DROPPED = 16  # Bits of a float32 that a bfloat16 lacks.


def stochastically(x: Array, seed: Array) -> Array:
  """Rounds each number to one of the two bfloat16 beside it.

  A number that is a bfloat16 stays; another is rounded away from 0 with the
  probability (x - below) / (above - below), so that its mean is x.

  Args:
    x: `[...]` float32, finite.
    seed: scalar uint32. The draws are hashes of it and of an element's place:
      they fuse into what computes x, and do not depend on the devices.

  Returns:
    `[...]` bfloat16.

  Source:
    Gupta et al. (2015), "Deep Learning with Limited Numerical Precision",
    section 3.
  """
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
  # A carry out of the bits that are dropped is one step away from 0.
  bits += jax.lax.shift_right_logical(
    hashed(_places(x.shape) ^ seed), np.uint32(_DROPPED)
  )
  high = jax.lax.shift_right_logical(bits, np.uint32(_DROPPED))
  return jax.lax.bitcast_convert_type(high.astype(jnp.uint16), jnp.bfloat16)


def _places(shape: tuple[int, ...]) -> Array:
  """Numbers the elements of an array, modulo 2^32."""
  places, stride = jnp.zeros(shape, jnp.uint32), 1
  for axis in reversed(range(len(shape))):
    along = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    places += along * np.uint32(stride % 2**32)
    stride *= shape[axis]
  return places


def hashed(x: Array) -> Array:
  """Mixes the bits of each uint32: one that differs changes half of them.

  It compiles at once, where a generator of many numbers takes its time.

  Source:
    Wellons (2018), "Prospecting for Hash Functions": "lowbias32".
  """
  shift = lambda x, by: jax.lax.shift_right_logical(x, np.uint32(by))
  x = (x ^ shift(x, 16)) * np.uint32(0x7FEB352D)
  x = (x ^ shift(x, 15)) * np.uint32(0x846CA68B)
  return x ^ shift(x, 16)


def as_stored(tree: Tree, like: Tree, grads: Tree, *, salt: int) -> Tree:
  """Rounds the float32 arrays of a tree that another tree keeps in bfloat16.

  Args:
    tree: arrays.
    like: arrays or shapes with the dtypes to have.
    grads: arrays on which the draws depend.
    salt: 0 or 1, for two trees that are rounded by the same gradients.

  Returns:
    `tree`, of which all other arrays are the same.
  """
  arrays, structure = jax.tree.flatten(tree)
  dtypes = [x.dtype for x in jax.tree.leaves(like)]
  if all(x.dtype == dtype for x, dtype in zip(arrays, dtypes, strict=True)):
    return tree
  norm = optax.global_norm(in_float32(grads))
  seed = hashed(jax.lax.bitcast_convert_type(norm, jnp.uint32))
  return structure.unflatten(
    x
    if x.dtype == dtype
    else stochastically(x, hashed(seed + np.uint32(2 * place + salt)))
    for place, (x, dtype) in enumerate(zip(arrays, dtypes, strict=True))
  )


def in_float32(tree: Tree) -> Tree:
  """Widens the bfloat16 arrays of a tree."""
  return jax.tree.map(
    lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, tree
  )


def stored(
  transform: optax.GradientTransformation, dtype: Any
) -> optax.GradientTransformation:
  """Makes an optimizer compute in float32, and keep its moments in a dtype.

  Args:
    transform: any optimizer.
    dtype: of the arrays of two dimensions or more in its state, that of layers
      in a stack left out. bfloat16 ones are rounded by `stochastically`: a
      second moment that decays by a thousandth would otherwise never fall.

  Returns:
    The same for gradients and parameters in float32 or bfloat16; its updates
    are float32.
  """

  def kept(keys, x):
    ndim = stacked.own_ndim(stacked.path_of(keys), x)
    is_moment = x.dtype == jnp.float32 and ndim > 1
    return x.astype(dtype if is_moment else x.dtype)

  def init(params):
    state = transform.init(in_float32(params))
    return jax.tree_util.tree_map_with_path(kept, state)

  def update(grads, state, params=None):
    wide = None if params is None else in_float32(params)
    updates, new = transform.update(in_float32(grads), in_float32(state), wide)
    return updates, as_stored(new, state, grads, salt=1)

  return optax.GradientTransformation(init, update)
