r"""Finds where a response says its final answer."""

import re
from typing import NamedTuple

from rljax.tasks.answers import (
  clauses,
  normalisation,
  numbers,
  surroundings,
  words,
)

# Bounds on what is searched of a response; its marks are found anywhere.
MAX_READ = 2**14
_MAX_MARKS = 32  # Headings, tried from the last one back.
_MAX_LINE = 2**13
_MIN_QUESTION = 10  # A shorter one may stand in any text.

_TAG = re.compile(r"<(?:final[_ ]?)?answer>", re.IGNORECASE)
_CLOSED = re.compile(r"</(?:final[_ ]?)?answer>", re.IGNORECASE)
_ANSWER = re.compile(r"answer", re.IGNORECASE)
_ANSWER_IS = re.compile(
  r"answer(?:[*_\"'}\])]*\s*(?::|=|\s-\s)"
  r"|[^.\n:=?!]{0,60}?\b(?:is|was|are|would be|should be|will be|equals"
  r"|(?:comes|works) (?:out )?to|turns out to be)\b)",
  re.IGNORECASE,
)
_ANSWER_NUMBER = re.compile(r"answer[*_]*\s+(?=\$?-?[0-9])", re.IGNORECASE)
_ANSWER_ELSEWHERE = re.compile(
  r"(?:\b(?:respuesta|resposta|risposta|r[ée]ponse|antwort|antwoord|svaret"
  r"|cevap|jawabannya|jawaban|ответ|відповідь)\b(?: finale?)?"
  r"|答案|答え|答|정답은|정답|답은|답)"
  r"[*_]*\s*(?::|=|：|\b(?:es|est|ist|é|è|is|adalah)\b|为|是|為|は|—|)",
  re.IGNORECASE,
)
_PLAIN_LINE = re.compile(
  r"(?:[Ss]o,? |[Tt]hus,? |[Tt]herefore,? )?(?:[Tt]he )?(?:[Ff]inal )?"
  r"[Aa]nswer(?: is|:| is:) \$?(-?[0-9]{1,15})\.?"
)
_HEADING = re.compile(
  r"[\s*_#]*(?:[0-9]{1,2}[.:)]\s+[*_]*[A-Za-z]"
  r"|(?:step|part|case|problem|question|method|example)\s*[0-9])",
  re.IGNORECASE,
)
_ANSWER_HEADING = re.compile(
  r"[\s*_#:]*(?:(?:the|my|our|your|final|short|correct|so|in)\s+)*"
  r"(?:answer|result|conclusion|solution|final|total|summary|therefore"
  r"|respuesta|antwort|r[ée]ponse|答案|答)",
  re.IGNORECASE,
)
# The most common ones, to be quick.
_ANNOUNCED = frozenset(
  f"{start}answer{end}"
  for start in ("", "the ", "final ", "the final ", "so the ", "so, the ")
  for end in (":", " is", " is:")
)
_DENIED = re.compile(
  r"\b(?:not|never|wrong|incorrect|false|if|whether|doubt|unless|refuse|decline"
  r"|(?:second|third|another|alternative) answer"
  r"|suppos(?:e|ing|edly)|assum(?:e|es|ed|ing)|imagine"
  r"|cannot)\b|n't\b"
  r"|\b(?:without|(?:had|were) (?:i|he|she|it|we|they|there))\b.*\bwould\b",
  re.IGNORECASE,
)
_TURNED = re.compile(r"\b(?:but|however|no|wait|so|anyway)\b", re.IGNORECASE)
# Before an answer that replaces the one behind "####".
_CONCLUDES = re.compile(
  r"\b(?:so|thus|hence|therefore|but|however|wait|no|actually|sorry|oops"
  r"|correct(?:ed|ion)?|final|real|actual|my|instead|wrong|mistake|error)\b",
  re.IGNORECASE,
)
_IS = re.compile(r"\b(?:is|was)\s(?!.*\b(?:is|was)\s)")
_MARKUP = re.compile(r"^(?:[\s*_:$\"']|\\[\[(](?!\w))+")
_ABBREVIATED = re.compile(r"\b(Rs|approx|ca|No|i\.e|e\.g)\.\s")


# Where to look for the end of what a rule has found.
_MARKS = {
  "hashes": "####",
  "tag": "nswer>",
  "boxed": "boxed",
  "answer_is": "nswer",
}
_STRUCK_OUT = re.compile(r"~~[^~\n]{1,200}~~")
_ASKED = re.compile(r"[?？]|\b(?:question|problem|exercise)\b", re.IGNORECASE)
# No factor of a box: \text{So } and \begin{equation}, or another box.
_GROUP_BEFORE = re.compile(
  r"\\(?:text[a-z]{0,6}|math[a-z]{2}|f?boxed|fbox|begin)\s*\{[^{}]*\}[\s$]*$"
)
_BOXED_BARE = re.compile(r"(-?[0-9][0-9.,]{0,40})(?=[\s$.]|$)")
_BULLET = re.compile(r"\n[ \t]*[-*•+][ \t]+")


class Extract(NamedTuple):
  """Holds what a response gives as its answer.

  Attributes:
    text: None if there is nothing, or what is there is taken back.
    rule: what found it; None if nothing did.
  """

  text: str | None
  rule: str | None


def extract(
  response: str,
  *,
  question: str = "",
  turn: str = "",
  is_strict: bool = False,
  is_number: bool = True,
) -> Extract:
  r"""Returns the part of a response that says its final answer.

  The first rule that finds its mark decides, even if nothing usable follows it
  (a truncated "#### " has no answer); of several marks of a kind, the last.

  | rule      | mark                          | the answer is            |
  |-----------|-------------------------------|--------------------------|
  | hashes    | "####"                        | the rest of its line     |
  | tag       | <answer>                      | up to </answer>          |
  | boxed     | \boxed{ or \fbox{             | up to its closing brace  |
  | answer_is | "answer is", "Answer:", "答案" | the sentence behind it   |
  | number    | none: the last digit          | its clause               |
  | line      | none, and no number is asked  | a short last line        |

  Within hashes and tags, the next marks are looked for again.

  | before that                              | what is read              |
  |------------------------------------------|---------------------------|
  | "#### Step 3: done", "#### Method"       | no answer: an earlier mark |
  | "#### ", "#### Final answer:" above text | the text below            |
  | <think> ... </think>                     | what follows              |
  | <\|im_end\|>, </s>                       | what precedes             |
  | the question, asked again before any answer | what follows           |
  | the question, or `turn`, behind an answer | what precedes            |
  | <think> that stays open, ~~struck out~~  | nothing of it             |
  | "Answer:" above a list of several numbers | the last one             |

  | what is there                                    | text |
  |--------------------------------------------------|------|
  | \boxed{5} or \boxed{6}; \boxed{5} \boxed{6}      | None |
  | not \boxed{5}; \boxed{5} is wrong                | None |
  | I do not think that the answer is 5              | None |
  | #### 5 ... So the answer is 6.                   | None |
  | \boxed{5} ... That is wrong. It is 6.            | None |
  | 4 or<line feed>5; 1. 2. 3.; 6? 5? I do not know. | None |

  Args:
    response: text of any length.
    question: what was asked.
    turn: what precedes the next question, if a model asks one: "Question:".
    is_strict: whether "####" is the only mark.
    is_number: whether a number is asked.
  """
  text = _own(response, question, turn)
  found = _after_hashes(text, is_strict, is_number)
  if is_strict:
    return found or Extract(None, None)
  found = found or _marked(text, is_number)
  if (
    found.text
    and found.rule in _MARKS
    and not text.endswith(found.text)
    and _is_withdrawn(text, found)
  ):
    return Extract(None, found.rule)
  return found


def _is_withdrawn(text: str, found: Extract) -> bool:
  """Tells whether what follows a marked answer gives another one."""
  place = text.rfind(_MARKS[found.rule or ""])
  place = text.find(found.text or "", max(place, 0))
  if place < 0:  # It is not there as it was written.
    return False
  place += len(found.text or "")
  behind = text[place : place + MAX_READ]
  if len(behind) < 8 or behind.isspace():
    return False
  value = numbers.number(found.text or "")
  if value is None:
    return False
  later = None
  if "boxed" in behind:
    later = _in_box(behind)
  elif "nswer" in behind:
    if found.rule == "hashes" and not _CONCLUDES.search(behind):
      return False  # A reply that runs on.
    later = _answer_is(behind)
  if later is not None and later.text and not _ASKED.search(behind):
    return numbers.number(later.text) not in (None, value)
  return surroundings.withdraws(behind, value)


def _own(response: str, question: str, turn: str) -> str:
  """Returns the part of a response that answers the question."""
  if "<" in response or "[" in response:
    response = normalisation.cut_at_end_token(response)
    place = response.rfind("</think>")
    if place >= 0:
      response = response[place + len("</think>") :]
    place = response.find("<think>")
    if place >= 0 and not _TAG.search(response, place):
      response = response[:place]
  if "~~" in response:
    response = _STRUCK_OUT.sub(" ", response)
  if len(question) >= _MIN_QUESTION:
    start, place = 0, response.find(question)
    while place >= 0:  # Each time, `start` moves on by the question's length.
      if _has_answer(response[start:place], turn):
        response = response[:place]
        break
      start = place + len(question)
      place = response.find(question, start)
    response = response[start:]
  if turn and turn in response:
    if response.lstrip(" \n*_").startswith(turn):
      response = response.lstrip(" \n*_").partition("\n")[2]
    response = f"\n{response}".partition(f"\n{turn}")[0]
  return response


def _has_answer(text: str, turn: str) -> bool:
  """Tells whether a text before the question has answered it."""
  if "\\boxed{" in text or "<answer>" in text:
    return True
  place = text.find("####")
  if place >= 0 and clauses.DIGIT.search(text[place:]):
    return True
  text = text.strip().removesuffix(turn)
  last = text[-numbers.MAX_ANSWER :]
  match = _ANSWER_IS.search(last)
  if match and clauses.DIGIT.search(last[match.end() :]):
    return True
  return (
    len(text) <= numbers.MAX_ANSWER and clauses.BARE.fullmatch(text) is not None
  )


def _line(text: str, start: int) -> str:
  end = text.find("\n", start)
  return text[start : len(text) if end < 0 else end]


def _after_hashes(
  text: str, is_strict: bool, is_number: bool
) -> Extract | None:
  """Reads behind "####"; None if there is none that is no heading."""
  place = text.rfind("####")
  for _ in range(_MAX_MARKS):
    if place < 0:
      return None
    line = _line(text, place + 4)
    if numbers.PLAINEST.fullmatch(line):  # The most common case.
      is_offered = place and clauses.is_offered(text, place)
      return Extract(None if is_offered else line.strip(), "hashes")
    if not line.strip(" #*_:"):
      above = text.rfind("\n", 0, place) + 1
      opening = text.find("####", above)
      between = text[opening:place].strip(" #")
      if between and place - opening < numbers.MAX_ANSWER:
        return Extract(between, "hashes")  # #### 72 ####
    if not _is_heading(line, text, place, is_strict, is_number):
      if not is_strict:
        inner = _inner(line, is_number)
        if inner is not None:
          return inner
      is_offered = clauses.is_offered(text, place)
      return Extract(None if is_offered else line.strip() or None, "hashes")
    below = text[place + 4 + len(line) :]
    if not is_strict and (not line.strip() or _ANSWER_HEADING.match(line)):
      if below.strip():
        found = _marked(below, is_number)
        if found.rule is not None:
          return found
      elif not line.strip() and text.rfind("####", 0, place) < 0:
        return Extract(None, "hashes")
    place = text.rfind("####", 0, place)
  return None


def _is_heading(
  line: str, text: str, place: int, is_strict: bool, is_number: bool
) -> bool:
  """Tells whether a line behind "####" is no answer."""
  if is_strict or len(line) > _MAX_LINE:
    return _HEADING.match(line) is not None
  below = place + 4 + len(line)
  if not line.strip():
    return bool(text[below:].strip()) or text.rfind("####", 0, place) >= 0
  if _HEADING.match(line):
    return True
  has_digit = (
    re.search("[0-9\\\\½-¾]", normalisation.characters(line)) is not None
  )
  if _ANSWER_HEADING.match(line) and not has_digit:
    return not words.has_number_word(line) and (
      is_number
      or line.rstrip(" *_").endswith(":")
      or bool(_ANSWER_HEADING.fullmatch(line.rstrip(" *_:")))
    )
  is_said = re.search("answer|result|total|[:=]", line, re.IGNORECASE)
  begins_with_word = re.match(r"[\s*_]*[A-Za-z]", line)
  if numbers.number(line) is not None and (is_said or not begins_with_word):
    return False
  if has_digit or not is_number:
    behind = text[below:]
    return "\\boxed" in behind or _answer_is(behind) is not None
  return bool(text[below:].strip())


def _inner(text: str, is_number: bool) -> Extract | None:
  """Reads the marks within what a mark has found."""
  if "boxed" in text or "fbox" in text:
    return _in_box(text)
  if _ANSWER.search(text) or not text.isascii():
    found = _answer_is(text, is_number)
    if found is not None and found.text:
      return found
  return None


def _marked(text: str, is_number: bool) -> Extract:
  """Reads behind the other marks."""
  if "<" in text:
    found = _in_tag(text, is_number)
    if found is not None:
      return found
  found = _in_box(text)
  if found is not None:
    return found
  found = _answer_is(text, is_number)
  if found is not None:
    return found
  if not is_number:
    line = text.strip().rpartition("\n")[2]
    if 0 < len(line) <= 60:
      said = None if _DENIED.search(line) else _IS.search(line)
      return Extract(line[said.end() :] if said else line, "line")
  clause = clauses.last_clause(text[-MAX_READ:])
  return Extract(clause, None if clause is None else "number")


def _in_tag(text: str, is_number: bool) -> Extract | None:
  if "nswer>" not in text and "NSWER>" not in text:
    return None
  opened = list(_TAG.finditer(text))
  if not opened:
    return None
  last = opened[-1]
  closed = _CLOSED.search(text, last.end())
  content = text[last.end() : closed.start() if closed else len(text)].strip()
  if len(opened) > 1:
    before = _CLOSED.search(text, opened[-2].end())
    if before and before.start() < last.start():
      earlier = text[opened[-2].end() : before.start()].strip()
      gap = text[before.end() : last.start()]
      if earlier != content and surroundings.is_hedge(gap):
        return Extract(None, "tag")
  if closed and surroundings.takes_back(text[closed.end() : closed.end() + 80]):
    return Extract(None, "tag")
  if len(content) > numbers.MAX_ANSWER or "\n" in content:
    found = _in_box(content) or _answer_is(content, is_number)
    if found is None:
      found = Extract(clauses.last_clause(content[-MAX_READ:]), "tag")
    return found._replace(rule="tag")
  inner = _inner(content, is_number)
  return Extract(content if inner is None else inner.text, "tag")


def braced(text: str) -> str:
  """Returns what is in the braces that begin a text; "" if they stay open."""
  text = text[: 2 * numbers.MAX_ANSWER].lstrip()
  depth = 0
  for i, character in enumerate(text):
    depth += (character == "{") - (character == "}")
    if depth == 0:
      return text[1:i]  # Empty if the text does not begin with a brace.
  return text if len(text) > numbers.MAX_ANSWER else ""


def _in_box(text: str) -> Extract | None:
  place, width = text.rfind("\\boxed"), 6
  other = text.rfind("\\fbox")
  if other > place:
    place, width = other, 5
  if place < 0:
    return None
  inner = braced(
    text[place + width : place + width + 2 * numbers.MAX_ANSWER + 9]
  )
  if not inner:
    bare = _BOXED_BARE.match(text, place + width)
    if bare:
      return Extract(bare[1], "boxed")
  start = text.find("{", place)
  end = start + len(inner) + 2
  previous = max(
    text.rfind("\\boxed", 0, place), text.rfind("\\fbox", 0, place)
  )
  if previous >= 0 and place - previous < 3 * numbers.MAX_ANSWER:
    opening = text.find("{", previous)
    earlier = braced(text[opening : opening + 2 * numbers.MAX_ANSWER + 9])
    closing = opening + len(earlier) + 2
    if (
      closing <= place
      and "".join(earlier.split()) != "".join(inner.split())
      and surroundings.is_hedge(text[closing:place])
    ):
      return Extract(None, "boxed")
  if inner and text[end - 1 : end] == "}":
    behind, before = text[end : end + 80], text[max(0, place - 80) : place]
    before = _GROUP_BEFORE.sub("", before)
    if (behind.strip(" .$\n") and surroundings.takes_back(behind)) or (
      not before.rstrip(" $").endswith(("is", "are", ":", "\n", "= "))
      and surroundings.changes(before)
    ):
      return Extract(None, "boxed")
  return Extract(inner, "boxed")


def _answer_is(text: str, is_number: bool = True) -> Extract | None:
  """Reads behind the last words that announce an answer."""
  match = _PLAIN_LINE.fullmatch(text, text.rfind("\n") + 1)
  if match and is_number:  # The most common case.
    return Extract(match[1], "answer_is")
  place = len(text)
  for _ in range(_MAX_MARKS):
    place = max(text.rfind("nswer", 0, place), text.rfind("NSWER", 0, place))
    if place < 1:
      break
    match = _ANSWER_IS.match(text, place - 1)
    if not match and is_number:
      match = _ANSWER_NUMBER.match(text, place - 1)
    if match:
      return _announced(text, place - 1, match.end(), is_number)
  tail = text[-MAX_READ:]
  if tail.isascii() and not _may_be_elsewhere(tail.lower()):
    return None
  last = clauses.last_match(_ANSWER_ELSEWHERE, tail)
  if last is None:
    return None
  return _announced(tail, last.start(), last.end(), is_number)


def _may_be_elsewhere(lower: str) -> bool:
  """Tells whether ASCII may hold "answer" in another language; to be quick."""
  return (
    "espuesta" in lower
    or "sposta" in lower
    or "eponse" in lower
    or "antwo" in lower
    or "svaret" in lower
    or "cevap" in lower
    or "jawaban" in lower
  )


def _announced(
  text: str, start: int, end: int, is_number: bool
) -> Extract | None:
  """Reads the sentence behind a mark; None if it has no answer."""
  behind = text[end : end + 2 * clauses.WINDOW]
  lead = _MARKUP.match(behind)
  if lead:
    behind = behind[lead.end() :]
    if "\n" in lead[0] and "$" not in lead[0] and "\\" not in lead[0]:
      bullet = _BULLET.match(f"\n{behind}")
      if bullet or lead[0].endswith("* "):
        behind = behind[bullet.end() - 1 :] if bullet else behind
        if _BULLET.search(behind):
          return None  # A list, whose last item says it.
  if ". " in behind:
    behind = _ABBREVIATED.sub(r"\1 ", behind)
  if lead and "\n" in lead[0]:
    behind = behind.removeprefix("> ")
  line = behind.partition("\n")[0]
  match = clauses.SENTENCE_END.search(line)
  sentence = line[: match.start()] if match else line
  rest = line[match.end() :] if match else behind[len(line) :]
  has_number = (
    clauses.DIGIT.search(normalisation.characters(sentence)) is not None
    or "\\" in sentence
    or words.has_number_word(sentence)
  )
  if not has_number and (is_number or len(sentence.split()) > 4):
    return None
  before = text[max(0, start - 100) : start]
  before = clauses.SENTENCE_START.split(before)[-1]
  said = before + text[start:end]
  if said.lower() not in _ANNOUNCED:
    turned = clauses.last_match(_TURNED, said)
    if _DENIED.search(said, turned.end() if turned else 0) or clauses.OR.search(
      before
    ):
      return Extract(None, "answer_is")
  if clauses.DOUBT.search(rest[:80]):
    return Extract(None, "answer_is")
  if clauses.TAKEN_UP.match(rest):
    sentence = f"{sentence}. {rest.strip()[:80]}"
  return Extract(sentence, "answer_is")
