"""Flags of supervised rows: what of them is learnt, and how they are read."""

from typing import Any

from absl import flags

from rljax.cli import data, entry, learning
from rljax.distributed import meshes
from rljax.text import encoding, feeds, packing
from rljax.training import microbatch, runs

# Flags that are defined below belong to the script that calls the group.
flags.disclaim_key_flags()


def define_examples() -> None:
  """Defines what is learnt of texts, after the log and the limits of rows."""
  flags.DEFINE_bool(
    "assistant_only_loss",
    True,
    "Whether what the assistant says is learnt alone, in all of its turns of a "
    "dialogue; false learns whole texts, with what the user and the system "
    "say, but for the first token.",
  )
  flags.DEFINE_bool(
    "stream",
    False,
    "Whether --data is read while it is learnt from, so that it may be larger "
    "than memory. Batches then have the columns of --max_prompt_length and "
    "--max_response_length, and rows are held out by the hash of their prompt.",
  )
  flags.DEFINE_integer(
    "stream_buffer",
    10_000,
    "Rows that --stream reads ahead and shuffles among themselves; 1 keeps the "
    "order of the file.",
    lower_bound=1,
  )
  entry.require(
    ["stream", "data"],
    lambda v: v["data"] or not v["stream"],
    "--stream reads a file while it is learnt from: give --data.",
  )


def example_options(values: flags.FlagValues) -> dict[str, Any]:
  """Returns keyword arguments of `encoding.prepare` for supervised rows."""
  only = values.assistant_only_loss
  return data.length_options(values) | {"assistant_only": only}


def open_stream(values: flags.FlagValues, tokenizer: Any) -> feeds.Stream:
  """Opens --data as a stream.

  Raises:
    ValueError: as `feeds.stream`.
  """
  return feeds.stream(
    tokenizer,
    values.data,
    eval_data=values.eval_data,
    share=values.eval_share,
    most=values.num_eval_prompts,
    seed=values.seed,
    batch_size=values.batch_size,
    buffer=values.stream_buffer,
    first_row=values.first_row,
    num_rows=values.num_rows,
    settings=example_options(values),
  )


def pack_feed(
  values: flags.FlagValues,
  run: runs.Run,
  sizes: microbatch.Sizes,
  feed: feeds.Table | feeds.Stream,
) -> packing.Packer:
  """Plans the packed rows of --packed_length, for rows in memory or a stream.

  Nobody knows what a stream will hold: there are rows for a tenth more tokens
  than the held-out examples have, and those of a step that do not fit into
  them wait for the next one.

  Raises:
    ValueError: if a text may be longer than a row.
  """
  length = values.packed_length
  if isinstance(feed, feeds.Table) or not length:
    return learning.plan_packing(values, run, sizes, feed.counts, feed.lengths)
  if sum(feed.lengths) > length:
    raise ValueError(
      f"--packed_length={length} must hold any row of a stream: it must be "
      f"{sum(feed.lengths)} or more, --max_prompt_length and "
      "--max_response_length together."
    )
  asked, said = encoding.counts(feed.held_out)
  packer = packing.room_for(
    length,
    1.1 * float((asked + said[:, 0]).mean()) * sizes.micro_batch,
    num_parts=sizes.num_parts,
    multiple=meshes.num_batch_shards(run.mesh),
  )

  def fits(part):
    asked, said = encoding.counts(part)
    return packer.holds(asked, said[:, 0])

  feed.fits = fits
  run.note(packer.notes[0])
  return packer
