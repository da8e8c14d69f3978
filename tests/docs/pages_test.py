"""Commands, code, links and names in the docs are those of the repository."""

import ast
import configparser
import contextlib
import io
import pathlib
import re
import tempfile
import unittest

from absl.testing import absltest, parameterized

from tests.docs import markdown

ROOT = markdown.ROOT
TEXTS = {str(p.relative_to(ROOT)): p.read_text() for p in markdown.PAGES}
# What a reader writes.
NEW = {
  "experiments/ppo_floor.py",
  "rljax/losses/spo.py",
  "tests/losses/spo_test.py",
}
ROOMS = sorted(p.parent.name for p in ROOT.glob("rljax/*/__init__.py"))


def each_page(test):
  return parameterized.parameters(*TEXTS)(test)


def comments(source):
  """The comments and docstrings of Python code."""
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
      yield ast.get_docstring(node) or ""
  for line in source.splitlines():
    yield line.partition("# ")[2]


def named_files(text):
  """Paths of files of the repository that a text speaks of."""
  folders = "experiments|benchmarks|launch|tests|rljax|docs"
  ending = "py|sh|sbatch|flags|png|jsonl?|md"
  pattern = rf"(?<![\w/.])(?:\.\./)?((?:{folders})/[\w/.]+\.(?:{ending}))\b"
  return set(re.findall(pattern, text))


class PagesTest(parameterized.TestCase):
  @each_page
  def test_named_files_exist(self, page):
    for name in named_files(TEXTS[page]) - NEW:
      self.assertTrue((ROOT / name).exists(), name)
    for name in re.findall(r"-m (benchmarks\.\w+)", TEXTS[page]):
      path = ROOT / f"{name.replace('.', '/')}.py"
      self.assertTrue(path.exists(), name)

  def test_files_that_comments_name_exist(self):
    paths = [
      path
      for folder in ("rljax", "experiments", "launch", "benchmarks", "tests")
      for path in (ROOT / folder).rglob("*")
      if path.suffix in (".py", ".sh", ".sbatch", ".flags")
    ]
    self.assertGreater(len(paths), 400)
    for path in paths:
      text = path.read_text()
      if path.suffix == ".py":  # Tests run scripts that are none.
        text = "\n".join(comments(text))
      for name in named_files(text) - NEW - {"experiments/X.py"}:
        self.assertTrue((ROOT / name).exists(), f"{path} speaks of {name}")

  def test_names_in_docstrings_are_defined(self):
    modules = {}
    for path in (ROOT / "rljax").rglob("*.py"):
      modules.setdefault(path.stem, []).append(path)
    packages = {path.parent for path in (ROOT / "rljax").rglob("*.py")}
    files = r"\.(jsonl?|png|html|md|txt)$"
    found, unknown = 0, []
    for folder in ("rljax", "experiments", "benchmarks"):
      for path in (ROOT / folder).rglob("*.py"):
        text = "\n".join(comments(path.read_text()))
        for name in re.findall(r"`([a-z_]+\.[A-Za-z_][\w.]*)", text):
          parts = name.rstrip(".").split(".")
          if parts[0] not in modules or re.search(files, name):
            continue
          found += 1
          if not (
            any(is_in(file, parts[1]) for file in modules[parts[0]])
            or any(is_defined(parts, package) for package in packages)
          ):
            unknown.append(f"{path.relative_to(ROOT)} speaks of {name}")
    self.assertEqual(unknown, [])
    self.assertGreater(found, 300)

  @each_page
  def test_flagfiles_exist(self, page):
    folder = ROOT / "experiments" / "flags"
    for name in re.findall(r"(?<![\w/])((?:\w+/)?\w+\.flags)\b", TEXTS[page]):
      self.assertNotEmpty(list(folder.rglob(name)), name)

  @each_page
  def test_links_and_pictures_lead_somewhere(self, page):
    folder = (ROOT / page).parent
    for link in re.findall(r"\]\(([^)\s]+)\)", markdown.prose(TEXTS[page])):
      if link.startswith("http"):
        continue
      path, _, anchor = link.partition("#")
      target = (folder / path) if path else ROOT / page
      self.assertTrue(target.exists(), link)
      if anchor:
        self.assertIn(anchor, anchors(target.read_text()), link)

  @each_page
  def test_named_functions_exist(self, page):
    names = re.findall(r"`rljax\.((?:\w+\.)*\w+)`", TEXTS[page])
    names += re.findall(rf"`((?:{'|'.join(ROOMS)})\.[\w.]+)`", TEXTS[page])
    for name in names:
      if not re.search(r"\.(py|md|jsonl?|flags|html)$", name):
        self.assertTrue(is_defined(name.split(".")), name)

  @each_page
  def test_extras_exist(self, page):
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    known = set(config["options.extras_require"])
    for names in re.findall(r"\.\[([\w,]+)\]\"", TEXTS[page]):
      self.assertLessEqual(set(names.split(",")), known)

  @each_page
  def test_commands_name_real_flags(self, page):
    copies = {}
    for words in markdown.commands(TEXTS[page]):
      if words[0] == "cp":
        copies[words[2]] = words[1]
        continue
      for i, word in enumerate(words):
        rest = words[i + 1 :]
        if word == "rljax.plan":  # Behind -- stand a script and its flags.
          rest = rest[: rest.index("--")]
        given = [w for w in rest if w.startswith("--")]
        if re.fullmatch(r"experiments/[\w/]+\.py", word):
          known = markdown.flags()[copies.get(word, word)]
          if word in copies:  # With the flags that the page adds.
            more = re.findall(r'(?m)^\+  "(\w+)",', TEXTS[page])
            known = known | dict.fromkeys(more, {"kind": "float"})
          if "rljax.plan" in words:  # It writes to a folder of its own.
            known = known | {"workdir": known["workdir"] | {"default": ""}}
          self.check_flags(word, known, given)
        elif re.fullmatch(r"benchmarks\.\w+|rljax\.[\w.]+", word):
          # The commands of the doctor and of the plan are in their rooms.
          file = word.replace("rljax.doctor", "rljax.distributed.doctor")
          file = file.replace("rljax.plan", "rljax.plan.command")
          source = (ROOT / f"{file.replace('.', '/')}.py").read_text()
          for flag in given:
            name = flag.removeprefix("--").partition("=")[0]
            self.assertRegex(source, rf'"(--)?{name}"', flag)

  def check_flags(self, script, known, given):
    """Holds the words of a command against the flags of its script."""
    values = {}
    for word in given:
      name, equals, value = word.removeprefix("--").partition("=")
      if name == "flagfile":
        values |= markdown.flagfile(ROOT / value)
        continue
      if name not in known and name.removeprefix("no") in known:
        name, equals, value = name.removeprefix("no"), "=", "false"
      self.assertIn(name, known, f"{script}: {word}")
      is_bool = known[name]["kind"] == "bool"
      self.assertTrue(equals or is_bool, f"{script}: {word} has no value")
      values[name] = value or "true"
    self.assertTrue(takes(known, values), f"{script}: {given}, or its flagfile")
    for name, flag in known.items():
      if flag.get("default") == "required":
        self.assertIn(name, values, f"{script} needs --{name}")

  @each_page
  def test_python_compiles_and_runs(self, page):
    namespace = {"__name__": "page"}
    with (
      tempfile.TemporaryDirectory() as folder,
      contextlib.chdir(folder),
      contextlib.redirect_stdout(io.StringIO()),
    ):
      for block, runs in markdown.python_blocks(TEXTS[page]):
        program = compile(block, page, "exec")
        if runs:
          exec(program, namespace)
      for value in list(namespace.values()):
        if isinstance(value, type) and issubclass(value, unittest.TestCase):
          suite = unittest.defaultTestLoader.loadTestsFromTestCase(value)
          result = unittest.TestResult()
          suite.run(result)
          self.assertGreater(result.testsRun, 3)
          self.assertEqual(result.errors + result.failures, [])


class FlagfilesTest(absltest.TestCase):
  def test_flagfiles_are_named_and_name_real_flags(self):
    paths = sorted((ROOT / "experiments" / "flags").rglob("*.flags"))
    self.assertNotEmpty(paths)
    shown = "".join(TEXTS.values())
    for path in paths:
      self.assertIn(path.name, shown)
      values = markdown.flagfile(path)
      self.assertTrue(
        any(takes(known, values) for known in markdown.flags().values()),
        f"no script takes all flags of {path}",
      )


def takes(known, values):
  """Whether a script with these flags takes these values of them."""
  return all(
    name in known and is_value(known[name], value)
    for name, value in values.items()
  )


def is_value(flag, value):
  """Whether a text is a value of a flag, by its kind and bounds."""
  kind, _, bound = flag["kind"].partition(" ")
  if kind == "bool":
    return value in ("true", "false")
  if kind == "choice":
    is_bool = bound == "or bool" and value in ("true", "false")
    return is_bool or value in flag["values"].split(", ")
  if kind not in ("int", "float"):
    return True
  number = {"int": int, "float": float}[kind](value)
  limits = re.fullmatch(r"in \[(.*), (.*)\]|≥ (.*)|≤ (.*)", bound)
  if not limits:
    return True
  low, high = limits[1] or limits[3], limits[2] or limits[4]
  return (low is None or number >= float(low)) and (
    high is None or number <= float(high)
  )


def anchors(text):
  """The anchors of a page's headings, as GitHub makes them."""
  titles = re.findall(r"(?m)^#+ (.*)$", text)
  return {
    re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles
  }


def is_defined(parts, folder=ROOT / "rljax"):
  """Whether a dotted name below a folder is a module, or defined in one."""
  first, *rest = parts
  package = folder / first
  if (package / "__init__.py").exists():
    if not rest or is_defined(rest, package):
      return True
    return is_in(package / "__init__.py", rest[0])
  if (folder / f"{first}.py").exists():
    return not rest or is_in(folder / f"{first}.py", rest[0])
  return False


def is_in(path: pathlib.Path, name: str) -> bool:
  kinds = (ast.FunctionDef, ast.ClassDef)
  body = ast.parse(path.read_text()).body
  assigned = {
    target.id
    for node in body
    if isinstance(node, ast.Assign)
    for target in node.targets
    if isinstance(target, ast.Name)
  }
  return name in assigned | {x.name for x in body if isinstance(x, kinds)}


if __name__ == "__main__":
  absltest.main()
