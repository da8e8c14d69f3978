"""Prompts as texts and as ids, encoded once and padded to one shape."""

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from rljax.text import (
  asked,
  batches,
  chats,
  encoding,
  end_tokens,
  files,
  forms,
  keywords,
  logged,
  splits,
  tokens,
)


@dataclasses.dataclass(frozen=True)
class Prompts:
  """Holds N prompts, as texts and as ids.

  Attributes:
    texts: N prompts, as they are scored; those of a file remember their rows,
      see `asked.Prompt`.
    encoded: N lists of ids, as the policy reads them: with the chat template,
      if it is asked by one.
    ids: `[N, P]` int32, left-padded.
    mask: `[N, P]` bool.
    skipped: one message per prompt that was left out.
    notes: what their file holds, in lines.
  """

  texts: list[str]
  encoded: list[list[int]]
  ids: np.ndarray
  mask: np.ndarray
  skipped: list[str] = dataclasses.field(default_factory=list)
  notes: list[str] = dataclasses.field(default_factory=list)

  def __len__(self) -> int:
    return len(self.texts)

  def attach(self, rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Gives rows of a file their prompts back; see `asked.attach`."""
    return asked.attach(rows, self.texts)

  def read(self, path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Reads a file of rows with some of these prompts; see `attach`."""
    return self.attach(files.read_jsonl(path))

  def rows(self, batch_size: int, step: int, *, seed: int) -> np.ndarray:
    """Returns the prompts of a step, `[batch_size]`; see `batch_indices`."""
    return batches.batch_indices(len(self), batch_size, step, seed=seed)


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
  rendered = chats.render_prompts(texts, name, tokenizer, prompt_format)
  encoded = tokens.encode_prompts(tokenizer, rendered, max_length=max_length)
  ids, mask = batches.pad_left(encoded, length=max(map(len, encoded)))
  found, first = [], 0
  for some in several:
    rows = slice(first, first + len(some))
    found.append(Prompts(list(some), encoded[rows], ids[rows], mask[rows]))
    first = rows.stop
  return tuple(found)


def encode_pairs(
  tokenizer: Any,
  pairs: Sequence[tuple[str, str]],
  *,
  max_length: int,
  prompt_format: str = "plain",
  name: str = "prompts",
) -> list[tuple[list[int], list[int]]]:
  """Encodes prompts and their responses, to learn the responses from.

  Args:
    tokenizer: of the policy, with an end token.
    pairs: N (prompt, response) texts.
    max_length: most tokens of a prompt; a longer one is an error.
    prompt_format: see `encode`.
    name: of the prompts, for messages.

  Returns:
    N (prompt ids, response ids); a response ends in the end token, in a chat in
    that of a turn.

  Raises:
    ValueError: if a prompt is too long, or a text cannot be encoded.
  """
  texts = [prompt for prompt, _ in pairs]
  rendered = chats.render_prompts(texts, name, tokenizer, prompt_format)
  encoded = tokens.encode_prompts(tokenizer, rendered, max_length=max_length)
  end_id = end_tokens.end_id(tokenizer, prompt_format)
  return [
    (
      ids,
      tokens.encode_response(tokenizer, text, ids, response, end_id=end_id).ids,
    )
    for text, ids, (_, response) in zip(rendered, encoded, pairs, strict=True)
  ]


def within(
  pairs: Sequence[tuple[list[int], list[int]]],
  max_response_length: int,
  note: Callable[[str], None] = print,
) -> list[tuple[list[int], list[int]]]:
  """Leaves out responses that are too long, and says how many.

  A response can be longer in its usual tokens than in those it was drawn as.

  Args:
    pairs: of `encode_pairs`.
    max_response_length: tokens of a response, its end token included.
    note: called with a line if there are any.

  Raises:
    ValueError: if none is left.
  """
  fitting = [pair for pair in pairs if len(pair[1]) <= max_response_length]
  if len(fitting) < len(pairs):
    note(
      f"{len(pairs) - len(fitting)} of {len(pairs)} responses are left out: "
      f"encoded anew they have more than {max_response_length} tokens."
    )
  if not fitting:
    raise ValueError(
      f"None of the responses fits into {max_response_length} tokens: give a "
      "larger --max_length."
    )
  return fitting


def encode_prefixes(
  tokenizer: Any,
  pairs: Sequence[tuple[str, str]],
  *,
  max_length: int,
  prompt_format: str = "plain",
  name: str = "prompts",
) -> tuple[list[list[int]], list[int]]:
  """Encodes prompts, each with the beginning of a response behind it.

  Args:
    tokenizer: of the policy.
    pairs: N (prompt, beginning of its response).
    max_length: most tokens of both; more are an error.
    prompt_format: see `encode`; the beginning stands behind the whole of it.
    name: of the prompts, for messages.

  Returns:
    N lists of ids, and how many tokens of each are the beginning's.

  Raises:
    ValueError: if a text is too long, or cannot be encoded.
  """

  def ids_of(texts):
    return tokens.encode_prompts(tokenizer, texts, max_length=max_length)

  prompts = list(dict.fromkeys(prompt for prompt, _ in pairs))
  rendered = dict(
    zip(
      prompts,
      chats.render_prompts(prompts, name, tokenizer, prompt_format),
      strict=True,
    )
  )
  bare = dict(zip(prompts, ids_of(list(rendered.values())), strict=True))
  whole = ids_of([rendered[prompt] + prefix for prompt, prefix in pairs])
  return whole, [
    len(ids) - len(bare[prompt])
    for ids, (prompt, _) in zip(whole, pairs, strict=True)
  ]


def solved(
  task: Any,
  split: str,
  *,
  num: int,
  seed: int,
  task_options: Mapping[str, Any] | None = None,
) -> list[tuple[str, str]]:
  """Draws a task's prompts with solutions to learn from.

  Args:
    task: module with `supervised`, unless `num` is 0.
    split: of the task.
    num: how many; 0 for none.
    seed: of the draw.
    task_options: further arguments of `task.supervised`.

  Returns:
    `num` pairs (prompt, response).

  Raises:
    ValueError: if the task has no solutions, or no such option.
  """
  if not num:
    return []
  if not hasattr(task, "supervised"):
    name = task.__name__.rpartition(".")[2]
    raise ValueError(f"--task={name} has no solutions to learn from.")
  options = dict(task_options or {})
  keywords.check(task.supervised, options)
  return task.supervised(split, seed, num=num, **options)


def of_rows(
  rows: Sequence[forms.Row], encoded: encoding.Encoded, *, templated: bool
) -> Prompts:
  """Makes prompts of rows that `encoding.prepare` has encoded.

  Args:
    rows: what it was given.
    encoded: the N rows that it has left.
    templated: whether the texts are in the chat template, if there is one, as
      a reward model reads them. A task does not know of it, and is given those
      of the rows; where one of these is a list of messages, all of them are in
      the template.
  """
  given = encoding.as_given(rows, encoded)
  is_text = all(isinstance(row.prompt, str) for row in given)
  scored = given if is_text and not templated else encoded.rows
  ids, mask = batches.pad_left(encoded.prompt_ids)
  texts = [
    asked.Prompt(shown.prompt, row.prompt, row.columns)
    for shown, row in zip(scored, given, strict=True)
  ]
  return Prompts(texts, encoded.prompt_ids, ids, mask, encoded.skipped)


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
  data: str = "",
  eval_data: str = "",
  eval_share: float = 0.1,
  at_least: int = 1,
  note: Callable[[str], None] = lambda line: None,
) -> tuple[Prompts, Prompts]:
  """Draws prompts for training and held-out ones, of a task or of files.

  Args:
    task: module with `prompts`, unless a file is named.
    tokenizer: of the policy.
    seed: of the draw.
    num_prompts: of the split "train"; of a file at most so many.
    num_eval_prompts: of `eval_split`, likewise.
    eval_split: a split of the task, or of the data.
    max_length: most tokens of a prompt. A longer one of a task is an error; of
      a file it is left out and named.
    prompt_format: see `encode`.
    task_options: further arguments of `task.prompts`. The option tokenizer with
      the value "policy" becomes the policy's tokenizer.
    eos: whether the tokenizer needs an end token.
    data: file of prompts, see `logged.load_prompts`; empty: the task's.
    eval_data: file of the held-out ones; empty: see `split_rows`.
    eval_share: share of the prompts of one file that is held out.
    at_least: training prompts that there must be.
    note: is told what files hold.

  Returns:
    The training prompts and the held-out ones, padded to one length.

  Raises:
    ValueError: if the task has no such option, the tokenizer lacks a token, or
      as `encode`, `logged.load_prompts` and `split_rows`.
  """
  if data:
    return _load_files(
      tokenizer,
      split_rows(
        data, eval_data, eval_split=eval_split, share=eval_share, seed=seed
      ),
      (num_prompts, num_eval_prompts),
      max_length=max_length,
      prompt_format=prompt_format,
      eos=eos,
      at_least=at_least,
      name=data,
      note=note,
    )
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


def split_rows(
  data: str, eval_data: str = "", *, eval_split: str, share: float, seed: int
) -> tuple[logged.Loaded, logged.Loaded]:
  """Reads the prompts of files, and holds some of them out.

  The held-out ones are those of `eval_data`; without it, those of the split
  `eval_split` where `data` has splits (a folder, a name with "{split}", or
  tfds); else a share of the different prompts of the one file, which are
  shuffled by the seed: no prompt is on both sides.

  Args:
    data: see `logged.load_prompts`, likewise `eval_data`.
    eval_data: may be empty.
    eval_split: name of the split that is held out.
    share: in (0, 1).
    seed: of the shuffle.

  Returns:
    Rows to learn from, and held-out rows.

  Raises:
    ValueError: as `logged.load_prompts`; or if one side would be empty.
  """
  has_splits = "{split}" in data or data.startswith("tfds:")
  if eval_data or has_splits or os.path.isdir(data):
    train = logged.load_prompts(data, "train")
    held_out = logged.load_prompts(eval_data or data, eval_split)
    return train, held_out
  loaded = logged.load_prompts(data, "train")
  rows = loaded.rows
  is_apart = splits.held_out([row.prompt for row in rows], share, seed=seed)
  sides = [], []
  for row, side in zip(rows, is_apart, strict=True):
    sides[int(side)].append(row)
  train, held_out = sides
  return loaded._replace(rows=train), logged.Loaded(held_out, [], [])


def _load_files(
  tokenizer,
  found,
  limits,
  *,
  max_length,
  prompt_format,
  eos,
  at_least,
  name,
  note,
):
  """Encodes the rows of `split_rows`, to one length; see `load`."""
  made = []
  for loaded, limit in zip(found, limits, strict=True):
    rows = loaded.rows[:limit]
    encoded = encoding.prepare(
      tokenizer,
      rows,
      prompt_format=prompt_format,
      max_prompt_length=max_length,
      max_response_length=1,
      too_long="skip",
    )
    one = of_rows(rows, encoded, templated=False)
    skipped = [*loaded.skipped, *one.skipped]
    made.append(dataclasses.replace(one, skipped=skipped, notes=loaded.notes))
  if len(made[0]) < at_least:
    raise ValueError(
      f"{name} leaves {len(made[0])} prompts to learn from, and a step asks "
      f"{at_least}: take a smaller --batch_size, or more prompts."
    )
  length = max(one.ids.shape[1] for one in made)
  train, held_out = (
    dataclasses.replace(one, ids=ids, mask=mask)
    for one in made
    for ids, mask in [batches.pad_left(one.encoded, length=length)]
  )
  for line in dict.fromkeys([*train.notes, *held_out.notes]):
    note(line)
  note(f"{len(train)} prompts to learn from, {len(held_out)} held out.")
  return train, held_out


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
    **settings: of `encoding.prepare`: `prompt_format`, `max_prompt_length`,
      `max_response_length` and `too_long`.

  Returns:
    The prompts; their texts are in the chat template, if there is one.

  Raises:
    ValueError: as `logged.load_prompts` and `encoding.prepare`.
  """
  if name:
    loaded = logged.load_prompts(name, split)
  else:
    rows = logged.task_prompts(task, split, seed, num_prompts)
    loaded = logged.Loaded(rows, [], [])
  rows = loaded.rows[:num_prompts]
  found = of_rows(
    rows, encoding.prepare(tokenizer, rows, **settings), templated=True
  )
  return dataclasses.replace(
    found, skipped=[*loaded.skipped, *found.skipped], notes=loaded.notes
  )
