"""Tests of the losses on pairs and rankings of responses."""

import functools
import math

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized
from hypothesis import strategies as st

from rljax.losses import preference
from tests import oracles_offline as oracles

_SEEDS = st.integers(0, 2**32 - 1)

# Chosen and rejected, 4.0 apart with all their tokens and 3.4 without the
# rejected one's last.
_LOG_PROBS = np.float32([[[-0.5, -1.2, -3.0], [-0.9, -2.0, -0.7]]])
_REF_LOG_PROBS = np.float32([[[-0.7, -1.0, -4.0], [-0.4, -0.1, -0.1]]])
_FULL = np.ones((1, 2, 3), bool)
_SHORT = np.array([[[True, True, True], [True, True, False]]])


def _spread_out(sums, lengths, length):
  """Log-probs `[..., T]` of the given sums, and a mask of the lengths."""
  sums, lengths = np.asarray(sums, np.float32), np.asarray(lengths)
  mask = np.arange(length) < lengths[..., None]
  return np.where(mask, (sums / lengths)[..., None], -50.0), mask


# Two pairs with sums of log-probabilities (-10, -12) and (-14, -13), log-ratios
# h = 1.5 and -0.7, and 5 and 6, 7 and 4 tokens.
_PAIRS, _PAIRS_MASK = _spread_out([[-10, -12], [-14, -13]], [[5, 6], [7, 4]], 7)
_PAIRS_REF, _ = _spread_out([[-11, -11.5], [-13.5, -13.2]], [[5, 6], [7, 4]], 7)


def _batch(seed, num_candidates=2, batch=8, length=4):
  """Log-probs, reference, rewards and a mask, one candidate missing."""
  rng = np.random.default_rng(seed)
  shape = (batch, num_candidates, length)
  log_probs = -rng.exponential(size=shape)
  ref_log_probs = log_probs + rng.normal(0.0, 0.5, size=shape)
  rewards = -np.sort(-rng.normal(size=shape[:2]), axis=1)
  mask = rng.random(shape) < 0.7
  mask[..., 0] = True
  mask[rng.integers(batch), num_candidates - 1] = False
  return log_probs, ref_log_probs, rewards, mask


def _float32(arrays):
  return [jnp.array(x) if x.dtype == bool else jnp.float32(x) for x in arrays]


def _dpo(log_probs, ref_log_probs, rewards, mask, **settings):
  return preference.dpo_loss(
    log_probs, ref_log_probs, mask, beta=0.5, **settings
  )


def _pro(log_probs, ref_log_probs, rewards, mask, **settings):
  return preference.pro_loss(log_probs, rewards, mask, **settings)


def _kto(log_probs, ref_log_probs, rewards, mask, axis_name=None):
  """Over the first candidates; the second ones serve as mismatched."""
  point = preference.kto_reference_point(
    log_probs[:, 1], ref_log_probs[:, 1], mask[:, 1], axis_name=axis_name
  )
  return preference.kto_loss(
    log_probs[:, 0],
    ref_log_probs[:, 0],
    point,
    rewards[:, 0] > 0.5,
    mask[:, 0],
    beta=0.5,
    undesirable_weight=1.5,
    axis_name=axis_name,
  )


def _simpo(log_probs, ref_log_probs, rewards, mask, **settings):
  return preference.simpo_loss(
    log_probs, mask, beta=2.0, margin=1.0, **settings
  )


def _orpo(log_probs, ref_log_probs, rewards, mask, **settings):
  return preference.orpo_loss(log_probs, mask, odds_weight=0.5, **settings)


def _cpo(log_probs, ref_log_probs, rewards, mask, **settings):
  return preference.cpo_loss(
    log_probs, mask, beta=0.5, nll_weight=0.7, **settings
  )


_LOSSES = {
  "dpo": _dpo,
  "ipo": functools.partial(_dpo, loss_type="ipo", per_token=True),
  "pro": _pro,
  "kto": _kto,
  "simpo": _simpo,
  "orpo": _orpo,
  "cpo": _cpo,
}


@functools.cache
def _jitted(name):
  """Value and gradient of a loss, compiled once for all drawn examples."""
  return jax.jit(jax.value_and_grad(_LOSSES[name], has_aux=True))


class DpoLossTest(parameterized.TestCase):
  @chex.all_variants
  def test_worked_example(self):
    def losses(log_probs, ref_log_probs, mask):
      results = {}
      for beta in (0.1, 0.5):
        loss_fn = functools.partial(preference.dpo_loss, beta=beta)
        results[beta] = (
          *jax.value_and_grad(loss_fn, has_aux=True)(
            log_probs, ref_log_probs, mask
          ),
          loss_fn(log_probs, ref_log_probs, mask, reference_free=True)[0],
        )
      return results

    losses_fn = self.variant(losses)
    for mask, beta, loss, grad, rewards, reference_free in (
      (_FULL, 0.1, 0.513015, 0.040131, (0.10, -0.30), 0.749659),
      (_FULL, 0.5, 0.126928, 0.059601, (0.50, -1.50), 1.005492),
      (_SHORT, 0.1, 0.537528, 0.041581, (0.10, -0.24), 0.787192),
      (_SHORT, 0.5, 0.167786, 0.077233, (0.50, -1.20), 1.241154),
    ):
      (actual, metrics), actual_grad, actual_free = losses_fn(
        _LOG_PROBS, _REF_LOG_PROBS, mask
      )[beta]
      np.testing.assert_allclose(actual, loss, atol=1e-6)
      signs = np.float32([[[-1.0], [1.0]]])
      np.testing.assert_allclose(
        actual_grad, np.where(mask, signs * grad, 0.0), atol=1e-6
      )
      np.testing.assert_allclose(actual_free, reference_free, atol=1e-6)
      sums = np.sum(_LOG_PROBS, axis=2, where=mask)[0]
      expected = {
        "dpo/loss": loss,
        "dpo/accuracy": 1.0,
        "dpo/margin": rewards[0] - rewards[1],
        "dpo/chosen_reward": rewards[0],
        "dpo/rejected_reward": rewards[1],
        "dpo/chosen_log_prob": sums[0],
        "dpo/rejected_log_prob": sums[1],
      }
      self.assertEqual(set(metrics), set(expected))
      for name, value in expected.items():
        np.testing.assert_allclose(
          metrics[name], value, atol=1e-6, err_msg=name
        )

  @chex.all_variants
  def test_every_type(self):
    rows = [
      # Settings, then the losses of the pairs (h = 1.5, -0.7).
      ({"beta": 0.1}, [0.620957, 0.728760]),
      ({"beta": 0.1, "label_smoothing": 0.1}, [0.635957, 0.721760]),
      (
        {"beta": 0.1, "label_smoothing": 0.1, "loss_type": "robust"},
        [0.602207, 0.737510],
      ),
      ({"beta": 0.1, "loss_type": "hinge"}, [0.85, 1.07]),
      ({"beta": 0.1, "loss_type": "ipo"}, [12.25, 32.49]),
      (
        {"beta": 0.1, "loss_type": "ipo", "per_token": True},
        [22.246944, 26.229031],
      ),
    ]

    def losses(log_probs, ref_log_probs, mask):
      def of(log_probs, ref_log_probs, mask, **settings):
        return preference.dpo_loss(log_probs, ref_log_probs, mask, **settings)

      results = []
      for settings, _ in rows:
        both = of(log_probs, ref_log_probs, mask, **settings)[0]
        each = [
          of(*[x[i : i + 1] for x in (log_probs, ref_log_probs, mask)],
             **settings)[0]
          for i in range(2)
        ]  # fmt: skip
        results.append((both, each))
      return results

    results = self.variant(losses)(_PAIRS, _PAIRS_REF, _PAIRS_MASK)
    for (both, each), (settings, expected) in zip(results, rows, strict=True):
      np.testing.assert_allclose(
        each, expected, rtol=1e-6, atol=1e-6, err_msg=str(settings)
      )
      np.testing.assert_allclose(
        both, np.mean(expected), rtol=1e-6, atol=1e-6, err_msg=str(settings)
      )

  @chex.all_variants
  def test_gradients_of_the_sums(self):
    def grads(log_probs, ref_log_probs, mask):
      return [
        jax.grad(
          lambda *args, loss_type=loss_type: (
            2.0 * preference.dpo_loss(*args, beta=0.1, loss_type=loss_type)[0]
          )
        )(log_probs, ref_log_probs, mask)
        for loss_type in ("sigmoid", "hinge", "ipo")
      ]

    sigmoid, hinge, ipo = self.variant(grads)(_PAIRS, _PAIRS_REF, _PAIRS_MASK)
    # A token's gradient is that of its sum; of the rejected, the opposite.
    for grad, expected in (
      (sigmoid, [-0.046257, -0.051749]),
      (hinge, [-0.1, -0.1]),
      (ipo, [2 * (1.5 - 5), 2 * (-0.7 - 5)]),
    ):
      expected = np.array(expected)[:, None, None] * [[[1.0], [-1.0]]]
      np.testing.assert_allclose(
        grad, np.where(_PAIRS_MASK, expected, 0.0), rtol=1e-6, atol=1e-6
      )

  @chex.all_variants
  def test_weights(self):
    # From reward gaps of 1.5 and 0.3: σ(gap), the gap, the gap by its mean.
    gaps = np.float32([1.5, 0.3])
    cases = [
      (1 / (1 + np.exp(-gaps)), [0.507679, 0.418630]),
      (gaps, [0.931436, 0.218628]),
      (gaps / gaps.mean(), [1.034928, 0.242920]),
    ]
    np.testing.assert_allclose(cases[0][0], [0.817574, 0.574443], atol=1e-6)
    loss_fn = self.variant(
      lambda *args: preference.dpo_loss(*args[:3], beta=0.1, weights=args[3])[0]
    )
    for weights, expected in cases:
      loss = loss_fn(_PAIRS, _PAIRS_REF, _PAIRS_MASK, weights)
      np.testing.assert_allclose(loss, np.mean(expected), atol=1e-6)

  def test_equal_policies(self):
    loss_and_grad = jax.value_and_grad(
      lambda *args: preference.dpo_loss(*args, beta=0.3)[0]
    )
    loss, grad = loss_and_grad(_LOG_PROBS, _LOG_PROBS, _FULL)
    np.testing.assert_allclose(loss, math.log(2), rtol=1e-6)
    np.testing.assert_allclose(grad[0, 0], [-0.15] * 3, rtol=1e-6)
    np.testing.assert_allclose(grad[0, 1], [0.15] * 3, rtol=1e-6)
    loss, _ = preference.dpo_loss(
      _LOG_PROBS, _LOG_PROBS, _FULL, beta=0.3, loss_type="ipo"
    )
    np.testing.assert_allclose(loss, 1 / (4 * 0.3**2), rtol=1e-6)

  @parameterized.parameters(
    ("sigmoid", 0.0), ("sigmoid", 0.2), ("robust", 0.2), ("hinge", 0.0)
  )
  def test_huge_differences_stay_finite(self, loss_type, smoothing):
    for difference in (-1e4, 1e4):
      log_probs = jnp.array([[[difference], [0.0]]])
      loss, grad = jax.value_and_grad(
        lambda x, loss_type=loss_type, smoothing=smoothing: preference.dpo_loss(
          x,
          jnp.zeros_like(x),
          jnp.ones((1, 2, 1), bool),
          beta=1.0,
          loss_type=loss_type,
          label_smoothing=smoothing,
        )[0]
      )(log_probs)
      chex.assert_tree_all_finite((loss, grad))

  def test_no_gradient_to_constants(self):
    grads = jax.grad(
      lambda ref, weights: preference.dpo_loss(
        _PAIRS, ref, _PAIRS_MASK, beta=0.1, weights=weights
      )[0],
      argnums=(0, 1),
    )(jnp.array(_PAIRS_REF), jnp.ones(2))
    chex.assert_trees_all_equal(grads, jax.tree.map(jnp.zeros_like, grads))

  @hypothesis.given(
    seed=_SEEDS,
    case=st.sampled_from(
      [
        ("sigmoid", 0.0),
        ("sigmoid", 0.2),
        ("robust", 0.2),
        ("hinge", 0.0),
        ("ipo", 0.0),
      ]  # fmt: skip
    ),
  )
  def test_matches_oracle(self, seed, case):
    log_probs, ref_log_probs, _, mask = _batch(seed)
    loss, _ = _dpo(
      *_float32([log_probs, ref_log_probs, mask[:, 0, 0], mask]),
      loss_type=case[0],
      label_smoothing=case[1],
    )
    expected = oracles.dpo_loss(log_probs, ref_log_probs, mask, 0.5, *case)
    np.testing.assert_allclose(loss, expected, rtol=1e-4, atol=1e-5)

  def test_bad_input(self):
    batch = _LOG_PROBS, _REF_LOG_PROBS, _FULL
    for settings, message in (
      ({"beta": 0.0}, "beta must be positive, got 0.0"),
      (
        {"beta": 0.1, "loss_type": "slic"},
        "loss_type must be one of sigmoid, robust, hinge, ipo, got 'slic'",
      ),
      (
        {"beta": 0.1, "label_smoothing": 0.5},
        r"label_smoothing must lie in \[0, 0.5\), got 0.5",
      ),
      (
        {"beta": 0.1, "label_smoothing": 0.1, "loss_type": "ipo"},
        "label_smoothing belongs to sigmoid and robust; for ipo it must be 0",
      ),
    ):
      with self.assertRaisesRegex(ValueError, message):
        preference.dpo_loss(*batch, **settings)
    with self.assertRaisesRegex(
      ValueError, "ref_log_probs may be None only if reference_free"
    ):
      preference.dpo_loss(_LOG_PROBS, None, _FULL, beta=0.1)
    preference.dpo_loss(_LOG_PROBS, None, _FULL, beta=0.1, reference_free=True)
    for position in range(3):
      wrong_shape, wrong_type = list(batch), list(batch)
      wrong_shape[position] = batch[position][:, :, :2]
      wrong_type[position] = np.ones((1, 2, 3), np.int32)
      for wrong in (wrong_shape, wrong_type):
        with self.assertRaises(AssertionError):
          preference.dpo_loss(*wrong, beta=0.1)
    with self.assertRaises(AssertionError):
      preference.dpo_loss(*[x[:, :1] for x in batch], beta=0.1)


class ProLossTest(parameterized.TestCase):
  @chex.all_variants
  def test_worked_example(self):
    loss_and_grad = self.variant(
      jax.value_and_grad(preference.pro_loss, has_aux=True)
    )
    for sums, lengths, rewards, ranking, sft, slopes in (
      # Sums, lengths, rewards; ranking and supervised part, d loss / d S.
      ([-4.7, -3.6], [3, 3], [1.2, -0.4], 1.0289, 0.235, [-0.39272, 0.34272]),
      (
        [-4.7, -2.9],
        [3, 2],
        [1.2, -0.4],
        0.79083,
        0.235,
        [-0.341484, 0.437225],
      ),
      # In the wrong order, the first response is pushed down.
      (
        [-4.7, -3.6],
        [3, 3],
        [-0.4, 1.2],
        0.442233,
        0.235,
        [0.140613, -0.190613],
      ),
      (
        [-4.7, -3.6, -6.0],
        [3, 3, 4],
        [1.2, 0.5, -0.4],
        2.569665,
        0.94,
        [-0.661330, 0.036912, 0.157485],
      ),
    ):
      log_probs, mask = _spread_out([sums], [lengths], 4)
      (loss, metrics), grad = loss_and_grad(
        log_probs, np.float32([rewards]), mask
      )
      expected = {
        "pro/loss": ranking + sft,
        "pro/ranking_loss": ranking,
        "pro/sft_loss": sft,
        "pro/accuracy": 0.0,
        "pro/misordered_fraction": float(rewards[0] < rewards[1]),
      }
      self.assertEqual(set(metrics), set(expected))
      for name, value in expected.items():
        np.testing.assert_allclose(
          metrics[name], value, atol=1e-6, err_msg=name
        )
      np.testing.assert_array_equal(loss, metrics["pro/loss"])
      # s = S / n: a token's gradient is that of the sum.
      np.testing.assert_allclose(
        grad,
        np.where(mask, np.array(slopes)[None, :, None], 0.0),
        atol=1e-6,
      )

  @chex.all_variants
  def test_book_values(self):
    log_probs, mask = _spread_out([[-4.0, -5.0, -7.5]], [[5, 5, 5]], 5)
    rewards = np.float32([[2.0, 1.0, 0.5]])

    def losses(log_probs, rewards, mask):
      pro_loss = preference.pro_loss
      return (
        pro_loss(log_probs[:, 1:], rewards[:, 1:], mask[:, 1:], sft_weight=0.0),
        pro_loss(log_probs, rewards, mask, sft_weight=0.0),
        pro_loss(log_probs, None, mask, sft_weight=0.0),
        pro_loss(log_probs, rewards, mask),
      )

    last_two, all_three, unit, with_sft = self.variant(losses)(
      log_probs, rewards, mask
    )
    np.testing.assert_allclose(last_two[0], 0.575939, atol=1e-6)
    np.testing.assert_allclose(all_three[0], 1.520367, atol=1e-6)
    np.testing.assert_allclose(
      all_three[0] - last_two[0], 0.944427, atol=1.5e-6
    )
    np.testing.assert_allclose(unit[0], 1.313623, atol=1e-6)
    np.testing.assert_allclose(with_sft[0], 2.320367, atol=1e-6)
    np.testing.assert_allclose(all_three[1]["pro/accuracy"], 1.0)

  @chex.variants(with_jit=True, without_jit=True)
  def test_published_mask(self):
    # Three tokens and a slot of padding: s over the first three, or over the
    # last three, or without the slot over the last two.
    log_probs = np.float32([[[-1.0, -0.5, -0.2, -6.0]] * 2])
    mask = np.array([[[True, True, True, False]] * 2])

    def means(published_mask, length):
      # Of equal candidates the ranking is log 2, whatever their mean, and
      # the gradient tells which tokens count: -1 - 1 / 2n in the first one,
      # 1 / 2n in the second.
      grad_fn = self.variant(
        jax.grad(
          lambda x: preference.pro_loss(
            x,
            None,
            mask[..., :length],
            sft_weight=1.0,
            published_mask=published_mask,
          )[0]
        )
      )
      first, second = np.asarray(grad_fn(log_probs[..., :length]))[0]
      scored = second != 0
      number = int(scored.sum())
      np.testing.assert_allclose(second[scored], 0.5 / number, rtol=1e-5)
      np.testing.assert_allclose(first[scored], -1 - 0.5 / number, rtol=1e-5)
      return log_probs[0, 0, :length][scored].mean(), number

    for published_mask, length, mean, number in (
      (False, 4, -0.566667, 3),
      (False, 3, -0.566667, 3),
      (True, 4, -2.233333, 3),
      (True, 3, -0.350000, 2),
    ):
      actual, actual_number = means(published_mask, length)
      np.testing.assert_allclose(actual, mean, atol=1e-6)
      self.assertEqual(actual_number, number)
    loss, _ = preference.pro_loss(
      log_probs, None, mask, sft_weight=1.0, published_mask=True
    )
    np.testing.assert_allclose(loss, math.log(2) + 6.7, rtol=1e-6)

  def test_missing_candidates(self):
    log_probs, _, rewards, mask = _float32(_batch(0, num_candidates=3))
    mask = mask.at[:, 2].set(False)
    pro_loss = jax.jit(preference.pro_loss)
    (loss, _), grad = _jitted("pro")(log_probs, log_probs, rewards, mask)
    expected, _ = pro_loss(log_probs[:, :2], rewards[:, :2], mask[:, :2])
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    np.testing.assert_array_equal(grad[:, 2], 0.0)
    # One candidate is no ranking: such a prompt does not count at all.
    mask = mask.at[1:, 1].set(False)
    loss, _ = pro_loss(log_probs, rewards, mask)
    expected, _ = pro_loss(log_probs[:1], rewards[:1], mask[:1])
    np.testing.assert_allclose(loss, expected, rtol=1e-6)

  def test_deep_underflow_stays_finite(self):
    # exp(-200 * 3) is 0 even in float64 with 1e-10 beside it.
    log_probs = jnp.full((1, 2, 1), -200.0)
    (loss, _), grad = jax.value_and_grad(preference.pro_loss, has_aux=True)(
      log_probs, jnp.array([[3.0, 0.0]]), jnp.ones((1, 2, 1), bool)
    )
    np.testing.assert_allclose(loss, math.log(2) + 10.0, rtol=1e-6)
    np.testing.assert_allclose(grad[0, :, 0], [-1.5 - 0.05, 1.5], rtol=1e-6)

  @hypothesis.given(seed=_SEEDS)
  def test_matches_oracle(self, seed):
    log_probs, _, rewards, mask = _batch(seed, num_candidates=3)
    batch = _float32([log_probs, log_probs, rewards, mask])
    (loss, _), _ = _jitted("pro")(*batch)
    expected = oracles.pro_loss(log_probs, rewards, mask, 0.05)
    np.testing.assert_allclose(loss, expected, rtol=1e-4, atol=1e-5)

  def test_no_gradient_to_rewards(self):
    log_probs, _, rewards, mask = _float32(_batch(1, num_candidates=3))
    grad = jax.grad(lambda r: preference.pro_loss(log_probs, r, mask)[0])(
      rewards
    )
    np.testing.assert_array_equal(grad, np.zeros((8, 3)))

  def test_bad_input(self):
    rewards = np.float32([[1.0, 0.0]])
    with self.assertRaisesRegex(
      ValueError, "PRO ranks two candidates or more, got 1"
    ):
      preference.pro_loss(_LOG_PROBS[:, :1], None, _FULL[:, :1])
    with self.assertRaisesRegex(
      ValueError, "sft_weight must not be negative, got -1"
    ):
      preference.pro_loss(_LOG_PROBS, rewards, _FULL, sft_weight=-1)
    for wrong in (
      (_LOG_PROBS[..., :2], rewards, _FULL),
      (_LOG_PROBS, rewards[:, :1], _FULL),
      (_LOG_PROBS, np.ones((1, 2), np.int32), _FULL),
      (_LOG_PROBS, rewards, np.ones((1, 2, 3), np.int32)),
    ):
      with self.assertRaises(AssertionError):
        preference.pro_loss(*wrong)


class KtoLossTest(parameterized.TestCase):
  @chex.all_variants
  def test_hand_computed(self):
    # Log-ratios 1, -0.5 of the desirable and -0.5, 0.2 of the others.
    log_ratios = np.float32([[1.0], [-0.5], [-0.5], [0.2]])
    log_probs, ref_log_probs = log_ratios - 3.0, np.full((4, 1), -3.0)
    ref_log_probs = np.float32(ref_log_probs)
    is_desirable = np.array([True, True, False, False])
    mask = np.ones((4, 1), bool)

    def losses(log_probs, ref_log_probs, point, is_desirable, mask):
      batch = log_probs, ref_log_probs, is_desirable, mask
      kto_loss = functools.partial(preference.kto_loss, beta=0.1)
      return (
        [
          kto_loss(*[x[i : i + 1] for x in batch[:2]], point,
                   *[x[i : i + 1] for x in batch[2:]])[0]
          for i in range(4)
        ],
        kto_loss(log_probs, ref_log_probs, point, is_desirable, mask),
        kto_loss(
          log_probs,
          ref_log_probs,
          point,
          is_desirable,
          mask,
          undesirable_weight=1.5,
        )[0],
      )  # fmt: skip

    losses_fn = self.variant(losses)
    for point, each, mean, weighted in (
      (0.0, [0.475021, 0.512497, 0.487503, 0.505000], 0.495005, 0.619068),
      (0.25, [0.481259, 0.518741, 0.481259, 0.498750], 0.495002, 0.617503),
    ):
      actual, (loss, metrics), actual_weighted = losses_fn(
        log_probs, ref_log_probs, np.float32(point), is_desirable, mask
      )
      np.testing.assert_allclose(actual, each, atol=1e-6)
      np.testing.assert_allclose(loss, mean, atol=1e-6)
      np.testing.assert_allclose(actual_weighted, weighted, atol=1e-6)
      expected = {
        "kto/loss": mean,
        "kto/desirable_reward": 0.025,
        "kto/desirable_count": 2.0,
        "kto/undesirable_reward": -0.015,
        "kto/undesirable_count": 2.0,
        "kto/reference_point": point,
      }
      self.assertEqual(set(metrics), set(expected))
      for name, value in expected.items():
        np.testing.assert_allclose(
          metrics[name], value, atol=1e-6, err_msg=name
        )

  @chex.all_variants
  def test_hand_computed_gradient(self):
    # -β σ(x) σ(-x) / 2 of the desirable, with x = β(h - z) = 0.075; the
    # opposite, times 1.5, of the undesirable, with x = -0.005.
    def grads(log_probs, ref_log_probs, point, is_desirable, mask):
      def loss_fn(log_probs, ref_log_probs, point):
        return preference.kto_loss(
          log_probs,
          ref_log_probs,
          point,
          is_desirable,
          mask,
          beta=0.1,
          undesirable_weight=1.5,
        )[0]

      return jax.grad(loss_fn, argnums=(0, 1, 2))(
        log_probs, ref_log_probs, point
      )

    grad, ref_grad, point_grad = self.variant(grads)(
      np.float32([[1.0], [0.2]]),
      np.zeros((2, 1), np.float32),
      np.float32(0.25),
      np.array([True, False]),
      np.ones((2, 1), bool),
    )
    np.testing.assert_allclose(grad, [[-0.0124824], [0.0187499]], atol=1e-6)
    np.testing.assert_array_equal(ref_grad, np.zeros((2, 1)))
    self.assertEqual(float(point_grad), 0.0)

  @chex.variants(with_jit=True, without_jit=True)
  def test_reference_point(self):
    sums, lengths = [-20.0, -22.0, -21.0, -25.0], [4, 4, 4, 5]
    log_probs, mask = _spread_out(sums, lengths, 6)
    ref_log_probs, _ = _spread_out([-20.5, -22.8, -20.9, -25.2], lengths, 6)
    point_fn = self.variant(
      jax.value_and_grad(preference.kto_reference_point, argnums=(0, 1))
    )
    point, grads = point_fn(log_probs, ref_log_probs, mask)
    np.testing.assert_allclose(point, 0.35, atol=1e-5)
    chex.assert_trees_all_equal(grads, jax.tree.map(jnp.zeros_like, grads))
    # The other way round the mean is negative.
    point, _ = point_fn(ref_log_probs, log_probs, mask)
    self.assertEqual(float(point), 0.0)

  def test_equal_policies(self):
    log_probs = np.ones((2, 3), np.float32)
    mask = np.ones((2, 3), bool)
    for is_desirable in ([True, True], [False, False], [True, False]):
      loss, _ = preference.kto_loss(
        log_probs, log_probs, jnp.float32(0.0), np.array(is_desirable), mask,
        beta=0.1,
      )  # fmt: skip
      np.testing.assert_allclose(loss, 0.5)

  @hypothesis.given(seed=_SEEDS, point=st.floats(0.0, 2.0))
  def test_matches_oracle(self, seed, point):
    log_probs, ref_log_probs, rewards, mask = _batch(seed)
    batch = [log_probs[:, 1], ref_log_probs[:, 1]]
    is_desirable = rewards[:, 1] > 0
    loss, _ = preference.kto_loss(
      *_float32(batch),
      jnp.float32(point),
      is_desirable,
      mask[:, 1],
      beta=0.5,
      desirable_weight=1.2,
      undesirable_weight=0.8,
    )
    expected = oracles.kto_loss(
      *batch, point, is_desirable, mask[:, 1], 0.5, 1.2, 0.8
    )
    np.testing.assert_allclose(loss, expected, rtol=1e-4, atol=1e-5)

  def test_bad_input(self):
    log_probs, mask = np.ones((2, 3), np.float32), np.ones((2, 3), bool)
    batch = log_probs, log_probs, jnp.float32(0.0), mask[:, 0], mask
    for name in ("beta", "desirable_weight", "undesirable_weight"):
      with self.assertRaisesRegex(
        ValueError, f"{name} must be positive, got 0"
      ):
        preference.kto_loss(*batch, **{"beta": 0.1, name: 0})
    for position, wrong in (
      (0, log_probs[:1]),
      (1, log_probs[:, :1]),
      (2, jnp.zeros(2)),
      (3, np.ones(2, np.float32)),
      (3, mask[:1, 0]),
      (4, np.ones((2, 3), np.int32)),
    ):
      with self.assertRaises(AssertionError):
        preference.kto_loss(
          *[*batch[:position], wrong, *batch[position + 1 :]], beta=0.1
        )


class ReferenceFreeTest(parameterized.TestCase):
  @chex.all_variants
  def test_hand_computed(self):
    def losses(log_probs, mask):
      def every(*pair):
        return (
          preference.simpo_loss(*pair, beta=2.0, margin=1.0)[0],
          preference.orpo_loss(*pair, odds_weight=1.0)[0],
          preference.orpo_loss(*pair, odds_weight=0.1)[0],
          preference.cpo_loss(*pair, beta=0.1)[0],
        )

      return [
        every(log_probs, mask),
        every(log_probs[:1], mask[:1]),
        every(log_probs[1:], mask[1:]),
      ]

    both, first, second = self.variant(losses)(_PAIRS, _PAIRS_MASK)
    np.testing.assert_allclose(
      both, [0.757337, 2.461225, 2.046123, 2.671268], atol=1e-6
    )
    # The odds terms are 0.693147 and 0.229303, beside an NLL of 2.
    np.testing.assert_allclose(
      first, [1.313262, 2.693147, 2.069315, 2.598139], atol=1e-6
    )
    np.testing.assert_allclose(
      second, [0.201413, 2.229303, 2.022930, 2.744397], atol=1e-6
    )

  @chex.all_variants
  def test_gradients(self):
    # By the chain rule, from the margins 0 and 1.25 of the means, -2 and -2,
    # -2 and -3.25, of the sums, 2 and -1, and of the log odds, 0 and 1.355868:
    # d o / d s = 1 / (1 - e^s).
    def grads(log_probs, mask):
      return (
        jax.grad(
          lambda x: 2 * preference.simpo_loss(x, mask, beta=2.0, margin=1.0)[0]
        )(log_probs),
        jax.grad(
          lambda x: 2 * preference.orpo_loss(x, mask, odds_weight=1.0)[0]
        )(log_probs),
        jax.grad(lambda x: 2 * preference.cpo_loss(x, mask, beta=0.1)[0])(
          log_probs
        ),
      )

    def sigmoid(x):
      return 1 / (1 + np.exp(-x))

    lengths = _PAIRS_MASK.sum(axis=2)
    simpo = -2 * sigmoid(-np.array([-1.0, 1.5]))[:, None] * [[1.0, -1.0]]
    odds = -sigmoid(-np.array([0.0, 1.355868]))[:, None] * [[1.0, -1.0]]
    odds = odds / (1 - np.exp([[-2.0, -2.0], [-2.0, -3.25]]))
    orpo = odds - [[1.0, 0.0]]
    cpo = -0.1 * sigmoid(-np.array([0.2, -0.1]))[:, None] * [[1.0, -1.0]]
    cpo = cpo - [[2 / 12, 0.0]]
    for grad, expected in zip(
      self.variant(grads)(_PAIRS, _PAIRS_MASK),
      (simpo / lengths, orpo / lengths, cpo),
      strict=True,
    ):
      expected = np.where(_PAIRS_MASK, expected[:, :, None], 0.0)
      np.testing.assert_allclose(grad, expected, atol=1e-6)

  def test_metrics(self):
    _, metrics = preference.simpo_loss(
      _PAIRS, _PAIRS_MASK, beta=2.0, margin=1.0
    )
    expected = {
      "simpo/loss": 0.757337,
      "simpo/margin": 1.25,
      "simpo/accuracy": 0.5,
      "simpo/chosen_log_prob": -2.0,
      "simpo/rejected_log_prob": -2.625,
    }
    _, more = preference.orpo_loss(_PAIRS, _PAIRS_MASK, odds_weight=0.1)
    expected |= {
      "orpo/loss": 2.046123,
      "orpo/nll": 2.0,
      "orpo/log_odds_ratio": 0.677934,
      "orpo/accuracy": 0.5,
      "orpo/chosen_log_prob": -2.0,
      "orpo/rejected_log_prob": -2.625,
    }
    _, most = preference.cpo_loss(_PAIRS, _PAIRS_MASK, beta=0.1)
    expected |= {
      "cpo/loss": 2.671268,
      "cpo/nll": 2.0,
      "cpo/margin": 0.05,
      "cpo/accuracy": 0.5,
      "cpo/chosen_log_prob": -12.0,
      "cpo/rejected_log_prob": -12.5,
    }
    actual = {**metrics, **more, **most}
    self.assertEqual(set(actual), set(expected))
    for name, value in expected.items():
      np.testing.assert_allclose(actual[name], value, atol=1e-6, err_msg=name)

  def test_simpo_of_equal_means(self):
    log_probs, mask = _spread_out([[-2.0, -4.0]], [[2, 4]], 4)
    loss, _ = preference.simpo_loss(log_probs, mask, beta=2.0, margin=0.7)
    np.testing.assert_allclose(loss, np.log1p(np.exp(0.7)), rtol=1e-6)

  @parameterized.parameters(-1e-6, -0.69, -0.7, -30.0, -200.0, 0.0)
  def test_orpo_at_the_ends(self, mean):
    # o = s - log(1 - e^s): 13.8 at 1 - 1e-6, -30 at e^-30.
    log_probs = jnp.array([[[mean], [-1.0]]])
    (loss, metrics), grad = jax.value_and_grad(
      functools.partial(preference.orpo_loss, odds_weight=1.0), has_aux=True
    )(log_probs, jnp.ones((1, 2, 1), bool))
    chex.assert_tree_all_finite((loss, metrics, grad))
    s = min(mean, -1e-6)
    expected = s - math.log(-math.expm1(s))
    expected -= -1.0 - math.log(-math.expm1(-1.0))
    np.testing.assert_allclose(
      metrics["orpo/log_odds_ratio"], expected, rtol=1e-5
    )

  @hypothesis.given(seed=_SEEDS)
  def test_matches_oracle(self, seed):
    log_probs, _, _, mask = batch = _batch(seed)
    for name, expected in (
      ("simpo", oracles.simpo_loss(log_probs, mask, 2.0, 1.0)),
      ("orpo", oracles.orpo_loss(log_probs, mask, 0.5)),
      ("cpo", oracles.cpo_loss(log_probs, mask, 0.5, 0.7)),
    ):
      (loss, _), _ = _jitted(name)(*_float32(batch))
      np.testing.assert_allclose(
        loss, expected, rtol=1e-4, atol=1e-5, err_msg=name
      )

  def test_bad_input(self):
    with self.assertRaisesRegex(ValueError, "beta must be positive, got 0"):
      preference.simpo_loss(_PAIRS, _PAIRS_MASK, beta=0, margin=1.0)
    with self.assertRaisesRegex(
      ValueError, "odds_weight must be positive, got -1"
    ):
      preference.orpo_loss(_PAIRS, _PAIRS_MASK, odds_weight=-1)
    with self.assertRaisesRegex(ValueError, "beta must be positive, got 0"):
      preference.cpo_loss(_PAIRS, _PAIRS_MASK, beta=0)
    with self.assertRaisesRegex(
      ValueError, "nll_weight must not be negative, got -1"
    ):
      preference.cpo_loss(_PAIRS, _PAIRS_MASK, beta=0.1, nll_weight=-1)
    for loss_fn in (
      functools.partial(preference.simpo_loss, beta=2.0, margin=1.0),
      functools.partial(preference.orpo_loss, odds_weight=0.1),
      functools.partial(preference.cpo_loss, beta=0.1),
    ):
      for wrong in (
        (_PAIRS[:, :1], _PAIRS_MASK[:, :1]),
        (_PAIRS[..., :3], _PAIRS_MASK),
        (_PAIRS, np.ones(_PAIRS.shape, np.int32)),
      ):
        with self.assertRaises(AssertionError):
          loss_fn(*wrong)


class PropertiesTest(parameterized.TestCase):
  @parameterized.parameters(*_LOSSES)
  def test_masked_entries_and_order_are_inert(self, name):
    @hypothesis.given(seed=_SEEDS)
    @hypothesis.settings(max_examples=5)
    def check(seed):
      batch = _float32(_batch(seed))
      log_probs, ref_log_probs, rewards, mask = batch
      expected = _jitted(name)(*batch)
      present = jnp.any(mask, axis=2)
      poisoned = [
        jnp.where(mask, log_probs, jnp.nan),
        jnp.where(mask, ref_log_probs, jnp.nan),
        jnp.where(present, rewards, jnp.nan),
      ]
      actual = _jitted(name)(*poisoned, mask)
      chex.assert_trees_all_equal(actual, expected)
      np.testing.assert_array_equal(np.asarray(actual[1])[~mask], 0.0)

      order = np.random.default_rng(seed).permutation(8)
      actual = _jitted(name)(*[x[order] for x in batch])
      chex.assert_trees_all_close(
        actual, (expected[0], expected[1][order]), rtol=1e-4, atol=1e-6
      )

    check()

  @parameterized.parameters(*_LOSSES)
  def test_split_batch(self, name):
    _, ref_log_probs, rewards, mask = _float32(_batch(3))
    rng = np.random.default_rng(3)
    features = jnp.float32(rng.normal(0.0, 0.3, size=(8, 2, 4, 3)))
    features = features.at[..., 0].set(ref_log_probs)
    params = jnp.array([1.1, 0.7, -0.4])
    batch = (features, ref_log_probs, rewards, mask)

    def step(axis_name, params, features, *batch):
      def of_params(params):
        log_probs = jnp.einsum("bktf,f->bkt", features, params)
        # Negative, as the odds ask for.
        log_probs = -jax.nn.softplus(-log_probs)
        return _LOSSES[name](log_probs, *batch, axis_name=axis_name)

      (loss, metrics), grads = jax.value_and_grad(of_params, has_aux=True)(
        params
      )
      if axis_name is not None:
        grads = jax.lax.pmean(grads, axis_name)
      return loss, metrics, grads

    expected = jax.jit(functools.partial(step, None))(params, *batch)
    shards = [x.reshape(4, 2, *x.shape[1:]) for x in batch]
    split = jax.vmap(
      functools.partial(step, "data"), (None, *[0] * 4), axis_name="data"
    )
    results = jax.jit(split)(params, *shards)
    for shard in range(4):
      actual = jax.tree.map(lambda x, shard=shard: x[shard], results)
      chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-6)
    self.assertGreater(float(jnp.linalg.norm(expected[2])), 1e-3)

  @parameterized.parameters(*_LOSSES)
  def test_limits(self, name):
    log_probs, ref_log_probs, rewards, mask = _float32(_batch(4))

    def total(log_probs):
      _, metrics = _LOSSES[name](log_probs, ref_log_probs, rewards, mask)
      return sum(metrics.values())

    np.testing.assert_array_equal(
      jax.jit(jax.grad(total))(log_probs), np.zeros(log_probs.shape)
    )
    (loss, metrics), grad = _jitted(name)(
      log_probs, ref_log_probs, rewards, jnp.zeros_like(mask)
    )
    chex.assert_trees_all_equal(
      (loss, metrics, grad), jax.tree.map(jnp.zeros_like, (loss, metrics, grad))
    )

  @parameterized.parameters(*_LOSSES)
  def test_numerical_gradient(self, name):
    log_probs, ref_log_probs, rewards, mask = _float32(_batch(5))
    if name == "kto":  # Its reference point is a constant of the step.
      ref_log_probs = ref_log_probs.at[:, 1].set(log_probs[:, 1] + 1.0)
    chex.assert_numerical_grads(
      jax.jit(lambda x: _LOSSES[name](x, ref_log_probs, rewards, mask)[0]),
      (log_probs - 0.1,),
      order=1,
      atol=5e-3,
      rtol=2e-2,
    )
