"""Reads configs, and makes the modules that they describe."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from rljax.models import classifier, families, language_models

# How transformers names the architectures that `load_classifier` reads.
CLASSIFICATION = "ForSequenceClassification"
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def settings(dtype: str, param_dtype: str, remat: bool) -> dict[str, Any]:
  """Returns the fields of a config that no config.json decides."""
  check_dtype("dtype", dtype)
  check_dtype("param_dtype", param_dtype)
  return {
    "dtype": DTYPES[dtype],
    "param_dtype": DTYPES[param_dtype],
    "remat": remat,
  }


def architecture(config: Mapping[str, Any]) -> str | None:
  """Returns the class of transformers that a config.json names, if any."""
  names = config.get("architectures") or [None]
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
  if model_type not in known:
    raise ValueError(
      f'{path} has the model_type "{model_type}"; supported: '
      f"{', '.join(known)}."
    )
  family = known[model_type]
  try:
    sizes = family.config.from_hf(config)
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error
  if isinstance(sizes, classifier.CausalClassifierConfig):
    settings = {"backbone": dataclasses.replace(sizes.backbone, **settings)}
  sizes = dataclasses.replace(sizes, **settings)
  if (
    model_type in language_models.CONFIGS and known is not families.CLASSIFIERS
  ):
    return language_models.module(sizes)
  return family.model(sizes)


def check_dtype(name: str, dtype: str) -> None:
  """Raises ValueError for a dtype that models have not."""
  if dtype not in DTYPES:
    raise ValueError(f"{name} must be one of {', '.join(DTYPES)}, got {dtype}.")


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Reads a JSON file."""
  try:
    return json.loads(path.read_text())
  except json.JSONDecodeError as error:
    raise ValueError(f"{path} is not JSON: {error}.") from error


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes a value as an indented JSON file."""
  path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
