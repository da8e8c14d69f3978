"""Logged rows as ids, to be made into batches."""

import collections
import dataclasses
import functools
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from absl import logging

from rljax.text import (
  batches,
  chat,
  chats,
  end_tokens,
  forms,
  logged,
  splits,
  tokens,
  vocabularies,
)

Row = forms.Row

# What is counted -> of what, and what is said of it.
_COUNTED = (
  ("apart", "replies", "responses were encoded apart from prompts"),
  ("anew", "logged", "responses differ from their ids: encoded anew"),
  (
    "inexact",
    "replies",
    "responses do not decode, behind their prompts, to their texts",
  ),
  ("ends", "replies", "responses have an end token before their end"),
  ("open", "replies", "responses were cut, and get no end token"),
  (
    "changed",
    "prompts",
    "dialogues are written anew by the chat template: their last turn alone is "
    "learnt from",
  ),
  ("prompts_cut", "prompts", "prompts were cut on the left"),
  ("cut", "replies", "responses were cut, and lost their end token"),
)


@dataclasses.dataclass(frozen=True)
class Encoded:
  """Holds N rows as ids.

  Attributes:
    prompt_ids: N lists of ids.
    response_ids: per row, per candidate, a list of ids.
    rows: the N rows that they belong to.
    skipped: one message per row that was too long.
    learnt: per row, which tokens of its only response are learnt from; None
      where all are.
    notes: what was done to texts, in lines.
  """

  prompt_ids: list[list[int]]
  response_ids: list[list[list[int]]]
  rows: list[Row]
  skipped: list[str]
  learnt: list[list[bool] | None] = dataclasses.field(
    default_factory=list, kw_only=True
  )
  notes: list[str] = dataclasses.field(default_factory=list, kw_only=True)


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
    notes: what the file holds, in lines.
    is_held_out: `[N]` bool, which rows are not learnt from; None: all are.
  """

  encoded: Encoded
  lengths: tuple[int, int]
  present: np.ndarray
  skipped: list[str]
  settings: dict[str, Any]
  pad_id: int = 0
  notes: list[str] = dataclasses.field(default_factory=list)
  is_held_out: np.ndarray | None = None

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
    notes: what the files hold, in lines.
  """

  train: Encoded
  held_out: Encoded
  skipped: list[str]
  counts: dict[str, int]
  notes: list[str]


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
  eval_data: str = "",
  eval_share: float = 0.0,
  join: bool = False,
  **settings: Any,
) -> Log:
  """Reads a log and encodes it.

  Args:
    tokenizer: Hugging Face fast tokenizer with an end token.
    name: of a file, see `logged.load`; empty for the task's own log.
    task: module with `logged`, where no file is named.
    seed: of the task's draw.
    task_options: keyword arguments of the task's `logged`.
    split: of the file or the task.
    first_row: rows before it are passed over.
    num_rows: how many are taken from there on; 0 for all.
    eval_data: a file whose rows are added, to be held out.
    eval_share: share of the different prompts that is held out, where there is
      no such file; 0 for none.
    join: whether scored replies to one prompt become one row, see
      `logged.joined`.
    **settings: of `prepare`: `prompt_format`, `max_prompt_length`,
      `max_response_length` and `too_long`.

  Raises:
    ValueError: as `logged.load_or_draw` and `prepare`.
  """
  loaded = logged.load_or_draw(
    name,
    task,
    split,
    seed,
    task_options or {},
    limit=num_rows and first_row + num_rows,
  )
  rows = loaded.rows[first_row:][: num_rows or None]
  rows = logged.joined(rows) if join else rows
  held_out = []
  if eval_data:
    other = logged.load(eval_data, "validation")
    held_out, rows = other.rows, splits.without(rows, other.rows)
    held_out = logged.joined(held_out) if join else held_out
    loaded.skipped.extend(other.skipped)
    loaded.notes.extend(other.notes)
  encoded = prepare(tokenizer, [*rows, *held_out], **settings)
  is_held_out = np.zeros(len(encoded.rows), bool)
  if held_out:
    places = {row.place for row in held_out}
    is_held_out[:] = [row.place in places for row in encoded.rows]
  elif eval_share:
    asked = [row.prompt for row in encoded.rows]
    is_held_out = splits.held_out(asked, eval_share, seed=seed)
  return Log(
    encoded=encoded,
    lengths=lengths(encoded),
    present=logged.present(encoded.rows),
    skipped=[*loaded.skipped, *encoded.skipped],
    notes=[*loaded.notes, *encoded.notes],
    is_held_out=is_held_out,
    settings=settings,
    pad_id=vocabularies.pad_id(tokenizer),
  )


def examples(
  tokenizer: Any, *split: Any, settings: dict[str, Any], **options: Any
) -> Split:
  """Reads the first replies of rows, and all turns of dialogues, to learn from.

  Args:
    tokenizer: of the policy.
    *split: of `splits.rows`.
    settings: keyword arguments of `prepare`.
    **options: of `splits.rows`.

  Raises:
    ValueError: as `splits.rows` and `prepare`.
  """
  left, apart, known = splits.rows(*split, **options)
  train, test = (
    prepare(tokenizer, logged.first_replies(part), all_turns=True, **settings)
    for part in (left, apart)
  )
  skipped = [*known.skipped, *train.skipped, *test.skipped]
  counts = {"rows to learn from": len(train.rows), "held out": len(test.rows)}
  notes = [*known.notes, *train.notes]
  return Split(train, test, skipped, counts, notes)


def encode(
  tokenizer,
  rows: Sequence[Row],
  *,
  max_prompt_length: int,
  max_response_length: int,
  too_long: Literal["skip", "cut", "error"] = "skip",
  end_id: int | None = None,
  template: chat.Template | None = None,
  assistant_only: bool = True,
) -> Encoded:
  """Turns rows into ids; responses end in the end token, unless they were cut.

  Prompts and responses get the ids that `tokens.encode_pairs` gives them. The
  `response_ids` of a rollout are used as they were drawn if they decode to
  their response; otherwise, as under another tokenizer, the text is encoded.
  A reply that ends in the text of an end token has it once in its ids, and no
  longer in the row that is left.

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
    template: by which dialogues are rendered, of which all turns of the
      assistant are learnt from; None: the last one alone.
    assistant_only: False learns from whole texts: the prompt is then their
      first token, and the response everything behind it.

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
  encoded = Encoded([], [], [], [])
  rows, prompts = _encode_prompts(tokenizer, rows, encoded.skipped)
  counts = collections.Counter({"prompts": len(rows)})
  for row, whole in zip(rows, prompts, strict=True):
    try:
      if template is not None and row.dialogue is not None:
        found = _dialogue(template, row, whole, counts, end_id=end_id)
        whole, responses, learnt = found
      else:
        responses = _responses(tokenizer, row, whole, counts, end_id=end_id)
        learnt = None
    except ValueError as error:  # A tokenizer of a few words.
      encoded.skipped.append(f"{row.place}: {error}")
      continue
    counts["replies"] += len(responses)
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
    is_learnt = learnt is None or any(learnt[:max_response_length])
    if assistant_only and not is_learnt:
      encoded.skipped.append(f"{row.place}: nothing is left to learn from.")
      continue
    counts["prompts_cut"] += prompt != whole
    counts["cut"] += sum(a != b for a, b in zip(cut, responses, strict=True))
    if not assistant_only:
      cut = [prompt[1:] + ids for ids in cut]
      prompt, learnt = prompt[:1], None
    encoded.prompt_ids.append(prompt)
    encoded.response_ids.append(cut)
    encoded.learnt.append(learnt and learnt[:max_response_length])
    encoded.rows.append(_without_ends(tokenizer, row))
  for name, of, what in _COUNTED:
    if counts[name]:
      encoded.notes.append(f"{counts[name]} of {counts[of]} {what}.")
      logging.warning("%s", encoded.notes[-1])
  chats.report(encoded.skipped, len(encoded.rows), "rows cannot be encoded")
  return encoded


def prepare(
  tokenizer,
  rows: Sequence[Row],
  *,
  prompt_format: str,
  all_turns: bool = False,
  **limits: Any,
) -> Encoded:
  """Renders rows and turns them into ids; see `render` and `encode`.

  With `all_turns`, all turns of the assistant in a dialogue are learnt from,
  rather than the last one.

  In a chat, responses end in the token by which the template ends a turn.

  What either left out is in the result's `skipped`.
  """
  rows, refused = chats.render(rows, tokenizer, prompt_format)
  template = chat.parse(prompt_format, tokenizer)
  end_id = end_tokens.end_id(tokenizer, prompt_format)
  if template and all_turns:
    limits["template"] = template
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


def counts(encoded: Encoded) -> tuple[np.ndarray, np.ndarray]:
  """Counts the tokens of prompts and replies.

  Args:
    encoded: N rows of up to K replies.

  Returns:
    `[N]` int and `[N, K + 1]` int, 0 where there is no reply, as in the last
    column.
  """
  replies = [[len(ids) for ids in row] for row in encoded.response_ids]
  found = np.zeros((len(replies), max(map(len, replies), default=0) + 1), int)
  for row, sizes in zip(found, replies, strict=True):
    row[: len(sizes)] = sizes
  return np.array([len(ids) for ids in encoded.prompt_ids], int), found


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
    if field.name not in ("skipped", "notes")
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
    `[B, T]`, and `learnt_mask` if only some tokens are learnt from; see
    `batches.supervised_batch`.
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
  if any(learnt is not None for learnt in encoded.learnt):
    # Of all batches alike, so that they have one structure.
    pairs = [
      (*pair, encoded.learnt[row] or [True] * len(pair[1]))
      if pair[1]
      else (*pair, [])
      for pair, row in zip(pairs, rows, strict=True)
    ]
  return batches.supervised_batch(
    pairs,
    prompt_length=prompt_length,
    response_length=response_length,
    pad_id=pad_id,
  )


def fingerprint_ids(encoded: Encoded) -> str:
  """Hashes ids in order, which depend on the tokenizer and the limits too."""
  return forms.digest(
    zip(encoded.prompt_ids, encoded.response_ids, strict=True)
  )


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


def _responses(tokenizer, row, prompt_ids, counts, *, end_id):
  """Returns the ids of a row's replies, and counts what they are like."""
  responses = []
  for i, text in enumerate(row.candidates):
    if i == 0 and row.response_ids is not None:
      counts["logged"] += 1
      if _decodes(tokenizer, row.response_ids, text):
        responses.append(list(row.response_ids))
        continue
      counts["anew"] += 1
    found = tokens.encode_response(
      tokenizer,
      row.prompt,
      prompt_ids,
      text,
      finished=not row.finished or row.finished[i],
      end_id=end_id,
    )
    counts["apart"] += found.is_apart
    counts["inexact"] += not found.is_exact
    counts["ends"] += found.num_ends > 0
    counts["open"] += bool(row.finished) and not row.finished[i]
    responses.append(found.ids)
  return responses


def _dialogue(template, row, prompt_ids, counts, *, end_id):
  """Returns a prompt, a response of several turns, and what of it is learnt."""
  tokenizer, spans = template.tokenizer, chats.spans(row, template)
  if spans is None:
    counts["changed"] += 1
    responses = _responses(tokenizer, row, prompt_ids, counts, end_id=end_id)
    return prompt_ids, responses, None
  prompt, parts = spans
  (prompt_ids,) = tokens.encode_prompts(
    tokenizer, [prompt], max_length=sys.maxsize
  )
  text, ids, learnt = prompt, list(prompt_ids), []
  for i, (part, is_learnt) in enumerate(parts):
    is_last = i == len(parts) - 1
    if is_learnt:
      found = tokens.encode_response(
        tokenizer, text, ids, part, finished=is_last, end_id=end_id
      )
      part_ids, counts["ends"] = found.ids, counts["ends"] + found.num_ends
    else:
      part_ids, _, _ = tokens.encode_further(tokenizer, text, ids, part)
    text += part
    ids += part_ids
    learnt += [is_learnt] * len(part_ids)
  return prompt_ids, [ids[len(prompt_ids) :]], learnt


def _without_ends(tokenizer, row: Row) -> Row:
  """Returns a row without the texts of end tokens behind its replies."""
  bare = tuple(
    end_tokens.without_end(tokenizer, text)[0] for text in row.candidates
  )
  if bare == row.candidates:
    return row
  return dataclasses.replace(row, candidates=bare)


@functools.lru_cache(8)
def _largest_id(tokenizer, size: int) -> int:
  """Returns the largest id of a tokenizer with so many tokens."""
  del size
  return max(tokenizer.get_vocab().values())


def _decodes(tokenizer, ids: Sequence[int], text: str) -> bool:
  """Whether drawn ids decode to a text, by themselves or behind a prompt."""
  if not ids or max(ids) > _largest_id(tokenizer, len(tokenizer)):
    return False
  ids = np.array([ids])
  mask = np.ones(ids.shape, np.bool_)
  return any(
    tokens.decode(tokenizer, ids, mask, behind=behind) == [text]
    for behind in (False, True)
  )
