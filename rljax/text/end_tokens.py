"""The tokens that end a response."""

import functools
from collections.abc import Sequence

from rljax.text import files, templates, vocabularies

_ANSWER = "ANSWER"


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
    raise ValueError(
      f"The tokenizer {vocabularies.name(tokenizer)} lacks an end token "
      "(eos_token)."
    )
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
          f"The tokenizer {vocabularies.name(tokenizer)} has no token with the "
          f"id {files.shorten(name)}."
        )
      found.append(int(name))
    else:
      try:
        ids = vocabularies.encode(tokenizer, name, add_special_tokens=False)
      except ValueError:  # A tokenizer of a few words.
        ids = []
      back = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
      if len(ids) != 1 or back.strip() != name.strip():
        raise ValueError(
          f"{files.shorten(name)} is {len(ids)} tokens of the tokenizer "
          f"{vocabularies.name(tokenizer)}, and must be one that it knows: a "
          "text is ended by several with --stop_strings."
        )
      found.append(ids[0])
  return tuple(dict.fromkeys(found))


def without_end(tokenizer, text: str) -> tuple[str, int | None]:
  """Takes the texts of end tokens off the end of a text.

  Args:
    tokenizer: Hugging Face tokenizer with an end token.
    text: such as "3</s>", or "3<|im_end|>\n".

  Returns:
    The text without them and blanks behind them, and the first end token that
    stood there; or the text as it is, and None.
  """
  ends, found = by_text(tokenizer), None
  while True:
    bare = text.rstrip()
    at_end = [end for end in ends if end and bare.endswith(end)]
    if not at_end:
      return text, found
    longest = max(at_end, key=len)
    text, found = bare[: len(bare) - len(longest)], ends[longest]


def by_text(tokenizer) -> dict[str, int]:
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
