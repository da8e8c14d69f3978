"""What the README shows is there, and runs."""

import pathlib
import re

from absl.testing import absltest, parameterized

from tests import conftest

ROOT = conftest.REPOSITORY
README = (ROOT / "README.md").read_text()


class ReadmeTest(parameterized.TestCase):
  def test_first_example_runs(self):
    block = re.findall(r"```python\n(.*?)```", README, re.S)[0]
    self.assertIn("clipped_policy_loss", block)
    exec(compile(block, "README.md", "exec"), {})

  def test_named_files_exist(self):
    names = re.findall(
      r"(?:experiments|benchmarks|launch|tests)/[\w/]+\.(?:py|sh|flags|png)",
      README,
    )
    self.assertGreater(len(names), 5)
    for name in names:
      self.assertTrue((ROOT / name).exists(), name)

  def test_flagfiles_exist_and_name_real_flags(self):
    scripts = {
      path: path.read_text() for path in (ROOT / "experiments").rglob("*.py")
    }
    known = set()
    for text in scripts.values():
      known |= set(re.findall(r'DEFINE_\w+\(\s*"(\w+)"', text))
    flagfiles = list((ROOT / "experiments" / "flags").rglob("*.flags"))
    self.assertNotEmpty(flagfiles)
    for path in flagfiles:
      self.assertIn(path.name, README)
      for line in path.read_text().splitlines():
        if not line.startswith("#"):
          name = re.match(r"--(\w+)=", line)
          self.assertIsNotNone(name, f"{path}: {line}")
          self.assertIn(name[1], known, f"{path}: {line}")

  def test_no_placeholder_is_left(self):
    self.assertNotRegex(README, r"@[A-Z0-9_]+@|TODO|FIXME")
    self.assertTrue(pathlib.Path(ROOT / "LICENSE").exists())


if __name__ == "__main__":
  absltest.main()
