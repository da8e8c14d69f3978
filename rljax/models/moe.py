"""Mixtures of experts: every token goes to its k best feed-forwards.

Nothing is dropped: tokens are sorted by expert, and each expert multiplies as
many rows as chose it.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from rljax.distributed import planning

Array = jax.Array
Metrics = dict[str, Array]

# Rows per product of one expert on a CPU; groups are padded to whole blocks.
_MAX_BLOCK, _MIN_BLOCK = 32, 8
# The collection in which `Experts` leaves the logits of its router.
ROUTER = "router"


class Experts(nn.Module):
  """Computes Σ_e w_e down_e(act(gate_e(x)) * up_e(x)) over k experts e.

    w = softmax(router(x)), the k largest of it

  The router's logits are sown into the collection "router"; read them by
  `model.apply(variables, ids, mask, mutable=["router"])` and
  `load_balance_loss`.

  Attributes:
    hidden_size: D.
    expert_size: F, width of one expert.
    num_experts: E.
    experts_per_token: k.
    normalise: whether the k weights of a token are divided by their sum.
    activation: of the gate.
    initializer_range: standard deviation of new weights.
    dtype: of activations; the softmax is in float32.
    param_dtype: of new parameters.
  """

  hidden_size: int
  expert_size: int
  num_experts: int
  experts_per_token: int
  normalise: bool
  activation: Callable[[Array], Array]
  initializer_range: float
  dtype: Any
  param_dtype: Any

  def setup(self):
    normal = nn.initializers.normal(self.initializer_range)
    self.gate = nn.Dense(
      self.num_experts,
      use_bias=False,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      kernel_init=normal,
    )
    sizes = (self.num_experts, self.hidden_size, self.expert_size)
    self.experts = _Weights(sizes, normal, self.param_dtype)

  def __call__(self, x: Array) -> Array:
    """Maps `[..., D]` to `[..., D]`."""
    rows = x.reshape(-1, x.shape[-1])
    logits = self.gate(rows).astype(jnp.float32)  # [N, E]
    if not self.is_initializing():
      shape = (*x.shape[:-1], self.num_experts)
      self.sow(ROUTER, "logits", logits.reshape(shape))
    weights, chosen = jax.lax.top_k(
      jax.nn.softmax(logits), self.experts_per_token
    )
    if self.normalise:
      weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    # Arrays of jax, to be indexed by a traced number in `_blocks`.
    kernels = [jnp.asarray(kernel, self.dtype) for kernel in self.experts()]
    mixed = mix(rows, chosen, weights, *kernels, activation=self.activation)
    return mixed.astype(x.dtype).reshape(x.shape)


class _Weights(nn.Module):
  """Holds the kernels of all experts, one array for each of three products."""

  sizes: tuple[int, int, int]
  init_fn: Callable
  param_dtype: Any

  @nn.compact
  def __call__(self) -> list[Array]:
    experts, hidden, wide = self.sizes
    return [
      self.param(name, self.init_fn, (experts, *shape), self.param_dtype)
      for name, shape in (
        ("gate_proj", (hidden, wide)),
        ("up_proj", (hidden, wide)),
        ("down_proj", (wide, hidden)),
      )
    ]


def mix(
  x: Array,
  chosen: Array,
  weights: Array,
  gate: Array,
  up: Array,
  down: Array,
  *,
  activation: Callable[[Array], Array],
) -> Array:
  """Sums what each row's experts make of it.

  Args:
    x: `[N, D]` float.
    chosen: `[N, k]` int32, the experts of each row.
    weights: `[N, k]` float32, their weights.
    gate: `[E, D, F]` in the dtype of `x`.
    up: `[E, D, F]`.
    down: `[E, F, D]`.
    activation: of the gate.

  Returns:
    `[N, D]` float32.
  """
  chex.assert_rank([x, chosen, weights, gate, up, down], [2, 2, 2, 3, 3, 3])
  num_experts, num_chosen = gate.shape[0], chosen.shape[1]
  experts = chosen.reshape(-1)
  order = jnp.argsort(experts)  # Rows of one expert stand together.
  row = order // num_chosen
  sizes = jnp.bincount(experts, length=num_experts).astype(jnp.int32)
  feed_forward = lambda product, y: product(
    activation(product(y, gate)) * product(y, up), down
  )
  if planning.platform() == "cpu":
    # There, `ragged_dot` multiplies every row by every expert: 18 times the
    # time of blocks at 1,024 rows, 32 experts and 4 for each row.
    mixed = _blocks(x[row], experts[order], sizes, feed_forward)
  else:
    product = lambda y, kernel: jax.lax.ragged_dot(y, kernel, sizes)
    mixed = feed_forward(product, x[row])
  scaled = mixed.astype(jnp.float32) * weights.reshape(-1)[order][:, None]
  return jnp.zeros(x.shape, jnp.float32).at[row].add(scaled)


def _blocks(
  rows: Array,
  experts: Array,
  sizes: Array,
  feed_forward: Callable[[Callable, Array], Array],
) -> Array:
  """Applies experts to sorted rows, in blocks of rows of one expert.

  Args:
    rows: `[M, D]`, sorted by expert.
    experts: `[M]` int32.
    sizes: `[E]` int32, rows of each expert.
    feed_forward: of a product `(rows, kernels) -> rows` and rows.

  Returns:
    `[M, D]`.
  """
  num_rows, num_experts = rows.shape[0], sizes.shape[0]
  block = min(_MAX_BLOCK, max(_MIN_BLOCK, num_rows // num_experts))
  num_blocks = math.ceil(num_rows / block) + min(num_experts, num_rows)
  ends = jnp.cumsum((sizes + block - 1) // block)  # In blocks.
  starts = ends - (sizes + block - 1) // block
  rank = jnp.arange(num_rows) - (jnp.cumsum(sizes) - sizes)[experts]
  slot = starts[experts] * block + rank
  room = jnp.zeros((num_blocks * block, rows.shape[1]), rows.dtype)
  owner = jnp.searchsorted(ends, jnp.arange(num_blocks), side="right")

  def one(inputs):
    block_rows, expert = inputs
    product = lambda y, kernels: y @ kernels[expert]
    return feed_forward(product, block_rows)

  made = jax.lax.map(
    one,
    (
      room.at[slot].set(rows).reshape(num_blocks, block, -1),
      jnp.minimum(owner, num_experts - 1),
    ),
  )
  return made.reshape(num_blocks * block, -1)[slot]


def load_balance_loss(
  router: Mapping[str, Any], mask: Array, *, experts_per_token: int
) -> tuple[Array, Metrics]:
  """Computes the loss that is 1 or more, and least if all experts are used.

    L = E Σ_e f_e p_e

  f_e is the share of tokens that go to expert e, times k, and p_e the mean
  probability that the router gives it, over the tokens of all layers.

  Args:
    router: the collection "router", `[B, S, E]` logits per layer, or
      `[L, B, S, E]` per stack.
    mask: `[B, S]` bool, True where a token counts.
    experts_per_token: k.

  Returns:
    The loss, which is k if the experts share the tokens evenly, and metrics:
    the loss, the largest and the smallest share of the choices that an expert
    has, and the mean entropy of the router in nats.

  Source:
    Fedus et al. (2021), "Switch Transformers", equations 4 to 6, summed over
    the k choices of a token as in transformers.
  """
  # Of a stack, those of its layers are one array.
  layers = [
    logits.reshape(-1, *mask.shape, logits.shape[-1])
    for logits in jax.tree.leaves(router)
  ]
  if not layers:
    raise ValueError("the model has left no logits of a router.")
  logits = jnp.concatenate(layers).astype(jnp.float32)  # [L, B, S, E]
  num_experts = logits.shape[-1]
  log_probs = jax.nn.log_softmax(logits)
  _, chosen = jax.lax.top_k(logits, experts_per_token)
  counts = mask[None, :, :, None]
  rows = jnp.maximum(jnp.sum(mask, dtype=jnp.float32) * len(logits), 1)
  mean = lambda x: jnp.sum(jnp.where(counts, x, 0), axis=(0, 1, 2)) / rows
  share = mean(jnp.sum(jax.nn.one_hot(chosen, num_experts), axis=-2))
  probs = jnp.exp(log_probs)
  loss = num_experts * jnp.sum(jax.lax.stop_gradient(share) * mean(probs))
  entropy = -jnp.sum(mean(probs * log_probs))
  return loss, jax.lax.stop_gradient(
    {
      "router/load_balance_loss": loss,
      "router/largest_share": jnp.max(share) / experts_per_token,
      "router/smallest_share": jnp.min(share) / experts_per_token,
      "router/entropy": entropy,
    }
  )
