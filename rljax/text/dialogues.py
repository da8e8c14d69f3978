"""Dialogues as messages: transcripts, lists of roles and contents, ShareGPT."""

import re
from collections.abc import Mapping
from typing import Any

Message = Mapping[str, str]

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
_ROLES = {"Human": "user", "Assistant": "assistant"}
MARKER = re.compile(r"(?:^|\n\n)(Human|Assistant):")
# Who speaks in ShareGPT's "from", as a role of a chat template.
_SPEAKERS = {
  "human": "user",
  "user": "user",
  "gpt": "assistant",
  "chatgpt": "assistant",
  "model": "assistant",
  "assistant": "assistant",
  "system": "system",
  "tool": "tool",
  "observation": "tool",
  "function_response": "tool",
}


# Keys of a message that calls tools, and who does so in ShareGPT.
_CALLS = ("tool_calls", "function_call")
# Keys of a message that are read.
_KEYS = ("role", "content", "from", "value", *_CALLS, "weight")


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
  before, *pieces = MARKER.split(transcript)
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


def is_transcript(text: str) -> bool:
  """Whether a text is a transcript in which the assistant has a turn."""
  before, *pieces = MARKER.split(text)
  return bool(pieces) and not before.strip() and ASSISTANT in text


def checked(value: Any, what: str) -> tuple[Message, ...]:
  """Returns messages with nothing but their roles and contents.

  Args:
    value: a list of messages of `role` and `content`, or of `from` and `value`
      as ShareGPT has them. A content may be a list of parts that are texts.
    what: the column, for messages.

  Raises:
    ValueError: if it is anything else, or has no content.
  """
  if not isinstance(value, (list, tuple)):
    raise ValueError(
      f"{what} must be a text or messages, got {type(value).__name__}"
    )
  messages = []
  for message in value:
    if not isinstance(message, Mapping):
      raise ValueError(f"a message of {what} is not an object")
    if any(message.get(name) for name in _CALLS):
      raise ValueError(f"a message of {what} calls a tool, which is not read")
    if message.get("weight") == 0:
      raise ValueError(
        f'a message of {what} has a "weight" of 0, which is not read: all '
        "turns of the assistant are learnt from"
      )
    if "from" in message and "role" not in message:
      message = _shared(message, what)
    content = message.get("content")
    if isinstance(content, (list, tuple)):
      message = {**message, "content": _joined(content, what)}
    messages.append(
      {
        name: text(message.get(name), f'"{name}" of a message of {what}')
        for name in ("role", "content")
      }
    )
  if not any(message["content"].strip() for message in messages):
    raise ValueError(f"{what} is empty")
  return tuple(messages)


def unread(value: Any) -> list[str]:
  """Returns the keys of messages that are passed over, each once."""
  messages = value if isinstance(value, (list, tuple)) else ()
  return list(
    dict.fromkeys(
      name
      for message in messages
      if isinstance(message, Mapping)
      for name, x in message.items()
      if x is not None and name not in _KEYS
    )
  )


def text(value: Any, what: str) -> str:
  """Returns a text that can be written as UTF-8, or raises ValueError."""
  if not isinstance(value, str):
    raise ValueError(f"{what} must be a text, got {type(value).__name__}")
  try:
    value.encode("utf-8")
  except UnicodeEncodeError as error:
    raise ValueError(f"{what} holds half a surrogate pair") from error
  return value


def _shared(message: Mapping[str, Any], what: str) -> dict[str, Any]:
  """Returns a message of ShareGPT with role and content."""
  speaker = message["from"]
  if speaker in _CALLS:
    raise ValueError(f"a message of {what} calls a tool, which is not read")
  if not isinstance(speaker, str) or speaker.lower() not in _SPEAKERS:
    raise ValueError(
      f'"from" of a message of {what} must be one of '
      f"{', '.join(_SPEAKERS)}, got {speaker!r:.40}"
    )
  return {"role": _SPEAKERS[speaker.lower()], "content": message.get("value")}


def _joined(parts: Any, what: str) -> str:
  """Returns the text of a content that is a list of parts."""
  found = []
  for part in parts:
    if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
      raise ValueError(f"a message of {what} has a part that is no text")
    found.append(part["text"])
  return "".join(found)
