"""Compiles programs once, and raises an error if they would compile again."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from rljax.distributed import planning

_UNDER_WAY: list[str] = []  # Names of what is being compiled.
_MESHES: list[jax.sharding.Mesh | None] = []  # Of what is being traced.


def is_compiling() -> bool:
  """Returns whether a program is being compiled, in any thread."""
  return bool(_UNDER_WAY)


def mesh() -> jax.sharding.Mesh | None:
  """Returns the mesh of the program that a `Compiled` is tracing, if any.

  It is that of the arguments. A kernel that the compiler cannot split over
  devices asks for it.
  """
  return _MESHES[-1] if _MESHES else None


@contextlib.contextmanager
def _tracing(leaves: list[Any]) -> Iterator[None]:
  """Answers `mesh` with that of some arguments."""
  shardings = (getattr(leaf, "sharding", None) for leaf in leaves)
  found = (
    x.mesh for x in shardings if isinstance(x, jax.sharding.NamedSharding)
  )
  _MESHES.append(next(found, None))
  try:
    yield
  finally:
    _MESHES.pop()


class Compiled:
  """Compiles a function once per set of shapes, and counts compilations.

  Compiling ahead of time shows three things that `jax.jit` hides: how long each
  compilation took, how much memory the program needs, and that an argument
  changed its shape, type or sharding in the middle of a run. After `freeze()`
  the last is an error that names the argument.

  Attributes:
    name: shown in tables and errors.
    compilations: one dict per compilation: seconds, memory in bytes, shapes.
  """

  def __init__(self, name: str, function: Callable[..., Any], **jit_options):
    self.name = name
    self.compilations: list[dict[str, Any]] = []
    self._jitted = jax.jit(function, **jit_options)
    self._out_shardings = jit_options.get("out_shardings")
    self._executables = {}
    self._frozen = False
    self._sizes: set[tuple[int, ...]] = set()

  def freeze(self) -> None:
    """Makes a new set of shapes raise an error instead of compiling."""
    self._frozen = True

  def thaw(self, *sizes: int) -> None:
    """Lets a frozen program compile once more, for data of another size.

    Args:
      *sizes: of the data, such as packed rows; those that it has had before,
        and zeros, change nothing.
    """
    if any(sizes) and sizes not in self._sizes:
      self._sizes.add(sizes)
      self._frozen = False

  def __call__(self, *args):
    return self.compile(*args)(*args)

  def compile(self, *args):
    """Returns the executable for these arguments; compiles it if new."""
    leaves, structure = jax.tree.flatten(args)
    signature = (structure, tuple(map(_signature, leaves)))
    executable = self._executables.get(signature)
    if executable is None:
      if self._frozen and self._executables:
        raise RuntimeError(self._recompilation(args, signature))
      start = time.perf_counter()
      with _tracing(leaves):
        if plan := planning.current():
          executable = plan.compile(
            self.name, self._jitted, args, self._out_shardings
          )
        else:
          executable = self._compile(args)
      self._executables[signature] = executable
      memory = executable.memory_analysis()
      self.compilations.append(
        {
          "name": self.name,
          "seconds": time.perf_counter() - start,
          "argument_bytes": getattr(memory, "argument_size_in_bytes", 0),
          "output_bytes": getattr(memory, "output_size_in_bytes", 0),
          "temporary_bytes": getattr(memory, "temp_size_in_bytes", 0),
        }
      )
    return executable

  def _compile(self, args):
    _UNDER_WAY.append(self.name)
    try:
      return self._jitted.lower(*args).compile(planning.compiler_options())
    finally:
      _UNDER_WAY.remove(self.name)

  def _recompilation(self, args, signature) -> str:
    """Says which arguments differ from the last compiled signature."""
    structure, found = signature
    known_structure, known = list(self._executables)[-1]
    head = f"{self.name} would compile again after warm-up: "
    if structure != known_structure:
      return (
        f"{head}its arguments changed from {known_structure} to {structure}"
      )
    paths = [
      jax.tree_util.keystr(path)
      for path, _ in jax.tree_util.tree_flatten_with_path(args)[0]
    ]
    changes = [
      f"argument {path} was {_describe(was)}, now {_describe(now)}"
      for path, was, now in zip(paths, known, found, strict=True)
      if was != now
    ]
    shown = "; ".join(changes[:5])
    return f"{head}{shown}" + ("; ..." if len(changes) > 5 else "")


def _signature(leaf) -> tuple:
  """Returns shape, type and placement; Python numbers count by type."""
  if isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)):
    return leaf.shape, leaf.dtype, leaf.sharding
  if isinstance(leaf, (np.ndarray, np.generic)):
    return leaf.shape, leaf.dtype, None
  return (), type(leaf), None


def _describe(signature) -> str:
  shape, dtype, sharding = signature
  name = getattr(dtype, "name", None) or getattr(dtype, "__name__", dtype)
  return f"{name}{list(shape)}" + (f" on {sharding}" if sharding else "")
