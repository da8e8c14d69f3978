"""Random projections of gradients, by which two of them are compared.

A check that compares gradients needs no second tree of them beside the state:
the distance of two arrays is, to some percent, that of their projections, and
those are small enough to be kept of every gradient.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from rljax.training import rounding

Tree = Any

# Axes that are longer are projected to so many numbers.
WIDTH = 128


def sketch(tree: Tree) -> Tree:
  """Projects the last two axes of every leaf to at most 128 numbers each.

    y = x S / √m,   S of shape [n, m] and independent signs, E |y|² = |x|²

  Linear: the sketch of a difference is the difference of sketches. The signs
  are the same in every call. Products keep all bits of what they project, so
  that equal gradients have equal sketches and other ones do not.

  Args:
    tree: float arrays.

  Returns:
    The same tree of float32 arrays.

  Source:
    Achlioptas (2003), "Database-friendly random projections".
  """
  return jax.tree.map(_project, tree)


def _project(x):
  chex.assert_type(x, float)
  x = x.astype(jnp.float32)
  for axis in range(max(0, x.ndim - 2), x.ndim):
    if x.shape[axis] > WIDTH:
      signs = _signs(x.shape[axis])
      high = jax.lax.Precision.HIGHEST
      x = jnp.tensordot(x, signs, (axis, 0), precision=high)
      x = jnp.moveaxis(x, -1, axis) / np.sqrt(np.float32(WIDTH))
  return x


def _signs(size):
  """Signs `[size, 128]` by a hash of their places."""
  sign = rounding.hashed(jnp.arange(size * WIDTH, dtype=jnp.uint32)) & 1
  return 1 - 2 * sign.astype(jnp.float32).reshape(size, WIDTH)


def relative_gap(tree: Tree, other: Tree) -> float:
  """Returns `|a - b| / |a|` over all leaves together, one after the other.

  Args:
    tree: float arrays, such as sketches.
    other: likewise, with the same leaves.
  """
  square = lambda x: float(jnp.sum(jnp.square(jnp.asarray(x, jnp.float32))))
  pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True)
  total = difference = 0.0
  for a, b in pairs:
    total += square(a)
    difference += square(a - b)
  return (difference / max(total, 1e-30)) ** 0.5
