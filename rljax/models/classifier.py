"""Classifiers of texts on a causal backbone, reward models among them.

They are the `...ForSequenceClassification` models of transformers for the
families of `MODEL_TYPES`: a decoder without its output layer, and a linear
layer that reads the hidden state of the last real token.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax

from rljax.models import fields, heads, language_models

Array = jax.Array

# Where parameters live on a mesh: the first pattern that a path contains.
PARTITION_RULES = language_models.PARTITION_RULES

# Names of transformers that do not end as those of most language models do.
_ARCHITECTURES = {
  "gpt2": "GPT2ForSequenceClassification",
  "gemma3_text": "Gemma3TextForSequenceClassification",
}
# transformers has no classifier of Granite.
MODEL_TYPES = tuple(t for t in language_models.CONFIGS if t != "granite")


@dataclasses.dataclass(frozen=True)
class CausalClassifierConfig:
  """Holds the architecture and precision of a classifier.

  Attributes:
    backbone: settings of the decoder. A classifier has no output layer, so
      they are kept with `tie_word_embeddings`.
    labels: names of the labels, in the order of the logits.
    problem_type: kept for `to_hf`; what transformers trains it for.
  """

  backbone: language_models.Config
  labels: tuple[str, ...] = ("LABEL_0",)
  problem_type: str | None = None

  def __post_init__(self):
    if not self.labels:
      raise ValueError("labels must name at least one label.")
    if not getattr(self.backbone, "tie_word_embeddings", True):
      tied = dataclasses.replace(self.backbone, tie_word_embeddings=True)
      object.__setattr__(self, "backbone", tied)

  @property
  def vocab_size(self) -> int:
    return self.backbone.vocab_size

  @property
  def hidden_size(self) -> int:
    return self.backbone.hidden_size

  @property
  def max_positions(self) -> int:
    return self.backbone.max_positions

  @property
  def dtype(self) -> Any:
    return self.backbone.dtype

  @property
  def param_dtype(self) -> Any:
    return self.backbone.param_dtype

  @classmethod
  def from_hf(cls, config: Mapping[str, Any]) -> "CausalClassifierConfig":
    """Reads the content of a config.json.

    Args:
      config: the fields, with a `model_type` of `MODEL_TYPES`.

    Returns:
      The settings, with the backbone's `dtype`, `param_dtype` and `remat` at
      their defaults.

    Raises:
      ValueError: if a field is missing or asks for what is not implemented;
        the message names the field.
    """
    model_type = config.get("model_type")
    if model_type not in MODEL_TYPES:
      raise ValueError(
        f'config field "model_type" must be one of {", ".join(MODEL_TYPES)}, '
        f"got {model_type!r}."
      )
    return cls(
      backbone=language_models.CONFIGS[model_type].from_hf(config),
      labels=labels_from_hf(config),
      problem_type=config.get("problem_type"),
    )

  def to_hf(self) -> dict[str, Any]:
    """Returns the content of a config.json that describes this model.

    Returns:
      JSON-serialisable fields.
    """
    config = self.backbone.to_hf()
    model_type, name = config["model_type"], config["architectures"][0]
    if model_type not in MODEL_TYPES:
      raise ValueError(f"transformers has no classifier of a {model_type}.")
    usual = name.replace("ForCausalLM", "ForSequenceClassification")
    config["architectures"] = [_ARCHITECTURES.get(model_type, usual)]
    return {**config, **labels_to_hf(self.labels, self.problem_type)}


def labels_from_hf(config: Mapping[str, Any]) -> tuple[str, ...]:
  """Returns the names of the labels in a config.json, in order.

  Raises:
    ValueError: if the ids in `id2label` are not 0, 1, 2, ...
  """
  names = config.get("id2label")
  if not names:
    # What transformers leaves out of the file is its default: two labels.
    return default_labels(config.get("num_labels", 2))
  if not isinstance(names, Mapping):
    raise ValueError(
      f'config field "id2label" must be a JSON object, got '
      f"{fields.shown(names)}."
    )
  ids = [str(id_) for id_ in names]
  by_id = {
    int(id_): str(name)
    for id_, name in zip(ids, names.values(), strict=True)
    if id_.isdecimal() and len(id_) < 10
  }
  if len(by_id) < len(ids) or sorted(by_id) != list(range(len(by_id))):
    raise ValueError(
      'config field "id2label" must number the labels 0, 1, 2, ..., got '
      f"{', '.join(ids[:20])}."
    )
  return tuple(by_id[id_] for id_ in range(len(by_id)))


def labels_to_hf(
  labels: tuple[str, ...], problem_type: str | None
) -> dict[str, Any]:
  """Returns the fields of a config.json that name the labels."""
  return {
    "id2label": {str(id_): name for id_, name in enumerate(labels)},
    "label2id": {name: id_ for id_, name in enumerate(labels)},
    "problem_type": problem_type,
  }


def default_labels(num_labels: int) -> tuple[str, ...]:
  """Returns the names that transformers gives to unnamed labels."""
  return tuple(f"LABEL_{id_}" for id_ in range(num_labels))


def parameter_names(
  config: CausalClassifierConfig,
) -> dict[str, tuple[tuple[str, ...], bool]]:
  """Maps each Hugging Face tensor to a parameter.

  Args:
    config: the model's settings.

  Returns:
    Tensor name -> (path in `params`, whether to transpose). One entry per
    parameter of the model.
  """
  backbone = language_models.parameter_names(config.backbone)
  names = {
    name: (("backbone", *path), transpose)
    for name, (path, transpose) in backbone.items()
  }
  names["score.weight"] = (("score", "kernel"), True)
  return names


class CausalClassifier(nn.Module):
  """Computes W h of the last real token, from `backbone` and `score`."""

  config: CausalClassifierConfig

  def setup(self):
    c = self.config
    self.backbone = language_models.module(c.backbone)
    self.score = heads.LabelHead(len(c.labels), c.param_dtype)

  def __call__(self, ids: Array, mask: Array) -> Array:
    """Computes the logits of whole texts.

    The last token is found by the mask. transformers looks for the last id
    that is not `pad_token_id`, which is another token if a text ends in the
    padding token itself.

    Args:
      ids: `[B, S]` int32.
      mask: `[B, S]` bool, True at real tokens; padding on either side.

    Returns:
      `[B, L]` float32, one per label.
    """
    return self.score(self.backbone(ids, mask), mask)

  def token_logits(
    self, ids: Array, mask: Array, segments: Array | None = None
  ) -> Array:
    """Computes the logits of every prefix of whole texts.

    The logits at token s are those of `__call__` for the text that ends there.

    Args:
      ids: `[B, S]` int32.
      mask: `[B, S]` bool, True at real tokens; padding on either side.
      segments: see the backbone.

    Returns:
      `[B, S, L]` float32, 0 where masked.
    """
    hidden = self.backbone(ids, mask, segments)  # [B, S, D]
    # To the head, every token is a text of its own.
    logits = self.score(
      hidden.reshape(-1, 1, hidden.shape[-1]), mask.reshape(-1, 1)
    )
    return logits.reshape(*ids.shape, -1)
