"""Flags of batches and of the optimizer, and their readers."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from absl import flags

from rljax.cli import entry, running
from rljax.distributed import meshes
from rljax.text import batches, encoding, packing
from rljax.training import microbatch, optimizers, runs

# Flags that are defined below belong to the script that calls the group.
flags.disclaim_key_flags()

_OF_ADAM = {"adam_b1": 0.9, "adam_b2": 0.999, "adam_epsilon": 1e-8}


def define_batches(
  batch_size: int,
  *,
  epochs: int | None = None,
  text: str = "Rows of every update.",
  minibatches: bool = False,
  micro_batches: bool = True,
) -> None:
  """Defines the sizes of a step."""
  flags.DEFINE_integer("batch_size", batch_size, text, lower_bound=1)
  if minibatches:
    flags.DEFINE_integer(
      "minibatch_size",
      0,
      "Responses of an update; 0 takes all of a step at once.",
      lower_bound=0,
    )
  if micro_batches:
    flags.DEFINE_integer(
      "micro_batch_size",
      0,
      "Rows of a forward and backward pass, whose gradients are accumulated; 0 "
      "takes an update's rows at once.",
      lower_bound=0,
    )
  if epochs is not None:
    flags.DEFINE_integer(
      "epochs", epochs, "Passes over the data of a step or fit.", lower_bound=1
    )


def batch_sizes(
  values: flags.FlagValues, mesh: Any, *, num_samples: int | None = None
) -> microbatch.Sizes:
  """Returns the rows of a step, of an update and of a pass.

  Args:
    values: parsed flags.
    mesh: from `meshes.make`.
    num_samples: rows for each of --batch_size prompts; None: those are rows.

  Raises:
    ValueError: if one does not divide the other, the devices cannot share
      them, or there are fewer prompts.
  """
  if num_samples is not None and values.batch_size > values.num_prompts:
    raise ValueError(
      f"--batch_size must lie between 1 and the {values.num_prompts} prompts "
      f"of --num_prompts, got {values.batch_size}."
    )
  rows = values.batch_size * (num_samples or 1)
  minibatch = ("minibatch_size" in values and values.minibatch_size) or rows
  micro_batch = (
    "micro_batch_size" in values and values.micro_batch_size
  ) or minibatch
  if rows % minibatch:
    raise ValueError(
      f"--minibatch_size={minibatch} does not divide the {rows} rows of a "
      "step (batch_size x num_samples)."
    )
  if minibatch % micro_batch:
    raise ValueError(
      f"--micro_batch_size={micro_batch} does not divide the {minibatch} rows "
      "of an update."
    )
  meshes.check_divisible(values.batch_size, mesh, "--batch_size")
  if "sample_batch_size" in values:
    name = "--sample_batch_size"
    meshes.check_divisible(values.sample_batch_size, mesh, name)
  if "draw_batch_size" in values and values.draw_batch_size:
    name, size = "--draw_batch_size", values.draw_batch_size
    if values.batch_size % size:
      raise ValueError(
        f"{name}={size} does not divide the {values.batch_size} prompts of a "
        "step (--batch_size)."
      )
    meshes.check_divisible(size, mesh, name)
  meshes.check_divisible(micro_batch, mesh, "--micro_batch_size")
  buckets = values.length_buckets if "length_buckets" in values else 1
  if buckets > 1 and "packed_length" in values and values.packed_length:
    raise ValueError(
      f"--length_buckets={buckets} reads less padding of rows that hold one "
      "response each, and --packed_length joins them: give one of the two."
    )
  return microbatch.Sizes(rows, minibatch, micro_batch, buckets)


def define_packing() -> None:
  """Defines whether texts are joined to longer rows."""
  flags.DEFINE_integer(
    "packed_length",
    0,
    "Tokens of the rows to which the prompts of an update and their replies "
    "are joined, so that less of it is padding, the longest of them or more; "
    "what is learnt stays the same up to rounding. 0 joins none.",
    lower_bound=0,
  )


def packer(
  values: flags.FlagValues,
  run: runs.Run,
  sizes: microbatch.Sizes,
  encoded: encoding.Encoded,
  draw: Callable[[int], tuple[np.ndarray, np.ndarray]],
) -> packing.Packer:
  """Plans the packed rows of --packed_length, for the steps of a run.

  Args:
    values: parsed flags.
    run: whose steps are known.
    sizes: of `batch_sizes`.
    encoded: rows of prompts and replies.
    draw: maps a step to the numbers of its rows and of their candidates, in
      shapes that go together, `[B, ...]`.

  Raises:
    ValueError: if a text is longer than a row.
  """
  asked, said = encoding.counts(encoded)

  def counts(step):
    rows, candidates = draw(step)
    none = said.shape[1] - 1  # Of any number behind the last.
    return asked[rows], said[rows, np.minimum(candidates, none)]

  return plan_packing(values, run, sizes, counts, encoding.lengths(encoded))


def pack_pairs(
  values: flags.FlagValues,
  run: runs.Run,
  sizes: microbatch.Sizes,
  pairs: Sequence[tuple[Sequence[int], ...]],
  draw: Callable[[int], np.ndarray],
) -> packing.Packer:
  """The same, for pairs of prompt and response ids.

  Args:
    values: see `packer`; likewise `run` and `sizes`.
    run: whose steps are known.
    sizes: of `batch_sizes`.
    pairs: (prompt ids, response ids, ...).
    draw: maps a step to the numbers of its pairs, `[B]`.

  Raises:
    ValueError: if a text is longer than a row.
  """
  asked, said = (np.array([len(pair[i]) for pair in pairs]) for i in (0, 1))
  lengths = batches.supervised_shape(pairs).values()
  counts = lambda step: (asked[draw(step)], said[draw(step)])
  return plan_packing(values, run, sizes, counts, list(lengths))


def plan_packing(
  values: flags.FlagValues,
  run: runs.Run,
  sizes: microbatch.Sizes,
  counts: Callable[[int], tuple[np.ndarray, np.ndarray]],
  lengths: Sequence[int],
) -> packing.Packer:
  """The same, by the tokens of each step's prompts and replies.

  Args:
    values: see `packer`; likewise `run` and `sizes`.
    run: whose steps are known.
    sizes: of `batch_sizes`.
    counts: maps a step to both, `[B, ...]` each.
    lengths: columns of prompts and replies without packing, for the notes.
  """
  packer = packing.plan(
    values.packed_length,
    map(counts, range(run.total_steps)),
    num_parts=sizes.num_parts,
    multiple=meshes.num_batch_shards(run.mesh),
    padded=sum(lengths),
  )
  for note in packer.notes:
    run.note(note)
  return packer


def define_optimizer(
  learning_rate: float,
  *,
  schedule: str = "constant",
  warmup: float = 0.0,
  weight_decay: float = 0.0,
  max_grad_norm: float = 0.0,
) -> None:
  """Defines the optimizer, and what is done if what it is given is wrong."""
  _define_moments()
  flags.DEFINE_float(
    "learning_rate",
    learning_rate,
    "Highest learning rate of the optimizer.",
    lower_bound=0.0,
  )
  flags.DEFINE_enum(
    "schedule",
    schedule,
    list(optimizers.SCHEDULES),
    "How the learning rate goes on after the warm-up: constant, or linear or "
    "cosine down to --final_learning_rate.",
  )
  flags.DEFINE_float(
    "final_learning_rate",
    0.0,
    "Learning rate to which --schedule=linear or cosine falls by the end.",
    lower_bound=0.0,
  )
  flags.DEFINE_float(
    "warmup",
    warmup,
    "Updates over which the learning rate rises from 0; below 1, a share of "
    "all updates.",
    lower_bound=0.0,
  )
  flags.DEFINE_float(
    "weight_decay",
    weight_decay,
    "Decoupled weight decay, times the learning rate.",
    lower_bound=0.0,
  )
  flags.DEFINE_float(
    "max_grad_norm",
    max_grad_norm,
    "Norm to which a larger gradient is cut; 0 cuts none.",
    lower_bound=0.0,
  )
  define_max_skipped()
  running.define_preflight()


def _define_moments() -> None:
  """Defines which optimizer it is, and what it keeps of gradients."""
  flags.DEFINE_enum(
    "optimizer",
    "adamw",
    list(optimizers.OPTIMIZERS),
    "What makes steps of gradients: adamw keeps two moments of every "
    "parameter, muon one of every matrix of the layers, adafactor next to "
    "none.",
  )
  flags.DEFINE_enum(
    "moment_dtype",
    "float32",
    ["float32", "bfloat16"],
    "Number format in which the optimizer keeps moments of matrices; bfloat16 "
    "takes half the memory, and is rounded stochastically.",
  )
  flags.DEFINE_float(
    "adam_b1",
    _OF_ADAM["adam_b1"],
    "Decay β1 of Adam's first moment, in [0, 1]; not for adafactor.",
    lower_bound=0.0,
    upper_bound=1.0,
  )
  flags.DEFINE_float(
    "adam_b2",
    _OF_ADAM["adam_b2"],
    "Decay β2 of Adam's second moment, in [0, 1]; not for adafactor.",
    lower_bound=0.0,
    upper_bound=1.0,
  )
  flags.DEFINE_float(
    "adam_epsilon",
    _OF_ADAM["adam_epsilon"],
    "Number ε that is added to Adam's denominator; not for adafactor.",
    lower_bound=0.0,
  )

  entry.require(
    ["optimizer", *_OF_ADAM],
    lambda v: (
      v["optimizer"] != "adafactor"
      or all(v[name] == default for name, default in _OF_ADAM.items())
    ),
    "--optimizer=adafactor has no --adam_b1, --adam_b2 and --adam_epsilon; "
    "leave them out.",
  )


def define_max_skipped() -> None:
  """Defines when a run ends whose updates are not finite."""
  flags.DEFINE_integer(
    "max_skipped",
    20,
    "Updates in a row that are skipped, because a loss, a gradient or a new "
    "parameter is not finite, before the run stops; 0 stops at the first.",
    lower_bound=0,
  )
  entry.may_change("max_skipped")


def optimizer_options(values: flags.FlagValues) -> dict[str, Any]:
  """Returns keyword arguments of `optimizers.make`."""
  return schedule_options(values) | {
    "name": values.optimizer,
    "moment_dtype": values.moment_dtype,
    "b1": values.adam_b1,
    "b2": values.adam_b2,
    "epsilon": values.adam_epsilon,
    "weight_decay": values.weight_decay,
    "max_grad_norm": values.max_grad_norm,
  }


def schedule_options(values: flags.FlagValues) -> dict[str, Any]:
  """Returns keyword arguments of `optimizers.schedule`."""
  return {
    "learning_rate": values.learning_rate,
    "kind": values.schedule,
    "warmup": values.warmup,
    "final_learning_rate": values.final_learning_rate,
  }
