"""Losses of offline reinforcement learning on logged responses with rewards.

A whole response is one action. Every method is the negative log-likelihood of
the logged tokens under its own weights, and the methods differ only in these:
`token_weights` makes them, without gradient, and `weighted_loss` uses them.
"""

import chex
import jax
import jax.numpy as jnp

from rljax.ops import masking

Array = jax.Array
Metrics = dict[str, Array]

ALGORITHMS = (
  "nll",
  "wbc",
  "r_gold",
  "r_lol",
  "r_lol_kl",
  "a_lol",
  "a_lol_ref_free",
  "a_lol_seq",
  "a_lol_kl",
)

_BY_REWARD = ("wbc", "r_gold", "r_lol", "r_lol_kl")
_BY_ADVANTAGE = ("a_lol", "a_lol_ref_free", "a_lol_seq", "a_lol_kl")
_SEQUENCE_RATIO = ("r_lol", "a_lol")
_TOKEN_RATIO = ("a_lol_seq",)
_WITH_KL = ("r_lol_kl", "a_lol_kl")

# Summed over a response, log-probabilities drift apart by hundreds of nats.
_MAX_LOG_RATIO = 20.0


def needed_arrays(algorithm: str) -> tuple[str, ...]:
  """Returns which arguments of `offline_loss` a method needs.

  Args:
    algorithm: one of `ALGORITHMS`.

  Returns:
    Some of "rewards", "advantages" and "ref_log_probs".

  Raises:
    ValueError: if the algorithm is unknown.
  """
  _check_algorithm(algorithm)
  with_reference = _SEQUENCE_RATIO + _TOKEN_RATIO + _WITH_KL
  needed = {
    "rewards": algorithm in _BY_REWARD,
    "advantages": algorithm in _BY_ADVANTAGE,
    "ref_log_probs": algorithm in with_reference,
  }
  return tuple(name for name, is_needed in needed.items() if is_needed)


def token_weights(
  algorithm: str,
  log_probs: Array,
  ref_log_probs: Array | None,
  rewards: Array | None,
  advantages: Array | None,
  mask: Array,
  *,
  clip_epsilon: float | None = 0.9,
  gold_floor: float = 0.1,
) -> Array:
  """Computes the weight of each token's log-likelihood in a method.

    nll             w_t = 1
    wbc             w_t = R
    r_gold          w_t = R max(π(y_t), u)
    r_lol           w_t = R clip(r)
    r_lol_kl        w_t = R
    a_lol           w_t = A⁺ clip(r)
    a_lol_ref_free  w_t = A⁺
    a_lol_seq       w_t = A⁺ clip(ρ_t)
    a_lol_kl        w_t = A⁺

  with A⁺ = max(A, 0), the ratio of the token ρ_t = π(y_t) / π_ref(y_t), that
  of the response r = Π_t ρ_t, and clip(z) = min(max(z, 1 - ε), 1 + ε). The
  logarithms of both ratios are first held to [-20, 20].

  No gradient flows through the weights: a clipped response keeps the gradient
  of its log-likelihood, unlike under the surrogate of PPO.

  "wbc" is weighted behaviour cloning. "r_gold" is the learning from
  demonstrations of Pang and He, with the reward in place of their return, not
  the distillation method of the same name.

  Args:
    algorithm: one of `ALGORITHMS`.
    log_probs: `[B, T]` float, of the trained policy.
    ref_log_probs: `[B, T]` float, of the frozen reference policy. May be None
      for the methods without a ratio.
    rewards: `[B]` float R >= 0, of the whole responses. May be None for "nll"
      and the methods that weigh by advantage.
    advantages: `[B]` float A = R - V; negative ones count as 0. May be None
      for "nll" and the methods that weigh by reward.
    mask: `[B, T]` bool, True on response tokens.
    clip_epsilon: ε > 0, or None to leave the ratios as they are.
    gold_floor: u >= 0, the smallest probability that "r_gold" uses.

  Returns:
    `[B, T]` float32 w, 0 where masked.

  Raises:
    ValueError: if the algorithm is unknown or lacks an array it needs,
      `clip_epsilon` is not positive or `gold_floor` is negative.

  Source:
    Baheti et al. (2024), "Leftover Lunch: Advantage-based Offline
    Reinforcement Learning for Language Models", and its code. Pang and He
    (2021), "Text Generation by Learning from Demonstrations", for "r_gold".
    The bounds of the log-ratios are ours: without clipping, a response that
    is 100 nats likelier than before has a ratio beyond float32.
  """
  _check_arrays(log_probs, ref_log_probs, rewards, advantages, mask)
  _check_settings(algorithm, clip_epsilon, gold_floor)
  log_probs = _select(log_probs, mask)

  if algorithm in _BY_REWARD:
    scale = _needed(rewards, "rewards", algorithm)  # [B]
  elif algorithm in _BY_ADVANTAGE:
    scale = jnp.maximum(_needed(advantages, "advantages", algorithm), 0.0)
  else:
    scale = jnp.ones_like(log_probs[:, 0])

  weights = jnp.broadcast_to(scale[:, None], log_probs.shape)  # [B, T]
  if algorithm == "r_gold":
    weights = weights * jnp.maximum(jnp.exp(log_probs), gold_floor)
  elif algorithm in _SEQUENCE_RATIO + _TOKEN_RATIO:
    ref_log_probs = _needed(ref_log_probs, "ref_log_probs", algorithm)
    ratio = _ratio(algorithm, log_probs, ref_log_probs, mask)
    if clip_epsilon is not None:
      ratio = jnp.clip(ratio, 1.0 - clip_epsilon, 1.0 + clip_epsilon)
    weights = weights * ratio
  # Here, so that no method can forget it.
  return jax.lax.stop_gradient(jnp.where(mask, weights, 0.0))


def weighted_loss(
  log_probs: Array,
  weights: Array,
  mask: Array,
  *,
  ref_log_probs: Array | None = None,
  kl_coef: float = 0.0,
  axis_name: str | None = None,
) -> tuple[Array, Metrics]:
  """Computes a weighted NLL of whole responses, with a KL-like penalty.

    L = mean_i(-Σ_t w_it log π(y_it)) + β mean_i(S_i - S_ref,i)
    S = Σ_t log π(y_t),   S_ref = Σ_t log π_ref(y_t)

  Both means are over the sequences that have an unmasked token; the tokens of a
  sequence are summed. The penalty is taken on the logged responses. It is not a
  divergence of the policy, may be negative, and leaves a token the total weight
  w - β: where that is negative the loss has no lower bound, and the mean of S,
  which is among the metrics, falls.

  No gradient flows to `weights` and `ref_log_probs`.

  Args:
    log_probs: `[B, T]` float, of the trained policy.
    weights: `[B, T]` float w, as `token_weights` makes them.
    mask: `[B, T]` bool, True on response tokens.
    ref_log_probs: `[B, T]` float, of the frozen reference policy, or None if
      `kl_coef` is 0.
    kl_coef: β >= 0.
    axis_name: mapped axis that shards B, if any; the loss is then that of
      the whole batch, on every shard.

  Returns:
    The scalar loss (0 if no token counts) and scalar metrics:
    "offline/weight_mean" is over the "offline/tokens" tokens,
    "offline/sequence_log_prob_mean", the mean of S, over the "offline/count"
    sequences, and so is "offline/log_ratio_mean", the mean of S - S_ref, which
    is there if `ref_log_probs` are.

  Raises:
    ValueError: if `kl_coef` is negative, or positive without `ref_log_probs`.

  Source:
    Baheti et al. (2024), "Leftover Lunch", in the authors' code.
  """
  chex.assert_rank([log_probs, weights, mask], 2)
  chex.assert_equal_shape([log_probs, weights, mask])
  chex.assert_type([log_probs, weights, mask], [float, float, bool])
  if kl_coef < 0:
    raise ValueError(f"kl_coef must not be negative, got {kl_coef}.")
  if kl_coef > 0 and ref_log_probs is None:
    raise ValueError(f"kl_coef {kl_coef} needs ref_log_probs, got None.")

  log_probs = _select(log_probs, mask)
  weights = jax.lax.stop_gradient(_select(weights, mask))
  counts = jnp.any(mask, axis=1)  # [B]

  def mean(x):
    return masking.masked_mean(x, counts, axis_name=axis_name)

  loss = mean(-jnp.sum(weights * log_probs, axis=1))

  def num(of):
    ones = jnp.ones(of.shape, jnp.float32)
    return masking.masked_sum(ones, of, axis_name=axis_name)

  metrics = {
    "offline/tokens": num(mask),
    "offline/count": num(counts),
    "offline/weight_mean": masking.masked_mean(
      weights, mask, axis_name=axis_name
    ),
    "offline/sequence_log_prob_mean": mean(
      jax.lax.stop_gradient(jnp.sum(log_probs, axis=1))
    ),
  }
  if ref_log_probs is not None:
    chex.assert_equal_shape([log_probs, ref_log_probs])
    chex.assert_type(ref_log_probs, float)
    ref_log_probs = jax.lax.stop_gradient(_select(ref_log_probs, mask))
    log_ratio = mean(jnp.sum(log_probs - ref_log_probs, axis=1))
    if kl_coef:
      loss = loss + kl_coef * log_ratio
    metrics["offline/log_ratio_mean"] = jax.lax.stop_gradient(log_ratio)
  return loss, {"offline/loss": jax.lax.stop_gradient(loss), **metrics}


def offline_loss(
  algorithm: str,
  log_probs: Array,
  ref_log_probs: Array | None,
  rewards: Array | None,
  advantages: Array | None,
  mask: Array,
  *,
  clip_epsilon: float | None = 0.9,
  gold_floor: float = 0.1,
  kl_coef: float = 0.0,
  axis_name: str | None = None,
) -> tuple[Array, Metrics]:
  """Computes the loss of an offline method, given by its name.

    L = mean_i(-Σ_t w_it log π(y_it))   [+ β mean_i(S_i - S_ref,i)]

  with the weights w of `token_weights`. The penalty of `weighted_loss` belongs
  to "r_lol_kl" and "a_lol_kl".

  Gradient flows through log π alone.

  Args:
    algorithm: one of `ALGORITHMS`.
    log_probs: `[B, T]` float, of the trained policy.
    ref_log_probs: `[B, T]` float, of the frozen reference policy, or None for
      a method that needs none.
    rewards: `[B]` float R >= 0, or None likewise.
    advantages: `[B]` float A, or None likewise; negative ones count as 0.
    mask: `[B, T]` bool, True on response tokens.
    clip_epsilon: ε > 0 of "r_lol", "a_lol" and "a_lol_seq", or None to leave
      their ratios as they are.
    gold_floor: u >= 0 of "r_gold".
    kl_coef: β >= 0 of "r_lol_kl" and "a_lol_kl"; 0 for every other method.
    axis_name: mapped axis that shards B, if any; the loss is then that of
      the whole batch, on every shard.

  Returns:
    The scalar loss (0 if no token counts) and scalar metrics, those of
    `weighted_loss` and of `weight_metrics`.

  Raises:
    ValueError: as `token_weights` and `weighted_loss` do, and for a penalty on
      a method that has none.

  Source:
    Baheti et al. (2024), "Leftover Lunch: Advantage-based Offline
    Reinforcement Learning for Language Models", and its code.
  """
  weights = token_weights(
    algorithm,
    log_probs,
    ref_log_probs,
    rewards,
    advantages,
    mask,
    clip_epsilon=clip_epsilon,
    gold_floor=gold_floor,
  )
  if kl_coef and algorithm not in _WITH_KL:
    raise ValueError(
      f"kl_coef belongs to {' and '.join(_WITH_KL)}; for {algorithm} it must "
      f"be 0, got {kl_coef}."
    )
  loss, metrics = weighted_loss(
    log_probs,
    weights,
    mask,
    ref_log_probs=ref_log_probs,
    kl_coef=kl_coef,
    axis_name=axis_name,
  )

  return loss, metrics | weight_metrics(
    algorithm,
    log_probs,
    ref_log_probs,
    advantages,
    mask,
    clip_epsilon=clip_epsilon,
    axis_name=axis_name,
  )


def weight_metrics(
  algorithm: str,
  log_probs: Array,
  ref_log_probs: Array | None,
  advantages: Array | None,
  mask: Array,
  *,
  clip_epsilon: float | None = 0.9,
  axis_name: str | None = None,
) -> Metrics:
  """Describes what the weights of an offline method are made of.

  No gradient flows through the result.

  Args:
    algorithm: one of `ALGORITHMS`.
    log_probs: `[B, T]` float, of the trained policy.
    ref_log_probs: `[B, T]` float, of the frozen reference policy, or None for
      a method without a ratio.
    advantages: `[B]` float A, or None for a method that does without.
    mask: `[B, T]` bool, True on response tokens.
    clip_epsilon: ε of the ratios, or None where they are left as they are.
    axis_name: mapped axis that shards B, if any; the means are then over the
      whole batch, on every shard.

  Returns:
    Scalars. Where advantages are given: "offline/advantage_mean", of max(A, 0),
    and "offline/zero_advantage_fraction", over sequences. For the methods with
    a ratio, before it is clipped: "offline/ratio_mean", and the shares at the
    bounds or beyond, "offline/clip_low_fraction" and
    "offline/clip_high_fraction"; over tokens for "a_lol_seq", else over
    sequences, of which there are "offline/ratio_count".
  """
  _check_arrays(log_probs, ref_log_probs, None, advantages, mask)
  metrics = {}
  counts = jnp.any(mask, axis=1)  # [B]
  if advantages is not None:
    positive = jnp.maximum(jax.lax.stop_gradient(_float32(advantages)), 0.0)
    metrics["offline/advantage_mean"] = masking.masked_mean(
      positive, counts, axis_name=axis_name
    )
    metrics["offline/zero_advantage_fraction"] = masking.masked_mean(
      (positive == 0).astype(jnp.float32), counts, axis_name=axis_name
    )
  if algorithm in _SEQUENCE_RATIO + _TOKEN_RATIO:
    ratio = _ratio(algorithm, log_probs, ref_log_probs, mask)
    if algorithm in _SEQUENCE_RATIO:
      ratio = ratio[:, 0]
    else:
      counts = mask

    def mean(x):
      x = jax.lax.stop_gradient(x.astype(jnp.float32))
      return masking.masked_mean(x, counts, axis_name=axis_name)

    # Without bounds none is ever reached.
    epsilon = jnp.inf if clip_epsilon is None else clip_epsilon
    metrics["offline/ratio_count"] = masking.masked_sum(
      jnp.ones_like(ratio), counts, axis_name=axis_name
    )
    metrics["offline/ratio_mean"] = mean(ratio)
    metrics["offline/clip_low_fraction"] = mean(ratio <= 1.0 - epsilon)
    metrics["offline/clip_high_fraction"] = mean(ratio >= 1.0 + epsilon)
  return metrics


def _ratio(
  algorithm: str, log_probs: Array, ref_log_probs: Array, mask: Array
) -> Array:
  """π / π_ref, `[B, T]` for tokens, `[B, 1]` for sequences."""
  log_ratio = _select(log_probs, mask) - _select(ref_log_probs, mask)
  if algorithm in _SEQUENCE_RATIO:
    log_ratio = jnp.sum(log_ratio, axis=1, keepdims=True)
  return jnp.exp(jnp.clip(log_ratio, -_MAX_LOG_RATIO, _MAX_LOG_RATIO))


def _float32(x: Array) -> Array:
  return jnp.asarray(x, jnp.float32)


def _select(x: Array, mask: Array) -> Array:
  """Float32, 0 where masked."""
  return jnp.where(mask, _float32(x), 0.0)


def _needed(x: Array | None, name: str, algorithm: str) -> Array:
  if x is None:
    raise ValueError(f"{algorithm} needs {name}, got None.")
  return _float32(x)


def _check_arrays(log_probs, ref_log_probs, rewards, advantages, mask) -> None:
  tokens = [x for x in (log_probs, ref_log_probs) if x is not None]
  chex.assert_rank([*tokens, mask], 2)
  chex.assert_equal_shape([*tokens, mask])
  chex.assert_type([*tokens, mask], [float] * len(tokens) + [bool])
  for x in (rewards, advantages):
    if x is not None:
      chex.assert_shape(x, mask.shape[:1])
      chex.assert_type(x, float)


def _check_algorithm(algorithm) -> None:
  if algorithm not in ALGORITHMS:
    raise ValueError(
      f"algorithm must be one of {', '.join(ALGORITHMS)}, got {algorithm!r}."
    )


def _check_settings(algorithm, clip_epsilon, gold_floor) -> None:
  _check_algorithm(algorithm)
  if clip_epsilon is not None and not clip_epsilon > 0:
    raise ValueError(
      "clip_epsilon must be positive, or None for no clipping, got "
      f"{clip_epsilon}."
    )
  if not gold_floor >= 0:
    raise ValueError(f"gold_floor must not be negative, got {gold_floor}.")
