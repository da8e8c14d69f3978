"""BERT, RoBERTa, XLM-RoBERTa, DistilBERT and ELECTRA, to classify texts.

They are the `...ForSequenceClassification` models of transformers: encoder
blocks with the norm after each sum, learned positions, and a head that reads
the first token. `model_type` says what differs: RoBERTa numbers its positions
from the padding id on, DistilBERT has no token types, ELECTRA may have a
narrow embedding, and the first layer of their heads has a ReLU or GELU instead
of tanh.

Dropout, with which the originals were trained, is not applied.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from rljax.distributed import activations
from rljax.models import attention, classifier, fields, linear, norms, remat

Array = jax.Array

# Where parameters live on a mesh: the first pattern that a path contains.
PARTITION_RULES = (
  (r"(query|key|value|up)/kernel$", P("fsdp", "tensor")),
  (r"(output|down)/kernel$", P("tensor", "fsdp")),
  (r"(query|key|value|up)/bias$", P("tensor")),
  (r"word_embeddings/embedding$", P("tensor", "fsdp")),
  (r".*", P()),
)

_ARCHITECTURES = {
  "bert": "BertForSequenceClassification",
  "roberta": "RobertaForSequenceClassification",
  "xlm-roberta": "XLMRobertaForSequenceClassification",
  "distilbert": "DistilBertForSequenceClassification",
  "electra": "ElectraForSequenceClassification",
}
MODEL_TYPES = tuple(_ARCHITECTURES)
_ROBERTAS = ("roberta", "xlm-roberta")
# What the first layer of a head does with its product; the others take tanh.
_SQUASH = {
  "distilbert": nn.relu,
  "electra": lambda x: nn.gelu(x, approximate=False),
}
_ACTIVATIONS = {
  "gelu": lambda x: nn.gelu(x, approximate=False),
  "relu": nn.relu,
}


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
  """Holds the architecture and precision of an encoder.

  Attributes:
    vocab_size: V, rows of the embedding.
    hidden_size: D.
    num_layers: number of blocks.
    num_heads: H, a divisor of D.
    intermediate_size: width of the feed-forward.
    max_positions: longest text, in tokens. A row with more real tokens than
      that gives NaN; other rows are not affected.
    model_type: "bert", "roberta", "xlm-roberta", "distilbert" or "electra".
    embedding_size: electra: width of the tables; None: D.
    type_vocab_size: number of token types; 0 for DistilBERT.
    activation: "gelu" or "relu".
    layer_norm_eps: added to the variance.
    initializer_range: standard deviation of new weights.
    labels: names of the labels, in the order of the logits.
    problem_type: kept for `to_hf`; what transformers trains it for.
    bos_token_id: kept for `to_hf`.
    eos_token_id: kept for `to_hf`; an int, or a tuple of them.
    pad_token_id: kept for `to_hf`. In RoBERTa's table of positions, the first
      `pad_token_id + 1` rows stay unused.
    dtype: of activations. Norms, softmax and the head are float32 regardless.
    param_dtype: of new parameters.
    remat: what the gradient recomputes of each block, see `DecoderConfig`.
  """

  vocab_size: int
  hidden_size: int
  num_layers: int
  num_heads: int
  intermediate_size: int
  max_positions: int
  model_type: str = "bert"
  type_vocab_size: int = 2
  activation: str = "gelu"
  layer_norm_eps: float = 1e-12
  initializer_range: float = 0.02
  labels: tuple[str, ...] = ("LABEL_0", "LABEL_1")
  embedding_size: int | None = None
  problem_type: str | None = None
  bos_token_id: int | None = None
  eos_token_id: int | tuple[int, ...] | None = None
  pad_token_id: int | None = 0
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32
  remat: str | bool = "none"

  def __post_init__(self):
    if self.model_type not in _ARCHITECTURES:
      raise ValueError(
        f"model_type must be one of {', '.join(_ARCHITECTURES)}, got "
        f'"{self.model_type}".'
      )
    if self.hidden_size % self.num_heads:
      raise ValueError(
        f"hidden_size must be divisible by the {self.num_heads} heads, got "
        f"{self.hidden_size}."
      )
    if self.activation not in _ACTIVATIONS:
      raise ValueError(
        f"activation must be one of {', '.join(_ACTIVATIONS)}, got "
        f'"{self.activation}".'
      )
    if not self.labels:
      raise ValueError("labels must name at least one label.")
    if self.model_type in _ROBERTAS and self.pad_token_id is None:
      raise ValueError(
        f"pad_token_id must be set for {self.model_type}, got None."
      )
    if self.embedding_size is None:
      object.__setattr__(self, "embedding_size", self.hidden_size)
    if self.model_type != "electra" and self.embedding_size != self.hidden_size:
      raise ValueError(
        f"embedding_size must be {self.hidden_size} for {self.model_type}, "
        f"got {self.embedding_size}."
      )
    if self.max_positions < 1:
      raise ValueError(
        f"max_positions must be positive, got {self.max_positions}."
      )
    if (self.type_vocab_size == 0) != (self.model_type == "distilbert"):
      raise ValueError(
        "type_vocab_size must be 0 for distilbert and positive for others, "
        f"got {self.type_vocab_size} for {self.model_type}."
      )

  @property
  def position_offset(self) -> int:
    """The row of the position table that the first token takes."""
    return self.pad_token_id + 1 if self.model_type in _ROBERTAS else 0

  @classmethod
  def from_hf(cls, config: Mapping[str, Any]) -> "EncoderConfig":
    """Reads the content of a config.json.

    Args:
      config: the fields, with a `model_type` as above.

    Returns:
      The settings, with `dtype`, `param_dtype` and `remat` at their defaults.

    Raises:
      ValueError: if a field is missing or asks for what is not implemented;
        the message names the field.
    """
    config = fields.checked(config)
    model_type = config.get("model_type")
    if model_type not in _ARCHITECTURES:
      raise ValueError(
        f'config field "model_type" must be one of '
        f"{', '.join(_ARCHITECTURES)}, got {model_type!r}."
      )
    only = {
      "position_embedding_type": "absolute",
      "is_decoder": False,
      "add_cross_attention": False,
    }
    for name, value in only.items():
      if config.get(name, value) != value:
        raise ValueError(
          f'config field "{name}" must be {value!r}, got {config[name]!r}.'
        )

    def required(name):
      if config.get(name) is None:
        raise ValueError(f'config field "{name}" is missing.')
      return config[name]

    is_distilbert = model_type == "distilbert"
    names = _FIELDS["distilbert" if is_distilbert else "bert"]
    activation = config.get(names["activation"], "gelu")
    if activation not in _ACTIVATIONS:
      raise ValueError(
        f'config field "{names["activation"]}" must be one of '
        f'{", ".join(_ACTIVATIONS)}, got "{activation}".'
      )
    is_roberta = model_type in _ROBERTAS
    pad_token_id = config.get("pad_token_id", int(is_roberta))
    if is_roberta and pad_token_id is None:
      raise ValueError('config field "pad_token_id" is missing.')
    rows = required("max_position_embeddings")
    ends = config.get("eos_token_id")
    if isinstance(ends, list):
      ends = tuple(ends)
    return cls(
      vocab_size=required("vocab_size"),
      hidden_size=required(names["hidden_size"]),
      num_layers=required(names["num_layers"]),
      num_heads=required(names["num_heads"]),
      intermediate_size=required(names["intermediate_size"]),
      max_positions=rows - (pad_token_id + 1 if is_roberta else 0),
      model_type=model_type,
      embedding_size=(
        config.get("embedding_size", 128) if model_type == "electra" else None
      ),
      type_vocab_size=0 if is_distilbert else config.get("type_vocab_size", 2),
      activation=activation,
      # DistilBERT has no such field.
      layer_norm_eps=(
        1e-12 if is_distilbert else config.get("layer_norm_eps", 1e-12)
      ),
      initializer_range=config.get("initializer_range", 0.02),
      labels=classifier.labels_from_hf(config),
      problem_type=config.get("problem_type"),
      bos_token_id=config.get("bos_token_id"),
      eos_token_id=ends,
      pad_token_id=pad_token_id,
    )

  def to_hf(self) -> dict[str, Any]:
    """Returns the content of a config.json that describes this model.

    Returns:
      JSON-serialisable config.

    Raises:
      ValueError: if there is no field for a setting.
    """
    is_distilbert = self.model_type == "distilbert"
    if is_distilbert and self.layer_norm_eps != 1e-12:
      raise ValueError(
        "layer_norm_eps must be 1e-12 for distilbert, whose config.json has "
        f"no field for it, got {self.layer_norm_eps}."
      )
    names = _FIELDS["distilbert" if is_distilbert else "bert"]
    config = {
      "architectures": [_ARCHITECTURES[self.model_type]],
      "model_type": self.model_type,
      "vocab_size": self.vocab_size,
      **{theirs: getattr(self, ours) for ours, theirs in names.items()},
      "max_position_embeddings": self.max_positions + self.position_offset,
      "initializer_range": self.initializer_range,
      **classifier.labels_to_hf(self.labels, self.problem_type),
      "bos_token_id": self.bos_token_id,
      "eos_token_id": list(self.eos_token_id)
      if isinstance(self.eos_token_id, tuple)
      else self.eos_token_id,
      "pad_token_id": self.pad_token_id,
      "dtype": jnp.dtype(self.param_dtype).name,
    }
    if is_distilbert:
      dropouts = ("dropout", "attention_dropout", "seq_classif_dropout")
    else:
      dropouts = ("hidden_dropout_prob", "attention_probs_dropout_prob")
      config["type_vocab_size"] = self.type_vocab_size
      config["layer_norm_eps"] = self.layer_norm_eps
      config["position_embedding_type"] = "absolute"
    if self.model_type == "electra":
      config["embedding_size"] = self.embedding_size
    return {**config, **dict.fromkeys(dropouts, 0.0)}


# Our name of a setting -> the field of config.json.
_FIELDS = {
  "bert": {
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "activation": "hidden_act",
  },
  "distilbert": {
    "hidden_size": "dim",
    "num_layers": "n_layers",
    "num_heads": "n_heads",
    "intermediate_size": "hidden_dim",
    "activation": "activation",
  },
}

# Path in a block's params -> name of a layer in the file.
_BLOCK_NAMES = {
  "bert": {
    "attention/query": "attention.self.query",
    "attention/key": "attention.self.key",
    "attention/value": "attention.self.value",
    "attention/output": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "feed_forward/up": "intermediate.dense",
    "feed_forward/down": "output.dense",
    "feed_forward_norm": "output.LayerNorm",
  },
  "distilbert": {
    "attention/query": "attention.q_lin",
    "attention/key": "attention.k_lin",
    "attention/value": "attention.v_lin",
    "attention/output": "attention.out_lin",
    "attention_norm": "sa_layer_norm",
    "feed_forward/up": "ffn.lin1",
    "feed_forward/down": "ffn.lin2",
    "feed_forward_norm": "output_layer_norm",
  },
}
_TWO_LAYERS = {
  "pooler": "classifier.dense",
  "classifier": "classifier.out_proj",
}
_HEAD_NAMES = {
  "bert": {"pooler": "bert.pooler.dense", "classifier": "classifier"},
  "roberta": _TWO_LAYERS,
  "xlm-roberta": _TWO_LAYERS,
  "electra": _TWO_LAYERS,
  "distilbert": {"pooler": "pre_classifier", "classifier": "classifier"},
}


def parameter_names(
  config: EncoderConfig,
) -> dict[str, tuple[tuple[str, ...], bool]]:
  """Maps each Hugging Face tensor to a parameter.

  Args:
    config: the model's settings.

  Returns:
    Tensor name -> (path in `params`, whether to transpose). One entry per
    parameter of the model.
  """
  is_distilbert = config.model_type == "distilbert"
  prefix = "roberta" if config.model_type in _ROBERTAS else config.model_type
  names = {}
  tables = ["word_embeddings", "position_embeddings"]
  if config.type_vocab_size:
    tables.append("token_type_embeddings")
  for table in tables:
    path = (table, "embedding")
    names[f"{prefix}.embeddings.{table}.weight"] = (path, False)

  def add(theirs, ours):
    is_norm = ours[-1].endswith("_norm")
    weight = "scale" if is_norm else "kernel"
    names[f"{theirs}.weight"] = ((*ours, weight), not is_norm)
    names[f"{theirs}.bias"] = ((*ours, "bias"), False)

  add(f"{prefix}.embeddings.LayerNorm", ("embedding_norm",))
  if config.embedding_size != config.hidden_size:
    add(f"{prefix}.embeddings_project", ("embeddings_project",))
  blocks = "transformer.layer" if is_distilbert else "encoder.layer"
  block_names = _BLOCK_NAMES["distilbert" if is_distilbert else "bert"]
  for i in range(config.num_layers):
    for ours, theirs in block_names.items():
      add(f"{prefix}.{blocks}.{i}.{theirs}", (f"layers_{i}", *ours.split("/")))
  for ours, theirs in _HEAD_NAMES[config.model_type].items():
    add(theirs, (ours,))
  return names


class Attention(nn.Module):
  """Computes attention over whole rows."""

  config: EncoderConfig

  def setup(self):
    c = self.config
    self.query = linear.dense(c, c.hidden_size)
    self.key = linear.dense(c, c.hidden_size)
    self.value = linear.dense(c, c.hidden_size)
    self.output = linear.dense(c, c.hidden_size)

  def __call__(self, x: Array, mask: Array) -> Array:
    heads = lambda y: y.reshape(*y.shape[:-1], self.config.num_heads, -1)
    mixed = attention.attend(
      heads(self.query(x)),
      heads(self.key(x)),
      heads(self.value(x)),
      mask,
      causal=False,
    )
    return self.output(mixed.reshape(x.shape))


class FeedForward(nn.Module):
  """Computes down(activation(up(x)))."""

  config: EncoderConfig

  def setup(self):
    c = self.config
    self.up = linear.dense(c, c.intermediate_size)
    self.down = linear.dense(c, c.hidden_size)

  def __call__(self, x: Array) -> Array:
    return self.down(_ACTIVATIONS[self.config.activation](self.up(x)))


class Block(nn.Module):
  """Computes norm(x + attention(x)), then norm(x + feed_forward(x))."""

  config: EncoderConfig

  def setup(self):
    c = self.config
    self.attention = Attention(c)
    self.attention_norm = _norm(c)
    self.feed_forward = FeedForward(c)
    self.feed_forward_norm = _norm(c)

  def __call__(self, x: Array, mask: Array) -> Array:
    x = activations.rows(x)
    x = self.attention_norm(x + self.attention(x, mask))
    return activations.rows(self.feed_forward_norm(x + self.feed_forward(x)))


class Encoder(nn.Module):
  """Classifies texts; `params` is a plain nested dict, one entry per layer."""

  config: EncoderConfig

  def setup(self):
    c = self.config
    self.word_embeddings = linear.embed(c, c.vocab_size, c.embedding_size)
    rows = c.max_positions + c.position_offset
    self.position_embeddings = linear.embed(c, rows, c.embedding_size)
    if c.type_vocab_size:
      self.token_type_embeddings = linear.embed(
        c, c.type_vocab_size, c.embedding_size
      )
    self.embedding_norm = _norm(c)
    if c.embedding_size != c.hidden_size:
      self.embeddings_project = linear.dense(c, c.hidden_size)
    block = remat.block(Block, c.remat)
    self.layers = [block(c) for _ in range(c.num_layers)]
    in_float32 = dataclasses.replace(c, dtype=jnp.float32)
    self.pooler = linear.dense(in_float32, c.hidden_size)
    self.classifier = linear.dense(in_float32, len(c.labels))

  def __call__(
    self, ids: Array, mask: Array, token_type_ids: Array | None = None
  ) -> Array:
    """Computes the logits of whole texts.

    Args:
      ids: `[B, S]` int32.
      mask: `[B, S]` bool, True at real tokens. The published models saw
        padding on the right; positions come from the mask, so that a row has
        the same logits with padding on either side.
      token_type_ids: `[B, S]` int32, which text of a pair a token belongs to;
        None is 0 everywhere.

    Returns:
      `[B, L]` float32, one per label. For a row without a real token they are
      finite but meaningless.

    Raises:
      ValueError: if `token_type_ids` are given to a model without token types.
    """
    chex.assert_rank([ids, mask], 2)
    chex.assert_equal_shape([ids, mask])
    chex.assert_type([ids, mask], [int, bool])
    c = self.config
    positions = attention.positions(mask) + c.position_offset
    x = self.word_embeddings(ids) + self.position_embeddings(positions)
    if token_type_ids is not None:
      if not c.type_vocab_size:
        raise ValueError(
          f"token_type_ids must be None: {c.model_type} has no token types."
        )
      chex.assert_equal_shape([ids, token_type_ids])
    elif c.type_vocab_size:
      token_type_ids = jnp.zeros_like(ids)
    if c.type_vocab_size:
      x += self.token_type_embeddings(token_type_ids)
    x = self.embedding_norm(x.astype(c.dtype))
    if c.embedding_size != c.hidden_size:
      x = self.embeddings_project(x)

    for layer in self.layers:
      x = layer(x, mask)

    first = jnp.argmax(mask, axis=1)  # [B]
    x = jnp.take_along_axis(x, first[:, None, None], axis=1)[:, 0]
    squash = _SQUASH.get(c.model_type, jnp.tanh)
    return self.classifier(squash(self.pooler(x)))


def _norm(config: EncoderConfig) -> norms.LayerNorm:
  return norms.LayerNorm(config.layer_norm_eps, config.param_dtype)
