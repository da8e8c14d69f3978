"""Board games in the language of ludax, scored by playing them.

  ### PRE:(game "game" (players 2) ### SUF:  (rules ...) ### MID:

asks for the text between two parts of a description, here the equipment. A
response is put in its place, and the resulting game is scored by how far it
gets: it is read, checked, compiled, played at random, and then scored for games
that are fair, decided, short enough and new. The last steps run in worker
processes with limits, since the cost of a description is unknown.

The games are those that ludax ships (Apache-2.0), and those that
`variants.expand` makes of them. The game files of Ludii, which the paper used,
are not used: their licence allows no changes.

Source:
  Padula and Soemers (2024), "Exploring RL-based LLM Training for Formal
  Language Tasks with Programmed Rewards": the records and the reward "ladder".
  The reward "graded" is ours.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from absl import logging

from rljax.tasks.games import grammar as grammar_lib
from rljax.tasks.games import pool, rewards, rules
from rljax.text import files

SPLITS = ("train", "validation", "test")
# Games of validation and test, which training does not have.
HELD_OUT = {"validation": ("gomoku", "yavalath"), "test": ("hex", "reversi")}
MIN_PLIES = 4  # Mean length of a game, for the reward "graded".
WHOLE = rules.gap("", "")  # Asks for a whole game.

_SKIPPED = ("test",)  # A test of the compiler, not a game.


# Prompts.


def prompts(
  split: str,
  seed: int,
  *,
  num: int | None = None,
  form: Literal["middle", "whole"] = "middle",
  corpus: str = "",
  min_share: float = 0.2,
  max_sites: int = rules.MAX_SITES,
  max_words: int = 0,
  max_gap: int = 0,
) -> list[str]:
  """Draws games with a gap, shuffled by the seed.

  Args:
    split: "train", "validation" or "test"; they have different games.
    seed: of the order; >= 0.
    num: how many; None for all. A larger number than there are gives
      repetitions.
    form: "middle" for games with an expression cut out; "whole" for an empty
      game, the same for all prompts.
    corpus: file of `variants.expand` to take the games of this split from;
      "" for those that ludax ships.
    min_share: least characters that are cut out, per character of the prompt.
    max_sites: of a board; larger ones are left out.
    max_words: of a game, as `rules.words` counts them; longer ones are
      left out. 0 for no limit.
    max_gap: most words that are cut out; 0 for no limit.

  Returns:
    Prompts, see `rules.gap`, of canonical text with placeholders for
    names.

  Raises:
    ValueError: if an option is unknown, ludax is not installed, a file is not
      as expected, or no game fits.
  """
  return [
    prompt
    for prompt, _ in supervised(
      split,
      seed,
      num=num,
      form=form,
      corpus=corpus,
      min_share=min_share,
      max_sites=max_sites,
      max_words=max_words,
      max_gap=max_gap,
    )
  ]


def supervised(
  split: str,
  seed: int,
  *,
  num: int | None = None,
  form: Literal["middle", "whole"] = "middle",
  corpus: str = "",
  min_share: float = 0.2,
  max_sites: int = rules.MAX_SITES,
  max_words: int = 0,
  max_gap: int = 0,
) -> list[tuple[str, str]]:
  """Draws the prompts of `prompts` with what was cut out of the games.

  Args:
    split: see `prompts`; likewise the others.
    seed: see `prompts`.
    num: see `prompts`.
    form: see `prompts`.
    corpus: see `prompts`.
    min_share: see `prompts`; 0 for all expressions.
    max_sites: see `prompts`.
    max_words: see `prompts`.
    max_gap: see `prompts`.

  Returns:
    Pairs of a prompt and a response.

  Raises:
    ValueError: as `prompts`.
  """
  if form not in ("middle", "whole"):
    raise ValueError(f'form must be "middle" or "whole", got {form!r}.')
  most = max_gap or math.inf
  known = texts(split, corpus=corpus, max_sites=max_sites)
  games = [
    text
    for text in known
    if not max_words or len(rules.words(text)) <= max_words
  ]
  if form == "whole":
    games = [text for text in games if len(rules.words(text)) <= most]
    rows = [(WHOLE, text) for text in games]
  else:
    rows = [
      (prompt, middle)
      for text in games
      for prefix, middle, suffix in rules.cuts(text)
      for prompt in [rules.gap(prefix, suffix)]
      if len(middle) >= min_share * len(prompt)
      and len(rules.words(middle)) <= most
    ]
  rows = list(dict.fromkeys(rows))
  if not rows:
    raise ValueError(
      f"The split {split!r} has no game of at most {max_sites} sites with a "
      f"gap of min_share={min_share} within max_words={max_words} and "
      f"max_gap={max_gap}."
    )
  logging.info(
    "%d gaps in %d of %d games of the split %r; others are too long.",
    len(rows),
    len(games),
    len(known),
    split,
  )
  num = len(rows) if num is None else num
  rng = np.random.default_rng([seed, SPLITS.index(split)])
  # Whole rounds first, so that a small draw has no repetition.
  order = [rng.permutation(len(rows)) for _ in range(-(-num // len(rows)))]
  return [rows[i] for i in np.concatenate([*order, []])[:num].astype(int)]


def texts(
  split: str, *, corpus: str = "", max_sites: int = rules.MAX_SITES
) -> list[str]:
  """Returns the games of a split, with placeholders for names.

  Args:
    split: "train", "validation" or "test".
    corpus: see `prompts`.
    max_sites: of a board. Games that fail `rules.checks` are left out.

  Returns:
    Different canonical texts.

  Raises:
    ValueError: if there is no such split, ludax is not installed, or the file
      is not as expected.
  """
  if corpus:
    _check_split(split)
    found = [
      row["text"] for row in _corpus(str(corpus)) if row["split"] == split
    ]
  else:
    found = list(shipped(split).values())
  different = list(dict.fromkeys(found))
  kept = [
    text
    for text in different
    if all(rules.checks(text, max_sites=max_sites).values())
  ]
  if corpus and len(kept) < len(different):
    logging.warning(
      "%d of %d games of the split %r are left out: boards of more than %d "
      "sites, or another check that fails.",
      len(different) - len(kept),
      len(different),
      split,
      max_sites,
    )
  return kept


def shipped(split: str) -> dict[str, str]:
  """Returns a split of ludax's own games, with placeholders for names.

  Raises:
    ValueError: if there is no such split, or ludax is not installed.
  """
  _check_split(split)
  held_out = {name for names in HELD_OUT.values() for name in names}
  return {
    name: rules.neutral(text)
    for name, text in rules.shipped().items()
    if name not in _SKIPPED
    if name in HELD_OUT.get(split, ())
    or (split == "train" and name not in held_out)
  }


def corpus_rows(path: str) -> list[dict[str, Any]]:
  """Reads the rows of a file of `variants.write`.

  Raises:
    ValueError: if it is not as expected.
  """
  return list(_corpus(str(path)))


def grammar_tokenizer():
  """Makes a fast tokenizer of the language; see `rules`."""
  return rules.grammar_tokenizer()


def grammar(tokenizer: Any, vocab_size: int) -> dict[str, np.ndarray]:
  """Returns the grammar of the language as arrays, see `grammar.grammar`."""
  return grammar_lib.grammar(tokenizer, vocab_size)


def places(
  prompts: Sequence[str], tokenizer: Any, vocab_size: int
) -> dict[str, np.ndarray]:
  """Returns where responses begin in the grammar, see `grammar.places`."""
  return grammar_lib.places(prompts, tokenizer, vocab_size)


# Scores.


def score(
  prompt: str,
  response: str,
  *,
  reward: Literal["graded", "ladder"] = "graded",
  power_mean: Literal["", "code", "true"] = "",
  seed: int = 0,
  num_games: int | None = None,
  max_plies: int | None = None,
  max_sites: int = rules.MAX_SITES,
  corpus: str = "",
  cache: str = "",
  seconds: float = 20.0,
  memory_gb: float = 2.0,
  num_workers: int | None = None,
) -> tuple[float, dict[str, Any]]:
  """Scores one response; see `score_batch` for arguments and results."""
  (value,), (parts,) = score_batch(
    [prompt],
    [response],
    reward=reward,
    power_mean=power_mean,
    seed=seed,
    num_games=num_games,
    max_plies=max_plies,
    max_sites=max_sites,
    corpus=corpus,
    cache=cache,
    seconds=seconds,
    memory_gb=memory_gb,
    num_workers=num_workers,
  )
  return value, parts


def score_batch(
  prompts: Sequence[str],
  responses: Sequence[str],
  *,
  reward: Literal["graded", "ladder"] = "graded",
  power_mean: Literal["", "code", "true"] = "",
  seed: int = 0,
  num_games: int | None = None,
  max_plies: int | None = None,
  max_sites: int = rules.MAX_SITES,
  corpus: str = "",
  cache: str = "",
  seconds: float = 20.0,
  memory_gb: float = 2.0,
  num_workers: int | None = None,
) -> tuple[list[float], list[dict[str, Any]]]:
  """Scores N responses, evaluating every different game once.

  A response is cut where its first expression ends (`rules.trim`) and put into
  the gap of its prompt. "graded" is, for a text of n characters of which the
  first u follow the grammar,

    0                              not readable: markers, too long
    0.14 min(1, u/200) u/n         no whole description
    0.15 + 0.1 k/16                k of 16 checks passed (`rules.checks`)
    0.25, 0.28                     an error of the compiler: building, tracing
    0.28                           out of time or memory
    0.32                           10 % of the games stuck, or mean length < 4
    0.35 + 0.65 q (0.2 + 0.8 ν)    played

  with the quality q of `rewards.quality`, and the novelty ν, one for a
  game that differs from all of the corpus in 15 % of its words. By the paper,
  "ladder" is

    0        no whole description, or it does not compile
    0.01     out of time or memory
    0.05     10 % of the games stuck, or mean length < 2
    M        played: `rewards.ladder_mean` of the balance, and of the
             decided share as completion and as drawishness

  The score depends on text and seed alone, on all machines, unless a limit was
  hit: a slower machine hits the time limit earlier.

  Args:
    prompts: N texts, each one of `prompts` or another `rules.gap`.
    responses: N texts, of any kind and length.
    reward: "graded" or "ladder".
    power_mean: "true" for the power mean with exponent 1/3, "code" for the
      mean of cube roots that the authors computed; "" for "code" under
      "ladder", and "true" under "graded".
    seed: of the games that are played.
    num_games: how many; None for 64 ("graded") or 100 ("ladder").
    max_plies: where a game is stopped; None for 300 or 500.
    max_sites: of a board; "graded" does not compile larger ones.
    corpus: file of `variants.expand`, whose games count for novelty too.
    cache: folder that keeps what was measured; "" for none. Several processes
      may share one. Limits that were hit are only kept in this process.
    seconds: of processor time to compile and play a game; and fifteen times as
      many of the clock. A game that fails in a worker that had served others is
      tried once more.
    memory_gb: memory of a game's process.
    num_workers: processes; None for one per core.

  Returns:
    N scores in [0, 1], and N parts:
      stage: str, where it ended: "invalid", "too_long", "syntax", "checks",
        "construct_error", "trace_error", "timeout", "memory", "error",
        "stuck", "short" or "played".
      game: canonical text, or None for the first two.
      failed_checks: list of str.
      accepted: share of the text that follows the grammar.
      parses, passes_checks, compiles, is_playable: bool, how far it got.
      is_good: bool: balance and decided share are at least 0.05, the games two
        plies long, and fewer than half of them stuck.
      balance, decisive, timeouts, stuck, plies, decisions, branching: of the
        games, see `play.measure`; 0 if none was played.
      quality, novelty: q, and the distance to the corpus; 0 if not played.

  Raises:
    ValueError: if an option is unknown or invalid, the corpus or the cache
      cannot be used, a prompt has no gap, or ludax is not installed.
  """
  _check_score_options(
    reward,
    power_mean,
    {"seed": seed, "num_games": num_games, "max_plies": max_plies}
    | {"max_sites": max_sites, "num_workers": num_workers},
    {"seconds": seconds, "memory_gb": memory_gb},
  )
  if corpus:
    _corpus(str(corpus))  # Raises before a game is played if it cannot be used.
  if cache:
    pool.check_cache(str(cache))
  is_graded = reward == "graded"
  num_games = num_games or (64 if is_graded else 100)
  max_plies = max_plies or (300 if is_graded else 500)
  composed = [
    _composed(prompt, response)
    for prompt, response in zip(prompts, responses, strict=True)
  ]
  read = {
    text: _read(text, max_sites) for _, text in composed if text is not None
  }
  ready = [
    text
    for text, parts in read.items()
    if parts["parses"] and (parts["passes_checks"] or not is_graded)
  ]
  measured = pool.measure(
    ready,
    seed=seed,
    num_games=num_games,
    max_plies=max_plies,
    cache=cache,
    seconds=seconds,
    memory_gb=memory_gb,
    num_workers=num_workers,
  )
  for text, measurement in zip(ready, measured, strict=True):
    rewards.judge(
      read[text],
      measurement,
      max_plies,
      power_mean or "true",
      MIN_PLIES if is_graded else 2,
    )
    if measurement["stage"] == "played":
      read[text]["novelty"] = _novelty(str(corpus))(text)
  parts = [
    rewards.unread(stage) if text is None else read[text] | {}
    for stage, text in composed
  ]
  value = functools.partial(
    rewards.graded_reward if is_graded else rewards.ladder_reward,
    **({} if is_graded else {"power_mean": power_mean or "code"}),
  )
  return [value(part) for part in parts], parts


# Parts of a score.


def _check_score_options(
  reward: str,
  power_mean: str,
  whole: Mapping[str, Any],
  limits: Mapping[str, Any],
) -> None:
  if reward not in ("graded", "ladder"):
    raise ValueError(f'reward must be "graded" or "ladder", got {reward!r}.')
  if power_mean not in ("", "code", "true"):
    raise ValueError(
      f'power_mean must be "code" or "true", got {power_mean!r}.'
    )
  for name, value in whole.items():
    least = 0 if name == "seed" else 1
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    is_default = value is None and name not in ("seed", "max_sites")
    if not is_default and not (is_whole and value >= least):
      raise ValueError(
        f"{name} must be a whole number, {least} or more, got {value!r}."
      )
  for name, value in limits.items():
    if not isinstance(value, int | float) or not value > 0:
      raise ValueError(f"{name} must be a positive number, got {value!r}.")


def _composed(prompt: str, response: str) -> tuple[str, str | None]:
  """Returns why there is no game, or its canonical text."""
  if rules.compose(prompt, "") is None:
    raise ValueError(
      f"A prompt has the marks {', '.join(rules.MARKERS)} once each, in "
      f"this order, got {prompt[:100]!r}."
    )
  if len(response) > rules.MAX_READ:
    return "too_long", None
  text = rules.compose(prompt, rules.trim(response))
  if text is None:
    return "invalid", None
  return "too_long", rules.canonical(text)


def _read(text: str, max_sites: int) -> dict[str, Any]:
  """Returns what can be said of a canonical text without playing it."""
  used, parses = rules.progress(text)
  found = rules.checks(text, max_sites=max_sites) if parses else {}
  failed = [name for name, passes in found.items() if not passes]
  return rewards.unread("checks" if parses else "syntax") | {
    "game": text,
    "failed_checks": failed,
    "num_checks": len(found),
    "accepted": used / max(len(text), 1),
    "parses": parses,
    "passes_checks": parses and not failed,
  }


# Games and files.


def _check_split(split: str) -> None:
  if split not in SPLITS:
    raise ValueError(
      f"The task games has the splits {', '.join(SPLITS)}, got {split!r}."
    )


@functools.lru_cache(8)
def _corpus(path: str) -> tuple[dict[str, Any], ...]:
  rows = tuple(files.load_rows(path, "games", required=("text", "split")))
  for i, row in enumerate(rows):
    text, split = row["text"], row["split"]
    if (
      not isinstance(text, str)
      or rules.canonical(text) != text
      or not rules.progress(text)[1]
    ):
      raise ValueError(
        f"{path}, row {i + 1}: {str(text)[:60]!r} is not a game."
      )
    if split not in SPLITS:
      raise ValueError(
        f"{path}, row {i + 1}: the split must be one of {', '.join(SPLITS)}, "
        f"got {split!r}."
      )
  return rows


@functools.lru_cache(8)
def _novelty(corpus: str) -> rules.Novelty:
  games = list(rules.shipped().values())
  if corpus:
    games += [row["text"] for row in _corpus(corpus)]
  return rules.Novelty(games)
