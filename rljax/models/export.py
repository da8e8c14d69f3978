"""Writes models as Hugging Face directories."""

import contextlib
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import linen as nn

from rljax.models import configs, families, tokenizers, weights
from rljax.storage import folders

Params = weights.Params
_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
_OWN_WEIGHTS = re.compile(
  r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json"
)
_TOKENIZER_FILES = frozenset(
  (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "vocab.txt"),
    *("tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates"),
  )
)


def by_name(params: Params, model: nn.Module) -> dict[str, tuple[Any, bool]]:
  """Maps Hugging Face names to (array as in params, whether to transpose)."""
  slots = weights.slots_of(model)
  flat = weights.flat_checked(params, slots, "params")
  return {name: (slot.of(flat), slot.transpose) for name, slot in slots.items()}


def shards(
  arrays: Mapping[str, tuple[Any, bool]], dtype: str | None, limit: int
) -> list[list[str]]:
  """Cuts the names, in order, into files of at most `limit` bytes."""
  shards, room = [], 0
  for name, (array, _) in arrays.items():
    size = array.size * np.dtype(dtype or array.dtype).itemsize
    if not shards or size > room:
      shards.append([])
      room = limit
    shards[-1].append(name)
    room -= size
  return shards


def write_weights(
  stage: pathlib.Path,
  arrays: Mapping[str, tuple[Any, bool]],
  shards: list[list[str]],
  dtype: str | None,
) -> str:
  """Writes the shards and their index; returns the dtype most bytes have.

  Raises:
    ValueError: if a tensor is not finite, as it is stored, or of whole numbers.
  """
  from safetensors import numpy as safetensors_numpy

  total = 0
  bytes_of, weight_map = {}, {}
  for i, names in enumerate(shards):
    file = weights.WEIGHTS
    if len(shards) > 1:
      file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
    tensors = {}
    for name in names:
      array, transpose = arrays[name]
      array = np.asarray(array)
      array = array.astype(dtype or array.dtype, copy=False)
      _check_numbers(name, array)
      # safetensors writes the memory as it lies, so a view has to be laid out.
      tensors[name] = np.ascontiguousarray(array.T if transpose else array)
      weight_map[name] = file
      kind = array.dtype.name
      bytes_of[kind] = bytes_of.get(kind, 0) + array.nbytes
      total += array.nbytes
    safetensors_numpy.save_file(tensors, stage / file, {"format": "pt"})
  if len(shards) > 1:
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    configs.write_json(stage / weights.INDEX, index)
  return max(bytes_of, key=bytes_of.get)


def _check_numbers(name: str, array: np.ndarray) -> None:
  """Raises ValueError for a tensor that nobody could use."""
  is_float = array.dtype.kind == "f" or array.dtype.name == "bfloat16"
  if not is_float or not np.isfinite(array).all():
    what = "holds numbers that are not finite"
    if not is_float:
      what = f"is of {array.dtype.name}, and must be of floats"
    raise ValueError(f"{name} {what}; the model is not saved.")


def write_config(
  stage: pathlib.Path, model: nn.Module, tokenizer: Any | None, stored: str
) -> None:
  """Writes config.json, generation_config.json and the tokenizer's files.

  Args:
    stage: the folder.
    model: the module.
    tokenizer: of the model, or None.
    stored: dtype of the file's tensors.
  """
  config = model.config.to_hf()
  # Every release of transformers reads this older spelling of "dtype".
  config.pop("dtype", None)
  config["torch_dtype"] = stored
  if tokenizer is not None:
    tokenizers.write(stage, tokenizer)
    config.update(_special_ids(config, tokenizer))
  configs.write_json(stage / "config.json", config)
  if families.is_classifier(model):
    return
  roles = [role for role in _SPECIAL if config.get(role) is not None]
  generation = {role: config[role] for role in roles}
  configs.write_json(stage / "generation_config.json", generation)


def _special_ids(config: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
  """Returns the tokenizer's special ids, and all end tokens of the model."""
  ids = {role: getattr(tokenizer, role) for role in _SPECIAL}
  if ids["eos_token_id"] is not None:
    ids["eos_token_id"] = _all_ends(config, ids["eos_token_id"])
  if config["model_type"] in ("roberta", "xlm-roberta"):
    del ids["pad_token_id"]  # Its positions are counted from the model's own.
  return {role: id_ for role, id_ in ids.items() if id_ is not None}


def _all_ends(config: Mapping[str, Any], own: int) -> int | list[int]:
  """Returns the end tokens of a config, then that of the tokenizer."""
  ends = config.get("eos_token_id")
  several = ends if isinstance(ends, list) else [ends]
  found = list(dict.fromkeys(i for i in [*several, own] if i is not None))
  return found if isinstance(ends, list) or len(found) > 1 else own


def staged(
  directory: str | os.PathLike, *, weights: bool, last: str = "config.json"
) -> contextlib.AbstractContextManager[pathlib.Path]:
  """Returns a context whose files replace those of an earlier export at once.

  Whatever happens, `folders.current` finds all of the old or all of the new
  files. Those of the old export that have no counterpart go, too: a chat
  template, a tokenizer, shards. What is no part of an export, such as a
  README.md, stays.

  Args:
    directory: of the export.
    weights: whether weights are written; else those of the folder stay.
    last: the file without which nobody reads the folder.
  """
  stale = _TOKENIZER_FILES | {"config.json", "generation_config.json"}
  stale |= {"adapter_config.json", "adapter_model.safetensors"}

  def is_stale(name: str) -> bool:
    if name in stale:
      return True
    return weights and bool(_OWN_WEIGHTS.fullmatch(name))

  return folders.replaced(directory, is_stale, last=last)
