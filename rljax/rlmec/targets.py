"""What is learnt in RLMEC, as tokens and arrays: rewards, weights, records.

A row of supervision is a sample and its rewrite in tokens, with what the reward
model and the first policy say of the sample's tokens, and which tokens an edit
changes: `encode`, `blamed` and `edited` make it, one after the other, and
`arrays` pads many. `encode_records` is the same for a reward model's records.
"""

import functools
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from rljax.ops import rewards
from rljax.rlmec import prompts as prompts_lib
from rljax.scoring import cached
from rljax.text import alignment, batches, files, tokens

Row = dict[str, Any]
Ids = Sequence[int]

TOKEN_REWARDS = ("model", "alignment", "sequence", "none")
IMITATED = ("rewrite", "gold")


class Limits(NamedTuple):
  """Lengths in tokens, beyond which a sample is skipped.

  Attributes:
    max_length: of a sample and of its rewrite, with the end token.
    max_question_length: of the reward model's question with the sample.
  """

  max_length: int
  max_question_length: int


# Rows of supervision.


def encode(
  rows: Sequence[Row],
  rendered: Sequence[str],
  tokenizer: Any,
  template: prompts_lib.Template,
  *,
  limits: Limits,
  max_positions: int,
  end_id: int | None = None,
) -> tuple[list[Row], list[list[int]], list[str]]:
  """Turns samples, their rewrites and the questions about them into tokens.

  A text has the same tokens behind the policy's prompt and the reward model's:
  those behind the policy's.

  Args:
    rows: N records with `prompt`, `gold`, `response` and `rewrite`.
    rendered: N prompts as the policy reads them.
    tokenizer: of both models.
    template: of the reward model's questions.
    limits: of length.
    max_positions: context of the reward model.
    end_id: of the policy's responses; the tokenizer's end token by default.

  Returns:
    The rows that fit, with `prompt_ids`, `response_ids`, `rewrite_ids` and
    `gold_ids`; their questions as ids; and a message for each row that does
    not fit.
  """
  unlimited = functools.partial(
    tokens.encode_prompts, tokenizer, max_length=sys.maxsize
  )
  questions = unlimited(
    [
      template.rewrite_prompt(row["prompt"], row["gold"], row["response"])
      for row in rows
    ]
  )
  # What fits into the reward model behind the longest sample.
  question_limit = batches.longest_in_bucket(
    max_positions - batches.bucket_length(limits.max_length)
  )
  kept, asked, skipped = [], [], []
  for row, prompt, prompt_ids, question_ids in zip(
    rows, rendered, unlimited(rendered), questions, strict=True
  ):
    ids = {
      f"{name}_ids": tokens.encode_response(
        tokenizer, prompt, prompt_ids, row[name], end_id=end_id
      ).ids
      for name in ("response", "rewrite", "gold")
    }
    length = len(ids["response_ids"])
    if (
      len(question_ids) + length > limits.max_question_length
      or len(question_ids) > question_limit
      or max(length, len(ids["rewrite_ids"])) > limits.max_length
    ):
      skipped.append(
        f"{row['prompt'][:80]!r}: the reward model's question has "
        f"{len(question_ids)} tokens, the sample {length} and the rewrite "
        f"{len(ids['rewrite_ids'])}. Limits are {limits.max_question_length} "
        f"for the first two together, {question_limit} for the question, "
        f"{limits.max_length} for the others."
      )
    else:
      kept.append(row | {"prompt_ids": prompt_ids} | ids)
      asked.append(question_ids)
  return kept, asked, skipped


def blamed(
  rows: Sequence[Row],
  questions: Sequence[Ids],
  policy: Any,
  reward_model: Any,
  *,
  batch_size: int,
  mesh: Any,
) -> list[Row]:
  """Adds what both models say of the samples' tokens.

  One forward pass over the samples for each; nothing is decoded.

  Args:
    rows: of `encode`.
    questions: likewise.
    policy: its `model`, and its `params` on the mesh.
    reward_model: likewise.
    batch_size: samples at the same time.
    mesh: from `meshes.make`.

  Returns:
    The rows with `probs`, the probability that the reward model would have
    written each token, and `ref_log_probs`, the first policy's.
  """
  replies = [row["response_ids"] for row in rows]
  prompts = [row["prompt_ids"] for row in rows]
  judged, first = (
    cached.pair_log_probs(
      loaded.model,
      loaded.params,
      list(zip(asked, replies, strict=True)),
      batch_size=batch_size,
      mesh=mesh,
    )
    for loaded, asked in ((reward_model, questions), (policy, prompts))
  )
  return [
    row | {"probs": np.exp(a).tolist(), "ref_log_probs": b.tolist()}
    for row, a, b in zip(rows, judged, first, strict=True)
  ]


def edited(rows: Sequence[Row], *, mode: str) -> list[Row]:
  """Adds which tokens an edit changes, from the sample to either right text.

  Args:
    rows: of `encode`.
    mode: see `alignment.align_pairs`.

  Returns:
    The rows with `<text>_edited`, `<text>_distance` and `<text>_dropped`, where
    <text> is rewrite or gold, and `dropped`, that of the rewrite.
  """
  found = [dict(row) for row in rows]
  samples = [row["response_ids"] for row in rows]
  for name in IMITATED:
    alignments = alignment.align_pairs(
      samples, [row[f"{name}_ids"] for row in rows], mode=mode
    )
    for row, aligned in zip(found, alignments, strict=True):
      row[f"{name}_edited"] = aligned.edited.tolist()
      row[f"{name}_distance"] = aligned.distance
      row[f"{name}_dropped"] = aligned.dropped.tolist()
  return [row | {"dropped": row["rewrite_dropped"]} for row in found]


def facts(rows: Sequence[Row]) -> dict[str, float]:
  """Counts right and wrong samples, and the edits of the wrong ones.

  Args:
    rows: of `edited`, with a wrong one at least.
  """
  wrong = [row for row in rows if not row["is_right"]]
  mean = lambda name: float(np.mean([row[name] for row in wrong]))
  return {
    "wrong": len(wrong),
    "right": len(rows) - len(wrong),
    "edits of a rewrite": mean("rewrite_distance"),
    "edits to the gold solution": mean("gold_distance"),
  }


def for_other_methods(
  rewritten: Sequence[Row], rows: Sequence[Row]
) -> dict[str, list[Row]]:
  """Makes what other methods learn from the same samples.

  Args:
    rewritten: all records, with `prompt` and `gold`.
    rows: those that RLMEC learns from.

  Returns:
    "right", the right samples, and "gold", the solutions of all questions, both
    with `prompt` and `response`; "pairs", a rewrite as `chosen` over its wrong
    sample as `rejected`.
  """
  reply = lambda row, name: {"prompt": row["prompt"], "response": row[name]}
  solutions = {row["prompt"]: reply(row, "gold") for row in rewritten}
  return {
    "right": [reply(row, "response") for row in rows if row["is_right"]],
    "gold": list(solutions.values()),
    "pairs": [
      {
        "prompt": row["prompt"],
        "chosen": row["rewrite"],
        "rejected": row["response"],
      }
      for row in rows
      if not row["is_right"]
    ],
  }


def shape(rows: Sequence[Row], imitate: str) -> dict[str, int]:
  """Returns the lengths of `arrays`: either text of a row has the same.

  Args:
    rows: of supervision.
    imitate: "rewrite" or "gold".
  """
  return batches.supervised_shape(
    [
      (row["prompt_ids"], row[name])
      for row in rows
      for name in ("response_ids", f"{imitate}_ids")
    ]
  )


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

  What the tokens of a sample earn, by `token_rewards`:

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
    The batch of `batches.supervised_batch`, with `ref_log_probs` and `rewards`
    `[N, T]`; `imitated_ids`, `imitated_mask`, `weights` `[N, T]`. Where there
    is no token, numbers are 0.

  Raises:
    ValueError: if a name is unknown or a text is longer than its length.

  Source:
    Chen et al. (2024), "Improving Large Language Models via Fine-grained
    Reinforcement Learning with Minimum Editing Constraint": "model" and
    "rewrite". The others take a part of the method away.
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


def blame(
  rows: Sequence[Row], threshold: float
) -> tuple[list[np.ndarray], list[np.ndarray]]:
  """Returns which tokens of wrong samples are blamed, and which are dropped.

  Args:
    rows: of supervision.
    threshold: a token that is less probable is blamed.

  Returns:
    For each wrong sample two arrays `[n]` bool, as `metrics.localization`
    compares them.
  """
  wrong = [row for row in rows if not row["is_right"]]
  return (
    [np.array(row["probs"]) < threshold for row in wrong],
    [np.array(row["dropped"]) for row in wrong],
  )


def shown(
  rows: Sequence[Row], values: np.ndarray, *, imitate: str, limit: int
) -> list[Row]:
  """Chooses rows for a page: wrong samples, and a quarter of right ones.

  Args:
    rows: N rows of supervision.
    values: `[N, T]` float, what the samples' tokens are coloured by.
    imitate: "rewrite" or "gold", what stands beside a wrong sample.
    limit: most rows.

  Returns:
    Rows for `token_pages.with_rewrites`.
  """
  wrong = [i for i, row in enumerate(rows) if not row["is_right"]]
  right = [i for i, row in enumerate(rows) if row["is_right"]]
  num_right = min(len(right), limit // 4)
  found = []
  for i in wrong[: limit - num_right] + right[:num_right]:
    row = rows[i]
    page_row = {
      "prompt": row["prompt"],
      "ids": row["response_ids"],
      "values": values[i, : len(row["response_ids"])],
      "marked": row[f"{imitate}_dropped"],
      "facts": {"right": row["is_right"]},
    }
    if not row["is_right"]:
      page_row["rewrite_ids"] = row[f"{imitate}_ids"]
      page_row["rewrite_marked"] = row[f"{imitate}_edited"]
      page_row["facts"] |= {
        "first wrong step": row["error_step"],
        "edits": row[f"{imitate}_distance"],
        "edits to the gold solution": row["gold_distance"],
      }
    found.append(page_row)
  return found


# Records of a generative reward model.


def encode_records(
  folder: str | os.PathLike[str],
  tokenizer: Any,
  *,
  max_question_length: int,
  max_positions: int,
) -> tuple[list[tuple[Ids, Ids]], list[tuple[Ids, Ids]], list[str]]:
  """Reads the records of a reward model as tokens.

  Args:
    folder: of `pipeline.record`; either of its files may hold nothing.
    tokenizer: of the model.
    max_question_length: of a prompt, in tokens.
    max_positions: context of the model.

  Returns:
    The records to learn from that fit and the held-out ones, as pairs of
    prompt and response ids; and a message for each that does not fit.
  """
  pairs, skipped = {"records": [], "held_out": []}, []
  for name, fitting in pairs.items():
    path = os.path.join(folder, f"{name}.jsonl")
    for row in files.read_jsonl(path) if os.path.getsize(path) else []:
      (prompt_ids,) = tokens.encode_prompts(
        tokenizer, [row["prompt"]], max_length=sys.maxsize
      )
      ids = tokens.encode_response(
        tokenizer, row["prompt"], prompt_ids, row["response"]
      ).ids
      limit = min(
        max_question_length,
        batches.longest_in_bucket(
          max_positions - batches.bucket_length(len(ids))
        ),
      )
      if len(prompt_ids) <= limit:
        fitting.append((prompt_ids, ids))
      else:
        skipped.append(
          f"{name}: a question has {len(prompt_ids)} tokens, the limit is "
          f"{limit} (--max_question_length, and the context of the model)."
        )
  return pairs["records"], pairs["held_out"], skipped


# Checks of the first update.


def check_first_ratio(metrics: Mapping[str, float], *, is_exact: bool) -> None:
  """Raises ValueError unless the mean ratio of the first batch is 1.

  It is to the policy that the supervision was made with.

  Args:
    metrics: of `token_level_loss`; without a rewarded token nothing is said.
    is_exact: whether products of the models keep all bits of float32.
  """
  ratio = metrics.get("token/ratio_mean", 1.0)
  limit = 1e-3 if is_exact else 0.05
  if metrics.get("token/count", 1) and not abs(ratio - 1) <= limit:
    raise ValueError(
      f"The mean ratio of the first batch is {ratio:.4f} instead of 1: the "
      "log-probabilities of the supervision are not those of --policy."
    )
