"""Prompts as texts and as ids, encoded once and padded to one shape."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rljax.text import batches, keywords, logged, tokens


@dataclasses.dataclass(frozen=True)
class Prompts:
  """N prompts.

  Attributes:
    texts: N prompts, as they are scored.
    encoded: N lists of ids, as the policy reads them: with the chat template,
      if it is asked by one.
    ids: `[N, P]` int32, left-padded.
    mask: `[N, P]` bool.
    skipped: one message per prompt that was left out.
  """

  texts: list[str]
  encoded: list[list[int]]
  ids: np.ndarray
  mask: np.ndarray
  skipped: list[str] = dataclasses.field(default_factory=list)

  def __len__(self) -> int:
    return len(self.texts)


def encode(
  tokenizer: Any,
  *several: Sequence[str],
  max_length: int,
  prompt_format: str = "plain",
  name: str = "prompts",
) -> tuple[Prompts, ...]:
  """Encodes several sets of prompts, to one shape.

  Args:
    tokenizer: of the policy.
    *several: sets of texts.
    max_length: most tokens of a prompt; a longer one is an error.
    prompt_format: "plain", or "chat" for the tokenizer's template.
    name: of the prompts, for messages.

  Returns:
    One `Prompts` for each set.

  Raises:
    ValueError: if a prompt is too long, or cannot be encoded.
  """
  texts = [text for some in several for text in some]
  rendered = logged.render_prompts(texts, name, tokenizer, prompt_format)
  encoded = tokens.encode_prompts(tokenizer, rendered, max_length=max_length)
  ids, mask = batches.pad_left(encoded, length=max(map(len, encoded)))
  found, first = [], 0
  for some in several:
    rows = slice(first, first + len(some))
    found.append(Prompts(list(some), encoded[rows], ids[rows], mask[rows]))
    first = rows.stop
  return tuple(found)


def load(
  task: Any,
  tokenizer: Any,
  *,
  seed: int,
  num_prompts: int,
  num_eval_prompts: int,
  eval_split: str,
  max_length: int,
  prompt_format: str = "plain",
  task_options: Mapping[str, Any] | None = None,
  eos: bool = True,
) -> tuple[Prompts, Prompts]:
  """Draws a task's prompts for training, and held-out ones.

  Args:
    task: module with `prompts`.
    tokenizer: of the policy.
    seed: of the draw.
    num_prompts: of the split "train".
    num_eval_prompts: of `eval_split`.
    eval_split: a split of the task.
    max_length: most tokens of a prompt; a longer one is an error.
    prompt_format: see `encode`.
    task_options: further arguments of `task.prompts`. The option tokenizer with
      the value "policy" becomes the policy's tokenizer.
    eos: whether the tokenizer needs an end token.

  Returns:
    The training prompts and the held-out ones, padded to one length.

  Raises:
    ValueError: if the task has no such option, the tokenizer lacks a token, or
      as `encode`.
  """
  options = dict(task_options or {})
  keywords.check(task.prompts, options)
  if options.get("tokenizer") == "policy":  # Prompts of so many tokens.
    options["tokenizer"] = tokenizer
  train = task.prompts("train", seed, num=num_prompts, **options)
  held_out = task.prompts(eval_split, seed, num=num_eval_prompts, **options)
  tokens.require_tokens(tokenizer, eos=eos, text=train[0] if train else None)
  name = task.__name__.rpartition(".")[2]
  return encode(
    tokenizer,
    train,
    held_out,
    max_length=max_length,
    prompt_format=prompt_format,
    name=name,
  )


def read(
  tokenizer: Any,
  *,
  name: str,
  task: Any,
  seed: int,
  num_prompts: int,
  split: str = "validation",
  **settings: Any,
) -> Prompts:
  """Reads the prompts of a file, answered or not, or of a task.

  Unlike `load`, it leaves out and names those that cannot be used.

  Args:
    tokenizer: of the policy.
    name: of a file, see `logged.load_prompts`; empty for the task's prompts.
    task: module with `prompts`, where no file is named.
    seed: of the task's draw.
    num_prompts: how many are taken, the first ones.
    split: of the file or the task.
    **settings: of `logged.prepare`: `prompt_format`, `max_prompt_length`,
      `max_response_length` and `too_long`.

  Returns:
    The prompts; their texts are in the chat template, if there is one.

  Raises:
    ValueError: as `logged.load_prompts` and `logged.prepare`.
  """
  unusable = []
  if name:
    rows, unusable = logged.load_prompts(name, split)
  else:
    rows = logged.task_prompts(task, split, seed, num_prompts)
  found = logged.prepare(tokenizer, rows[:num_prompts], **settings)
  ids, mask = batches.pad_left(found.prompt_ids)
  return Prompts(
    texts=[row.prompt for row in found.rows],
    encoded=found.prompt_ids,
    ids=ids,
    mask=mask,
    skipped=[*unusable, *found.skipped],
  )
