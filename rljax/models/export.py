"""Writes models as Hugging Face directories."""

import contextlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from flax import linen as nn

from rljax.models import configs, families, tokenizers, weights

Params = weights.Params
_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


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
  """Writes the shards and their index; returns the dtype most bytes have."""
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


def _special_ids(config: Mapping[str, Any], tokenizer: Any) -> dict[str, int]:
  """Returns the tokenizer's special ids, unless the config says more."""
  ids = {role: getattr(tokenizer, role) for role in _SPECIAL}
  ends = config.get("eos_token_id")
  if isinstance(ends, list) and ids["eos_token_id"] in ends:
    del ids["eos_token_id"]  # Chat models end a turn in several ways.
  if config["model_type"] == "roberta":
    del ids["pad_token_id"]  # Its positions are counted from the model's own.
  return {role: id_ for role, id_ in ids.items() if id_ is not None}


@contextlib.contextmanager
def staged(directory: str | os.PathLike) -> Iterator[pathlib.Path]:
  """Yields a folder to write to; its files then move to `directory` at once."""
  directory = pathlib.Path(directory).expanduser().absolute()
  directory.parent.mkdir(parents=True, exist_ok=True)
  stage = pathlib.Path(
    tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent)
  )
  try:
    yield stage
    directory.mkdir(exist_ok=True)
    files = sorted(stage.iterdir(), key=lambda p: p.name == "config.json")
    if any(p.suffix == ".safetensors" for p in files):
      (directory / "config.json").unlink(missing_ok=True)
      for old in directory.iterdir():
        if old.name in (
          weights.WEIGHTS,
          weights.INDEX,
        ) or weights.SHARD.fullmatch(old.name):
          old.unlink()
    for path in files:
      # safetensors makes its files private; give them the mode of any other.
      shutil.copymode(stage / "config.json", path)
      os.replace(path, directory / path.name)
  finally:
    shutil.rmtree(stage, ignore_errors=True)
