"""Reads configs, and makes the modules that they describe."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from rljax.distributed import planning
from rljax.models import (
  classifier,
  families,
  fields,
  language_models,
  stacked,
)
from rljax.models import remat as remat_lib
from rljax.storage import folders

# How transformers names the architectures that `load_classifier` reads.
CLASSIFICATION = "ForSequenceClassification"
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def settings(
  dtype: str,
  param_dtype: str,
  remat: str | bool = "none",
  scan_layers: bool = False,
) -> dict[str, Any]:
  """Returns the fields of a config that no config.json decides."""
  check_dtype("dtype", dtype)
  check_dtype("param_dtype", param_dtype)
  return {
    "dtype": DTYPES[dtype],
    "param_dtype": DTYPES[param_dtype],
    "remat": remat_lib.check(remat),
    "scan_layers": scan_layers,
  }


def architecture(config: Mapping[str, Any]) -> str | None:
  """Returns the class of transformers that a config.json names, if any."""
  names = config.get("architectures")
  if not isinstance(names, list) or not names or not isinstance(names[0], str):
    return None
  return names[0]


def describes_classifier(config: Mapping[str, Any]) -> bool:
  """Returns whether a config.json is that of a classifier of texts."""
  return (architecture(config) or "").endswith(CLASSIFICATION)


def check_kind(config: Mapping[str, Any], path: Any, entry: str) -> None:
  """Raises for a classifier where a language model is wanted, or vice versa."""
  found = architecture(config)
  is_classifier = describes_classifier(config)
  if entry == "policy" and is_classifier:
    raise ValueError(
      f"{path} holds a {found}, a classifier; hf.load_classifier reads it."
    )
  if entry == "reward_model" and not is_classifier:
    holds = f"a {found}" if found else "a model that names no architecture"
    raise ValueError(
      f"{path} holds {holds}, and hf.load_classifier only reads "
      f"...{CLASSIFICATION}. hf.load reads language models, and "
      "hf.classifier_from puts a new head on one."
    )


def build(
  config: dict[str, Any], path: pathlib.Path, settings: dict[str, Any]
) -> nn.Module:
  """Makes the module that a config describes, of either kind."""
  known = families.LANGUAGE_MODELS
  if describes_classifier(config):
    known = families.CLASSIFIERS
  model_type = config.get("model_type")
  if not isinstance(model_type, str) or model_type not in known:
    shown = fields.shown(model_type).replace("'", '"')
    raise ValueError(
      f"{path} has the model_type {shown}; supported: {', '.join(known)}."
    )
  family, config = known[model_type], _at_depth(config)
  try:
    sizes = family.config.from_hf(fields.checked(config))
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error
  if isinstance(sizes, classifier.CausalClassifierConfig):
    settings = {"backbone": dataclasses.replace(sizes.backbone, **settings)}
  elif known is families.CLASSIFIERS:  # An encoder, which has no stacks.
    settings = {k: x for k, x in settings.items() if k != "scan_layers"}
  sizes = dataclasses.replace(sizes, **settings)
  stacked.check(getattr(sizes, "backbone", sizes))
  if (
    model_type in language_models.CONFIGS and known is not families.CLASSIFIERS
  ):
    return language_models.module(sizes)
  return family.model(sizes)


def _at_depth(config: dict[str, Any]) -> dict[str, Any]:
  """Returns the config with as many layers as a plan asks for."""
  changed = dict(config)
  for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers"):
    if isinstance(config.get(name), int):
      changed[name] = planning.num_layers(config[name])
      kinds = config.get("layer_types")
      if isinstance(kinds, list) and changed[name] != config[name]:
        changed["layer_types"] = kinds[: changed[name]]
  return changed


def check_dtype(name: str, dtype: str) -> None:
  """Raises ValueError for a dtype that models have not."""
  if dtype not in DTYPES:
    raise ValueError(f"{name} must be one of {', '.join(DTYPES)}, got {dtype}.")


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Reads a JSON object; a byte order mark in front of it is no harm.

  Raises:
    ValueError: if the file cannot be read, is not UTF-8, is not JSON or holds
      anything but an object; or if a name stands twice in an object, with
      different values.
  """
  try:
    found = json.loads(
      path.read_bytes().decode("utf-8-sig"),
      object_pairs_hook=_unambiguous,
      parse_constant=_not_finite,
    )
  except UnicodeDecodeError as error:
    raise ValueError(f"{path} is not UTF-8: {error}.") from error
  except (ValueError, RecursionError, MemoryError) as error:
    reason = str(error) or "it is nested too deeply"
    raise ValueError(f"{path} is not JSON: {reason}.") from error
  except OSError as error:
    raise ValueError(f"{path} cannot be read: {error.strerror}.") from error
  if not isinstance(found, dict):
    raise ValueError(
      f"{path} must hold a JSON object, got {fields.shown(found)}."
    )
  return found


def read_config(folder: pathlib.Path) -> dict[str, Any]:
  """Reads the config.json of a folder, with all the end tokens of its model.

  Those of generation_config.json count as well: the config of a chat model may
  name the end of a text alone, and not that of a turn.

  Raises:
    ValueError: as `read_json`, or if there is an end token that is no id.
  """
  config = read_json(folders.inside(folder, "config.json"))
  several = [
    ("config.json", config),
    ("config.json", config.get("text_config")),
  ]
  name = "generation_config.json"
  if (folder / name).exists():
    several.append((name, read_json(folders.inside(folder, name))))
  ends: list[int] = []
  is_list = isinstance(config.get("eos_token_id"), list)
  for source, content in several:
    if not isinstance(content, dict) or content.get("eos_token_id") is None:
      continue
    try:
      found = fields.end_ids(content["eos_token_id"])
    except ValueError as error:
      raise ValueError(f"{folder / source}: {error}") from error
    ends += found if isinstance(found, list) else [found]
  ends = [id_ for id_ in dict.fromkeys(ends) if id_ is not None]
  if ends:
    config["eos_token_id"] = ends if is_list or len(ends) > 1 else ends[0]
  return config


def _unambiguous(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  found = dict(pairs)
  if len(found) < len(pairs):
    for name, value in pairs:
      if found[name] != value:
        raise ValueError(f'"{name}" stands twice in one object')
  return found


def _not_finite(name: str) -> None:
  raise ValueError(f"{name} is no JSON number")


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes a value as an indented JSON file."""
  path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
