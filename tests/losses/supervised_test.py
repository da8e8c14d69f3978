"""Tests of the losses on given responses."""

import functools
import itertools
import math

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized
from hypothesis import strategies as st

from rljax.losses import supervised
from tests import oracles

_SEEDS = st.integers(0, 2**32 - 1)
_NORMALIZERS = ("token_mean", "sequence_mean", "sequence_sum")

# Two responses, of two tokens and of four.
_LOG_PROBS = np.float32([[-0.1, -0.2, -9.0, -9.0], [-0.3, -0.4, -0.5, -0.6]])
_WEIGHTS = np.float32([[2.0, 1.0, 5.0, 5.0], [0.0, 1.0, 1.0, -1.0]])
_MASK = np.array([[True, True, False, False], [True, True, True, True]])


def _batch(seed, shape=(8, 5)):
  """Log-probabilities, weights and a mask with an empty row; numpy."""
  rng = np.random.default_rng(seed)
  mask = rng.random(shape) < 0.7
  mask[rng.integers(shape[0])] = False
  return -rng.exponential(size=shape), rng.normal(size=shape), mask


def _float32(batch):
  """The batch with floats in float32, on the device."""
  return [jnp.array(x) if x.dtype == bool else jnp.float32(x) for x in batch]


def _weighted_loss(normalizer, axis_name=None):
  def loss_fn(log_probs, weights, mask):
    return supervised.nll_loss(
      log_probs,
      mask,
      normalizer=normalizer,
      weights=weights,
      axis_name=axis_name,
    )

  return loss_fn


@functools.cache
def _jitted(normalizer):
  """Value and gradient, compiled once for all drawn examples."""
  return jax.jit(jax.value_and_grad(_weighted_loss(normalizer), has_aux=True))


class NLLLossTest(parameterized.TestCase):
  @chex.all_variants
  @parameterized.parameters(
    ("token_mean", 0.35),  # 2.1 / 6
    ("sequence_mean", 0.3),  # (0.3 / 2 + 1.8 / 4) / 2
    ("sequence_sum", 1.05),  # (0.3 + 1.8) / 2
  )
  def test_hand_computed(self, normalizer, expected):
    loss, metrics = self.variant(
      functools.partial(supervised.nll_loss, normalizer=normalizer)
    )(_LOG_PROBS, _MASK)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    self.assertEqual(set(metrics), {"nll/loss", "nll/perplexity", "nll/tokens"})
    np.testing.assert_allclose(metrics["nll/loss"], expected, rtol=1e-6)
    np.testing.assert_allclose(
      metrics["nll/perplexity"], math.exp(0.35), rtol=1e-6
    )
    np.testing.assert_allclose(metrics["nll/tokens"], 6.0)

  @chex.all_variants
  @parameterized.parameters(
    # Weighted: .2, .2 and 0, .4, .5, -.6, together .7.
    ("token_mean", 0.7 / 6, [[2, 1, 0, 0], [0, 1, 1, -1]], [6, 6]),
    ("sequence_mean", 0.1375, [[2, 1, 0, 0], [0, 1, 1, -1]], [4, 8]),
    ("sequence_sum", 0.35, [[2, 1, 0, 0], [0, 1, 1, -1]], [2, 2]),
  )
  def test_weights_and_gradient(self, normalizer, expected, weights, divisors):
    loss_and_grad = self.variant(
      jax.value_and_grad(_weighted_loss(normalizer), has_aux=True)
    )
    (loss, metrics), grad = loss_and_grad(_LOG_PROBS, _WEIGHTS, _MASK)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(
      grad, -np.float32(weights) / np.float32(divisors)[:, None], rtol=1e-6
    )
    # The perplexity is the policy's, whatever the weights.
    np.testing.assert_allclose(
      metrics["nll/perplexity"], math.exp(0.35), rtol=1e-6
    )

  def test_token_mean_by_default(self):
    loss, _ = supervised.nll_loss(_LOG_PROBS, _MASK)
    np.testing.assert_allclose(loss, 0.35, rtol=1e-6)

  @hypothesis.given(seed=_SEEDS, normalizer=st.sampled_from(_NORMALIZERS))
  def test_matches_oracle(self, seed, normalizer):
    log_probs, weights, mask = _batch(seed)
    loss, metrics = supervised.nll_loss(
      jnp.float32(log_probs), mask, normalizer=normalizer
    )
    np.testing.assert_allclose(
      loss, oracles.nll_loss(log_probs, mask, normalizer), rtol=1e-5
    )
    mean = oracles.nll_loss(log_probs, mask, "token_mean")
    np.testing.assert_allclose(
      metrics["nll/perplexity"], math.exp(mean), rtol=1e-5
    )
    np.testing.assert_allclose(metrics["nll/tokens"], mask.sum())
    loss, _ = _weighted_loss(normalizer)(
      jnp.float32(log_probs), jnp.float32(weights), mask
    )
    np.testing.assert_allclose(
      loss,
      oracles.nll_loss(log_probs, mask, normalizer, weights),
      rtol=1e-4,
      atol=1e-5,
    )

  @hypothesis.given(seed=_SEEDS, normalizer=st.sampled_from(_NORMALIZERS))
  def test_masked_entries_and_order_are_inert(self, seed, normalizer):
    log_probs, weights, mask = _float32(_batch(seed))
    loss_and_grad = _jitted(normalizer)
    expected, expected_grad = loss_and_grad(log_probs, weights, mask)
    actual, grad = loss_and_grad(
      jnp.where(mask, log_probs, jnp.nan),
      jnp.where(mask, weights, jnp.nan),
      mask,
    )
    chex.assert_trees_all_equal((actual, grad), (expected, expected_grad))
    np.testing.assert_array_equal(np.asarray(grad)[~mask], 0.0)

    order = np.random.default_rng(seed).permutation(mask.shape[0])
    actual, grad = loss_and_grad(log_probs[order], weights[order], mask[order])
    chex.assert_trees_all_close(
      (actual, grad), (expected, expected_grad[order]), rtol=1e-4, atol=1e-6
    )

  @parameterized.parameters(*_NORMALIZERS)
  def test_split_batch(self, normalizer):
    # One row a shard: token counts differ, and one shard has none.
    _, weights, mask = _float32(_batch(7))
    rng = np.random.default_rng(7)
    features = jnp.float32(rng.normal(size=(8, 5, 3)))
    params = jnp.array([1.1, 0.7, -0.4])

    def step(params, features, weights, mask, axis_name=None):
      def loss_fn(params):
        log_probs = jax.nn.log_sigmoid(
          jnp.einsum("btf,f->bt", features, params)
        )
        return _weighted_loss(normalizer, axis_name)(log_probs, weights, mask)

      results, grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
      if axis_name is not None:
        grads = jax.lax.pmean(grads, axis_name)
      return results, grads

    expected = step(params, features, weights, mask)
    actual = jax.vmap(
      functools.partial(step, axis_name="data"),
      axis_name="data",
      in_axes=(None, 0, 0, 0),
    )(params, *[x[:, None] for x in (features, weights, mask)])
    for shard in (0, 7):
      chex.assert_trees_all_close(
        jax.tree.map(lambda x, shard=shard: x[shard], actual),
        expected,
        rtol=1e-4,
        atol=1e-6,
      )

  @parameterized.parameters(*_NORMALIZERS)
  def test_numerical_gradient(self, normalizer):
    log_probs, weights, mask = _float32(_batch(1))
    chex.assert_numerical_grads(
      lambda x: _weighted_loss(normalizer)(x, weights, mask)[0],
      (log_probs,),
      order=1,
      atol=2e-3,
      rtol=1e-2,
    )

  def test_no_gradient_to_weights_and_metrics(self):
    grad = jax.grad(
      lambda weights: _weighted_loss("token_mean")(_LOG_PROBS, weights, _MASK)[
        0
      ]
    )(_WEIGHTS)
    np.testing.assert_array_equal(grad, np.zeros((2, 4)))
    grad = jax.grad(
      lambda log_probs: sum(supervised.nll_loss(log_probs, _MASK)[1].values())
    )(_LOG_PROBS)
    np.testing.assert_array_equal(grad, np.zeros((2, 4)))

  @parameterized.parameters(*_NORMALIZERS)
  def test_empty_mask(self, normalizer):
    (loss, metrics), grad = jax.value_and_grad(
      _weighted_loss(normalizer), has_aux=True
    )(_LOG_PROBS, _WEIGHTS, np.zeros((2, 4), bool))
    np.testing.assert_array_equal(loss, 0.0)
    np.testing.assert_array_equal(grad, np.zeros((2, 4)))
    np.testing.assert_array_equal(metrics["nll/perplexity"], 1.0)
    np.testing.assert_array_equal(metrics["nll/tokens"], 0.0)

  def test_bad_input(self):
    with self.assertRaisesRegex(
      ValueError,
      "normalizer must be one of token_mean, sequence_mean, sequence_sum, "
      "got 'constant'",
    ):
      supervised.nll_loss(_LOG_PROBS, _MASK, normalizer="constant")
    for args, weights in (
      ((_LOG_PROBS[:1], _MASK), None),
      ((_LOG_PROBS, _LOG_PROBS), None),
      ((_LOG_PROBS, _MASK), _WEIGHTS[:1]),
      ((_LOG_PROBS, _MASK), _MASK),
    ):
      with self.assertRaises(AssertionError):
        supervised.nll_loss(*args, weights=weights)


# Four candidates in order; only the last two are the wrong way round.
_SCORES = np.float32([[1.2, 0.3, -0.5, 0.1]])
_ALL = np.ones((1, 4), bool)


def _ranked(seed, shape=(8, 4)):
  """Scores, ties among them, and a mask with rows of no and one candidate."""
  rng = np.random.default_rng(seed)
  mask = rng.random(shape) < 0.8
  mask[0], mask[1] = False, np.arange(shape[1]) == 2
  return np.round(rng.normal(size=shape), 1), mask


def _oracle(scores, mask, margin):
  """Loss, accuracy and gap, prompt by prompt and pair by pair."""
  prompts = []
  for row, counts in zip(scores, mask, strict=True):
    kept = [float(s) for s, m in zip(row, counts, strict=True) if m]
    gaps = [a - b for a, b in itertools.combinations(kept, 2)]
    if gaps:
      rights = [1.0 if gap > 0 else 0.5 if gap == 0 else 0.0 for gap in gaps]
      losses = [math.log1p(math.exp(margin - gap)) for gap in gaps]
      prompts.append([np.mean(losses), np.mean(rights), np.mean(gaps)])
  return np.mean(prompts, axis=0)


@functools.cache
def _pairwise(margin=0.0):
  """Value and gradient, compiled once for each shape."""
  loss_fn = functools.partial(supervised.pairwise_loss, margin=margin)
  return jax.jit(jax.value_and_grad(loss_fn, has_aux=True))


class PairwiseTiesTest(parameterized.TestCase):
  def test_equal_rewards_are_no_pair(self):
    scores = jnp.array([[1.2, 0.3, -0.5]])
    mask = jnp.ones((1, 3), bool)
    # The pairs (1, 3) and (2, 3): log(1 + e^-1.7) and log(1 + e^-0.8).
    loss, metrics = supervised.pairwise_loss(
      scores, mask, rewards=jnp.array([[1.0, 1.0, 0.0]])
    )
    expected = (np.log1p(np.exp(-1.7)) + np.log1p(np.exp(-0.8))) / 2
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    np.testing.assert_allclose(metrics["pairwise/gap"], 1.25, rtol=1e-6)
    # Where all are alike, nothing is left.
    loss, _ = supervised.pairwise_loss(
      scores, mask, rewards=jnp.full((1, 3), 0.5)
    )
    self.assertEqual(loss, 0)


class PairwiseLossTest(parameterized.TestCase):
  @chex.all_variants
  def test_hand_computed(self):
    @self.variant
    def losses(scores, mask):
      two = mask & (jnp.arange(4) < 2)[None]
      return [
        supervised.pairwise_loss(scores, two),
        supervised.pairwise_loss(scores, two, margin=0.5),
        supervised.pairwise_loss(scores, mask),
      ]

    first, with_margin, all_pairs = losses(_SCORES, _ALL)
    # -log σ(.9) and, less the margin, -log σ(.4). The margin is no part of
    # what is measured.
    for (loss, metrics), expected in (
      (first, 0.341154),
      (with_margin, 0.513015),
    ):
      np.testing.assert_allclose(loss, expected, atol=1e-6)
      np.testing.assert_array_equal(metrics["pairwise/loss"], loss)
      np.testing.assert_allclose(metrics["pairwise/gap"], 0.9, rtol=1e-6)
      np.testing.assert_array_equal(metrics["pairwise/accuracy"], 1.0)
      self.assertLen(metrics, 3)
    # Gaps .9, 1.7, 1.1, .8, .2 and -.6: losses of 2.803003 together.
    loss, metrics = all_pairs
    np.testing.assert_allclose(loss, 0.467167, atol=1e-6)
    np.testing.assert_allclose(metrics["pairwise/accuracy"], 5 / 6, rtol=1e-6)
    np.testing.assert_allclose(metrics["pairwise/gap"], 4.1 / 6, rtol=1e-6)

  def test_missing_candidates(self):
    # Of the first prompt -log σ(1.1) = .287335 is left; the second has the
    # first pair alone, .341154; the others have no pair and do not count.
    mask = np.array(
      [[True, False, False, True], [True, True, False, False]]
      + [[True, False, False, False], [False] * 4]
    )
    scores = np.where(mask, np.tile(_SCORES, (4, 1)), np.nan)
    (loss, metrics), grad = _pairwise()(scores, mask)
    np.testing.assert_allclose(loss, (0.287335 + 0.341154) / 2, atol=1e-6)
    np.testing.assert_allclose(metrics["pairwise/gap"], 1.0, rtol=1e-6)
    # Each lone pair: σ(-gap) to the worse, over two prompts.
    first, second = 1 / (1 + math.exp(1.1)) / 2, 1 / (1 + math.exp(0.9)) / 2
    expected = [[-first, 0, 0, first], [-second, second, 0, 0]]
    np.testing.assert_allclose(grad[:2], expected, rtol=1e-5)
    np.testing.assert_array_equal(grad[2:], 0.0)

  def test_margins_by_reward_and_centred_scores(self):
    rewards = jnp.array([[3.0, 1.0, 0.0, 0.0]])
    two = _ALL & (jnp.arange(4) < 2)[None]
    loss, metrics = supervised.pairwise_loss(
      _SCORES, two, rewards=rewards, margin=0.1, reward_margin=0.2
    )
    # -log σ(.9 - .1 - .2 · 2).
    np.testing.assert_allclose(loss, 0.513015, atol=1e-6)
    np.testing.assert_allclose(metrics["pairwise/gap"], 0.9, rtol=1e-6)
    centred, _ = supervised.pairwise_loss(_SCORES, two, center_coef=0.01)
    total = float(_SCORES[0, 0] + _SCORES[0, 1])
    np.testing.assert_allclose(centred, 0.341154 + 0.01 * total**2, atol=1e-6)
    # The common level of the scores has a gradient now, and no other one had.
    shifted = lambda shift, **more: supervised.pairwise_loss(
      _SCORES + shift, two, **more
    )[0]
    np.testing.assert_allclose(jax.grad(shifted)(0.0), 0.0, atol=1e-7)
    np.testing.assert_allclose(
      jax.grad(shifted)(0.0, center_coef=0.01), 0.04 * total, rtol=1e-5
    )

  @parameterized.parameters(
    ({"reward_margin": 0.1}, "there are none"),
    ({"reward_margin": -0.1}, "reward_margin must not be negative, got -0.1"),
    ({"center_coef": -1.0}, "center_coef must not be negative, got -1.0"),
  )
  def test_refuses_settings(self, options, message):
    with self.assertRaisesRegex(ValueError, message):
      supervised.pairwise_loss(_SCORES, _ALL, **options)

  def test_ties_are_half_right(self):
    mask = np.array([[True, True, True, False]])
    (loss, metrics), _ = _pairwise()(np.float32([[0.5, 0.5, 0.1, 9.0]]), mask)
    # The tie, and two pairs of -log σ(.4).
    np.testing.assert_allclose(
      loss, (math.log(2) + 2 * 0.513015) / 3, rtol=1e-5
    )
    np.testing.assert_allclose(metrics["pairwise/accuracy"], 2.5 / 3, rtol=1e-6)

  def test_many_candidates_weigh_no_more_than_two(self):
    # Four equal candidates have six pairs of log 2 each.
    scores = np.stack([np.zeros(4, np.float32), _SCORES[0]])
    mask = np.array([[True] * 4, [True, True, False, False]])
    (loss, metrics), _ = _pairwise()(scores, mask)
    np.testing.assert_allclose(loss, (math.log(2) + 0.341154) / 2, rtol=1e-5)
    np.testing.assert_allclose(metrics["pairwise/accuracy"], 0.75)

  @hypothesis.given(seed=_SEEDS, margin=st.sampled_from([0.0, 0.5]))
  def test_matches_oracle(self, seed, margin):
    scores, mask = _ranked(seed)
    scores = np.float32(scores)
    (loss, metrics), _ = _pairwise(margin)(scores, mask)
    actual = [loss, metrics["pairwise/accuracy"], metrics["pairwise/gap"]]
    np.testing.assert_allclose(
      actual, _oracle(scores, mask, margin), rtol=1e-5, atol=1e-6
    )

  @hypothesis.given(seed=_SEEDS)
  def test_masked_entries_and_order_are_inert(self, seed):
    scores, mask = _ranked(seed)
    scores = np.float32(scores)
    expected, expected_grad = _pairwise()(scores, mask)
    actual, grad = _pairwise()(np.where(mask, scores, np.nan), mask)
    chex.assert_trees_all_equal((actual, grad), (expected, expected_grad))
    np.testing.assert_array_equal(np.asarray(grad)[~mask], 0.0)
    np.testing.assert_array_equal(grad[:2], np.zeros((2, 4)))  # No pair.

    order = np.random.default_rng(seed).permutation(len(scores))
    actual, grad = _pairwise()(scores[order], mask[order])
    chex.assert_trees_all_close(
      (actual, grad), (expected, expected_grad[order]), rtol=1e-5, atol=1e-6
    )

  def test_split_batch(self):
    # One prompt a shard, and two of them have no pair.
    scores, mask = _float32(_ranked(7))

    def step(scale, scores, mask, axis_name=None):
      def loss_fn(scale):
        return supervised.pairwise_loss(
          scale * scores, mask, margin=0.2, axis_name=axis_name
        )

      results, grad = jax.value_and_grad(loss_fn, has_aux=True)(scale)
      if axis_name is not None:
        grad = jax.lax.pmean(grad, axis_name)
      return results, grad

    shards = jax.vmap(
      functools.partial(step, axis_name="data"),
      axis_name="data",
      in_axes=(None, 0, 0),
    )
    scale = jnp.float32(1.3)
    expected = jax.jit(step)(scale, scores, mask)
    actual = jax.jit(shards)(scale, scores[:, None], mask[:, None])
    for shard in (0, 7):
      chex.assert_trees_all_close(
        jax.tree.map(lambda x, shard=shard: np.asarray(x)[shard], actual),
        expected,
        rtol=1e-5,
        atol=1e-6,
      )

  def test_gradient(self):
    # A step against it raises the best and lowers the last.
    _, grad = _pairwise()(_SCORES, _ALL)
    self.assertLess(grad[0, 0], 0)
    self.assertGreater(grad[0, 3], 0)
    np.testing.assert_allclose(np.sum(grad), 0.0, atol=1e-6)
    scores, mask = _float32(_ranked(1))
    chex.assert_numerical_grads(
      jax.jit(lambda x: supervised.pairwise_loss(x, mask, margin=0.3)[0]),
      (scores,),
      order=1,
      atol=2e-3,
      rtol=1e-2,
    )

  def test_no_gradient_through_metrics(self):
    grad = jax.grad(
      jax.jit(
        lambda scores: sum(supervised.pairwise_loss(scores, _ALL)[1].values())
      )
    )(_SCORES)
    np.testing.assert_array_equal(grad, np.zeros((1, 4)))

  def test_no_pair(self):
    mask = np.tile([True, False, False, False], (2, 1))
    (loss, metrics), grad = _pairwise()(np.ones((2, 4), np.float32), mask)
    for value in (loss, grad, *metrics.values()):
      np.testing.assert_array_equal(value, np.zeros(value.shape))

  def test_bad_input(self):
    with self.assertRaisesRegex(
      ValueError, "pairwise_loss needs two candidates or more, got 1"
    ):
      supervised.pairwise_loss(_SCORES[:, :1], _ALL[:, :1])
    for margin in (-0.5, math.nan):
      with self.assertRaisesRegex(
        ValueError, f"margin must not be negative, got {margin}"
      ):
        supervised.pairwise_loss(_SCORES, _ALL, margin=margin)
    for args in (
      (_SCORES[0], _ALL[0]),
      (_SCORES, _ALL[:, :3]),
      (_SCORES, _SCORES),
      (_ALL, _ALL),
    ):
      with self.assertRaises(AssertionError):
        supervised.pairwise_loss(*args)


# One response of three tokens, and one of a single token.
_LOGITS = np.float32([[2.0, -1.0, 0.5], [-3.0, 9.0, 9.0]])
_LABELS = np.float32([[1.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
_TARGETS = np.array([[True, True, True], [True, False, False]])


def _labelled(seed, shape=(8, 5)):
  """Logits, labels, hard and soft, and a mask with an empty row; numpy."""
  rng = np.random.default_rng(seed)
  mask = rng.random(shape) < 0.7
  mask[rng.integers(shape[0])] = False
  labels = rng.choice([0.0, 0.25, 0.5, 1.0], size=shape)
  return np.round(3 * rng.normal(size=shape), 1), labels, mask


def _outcome_oracle(logits, labels, mask, normalizer):
  """Loss, accuracy and share of positives, token by token."""
  rows = []
  for row in zip(logits, labels, mask, strict=True):
    tokens = []
    for x, y, counts in zip(*row, strict=True):
      if counts:
        p = 1 / (1 + math.exp(-x))
        is_right = (x > 0) == (y > 0.5)
        right = 0.5 if x == 0 or y == 0.5 else float(is_right)
        tokens.append([-y * math.log(p) - (1 - y) * math.log(1 - p), right, y])
    if tokens:
      rows.append(tokens)
  if normalizer == "token_mean":
    rows = [[token] for tokens in rows for token in tokens]
  return np.mean([np.mean(tokens, axis=0) for tokens in rows], axis=0)


@functools.cache
def _outcome(normalizer="token_mean"):
  """Value and gradient, compiled once for each shape."""
  loss_fn = functools.partial(supervised.outcome_loss, normalizer=normalizer)
  return jax.jit(jax.value_and_grad(loss_fn, has_aux=True))


class OutcomeLossTest(parameterized.TestCase):
  @chex.all_variants
  def test_hand_computed(self):
    @self.variant
    def losses(logits, labels, mask):
      return [
        supervised.outcome_loss(logits[:1], labels[:1], mask[:1]),
        supervised.outcome_loss(logits, labels, mask),
        supervised.outcome_loss(
          logits, labels, mask, normalizer="sequence_mean"
        ),
      ]

    first, by_token, by_sequence = losses(_LOGITS, _LABELS, _TARGETS)
    # log(1 + e^-2), log(1 + e^-1), log(1 + e^-.5); then log(1 + e^3).
    wrong = math.log1p(math.exp(3))  # 3.048587
    for (loss, metrics), expected, accuracy in (
      (first, 0.304756, 1.0),
      (by_token, (3 * 0.304756 + wrong) / 4, 0.75),
      (by_sequence, (0.304756 + wrong) / 2, 0.5),
    ):
      np.testing.assert_allclose(loss, expected, atol=1e-6)
      np.testing.assert_array_equal(metrics["bce/loss"], loss)
      np.testing.assert_allclose(metrics["bce/accuracy"], accuracy)
      self.assertLen(metrics, 3)
    for (_, metrics), share in (
      (first, 2 / 3),
      (by_token, 3 / 4),
      (by_sequence, (2 / 3 + 1) / 2),
    ):
      np.testing.assert_allclose(
        metrics["bce/positive_fraction"], share, rtol=1e-6
      )

  def test_gradient(self):
    # (σ(x) - y) / n.
    _, grad = _outcome()(_LOGITS, _LABELS, _TARGETS)
    sigmoid = 1 / (1 + np.exp(-_LOGITS))
    expected = np.where(_TARGETS, sigmoid - _LABELS, 0) / 4
    np.testing.assert_allclose(grad, expected, rtol=1e-5)
    _, grad = _outcome("sequence_mean")(_LOGITS, _LABELS, _TARGETS)
    expected = np.where(_TARGETS, sigmoid - _LABELS, 0) / [[6], [2]]
    np.testing.assert_allclose(grad, expected, rtol=1e-5)
    logits, labels, mask = _float32(_labelled(1))
    chex.assert_numerical_grads(
      jax.jit(lambda x: supervised.outcome_loss(x, labels, mask)[0]),
      (logits,),
      order=1,
      atol=2e-3,
      rtol=1e-2,
    )

  def test_large_logits(self):
    logits = np.float32([[20.0, 20.0, 1e4, -1e4]])
    labels = np.float32([[1.0, 0.0, 0.0, 1.0]])
    for i, expected in enumerate([2.0611537e-9, 20.0, 1e4, 1e4]):
      mask = np.arange(4)[None] == i
      (loss, _), grad = _outcome()(logits, labels, mask)
      np.testing.assert_allclose(loss, expected, rtol=1e-5)
      self.assertTrue(np.all(np.isfinite(grad)))

  @hypothesis.given(seed=_SEEDS, normalizer=st.sampled_from(_NORMALIZERS[:2]))
  def test_matches_oracle(self, seed, normalizer):
    logits, labels, mask = _float32(_labelled(seed))
    (loss, metrics), _ = _outcome(normalizer)(logits, labels, mask)
    names = ("bce/accuracy", "bce/positive_fraction")
    np.testing.assert_allclose(
      [loss, *(metrics[name] for name in names)],
      _outcome_oracle(*_labelled(seed), normalizer),
      rtol=1e-5,
      atol=1e-6,
    )

  @hypothesis.given(seed=_SEEDS, normalizer=st.sampled_from(_NORMALIZERS[:2]))
  def test_masked_entries_and_order_are_inert(self, seed, normalizer):
    logits, labels, mask = map(np.asarray, _float32(_labelled(seed)))
    expected, expected_grad = _outcome(normalizer)(logits, labels, mask)
    actual, grad = _outcome(normalizer)(
      np.where(mask, logits, np.nan), np.where(mask, labels, np.nan), mask
    )
    chex.assert_trees_all_equal((actual, grad), (expected, expected_grad))
    np.testing.assert_array_equal(np.asarray(grad)[~mask], 0.0)
    order = np.random.default_rng(seed).permutation(len(logits))
    actual, grad = _outcome(normalizer)(
      logits[order], labels[order], mask[order]
    )
    chex.assert_trees_all_close(
      (actual, grad), (expected, expected_grad[order]), rtol=1e-5, atol=1e-6
    )

  @parameterized.parameters(*_NORMALIZERS[:2])
  def test_split_batch(self, normalizer):
    # One response a shard, and one of them has no token.
    logits, labels, mask = _float32(_labelled(7))

    def step(scale, logits, labels, mask, axis_name=None):
      def loss_fn(scale):
        return supervised.outcome_loss(
          scale * logits,
          labels,
          mask,
          normalizer=normalizer,
          axis_name=axis_name,
        )

      results, grad = jax.value_and_grad(loss_fn, has_aux=True)(scale)
      if axis_name is not None:
        grad = jax.lax.pmean(grad, axis_name)
      return results, grad

    shards = jax.vmap(
      functools.partial(step, axis_name="data"),
      axis_name="data",
      in_axes=(None, 0, 0, 0),
    )
    scale = jnp.float32(1.3)
    expected = jax.jit(step)(scale, logits, labels, mask)
    actual = jax.jit(shards)(
      scale, logits[:, None], labels[:, None], mask[:, None]
    )
    for shard in (0, 7):
      chex.assert_trees_all_close(
        jax.tree.map(lambda x, shard=shard: np.asarray(x)[shard], actual),
        expected,
        rtol=1e-5,
        atol=1e-6,
      )

  def test_no_gradient_to_labels_nor_through_metrics(self):
    loss_fn = lambda labels: supervised.outcome_loss(_LOGITS, labels, _TARGETS)
    grad = jax.grad(jax.jit(lambda labels: loss_fn(labels)[0]))(_LABELS)
    np.testing.assert_array_equal(grad, np.zeros_like(_LABELS))
    grad = jax.grad(
      jax.jit(
        lambda logits: sum(
          supervised.outcome_loss(logits, _LABELS, _TARGETS)[1].values()
        )
      )
    )(_LOGITS)
    np.testing.assert_array_equal(grad, np.zeros_like(_LOGITS))

  @parameterized.parameters(*_NORMALIZERS[:2])
  def test_no_token(self, normalizer):
    (loss, metrics), grad = _outcome(normalizer)(
      _LOGITS, _LABELS, np.zeros_like(_TARGETS)
    )
    for value in (loss, grad, *metrics.values()):
      np.testing.assert_array_equal(value, np.zeros(value.shape))

  def test_bad_input(self):
    with self.assertRaisesRegex(
      ValueError, "one of token_mean, sequence_mean, got 'sequence_sum'"
    ):
      supervised.outcome_loss(
        _LOGITS, _LABELS, _TARGETS, normalizer="sequence_sum"
      )
    for args in (
      (_LOGITS[0], _LABELS[0], _TARGETS[0]),
      (_LOGITS, _LABELS[:, :2], _TARGETS),
      (_LOGITS, _LABELS > 0, _TARGETS),
      (_LOGITS, _LABELS, _LABELS),
    ):
      with self.assertRaises(AssertionError):
        supervised.outcome_loss(*args)
