r"""Brings the many ways to write one answer into one form.

Everything here is linear in the length of the text, which is bounded, and no
text is ever evaluated.
"""

import functools
import re
import unicodedata

# Signs of money, which mean nothing to a number.
_MONEY = "$£€¥₹₩₽₺₫₦฿¢₴₪₱₡₲₵₭₮₸"
_BLANKS = "\u00a0\u1680\u2000-\u200a\u202f\u205f\u3000"
_INVISIBLE = re.compile(
  "[\u00ad\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufe00-\ufe0f"
  "\ufeff\u2705\u2714\u2713]"
  # Pictures, but not the cross.
  "|[\u2600-\u2712\u2728-\u274b\u274f-\u275a\u2795-\u2797\u27b0-\u27bf"
  "\U0001f000-\U0001faff]"
)
_ODD_BLANK = re.compile(f"[{_BLANKS}]")
_SUPERSCRIPTS = {
  **dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿ", "0123456789+-()n", strict=True)),
}
_SUBSCRIPTS = dict(zip("₀₁₂₃₄₅₆₇₈₉", "0123456789", strict=True))
_RAISED = re.compile(f"[{''.join(_SUPERSCRIPTS)}]+")
_LOWERED = re.compile(f"[{''.join(_SUBSCRIPTS)}]+")
_VULGAR = re.compile("[¼-¾⅐-⅞↉]")
_RAISED_OVER = re.compile("([⁰¹²³⁴-⁹]{1,9})[⁄/]([₀-₉]{1,9})")
_WIDE_GROUP = re.compile(r"(?<=[0-9０-９])，(?=[0-9０-９]{3}(?![0-9０-９]))")
_SIGNS = str.maketrans(
  {
    **dict.fromkeys("−–‐‑‒﹣", "-"),
    **dict.fromkeys("—―", ", "),
    **dict.fromkeys("“”„«»「」『』", '"'),
    **dict.fromkeys("‘’‛ʼ", "'"),
    **dict.fromkeys("✗✘❌", " wrong "),
    **dict.fromkeys("→⇒⟹⟶∴➔➜➝➞➡", "="),
    "⁄": "/",
    "∕": "/",
    "。": ". ",
    "、": ", ",
    "，": ", ",
    "；": "; ",
    "：": ": ",
    "…": "...",
    "⋅": "*",
    "·": "*",
    "∙": "*",
    "∗": "*",
    "×": "*",
    "✕": "*",
    "∶": ":",
    "≠": "\\neq ",
    "≤": "\\leq ",
    "≥": "\\geq ",
    "≈": "\\approx ",
    "≃": "\\approx ",
    "±": "\\pm ",
    "÷": "\\div ",
    "∞": "\\infty ",
    "π": "\\pi ",
    "√": "\\sqrt ",
    "∪": "\\cup ",
    "∩": "\\cap ",
    "∈": "\\in ",
    "¿": "",
    "¡": "",
  }
)
_END_TOKENS = re.compile(
  r"<\|[A-Za-z_ ]{1,40}\|>|</?s>|<(?:eos|bos|pad|end_of_turn|start_of_turn)>"
  r"|\[/?INST\]|<｜[^<>]{1,40}｜>"
)
_TAGS = re.compile(
  r"</?(?:a|b|i|u|p|em|br|div|sub|code|mark|span|strong|center|answer|final|result|think)"
  r"\s*/?>",
  re.IGNORECASE,
)
_POWER_OF_CODE = re.compile(r"(?<=[0-9)])\*\*(?=[0-9(-])")
_EMPHASIS = re.compile(
  r"\*\*|__|`|(?<![\w*)\\])\*(?=[^\s*])|(?<=[^\s*])\*(?![\w*(])"
)
_STYLED = re.compile(
  r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|math(?:rm|bf|it|sf|tt|bb|cal)"
  r"|mbox|hbox|fbox|boxed|operatorname|bm|boldsymbol|emph|underline|ensuremath)"
  r"\s*\{([^{}]*)\}"
)
# Within a number: 1,\!560 and 1\,560 and 1{,}560.
_GROUPED = re.compile(
  r"(?<=,)\\!\s*|\\!(?=,)|(?<=[0-9])(?:\\[,;: ]|~)(?=[0-9]{3}(?![0-9]))"
)
_SPACE = re.compile(
  r"(?<!\\)\\[,:;!> ]|~"
  r"|\\(?:en(?:space|skip)|(?:thin|med|thick)space|displaystyle|textstyle"
  r"|pounds|euro|yen|Large|large|huge|Huge|bf|rm|it|limits|phantom\{\})(?![A-Za-z])"
)
_WIDE = re.compile(
  r"\\q?quad(?![A-Za-z])|\\[hm]space\*?\s*\{[^{}]*\}|(?<!\\)\\\\(?!begin|end)"
)
_COLOUR = re.compile(r"\\(?:text)?color\s*\{[^{}]*\}")
_DEGREES = re.compile(
  r"(?<!\s)\s*(?:\^\s*(?:\{\s*)?\\circ(?:\s*\})?|\\(?:degree|textdegree)\b)|°"
)
_DELIMITERS = re.compile(
  r"\\(?:left|right|[bB]igg?[lrm]?)(?![A-Za-z])\.?|\\[\[\]()]"
)
_ROOT_SIGN = re.compile(r"√\s*(?:([0-9]+(?:\.[0-9]+)?)|\(([^()]*)\))")
_ROOT = re.compile(r"(?<![\\\w])sqrt\s*\(([^()]*)\)")
_OVER = re.compile(r"\{?([^{}\\]{1,40})\\over(?![a-z])\s*([^{}\\]{1,40})\}?")
_ARROW = re.compile(
  r"[-=]+>|\\(?:to|(?:long)?rightarrow|Rightarrow|implies|therefore)(?![A-Za-z])"
)
# GSM8K's calculator notes: <<9*2=18>>18.
_NOTE = re.compile(r"<<[^<>\n]{0,100}>>(?=\$?[0-9])|<<[^<>=\n]{0,100}=|>>")
_PAIRS = (("(", ")"), ("{", "}"), ("[", "]"), ("\\{", "\\}"), ("<", ">"))


def cut_at_end_token(text: str) -> str:
  """Cuts a response before the first written end token that has text before."""
  if not (  # To be quick.
    "|>" in text
    or "s>" in text
    or "pad>" in text
    or "_turn>" in text
    or "INST]" in text
    or "｜>" in text
  ):
    return text
  for match in _END_TOKENS.finditer(text):
    before = text[: match.start()]
    if before.strip() and not _END_TOKENS.sub("", before).isspace():
      return _END_TOKENS.sub("", before)
  return _END_TOKENS.sub(" ", text)


def characters(text: str) -> str:
  """Writes characters of one meaning as one: full-width, minus, superscripts.

  Returns:
    A text whose digits, signs and punctuation are ASCII or LaTeX.
  """
  if text.isascii():
    return text
  text = _INVISIBLE.sub("", text)
  text = _ODD_BLANK.sub(" ", text)
  text = _VULGAR.sub(
    lambda m: " " + unicodedata.normalize("NFKC", m[0]) + " ", text
  )
  text = _RAISED_OVER.sub(
    lambda m: " " + unicodedata.normalize("NFKC", f"{m[1]}/{m[2]}") + " ", text
  )
  text = _WIDE_GROUP.sub(",", text)
  for pattern, table, sign in (
    (_RAISED, _SUPERSCRIPTS, "^"),
    (_LOWERED, _SUBSCRIPTS, "_"),
  ):
    text = pattern.sub(
      lambda m, table=table, sign=sign: (
        f"{sign}{{{''.join(table[c] for c in m[0])}}}"
      ),
      text,
    )
  if "√" in text:
    text = _ROOT_SIGN.sub(r"\\sqrt{\1\2}", text)
  text = text.translate(_SIGNS)
  if any("\uff01" <= c <= "\uff5e" or c in "％＄￥￡￦" for c in text):
    text = "".join(
      unicodedata.normalize("NFKC", c)
      if "\uff01" <= c <= "\uff5e" or c in "￥￡￦"
      else c
      for c in text
    )
  return re.sub("([0-9])\u0305", r"\\overline{\1}", text)


@functools.lru_cache(2**14)
def normalise(text: str) -> str:
  r"""Strips a short text of markup, down to its words and mathematics.

  | written                                | becomes                  |
  |----------------------------------------|--------------------------|
  | full-width digits, odd minuses, blanks | ASCII                    |
  | x², x₂, ½, ×                           | x^{2}, x_{2}, 1/2, *     |
  | √, π, ≤, sqrt(2)                       | \sqrt, \pi, \leq, \sqrt{2} |
  | zero-width characters, pictures        | nothing; a cross: wrong  |
  | **bold**, `code`, <b>, </s>            | what is inside           |
  | 2**3                                   | 2^3                      |
  | $x$, \(x\), \[x\], \text{x}            | x                        |
  | \left(, \quad, 1{,}560, 1\,560         | (, blanks, 1,560, 1 560  |
  | \dfrac, \tfrac, \cfrac                 | \frac                    |
  | 90^\circ, 50\%                         | 90, 50%                  |
  | ->, \Rightarrow                        | =                        |
  | blanks, quotes, full stops around it   | nothing                  |

  Args:
    text: an answer of at most a few hundred characters.

  Returns:
    The text in one notation, for `numbers.number` and for comparison.
  """
  text = characters(text)
  if "<<" in text:
    text = _NOTE.sub("", text)
  if "<" in text or "[" in text:
    text = _TAGS.sub(" ", _END_TOKENS.sub(" ", text))
  if "*" in text or "_" in text or "`" in text:
    text = _POWER_OF_CODE.sub("^", text)
    text = _EMPHASIS.sub("", text)
  text = text.replace("{,}", ",").replace("=/=", "\\neq ")
  if "\\" in text or "~" in text:
    text = _latex(text)
  if "°" in text:
    text = _DEGREES.sub(" ", text)
  if "sqrt" in text:
    text = _ROOT.sub(r"\\sqrt{\1}", text)
  if ">" in text or "\\" in text:
    text = _ARROW.sub(" = ", text)
  return _outer(text)


def _latex(text: str) -> str:
  """Strips a text of LaTeX that is only for looking."""
  text = _GROUPED.sub(
    lambda m: " " if m[0][:2] in ("\\,", "\\;", "\\:", "\\ ", "~") else "", text
  )
  text = text.replace("\\$", "$").replace("\\%", "%").replace("\\#", "#")
  text = text.replace("\\&", "&")
  text = text.replace("\\langle", "(").replace("\\rangle", ")")
  if "color" in text:
    text = _COLOUR.sub("", text)
  text = _SPACE.sub(" ", text)
  if "\\begin" not in text:  # The rows of a matrix.
    text = _WIDE.sub("  ", text)
  text = re.sub(r"\\[dtc]frac(?![A-Za-z])", r"\\frac", text)
  text = text.replace("\\colon", ":").replace("\\varnothing", "\\emptyset")
  if "\\over" in text:
    text = _OVER.sub(r"\\frac{\1}{\2}", text)
  text = _DEGREES.sub(" ", text)
  text = _DELIMITERS.sub("", text)
  for _ in range(4):
    before = text
    text = _STYLED.sub(r" \1 ", text)
    if text == before:
      break
  return text


def _outer(text: str) -> str:
  """Strips what stands around an answer."""
  for _ in range(4):
    before = text
    text = text.strip(" \t\r\n_`\"'#&").lstrip("=:,;?")
    if not text.endswith(".."):
      text = text.rstrip(",;:?.")
    text = text.strip("$")
    for opening, closing in _PAIRS:
      inner = text[len(opening) : -len(closing)]
      if (
        len(text) > len(opening + closing)
        and text.startswith(opening)
        and text.endswith(closing)
        and opening not in inner
        and closing not in inner
        and "," not in inner
      ):
        text = inner
    if text == before:
      break
  return text.strip()
