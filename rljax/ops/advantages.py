"""Advantages and returns: what the losses take as constants.

Masked positions are stepped over: they add nothing, cost no discount, and
their values never reach an unmasked position.
"""

import chex
import jax
import jax.numpy as jnp

from rljax.ops import masking

Array = jax.Array

GROUP_SCALES = ("group", "batch", "none")
PRIORITY_MODES = ("good_priority", "good_random", "all_priority", "none")


def gae(
  rewards: Array,
  values: Array,
  mask: Array,
  *,
  discount: float,
  gae_lambda: float,
) -> tuple[Array, Array]:
  """Computes generalized advantage estimates and the returns of a critic.

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
    # A masked position passes on what comes after it, unchanged.
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
  """Sums each token's reward and the discounted rewards after it.

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


def group_relative(
  group_scores: Array,
  counts: Array | None = None,
  *,
  scale: str,
  ddof: int = 1,
  epsilon: float = 1e-4,
  axis_name: str | None = None,
) -> Array:
  """Computes advantages over the other responses to the same prompt.

    c_bj = R_bj - mean_k R_bk

    group:  A_bj = c_bj / (std_k R_bk + ε)       GRPO
    batch:  A_bj = c_bj / (std(c) + ε)           REINFORCE++ with baseline
    none:   A_bj = c_bj                          Dr. GRPO

  where std(c) is over all responses of the batch. A group whose scores are
  all equal gets exactly 0, whatever ε.

  No gradient flows through the result.

  Args:
    group_scores: `[B, G]` float R, of G responses to each of B prompts.
    counts: `[B, G]` bool, the responses that count: means and deviations are
      over them, and the others get 0; None: all.
    scale: one of the three names above.
    ddof: 1 for the unbiased variance, 0 for the population's. DeepSeekMath
      does not say which; common libraries take 1.
    epsilon: ε >= 0, in units of score.
    axis_name: mapped axis that shards B, if any. It matters for "batch"
      alone: a group is whole on its shard.

  Returns:
    `[B, G]` float32.

  Raises:
    ValueError: if the scale is unknown, or `ddof` or `epsilon` is negative.

  Source:
    Shao et al. (2024), "DeepSeekMath", section 4.1.2; Hu et al. (2025),
    "REINFORCE++"; Liu et al. (2025), "Understanding R1-Zero-Like Training".
  """
  if scale not in GROUP_SCALES:
    raise ValueError(
      f"scale must be one of {', '.join(GROUP_SCALES)}, got {scale!r}."
    )
  if ddof < 0 or not epsilon >= 0:
    raise ValueError(
      f"ddof and epsilon must not be negative, got {ddof} and {epsilon}."
    )
  centred, counts, sizes = _centred_groups(group_scores, counts)
  if scale == "none":
    return centred
  if scale == "group":
    degrees = jnp.maximum(sizes - ddof, 1)
    variance = jnp.sum(jnp.square(centred), axis=1, keepdims=True) / degrees
  else:
    # The mean of centred scores is 0.
    variance = masking.masked_variance(
      centred, counts, ddof=ddof, axis_name=axis_name
    )[None, None]
  std = jnp.sqrt(variance)
  return jnp.where(std > 0, centred / jnp.where(std > 0, std + epsilon, 1.0), 0)


def leave_one_out(group_scores: Array, counts: Array | None = None) -> Array:
  """Computes advantages over the mean of the prompt's other responses.

    A_bj = R_bj - Σ_{k≠j} R_bk / (G - 1) = G / (G - 1) (R_bj - mean_k R_bk)

  A group whose scores are all equal gets exactly 0. No gradient flows through
  the result.

  Args:
    group_scores: `[B, G]` float R, of G >= 2 responses to each of B prompts;
      with their KL penalties, if there are any.
    counts: `[B, G]` bool, the responses that count, as for `group_relative`.
      The only one of a group gets 0.

  Returns:
    `[B, G]` float32.

  Raises:
    ValueError: if G is 1.

  Source:
    Kool et al. (2019), "Buy 4 REINFORCE Samples, Get a Baseline for Free!";
    Ahmadian et al. (2024), "Back to Basics: Revisiting REINFORCE-Style
    Optimization for Learning from Human Feedback in LLMs".

  Departures from TRL (1.16, `RLOOTrainer`):
    None in the advantages, unless it is told to divide them by the batch's
    deviation. Its loss clips the ratio of the whole response, one action, where
    `--algorithm=rloo` of grpo.py clips that of each token and divides by a
    constant; both have the same gradient at the first update of a rollout, up
    to that constant. Its KL penalty is the sum of k1 over the tokens, as here.
  """
  centred, _, sizes = _centred_groups(group_scores, counts)
  if centred.shape[1] < 2:
    raise ValueError("leave_one_out needs groups of at least 2, got 1.")
  return centred * (sizes / jnp.maximum(sizes - 1, 1))


def reinforce_pp(
  rewards: Array,
  mask: Array,
  *,
  ddof: int = 1,
  epsilon: float = 1e-8,
  axis_name: str | None = None,
) -> Array:
  """Computes the returns of tokens, normalised over the batch.

    G_t = Σ_{s>=t} r_s
    A_t = (G_t - mean(G)) / sqrt(var(G) + ε)

  With the score on the last token and -β k1 on each, G_t is the score less
  the KL penalty from t on. It needs no group: one response to each prompt is
  enough. No gradient flows through the result.

  Args:
    rewards: `[B, T]` float, as `rewards.place_score` and `kl_penalty` make.
    mask: `[B, T]` bool, True on response tokens.
    ddof: 1 for the unbiased variance, 0 for the population's.
    epsilon: ε > 0, in squared units of reward.
    axis_name: mapped axis that shards B, if any; mean and variance are then
      those of the whole batch.

  Returns:
    `[B, T]` float32, 0 where masked.

  Raises:
    ValueError: if `ddof` is negative or `epsilon` is not positive.

  Source:
    Hu et al. (2025), "REINFORCE++: A Simple and Efficient Approach for
    Aligning Large Language Models".
  """
  returns = returns_to_go(rewards, mask, discount=1.0)
  return masking.masked_whiten(
    returns, mask, ddof=ddof, epsilon=epsilon, axis_name=axis_name
  )


def sequence(sequence_rewards: Array, sequence_values: Array) -> Array:
  """Computes the advantage of a whole response, taken as one action.

    A = R - V

  No gradient flows through the result.

  Args:
    sequence_rewards: `[...]` float R, of the responses.
    sequence_values: the same shape, V of their prompts in units of reward.

  Returns:
    float32, the shape of the arguments.

  Source:
    Baheti et al. (2024), "Leftover Lunch: Advantage-based Offline
    Reinforcement Learning for Language Models".
  """
  chex.assert_equal_shape([sequence_rewards, sequence_values])
  chex.assert_type([sequence_rewards, sequence_values], float)
  rewards = jnp.asarray(sequence_rewards, jnp.float32)
  values = jnp.asarray(sequence_values, jnp.float32)
  return jax.lax.stop_gradient(rewards - values)


def positive_filter(sequence_advantages: Array) -> Array:
  """Replaces negative advantages by 0: max(A, 0).

  No gradient flows through the result.

  Args:
    sequence_advantages: `[...]` float A.

  Returns:
    float32, the shape of the argument; NaN stays NaN.
  """
  chex.assert_type(sequence_advantages, float)
  advantages = jnp.asarray(sequence_advantages, jnp.float32)
  return jax.lax.stop_gradient(jnp.maximum(advantages, 0.0))


def priority_weights(sequence_advantages: Array, *, mode: str) -> Array:
  """Computes the probabilities with which logged responses are drawn.

    good_priority:  p_i = max(A_i, 0) / Σ_j max(A_j, 0)
    good_random:    p_i = 1 / n where A_i > 0, n of these; else 0
    all_priority:   as good_priority, over all candidates of all prompts
    none:           p_i = 1 / N

  The first candidate of a prompt is the one to learn from: all modes but
  "all_priority" give the others 0. The methods that weigh by reward take their
  rewards for A.

  No gradient flows through the result.

  Args:
    sequence_advantages: `[N]` float A of logged responses, or `[N, K]` of the
      K candidates of each prompt.
    mode: one of the four names above.

  Returns:
    float32 p, the shape of the argument; 0 everywhere if nothing is positive,
    which `batches.PrioritySampler` refuses. NaN in a row that counts gives
    NaN.

  Raises:
    ValueError: if the mode is unknown.

  Source:
    Baheti et al. (2024), "Leftover Lunch", in the authors' code.
  """
  _check_rows(sequence_advantages)
  if mode not in PRIORITY_MODES:
    raise ValueError(
      f"mode must be one of {', '.join(PRIORITY_MODES)}, got {mode!r}."
    )
  weights = positive_filter(sequence_advantages)
  if mode == "good_random":
    weights = jnp.sign(weights)  # NaN stays NaN.
  elif mode == "none":
    weights = jnp.ones_like(weights)
  if weights.ndim == 2 and mode != "all_priority":
    weights = weights.at[:, 1:].set(0.0)
  total = jnp.sum(weights)
  return weights / jnp.where(total == 0, 1.0, total)


def drawn_scores(
  scores: Array, weights: Array, *, double_weighting: bool
) -> Array:
  """Computes the factor of each drawn response in the loss.

  Responses are drawn in proportion to their score, and the loss multiplies by
  the score once more: the expected update weighs each by p_i s_i, which is
  proportional to its square. This double weighting is the published behaviour.
  Without it,

    s_i / (n p_i)   where p_i > 0, n of these; else 0

  makes the expected update that of uniform draws from the n responses, with
  each score used once.

  No gradient flows through the result.

  Args:
    scores: `[N]` or `[N, K]` float s, advantages or rewards.
    weights: the same shape, p of `priority_weights`.
    double_weighting: whether to return the scores as they are.

  Returns:
    float32, the shape of the arguments.
  """
  _check_rows(scores)
  chex.assert_equal_shape([scores, weights])
  chex.assert_type(weights, float)
  scores = jax.lax.stop_gradient(jnp.asarray(scores, jnp.float32))
  if double_weighting:
    return scores
  weights = jax.lax.stop_gradient(jnp.asarray(weights, jnp.float32))
  drawn = weights > 0
  num_drawn = jnp.sum(drawn.astype(jnp.float32))
  return jnp.where(
    drawn, scores / jnp.where(drawn, num_drawn * weights, 1.0), 0.0
  )


def _centred_groups(
  group_scores: Array, counts: Array | None
) -> tuple[Array, Array, Array]:
  """Subtracts from `[B, G]` scores the mean of their row, in float32.

  Returns:
    `[B, G]`, 0 where a score does not count; which do, `[B, G]` bool; and how
    many of a row, `[B, 1]` float32.
  """
  chex.assert_rank(group_scores, 2)
  chex.assert_type(group_scores, float)
  scores = jax.lax.stop_gradient(jnp.asarray(group_scores, jnp.float32))
  if counts is None:
    counts = jnp.ones(scores.shape, bool)
  counts = jnp.asarray(counts)
  chex.assert_equal_shape([scores, counts])
  chex.assert_type(counts, bool)
  sizes = counts.sum(axis=1, keepdims=True).astype(jnp.float32)
  # With the first score subtracted, equal scores are exactly 0. Their rounded
  # mean need not equal them, and a tiny std would magnify the difference.
  first = jnp.argmax(counts, axis=1)[:, None]
  scores = scores - jnp.take_along_axis(scores, first, axis=1)
  scores = jnp.where(counts, scores, 0.0)
  means = jnp.sum(scores, axis=1, keepdims=True) / jnp.maximum(sizes, 1.0)
  return jnp.where(counts, scores - means, 0.0), counts, sizes


def _check_rows(x: Array) -> None:
  chex.assert_rank(x, {1, 2})
  chex.assert_type(x, float)


def _check_unit_interval(**settings: float) -> None:
  for name, value in settings.items():
    if not 0 <= value <= 1:
      raise ValueError(f"{name} must lie in [0, 1], got {value}.")
