"""Entropy of the policy per token, and of its answers over a batch."""

from collections.abc import Callable, Mapping

import chex
import jax
import jax.numpy as jnp

from rljax.ops import log_probs, masking

Array = jax.Array
Metrics = Mapping[str, Array]

MODES = ("per_step", "last", "pooled", "mi")


@chex.dataclass(frozen=True)
class _Sums:
  """Holds sums over time steps that every mode is made of; chunks add up."""

  count: Array  # [] float32, unmasked tokens.
  token_entropy: Array  # [] float32, summed over tokens.
  step_entropy: Array  # [] float32, n_t H(pbar_t) summed over steps.
  step_max_prob: Array  # [] float32, n_t max_k pbar_t[k] summed over steps.
  mass: Array  # [V] float32, probabilities summed over tokens.


def token_entropy(
  logits: Array,
  mask: Array,
  *,
  temperature: float = 1.0,
  allowed: Array | None = None,
  axis_name: str | None = None,
) -> tuple[Array, Metrics]:
  """Computes the mean entropy of the policy over unmasked tokens.

    H_tok = Σ_bt m_bt H(p_bt) / Σ_bt m_bt,   H(p) = -Σ_k p_k log p_k

  A bonus: callers subtract `entropy_coef` times it from the loss.

  Args:
    logits: `[B, T, V]` float.
    mask: `[B, T]` bool, True where a token counts.
    temperature: τ > 0 that the tokens were sampled with.
    allowed: `[V]` bool (or broadcastable to `logits`), the tokens that may be
      sampled; None for all.
    axis_name: mapped axis that shards B, if any.

  Returns:
    The entropy in nats (0 if no token counts) and scalar metrics.
  """
  _check(logits, mask)
  logits = _clean(logits, mask)
  entropies = log_probs.entropy(
    logits, temperature=temperature, allowed=allowed
  )
  value = masking.masked_mean(entropies, mask, axis_name=axis_name)
  return value, {"entropy/token": value}


def batch_entropy(
  logits: Array,
  mask: Array,
  *,
  mode: str = "per_step",
  temperature: float = 1.0,
  allowed: Array | None = None,
  mask_in_loss: bool = True,
  epsilon: float | None = None,
  axis_name: str | None = None,
) -> tuple[Array, Metrics]:
  """Computes the entropy of the batch's mean distribution.

    pbar_t = Σ_b m_bt p_bt / n_t,   n_t = Σ_b m_bt
    H_bat = Σ_t n_t H(pbar_t) / Σ_t n_t,   H(p) = -Σ_k p_k log p_k

  The mean is of probabilities, over the rows of the batch. It is high when
  different prompts get different tokens, even if the policy is certain of each
  one, and low when every prompt gets the same answer. It exceeds the token
  entropy by the mean of KL(p_bt || pbar_t), the information that a row carries
  about its token. 0 <= H_bat <= log V, and for one-hot rows H_bat <= log B.
  Callers subtract `batch_entropy_coef` times it from the loss.

  Its gradient, at one step of B rows,

    ∂H_bat / ∂z_bk = -(p_bk / B) (log pbar_k - Σ_j p_bj log pbar_j)

  vanishes with p_bk as rows saturate: it prevents a collapse onto one answer,
  but cannot undo one. And at the optimum it pulls the answers' distribution
  towards uniform over the vocabulary, rather than towards that of the right
  answers.

  Responses of more than one token need a choice of `mode`, all of which agree
  when T = 1:

    "per_step": as above, each step over the rows still alive at it.
    "last": H of the mean over rows, each at its own last unmasked token.
    "pooled": H of the mean over all tokens, whatever their step. A fixed
      sequence of different tokens has a high pooled entropy, so this does not
      see that the input is ignored; meant for ablations.
    "mi": "per_step" less the token entropy, an estimate of the information
      between row and token. It does not ask single answers to be uncertain,
      and so also rewards being certain too early.

  In a batch of B rows the estimate is biased low, by about (K - 1) / 2B nats
  for one-hot rows over K categories: it depends on the micro-batch size.

  Args:
    logits: `[B, T, V]` float.
    mask: `[B, T]` bool, True where a token counts.
    mode: "per_step", "last", "pooled" or "mi".
    temperature: τ > 0 that the tokens were sampled with.
    allowed: `[V]` bool (or broadcastable to `logits`), the tokens that may be
      sampled; None for all.
    mask_in_loss: False ignores `allowed`, as the paper's code does. Then
      probability that moves to a token which is never sampled raises the
      entropy at no cost in reward: the policy learns to put its mass there,
      which defeats the regulariser. For reproduction only.
    epsilon: None guards log 0; a number ε > 0 takes log(pbar + ε) instead, as
      the paper's code does with 1e-9.
    axis_name: mapped axis that shards B, if any; probabilities and counts are
      summed over it before the entropy is taken.

  Returns:
    The value of `mode` in nats (0 if no token counts), and scalar metrics:
    "entropy/batch", H_bat ("mi" does not subtract from this one);
    "entropy/batch_max_prob", the largest entry of pbar, averaged over tokens:
      the share of the most popular answer;
    "entropy/batch_argmax", int32, the token that is most popular overall;
    "entropy/token", the mean token entropy at the same positions.

  Raises:
    ValueError: if `mode` is unknown or `epsilon` is not positive.

  Source:
    Padula and Soemers (2024), "Exploring RL-based LLM Training for Formal
    Language Tasks with Programmed Rewards". We depart from it in that tokens
    which may not be sampled are out of the distribution (see `mask_in_loss`).
    The paper reads the last column of the padded batch, and its answers have
    one token; the modes for longer and ragged responses are ours.
  """
  _check(logits, mask)
  _check_options(mode, epsilon)
  if mode == "last":
    if allowed is not None:
      allowed, _ = _last(jnp.broadcast_to(allowed, logits.shape), mask)
    logits, mask = _last(logits, mask)
  sums = _sums(
    logits,
    mask,
    mode=mode,
    temperature=temperature,
    allowed=allowed if mask_in_loss else None,
    epsilon=epsilon,
    axis_name=axis_name,
  )
  return _value_and_metrics(sums, mode=mode, epsilon=epsilon)


def batch_entropy_from_hidden(
  logits_fn: Callable[[Array], Array],
  hidden: Array,
  mask: Array,
  *,
  chunk_size: int | None,
  mode: str = "per_step",
  temperature: float = 1.0,
  allowed: Array | None = None,
  mask_in_loss: bool = True,
  epsilon: float | None = None,
  axis_name: str | None = None,
) -> tuple[Array, Metrics]:
  """Computes `batch_entropy` without logits of the whole sequence.

  The same value, gradient and metrics, with the logits of `chunk_size` columns
  in memory at a time, forward and backward: a time step is never divided, so
  its mean over the batch is complete within a chunk.

  Args:
    logits_fn: maps `[B, t, D]` hidden states to `[B, t, V]` logits, each
      position by itself. It may close over parameters; gradients reach them.
    hidden: `[B, T, D]` float; `hidden[:, t]` predicts response token t.
    mask: `[B, T]` bool, True where a token counts.
    chunk_size: columns per chunk, any number; None, or T and more, makes one
      block that keeps its logits.
    mode: as in `batch_entropy`. "last" computes the logits of B positions.
    temperature: as in `batch_entropy`.
    allowed: as in `batch_entropy`, `[V]` or `[B, 1, V]`.
    mask_in_loss: as in `batch_entropy`.
    epsilon: as in `batch_entropy`.
    axis_name: as in `batch_entropy`.

  Returns:
    As `batch_entropy`.

  Raises:
    ValueError: if `mode` is unknown, or `epsilon` or `chunk_size` not positive.
  """
  _check(hidden, mask)
  _check_options(mode, epsilon)
  if mode == "last":
    hidden, mask = _last(hidden, mask)
  # Before the model's head: a NaN that is dropped after it would still turn
  # the gradient of the head's parameters to NaN.
  hidden = _clean(hidden, mask)

  def sums_of_chunk(hidden, mask):
    return _sums(
      logits_fn(hidden),
      mask,
      mode=mode,
      temperature=temperature,
      allowed=allowed if mask_in_loss else None,
      epsilon=epsilon,
      axis_name=axis_name,
    )

  chunks = log_probs.map_chunks(
    sums_of_chunk, hidden, mask, chunk_size=chunk_size
  )
  sums = jax.tree.map(lambda x: jnp.sum(x, axis=0), chunks)
  return _value_and_metrics(sums, mode=mode, epsilon=epsilon)


def _sums(
  logits: Array,
  mask: Array,
  *,
  mode: str,
  temperature: float,
  allowed: Array | None,
  epsilon: float | None,
  axis_name: str | None,
) -> _Sums:
  """The sums over the steps of `[B, T, V]` logits, complete over all shards."""
  logits = _clean(logits, mask)
  logits = log_probs.masked_logits(
    logits, temperature=temperature, allowed=allowed
  )
  if mode == "pooled":  # Every token is a row of one step.
    logits = logits.reshape(-1, 1, logits.shape[-1])
    mask = mask.reshape(-1, 1)
  probs = jax.nn.softmax(logits, axis=-1)  # [B, T, V]
  mass = masking.masked_sum(
    probs,
    jnp.broadcast_to(mask[..., None], probs.shape),
    axis=0,
    axis_name=axis_name,
  )  # [T, V]
  count = masking.masked_sum(
    jnp.ones(mask.shape, jnp.float32), mask, axis=0, axis_name=axis_name
  )  # [T]
  mean_probs = mass / jnp.maximum(count, 1.0)[:, None]
  return _Sums(
    count=jnp.sum(count),
    token_entropy=masking.masked_sum(
      log_probs.entropy(logits), mask, axis_name=axis_name
    ),
    step_entropy=jnp.sum(count * _entropy_of(mean_probs, epsilon)),
    step_max_prob=jnp.sum(count * jnp.max(mean_probs, axis=-1)),
    mass=jnp.sum(mass, axis=0),
  )


def _value_and_metrics(
  sums: _Sums, *, mode: str, epsilon: float | None
) -> tuple[Array, Metrics]:
  count = jnp.maximum(sums.count, 1.0)
  if mode == "pooled":
    # Not a sum over chunks: the chunks' masses are added up first.
    mean_probs = sums.mass / count
    batch = _entropy_of(mean_probs, epsilon)
    max_prob = jnp.max(mean_probs)
  else:
    batch = sums.step_entropy / count
    max_prob = sums.step_max_prob / count
  token = sums.token_entropy / count
  return batch - token if mode == "mi" else batch, {
    "entropy/batch": batch,
    "entropy/batch_max_prob": max_prob,
    "entropy/batch_argmax": jnp.argmax(sums.mass).astype(jnp.int32),
    "entropy/token": token,
  }


def _entropy_of(probs: Array, epsilon: float | None) -> Array:
  """Entropies of given probabilities: `[..., V]` -> `[...]`."""
  if epsilon is not None:
    return -jnp.sum(probs * jnp.log(probs + epsilon), axis=-1)
  is_possible = probs > 0
  # The inner `where` keeps log 0 out of the gradient, the outer one its value.
  logs = jnp.log(jnp.where(is_possible, probs, 1.0))
  return -jnp.sum(jnp.where(is_possible, probs * logs, 0.0), axis=-1)


def _last(x: Array, mask: Array) -> tuple[Array, Array]:
  """Each row's last unmasked position: `[B, 1, ...]`, and `[B, 1]` if any."""
  from_end = jnp.argmax(mask[:, ::-1], axis=1)
  last = (mask.shape[1] - 1 - from_end)[:, None]
  x = jnp.take_along_axis(x, last[..., None], axis=1)
  return x, jnp.any(mask, axis=1, keepdims=True)


def _clean(x: Array, mask: Array) -> Array:
  """Zeros for whatever the masked positions of `[B, T, ...]` hold."""
  return jnp.where(mask[..., None], x, jnp.zeros((), x.dtype))


def _check(x: Array, mask: Array) -> None:
  chex.assert_rank([x, mask], [3, 2])
  chex.assert_equal_shape_prefix([x, mask], 2)
  chex.assert_type([x, mask], [float, bool])


def _check_options(mode: str, epsilon: float | None) -> None:
  if mode not in MODES:
    known = ", ".join(MODES)
    raise ValueError(f"mode must be one of {known}, got {mode!r}.")
  if epsilon is not None and not epsilon > 0:
    raise ValueError(
      f"epsilon must be positive, or None for a guarded log, got {epsilon}."
    )
