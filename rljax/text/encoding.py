"""Logged rows as ids, to be made into batches."""

import dataclasses
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from absl import logging

from rljax.text import batches, chats, forms, logged, tokens

Row = forms.Row


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
    notes: what the file holds, in lines.
  """

  encoded: Encoded
  lengths: tuple[int, int]
  present: np.ndarray
  skipped: list[str]
  settings: dict[str, Any]
  pad_id: int = 0
  notes: list[str] = dataclasses.field(default_factory=list)

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
  if join:
    rows = logged.joined(rows)
  encoded = prepare(tokenizer, rows, **settings)
  return Log(
    encoded=encoded,
    lengths=lengths(encoded),
    present=logged.present(encoded.rows),
    skipped=[*loaded.skipped, *encoded.skipped],
    notes=loaded.notes,
    settings=settings,
    pad_id=tokens.pad_id(tokenizer),
  )


def encode(
  tokenizer,
  rows: Sequence[Row],
  *,
  max_prompt_length: int,
  max_response_length: int,
  too_long: Literal["skip", "cut", "error"] = "skip",
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
        ids, apart = tokens.encode_response(tokenizer, row.prompt, whole, text)
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
  chats.report(encoded.skipped, len(encoded.rows), "rows cannot be encoded")
  return encoded


def prepare(
  tokenizer,
  rows: Sequence[Row],
  *,
  prompt_format: str,
  **limits: Any,
) -> Encoded:
  """Renders rows and turns them into ids; see `render` and `encode`.

  What either left out is in the result's `skipped`.
  """
  rows, refused = chats.render(rows, tokenizer, prompt_format)
  encoded = encode(tokenizer, rows, **limits)
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


def _decodes(tokenizer, ids: Sequence[int], text: str, largest_id: int) -> bool:
  if not ids or max(ids) > largest_id:
    return False
  ids = np.array([ids])
  return tokens.decode(tokenizer, ids, np.ones(ids.shape, np.bool_)) == [text]
