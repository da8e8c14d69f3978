"""Encodes text as ids, decodes ids as text, and lists what tokens stand for.

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
  ends = set(_ends_of(tokenizer).values())
  text, end = without_end(tokenizer, response)
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
  before = _whole(tokenizer, prompt_ids)
  is_exact = not is_apart and (
    _whole(tokenizer, [*prompt_ids, *ids]) == before + text
  )
  if not is_exact:
    other, is_exact = _encode_behind(tokenizer, prompt_ids, before, text)
    if is_apart or is_exact:
      ids, is_apart = other, True
  return ids, is_apart, is_exact


def without_end(tokenizer, text: str) -> tuple[str, int | None]:
  """Takes the texts of end tokens off the end of a text.

  Args:
    tokenizer: Hugging Face tokenizer with an end token.
    text: such as "3</s>", or "3<|im_end|>\n".

  Returns:
    The text without them and blanks behind them, and the first end token that
    stood there; or the text as it is, and None.
  """
  ends, found = _ends_of(tokenizer), None
  while True:
    bare = text.rstrip()
    at_end = [end for end in ends if end and bare.endswith(end)]
    if not at_end:
      return text, found
    longest = max(at_end, key=len)
    text, found = bare[: len(bare) - len(longest)], ends[longest]


def _ends_of(tokenizer) -> dict[str, int]:
  """Returns the texts of the tokens that end a response, and their ids."""
  template = str(getattr(tokenizer, "chat_template", None))
  more = getattr(tokenizer, "model_ends", ())
  return _known_ends(tokenizer, tokenizer.eos_token_id, template, more)


@functools.lru_cache(8)
def _known_ends(
  tokenizer, eos_token_id, chat_template: str, model_ends: tuple[int, ...]
) -> dict[str, int]:
  """The same, found once for a tokenizer with these ends and template."""
  del eos_token_id, chat_template, model_ends
  return {tokenizer.convert_ids_to_tokens(i): i for i in stop_ids(tokenizer)}


def encode_behind(tokenizer, prompt_ids: Sequence[int], text: str) -> list[int]:
  """Returns ids that decode, behind others, to a text as it stands.

  Args:
    tokenizer: Hugging Face fast tokenizer.
    prompt_ids: what stands before it.
    text: what is written behind, without any special tokens of its own.
  """
  before = _whole(tokenizer, prompt_ids)
  return _encode_behind(tokenizer, prompt_ids, before, text)[0]


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
    text = _whole(tokenizer, [*before, *row], skip_special_tokens)
    return text[len(_whole(tokenizer, before)) :] if before else text

  behind = np.broadcast_to(np.asarray(behind, np.bool_), len(ids))
  return [
    text_of(row[keep].tolist(), has_text)
    for row, keep, has_text in zip(ids, mask, behind, strict=True)
  ]


def has_text(tokenizer, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
  """Returns which rows hold a token that is not special, `[B]` bool."""
  special = sorted(_special_ids(tokenizer))
  return (~np.isin(ids, special) & np.asarray(mask, np.bool_)).any(axis=1)


def stop_ids(tokenizer, *more: int | Sequence[int] | None) -> tuple[int, ...]:
  """Returns the ids that end a response.

  These are the tokenizer's end token, the end of a turn in its chat template,
  and those that a model's config names: `hf.load` leaves them in the
  tokenizer's attribute `model_ends`.

  Args:
    tokenizer: Hugging Face tokenizer.
    *more: further ids, such as `eos_token_id` of a config: an id, several, or
      None.

  Raises:
    ValueError: if there is none.
  """
  found = [tokenizer.eos_token_id, turn_end(tokenizer)]
  for ids in (getattr(tokenizer, "model_ends", ()), *more):
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
      template, if that has one; or what `chat.describe` makes of either.
  """
  is_chat = prompt_format.partition(" ")[0] == "chat"
  found = turn_end(tokenizer) if is_chat else None
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
  special = _special_ids(tokenizer)
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
  special = _special_ids(tokenizer)
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


def _special_ids(tokenizer) -> set[int]:
  return set(tokenizer.all_special_ids) | {
    i for i, t in tokenizer.added_tokens_decoder.items() if t.special
  }


def _whole(tokenizer, ids: Sequence[int], skip_special_tokens=False) -> str:
  """Decodes ids from their start, without any clean-up."""
  return tokenizer.decode(
    ids,
    skip_special_tokens=skip_special_tokens,
    clean_up_tokenization_spaces=False,
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
  if not decoder or not _kinds(decoder) & {"Strip", "Metaspace"}:
    return None
  for text in ("a", "=", "1"):
    ids = _encode(tokenizer, text, add_special_tokens=False)
    if ids and _whole(tokenizer, ids[-1:]).strip():
      return ids[-1]
  return None


def _kinds(decoder: Mapping) -> set[str]:
  """Returns the types of a decoder and of those that it is made of."""
  inner = decoder.get("decoders", ())
  return {decoder["type"]}.union(*map(_kinds, inner))


def _encode_behind(
  tokenizer, prompt_ids: Sequence[int], before: str, text: str
) -> tuple[list[int], bool]:
  """Encodes a text that stands behind another, see `encode_behind`.

  Returns:
    The ids, and whether both together decode to both texts.
  """
  plain = _encode(tokenizer, text, add_special_tokens=False)
  special = {tokenizer.convert_ids_to_tokens(i): i for i in set(plain)}
  special = {
    name: i
    for name, i in special.items()
    if i in _special_ids(tokenizer) and name in text
  }
  if special:  # What stands between them is each behind what is before.
    return _between(tokenizer, prompt_ids, text, special)

  def is_exact(ids):
    return _whole(tokenizer, [*prompt_ids, *ids]) == before + text

  def encodings():
    yield plain
    for front in _BEFORE:
      try:
        front_ids, both = (
          _encode(tokenizer, x, add_special_tokens=False)
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
      before = _whole(tokenizer, so_far)
      ids, is_one = _encode_behind(tokenizer, so_far, before, part)
      found, is_exact = [*found, *ids], is_exact and is_one
  return found, is_exact


def _by_pieces(tokenizer, text: str) -> list[int] | None:
  """Writes a text with the longest tokens that fit, from left to right."""
  try:
    vocabulary, longest = _vocabulary(tokenizer, len(tokenizer))
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


@functools.lru_cache(8)
def _vocabulary(tokenizer, size: int) -> tuple[dict[bytes, int], int]:
  """Returns what tokens stand for -> the first of them, and the longest."""
  del size
  vocabulary = {}
  for token_id, piece in enumerate(token_bytes(tokenizer)):
    if piece:
      vocabulary.setdefault(piece, token_id)
  return vocabulary, max(map(len, vocabulary), default=0)


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
