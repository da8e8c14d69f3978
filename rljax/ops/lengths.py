"""Reads no more columns of padded rows than they need, at few static widths.

A batch is a tree of arrays `[N, ...]` with `prompt_mask` `[N, P]`, padded on
the left, and `response_mask` `[N, T]`, padded on the right. The program chooses
among K widths of prompts and K of responses while it runs, so its shapes do not
change from batch to batch: it holds each of the K² combinations.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array
Tree = Any

# Widths are multiples of it, but for the largest.
_MULTIPLE = 8


def widths(length: int, num_buckets: int) -> tuple[int, ...]:
  """Returns K widths up to a length, evenly spaced, the smallest first.

  Args:
    length: the largest.
    num_buckets: K; there are fewer where they would be alike.
  """
  steps = (math.ceil(length * i / num_buckets) for i in range(1, num_buckets))
  rounded = {math.ceil(step / _MULTIPLE) * _MULTIPLE for step in steps}
  return (*sorted(width for width in rounded if width < length), length)


def bucket(mask: Array, choices: tuple[int, ...], *, left: bool) -> Array:
  """Returns the first of the widths that holds all that a mask counts.

  Args:
    mask: `[N, L]` bool.
    choices: of `widths`.
    left: whether the padding is on the left.

  Returns:
    `()` int32, a place in `choices`.
  """
  length = mask.shape[1]
  places = jnp.arange(length, 0, -1) if left else jnp.arange(1, length + 1)
  needed = jnp.max(jnp.where(mask, places[None], 0))
  return jnp.sum(needed > jnp.array(choices[:-1], jnp.int32), dtype=jnp.int32)


def at_width(
  function: Callable[[Tree], Tree], batch: Tree, num_buckets: int
) -> Tree:
  """Calls a function with a batch without the columns that no row needs.

  Arrays named `prompt_...` lose columns on the left. All others with as many
  columns as `response_mask` lose columns on the right, where no mask among
  them counts anything.

  Args:
    function: of a batch; what it returns does not depend on columns that count
      nothing.
    batch: see the module.
    num_buckets: K; 1 calls the function with the batch as it is.

  Returns:
    What the function returns, with 0 in columns that were not read.
  """
  if num_buckets == 1:
    return function(batch)
  named = _named(batch)
  length = _mask(named, "prompt_mask").shape[1]
  room = _mask(named, "response_mask").shape[1]
  prompt_widths, room_widths = (
    widths(size, num_buckets) for size in (length, room)
  )
  masks = [
    leaf
    for name, leaf in named
    if name.endswith("mask") and not name.startswith("prompt_")
    if leaf.ndim == 2 and leaf.shape[1] == room
  ]
  counts = jnp.stack(masks).any(axis=0)
  place = bucket(_mask(named, "prompt_mask"), prompt_widths, left=True)
  place = place * len(room_widths) + bucket(counts, room_widths, left=False)
  whole = jax.eval_shape(function, batch)

  def trimmed(prompt_width, width):
    def trim(path, leaf):
      name = _name(path)
      if name.startswith("prompt_"):
        return leaf[:, leaf.shape[1] - prompt_width :]
      is_text = leaf.ndim > 1 and leaf.shape[1] == room
      return leaf[:, :width] if is_text else leaf

    def call(batch):
      found = function(jax.tree_util.tree_map_with_path(trim, batch))
      return jax.tree.map(_padded, found, whole)

    return call

  calls = [trimmed(p, t) for p in prompt_widths for t in room_widths]
  return jax.lax.switch(place, calls, batch)


def by_length(batch: Tree, num_parts: int) -> Array:
  """Sorts rows so that those of one part of a batch have about one length.

  Args:
    batch: see the module.
    num_parts: n; part i has the rows i, i + n, ... of the result.

  Returns:
    `[N]` int, the order of rows: the shortest are in part 0.
  """
  named = _named(batch)
  totals = sum(
    jnp.sum(_mask(named, name), axis=1)
    for name in ("prompt_mask", "response_mask")
  )
  order = jnp.argsort(totals, stable=True)
  return order.reshape(num_parts, -1).T.reshape(-1)


def _padded(x, like):
  """Appends 0 on the right where another shape is larger."""
  if x.shape == like.shape:
    return x
  room = [(0, n - m) for n, m in zip(like.shape, x.shape, strict=True)]
  return jnp.pad(x, room)


def _named(batch):
  """Pairs of the name and the array of each leaf."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(batch)
  return [(_name(path), leaf) for path, leaf in leaves]


def _name(path):
  return jax.tree_util.keystr(path[-1:], simple=True)


def _mask(named, wanted):
  found = [leaf for name, leaf in named if name == wanted]
  if len(found) != 1:
    raise ValueError(f"a batch must have one {wanted}, got {len(found)}.")
  return found[0]
