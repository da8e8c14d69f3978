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

from rljax.distributed import stored
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


def shapes(model: nn.Module) -> Params:
  """Returns shapes and dtypes of a model's parameters."""

  def init(key):
    ids = jnp.zeros((1, 1), jnp.int32)
    return model.init(key, ids, jnp.ones((1, 1), bool))["params"]

  return jax.eval_shape(init, jax.random.key(0))


def slots_of(model: nn.Module) -> dict[str, _Slot]:
  """Maps each tensor of a model's file to its place in the parameters."""
  known = {
    path: leaf.shape
    for path, leaf in traverse_util.flatten_dict(shapes(model)).items()
  }
  names = families.of(model).parameter_names(model.config)
  return {
    name: _Slot(path, flip, known[path][::-1] if flip else known[path])
    for name, (path, flip) in names.items()
  }


def _assemble(
  model: nn.Module,
  shapes: Mapping[str, tuple[int, ...]],
  read: Callable[[str], np.ndarray],
  path: pathlib.Path,
  part: Callable[[str], Any] | None = None,
) -> Params:
  """Checks stored tensors by name and shape, and then reads them.

  With `part`, which opens a tensor to be sliced, they are read later.
  """
  slots = slots_of(model)
  names_of = {}
  tied_head = None
  unexpected = []
  for name in shapes:
    new_name = name
    for old, new in _OLD_NAMES.items():
      new_name = new_name.replace(old, new)
    names = [new_name, *(prefix + new_name for prefix in _PREFIXES)]
    known = next((n for n in names if n in slots), None)
    if known is not None:
      names_of[known] = name
    elif name == "lm_head.weight" and not families.is_classifier(model):
      tied_head = name
    elif not _BUFFERS.fullmatch(name):
      unexpected.append(name)
  wrong = {
    name: (shapes[names_of[name]], slot.shape)
    for name, slot in slots.items()
    if name in names_of and tuple(shapes[names_of[name]]) != slot.shape
  }
  _check_tensors(
    [n for n in slots if n not in names_of], unexpected, wrong, path
  )

  if tied_head is not None:
    embedding = next(name for name in _EMBEDDINGS if name in slots)
    if not np.array_equal(read(tied_head), read(names_of[embedding])):
      raise ValueError(
        f"{path} has an lm_head.weight of its own, but its config.json ties it "
        'to the embedding; set "tie_word_embeddings": false.'
      )

  dtype = np.dtype(model.config.param_dtype)
  params = {}
  for name, slot in slots.items():
    if part is not None:
      params[slot.path] = _stored(part(names_of[name]), slot, dtype, path)
      continue
    array = read(names_of[name])
    if array.dtype.name not in _STORED_DTYPES:
      raise ValueError(
        f"{path}: {names_of[name]} is stored as {array.dtype.name}; one of "
        f"{', '.join(_STORED_DTYPES)} is needed."
      )
    array = array.astype(dtype, copy=False)
    params[slot.path] = array.T if slot.transpose else array
  return traverse_util.unflatten_dict(params)


def _stored(tensor: Any, slot: _Slot, dtype: Any, path: Any) -> stored.Stored:
  """Returns a tensor of a file that is read part by part, as it is used."""
  if tensor.get_dtype() not in ("F16", "BF16", "F32", "F64"):
    raise ValueError(
      f"{path}: {'/'.join(slot.path)} is stored as {tensor.get_dtype()}; one "
      f"of {', '.join(_STORED_DTYPES)} is needed."
    )

  def read(index):
    found = tensor[index[::-1] if slot.transpose else index]
    found = np.asarray(found).astype(dtype, copy=False)
    return found.T if slot.transpose else found

  shape = slot.shape[::-1] if slot.transpose else slot.shape
  return stored.Stored(shape, dtype, read)


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


def from_safetensors(
  directory: pathlib.Path, model: nn.Module, *, lazy: bool = False
) -> Params:
  """Reads the parameters of a model from the files of a folder.

  Args:
    directory: with the files.
    model: whose parameters they are.
    lazy: whether they stay there until they are placed, as `stored.Stored`.
  """
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
    if lazy:
      stack.pop_all()  # What is read later keeps the files open.
    return _assemble(
      model,
      shapes,
      lambda name: files[name].get_tensor(name),
      directory,
      part=(lambda name: files[name].get_slice(name)) if lazy else None,
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
