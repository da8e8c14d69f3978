"""Tests of log-probabilities, entropies and KL estimates."""

import functools

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized
from hypothesis import strategies as st

from rljax.ops import log_probs
from tests import oracles

SEEDS = st.integers(0, 2**32 - 1)


def _batch(seed, shape=(2, 5), vocab_size=7):
  """Random logits, ids and allowed tokens (the ids among them)."""
  rng = np.random.default_rng(seed)
  logits = 3 * rng.normal(size=(*shape, vocab_size))
  allowed = rng.random(vocab_size) < 0.6
  allowed[rng.integers(vocab_size)] = True
  ids = rng.choice(np.flatnonzero(allowed), size=shape)
  return logits, ids, allowed


def _hidden_batch(seed=0, batch=3, length=7, width=4, vocab_size=11):
  """Random hidden states, ids, head matrix and weights of two sums."""
  rng = np.random.default_rng(seed)
  return (
    jnp.float32(rng.normal(size=(batch, length, width))),
    jnp.int32(rng.integers(vocab_size, size=(batch, length))),
    jnp.float32(rng.normal(size=(width, vocab_size))),
    jnp.float32(rng.normal(size=(2, batch, length))),
  )


def _shapes(jaxpr):
  """Shapes of everything that a jaxpr computes, at any depth."""
  shapes = set()
  for equation in jaxpr.eqns:
    shapes |= {tuple(v.aval.shape) for v in equation.outvars}
    for value in equation.params.values():
      for inner in value if isinstance(value, (tuple, list)) else [value]:
        inner = getattr(inner, "jaxpr", inner)
        if hasattr(inner, "eqns"):
          shapes |= _shapes(inner)
  return shapes


class MaskedLogitsTest(parameterized.TestCase):
  @chex.variants(with_jit=True, without_jit=True)
  def test_hand_computed(self):
    fn = self.variant(
      functools.partial(log_probs.masked_logits, temperature=0.5)
    )
    logits = jnp.array([[1.0, -2.0, 3.0]])
    np.testing.assert_array_equal(fn(logits), [[2.0, -4.0, 6.0]])
    # The temperature divides first: a forbidden column is -1e9, not -2e9.
    allowed = jnp.array([True, False, True])
    np.testing.assert_array_equal(
      fn(logits, allowed=allowed), [[2.0, -1e9, 6.0]]
    )

  def test_allowed_broadcasts_from_any_rank(self):
    logits = jnp.zeros((2, 3, 4))
    allowed = np.random.default_rng(0).random((2, 3, 4)) < 0.5
    for mask in (allowed, allowed[:, :1], allowed[0, 0], allowed[0]):
      found = log_probs.masked_logits(logits, allowed=mask)
      expected = np.where(np.broadcast_to(mask, (2, 3, 4)), 0.0, -1e9)
      np.testing.assert_array_equal(found, expected)

  # The maximum of a long row of NaN is -inf on a CPU.
  @parameterized.parameters(13, 5000)
  def test_nan_stays(self, vocab_size):
    logits = np.full((2, vocab_size), np.nan, np.float32)
    allowed = jnp.arange(vocab_size) != 3
    found = jax.jit(log_probs.masked_logits)(logits, allowed=allowed)
    np.testing.assert_array_equal(
      np.isnan(found), np.broadcast_to(allowed, logits.shape)
    )
    found = jax.jit(
      functools.partial(log_probs.masked_logits, temperature=0.5)
    )(logits)
    self.assertTrue(np.isnan(found).all())

  def test_computes_in_float32(self):
    logits = jnp.array([1.0, 2.0], jnp.bfloat16)
    found = log_probs.masked_logits(logits, temperature=3.0)
    chex.assert_type(found, jnp.float32)
    np.testing.assert_allclose(found, [1 / 3, 2 / 3], rtol=1e-6)

  def test_bad_temperature(self):
    for bad in (0.0, -1.0, float("nan")):
      with self.assertRaisesRegex(ValueError, "temperature must be positive"):
        log_probs.masked_logits(jnp.zeros(3), temperature=bad)


class TokenLogProbsTest(parameterized.TestCase):
  @chex.all_variants
  def test_hand_computed(self):
    fn = self.variant(
      functools.partial(log_probs.token_log_probs, temperature=2.0)
    )
    # Halved, these are log 1, log 3, log 4 (forbidden) and log 1, log 1, log 8.
    logits = 2 * jnp.log(jnp.array([[[1.0, 3.0, 4.0], [1.0, 1.0, 8.0]]]))
    allowed = jnp.array([True, True, False])
    # 3 / (1 + 3) and 1 / (1 + 1).
    found = fn(logits, jnp.array([[1, 0]]), allowed=allowed)
    np.testing.assert_allclose(found, np.log([[0.75, 0.5]]), rtol=1e-6)
    # All allowed: 4 / 8 and 8 / 10.
    found = fn(logits, jnp.array([[2, 2]]))
    np.testing.assert_allclose(found, np.log([[0.5, 0.8]]), rtol=1e-6)

  @hypothesis.given(seed=SEEDS, temperature=st.floats(0.2, 3.0))
  def test_matches_oracle(self, seed, temperature):
    logits, ids, allowed = _batch(seed)
    found = log_probs.token_log_probs(
      jnp.float32(logits), ids, temperature=temperature, allowed=allowed
    )
    expected = oracles.token_log_probs(logits, ids, temperature, allowed)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)

  def test_forbidden_columns_are_inert(self):
    logits, ids, allowed = _batch(1)
    other = np.where(allowed, logits, 50.0)
    fn = jax.value_and_grad(
      lambda z: jnp.sum(log_probs.token_log_probs(z, ids, allowed=allowed))
    )
    value, grads = fn(jnp.float32(logits))
    other_value, other_grads = fn(jnp.float32(other))
    np.testing.assert_array_equal(value, other_value)
    np.testing.assert_array_equal(grads, other_grads)
    np.testing.assert_array_equal(grads[..., ~allowed], 0.0)

  def test_forbidden_token_is_finite(self):
    found = log_probs.token_log_probs(
      jnp.zeros((1, 1, 2)),
      jnp.array([[0]]),
      allowed=jnp.array([False, True]),
    )
    np.testing.assert_allclose(found, [[-1e9]])

  def test_large_logits(self):
    logits = jnp.array([[[1e4, 1e4, 0.0], [-1e4, 0.0, 1e4]]])
    found = log_probs.token_log_probs(logits, jnp.array([[0, 1]]))
    np.testing.assert_allclose(found, [[-np.log(2), -1e4]], rtol=1e-6)

  def test_id_beyond_the_vocabulary_is_nan(self):
    found = log_probs.token_log_probs(jnp.zeros((1, 1, 3)), jnp.array([[3]]))
    self.assertTrue(np.isnan(found).all())

  def test_gradient(self):
    logits, ids, allowed = _batch(2)
    chex.assert_numerical_grads(
      functools.partial(
        log_probs.token_log_probs, ids=jnp.int32(ids), allowed=allowed
      ),
      (jnp.float32(logits),),
      order=1,
      rtol=2e-2,
      atol=2e-2,
    )


class EntropyTest(parameterized.TestCase):
  @chex.all_variants
  def test_hand_computed(self):
    fn = self.variant(log_probs.entropy)
    logits = jnp.array([[[2.0, 1.0, 0.0, -1.0], [5.0, 5.0, 5.0, 5.0]]])
    found = fn(logits)
    np.testing.assert_allclose(found, [[0.947537, np.log(4)]], rtol=1e-6)
    # Two of four allowed: H(σ(1)) = log(1 + e) - e / (1 + e) = .582203, log 2.
    allowed = jnp.array([True, True, False, False])
    found = fn(logits, allowed=allowed)
    np.testing.assert_allclose(found, [[0.582203, np.log(2)]], rtol=1e-6)

  @hypothesis.given(seed=SEEDS, temperature=st.floats(0.2, 3.0))
  def test_matches_oracle(self, seed, temperature):
    logits, _, allowed = _batch(seed)
    found = log_probs.entropy(
      jnp.float32(logits), temperature=temperature, allowed=allowed
    )
    expected = oracles.entropies(logits, temperature, allowed)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)

  def test_gradient(self):
    logits, _, allowed = _batch(3)
    chex.assert_numerical_grads(
      functools.partial(log_probs.entropy, allowed=allowed),
      (jnp.float32(logits),),
      order=1,
      rtol=2e-2,
      atol=2e-2,
    )

  def test_gradient_is_finite_at_zero_probability(self):
    rows = jnp.array(
      [
        [1e4, 0.0, -1e4],  # Saturated.
        [0.0, -jnp.inf, 1.0],  # A hard zero that no mask knows of.
        [0.0, 2.0, 1.0],
        [jnp.nan, 2.0, 2.0],  # Forbidden below, whatever it holds.
      ]
    )
    allowed = jnp.array([[True] * 3, [True] * 3, [True, False, True]])
    allowed = jnp.concatenate([allowed, jnp.array([[False, True, True]])])
    values, grads = jax.vmap(
      jax.value_and_grad(lambda z, may: log_probs.entropy(z, allowed=may))
    )(rows, allowed)
    h = 0.582203  # H(σ(1)), as above; p (1 - p) at σ(1) is .196612.
    np.testing.assert_allclose(values, [0.0, h, h, np.log(2)], rtol=1e-6)
    slope = 0.196612
    expected = [[0] * 3, [slope, 0, -slope], [slope, 0, -slope], [0] * 3]
    np.testing.assert_allclose(grads, expected, atol=1e-6)


class KlEstimateTest(parameterized.TestCase):
  P = np.array([0.5, 0.3, 0.2])
  Q = np.array([0.4, 0.4, 0.2])

  def _estimates(self, logits, kind):
    """The estimate at each of three tokens, once per token: `[1, 3]`."""
    ids = jnp.arange(3)[None, :]
    logits = jnp.broadcast_to(logits[None, None, :], (1, 3, 3))
    return log_probs.kl_estimate(
      log_probs.token_log_probs(logits, ids),
      jnp.log(jnp.float32(self.Q))[None, :],
      kind=kind,
    )

  @chex.all_variants
  def test_expectation_and_variance(self):
    logits = jnp.log(jnp.float32(self.P))
    for kind, mean, variance in (
      ("k1", 0.025267, 0.049086),
      ("k2", 0.024862, 0.000205),
      ("k3", 0.025267, 0.000255),
    ):
      fn = self.variant(functools.partial(self._estimates, kind=kind))
      found = np.float64(fn(logits)[0])
      np.testing.assert_allclose(self.P @ found, mean, atol=1e-6)
      np.testing.assert_allclose(
        self.P @ found**2 - (self.P @ found) ** 2, variance, atol=1e-6
      )

  @parameterized.parameters(
    ("k1", (0.0, 0.0, 0.0)),
    ("k2", (0.098938, -0.093885, -0.005053)),
    ("k3", (0.1, -0.1, 0.0)),
  )
  def test_expected_gradient(self, kind, expected):
    weights = jnp.float32(self.P)[None, :]  # Of the samples, held fixed.
    grads = jax.grad(lambda z: jnp.sum(weights * self._estimates(z, kind)))(
      jnp.log(jnp.float32(self.P))
    )
    np.testing.assert_allclose(grads, expected, atol=1e-6)

  def test_true_gradient_is_that_of_k2(self):
    # Of KL(p || q) itself, so that the numbers above are not taken on trust.
    def kl(z):
      log_p = jax.nn.log_softmax(z)
      return jnp.sum(jnp.exp(log_p) * (log_p - jnp.log(jnp.float32(self.Q))))

    grads = jax.grad(kl)(jnp.log(jnp.float32(self.P)))
    np.testing.assert_allclose(grads, (0.098938, -0.093885, -0.005053), 1e-4)

  @hypothesis.given(seed=SEEDS, kind=st.sampled_from(log_probs.KL_KINDS))
  def test_matches_oracle(self, seed, kind):
    rng = np.random.default_rng(seed)
    ours, ref = -rng.exponential(size=(2, 3, 4))
    found = log_probs.kl_estimate(
      jnp.float32(ours), jnp.float32(ref), kind=kind
    )
    expected = oracles.kl_estimate(ours, ref, kind)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    if kind != "k1":
      self.assertGreaterEqual(found.min(), 0.0)

  def test_no_gradient_to_the_reference(self):
    for kind in log_probs.KL_KINDS:
      grads = jax.grad(
        lambda ref, kind=kind: jnp.sum(
          log_probs.kl_estimate(jnp.full((1, 2), -1.0), ref, kind=kind)
        )
      )(jnp.full((1, 2), -2.0))
      np.testing.assert_array_equal(grads, 0.0)

  def test_unknown_kind(self):
    with self.assertRaisesRegex(ValueError, "k1, k2, k3, got 'k4'"):
      log_probs.kl_estimate(jnp.zeros((1, 1)), jnp.zeros((1, 1)), kind="k4")


class FromHiddenTest(parameterized.TestCase):
  # T = 7: even and ragged chunks, one column at a time, one block, no chunks.
  @parameterized.parameters(1, 3, 7, 8, None)
  def test_equals_whole_logits(self, chunk_size):
    hidden, ids, head, weights = _hidden_batch()
    allowed = np.ones(11, bool)
    allowed[np.setdiff1d(np.arange(11), np.unique(ids))[:1]] = False
    allowed[0] = False
    options = dict(temperature=0.7, allowed=allowed)

    def chunked(hidden, head):
      found = log_probs.from_hidden(
        lambda x: x @ head, hidden, ids, chunk_size=chunk_size, **options
      )
      both = jnp.stack([found.log_probs, found.entropies])
      return jnp.sum(weights * jnp.maximum(both, -100.0)), found

    def whole(hidden, head):
      logits = hidden @ head
      found = log_probs.TokenStatistics(
        log_probs=log_probs.token_log_probs(logits, ids, **options),
        entropies=log_probs.entropy(logits, **options),
      )
      both = jnp.stack([found.log_probs, found.entropies])
      return jnp.sum(weights * jnp.maximum(both, -100.0)), found

    grad = lambda fn: jax.jit(jax.grad(fn, argnums=(0, 1), has_aux=True))
    found_grads, found = grad(chunked)(hidden, head)
    expected_grads, expected = grad(whole)(hidden, head)
    self.assertGreater(np.abs(expected_grads[1]).max(), 0.1)
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(
      found_grads, expected_grads, rtol=1e-4, atol=1e-5
    )

  def test_entropy_is_optional(self):
    hidden, ids, head, _ = _hidden_batch()
    found = log_probs.from_hidden(
      lambda x: x @ head, hidden, ids, chunk_size=2, with_entropy=False
    )
    self.assertIsNone(found.entropies)
    np.testing.assert_allclose(
      found.log_probs,
      log_probs.token_log_probs(hidden @ head, ids),
      rtol=1e-5,
      atol=1e-6,
    )

  def test_forward_and_backward_hold_one_chunk_of_logits(self):
    batch, length, vocab_size = 2, 64, 512
    hidden, ids, head, weights = _hidden_batch(0, batch, length, 8, vocab_size)

    def loss(hidden, head, chunk_size):
      found = log_probs.from_hidden(
        lambda x: x @ head, hidden, ids, chunk_size=chunk_size
      )
      return jnp.sum(weights * jnp.stack([found.log_probs, found.entropies]))

    whole = batch * length * vocab_size
    largest, memory = {}, {}
    for chunk_size in (None, 4):
      fn = jax.grad(functools.partial(loss, chunk_size=chunk_size), (0, 1))
      shapes = _shapes(jax.make_jaxpr(fn)(hidden, head).jaxpr)
      largest[chunk_size] = max(np.prod(shape, dtype=int) for shape in shapes)
      compiled = jax.jit(fn).lower(hidden, head).compile()
      memory[chunk_size] = compiled.memory_analysis().temp_size_in_bytes
    self.assertGreaterEqual(largest[None], whole)
    # The head's gradient [8, 512] and the chunk's logits [2, 4, 512].
    self.assertEqual(largest[4], 8 * vocab_size)
    self.assertGreater(memory[None], 4 * whole)
    self.assertLess(memory[4], 4 * whole / 4)

  def test_bad_chunk_size(self):
    hidden, ids, head, _ = _hidden_batch()
    with self.assertRaisesRegex(ValueError, "chunk_size must be positive"):
      log_probs.from_hidden(lambda x: x @ head, hidden, ids, chunk_size=0)


class ChunkSizeTest(parameterized.TestCase):
  def test_fits(self):
    # 4 bytes * 8 rows * 1000 tokens = 32,000 bytes a position.
    self.assertEqual(log_probs.chunk_size(8, 1000, max_bytes=100_000), 3)
    self.assertEqual(log_probs.chunk_size(8, 1000, max_bytes=10), 1)
