"""Reads the columns of each form, as a prompt, replies and numbers.

`forms` says which form a row has; here are the readers, from a row to the
fields of `forms.Row`. What is wrong with a row is a ValueError without its
place.
"""

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from rljax.text import dialogues

_LARGEST = float(np.finfo(np.float32).max)
# Names under which files hold the scores of a chosen and a rejected reply.
PAIR_SCORES = (
  ("chosen_score", "rejected_score"),
  ("score_chosen", "score_rejected"),
  ("chosen_reward", "rejected_reward"),
  ("reward_chosen", "reward_rejected"),
)
# Names under which others hold rewards, which nobody would miss if they were
# passed over.
_LIKE_REWARDS = (
  *("reward", "rewards", "score", "scores", "rating", "ratings"),
  *("label", "labels", "grade", "preference", "reward_score", "rm_score"),
)
_LIKE_PAIRS = re.compile(
  r"(chosen|rejected)[ _.-]?(rewards?|scores?|ratings?|labels?|grades?)"
  r"|(rewards?|scores?|ratings?|labels?|grades?)[ _.-]?(chosen|rejected)"
)


class WrongColumn(ValueError):
  """A column that would be passed over, and must not be."""


# Forms.


def _pair(row: Mapping[str, Any], decisions: Any) -> dict[str, Any]:
  """Reads a chosen and a rejected reply."""
  names = ("chosen", "rejected")
  sides = [_field(row, name) for name in names]
  prompt = prompt_of(row["prompt"]) if "prompt" in row else None
  is_text = all(isinstance(side, str) for side in sides)
  if prompt is None and is_text and decisions.alike:
    prompt = shared_beginning(*sides)
    if not prompt:
      raise ValueError('"chosen" and "rejected" do not begin alike')
    halves = [((), side[len(prompt) :]) for side in sides]
  elif isinstance(prompt, str) and is_text and decisions.repeats:
    for side, name in zip(sides, names, strict=True):
      if not begins(prompt, side):
        raise ValueError(
          f'"{name}" does not begin with the prompt, as the others do'
        )
    halves = [((), side[len(prompt) :]) for side in sides]
  elif isinstance(prompt, str) and is_text and decisions.transcripts:
    halves = [
      _last(side, n, has_prompt=False)
      for side, n in zip(sides, names, strict=True)
    ]
    for name, (context, _) in zip(names, halves, strict=True):
      if not _asks(context, prompt):
        raise ValueError(f'"{name}" does not continue the prompt')
    prompt = halves[0][0]
  else:
    prompt, halves = _with_context(row, prompt, sides, names)
  if halves[0][0] != halves[1][0]:
    raise ValueError('"chosen" and "rejected" differ before the last reply')
  candidates = tuple(
    _reply(reply, name) for (_, reply), name in zip(halves, names, strict=True)
  )
  if candidates[0] == candidates[1]:
    raise ValueError('"chosen" and "rejected" are the same')
  rewards = None
  for scores in PAIR_SCORES:
    if rewards is None and any(name in row for name in scores):
      rewards = tuple(number(row, name) for name in scores)
  return {"prompt": prompt, "candidates": candidates, "rewards": rewards}


def _with_context(row, prompt, sides, names):
  """Returns the prompt, and what stands before each reply with the reply."""
  halves = [
    _last(side, n, has_prompt=prompt is not None)
    for side, n in zip(sides, names, strict=True)
  ]
  if prompt is None:
    return prompt_of(halves[0][0]), halves
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
  return prompt, halves


def _last(value: Any, name: str, *, has_prompt: bool):
  """Returns what stands before the last reply, and the reply.

  Where the row has no prompt of its own, a text is a whole transcript.
  """
  if isinstance(value, str):
    if has_prompt:
      return (), value
    before, marker, reply = value.rpartition(dialogues.ASSISTANT)
    if not before.strip():
      raise ValueError(
        f'"prompt" is missing, and "{name}" has no '
        f"{json.dumps(dialogues.ASSISTANT)} after a question"
      )
    if dialogues.HUMAN in reply:
      raise ValueError(f'"{name}" does not end in a reply')
    return before + marker, reply
  messages = dialogues.checked(value, f'"{name}"')
  if messages[-1]["role"] != "assistant":
    raise ValueError(f'"{name}" does not end in a reply of the assistant')
  return messages[:-1], messages[-1]["content"]


def _ranked(row: Mapping[str, Any], decisions: Any) -> dict[str, Any]:
  """Reads lists of replies and rewards."""
  del decisions
  prompt = prompt_of(_field(row, "prompt"))
  candidates, rewards = row["candidates"], _field(row, "rewards")
  for name, value in (("candidates", candidates), ("rewards", rewards)):
    if not isinstance(value, (list, tuple)) or not value:
      raise ValueError(f'"{name}" must be a list that is not empty')
  if len(candidates) != len(rewards):
    raise ValueError(
      f"there are {len(candidates)} candidates, but {len(rewards)} rewards"
    )
  return {
    "prompt": prompt,
    "candidates": tuple(
      _reply(text, f"candidates[{i}]") for i, text in enumerate(candidates)
    ),
    "rewards": tuple(
      _finite(x, f"rewards[{i}]") for i, x in enumerate(rewards)
    ),
  }


def _replied(row: Mapping[str, Any], decisions: Any) -> dict[str, Any]:
  """Reads a prompt and a response."""
  del decisions
  return {
    "prompt": prompt_of(_field(row, "prompt")),
    "candidates": (_reply(row["response"], "response"),),
    "rewards": _reward(row),
  }


def _completed(row: Mapping[str, Any], decisions: Any) -> dict[str, Any]:
  """Reads a prompt and a completion, a text or messages, and its label."""
  del decisions
  prompt, completion = prompt_of(_field(row, "prompt")), row["completion"]
  rewards = _reward(row)
  if "label" in row:
    rewards = (float(_label(row["label"])),)
  if isinstance(completion, str):
    candidates = (_reply(completion, "completion"),)
    return {"prompt": prompt, "candidates": candidates, "rewards": rewards}
  asked = prompt
  if isinstance(prompt, str):
    asked = ({"role": "user", "content": prompt},)
  messages = dialogues.checked(completion, '"completion"')
  return _dialogue((*asked, *messages), "completion", len(asked)) | {
    "rewards": rewards
  }


def _label(value: Any) -> bool:
  """Returns whether a label is true; a text may say so, as in a .csv file."""
  if isinstance(value, str) and value.strip().lower() in ("true", "false"):
    return value.strip().lower() == "true"
  if value in (True, False):  # 1 and 0 as well.
    return bool(value)
  what = "the text " if isinstance(value, str) else ""
  raise ValueError(
    f'"label" must be true or false, got {what}{value!r:.20}'
    + ("" if what else '; a number is called "reward"')
  )


def _dialogues(name: str) -> Callable[..., dict[str, Any]]:
  """Makes what reads a column of messages."""

  def read(row: Mapping[str, Any], decisions: Any) -> dict[str, Any]:
    del decisions
    messages = messages_of(row, name)
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
      raise ValueError(f'"{name}" has no reply of the assistant')
    return _dialogue(messages, name, roles.index("assistant")) | {
      "rewards": _reward(row)
    }

  return read


def _dialogue(
  messages: tuple[dialogues.Message, ...], name: str, num_asked: int
) -> dict[str, Any]:
  """Makes a row of a dialogue, up to its last reply."""
  replies = [
    i
    for i, message in enumerate(messages)
    if message["role"] == "assistant" and i >= num_asked
  ]
  if not replies:
    raise ValueError(f'"{name}" has no reply of the assistant')
  if not num_asked:
    raise ValueError(f'"{name}" begins with the assistant')
  for i in replies:
    _reply(messages[i]["content"], name)
  last = replies[-1]
  found = {
    "prompt": messages[:last],
    "candidates": (messages[last]["content"],),
  }
  if len(replies) > 1:
    found |= {"dialogue": messages[: last + 1], "num_asked": num_asked}
  return found


def messages_of(row: Mapping[str, Any], name: str):
  """Returns the messages of a column, behind those of the system."""
  messages = dialogues.checked(row[name], f'"{name}"')
  system = row.get("system")
  if name == "conversations" and isinstance(system, str) and system.strip():
    return ({"role": "system", "content": system}, *messages)
  return messages


def _instructed(row: Mapping[str, Any], decisions: Any) -> dict[str, Any]:
  """Reads an instruction with its input, and the output."""
  del decisions
  return {
    "prompt": instruction(row),
    "candidates": (_reply(row["output"], "output"),),
    "rewards": _reward(row),
  }


def instruction(row: Mapping[str, Any]):
  """Returns the prompt that an instruction and its input are."""
  prompt = dialogues.text(row["instruction"], '"instruction"')
  if not prompt.strip():
    raise ValueError('"instruction" is empty')
  given = row.get("input")
  if given is not None and dialogues.text(given, '"input"').strip():
    prompt = f"{prompt}\n\n{given}"
  system = row.get("system")
  if system is not None and dialogues.text(system, '"system"').strip():
    return (
      {"role": "system", "content": system},
      {"role": "user", "content": prompt},
    )
  return prompt


READERS = {
  "pairs": _pair,
  "ranked replies": _ranked,
  "replies": _replied,
  "labelled completions": _completed,
  "completions": _completed,
  "dialogues": _dialogues("messages"),
  "dialogues of ShareGPT": _dialogues("conversations"),
  "instructions": _instructed,
}


# Helpers.


def check_names(row: Mapping[str, Any], form: str) -> None:
  """Raises WrongColumn for rewards that would be passed over."""
  if form in ("replies", "completions") and "reward" not in row:
    for name in row:
      if str(name).lower() in _LIKE_REWARDS:
        hint = ""
        if name == "label":
          hint = '; a label of true or false goes with "completion"'
        raise WrongColumn(
          f'the column "{name}" is not read: the reward of a reply is called '
          f'"reward"{hint}'
        )
  if form == "ranked replies" and "rewards" not in row:
    for name in row:
      if str(name).lower() in _LIKE_REWARDS:
        raise WrongColumn(
          f'the column "{name}" is not read: the rewards of candidates are '
          'called "rewards"'
        )
  if form == "pairs":
    known = {name for names in PAIR_SCORES for name in names}
    for name in row:
      if name not in known and _LIKE_PAIRS.fullmatch(str(name).lower()):
        if any(other in row for other in known):
          continue  # They are read, and this is another.
        side = "chosen" if "chosen" in name.lower() else "rejected"
        raise WrongColumn(
          f'the column "{name}" is not read: the scores of a pair are called '
          f'"chosen_score" and "rejected_score" (here "{side}_score")'
        )


def begins(prompt: str, text: str) -> bool:
  """Whether a text begins with a prompt, which does not end inside a word."""
  if not prompt or not text.startswith(prompt):
    return False
  following = text[len(prompt) :]
  if not following:
    return False
  return following[0].isspace() or not prompt[-1].isalnum()


def shared_beginning(first: str, second: str) -> str:
  """Returns the whole words that two texts begin with, without the last blank.

  Raises nothing: it is empty if they share none.
  """
  shared = os.path.commonprefix([first, second])
  # A word that one of them continues is no longer shared.
  cut = max((i for i, c in enumerate(shared) if c.isspace()), default=0)
  return shared[:cut].rstrip()


def _asks(context: str, prompt: str) -> bool:
  """Whether a transcript up to its last reply asks what a prompt does."""
  asked = dialogues.turns(context)
  return prompt.strip() in (
    *(context.strip(), context.removesuffix(dialogues.ASSISTANT).strip()),
    *(asked[0]["content"], asked[-1]["content"]),
  )


def _field(row: Mapping[str, Any], name: str) -> Any:
  if name not in row:
    raise ValueError(f'"{name}" is missing')
  return row[name]


def _reply(value: Any, name: str) -> str:
  if not dialogues.text(value, f'"{name}"').strip():
    raise ValueError(f'"{name}" is empty')
  return value


def prompt_of(value: Any) -> str | tuple[dialogues.Message, ...]:
  if isinstance(value, str):
    if not dialogues.text(value, '"prompt"').strip():
      raise ValueError('"prompt" is empty')
    return value
  return dialogues.checked(value, '"prompt"')


def _reward(row: Mapping[str, Any]) -> tuple[float] | None:
  return (number(row, "reward"),) if "reward" in row else None


def number(row: Mapping[str, Any], name: str) -> float:
  return _finite(_field(row, name), name)


def _finite(value: Any, name: str) -> float:
  try:
    is_finite = not isinstance(value, bool) and abs(value) <= _LARGEST
  except (TypeError, OverflowError):
    is_finite = False
  if not is_finite:
    found = repr(value)
    found = found if len(found) <= 20 else f"{found[:20]}..."
    raise ValueError(f'"{name}" must be a finite number, got {found}')
  return float(value)


def finished(
  row: Mapping[str, Any], candidates: Sequence[str]
) -> tuple[bool, ...]:
  """Returns which replies are whole; nothing if all are."""
  found = row.get("finished", True)
  if isinstance(found, bool):
    found = [found] * len(candidates)
  if (
    not isinstance(found, (list, tuple))
    or len(found) != len(candidates)
    or not all(isinstance(x, bool) for x in found)
  ):
    raise ValueError(
      f'"finished" must be true or false, got {found!r:.40}, for '
      f"{len(candidates)} replies"
    )
  return () if all(found) else tuple(found)


def response_ids(row: Mapping[str, Any]) -> tuple[int, ...] | None:
  if "response" not in row or "response_ids" not in row:
    return None
  ids = row["response_ids"]
  if not isinstance(ids, (list, tuple)) or not all(
    type(token) is int and token >= 0 for token in ids
  ):
    raise ValueError('"response_ids" must be a list of ids')
  return tuple(ids)
