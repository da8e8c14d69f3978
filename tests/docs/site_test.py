"""The site builds without a warning, and docstrings keep their text."""

import importlib.util
import pathlib
import subprocess
import sys
import tempfile
import types

from absl.testing import absltest

from tests.docs import markdown

DOCS = markdown.ROOT / "docs"
NEEDED = ("sphinx", "myst_parser", "sphinx_book_theme")


def load_docstrings():
  """The module docs/docstrings.py, which is in no package."""
  path = DOCS / "docstrings.py"
  spec = importlib.util.spec_from_file_location("docstrings", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


class SiteTest(absltest.TestCase):
  def test_builds_without_a_warning(self):
    missing = [name for name in NEEDED if not importlib.util.find_spec(name)]
    if missing:
      self.skipTest(f"needs {', '.join(missing)} (pip install -e .[docs])")
    folder = self.enter_context(tempfile.TemporaryDirectory())
    done = subprocess.run(
      [
        *(sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q"),
        *("-b", "html", str(DOCS), folder),
      ],
      env=markdown.environment(),
      capture_output=True,
      text=True,
      check=False,
    )
    self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
    for page in DOCS.glob("*.md"):
      self.assertTrue((pathlib.Path(folder) / f"{page.stem}.html").exists())
    api = pathlib.Path(folder) / "generated" / "api"
    self.assertIn("clip_epsilon", (api / "rljax.losses.html").read_text())


class DocstringsTest(absltest.TestCase):
  def convert(self, text):
    return "\n".join(load_docstrings().to_rst(text.splitlines())).strip()

  def test_prose_is_no_markup(self):
    self.assertEqual(
      self.convert("Of π_ref_ and |x| * y, `a_b`s."),
      r"Of π_ref\_ and \|x\| \* y, ``a_b``\ s.",
    )

  def test_indented_blocks_stand_as_they_are(self):
    self.assertEqual(
      self.convert("Sum:\n\n  y = |x|\n    + 1\n\nfor all."),
      "Sum:\n\n.. code-block:: text\n\n    y = |x|\n      + 1\n\nfor all.",
    )

  def test_sections_become_fields(self):
    text = (
      "Does.\n\nArgs:\n  x: `[B]` float,\n    or:\n      - one,\n      - two.\n"
      "  *more: rest.\n\nReturns:\n  It.\n\nRaises:\n  ValueError: if not.\n\n"
      "Source:\n  A paper."
    )
    self.assertEqual(
      self.convert(text),
      "Does.\n\n:param x:\n    ``[B]`` float, or:\n\n"
      "    .. code-block:: text\n\n        - one,\n        - two.\n\n"
      ":param \\*more:\n    rest.\n\n:returns:\n    It.\n\n"
      ":raises ValueError:\n    if not.\n\n.. rubric:: Source\n\nA paper.",
    )

  def test_signatures_are_those_of_the_source(self):
    source = """
Array = int | str
def loss(x: Array, *, axis: Array | None = None) -> tuple[Array, dict]: ...
class Pair(NamedTuple):
  first: Array
  second: float = 1.0
  def swapped(self, times: int = 1) -> "Pair": ...
class Runs:
  def __init__(self, path: str): ...
"""
    path = pathlib.Path(
      self.enter_context(tempfile.TemporaryDirectory()), "m.py"
    )
    path.write_text(source)
    module = types.SimpleNamespace(__file__=str(path), __name__="m")
    signature = load_docstrings().signature
    self.assertEqual(
      signature("m.loss", module),
      ("(x: Array, *, axis: Array | None=None)", "tuple[Array, dict]"),
    )
    self.assertEqual(
      signature("m.Pair", module), ("(first: Array, second: float = 1.0)", "")
    )
    self.assertEqual(
      signature("m.Pair.swapped", module), ("(times: int=1)", "'Pair'")
    )
    self.assertEqual(signature("m.Runs", module), ("(path: str)", ""))
    self.assertIsNone(signature("m.other", module))


if __name__ == "__main__":
  absltest.main()
