"""Token rewards that are sums of named terms.

  score               what the task says of a response, on its last token
  reward_model        what a reward model says of it, likewise
  steps               something for every step that matches the reference
  dense_reward_model  by how much a step changes what an outcome model expects

A step is a line. It ends with the token that holds its line feed, or with the
last token of the response.

Source:
  Havrilla et al. (2024), "Teaching Large Language Models to Reason with
  Reinforcement Learning". The scale of the step rewards and their limit, and
  the outcome model as a potential, are our choice.
"""

from collections.abc import Mapping, Sequence

import chex
import jax.numpy as jnp
import numpy as np

from rljax.ops import rewards

Array = chex.Array

TERMS = ("score", "reward_model", "steps", "dense_reward_model")
# What an outcome model expects before the first step.
INITIAL_POTENTIAL = 0.5


def step_rewards(
  step_matches: Sequence[Sequence[bool]],
  line_feeds: np.ndarray,
  *,
  reward: float,
  limit: float,
) -> np.ndarray:
  """What the steps of each response earn, in the order of their end tokens.

    R_i = min(a M_i, b) - min(a M_{i-1}, b),   M_i = number of matches up to i

  Lines that one token ends, which has several line feeds, are one step.

  Args:
    step_matches: N lists, with a truth value for each line of a response.
    line_feeds: `[N, T]` int, line feeds in each token; 0 where masked.
    reward: a, of a step that matches.
    limit: b, the most that a response earns.

  Returns:
    `[N, T + 1]` float32, for `rewards.place_step_rewards`; the steps are the
    tokens with a line feed, and what follows the last of them.
  """
  num_rows, length = line_feeds.shape
  earned = np.zeros((num_rows, length + 1), np.float32)
  for row, matches, feeds in zip(earned, step_matches, line_feeds, strict=True):
    so_far = np.minimum(reward * np.cumsum([0, *matches]), limit)
    ended = np.cumsum(feeds[feeds > 0])  # Lines, by the end of each step.
    lines = np.arange(len(matches))
    np.add.at(row, np.searchsorted(ended, lines, "right"), np.diff(so_far))
  return earned


def token_rewards(
  earned: Mapping[str, Array],
  step_ends: Array,
  mask: Array,
  *,
  counts: Array | None = None,
  step_coef: float = 1.0,
) -> dict[str, Array]:
  """Places what responses have earned on their tokens, term by term.

  Args:
    earned: by term: "score" and "reward_model", `[N]` each; "steps",
      `[N, S]`, in the order of their ends; and "dense_reward_model",
      `[N, T]`, the probability that the text up to and with token t leads to
      a right answer.
    step_ends: `[N, T]` bool, True on tokens that end a step.
    mask: `[N, T]` bool, True on response tokens.
    counts: `[N]` bool, rows that earn anything but their score; None: all.
    step_coef: c of `rewards.potential_rewards`.

  Returns:
    By term: `[N, T]` float32, 0 where masked. The rewards are their sum.

  Raises:
    ValueError: if there is no such term.
  """
  placed = {}
  for name, array in earned.items():
    if name in ("score", "reward_model"):
      placed[name] = rewards.place_score(array, mask)
    elif name == "steps":
      placed[name] = rewards.place_step_rewards(array, step_ends, mask)
    elif name == "dense_reward_model":
      placed[name] = rewards.potential_rewards(
        array, step_ends, mask, initial=INITIAL_POTENTIAL, scale=step_coef
      )
    else:
      raise ValueError(
        f"There is no reward term {name!r}; there are {', '.join(TERMS)}."
      )
    if counts is not None and name != "score":
      placed[name] = jnp.where(counts[:, None], placed[name], 0.0)
  return placed
