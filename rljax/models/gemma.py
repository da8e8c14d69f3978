"""Gemma, Gemma 2 and the text models of Gemma 3.

Norms whose factor is 1 + scale, an embedding scaled by √D, a feed-forward
gated by GELU. Gemma 2 and 3 norm what a block adds to the stream, too, and
most of their layers see a window; Gemma 2 caps scores and logits, Gemma 3
norms queries and keys and turns them by other angles in layers with a window.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from rljax.models import config_fields, decoder
from rljax.models import rope as rope_lib

_ARCHITECTURES = {
  "gemma": "GemmaForCausalLM",
  "gemma2": "Gemma2ForCausalLM",
  "gemma3_text": "Gemma3ForCausalLM",
}
_POST_NORMS = {
  "attention_output_norm": "post_attention_layernorm",
  "post_attention_layernorm": "pre_feedforward_layernorm",
  "mlp_output_norm": "post_feedforward_layernorm",
}
# What transformers takes for a field that is not there.
_DEFAULTS = {
  "head_dim": 256,
  "hidden_act": "gelu_pytorch_tanh",
  "hidden_activation": "gelu_pytorch_tanh",
  "initializer_range": 0.02,
  "rms_norm_eps": 1e-6,
  "pad_token_id": 0,
  "eos_token_id": 1,
  "bos_token_id": 2,
  "tie_word_embeddings": True,
  "attention_bias": False,
  "query_pre_attn_scalar": 256,
  "sliding_window": 4096,
}
_SOFTCAPS = {
  "gemma2": {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
  "gemma3_text": {
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
  },
}
# Every so many layers, one of Gemma 2 and 3 sees the whole text.
_PATTERN = {"gemma2": 2, "gemma3_text": 6}
_GLOBAL_THETA, _LOCAL_THETA = 1_000_000.0, 10_000.0


@dataclasses.dataclass(frozen=True)
class GemmaConfig(decoder.DecoderConfig):
  """Holds the settings of a decoder as `from_hf` reads them."""

  @property
  def architecture(self) -> str:
    return _ARCHITECTURES[self.model_type]

  @property
  def names(self) -> Mapping[str, str]:
    return _POST_NORMS if self.post_norm else {}

  @classmethod
  def from_hf(cls, config: Mapping[str, Any]) -> "GemmaConfig":
    """Reads the content of a config.json; see `decoder.DecoderConfig`."""
    model_type = config.get("model_type")
    defaults = _DEFAULTS | _SOFTCAPS.get(model_type, {})
    read = config_fields.Reader(config, tuple(_ARCHITECTURES), defaults)
    config = read.config
    read.only(use_bidirectional_attention=(None, False))
    settings = {
      **read.shared(),
      "num_kv_heads": read["num_key_value_heads"],
      "head_dim": read["head_dim"],
      "norm_eps": read["rms_norm_eps"],
      "initializer_range": read["initializer_range"],
      "qkv_bias": bool(read["attention_bias"]),
      "output_bias": bool(read["attention_bias"]),
      "norm": "rms_plus_one",
      "embedding_scale": math.sqrt(read["hidden_size"]),
    }
    if model_type == "gemma":
      activation = read.activation("hidden_act", decoder.ACTIVATIONS)
      if activation == "gelu":  # Old files name the tanh approximation so.
        activation = "gelu_pytorch_tanh"
      rope = rope_lib.Rope.from_hf(config)
      return cls(**settings, activation=activation, rope=rope)

    period = config.get("sliding_window_pattern", _PATTERN[model_type])
    if model_type == "gemma2":
      period = _PATTERN[model_type]  # It has no such field.
    kinds = read.layer_types(
      config_fields.SLIDING if (i + 1) % period else config_fields.FULL
      for i in range(read["num_hidden_layers"])
    )
    if model_type == "gemma3_text":
      ropes = _ropes(config)
    else:
      ropes = {"rope": rope_lib.Rope.from_hf(config)}
    return cls(
      **settings,
      **ropes,
      activation=read.activation("hidden_activation", decoder.ACTIVATIONS),
      post_norm=True,
      qk_norm="head" if model_type == "gemma3_text" else "",
      windows=read.windows(kinds),
      attention_scale=read["query_pre_attn_scalar"] ** -0.5,
      # Gemma 3 has the field, but its attention does not read it.
      attention_softcap=(
        read["attn_logit_softcapping"] if model_type == "gemma2" else None
      ),
      logits_softcap=read["final_logit_softcapping"],
    )

  def to_hf(self) -> dict[str, Any]:
    """Returns the content of a config.json that describes this model."""
    fields = {
      **config_fields.shared_fields(self),
      "num_key_value_heads": self.num_kv_heads,
      "head_dim": self.head_dim,
      "rms_norm_eps": self.norm_eps,
      "initializer_range": self.initializer_range,
      "attention_bias": self.qkv_bias,
      "attention_dropout": 0.0,
      **self.rope.to_hf(),
    }
    if self.model_type == "gemma":
      return {**fields, "hidden_act": self.activation}
    if self.local_rope is not None:
      for name in ("rope_theta", "rope_scaling"):
        fields.pop(name, None)
      fields["rope_parameters"] = {
        config_fields.FULL: fields["rope_parameters"],
        config_fields.SLIDING: self.local_rope.to_hf()["rope_parameters"],
      }
    return {
      **fields,
      "hidden_activation": self.activation,
      "query_pre_attn_scalar": round(self.attention_scale**-2),
      "layer_types": config_fields.layer_types(self),
      "sliding_window": config_fields.window(self),
      "attn_logit_softcapping": self.attention_softcap,
      "final_logit_softcapping": self.logits_softcap,
    }


def _ropes(config: Mapping[str, Any]) -> dict[str, rope_lib.Rope]:
  """Reads the rotary settings of Gemma 3, of layers without and with a window.

  They stand in "rope_parameters" by kind of layer, or in the older
  "rope_theta", "rope_scaling" and "rope_local_base_freq".
  """
  plain = {
    k: v
    for k, v in config.items()
    if k not in ("rope_parameters", "rope_scaling", "rope_theta")
  }
  kinds = (config_fields.FULL, config_fields.SLIDING)
  nested = rope_lib.by_layer_type(config, kinds)
  full = dict(nested.get(config_fields.FULL) or {})
  local = dict(nested.get(config_fields.SLIDING) or {})
  full.update(config.get("rope_scaling") or {})
  full.setdefault("rope_theta", config.get("rope_theta", _GLOBAL_THETA))
  local.setdefault(
    "rope_theta", config.get("rope_local_base_freq", _LOCAL_THETA)
  )
  read = lambda given: rope_lib.Rope.from_hf(plain | {"rope_parameters": given})
  return {"rope": read(full), "local_rope": read(local)}
