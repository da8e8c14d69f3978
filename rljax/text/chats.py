"""Puts prompts into chat templates, and tells replies from what was asked."""

import dataclasses
from collections.abc import Sequence

from absl import logging

from rljax.text import asked, chat, dialogues, forms, templates

Row = forms.Row


class NoRowLeft(ValueError):
  """All rows were left out."""


def render(
  rows: Sequence[Row], tokenizer, prompt_format: str
) -> tuple[list[Row], list[str]]:
  """Renders prompts as a model is asked.

  Args:
    rows: logged rows.
    tokenizer: Hugging Face tokenizer, whose chat template "chat" uses.
    prompt_format: "plain" leaves texts as they are. "chat" puts messages, the
      turns of a transcript, or a plain text as the user's one turn into the
      chat template, up to where the assistant begins, and strips replies of the
      blanks around them; `chat.describe` adds a system prompt and variables.

  Returns:
    Rows whose prompts are texts, and a message for each that the template
    refuses, or that is rendered already. Their number and the first three are
    logged.

  Raises:
    ValueError: if a "plain" prompt is a list of messages; if the tokenizer
      has no chat template; or if no row is left.
  """
  template = chat.parse(prompt_format, tokenizer)
  rendered, skipped = [], []
  for row in rows:
    if template is None:
      if not isinstance(row.prompt, str):
        raise ValueError(
          f"{row.place}: the prompt is a list of messages; use "
          "--prompt_format=chat."
        )
      prompt = asked.Prompt(row.prompt, row.prompt, row.columns)
      rendered.append(dataclasses.replace(row, prompt=prompt))
      continue
    try:
      text = chat.render(_messages(row.prompt, tokenizer), template)
    except (ValueError, TypeError, KeyError) as error:
      reason = str(error).rstrip(".")
      skipped.append(f"{row.place}: no chat prompt ({reason}).")
      continue
    prompt = asked.Prompt(text, row.prompt, row.columns)
    candidates = tuple(candidate.strip() for candidate in row.candidates)
    rendered.append(
      dataclasses.replace(row, prompt=prompt, candidates=candidates)
    )
  report(skipped, len(rendered), "rows do not fit the chat template")
  return rendered, skipped


def render_prompts(
  prompts: Sequence[str],
  name: str,
  tokenizer,
  prompt_format: str,
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
  rows, skipped = render(
    [
      forms.unanswered(prompt, f"{name}, row {i}")
      for i, prompt in enumerate(prompts)
    ],
    tokenizer,
    prompt_format,
  )
  if skipped:
    raise ValueError(
      f"{len(skipped)} prompts do not fit the chat template: {skipped[0]}"
    )
  return [row.prompt for row in rows]


def spans(
  row: Row, template: chat.Template
) -> tuple[str, list[tuple[str, bool]]] | None:
  """Renders a dialogue, and tells the assistant's turns from the others.

  A turn of the assistant begins where the template asks for it, and ends with
  what the template puts behind it, without the blanks that follow.

  Args:
    row: with a `dialogue`.
    template: see `chat.parse`.

  Returns:
    The text before the first turn to learn from, and the texts behind it, each
    with whether it is one to learn from, the first and the last of them; or
    None, if the template writes earlier turns anew once others follow.
  """

  messages, num_asked = [dict(x) for x in row.dialogue], row.num_asked
  if template.system_prompt and messages[0]["role"] != "system":
    messages.insert(0, {"role": "system", "content": template.system_prompt})
    num_asked += 1

  def rendered(number, ask):
    return templates.render(
      template.tokenizer,
      messages[:number],
      add_generation_prompt=ask,
      variables=template.options,
    )

  whole = rendered(len(messages), False)
  places = []
  for i, message in enumerate(messages):
    if i < num_asked or message["role"] != "assistant":
      continue
    before, after = rendered(i, True), rendered(i + 1, False)
    if not (after.startswith(before) and whole.startswith(after)):
      return None
    places += [len(before), len(after.rstrip())]
  if places != sorted(places):
    return None
  cuts = zip(places, places[1:], strict=False)
  return whole[: places[0]], [
    (whole[start:end], i % 2 == 0) for i, (start, end) in enumerate(cuts)
  ]


# Helpers.


def _messages(
  prompt: str | tuple[dialogues.Message, ...], tokenizer
) -> list[dialogues.Message]:
  """Returns what a chat template takes."""
  if not isinstance(prompt, str):
    return [dict(message) for message in prompt]
  if prompt.startswith(tuple(tokenizer.all_special_tokens)):
    raise ValueError(
      "it already begins with a special token; use --prompt_format=plain"
    )
  before, *pieces = dialogues.MARKER.split(prompt)
  is_asked = prompt.rstrip().endswith(dialogues.ASSISTANT)
  if pieces and not before.strip() and is_asked:
    return dialogues.turns(prompt)
  return [{"role": "user", "content": prompt}]


def report(skipped: Sequence[str], num_left: int, what: str) -> None:
  """Logs what was skipped, and raises if that was everything."""
  if not skipped:
    return
  total = len(skipped) + num_left
  message = f"{len(skipped)} of {total} {what}: {' '.join(skipped[:3])}"
  if not num_left:
    raise NoRowLeft(f"No row is left: {message}")
  logging.warning("%s", message)
