"""Finds what a text without marks says of its last number."""

import collections
import functools
import itertools
import re

from rljax.tasks.answers import literals, normalisation, numbers, words

WINDOW = 320
DIGIT = re.compile("[0-9]")
SENTENCE_END = re.compile(r"[.!?。！？]+[\"'*_)\]$]*(?:\s|$)|[。！？]")
SENTENCE_START = re.compile(r"[.!?]+[\"'*_)\]$]*\s+|[。！？]|\n")
TAKEN_UP = re.compile(
  r"[\s*_$(\\)\]]*(?:or|no|wait|actually|sorry|correction|alternatively|hmm"
  r"|oops|and also|perhaps|maybe|nein|或|oder|ou)\b",
  re.IGNORECASE,
)
_JOINED = re.compile(
  r"(?:\b(?:or|and|nor|to|plus|minus|times|than|not|oder|ou|y|between|by)"
  r"|\b(?:min|max)\."
  r"|或|[-+*/×÷√,^])[\s*_$\"'(\\[]*$",
  re.IGNORECASE,
)
_OPERATOR_FIRST = re.compile(r"\s*(?:\\(?:cdot|times|div|pm)(?![a-z])|[+/^×÷])")
# A whole reply whose words change nothing.
_SIMPLE = re.compile(
  r"\s?(?:(?:so|thus|hence|therefore|then|now|that|this|it|she|he|they|we|there"
  r"|the|total|result|is|are|has|have|was|were|makes|equals)[ ,]{1,2}){0,8}"
  r"\$?(-?[0-9]{1,15})[.!]?\s?",
  re.IGNORECASE,
)
_MAX_SIMPLE = 128
# A last line that works one sum out, and the words behind it: in all there are
# 41 + 1 = 42 clips.
_SUM_LINE = re.compile(
  r"[A-Z0-9$][A-Za-z0-9 $,.'()+*/-]*[0-9)%](?:[ ]?[-+*/]|[ ]x)[ ]?"
  r"\$?[0-9](?:[0-9.]*[0-9])?[ ]?=[ ]?"
  r"(\$?-?[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?)((?:[ ][a-z]{2,})*)[.!]?\s?"
)
# Parts of words that need the long way, in such a line and the text above.
_SPECIAL = (
  "you",
  "hope",
  "let me",
  "free",
  " vs",
  "if ",
  "unless",
  "because",
  "since",
  "**",
)
_ENDS = frozenset([*".!?;)>0123456789", ""])  # No "or" ends so.
OR = re.compile(
  r"(?:\b(?:or|oder|ou|nor)(?:\s+(?:maybe|perhaps|possibly|else|that|even))?"
  r"(?:\s+(?:the|a|my|it|is))*|或)[\s*_$\"'(\\[:#,]*$",
  re.IGNORECASE,
)
HEDGE = re.compile(
  r"\b(?:or|maybe|perhaps|possibly|alternatively|might|could be|may be|oder|ou"
  r"|guess|candidate|alternative)"
  r"\b",
  re.IGNORECASE,
)
_HEDGE_LOWER = re.compile(HEDGE.pattern)  # Quicker.
DOUBT = re.compile(
  r"\b(?:do|does|did|could|can|am|is|are|was)(?: ?not|n't|n’t)"
  r" (?:really |quite |exactly )?(?:know|sure|certain|tell|say|clear)\b"
  r"|\bno (?:idea|answer|solution|clue)\b|\bunsure\b|\buncertain\b"
  r"|\bnot (?:sure|certain|enough)\b"
  r"|\b(?:cannot|can't|can’t|unable to|not able to) (?:be |say|tell|determine"
  r"|know|answer|solve|help|assist|provide|verify|confirm)"
  r"|\bI(?:'m| am) (?:lost|confused|stuck)\b"
  r"|\bimpossible\b|\brandom(?:ly)? guess|\bI (?:strongly )?doubt\b",
  re.IGNORECASE,
)
_HEDGES = (
  *("or ", "or,", "may", "might", "perhaps", "possib", "could be"),
  *("altern", "oder", "ou ", "guess", "candidate"),
)  # To be quick.
_MARKER = re.compile(
  r"(?<![<>!=:])=+(?!=)"
  r"|\b(?:is|are|was|were|be|has|have|had|equals?|makes?|made|making|gives?"
  r"|giving|gave|gets?|got|leaves?|leaving|left with|yields?|totals?"
  r"|(?:total|increase|decrease|difference|change|gain|profit|loss|drop) of"
  r"|total|contain(?:s|ed)|becomes?|so|thus|hence|therefore|altogether|in all"
  r"|overall|she|he|they|we|it|you|sold|need(?:s|ed)?|earns?|earned|pays?|paid"
  r"|costs?|comes to"
  r"|takes?|took|spends?|spent|ends? up with"
  r"|es|son|ist|sind|est|sont|são|tiene|hat|a un total de|共有|一共)\b"
  r"|[共有是为為]",
  re.IGNORECASE,
)
# The rows of a table.
_ROW_OF_NUMBER = re.compile(r"\|[^|\n]*[0-9][^|\n]*\|\s*$")
_TOTAL = re.compile(
  r"total|sum|all|altogether|answer|result|final|combined", re.IGNORECASE
)
_CLOSING_EMPHASIS = re.compile(r"(?<=[\w.:!?])(?:\*\*|__)$")
_CHOICE = re.compile(
  r"^\W*(?:[A-Za-z]|(?:option|choice|answer|case|guess)\s*\w{1,2})\s*[).:]\s*",
  re.IGNORECASE,
)
BARE = re.compile(r"[\W\d_]*[0-9][\W\d_]*")
_LEAVES = re.compile(
  r"\b(?:leaves|leaving|left with|gives|giving|makes|making|yields|totals)\b",
  re.IGNORECASE,
)
_CONCLUDED = re.compile(r",\s*(?:so|thus|hence|therefore)\s", re.IGNORECASE)
# After 2 days, 42 remain.
_OPENING = re.compile(
  r"\W*(?:(?:so|thus|then|now|and),? )?(?:after|in|for|with|when|if|since|at|of"
  r"|from|over|within|during|out of|once|because|as|among|by)\b[^,=]*,\s+"
  r"(?:[^,=0-9]{1,60}\s)?\$?",
  re.IGNORECASE,
)
# He sold 42 over 3 days: what stands between a number and others that say when,
# where and for what.
_CIRCUMSTANCE = re.compile(
  r"(?: *more(?= \w))?"
  r"(?!.*\b(?:per|each|every|apiece|an?|or|and|than|more|less|fewer)\b)"
  r"(?! *(?:over|in|within|during|after|at|on|from|throughout|to)\b)"
  r"[^,;:=?!]{0,60}?,?\s(?:over|in|within|during|after|at|on|from|throughout"
  r"|to(?= +(?!the|become|equal|total|get|give|have|be)[a-z])"
  r"|for +(?:the|all|these|those|his|her|their|its|working|just|only)"
  r")(?: +(?!\d)[\w']+){0,3} +",
  re.IGNORECASE,
)
# 45 in 5 years; 45 of the 60 people came.
_IN_TIME = re.compile(
  r" +in +[0-9.]+ +(?:second|minute|hour|day|week|month|year)s?\b"
  r"|,? +of +(?:the|these|those|his|her|their|its) +[0-9.]+(?: +[a-z]+){2}"
)
# Tom, who is twice as old as Ann, is 42.
_WHO = re.compile(
  r"(?<=[A-Za-z]), (?:who|which|whose)\b[^,0-9]{1,60},(?=\D*[0-9])"
)
# Ann has 41, Tom has 42.
_PARALLEL = re.compile(
  r"^(?!\W*(?:If|When|Since|As|Because)\b)[^,]*\b(has|have|had"
  r"|gets?|got|is|are|was|earns?|pays?|sells?|sold|makes?)"
  r"\s+\$?[0-9][^,]*(?:,|,? and) (?!He |She |They |We |It |I )[A-Z][a-z]+ \1"
  r"\s+\$?$"
)
# A reply that stops in the middle of a sentence.
_CUT_SHORT = re.compile(
  r"\s(?:and|or|but|with|the|an?|to|of|by|from|minus|plus|times|if|because|since"
  r"|which)$|(?<![.,/=-])[-+/=×÷^(]$",
  re.IGNORECASE,
)
# What ends a reply, and answers nothing.
_REMARK = re.compile(
  r"[.!?\n]\s*(?:I hope|Hope (?:this|that)|(?:Please )?let me know|Feel free"
  r"|If you (?:have|need|want)|Would you like"
  r"|Do you (?:have|need|want))\b[^\n]*$",
  re.IGNORECASE,
)
# What explains a number, or checks it: the number is above.
_AFTERWARDS = re.compile(
  r"[.!?\n](?:\s|[*_#>(-])*(?:(?:(?:this|that|it) is|that's|it's) (because)"
  r"|(?:double[- ]?)?check(?:ing)?|verif(?:y|ying|ication)"
  r"|(?:to|let(?:'s| me| us)) (?:double[- ]?)?(?:check|verify))\b",
  re.IGNORECASE,
)
_NUMBER = re.compile(r"[0-9](?:[0-9.,]*[0-9])?")
_TURNS = re.compile(
  r"\b(?:wait|actually|but|however|wrong|mistaken?|not|no|so|thus|therefore"
  r"|hence|should|instead|incorrect|answer|oops|hmm)\b|n't\b",
  re.IGNORECASE,
)
# No, wait, it is 42.
_TURNED = re.compile(
  r"^\W*(?:(?:no|wait|sorry|oops|actually|hmm|correction|nein|perd[oó]n)"
  r"\s?[,:!-]+\s*)+",
  re.IGNORECASE,
)
_CORRECTED = re.compile(r"\s*\$?-?[0-9][0-9.,]*[.!]\s+")
# There is an error above: the correct total is 42.
_CORRECT = re.compile(
  r".*\b(?:wrong|incorrect|mistaken|not right)\s*[;,—-]\s*(?=it(?:'s| is) )|"
  r".*[;:,—-]\s*(?:but |so |and )?(?:the|my) "
  r"(?:correct(?:ed)?|actual|right|real|true)\s(?=\w+\s(?:is|was|should be)\s)",
  re.IGNORECASE,
)
# 33.3, which rounds to 33.
_ROUNDED = re.compile(r"\bround(?:s|ed)(?: up| down| off)? to *(?:\$ *)?$")
# So it took three days.
_IN_WORDS = re.compile(r"\b(?:so|thus|hence|therefore|total|answer)\b", re.I)
_APPLIED = re.compile(
  r" (?:squared|cubed|doubled|tripled|quadrupled|halved)"
  r"(?:,? (?:which |that )?(?:is|equals|gives|makes)|:) \$?",
  re.IGNORECASE,
)
# Where a sentence goes on to say something else.
_ASIDE = re.compile(
  r"(?:,\s*(?:so|which|who|since|because|as|and)|\s(?:in|for|after|when|because"
  r"|since|who|that|which|are|is|was|were|will|would|can|could|did|do|does|left"
  r"|so|during|at|on|with|now|while|before|per|every|(?<=[a-z] )out of|they|he"
  r"|she|it|from|than|by|to))\s",
  re.IGNORECASE,
)
_IF = re.compile(r"\s(?:if|unless)\s", re.IGNORECASE)
# What judges the number before it.
_JUDGED = re.compile(
  r"^\W*(?:\w+\W+){0,2}(?:or|nor|to|versus|vs|through)\W+[0-9]"
  r"|\b(?:is|are|was|were|be) (?:wrong|incorrect|false|too|only|just|extraneous"
  r"|rejected|discarded|invalid|excluded|insufficient|a trap|tempting)\b"
  r"|\b(?:does|would|can|could)(?: not|n't) (?:work|satisfy|fit|hold|be)\b"
  r"|\b(?:seem|look|sound|feel)s? (?:off|wrong|odd|strange|too|unlikely)"
  r"|\b(?:is|are|was|were) not"
  r"(?:\W*$| (?:an?|the|right|correct|it|true|possible)\b)"
  r"|\b(?:is|are) (?:one of|(?:bigger|greater|smaller|less|more) than the)\b"
  r"|\b(?:a|per) [a-z]+ for (?:an?|the|one|[0-9])\b"
  r"|(?:upper|lower) (?:bound|limit)|(?:one|a) (?:possible|potential|plausible)"
  r"|n't (?:right|correct|the answer)\b|\b(?:wrong|incorrect|false)\b"
  r"|^\W*(?:or|minus|plus|times|not)\b|, not the\b"
  r"|\bat (?:the )?(?:most|least|very)\b|\b(?:max|maximum|minimum|tops)\b"
  r"|^[^0-9]*[a-z)] (?:and|but) \$?[0-9]"
  r"|^\W*and (?:up|above|over|more|under|below|less|counting)\b",
  re.IGNORECASE,
)
WITHDRAWN = re.compile(
  r"\b(?:(?:that|this|it)(?:'s| is| was| would be) (?:wrong|incorrect"
  r"|not (?:right|correct))"
  r"|i(?:'ve| have)? made an? (?:mistake|error)|correction)\b",
  re.IGNORECASE,
)
# We reject x = 42.
_REJECTED = re.compile(
  r"\b(?:reject|discard|eliminate|rule out|exclude)s?\s+(?:\\?[a-z]\s*)?$", re.I
)
# x = 41 and y = 42.
_NAMED = re.compile(
  r"(?:[,;&]|\b(?:and|or)\b)\s*\\?[A-Za-z]\w?\s*=", re.IGNORECASE
)


def last_match(pattern: re.Pattern, text: str) -> re.Match | None:
  """Returns the last match of a pattern, or None."""
  found = collections.deque(pattern.finditer(text), maxlen=1)
  return found.pop() if found else None


def is_offered(text: str, place: int) -> bool:
  """Tells whether what stands before a place ends in "or"."""
  before = text[max(0, place - 40) : place].rstrip()
  return before[-1:] not in _ENDS and OR.search(before) is not None


def last_clause(tail: str) -> str | None:
  """Returns the clause with the last number of a text.

  | text                                      | clause        |
  |-------------------------------------------|---------------|
  | She had 5, so she has 42 clips. Bye!      | so she has 42 clips |
  | 48 + 24 = 72                              | 72            |
  | She sold 42 clips over 3 days.            | She sold 42   |
  | In 3 days, she sold 42.                   | she sold 42   |
  | She has 42. Check: 42 / 2 = 21            | She has 42    |
  | 33.3, which rounds to 33                  | 33            |
  | 42, 43; 42 or 43; between 42 and 43       | all of it, to be refused |
  | 4 or<line feed>5; 1. 2. 3.; 6? 7?         | None          |
  | I do not know. 42                         | None          |

  Args:
    tail: the end of a response.
  """
  if len(tail) < _MAX_SIMPLE:  # Most short replies.
    match = _SIMPLE.fullmatch(tail)
    if match:
      return match[1]
  clause = _after_sum(tail)
  if clause is not None:
    return clause
  tail = tail.rstrip().replace(" vs. ", " vs ")
  if _CUT_SHORT.search(tail, max(0, len(tail) - 12)):
    return None
  remark = _REMARK.search(tail, max(0, len(tail) - WINDOW))
  if remark and DIGIT.search(tail, 0, remark.start()):
    tail = tail[: remark.start() + 1].rstrip()
  tail = _without_afterwards(tail)
  if not tail.isascii():
    tail = tail[: -2 * WINDOW] + normalisation.characters(tail[-2 * WINDOW :])
  place = max(tail.rfind(digit) for digit in "0123456789")
  if place < 0:
    sentence = SENTENCE_START.split(tail.rstrip(" .!?*_$")[-WINDOW:])[-1]
    return (
      _last_of_several(sentence) if words.has_number_word(sentence) else None
    )
  first = place
  while first > 0 and place - first < WINDOW and tail[first - 1] not in " \n":
    first -= 1
  end = SENTENCE_END.search(tail, place + 1, place + 4 * WINDOW)
  line_end = tail.find("\n", place)
  stop = min(
    end.start() if end else len(tail), line_end if line_end >= 0 else len(tail)
  )
  if tail.startswith("...", stop):
    stop += 3
  window = tail[max(0, first - WINDOW) : first]
  start = 0
  for boundary in SENTENCE_START.finditer(window):
    start = boundary.end()
  previous, sentence = window[:start], window[start:] + tail[first:stop]
  if sentence.lstrip().startswith("|"):
    cells = [cell for cell in sentence.split("|") if DIGIT.search(cell)]
    if len(cells) > 1 or (
      _ROW_OF_NUMBER.search(previous) and not _TOTAL.search(sentence)
    ):
      return None
    sentence = cells[0]
  if previous or not sentence.startswith(">"):  # More than 42; or a quotation.
    sentence = re.sub(r"^\s*(?:[-*•]\s+|#{1,6}\s*|>\s+)+", "", sentence)
  turned = _TURNED.match(sentence)
  sentence = sentence[turned.end() :] if turned else sentence
  correct = _CORRECT.match(sentence)
  sentence = sentence[correct.end() :] if correct else sentence
  sentence = _WHO.sub("", sentence, count=1)
  rest = tail[stop:].lstrip(".!?\"'*_ ")
  if words.has_number_word(rest[:WINDOW]) and _IN_WORDS.search(rest[:WINDOW]):
    return last_clause(rest[:WINDOW])
  around = window + tail[first : stop + 80]
  lower = around.lower()
  if _may_doubt(lower) and DOUBT.search(around):
    return None
  if WITHDRAWN.match(rest):
    return None
  if TAKEN_UP.match(rest):
    sentence = f"{sentence}. {rest[:80]}"
  is_corrected = (
    turned is not None
    and tail[stop : stop + 1] != "?"
    and _CORRECTED.fullmatch(previous) is not None
  )  # 41. No, 42.
  if not is_corrected and not _may_follow(previous, sentence):
    return None
  if len(sentence) > numbers.MAX_ANSWER:
    kept = sentence[first - max(0, first - WINDOW) - start :]
    if len(kept) > numbers.MAX_ANSWER:
      if len(kept.split(maxsplit=1)[0]) > numbers.MAX_ANSWER:
        return kept  # For `compare`, which calls it too long.
      return kept[: numbers.MAX_ANSWER].rpartition(" ")[0]
    sentence = sentence[-numbers.MAX_ANSWER :].partition(" ")[2]
  return _last_of_several(sentence)


def _without_afterwards(tail: str) -> str:
  """Cuts what explains the last number, or repeats it in a check."""
  remark = _AFTERWARDS.search(tail, max(0, len(tail) - WINDOW))
  if remark is None or _TURNS.search(tail, remark.end()):
    return tail
  above = tail[max(0, remark.start() - WINDOW) : remark.start() + 1]
  number = last_match(_NUMBER, above)
  if number is None or not (
    remark[1] or re.search(rf"\b{re.escape(number[0])}\b", tail[remark.end() :])
  ):
    return tail
  return tail[: remark.start() + 1].rstrip()


def _after_sum(tail: str) -> str | None:
  """Reads what `last_clause` does of the most common last lines, to be quick.

  Returns:
    None if the line is another one, or holds a word that may change its number.
  """
  start = tail.rfind("\n", 0, len(tail) - 1) + 1
  if start > 1 and tail[start - 2] != ".":
    return None
  match = _SUM_LINE.fullmatch(tail, start)
  if match is None or len(tail) - start > numbers.MAX_ANSWER:
    return None
  lower, line = tail[-2 * WINDOW :].lower(), match[0]
  if _may_doubt(lower):
    return None
  for part in _SPECIAL:
    if part in line:
      return None
  low = lower[len(lower) - len(line) :]
  for stem in _HEDGES:
    if stem in low:
      if _HEDGE_LOWER.search(low):
        return None
      break
  number, behind = match.groups()
  behind = _behind_sum(behind, line.rstrip()[-1].isalpha()) if behind else ""
  return None if behind is None else number + behind


@functools.lru_cache(2**12)
def _behind_sum(behind: str, is_open: bool) -> str | None:
  """Cuts the words behind a sum; None if they may change its number."""
  if (
    _JUDGED.search(behind)
    or words.has_number_word(behind)
    or (is_open and _CUT_SHORT.search(behind))
  ):
    return None
  aside = _ASIDE.search(behind)
  return behind[: aside.start()] if aside else behind


def _may_doubt(lower: str) -> bool:
  """Tells whether a text may have words of `DOUBT`; to be quick."""
  return (
    ("no" in lower and ("not" in lower or "no " in lower))
    or ("'" in lower and ("n't" in lower or "i'm " in lower))
    or "n’t" in lower
    or ("un" in lower and ("uns" in lower or "unc" in lower or "una" in lower))
    or "imp" in lower
    or "guess" in lower
    or "doubt" in lower
    or "i am " in lower
  )


def _may_follow(previous: str, sentence: str) -> bool:
  """Tells whether a sentence stands alone, rather than in a list of numbers."""
  above = previous.rstrip(" \n*_$\"'.!?")
  if not above:
    return True
  if OR.search(previous) or _OPERATOR_FIRST.match(sentence):
    return False
  joined = _JOINED.search(_CLOSING_EMPHASIS.sub("", previous.rstrip()))
  last = SENTENCE_START.split(above)[-1]
  if (
    joined
    and not re.fullmatch(r"[-*_,\s]*", last)
    and (joined[0][0] != "," or re.search(r"[0-9][^\w]*$", previous))
  ):
    return False
  last, sentence = (_CHOICE.sub("", one) for one in (last, sentence))
  if BARE.fullmatch(last) and BARE.fullmatch(sentence) and "=" not in sentence:
    return numbers.number(last) == numbers.number(sentence)
  return not (HEDGE.search(sentence) and DIGIT.search(previous))


def _is_main(text: str, found: list[literals.Quantity], is_money: bool) -> bool:
  """Tells whether the first number is said, and the others are of when."""
  before, rest = text[: found[0].start], text[found[0].end :]
  marker = last_match(_MARKER, before)
  if before.strip() and (
    marker is None or len(before[marker.end() :].split()) > 3
  ):
    return False
  if _JUDGED.search(rest) or words.REFUSED.search(text):
    return False
  gaps = [text[a.end : b.start] for a, b in itertools.pairwise(found)]
  if is_money:  # $10 for 50 minutes.
    gaps[0] = " paid" + gaps[0].replace(" for ", " in ", 1)
    gaps[1:] = [re.sub(" and *$", " at ", gap) for gap in gaps[1:]]
  return all(map(_CIRCUMSTANCE.fullmatch, gaps)) or (
    len(gaps) == 1 and _IN_TIME.match(rest) is not None
  )


def _last_of_several(sentence: str) -> str | None:
  """Cuts a sentence down to what it says of its result, or its last number."""
  text = numbers.without_labels(numbers.plain(sentence))
  reason = numbers.REASON.search(text)
  if reason and DIGIT.search(text[: reason.start()]):
    text = text[: reason.start()]
  found = literals.quantities(text)
  if not found:
    return sentence
  number, start = found[-1], 0
  if len(found) > 1 and _ROUNDED.search(text, found[-2].end, number.start):
    return text[number.start : number.end]
  signs = [sign.start() for sign in numbers.EQUALITY.finditer(text)]
  behind = [one for one in found if signs and one.start > signs[-1]]
  if behind and len(text[signs[-1] + 1 : behind[0].start].split()) < 3:
    number, start = behind[0], signs[-1] + 1
    before = numbers.EQUALITY.split(text[: signs[-1]])[-1]
    is_number = numbers.NUMBER_ALONE.fullmatch(before)
    if (
      _REJECTED.search(before)
      or numbers.is_unsolved(before, text[start:])
      or (is_number and numbers.single(before))
    ):
      return sentence  # 2x = 42; 41 = 42.
    concluded = _CONCLUDED.search(text, number.end)
    if concluded and len(behind) == 2 and concluded.end() <= behind[1].start:
      number, start = behind[1], concluded.end()
    elif len(behind) > 2 and _LEAVES.search(
      text, behind[-2].end, behind[-1].start
    ):
      number, start = behind[-1], behind[-2].end
    elif (
      _NAMED.search(text[signs[0] : start])
      and not numbers.UNSOLVED.search(text[: signs[0]])
    ) or (
      len(behind) > 1 and not _ASIDE.search(text[number.end : behind[1].start])
    ):
      return sentence  # For `number`, which refuses most.
    condition = _IF.search(text, number.end)
    text = text[: condition.start()] if condition else text
  elif len(found) > 1:
    if HEDGE.search(sentence):
      return None
    if _is_main(text, found, len(numbers.PRICE.findall(sentence)) == 1):
      return text[: found[0].end] + " "
    gap = text[found[-2].end : number.start]
    marker = last_match(_MARKER, gap)
    if _APPLIED.fullmatch(gap):
      start = number.start
    elif _OPENING.fullmatch(text[: number.start]):
      start = found[-2].end + gap.rindex(",") + 1
    elif (
      marker is None
      or words.REFUSED.search(gap)
      or _PARALLEL.search(text[: number.start])
    ):
      return sentence
    else:
      start = found[-2].end + marker.start()
  rest = text[number.end :]
  aside = _ASIDE.search(rest)
  if aside and not _JUDGED.search(rest):
    rest = rest[: aside.start()]
  return text[start : number.end] + rest
