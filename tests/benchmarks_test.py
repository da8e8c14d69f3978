"""Tables of the committed results, rebuilt without measuring anything."""

import json
import subprocess
import sys

from absl.testing import parameterized

from tests import conftest

ROOT = conftest.REPOSITORY
RESULTS = ROOT / "benchmarks" / "results"


def _tables(name, *words):
  """What `python -m benchmarks.NAME --from_results` prints, and its status."""
  done = subprocess.run(
    [sys.executable, "-m", f"benchmarks.{name}", "--from_results", *words],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )
  return done.returncode, done.stdout, done.stderr


def _pages():
  """The text of all pages that show tables."""
  pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
  return "\n".join(page.read_text() for page in pages)


class StudiesTest(parameterized.TestCase):
  def tables(self, name):
    before = {path: path.stat().st_mtime_ns for path in RESULTS.iterdir()}
    status, output, errors = _tables(name)
    self.assertEqual(status, 0, errors)
    after = {path: path.stat().st_mtime_ns for path in RESULTS.iterdir()}
    self.assertEqual(after, before)
    return output

  def assert_shown(self, text):
    """Every row of a table stands in a page."""
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    self.assertGreater(len(rows), 4)
    pages = _pages()
    for row in rows:
      self.assertIn(row, pages)

  def test_reasoning(self):
    output = self.tables("reasoning")
    self.assert_shown(output)
    for claim in range(1, 9):
      self.assertRegex(output, rf"(?m)^- \*\*C{claim}, .*: \w+\.\*\* .")

  def test_rlmec(self):
    output = self.tables("rlmec")
    _, methods, parts, model, training, checks = output.strip().split("\n\n")
    self.assert_shown(methods)
    self.assert_shown(parts)
    for table, least in ((model, 20), (training, 8)):
      self.assertGreater(table.count("\n"), least)
    self.assertRegex(checks, r"(?m)^- \*\*.*: \w+\.\*\* .")

  def test_games(self):
    output = self.tables("games_study")
    found = json.loads((RESULTS / "games_study.json").read_text())
    arms = [arm for arms in found["evaluations"].values() for arm in arms]
    for text in ("before SFT", "after PPO within the grammar"):
      self.assertIn(f"| {text} |", output)
    rows = [line for line in output.splitlines() if line.startswith("| ")]
    self.assertGreaterEqual(len(rows), len(arms))


class MeasurementsTest(parameterized.TestCase):
  @parameterized.parameters(
    ("constraint", {"rows": "A step of the sampler"}),
    ("games", {"texts": "Texts alone", "batch": "A batch"}),
    ("generation", {"": "Sampling"}),
    (
      "offline",
      {
        "step": "One A-LoL step, reference cached or inside",
        "host": "A log on the host, milliseconds",
      },
    ),
    ("samples", {"": "Samples of one prompt"}),
    ("update", {"": "One PPO update"}),
    ("verdicts", {"": "Verdicts a second"}),
  )
  def test_tables(self, name, titles):
    status, output, errors = _tables(name)
    self.assertEqual(status, 0, errors)
    found = json.loads((RESULTS / f"{name}.json").read_text())
    num_rows = 0
    for entry, title in titles.items():
      self.assertIn(title, output)
      rows = found[entry] if entry else found
      num_rows += len(rows) if isinstance(rows, list) else 1
    lines = [line for line in output.splitlines() if line.startswith("│")]
    # A row of words that do not fit takes several lines.
    self.assertGreaterEqual(len(lines), num_rows)

  def test_without_results(self):
    status, _, errors = _tables("edits")
    self.assertNotEqual(status, 0)
    self.assertRegex(errors, r"There are no results at .*edits\.json")
