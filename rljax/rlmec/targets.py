"""Makes the arrays that RLMEC's policy learns from: token rewards and weights.

A row of supervision is a sample and its rewrite in tokens, with the reward
model's and the first policy's probabilities of the sample's tokens, and which
tokens an edit changes; `experiments/rlmec.py` writes them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from rljax.ops import rewards
from rljax.text import batches

TOKEN_REWARDS = ("model", "alignment", "sequence", "none")
IMITATED = ("rewrite", "gold")


def arrays(
  rows: Sequence[Mapping[str, Any]],
  *,
  prompt_length: int,
  response_length: int,
  token_rewards: str = "model",
  threshold: float = 0.5,
  max_reward: float = 0.5,
  max_penalty: float = 0.1,
  imitate: str = "rewrite",
  edited_weight: float = 1.0,
  kept_weight: float = 0.5,
) -> dict[str, np.ndarray]:
  """Pads rows of supervision to arrays that batches are drawn from.

  The rewards of a sample's tokens, by `token_rewards`:

    model: `rewards.generative_rewards` of the reward model's probabilities
    alignment: -max_penalty on the tokens that the rewrite drops, 0 on the
      others of a wrong sample; max_reward on all of a right one
    sequence: -max_penalty or max_reward on all tokens
    none: nothing

  A right sample is imitated itself, all tokens with `kept_weight`; a wrong one
  is replaced by its rewrite or by the gold solution, whose edited tokens have
  `edited_weight`.

  Args:
    rows: N mappings with `is_right`, `prompt_ids`, `response_ids`, `probs`,
      `ref_log_probs`, `dropped` (one entry per response token), and
      `rewrite_ids`, `rewrite_edited`, or the same of `gold`.
    prompt_length: P.
    response_length: T, of samples and imitated texts.
    token_rewards: one of the four names above.
    threshold: see `rewards.generative_rewards`; likewise the bounds.
    max_reward: of a token.
    max_penalty: of a token.
    imitate: "rewrite" or "gold".
    edited_weight: of imitated tokens that are new.
    kept_weight: of all other imitated tokens.

  Returns:
    The batch of `batches.supervised_batch`; `ref_log_probs`, `rewards`
    `[N, T]`; `imitated_ids`, `imitated_mask`, `weights` `[N, T]`. Numbers are 0
    where there is no token.

  Raises:
    ValueError: if a name is unknown or a text is longer than its length.

  Source:
    Chen et al. (2024), "Improving Large Language Models via Fine-grained
    Reinforcement Learning with Minimum Editing Constraint": "model" and
    "rewrite". The others leave out a part of the method.
  """
  for name, value, known in (
    ("token_rewards", token_rewards, TOKEN_REWARDS),
    ("imitate", imitate, IMITATED),
  ):
    if value not in known:
      raise ValueError(
        f"{name} must be one of {', '.join(known)}, got {value!r}."
      )

  def pad(name, kind):
    padded = np.zeros((len(rows), response_length), kind)
    for target, row in zip(padded, rows, strict=True):
      target[: len(row[name])] = row[name]
    return padded

  batch = batches.supervised_batch(
    [(row["prompt_ids"], row["response_ids"]) for row in rows],
    prompt_length=prompt_length,
    response_length=response_length,
  )
  mask = batch["response_mask"]
  is_right = np.array([bool(row["is_right"]) for row in rows])
  if token_rewards == "model":
    earned = np.asarray(
      rewards.generative_rewards(
        jnp.asarray(pad("probs", np.float32)),
        jnp.asarray(is_right),
        jnp.asarray(mask),
        threshold=threshold,
        max_reward=max_reward,
        max_penalty=max_penalty,
      )
    )
  else:
    blamed = pad("dropped", bool) if token_rewards == "alignment" else mask
    earned = np.where(
      is_right[:, None], max_reward, np.where(blamed, -max_penalty, 0.0)
    )
    if token_rewards == "none":
      earned = np.zeros_like(earned)

  targets = [
    row["response_ids"] if row["is_right"] else row[f"{imitate}_ids"]
    for row in rows
  ]
  ids, imitated_mask = batches.pad_right(targets, length=response_length)
  edited = pad(f"{imitate}_edited", bool) & ~is_right[:, None]
  weights = np.where(edited, edited_weight, kept_weight)
  return batch | {
    "ref_log_probs": pad("ref_log_probs", np.float32),
    "rewards": np.where(mask, earned, 0).astype(np.float32),
    "imitated_ids": ids,
    "imitated_mask": imitated_mask,
    "weights": np.where(imitated_mask, weights, 0).astype(np.float32),
  }
