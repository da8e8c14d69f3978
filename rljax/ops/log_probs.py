"""Log-probabilities, entropies and KL estimates of sampled tokens.

Sampler and trainer must agree on the distribution a token was drawn from:
`masked_logits` is the one place where a temperature divides logits and where
tokens that may not be sampled are removed.
"""

import math
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

Array = jax.Array

# Stands for "cannot be sampled". Finite, so that products with a zero
# probability are zero and not NaN; exp(FORBIDDEN_LOGIT - max) is exactly 0.
FORBIDDEN_LOGIT = -1e9

# Logits whose largest is further from 0 than this are shifted: those of tokens
# that may be sampled never come near FORBIDDEN_LOGIT.
_FAR = 1e8
# Of float32: a smaller temperature would be 0 there.
_SMALLEST_TEMPERATURE = 2.0**-126

KL_KINDS = ("k1", "k2", "k3")


@chex.dataclass(frozen=True)
class TokenStatistics:
  """Holds the log-probabilities and entropies of given tokens."""

  log_probs: Array  # [B, T] float32, nats.
  entropies: Array | None  # [B, T] float32, nats; None if not asked for.


def chunk_size(num_rows: int, vocab_size: int, max_bytes: int = 2**28) -> int:
  """Returns how many columns of float32 logits fit into `max_bytes`, >= 1.

  Args:
    num_rows: B.
    vocab_size: V.
    max_bytes: what `[B, chunk, V]` may take, 256 MB by default.
  """
  return max(1, max_bytes // (4 * num_rows * vocab_size))


def kl_estimate(
  log_probs: Array, ref_log_probs: Array, *, kind: str = "k1"
) -> Array:
  """Estimates KL(policy || reference) per token, from the policy's samples.

    d = log q(y) - log p(y),   p the policy, q the reference
    k1 = -d,   k2 = d²/2,   k3 = exp(d) - 1 - d

  k1 and k3 are unbiased; k2 has a small bias; k2 and k3 are never negative; k3
  has a heavy tail where q is much larger than p. An unbiased estimate need not
  have an unbiased gradient: with the samples held fixed, the expected gradient
  of k1 is 0, that of k2 is the gradient of KL(p || q), and that of k3 is the
  gradient of KL(q || p). Inside a reward any kind may be used.

  No gradient flows to `ref_log_probs`. The estimate is elementwise and takes
  no mask: replace masked entries that may not be finite before calling.

  Args:
    log_probs: `[B, T]` float, of the sampled tokens under the policy.
    ref_log_probs: `[B, T]` float, of the same tokens under the reference.
    kind: "k1", "k2" or "k3".

  Returns:
    `[B, T]` float32, nats.

  Raises:
    ValueError: if `kind` is unknown.

  Source:
    Schulman (2020), "Approximating KL Divergence".
  """
  chex.assert_equal_shape([log_probs, ref_log_probs])
  chex.assert_type([log_probs, ref_log_probs], float)
  if kind not in KL_KINDS:
    raise ValueError(
      f"kind must be one of {', '.join(KL_KINDS)}, got {kind!r}."
    )

  ref_log_probs = jax.lax.stop_gradient(ref_log_probs)
  difference = ref_log_probs.astype(jnp.float32) - log_probs.astype(jnp.float32)
  if kind == "k1":
    return -difference
  if kind == "k2":
    return jnp.square(difference) / 2
  return jnp.expm1(difference) - difference


def masked_logits(
  logits: Array, *, temperature: float = 1.0, allowed: Array | None = None
) -> Array:
  """Returns the logits that tokens are drawn from and scored with.

    z_k / τ if k is allowed, else FORBIDDEN_LOGIT

  The temperature comes first, so a forbidden token stays forbidden at any τ.
  Where the largest logit of the allowed tokens, over τ, is further than 1e8
  from 0, it is subtracted first: the distribution stays the same, and no
  allowed token falls below a forbidden one. Where all of them are -inf, they
  are equally likely.

  Args:
    logits: `[..., V]` float.
    temperature: τ > 0.
    allowed: `[V]` bool, or any shape that broadcasts to that of `logits`; True
      where a token may be sampled. None allows all.

  Returns:
    `[..., V]` float32.

  Raises:
    ValueError: if `temperature` is not positive.
  """
  chex.assert_type(logits, float)
  if not temperature > 0:
    raise ValueError(f"temperature must be positive, got {temperature}.")

  logits = logits.astype(jnp.float32)
  if temperature == 1 and allowed is None:
    return logits
  temperature = max(temperature, _SMALLEST_TEMPERATURE)
  kept = logits
  if allowed is not None:
    chex.assert_type(allowed, bool)
    # Ranks may differ ([V] against [B, T, V]): say so, rather than promote.
    allowed = jnp.broadcast_to(allowed, logits.shape)
    kept = jnp.where(allowed, logits, -jnp.inf)
  top = _largest(kept)
  is_far = jnp.isfinite(top) & (jnp.abs(top) > _FAR * temperature)
  # Of NaN a maximum may know nothing: it stays what it is.
  logits = jnp.where((top == -jnp.inf) & (logits == -jnp.inf), 0.0, logits)
  logits = logits - jnp.where(is_far, top, 0.0)
  if temperature != 1:
    logits = logits / temperature
  if allowed is None:
    return logits
  return jnp.where(allowed, logits, FORBIDDEN_LOGIT)


def token_log_probs(
  logits: Array,
  ids: Array,
  *,
  temperature: float = 1.0,
  allowed: Array | None = None,
) -> Array:
  """Computes the log-probabilities of given tokens.

    log π(y_t) = z_t[y_t] - log Σ_k exp z_t[k],   z = masked_logits(logits)

  Args:
    logits: `[B, T, V]` float.
    ids: `[B, T]` int in [0, V); `logits[:, t]` is the distribution that
      `ids[:, t]` was drawn from. Anything else gives NaN (or, if negative,
      counts from the end, as an index does).
    temperature: τ > 0.
    allowed: `[V]` bool (or broadcastable to `[B, T, V]`), None for all. The
      log-probability of a forbidden token is about FORBIDDEN_LOGIT.

  Returns:
    `[B, T]` float32, nats.
  """
  chex.assert_rank([logits, ids], [3, 2])
  chex.assert_equal_shape_prefix([logits, ids], 2)
  chex.assert_type([logits, ids], [float, int])
  logits = masked_logits(logits, temperature=temperature, allowed=allowed)
  return _log_probs_of(logits, ids)


def entropy(
  logits: Array, *, temperature: float = 1.0, allowed: Array | None = None
) -> Array:
  """Computes the entropies of the distributions that tokens are drawn from.

    H = -Σ_k p_k log p_k,   p = softmax(masked_logits(logits))

  A token of probability 0 (forbidden, or with a logit of -inf) adds nothing,
  and the gradient at its logit is 0.

  Args:
    logits: `[..., V]` float.
    temperature: τ > 0.
    allowed: `[V]` bool (or broadcastable to `logits`), None for all.

  Returns:
    `[...]` float32, nats, in [0, log V].
  """
  return _entropies(
    masked_logits(logits, temperature=temperature, allowed=allowed)
  )


def from_hidden(
  logits_fn: Callable[[Array], Array],
  hidden: Array,
  ids: Array,
  *,
  chunk_size: int | None,
  temperature: float = 1.0,
  allowed: Array | None = None,
  with_entropy: bool = True,
) -> TokenStatistics:
  """Computes log-probabilities and entropies without holding all logits.

  `token_log_probs` and `entropy` of `logits_fn(hidden)`, computed for
  `chunk_size` columns at a time: the largest array is `[B, chunk_size, V]`,
  forward and backward (which computes each chunk's logits once more). There
  is no mask here: hidden states of padding must be finite.

  Args:
    logits_fn: maps `[B, t, D]` hidden states to `[B, t, V]` logits, each
      position by itself. It may close over parameters; gradients reach them.
    hidden: `[B, T, D]` float; `hidden[:, t]` predicts `ids[:, t]`.
    ids: `[B, T]` int.
    chunk_size: columns per chunk, any number (T need not be a multiple). None,
      or T and more, makes one block that keeps its logits.
    temperature: τ > 0.
    allowed: `[V]` bool (or broadcastable to every chunk: `[B, 1, V]`; or
      `[B, T, V]`, which is cut into chunks), None for all.
    with_entropy: False leaves `entropies` None.

  Returns:
    `TokenStatistics`.

  Raises:
    ValueError: if `chunk_size` is not positive.
  """
  chex.assert_rank([hidden, ids], [3, 2])
  chex.assert_equal_shape_prefix([hidden, ids], 2)
  chex.assert_type([hidden, ids], [float, int])

  by_position = ()
  if allowed is not None and allowed.ndim == 3 and allowed.shape[1] > 1:
    by_position = (allowed,)

  def statistics(hidden, ids, allowed=allowed):
    logits = masked_logits(
      logits_fn(hidden), temperature=temperature, allowed=allowed
    )  # [B, t, V]
    # With the time axis first, chunks concatenate by a plain reshape.
    return TokenStatistics(
      log_probs=_log_probs_of(logits, ids).T,
      entropies=_entropies(logits).T if with_entropy else None,
    )

  chunks = map_chunks(
    statistics, hidden, ids, *by_position, chunk_size=chunk_size
  )
  batch, length = ids.shape
  return jax.tree.map(lambda x: x.reshape(-1, batch)[:length].T, chunks)


def map_chunks(
  function: Callable[..., chex.ArrayTree],
  *arrays: Array,
  chunk_size: int | None,
) -> chex.ArrayTree:
  """Applies a function to consecutive chunks of the time axis, one by one.

  Nothing that `function` computes is kept for the backward pass, which
  computes it again. Chunks are cut along T, so that a sharded B stays so.

  Args:
    function: takes one `[B, t, ...]` chunk of each array, t = `chunk_size`; may
      close over arrays that gradients flow to.
    *arrays: `[B, T, ...]`, with the same B and T. The last chunk is filled up
      with zeros (False): `function` is given a mask, or the caller drops what
      it says about columns from T on.
    chunk_size: columns per chunk; None, or T and more, calls `function` once on
      the whole arrays and keeps what it computes.

  Returns:
    The results, stacked on a new leading axis: `[num_chunks, ...]`.

  Raises:
    ValueError: if `chunk_size` is not positive.
  """
  chex.assert_equal_shape_prefix(arrays, 2)
  if chunk_size is not None and chunk_size < 1:
    raise ValueError(
      f"chunk_size must be positive, or None for one block, got {chunk_size}."
    )
  batch, length = arrays[0].shape[:2]
  if chunk_size is None or chunk_size >= length:
    return jax.tree.map(lambda x: x[None], function(*arrays))

  num_chunks = math.ceil(length / chunk_size)
  padding = num_chunks * chunk_size - length

  def cut(x):
    x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
    x = x.reshape(batch, num_chunks, chunk_size, *x.shape[2:])
    return jnp.moveaxis(x, 1, 0)  # [num_chunks, B, chunk_size, ...]

  checkpointed = jax.checkpoint(lambda chunk: function(*chunk))
  return jax.lax.map(checkpointed, tuple(cut(x) for x in arrays))


def _log_probs_of(logits: Array, ids: Array) -> Array:
  """Returns log softmax(logits) at `ids`: `[..., V]`, `[...]` -> `[...]`."""
  top = _largest(logits)
  # Gather from the logits themselves: [..., V] is then only ever reduced, and
  # XLA never writes a log-softmax of that size.
  chosen = jnp.take_along_axis(logits, ids[..., None], axis=-1) - top
  total = jnp.sum(jnp.exp(logits - top), axis=-1)
  return chosen[..., 0] - jnp.log(total)


def _entropies(logits: Array) -> Array:
  """Returns the entropies of softmax(logits): `[..., V]` -> `[...]`."""
  # With s = z - max z and Z = Σ exp s: H = log Z + Σ exp(s) (-s) / Z, a sum of
  # two terms that are never negative, so nothing cancels near H = 0.
  shifted = logits - _largest(logits)
  weights = jnp.exp(shifted)
  total = jnp.sum(weights, axis=-1)
  # Both factors are guarded: 0 * -inf is NaN here, and in the gradient.
  is_possible = weights > 0
  costs = jnp.where(is_possible, -shifted, 0.0)
  return jnp.log(total) + jnp.sum(weights * costs, axis=-1) / total


def _largest(logits: Array) -> Array:
  """Returns the row maxima `[..., 1]`, by which a softmax may be shifted."""
  return jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
