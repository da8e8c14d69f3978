"""Reads and writes what the config.json of every family has."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp

from rljax.models import fields

# Our name of a setting -> the field of config.json.
SIZES = {
  "vocab_size": "vocab_size",
  "hidden_size": "hidden_size",
  "num_layers": "num_hidden_layers",
  "num_heads": "num_attention_heads",
  "max_positions": "max_position_embeddings",
  "intermediate_size": "intermediate_size",
}
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
FULL, SLIDING = "full_attention", "sliding_attention"


class Reader:
  """Reads fields of a config.json, with the defaults of its model type.

  Attributes:
    config: the fields, as `fields.checked` returns them.
    defaults: what transformers takes for a field that is not there.
  """

  def __init__(
    self,
    config: Mapping[str, Any],
    model_types: Iterable[str],
    defaults: Mapping[str, Any],
  ):
    """Makes a reader.

    Args:
      config: content of a config.json.
      model_types: the values that `model_type` may have.
      defaults: of fields that may be missing.

    Raises:
      ValueError: if the model is of another type, or its weights are quantised.
    """
    self.config, self.defaults = fields.checked(config), defaults
    model_type = self.config.get("model_type")
    if model_type not in model_types:
      raise ValueError(
        f'config field "model_type" must be one of '
        f"{', '.join(model_types)}, got {model_type!r}."
      )

  def __getitem__(self, name: str) -> Any:
    """Returns a field or its default; raises if it has neither."""
    value = self.config.get(name)
    if value is None:
      # An explicit null is what transformers would find, too.
      value = None if name in self.config else self.defaults.get(name)
      if value is None and name not in self.defaults:
        raise ValueError(f'config field "{name}" is missing.')
    return value

  def only(self, **allowed: Any) -> None:
    """Raises unless each field has its value, or one of its values."""
    for name, values in allowed.items():
      values = values if isinstance(values, tuple) else (values,)
      found = self.config.get(name, values[0])
      if found not in values:
        texts = [
          f'"{v}"' if isinstance(v, str) else repr(v) for v in (*values, found)
        ]
        raise ValueError(
          f'config field "{name}" must be {" or ".join(texts[:-1])}, got '
          f"{texts[-1]}."
        )

  def activation(self, field: str, known: Iterable[str]) -> str:
    """Returns the name of an activation, if it is a known one."""
    found = "silu" if self[field] == "swish" else self[field]
    if found not in known:
      raise ValueError(
        f'config field "{field}" must be one of {", ".join(known)}, got '
        f'"{found}".'
      )
    return found

  def shared(self, **renamed: str) -> dict[str, Any]:
    """Returns the settings that every family has.

    Args:
      **renamed: fields of `SIZES` that have another name in this family.
    """
    sizes = {ours: self[name] for ours, name in (SIZES | renamed).items()}
    tokens = {name: self.token(name) for name in _TOKENS}
    return {
      **sizes,
      **tokens,
      "model_type": self.config["model_type"],
      "tie_word_embeddings": bool(self["tie_word_embeddings"]),
    }

  def token(self, name: str) -> int | tuple[int, ...] | None:
    """Returns a special token's id, or several as a tuple."""
    value = self.config.get(name, self.defaults.get(name))
    return tuple(value) if isinstance(value, list) else value

  def layer_types(self, missing: Iterable[str]) -> tuple[str, ...]:
    """Returns the kind of each layer, from "layer_types" or else `missing`."""
    number = self["num_hidden_layers"]
    found = tuple(self.config.get("layer_types") or missing)
    if len(found) != number or not set(found) <= {FULL, SLIDING}:
      raise ValueError(
        f'config field "layer_types" must name one of {FULL}, {SLIDING} for '
        f"each of the {number} layers, got {len(found)}: "
        f"{', '.join(map(str, dict.fromkeys(found)))}."
      )
    return found

  def windows(self, layer_types: Iterable[str]) -> tuple[int | None, ...]:
    """Returns the window of each layer, of those that have one."""
    window = self["sliding_window"]
    kinds = tuple(layer_types)
    if SLIDING in kinds and (not isinstance(window, int) or window < 1):
      raise ValueError(
        'config field "sliding_window" must be a positive number of tokens, '
        f"got {window}."
      )
    return shortest(window if kind == SLIDING else None for kind in kinds)


def shortest(pattern: Iterable[Any]) -> tuple[Any, ...]:
  """Returns one value for all layers where all have the same."""
  pattern = tuple(pattern)
  return pattern[:1] if len(set(pattern)) == 1 else pattern


def per_layer(pattern: tuple[Any, ...], num_layers: int) -> list[Any]:
  """Returns the value of each layer of a pattern that repeats."""
  return [pattern[i % len(pattern)] for i in range(num_layers)]


def layer_types(config: Any) -> list[str]:
  """Returns "layer_types" of a config's windows."""
  return [
    FULL if window is None else SLIDING
    for window in per_layer(config.windows, config.num_layers)
  ]


def window(config: Any) -> int | None:
  """Returns the one window that layers of a config have, or None."""
  return next((w for w in config.windows if w is not None), None)


def shared_fields(config: Any, **renamed: str) -> dict[str, Any]:
  """Returns the fields of a config.json that every family has.

  Args:
    config: a `decoder.DecoderConfig`.
    **renamed: fields of `SIZES` that have another name in this family.
  """
  tokens = {name: getattr(config, name) for name in _TOKENS}
  tokens = {
    k: list(v) if isinstance(v, tuple) else v for k, v in tokens.items()
  }
  return {
    "architectures": [config.architecture],
    "model_type": config.model_type,
    **{name: getattr(config, ours) for ours, name in (SIZES | renamed).items()},
    "tie_word_embeddings": config.tie_word_embeddings,
    **tokens,
    "use_cache": True,
    "dtype": jnp.dtype(config.param_dtype).name,
  }
