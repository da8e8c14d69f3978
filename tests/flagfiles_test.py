"""Every flagfile parses, by a script that has all of its flags."""

import re

from absl import flags
from absl.testing import absltest, parameterized

from tests import conftest, scripts

ROOT = conftest.REPOSITORY
FILES = sorted((ROOT / "experiments" / "flags").rglob("*.flags"))
SCRIPTS = sorted((ROOT / "experiments").glob("*.py"))


class FlagfilesTest(parameterized.TestCase):
  @parameterized.parameters(
    *[path.relative_to(ROOT).as_posix() for path in FILES]
  )
  def test_it_parses(self, name):
    names = re.findall(r"(?m)^--(?:no)?(\w+)", (ROOT / name).read_text())
    self.assertNotEmpty(names)
    errors = []
    for path in SCRIPTS:
      script = path.relative_to(ROOT).as_posix()
      own = scripts.flags_of(script)
      if not all(x in own or f"no{x}" in own for x in names):
        continue
      required = "must have a value other than None"
      words = [
        f"--{flag}=x"
        for flag in own
        if flag not in names
        and any(required in check.message for check in own[flag].validators)
      ]
      if "task" not in names:  # Then a log is named with the file.
        words += [f"--{x}=x" for x in ("data", "dev_data") if x in own]
        words += [f"--{x}=x" for x in ("value_data",) if x in own]
      try:
        scripts.parse_flags(script, [f"--flagfile={name}", *words])
        return
      except flags.Error as error:  # Another script may give them other values.
        errors.append(f"{script}: {error}")
    self.fail(f"no script takes {name}: {errors}")

  def test_there_is_a_folder_for_each_paper(self):
    folders = {path.parent.name for path in FILES}
    self.assertEqual(folders, {"padula", "a_lol", "havrilla", "rlmec", "grpo"})


if __name__ == "__main__":
  absltest.main()
