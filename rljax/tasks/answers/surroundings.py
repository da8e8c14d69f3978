"""Finds what the words around a marked answer do to it."""

import re

from rljax.tasks.answers import clauses, numbers

_CONNECTORS = re.compile(
  r"(?:[\s.,;:!?$*_()\[\]|/&~-]|\\[\[\]()]|\\text\{|\}|\\quad|\\qquad"
  r"|\b(?:or|and|maybe|perhaps|possibly|also|either|else|then|is|it|the|answer"
  r"|could|may|might|be|another|alternatively|oder|und|ou|et|y|o|vs)\b"
  r"|\b(?:answer|option|choice|guess|candidate)\s*(?:\d|[A-E])?\b)*",
  re.IGNORECASE,
)
# A minus, but not a bullet.
_OPERATOR_BEFORE = re.compile(
  r"(?:(?:(?<![\s*])|^|(?<=\s))-|\S[ ]+-\s*)[{$]*$"
  r"|(?:[0-9)}+/^_×÷<>≤≥≠]"
  r"|\}\s*\{|\\(?:cdot|times|div|pm|sqrt|[dtc]?frac|neq?|[lg]eq?|leqslant|geqslant|ll|gg))[\s{$]*$"
)
_WORKED_OUT = re.compile(r"[-+*/^=×÷]|\\(?:cdot|times|frac|div|sqrt)")
_TURNED = re.compile(
  r"^\W*(?:but )?(?:wait|no|actually|oops|sorry|hmm)\b", re.IGNORECASE
)
_CONFIRMED = re.compile(
  r"\b(?:correct|right|yes|good|ok|okay|holds|matches|checks|fine|same)\b",
  re.IGNORECASE,
)
_NEAR = 80  # Characters around an answer that count.
_BEFORE_WORD = re.compile(r"[\s$*_(\[\\]+$")


def is_hedge(gap: str) -> bool:
  """Tells whether what stands between two answers offers both."""
  return len(gap) <= 80 and (
    _CONNECTORS.fullmatch(gap) is not None
    or clauses.HEDGE.search(gap) is not None
  )


def takes_back(behind: str) -> bool:
  """Tells whether the words behind a marked answer change it."""
  behind = behind[:_NEAR]
  behind = re.sub(
    r"^(?:[\s$}*_)]|\\[\])]|\\(?:text|mbox)\s*\{|\\q?quad)+", " ", behind
  )
  behind = clauses.SENTENCE_END.split(behind, maxsplit=1)[0].partition("\n")[0]
  return (
    re.match(
      r"[\s,(]*(?:or\b|oder\b|ou\b|或|isn't|is (?:not|wrong|incorrect|false)"
      r"|wrong|incorrect|not\b|squared|cubed|dozen|hundred|thousand|million"
      r"|billion|trillion|or more|and a half|plus|minus|times \d|to \d"
      r"|[-+^*/]\s*[\d(\\{]|\\(?:times|cdot|div|pm)(?![A-Za-z])|!)",
      behind,
      re.IGNORECASE,
    )
    is not None
  )


def changes(before: str) -> bool:
  """Tells whether the words before a marked answer change it."""
  before = before[-_NEAR:]
  if _OPERATOR_BEFORE.search(before):
    return True
  before = _BEFORE_WORD.sub("", before)
  if re.search(r"\bor$", before) and _WORKED_OUT.search(before[-28:]):
    return False  # 50 \cdot 12, or \boxed{600}.
  before = re.split(r"[.!?;:,\n=]", before)[-1]
  last = " ".join(before.split()[-3:])
  return (
    re.search(
      r"\b(?:not|never|than|except|minus|negative|twice"
      r"|double|half of|or|times|over|under|cannot be|but|without|plus"
      r"|square root of|square of|oder|ou)$|n't(?: be)?$|或$",
      last,
      re.IGNORECASE,
    )
    is not None
  )


def withdraws(behind: str, value: str) -> bool:
  """Tells whether a text behind an answer says that it is another number."""
  is_wrong = clauses.WITHDRAWN.search(behind) is not None
  if not is_wrong and not (
    _TURNED.match(behind)
    and clauses.DIGIT.search(behind)
    and not _CONFIRMED.search(behind)
  ):
    return False
  clause = clauses.last_clause(behind)
  return clause is None or numbers.number(clause) != value
