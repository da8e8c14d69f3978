"""Tests of rljax.storage.workdirs."""

import json
import os
import pathlib
import tempfile

from absl.testing import absltest, parameterized

from rljax.storage import workdirs


class _WorkdirTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.workdir = pathlib.Path(
      self.enter_context(tempfile.TemporaryDirectory())
    )


class FlagsTest(_WorkdirTest):
  _FLAGS = {"steps": 100, "rate": 0.1, "task": "sum", "stops": ("a", "b")}

  def test_same_flags_pass(self):
    workdirs.write_flags(self.workdir, self._FLAGS)
    workdirs.write_flags(self.workdir, self._FLAGS)
    workdirs.check_flags(self.workdir, self._FLAGS)
    written = json.loads((self.workdir / "flags.json").read_text())
    self.assertEqual(written, self._FLAGS | {"stops": ["a", "b"]})
    self.assertEqual(os.listdir(self.workdir), ["flags.json"])

  @parameterized.parameters("write_flags", "check_flags")
  def test_difference_is_shown(self, function):
    workdirs.write_flags(self.workdir, self._FLAGS)
    changed = {"steps": 200, "rate": 0.1, "stops": ("a",), "new": None}
    with self.assertRaises(ValueError) as raised:
      getattr(workdirs, function)(self.workdir, changed)
    self.assertEqual(
      str(raised.exception),
      f"{self.workdir} belongs to a run with other flags:\n"
      "  new: was absent, now null\n"
      "  steps: was 100, now 200\n"
      '  stops: was ["a", "b"], now ["a"]\n'
      '  task: was "sum", now absent\n'
      "Give the old flags to go on with it, or another --workdir.",
    )
    written = json.loads((self.workdir / "flags.json").read_text())
    self.assertEqual(written["steps"], 100)

  def test_ignored_flag_may_change(self):
    workdirs.write_flags(self.workdir, self._FLAGS)
    changed = self._FLAGS | {"steps": 200}
    workdirs.write_flags(self.workdir, changed, ignore=["steps"])
    workdirs.check_flags(self.workdir, changed)

  def test_unreadable_file(self):
    (self.workdir / "flags.json").write_text('{"steps": 1')
    with self.assertRaisesRegex(ValueError, "flags.json cannot be read"):
      workdirs.write_flags(self.workdir, self._FLAGS)


class PrepareTest(_WorkdirTest):
  def test_makes_folders_and_leaves_nothing(self):
    for _ in range(2):
      workdirs.prepare(self.workdir / "a" / "b")
    self.assertEqual(os.listdir(self.workdir / "a" / "b"), [])

  def test_a_file_where_checkpoints_go(self):
    path = pathlib.Path(self.workdir)
    path.mkdir(parents=True, exist_ok=True)
    (path / "checkpoints").write_text("mine")
    with self.assertRaisesRegex(ValueError, "checkpoints is no folder"):
      workdirs.prepare(path)

  def test_file_in_the_way(self):
    path = self.workdir / "file"
    path.touch()
    for workdir, reason in (
      (path, "File exists"),
      (path / "below", "Not a directory"),
    ):
      with self.assertRaisesRegex(
        ValueError,
        f"workdir {workdir} cannot be written to: {reason}; choose another "
        "--workdir",
      ):
        workdirs.prepare(workdir)

  def test_read_only(self):
    # Nobody, root included, can write below /proc.
    if not os.path.isdir("/proc/self"):
      self.skipTest("needs a /proc, which no user can write to")
    with self.assertRaisesRegex(ValueError, "/proc cannot be written to"):
      workdirs.prepare("/proc")


if __name__ == "__main__":
  absltest.main()
