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
from rljax.models import configs, families, fields, stacked
from rljax.storage import folders

Params = dict[str, Any]
# By the names of safetensors.
_DTYPES = {
  "F16": "float16",
  "BF16": "bfloat16",
  "F32": "float32",
  "F64": "float64",
}
_STORED_DTYPES = tuple(_DTYPES.values())
# Tables that checkpoints carry and models compute: rotary frequencies, the
# causal masks of GPT-2 and GPT-NeoX, the positions of BERT. Also the pooler of
# a RoBERTa, which its classifiers do not use.
_BUFFERS = re.compile(
  r"(.*\.)?(rotary_emb\.inv_freq|(attn|attention)\.(masked_)?bias"
  r"|embeddings\.(position|token_type)_ids)|roberta\.pooler\.dense\.\w+"
)
# What programs put in front of the names of tensors.
_WRAPPERS = {
  "_orig_mod.": "torch.compile",
  "module.": "torch.nn.DataParallel",
  "base_model.model.": "an adapter of peft that was not merged",
  "_fsdp_wrapped_module.": "torch's FSDP",
}
_PREFIXES = ("model.", "transformer.", "gpt_neox.")
# Names of a norm's scale and bias in old files of BERT.
_OLD_NAMES = {
  "LayerNorm.gamma": "LayerNorm.weight",
  "LayerNorm.beta": "LayerNorm.bias",
}
# Where a model keeps what a tied output layer must equal.
_EMBEDDINGS = re.compile(r"(.*\.)?(embed_tokens|wte|embed_in)\.weight")
_HEADS = ("lm_head.weight", "embed_out.weight")  # Two names of one tensor.
_FILE = re.compile(r"[\w.-]+\.safetensors")
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


class _Slot(NamedTuple):
  """Holds the place of a tensor.

  Attributes:
    path: of the parameter.
    transpose: whether it is stored the other way round.
    shape: of the tensor in the file.
    part: which part of the parameter the tensor is, by a number for each of its
      first axes; (): the whole.
    whole: the shape of the parameter.
  """

  path: tuple[str, ...]
  transpose: bool
  shape: tuple[int, ...]
  part: tuple[int, ...]
  whole: tuple[int, ...]

  def of(self, flat: Mapping[tuple[str, ...], Any]) -> Any:
    """Returns what the tensor holds, from parameters by path."""
    found = flat[self.path]
    return found[self.part] if self.part else found


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
  slots = {}
  for name, (path, flip) in names.items():
    keys = tuple(key for key in path if isinstance(key, str))
    part, whole = tuple(path[len(keys) :]), known[keys]
    shape = whole[len(part) :]
    shape = shape[::-1] if flip else shape
    slots[name] = _Slot(keys, flip, shape, part, whole)
  return slots


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
  # By name first: a model of 10,000 layers takes long to be described in full.
  slots = families.of(model).parameter_names(model.config)
  names_of = {}
  tied_head = None
  unexpected = []
  for name in shapes:
    new_name = name
    for old, new in _OLD_NAMES.items():
      new_name = new_name.replace(old, new)
    names = [new_name, *(prefix + new_name for prefix in _PREFIXES)]
    if new_name in _HEADS:
      names += _HEADS
    known = next((n for n in names if n in slots), None)
    if known is not None:
      names_of[known] = name
    elif name in _HEADS and not families.is_classifier(model):
      tied_head = name
    elif not _BUFFERS.fullmatch(name):
      unexpected.append(name)
  missing = [n for n in slots if n not in names_of]
  _check_wrapper(missing, unexpected, path)
  _check_tensors(missing, unexpected, {}, path)
  slots = slots_of(model)
  wrong = {
    name: (shapes[names_of[name]], slot.shape)
    for name, slot in slots.items()
    if name in names_of and tuple(shapes[names_of[name]]) != slot.shape
  }
  _check_tensors([], [], wrong, path)

  if tied_head is not None:
    embedding = next(filter(_EMBEDDINGS.fullmatch, slots))
    if not np.array_equal(read(tied_head), read(names_of[embedding])):
      raise ValueError(
        f"{path} has an {tied_head} of its own, but its config.json ties it "
        'to the embedding; set "tie_word_embeddings": false.'
      )

  dtype = np.dtype(model.config.param_dtype)
  params, later = {}, {}
  for name, slot in slots.items():
    if part is not None:
      found = _stored(part(names_of[name]), slot, dtype)
      later.setdefault(slot.path, {})[slot.part] = found
      continue
    array = read(names_of[name])
    if array.dtype.name not in _STORED_DTYPES:
      raise ValueError(
        f"{path}: {names_of[name]} is stored as {array.dtype.name}; one of "
        f"{', '.join(_STORED_DTYPES)} is needed."
      )
    array = array.astype(dtype, copy=False)
    array = array.T if slot.transpose else array
    if not slot.part:
      params[slot.path] = array
    else:
      if slot.path not in params:
        params[slot.path] = np.empty(slot.whole, dtype)
      params[slot.path][slot.part] = array
  params |= {path: stored.joined(parts) for path, parts in later.items()}
  return traverse_util.unflatten_dict(params)


def _stored(tensor: Any, slot: _Slot, dtype: Any) -> stored.Stored:
  """Returns a tensor of a file that is read part by part, as it is used."""

  def read(index):
    found = tensor[index[::-1] if slot.transpose else index]
    found = np.asarray(found).astype(dtype, copy=False)
    return found.T if slot.transpose else found

  shape = slot.shape[::-1] if slot.transpose else slot.shape
  return stored.Stored(shape, dtype, read)


def _check_wrapper(
  missing: list[str], unexpected: list[str], where: Any
) -> None:
  """Raises for tensors that go by other names than those of transformers."""
  if not missing or not unexpected:
    return
  names = f"its tensors have names such as {listed(unexpected, 2)}"
  for prefix, writer in _WRAPPERS.items():
    if all(name.startswith(prefix) for name in unexpected):
      raise ValueError(
        f'{where} lacks {listed(missing, 2)}; {names}: "{prefix}" in front is '
        f"what {writer} leaves there. Save the model inside of it, with "
        "save_pretrained of transformers."
      )
  if len(unexpected) >= len(missing) // 2:
    raise ValueError(
      f"{where} lacks {listed(missing)}; {names}, which are not those of this "
      "model_type in transformers. Load it with the code that wrote it, and "
      "save it as a model of transformers."
    )


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

  Where there is an index, it says which file each tensor is read from.

  Args:
    directory: with the files.
    model: whose parameters they are.
    lazy: whether they stay there until they are placed, as `stored.Stored`.

  Raises:
    ValueError: if a file is damaged, or is not that of the model.
  """
  file_of = _file_of_tensors(directory, model)
  shapes, files = {}, {}
  with contextlib.ExitStack() as stack:
    for path in dict.fromkeys(file_of.values()):
      files[path] = _open(path, stack)
    for name, path in file_of.items():
      shapes[name] = _shape(files[path], name, path)

    def read(name):
      try:
        return files[file_of[name]].get_tensor(name)
      except Exception as error:  # A SafetensorError, or one of numpy.
        raise ValueError(
          f"{file_of[name]}: {name} cannot be read: {error}."
        ) from error

    if lazy:
      stack.pop_all()  # What is read later keeps the files open.
    part = (lambda name: files[file_of[name]].get_slice(name)) if lazy else None
    return _assemble(model, shapes, read, directory, part)


def _open(path: pathlib.Path, stack: contextlib.ExitStack) -> Any:
  import safetensors

  try:
    return stack.enter_context(safetensors.safe_open(path, "np"))
  except (safetensors.SafetensorError, OSError, ValueError) as error:
    raise ValueError(f"{path} is damaged: {error}.") from error


def _shape(file: Any, name: str, path: pathlib.Path) -> tuple[int, ...]:
  """Returns the shape of a tensor, once its dtype is one that is read."""
  import safetensors

  try:
    tensor = file.get_slice(name)
  except safetensors.SafetensorError as error:
    raise ValueError(
      f"{path} has no tensor {name}, which {INDEX} says it has."
    ) from error
  dtype = _DTYPES.get(tensor.get_dtype())
  is_read = not _BUFFERS.fullmatch(name)
  if dtype is None and is_read:
    raise ValueError(
      f"{path}: {name} is stored as {_spelled(tensor.get_dtype())}; one of "
      f"{', '.join(_STORED_DTYPES)} is needed."
    )
  return tuple(tensor.get_shape())


def _spelled(dtype: str) -> str:
  """Returns the name that numpy has for a dtype of safetensors, "I8" say."""
  for letter, kind in (("I", "int"), ("U", "uint")):
    if dtype[:1] == letter and dtype[1:].isdecimal():
      return kind + dtype[1:]
  return dtype


def _file_of_tensors(
  directory: pathlib.Path, model: nn.Module
) -> dict[str, pathlib.Path]:
  """Maps the name of each tensor to the file that it is read from."""
  if (directory / WEIGHTS).is_file():
    path = folders.inside(directory, WEIGHTS)
    with contextlib.ExitStack() as stack:
      return dict.fromkeys(_open(path, stack).keys(), path)
  if not (directory / INDEX).is_file():
    _explain_missing(directory, model)
  weight_map = _weight_map(directory)
  paths = {}
  for name in dict.fromkeys(weight_map.values()):
    try:
      paths[name] = folders.inside(directory, name)
    except ValueError as error:
      raise ValueError(f'{directory / INDEX}: "weight_map": {error}') from error
  missing = sorted(n for n, path in paths.items() if not path.is_file())
  if missing:
    raise ValueError(
      f"{directory / INDEX} names {listed(missing)}, which is missing."
    )
  return {name: paths[file] for name, file in weight_map.items()}


def shards_of(directory: pathlib.Path) -> list[str]:
  """Returns the names of the files that the index of a folder names."""
  return sorted(set(_weight_map(directory).values()))


def _weight_map(directory: pathlib.Path) -> dict[str, str]:
  """Returns which file each tensor is in, by the index of a folder."""
  index = folders.inside(directory, INDEX)
  weight_map = configs.read_json(index).get("weight_map")
  if not isinstance(weight_map, dict) or not weight_map:
    raise ValueError(
      f'{index}: "weight_map" must say which file each tensor is in, got '
      f"{fields.shown(weight_map)}."
    )
  for name, file in weight_map.items():
    if not isinstance(file, str) or not _FILE.fullmatch(file):
      raise ValueError(
        f'{index}: "weight_map" puts {fields.shown(name)} into '
        f"{fields.shown(file)}, and only *.safetensors of the folder itself "
        "are read."
      )
  return weight_map


def _explain_missing(directory: pathlib.Path, model: nn.Module) -> None:
  """Raises for a folder without weights that are read: what has it instead?"""
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
  other = sorted(p.name for p in directory.glob("*.safetensors"))
  if other:
    raise ValueError(
      f"{directory} has {listed(other)}, but neither {WEIGHTS} nor an index "
      f"({INDEX}) that says what is in which file."
    )
  hint = ""
  if (directory.parent / "checkpoints").is_dir():
    hint = f"; name the workdir instead, {directory.parent}"
  raise ValueError(f"{directory} has no {WEIGHTS} or {INDEX}{hint}.")


def from_checkpoint(
  workdir: pathlib.Path, model: nn.Module, step: int | None, entry: str
) -> Params:
  """Reads the parameters of a model from a checkpoint of a workdir."""
  dtype = np.dtype(model.config.param_dtype)
  config = getattr(model.config, "backbone", model.config)
  restored = entry_of(workdir, step, entry)
  if hasattr(config, "scan_layers"):  # Whichever way the run had them.
    restored = stacked.as_in(restored, config)
  flat = flat_checked(restored, slots_of(model), workdir)
  return traverse_util.unflatten_dict(
    {path: np.asarray(a).astype(dtype, copy=False) for path, a in flat.items()}
  )


def entry_of(workdir: pathlib.Path, step: int | None, entry: str) -> Params:
  """Reads one of the models that a checkpoint of a workdir holds."""
  from rljax.storage import checkpoint

  restored = checkpoint.restore_params(str(workdir), step=step)
  if entry not in restored:
    raise ValueError(
      f'the checkpoint in {workdir} holds no "{entry}", only '
      f"{listed(sorted(restored))}."
    )
  return restored[entry]


def flat_checked(
  params: Params, slots: Mapping[str, _Slot], where: Any
) -> dict[tuple[str, ...], Any]:
  """Flattens params after checking that they fill the slots exactly."""
  flat = traverse_util.flatten_dict(params)
  paths = {slot.path: slot for slot in slots.values()}
  wrong = {}
  for path, slot in paths.items():
    if path in flat and tuple(flat[path].shape) != slot.whole:
      wrong["/".join(path)] = (flat[path].shape, slot.whole)
  _check_tensors(
    ["/".join(path) for path in paths if path not in flat],
    ["/".join(path) for path in flat if path not in paths],
    wrong,
    where,
  )
  return flat
