"""The families of language models, by the `model_type` of their config."""

from typing import Any

import jax
from flax import linen as nn

from rljax.distributed import activations
from rljax.models import (
  decoder,
  gemma,
  gpt2,
  gpt_neox,
  granite,
  llama,
  mixtral,
  olmo2,
  opt,
  phi3,
  smollm3,
  stacked,
)

Config = gpt2.GPT2Config | decoder.DecoderConfig

# Class of settings, with `from_hf` and `to_hf`.
CONFIGS = {
  "gpt2": gpt2.GPT2Config,
  "llama": llama.LlamaConfig,
  "mistral": llama.LlamaConfig,
  "qwen2": llama.LlamaConfig,
  "qwen3": llama.LlamaConfig,
  "gemma": gemma.GemmaConfig,
  "gemma2": gemma.GemmaConfig,
  "gemma3_text": gemma.GemmaConfig,
  "gpt_neox": gpt_neox.GPTNeoXConfig,
  "granite": granite.GraniteConfig,
  "mixtral": mixtral.MixtralConfig,
  "qwen3_moe": mixtral.MixtralConfig,
  "olmo2": olmo2.Olmo2Config,
  "opt": opt.OPTConfig,
  "phi3": phi3.Phi3Config,
  "smollm3": smollm3.SmolLM3Config,
}
# The end of the path of an output layer -> the dimension of its vocabulary.
_OUTPUTS = {
  ("embed_tokens", "embedding"): 0,
  ("wte", "embedding"): 0,
  ("lm_head", "kernel"): 1,
}
PARTITION_RULES = (*gpt2.PARTITION_RULES[:-1], *decoder.PARTITION_RULES)


def module(config: Config) -> nn.Module:
  """Returns the module that a config describes."""
  if isinstance(config, gpt2.GPT2Config):
    return gpt2.GPT2(config)
  if isinstance(config, llama.LlamaConfig):
    return llama.Llama(config)
  return decoder.Decoder(config)


def parameter_names(config: Config) -> dict[str, tuple[tuple, bool]]:
  """Returns the table of `decoder.parameter_names`, of any language model."""
  is_gpt2 = isinstance(config, gpt2.GPT2Config)
  names = (gpt2 if is_gpt2 else decoder).parameter_names(config)
  return stacked.placed(names, config)


def with_whole_output(model: Any, params: Any) -> Any:
  """Gathers what `logits` reads of parameters, ahead of a loop that calls it.

  Args:
    model: language model.
    params: its parameters, with adapters or not, as they lie on a mesh.

  Returns:
    The same tree, for `logits` alone; see `activations.gathered`.
  """

  def one(path, leaf):
    names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
    vocabulary = _OUTPUTS.get(tuple(names[-2:]))
    if vocabulary is None:
      return leaf
    return activations.gathered(leaf, vocabulary, model.config.dtype)

  return jax.tree_util.tree_map_with_path(one, params)
