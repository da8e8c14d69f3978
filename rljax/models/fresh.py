"""Language models with random weights, of a given shape."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from rljax.distributed import planning
from rljax.models import gpt2, llama, tokenizers

Params = dict[str, Any]


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
  remat: bool = False,
) -> nn.Module:
  """Makes a small model of one of two families.

  Args:
    family: "gpt2" or "llama".
    tokenizer: of the model, which has a row for each of its tokens.
    vocab_size: rows of the vocabulary; 0 takes the tokenizer's.
    hidden_size: width D.
    num_layers: layers.
    num_heads: attention heads, which share D evenly.
    max_positions: longest text in tokens.
    dtype: of the computation, "float32" or "bfloat16".
    remat: whether the backward pass recomputes each layer.

  Returns:
    The module; see `initial_params` for its parameters.

  Raises:
    ValueError: if there is no such family, the sizes do not fit each other, or
      the vocabulary is smaller than the tokenizer's.
  """
  if family not in ("gpt2", "llama"):
    raise ValueError(f"family must be gpt2 or llama, got {family!r}.")
  rows = tokenizers.largest_id(tokenizer) + 1  # Vocabularies have holes.
  if vocab_size and vocab_size < rows:
    raise ValueError(
      f"vocab_size must be {rows}, the size of the tokenizer, or "
      f"more, got {vocab_size}."
    )
  sizes = {
    "vocab_size": vocab_size or rows,
    "hidden_size": hidden_size,
    "num_layers": planning.num_layers(num_layers),
    "num_heads": num_heads,
    "max_positions": max_positions,
    "dtype": dtype,
    "remat": remat,
  }
  if family == "gpt2":
    return gpt2.GPT2(gpt2.GPT2Config(**sizes))
  return llama.Llama(llama.LlamaConfig(**sizes))


def shapes(model: nn.Module) -> Params:
  """Returns the shapes and dtypes of a model's parameters; compiles nothing.

  Held against a mesh, they say whether it can split them before any work is
  done.
  """
  return jax.eval_shape(_initialise(model, 0))["params"]


def initial_params(model: nn.Module, seed: int) -> Params:
  """Draws the parameters that a model begins with, in one compiled program.

  Args:
    model: from `make`.
    seed: of the draw.
  """
  return planning.initialise(_initialise(model, seed))["params"]


def _initialise(model: nn.Module, seed: int) -> Callable[[], Any]:
  return functools.partial(
    model.init,
    jax.random.key(seed),
    jnp.zeros((1, 1), jnp.int32),
    jnp.ones((1, 1), bool),
  )
