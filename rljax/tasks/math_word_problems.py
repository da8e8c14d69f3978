r"""Word problems with a known answer: GSM8K, SVAMP, and problems of MATH.

  Question: Natalia sold clips to 48 of her friends in April, and then ...
  Answer:
  Natalia sold 48/2 = 24 clips in May.
  Natalia sold 48+24 = 72 clips altogether in April and May.
  #### 72

A response is right if its final answer equals the known one. Numbers are
compared exactly, by integer arithmetic; anything else (6\times 7, \sqrt{4}) by
math-verify, in worker processes with limits, because a model's expression may
take forever: 9^{9^{9^9}}. No text of a model is ever executed.

Sources:
  Cobbe et al. (2021), "Training Verifiers to Solve Math Word Problems": GSM8K.
  Patel, Bhattamishra and Goyal (2021), "Are NLP Models really able to Solve
  Simple Math Word Problems?": SVAMP.
  Hendrycks et al. (2021), "Measuring Mathematical Problem Solving With the
  MATH Dataset".
"""

import collections
import dataclasses
import fractions
import functools
import hashlib
import importlib.util
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
from absl import logging

from rljax.tasks import sandbox
from rljax.text import files

SPLITS = ("train", "validation", "test")
DATASETS = ("gsm8k", "svamp", "math")
TEMPLATE = "Question: {question}\nAnswer:\n"

# Names that the files of a folder may have; the first one is taken.
_FILES = {
  "gsm8k": ("gsm8k_{split}.jsonl", "{split}.jsonl"),
  "svamp": ("svamp.json", "SVAMP.json"),
  "math": ("math_test_short500.jsonl", "math_test.jsonl", "test.jsonl"),
}

# Bounds on untrusted text. References have at most 1200 characters, their
# answers at most 12.
_MAX_READ = 2**14  # Of a response: its end for the answer, its start for steps.
_MAX_ANSWER = 200
_MAX_DIGITS = 100
_MAX_EXPONENT = 100

# Of one verdict by math-verify, which usually takes 1 to 10 ms.
_SECONDS = 3.0
_MEMORY = 2**30
_NUM_WORKERS = 2
_CACHE_SIZE = 2**16

# Verdicts on the cost of an answer, not on the answer.
_UNVERIFIED = ("too_long", "timeout", "memory", "died", "error")


@dataclasses.dataclass(frozen=True)
class _Row:
  """Holds a problem of a data set: question, answer and solution."""

  question: str
  truth: str
  solution: str  # With calculator notes; empty if there is no reasoning.


@dataclasses.dataclass(frozen=True)
class _Problem:
  """Holds what is remembered of a prompt."""

  truth: str
  question: str
  turn: str  # What precedes the next question, if a model asks one.
  results: tuple[str, ...] | None  # Of the reference's calculator notes.


# Prompt -> problem, for all prompts of `prompts` and `supervised`.
_PROBLEMS: dict[str, _Problem] = {}


# Problems.


def prompts(
  split: str,
  seed: int,
  *,
  num: int | None = None,
  dataset: Literal["gsm8k", "svamp", "math"] = "gsm8k",
  data: str = "",
  template: str = TEMPLATE,
  shots: int = 0,
  notes: Literal["drop", "keep"] = "drop",
) -> list[str]:
  """Draws different prompts of a data set, shuffled by the seed.

  A smaller `num` gives the first of the same prompts. `score` only knows the
  answers of prompts that were drawn in this process.

  GSM8K and SVAMP keep a tenth of their training rows for validation: those
  whose questions have the lowest hashes. SVAMP is one file: the 30 % with the
  lowest hashes are its test split (300 of 1000), 70 rows are for validation and
  630 for training. MATH has only test rows.

  Args:
    split: "train", "validation" or "test".
    seed: of the order; >= 0.
    num: how many; None for all.
    dataset: "gsm8k", "svamp" or "math".
    data: a folder with gsm8k_train.jsonl, gsm8k_test.jsonl, svamp.json and
      math_test_short500.jsonl (those that are used); one such file, "{split}"
      in its name replaced; or "tfds:gsm8k".
    template: of a prompt, with "{question}" in it. A backslash and an n mean a
      line feed, for use in a flag.
    shots: worked examples of GSM8K's training split before the question, the
      same for all prompts, except that none is the prompt's own question.
    notes: see `supervised`; of the shots.

  Returns:
    `num` texts.

  Raises:
    ValueError: if an option is unknown, a file is missing or not as expected,
      there are fewer than `num` rows, the split may not be used so, or
      math-verify is not installed.
  """
  _require_math_verify()
  return [
    prompt
    for prompt, _ in _drawn(
      split, seed, num, dataset, data, template, shots, notes
    )
  ]


def supervised(
  split: str,
  seed: int,
  *,
  num: int | None = None,
  dataset: Literal["gsm8k", "svamp", "math"] = "gsm8k",
  data: str = "",
  template: str = TEMPLATE,
  shots: int = 0,
  notes: Literal["drop", "keep"] = "drop",
) -> list[tuple[str, str]]:
  """Draws the prompts of `prompts` with GSM8K's own solutions.

  Args:
    split: see `prompts`; likewise `seed`, `num`, `data`, `template`, `shots`.
    seed: see `prompts`.
    num: see `prompts`.
    dataset: "gsm8k"; the others have no reasoning to learn from.
    data: see `prompts`.
    template: see `prompts`.
    shots: see `prompts`.
    notes: "drop" removes calculator notes such as <<48/2=24>> from the
      solutions, "keep" leaves them in.

  Returns:
    `num` pairs (prompt, response); responses end in a line "#### 72".

  Raises:
    ValueError: as `prompts`; or if the data set has no solutions.
  """
  if dataset in ("svamp", "math"):
    reason = {
      "svamp": "it has answers, but no reasoning text",
      "math": "it is for evaluation only",
    }[dataset]
    raise ValueError(
      f'dataset="{dataset}" has nothing to learn from: {reason}; '
      'dataset="gsm8k" has.'
    )
  drawn = _drawn(split, seed, num, dataset, data, template, shots, notes)
  return [(prompt, _written(row, notes)) for prompt, row in drawn]


# Scores.


def score(
  prompt: str,
  response: str,
  *,
  extract: Literal["flexible", "strict"] = "flexible",
) -> tuple[float, dict[str, Any]]:
  r"""Scores 1 for the right final answer, else 0.

  How the answer is found: the first rule that finds its mark decides, even if
  nothing usable follows it (a truncated "#### " has no answer):
    "hashes": the line after the last "####"; the only rule of "strict". A
    heading ("#### Step 3: done") is not an answer; nor is a line other than a
    number if one of the next two marks follows it. "boxed": the braces of the
    last \boxed{...}. "answer_is": the sentence after the last "answer is" or
    "answer:", if it has a digit or a backslash. "number": the last word with a
    digit, if it is a plain number.
  Of several marks of a kind the last one counts. A reply that begins with the
  question is read from there on. One that asks the question again, or a next
  one (in the words before the template's question), is read up to there. Only
  the last 16384 characters are searched.

  How answers are compared: plain numbers are integers, decimals, a/b, mixed
  numbers, \frac{a}{b}, 0.\overline{6} and 1e3, of ASCII digits, compared as
  exact
  rationals: 1,560 is 1560, 156.0 is 156, 007 is 7, 1/2 is 0.5, but 0.333333 is
  not 1/3. Commas must stand between groups of three digits. A minus may be
  U+2212. Currency signs, units ("72 clips", "5 cm^2") and percent signs do not
  count: 50% is 50, and not 0.5. "3 million" is 3000000. Of several answers ("42
    or 43", "42, 43", "x=42, y=43") none is taken; nor is a number that words
    change ("minus 42", "not 42", "42 dozen"), or, where the truth is a number,
    a sum without its result ("48+24"). 1/0, nan and inf are not numbers, and 5!
    is an exclamation.

  Other expressions of at most 200 characters are compared by math-verify, with
  3 seconds and a gigabyte each, and are wrong if that is not enough. So are
  numbers where the truth is not a number (2^{10}); but a truth in words is
  compared as text, since math-verify takes a word for a product of letters.

  Args:
    prompt: one of `prompts`, drawn in this process.
    response: what the model wrote.
    extract: "flexible" for all rules, "strict" for only "####".

  Returns:
    1.0 or 0.0, and its parts:
      is_correct: bool.
      answer: str or None. Equal plain numbers have equal texts (a whole number,
        or a fraction in lowest terms such as "1/2"); what math-verify found
        equal to the truth has its text; other expressions are as written.
      truth: str, likewise.
      format: the rule that decided, or None.
      verdict: "exact" (by arithmetic), "verified" (by math-verify: equal or
        not), "none" (there is no usable answer), "too_long", "timeout",
        "memory", "died" or "error".
      has_answer: bool, whether there is an `answer`.
      is_unverified: bool, True for the last five verdicts.
      step_matches: for GSM8K, one bool per line of the response: whether a
        number after an equality sign in it is the result of a calculator note
        of the reference solution, each of which matches once.

  Raises:
    ValueError: if the prompt was never drawn, or the rule is unknown.
  """
  (value,), (parts,) = score_batch([prompt], [response], extract=extract)
  return value, parts


def score_batch(
  prompts: Sequence[str],
  responses: Sequence[str],
  *,
  extract: Literal["flexible", "strict"] = "flexible",
) -> tuple[list[float], list[dict[str, Any]]]:
  """Scores N responses, asking math-verify once for each different answer.

  Args:
    prompts: N texts.
    responses: N texts.
    extract: see `score`.

  Returns:
    N scores and N parts, see `score`.

  Raises:
    ValueError: as `score`.
  """
  if extract not in ("flexible", "strict"):
    raise ValueError(
      f'extract must be "flexible" or "strict", got {extract!r}.'
    )
  parts, unsettled = [], {}
  for prompt, response in zip(prompts, responses, strict=True):
    problem = _PROBLEMS.get(prompt)
    if problem is None:
      raise ValueError(
        "score only knows prompts that this process has drawn by `prompts` or "
        f"`supervised`, got {prompt[-60:]!r}."
      )
    found, rule, verdict = _read(response, problem, extract == "flexible")
    if verdict == "unsettled":
      unsettled.setdefault((problem.truth, found), []).append(len(parts))
    is_correct = verdict == "exact" and found == problem.truth
    part = {
      "is_correct": is_correct,
      "answer": found,
      "truth": problem.truth,
      "format": rule,
      "verdict": verdict,
      "has_answer": found is not None,
      "is_unverified": verdict == "too_long",
    }
    if problem.results is not None:
      part["step_matches"] = step_matches(problem.results, response)
    parts.append(part)
  if unsettled:
    verdicts = _verify_all(list(unsettled))
    for (truth, found), (verdict, is_equal) in verdicts.items():
      answer = truth if is_equal else found if verdict == "verified" else None
      for i in unsettled[truth, found]:
        parts[i].update(
          is_correct=is_equal,
          answer=answer,
          verdict=verdict,
          has_answer=answer is not None,
          is_unverified=verdict in _UNVERIFIED,
        )
    unverified = collections.Counter(
      part["verdict"] for part in parts if part["is_unverified"]
    )
    if unverified:
      logging.warning(
        "%d of %d answers could not be verified, and count as wrong: %s.",
        unverified.total(),
        len(parts),
        ", ".join(f"{n} {name}" for name, n in sorted(unverified.items())),
      )
  return [float(part["is_correct"]) for part in parts], parts


def step_matches(results: Iterable[str], response: str) -> list[bool]:
  """Finds the lines of a response with a reference's intermediate results.

  Args:
    results: of the reference, as `number` writes them. Each matches once.
    response: text; a line's results are the numbers after equality signs. Those
      in the first 16384 characters count.

  Returns:
    One bool per line.

  Source:
    Havrilla et al. (2024), "Teaching Large Language Models to Reason with
    Reinforcement Learning": the dense heuristic reward.
  """
  left = list(results)
  matches = [False] * (response.count("\n") + 1)
  for match in _RESULT.finditer(response, 0, _MAX_READ):
    result = number(match[1])
    if result in left:
      # Every result of a line is used up, also those that a later line repeats.
      left.remove(result)
      matches[response.count("\n", 0, match.start())] = True
  return matches


# Numbers.

_INTEGER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)"
_CURRENCY = r"[$£€¥₹]"
_PLAIN = re.compile(
  rf"""
  (?P<sign>[-+]?)\s*(?:{_CURRENCY}\s*(?P<minus>-?))?
  (?:
    (?:(?P<whole>{_INTEGER})\s+)?  # 1 1/2
    (?P<top>{_INTEGER})\s*/\s*(?P<bottom>{_INTEGER})
  |
    (?:(?P<latex_whole>{_INTEGER})\s*)?
    \\[dt]?frac\s*
    (?:\{{\s*(?P<latex_minus>-?)\s*(?P<latex_top>{_INTEGER})\s*\}}
      |(?P<short_top>[0-9]))\s*
    (?:\{{\s*(?P<latex_bottom>{_INTEGER})\s*\}}|(?P<short_bottom>[0-9]))
  |
    (?P<integer>{_INTEGER})?(?:\.(?P<decimals>[0-9]*))?
    (?:[eE](?P<exponent>[-+]?[0-9]{{1,3}}))?
  )
  (?P<unit>.*)
  """,
  re.VERBOSE | re.DOTALL,
)
_REPEATING = re.compile(
  r"(-?)([0-9]{1,30})\.([0-9]{0,30})\\overline\s*\{([0-9]{1,30})\}"
)
_PLAINEST = re.compile(r" ?\$?(-?[0-9]{1,15})[.,!]? ?")  # Nearly all there are.
# Bounded blanks: two unbounded runs next to each other take quadratic time.
_RESULT = re.compile(
  rf"=[ ]{{0,4}}([-−]?[ ]?(?:\\?{_CURRENCY})?[0-9.][0-9.,/]{{0,99}})"
)
_NOTE = re.compile(r"<<.*?>>")
_STYLED = re.compile(
  r"\\(?:text|textbf|textit|mathrm|mathbf|mbox|operatorname)\{([^{}]*)\}"
)
# Within a number: 1,\!560 and 1\,560.
_GROUPED = re.compile(r"(?<=,)\\!|\\!(?=,)|(?<=[0-9])\\,(?=[0-9]{3}(?![0-9]))")
_SPACE = re.compile(
  r"(?<!\\)\\[,:;!> ]|~"
  r"|\\(?:q?quad|en(?:space|skip)|(?:thin|med|thick)space)(?![A-Za-z])"
  r"|\\[hm]space\*?\s*\{[^{}]*\}"
)
_POWER = re.compile(r"(?<=[A-Za-z ])(?:\^\{?[23]\}?|[²³])")
_DEGREES = re.compile(r"\^\{?\\circ\}?|°")
_WORDS = re.compile(r"[A-Za-z][A-Za-z .,;:!?'/()-]*")
_MAGNITUDES = {
  "hundred": 100,
  "thousand": 10**3,
  "million": 10**6,
  "billion": 10**9,
  "trillion": 10**12,
}
# Words that change the meaning of the number before them,
_NO_UNITS = frozenset(
  ["or", "and", "to", "plus", "minus", "half", "pi", "factorial"]
  + ["dozen", "dozens"]
)
# if they directly follow it,
_CHANGES_BEHIND = (
  "half",
  "pi",
  "factorial",
  "squared",
  "cubed",
  "point",
  "dozens?",
  "halves",
  "thirds",
  "(?:ten|hundred|thousand|million|billion|trillion)ths?",
  *(f"{magnitude}s" for magnitude in _MAGNITUDES),
  "zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve",
  "(?:thir|four|fif|six|seven|eigh|nine)teen",
  "(?:twen|thir|for|fif|six|seven|eigh|nine)ty",
)
_CHANGED_BEHIND = re.compile(rf"(?:{'|'.join(_CHANGES_BEHIND)})", re.IGNORECASE)
# or of the number after them.
_CHANGES_BEFORE = frozenset(
  ["minus", "negative", "not", "never", "or", "point", *_MAGNITUDES]
  + ["half", "third", "quarter", "double", "triple", "twice"]
)
# What may directly follow a digit: 3x is not 3.
_ATTACHED = re.compile(
  "am|cm|ft|g|gb|h|hrs?|in|k[bgm]|km?ph|kmh|lbs?|[lms]|mb|mg|mi|mins?|ml|mm|mph|"
  "nd|oz|pm|rd|sec|sq|st|th|usd|yd"
)
_LETTERS = frozenset("aghlms")  # One-letter words: "5 a day", "5 m".


@functools.lru_cache(_CACHE_SIZE)
def number(text: str) -> str | None:
  """Writes a plain number in its one normal form: "72", "-3", "1/2".

  Args:
    text: a number, possibly with a currency sign, a unit or markup around it;
      see `score`.

  Returns:
    A whole number or a fraction in lowest terms; None if the text is not a
    number, or has more than 200 characters or 100 digits.
  """
  match = _PLAINEST.fullmatch(text)
  if match:
    return str(int(match[1]))
  if len(text) > _MAX_ANSWER:
    return None
  text = _bare(text)
  match = _REPEATING.fullmatch(text)
  if match:
    sign, whole, once, often = match.groups()
    value = fractions.Fraction(
      int(whole + once + often) - int(whole + once),
      10 ** len(once) * (10 ** len(often) - 1),
    )
    return str(-value if sign else value)
  match = _PLAIN.fullmatch(text)
  if not match:
    return None
  groups = match.groupdict("")
  factor = _factor(groups["unit"])
  value = _value(groups)
  if factor is None or value is None:
    return None
  return str(value * factor)


def _value(groups: dict[str, str]) -> fractions.Fraction | None:
  """Returns the number that `_PLAIN` has matched."""
  whole = groups["whole"] or groups["latex_whole"]
  top = groups["top"] or groups["latex_top"] or groups["short_top"]
  bottom = groups["bottom"] or groups["latex_bottom"] or groups["short_bottom"]
  integer, decimals = groups["integer"], groups["decimals"]
  if max(map(len, (whole, top, bottom, integer, decimals))) > _MAX_DIGITS:
    return None
  if bottom:
    denominator = _int(bottom)
    if not denominator:
      return None
    value = fractions.Fraction(_int(top), denominator)
    if groups["latex_minus"]:
      value = -value
    if whole:
      value += _int(whole)
  elif integer or decimals:
    exponent = int(groups["exponent"] or 0)
    if abs(exponent) > _MAX_EXPONENT:
      return None
    value = fractions.Fraction(_int(integer + decimals), 10 ** len(decimals))
    value *= fractions.Fraction(10) ** exponent
  else:
    return None
  is_negative = (groups["sign"] == "-") != (groups["minus"] == "-")
  return -value if is_negative else value


def _int(text: str) -> int:
  return int(text.replace(",", ""))


def _factor(unit: str) -> int | None:
  """Returns the factor that the text after a number means: 1 for units."""
  if not unit.strip(" .,;:!?"):
    return 1
  is_attached = unit[0].isalpha()
  for pattern, by in ((_STYLED, r" \1 "), (_DEGREES, " "), (_POWER, "")):
    unit = pattern.sub(by, unit)
  unit = re.sub(rf"\\?%|\\?{_CURRENCY}", " ", unit).strip(" .,;:!?()*")
  if not unit:
    return 1
  if not _WORDS.fullmatch(unit):
    return None
  words = re.findall("[a-z]+", unit.lower())
  if not _NO_UNITS.isdisjoint(words) or _CHANGED_BEHIND.fullmatch(words[0]):
    return None
  if not _MAGNITUDES.keys().isdisjoint(words[1:]):  # 42 hundred thousand.
    return None
  if len(words[0]) == 1 and words[0] not in _LETTERS:
    return None
  if is_attached and not _ATTACHED.fullmatch(words[0]):
    return None
  return _MAGNITUDES.get(words[0], 1)


def _bare(text: str) -> str:
  """Strips a text of at most 200 characters of its markup."""
  text = text.replace("−", "-").replace("{,}", ",")
  if "\\" in text or "~" in text:
    text = _GROUPED.sub("", text)
    text = _SPACE.sub(" ", text)
    if "\\begin" not in text:  # The rows of a matrix.
      text = text.replace("\\\\", " ")
  for old, new in (
    ("\\$", "$"),
    ("\\left", ""),
    ("\\right", ""),
  ):
    text = text.replace(old, new)
  for _ in range(4):
    before = text
    text = text.strip(" \t\r\n*_`\"'").lstrip("=:").rstrip(",;:!?.")
    for opening, closing in (
      ("$", "$"),
      ("\\(", "\\)"),
      ("\\[", "\\]"),
      ("(", ")"),
      ("{", "}"),
    ):
      inner = text[len(opening) : len(text) - len(closing)]
      if (
        len(text) > len(opening) + len(closing)
        and text.startswith(opening)
        and text.endswith(closing)
        and opening not in inner
        and closing not in inner
      ):
        text = inner
    styled = _STYLED.fullmatch(text)
    text = styled[1] if styled else text
    if text == before:
      break
  return text


# Where the answer stands.

_ANSWER_IS = re.compile(r"answer(?: is|:)", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.!?](?:\s|$)")
_BLANK = re.compile(r"\s")
_DIGIT = re.compile("[0-9]")
_OFFER = re.compile(r"\b(?:or|and)\b", re.IGNORECASE)
_OPERATORS = frozenset("+-−*/×÷")
_HEADING = re.compile(
  r"[\s*_]*(?:[0-9]{1,2}[.:)]\s+[*_]*[A-Za-z]"
  r"|(?:step|part|case|problem|question|method|example)\s*[0-9])",
  re.IGNORECASE,
)
# "x = 41, y = 42", "x = 41 or x = 42".
_SEVERAL = re.compile(
  r"\bor\b|=.*(?:[;&]|,(?![0-9]{3})|\band\b)", re.IGNORECASE
)
# Apart from letters: 48+24 and \frac{1}{2} + \frac{1}{2}.
_ARITHMETIC = re.compile(
  r"(?:\\(?:[dt]?frac|times|cdot|div)(?![A-Za-z])|[-+*/()0-9.,\s{}$%×÷])*"
)
_SUM = re.compile(r"[0-9.,)}$%]\s*[-+]")
_WORD_TRUTH = re.compile(r"[A-Za-z]{2,}(?:[ ,.']+[A-Za-z]+)*")
_ALTERNATIVES = frozenset(["or", "and", "&", "either", "maybe", "perhaps", ""])
_MATHEMATICS = re.compile(r"[-+*/^!|()\\×÷√π]")
_SPLIT_NUMBER = re.compile(r"[0-9][\s~]+[0-9]")
_PRODUCT = re.compile(r"(?<=[0-9)])\s*(?=\()")
# What changes the meaning of a number after it.
_CONTINUED = re.compile(
  r"\s*(?:[-+*/^×÷]|\\(?!text|mathrm|mbox|[\])%])"
  rf"|(?:{'|'.join(_CHANGES_BEHIND)})\b"
  rf"|(?:{'|'.join(_MAGNITUDES)})\s+(?:{'|'.join(_MAGNITUDES)})\b)",
  re.IGNORECASE,
)
_MAGNITUDE = re.compile(rf"\s+({'|'.join(_MAGNITUDES)})\b", re.IGNORECASE)


def _read(
  response: str, problem: _Problem, is_flexible: bool
) -> tuple[str | None, str | None, str]:
  """Returns the answer, the rule that found it, and the verdict so far.

  The verdict is "exact", "none" or "too_long"; or "unsettled" if math-verify
  must decide.
  """
  response = _without_echoes(response, problem)
  if problem.turn and problem.turn in response:
    response = f"\n{response}".partition(f"\n{problem.turn}")[0]
  found, rule, verdict = _found(response, problem.truth, is_flexible)
  if (
    verdict == "exact"
    and found != problem.truth
    and (
      number(problem.truth) is None and not _WORD_TRUTH.fullmatch(problem.truth)
    )
  ):
    verdict = "unsettled"  # 1024 may be 2^{10}.
  return found, rule, verdict


def _without_echoes(response: str, problem: _Problem) -> str:
  """Returns the reply between the question it repeats and the next one."""
  start = 0
  while True:
    place = response.find(problem.question, start)
    if place < 0:
      return response[start:]
    before = response[start:place].strip(" \t\r\n*_>\"'")
    if before not in ("", problem.turn):
      return response[start:place]
    start = place + len(problem.question)


def _found(
  response: str, truth: str, is_flexible: bool
) -> tuple[str | None, str | None, str]:
  """See `_read`."""
  tail = response[-_MAX_READ:]
  place = tail.rfind("####")
  if place >= 0:
    text = tail[place + 4 :].partition("\n")[0]
    if _PLAINEST.fullmatch(text):  # The most common case.
      return number(text), "hashes", "exact"
  box = answer_is = -1
  if is_flexible:
    box = tail.rfind("\\boxed")
    answer_is = max((m.end() for m in _ANSWER_IS.finditer(tail)), default=-1)
  while place >= 0:
    text = tail[place + 4 :].partition("\n")[0]
    is_heading = _HEADING.match(text) is not None or (
      max(box, answer_is) > place + 4 + len(text)
      and bool(text.strip())
      and number(text) is None
      and _result(text) is None
    )
    if not is_heading:
      return _settled(text, truth, "hashes")
    place = tail.rfind("####", 0, place)
  if not is_flexible:
    return None, None, "none"
  if box >= 0:
    return _settled(_braced(tail[box + 6 :]), truth, "boxed")
  if answer_is >= 0:
    text = tail[answer_is:].lstrip(" \t\n*_:").partition("\n")[0]
    text = _SENTENCE_END.split(text, maxsplit=1)[0]
    if _DIGIT.search(text) or "\\" in text:
      return _settled(text, truth, "answer_is")
  found, verdict = _last_number(tail)
  return found, "number" if verdict != "none" or found else None, verdict


def _settled(text: str, truth: str, rule: str) -> tuple[str | None, str, str]:
  """Reads what follows a mark."""
  text = text.strip()
  if len(text) > _MAX_ANSWER:
    return None, rule, "too_long"
  found = number(text)
  if found is not None:
    return found, rule, "exact"
  bare = " ".join(_bare(text).split())
  if bare == truth:
    return truth, rule, "exact"
  if "=" not in truth:  # y = 5 is not x = 5.
    found = _result(text) or _only_number(text)
    if found is not None:
      return found, rule, "exact"
  text = bare
  is_expression = bool(text) and text.count("{") == text.count("}")
  if is_expression and _WORD_TRUTH.fullmatch(truth):
    return text, rule, "exact"
  if number(truth) is not None:
    # math-verify reads "42 43" as a mixed number, 85, and prose as a product of
    # letters.
    is_expression = (
      is_expression
      and (_DIGIT.search(text) is not None or "\\" in text)
      and not _OFFER.search(text)
      and not _SEVERAL.search(text)
      and not _SPLIT_NUMBER.search(text)
      and not _is_changed(re.findall(r"[A-Za-z']+", text))
      and not _is_sum(text)
      and _MATHEMATICS.search(text) is not None
    )
  if not is_expression:
    return None, rule, "none"
  return text, rule, "unsettled"


def _result(text: str) -> str | None:
  """Returns the number after the last equality sign, if it stands alone."""
  before, sign, after = text.rpartition("=")
  if not sign or before.rstrip()[-1:] in tuple("<>!"):
    return None
  if _SEVERAL.search(before) or _is_changed(before.split()[-1:]):
    return None
  return number(after)


def _only_number(text: str) -> str | None:
  """Returns the number in a few words of prose, if there is only one."""
  words = text.split()
  places = [i for i, word in enumerate(words) if _DIGIT.search(word)]
  if len(places) != 1:
    return None
  before, after = words[: places[0]], words[places[0] :]
  if any(_MATHEMATICS.search(word) or "=" in word for word in before):
    return None
  if _is_changed(before):
    return None
  return number(" ".join(after))


def _is_changed(words: Iterable[str]) -> bool:
  """Tells whether words change the meaning of a number after them."""
  for word in words:
    word = word.strip(".,;:()*").lower()
    if word in _CHANGES_BEFORE or word.endswith(("n't", "n’t")):
      return True
  return False


def _is_sum(text: str) -> bool:
  """Tells whether a text is a sum of plain numbers without its result."""
  text = _STYLED.sub("", text.rpartition("=")[2])
  return bool(_SUM.search(text)) and _ARITHMETIC.fullmatch(text) is not None


def _braced(text: str) -> str:
  """Returns what is in the braces that begin a text; "" if they stay open."""
  text = text[: 2 * _MAX_ANSWER].lstrip()
  depth = 0
  for i, character in enumerate(text):
    depth += (character == "{") - (character == "}")
    if depth == 0:
      return text[1:i]  # Empty if the text does not begin with a brace.
  return text if len(text) > _MAX_ANSWER else ""


def _last_number(tail: str) -> tuple[str | None, str]:
  """Returns the last word with a digit if it is a number, and a verdict."""
  place = max(tail.rfind(digit) for digit in "0123456789")
  if place < 0:
    return None, "none"
  start = max(tail.rfind(blank, 0, place) for blank in " \n\t") + 1
  end = _BLANK.search(tail, place)
  end = end.start() if end else len(tail)
  word = tail[start:end]
  if len(word) > _MAX_ANSWER:
    return None, "too_long"
  after = tail[end : end + 40].partition("\n")[0]
  before = tail[max(0, start - _MAX_ANSWER) : start].rpartition("\n")[2].split()
  if before and before[-1] in _OPERATORS and "=" not in word:
    return None, "none"  # 10 - 3 has no result.
  # "half of 42", but not "half of 84 is 42"; nor is a heading an answer.
  near = before[-2:] if before and before[-1].lower() == "of" else before[-1:]
  if _is_changed(near) or (before and before[0].startswith("####")):
    return None, "none"
  if _CONTINUED.match(after):
    return None, "none"
  magnitude = _MAGNITUDE.match(after)
  if magnitude:
    word = f"{word} {magnitude[1]}"
  elif before and "/" in word and before[-1].isdecimal():
    word = f"{before.pop()} {word}"  # 1 1/2
  if _is_offered(before):
    return None, "none"
  found = number(word) or _result(word)
  return found, "none" if found is None else "exact"


def _is_offered(before: Sequence[str]) -> bool:
  """Tells whether the words before a number offer several answers."""
  between = []
  for word in reversed(before):
    if _DIGIT.search(word):
      break
    between.append(word.strip(".,;:()").lower())
  else:
    return False
  if between:
    return "or" in between or all(word in _ALTERNATIVES for word in between)
  # "42, 43", but not "Step 2: 43".
  return word[-1] == "," or word[-1].isdecimal()


# math-verify.

# (truth, text) -> verdict, and whether they are equal. A text that took too
# long is not tried again, as policies repeat themselves.
_VERDICTS: dict[tuple[str, str], tuple[str, bool]] = {}


def _verify_all(
  pairs: list[tuple[str, str]],
) -> dict[tuple[str, str], tuple[str, bool]]:
  """Returns the verdicts on pairs of a true answer and an expression."""
  new = [pair for pair in pairs if pair not in _VERDICTS]
  if len(_VERDICTS) + len(new) > _CACHE_SIZE:
    _VERDICTS.clear()
    new = pairs
  outcomes = _pool().map(new) if new else []
  for pair, outcome in zip(new, outcomes, strict=True):
    if outcome.failure is None:
      verdict = "none" if outcome.value is None else "verified"
      _VERDICTS[pair] = verdict, bool(outcome.value)
    else:
      _VERDICTS[pair] = outcome.failure.partition(":")[0], False
  return {pair: _VERDICTS[pair] for pair in pairs}


@functools.cache
def _pool() -> sandbox.Pool:
  _require_math_verify()
  return sandbox.Pool(
    f"{__name__}:_verify",
    setup=f"{__name__}:_warm_up",
    timeout=_SECONDS,
    num_workers=_NUM_WORKERS,
    max_memory_bytes=_MEMORY,
  )


def _require_math_verify() -> None:
  if importlib.util.find_spec("math_verify") is None:
    raise ValueError(
      "Answers other than plain numbers are compared by math-verify, which is "
      "not installed: pip install math-verify."
    )


# In a worker.


def _warm_up() -> None:
  """Imports and builds what the first verdict needs."""
  # The pool sets the time limit; math-verify would warn that there is none.
  import logging as standard_logging

  standard_logging.getLogger("math_verify").setLevel(standard_logging.ERROR)
  _verify("1/2", r"\frac{\sqrt{4}}{4}")


def _verify(truth: str, text: str) -> bool | None:
  """Tells whether an expression equals the truth; None if it is not one."""
  import math_verify
  import sympy

  expression = _parsed(text)
  if not expression or expression[0].has(sympy.zoo, sympy.nan):  # 1/0, 0/0.
    return None
  return math_verify.verify(_parsed(truth), expression, timeout_seconds=None)


def _parsed(text: str) -> list[Any]:
  """Returns at most one sympy expression."""
  import math_verify

  # Its reader of plain expressions evaluates them in Python; that of LaTeX has
  # a grammar. Without the dot, 6(7) would be a mixed number.
  text = _PRODUCT.sub(r"\\cdot ", text)
  return math_verify.parse(
    rf"\boxed{{{text}}}",
    extraction_config=[
      math_verify.LatexExtractionConfig(boxed_match_priority=0)
    ],
    fallback_mode="no_fallback",
    parsing_timeout=None,
  )


# Data.


def _drawn(
  split: str,
  seed: int,
  num: int | None,
  dataset: str,
  data: str,
  template: str,
  shots: int,
  notes: str,
) -> list[tuple[str, _Row]]:
  """Returns prompts with their rows, and remembers the prompts."""
  if notes not in ("drop", "keep"):
    raise ValueError(f'notes must be "drop" or "keep", got {notes!r}.')
  if seed < 0 or shots < 0 or (num or 0) < 0:
    raise ValueError(
      f"seed, shots and num must be >= 0, got {seed}, {shots} and {num}."
    )
  template = template.replace("\\n", "\n")
  if template.count("{question}") != 1:
    raise ValueError(f'template needs "{{question}}" once, got {template!r}.')
  rows = _rows_of_split(split, dataset, data)
  if num is not None and num > len(rows):
    raise ValueError(
      f"The {split} split of {dataset} has {len(rows)} prompts, but {num} were "
      "asked for."
    )
  examples = _examples(shots, data)
  turn = template.partition("{question}")[0].strip().rpartition("\n")[2]
  rng = np.random.default_rng([seed, SPLITS.index(split)])
  drawn = []
  for i in rng.permutation(len(rows))[:num]:
    row = rows[i]
    shown = [e for e in examples if e.question != row.question][:shots]
    prompt = "".join(
      f"{template.replace('{question}', e.question)}{_written(e, notes)}\n\n"
      for e in shown
    ) + template.replace("{question}", row.question)
    _remember(
      prompt,
      _Problem(
        row.truth,
        row.question,
        turn,
        _results(row.solution) if dataset == "gsm8k" else None,
      ),
    )
    drawn.append((prompt, row))
  return drawn


def _examples(shots: int, data: str) -> list[_Row]:
  """Returns rows to show, with a spare one to replace one that is asked."""
  if not shots:
    return []
  examples = _rows_of_split("train", "gsm8k", data)[: shots + 1]
  if len(examples) <= shots:
    raise ValueError(
      f"shots={shots} needs {shots + 1} training rows of gsm8k, but there are "
      f"{len(examples)}."
    )
  return examples


def _remember(prompt: str, problem: _Problem) -> None:
  known = _PROBLEMS.setdefault(prompt, problem)
  if known.truth != problem.truth:
    raise ValueError(
      f"The prompt {prompt[-60:]!r} has two answers: {known.truth} and "
      f"{problem.truth}."
    )
  # Of several solutions of one problem, the latest draw counts.
  _PROBLEMS[prompt] = problem


def _rows_of_split(split: str, dataset: str, data: str) -> list[_Row]:
  if split not in SPLITS:
    raise ValueError(
      f"The task math_word_problems has the splits {', '.join(SPLITS)}, got "
      f"{split!r}."
    )
  if dataset not in DATASETS:
    raise ValueError(
      f"dataset must be one of {', '.join(DATASETS)}, got {dataset!r}."
    )
  if dataset == "math" and split != "test":
    raise ValueError(
      'dataset="math" is for evaluation only: its rows are of the test split, '
      f"got {split!r}."
    )
  if not data:
    raise ValueError(
      "data is missing: give the folder with gsm8k_train.jsonl and the other "
      'files, or "tfds:gsm8k".'
    )
  if dataset == "math" or (dataset == "gsm8k" and split == "test"):
    return list(_rows(dataset, str(data), "test"))
  rows = sorted(_rows(dataset, str(data), "train"), key=_hash)
  if dataset == "svamp":
    num_test = len(rows) * 3 // 10
    if split == "test":
      return rows[:num_test]
    rows = rows[num_test:]
  num_validation = len(rows) // 10
  if split == "validation":
    return rows[:num_validation]
  return rows[num_validation:]


def _hash(row: _Row) -> bytes:
  return hashlib.sha256(row.question.encode()).digest()


@functools.lru_cache(8)
def _rows(dataset: str, data: str, split: str) -> tuple[_Row, ...]:
  """Returns the rows of a file, read once."""
  path = pathlib.Path(data)
  name = data
  if path.is_dir():
    names = [name.format(split=split) for name in _FILES[dataset]]
    names += [f"{name}.gz" for name in names]
    found = [name for name in names if (path / name).is_file()]
    if not found:
      raise ValueError(
        f"{path}: no file of {dataset} (looked for {', '.join(names)})."
      )
    name = str(path / found[0])
  read, fields = {
    "gsm8k": (_gsm8k_row, ("question", "answer")),
    "svamp": (_svamp_row, ("Body", "Question", "Answer")),
    "math": (_math_row, ("problem", "solution")),
  }[dataset]
  rows = []
  for i, row in enumerate(files.load_rows(name, split, required=fields)):
    try:
      rows.append(read(row))
    except (AttributeError, TypeError, ValueError) as error:
      raise ValueError(f"{name}, row {i + 1}: {error}") from error
  return tuple(rows)


def _gsm8k_row(row: dict[str, Any]) -> _Row:
  solution, mark, answer = row["answer"].rpartition("####")
  truth = number(answer.strip())
  if not mark or truth is None:
    raise ValueError(f'expected "#### <number>", got {row["answer"][-60:]!r}.')
  return _Row(row["question"].strip(), truth, row["answer"].strip())


def _svamp_row(row: dict[str, Any]) -> _Row:
  truth = number(str(row["Answer"]))
  if truth is None:
    raise ValueError(f"Answer must be a number, got {row['Answer']!r}.")
  question = f"{row['Body'].strip()} {row['Question'].strip()}"
  return _Row(question, truth, "")


def _math_row(row: dict[str, Any]) -> _Row:
  answer = row.get("answer")
  if answer is None:
    _, mark, rest = row["solution"].rpartition("\\boxed")
    answer = _braced(rest) if mark else ""
  truth = number(answer) or " ".join(_bare(answer).split())
  if not truth:
    raise ValueError(f"no answer in {row['solution'][-60:]!r}.")
  return _Row(row["problem"].strip(), truth, row["solution"])


def _written(row: _Row, notes: str) -> str:
  """Writes the solution of a row as a response."""
  return _NOTE.sub("", row.solution) if notes == "drop" else row.solution


@functools.lru_cache(_CACHE_SIZE)
def _results(solution: str) -> tuple[str, ...]:
  """Returns the results of a solution's calculator notes, in order."""
  found = (
    number(note[2:-2].rpartition("=")[2]) for note in _NOTE.findall(solution)
  )
  return tuple(result for result in found if result is not None)
