import contextlib
import errno
import os
import pathlib
import resource
import signal
import subprocess
import sys
import tempfile
from unittest import mock

from absl.testing import parameterized

from rljax.storage import paths

# Writes two thirds of a file, and is killed before or after it is closed.
_KILLED = """
import os, signal, sys
from rljax.storage import paths
with paths.whole(sys.argv[1], shared=sys.argv[2] == "shared") as partial:
  with open(partial, "w") as file:
    file.write("ne")
    file.flush()
    if sys.argv[3] == "open":
      os.kill(os.getpid(), signal.SIGKILL)
  os.kill(os.getpid(), signal.SIGKILL)
"""


class PathsTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self._temporary = tempfile.TemporaryDirectory()
    self.addCleanup(self._temporary.cleanup)
    self.folder = pathlib.Path(self._temporary.name)
    self.path = self.folder / "rows.txt"

  @parameterized.product(
    content=["é\n\u2028🙂\r\n", b"\xff\x00\r\n", "", b""],
    fsync=[False, True],
    shared=[False, True],
  )
  def test_writes_and_replaces(self, content, fsync, shared):
    for _ in range(2):
      paths.write_whole(self.path, content, fsync=fsync, shared=shared)
      expected = content.encode() if isinstance(content, str) else content
      self.assertEqual(self.path.read_bytes(), expected)
      self.assertEqual(os.listdir(self.folder), ["rows.txt"])
      self.path.write_text("something else, and longer")

  def test_takes_strings_and_has_the_usual_mode(self):
    usual = self.folder / "usual"
    usual.touch()
    for shared in (False, True):
      paths.write_whole(os.fspath(self.path), "new", shared=shared)
      self.assertEqual(self.path.stat().st_mode, usual.stat().st_mode)

  def test_the_old_file_stays_until_the_block_ends(self):
    self.path.write_text("old")
    with paths.whole(self.path) as partial:
      partial.write_text("new")
      self.assertEqual(self.path.read_text(), "old")
      self.assertEqual(partial.name, ".rows.txt.partial")
    self.assertEqual(self.path.read_text(), "new")

  @parameterized.product(
    existed=[False, True], shared=[False, True], when=["open", "closed"]
  )
  def test_kill_leaves_the_old_file(self, existed, shared, when):
    if existed:
      self.path.write_text("old")
    arguments = [self.path, "shared" if shared else "alone", when]
    done = subprocess.run(
      [sys.executable, "-c", _KILLED, *arguments], check=False
    )
    self.assertEqual(done.returncode, -signal.SIGKILL)
    self.assertEqual(self.path.exists(), existed)
    if existed:
      self.assertEqual(self.path.read_text(), "old")
    (left,) = set(os.listdir(self.folder)) - {"rows.txt"}
    self.assertTrue(left.startswith(".rows.txt.") and left.endswith(".partial"))
    # The next write replaces both, unless another process may be writing.
    paths.write_whole(self.path, "new", shared=shared)
    self.assertEqual(self.path.read_text(), "new")
    hidden = [left] if shared else []
    self.assertCountEqual(os.listdir(self.folder), ["rows.txt", *hidden])

  @parameterized.parameters(False, True)
  def test_error_in_the_block_leaves_the_old_file_alone(self, shared):
    self.path.write_text("old")
    with (
      self.assertRaisesRegex(ZeroDivisionError, "division"),
      paths.whole(self.path, shared=shared) as partial,
    ):
      partial.write_text(str(1 / 0))
    with (
      self.assertRaisesRegex(ZeroDivisionError, "division"),
      paths.whole(self.path, shared=shared) as partial,
    ):
      partial.write_text("ne")
      _ = 1 / 0
    self.assertEqual(self.path.read_text(), "old")
    self.assertEqual(os.listdir(self.folder), ["rows.txt"])

  @parameterized.parameters("replace", "fsync")
  def test_failed_write_leaves_the_old_file_alone(self, function):
    self.path.write_text("old")
    with (
      mock.patch.object(os, function, side_effect=OSError("disk full")),
      self.assertRaisesRegex(OSError, "disk full"),
    ):
      paths.write_whole(self.path, "new", fsync=True)
    self.assertEqual(self.path.read_text(), "old")
    self.assertEqual(os.listdir(self.folder), ["rows.txt"])

  def test_a_full_disk_is_named_with_what_to_do(self):
    self.path.write_text("old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    self.addCleanup(resource.setrlimit, resource.RLIMIT_FSIZE, (soft, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (4, hard))
    with self.assertRaisesRegex(
      paths.DiskError, "rows.txt cannot be written: .*Free some space"
    ) as caught:
      paths.write_whole(self.path, "longer than four bytes")
    self.assertEqual(caught.exception.errno, errno.EFBIG)
    self.assertNotIn("\n", str(caught.exception))
    self.assertEqual(self.path.read_text(), "old")
    self.assertEqual(os.listdir(self.folder), ["rows.txt"])

  def test_set_aside(self):
    for i in range(3):
      self.path.write_text(str(i))
      (self.folder / "rows.txt.old2").touch()  # Somebody else's.
      aside = paths.set_aside(self.path)
      self.assertEqual(aside.name, f"rows.txt.old{[1, 3, 4][i]}")
      self.assertEqual(aside.read_text(), str(i))
    self.assertFalse(self.path.exists())

  @parameterized.parameters(
    "gs://bucket/run",
    "S3://bucket",
    "file:///tmp/run",
    "hdfs://host:9000/x",
    "label=gs://bucket/run",
    "corpus=https://host/rows.jsonl",
    pathlib.Path("gs://bucket/run"),
    pathlib.Path("file:///tmp/run"),
    "gs://",
  )
  def test_paths_of_other_storage(self, path):
    message = "--x=.*is not a path of this machine"
    with self.assertRaisesRegex(ValueError, message):
      paths.check_local(path, "--x")
    with contextlib.chdir(self.folder):
      with self.assertRaisesRegex(ValueError, "not a path of this machine"):
        paths.write_whole(path, "text")
      self.assertEmpty(os.listdir())

  @parameterized.parameters(
    *("runs/a", "/tmp/a:b", "~/x", "org/name", "tfds:gsm8k", "a=runs/b"),
    *("branch:2", "module:function", "C:/runs", "", "x:y/z", "smollm2-135m"),
    *("tfds:huggingface:org__name", "org/name@main", "C://runs"[:3]),
  )
  def test_paths_and_names(self, path):
    paths.check_local(path, "--x")

  def test_a_page_of_the_hub_is_told_by_its_name(self):
    with self.assertRaisesRegex(ValueError, "or the hub name org/m.b, where"):
      paths.check_local("https://huggingface.co/org/m.b/tree/main", "--policy")

  def test_fsync_comes_before_the_rename(self):
    calls = []
    fsync, replace = os.fsync, os.replace

    def recorded(name, function):
      def call(*args):
        calls.append(name)
        return function(*args)

      return call

    with (
      mock.patch.object(os, "fsync", recorded("fsync", fsync)),
      mock.patch.object(os, "replace", recorded("replace", replace)),
    ):
      paths.write_whole(self.path, "old")
      self.assertEqual(calls, ["replace"])
      paths.write_whole(self.path, "new", fsync=True)
    self.assertEqual(calls, ["replace", "fsync", "replace"])

  def test_writers_of_a_shared_file_do_not_meet(self):
    with (
      paths.whole(self.path, shared=True) as first,
      paths.whole(self.path, shared=True) as second,
    ):
      first.write_text("the first")
      second.write_text("the second")
    # The inner block ended first, the outer one replaced its file.
    self.assertEqual(self.path.read_text(), "the first")
    self.assertEqual(os.listdir(self.folder), ["rows.txt"])
