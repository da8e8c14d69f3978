"""Mixtral and Qwen3-MoE: decoders with mixtures of experts."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from rljax.models import config_fields, decoder
from rljax.models import rope as rope_lib

_ARCHITECTURES = {
  "mixtral": "MixtralForCausalLM",
  "qwen3_moe": "Qwen3MoeForCausalLM",
}
_MIXTRAL_NAMES = {
  "mlp.gate": "block_sparse_moe.gate",
  "mlp.experts": "block_sparse_moe.experts",
  "gate_proj": "w1",
  "up_proj": "w3",
  "down_proj": "w2",
}
# What transformers takes for a field that is not there.
_DEFAULTS = {
  "mixtral": {
    "num_key_value_heads": 8,
    "num_experts_per_tok": 2,
    "num_local_experts": 8,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "sliding_window": None,
  },
  "qwen3_moe": {
    "num_key_value_heads": 4,
    "num_experts_per_tok": 8,
    "num_experts": 128,
    "moe_intermediate_size": 768,
    "rms_norm_eps": 1e-6,
    "sliding_window": 4096,
    "decoder_sparse_step": 1,
    "mlp_only_layers": None,
    "norm_topk_prob": False,
    "attention_bias": False,
  },
}
_COMMON = {
  "hidden_act": "silu",
  "initializer_range": 0.02,
  "tie_word_embeddings": False,
  "router_aux_loss_coef": 0.001,
}


@dataclasses.dataclass(frozen=True)
class MixtralConfig(decoder.DecoderConfig):
  """Holds the settings of a decoder as `from_hf` reads them.

  Attributes:
    router_loss_coef: the weight that transformers gives to the load-balance
      loss; kept for `to_hf`, and for whoever trains the router.
  """

  router_loss_coef: float = 0.001

  @property
  def architecture(self) -> str:
    return _ARCHITECTURES[self.model_type]

  @property
  def names(self) -> Mapping[str, str]:
    return _MIXTRAL_NAMES if self.model_type == "mixtral" else {}

  @classmethod
  def from_hf(cls, config: Mapping[str, Any]) -> "MixtralConfig":
    """Reads the content of a config.json; see `decoder.DecoderConfig`."""
    model_type = config.get("model_type")
    defaults = _COMMON | _DEFAULTS.get(model_type, {})
    read = config_fields.Reader(config, tuple(_ARCHITECTURES), defaults)
    config = read.config
    is_mixtral = model_type == "mixtral"
    # Qwen3-MoE's number of experts has had both names.
    number = "num_local_experts"
    if not is_mixtral and number not in config:
      number = "num_experts"
    windowed = read["sliding_window"] is not None
    if not is_mixtral:
      windowed &= bool(config.get("use_sliding_window", False))
    kind = config_fields.SLIDING if windowed else config_fields.FULL
    settings = {
      **read.shared(),
      "num_kv_heads": read["num_key_value_heads"],
      "head_dim": config.get("head_dim"),
      "rope": rope_lib.Rope.from_hf(
        config, theta=1_000_000.0 if is_mixtral else 10_000.0
      ),
      "windows": read.windows([kind]),
      "norm_eps": read["rms_norm_eps"],
      "activation": read.activation("hidden_act", decoder.ACTIVATIONS),
      "num_experts": read[number],
      "experts_per_token": read["num_experts_per_tok"],
      "router_loss_coef": read["router_aux_loss_coef"],
      "initializer_range": read["initializer_range"],
    }
    if is_mixtral:
      return cls(**settings, expert_size=read["intermediate_size"])
    dense, step = read["mlp_only_layers"] or [], read["decoder_sparse_step"]
    sparse = (
      i not in dense and (i + 1) % step == 0
      for i in range(read["num_hidden_layers"])
    )
    return cls(
      **settings,
      expert_size=read["moe_intermediate_size"],
      sparse_layers=config_fields.shortest(sparse),
      normalise_experts=bool(read["norm_topk_prob"]),
      qk_norm="head",
      qkv_bias=bool(read["attention_bias"]),
      output_bias=bool(read["attention_bias"]),
    )

  def to_hf(self) -> dict[str, Any]:
    """Returns the content of a config.json that describes this model."""
    window = config_fields.window(self)
    fields = {
      **config_fields.shared_fields(self),
      "num_key_value_heads": self.num_kv_heads,
      "head_dim": self.head_dim,
      **self.rope.to_hf(),
      "sliding_window": window,
      "rms_norm_eps": self.norm_eps,
      "hidden_act": self.activation,
      "attention_dropout": 0.0,
      "num_experts_per_tok": self.experts_per_token,
      "router_aux_loss_coef": self.router_loss_coef,
      "output_router_logits": False,
      "initializer_range": self.initializer_range,
    }
    if self.model_type == "mixtral":
      return {**fields, "num_local_experts": self.num_experts}
    sparse = config_fields.per_layer(self.sparse_layers, self.num_layers)
    return {
      **fields,
      "num_experts": self.num_experts,
      "moe_intermediate_size": self.expert_size,
      "mlp_only_layers": [i for i, is_one in enumerate(sparse) if not is_one],
      "decoder_sparse_step": 1,
      "norm_topk_prob": self.normalise_experts,
      "use_sliding_window": window is not None,
      "attention_bias": self.qkv_bias,
    }
