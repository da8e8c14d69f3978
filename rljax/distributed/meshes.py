"""Makes the mesh of devices, and shards the arrays of a run over it.

The axes are `data` (copies of the parameters, each with its part of the
batch), `fsdp` (the batch and the parameters are both split) and `tensor` (the
parameters alone are split). Nothing else in the code builds a mesh.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rljax.distributed import planning, processes, stored

AXES = ("data", "fsdp", "tensor")

# What optax's Adafactor keeps of a matrix, under the matrix's own path.
_FACTORED = re.compile(r"(^|/)v(_row|_col)?/")
BATCH_AXES = ("data", "fsdp")

Tree = Any
Rules = Sequence[tuple[str, PartitionSpec]]


def make(spec: str = "data:-1") -> Mesh:
  """Makes the mesh that a flag such as `--mesh=data:-1,tensor:2` describes.

  The axes are automatic ones: the compiler, not the code, carries shardings
  through a contraction.

  Args:
    spec: `axis:size` pairs separated by commas, in any order. An axis left out
      has size 1; one size may be -1, "the devices that are left".

  Returns:
    A mesh with all of `AXES`, in that order. One process may ask for fewer
    devices than it has; the rest idle, with a warning.

  Raises:
    ValueError: if the text does not parse, or does not fit the devices.
  """
  sizes = _parse(spec)
  plan = planning.current()
  devices = (plan and plan.devices) or jax.devices()
  num_devices = len(devices)
  given = math.prod(size for size in sizes.values() if size != -1)
  if -1 in sizes.values():
    if num_devices % given:
      raise ValueError(
        f"--mesh={spec} fixes {given} devices, which does not divide the "
        f"{num_devices} found; choose sizes whose product divides "
        f"{num_devices}."
      )
    sizes = {
      axis: num_devices // given if size == -1 else size
      for axis, size in sizes.items()
    }
  total = math.prod(sizes.values())
  if total > num_devices:
    raise ValueError(
      f"--mesh={spec} asks for {total} devices, but {num_devices} were found; "
      "lower a size, or write -1 for as many as there are."
    )
  if total < num_devices:
    if jax.process_count() > 1:
      raise ValueError(
        f"--mesh={spec} asks for {total} devices, but the "
        f"{jax.process_count()} processes hold {num_devices}; with several "
        "processes every device must be used."
      )
    logging.warning(
      "--mesh=%s leaves %d of %d devices idle.",
      spec,
      num_devices - total,
      num_devices,
    )
  return jax.make_mesh(
    tuple(sizes.values()),
    AXES,
    axis_types=(AxisType.Auto,) * len(AXES),
    devices=devices[:total],
  )


def shardings(tree: Tree, rules: Rules, mesh: Mesh) -> Tree:
  """Returns a sharding per array, by the first rule that its path matches.

  A path joins the keys with "/": `decoder/layers_0/attention/query/kernel`. The
  state of an optimizer has the parameters' paths after a few keys of its own
  (`0/mu/decoder/...`), so the same rules place it like the parameters.

  Args:
    tree: arrays, or anything with a shape: parameters or an optimizer state.
    rules: `(pattern, PartitionSpec)` pairs; the pattern is searched for
      anywhere in the path, and must not be anchored at the start.
    mesh: from `make`.

  Returns:
    `tree` with a `NamedSharding` instead of every array. Scalars, sums over
    rows or columns of a matrix in the state of Adafactor, and arrays that no
    rule matches are replicated.

  Raises:
    ValueError: if a rule cannot hold for an array, naming the array, the
      dimension and the axis.
  """
  compiled = []
  for pattern, spec in rules:
    if pattern.startswith("^"):
      raise ValueError(
        f'the sharding rule "{pattern}" is anchored at the start of the path, '
        'where optimizer states have keys of their own; leave out the "^".'
      )
    unknown = {axis for entry in spec for axis in _axes(entry)} - set(AXES)
    if unknown:
      raise ValueError(
        f'the sharding rule "{pattern}" names the axis '
        f"{sorted(unknown)[0]!r}, which is none of {', '.join(AXES)}."
      )
    compiled.append((re.compile(pattern), spec))

  def place_one(keys, leaf):
    path = jax.tree_util.keystr(keys, simple=True, separator="/")
    shape = np.shape(leaf)
    spec = PartitionSpec()
    if shape:
      for pattern, candidate in compiled:
        if pattern.search(path):
          is_part = len(candidate) > len(shape) and _FACTORED.search(path)
          spec = PartitionSpec() if is_part else candidate
          break
    _check_spec(path, shape, spec, mesh)
    return NamedSharding(mesh, spec)

  return jax.tree_util.tree_map_with_path(place_one, tree)


def place(tree: Tree, shardings: Tree) -> Tree:
  """Places every array by its sharding.

  With several processes, each must hold the whole of every array (as after
  reading one file, or drawing from one seed) or an array that already spans
  the processes.

  Args:
    tree: numpy or jax arrays, typed keys among them; of arrays on disk, see
      `stored.Stored`, a host reads the parts of its devices alone.
    shardings: one sharding for all, or a tree of them with the same structure.

  Returns:
    The tree with jax arrays, each with its sharding.
  """
  if isinstance(shardings, jax.sharding.Sharding):
    one = shardings
    shardings = jax.tree.map(lambda _: one, tree)
  if plan := planning.current():
    return plan.absent(tree, shardings)
  tree = jax.tree.map(_read_parts, tree, shardings)
  if jax.process_count() == 1:
    return jax.device_put(tree, shardings)
  return jax.tree.map(_place_global, tree, shardings)


def replicate(tree: Tree, mesh: Mesh) -> Tree:
  """Copies every array to every device of the mesh."""
  return place(tree, NamedSharding(mesh, PartitionSpec()))


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of a batch: its rows over `data` and `fsdp`."""
  return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def cache_splitter(mesh: Mesh) -> Callable[[Tree], Tree]:
  """Returns a function that keeps a cache sharded over a mesh.

  Under `jax.jit` it constrains the compiler: rows lie over `data` and `fsdp`,
  heads over `tensor`.

  Args:
    mesh: from `make`.

  Returns:
    A function of a tree, such as the cache of `models.attention`: arrays
    `[rows, heads, ...]` with three or four dimensions, `[rows, layers, heads,
    ...]` with five, `[rows]`,
    `[rows, length]` and numbers. It raises ValueError where rows or heads do
    not divide.
  """

  def sharding_of(keys, leaf):
    axes = (BATCH_AXES, "tensor") if leaf.ndim > 2 else (BATCH_AXES,)
    if leaf.ndim > 4:
      axes = (BATCH_AXES, None, "tensor")
    spec = PartitionSpec(*axes[: leaf.ndim])
    path = jax.tree_util.keystr(keys, simple=True, separator="/")
    _check_spec(f"cache/{path}", leaf.shape, spec, mesh)
    return NamedSharding(mesh, spec)

  def split(cache):
    shardings = jax.tree_util.tree_map_with_path(sharding_of, cache)
    return jax.lax.with_sharding_constraint(cache, shardings)

  return split


def logits_splitter(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
  """Returns a function that keeps a sampler's logits sharded over a mesh.

  Under `jax.jit` it constrains `[rows, V]`: rows lie over `data` and `fsdp`,
  the vocabulary over `tensor`. Otherwise every device may compute all rows.

  Args:
    mesh: from `make`.

  Returns:
    A function of the logits. It raises ValueError where rows or vocabulary do
    not divide.
  """
  spec = PartitionSpec(BATCH_AXES, "tensor")

  def split(logits):
    _check_spec("logits", logits.shape, spec, mesh)
    sharding = NamedSharding(mesh, spec)
    return jax.lax.with_sharding_constraint(logits, sharding)

  return split


def num_batch_shards(mesh: Mesh) -> int:
  """Returns how many devices of `data` x `fsdp` share a batch's rows."""
  return mesh.shape["data"] * mesh.shape["fsdp"]


def check_divisible(size: int, mesh: Mesh, name: str) -> None:
  """Raises ValueError if `data` x `fsdp` cannot share `size` rows evenly.

  Args:
    size: number of rows.
    mesh: from `make`.
    name: what to change, such as "--batch_size".
  """
  num_shards = num_batch_shards(mesh)
  if size % num_shards:
    raise ValueError(
      f"{name} must be divisible by the {num_shards} devices of data x fsdp, "
      f"got {size}; change it or --mesh."
    )


def shared_size(size: int, mesh: Mesh) -> int:
  """Returns the most rows up to `size` that `data` x `fsdp` share evenly.

  It is a row for each of them where `size` is less.
  """
  num_shards = num_batch_shards(mesh)
  return max(size // num_shards, 1) * num_shards


def shard_batch(batch: Tree, mesh: Mesh) -> Tree:
  """Splits the rows of a batch over the devices of `data` x `fsdp`.

  Every process passes the whole batch and keeps its own rows of it, so what a
  step sees does not depend on how many processes there are.

  Args:
    batch: arrays `[B, ...]`; arrays without a dimension are replicated.
    mesh: from `make`.

  Returns:
    The same tree as jax arrays that span the mesh.

  Raises:
    ValueError: if B is not divisible by the devices that share it.
  """
  num_shards = num_batch_shards(mesh)

  def sharding_of(keys, leaf):
    shape = np.shape(leaf)
    if not shape:
      return NamedSharding(mesh, PartitionSpec())
    if shape[0] % num_shards:
      path = jax.tree_util.keystr(keys, simple=True, separator="/")
      name = f" ({path})" if path else ""
      raise ValueError(
        f"batch of {shape[0]}{name} is not divisible by the {num_shards} "
        "devices of data x fsdp; change --batch_size or --mesh."
      )
    return batch_sharding(mesh)

  return place(batch, jax.tree_util.tree_map_with_path(sharding_of, batch))


def map_batches(
  function: Callable[..., Tree], arrays: Tree, batch_size: int, mesh: Mesh
) -> Tree:
  """Calls a function on rows of arrays, batch by batch, in one shape.

  Args:
    function: takes the rows `[batch_size, ...]` of `arrays`, on the mesh, and
      returns a tree of arrays `[batch_size, ...]`.
    arrays: numpy arrays `[N, ...]`, with N > 0. The last batch is padded with
      rows from the front, whose results are cut off.
    batch_size: rows of a call, which the devices must share evenly.
    mesh: from `make`.

  Returns:
    What `function` returns, for all N rows, as numpy arrays.

  Raises:
    ValueError: if there are no rows.
  """
  (num_rows,) = {len(leaf) for leaf in jax.tree.leaves(arrays)}
  if not num_rows:
    raise ValueError("There are no rows to make batches of.")

  def call(rows):
    batch = jax.tree.map(lambda x: x[rows], arrays)
    return processes.gather(function(shard_batch(batch, mesh)))

  results = [
    call(np.arange(start, start + batch_size) % num_rows)
    for start in range(0, num_rows, batch_size)
  ]
  return jax.tree.map(lambda *x: np.concatenate(x)[:num_rows], *results)


def _read_parts(leaf, sharding):
  """Reads an array on disk to where it will lie; others stay as they are."""
  if not isinstance(leaf, stored.Stored):
    return leaf
  return jax.make_array_from_callback(leaf.shape, sharding, leaf.__getitem__)


def _parse(spec):
  """Returns `{axis: size}` for all of AXES, in their order."""
  sizes = {}
  for pair in spec.split(","):
    axis, colon, size = pair.strip().partition(":")
    try:
      size = int(size)
    except ValueError:
      colon = ""
    if not colon:
      raise ValueError(
        f'--mesh={spec}: "{pair}" is not "axis:size", as in "data:-1,tensor:2".'
      )
    if axis not in AXES:
      raise ValueError(
        f'--mesh={spec}: "{axis}" is not an axis; there are {", ".join(AXES)}.'
      )
    if axis in sizes:
      raise ValueError(f"--mesh={spec} gives {axis} twice.")
    if size < 1 and size != -1:
      raise ValueError(
        f"--mesh={spec}: the size of {axis} must be positive, or -1 for the "
        f"devices that are left; got {size}."
      )
    sizes[axis] = size
  if list(sizes.values()).count(-1) > 1:
    raise ValueError(f"--mesh={spec}: only one size may be -1.")
  return {axis: sizes.get(axis, 1) for axis in AXES}


def _axes(entry):
  """Returns the mesh axes in one entry of a PartitionSpec, as a tuple."""
  if entry is None:
    return ()
  return entry if isinstance(entry, tuple) else (entry,)


def _check_spec(path, shape, spec, mesh):
  """Raises ValueError if an array of this shape cannot be split so."""
  if len(spec) > len(shape):
    raise ValueError(
      f"{path} has {len(shape)} dimensions, but the rule for it splits "
      f"{len(spec)}: {spec}; put a rule of its own before that one."
    )
  for dimension, entry in enumerate(spec):
    axes = _axes(entry)
    num_parts = math.prod(mesh.shape[axis] for axis in axes)
    if shape[dimension] % num_parts:
      raise ValueError(
        f"dimension {dimension} of {path}, of size {shape[dimension]}, is not "
        f"divisible by the {num_parts} devices of {' x '.join(axes)}; change "
        f"{' or '.join(axes)} in --mesh."
      )


def _place_global(leaf, sharding):
  """Places one array on devices of several processes."""
  if isinstance(leaf, jax.Array):
    if not leaf.is_fully_addressable:
      return jax.jit(lambda x: x, out_shardings=sharding)(leaf)
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      data = _place_global(jax.random.key_data(leaf), sharding)
      return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
  leaf = np.asarray(leaf)
  return jax.make_array_from_process_local_data(sharding, leaf, leaf.shape)
