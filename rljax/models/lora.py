"""LoRA: low-rank adapters that learn beside frozen weights.

    y = x W + b + s (x A) B,   s = α / r, or α / √r for rsLoRA

A and B are small and learn; W is frozen, in float32, bfloat16 or int8. A model
and its parameters are wrapped, and are used as before:

  loaded = hf.load("smollm2-135m")
  settings = Settings(rank=8, alpha=16, base="smollm2-135m")
  model = Model(loaded.model, settings)
  params = adapt(loaded.model, loaded.params, settings, seed=0)
  hidden = model.apply({"params": params}, ids, mask)

`split` separates what learns from what is frozen, so that a gradient, an
optimizer and a checkpoint hold adapters alone; `merged` is a whole model again.
Parameters may hold an `Adapted` anywhere, beside others that learn, such as the
head of a reward model.

Source: Hu et al. (2021), "LoRA: Low-Rank Adaptation of Large Language Models",
arXiv 2106.09685. rsLoRA: Kalajdzievski (2023), arXiv 2312.03732. Departure:
adapters have no dropout, so that the policy that samples is what learns.
"""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import PartitionSpec

from rljax.distributed import planning, stored
from rljax.models import language_models, stacked, weights

Array = jax.Array
Params = Any
Tree = Any

ALL = "all-linear"
BASE_DTYPES = ("float32", "bfloat16", "int8")
_A, _B, _SCALE = "lora_a", "lora_b", "kernel_scale"


@dataclasses.dataclass(frozen=True)
class Settings:
  """Holds what adapters are like, as adapter_config.json says it.

  Attributes:
    rank: r, the inner width of the two factors.
    alpha: α of the factor of what they add.
    targets: names of dense layers of the blocks, as transformers has them,
      from the right: "q_proj", "mlp.down_proj"; `(ALL,)` for all of them.
    rslora: whether the factor is α / √r, rather than α / r.
    base: the name of the model that they are beside, for `hf.load`.
    digest: of the base, see `digest`; "" where it is not known.
  """

  rank: int
  alpha: float
  targets: tuple[str, ...] = (ALL,)
  rslora: bool = False
  base: str = ""
  digest: str = ""

  def __post_init__(self):
    if self.rank < 1 or not self.alpha > 0:
      raise ValueError(
        f"LoRA needs a positive rank and alpha, got {self.rank} and "
        f"{self.alpha}."
      )

  @property
  def scaling(self) -> float:
    """Factor s of what the adapters add."""
    return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False)
class Adapted:
  """Holds the parameters of a model with adapters; a node of pytrees.

  Attributes:
    lora: nested dict, at the place of each layer its factors `lora_a` `[D, r]`
      and `lora_b` `[r, F]`; {} for none, None where `split` took them out.
    base: the frozen parameters of the model; kernels may be int8.
    scales: for each int8 kernel `[D, F]`, at its place, `kernel_scale` `[F]`.
    scaling: factor s.
  """

  lora: Params
  base: Params
  scales: Params
  scaling: float

  def tree_flatten_with_keys(self):
    names = ("lora", "base", "scales")
    keys = tuple(
      (jax.tree_util.GetAttrKey(name), getattr(self, name)) for name in names
    )
    return keys, self.scaling

  @classmethod
  def tree_unflatten(cls, scaling, children):
    return cls(*children, scaling)


@dataclasses.dataclass(frozen=True)
class Model:
  """A module whose parameters may hold an `Adapted`; else it is the module.

  The adapters are applied beside each dense layer, not merged into it: the
  backward pass then needs no gradient of a whole kernel, and no second copy of
  the weights exists.

  Attributes:
    unadapted: the module itself.
    settings: of the adapters; None where there are none, and the base is
      narrow all the same.
  """

  unadapted: nn.Module
  settings: Settings | None

  def __getattr__(self, name):
    if name.startswith("__"):
      raise AttributeError(name)
    return getattr(self.unadapted, name)

  def apply(self, variables: Mapping[str, Any], *args: Any, **options: Any):
    """Applies the module, as its own `apply` does."""
    params, lora, scales = _collections(variables["params"])
    found = {name: x for name, x in (("lora", lora), ("scales", scales)) if x}
    if not found:
      options_of = {**variables, "params": params}
      return self.unadapted.apply(options_of, *args, **options)
    scaling = _scaling(variables["params"])
    with nn.intercept_methods(functools.partial(_dense, scaling)):
      return self.unadapted.apply(
        {**variables, "params": params, **found}, *args, **options
      )


def _is_adapted(leaf: Any) -> bool:
  return isinstance(leaf, Adapted)


def _collections(params: Params) -> tuple[Params, Params, Params]:
  """The variables of a module: its parameters, adapters and scales."""
  if isinstance(params, Adapted):
    return params.base, params.lora, params.scales
  if not isinstance(params, Mapping):
    return params, None, None
  parts = {name: _collections(x) for name, x in params.items()}
  own = {name: x for name, (x, _, _) in parts.items()}
  lora = {name: x for name, (_, x, _) in parts.items() if x}
  scales = {name: x for name, (_, _, x) in parts.items() if x}
  return own, lora, scales


def _scaling(params: Params) -> float:
  (scaling,) = {
    node.scaling
    for node in jax.tree.leaves(params, is_leaf=_is_adapted)
    if _is_adapted(node)
  }
  return scaling


def _dense(scaling, call, args, kwargs, context):
  """What is called in place of the methods of modules."""
  module = context.module
  if not isinstance(module, nn.Dense) or context.method_name != "__call__":
    return call(*args, **kwargs)
  (x,) = args
  scale = module.get_variable("scales", _SCALE)
  y = call(x) if scale is None else _narrow_dense(module, x, scale)
  a = module.get_variable("lora", _A)
  if a is None:
    return y
  b = module.get_variable("lora", _B)
  low = x.astype(y.dtype) @ a.astype(y.dtype)  # [..., r]
  return y + scaling * (low @ b.astype(y.dtype))


def _narrow_dense(module: nn.Dense, x: Array, scale: Array) -> Array:
  """A dense layer with an int8 kernel: (x Q) * scale + bias."""
  dtype = module.dtype or x.dtype
  kernel = module.get_variable("params", "kernel")
  one_row = lambda v: v.astype(dtype).reshape((1,) * (x.ndim - 1) + (-1,))
  y = (x.astype(dtype) @ kernel.astype(dtype)) * one_row(scale)
  if module.use_bias:
    y = y + one_row(module.get_variable("params", "bias"))
  return y


# Making them.


def layers(
  model: nn.Module, targets: tuple[str, ...] = (ALL,), where: str = "targets"
) -> dict[str, tuple[tuple[str, ...], tuple[int, int]]]:
  """Finds the dense layers that adapters are beside.

  Args:
    model: a language model, or a classifier on one.
    targets: see `Settings`.
    where: what says so, for messages.

  Returns:
    Name in transformers -> (path in the parameters, shape `(D, F)` of the
    kernel), both as in the unrolled model. Experts of a mixture and their
    router are none of them.

  Raises:
    ValueError: if a target is no such layer.
  """
  # Adapters of a classifier are those of its language model.
  config = dataclasses.replace(_config(model), scan_layers=False)
  model = language_models.module(config)
  found = {}
  for name, slot in weights.slots_of(model).items():
    *path, kind = slot.path
    is_router = path[-1] == "gate"
    if path[0].startswith("layers_") and kind == "kernel" and not is_router:
      found[name.removesuffix(".weight")] = tuple(path), slot.whole
  if targets == (ALL,):
    return found
  is_of = lambda name, target: f".{name}".endswith(f".{target}")
  for target in targets:
    if not any(is_of(name, target) for name in found):
      kinds = sorted({name.rpartition(".")[2] for name in found})
      raise ValueError(
        f"{where} names {target!r}, which is no dense layer of the blocks of "
        f"this model ({model.config.to_hf()['model_type']}); it has "
        f"{', '.join(kinds)}, and {ALL} takes all of them."
      )
  return {
    name: place
    for name, place in found.items()
    if any(is_of(name, target) for target in targets)
  }


def adapt(
  model: nn.Module,
  params: Params,
  settings: Settings | None,
  *,
  base_dtype: str = "float32",
  seed: int = 0,
) -> Adapted:
  """Puts new adapters beside the parameters of a language model.

  A is uniform in ±1 / √D, as in PEFT, and B is 0: the model is still the base.

  Args:
    model: a language model.
    params: its parameters, arrays of the host or `stored.Stored`.
    settings: of the adapters; None for none.
    base_dtype: of the frozen weights: "float32" leaves them as they are;
      "bfloat16" rounds matrices; "int8" also quantises the dense layers of the
      blocks, with a scale for each output.
    seed: of A.

  Raises:
    ValueError: if a target is no layer of the model.
  """
  if base_dtype not in BASE_DTYPES:
    raise ValueError(
      f"base_dtype must be one of {', '.join(BASE_DTYPES)}, got {base_dtype!r}."
    )
  lora = {}
  if settings is not None:
    places = layers(model, settings.targets, "--lora_targets").values()
    for number, (path, (width, features)) in enumerate(places):
      bound = 1 / math.sqrt(width)
      draw = np.random.default_rng([seed, number]).uniform
      a = draw(-bound, bound, (width, settings.rank)).astype(np.float32)
      lora[*path, _A] = a
      lora[*path, _B] = np.zeros((settings.rank, features), np.float32)
    lora = stacked.stack(traverse_util.unflatten_dict(lora), _config(model))
    if planning.current():
      lora = planning.shapes(lora)
  base, scales = _frozen(model, params, base_dtype)
  return Adapted(lora, base, scales, settings.scaling if settings else 1.0)


def _config(model):
  """The settings of a language model, or of the one in a classifier."""
  return getattr(model.config, "backbone", model.config)


def _frozen(model, params, base_dtype):
  """The base in its dtype, and the scales of int8 kernels."""
  if base_dtype == "float32":
    return params, {}
  flat, scales = traverse_util.flatten_dict(params), {}
  kernels = set()
  if base_dtype == "int8":
    kernels = {f"{'/'.join(path)}/kernel" for path, _ in layers(model).values()}
  for path, leaf in flat.items():
    name = "/".join(path)
    if kernels.intersection(stacked.layer_paths(name, leaf)):
      flat[path], scales[*path[:-1], _SCALE] = _int8(leaf)
    elif stacked.own_ndim(name, leaf) > 1:
      flat[path] = _converted(leaf, leaf.shape, jnp.bfloat16, lambda x, i: x[i])
  unflatten = traverse_util.unflatten_dict
  return unflatten(flat), unflatten(scales)


def _int8(kernel):
  """A kernel and its scales, wherever it lies."""

  def of(x, layers, columns):
    return quantise(np.asarray(x[*layers, slice(None), columns], np.float32))

  def numbers(x, index):
    *layers, rows, columns = index
    return of(x, layers, columns)[0][..., rows, :]

  def scales(x, index):
    *layers, columns = index
    return of(x, layers, columns)[1]

  *layers, _, columns = kernel.shape
  return (
    _converted(kernel, kernel.shape, np.int8, numbers),
    _converted(kernel, (*layers, columns), np.float32, scales),
  )


def quantise(kernel: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Rounds a kernel to int8 with one scale for each output.

    q = round(W / s),   s_f = max_d |W_df| / 127

  The error is at most s / 2 in each number.

  Args:
    kernel: `[D, F]` float32, or a stack of such.

  Returns:
    `[D, F]` int8 and `[F]` float32, or stacks.
  """
  scale = np.max(np.abs(kernel), axis=-2) / np.float32(127)
  scale = np.where(scale > 0, scale, np.float32(1)).astype(np.float32)
  return np.rint(kernel / scale[..., None, :]).astype(np.int8), scale


def _converted(leaf, shape, dtype, part: Callable[[Any, Any], np.ndarray]):
  """A leaf in another form; one on disk stays there, and one of a plan none."""
  if planning.current():
    return planning.Absent(shape, dtype)
  if isinstance(leaf, stored.Stored):
    read = lambda index: np.asarray(part(leaf, index)).astype(dtype)
    return stored.Stored(shape, dtype, read)
  whole = (slice(None),) * len(shape)
  return part(np.asarray(leaf), whole).astype(dtype)


def digest(params: Params) -> str:
  """Hashes some numbers of every parameter, to tell one base from another.

  Of a matrix it is the first row, rounded to bfloat16; of a stack, that of each
  of its layers.

  Args:
    params: of the base, arrays or `stored.Stored`.

  Returns:
    32 hexadecimal digits; "" in a plan.
  """
  if planning.current():
    return ""
  parts = {}
  for path, leaf in traverse_util.flatten_dict(params, sep="/").items():
    shape = tuple(leaf.shape)[stacked.in_stack(path) :]
    rows = (slice(0, 1),) * (len(shape) - 1) + (slice(None),)
    for i, name in enumerate(stacked.layer_paths(path, leaf)):
      layer = (slice(i, i + 1),) * stacked.in_stack(path)
      parts[name] = shape, leaf[*layer, *rows]
  found = hashlib.sha256()
  for path, (shape, part) in sorted(parts.items()):
    part = np.asarray(part).astype(jnp.bfloat16)
    found.update(f"{path} {shape}\n".encode() + part.tobytes())
  return found.hexdigest()[:32]


# Using them.


def split(tree: Tree) -> tuple[Tree, Tree]:
  """Separates what learns from what is frozen.

  Args:
    tree: of arrays, or what stands for them, and `Adapted` nodes.

  Returns:
    The tree with `{"lora": ...}` in place of each `Adapted`; and one that holds
    the frozen rest of those, and None in all other places. Without such a node
    they are the tree itself and None.
  """
  nodes = jax.tree.leaves(tree, is_leaf=_is_adapted)
  if not any(map(_is_adapted, nodes)):
    return tree, None
  learnt = jax.tree.map(
    lambda x: {"lora": x.lora} if _is_adapted(x) else x,
    tree,
    is_leaf=_is_adapted,
  )
  frozen = jax.tree.map(
    lambda x: dataclasses.replace(x, lora=None) if _is_adapted(x) else None,
    tree,
    is_leaf=_is_adapted,
  )
  return learnt, frozen


def learnt(tree: Tree) -> Tree:
  """Returns the first part of `split`, as a checkpoint has it."""
  return split(tree)[0]


def join(learnt: Tree, frozen: Tree) -> Tree:
  """Makes the tree again that was split."""
  if frozen is None:
    return learnt
  return jax.tree.map(
    lambda f, x: x if f is None else dataclasses.replace(f, lora=x["lora"]),
    frozen,
    learnt,
    is_leaf=lambda x: x is None or _is_adapted(x),
  )


def with_learnt(tree: Tree, learnt: Tree) -> Tree:
  """Puts what a checkpoint holds in the place of what learns of a tree."""
  return join(learnt, split(tree)[1])


def copied(tree: Tree) -> Tree:
  """Copies what learns of a tree, and leaves the frozen arrays as they are."""
  learnt, frozen = split(tree)
  return join(jax.tree.map(jnp.copy, learnt), frozen)


def without_adapters(tree: Tree) -> Tree:
  """Returns the base alone, in the very same arrays."""
  return jax.tree.map(
    lambda x: dataclasses.replace(x, lora={}) if _is_adapted(x) else x,
    tree,
    is_leaf=_is_adapted,
  )


def without_output(params: Params) -> Params:
  """Leaves out an output layer, for a classifier on a language model."""
  if isinstance(params, Adapted):
    return dataclasses.replace(params, base=without_output(params.base))
  return {name: x for name, x in params.items() if name != "lm_head"}


def start(tree: Tree) -> Tree:
  """Returns what adapters that are new are beside, as plain dicts."""

  def one(x):
    if not _is_adapted(x):
      return x
    return {"base": x.base, "scales": x.scales} if x.scales else x.base

  return jax.tree.map(one, tree, is_leaf=_is_adapted)


def merged(tree: Tree, dtype: Any = jnp.float32) -> Tree:
  """Adds the adapters to the kernels that they are beside, under `jit`.

    W' = W + s A B

  Args:
    tree: of parameters with `Adapted` nodes; others stay as they are.
    dtype: of the kernels with adapters, and of those that were int8; the sum is
      taken in float32.

  Returns:
    Plain nested dicts, for the module without a wrapper as well.
  """

  def one(node):
    if not _is_adapted(node):
      return node
    base, lora, scales = (
      traverse_util.flatten_dict(x or {})
      for x in (node.base, node.lora, node.scales)
    )
    for *path, kind in set(base):
      if kind != "kernel":
        continue
      kernel = base[*path, kind]
      scale, a = scales.get((*path, _SCALE)), lora.get((*path, _A))
      if scale is None and a is None:
        continue
      kernel = kernel.astype(jnp.float32)
      if scale is not None:
        kernel = kernel * scale[..., None, :]
      if a is not None:
        product = jnp.matmul(a, lora[*path, _B], precision="highest")
        kernel = kernel + node.scaling * product
      base[*path, kind] = kernel.astype(dtype)
    return traverse_util.unflatten_dict(base)

  return jax.tree.map(one, tree, is_leaf=_is_adapted)


def for_sampling(model: Any, params: Params) -> Params:
  """Returns the parameters that a sampler decodes with, under `jit`.

  Args:
    model: whose parameters they are.
    params: perhaps with an `Adapted`: its adapters are added to its kernels
      once, in the compute dtype, rather than applied for every token.
  """
  if not isinstance(model, Model):
    return params
  return merged(params, model.config.dtype)


def partition_rules(
  rules: tuple[tuple[str, PartitionSpec], ...],
) -> tuple[tuple[str, PartitionSpec], ...]:
  """Returns rules for adapters and scales, to stand before those of a model.

  A lies as the inputs of its kernel do, B and scales as its outputs.

  Args:
    rules: of the model, of which those of kernels count.
  """
  found = []
  for pattern, spec in rules:
    if pattern.endswith("/kernel$") and len(spec) == 2:
      place = pattern.removesuffix("kernel$")
      found += [
        (f"{place}{_A}$", PartitionSpec(spec[0], None)),
        (f"{place}{_B}$", PartitionSpec(None, spec[1])),
        (f"{place}{_SCALE}$", PartitionSpec(spec[1])),
      ]
  return tuple(found)
