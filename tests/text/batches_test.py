import math

import hypothesis
import hypothesis.strategies as st
import numpy as np
from absl.testing import parameterized

from rljax.text import batches


class PaddingTest(parameterized.TestCase):
  def test_buckets(self):
    lengths = [batches.bucket_length(n) for n in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9)]
    self.assertEqual(lengths, [1, 1, 2, 3, 4, 6, 6, 8, 8, 12])
    self.assertEqual(batches.bucket_length(97), 128)
    self.assertEqual(batches.bucket_length(129), 192)
    self.assertEqual(batches.bucket_length(5, [64, 16]), 16)
    with self.assertRaisesRegex(ValueError, r"65 .* largest .* \[16, 64\]"):
      batches.bucket_length(65, [64, 16])

  @hypothesis.given(length=st.integers(1, 10**6))
  def test_bucket_properties(self, length):
    bucket = batches.bucket_length(length)
    self.assertBetween(bucket, length, max(2 * length - 1, length * 1.5))
    self.assertEqual(batches.bucket_length(bucket), bucket)
    self.assertIn(bucket / 2 ** int(math.log2(bucket)), (1, 1.5))

  def test_hand_computed(self):
    rows = [[7, 0], [], [1, 2, 3]]
    ids, mask = batches.pad_left(rows)
    np.testing.assert_array_equal(ids, [[0, 7, 0], [0, 0, 0], [1, 2, 3]])
    # The real token 0 counts.
    np.testing.assert_array_equal(mask, [[0, 1, 1], [0, 0, 0], [1, 1, 1]])
    ids, mask = batches.pad_right(rows, length=4, pad_id=9)
    np.testing.assert_array_equal(
      ids, [[7, 0, 9, 9], [9, 9, 9, 9], [1, 2, 3, 9]]
    )
    np.testing.assert_array_equal(
      mask, [[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 0]]
    )
    self.assertEqual((ids.dtype, mask.dtype), (np.int32, np.bool_))

  @hypothesis.given(
    rows=st.lists(st.lists(st.integers(0, 3), max_size=9), max_size=5),
    left=st.booleans(),
  )
  def test_mask_gives_the_rows_back(self, rows, left):
    pad = batches.pad_left if left else batches.pad_right
    ids, mask = pad(rows, buckets=(4, 9), pad_id=3)
    self.assertEqual(ids.shape, mask.shape)
    self.assertIn(ids.shape[1], (4, 9))
    self.assertEqual(
      [r[m].tolist() for r, m in zip(ids, mask, strict=True)], rows
    )
    edge = mask[:, -1] if left else mask[:, 0]
    np.testing.assert_array_equal(edge, [len(row) > 0 for row in rows])

  def test_too_long(self):
    with self.assertRaisesRegex(ValueError, "Row 1 has 3 tokens.* is 2"):
      batches.pad_left([[1], [1, 2, 3]], length=2)

  def test_longest_in_bucket(self):
    for limit in range(1, 300):
      longest = batches.longest_in_bucket(limit)
      self.assertLessEqual(batches.bucket_length(longest), limit)
      self.assertGreater(batches.bucket_length(longest + 1), limit)
    self.assertEqual(batches.longest_in_bucket(127), 96)
    self.assertEqual(
      (batches.longest_in_bucket(0), batches.longest_in_bucket(-5)), (0, 0)
    )


class BatchesTest(parameterized.TestCase):
  def test_supervised_batch(self):
    batch = batches.supervised_batch(
      [([1, 2], [3, 9]), ([4], [9])], prompt_length=3, pad_id=9
    )
    np.testing.assert_array_equal(batch["prompt_ids"], [[9, 1, 2], [9, 9, 4]])
    np.testing.assert_array_equal(
      batch["prompt_mask"], [[False, True, True], [False, False, True]]
    )
    np.testing.assert_array_equal(batch["response_ids"], [[3, 9], [9, 9]])
    # The end token counts although it is the padding token.
    np.testing.assert_array_equal(
      batch["response_mask"], [[True, True], [True, False]]
    )

  def test_supervised_batch_of_fewer_rows_is_filled_up(self):
    rows = [([1, 2], [3, 9]), ([4], [9])]
    batch = batches.supervised_batch(rows, num_rows=4, response_length=3)
    whole = batches.supervised_batch(rows, response_length=3)
    for name, array in batch.items():
      self.assertLen(array, 4)
      np.testing.assert_array_equal(array[:2], whole[name])
    # Nothing is learnt from them, and attention has a key.
    np.testing.assert_array_equal(batch["prompt_mask"][2:], [[False, True]] * 2)
    self.assertFalse(batch["response_mask"][2:].any())
    again = batches.supervised_batch(rows, num_rows=2, response_length=3)
    np.testing.assert_array_equal(again["prompt_ids"], whole["prompt_ids"])

  def test_supervised_batch_of_what_is_learnt(self):
    batch = batches.supervised_batch(
      [([1], [3, 0, 9], [False, True, True]), ([4], [9], [True])],
      num_rows=3,
      pad_id=7,
    )
    np.testing.assert_array_equal(
      batch["learnt_mask"],
      [[False, True, True], [True, False, False], [False] * 3],
    )
    self.assertEqual(batch["learnt_mask"].dtype, np.bool_)
    np.testing.assert_array_equal(
      batch["response_mask"],
      [[True] * 3, [True, False, False], [False] * 3],
    )

  def test_supervised_shape(self):
    rows = [([1] * 5, [2, 2, 2]), ([1] * 2, [2] * 4, [True] * 4)]
    self.assertEqual(
      batches.supervised_shape(rows),
      {"prompt_length": 6, "response_length": 4},
    )
    self.assertEqual(
      batches.supervised_shape(rows, prompt_length=3, response_length=9),
      {"prompt_length": 6, "response_length": 12},
    )
    self.assertEqual(
      batches.supervised_shape([], prompt_length=3, response_length=5),
      {"prompt_length": 3, "response_length": 6},
    )

  def test_indices_or_all(self):
    np.testing.assert_array_equal(
      batches.indices_or_all(9, 4, 3, seed=2),
      batches.batch_indices(9, 4, 3, seed=2),
    )
    for num_rows in (3, 4):
      found = batches.indices_or_all(num_rows, 4, 3, seed=2)
      np.testing.assert_array_equal(found, np.arange(num_rows))

  @parameterized.parameters(
    # ⌈9 * 2 / 4⌉; all rows in each; ⌈5 * 1.5 / 5⌉; one update for each epoch.
    (9, 4, 2, 5),
    (3, 4, 2, 2),
    (5, 5, 1.5, 2),
    (4, 64, 8, 8),
  )
  def test_num_updates(self, num_rows, batch_size, epochs, expected):
    self.assertEqual(
      batches.num_updates(num_rows, batch_size, epochs), expected
    )

  def test_empty_batch(self):
    with self.assertRaisesRegex(ValueError, "at least one row"):
      batches.supervised_batch([])

  @hypothesis.given(
    num_rows=st.integers(1, 12),
    batch_size=st.integers(1, 12),
    seed=st.integers(0, 99),
  )
  def test_every_row_once_per_epoch(self, num_rows, batch_size, seed):
    hypothesis.assume(batch_size <= num_rows)
    steps = [
      batches.batch_indices(num_rows, batch_size, step, seed=seed)
      for step in range(2 * num_rows)
    ]
    self.assertTrue(all(len(batch) == batch_size for batch in steps))
    epochs = np.concatenate(steps).reshape(2 * batch_size, num_rows)
    for epoch, order in enumerate(epochs):
      np.testing.assert_array_equal(
        order, batches.epoch_order(num_rows, seed=seed, epoch=epoch)
      )
      np.testing.assert_array_equal(np.sort(order), np.arange(num_rows))

  def test_orders_differ(self):
    orders = {
      tuple(batches.epoch_order(20, seed=seed, epoch=epoch))
      for seed in range(3)
      for epoch in range(3)
    }
    self.assertLen(orders, 9)

  @parameterized.parameters(0, 6)
  def test_bad_batch_size(self, batch_size):
    with self.assertRaisesRegex(
      ValueError, f"between 1 and the 5 rows of data, got {batch_size}"
    ):
      batches.batch_indices(5, batch_size, 0, seed=0)
