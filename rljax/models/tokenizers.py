"""Reads and writes the tokenizers that stand beside models."""

import pathlib
from typing import Any

from flax import linen as nn

from rljax.models import configs


def read(folder: pathlib.Path) -> Any:
  """Reads the folder's tokenizer, by the class it names."""
  settings = folder / "tokenizer_config.json"
  found = settings.is_file() or (folder / "tokenizer.json").is_file()
  if not found:
    raise ValueError(
      f"{folder} has no tokenizer (tokenizer.json or tokenizer_config.json); "
      "add one, or load with tokenizer=False."
    )
  named = None
  if settings.is_file():
    named = configs.read_json(settings).get("tokenizer_class")
  plain = named in ("PreTrainedTokenizerFast", "TokenizersBackend")
  if plain and (folder / "tokenizer.json").is_file():
    # The common case, without `AutoTokenizer`, whose import takes seconds.
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder)
  from transformers import AutoTokenizer

  return AutoTokenizer.from_pretrained(folder)


def check_vocabulary(tokenizer: Any, model: nn.Module, path: Any) -> None:
  """Raises ValueError for a tokenizer with more ids than the model embeds."""
  # An embedding lookup out of range would be clamped without an error.
  if len(tokenizer) > model.config.vocab_size:
    raise ValueError(
      f"the tokenizer of {path} has {len(tokenizer)} tokens, and the model "
      f"embeds {model.config.vocab_size}."
    )


def write(stage: pathlib.Path, tokenizer: Any) -> None:
  """Writes a tokenizer's files into a folder."""
  tokenizer.save_pretrained(stage)
  path = stage / "tokenizer_config.json"
  settings = configs.read_json(path)
  # The class has this name in transformers 5 only, the other one in all.
  if settings.get("tokenizer_class") == "TokenizersBackend":
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
  for left_over in ("is_local", "local_files_only"):
    settings.pop(left_over, None)
  configs.write_json(path, settings)
