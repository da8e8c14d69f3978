"""Sums, solved one reduction at a time, and a reward that checks them.

  4+6+10+2+8=4+16+2+8=4+16+10=20+10=30

is a chain: k operators, k equality signs. A prompt is a chain cut after an
equality sign, the answer is what follows it. Prompts and answers are plain
text, so any model can be trained with its own tokenizer; the two tokenizers
made here are for models trained from scratch.

Source:
  Padula and Soemers, "Exploring RL-based LLM Training for Formal Language
  Tasks with Programmed Rewards", the arithmetic task.
"""

import collections
import hashlib
import math
import re
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from rljax.tasks import tokenizers

SPLITS = ("train", "validation", "test")
# What a prompt shows: all reductions but the last, "20+10=" alone, or the
# problem alone (the model writes the chain).
STYLES = ("chain", "last", "expression")

LENGTH = 10  # Characters of a problem.
MAX_OPERAND = 10
MAX_NUMBER = 99  # The largest number with a token.
ERROR_LIMIT = 500.0

# Baselines: the mean reward, the share of right answers, and the entropy in
# nats of the mean answer distribution, over all problems that `problem` draws.
# The best constant earns three quarters of the maximum: the local optimum to
# look for in a learning curve.
LANDMARKS = {
  # Numbers 0 to 99, the three symbols and three ids without a word.
  "uniform over 106 ids": (0.2436, 0.0094, 4.663),
  "uniform over 0..99": (0.2582, 0.0100, 4.605),
  "true answers of other prompts": (0.6641, 0.0416, 3.314),
  "always 25": (0.7477, 0.0577, 0.0),
  # In batches of 128 the entropy is 3.16 ± 0.06.
  "exact": (1.0, 1.0, 3.314),
}
# m -> mean reward of the best policy with exactly m different answers. A
# plateau at one of these rewards means a policy with so many answers.
STAIRCASE = {
  1: 0.7477,
  2: 0.8481,
  3: 0.8909,
  4: 0.9147,
  5: 0.9303,
  6: 0.9413,
  7: 0.9505,
  8: 0.9569,
}

# Bounds on the text of an untrusted answer. Chains have some 60 characters
# and numbers below 100; beyond the bounds a text counts as not evaluable.
_MAX_CHARACTERS = 1024
_MAX_DEPTH = 32
_MAX_VALUE = 10**15
_MAX_EXPONENT = 64

# ASCII digits only, without leading zeros.
_LEXEME = re.compile(r"\*\*|[-+*/()]|(?:0|[1-9][0-9]*)(?:\.[0-9]+)?")
_INTEGER = re.compile(r"-?(?:0|[1-9][0-9]{0,14})")
# A whole word: the 2 of "2.5", "2,500" or "2nd" does not count.
_LEADING_INTEGER = re.compile(r"\s*(-?(?:0|[1-9][0-9]{0,14}))(?!\w|[.,][0-9])")


# Problems.


def problem(rng: np.random.Generator) -> str:
  """Draws a problem, such as "4+6+10+2+8".

  Uniform integers from 0 to 10 with plus signs between them, cut to ten
  characters, without a trailing plus sign. The cut may turn a last 10 into a 1.
  The largest value is 46 (10+9+9+9+9), so that every answer has a token.
  """
  # Each operand and its sign take two characters or more.
  operands = rng.integers(0, MAX_OPERAND + 1, size=LENGTH // 2)
  return "+".join(map(str, operands))[:LENGTH].removesuffix("+")


def work_out(expression: str, rng: np.random.Generator) -> str:
  """Draws a chain from an expression: random reductions, products first.

  Args:
    expression: non-negative integers with `+` or `*` between them.
    rng: of the order of the reductions.

  Returns:
    The chain, from the expression to its value, with one equality sign per
    operator.

  Raises:
    ValueError: if the expression is of another form.
  """
  if not re.fullmatch(r"[0-9]+(?:[+*][0-9]+)*", expression):
    raise ValueError(f"Expected a sum or product, got {expression[:60]!r}.")
  numbers = [int(number) for number in re.findall("[0-9]+", expression)]
  operators = re.findall(r"[+*]", expression)
  links = [expression]
  while operators:
    products = [i for i, sign in enumerate(operators) if sign == "*"]
    choices = products or range(len(operators))
    i = choices[int(rng.integers(len(choices)))]
    sign = operators.pop(i)
    left, right = numbers[i : i + 2]
    numbers[i : i + 2] = [left * right if sign == "*" else left + right]
    signs = [*operators, ""]
    links.append(
      "".join(f"{n}{s}" for n, s in zip(numbers, signs, strict=True))
    )
  return "=".join(links)


def prompts(
  split: str,
  seed: int,
  *,
  num: int = 1024,
  style: Literal["chain", "last", "expression"] = "chain",
  holdout: float = 0.0,
) -> list[str]:
  """Draws prompts, all of which end in "=".

  The splits share no problem, whatever their seeds: a hash of the problem
  says which split it belongs to (14/16, 1/16, 1/16 of all problems). Within a
  split prompts are drawn independently and may repeat. A smaller `num` gives
  the first of the same prompts.

  With style "last" there are fewer than a thousand prompts, "a+b=", which the
  splits share: held-out prompts are then only drawn independently. `holdout`
  separates pairs.

  Args:
    split: "train", "validation" or "test".
    seed: >= 0.
    num: number of prompts.
    style: "chain" cuts a chain after its last equality sign, "last" keeps only
      its last reduction, "expression" cuts it after the first one.
    holdout: share of the unordered pairs {a, b} in last reductions that only
      validation and test ask for, and nothing else.

  Returns:
    `num` texts.

  Raises:
    ValueError: if the split or style is unknown, or no pair is held out.
  """
  return [
    prompt
    for prompt, _ in supervised(
      split, seed, num=num, style=style, holdout=holdout
    )
  ]


def supervised(
  split: str,
  seed: int,
  *,
  num: int = 1024,
  style: Literal["chain", "last", "expression"] = "chain",
  holdout: float = 0.0,
  whole: bool = False,
) -> list[tuple[str, str]]:
  """Draws the prompts of `prompts` with right responses.

  Args:
    split: see `prompts`; likewise `seed`, `num`, `style` and `holdout`.
    seed: see `prompts`.
    num: see `prompts`.
    style: see `prompts`.
    holdout: see `prompts`.
    whole: True for an empty prompt and the whole text as the response, so that
      the loss covers all of it, as in the paper's supervised phase.

  Returns:
    `num` pairs (prompt, response).
  """
  if style not in STYLES:
    raise ValueError(f"style must be one of {STYLES}, got {style!r}.")
  if holdout and style == "expression":
    raise ValueError("holdout needs a prompt that shows the last reduction.")
  pairs = []
  for chain in _chains(split, seed, num, holdout):
    if style == "expression":
      first, _, rest = chain.partition("=")
      prompt, response = f"{first}=", rest
    else:
      links = chain.split("=")
      shown = links[:-1] if style == "chain" else links[-2:-1]
      prompt, response = f"{'='.join(shown)}=", links[-1]
    pairs.append(("", prompt + response) if whole else (prompt, response))
  return pairs


def solution(prompt: str, rng: np.random.Generator) -> str:
  """Draws a right response to a prompt: the rest of a chain.

  After the last reduction that is one number, and nothing is random.
  """
  expression = _without_blanks(prompt).removesuffix("=").split("=")[-1]
  chain = work_out(expression, rng)
  return chain.partition("=")[2] or chain


# Scores.


def score(
  prompt: str,
  response: str,
  *,
  parse: Literal["faithful", "leading_integer"] = "faithful",
) -> tuple[float, dict]:
  """Scores a response by how far its chain is from the true value.

    R = 2 / (1 + exp(e / 10)),   e = min(Σ_i |s - v_i|, 500)

  s is the value of the prompt's first part, v_i those of the parts after the
  equality signs. e is 500 if a part cannot be evaluated, or if part i (from 0)
  does not have exactly k - i - 1 operators, where the first part has k. Blanks
  do not count.

  Numbers with `+ - * / **`, unary minus and brackets can be evaluated; they are
  parsed, never evaluated by Python. A minus before a number belongs to the
  number; other signs are operators, so that "--5" is not an answer. Texts,
  values, exponents and nesting far beyond any right answer are not evaluable.

  We depart from the source in one point: a chain that stops before its k-th
  equality sign is not evaluable either. A model that writes the whole chain
  could otherwise earn 1 without an answer; prompts of the styles "chain" and
  "last" have all their signs, and score the same.

  Args:
    prompt: text that ends in "=".
    response: what the model wrote.
    parse: "faithful" for the rule above, under which "25." or "25 apples" are
      not evaluable. "leading_integer", meant for pretrained models that do not
      stop, drops what follows the integer that the response begins with (and
      only an integer: "2.5" and "25th" have none); use it with prompts whose
      answer is one number.

  Returns:
    R in (0, 1], and its parts:
      is_correct: bool, whether e = 0.
      error: float, e.
      format: 1.0 if the last part is an integer, else 0.0.
      answer: that integer or None.
      truth: s, or None if the prompt's first part cannot be evaluated.
  """
  if parse not in ("faithful", "leading_integer"):
    raise ValueError(
      f'parse must be "faithful" or "leading_integer", got {parse!r}.'
    )
  if parse == "leading_integer":
    match = _LEADING_INTEGER.match(response)
    response = match[1] if match else ""
  if len(prompt) + len(response) <= _MAX_CHARACTERS:
    links = _without_blanks(prompt + response).split("=")
  else:
    # The largest error, whatever follows.
    links = [_without_blanks(prompt.partition("=")[0])]
  error, truth = _error(links)
  answer = links[-1] if len(links) > 1 else ""
  is_integer = _INTEGER.fullmatch(answer) is not None
  return 2 / (1 + math.exp(error / 10)), {
    "is_correct": error == 0,
    "error": float(error),
    "format": float(is_integer),
    "answer": int(answer) if is_integer else None,
    "truth": truth,
  }


def format_score(
  prompt: str,
  response: str,
  *,
  parse: Literal["faithful", "leading_integer"] = "faithful",
) -> tuple[float, dict]:
  """Scores 1 for an integer after the last "=", right or wrong, else 0.

  Any learner must solve this task within tens of updates. The parts are those
  of `score`.
  """
  _, parts = score(prompt, response, parse=parse)
  return parts["format"], parts


def evaluate(expression: str) -> tuple[int | float, int]:
  """Evaluates an expression, and counts its operators.

  Args:
    expression: numbers with `+ - * / **`, unary minus and brackets, without
      blanks.

  Raises:
    ValueError: if the text is not such an expression, divides by zero, or
      exceeds the bounds on length, nesting, exponents and values.
  """
  if len(expression) > _MAX_CHARACTERS:
    raise ValueError("The expression is too long.")
  lexemes = collections.deque()
  position = 0
  while position < len(expression):
    match = _LEXEME.match(expression, position)
    if not match:
      raise ValueError(f"No number or sign at {expression[position:][:20]!r}.")
    lexemes.append(match[0])
    position = match.end()
  value, num_operators = _sum(lexemes, depth=0)
  if lexemes:
    raise ValueError(f"Unexpected {lexemes[0]!r}.")
  return value, num_operators


# Tokenizers.


def word_tokenizer():
  """Makes a tokenizer of numbers: ids 0..99, 100 "+", 101 "*", 102 "=".

  103 starts a prompt (the tokenizer adds it), 104 ends a response, 105 pads.
  Other text, such as numbers above 99, raises an error.

  Returns:
    A Hugging Face fast tokenizer, which `save_pretrained` saves and
    `AutoTokenizer` loads.
  """
  return _tokenizer(list(map(str, range(MAX_NUMBER + 1))), r"[0-9]+|[^0-9]")


def character_tokenizer():
  """Makes a tokenizer of digits: ids 0..9, 10 "+", 11 "*", 12 "=".

  13 starts a prompt, 14 ends a response, 15 pads. Answers above 9 take
  several tokens.
  """
  return _tokenizer(list(map(str, range(10))), r"[\s\S]")


# Helpers.


def _chains(split: str, seed: int, num: int, holdout: float) -> list[str]:
  if split not in SPLITS:
    raise ValueError(f"split must be one of {SPLITS}, got {split!r}.")
  if not 0 <= holdout < 1:
    raise ValueError(f"holdout must lie in [0, 1), got {holdout}.")
  if num < 0 or seed < 0:
    raise ValueError(f"num and seed must be >= 0, got {num} and {seed}.")
  rng = np.random.default_rng([seed, SPLITS.index(split)])
  chains, num_rejected = [], 0
  while len(chains) < num:
    if num_rejected > 100_000:
      raise ValueError(
        f"holdout={holdout} leaves the split {split!r} without prompts."
      )
    num_rejected += 1
    expression = problem(rng)
    if _split_of(expression) != split:
      continue
    chain = work_out(expression, rng)
    if holdout:
      pair = sorted(map(int, chain.split("=")[-2].split("+")))
      is_held_out = _uniform_hash(f"pair {pair}") < holdout
      if is_held_out == (split == "train"):
        continue
    chains.append(chain)
    num_rejected = 0
  return chains


def _split_of(expression: str) -> str:
  place = _uniform_hash(f"split {expression}") * 16
  return "validation" if place < 1 else "test" if place < 2 else "train"


def _uniform_hash(text: str) -> float:
  """Hashes a text to a number in [0, 1)."""
  digest = hashlib.blake2b(text.encode(), digest_size=6).digest()
  return int.from_bytes(digest, "big") / 2**48


def _without_blanks(text: str) -> str:
  # Line feeds count inside a text, where removing them could join numbers of
  # different lines, but not at its ends.
  return text.strip().replace(" ", "").replace("\t", "")


def _error(links: Sequence[str]) -> tuple[float, int | float | None]:
  """Returns the error e of a chain, and s, the value of its first part."""
  try:
    truth, num_operators = evaluate(links[0])
  except ValueError:
    return ERROR_LIMIT, None
  if len(links) - 1 != num_operators or len(links) == 1:
    return ERROR_LIMIT, truth
  error = 0.0
  for i, link in enumerate(links[1:]):
    try:
      value, found = evaluate(link)
    except ValueError:
      return ERROR_LIMIT, truth
    if found != num_operators - i - 1:
      return ERROR_LIMIT, truth
    error += abs(truth - value)
  return min(error, ERROR_LIMIT), truth


# A recursive descent over a queue of lexemes. Each function removes the part
# it is named for, and returns its value and its number of operators.
#   sum     = product (("+" | "-") product)*
#   product = signed (("*" | "/") signed)*
#   signed  = "-" signed | power
#   power   = ("(" sum ")" | number) ["**" signed]


def _sum(lexemes: collections.deque, depth: int) -> tuple[int | float, int]:
  return _left_to_right(lexemes, depth, _product, "+-")


def _product(lexemes: collections.deque, depth: int) -> tuple[int | float, int]:
  return _left_to_right(lexemes, depth, _signed, "*/")


def _left_to_right(
  lexemes: collections.deque, depth: int, part: Callable, signs: str
) -> tuple[int | float, int]:
  value, num_operators = part(lexemes, depth)
  while lexemes and lexemes[0] in tuple(signs):
    sign = lexemes.popleft()
    right, found = part(lexemes, depth)
    value = _apply(sign, value, right)
    num_operators += found + 1
  return value, num_operators


def _signed(lexemes: collections.deque, depth: int) -> tuple[int | float, int]:
  if depth > _MAX_DEPTH:
    raise ValueError("The expression is nested too deeply.")
  if not lexemes or lexemes[0] != "-":
    return _power(lexemes, depth)
  lexemes.popleft()
  is_number = bool(lexemes) and lexemes[0][0].isdigit()
  value, num_operators = _signed(lexemes, depth + 1)
  # "-5" is a number. "--5", "-(5)" and "-5**2" apply an operator.
  is_number = is_number and num_operators == 0
  return -value, num_operators + (0 if is_number else 1)


def _power(lexemes: collections.deque, depth: int) -> tuple[int | float, int]:
  lexeme = lexemes.popleft() if lexemes else "the end"
  if lexeme == "(":
    value, num_operators = _sum(lexemes, depth + 1)
    if not lexemes or lexemes.popleft() != ")":
      raise ValueError("A bracket is not closed.")
  elif lexeme[0].isdigit():
    value, num_operators = float(lexeme) if "." in lexeme else int(lexeme), 0
    _check_value(value)
  else:
    raise ValueError(f"Expected a number, got {lexeme}.")
  if lexemes and lexemes[0] == "**":
    lexemes.popleft()
    exponent, found = _signed(lexemes, depth + 1)
    value = _apply("**", value, exponent)
    num_operators += found + 1
  return value, num_operators


def _apply(sign: str, left: int | float, right: int | float) -> int | float:
  if sign == "**" and abs(right) > _MAX_EXPONENT:
    raise ValueError(f"The exponent {right} is too large.")
  try:
    if sign == "+":
      value = left + right
    elif sign == "-":
      value = left - right
    elif sign == "*":
      value = left * right
    elif sign == "/":
      value = left / right
    else:
      value = left**right
  except ArithmeticError as error:  # Division by zero, overflow.
    raise ValueError(str(error)) from error
  _check_value(value)
  return value


def _check_value(value: int | float | complex) -> None:
  # A root of a negative number is complex.
  if isinstance(value, complex) or not abs(value) <= _MAX_VALUE:
    raise ValueError("The value is too large, or not a real number.")


def _tokenizer(numbers: Sequence[str], pattern: str):
  return tokenizers.of_words([*numbers, "+", "*", "="], pattern)
