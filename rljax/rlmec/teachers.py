"""Rewrites of wrong solutions without a large model: from the gold solution.

Calculations in plain text, such as GSM8K's, are read as exact fractions,
recomputed and carried into what follows. So a rewrite can keep what is right in
a sample, and a right solution can be made wrong in a known place. Text of a
model is parsed with bounds, and never executed.

Source:
  Chen et al. (2024), "Improving Large Language Models via Fine-grained
  Reinforcement Learning with Minimum Editing Constraint", whose teacher is a
  large language model. This substitute is ours.
"""

import collections
import dataclasses
import fractions
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from rljax.rlmec import prompts
from rljax.text import alignment
from rljax.text import steps as steps_lib

_MAX_READ = 2**14  # Characters of a sample that are compared with the gold.
_MAX_KEPT = 16  # Most steps that are given up in search of fewer edits.
_MAX_TRIES = 64  # Numbers that `corrupted` tries to change, and the last.
_MAX_DECIMALS = 4  # Of a number that is written down.


def last_result(step: str) -> fractions.Fraction | None:
  """Returns the number after the last equality sign of a step, or None."""
  step = step[:_MAX_READ]
  found = collections.deque(_RESULT.finditer(step), maxlen=1)
  if not found:
    return None
  before, after, number = found[0].groups()  # Signs around the currency.
  return -_value(number) if before or after else _value(number)


def from_gold(
  gold_steps: Sequence[str],
  response_steps: Sequence[str],
  *,
  result_of: Callable[[str], Any] = last_result,
) -> tuple[int, str]:
  """Makes a right solution with few edits of a sample and the gold one.

  A step of the sample stands if its own calculations are right and its result
  is one of the gold's intermediate results, each of which counts once, in any
  order; steps without a result stand if one with a result follows, right or
  wrong. The first step that does not stand, or that states the answer, ends the
  kept part. Arithmetic is plain, and may be rounded: a task with another
  arithmetic, such as sums modulo 100, has its own rewrites. The result is that
  of these texts with the fewest edits (of words, numbers and signs):

    Splice: the steps that stand, or fewer of them, then the gold's steps after
      the last one that they match, and those before it that are needed for
      them. Without any step kept this is the gold solution.
    Repair: the sample's own solution, with every wrong calculation worked out
      and its result carried into all that follows. It counts only if it ends in
      the gold's answer; the method may differ from the gold's.
    Graft: the steps that stand, then the sample's sentences with the gold's
      calculations in them, if there are as many. A word such as "more" may
      then be left over from the sample, so that two of its edits count for
      three.

  All of them end with the gold's last step, which states the answer.

  Args:
    gold_steps: see `steps.steps`; the last one states the answer.
    response_steps: of a wrong sample, likewise. If they have 16384 characters
      or more, none stands.
    result_of: maps the text of a step to its result, in whatever form, or to
      None if it has none; a step that states the answer has none.

  Returns:
    Index of the first step that the rewrite changes, and the rewrite, which
    begins with the steps before it. The index is -1 if all steps stay and
    others are missing after them.

  Raises:
    ValueError: if there is no gold step.
  """
  gold, sample = list(gold_steps), list(response_steps)
  if not gold:
    raise ValueError("gold_steps must have at least one step, the answer.")
  if sum(map(len, sample)) > _MAX_READ:
    return 0, "".join(gold)
  work = list(
    itertools.takewhile(lambda step: not _is_answer(step, gold[-1]), sample)
  )
  matched = _standing(gold, work, result_of)
  num_standing = len(matched) - 1
  candidates = []
  repaired = _carried(work, {}, repair=True)
  if repaired:
    reached = [last_result(step) for step in repaired]
    reached = [result for result in reached if result is not None]
    if reached and reached[-1] == _answer(gold[-1]):
      candidates.append([*_ended(repaired, sample, gold), gold[-1]])
  # A step may have one of the gold's results by chance, and be wrong: if
  # keeping fewer steps makes fewer edits, they were not worth keeping.
  for kept in range(num_standing, -1, -1):
    if kept == 0 or kept > num_standing - _MAX_KEPT:
      rest = _rest_of_gold(gold, matched[kept], result_of)
      candidates.append([*_ended(work[:kept], sample, gold), *rest])
  costs = [2 * cost for cost in _num_edits(sample, candidates)]
  rest = _rest_of_gold(gold, matched[-1], result_of)
  grafted = _grafted(work[num_standing:], rest)
  if grafted:
    head = [*work[:num_standing], *grafted]
    candidates.append([*_ended(head, sample, gold), rest[-1]])
    # Fitting words are worth some edits.
    costs += [3 * cost for cost in _num_edits(sample, candidates[-1:])]
  best = candidates[int(np.argmin(costs))]
  return prompts.first_changed_step(sample, best), "".join(best)


def splice_with(
  result_of: Callable[[str], Any] = last_result, step_ends: str = "\n"
) -> prompts.Teacher:
  """Returns a teacher that rewrites by `from_gold`.

  Args:
    result_of: see `from_gold`.
    step_ends: characters that end a step.
  """

  def teacher(question: str, gold: str, wrong: str) -> str:
    del question
    _, rewrite = from_gold(
      steps_lib.steps(gold, step_ends),
      steps_lib.steps(wrong, step_ends),
      result_of=result_of,
    )
    return rewrite

  return teacher


def corrupted(gold: str, rng: np.random.Generator) -> str | None:
  """Makes a wrong solution whose minimum-edit rewrite is the gold one.

  One number of the gold solution, an operand or a result of a calculation, gets
  another digit, and the change is carried into its later uses: these are
  recomputed. Where every such change may be confused with other numbers, or
  leaves the answer right, the answer gets another digit. So rewrites and wrong
  tokens are known without any teacher.

  Args:
    gold: a right solution that ends with its answer, such as one of GSM8K.
      Calculations are those of plain arithmetic; where none can be read, any
      number is changed wherever it stands.
    rng: of the draw.

  Returns:
    The wrong text, whose last number is another than the gold's; None if there
    is no number to change, or the text has more than 16384 characters.
  """
  places = _places(gold) if len(gold) <= _MAX_READ else []
  answer = _answer(gold)
  if not places:
    return None
  # Many changes cannot be carried. That of the answer always can, so it is
  # tried last, or it would be chosen too often.
  order = [*rng.permutation(len(places) - 1)[:_MAX_TRIES], len(places) - 1]
  for place in order:
    text = _with_other_number(gold, places[place], rng)
    if text is not None and _answer(text) not in (answer, None):
      return text
  return None


# Numbers and calculations. All repetitions are bounded, and numbers are taken
# whole or not at all, so that time is in proportion to the text.

_NUMBER = (
  r"(?:[0-9]{1,30}+(?:,[0-9]{3}(?![0-9])){0,9}+(?:\.[0-9]{1,20}+)?"
  r"|\.[0-9]{1,20}+)(?![0-9])"
)
_ALONE = re.compile(rf"(?<![0-9])(?<![0-9][.,]){_NUMBER}")
_UNIT = r"(?: [A-Za-z]{2,15}){0,3}"
_OPERAND = rf"\({{0,3}}+ ?-?\$?{_NUMBER}%?{_UNIT}\){{0,3}}+"
_OPERATOR = r" ?[-+*/×÷−x] ?"
# "48/2 = 24*3" has a calculation after the sign, not a result.
_NO_RESULT = r"(?! ?[-+*/×÷−=x] ?[$(.0-9])"
_EQUATION = re.compile(
  rf"(?<![0-9])(?<![0-9][.,])(?P<left>{_OPERAND}"
  rf"(?:{_OPERATOR}{_OPERAND}){{1,12}}+) ?= ?-?\$?(?P<result>{_NUMBER})"
  rf"{_NO_RESULT}"
)
_RESULT = re.compile(rf"= {{0,2}}(-?)(?:\\?\$)?(-?)({_NUMBER}){_NO_RESULT}")
# What belongs to a calculation that begins further left than it was found.
_BEFORE = re.compile(
  r"(?:[-+*/×÷−=^]|\bx|\btwice|\bdouble|\btriple|\bhalf"
  r"|(?:[0-9%]|\bhalf|\bthirds?|\bquarters?|\bfifths?) of(?: the)?) ?$"
)
_TOKEN = re.compile(rf"{_NUMBER}|[-+*/×÷−x()%]")
_OPERATIONS = {
  "+": lambda a, b: a + b,
  "-": lambda a, b: a - b,
  "*": lambda a, b: a * b,
  "/": lambda a, b: a / b,
}
_PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2}
_PIECE = re.compile(r"[0-9]+|[^\W\d_]+|\s+|[\s\S]")


@dataclasses.dataclass(frozen=True)
class _Equation:
  """Holds a calculation in a text, and its place."""

  start: int
  left_end: int
  result_start: int
  end: int
  left: fractions.Fraction | None  # None: it could not be read.
  result: fractions.Fraction
  decimals: int  # Of the result.

  @property
  def is_true(self) -> bool:
    """Whether the result is right, up to rounding of its last digit."""
    if self.left is None:
      return False
    return abs(self.left - self.result) < fractions.Fraction(
      1, 10**self.decimals
    )


def _value(number: str) -> fractions.Fraction:
  return fractions.Fraction(number.replace(",", ""))


def _answer(step: str) -> fractions.Fraction | None:
  """Returns the last number of a text."""
  found = collections.deque(_ALONE.finditer(step), maxlen=1)
  return _value(found[0][0]) if found else None


def _evaluated(text: str) -> fractions.Fraction | None:
  """Returns the value of a sum of products, or None; executes no text."""
  values: list[fractions.Fraction] = []
  operators: list[str] = []

  def reduce(precedence):
    while operators and _PRECEDENCE.get(operators[-1], 0) >= precedence:
      b, a = values.pop(), values.pop()
      values.append(_OPERATIONS[operators.pop()](a, b))

  is_operand, sign = True, 1  # Whether an operand is to come.
  # An "x" is a sign where no operand is to come, else part of a unit.
  text = re.sub(r"[A-Za-wyz]|x(?=[A-Za-z])|(?<=[A-Za-z])x", "", text)
  text = text.translate(str.maketrans("×÷−x", "*/-*"))
  try:
    for token in _TOKEN.findall(text):
      if is_operand:
        if token == "-":
          sign = -sign
        elif token == "(":
          if sign < 0:
            return None
          operators.append(token)
        else:
          values.append(sign * _value(token))
          is_operand, sign = False, 1
      elif token == "%":
        values[-1] /= 100
      elif token == ")":
        reduce(1)
        if operators.pop() != "(":
          return None
      else:
        reduce(_PRECEDENCE[token])
        operators.append(token)
        is_operand = True
    reduce(1)
  except (ValueError, KeyError, IndexError, ZeroDivisionError):
    return None
  return values[0] if len(values) == 1 and not operators else None


def _equations(text: str) -> list[_Equation]:
  """Finds the calculations of a text that can be read, left to right."""
  found = []
  for match in _EQUATION.finditer(text):
    left = match["left"]
    # "(48/2 = 24)" opens a parenthesis for the whole.
    extra = left.count("(") - left.count(")")
    start = match.end("left") - len(left.lstrip())
    left = left.lstrip()
    if extra > 0 and left.startswith("(" * extra):
      left, start = left[extra:], start + extra
    is_part = _BEFORE.search(text[max(start - 24, 0) : start]) is not None
    is_negative = "-" in text[match.end("left") : match.start("result")]
    is_percent = text[match.end() : match.end() + 1] == "%"
    result = match["result"]
    found.append(
      _Equation(
        start=start,
        left_end=match.end("left"),
        result_start=match.start("result"),
        end=match.end(),
        left=None if is_part or is_percent or is_negative else _evaluated(left),
        result=_value(result),
        decimals=len(result.partition(".")[2]),
      )
    )
  return found


def _written(
  value: fractions.Fraction, like: str, decimals: int | None = None
) -> str | None:
  """Writes a number, with commas if the old one has them.

  Args:
    value: the number.
    like: the text that it replaces.
    decimals: to round to; None: it must be written exactly.

  Returns:
    Text; None if the number is negative, or has too many decimals.
  """
  if value < 0:
    return None
  if decimals is None:
    decimals = 0
    while (value * 10**decimals).denominator != 1:
      decimals += 1
      if decimals > _MAX_DECIMALS:
        return None
    # Cents stay cents.
    written = len(like.partition(".")[2])
    decimals = max(decimals, written) if decimals else 0
  digits = str(round(value * 10**decimals)).zfill(decimals + 1)
  whole, part = (
    digits[: len(digits) - decimals],
    digits[len(digits) - decimals :],
  )
  if "," in like:
    whole = f"{int(whole):,}"
  if like.startswith(".") and whole == "0" and part:
    whole = ""
  return f"{whole}.{part}" if part else whole


def _substituted(
  text: str, changes: Mapping[fractions.Fraction, fractions.Fraction]
) -> str:
  """Replaces some numbers of a text wherever they stand."""

  def other(match):
    new = changes.get(_value(match[0]))
    written = None if new is None else _written(new, match[0])
    return match[0] if written is None else written

  return _ALONE.sub(other, text) if changes else text


def _carried(
  steps: Sequence[str],
  changes: Mapping[fractions.Fraction, fractions.Fraction],
  *,
  repair: bool,
  before: str = "",
) -> list[str] | None:
  """Changes numbers in steps, and what follows from them.

  Args:
    steps: texts.
    changes: old number to new one.
    repair: whether wrong calculations are corrected; else they stay, unless the
      changes reach them, which then fails.
    before: the text before the steps, unchanged. A number of it, or of an
      earlier step, is not changed when it is a result again, as their uses
      cannot be told apart. (In a repair the answer is checked.)

  Returns:
    As many texts; None if it cannot be done.
  """
  changes = dict(changes)
  seen = _numbers(before)
  carried = []
  for step in steps:
    pieces, end = [], 0
    for equation in _equations(step):
      pieces.append((step[end : equation.start], True))
      left = step[equation.start : equation.left_end]
      result = step[equation.result_start : equation.end]
      new_left = _substituted(left, changes)
      is_changed = new_left != left
      written = result
      if is_changed or (repair and not equation.is_true):
        if equation.left is None or not (repair or equation.is_true):
          if is_changed:
            return None
        else:
          value = _evaluated(new_left)
          is_rounded = equation.is_true and equation.left != equation.result
          written = None
          if value is not None:
            written = _written(
              value, result, equation.decimals if is_rounded else None
            )
          if written is None:
            return None
      new = _value(written)
      if not repair:
        seen |= _numbers(step[end : equation.left_end])
        if new != equation.result and equation.result in seen:
          return None
        seen.add(equation.result)
      if new != equation.result:
        changes[equation.result] = new
      else:  # From here on this number is the calculation's result.
        changes.pop(equation.result, None)
      pieces.append((new_left, False))
      pieces.append((step[equation.left_end : equation.result_start], False))
      pieces.append((written, False))
      end = equation.end
    pieces.append((step[end:], True))
    if not repair:
      seen |= _numbers(step[end:])
    # A sentence may give its result before the calculation.
    carried.append(
      "".join(
        _substituted(piece, changes) if is_prose else piece
        for piece, is_prose in pieces
      )
    )
  return carried


# Helpers of `from_gold`.


def _is_answer(step: str, gold: str) -> bool:
  """Tells whether a step states the answer, as the gold's last one does."""
  if "=" in gold:  # The answer comes with a calculation.
    return False
  found = _ALONE.search(gold)
  head = gold[: found.start() if found else None].strip(" \n$-:").lower()
  step = step.strip().lower()
  if not head:
    return _ALONE.fullmatch(step.lstrip("$-")) is not None
  return head in step if len(head) > 1 else step.startswith(head)


def _standing(
  gold: Sequence[str], work: Sequence[str], result_of: Callable[[str], Any]
) -> list[set[int]]:
  """Finds the gold steps that the sample has, while its steps are right.

  Returns:
    For 0, 1, ... steps of the sample, as many as stand: the indices of the
    gold steps whose results they have.
  """
  results = [result_of(step) for step in gold[:-1]]
  # A gold step may have several calculations. With only the first of them, a
  # step is begun but not complete.
  partial = {equation.result for step in gold for equation in _equations(step)}
  matched: list[set[int]] = [set()]
  for step in work:
    if any(e.left is not None and not e.is_true for e in _equations(step)):
      break
    result = result_of(step)
    last = max(matched[-1], default=-1)
    places = [
      j
      for j, known in enumerate(results)
      if result is not None and known == result and j not in matched[-1]
    ]
    # Where several have this result, one after the last match.
    place = next((j for j in places if j > last), min(places, default=None))
    if place is not None:
      matched.append(matched[-1] | {place})
    elif result is None or (
      last_result(step) in partial and result not in results
    ):
      matched.append(matched[-1])
    else:
      break
  else:
    # No readable calculation is wrong, so the error must lie in the steps
    # without a result.
    while len(matched) > 1 and matched[-1] == matched[-2]:
      matched.pop()
  return matched


def _rest_of_gold(
  gold: Sequence[str], matched: set[int], result_of: Callable[[str], Any]
) -> list[str]:
  """Returns the gold's steps after the last match, and those they need."""
  last = max(matched, default=-1)
  needed = list(range(last + 1, len(gold)))
  wanted = {n for i in needed for n in _numbers(gold[i])}
  known = {last_result(gold[i]) for i in matched}
  for i in range(last, -1, -1):
    result = last_result(gold[i])
    if i in matched or result_of(gold[i]) is None or result is None:
      continue
    if result in wanted and result not in known:
      needed.insert(0, i)
      wanted.update(_numbers(gold[i]))
  return [gold[i] for i in needed]


def _numbers(text: str) -> set[fractions.Fraction]:
  return {_value(found) for found in _ALONE.findall(text)}


def _ended(
  head: Sequence[str], sample: Sequence[str], gold: Sequence[str]
) -> list[str]:
  """Returns steps that others can follow, in place of the first ones.

  The sample's last step may lack what ends a step.
  """
  head = list(head)
  if head and len(head) == len(sample):
    end = gold[0][-1:] if len(gold) > 1 else "\n"
    ends = end + "".join(step[-1:] for step in sample[:-1])
    # White space may follow what ends it.
    text = head[-1].rstrip(ends + " \t\r\n")
    if not any(character in ends for character in head[-1][len(text) :]):
      head[-1] += end
  return head


def _grafted(work: Sequence[str], rest: Sequence[str]) -> list[str] | None:
  """Puts the gold's calculations into the sample's sentences, if possible."""
  new = [
    (step[e.start : e.end], e.result)
    for step in rest[:-1]
    for e in _equations(step)
  ]
  old = [_equations(step) for step in work]
  has_others = any(
    step.count("=") != len(found) for step, found in zip(work, old, strict=True)
  )
  if not new or has_others or sum(map(len, old)) != len(new):
    return None
  if new[-1][1] != _answer(rest[-1]):
    return None
  following = iter(new)
  changes: dict[fractions.Fraction, fractions.Fraction] = {}
  grafted = []
  for step, found in zip(work, old, strict=True):
    pieces, end = [], 0
    for equation in found:
      text, result = next(following)
      pieces += [(step[end : equation.start], True), (text, False)]
      changes[equation.result] = result
      end = equation.end
    pieces.append((step[end:], True))
    grafted.append(
      "".join(
        _substituted(piece, changes) if is_prose else piece
        for piece, is_prose in pieces
      )
    )
  return grafted


def _num_edits(
  sample: Sequence[str], candidates: Sequence[Sequence[str]]
) -> list[int]:
  """Counts the words, numbers and signs that each candidate changes."""
  ids: dict[str, int] = {}
  old, *others = (
    [
      ids.setdefault(piece, len(ids))
      for piece in _PIECE.findall("".join(steps))
    ]
    for steps in (sample, *candidates)
  )
  pairs = [_trimmed(old, new) for new in others]
  return alignment.distances(*map(list, zip(*pairs, strict=True))).tolist()


def _trimmed(old: list[int], new: list[int]) -> tuple[list[int], list[int]]:
  """Strips what both begin and end with alike, which is no edit."""
  shorter = min(len(old), len(new))
  start = 0
  while start < shorter and old[start] == new[start]:
    start += 1
  end = 0
  while end < shorter - start and old[-1 - end] == new[-1 - end]:
    end += 1
  return old[start : len(old) - end], new[start : len(new) - end]


# Helpers of `corrupted`.


def _places(gold: str) -> list[tuple[_Equation | None, int, int]]:
  """Finds numbers that may be changed: calculation, start and end."""
  places = []
  for equation in _equations(gold):
    if not equation.is_true:
      continue
    places.append((equation, equation.result_start, equation.end))
    # The operands of a calculator note also stand before it.
    if not gold[: equation.start].endswith("<<"):
      places += [
        (equation, equation.start + n.start(), equation.start + n.end())
        for n in _ALONE.finditer(gold[equation.start : equation.left_end])
      ]
  numbers = list(_ALONE.finditer(gold))
  if places and numbers[-1].start() >= places[-1][2]:
    numbers = numbers[-1:]  # The answer.
  elif places:
    numbers = []
  return places + [(None, n.start(), n.end()) for n in numbers]


def _with_other_number(
  gold: str, place: tuple[_Equation | None, int, int], rng: np.random.Generator
) -> str | None:
  """Changes the gold solution's number at a place, and its later uses."""
  equation, start, end = place
  old = gold[start:end]
  new = _other_number(old, rng)
  text = gold[:start] + new
  changes = {_value(old): _value(new)}
  if equation is not None and start < equation.result_start:
    # Only the result is carried on: the number may have other uses.
    changes = {}
    result = gold[equation.result_start : equation.end]
    left = gold[equation.start : start] + new + gold[end : equation.left_end]
    value = _evaluated(left)
    is_rounded = equation.left != equation.result
    written = None
    if value is not None:
      written = _written(
        value, result, equation.decimals if is_rounded else None
      )
    if written is None:
      return None
    if _value(written) != equation.result:
      changes[equation.result] = _value(written)
    text += gold[end : equation.result_start] + written
    end = equation.end
  before = gold[: start if equation is None else equation.left_end]
  if changes.keys() & _numbers(before) & _numbers(gold[end:]):
    return None  # These uses may be those of the other number.
  rest = _carried(
    gold[end:].splitlines(keepends=True),
    changes,
    repair=False,
    before=gold[:end],
  )
  return None if rest is None else text + "".join(rest)


def _other_number(number: str, rng: np.random.Generator) -> str:
  """Returns the number with another digit, without a leading zero."""
  places = [i for i, character in enumerate(number) if character.isdigit()]
  place = places[rng.integers(len(places))]
  is_first = place == 0
  digits = [d for d in "0123456789"[is_first:] if d != number[place]]
  return (
    number[:place] + digits[rng.integers(len(digits))] + number[place + 1 :]
  )
