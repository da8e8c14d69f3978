"""Reads and writes the tokenizers that stand beside models."""

import codecs
import contextlib
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

from flax import linen as nn

from rljax.models import configs, fields
from rljax.storage import folders

_ROLES = ("bos_token", "eos_token", "pad_token", "unk_token", "cls_token")
_SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
_FILES = (
  *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
  *("added_tokens.json", "vocab.json", "merges.txt", "vocab.txt"),
  *("chat_template.jinja", *_SENTENCEPIECE),
)


def read(folder: pathlib.Path) -> Any:
  """Reads the folder's tokenizer, by the class it names.

  No code of the folder is run, and nobody is asked whether it may.

  Raises:
    ValueError: if there is none, or its files are damaged.
  """
  settings = folder / "tokenizer_config.json"
  found = settings.is_file() or (folder / "tokenizer.json").is_file()
  if not found:
    model = next((n for n in _SENTENCEPIECE if (folder / n).is_file()), None)
    if model:
      raise ValueError(
        f"{folder} has a SentencePiece model alone ({model}), without "
        "tokenizer_config.json. Convert it once, where sentencepiece is "
        f'installed: transformers.LlamaTokenizerFast(vocab_file="{model}")'
        f'.save_pretrained("{folder}").'
      )
    raise ValueError(
      f"{folder} has no tokenizer (tokenizer.json or tokenizer_config.json); "
      "add one, or load with tokenizer=False."
    )
  named = None
  for name in _FILES:
    if (folder / name).exists() or (folder / name).is_symlink():
      folders.inside(folder, name)
      if name.endswith(".json") and name not in ("vocab.json",):
        content = configs.read_json(folder / name)
        if name == "tokenizer_config.json":
          named = content.get("tokenizer_class")
          _check_settings(content, settings)
  plain = named in ("PreTrainedTokenizerFast", "TokenizersBackend")
  try:
    with _without_marks(folder) as source:
      tokenizer = _from_pretrained(
        source, plain and (folder / "tokenizer.json").is_file()
      )
  except BaseException as error:  # Rust panics are no Exceptions.
    if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit):
      raise
    raise ValueError(
      f"{folder} has a tokenizer that cannot be read: {_first_line(error)}"
    ) from error
  tokenizer.name_or_path = str(folder)
  _check_whole(tokenizer, folder)
  return tokenizer


def _from_pretrained(folder: pathlib.Path, plain: bool) -> Any:
  if plain:
    # The common case, without `AutoTokenizer`, whose import takes seconds.
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(
      folder, local_files_only=True
    )
  from transformers import AutoTokenizer

  return AutoTokenizer.from_pretrained(
    folder, trust_remote_code=False, local_files_only=True
  )


@contextlib.contextmanager
def _without_marks(folder: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields a folder whose files have no byte order mark, which Windows adds.

  transformers would stumble over it, or take it for a part of a template.
  """
  present = [
    folder / name
    for name in (*_FILES, "config.json")
    if (folder / name).is_file()
  ]
  marked = [path for path in present if _has_mark(path)]
  if not marked:
    yield folder
    return
  with tempfile.TemporaryDirectory() as copy:
    for path in present:
      content = path.read_bytes()
      if path in marked:
        content = content.removeprefix(codecs.BOM_UTF8)
      (pathlib.Path(copy) / path.name).write_bytes(content)
    yield pathlib.Path(copy)


def _has_mark(path: pathlib.Path) -> bool:
  with path.open("rb") as file:
    return file.read(3) == codecs.BOM_UTF8


def _first_line(error: BaseException) -> str:
  lines = str(error).strip().splitlines() or [""]
  return f"{type(error).__name__}: {fields.shown(lines[0], 200)}."


def _check_settings(content: dict[str, Any], path: pathlib.Path) -> None:
  """Raises for settings of a type that transformers stumbles over later."""
  for name in ("tokenizer_class", *_ROLES):
    value = content.get(name)
    is_token = isinstance(value, dict) and isinstance(value.get("content"), str)
    if value is None or isinstance(value, str):
      continue
    if name == "tokenizer_class" or not is_token:
      raise ValueError(
        f'{path}: "{name}" must be a text, got {fields.shown(value)}.'
      )
  template = content.get("chat_template")
  if template is not None and not isinstance(template, str | list):
    raise ValueError(
      f'{path}: "chat_template" must be a text, got {fields.shown(template)}.'
    )
  length = content.get("model_max_length")
  is_number = isinstance(length, int | float) and not isinstance(length, bool)
  if length is not None and not (is_number and length > 0):
    raise ValueError(
      f'{path}: "model_max_length" must be a number above 0, got '
      f"{fields.shown(length)}."
    )


def _check_whole(tokenizer: Any, folder: pathlib.Path) -> None:
  """Raises for a tokenizer that was read but cannot be used."""
  try:
    vocabulary = tokenizer.get_vocab()
    special = [getattr(tokenizer, f"{role}_id") for role in _ROLES[:4]]
    tokenizer.encode("")  # Any word may be unknown.
  except Exception as error:
    raise ValueError(
      f"{folder} has a tokenizer that cannot be used: {_first_line(error)}"
    ) from error
  if not vocabulary:
    raise ValueError(f"{folder} has a tokenizer without tokens.")
  for role, id_ in zip(_ROLES, special, strict=False):
    if id_ is not None and not isinstance(id_, int):
      raise ValueError(
        f'{folder}: "{role}" of its tokenizer is not one token, got '
        f"{fields.shown(id_)}."
      )


def largest_id(tokenizer: Any) -> int:
  """Returns the largest id that a tokenizer can give, added tokens included."""
  added = getattr(tokenizer, "added_tokens_decoder", None) or {}
  return max([*tokenizer.get_vocab().values(), *added])


def check_vocabulary(tokenizer: Any, model: nn.Module, path: Any) -> None:
  """Raises ValueError for a tokenizer with ids that the model does not embed.

  The largest id decides, not how many there are: vocabularies have holes.
  """
  # An embedding lookup out of range would be clamped without an error.
  largest = largest_id(tokenizer)
  if largest >= model.config.vocab_size:
    raise ValueError(
      f"the tokenizer of {path} has {len(tokenizer)} tokens, and the model "
      f"embeds {model.config.vocab_size}: the largest id is {largest}."
    )


def add_ends(tokenizer: Any, ids: int | list[int] | None) -> None:
  """Leaves the end tokens of a model's config with its tokenizer.

  What encodes text knows the tokenizer alone, and must not put a second end
  token behind one that only the config names.
  """
  several = ids if isinstance(ids, list | tuple) else [ids]
  known = set(tokenizer.get_vocab().values())
  tokenizer.model_ends = tuple(id_ for id_ in several if id_ in known)


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
