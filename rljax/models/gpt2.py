"""GPT-2: learned positions, layer norms, biases everywhere, a tied output.

Dropout, with which the original was trained, is not applied: reinforcement
learning compares the probabilities of two passes over the same tokens.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from rljax.distributed import activations
from rljax.models import (
  attention,
  decoder,
  fields,
  linear,
  norms,
  products,
  remat,
  stacked,
)

Array = jax.Array

# Where parameters live on a mesh: the first pattern that a path contains.
PARTITION_RULES = (
  (r"(c_attn|c_fc)/kernel$", P("fsdp", "tensor")),
  (r"c_proj/kernel$", P("tensor", "fsdp")),
  (r"(c_attn|c_fc)/bias$", P("tensor")),
  (r"wte/embedding$", P("tensor", "fsdp")),
  (r".*", P()),
)

_ACTIVATIONS = {
  "gelu_new": nn.gelu,  # The tanh approximation.
  "gelu_pytorch_tanh": nn.gelu,
  "gelu": lambda x: nn.gelu(x, approximate=False),
  "relu": nn.relu,
}


@dataclasses.dataclass(frozen=True)
class GPT2Config:
  """Holds the architecture and precision of a model.

  Attributes:
    vocab_size: V, rows of the embedding.
    hidden_size: D.
    num_layers: number of blocks.
    num_heads: H, a divisor of D.
    max_positions: rows of the position table. A row with more real tokens than
      that gives NaN; other rows are not affected.
    intermediate_size: width of the feed-forward; None: 4 D.
    activation: "gelu_new", "gelu_pytorch_tanh", "gelu" or "relu".
    layer_norm_eps: added to the variance.
    initializer_range: standard deviation of new weights.
    bos_token_id: kept for `to_hf`.
    eos_token_id: kept for `to_hf`; an int, or a tuple of them.
    pad_token_id: kept for `to_hf`.
    dtype: of activations. Norms, softmax and logits are float32 regardless.
    param_dtype: of new parameters.
    remat: what the gradient recomputes of each block, see `DecoderConfig`.
    scan_layers: whether blocks lie in stacks; see `stacked`.
  """

  vocab_size: int
  hidden_size: int
  num_layers: int
  num_heads: int
  max_positions: int
  intermediate_size: int | None = None
  activation: str = "gelu_new"
  layer_norm_eps: float = 1e-5
  initializer_range: float = 0.02
  bos_token_id: int | None = None
  eos_token_id: int | tuple[int, ...] | None = None
  pad_token_id: int | None = None
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32
  remat: str | bool = "none"
  scan_layers: bool = False

  def window(self, layer: int) -> None:
    """Returns that every layer sees the whole text."""

  def layer_rope(self, layer: int) -> None:
    """Returns that nothing turns."""

  def layer_kind(self, layer: int) -> None:
    """Returns that all layers are of one kind."""

  def __post_init__(self):
    if self.intermediate_size is None:
      object.__setattr__(self, "intermediate_size", 4 * self.hidden_size)
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

  @classmethod
  def from_hf(cls, config: Mapping[str, Any]) -> "GPT2Config":
    """Reads the content of a config.json.

    Args:
      config: the fields, with `model_type` gpt2.

    Returns:
      The settings, with `dtype`, `param_dtype` and `remat` at their defaults.

    Raises:
      ValueError: if a field is missing or asks for what is not implemented;
        the message names the field.
    """
    config = fields.checked(config)
    only = {
      "model_type": "gpt2",
      "scale_attn_weights": True,
      "scale_attn_by_inverse_layer_idx": False,
      "reorder_and_upcast_attn": False,
      "add_cross_attention": False,
      "tie_word_embeddings": True,
    }
    for name, value in only.items():
      if config.get(name, value) != value:
        raise ValueError(
          f'config field "{name}" must be {value!r}, got {config[name]!r}.'
        )
    activation = config.get("activation_function", "gelu_new")
    if activation not in _ACTIVATIONS:
      raise ValueError(
        'config field "activation_function" must be one of '
        f'{", ".join(_ACTIVATIONS)}, got "{activation}".'
      )

    def required(name):
      if config.get(name) is None:
        raise ValueError(f'config field "{name}" is missing.')
      return config[name]

    eos_token_id = config.get("eos_token_id")
    if isinstance(eos_token_id, list):
      eos_token_id = tuple(eos_token_id)
    return cls(
      vocab_size=required("vocab_size"),
      hidden_size=required("n_embd"),
      num_layers=required("n_layer"),
      num_heads=required("n_head"),
      max_positions=required("n_positions"),
      intermediate_size=config.get("n_inner"),
      activation=activation,
      layer_norm_eps=config.get("layer_norm_epsilon", 1e-5),
      initializer_range=config.get("initializer_range", 0.02),
      bos_token_id=config.get("bos_token_id"),
      eos_token_id=eos_token_id,
      pad_token_id=config.get("pad_token_id"),
    )

  def to_hf(self) -> dict[str, Any]:
    """Returns the content of a config.json that describes this model.

    Returns:
      JSON-serialisable fields.
    """
    eos_token_id = self.eos_token_id
    if isinstance(eos_token_id, tuple):
      eos_token_id = list(eos_token_id)
    return {
      "architectures": ["GPT2LMHeadModel"],
      "model_type": "gpt2",
      "vocab_size": self.vocab_size,
      "n_embd": self.hidden_size,
      "n_layer": self.num_layers,
      "n_head": self.num_heads,
      "n_positions": self.max_positions,
      "n_ctx": self.max_positions,
      "n_inner": self.intermediate_size,
      "activation_function": self.activation,
      "layer_norm_epsilon": self.layer_norm_eps,
      "initializer_range": self.initializer_range,
      "resid_pdrop": 0.0,
      "embd_pdrop": 0.0,
      "attn_pdrop": 0.0,
      "tie_word_embeddings": True,
      "bos_token_id": self.bos_token_id,
      "eos_token_id": eos_token_id,
      "pad_token_id": self.pad_token_id,
      "use_cache": True,
      "dtype": jnp.dtype(self.param_dtype).name,
    }


def parameter_names(
  config: GPT2Config,
) -> dict[str, tuple[tuple[str, ...], bool]]:
  """Maps each Hugging Face tensor to a parameter.

  Args:
    config: the model's settings.

  Returns:
    Tensor name -> (path in `params`, whether to transpose). One entry per
    parameter of the model. GPT-2 stores its dense layers as (in, out), so
    nothing is transposed.
  """
  names = {
    "transformer.wte.weight": (("wte", "embedding"), False),
    "transformer.wpe.weight": (("wpe", "embedding"), False),
    "transformer.ln_f.weight": (("ln_f", "scale"), False),
    "transformer.ln_f.bias": (("ln_f", "bias"), False),
  }
  weights = {
    "ln_1": "scale",
    "attn.c_attn": "kernel",
    "attn.c_proj": "kernel",
    "ln_2": "scale",
    "mlp.c_fc": "kernel",
    "mlp.c_proj": "kernel",
  }
  for i in range(config.num_layers):
    for name, weight in weights.items():
      theirs = f"transformer.h.{i}.{name}"
      ours = (f"layers_{i}", *name.split("."))
      names[f"{theirs}.weight"] = ((*ours, weight), False)
      names[f"{theirs}.bias"] = ((*ours, "bias"), False)
  return names


class Attention(nn.Module):
  """Attends over whole rows, or from one token at a time over a cache."""

  config: GPT2Config

  def setup(self):
    c = self.config
    self.c_attn = linear.dense(c, 3 * c.hidden_size)
    self.c_proj = linear.dense(c, c.hidden_size, into_residual=True)

  def _project(self, x):
    """`[..., D]` to queries, keys and values, `[..., H, d]` each."""
    heads = lambda y: y.reshape(*y.shape[:-1], self.config.num_heads, -1)
    return [heads(y) for y in jnp.split(self.c_attn(x), 3, axis=-1)]

  def __call__(self, x, mask, segments=None):
    queries, keys, values = self._project(x)
    mixed = attention.attend(queries, keys, values, mask, segments=segments)
    return self.c_proj(mixed.reshape(x.shape)), (keys, values)

  def decode(self, x, layer, prompt_mask, step, index=None):
    query, key, value = self._project(x)
    mixed, layer = attention.attend_cached(
      query, key, value, layer, prompt_mask, step, index=index
    )
    return self.c_proj(mixed.reshape(x.shape)), layer


class FeedForward(nn.Module):
  """Computes c_proj(activation(c_fc(x)))."""

  config: GPT2Config

  def setup(self):
    c = self.config
    self.c_fc = linear.dense(c, c.intermediate_size)
    self.c_proj = linear.dense(c, c.hidden_size, into_residual=True)

  def __call__(self, x: Array) -> Array:
    return self.c_proj(_ACTIVATIONS[self.config.activation](self.c_fc(x)))


class Block(nn.Module):
  """Computes x + attention(norm(x)), then x + feed_forward(norm(x))."""

  config: GPT2Config

  def setup(self):
    c = self.config
    self.ln_1 = norms.LayerNorm(c.layer_norm_eps, c.param_dtype)
    self.attn = Attention(c)
    self.ln_2 = norms.LayerNorm(c.layer_norm_eps, c.param_dtype)
    self.mlp = FeedForward(c)

  def __call__(self, x, angles, mask, segments=None):
    del angles  # Nothing turns.
    x = activations.rows(x)
    y, keys_values = self.attn(self.ln_1(x), mask, segments)
    return activations.rows(self._residuals(x, y)), keys_values

  def decode(self, x, angles, *cache):
    del angles
    y, layer = self.attn.decode(self.ln_1(x), *cache)
    return self._residuals(x, y), layer

  def _residuals(self, x, y):
    """Adds the output of attention, and then that of the feed-forward."""
    x = products.rounded(x + y)
    return products.rounded(x + self.mlp(self.ln_2(x)))


class GPT2(decoder.Decoder):
  """Decodes text; `params` is a plain nested dict, see `stacked`."""

  config: GPT2Config

  def setup(self):
    c = self.config
    self.wte = linear.embed(c, c.vocab_size, c.hidden_size)
    self.wpe = linear.embed(c, c.max_positions, c.hidden_size)
    stacked.add_blocks(
      self,
      lambda i, in_scan: remat.block(Block, c.remat, in_scan=in_scan)(c),
    )
    self.ln_f = norms.LayerNorm(c.layer_norm_eps, c.param_dtype)

  def _embed(self, ids, positions):
    narrow = lambda x: x.astype(self.config.dtype)
    return narrow(self.wte(ids)) + narrow(self.wpe(positions))

  def _last_norm(self, x):
    return self.ln_f(x)

  def logits(self, hidden: Array) -> Array:
    """Maps `[..., D]` hidden states to `[..., V]` float32 logits."""
    c = self.config
    logits = products.einsum(
      "...d,vd->...v",
      hidden.astype(c.dtype),
      self.wte.embedding.astype(c.dtype),
    )
    return activations.rows(logits, tensor=-1)
