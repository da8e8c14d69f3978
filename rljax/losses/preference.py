"""Losses that learn from a comparison of responses, without sampling.

Candidates of a prompt stand side by side, the better one first: log-probs and
masks are `[B, K, T]`, with K = 2, chosen and rejected, for the pairwise losses.
A candidate without any token is a missing one, and a pair counts if both its
responses are there. Reference log-probabilities are constants everywhere.
"""

import chex
import jax
import jax.numpy as jnp

from rljax.ops import masking

Array = jax.Array
Metrics = dict[str, Array]

DPO_LOSS_TYPES = ("sigmoid", "robust", "hinge", "ipo")

# The odds of probability 1 are infinite; in float32, e^-1e-6 is still below 1.
_MAX_MEAN_LOG_PROB = -1e-6


def dpo_loss(
  log_probs: Array,
  ref_log_probs: Array | None,
  mask: Array,
  *,
  beta: float,
  loss_type: str = "sigmoid",
  label_smoothing: float = 0.0,
  reference_free: bool = False,
  per_token: bool = False,
  weights: Array | None = None,
  axis_name: str | None = None,
) -> tuple[Array, Metrics]:
  """Computes the loss of direct preference optimization or of a variant.

    h = (S_w - S_ref,w) - (S_l - S_ref,l),   S = Σ_t log π(y_t)

    sigmoid:  -(1 - e) log σ(βh) - e log σ(-βh)
    robust:   (-(1 - e) log σ(βh) + e log σ(-βh)) / (1 - 2e)
    hinge:    max(0, 1 - βh)
    ipo:      (h - 1 / (2β))²

  The loss is the mean over pairs, each multiplied by its weight. The mean does
  not divide by the weights.

  No gradient flows to `ref_log_probs` and `weights`.

  Args:
    log_probs: `[B, 2, T]` float, of the trained policy: chosen y_w, then
      rejected y_l.
    ref_log_probs: `[B, 2, T]` float, of the frozen reference policy. May be
      None if `reference_free`.
    mask: `[B, 2, T]` bool, True on response tokens.
    beta: β > 0, the strength of the pull to the reference; τ of IPO.
    loss_type: one of the four names above.
    label_smoothing: e in [0, 0.5), the share of pairs that are assumed to be
      labelled the wrong way round; for "sigmoid" and "robust" alone.
    reference_free: whether to leave out S_ref.
    per_token: whether S is a mean over tokens instead of a sum.
    weights: `[B]` float, of the pairs, or None for 1; differences of
      rewards, for example, make the loss reward-difference optimization.
    axis_name: mapped axis that shards B, if any; the loss is then that of
      the whole batch, on every shard.

  Returns:
    The scalar loss (0 if no pair counts) and scalar metrics, which are means
    over pairs: the implicit rewards β(S - S_ref) "dpo/chosen_reward" and
    "dpo/rejected_reward", their difference "dpo/margin", the share
    "dpo/accuracy" with h > 0, and S itself, as "dpo/chosen_log_prob" and
    "dpo/rejected_log_prob": the loss often lowers both.

  Raises:
    ValueError: if a setting is out of its range, or the reference is missing.

  Source:
    Rafailov et al. (2023), "Direct Preference Optimization", equation 7, and
    Mitchell (2023), "A note on DPO with noisy preferences", for "sigmoid";
    Chowdhury et al. (2024), "Provably Robust DPO", for "robust"; Zhao et al.
    (2023), "SLiC-HF", for "hinge"; Azar et al. (2023), "A General Theoretical
    Paradigm to Understand Learning from Human Preferences", for "ipo", whose
    equation 17 has sums. Its authors ran it, and confirmed it to be meant,
    with `per_token`.
  """
  _check_pairs(log_probs, mask)
  _check_positive(beta=beta)
  if loss_type not in DPO_LOSS_TYPES:
    raise ValueError(
      f"loss_type must be one of {', '.join(DPO_LOSS_TYPES)}, got "
      f"{loss_type!r}."
    )
  if not 0 <= label_smoothing < 0.5:
    raise ValueError(
      f"label_smoothing must lie in [0, 0.5), got {label_smoothing}."
    )
  if label_smoothing and loss_type not in ("sigmoid", "robust"):
    raise ValueError(
      f"label_smoothing belongs to sigmoid and robust; for {loss_type} it "
      f"must be 0, got {label_smoothing}."
    )
  if ref_log_probs is None and not reference_free:
    raise ValueError("ref_log_probs may be None only if reference_free.")
  if ref_log_probs is not None:
    chex.assert_equal_shape([log_probs, ref_log_probs])
    chex.assert_type(ref_log_probs, float)

  reduce = masking.masked_mean if per_token else masking.masked_sum
  sequence_log_probs = reduce(log_probs, mask, axis=2)  # [B, 2]
  if reference_free:
    log_ratios = sequence_log_probs
  else:
    log_ratios = reduce(_log_ratios(log_probs, ref_log_probs), mask, axis=2)
  h = log_ratios[:, 0] - log_ratios[:, 1]  # [B]
  if loss_type == "sigmoid":
    losses = (1.0 - label_smoothing) * _logistic_loss(beta * h)
    losses = losses + label_smoothing * _logistic_loss(-beta * h)
  elif loss_type == "robust":
    losses = (1.0 - label_smoothing) * _logistic_loss(beta * h)
    losses = losses - label_smoothing * _logistic_loss(-beta * h)
    losses = losses / (1.0 - 2.0 * label_smoothing)
  elif loss_type == "hinge":
    losses = jnp.maximum(1.0 - beta * h, 0.0)
  else:
    losses = jnp.square(h - 1.0 / (2.0 * beta))
  if weights is not None:
    chex.assert_shape(weights, h.shape)
    chex.assert_type(weights, float)
    weights = jax.lax.stop_gradient(jnp.asarray(weights, jnp.float32))
    losses = jnp.where(_counts(mask), weights, 0.0) * losses

  def mean(x):
    return masking.masked_mean(x, _counts(mask), axis_name=axis_name)

  loss = mean(losses)
  rewards, sequence_log_probs = jax.lax.stop_gradient(
    (beta * log_ratios, sequence_log_probs)
  )
  return loss, {
    "dpo/loss": jax.lax.stop_gradient(loss),
    "dpo/accuracy": mean((h > 0).astype(jnp.float32)),
    "dpo/margin": mean(rewards[:, 0] - rewards[:, 1]),
    "dpo/chosen_reward": mean(rewards[:, 0]),
    "dpo/rejected_reward": mean(rewards[:, 1]),
    "dpo/chosen_log_prob": mean(sequence_log_probs[:, 0]),
    "dpo/rejected_log_prob": mean(sequence_log_probs[:, 1]),
  }


def pro_loss(
  log_probs: Array,
  rewards: Array | None,
  mask: Array,
  *,
  sft_weight: float = 0.05,
  published_mask: bool = False,
  axis_name: str | None = None,
) -> tuple[Array, Metrics]:
  """Computes the loss of preference ranking over K candidates, best first.

    L_k = log(exp(s_k T_kk) + Σ_{j>k} exp(s_j T_kj)) - s_k T_kk
    T_kj = R_k - R_j,   T_kk = max_{j>k} T_kj
    L = mean_i(Σ_{k<K} L_k + w (K - 1)² (-S_1))

  with S_k the sum and s_k the mean of the log-probabilities of candidate k.
  The mean is over the prompts with two candidates or more; K is each prompt's
  own number of them.

  Candidates out of the order of their rewards make T negative, and the first
  is then pushed down: sort them first. "pro/misordered_fraction" reports it.

  No gradient flows to `rewards`.

  Args:
    log_probs: `[B, K, T]` float, of the trained policy, best candidate first.
      Missing candidates are masked whole, and stand last.
    rewards: `[B, K]` float, as the reward model gives them, without a sigmoid;
      or None to take every T as 1.
    mask: `[B, K, T]` bool, True on response tokens.
    sft_weight: w >= 0.
    published_mask: whether to score the tokens that the published code
      scores, those whose predecessor is a response token: never the first of
      a response, and the padding after its end if there is any, which must
      then be finite.
    axis_name: mapped axis that shards B, if any; the loss is then that of
      the whole batch, on every shard.

  Returns:
    The scalar loss (0 if no prompt counts) and scalar metrics, which are means
    over prompts: its two parts "pro/ranking_loss" and "pro/sft_loss", the
    share "pro/accuracy" in which the first candidate has the largest s, and
    the share "pro/misordered_fraction" whose rewards rise somewhere.

  Raises:
    ValueError: if there are fewer than two candidates or `sft_weight` is
      negative.

  Source:
    Song et al. (2023), "Preference Ranking Optimization for Human Alignment",
    with the temperatures of its code, as Baheti et al. (2024) run it. Their
    1e-10 inside the logarithm guards what a log-sum-exp does not need guarded.
  """
  chex.assert_rank([log_probs, mask], 3)
  chex.assert_equal_shape([log_probs, mask])
  chex.assert_type([log_probs, mask], [float, bool])
  num_candidates = log_probs.shape[1]
  if num_candidates < 2:
    raise ValueError(f"PRO ranks two candidates or more, got {num_candidates}.")
  if not sft_weight >= 0:
    raise ValueError(f"sft_weight must not be negative, got {sft_weight}.")

  present = jnp.any(mask, axis=2)  # [B, K]
  if rewards is not None:
    chex.assert_shape(rewards, present.shape)
    chex.assert_type(rewards, float)
    rewards = jax.lax.stop_gradient(jnp.asarray(rewards, jnp.float32))
    rewards = jnp.where(present, rewards, 0.0)
  scored = jnp.asarray(mask)
  if published_mask:
    scored = jnp.pad(scored, ((0, 0), (0, 0), (1, 0)))[:, :, :-1]
  means = masking.masked_mean(log_probs, scored, axis=2)  # [B, K]
  best_sum = masking.masked_sum(log_probs[:, 0], scored[:, 0], axis=1)  # [B]

  ranking = jnp.zeros_like(best_sum)
  misordered = jnp.zeros(best_sum.shape, bool)
  for k in range(num_candidates - 1):
    later = present[:, k + 1 :]  # [B, K - 1 - k]
    ranked = present[:, k] & jnp.any(later, axis=1)
    if rewards is None:
      gaps = jnp.ones(later.shape, jnp.float32)
    else:
      gaps = rewards[:, k, None] - rewards[:, k + 1 :]
    largest = jnp.max(jnp.where(later, gaps, -jnp.inf), axis=1)
    own = means[:, k] * jnp.where(ranked, largest, 0.0)
    # Against the candidate's own term, which stays as exp(0): the difference
    # of two large numbers would be rounded.
    others = means[:, k + 1 :] * gaps - own[:, None]
    terms = jnp.pad(jnp.where(later, others, -jnp.inf), ((0, 0), (1, 0)))
    ranking = ranking + jnp.where(ranked, jax.nn.logsumexp(terms, axis=1), 0.0)
    misordered |= present[:, k] & jnp.any(later & (gaps < 0), axis=1)
  num_present = jnp.sum(present.astype(jnp.float32), axis=1)
  sft = -sft_weight * jnp.square(num_present - 1.0) * best_sum
  counts = present[:, 0] & (num_present > 1)

  def mean(x):
    return masking.masked_mean(x, counts, axis_name=axis_name)

  ranking_loss, sft_loss = mean(ranking), mean(sft)
  loss = ranking_loss + sft_loss
  best_other = jnp.max(jnp.where(present, means, -jnp.inf)[:, 1:], axis=1)
  accurate = means[:, 0] > best_other
  return loss, {
    "pro/loss": jax.lax.stop_gradient(loss),
    "pro/ranking_loss": jax.lax.stop_gradient(ranking_loss),
    "pro/sft_loss": jax.lax.stop_gradient(sft_loss),
    "pro/accuracy": mean(accurate.astype(jnp.float32)),
    "pro/misordered_fraction": mean(misordered.astype(jnp.float32)),
  }


def kto_reference_point(
  log_probs: Array,
  ref_log_probs: Array,
  mask: Array,
  *,
  axis_name: str | None = None,
) -> Array:
  """Estimates KL(π‖π_ref), which `kto_loss` compares with.

    z = max(0, mean_i(Σ_t log π(y_t) - log π_ref(y_t)))

  over mismatched responses: each follows another prompt than its own, such as
  the one before it in a batch of two or more.

  No gradient flows through z.

  Args:
    log_probs: `[B, T]` float, of the trained policy, mismatched.
    ref_log_probs: `[B, T]` float, of the reference policy, mismatched.
    mask: `[B, T]` bool, True on response tokens.
    axis_name: mapped axis that shards B, if any.

  Returns:
    float32 scalar; 0 if no token counts.

  Source:
    Ethayarajh et al. (2024), "KTO: Model Alignment as Prospect Theoretic
    Optimization", section 4.
  """
  _check_sequences(log_probs, ref_log_probs, mask)
  log_ratios = masking.masked_sum(
    _log_ratios(log_probs, ref_log_probs), mask, axis=1
  )  # [B]
  mean = masking.masked_mean(
    log_ratios, jnp.any(mask, axis=1), axis_name=axis_name
  )
  return jax.lax.stop_gradient(jnp.maximum(mean, 0.0))


def kto_loss(
  log_probs: Array,
  ref_log_probs: Array,
  reference_point: Array,
  is_desirable: Array,
  mask: Array,
  *,
  beta: float,
  desirable_weight: float = 1.0,
  undesirable_weight: float = 1.0,
  axis_name: str | None = None,
) -> tuple[Array, Metrics]:
  """Computes the Kahneman-Tversky loss of responses judged one by one.

    h = Σ_t log π(y_t) - log π_ref(y_t)
    l = λ_D (1 - σ(β(h - z))) if desirable, else λ_U (1 - σ(β(z - h)))

  The loss is the mean of l over the sequences that have an unmasked token.

  No gradient flows to `ref_log_probs` and `reference_point`.

  Args:
    log_probs: `[B, T]` float, of the trained policy.
    ref_log_probs: `[B, T]` float, of the frozen reference policy.
    reference_point: float scalar z, see `kto_reference_point`.
    is_desirable: `[B]` bool.
    mask: `[B, T]` bool, True on response tokens.
    beta: β > 0.
    desirable_weight: λ_D > 0. The authors advise to keep the sum of weights
      of the desirable between 1 and 4/3 of the sum of the others'.
    undesirable_weight: λ_U > 0.
    axis_name: mapped axis that shards B, if any; the loss is then that of
      the whole batch, on every shard.

  Returns:
    The scalar loss (0 if no token counts) and scalar metrics: the mean
    implicit rewards βh "kto/desirable_reward" and "kto/undesirable_reward", of
    "kto/desirable_count" and "kto/undesirable_count" sequences, and
    "kto/reference_point".

  Raises:
    ValueError: if β or a weight is not positive.

  Source:
    Ethayarajh et al. (2024), "KTO: Model Alignment as Prospect Theoretic
    Optimization", equation 8.
  """
  _check_sequences(log_probs, ref_log_probs, mask)
  chex.assert_shape(is_desirable, mask.shape[:1])
  chex.assert_type(is_desirable, bool)
  chex.assert_rank(reference_point, 0)
  _check_positive(
    beta=beta,
    desirable_weight=desirable_weight,
    undesirable_weight=undesirable_weight,
  )

  log_ratios = masking.masked_sum(
    _log_ratios(log_probs, ref_log_probs), mask, axis=1
  )  # [B]
  reference_point = jnp.asarray(reference_point, jnp.float32)
  reference_point = jax.lax.stop_gradient(reference_point)
  gain = beta * (log_ratios - reference_point)
  # 1 - σ(x) = σ(-x), without the cancellation.
  losses = jnp.where(
    is_desirable,
    desirable_weight * jax.nn.sigmoid(-gain),
    undesirable_weight * jax.nn.sigmoid(gain),
  )
  counts = jnp.any(mask, axis=1)
  loss = masking.masked_mean(losses, counts, axis_name=axis_name)
  rewards = jax.lax.stop_gradient(beta * log_ratios)
  metrics = {}
  for name, of in (
    ("desirable", counts & is_desirable),
    ("undesirable", counts & ~is_desirable),
  ):
    metrics |= {
      f"kto/{name}_reward": masking.masked_mean(
        rewards, of, axis_name=axis_name
      ),
      f"kto/{name}_count": masking.masked_sum(
        jnp.ones_like(rewards), of, axis_name=axis_name
      ),
    }
  return loss, {
    "kto/loss": jax.lax.stop_gradient(loss),
    **metrics,
    "kto/reference_point": reference_point,
  }


def simpo_loss(
  log_probs: Array,
  mask: Array,
  *,
  beta: float,
  margin: float,
  axis_name: str | None = None,
) -> tuple[Array, Metrics]:
  """Computes the SimPO loss, which needs no reference.

    l = -log σ(β(s_w - s_l) - γ)

  with s the mean over a response's tokens of log π. The loss is the mean of l
  over pairs.

  Args:
    log_probs: `[B, 2, T]` float, of the trained policy: chosen, rejected.
    mask: `[B, 2, T]` bool, True on response tokens.
    beta: β > 0; 2 to 2.5 in the paper.
    margin: γ, in units of βs; 0.3 β to 0.6 β in the paper.
    axis_name: mapped axis that shards B, if any; the loss is then that of
      the whole batch, on every shard.

  Returns:
    The scalar loss (0 if no pair counts) and scalar metrics, which are means
    over pairs: "simpo/margin" of β(s_w - s_l), the share "simpo/accuracy" with
    s_w > s_l, and the means of s, "simpo/chosen_log_prob" and
    "simpo/rejected_log_prob".

  Raises:
    ValueError: if β is not positive.

  Source:
    Meng et al. (2024), "SimPO: Simple Preference Optimization with a
    Reference-Free Reward", equation 6.
  """
  _check_pairs(log_probs, mask)
  _check_positive(beta=beta)
  means = masking.masked_mean(log_probs, mask, axis=2)  # [B, 2]
  difference = means[:, 0] - means[:, 1]
  loss = masking.masked_mean(
    _logistic_loss(beta * difference - margin),
    _counts(mask),
    axis_name=axis_name,
  )
  return loss, {
    "simpo/loss": jax.lax.stop_gradient(loss),
    "simpo/margin": masking.masked_mean(
      jax.lax.stop_gradient(beta * difference),
      _counts(mask),
      axis_name=axis_name,
    ),
    **_pair_metrics("simpo", means, mask, axis_name),
  }


def orpo_loss(
  log_probs: Array,
  mask: Array,
  *,
  odds_weight: float,
  axis_name: str | None = None,
) -> tuple[Array, Metrics]:
  """Computes the ORPO loss, which needs no reference.

    l = -s_w - λ log σ(o_w - o_l),   o = s - log(1 - exp(s))

  with s the mean over a response's tokens of log π, held to -1e-6 where it
  makes the odds o. The loss is the mean of l over pairs.

  Args:
    log_probs: `[B, 2, T]` float, of the trained policy: chosen, rejected.
    mask: `[B, 2, T]` bool, True on response tokens.
    odds_weight: λ > 0; 0.1 in the paper.
    axis_name: mapped axis that shards B, if any; the loss is then that of
      the whole batch, on every shard.

  Returns:
    The scalar loss (0 if no pair counts) and scalar metrics, which are means
    over pairs: "orpo/nll" of -s_w, "orpo/log_odds_ratio" of o_w - o_l, the
    share "orpo/accuracy" with s_w > s_l, and the means of s,
    "orpo/chosen_log_prob" and "orpo/rejected_log_prob".

  Raises:
    ValueError: if λ is not positive.

  Source:
    Hong et al. (2024), "ORPO: Monolithic Preference Optimization without
    Reference Model", equations 4 to 7.

  Departures from TRL (1.16, `ORPOTrainer`):
    Its likelihood counts the tokens of the prompt too, and is a mean over all
    tokens of the batch, so that long responses weigh more; here it is -s_w, of
    the response alone, and the pairs weigh the same. It does not bound s where
    the odds are made of it.
  """
  _check_pairs(log_probs, mask)
  _check_positive(odds_weight=odds_weight)
  means = masking.masked_mean(log_probs, mask, axis=2)  # [B, 2]
  log_odds = _log_odds(means)
  ratio = log_odds[:, 0] - log_odds[:, 1]

  def mean(x):
    return masking.masked_mean(x, _counts(mask), axis_name=axis_name)

  nll = mean(-means[:, 0])
  loss = nll + odds_weight * mean(_logistic_loss(ratio))
  return loss, {
    "orpo/loss": jax.lax.stop_gradient(loss),
    "orpo/nll": jax.lax.stop_gradient(nll),
    "orpo/log_odds_ratio": mean(jax.lax.stop_gradient(ratio)),
    **_pair_metrics("orpo", means, mask, axis_name),
  }


def cpo_loss(
  log_probs: Array,
  mask: Array,
  *,
  beta: float,
  nll_weight: float = 1.0,
  axis_name: str | None = None,
) -> tuple[Array, Metrics]:
  """Computes the CPO loss, which needs no reference.

    L = mean_i(-log σ(β(S_w - S_l))) + α mean_t(-log π(y_w,t))

  with S = Σ_t log π(y_t). The first mean is over pairs, the second over the
  tokens of all chosen responses in them.

  Args:
    log_probs: `[B, 2, T]` float, of the trained policy: chosen, rejected.
    mask: `[B, 2, T]` bool, True on response tokens.
    beta: β > 0.
    nll_weight: α >= 0.
    axis_name: mapped axis that shards B, if any; the loss is then that of
      the whole batch, on every shard.

  Returns:
    The scalar loss (0 if no pair counts) and scalar metrics: "cpo/nll", the
    second mean, and means over pairs: "cpo/margin" of β(S_w - S_l), the share
    "cpo/accuracy" with S_w > S_l, and the means of S, "cpo/chosen_log_prob"
    and "cpo/rejected_log_prob".

  Raises:
    ValueError: if β is not positive or α is negative.

  Source:
    Xu et al. (2024), "Contrastive Preference Optimization", equation 5.
  """
  _check_pairs(log_probs, mask)
  _check_positive(beta=beta)
  if not nll_weight >= 0:
    raise ValueError(f"nll_weight must not be negative, got {nll_weight}.")
  sums = masking.masked_sum(log_probs, mask, axis=2)  # [B, 2]
  margin = beta * (sums[:, 0] - sums[:, 1])
  counts = _counts(mask)
  preference = masking.masked_mean(
    _logistic_loss(margin), counts, axis_name=axis_name
  )
  nll = masking.masked_mean(
    -jnp.asarray(log_probs[:, 0], jnp.float32),
    mask[:, 0] & counts[:, None],
    axis_name=axis_name,
  )
  loss = preference + nll_weight * nll
  return loss, {
    "cpo/loss": jax.lax.stop_gradient(loss),
    "cpo/nll": jax.lax.stop_gradient(nll),
    "cpo/margin": masking.masked_mean(
      jax.lax.stop_gradient(margin), counts, axis_name=axis_name
    ),
    **_pair_metrics("cpo", sums, mask, axis_name),
  }


def _pair_metrics(
  name: str, scores: Array, mask: Array, axis_name: str | None
) -> Metrics:
  """Accuracy and means of `[B, 2]` log-probabilities, over pairs."""
  scores = jax.lax.stop_gradient(scores)

  def mean(x):
    return masking.masked_mean(x, _counts(mask), axis_name=axis_name)

  accurate = scores[:, 0] > scores[:, 1]
  return {
    f"{name}/accuracy": mean(accurate.astype(jnp.float32)),
    f"{name}/chosen_log_prob": mean(scores[:, 0]),
    f"{name}/rejected_log_prob": mean(scores[:, 1]),
  }


def _counts(mask: Array) -> Array:
  """`[B]` bool: whether every candidate of a row has a token."""
  return jnp.all(jnp.any(mask, axis=2), axis=1)


def _log_ratios(log_probs: Array, ref_log_probs: Array) -> Array:
  """Per token, before masking; no gradient to the reference."""
  ref_log_probs = jax.lax.stop_gradient(jnp.asarray(ref_log_probs, jnp.float32))
  return jnp.asarray(log_probs, jnp.float32) - ref_log_probs


def _logistic_loss(x: Array) -> Array:
  """-log σ(x), without under- or overflow."""
  return jax.nn.softplus(-x)


def _log_odds(log_prob: Array) -> Array:
  """log(p / (1 - p)) from log p, without cancellation."""
  log_prob = jnp.minimum(log_prob, _MAX_MEAN_LOG_PROB)
  return log_prob - jnp.log(-jnp.expm1(log_prob))


def _check_pairs(log_probs: Array, mask: Array) -> None:
  chex.assert_shape([log_probs, mask], (None, 2, None))
  chex.assert_equal_shape([log_probs, mask])
  chex.assert_type([log_probs, mask], [float, bool])


def _check_sequences(log_probs, ref_log_probs, mask) -> None:
  arrays = [log_probs, ref_log_probs, mask]
  chex.assert_rank(arrays, 2)
  chex.assert_equal_shape(arrays)
  chex.assert_type(arrays, [float, float, bool])


def _check_positive(**settings: float) -> None:
  for name, value in settings.items():
    if not value > 0:
      raise ValueError(f"{name} must be positive, got {value}.")
