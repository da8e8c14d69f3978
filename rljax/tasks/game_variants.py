"""New board games, made by changing those that ludax ships."""

import importlib.metadata
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import logging

from rljax import data as files
from rljax.tasks import game_pool, game_rewards, game_rules, games

LICENCE = "Apache-2.0"

_DRAWN_AT_ONCE = 32
_MAX_CHANGES = 3
# Words that may stand for each other.
_GROUPS = (
  ("true", "false"),
  ("win", "lose"),
  ("mover", "opponent"),
  ("and", "or"),
  ("any", "orthogonal", "diagonal", "horizontal", "vertical"),
  ("up", "down", "left", "right"),
  ("up_left", "up_right", "down_left", "down_right"),
  ("forward", "backward"),
  ("forward_left", "forward_right", "backward_left", "backward_right"),
  ("top", "bottom"),
  ("hop", "step", "slide"),
  (">=", "<=", "="),
)
_OTHERS = {
  word: tuple(other for other in group if other != word)
  for group in _GROUPS
  for word in group
}
_SHAPES = ("square", "rectangle", "hexagon", "hex_rectangle")


def expand(
  path: str | os.PathLike,
  *,
  num: int,
  split: str = "train",
  seed: int = 0,
  min_quality: float = 0.1,
  max_sites: int = game_rules.MAX_SITES,
  num_games: int = 32,
  max_plies: int = 300,
  max_tries: int | None = None,
  cache: str = "",
  seconds: float = 20.0,
  memory_gb: float = 2.0,
  num_workers: int | None = None,
) -> list[dict[str, Any]]:
  """Makes new games from those that ludax ships, and writes what can be played.

  A game is changed in one to three places: an expression becomes another one
  with the same first word, from any game so far; or an integer, a direction or
  the like becomes another one. Those that pass all checks, are good in the
  sense of `games.score_batch` and have at least the asked quality are kept,
  and may be changed again. No two are the same.

  Args:
    path: of a file of JSON lines. A notice of where the games come from, and
      their licence, are written next to it, in <path>.NOTICE.
    num: how many games, the shipped ones among them.
    split: whose shipped games to begin with; see `games.prompts`.
    seed: of the changes, and of the games that are played.
    min_quality: q of `game_rewards.quality` that a game must have.
    max_sites: see `games.score_batch`; likewise the others.
    num_games: see `games.score_batch`.
    max_plies: see `games.score_batch`.
    max_tries: how many changed games to look at; None for 50 per asked game.
    cache: see `games.score_batch`.
    seconds: see `games.score_batch`.
    memory_gb: see `games.score_batch`.
    num_workers: see `games.score_batch`.

  Returns:
    The rows that were written, shipped games first: `text`, `split`, `parents`
    (a shipped game's name, or the numbers of rows, from 0), `roots` (shipped
    games that it comes from), `changes` (a word each), `quality`, `balance`,
    `decisive`, `plies`, `seed`, `licence` and `source`. There may be fewer
    than asked for, which is logged.

  Raises:
    ValueError: if an option is unknown, ludax is not installed, or no shipped
      game of the split fits.
  """
  options = {
    "seed": seed,
    "num_games": num_games,
    "max_plies": max_plies,
    "cache": cache,
    "seconds": seconds,
    "memory_gb": memory_gb,
    "num_workers": num_workers,
  }
  max_tries = 50 * num if max_tries is None else max_tries
  fits = set(games.texts(split, max_sites=max_sites))
  rng = np.random.default_rng([seed, games.SPLITS.index(split)])
  fixed = {
    "split": split,
    "seed": seed,
    "licence": LICENCE,
    "source": f"ludax {importlib.metadata.version('ludax')}",
  }
  drawn = [
    {"text": text, "parents": [name], "roots": [name], "changes": []}
    for name, text in games.shipped(split).items()
    if text in fits
  ]
  if not drawn:
    raise ValueError(
      f"No shipped game of the split {split!r} has at most {max_sites} sites."
    )
  rows: list[dict[str, Any]] = []
  seen = {row["text"] for row in drawn}
  donors, tries = _Donors(), 0
  while True:
    for row, measurement in zip(
      drawn,
      game_pool.measure([row["text"] for row in drawn], **options),
      strict=True,
    ):
      parts = game_rewards.unread("played")
      game_rewards.judge(parts, measurement, max_plies, "true", games.MIN_PLIES)
      kept = {
        name: parts[name]
        for name in ("quality", "balance", "decisive", "plies")
      }
      is_good = parts["is_playable"] and parts["is_good"]
      is_shipped = not row["changes"]
      if is_shipped or (is_good and parts["quality"] >= min_quality):
        donors.add(row["text"], len(rows))
        rows.append(row | kept | fixed)
    if len(rows) >= num or tries >= max_tries:
      break
    drawn = []
    while len(drawn) < _DRAWN_AT_ONCE and tries < max_tries:
      tries += 1
      index = int(rng.integers(len(rows)))
      text, changes, others = _changed(rows[index]["text"], donors, rng)
      if text in seen or not _is_sound(text, max_sites):
        continue
      seen.add(text)
      parents = list(dict.fromkeys([index, *others]))
      roots = [root for i in parents for root in rows[i]["roots"]]
      drawn.append(
        {
          "text": text,
          "parents": parents,
          "roots": list(dict.fromkeys(roots)),
          "changes": changes,
        }
      )
  rows = rows[:num]
  if len(rows) < num:
    logging.warning(
      "%d of %d games were found in %d tries.", len(rows), num, tries
    )
  files.write_jsonl(path, rows)
  pathlib.Path(f"{path}.NOTICE").write_text(game_rules.notice())
  return rows


class _Donors:
  """Expressions by their first words, each with a game that has it."""

  def __init__(self):
    self._found: dict[str, list[tuple[str, int]]] = {}
    self._seen: set[str] = set()

  def add(self, text: str, game: int) -> None:
    for _, middle, _ in game_rules.cuts(text):
      if middle not in self._seen:
        self._seen.add(middle)
        self._found.setdefault(_head(middle), []).append((middle, game))

  def like(self, expression: str) -> list[tuple[str, int]]:
    return self._found.get(_head(expression), [])


def _changed(
  text: str,
  donors: _Donors,
  rng: np.random.Generator,
) -> tuple[str, list[str], list[int]]:
  """A changed game, the kinds of its changes, and the games that gave to it."""
  kinds, sources = [], []
  for _ in range(min(int(rng.geometric(0.7)), _MAX_CHANGES)):
    if rng.random() < 0.5:
      kinds.append("swap")
      cuts = game_rules.cuts(text)
      prefix, middle, suffix = cuts[rng.integers(len(cuts))]
      others = donors.like(middle)
      if others:  # A changed word may begin what no game has.
        other, game = others[rng.integers(len(others))]
        sources.append(game)
        text = prefix + other + suffix
    else:
      lexemes = game_rules.words(text)
      places = [
        i
        for i, word in enumerate(lexemes)
        if word.isdigit() or word in _OTHERS or word in _SHAPES
      ]
      i = int(rng.choice(places))
      if lexemes[i].isdigit():
        kinds.append("integer")
        step = int(rng.choice([-2, -1, 1, 2]))
        lexemes[i] = str(max(int(lexemes[i]) + step, 0))
      elif lexemes[i] in _SHAPES:
        kinds.append("shape")
        end = lexemes.index(")", i)
        lexemes[i:end] = _shape(lexemes[i + 1 : end], rng)
      else:
        kinds.append("word")
        lexemes[i] = str(rng.choice(_OTHERS[lexemes[i]]))
      text = game_rules.join(lexemes)
  return text, kinds, sources


def _shape(sizes: Sequence[str], rng: np.random.Generator) -> list[str]:
  size = int(sizes[0])
  shape = str(rng.choice(_SHAPES))
  if shape == "hexagon":
    return [shape, str(size | 1)]
  if shape == "square":
    return [shape, str(size)]
  return [shape, *(str(max(size + int(rng.integers(-1, 2)), 1)) for _ in "ab")]


def _head(expression: str) -> str:
  return game_rules.words(expression[:200])[1]


def _is_sound(text: str, max_sites: int) -> bool:
  return (
    game_rules.canonical(text) == text
    and game_rules.progress(text)[1]
    and all(game_rules.checks(text, max_sites=max_sites).values())
  )
