"""ModernBERT, to classify texts.

The blocks are those of `decoder`, over masks that let a token see what follows
it: two layers of three see a window on either side.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from rljax.models import (
  attention,
  classifier,
  config_fields,
  decoder,
  linear,
  remat,
)
from rljax.models import rope as rope_lib

Array = jax.Array

# What transformers takes for a field that is not there.
_DEFAULTS = {
  "hidden_activation": "gelu",
  "initializer_range": 0.02,
  "norm_eps": 1e-5,
  "norm_bias": False,
  "pad_token_id": 50283,
  "eos_token_id": 50282,
  "bos_token_id": 50281,
  "attention_bias": False,
  "local_attention": 128,
  "mlp_bias": False,
  "classifier_pooling": "cls",
  "classifier_bias": False,
  "classifier_activation": "gelu",
  "tie_word_embeddings": True,
}
_THETAS = {
  config_fields.FULL: ("global_rope_theta", 160_000.0),
  config_fields.SLIDING: ("local_rope_theta", 10_000.0),
}


@dataclasses.dataclass(frozen=True)
class ModernBertConfig(decoder.DecoderConfig):
  """Holds the settings of the blocks, and of the head.

  Attributes:
    windows: how far a token sees on either side, per layer; None: the text.
    labels: names of the labels, in the order of the logits.
    problem_type: kept for `to_hf`; what transformers trains it for.
    pooling: "cls", the head reads the first token, or "mean", their mean.
    head_bias: whether the first layer of the head has a bias.
    head_activation: of that layer.
  """

  labels: tuple[str, ...] = ("LABEL_0", "LABEL_1")
  problem_type: str | None = None
  pooling: str = "cls"
  head_bias: bool = False
  head_activation: str = "gelu"
  causal: ClassVar[bool] = False
  architecture: ClassVar[str] = "ModernBertForSequenceClassification"
  names: ClassVar[Mapping[str, str]] = {
    "embed_tokens": "embeddings.tok_embeddings",
    "norm": "final_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "mlp_norm",
    "self_attn.qkv_proj": "attn.Wqkv",
    "self_attn.o_proj": "attn.Wo",
    "mlp.gate_up_proj": "mlp.Wi",
    "mlp.down_proj": "mlp.Wo",
  }

  @property
  def type_vocab_size(self) -> int:
    return 0  # There are no token types.

  @classmethod
  def from_hf(cls, config: Mapping[str, Any]) -> "ModernBertConfig":
    """Reads the content of a config.json; see `decoder.DecoderConfig`."""
    read = config_fields.Reader(config, ("modernbert",), _DEFAULTS)
    config = read.config
    read.only(classifier_pooling=("cls", "mean"))
    every = config.get("global_attn_every_n_layers", 3)
    kinds = read.layer_types(
      config_fields.SLIDING if i % every else config_fields.FULL
      for i in range(read["num_hidden_layers"])
    )
    reach = read["local_attention"] // 2
    return cls(
      **read.shared(),
      rope=_rope(config, config_fields.FULL),
      local_rope=_rope(config, config_fields.SLIDING),
      windows=config_fields.shortest(
        reach if kind == config_fields.SLIDING else None for kind in kinds
      ),
      norm="layer",
      norm_bias=bool(read["norm_bias"]),
      first_norm=False,
      norm_eps=read["norm_eps"],
      activation=read.activation("hidden_activation", decoder.ACTIVATIONS),
      qkv_layout="joined",
      gate_up_joined=True,
      qkv_bias=bool(read["attention_bias"]),
      output_bias=bool(read["attention_bias"]),
      mlp_bias=bool(read["mlp_bias"]),
      initializer_range=read["initializer_range"],
      labels=classifier.labels_from_hf(config),
      problem_type=config.get("problem_type"),
      pooling=read["classifier_pooling"],
      head_bias=bool(read["classifier_bias"]),
      head_activation=read.activation(
        "classifier_activation", decoder.ACTIVATIONS
      ),
    )

  def to_hf(self) -> dict[str, Any]:
    """Returns the content of a config.json that describes this model."""
    reach = config_fields.window(self)
    ropes = zip(_THETAS, (self.rope, self.local_rope), strict=True)
    fields = {
      **config_fields.shared_fields(self),
      "rope_parameters": {
        kind: rope.to_hf()["rope_parameters"] for kind, rope in ropes
      },
      "global_rope_theta": self.rope.theta,
      "local_rope_theta": self.local_rope.theta,
      "layer_types": config_fields.layer_types(self),
      "local_attention": 128 if reach is None else 2 * reach,
      "norm_eps": self.norm_eps,
      "norm_bias": self.norm_bias,
      "hidden_activation": self.activation,
      "attention_bias": self.qkv_bias,
      "mlp_bias": self.mlp_bias,
      "attention_dropout": 0.0,
      "embedding_dropout": 0.0,
      "mlp_dropout": 0.0,
      "classifier_dropout": 0.0,
      "classifier_pooling": self.pooling,
      "classifier_bias": self.head_bias,
      "classifier_activation": self.head_activation,
      "initializer_range": self.initializer_range,
      **classifier.labels_to_hf(self.labels, self.problem_type),
    }
    fields.pop("use_cache")
    return fields


def _rope(config: Mapping[str, Any], kind: str) -> rope_lib.Rope:
  """Reads the rotary settings of one kind of layer."""
  kinds = (config_fields.FULL, config_fields.SLIDING)
  nested = rope_lib.by_layer_type(config, kinds)
  given = dict(nested.get(kind) or {})
  given.update(config.get("rope_scaling") or {})
  name, theta = _THETAS[kind]
  given.setdefault("rope_theta", config.get(name, theta))
  length = {"max_position_embeddings": config.get("max_position_embeddings")}
  return rope_lib.Rope.from_hf({**length, "rope_parameters": given})


def parameter_names(config: ModernBertConfig) -> decoder.Names:
  """Maps each Hugging Face tensor to a parameter; see `decoder`."""
  names = decoder.parameter_names(config)
  norms = {"model.embeddings.norm": "embedding_norm", "head.norm": "head_norm"}
  for theirs, ours in norms.items():
    names[f"{theirs}.weight"] = ((ours, "scale"), False)
    if config.norm_bias:
      names[f"{theirs}.bias"] = ((ours, "bias"), False)
  denses = {"head.dense": ("head_dense", config.head_bias)}
  denses["classifier"] = ("classifier", True)
  for theirs, (ours, bias) in denses.items():
    names[f"{theirs}.weight"] = ((ours, "kernel"), True)
    if bias:
      names[f"{theirs}.bias"] = ((ours, "bias"), False)
  return names


class ModernBert(nn.Module):
  """Classifies texts; `params` is a plain nested dict, one entry per layer."""

  config: ModernBertConfig

  def setup(self):
    c = self.config
    self.embed_tokens = linear.embed(c, c.vocab_size, c.hidden_size)
    self.embedding_norm = decoder.make_norm(c)
    block = remat.block(decoder.Block, c.remat)
    self.layers = [block(c, i) for i in range(c.num_layers)]
    self.norm = decoder.make_norm(c)
    in_float32 = dataclasses.replace(c, dtype="float32")
    self.head_dense = linear.dense(in_float32, c.hidden_size, c.head_bias)
    self.head_norm = decoder.make_norm(c)
    self.classifier = linear.dense(in_float32, len(c.labels))

  def __call__(self, ids: Array, mask: Array) -> Array:
    """Computes the logits of whole texts.

    Args:
      ids: `[B, S]` int32.
      mask: `[B, S]` bool, True at real tokens; padding on either side.

    Returns:
      `[B, L]` float32, one per label. For a row without a real token they are
      finite but meaningless.
    """
    chex.assert_rank([ids, mask], 2)
    chex.assert_equal_shape([ids, mask])
    chex.assert_type([ids, mask], [int, bool])
    c = self.config
    x = self.embedding_norm(self.embed_tokens(ids).astype(c.dtype))
    angles = decoder.layer_angles(c, attention.positions(mask))
    for i, layer in enumerate(self.layers):
      x, _ = layer(x, angles[i], mask)
    x = self.norm(x)

    if c.pooling == "cls":
      first = jnp.argmax(mask, axis=1)  # [B]
      x = jnp.take_along_axis(x, first[:, None, None], axis=1)[:, 0]
      x = x.astype(jnp.float32)
    else:
      total = jnp.sum(
        jnp.where(mask[:, :, None], x.astype(jnp.float32), 0), axis=1
      )
      count = jnp.sum(mask, axis=1, dtype=jnp.float32)[:, None]
      x = total / jnp.maximum(count, 1)
    activation = decoder.ACTIVATIONS[c.head_activation]
    return self.classifier(self.head_norm(activation(self.head_dense(x))))
