"""Merge sums: multi-step reasoning whose every step can be checked.

  07+04+02+10=
  11+02+10
  13+10
  #23

The prompt is a sum. Each line of the response rewrites the line before it with
two adjacent numbers merged into their sum; the last merge gives the answer,
after a "#". Any order of merges is right, so that a sum of n numbers has (n-1)!
right responses, all of one length. Numbers have a fixed width: without it,
small models learnt to guess answers instead of following their own lines.

It is a small stand-in for the word problems on which expert iteration, PPO
and return-conditioned RL are compared in

Source:
  Havrilla et al. (2024), "Teaching Large Language Models to Reason with
  Reinforcement Learning"; the task is ours.
"""

import collections
import functools
import hashlib
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np

from rljax.tasks import tokenizers
from rljax.text import alignment

SPLITS = ("train", "validation", "test")
CORPORA = ("clean", "pretraining")
STEP_ENDS = "\n"
# What may precede a line: a blank, or a return-conditioned policy's GOOD or
# BAD.
TAGS = (" ", "G", "B")

MAX_TERMS = 6
DIGITS = (2, 3)
# The pretraining corpus: its share of problems with two terms, and the errors
# of corrupted results.
TWO_TERMS = 0.3
ERRORS = (-20, -11, -10, -9, -2, -1, 1, 2, 9, 10, 11, 20)
# Right responses have less than 80 characters. Longer texts are wrong.
MAX_CHARACTERS = 1024

# A hash assigns every problem to one of sixteen cells, each of which belongs to
# one use of one split.
_CELLS = (
  *["pretraining train"] * 6,
  "pretraining validation",
  "pretraining test",
  *["clean train"] * 4,
  *["clean validation"] * 2,
  *["clean test"] * 2,
)
# Up to here all problems are shuffled; more are drawn one by one.
_MAX_SHUFFLED = 2**20
_MAX_REJECTED = 100_000

_PROMPT = re.compile(r"[0-9]{2}(\+[0-9]{2})+=|[0-9]{3}(\+[0-9]{3})+=")
_ANSWER = re.compile(r"#([0-9]{2,3})")


# Problems.


def prompts(
  split: str,
  seed: int,
  *,
  num: int = 1024,
  num_terms: int = 4,
  max_term: int = 24,
  digits: int = 2,
) -> list[str]:
  """Draws different prompts, such as "07+04+02+10=".

  A hash of the problem says which split it belongs to, whatever the seeds and
  options: a quarter of all problems is for training, an eighth for validation
  and an eighth for tests. The other half is left to the pretraining corpus of
  `supervised`. A smaller `num` gives the first of the same prompts.

  Args:
    split: "train", "validation" or "test".
    seed: >= 0.
    num: number of prompts.
    num_terms: numbers in the sum, 2 to 6.
    max_term: the largest of them; the smallest is 1.
    digits: width of every number, 2 or 3.

  Returns:
    `num` texts, all of one length.

  Raises:
    ValueError: if an option is out of range, the largest sum does not fit
      into the digits, or there are not `num` different prompts.
  """
  _check_options(split, seed, num, num_terms, max_term, digits)
  name = f"clean {split}"
  rng = np.random.default_rng([seed, SPLITS.index(split)])
  space = max_term**num_terms
  if space > _MAX_SHUFFLED and num > space // 16:
    raise ValueError(
      f"num must be at most {space // 16} for {num_terms} terms up to "
      f"{max_term}, got {num}."
    )
  found: dict[tuple[int, ...], None] = {}  # An ordered set.
  if num and space <= _MAX_SHUFFLED:
    for place in rng.permutation(space):
      terms = _terms_at(int(place), num_terms, max_term)
      if _cell(terms) == name:
        found[terms] = None
        if len(found) == num:
          break
  else:
    # At most half of the split is drawn: few draws repeat.
    num_rejected = 0
    for terms in _candidates(rng, num_terms, max_term):
      if len(found) == num or num_rejected > _MAX_REJECTED:
        break
      num_rejected += 1
      if _cell(terms) == name and terms not in found:
        found[terms] = None
        num_rejected = 0
  if len(found) < num:
    raise ValueError(
      f"There are {len(found)} different {split} prompts of {num_terms} terms "
      f"up to {max_term}, but {num} were asked for; more terms, or a larger "
      "max_term, give more."
    )
  return [_join(terms, digits) + "=" for terms in found]


def supervised(
  split: str,
  seed: int,
  *,
  num: int = 1024,
  corpus: Literal["clean", "pretraining"] = "clean",
  corruption: float = 0.15,
  slot: bool = False,
  num_terms: int = 4,
  max_term: int = 24,
  digits: int = 2,
) -> list[tuple[str, str]]:
  """Draws prompts with right responses, or a corpus of mixed quality.

  The pretraining corpus stands for the text that a pretrained model has read:
  the format is right, the arithmetic often is not. Of its problems 70 % have
  `num_terms` terms and 30 % have two; merges are in random order; the result of
  a merge is wrong with probability `corruption`, by one of `ERRORS`, and later
  lines continue from it. Results are clipped to what the digits can hold.
  Problems may repeat. None of them is a problem of `prompts`, with any split,
  seed or options.

  Args:
    split: "train", "validation" or "test"; the corpora of different splits
      share no problem.
    seed: >= 0.
    num: number of pairs.
    corpus: "clean" for the problems of `prompts`, in its order, each with its
      `reference`; or "pretraining".
    corruption: probability, in the pretraining corpus, of a wrong result.
    slot: see `reference`.
    num_terms: see `prompts`; likewise `max_term` and `digits`.
    max_term: see `prompts`.
    digits: see `prompts`.

  Returns:
    `num` pairs (prompt, response).

  Raises:
    ValueError: as `prompts` does; if there is no such corpus, or no problem
      for it.
  """
  if corpus not in CORPORA:
    raise ValueError(f"corpus must be one of {CORPORA}, got {corpus!r}.")
  if not 0 <= corruption <= 1:
    raise ValueError(f"corruption must lie in [0, 1], got {corruption}.")
  if corpus == "clean":
    texts = prompts(
      split,
      seed,
      num=num,
      num_terms=num_terms,
      max_term=max_term,
      digits=digits,
    )
    return [(text, reference(text, slot=slot)) for text in texts]
  _check_options(split, seed, num, num_terms, max_term, digits)
  lengths = (2, num_terms)
  problems = [
    _pretraining_problems(split, seed, length, max_term) for length in lengths
  ]
  rng = np.random.default_rng([seed, SPLITS.index(split), 1])
  pairs = []
  # A row of numbers in [0, 1) decides all choices of a pair.
  for row in rng.random((num, 2 * num_terms)).tolist():
    is_long = row[0] >= TWO_TERMS
    num_merges = lengths[is_long] - 1
    errors = [
      ERRORS[int(which * len(ERRORS))] if place < corruption else 0
      for place, which in zip(row[2::2], row[3::2], strict=True)
    ]
    terms = next(problems[is_long])
    order = int(row[1] * math.factorial(num_merges))
    lines, _ = _work_out(terms, order, digits, errors)
    pairs.append((_join(terms, digits) + "=", _as_text(lines, slot)))
  return pairs


# Responses.


def reference(prompt: str, *, seed: int = 0, slot: bool = False) -> str:
  """Returns a right response, whose order of merges hashes the prompt.

  Args:
    prompt: one of `prompts`.
    seed: another one gives another order. `score` compares with seed 0.
    slot: True for a blank at the start of every line, the first one included.
      It keeps a place for the tags of a return-conditioned policy: a small
      model with absolute positions breaks if they are added later.

  Returns:
    Lines, such as "11+02+10\\n13+10\\n#23".

  Raises:
    ValueError: if the prompt is not a sum.
  """
  terms, digits = _parse(prompt)
  lines, _ = _work_out(terms, _reference_order(prompt, seed), digits)
  return _as_text(lines, slot)


def traces(prompt: str, *, slot: bool = False) -> list[str]:
  """Returns all right responses with valid lines: (n-1)! for n terms > 0.

  Args:
    prompt: one of `prompts`.
    slot: see `reference`.

  Raises:
    ValueError: if the prompt is not a sum.
  """
  terms, digits = _parse(prompt)
  orders = range(math.factorial(len(terms) - 1))
  found = [_work_out(terms, order, digits)[0] for order in orders]
  # With zeros, different orders can write the same lines.
  return list(dict.fromkeys(_as_text(lines, slot) for lines in found))


def steps(response: str) -> list[str]:
  """Returns the lines of a response without their tags.

  Blanks and line feeds at the end of the text belong to no line; an empty text
  has no lines.
  """
  text = response.rstrip(" \n")
  lines = text.split("\n") if text else []
  return [line[1:] if line[:1] in TAGS else line for line in lines]


# Scores.


def score(prompt: str, response: str) -> tuple[float, dict[str, Any]]:
  """Scores 1 for the right answer, else 0.

  The last line must be "#" and the answer, a number with as many digits as
  those of the prompt, and no other "#" may be in the text. One tag (" ", "G" or
  "B") may precede each line, and blanks and line feeds may follow the last one;
  nothing else may. The lines before the answer do not count for the score, only
  for the parts.

  A line is valid if it is the line before it (the prompt, for the first) with
  one adjacent pair replaced by its sum; the answer is then valid after two
  numbers whose sum it is. The intermediate result of a line is what replaces a
  pair, right or wrong. It matches if the reference solution has that
  intermediate result too, each of which matches once; the answer is not one.

  Args:
    prompt: one of `prompts`.
    response: what the model wrote. Texts of more than 1024 characters are
      wrong, in every part.

  Returns:
    1.0 or 0.0, and its parts:
      is_correct: bool, whether the answer is right.
      answer: the answer without leading zeros, or None.
      truth: the right one, likewise.
      is_valid: bool, whether the answer is right and every line valid.
      num_steps: number of lines, as `steps` counts them.
      num_valid_steps: number of lines before the first that is not valid.
      step_matches: list of `num_steps` bools.

  Raises:
    ValueError: if the prompt is not a sum.
  """
  terms, digits, truth, results = _solved(prompt)
  lines = steps(response)
  is_short = len(response) <= MAX_CHARACTERS
  matches, num_valid, answer = [False] * len(lines), 0, None
  if lines and is_short and response.count("#") == 1:
    found = _ANSWER.fullmatch(lines[-1])
    if found and len(found[1]) == digits:
      answer = str(int(found[1]))
  if is_short:
    unmatched = collections.Counter(results)
    before: Sequence[int] | None = terms
    for i, line in enumerate(lines):
      if answer is not None and i == len(lines) - 1:
        is_step = before is not None and len(before) == 2
        is_step = is_step and sum(before) == int(answer)
      else:
        after = _numbers(line, digits)
        result, is_step = _merged(before, after)
        matches[i] = unmatched[result] > 0
        unmatched[result] -= 1
        before = after
      num_valid += is_step and num_valid == i
  is_correct = answer == truth
  return float(is_correct), {
    "is_correct": is_correct,
    "answer": answer,
    "truth": truth,
    "is_valid": is_correct and num_valid == len(lines),
    "num_steps": len(lines),
    "num_valid_steps": num_valid,
    "step_matches": matches,
  }


def first_wrong_step(prompt: str, response: str) -> int:
  """Returns the index of the first line that is not valid.

  Args:
    prompt: one of `prompts`.
    response: what the model wrote. In texts of more than 1024 characters the
      first line is wrong.

  Returns:
    The index, from 0, as in `score`; the number of lines if the only fault is
    that lines are missing; -1 if every line is right.

  Raises:
    ValueError: if the prompt is not a sum.
  """
  _, parts = score(prompt, response)
  return -1 if parts["is_valid"] else parts["num_valid_steps"]


def rewrite(prompt: str, response: str) -> str:
  """Repairs a response from its first wrong line on.

  The lines before it stay, tags included. Each later line is computed again, in
  the sample's own order of merges: it merges the pair that the sample's line of
  that number merged, whatever its result. Where the line is not a merge of the
  one before it, or could be several, the one with the most numbers in place
  counts, then the one with the fewest edits, then the first. A line has the tag
  of the sample's line, or else the tag of the line before.

  Args:
    prompt: one of `prompts`.
    response: what the model wrote. Of texts of more than 1024 characters
      nothing is kept or read.

  Returns:
    A response whose lines are all valid; the given one if its lines are.

  Raises:
    ValueError: if the prompt is not a sum.
  """
  num_kept = first_wrong_step(prompt, response)
  if num_kept < 0:
    return response
  terms, digits = _parse(prompt)
  text = response.rstrip(" \n") if len(response) <= MAX_CHARACTERS else ""
  lines = text.split("\n") + [""] * len(terms)
  untagged = steps(text) + [""] * len(terms)
  numbers = [list(terms), *[_numbers(line, digits) for line in untagged]]
  left = numbers[num_kept]
  written, tag = lines[:num_kept], ""
  for i in range(len(terms) - 1):
    tag = lines[i][:1] if lines[i][:1] in TAGS else tag
    if i >= num_kept:
      # From the sample's numbers at that line, right or wrong.
      before = numbers[i]
      if before is None or len(before) != len(left):
        before = left
      left = _with_merge(left, _place(before, untagged[i], digits))
      answer = "#" if len(left) == 1 else ""
      written.append(tag + answer + _join(left, digits))
  return "\n".join(written)


# The tokenizer.


def character_tokenizer():
  """Makes a tokenizer of characters: ids 0..9, then "+=#", and so on.

  10 "+", 11 "=", 12 "#", 13 line feed, 14 blank, 15 "G", 16 "B"; 17 starts a
  prompt (the tokenizer adds it), 18 ends a response, 19 pads. Other text
  raises an error.
  """
  return tokenizers.of_words([*"0123456789+=#\n", *TAGS], r"[\s\S]")


# Helpers.


def _check_options(
  split: str, seed: int, num: int, num_terms: int, max_term: int, digits: int
) -> None:
  if split not in SPLITS:
    raise ValueError(f"split must be one of {SPLITS}, got {split!r}.")
  if num < 0 or seed < 0:
    raise ValueError(f"num and seed must be >= 0, got {num} and {seed}.")
  if digits not in DIGITS:
    raise ValueError(f"digits must be one of {DIGITS}, got {digits!r}.")
  if num_terms not in range(2, MAX_TERMS + 1):
    raise ValueError(
      f"num_terms must be an integer from 2 to {MAX_TERMS}, got {num_terms!r}."
    )
  largest = (10**digits - 1) // num_terms
  if max_term not in range(1, largest + 1):
    raise ValueError(
      f"max_term must be an integer from 1 to {largest}, for sums of "
      f"{num_terms} terms to fit into {digits} digits, got {max_term!r}."
    )


def _terms_at(place: int, num_terms: int, max_term: int) -> tuple[int, ...]:
  terms = []
  for _ in range(num_terms):
    place, term = divmod(place, max_term)
    terms.append(term + 1)
  return tuple(terms)


def _candidates(
  rng: np.random.Generator, num_terms: int, max_term: int
) -> Iterator[tuple[int, ...]]:
  """Draws problems for ever, those of all splits."""
  while True:
    drawn = rng.integers(1, max_term + 1, size=(4096, num_terms))
    yield from map(tuple, drawn.tolist())


def _pretraining_problems(
  split: str, seed: int, num_terms: int, max_term: int
) -> Iterator[tuple[int, ...]]:
  rng = np.random.default_rng([seed, SPLITS.index(split), 2, num_terms])
  num_rejected = 0
  for terms in _candidates(rng, num_terms, max_term):
    if _cell(terms) == f"pretraining {split}":
      num_rejected = 0
      yield terms
    num_rejected += 1
    if num_rejected > _MAX_REJECTED:
      raise ValueError(
        f"No problem of {num_terms} terms up to {max_term} belongs to the "
        f"{split} split of the pretraining corpus; take a larger max_term."
      )


def _cell(terms: Sequence[int]) -> str:
  # Only the numbers count, so that their width does not change the split.
  return _CELLS[_hash(f"cell {terms}") % len(_CELLS)]


def _hash(text: str) -> int:
  digest = hashlib.blake2b(text.encode(), digest_size=6).digest()
  return int.from_bytes(digest, "big")


def _join(terms: Sequence[int], digits: int) -> str:
  return "+".join([str(term).zfill(digits) for term in terms])


def _as_text(lines: Sequence[str], slot: bool) -> str:
  head = TAGS[0] if slot else ""
  return "\n".join([head + line for line in lines])


def _work_out(
  terms: Sequence[int], order: int, digits: int, errors: Sequence[int] = ()
) -> tuple[list[str], list[int]]:
  """Returns the lines of a solution, and the result of each.

  Args:
    terms: n numbers.
    order: which of the (n-1)! orders of merges, from 0.
    digits: width of the numbers.
    errors: added to the results, one each; empty for zeros.
  """
  terms = list(terms)
  lines, results = [], []
  while len(terms) > 1:
    order, i = divmod(order, len(terms) - 1)
    result = terms[i] + terms[i + 1]
    if errors:
      result = min(max(result + errors[len(lines)], 0), 10**digits - 1)
    terms[i : i + 2] = [result]
    results.append(result)
    lines.append(_join(terms, digits))
  lines[-1] = "#" + lines[-1]
  return lines, results


def _reference_order(prompt: str, seed: int) -> int:
  num_merges = prompt.count("+")
  return _hash(f"order {seed} {prompt}") % math.factorial(num_merges)


def _parse(prompt: str) -> tuple[tuple[int, ...], int]:
  """Returns the terms of a prompt and their width."""
  fields = prompt.removesuffix("=").split("+")
  if not _PROMPT.fullmatch(prompt) or len(fields) > MAX_TERMS:
    raise ValueError(
      f'Expected a prompt such as "07+04+02+10=", with 2 to {MAX_TERMS} terms '
      f"of 2 or 3 digits, got {prompt[:60]!r}."
    )
  terms, digits = tuple(map(int, fields)), len(fields[0])
  if sum(terms) >= 10**digits:
    raise ValueError(
      f"The sum of {prompt!r} does not fit into {digits} digits."
    )
  return terms, digits


@functools.lru_cache(maxsize=2**16)
def _solved(prompt: str) -> tuple[tuple[int, ...], int, str, tuple[int, ...]]:
  """Returns terms, their width, the answer, and the other results."""
  terms, digits = _parse(prompt)
  _, results = _work_out(terms, _reference_order(prompt, 0), digits)
  return terms, digits, str(sum(terms)), tuple(results[:-1])


def _numbers(line: str, digits: int) -> list[int] | None:
  """Returns the terms of a line; None if it is not a sum of that width."""
  fields = line.split("+")
  if len(fields) == 1:  # An answer without its "#".
    return None
  for field in fields:
    if len(field) != digits or not (field.isascii() and field.isdigit()):
      return None
  return list(map(int, fields))


def _merged(
  before: Sequence[int] | None, after: Sequence[int] | None
) -> tuple[int | None, bool]:
  """Returns what replaces two adjacent numbers, and if it is their sum."""
  if before is None or after is None or len(after) != len(before) - 1:
    return None, False
  before = list(before)
  found = None
  for i, result in enumerate(after):
    if after[:i] == before[:i] and after[i + 1 :] == before[i + 2 :]:
      if result == before[i] + before[i + 1]:
        return result, True
      # A wrong line may be read in two ways: the first one counts.
      found = result if found is None else found
  return found, False


def _with_merge(terms: Sequence[int], place: int) -> list[int]:
  result = terms[place] + terms[place + 1]
  return [*terms[:place], result, *terms[place + 2 :]]


def _place(before: Sequence[int], line: str, digits: int) -> int:
  """Returns which merge of `before` is nearest to a line."""
  choices = [_with_merge(before, i) for i in range(len(before) - 1)]
  after = _numbers(line, digits) or []
  texts = [[*map(ord, _join(choice, digits))] for choice in choices]
  distances = alignment.distances([[*map(ord, line)]] * len(texts), texts)
  agreements = [
    sum(one == other for one, other in zip(choice, after, strict=False))
    for choice in choices
  ]
  return min(range(len(texts)), key=lambda i: (-agreements[i], distances[i]))
