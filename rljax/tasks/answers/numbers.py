r"""Reads the one number that a short text means, exactly.

A text is refused if it may mean more than one number, or none: it is worse to
accept a wrong answer than to refuse a right one.
"""

import fractions
import functools
import re

from rljax.tasks.answers import literals, normalisation, words

MAX_ANSWER = 200  # Characters.
_CACHE_SIZE = 2**16

PLAINEST = re.compile(r" ?\$?(-?[0-9]{1,15})[.,!]? ?")  # Nearly all there are.

_DIGITS = re.compile("[0-9]+")
_FRACTION = re.compile(
  rf"\\frac\s*(?:\{{\s*(-?)\s*({literals.INTEGER})\s*\}}|([0-9]))\s*"
  rf"(?:\{{\s*({literals.INTEGER})\s*\}}|([0-9]))"
)
_BRACKETED = re.compile(r"\(\s*(-?[0-9]{1,30})\s*\)/\(?([0-9]{1,30})\)?")
_TIMES = re.compile(r"\\(?:times|cdot)(?![A-Za-z])")
_UNIT_POWER = re.compile(
  r"(?<=[^\W\d_]) ?\^ ?(?:\{ ?-?[123] ?\}|-?[123](?![0-9.]))(?!\s*=)"
)
_CLOCK = re.compile(r"\bo'clock\b|\b[ap]\.m\b\.?", re.IGNORECASE)
_UNIT_FRACTION = re.compile(
  r"\\frac\s*\{\s*([A-Za-z]{1,12})\s*\}\s*\{\s*([A-Za-z]{1,12})\s*\}"
)
_ABOUT = re.compile(r"\\(?:approx|simeq|cong|sim)(?![A-Za-z])|^\s*~")
_MONEY_MILLIONS = re.compile(
  rf"([{normalisation._MONEY}]\s?[0-9][0-9.,]*\s?)m\b"
)
# 150,00 and R$ 8,50.
_DECIMAL_COMMA = re.compile(
  r"(?<![0-9.,])([0-9]{1,9}),([0-9]{2})(?=\s?(?:[€₽]|EUR|zł|Kč|kr|руб))"
)
_DECIMAL_PRICE = re.compile(
  r"((?:[€₽]|R\$)\s?[0-9]{1,9}),([0-9]{2})(?![0-9.,])"
)
PRICE = re.compile(r"((?:[€₽]|R\$)\s?[0-9]{1,9}),([0-9]{2})(?![0-9.,])")
PRICE = re.compile(rf"[{normalisation._MONEY}]\s?[0-9]")
_MONEY = re.compile(
  rf"(?:\b(?:US|AU?|CA?|S|HK|NT|NZ|MX)(?=\$))?[{normalisation._MONEY}]"
)
_ALIGNMENT = re.compile(r"&|\\\\|\\(?:begin|end)\s*\{[a-z*]+\}")
_ABBREVIATED = re.compile(
  r"\b(rs|approx|ca|no|fr|nr|incl|resp)\.\s*", re.IGNORECASE
)
_LABEL = re.compile(
  r"\b(?:step|part|case|problem|question|method|example|exercise|option|choice"
  r"|week|day|month|year|line|no|number|number of|round|team|group|answer)"
  r"\s*\#?[0-9]{1,4}\s*[:.)](?=\s)",
  re.IGNORECASE,
)
# five (5); 5, i.e. five.
_SAME_AGAIN = re.compile(
  r"[^()]*(?:\(\s*|,\s*(?:i\.?e\.?|namely|meaning),?\s+)", re.IGNORECASE
)
# 42 dollars and 50 cents.
_CENTS = re.compile(
  r"(?<![0-9.,])([0-9][0-9,]{0,12})"
  r"(?: *(?:dollars?|euros?|pounds?),?(?: and)?| +and) +([0-9]{1,2})"
  r" *(?:cents?|pence)\b",
  re.IGNORECASE,
)
_NO_CENTS = re.compile(r"(?<=[0-9]) ?[.,/]-(?![0-9])")
_PER = re.compile(r"\b(?:per|pro|por|par)\s+[0-9]+\b", re.IGNORECASE)
# 7, not 8.
_RATHER = re.compile(
  r"(?<=[\w%)])[\s,;(-]*(?:and |but )?(?:not|rather than|instead of)\s+"
  r"[$€£]?-?[0-9][0-9.,]*%?(?: [a-z]+)?[\s).!]*$",
  re.IGNORECASE,
)
# Not 8 but 7.
_NOT_BUT = re.compile(
  r"\bnot \$?-?[0-9][0-9.,]*(?: [a-z]+)?,? (?:but(?: rather)?|it(?:'s| is))\s+"
  r"(?=\$?-?[0-9])",
  re.IGNORECASE,
)
_BELIEVED = re.compile(
  r"[\s,]+I (?:believe|think|am (?:sure|certain|confident))[\s.!]*$"
)
# 42 clips: 40 red and 2 blue; 42 (40 + 2).
_MADE_OF = re.compile(
  r"[^:(]{0,40}(?::|\(|,? (?:because|since|as|so)\b)(?!.*\b(?:not|or)\b)"
)
_BELOW_ZERO = re.compile(
  r"(?<=[0-9]) *(?:degrees? *)?(?:celsius|fahrenheit|[CF])? *below\s+"
  r"(?:0|zero)\b",
  re.IGNORECASE,
)
_CORRECTION = re.compile(
  r"[,.;:!?-]\s*(?:(?:no|wait|oops|sorry|i mean|correction|scratch that"
  r"|make that|actually|or rather|hold on|hmm|nein|perd[oó]n)\b[\s,.!:;-]*)+",
  re.IGNORECASE,
)
_IS = re.compile(
  r"(?<![<>!=:])=+(?!=)|:=|\\(?:equiv)(?![A-Za-z])"
  r"|\b(?:is|are|was|were|be|equals?|makes?|gives?|yields?|totals|becomes?|gets?"
  r"|es|son|ist|sind|est|sont|são|é|è|sono|равно)\b"
  r"|[是为為]|です",
  re.IGNORECASE,
)
EQUALITY = re.compile(r"(?<![<>!=:])=+(?!=)")
_ASKS = re.compile(r"\W*is (?:it|this|that|the answer)\b", re.IGNORECASE)
_VARIABLE = re.compile(r"\s*\\?[A-Za-z](?:_\{?\w{1,3}\}?)?\s*")
# A multiple or a power of a variable: 2x, -x, x^2.
UNSOLVED = re.compile(
  r"(?:^|[\s=])(?:-|-?[0-9]+(?:/[0-9]+)?\s?\*?\s?)[a-z]\s*$"
  r"|(?:^|[\s=])[a-z]\s?\^\s?\{?\s?[0-9]\s?\}?\s*$"
)
# The formula at the end of a side, and the unknowns of it.
_MATHEMATICS = re.compile(
  r"(?:[-+*/^|(){}\s0-9.]|\\[a-z]+|(?<![A-Za-z])(?:[kn-z]|log|ln)(?![A-Za-z]))*$"
)
_CALL = re.compile(r"[A-Za-z]'?\s?\([a-z](?:, ?[a-z])*\)")  # f(x)
_UNKNOWN = re.compile(r"(?<![A-Za-z\\])[kn-z](?![A-Za-z_]|\s*\(|\s*[0-9])")
_POWER = re.compile(r"\s*([a-z])\s?\^\s?\{?\s?[0-9]\s?\}?\s*")
# 36 because 6 is the side.
REASON = re.compile(
  r"\s(?:because|(?<!and )(?<!so )since)\s(?!.*\bbut\b)", re.IGNORECASE
)
# What may follow "5 is": nothing that judges it otherwise.
_IS_THE_ANSWER = re.compile(
  r"\W*(?:(?:the|my|our|your|a|indeed|thus|therefore|clearly|final|correct|right"
  r"|answer|result|solution|total|sum|number|amount|value|of|clips|here|true"
  r"|what|we|want|wanted|need|needed|he|she|they|has|have|left|sold|asked|for"
  r"|how|many|much|that|it)\b\W*)*",
  re.IGNORECASE,
)
_SEPARATED = re.compile(
  r"[;,&](?!\s*(?:so|thus|hence|then|therefore|which|giving)\b)|\band\b|\bor\b|\n"
)
_EXTREME = re.compile(r"\b(?:the|its) (?:minimum|maximum|min|max)\s*$", re.I)
_NAMED = re.compile(
  r"(\w+)\s+(of|to)(?:\s+(?:the|these|those))?\s*$", re.IGNORECASE
)
_SUM = re.compile(r"[-+0-9., ]+")
NUMBER_ALONE = re.compile(r"[-0-9., ]+")
# What may be attached to a number, of one or two letters: 5m, but not 5x.
_ATTACHED = re.compile(
  "[ghlmsACFJKLNVW]|Hz|hp|hr|ft|nd|rd|st|th|(?:am|cm|dm|gb|GB|ha|in|kb|kB|KB|Mb|Gb"
  "|km|KM|kg|Kg|KG|kw|kW|lb|mb|MB|mg|mi|mL|ml|mm|ms|oz|pm|PM|AM|sq|yd)"
)
_LETTERS = frozenset("aghlmsCFJLNVW")  # One-letter words: "5 a day", "5 m".
_CODES = re.compile(
  r"(?:US|USD|EUR|GBP|INR|JPY|CNY|RMB|AUD|CAD|CHF|SGD|HKD|Rs|R|A|C|HK|S|NT|MX"
  r"|kr|K|N|No|nr|x)",
  re.IGNORECASE,
)


@functools.lru_cache(_CACHE_SIZE)
def number(text: str) -> str | None:
  r"""Writes the number that a text means in its one normal form.

  | text                                          | number         |
  |-----------------------------------------------|----------------|
  | 1,560  1 560  1'560  1_560  1,560.00          | 1560           |
  | 12,34,567  1.234.567  1.234.567,0             | 1234567        |
  | 007  156.0  .5  1e3  3 x 10^2                 | 7 156 1/2 1000 300 |
  | \frac12  1 1/2  2\frac{1}{2}  0.\overline{6}  | 1/2 3/2 5/2 2/3 |
  | minus 5  -$5  5 degrees below zero            | -5             |
  | forty-two  two thirds  3 million  12k         | 42 2/3 3000000 12000 |
  | $50  50%  50 clips  50cm  50 km/h  Rs. 50     | 50             |
  | x = 5  5 = x  2+3 = 5  5 = 2+3  half of 10 is 5 | 5            |
  | 5 dollars and 50 cents                        | 11/2           |
  | five (5)  5 per two  6, no, 5                 | 5              |
  | 5, not 6  not 6 but 5  5: 2 red and 3 blue    | 5              |
  | 5,50 €  R$ 5,50  (11)/2                       | 11/2           |
  | 5 or 6  5, 6  5-6  between 5 and 6  x=5, y=6  | none: several  |
  | not 5  5 is wrong  less than 5  twice 5       | none: changed  |
  | 5 dozen  5 squared  5x  a factor of 5         | none: changed  |
  | 48+24  10 times 5  2x = 5  x^2 = 5  x/2 = 5   | none: not worked out |
  | 5:30  1,56  1.2.3  v1.5  5-day  1/0  nan  1e999 | none         |

  Args:
    text: at most 200 characters, with markup or without.

  Returns:
    A whole number, or a fraction in lowest terms such as "-1/2"; or None.
  """
  match = PLAINEST.fullmatch(text)
  if match:
    return str(int(match[1]))
  if len(text) > MAX_ANSWER:
    return None
  value = _value(plain(text))
  return None if value is None else str(value)


def plain(text: str) -> str:
  """Writes a text in words, digits and few signs, for the readers below."""
  if "m" in text:
    text = _MONEY_MILLIONS.sub(r"\1M", text)
  text = normalisation.normalise(text)
  if "," in text:
    text = _DECIMAL_COMMA.sub(r"\1.\2", _DECIMAL_PRICE.sub(r"\1.\2", text))
  text = _MONEY.sub(" ", text)
  if "\\" in text:
    text = _ABOUT.sub(" ", text)
    text = _UNIT_FRACTION.sub(r" \1/\2", text)
    text = _FRACTION.sub(_written_fraction, text)
    text = _TIMES.sub("*", text)
    text = _ALIGNMENT.sub(" ", text)
  elif text.startswith("~"):
    text = text[1:]
  if "." in text or "'" in text:
    text = _CLOCK.sub("hours", text)
    text = _ABBREVIATED.sub(r"\1 ", text)
  if "^" in text:
    text = _UNIT_POWER.sub("", text)
  if ")/" in text:
    text = _BRACKETED.sub(r"\1/\2", text)
  if "/-" in text or ",-" in text or ".-" in text:  # Rs 50/-, 50,- €.
    text = _NO_CENTS.sub("", text)
  text = words.with_digits(text)
  if "cent" in text or "pence" in text:
    text = _CENTS.sub(lambda match: f"{match[1]}.{match[2]:0>2}", text)
  return _PER.sub(" ", text) if "p" in text.lower() else text


def without_labels(text: str) -> str:
  """Removes the number of a step: "Step 2: 42" says 42."""
  return _LABEL.sub(" ", text)


def _written_fraction(match: re.Match) -> str:
  minus, top, short_top, bottom, short_bottom = match.groups("")
  return f" {minus}{top or short_top}/{bottom or short_bottom} "


def _value(text: str) -> fractions.Fraction | None:
  """Reads a plain text: what is said last, of what it says is equal."""
  parts = _CORRECTION.split(text)
  if len(parts) > 1:
    if not literals.QUANTITY.search(parts[-1]) or not _DIGITS.search(parts[0]):
      return None
    text = parts[-1]
  text = _NOT_BUT.sub("", text)
  text = _BELIEVED.sub("", _RATHER.sub("", text))
  text, num_below = _BELOW_ZERO.subn(" ", text)
  if words.REFUSED.search(text) or words.DATE.search(text) or _ASKS.match(text):
    return None
  text = without_labels(text)
  text = text.lstrip(" :=#*")
  reason = REASON.search(text)
  if reason and _DIGITS.search(text[: reason.start()]):
    text = text[: reason.start()]
  sides = _IS.split(text)
  if len(sides) == 1:
    value = single(text)
  else:
    value = _of_sides(sides, text)
  return -value if num_below and value is not None else value


def _of_sides(sides: list[str], text: str) -> fractions.Fraction | None:
  """Reads the last side of an equality with a number."""
  equal = EQUALITY.split(text)
  if any(_SEPARATED.search(_grouped_away(side)) for side in equal[1:-1]):
    return None  # x = 41, y = 42.
  last = len(sides) - 1
  while last > 0 and not _DIGITS.search(sides[last]):
    last -= 1
  rest = sides[last + 1 :]
  if len(sides) == 2 and last == 0 and _VARIABLE.fullmatch(rest[0]):
    return single(sides[0])  # 5 = x.
  if (
    last
    and is_unsolved(sides[last - 1], sides[last])
    and f"{sides[last - 1]}=" in text
    and not (last > 1 and _is_power_of_another(*sides[last - 2 : last]))
  ):
    return None  # 2x = 5.
  if not all(_IS_THE_ANSWER.fullmatch(side) for side in rest):
    return None
  value = single(sides[last])
  if value is None:
    # 72 = 48 + 24.
    if last and _SUM.fullmatch(sides[last]) and not rest:
      first = single(sides[last - 1])
      return first if first is not None and first == _sum(sides[last]) else None
    return None
  before = sides[last - 1] if last else ""
  other = single(before) if NUMBER_ALONE.fullmatch(before) else None
  if other is not None and other != value:
    return None  # 5 = 6.
  before = _EXTREME.sub("", before)
  if not _DIGITS.search(before) and words.CHANGES_BEFORE.search(
    before.split(",")[-1][-12:]
  ):
    return None
  return value


def is_unsolved(side: str, result: str) -> bool:
  """Tells whether a side is 2x, x^2 or x + 1, but not 60 m of "60 m = 60 m"."""
  match = UNSOLVED.search(side)
  if match is None:
    formula = _MATHEMATICS.search(_CALL.sub(" ", side))[0].strip()
    unknowns = _UNKNOWN.findall(formula)
    return len(unknowns) == 1 and unknowns[0] != formula
  unit = match[0].rstrip()[-1]
  return not re.match(rf"\s*[0-9][0-9.,]* ?{re.escape(unit)}\b", result)


def _is_power_of_another(name: str, power: str) -> bool:
  """Tells whether a side is a power, and the one before it another letter."""
  match = _POWER.fullmatch(power)
  return (
    match is not None
    and name.strip() not in ("", match[1])
    and (_VARIABLE.fullmatch(name) is not None)
  )  # A = s^2 = 36.


def _sum(text: str) -> fractions.Fraction | None:
  """Adds plain numbers."""
  terms = re.findall(r"([-+]?)\s*([0-9][0-9,]*(?:\.[0-9]+)?)", text)
  if len(terms) > 50 or max((len(term) for _, term in terms), default=0) > 30:
    return None
  total = fractions.Fraction(0)
  for sign, term in terms:
    value = fractions.Fraction(term.replace(",", ""))
    total += -value if sign == "-" else value
  return total


def _grouped_away(text: str) -> str:
  return re.sub(r"(?<=[0-9]),(?=[0-9]{3})", "", text)


def single(text: str) -> fractions.Fraction | None:
  """Reads a plain text without equality signs that has one number."""
  text = text.strip()
  found = literals.quantities(text)
  if len(found) == 2:
    text, found = _without_repetition(text, found)
  elif len(found) > 2 and _is_sum_of_rest(text, found):
    text, found = (
      text[: found[1].start].rpartition(":")[0]
      or (text[: found[1].start].rpartition("(")[0]),
      found[:1],
    )
  if len(found) != 1 or found[0].value is None:
    return None
  value = found[0].value
  before, behind = text[: found[0].start], text[found[0].end :]
  sign, before = _sign(before)
  if sign is None or not _may_precede(before):
    return None
  factor, value, behind = _factor(behind, value, text[found[0].start :])
  if factor is None or not _may_follow(behind):
    return None
  return sign * value * factor


def _is_sum_of_rest(text: str, found: list[literals.Quantity]) -> bool:
  """Tells whether a number is followed by what it is made of."""
  values = [one.value for one in found]
  return (
    None not in values
    and values[0] == sum(values[1:])
    and _MADE_OF.match(text, found[0].end, found[1].start) is not None
  )


def _without_repetition(
  text: str, found: list[literals.Quantity]
) -> tuple[str, list[literals.Quantity]]:
  """Takes "5 (5)" for one number."""
  first, second = found
  between, rest = text[first.end : second.start], text[second.end :]
  if (
    first.value == second.value
    and _SAME_AGAIN.fullmatch(between)
    and ("(" not in between or re.match(r"[^()]*\)", rest))
    and not words.CHANGES_BEHIND.search(between)
  ):
    behind = rest.partition(")")[2] if "(" in between else rest
    text = text[: second.start].rstrip(" (") + " " + behind
    return text, literals.quantities(text)
  return text, found


def _sign(before: str) -> tuple[int | None, str]:
  """Splits the sign off what precedes a number; None if it has two."""
  stripped = before.rstrip(" (\"'[{")
  sign = 1
  if stripped.endswith(("-", "+")):
    is_minus = stripped[-1] == "-"
    is_spaced = before != stripped
    stripped = stripped[:-1]
    is_glued = stripped[-1:] not in ("", " ", "(", '"', "'", ":", "\n", "[")
    word = stripped.split()[-1] if stripped.split() else ""
    if is_glued or word.rstrip("(").endswith(("-", "+", "*", "/", "^")):
      return None, before
    if is_minus:
      if is_spaced and word:
        if len(word) < 3 or not word[-1].isalpha():
          return None, before  # x - 5.
      else:
        sign = -1
    elif word:
      return None, before
    return sign, stripped
  match = re.search(r"(?:^|\W)(?:minus|negative)\s*$", stripped, re.IGNORECASE)
  if match:
    rest = stripped[: match.start()]
    if words.CHANGES_BEFORE.search(rest):
      return None, before
    return -1, rest
  return 1, before


def _may_precede(before: str) -> bool:
  """Tells whether a text before a number leaves its meaning."""
  if not before:
    return True
  if words.CHANGES_BEFORE.search(before):
    return False
  if re.search(r"[\\^_|%+*/√]|\.\.\s*$|!$", before):
    return False
  last = before[-1]
  if re.search(r"\w\s?[(\[{]$", before) and not before[-2].isspace():
    return False  # f(7).
  named = re.search(
    r"(\w+)\s+(of|to)(?:\s+(?:the|these|those))?\s*$", before, re.IGNORECASE
  )
  if named and not words.NAMES[named[2].lower()].fullmatch(named[1]):
    return False
  if last.isspace() or last in "([{\"':,;!?":
    word = (before.rstrip(" ([{\"'").split() or [""])[-1]
    if last.isspace() and len(word) == 1 and word.isascii() and word.isalpha():
      return _CODES.fullmatch(word) is not None and word not in "xXCKN"
    return True
  if last == "." or last == "#":
    return last == "#" or before.endswith(". ")
  word = re.search(r"[^\W\d_]+$", before)
  if word:  # Attached letters: USD5, but not v1.5.
    return (
      not word[0].isascii()
      or _CODES.fullmatch(word[0]) is not None
      and (len(word[0]) > 1 or word[0] in "R")
    )
  return last in ")>"


def _factor(
  behind: str, value: fractions.Fraction, text: str
) -> tuple[int | None, fractions.Fraction, str]:
  """Splits a magnitude and an ellipsis off what follows a number."""
  if behind.startswith(".."):
    dots = len(behind) - len(behind.lstrip("."))
    if text[: len(text) - len(behind)].endswith("."):
      behind = behind[dots:]
      return 1, value, behind
    match = literals.DOTTED.match(text)
    if not match:
      return None, value, behind
    value = literals.repeated(match[1], match[2], match[3])
    return 1, value, behind[dots:]
  match = re.match(r"([A-Za-z]{1,3})(?![A-Za-z])", behind)
  if match and match[1] in words.SUFFIXES:
    return words.SUFFIXES[match[1]], value, behind[match.end() :]
  match = re.match(
    r"[\s-]*(hundred|thousand|million|billion|trillion|lakh|crore)\b(.*)",
    behind,
    re.IGNORECASE | re.DOTALL,
  )
  if match:
    if re.match(
      r"[\s-]*(?:hundred|thousand|million|billion|trillion)", match[2], re.I
    ):
      return None, value, behind
    return words.MAGNITUDES[match[1].lower()], value, match[2]
  match = re.match(r"\s?([万萬亿億])(?![多余餘几幾十千百])", behind)
  if match:
    return words.CHINESE[match[1]], value, behind[match.end() :]
  match = re.match(r"\s+([A-Z]|[bmt]n)\b(?![&'])", behind)
  if match and match[1] in words.SUFFIXES:
    return words.SUFFIXES[match[1]], value, behind[match.end() :]
  return 1, value, behind


def _may_follow(behind: str) -> bool:
  """Tells whether a text behind a number leaves its meaning."""
  stripped = behind.strip(" .,;:!?()[]{}\"'*%#")
  if not stripped:
    return not re.match(r"\s*[-+*/^_]", behind)
  if words.CHANGES_NEXT.match(behind) or words.CHANGES_BEHIND.search(behind):
    return False
  head = behind[0]
  if head.isalpha() and head.isascii():
    word = re.match(r"[A-Za-z]+", behind)[0]
    if len(word) < 3 and not _ATTACHED.fullmatch(word):
      return False
    if re.match(r"[A-Za-z]+[0-9]", behind):
      return False
  body = behind.lstrip(" .,;:!?()[]{}\"'%#")
  if re.match(r"\s*[-+*^_:]", behind) and not re.match(
    r"\s*[:]\s|\s+-\s+[a-z]{2}", behind
  ):
    return False
  if re.match(r"\s*/(?!\s*[^\W\d_])", behind):
    return False
  if re.search(r"[\\^_|√{}]|[-+*/]\s*$", body):
    return False
  if re.search(r"(?<![^\W\d_])\s*[+*]\s*\S", body):
    return False
  word = re.match(r"[^\W\d_]+", body)
  if word and len(word[0]) == 1 and not head.isalpha():
    if word[0] == "a" and not re.match(r"a\s+\w", body):
      return False
    return not word[0].isascii() or word[0] in _LETTERS
  return True
