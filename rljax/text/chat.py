"""Chat templates: a policy is asked as its tokenizer writes messages.

The format of prompts is one text, so that it can be filed and compared:
"plain", "chat", or what `describe` makes of a system prompt and of variables.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from rljax.text import templates

Message = Mapping[str, str]

# A template may write this much more than it was given.
_MOST_CHARACTERS = 100_000


@dataclasses.dataclass(frozen=True)
class Template:
  """Holds how messages become a text.

  Attributes:
    tokenizer: whose chat template is taken.
    system_prompt: put in front of messages that have no system message; or "".
    options: variables of the template, such as enable_thinking.
  """

  tokenizer: Any
  system_prompt: str = ""
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def describe(
  prompt_format: str,
  *,
  system_prompt: str = "",
  options: Mapping[str, Any] | None = None,
) -> str:
  """Returns a format of prompts as one text, for `parse`.

  Args:
    prompt_format: "plain" or "chat".
    system_prompt: see `Template`, likewise `options`.
    options: values that `json` can write.

  Raises:
    ValueError: if there is more than a plain format has.
  """
  if not system_prompt and not options:
    return prompt_format
  if prompt_format == "plain":
    raise ValueError(
      "--system_prompt and --template_options belong to a chat template: they "
      "need --prompt_format=chat."
    )
  more = {"system_prompt": system_prompt, "options": dict(options or {})}
  return f"{prompt_format} {json.dumps(more, sort_keys=True)}"


def parse(prompt_format: str, tokenizer: Any) -> Template | None:
  """Reads what `describe` returns; None for "plain".

  Raises:
    ValueError: if it is neither plain nor chat, or the tokenizer has no
      template.
  """
  kind, _, more = prompt_format.partition(" ")
  if kind not in ("plain", "chat"):
    raise ValueError(
      f'--prompt_format must be "plain" or "chat", got {prompt_format!r}.'
    )
  if kind == "plain":
    return None
  if not getattr(tokenizer, "chat_template", None):
    raise ValueError(
      "The tokenizer has no chat template; use --prompt_format=plain."
    )
  return Template(tokenizer, **json.loads(more or "{}"))


def render(messages: Sequence[Message], template: Template) -> str:
  """Renders messages up to where the assistant begins.

  If the last message is the assistant's, the text ends in it, and the policy
  goes on.

  Args:
    messages: of `role` and `content`.
    template: from `parse`.

  Returns:
    What transformers' `apply_chat_template` returns.

  Raises:
    ValueError: as `templates.render`; or if the template leaves a message out,
      or writes without end.
  """
  messages = [dict(message) for message in messages]
  roles = [message["role"] for message in messages]
  if template.system_prompt and "system" not in roles:
    system = {"role": "system", "content": template.system_prompt}
    messages = [system, *messages]
  goes_on = roles[-1] == "assistant"
  text = templates.render(
    template.tokenizer,
    messages,
    add_generation_prompt=not goes_on,
    continue_final_message=goes_on,
    variables=template.options,
  )
  size = sum(len(message["content"]) for message in messages)
  if len(text) > 10 * size + _MOST_CHARACTERS:
    raise ValueError(
      f"the chat template wrote {len(text)} characters for messages of {size}"
    )
  written = "".join(text.split())
  for message in messages:
    # Templates shorten what the assistant said before, such as its thoughts.
    content = "".join(message["content"].split())
    if message["role"] != "assistant" and content not in written:
      raise ValueError(
        f"the chat template leaves out the message of the {message['role']}"
      )
  return text
