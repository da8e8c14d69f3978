"""Tests of the losses of GRPO and its kin."""

import functools

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized
from hypothesis import strategies as st

from rljax.losses import ppo
from rljax.ops import advantages as advantages_lib
from tests import oracles

_SEEDS = st.integers(0, 2**32 - 1)
_NORMALIZERS = ("token_mean", "sequence_mean", "constant")

# A group of two, of which the second response has one token.
_GROUP_OLD = np.float32([[-1.0, -0.5], [-0.7, -0.9]])
_GROUP_NOW = np.float32([[-0.9, -0.6], [-0.7, -0.9]])
_GROUP_REF = np.float32([[-1.1, -0.5], [-0.6, -1.0]])
_GROUP_ADVANTAGES = np.float32([[0.9, 0.9], [-0.9, -0.9]])
_GROUP_MASK = np.array([[True, True], [True, False]])
# The worked example of the clipped loss.
_OLD = np.float32([[-1.0, -0.7, -0.3], [-2.0, -1.5, -0.1]])
_NOW = np.float32([[-0.8, -0.9, -0.3], [-1.5, -1.9, -0.05]])
_ADVANTAGES = np.float32([[1.0, 1.0, -1.0], [0.5, -2.0, 0.3]])
_MASK = np.array([[True, True, True], [True, True, False]])


def _batch(seed, shape=(8, 5)):
  """Log-probabilities, others, advantages and a mask with an empty row."""
  rng = np.random.default_rng(seed)
  others = -rng.exponential(size=shape)
  log_probs = others + rng.normal(0.0, 0.3, size=shape)
  mask = rng.random(shape) < 0.7
  mask[rng.integers(shape[0])] = False
  return log_probs, others, rng.normal(size=shape), mask


def _kl(log_probs, others, advantages, mask, **settings):
  """`kl_to_reference` with the arguments and results of the losses."""
  del advantages
  return ppo.kl_to_reference(log_probs, others, mask, **settings), {}


def _gspo(log_probs, others, advantages, mask, **settings):
  """`gspo_loss` of the first column's advantages."""
  return ppo.gspo_loss(log_probs, others, advantages[:, 0], mask, **settings)


# Every loss with the settings that it is tested with.
_LOSSES = {
  "gspo": functools.partial(_gspo, clip_epsilon=0.1),
  **{
    f"{name}/{normalizer}": functools.partial(loss, normalizer=normalizer)
    for name, loss in (
      ("cispo", functools.partial(ppo.cispo_loss, max_ratio=1.2)),
      ("k2", functools.partial(_kl, kind="k2")),
      ("k3", _kl),
    )
    for normalizer in _NORMALIZERS
  },
}


@functools.cache
def _jitted(name):
  return jax.jit(jax.value_and_grad(_LOSSES[name], has_aux=True))


def _oracle(name, log_probs, others, advantages, mask):
  """The value of a loss, token by token in float64."""
  name, _, normalizer = name.partition("/")
  if name == "gspo":
    losses = []
    for i, row in enumerate(mask):
      tokens = np.flatnonzero(row)
      if len(tokens):
        log_ratio = sum(log_probs[i, t] - others[i, t] for t in tokens)
        ratio = np.exp(log_ratio / len(tokens))
        clipped = min(max(ratio, 0.9), 1.1)
        losses.append(
          -min(advantages[i, 0] * ratio, advantages[i, 0] * clipped)
        )
    return sum(losses) / len(losses)
  losses = np.zeros(mask.shape)
  for index in np.ndindex(*mask.shape):
    gap = others[index] - log_probs[index]
    if name == "cispo":
      weight = min(np.exp(-gap), 1.2) * advantages[index]
      losses[index] = -weight * log_probs[index]
    else:
      losses[index] = {"k2": gap**2 / 2, "k3": np.exp(gap) - 1 - gap}[name]
  return oracles.normalized(losses, mask, normalizer)


class GRPOLossTest(parameterized.TestCase):
  @chex.all_variants
  @parameterized.parameters(
    # Token losses -.994654 + .04 * .018731, -.814354 + .04 * .005171 and
    # .9 + .04 * .005171: their sum by 3; by 2 and 1, halved; by 2 * 2.
    ("token_mean", -0.302615),
    ("sequence_mean", -0.001909),
    ("constant", -0.226961),
  )
  def test_hand_computed(self, normalizer, expected):
    def loss_fn(now, old, ref, advantages, mask):
      loss, _ = ppo.clipped_policy_loss(
        now, old, advantages, mask, clip_epsilon=0.2, normalizer=normalizer
      )
      return loss + 0.04 * ppo.kl_to_reference(
        now, ref, mask, normalizer=normalizer
      )

    loss = self.variant(loss_fn)(
      _GROUP_NOW, _GROUP_OLD, _GROUP_REF, _GROUP_ADVANTAGES, _GROUP_MASK
    )
    np.testing.assert_allclose(loss, expected, atol=1e-6)

  @chex.all_variants
  @parameterized.parameters(
    ("token_mean", -0.016027), ("sequence_mean", 0.066644)
  )
  def test_clip_higher(self, normalizer, expected):
    loss, metrics = self.variant(
      functools.partial(
        ppo.clipped_policy_loss,
        clip_epsilon=0.2,
        clip_epsilon_high=0.28,
        normalizer=normalizer,
      )
    )(_NOW, _OLD, _ADVANTAGES, _MASK)
    np.testing.assert_allclose(loss, expected, atol=1e-6)
    # 1.221403 is inside now: 1.648721 and 0.670320 of five are not.
    np.testing.assert_allclose(metrics["ppo/clip_fraction"], 0.4)

  def test_gradients_of_first_updates_agree(self):
    # Before the first update all ratios are 1: nothing is clipped, and all
    # surrogates are the plain policy gradient, each with its average.
    scores = np.float32([[1.0, 0.0]])
    row = advantages_lib.group_relative(scores, scale="group").reshape(-1, 1)
    token_advantages = jnp.where(_GROUP_MASK, row, 0.0)
    batch = (_GROUP_NOW, _GROUP_NOW, token_advantages, _GROUP_MASK)

    def gradient(loss, **settings):
      return jax.grad(lambda *x: loss(*x, **settings)[0])(*batch)

    def clipped(normalizer):
      return gradient(
        ppo.clipped_policy_loss, clip_epsilon=0.2, normalizer=normalizer
      )

    np.testing.assert_allclose(
      gradient(_gspo, clip_epsilon=3e-4), clipped("sequence_mean"), rtol=1e-6
    )
    for normalizer in _NORMALIZERS:
      np.testing.assert_allclose(
        gradient(ppo.cispo_loss, max_ratio=5.0, normalizer=normalizer),
        clipped(normalizer),
        rtol=1e-6,
      )
    # The constant: REINFORCE on whole responses, over T.
    np.testing.assert_allclose(
      clipped("constant"), -token_advantages / 4, rtol=1e-6
    )


class KLToReferenceTest(parameterized.TestCase):
  @chex.all_variants
  @parameterized.parameters(
    # d = -.2, .1, .1: 1 - e^d = .181269, -.105171, -.105171.
    ("k3", "token_mean", 0.009691, [[0.060423, -0.035057], [-0.035057, 0]]),
    ("k3", "sequence_mean", 0.008561, [[0.045317, -0.026293], [-0.052585, 0]]),
    ("k3", "constant", 0.007268, [[0.045317, -0.026293], [-0.026293, 0]]),
    # d² / 2 = .02, .005, .005, and -d.
    ("k2", "token_mean", 0.01, [[0.066667, -0.033333], [-0.033333, 0]]),
    ("k2", "sequence_mean", 0.00875, [[0.05, -0.025], [-0.05, 0]]),
  )
  def test_hand_computed(self, kind, normalizer, expected, expected_grad):
    kl, grad = self.variant(
      jax.value_and_grad(
        functools.partial(ppo.kl_to_reference, kind=kind, normalizer=normalizer)
      )
    )(_GROUP_NOW, _GROUP_REF, _GROUP_MASK)
    np.testing.assert_allclose(kl, expected, atol=1e-6)
    np.testing.assert_allclose(grad, expected_grad, atol=1e-6)

  @parameterized.parameters(
    ("k2", [0.098938, -0.093885, -0.005053]),  # Of KL(p||q).
    ("k3", [0.1, -0.1, 0.0]),  # Of KL(q||p): p - q.
  )
  def test_gradient_with_respect_to_logits(self, kind, expected):
    # Ten samples of p = (.5, .3, .2) in their right shares; q = (.4, .4, .2).
    samples = np.array([[0] * 5 + [1] * 3 + [2] * 2])
    ref = np.log(np.float32([0.4, 0.4, 0.2]))

    def loss_fn(logits):
      return ppo.kl_to_reference(
        jax.nn.log_softmax(logits)[samples],
        ref[samples],
        np.ones((1, 10), bool),
        kind=kind,
      )

    grad = jax.grad(loss_fn)(jnp.log(jnp.array([0.5, 0.3, 0.2])))
    np.testing.assert_allclose(grad, expected, atol=1e-6)

  def test_far_reference_stays_finite(self):
    kl, grad = jax.value_and_grad(ppo.kl_to_reference)(
      jnp.full((1, 1), -200.0), jnp.zeros((1, 1)), jnp.ones((1, 1), bool)
    )
    np.testing.assert_allclose(kl, np.exp(60), rtol=1e-4)
    np.testing.assert_array_equal(grad, np.zeros((1, 1)))

  def test_bad_input(self):
    batch = _GROUP_NOW, _GROUP_REF, _GROUP_MASK
    with self.assertRaisesRegex(ValueError, "kind must be k2 or k3, got 'k1'"):
      ppo.kl_to_reference(*batch, kind="k1")
    with self.assertRaisesRegex(ValueError, "normalizer must be one of"):
      ppo.kl_to_reference(*batch, normalizer="mean")
    with self.assertRaises(AssertionError):
      ppo.kl_to_reference(_GROUP_NOW, _GROUP_REF[:1], _GROUP_MASK)


class GSPOLossTest(parameterized.TestCase):
  @chex.all_variants
  @parameterized.parameters(
    # Mean log ratios (.2 - .2 + 0) / 3 and (.5 - .4) / 2: ratios 1, 1.051271.
    # Losses -1 and -.525635, with gradients -1 / 3 and -.525635 / 2 a token.
    (0.2, None, -0.762818, 0.0, -0.131409),
    # Up to 1.03: -.515, without gradient.
    (0.2, 0.03, -0.7575, 0.5, 0.0),
    (0.03, None, -0.7575, 0.5, 0.0),
  )
  def test_hand_computed(self, low, high, expected, clipped, grad):
    (loss, metrics), grads = self.variant(
      jax.value_and_grad(
        functools.partial(
          ppo.gspo_loss, clip_epsilon=low, clip_epsilon_high=high
        ),
        has_aux=True,
      )
    )(_NOW, _OLD, np.float32([1.0, 0.5]), _MASK)
    np.testing.assert_allclose(loss, expected, atol=1e-6)
    np.testing.assert_allclose(
      grads, [[-1 / 6] * 3, [grad, grad, 0]], atol=1e-6
    )
    for name, value in {
      "policy_loss": expected,
      "clip_fraction": clipped,
      "ratio_mean": 1.025636,
      "ratio_min": 1.0,
      "ratio_max": 1.051271,
      "approx_kl": 0.000636,
      "approx_kl_k2": 0.000625,
    }.items():
      np.testing.assert_allclose(
        metrics[f"ppo/{name}"], value, atol=1e-6, err_msg=name
      )

  def test_group_of_two(self):
    # The log ratios of the first cancel: both ratios are 1.
    loss, metrics = ppo.gspo_loss(
      _GROUP_NOW,
      _GROUP_OLD,
      _GROUP_ADVANTAGES[:, 0],
      _GROUP_MASK,
      clip_epsilon=3e-4,
    )
    np.testing.assert_allclose(loss, 0.0, atol=1e-6)
    for name in ("min", "max"):
      np.testing.assert_allclose(metrics[f"ppo/ratio_{name}"], 1.0, rtol=1e-6)

  def test_bad_input(self):
    batch = _NOW, _OLD, _ADVANTAGES[:, 0], _MASK
    with self.assertRaisesRegex(ValueError, "clip_epsilon must be positive"):
      ppo.gspo_loss(*batch, clip_epsilon=0.0)
    with self.assertRaises(AssertionError):
      ppo.gspo_loss(_NOW, _OLD, _ADVANTAGES, _MASK, clip_epsilon=0.1)


class CISPOLossTest(parameterized.TestCase):
  @chex.all_variants
  def test_hand_computed(self):
    # Weights 1.2 (of 1.221403), .818731, -1 and .6 (of 1.648721 / 2),
    # -1.340640, times log-probabilities -.8, -.9, -.3 and -1.5, -1.9.
    (loss, metrics), grads = self.variant(
      jax.value_and_grad(
        functools.partial(ppo.cispo_loss, max_ratio=1.2), has_aux=True
      )
    )(_NOW, _OLD, _ADVANTAGES, _MASK)
    np.testing.assert_allclose(loss, -0.050072, atol=1e-6)
    np.testing.assert_allclose(
      grads, [[-0.24, -0.163746, 0.2], [-0.12, 0.268128, 0]], atol=1e-6
    )
    np.testing.assert_allclose(metrics["ppo/clip_fraction"], 0.4)
    np.testing.assert_allclose(metrics["ppo/ratio_max"], 1.648721, rtol=1e-6)

  def test_bad_input(self):
    batch = _NOW, _OLD, _ADVANTAGES, _MASK
    with self.assertRaisesRegex(ValueError, "max_ratio must be positive"):
      ppo.cispo_loss(*batch, max_ratio=0.0)
    with self.assertRaisesRegex(ValueError, "normalizer must be one of"):
      ppo.cispo_loss(*batch, max_ratio=1.2, normalizer="mean")


class AllLossesTest(parameterized.TestCase):
  @hypothesis.given(seed=_SEEDS, name=st.sampled_from(list(_LOSSES)))
  def test_matches_oracle(self, seed, name):
    batch = _batch(seed)
    *arrays, mask = batch
    (loss, _), _ = _jitted(name)(*map(jnp.float32, arrays), mask)
    np.testing.assert_allclose(
      loss, _oracle(name, *batch), rtol=1e-4, atol=1e-5
    )

  @parameterized.parameters(*_LOSSES)
  def test_masked_entries_and_order_are_inert(self, name):
    *arrays, mask = _batch(3)
    arrays = list(map(jnp.float32, arrays))
    if name == "gspo":  # Its advantage is that of the whole response.
      arrays[2] = jnp.broadcast_to(arrays[2][:, :1], mask.shape)
    expected, grad = _jitted(name)(*arrays, mask)
    chex.assert_type(expected[0], jnp.float32)
    self.assertGreater(float(jnp.abs(grad).max()), 0.0)
    np.testing.assert_array_equal(np.asarray(grad)[~mask], 0.0)
    counts = mask | (name == "gspo")
    poisoned = [jnp.where(mask, x, jnp.nan) for x in arrays[:2]]
    poisoned.append(jnp.where(counts, arrays[2], jnp.nan))
    chex.assert_trees_all_equal(
      _jitted(name)(*poisoned, mask), (expected, grad)
    )
    order = np.random.default_rng(3).permutation(len(mask))
    actual, actual_grad = _jitted(name)(
      *[x[order] for x in arrays], mask[order]
    )
    chex.assert_trees_all_close(
      (actual, actual_grad), (expected, grad[order]), rtol=1e-4, atol=1e-6
    )

  @parameterized.parameters(*_LOSSES)
  def test_split_batch(self, name):
    # Two rows a shard: token counts differ between them.
    *arrays, mask = _batch(7)
    arrays = [jnp.float32(x) for x in arrays]
    expected = _jitted(name)(*arrays, mask)

    def shard(*batch):
      value, grad = jax.value_and_grad(
        functools.partial(_LOSSES[name], axis_name="data"), has_aux=True
      )(*batch)
      return value, grad

    shards = [x.reshape(4, 2, 5) for x in (*arrays, mask)]
    actual, grad = jax.vmap(shard, axis_name="data")(*shards)
    for i in (0, 3):
      chex.assert_trees_all_close(
        jax.tree.map(lambda x, i=i: x[i], actual),
        expected[0],
        rtol=1e-4,
        atol=1e-6,
      )
    # The loss is on every shard: four times the gradient, of which `pmean` in
    # an update leaves one.
    np.testing.assert_allclose(
      grad.reshape(8, 5) / 4, expected[1], rtol=1e-4, atol=1e-6
    )

  @parameterized.parameters(*_LOSSES)
  def test_no_gradient_to_constants_or_through_metrics(self, name):
    *arrays, mask = _batch(5)
    arrays = [jnp.float32(x) for x in arrays]
    grads = jax.grad(lambda *x: _LOSSES[name](*x, mask)[0], argnums=(1, 2))(
      *arrays
    )
    chex.assert_trees_all_equal(grads, jax.tree.map(jnp.zeros_like, grads))
    grad = jax.grad(
      lambda x: sum(_LOSSES[name](x, *arrays[1:], mask)[1].values(), x.sum())
    )(arrays[0])
    np.testing.assert_array_equal(grad, np.ones(mask.shape))

  @parameterized.parameters(*_LOSSES)
  def test_empty_mask(self, name):
    *arrays, mask = _batch(5)
    actual = _jitted(name)(*map(jnp.float32, arrays), np.zeros_like(mask))
    chex.assert_trees_all_equal(actual, jax.tree.map(jnp.zeros_like, actual))
