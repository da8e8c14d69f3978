"""Prompts as texts that remember the row they were read from.

A reward function is given the columns of the data beside prompts and responses.
A prompt takes its own along wherever it goes, so that two rows that ask the
same keep what differs between them, and nobody else needs to know of columns.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Row = dict[str, Any]
# Fields that say what a row of replies is: a column of this name stays out of
# the files of samples, which offline scripts read.
RESERVED = frozenset(
  (
    *("prompt", "response", "reward", "parts", "finished", "index", "sample"),
    *("response_ids", "log_probs", "truncated_log_probs", "policy_step"),
    *("temperature", "top_k", "top_p", "min_p", "step", "arm", "model", "seed"),
    *("candidates", "rewards", "chosen", "rejected", "value", "advantage"),
    *("completion", "completions", "messages", "conversations", "label"),
    *("instruction", "input", "output", "values", "is_correct", "start_value"),
  )
)


class Prompt(str):
  """The text of a prompt, with the row that it comes from.

  Attributes:
    given: the prompt as the row has it: a text, or messages of `role` and
      `content`. The text itself is then these in the chat template.
    columns: the row's other columns, by name.
  """

  __slots__ = ("columns", "given")

  def __new__(
    cls,
    text: str,
    given: str | Sequence[Mapping[str, str]] | None = None,
    columns: Mapping[str, Any] | None = None,
  ) -> "Prompt":
    """Makes the text; without `given` it is the prompt itself."""
    made = super().__new__(cls, text)
    made.given = text if given is None else given
    made.columns = dict(columns or {})
    return made

  def __reduce__(self):
    """Lets `pickle` and `copy` keep what the text remembers."""
    return Prompt, (str(self), self.given, self.columns)


def given(prompt: Any) -> Any:
  """Returns a prompt as its row has it: a plain text, or a list of messages."""
  found = prompt.given if isinstance(prompt, Prompt) else prompt
  if isinstance(found, str):
    return str(found)
  return [dict(message) for message in found]


def columns(prompt: Any) -> dict[str, Any]:
  """Returns the other columns of a prompt's row; none if nobody knows it."""
  return prompt.columns if isinstance(prompt, Prompt) else {}


def kept_columns(prompt: Any) -> dict[str, Any]:
  """Returns the columns that files of samples keep, see `RESERVED`."""
  return {k: v for k, v in columns(prompt).items() if k not in RESERVED}


def key(prompt: Any) -> str:
  """Returns a text that is the same for equal prompts, messages too."""
  found = given(prompt)
  return found if isinstance(found, str) else json.dumps(found, sort_keys=True)


def attach(rows: Iterable[Row], prompts: Iterable[Any]) -> list[Row]:
  """Gives rows of a file their prompts back, with what these remember.

  Args:
    rows: with `prompt`, a text or messages, as a file has them.
    prompts: those that a script knows. Of equal ones the first is taken.

  Returns:
    The rows; one whose prompt is unknown keeps it as it is.
  """
  known: dict[str, Any] = {}
  for prompt in prompts:
    known.setdefault(key(prompt), prompt)
  return [
    row | {"prompt": known.get(key(row["prompt"]), row["prompt"])}
    for row in rows
  ]
