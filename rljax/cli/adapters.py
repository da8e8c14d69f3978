"""Flags of LoRA adapters, and their readers."""

import dataclasses

from absl import flags

from rljax.cli import entry
from rljax.models import hf, lora, peft

# Flags that are defined below belong to the script that calls the group.
flags.disclaim_key_flags()

_OF_ADAPTERS = ("lora_alpha", "lora_targets", "lora_rslora")


def define_lora(*, learns: bool = True) -> None:
  """Defines adapters beside frozen weights.

  Args:
    learns: whether the script trains a model; else it may only hold its
      weights as one does that trains adapters.
  """
  flags.DEFINE_enum(
    "base_dtype",
    "float32",
    lora.BASE_DTYPES,
    "Number format of frozen weights, which LoRA adapters are beside: float32, "
    "bfloat16 (half the memory) or int8 (the dense layers of the blocks in a "
    "quarter, the rest in bfloat16).",
  )
  if not learns:
    return
  flags.DEFINE_integer(
    "lora_rank",
    0,
    "Rank r of LoRA adapters, which learn instead of the policy's own weights; "
    "0 trains all weights.",
    lower_bound=0,
  )
  flags.DEFINE_float(
    "lora_alpha",
    0.0,
    "Alpha of LoRA adapters, whose product is multiplied by alpha / r; 0 takes "
    "--lora_rank, a factor of 1.",
    lower_bound=0.0,
  )
  flags.DEFINE_list(
    "lora_targets",
    [lora.ALL],
    "Dense layers of the blocks that get LoRA adapters, separated by commas, "
    "by their names in transformers, such as q_proj,v_proj; all-linear: all.",
  )
  flags.DEFINE_bool(
    "lora_rslora",
    False,
    "Whether LoRA adapters are multiplied by alpha / √r (rsLoRA) instead of "
    "alpha / r.",
  )
  entry.require(
    ["lora_rank", "base_dtype", *_OF_ADAPTERS],
    lambda v: (
      v["lora_rank"]
      or v["base_dtype"] == "float32"
      and not v["lora_alpha"]
      and v["lora_targets"] == [lora.ALL]
      and not v["lora_rslora"]
    ),
    "--base_dtype, --lora_alpha, --lora_targets and --lora_rslora have a "
    "meaning with --lora_rank alone.",
  )


def adapt(
  values: flags.FlagValues,
  loaded: hf.LanguageModel,
  *,
  learns: bool = True,
) -> hf.LanguageModel:
  """Puts the adapters of the flags beside the weights of a loaded model.

  Args:
    values: parsed flags.
    loaded: from `hf.load`.
    learns: whether it gets adapters; else it is frozen, in --base_dtype.

  Returns:
    The model whose `params` are a `lora.Adapted`; the same model where the
    flags ask for neither.

  Raises:
    ValueError: if a target is no layer of the model.
  """
  rank = "lora_rank" in values and values.lora_rank
  base_dtype = "base_dtype" in values and values.base_dtype
  if not rank and base_dtype in (False, "float32"):
    return loaded
  settings = None
  if rank:
    settings = lora.Settings(
      rank=rank,
      alpha=values.lora_alpha or rank,
      targets=tuple(values.lora_targets),
      rslora=values.lora_rslora,
      base=peft.base_name(loaded.source),
      digest=lora.digest(loaded.params),
    )
  params = lora.adapt(
    loaded.model,
    loaded.params,
    settings if learns else None,
    base_dtype=base_dtype,
    seed=values.seed,
  )
  model = lora.Model(loaded.model, settings)
  return dataclasses.replace(loaded, model=model, params=params)


def refuse_random(values: flags.FlagValues) -> None:
  """Raises ValueError for adapters beside random weights."""
  if "lora_rank" in values and values.lora_rank:
    raise ValueError(
      f"--lora_rank={values.lora_rank} trains adapters beside the weights of a "
      "model, and random ones would be lost: name a model."
    )
