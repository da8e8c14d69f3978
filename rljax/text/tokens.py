"""Encodes text as ids, and decodes ids as text.

Text becomes ids once, and ids become text once, here. Tokenizers are Hugging
Face fast tokenizers. Everything is numpy; nothing imports jax.
"""

import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from absl import logging

from rljax.text import end_tokens, files, vocabularies


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
    name = vocabularies.name(tokenizer)
    raise ValueError(f"The tokenizer {name} lacks {', '.join(missing)}.")


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
  added = vocabularies.encode(tokenizer, "", add_special_tokens=True)
  if added[:1] == [tokenizer.bos_token_id]:
    added = added[1:]
  if added[-1:] == [tokenizer.eos_token_id]:
    raise ValueError(
      f"The tokenizer {vocabularies.name(tokenizer)} puts an end token after "
      "prompts; save it with a post-processor that does not."
    )
  rows, num_truncated, num_unknown = [], 0, 0
  for text in texts:
    ids = _encode_start(tokenizer, text)
    if not ids:
      raise ValueError(
        f"The prompt {files.shorten(text)} has no tokens, and the tokenizer "
        f"{vocabularies.name(tokenizer)} adds no start token."
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
    found = encode_response(tokenizer, prompt, prompt_ids, response)
    num_apart += found.is_apart
    if len(found.ids) > max_response_length:
      raise ValueError(
        f"The response {files.shorten(response)} has {len(found.ids)} "
        f"tokens with its end token, the limit is {max_response_length}."
      )
    rows.append((prompt_ids, found.ids))
  if num_apart:
    logging.warning(
      "%d of %d responses were encoded apart from their prompts.",
      num_apart,
      len(rows),
    )
  return rows


class Response(NamedTuple):
  """A response as ids.

  Attributes:
    ids: its tokens, with the end token if it is whole.
    is_apart: whether it was encoded apart from its prompt.
    is_exact: whether the ids decode, behind the prompt, to its very text.
    num_ends: end tokens before the last token.
  """

  ids: list[int]
  is_apart: bool
  is_exact: bool
  num_ends: int


def encode_response(
  tokenizer,
  prompt: str,
  prompt_ids: Sequence[int],
  response: str,
  *,
  finished: bool = True,
  end_id: int | None = None,
) -> Response:
  """Returns the ids of a response after its prompt, end token included.

  The two texts are encoded together if the result begins with the prompt's ids.
  Otherwise a token would cross the border, and the response is encoded apart.
  Either way the ids decode, behind those of the prompt, to the response as it
  stands, if the tokenizer can write it: a tokenizer that puts a blank in front
  of every text does not get to put it there.

  Args:
    tokenizer: Hugging Face fast tokenizer with an end token.
    prompt: text.
    prompt_ids: all its ids, from `encode_prompts`, before any cut.
    response: text. One that ends in the text of an end token gets no second
      one.
    finished: False of a response that was cut: no end token is put behind it.
    end_id: the end token, such as `turn_end` in a chat; the tokenizer's own by
      default.
  """
  ends = set(end_tokens.by_text(tokenizer).values())
  text, end = end_tokens.without_end(tokenizer, response)
  ids, is_apart, is_exact = encode_further(tokenizer, prompt, prompt_ids, text)
  num_ends = sum(token in ends for token in ids)
  if end is None and finished:
    end = tokenizer.eos_token_id if end_id is None else end_id
  return Response(
    ids if end is None else [*ids, end], is_apart, is_exact, num_ends
  )


def encode_further(
  tokenizer, prompt: str, prompt_ids: Sequence[int], text: str
) -> tuple[list[int], bool, bool]:
  """Returns the ids of a text behind another, with nothing put at its end.

  Args:
    tokenizer: see `encode_response`; likewise `prompt` and `prompt_ids`.
    prompt: text.
    prompt_ids: its ids.
    text: what follows.

  Returns:
    The ids, whether they were encoded apart, and whether they are exact; see
    `Response`.
  """
  joint = _encode_start(tokenizer, prompt + text)
  ids = joint[len(prompt_ids) :]
  is_apart = joint[: len(prompt_ids)] != list(prompt_ids)
  before = vocabularies.whole(tokenizer, prompt_ids)
  is_exact = not is_apart and (
    vocabularies.whole(tokenizer, [*prompt_ids, *ids]) == before + text
  )
  if not is_exact:
    other, is_exact = _encode_behind(tokenizer, prompt_ids, before, text)
    if is_apart or is_exact:
      ids, is_apart = other, True
  return ids, is_apart, is_exact


def encode_behind(tokenizer, prompt_ids: Sequence[int], text: str) -> list[int]:
  """Returns ids that decode, behind others, to a text as it stands.

  Args:
    tokenizer: Hugging Face fast tokenizer.
    prompt_ids: what stands before it.
    text: what is written behind, without any special tokens of its own.
  """
  before = vocabularies.whole(tokenizer, prompt_ids)
  return _encode_behind(tokenizer, prompt_ids, before, text)[0]


def decode(
  tokenizer,
  response_ids: np.ndarray,
  response_mask: np.ndarray,
  *,
  skip_special_tokens: bool = True,
  behind: bool | np.ndarray = False,
) -> list[str]:
  """Turns the unmasked ids of each row into text.

  Args:
    tokenizer: Hugging Face fast tokenizer.
    response_ids: `[B, T]` int. An id that the tokenizer does not know, such as
      an unused row of a padded vocabulary, becomes nothing.
    response_mask: `[B, T]` bool.
    skip_special_tokens: whether special tokens, such as the end token, become
      nothing.
    behind: whether text stands before them, `[B]` bool or for all rows: then
      the blank is kept that SentencePiece tokenizers take off the front of a
      text.

  Returns:
    B texts.
  """
  ids, mask = np.asarray(response_ids), np.asarray(response_mask)
  if ids.ndim != 2 or ids.shape != mask.shape or mask.dtype != np.bool_:
    raise ValueError(
      f"decode needs ids and a bool mask of one [B, T] shape, got {ids.shape} "
      f"and {mask.dtype} {mask.shape}."
    )
  anchor = _anchor(tokenizer, len(tokenizer)) if np.any(behind) else None

  def text_of(row, has_text):
    before = [anchor] if has_text and anchor is not None else []
    text = vocabularies.whole(tokenizer, [*before, *row], skip_special_tokens)
    return (
      text[len(vocabularies.whole(tokenizer, before)) :] if before else text
    )

  behind = np.broadcast_to(np.asarray(behind, np.bool_), len(ids))
  return [
    text_of(row[keep].tolist(), has_text)
    for row, keep, has_text in zip(ids, mask, behind, strict=True)
  ]


def check_positions(length: int, max_positions: int) -> None:
  """Raises ValueError if prompts and responses are longer than the context."""
  if length > max_positions:
    raise ValueError(
      f"Prompt and response take up to {length} tokens with their padding, but "
      f"the model has {max_positions} positions; shorten --max_length or the "
      "prompts."
    )


# What a text is put behind, to be encoded as one that goes on.
_BEFORE = ("\n", "=", "a")


@functools.lru_cache(8)
def _anchor(tokenizer, size: int) -> int | None:
  """Returns a token to decode others behind, if it makes a difference.

  Args:
    tokenizer: Hugging Face fast tokenizer.
    size: of its vocabulary, for it may have grown since.
  """
  del size
  backend = getattr(tokenizer, "backend_tokenizer", None)
  decoder = json.loads(backend.to_str())["decoder"] if backend else None
  if not decoder or not vocabularies.kinds(decoder) & {"Strip", "Metaspace"}:
    return None
  for text in ("a", "=", "1"):
    ids = vocabularies.encode(tokenizer, text, add_special_tokens=False)
    if ids and vocabularies.whole(tokenizer, ids[-1:]).strip():
      return ids[-1]
  return None


def _encode_behind(
  tokenizer, prompt_ids: Sequence[int], before: str, text: str
) -> tuple[list[int], bool]:
  """Encodes a text that stands behind another, see `encode_behind`.

  Returns:
    The ids, and whether both together decode to both texts.
  """
  plain = vocabularies.encode(tokenizer, text, add_special_tokens=False)
  special = {tokenizer.convert_ids_to_tokens(i): i for i in set(plain)}
  special = {
    name: i
    for name, i in special.items()
    if i in vocabularies.special_ids(tokenizer) and name in text
  }
  if special:  # What stands between them is each behind what is before.
    return _between(tokenizer, prompt_ids, text, special)

  def is_exact(ids):
    return vocabularies.whole(tokenizer, [*prompt_ids, *ids]) == before + text

  def encodings():
    yield plain
    for front in _BEFORE:
      try:
        front_ids, both = (
          vocabularies.encode(tokenizer, x, add_special_tokens=False)
          for x in (front, front + text)
        )
      except ValueError:  # A tokenizer of a few words.
        continue
      if both[: len(front_ids)] == front_ids:
        yield both[len(front_ids) :]
    pieces = _by_pieces(tokenizer, text)
    if pieces is not None:
      yield pieces

  for ids in encodings():
    if is_exact(ids):
      return ids, True
  return plain, False


def _between(
  tokenizer, prompt_ids: Sequence[int], text: str, special: Mapping[str, int]
) -> tuple[list[int], bool]:
  """Encodes a text that holds special tokens, as `_encode_behind` does."""
  found, is_exact = [], True
  for part in re.split(f"({'|'.join(map(re.escape, special))})", text):
    if part in special:
      found.append(special[part])
    elif part:
      so_far = [*prompt_ids, *found]
      before = vocabularies.whole(tokenizer, so_far)
      ids, is_one = _encode_behind(tokenizer, so_far, before, part)
      found, is_exact = [*found, *ids], is_exact and is_one
  return found, is_exact


def _by_pieces(tokenizer, text: str) -> list[int] | None:
  """Writes a text with the longest tokens that fit, from left to right."""
  try:
    vocabulary, longest = vocabularies.of_bytes(tokenizer, len(tokenizer))
  except ValueError:
    return None
  rest, ids = text.encode("utf-8"), []
  while rest:
    for length in range(min(longest, len(rest)), 0, -1):
      if (token := vocabulary.get(rest[:length])) is not None:
        ids.append(token)
        rest = rest[length:]
        break
    else:
      return None
  return ids


def _encode_start(tokenizer, text: str) -> list[int]:
  """Returns the ids of a text at the start, with one start token."""
  start = tokenizer.bos_token
  has_start = bool(start) and text.startswith(start)
  return vocabularies.encode(tokenizer, text, add_special_tokens=not has_start)


def _survives(tokenizer, text: str) -> bool:
  try:
    ids = vocabularies.encode(tokenizer, text, add_special_tokens=False)
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
