"""Boards of games: the places of their sites, and games on other boards.

Functions of text and numpy. A board is its shape and its sizes, as a
description names them: ("square", (8,)), ("rectangle", (6, 7)), ("hexagon",
(9,)) for the length of its longest row, ("hex_rectangle", (11, 11)).
"""

import functools
import math

import numpy as np

from rljax.tasks.games import rules

SHAPES = ("square", "rectangle", "hexagon", "hex_rectangle")

Board = tuple[str, tuple[int, ...]]

_LEAST = 9  # Least sites of a board.


def board(text: str) -> Board:
  """Returns the board of a game.

  Args:
    text: canonical, and following the grammar.
  """
  lexemes = rules.words(text)
  start = lexemes.index("board") + 2
  end = lexemes.index(")", start)
  return lexemes[start], tuple(map(int, lexemes[start + 1 : end]))


@functools.lru_cache(256)
def positions(shape: str, sizes: tuple[int, ...]) -> np.ndarray:
  """Returns where the sites of a board are.

  Args:
    shape: one of `SHAPES`.
    sizes: of the board.

  Returns:
    `[M, 2]` float: x to the right and y down, in distances between neighbours.
  """
  height = math.sqrt(3) / 2
  if shape == "hexagon":
    (rows,) = sizes
    return np.array(
      [
        (abs(row - rows // 2) / 2 + i, row * height)
        for row in range(rows)
        for i in range(rows - abs(row - rows // 2))
      ]
    )
  rows, columns = sizes if len(sizes) == 2 else sizes * 2
  y, x = np.divmod(np.arange(rows * columns), columns)
  if shape == "hex_rectangle":
    return np.stack([x + y / 2, y * height], axis=1)
  return np.stack([x, y], axis=1).astype(float)


@functools.lru_cache(16)
def boards(max_sites: int) -> dict[str, tuple[tuple[int, ...], ...]]:
  """Returns the sizes of boards with 9 sites or more, by shape.

  Args:
    max_sites: how many a board may have.
  """
  sizes = range(3, max_sites // 3 + 1)
  pairs = [(a, b) for a in sizes for b in sizes if max(a, b) <= 2 * min(a, b)]
  offered = {
    "square": [(n,) for n in sizes],
    "rectangle": [(a, b) for a, b in pairs if a != b],
    "hexagon": [(n,) for n in sizes if n % 2],
    "hex_rectangle": pairs,
  }
  return {
    shape: tuple(
      sizes
      for sizes in found
      if _LEAST <= rules.dimensions(shape, sizes)[2] <= max_sites
    )
    for shape, found in offered.items()
  }


def on_board(text: str, shape: str, sizes: tuple[int, ...]) -> str:
  """Moves a game to another board.

  Single sites, rows and columns in the rules move to their place on the new
  board: the middle stays the middle, the edge the edge. Of pieces on the same
  site, the first one is placed. Lines of more than about half of a smaller
  board are shortened to that, since they would rarely be completed.

  Args:
    text: canonical, and following the grammar.
    shape: one of `SHAPES`.
    sizes: of the new board.

  Returns:
    Canonical text.
  """
  old = board(text)
  if old == (shape, sizes):
    return text
  site = _nearest(old, (shape, sizes))
  before = rules.dimensions(*old)
  after = rules.dimensions(shape, sizes)
  longest = 3 if max(after[:2]) < 6 else (max(after[:2]) + 2) // 2
  lexemes = rules.words(text)
  found: list[str] = []
  taken: set[int] = set()
  in_start, i = False, 0
  while i < len(lexemes):
    word, last = lexemes[i], found[-1] if found else ""
    if word == "(" and lexemes[i + 1].isdigit():
      end = lexemes.index(")", i)
      if "(" in lexemes[i + 1 : end]:  # A pattern has places of its own.
        found += lexemes[i : end + 1]
      else:
        numbers = [rules.integer(n) for n in lexemes[i + 1 : end]]
        moved = [site[n] if n < len(site) else n for n in numbers]
        moved = list(dict.fromkeys(moved))
        if in_start:
          moved = [n for n in moved if n not in taken] or moved[:1]
          taken.update(moved)
        found += ["(", *map(str, moved), ")"]
      i = end + 1
      continue
    if word in ("start", "play"):
      in_start = word == "start"
    elif word == "board":
      end = lexemes.index(")", i)
      found += ["board", "(", shape, *map(str, sizes)]
      i = end
      continue
    elif last in ("row", "column") and word.isdigit():
      axis = last == "column"
      scale = (after[axis] - 1) / max(before[axis] - 1, 1)
      word = str(max(round(rules.integer(word) * scale), 0))
    elif word.isdigit() and found[-2:-1] == ["line"] and after[2] < before[2]:
      word = str(min(rules.integer(word), longest))
    found.append(word)
    i += 1
  return rules.join(found)


def smaller(text: str, max_sites: int, num: int = 2) -> list[str]:
  """Moves a game to the largest boards of its shape that are small enough.

  Args:
    text: canonical, and following the grammar.
    max_sites: how many a board may have.
    num: boards at most.

  Returns:
    Canonical texts, those on the larger boards first; none if the board of
    the game is small enough.
  """
  shape, sizes = board(text)
  if rules.dimensions(shape, sizes)[2] <= max_sites:
    return []
  ratio = sizes[0] / sizes[-1]
  fitting = sorted(
    boards(max_sites)[shape],
    key=lambda new: (
      abs(math.log(new[0] / new[-1] / ratio)) > 0.2,
      -rules.dimensions(shape, new)[2],
      new,
    ),
  )
  return [on_board(text, shape, new) for new in fitting[:num]]


@functools.lru_cache(1024)
def _nearest(old: Board, new: Board) -> tuple[int, ...]:
  """Returns for each site of a board the nearest one on another board."""
  places = []
  for found in (positions(*old), positions(*new)):
    low, high = found.min(0), found.max(0)
    places.append((found - low) / np.maximum(high - low, 1))
  gaps = np.linalg.norm(places[0][:, None] - places[1], axis=-1)
  # Equal distances are not equal in floats; the first of them is taken.
  return tuple(np.argmin(gaps.round(6), axis=1).tolist())
