"""Finds the numbers in a text that are written in digits, and their values."""

import fractions
import re
from typing import NamedTuple

_MAX_DIGITS = 100
_MAX_EXPONENT = 100

INTEGER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)"
LITERAL = r"""(?:
  [0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]*)?                  # 1,234.50
  |[0-9]{1,2}(?:,[0-9]{2})+,[0-9]{3}(?:\.[0-9]*)?        # 12,34,567
  |[0-9]{1,3}(?:\.[0-9]{3})+,[0-9]{1,2}                  # 1.234,50
  |[0-9]{1,3}(?:\.[0-9]{3}){2,}                          # 1.234.567
  |[1-9][0-9]{0,2}(?:[ '_][0-9]{3})+(?:[.][0-9]*|,[0-9]{1,2})?  # 1 234.50
  |[0-9]*\.[0-9]*(?:\\(?:overline|bar|dot)\s*\{?[0-9]+\}?|\([0-9]+\))
  |[0-9]+(?:\.[0-9]*)?|\.[0-9]+
)(?:[eE][-+]?[0-9]{1,9}(?![0-9.]))?"""
QUANTITY = re.compile(
  rf"""(?P<literal>{LITERAL})(?![0-9])
  (?:
    \s*/\s*(?P<bottom>{INTEGER})(?![0-9]|\.[0-9])
    |(?:[ ]+|[ ]+and[ ]+)(?P<top>[0-9]+)\s*/\s*(?P<under>[0-9]+)(?![0-9])
  )?
  (?:\s*[x*]\s*10\s*\^\s*(?:\{{\s*)?(?P<power>[-+]?[0-9]{{1,3}})(?:\s*\}})?)?
  """,
  re.VERBOSE,
)
_REPEATED = re.compile(
  r"([0-9]{0,30})\.([0-9]{0,30})(?:\\[a-z]+\s*\{?|\()([0-9]{1,30})[})]?"
)
DOTTED = re.compile(r"([0-9]{0,30})\.([0-9]{0,29}?)([0-9]{1,6}?)\3\3+")


class Quantity(NamedTuple):
  """Holds a number in a text.

  Attributes:
    start: where it starts.
    end: where it ends.
    value: None if the digits are no number.
  """

  start: int
  end: int
  value: fractions.Fraction | None


def quantities(text: str) -> list[Quantity]:
  """Finds the numbers of a plain text, without signs and magnitudes."""
  return [
    Quantity(m.start(), m.end(), _value(m)) for m in QUANTITY.finditer(text)
  ]


def _value(match: re.Match) -> fractions.Fraction | None:
  """Returns the value of a match of `QUANTITY`."""
  value = _literal(match["literal"])
  if value is None:
    return None
  if match["bottom"]:
    bottom = _integer(match["bottom"])
    value = value / bottom if bottom else None
  elif match["top"]:
    top, under = _integer(match["top"]), _integer(match["under"])
    if not under or not top or top >= under or value.denominator != 1:
      return None
    value += fractions.Fraction(top, under)
  if match["power"] and value is not None:
    if abs(int(match["power"])) > _MAX_EXPONENT:
      return None
    value *= fractions.Fraction(10) ** int(match["power"])
  return value


def _integer(text: str) -> int | None:
  digits = text.replace(",", "")
  return int(digits) if len(digits) <= _MAX_DIGITS else None


def _literal(text: str) -> fractions.Fraction | None:
  """Returns the value of a literal; None if it has too many digits."""
  if text.isdigit():
    return fractions.Fraction(int(text)) if len(text) <= _MAX_DIGITS else None
  match = _REPEATED.fullmatch(text)
  if match:
    return repeated(*match.groups())
  mantissa, _, exponent = text.lower().partition("e")
  if not exponent.lstrip("+-").isdigit() and exponent:
    return None
  if re.search("[ '_]", mantissa):
    mantissa = re.sub("[ '_]", "", mantissa).replace(",", ".")
  if mantissa.count(".") > 1 or re.search(r"\.[0-9]+,", mantissa):
    mantissa = mantissa.replace(".", "").replace(",", ".")
  mantissa = mantissa.replace(",", "")
  whole, _, decimals = mantissa.partition(".")
  if max(len(whole), len(decimals)) > _MAX_DIGITS:
    return None
  if not (whole + decimals).isdigit():
    return None
  power = int(exponent or 0)
  if abs(power) > _MAX_EXPONENT:
    return None
  value = fractions.Fraction(int(whole + decimals), 10 ** len(decimals))
  return value * fractions.Fraction(10) ** power


def repeated(whole: str, once: str, often: str) -> fractions.Fraction:
  """Returns 1/6 for "0", "1", "6"."""
  return fractions.Fraction(
    int(whole + once + often) - int(whole + once or 0),
    10 ** len(once) * (10 ** len(often) - 1),
  )
