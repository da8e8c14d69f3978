"""Rotary position embeddings and their context-length scalings."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rljax.models import fields

Array = jax.Array

_FIELDS = {
  "default": (),
  "linear": ("factor",),
  "llama3": (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
  ),
  "yarn": (
    "factor",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "truncate",
    "original_max_position_embeddings",
  ),
  "longrope": (
    "factor",
    "attention_factor",
    "short_factor",
    "long_factor",
    "original_max_position_embeddings",
  ),
}
# Fields that may be missing, per type.
_OPTIONAL = {
  "yarn": ("attention_factor", "beta_fast", "beta_slow", "truncate"),
  "longrope": ("factor", "attention_factor"),
}


_KNOWN = {name for names in _FIELDS.values() for name in names} | {
  *("rope_type", "type", "rope_theta", "partial_rotary_factor"),
  *("mscale", "mscale_all_dim", "finetuned", "max_position_embeddings"),
}


@dataclasses.dataclass(frozen=True)
class Rope:
  """Holds rotary embedding settings, named as in Hugging Face configs.

  Attributes:
    theta: base of the wavelengths.
    rope_type: "default", "linear", "llama3", "yarn" or "longrope".
    factor: how much longer than in pretraining the context is.
    low_freq_factor: llama3: wavelengths above original / low are stretched.
    high_freq_factor: llama3: wavelengths below original / high are kept.
    original_max_position_embeddings: llama3, yarn, longrope: pretraining
      context.
    attention_factor: yarn, longrope: scale of cos and sin; None: yarn takes
      0.1 ln(factor) + 1, longrope √(1 + ln(factor) / ln(original)).
    beta_fast: yarn: from this many turns over the context, frequencies stay.
    beta_slow: yarn: up to this many turns, frequencies are divided by factor.
    truncate: yarn: round the ends of the ramp outwards to whole dimensions.
    short_factor: longrope: what divides each frequency, in texts up to the
      pretraining context.
    long_factor: longrope: the same in longer texts; kept for `to_hf`.
    partial: share of a head's dimensions that turn, the first of them.
  """

  theta: float = 10_000.0
  rope_type: str = "default"
  factor: float = 1.0
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  original_max_position_embeddings: int = 0
  attention_factor: float | None = None
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  truncate: bool = True
  short_factor: tuple[float, ...] = ()
  long_factor: tuple[float, ...] = ()
  partial: float = 1.0

  @classmethod
  def from_hf(
    cls,
    config: Mapping[str, Any],
    *,
    theta: float = 10_000.0,
    partial: float | None = None,
    types: tuple[str, ...] = ("default", "linear", "llama3", "yarn"),
  ) -> "Rope":
    """Reads `rope_parameters`, or the older `rope_theta`/`rope_scaling`.

    Args:
      config: content of a config.json.
      theta: of the family, where the config gives none.
      partial: share of the dimensions that turn in the family, where the
        config gives none; None: its models turn all of them, always.
      types: the values of `rope_type` that the family knows.

    Returns:
      The settings.

    Raises:
      ValueError: if the scaling is of a kind that is not implemented or one of
        its fields is missing.
    """
    source = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    given = _one_for_all_layers(source, config)
    rope_type = given.get("rope_type", given.get("type", "default"))
    if not isinstance(rope_type, str) or rope_type not in types:
      raise ValueError(
        f'config field "{source}": rope_type "{fields.shown(rope_type)}" is '
        f"not supported, only {', '.join(types)}."
      )
    unknown = [str(name) for name in given if name not in _KNOWN]
    if unknown:
      raise ValueError(
        f'config field "{source}": {", ".join(unknown)} is not supported; '
        f"known are {', '.join(sorted(_KNOWN))}."
      )
    share = given.get(
      "partial_rotary_factor", config.get("partial_rotary_factor")
    )
    if share is None:
      share = 1.0 if partial is None else partial
    fields.number("partial_rotary_factor", share, above=0)
    if share > 1 or (partial is None and share != 1):
      allowed = "1" if partial is None else "at most 1"
      raise ValueError(
        f'config field "partial_rotary_factor" must be {allowed}, got {share}.'
      )
    if given.get("mscale") or given.get("mscale_all_dim"):
      raise ValueError(
        f'config field "{source}": "mscale" is not supported; give '
        '"attention_factor".'
      )
    base = given.get("rope_theta")
    if base is None:
      base = config.get("rope_theta")
    if base is None:
      base = theta
    values = {"theta": float(fields.number("rope_theta", base, above=1))}
    values["partial"] = float(share)
    if "original_max_position_embeddings" in _FIELDS[rope_type]:
      # Some configs have it beside the dict too; that one takes precedence.
      for length in (
        config.get("original_max_position_embeddings"),
        given.get("original_max_position_embeddings"),
        config.get("max_position_embeddings"),
      ):
        if length is not None:
          values["original_max_position_embeddings"] = fields.whole(
            "original_max_position_embeddings", length, most=2**40
          )
          break
    for name in _FIELDS[rope_type]:
      if name in values:
        continue
      if given.get(name) is None:
        if name not in _OPTIONAL.get(rope_type, ()):
          raise ValueError(f'config field "{source}": "{name}" is missing.')
      elif name == "truncate":
        if not isinstance(given[name], bool):
          raise ValueError(
            f'config field "{source}": "truncate" must be true or false, got '
            f"{fields.shown(given[name])}."
          )
        values[name] = given[name]
      elif name in ("short_factor", "long_factor"):
        values[name] = _factors(f"{source}.{name}", given[name])
      else:
        values[name] = fields.number(f"{source}.{name}", given[name], above=0)
    if rope_type == "longrope" and "factor" not in values:
      length = values["original_max_position_embeddings"]
      values["factor"] = config["max_position_embeddings"] / length
    rope = cls(rope_type=rope_type, **values)
    if rope_type == "llama3" and not (
      rope.low_freq_factor < rope.high_freq_factor
    ):
      raise ValueError(
        f'config field "{source}": "low_freq_factor" must be below '
        f'"high_freq_factor", got {rope.low_freq_factor} and '
        f"{rope.high_freq_factor}."
      )
    return rope

  def to_hf(self) -> dict[str, Any]:
    """Returns the fields that `from_hf` reads, in the new and the old form."""
    scaling = {
      name: getattr(self, name)
      for name in _FIELDS[self.rope_type]
      if getattr(self, name) is not None
    }
    scaling = {"rope_type": self.rope_type, **scaling}
    for name in ("short_factor", "long_factor"):
      if name in scaling:
        scaling[name] = list(scaling[name])
    parameters = {"rope_theta": self.theta, **scaling}
    written = {"rope_parameters": parameters, "rope_theta": self.theta}
    if self.partial != 1:
      parameters["partial_rotary_factor"] = self.partial
      written["partial_rotary_factor"] = self.partial
    if self.rope_type != "default":
      written["rope_scaling"] = scaling
    return written


def rotary_dim(rope: Rope, head_dim: int) -> int:
  """Returns how many of the dimensions of a head turn."""
  return int(head_dim * rope.partial)


def frequencies(rope: Rope, head_dim: int) -> tuple[np.ndarray, float]:
  """Computes the angle per position of each pair of dimensions.

    ω_i = θ^(-2i/d)   ("default"; the other types lower some of them)

  Args:
    rope: the settings.
    head_dim: d. Of the first `partial` d dimensions, an even number, d stands
      for that number below.

  Returns:
    `[d / 2]` float32 and the factor of cos and sin.

  Source:
    Su et al. (2021), "RoFormer"; Chen et al. (2023), "Extending Context
    Window of Large Language Models via Positional Interpolation" (linear);
    Peng et al. (2023), "YaRN", section 3; llama3 as in Meta's Llama 3.1.
  """
  head_dim = rotary_dim(rope, head_dim)
  omega = rope.theta ** (
    -np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
  )
  attention_factor = 1.0
  if rope.rope_type == "linear":
    omega = omega / rope.factor
  elif rope.rope_type == "llama3":
    turns = rope.original_max_position_embeddings * omega / (2 * math.pi)
    kept = (turns - rope.low_freq_factor) / (
      rope.high_freq_factor - rope.low_freq_factor
    )
    omega = _blend(omega, omega / rope.factor, kept)
  elif rope.rope_type == "yarn":
    low, high = (
      _dimension_with_turns(rope, head_dim, turns)
      for turns in (rope.beta_fast, rope.beta_slow)
    )
    if rope.truncate:
      low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = (np.arange(head_dim // 2) - low) / max(high - low, 1e-3)
    omega = _blend(omega, omega / rope.factor, 1 - ramp)
    attention_factor = rope.attention_factor
    if attention_factor is None:
      attention_factor = 0.1 * math.log(max(rope.factor, 1.0)) + 1.0
  elif rope.rope_type == "longrope":
    omega = omega / np.asarray(rope.short_factor, np.float64)
    attention_factor = rope.attention_factor
    if attention_factor is None:
      length = rope.original_max_position_embeddings
      growth = math.log(max(rope.factor, 1.0)) / math.log(length)
      attention_factor = math.sqrt(1 + growth)
  return omega.astype(np.float32), float(attention_factor)


def angles(positions: Array, rope: Rope, head_dim: int) -> tuple[Array, Array]:
  """Computes cosines and sines of the rotation at each position.

  Args:
    positions: `[...]` int32.
    rope: the settings.
    head_dim: d.

  Returns:
    cos and sin, `[..., r / 2]` float32, r the dimensions that turn.
  """
  omega, factor = frequencies(rope, head_dim)
  angle = jnp.multiply(
    positions.astype(jnp.float32)[..., None],
    omega.reshape((1,) * positions.ndim + (-1,)),
  )
  return jnp.cos(angle) * factor, jnp.sin(angle) * factor


def rotate(x: Array, cos: Array, sin: Array) -> Array:
  """Rotates the pairs (i, i + r/2) of each head by their angles.

  Args:
    x: `[..., H, d]` float.
    cos: `[..., r / 2]` float32, the same for all heads. Dimensions from r on
      stay as they are.
    sin: `[..., r / 2]` float32.

  Returns:
    `[..., H, d]` in the dtype of `x`.
  """
  turning = 2 * cos.shape[-1]
  if turning < x.shape[-1]:
    turned = rotate(x[..., :turning], cos, sin)
    return jnp.concatenate([turned, x[..., turning:]], axis=-1)
  cos, sin = cos[..., None, :], sin[..., None, :]
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  turned = jnp.concatenate(
    [first * cos - second * sin, second * cos + first * sin], axis=-1
  )
  return turned.astype(x.dtype)


def _factors(name: str, value: Any) -> tuple[float, ...]:
  """Returns a list of positive numbers as a tuple."""
  if not isinstance(value, list | tuple):
    raise ValueError(
      f'config field "{name}" must be a list of numbers, got '
      f"{fields.shown(value)}."
    )
  return tuple(fields.number(name, one, above=0) for one in value)


def by_layer_type(
  config: Mapping[str, Any], kinds: tuple[str, ...]
) -> Mapping[str, Any]:
  """Returns `rope_parameters` of a model whose kinds of layers have their own.

  Args:
    config: content of a config.json.
    kinds: of layers, which are the names that may stand there.

  Raises:
    ValueError: if anything else stands there, such as settings for all layers,
      which transformers would not use.
  """
  nested = _settings("rope_parameters", config)
  for name, value in nested.items():
    if name not in kinds or not isinstance(value, Mapping | None):
      raise ValueError(
        'config field "rope_parameters" must have an object for each of '
        f"{', '.join(kinds)}, got {fields.shown(name)}: {fields.shown(value)}."
      )
  return nested


def _one_for_all_layers(
  source: str, config: Mapping[str, Any]
) -> dict[str, Any]:
  """Returns settings that stand in one object, or in one per type of layer.

  Raises:
    ValueError: if layers differ.
  """
  given = _settings(source, config)
  kinds = {name: v for name, v in given.items() if isinstance(v, Mapping)}
  if not kinds:
    return dict(given)
  used = config.get("layer_types") or list(kinds)
  several = [kinds[name] for name in dict.fromkeys(used) if name in kinds]
  is_whole = len(several) == len(set(used)) and len(kinds) == len(given)
  if not is_whole or any(one != several[0] for one in several):
    raise ValueError(
      f'config field "{source}" has settings of its own for '
      f"{', '.join(map(str, kinds))}; only one for all layers is supported."
    )
  return dict(several[0])


def _settings(source: str, config: Mapping[str, Any]) -> Mapping[str, Any]:
  """Returns the object `source`, of one by type of layer what sets something.

  transformers before 5.18 writes `"rope_type": "default", "rope_theta": null`
  beside the types of a ModernBERT.

  Raises:
    ValueError: if it is no object.
  """
  given = config.get(source) or {}
  if not isinstance(given, Mapping):
    raise ValueError(
      f'config field "{source}" must be a JSON object, got '
      f"{fields.shown(given)}."
    )
  if not any(isinstance(value, Mapping) for value in given.values()):
    return given
  nothing = {"rope_type": ("default", None), "rope_theta": (None,)}
  return {
    name: value
    for name, value in given.items()
    if not (name in nothing and value in nothing[name])
  }


def _blend(kept: np.ndarray, lowered: np.ndarray, share: np.ndarray):
  share = np.clip(share, 0.0, 1.0)
  return share * kept + (1 - share) * lowered


def _dimension_with_turns(rope: Rope, head_dim: int, turns: float) -> float:
  """Index (not whole) of the pair that turns so often over the context."""
  length = rope.original_max_position_embeddings
  return (
    head_dim
    * math.log(length / (turns * 2 * math.pi))
    / (2 * math.log(rope.theta))
  )
