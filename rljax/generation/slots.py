"""Decodes many rows in few slots: a row that ends makes room for the next.

All rows wait in one queue, in their order. Each step decodes one token in every
slot, and every slot is at a step of its own response. Once nobody waits, the
slots that are left are moved together, and smaller blocks of them go on.

A token is drawn with the key of its row and its place there, so the samples are
those of rows that wait for each other: ids, masks and ends to the bit, unless a
uniform number lies within rounding of a border, for a product over fewer rows
may be rounded differently. The log-probabilities agree to rounding: 1e-6 nats
for 4 layers of 128, 2e-5 for SmolLM2-135M. A row in a slot has a copy of its
prompt's keys and values, which the samples of a prompt else share.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from rljax.distributed import meshes

Array = jax.Array
State = dict[str, Any]

# A block of slots has this many times as many as the next one, which has this
# many at least: each is compiled by itself.
_SHRINK = 4
_SMALLEST = 4


class OnMesh(NamedTuple):
  """Says how a sampler's program lies on a mesh.

  Attributes:
    options: of `decode.sample`: slots of a device, and what keeps arrays split.
    mesh: over whose axis `data` rows are split by hand; None: the compiler
      splits them.
  """

  options: dict[str, Any]
  mesh: Any

  def split(
    self, function: Callable[..., Any], num_whole: int
  ) -> Callable[..., Any]:
    """Lets each device of `data` decode its own rows.

    Args:
      function: whose first arguments are whole, and the others are trees of
        arrays whose rows are split, like those that it returns.
      num_whole: how many are whole.

    Returns:
      The function of the same arguments.
    """
    if self.mesh is None:
      return function
    rows, whole = PartitionSpec("data"), PartitionSpec()

    def on_devices(*args):
      return jax.shard_map(
        function,
        mesh=self.mesh,
        in_specs=tuple(
          whole if i < num_whole else rows for i in range(len(args))
        ),
        out_specs=rows,
        axis_names={"data"},
        # Each device ends its loops when its own rows have ended.
        check_vma=False,
      )(*args)

    return on_devices


def on_mesh(num_slots: int, mesh: Any) -> OnMesh:
  """Returns how a sampler with so many slots lies on a mesh.

  Every device of `data` has a queue and slots of its own.

  Args:
    num_slots: of all devices; 0: all rows are decoded at the same time.
    mesh: from `meshes.make`.

  Raises:
    ValueError: if the mesh splits parameters over `fsdp`, whose devices would
      wait for each other, or `data` cannot share the slots evenly.
  """
  options = {
    "split_cache": meshes.cache_splitter(mesh),
    "split_logits": meshes.logits_splitter(mesh),
  }
  num_shards = mesh.shape["data"]
  if num_slots and mesh.shape["fsdp"] > 1:
    raise ValueError(
      "--slots lets each device decode on its own, and the "
      f"{mesh.shape['fsdp']} devices of fsdp share parameters in every step: "
      "set --slots=0, or split over data and tensor alone with --mesh."
    )
  if num_slots % num_shards:
    raise ValueError(
      f"--slots must be divisible by the {num_shards} devices of data, got "
      f"{num_slots}; change it or --mesh."
    )
  if not num_slots or num_shards == 1:
    return OnMesh({**options, "slots": num_slots}, None)
  return OnMesh({"slots": num_slots // num_shards}, mesh)


class Prompts(NamedTuple):
  """Holds what prompts leave in the cache, for rows that continue them.

  Attributes:
    cache: of `prefill` for B prompts, one response of one token to each.
    room: shapes of the same for responses of T tokens. Where they differ from
      those of `cache`, there are slots of tokens, which begin as 0.
    num_samples: rows per prompt; row b * num_samples + j continues prompt b.
  """

  cache: Any
  room: Any
  num_samples: int

  def rows(self, index: Array) -> Any:
    """Returns the cache of rows before their second token.

    Args:
      index: `[...]` int; past the last row, the last.

    Returns:
      A tree like the cache, with the dimensions of `index` in front, of numbers
      as well: rows are at steps of their own.
    """
    prompt = index // self.num_samples

    def row(leaf, room):
      if not room.ndim:
        return jnp.broadcast_to(leaf, index.shape)
      if leaf.shape != room.shape:
        return jnp.zeros((*index.shape, *room.shape[1:]), room.dtype)
      return leaf.at[prompt].get(mode="clip")

    return jax.tree.map(row, self.cache, self.room)


def decode_rows(
  decode: Callable[[Array, Any], tuple[Array, Any]],
  advance: Callable[[Array, State, Array, Any], tuple[State, State]],
  prompts: Prompts,
  rows: State,
  written: State,
  *,
  given: Any,
  num_slots: int,
) -> tuple[State, Array]:
  """Decodes N rows from their second token on, some at the same time.

  Args:
    decode: `(tokens [S], cache) -> (logits [S, V], cache)`.
    advance: `(steps [S], rows, logits, given) -> (rows, columns)` draws one
      token of each row.
    prompts: what the rows begin with.
    rows: where the N rows stand after their first token: `tokens` and
      `finished`, `[N]`, and others.
    written: `[N, T, ...]` arrays, with the first column.
    given: what is known of the N rows, with `lengths` `[N]` int, limits of
      length, and `take(index)`, which selects rows; N gives any.
    num_slots: S, rows at the same time; at most N.

  Returns:
    `written` with all columns, and `[N]` bool, which rows ended by themselves.
  """
  lengths = given.lengths
  chex.assert_rank(lengths, 1)
  num_rows = lengths.shape[0]
  is_waiting = ~rows["finished"] & (lengths > 1)
  queue = jnp.argsort(~is_waiting, stable=True)
  num_waiting = jnp.sum(is_waiting)

  def enter(index):
    """The state of slots with rows that begin."""
    found = jax.tree.map(lambda x: x.at[index].get(mode="clip"), rows)
    return {
      "index": index,
      "step": jnp.ones_like(index),
      "rows": {**found, "finished": index == num_rows},
      "cache": prompts.rows(index),
    }

  def has_room(carry):
    slots, _, _, num_begun = carry
    is_free = slots["index"] == num_rows
    return jnp.any(is_free) & (num_begun < num_waiting)

  def refill(carry):
    """Puts the first row of the queue into the first free slot."""
    slots, written, finished, num_begun = carry
    slot = jnp.argmax(slots["index"] == num_rows)
    slots = jax.tree.map(
      lambda x, new: jax.lax.dynamic_update_index_in_dim(x, new, slot, 0),
      slots,
      enter(queue[num_begun]),
    )
    return slots, written, finished, num_begun + 1

  def decode_slots(carry):
    slots, written, finished, num_begun = carry
    index, step = slots["index"], slots["step"]
    logits, cache = decode(slots["rows"]["tokens"], slots["cache"])
    after, columns = advance(step, slots["rows"], logits, given.take(index))
    written = {
      name: written[name].at[index, step].set(column, mode="drop")
      for name, column in columns.items()
    }
    finished = finished.at[index].set(after["finished"], mode="drop")
    limits = lengths.at[index].get(mode="clip")
    is_over = after["finished"] | (step + 1 >= limits)
    slots = {
      "index": jnp.where(is_over, num_rows, index),
      "step": step + 1,
      "rows": {**after, "finished": is_over},
      "cache": cache,
    }
    return slots, written, finished, num_begun

  def next_step(carry):
    return decode_slots(jax.lax.while_loop(has_room, refill, carry))

  first = jnp.arange(num_slots)
  slots = enter(jnp.where(first < num_waiting, queue[:num_slots], num_rows))
  num_begun = jnp.minimum(num_slots, num_waiting)
  carry = slots, written, rows["finished"], num_begun
  sizes = _blocks(num_slots)
  for size, smaller in zip(sizes, (*sizes[1:], 0), strict=True):
    carry = jax.lax.while_loop(
      lambda carry, smaller=smaller: (
        (carry[3] < num_waiting)
        | (jnp.sum(carry[0]["index"] < num_rows) > smaller)
      ),
      next_step if size == num_slots else decode_slots,
      carry,
    )
    if smaller:
      is_free = carry[0]["index"] == num_rows
      busy = jnp.argsort(is_free, stable=True)[:smaller]
      carry = jax.tree.map(lambda x, busy=busy: x[busy], carry[0]), *carry[1:]
  _, written, finished, _ = carry
  return written, finished


def _blocks(num_slots: int) -> tuple[int, ...]:
  """Returns the sizes of the blocks, the largest first."""
  sizes = [num_slots]
  while sizes[-1] // _SHRINK >= _SMALLEST:
    sizes.append(sizes[-1] // _SHRINK)
  return tuple(sizes)
