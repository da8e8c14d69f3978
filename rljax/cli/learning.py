"""Flags of batches and of the optimizer, and their readers."""

from typing import Any

from absl import flags

from rljax.cli import entry, running
from rljax.distributed import meshes
from rljax.training import microbatch, optimizers

# Flags that are defined below belong to the script that calls the group.
flags.disclaim_key_flags()


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
  meshes.check_divisible(micro_batch, mesh, "--micro_batch_size")
  buckets = values.get_flag_value("length_buckets", 1)
  return microbatch.Sizes(rows, minibatch, micro_batch, buckets)


def define_optimizer(
  learning_rate: float,
  *,
  schedule: str = "constant",
  warmup: float = 0.0,
  weight_decay: float = 0.0,
  max_grad_norm: float = 0.0,
) -> None:
  """Defines AdamW, and what is done if what it is given is wrong."""
  flags.DEFINE_float(
    "learning_rate",
    learning_rate,
    "Highest learning rate of AdamW.",
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
    "adam_b1",
    0.9,
    "Decay β1 of Adam's first moment, in [0, 1].",
    lower_bound=0.0,
    upper_bound=1.0,
  )
  flags.DEFINE_float(
    "adam_b2",
    0.999,
    "Decay β2 of Adam's second moment, in [0, 1].",
    lower_bound=0.0,
    upper_bound=1.0,
  )
  flags.DEFINE_float(
    "adam_epsilon",
    1e-8,
    "Number ε that is added to Adam's denominator.",
    lower_bound=0.0,
  )
  flags.DEFINE_float(
    "weight_decay",
    weight_decay,
    "Decoupled weight decay of AdamW, times the learning rate.",
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
  """Returns keyword arguments of `optimizers.adamw`."""
  return schedule_options(values) | {
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
