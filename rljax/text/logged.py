"""Logged responses: prompts, replies and their rewards.

Files of many origins are read into one kind of row, which offline learners
train on. A row that cannot be used is named and counted, never dropped
silently.
"""

import dataclasses
import hashlib
import json
import math
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from absl import logging

from rljax.text import batches, chats, files, keywords, tokens

Message = Mapping[str, str]

_HUMAN, _ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
_ROLES = {"Human": "user", "Assistant": "assistant"}
_MARKER = re.compile(r"(?:^|\n\n)(Human|Assistant):")
# Names under which files hold the scores of a chosen and a rejected reply.
_PAIR_SCORES = (
  ("chosen_score", "rejected_score"),
  ("score_chosen", "score_rejected"),
  ("chosen_reward", "rejected_reward"),
  ("reward_chosen", "reward_rejected"),
)


@dataclasses.dataclass(frozen=True)
class Row:
  """Holds a prompt and the replies to it.

  Attributes:
    prompt: text, or messages of `role` and `content`.
    candidates: K replies; none where there is only a prompt. The first is the
      one to learn from; of chosen and rejected it is the chosen one.
    rewards: K numbers, or None if the replies were not scored.
    value: what the policy that wrote the replies earns on this prompt, or
      None.
    advantage: of the first reply, or None.
    place: where the row comes from, such as "logged.jsonl:17".
    response_ids: the tokens of the first reply as they were drawn, or None.
  """

  prompt: str | tuple[Message, ...]
  candidates: tuple[str, ...]
  rewards: tuple[float, ...] | None
  value: float | None
  advantage: float | None
  place: str
  response_ids: tuple[int, ...] | None


@dataclasses.dataclass(frozen=True)
class Encoded:
  """Holds N rows as ids.

  Attributes:
    prompt_ids: N lists of ids.
    response_ids: per row, per candidate, a list of ids.
    rows: the N rows that they belong to.
    skipped: one message per row that was too long.
  """

  prompt_ids: list[list[int]]
  response_ids: list[list[list[int]]]
  rows: list[Row]
  skipped: list[str]


@dataclasses.dataclass(frozen=True)
class Log:
  """A log as ids, to be made into batches of one shape; see `read`.

  N rows of up to K replies.

  Attributes:
    encoded: the rows as ids.
    lengths: P and T, columns that hold every prompt and every reply.
    present: `[N, K]` bool, which replies there are.
    skipped: one message per row that was left out.
    settings: how the rows were encoded, by the names of the flags.
    pad_id: what fills batches.
  """

  encoded: Encoded
  lengths: tuple[int, int]
  present: np.ndarray
  skipped: list[str]
  settings: dict[str, Any]
  pad_id: int = 0

  @property
  def rows(self) -> list[Row]:
    """The N rows that could be encoded."""
    return self.encoded.rows

  def batch(
    self, rows: np.ndarray, candidates: np.ndarray
  ) -> dict[str, np.ndarray]:
    """Pads replies and their prompts to a batch.

    Args:
      rows: `[...]` int, row numbers.
      candidates: `[...]` int, candidate numbers, of a shape that goes with that
        of `rows`. One that its row does not have is an empty response.

    Returns:
      `prompt_ids`, `prompt_mask` `[..., P]` and `response_ids`,
      `response_mask` `[..., T]`; see `batch`.
    """
    rows, candidates = np.broadcast_arrays(rows, candidates)
    arrays = batch(
      self.encoded,
      rows.ravel(),
      candidates.ravel(),
      prompt_length=self.lengths[0],
      response_length=self.lengths[1],
      pad_id=self.pad_id,
    )
    return {k: x.reshape(*rows.shape, -1) for k, x in arrays.items()}


class Split(NamedTuple):
  """Rows to learn from, and held-out ones.

  Attributes:
    train: the rows to learn from.
    held_out: the others.
    skipped: one message for each row that cannot be used.
    counts: what else was left out or found, in words -> number.
  """

  train: Encoded
  held_out: Encoded
  skipped: list[str]
  counts: dict[str, int]


# Files.


def read(
  tokenizer: Any,
  *,
  name: str,
  task: Any,
  seed: int,
  task_options: Mapping[str, Any] | None = None,
  split: str = "train",
  first_row: int = 0,
  num_rows: int = 0,
  **settings: Any,
) -> Log:
  """Reads a log and encodes it.

  Args:
    tokenizer: Hugging Face fast tokenizer with an end token.
    name: of a file, see `load`; empty for the task's own log.
    task: module with `logged`, where no file is named.
    seed: of the task's draw.
    task_options: keyword arguments of the task's `logged`.
    split: of the file or the task.
    first_row: rows before it are passed over.
    num_rows: how many are taken from there on; 0 for all.
    **settings: of `prepare`: `prompt_format`, `max_prompt_length`,
      `max_response_length` and `too_long`.

  Raises:
    ValueError: as `load_or_draw` and `prepare`.
  """
  rows, unusable = load_or_draw(name, task, split, seed, task_options or {})
  encoded = prepare(tokenizer, rows[first_row:][: num_rows or None], **settings)
  return Log(
    encoded=encoded,
    lengths=lengths(encoded),
    present=present(encoded.rows),
    skipped=[*unusable, *encoded.skipped],
    settings=settings,
    pad_id=tokens.pad_id(tokenizer),
  )


def load(
  name: str, split: str = "train", *, data_dir: str | os.PathLike | None = None
) -> tuple[list[Row], list[str]]:
  """Loads logged responses in any of the forms that `parse` knows.

  Args:
    name: a file, a folder or "tfds:<name>"; see `files.load_rows`.
    split: such as "train".
    data_dir: folder that relative paths start from; for tfds its data folder.

  Returns:
    The rows in order, and a message with the place of each that cannot be used.
    Their number and the first three are logged.

  Raises:
    ValueError: if there is no such file or split, or no row can be used.
  """
  rows, skipped = [], []
  for place, row in files.load_placed_rows(name, split, data_dir=data_dir):
    try:
      if isinstance(row, ValueError):
        raise row
      rows.append(parse(row, place))
    except ValueError as error:
      skipped.append(str(error))
  _report(skipped, len(rows), f"rows of {name} cannot be used")
  return rows, skipped


def load_or_draw(
  name: str, task: Any, split: str, seed: int, options: Mapping[str, Any]
) -> tuple[list[Row], list[str]]:
  """Loads the rows of a file if one is named, else those of a task's log.

  Args:
    name: see `load`; may be empty.
    task: see `task_rows`, likewise `seed` and `options`.
    split: of either.
    seed: of the task's draw.
    options: of the task.

  Returns:
    Rows, and one message for each that cannot be used, as `load` does.

  Raises:
    ValueError: as `load` or `task_rows`.
  """
  if name:
    return load(name, split)
  return task_rows(task, split, seed, options), []


def load_or_ask(
  name: str, task: Any, split: str, seed: int, options: Mapping[str, Any]
) -> tuple[list[Row], list[str]]:
  """Loads the prompts of a file if one is named, else draws those of a task.

  Args:
    name: see `load_prompts`; may be empty.
    task: module with `prompts`.
    split: of either.
    seed: of the task's draw.
    options: keyword arguments of the task's `prompts`.

  Returns:
    Rows without candidates, and one message for each that cannot be used.

  Raises:
    ValueError: as `load_prompts`, or if the task has no such option.
  """
  if name:
    return load_prompts(name, split)
  keywords.check(task.prompts, options)
  prompts = task.prompts(split, seed, **options)
  return from_prompts(prompts, f"{_task_name(task)}, {split}"), []


def task_rows(
  task: Any, split: str, seed: int, options: Mapping[str, Any]
) -> list[Row]:
  """Returns the replies that a task has logged.

  Args:
    task: module with `logged`.
    split: of the task.
    seed: of the draw.
    options: keyword arguments of the task's `logged`.

  Raises:
    ValueError: if the task has no log, or not such an option.
  """
  if not hasattr(task, "logged"):
    raise ValueError(
      f"The task {_task_name(task)} has no logged replies; give --data."
    )
  keywords.check(task.logged, options)
  return from_rows(
    task.logged(split, seed, **options), f"{_task_name(task)}, {split}"
  )


def task_prompts(task: Any, split: str, seed: int, num: int) -> list[Row]:
  """Returns prompts of a task, as rows without candidates."""
  prompts = task.prompts(split, seed, num=num)
  return from_prompts(prompts, f"{_task_name(task)}, {split}")


def task_examples(
  task: Any, split: str, seed: int, num: int, options: Mapping[str, Any]
) -> list[Row]:
  """Draws prompts of a task, each with the response to learn from.

  Args:
    task: module with `supervised`. Its prompts may be empty, so that the whole
      text is a response.
    split: of the task.
    seed: of the draw.
    num: number of prompts.
    options: further keyword arguments of the task's `supervised`.

  Raises:
    ValueError: if the task has no examples, or not such an option.
  """
  if not hasattr(task, "supervised"):
    raise ValueError(
      f"The task {_task_name(task)} has no examples to learn from: give --data."
    )
  keywords.check(task.supervised, options)
  name = f"{_task_name(task)}, {split}"
  pairs = task.supervised(split, seed, num=num, **options)
  return [
    Row(prompt, (response,), None, None, None, f"{name}, row {i}", None)
    for i, (prompt, response) in enumerate(pairs)
  ]


def _task_name(task: Any) -> str:
  return task.__name__.rpartition(".")[2]


def from_rows(rows: Iterable[Mapping[str, Any]], name: str) -> list[Row]:
  """Reads rows that a program made, such as a task, by `parse`.

  Raises:
    ValueError: naming the first row that cannot be used.
  """
  return [parse(row, f"{name}, row {i}") for i, row in enumerate(rows)]


def from_prompts(prompts: Iterable[str], name: str) -> list[Row]:
  """Makes rows without candidates of prompts."""
  return [_unanswered(p, f"{name}, row {i}") for i, p in enumerate(prompts)]


def load_prompts(
  name: str, split: str = "train", *, data_dir: str | os.PathLike | None = None
) -> tuple[list[Row], list[str]]:
  """Loads the prompts of a file, with or without replies.

  Args:
    name: as for `load`; rows may have a `prompt` alone.
    split: such as "train".
    data_dir: folder that relative paths start from.

  Returns:
    Rows without candidates, and one message for each that cannot be used.

  Raises:
    ValueError: as `load`.
  """
  rows, skipped = [], []
  for place, row in files.load_placed_rows(name, split, data_dir=data_dir):
    try:
      if isinstance(row, ValueError):
        raise row
      if "prompt" not in row:
        row = {"prompt": parse(row, place).prompt}
      rows.append(_unanswered(row["prompt"], place))
    except ValueError as error:
      skipped.append(str(error))
  _report(skipped, len(rows), f"prompts of {name} cannot be used")
  return rows, skipped


def parse(row: Mapping[str, Any], place: str) -> Row:
  """Reads one row, whose fields tell its form.

    prompt, response, reward                 a reply and its score
    prompt, response                         a reply
    prompt, candidates, rewards              K replies and their scores
    prompt, chosen, rejected                 replies, or messages whose last
                                             is the reply
    chosen, rejected                         transcripts of "\\n\\nHuman:" and
                                             "\\n\\nAssistant:" turns, or
                                             messages, that differ in the last
                                             turn

  Each may have `value`, `advantage`, and beside `response` its `response_ids`,
  as `rollouts.records` writes them; a pair may have scores (`chosen_score`,
  `rejected_score` and the like). Prompts are texts or lists of messages. A
  reply is kept as it stands, with its paragraphs and the blank in front. A
  field that is null counts as missing, but a null reward is an error.

  Args:
    row: JSON values by field.
    place: of the row, for messages.

  Raises:
    ValueError: naming the place and what is wrong.
  """
  row = {
    name: value
    for name, value in row.items()
    if value is not None or name in ("reward", "rewards")
  }
  try:
    if "chosen" in row or "rejected" in row:
      prompt, candidates, rewards = _pair(row)
    elif "candidates" in row:
      prompt, candidates, rewards = _ranked(row)
    elif "response" in row:
      prompt = _prompt(_field(row, "prompt"))
      candidates = (_reply(row["response"], "response"),)
      rewards = (_number(row, "reward"),) if "reward" in row else None
    else:
      raise ValueError('it has none of "response", "candidates" and "chosen"')
    return Row(
      prompt=prompt,
      candidates=candidates,
      rewards=rewards,
      value=_number(row, "value") if "value" in row else None,
      advantage=_number(row, "advantage") if "advantage" in row else None,
      place=place,
      response_ids=_response_ids(row),
    )
  except ValueError as error:
    raise ValueError(f"{place}: {error}.") from error


def turns(transcript: str) -> list[dict[str, str]]:
  """Splits a transcript of "\\n\\nHuman:" and "\\n\\nAssistant:" turns.

  Args:
    transcript: text. If it ends in a bare "\\n\\nAssistant:", as prompts do,
      that turn is left out.

  Returns:
    Messages of `role` ("user" or "assistant") and `content`, stripped of the
    blanks around it.

  Raises:
    ValueError: if the text begins with no marker, or holds no turn.
  """
  before, *pieces = _MARKER.split(transcript)
  if before.strip() or not pieces:
    raise ValueError('a transcript begins with "\\n\\nHuman:"')
  messages = [
    {"role": _ROLES[speaker], "content": content.strip()}
    for speaker, content in zip(pieces[::2], pieces[1::2], strict=True)
  ]
  if messages[-1] == {"role": "assistant", "content": ""}:
    messages.pop()
  if not messages:
    raise ValueError("the transcript has no turns")
  return messages


# Rows.


def render(
  rows: Sequence[Row], tokenizer, prompt_format: Literal["plain", "chat"]
) -> tuple[list[Row], list[str]]:
  """Renders prompts as a model is asked.

  Args:
    rows: logged rows.
    tokenizer: Hugging Face tokenizer, whose chat template "chat" uses.
    prompt_format: "plain" leaves texts as they are. "chat" puts messages, the
      turns of a transcript, or a plain text as the user's one turn into the
      chat template, up to where the assistant begins, and strips replies of the
      blanks around them.

  Returns:
    Rows whose prompts are texts, and a message for each that the template
    refuses, or that is rendered already. Their number and the first three are
    logged.

  Raises:
    ValueError: if a "plain" prompt is a list of messages; if the tokenizer
      has no chat template; or if no row is left.
  """
  if prompt_format not in ("plain", "chat"):
    raise ValueError(
      f'--prompt_format must be "plain" or "chat", got {prompt_format!r}.'
    )
  if prompt_format == "chat" and not getattr(tokenizer, "chat_template", None):
    raise ValueError(
      "The tokenizer has no chat template; use --prompt_format=plain."
    )
  rendered, skipped = [], []
  for row in rows:
    if prompt_format == "plain":
      if not isinstance(row.prompt, str):
        raise ValueError(
          f"{row.place}: the prompt is a list of messages; use "
          "--prompt_format=chat."
        )
      rendered.append(row)
      continue
    try:
      prompt = chats.render(
        tokenizer,
        _messages(row.prompt, tokenizer),
        add_generation_prompt=True,
      )
    except Exception as error:  # Messages may be anything.
      reason = str(error).rstrip(".")
      skipped.append(f"{row.place}: no chat prompt ({reason}).")
      continue
    candidates = tuple(candidate.strip() for candidate in row.candidates)
    rendered.append(
      dataclasses.replace(row, prompt=prompt, candidates=candidates)
    )
  _report(skipped, len(rendered), "rows do not fit the chat template")
  return rendered, skipped


def render_prompts(
  prompts: Sequence[str],
  name: str,
  tokenizer,
  prompt_format: Literal["plain", "chat"],
) -> list[str]:
  """Renders the prompts of a task as a model is asked.

  Args:
    prompts: N texts.
    name: of the task, for messages.
    tokenizer: see `render`; likewise `prompt_format`.
    prompt_format: "plain" or "chat".

  Returns:
    N texts.

  Raises:
    ValueError: if the chat template refuses one of them.
  """
  rows, skipped = render(from_prompts(prompts, name), tokenizer, prompt_format)
  if skipped:
    raise ValueError(
      f"{len(skipped)} prompts do not fit the chat template: {skipped[0]}"
    )
  return [row.prompt for row in rows]


def first_replies(rows: Iterable[Row]) -> list[Row]:
  """Keeps of each row the reply to learn from."""
  return [
    dataclasses.replace(
      row,
      candidates=row.candidates[:1],
      rewards=None if row.rewards is None else row.rewards[:1],
    )
    for row in rows
  ]


def best_first(row: Row) -> Row:
  """Sorts the candidates of a row by reward, the best one first.

  Equal ones keep their order. An advantage and ids of a reply that is no longer
  the first are dropped.

  Raises:
    ValueError: if the row has no rewards.
  """
  if row.rewards is None:
    raise ValueError(f'{row.place}: "reward" is missing.')
  order = sorted(range(len(row.rewards)), key=lambda i: -row.rewards[i])
  changes = {
    "candidates": tuple(row.candidates[i] for i in order),
    "rewards": tuple(row.rewards[i] for i in order),
  }
  if order[0] != 0:
    changes |= {"advantage": None, "response_ids": None}
  return dataclasses.replace(row, **changes)


def reward_array(rows: Sequence[Row]) -> np.ndarray:
  """Returns the rewards of all candidates, `[N, K]` float32.

  NaN where a candidate was not scored, and where a row has fewer than K.
  """
  rewards = np.full(
    (len(rows), max(len(row.candidates) for row in rows)), np.nan, np.float32
  )
  for i, row in enumerate(rows):
    if row.rewards is not None:
      rewards[i, : len(row.rewards)] = row.rewards
  return rewards


def advantage_array(rows: Sequence[Row]) -> np.ndarray:
  """Returns the advantages of all candidates, `[N, K]` float32.

  A row's own `advantage` is that of its first candidate; elsewhere it is the
  reward minus the row's `value`. NaN where neither is known.
  """
  values = [np.nan if row.value is None else row.value for row in rows]
  advantages = reward_array(rows) - np.float32(values)[:, None]
  for i, row in enumerate(rows):
    if row.advantage is not None:
      advantages[i, 0] = row.advantage
  return advantages


def check_rewards(rewards: np.ndarray, max_value: float = np.inf) -> None:
  """Raises ValueError if rewards are not in [0, max_value]; NaN passes."""
  low, high = np.nanmin(rewards), np.nanmax(rewards)
  if low < 0 or high > max_value:
    raise ValueError(
      f"Rewards must lie in [0, {max_value:g}], got {low:g} to {high:g}. A "
      "classifier's logits need a sigmoid (--reward_transform, --rescore); a "
      "larger scale needs another --max_value."
    )


def present(rows: Sequence[Row]) -> np.ndarray:
  """Returns which of K candidates there are, `[N, K]` bool."""
  counts = np.array([len(row.candidates) for row in rows])
  return np.arange(counts.max()) < counts[:, None]


# Ids.


def encode(
  tokenizer,
  rows: Sequence[Row],
  *,
  max_prompt_length: int,
  max_response_length: int,
  too_long: Literal["skip", "cut", "error"] = "skip",
  end_id: int | None = None,
) -> Encoded:
  """Turns rows into ids; responses end in the end token.

  Prompts and responses get the ids that `tokens.encode_pairs` gives them. The
  `response_ids` of a rollout are used as they were drawn if they decode to
  their response; otherwise, as under another tokenizer, the text is encoded.

  Args:
    tokenizer: Hugging Face fast tokenizer with an end token.
    rows: with prompts that are texts, see `render`.
    max_prompt_length: tokens that a prompt may have.
    max_response_length: tokens that a response may have, end token included.
    too_long: what becomes of a row with a prompt or a reply that is longer.
      "skip" leaves the row out and names it; "cut" cuts prompts on the left,
      after the start token, and responses on the right, with their end token;
      "error" refuses it. What was done is logged.
    end_id: the token that responses end in; the tokenizer's own by default.

  A row that the tokenizer cannot write is left out and named as well.

  Raises:
    ValueError: naming what is too long; or if no row is left.
  """
  if too_long not in ("skip", "cut", "error"):
    raise ValueError(
      f'too_long must be "skip", "cut" or "error", got {too_long!r}.'
    )
  for name, length in (
    ("max_prompt_length", max_prompt_length),
    ("max_response_length", max_response_length),
  ):
    if length < 1:
      raise ValueError(f"{name} must be positive, got {length}.")
  if not rows:
    raise ValueError("There are no rows to encode.")
  for row in rows:
    if not isinstance(row.prompt, str):
      raise ValueError(
        f"{row.place}: the prompt is a list of messages; use "
        "--prompt_format=chat."
      )
  tokens.require_tokens(tokenizer, eos=True)
  largest_id = max(tokenizer.get_vocab().values())
  encoded = Encoded([], [], [], [])
  rows, prompts = _encode_prompts(tokenizer, rows, encoded.skipped)
  num_apart = num_logged = num_anew = num_prompts = num_cut = num_responses = 0
  for row, whole in zip(rows, prompts, strict=True):
    responses = []
    for i, text in enumerate(row.candidates):
      if i == 0 and row.response_ids is not None:
        num_logged += 1
        if _decodes(tokenizer, row.response_ids, text, largest_id):
          responses.append(list(row.response_ids))
          continue
        num_anew += 1
      try:
        ids, apart = tokens.encode_response(
          tokenizer, row.prompt, whole, text, end_id=end_id
        )
      except ValueError as error:  # A tokenizer of a few words.
        encoded.skipped.append(f"{row.place}: {error}")
        break
      num_apart += apart
      responses.append(ids)
    if len(responses) < len(row.candidates):
      continue
    num_responses += len(responses)
    prompt = tokens.cut_prompt(tokenizer, whole, max_prompt_length)
    cut = [ids[:max_response_length] for ids in responses]
    if too_long != "cut" and (prompt != whole or cut != responses):
      message = f"{row.place}: the prompt has {len(whole)} tokens"
      limits = f"the limit is {max_prompt_length}"
      if responses:
        longest = max(map(len, responses))
        message += f" and the longest reply {longest} with its end token"
        limits = f"the limits are {max_prompt_length} and {max_response_length}"
      message += f", {limits}."
      if too_long == "error":
        raise ValueError(message)
      encoded.skipped.append(message)
      continue
    num_prompts += prompt != whole
    num_cut += sum(a != b for a, b in zip(cut, responses, strict=True))
    encoded.prompt_ids.append(prompt)
    encoded.response_ids.append(cut)
    encoded.rows.append(row)
  for count, total, what in (
    (num_apart, num_responses, "responses were encoded apart from prompts"),
    (num_anew, num_logged, "responses differ from their ids: encoded anew"),
    (num_prompts, len(rows), "prompts were cut on the left"),
    (num_cut, num_responses, "responses were cut, and lost their end token"),
  ):
    if count:
      logging.warning("%d of %d %s.", count, total, what)
  _report(encoded.skipped, len(encoded.rows), "rows cannot be encoded")
  return encoded


def prepare(
  tokenizer,
  rows: Sequence[Row],
  *,
  prompt_format: Literal["plain", "chat"],
  **limits: Any,
) -> Encoded:
  """Renders rows and turns them into ids; see `render` and `encode`.

  In a chat, responses end in the token by which the template ends a turn.

  What either left out is in the result's `skipped`.
  """
  rows, refused = render(rows, tokenizer, prompt_format)
  end_id = tokens.turn_end(tokenizer) if prompt_format == "chat" else None
  encoded = encode(tokenizer, rows, end_id=end_id, **limits)
  return dataclasses.replace(encoded, skipped=[*refused, *encoded.skipped])


def as_given(rows: Iterable[Row], encoded: Encoded) -> list[Row]:
  """Returns the rows that are left of `prepare`, as it was given them."""
  by_place = {row.place: row for row in rows}
  return [by_place[row.place] for row in encoded.rows]


def lengths(encoded: Encoded) -> tuple[int, int]:
  """Columns that hold every prompt, and every reply."""
  replies = (len(ids) for row in encoded.response_ids for ids in row)
  return (
    batches.bucket_length(max(map(len, encoded.prompt_ids))),
    batches.bucket_length(max(replies)),
  )


def take(encoded: Encoded, rows: Iterable[int]) -> Encoded:
  """Returns some rows of N, and of every array `[N, ...]` of a subclass.

  Args:
    encoded: N rows.
    rows: their numbers.
  """
  rows = list(rows)
  fields = {
    field.name: getattr(encoded, field.name)
    for field in dataclasses.fields(encoded)
    if field.name != "skipped"
  }
  return dataclasses.replace(
    encoded,
    **{
      name: value[rows]
      if isinstance(value, np.ndarray)
      else [value[i] for i in rows]
      for name, value in fields.items()
    },
  )


def batch(
  encoded: Encoded,
  rows: Sequence[int],
  candidates: Sequence[int],
  *,
  prompt_length: int,
  response_length: int,
  pad_id: int = 0,
) -> dict[str, np.ndarray]:
  """Pads B replies and their prompts to a batch.

  Args:
    encoded: N rows.
    rows: B row numbers.
    candidates: B candidate numbers. One that its row does not have is an
      empty response, masked everywhere.
    prompt_length: P.
    response_length: T.
    pad_id: what fills the rest.

  Returns:
    `prompt_ids`, `prompt_mask` `[B, P]` and `response_ids`, `response_mask`
    `[B, T]`, see `batches.supervised_batch`.
  """
  pairs = []
  for row, candidate in zip(rows, candidates, strict=True):
    if row < 0 or candidate < 0:
      raise ValueError(
        f"Rows and candidates are counted from 0, got {row} and {candidate}."
      )
    responses = encoded.response_ids[row]
    pairs.append(
      (
        encoded.prompt_ids[row],
        responses[candidate] if candidate < len(responses) else [],
      )
    )
  return batches.supervised_batch(
    pairs,
    prompt_length=prompt_length,
    response_length=response_length,
    pad_id=pad_id,
  )


def fingerprint(rows: Iterable[Row]) -> str:
  """Hashes prompts, candidates and rewards in order, but not places.

  Results such as values may be used for rows with the same fingerprint.
  """
  return _hash([row.prompt, row.candidates, row.rewards] for row in rows)


def fingerprint_ids(encoded: Encoded) -> str:
  """Hashes ids in order, which depend on the tokenizer and the limits too."""
  return _hash(zip(encoded.prompt_ids, encoded.response_ids, strict=True))


# Helpers.


def _encode_prompts(tokenizer, rows, skipped):
  """Returns the rows that can be written, with the ids of their prompts."""
  encode = lambda texts: tokens.encode_prompts(
    tokenizer, texts, max_length=sys.maxsize
  )
  try:
    return rows, encode([row.prompt for row in rows])
  except ValueError:
    pass  # Some text cannot be written; below, one by one, to find it.
  kept, prompts = [], []
  for row in rows:
    try:
      prompts += encode([row.prompt])
    except ValueError as error:
      skipped.append(f"{row.place}: {error}")
    else:
      kept.append(row)
  return kept, prompts


def _unanswered(prompt: Any, place: str) -> Row:
  try:
    prompt = _prompt(prompt)
  except ValueError as error:
    raise ValueError(f"{place}: {error}.") from error
  return Row(prompt, (), None, None, None, place, None)


def _report(skipped: Sequence[str], num_left: int, what: str) -> None:
  """Logs what was skipped, and raises if that was everything."""
  if not skipped:
    return
  total = len(skipped) + num_left
  message = f"{len(skipped)} of {total} {what}: {' '.join(skipped[:3])}"
  if not num_left:
    raise ValueError(f"No row is left: {message}")
  logging.warning("%s", message)


def _pair(row: Mapping[str, Any]):
  """Returns prompt, candidates and rewards of a chosen and a rejected reply."""
  names = ("chosen", "rejected")
  sides = [_field(row, name) for name in names]
  if "prompt" in row:
    prompt = _prompt(row["prompt"])
    halves = [
      _last(side, n, has_prompt=True)
      for side, n in zip(sides, names, strict=True)
    ]
    # Other files have whole texts besides the prompt.
    if isinstance(prompt, str) and all(
      isinstance(side, str) and side.startswith(prompt) for side in sides
    ):
      halves = [((), side[len(prompt) :]) for side in sides]
    for name, (context, _) in zip(names, halves, strict=True):
      # Some files repeat the prompt in front of the reply.
      if isinstance(prompt, str) and context:
        asked = context[-1]["content"] == prompt
      else:
        asked = context in ((), prompt)
      if not asked:
        raise ValueError(f'"{name}" does not continue the prompt')
    if isinstance(prompt, str) and halves[0][0]:
      prompt = halves[0][0]
  else:
    halves = [
      _last(side, n, has_prompt=False)
      for side, n in zip(sides, names, strict=True)
    ]
    prompt = _prompt(halves[0][0])
  if halves[0][0] != halves[1][0]:
    raise ValueError('"chosen" and "rejected" differ before the last reply')
  candidates = tuple(
    _reply(reply, name) for (_, reply), name in zip(halves, names, strict=True)
  )
  for scores in _PAIR_SCORES:
    if any(name in row for name in scores):
      return prompt, candidates, tuple(_number(row, name) for name in scores)
  return prompt, candidates, None


def _last(value: Any, name: str, *, has_prompt: bool):
  """Returns what stands before the last reply, and the reply.

  Where the row has no prompt of its own, a text is a whole transcript.
  """
  if isinstance(value, str):
    if has_prompt:
      return (), value
    before, marker, reply = value.rpartition(_ASSISTANT)
    if not before.strip():
      raise ValueError(
        f'"{name}" has no {json.dumps(_ASSISTANT)} after a question'
      )
    if _HUMAN in reply:
      raise ValueError(f'"{name}" does not end in a reply')
    return before + marker, reply
  messages = _checked_messages(value, f'"{name}"')
  if messages[-1]["role"] != "assistant":
    raise ValueError(f'"{name}" does not end in a reply of the assistant')
  return messages[:-1], messages[-1]["content"]


def _ranked(row: Mapping[str, Any]):
  """Returns prompt, candidates and rewards of a row with lists of them."""
  prompt = _prompt(_field(row, "prompt"))
  candidates, rewards = row["candidates"], _field(row, "rewards")
  for name, value in (("candidates", candidates), ("rewards", rewards)):
    if not isinstance(value, (list, tuple)) or not value:
      raise ValueError(f'"{name}" must be a list that is not empty')
  if len(candidates) != len(rewards):
    raise ValueError(
      f"there are {len(candidates)} candidates, but {len(rewards)} rewards"
    )
  return (
    prompt,
    tuple(
      _reply(text, f"candidates[{i}]") for i, text in enumerate(candidates)
    ),
    tuple(_finite(x, f"rewards[{i}]") for i, x in enumerate(rewards)),
  )


def _field(row: Mapping[str, Any], name: str) -> Any:
  if name not in row:
    raise ValueError(f'"{name}" is missing')
  return row[name]


def _text(value: Any, what: str) -> str:
  if not isinstance(value, str):
    raise ValueError(f"{what} must be a text, got {type(value).__name__}")
  try:
    value.encode("utf-8")
  except UnicodeEncodeError as error:
    raise ValueError(f"{what} holds half a surrogate pair") from error
  return value


def _reply(value: Any, name: str) -> str:
  if not _text(value, f'"{name}"').strip():
    raise ValueError(f'"{name}" is empty')
  return value


def _prompt(value: Any) -> str | tuple[Message, ...]:
  if isinstance(value, str):
    if not _text(value, '"prompt"').strip():
      raise ValueError('"prompt" is empty')
    return value
  return _checked_messages(value, '"prompt"')


def _checked_messages(value: Any, what: str) -> tuple[Message, ...]:
  """Returns messages with nothing but their roles and contents."""
  if not isinstance(value, (list, tuple)):
    raise ValueError(
      f"{what} must be a text or messages, got {type(value).__name__}"
    )
  messages = []
  for message in value:
    if not isinstance(message, Mapping):
      raise ValueError(f"a message of {what} is not an object")
    messages.append(
      {
        name: _text(message.get(name), f'"{name}" of a message of {what}')
        for name in ("role", "content")
      }
    )
  if not any(message["content"].strip() for message in messages):
    raise ValueError(f"{what} is empty")
  return tuple(messages)


def _number(row: Mapping[str, Any], name: str) -> float:
  return _finite(_field(row, name), name)


def _finite(value: Any, name: str) -> float:
  try:
    is_finite = not isinstance(value, bool) and math.isfinite(value)
  except (TypeError, OverflowError):
    is_finite = False
  if not is_finite:
    found = repr(value)
    found = found if len(found) <= 20 else f"{found[:20]}..."
    raise ValueError(f'"{name}" must be a finite number, got {found}')
  return float(value)


def _response_ids(row: Mapping[str, Any]) -> tuple[int, ...] | None:
  if "response" not in row or "response_ids" not in row:
    return None
  ids = row["response_ids"]
  if not isinstance(ids, (list, tuple)) or not all(
    type(token) is int and token >= 0 for token in ids
  ):
    raise ValueError('"response_ids" must be a list of ids')
  return tuple(ids)


def _messages(prompt: str | tuple[Message, ...], tokenizer) -> list[Message]:
  """Returns what a chat template takes."""
  if not isinstance(prompt, str):
    return [dict(message) for message in prompt]
  if prompt.startswith(tuple(tokenizer.all_special_tokens)):
    raise ValueError(
      "it already begins with a special token; use --prompt_format=plain"
    )
  before, *pieces = _MARKER.split(prompt)
  if pieces and not before.strip() and prompt.rstrip().endswith(_ASSISTANT):
    return turns(prompt)
  return [{"role": "user", "content": prompt}]


def _decodes(tokenizer, ids: Sequence[int], text: str, largest_id: int) -> bool:
  if not ids or max(ids) > largest_id:
    return False
  ids = np.array([ids])
  return tokens.decode(tokenizer, ids, np.ones(ids.shape, np.bool_)) == [text]


def _hash(rows: Iterable[Any]) -> str:
  digest = hashlib.sha256()
  for row in rows:
    digest.update(json.dumps(row, sort_keys=True).encode("ascii") + b"\n")
  return digest.hexdigest()
