"""Drawing while others are scored."""

import itertools
import threading
from unittest import mock

import jax
from absl.testing import absltest

from rljax.generation import ahead

WAIT = 20.0  # Seconds, of what should come at once.


class ItemsTest(absltest.TestCase):
  def test_next_is_computed_meanwhile(self):
    started = [threading.Event() for _ in range(4)]

    def source():
      for i in range(3):
        started[i].set()
        yield i
      started[3].set()

    found = []
    for item in ahead.items(source()):
      self.assertTrue(started[item + 1].wait(WAIT))
      found.append(item)
    self.assertEqual(found, [0, 1, 2])
    self.assertEqual(list(ahead.items(iter([]))), [])

  def test_errors_come_in_their_place(self):
    def source():
      yield 1
      raise KeyError("draw")

    found = ahead.items(source())
    self.assertEqual(next(found), 1)
    with self.assertRaisesRegex(KeyError, "draw"):
      next(found)

  def test_stops_early(self):
    computed = []
    for item in ahead.items(map(computed.append, itertools.count())):
      self.assertIsNone(item)
      break
    number = len(computed)
    self.assertLessEqual(number, 2)
    threading.Event().wait(0.05)
    self.assertLen(computed, number)  # Nothing goes on behind our back.

  def test_several_processes_draw_in_order(self):
    computed = []
    with mock.patch.object(jax, "process_count", return_value=2):
      next(ahead.items(map(computed.append, range(3))))
    self.assertLen(computed, 1)


if __name__ == "__main__":
  absltest.main()
