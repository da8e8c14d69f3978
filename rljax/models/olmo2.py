"""OLMo 2: norms behind attention and feed-forward, and of queries and keys."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from rljax.models import config_fields, decoder
from rljax.models import rope as rope_lib

# What transformers takes for a field that is not there.
_DEFAULTS = {
  "num_key_value_heads": None,
  "hidden_act": "silu",
  "initializer_range": 0.02,
  "rms_norm_eps": 1e-5,
  "pad_token_id": 1,
  "bos_token_id": None,
  "eos_token_id": 50279,
  "tie_word_embeddings": False,
  "attention_bias": False,
}


@dataclasses.dataclass(frozen=True)
class Olmo2Config(decoder.DecoderConfig):
  """Holds the settings of a decoder as `from_hf` reads them."""

  architecture: ClassVar[str] = "Olmo2ForCausalLM"
  names: ClassVar[Mapping[str, str]] = {
    "attention_output_norm": "post_attention_layernorm",
    "mlp_output_norm": "post_feedforward_layernorm",
  }

  @classmethod
  def from_hf(cls, config: Mapping[str, Any]) -> "Olmo2Config":
    """Reads the content of a config.json; see `decoder.DecoderConfig`."""
    read = config_fields.Reader(config, ("olmo2",), _DEFAULTS)
    config = read.config
    return cls(
      **read.shared(),
      num_kv_heads=read["num_key_value_heads"],
      head_dim=config.get("head_dim"),
      rope=rope_lib.Rope.from_hf(config),
      norm_eps=read["rms_norm_eps"],
      pre_norm=False,
      post_norm=True,
      qk_norm="whole",
      activation=read.activation("hidden_act", decoder.ACTIVATIONS),
      qkv_bias=bool(read["attention_bias"]),
      output_bias=bool(read["attention_bias"]),
      initializer_range=read["initializer_range"],
    )

  def to_hf(self) -> dict[str, Any]:
    """Returns the content of a config.json that describes this model."""
    return {
      **config_fields.shared_fields(self),
      "num_key_value_heads": self.num_kv_heads,
      "head_dim": self.head_dim,
      **self.rope.to_hf(),
      "rms_norm_eps": self.norm_eps,
      "hidden_act": self.activation,
      "attention_bias": self.qkv_bias,
      "attention_dropout": 0.0,
      "initializer_range": self.initializer_range,
    }
