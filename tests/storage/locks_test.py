"""Tests of the lock on a folder that one process writes at a time."""

import errno
import fcntl
import json
import os
import pathlib
import re
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
file = locks.take(sys.argv[1])
print("taken", flush=True)
sys.stdin.read()
"""


class TakeTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    folder = self.enter_context(tempfile.TemporaryDirectory())
    self.folder = pathlib.Path(folder)

  def _other_process(self):
    """A process that holds the lock."""
    process = subprocess.Popen(
      [sys.executable, "-c", _HOLDER, self.folder],
      cwd=conftest.REPOSITORY,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
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

  def test_holder_that_cannot_be_read(self):
    (self.folder / ".lock").write_text("{")
    busy = OSError(errno.EAGAIN, "busy")
    with (
      mock.patch.object(fcntl, "lockf", side_effect=busy),
      self.assertRaisesRegex(ValueError, "process unknown on some host"),
    ):
      locks.take(self.folder)

  def test_file_system_without_locks(self):
    without = OSError(errno.ENOLCK, "No locks available")
    with (
      mock.patch.object(fcntl, "lockf", side_effect=without),
      self.assertRaisesRegex(
        ValueError, "cannot be locked: No locks available; choose a folder on"
      ),
    ):
      locks.take(self.folder)


if __name__ == "__main__":
  absltest.main()
