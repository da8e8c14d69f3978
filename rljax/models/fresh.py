"""Language models with random weights, of a given shape."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from rljax.distributed import planning
from rljax.models import (
  configs,
  gpt2,
  language_models,
  llama,
  stacked,
  tokenizers,
)

Params = dict[str, Any]
FAMILIES = tuple(language_models.CONFIGS)


def make(
  family: str,
  tokenizer: Any,
  *,
  vocab_size: int = 0,
  hidden_size: int,
  num_layers: int,
  num_heads: int,
  max_positions: int,
  dtype: str = "float32",
  param_dtype: str = "float32",
  remat: str | bool = "none",
  scan_layers: bool = False,
) -> nn.Module:
  """Makes a small model of a family.

  Feed-forwards are four times as wide as the model; GPT-2 and Llama have
  widths of their own. A mixture has four experts of the model's width, two of
  them for each token.

  Args:
    family: one of `FAMILIES`, which are model types of transformers.
    tokenizer: of the model, which has a row for each of its tokens.
    vocab_size: rows of the vocabulary; 0 takes the tokenizer's.
    hidden_size: width D.
    num_layers: layers.
    num_heads: attention heads, which share D evenly.
    max_positions: longest text in tokens.
    dtype: of the computation, "float32" or "bfloat16".
    param_dtype: of its parameters, "float32" or "bfloat16".
    remat: what the backward pass recomputes of each layer, see `hf.load`.
    scan_layers: whether layers that repeat lie in stacks, likewise.

  Returns:
    The module; see `initial_params` for its parameters.

  Raises:
    ValueError: if there is no such family, the sizes do not fit each other, or
      the vocabulary is smaller than the tokenizer's.
  """
  if family not in FAMILIES:
    raise ValueError(
      f"family must be one of {', '.join(FAMILIES)}, got {family!r}."
    )
  rows = tokenizers.largest_id(tokenizer) + 1  # Vocabularies have holes.
  if vocab_size and vocab_size < rows:
    raise ValueError(
      f"vocab_size must be {rows}, the size of the tokenizer, or "
      f"more, got {vocab_size}."
    )
  precision = configs.settings(dtype, param_dtype, remat, scan_layers)
  sizes = {
    "vocab_size": vocab_size or rows,
    "hidden_size": hidden_size,
    "num_layers": planning.num_layers(num_layers),
    "num_heads": num_heads,
    "max_positions": max_positions,
    **precision,
  }
  known = {"gpt2": gpt2.GPT2Config, "llama": llama.LlamaConfig}
  if family in known:
    config = known[family](**sizes)
    stacked.check(config)
    return language_models.module(config)
  if hidden_size % num_heads:
    raise ValueError(
      f"hidden_size must be divisible by the {num_heads} heads, got "
      f"{hidden_size}."
    )
  config = language_models.CONFIGS[family].from_hf(_fields(family, sizes))
  config = dataclasses.replace(config, **precision)
  stacked.check(config)
  return language_models.module(config)


def _fields(family: str, sizes: dict[str, Any]) -> dict[str, Any]:
  """Returns a config.json of a family with these sizes.

  Readers take what their family has of it.
  """
  width, num_heads = sizes["hidden_size"], sizes["num_heads"]
  head_dim = width // num_heads
  return {
    "model_type": family,
    "vocab_size": sizes["vocab_size"],
    "hidden_size": width,
    "num_hidden_layers": sizes["num_layers"],
    "num_attention_heads": num_heads,
    "num_key_value_heads": num_heads,
    "head_dim": head_dim,
    "max_position_embeddings": sizes["max_positions"],
    "intermediate_size": 4 * width,
    "ffn_dim": 4 * width,
    "moe_intermediate_size": width,
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "query_pre_attn_scalar": head_dim,
    "attention_multiplier": head_dim**-0.5,
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
  }


def shapes(model: nn.Module) -> Params:
  """Returns the shapes and dtypes of a model's parameters; compiles nothing.

  Held against a mesh, they say whether it can split them before any work is
  done.
  """
  return jax.eval_shape(_initialise(model, 0))["params"]


def initial_params(model: nn.Module, seed: int) -> Params:
  """Draws the parameters that a model begins with, in one compiled program.

  Whether its layers lie in stacks does not change the numbers.

  Args:
    model: from `make`.
    seed: of the draw.
  """
  return planning.initialise(_initialise(model, seed))["params"]


def _initialise(model: nn.Module, seed: int) -> Callable[[], Any]:
  config = dataclasses.replace(model.config, scan_layers=False)
  init = functools.partial(
    language_models.module(config).init,
    jax.random.key(seed),
    jnp.zeros((1, 1), jnp.int32),
    jnp.ones((1, 1), bool),
  )
  return lambda: stacked.stack(init(), model.config)
