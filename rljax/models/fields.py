"""What a config.json may say: types, bounds, defaults, and what is refused.

`checked` is the first to look at a config. A field of the wrong type, a size
that no model has, and a field that changes the numbers in a way that is not
implemented are refused by name; what is left out gets the default that
transformers has for that `model_type`. Fields that only matter in training
(dropout), to another task's head, or to the speed are let through, as are those
that transformers itself does not read.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

_MOST = 2**24
_MOST_LAYERS, _MOST_LABELS = 10_000, 100_000
_MOST_POSITIONS = 2**40
# A scale of more than this is no more than a slip of the pen.
_LARGEST = 1e30

_LAYERS = ("num_hidden_layers", "n_layer", "n_layers")
_POSITIONS = (
  *("max_position_embeddings", "n_positions", "sliding_window"),
  "original_max_position_embeddings",
)
_SIZES = (
  *("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads"),
  *("num_key_value_heads", "head_dim", "n_embd", "n_head", "n_inner"),
  *("dim", "hidden_dim", "n_heads", "type_vocab_size"),
  *("ffn_dim", "embedding_size", "query_pre_attn_scalar", "local_attention"),
  *("moe_intermediate_size", "num_experts", "num_local_experts"),
  *("num_experts_per_tok", "decoder_sparse_step", "no_rope_layer_interval"),
  *("sliding_window_pattern", "global_attn_every_n_layers"),
)
# Whole numbers that may be 0.
_COUNTS = ("max_window_layers",)
_TRUTHS = (
  *("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window"),
  *("scale_attn_weights", "scale_attn_by_inverse_layer_idx"),
  *("reorder_and_upcast_attn", "add_cross_attention", "is_decoder"),
  *("is_encoder_decoder", "sinusoidal_pos_embds", "use_parallel_residual"),
  *("norm_topk_prob", "do_layer_norm_before", "enable_bias", "norm_bias"),
  *("layer_norm_elementwise_affine", "classifier_bias"),
)
_SCALES = (
  *("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps", "norm_eps"),
  *("initializer_range", "init_std", "router_aux_loss_coef"),
  *("embedding_multiplier", "attention_multiplier", "residual_multiplier"),
)
# What divides, and so must not be 0.
_DIVISORS = (
  *("logits_scaling", "attn_logit_softcapping", "final_logit_softcapping"),
  *("rotary_emb_base", "rotary_pct", "rope_local_base_freq"),
  *("global_rope_theta", "local_rope_theta"),
)
# Whole numbers, one for each of some layers.
_LISTS = ("no_rope_layers", "mlp_only_layers")
_NAMES = (
  *("hidden_act", "activation_function", "activation", "problem_type"),
  *("hidden_activation", "classifier_activation", "classifier_pooling"),
)
_DICTS = ("rope_parameters", "rope_scaling")
_IDS = ("bos_token_id", "pad_token_id")
# Refused for every model, wherever they stand, unless null, false or empty.
_REFUSED = {
  "quantization_config": "quantised weights are not supported",
  "compression_config": "compressed weights are not supported",
  "pruned_heads": "pruned heads are not supported",
  "is_encoder_decoder": "models with an encoder and a decoder are not read",
  "per_layer_config": "layers of different shapes are not supported",
}

# What transformers takes for a field that is left out, where the models of this
# package do not ask for it.
_LLAMA = {"rms_norm_eps": 1e-6, "hidden_act": "silu", "initializer_range": 0.02}
_WINDOW = {
  "use_sliding_window": False,
  "sliding_window": 4096,
  "max_window_layers": 28,
}
_BERT = {
  "hidden_act": "gelu",
  "layer_norm_eps": 1e-12,
  "initializer_range": 0.02,
  "type_vocab_size": 2,
}
DEFAULTS: dict[str, dict[str, Any]] = {
  "llama": {
    **_LLAMA,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
  },
  "mistral": {**_LLAMA, "tie_word_embeddings": False, "sliding_window": 4096},
  "qwen2": {**_LLAMA, **_WINDOW, "tie_word_embeddings": False},
  "qwen3": {
    **_LLAMA,
    **_WINDOW,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "head_dim": 128,
  },
  "gpt2": {
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "initializer_range": 0.02,
    "tie_word_embeddings": True,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
  },
  "bert": {**_BERT, "pad_token_id": 0},
  "roberta": {**_BERT, "pad_token_id": 1},
  "xlm-roberta": {**_BERT, "pad_token_id": 1},
  "electra": {**_BERT, "pad_token_id": 0, "embedding_size": 128},
  "distilbert": {
    "activation": "gelu",
    "initializer_range": 0.02,
    "pad_token_id": 0,
  },
}
# Other names that transformers has for the fields of a model.
ALIASES: dict[str, dict[str, str]] = {
  "gpt2": {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
  },
  "distilbert": {
    "hidden_size": "dim",
    "num_attention_heads": "n_heads",
    "num_hidden_layers": "n_layers",
  },
}
# Fields that are null where a derived value is meant.
_MAY_BE_NULL = (
  *("num_key_value_heads", "head_dim", "n_inner", "sliding_window"),
  *("problem_type", "rope_parameters", "rope_scaling", "layer_types"),
  *("original_max_position_embeddings", "id2label", "num_labels"),
  *("attn_logit_softcapping", "final_logit_softcapping"),
  *("no_rope_layers", "mlp_only_layers"),
)


def checked(config: Any) -> dict[str, Any]:
  """Checks the content of a config.json, and completes it.

  Args:
    config: what the file holds.

  Returns:
    Its fields, under the names of the model's class, with the defaults of
    transformers for those that are left out.

  Raises:
    ValueError: naming the field that is wrong or not implemented.
  """
  if not isinstance(config, Mapping):
    raise ValueError(f"a config must be a JSON object, got {shown(config)}.")
  model_type = config.get("model_type")
  if model_type is not None and not isinstance(model_type, str):
    _refuse("model_type", "must be a text", model_type)
  found = _renamed(config, ALIASES.get(model_type, {}))
  _check_refused(found)
  for name, check in _CHECKS.items():
    if name not in found:
      continue
    if found[name] is None:
      # transformers writes null for what has its default, or no value.
      if name not in (*_MAY_BE_NULL, *_IDS, "eos_token_id"):
        del found[name]
      continue
    found[name] = check(name, found[name])
  if found.get("architectures") is not None:
    _check_texts("architectures", found["architectures"])
  if found.get("layer_types") is not None:
    _check_texts("layer_types", found["layer_types"])
  for name, value in DEFAULTS.get(model_type, {}).items():
    found.setdefault(name, value)
  _check_ids(found)
  return found


def shown(value: Any, limit: int = 60) -> str:
  """Returns a value as a message can quote it: short, whatever it is."""
  try:
    text = repr(value)
  except (RecursionError, ValueError):  # Nested too deeply; a huge number.
    return f"a {type(value).__name__}"
  return text if len(text) <= limit else f"{text[:limit]}..."


def whole(name: str, value: Any, least: int = 1, most: int = _MOST) -> int:
  """Returns a field that is a whole number within bounds.

  Raises:
    ValueError: if it is anything else; the message names the field.
  """
  is_whole = isinstance(value, int) and not isinstance(value, bool)
  if not is_whole or not least <= value <= most:
    _refuse(name, f"must be a whole number from {least} to {most}", value)
  return value


def number(name: str, value: Any, *, above: float | None = None) -> float:
  """Returns a field that is a number: finite, >= 0 or above a bound.

  Raises:
    ValueError: if it is anything else; the message names the field.
  """
  is_number = isinstance(value, int | float) and not isinstance(value, bool)
  wanted = "a number >= 0" if above is None else f"a number above {above:g}"
  if not is_number or not -_LARGEST < value < _LARGEST or math.isnan(value):
    _refuse(name, f"must be {wanted}", value)
  if value < 0 or (above is not None and not value > above):
    _refuse(name, f"must be {wanted}", value)
  return value


def _refuse(name: str, wanted: str, value: Any) -> None:
  raise ValueError(f'config field "{name}" {wanted}, got {shown(value)}.')


def _truth(name, value):
  if not isinstance(value, bool):
    _refuse(name, "must be true or false", value)
  return value


def _text(name, value):
  if not isinstance(value, str):
    _refuse(name, "must be a text", value)
  return value


def _positive(name, value):
  return number(name, value, above=0)


def _whole_numbers(name, value):
  is_list = isinstance(value, list | tuple)
  if not is_list or not all(
    isinstance(one, int) and 0 <= one <= _MOST_LAYERS for one in value
  ):
    _refuse(name, "must be a list of whole numbers", value)
  return list(value)


def _object(name, value):
  if not isinstance(value, Mapping):
    _refuse(name, "must be a JSON object", value)
  return dict(value)


def _bounded(least: int, most: int) -> Callable[[str, Any], int]:
  return lambda name, value: whole(name, value, least, most)


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
  **dict.fromkeys(_LAYERS, _bounded(1, _MOST_LAYERS)),
  **dict.fromkeys(_POSITIONS, _bounded(1, _MOST_POSITIONS)),
  **dict.fromkeys(_SIZES, _bounded(1, _MOST)),
  **dict.fromkeys(_COUNTS, _bounded(0, _MOST)),
  **dict.fromkeys(_TRUTHS, _truth),
  **dict.fromkeys(_SCALES, number),
  **dict.fromkeys(_DIVISORS, _positive),
  **dict.fromkeys(_LISTS, _whole_numbers),
  **dict.fromkeys(_NAMES, _text),
  **dict.fromkeys(_DICTS, _object),
  "num_labels": _bounded(1, _MOST_LABELS),
}


def _renamed(
  config: Mapping[str, Any], aliases: Mapping[str, str]
) -> dict[str, Any]:
  """Returns the fields under the names that the model's class gives them."""
  found = dict(config)
  for other, name in aliases.items():
    if found.get(other) is None:
      continue
    value = found.pop(other)
    if found.get(name, value) != value:
      raise ValueError(
        f'config fields "{name}" and "{other}" are the same thing, but are '
        f"{shown(found[name])} and {shown(value)}."
      )
    found[name] = value
  return found


def _check_refused(config: Mapping[str, Any]) -> None:
  for name, reason in _REFUSED.items():
    if config.get(name):
      raise ValueError(
        f'config field "{name}": {reason}, got {shown(config[name])}.'
      )


def _check_texts(name: str, value: Any) -> None:
  is_list = isinstance(value, list | tuple)
  if not is_list or not all(isinstance(item, str) for item in value):
    _refuse(name, "must be a list of texts", value)


def _check_ids(config: dict[str, Any]) -> None:
  """Checks the special ids; -1 stands for none, as older configs write it."""
  rows = config.get("vocab_size")
  most = _MOST if rows is None else rows - 1
  for name in _IDS:
    if config.get(name) == -1:
      config[name] = None
    elif config.get(name) is not None:
      config[name] = _id(name, config[name], most)
  if "eos_token_id" in config:
    config["eos_token_id"] = end_ids(config["eos_token_id"], most)


def end_ids(value: Any, most: int = _MOST) -> int | list[int] | None:
  """Returns the field `eos_token_id` of a config, checked.

  Args:
    value: an id, a list of them, or None; -1 stands for none.
    most: largest id that there is.

  Raises:
    ValueError: if it is anything else.
  """
  several = value if isinstance(value, list | tuple) else [value]
  found = [
    _id("eos_token_id", id_, most)
    for id_ in several
    if id_ is not None and not (type(id_) is int and id_ == -1)
  ]
  found = list(dict.fromkeys(found))
  if not found:
    return None
  return found if isinstance(value, list | tuple) else found[0]


def _id(name: str, value: Any, most: int) -> int:
  is_whole = isinstance(value, int) and not isinstance(value, bool)
  if not is_whole or not 0 <= value <= most:
    _refuse(
      name,
      f"must be the id of a token, from 0 to {most} (vocab_size - 1)",
      value,
    )
  return value
