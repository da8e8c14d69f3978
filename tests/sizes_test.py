"""Scripts stay short enough to be read, and repeat little of each other."""

import ast
import itertools
import pathlib

from absl.testing import absltest, parameterized

from tests import conftest

ROOT = conftest.REPOSITORY
# Lines that are not blank, flags included.
LINES = {
  "ppo": 360,
  "grpo": 340,
  "offline": 270,
  "preference": 320,
  "rlmec": 400,
  "rlmec_reward_model": 330,
  "expert_iteration": 320,
  "return_conditioned": 330,
  "outcome_reward_model": 320,
  "offline_value": 280,
  "evaluate": 350,
  "sft": 240,
}
SCRIPT_FUNCTION, LIBRARY_FUNCTION, EQUAL_LINES = 260, 90, 9


def _functions(path):
  """Name and number of lines of each function, its docstring left out."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.FunctionDef):
      length = node.end_lineno - node.lineno + 1
      if ast.get_docstring(node) is not None:
        first = node.body[0]
        length -= first.end_lineno - first.lineno + 1
      yield node.name, length


def _body(path):
  """The stripped lines of a script behind its imports and groups of flags."""
  lines = path.read_text().splitlines()
  start = next(i for i, line in enumerate(lines) if line.startswith("def main"))
  return [line.strip() for line in lines[start:] if line.strip()]


def _longest_run(first, second):
  """The longest run of lines that stands in both."""
  best, previous = (0, 0), [0] * (len(second) + 1)
  for i, line in enumerate(first):
    current = [0] * (len(second) + 1)
    for j, other in enumerate(second):
      if line == other:
        current[j + 1] = previous[j] + 1
        best = max(best, (current[j + 1], i + 1))
    previous = current
  return first[best[1] - best[0] : best[1]]


class SizesTest(parameterized.TestCase):
  def test_scripts(self):
    paths = sorted((ROOT / "experiments").glob("*.py"))
    self.assertEqual({path.stem for path in paths}, set(LINES))
    for path in paths:
      lines = [line for line in path.read_text().splitlines() if line.strip()]
      self.assertLessEqual(len(lines), LINES[path.stem], path)

  @parameterized.parameters(
    ("experiments", SCRIPT_FUNCTION), ("rljax", LIBRARY_FUNCTION)
  )
  def test_functions(self, folder, most):
    for path in sorted((ROOT / folder).rglob("*.py")):
      for name, length in _functions(path):
        self.assertLessEqual(length, most, f"{path}: {name}")

  def test_scripts_repeat_little(self):
    bodies = {
      path: _body(path) for path in sorted((ROOT / "experiments").rglob("*.py"))
    }
    for first, second in itertools.combinations(bodies, 2):
      run = _longest_run(bodies[first], bodies[second])
      self.assertLessEqual(
        len(run), EQUAL_LINES, f"{first} and {second}: {run}"
      )

  def test_readme(self):
    lines = pathlib.Path(ROOT / "README.md").read_text().splitlines()
    self.assertLessEqual(len(lines), 200)


if __name__ == "__main__":
  absltest.main()
