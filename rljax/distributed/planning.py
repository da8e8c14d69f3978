"""Plans a run: what it would compile and hold, without its devices or weights.

Within `plan`, the doors to the devices answer for a target that is not there:
`hf.load` gives `Absent` arrays for weights, `meshes.make` takes the devices of
the target, `meshes.place` gives `Absent` arrays with their shardings, and a
`compiled.Compiled` compiles, records itself and answers `Absent` arrays. A
script runs as it is, two steps far:

  with planning.plan(devices) as found:
    main()
  found.programs
"""

import contextlib
import dataclasses
import math
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

Tree = Any

# Steps of a loop that a plan follows: the first may evaluate, the second is as
# most are.
STEPS = 2
# Larger arrays of zeros than these are not made.
_LARGEST_READ = 2**31
_NOWHERE = object()
_OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "Ran out of memory", "out of memory")


class Absent(jax.ShapeDtypeStruct):
  """An array that is not there: shape, dtype and sharding.

  A script that reads it on the host finds zeros; a single number is one, to be
  divided by, and a truth value True, so that responses have tokens and an end.
  """

  def __array__(self, dtype=None, copy=None):
    size = math.prod(self.shape) * np.dtype(self.dtype).itemsize
    if size > _LARGEST_READ:
      raise ValueError(
        f"A plan has no array of {size / 2**30:.1f} GB for a script to read on "
        "the host."
      )
    is_one = not self.shape or np.dtype(self.dtype) == bool
    return (np.ones if is_one else np.zeros)(self.shape, dtype or self.dtype)

  def __getitem__(self, index):
    return np.asarray(self)[index]

  def __iter__(self):
    return iter(np.asarray(self))

  def __float__(self):
    return float(np.asarray(self))

  def __int__(self):
    return int(np.asarray(self))

  def sum(self, *args, **kwargs):
    """Sums what code on the host reads."""
    return np.asarray(self).sum(*args, **kwargs)

  def tolist(self):
    """Returns lists of what code on the host reads."""
    return np.asarray(self).tolist()

  @property
  def nbytes(self) -> int:
    """Bytes of the whole array."""
    return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclasses.dataclass(eq=False)
class Program:
  """One compiled program of a plan.

  Attributes:
    name: of its `Compiled`.
    seconds: that it took to compile.
    memory: bytes on a device by part: "argument", "output", "temporary",
      "alias" and "code"; empty where it did not compile.
    error: why it did not fit, in the compiler's words; else "".
    details: what the plan's `inspect` made of it.
    beside: the most bytes on a device that lay beside its arguments when it was
      called.
    calls: how often each phase called it: "before" the first step, or a step's
      number.
  """

  name: str
  seconds: float
  memory: dict[str, int]
  error: str
  details: Any
  beside: int = 0
  calls: dict[str | int, int] = dataclasses.field(default_factory=dict)

  @property
  def peak(self) -> int:
    """Bytes that a device holds while it runs, with what lies beside it."""
    m = self.memory
    if not m:
      return 0
    own = m["argument"] + m["output"] - m["alias"] + m["temporary"] + m["code"]
    return own + self.beside


class Plan:
  """What a planned script has compiled so far; made by `plan`.

  Attributes:
    devices: of the target, or None for those that are there.
    num_layers: of every language model, in place of its own; None keeps that.
    tokenizer: a name whose tokenizer stands in where a model has none.
    programs: in the order in which they were compiled.
    depths: layers of each model that was loaded or made, by its own config.
  """

  def __init__(self, devices, inspect, num_layers, tokenizer, only, compiles):
    """See `plan`."""
    self._only, self._compiles = tuple(only), compiles
    self.devices = devices
    self.num_layers = num_layers
    self.tokenizer = tokenizer
    self.programs: list[Program] = []
    self.depths: list[int] = []
    self._inspect = inspect
    self._phase: str | int = "before"
    self._placed: dict[int, weakref.ref] = {}

  def begins(self, step: int) -> None:
    """Tells that what is called from now on belongs to a step."""
    self._phase = step

  def absent(self, tree: Tree, shardings: Tree) -> Tree:
    """Returns arrays on the target: shapes and dtypes with these shardings."""

    def one(leaf, sharding):
      is_array = hasattr(leaf, "dtype")
      leaf = _described(leaf if is_array else np.asarray(leaf))
      array = Absent(leaf.shape, leaf.dtype, sharding=sharding)
      self._placed[id(array)] = weakref.ref(array)
      return array

    return jax.tree.map(one, tree, shardings)

  def compile(
    self, name: str, jitted: Any, args: Sequence[Tree], out_shardings: Tree
  ) -> Callable[..., Tree]:
    """Compiles a jitted function for the target, and records it.

    Args:
      name: of the program.
      jitted: from `jax.jit`.
      args: of the call; arrays may be absent.
      out_shardings: that the jitted function was given, or None.

    Returns:
      A function of such arguments that answers absent arrays.
    """
    start = time.perf_counter()
    traced = jitted.trace(*jax.tree.map(_described, tuple(args)))
    lowered = traced.lower()
    if self._only and name not in self._only:
      return _Planned(self, None, None, lowered, out_shardings)
    executable, error = None, ""
    try:
      executable = None
      if self._compiles:
        executable = lowered.compile(compiler_options())
    except jax.errors.JaxRuntimeError as raised:
      if not any(text in str(raised) for text in _OUT_OF_MEMORY):
        raise
      error = str(raised)
    seconds = time.perf_counter() - start
    program = Program(
      name=name,
      seconds=seconds,
      memory=_memory(executable),
      error=error,
      details=self._inspect(traced, executable, args),
    )
    self.programs.append(program)
    return _Planned(self, program, executable, lowered, out_shardings)

  def called(self, program: Program, args: Sequence[Tree]) -> None:
    """Records a call, and what lies on a device beside its arguments."""
    own = {id(leaf) for leaf in jax.tree.leaves(args)}
    beside = 0
    for key, reference in list(self._placed.items()):
      array = reference()
      if array is None:
        del self._placed[key]
      elif key not in own:
        beside += device_bytes(array)
    program.beside = max(program.beside, beside)
    program.calls[self._phase] = program.calls.get(self._phase, 0) + 1

  def forget(self, tree: Tree) -> None:
    """Tells that a program has taken arrays over: they are there no longer."""
    for leaf in jax.tree.leaves(tree):
      self._placed.pop(id(leaf), None)


class _Planned:
  """Stands for an executable, and answers absent arrays."""

  def __init__(self, plan, program, executable, lowered, out_shardings):
    self._plan, self._program, self._executable = plan, program, executable
    self._lowered, self._asked = lowered, out_shardings

  def memory_analysis(self):
    """Returns what the compiler says, or None if it did not compile."""
    return self._executable and self._executable.memory_analysis()

  def __call__(self, *args):
    if self._program is not None:
      self._plan.called(self._program, args)
    donated = jax.tree.leaves(self._lowered.args_info)
    leaves = jax.tree.leaves(args)
    self._plan.forget(
      [x for x, info in zip(leaves, donated, strict=True) if info.donated]
    )
    shapes = self._lowered.out_info
    if self._executable is not None:
      return self._plan.absent(shapes, self._executable.output_shardings)
    # Not compiled: they lie where it was asked for, or nowhere.
    asked = jax.tree.map(
      lambda x: _NOWHERE if x is None else x,
      self._asked,
      is_leaf=lambda x: x is None,
    )
    return jax.tree.map(
      lambda shape, sharding: (
        self._plan.absent(shape, sharding)
        if sharding is not _NOWHERE
        else Absent(shape.shape, shape.dtype)
      ),
      shapes,
      jax.tree.broadcast(asked, shapes),
    )


_plans: list[Plan] = []  # The one that is being made, if any.


def current() -> Plan | None:
  """Returns the plan that is being made, or None where devices are real."""
  return _plans[-1] if _plans else None


@contextlib.contextmanager
def plan(
  devices: Sequence[Any] | None = None,
  *,
  inspect: Callable[..., Any] = lambda traced, executable, args: None,
  num_layers: int | None = None,
  tokenizer: str = "",
  only: Sequence[str] = (),
  compiles: bool = True,
) -> Iterator[Plan]:
  """Plans what is run inside.

  Args:
    devices: of the target's topology; None takes those that are there, which
      hold nothing either.
    inspect: `(traced, executable, args)` of a program -> its `details`; the
      executable is None where it did not fit, or is not compiled.
    num_layers: of every language model; None keeps its own.
    tokenizer: a model's name, whose tokenizer stands in where there is none.
    only: names of the programs that are looked at; empty: all. The others
      answer as well.
    compiles: whether they are compiled, rather than traced and lowered alone.

  Yields:
    The plan, which fills.
  """
  if _plans:
    raise RuntimeError("A plan is being made already.")
  _plans.append(Plan(devices, inspect, num_layers, tokenizer, only, compiles))
  try:
    yield _plans[-1]
  finally:
    _plans.pop()


def platform() -> str:
  """Returns the kind of machine that programs are compiled for, as JAX does."""
  devices = _plans[-1].devices if _plans else None
  return devices[0].platform if devices else jax.default_backend()


def machine() -> str:
  """Returns the same as "cpu", "gpu" or "tpu", whoever made the GPU."""
  name = platform()
  return "gpu" if name in ("cuda", "rocm") else name


def compiler_options() -> dict[str, str] | None:
  """Returns what the compiler is told for the machine of `platform`.

  XLA's CPU compiler removes the barriers between a forward pass and layers that
  the gradient is to compute again (`jax.checkpoint`), and then computes them
  again at once: it takes the time and saves no memory. It keeps them here.
  """
  if platform() != "cpu":
    return None
  return {"xla_disable_hlo_passes": "cse_barrier_expander"}


def num_layers(own: int) -> int:
  """Returns how many layers a model is made with: its own, unless planned."""
  if not _plans:
    return own
  _plans[-1].depths.append(own)
  return _plans[-1].num_layers or own


def initialise(function: Callable[..., Tree], *args: Any) -> Tree:
  """Calls a function of new parameters, jitted; a plan has their shapes alone.

  Args:
    function: such as the `init` of a module.
    *args: its arguments.
  """
  if not _plans:
    return jax.jit(function)(*args)
  return shapes(jax.eval_shape(function, *args))


def shapes(tree: Tree) -> Tree:
  """Returns the arrays of a tree as absent ones of the host."""
  return jax.tree.map(lambda x: Absent(x.shape, x.dtype), tree)


def device_bytes(leaf: Any) -> int:
  """Returns the bytes that an array takes on one device."""
  shape = leaf.shape
  if getattr(leaf, "sharding", None) is not None:
    shape = leaf.sharding.shard_shape(shape)
  dtype = leaf.dtype
  size = 8 if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key) else None
  return math.prod(shape) * (size or np.dtype(dtype).itemsize)


def _described(leaf):
  """Returns what a program is lowered with: no values, the target's places."""
  if isinstance(leaf, jax.ShapeDtypeStruct):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
  if isinstance(leaf, (jax.Array, np.ndarray, np.generic)):
    # An array of this host, such as a key, goes to wherever the program is.
    dtype = leaf.dtype
    if isinstance(dtype, np.dtype):
      dtype = jax.dtypes.canonicalize_dtype(dtype)
    return jax.ShapeDtypeStruct(leaf.shape, dtype)
  return leaf


def _memory(executable):
  found = executable and executable.memory_analysis()
  if not found:
    return {}
  return {
    "argument": found.argument_size_in_bytes,
    "output": found.output_size_in_bytes,
    "temporary": found.temp_size_in_bytes,
    "alias": found.alias_size_in_bytes,
    "code": found.generated_code_size_in_bytes,
  }
