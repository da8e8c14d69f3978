"""Masks, and the sums, means and variances taken under them.

A mask is boolean and True means "counts". Masked entries are dropped by
`jnp.where` before any arithmetic: they may hold anything, NaN included, and
reach neither a value nor a gradient.
"""

import chex
import jax
import jax.numpy as jnp

Array = jax.Array
Axis = int | tuple[int, ...] | None


def masked_sum(
  x: Array, mask: Array, *, axis: Axis = None, axis_name: str | None = None
) -> Array:
  """Sums the unmasked elements.

  Args:
    x: float, any shape.
    mask: bool, the shape of `x`.
    axis: axes to sum over; all of them if None.
    axis_name: mapped axis to sum over as well, if any.

  Returns:
    float32, the shape of `x` without `axis`; 0 where no element counts.
  """
  chex.assert_equal_shape([x, mask])
  chex.assert_type([x, mask], [float, bool])
  x = jnp.where(mask, jnp.asarray(x, jnp.float32), 0.0)
  return _all_sum(jnp.sum(x, axis=axis), axis_name)


def masked_mean(
  x: Array, mask: Array, *, axis: Axis = None, axis_name: str | None = None
) -> Array:
  """Averages the unmasked elements.

    mean(x) = Σ_i m_i x_i / max(Σ_i m_i, 1)

  Both sums are complete, over the mapped axis too, before the division: a
  mean of per-shard means would weigh the tokens of an emptier shard more.

  Args:
    x: float, any shape.
    mask: bool, the shape of `x`.
    axis: axes to average over; all of them if None.
    axis_name: mapped axis that shards the averaged elements, if any.

  Returns:
    float32, the shape of `x` without `axis`; 0 where no element counts.
  """
  total = masked_sum(x, mask, axis=axis, axis_name=axis_name)
  return total / jnp.maximum(_count(mask, axis, axis_name), 1.0)


def masked_variance(
  x: Array, mask: Array, *, ddof: int = 0, axis_name: str | None = None
) -> Array:
  """Computes the variance of all unmasked elements, in two passes.

    var(x) = Σ_i m_i (x_i - mean(x))² / max(Σ_i m_i - ddof, 1)

  Args:
    x: float, any shape.
    mask: bool, the shape of `x`.
    ddof: 0 for the population's variance, 1 for the unbiased estimate.
    axis_name: mapped axis that shards the elements, if any.

  Returns:
    float32 scalar; 0 if no element counts.

  Raises:
    ValueError: if `ddof` is negative.
  """
  if ddof < 0:
    raise ValueError(f"ddof must not be negative, got {ddof}.")
  mean = masked_mean(x, mask, axis_name=axis_name)
  deviation = jnp.where(mask, jnp.asarray(x, jnp.float32), 0.0) - mean
  total = masked_sum(jnp.square(deviation), mask, axis_name=axis_name)
  return total / jnp.maximum(_count(mask, None, axis_name) - ddof, 1.0)


def masked_whiten(
  x: Array,
  mask: Array,
  *,
  shift_mean: bool = True,
  ddof: int = 1,
  epsilon: float = 1e-8,
  axis_name: str | None = None,
) -> Array:
  """Rescales the unmasked elements to mean 0 and variance 1.

    y = (x - mean(x)) / sqrt(var(x) + ε)   [+ mean(x) if not `shift_mean`]

  Args:
    x: float, any shape.
    mask: bool, the shape of `x`.
    shift_mean: whether to remove the mean. Advantages are whitened with the
      shift, rewards without it.
    ddof: 1 for the unbiased variance, 0 for the population's.
    epsilon: ε > 0, in squared units of `x`.
    axis_name: mapped axis that shards the elements, if any; mean and variance
      are then those of the whole batch.

  Returns:
    float32, the shape of `x`, 0 where masked.

  Raises:
    ValueError: if `ddof` is negative or `epsilon` is not positive.

  Source:
    Huang et al. (2024), "The N+ Implementation Details of RLHF with PPO";
    the unbiased variance is that of Padula and Soemers (2024).
  """
  if not epsilon > 0:
    raise ValueError(f"epsilon must be positive, got {epsilon}.")
  mean = masked_mean(x, mask, axis_name=axis_name)
  variance = masked_variance(x, mask, ddof=ddof, axis_name=axis_name)
  y = jnp.where(mask, jnp.asarray(x, jnp.float32), 0.0) - mean
  y = y * jax.lax.rsqrt(variance + epsilon)
  if not shift_mean:
    y = y + mean
  return jnp.where(mask, y, 0.0)


def response_mask(
  response_ids: Array,
  stop_ids: tuple[int, ...],
  *,
  lengths: Array | None = None,
) -> Array:
  """Marks the tokens of each response up to and including its end.

  Args:
    response_ids: `[B, T]` int.
    stop_ids: tokens that end a response; a row without any of them, as every
      row when the tuple is empty, counts to its last column.
    lengths: `[B]` int, the number of tokens that may count in each row, or
      None for T.

  Returns:
    `[B, T]` bool.

  Raises:
    ValueError: if a stop id is negative.
  """
  chex.assert_rank(response_ids, 2)
  chex.assert_type(response_ids, int)
  if any(stop_id < 0 for stop_id in stop_ids):
    raise ValueError(f"stop_ids must not be negative, got {stop_ids}.")

  is_stop = jnp.zeros(response_ids.shape, bool)
  for stop_id in stop_ids:
    is_stop |= response_ids == stop_id
  # The first stop token has no stop token before it, so it still counts.
  is_stop = is_stop.astype(jnp.int32)
  mask = jnp.cumsum(is_stop, axis=1) - is_stop == 0
  if lengths is not None:
    chex.assert_shape(lengths, response_ids.shape[:1])
    chex.assert_type(lengths, int)
    column = jnp.arange(response_ids.shape[1])
    mask &= column[None, :] < jnp.asarray(lengths)[:, None]
  return mask


def _count(mask: Array, axis: Axis, axis_name: str | None) -> Array:
  # Counted in integers: float32 cannot count past 2^24.
  count = jnp.sum(jnp.asarray(mask, jnp.int32), axis=axis)
  return _all_sum(count, axis_name).astype(jnp.float32)


def _all_sum(x: Array, axis_name: str | None) -> Array:
  return x if axis_name is None else jax.lax.psum(x, axis_name)
