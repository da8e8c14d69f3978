"""Where activations lie on the mesh of a program.

The compiler carries shardings from parameters to activations as it likes: of a
model whose parameters are split over `fsdp` it also splits the width of the
residual stream, and then sends partial sums of every layer's activations, for
each row, instead of the layer's parameters once. A model says here, in the
passes over whole rows, that rows lie over `data` x `fsdp`, and heads, the
feed-forward layer and the vocabulary over `tensor`.

The mesh is that of the program that a `compiled.Compiled` is tracing. Without
one, or with one device, nothing is said.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rljax.distributed import compiled, meshes

Array = jax.Array

_FREE: list[bool] = []  # Of what is being traced.


@contextlib.contextmanager
def left_to_compiler() -> Iterator[None]:
  """Says nothing of what is traced inside, such as a sampler's prompts.

  These are read once, outside of any loop, and no gradient bounds how many
  layers are gathered at a time: all of them would lie beside each other.
  """
  _FREE.append(True)
  try:
    yield
  finally:
    _FREE.pop()


def rows(x: Array, tensor: int | None = None) -> Array:
  """Keeps the rows of activations over `data` x `fsdp`.

  Args:
    x: `[B, ..., n]` float, with three dimensions or more; `[B, n]`, a token of
      each row, stays as it is, for a sampler gathers no parameters for a token.
    tensor: a dimension that lies over `tensor`; None: there is none.

  Returns:
    The same array. Rows that the devices cannot share evenly are left to the
    compiler, and so is a dimension.
  """
  mesh = _several()
  if mesh is None or x.ndim < 3 or _FREE:
    return x
  if x.shape[0] % meshes.num_batch_shards(mesh):
    return x
  spec = [meshes.BATCH_AXES, *[None] * (x.ndim - 1)]
  if tensor is not None and x.shape[tensor] % mesh.shape["tensor"] == 0:
    spec[tensor] = "tensor"
  return _constrain(x, mesh, PartitionSpec(*spec))


def gathered(x: Array, tensor: int, dtype: Any) -> Array:
  """Gathers a matrix over `fsdp` here, rather than in each round of a loop.

  Args:
    x: `[m, n]` float parameter, which is read in another dtype from here on.
    tensor: its dimension that lies over `tensor`; where these devices do not
      divide it, the other one does.
    dtype: in which it is read, and sent over the links.

  Returns:
    The matrix rounded to `dtype`, but in its own dtype, so that its gradient
    adds up in that. Where `fsdp` is one device, the matrix itself.
  """
  mesh = _several()
  if mesh is None or mesh.shape["fsdp"] == 1:
    return x
  if x.shape[tensor] % mesh.shape["tensor"]:
    tensor = 1 - tensor
  axes = [None, None]
  axes[tensor] = "tensor"
  return _gathered(x, mesh, PartitionSpec(*axes), np.dtype(dtype))


def share(num_rows: int, width: int) -> tuple[int, int]:
  """Returns the rows and the width of `rows(x, tensor=-1)` on a device."""
  mesh = _several()
  if mesh is None:
    return num_rows, width
  return (
    max(num_rows // meshes.num_batch_shards(mesh), 1),
    -(-width // mesh.shape["tensor"]),
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gathered(x, mesh, spec, dtype):
  return _constrain(x.astype(dtype), mesh, spec).astype(x.dtype)


def _forward(x, mesh, spec, dtype):
  return _gathered(x, mesh, spec, dtype), None


def _backward(mesh, spec, dtype, _, cotangent):
  del mesh, spec, dtype  # What reads it rounds it to the same numbers.
  return (cotangent,)


_gathered.defvjp(_forward, _backward)


def _several() -> Mesh | None:
  """The mesh of the program that is being traced, if it has several devices."""
  mesh = compiled.mesh()
  if mesh is None or mesh.size == 1 or set(meshes.AXES) - set(mesh.shape):
    return None
  return mesh


def _constrain(x, mesh, spec):
  return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))
