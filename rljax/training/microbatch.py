"""Batches that are read in parts, in no more memory than one part takes.

Every part takes rows from all devices, so that none of them idles.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

Array = chex.Array
Tree = Any


class Sizes(NamedTuple):
  """Rows of a step.

  Attributes:
    rows: of all that a step learns from.
    minibatch: of one update; divides `rows`.
    micro_batch: of one pass; divides `minibatch`.
  """

  rows: int
  minibatch: int
  micro_batch: int

  @property
  def num_parts(self) -> int:
    """Passes of an update."""
    return self.minibatch // self.micro_batch

  @property
  def num_passes(self) -> int:
    """Passes over all rows."""
    return self.rows // self.micro_batch


def split(batch: Tree, num_parts: int) -> Tree:
  """Reshapes `[N, ...]` to `[num_parts, N / num_parts, ...]`.

  Part i has the rows i, i + num_parts, ...: some of every device's.
  """
  return jax.tree.map(
    lambda x: x.reshape(-1, num_parts, *x.shape[1:]).swapaxes(0, 1), batch
  )


def map_rows(
  function: Callable[[Tree], Tree],
  batch: Tree,
  num_parts: int,
  sharding: jax.sharding.Sharding | None = None,
) -> Tree:
  """Calls a function of rows for one part of a batch after another.

  For passes without gradients, which then need no more memory than an update.

  Args:
    function: maps rows to a tree of arrays `[rows, ...]`, each by itself.
    batch: tree of arrays `[N, ...]`.
    num_parts: divides N; 1 calls the function once.
    sharding: of a part's rows, where they lie on several devices.

  Returns:
    What the function gives for all rows, in their order.
  """
  if num_parts == 1:
    return function(batch)

  def one(part):
    return function(_constrained(part, sharding))

  return jax.tree.map(
    lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]),
    jax.lax.map(one, split(batch, num_parts)),
  )


def grad(
  loss_fn: Callable[..., tuple[Array, dict[str, Array]]],
  num_parts: int,
  *,
  weigh: Callable[[Tree], Array] | None = None,
  adds_up: bool = False,
  sharding: jax.sharding.Sharding | None = None,
) -> Callable[..., tuple[Tree, dict[str, Array]]]:
  """Makes a function that accumulates the gradient of a batch over its parts.

    g = Σ_i w_i ∇L(part_i),   w_i = weigh(part_i) / Σ_j weigh(part_j)

  That is the gradient of the whole batch if L is a mean, and `weigh` counts
  what the mean divides by: rows (all parts alike, the default), or tokens.

  Metrics are combined by their names: the largest of `..._max`, the least of
  `..._min`, the sum of `.../tokens` and `.../count`. A `<loss>/perplexity` is
  the exponential of the mean logarithm, weighed by `<loss>/tokens` or
  `<loss>/count`. Of the others it is the mean, weighed by `<loss>/count` where
  the loss counts what its means are over (a subset, say), else by w.

  Args:
    loss_fn: `(params, batch, *more) -> (loss, metrics)`.
    num_parts: divides the rows of the batch; 1 is plain `jax.grad`.
    weigh: maps a part to a number; None: all parts weigh alike.
    adds_up: whether the parts' losses add up to the batch's, for a loss that
      divides by counts of the whole batch, among `more`. All w are then 1, and
      metrics named `...loss` are sums as well.
    sharding: of a part's rows, where they lie on several devices.

  Returns:
    `(params, batch, *more) -> (gradients, metrics)`.
  """
  gradient = jax.grad(loss_fn, has_aux=True)
  if num_parts == 1:
    return gradient

  def accumulated(params, batch, *more):
    parts = split(batch, num_parts)
    counts = jnp.ones(num_parts)
    if weigh is not None:
      counts = jax.vmap(weigh)(parts).astype(jnp.float32)
    weights = counts / _not_zero(counts.sum())
    scale = jnp.ones(num_parts) if adds_up else weights

    def add(total, inputs):
      weight, part = inputs
      grads, metrics = gradient(params, _constrained(part, sharding), *more)
      return jax.tree.map(lambda a, b: a + weight * b, total, grads), metrics

    zeros = jax.tree.map(jnp.zeros_like, params)
    grads, metrics = jax.lax.scan(add, zeros, (scale, parts))
    return grads, combine(metrics, weights, adds_up=adds_up)

  return accumulated


def combine(
  metrics: dict[str, Array], weights: Array, *, adds_up: bool = False
) -> dict[str, Array]:
  """Combines the metrics of several parts; see `grad`.

  Args:
    metrics: name -> `[n]`, one value for each part.
    weights: `[n]`, which add up to 1.
    adds_up: whether losses are sums.

  Returns:
    Name -> scalar.
  """
  found = {}
  for name, values in metrics.items():
    loss, _, quantity = name.rpartition("/")
    if quantity.endswith("max"):
      found[name] = values.max()
    elif quantity.endswith("min"):
      found[name] = values.min()
    elif quantity in ("tokens", "count") or (
      adds_up and quantity.endswith("loss")
    ):
      found[name] = values.sum()
    elif quantity == "perplexity":
      counts = metrics.get(f"{loss}/tokens", metrics.get(f"{loss}/count"))
      counts = (weights if counts is None else counts).astype(jnp.float32)
      mean = (jnp.log(values) * counts).sum() / _not_zero(counts.sum())
      found[name] = jnp.exp(mean)
    elif f"{loss}/count" in metrics:
      counts = metrics[f"{loss}/count"].astype(jnp.float32)
      found[name] = (values * counts).sum() / _not_zero(counts.sum())
    else:
      found[name] = (values * weights).sum()
  return found


def over_updates(history: dict[str, Array]) -> dict[str, Array]:
  """Combines the metrics of a step's updates: extremes, else plain means.

  Args:
    history: name -> `[updates]`.

  Returns:
    Name -> scalar.
  """

  def one(name, values):
    if name.endswith("max"):
      return values.max()
    return values.min() if name.endswith("min") else values.mean()

  return {name: one(name, values) for name, values in history.items()}


def take(
  batch: Tree, rows: Array, sharding: jax.sharding.Sharding | None = None
) -> Tree:
  """Takes some rows of a batch; they stay spread over the devices.

  A gather of rows in random order would leave them on every device.
  """
  return _constrained(jax.tree.map(lambda x: x[rows], batch), sharding)


def orders(key: Array, sizes: Sizes, *, epochs: int) -> Array:
  """Shuffles the rows of a step anew for every epoch.

  Args:
    key: typed key.
    sizes: of the step.
    epochs: E.

  Returns:
    `[E * rows / minibatch, minibatch]` int, the rows of each update.
  """
  shuffle = lambda key: jax.random.permutation(key, sizes.rows)
  shuffled = jax.vmap(shuffle)(jax.random.split(key, epochs))
  return shuffled.reshape(-1, sizes.minibatch)


def _not_zero(total):
  """Divides a sum of nothing by 1."""
  return jnp.where(total == 0, 1.0, total)


def _constrained(tree, sharding):
  if sharding is None:
    return tree
  return jax.lax.with_sharding_constraint(tree, sharding)
