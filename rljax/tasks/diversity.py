"""A reward for replies with words that are rare in the replies of a log.

  R = (mean of the nonzero entries of the reply's tf-idf vector) · c,
  c = k/10 if k < 5, else 1

k is the number of different words of the reply that are in the log. The vector
has unit length, so that the mean falls with k and is larger the more equal the
entries are.

Source:
  Baheti et al. (2024), "Leftover Lunch: Advantage-based Offline Reinforcement
  Learning for Language Models", the diversity part of the rewards of the
  Reddit and the dialogue tasks.
"""

import collections
import functools
import math
import re
from collections.abc import Iterable

import numpy as np

from rljax.text import forms, logged

_WORD = re.compile(r"\w\w+")
_NUM_ENOUGH = 5  # Different words of a reply that is long enough.


class TfIdf:
  """Holds what the words of some replies weigh.

    idf(w) = ln((1 + n) / (1 + n_w)) + 1

  n is the number of replies and n_w that of replies with the word w. Words
  are runs of two or more word characters, in lower case.

  Attributes:
    idf: weight by word.
  """

  def __init__(self, replies: Iterable[str]):
    """Counts the words.

    Raises:
      ValueError: if the replies have no words.
    """
    counts, num_replies = collections.Counter(), 0
    for reply in replies:
      counts.update(set(_words(reply)))
      num_replies += 1
    if not counts:
      raise ValueError(f"The {num_replies} replies have no words.")
    self.idf = {
      word: math.log((1 + num_replies) / (1 + count)) + 1
      for word, count in counts.items()
    }

  def entries(self, reply: str) -> dict[str, float]:
    """Returns the nonzero entries of a reply's tf-idf vector of length 1."""
    counts = collections.Counter(w for w in _words(reply) if w in self.idf)
    entries = {word: n * self.idf[word] for word, n in counts.items()}
    length = math.sqrt(sum(x**2 for x in entries.values()))
    return {word: x / length for word, x in entries.items()}

  def score(self, reply: str) -> float:
    """Returns R of the module's docstring, in [0, 1]; 0 for unknown words."""
    return _score(self.entries(reply))


def prompts(
  split: str, seed: int, *, num: int = 1024, data: str | None = None
) -> list[str]:
  """Draws prompts from a file of logged responses.

  Args:
    split: such as "train". A file without "{split}" in its name serves every
      split with the same prompts.
    seed: of the order.
    num: number of prompts; each comes once before any comes twice. A smaller
      number gives the first of the same prompts.
    data: a file, a folder or "tfds:<name>", as for `logged.load_prompts`.

  Returns:
    `num` texts.

  Raises:
    ValueError: if `data` is not given, or a prompt is a list of messages.
  """
  if data is None:
    raise ValueError(
      "Prompts of the task diversity need the option data, a file of prompts: "
      "data=FILE."
    )
  rows = logged.load_prompts(data, split).rows
  texts = list(dict.fromkeys(_text(row) for row in rows))
  num_rounds = -(-num // len(texts))
  order = [
    np.random.default_rng([seed, i]).permutation(len(texts))
    for i in range(num_rounds)
  ]
  return [texts[i] for i in np.concatenate([*order, []]).astype(int)[:num]]


def score(
  prompt: str, response: str, *, fit_on: str | None = None
) -> tuple[float, dict]:
  """Scores a response by the words of a log.

  Args:
    prompt: not used.
    response: what the model wrote.
    fit_on: logged responses, as for `logged.load`; the first candidates of its
      training split give the weights of words. They are read once.

  Returns:
    R in [0, 1], and its parts:
      num_words: k.
      mean_entry: mean of the nonzero entries, before the factor c.

  Raises:
    ValueError: if `fit_on` is not given, or has no words.
  """
  del prompt
  if fit_on is None:
    raise ValueError(
      "Scores of the task diversity need the option fit_on, a file of logged "
      "responses: fit_on=FILE."
    )
  entries = _fitted(fit_on).entries(response)
  return _score(entries), {
    "num_words": len(entries),
    "mean_entry": _mean(entries),
  }


@functools.cache
def _fitted(name: str) -> TfIdf:
  rows = logged.load(name).rows
  return TfIdf(row.candidates[0] for row in rows)


def _words(text: str) -> list[str]:
  return _WORD.findall(text.lower())


def _mean(entries: dict[str, float]) -> float:
  return sum(entries.values()) / len(entries) if entries else 0.0


def _score(entries: dict[str, float]) -> float:
  num_words = len(entries)
  # The paper says ten words, its code compares with five: R jumps there.
  share = num_words / 10 if num_words < _NUM_ENOUGH else 1.0
  return share * _mean(entries)


def _text(row: forms.Row) -> str:
  if not isinstance(row.prompt, str):
    raise ValueError(
      f"{row.place}: the prompt is a list of messages; this task needs "
      "it as one text."
    )
  return row.prompt
