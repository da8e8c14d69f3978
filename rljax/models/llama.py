"""The Llama family: Llama 2 and 3, SmolLM2, Mistral, Qwen2 and Qwen3.

Pre-norm decoder blocks: RMS norms, rotary positions, grouped key and value
heads, gated SiLU feed-forward. `model_type` says what differs: Qwen2 has
biases on q, k and v, Qwen3 norms q and k per head, and all but Llama may have
layers that see a window.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from rljax.models import config_fields, decoder
from rljax.models import rope as rope_lib

_ARCHITECTURES = {
  "llama": "LlamaForCausalLM",
  "mistral": "MistralForCausalLM",
  "qwen2": "Qwen2ForCausalLM",
  "qwen3": "Qwen3ForCausalLM",
}

# What transformers takes for a field that is not there.
_DEFAULTS = {"sliding_window": 4096, "max_window_layers": 28}


@dataclasses.dataclass(frozen=True)
class LlamaConfig(decoder.DecoderConfig):
  """Holds the architecture and precision of a model.

  Attributes:
    model_type: "llama", "mistral", "qwen2" or "qwen3"; it decides the biases
      and norms that are not said below.
    attention_bias: llama, qwen3: biases on q, k, v and o.
    mlp_bias: llama: biases in the feed-forward.
  """

  model_type: str = "llama"
  attention_bias: bool = False

  def __post_init__(self):
    if self.model_type not in _ARCHITECTURES:
      raise ValueError(
        f"model_type must be one of {', '.join(_ARCHITECTURES)}, got "
        f'"{self.model_type}".'
      )
    if self.attention_bias and self.model_type in ("mistral", "qwen2"):
      raise ValueError(f"attention_bias must be False for {self.model_type}.")
    if self.mlp_bias and self.model_type != "llama":
      raise ValueError(f"mlp_bias must be False for {self.model_type}.")
    derive = functools.partial(object.__setattr__, self)
    derive("qkv_bias", self.attention_bias or self.model_type == "qwen2")
    derive("output_bias", self.attention_bias)
    derive("qk_norm", "head" if self.model_type == "qwen3" else "")
    super().__post_init__()

  @property
  def architecture(self) -> str:
    return _ARCHITECTURES[self.model_type]

  @classmethod
  def from_hf(cls, config: Mapping[str, Any]) -> "LlamaConfig":
    """Reads the content of a config.json.

    Args:
      config: the fields, with `model_type` llama, mistral, qwen2 or qwen3.

    Returns:
      The settings, with `dtype`, `param_dtype` and `remat` at their defaults.

    Raises:
      ValueError: if a field is missing or asks for what is not implemented;
        the message names the field.
    """
    read = config_fields.Reader(config, tuple(_ARCHITECTURES), _DEFAULTS)
    config, model_type = read.config, read.config["model_type"]
    read.only(hidden_act=("silu", "swish"))

    def required(name):
      if config.get(name) is None:
        raise ValueError(f'config field "{name}" is missing.')
      return config[name]

    hidden_size = required("hidden_size")
    num_heads = required("num_attention_heads")
    num_kv_heads = config.get("num_key_value_heads")
    if "num_key_value_heads" not in config and model_type != "llama":
      required("num_key_value_heads")
    head_dim = config.get("head_dim")
    if head_dim is None and model_type == "qwen3":
      head_dim = 128
    eos_token_id = config.get("eos_token_id")
    if isinstance(eos_token_id, list):
      eos_token_id = tuple(eos_token_id)
    # Mistral and Qwen2 have no such fields and ignore what stands there.
    has_biases = model_type in ("llama", "qwen3")
    return cls(
      vocab_size=required("vocab_size"),
      hidden_size=hidden_size,
      num_layers=required("num_hidden_layers"),
      num_heads=num_heads,
      max_positions=required("max_position_embeddings"),
      num_kv_heads=num_kv_heads,
      head_dim=head_dim,
      intermediate_size=required("intermediate_size"),
      rope=rope_lib.Rope.from_hf(config),
      norm_eps=config.get("rms_norm_eps", 1e-6),
      model_type=model_type,
      attention_bias=has_biases and bool(config.get("attention_bias", False)),
      mlp_bias=model_type == "llama" and bool(config.get("mlp_bias", False)),
      windows=_windows(read),
      tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
      initializer_range=config.get("initializer_range", 0.02),
      bos_token_id=config.get("bos_token_id"),
      eos_token_id=eos_token_id,
      pad_token_id=config.get("pad_token_id"),
    )

  def to_hf(self) -> dict[str, Any]:
    """Returns the content of a config.json that describes this model.

    Returns:
      JSON-serialisable fields. RoPE settings stand in `rope_parameters` and
      once more in the older fields, for readers of either.
    """
    fields = {
      **config_fields.shared_fields(self),
      "num_key_value_heads": self.num_kv_heads,
      "head_dim": self.head_dim,
      "rms_norm_eps": self.norm_eps,
      **self.rope.to_hf(),
      "hidden_act": "silu",
      "attention_dropout": 0.0,
      "initializer_range": self.initializer_range,
    }
    if self.model_type in ("llama", "qwen3"):
      fields["attention_bias"] = self.attention_bias
    if self.model_type == "llama":
      fields["mlp_bias"] = self.mlp_bias
    else:
      fields["sliding_window"] = config_fields.window(self)
    if self.model_type in ("qwen2", "qwen3"):
      kinds = config_fields.layer_types(self)
      fields["use_sliding_window"] = config_fields.SLIDING in kinds
      if fields["use_sliding_window"]:
        fields["max_window_layers"] = kinds.index(config_fields.SLIDING)
        fields["layer_types"] = kinds
    return fields


def _windows(read: config_fields.Reader) -> tuple[int | None, ...]:
  """Returns the window of each layer of a config.json."""
  model_type, num_layers = read.config["model_type"], read["num_hidden_layers"]
  if model_type == "llama" or read["sliding_window"] is None:
    return (None,)
  if model_type == "mistral":
    return read.windows([config_fields.SLIDING])
  if not read.config.get("use_sliding_window", False):
    full = [config_fields.FULL] * num_layers
    if config_fields.SLIDING in read.layer_types(full):
      raise ValueError(
        f'config field "layer_types" names {config_fields.SLIDING}, but '
        '"use_sliding_window" is false.'
      )
    return (None,)
  first = read["max_window_layers"]
  return read.windows(
    read.layer_types(
      config_fields.SLIDING if i >= first else config_fields.FULL
      for i in range(num_layers)
    )
  )


class Llama(decoder.Decoder):
  """Decodes text; `params` is a plain nested dict, one entry per layer."""
