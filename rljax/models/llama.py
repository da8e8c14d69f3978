"""The Llama family: Llama 2 and 3, SmolLM2, Mistral, Qwen2 and Qwen3.

Pre-norm decoder blocks: RMS norms, rotary positions, grouped key and value
heads, gated SiLU feed-forward. `model_type` says what differs: Qwen2 has
biases on q, k and v, Qwen3 norms q and k per head.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from rljax.models import attention, fields
from rljax.models import rope as rope_lib

Array = jax.Array
Cache = attention.Cache

_ARCHITECTURES = {
  "llama": "LlamaForCausalLM",
  "mistral": "MistralForCausalLM",
  "qwen2": "Qwen2ForCausalLM",
  "qwen3": "Qwen3ForCausalLM",
}

# Where parameters live on a mesh: the first pattern that a path contains.
PARTITION_RULES = (
  (r"(q|k|v|gate|up)_proj/kernel$", P("fsdp", "tensor")),
  (r"(o|down)_proj/kernel$", P("tensor", "fsdp")),
  (r"(q|k|v|gate|up)_proj/bias$", P("tensor")),
  (r"embed_tokens/embedding$", P("tensor", "fsdp")),
  (r"lm_head/kernel$", P("fsdp", "tensor")),
  (r".*", P()),
)


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
  """Holds the architecture and precision of a model.

  Attributes:
    vocab_size: V, rows of the embedding.
    hidden_size: D.
    num_layers: number of blocks.
    num_heads: H, query heads.
    max_positions: longest text the model is meant for, in tokens.
    num_kv_heads: K, key and value heads, a divisor of H; None: H.
    head_dim: d; None: D / H.
    intermediate_size: width of the feed-forward; None: 8 D / 3, rounded up to
      a multiple of 8.
    rope: rotary embedding settings.
    rms_norm_eps: added to the mean square.
    model_type: "llama", "mistral", "qwen2" or "qwen3".
    attention_bias: llama, qwen3: biases on q, k, v and o.
    mlp_bias: llama: biases in the feed-forward.
    tie_word_embeddings: whether the output layer is the embedding.
    initializer_range: standard deviation of new weights.
    bos_token_id: kept for `to_hf`.
    eos_token_id: kept for `to_hf`; an int, or a tuple of them.
    pad_token_id: kept for `to_hf`.
    dtype: of activations. Norms, softmax and logits are float32 regardless.
    param_dtype: of new parameters.
    remat: whether the gradient recomputes each block's activations.
  """

  vocab_size: int
  hidden_size: int
  num_layers: int
  num_heads: int
  max_positions: int
  num_kv_heads: int | None = None
  head_dim: int | None = None
  intermediate_size: int | None = None
  rope: rope_lib.Rope = rope_lib.Rope()
  rms_norm_eps: float = 1e-5
  model_type: str = "llama"
  attention_bias: bool = False
  mlp_bias: bool = False
  tie_word_embeddings: bool = True
  initializer_range: float = 0.02
  bos_token_id: int | None = None
  eos_token_id: int | tuple[int, ...] | None = None
  pad_token_id: int | None = None
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32
  remat: bool = False

  def __post_init__(self):
    derive = functools.partial(object.__setattr__, self)
    if self.num_kv_heads is None:
      derive("num_kv_heads", self.num_heads)
    if self.head_dim is None:
      if self.hidden_size % self.num_heads:
        raise ValueError(
          f"hidden_size must be divisible by the {self.num_heads} heads, "
          f"got {self.hidden_size}."
        )
      derive("head_dim", self.hidden_size // self.num_heads)
    if self.intermediate_size is None:
      derive("intermediate_size", 8 * math.ceil(self.hidden_size / 3))
    if self.num_heads % self.num_kv_heads:
      raise ValueError(
        f"num_heads must be divisible by the {self.num_kv_heads} key and "
        f"value heads, got {self.num_heads}."
      )
    if self.head_dim % 2:
      raise ValueError(f"head_dim must be even, got {self.head_dim}.")
    if self.model_type not in _ARCHITECTURES:
      raise ValueError(
        f"model_type must be one of {', '.join(_ARCHITECTURES)}, got "
        f'"{self.model_type}".'
      )
    if self.attention_bias and self.model_type in ("mistral", "qwen2"):
      raise ValueError(f"attention_bias must be False for {self.model_type}.")
    if self.mlp_bias and self.model_type != "llama":
      raise ValueError(f"mlp_bias must be False for {self.model_type}.")

  @property
  def qkv_bias(self) -> bool:
    return self.attention_bias or self.model_type == "qwen2"

  @property
  def output_bias(self) -> bool:
    return self.attention_bias

  @property
  def qk_norm(self) -> bool:
    return self.model_type == "qwen3"

  @classmethod
  def from_hf(cls, config: Mapping[str, Any]) -> "LlamaConfig":
    """Reads the content of a config.json.

    Args:
      config: the fields, with `model_type` llama, mistral, qwen2 or qwen3.

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

    def required(name):
      if config.get(name) is None:
        raise ValueError(f'config field "{name}" is missing.')
      return config[name]

    if config.get("hidden_act", "silu") not in ("silu", "swish"):
      raise ValueError(
        'config field "hidden_act" must be "silu", got '
        f'"{config["hidden_act"]}".'
      )
    _check_sliding_window(config)

    hidden_size = required("hidden_size")
    num_heads = required("num_attention_heads")
    num_kv_heads = config.get("num_key_value_heads")
    if "num_key_value_heads" not in config and model_type != "llama":
      required("num_key_value_heads")
    head_dim = config.get("head_dim")
    if head_dim is None and model_type == "qwen3":
      head_dim = 128
    eos_token_id = config.get("eos_token_id")
    if isinstance(eos_token_id, list):
      eos_token_id = tuple(eos_token_id)
    # Mistral and Qwen2 have no such fields and ignore what stands there.
    has_biases = model_type in ("llama", "qwen3")
    return cls(
      vocab_size=required("vocab_size"),
      hidden_size=hidden_size,
      num_layers=required("num_hidden_layers"),
      num_heads=num_heads,
      max_positions=required("max_position_embeddings"),
      num_kv_heads=num_kv_heads,
      head_dim=head_dim,
      intermediate_size=required("intermediate_size"),
      rope=rope_lib.Rope.from_hf(config),
      rms_norm_eps=config.get("rms_norm_eps", 1e-6),
      model_type=model_type,
      attention_bias=has_biases and bool(config.get("attention_bias", False)),
      mlp_bias=model_type == "llama" and bool(config.get("mlp_bias", False)),
      tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
      initializer_range=config.get("initializer_range", 0.02),
      bos_token_id=config.get("bos_token_id"),
      eos_token_id=eos_token_id,
      pad_token_id=config.get("pad_token_id"),
    )

  def to_hf(self) -> dict[str, Any]:
    """Returns the content of a config.json that describes this model.

    Returns:
      JSON-serialisable config. RoPE settings stand in `rope_parameters` and
      once more in the older config, for readers of either.
    """
    eos_token_id = self.eos_token_id
    if isinstance(eos_token_id, tuple):
      eos_token_id = list(eos_token_id)
    config = {
      "architectures": [_ARCHITECTURES[self.model_type]],
      "model_type": self.model_type,
      "vocab_size": self.vocab_size,
      "hidden_size": self.hidden_size,
      "intermediate_size": self.intermediate_size,
      "num_hidden_layers": self.num_layers,
      "num_attention_heads": self.num_heads,
      "num_key_value_heads": self.num_kv_heads,
      "head_dim": self.head_dim,
      "max_position_embeddings": self.max_positions,
      "rms_norm_eps": self.rms_norm_eps,
      **self.rope.to_hf(),
      "hidden_act": "silu",
      "attention_dropout": 0.0,
      "tie_word_embeddings": self.tie_word_embeddings,
      "initializer_range": self.initializer_range,
      "bos_token_id": self.bos_token_id,
      "eos_token_id": eos_token_id,
      "pad_token_id": self.pad_token_id,
      "use_cache": True,
      "dtype": jnp.dtype(self.param_dtype).name,
    }
    if self.model_type in ("llama", "qwen3"):
      config["attention_bias"] = self.attention_bias
    if self.model_type == "llama":
      config["mlp_bias"] = self.mlp_bias
    if self.model_type in ("qwen2", "qwen3"):
      config["use_sliding_window"] = False
    if self.model_type != "llama":
      config["sliding_window"] = None
    return config


def parameter_names(
  config: LlamaConfig,
) -> dict[str, tuple[tuple[str, ...], bool]]:
  """Maps each Hugging Face tensor to a parameter.

  Args:
    config: the model's settings.

  Returns:
    Tensor name -> (path in `params`, whether to transpose). One entry per
    parameter of the model; none for a tied output layer.
  """
  names = {
    "model.embed_tokens.weight": (("embed_tokens", "embedding"), False),
    "model.norm.weight": (("norm", "scale"), False),
  }
  biased = {
    "self_attn.q_proj": config.qkv_bias,
    "self_attn.k_proj": config.qkv_bias,
    "self_attn.v_proj": config.qkv_bias,
    "self_attn.o_proj": config.output_bias,
    "mlp.gate_proj": config.mlp_bias,
    "mlp.up_proj": config.mlp_bias,
    "mlp.down_proj": config.mlp_bias,
  }
  norms = ["input_layernorm", "post_attention_layernorm"]
  if config.qk_norm:
    norms += ["self_attn.q_norm", "self_attn.k_norm"]
  for i in range(config.num_layers):
    theirs, ours = f"model.layers.{i}", f"layers_{i}"
    for norm in norms:
      path = (ours, *norm.split("."), "scale")
      names[f"{theirs}.{norm}.weight"] = (path, False)
    for dense, bias in biased.items():
      path = (ours, *dense.split("."))
      names[f"{theirs}.{dense}.weight"] = ((*path, "kernel"), True)
      if bias:
        names[f"{theirs}.{dense}.bias"] = ((*path, "bias"), False)
  if not config.tie_word_embeddings:
    names["lm_head.weight"] = (("lm_head", "kernel"), True)
  return names


class RMSNorm(nn.Module):
  """Computes x / √(mean(x²) + ε) * scale, in float32."""

  epsilon: float
  param_dtype: Any

  @nn.compact
  def __call__(self, x: Array) -> Array:
    scale = self.param(
      "scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype
    )
    y = x.astype(jnp.float32)
    y *= jax.lax.rsqrt(
      jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.epsilon
    )
    scale = jnp.expand_dims(scale.astype(jnp.float32), range(x.ndim - 1))
    return (y * scale).astype(x.dtype)


class Attention(nn.Module):
  """Attends with rotary positions, over whole rows or a cache."""

  config: LlamaConfig

  def setup(self):
    c = self.config
    self.q_proj = _dense(c, c.num_heads * c.head_dim, c.qkv_bias)
    self.k_proj = _dense(c, c.num_kv_heads * c.head_dim, c.qkv_bias)
    self.v_proj = _dense(c, c.num_kv_heads * c.head_dim, c.qkv_bias)
    self.o_proj = _dense(c, c.hidden_size, c.output_bias, into_residual=True)
    if c.qk_norm:
      self.q_norm = RMSNorm(c.rms_norm_eps, c.param_dtype)
      self.k_norm = RMSNorm(c.rms_norm_eps, c.param_dtype)

  def _project(self, x, cos, sin):
    """`[..., D]` to rotated queries and keys and to values, `[..., H|K, d]`."""
    heads = lambda y: y.reshape(*y.shape[:-1], -1, self.config.head_dim)
    queries = heads(self.q_proj(x))
    keys = heads(self.k_proj(x))
    values = heads(self.v_proj(x))
    if self.config.qk_norm:
      queries, keys = self.q_norm(queries), self.k_norm(keys)
    return (
      rope_lib.rotate(queries, cos, sin),
      rope_lib.rotate(keys, cos, sin),
      values,
    )

  def _output(self, mixed):
    return self.o_proj(mixed.reshape(*mixed.shape[:-2], -1))

  def __call__(self, x, cos, sin, mask):
    queries, keys, values = self._project(x, cos, sin)
    mixed = attention.attend(queries, keys, values, mask)
    return self._output(mixed), (keys, values)

  def decode(self, x, cos, sin, layer, prompt_mask, step):
    query, key, value = self._project(x, cos, sin)
    mixed, layer = attention.attend_cached(
      query, key, value, layer, prompt_mask, step
    )
    return self._output(mixed), layer


class FeedForward(nn.Module):
  """Computes down(silu(gate(x)) * up(x))."""

  config: LlamaConfig

  def setup(self):
    c = self.config
    self.gate_proj = _dense(c, c.intermediate_size, c.mlp_bias)
    self.up_proj = _dense(c, c.intermediate_size, c.mlp_bias)
    self.down_proj = _dense(c, c.hidden_size, c.mlp_bias, into_residual=True)

  def __call__(self, x: Array) -> Array:
    return self.down_proj(nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
  """Computes x + attention(norm(x)), then x + feed_forward(norm(x))."""

  config: LlamaConfig

  def setup(self):
    c = self.config
    self.input_layernorm = RMSNorm(c.rms_norm_eps, c.param_dtype)
    self.self_attn = Attention(c)
    self.post_attention_layernorm = RMSNorm(c.rms_norm_eps, c.param_dtype)
    self.mlp = FeedForward(c)

  def __call__(self, x, cos, sin, mask):
    y, keys_values = self.self_attn(self.input_layernorm(x), cos, sin, mask)
    x += y
    return x + self.mlp(self.post_attention_layernorm(x)), keys_values

  def decode(self, x, cos, sin, layer, prompt_mask, step):
    y, layer = self.self_attn.decode(
      self.input_layernorm(x), cos, sin, layer, prompt_mask, step
    )
    x += y
    return x + self.mlp(self.post_attention_layernorm(x)), layer


class OutputLayer(nn.Module):
  """Computes the logits of an output layer that is not the embedding."""

  config: LlamaConfig

  @nn.compact
  def __call__(self, hidden: Array) -> Array:
    c = self.config
    kernel = self.param(
      "kernel",
      nn.initializers.normal(c.initializer_range),
      (c.hidden_size, c.vocab_size),
      c.param_dtype,
    )
    return jnp.einsum(
      "...d,dv->...v",
      hidden.astype(c.dtype),
      kernel.astype(c.dtype),
      preferred_element_type=jnp.float32,
    )


class Llama(nn.Module):
  """Decodes text; `params` is a plain nested dict, one entry per layer."""

  config: LlamaConfig

  def setup(self):
    c = self.config
    self.embed_tokens = nn.Embed(
      c.vocab_size,
      c.hidden_size,
      param_dtype=c.param_dtype,
      embedding_init=nn.initializers.normal(c.initializer_range),
    )
    block = nn.remat(Block) if c.remat else Block
    self.layers = [block(c) for _ in range(c.num_layers)]
    self.norm = RMSNorm(c.rms_norm_eps, c.param_dtype)
    if not c.tie_word_embeddings:
      self.lm_head = OutputLayer(c)

  def _forward(self, ids, mask):
    return self._layers(self.embed_tokens(ids).astype(self.config.dtype), mask)

  def _layers(self, x, mask):
    c = self.config
    cos, sin = rope_lib.angles(attention.positions(mask), c.rope, c.head_dim)
    allowed = attention.causal_mask(mask)
    keys_values = []
    for layer in self.layers:
      x, pair = layer(x, cos, sin, allowed)
      keys_values.append(pair)
    return self.norm(x), keys_values

  def __call__(self, ids: Array, mask: Array) -> Array:
    """Computes the final hidden states of whole rows.

    Args:
      ids: `[B, S]` int32.
      mask: `[B, S]` bool, True at real tokens. Padding may stand on either
        side; its states are finite but meaningless.

    Returns:
      `[B, S, D]` in the compute dtype, after the last norm.
    """
    hidden, _ = self._forward(ids, mask)
    if self.is_initializing():
      self.logits(hidden[:, :1])  # For `init` to make the output layer.
    return hidden

  def apply_layers(self, hidden: Array, mask: Array) -> Array:
    """Applies the blocks and the last norm to states instead of embeddings.

    Initialised by this method, the model has no embeddings.

    Args:
      hidden: `[B, S, D]`, of tokens in their places.
      mask: `[B, S]` bool, True at real tokens; padding on either side.

    Returns:
      `[B, S, D]` in the compute dtype, after the last norm.
    """
    return self._layers(hidden.astype(self.config.dtype), mask)[0]

  def prefill(
    self, ids: Array, mask: Array, num_samples: int, response_length: int
  ) -> tuple[Array, Cache]:
    """Reads the prompts and makes the cache of their responses.

    Args:
      ids: `[B, P]` int32, left-padded.
      mask: `[B, P]` bool, True at the prompts' tokens.
      num_samples: responses per prompt. Row b * num_samples + j of the cache
        continues prompt b.
      response_length: T, slots per response.

    Returns:
      `[B, P, D]` hidden states and the cache (see `attention`).
    """
    hidden, keys_values = self._forward(ids, mask)
    return hidden, attention.start_cache(
      mask,
      keys_values,
      num_samples=num_samples,
      response_length=response_length,
    )

  def decode(self, ids: Array, cache: Cache) -> tuple[Array, Cache]:
    """Reads one more token per row.

    Args:
      ids: `[N]` int32.
      cache: from `prefill` or from the last `decode`.

    Returns:
      `[N, D]` hidden states and the cache with one more token per row.
    """
    c = self.config
    x = self.embed_tokens(ids).astype(c.dtype)
    cos, sin = rope_lib.angles(
      attention.decode_positions(cache, ids.shape[0]), c.rope, c.head_dim
    )
    layers = []
    for block, layer in zip(self.layers, cache["layers"], strict=True):
      x, layer = block.decode(
        x, cos, sin, layer, cache["prompt_mask"], cache["step"]
      )
      layers.append(layer)
    cache = {**cache, "step": cache["step"] + 1, "layers": tuple(layers)}
    return self.norm(x), cache

  def logits(self, hidden: Array) -> Array:
    """Maps `[..., D]` hidden states to `[..., V]` float32 logits."""
    c = self.config
    if not c.tie_word_embeddings:
      return self.lm_head(hidden)
    return jnp.einsum(
      "...d,vd->...v",
      hidden.astype(c.dtype),
      self.embed_tokens.embedding.astype(c.dtype),
      preferred_element_type=jnp.float32,
    )


def _dense(
  config: LlamaConfig, features: int, use_bias: bool, into_residual=False
) -> nn.Dense:
  """A dense layer; what is added to the residual stream starts smaller."""
  scale = config.initializer_range
  if into_residual:
    scale /= math.sqrt(2 * config.num_layers)
  return nn.Dense(
    features,
    use_bias=use_bias,
    dtype=config.dtype,
    param_dtype=config.param_dtype,
    kernel_init=nn.initializers.normal(scale),
  )


def _check_sliding_window(config: Mapping[str, Any]) -> None:
  """Raises if a sliding window is shorter than the context."""
  model_type, window = config["model_type"], config.get("sliding_window")
  if model_type == "llama" or window is None:
    return
  if model_type in ("qwen2", "qwen3"):
    if not config.get("use_sliding_window", False):
      return
    first = config.get("max_window_layers", 28)
    kinds = config.get("layer_types") or [
      "sliding_attention" if i >= first else "full_attention"
      for i in range(config.get("num_hidden_layers", 0))
    ]
    if "sliding_attention" not in kinds:
      return
  if window < config.get("max_position_embeddings", math.inf):
    raise ValueError(
      f'config field "sliding_window": a window of {window} is not supported. '
      "For texts that fit into one window, set "
      f'"max_position_embeddings" to {window}.'
    )
