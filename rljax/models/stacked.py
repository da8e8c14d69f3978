"""Blocks of one kind lie in stacks, and one `scan` runs them.

A program then holds one block, however many a model has, and compiles in the
time of one. Which layers repeat is read off the settings, see `stretches`: all
of a Llama, every second one of a Gemma 2, every sixth of a Gemma 3. Those of a
stretch lie together, the others by themselves as in a model that is unrolled:

  unrolled   layers_7/mlp/up_proj/kernel                 [D, F]
  stacked    blocks_0_31/layers_0/mlp/up_proj/kernel     [32, D, F]
  by sixes   blocks_0_23/layers_1/mlp/up_proj/kernel     [4, D, F]: 1, 7, 13, 19

The numbers in the name of a stack are those of its first and its last layer, so
that names and shapes alone say which layer is where.
"""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

Array = jax.Array
Params = Any

_STACK = re.compile(r"blocks_(\d+)_(\d+)")
_WITHIN = re.compile(r"(?:^|/)(blocks_(\d+)_(\d+)/layers_(\d+))/")
# Collections of variables that have a part for each block.
_COLLECTIONS = ("params", "lora", "scales", "router")


class Stretch(NamedTuple):
  """Layers that repeat: `period` different ones, `count` times.

  Attributes:
    first: number of its first layer.
    period: how many layers are one step of the scan.
    count: how many steps; 1: a layer by itself, unrolled.
  """

  first: int
  period: int
  count: int

  @property
  def is_stack(self) -> bool:
    """Whether a scan runs it."""
    return self.count > 1

  @property
  def name(self) -> str:
    """Name of its module, and of its parameters."""
    if not self.is_stack:
      return f"layers_{self.first}"
    return f"blocks_{self.first}_{self.first + self.period * self.count - 1}"

  def layer(self, place: int, step: int) -> str:
    """Name of one of its layers in an unrolled model."""
    return f"layers_{self.first + place + step * self.period}"


def stretches(config: Any) -> list[Stretch]:
  """Cuts the layers of a model into stretches.

  From each layer on, the period is taken that covers the most layers; the
  shortest of several.

  Args:
    config: of a language model; its `layer_kind(i)` says all in which a layer
      differs from others but its weights.
  """
  if not config.scan_layers:
    return [Stretch(i, 1, 1) for i in range(config.num_layers)]
  return _cut([config.layer_kind(i) for i in range(config.num_layers)])


def _cut(kinds: Sequence[Any]) -> list[Stretch]:
  found, first = [], 0
  while first < len(kinds):
    best = Stretch(first, 1, 1)
    for period in range(1, (len(kinds) - first) // 2 + 1):
      count = 1
      while (
        kinds[first : first + period]
        == kinds[first + count * period : first + (count + 1) * period]
      ):
        count += 1
      if count > 1 and count * period > best.count * best.period:
        best = Stretch(first, period, count)
      if best.count * best.period == len(kinds) - first:
        break
    found.append(best)
    first += best.count * best.period
  return found


def check(config: Any) -> None:
  """Raises ValueError if a scan is asked for, and no layers repeat."""
  is_asked = getattr(config, "scan_layers", False)
  if is_asked and not any(s.is_stack for s in stretches(config)):
    raise ValueError(
      f"--scan_layers needs layers that repeat, and the {config.num_layers} of "
      f"this {config.model_type or 'model'} are all of other kinds than their "
      "neighbours; leave it out."
    )


# Modules.


class Blocks(nn.Module):
  """Applies different blocks, one after the other: a step of the scan.

  Attributes:
    make: number in the period -> block.
    period: how many there are.
  """

  make: Callable[[int], nn.Module]
  period: int

  def setup(self):
    self.layers = [self.make(i) for i in range(self.period)]

  def __call__(self, x, index, shared):
    del index
    angles, mask, segments = shared
    for layer, angle in zip(self.layers, angles, strict=True):
      x, _ = layer(x, angle, mask, segments)
    return x, None

  def prefill(self, x, index, shared):
    """As `__call__`, and returns keys and values."""
    del index
    angles, mask, segments = shared
    kept = []
    for layer, angle in zip(self.layers, angles, strict=True):
      x, pair = layer(x, angle, mask, segments)
      kept.append(pair)
    return x, tuple(kept)

  def decode(self, carry, index, shared):
    """Reads one more token per row; the cache is carried, written in place."""
    x, caches = carry
    angles, prompts, prompt_mask, step = shared
    written = []
    for i, layer in enumerate(self.layers):
      cache = {**prompts[i], **caches[i]}
      x, cache = layer.decode(x, angles[i], cache, prompt_mask, step, index)
      written.append({name: cache[name] for name in caches[i]})
    return (x, tuple(written)), None


def add_blocks(model: nn.Module, block: Callable[..., nn.Module]) -> None:
  """Adds the blocks to a model, in its `setup`.

  Args:
    model: with a `config`.
    block: `(index, in_scan) -> nn.Module`; its `__call__` takes states, angles,
      a mask and segments, and returns states with keys and values; its `decode`
      is that of `decoder.Block`.
  """
  for stretch in stretches(model.config):
    if stretch.is_stack:
      scan = nn.scan(
        Blocks,
        variable_axes=dict.fromkeys(_COLLECTIONS, 0),
        split_rngs={"params": True},
        in_axes=(0, nn.broadcast),
        length=stretch.count,
        methods=["__call__", "prefill", "decode"],
      )
      make = functools.partial(_block_at, block, stretch.first)
      setattr(model, stretch.name, scan(make, stretch.period))
    else:
      setattr(model, stretch.name, block(stretch.first, False))


def _block_at(block, first, place):
  return block(first + place, True)


def forward(
  model: nn.Module,
  x: Array,
  angles: Sequence[Any],
  mask: Array,
  segments: Array | None,
  *,
  keep: bool,
) -> tuple[Array, list[tuple[Array, Array]]]:
  """Applies all blocks to whole rows.

  Args:
    model: that `add_blocks` added to.
    x: `[B, S, D]` states.
    angles: of each layer.
    mask: `[B, S]` bool.
    segments: `[B, S]` int, or None.
    keep: whether keys and values are wanted.

  Returns:
    The states; keys and values `[B, S, K, d]` of each layer, or
    `[count, B, S, K, d]` of each place in the period of a stack.
  """
  kept = []
  for stretch in stretches(model.config):
    run, first = getattr(model, stretch.name), stretch.first
    if not stretch.is_stack:
      x, pair = run(x, angles[first], mask, segments)
      kept.append(pair)
      continue
    shared = tuple(angles[first : first + stretch.period]), mask, segments
    if keep:
      x, pairs = run.prefill(x, None, shared)
      kept += pairs
    else:
      x, _ = run(x, None, shared)
  return x, kept


def decode(
  model: nn.Module, x: Array, angles: Sequence[Any], cache: Mapping[str, Any]
) -> tuple[Array, tuple[dict[str, Array], ...]]:
  """Applies all blocks to one more token per row.

  Args:
    model: that `add_blocks` added to.
    x: `[N, D]` states.
    angles: of each layer.
    cache: see `attention`; `layers` has one entry for each layer, or for each
      place in the period of a stack, with an axis more for its layers.

  Returns:
    The states, and `layers` of the cache with the token.
  """
  layers = list(cache["layers"])
  mask, step = cache["prompt_mask"], cache["step"]
  done: list[dict[str, Array]] = []
  for stretch in stretches(model.config):
    run, first = getattr(model, stretch.name), stretch.first
    own = layers[len(done) : len(done) + stretch.period]
    if not stretch.is_stack:
      x, layer = run.decode(x, angles[first], own[0], mask, step)
      done.append(layer)
      continue
    prompts, responses = (
      tuple(
        {
          name: array
          for name, array in layer.items()
          if name.startswith("prompt_") == is_prompt
        }
        for layer in own
      )
      for is_prompt in (True, False)
    )
    own_angles = tuple(angles[first : first + stretch.period])
    (x, responses), _ = run.decode(
      (x, responses),
      jnp.arange(stretch.count),
      (own_angles, prompts, mask, step),
    )
    done += [p | r for p, r in zip(prompts, responses, strict=True)]
  return x, tuple(done)


def cached_windows(config: Any) -> list[int | None]:
  """Returns the window of each entry of a cache's `layers`."""
  return [
    config.window(stretch.first + place)
    for stretch in stretches(config)
    for place in range(stretch.period)
  ]


# Parameters.


def placed(names: Mapping[str, Any], config: Any) -> dict[str, Any]:
  """Says where the tensors of a file lie, from where they lie unrolled.

  Args:
    names: see `decoder.parameter_names`, of the unrolled model.
    config: of the model.

  Returns:
    The same table; a path in a stack ends in the number of its part.
  """
  places = {
    stretch.layer(place, step): ((stretch.name, f"layers_{place}"), step)
    for stretch in stretches(config)
    if stretch.is_stack
    for place in range(stretch.period)
    for step in range(stretch.count)
  }
  found = dict(names)
  for name, ((layer, *path), flip) in names.items():
    if layer in places:
      place, step = places[layer]
      keys = [key for key in path if isinstance(key, str)]
      found[name] = (*place, *keys, step, *path[len(keys) :]), flip
  return found


def is_stacked(tree: Params) -> bool:
  """Returns whether a nested dict holds stacks anywhere."""
  return isinstance(tree, Mapping) and any(
    _STACK.fullmatch(key) or is_stacked(x) for key, x in tree.items()
  )


def unstack(tree: Params) -> Params:
  """Takes the stacks of a nested dict apart, as an unrolled model has it.

  Args:
    tree: of arrays, such as parameters, adapters or moments.
  """
  if not isinstance(tree, Mapping):
    return tree
  found = {}
  for key, value in tree.items():
    match = _STACK.fullmatch(key)
    if not match:
      found[key] = unstack(value)
      continue
    first, last = map(int, match.groups())
    for name, block in value.items():
      count = jax.tree.leaves(block)[0].shape[0]
      period = (last + 1 - first) // count
      stretch = Stretch(first, period, count)
      place = int(name.removeprefix("layers_"))
      for step in range(count):
        part = jax.tree.map(lambda x, step=step: x[step], block)
        found[stretch.layer(place, step)] = part
  return found


def stack(tree: Params, config: Any) -> Params:
  """Puts the layers of a nested dict into stacks, as a model has it.

  Args:
    tree: of an unrolled model, such as parameters, adapters or moments.
    config: of the model.
  """
  if not isinstance(tree, Mapping):
    return tree
  tree = {key: stack(value, config) for key, value in tree.items()}
  for stretch in stretches(config):
    for place in range(stretch.period if stretch.is_stack else 0):
      names = [stretch.layer(place, step) for step in range(stretch.count)]
      blocks = [tree.pop(name) for name in names if name in tree]
      if blocks:
        whole = tree.setdefault(stretch.name, {})
        whole[f"layers_{place}"] = jax.tree.map(_join, *blocks)
  return tree


def _join(*leaves):
  is_host = all(isinstance(x, np.ndarray) for x in leaves)
  return (np if is_host else jnp).stack(leaves)


def as_in(tree: Params, config: Any) -> Params:
  """Returns a nested dict in the layout of a model, whichever it has."""
  if is_stacked(tree):
    tree = unstack(tree)
  return stack(tree, config)


def path_of(keys: Any) -> str:
  """Joins the keys of a leaf by slashes."""
  return jax.tree_util.keystr(keys, simple=True, separator="/")


def in_stack(path: str) -> bool:
  """Returns whether the parameter of a path, joined by slashes, is a stack."""
  return bool(_WITHIN.search(path))


def own_ndim(path: str, leaf: Any) -> int:
  """Returns the dimensions that each layer has of a parameter.

  Args:
    path: joined by slashes, also in the state of an optimizer.
    leaf: array.
  """
  return leaf.ndim - in_stack(path)


def layer_paths(path: str, leaf: Any) -> list[str]:
  """Returns the paths that a parameter has in an unrolled model.

  Args:
    path: joined by slashes.
    leaf: array.
  """
  match = _WITHIN.search(path)
  if not match:
    return [path]
  first, last, place = map(int, match.groups()[1:])
  count = leaf.shape[0]
  stretch = Stretch(first, (last + 1 - first) // count, count)
  return [
    path[: match.start(1)] + stretch.layer(place, step) + path[match.end(1) :]
    for step in range(count)
  ]


def partition_rules(
  rules: Sequence[tuple[str, PartitionSpec]],
) -> tuple[tuple[str, PartitionSpec], ...]:
  """Returns rules for stacks, to stand before those of single layers.

  Each layer lies as it does unrolled, and no axis splits the layers.
  """
  return tuple(
    (rf"blocks_\d+_\d+/.*{pattern}", PartitionSpec(None, *spec))
    for pattern, spec in rules
    if len(spec)
  )
