"""Tests of alignments: values by hand, an oracle, properties and chunks."""

import functools
import itertools
from unittest import mock

import hypothesis
import numpy as np
from absl.testing import absltest, parameterized
from hypothesis import strategies as st

from rljax.text import alignment

# Sample, rewrite, distance, edited tokens of the rewrite in the clean and in
# the reference mode, dropped tokens of the sample. 2 is the end token.
CASES = {
  "substitute": ("56782", "56982", 1, "00100", "00100", "00100"),
  "insert": ("5682", "56782", 1, "00100", "00100", "0000"),
  "delete": ("56782", "5682", 1, "0000", "0100", "00100"),
  "identical": ("5672", "5672", 0, "0000", "0000", "0000"),
  "insert_at_start": ("672", "5672", 1, "1000", "0000", "000"),
  "substitute_at_start": ("4672", "5672", 1, "1000", "1000", "1000"),
  # 10 11 12 13 14 2 and 10 12 13 15 16 2.
  "mixed": ("abcde2", "acdfg2", 3, "000110", "100110", "010010"),
  "delete_at_start": ("4562", "562", 1, "000", "000", "1000"),
  "two_errors": ("318a1892", "317a1792", 2, "00100100", "00100100", "00100100"),
  "disjoint": ("562", "7892", 3, "1110", "1110", "110"),
  # Deletion and insertion cost the same, substitution more.
  "tie": ("343", "434", 2, "100", "001", "001"),
  "empty_sample": ("2", "562", 2, "110", "000", "0"),
}

# Few different tokens, so that there are many paths of the same cost; one of
# them is what pairs are padded with.
TOKENS = st.lists(st.integers(0, 3), max_size=9)
PAIRS = st.lists(st.tuples(TOKENS, TOKENS), max_size=12)


def _ids(text):
  """A token per character."""
  return [ord(c) for c in text]


def _digits(mask):
  return "".join(str(int(x)) for x in mask)


def _oracle(sample, rewrite, mode):
  """Distance, edited and dropped, straight from the rules, cell by cell."""

  @functools.cache
  def f(i, j):
    if i == 0 or j == 0:
      return i + j
    if sample[i - 1] == rewrite[j - 1]:
      return f(i - 1, j - 1)
    return 1 + min(f(i - 1, j - 1), f(i - 1, j), f(i, j - 1))

  i, j = len(sample), len(rewrite)
  edited, dropped = [False] * j, [False] * i
  while (i and j) if mode == "reference" else (i or j):
    if i and j and sample[i - 1] == rewrite[j - 1]:
      i, j = i - 1, j - 1
      continue
    substitution = (f(i - 1, j - 1), "s") if i and j else (np.inf, "")
    deletion = (f(i - 1, j), "d") if i else (np.inf, "")
    insertion = (f(i, j - 1), "i") if j else (np.inf, "")
    if mode == "reference":
      options = [deletion, insertion, substitution]
    else:
      options = [substitution, deletion, insertion]
    # The first of several that cost the same.
    move = min(options, key=lambda option: option[0])[1]
    if j and (move in "si" or mode == "reference"):
      edited[j - 1] = True
    if move in "sd":
      dropped[i - 1] = True
    i, j = i - (move in "sd"), j - (move in "si")
  return f(len(sample), len(rewrite)), edited, dropped


class AlignTest(parameterized.TestCase):
  @parameterized.named_parameters((n, *case) for n, case in CASES.items())
  def test_by_hand(self, sample, rewrite, distance, clean, reference, dropped):
    for mode, edited in (("clean", clean), ("reference", reference)):
      found = alignment.align(_ids(sample), _ids(rewrite), mode=mode)
      self.assertEqual(found.distance, distance)
      self.assertEqual(_digits(found.edited), edited, mode)
      self.assertEqual(_digits(found.dropped), dropped, mode)
      weights = alignment.imitation_weights(found)
      expected = [1.0 if c == "1" else 0.5 for c in edited]
      np.testing.assert_array_equal(weights, expected)
      self.assertEqual(weights.dtype, np.float32)
      self.assertEqual(found.edited.dtype, bool)
      self.assertEqual(found.dropped.dtype, bool)
      self.assertIsInstance(found.distance, int)

  def test_table_by_hand(self):
    sample, rewrite = CASES["mixed"][:2]
    ends = list(itertools.product(range(7), repeat=2))
    found = alignment.distances(
      [_ids(sample[:i]) for i, _ in ends],
      [_ids(rewrite[:j]) for _, j in ends],
    )
    expected = [
      [0, 1, 2, 3, 4, 5, 6],
      [1, 0, 1, 2, 3, 4, 5],
      [2, 1, 1, 2, 3, 4, 5],
      [3, 2, 1, 2, 3, 4, 5],
      [4, 3, 2, 1, 2, 3, 4],
      [5, 4, 3, 2, 2, 3, 4],
      [6, 5, 4, 3, 3, 3, 3],
    ]
    np.testing.assert_array_equal(found.reshape(7, 7), expected)

  @parameterized.parameters(
    (
      "12+5=18|3*18=54;A54$",
      "12+5=17|3*17=51;A51$",
      4,
      [6, 11, 14, 18],
      [6, 11, 14, 18],
      [6, 11, 14, 18],
    ),
    (
      # The "=" and ";" before the two deleted digits in reference mode.
      "95+7=12;12-4=8|A8$",
      "95+7=2;2-4=98|A98$",
      4,
      [11, 15],
      [4, 6, 11, 15],
      [5, 8],
    ),
  )
  def test_programmed_rewrites(
    self, sample, rewrite, distance, clean, reference, dropped
  ):
    for mode, edited in (("clean", clean), ("reference", reference)):
      found = alignment.align(_ids(sample), _ids(rewrite), mode=mode)
      self.assertEqual(found.distance, distance)
      self.assertEqual(np.flatnonzero(found.edited).tolist(), edited, mode)
      self.assertEqual(np.flatnonzero(found.dropped).tolist(), dropped)

  def test_distances_to_all_variants(self):
    variants = [
      f"{first}{a}{second}{b}A51$"
      for first in ("12+5=17", "5+12=17")
      for second in ("3*17=51", "17*3=51")
      for a in ";|"
      for b in ";|"
    ]
    sample = _ids("12+5=18|3*18=54;A54$")
    found = alignment.distances(
      [sample] * 16, [_ids(text) for text in variants]
    )
    self.assertEqual(
      sorted(found.tolist()),
      [4, 5, 5, 6, 7, 8, 8, 8, 9, 9, 9, 10, 11, 12, 12, 13],
    )
    self.assertEqual(variants[found.argmin()], "12+5=17|3*17=51;A51$")

  @parameterized.parameters(253, 254, 255, 256)
  def test_distances_over_a_byte(self, size):
    sample, rewrite = np.arange(size), np.arange(size) + 1000
    found = alignment.align(sample, rewrite)
    self.assertEqual(found.distance, size)
    self.assertTrue(found.edited.all() and found.dropped.all())
    self.assertEqual(alignment.align(sample, sample).distance, 0)
    self.assertEqual(alignment.align(sample, []).distance, size)

  def test_ids_of_any_integer_type(self):
    # Equal in their low 32 bits.
    self.assertEqual(alignment.align([1], [1 + 2**32]).distance, 1)
    a = np.array([1, 2, 250], np.uint8)
    b = np.array([1, 2, -6], np.int8)
    self.assertEqual(alignment.align(a, b).distance, 1)
    self.assertEqual(alignment.align(a, a.astype(np.int64)).distance, 0)

  def test_empty(self):
    for mode in alignment.MODES:
      found = alignment.align([], [], mode=mode)
      self.assertEqual(found.distance, 0)
      self.assertEqual((found.edited.size, found.dropped.size), (0, 0))
      self.assertEqual(alignment.align_pairs([], [], mode=mode), [])
    self.assertEqual(alignment.distances([], []).shape, (0,))
    found = alignment.align([], [5, 6])
    self.assertEqual(_digits(found.edited), "11")
    self.assertEqual(_digits(alignment.align([5, 6], []).dropped), "11")
    found = alignment.align([], [5, 6], mode="reference")
    self.assertEqual((found.distance, _digits(found.edited)), (2, "00"))

  def test_other_weights(self):
    found = alignment.align(_ids("562"), _ids("572"))
    weights = alignment.imitation_weights(found, edited=3.0, kept=0.25)
    np.testing.assert_array_equal(weights, [0.25, 3.0, 0.25])

  @hypothesis.given(pairs=PAIRS, mode=st.sampled_from(alignment.MODES))
  def test_matches_oracle(self, pairs, mode):
    samples, rewrites = [a for a, _ in pairs], [b for _, b in pairs]
    found = alignment.align_pairs(samples, rewrites, mode=mode)
    self.assertLen(found, len(pairs))
    for one, (sample, rewrite) in zip(found, pairs, strict=True):
      distance, edited, dropped = _oracle(sample, rewrite, mode)
      self.assertEqual(one.distance, distance)
      np.testing.assert_array_equal(one.edited, np.array(edited, bool))
      if mode == "reference":
        _, _, dropped = _oracle(sample, rewrite, "clean")
      np.testing.assert_array_equal(one.dropped, np.array(dropped, bool))
    np.testing.assert_array_equal(
      alignment.distances(samples, rewrites), [one.distance for one in found]
    )

  @parameterized.parameters(*alignment.MODES)
  def test_all_short_pairs_match_oracle(self, mode):
    texts = [x for n in range(5) for x in itertools.product((0, 1), repeat=n)]
    samples, rewrites = zip(*itertools.product(texts, repeat=2), strict=True)
    found = alignment.align_pairs(samples, rewrites, mode=mode)
    for one, *pair in zip(found, samples, rewrites, strict=True):
      distance, edited, dropped = _oracle(*pair, mode)
      self.assertEqual(one.distance, distance, pair)
      self.assertEqual(one.edited.tolist(), edited, pair)
      if mode == "clean":
        self.assertEqual(one.dropped.tolist(), dropped, pair)

  @hypothesis.given(sample=TOKENS, rewrite=TOKENS)
  def test_properties(self, sample, rewrite):
    found = alignment.align(sample, rewrite)
    kept = np.array(rewrite)[~found.edited]
    # What is kept is the same text on both sides.
    np.testing.assert_array_equal(np.array(sample)[~found.dropped], kept)
    num_edited, num_dropped = found.edited.sum(), found.dropped.sum()
    # Each edit marks a token of the rewrite, of the sample, or of both.
    self.assertBetween(
      found.distance, max(num_edited, num_dropped), num_edited + num_dropped
    )
    self.assertEqual(found.distance == 0, sample == rewrite)
    self.assertEqual(found.distance, alignment.align(rewrite, sample).distance)

  def test_long_pairs_with_few_edits(self):
    rng = np.random.default_rng(0)
    sample = rng.permutation(5_000)[:700]
    rewrite = np.delete(sample, [100, 101, 400])
    rewrite[[50, 600]] = [7_000, 7_001]
    rewrite = np.insert(rewrite, 300, [8_000, 8_001])
    found = alignment.align(sample, rewrite)
    self.assertEqual(found.distance, 7)
    # 600 is behind the two that went in.
    self.assertEqual(np.flatnonzero(found.edited).tolist(), [50, 300, 301, 602])
    # What stood at 600 without the three that are gone.
    self.assertEqual(
      np.flatnonzero(found.dropped).tolist(), [50, 100, 101, 400, 603]
    )


class AlignPairsTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    rng = np.random.default_rng(0)
    # Sizes from nothing to thirty, and pairs of very different sizes.
    self.samples = [
      rng.integers(0, 4, size) for size in rng.integers(0, 31, 60)
    ]
    self.rewrites = [
      rng.integers(0, 4, size) for size in rng.integers(0, 31, 60)
    ]

  def _assert_same(self, found, expected):
    for a, b in zip(found, expected, strict=True):
      self.assertEqual(a.distance, b.distance)
      np.testing.assert_array_equal(a.edited, b.edited)
      np.testing.assert_array_equal(a.dropped, b.dropped)

  @parameterized.parameters(*alignment.MODES)
  def test_batch_and_order_do_not_matter(self, mode):
    pairs = list(zip(self.samples, self.rewrites, strict=True))
    alone = [alignment.align(*pair, mode=mode) for pair in pairs]
    for seed in range(3):
      order = np.random.default_rng(seed).permutation(len(pairs))
      found = alignment.align_pairs(
        [self.samples[row] for row in order],
        [self.rewrites[row] for row in order],
        mode=mode,
      )
      self._assert_same(found, [alone[row] for row in order])

  @parameterized.parameters(*alignment.MODES)
  def test_chunks_do_not_matter(self, mode):
    whole = alignment.align_pairs(self.samples, self.rewrites, mode=mode)
    with mock.patch.object(
      alignment, "_Chunk", wraps=alignment._Chunk
    ) as chunk:
      for max_cells, least, most in (
        (1, 60, 60),
        (5_000, 5, 30),
        (10**9, 1, 1),
      ):
        chunk.reset_mock()
        found = alignment.align_pairs(
          self.samples, self.rewrites, mode=mode, max_cells=max_cells
        )
        self._assert_same(found, whole)
        self.assertBetween(chunk.call_count, least, most)
        num_pairs = 0
        for call in chunk.call_args_list:
          samples, rewrites = call.args
          num_pairs += len(samples)
          cells = len(samples) * max(map(len, samples))
          if len(samples) > 1:
            self.assertLessEqual(cells * max(map(len, rewrites)), max_cells)
        self.assertEqual(num_pairs, 60)
        chunk.reset_mock()
        np.testing.assert_array_equal(
          alignment.distances(self.samples, self.rewrites, max_cells=max_cells),
          [one.distance for one in whole],
        )
        self.assertBetween(chunk.call_count, least, most)

  def test_chunks_hold_pairs_of_one_size(self):
    def chunks(sizes, max_cells):
      samples, rewrites = zip(*sizes, strict=True)
      return list(
        alignment._chunks(
          map(np.zeros, samples), map(np.zeros, rewrites), max_cells
        )
      )

    # Tables of 100, 4, 4 and 100 cells.
    self.assertEqual(
      chunks([(9, 9), (1, 1), (1, 1), (9, 9)], 200), [[1, 2], [0, 3]]
    )
    # Tables of 10 cells; two of different shapes are padded to 100 each.
    self.assertEqual(chunks([(9, 0), (0, 9), (0, 9)], 20), [[0], [1, 2]])

  def test_alignments_hold_no_more_than_their_own(self):
    for one in alignment.align_pairs(self.samples, self.rewrites):
      self.assertIsNone(one.edited.base)
      self.assertIsNone(one.dropped.base)

  def test_bad_input(self):
    with self.assertRaisesRegex(ValueError, 'clean" or "reference", got \'cl'):
      alignment.align([1], [1], mode="cl")
    with self.assertRaisesRegex(ValueError, "got 2 samples and 1 rewrites"):
      alignment.align_pairs([[1], [2]], [[1]])
    with self.assertRaisesRegex(ValueError, "got 1 samples and 0 rewrites"):
      alignment.distances([[1]], [])
    with self.assertRaisesRegex(ValueError, r"samples\[1\] .* float64 of sh"):
      alignment.align_pairs([[1], [1.5]], [[1], [1]])
    with self.assertRaisesRegex(ValueError, r"rewrites\[0\] .* \(1, 2\)"):
      alignment.align([1], [[1, 2]])
    with self.assertRaisesRegex(ValueError, r"samples\[0\] .* shape \(\)"):
      alignment.align("12", [1])
    with self.assertRaisesRegex(ValueError, r"samples\[0\] .* bool"):
      alignment.align([True], [1])
    with self.assertRaisesRegex(ValueError, r"rewrites\[0\] .* \(0, 3\)"):
      alignment.align([1], np.zeros((0, 3), np.int32))


if __name__ == "__main__":
  absltest.main()
