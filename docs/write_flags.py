"""Writes flags.md: which script has which flag, with its default and help.

python docs/write_flags.py           # writes the page
python docs/write_flags.py --check   # fails if the page is not up to date
python docs/write_flags.py --json    # prints the flags of every script
"""

import json
import pathlib
import re
import runpy
import sys

from absl import flags

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "flags.md"
COMMAND = "python docs/write_flags.py"
HEAD = f"""# Flags

Every flag of every script, in alphabetical order. A name that several scripts
define alike is listed once; where its default or its help differs, it is listed
once for each. `--help` of a script shows the same. Flags of one kind (the run,
the task, the optimizer) come in groups that scripts share; those of the
algorithm are at the head of its script.

Boolean flags take `--name`, `--noname` or `--name=false`. Lists take commas:
`--task_options=style=last,holdout=0.1`. `--flagfile=FILE` reads flags from a
file, one a line; what stands behind it on the command line wins.

This page is written by `{COMMAND}`; a test compares it with the scripts.

"""


def scripts() -> list[pathlib.Path]:
  """The experiment scripts, as paths in the repository."""
  folder = ROOT / "experiments"
  return [path.relative_to(ROOT) for path in sorted(folder.rglob("*.py"))]


def collect() -> dict[str, dict[str, dict[str, str]]]:
  """Reads the flags of all scripts, wherever they are defined.

  A script is run up to the end of its definitions, not its `main`, and the
  flags that it added are taken away before the next one.

  Returns:
    Script to name to "kind", "values", "default" and "help", all of them texts.
  """
  sys.path.insert(0, str(ROOT))
  values = flags.FLAGS
  found = {}
  for script in scripts():
    runpy.run_path(str(ROOT / script), run_name="script")
    own = [
      name
      for name in sorted(values)
      if not is_foreign(values.find_module_defining_flag(name))
    ]
    found[str(script)] = {name: describe(values[name]) for name in own}
    for name in own:
      delattr(values, name)
  return found


def is_foreign(module: str) -> bool:
  """Whether a module of another package defines a flag: absl, or chex."""
  package = module.partition(".")[0]
  return package in sys.modules and package not in ("rljax", "__main__")


def describe(flag: flags.Flag) -> dict[str, str]:
  """Describes one flag."""
  return {
    "kind": kind_of(flag),
    "values": ", ".join(getattr(flag.parser, "enum_values", None) or ()),
    "default": default_of(flag),
    # absl puts the values of an enum before its help: they are its kind.
    "help": " ".join(re.sub(r"^<[^>]*>: ", "", flag.help or "").split()),
  }


def kind_of(flag: flags.Flag) -> str:
  """The type of a flag with its bounds: "int ≥ 1", "float in [0, 1]"."""
  parser = flag.parser
  if getattr(parser, "enum_values", None):
    return "choice or bool" if flag.boolean else "choice"
  kind = {"string": "text"}.get(flag.flag_type(), flag.flag_type())
  if kind.startswith("comma"):
    return "list"
  low = getattr(parser, "lower_bound", None)
  high = getattr(parser, "upper_bound", None)
  if low is not None and high is not None:
    return f"{kind} in [{low:g}, {high:g}]"
  if low is not None:
    return f"{kind} ≥ {low:g}"
  return kind if high is None else f"{kind} ≤ {high:g}"


def default_of(flag: flags.Flag) -> str:
  """The default as one would give it on the command line."""
  required = "must have a value other than None"
  if any(required in check.message for check in flag.validators):
    return "required"
  if flag.default is None:
    return "unset"
  if isinstance(flag.default, list):
    return ",".join(map(str, flag.default)) or "empty"
  if isinstance(flag.default, bool):
    return str(flag.default).lower()
  return str(flag.default) if flag.default != "" else "empty"


def page(found: dict[str, dict[str, dict[str, str]]]) -> str:
  """The page as Markdown."""
  same: dict[tuple[str, ...], list[str]] = {}
  for script, own in found.items():
    for name, flag in own.items():
      row = (name, *flag.values())
      same.setdefault(row, []).append(script)
  order = list(found)

  def place(item):
    (name, *_), of = item
    return name, -len(of), order.index(of[0])

  short = {script: script_name(script) for script in order}
  lines = ["| flag | kind | default | what it is | scripts |"]
  lines.append("|---|---|---|---|---|")
  for (name, kind, values, default, text), of in sorted(
    same.items(), key=place
  ):
    if values:
      text = f"{text} One of {values.removeprefix(', ')}."
    words = ("required", "unset", "empty")
    shown = default if default in words else code(default)
    cells = [code(f"--{name}"), escaped(kind), shown, escaped(text)]
    cells.append(", ".join(short[script] for script in of))
    lines.append(f"| {' | '.join(cells)} |")
  counts = ["", "## How many each script has", "", "| script | flags |"]
  counts += ["|---|---|"]
  counts += [f"| `{script}` | {len(own)} |" for script, own in found.items()]
  return HEAD + "\n".join([*lines, *counts]) + "\n"


def script_name(script: str) -> str:
  """Without folders and ending: "games/draw"."""
  path = pathlib.PurePosixPath(script).relative_to("experiments")
  return str(path.with_suffix(""))


def code(text: str) -> str:
  """Text as code in a cell of a table."""
  return "`" + text.replace("|", "\\|").replace("\n", "\\n") + "`"


def escaped(text: str) -> str:
  """Text as it stands: nothing in it is markup."""
  text = re.sub(r"([\\`*_<>\[\]{}|$])", r"\\\1", text)
  # Flags read better as code.
  flag = r"--(?:\w|\\_)+(?:=(?:\w|\\_)+)?"
  return re.sub(flag, lambda m: code(m[0].replace("\\_", "_")), text)


def main(arguments: list[str]) -> int:
  """Writes, compares or prints; returns the exit status."""
  found = collect()
  if arguments == ["--json"]:
    print(json.dumps(found))
    return 0
  text = page(found)
  if arguments == ["--check"]:
    if PAGE.exists() and PAGE.read_text() == text:
      return 0
    print(f"{PAGE.relative_to(ROOT)} is not up to date: run `{COMMAND}`.")
    return 1
  if arguments:
    print(__doc__)
    return 2
  PAGE.write_text(text)
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
