"""Losses of supervised learning on given responses."""

import chex
import jax
import jax.numpy as jnp

from rljax.ops import masking

Array = jax.Array
Metrics = dict[str, Array]

NORMALIZERS = ("token_mean", "sequence_mean", "sequence_sum")


def nll_loss(
  log_probs: Array,
  mask: Array,
  *,
  normalizer: str = "token_mean",
  weights: Array | None = None,
  axis_name: str | None = None,
) -> tuple[Array, Metrics]:
  """Computes the weighted negative log-likelihood of the responses.

    l_t = -w_t log π(y_t)

  The loss averages l in one of three ways, and divides by numbers of tokens
  or sequences, never by a sum of weights:

    token_mean:     Σ_it l_it / Σ_it m_it, over the tokens of the batch
    sequence_mean:  over a sequence's tokens, then over the sequences that
                    have any
    sequence_sum:   summed over a sequence's tokens, then averaged over the
                    sequences that have any

  No gradient flows to `weights`.

  Args:
    log_probs: `[B, T]` float, of the trained policy.
    mask: `[B, T]` bool, True on the tokens to learn.
    normalizer: one of the three names above.
    weights: `[B, T]` float w, or None for 1.
    axis_name: mapped axis that shards B, if any; the loss is then that of
      the whole batch, on every shard.

  Returns:
    The scalar loss (0 if no token counts) and scalar metrics:
    "nll/perplexity" is exp of the mean over tokens of -log π, without
    weights; "nll/tokens" is the number of unmasked tokens.

  Raises:
    ValueError: if the normalizer is unknown.
  """
  chex.assert_rank([log_probs, mask], 2)
  chex.assert_equal_shape([log_probs, mask])
  chex.assert_type([log_probs, mask], [float, bool])
  if normalizer not in NORMALIZERS:
    raise ValueError(
      f"normalizer must be one of {', '.join(NORMALIZERS)}, got {normalizer!r}."
    )

  # The selection in here stops the gradient of whatever masked entries hold;
  # that in the means below drops their values.
  nll = jnp.where(mask, -jnp.asarray(log_probs, jnp.float32), 0.0)  # [B, T]
  token_losses = nll
  if weights is not None:
    chex.assert_equal_shape([log_probs, weights])
    chex.assert_type(weights, float)
    weights = jax.lax.stop_gradient(jnp.asarray(weights, jnp.float32))
    token_losses = weights * nll

  if normalizer == "token_mean":
    loss = masking.masked_mean(token_losses, mask, axis_name=axis_name)
  else:
    per_sequence = (
      masking.masked_mean
      if normalizer == "sequence_mean"
      else masking.masked_sum
    )
    sequence_losses = per_sequence(token_losses, mask, axis=1)  # [B]
    loss = masking.masked_mean(
      sequence_losses, jnp.any(mask, axis=1), axis_name=axis_name
    )

  mean_nll = masking.masked_mean(
    jax.lax.stop_gradient(nll), mask, axis_name=axis_name
  )
  num_tokens = masking.masked_sum(jnp.ones_like(nll), mask, axis_name=axis_name)
  return loss, {
    "nll/loss": jax.lax.stop_gradient(loss),
    "nll/perplexity": jnp.exp(mean_nll),
    "nll/tokens": num_tokens,
  }


def pairwise_loss(
  scores: Array,
  mask: Array,
  *,
  rewards: Array | None = None,
  margin: float = 0.0,
  reward_margin: float = 0.0,
  center_coef: float = 0.0,
  axis_name: str | None = None,
) -> tuple[Array, Metrics]:
  """Computes the Bradley-Terry loss of ranked candidates, best first.

    L = mean_i(mean_{k<j} (-log σ(s_k - s_j - m_kj) + c (s_k + s_j)²))
    m_kj = m + m_r (r_k - r_j)

  The inner mean is over the pairs of a prompt, the outer one over the prompts
  with a pair, so that a prompt with many candidates does not count for more.

  Args:
    scores: `[B, K]` float s, best candidate first.
    mask: `[B, K]` bool, True where there is a candidate.
    rewards: `[B, K]` float, by which the candidates were ranked, or None. A
      pair of equal rewards does not count.
    margin: m >= 0, by which the better one should lead.
    reward_margin: m_r >= 0, by which it should lead more for each unit of the
      difference of their rewards.
    center_coef: c >= 0, which draws the scores of a pair to a mean of 0; the
      loss without it leaves that open. 0.01 in the source.
    axis_name: mapped axis that shards B, if any; the loss is then that of
      the whole batch, on every shard.

  Returns:
    The scalar loss (0 if there is no pair) and scalar metrics:
    "pairwise/accuracy", the share of pairs in the right order (half for a
    tie), and "pairwise/gap", the mean of s_k - s_j, both averaged alike.

  Raises:
    ValueError: if there are fewer than two candidates, a setting is negative,
      or `reward_margin` has no rewards to go by.

  Source:
    Ouyang et al. (2022), "Training language models to follow instructions
    with human feedback", equation 1, which averages over the pairs of a
    prompt for the same reason; the margins are those of Touvron et al. (2023),
    "Llama 2", equation 2, where they depend on a rating of the pair; the
    centring is that of Eisenstein et al. (2023), "Helping or Herding?",
    equation 2.
  """
  chex.assert_rank([scores, mask], 2)
  chex.assert_equal_shape([scores, mask])
  chex.assert_type([scores, mask], [float, bool])
  num_candidates = scores.shape[1]
  if num_candidates < 2:
    raise ValueError(
      f"pairwise_loss needs two candidates or more, got {num_candidates}."
    )
  for name, value in (
    ("margin", margin),
    ("reward_margin", reward_margin),
    ("center_coef", center_coef),
  ):
    if not value >= 0:
      raise ValueError(f"{name} must not be negative, got {value}.")
  if reward_margin and rewards is None:
    raise ValueError(
      f"reward_margin={reward_margin} multiplies differences of rewards, and "
      "there are none."
    )

  scores = jnp.where(mask, jnp.asarray(scores, jnp.float32), 0.0)
  better, worse = jnp.triu_indices(num_candidates, k=1)
  pairs = jnp.asarray(mask)[:, better] & jnp.asarray(mask)[:, worse]  # [B, P]
  if rewards is not None:
    chex.assert_equal_shape([scores, rewards])
    pairs &= rewards[:, better] != rewards[:, worse]
    if reward_margin:
      rewards = jnp.where(mask, jnp.asarray(rewards, jnp.float32), 0.0)
      lead = rewards[:, better] - rewards[:, worse]
      margin = margin + reward_margin * jax.lax.stop_gradient(lead)
  gaps = scores[:, better] - scores[:, worse]

  def mean(x):
    per_prompt = masking.masked_mean(x, pairs, axis=1)  # [B]
    return masking.masked_mean(
      per_prompt, jnp.any(pairs, axis=1), axis_name=axis_name
    )

  loss = mean(-jax.nn.log_sigmoid(gaps - margin))
  if center_coef:
    sums = scores[:, better] + scores[:, worse]
    loss += center_coef * mean(jnp.square(sums))
  gaps = jax.lax.stop_gradient(gaps)
  return loss, {
    "pairwise/loss": jax.lax.stop_gradient(loss),
    "pairwise/accuracy": mean((jnp.sign(gaps) + 1.0) / 2.0),
    "pairwise/gap": mean(gaps),
  }


def outcome_loss(
  logits: Array,
  labels: Array,
  mask: Array,
  *,
  normalizer: str = "token_mean",
  axis_name: str | None = None,
) -> tuple[Array, Metrics]:
  """Computes the cross-entropy of a response's outcome at its tokens.

    l_t = -y_t log σ(x_t) - (1 - y_t) log σ(-x_t)

  The loss averages l over the tokens of the batch ("token_mean"), or over a
  sequence's tokens and then over the sequences that have any
  ("sequence_mean"). No gradient flows to `labels`.

  Args:
    logits: `[B, T]` float x, of the prefix that ends in the token.
    labels: `[B, T]` float y in [0, 1], 1 where the outcome is good.
    mask: `[B, T]` bool, True on the tokens to learn from.
    normalizer: "token_mean" or "sequence_mean".
    axis_name: mapped axis that shards B, if any; the loss is then that of
      the whole batch, on every shard.

  Returns:
    The scalar loss (0 if no token counts) and scalar metrics, averaged alike:
    "bce/accuracy", the share of logits on the same side of 0 as their labels
    are of 1/2 (half for one on either border), and "bce/positive_fraction",
    the mean of the labels.

  Raises:
    ValueError: if the normalizer is unknown.

  Source:
    Cobbe et al. (2021), "Training Verifiers to Solve Math Word Problems", who
    learn on all tokens from the outcome alone, with a squared error; as
    cross-entropy it is the outcome reward model of Havrilla et al. (2024),
    "Teaching Large Language Models to Reason with Reinforcement Learning".
  """
  chex.assert_rank([logits, labels, mask], 2)
  chex.assert_equal_shape([logits, labels, mask])
  chex.assert_type([logits, labels, mask], [float, float, bool])
  if normalizer not in NORMALIZERS[:2]:
    raise ValueError(
      f"normalizer must be one of {', '.join(NORMALIZERS[:2])}, got "
      f"{normalizer!r}."
    )

  logits = jnp.where(mask, jnp.asarray(logits, jnp.float32), 0.0)
  labels = jnp.where(mask, jnp.asarray(labels, jnp.float32), 0.0)
  labels = jax.lax.stop_gradient(labels)

  def mean(x):
    if normalizer == "token_mean":
      return masking.masked_mean(x, mask, axis_name=axis_name)
    per_sequence = masking.masked_mean(x, mask, axis=1)  # [B]
    return masking.masked_mean(
      per_sequence, jnp.any(mask, axis=1), axis_name=axis_name
    )

  # Not softplus(x) - x y: for a large x, that is the rounding of x.
  loss = mean(
    -labels * jax.nn.log_sigmoid(logits)
    - (1.0 - labels) * jax.nn.log_sigmoid(-logits)
  )
  sides = jnp.sign(jax.lax.stop_gradient(logits)) * jnp.sign(labels - 0.5)
  return loss, {
    "bce/loss": jax.lax.stop_gradient(loss),
    "bce/accuracy": mean((sides + 1.0) / 2.0),
    "bce/positive_fraction": mean(labels),
  }
