"""Turns the docstrings of rljax into reStructuredText for the site.

A docstring has paragraphs, indented blocks (equations, tables, commands) and
sections such as "Args:". Backticks hold code. Everything else is plain text,
in which reStructuredText would find markup that nobody meant: `π_ref_`, `|x|`.
"""

import ast
import copy
import functools
import re
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

_SECTION = re.compile(
  r"(Args|Attributes|Returns|Yields|Raises|Sources?|Departures|Examples?):"
)
_ITEM = re.compile(r"(\*{0,2}[\w.]+(?:, \*{0,2}[\w.]+)*): ?(.*)")
_BULLET = re.compile(r"(- |\d+\. )")
_FIELDS = {"Returns": ":returns:", "Yields": ":yields:"}
_INDENT = 4


def to_rst(lines: Sequence[str]) -> list[str]:
  """Converts a docstring without its common indentation.

  Args:
    lines: the docstring, line by line.

  Returns:
    Lines of reStructuredText that show the same text.
  """
  result: list[str] = []
  for section, body in _sections(lines):
    body = textwrap.dedent("\n".join(body)).split("\n") if section else body
    if section is None:
      result += _blocks(body)
    elif section in _FIELDS:
      result += [_FIELDS[section], *_indented(_blocks(body))]
    elif section in ("Args", "Raises"):
      field = "param" if section == "Args" else "raises"
      for name, text in _items(body):
        result += [f":{field} {_escaped(name)}:", *_indented(_blocks(text))]
    else:
      result += [f".. rubric:: {section}", ""]
      if section == "Attributes":
        for name, text in _items(body):
          result += [f"``{name}``", *_indented(_blocks(text))]
      else:
        result += _blocks(body)
    if result and result[-1]:
      result.append("")
  return result


def signature(name: str, module: Any) -> tuple[str, str] | None:
  """Reads arguments and the returned type as the source writes them.

  Sphinx would show what the names of types stand for, such as the six types
  of an Array, and objects by their address in memory.

  Args:
    name: full name of a function, a method or a class.
    module: which it is defined in.

  Returns:
    "(x: Array, *, axis: int)" and "Array", either may be empty; or None for
    what is not in the source of the module, or has no signature of its own.
  """
  node = _definitions(module.__file__).get(
    name.removeprefix(f"{module.__name__}.")
  )
  if isinstance(node, ast.ClassDef):
    return _class_signature(node)
  if not isinstance(node, ast.FunctionDef):
    return None
  return f"({_arguments(node)})", ast.unparse(node.returns or ast.Name(""))


@functools.cache
def _definitions(path: str) -> dict[str, ast.stmt]:
  """Functions, classes and methods of a file: "Class.method" to its node."""
  with open(path, encoding="utf-8") as file:
    top = ast.parse(file.read()).body
  found = {}
  for node in top:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
      found[node.name] = node
    if isinstance(node, ast.ClassDef):
      for item in node.body:
        if isinstance(item, ast.FunctionDef):
          found[f"{node.name}.{item.name}"] = item
  return found


def _class_signature(node: ast.ClassDef) -> tuple[str, str] | None:
  fields = []
  for item in node.body:
    if isinstance(item, ast.FunctionDef) and item.name == "__init__":
      return f"({_arguments(item)})", ""
    if isinstance(item, ast.AnnAssign) and "ClassVar" not in ast.unparse(item):
      fields.append(ast.unparse(item))
  return (f"({', '.join(fields)})", "") if fields else None


def _arguments(node: ast.FunctionDef) -> str:
  arguments = copy.deepcopy(node.args)
  for group in (arguments.posonlyargs, arguments.args):
    if group and group[0].arg in ("self", "cls"):
      del group[0]
  return ast.unparse(arguments)


def _sections(
  lines: Sequence[str],
) -> Iterator[tuple[str | None, list[str]]]:
  """The text before the first section, under None, and every section."""
  section: str | None = None
  body: list[str] = []
  for line in lines:
    found = _SECTION.match(line)
    # A section begins on a line of its own, or goes on behind its colon.
    if found and (line == found[0] or found[1] in ("Source", "Departures")):
      yield section, body
      section, rest = found[1], line[found.end() :].strip()
      body = [f"  {rest}"] if rest else []
    elif section and line and not line.startswith(" "):
      # Continues "Source: ..." without an indentation.
      body.append(f"  {line}")
    else:
      body.append(line)
  yield section, body


def _items(lines: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
  """Names and texts of "name: text" entries, at no indentation."""
  name, text = None, []
  for line in lines:
    found = _ITEM.match(line)
    if found:
      if name is not None:
        yield name, _dedented(text)
      name, text = found[1], [found[2]]
    else:
      text.append(line)
  if name is not None:
    yield name, _dedented(text)
  elif text:
    yield "", _dedented(text)


def _dedented(text: list[str]) -> list[str]:
  """Aligns the lines behind the first one with it."""
  rest = textwrap.dedent("\n".join(text[1:])).split("\n")
  return [text[0], *rest]


def _blocks(lines: Sequence[str]) -> list[str]:
  """Paragraphs, lists and indented blocks, the latter kept as they stand."""
  result: list[str] = []
  for is_literal, block in _runs(lines):
    if is_literal:
      result += [".. code-block:: text", "", *_indented(block, end=False)]
    elif _BULLET.match(block[0]):
      for item in _bullets(block):
        marker = _BULLET.match(item[0])[0]
        text = " ".join([item[0][len(marker) :], *map(str.strip, item[1:])])
        result.append(f"{marker}{_escaped(text)}")
    else:
      result.append(_escaped(" ".join(block)))
    result.append("")
  return result


def _runs(lines: Sequence[str]) -> Iterator[tuple[bool, list[str]]]:
  """Splits lines into paragraphs (False) and indented blocks (True)."""
  run: list[str] = []
  is_literal = False
  for line in [*lines, "."]:  # The full stop ends the last run.
    starts_indented = line.startswith(" ")
    in_list = bool(run) and not is_literal and _BULLET.match(run[0])
    if not line.strip():
      if run and not is_literal:
        yield False, run
        run = []
      elif run:
        run.append("")  # Inside of an indented block, perhaps.
    elif run and starts_indented != is_literal and not in_list:
      yield is_literal, _stripped(run)
      run, is_literal = [line], starts_indented
    else:
      if not run:
        is_literal = starts_indented
      run.append(line)
  run = run[:-1] if run and run[-1] == "." else run
  if _stripped(run):
    yield is_literal, _stripped(run)


def _stripped(run: list[str]) -> list[str]:
  while run and not run[-1]:
    run = run[:-1]
  return textwrap.dedent("\n".join(run)).split("\n") if run else run


def _bullets(lines: Sequence[str]) -> Iterator[list[str]]:
  item: list[str] = []
  for line in lines:
    if _BULLET.match(line) and item:
      yield item
      item = []
    item.append(line)
  yield item


def _indented(lines: Sequence[str], *, end: bool = True) -> list[str]:
  lines = [" " * _INDENT + line if line else "" for line in lines]
  return [*lines, ""] if end and (not lines or lines[-1]) else lines


def _escaped(text: str) -> str:
  """Code in double backticks; outside of it nothing is markup."""
  pieces = text.split("`")
  if len(pieces) % 2 == 0:  # A backtick without its partner.
    pieces = ["'".join(pieces)]
  for i, piece in enumerate(pieces):
    if i % 2:
      pieces[i] = f"``{piece}``"
      # Inline markup must end before a blank or punctuation.
      if i + 1 < len(pieces) and re.match(r"\w", pieces[i + 1]):
        pieces[i] += "\\ "
      if pieces[i - 1] and re.search(r"\w$", pieces[i - 1]):
        pieces[i] = "\\ " + pieces[i]
    else:
      piece = re.sub(r"([\\*|])", r"\\\1", piece)
      pieces[i] = re.sub(r"_(?!\w)", r"\\_", piece)
  return "".join(pieces)
