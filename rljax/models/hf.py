"""Loads models by name, and writes them back as Hugging Face directories.

A name is a Hugging Face directory, a workdir of an experiment, a packaged
model, a GGUF file, a folder with an adapter of PEFT or a hub name. `load`
returns the linen module with its parameters and tokenizer, `save` writes a
directory that transformers and vLLM read. `load_classifier` and
`save_classifier` do so for classifiers of texts, reward models among them.
Weights are read from safetensors and GGUF only: torch is not needed, and
nothing is unpickled.

  policy = hf.load("smollm2-135m")
  hidden = policy.model.apply({"params": policy.params}, ids, mask)
  hf.save("exported", policy.model, policy.params, policy.tokenizer)
"""

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import PartitionSpec

from rljax.distributed import planning
from rljax.models import (
  classifier,
  configs,
  export,
  families,
  gguf,
  heads,
  lora,
  peft,
  sources,
  stacked,
  tokenizers,
  weights,
)

Params = weights.Params
PACKAGED = sources.PACKAGED


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
  remat: str | bool = "none",
  scan_layers: bool = False,
  tokenizer: bool = True,
  step: int | None = None,
  lazy: bool = False,
) -> LanguageModel:
  """Loads a model by name.

  Args:
    name: one of
      - a Hugging Face directory: config.json and model.safetensors, or shards
        with model.safetensors.index.json;
      - a workdir: model/config.json and checkpoints/<step>;
      - a packaged model, one of `PACKAGED`;
      - a GGUF file of the Llama architecture;
      - a folder with a LoRA adapter, adapter_config.json and
        adapter_model.safetensors, which is added to the base that it names;
      - a hub name such as "org/name", or "org/name@revision".
    dtype: of the computation, "float32" or "bfloat16".
    param_dtype: of the returned parameters, "float32" or "bfloat16".
    remat: what the backward pass recomputes of each layer, one of
      `remat.POLICIES`; True is "nothing", False "none".
    scan_layers: whether layers that repeat lie in stacks; see `stacked`. Those
      of an encoder never do.
    tokenizer: whether to load the tokenizer as well.
    step: which checkpoint of a workdir; None is the latest.
    lazy: whether the weights of a Hugging Face directory stay there until
      `meshes.place` reads what each device gets, as `stored.Stored`.

  Returns:
    The model, with parameters as numpy arrays on the host.

  Raises:
    ValueError: if the name leads nowhere, or what it leads to is not a model
      of a supported type with exactly the expected tensors.
  """
  settings = configs.settings(dtype, param_dtype, remat, scan_layers)
  found = _load(name, settings, tokenizer, step, "policy", lazy)
  return LanguageModel(*found)


def load_classifier(
  name: str | os.PathLike,
  *,
  dtype: str = "float32",
  param_dtype: str = "float32",
  remat: str | bool = "none",
  scan_layers: bool = False,
  tokenizer: bool = True,
  step: int | None = None,
) -> Classifier:
  """Loads a classifier of texts, such as a reward model, by name.

  These are the `...ForSequenceClassification` models of transformers: BERT and
  its kin, and the types of language models that `load` reads.

  Args:
    name: a Hugging Face directory, a workdir whose checkpoints hold a
      "reward_model", or a hub name; see `load`.
    dtype: of the computation, "float32" or "bfloat16".
    param_dtype: of the returned parameters, "float32" or "bfloat16".
    remat: what the backward pass recomputes of each layer, one of
      `remat.POLICIES`; True is "nothing", False "none".
    scan_layers: whether layers that repeat lie in stacks; see `stacked`. Those
      of an encoder never do.
    tokenizer: whether to load the tokenizer as well.
    step: which checkpoint of a workdir; None is the latest.

  Returns:
    The classifier, with parameters as numpy arrays on the host.

  Raises:
    ValueError: if the name leads nowhere, or what it leads to is not a
      classifier of a supported type with exactly the expected tensors.
  """
  settings = configs.settings(dtype, param_dtype, remat, scan_layers)
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
  if isinstance(language_model.model, lora.Model):
    model = lora.Model(model, language_model.model.settings)
  head = heads.LabelHead(num_labels, backbone.param_dtype)
  hidden = jnp.zeros((1, 1, backbone.hidden_size))
  score = head.init(jax.random.key(seed), hidden, jnp.ones((1, 1), bool))
  params = lora.without_output(language_model.params)
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


def load_config(name: str | os.PathLike, **options: Any) -> Any:
  """Reads the config of the model that a name leads to, but no weights.

  Args:
    name: see `load`.
    **options: of `load_module`.
  """
  return load_module(name, **options).config


def load_module(
  name: str | os.PathLike,
  *,
  dtype: str = "float32",
  param_dtype: str = "float32",
  remat: str | bool = "none",
  scan_layers: bool = False,
) -> nn.Module:
  """Makes the module of the model that a name leads to, without weights."""
  settings = configs.settings(dtype, param_dtype, remat, scan_layers)
  kind, path = sources.find(name, with_weights=False)
  if kind == "adapter":
    base = peft.read_settings(path).base
    options = {
      "dtype": dtype,
      "param_dtype": param_dtype,
      "remat": remat,
      "scan_layers": scan_layers,
    }
    with _base_of(path, base):
      return load_module(base, **options)
  if kind == "GGUF file":
    config = gguf.config(gguf.open_reader(path))
  else:
    path = sources.model_folder(kind, path)
    config = configs.read_config(path)
  return configs.build(config, path, settings)


def load_tokenizer(name: str | os.PathLike) -> Any:
  """Reads the tokenizer of the model that a name leads to, but no weights."""
  kind, path = sources.find(name, with_weights=False)
  if kind == "GGUF file":
    return gguf.tokenizer(gguf.open_reader(path))
  if kind == "adapter" and not _has_tokenizer(path):
    base = peft.read_settings(path).base
    with _base_of(path, base):
      return load_tokenizer(base)
  return tokenizers.read(sources.model_folder(kind, path))


def partition_rules(
  model: nn.Module, mesh: jax.sharding.Mesh
) -> tuple[tuple[str, Any], ...]:
  """Returns the rules by which a model's parameters lie on a mesh.

  Args:
    model: a language model or a classifier.
    mesh: from `meshes.make`.

  Returns:
    (path pattern, PartitionSpec) pairs for `meshes.shardings`. A vocabulary
    that `tensor` does not divide is split by the width of its rows instead.

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
  rules = families.of(model).partition_rules
  if isinstance(model, lora.Model):
    rules = (*lora.partition_rules(rules), *rules)
  rules = (*stacked.partition_rules(rules), *rules)
  if config.vocab_size % num_devices == 0:
    return rules
  # An odd vocabulary, such as GPT-2's 50,257: split the width of its rows.
  return (
    (
      r"(embed_tokens|wte|word_embeddings)/embedding$",
      PartitionSpec(None, ("fsdp", "tensor")),
    ),
    (r"lm_head/kernel$", PartitionSpec(("fsdp", "tensor"), None)),
    *rules,
  )


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

  It is written aside first. Whatever happens at any moment, `directory` loads
  as it was before, or as it is afterwards. No file of an earlier save is left
  there; files of others are kept.

  Args:
    directory: created if need be.
    model: the module that `params` belong to.
    params: nested dict of numpy or (host-addressable) jax arrays.
    tokenizer: its files are written as well.
    dtype: of the file's tensors, "float32" or "bfloat16"; None keeps each
      array's own.
    max_shard_bytes: size above which the weights are split into several files.

  Raises:
    ValueError: if `params` are not exactly those of `model`, or not finite, or
      another process is writing there.
  """
  if families.is_classifier(model):
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
  if not families.is_classifier(model):
    raise ValueError(
      f"{type(model).__name__} is not a classifier; hf.save writes language "
      "models."
    )
  _save(directory, model, params, tokenizer, dtype, max_shard_bytes)


def _save(directory, model, params, tokenizer, dtype, max_shard_bytes) -> None:
  if dtype is not None:
    configs.check_dtype("dtype", dtype)
  if max_shard_bytes <= 0:
    raise ValueError(
      f"max_shard_bytes must be positive, got {max_shard_bytes}."
    )
  if tokenizer is not None:
    tokenizers.check_vocabulary(tokenizer, model, directory)
  arrays = export.by_name(params, model)

  with export.staged(directory, weights=True) as stage:
    shards = export.shards(arrays, dtype, max_shard_bytes)
    stored = export.write_weights(stage, arrays, shards, dtype)
    export.write_config(stage, model, tokenizer, stored)


def copy_adapter(
  name: str | os.PathLike,
  directory: str | os.PathLike,
  *,
  dtype: str = "float32",
  step: int | None = None,
) -> bool:
  """Writes the adapters that a name leads to as a folder that PEFT reads.

  Args:
    name: a workdir of a run with adapters, or an adapter folder.
    directory: created if need be; see `save`.
    dtype: of the file's tensors, "float32" or "bfloat16".
    step: which checkpoint of a workdir; None is the latest.

  Returns:
    Whether the name leads to adapters; else nothing is written.

  Raises:
    ValueError: if they are damaged, or their base cannot be named: it is a
      model with adapters itself.
  """
  kind, path = sources.find(name, with_weights=True)
  folder = sources.model_folder(kind, path)
  if kind not in ("adapter", "workdir") or not peft.is_adapter(folder):
    return False
  adapter = peft.read_settings(folder)
  base_kind, base = sources.find(adapter.base, with_weights=False)
  if peft.is_adapter(sources.model_folder(base_kind, base)):
    raise ValueError(
      f"the base of {name} is {adapter.base}, which has adapters itself: "
      "export that with --merge and train beside it, or this with --merge."
    )
  model = load_module(adapter.base)
  if kind == "adapter":
    factors, noted = peft.read(folder, model, adapter)
    adapter = dataclasses.replace(adapter, digest=noted)
  else:
    saved = weights.entry_of(path, step, "policy")["lora"]
    factors = peft.from_checkpoint(saved, model, adapter, path)
  peft.write(
    directory, model, factors, adapter, load_tokenizer(name), dtype=dtype
  )
  return True


def save_config(
  directory: str | os.PathLike, model: nn.Module, tokenizer: Any | None = None
) -> None:
  """Writes config.json and the tokenizer: the `model/` folder of a workdir.

  Of several processes, the first one does.
  """
  if tokenizer is not None:
    tokenizers.check_vocabulary(tokenizer, model, directory)
  if jax.process_index():
    return
  with export.staged(directory, weights=False) as stage:
    stored = np.dtype(model.config.param_dtype).name
    export.write_config(stage, model, tokenizer, stored)
    if isinstance(model, lora.Model) and model.settings is not None:
      peft.write_settings(stage, model.settings, model, with_digest=True)


# Loading.


def _load(
  name: str | os.PathLike,
  settings: dict[str, Any],
  tokenizer: bool,
  step: int | None,
  entry: str,
  lazy: bool = False,
) -> tuple[nn.Module, Params, Any | None, str, str | None]:
  """Does what `load` and `load_classifier` share.

  Args:
    name: as given to them.
    settings: of `configs.settings`.
    tokenizer: whether to load one.
    step: of a workdir.
    entry: of a checkpoint's parameters: "policy" for language models,
      "reward_model" for classifiers.
    lazy: see `load`.

  Returns:
    Model, parameters, tokenizer, source and directory.
  """
  plan = planning.current()  # It needs no weights.
  kind, path = sources.find(name, with_weights=plan is None, step=step)
  if step is not None and kind != "workdir":
    raise ValueError(f"step={step} needs a workdir, and {name} is a {kind}.")
  if kind == "adapter":
    return _load_adapter(name, path, settings, tokenizer, entry, lazy)
  if kind == "GGUF file":
    reader = gguf.open_reader(path)
    config = gguf.config(reader)
    configs.check_kind(config, path, entry)
    model = configs.build(config, path, settings)
    if plan is None:
      params = weights.from_arrays(gguf.tensors(reader), model, path)
    text = gguf.tokenizer(reader) if tokenizer else None
  else:
    folder = sources.model_folder(kind, path)
    config = configs.read_config(folder)
    configs.check_kind(config, folder, entry)
    model = configs.build(config, folder, settings)
    text = _tokenizer_of(folder) if tokenizer else None
    if plan is not None:
      pass
    elif kind == "workdir" and peft.is_adapter(folder):
      params = _merged_checkpoint(path, folder, model, step, entry, lazy)
    elif kind == "workdir":
      params = weights.from_checkpoint(path, model, step, entry)
    else:
      params = weights.from_safetensors(path, model, lazy=lazy)
  if plan is not None:
    params = planning.shapes(weights.shapes(model))
  if text is not None:
    tokenizers.check_vocabulary(text, model, path)
    tokenizers.add_ends(text, config.get("eos_token_id"))
  directory = None if kind == "GGUF file" else str(path)
  return model, params, text, str(name), directory


def _load_adapter(
  name: str | os.PathLike,
  folder: pathlib.Path,
  settings: dict[str, Any],
  tokenizer: bool,
  entry: str,
  lazy: bool,
) -> tuple[nn.Module, Params, Any | None, str, str | None]:
  """Loads the base of an adapter folder, and adds the adapters to it."""
  if entry != "policy":
    raise ValueError(
      f"{name} holds an adapter of a language model; a classifier is needed."
    )
  adapter = peft.read_settings(folder)
  own = tokenizer and _has_tokenizer(folder)
  model, params, text = _load_base(
    adapter, folder, settings, tokenizer and not own, lazy
  )
  if not planning.current():
    factors, noted = peft.read(folder, model, adapter)
    peft.check_base(adapter, noted, params, folder)
    factors = stacked.stack(factors, model.config)
    dtype = model.config.param_dtype
    params = peft.merged(params, factors, adapter.scaling, dtype)
  if own:
    text = tokenizers.read(folder)
    tokenizers.check_vocabulary(text, model, folder)
  return model, params, text, str(name), str(folder)


def _load_base(
  adapter: lora.Settings,
  where: pathlib.Path,
  settings: dict[str, Any],
  tokenizer: bool,
  lazy: bool,
) -> tuple[nn.Module, Params, Any | None]:
  """Loads the model that adapters are beside."""
  with _base_of(where, adapter.base):
    return _load(adapter.base, settings, tokenizer, None, "policy", lazy)[:3]


@contextlib.contextmanager
def _base_of(where: pathlib.Path, base: str) -> Iterator[None]:
  """Says of errors whose base could not be read; refuses a circle of bases."""
  _check_chain(where, base)
  try:
    yield
  except ValueError as error:
    raise ValueError(
      f"the base of the adapter in {where} cannot be loaded: {error} Its "
      f'"base_model_name_or_path" in {peft.CONFIG} may name another place.'
    ) from error


def _check_chain(where: pathlib.Path, base: str) -> None:
  """Raises ValueError if bases of adapters lead back to one of them."""
  seen, place = [where.resolve()], pathlib.Path(base).expanduser()
  while os.path.isdir(place):  # False for what is no path at all.
    if place.resolve() in seen:
      way = " -> ".join(map(str, [*seen, place.resolve()]))
      raise ValueError(
        f"the adapter in {where} leads back to itself as its base: {way}. Set "
        f'"base_model_name_or_path" in its {peft.CONFIG} to a whole model.'
      )
    seen.append(place.resolve())
    try:
      kind, path = sources.find(place, with_weights=False)
    except ValueError:
      return  # Loading it says what is wrong with it.
    folder = sources.model_folder(kind, path)
    if kind not in ("adapter", "workdir") or not peft.is_adapter(folder):
      return
    place = pathlib.Path(peft.read_settings(folder).base).expanduser()


def _merged_checkpoint(
  workdir: pathlib.Path,
  folder: pathlib.Path,
  model: nn.Module,
  step: int | None,
  entry: str,
  lazy: bool,
) -> Params:
  """Reads the adapters of a run, and adds them to their base."""
  adapter = peft.read_settings(folder)
  config = getattr(model.config, "backbone", model.config)
  names = ("dtype", "param_dtype", "remat", "scan_layers")
  settings = {name: getattr(config, name) for name in names}
  base, params, _ = _load_base(adapter, workdir, settings, False, lazy)
  peft.check_base(adapter, adapter.digest, params, workdir)
  saved = weights.entry_of(workdir, step, entry)
  is_reward_model = families.is_classifier(model)
  factors = (saved["backbone"] if is_reward_model else saved)["lora"]
  factors = peft.from_checkpoint(factors, base, adapter, workdir)
  factors = stacked.stack(factors, base.config)
  dtype = model.config.param_dtype
  params = peft.merged(params, factors, adapter.scaling, dtype)
  if not is_reward_model:
    return params
  return {**saved, "backbone": lora.without_output(params)}


def _has_tokenizer(folder: pathlib.Path) -> bool:
  names = ("tokenizer.json", "tokenizer_config.json")
  return any((folder / name).is_file() for name in names)


def _tokenizer_of(folder: pathlib.Path) -> Any:
  """Reads a folder's tokenizer; a plan may have another one in its place."""
  plan = planning.current()
  if plan and plan.tokenizer and not _has_tokenizer(folder):
    return load_tokenizer(plan.tokenizer)
  return tokenizers.read(folder)
