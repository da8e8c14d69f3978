"""Optimizers from plain numbers, which skip updates that are not finite.

A fork writes optax in its script, within `guarded`, and calls `step`.
"""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
import optax.contrib

from rljax.models import lora, stacked
from rljax.training import rounding

Array = chex.Array
Tree = Any

SCHEDULES = ("constant", "linear", "cosine")
OPTIMIZERS = ("adamw", "adafactor", "muon")

# Parameters of the blocks of a model: its embeddings, output layer and heads
# lie beside them. In a stack, too, one layer has such a name.
_BLOCK = re.compile(r"(^|/)layers_\d+/")


def warmup_updates(warmup: float, num_updates: int) -> int:
  """Returns how many updates a warm-up takes.

  Args:
    warmup: a number of updates; below 1, a share of `num_updates`, which is one
      update at least if it is not 0.
    num_updates: of the run.
  """
  if warmup >= 1 or not warmup:
    return int(warmup)
  return max(1, int(warmup * num_updates))


def schedule(
  num_updates: int,
  *,
  learning_rate: float,
  kind: str = "constant",
  warmup: float = 0.0,
  final_learning_rate: float = 0.0,
) -> optax.Schedule:
  """Returns the learning rate by number of update.

  It rises in a line from 0 during the warm-up, then stays, or falls in a line
  or along a cosine, so that an update after the last one would have
  `final_learning_rate`.

  Args:
    num_updates: of the run, over which it falls.
    learning_rate: the highest.
    kind: one of `SCHEDULES`.
    warmup: see `warmup_updates`.
    final_learning_rate: where the fall ends; unused if it is constant.

  Raises:
    ValueError: if there is no such schedule.
  """
  if kind not in SCHEDULES:
    raise ValueError(
      f"schedule must be one of {', '.join(SCHEDULES)}, got {kind!r}."
    )
  num_warmup = warmup_updates(warmup, num_updates)
  first = 0.0 if num_warmup else learning_rate
  if kind == "cosine":
    return optax.schedules.warmup_cosine_decay_schedule(
      init_value=first,
      peak_value=learning_rate,
      warmup_steps=num_warmup,
      decay_steps=max(num_updates, num_warmup + 1),
      end_value=final_learning_rate,
    )
  rise = optax.linear_schedule(first, learning_rate, num_warmup)
  last = learning_rate if kind == "constant" else final_learning_rate
  fall = optax.linear_schedule(
    learning_rate, last, max(1, num_updates - num_warmup)
  )
  return optax.join_schedules([rise, fall], [num_warmup])


def make(
  num_updates: int | None,
  *,
  name: str = "adamw",
  learning_rate: float,
  kind: str = "constant",
  warmup: float = 0.0,
  final_learning_rate: float = 0.0,
  b1: float = 0.9,
  b2: float = 0.999,
  epsilon: float = 1e-8,
  weight_decay: float = 0.0,
  max_grad_norm: float = 0.0,
  moment_dtype: str = "float32",
) -> "Guard":
  """Clips the global norm of the gradient, and steps by a `guarded` optimizer.

    adamw      two moments of each parameter
    adafactor  the second moment alone, of a matrix as that of its rows and of
               its columns; the step of an array has a root mean square of at
               most 1, and no part of it depends on the size of the parameters
    muon       one moment, of which the matrices of the layers take the nearest
               orthogonal one, scaled to the root mean square 0.2 that steps of
               AdamW have; AdamW for embeddings, output layers and vectors

  All three take the learning rates of AdamW.

  Args:
    num_updates: of the run. None: the learning rate is 1, and the caller
      multiplies each update by one of `schedule`. So fits of different lengths
      share one program.
    name: one of `OPTIMIZERS`.
    learning_rate: see `schedule`, likewise `kind`, `warmup` and
      `final_learning_rate`.
    b1: decay of the first moment; unused by adafactor, and by muon but for what
      AdamW takes.
    b2: decay of the second moment, likewise.
    epsilon: of Adam's denominator, likewise.
    weight_decay: decoupled, times the learning rate.
    max_grad_norm: 0 for no clipping.
    moment_dtype: of the moments of matrices, see `rounding.stored`.

  Raises:
    ValueError: if there is no such schedule or optimizer.

  Source:
    Loshchilov and Hutter (2019), "Decoupled Weight Decay Regularization".
    Shazeer and Stern (2018), "Adafactor: Adaptive Learning Rates with Sublinear
    Memory Cost", without relative step sizes, as Hugging Face's
    `Adafactor(scale_parameter=False, relative_step=False)`.
    Jordan et al. (2024), "Muon: An optimizer for hidden layers in neural
    networks", with the scale of Liu et al. (2025), "Muon is Scalable for LLM
    Training", equation 4.
  """
  if name not in OPTIMIZERS:
    raise ValueError(
      f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {name!r}."
    )
  rates = 1.0
  if num_updates is not None:
    rates = schedule(
      num_updates,
      learning_rate=learning_rate,
      kind=kind,
      warmup=warmup,
      final_learning_rate=final_learning_rate,
    )
  steps = optax.adamw(
    rates, b1=b1, b2=b2, eps=epsilon, weight_decay=weight_decay
  )
  if name == "adafactor":
    steps = per_layer(
      optax.chain(
        optax.scale_by_factored_rms(),
        optax.clip_by_block_rms(1.0),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(rates),
      )
    )
  elif name == "muon":
    muon = optax.contrib.muon(
      rates,
      weight_decay=weight_decay,
      muon_weight_dimension_numbers=_matrices,
      consistent_rms=0.2,
    )
    steps = optax.partition({"muon": muon, "adamw": steps}, _names)
  return guarded(
    optax.chain(
      optax.clip_by_global_norm(max_grad_norm or math.inf),
      rounding.stored(steps, jnp.dtype(moment_dtype)),
    ),
    is_cheap=name != "muon",
  )


def per_layer(
  transform: optax.GradientTransformation,
) -> optax.GradientTransformation:
  """Lets an optimizer of whole arrays see each layer of a stack by itself.

  Without stacks nothing changes, the state included.

  Args:
    transform: an optimizer, which steps an array by itself and its parameters.
  """

  def parts(tree):
    """Depth of a stack -> the tree with these stacks; 0 -> the other arrays."""
    depths = jax.tree_util.tree_map_with_path(
      lambda keys, x: x.shape[0] * stacked.in_stack(stacked.path_of(keys)), tree
    )
    only = lambda depth: jax.tree.map(
      lambda x, own: x if own == depth else None, tree, depths
    )
    return {x: only(x) for x in sorted(set(jax.tree.leaves(depths)))}

  def init(params):
    found = parts(params)
    if not any(found):
      return transform.init(params)
    return {
      str(depth): (jax.vmap(transform.init) if depth else transform.init)(part)
      for depth, part in found.items()
    }

  def update(grads, state, params=None):
    found = parts(grads)
    if not any(found):
      return transform.update(grads, state, params)
    of_params = parts(params)
    updates, new = [], {}
    for depth, part in found.items():
      one = jax.vmap(transform.update) if depth else transform.update
      step, new[str(depth)] = one(part, state[str(depth)], of_params[depth])
      updates.append(step)
    first = lambda *xs: next((x for x in xs if x is not None), None)
    is_none = lambda x: x is None
    return jax.tree.map(first, *updates, is_leaf=is_none), new

  return optax.GradientTransformation(init, update)


def _names(params: Tree) -> Tree:
  """Returns whether Muon or AdamW steps each array: Muon matrices of blocks."""

  def name(keys, array):
    path = stacked.path_of(keys)
    ndim = stacked.own_ndim(path, array)
    is_matrix = ndim in (2, 3) and min(array.shape[-2:]) > 1
    return "muon" if is_matrix and _BLOCK.search(path) else "adamw"

  return jax.tree_util.tree_map_with_path(name, params)


def _matrices(params: Tree) -> Tree:
  """Says which axes make a matrix: kernels are `[in, out]`, or several such."""
  axes = lambda x: optax.contrib.MuonDimensionNumbers(x.ndim - 2, x.ndim - 1)
  return jax.tree.map(axes, params)


class Guarded(NamedTuple):
  """State of an optimizer that skips updates.

  Attributes:
    inner: of the optimizer itself.
    skipped: updates that were skipped, since the run began.
    in_a_row: of them, those since the last one that was applied.
  """

  inner: Tree
  skipped: Array  # [] int32.
  in_a_row: Array  # [] int32.


class Guard(NamedTuple):
  """An optax transformation that skips updates; made by `guarded`.

  Attributes:
    init: maps parameters to a `Guarded` state.
    update: as that of optax: `(grads, state, params) -> (updates, state)`.
    apply: the same with the new parameters in place of the updates. It takes
      `is_finite`, a scalar bool, and `rate`, which multiplies the updates.
  """

  init: Callable[[Tree], Guarded]
  update: Callable[..., tuple[Tree, Guarded]]
  apply: Callable[..., tuple[Tree, Guarded]]


def guarded(
  transform: optax.GradientTransformation, *, is_cheap: bool = True
) -> Guard:
  """Makes an optimizer skip each update that is not finite, on the device.

  An update is skipped if the norm of its gradient, a new parameter or a number
  of the new optimizer state is not finite, or `is_finite` is False. Parameters
  and inner state then keep their bits, a step of the schedule included. The sum
  of a bfloat16 parameter and its update is rounded by
  `rounding.stochastically`.

  Args:
    transform: any optimizer. Of parameters with adapters it sees and steps
      those that learn, `lora.learnt(params)`, alone; so are gradients.
    is_cheap: whether its steps take less to compute twice than to keep: those
      of each number by itself do, products of matrices do not.

  Returns:
    The same with a state `Guarded`; its `update` needs the parameters.
  """

  def init(params):
    zero = lambda: jnp.zeros((), jnp.int32)  # No array may be donated twice.
    return Guarded(transform.init(lora.learnt(params)), zero(), zero())

  def proposed(grads, inner, params, rate):
    """The updates, the parameters with them, and the inner state."""
    updates, inner = transform.update(grads, inner, params)
    if rate is not None:
      updates = jax.tree.map(lambda x: rate * x, updates)
    new = jax.tree.map(jnp.add, rounding.in_float32(params), updates)
    return updates, rounding.as_stored(new, params, grads, salt=0), inner

  def judged(grads, state, params, is_finite=True, rate=None):
    """The updates, the parameters with them, the state, and the verdict.

    What is cheap is computed twice: first to look at it, which is a sum of what
    is read and leaves nothing behind; then to keep it, in the place of what was
    there, where the verdict says so. Computed once, it has to be kept whole
    beside the old parameters and moments until the verdict is known; the
    barrier keeps the compiler from doing so.
    """
    old = state.inner
    updates, new, inner = proposed(grads, old, params, rate)
    is_finite = jnp.asarray(is_finite) & all_finite(
      (optax.global_norm(grads), new, inner)
    )
    if is_cheap:
      grads, old, params, is_finite = jax.lax.optimization_barrier(
        (grads, old, params, is_finite)
      )
      updates, new, inner = proposed(grads, old, params, rate)
    is_skipped = jnp.where(is_finite, 0, 1).astype(jnp.int32)
    in_a_row = (state.in_a_row + 1) * is_skipped
    state = Guarded(
      _select(is_finite, inner, old), state.skipped + is_skipped, in_a_row
    )
    return updates, _select(is_finite, new, params), state, is_finite

  def update(grads, state, params, **options):
    params = lora.learnt(params)
    updates, _, state, is_finite = judged(grads, state, params, **options)
    # Adding -0 changes no bit, that of the sign of 0 included.
    zeros = jax.tree.map(lambda x: jnp.full_like(x, -0.0), updates)
    return _select(is_finite, updates, zeros), state

  def apply(grads, state, params, **options):
    params, frozen = lora.split(params)
    _, params, state, _ = judged(grads, state, params, **options)
    return lora.join(params, frozen), state

  return Guard(init, update, apply)


def step(
  transform: Guard,
  grads: Tree,
  optimizer_state: Guarded,
  params: Tree,
  metrics: dict[str, Array],
  **options: Any,
) -> tuple[Tree, Guarded, dict[str, Array]]:
  """Updates parameters, unless the update or its loss is not finite.

  Args:
    transform: from `make` or `guarded`.
    grads: the gradient, like `params`.
    optimizer_state: of the transform.
    params: what is trained.
    metrics: of the loss; those that end in "loss" must be finite.
    **options: of the transform's `apply`.

  Returns:
    The parameters and the state after it; and the metrics with
    "gradient_norm", "updates/skipped", how many updates the run has skipped,
    and "updates/skipped_in_a_row", of which so many without another between.
  """
  losses = {name: x for name, x in metrics.items() if name.endswith("loss")}
  params, optimizer_state = transform.apply(
    grads, optimizer_state, params, is_finite=all_finite(losses), **options
  )
  return (
    params,
    optimizer_state,
    metrics
    | {
      "gradient_norm": optax.global_norm(grads),
      "updates/skipped": optimizer_state.skipped,
      "updates/skipped_in_a_row": optimizer_state.in_a_row,
    },
  )


def all_finite(tree: Tree) -> Array:
  """Returns whether all floats of a tree of arrays are finite, a scalar."""
  return jnp.all(
    jnp.stack(
      [jnp.bool(True)]
      + [
        jnp.all(jnp.isfinite(x))
        for x in jax.tree.leaves(tree)
        if jnp.issubdtype(jnp.result_type(x), jnp.inexact)
      ]
    )
  )


def _select(is_first: Array, first: Tree, second: Tree) -> Tree:
  return jax.tree.map(lambda a, b: jnp.where(is_first, a, b), first, second)
