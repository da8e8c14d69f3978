"""The architectures that can be loaded, by the `model_type` of their config."""

from collections.abc import Callable
from typing import Any, NamedTuple

from flax import linen as nn

from rljax.models import (
  classifier,
  decoder,
  encoder,
  gpt2,
  language_models,
  modernbert,
)


class Family(NamedTuple):
  """Holds what one architecture needs to be read, built, placed and written.

  Attributes:
    config: class of settings, with `from_hf` and `to_hf`.
    model: class of modules.
    parameter_names: config -> tensor name -> (path in params, transpose).
    partition_rules: (path pattern, PartitionSpec) pairs.
  """

  config: Any
  model: Any
  parameter_names: Callable[[Any], dict[str, tuple[tuple[str, ...], bool]]]
  partition_rules: tuple[tuple[str, Any], ...]


LANGUAGE_MODELS = {
  model_type: Family(
    config,
    gpt2.GPT2 if config is gpt2.GPT2Config else decoder.Decoder,
    language_models.parameter_names,
    (gpt2 if config is gpt2.GPT2Config else decoder).PARTITION_RULES,
  )
  for model_type, config in language_models.CONFIGS.items()
}
_CAUSAL = Family(
  classifier.CausalClassifierConfig,
  classifier.CausalClassifier,
  classifier.parameter_names,
  classifier.PARTITION_RULES,
)
_ENCODER = Family(
  encoder.EncoderConfig,
  encoder.Encoder,
  encoder.parameter_names,
  encoder.PARTITION_RULES,
)
CLASSIFIERS = {
  **dict.fromkeys(classifier.MODEL_TYPES, _CAUSAL),
  **dict.fromkeys(encoder.MODEL_TYPES, _ENCODER),
  "modernbert": Family(
    modernbert.ModernBertConfig,
    modernbert.ModernBert,
    modernbert.parameter_names,
    decoder.PARTITION_RULES,
  ),
}


def of(model: nn.Module) -> Family:
  """Returns the family of a module, or of the one that a `lora.Model` wraps.

  Raises:
    ValueError: if it has none.
  """
  model = getattr(model, "unadapted", model)
  for family in (*LANGUAGE_MODELS.values(), *CLASSIFIERS.values()):
    if isinstance(model, family.model):
      return family
  raise ValueError(f"{type(model).__name__} is not a model of rljax.models.")


def is_classifier(model: nn.Module) -> bool:
  """Returns whether a module classifies texts; else it writes them."""
  return of(model) in CLASSIFIERS.values()
