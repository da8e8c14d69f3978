"""OPT: learned positions, layer norms, biases, a ReLU feed-forward."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from rljax.models import config_fields, decoder

# What transformers takes for a field that is not there.
_DEFAULTS = {
  "activation_function": "relu",
  "init_std": 0.02,
  "pad_token_id": 1,
  "bos_token_id": 2,
  "eos_token_id": 2,
  "enable_bias": True,
  "tie_word_embeddings": True,
}
# The table of positions has two rows that no token takes.
_OFFSET = 2


@dataclasses.dataclass(frozen=True)
class OPTConfig(decoder.DecoderConfig):
  """Holds the settings of a decoder as `from_hf` reads them."""

  architecture: ClassVar[str] = "OPTForCausalLM"
  names: ClassVar[Mapping[str, str]] = {
    "model": "model.decoder",
    "norm": "final_layer_norm",
    "input_layernorm": "self_attn_layer_norm",
    "post_attention_layernorm": "final_layer_norm",
    "self_attn.o_proj": "self_attn.out_proj",
    "mlp.up_proj": "fc1",
    "mlp.down_proj": "fc2",
  }

  @classmethod
  def from_hf(cls, config: Mapping[str, Any]) -> "OPTConfig":
    """Reads the content of a config.json; see `decoder.DecoderConfig`."""
    read = config_fields.Reader(config, ("opt",), _DEFAULTS)
    # The 350M model alone has norms behind its sums and a narrow embedding.
    read.only(
      do_layer_norm_before=True,
      _remove_final_layer_norm=False,
      layer_norm_elementwise_affine=True,
      word_embed_proj_dim=(read["hidden_size"], None),
    )
    return cls(
      **read.shared(intermediate_size="ffn_dim"),
      rope_layers=(False,),
      learned_positions=_OFFSET,
      norm="layer",
      activation=read.activation("activation_function", decoder.ACTIVATIONS),
      gated=False,
      qkv_bias=bool(read["enable_bias"]),
      output_bias=bool(read["enable_bias"]),
      mlp_bias=bool(read["enable_bias"]),
      initializer_range=read["init_std"],
    )

  def to_hf(self) -> dict[str, Any]:
    """Returns the content of a config.json that describes this model."""
    return {
      **config_fields.shared_fields(self, intermediate_size="ffn_dim"),
      "activation_function": self.activation,
      "enable_bias": self.qkv_bias,
      "do_layer_norm_before": True,
      "layer_norm_elementwise_affine": True,
      "word_embed_proj_dim": self.hidden_size,
      "init_std": self.initializer_range,
      "dropout": 0.0,
      "attention_dropout": 0.0,
      "layerdrop": 0.0,
    }
