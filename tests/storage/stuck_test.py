"""Signals that end a process which Python cannot stop."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

from absl.testing import absltest, parameterized

from rljax.storage import stuck
from tests import conftest

# A call of C++ that never comes back to Python, as a long compilation does.
JOB = """
  import jax, sys, os
  from rljax.storage import signals
  may_end = sys.argv[1] == "nothing"
  forever = jax.jit(
    lambda x: jax.lax.while_loop(lambda x: x > 0, lambda x: x + 1e-9, x)
  ).lower(1.0).compile()
  with signals.Preemption(lambda: may_end) as preemption:
    print("ready", flush=True)
    forever(1.0).block_until_ready()
"""


class StuckTest(parameterized.TestCase):
  @parameterized.parameters(
    ("nothing", (signal.SIGTERM,), 0, "SIGTERM: .* nothing was to be saved"),
    ("a step", (signal.SIGTERM, signal.SIGTERM), 130, "asked twice"),
  )
  def test_a_long_call(self, has, numbers, status, message):
    process = subprocess.Popen(
      [sys.executable, "-c", textwrap.dedent(JOB), has],
      cwd=conftest.REPOSITORY,
      env={**os.environ, "JAX_PLATFORMS": "cpu"},
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    try:
      self.assertEqual(process.stdout.readline(), "ready\n")
      time.sleep(0.3)
      for number in numbers:
        self.assertIsNone(process.poll())
        process.send_signal(number)
        time.sleep(0.5)
      _, errors = process.communicate(timeout=30)
    finally:
      process.kill()
    self.assertRegex(errors, message)
    self.assertEqual(process.returncode, status)


class WatcherTest(absltest.TestCase):
  def watch(self, **options):
    ended = []
    watcher = stuck.Watcher(
      [signal.SIGTERM],
      **{"num_handled": lambda: 0, "may_end": lambda: False, **options},
      end=lambda number, reason: ended.append((number, reason)),
    )
    self.addCleanup(
      signal.signal,
      signal.SIGTERM,
      signal.signal(signal.SIGTERM, lambda *_: None),
    )
    self.addCleanup(watcher.close)
    return ended

  def wait(self, holds, seconds=10):
    until = time.monotonic() + seconds
    while not holds() and time.monotonic() < until:
      time.sleep(0.05)

  def test_may_end_later(self):
    may_end = threading.Event()
    ended = self.watch(may_end=may_end.is_set)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.5)
    self.assertEqual(ended, [])
    may_end.set()
    self.wait(lambda: ended)
    self.assertEqual(ended, [(signal.SIGTERM, "nothing was to be saved")])

  def test_two_that_were_handled(self):
    ended = self.watch(num_handled=lambda: 2)
    for _ in range(2):
      os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(1.5)
    self.assertEqual(ended, [])

  def test_other_signals(self):
    ended = self.watch(may_end=lambda: True)
    self.addCleanup(
      signal.signal,
      signal.SIGUSR1,
      signal.signal(signal.SIGUSR1, lambda *_: None),
    )
    os.kill(os.getpid(), signal.SIGUSR1)
    time.sleep(0.5)
    self.assertEqual(ended, [])


if __name__ == "__main__":
  absltest.main()
