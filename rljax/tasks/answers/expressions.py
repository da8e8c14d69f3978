r"""Compares mathematical expressions exactly; runs in worker processes.

math-verify reads the expressions, by a grammar of LaTeX, and sympy compares
them. math-verify's own comparison rounds: it takes 1 + 10^{-9} for 1.
"""

import re
from typing import Any

_OPENING, _CLOSING = "([{", ")]}"
_PRODUCT = re.compile(r"(?<=[0-9)])(?<![\^_][0-9])\s*(?=\()")
_FUNCTION = re.compile(r"(?<![\\A-Za-z])(ln|log|sin|cos|tan)(?![A-Za-z])")
_RELATION = re.compile(
  r"<=?|>=?|\\(?:leq?|geq?|lt|gt|leqslant|geqslant)(?![A-Za-z])|\\neq?(?![A-Za-z])"
)
_EQUALS = re.compile(r"(?<![<>!:=\\])=(?!=)")
_AND = re.compile(
  r"\s*(?:,?\s*\b(?:and|or)\b\s*|[;,]|\\(?:text|mbox)\s*\{\s*(?:and|or)\s*\})\s*"
)
_MATRIX = re.compile(
  r"\\begin\s*\{([pbvBV]?matrix|array)\}(?:\{[lcr|]*\})?(.*?)\\end\s*\{\1\}",
  re.DOTALL,
)
_LEFT = re.compile(
  r"\|[a-z]\||\\?[A-Za-z]+(?:_\{?\w+\}?)?(?:'|\s*\([A-Za-z, ]+\))?|\\[a-z]+"
  r"|\(\s*[a-z](?:\s*,\s*\\?[a-z]+)+\s*\)"
)
_UNION = re.compile(r"\\cup(?![a-z])|\bor\b")
_MEMBER = re.compile(r"^\s*[A-Za-z]\s*\\in(?![A-Za-z])")
# Towers, and exponents and factorials of numbers that fill the memory.
_HUGE = re.compile(
  r"[0-9}]\s*\^[\s{(]*[0-9.]+\s*\^|\^[\s{(]*-?[0-9]{6,}|(?:[0-9]{4,}|[)!])\s*!"
  r"|\\binom\s*\{[^{}]{4,}\}|[0-9]\s*[eE]\s*[0-9]{4,}"
)
_MAX_NESTED = 20  # Brackets.
_MAX_DEPTH = 8
_MAX_DECIMALS = 15  # Of a floating-point number.


def warm_up() -> None:
  """Imports and builds what the first verdict needs."""
  # The pool sets the time limit; math-verify would warn that there is none.
  import logging as standard_logging

  standard_logging.getLogger("math_verify").setLevel(standard_logging.ERROR)
  verify("1/2", r"\frac{\sqrt{4}}{4}")
  verify(r"\tan^2(y)+1", r"\sec^2(y)")


def verify(truth: str, text: str) -> bool | None:
  """Tells whether an expression equals the truth; None if it is not one."""
  return _equal(truth.strip(), text.strip(), 0)


def is_costly(text: str) -> bool:
  """Tells whether a text would take all the time that there is: 9^{9^9}."""
  depth = deepest = 0
  for character in text:
    depth += (character in _OPENING) - (character in _CLOSING)
    deepest = max(deepest, depth)
  return deepest > _MAX_NESTED or _HUGE.search(text) is not None


def _equal(truth: str, text: str, depth: int) -> bool | None:
  """Compares the parts of two texts."""
  if depth > _MAX_DEPTH or not text:
    return None
  truth, text = (_MEMBER.sub("", t).strip() for t in (truth, text))
  truth, text = _unnamed(truth), _unnamed(text, truth)
  if "".join(truth.split()) == "".join(text.split()):
    return True
  if _RELATION.search(truth) or _RELATION.search(text):
    mine, yours = _UNION.split(truth), _UNION.split(text)
    if len(mine) > 1 or len(yours) > 1:
      return _any_order(mine, yours, depth)
    return _equal_relations(truth, text, depth)
  lists = _parts(truth), _parts(text)
  if all(one and not one[0] and all("=" in i for i in one[1]) for one in lists):
    return _any_order(lists[0][1], lists[1][1], depth)
  if _EQUALS.search(truth) or _EQUALS.search(text):
    return _equal_equations(truth, text, depth)
  if "\\cup" in truth or "\\cup" in text:
    return _any_order(truth.split("\\cup"), text.split("\\cup"), depth)
  matrices = _matrix(truth), _matrix(text)
  if any(matrices):
    return all(matrices) and _in_order(*matrices, depth)
  mine, yours = _parts(truth), _parts(text)
  if "\\pm" in truth or "\\pm" in text:
    if any(one and one[0] in ("(", "[") for one in (mine, yours)):
      return False
    return _any_order(
      mine[1] if mine else _signs(truth),
      yours[1] if yours else _signs(text),
      depth,
    )
  if mine or yours:
    return _equal_lists(mine, yours, depth)
  if re.search(r"[0-9]_", truth) or re.search(r"[0-9]_", text):
    return re.sub(r"[{}\s]", "", truth) == re.sub(r"[{}\s]", "", text)
  return _same(truth, text)


def _unnamed(text: str, truth: str = "") -> str:
  """Writes x = 1 or x = -2 as 1, -2, and x = 1, y = 2 as (1, 2) for a pair."""
  parts = _parts(text)
  if not parts or parts[0]:
    return text
  sides = [_EQUALS.split(part) for part in parts[1]]
  names = [_name(side[0]) or "" for side in sides]
  if any(len(side) != 2 for side in sides) or "" in names:
    return text
  if truth.startswith("(") and len("".join(names)) == len(set(names)) > 1:
    sides.sort()
    return f"({', '.join(side[1] for side in sides)})"
  if truth and "=" not in truth:  # x_1 and x_2.
    names = [name.partition("_")[0] for name in names]
  if len(set(names)) > 1:
    return text
  return ", ".join(side[1] for side in sides)


def _signs(text: str) -> list[str]:
  """Writes both values of a plus-minus sign."""
  if "\\pm" not in text:
    return [text]
  return [text.replace("\\pm", sign, 1) for sign in ("+", "-")]


def _top_level(text: str, separator: str = ",") -> list[str]:
  """Splits a text at separators outside of brackets."""
  parts, depth, start = [], 0, 0
  for i, character in enumerate(text):
    if character in _OPENING:
      depth += 1
    elif character in _CLOSING:
      depth -= 1
    elif character == separator and depth == 0:
      parts.append(text[start:i])
      start = i + 1
  return [*parts, text[start:]]


def _parts(text: str) -> tuple[str, list[str], str] | None:
  r"""Splits (a, b), [a, b), \{a, b\} or a, b; None if a text is one thing."""
  text = text.strip()
  inner, opening, closing = text, "", ""
  if text.startswith("\\{") and text.endswith("\\}"):
    inner, opening, closing = text[2:-2], "{", "}"
  elif (
    text[:1] in ("(", "[")
    and text[-1:] in (")", "]")
    and not _closes_early(text)
  ):
    inner, opening, closing = text[1:-1], text[0], text[-1]
  items = _top_level(
    re.sub(r",(?=[0-9]{3}(?![0-9]))", "", inner) if not opening else inner
  )
  if opening != "(" and opening != "[":
    items = [
      part
      for item in items
      for part in re.split(r"\s+(?:and|or)\s+|;", item)
      if part.strip()
    ]
    items = [re.sub(r"^\s*(?:and|or)\s+", "", item) for item in items]
  items = [item.strip() for item in items]
  if len(items) < 2 and opening != "{":
    return None
  return opening, items, closing


def _closes_early(text: str) -> bool:
  """Tells whether the first bracket closes before the end: (a)(b)."""
  depth = 0
  for i, character in enumerate(text):
    depth += (character in "([") - (character in ")]")
    if depth == 0:
      return i < len(text) - 1
  return True


def _equal_lists(mine: Any, yours: Any, depth: int) -> bool:
  """Compares pairs, intervals, sets and lists, as they are written."""
  if not mine or not yours:
    return False
  (opening, items, closing), (other, others, end) = mine, yours
  if len(items) != len(others):
    return False
  if opening in ("(", "["):
    is_ordered_list = not other and opening == "(" and closing == ")"
    if (other, end) != (opening, closing) and not is_ordered_list:
      return False
    return _in_order(items, others, depth)
  if other in ("(", "["):
    return False
  return _any_order(items, others, depth)


def _in_order(items: list[str], others: list[str], depth: int) -> bool:
  return len(items) == len(others) and all(
    _equal(a, b, depth + 1) for a, b in zip(items, others, strict=True)
  )


def _any_order(items: list[str], others: list[str], depth: int) -> bool:
  if len(items) != len(others) or len(items) > 50:
    return False
  left = list(others)
  for item in items:
    for other in left:
      if _equal(item, other, depth + 1):
        left.remove(other)
        break
    else:
      return False
  return True


def _matrix(text: str) -> list[str] | None:
  """Returns the entries of a matrix, the ends of its rows among them."""
  match = _MATRIX.fullmatch(text.strip())
  if not match:
    return None
  # A determinant is no matrix.
  entries = [{"v": "1", "V": "2"}.get(match[1][0], "0")]
  for row in re.split(r"\\\\", match[2].strip().removesuffix("\\\\")):
    entries += [entry.strip() for entry in row.split("&")] + ["0"]
  return entries


def _equal_equations(truth: str, text: str, depth: int) -> bool | None:
  """Compares what is right of equality signs, or whole equations."""
  mine, yours = _EQUALS.split(truth), _EQUALS.split(text)
  named = _name(mine[0]), _name(yours[0])
  if _is_swapped(named[1]) and not named[0]:
    return False
  if len(mine) == 1:
    # A chain, or a name that the truth does without.
    return (
      _equal(truth, yours[-1], depth + 1)
      if named[1] or _closed(yours[0])
      else False
    )
  if len(yours) == 1:
    return _equal(mine[-1], text, depth + 1) if named[0] else False
  if named[0] and named[1]:
    if named[0] != named[1]:
      return False
    if _equal(mine[-1], yours[-1], depth + 1):
      return True
    if _parts(mine[-1]) or len(mine) > 2:
      return False
  if len(mine) > 2 or len(yours) > 2:
    return False
  return _proportional(_difference(mine), _difference(yours))


def _name(text: str) -> str | None:
  """Returns the variable or function that stands left of an equality sign."""
  text = "".join(text.split())
  return text if _LEFT.fullmatch(text) else None


def _is_swapped(name: str | None) -> bool:
  """Tells whether a pair's names are neighbours in another order: (y, x)."""
  letters = re.findall("[a-z]", name or "") if (name or "")[:1] == "(" else []
  return letters != sorted(letters) and (
    ord(max(letters)) - ord(min(letters)) < len(letters)
  )


def _closed(text: str) -> bool:
  """Tells whether a text has no variables: 2^{10} of 2^{10} = 1024."""
  return not re.search(r"(?<![\\A-Za-z])[A-Za-z]", text)


def _difference(sides: list[str]) -> Any:
  """Returns left minus right."""
  left, right = (_parsed(side) for side in sides)
  return None if left is None or right is None else left - right


def _proportional(mine: Any, yours: Any) -> bool | None:
  """Tells whether one equation is a multiple of the other."""
  import sympy

  if mine is None or yours is None:
    return None
  if mine.free_symbols != yours.free_symbols or not mine.free_symbols:
    return False
  ratio = sympy.simplify(mine / yours)
  return bool(ratio.is_number and ratio.is_finite and ratio.is_nonzero)


def _equal_relations(truth: str, text: str, depth: int) -> bool | None:
  """Compares inequalities, as intervals where they are of one variable."""
  if truth.strip() == text.strip():
    return True
  mine, yours = _interval(truth), _interval(text)
  if mine is None or yours is None:
    return False
  if mine[0] and yours[0] and mine[0] != yours[0]:
    return False
  return mine[1] == yours[1] and _in_order(mine[2], yours[2], depth)


def _interval(text: str) -> tuple[str, str, list[str]] | None:
  r"""Reads 0 < x \le 1, x > 2 or (0, 1]: variable, brackets and ends."""
  parts = _parts(text)
  if parts and parts[0] in ("(", "[") and len(parts[1]) == 2:
    return "", parts[0] + parts[2], parts[1]
  signs = _RELATION.findall(text)
  sides = [side.strip() for side in _RELATION.split(text)]
  kinds = []
  for sign in signs:
    is_less = sign.startswith(("<", "\\l"))
    if sign.startswith("\\ne"):
      return None
    is_open = sign in ("<", ">", "\\lt", "\\gt")
    kinds.append((is_less, is_open))
  if len({is_less for is_less, _ in kinds}) != 1 or len(sides) not in (2, 3):
    return None
  if not kinds[0][0]:
    sides, kinds = sides[::-1], kinds[::-1]
  if len(sides) == 3 and _name(sides[1]):
    brackets = ("(" if kinds[0][1] else "[") + (")" if kinds[1][1] else "]")
    return _name(sides[1]), brackets, [sides[0], sides[2]]
  if len(sides) == 2 and _name(sides[0]):
    return (
      _name(sides[0]),
      "(" + (")" if kinds[0][1] else "]"),
      ["-\\infty", sides[1]],
    )
  if len(sides) == 2 and _name(sides[1]):
    return (
      _name(sides[1]),
      ("(" if kinds[0][1] else "[") + ")",
      [sides[0], "\\infty"],
    )
  return None


def _same(truth: str, text: str) -> bool | None:
  """Tells whether sympy proves that two expressions are equal."""
  import sympy

  expression = _parsed(text)
  if expression is None:
    return None
  known = _parsed(truth)
  if known is None:
    return False
  for one in (known, expression):
    if not isinstance(one, sympy.Expr):
      return bool(known == expression)
  if known.has(sympy.oo, -sympy.oo) or expression.has(sympy.oo, -sympy.oo):
    return bool(known == expression)
  difference = known - expression
  if difference.is_Rational:
    return difference == 0
  if known.free_symbols != expression.free_symbols:
    return bool(sympy.simplify(difference) == 0)
  # A point where they differ settles most; a proof takes longer.
  point = {
    symbol: sympy.Rational(7 * i + 11, 13)
    for i, symbol in enumerate(sorted(difference.free_symbols, key=str))
  }
  value = difference.subs(point).evalf(50)
  if value.is_comparable and abs(value) > sympy.Float(10) ** -40:
    return False
  for simpler in (sympy.expand, sympy.trigsimp, sympy.simplify):
    difference = simpler(difference)
    if difference == 0:
      return True
  return bool(difference.equals(0))


def _parsed(text: str) -> Any:
  """Returns a sympy expression without floating-point numbers, or None."""
  import math_verify
  import sympy

  text = text.replace("\\%", "").replace("%", "")
  if re.search(
    rf"\.[0-9]{{{_MAX_DECIMALS},}}|[0-9]{{{_MAX_DECIMALS},}}\.[0-9]", text
  ):
    return None
  # Its reader of plain expressions evaluates them in Python; that of LaTeX has
  # a grammar. Without the dot, 6(7) would be a mixed number.
  text = _FUNCTION.sub(r"\\\1", text)
  text = _PRODUCT.sub(r"\\cdot ", text).replace("*", "\\cdot ")
  parsed = math_verify.parse(
    rf"\boxed{{{text}}}",
    extraction_config=[
      math_verify.LatexExtractionConfig(boxed_match_priority=0)
    ],
    fallback_mode="no_fallback",
    parsing_timeout=None,
  )
  if not parsed or isinstance(parsed[0], str):
    return None
  expression = parsed[0]
  if expression.has(sympy.zoo, sympy.nan):  # 1/0, 0/0.
    return None
  floats = {
    number: sympy.Rational(str(number))
    for number in expression.atoms(sympy.Float)
  }
  expression = expression.xreplace(floats) if floats else expression
  expression = expression.doit()
  if expression.has(sympy.zoo, sympy.nan):
    return None
  return expression
