"""Flags of a run: presets, workdir, cadence, devices and preflight."""

from collections.abc import Mapping

from absl import flags

from rljax.cli import entry

# Flags that are defined below belong to the script that calls the group.
flags.disclaim_key_flags()


def define_presets(
  algorithm: str,
  presets: Mapping[str, str],
  *,
  paired: Mapping[str, str] | None = None,
) -> None:
  """Defines --algorithm, which sets other flags unless they are given.

  It does so while the command line is parsed, before any condition over flags
  that is defined after this: call it first.

  Args:
    algorithm: default of --algorithm.
    presets: algorithm -> flags of the script, "name=value name=value". A value
      such as max_length/5 is that share of another flag, rounded down.
    paired: flag of a preset -> another one that speaks for it: if that is
      given, the preset leaves both alone, for half of a pair would not fit the
      other half.
  """
  paired = paired or {}

  def apply(name):
    values = flags.FLAGS
    for flag, text in _preset(presets[name]):
      is_given = any(values[x].present for x in (flag, paired.get(flag, flag)))
      whole, _, divisor = text.partition("/")
      if is_given:
        continue
      if divisor:
        values[flag].value = values[whole].value // int(divisor)
      else:
        values[flag].value = values[flag].parser.parse(text)
    return True

  flags.DEFINE_enum(
    "algorithm",
    algorithm,
    list(presets),
    "Algorithm, which sets other flags unless they are given; "
    + "; ".join(f"{name}: {text}" for name, text in presets.items())
    + ".",
  )
  flags.register_validator("algorithm", apply)


def preset(values: flags.FlagValues, presets: Mapping[str, str]) -> str:
  """Returns --algorithm, and what is in force of the flags that it sets."""
  names = [name for name, _ in _preset(presets[values.algorithm])]
  return " ".join(f"--{n}={values[n].value}" for n in ("algorithm", *names))


def _preset(text):
  """Splits the flags of a preset into names and values."""
  return [word.split("=") for word in text.split()]


def define_run(
  *,
  steps: int | None = None,
  epochs: float | None = None,
  save_every: int | None = 500,
  eval_every: int | None = None,
  samples_every: int | None = None,
  keep_best: bool | None = None,
  num_page_samples: int | None = None,
  logs: bool = True,
) -> None:
  """Defines the flags of a run.

  Args:
    steps: default of --steps; 0: as many as --epochs make; None: no flag.
    epochs: default of --epochs, the passes over all data, for --steps=0; None:
      no flag here.
    save_every: default of --save_every; None: no flag.
    eval_every: default of --eval_every; None: no flag, nor --keep_best.
    samples_every: default of --samples_every, for scripts that draw samples in
      every step; None: no flag.
    keep_best: default of --keep_best; None: off, where there is --eval_every.
    num_page_samples: default of --num_page_samples; None: 8 where there is
      --samples_every, else no flag.
    logs: whether metrics are logged.
  """
  if eval_every is not None:
    keep_best = bool(keep_best)
  if samples_every is not None and num_page_samples is None:
    num_page_samples = 8
  flags.DEFINE_string(
    "workdir",
    None,
    "Folder of the run, or its URL in a bucket, such as gs://bucket/runs/x: "
    "flags, metrics, samples, checkpoints. A run that was stopped goes on when "
    "the same command is given again.",
    required=True,
  )
  flags.DEFINE_integer(
    "seed", 0, "Seed of every source of randomness.", lower_bound=0
  )
  if steps is not None:
    flags.DEFINE_integer(
      "steps",
      steps,
      "Steps of training, as the script's first lines define a step; a run "
      "goes on with more of them, unless its learning rate falls by their end."
      + (" 0: as many as --epochs make." if not steps else ""),
      lower_bound=0 if not steps else 1,
    )
    entry.may_grow("steps")
  if epochs is not None:
    flags.DEFINE_float(
      "epochs",
      epochs,
      "Passes over the training data, where --steps is 0; above 0.",
      lower_bound=1e-6,
    )
    entry.may_grow("epochs")
  if save_every is not None:
    flags.DEFINE_integer(
      "save_every", save_every, "Steps between checkpoints.", lower_bound=1
    )
    entry.may_change("save_every")
  if eval_every is not None:
    flags.DEFINE_integer(
      "eval_every",
      eval_every,
      "Steps between evaluations on held-out data.",
      lower_bound=1,
    )
    entry.may_change("eval_every")
  if keep_best is not None:
    flags.DEFINE_bool(
      "keep_best",
      keep_best,
      "Whether <workdir>/best keeps the parameters of the best evaluation.",
    )
  if samples_every is not None:
    flags.DEFINE_integer(
      "samples_every",
      samples_every,
      "Steps between samples that are written to samples.jsonl.",
      lower_bound=1,
    )
    flags.DEFINE_integer(
      "samples_logged",
      32,
      "Samples that are written to samples.jsonl at a time.",
      lower_bound=0,
    )
    entry.may_change("samples_every", "samples_logged")
  if num_page_samples is not None:
    flags.DEFINE_integer(
      "num_page_samples",
      num_page_samples,
      "Samples that the page tokens.html shows, token by token; 0 writes no "
      "page.",
      lower_bound=0,
    )
    entry.may_change("num_page_samples")
  _define_devices()
  if logs:
    _define_wandb()


def _define_wandb():
  """Defines where metrics are sent as well."""
  flags.DEFINE_string(
    "wandb_project",
    "",
    "Weights & Biases project to which metrics are sent as well; empty for "
    "none.",
  )
  flags.DEFINE_string(
    "run_name",
    "",
    "Name of the run in pictures, Weights & Biases and TensorBoard; empty: "
    "that of the folder --workdir.",
  )
  flags.DEFINE_list(
    "run_tags",
    [],
    "Tags of the run in Weights & Biases and TensorBoard, separated by commas.",
  )
  entry.may_change("wandb_project", "run_name", "run_tags")


def _define_devices():
  """Defines the mesh and the cache of compiled programs."""
  flags.DEFINE_string(
    "mesh",
    "data:-1",
    "Devices by axis, such as data:2,fsdp:4: data copies the parameters, fsdp "
    "splits them and the rows of a batch, tensor splits the parameters; one "
    "size may be -1, for all devices that are left.",
  )
  flags.DEFINE_integer(
    "cpu_devices",
    0,
    "Devices into which the CPU is divided, which share its cores and the rows "
    "of a batch: one a core is faster for a model of a few million parameters. "
    "0 leaves the CPU whole, or as XLA_FLAGS divides it. Of no effect on a GPU "
    "or a TPU.",
    lower_bound=0,
  )
  flags.DEFINE_string(
    "compilation_cache",
    "~/.cache/rljax",
    "Folder in which compiled programs are kept for later runs; empty for "
    "none.",
  )
  entry.may_change("workdir", "mesh", "cpu_devices", "compilation_cache")


def define_preflight() -> None:
  """Defines what the preflight does."""
  flags.DEFINE_enum(
    "preflight",
    "strict",
    ["strict", "warn", "off"],
    "What to do if the checks before the first update fail, or sampler and "
    "trainer come to disagree later on: strict stops, warn continues, off "
    "skips the checks.",
  )
  entry.may_change("preflight")
