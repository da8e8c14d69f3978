"""Phi-3 and Phi-4-mini: a Llama with joined layers, and LongRoPE.

LongRoPE has two sets of frequencies, for texts up to the pretraining context
and for longer ones. transformers chooses by the longest text of a batch, so
that a text's numbers depend on its neighbours; here texts end at the
pretraining context (`max_positions`), and the short set is the one in use.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from rljax.models import config_fields, decoder
from rljax.models import rope as rope_lib

# What transformers takes for a field that is not there.
_DEFAULTS = {
  "num_key_value_heads": None,
  "hidden_act": "silu",
  "max_position_embeddings": 4096,
  "original_max_position_embeddings": 4096,
  "initializer_range": 0.02,
  "rms_norm_eps": 1e-5,
  "bos_token_id": 1,
  "eos_token_id": 32000,
  "pad_token_id": 32000,
  "tie_word_embeddings": False,
  "sliding_window": None,
}


@dataclasses.dataclass(frozen=True)
class Phi3Config(decoder.DecoderConfig):
  """Holds the settings of a decoder as `from_hf` reads them.

  Attributes:
    longest: kept for `to_hf`; the context that LongRoPE was made for.
  """

  longest: int | None = None
  architecture: ClassVar[str] = "Phi3ForCausalLM"

  @classmethod
  def from_hf(cls, config: Mapping[str, Any]) -> "Phi3Config":
    """Reads the content of a config.json; see `decoder.DecoderConfig`."""
    read = config_fields.Reader(config, ("phi3",), _DEFAULTS)
    config = read.config
    rope = _rope(read)
    shared = read.shared()
    if rope.rope_type == "longrope":
      longest = shared["max_positions"]
      shared["max_positions"] = min(
        longest, rope.original_max_position_embeddings
      )
      shared["longest"] = longest
    kinds = [config_fields.FULL]
    if read["sliding_window"] is not None:
      kinds = [config_fields.SLIDING]
    return cls(
      **shared,
      num_kv_heads=read["num_key_value_heads"],
      head_dim=config.get("head_dim"),
      rope=rope,
      windows=read.windows(kinds),
      norm_eps=read["rms_norm_eps"],
      activation=read.activation("hidden_act", decoder.ACTIVATIONS),
      qkv_layout="joined",
      gate_up_joined=True,
      initializer_range=read["initializer_range"],
    )

  def to_hf(self) -> dict[str, Any]:
    """Returns the content of a config.json that describes this model."""
    fields = {
      **config_fields.shared_fields(self),
      "num_key_value_heads": self.num_kv_heads,
      "head_dim": self.head_dim,
      **self.rope.to_hf(),
      "partial_rotary_factor": self.rope.partial,
      "sliding_window": config_fields.window(self),
      "rms_norm_eps": self.norm_eps,
      "hidden_act": self.activation,
      "attention_dropout": 0.0,
      "embd_pdrop": 0.0,
      "resid_pdrop": 0.0,
      "initializer_range": self.initializer_range,
    }
    if self.longest is not None:
      fields["max_position_embeddings"] = self.longest
      fields["original_max_position_embeddings"] = (
        self.rope.original_max_position_embeddings
      )
    return fields


def _rope(read: config_fields.Reader) -> rope_lib.Rope:
  """Reads the rotary settings, in which "su" and "yarn" are old names."""
  config = dict(read.config)
  for name in ("max_position_embeddings", "original_max_position_embeddings"):
    config[name] = read[name]
  for name in ("rope_scaling", "rope_parameters"):
    if config.get(name):
      given = dict(config[name])
      kind = given.pop("type", "default")
      kind = given.get("rope_type", kind)
      given["rope_type"] = "longrope" if kind in ("su", "yarn") else kind
      config[name] = given
  return rope_lib.Rope.from_hf(
    config, partial=1.0, types=("default", "longrope")
  )
