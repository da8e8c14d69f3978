"""Words that make or change a number, as tables."""

import re

_UNITS = (
  "one",
  "two",
  "three",
  "four",
  "five",
  "six",
  "seven",
  "eight",
  "nine",
)
_TEENS = re.findall(
  "[a-z]+",
  "ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen "
  "nineteen",
)
_TENS = re.findall(
  "[a-z]+", "twenty thirty forty fifty sixty seventy eighty ninety"
)
_VALUES = {
  "zero": 0,
  **{word: i + 1 for i, word in enumerate(_UNITS)},
  **{word: i + 10 for i, word in enumerate(_TEENS)},
  **{word: 10 * (i + 2) for i, word in enumerate(_TENS)},
  "fourty": 40,
}
MAGNITUDES = {
  "hundred": 100,
  "thousand": 10**3,
  "million": 10**6,
  "billion": 10**9,
  "trillion": 10**12,
  "lakh": 10**5,
  "crore": 10**7,
}
# Attached to a number, in this case.
SUFFIXES = {
  **dict.fromkeys(("k", "K"), 10**3),
  **dict.fromkeys(("M", "mn", "Mn", "mln"), 10**6),
  **dict.fromkeys(("B", "bn", "Bn"), 10**9),
  "tn": 10**12,
}
CHINESE = {"万": 10**4, "萬": 10**4, "亿": 10**8, "億": 10**8}
_PARTS = {
  **{"half": 2, "halves": 2, "third": 3, "quarter": 4, "fourth": 4},
  **{"fifth": 5, "sixth": 6, "seventh": 7, "eighth": 8, "ninth": 9},
  **{"tenth": 10, "hundredth": 100, "thousandth": 1000},
}

_below_100 = (
  rf"(?:(?:{'|'.join(_TENS)}|fourty)(?:[ -]+(?:{'|'.join(_UNITS)}))?"
  rf"|{'|'.join(_TEENS)}|{'|'.join(_UNITS)})"
)
_below_10_000 = (
  rf"(?:(?:{_below_100}|a)[ -]hundred(?:[ -]+(?:and[ -]+)?{_below_100})?"
  rf"|{_below_100})"
)
_big = "(?:thousand|million|billion|trillion)"
_cardinal = (
  rf"(?:zero|(?:(?:{_below_10_000}|a)[ -]{_big},?[ -]+(?:and[ -]+)?){{0,4}}"
  rf"{_below_10_000}(?:[ -]{_big})?|a[ -]{_big}|a[ -]hundred)"
)
_part = rf"(?:halves|half|(?:{'|'.join(list(_PARTS)[2:])})s?)"
# "forty-two", "two thirds", "two and a half".
_RUN = re.compile(
  rf"\b({_cardinal})(?:[ -]({_part})\b(?! of)|( and (?:a|one) half)\b|\b)"
  r"(?![-'][a-z])",
  re.IGNORECASE,
)
_ANY = re.compile(
  rf"\b(?:{'|'.join(_VALUES)}|a[ -](?:hundred|{_big}))", re.IGNORECASE
)
_DIGIT_WORD = rf"(?:zero|{'|'.join(_UNITS)})"
_DECIMAL = re.compile(
  rf"\b({_cardinal}) point ({_DIGIT_WORD}(?: {_DIGIT_WORD}){{0,20}})\b",
  re.IGNORECASE,
)
_ALONE = re.compile(r"\W*(?:a |one )?half\W*", re.IGNORECASE)
_AND_A_PART = re.compile(
  r"(?<=[0-9])\s+and (?:a|one) (half|third|quarter|fourth|fifth)\b",
  re.IGNORECASE,
)
_PRONOUN = re.compile(r"[0-9]|\b(?:each|every|no|any|this|that|the|only) one\b")


def has_number_word(text: str) -> bool:
  """Tells whether a word of a text counts."""
  return _ANY.search(text) is not None


def _cardinal_value(text: str) -> int:
  total = current = 0
  for word in re.split(r"[\s,-]+", text.lower()):
    if word in _VALUES:
      current += _VALUES[word]
    elif word == "a":
      current = 1
    elif word == "hundred":
      current = (current or 1) * 100
    elif word in MAGNITUDES:
      total += (current or 1) * MAGNITUDES[word]
      current = 0
  return total + current


def with_digits(text: str) -> str:
  """Writes the numbers that are words in digits.

  | words                     | digits |
  |---------------------------|--------|
  | forty-two                 | 42     |
  | one hundred and five      | 105    |
  | twelve hundred            | 1200   |
  | a million                 | 1000000 |
  | two thirds, one half      | 2/3, 1/2 |
  | two and a half, 2 and a half | 2 1/2 |
  | zero point nine           | 0.9    |
  | half, and nothing else    | 1/2    |
  | each one, 12 or one       | as they are: "one" may be no number |
  """
  if _ALONE.fullmatch(text):
    return "1/2"
  text = _AND_A_PART.sub(lambda match: f" 1/{_PARTS[match[1].lower()]}", text)
  if not _ANY.search(text):
    return text
  is_pronoun = _PRONOUN.search(text) is not None

  text = _DECIMAL.sub(
    lambda match: (
      f"  {_cardinal_value(match[1])}."
      + "".join(str(_VALUES[word]) for word in match[2].lower().split())
      + "  "
    ),
    text,
  )

  def written(match: re.Match) -> str:
    cardinal, part, half = match.groups()
    if cardinal.lower() == "one" and not part and not half and is_pronoun:
      return match[0]
    value = str(_cardinal_value(cardinal))
    if half:
      value += " 1/2"
    elif part:
      part = part.lower()
      value += f"/{_PARTS[part if part in _PARTS else part.removesuffix('s')]}"
    return f"  {value}  "

  text = _RUN.sub(written, text)
  return _AND_A_PART.sub(lambda match: f" 1/{_PARTS[match[1].lower()]}", text)


# Anywhere in an answer: it is taken back, or one of several.
REFUSED = re.compile(
  r"\b(?:or|nor|either|neither|not|never|cannot|wrong|incorrect(?:ly)?|false"
  r"|fails (?:the|this|to)|it (?:varies|depends)|naive(?:ly)?|extraneous"
  r"|at (?:best|worst)|none of"
  r"|(?:seem|look|sound|feel)s? (?:off|wrong|odd|strange|unlikely)"
  r"|untrue|mistaken|invalid|impossible|unknown|undefined|unclear|unlikely"
  r"|except|excluding|versus|vs|instead|too|insufficient|unsure|uncertain"
  r"|anything|everything|used to be|mod|modulo|dozens?|dutzend|docenas?"
  r"|douzaines?"
  r"|dúzias?|dozzin[ae]|gross|factorial|squared|cubed"
  r"|rejected|refused|errors?|mistakes?|halves|pi|nan|inf|halved|doubled"
  r"|tripled|quadrupled|twice|divisible"
  # Other languages.
  r"|oder|ou|oppure|veya|eller|albo|nebo|atau|nicht|kein|keine|nunca|nein"
  r"|falsch|falso|faux|incorrecto|errado|sbagliato"
  r"|pas|niet|geen|inte|ikke|não|non(?!-)|nie|nem|bukan|tidak|không|değil|или|либо|не"
  r"|нет|неверно|неправильно)\b"
  r"|\w(?:n't|n’t)\b"
  r"|(?<=[0-9]) +(?:[oóeyu]|et|und|и) +(?=-?[0-9])"
  r"|[或不非没沒無无]|还是|或者|または|もしくは|あるいは|じゃない|ではな|ではあり"
  r"|[0-9]\s?[^\s0-9、。]{0,3}(?:以上|以下|未満|未满)|(?:以上|以下|未満)の\s*[0-9]"
  r"|\bnull\b|錯|错|또는|혹은|아니|아닌|아닙|ليس|مش|नहीं|ไม่"
  r"|\\(?:n?[lg]e?q?q?|neq?|leqslant|geqslant|pm|mp|sim|not|in|ll|gg|cup|cap"
  r"|vee|wedge|lor|neg|ldots|dots|cdots|subset|infty)(?![A-Za-z])"
  r"|[<>≮≯~|‰‱]|!=|[0-9]-?ish\b|\(\s*no\b|\bno\W*$",
  re.IGNORECASE,
)
_MONTHS = (
  "(?:Jan(?:uary)?|Feb(?:ruary)?|March|April|May|June|July|Aug(?:ust)?"
  "|Sept(?:ember)?|Oct(?:ober)?|Nov(?:ember)?|Dec(?:ember)?)"
)
DATE = re.compile(
  rf"\b{_MONTHS}\s+[0-9]|[0-9](?:st|nd|rd|th)?\s+(?:of\s+)?{_MONTHS}\b"
)
# Before a number.
CHANGES_BEFORE = re.compile(
  r"\b(?:than|least|most|under|over|below|above|beyond|exceed(?:s|ing)?|within"
  r"|near|nearly|(?:before|after|since|next to|preceding|following)(?=\W*$)"
  r"|almost"
  r"|barely|hardly|maximum|minimum|max|min|(?<!adds )(?<!add )(?<!sums )up to"
  r"|until|but"
  r"|no(?! ?[.:])|without|minus|negative|plus|times|divided|multiplied|point"
  r"|(?:as (?:many|few|much|little) as|one in|out of"
  r"|I (?:\w+ )?(?:said|thought|guessed))(?=\W*$)|approach(?:es|ing)?"
  r"|tends? to|whether"
  r"|square|cube|root|log|logarithm|ln|lg|sine?|cosine|cos|tan(?:gent)?|exp"
  r"|rul(?:e|es|ed|ing) out|eliminate|discard|reject|avoid"
  r"|sqrt|reciprocal|inverse|opposite|negation|complement|absolute|modulus"
  r"|remainder of|half|(?:third|quarter|fourth|fifth|sixth|seventh|eighth|ninth"
  r"|tenth|hundredth|thousandth)s?(?= of)|percent(?:age)?|power"
  r"|twice|thrice|doubled?|tripled?|quadrupled?|hundreds?|thousands?|millions?"
  r"|billions?|trillions?|lakhs?|crores?|score of|pairs? of|between|from"
  r"|version|room|chapter|page|figure|equation"
  r"|(?:step|question|example|problem|exercise)(?=\s*\#?$)"
  r"|(?:if|suppos\w+|assum\w+|imagin\w+)(?=[^,]*$)"
  # Other languages.
  r"|menor|mayor|maior|minore|maggiore|kleiner|größer|inférieure?|supérieure?"
  r"|almeno|massimo|minimo|minstens|hoogstens|minst|högst|najmniej|en az"
  r"|en fazla"
  r"|paling|ít nhất|nhiều nhất|fast|beinahe|knapp|presque|casi|quase|quasi"
  r"|bijna|почти|menos|más|mais|moins|meno|più|weniger|mehr|mindestens"
  r"|höchstens"
  r"|unter|über|bis|hasta|jusqu|raíz|cuadrado|wurzel|racine|carré|hälfte|mitad"
  r"|doppelte|doble|dobro|doppio|dreifache"
  r"|moitié|minder|meer|более|менее|меньше|больше|минус|около)\b"
  r"|至少|至多|最多|最少|超过|超過|不到|少于|少於|多于|多於|大于|小于|大於|小於"
  r"|接近|将近|将近|负|負|平方根|之间|최소|최대|마이너스",
  re.IGNORECASE,
)
# What a number may be of, or come to: "a total of 5", but not "a factor of 5".
NAMES = {
  "of": re.compile(
    "total|sum|loss|gain|profit|average|mean|cost|price|amount|number|savings"
    "|change|balance|distance|length|width|height|speed|age|weight|score|value"
    "|result|answer|payment|fee|bill|income|debt|deposit|tip|discount|increase"
    "|decrease|remainder|group|rate|refund|revenue|salary|wage|volume|area"
    "|perimeter|quantity|count|set|difference|product|quotient|time|duration"
    "|temperature|grade|tax|budget|expenses?|earnings|probability",
    re.IGNORECASE,
  ),
  "to": re.compile(
    "equals?|equivalent|comes?|amounts?|adds?|up|sums?|rises|increases|drops"
    "|rounds|simplifies|reduces|evaluates|works|leads|boils|out|according|thanks",
    re.IGNORECASE,
  ),
}
# Behind a number, before another word.
CHANGES_BEHIND = re.compile(
  r"\b(?:plus|minus|point|(?:and|or) (?:up|above|over|more|under|below|less"
  r"|fewer|counting|change|a bit|then some|so on)|less (?:the|an?|any|his|her)"
  r"|(?:a|per) [a-z]+ for (?:an?|the|one|[0-9])"
  r"|(?:maybe|perhaps|possibly|probably|even) (?:more|less|fewer)"
  r"|at (?:the )?(?:least|most|very)|minimum|maximum|max|(?<=\w )min"
  r"|upwards?|onwards?|tops|if|unless|else|otherwise|assuming|provided"
  r"|to the|power|raised|root|scores?|and one"
  r"|(?:upper|lower) (?:bound|limit)|short(?= of|\W*$)"
  r"|(?:one|a) (?:possible|potential|plausible)"
  r"|(?:third|fourth|fifth|sixth|seventh|eighth|ninth|tenth|hundredth"
  r"|thousandth|millionth|billionth|trillionth)s"
  r"|ones|twos|threes|fours|fives|sixes|sevens|eights|nines|tens|hundreds"
  r"|thousands|millions|billions|trillions|lakhs|crores)\b",
  re.IGNORECASE,
)
# Right behind a number.
CHANGES_NEXT = re.compile(
  r"[\s(]*(?:(?:half|quarter|ths|fold|something|pi|mil|mille|mila|milliers?"
  r"|millones|millón"
  r"|milhões|milhão|millionen|milliarden?|milliards?|mio|mrd|tausend|hundert"
  r"|mln|mlrd|млн|млрд|тыс|тысяч[аи]?|миллион\w*|миллиард\w*|bin|milyon|milyar"
  r"|tisíc|tysięcy|tysiąc|cientos"
  r"|grand|bil|tril|zillion|myriad|below|under|times (?:as|the|that))\b"
  r"|/\s?[xyzabkn]\b|[%个個]?\s?[万萬億亿千百만억천백多余餘几幾点點分之以]|个?半|個?半)",
  re.IGNORECASE,
)
