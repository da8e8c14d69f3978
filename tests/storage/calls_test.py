"""Tests of calls of functions that fail, hang or are stopped."""

import contextlib
import os
import signal
import threading
import time
from unittest import mock

from absl.testing import absltest, parameterized

from rljax.storage import calls, signals

ABOUT = lambda: "for the prompt 'p'"


def _hang(*unused):
  """Hangs where Python can be interrupted, and catches what it can."""
  while True:
    with contextlib.suppress(Exception):
      time.sleep(60)


class GuardTest(parameterized.TestCase):
  def guard(self, call, **options):
    return calls.guard(call, what="The judge", about=ABOUT, **options)

  def test_value(self):
    before = signal.getsignal(signal.SIGURG)
    with signals.Preemption():
      self.assertEqual(self.guard(lambda: 3, seconds=1.0), 3)
    self.assertEqual(signal.getsignal(signal.SIGURG), before)

  @parameterized.parameters(
    (KeyError("a"), "The judge failed for the prompt 'p': KeyError: 'a'."),
    (ValueError("bad."), "The judge failed for the prompt 'p': bad."),
    (AssertionError(), "failed for the prompt 'p': AssertionError: no message"),
  )
  def test_error_names_what_was_asked(self, error, message):
    fail = mock.Mock(side_effect=error)
    with self.assertRaises(calls.CallError) as caught:
      self.guard(fail)
    self.assertIn(message, str(caught.exception))
    self.assertIs(caught.exception.__cause__, error)

  def test_interrupts_and_ends_pass(self):
    for error in (KeyboardInterrupt(), SystemExit(2), signals.Stopped()):
      with self.assertRaises(type(error)):
        self.guard(mock.Mock(side_effect=error))

  def test_one_that_hangs(self):
    started = time.monotonic()
    with self.assertRaisesRegex(
      calls.CallError, "The judge took more than 0.3 seconds for the prompt 'p'"
    ):
      self.guard(_hang, seconds=0.3)
    self.assertLess(time.monotonic() - started, 5)
    time.sleep(0.3)  # No signal comes late.

  def test_progress_starts_the_time_anew(self):
    done = []

    def call():
      for i in range(6):
        time.sleep(0.15)
        done.append(i)

    self.guard(call, seconds=0.6, done=done)
    self.assertLen(done, 6)

  def test_a_signal_ends_one_that_hangs(self):
    self.enter_context(mock.patch.object(calls, "SECONDS_TO_GIVE_UP", 0.5))
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
    started = time.monotonic()
    with signals.Preemption() as preemption:
      with self.assertRaises(signals.Stopped) as caught:
        self.guard(_hang, done=[1, 2])
      self.assertTrue(preemption.requested)
    self.assertEqual(caught.exception.done, [1, 2])
    self.assertEqual(caught.exception.exit_status, 0)
    self.assertLess(time.monotonic() - started, 5)

  def test_a_quick_one_ends_by_itself_after_a_signal(self):
    with signals.Preemption():
      os.kill(os.getpid(), signal.SIGTERM)
      self.assertEqual(self.guard(lambda: time.sleep(0.3) or 3), 3)

  def test_in_another_thread_it_is_called_all_the_same(self):
    found = []
    thread = threading.Thread(
      target=lambda: found.append(self.guard(lambda: 3, seconds=0.1))
    )
    thread.start()
    thread.join()
    self.assertEqual(found, [3])


class OneByOneTest(parameterized.TestCase):
  def ask(self, function, number=5, **options):
    return calls.one_by_one(
      function,
      [(i,) for i in range(number)],
      what="The judge",
      about=lambda i: f"for number {i}",
      **options,
    )

  def test_values(self):
    self.assertEqual(self.ask(lambda i: i * i), [0, 1, 4, 9, 16])
    self.assertEqual(self.ask(lambda i: i, number=0), [])

  @parameterized.parameters(0, 3, 4)
  def test_error_names_the_item_and_carries_those_before(self, at):
    def judge(i):
      if i == at:
        raise KeyError("x")
      return i

    with self.assertRaisesRegex(
      calls.CallError, f"failed for number {at}: KeyError"
    ) as caught:
      self.ask(judge)
    self.assertEqual(caught.exception.done, list(range(at)))

  def test_one_that_hangs(self):
    judge = lambda i: _hang() if i == 2 else i
    with self.assertRaisesRegex(
      calls.CallError, "more than 0.3 seconds for number 2"
    ) as caught:
      self.ask(judge, seconds=0.3)
    self.assertEqual(caught.exception.done, [0, 1])

  def test_a_signal_ends_it_behind_an_answer(self):
    self.enter_context(mock.patch.object(calls, "SECONDS_TO_ANSWER", 0.0))

    def judge(i):
      if i == 2:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
      return i

    with (
      signals.Preemption(),
      self.assertRaises(signals.Stopped) as caught,
    ):
      self.ask(judge)
    self.assertEqual(caught.exception.done, [0, 1, 2])
    self.assertEqual(caught.exception.exit_status, 130)


if __name__ == "__main__":
  absltest.main()
