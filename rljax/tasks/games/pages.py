"""Pages of board games: a position, the rules, and measurements.

A page is one HTML file without scripts or links. The caller plays the games, by
`pool.positions`; here are text and numbers. A page holds only words of the
language: games are shown with placeholders for their names.
"""

import dataclasses
import html
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rljax.storage import paths
from rljax.tasks.games import boards, rules

_WIDTH = 62  # Characters of a line of rules.
_SHORT = 10  # Characters of an expression that needs no line of its own.
_MARGIN = 0.35  # Around a board, in distances between sites.
_RADIUS = 0.33  # Of a piece.
_SHAPES = ("circle", "square", "triangle", "diamond", "star")
_PLAYERS = ("white", "black")


@dataclasses.dataclass(frozen=True)
class Game:
  """Holds one game of a page.

  Attributes:
    text: canonical, following the grammar.
    pieces: by site [kind, player], both from 0, or [] for none; None if
      unknown.
    caption: what the position is.
    facts: name to value, shown above the game.
    closest: canonical text of the known game that is nearest to it, or "".
    closest_name: what that one is called.
  """

  text: str
  pieces: Sequence[Sequence[int]] | None
  caption: str = ""
  facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  closest: str = ""
  closest_name: str = ""


def write(
  path: str | os.PathLike,
  title: str,
  games: Sequence[Game],
  notes: Sequence[str] = (),
) -> None:
  """Writes a page of games, in the given order.

  Args:
    path: of an HTML file; another one is replaced.
    title: of the page.
    games: any number.
    notes: lines above the games.
  """
  body = "".join(_article(i + 1, game) for i, game in enumerate(games))
  page = _PAGE.format(
    title=html.escape(title),
    style=_STYLE,
    notes="".join(f"<p>{html.escape(note)}</p>\n" for note in notes),
    body=body or "<p>There is no such game.</p>",
  )
  paths.write_whole(path, page)


def pretty(text: str, width: int = _WIDTH) -> str:
  """Breaks a game into lines, which are indented.

  Args:
    text: canonical, with matching round brackets.
    width: characters of a line, where that can be met.

  Returns:
    Text with line feeds; `rules.canonical` makes the given one of it.
  """
  return "\n".join(_lines(rules.tree(text), 0, width))


def draw(
  shape: str,
  sizes: tuple[int, ...],
  pieces: Sequence[Sequence[int]] | None = None,
) -> str:
  """Draws a board as SVG, with the number of every empty site.

  Args:
    shape: of the board, see `boards`.
    sizes: of the board.
    pieces: see `Game`.

  Returns:
    An <svg> element.

  Raises:
    ValueError: if there is not one entry for each site.
  """
  sites = boards.positions(shape, sizes)
  pieces = [[]] * len(sites) if pieces is None else pieces
  if len(pieces) != len(sites):
    raise ValueError(
      f"A board of {len(sites)} sites needs as many entries, got {len(pieces)}."
    )
  is_hexagonal = shape.startswith("hex")
  reach = 1 / math.sqrt(3) if is_hexagonal else 0.5  # To a corner of a cell.
  # Three hexagons meet in a corner, so they need three shades.
  if is_hexagonal:
    row = sites[:, 1] / (math.sqrt(3) / 2)
    column = sites[:, 0] - row / 2
    shades = np.round(column - column[0] + 2 * row).astype(int) % 3
  else:
    shades = sites.sum(1).astype(int) % 2
  low, high = sites.min(0) - reach - _MARGIN, sites.max(0) + reach + _MARGIN
  width, height = high - low
  parts = []
  for i, ((x, y), shade, piece) in enumerate(
    zip(sites, shades, pieces, strict=True)
  ):
    parts.append(_cell(x, y, is_hexagonal, shade))
    if piece:
      kind, player = piece
      parts.append(_piece(x, y, kind, player))
    else:
      parts.append(f'<text x="{x:.3f}" y="{y + 0.07:.3f}">{i}</text>')
  return (
    f'<svg viewBox="{low[0]:.3f} {low[1]:.3f} {width:.3f} {height:.3f}" '
    f'role="img" aria-label="a {shape} board">'
    f'<rect class="wood" x="{low[0]:.3f}" y="{low[1]:.3f}" rx=".25" '
    f'width="{width:.3f}" height="{height:.3f}"/>{"".join(parts)}</svg>'
  )


def _cell(x: float, y: float, is_hexagonal: bool, shade: int) -> str:
  if is_hexagonal:
    corners = _polygon(x, y, 6, 0.97 / math.sqrt(3), -math.pi / 2)
    return f'<polygon class="cell s{shade}" points="{corners}"/>'
  return (
    f'<rect class="cell s{shade}" x="{x - 0.485:.3f}" y="{y - 0.485:.3f}" '
    'width=".97" height=".97" rx=".06"/>'
  )


def _piece(x: float, y: float, kind: int, player: int) -> str:
  name, colour = _SHAPES[kind % len(_SHAPES)], _PLAYERS[player % 2]
  if name == "circle":
    return f'<circle class="{colour}" cx="{x:.3f}" cy="{y:.3f}" r="{_RADIUS}"/>'
  if name == "star":
    turns = np.arange(10) * math.pi / 5 - math.pi / 2
    radii = np.where(np.arange(10) % 2, 0.45, 1.2) * _RADIUS
    corners = _points(x + radii * np.cos(turns), y + radii * np.sin(turns))
  else:
    num, scale, turn = {
      "square": (4, 1.2, -math.pi / 4),
      "triangle": (3, 1.25, -math.pi / 2),
      "diamond": (4, 1.2, 0.0),
    }[name]
    # A triangle is placed by its middle, not its centre of mass.
    down = 0.08 if name == "triangle" else 0.0
    corners = _polygon(x, y + down, num, scale * _RADIUS, turn)
  return f'<polygon class="{colour}" points="{corners}"/>'


def _polygon(x: float, y: float, num: int, radius: float, turn: float) -> str:
  turns = np.arange(num) * 2 * math.pi / num + turn
  return _points(x + radius * np.cos(turns), y + radius * np.sin(turns))


def _points(xs: np.ndarray, ys: np.ndarray) -> str:
  return " ".join(f"{x:.3f},{y:.3f}" for x, y in zip(xs, ys, strict=True))


def _lines(node: list, indent: int, width: int) -> list[str]:
  """Returns the lines of an expression, with their indentation."""
  flat = _flat(node)
  if indent + len(flat) <= width:
    return [" " * indent + flat]
  # What precedes the first longer expression stays on the line of the bracket,
  # as do arguments with names.
  first, is_open = " " * indent + "(", True
  lines: list[str] = []
  inside = " " * (indent + 2)
  for i, child in enumerate(node):
    is_list = isinstance(child, list)
    found = _flat(child) if is_list else child
    is_named = i > 0 and str(node[i - 1]).endswith(":")
    last = lines[-1] if lines else first
    blank = "" if is_named or last.endswith("(") else " "
    is_short = not is_list or is_named or (is_open and len(found) <= _SHORT)
    fits = len(last) + len(blank) + len(found) <= width
    # A word continues the line of the word before it.
    after_word = is_open or not isinstance(node[i - 1], list) or is_named
    if is_named or i == 0 or (is_short and fits and after_word):
      if lines:
        lines[-1] += blank + found
      else:
        first += blank + found
      continue
    is_open = False
    lines += _lines(child, indent + 2, width) if is_list else [inside + child]
  lines = [first, *lines]
  lines[-1] += ")"
  return lines


def _flat(node: list) -> str:
  return rules.join(_words(node))


def _words(node: list) -> list[str]:
  found = ["("]
  for child in node:
    found += _words(child) if isinstance(child, list) else [child]
  return [*found, ")"]


def _article(number: int, game: Game) -> str:
  text = rules.neutral(game.text)
  shape, sizes = boards.board(text)
  facts = "".join(
    f"<div><dt>{html.escape(str(name))}</dt>"
    f"<dd>{html.escape(_fact(value))}</dd></div>"
    for name, value in game.facts.items()
  )
  closest = ""
  if game.closest:
    closest = (
      f"<details><summary>The closest known game: "
      f"{html.escape(game.closest_name)}</summary>"
      f"<pre>{html.escape(pretty(rules.neutral(game.closest)))}</pre>"
      "</details>"
    )
  board = draw(shape, sizes, game.pieces)
  return (
    f"<article><header><b>{number}</b><dl>{facts}</dl></header>"
    f'<div class="columns"><figure>{board}'
    f"<figcaption>{html.escape(game.caption)}</figcaption></figure>"
    f"<section><pre>{_coloured(pretty(text))}</pre>{closest}</section></div>"
    "</article>\n"
  )


def _coloured(text: str) -> str:
  """Marks up brackets and numbers of rules, escaped."""
  parts = []
  for line in text.split("\n"):
    bare = line.lstrip(" ")
    parts.append(" " * (len(line) - len(bare)))
    end = 0
    for lexeme, start in rules.placed_words(bare):
      parts.append(html.escape(bare[end:start]))
      end = start + len(lexeme)
      kind = _kind(lexeme, bare[:start])
      escaped = html.escape(lexeme)
      parts.append(f"<{kind}>{escaped}</{kind}>" if kind else escaped)
    parts.append("\n")
  return "".join(parts[:-1])


def _kind(lexeme: str, before: str) -> str:
  """Returns the element of a word: bracket, head, name or number."""
  if lexeme in "()":
    return "i"
  if lexeme.isdigit() or lexeme.startswith('"'):
    return "u"
  is_head = before.endswith("(") and lexeme not in ("P1", "P2")
  return "b" if is_head else ""


def _fact(value: Any) -> str:
  if isinstance(value, float):
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.0f}"
  return str(value)


_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --dim: #59636e;
  --line: #d5dae0; --paper: #fff; --card: #fbfcfd; --name: #0b6e4f;
  --head: #0550ae; }
@media (prefers-color-scheme: dark) { :root { --ink: #e9ecef; --dim: #9ba5b0;
  --line: #363d45; --paper: #14171b; --card: #1a1e23; --name: #6fd0a8;
  --head: #8ab8ff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1rem clamp(.6rem, 2vw, 2rem);
  background: var(--paper); color: var(--ink);
  font: 1rem/1.45 system-ui, sans-serif; -webkit-text-size-adjust: 100%; }
h1 { font-size: 1.35rem; margin: .3rem 0; overflow-wrap: anywhere; }
p, dt, figcaption, summary, header > b { color: var(--dim); }
p { margin: .3rem 0; max-width: 60rem; font-size: .92rem; }
article { margin: 1.2rem 0; border: 1px solid var(--line); border-radius: 8px;
  background: var(--card); overflow: hidden; break-inside: avoid; }
header { display: flex; gap: .9rem; align-items: baseline; font-size: .85rem;
  padding: .45rem .9rem; border-bottom: 1px solid var(--line); }
dl { display: flex; flex-wrap: wrap; gap: .1rem 1.2rem; margin: 0; }
dl div { display: flex; gap: .4rem; }
dd { margin: 0; font-weight: 600; font-variant-numeric: tabular-nums; }
.columns { display: grid; gap: 1.4rem; padding: .9rem; align-items: start;
  grid-template-columns: minmax(0, 21rem) minmax(0, 1fr); }
figure { margin: 0; }
figcaption { font-size: .8rem; text-align: center; padding-top: .35rem; }
section { min-width: 0; }
pre { margin: 0; overflow-x: auto; font: .82rem/1.38rem ui-monospace,
  "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
pre i { font-style: normal; opacity: .4; }
pre b { font-weight: 600; color: var(--head); }
pre u { text-decoration: none; color: var(--name); }
details { margin-top: .7rem; font-size: .85rem; }
details pre { padding-top: .4rem; color: var(--dim); }
summary { cursor: pointer; }
svg { display: block; width: 100%; max-height: 21rem; }
svg text { font: .2px system-ui, sans-serif; text-anchor: middle;
  fill: #6b4f2c; opacity: .55; }
.wood { fill: #b98a54; }
.cell { stroke: none; }
.s0 { fill: #eed9b6; } .s1 { fill: #e3c799; } .s2 { fill: #d9b885; }
.white { fill: #fdfcf8; stroke: #3a3129; stroke-width: .045;
  stroke-linejoin: round; }
.black { fill: #26292e; stroke: #0c0d0f; stroke-width: .045;
  stroke-linejoin: round; }
@media (max-width: 48rem) { .columns { grid-template-columns: 1fr; } }
@media print { * { print-color-adjust: exact; } }
"""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
{notes}{body}
</body>
</html>
"""
