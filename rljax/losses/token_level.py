"""Losses with a reward or a weight for each token, as in RLMEC.

A generative reward model gives every token of a sample a probability
(`rewards.generative_rewards`), and writes a corrected text. The policy learns
from the samples by `token_level_loss`, and from the corrected texts by
`imitation_loss`. The method's loss is the sum of both, the second times a
coefficient.
"""

import chex
import jax
import jax.numpy as jnp

from rljax.ops import masking

Array = jax.Array
Metrics = dict[str, Array]

MODES = ("rlmec", "ppo")

# e^60 is still far inside float32. Without a bound the ratio overflows where
# the reference all but excludes a token, and inf * 0 is NaN.
_MAX_LOG_RATIO = 60.0


def token_level_loss(
  log_probs: Array,
  ref_log_probs: Array,
  rewards: Array,
  mask: Array,
  *,
  clip_epsilon: float = 0.3,
  mode: str = "rlmec",
  count: int | float | Array | None = None,
  axis_name: str | None = None,
) -> tuple[Array, Metrics]:
  """Computes a policy gradient loss with a reward for each token.

    ρ_t = π(y_t) / π_ref(y_t)
    c_t = min(ρ_t r_t, clip(ρ_t, 1 - ε, 1 + ε) r_t)

    rlmec:  L = -Σ_it sg[c_it] log π(y_it) / N
    ppo:    L = -Σ_it c_it / N

  N is the number of unmasked tokens of the batch with a reward other than 0,
  or 1 if there is none. The gradient with respect to log π(y_t) is that of
  the clipped surrogate only as long as the clip does not bind; it is -1 / N
  times

    token                   rlmec          ppo
    r > 0 and ρ > 1 + ε     (1 + ε) r      0
    r < 0 and ρ < 1 - ε     (1 - ε) r      0
    any other               ρ r            ρ r

  So under "rlmec" a token is pushed down however unlikely it has become, and
  the loss does not bound its log-probability from below: an imitation loss
  beside it and a small learning rate do, and a metric shows it. Nor does either
  mode bound the push on a penalized token that has become likelier. Under
  "rlmec" the value of the loss means nothing; its gradient does.

  No gradient flows to `ref_log_probs` and `rewards`. Where log ρ exceeds 60
  it is taken as 60 to keep everything finite; under "ppo" such a token has no
  gradient.

  Args:
    log_probs: `[B, T]` float, of the trained policy.
    ref_log_probs: `[B, T]` float, of the policy that the training started
      from. It stands in for the sampling policy, whose temperature and top-p
      it need not share.
    rewards: `[B, T]` float r, each of its own token.
    mask: `[B, T]` bool, True on response tokens.
    clip_epsilon: ε > 0.
    mode: "rlmec" or "ppo".
    count: scalar to divide by in place of N; 0 counts as 1. With the N of a
      whole batch, `jnp.sum(mask & (rewards != 0))`, the losses of its
      micro-batches add up to that of the batch, and so do the gradients;
      losses that are averaged over K micro-batches take N / K.
    axis_name: mapped axis that shards B, if any; the loss is then that of
      the whole batch, on every shard, and `count` is the same on every shard.

  Returns:
    The scalar loss (0 if no token counts) and scalar metrics of the arrays at
    hand, all 0 where there is nothing to measure. "token/positive_fraction"
    and "token/negative_fraction" are the shares of unmasked tokens with
    rewards above and below 0, "token/tokens" is the number of unmasked tokens,
    and "token/count" is N, whatever `count` is.
    Over these N tokens are "token/ratio_mean" and, as shares,
    "token/clip_fraction_high" and "token/clip_fraction_low", the first two
    rows of the table. "token/penalized_log_prob_min" is the lowest log π of
    a token with a reward below 0.

  Raises:
    ValueError: if `clip_epsilon` is not positive or the mode is unknown.

  Source:
    Chen et al. (2024), "Improving Large Language Models via Fine-grained
    Reinforcement Learning with Minimum Editing Constraint", in the authors'
    code, which divides by the N of each micro-batch on each device and takes
    the mean. Ours is the N of the batch: no token weighs more for being in
    a thin micro-batch.
  """
  arrays = [log_probs, ref_log_probs, rewards, mask]
  chex.assert_rank(arrays, 2)
  chex.assert_equal_shape(arrays)
  chex.assert_type(arrays, [float, float, float, bool])
  if not clip_epsilon > 0:
    raise ValueError(f"clip_epsilon must be positive, got {clip_epsilon}.")
  if mode not in MODES:
    raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}.")

  rewards = jax.lax.stop_gradient(jnp.asarray(rewards, jnp.float32))
  counts = jnp.asarray(mask) & (rewards != 0)  # [B, T]
  # Tokens without a reward may hold anything, as masked ones may: all are
  # dropped before the exponential, and before the product with log π.
  rewards = jnp.where(counts, rewards, 0.0)
  log_probs = _select(log_probs, counts)
  ref_log_probs = jax.lax.stop_gradient(_select(ref_log_probs, counts))
  ratio = jnp.exp(jnp.minimum(log_probs - ref_log_probs, _MAX_LOG_RATIO))
  unclipped = ratio * rewards
  clipped = jnp.clip(ratio, 1.0 - clip_epsilon, 1.0 + clip_epsilon) * rewards
  objective = jnp.minimum(unclipped, clipped)
  if mode == "rlmec":
    objective = jax.lax.stop_gradient(objective) * log_probs
  loss = _normalized(-objective, counts, count, axis_name)

  log_probs, ratio = jax.lax.stop_gradient((log_probs, ratio))
  is_clipped = jax.lax.stop_gradient(clipped < unclipped)
  is_penalized = rewards < 0

  def share(x, of):
    return masking.masked_mean(x.astype(jnp.float32), of, axis_name=axis_name)

  # Log-probabilities are at most 0, so that 0 stands for "none" as well.
  lowest = jnp.min(jnp.where(is_penalized, log_probs, 0.0))
  if axis_name is not None:
    lowest = jax.lax.pmin(lowest, axis_name)
  return loss, {
    "token/loss": jax.lax.stop_gradient(loss),
    "token/ratio_mean": share(ratio, counts),
    "token/clip_fraction_high": share(is_clipped & (rewards > 0), counts),
    "token/clip_fraction_low": share(is_clipped & is_penalized, counts),
    "token/positive_fraction": share(rewards > 0, mask),
    "token/negative_fraction": share(is_penalized, mask),
    "token/penalized_log_prob_min": lowest,
    "token/tokens": _num(mask, axis_name),
    "token/count": _num(counts, axis_name),
  }


def imitation_loss(
  log_probs: Array,
  weights: Array,
  mask: Array,
  *,
  count: int | float | Array | None = None,
  axis_name: str | None = None,
) -> tuple[Array, Metrics]:
  """Computes the negative log-likelihood with a weight for each token.

    L = -Σ_it w_it log π(y_it) / N

  N is the number of unmasked tokens of the batch with a weight other than 0,
  or 1 if there is none: a number of tokens, and not the sum of their weights.
  So a batch of full weights counts for more than one of half weights.

  No gradient flows to `weights`.

  Args:
    log_probs: `[B, T]` float, of the trained policy on the texts to imitate.
    weights: `[B, T]` float w; in the paper 1 on edited tokens of a corrected
      text and 0.5 on all others, those of right samples too.
    mask: `[B, T]` bool, True on response tokens.
    count: scalar to divide by in place of N, as in `token_level_loss`: that
      of the whole batch, `jnp.sum(mask & (weights != 0))`, for micro-batches.
    axis_name: mapped axis that shards B, if any; the loss is then that of
      the whole batch, on every shard, and `count` is the same on every shard.

  Returns:
    The scalar loss (0 if no token counts) and scalar metrics of the arrays at
    hand: "imitation/perplexity" is exp of the mean of -log π over the N
    tokens, without weights, and "imitation/count" is N, whatever `count` is.

  Source:
    Chen et al. (2024), "Improving Large Language Models via Fine-grained
    Reinforcement Learning with Minimum Editing Constraint", in the authors'
    code, with the N of the batch for that of each micro-batch, as in
    `token_level_loss`.
  """
  arrays = [log_probs, weights, mask]
  chex.assert_rank(arrays, 2)
  chex.assert_equal_shape(arrays)
  chex.assert_type(arrays, [float, float, bool])

  weights = jax.lax.stop_gradient(jnp.asarray(weights, jnp.float32))
  counts = jnp.asarray(mask) & (weights != 0)  # [B, T]
  nll = -_select(log_probs, counts)
  loss = _normalized(weights * nll, counts, count, axis_name)
  mean_nll = masking.masked_mean(
    jax.lax.stop_gradient(nll), counts, axis_name=axis_name
  )
  return loss, {
    "imitation/loss": jax.lax.stop_gradient(loss),
    "imitation/perplexity": jnp.exp(mean_nll),
    "imitation/count": _num(counts, axis_name),
  }


def _select(x: Array, mask: Array) -> Array:
  return jnp.where(mask, jnp.asarray(x, jnp.float32), 0.0)


def _num(mask: Array, axis_name: str | None) -> Array:
  """The number of unmasked elements, a float32 scalar."""
  ones = jnp.ones(mask.shape, jnp.float32)
  return masking.masked_sum(ones, mask, axis_name=axis_name)


def _normalized(
  x: Array,
  mask: Array,
  count: int | float | Array | None,
  axis_name: str | None,
) -> Array:
  """Sum of the unmasked elements over their number, or over `count`."""
  if count is None:
    return masking.masked_mean(x, mask, axis_name=axis_name)
  count = jax.lax.stop_gradient(jnp.asarray(count, jnp.float32))
  chex.assert_rank(count, 0)
  # Not max(count, 1): N / K may be less than 1.
  divisor = jnp.where(count > 0, count, 1.0)
  return masking.masked_sum(x, mask, axis_name=axis_name) / divisor
