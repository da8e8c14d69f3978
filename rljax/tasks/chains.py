"""Chains of sums modulo 100, where the smallest correction is known.

  Q12+5*3
  12+5=17;3*17=51|A51

The prompt has a start and K operations, applied from the left. A response has
one step for each, `left op right=result`, and after "A" the last result. Two
things of a step are free: whether ";" or "|" ends it, and the order of the
operands of "+" and "*". So a prompt has up to 4^K right responses, and the one
nearest to a wrong sample is usually not the gold text.

A small task for the method of the paper below, which has no such task.

Source:
  Chen et al. (2024), "Improving Large Language Models via Fine-grained
  Reinforcement Learning with Minimum Editing Constraint"; the task is ours.
"""

import collections
import functools
import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import numpy as np

from rljax.tasks import tokenizers
from rljax.text import alignment
from rljax.text import steps as steps_lib

SPLITS = ("train", "validation", "test")
CORPORA = ("clean", "pretraining")
STEP_ENDS = ";|"

MODULUS = 100
MAX_STEPS = 6
MOVES = tuple(f"{op}{operand}" for op in "+-*" for operand in range(2, 10))
# Right responses have at most 51 characters. Longer texts are wrong.
MAX_CHARACTERS = 256

# A hash assigns every problem to one of sixteen cells, each of which belongs to
# one use of one split.
_CELLS = (
  *["pretraining train"] * 8,
  "pretraining validation",
  "pretraining test",
  *["clean train"] * 3,
  "clean validation",
  *["clean test"] * 2,
)
# Up to here all problems are shuffled; more are drawn one by one.
_MAX_SHUFFLED = 2**21
_SMALLEST_SHARE = 16
_MAX_REJECTED = 100_000  # Draws without a new prompt.
# All right texts of up to so many steps are tried; of more, step by step.
_MAX_TRIED = 3

_PROMPT = re.compile(rf"Q(0|[1-9][0-9]?)((?:[+*-][2-9]){{1,{MAX_STEPS}}})")
_RESULT = re.compile(r"=([0-9]{1,2})[;|]\Z")
_ANSWER = re.compile(r"0|[1-9][0-9]{0,7}")


# Problems.


def prompts(
  split: str, seed: int, *, num: int = 1024, num_steps: int = 2
) -> list[str]:
  """Draws different prompts, such as "Q12+5*3".

  The start is 0 to 99, the operands are 2 to 9. There are 100 · 24^K problems.
  A hash of the problem says which split it belongs to: 3/16 of all are for
  training, 1/16 for validation, 2/16 for tests. The other ten are left to the
  pretraining corpus of `supervised`. A smaller `num` gives the first of the
  same prompts.

  Args:
    split: "train", "validation" or "test".
    seed: >= 0.
    num: number of prompts.
    num_steps: K, 1 to 6.

  Returns:
    `num` texts.

  Raises:
    ValueError: if an option is out of range, or there are not `num` different
      prompts.
  """
  _check_options(split, seed, num, num_steps)
  rng = np.random.default_rng([seed, SPLITS.index(split)])
  space = _space(num_steps)
  if space > _MAX_SHUFFLED:
    # At most half of the smallest split is drawn: few draws repeat.
    most = space // _SMALLEST_SHARE // 2
    if num > most:
      raise ValueError(
        f"num must be at most {most} for {num_steps} steps, got {num}."
      )
    places: Iterator[int] = _draws(rng, space)
  else:
    places = iter(rng.permutation(space).tolist())
  found: dict[str, None] = {}  # An ordered set.
  num_rejected = 0
  while len(found) < num:
    place = next(places, None)
    num_rejected += 1
    if place is None or num_rejected > _MAX_REJECTED:
      raise ValueError(
        f"There are {len(found)} different {split} prompts of {num_steps} "
        f"steps, but {num} were asked for; more steps give more."
      )
    prompt = _prompt_at(place, num_steps)
    if _cell(prompt) == f"clean {split}":
      found[prompt] = None
      num_rejected = 0
  return list(found)


def supervised(
  split: str,
  seed: int,
  *,
  num: int = 1024,
  corpus: Literal["clean", "pretraining"] = "clean",
  num_steps: int = 2,
) -> list[tuple[str, str]]:
  """Draws prompts with right responses, in a style drawn at random.

  The pretraining corpus is for the policy that a method starts from. Its
  problems may repeat, with another style. None of them is a problem of
  `prompts`, with any split, seed or options.

  Args:
    split: "train", "validation" or "test"; the corpora of different splits
      share no problem.
    seed: >= 0.
    num: number of pairs.
    corpus: "clean" for the problems of `prompts`, in its order, each with its
      `reference` of that seed; or "pretraining".
    num_steps: see `prompts`.

  Returns:
    `num` pairs (prompt, response).

  Raises:
    ValueError: as `prompts` does; or if there is no such corpus.
  """
  if corpus not in CORPORA:
    raise ValueError(f"corpus must be one of {CORPORA}, got {corpus!r}.")
  if corpus == "clean":
    texts = prompts(split, seed, num=num, num_steps=num_steps)
    return [(text, reference(text, seed=seed)) for text in texts]
  _check_options(split, seed, num, num_steps)
  streams = [
    np.random.default_rng([seed, SPLITS.index(split), stream])
    for stream in (1, 2)
  ]
  drawn = map(
    functools.partial(_prompt_at, num_steps=num_steps),
    _draws(streams[0], _space(num_steps)),
  )
  texts = _in_cell(drawn, f"pretraining {split}")
  styles = streams[1].integers(4**num_steps, size=num).tolist()
  return [(text := next(texts), _styled(text, style)) for style in styles]


# Responses.


def reference(prompt: str, *, seed: int = 0) -> str:
  """Returns a right response, whose style hashes the prompt and the seed.

  Args:
    prompt: one of `prompts`.
    seed: another one gives another style.

  Returns:
    A text such as "12+5=17;3*17=51|A51".

  Raises:
    ValueError: if the prompt is not a chain.
  """
  return _styled(prompt, _hash(f"style {seed} {prompt}"))


def variants(prompt: str) -> list[str]:
  """Returns all right responses whose steps are valid, sorted.

  There are 4^K of them, fewer where operands cannot be swapped: in differences,
  and where both are equal.

  Args:
    prompt: one of `prompts`.

  Raises:
    ValueError: if the prompt is not a chain.
  """
  steps, _, answer = _solved(prompt)
  return ["".join(texts) for texts in itertools.product(*steps, [answer])]


# Scores.


def score(prompt: str, response: str) -> tuple[float, dict[str, Any]]:
  """Scores 1 for the right answer, else 0.

  The answer is all that follows the last "A", if that is a number without
  leading zeros. The steps before it do not count for the score, only for the
  parts. A step goes up to its ";" or "|", and what follows the last of them,
  the answer, is the last step: see `steps.steps`.

  Args:
    prompt: one of `prompts`.
    response: what the model wrote. Texts of more than 256 characters are
      wrong, in every part.

  Returns:
    1.0 or 0.0, and its parts:
      is_correct: bool, whether the answer is right.
      answer: the answer, or None.
      truth: the right one.
      is_valid: bool, whether every step is right: see `first_wrong_step`.
      num_steps: number of steps, the answer included.
      num_valid_steps: number of steps before the first wrong one.
      step_matches: list of `num_steps` bools: whether the right solution has
        the result of that step, each of which matches once; the answer has
        none.

  Raises:
    ValueError: if the prompt is not a chain.
  """
  _, results, right_answer = _solved(prompt)
  pieces = steps_lib.steps(response, STEP_ENDS)
  is_short = len(response) <= MAX_CHARACTERS
  matches, answer = [False] * len(pieces), None
  if is_short:
    _, marker, text = response.rpartition("A")
    answer = text if marker and _ANSWER.fullmatch(text) else None
    unmatched = collections.Counter(results)
    for i, piece in enumerate(pieces):
      found = _RESULT.search(piece)
      result = found[1] if found else ""
      matches[i] = unmatched[result] > 0
      unmatched[result] -= 1
  truth = right_answer.removeprefix("A")
  first_wrong = first_wrong_step(prompt, response)
  return float(answer == truth), {
    "is_correct": answer == truth,
    "answer": answer,
    "truth": truth,
    "is_valid": first_wrong < 0,
    "num_steps": len(pieces),
    "num_valid_steps": len(pieces) if first_wrong < 0 else first_wrong,
    "step_matches": matches,
  }


def first_wrong_step(prompt: str, response: str) -> int:
  """Returns the index of the first step that is wrong.

  A step is right if it is one of the right texts of the step of that number,
  its end included; the answer is the last step. A missing or an extra step is
  wrong.

  Args:
    prompt: one of `prompts`.
    response: what the model wrote. In texts of more than 256 characters the
      first step is wrong.

  Returns:
    The index, 0 to K; or -1 if the response is one of `variants`.

  Raises:
    ValueError: if the prompt is not a chain.
  """
  steps, _, answer = _solved(prompt)
  if len(response) > MAX_CHARACTERS:
    return 0
  pieces = steps_lib.steps(response, STEP_ENDS)
  for i, texts in enumerate([*steps, (answer,)]):
    if i == len(pieces) or pieces[i] not in texts:
      return i
  # Nothing ends the answer: no step can follow it.
  return -1


def rewrite(prompt: str, response: str) -> str:
  """Returns the right response nearest to a sample: minimum editing.

    argmin over variants v of d(v, response)

  with the Levenshtein distance d of characters. The steps before the first
  wrong one are kept. That costs nothing, as all right texts of a step have one
  length: a variant with other texts there is not nearer. Of equally near ones
  the first in sorted order is taken.

  If more than three steps are left, each becomes the right text nearest to the
  sample's step of the same number. That keeps the sample's style, but other
  variants may be nearer.

  Args:
    prompt: one of `prompts`.
    response: what the model wrote. Of texts of more than 256 characters
      nothing is kept.

  Returns:
    One of `variants`; the response itself if it is one.

  Raises:
    ValueError: if the prompt is not a chain.
  """
  num_kept = first_wrong_step(prompt, response)
  if num_kept < 0:
    return response
  steps, _, answer = _solved(prompt)
  is_short = len(response) <= MAX_CHARACTERS
  pieces = steps_lib.steps(response, STEP_ENDS) if is_short else []
  kept, pieces = pieces[:num_kept], pieces[num_kept:]
  choices: list[Sequence[str]] = [*steps[num_kept:], (answer,)]
  if len(choices) <= _MAX_TRIED + 1:
    choices = [["".join(texts) for texts in itertools.product(*choices)]]
    pieces = ["".join(pieces)]
  return "".join(kept + _nearest(pieces, choices))


# The tokenizer.


def character_tokenizer():
  """Makes a tokenizer of characters: ids 0..9, then "+-*=;|QAGPRL".

  "G", "P", "R" and "L" are in no prompt and no response. They precede the gold
  text, a sample, its rewrite and the number of a step in what a reward model
  reads. Id 22 starts a prompt (the tokenizer adds it), 23 ends a response, 24
  pads. Other text raises an error.
  """
  return tokenizers.of_words([*"0123456789+-*=;|QAGPRL"], r"[\s\S]")


# Helpers.


def _check_options(split: str, seed: int, num: int, num_steps: int) -> None:
  if split not in SPLITS:
    raise ValueError(f"split must be one of {SPLITS}, got {split!r}.")
  if num < 0 or seed < 0:
    raise ValueError(f"num and seed must be >= 0, got {num} and {seed}.")
  if num_steps not in range(1, MAX_STEPS + 1):
    raise ValueError(
      f"num_steps must be an integer from 1 to {MAX_STEPS}, got {num_steps!r}."
    )


def _space(num_steps: int) -> int:
  return MODULUS * len(MOVES) ** num_steps


def _prompt_at(place: int, num_steps: int) -> str:
  place, start = divmod(place, MODULUS)
  fields = [f"Q{start}"]
  for _ in range(num_steps):
    place, move = divmod(place, len(MOVES))
    fields.append(MOVES[move])
  return "".join(fields)


def _draws(rng: np.random.Generator, space: int) -> Iterator[int]:
  """Draws places of problems for ever, those of all splits."""
  while True:
    yield from rng.integers(space, size=4096).tolist()


def _in_cell(prompts: Iterable[str], cell: str) -> Iterator[str]:
  """Filters prompts; raises ValueError if too many in a row are of others."""
  num_rejected = 0
  for prompt in prompts:
    num_rejected += 1
    if _cell(prompt) == cell:
      num_rejected = 0
      yield prompt
    elif num_rejected > _MAX_REJECTED:
      raise ValueError(
        f"{num_rejected} draws had no prompt of the corpus {cell!r}; more "
        "steps give more."
      )


def _cell(prompt: str) -> str:
  return _CELLS[_hash(f"cell {prompt}") % len(_CELLS)]


def _hash(text: str) -> int:
  digest = hashlib.blake2b(text.encode(), digest_size=6).digest()
  return int.from_bytes(digest, "big")


def _styled(prompt: str, style: int) -> str:
  steps, _, answer = _solved(prompt)
  text = ""
  for texts in steps:
    # There are 1, 2 or 4 texts: styles below 4^K give them equally often.
    style, i = divmod(style, len(texts))
    text += texts[i]
  return text + answer


@functools.lru_cache(maxsize=2**16)
def _solved(
  prompt: str,
) -> tuple[tuple[tuple[str, ...], ...], tuple[str, ...], str]:
  """Returns the right texts of each step, sorted; its results; the answer."""
  found = _PROMPT.fullmatch(prompt)
  if not found:
    raise ValueError(
      f'Expected a prompt such as "Q12+5*3", with 1 to {MAX_STEPS} operations '
      f"+, - or * and operands from 2 to 9, got {prompt[:60]!r}."
    )
  value, moves = int(found[1]), found[2]
  steps, results = [], []
  for op, digit in zip(moves[::2], moves[1::2], strict=True):
    before, operand = value, int(digit)
    sides = {f"{before}{op}{operand}"}
    if op == "+":
      value = before + operand
    elif op == "-":
      value = before - operand
    else:
      value = before * operand
    if op != "-":
      sides.add(f"{operand}{op}{before}")
    value %= MODULUS
    steps.append(
      tuple(sorted(f"{s}={value}{end}" for s in sides for end in STEP_ENDS))
    )
    results.append(str(value))
  return tuple(steps), tuple(results), f"A{value}"


def _nearest(
  samples: Sequence[str], choices: Sequence[Sequence[str]]
) -> list[str]:
  """Returns for each list of texts the first of those nearest to its sample.

  Lists after the last sample are compared with an empty one.
  """
  samples = [*samples, *[""] * len(choices)]
  lefts, rights = [], []
  for sample, texts in zip(samples, choices, strict=False):
    ids = np.array([*map(ord, sample)], np.int64)
    lefts += [ids] * len(texts)
    rights += [[*map(ord, text)] for text in texts]
  ends = np.cumsum([len(texts) for texts in choices])
  distances = np.split(alignment.distances(lefts, rights), ends[:-1])
  return [
    texts[int(np.argmin(found))]
    for texts, found in zip(choices, distances, strict=True)
  ]
