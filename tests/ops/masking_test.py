"""Tests of masked reductions and of the masks themselves."""

import functools

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized
from hypothesis import strategies as st

from rljax.ops import masking
from tests import oracles

_SEEDS = st.integers(0, 2**32 - 1)
_jit_and_not = chex.variants(with_jit=True, without_jit=True)


def _batch(seed, shape=(8, 6)):
  """A random array, and a mask whose first rows are empty now and then."""
  rng = np.random.default_rng(seed)
  mask = rng.random(shape) < 0.7
  mask[: rng.integers(0, 3)] = False
  return rng.normal(1.0, 2.0, size=shape), mask


def _split(x):
  return x.reshape(4, -1, *x.shape[1:])


class MaskedSumTest(parameterized.TestCase):
  @_jit_and_not
  def test_hand_computed(self):
    x = jnp.array([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]])
    mask = jnp.array([[True, False, True], [False, True, False]])
    for axis, expected in (
      (None, 21.0),  # 1 + 4 + 16
      (0, [1.0, 16.0, 4.0]),
      (1, [5.0, 16.0]),
      ((0, 1), 21.0),
    ):
      sum_fn = self.variant(functools.partial(masking.masked_sum, axis=axis))
      np.testing.assert_allclose(sum_fn(x, mask), expected)

  def test_casts_to_float32(self):
    # In bfloat16 256 + 1 is 256.
    x = jnp.concatenate([jnp.full(1, 256.0), jnp.ones(9)]).astype(jnp.bfloat16)
    total = masking.masked_sum(x, jnp.ones(10, bool))
    self.assertEqual(total.dtype, jnp.float32)
    np.testing.assert_allclose(total, 265.0)

  def test_bad_input(self):
    x = jnp.zeros((2, 3))
    with self.assertRaises(AssertionError):
      masking.masked_sum(x, jnp.ones((2, 1), bool))
    with self.assertRaises(AssertionError):
      masking.masked_sum(x, jnp.ones((2, 3)))


class MaskedMeanTest(parameterized.TestCase):
  @_jit_and_not
  def test_hand_computed(self):
    x = jnp.array([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]])
    mask = jnp.array([[True, False, True], [False, False, False]])
    for axis, expected in (
      (None, 2.5),
      (0, [1.0, 0.0, 4.0]),
      (1, [2.5, 0.0]),  # An empty row has mean 0.
    ):
      mean_fn = self.variant(functools.partial(masking.masked_mean, axis=axis))
      np.testing.assert_allclose(mean_fn(x, mask), expected)

  @hypothesis.given(seed=_SEEDS)
  def test_matches_oracle(self, seed):
    x, mask = _batch(seed)
    np.testing.assert_allclose(
      masking.masked_mean(jnp.float32(x), mask),
      oracles.masked_mean(x, mask),
      rtol=1e-5,
      atol=1e-6,
    )

  @hypothesis.given(seed=_SEEDS)
  def test_masked_entries_are_inert(self, seed):
    x, mask = _batch(seed)
    x = jnp.float32(x)
    poisoned = jnp.where(mask, x, jnp.nan)
    mean_and_grad = jax.value_and_grad(masking.masked_mean)
    expected, expected_grad = mean_and_grad(x, mask)
    mean, grad = mean_and_grad(poisoned, mask)
    np.testing.assert_allclose(mean, expected)
    np.testing.assert_allclose(grad, expected_grad)
    np.testing.assert_allclose(
      grad, mask / np.float32(max(mask.sum(), 1)), rtol=1e-6
    )

  @hypothesis.given(seed=_SEEDS)
  def test_split_batch(self, seed):
    x, mask = _batch(seed)
    x = jnp.float32(x)
    mean_fn = functools.partial(masking.masked_mean, axis_name="shards")
    means = jax.vmap(mean_fn, axis_name="shards")(_split(x), _split(mask))
    expected = masking.masked_mean(x, mask)
    np.testing.assert_allclose(means, np.full(4, expected), rtol=1e-5)

  def test_split_batch_by_column(self):
    x, mask = _batch(0)
    x = jnp.float32(x)
    mean_fn = functools.partial(masking.masked_mean, axis=0, axis_name="shards")
    means = jax.vmap(mean_fn, axis_name="shards")(_split(x), _split(mask))
    expected = masking.masked_mean(x, mask, axis=0)
    np.testing.assert_allclose(means[2], expected, rtol=1e-5, atol=1e-6)


class MaskedVarianceTest(parameterized.TestCase):
  @_jit_and_not
  def test_hand_computed(self):
    # Mean 2 over (1, 3): squares 1 + 1, by 2 or by 2 - 1.
    x, mask = jnp.array([1.0, 3.0, 9.0]), jnp.array([True, True, False])
    for ddof, expected in ((0, 1.0), (1, 2.0)):
      variance_fn = self.variant(
        functools.partial(masking.masked_variance, ddof=ddof)
      )
      np.testing.assert_allclose(variance_fn(x, mask), expected)
      np.testing.assert_allclose(variance_fn(x, mask[::-1] & mask), 0.0)
      np.testing.assert_allclose(variance_fn(x, mask & False), 0.0)

  def test_large_offset(self):
    # The difference of E[x²] and E[x]² would lose every digit here.
    x = jnp.array([1e4, 1e4 + 1, 1e4 + 2])
    variance = masking.masked_variance(x, jnp.ones(3, bool))
    np.testing.assert_allclose(variance, 2 / 3, rtol=1e-5)

  def test_bad_input(self):
    with self.assertRaisesRegex(
      ValueError, "ddof must not be negative, got -1"
    ):
      masking.masked_variance(jnp.zeros(3), jnp.ones(3, bool), ddof=-1)


class MaskedWhitenTest(parameterized.TestCase):
  @chex.variants(with_jit=True, without_jit=True)
  @parameterized.parameters(
    (0, [-1.214143, -0.020934, 1.235077, 0.0]),
    (1, [-0.991344, -0.017092, 1.008436, 0.0]),
  )
  def test_hand_computed(self, ddof, expected):
    # Mean 0.567250, population variance 0.011553.
    x = jnp.array([[0.436750, 0.565, 0.7, 9.0]])
    mask = jnp.array([[True, True, True, False]])
    whiten = functools.partial(masking.masked_whiten, ddof=ddof)
    y = self.variant(whiten)(x, mask)
    np.testing.assert_allclose(y, [expected], atol=2e-6)
    unshifted = self.variant(functools.partial(whiten, shift_mean=False))
    np.testing.assert_allclose(
      unshifted(x, mask), [[e + 0.56725 for e in expected[:3]] + [0]], atol=2e-6
    )

  def test_unbiased_by_default(self):
    # One-token responses, score 1 or 0, value 0: unbiased variance 1/3.
    x = jnp.array([[1.0], [0.0], [0.0], [1.0]])
    y = masking.masked_whiten(x, jnp.ones((4, 1), bool))
    half_root = 0.8660254
    np.testing.assert_allclose(
      y[:, 0], [half_root, -half_root, -half_root, half_root], rtol=1e-5
    )

  def test_degenerate_batches(self):
    x = jnp.full((2, 3), 7.0)
    whiten = masking.masked_whiten
    full = jnp.ones((2, 3), bool)
    one = full.at[1].set(False).at[0, 1:].set(False)
    np.testing.assert_array_equal(whiten(x, full), np.zeros((2, 3)))
    np.testing.assert_array_equal(whiten(x, one), np.zeros((2, 3)))
    np.testing.assert_array_equal(whiten(x, ~full), np.zeros((2, 3)))

  @hypothesis.given(
    seed=_SEEDS,
    shift_mean=st.booleans(),
    ddof=st.integers(0, 1),
    epsilon=st.sampled_from([1e-8, 0.5]),
  )
  def test_matches_oracle(self, seed, shift_mean, ddof, epsilon):
    x, mask = _batch(seed)
    y = masking.masked_whiten(
      jnp.float32(x), mask, shift_mean=shift_mean, ddof=ddof, epsilon=epsilon
    )
    expected = oracles.masked_whiten(x, mask, shift_mean, ddof, epsilon)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)

  @hypothesis.given(seed=_SEEDS)
  def test_masked_entries_are_inert(self, seed):
    x, mask = _batch(seed)
    x = jnp.float32(x)
    poisoned = jnp.where(mask, x, jnp.nan)
    cotangent = jnp.float32(np.random.default_rng(seed).normal(size=x.shape))

    def loss_fn(x):
      y = masking.masked_whiten(x, mask)
      return jnp.sum(jnp.where(mask, cotangent * y, 0.0)), y

    (_, expected), expected_grad = jax.value_and_grad(loss_fn, has_aux=True)(x)
    (_, y), grad = jax.value_and_grad(loss_fn, has_aux=True)(poisoned)
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(grad, expected_grad)
    np.testing.assert_array_equal(np.asarray(grad)[~mask], 0.0)

  @hypothesis.given(seed=_SEEDS)
  def test_split_and_permuted_batch(self, seed):
    x, mask = _batch(seed)
    x = jnp.float32(x)
    expected = masking.masked_whiten(x, mask)
    whiten = functools.partial(masking.masked_whiten, axis_name="shards")
    y = jax.vmap(whiten, axis_name="shards")(_split(x), _split(mask))
    np.testing.assert_allclose(
      y.reshape(x.shape), expected, rtol=1e-4, atol=1e-5
    )
    order = np.random.default_rng(seed).permutation(x.shape[0])
    np.testing.assert_allclose(
      masking.masked_whiten(x[order], mask[order]),
      expected[order],
      rtol=1e-4,
      atol=1e-5,
    )

  def test_bad_input(self):
    x, mask = jnp.zeros((1, 3)), jnp.ones((1, 3), bool)
    with self.assertRaisesRegex(ValueError, "epsilon must be positive, got 0"):
      masking.masked_whiten(x, mask, epsilon=0.0)
    with self.assertRaisesRegex(
      ValueError, "ddof must not be negative, got -1"
    ):
      masking.masked_whiten(x, mask, ddof=-1)


class ResponseMaskTest(parameterized.TestCase):
  @_jit_and_not
  def test_hand_computed(self):
    ids = jnp.array(
      [
        [5, 6, 2, 0],  # Ends at its 2; what follows is padding.
        [5, 6, 7, 8],  # Never ends.
        [2, 2, 5, 2],  # Ends at once; later stops change nothing.
        [5, 3, 2, 3],  # Ends at the first of either stop.
      ]
    )
    mask_fn = self.variant(
      functools.partial(masking.response_mask, stop_ids=(2, 3))
    )
    expected = np.array(
      [[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]], bool
    )
    mask = mask_fn(ids)
    self.assertEqual(mask.dtype, bool)
    np.testing.assert_array_equal(mask, expected)

  @_jit_and_not
  def test_no_stop_ids_and_lengths(self):
    ids = jnp.array([[5, 6, 2, 0], [5, 6, 7, 8]])
    all_true = self.variant(
      functools.partial(masking.response_mask, stop_ids=())
    )
    np.testing.assert_array_equal(all_true(ids), np.ones((2, 4), bool))
    lengths = jnp.array([4, 2])
    mask = self.variant(
      lambda ids, lengths: masking.response_mask(ids, (2,), lengths=lengths)
    )(ids, lengths)
    np.testing.assert_array_equal(
      mask, np.array([[1, 1, 1, 0], [1, 1, 0, 0]], bool)
    )

  @hypothesis.given(
    seed=_SEEDS, stop_ids=st.sampled_from([(), (0,), (1, 3), (9,)])
  )
  def test_matches_oracle(self, seed, stop_ids):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 5, (6, 7), dtype=np.int32)
    lengths = rng.integers(0, 8, 6, dtype=np.int32)
    np.testing.assert_array_equal(
      masking.response_mask(ids, stop_ids),
      oracles.response_mask(ids, stop_ids),
    )
    np.testing.assert_array_equal(
      masking.response_mask(ids, stop_ids, lengths=lengths),
      oracles.response_mask(ids, stop_ids, lengths),
    )

  def test_bad_input(self):
    with self.assertRaisesRegex(ValueError, "stop_ids must not be negative"):
      masking.response_mask(jnp.zeros((1, 2), int), (-1,))
    with self.assertRaises(AssertionError):
      masking.response_mask(jnp.zeros((1, 2)), (1,))
    with self.assertRaises(AssertionError):
      masking.response_mask(
        jnp.zeros((1, 2), int), (1,), lengths=jnp.zeros(3, int)
      )
