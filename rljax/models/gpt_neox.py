"""GPT-NeoX, the family of Pythia.

Layer norms, biases everywhere, one layer for queries, keys and values, of
which a quarter of the dimensions turn; attention and feed-forward read norms
of the same stream.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from rljax.models import config_fields, decoder
from rljax.models import rope as rope_lib

# What transformers takes for a field that is not there.
_DEFAULTS = {
  "hidden_act": "gelu",
  "initializer_range": 0.02,
  "layer_norm_eps": 1e-5,
  "bos_token_id": 0,
  "eos_token_id": 2,
  "tie_word_embeddings": False,
  "use_parallel_residual": True,
  "attention_bias": True,
  "rotary_emb_base": 10_000.0,
  "rotary_pct": 0.25,
}


@dataclasses.dataclass(frozen=True)
class GPTNeoXConfig(decoder.DecoderConfig):
  """Holds the settings of a decoder as `from_hf` reads them."""

  architecture: ClassVar[str] = "GPTNeoXForCausalLM"
  names: ClassVar[Mapping[str, str]] = {
    "model": "gpt_neox",
    "embed_tokens": "embed_in",
    "norm": "final_layer_norm",
    "lm_head": "embed_out",
    "self_attn.qkv_proj": "attention.query_key_value",
    "self_attn.o_proj": "attention.dense",
    "mlp.up_proj": "mlp.dense_h_to_4h",
    "mlp.down_proj": "mlp.dense_4h_to_h",
  }

  @classmethod
  def from_hf(cls, config: Mapping[str, Any]) -> "GPTNeoXConfig":
    """Reads the content of a config.json; see `decoder.DecoderConfig`."""
    read = config_fields.Reader(config, ("gpt_neox",), _DEFAULTS)
    config = read.config
    # These are the family's names of "rope_theta" and "partial_rotary_factor",
    # which it does not look for beside "rope_parameters".
    rope = {
      k: v
      for k, v in config.items()
      if k not in ("rope_theta", "partial_rotary_factor")
    }
    return cls(
      **read.shared(),
      rope=rope_lib.Rope.from_hf(
        rope, theta=read["rotary_emb_base"], partial=read["rotary_pct"]
      ),
      norm="layer",
      norm_eps=read["layer_norm_eps"],
      activation=read.activation("hidden_act", decoder.ACTIVATIONS),
      gated=False,
      qkv_layout="by_head",
      qkv_bias=bool(read["attention_bias"]),
      output_bias=bool(read["attention_bias"]),
      mlp_bias=True,
      parallel_residual=bool(read["use_parallel_residual"]),
      initializer_range=read["initializer_range"],
    )

  def to_hf(self) -> dict[str, Any]:
    """Returns the content of a config.json that describes this model."""
    rope = self.rope.to_hf()
    rope["rope_parameters"]["partial_rotary_factor"] = self.rope.partial
    scaling = rope.get("rope_scaling")
    if scaling:
      scaling |= rope["rope_parameters"]
    rope.pop("partial_rotary_factor", None)
    rope.pop("rope_theta")
    return {
      **config_fields.shared_fields(self),
      **rope,
      "rotary_emb_base": self.rope.theta,
      "rotary_pct": self.rope.partial,
      "layer_norm_eps": self.norm_eps,
      "hidden_act": self.activation,
      "attention_bias": self.qkv_bias,
      "use_parallel_residual": self.parallel_residual,
      "initializer_range": self.initializer_range,
      "attention_dropout": 0.0,
      "hidden_dropout": 0.0,
    }
