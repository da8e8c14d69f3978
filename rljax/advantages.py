"""Advantages and returns: what the losses take as constants.

Masked positions are stepped over: they add nothing, cost no discount, and
their values never reach an unmasked position.
"""

import chex
import jax
import jax.numpy as jnp

Array = jax.Array


def gae(
  rewards: Array,
  values: Array,
  mask: Array,
  *,
  discount: float,
  gae_lambda: float,
) -> tuple[Array, Array]:
  """Generalized advantage estimates and the returns that a critic fits.

    δ_t = r_t + γ V_{t+1} - V_t
    A_t = δ_t + γ λ A_{t+1},   G_t = A_t + V_t

  where t + 1 is the next unmasked position, and V and A are 0 after the last
  one. λ = 1 gives the Monte-Carlo return minus the value, λ = 0 the one-step
  error. The returns are taken before any whitening of the advantages.

  No gradient flows through either result.

  Args:
    rewards: `[B, T]` float.
    values: `[B, T]` float, V of the text before token t, in units of return.
    mask: `[B, T]` bool, True on response tokens.
    discount: γ in [0, 1], per unmasked token.
    gae_lambda: λ in [0, 1].

  Returns:
    The advantages and the returns, each `[B, T]` float32, 0 where masked.

  Raises:
    ValueError: if `discount` or `gae_lambda` is outside [0, 1].

  Source:
    Schulman et al. (2016), "High-Dimensional Continuous Control Using
    Generalized Advantage Estimation", equations 11 and 16.
  """
  chex.assert_rank([rewards, values, mask], 2)
  chex.assert_equal_shape([rewards, values, mask])
  chex.assert_type([rewards, values, mask], [float, float, bool])
  _check_unit_interval(discount=discount, gae_lambda=gae_lambda)

  rewards = jax.lax.stop_gradient(jnp.asarray(rewards, jnp.float32))
  values = jax.lax.stop_gradient(jnp.asarray(values, jnp.float32))

  def step(carry, inputs):
    advantage_next, value_next = carry
    reward_t, value_t, mask_t = inputs
    delta_t = reward_t + discount * value_next - value_t
    advantage_t = delta_t + discount * gae_lambda * advantage_next
    # A masked position hands on what comes after it, untouched.
    advantage_t = jnp.where(mask_t, advantage_t, advantage_next)
    value_t = jnp.where(mask_t, value_t, value_next)
    return (advantage_t, value_t), advantage_t

  # `scan` walks the leading axis, so time goes first in here. The carry is
  # made of an input, to vary over the same mapped axes as the inputs do.
  end = jnp.zeros_like(rewards[:, 0])
  _, advantages = jax.lax.scan(
    step, (end, end), (rewards.T, values.T, jnp.asarray(mask).T), reverse=True
  )
  advantages = jnp.where(mask, advantages.T, 0.0)
  return advantages, jnp.where(mask, advantages + values, 0.0)


def returns_to_go(rewards: Array, mask: Array, *, discount: float) -> Array:
  """Discounted sum of each token's reward and those after it.

    G_t = r_t + γ G_{t+1},   0 after the last unmasked position

  No gradient flows through the result.

  Args:
    rewards: `[B, T]` float.
    mask: `[B, T]` bool, True on response tokens.
    discount: γ in [0, 1], per unmasked token.

  Returns:
    `[B, T]` float32, 0 where masked.

  Raises:
    ValueError: if `discount` is outside [0, 1].
  """
  # With values of 0 and λ = 1, the estimate is the return.
  _, returns = gae(
    rewards,
    jnp.zeros_like(rewards),
    mask,
    discount=discount,
    gae_lambda=1.0,
  )
  return returns


def _check_unit_interval(**settings: float) -> None:
  for name, value in settings.items():
    if not 0 <= value <= 1:
      raise ValueError(f"{name} must lie in [0, 1], got {value}.")
