"""Tests of which logged replies are compared."""

import numpy as np
from absl.testing import absltest

from rljax.text import comparisons, logged

# Three replies, one, two.
ROWS = logged.from_rows(
  [
    {"prompt": "a", "candidates": ["p", "q", "r"], "rewards": [1, 3, 2]},
    {"prompt": "b", "response": "p", "reward": 0},
    {"prompt": "c", "candidates": ["p", "q"], "rewards": [2, 2]},
    {"prompt": "d", "candidates": ["p", "q"], "rewards": [0, -1]},
  ],
  "log",
)
REWARDS = np.array(
  [[1.0, 3.0, 2.0], [0.0, 0.0, 0.0], [2.0, 2.0, 0.0], [0.0, -1.0, 0.0]]
)


class RankedTest(absltest.TestCase):
  def test_the_order_of_the_log(self):
    rows, ranks, notes = comparisons.ranked(ROWS)
    np.testing.assert_array_equal(rows, [0, 2, 3])
    np.testing.assert_array_equal(ranks, [[0, 2], [0, 1], [0, 1]])
    self.assertEqual(
      notes,
      [
        "3 comparisons out of 4 rows.",
        "1 of 4 rows have fewer than two replies: log, row 1.",
      ],
    )

  def test_by_reward(self):
    rows, ranks, notes = comparisons.ranked(ROWS, REWARDS)
    # The best of three against the worst; a tie is no comparison.
    np.testing.assert_array_equal(rows, [0, 3])
    np.testing.assert_array_equal(ranks, [[1, 0], [0, 1]])
    self.assertEqual(
      notes[2], "1 of 4 rows have replies of equal reward: log, row 2."
    )

  def test_all_replies(self):
    rows, ranks, notes = comparisons.ranked(ROWS, REWARDS, all_replies=True)
    np.testing.assert_array_equal(rows, [0, 2, 3])
    # Equal ones keep their order; 2 is no reply of a row of two.
    np.testing.assert_array_equal(ranks, [[1, 2, 0], [0, 1, 2], [0, 1, 2]])
    self.assertLen(notes, 2)
    _, ranks, _ = comparisons.ranked(ROWS, all_replies=True)
    np.testing.assert_array_equal(ranks, [[0, 1, 2], [0, 1, 2], [0, 1, 2]])

  def test_many_that_are_left_out_are_counted(self):
    rows = [ROWS[1]] * 4 + [ROWS[0]]
    _, _, notes = comparisons.ranked(rows)
    self.assertRegex(notes[1], r"4 of 5 rows .*: (log, row 1, ){3}\.\.\.$")

  def test_nothing_to_compare(self):
    with self.assertRaisesRegex(
      ValueError,
      "Nothing can be compared: 1 of 2 rows have fewer .* log, row 1. "
      "1 of 2 rows have replies of equal reward: log, row 2",
    ):
      comparisons.ranked(ROWS[1:3], REWARDS[1:3])

  def test_batches_must_be_filled(self):
    found = comparisons.ranked(ROWS)
    found.check_batch(3)
    with self.assertRaisesRegex(
      ValueError, "--batch_size=4 is more than the 3"
    ):
      found.check_batch(4)


class SinglesTest(absltest.TestCase):
  def test_every_reply_by_itself(self):
    rows, ranks, notes = comparisons.singles(ROWS, REWARDS, 2)
    np.testing.assert_array_equal(rows, [0, 0, 0, 1, 2, 2, 3, 3])
    np.testing.assert_array_equal(ranks[:, 0], [0, 1, 2, 0, 0, 1, 0, 1])
    self.assertEqual(ranks.shape, (8, 1))
    # A reward of the threshold is good: 3, 2, 2 and 2.
    self.assertEqual(notes, ["4 of 8 replies are good ones."])

  def test_all_alike(self):
    for threshold, num in ((4, 0), (-1, 8)):
      with self.assertRaisesRegex(
        ValueError, f"of {threshold} makes all replies alike: {num} of 8"
      ):
        comparisons.singles(ROWS, REWARDS, threshold)


if __name__ == "__main__":
  absltest.main()
