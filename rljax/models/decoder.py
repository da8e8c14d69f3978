"""One causal decoder, whose settings tell the families apart.

A family is a config class that reads and writes its config.json (`from_hf`,
`to_hf`) and a table of names. What its blocks do is said by the settings of
`DecoderConfig`: the norm and where it stands, the activation, biases, scales
and caps, which layers see a window, which turn their queries and how.
docs/models.md adds a family as an example.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from rljax.distributed import activations
from rljax.models import (
  attention,
  linear,
  moe,
  norms,
  products,
  remat,
  stacked,
)
from rljax.models import rope as rope_lib

Array = jax.Array
Cache = attention.Cache
Names = dict[str, tuple[tuple[str | int, ...], bool]]

# Where parameters live on a mesh: the first pattern that a path contains.
PARTITION_RULES = (
  (r"(q|k|v|qkv|gate|up|gate_up)_proj/kernel$", P("fsdp", "tensor")),
  (r"(o|down)_proj/kernel$", P("tensor", "fsdp")),
  (r"(q|k|v|qkv|gate|up|gate_up)_proj/bias$", P("tensor")),
  (r"embed_tokens/embedding$", P("tensor", "fsdp")),
  (r"lm_head/kernel$", P("fsdp", "tensor")),
  # Each expert lies as a feed-forward of its own does.
  (r"experts/(gate|up)_proj$", P(None, "fsdp", "tensor")),
  (r"experts/down_proj$", P(None, "tensor", "fsdp")),
  (r".*", P()),
)

ACTIVATIONS = {
  "silu": nn.silu,
  "gelu_pytorch_tanh": nn.gelu,  # The tanh approximation.
  "gelu_new": nn.gelu,
  "gelu": lambda x: nn.gelu(x, approximate=False),
  "relu": nn.relu,
}


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
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
    norm_eps: added to the mean square, or to the variance.
    model_type: of transformers.
    norm: "rms", "rms_plus_one" (the factor is 1 + scale) or "layer".
    norm_bias: whether norms of the kind "layer" have a bias.
    first_norm: whether the first block norms what its attention reads.
    pre_norm: whether attention and feed-forward read a norm of the stream.
    post_norm: whether what they add to the stream goes through a norm.
    activation: of the feed-forward, one of `ACTIVATIONS`.
    gated: whether it multiplies the activation by a second product.
    qkv_layout: "split", three layers; "joined", one layer with all queries,
      then all keys, then all values; "by_head", one layer with the query, key
      and value of the first head, of the second, ...
    gate_up_joined: whether one layer computes the gate and the second product.
    qkv_bias: biases on queries, keys and values.
    output_bias: a bias on what attention adds to the stream.
    mlp_bias: biases in the feed-forward.
    qk_norm: a norm of queries and keys: "" for none, "head" for each head
      alone, "whole" for all heads together.
    parallel_residual: whether both norms of a block read the same stream.
    windows: tokens that a query sees, its own among them, per layer; None is
      all of them. It repeats from layer to layer: (512, None) alternates.
    rope_layers: whether queries and keys turn, likewise per layer.
    local_rope: rotary settings of layers with a window; None: `rope`.
    learned_positions: rows of a table of positions before the first token's;
      None: there is no table.
    embedding_scale: factor of the embedding.
    attention_scale: factor of q · k; None: 1 / √d.
    residual_scale: factor of what is added to the stream.
    logits_scale: what divides the logits.
    attention_softcap: c of c tanh(score / c); None: no cap.
    logits_softcap: the same for logits.
    num_experts: E of a mixture of experts; 0: there is none.
    experts_per_token: how many of them a token goes to.
    expert_size: width of an expert; None: `intermediate_size`.
    normalise_experts: whether the weights of a token's experts sum to 1.
    sparse_layers: whether the feed-forward is a mixture, per layer like
      `windows`.
    tie_word_embeddings: whether the output layer is the embedding.
    initializer_range: standard deviation of new weights.
    bos_token_id: kept for `to_hf`.
    eos_token_id: kept for `to_hf`; an int, or a tuple of them.
    pad_token_id: kept for `to_hf`.
    dtype: of activations. Norms, softmax and logits are float32 regardless.
    param_dtype: of new parameters.
    remat: what the gradient recomputes of each block, one of
      `remat.POLICIES`; True is "nothing", False "none".
    scan_layers: whether blocks that repeat lie in stacks; see `stacked`.
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
  norm_eps: float = 1e-5
  model_type: str = ""
  norm: str = "rms"
  norm_bias: bool = True
  first_norm: bool = True
  pre_norm: bool = True
  post_norm: bool = False
  activation: str = "silu"
  gated: bool = True
  qkv_layout: str = "split"
  gate_up_joined: bool = False
  qkv_bias: bool = False
  output_bias: bool = False
  mlp_bias: bool = False
  qk_norm: str = ""
  parallel_residual: bool = False
  windows: tuple[int | None, ...] = (None,)
  rope_layers: tuple[bool, ...] = (True,)
  local_rope: rope_lib.Rope | None = None
  learned_positions: int | None = None
  embedding_scale: float = 1.0
  attention_scale: float | None = None
  residual_scale: float = 1.0
  logits_scale: float = 1.0
  attention_softcap: float | None = None
  logits_softcap: float | None = None
  num_experts: int = 0
  experts_per_token: int = 1
  expert_size: int | None = None
  normalise_experts: bool = True
  sparse_layers: tuple[bool, ...] = (True,)
  tie_word_embeddings: bool = True
  initializer_range: float = 0.02
  bos_token_id: int | None = None
  eos_token_id: int | tuple[int, ...] | None = None
  pad_token_id: int | None = None
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32
  remat: str | bool = "none"
  scan_layers: bool = False

  # Whether a token sees those before it alone.
  causal: ClassVar[bool] = True
  # The class that transformers names in a config.json.
  architecture: ClassVar[str] = ""
  # Our names of modules -> those of the file, where the two differ. "model" is
  # what all names but the output layer's begin with.
  names: ClassVar[Mapping[str, str]] = {}

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
    for rope in (self.rope, self.local_rope):
      if any(self.rope_layers) and rope is not None:
        self._check_rope(rope)
    if self.activation not in ACTIVATIONS:
      raise ValueError(
        f"activation must be one of {', '.join(ACTIVATIONS)}, got "
        f'"{self.activation}".'
      )
    if any(window is not None and window < 1 for window in self.windows):
      raise ValueError(f"windows must be positive or None, got {self.windows}.")
    if not 0 <= self.experts_per_token <= max(self.num_experts, 1):
      raise ValueError(
        f"experts_per_token must be at most the {self.num_experts} experts, "
        f"got {self.experts_per_token}."
      )

  def _check_rope(self, rope: rope_lib.Rope) -> None:
    turning = rope_lib.rotary_dim(rope, self.head_dim)
    if turning % 2 or not turning:
      raise ValueError(
        f"head_dim must be even, got {self.head_dim}."
        if rope.partial == 1
        else f"partial_rotary_factor {rope.partial} of head_dim "
        f"{self.head_dim} must be an even number of dimensions, got {turning}."
      )
    for name in ("short_factor", "long_factor"):
      factors = getattr(rope, name)
      if rope.rope_type == "longrope" and len(factors) != turning // 2:
        raise ValueError(
          f'config field "{name}" must have a number for each of the '
          f"{turning // 2} pairs of dimensions that turn, got {len(factors)}."
        )

  def window(self, layer: int) -> int | None:
    return self.windows[layer % len(self.windows)]

  def layer_rope(self, layer: int) -> rope_lib.Rope | None:
    if not self.rope_layers[layer % len(self.rope_layers)]:
      return None
    if self.local_rope is not None and self.window(layer) is not None:
      return self.local_rope
    return self.rope

  def layer_kind(self, layer: int) -> tuple[Any, ...]:
    """Returns all in which layers differ but their weights."""
    return (
      self.window(layer),
      self.layer_rope(layer),
      self.is_sparse(layer),
      bool(layer) or self.first_norm,
    )

  def is_sparse(self, layer: int) -> bool:
    sparse = self.sparse_layers[layer % len(self.sparse_layers)]
    return bool(self.num_experts) and sparse

  @property
  def scores(self) -> attention.Scores:
    return attention.Scores(self.attention_scale, self.attention_softcap)


def parameter_names(config: DecoderConfig) -> Names:
  """Maps each Hugging Face tensor to a parameter.

  Args:
    config: the model's settings.

  Returns:
    Tensor name -> (path in `params`, whether to transpose). One entry per
    parameter of the model; none for a tied output layer. A path that ends in a
    number is that part of a parameter, along its first axis.
  """
  renamed = config.names
  model = renamed.get("model", "model")
  names = {}

  def add(prefix, path, name, kind, bias=False):
    """A module with a weight, and perhaps a bias."""
    theirs = ".".join(filter(None, (prefix, renamed.get(name, name))))
    ours = (*path, *name.split("."))
    names[f"{theirs}.weight"] = ((*ours, kind), kind == "kernel")
    if bias:
      names[f"{theirs}.bias"] = ((*ours, "bias"), False)

  layer_norm = config.norm == "layer" and config.norm_bias
  add(model, (), "embed_tokens", "embedding")
  if config.learned_positions is not None:
    add(model, (), "embed_positions", "embedding")
  add(model, (), "norm", "scale", layer_norm)
  for i in range(config.num_layers):
    layers = renamed.get("layers", "layers")
    place = (f"{model}.{layers}.{i}", (f"layers_{i}",))
    for norm in _layer_norms(config, i):
      add(*place, norm, "scale", layer_norm and "self_attn" not in norm)
    for dense, bias in _denses(config, config.is_sparse(i)).items():
      add(*place, dense, "kernel", bias)
    if config.is_sparse(i):
      experts = renamed.get("mlp.experts", "mlp.experts")
      for name in ("gate_proj", "up_proj", "down_proj"):
        path = (f"layers_{i}", "mlp", "experts", name)
        for j in range(config.num_experts):
          theirs = f"{place[0]}.{experts}.{j}.{renamed.get(name, name)}.weight"
          names[theirs] = ((*path, j), True)
  if not config.tie_word_embeddings:
    add("", (), "lm_head", "kernel")
  return names


def _layer_norms(config: DecoderConfig, layer: int) -> list[str]:
  """Names of the norms of one block."""
  found = []
  if config.pre_norm:
    found += ["input_layernorm"] if layer or config.first_norm else []
    found += ["post_attention_layernorm"]
  if config.post_norm:
    found += ["attention_output_norm", "mlp_output_norm"]
  if config.qk_norm:
    found += ["self_attn.q_norm", "self_attn.k_norm"]
  return found


def _denses(config: DecoderConfig, is_sparse: bool) -> dict[str, bool]:
  """Names of the dense layers of one block, and whether they have a bias."""
  qkv = ("qkv",) if config.qkv_layout != "split" else ("q", "k", "v")
  found = {f"self_attn.{name}_proj": config.qkv_bias for name in qkv}
  found["self_attn.o_proj"] = config.output_bias
  if is_sparse:
    return {**found, "mlp.gate": False}
  up = ("up",)
  if config.gated:
    up = ("gate_up",) if config.gate_up_joined else ("gate", "up")
  return found | {f"mlp.{name}_proj": config.mlp_bias for name in (*up, "down")}


class Attention(nn.Module):
  """Attends over whole rows, or from one token at a time over a cache."""

  config: DecoderConfig
  window: int | None = None

  def setup(self):
    c = self.config
    sizes = (c.num_heads, c.num_kv_heads, c.num_kv_heads)
    if c.qkv_layout == "split":
      self.q_proj, self.k_proj, self.v_proj = (
        linear.dense(c, size * c.head_dim, c.qkv_bias) for size in sizes
      )
    else:
      self.qkv_proj = linear.dense(c, sum(sizes) * c.head_dim, c.qkv_bias)
    self.o_proj = linear.dense(
      c, c.hidden_size, c.output_bias, into_residual=True
    )
    if c.qk_norm:
      self.q_norm = make_norm(c)
      self.k_norm = make_norm(c)

  def _heads(self, x):
    """`[..., D]` to queries, keys and values, `[..., H|K, d]`."""
    c = self.config
    heads = lambda y: y.reshape(*y.shape[:-1], -1, c.head_dim)
    if c.qkv_layout == "by_head":
      joined = self.qkv_proj(x)
      joined = joined.reshape(*x.shape[:-1], c.num_heads, -1)
      return jnp.split(joined, 3, axis=-1)
    if c.qkv_layout == "joined":
      wide, narrow = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
      queries, keys, values = jnp.split(
        self.qkv_proj(x), (wide, wide + narrow), axis=-1
      )
    else:
      queries, keys, values = self.q_proj(x), self.k_proj(x), self.v_proj(x)
    if c.qk_norm == "whole":
      queries, keys = self.q_norm(queries), self.k_norm(keys)
    return heads(queries), heads(keys), heads(values)

  def _project(self, x, angles):
    """`[..., D]` to rotated queries and keys and to values, `[..., H|K, d]`."""
    queries, keys, values = self._heads(x)
    if self.config.qk_norm == "head":
      queries, keys = self.q_norm(queries), self.k_norm(keys)
    if angles is not None:
      queries = rope_lib.rotate(queries, *angles)
      keys = rope_lib.rotate(keys, *angles)
    return queries, keys, values

  def _output(self, mixed):
    return self.o_proj(mixed.reshape(*mixed.shape[:-2], -1))

  def __call__(self, x, angles, mask, segments=None):
    queries, keys, values = (
      activations.rows(y, tensor=2) for y in self._project(x, angles)
    )
    mixed = attention.attend(
      queries,
      keys,
      values,
      mask,
      self.config.scores,
      causal=self.config.causal,
      window=self.window,
      segments=segments,
    )
    return self._output(mixed), (keys, values)

  def decode(self, x, angles, layer, prompt_mask, step, index=None):
    query, key, value = self._project(x, angles)
    mixed, layer = attention.attend_cached(
      query,
      key,
      value,
      layer,
      prompt_mask,
      step,
      self.window,
      self.config.scores,
      index,
    )
    return self._output(mixed), layer


class FeedForward(nn.Module):
  """Computes down(act(gate(x)) * up(x)), or down(act(up(x)))."""

  config: DecoderConfig

  def setup(self):
    c = self.config
    if c.gated and c.gate_up_joined:
      self.gate_up_proj = linear.dense(c, 2 * c.intermediate_size, c.mlp_bias)
    else:
      if c.gated:
        self.gate_proj = linear.dense(c, c.intermediate_size, c.mlp_bias)
      self.up_proj = linear.dense(c, c.intermediate_size, c.mlp_bias)
    self.down_proj = linear.dense(
      c, c.hidden_size, c.mlp_bias, into_residual=True
    )

  def __call__(self, x: Array) -> Array:
    return self.down_proj(activations.rows(self._inner(x), tensor=-1))

  def _inner(self, x):
    """`[..., D]` to what goes into the last product, `[..., F]`."""
    c = self.config
    activation = ACTIVATIONS[c.activation]
    if not c.gated:
      return activation(self.up_proj(x))
    if c.gate_up_joined:
      gate, up = jnp.split(self.gate_up_proj(x), 2, axis=-1)
      return activation(gate) * up
    return activation(self.gate_proj(x)) * self.up_proj(x)


class Block(nn.Module):
  """Computes x + attention(norm(x)), then x + feed_forward(norm(x))."""

  config: DecoderConfig
  index: int = 0

  def setup(self):
    c = self.config
    if self._norms_input:
      self.input_layernorm = make_norm(c)
    if c.pre_norm:
      self.post_attention_layernorm = make_norm(c)
    if c.post_norm:
      self.attention_output_norm = make_norm(c)
      self.mlp_output_norm = make_norm(c)
    self.self_attn = Attention(c, c.window(self.index))
    if c.is_sparse(self.index):
      self.mlp = moe.Experts(
        hidden_size=c.hidden_size,
        expert_size=c.expert_size or c.intermediate_size,
        num_experts=c.num_experts,
        experts_per_token=c.experts_per_token,
        normalise=c.normalise_experts,
        activation=ACTIVATIONS[c.activation],
        initializer_range=c.initializer_range,
        dtype=c.dtype,
        param_dtype=c.param_dtype,
      )
    else:
      self.mlp = FeedForward(c)

  @property
  def _norms_input(self):
    c = self.config
    return c.pre_norm and (c.first_norm or self.index > 0)

  def __call__(self, x, angles, mask, segments=None):
    x, kept = self._residuals(
      activations.rows(x), lambda y: self.self_attn(y, angles, mask, segments)
    )
    return activations.rows(x), kept

  def decode(self, x, angles, *cache):
    return self._residuals(
      x, lambda y: self.self_attn.decode(y, angles, *cache)
    )

  def _residuals(self, x, attend):
    """The block around attention, which returns its output and keys."""
    c = self.config
    y, kept = attend(self.input_layernorm(x) if self._norms_input else x)
    if c.post_norm:
      y = self.attention_output_norm(y)
    after = products.rounded(x + _scaled(y, c.residual_scale))
    z = x if c.parallel_residual else after
    z = self.mlp(self.post_attention_layernorm(z) if c.pre_norm else z)
    if c.post_norm:
      z = self.mlp_output_norm(z)
    return products.rounded(after + _scaled(z, c.residual_scale)), kept


def layer_angles(
  config: DecoderConfig, positions: Array
) -> list[tuple[Array, Array] | None]:
  """Computes the rotation of each layer.

  Args:
    config: the model's settings.
    positions: `[...]` int32.

  Returns:
    Per layer, the cosines and sines of `rope.angles`, or None where nothing
    turns.
  """
  ropes = [config.layer_rope(i) for i in range(config.num_layers)]
  found = {None: None}
  for rope in ropes:
    if rope not in found:
      found[rope] = rope_lib.angles(positions, rope, config.head_dim)
  return [found[rope] for rope in ropes]


class OutputLayer(nn.Module):
  """Computes the products of an output layer that is not the embedding."""

  config: DecoderConfig

  @nn.compact
  def __call__(self, hidden: Array) -> Array:
    c = self.config
    kernel = self.param(
      "kernel",
      nn.initializers.normal(c.initializer_range),
      (c.hidden_size, c.vocab_size),
      c.param_dtype,
    )
    return products.einsum(
      "...d,dv->...v", hidden.astype(c.dtype), kernel.astype(c.dtype)
    )


class Decoder(nn.Module):
  """Decodes text; `params` is a plain nested dict, see `stacked`."""

  config: DecoderConfig

  def setup(self):
    c = self.config
    self.embed_tokens = linear.embed(c, c.vocab_size, c.hidden_size)
    if c.learned_positions is not None:
      rows = c.max_positions + c.learned_positions
      self.embed_positions = linear.embed(c, rows, c.hidden_size)
    stacked.add_blocks(
      self,
      lambda i, in_scan: remat.block(Block, c.remat, in_scan=in_scan)(c, i),
    )
    self.norm = make_norm(c)
    if not c.tie_word_embeddings:
      self.lm_head = OutputLayer(c)

  def _embed(self, ids, positions):
    c = self.config
    x = self.embed_tokens(ids).astype(c.dtype)
    if c.learned_positions is not None:
      places = self.embed_positions(positions + c.learned_positions)
      x += places.astype(c.dtype)
    return _scaled(x, c.embedding_scale)

  def _last_norm(self, x):
    return self.norm(x)

  def _layers(self, x, mask, positions, segments=None, keep=False):
    angles = layer_angles(self.config, positions)
    x, kept = stacked.forward(self, x, angles, mask, segments, keep=keep)
    return self._last_norm(x), kept

  def _forward(self, ids, mask, segments=None, keep=False):
    positions = attention.positions(mask, segments)
    x = self._embed(ids, positions)
    return self._layers(x, mask, positions, segments, keep)

  def __call__(
    self, ids: Array, mask: Array, segments: Array | None = None
  ) -> Array:
    """Computes the final hidden states of whole rows.

    Args:
      ids: `[B, S]` int32.
      mask: `[B, S]` bool, True at real tokens. Padding may stand on either
        side; its states are finite but meaningless.
      segments: `[B, S]` int, which text of its row a token belongs to, 0 at
        padding: texts are read each by itself. None: a row is one text.

    Returns:
      `[B, S, D]` in the compute dtype, after the last norm.
    """
    hidden, _ = self._forward(ids, mask, segments)
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
    x = hidden.astype(self.config.dtype)
    return self._layers(x, mask, attention.positions(mask))[0]

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
    with activations.left_to_compiler():
      hidden, keys_values = self._forward(ids, mask, keep=True)
    return hidden, attention.start_cache(
      mask,
      keys_values,
      num_samples=num_samples,
      response_length=response_length,
      windows=stacked.cached_windows(self.config),
    )

  def decode(self, ids: Array, cache: Cache) -> tuple[Array, Cache]:
    """Reads one more token per row.

    Args:
      ids: `[N]` int32.
      cache: from `prefill` or from the last `decode`.

    Returns:
      `[N, D]` hidden states and the cache with one more token per row.
    """
    positions = attention.decode_positions(cache, ids.shape[0])
    x = self._embed(ids, positions)
    angles = layer_angles(self.config, positions)
    x, layers = stacked.decode(self, x, angles, cache)
    cache = {**cache, "step": cache["step"] + 1, "layers": layers}
    return self._last_norm(x), cache

  def logits(self, hidden: Array) -> Array:
    """Maps `[..., D]` hidden states to `[..., V]` float32 logits."""
    c = self.config
    if not c.tie_word_embeddings:
      logits = self.lm_head(hidden)
    else:
      logits = products.einsum(
        "...d,vd->...v",
        hidden.astype(c.dtype),
        self.embed_tokens.embedding.astype(c.dtype),
      )
    logits = activations.rows(logits, tensor=-1)
    if c.logits_scale != 1:
      logits = logits / c.logits_scale
    if c.logits_softcap is not None:
      logits = c.logits_softcap * jnp.tanh(logits / c.logits_softcap)
    return logits


def _scaled(x: Array, scale: float) -> Array:
  """A product with a constant in the dtype of `x`, left out if it is 1."""
  return x if scale == 1 else x * jnp.asarray(scale, x.dtype)


def make_norm(config: DecoderConfig) -> nn.Module:
  """Returns a norm of the kind that the settings name."""
  if config.norm == "layer":
    return norms.LayerNorm(
      config.norm_eps, config.param_dtype, config.norm_bias
    )
  plus_one = config.norm == "rms_plus_one"
  return norms.RMSNorm(config.norm_eps, config.param_dtype, plus_one)
