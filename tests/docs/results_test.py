"""The tables of the docs are those that the committed results make."""

import re
import subprocess
import sys

from absl.testing import parameterized

from tests.docs import markdown


class ResultsTest(parameterized.TestCase):
  @parameterized.parameters(
    ("reasoning", ["--from_results"], "reasoning", 30),
    ("rlmec", ["--from_results"], "rlmec", 60),
    ("games_study", ["--from_results"], "ppo_programmed_rewards", 4),
    ("plans", ["--from_results"], "devices", 3),
  )
  def test_page_has_what_the_benchmark_prints(self, name, flags, page, num):
    done = subprocess.run(
      [sys.executable, "-m", f"benchmarks.{name}", *flags],
      cwd=markdown.ROOT,
      env=markdown.environment(),
      capture_output=True,
      text=True,
      check=True,
    )
    text = as_words((markdown.ROOT / "docs" / f"{page}.md").read_text())
    lines = done.stdout.splitlines()
    if name == "games_study":
      # Its first table is on the page with fewer columns.
      start = next(i for i, x in enumerate(lines) if x.startswith("| | |"))
      lines = lines[start:]
    lines = [line for line in lines if line.startswith(("|", "- "))]
    self.assertGreaterEqual(len(lines), num)
    for line in lines:
      self.assertIn(as_words(line), text)


def as_words(text):
  """Text whose lines may break anywhere."""
  return re.sub(r"\s+", " ", text).strip()
