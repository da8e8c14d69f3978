"""Keyword arguments given as texts, `name=value`."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def parse(pairs: Sequence[str]) -> dict[str, Any]:
  """Parses the `name=value` texts of a flag such as --task_options.

  Args:
    pairs: values that read as integers, numbers, "true" or "false" become
      such; others stay texts.

  Returns:
    Keyword arguments.

  Raises:
    ValueError: if a text has no "=", or a name comes twice.
  """
  found: dict[str, Any] = {}
  for pair in pairs:
    name, equals, text = pair.partition("=")
    if not equals or not name.isidentifier():
      raise ValueError(f"Expected name=value, got {pair!r}.")
    if name in found:
      raise ValueError(f"The option {name!r} is given twice.")
    found[name] = _value(text)
  return found


def check(function: Callable[..., Any], options: Mapping[str, Any]) -> None:
  """Raises ValueError for an option that a task's function does not take."""
  parameters = inspect.signature(function).parameters
  kinds = {p.kind for p in parameters.values()}
  known = [n for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY]
  for name in options:
    if name not in parameters and inspect.Parameter.VAR_KEYWORD not in kinds:
      raise ValueError(
        f"{function.__name__} of the task has no option {name!r}; it has "
        f"{', '.join(known) or 'none'}."
      )


def _value(text: str) -> Any:
  if text.lower() in ("true", "false"):
    return text.lower() == "true"
  for kind in (int, float):
    try:
      return kind(text)
    except ValueError:
      pass
  return text
