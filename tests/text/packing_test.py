"""Texts that are joined to rows."""

import dataclasses

import hypothesis
import hypothesis.strategies as st
import numpy as np
from absl.testing import absltest, parameterized

from rljax.text import batches, packing


def _batch(counts, seed=0):
  """Texts of (prompt, response) tokens, as one batch."""
  rng = np.random.default_rng(seed)
  draw = lambda size: rng.integers(1, 100, size).tolist()
  return batches.supervised_batch([(draw(p), draw(t)) for p, t in counts])


def _texts(batch):
  """The ids of every text of a batch, those without a response left out."""
  for row in range(len(batch["prompt_ids"])):
    said = batch["response_ids"][row, batch["response_mask"][row]]
    if said.size:
      asked = batch["prompt_ids"][row, batch["prompt_mask"][row]]
      yield (*asked, *said)


class BestFitTest(parameterized.TestCase):
  def test_by_hand(self):
    # 7 opens row 0 and 6 row 1; 4 fits row 1 exactly, 3 row 0; 2 opens row 2.
    found = packing.best_fit(np.array([2, 7, 0, 4, 3, 6]), 10)
    np.testing.assert_array_equal(found, [2, 0, -1, 1, 0, 1])

  @hypothesis.given(seed=st.integers(0, 2**32 - 1), num=st.integers(1, 50))
  def test_rows_are_not_too_full(self, seed, num):
    counts = np.random.default_rng(seed).integers(0, 33, num)
    rows = packing.best_fit(counts, 32)
    np.testing.assert_array_equal(rows < 0, counts == 0)
    sums = np.bincount(rows[rows >= 0], counts[rows >= 0])
    self.assertLessEqual(sums.max(initial=0), 32)
    if len(sums) > 1:  # Else two rows would have been one.
      self.assertGreater(np.sort(sums)[:2].sum(), 32)

  def test_too_long(self):
    with self.assertRaisesRegex(
      ValueError, "--packed_length=4 is less than the 5 tokens of the longest"
    ):
      packing.best_fit(np.array([1, 5]), 4)


class PackerTest(parameterized.TestCase):
  @hypothesis.given(
    seed=st.integers(0, 2**32 - 1), parts=st.sampled_from([1, 2])
  )
  def test_each_text_once(self, seed, parts):
    rng = np.random.default_rng(seed)
    counts = np.stack([rng.integers(1, 7, 8), rng.integers(0, 9, 8)], axis=1)
    batch = _batch(counts, seed)
    pack = packing.plan(
      16, [(counts[:, 0], counts[:, 1])], num_parts=parts, multiple=2
    )
    packed = pack(batch)
    ids, segments = packed["packed_ids"], packed["packed_segments"]
    self.assertEqual(ids.shape, (pack.num_rows * parts, 16))
    self.assertEqual(pack.num_rows % 2, 0)
    found = [
      tuple(ids[row, segments[row] == k])
      for row in range(len(ids))
      for k in range(1, segments[row].max() + 1)
    ]
    self.assertCountEqual(found, _texts(batch))
    # Places lead from each token of the batch to itself, within its part.
    for part in range(parts):
      mine = slice(part, None, parts)
      reads = np.take_along_axis(ids[mine], packed["packed_reads"][mine], 1)
      mask = batch["response_mask"][mine]
      np.testing.assert_array_equal(
        reads.ravel()[packed["packed_places"][mine]][mask],
        batch["response_ids"][mine][mask],
      )

  def test_replies_of_a_row(self):
    one = _batch([(2, 3), (2, 1), (3, 0), (3, 2)])
    batch = {name: x.reshape(2, 2, -1) for name, x in one.items()}
    pack = packing.Packer(8, num_rows=2, num_reads=5)
    packed = pack(batch)
    self.assertEqual(
      packed["packed_places"].shape, batch["response_mask"].shape
    )
    self.assertEqual(packed["packed_segments"].max(axis=1).tolist(), [2, 1])
    np.testing.assert_array_equal(packed["packed_ids"], pack(one)["packed_ids"])

  def test_plan_and_notes(self):
    draws = [
      (np.array([2, 2, 2]), np.array([6, 5, 1])),  # 8, 7, 3: three rows.
      (np.array([[1], [1]]), np.array([[2, 0], [1, 3]])),  # 3, 2, 4: two.
    ]
    pack = packing.plan(8, draws, padded=16)
    expected = packing.Packer(8, num_rows=3, num_reads=6, notes=pack.notes)
    self.assertEqual(pack, expected)
    # 18 + 9 tokens in 2 x 24 columns, of 7 texts in 16 columns each.
    self.assertIn("56% of these are no padding, 24% without", pack.notes[0])
    self.assertEqual(packing.plan(8, draws, multiple=4).num_rows, 4)

  def test_more_rows_than_planned(self):
    batch = _batch([(4, 4), (4, 4)])
    pack = packing.Packer(8, num_rows=1, num_reads=4)
    with self.assertRaisesRegex(ValueError, "needs 2 packed rows, and 1"):
      pack(batch)
    alone = dataclasses.replace(pack, multiple=4).alone(batch)
    self.assertEqual(alone["packed_ids"].shape, (4, 8))

  def test_off(self):
    batch = _batch([(1, 2)])
    pack = packing.plan(0, [])
    self.assertEqual(pack(batch), batch)
    self.assertEqual(pack.alone(batch), batch)


if __name__ == "__main__":
  absltest.main()
