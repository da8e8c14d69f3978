"""Modules of the user's own, by path and by name."""

import os
import pathlib
import tempfile

import numpy as np
from absl.testing import absltest, parameterized

from rljax import tasks
from rljax.tasks import own

TASK = """
def prompts(split, seed, *, num=10):
  return [f"{split} {i}" for i in range(num)]

def score(prompt, response):
  return float(len(response))
"""


class OwnTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    self.addCleanup(os.chdir, os.getcwd())
    os.chdir(self.folder)

  def test_a_task_by_its_path_whose_score_is_a_number(self):
    (self.folder / "my_own_task.py").write_text(TASK)
    for name in ("my_own_task.py", f"{self.folder}/my_own_task.py"):
      task = tasks.load(name)
      scores, parts = tasks.score_all(task, ["p"], ["four"])
      np.testing.assert_allclose(scores, [4.0])
      self.assertEqual(parts, [{}])

  def test_a_task_by_its_module(self):
    package = self.folder / "my_own_package"
    package.mkdir()
    (package / "a_task.py").write_text(TASK)
    task = tasks.load("my_own_package.a_task")
    self.assertEqual(task.prompts("test", 0, num=1), ["test 0"])

  def test_a_file_with_the_name_of_another_module(self):
    for folder in ("a", "b"):
      (self.folder / folder).mkdir()
      (self.folder / folder / "json.py").write_text(f"NAME = {folder!r}")
    first, second = (own.load(f"{x}/json.py", "--task") for x in "ab")
    self.assertEqual((first.NAME, second.NAME), ("a", "b"))
    self.assertIs(own.load("a/json.py", "--task"), first)

  @parameterized.parameters(
    ("none.py", None, "none.py: there is no such file"),
    ("a.b.c", None, "there is no such module, neither in"),
    ("t1.py", "1/0", "cannot be imported: ZeroDivisionError"),
    ("t2.py", "def f(", "cannot be imported: SyntaxError"),
    ("t3.py", "import no_such_thing", "cannot be imported: ModuleNotFound"),
    ("t4.py", "raise SystemExit(3)", "cannot be imported: SystemExit"),
    ("t5.py", "def score(p, r): return 0.0", "has no function prompts"),
    ("t6.py", "def prompts(): pass", "has no function score or score_batch"),
    ("chess", None, "Unknown task 'chess'; known .* by its path"),
  )
  def test_errors(self, name, source, message):
    if source is not None:
      (self.folder / name).write_text(source)
    with self.assertRaisesRegex(ValueError, message):
      tasks.load(name)


if __name__ == "__main__":
  absltest.main()
