"""Encodes text as ids, decodes ids as text, and lists what tokens stand for.

Text becomes ids once, and ids become text once, here. Tokenizers are Hugging
Face fast tokenizers. Everything is numpy; nothing imports jax.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from absl import logging

from rljax.text import files, templates

_ANSWER = "ANSWER"

# Text to ids and back.


def require_tokens(
  tokenizer,
  *,
  eos: bool = True,
  pad: bool = False,
  text: str | None = None,
) -> None:
  """Checks that a tokenizer has what a script needs.

  Args:
    tokenizer: Hugging Face fast tokenizer.
    eos: whether an end token is needed.
    pad: whether a padding token is needed. It may be the end token, as masks
      are made from lengths.
    text: text that must survive encoding and decoding, blanks aside, such as
      the symbols of a task.

  Raises:
    ValueError: naming everything that is missing.
  """
  missing = []
  if eos and tokenizer.eos_token_id is None:
    missing.append("an end token (eos_token)")
  if pad and tokenizer.pad_token_id is None:
    missing.append("a padding token (pad_token)")
  if text and not _survives(tokenizer, text):
    lost = [repr(part) for part in _lost_parts(tokenizer, text)]
    missing += [
      f"a way to write {part}" for part in lost or [files.shorten(text)]
    ]
  if missing:
    raise ValueError(
      f"The tokenizer {_name(tokenizer)} lacks {', '.join(missing)}."
    )


def encode_prompts(
  tokenizer,
  texts: Sequence[str],
  *,
  max_length: int,
  truncate: Literal[False, "left"] = False,
) -> list[list[int]]:
  """Turns prompts into ids, with the start token if the tokenizer has one.

  A prompt that begins with the text of the start token, as chat templates
  write it, gets no second one.

  Args:
    tokenizer: Hugging Face fast tokenizer.
    texts: B prompts.
    max_length: tokens that a prompt may have, the start token included; > 0.
    truncate: False to refuse longer prompts; "left" to keep their end, after
      the start token. How many were cut is logged.

  Returns:
    B lists of ids, none of them empty.

  Raises:
    ValueError: naming the prompt, if it is too long, holds what the tokenizer
      cannot write, or has no tokens; or if the tokenizer puts its end token
      after prompts.
  """
  if max_length < 1:
    raise ValueError(f"max_length must be positive, got {max_length}.")
  if truncate not in (False, "left"):
    raise ValueError(f'truncate must be False or "left", got {truncate!r}.')
  # A model would take an end token after the prompt for its own.
  added = _encode(tokenizer, "", add_special_tokens=True)
  if added[:1] == [tokenizer.bos_token_id]:
    added = added[1:]
  if added[-1:] == [tokenizer.eos_token_id]:
    raise ValueError(
      f"The tokenizer {_name(tokenizer)} puts an end token after prompts; "
      "save it with a post-processor that does not."
    )
  rows, num_truncated, num_unknown = [], 0, 0
  for text in texts:
    ids = _encode_start(tokenizer, text)
    if not ids:
      raise ValueError(
        f"The prompt {files.shorten(text)} has no tokens, and the tokenizer "
        f"{_name(tokenizer)} adds no start token."
      )
    if len(ids) > max_length:
      if not truncate:
        raise ValueError(
          f"The prompt {files.shorten(text)} has {len(ids)} tokens, the limit "
          f"is {max_length}."
        )
      num_truncated += 1
      ids = cut_prompt(tokenizer, ids, max_length)
    num_unknown += _has_unknown(tokenizer, ids)
    rows.append(ids)
  if num_truncated:
    logging.warning(
      "%d of %d prompts were cut on the left to %d tokens.",
      num_truncated,
      len(rows),
      max_length,
    )
  if num_unknown:
    logging.warning(
      "%d of %d prompts hold the unknown token.", num_unknown, len(rows)
    )
  return rows


def cut_prompt(
  tokenizer, prompt_ids: Sequence[int], max_length: int
) -> list[int]:
  """Returns the end of a prompt, after its start token if it has one.

  Args:
    tokenizer: Hugging Face fast tokenizer.
    prompt_ids: ids of a prompt.
    max_length: tokens that are kept at most, the start token included; > 0.
  """
  ids = list(prompt_ids)
  if len(ids) <= max_length:
    return ids
  start = ids[:1] if ids[0] == tokenizer.bos_token_id else []
  start = start[: max_length - 1]
  return start + ids[len(ids) - max_length + len(start) :]


def encode_pairs(
  tokenizer,
  pairs: Sequence[tuple[str, str]],
  *,
  max_prompt_length: int,
  max_response_length: int,
) -> list[tuple[list[int], list[int]]]:
  """Turns prompts and their responses into ids; responses end in the end token.

  A prompt gets the ids that `encode_prompts` gives it, because these are what
  the sampler will continue; a response those of `encode_response`. How many
  were encoded apart is logged.

  Args:
    tokenizer: Hugging Face fast tokenizer with an end token.
    pairs: (prompt, response) texts.
    max_prompt_length: tokens that a prompt may have.
    max_response_length: tokens that a response may have, end token included.

  Returns:
    (prompt ids, response ids) per pair.

  Raises:
    ValueError: naming the text that is too long or cannot be written.
  """
  require_tokens(tokenizer, eos=True)
  prompts = encode_prompts(
    tokenizer, [prompt for prompt, _ in pairs], max_length=max_prompt_length
  )
  rows, num_apart = [], 0
  for (prompt, response), prompt_ids in zip(pairs, prompts, strict=True):
    response_ids, apart = encode_response(
      tokenizer, prompt, prompt_ids, response
    )
    num_apart += apart
    if len(response_ids) > max_response_length:
      raise ValueError(
        f"The response {files.shorten(response)} has {len(response_ids)} "
        f"tokens with its end token, the limit is {max_response_length}."
      )
    rows.append((prompt_ids, response_ids))
  if num_apart:
    logging.warning(
      "%d of %d responses were encoded apart from their prompts.",
      num_apart,
      len(rows),
    )
  return rows


def encode_response(
  tokenizer,
  prompt: str,
  prompt_ids: Sequence[int],
  response: str,
  *,
  end_id: int | None = None,
) -> tuple[list[int], bool]:
  """Returns the ids of a response after its prompt, end token included.

  The two texts are encoded together if the result begins with the prompt's ids.
  Otherwise a token would cross the border, and the response is encoded apart.

  Args:
    tokenizer: Hugging Face fast tokenizer with an end token.
    prompt: text.
    prompt_ids: all its ids, from `encode_prompts`, before any cut.
    response: text.
    end_id: the end token, such as `turn_end` in a chat; the tokenizer's own by
      default.

  Returns:
    The ids, and whether they were encoded apart from the prompt.
  """
  joint = _encode_start(tokenizer, prompt + response)
  apart = joint[: len(prompt_ids)] != list(prompt_ids)
  if apart:
    ids = _encode(tokenizer, response, add_special_tokens=False)
  else:
    ids = joint[len(prompt_ids) :]
  return [*ids, tokenizer.eos_token_id if end_id is None else end_id], apart


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


def decode(
  tokenizer,
  response_ids: np.ndarray,
  response_mask: np.ndarray,
  *,
  skip_special_tokens: bool = True,
) -> list[str]:
  """Turns the unmasked ids of each row into text.

  Args:
    tokenizer: Hugging Face fast tokenizer.
    response_ids: `[B, T]` int. An id that the tokenizer does not know, such as
      an unused row of a padded vocabulary, becomes nothing.
    response_mask: `[B, T]` bool.
    skip_special_tokens: whether special tokens, such as the end token, become
      nothing.

  Returns:
    B texts.
  """
  ids, mask = np.asarray(response_ids), np.asarray(response_mask)
  if ids.ndim != 2 or ids.shape != mask.shape or mask.dtype != np.bool_:
    raise ValueError(
      f"decode needs ids and a bool mask of one [B, T] shape, got {ids.shape} "
      f"and {mask.dtype} {mask.shape}."
    )
  return [
    tokenizer.decode(
      row[keep].tolist(),
      skip_special_tokens=skip_special_tokens,
      clean_up_tokenization_spaces=False,
    )
    for row, keep in zip(ids, mask, strict=True)
  ]


def stop_ids(tokenizer, *more: int | Sequence[int] | None) -> tuple[int, ...]:
  """Returns the ids that end a response.

  These are the tokenizer's end token, the end of a turn in its chat template,
  and those that a model's config names.

  Args:
    tokenizer: Hugging Face tokenizer.
    *more: further ids, such as `eos_token_id` of a config: an id, several, or
      None.

  Raises:
    ValueError: if there is none.
  """
  found = [tokenizer.eos_token_id, turn_end(tokenizer)]
  for ids in more:
    found += [ids] if ids is None or isinstance(ids, int) else list(ids)
  found = tuple(dict.fromkeys(id_ for id_ in found if id_ is not None))
  if not found:
    require_tokens(tokenizer, eos=True)
  return found


def turn_end(tokenizer) -> int | None:
  """Returns the token by which the chat template ends what a model says.

  It may be another than the tokenizer's end token, which ends a text.

  Args:
    tokenizer: Hugging Face tokenizer.

  Returns:
    The first token behind an answer in the template, if it is a special one;
    else None, as without a template.
  """
  if not getattr(tokenizer, "chat_template", None):
    return None
  asked = [{"role": "user", "content": "a"}]
  try:
    text = templates.render(
      tokenizer,
      [*asked, {"role": "assistant", "content": _ANSWER}],
      seconds=2.0,
    )
  except ValueError:  # A template may refuse such a conversation.
    return None
  before, found, behind = text.rpartition(_ANSWER)
  if not found or not before:
    return None
  named = {
    token.content: id_
    for id_, token in tokenizer.added_tokens_decoder.items()
    if token.special
  }
  behind = behind.lstrip()
  first = [token for token in named if token and behind.startswith(token)]
  return named[max(first, key=len)] if first else None


def end_id(tokenizer, prompt_format: str) -> int | None:
  """Returns the token by which a response to learn from ends.

  Args:
    tokenizer: Hugging Face tokenizer.
    prompt_format: "plain", or "chat", where it is the end of a turn in the chat
      template, if that has one.
  """
  found = turn_end(tokenizer) if prompt_format == "chat" else None
  return tokenizer.eos_token_id if found is None else found


def named_ids(tokenizer, names: Sequence[str]) -> tuple[int, ...]:
  """Returns the ids of tokens that are named by their texts or their ids.

  Args:
    tokenizer: Hugging Face tokenizer.
    names: texts that are one token each, or whole numbers, which are ids.

  Raises:
    ValueError: naming what is no token, or several.
  """
  vocabulary = tokenizer.get_vocab()
  known, found = set(vocabulary.values()), []
  for name in names:
    if name in vocabulary and not name.isdecimal():
      found.append(vocabulary[name])
    elif name.isdecimal() and name.isascii():
      if len(name) > 12 or int(name) not in known:
        raise ValueError(
          f"The tokenizer {_name(tokenizer)} has no token with the id "
          f"{files.shorten(name)}."
        )
      found.append(int(name))
    else:
      try:
        ids = _encode(tokenizer, name, add_special_tokens=False)
      except ValueError:  # A tokenizer of a few words.
        ids = []
      back = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
      if len(ids) != 1 or back.strip() != name.strip():
        raise ValueError(
          f"{files.shorten(name)} is {len(ids)} tokens of the tokenizer "
          f"{_name(tokenizer)}, and must be one that it knows: a text is ended "
          "by several with --stop_strings."
        )
      found.append(ids[0])
  return tuple(dict.fromkeys(found))


def pad_id(tokenizer) -> int:
  """Returns the id to pad with: the pad token, else the end token, else 0."""
  for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
    if token_id is not None:
      return token_id
  return 0


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
  special = set(tokenizer.all_special_ids)
  special |= {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
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


def check_positions(length: int, max_positions: int) -> None:
  """Raises ValueError if prompts and responses are longer than the context."""
  if length > max_positions:
    raise ValueError(
      f"Prompt and response take up to {length} tokens with their padding, but "
      f"the model has {max_positions} positions; shorten --max_length or the "
      "prompts."
    )


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
      f"token_bytes needs a fast tokenizer, got {_name(tokenizer)}."
    )
  decoder = json.loads(backend.to_str())["decoder"]
  if decoder is None:
    raise ValueError(
      f"The tokenizer {_name(tokenizer)} has no decoder, so that its tokens "
      "are joined with blanks; rljax needs the bytes of each token."
    )
  special = set(tokenizer.all_special_ids)
  special |= {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
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


def _encode(tokenizer, text: str, *, add_special_tokens: bool) -> list[int]:
  try:
    return tokenizer.encode(text, add_special_tokens=add_special_tokens)
  except Exception as error:  # The backend raises bare Exceptions.
    raise ValueError(
      f"The tokenizer {_name(tokenizer)} cannot encode {files.shorten(text)}: "
      f"{files.first_line(error)}."
    ) from error


def _encode_start(tokenizer, text: str) -> list[int]:
  """Returns the ids of a text at the start, with one start token."""
  start = tokenizer.bos_token
  has_start = bool(start) and text.startswith(start)
  return _encode(tokenizer, text, add_special_tokens=not has_start)


def _survives(tokenizer, text: str) -> bool:
  try:
    ids = _encode(tokenizer, text, add_special_tokens=False)
  except ValueError:
    return False
  back = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
  # SentencePiece tokenizers may add or drop a blank in front, and tokenizers of
  # words put their own blanks between words.
  return "".join(back.split()) == "".join(text.split())


def _lost_parts(tokenizer, text: str) -> list[str]:
  """Returns words or characters of a text that a tokenizer cannot write."""
  splitter = tokenizer.backend_tokenizer.pre_tokenizer
  spans = splitter.pre_tokenize_str(text) if splitter else [(text, (0, None))]
  found = {}
  for _, (start, end) in spans:
    word = text[start:end].strip()
    if word and not _survives(tokenizer, word):
      lost = [c for c in word if not _survives(tokenizer, c)]
      # A tokenizer of words has no characters to name.
      found |= dict.fromkeys(lost if 0 < len(lost) < len(word) else [word])
  return list(found)


def _has_unknown(tokenizer, ids: Sequence[int]) -> bool:
  unknown = tokenizer.unk_token_id
  # Byte-level tokenizers name an unknown token that they never produce, and
  # that may be the start or end token.
  if unknown in (None, tokenizer.bos_token_id, tokenizer.eos_token_id):
    return False
  return unknown in ids


def _name(tokenizer) -> str:
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
