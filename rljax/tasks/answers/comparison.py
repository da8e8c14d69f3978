r"""Compares an extracted answer with the true one.

Plain numbers and equal texts are settled here, by exact arithmetic. What
remains is parsed by math-verify and compared by sympy in worker processes with
limits, because an expression may take forever: 9^{9^{9^9}}.
"""

import functools
import importlib.util
import re

from rljax.tasks import sandbox
from rljax.tasks.answers import (
  clauses,
  expressions,
  extraction,
  normalisation,
  numbers,
  words,
)

# Of one verdict by math-verify, which usually takes 1 to 10 ms.
_SECONDS = 3.0
_MEMORY = 2**30
_NUM_WORKERS = 2
_CACHE_SIZE = 2**16

_PROSE = ("hashes", "tag", "answer_is")
_CLOCK = re.compile(r"[0-9]+(?:\s*:\s*[0-9]+)+")
_BEGINS = re.compile(r"[\W_]*[0-9]")
_DIGIT = re.compile("[0-9]")
_LETTERS = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
_MATHEMATICS = re.compile(r"[=^*/+<>|{}_\\]")
_CHOICE = re.compile(r"\(?([A-Z])(?:[).:](?:\s.*)?)?", re.DOTALL)
_COMMANDS = (
  "frac|sqrt|times|cdot|div|binom|lfloor|rfloor|lceil|rceil|pi|log|ln|sin|cos|tan"
  "|pm|cdots|overline|bar|exp|gcd|max|min|lvert|rvert|left|right|infty"
)
# What a number may be written as, besides a number.
_ARITHMETIC = re.compile(
  rf"(?:\\(?:{_COMMANDS})(?![A-Za-z])|[-+*/^!|()\[\]{{}}0-9.\s]|(?<![A-Za-z])e"
  r"(?![A-Za-z])|\\[{}]|,)*"
)
_VARIABLE = re.compile(r"(?<![\\A-Za-z])[A-Za-z](?![A-Za-z])|[=,]")
_OPERATION = re.compile(r"[-+*/^!|()\\]")
_SUM = re.compile(r"[0-9.)}%]\s*[-+]")
_PLAIN_ARITHMETIC = re.compile(
  r"(?:\\(?:frac|times|cdot|div)(?![A-Za-z])|[-+*/()0-9.,\s{}])*"
)
_IN_BASE = re.compile(r"[\s(]*(?:in )?base[ -]+([0-9]+)[\s)]*", re.I)
# It falls on a Monday; at (1, 2).
_PLACED = re.compile(
  r"(?:(?:it|this|that|he|she) (?:is|was|falls|fell|lands|occurs|happens|takes"
  r" place|will be|would be|must be) )?(?:(?:on|in|at) )?(?:an? |the )?",
  re.IGNORECASE,
)
_SPLIT_NUMBER = re.compile(r"[0-9][\s~]+[0-9]")
_LEFT_SIDE = re.compile(r"^[^=<>]*[^=<>!:]=(?!=)")
_WORDS_ALONE = re.compile(r"[A-Za-z']+(?: [A-Za-z']+){2,}")
# The unit of 18\pi \text{ cm}^2, but not 7 \text{ p.m.}
_TEXT_UNIT = re.compile(
  r"(?<=[0-9}i])(?:\s|\\[ ,;:]|~)*\\(?:text|mathrm|mbox|textrm)\s*"
  r"\{\s*(?![ap]\.?\s?m\b)[A-Za-z][A-Za-z ./]*\}"
  r"\s*(?:\^\s*\{?\s*[23]\s*\}?)?[\s.$]*$"
)
_UNIT = re.compile(
  r"(?<=[0-9)}\s])\s*[A-Za-z][A-Za-z .]*$"
  r"|\s*(?:[cdkm]?m|ft|in|yd)\s*\^\s*\{?[23]\}?$"
)


def true_answer(text: str) -> str:
  r"""Writes the answer of a data set in the form that others are compared to.

  | gold                        | becomes     |
  |-----------------------------|-------------|
  | 1,000  $18  10\%  90^\circ  | 1000, 18, 10, 90 |
  | \frac{6}{8}  2\frac12       | 3/4, 5/2    |
  | 72\text{ cm}                | 72          |
  | \text{(C)}  \text{June 20}  | C, June 20  |
  | x=5  (1,2)  2516_8  12:00   | as it is, without markup for looks |
  """
  text = _TEXT_UNIT.sub("", text)
  bare = " ".join(normalisation.normalise(text).split())
  begins = re.match(r"[-+(\s$£€\\]*(?:frac)?[{\s-]*[0-9.]", bare)
  if begins and not re.search("[=!]", bare) and not words.has_number_word(bare):
    value = numbers.number(text)
    if value is not None:
      return value
  choice = _CHOICE.fullmatch(bare) if len(bare) <= 3 else None
  return choice[1] if choice else bare


def is_word(truth: str) -> bool:
  """Tells whether a true answer is compared as text: Evelyn, June 20, 12:00."""
  if _LETTERS.search(truth):
    return _MATHEMATICS.search(truth) is None
  return (
    re.fullmatch(r"[A-Za-z]", truth) is not None
    or re.search(r"[0-9]\s*:\s*[0-9]", truth) is not None
    or re.fullmatch(r"[-0-9A-Fa-f.]+\s*_\s*\{?\s*[0-9]+\s*\}?", truth)
    is not None
  )


@functools.lru_cache(_CACHE_SIZE)
def compare(truth: str, text: str | None, rule: str) -> tuple[str | None, str]:
  r"""Compares an answer with the truth, as far as arithmetic goes.

  | truth                   | a right answer           | a wrong one         |
  |-------------------------|--------------------------|---------------------|
  | a number: 1/3           | means it exactly: 2/6    | 0.333               |
  | a number: 42            | is worked out to it: 6*7 | 48-6, an open sum   |
  | a word: Evelyn, June 20 | has its letters: evelyn  | July 20             |
  | a letter: C             | C, (C), (C) 42           | c                   |
  | time, ratio, base: 12_5 | 12_{5}, 12 in base 5     | 7                   |
  | an expression: \sqrt{8} | is equal by proof        | 2.828               |
  | a pair or matrix: (1,2) | has its parts in order   | (2,1)               |
  | an interval: [0,1)      | 0 \le x < 1              | (0,1)               |
  | a list: 1,2 or \{1,2\}  | has its parts: 2,1       | 1                   |
  | an equation: x+y=3      | is a multiple: 2x+2y=6   | x+y                 |

  The last five, and 6*7, are for `verify_all`.

  Args:
    truth: of `true_answer`.
    text: an extract.
    rule: what extracted it.

  Returns:
    The answer, and its verdict: "exact", "none" or "too_long"; or "unsettled"
    if `verify_all` must decide. An answer that is equal to the truth has its
    text.
  """
  if text is None:
    return None, "none"
  if len(text) > numbers.MAX_ANSWER:
    text = _beginning(text, rule)
    if text is None:
      return None, "too_long"
  if numbers.number(truth) == truth:
    return _compare_number(text, rule)
  bare = " ".join(normalisation.normalise(_TEXT_UNIT.sub("", text)).split())
  if not bare:
    return None, "none"
  if rule in ("line", "answer_is") and not _PLACED.match(truth)[0]:
    bare = normalisation.normalise(bare[_PLACED.match(bare).end() :])
  if is_word(truth):
    return _compare_word(truth, bare.rstrip("!"))
  if bare == truth or "".join(bare.split()) == "".join(truth.split()):
    return truth, "exact"
  if bare.count("{") != bare.count("}"):
    return None, "none"
  value = numbers.number(text)
  if value is not None and not _VARIABLE.search(truth + bare):
    return value, "unsettled"  # 1 million is 10^6.
  if rule == "line" and _WORDS_ALONE.fullmatch(bare):
    return None, "none"
  if rule in _PROSE or re.search("[a-z]{4}$", bare):
    bare = _without_unit(bare.replace("$", " "))
  if rule in (*_PROSE, "line", "number") and not _is_expression(bare):
    return None, "none"
  return bare, "unsettled"


def _is_expression(text: str) -> bool:
  """Tells whether a text is mathematics rather than prose."""
  return not re.search(r"(?<![\\A-Za-z])[A-Za-z]{4,}", text)


def _beginning(text: str, rule: str) -> str | None:
  """Cuts a long line of words behind its answer; None if it says more."""
  end = text.rfind(" ", 0, numbers.MAX_ANSWER)
  if rule not in _PROSE or end < 0:
    return None
  rest = text[end : end + extraction.MAX_READ]
  if re.search(r"[0-9\\=]", rest) or words.has_number_word(rest):
    return None
  return None if words.REFUSED.search(rest) else text[:end]


def _compare_number(text: str, rule: str) -> tuple[str | None, str]:
  """Reads a number, or an expression that has one value."""
  if rule == "boxed" and text.rstrip(" .$").endswith("!"):
    return None, "none"  # A factorial.
  value = numbers.number(text)
  if value is None and rule in _PROSE and len(text.split()) > 4:
    clause = clauses.last_clause(text)
    value = None if clause is None else numbers.number(clause)
    if value is not None and "=" not in text and _BEGINS.match(text):
      first = numbers.literals.quantities(numbers.plain(text))[0]
      value = value if str(first.value) == value else None
  if value is not None:
    return value, "exact"
  bare = normalisation.normalise(text)
  bare = _LEFT_SIDE.sub("", bare).strip() if "=" in bare else bare
  bare = _without_unit(bare)
  if (
    not _DIGIT.search(bare)
    and "\\pi" not in bare
    or not _ARITHMETIC.fullmatch(bare)
    or not _OPERATION.search(bare)
    or bare.count("{") != bare.count("}")
    or ("," in bare and not bare.startswith("\\{"))
    or _SPLIT_NUMBER.search(bare)
    or (_SUM.search(bare) and _PLAIN_ARITHMETIC.fullmatch(bare))
    or rule == "number"
  ):
    return None, "none"
  return bare, "unsettled"


def _without_unit(text: str) -> str:
  """Strips the words behind an expression, unless they change it."""
  unit = _UNIT.search(text)
  if not unit or (
    words.REFUSED.search(unit[0])
    or words.CHANGES_NEXT.match(unit[0])
    or words.CHANGES_BEHIND.search(unit[0])
    or words.has_number_word(unit[0])
    or len(unit[0].strip()) < 2
  ):
    return text
  return text[: unit.start()].strip()


def _compare_word(truth: str, text: str) -> tuple[str, str]:
  """Compares texts, whose words may differ in case."""
  if re.fullmatch(r"[A-Z]", truth):
    choice = _CHOICE.fullmatch(text)
    return (choice[1] if choice else text), "exact"
  if "_" in truth:
    text = _IN_BASE.sub(r"_\1", words.with_digits(text))
  elif ":" in truth:
    around = _CLOCK.split(text)
    if len(around) == 2 and not (
      _DIGIT.search("".join(around))
      or words.REFUSED.search(text)
      or words.CHANGES_BEFORE.search(around[0])
      or words.CHANGES_BEHIND.search(around[1])
    ):
      text = text[len(around[0]) : len(text) - len(around[1])]  # At 9:30.
    text = re.sub(r"(?<=[0-9]) to (?=[0-9])", ":", text)
  plain, known = (
    "".join(re.sub("[{}()]" if "_" in truth else "[{}]", "", t).split())
    for t in (text, truth)
  )
  is_shouted = truth.isupper() or len(truth) == 1
  if plain == known or (
    not is_shouted
    and " ".join(text.split()).casefold() == " ".join(truth.split()).casefold()
  ):
    return truth, "exact"
  return text, "exact"


# math-verify.

# (truth, text) -> verdict, and whether they are equal. A text that took too
# long is not tried again, as policies repeat themselves.
_VERDICTS: dict[tuple[str, str], tuple[str, bool]] = {}


def verify_all(
  pairs: list[tuple[str, str]],
) -> dict[tuple[str, str], tuple[str, bool]]:
  """Returns the verdicts on pairs of a true answer and an expression.

  Towers of powers and the like are timeouts without a try.
  """
  new = [pair for pair in pairs if pair not in _VERDICTS]
  if len(_VERDICTS) + len(new) > _CACHE_SIZE:
    _VERDICTS.clear()
    new = pairs
  for pair in new:
    if expressions.is_costly(pair[1]):
      _VERDICTS[pair] = "timeout", False
  new = [pair for pair in new if pair not in _VERDICTS]
  outcomes = pool().map(new) if new else []
  for pair, outcome in zip(new, outcomes, strict=True):
    if outcome.failure is None:
      verdict = "none" if outcome.value is None else "verified"
      _VERDICTS[pair] = verdict, bool(outcome.value)
    else:
      _VERDICTS[pair] = outcome.failure.partition(":")[0], False
  return {pair: _VERDICTS[pair] for pair in pairs}


@functools.cache
def pool() -> sandbox.Pool:
  """Returns the worker processes, which start at the first use."""
  require_math_verify()
  return sandbox.Pool(
    "rljax.tasks.answers.expressions:verify",
    setup="rljax.tasks.answers.expressions:warm_up",
    timeout=_SECONDS,
    num_workers=_NUM_WORKERS,
    max_memory_bytes=_MEMORY,
  )


def require_math_verify() -> None:
  """Raises ValueError unless math-verify is installed."""
  if importlib.util.find_spec("math_verify") is None:
    raise ValueError(
      "Answers other than plain numbers are compared by math-verify, which is "
      "not installed: pip install math-verify."
    )
