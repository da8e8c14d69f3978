"""Per-token rewards: scores, steps, potentials, and an adaptive KL penalty."""

import math

import chex
import jax
import jax.numpy as jnp

from rljax.ops import log_probs as log_probs_lib

Array = jax.Array

# Of an adaptive KL coefficient in one batch: at 0 it would stay for ever.
_LEAST_FACTOR = 0.01


def place_score(scores: Array, mask: Array) -> Array:
  """Places each score on the last unmasked token of its response.

    r_t = R if t = max{s : m_s} else 0

  Args:
    scores: `[B]` float, one per response.
    mask: `[B, T]` bool, True on response tokens. A row without any has no
      place for its score and gets zeros.

  Returns:
    `[B, T]` float32.
  """
  chex.assert_rank([scores, mask], [1, 2])
  chex.assert_equal_shape_prefix([scores, mask], 1)
  chex.assert_type([scores, mask], [float, bool])
  scores = jnp.asarray(scores, jnp.float32)
  return jnp.where(_is_last(mask), scores[:, None], 0.0)


def place_step_rewards(
  step_rewards: Array, step_ends: Array, mask: Array
) -> Array:
  """Places the reward of each step on the token that ends the step.

    r_t = R_k if t is the k-th step end, else 0

  The rewards of steps without an end token, such as a last line without a line
  feed, are added to the last unmasked token. So nothing is lost: the sum over t
  is the sum over k.

  Args:
    step_rewards: `[B, S]` float, R of the steps in their order; 0 for steps
      that a row does not have.
    step_ends: `[B, T]` bool, True on tokens that end a step. Ends after the
      S-th earn nothing, and masked ones are none.
    mask: `[B, T]` bool, True on response tokens. A row without any has no
      place for rewards and gets zeros.

  Returns:
    `[B, T]` float32. No gradient flows through it.
  """
  chex.assert_rank([step_rewards, step_ends, mask], 2)
  chex.assert_equal_shape([step_ends, mask])
  chex.assert_equal_shape_prefix([step_rewards, mask], 1)
  chex.assert_type([step_rewards, step_ends, mask], [float, bool, bool])
  step_rewards = jax.lax.stop_gradient(jnp.asarray(step_rewards, jnp.float32))
  num_steps = step_rewards.shape[1]
  ends = jnp.asarray(step_ends) & mask
  num_ends = jnp.cumsum(jnp.asarray(ends, jnp.int32), axis=1)  # Up to t.
  step = jnp.clip(num_ends - 1, 0, num_steps - 1)
  placed = jnp.where(
    ends & (num_ends <= num_steps),
    jnp.take_along_axis(step_rewards, step, axis=1),
    0.0,
  )
  is_open = jnp.arange(num_steps)[None, :] >= num_ends[:, -1:]  # [B, S]
  rest = jnp.sum(jnp.where(is_open, step_rewards, 0.0), axis=1)
  return placed + place_score(rest, mask)


def potential_rewards(
  potentials: Array,
  step_ends: Array,
  mask: Array,
  *,
  initial: float = 0.5,
  scale: float = 1.0,
) -> Array:
  """Rewards the change of a potential from one step to the next.

    r_t = c (Φ_i - Φ_{i-1}) if t is the i-th point, else 0;   Φ_0 = `initial`

  The points of a row are its step ends and its last unmasked token. With Φ
  the probability that a prefix leads to a right answer this is the dense
  reward of an outcome model. It telescopes to c (Φ_last - Φ_0): there is
  nothing to be earned by writing more steps.

  Args:
    potentials: `[B, T]` float, Φ of the text up to and including token t; at
      other tokens than the points it may be anything.
    step_ends: `[B, T]` bool, True on tokens that end a step; masked ones are
      none.
    mask: `[B, T]` bool, True on response tokens.
    initial: Φ_0, of the prompt alone.
    scale: c, reward per unit of potential.

  Returns:
    `[B, T]` float32. No gradient flows through it.

  Source:
    Ng, Harada and Russell (1999), "Policy Invariance under Reward
    Transformations", with the outcome model of Havrilla et al. (2024),
    "Teaching Large Language Models to Reason with Reinforcement Learning".
  """
  chex.assert_rank([potentials, step_ends, mask], 2)
  chex.assert_equal_shape([potentials, step_ends, mask])
  chex.assert_type([potentials, step_ends, mask], [float, bool, bool])
  points = (jnp.asarray(step_ends) & mask) | _is_last(mask)
  potentials = jax.lax.stop_gradient(jnp.asarray(potentials, jnp.float32))
  potentials = jnp.where(points, potentials, 0.0)
  # Column of the last point before each token; -1 where there is none.
  column = jnp.arange(mask.shape[1], dtype=jnp.int32)[None, :]
  latest = jax.lax.cummax(jnp.where(points, column, -1), axis=1)
  before = jnp.pad(latest[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
  previous = jnp.where(
    before >= 0,
    jnp.take_along_axis(potentials, jnp.maximum(before, 0), axis=1),
    initial,
  )
  return jnp.where(points, scale * (potentials - previous), 0.0)


def generative_rewards(
  probs: Array,
  is_right: Array,
  mask: Array,
  *,
  threshold: float = 0.5,
  max_reward: float = 0.5,
  max_penalty: float = 0.1,
) -> Array:
  """Rewards tokens by their probability under a generative reward model.

    r_t = clip(p_t - τ, 0, r_max)     in a right response
    r_t = clip(p_t - τ, -r_min, 0)    in a wrong one

  The reward model writes corrected responses. Forced along a given response,
  it gives a low probability to the tokens that it would have changed. Nothing
  in a wrong response earns more than 0, and nothing in a right one less.

  Args:
    probs: `[B, T]` float p in [0, 1], of the response tokens under the reward
      model, each given those before it.
    is_right: `[B]` bool, whether the response itself was scored as right. A
      right correction, or a reply that names no wrong step, is not enough.
    mask: `[B, T]` bool, True on response tokens.
    threshold: τ in [0, 1], the probability that earns nothing.
    max_reward: r_max >= 0. With 0, right responses earn nothing.
    max_penalty: r_min >= 0. With 0, wrong responses cost nothing.

  Returns:
    `[B, T]` float32, 0 where masked. No gradient flows through it.

  Raises:
    ValueError: if `threshold` is outside [0, 1] or a bound is negative.

  Source:
    Chen et al. (2024), "Improving Large Language Models via Fine-grained
    Reinforcement Learning with Minimum Editing Constraint", in the authors'
    code, which keeps the rewards in bfloat16; there -0.1 is -0.10009766.
  """
  chex.assert_rank([probs, is_right, mask], [2, 1, 2])
  chex.assert_equal_shape([probs, mask])
  chex.assert_equal_shape_prefix([probs, is_right], 1)
  chex.assert_type([probs, is_right, mask], [float, bool, bool])
  if not 0 <= threshold <= 1:
    raise ValueError(f"threshold must lie in [0, 1], got {threshold}.")
  for name, bound in (
    ("max_reward", max_reward),
    ("max_penalty", max_penalty),
  ):
    if not bound >= 0:
      raise ValueError(f"{name} must not be negative, got {bound}.")

  probs = jax.lax.stop_gradient(jnp.asarray(probs, jnp.float32))
  margin = jnp.where(mask, probs, threshold) - threshold
  return jnp.where(
    jnp.asarray(is_right)[:, None],
    jnp.clip(margin, 0.0, max_reward),
    jnp.clip(margin, -max_penalty, 0.0),
  )


def overlong_penalty(lengths: Array, *, max_length: int, buffer: int) -> Array:
  """Computes penalties that grow over the last tokens before a limit.

    0                               if n <= L - b
    ((L - b) - n) / b               if L - b < n <= L
    -1                              if n > L

  Args:
    lengths: `[...]` int n, tokens of the responses.
    max_length: L, in tokens.
    buffer: b in [1, L], tokens before the limit that are penalised.

  Returns:
    float32, the shape of `lengths`, to be added to scores.

  Raises:
    ValueError: if `buffer` is below 1 or above `max_length`.

  Source:
    Yu et al. (2025), "DAPO", equation 13.
  """
  chex.assert_type(lengths, int)
  if not 1 <= buffer <= max_length:
    raise ValueError(
      f"buffer must lie between 1 and max_length={max_length}, got {buffer}."
    )
  excess = jnp.asarray(lengths) - (max_length - buffer)
  return -jnp.clip(excess.astype(jnp.float32) / buffer, 0.0, 1.0)


def kl_penalty(
  log_probs: Array,
  ref_log_probs: Array,
  mask: Array,
  *,
  kl_coef: float | Array,
  kind: str = "k1",
) -> Array:
  """Penalises each token's divergence from the reference policy.

    r_t = -β KL_t,   KL_t an estimate of KL(π‖π_ref) from the sampled token

  No gradient flows through the result.

  Args:
    log_probs: `[B, T]` float, of the policy that sampled the tokens.
    ref_log_probs: `[B, T]` float, of the reference policy.
    mask: `[B, T]` bool, True on response tokens.
    kl_coef: β, a number or, under a controller, a scalar array.
    kind: the estimator, "k1", "k2" or "k3"; see `log_probs.kl_estimate`.

  Returns:
    `[B, T]` float32, 0 where masked.

  Raises:
    ValueError: if `kind` is none of the estimators.

  Source:
    Ziegler et al. (2019), "Fine-Tuning Language Models from Human
    Preferences", equation 2; Schulman (2020), "Approximating KL Divergence".
  """
  chex.assert_rank([log_probs, ref_log_probs, mask], 2)
  chex.assert_equal_shape([log_probs, ref_log_probs, mask])
  chex.assert_type([log_probs, ref_log_probs, mask], [float, float, bool])
  kl_coef = jnp.asarray(kl_coef, jnp.float32)
  chex.assert_rank(kl_coef, 0)

  estimate = log_probs_lib.kl_estimate(
    jnp.asarray(log_probs, jnp.float32),
    jnp.asarray(ref_log_probs, jnp.float32),
    kind=kind,
  )
  return jax.lax.stop_gradient(jnp.where(mask, -kl_coef * estimate, 0.0))


@chex.dataclass(frozen=True)
class AdaptiveKL:
  """Adapts a KL coefficient to steer the measured KL towards a target.

    e = clip(KL / target - 1, -0.2, 0.2)
    β ← β max(0.01, 1 + e n / horizon)

  A KL that is not finite says nothing: β stays, and it is counted.

  Source:
    Ziegler et al. (2019), "Fine-Tuning Language Models from Human
    Preferences", section 2.2, with n responses a batch in the step size as
    in the authors' code. The least factor is ours: with batches of more than
    five horizons theirs is negative, and then rewards the KL. At 0, β could
    never rise again.
  """

  coef: Array  # [] float32: β.
  num_ignored: Array  # [] int32: batches whose KL was not finite.

  @classmethod
  def create(cls, coef: float) -> "AdaptiveKL":
    """Returns a controller that starts at `coef`.

    Args:
      coef: β >= 0 of the first batch.

    Returns:
      The controller.

    Raises:
      ValueError: if `coef` is negative.
    """
    if not 0 <= coef < math.inf:
      raise ValueError(f"coef must not be negative, nor infinite, got {coef}.")
    return cls(coef=jnp.float32(coef), num_ignored=jnp.int32(0))

  def update(
    self,
    kl: float | Array,
    num_samples: int | Array,
    *,
    target: float,
    horizon: float,
  ) -> "AdaptiveKL":
    """Returns the controller after one batch, which has no gradient.

    Args:
      kl: scalar, mean over the batch of the KL summed over each response's
        tokens, in nats.
      num_samples: n, the responses in the batch, over all devices.
      target: nats per response; > 0.
      horizon: responses over which a constant error of e changes β by a
        factor of about exp(e); > 0.

    Returns:
      A new controller.

    Raises:
      ValueError: if `target` or `horizon` is not positive.
    """
    for name, value in (("target", target), ("horizon", horizon)):
      if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive, got {value}.")
    kl = jax.lax.stop_gradient(jnp.asarray(kl, jnp.float32))
    num_samples = jnp.asarray(num_samples).astype(jnp.float32)
    chex.assert_rank([kl, num_samples], 0)
    is_finite = jnp.isfinite(kl)
    error = jnp.clip(kl / target - 1.0, -0.2, 0.2)
    factor = jnp.maximum(1.0 + error * num_samples / horizon, _LEAST_FACTOR)
    # β itself stays within float32.
    coef = jnp.minimum(self.coef * factor, jnp.finfo(jnp.float32).max)
    return self.replace(
      coef=jnp.where(is_finite, coef, self.coef),
      num_ignored=self.num_ignored + (~is_finite).astype(jnp.int32),
    )


def _is_last(mask: Array) -> Array:
  """`[B, T]` bool, True on the last unmasked token of each row."""
  # This token and those after it.
  num_left = jax.lax.cumsum(jnp.asarray(mask, jnp.int32), axis=1, reverse=True)
  return jnp.asarray(mask) & (num_left == 1)
