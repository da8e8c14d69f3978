"""Continues reviews in a friendly way, scored by VADER.

  prompt    offers that rare
  response   combination of wit and warmth .

A prompt is the first words of a real review, or its first tokens where a
tokenizer is given. The score is the compound of VADER, a list of words with
rules, which reads the prompt and the response as one text. Scripts may take a
classifier of texts instead:

  --reward_terms=reward_model --reward_model=MODEL --reward_transform=raw:LABEL

VADER is easily gamed: it counts words of praise, and a few of them earn more
than 0.9, whatever the grammar. Look at the samples, and at their likelihood
under another model, not only at the score.

Sources:
  Padula and Soemers (2024), "Exploring RL-based LLM Training for Formal
  Language Tasks with Programmed Rewards": lengths and score of the task.
  Hutto and Gilbert (2014), "VADER: A Parsimonious Rule-based Model for
  Sentiment Analysis of Social Media Text".
  Pang and Lee (2005), "Seeing stars": the sentences that the tests read.
"""

import functools
import hashlib
import html
import importlib.util
import os
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
from absl import logging

from rljax.text import files

SPLITS = ("train", "validation", "test")

# Of a text that is scored. VADER compares every word that it knows with all
# others, in quadratic time: at most a tenth of a second for this length.
MAX_CHARACTERS = 2000

_MAX_READ = 64  # Characters that are read for each token of a prompt.
_TAG = re.compile(r"</?[a-zA-Z][^<>]{0,200}>")
_CACHE_SIZE = 2**14
_HOW_TO_GET_IT = (
  'give data=FOLDER with train.jsonl and so on, of lines {"text": ...}, '
  "such as the sentence polarity data of Pang and Lee; or "
  "data=tfds:imdb_reviews, once it is prepared."
)

# n, in words or tokens -> a text's beginning of that length, or None if the
# text ends there.
_Cut = Callable[[str, int], str | None]


# Prompts.


def prompts(
  split: str,
  seed: int,
  *,
  num: int | None = None,
  data: str = "",
  min_length: int = 2,
  max_length: int = 7,
  min_characters: int = 0,
  tokenizer: Any = None,
) -> list[str]:
  """Draws beginnings of reviews, whose lengths are uniform.

  Every text is used once before any is used again, with another length. A
  smaller `num` gives the first of the same prompts. Markup and repeated blanks
  are removed from the texts first. Texts that end within `max_length` words are
  left out, or the short ones could be recognised; how many is logged.

  Splits are those of the data. Where it has no validation split, that is a
  tenth of the training texts, by their hash; a single file is split by hash, 8
  : 1 : 1. No two splits share a text, but short prompts may be alike.

  Args:
    split: "train", "validation" or "test".
    seed: of order and lengths; >= 0.
    num: how many; None for one of each text.
    data: a folder with train.jsonl, test.jsonl and perhaps validation.jsonl;
      one file, "{split}" in its name replaced; or "tfds:imdb_reviews". Rows
      have a "text".
    min_length: of a prompt, in words, or in tokens where there is a tokenizer.
    max_length: likewise.
    min_characters: shorter texts are left out.
    tokenizer: a Hugging Face tokenizer, or a folder with one, such as RUN or
      RUN/model; None for words. A prompt that is not encoded to the tokens that
      it was cut from is left out. A start token is not counted.

  Returns:
    `num` texts.

  Raises:
    ValueError: if an option is invalid, or the data is missing, not as expected
      or too short.
  """
  drawn = _drawn(
    split, seed, num, data, min_length, max_length, min_characters, tokenizer
  )
  return [prompt for prompt, _ in drawn]


def supervised(
  split: str,
  seed: int,
  *,
  num: int | None = None,
  data: str = "",
  min_length: int = 2,
  max_length: int = 7,
  min_characters: int = 0,
  tokenizer: Any = None,
) -> list[tuple[str, str]]:
  """Draws the prompts of `prompts` with the rest of their texts."""
  return _drawn(
    split, seed, num, data, min_length, max_length, min_characters, tokenizer
  )


# Scores.


def score(
  prompt: str, response: str, *, reads: Literal["text", "response"] = "text"
) -> tuple[float, dict[str, Any]]:
  """Scores VADER's compound of the prompt and the response.

    compound = s / √(s² + 15)

  s is the sum of the valences of the words, after VADER's rules. Only the first
  `MAX_CHARACTERS` characters of a text are read, where an emoji counts as its
  description.

  Args:
    prompt: text.
    response: what the model wrote.
    reads: "text", the prompt and the response in one; or "response".

  Returns:
    The compound in [-1, 1], to four digits, 0 for a text without a known word;
    and its parts:
      compound: the same.
      positive, negative, neutral: shares of the text, to three digits, which
        add up to 1, or are all 0 if it is empty.
      is_cut: whether the end of the text was left out.

  Raises:
    ValueError: if `reads` is something else, or vaderSentiment is not
      installed.
  """
  if reads not in ("text", "response"):
    raise ValueError(f'reads must be "text" or "response", got {reads!r}.')
  text = prompt + response if reads == "text" else response
  read = _readable(text)
  compound, positive, negative, neutral = _verdict(read)
  return compound, {
    "compound": compound,
    "positive": positive,
    "negative": negative,
    "neutral": neutral,
    "is_cut": len(read) < len(text),
  }


@functools.lru_cache(_CACHE_SIZE)
def _verdict(text: str) -> tuple[float, float, float, float]:
  """Returns compound, and the positive, negative and neutral shares."""
  found = _analyzer().polarity_scores(text)
  return found["compound"], found["pos"], found["neg"], found["neu"]


def _readable(text: str) -> str:
  """Returns the beginning of a text that VADER is given."""
  descriptions = _analyzer().emojis
  room = MAX_CHARACTERS
  for place, character in enumerate(text):
    # VADER puts a blank before a description.
    description = descriptions.get(character)
    room -= 1 if description is None else len(description) + 1
    if room < 0:
      return text[:place]
  return text


@functools.cache
def _analyzer():
  if importlib.util.find_spec("vaderSentiment") is None:
    raise ValueError(
      "The task sentiment scores with VADER, which is not installed: pip "
      "install vaderSentiment."
    )
  from vaderSentiment import vaderSentiment

  return vaderSentiment.SentimentIntensityAnalyzer()


# Data.


def _drawn(
  split: str,
  seed: int,
  num: int | None,
  data: str,
  min_length: int,
  max_length: int,
  min_characters: int,
  tokenizer: Any,
) -> list[tuple[str, str]]:
  """Draws prompts with the rest of their texts."""
  if split not in SPLITS:
    raise ValueError(
      f"The task sentiment has the splits {', '.join(SPLITS)}, got {split!r}."
    )
  if seed < 0 or (num or 0) < 0:
    raise ValueError(f"seed and num must be >= 0, got {seed} and {num}.")
  if not 1 <= min_length <= max_length:
    raise ValueError(
      "min_length must be positive and at most max_length, got "
      f"{min_length} and {max_length}."
    )
  cut, unit = _first_words, "words"
  if tokenizer is not None:
    cut = _first_tokens(_tokenizer(tokenizer), _MAX_READ * max_length)
    unit = "tokens"
  texts = _texts_of_split(split, str(data))
  enough = [text for text in texts if len(text) >= min_characters]
  texts = [text for text in enough if cut(text, max_length) is not None]
  if not texts:
    raise ValueError(
      f"{data}: no text of the {split} split has more than {max_length} {unit} "
      f"and {min_characters} characters."
    )
  if len(texts) < len(enough):
    logging.info(
      "%d of %d texts of the %s split were left out: they have at most %d %s.",
      len(enough) - len(texts),
      len(enough),
      split,
      max_length,
      unit,
    )
  place = [seed, SPLITS.index(split)]
  drawn, num_round = [], 0
  wanted = len(texts) if num is None else num
  while len(drawn) < wanted:
    rng = np.random.default_rng([*place, num_round])
    for prompt, rest in _round(texts, rng, cut, min_length, max_length):
      drawn.append((prompt, rest))
      if len(drawn) == wanted:
        break
    num_round += 1
  return drawn


def _round(
  texts: list[str],
  rng: np.random.Generator,
  cut: _Cut,
  min_length: int,
  max_length: int,
) -> Iterator[tuple[str, str]]:
  """Draws one prompt of each text, and what follows."""
  order = rng.permutation(len(texts))
  lengths = rng.integers(min_length, max_length, len(texts), endpoint=True)
  for i, length in zip(order, lengths, strict=True):
    # A text may have no beginning of so many tokens, if that splits a
    # character: it gets the next longer one.
    found = (cut(texts[i], n) for n in range(int(length), max_length + 1))
    prompt = next(prompt for prompt in found if prompt is not None)
    yield prompt, texts[i][len(prompt) :]


def _first_words(text: str, num: int) -> str | None:
  words = text.split(" ", num)
  return " ".join(words[:num]) if len(words) > num else None


def _first_tokens(tokenizer: Any, max_read: int) -> _Cut:
  """Cuts texts after tokens of a tokenizer, found in so many characters."""

  def encode(text):
    try:
      return tokenizer.encode(text, add_special_tokens=False)
    except Exception as error:  # The backend raises bare Exceptions.
      raise ValueError(
        f"The tokenizer {getattr(tokenizer, 'name_or_path', '')!r} cannot "
        f"encode {text[:60]!r}: {error}."
      ) from error

  @functools.cache
  def beginning(text):
    return encode(text[:max_read])

  def cut(text, num):
    ids = beginning(text)
    prompt = tokenizer.decode(ids[:num], clean_up_tokenization_spaces=False)
    goes_on = len(ids) > num and text.startswith(prompt)
    # A sampler encodes the text, and must get these tokens.
    return prompt if goes_on and encode(prompt) == ids[:num] else None

  return cut


def _tokenizer(tokenizer: Any) -> Any:
  """Returns a tokenizer, or loads that of a folder."""
  if not isinstance(tokenizer, (str, os.PathLike)):
    return tokenizer
  for folder in (pathlib.Path(tokenizer), pathlib.Path(tokenizer, "model")):
    if (folder / "tokenizer.json").is_file():
      import transformers

      return transformers.AutoTokenizer.from_pretrained(folder)
  raise ValueError(
    "tokenizer must be a folder with tokenizer.json, such as a run's, or, "
    f'for experiments/ppo.py, "policy"; got {str(tokenizer)!r}.'
  )


@functools.lru_cache(8)
def _texts_of_split(split: str, data: str) -> tuple[str, ...]:
  """Returns different texts of a split, in the order of the data."""
  if not data:
    raise ValueError(f"The task sentiment has no data: {_HOW_TO_GET_IT}")
  is_tfds = data.startswith("tfds:")
  path = pathlib.Path(data)
  if path.is_file():
    # One file for all splits.
    return tuple(t for t in _texts(data, split) if _split_of(t) == split)
  if is_tfds:
    has_validation = False
  elif "{split}" in data:
    own = pathlib.Path(data.replace("{split}", "validation"))
    has_validation = own.is_file()
  elif path.is_dir():
    has_validation = any(path.glob("validation.json*"))
  else:
    raise ValueError(f"{data}: no such file or folder; {_HOW_TO_GET_IT}")
  if has_validation or split == "test":
    return _texts(data, split)
  is_validation = split == "validation"
  return tuple(
    text
    for text in _texts(data, "train")
    if (_split_of(text) == "validation") == is_validation
  )


def _texts(data: str, split: str) -> tuple[str, ...]:
  """Returns different texts of a part of the data."""
  texts = {}
  rows = files.load_rows(data, split, required=("text",))
  for i, row in enumerate(rows):
    if not isinstance(row["text"], str):
      raise ValueError(
        f'{data}, row {i + 1} of {split}: "text" must be a text, got '
        f"{row['text']!r}."
      )
    texts[_clean(row["text"])] = None
  return tuple(texts)


def _clean(text: str) -> str:
  """Returns a text on one line, without markup."""
  text = " ".join(html.unescape(_TAG.sub(" ", text)).split())
  # JSON can hold halves of surrogate pairs, which no tokenizer accepts.
  return text.encode("utf-8", "replace").decode("utf-8")


def _split_of(text: str) -> str:
  number = int(hashlib.sha256(text.encode()).hexdigest(), 16) % 10
  return {8: "validation", 9: "test"}.get(number, "train")
