"""Tests of truncation and of drawing tokens."""

import functools

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized
from hypothesis import strategies as st

from rljax.ops import log_probs, sampling
from tests import oracles

SEEDS = st.integers(0, 2**32 - 1)
NUCLEUS = np.log([[0.12, 0.5, 0.05, 0.25, 0.08]])
LARGEST_UNIFORM = np.float32(1 - 2**-24)

_inverse_cdf = jax.jit(sampling.inverse_cdf)


def _kept(logits):
  return np.asarray(logits) > log_probs.FORBIDDEN_LOGIT / 2


def _rows(seed, vocab_size=9, num_rows=3):
  rng = np.random.default_rng(seed)
  return (2 * rng.normal(size=(num_rows, vocab_size))).astype(np.float32)


class ForbiddenTest(parameterized.TestCase):
  """Forbidden tokens are never drawn, whatever the others look like."""

  ALLOWED = (False, True, False, True, True, False)
  ROWS = (
    (9.0, -100.0, 50.0, -101.0, -102.0, 3.0),
    (0.0,) * 6,
    (-np.inf,) * 6,
    (np.nan,) * 6,
    (1.0, np.nan, 2.0, -3.0, -np.inf, 4.0),
    (0.0, -2e9, 0.0, -3e9, -4e9, 0.0),
    (3e38, -3e38, 3e38, -3e38, -3e38, 3e38),
    (1.0, np.inf, 1.0, -np.inf, 3.0, 1.0),
    (5.0, -np.inf, 5.0, -np.inf, -3.0, 5.0),
  )

  @parameterized.product(
    dtype=("float32", "bfloat16", "float16"),
    settings=(
      sampling.Settings(),
      sampling.Settings(top_k=5, top_p=0.9999, min_p=1e-30),
    ),
  )
  def test_no_forbidden_token_is_drawn(self, dtype, settings):
    allowed = np.array(self.ALLOWED)
    with np.errstate(over="ignore"):
      logits = jnp.asarray(np.float32(self.ROWS)).astype(dtype)

    @functools.partial(jax.jit, static_argnums=0)
    def draw(temperature):
      cut = sampling.truncate(
        log_probs.masked_logits(
          logits, temperature=temperature, allowed=jnp.asarray(allowed)
        ),
        settings,
      )
      uniforms = jnp.linspace(0, 1, 9)
      drawn = jax.vmap(
        lambda u: sampling.inverse_cdf(cut, jnp.broadcast_to(u, cut.shape[:1]))
      )(uniforms)
      return drawn, sampling.greedy(cut)

    for temperature in (1e-45, 1.0):
      drawn, greedy = draw(temperature)
      self.assertTrue(allowed[np.asarray(drawn)].all(), temperature)
      self.assertTrue(allowed[np.asarray(greedy)].all(), temperature)

  def test_a_tiny_temperature_draws_the_likeliest_allowed_token(self):
    logits = jnp.array([[9.0, -101.0, 50.0, -100.0, -102.0, 3.0]])
    allowed = jnp.array(self.ALLOWED)
    for temperature in (1e-45, 1e-30, 1e-9):
      masked = log_probs.masked_logits(
        logits, temperature=temperature, allowed=allowed
      )
      np.testing.assert_array_equal(
        jax.nn.softmax(masked), [[0, 0, 0, 1, 0, 0]]
      )
      np.testing.assert_array_equal(
        log_probs.token_log_probs(
          logits[None],
          jnp.array([[3]]),
          temperature=temperature,
          allowed=allowed,
        ),
        [[0.0]],
      )

  def test_allowed_tokens_at_minus_infinity_are_equally_likely(self):
    masked = log_probs.masked_logits(
      jnp.full((1, 6), -jnp.inf), allowed=jnp.array(self.ALLOWED)
    )
    np.testing.assert_allclose(
      jax.nn.softmax(masked), [[0, 1 / 3, 0, 1 / 3, 1 / 3, 0]], rtol=1e-6
    )

  def test_truncation_alone_keeps_its_distance(self):
    # What is cut lies at -1e9, below which these tokens would fall.
    logits = jnp.array([[-2e9, -3e9, -2.5e9]])
    for cut in (sampling.top_k(logits, 1), sampling.top_p(logits, 0.5)):
      np.testing.assert_array_equal(jax.nn.softmax(cut), [[1, 0, 0]])


class TruncationTest(parameterized.TestCase):
  @chex.variants(with_jit=True, without_jit=True)
  def test_top_k_by_hand(self):
    fn = self.variant(functools.partial(sampling.top_k, k=2))
    logits = jnp.array([[3.0, 1.0, 2.0, -1.0], [0.0, 5.0, 0.0, -1.0]])
    # The second row's second place is shared: both stay.
    np.testing.assert_array_equal(
      fn(logits), [[3.0, -1e9, 2.0, -1e9], [0.0, 5.0, 0.0, -1e9]]
    )

  @chex.variants(with_jit=True, without_jit=True)
  def test_top_p_by_hand(self):
    fn = self.variant(functools.partial(sampling.top_p, p=0.9))
    # Sorted: .5 .75 .87 .95 1. The fourth crosses .9 and stays.
    found = fn(jnp.float32(NUCLEUS))
    np.testing.assert_array_equal(
      _kept(found), [[True, True, False, True, True]]
    )
    np.testing.assert_allclose(
      jax.nn.softmax(found),
      [[0.126316, 0.526316, 0.0, 0.263158, 0.084211]],
      atol=1e-6,
    )

  @parameterized.parameters(
    (0.01, 1), (0.49, 1), (0.51, 2), (0.74, 2), (0.76, 3), (0.94, 4), (0.96, 5)
  )
  def test_top_p_counts(self, p, count):
    self.assertEqual(
      _kept(sampling.top_p(jnp.float32(NUCLEUS), p)).sum(), count
    )

  def test_top_p_keeps_ties(self):
    # A quarter each: one would reach .2, but none is before the others.
    self.assertEqual(_kept(sampling.top_p(jnp.zeros((1, 4)), 0.2)).sum(), 4)

  @chex.variants(with_jit=True, without_jit=True)
  def test_min_p_by_hand(self):
    fn = self.variant(functools.partial(sampling.min_p, p=0.2))
    # At least .2 * .5 = .1: .12, .5 and .25.
    np.testing.assert_array_equal(
      _kept(fn(jnp.float32(NUCLEUS))), [[True, True, False, True, False]]
    )

  @hypothesis.given(
    seed=SEEDS,
    k=st.integers(1, 9),
    p=st.floats(0.05, 0.99),
    m=st.floats(0.01, 0.9),
  )
  def test_matches_oracle(self, seed, k, p, m):
    logits = _rows(seed)
    logits[0] = np.round(logits[0])  # With ties.
    for fn, oracle, setting in (
      (sampling.top_k, oracles.kept_by_top_k, k),
      (sampling.top_p, oracles.kept_by_top_p, p),
      (sampling.min_p, oracles.kept_by_min_p, m),
    ):
      found = fn(jnp.asarray(logits), setting)
      expected = np.stack([oracle(row, setting) for row in logits])
      np.testing.assert_array_equal(_kept(found), expected)
      np.testing.assert_array_equal(
        found, np.where(expected, logits, np.float32(-1e9))
      )

  def test_neutral_settings_keep_all(self):
    logits = jnp.asarray(_rows(0))
    for found in (
      sampling.top_k(logits, 0),
      sampling.top_k(logits, 9),
      sampling.top_k(logits, 10),
      sampling.top_p(logits, 1.0),
      sampling.min_p(logits, 0.0),
      sampling.truncate(logits, sampling.Settings()),
      sampling.forbid(logits, None),
      sampling.temperature(logits, 1.0),
    ):
      np.testing.assert_array_equal(found, logits)

  def test_large_vocabulary(self):
    logits = np.random.default_rng(0).normal(size=(2, 5000))
    found = sampling.top_p(jnp.float32(logits), 0.9)
    for row, kept in zip(logits, _kept(found), strict=True):
      probs = np.sort(oracles.probabilities(row))[::-1]
      expected = np.searchsorted(np.cumsum(probs), 0.9) + 1
      # Float32 sums of 5000 terms: one token more or less may cross.
      self.assertLessEqual(abs(kept.sum() - expected), 1)
      self.assertGreater(row[kept].min(), row[~kept].max())

  def test_forbidden_tokens_stay_out(self):
    allowed = jnp.array([True, False, True, False, True])
    logits = sampling.forbid(jnp.float32(NUCLEUS), allowed)
    np.testing.assert_array_equal(_kept(logits)[0], allowed)
    settings = sampling.Settings(top_k=4, top_p=0.999999, min_p=1e-6)
    np.testing.assert_array_equal(
      _kept(sampling.truncate(logits, settings))[0], allowed
    )

  def test_truncate_renormalises_in_order(self):
    logits = jnp.log(jnp.array([[0.4, 0.3, 0.2, 0.1]]))
    # top_k leaves .444 .333 .222, of which two reach .75. On the whole
    # distribution two hold only .7.
    settings = sampling.Settings(top_k=3, top_p=0.75)
    self.assertEqual(_kept(sampling.truncate(logits, settings)).sum(), 2)
    self.assertEqual(_kept(sampling.top_p(logits, 0.75)).sum(), 3)
    # min_p compares with the largest, and works on what the others left.
    settings = sampling.Settings(top_k=3, top_p=0.95, min_p=0.7)
    self.assertEqual(_kept(sampling.truncate(logits, settings)).sum(), 2)

  def test_any_leading_shape(self):
    logits = jnp.asarray(_rows(0, num_rows=6))
    settings = sampling.Settings(top_k=5, top_p=0.8, min_p=0.05)
    flat = sampling.truncate(logits, settings)
    deep = sampling.truncate(logits.reshape(2, 3, 9), settings)
    np.testing.assert_array_equal(deep.reshape(6, 9), flat)
    chex.assert_trees_all_equal(sampling.truncate(logits[0], settings), flat[0])

  @parameterized.parameters(
    (sampling.top_k, -1, "k must not be negative, got -1"),
    (sampling.top_p, 0.0, r"p must be in \(0, 1\], got 0.0"),
    (sampling.min_p, 1.5, r"p must be in \[0, 1\], got 1.5"),
    (sampling.temperature, 0.0, "temperature must be positive, got 0.0"),
  )
  def test_bad_settings(self, fn, setting, message):
    with self.assertRaisesRegex(ValueError, message):
      fn(jnp.zeros((1, 3)), setting)


class SettingsTest(parameterized.TestCase):
  def test_truncates(self):
    self.assertFalse(sampling.Settings(temperature=0.3, greedy=True).truncates)
    self.assertTrue(sampling.Settings(top_k=1).truncates)
    self.assertTrue(sampling.Settings(top_p=0.99).truncates)
    self.assertTrue(sampling.Settings(min_p=0.01).truncates)

  def test_is_a_static_argument(self):
    fn = jax.jit(sampling.truncate, static_argnames="settings")
    logits = jnp.asarray(_rows(0))
    fn(logits, settings=sampling.Settings(top_k=2))
    found = fn(logits, settings=sampling.Settings(top_k=2))
    self.assertEqual(fn._cache_size(), 1)
    np.testing.assert_array_equal(_kept(found).sum(axis=-1), 2)

  @parameterized.parameters(
    (dict(temperature=0.0), "temperature must be .* got 0.0; set greedy=True"),
    (dict(temperature=float("nan")), "temperature must be .* got nan"),
    (dict(temperature=float("inf")), "temperature must be .* got inf"),
    (dict(top_k=-1), "top_k must be .* got -1"),
    (dict(top_k=1.5), "top_k must be .* got 1.5"),
    (dict(top_p=0.0), r"top_p must be in \(0, 1\].* got 0.0"),
    (dict(top_p=1.1), r"top_p must be in \(0, 1\].* got 1.1"),
    (dict(min_p=-0.1), r"min_p must be in \[0, 1\].* got -0.1"),
    (dict(min_p=2), r"min_p must be in \[0, 1\].* got 2"),
  )
  def test_bad_values(self, settings, message):
    with self.assertRaisesRegex(ValueError, message):
      sampling.Settings(**settings)


class GreedyTest(parameterized.TestCase):
  @chex.variants(with_jit=True, without_jit=True)
  def test_first_of_the_largest(self):
    fn = self.variant(sampling.greedy)
    logits = jnp.array([[0.0, 2.0, 2.0], [-1e9, -1e9, -3.0], [1.0, 0.0, 0.0]])
    found = fn(logits)
    chex.assert_type(found, jnp.int32)
    np.testing.assert_array_equal(found, [1, 2, 0])
    np.testing.assert_array_equal(fn(logits[0]), 1)

  def test_equals_argmax(self):
    logits = _rows(0, vocab_size=3000, num_rows=20)
    np.testing.assert_array_equal(
      sampling.greedy(jnp.asarray(logits)), logits.argmax(axis=-1)
    )


class InverseCdfTest(parameterized.TestCase):
  @chex.variants(with_jit=True, without_jit=True)
  def test_hand_computed(self):
    fn = self.variant(sampling.inverse_cdf)
    # Cumulative: .25, .25, .75, 1.
    logits = jnp.log(jnp.array([0.25, 0.0, 0.5, 0.25]))
    uniforms = jnp.array([0.0, 0.24, 0.26, 0.74, 0.76, 0.999])
    found = fn(jnp.broadcast_to(logits, (6, 4)), uniforms)
    chex.assert_type(found, jnp.int32)
    np.testing.assert_array_equal(found, [0, 0, 2, 2, 3, 3])
    # A token's share includes its lower end: a quarter each, exactly.
    found = fn(jnp.zeros((4, 4)), jnp.array([0.0, 0.25, 0.5, 0.75]))
    np.testing.assert_array_equal(found, [0, 1, 2, 3])

  # One level; two levels, the last block full, ragged, and of one token.
  @parameterized.parameters(5, 1024, 1280, 1500, 1409)
  def test_inverts_the_distribution_function(self, vocab_size):
    logits = _rows(vocab_size, vocab_size, num_rows=50)
    uniforms = np.random.default_rng(1).random(50).astype(np.float32)
    ids = np.asarray(_inverse_cdf(logits, uniforms))
    for row, uniform, k in zip(logits, uniforms, ids, strict=True):
      sums = np.cumsum(oracles.probabilities(row))
      self.assertLess(sums[k - 1] if k else 0.0, uniform + 1e-5)
      self.assertGreater(sums[k], uniform - 1e-5)

  @hypothesis.given(
    seed=SEEDS, num_allowed=st.integers(1, 40), scale=st.floats(0.0, 60.0)
  )
  def test_never_draws_a_forbidden_token(self, seed, num_allowed, scale):
    rng = np.random.default_rng(seed)
    for vocab_size in (300, 1500):
      logits = scale * rng.normal(size=(24, vocab_size))
      allowed = np.zeros(logits.shape, bool)
      for row in allowed:
        row[rng.choice(vocab_size - 2, num_allowed, replace=False) + 1] = True
      logits = log_probs.masked_logits(jnp.float32(logits), allowed=allowed)
      random = rng.random(21).astype(np.float32)
      uniforms = np.concatenate([[0.0, LARGEST_UNIFORM, 1.0], random])
      ids = np.asarray(_inverse_cdf(logits, jnp.float32(uniforms)))
      self.assertTrue(allowed[np.arange(24), ids].all())

  @parameterized.parameters(6, 1400)
  def test_edge_uniforms_with_forbidden_ends(self, vocab_size):
    allowed = np.ones(vocab_size, bool)
    allowed[[0, -1]] = False
    for logits in (
      np.zeros(vocab_size),
      np.linspace(30.0, -30.0, vocab_size),
      np.linspace(-30.0, 30.0, vocab_size),
    ):
      logits = log_probs.masked_logits(jnp.float32(logits), allowed=allowed)
      ids = _inverse_cdf(
        jnp.broadcast_to(logits, (3, vocab_size)),
        jnp.array([0.0, LARGEST_UNIFORM, 1.0]),
      )
      self.assertTrue(allowed[ids].all())
      self.assertLessEqual(ids[0], ids[1])
    # Evenly: the first and the last allowed token.
    ids = _inverse_cdf(
      log_probs.masked_logits(jnp.zeros((2, vocab_size)), allowed=allowed),
      jnp.array([0.0, LARGEST_UNIFORM]),
    )
    np.testing.assert_array_equal(ids, [1, vocab_size - 2])

  def test_sums_that_round_never_reach_a_zero(self):
    # Sums that are added in varying order differ by a rounding, on either side
    # of a long run of zeros: no uniform number may land in it.
    rng = np.random.default_rng(0)
    logits = rng.normal(size=1024).astype(np.float32)
    logits[300:900] = -np.inf
    weights = np.exp(np.float64(logits))
    middle = weights[:300].sum() / weights.sum()
    uniforms = np.float32(middle + np.linspace(-1e-5, 1e-5, 400))
    ids = np.asarray(
      _inverse_cdf(np.broadcast_to(logits, (400, 1024)), uniforms)
    )
    self.assertFalse(((ids >= 300) & (ids < 900)).any())
    self.assertContainsSubset([299, 900], ids)

  def test_one_possible_token(self):
    for index in (0, 700, 1399):
      logits = np.full((2, 1400), -1e9, np.float32)
      logits[:, index] = -5e8  # Far below 0, and still the only one.
      ids = _inverse_cdf(logits, jnp.array([0.0, LARGEST_UNIFORM]))
      np.testing.assert_array_equal(ids, index)

  def test_rows_are_independent(self):
    logits = _rows(3, 1500, num_rows=8)
    uniforms = np.random.default_rng(2).random(8).astype(np.float32)
    whole = _inverse_cdf(logits, uniforms)
    for n in range(8):
      alone = _inverse_cdf(logits[n : n + 1], uniforms[n : n + 1])
      self.assertEqual(alone[0], whole[n])


class DrawTest(parameterized.TestCase):
  # One level; two levels, the last block full, and ragged.
  @parameterized.parameters(5, 1024, 1409)
  def test_log_probs_are_those_of_the_softmax(self, vocab_size):
    logits = 3 * _rows(vocab_size, vocab_size, num_rows=40)
    logits[:20, 1] = log_probs.FORBIDDEN_LOGIT
    logits[7] += 1e4  # Far from 0, whose exponentials would overflow.
    uniforms = np.random.default_rng(1).random(40).astype(np.float32)
    ids, found = jax.jit(sampling.draw)(logits, uniforms)
    np.testing.assert_array_equal(ids, _inverse_cdf(logits, uniforms))
    expected = [
      np.log(oracles.probabilities(row)[k])
      for row, k in zip(logits, ids, strict=True)
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-6)

  @parameterized.parameters(5, 1024)
  def test_nan_is_not_hidden(self, vocab_size):
    logits = _rows(0, vocab_size, num_rows=4)
    logits[1, 2] = np.nan
    logits[3] = np.where(np.arange(vocab_size) == 3, -1e9, np.nan)
    uniforms = jnp.array([0.2, 0.9, 0.5, 0.0])
    ids, found = jax.jit(sampling.draw)(logits, uniforms)
    np.testing.assert_array_equal(np.isnan(found), [False, True, False, True])
    self.assertTrue(((ids >= 0) & (ids < vocab_size)).all())
    self.assertNotEqual(ids[3], 3)


class SampleTest(parameterized.TestCase):
  # One level and two; 200,000 draws stay within five standard deviations.
  @parameterized.parameters(7, 1500)
  def test_frequencies(self, vocab_size):
    logits = 2 * np.random.default_rng(0).normal(size=vocab_size)
    logits[[1, -1]] = -np.inf
    draws, num_rows = 10, 20_000
    sample = jax.jit(sampling.sample)
    counts = np.zeros(vocab_size)
    rows = jnp.broadcast_to(jnp.float32(logits), (num_rows, vocab_size))
    for i in range(draws):
      keys = jax.random.split(jax.random.key(i), num_rows)
      counts += np.bincount(sample(keys, rows), minlength=vocab_size)
    probs = np.exp(logits) / np.exp(logits).sum()
    total = draws * num_rows
    deviation = np.sqrt(total * probs * (1 - probs))
    self.assertTrue((np.abs(counts - total * probs) <= 5 * deviation + 2).all())
    self.assertEqual(counts[1] + counts[-1], 0)

  def test_depends_on_the_key_and_the_row_alone(self):
    logits = jnp.asarray(_rows(0, 40, num_rows=6))
    keys = jax.random.split(jax.random.key(0), 6)
    whole = sampling.sample(keys, logits)
    order = np.array([3, 0, 5, 1, 4, 2])
    np.testing.assert_array_equal(
      sampling.sample(keys[order], logits[order]), whole[order]
    )
    np.testing.assert_array_equal(
      sampling.sample(keys[:2], logits[:2]), whole[:2]
    )
    same = sampling.sample(keys, jnp.broadcast_to(logits[0], (6, 40)))
    self.assertGreater(len(set(np.asarray(same).tolist())), 1)

  def test_greedy(self):
    logits = jnp.asarray(_rows(0))
    keys = jax.random.split(jax.random.key(0), 3)
    np.testing.assert_array_equal(
      sampling.sample(keys, logits, greedy=True), np.argmax(logits, axis=-1)
    )
