"""Draws tokens from logits: truncation, and one uniform per token.

Everything here maps `[..., V]` logits to logits of the same shape, or `[N, V]`
logits to `[N]` ids. Logits that arrive have been through
`log_probs.masked_logits`: divided by the temperature, forbidden tokens at
`log_probs.FORBIDDEN_LOGIT`. Truncation puts further tokens there.
"""

import dataclasses
import math

import chex
import jax
import jax.numpy as jnp

from rljax.ops import log_probs

Array = jax.Array

# A row longer than _SINGLE_LEVEL is searched in two steps, blocks first: two
# cumulative sums of a few numbers instead of one over the vocabulary. Blocks
# have about √V tokens, and at most _BLOCK, the lanes of a TPU.
_BLOCK = 128
_SINGLE_LEVEL = 64


@dataclasses.dataclass(frozen=True)
class Settings:
  """Holds how tokens are drawn; hashable, for a static argument under jit.

  Attributes:
    temperature: divides the logits; positive.
    top_k: keep this many of the most likely tokens; 0 keeps all.
    top_p: keep the most likely tokens that together have this probability, in
      (0, 1]; 1 keeps all.
    min_p: keep tokens that are at least this many times as likely as the most
      likely one, in [0, 1]; 0 keeps all.
    greedy: take the most likely token instead of drawing one.

  Raises:
    ValueError: if a value is out of its range.
  """

  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  min_p: float = 0.0
  greedy: bool = False

  def __post_init__(self):
    if not 0 < self.temperature < math.inf:
      raise ValueError(
        f"temperature must be positive and finite, got {self.temperature}; "
        "set greedy=True to take the most likely token."
      )
    if not isinstance(self.top_k, int) or self.top_k < 0:
      raise ValueError(
        "top_k must be a whole number of tokens, or 0 to keep all, "
        f"got {self.top_k}."
      )
    if not 0 < self.top_p <= 1:
      raise ValueError(
        f"top_p must be in (0, 1], where 1 keeps all, got {self.top_p}."
      )
    if not 0 <= self.min_p <= 1:
      raise ValueError(
        f"min_p must be in [0, 1], where 0 keeps all, got {self.min_p}."
      )

  @property
  def truncates(self) -> bool:
    """Whether some tokens are cut from the distribution that is drawn from."""
    return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


def temperature(logits: Array, temperature: float) -> Array:
  """Divides logits by a temperature: `[..., V]` -> `[..., V]` float32.

  Raises:
    ValueError: if `temperature` is not positive.
  """
  return log_probs.masked_logits(logits, temperature=temperature)


def forbid(logits: Array, allowed: Array | None) -> Array:
  """Removes the tokens that may not be sampled.

  Args:
    logits: `[..., V]` float.
    allowed: `[V]` bool, or a shape that broadcasts to that of `logits`; None
      allows all.

  Returns:
    `[..., V]` float32, forbidden tokens at `log_probs.FORBIDDEN_LOGIT`.
  """
  return log_probs.masked_logits(logits, allowed=allowed)


def top_k(logits: Array, k: int) -> Array:
  """Keeps the k most likely tokens.

  Tokens as likely as the k-th are kept with it: ties can keep more than k, and
  the result does not depend on the order of the vocabulary.

  Args:
    logits: `[..., V]` float.
    k: tokens to keep; 0, or V and more, keeps all.

  Returns:
    `[..., V]` float32, the others at `log_probs.FORBIDDEN_LOGIT`.

  Raises:
    ValueError: if `k` is negative.
  """
  chex.assert_type(logits, float)
  if k < 0:
    raise ValueError(f"k must not be negative, got {k}.")
  logits = _finite(logits)
  if k == 0 or k >= logits.shape[-1]:
    return logits

  # The barrier keeps the unused indices: without them XLA replaces its top-k by
  # a full sort, some seventy times slower on a CPU.
  kept, _ = jax.lax.optimization_barrier(jax.lax.top_k(logits, k))  # [..., k]
  return _keep(logits, logits >= kept[..., -1:])


def top_p(logits: Array, p: float) -> Array:
  """Keeps the smallest set of most likely tokens whose probability reaches p.

  The token that crosses p is in the set: of (.5, .25, .12, .08, .05) four are
  kept at p = 0.9. Tokens as likely as the one that crosses are kept with it.

  The set is {k: p_k >= c}, c the largest cut-off at which its probability is
  still at least p. Positive float32 numbers are ordered as their bit patterns,
  so thirty halvings of an interval of patterns, each a sum over the vocabulary,
  find c exactly; a sort takes some thirty times as long on a CPU.

  Args:
    logits: `[..., V]` float.
    p: in (0, 1]; 1 keeps all.

  Returns:
    `[..., V]` float32, the others at `log_probs.FORBIDDEN_LOGIT`.

  Raises:
    ValueError: if `p` is out of range.

  Source:
    Holtzman et al. (2020), "The Curious Case of Neural Text Degeneration".
  """
  chex.assert_type(logits, float)
  if not 0 < p <= 1:
    raise ValueError(f"p must be in (0, 1], got {p}.")
  logits = _finite(logits)
  if p == 1:
    return logits
  probs = jax.nn.softmax(logits, axis=-1)

  def halve(_, bounds):
    low, high = bounds
    middle = low + (high - low) // 2
    cut_off = jax.lax.bitcast_convert_type(middle, jnp.float32)
    kept = jnp.where(probs >= cut_off, probs, 0.0)
    reaches = jnp.sum(kept, axis=-1, keepdims=True) >= p
    return jnp.where(reaches, middle, low), jnp.where(reaches, high, middle)

  # Above 1 nothing is kept, from 0 on everything. Should rounding leave even
  # the sum of everything below p, the search ends at 0.
  above_one = jax.lax.bitcast_convert_type(jnp.float32(1.0), jnp.int32) + 1
  low = jnp.zeros((*logits.shape[:-1], 1), jnp.int32)
  high = jnp.broadcast_to(above_one, low.shape)
  low, _ = jax.lax.fori_loop(0, 30, halve, (low, high))
  cut_off = jax.lax.bitcast_convert_type(low, jnp.float32)
  return _keep(logits, probs >= cut_off)


def min_p(logits: Array, p: float) -> Array:
  """Keeps tokens at least p times as likely as the most likely one.

  Args:
    logits: `[..., V]` float.
    p: in [0, 1]; 0 keeps all, 1 the most likely token and its ties.

  Returns:
    `[..., V]` float32, the others at `log_probs.FORBIDDEN_LOGIT`.

  Raises:
    ValueError: if `p` is out of range.

  Source:
    Nguyen et al. (2024), "Turning Up the Heat: Min-p Sampling for Creative and
    Coherent LLM Outputs".
  """
  chex.assert_type(logits, float)
  if not 0 <= p <= 1:
    raise ValueError(f"p must be in [0, 1], got {p}.")
  logits = _finite(logits)
  if p == 0:
    return logits
  largest = jnp.max(logits, axis=-1, keepdims=True)
  return _keep(logits, logits - largest >= math.log(p))


def truncate(logits: Array, settings: Settings) -> Array:
  """Applies top-k, then top-p, then min-p.

  Each works on what the one before it left, renormalised. The temperature is
  not applied here: it is in the logits already, as `log_probs.masked_logits`
  leaves them.

  Args:
    logits: `[..., V]` float.
    settings: the truncation to apply.

  Returns:
    `[..., V]` float32, cut tokens at `log_probs.FORBIDDEN_LOGIT`.
  """
  logits = top_k(logits, settings.top_k)
  logits = top_p(logits, settings.top_p)
  return min_p(logits, settings.min_p)


def greedy(logits: Array) -> Array:
  """Returns the most likely token, the first of ties, `[..., V]` -> `[...]`."""
  return _most_likely(logits)


def draw(logits: Array, uniforms: Array) -> tuple[Array, Array]:
  """Draws one token per row, using up one uniform number.

    y = min {k: F(k) > u F(V)},   F(k) = Σ_{j <= k} exp z_j

  A vocabulary of more than 64 is searched in two levels: first for the block of
  about √V tokens, 128 at most, in which F passes u F(V), then within it. A
  token whose probability is 0 in float32 is never drawn, for any u and however
  the sums are rounded; nor does u = 1 run over the end. A uniform number has 24
  bits, so probabilities are resolved to about 1e-7.

  Args:
    logits: `[N, V]` float. NaN counts as 0: what is drawn from such a row says
      nothing, but it is no forbidden token.
    uniforms: `[N]` float in [0, 1].

  Returns:
    `[N]` int32 ids, and `[N]` float32 log-probabilities of them, log softmax
    z_y, from the same sums. They are NaN where a row holds NaN.
  """
  chex.assert_rank([logits, uniforms], [2, 1])
  chex.assert_equal_shape_prefix([logits, uniforms], 1)
  chex.assert_type([logits, uniforms], float)
  num_rows, vocab_size = logits.shape
  is_nan = jnp.any(jnp.isnan(logits), axis=-1)  # A maximum may leave it out.
  logits = _finite(logits)
  largest = jnp.max(logits, axis=-1, keepdims=True)
  weights = jnp.exp(logits - largest)
  if vocab_size <= _SINGLE_LEVEL:
    ids, _, total = _search(weights, uniforms)
  else:
    size = min(_BLOCK, 2 ** round(math.log2(vocab_size) / 2))
    weights = jnp.pad(weights, [(0, 0), (0, -vocab_size % size)])
    blocks = weights.reshape(num_rows, -1, size)  # [N, V / 128, 128]
    block, uniforms, total = _search(jnp.sum(blocks, axis=-1), uniforms)
    chosen = jnp.take_along_axis(blocks, block[:, None, None], axis=1)
    offset, *_ = _search(chosen[:, 0], uniforms)
    ids = block * size + offset
  drawn = jnp.take_along_axis(logits, ids[:, None], axis=-1)[:, 0]
  found = (drawn - largest[:, 0]) - jnp.log(total)
  return ids, jnp.where(is_nan, jnp.nan, found)


def inverse_cdf(logits: Array, uniforms: Array) -> Array:
  """Draws one token per row, `[N, V]`, `[N]` -> `[N]` int32; see `draw`."""
  return draw(logits, uniforms)[0]


def sample(keys: Array, logits: Array, *, greedy: bool = False) -> Array:
  """Draws one token per row, each from its own key.

  A row's token depends on its key and its logits alone, not on its place in
  the batch or on the batch's size.

  Args:
    keys: `[N]` typed keys, as `jax.random.key` makes them; unused if greedy.
    logits: `[N, V]` float.
    greedy: take the most likely token instead.

  Returns:
    `[N]` int32 ids.
  """
  if greedy:
    return _most_likely(logits)
  uniforms = jax.vmap(lambda key: jax.random.uniform(key, (), jnp.float32))(
    keys
  )
  return inverse_cdf(logits, uniforms)


def _most_likely(logits: Array) -> Array:
  logits = _finite(logits)
  # Two plain reductions; `argmax` takes several times as long on a CPU.
  largest = jnp.max(logits, axis=-1, keepdims=True)
  last = logits.shape[-1] - 1
  index = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
  return jnp.min(jnp.where(logits == largest, index, last), axis=-1)


def _keep(logits: Array, is_kept: Array) -> Array:
  return log_probs.masked_logits(logits, allowed=is_kept)


def _finite(logits: Array) -> Array:
  """Returns logits by which a token can be chosen, whatever they hold.

  NaN becomes 0, which is more than a forbidden token has, and infinities the
  largest numbers.
  """
  return jnp.nan_to_num(logits.astype(jnp.float32))


def _search(weights: Array, uniforms: Array) -> tuple[Array, Array, Array]:
  """Finds where the cumulative sum passes a fraction of the total.

  Args:
    weights: `[N, K]` float32, not negative, at least one positive in a row.
    uniforms: `[N]` float32, the fractions.

  Returns:
    `[N]` int32 indices of positive weights; `[N]` float32 in [0, 1]: how far
    into its weight each fraction lies, a uniform number for the next level; and
    `[N]` float32 sums of the weights.
  """
  sums = jnp.cumsum(weights, axis=-1)
  # A parallel cumulative sum adds in varying order, so it may rise where the
  # weight is 0, or fall. Only positive weights are candidates, and that with
  # the largest sum always qualifies: there is one, whatever the rounding.
  sums = jnp.where(weights > 0, sums, -1.0)
  total = jnp.max(sums, axis=-1)
  targets = uniforms.astype(jnp.float32) * total
  is_past = (sums > targets[:, None]) | (sums == total[:, None])
  index = jnp.argmax(is_past, axis=-1)[:, None]
  weight = jnp.take_along_axis(weights, index, axis=-1)[:, 0]
  before = jnp.take_along_axis(sums, index, axis=-1)[:, 0] - weight
  within = jnp.clip((targets - before) / weight, 0.0, 1.0)
  return index[:, 0].astype(jnp.int32), within, total
