"""Measures games in worker processes with limits, each game once.

The result of `play.measure` for a text, a seed and a number of games does not
change: it is kept in this process, and in a folder if there is one.
"""

import collections
import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
import tempfile
from collections.abc import Sequence
from typing import Any

from absl import logging

from rljax.storage import paths
from rljax.tasks import sandbox

_FORMAT = 2  # Of the files on disk: rises when `play` changes.
_CACHE_SIZE = 2**16
_PATIENCE = 15  # Wall-clock seconds per second of processor time.

# (text, settings) -> what was measured, in this process.
_MEASURED: dict[tuple, dict[str, Any]] = {}


def measure(
  texts: Sequence[str],
  *,
  seed: int = 0,
  num_games: int = 64,
  max_plies: int = 300,
  cache: str = "",
  seconds: float = 20.0,
  memory_gb: float = 2.0,
  num_workers: int | None = None,
  keep_limits: bool = False,
) -> list[dict[str, Any]]:
  """Compiles and plays games in worker processes, or reads earlier results.

  Args:
    texts: N different descriptions.
    seed: see `games.score_batch`; likewise the others.
    num_games: see `games.score_batch`.
    max_plies: see `games.score_batch`.
    cache: see `games.score_batch`.
    seconds: see `games.score_batch`.
    memory_gb: see `games.score_batch`.
    num_workers: see `games.score_batch`.
    keep_limits: whether the cache also keeps that a limit was hit; for repeated
      calls with the same limits.

  Returns:
    N dicts of `play.measure`, or with the "stage" of a limit: "timeout"
    (also if the process died in another way), "memory" or "error".

  Raises:
    ValueError: if ludax is not installed.
  """
  # Results only depend on the limits if one was hit.
  settings = (seed, num_games, max_plies)
  limits = (seconds, memory_gb)
  found: dict[str, dict[str, Any]] = {}
  for text in texts:
    known = _MEASURED.get((text, settings)) or _MEASURED.get(
      (text, settings, limits)
    )
    if known is None and cache:
      known = _kept(_place(cache, text, settings))
      if known is not None:
        _remember((text, settings), known)
      elif keep_limits:
        known = _kept(_place(cache, text, (*settings, *limits)))
    if known is not None:
      found[text] = known
  new = [text for text in texts if text not in found]
  if new:
    pool = _pool(seconds, memory_gb, num_workers or _num_cores())
    outcomes = pool.map([(text, *settings, seconds) for text in new])
    for text, outcome in zip(new, outcomes, strict=True):
      if outcome.failure is None:
        found[text] = outcome.value
        _remember((text, settings), outcome.value)
        if cache:
          _keep(_place(cache, text, settings), outcome.value)
      else:
        found[text] = {"stage": _stage(outcome)}
        _remember((text, settings, limits), found[text])
        if cache and keep_limits:
          _keep(_place(cache, text, (*settings, *limits)), found[text])
    failures = collections.Counter(
      outcome.failure for outcome in outcomes if outcome.failure is not None
    )
    if failures:
      logging.warning(
        "%d of %d new games hit a limit: %s.",
        failures.total(),
        len(new),
        ", ".join(f"{n} {name}" for name, n in sorted(failures.items())),
      )
  return [found[text] for text in texts]


def positions(
  texts: Sequence[str],
  plies: Sequence[int],
  *,
  seed: int = 0,
  seconds: float = 20.0,
  memory_gb: float = 2.0,
  num_workers: int | None = None,
) -> list[dict[str, Any]]:
  """Plays one game of each kind for a while, in worker processes.

  Args:
    texts: N descriptions.
    plies: how many moves are played, for each.
    seed: of the moves.
    seconds: see `games.score_batch`.
    memory_gb: see `games.score_batch`.
    num_workers: see `games.score_batch`.

  Returns:
    N dicts of `play.position`, or with only "stage" where a limit was hit: see
    `measure`.
  """
  with sandbox.Pool(
    "rljax.tasks.games.play:position",
    setup="rljax.tasks.games.play:set_up",
    timeout=_PATIENCE * seconds,
    num_workers=num_workers or _num_cores(),
    max_memory_bytes=int(memory_gb * 2**30),
  ) as pool:
    outcomes = pool.map(
      [
        (text, seed, num_plies, seconds)
        for text, num_plies in zip(texts, plies, strict=True)
      ]
    )
  return [
    outcome.value if outcome.failure is None else {"stage": _stage(outcome)}
    for outcome in outcomes
  ]


def _stage(outcome: sandbox.Outcome) -> str:
  stage = outcome.failure.partition(":")[0]
  # A worker that used up its seconds has died. Crashes are rare.
  return "timeout" if stage == "died" else stage


@functools.lru_cache(16)
def check_cache(cache: str) -> None:
  """Raises ValueError unless files can be written to a folder."""
  try:
    os.makedirs(cache, exist_ok=True)
    with tempfile.TemporaryFile(dir=cache):
      pass
  except OSError as error:
    raise ValueError(
      f"cache={cache}: {error}. It keeps measurements; give a folder that can "
      "be written to, or none."
    ) from error


def _remember(key: tuple, measurement: dict[str, Any]) -> None:
  if len(_MEASURED) >= _CACHE_SIZE:
    _MEASURED.clear()
  _MEASURED[key] = measurement


def _place(cache: str, text: str, settings: tuple) -> pathlib.Path:
  version = importlib.metadata.version("ludax")
  key = json.dumps([_FORMAT, version, *settings, text])
  name = hashlib.sha256(key.encode()).hexdigest()
  return pathlib.Path(cache) / name[:2] / f"{name}.json"


def _kept(path: pathlib.Path) -> dict[str, Any] | None:
  try:
    return json.loads(path.read_text())
  except (OSError, ValueError):
    return None  # Missing, or of a disk that was full.


def _keep(path: pathlib.Path, measurement: dict[str, Any]) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  paths.write_whole(path, json.dumps(measurement), shared=True)


@functools.cache
def _pool(seconds: float, memory_gb: float, num_workers: int) -> sandbox.Pool:
  return sandbox.Pool(
    "rljax.tasks.games.play:measure",
    setup="rljax.tasks.games.play:set_up",
    # The worker counts its own seconds; this is for one that hangs.
    timeout=_PATIENCE * seconds,
    num_workers=num_workers,
    max_memory_bytes=int(memory_gb * 2**30),
  )


def _num_cores() -> int:
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1
