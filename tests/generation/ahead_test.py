"""Drawing while others are scored."""

import dataclasses
import itertools
import threading
from unittest import mock

import jax
import numpy as np
from absl.testing import absltest, parameterized

from rljax.generation import ahead, groups

WAIT = 20.0  # Seconds, of what should come at once.


class ItemsTest(parameterized.TestCase):
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


@dataclasses.dataclass
class Drawn:
  """In place of samples."""

  number: int
  learnt_scores: np.ndarray | None = None

  def scored(self, score):
    return dataclasses.replace(self, learnt_scores=score(self.number))


class RoundsTest(parameterized.TestCase):
  @parameterized.parameters((0.05, 0.0, 2), (0.0, 0.05, 3))
  def test_by_its_pace(self, draw_seconds, score_seconds, num_drawn):
    wait = threading.Event().wait

    def draw(number):
      drawn.append(number)
      wait(draw_seconds)
      return Drawn(number)

    def score(number):
      wait(score_seconds)
      return number

    drawn = []
    rounds = ahead.rounds(draw, score, 4, ahead.Pace())
    self.assertEqual([next(rounds).learnt_scores for _ in range(2)], [0, 1])
    rounds.close()
    self.assertEqual(drawn, [*range(num_drawn)])  # One is thrown away.

  def test_draws_while_it_scores(self):
    is_drawn = threading.Event()
    pace = ahead.Pace(0.0, 100.0)

    def draw(number):
      if number == 1:
        is_drawn.set()
      return Drawn(number)

    def score(number):
      self.assertTrue(is_drawn.wait(WAIT))
      return number

    found = [x.learnt_scores for x in ahead.rounds(draw, score, 2, pace)]
    self.assertEqual(found, [0, 1])
    self.assertLess(pace.score, 100.0)  # Of the last round.

  def test_groups_are_those_of_drawing_by_itself(self):
    scores = np.float32([[0, 0, 1, 0], [1, 1, 0, 1], [0, 1, 1, 0]])
    fields = {}

    def collect(**options):
      drawn = []

      def draw(number):
        drawn.append(number)
        return Drawn(number)

      with mock.patch.object(groups.responses, "Samples") as samples:
        samples.concatenate.side_effect = lambda rounds: mock.Mock(
          scores=np.concatenate([x.learnt_scores for x in rounds]),
          take=list,
        )
        found = groups.collect(
          draw if "score" in options else lambda i: draw(i).scored(score),
          2,
          max_rounds=3,
          **options,
        )
      fields[len(fields)] = drawn
      return found.samples, found.num_rounds, found.num_useful

    score = lambda number: scores[number]
    plain = collect()
    self.assertEqual(plain, collect(score=score, pace=ahead.Pace()))
    self.assertEqual(plain, collect(score=score, pace=ahead.Pace(0.0, 9.0)))
    self.assertEqual(plain[1:], (2, 2))


if __name__ == "__main__":
  absltest.main()
