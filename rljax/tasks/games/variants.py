"""Makes new board games by changing those that ludax ships."""

import importlib.metadata
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from absl import logging

from rljax.tasks import games
from rljax.tasks.games import boards, pool, rewards, rules
from rljax.text import files

LICENCE = "Apache-2.0"
# Most sites of a board for a study on a CPU: those of a hexagon of side 4.
MAX_SITES = 37
MIN_SITES = 9  # A board with less has no room for a game.

_DRAWN_AT_ONCE = 32
_MAX_CHANGES = 3
_COURSE = ("first", "second", "timeouts", "plies", "decisions", "branching")
# Words that may replace each other.
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


def expand(
  *,
  num: int,
  split: str = "train",
  seed: int = 0,
  min_quality: float = 0.1,
  max_sites: int = MAX_SITES,
  num_games: int = 32,
  max_plies: int = 300,
  max_tries: int | None = None,
  apart_from: Sequence[str] = (),
  cache: str = "",
  seconds: float = 10.0,
  memory_gb: float = 2.0,
  num_workers: int | None = None,
  progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
  """Makes new games from those that ludax ships, and keeps playable ones.

  A game is changed in one to three places: an expression becomes another one
  with the same first word, from any game so far; the board becomes another one,
  see `boards.on_board`; or an integer, a direction or the like becomes another
  one. Those that pass all checks, are good in the sense of `games.score_batch`
  and have at least the given quality are kept, and may be changed again. No two
  are the same or play the same: of changes without effect, the first one
  counts. A shipped game whose board is too large is first moved to a smaller
  one.

  Args:
    num: how many games, the shipped ones among them.
    split: whose shipped games to start from; see `games.prompts`.
    seed: of the changes, and of the games that are played.
    min_quality: q of `rewards.quality` that a game must have.
    max_sites: see `games.score_batch`; likewise the others.
    num_games: see `games.score_batch`.
    max_plies: see `games.score_batch`.
    max_tries: how many changed games to try; None for 50 per game of `num`.
    apart_from: games of other splits, which are not made again, even under
      other names of their pieces.
    cache: see `games.score_batch`. Here it also keeps limits that were hit, so
      that repeated calls agree.
    seconds: see `games.score_batch`.
    memory_gb: see `games.score_batch`.
    num_workers: see `games.score_batch`.
    progress: called now and then with the numbers of games kept and of games
      played.

  Returns:
    Rows, shipped games first: `name`, `text`, `split`, `parents` (names of rows
    or of shipped games), `roots` (shipped games that it comes from), `changes`
    (a word each), `quality`, `balance`, `decisive`, `plies`, `seed`, `licence`
    and `source`. There may be fewer than asked for, which is logged.

  Raises:
    ValueError: if an option is unknown, ludax is not installed, or no shipped
      game of the split fits on such a board.
  """
  check_options(num=num, min_quality=min_quality, max_sites=max_sites)
  options = {
    "seed": seed,
    "num_games": num_games,
    "max_plies": max_plies,
    "cache": cache,
    "seconds": seconds,
    "memory_gb": memory_gb,
    "num_workers": num_workers,
    "keep_limits": True,
  }
  drawn = _first(split, max_sites)
  max_tries = 50 * num if max_tries is None else max_tries
  rng = np.random.default_rng([seed, games.SPLITS.index(split)])
  fixed = {
    "split": split,
    "seed": seed,
    "licence": LICENCE,
    "source": f"ludax {importlib.metadata.version('ludax')}",
  }
  if not drawn:
    raise ValueError(
      f"No shipped game of the split {split!r} fits on {max_sites} sites."
    )
  is_known = _known(apart_from)
  rows: list[dict[str, Any]] = []
  # Games that may be changed, with some of the first that are not good.
  found: list[dict[str, Any]] = []
  seen = {row["text"] for row in drawn}
  # The same moves are drawn in all games: games with equal courses are alike.
  played: set[tuple] = set()
  donors, tries, num_played = _Donors(), 0, 0
  while True:
    # Measurements are kept, so that small batches only cost waiting.
    measured = pool.measure([row["text"] for row in drawn], **options)
    num_played += len(drawn)
    for row, measurement in zip(drawn, measured, strict=True):
      quality, is_good = _quality(measurement, max_plies, min_quality)
      course = tuple(measurement.get(name) for name in _COURSE)
      is_good = is_good and course not in played
      played.add(course)
      is_kept = (is_good or not row["changes"]) and not is_known(row["text"])
      name = row["parents"][0]
      if is_kept:
        name = f"{split}_{len(rows)}"
        rows.append({"name": name} | row | quality | fixed)
      # Games that cost too much would have costly children.
      is_first = num_played == len(drawn) and measurement["stage"] == "played"
      if is_kept or is_first:
        donors.add(row["text"], len(found))
        found.append(row | {"name": name})
    if progress is not None:
      progress(min(len(rows), num), num_played)
    if len(rows) >= num or tries >= max_tries:
      break
    drawn, tried = _draw(
      found, donors, rng, seen, max_sites=max_sites, max_tries=max_tries - tries
    )
    tries += tried
  rows = rows[:num]
  if len(rows) < num:
    logging.warning(
      "%d of %d games were found in %d tries.", len(rows), num, tries
    )
  return rows


def check_options(*, num: int, min_quality: float, max_sites: int) -> None:
  """Raises ValueError for options of `expand` that cannot be met."""
  if num < 1:
    raise ValueError(f"num must be positive, got {num}.")
  if not 0 <= min_quality <= 1:
    raise ValueError(f"min_quality must be from 0 to 1, got {min_quality}.")
  if not MIN_SITES <= max_sites <= rules.MAX_SITES:
    raise ValueError(
      f"max_sites must be from {MIN_SITES} to {rules.MAX_SITES}, got "
      f"{max_sites}."
    )


def write(path: str | os.PathLike, rows: Sequence[dict[str, Any]]) -> None:
  """Writes games of `expand`, with a notice of their source.

  Args:
    path: of a file of JSON lines. A notice of the games' source and licence is
      written beside it, to <path>.NOTICE.
    rows: of one split or several.
  """
  files.write_jsonl(path, rows)
  pathlib.Path(f"{path}.NOTICE").write_text(rules.notice())


def _quality(
  measurement: dict[str, Any], max_plies: int, min_quality: float
) -> tuple[dict[str, Any], bool]:
  """Returns a row's columns on the quality of a game, and if it is good."""
  parts = rewards.unread("played")
  rewards.judge(parts, measurement, max_plies, "true", games.MIN_PLIES)
  names = ("quality", "balance", "decisive", "plies")
  is_good = parts["is_playable"] and parts["is_good"]
  is_good = is_good and parts["quality"] >= min_quality
  return {name: parts[name] for name in names}, is_good


def _draw(
  found: Sequence[dict[str, Any]],
  donors: "_Donors",
  rng: np.random.Generator,
  seen: set[str],
  *,
  max_sites: int,
  max_tries: int,
) -> tuple[list[dict[str, Any]], int]:
  """Makes changed games that were not seen before, and counts the tries.

  Their texts join `seen`.
  """
  drawn, tries = [], 0
  while len(drawn) < _DRAWN_AT_ONCE and tries < max_tries:
    tries += 1
    index = int(rng.integers(len(found)))
    text, changes, others = _changed(
      found[index]["text"], donors, rng, max_sites
    )
    if text in seen or not _is_sound(text, max_sites):
      continue
    seen.add(text)
    sources = [found[i] for i in dict.fromkeys([index, *others])]
    roots = [root for source in sources for root in source["roots"]]
    parents = [source["name"] for source in sources]
    drawn.append(
      {
        "text": text,
        "parents": list(dict.fromkeys(parents)),
        "roots": list(dict.fromkeys(roots)),
        "changes": changes,
      }
    )
  return drawn, tries


def _first(split: str, max_sites: int) -> list[dict[str, Any]]:
  """Returns the shipped games of a split, on boards that are small enough."""
  drawn: dict[str, dict[str, Any]] = {}
  shipped = games.shipped(split)
  for name, text in shipped.items():
    drawn.setdefault(
      text, {"text": text, "parents": [name], "roots": [name], "changes": []}
    )
  for name, text in shipped.items():
    for small in boards.smaller(text, max_sites):
      drawn.setdefault(
        small,
        {
          "text": small,
          "parents": [name],
          "roots": [name],
          "changes": ["board"],
        },
      )
  return [row for row in drawn.values() if _is_sound(row["text"], max_sites)]


def _known(texts: Sequence[str]) -> Callable[[str], bool]:
  if not texts:
    return lambda text: False
  distance = rules.Novelty(list(texts))
  return lambda text: distance(text) == 0


class _Donors:
  """Holds expressions by their first words, each with a game that has it."""

  def __init__(self):
    self._found: dict[str, list[tuple[str, int]]] = {}
    self._seen: set[str] = set()

  def add(self, text: str, game: int) -> None:
    for _, middle, _ in rules.cuts(text):
      if middle not in self._seen:
        self._seen.add(middle)
        self._found.setdefault(_head(middle), []).append((middle, game))

  def like(self, expression: str) -> list[tuple[str, int]]:
    return self._found.get(_head(expression), [])


def _changed(
  text: str,
  donors: _Donors,
  rng: np.random.Generator,
  max_sites: int,
) -> tuple[str, list[str], list[int]]:
  """Returns a changed game, the kinds of its changes, and their sources."""
  kinds, sources = [], []
  for _ in range(min(int(rng.geometric(0.7)), _MAX_CHANGES)):
    draw = rng.random()
    if draw < 0.4:
      kinds.append("swap")
      cuts = rules.cuts(text)
      prefix, middle, suffix = cuts[rng.integers(len(cuts))]
      others = donors.like(middle)
      if others:  # A changed word may begin an expression that no game has.
        other, game = others[rng.integers(len(others))]
        sources.append(game)
        text = prefix + other + suffix
    elif draw < 0.55 and "(board (" in text:
      kinds.append("board")
      sizes_of = boards.boards(max_sites)
      shape, _ = boards.board(text)
      if rng.random() < 0.5:
        shape = str(rng.choice(boards.SHAPES))
      sizes = sizes_of[shape][rng.integers(len(sizes_of[shape]))]
      text = boards.on_board(text, shape, sizes)
    else:
      lexemes = rules.words(text)
      places = [
        i for i, word in enumerate(lexemes) if word.isdigit() or word in _OTHERS
      ]
      i = int(rng.choice(places))
      if lexemes[i].isdigit():
        kinds.append("integer")
        step = int(rng.choice([-2, -1, 1, 2]))
        lexemes[i] = str(max(rules.integer(lexemes[i]) + step, 0))
      else:
        kinds.append("word")
        lexemes[i] = str(rng.choice(_OTHERS[lexemes[i]]))
      text = rules.join(lexemes)
  return text, kinds, sources


def _head(expression: str) -> str:
  return rules.words(expression[:200])[1]


def _is_sound(text: str, max_sites: int) -> bool:
  return (
    rules.canonical(text) == text
    and rules.progress(text)[1]
    and all(rules.checks(text, max_sites=max_sites).values())
  )
