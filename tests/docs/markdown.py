"""Reads the pages of the docs: their blocks, commands and tables."""

import functools
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

from tests import conftest

ROOT = conftest.REPOSITORY
PAGES = (
  ROOT / "README.md",
  ROOT / "launch" / "README.md",
  *sorted((ROOT / "docs").glob("*.md")),
)
_FENCE = re.compile(
  r"(?:^<!-- not run: (?P<reason>.+) -->\n)?"
  r"^```(?P<language>\w*)\n(?P<body>.*?)^```$",
  re.M | re.S,
)


def blocks(text: str, language: str) -> list[str]:
  """The code blocks in a language."""
  found = _FENCE.finditer(text)
  return [x["body"] for x in found if x["language"] == language]


def python_blocks(text: str) -> list[tuple[str, bool]]:
  """The Python blocks, each with whether it is meant to be run."""
  found = _FENCE.finditer(text)
  return [
    (x["body"], x["reason"] is None) for x in found if x["language"] == "python"
  ]


def prose(text: str) -> str:
  """The text without its code blocks."""
  return _FENCE.sub("", text)


def commands(text: str) -> list[list[str]]:
  """The commands of all bash blocks as words, shell variables put in."""
  found = []
  for block in blocks(text, "bash"):
    variables = {}
    for line in block.replace("\\\n", " ").splitlines():
      for part in line.split(" && "):
        part = re.sub(
          r"\$(\w+)", lambda m, v=variables: v.get(m[1], m[0]), part
        )
        words = shlex.split(part, comments=True)
        if len(words) == 1 and re.fullmatch(r"\w+=.*", words[0]):
          name, _, value = words[0].partition("=")
          variables[name] = value
        elif words:
          found.append(words)
  return found


@functools.cache
def flags() -> dict[str, dict[str, dict[str, str]]]:
  """Script to flag to what docs/write_flags.py says of it."""
  done = subprocess.run(
    [sys.executable, "docs/write_flags.py", "--json"],
    cwd=ROOT,
    env=environment(),
    capture_output=True,
    text=True,
    check=True,
  )
  return json.loads(done.stdout)


def environment() -> dict[str, str]:
  """Of processes that import this checkout."""
  path = os.pathsep.join(
    filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
  )
  return os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}


def flagfile(path: pathlib.Path) -> dict[str, str]:
  """Name to value of the flags in a file.

  Raises:
    ValueError: if a line is none.
  """
  found = {}
  for line in path.read_text().splitlines():
    if line and not line.startswith("#"):
      flag = re.fullmatch(r"--(\w+)=(.*)", line)
      if not flag:
        raise ValueError(f"{path}: {line!r} is no --flag=value.")
      found[flag[1]] = flag[2]
  return found
