"""Flags of models and of how they compute, and their readers."""

import dataclasses
from typing import Any

from absl import flags

from rljax.cli import adapters
from rljax.models import fresh, hf, lora
from rljax.models import remat as remat_lib
from rljax.training import origins, precision

# Flags that are defined below belong to the script that calls the group.
flags.disclaim_key_flags()


def define_models(
  *,
  policy: str | None = None,
  required: bool = True,
  remat: bool = True,
  logits: bool = True,
) -> None:
  """Defines the policy, its LoRA adapters, and how models compute.

  Args:
    policy: what --policy is to the script, as a sentence; None: it starts as
      this model.
    required: whether it must be named; else it may be empty.
    remat: whether the script has a backward pass, for which it loads the
      policy by `load_policy`.
    logits: see `define_compute`.
  """
  flags.DEFINE_string(
    "policy",
    None if required else "",
    (policy or "Language model that the policy starts as.")
    + " The workdir of a run, a Hugging Face directory, a packaged model, a "
    "GGUF file or a hub name"
    + ("." if required else "; empty for random weights."),
    required=required,
  )
  adapters.define_lora(learns=remat)
  define_compute(remat=remat, logits=logits)


def define_compute(*, remat: bool = True, logits: bool = True) -> None:
  """Defines how models compute.

  Args:
    remat: whether the script has a backward pass.
    logits: whether that goes through logits of all tokens.
  """
  flags.DEFINE_enum(
    "dtype",
    "float32",
    ["float32", "bfloat16"],
    "Number format of the models' computation.",
  )
  flags.DEFINE_enum(
    "param_dtype",
    "float32",
    ["float32", "bfloat16"],
    "Number format in which the policy is kept, and what stands in for it. "
    "bfloat16 takes half the memory; what is trained is then rounded "
    "stochastically after each update.",
  )
  flags.DEFINE_enum(
    "matmul_precision",
    "auto",
    precision.CHOICES,
    "How products of float32 numbers are computed: highest in float32, high in "
    "three bfloat16 passes on a TPU and TF32 on a GPU, default in one bfloat16 "
    "pass on a TPU and TF32 on a GPU; auto is highest on them for "
    "--dtype=float32, and else what JAX does.",
  )
  flags.DEFINE_bool(
    "scan_layers",
    False,
    "Whether layers of language models that repeat lie in stacks, of which one "
    "loop runs a layer after the other: a deep model then compiles in the time "
    "of a few layers. The numbers are the same to rounding.",
  )
  if remat:
    flags.DEFINE_flag(
      RematFlag(
        "remat",
        "none",
        "What the backward pass keeps of each layer, and so need not compute "
        "again: none leaves that to the compiler, which keeps all; nothing "
        "keeps the layer's input alone; dots the products with parameters, "
        "too; offload these in the memory of the host of a GPU or TPU. "
        "--remat alone is nothing.",
      )
    )
  if remat and logits:
    flags.DEFINE_integer(
      "chunk_size",
      0,
      "Response positions whose logits exist at the same time; 0 takes as many "
      "as fit into 256 MB of a device.",
      lower_bound=0,
    )


class RematFlag(flags.EnumFlag):
  """A policy by name; as the bool that it was, it takes --remat and =true."""

  def __init__(self, name: str, default: str, text: str):
    super().__init__(name, default, text, list(remat_lib.POLICIES))
    self.boolean = True  # For --remat and --noremat.

  def _parse(self, argument):
    known = {"true": "nothing", "false": "none"}
    return super()._parse(known.get(str(argument).lower(), argument))

  def _serialize(self, value):
    return "" if value is None else f"--{self.name}={value}"


def model_options(values: flags.FlagValues) -> dict[str, Any]:
  """Returns keyword arguments of `hf.load`; weights are read where they lie."""
  return {**_compute_options(values), "lazy": True}


def _compute_options(values):
  return {
    "dtype": values.dtype,
    "param_dtype": values.param_dtype,
    "remat": values.remat if "remat" in values else "none",
    "scan_layers": values.scan_layers,
  }


def load_policy(
  values: flags.FlagValues, name: str = "policy"
) -> hf.LanguageModel:
  """Loads the model that learns, with the adapters of --lora_rank, if any.

  Args:
    values: parsed flags.
    name: of the flag that names it.

  Raises:
    ValueError: as `hf.load`, or if adapters do not fit the model.
  """
  loaded = hf.load(values[name].value, **model_options(values))
  return adapters.adapt(values, loaded)


def load_reference(
  values: flags.FlagValues, loaded: hf.LanguageModel
) -> hf.LanguageModel:
  """Loads --reference; the policy itself if there is none.

  Of a policy with adapters that is the base alone, in the same arrays.

  Raises:
    ValueError: if it is another architecture, or has other tokens.
  """
  other = load_like(values, "reference", loaded, learns=False)
  return dataclasses.replace(other, params=lora.without_adapters(other.params))


def load_like(
  values: flags.FlagValues,
  name: str,
  loaded: hf.LanguageModel,
  *,
  learns: bool = True,
) -> hf.LanguageModel:
  """Loads the model that a flag names; the policy itself if it names none.

  Its module is the policy's.

  Args:
    values: parsed flags.
    name: of the flag.
    loaded: the policy.
    learns: whether it gets the adapters of --lora_rank, as the policy does.

  Raises:
    ValueError: if it is another architecture, or has other tokens.
  """
  path = values[name].value
  if not path:
    return loaded
  other = hf.load(path, **model_options(values))
  origins.check_same_kind(f"--{name}={path}", other, loaded)
  # As the policy in all but weights; a config may name fewer end tokens.
  module = getattr(loaded.model, "unadapted", loaded.model)
  other = dataclasses.replace(other, model=module)
  return adapters.adapt(values, other, learns=learns)


def define_random_model(
  *, hidden_size: int, num_layers: int, max_positions: int
) -> None:
  """Defines the shape of a model with random weights."""
  flags.DEFINE_enum(
    "family",
    "gpt2",
    fresh.FAMILIES,
    "Architecture of a model that starts from random weights.",
  )
  for name, default, text in (
    ("hidden_size", hidden_size, "Width"),
    ("num_layers", num_layers, "Layers"),
    ("num_heads", 4, "Attention heads"),
    ("max_positions", max_positions, "Longest text, in tokens,"),
  ):
    flags.DEFINE_integer(
      name,
      default,
      f"{text} of a model that starts from random weights.",
      lower_bound=1,
    )


def random_model_options(values: flags.FlagValues) -> dict[str, Any]:
  """Returns keyword arguments of `models.fresh.make`.

  Raises:
    ValueError: with --lora_rank, for there is no base.
  """
  adapters.refuse_random(values)
  return {
    "family": values.family,
    "hidden_size": values.hidden_size,
    "num_layers": values.num_layers,
    "num_heads": values.num_heads,
    "max_positions": values.max_positions,
    **_compute_options(values),
  }
