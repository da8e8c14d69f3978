"""Tests of the lock on a folder that one process writes at a time."""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from unittest import mock

from absl.testing import absltest, parameterized

from rljax.storage import locks
from tests import conftest

# Takes the lock of a folder and keeps it until its input ends.
_HOLDER = """
import sys
from rljax.storage import locks
file = getattr(locks, sys.argv[2])(sys.argv[1])
print("taken", flush=True)
sys.stdin.read()
"""


class TakeTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    folder = self.enter_context(tempfile.TemporaryDirectory())
    self.folder = pathlib.Path(folder)

  def _other_process(self, how="take", path=None):
    """A process that holds the lock."""
    process = subprocess.Popen(
      [sys.executable, "-c", _HOLDER, path or self.folder, how],
      cwd=conftest.REPOSITORY,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
      start_new_session=True,
    )
    self.addCleanup(process.stdout.close)
    self.addCleanup(process.stdin.close)
    self.addCleanup(process.wait)
    self.addCleanup(process.kill)
    self.assertEqual(process.stdout.readline(), "taken\n")
    return process

  def test_second_process_is_told_who_has_it(self):
    other = self._other_process()
    here = re.escape(f"process {other.pid} on {socket.gethostname()}")
    with self.assertRaisesRegex(
      ValueError, f"{self.folder} is being written by {here}; wait for its end"
    ):
      locks.take(self.folder)

  @parameterized.parameters(signal.SIGKILL, signal.SIGTERM)
  def test_a_process_that_is_gone_has_no_lock(self, number):
    other = self._other_process()
    other.send_signal(number)
    other.wait()
    # What it wrote is still there, and means nothing.
    left = json.loads((self.folder / ".lock").read_text())
    self.assertEqual(left["pid"], other.pid)
    with locks.take(self.folder):
      left = json.loads((self.folder / ".lock").read_text())
    self.assertEqual(left, {"host": socket.gethostname(), "pid": os.getpid()})

  def test_closing_gives_it_back(self):
    locks.take(self.folder).close()
    other = self._other_process()
    other.stdin.close()
    self.assertEqual(other.wait(), 0)
    locks.take(self.folder).close()

  def test_the_same_process_may_take_it_again(self):
    with locks.take(self.folder), locks.take(self.folder):
      content = (self.folder / ".lock").read_text()
    self.assertEqual(json.loads(content)["pid"], os.getpid())

  def test_it_is_held_until_the_last_one_gives_it_back(self):
    first = locks.take(self.folder)
    with locks.take(self.folder):
      pass
    other = subprocess.run(
      [sys.executable, "-c", _HOLDER, self.folder, "take"],
      cwd=conftest.REPOSITORY,
      input="",
      capture_output=True,
      text=True,
      check=False,
    )
    self.assertIn(f"being written by process {os.getpid()}", other.stderr)
    first.close()
    first.close()
    self._other_process()

  @parameterized.parameters(True, False)
  def test_reading_the_file_does_not_give_it_back(self, has_locks_of_files):
    with contextlib.ExitStack() as stack:
      if not has_locks_of_files:
        stack.enter_context(mock.patch.object(fcntl, "F_OFD_SETLK", -1))
      lock = locks.take(self.folder)
    if has_locks_of_files:
      shutil.copytree(self.folder, self.folder / "copy")
    with self.assertRaises(AssertionError):
      self._other_process()
    lock.close()

  def test_a_fork_does_not_keep_what_its_parent_held(self):
    forks = """
import os, time
reads, writes = os.pipe()
if not os.fork():
  os.write(writes, b".")
  time.sleep(60)
os.read(reads, 1)  # What runs in a child after a fork has run.
"""
    holder = _HOLDER.replace("print(", f"{forks}print(")
    with mock.patch.dict(globals(), _HOLDER=holder):
      other = self._other_process()
    self.addCleanup(os.killpg, other.pid, signal.SIGKILL)
    other.kill()
    other.wait()
    locks.take(self.folder).close()

  def test_a_link_in_its_place_is_not_followed(self):
    victim = self.folder / "victim"
    victim.write_text("precious")
    (self.folder / ".lock").symlink_to(victim)
    with self.assertRaisesRegex(ValueError, "cannot be locked"):
      locks.take(self.folder)
    self.assertEqual(victim.read_text(), "precious")

  def test_what_is_replaced_is_locked_beside(self):
    path = self.folder / "export"
    other = self._other_process("beside", path)
    here = f"process {other.pid} on {socket.gethostname()}"
    with self.assertRaisesRegex(
      ValueError, f"{path} is being written by {re.escape(here)}"
    ):
      locks.beside(path)
    other.stdin.close()
    other.wait()
    with locks.beside(path), locks.beside(self.folder / "x" / ".." / "export"):
      self.assertEqual(os.listdir(self.folder), [".export.lock"])
    self.assertEmpty(os.listdir(self.folder))

  def test_one_that_was_deleted_meanwhile_is_none(self):
    path = self.folder / "export"
    lock, lockf = locks.beside(path), locks._set

    def late(*arguments):
      # The other gives it back between the opening of the file and its lock.
      nonlocal lock
      lock = None
      return lockf(*arguments)

    with (
      mock.patch.object(locks, "_OPEN", {}),
      mock.patch.object(locks, "_set", late),
    ):
      again = locks.beside(path)
    left = self.folder / ".export.lock"
    self.assertEqual(json.loads(left.read_text())["pid"], os.getpid())
    again.close()

  def test_a_disk_that_is_full_keeps_no_name(self):
    full = OSError(errno.ENOSPC, "No space left on device")
    with mock.patch.object(json, "dump", side_effect=full):
      locks.take(self.folder).close()

  def test_holder_that_cannot_be_read(self):
    (self.folder / ".lock").write_text("{")
    busy = OSError(errno.EAGAIN, "busy")
    with (
      mock.patch.object(locks, "_set", side_effect=busy),
      self.assertRaisesRegex(ValueError, "process unknown on some host"),
    ):
      locks.take(self.folder)

  def test_file_system_without_locks(self):
    without = OSError(errno.ENOLCK, "No locks available")
    with (
      mock.patch.object(locks, "_set", side_effect=without),
      self.assertRaisesRegex(
        ValueError, "cannot be locked: No locks available; choose a folder on"
      ),
    ):
      locks.take(self.folder)


if __name__ == "__main__":
  absltest.main()
