"""Samples from a language model: one compiled prefill and decode loop.

The model is anything that follows the protocol of `rljax.models`: a linen
module with `prefill`, `decode` and `logits` methods. A stand-in with known
logits works as well: nothing here depends on a model family.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from rljax.generation import slots as slots_lib
from rljax.models import lora, products
from rljax.ops import log_probs, sampling

Array = chex.Array
State = dict[str, Any]


@chex.dataclass(frozen=True)
class Samples:
  """Holds the result of the decode loop; `N = B * num_samples` rows.

  Attributes:
    response_ids: `[N, T]` int32, `pad_id` after the end.
    response_mask: `[N, T]` bool, True up to and including the end token.
    log_probs: `[N, T]` float32, of the drawn tokens under the policy that is
      trained: with its temperature and its allowed tokens, before any top-k,
      top-p or min-p. 0 where masked.
    truncated_log_probs: `[N, T]` float32, under the distribution that the
      tokens were drawn from. Equals `log_probs` when nothing is truncated.
    finished: `[N]` bool, True where a stop id or a stop string ended the
      response, False where it ran out of length.
    allowed: `[N, T, V]` bool under a constraint, the tokens that each was drawn
      from, all after the end; else None.
  """

  response_ids: Array
  response_mask: Array
  log_probs: Array
  truncated_log_probs: Array
  finished: Array
  allowed: Array | None = None


class Given(NamedTuple):
  """Holds what is known of rows before they are drawn.

  Attributes:
    keys: `[N]` typed keys.
    lengths: `[N]` int, limits of their lengths.
    constraint: of N rows, or None.
  """

  keys: Array
  lengths: Array
  constraint: Any

  def take(self, index: Array) -> "Given":
    """Returns some rows; an index past the last gives the last."""
    constraint = self.constraint
    return Given(
      self.keys.at[index].get(mode="clip"),
      self.lengths.at[index].get(mode="clip"),
      constraint and constraint.take(index),
    )


def row_keys(key: Array, prompt_indices: Array, num_samples: int) -> Array:
  """Derives one key for each sample of each prompt.

  The key depends on the prompt's index in the step's batch and on the index
  of the sample, and on nothing else: not on the number of devices, on the
  row's place in a micro-batch or on its neighbours.

  Args:
    key: the typed key of the step.
    prompt_indices: `[B]` int, index of each prompt in the step's batch.
    num_samples: samples per prompt.

  Returns:
    `[B * num_samples]` typed keys; row `b * num_samples + j` is sample j of
    prompt b.
  """
  prompts = jnp.repeat(prompt_indices, num_samples)
  samples = jnp.tile(jnp.arange(num_samples), prompt_indices.shape[0])
  fold = lambda i, j: jax.random.fold_in(jax.random.fold_in(key, i), j)
  return jax.vmap(fold)(prompts, samples)


def sample(
  key: Array,
  model: Any,
  params: Any,
  prompt_ids: Array,
  prompt_mask: Array,
  *,
  max_length: int,
  settings: sampling.Settings,
  num_samples: int = 1,
  prompt_indices: Array | None = None,
  allowed: Array | None = None,
  stop_ids: tuple[int, ...] = (),
  stop_strings: Array | None = None,
  min_new_tokens: int = 0,
  lengths: Array | None = None,
  forced: Array | None = None,
  constraint: Any = None,
  split_cache: Callable[[Any], Any] | None = None,
  split_logits: Callable[[Array], Array] | None = None,
  pad_id: int = 0,
  slots: int = 0,
  cache_parts: int | None = None,
) -> Samples:
  """Draws `num_samples` responses to each prompt.

  Prompts are run through the model once, and their keys and values are shared
  by all samples of a prompt. The loop ends as soon as every row has ended.
  Call it under `jax.jit` with `model`, `settings` and the numbers bound.

  Token t of sample j of prompt i is drawn with one uniform number whose key is
  `fold_in(fold_in(fold_in(key, i), j), t)`. So samples do not depend on batch
  layout, micro-batch size or device count.

  Args:
    key: typed key of the step.
    model: module with `prefill`, `decode` and `logits`, see `rljax.models`.
    params: its parameters.
    prompt_ids: `[B, P]` int32, left-padded.
    prompt_mask: `[B, P]` bool.
    max_length: T, the number of tokens after which a response is cut.
    settings: temperature and truncation.
    num_samples: samples per prompt.
    prompt_indices: `[B]` int, index of each prompt in the step's batch;
      0..B-1 by default.
    allowed: `[V]` bool, tokens that may be drawn; all by default. The trainer's
      log-probabilities must use the same mask.
    stop_ids: token ids that end a response and belong to it.
    stop_strings: `[S, V]` table of `stops.table`, or None. The token that
      completes a stop string belongs to the response.
    min_new_tokens: tokens that a response has before a stop id may be drawn.
      Like top-k, this changes `truncated_log_probs` and not `log_probs`.
    lengths: `[N]` int, a length limit per row, at most T; T by default.
    forced: `[V + 1]` int, or None: the token that must follow each token, or
      -1 where it is drawn; the last entry is for the first token. A forced
      token belongs to the response, is an input rather than a choice, and has
      log-probability 0.
    constraint: which tokens may follow, for each prompt, such as
      `grammars.Constraint`, or None: it has `repeat(num_samples)`, `start`,
      `allowed(place)` and `advance(place, tokens)`. The log-probabilities are
      those of the constrained policy.
    split_cache: keeps the keys and values sharded over a mesh, see
      `meshes.cache_splitter`; None leaves that to the compiler.
    split_logits: likewise for the logits `[N, V]`, see
      `meshes.logits_splitter`.
    pad_id: what stands after the end.
    slots: rows that are decoded at the same time, see `slots.decode_rows`; 0
      for all, until the longest has ended.
    cache_parts: K; see `cache_rooms`. None: one for each 512 tokens of T, four
      at most. Numbers of other K differ by rounding.

  Returns:
    `Samples` with `N = B * num_samples` rows.

  Raises:
    ValueError: if `max_length`, `num_samples` or `cache_parts` is not positive.
  """
  _check_request(prompt_ids, prompt_mask, max_length, num_samples)
  num_prompts = prompt_ids.shape[0]
  num_rows = num_prompts * num_samples
  if prompt_indices is None:
    prompt_indices = jnp.arange(num_prompts)
  chex.assert_shape(prompt_indices, (num_prompts,))
  if lengths is None:
    lengths = jnp.full((num_rows,), max_length, jnp.int32)
  lengths = jnp.asarray(lengths)
  chex.assert_shape(lengths, (num_rows,))
  if stop_strings is not None:
    stop_strings = jnp.asarray(stop_strings)  # A numpy table may be given.
  if forced is not None:
    forced = jnp.asarray(forced)
    chex.assert_rank(forced, 1)
  if constraint is not None:
    constraint = constraint.repeat(num_samples)
  split_cache = split_cache or (lambda cache: cache)
  split_logits = split_logits or (lambda logits: logits)
  given = Given(row_keys(key, prompt_indices, num_samples), lengths, constraint)
  advance = functools.partial(
    _advance,
    settings=settings,
    allowed=allowed,
    forced=forced,
    stop_ids=stop_ids,
    stop_strings=stop_strings,
    min_new_tokens=min_new_tokens,
    pad_id=pad_id,
  )
  apply = functools.partial(model.apply, {"params": _narrowed(model, params)})
  prefill = lambda num_samples, room: apply(
    prompt_ids, prompt_mask, num_samples, room, method="prefill"
  )

  def decode(tokens, cache):
    hidden, cache = apply(tokens, cache, method="decode")
    cache = split_cache(cache)
    return split_logits(apply(hidden, method="logits")), cache  # [N, V]

  # The first token comes from the prompts' last column, once per prompt.
  rooms = cache_rooms(max_length, cache_parts)
  hidden, cache = prefill(*((1, 1) if slots else (num_samples, rooms[0])))
  cache = split_cache(cache)
  logits = apply(hidden[:, -1], method="logits")  # [B, V]
  logits = split_logits(jnp.repeat(logits, num_samples, axis=0))
  rows, columns = advance(0, _start(num_rows, constraint), logits, given)
  written = _blank(columns, max_length, pad_id)
  written = _write(written, columns, 0)
  finished = rows["finished"]
  if max_length > 1:
    # The shapes of a cache with more room.
    like = lambda *room: jax.eval_shape(lambda: prefill(*room))[1]
    grow = lambda cache, room: split_cache(
      jax.tree.map(_padded, cache, like(num_samples, room))
    )
    decode_all = functools.partial(_decode_together, rooms=rooms, grow=grow)
    if slots:
      cache = slots_lib.Prompts(cache, like(1, max_length), num_samples)
      decode_all = functools.partial(
        slots_lib.decode_rows, num_slots=min(slots, num_rows)
      )
    written, finished = decode_all(
      decode, advance, cache, rows, written, given=given
    )
  return Samples(finished=finished, **written)


def cache_rooms(
  max_length: int, num_parts: int | None = None
) -> tuple[int, ...]:
  """Returns how many places the cache of responses has, as it grows.

  A step reads all places, written or not: of K parts it reads (K + 1) / 2K of
  what it reads of one, on the mean over the longest responses. The loop over
  tokens is compiled K times.

  Args:
    max_length: T.
    num_parts: K at most; None: as `sample`.

  Returns:
    Numbers that grow up to T, the others multiples of 8.

  Raises:
    ValueError: if `num_parts` is not positive.
  """
  if num_parts is None:
    num_parts = min(max(max_length // 512, 1), 4)
  if num_parts < 1:
    raise ValueError(f"cache_parts must be positive, got {num_parts}.")
  part = -(-max_length // num_parts)
  part += -part % 8
  return (*range(part, max_length, part), max_length)


def _decode_together(
  decode: Callable[[Array, Any], tuple[Array, Any]],
  advance: Callable[..., tuple[State, State]],
  cache: Any,
  rows: State,
  written: State,
  *,
  given: Given,
  rooms: tuple[int, ...],
  grow: Callable[[Any, int], Any],
) -> tuple[State, Array]:
  """Decodes all rows, one column after another, until the last has ended.

  Args:
    decode: reads a token of each row: logits, and the cache with it.
    advance: draws the next.
    cache: with the first room.
    rows: where they stand, with one token drawn.
    written: the columns of `Samples`.
    given: what is known of the rows.
    rooms: see `cache_rooms`.
    grow: gives the cache a later room.
  """

  def decode_within(first, room, rows, written, cache, count=0):
    """Decodes the columns from `first + count` to `room`."""
    left = given.lengths - first

    def goes_on(carry):
      count, rows, *_ = carry
      alive = ~rows["finished"] & (count < left)
      # A plan reads the number of rounds here: no other constant is as large.
      return (count < room - first) & jnp.any(alive)

    def decode_column(carry):
      count, rows, written, cache = carry
      step = first + count
      logits, cache = decode(rows["tokens"], cache)
      rows, columns = advance(step, rows, logits, given)
      return count + 1, rows, _write(written, columns, step), cache

    carry = (count, rows, written, cache)
    return jax.lax.while_loop(goes_on, decode_column, carry)[1:]

  rows, written, cache = decode_within(0, rooms[0], rows, written, cache, 1)
  for first, room in itertools.pairwise(rooms):
    cache = grow(cache, room)
    rows, written, cache = decode_within(first, room, rows, written, cache)
  return written, rows["finished"]


def _padded(array: Array, like: jax.ShapeDtypeStruct) -> Array:
  """Adds zeros behind an array, up to the shape of another."""
  if array.shape == like.shape:
    return array
  sizes = zip(array.shape, like.shape, strict=True)
  return jnp.pad(array, [(0, there - here) for here, there in sizes])


def _narrowed(model: Any, params: Any) -> Any:
  """Converts parameters to the compute dtype once, rather than every step.

  So are adapters added to what they are beside: see `lora.for_sampling`.
  """
  params = lora.for_sampling(model, params)
  config = getattr(model, "config", None)
  if not hasattr(config, "dtype"):
    return params
  wide = getattr(model, "wide_parameters", ())
  return products.narrowed(params, config.dtype, wide)


def _check_request(
  prompt_ids: Array, prompt_mask: Array, max_length: int, num_samples: int
) -> None:
  chex.assert_rank([prompt_ids, prompt_mask], 2)
  chex.assert_equal_shape([prompt_ids, prompt_mask])
  chex.assert_type([prompt_ids, prompt_mask], [int, bool])
  if max_length < 1 or num_samples < 1:
    raise ValueError(
      "max_length and num_samples must be positive, got "
      f"{max_length} and {num_samples}."
    )


def _start(num_rows: int, constraint: Any) -> State:
  """Returns where rows stand before their first token."""
  rows = {
    # Index -1 is the entry of `forced` that comes before the first token.
    "tokens": jnp.full(num_rows, -1, jnp.int32),
    "finished": jnp.zeros(num_rows, bool),
    "automaton": jnp.zeros(num_rows, jnp.int32),
  }
  return rows if constraint is None else {**rows, "place": constraint.start}


def _blank(columns: State, max_length: int, pad_id: int) -> State:
  """Returns `[N, T, ...]` arrays for columns like these, as after the end."""
  after = {"response_ids": pad_id, "allowed": True}
  return {
    name: jnp.full(
      (len(column), max_length, *column.shape[1:]),
      after.get(name, 0),
      column.dtype,
    )
    for name, column in columns.items()
  }


def _write(written: State, columns: State, step: int | Array) -> State:
  """Writes column `step` of all rows."""
  return {
    name: jax.lax.dynamic_update_slice_in_dim(
      written[name], column[:, None], step, axis=1
    )
    for name, column in columns.items()
  }


def _advance(
  step: int | Array,
  rows: State,
  logits: Array,
  given: Given,
  *,
  settings: sampling.Settings,
  allowed: Array | None,
  forced: Array | None,
  stop_ids: tuple[int, ...],
  stop_strings: Array | None,
  min_new_tokens: int,
  pad_id: int,
) -> tuple[State, State]:
  """Draws one token per row.

  Args:
    step: t, the column; or `[N]`, that of each row.
    rows: where the rows stand, see `_start`.
    logits: `[N, V]` float, of the model.
    given: what is known of the rows.
    settings: as in `sample`, like those that follow.
    allowed: `[V]` bool, or None.
    forced: `[V + 1]` int, or None.
    stop_ids: ids that end a response.
    stop_strings: `[S, V]` table, or None.
    min_new_tokens: tokens before a stop id may be drawn.
    pad_id: what stands after the end.

  Returns:
    Where the rows stand after the step, and the columns of `Samples`.
  """
  constraint = given.constraint
  if constraint is not None:
    follows = constraint.allowed(rows["place"])  # [N, V]
    allowed = follows if allowed is None else follows & allowed[None]
  tokens, log_prob, truncated_log_prob = _draw(
    given.keys,
    step,
    logits,
    allowed,
    settings,
    not_yet=stop_ids if min_new_tokens else (),
    until=min_new_tokens,
  )
  if forced is not None:
    following = forced[rows["tokens"]]
    is_free = following < 0
    tokens = jnp.where(is_free, tokens, following)
    log_prob = jnp.where(is_free, log_prob, 0.0)
    truncated_log_prob = jnp.where(is_free, truncated_log_prob, 0.0)

  alive = ~rows["finished"] & (step < given.lengths)
  tokens = jnp.where(alive, tokens, pad_id).astype(jnp.int32)
  stop = jnp.zeros_like(alive)
  for stop_id in stop_ids:
    stop |= tokens == stop_id
  automaton = rows["automaton"]
  if stop_strings is not None:
    automaton = jnp.where(alive, stop_strings[automaton, tokens], automaton)
    stop |= automaton == stop_strings.shape[0] - 1
  columns = {
    "response_ids": tokens,
    "response_mask": alive,
    "log_probs": jnp.where(alive, log_prob, 0.0),
    "truncated_log_probs": jnp.where(alive, truncated_log_prob, 0.0),
  }
  finished = rows["finished"] | (alive & stop)
  rows = {"tokens": tokens, "finished": finished, "automaton": automaton} | {
    # Where a row stands in the grammar, if there is one.
    name: constraint.advance(place, tokens)
    for name, place in rows.items()
    if name == "place"
  }
  if constraint is not None:
    columns["allowed"] = allowed | ~alive[:, None]
  return rows, columns


def _draw(
  keys: Array,
  step: int | Array,
  logits: Array,
  allowed: Array | None,
  settings: sampling.Settings,
  not_yet: tuple[int, ...] = (),
  until: int = 0,
) -> tuple[Array, Array, Array]:
  """Draws one token per row; returns it with two log-probabilities, `[N]`.

  The key of a token is the row's, folded with `step`. The log-probabilities are
  those before and after truncation, to which it belongs that the tokens
  `not_yet` are drawn from the step `until` on alone.
  """
  logits = log_probs.masked_logits(
    logits, temperature=settings.temperature, allowed=allowed
  )
  candidates = logits
  if not_yet:
    is_stop = jnp.isin(jnp.arange(logits.shape[-1]), jnp.array(not_yet))
    may_end = jnp.broadcast_to(step, keys.shape)[:, None] >= until
    candidates = log_probs.masked_logits(
      logits, allowed=~is_stop[None] | may_end
    )
  truncated = candidates  # With what is not finite in it.
  if settings.truncates:
    truncated = sampling.truncate(candidates, settings)
  if settings.greedy:
    tokens = sampling.greedy(truncated)
    truncated_log_prob = _log_prob(truncated, tokens)
  else:
    step_keys = jax.vmap(jax.random.fold_in)(
      keys, jnp.broadcast_to(step, keys.shape)
    )
    uniforms = jax.vmap(jax.random.uniform)(step_keys)
    tokens, truncated_log_prob = sampling.draw(truncated, uniforms)
  log_prob = truncated_log_prob
  if settings.truncates or not_yet:
    log_prob = _log_prob(logits, tokens)
  return tokens, log_prob, truncated_log_prob


def _log_prob(logits: Array, tokens: Array) -> Array:
  """Returns the log-probabilities of `tokens` `[N]` under `[N, V]` logits."""
  chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
  return chosen - jax.nn.logsumexp(logits, axis=-1)
