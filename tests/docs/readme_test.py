"""What the README shows is there, and runs."""

import pathlib
import re

from absl.testing import absltest

from tests.docs import markdown

ROOT = markdown.ROOT
README = (ROOT / "README.md").read_text()


class ReadmeTest(absltest.TestCase):
  def test_first_example_runs(self):
    block = markdown.blocks(README, "python")[0]
    self.assertIn("clipped_policy_loss", block)
    exec(compile(block, "README.md", "exec"), {})

  def test_two_commands_and_a_page(self):
    first, second = markdown.commands(README)[:2]
    self.assertEqual(first, ["bash", "launch/quickstart.sh"])
    self.assertEqual(second, ["bash", "launch/test.sh"])
    self.assertLessEqual(len(README.splitlines()), 200)

  def test_named_files_exist(self):
    names = re.findall(
      r"(?:experiments|benchmarks|launch|tests)/[\w/]+\.(?:py|sh|flags|png)",
      README,
    )
    self.assertGreater(len(names), 5)
    for name in names:
      self.assertTrue((ROOT / name).exists(), name)

  def test_every_script_has_a_row(self):
    for path in (ROOT / "experiments").rglob("*.py"):
      self.assertIn(f"`{path.relative_to(ROOT)}`", README)

  def test_every_room_is_in_the_tree(self):
    (tree,) = [x for x in markdown.blocks(README, "") if x.startswith("rljax/")]
    for path in (ROOT / "rljax").iterdir():
      if (path / "__init__.py").exists():
        self.assertRegex(tree, rf"(?m)^  {path.name}/ ")
      elif path.suffix == ".py" and path.stem != "__init__":
        self.assertRegex(tree, rf"(?m)^  {path.name} ")

  def test_no_placeholder_is_left(self):
    for page in markdown.PAGES:
      self.assertNotRegex(page.read_text(), r"@[A-Z0-9_]+@|TODO|FIXME")
    self.assertTrue(pathlib.Path(ROOT / "LICENSE").exists())


if __name__ == "__main__":
  absltest.main()
