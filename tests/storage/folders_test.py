"""Tests of folders that are replaced at once."""

import contextlib
import errno
import os
import pathlib
import shutil
import sys
import tempfile
from unittest import mock

from absl.testing import absltest, parameterized

from rljax.storage import folders, locks

OLD = {"config.json": "old", "weights-1": "old", "weights-2": "old"}
NEW = {"config.json": "new", "weights-1": "new", "template": "new"}
NOTES = {"README.md": "mine"}
STEPS = (
  *("rename", "replace", "link", "unlink", "rmdir", "mkdir", "chmod", "fsync"),
  *("open", "listdir"),
)


def _is_ours(name):
  return name in (OLD | NEW)


def _replace(path, content):
  with folders.replaced(path, _is_ours, last="config.json") as stage:
    for name, text in content.items():
      (stage / name).write_text(text)


def _content(path):
  return {file.name: file.read_text() for file in pathlib.Path(path).iterdir()}


class _Killed(BaseException):
  pass


@contextlib.contextmanager
def _fault(number, error):
  """Lets system call `number` raise; after a kill, all that follow as well."""
  calls = [0]

  def failing(function):
    def call(*args, **kwargs):
      # Locks are collected at any moment, and say themselves what is wrong.
      if sys._getframe(1).f_code.co_filename == locks.__file__:
        return function(*args, **kwargs)
      calls[0] += 1
      is_dead = error is _Killed and calls[0] > number
      if calls[0] == number or is_dead:
        raise error if error is _Killed else error(errno.ENOSPC, "disk full")
      return function(*args, **kwargs)

    return call

  with contextlib.ExitStack() as stack:
    stack.enter_context(mock.patch.object(os, "fsync"))  # Disks are slow.
    for name in STEPS:
      patched = failing(getattr(os, name))
      stack.enter_context(mock.patch.object(os, name, patched))
    yield calls


class ReplacedTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(
      self.enter_context(tempfile.TemporaryDirectory())
    )
    self.path = self.folder / "exported"

  def test_new_and_old_folders(self):
    _replace(self.path, OLD)
    self.assertEqual(_content(self.path), OLD)
    self.path.chmod(0o750)
    _replace(self.path, NEW)
    self.assertEqual(_content(self.path), NEW)
    self.assertEqual(self.path.stat().st_mode & 0o777, 0o750)
    self.assertEqual(os.listdir(self.folder), ["exported"])
    self.assertEqual(folders.current(self.path), self.path)

  def test_files_of_others_stay(self):
    _replace(self.path, OLD)
    (self.path / "README.md").write_text("mine")
    (self.path / "notes").mkdir()
    (self.path / "notes" / "a.txt").write_text("mine")
    inode = self.path.stat().st_ino
    _replace(self.path, NEW)
    self.assertEqual((self.path / "notes" / "a.txt").read_text(), "mine")
    shutil.rmtree(self.path / "notes")
    self.assertEqual(_content(self.path), NEW | NOTES)
    self.assertEqual(self.path.stat().st_ino, inode)

  def test_the_working_directory_stays(self):
    _replace(self.path, OLD)
    with contextlib.chdir(self.path):
      _replace(".", NEW)
      self.assertEqual(_content("."), NEW)

  def test_a_link_stays_a_link(self):
    _replace(self.path, OLD)
    link = self.folder / "link"
    link.symlink_to("exported")
    _replace(link, NEW)
    self.assertTrue(link.is_symlink())
    self.assertEqual(_content(self.path), NEW)

  def test_links_in_a_circle_are_refused(self):
    self.path.symlink_to(self.path)
    with self.assertRaisesRegex(ValueError, "leads nowhere"):
      _replace(self.path, NEW)

  def test_a_file_where_new_ones_wait_is_replaced(self):
    _replace(self.path, OLD)
    (self.path / ".export").write_text("what nobody wrote")
    _replace(self.path, NEW)
    self.assertEqual(_content(self.path), NEW)

  def test_a_file_is_refused(self):
    self.path.write_text("mine")
    with self.assertRaisesRegex(ValueError, "is a file, and must be a folder"):
      _replace(self.path, NEW)
    self.assertEqual(self.path.read_text(), "mine")

  def test_a_block_that_raises_changes_nothing(self):
    _replace(self.path, OLD)
    with (
      self.assertRaises(KeyError),
      folders.replaced(self.path, _is_ours, last="config.json") as stage,
    ):
      (stage / "config.json").write_text("half")
      raise KeyError
    self.assertEqual(_content(self.path), OLD)
    self.assertEqual(os.listdir(self.folder), ["exported"])

  def test_what_dead_processes_were_writing_goes(self):
    _replace(self.path, OLD)
    with mock.patch.object(os, "getpid", lambda: 2**22 + 1):
      left_over = folders._stage(self.path)
    alive = folders._stage(self.path)
    _replace(self.path, NEW)
    self.assertFalse(left_over.exists())
    self.assertTrue(alive.exists())

  @parameterized.product(
    kind=("swapped", "with notes", "mount", "no links", "new"),
    error=(OSError, _Killed),
  )
  def test_old_or_new_is_whole_at_any_moment(self, kind, error):
    for number in range(1, 1000):
      path = self.folder / f"{number}"
      if kind != "new":
        with mock.patch.object(os, "fsync"):
          _replace(path, OLD)
      if kind == "with notes":
        (path / "README.md").write_text("mine")
      with contextlib.ExitStack() as stack:
        if kind == "mount":
          on_mount = lambda directory, path=path: directory == path
          stack.enter_context(mock.patch.object(folders, "_is_mount", on_mount))
        if kind == "no links":
          (path / "README.md").write_text("mine")
          stack.enter_context(
            mock.patch.object(os, "link", side_effect=OSError)
          )
        calls = stack.enter_context(_fault(number, error))
        with contextlib.suppress(OSError, _Killed):
          _replace(path, NEW)
      if path.exists():
        found = _content_of_ours(folders.current(path))
        self.assertIn(found, (OLD, NEW, {}), f"at step {number}")
        self.assertTrue(found or kind == "new")
      if kind == "with notes":
        self.assertEqual((path / "README.md").read_text(), "mine")
      with mock.patch.object(os, "fsync"):
        _replace(path, NEW)
      self.assertEqual(_content_of_ours(path), NEW, f"after step {number}")
      self.assertEqual(folders.current(path), path)
      if calls[0] < number:
        self.assertGreater(number, 4)
        return
    self.fail("It never came to an end.")


def _content_of_ours(path):
  return {
    file.name: file.read_text()
    for file in path.iterdir()
    if _is_ours(file.name)
  }


if __name__ == "__main__":
  absltest.main()
