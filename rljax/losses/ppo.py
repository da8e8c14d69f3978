"""Clipped losses of proximal policy optimization and of its descendants."""

import functools

import chex
import jax
import jax.numpy as jnp

from rljax.ops import log_probs as log_probs_lib
from rljax.ops import masking

Array = jax.Array
Metrics = dict[str, Array]

NORMALIZERS = ("token_mean", "sequence_mean", "constant")

# e^60 is still far inside float32. Without a bound the ratio overflows, and
# the branch that the maximum below discards has the gradient inf * 0 = NaN.
_MAX_LOG_RATIO = 60.0


def num_terms(mask: Array, *, normalizer: str) -> Array:
  """Counts what a normalizer divides by, see `clipped_policy_loss`.

    token_mean: tokens;  sequence_mean: sequences that have any;  constant: B

  Args:
    mask: `[B, T]` bool, True on response tokens.
    normalizer: one of the three names above.

  Returns:
    A scalar, by which the mean of a part of a batch weighs.

  Raises:
    ValueError: if the normalizer is unknown.
  """
  chex.assert_rank(mask, 2)
  chex.assert_type(mask, bool)
  _check_normalizer(normalizer)
  if normalizer == "token_mean":
    return mask.sum()
  if normalizer == "sequence_mean":
    return mask.any(axis=1).sum()
  return jnp.asarray(mask.shape[0])


def clipped_policy_loss(
  log_probs: Array,
  old_log_probs: Array,
  advantages: Array,
  mask: Array,
  *,
  clip_epsilon: float,
  clip_epsilon_high: float | None = None,
  normalizer: str = "token_mean",
  ratio_guard: float | None = None,
  axis_name: str | None = None,
) -> tuple[Array, Metrics]:
  """Computes the clipped surrogate loss of the policy.

    ρ_t = π(y_t) / π_old(y_t)
    l_t = max(-A_t ρ_t, -A_t clip(ρ_t, 1 - ε, 1 + ε_high))

  The loss averages l in one of three ways:

    token_mean:     Σ_it l_it / Σ_it m_it, over the tokens of the batch
    sequence_mean:  over a sequence's tokens, then over the sequences that
                    have any
    constant:       Σ_it l_it / (N T), whatever the responses' lengths

  No gradient flows to `old_log_probs` and `advantages`. Where log ρ exceeds
  60 it is taken as 60, without gradient, to keep everything finite.

  Args:
    log_probs: `[B, T]` float, of the trained policy.
    old_log_probs: `[B, T]` float, of the policy that sampled the tokens.
    advantages: `[B, T]` float.
    mask: `[B, T]` bool, True on response tokens.
    clip_epsilon: ε > 0, how far the ratio may fall below 1.
    clip_epsilon_high: ε_high > 0, how far it may rise above 1; ε if None.
    normalizer: one of the three names above. N is the number of rows, T the
      padded length.
    ratio_guard: threshold of `ratio_guard`, above which the loss is 0, or
      None for no guard. The metrics are the same either way.
    axis_name: mapped axis that shards B, if any; the loss is then that of
      the whole batch, on every shard.

  Returns:
    The scalar loss (0 if no token counts) and scalar metrics, which are means
    over the unmasked tokens of the batch but for the extreme ratios:
    "ppo/clip_fraction" is the share of tokens whose clipped term exceeds the
    other, "ppo/approx_kl" is mean(ρ - 1 - log ρ), and "ppo/approx_kl_k2" is
    mean((log ρ)² / 2), both of KL(π_old‖π); "ppo/count" is the number of
    tokens.

  Raises:
    ValueError: if a clip epsilon or the threshold is not positive, or the
      normalizer is unknown.

  Source:
    Schulman et al. (2017), "Proximal Policy Optimization Algorithms",
    equation 7; Yu et al. (2025), "DAPO", equation 8, for ε_high and the mean
    over tokens; Liu et al. (2025), "Understanding R1-Zero-Like Training", for
    the constant.
  """
  arrays = [log_probs, old_log_probs, advantages, mask]
  chex.assert_rank(arrays, 2)
  chex.assert_equal_shape(arrays)
  chex.assert_type(arrays, [float, float, float, bool])
  if clip_epsilon_high is None:
    clip_epsilon_high = clip_epsilon
  _check_positive(
    clip_epsilon=clip_epsilon, clip_epsilon_high=clip_epsilon_high
  )
  _check_normalizer(normalizer)

  counts = mask
  if ratio_guard is not None:
    guard = _ratio_guard(
      log_probs,
      old_log_probs,
      mask,
      threshold=ratio_guard,
      axis_name=axis_name,
    )
    counts = mask & (guard > 0)

  # The selection in here stops the gradient of whatever masked entries hold;
  # that in the means below drops their values.
  log_ratio = _log_ratio(log_probs, old_log_probs, mask)
  ratio = jnp.exp(log_ratio)
  advantages = jax.lax.stop_gradient(jnp.asarray(advantages, jnp.float32))
  unclipped = -advantages * ratio
  clipped = -advantages * jnp.clip(
    ratio, 1.0 - clip_epsilon, 1.0 + clip_epsilon_high
  )
  token_losses = jnp.maximum(unclipped, clipped)  # [B, T]

  loss = _normalized(token_losses, counts, normalizer, axis_name)
  return loss, {
    "ppo/policy_loss": jax.lax.stop_gradient(loss),
    **_ratio_metrics(log_ratio, clipped > unclipped, mask, axis_name),
  }


def gspo_loss(
  log_probs: Array,
  old_log_probs: Array,
  sequence_advantages: Array,
  mask: Array,
  *,
  clip_epsilon: float,
  clip_epsilon_high: float | None = None,
  axis_name: str | None = None,
) -> tuple[Array, Metrics]:
  """Computes the clipped surrogate loss with one ratio per response.

    s_i = exp(Σ_t m_it log(π(y_it) / π_old(y_it)) / Σ_t m_it)
    l_i = max(-A_i s_i, -A_i clip(s_i, 1 - ε, 1 + ε_high))

  The loss is the mean of l over the sequences that have any token. No gradient
  flows to `old_log_probs` and `sequence_advantages`. Where log s exceeds 60 it
  is taken as 60, without gradient, to keep everything finite.

  Args:
    log_probs: `[B, T]` float, of the trained policy.
    old_log_probs: `[B, T]` float, of the policy that sampled the tokens.
    sequence_advantages: `[B]` float A.
    mask: `[B, T]` bool, True on response tokens.
    clip_epsilon: ε > 0. A mean over tokens varies little: the paper has 3e-4.
    clip_epsilon_high: ε_high > 0, 4e-4 in the paper; ε if None.
    axis_name: mapped axis that shards B, if any; the loss is then that of
      the whole batch, on every shard.

  Returns:
    The scalar loss (0 if no token counts) and the metrics of
    `clipped_policy_loss`, over sequences in place of tokens.

  Raises:
    ValueError: if a clip epsilon is not positive.

  Source:
    Zheng et al. (2025), "Group Sequence Policy Optimization".
  """
  arrays = [log_probs, old_log_probs, mask]
  chex.assert_rank([*arrays, sequence_advantages], [2, 2, 2, 1])
  chex.assert_equal_shape(arrays)
  chex.assert_equal_shape_prefix([mask, sequence_advantages], 1)
  chex.assert_type([*arrays, sequence_advantages], [float, float, bool, float])
  if clip_epsilon_high is None:
    clip_epsilon_high = clip_epsilon
  _check_positive(
    clip_epsilon=clip_epsilon, clip_epsilon_high=clip_epsilon_high
  )
  counts = jnp.any(mask, axis=1)  # [B]
  log_ratio = masking.masked_mean(
    _difference(log_probs, old_log_probs, mask), mask, axis=1
  )
  log_ratio = jnp.minimum(log_ratio, _MAX_LOG_RATIO)
  ratio = jnp.exp(log_ratio)
  advantages = jax.lax.stop_gradient(
    jnp.asarray(sequence_advantages, jnp.float32)
  )
  unclipped = -advantages * ratio
  clipped = -advantages * jnp.clip(
    ratio, 1.0 - clip_epsilon, 1.0 + clip_epsilon_high
  )
  loss = masking.masked_mean(
    jnp.maximum(unclipped, clipped), counts, axis_name=axis_name
  )
  return loss, {
    "ppo/policy_loss": jax.lax.stop_gradient(loss),
    **_ratio_metrics(log_ratio, clipped > unclipped, counts, axis_name),
  }


def cispo_loss(
  log_probs: Array,
  old_log_probs: Array,
  advantages: Array,
  mask: Array,
  *,
  max_ratio: float,
  normalizer: str = "token_mean",
  axis_name: str | None = None,
) -> tuple[Array, Metrics]:
  """Computes a policy gradient loss whose ratio is bounded, not dropped.

    l_t = -sg[min(ρ_t, ρ_max)] A_t log π(y_t),   ρ_t = π(y_t) / π_old(y_t)

  Every token keeps a gradient, where the clipped surrogate drops those whose
  ratio has moved. The value of the loss means nothing; its gradient does. No
  gradient flows to `old_log_probs` and `advantages`.

  Args:
    log_probs: `[B, T]` float, of the trained policy.
    old_log_probs: `[B, T]` float, of the policy that sampled the tokens.
    advantages: `[B, T]` float.
    mask: `[B, T]` bool, True on response tokens.
    max_ratio: ρ_max > 0, the 1 + ε_high of the paper.
    normalizer: as in `clipped_policy_loss`.
    axis_name: mapped axis that shards B, if any; the loss is then that of
      the whole batch, on every shard.

  Returns:
    The scalar loss (0 if no token counts) and the metrics of
    `clipped_policy_loss`, where "ppo/clip_fraction" is the share of tokens
    whose ratio exceeds ρ_max.

  Raises:
    ValueError: if `max_ratio` is not positive, or the normalizer is unknown.

  Source:
    MiniMax (2025), "MiniMax-M1", without a bound below, as in its runs.
  """
  arrays = [log_probs, old_log_probs, advantages, mask]
  chex.assert_rank(arrays, 2)
  chex.assert_equal_shape(arrays)
  chex.assert_type(arrays, [float, float, float, bool])
  _check_positive(max_ratio=max_ratio)
  _check_normalizer(normalizer)
  log_ratio = _log_ratio(log_probs, old_log_probs, mask)
  ratio = jnp.exp(log_ratio)
  weights = jax.lax.stop_gradient(
    jnp.minimum(ratio, max_ratio) * jnp.asarray(advantages, jnp.float32)
  )
  log_probs = jnp.where(mask, jnp.asarray(log_probs, jnp.float32), 0.0)
  loss = _normalized(-weights * log_probs, mask, normalizer, axis_name)
  return loss, {
    "ppo/policy_loss": jax.lax.stop_gradient(loss),
    **_ratio_metrics(log_ratio, ratio > max_ratio, mask, axis_name),
  }


def kl_to_reference(
  log_probs: Array,
  ref_log_probs: Array,
  mask: Array,
  *,
  kind: str = "k3",
  normalizer: str = "token_mean",
  axis_name: str | None = None,
) -> Array:
  """Estimates the KL to a reference policy, with a gradient.

    d_t = log π_ref(y_t) - log π(y_t)
    k2: d² / 2,   k3: exp(d) - 1 - d

  averaged like the loss that it is added to. On samples of π the gradient of
  k3, which GRPO takes, is in expectation that of KL(π_ref‖π), and the gradient
  of k2 that of KL(π‖π_ref). That of k1 is 0, so there is none here. No
  gradient flows to `ref_log_probs`. Where d exceeds 60 it is taken as 60,
  without gradient, to keep everything finite.

  Args:
    log_probs: `[B, T]` float, of the trained policy.
    ref_log_probs: `[B, T]` float, of the reference policy.
    mask: `[B, T]` bool, True on response tokens.
    kind: "k2" or "k3".
    normalizer: as in `clipped_policy_loss`.
    axis_name: mapped axis that shards B, if any.

  Returns:
    float32 scalar, nats per token ("constant": per slot of the padded batch);
    0 if no token counts.

  Raises:
    ValueError: if `kind` or the normalizer is unknown.

  Source:
    Shao et al. (2024), "DeepSeekMath", equation 4; Schulman (2020),
    "Approximating KL Divergence".
  """
  arrays = [log_probs, ref_log_probs, mask]
  chex.assert_rank(arrays, 2)
  chex.assert_equal_shape(arrays)
  chex.assert_type(arrays, [float, float, bool])
  if kind not in ("k2", "k3"):
    raise ValueError(f"kind must be k2 or k3, got {kind!r}.")
  _check_normalizer(normalizer)
  # log(π / π_ref) from below, for exp(d) to stay finite.
  log_ratio = jnp.maximum(
    _difference(log_probs, ref_log_probs, mask), -_MAX_LOG_RATIO
  )
  estimate = log_probs_lib.kl_estimate(
    log_ratio, jnp.zeros_like(log_ratio), kind=kind
  )
  return _normalized(estimate, mask, normalizer, axis_name)


def clipped_value_loss(
  values: Array,
  old_values: Array,
  returns: Array,
  mask: Array,
  *,
  clip_epsilon: float,
  axis_name: str | None = None,
) -> tuple[Array, Metrics]:
  """Computes half the mean clipped squared error of the values.

    V_clip = clip(V, V_old - ε, V_old + ε)
    L = mean(max((V - G)², (V_clip - G)²)) / 2

  The mean is over the unmasked tokens of the batch. No gradient flows to
  `old_values` and `returns`.

  Args:
    values: `[B, T]` float, of the trained critic, in units of return.
    old_values: `[B, T]` float, when the responses were sampled.
    returns: `[B, T]` float, the targets G.
    mask: `[B, T]` bool, True on response tokens.
    clip_epsilon: ε > 0, in units of return; `math.inf` never clips.
    axis_name: mapped axis that shards B, if any; the loss is then that of
      the whole batch, on every shard.

  Returns:
    The scalar loss (0 if no token counts) and scalar metrics:
    "value/clip_fraction" is the share of tokens whose clipped square exceeds
    the other; "value/explained_variance" is 1 - Var(G - V) / Var(G), or 0
    when the returns are all equal. What it is made of are the means and
    variances of G, "value/returns_...", and of G - V, "value/errors_...", over
    "value/count" tokens.

  Raises:
    ValueError: if `clip_epsilon` is not positive.

  Source:
    Ziegler et al. (2019), "Fine-Tuning Language Models from Human
    Preferences", in the authors' code; Padula and Soemers (2024).
  """
  arrays = [values, old_values, returns, mask]
  chex.assert_rank(arrays, 2)
  chex.assert_equal_shape(arrays)
  chex.assert_type(arrays, [float, float, float, bool])
  _check_positive(clip_epsilon=clip_epsilon)

  def select(x):
    return jnp.where(mask, jnp.asarray(x, jnp.float32), 0.0)

  values = select(values)
  old_values = select(jax.lax.stop_gradient(old_values))
  returns = select(jax.lax.stop_gradient(returns))
  # Between its bounds the value stays as it is, to the last bit; the sum of
  # V_old and a clipped difference would be rounded and count as clipped.
  clipped_values = jnp.clip(
    values, old_values - clip_epsilon, old_values + clip_epsilon
  )
  unclipped = jnp.square(values - returns)
  clipped = jnp.square(clipped_values - returns)
  loss = 0.5 * masking.masked_mean(
    jnp.maximum(unclipped, clipped), mask, axis_name=axis_name
  )

  values, clipped, unclipped = jax.lax.stop_gradient(
    (values, clipped, unclipped)
  )
  errors = returns - values
  mean = functools.partial(masking.masked_mean, mask=mask, axis_name=axis_name)
  residual_variance = masking.masked_variance(errors, mask, axis_name=axis_name)
  variance = masking.masked_variance(returns, mask, axis_name=axis_name)
  explained = 1.0 - residual_variance / jnp.where(variance > 0, variance, 1.0)
  return loss, {
    "value/loss": jax.lax.stop_gradient(loss),
    "value/clip_fraction": mean((clipped > unclipped).astype(jnp.float32)),
    "value/explained_variance": jnp.where(variance > 0, explained, 0.0),
    "value/returns_mean": mean(returns),
    "value/returns_variance": variance,
    "value/errors_mean": mean(errors),
    "value/errors_variance": residual_variance,
    "value/count": masking.masked_sum(
      jnp.ones_like(values), mask, axis_name=axis_name
    ),
  }


def kl_from_old(
  log_probs: Array,
  old_log_probs: Array,
  mask: Array,
  *,
  axis_name: str | None = None,
) -> Array:
  """Estimates KL(π_old‖π), the other penalty of PPO, with a gradient.

    mean(ρ - 1 - log ρ),   ρ_t = π(y_t) / π_old(y_t)

  The mean is over the unmasked tokens of the batch. The gradient with respect
  to log π(y_t) is (ρ_t - 1) / n; that of the first update is 0. No gradient
  flows to `old_log_probs`.

  Args:
    log_probs: `[B, T]` float, of the trained policy.
    old_log_probs: `[B, T]` float, of the policy that sampled the tokens.
    mask: `[B, T]` bool, True on response tokens.
    axis_name: mapped axis that shards B, if any.

  Returns:
    float32 scalar, nats per token; 0 if no token counts.

  Source:
    Schulman et al. (2017), "Proximal Policy Optimization Algorithms",
    equation 8, estimated by the k3 of Schulman (2020).
  """
  chex.assert_rank([log_probs, old_log_probs, mask], 2)
  chex.assert_equal_shape([log_probs, old_log_probs, mask])
  chex.assert_type([log_probs, old_log_probs, mask], [float, float, bool])
  log_ratio = _log_ratio(log_probs, old_log_probs, mask)
  return masking.masked_mean(
    jnp.expm1(log_ratio) - log_ratio, mask, axis_name=axis_name
  )


def ratio_guard(
  log_probs: Array,
  old_log_probs: Array,
  mask: Array,
  *,
  threshold: float,
  axis_name: str | None = None,
) -> Array:
  """Checks whether a batch is still close enough to its sampling policy.

    g = 0 if mean(ρ) > threshold else 1,   ρ_t = π(y_t) / π_old(y_t)

  The mean is over the unmasked tokens of the batch. A step with g = 0 is
  skipped by multiplying every part of its loss, the entropies included, by g,
  or, safe also for parts that are not finite, by `mask & (g > 0)` as the mask
  of every part. No gradient flows through g.

  Args:
    log_probs: `[B, T]` float, of the trained policy.
    old_log_probs: `[B, T]` float, of the policy that sampled the tokens.
    mask: `[B, T]` bool, True on response tokens.
    threshold: largest mean ratio to train on; > 0.
    axis_name: mapped axis that shards B, if any.

  Returns:
    float32 scalar, 0 or 1; 1 if no token counts.

  Raises:
    ValueError: if `threshold` is not positive.

  Source:
    Padula and Soemers (2024), "Exploring RL-based LLM Training for Formal
    Language Tasks with Programmed Rewards", whose code zeroes the policy and
    value losses alone; we zero the entropies too, or they would move the
    policy with nothing to oppose them.
  """
  chex.assert_rank([log_probs, old_log_probs, mask], 2)
  chex.assert_equal_shape([log_probs, old_log_probs, mask])
  chex.assert_type([log_probs, old_log_probs, mask], [float, float, bool])
  _check_positive(threshold=threshold)
  log_ratio = jax.lax.stop_gradient(_log_ratio(log_probs, old_log_probs, mask))
  mean = masking.masked_mean(jnp.exp(log_ratio), mask, axis_name=axis_name)
  return jnp.where(mean > threshold, 0.0, 1.0)


# `clipped_policy_loss` has an argument of this name.
_ratio_guard = ratio_guard


def _difference(log_probs: Array, constant: Array, mask: Array) -> Array:
  """log π less other log-probabilities, which are constant; 0 where masked."""
  log_probs = jnp.asarray(log_probs, jnp.float32)
  constant = jax.lax.stop_gradient(jnp.asarray(constant, jnp.float32))
  return jnp.where(mask, log_probs - constant, 0.0)


def _log_ratio(log_probs: Array, old_log_probs: Array, mask: Array) -> Array:
  """log ρ `[B, T]`, 0 where masked, at most `_MAX_LOG_RATIO`."""
  return jnp.minimum(
    _difference(log_probs, old_log_probs, mask), _MAX_LOG_RATIO
  )


def _normalized(
  token_losses: Array, mask: Array, normalizer: str, axis_name: str | None
) -> Array:
  """Averages `[B, T]` losses; see `clipped_policy_loss`."""
  if normalizer == "token_mean":
    return masking.masked_mean(token_losses, mask, axis_name=axis_name)
  if normalizer == "sequence_mean":
    sequence_losses = masking.masked_mean(token_losses, mask, axis=1)  # [B]
    return masking.masked_mean(
      sequence_losses, jnp.any(mask, axis=1), axis_name=axis_name
    )
  num_slots = mask.size
  if axis_name is not None:
    num_slots *= jax.lax.axis_size(axis_name)
  total = masking.masked_sum(token_losses, mask, axis_name=axis_name)
  return total / num_slots


def _ratio_metrics(
  log_ratio: Array, is_clipped: Array, mask: Array, axis_name: str | None
) -> Metrics:
  """Metrics of the ratios, over the unmasked tokens or sequences."""
  log_ratio = jax.lax.stop_gradient(log_ratio)
  ratio = jnp.exp(log_ratio)

  def mean(x):
    return masking.masked_mean(x, mask, axis_name=axis_name)

  ratio_min = jnp.min(jnp.where(mask, ratio, jnp.inf))
  ratio_max = jnp.max(jnp.where(mask, ratio, 0.0))
  if axis_name is not None:
    ratio_min = jax.lax.pmin(ratio_min, axis_name)
    ratio_max = jax.lax.pmax(ratio_max, axis_name)
  ones = jnp.ones(mask.shape, jnp.float32)
  return {
    "ppo/count": masking.masked_sum(ones, mask, axis_name=axis_name),
    "ppo/clip_fraction": mean(is_clipped.astype(jnp.float32)),
    "ppo/ratio_mean": mean(ratio),
    # 0 where no token counts, as all the others.
    "ppo/ratio_min": jnp.minimum(ratio_min, ratio_max),
    "ppo/ratio_max": ratio_max,
    "ppo/approx_kl": mean(jnp.expm1(log_ratio) - log_ratio),
    "ppo/approx_kl_k2": mean(0.5 * jnp.square(log_ratio)),
  }


def _check_normalizer(normalizer: str) -> None:
  if normalizer not in NORMALIZERS:
    raise ValueError(
      f"normalizer must be one of {', '.join(NORMALIZERS)}, got {normalizer!r}."
    )


def _check_positive(**settings: float) -> None:
  for name, value in settings.items():
    if not value > 0:
      raise ValueError(f"{name} must be positive, got {value}.")
