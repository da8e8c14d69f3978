"""Every metric that the code logs is on the page of metrics."""

import ast
import re

from absl.testing import absltest

from tests.docs import markdown

ROOT = markdown.ROOT
PAGE = (ROOT / "docs" / "metrics.md").read_text()
# Rooms whose names with a slash are paths.
NO_METRICS = ("distributed", "models", "storage", "tasks", "text")
NOT_LOGGED = {"max_grad_norm", "every_seconds"} | {
  *("score_seconds", "teacher_seconds"),
}
PATHS = ("rounds/*",)
NAME = re.compile(r"[a-z*]\w*\*?(?:/[\w*]+)+")


def sources():
  """The files that may log something."""
  for path in sorted((ROOT / "rljax").rglob("*.py")):
    if path.relative_to(ROOT / "rljax").parts[0] not in NO_METRICS:
      yield path
  yield from sorted((ROOT / "experiments").rglob("*.py"))


def names_in(path):
  """Texts that look like metrics, with a star for what is put in.

  Functions take the first part of a name as `prefix="dev/"`.
  """
  tree = ast.parse(path.read_text())
  pieces = set()
  for node in ast.walk(tree):
    text = None
    if isinstance(node, ast.JoinedStr):
      pieces |= {id(piece) for piece in ast.walk(node)}
      text = "".join(
        piece.value if isinstance(piece, ast.Constant) else "*"
        for piece in node.values
      )
      if getattr(getattr(node.values[0], "value", 0), "id", "") == "prefix":
        text = f"*/{text[1:]}"
    elif isinstance(node, ast.keyword) and node.arg == "prefix":
      text = f"{getattr(node.value, 'value', '')}*"
    elif isinstance(node, ast.arguments):
      for argument, default in zip(
        node.kwonlyargs, node.kw_defaults, strict=True
      ):
        if argument.arg == "prefix":
          text = f"{getattr(default, 'value', '')}*"
    elif isinstance(node, ast.Constant) and id(node) not in pieces:
      text = node.value if isinstance(node.value, str) else None
    is_name = text and NAME.fullmatch(text) and re.search(r"\w", text)
    if is_name and text not in PATHS:
      yield text, getattr(node, "lineno", 0)


def logged():
  """Name to the places where it is written."""
  found = {}
  for path in sources():
    for name, line in names_in(path):
      found.setdefault(name, []).append(f"{path.relative_to(ROOT)}:{line}")
  return found


def documented():
  """Names in code anywhere on the page, `<part>` as a star."""
  names = re.findall(r"`([\w<>]+(?:/[\w<>]+)+)`", PAGE)
  return {re.sub(r"<\w+>", "*", name) for name in names}


def fits(pattern, name):
  """Whether a name with stars can be one without, or with others."""
  words = re.escape(pattern).replace(r"\*", r"[\w*]+")
  return re.fullmatch(words, name) is not None


class MetricsTest(absltest.TestCase):
  def test_all_that_is_logged_is_documented(self):
    known = documented()
    self.assertGreater(len(known), 100)
    for name, places in logged().items():
      shown = name in known
      if "*" in name:
        shown = any(fits(name, other) for other in known)
      self.assertTrue(shown, f"{name} of {places} is not in docs/metrics.md")

  def test_all_that_is_documented_is_logged(self):
    found = set(logged())
    lines = [line for line in PAGE.splitlines() if line.startswith("|")]
    rows = [line.split(" | ")[0] for line in lines]
    names = re.findall(r"`([\w<>]+(?:/[\w<>]+)+)`", "\n".join(rows))
    self.assertGreater(len(names), 100)
    for name in names:
      name = re.sub(r"<\w+>", "*", name)
      self.assertTrue(
        name in found or any(fits(other, name) for other in found), name
      )

  def test_names_without_a_slash_are_documented(self):
    rates = {
      piece.value
      for path in sources()
      for piece in ast.walk(ast.parse(path.read_text()))
      if isinstance(piece, ast.Constant) and isinstance(piece.value, str)
      if re.fullmatch(r"\w+_(per_second|seconds|norm)", piece.value)
    }
    self.assertIn("tokens_per_second", rates)
    for name in rates | {"loss", "rollouts"}:
      if name not in NOT_LOGGED:
        self.assertIn(f"`{name}`", PAGE)


if __name__ == "__main__":
  absltest.main()
