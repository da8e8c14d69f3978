"""Rewards of board games: how far a text gets, and how well it plays.

Functions of numbers and names of stages; `play.measure` explains the numbers.

Source:
  Padula and Soemers (2024), "Exploring RL-based LLM Training for Formal
  Language Tasks with Programmed Rewards": the ladder and its mean.
"""

import math
from typing import Any, Literal

# Stages that a loaded machine may give a game that another one can play.
UNSURE = ("timeout", "memory", "error")


def graded_reward(parts: dict[str, Any]) -> float:
  """Computes the reward "graded" from the parts of `games.score_batch`."""
  stage = parts["stage"]
  if stage in ("invalid", "too_long"):
    return 0.0
  if stage == "syntax":
    length = max(len(parts["game"]), 1)
    used = parts["accepted"] * length
    return 0.14 * min(1.0, used / 200) * used / length
  if stage == "checks":
    num = parts["num_checks"]
    return 0.15 + 0.10 * (num - len(parts["failed_checks"])) / num
  fixed = {"construct_error": 0.25, "stuck": 0.32, "short": 0.32}
  if stage != "played":
    return fixed.get(stage, 0.28)
  novelty = min(1.0, parts["novelty"] / 0.15)
  return 0.35 + 0.65 * parts["quality"] * (0.2 + 0.8 * novelty)


def ladder_reward(
  parts: dict[str, Any], *, power_mean: Literal["code", "true"]
) -> float:
  """Computes the reward "ladder" from the parts of `games.score_batch`."""
  if not parts["parses"] or parts["stage"].endswith("_error"):
    return 0.0
  if parts["stage"] in UNSURE:
    return 0.01
  if parts["stage"] in ("stuck", "short"):
    return 0.05
  # A game that is stopped counts as a draw, for completion and drawishness.
  return ladder_mean(
    parts["balance"],
    parts["decisive"],
    parts["decisive"],
    power_mean=power_mean,
  )


def ladder_mean(
  balance: float,
  completion: float,
  drawishness: float,
  *,
  power_mean: Literal["code", "true"],
) -> float:
  """Computes the paper's mean of three qualities of a game.

    M = (b^(1/3) + c^(1/3) + d^(1/3)) / 3     "code"
    M = ((b^(1/3) + c^(1/3) + d^(1/3)) / 3)³  "true", the power mean

  Args:
    balance: one minus the difference of the players' win rates, in [0, 1].
    completion: share of games with a winner.
    drawishness: one minus the share of draws.
    power_mean: "code" is what the authors ran; without the outer power it is
      hardly drawn to the least of the three.

  Returns:
    A number in [0, 1]; NaN becomes 0, and infinity 1.

  Raises:
    ValueError: if there is no such mean.
  """
  if power_mean not in ("code", "true"):
    raise ValueError(
      f'power_mean must be "code" or "true", got {power_mean!r}.'
    )
  mean = sum(x ** (1 / 3) for x in (balance, completion, drawishness)) / 3
  if power_mean == "true":
    mean **= 3
  if math.isnan(mean):
    return 0.0
  return 1.0 if math.isinf(mean) else mean


def quality(
  *,
  balance: float,
  decisive: float,
  timeouts: float,
  decisions: float,
  plies: float,
  max_plies: int,
  power_mean: Literal["code", "true"] = "true",
) -> float:
  """Computes how good a game is, from games played at random.

    q = sqrt(b d) M(e, a, l),   each of e, a, l at least 0.01
    l = clip((n - 4)/8, 0, 1) clip(3 (T - n)/T, 0, 1)

  with M of `ladder_mean`. By the root a game that one side always wins, or no
  side, is worth 0.

  Args:
    balance: b, one minus the difference of the players' win rates.
    decisive: d, share of games that one player won.
    timeouts: share of games that were stopped; e is one minus it.
    decisions: a, share of plies with a choice.
    plies: n, mean length of a game.
    max_plies: T, where it is stopped.
    power_mean: of M.

  Returns:
    q in [0, 1].
  """
  length = _clip((plies - 4) / 8) * _clip(3 * (max_plies - plies) / max_plies)
  mean = ladder_mean(
    *(max(x, 0.01) for x in (1 - timeouts, decisions, length)),
    power_mean=power_mean,
  )
  return math.sqrt(balance * decisive) * mean


def unread(stage: str) -> dict[str, Any]:
  """Returns the parts of a response of which nothing is known yet."""
  return {
    "stage": stage,
    "game": None,
    "failed_checks": [],
    "num_checks": 0,
    "accepted": 0.0,
    "parses": False,
    "passes_checks": False,
    "compiles": False,
    "is_playable": False,
    "is_good": False,
    "balance": 0.0,
    "decisive": 0.0,
    "timeouts": 0.0,
    "stuck": 0.0,
    "plies": 0.0,
    "decisions": 0.0,
    "branching": 0.0,
    "quality": 0.0,
    "novelty": 0.0,
  }


def judge(
  parts: dict[str, Any],
  measurement: dict[str, Any],
  max_plies: int,
  power_mean: Literal["code", "true"],
  min_plies: float,
) -> None:
  """Adds the measurements of a game to its parts.

  Args:
    parts: of `unread`; changed.
    measurement: of `pool.measure`.
    max_plies: where a game was stopped.
    power_mean: of `quality`.
    min_plies: mean length below which a game cannot be played.
  """
  parts["stage"] = stage = measurement["stage"]
  if stage != "played":
    return
  first, second = measurement["first"], measurement["second"]
  parts.update(
    {
      name: measurement[name]
      for name in ("timeouts", "stuck", "plies", "decisions", "branching")
    }
  )
  parts["compiles"] = True
  parts["balance"], parts["decisive"] = 1 - abs(first - second), first + second
  parts["is_good"] = (
    min(parts["balance"], parts["decisive"]) >= 0.05
    and parts["plies"] >= 2
    and parts["stuck"] < 0.5
  )
  if parts["stuck"] > 0.10:
    parts["stage"] = "stuck"
  elif parts["plies"] < min_plies:
    parts["stage"] = "short"
  else:
    parts["is_playable"] = True
    parts["quality"] = quality(
      balance=parts["balance"],
      decisive=parts["decisive"],
      timeouts=parts["timeouts"],
      decisions=parts["decisions"],
      plies=parts["plies"],
      max_plies=max_plies,
      power_mean=power_mean,
    )


def _clip(x: float) -> float:
  return min(max(x, 0.0), 1.0)
