"""Reads Llama-architecture GGUF files into Hugging Face's form, without torch.

A GGUF file holds everything in one place: sizes, quantised weights,
vocabulary, merges and chat template. `open_reader` parses it once; `config`,
`tensors` and `tokenizer` each take what they need from the reader.
"""

import os
import pathlib
import re
from typing import Any

import numpy as np

from rljax.models import gguf_header

_TENSOR_NAMES = {
  "token_embd.weight": "model.embed_tokens.weight",
  "output_norm.weight": "model.norm.weight",
  "output.weight": "lm_head.weight",
}
_LAYER_TENSOR_NAMES = {
  "attn_norm": "input_layernorm",
  "attn_q": "self_attn.q_proj",
  "attn_k": "self_attn.k_proj",
  "attn_v": "self_attn.v_proj",
  "attn_output": "self_attn.o_proj",
  "ffn_norm": "post_attention_layernorm",
  "ffn_gate": "mlp.gate_proj",
  "ffn_up": "mlp.up_proj",
  "ffn_down": "mlp.down_proj",
}
_PRE_TOKENIZERS = ("gpt-2", "smollm")

# Values of `tokenizer.ggml.token_type`.
_CONTROL, _USER_DEFINED = 3, 4


def open_reader(path: str | os.PathLike) -> Any:
  """Opens a GGUF file, whose tensors are read only when asked for.

  Raises:
    ValueError: if the `gguf` package or the file is missing, or the file is
      not GGUF or of another architecture than llama.
  """
  try:
    import gguf
  except ImportError as error:
    raise ValueError(
      f"{path} is read with the gguf package, which is not installed: pip "
      "install gguf"
    ) from error

  if not pathlib.Path(path).is_file():
    raise ValueError(f"{path} does not exist.")
  gguf_header.check(path)
  try:
    reader = gguf.GGUFReader(path)
  except Exception as error:  # It raises whatever numpy does.
    raise ValueError(f"{path} is not a GGUF file: {error}.") from error
  architecture = _field(reader, "general.architecture")
  if architecture != "llama":
    raise ValueError(
      f'{path} has the architecture "{architecture}"; only "llama" is read.'
    )
  return reader


def config(reader: Any) -> dict[str, Any]:
  """Makes the Hugging Face `config.json` of the file's metadata.

  Raises:
    ValueError: if a size is missing, or positions are scaled.
  """
  scaling = _field(reader, "llama.rope.scaling.type", "none")
  scaled = scaling != "none" or "rope_freqs.weight" in _tensor_names(reader)
  if scaled:
    raise ValueError(
      f'the file scales its rotary positions (type "{scaling}"), which is not '
      "read from GGUF; load the model's Hugging Face directory instead."
    )
  num_heads = _size(reader, "llama.attention.head_count")
  hidden_size = _size(reader, "llama.embedding_length")
  return {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": len(_texts(reader, "tokenizer.ggml.tokens")),
    "hidden_size": hidden_size,
    "intermediate_size": _field(reader, "llama.feed_forward_length"),
    "num_hidden_layers": _field(reader, "llama.block_count"),
    "num_attention_heads": num_heads,
    "num_key_value_heads": _num_key_value_heads(reader),
    "head_dim": _field(
      reader, "llama.rope.dimension_count", hidden_size // num_heads
    ),
    "max_position_embeddings": _field(reader, "llama.context_length"),
    "rms_norm_eps": _decimal(
      _field(reader, "llama.attention.layer_norm_rms_epsilon")
    ),
    "rope_theta": _decimal(_field(reader, "llama.rope.freq_base", 10000.0)),
    "tie_word_embeddings": "output.weight" not in _tensor_names(reader),
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": _field(reader, "tokenizer.ggml.bos_token_id", None),
    "eos_token_id": _end_ids(reader),
    "pad_token_id": _field(reader, "tokenizer.ggml.padding_token_id", None),
  }


def tensors(reader: Any) -> dict[str, np.ndarray]:
  """Returns every tensor, dequantised, under its Hugging Face name.

  Returns:
    float32 arrays in Hugging Face's layout: a matrix is `[out, in]`, and rows
    of the query and key projections are in rotate-half order.

  Raises:
    ValueError: if a tensor has no place in a Llama.
  """
  import gguf

  num_heads = _size(reader, "llama.attention.head_count")
  heads = {"attn_q": num_heads, "attn_k": _num_key_value_heads(reader)}
  found = {}
  for tensor in reader.tensors:
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", tensor.name)
    part = layer[2] if layer else None
    if tensor.name in _TENSOR_NAMES:
      name = _TENSOR_NAMES[tensor.name]
    elif part in _LAYER_TENSOR_NAMES:
      name = f"model.layers.{layer[1]}.{_LAYER_TENSOR_NAMES[part]}.weight"
    else:
      raise ValueError(f"the GGUF tensor {tensor.name} is not part of a Llama.")
    try:
      array = gguf.dequantize(tensor.data, tensor.tensor_type)
      array = np.asarray(array, np.float32)
      if part in heads:
        array = _to_rotate_half(array, heads[part])
    except Exception as error:  # It raises whatever numpy does.
      raise ValueError(
        f"the GGUF tensor {tensor.name} cannot be read: {error}."
      ) from error
    found[name] = array
  return found


def tokenizer(reader: Any) -> Any:
  """Makes the `PreTrainedTokenizerFast` of the file's byte-level BPE.

  Raises:
    ValueError: if the file holds another kind of tokenizer.
  """
  import tokenizers
  import transformers

  kind = _field(reader, "tokenizer.ggml.model")
  if kind != "gpt2":
    raise ValueError(
      f'the file\'s tokenizer is of kind "{kind}"; only "gpt2" (byte-level '
      "BPE) is read from GGUF."
    )
  tokens = _texts(reader, "tokenizer.ggml.tokens")
  merges = _texts(reader, "tokenizer.ggml.merges")
  try:
    model = tokenizers.models.BPE(
      vocab={token: i for i, token in enumerate(tokens)},
      merges=[tuple(merge.split(" ")) for merge in merges],
    )
  except Exception as error:
    raise ValueError(
      'the GGUF field "tokenizer.ggml.merges" does not fit the tokens: '
      f"{error}."
    ) from error
  backend = tokenizers.Tokenizer(model)
  backend.pre_tokenizer = _pre_tokenizer(
    _field(reader, "tokenizer.ggml.pre", "gpt-2")
  )
  backend.decoder = tokenizers.decoders.ByteLevel()
  types = _field(reader, "tokenizer.ggml.token_type", [1] * len(tokens))
  if not isinstance(types, list) or len(types) != len(tokens):
    raise ValueError(
      'the GGUF field "tokenizer.ggml.token_type" must have one number for '
      f"each of the {len(tokens)} tokens."
    )
  added = [
    tokenizers.AddedToken(
      token, special=token_type == _CONTROL, normalized=False
    )
    for token, token_type in zip(tokens, types, strict=True)
    if token_type in (_CONTROL, _USER_DEFINED)
  ]
  backend.add_tokens(added)

  names = {}
  for role, key in (
    ("bos_token", "bos"),
    ("eos_token", "eos"),
    ("unk_token", "unknown"),
    ("pad_token", "padding"),
  ):
    token_id = _field(reader, f"tokenizer.ggml.{key}_token_id", None)
    if token_id is not None:
      if not isinstance(token_id, int) or not 0 <= token_id < len(tokens):
        raise ValueError(
          f'the GGUF field "tokenizer.ggml.{key}_token_id" must be the id of a '
          f"token, below {len(tokens)}, got {token_id}."
        )
      names[role] = tokens[token_id]
  has_start = "bos_token" in names
  if has_start and _field(reader, "tokenizer.ggml.add_bos_token", False):
    backend.post_processor = tokenizers.processors.TemplateProcessing(
      single=[names["bos_token"], "$A"],
      special_tokens=[
        (names["bos_token"], backend.token_to_id(names["bos_token"]))
      ],
    )
  result = transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend,
    model_max_length=_field(reader, "llama.context_length"),
    clean_up_tokenization_spaces=False,
    **names,
  )
  result.chat_template = _field(reader, "tokenizer.chat_template", None)
  return result


def _pre_tokenizer(name: str) -> Any:
  """Makes the rule that cuts text before merges; the file only names it."""
  from tokenizers import pre_tokenizers

  byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
  if name == "gpt-2":
    return byte_level
  if name == "smollm":
    # Digits come first: a line break or space in front of a digit would
    # otherwise be cut in two, and every numbered list differ from training.
    digits = pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Sequence([digits, byte_level])
  raise ValueError(
    f'the file\'s pre-tokenizer "{name}" is not known; supported: '
    f"{', '.join(_PRE_TOKENIZERS)}."
  )


def _to_rotate_half(array: np.ndarray, num_heads: int) -> np.ndarray:
  """Undoes the row order that GGUF writers give query and key projections.

  They interleave the two halves of a head, so that rotary pairs are
  neighbours; Hugging Face (and this package) pairs row i with
  row i + head_dim / 2.
  """
  rows, columns = array.shape
  pairs = array.reshape(num_heads, rows // num_heads // 2, 2, columns)
  return pairs.swapaxes(1, 2).reshape(rows, columns)


def _num_key_value_heads(reader: Any) -> int:
  key = "llama.attention.head_count_kv"
  if _field(reader, key, None) is None:
    key = "llama.attention.head_count"
  return _size(reader, key)


def _tensor_names(reader: Any) -> set[str]:
  return {tensor.name for tensor in reader.tensors}


def _decimal(x: float) -> float:
  """Returns the shortest decimal of a float32: 1e-05, not 9.9999997e-06."""
  if isinstance(x, bool) or not isinstance(x, int | float):
    raise ValueError(f"a number is needed in the GGUF file, got {x!r:.60}.")
  return float(str(np.float32(x)))


_REQUIRED = object()


def _field(reader: Any, key: str, default: Any = _REQUIRED) -> Any:
  field = reader.fields.get(key)
  if field is not None:
    try:
      return field.contents()
    except Exception as error:
      raise ValueError(
        f'the GGUF field "{key}" cannot be read: {error}.'
      ) from error
  if default is _REQUIRED:
    raise ValueError(f'the GGUF file lacks the metadata field "{key}".')
  return default


def _end_ids(reader: Any) -> Any:
  """Returns the end of a text, and those of a turn and a message if it has."""
  found = [
    _field(reader, f"tokenizer.ggml.{name}_token_id", None)
    for name in ("eos", "eot", "eom")
  ]
  found = [id_ for i, id_ in enumerate(found) if id_ not in found[:i]]
  found = [id_ for id_ in found if id_ is not None]
  return found if len(found) > 1 else next(iter(found), None)


def _size(reader: Any, key: str) -> int:
  value = _field(reader, key)
  if isinstance(value, bool) or not isinstance(value, int) or value < 1:
    raise ValueError(
      f'the GGUF field "{key}" must be a whole number above 0, got '
      f"{value!r:.60}."
    )
  return value


def _texts(reader: Any, key: str) -> list[str]:
  value = _field(reader, key)
  if not isinstance(value, list) or not all(isinstance(x, str) for x in value):
    raise ValueError(f'the GGUF field "{key}" must be a list of texts.')
  return value
