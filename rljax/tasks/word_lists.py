"""Word lists of mixed quality, with an exact reward.

  birds 4 not duck owl: dove hawk wren lark

asks for four different birds, but no duck and no owl. `logged` makes replies of
mixed quality: some are right, most have foreign or repeated words or a wrong
length. The share of right ones depends on the topic, so that the value of a
prompt can be learnt; the preference between two replies is right three times
out of four. In this small setting methods of offline reinforcement learning
differ: a prompt has thousands of perfect replies, and the log has all grades
below them.
"""

import hashlib
import itertools
from typing import Any

import numpy as np

SPLITS = ("train", "validation", "test")
TOPICS = {
  "birds": "crow dove duck finch goose gull hawk heron lark owl robin wren",
  "fruits": "apple banana cherry fig grape kiwi lemon lime mango melon peach "
  "plum",
  "tools": "axe chisel drill file hammer knife plane pliers rake saw shovel "
  "wrench",
  "colours": "black blue brown green grey orange pink purple red violet white "
  "yellow",
  "metals": "brass bronze chrome cobalt copper gold iron lead nickel silver "
  "tin zinc",
  "trees": "ash beech birch cedar elm fir larch maple oak pine poplar willow",
  "fish": "bass carp cod eel haddock herring perch pike salmon sole trout tuna",
  "instruments": "banjo bugle cello drum flute guitar harp horn oboe organ "
  "piano viola",
}
LENGTHS = (2, 3, 4, 5, 6)
MAX_WORDS = 8  # Of a logged reply.

_WORDS = {topic: tuple(words.split()) for topic, words in TOPICS.items()}
_ALL = tuple(word for words in _WORDS.values() for word in words)
# The share of right replies in the log, from the first topic to the last.
_RIGHT = dict(zip(TOPICS, np.linspace(0.05, 0.5, len(TOPICS)), strict=True))
_SPECIAL = ("<bos>", "<eos>", "<pad>")


def prompts(split: str, seed: int, *, num: int = 1024) -> list[str]:
  """Draws prompts; there are 2640, and no two splits share one.

  Args:
    split: "train" (80 %), "validation" or "test" (10 % each).
    seed: of the draw.
    num: how many; a larger number than there are gives repetitions.

  Returns:
    Texts that end in a colon.

  Raises:
    ValueError: if there is no such split.
  """
  known = _prompts_of(split)
  rng = np.random.default_rng([seed, SPLITS.index(split)])
  # Whole rounds first, so that a small draw has no repetition.
  order = [rng.permutation(len(known)) for _ in range(-(-num // len(known)))]
  return [known[i] for i in np.concatenate(order)[:num]]


def logged(
  split: str, seed: int, *, num: int = 1024, agreement: float = 0.75
) -> list[dict[str, Any]]:
  """Returns logged replies: two to each prompt, the preferred one first.

  Args:
    split: as for `prompts`.
    seed: of prompts and replies.
    num: how many prompts.
    agreement: share of the pairs in which the preferred reply is the one with
      the higher reward, in [0, 1].

  Returns:
    Rows with `prompt`, `candidates` and `rewards`.

  Raises:
    ValueError: if there is no such split.
  """
  asked = prompts(split, seed, num=num)
  rng = np.random.default_rng([seed, SPLITS.index(split), 1])
  rows = []
  for prompt in asked:
    replies = [_reply(prompt, rng) for _ in range(2)]
    rewards = [score(prompt, reply)[0] for reply in replies]
    preferred = int(rewards[1] > rewards[0])
    if rng.random() >= agreement:
      preferred = 1 - preferred
    order = [preferred, 1 - preferred]
    rows.append(
      {
        "prompt": prompt,
        "candidates": [replies[i] for i in order],
        "rewards": [rewards[i] for i in order],
      }
    )
  return rows


def supervised(
  split: str, seed: int, *, num: int = 1024, agreement: float = 0.75
) -> list[tuple[str, str]]:
  """Returns the prompts of `logged` with their preferred replies."""
  rows = logged(split, seed, num=num, agreement=agreement)
  return [(row["prompt"], row["candidates"][0]) for row in rows]


def solution(prompt: str, rng: np.random.Generator) -> str:
  """Draws a reply whose reward is 1, all of them equally likely."""
  belonging, num = _parse(prompt)
  return "".join(f" {word}" for word in rng.choice(belonging, num, False))


def score(prompt: str, response: str) -> tuple[float, dict[str, Any]]:
  """Scores how much of the request a reply meets.

    R = min(n, |different words of the topic, without the forbidden two|)
        / max(n, m)

  for n words asked and m given: 1 for n different words that all belong, less
  for every word that is missing, foreign, repeated or extra.

  Args:
    prompt: one of `prompts`.
    response: words with blanks between them.

  Returns:
    R in [0, 1]; and its parts: whether it is 1 (`is_correct`), the share of
    words that belong (`on_topic`), and the number of words (`words`).

  Raises:
    ValueError: if the prompt does not ask for words.
  """
  belonging, num = _parse(prompt)
  words = response.split()
  found = [word for word in words if word in belonging]
  # Without the bound, naming the whole topic would be right for every n.
  reward = min(num, len(set(found))) / max(num, len(words))
  return reward, {
    "is_correct": reward == 1.0,
    "on_topic": len(found) / len(words) if words else 0.0,
    "words": len(words),
  }


def word_tokenizer():
  """Makes a fast tokenizer with one token a word; texts begin with `<bos>`."""
  import tokenizers
  import transformers

  words = [*TOPICS, *_ALL, *map(str, LENGTHS), "not", ":", *_SPECIAL]
  ids = {word: i for i, word in enumerate(words)}
  # Without an unknown token, a word outside the vocabulary is an error.
  backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids))
  backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  bos, eos, pad = _SPECIAL
  backend.post_processor = tokenizers.processors.TemplateProcessing(
    single=f"{bos} $A", special_tokens=[(bos, ids[bos])]
  )
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend,
    bos_token=bos,
    eos_token=eos,
    pad_token=pad,
    padding_side="left",
    clean_up_tokenization_spaces=False,
  )


def _prompts_of(split: str) -> list[str]:
  if split not in SPLITS:
    raise ValueError(
      f"The task word_lists has the splits {', '.join(SPLITS)}, got {split!r}."
    )
  return [
    prompt
    for topic, words in _WORDS.items()
    for num in LENGTHS
    for first, second in itertools.combinations(words, 2)
    if _split_of(prompt := f"{topic} {num} not {first} {second}:") == split
  ]


def _split_of(prompt: str) -> str:
  number = int(hashlib.sha256(prompt.encode()).hexdigest(), 16) % 10
  return {8: "validation", 9: "test"}.get(number, "train")


def _parse(prompt: str) -> tuple[list[str], int]:
  """Returns the words that a reply may use, and how many are asked for."""
  fields = prompt.removesuffix(":").split()
  if (
    len(fields) != 5
    or fields[0] not in _WORDS
    or fields[1] not in map(str, LENGTHS)
    or fields[2] != "not"
  ):
    raise ValueError(
      f'Expected a prompt such as "birds 4 not duck owl:", got {prompt[:60]!r}.'
    )
  topic, num, _, *forbidden = fields
  return [word for word in _WORDS[topic] if word not in forbidden], int(num)


def _reply(prompt: str, rng: np.random.Generator) -> str:
  right = solution(prompt, rng)
  if rng.random() < _RIGHT[prompt.split()[0]]:
    return right
  # A poor reply: words of any topic, repetitions, a wrong length.
  belonging, num = _parse(prompt)
  care = rng.uniform(0.0, 0.8)
  num = int(np.clip(num + rng.integers(-2, 3), 1, MAX_WORDS))
  words = [
    rng.choice(belonging if rng.random() < care else _ALL) for _ in range(num)
  ]
  return "".join(f" {word}" for word in words)
