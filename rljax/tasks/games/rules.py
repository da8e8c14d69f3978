"""Text of board games in the language of ludax: form, grammar and checks.

  (game "Tic-Tac-Toe" (players 2) (equipment (board (square 3)) ...

Everything here works on text, in less than a millisecond per text: the
canonical form, how much of a text follows the grammar, checks of its meaning
without playing it, its distance from known games, and texts with a gap that a
model learns to fill in.

The grammar and seventeen games are files of ludax, read from where it is
installed. It is not imported, because it imports jax: `play` does so, in a
process of its own.

Sources:
  Todd, Padula, Soemers and Togelius (2025), "Ludax: A GPU-Accelerated Domain
  Specific Language for Board Games" (arXiv 2506.22609): the language.
  Padula and Soemers (2024), "Exploring RL-based LLM Training for Formal
  Language Tasks with Programmed Rewards": the records and their markers.
"""

import functools
import importlib.metadata
import importlib.util
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

# Markers of the text before the gap, after it, and in it. The blanks are part
# of them.
MARKERS = ("### PRE:", "### SUF: ", "### MID:")

MAX_CHARACTERS = 1500  # Of a canonical text.
MAX_SITES = 121  # Of a board: time and memory grow with their square.
MAX_SLIDE_SITES = 64  # With slides there is an action for each pair of sites.
MAX_PIECES = 5
MAX_REGIONS = 5
GAME = '"game"'
PIECES = tuple(f'"piece_{i + 1}"' for i in range(MAX_PIECES))
REGIONS = tuple(f'"region_{i + 1}"' for i in range(MAX_REGIONS))

MAX_READ = 2**14  # Characters of a text, blanks included; more are too long.
_NUM_INTEGERS = 225  # Sites of the largest board that a shipped game indexes.
# Bounded repetition: an unmatched quote costs a hundred steps.
_LEXEME = re.compile(
  r'"(?:[^"\\\n]|\\.){0,100}"|[()]|P[12]|[0-9]+|[A-Za-z_]+:?|[<>]=|\S'
)
_RELATIVE = frozenset(
  ("forward", "backward", "forward_left", "forward_right")
  + ("backward_left", "backward_right")
)

Tree = list  # Of words and trees: an expression in round brackets.


# Text.


def shipped() -> dict[str, str]:
  """Returns canonical texts of the games that ludax ships, by name.

  Raises:
    ValueError: if ludax is not installed.
  """
  return dict(_shipped())


def notice() -> str:
  """Writes whose games these are, and their licence, for a file of them.

  Raises:
    ValueError: if ludax is not installed.
  """
  _folder()
  package = importlib.metadata.distribution("ludax")
  texts = [
    file.read_text()
    for file in package.files or ()
    if file.name == "LICENSE" and ".dist-info" in str(file)
  ]
  return "\n".join(
    [
      f"Games changed by rljax from those of ludax {package.version},",
      package.metadata["Author-email"] or "",
      "https://github.com/gdrtodd/ludax, under the Apache License 2.0:",
      "",
      *texts,
    ]
  )


def words(text: str) -> list[str]:
  """Splits a text into words, numbers, names and brackets."""
  return _LEXEME.findall(text)


def placed_words(text: str) -> list[tuple[str, int]]:
  """Splits a text into words with the places where they begin."""
  return [(match[0], match.start()) for match in _LEXEME.finditer(text)]


def tree(text: str) -> Tree:
  """Returns the outermost expression of a text whose brackets match."""
  return _tree(words(text))


def join(lexemes: Sequence[str]) -> str:
  """Joins words to one line, without blanks inside brackets."""
  text = " ".join(lexemes)
  # A blank in a name does not separate words, so names are joined first.
  if '"' in text and any(" " in lexeme for lexeme in lexemes):
    pieces, glued = [], True
    for lexeme in lexemes:
      if not glued and lexeme != ")":
        pieces.append(" ")
      pieces.append(lexeme)
      glued = lexeme == "(" or lexeme.endswith(":")
    return "".join(pieces)
  return text.replace("( ", "(").replace(" )", ")").replace(": ", ":")


def canonical(text: str) -> str | None:
  """Returns the canonical form of a description, with normal blanks.

  Args:
    text: anything.

  Returns:
    One line; None if it would be longer than 1500 characters.
  """
  if len(text) > MAX_READ:
    return None
  line = join(words(text))
  return line if len(line) <= MAX_CHARACTERS else None


def neutral(text: str) -> str:
  """Replaces a game's names by placeholders, and drops its looks.

  The game is "game", its pieces are "piece_1", ..., its regions "region_1",
  ..., in the order of their definitions. Names without a definition stay.

  Args:
    text: canonical, and following the grammar.

  Returns:
    Canonical text.
  """
  lexemes = _without_rendering(words(text))
  tree = _tree(lexemes)
  pieces = _renamed(_definitions(tree, "pieces"), PIECES)
  regions = _renamed(_definitions(tree, "regions"), REGIONS)
  found, heads, in_regions = [], [], 0
  for i, lexeme in enumerate(lexemes):
    if lexeme == "(":
      heads.append(lexemes[i + 1] if i + 1 < len(lexemes) else "")
      in_regions += heads[-1] == "regions"
    elif lexeme == ")":
      in_regions -= heads.pop() == "regions" if heads else 0
    elif lexeme.startswith('"'):
      if heads and heads[-1] == "game":
        lexeme = GAME
      elif heads and (
        heads[-1] == "region" or (in_regions and heads[-1] == lexeme)
      ):
        lexeme = regions.get(lexeme, lexeme)
      else:
        lexeme = pieces.get(lexeme, lexeme)
    found.append(lexeme)
  return join(found)


# Grammar.


def progress(text: str) -> tuple[int, bool]:
  """Measures how far a text follows the grammar.

  A name has a hundred characters at most, though the grammar has no limit.

  Args:
    text: canonical.

  Returns:
    Characters up to the end of the last word that the grammar allows; and
    whether the text is a whole description.

  Raises:
    ValueError: if ludax is not installed.
  """
  import lark

  try:
    _parser().parse(text)
  except lark.UnexpectedCharacters as error:
    return len(text[: error.pos_in_stream].rstrip()), False
  except lark.UnexpectedToken as error:
    if error.token.type == "$END":
      return len(text), False
    return len(text[: error.token.start_pos].rstrip()), False
  # Names longer than `words` allows: nothing here can read them.
  if "\\" in text or max(map(len, text.split('"'))) > 100:
    for word, start in placed_words(text):
      if word == '"':
        return len(text[:start].rstrip()), False
  return len(text), True


@functools.cache
def _parser() -> Any:
  """Makes a parser of the language that is fast enough for every sample."""
  import lark

  grammar = (_folder() / "grammar.lark").read_text()
  # "(corners)" may be a mask or several of them: too ambiguous for LALR. As
  # several are also written as one, the grammar without the second alternative
  # accepts the same texts. They are compiled by the grammar as it is.
  changed, num = re.subn(
    r"(?m)^(multi_mask:\s*)multi_mask_corners\s*\|\s*", r"\1", grammar
  )
  if num != 1:
    raise ValueError(
      "The grammar of the installed ludax is not supported: it has no "
      "alternative multi_mask_corners; ludax 1.0.0 has."
    )
  return lark.Lark(changed, start="game", parser="lalr")


# Meaning.


def checks(text: str, *, max_sites: int = MAX_SITES) -> dict[str, bool]:
  """Checks a game without playing it.

  A description that fails one of these may compile, or fail late, but cannot be
  played or costs too much. The compiler checks few of them.

  Args:
    text: canonical, and following the grammar.
    max_sites: of the board.

  Returns:
    Sixteen statements, True where nothing is wrong.
  """
  lexemes = words(text)
  known = set(lexemes)
  tree = _tree(lexemes)
  heads: dict[str, list[Tree]] = {}
  indices: list[int] = []
  piece_names: list[str] = []
  for node, parent in _nodes(tree):
    head = node[0] if node else ""
    if isinstance(head, str):
      heads.setdefault(head, []).append(node)
      if head.isdigit():
        # The second number list of a pattern counts within the pattern.
        if not isinstance(node[-1], list) and not _is_number(parent):
          indices.extend(map(integer, node))
      elif head not in ("game", "region") and not (
        parent and parent[0] in ("regions", "pieces")
      ):
        # Neither a name of the game, of a definition nor of a region.
        piece_names += [
          word for word in node if isinstance(word, str) and word[0] == '"'
        ]
  pieces = [node[0] for node in heads["pieces"][0][1:]]
  regions = [node[0] for node in heads.get("regions", [[]])[0][1:]]
  movers = {
    player
    for name in ("repeat", "once_through")
    for node in heads.get(name, ())
    for player in node[1]
  }
  shape, *sizes = heads["board"][0][1]
  rows, columns, sites = dimensions(shape, [integer(n) for n in sizes])
  return {
    "two_players": integer(heads["players"][0][1]) == 2,
    "both_move": movers == {"P1", "P2"},
    "unique_pieces": len(set(pieces)) == len(pieces),
    "few_pieces": len(pieces) <= MAX_PIECES,
    "known_pieces": set(piece_names) <= set(pieces),
    "unique_regions": len(set(regions)) == len(regions),
    "known_regions": all(
      node[1] in regions for node in heads.get("region", ())
    ),
    "indices_on_board": all(index < sites for index in indices),
    "forward_is_set": not known & _RELATIVE or "set_forward" in known,
    "score_has_effect": not known & {"score", "by_score"} or "effects" in known,
    "pass_is_forced": "passed" not in known or "force_pass" in known,
    "promotion_exists": "promoted" not in known or "promote" in known,
    "line_fits": all(
      integer(node[2]) <= max(rows, columns) for node in heads.get("line", ())
    ),
    "rows_on_board": all(
      integer(node[1]) < size
      for name, size in (("row", rows), ("column", columns))
      for node in heads.get(name, ())
    ),
    "small_board": sites <= max_sites,
    "short_slides": "slide" not in known or sites <= MAX_SLIDE_SITES,
  }


def dimensions(shape: str, sizes: Sequence[int]) -> tuple[int, int, int]:
  """Returns rows, columns and sites of a board."""
  if shape == "hexagon":  # It has rows in three directions, but no columns.
    rings = sizes[0] // 2
    return sizes[0], 0, 1 + 3 * rings * (rings + 1)
  rows, columns = sizes if len(sizes) == 2 else sizes * 2
  return rows, columns, rows * columns


def integer(word: str) -> int:
  """Reads a number of a text; one of many digits as the largest that counts."""
  # The grammar has no largest number, and Python may refuse to read one.
  return int(word) if len(word) <= 9 else 10**9


def _is_number(node: Tree | None) -> bool:
  return bool(node) and isinstance(node[0], str) and node[0].isdigit()


def _tree(lexemes: Sequence[str]) -> Tree:
  """Returns the outermost expression. Brackets must match."""
  stack: list[Tree] = [[]]
  for lexeme in lexemes:
    if lexeme == "(":
      node: Tree = []
      stack[-1].append(node)
      stack.append(node)
    elif lexeme == ")":
      stack.pop()
    else:
      stack[-1].append(lexeme)
  return stack[0][0]


def _nodes(tree: Tree) -> Iterator[tuple[Tree, Tree | None]]:
  """Yields all expressions with their parents, without recursion."""
  stack: list[tuple[Tree, Tree | None]] = [(tree, None)]
  while stack:
    node, parent = stack.pop()
    yield node, parent
    stack.extend((child, node) for child in node if isinstance(child, list))


def _definitions(tree: Tree, kind: str) -> list[str]:
  for node, _ in _nodes(tree):
    if node and node[0] == kind:
      return [definition[0] for definition in node[1:]]
  return []


def _renamed(names: Sequence[str], others: Sequence[str]) -> dict[str, str]:
  return dict(zip(dict.fromkeys(names), others, strict=False))


def _without_rendering(lexemes: list[str]) -> list[str]:
  # It comes last in a game, and its word is nowhere else.
  if "rendering" not in lexemes:
    return lexemes
  return [*lexemes[: lexemes.index("rendering") - 1], ")"]


# Gaps.


def trim(response: str) -> str:
  """Cuts a response after its first expression.

  That is after the first closing bracket up to which as many brackets were
  opened as closed, round and curly each. Everything is kept if there is none.
  """
  num_round = num_curly = 0
  for match in _BRACKET.finditer(response):
    bracket = match[0]
    num_round += (bracket == "(") - (bracket == ")")
    num_curly += (bracket == "{") - (bracket == "}")
    if bracket in ")}" and num_round == num_curly == 0:
      return response[: match.end()]
  return response


_BRACKET = re.compile(r"[(){}]")


def gap(prefix: str, suffix: str) -> str:
  """Makes a prompt that asks for the text between two texts."""
  return f"{MARKERS[0]}{prefix}{MARKERS[1]}{suffix}{MARKERS[2]}"


def compose(prompt: str, middle: str) -> str | None:
  """Puts a middle into the gap of a prompt.

  Args:
    prompt: as `gap` makes them.
    middle: anything; not trimmed here.

  Returns:
    prefix + middle + suffix, or None unless there is one marker of each kind,
    in order, with or without its blanks.
  """
  parts = _split(prompt + middle)
  return parts and parts[0] + parts[2] + parts[1]


def around(prompt: str) -> tuple[str, str] | None:
  """Returns the texts before and after the gap; None without a gap."""
  parts = _split(prompt)
  return parts and parts[:2]


def _split(text: str) -> tuple[str, str, str] | None:
  """Returns what follows each of the markers."""
  marks = [marker.strip() for marker in MARKERS]
  if any(text.count(mark) != 1 for mark in marks):
    return None
  starts = [text.index(mark) for mark in marks]
  if starts[0] != 0 or starts != sorted(starts):
    return None
  prefix = text[len(MARKERS[0]) : starts[1]]
  suffix = text[starts[1] + len(marks[1]) : starts[2]].removeprefix(" ")
  return prefix, suffix, text[starts[2] + len(marks[2]) :]


def cuts(text: str) -> list[tuple[str, str, str]]:
  """Cuts every expression but the outermost one out of a text.

  Args:
    text: with matching round brackets outside of its names.

  Returns:
    Triples of the text before, the expression, and the text after.
  """
  found, starts = [], []
  for match in _LEXEME.finditer(text):
    if match[0] == "(":
      starts.append(match.start())
    elif match[0] == ")":
      start, end = starts.pop(), match.end()
      if starts:
        found.append((text[:start], text[start:end], text[end:]))
  return found


# Novelty.


class Novelty:
  """Measures how far a game is from all of a corpus.

    min_c levenshtein(s, c) / max(|s|, |c|)

  over words of the games, with placeholders for their names and without their
  looks: 0 for a copy, 1 if no word is shared. What has no effect does not
  count: (not (not x)) is x, as are (and x) and (or x), and a repeated rule or
  condition is not new.
  """

  def __init__(self, corpus: Sequence[str]):
    """Reads the corpus once.

    Args:
      corpus: at least one canonical text that follows the grammar.

    Raises:
      ValueError: if it is empty.
    """
    if not corpus:
      raise ValueError("The corpus to compare games with is empty.")
    self._ids: dict[str, int] = {}
    rows = [self._encode(text) for text in dict.fromkeys(corpus)]
    self._lengths = np.array([len(row) for row in rows])
    self._corpus = np.full((len(rows), self._lengths.max()), -1, np.int32)
    for i, row in enumerate(rows):
      self._corpus[i, : len(row)] = row
    self._counts = np.stack([self._count(row) for row in rows])

  def __call__(self, text: str) -> float:
    """Returns the distance of a canonical, grammatical text, in [0, 1]."""
    return self.closest(text)[0]

  def closest(self, text: str) -> tuple[float, int]:
    """Returns the distance, and the index of the nearest different game."""
    row = self._encode(text)
    counts = self._count(row)
    # A lower bound: words that one has and the other lacks must be changed.
    surplus = self._counts - counts
    bounds = np.maximum(
      np.maximum(surplus, 0).sum(1),
      # Words that are not in the corpus are in no count.
      np.maximum(-surplus, 0).sum(1) + len(row) - counts.sum(),
    ) / np.maximum(self._lengths, len(row))
    best, closest = 1.0, 0
    order = np.argsort(bounds, kind="stable")
    for start in range(0, len(order), 64):
      some = order[start : start + 64]
      if bounds[some[0]] >= best:
        break
      distances = _distances(row, self._corpus[some], self._lengths[some])
      shares = distances / np.maximum(self._lengths[some], len(row))
      if shares.min() < best:
        best, closest = float(shares.min()), int(some[shares.argmin()])
    return best, closest

  def _encode(self, text: str) -> np.ndarray:
    lexemes = _plain(_tree(words(neutral(text))))
    return np.array(
      [self._ids.setdefault(lexeme, len(self._ids)) for lexeme in lexemes],
      np.int32,
    )

  def _count(self, row: np.ndarray) -> np.ndarray:
    if not hasattr(self, "_counts"):
      size = len(self._ids)
    else:
      size = self._counts.shape[1]
    return np.bincount(row[row < size], minlength=size)


def _plain(node: Tree) -> list[str]:
  """Returns the words of an expression without what has no effect."""
  # A text is too short to exceed the depth of recursion.
  head, *rest = [
    _plain(child) if isinstance(child, list) else [child] for child in node
  ] or [[]]
  if head in (["and"], ["or"], ["end"]):
    rest = [list(child) for child in dict.fromkeys(map(tuple, rest))]
  if head in (["and"], ["or"]) and len(rest) == 1:
    return rest[0]
  if head == ["not"] and rest[0][:2] == ["(", "not"]:
    return rest[0][2:-1]
  return ["(", *head, *(word for child in rest for word in child), ")"]


def _distances(
  row: np.ndarray, others: np.ndarray, lengths: np.ndarray
) -> np.ndarray:
  """Computes edit distances of one word list to several, padded ones."""
  steps = np.arange(others.shape[1] + 1)
  costs = np.broadcast_to(steps, (len(others), len(steps)))
  for i, word in enumerate(row):
    new = np.empty_like(costs)
    new[:, 0] = i + 1
    new[:, 1:] = np.minimum(costs[:, 1:] + 1, costs[:, :-1] + (others != word))
    # Insertions: the least over the entries to the left, plus a step each.
    costs = np.minimum.accumulate(new - steps, axis=1) + steps
  return costs[np.arange(len(others)), lengths]


# Vocabulary.


@functools.cache
def vocabulary() -> tuple[str, ...]:
  """Returns the words that games and prompts are made of.

  Markers, brackets, the words of the grammar, the integers below 225, and
  placeholders of names.

  Raises:
    ValueError: if ludax is not installed.
  """
  fixed = {
    terminal.pattern.value
    for terminal in _parser().terminals
    if type(terminal.pattern).__name__ == "PatternStr"
  }
  return (
    *(marker.strip() for marker in MARKERS),
    *sorted(fixed),
    *map(str, range(_NUM_INTEGERS)),
    GAME,
    *PIECES,
    *REGIONS,
  )


def grammar_tokenizer():
  """Makes a fast tokenizer with one token a word of the language.

  Texts begin with `<bos>`. Decoding gives canonical text. Encoding names other
  than the placeholders (see `neutral`), or integers from 225 on, is an error.

  Raises:
    ValueError: if ludax is not installed.
  """
  from tokenizers import AddedToken, Regex, decoders, pre_tokenizers

  from rljax.tasks import tokenizers

  tokenizer = tokenizers.of_words(vocabulary(), _LEXEME.pattern)
  # They contain a blank, and are found before the text is split at blanks.
  tokenizer.add_tokens(
    [AddedToken(m.strip(), normalized=False) for m in MARKERS]
  )
  backend = tokenizer.backend_tokenizer
  backend.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(Regex(r"\s+"), behavior="removed"),
      pre_tokenizers.Split(Regex(_LEXEME.pattern), behavior="isolated"),
    ]
  )
  backend.decoder = decoders.Sequence(
    [
      # Joins with blanks: no word begins with its continuation prefix.
      decoders.WordPiece(prefix="\0", cleanup=False),
      decoders.Fuse(),
      decoders.Replace("( ", "("),
      decoders.Replace(" )", ")"),
      decoders.Replace(": ", ":"),
    ]
  )
  return tokenizer


# Files of ludax.


@functools.cache
def _folder() -> pathlib.Path:
  spec = importlib.util.find_spec("ludax")
  if spec is None or importlib.util.find_spec("lark") is None:
    raise ValueError(
      "Games need the packages ludax and lark, which are not installed: pip "
      "install ludax==1.0.0 lark."
    )
  return pathlib.Path(spec.origin).parent


@functools.cache
def _shipped() -> dict[str, str]:
  return {
    path.stem: join(words(path.read_text()))
    for path in sorted((_folder() / "games").glob("*.ldx"))
  }
