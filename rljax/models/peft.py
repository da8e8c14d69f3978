"""Reads and writes adapters in the files of PEFT.

An adapter folder has adapter_config.json, which names its base model, and
adapter_model.safetensors. A workdir of a run with adapters has the first of
them in its folder `model/`, and the numbers in its checkpoints.
"""

import functools
import os
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from rljax.distributed import stored
from rljax.models import (
  configs,
  export,
  fields,
  lora,
  stacked,
  tokenizers,
  weights,
)
from rljax.storage import folders

Params = dict[str, Any]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
# In the metadata of our files: which base the adapters belong to.
_DIGEST = "rljax_base"
# Fields that change nothing once a model is trained, or that are read below.
_KNOWN = frozenset(
  (
    *("peft_type", "task_type", "base_model_name_or_path", "revision"),
    *("r", "lora_alpha", "target_modules", "use_rslora", "lora_dropout"),
    *("inference_mode", "init_lora_weights", "fan_in_fan_out", "auto_mapping"),
    *("peft_version", "bias", "ensure_weight_tying", "runtime_config"),
    *("ephemeral_gpu_offload", "qalora_group_size", "megatron_core", _DIGEST),
  )
)
_LARGEST = 10**6  # Of a rank and of alpha.
_MERGE = (
  " Merge it into its base once, where peft is installed "
  "(model.merge_and_unload().save_pretrained(...)), and name that folder."
)
# Ways to begin that leave the base as it was.
_PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")


def is_adapter(folder: pathlib.Path) -> bool:
  """Returns whether a folder says that its weights are adapters."""
  return (folder / CONFIG).is_file()


def base_name(name: str | os.PathLike) -> str:
  """Returns the name of a base as it is filed: a folder by its whole path."""
  path = pathlib.Path(name).expanduser()
  return str(path.resolve()) if path.exists() else str(name)


def read_settings(folder: pathlib.Path) -> lora.Settings:
  """Reads the adapter_config.json of a folder.

  Raises:
    ValueError: if it asks for anything but plain LoRA on dense layers, naming
      the field.
  """
  path = folders.inside(folder, CONFIG)
  config = configs.read_json(path)

  def refuse(name, wanted, hint=""):
    value = config.get(name)
    found = "missing" if value is None else fields.shown(value)
    raise ValueError(f'{path}: "{name}" is {found}, and {wanted}.{hint}')

  other = functools.partial(refuse, hint=_MERGE)

  if config.get("peft_type") != "LORA":
    other("peft_type", "only LORA is read")
  if config.get("task_type") not in (None, "CAUSAL_LM"):
    other("task_type", "only adapters of language models, CAUSAL_LM, are read")
  if config.get("bias", "none") != "none":
    other("bias", "only adapters without trained biases are read")
  start = config.get("init_lora_weights")
  if not any(start is x or start == x for x in _PLAIN_STARTS):
    other("init_lora_weights", "adapters that change their base are not read")
  for name, value in config.items():
    # 0, "", [] and {} ask for nothing.
    if name not in _KNOWN and value:
      other(name, "that is not implemented")
  for name, kind in (("r", int), ("lora_alpha", (int, float))):
    value = config.get(name)
    is_number = isinstance(value, kind) and not isinstance(value, bool)
    if not is_number or not 0 < value < _LARGEST:
      whole = "whole " if kind is int else ""
      refuse(name, f"a {whole}number above 0 and below {_LARGEST:,} is needed")
  if config.get("use_rslora") not in (None, True, False):
    refuse("use_rslora", "true or false is needed")
  base = config.get("base_model_name_or_path")
  if not isinstance(base, str) or not base:
    refuse("base_model_name_or_path", "it must name the base model")
  revision = config.get("revision")
  if revision and "@" not in base and not os.path.exists(base):
    base = f"{base}@{revision}"
  targets = config.get("target_modules")
  if isinstance(targets, str):
    if targets not in ("", lora.ALL):
      other("target_modules", "a list of names is needed, no pattern")
    targets = [targets] if targets else None
  is_list = isinstance(targets, list) and targets
  if not is_list or not all(isinstance(x, str) for x in targets):
    refuse("target_modules", "a list of names is needed")
  return lora.Settings(
    rank=config["r"],
    alpha=config["lora_alpha"],
    targets=tuple(sorted(targets)),
    rslora=bool(config.get("use_rslora")),
    base=base,
    digest=str(config.get(_DIGEST) or ""),
  )


def write_settings(
  folder: pathlib.Path,
  settings: lora.Settings,
  model: nn.Module,
  *,
  with_digest: bool,
) -> None:
  """Writes the adapter_config.json of a folder.

  Args:
    folder: where.
    settings: of the adapters.
    model: the language model that they are in.
    with_digest: whether the digest of the base goes into it; PEFT takes no
      field that it does not know.
  """
  targets = settings.targets
  if targets == (lora.ALL,):
    names = {name.rpartition(".")[2] for name in lora.layers(model)}
    targets = tuple(sorted(names))
  alpha = settings.alpha
  config = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": settings.base,
    "r": settings.rank,
    "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
    "lora_dropout": 0.0,
    "use_rslora": settings.rslora,
    "target_modules": list(targets),
    "fan_in_fan_out": model.config.to_hf()["model_type"] == "gpt2",
    "bias": "none",
    "inference_mode": True,
  }
  if with_digest:
    config[_DIGEST] = settings.digest
  configs.write_json(folder / CONFIG, config)


def _names(model, settings, where):
  """Tensor name -> (path of the factor, shape of the tensor)."""
  found = {}
  for name, (path, (width, features)) in lora.layers(
    model, settings.targets, where
  ).items():
    for factor, kind, shape in (
      ("lora_A", "lora_a", (settings.rank, width)),
      ("lora_B", "lora_b", (features, settings.rank)),
    ):
      found[f"{_PREFIX}{name}.{factor}.weight"] = ((*path, kind), shape)
  return found


def read(
  folder: pathlib.Path, model: nn.Module, settings: lora.Settings
) -> tuple[Params, str]:
  """Reads the adapters of a folder.

  Args:
    folder: with adapter_model.safetensors.
    model: the language model that they belong to.
    settings: of the folder.

  Returns:
    The factors, as `lora.Adapted` holds those of the unrolled model, float32;
    and the digest of their base, "" where the writer has not noted it.

  Raises:
    ValueError: if the file is missing or damaged, or its tensors are not those
      of these adapters in this model.
  """
  import safetensors

  path = folders.inside(folder, WEIGHTS)
  if not path.is_file():
    pickle = (folder / "adapter_model.bin").is_file()
    hint = ", only a pickle, which is not read" if pickle else ""
    raise ValueError(f"{folder} has no {WEIGHTS}{hint}.")
  config = f"{folder / CONFIG}, whose base is {settings.base},"
  names = _names(model, settings, config)
  try:
    with safetensors.safe_open(path, "np") as file:
      noted = (file.metadata() or {}).get(_DIGEST, "")
      found = list(file.keys())
      shapes = {x: tuple(file.get_slice(x).get_shape()) for x in found}
      _check(shapes, names, path, settings)
      tensors = {x: np.asarray(file.get_tensor(x)) for x in names}
  except (safetensors.SafetensorError, OSError) as error:
    raise ValueError(f"{path} is damaged: {error}.") from error
  return traverse_util.unflatten_dict(
    {
      names[name][0]: np.ascontiguousarray(_float32(tensor, name, path).T)
      for name, tensor in tensors.items()
    }
  ), noted


def _float32(tensor, name, path):
  """A tensor of a file, in float32.

  Raises:
    ValueError: if it has no floats, or one that is not finite in float32.
  """
  if not jnp.issubdtype(tensor.dtype, jnp.floating):
    raise ValueError(
      f"{path}: {name} is of dtype {tensor.dtype}; adapters are floats."
    )
  with np.errstate(over="ignore"):  # It is infinite then.
    found = tensor.astype(np.float32)
  bad = found.size - np.isfinite(found).sum()
  if bad:
    raise ValueError(
      f"{path}: {bad} of the {found.size} numbers of {name} are not finite: "
      "the training that wrote them diverged; use an earlier checkpoint."
    )
  return found


def _check(shapes, names, path, settings):
  """Raises ValueError unless a file has exactly the tensors of the adapters."""
  missing = [name for name in names if name not in shapes]
  extra = [name for name in shapes if name not in names]
  if missing:
    raise ValueError(
      f"{path} lacks {weights.listed(missing, 2)}, of the layers that "
      f"{CONFIG} names in {settings.base}."
    )
  if extra:
    raise ValueError(
      f"{path} has tensors that its adapters have no place for: "
      f"{weights.listed(extra, 2)}. It is of another base than "
      f"{settings.base}, or more was trained than adapters."
    )
  for name, (_, wanted) in names.items():
    if shapes[name] != wanted:
      raise ValueError(
        f"{path}: {name} has shape {shapes[name]}, expected {wanted}: it is of "
        f"another base than {settings.base}, or of another rank than "
        f"{settings.rank}."
      )


def from_checkpoint(
  saved: Params, model: nn.Module, settings: lora.Settings, where: Any
) -> Params:
  """Checks the adapters that a checkpoint holds, and returns them unrolled."""
  saved = stacked.unstack(saved)
  found = {
    path: np.asarray(x, np.float32)
    for path, x in traverse_util.flatten_dict(saved).items()
  }
  wanted = dict(_names(model, settings, where).values())
  if {p: x.shape[::-1] for p, x in found.items()} != wanted:
    raise ValueError(
      f"the checkpoint in {where} does not hold the adapters of rank "
      f"{settings.rank} that its model/{CONFIG} describes."
    )
  return saved


def check_base(
  settings: lora.Settings, noted: str, base: Params, where: Any
) -> None:
  """Raises ValueError if a base is another than the one of the adapters.

  Args:
    settings: of the adapters.
    noted: digest of the base that they were trained beside; "" if not known.
    base: the parameters that the name of the base has led to.
    where: the adapters.
  """
  if noted and lora.digest(base) != noted:
    raise ValueError(
      f"{settings.base} holds other weights than the base that the adapters of "
      f"{where} were trained beside; bring them back, or set "
      f'"base_model_name_or_path" in its {CONFIG} to where they are.'
    )


def merged(base: Params, factors: Params, scaling: float, dtype: Any) -> Params:
  """Adds adapters to a base on the host; a kernel on disk is summed as read.

  Args:
    base: nested dict of arrays, or of `stored.Stored`.
    factors: nested dict, as `lora.Adapted` holds it; in stacks as the base.
    scaling: of their product.
    dtype: of the sums.

  Returns:
    A nested dict like the base.
  """
  base = traverse_util.flatten_dict(base)
  factors = traverse_util.flatten_dict(factors)
  for path in factors:
    if path[-1] == "lora_b":
      continue
    kernel = (*path[:-1], "kernel")
    a, b = (factors[*path[:-1], name] for name in ("lora_a", "lora_b"))
    base[kernel] = _sum(base[kernel], a, b, scaling, np.dtype(dtype))
  return traverse_util.unflatten_dict(base)


def _sum(kernel, a, b, scaling, dtype):
  def part(index):
    *layers, rows, columns = index
    added = np.float32(scaling) * (
      np.asarray(a)[*layers, rows] @ np.asarray(b)[*layers, :, columns]
    )
    return (np.asarray(kernel[index], np.float32) + added).astype(dtype)

  if isinstance(kernel, stored.Stored):
    return stored.Stored(kernel.shape, dtype, part)
  return part((slice(None),) * len(kernel.shape))


def write(
  directory: str | os.PathLike,
  model: nn.Module,
  factors: Params,
  settings: lora.Settings,
  tokenizer: Any | None = None,
  *,
  dtype: str = "float32",
) -> None:
  """Writes an adapter folder, as PEFT does.

  Args:
    directory: is made; files of others in it stay.
    model: the language model that the adapters are in.
    factors: nested dict, as `lora.Adapted` holds it, stacked or not.
    settings: of the adapters, whose `base` the folder names.
    tokenizer: its files are written as well.
    dtype: of the tensors, "float32" or "bfloat16".

  Raises:
    ValueError: if the base is an adapter itself, or the factors are not those
      of the settings.
  """
  from safetensors import numpy as safetensors_numpy

  configs.check_dtype("dtype", dtype)
  flat = traverse_util.flatten_dict(stacked.unstack(factors))
  tensors = {}
  for name, (path, shape) in _names(model, settings, "targets").items():
    if path not in flat or np.shape(flat[path]) != shape[::-1]:
      raise ValueError(f"the adapters lack {'/'.join(path)} of shape {shape}.")
    tensor = np.asarray(flat[path]).astype(configs.DTYPES[dtype])
    tensors[name] = np.ascontiguousarray(tensor.T)
  with export.staged(directory, weights=True, last=CONFIG) as stage:
    metadata = {"format": "pt"}
    if settings.digest:
      metadata[_DIGEST] = settings.digest
    safetensors_numpy.save_file(tensors, stage / WEIGHTS, metadata)
    if tokenizer is not None:
      tokenizers.write(stage, tokenizer)
    write_settings(stage, settings, model, with_digest=False)
