"""Attention by blocks of queries and keys, in memory linear in the length.

The scores of one pair of blocks exist at a time. A running maximum and sum make
the softmax; the gradient computes the scores again from the logarithm of the
normaliser, which is all that is kept beside the operands and the result. Pairs
of blocks that the causal mask or a window rules out are not computed.

Source:
  Rabe and Staats (2021), "Self-attention Does Not Need O(n²) Memory"; the
  gradient is that of Dao et al. (2022), "FlashAttention".
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

Array = jax.Array

_MASKED = jnp.finfo(jnp.float32).min


@dataclasses.dataclass(frozen=True)
class Form:
  """What is known of an attention when it is traced.

  Attributes:
    scale: factor of q · k.
    softcap: c of c tanh(s / c); None: no cap.
    causal: whether a query sees no key after its own.
    window: w; a query sees keys less than w columns away; None: all.
    block_q: queries of a block.
    block_k: keys of a block.
    width: tokens of a row before blocks were filled up, of queries and of keys;
      the queries are the last tokens.
  """

  scale: float
  softcap: float | None
  causal: bool
  window: int | None
  block_q: int
  block_k: int
  width: tuple[int, int]

  def keys_of(self, i: Array, num_blocks: int) -> tuple[Array, Array]:
    """Returns the first key block that queries of block i see, and the end."""
    first = i * self.block_q + self.width[1] - self.width[0]
    last = first + self.block_q - 1
    after = last + 1 if self.causal else self._reach(last, num_blocks)
    before = 0 if self.window is None else first - self.window + 1
    return _range(before, after, self.block_k, num_blocks)

  def queries_of(self, j: Array, num_blocks: int) -> tuple[Array, Array]:
    """Returns the first query block that sees keys of block j, and the end."""
    first = j * self.block_k - self.width[1] + self.width[0]
    last = first + self.block_k - 1
    after = self._reach(last, num_blocks)
    before = first
    if not self.causal:
      before = 0 if self.window is None else first - self.window + 1
    return _range(before, after, self.block_q, num_blocks)

  def _reach(self, last, num_blocks):
    """The column after the last that a window reaches; None: all."""
    return None if self.window is None else last + self.window

  def sees(self, i: Array, j: Array) -> Array:
    """Returns which places are near enough, `[block_q, block_k]` bool."""
    shift = self.width[1] - self.width[0]
    query = i * self.block_q + shift + jnp.arange(self.block_q)
    key = j * self.block_k + jnp.arange(self.block_k)
    distance = query[:, None] - key[None]
    near = jnp.ones(distance.shape, bool)
    if self.causal:
      near &= distance >= 0
    if self.window is not None:
      near &= jnp.abs(distance) < self.window
    return near

  def scores(self, queries: Array, keys: Array) -> Array:
    """Returns float32 scores and what they were before the cap."""
    products = _product("bkgqd,bktd->bkgqt", queries, keys) * self.scale
    if self.softcap is None:
      return products
    return self.softcap * jnp.tanh(products / self.softcap)

  def through_scores(self, cotangent: Array, scores: Array) -> Array:
    """Returns the cotangent of q · k from that of the scores."""
    if self.softcap is not None:
      cotangent *= 1 - (scores / self.softcap) ** 2
    return cotangent * self.scale


def attend(
  queries: Array,
  keys: Array,
  values: Array,
  mask: Array,
  segments: Array | None = None,
  *,
  scale: float,
  softcap: float | None = None,
  causal: bool = True,
  window: int | None = None,
  block_q: int = 128,
  block_k: int = 128,
) -> Array:
  """Computes softmax attention by blocks; see `attention.attend`.

  Args:
    queries: `[B, Q, H, d]` float, of the last Q of the S tokens.
    keys: `[B, S, K, d]` float.
    values: `[B, S, K, d]` float.
    mask: `[B, S]` bool, True at keys that may be seen.
    segments: `[B, S]` int; a query sees keys of its own segment. None: one.
    scale: factor of q · k.
    softcap: c of c tanh(s / c); None: no cap.
    causal: whether a query sees no key after its own.
    window: how many tokens a query sees, its own among them, or how many on
      either side if not `causal`; None: all.
    block_q: queries of a block.
    block_k: keys of a block.

  Returns:
    `[B, Q, H, d]` in the dtype of `values`; 0 for a query that sees nothing.
  """
  batch, num_queries, num_heads, width = queries.shape
  length, num_kv_heads = keys.shape[1:3]
  if window is not None and not causal:
    window += 1
  form = Form(
    scale=scale,
    softcap=softcap,
    causal=causal,
    window=window,
    block_q=min(block_q, num_queries),
    block_k=min(block_k, length),
    width=(num_queries, length),
  )
  queries = queries.reshape(batch, num_queries, num_kv_heads, -1, width)
  found = _attend(
    form,
    _blocks(queries, form.block_q, "bnqkgd->nbkgqd"),
    _blocks(keys, form.block_k, "bntkd->nbktd"),
    _blocks(values, form.block_k, "bntkd->nbktd"),
    _blocks(mask, form.block_k, "bnt->nbt"),
    _segment_blocks(segments, form),
  )
  found = jnp.einsum("nbkgqd->bnqkgd", found)
  found = found.reshape(batch, -1, num_heads, width)
  return found[:, :num_queries]


def _blocks(x, size, order):
  """Fills up the second axis, splits it into blocks, and puts these first."""
  blocks = math.ceil(x.shape[1] / size)
  widths = [(0, 0)] * x.ndim
  widths[1] = (0, blocks * size - x.shape[1])
  x = jnp.pad(x, widths).reshape(x.shape[0], blocks, size, *x.shape[2:])
  source, target = order.split("->")
  return x.transpose([source.index(axis) for axis in target])


def _segment_blocks(segments, form):
  if segments is None:
    return None
  of_queries = segments[:, form.width[1] - form.width[0] :]
  return (
    _blocks(of_queries, form.block_q, "bnq->nbq"),
    _blocks(segments, form.block_k, "bnt->nbt"),
  )


def _range(before, after, size, num_blocks):
  """Blocks of a size from the column `before` to that before `after`."""
  start = jnp.clip(jnp.asarray(before) // size, 0, num_blocks)
  if after is None:
    return start, jnp.full_like(start, num_blocks)
  return start, jnp.clip(-(-after // size), 0, num_blocks)


def _loop(start, end, most, body, carry):
  """A `fori_loop` whose condition says how many rounds there are at most."""

  def goes_on(state):
    # `rljax.plan` reads the number where it cannot know the other.
    return (state[0] < end) & (state[0] < most)

  step = lambda state: (state[0] + 1, body(*state))
  return jax.lax.while_loop(goes_on, step, (start, carry))[1]


def _product(equation, left, right):
  return jnp.einsum(equation, left, right, preferred_element_type=jnp.float32)


def _seen(form, i, j, mask, segments):
  """Which keys of block j the queries of block i see, `[B, 1, 1, bq, bk]`."""
  allowed = form.sees(i, j)[None] & mask[j][:, None]
  if segments is not None:
    of_queries, of_keys = segments
    allowed &= of_queries[i][:, :, None] == of_keys[j][:, None]
  return allowed[:, None, None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(form, queries, keys, values, mask, segments):
  """Attention of blocks.

  Args:
    form: what is known.
    queries: `[n, B, K, G, bq, d]`.
    keys: `[m, B, K, bk, d]`.
    values: `[m, B, K, bk, d]`.
    mask: `[m, B, bk]`.
    segments: `[n, B, bq]` and `[m, B, bk]`, or None.

  Returns:
    `[n, B, K, G, bq, d]`.
  """
  return _forward(form, queries, keys, values, mask, segments)[0]


def _forward(form, queries, keys, values, mask, segments):
  num_blocks, *shape, width = queries.shape

  def of_queries(_, inputs):
    i, query = inputs

    def of_keys(j, carry):
      largest, total, mixed = carry
      scores = form.scores(query, keys[j])
      scores = jnp.where(_seen(form, i, j, mask, segments), scores, _MASKED)
      new = jnp.maximum(largest, jnp.max(scores, axis=-1))
      weights = jnp.exp(scores - new[..., None])
      fade = jnp.exp(largest - new)
      more = _product(
        "bkgqt,bktd->bkgqd", weights.astype(values.dtype), values[j]
      )
      total = total * fade + jnp.sum(weights, axis=-1)
      return new, total, mixed * fade[..., None] + more

    start, end = form.keys_of(i, keys.shape[0])
    carry = (
      # Above every masked score, whose weight is then 0 in each row.
      jnp.full(shape, _MASKED / 2),
      jnp.zeros(shape, jnp.float32),
      jnp.zeros((*shape, width), jnp.float32),
    )
    largest, total, mixed = _loop(start, end, keys.shape[0], of_keys, carry)
    is_empty = total == 0
    total = jnp.where(is_empty, 1.0, total)
    mixed = (mixed / total[..., None]).astype(values.dtype)
    return None, (mixed, jnp.where(is_empty, 0.0, largest) + jnp.log(total))

  _, (mixed, normaliser) = jax.lax.scan(
    of_queries, None, (jnp.arange(num_blocks), queries)
  )
  return mixed, (queries, keys, values, mask, segments, mixed, normaliser)


def _backward(form, residuals, cotangent):
  queries, keys, values, mask, segments, mixed, normaliser = residuals
  through_total = jnp.sum(
    cotangent.astype(jnp.float32) * mixed.astype(jnp.float32), axis=-1
  )

  def of_keys(query_gradients, inputs):
    j, key, value = inputs

    def of_queries(i, carry):
      query_gradients, key_gradient, value_gradient = carry
      query, change = queries[i], cotangent[i]
      scores = form.scores(query, key)
      weights = jnp.exp(
        jnp.where(_seen(form, i, j, mask, segments), scores, _MASKED)
        - normaliser[i][..., None]
      )
      value_gradient += _product(
        "bkgqt,bkgqd->bktd", weights.astype(change.dtype), change
      )
      through = _product("bkgqd,bktd->bkgqt", change, value)
      through = weights * (through - through_total[i][..., None])
      through = form.through_scores(through, scores).astype(query.dtype)
      key_gradient += _product("bkgqt,bkgqd->bktd", through, query)
      more = _product("bkgqt,bktd->bkgqd", through, key)
      query_gradients = jax.lax.dynamic_update_index_in_dim(
        query_gradients, query_gradients[i] + more, i, axis=0
      )
      return query_gradients, key_gradient, value_gradient

    start, end = form.queries_of(j, queries.shape[0])
    zeros = jnp.zeros(key.shape, jnp.float32)
    query_gradients, *others = _loop(
      start,
      end,
      queries.shape[0],
      of_queries,
      (query_gradients, zeros, zeros),
    )
    return query_gradients, tuple(others)

  query_gradients, (key_gradients, value_gradients) = jax.lax.scan(
    of_keys,
    jnp.zeros(queries.shape, jnp.float32),
    (jnp.arange(keys.shape[0]), keys, values),
  )
  return (
    query_gradients.astype(queries.dtype),
    key_gradients.astype(keys.dtype),
    value_gradients.astype(values.dtype),
    None,
    None,
  )


_attend.defvjp(_forward, _backward)
