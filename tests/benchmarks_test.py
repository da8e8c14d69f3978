"""Tables of the committed results, rebuilt without measuring anything."""

import json
import math
import subprocess
import sys

import numpy as np
from absl.testing import parameterized

from benchmarks import comparisons
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

  def assert_claimed(self, text):
    """Every verdict stands in a page, with its numbers."""
    claims = [line for line in text.splitlines() if line.startswith("- **")]
    self.assertNotEmpty(claims)
    pages = " ".join(_pages().split())
    for claim in claims:
      self.assertIn(claim, pages)

  def assert_shown(self, text, least=4):
    """Every row of a table stands in a page."""
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    self.assertGreater(len(rows), least)
    pages = _pages()
    for row in rows:
      self.assertIn(row, pages)

  def test_reasoning(self):
    output = self.tables("reasoning")
    self.assert_shown(output)
    for claim in range(1, 9):
      self.assertRegex(output, rf"(?m)^- \*\*C{claim}, .*: [\w ]+\.\*\* .")
    self.assert_claimed(output)
    self.assertIn("C4, SFT trades them: fail.", output)
    self.assertIn("C2, sparse is enough: not rejected.", output)

  def test_rlmec(self):
    output = self.tables("rlmec")
    _, methods, parts, untuned, model, training, checks = output.strip().split(
      "\n\n"
    )
    self.assertNotIn("DPO", methods)
    for arms in (methods, parts, untuned):
      self.assert_shown(arms, least=2)
    for table, least in ((model, 20), (training, 8)):
      self.assertGreater(table.count("\n"), least)
    self.assertRegex(checks, r"(?m)^- \*\*.*: [\w ]+\.\*\* .")
    self.assert_claimed(checks)

  def test_games(self):
    output = self.tables("games_study")
    found = json.loads((RESULTS / "games_study.json").read_text())
    arms = [arm for arms in found["evaluations"].values() for arm in arms]
    for text in ("before SFT", "after PPO within the grammar"):
      self.assertIn(f"| {text} |", output)
    rows = [line for line in output.splitlines() if line.startswith("| ")]
    self.assertGreaterEqual(len(rows), len(arms))

  def test_results_name_no_folder_of_a_machine(self):
    for path in RESULTS.glob("*.json"):
      self.assertNotRegex(path.read_text(), r'"/\w+/', path.name)


class ComparisonsTest(parameterized.TestCase):
  def test_two_standard_errors_of_three_seeds_are_no_evidence(self):
    # Mean 2, standard error 1: p = .18 with two degrees of freedom.
    gap = comparisons.over_seeds(
      [2 + math.sqrt(3), 2 - math.sqrt(3), 2.0], [0.0, 0.0, 0.0]
    )
    self.assertAlmostEqual(gap.p_seeds, 0.1835, places=4)
    self.assertAlmostEqual(gap.high, 2 + 4.302653, places=5)
    self.assertFalse(gap.is_above)

  def test_pairs_agree_with_mcnemar(self):
    # Two seeds: 5 questions that only one got right, none only the other.
    gap = comparisons.paired(["1111", "1110"], ["0011", "0000"])
    self.assertAlmostEqual(gap.p_questions, 2 / 2**5)
    np.testing.assert_allclose(gap.by_seed, [0.5, 0.75])

  def test_numbers(self):
    self.assertEqual(comparisons.number(-0.0001), ".000")
    self.assertEqual(comparisons.number(-0.25), "-.250")
    self.assertEqual(comparisons.p_value(1e-30), "p < 1e-9")


class MeasurementsTest(parameterized.TestCase):
  @parameterized.parameters(
    ("constraint", {"rows": "A step of the sampler"}),
    ("games", {"texts": "Texts alone", "batch": "A batch"}),
    ("generation", {"": "Sampling"}),
    ("lora", {"updates": "One update with LoRA", "rollouts": "A rollout"}),
    (
      "offline",
      {
        "step": "One A-LoL step, reference cached or inside",
        "host": "A log on the host, milliseconds",
      },
    ),
    (
      "lengths",
      {
        "attention": "Gradient of attention",
        "learner": "Gradient of a model",
        "growth": "Time per token in rows of several lengths",
      },
    ),
    ("overlap", {"": "Slow rewards"}),
    ("packing", {"": "An update, padded and packed"}),
    ("samples", {"": "Samples of one prompt"}),
    ("step", {"sides": "A GRPO step", "bounds": "What it takes at least"}),
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
