"""Causal attention over padded rows, whole or one token at a time.

A cache holds a prompt once, however many samples continue it, and a buffer
of response slots per sample:

  {"prompt_mask": [B, P] bool, "prompt_lengths": [B] int32, "step": () int32,
   "layers": one dict per layer of
     {"prompt_keys", "prompt_values": [B, K, P, d],
      "keys", "values": [N, K, T, d]}}

Layers of a stack (see `stacked`) are one entry, whose arrays have an axis more
for them behind the rows: [N, L, K, T, d].

A layer whose queries see a window of W tokens keeps the last W - 1 of the P
columns and min(T, W) slots, which it fills in turns.

with B prompts, N = B * num_samples rows (row b * num_samples + j continues
prompt b), H query heads that share K key heads in groups of G = H / K, and
head width d. `step` counts the response tokens already written; it is `[N]`
where B = N and each row counts its own, as in `generation.slots`.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp

from rljax.distributed import compiled, planning
from rljax.models import blockwise, fused, products

Array = jax.Array
Cache = dict[str, Any]

# Rows of fewer tokens are attended to in one piece. On CPUs blocks are faster
# from here on (`benchmarks/lengths.py`); on other machines nothing was timed.
SHORTEST = {"cpu": 256, "gpu": 512, "tpu": 256}
FORMS = ("plain", "blocks", "cudnn", "splash")
# Queries and keys of a block: on a CPU as many as its caches hold.
_BLOCK = {"cpu": 128}


@dataclasses.dataclass(frozen=True)
class Scores:
  """Computes float32 scores from queries and keys: c tanh(s q · k / c).

  Attributes:
    scale: s; None: 1 / √d.
    softcap: c, which no score exceeds; None: the scores are s q · k.
  """

  scale: float | None = None
  softcap: float | None = None

  def __call__(self, equation: str, queries: Array, keys: Array) -> Array:
    scores = products.einsum(equation, queries, keys)
    if self.scale is None:
      scores = scores / math.sqrt(queries.shape[-1])
    else:
      scores = scores * self.scale
    if self.softcap is None:
      return scores
    return self.softcap * jnp.tanh(scores / self.softcap)


def positions(mask: Array, segments: Array | None = None) -> Array:
  """Returns the place of each token among the real tokens of its text.

    p_t = max(Σ_{u ≤ t} mask_u - 1, 0)

  Args:
    mask: `[B, S]` bool, True at real tokens; padding may stand on either side.
    segments: `[B, S]` int, which text of its row a token belongs to, and 0 at
      padding; the tokens of a text stand together. None: a row is one text.

  Returns:
    `[B, S]` int32, counted from the first token of the text. Padding takes the
    place of the token before it, or 0; among segments always 0.
  """
  chex.assert_rank(mask, 2)
  chex.assert_type(mask, bool)
  places = jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)
  if segments is None:
    return places
  chex.assert_equal_shape([mask, segments])
  before = jnp.pad(segments, ((0, 0), (1, 0)))[:, :-1]
  starts = jnp.where(segments != before, places, 0)
  starts = jax.lax.cummax(starts, axis=1)
  return jnp.where(segments > 0, places - starts, 0)


def seen(
  mask: Array,
  *,
  causal: bool = True,
  window: int | None = None,
  segments: Array | None = None,
) -> Array:
  """Returns which keys each query may attend to, as `attend` is told.

  Args:
    mask: `[B, S]` bool, True at real tokens.
    causal: whether a query sees the tokens up to its own alone.
    window: how many tokens a query sees, its own among them, or how many on
      either side if not `causal`; None: all. They are counted in columns, so
      padding must not stand between real tokens.
    segments: `[B, S]` int, which text of its row a token belongs to: a query
      sees its own alone. None: a row is one text.

  Returns:
    `[B, S, S]` bool, queries before keys. A query in left padding attends to
    nothing, if `causal`.
  """
  chex.assert_rank(mask, 2)
  chex.assert_type(mask, bool)
  length = mask.shape[1]
  near = jnp.ones((length, length), bool)
  if causal:
    near = jnp.tril(near)
    if window is not None and window < length:
      near &= jnp.triu(jnp.ones((length, length), bool), k=1 - window)
  elif window is not None:
    place = jnp.arange(length)
    near = jnp.abs(place[:, None] - place[None]) <= window
  allowed = near[None] & mask[:, None]
  if segments is not None:
    chex.assert_equal_shape([mask, segments])
    allowed &= segments[:, :, None] == segments[:, None]
  return allowed


def attend(
  queries: Array,
  keys: Array,
  values: Array,
  mask: Array,
  scores: Scores = Scores(),
  *,
  causal: bool = True,
  window: int | None = None,
  segments: Array | None = None,
  form: str | None = None,
) -> Array:
  """Computes softmax attention with grouped key and value heads.

    o_s = Σ_t softmax_t(q_s · k_t / √d) v_t

  The softmax is in float32. Short rows are attended to in one piece, whose
  scores take memory in the square of the length. Long ones take memory in the
  length: by blocks, or by the fused kernel of a GPU or TPU where it knows the
  case (see `choose`). All give the same numbers to rounding, at real tokens.
  What they give at padding is finite, to be ignored, and without gradient
  where nothing reads it: the mean of all values in one form, 0 in another.

  Args:
    queries: `[B, Q, H, d]` float, of the last Q ≤ S tokens of each row.
    keys: `[B, S, K, d]` float; query head h reads key head h // (H / K).
    values: `[B, S, K, d]` float.
    mask: `[B, S]` bool, True at real tokens.
    scores: how products of queries and keys become scores.
    causal: whether a query sees the tokens up to its own alone.
    window: how many tokens a query sees, its own among them, or how many on
      either side if not `causal`; None: all. They are counted in columns.
    segments: `[B, S]` int, which text of its row a token belongs to, 0 at
      padding: a query sees its own alone. None: a row is one text.
    form: one of `FORMS`; None: `choose` does.

  Returns:
    `[B, Q, H, d]` in the dtype of `values`.

  Raises:
    ValueError: if `form` is another, or a kernel does not know the case.
  """
  chex.assert_rank([queries, keys, values, mask], [4, 4, 4, 2])
  chex.assert_equal_shape([keys, values])
  chex.assert_equal_shape_prefix([keys, mask], 2)
  chex.assert_type(mask, bool)
  if segments is not None:
    chex.assert_equal_shape([mask, segments])
  see = {"causal": causal, "window": window, "segments": segments}
  if form is None:
    form = choose(queries, keys, scores, **see)
  if form == "plain":
    allowed = seen(mask, **see)[:, mask.shape[1] - queries.shape[1] :]
    return _plain(queries, keys, values, allowed, scores)

  see |= {"softcap": scores.softcap}
  see["scale"] = scores.scale
  if scores.scale is None:
    see["scale"] = 1 / math.sqrt(queries.shape[-1])
  if form == "blocks":
    size = _BLOCK.get(planning.machine(), 512)
    return blockwise.attend(
      queries, keys, values, mask, block_q=size, block_k=size, **see
    )
  kernels = {"cudnn": fused.cudnn, "splash": fused.splash}
  if form not in kernels:
    raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form}.")
  return fused.on_mesh(
    kernels[form], compiled.mesh(), queries, keys, values, mask, **see
  )


def choose(
  queries: Array,
  keys: Array,
  scores: Scores = Scores(),
  *,
  causal: bool = True,
  window: int | None = None,
  segments: Array | None = None,
) -> str:
  """Returns the form in which `attend` computes, by machine and shape.

  The machine is the one that programs are compiled for, in a plan its target.

  Args:
    queries: of `attend`, like the other arguments.
    keys: shape `[B, S, K, d]`.
    scores: how products become scores.
    causal: whether a query sees the tokens up to its own alone.
    window: tokens that a query sees.
    segments: of packed rows.

  Returns:
    "plain" for short rows; else "cudnn" or "splash" where there is such a
    kernel for the case, and "blocks" where there is none.
  """
  platform = planning.machine()
  if keys.shape[1] < SHORTEST.get(platform, 512):
    return "plain"
  if not fused.can_split(compiled.mesh(), queries, keys):
    return "blocks"
  if platform == "gpu" and fused.cudnn_knows(
    queries, keys, scores.softcap, window, segments, causal
  ):
    return "cudnn"
  if platform == "tpu" and fused.splash_knows(queries, keys):
    return "splash"
  return "blocks"


def _plain(
  queries: Array, keys: Array, values: Array, mask: Array, scores: Scores
) -> Array:
  """Attention in one piece; `mask` is `[B, Q, S]`."""
  batch, length, num_heads, width = queries.shape
  num_kv_heads = keys.shape[2]

  grouped = queries.reshape(
    batch, length, num_kv_heads, num_heads // num_kv_heads, width
  )
  found = scores("bskgd,btkd->bkgst", grouped, keys)
  found = _masked(found, mask[:, None, None])
  if products.is_exact(values.dtype):
    weights = jax.nn.softmax(found, axis=-1)
    mixed = _mix("bkgst,btkd->bskgd", weights, values)
  else:
    # As `attend_cached` does it: the product rounds exp(s - max), not the
    # weights, so that sampler and trainer round the same numbers.
    top = jax.lax.stop_gradient(jnp.max(found, axis=-1, keepdims=True))
    weights = jnp.exp(found - top)
    total = jnp.moveaxis(jnp.sum(weights, axis=-1, keepdims=True), 3, 1)
    mixed = _mix("bkgst,btkd->bskgd", weights, values) / total
  return mixed.astype(values.dtype).reshape(queries.shape)


def start_cache(
  mask: Array,
  keys_values: list[tuple[Array, Array]],
  *,
  num_samples: int,
  response_length: int,
  windows: Sequence[int | None] | None = None,
) -> Cache:
  """Makes a cache that holds the prompts and room for the responses.

  Args:
    mask: `[B, P]` bool, True at the prompts' tokens.
    keys_values: per layer, the prompts' keys and values, `[B, P, K, d]` each;
      of a stack of L layers `[L, B, P, K, d]`.
    num_samples: responses per prompt; ≥ 1.
    response_length: slots per response; ≥ 1.
    windows: per layer, how many tokens a query sees; None: all. The prompts
      of a layer with a window must be padded on the left.

  Returns:
    The cache that the module's docstring describes, at step 0.

  Raises:
    ValueError: if `num_samples` or `response_length` is not positive.
  """
  chex.assert_rank(mask, 2)
  chex.assert_type(mask, bool)
  if num_samples < 1:
    raise ValueError(f"num_samples must be positive, got {num_samples}.")
  if response_length < 1:
    raise ValueError(
      f"response_length must be positive, got {response_length}."
    )

  layers = []
  windows = windows or [None] * len(keys_values)
  for (keys, values), window in zip(keys_values, windows, strict=True):
    slots = response_length
    if window is not None:
      slots = min(slots, window)
      # The first response token sees W - 1 tokens of the prompt.
      kept = min(keys.shape[-3], max(window - 1, 1))
      keys, values = keys[..., -kept:, :, :], values[..., -kept:, :, :]
    if keys.ndim > 4:
      keys, values = keys.swapaxes(0, 1), values.swapaxes(0, 1)
    *batch, _, num_kv_heads, width = keys.shape
    room = (batch[0] * num_samples, *batch[1:], num_kv_heads, slots, width)
    layers.append(
      {
        "prompt_keys": keys.swapaxes(-3, -2),
        "prompt_values": values.swapaxes(-3, -2),
        "keys": jnp.zeros(room, keys.dtype),
        "values": jnp.zeros(room, values.dtype),
      }
    )
  return {
    "prompt_mask": mask,
    "prompt_lengths": jnp.sum(mask, axis=1, dtype=jnp.int32),
    "step": jnp.zeros((), jnp.int32),
    "layers": tuple(layers),
  }


def decode_positions(cache: Cache, num_rows: int) -> Array:
  """Returns the place of the token that each row decodes now, `[N]` int32."""
  lengths = cache["prompt_lengths"]
  return jnp.repeat(lengths, num_rows // lengths.shape[0]) + cache["step"]


def attend_cached(
  query: Array,
  key: Array,
  value: Array,
  layer: dict[str, Array],
  prompt_mask: Array,
  step: Array,
  window: int | None = None,
  scores: Scores = Scores(),
  index: Array | None = None,
) -> tuple[Array, dict[str, Array]]:
  """Writes one token per row into the cache and attends from it.

  The scores against the prompt and against the response are one softmax. The
  samples of a prompt read the same copy of its keys in one product. A `step`
  past the last slot overwrites that slot: the caller must stop before. Where
  each row has a step of its own, it has a prompt of its own, too.

  Args:
    query: `[N, H, d]` float.
    key: `[N, K, d]` float.
    value: `[N, K, d]` float.
    layer: one layer of the cache.
    prompt_mask: `[B, P]` bool; B divides N.
    step: `()` int32, the slot to write; or `[N]`, if B = N.
    window: of `start_cache` for this layer.
    scores: how products of queries and keys become scores.
    index: `()` int32, which layer of a stack it is; None: `layer` is no stack.

  Returns:
    `[N, H, d]` in the dtype of `value`, and the layer with the slot written.
  """
  chex.assert_rank([query, key, value, prompt_mask], [3, 3, 3, 2])
  chex.assert_rank(step, {0, 1})
  chex.assert_equal_shape([key, value])
  if step.ndim:
    chex.assert_equal_shape_prefix([query, prompt_mask, step], 1)
    with_rows = lambda *rows: attend_cached(
      *jax.tree.map(lambda x: x[None], rows[:-1]),
      rows[-1],
      window,
      scores,
      index,
    )
    mixed, layer = jax.vmap(with_rows)(
      query, key, value, layer, prompt_mask, step
    )
    return jax.tree.map(lambda x: x[:, 0], (mixed, layer))
  rows, num_heads, width = query.shape
  num_kv_heads = key.shape[1]
  groups = num_heads // num_kv_heads
  batch = prompt_mask.shape[0]

  one = _layer_of_stack(index)
  slot, prompt_keys = step, one(layer["prompt_keys"])
  if window is not None:
    # Fewer slots than W: the response ends before they are used up.
    slot = step % window if layer["keys"].shape[-2] == window else step
    kept = prompt_keys.shape[2]
    age = jnp.arange(kept, 0, -1) + step  # Of the prompt's last tokens.
    prompt_mask = prompt_mask[:, -kept:] & (age < window)[None]
  layer = {
    **layer,
    "keys": _written(layer["keys"], key, slot, index),
    "values": _written(layer["values"], value, slot, index),
  }
  keys, values = one(layer["keys"]), one(layer["values"])

  # One softmax over both segments, without joining them: each is a product
  # of its own shape, and they share the maximum and the normaliser.
  by_row = query.reshape(rows, num_kv_heads, groups, width)
  by_prompt = _by_prompt(by_row, batch)
  prompt_scores = _masked(
    scores("bkngd,bkpd->bkngp", by_prompt, prompt_keys),
    prompt_mask[:, None, None, None],
  )
  written = jnp.arange(keys.shape[2]) <= step
  response_scores = _masked(
    scores("nkgd,nktd->nkgt", by_row, keys), written[None, None, None]
  )
  largest = jnp.maximum(
    _by_row(jnp.max(prompt_scores, axis=-1, keepdims=True)),
    jnp.max(response_scores, axis=-1, keepdims=True),
  )  # [N, K, G, 1]
  of_prompt = jnp.exp(prompt_scores - _by_prompt(largest, batch))
  of_response = jnp.exp(response_scores - largest)
  total = _by_row(jnp.sum(of_prompt, axis=-1, keepdims=True))
  total += jnp.sum(of_response, axis=-1, keepdims=True)

  prompt_values = one(layer["prompt_values"])
  mixed = _by_row(_mix("bkngp,bkpd->bkngd", of_prompt, prompt_values))
  mixed += _mix("nkgt,nktd->nkgd", of_response, values)
  mixed = (mixed / total).astype(value.dtype).reshape(query.shape)
  return mixed, layer


def _layer_of_stack(index: Array | None) -> Callable[[Array], Array]:
  """Returns what takes a layer out of its stack, if it lies in one."""
  if index is None:
    return lambda x: x
  return lambda x: jax.lax.dynamic_index_in_dim(x, index, 1, keepdims=False)


def _written(
  buffer: Array, token: Array, slot: Array, index: Array | None
) -> Array:
  """Writes `[N, K, d]` into a slot of `[N, K, T, d]`, or of a stack of them."""
  if index is None:
    return jax.lax.dynamic_update_slice_in_dim(
      buffer, token[:, :, None], slot, axis=2
    )
  zero = jnp.zeros((), slot.dtype)
  return jax.lax.dynamic_update_slice(
    buffer,
    token[:, None, :, None],
    (zero, index.astype(slot.dtype), zero, slot, zero),
  )


def _by_prompt(x: Array, batch: int) -> Array:
  """Reshapes `[N, K, G, ...]` to `[B, K, n, G, ...]`."""
  return x.reshape(batch, -1, *x.shape[1:]).swapaxes(1, 2)


def _by_row(x: Array) -> Array:
  """Reshapes `[B, K, n, G, ...]` to `[N, K, G, ...]`."""
  x = x.swapaxes(1, 2)
  return x.reshape(-1, *x.shape[2:])


def _mix(equation: str, weights: Array, values: Array) -> Array:
  """Weighted sums of values, float32."""
  return products.einsum(equation, weights.astype(values.dtype), values)


def _masked(scores: Array, mask: Array) -> Array:
  """Replaces scores where the mask is False by what no softmax picks."""
  # The finite minimum, not -inf: exp(-inf - -inf) would be NaN in a row of
  # padding, in the value and in the gradient.
  return jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
