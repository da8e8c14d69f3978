"""Per-token rewards: a task's score, a KL penalty, and its controller."""

import chex
import jax
import jax.numpy as jnp

from rljax import log_probs as log_probs_lib

Array = jax.Array


def place_score(scores: Array, mask: Array) -> Array:
  """Rewards that are zero but for the score on the last unmasked token.

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
  num_left = jax.lax.cumsum(
    jnp.asarray(mask, jnp.int32), axis=1, reverse=True
  )  # This token and those after it.
  return jnp.where(mask & (num_left == 1), scores[:, None], 0.0)


def kl_penalty(
  log_probs: Array,
  ref_log_probs: Array,
  mask: Array,
  *,
  kl_coef: float | Array,
  kind: str = "k1",
) -> Array:
  """Rewards that price each token's drift from the reference policy.

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
  """A KL coefficient that steers the measured KL towards a target.

    e = clip(KL / target - 1, -0.2, 0.2)
    β ← β (1 + e n / horizon)

  Source:
    Ziegler et al. (2019), "Fine-Tuning Language Models from Human
    Preferences", section 2.2, with n responses a batch in the step size as
    in the authors' code.
  """

  coef: Array  # [] float32: β.

  @classmethod
  def create(cls, coef: float) -> "AdaptiveKL":
    """A controller that starts at `coef`.

    Args:
      coef: β >= 0 of the first batch.

    Returns:
      The controller.

    Raises:
      ValueError: if `coef` is negative.
    """
    if not coef >= 0:
      raise ValueError(f"coef must not be negative, got {coef}.")
    return cls(coef=jnp.float32(coef))

  def update(
    self,
    kl: float | Array,
    num_samples: int | Array,
    *,
    target: float,
    horizon: float,
  ) -> "AdaptiveKL":
    """The controller after one batch. No gradient flows through it.

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
    if not target > 0:
      raise ValueError(f"target must be positive, got {target}.")
    if not horizon > 0:
      raise ValueError(f"horizon must be positive, got {horizon}.")
    kl = jax.lax.stop_gradient(jnp.asarray(kl, jnp.float32))
    num_samples = jnp.asarray(num_samples).astype(jnp.float32)
    chex.assert_rank([kl, num_samples], 0)
    error = jnp.clip(kl / target - 1.0, -0.2, 0.2)
    return self.replace(coef=self.coef * (1.0 + error * num_samples / horizon))
