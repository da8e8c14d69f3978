"""Optimizers from plain numbers. A fork writes optax in its script."""

import math

import optax

SCHEDULES = ("constant", "linear", "cosine")


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


def adamw(
  num_updates: int | None,
  *,
  learning_rate: float,
  kind: str = "constant",
  warmup: float = 0.0,
  final_learning_rate: float = 0.0,
  b1: float = 0.9,
  b2: float = 0.999,
  epsilon: float = 1e-8,
  weight_decay: float = 0.0,
  max_grad_norm: float = 0.0,
) -> optax.GradientTransformation:
  """Clips the global norm of the gradient, and steps by AdamW.

  Args:
    num_updates: of the run. None: the learning rate is 1, and the caller
      multiplies each update by one of `schedule`. So fits of different lengths
      share one program.
    learning_rate: see `schedule`, likewise `kind`, `warmup` and
      `final_learning_rate`.
    b1: decay of the first moment.
    b2: decay of the second moment.
    epsilon: of Adam's denominator.
    weight_decay: decoupled, times the learning rate.
    max_grad_norm: 0 for no clipping.

  Raises:
    ValueError: if there is no such schedule.

  Source:
    Loshchilov and Hutter (2019), "Decoupled Weight Decay Regularization".
  """
  rates = 1.0
  if num_updates is not None:
    rates = schedule(
      num_updates,
      learning_rate=learning_rate,
      kind=kind,
      warmup=warmup,
      final_learning_rate=final_learning_rate,
    )
  return optax.chain(
    optax.clip_by_global_norm(max_grad_norm or math.inf),
    optax.adamw(rates, b1=b1, b2=b2, eps=epsilon, weight_decay=weight_decay),
  )
