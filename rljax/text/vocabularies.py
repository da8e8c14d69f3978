"""What the tokens of a tokenizer stand for, and which of them are drawn.

Tokenizers are Hugging Face fast tokenizers. Everything is numpy.
"""

import functools
import json
import re
from collections.abc import Mapping, Sequence

import numpy as np

from rljax.text import files


def token_bytes(tokenizer, *, vocab_size: int | None = None) -> list[bytes]:
  """Returns the bytes that each id adds to the decoded text.

  The text of a sequence of ids is the UTF-8 text of their bytes, one after the
  other. Three things may differ from the tokenizer's own `decode`: a blank that
  some tokenizers strip from the front, bytes that are not valid UTF-8, and
  clean-up of blanks.

  Args:
    tokenizer: Hugging Face fast tokenizer: byte-level BPE (GPT-2, Llama 3,
      Qwen, SmolLM2), SentencePiece-like with or without byte fallback
      (Llama 2, Mistral), or words that are joined without blanks.
    vocab_size: length of the result, for models with unused rows; the
      tokenizer's own size by default.

  Returns:
    One `bytes` per id; b"" for special and unused ids.

  Raises:
    ValueError: if the tokenizer's decoder is of another kind.
  """
  backend = getattr(tokenizer, "backend_tokenizer", None)
  if backend is None:
    raise ValueError(
      f"token_bytes needs a fast tokenizer, got {name(tokenizer)}."
    )
  decoder = json.loads(backend.to_str())["decoder"]
  if decoder is None:
    raise ValueError(
      f"The tokenizer {name(tokenizer)} has no decoder, so that its tokens "
      "are joined with blanks; rljax needs the bytes of each token."
    )
  special = special_ids(tokenizer)
  vocabulary = tokenizer.get_vocab()
  size = max(vocabulary.values()) + 1 if vocab_size is None else vocab_size
  if size <= max(vocabulary.values()):
    raise ValueError(
      f"vocab_size must be above the tokenizer's largest id "
      f"{max(vocabulary.values())}, got {size}."
    )
  result = [b""] * size
  for token, token_id in vocabulary.items():
    if token_id not in special:
      piece = _decode_piece(token, decoder)
      result[token_id] = piece.encode() if isinstance(piece, str) else piece
  return result


@functools.lru_cache(8)
def of_bytes(tokenizer, size: int) -> tuple[dict[bytes, int], int]:
  """Returns what tokens stand for -> the first of them, and the longest."""
  del size
  vocabulary = {}
  for token_id, piece in enumerate(token_bytes(tokenizer)):
    if piece:
      vocabulary.setdefault(piece, token_id)
  return vocabulary, max(map(len, vocabulary), default=0)


def allowed_tokens(
  tokenizer, vocab_size: int, stop_ids: Sequence[int] = ()
) -> np.ndarray:
  """Returns which ids a policy may sample.

  Special tokens other than the stop ids, and rows of the model's vocabulary
  that no token uses, are excluded. The sampler and every loss take the same
  mask: a policy that may put mass on a token that is never drawn defeats an
  entropy bonus with it.

  Args:
    tokenizer: Hugging Face tokenizer.
    vocab_size: V of the model.
    stop_ids: special tokens that may be drawn, because they end a response.

  Returns:
    `[V]` bool.

  Raises:
    ValueError: if the tokenizer has ids that the model has no row for.
  """
  used = list(tokenizer.get_vocab().values())
  if vocab_size <= max(used):
    raise ValueError(
      f"vocab_size must be above the tokenizer's largest id {max(used)}, got "
      f"{vocab_size}."
    )
  special = special_ids(tokenizer)
  if stop_ids and not 0 <= min(stop_ids) <= max(stop_ids) < vocab_size:
    raise ValueError(
      f"An end token has the id {max(stop_ids)}, and the model has "
      f"{vocab_size} tokens."
    )
  allowed = np.zeros(vocab_size, np.bool_)
  allowed[used] = True
  allowed[list(special)] = False
  allowed[list(stop_ids)] = True
  return allowed


def pad_id(tokenizer) -> int:
  """Returns the id to pad with: the pad token, else the end token, else 0."""
  for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
    if token_id is not None:
      return token_id
  return 0


def single_id(tokenizer, text: str) -> int:
  """Returns the id of a text that is one token.

  Raises:
    ValueError: if it is none, or several.
  """
  ids = tokenizer.encode(text, add_special_tokens=False)
  if len(ids) != 1:
    raise ValueError(
      f"The tag {text!r} is {len(ids)} tokens of the tokenizer, and must be "
      "one: choose a rare word, or add it to the tokenizer."
    )
  return ids[0]


def has_text(tokenizer, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
  """Returns which rows hold a token that is not special, `[B]` bool."""
  special = sorted(special_ids(tokenizer))
  return (~np.isin(ids, special) & np.asarray(mask, np.bool_)).any(axis=1)


def special_ids(tokenizer) -> set[int]:
  return set(tokenizer.all_special_ids) | {
    i for i, t in tokenizer.added_tokens_decoder.items() if t.special
  }


def kinds(decoder: Mapping) -> set[str]:
  """Returns the types of a decoder and of those that it is made of."""
  inner = decoder.get("decoders", ())
  return {decoder["type"]}.union(*map(kinds, inner))


def encode(tokenizer, text: str, *, add_special_tokens: bool) -> list[int]:
  try:
    return tokenizer.encode(text, add_special_tokens=add_special_tokens)
  except Exception as error:  # The backend raises bare Exceptions.
    raise ValueError(
      f"The tokenizer {name(tokenizer)} cannot encode {files.shorten(text)}: "
      f"{files.first_line(error)}."
    ) from error


def whole(tokenizer, ids: Sequence[int], skip_special_tokens=False) -> str:
  """Decodes ids from their start, without any clean-up."""
  return tokenizer.decode(
    ids,
    skip_special_tokens=skip_special_tokens,
    clean_up_tokenization_spaces=False,
  )


def name(tokenizer) -> str:
  return repr(
    getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
  )


def _byte_level_alphabet() -> dict[str, int]:
  """Maps characters to bytes in the vocabularies of byte-level BPE.

  Printable characters of Latin-1 stand for their own code; the other bytes,
  in order, for the characters from U+0100 on.

  Source:
    Radford et al. (2019), "Language Models are Unsupervised Multitask
    Learners", section 2.2, as their released vocabulary spells it.
  """
  printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
  others = [byte for byte in range(256) if byte not in printable]
  alphabet = {chr(byte): byte for byte in printable}
  alphabet.update({chr(0x100 + i): byte for i, byte in enumerate(others)})
  return alphabet


_ALPHABET = _byte_level_alphabet()
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _decode_piece(piece: str | bytes, decoder: Mapping) -> str | bytes:
  """Applies one decoder of a tokenizer.json to one token."""
  kind = decoder["type"]
  if kind == "Sequence":
    for inner in decoder["decoders"]:
      piece = _decode_piece(piece, inner)
    return piece
  # Fuse joins; Strip trims the front of the whole text, not of each token.
  if isinstance(piece, bytes) or kind in ("Fuse", "Strip"):
    return piece
  if kind == "ByteLevel":
    # Added tokens may hold characters outside the alphabet: then they are
    # text as it stands.
    if all(character in _ALPHABET for character in piece):
      return bytes(_ALPHABET[character] for character in piece)
    return piece.encode("utf-8")
  if kind == "ByteFallback":
    match = _BYTE_TOKEN.fullmatch(piece)
    return bytes([int(match[1], 16)]) if match else piece
  if kind == "Metaspace":
    return piece.replace(decoder["replacement"], " ")
  if kind == "Replace" and "String" in decoder["pattern"]:
    return piece.replace(decoder["pattern"]["String"], decoder["content"])
  raise ValueError(
    f"token_bytes does not know the decoder {kind!r} of this tokenizer."
  )
