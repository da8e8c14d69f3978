"""SmolLM3: a Llama of which every fourth layer turns nothing."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from rljax.models import config_fields, decoder
from rljax.models import rope as rope_lib

# What transformers takes for a field that is not there.
_DEFAULTS = {
  "num_key_value_heads": 4,
  "initializer_range": 0.02,
  "rms_norm_eps": 1e-6,
  "pad_token_id": 128004,
  "bos_token_id": 128000,
  "eos_token_id": 128001,
  "sliding_window": None,
  "no_rope_layers": None,
  "no_rope_layer_interval": 4,
  "attention_bias": False,
  "mlp_bias": False,
  "tie_word_embeddings": True,
}


@dataclasses.dataclass(frozen=True)
class SmolLM3Config(decoder.DecoderConfig):
  """Holds the settings of a decoder as `from_hf` reads them."""

  architecture: ClassVar[str] = "SmolLM3ForCausalLM"

  @classmethod
  def from_hf(cls, config: Mapping[str, Any]) -> "SmolLM3Config":
    """Reads the content of a config.json; see `decoder.DecoderConfig`."""
    read = config_fields.Reader(config, ("smollm3",), _DEFAULTS)
    config = read.config
    read.only(hidden_act=("silu", "swish"))
    num_layers, every = (
      read["num_hidden_layers"],
      read["no_rope_layer_interval"],
    )
    turning = read["no_rope_layers"]  # It says 1 for layers that do turn.
    if turning is None:
      turning = [(i + 1) % every != 0 for i in range(num_layers)]
    if len(turning) != num_layers:
      raise ValueError(
        f'config field "no_rope_layers" must have a number for each of the '
        f"{num_layers} layers, got {len(turning)}."
      )
    kinds = [config_fields.FULL] * num_layers
    if config.get("use_sliding_window", False) and read["sliding_window"]:
      kinds = read.layer_types(
        config_fields.FULL if turns else config_fields.SLIDING
        for turns in turning
      )
    return cls(
      **read.shared(),
      num_kv_heads=read["num_key_value_heads"],
      head_dim=config.get("head_dim"),
      rope=rope_lib.Rope.from_hf(config, theta=2_000_000.0),
      rope_layers=config_fields.shortest(map(bool, turning)),
      windows=read.windows(kinds),
      norm_eps=read["rms_norm_eps"],
      qkv_bias=bool(read["attention_bias"]),
      output_bias=bool(read["attention_bias"]),
      mlp_bias=bool(read["mlp_bias"]),
      initializer_range=read["initializer_range"],
    )

  def to_hf(self) -> dict[str, Any]:
    """Returns the content of a config.json that describes this model."""
    turning = config_fields.per_layer(self.rope_layers, self.num_layers)
    return {
      **config_fields.shared_fields(self),
      "num_key_value_heads": self.num_kv_heads,
      "head_dim": self.head_dim,
      **self.rope.to_hf(),
      "no_rope_layers": [int(turns) for turns in turning],
      "use_sliding_window": config_fields.window(self) is not None,
      "sliding_window": config_fields.window(self),
      "layer_types": config_fields.layer_types(self),
      "rms_norm_eps": self.norm_eps,
      "hidden_act": "silu",
      "attention_bias": self.qkv_bias,
      "mlp_bias": self.mlp_bias,
      "attention_dropout": 0.0,
      "initializer_range": self.initializer_range,
    }
