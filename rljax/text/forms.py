"""What a file holds, by its columns: rows of many origins as one kind of row.

A `Reader` recognises once what the rows of a file are, reads each as a `Row`,
and says what it has read, what it has not, and why. A row that cannot be used
is named and counted, never dropped silently.
"""

import collections
import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from rljax.text import asked, columns, dialogues

# The first rows of a file, by which it is decided what all of them are.
_NUM_DECIDING = 1000
# Share of them that must agree.
_MOST = 0.9


class Form(NamedTuple):
  """One of the forms that are read.

  Attributes:
    name: of its rows, in words.
    needs: columns that it is recognised by.
    takes: columns that are read beside these.
    says: what it looks like, for messages.
  """

  name: str
  needs: tuple[str, ...]
  takes: tuple[str, ...]
  says: str


# What others call the columns that are read.
_OTHER_NAMES = {
  "question": "prompt",
  "query": "prompt",
  "answer": "response",
  "output": "response",
  "responses": "candidates",
  "completions": "candidates",
  "scores": "rewards",
  "conversation": "messages",
  "dialogue": "messages",
}
_COMMON = ("prompt", "value", "advantage")
FORMS = {
  form.name: form
  for form in (
    Form(
      "pairs",
      ("chosen", "rejected"),
      (*_COMMON, *(name for names in columns.PAIR_SCORES for name in names)),
      "prompt, chosen, rejected; or chosen, rejected that begin alike",
    ),
    Form(
      "ranked replies",
      ("candidates",),
      (*_COMMON, "rewards", "finished"),
      "prompt, candidates, rewards",
    ),
    Form(
      "replies",
      ("response",),
      (*_COMMON, "reward", "response_ids", "finished"),
      "prompt, response, and reward where there is one",
    ),
    Form(
      "labelled completions",
      ("completion", "label"),
      (*_COMMON, "finished"),
      "prompt, completion, label (true or false)",
    ),
    Form(
      "completions",
      ("completion",),
      (*_COMMON, "reward", "finished"),
      "prompt, completion",
    ),
    Form("dialogues", ("messages",), (*_COMMON[1:], "reward"), "messages"),
    Form(
      "dialogues of ShareGPT",
      ("conversations",),
      (*_COMMON[1:], "reward", "system"),
      "conversations (from, value)",
    ),
    Form(
      "instructions",
      ("instruction", "output"),
      (*_COMMON[1:], "reward", "input", "system"),
      "instruction, input, output",
    ),
    Form("prompts", ("prompt",), (), "prompt alone, where none is learnt from"),
  )
}


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
    finished: K truth values, False where a reply was cut, so that no end token
      belongs behind it; empty if all replies are whole.
    dialogue: all messages, where a turn of the assistant before the last one
      can be learnt from, too; else None.
    num_asked: messages of the dialogue before the first such turn.
    form: name of what the row was read as.
    columns: all that the row of a file has but its prompt, which reward
      functions are given.
  """

  prompt: str | tuple[dialogues.Message, ...]
  candidates: tuple[str, ...]
  rewards: tuple[float, ...] | None
  value: float | None
  advantage: float | None
  place: str
  response_ids: tuple[int, ...] | None
  finished: tuple[bool, ...] = dataclasses.field(default=(), kw_only=True)
  dialogue: tuple[dialogues.Message, ...] | None = dataclasses.field(
    default=None, kw_only=True
  )
  num_asked: int = dataclasses.field(default=0, kw_only=True)
  form: str = dataclasses.field(default="", kw_only=True, compare=False)
  columns: Mapping[str, Any] = dataclasses.field(
    default_factory=dict, kw_only=True, compare=False
  )


class Decisions(NamedTuple):
  """What is decided once for all pairs of a file.

  Attributes:
    repeats: whether replies begin with the prompt of their row.
    transcripts: whether they are whole transcripts, beside a prompt.
    alike: whether the prompt is what the two begin with.
  """

  repeats: bool = False
  transcripts: bool = False
  alike: bool = False


@dataclasses.dataclass
class Reader:
  """Reads the rows of one file, and counts what it meets.

  Attributes:
    name: of the file.
    decisions: what all rows have in common.
    columns: how many rows have which column.
    forms: how many rows were read as which form.
    remarks: what else there is to say -> how often.
    skipped: one message for each row that cannot be used.
  """

  name: str
  decisions: Decisions = Decisions()
  columns: collections.Counter = dataclasses.field(
    default_factory=collections.Counter
  )
  forms: collections.Counter = dataclasses.field(
    default_factory=collections.Counter
  )
  remarks: collections.Counter = dataclasses.field(
    default_factory=collections.Counter
  )
  skipped: list[str] = dataclasses.field(default_factory=list)
  _answered: bool = True
  _read: Callable[..., Any] | None = None
  _reasons: collections.Counter = dataclasses.field(
    default_factory=collections.Counter
  )

  def read(
    self,
    placed: Iterable[tuple[str, Mapping[str, Any] | ValueError]],
    *,
    answered: bool = True,
    limit: int | None = None,
    read: Callable[..., Any] | None = None,
    needed: bool = True,
  ) -> list[Row]:
    """Reads rows, of which the first decide what all of them are.

    Args:
      placed: of `files.load_placed_rows`.
      answered: whether replies are needed; else prompts are.
      limit: most rows that are read.
      read: reads a row in place of `parse` or `ask`, and is called as they are.
      needed: whether it is an error if no row can be used.

    Returns:
      The rows that can be used.

    Raises:
      ValueError: if none can, with the columns and the forms that are read; or
        if a column must not be passed over.
    """
    self._read = read or (parse if answered else ask)
    self._answered = answered
    placed = iter(placed)
    head = [x for _, x in zip(range(_NUM_DECIDING), placed, strict=False)]
    self.decisions, notes = decide(
      row for _, row in head if not isinstance(row, ValueError)
    )
    self.remarks.update(notes)
    rows = self.more(itertools.chain(head, placed), limit=limit)
    if not rows and needed:
      raise ValueError(self._nothing("rows" if answered else "prompts"))
    return rows

  def more(
    self,
    placed: Iterable[tuple[str, Mapping[str, Any] | ValueError]],
    *,
    limit: int | None = None,
  ) -> list[Row]:
    """Reads rows by what `read` has decided.

    Args:
      placed: of `files.load_placed_rows`.
      limit: most rows that are read.

    Returns:
      The rows that can be used, of which there may be none.

    Raises:
      ValueError: if a column must not be passed over.
    """
    rows = []
    for place, row in placed:
      if limit is not None and len(rows) >= limit:
        return rows
      try:
        if isinstance(row, ValueError):
          raise row
        rows.append(self._one(row, place, self._read))
      except columns.WrongColumn:
        raise
      except ValueError as error:
        self.skipped.append(str(error))
        reason = str(error).removeprefix(place).lstrip(": ").rstrip(".")
        self._reasons[re.sub(r" \(.*", "", reason)] += 1
    return rows

  def _one(self, row, place, read):
    self.columns.update(name for name, x in row.items() if x is not None)
    found = read(row, place, self.decisions)
    if isinstance(found, Row):
      more = {name: row[name] for name in row if name != "prompt"}
      found = dataclasses.replace(found, columns=more)
    for name in ("prompt", "messages", "conversations", "completion", "chosen"):
      for key in dialogues.unread(row.get(name)):
        self.remarks[f'rows have messages with "{key}", which is not read'] += 1
    form = recognise(row)
    self.forms[form.name if form else "prompts"] += 1
    if form and form.needs[0] in ("messages", "conversations"):
      messages = row[form.needs[0]]
      last = messages[-1].get("role", messages[-1].get("from", ""))
      if getattr(found, "candidates", ()) and last in ("user", "human"):
        self.remarks["dialogues end with the user, whose turn is left out"] += 1
    return found

  def notes(self) -> list[str]:
    """Says in a line or two what the file holds."""
    num_used = sum(self.forms.values())
    total = num_used + len(self.skipped)
    forms = ", ".join(
      f"{name} ({FORMS[name].says})"
      + (f" in {count} rows" if len(self.forms) > 1 else "")
      for name, count in self.forms.most_common()
    )
    lines = [f"{self.name}: {num_used} of {total} rows are used, as {forms}."]
    read = {
      column
      for name in self.forms
      for column in (*FORMS[name].needs, *FORMS[name].takes)
    }
    unknown = [name for name in self.columns if name not in read]
    if unknown and not self._answered:
      lines.append(
        f"{self.name}: other columns, which reward functions are given: "
        f"{', '.join(unknown)}."
      )
    elif unknown:
      lines.append(f"{self.name}: columns not read: {', '.join(unknown)}.")
    if self.skipped:
      reasons = "; ".join(
        f"{reason} ({count})" for reason, count in self._reasons.most_common(3)
      )
      more = "; ..." if len(self._reasons) > 3 else ""
      lines.append(
        f"{self.name}: {len(self.skipped)} rows are left out: {reasons}{more}."
      )
    for remark, count in self.remarks.items():
      lines.append(f"{self.name}: {count} {remark}.")
    return lines

  def _nothing(self, what: str) -> str:
    """Says why nothing is left, and what could be read."""
    number = len(self.skipped)
    message = (
      f"No row is left: {number} of {number} {what} of {self.name} cannot be "
      f"used: {' '.join(self.skipped[:3])}"
    )
    if self.columns:
      message += f" Its columns are {', '.join(self.columns)}."
      known = {
        name for form in FORMS.values() for name in (*form.needs, *form.takes)
      }
      others = {
        name: _OTHER_NAMES.get(name.strip().lower(), name.strip().lower())
        for name in self.columns
        if name not in known
      }
      hints = [
        f'"{name}" to "{meant}"'
        for name, meant in others.items()
        if meant in (known if self._answered else ("prompt", "messages"))
        and meant not in self.columns
      ]
      if hints:
        message += f" Perhaps rename {', '.join(hints)}."
    says = "; ".join(form.says for form in FORMS.values())
    return f"{message} What is read: {says}."


def recognise(row: Mapping[str, Any]) -> Form | None:
  """Returns the form of a row, by the columns that are not null."""
  for form in FORMS.values():
    present = [row.get(name) is not None for name in form.needs]
    # Half a pair is a pair that lacks a side.
    if all(present) or (form.name == "pairs" and any(present)):
      return form
  return None


def decide(
  rows: Iterable[Mapping[str, Any]],
) -> tuple[Decisions, dict[str, int]]:
  """Decides what the pairs of a file have in common.

  Replies contain their prompt if nearly all pairs do, and nearly none inside of
  a word: "Hello" and "Hello! How can I help?" are a prompt and a whole reply.

  Args:
    rows: the first ones of a file.

  Returns:
    The decisions, and what there is to say of them -> how often.
  """
  asked, bare, replied = [], [], []
  for row in rows:
    reply, prompt = (
      row.get("response", row.get("completion")),
      row.get("prompt"),
    )
    if isinstance(reply, str) and isinstance(prompt, str):
      replied.append(columns.begins(prompt, reply))
    sides = row.get("chosen"), row.get("rejected")
    if all(isinstance(side, str) for side in sides):
      prompt = row.get("prompt")
      if isinstance(prompt, str):
        asked.append((prompt, *sides))
      elif prompt is None:
        bare.append(sides)
  notes = {}
  if replied and sum(replied) >= _MOST * len(replied):
    notes["replies begin with their prompt, and are left whole"] = sum(replied)
  num = sum(all(map(columns.begins, (p, p), sides)) for p, *sides in asked)
  # Up to the question alone, or up to where the assistant begins.
  whole = [
    all(map(dialogues.is_transcript, sides))
    and not prompt.rstrip().endswith(dialogues.ASSISTANT)
    for prompt, *sides in asked
  ]
  transcripts = bool(asked) and sum(whole) >= _MOST * len(asked)
  repeats = bool(asked) and not transcripts and num >= _MOST * len(asked)
  if transcripts:
    notes["pairs are whole transcripts, beside their prompt"] = sum(whole)
  elif repeats:
    notes["pairs begin with their prompt, which is taken off them"] = num
  elif num:
    notes[
      f"of {len(asked)} pairs begin with their prompt, and are left whole"
    ] = num
  alike = bool(bare) and not any(
    dialogues.ASSISTANT in side for sides in bare for side in sides
  )
  if alike:
    shared = sum(bool(columns.shared_beginning(*sides)) for sides in bare)
    alike = shared >= _MOST * len(bare)
    if alike:
      notes["pairs begin alike, and what they share is their prompt"] = shared
  return Decisions(repeats, transcripts, alike), notes


def parse(
  row: Mapping[str, Any], place: str, decisions: Decisions | None = None
) -> Row:
  """Reads one row, whose fields tell its form.

    prompt, response, reward                 a reply and its score
    prompt, response                         a reply
    prompt, candidates, rewards              K replies and their scores
    prompt, chosen, rejected                 replies, or messages whose last
                                             is the reply
    chosen, rejected                         transcripts of "\\n\\nHuman:" and
                                             "\\n\\nAssistant:" turns, or
                                             messages, that differ in the last
                                             turn; or texts that begin alike
    prompt, completion                       texts, or messages
    prompt, completion, label                the same, good (true) or bad
    messages                                 a dialogue
    conversations                            the same, as ShareGPT has it
    instruction, input, output               as Alpaca has them; the input
                                             stands below the instruction

  Each may have `value`, `advantage`, and beside `response` its `response_ids`,
  as `responses.records` writes them, and `finished`, which is false of a reply
  that was cut; a pair may have scores (`chosen_score`, `rejected_score` and the
  like). Prompts are texts or lists of messages. A reply is kept as it stands,
  with its paragraphs and the blank in front. A field that is null counts as
  missing, but a null reward is an error.

  Args:
    row: JSON values by field.
    place: of the row, for messages.
    decisions: of `decide`; None: as for a file of this row alone.

  Raises:
    ValueError: naming the place and what is wrong; a `columns.WrongColumn` for
      rewards under another name.
  """
  if decisions is None:
    decisions, _ = decide([row])
  form = recognise(row)
  row = {
    name: value
    for name, value in row.items()
    if value is not None or name in ("reward", "rewards")
  }
  try:
    if form is None or form.name == "prompts":
      raise ValueError(
        'it has none of "response", "candidates" and "chosen", nor another '
        "form of replies"
      )
    columns.check_names(row, form.name)
    read = columns.READERS[form.name]
    fields = read(row, decisions)
    for name in ("value", "advantage"):
      fields[name] = columns.number(row, name) if name in row else None
    return Row(
      **{
        "rewards": None,
        "place": place,
        "response_ids": columns.response_ids(row),
        "finished": columns.finished(row, fields["candidates"]),
        "form": form.name,
      }
      | fields
    )
  except columns.WrongColumn as error:
    raise columns.WrongColumn(f"{place}: {error}.") from error
  except ValueError as error:
    raise ValueError(f"{place}: {error}.") from error


def ask(
  row: Mapping[str, Any], place: str, decisions: Decisions | None = None
) -> Row:
  """Reads the prompt of a row of any form, answered or not.

  Args:
    row: JSON values by field; of a dialogue, all up to the last turn of the
      assistant is the prompt, or everything if the user has the last word.
    place: see `parse`; likewise `decisions`.
    decisions: see `parse`.

  Raises:
    ValueError: naming the place and what is wrong.
  """
  form = recognise(row)
  try:
    if row.get("prompt") is not None:
      return unanswered(row["prompt"], place)
    if form and form.needs[0] in ("messages", "conversations"):
      messages = columns.messages_of(row, form.needs[0])
      if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
      return unanswered(messages, place)
    if row.get("instruction") is not None:
      return unanswered(columns.instruction(row), place)
  except ValueError as error:
    text = str(error)
    raise ValueError(
      text if text.startswith(place) else f"{place}: {text}."
    ) from error
  if form is None:
    raise ValueError(f'{place}: "prompt" is missing.')
  return unanswered(parse(row, place, decisions).prompt, place)


def unanswered(prompt: Any, place: str) -> Row:
  """Makes a row without candidates of a prompt, and of what it remembers.

  Raises:
    ValueError: naming the place, if the prompt is no text and no messages.
  """
  known = asked.columns(prompt)
  try:
    prompt = columns.prompt_of(
      asked.given(prompt) if isinstance(prompt, asked.Prompt) else prompt
    )
  except ValueError as error:
    raise ValueError(f"{place}: {error}.") from error
  return Row(prompt, (), None, None, None, place, None, columns=known)


def digest(items: Iterable[Any]) -> str:
  """Hashes JSON values in order."""
  found = hashlib.sha256()
  for item in items:
    found.update(json.dumps(item, sort_keys=True).encode("ascii") + b"\n")
  return found.hexdigest()
