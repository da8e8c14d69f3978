"""Where a run keeps the frozen weights that its adapters are beside."""

import weakref
from collections.abc import Callable
from typing import Any

import jax

from rljax.distributed import compiled, meshes
from rljax.models import lora

Tree = Any


class Frozen:
  """Places frozen weights on a mesh once, however often they are asked for.

  A policy that learns by adapters and its reference are then the same arrays.
  """

  def __init__(self):
    self._known: dict[int, tuple[weakref.ref, weakref.ref]] = {}

  def place(self, tree: Tree, shardings: Tree) -> Tree:
    """As `meshes.place`, but for the frozen weights of a `lora.Adapted`."""
    learnt, frozen = lora.split(tree)
    if frozen is None:
      return meshes.place(tree, shardings)
    places, of_frozen = lora.split(shardings)
    frozen = jax.tree.map(self._one, frozen, of_frozen)
    return lora.join(meshes.place(learnt, places), frozen)

  def _one(self, leaf, sharding):
    source, placed = self._known.get(id(leaf), (None, None))
    if source is not None and source() is leaf:
      array = placed()
      if array is not None and array.sharding == sharding:
        return array
    array = meshes.place(leaf, sharding)
    known = weakref.ref(array)
    self._known[id(leaf)] = weakref.ref(leaf), known
    self._known[id(array)] = known, known
    return array


class Program:
  """A compiled `(state, ...) -> (state, others)` that leaves the frozen alone.

  The frozen weights of the state are arguments that are neither donated nor
  returned: others may hold the same arrays.
  """

  def __init__(
    self,
    name: str,
    function: Callable[..., Any],
    shardings: Tree,
    **jit_options: Any,
  ):
    def adapted(state, frozen, *args):
      state, others = function(lora.join(state, frozen), *args)
      return lora.learnt(state), others

    self._program = compiled.Compiled(
      name,
      adapted,
      **{
        "donate_argnums": 0,
        "out_shardings": (lora.learnt(shardings), None),
        **jit_options,
      },
    )

  def __getattr__(self, name):
    return getattr(self._program, name)

  def compile(self, state: Tree, *args: Any) -> Any:
    """As `compiled.Compiled.compile`."""
    return self._program.compile(*lora.split(state), *args)

  def __call__(self, state: Tree, *args: Any) -> tuple[Tree, Any]:
    learnt, frozen = lora.split(state)
    learnt, others = self._program(learnt, frozen, *args)
    return lora.join(learnt, frozen), others
