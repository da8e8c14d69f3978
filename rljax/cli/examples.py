"""Flags of supervised rows: what of them is learnt, and how they are read."""

from typing import Any

from absl import flags

from rljax.cli import data, entry, learning
from rljax.distributed import meshes
from rljax.models import hf
from rljax.text import comparisons, encoding, feeds, packing, paired
from rljax.training import microbatch, runs

# Flags that are defined below belong to the script that calls the group.
flags.disclaim_key_flags()

# Prompts of a stream of comparisons that are held out, where no flag says so.
_MOST_HELD_OUT = 256


def define_examples() -> None:
  """Defines what is learnt of texts, after the log and the limits of rows."""
  flags.DEFINE_bool(
    "assistant_only_loss",
    True,
    "Whether what the assistant says is learnt alone, in all of its turns of a "
    "dialogue; false learns whole texts, with what the user and the system "
    "say, but for the first token.",
  )
  define_stream()


def define_stream(*without: str) -> None:
  """Defines how a file is read that is larger than memory.

  Args:
    *without: flags that need all comparisons of a log, and must be left out.
  """
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
  for name in without:
    entry.require(
      ["stream", name],
      lambda v, name=name: not (v["stream"] and v[name]),
      f"--{name} needs all comparisons of the log before the first update: "
      f"leave out one of the two, --stream and --{name}.",
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
    settings=example_options(values),
    **_stream_options(values, most=values.num_eval_prompts),
  )


def _stream_options(values, *, most):
  """Keyword arguments of `feeds.Stream`."""
  return {
    "eval_data": values.eval_data,
    "share": values.eval_share,
    "most": most,
    "seed": values.seed,
    "batch_size": values.batch_size,
    "buffer": values.stream_buffer,
    "first_row": values.first_row,
    "num_rows": values.num_rows,
  }


def open_comparisons(
  values: flags.FlagValues,
  loaded: hf.LanguageModel,
  mesh: Any,
  *,
  by_reward: bool,
  all_replies: bool = False,
  threshold: float | None = None,
  labelled: bool = False,
  needs_reference: bool = False,
) -> paired.Table | paired.Stream:
  """Opens the replies that are compared: --data, or the log of --task.

  Args:
    values: parsed flags.
    loaded: the policy as it starts, which is the reference.
    mesh: from `meshes.make`.
    by_reward: whether rewards rank replies, rather than the order of a row.
    all_replies: whether all replies of a row are compared, not the best with
      the worst; they then have their own rewards, whatever a cache holds.
    threshold: least reward of a good reply, where every reply is taken by
      itself; None: they are compared.
    labelled: whether labels of true and false are such rewards.
    needs_reference: whether batches of a log in memory have `ref_log_probs`;
      those of a stream never do.

  Raises:
    ValueError: as `read_log`, `load_known` and `paired.stream`.
  """
  if values.stream:
    if labelled:
      threshold = paired.of_first_labels(threshold, values.data)
    options = _stream_options(values, most=_MOST_HELD_OUT)
    if data.has_scorer(values):  # New replies select parameters.
      options |= {"share": None, "eval_data": ""}
    return paired.stream(
      *(loaded.tokenizer, values.data),
      by_reward=by_reward,
      threshold=threshold,
      settings=data.length_options(values),
      **options,
    )
  log = data.read_log(values, loaded.tokenizer, join=True)
  if labelled:
    threshold = paired.of_labels(threshold, log.rows)
  needs_rewards = by_reward or threshold is not None
  known = data.load_known(
    *(values, log, loaded, ["rewards"] if needs_rewards else [], mesh),
    reader="--order=reward" if by_reward else "--kto_threshold",
    own_rewards=all_replies,
  )
  rows, rewards = log.rows, known.get("rewards")
  if threshold is None:
    found = comparisons.ranked(rows, rewards, all_replies=all_replies)
  else:
    found = comparisons.singles(rows, rewards, threshold)
  found = paired.Table(
    *(log, found, known),
    batch_size=values.batch_size,
    seed=values.seed,
    threshold=threshold,
  )
  if needs_reference:
    found.add(data.load_known(values, log, loaded, ["ref_log_probs"], mesh))
  return found


def open_rankings(values: flags.FlagValues, tokenizer: Any) -> paired.Stream:
  """Opens --data as a stream of rows whose replies are ranked.

  Raises:
    ValueError: as `paired.ranked_stream`.
  """
  return paired.ranked_stream(
    tokenizer,
    values.data,
    order=values.order,
    settings=data.length_options(values),
    **_stream_options(values, most=values.num_eval_rows),
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
  if not length:
    return packing.Packer()
  if not isinstance(feed, feeds.Stream):
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
