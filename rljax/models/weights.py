"""Reads the tensors of models from safetensors, checkpoints and arrays."""

import contextlib
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from rljax.models import configs, families

Params = dict[str, Any]
_STORED_DTYPES = ("float16", "bfloat16", "float32", "float64")
# Tables that checkpoints carry and models compute: rotary frequencies, the
# causal masks of GPT-2, the positions of BERT. Also the pooler of a RoBERTa,
# which its classifiers do not use.
_BUFFERS = re.compile(
  r"(.*\.)?(rotary_emb\.inv_freq|attn\.(masked_)?bias"
  r"|embeddings\.(position|token_type)_ids)|roberta\.pooler\.dense\.\w+"
)
_PREFIXES = ("model.", "transformer.")
# Names of a norm's scale and bias in old files of BERT.
_OLD_NAMES = {
  "LayerNorm.gamma": "LayerNorm.weight",
  "LayerNorm.beta": "LayerNorm.bias",
}
_EMBEDDINGS = ("model.embed_tokens.weight", "transformer.wte.weight")
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


class _Slot(NamedTuple):
  path: tuple[str, ...]
  transpose: bool
  shape: tuple[int, ...]


def slots_of(model: nn.Module) -> dict[str, _Slot]:
  """Maps each tensor of a model's file to its place in the parameters."""

  def init(key):
    ids = jnp.zeros((1, 1), jnp.int32)
    return model.init(key, ids, jnp.ones((1, 1), bool))["params"]

  shapes = {
    path: leaf.shape
    for path, leaf in traverse_util.flatten_dict(
      jax.eval_shape(init, jax.random.key(0))
    ).items()
  }
  names = families.of(model).parameter_names(model.config)
  return {
    name: _Slot(path, flip, shapes[path][::-1] if flip else shapes[path])
    for name, (path, flip) in names.items()
  }


def _assemble(
  model: nn.Module,
  shapes: Mapping[str, tuple[int, ...]],
  read: Callable[[str], np.ndarray],
  path: pathlib.Path,
) -> Params:
  """Checks stored tensors by name and shape, and then reads them."""
  slots = slots_of(model)
  stored = {}
  tied_head = None
  unexpected = []
  for name in shapes:
    new_name = name
    for old, new in _OLD_NAMES.items():
      new_name = new_name.replace(old, new)
    names = [new_name, *(prefix + new_name for prefix in _PREFIXES)]
    known = next((n for n in names if n in slots), None)
    if known is not None:
      stored[known] = name
    elif name == "lm_head.weight" and not families.is_classifier(model):
      tied_head = name
    elif not _BUFFERS.fullmatch(name):
      unexpected.append(name)
  wrong = {
    name: (shapes[stored[name]], slot.shape)
    for name, slot in slots.items()
    if name in stored and tuple(shapes[stored[name]]) != slot.shape
  }
  _check_tensors([n for n in slots if n not in stored], unexpected, wrong, path)

  if tied_head is not None:
    embedding = next(name for name in _EMBEDDINGS if name in slots)
    if not np.array_equal(read(tied_head), read(stored[embedding])):
      raise ValueError(
        f"{path} has an lm_head.weight of its own, but its config.json ties it "
        'to the embedding; set "tie_word_embeddings": false.'
      )

  dtype = np.dtype(model.config.param_dtype)
  params = {}
  for name, slot in slots.items():
    array = read(stored[name])
    if array.dtype.name not in _STORED_DTYPES:
      raise ValueError(
        f"{path}: {stored[name]} is stored as {array.dtype.name}; one of "
        f"{', '.join(_STORED_DTYPES)} is needed."
      )
    array = array.astype(dtype, copy=False)
    params[slot.path] = array.T if slot.transpose else array
  return traverse_util.unflatten_dict(params)


def _check_tensors(
  missing: list[str],
  unexpected: list[str],
  wrong: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]],
  where: Any,
) -> None:
  if missing:
    raise ValueError(f"{where} lacks {listed(missing)}.")
  if unexpected:
    raise ValueError(
      f"{where} has tensors that the model has no place for: "
      f"{listed(unexpected)}."
    )
  for name, (found, expected) in wrong.items():
    raise ValueError(
      f"{where}: {name} has shape {tuple(found)}, expected {tuple(expected)}."
    )


def listed(names: list[str], limit: int = 5) -> str:
  """Returns the first names, and how many more there are."""
  rest = len(names) - limit
  more = f" and {rest} more" if rest > 0 else ""
  return ", ".join(names[:limit]) + more


def from_arrays(
  arrays: Mapping[str, np.ndarray], model: nn.Module, path: pathlib.Path
) -> Params:
  """Returns the parameters of a model from tensors in memory."""
  shapes = {name: array.shape for name, array in arrays.items()}
  return _assemble(model, shapes, arrays.__getitem__, path)


def from_safetensors(directory: pathlib.Path, model: nn.Module) -> Params:
  """Reads the parameters of a model from the files of a folder."""
  import safetensors

  shapes, files = {}, {}
  with contextlib.ExitStack() as stack:
    for path in _weight_files(directory, model):
      try:
        file = stack.enter_context(safetensors.safe_open(path, "np"))
      except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}.") from error
      for name in file.keys():  # noqa: SIM118 (it is not a mapping).
        shapes[name] = tuple(file.get_slice(name).get_shape())
        files[name] = file
    return _assemble(
      model, shapes, lambda name: files[name].get_tensor(name), directory
    )


def _weight_files(
  directory: pathlib.Path, model: nn.Module
) -> list[pathlib.Path]:
  if (directory / WEIGHTS).is_file():
    return [directory / WEIGHTS]
  index = directory / INDEX
  if index.is_file():
    names = sorted(set(configs.read_json(index)["weight_map"].values()))
    missing = [n for n in names if not (directory / n).is_file()]
    if missing:
      raise ValueError(f"{index} names {listed(missing)}, which is missing.")
    return [directory / name for name in names]

  pickles = sorted(p.name for p in directory.glob("pytorch_model*.bin"))
  if pickles:
    kind = (
      configs.CLASSIFICATION if families.is_classifier(model) else "ForCausalLM"
    )
    raise ValueError(
      f"{directory} has its weights in {listed(pickles)}, a pickle, and only "
      "*.safetensors are read. Convert it once, where torch is installed: "
      f'transformers.AutoModel{kind}.from_pretrained("{directory}")'
      '.save_pretrained("<new directory>")'
    )
  hint = ""
  if (directory.parent / "checkpoints").is_dir():
    hint = f"; name the workdir instead, {directory.parent}"
  raise ValueError(f"{directory} has no {WEIGHTS} or {INDEX}{hint}.")


def from_checkpoint(
  workdir: pathlib.Path, model: nn.Module, step: int | None, entry: str
) -> Params:
  """Reads the parameters of a model from a checkpoint of a workdir."""
  from rljax.storage import checkpoint

  restored = checkpoint.restore_params(str(workdir), step=step)
  if entry not in restored:
    raise ValueError(
      f'the checkpoint in {workdir} holds no "{entry}", only '
      f"{listed(sorted(restored))}."
    )
  dtype = np.dtype(model.config.param_dtype)
  flat = flat_checked(restored[entry], slots_of(model), workdir)
  return traverse_util.unflatten_dict(
    {path: np.asarray(a).astype(dtype, copy=False) for path, a in flat.items()}
  )


def flat_checked(
  params: Params, slots: Mapping[str, _Slot], where: Any
) -> dict[tuple[str, ...], Any]:
  """Flattens params after checking that they fill the slots exactly."""
  flat = traverse_util.flatten_dict(params)
  paths = {slot.path: slot for slot in slots.values()}
  wrong = {}
  for path, slot in paths.items():
    expected = slot.shape[::-1] if slot.transpose else slot.shape
    if path in flat and tuple(flat[path].shape) != expected:
      wrong["/".join(path)] = (flat[path].shape, expected)
  _check_tensors(
    ["/".join(path) for path in paths if path not in flat],
    ["/".join(path) for path in flat if path not in paths],
    wrong,
    where,
  )
  return flat
