"""Batches that are read in parts, in no more memory than one part takes.

Every part takes rows from all devices, so that none of them idles.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from rljax.models import lora
from rljax.ops import lengths
from rljax.training import rounding

Array = chex.Array
Tree = Any
LossFn = Callable[..., tuple[Array, dict[str, Array]]]

# Entry of a loss's metrics for arrays of rows: a tree of `[N, ...]`.
ROWS = "rows"

# Metric -> the number of what its mean is over, where that is not the
# `<loss>/count` of its loss.
COUNTED_BY = {
  "kto/desirable_reward": "kto/desirable_count",
  "kto/undesirable_reward": "kto/undesirable_count",
  "offline/weight_mean": "offline/tokens",
  "offline/ratio_mean": "offline/ratio_count",
  "offline/clip_low_fraction": "offline/ratio_count",
  "offline/clip_high_fraction": "offline/ratio_count",
  "token/positive_fraction": "token/tokens",
  "token/negative_fraction": "token/tokens",
}


class Sizes(NamedTuple):
  """Rows of a step.

  Attributes:
    rows: of all that a step learns from.
    minibatch: of one update; divides `rows`.
    micro_batch: of one pass; divides `minibatch`.
    buckets: widths at which a pass may read its rows, see `ops.lengths`.
  """

  rows: int
  minibatch: int
  micro_batch: int
  buckets: int = 1

  @property
  def num_parts(self) -> int:
    """Passes of an update."""
    return self.minibatch // self.micro_batch

  @property
  def num_passes(self) -> int:
    """Passes over all rows."""
    return self.rows // self.micro_batch

  def num_updates(self, epochs: int) -> int:
    """Updates of a step."""
    return epochs * (self.rows // self.minibatch)


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
  buckets: int = 1,
) -> Tree:
  """Calls a function of rows for one part of a batch after another.

  For passes without gradients, which then need no more memory than an update.

  Args:
    function: maps rows to a tree of arrays `[rows, ...]`, each by itself.
    batch: tree of arrays `[N, ...]`.
    num_parts: divides N; 1 calls the function once.
    sharding: of a part's rows, where they lie on several devices.
    buckets: K of `lengths.at_width`; parts are then sorted by length.

  Returns:
    What the function gives for all rows, in their order.
  """
  read = lambda part: lengths.at_width(function, part, buckets)
  if num_parts == 1:
    return read(batch)
  is_sorted = buckets > 1
  order = lengths.by_length(batch, num_parts) if is_sorted else None
  if is_sorted:
    batch = take(batch, order, sharding)

  def one(part):
    return read(_constrained(part, sharding))

  found = _joined(jax.lax.map(one, split(batch, num_parts)))
  return take(found, jnp.argsort(order), sharding) if is_sorted else found


def grad(
  loss_fn: LossFn,
  num_parts: int,
  *,
  weigh: Callable[[Tree], Array] | None = None,
  adds_up: bool = False,
  sharding: jax.sharding.Sharding | None = None,
  buckets: int = 1,
) -> "Gradient":
  """Makes a function that accumulates the gradient of a batch over its parts.

    g = Σ_i w_i ∇L(part_i),   w_i = weigh(part_i) / Σ_j weigh(part_j)

  That is the gradient of the whole batch if L is a mean, and `weigh` counts
  what the mean divides by: rows (all parts alike, the default), or tokens.
  Metrics are combined as those of a batch; see `combine`. What the loss says of
  rows, under the name `ROWS`, is put back into the order of the batch.

  Args:
    loss_fn: `(params, batch, *more) -> (loss, metrics)`.
    num_parts: divides the rows of the batch; 1 is plain `jax.grad`.
    weigh: maps a part to a number; None: all parts weigh alike.
    adds_up: whether the parts' losses add up to the batch's, for a loss that
      divides by counts of the whole batch, among `more`. All w are then 1, and
      metrics named `...loss` are sums as well.
    sharding: of a part's rows, where they lie on several devices.
    buckets: K of `lengths.at_width`; parts are then sorted by length.

  Returns:
    `(params, batch, *more) -> (gradients, metrics)`. Of parameters with
    adapters the gradient is that of `lora.learnt(params)`.
  """
  return Gradient(loss_fn, num_parts, weigh, adds_up, sharding, buckets)


@dataclasses.dataclass(frozen=True)
class Gradient:
  """The function that `grad` makes, with its arguments."""

  loss_fn: LossFn
  num_parts: int
  weigh: Callable[[Tree], Array] | None
  adds_up: bool
  sharding: jax.sharding.Sharding | None
  buckets: int = 1

  def in_parts(self, num_parts: int) -> "Gradient":
    """Returns the same gradient, accumulated over so many parts."""
    return dataclasses.replace(self, num_parts=num_parts)

  def __call__(
    self, params: Tree, batch: Tree, *more: Tree
  ) -> tuple[Tree, dict[str, Array]]:
    """Returns the gradient of a batch, and its metrics."""
    params, frozen = lora.split(params)

    def loss_fn(params, *inputs):
      return self.loss_fn(lora.join(params, frozen), *inputs)

    of_batch = jax.grad(loss_fn, has_aux=True)
    gradient = lambda params, batch, *more: lengths.at_width(
      lambda batch: of_batch(params, batch, *more), batch, self.buckets
    )
    if self.num_parts == 1:
      return gradient(params, batch, *more)
    is_sorted = self.buckets > 1
    if is_sorted:
      order = lengths.by_length(batch, self.num_parts)
      batch = take(batch, order, self.sharding)
    parts = split(batch, self.num_parts)
    counts = jnp.ones(self.num_parts)
    if self.weigh is not None:
      counts = jax.vmap(self.weigh)(parts).astype(jnp.float32)
    weights = counts / _not_zero(counts.sum())
    scale = jnp.ones(self.num_parts) if self.adds_up else weights

    def add(total, inputs):
      weight, part = inputs
      grads, metrics = gradient(
        params, _constrained(part, self.sharding), *more
      )
      add_one = lambda a, b: a + weight * b.astype(a.dtype)
      return jax.tree.map(add_one, total, grads), metrics

    # Sums of bfloat16 gradients, too, are in float32.
    zeros = rounding.in_float32(jax.tree.map(jnp.zeros_like, params))
    grads, metrics = jax.lax.scan(add, zeros, (scale, parts))
    rows = {name: _joined(metrics.pop(name)) for name in {ROWS} & set(metrics)}
    if is_sorted:
      rows = take(rows, jnp.argsort(order), self.sharding)
    return grads, rows | combine(metrics, weights, adds_up=self.adds_up)


def combine(
  metrics: dict[str, Array], weights: Array, *, adds_up: bool = False
) -> dict[str, Array]:
  """Combines the metrics of several parts to those of the whole batch.

  Metrics are combined by their names:

    ..._max, ..._min     the extreme, of the parts in which anything counts
    .../tokens, ...count sums
    ...loss              means weighed by w, as the gradient is; or sums
    .../perplexity       exp of the mean logarithm, weighed by the tokens
    ..._variance         within the parts, and between their `..._mean`
    .../explained_variance   1 - errors_variance / returns_variance
    others               means weighed by what `COUNTED_BY` names, or by the
                         `<loss>/count` of their loss, or else by w

  A part of weight 0 says nothing, whatever it holds.

  Args:
    metrics: name -> `[n]`, one value for each part.
    weights: `[n]` w, which add up to 1.
    adds_up: whether losses are sums.

  Returns:
    Name -> scalar.
  """
  found = {}
  for name, values in metrics.items():
    loss, _, quantity = name.rpartition("/")
    is_loss = quantity.endswith("loss")
    known = COUNTED_BY.get(name, f"{loss}/count")
    counts = weights
    if known in metrics and not is_loss:
      counts = metrics[known].astype(jnp.float32)
    if quantity.endswith("max"):
      found[name] = jnp.where(counts > 0, values, jnp.nanmin(values)).max()
    elif quantity.endswith("min"):
      found[name] = jnp.where(counts > 0, values, jnp.nanmax(values)).min()
    elif (
      quantity == "tokens" or quantity.endswith("count") or is_loss and adds_up
    ):
      found[name] = values.sum()
    elif quantity == "perplexity":
      counts = metrics.get(f"{loss}/tokens", counts).astype(jnp.float32)
      found[name] = jnp.exp(_mean(jnp.log(values), counts))
    elif quantity.endswith("_variance") and f"{name[:-9]}_mean" in metrics:
      means = metrics[f"{name[:-9]}_mean"]
      spread = jnp.square(means - _mean(means, counts))
      found[name] = _mean(values + spread, counts)
    elif counts is weights:
      found[name] = jnp.where(weights > 0, values * weights, 0).sum()
    else:
      found[name] = _mean(values, counts)
  for name in metrics:
    loss, _, quantity = name.rpartition("/")
    variance = found.get(f"{loss}/returns_variance")
    if quantity == "explained_variance" and variance is not None:
      rest = found[f"{loss}/errors_variance"]
      found[name] = jnp.where(variance > 0, 1.0 - rest / _not_zero(variance), 0)
  return found


def over_updates(
  history: dict[str, Array], epochs: int | None = None
) -> dict[str, Array]:
  """Combines the metrics of a step's updates.

  The minibatches of an epoch are parts of one batch, by `combine`. Of the
  epochs, which see the same rows, it is the extreme, or else the plain mean.
  What the optimizer has counted is that of the last update.

  Args:
    history: name -> `[updates]`, epoch after epoch.
    epochs: of the step, which divide its updates; None: each update is an
      epoch of its own.

  Returns:
    Name -> scalar.
  """

  def one(name, values):
    if name.startswith("updates/"):
      return values[-1]
    if name.endswith("max"):
      return values.max()
    return values.min() if name.endswith("min") else values.mean()

  num_updates = len(next(iter(history.values())))
  num_parts = num_updates // (epochs or num_updates)
  if num_parts > 1:
    last = {n: x[-1:] for n, x in history.items() if n.startswith("updates/")}
    weights = jnp.full(num_parts, 1.0 / num_parts)
    history = last | jax.vmap(lambda parts: combine(parts, weights))(
      {
        name: values.reshape(-1, num_parts)
        for name, values in history.items()
        if name not in last
      }
    )
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


def _joined(parts):
  """Undoes `split`."""
  return jax.tree.map(
    lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), parts
  )


def _mean(values, counts):
  """The mean of the parts in which anything counts."""
  values = jnp.where(counts > 0, values, 0.0)
  return (values * counts).sum() / _not_zero(counts.sum())


def _not_zero(total):
  """Divides a sum of nothing by 1."""
  return jnp.where(total == 0, 1.0, total)


def _constrained(tree, sharding):
  if sharding is None:
    return tree
  return jax.lax.with_sharding_constraint(tree, sharding)
