"""Granite: a Llama with factors of embedding, scores, residuals and logits."""

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
  "rms_norm_eps": 1e-6,
  "bos_token_id": 1,
  "eos_token_id": 2,
  "tie_word_embeddings": False,
  "attention_bias": False,
  "mlp_bias": False,
  "embedding_multiplier": 1.0,
  "logits_scaling": 1.0,
  "residual_multiplier": 1.0,
  "attention_multiplier": 1.0,
}


@dataclasses.dataclass(frozen=True)
class GraniteConfig(decoder.DecoderConfig):
  """Holds the settings of a decoder as `from_hf` reads them."""

  architecture: ClassVar[str] = "GraniteForCausalLM"

  @classmethod
  def from_hf(cls, config: Mapping[str, Any]) -> "GraniteConfig":
    """Reads the content of a config.json; see `decoder.DecoderConfig`."""
    read = config_fields.Reader(config, ("granite",), _DEFAULTS)
    config = read.config
    return cls(
      **read.shared(),
      num_kv_heads=read["num_key_value_heads"],
      head_dim=config.get("head_dim"),
      rope=rope_lib.Rope.from_hf(config),
      norm_eps=read["rms_norm_eps"],
      activation=read.activation("hidden_act", decoder.ACTIVATIONS),
      qkv_bias=bool(read["attention_bias"]),
      output_bias=bool(read["attention_bias"]),
      mlp_bias=bool(read["mlp_bias"]),
      embedding_scale=read["embedding_multiplier"],
      attention_scale=read["attention_multiplier"],
      residual_scale=read["residual_multiplier"],
      logits_scale=read["logits_scaling"],
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
      "mlp_bias": self.mlp_bias,
      "attention_dropout": 0.0,
      "embedding_multiplier": self.embedding_scale,
      "attention_multiplier": self.attention_scale,
      "residual_multiplier": self.residual_scale,
      "logits_scaling": self.logits_scale,
      "initializer_range": self.initializer_range,
    }
