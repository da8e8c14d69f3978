"""Tests of the offline losses and their weights."""

import functools

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized
from hypothesis import strategies as st

from rljax.losses import offline
from rljax.ops import advantages as advantages_lib
from tests import oracles_offline as oracles

_SEEDS = st.integers(0, 2**32 - 1)
_WITH_RATIO = ("r_lol", "a_lol", "a_lol_seq")
_BY_ADVANTAGE = ("a_lol", "a_lol_ref_free", "a_lol_seq", "a_lol_kl")

# The worked example: S - S_ref is 1 for the first response; for the second,
# -3 with all its tokens and -2.4 without the last.
_LOG_PROBS = np.float32([[-0.5, -1.2, -3.0], [-0.9, -2.0, -0.7]])
_REF_LOG_PROBS = np.float32([[-0.7, -1.0, -4.0], [-0.4, -0.1, -0.1]])
_VALUES = np.float32([0.5, 0.6])
_FULL = np.ones((2, 3), bool)
_SHORT = np.array([[True, True, True], [True, True, False]])
# Name -> mask, rewards and ε.
_CASES = {
  "T1": (_FULL, np.float32([0.80, 0.65]), 0.9),
  "T2": (_SHORT, np.float32([0.80, 0.65]), 0.9),
  "T3": (_FULL, np.float32([0.80, 0.65]), 0.2),
  "T4": (_SHORT, np.float32([0.80, 0.35]), 0.9),
}
# Row -> algorithm, whether it is clipped, and the losses of the four cases.
_ROWS = {
  "nll": ("nll", True, (4.150000, 3.800000, 4.150000, 3.800000)),
  "wbc": ("wbc", True, (3.050000, 2.822500, 3.050000, 2.387500)),
  "r_gold": ("r_gold", True, (0.705742, 0.592769, 0.705742, 0.497281)),
  "r_lol": ("r_lol", True, (3.689000, 3.666250, 3.192000, 3.622750)),
  "r_lol unclipped": (
    "r_lol",
    False,
    (5.168621, 5.195872, 5.168621, 5.156409),
  ),
  "r_lol_kl": ("r_lol_kl", True, (2.950000, 2.752500, 2.950000, 2.317500)),
  "a_lol": ("a_lol", True, (1.348500, 1.346750, 0.918000, 1.339500)),
  "a_lol unclipped": (
    "a_lol",
    False,
    (1.920870, 1.922966, 1.920870, 1.916389),
  ),
  "a_lol_ref_free": (
    "a_lol_ref_free",
    True,
    (0.795000, 0.777500, 0.795000, 0.705000),
  ),
  "a_lol_seq": ("a_lol_seq", True, (1.124706, 1.115102, 0.849372, 1.093977)),
  "a_lol_seq unclipped": (
    "a_lol_seq",
    False,
    (1.492933, 1.483329, 1.492933, 1.462204),
  ),
  "a_lol_kl": ("a_lol_kl", True, (0.695000, 0.707500, 0.695000, 0.635000)),
}
# (case, row) -> weights, -2 d loss / d log π, before masking.
_WEIGHTS = {
  ("T1", "nll"): [[1.0] * 3, [1.0] * 3],
  ("T1", "wbc"): [[0.80] * 3, [0.65] * 3],
  ("T1", "r_gold"): [
    [0.485225, 0.240955, 0.080000],
    [0.264270, 0.087968, 0.322780],
  ],
  ("T1", "r_lol"): [[1.52] * 3, [0.065] * 3],
  ("T1", "r_lol_kl"): [[0.70] * 3, [0.55] * 3],
  ("T1", "a_lol"): [[0.57] * 3, [0.005] * 3],
  ("T1", "a_lol unclipped"): [[0.815485] * 3, [0.002489] * 3],
  ("T1", "a_lol_ref_free"): [[0.30] * 3, [0.05] * 3],
  ("T1", "a_lol_seq"): [
    [0.366421, 0.245619, 0.570000],
    [0.030327, 0.007478, 0.027441],
  ],
  ("T1", "a_lol_seq unclipped"): [
    [0.366421, 0.245619, 0.815485],
    [0.030327, 0.007478, 0.027441],
  ],
  ("T1", "a_lol_kl"): [[0.20] * 3, [-0.05] * 3],
  ("T2", "a_lol"): [[0.57] * 3, [0.005] * 3],
  ("T3", "a_lol"): [[0.36] * 3, [0.04] * 3],
  ("T3", "a_lol_seq"): [[0.36, 0.245619, 0.36], [0.04] * 3],
  ("T4", "a_lol"): [[0.57] * 3, [0.0] * 3],
  ("T4", "a_lol unclipped"): [[0.815485] * 3, [0.0] * 3],
  ("T4", "a_lol_ref_free"): [[0.30] * 3, [0.0] * 3],
  ("T4", "a_lol_seq"): [[0.366421, 0.245619, 0.57], [0.0] * 3],
  ("T4", "a_lol_kl"): [[0.20] * 3, [-0.10] * 3],
}


def _settings(algorithm, clip_epsilon):
  kl_coef = 0.1 if algorithm.endswith("_kl") else 0.0
  return {"clip_epsilon": clip_epsilon, "kl_coef": kl_coef}


def _all_rows(epsilon):
  """Loss, gradient and metrics of every row of the table, in one function."""

  def rows(log_probs, ref_log_probs, rewards, advantages, mask):
    results = {}
    for name, (algorithm, is_clipped, _) in _ROWS.items():
      settings = _settings(algorithm, epsilon if is_clipped else None)

      def loss_fn(log_probs, algorithm=algorithm, settings=settings):
        return offline.offline_loss(
          algorithm,
          log_probs,
          ref_log_probs,
          rewards,
          advantages,
          mask,
          **settings,
        )

      results[name] = jax.value_and_grad(loss_fn, has_aux=True)(log_probs)
    return results

  return rows


def _batch(seed, shape=(8, 5)):
  """Log-probs of policy and reference, rewards, advantages, and a mask.

  One row has no token, the padding is anywhere, and a quarter of the
  advantages is negative.
  """
  rng = np.random.default_rng(seed)
  log_probs = -rng.exponential(size=shape)
  ref_log_probs = log_probs + rng.normal(0.0, 0.5, size=shape)
  mask = rng.random(shape) < 0.7
  mask[rng.integers(shape[0])] = False
  rewards = rng.random(shape[0])
  advantages = rewards - 0.25
  return log_probs, ref_log_probs, rewards, advantages, mask


def _float32(batch):
  """The batch with floats in float32, on the device."""
  return [jnp.array(x) if x.dtype == bool else jnp.float32(x) for x in batch]


@functools.cache
def _jitted(algorithm, clip_epsilon=0.9):
  """Value and gradient of a loss, compiled once for all drawn examples."""
  loss_fn = functools.partial(
    offline.offline_loss, algorithm, **_settings(algorithm, clip_epsilon)
  )
  return jax.jit(jax.value_and_grad(loss_fn, has_aux=True))


class WorkedExampleTest(parameterized.TestCase):
  @chex.all_variants
  @parameterized.parameters(0.9, 0.2)
  def test_losses_and_gradients(self, epsilon):
    rows_fn = self.variant(_all_rows(epsilon))
    for index, (case, (mask, rewards, its_epsilon)) in enumerate(
      _CASES.items()
    ):
      if its_epsilon != epsilon:
        continue
      advantages = rewards - _VALUES
      results = rows_fn(_LOG_PROBS, _REF_LOG_PROBS, rewards, advantages, mask)
      for name, (_, _, losses) in _ROWS.items():
        (loss, metrics), grad = results[name]
        message = f"{case}, {name}"
        np.testing.assert_allclose(
          loss, losses[index], atol=1e-6, rtol=3e-7, err_msg=message
        )
        np.testing.assert_array_equal(metrics["offline/loss"], loss)
        np.testing.assert_array_equal(np.asarray(grad)[~mask], 0.0)
        if (case, name) in _WEIGHTS:
          expected = np.where(mask, -0.5 * np.array(_WEIGHTS[case, name]), 0.0)
          np.testing.assert_allclose(grad, expected, atol=1e-6, err_msg=message)

  @chex.all_variants
  def test_a_missing_stop_gradient_turns_the_sign(self):
    # With the gradient of the ratio as well, the tokens of the first response
    # would get 1.508646 and those of the second 0.003236.
    mask, rewards, _ = _CASES["T1"]

    def grads(log_probs, ref_log_probs, rewards, advantages, mask):
      def loss_fn(log_probs):
        return offline.offline_loss(
          "a_lol",
          log_probs,
          ref_log_probs,
          rewards,
          advantages,
          mask,
          clip_epsilon=None,
        )[0]

      def leaking(log_probs):
        log_ratio = jnp.sum(log_probs - ref_log_probs, axis=1)
        likelihood = jnp.sum(log_probs, axis=1)
        return jnp.mean(-advantages * jnp.exp(log_ratio) * likelihood)

      def surrogate(log_probs):
        log_ratio = jnp.sum(log_probs - ref_log_probs, axis=1)
        return jnp.mean(-advantages * jnp.exp(log_ratio))

      return [
        jax.grad(loss_fn)(log_probs),
        jax.grad(leaking)(log_probs),
        *jax.value_and_grad(surrogate)(log_probs),
      ]

    grad, leaking, value, surrogate = self.variant(grads)(
      _LOG_PROBS, _REF_LOG_PROBS, rewards, rewards - _VALUES, mask
    )
    expected = [[-0.407742] * 3, [-0.001245] * 3]
    np.testing.assert_allclose(grad, expected, atol=1e-6)
    self.assertTrue(np.all(np.asarray(grad) < 0))
    np.testing.assert_allclose(
      leaking, [[1.508646] * 3, [0.003236] * 3], atol=2e-6
    )
    # Unclipped, r ∇log π = ∇r: another value, the same gradient.
    np.testing.assert_allclose(value, -0.408987, atol=1e-6)
    np.testing.assert_allclose(surrogate, grad, atol=1e-6)

  @chex.all_variants
  def test_metrics(self):
    mask, rewards, _ = _CASES["T4"]

    def metrics_of(*batch):
      return {
        name: offline.offline_loss(name, *batch, **_settings(name, 0.9))[1]
        for name in offline.ALGORITHMS
      }

    metrics = self.variant(metrics_of)(
      _LOG_PROBS, _REF_LOG_PROBS, rewards, rewards - _VALUES, mask
    )
    common = {
      "offline/sequence_log_prob_mean": -3.8,
      "offline/log_ratio_mean": -0.7,
      "offline/advantage_mean": 0.15,
      "offline/zero_advantage_fraction": 0.5,
      "offline/tokens": 5.0,
      "offline/count": 2.0,
    }
    # e and e^-2.4; e^0.2, e^-0.2, e and e^-0.5, e^-1.9.
    sequence = {
      "offline/ratio_count": 2.0,
      "offline/ratio_mean": 1.404500,
      "offline/clip_low_fraction": 0.5,
      "offline/clip_high_fraction": 0.5,
    }
    token = {
      "offline/ratio_count": 5.0,
      "offline/ratio_mean": 1.102903,
      "offline/clip_low_fraction": 0.0,
      "offline/clip_high_fraction": 0.2,
    }
    for name in offline.ALGORITHMS:
      expected = dict(common)
      if name in _WITH_RATIO:
        expected |= token if name == "a_lol_seq" else sequence
      names = {*expected, "offline/loss", "offline/weight_mean"}
      self.assertEqual(set(metrics[name]), names)
      for key, value in expected.items():
        np.testing.assert_allclose(
          metrics[name][key], value, atol=1e-6, err_msg=f"{name}, {key}"
        )
    # Three tokens of 0.57 and two of 0 (A⁺) or 0.035 (R).
    np.testing.assert_allclose(
      metrics["a_lol"]["offline/weight_mean"], 0.342, atol=1e-6
    )
    np.testing.assert_allclose(
      metrics["r_lol"]["offline/weight_mean"], 0.926, atol=1e-6
    )

  def test_without_bounds_nothing_is_at_one(self):
    mask, rewards, _ = _CASES["T1"]
    _, metrics = offline.offline_loss(
      "r_lol", _LOG_PROBS, _REF_LOG_PROBS, rewards, None, mask,
      clip_epsilon=None,
    )  # fmt: skip
    self.assertEqual(float(metrics["offline/clip_low_fraction"]), 0.0)
    self.assertEqual(float(metrics["offline/clip_high_fraction"]), 0.0)
    self.assertNotIn("offline/advantage_mean", metrics)


class WeightMetricsTest(parameterized.TestCase):
  @chex.all_variants
  def test_hand_computed(self):
    rewards = jnp.array([0.80, 0.35])
    found = self.variant(
      lambda *arrays: offline.weight_metrics("a_lol", *arrays, clip_epsilon=0.9)
    )(_LOG_PROBS, _REF_LOG_PROBS, rewards - _VALUES, _SHORT)
    # Advantages 0.3 and -0.25; ratios exp(1) and exp(-2.4) = 0.0907, of which
    # the first is above 1.9 and the second below 0.1.
    expected = {
      "offline/advantage_mean": 0.15,
      "offline/zero_advantage_fraction": 0.5,
      "offline/ratio_count": 2.0,
      "offline/ratio_mean": (np.exp(1) + np.exp(-2.4)) / 2,
      "offline/clip_low_fraction": 0.5,
      "offline/clip_high_fraction": 0.5,
    }
    self.assertEqual(found.keys(), expected.keys())
    for name, value in expected.items():
      np.testing.assert_allclose(found[name], value, rtol=1e-5, err_msg=name)

  def test_only_what_the_method_has(self):
    no_ratio = offline.weight_metrics(
      "a_lol_ref_free", _LOG_PROBS, None, _VALUES, _FULL
    )
    self.assertEqual(
      no_ratio.keys(),
      {"offline/advantage_mean", "offline/zero_advantage_fraction"},
    )
    no_advantage = offline.weight_metrics(
      "r_lol", _LOG_PROBS, _REF_LOG_PROBS, None, _FULL, clip_epsilon=None
    )
    self.assertLen(no_advantage, 4)
    # Without bounds none is reached.
    self.assertEqual(no_advantage["offline/clip_high_fraction"], 0)
    self.assertEqual(
      offline.weight_metrics("nll", _LOG_PROBS, None, None, _FULL), {}
    )

  def test_are_those_of_the_loss_without_gradient(self):
    *arrays, mask = _float32(_batch(3))
    for algorithm in offline.ALGORITHMS:
      settings = _settings(algorithm, 0.5)
      loss, metrics = offline.offline_loss(algorithm, *arrays, mask, **settings)
      weights = offline.token_weights(
        algorithm, *arrays, mask, clip_epsilon=0.5
      )
      parts = offline.weighted_loss(
        arrays[0],
        weights,
        mask,
        ref_log_probs=arrays[1],
        kl_coef=settings["kl_coef"],
      )

      def described(log_probs, algorithm=algorithm):
        return offline.weight_metrics(
          algorithm, log_probs, arrays[1], arrays[3], mask, clip_epsilon=0.5
        )

      np.testing.assert_allclose(parts[0], loss, rtol=1e-6)
      self.assertEqual(parts[1] | described(arrays[0]), metrics)
      gradients = jax.jacobian(described)(arrays[0])
      for name, gradient in gradients.items():
        np.testing.assert_array_equal(gradient, np.zeros_like(gradient), name)


class WeightedImitationTest(parameterized.TestCase):
  @chex.all_variants
  def test_hand_computed(self):
    log_probs = np.float32([[-0.2, -1.0, -0.5], [-2.0, -0.1, -0.7]])
    ref_log_probs = np.float32([[-0.3, -1.2, -0.5], [-1.8, -0.2, -0.6]])
    rewards = np.float32([0.9, 0.2])
    names = ("wbc", "r_gold", "a_lol", "a_lol_seq", "a_lol_ref_free")

    def losses(log_probs, ref_log_probs, rewards):
      batch = (ref_log_probs, rewards, rewards - 0.5, jnp.ones((2, 3), bool))
      # Advantage-weighted regression, e^(A / 0.5), at most 20.
      regression = jnp.minimum(jnp.exp((rewards - 0.5) / 0.5), 20.0)
      regression = jnp.broadcast_to(regression[:, None], log_probs.shape)
      return (
        [offline.offline_loss(n, log_probs, *batch)[0] for n in names],
        offline.token_weights("r_gold", log_probs, *batch),
        offline.token_weights("a_lol", log_probs, *batch, clip_epsilon=None),
        regression[:, 0],
        offline.weighted_loss(log_probs, regression, batch[-1])[0],
      )

    actual, gold, a_lol, regression, regression_loss = self.variant(losses)(
      log_probs, ref_log_probs, rewards
    )
    np.testing.assert_allclose(
      actual, [1.045, 0.446577, 0.458952, 0.388487, 0.34], atol=1e-6
    )
    probabilities = [[0.818731, 0.367879, 0.606531]]
    probabilities += [[0.135335, 0.904837, 0.496585]]
    np.testing.assert_allclose(
      gold, np.array(probabilities) * [[0.9], [0.2]], atol=1e-6
    )
    # The ratios are 1.349859 and 0.818731; the second A is negative.
    np.testing.assert_allclose(
      a_lol, [[0.4 * 1.349859] * 3, [0.0] * 3], atol=1e-6
    )
    np.testing.assert_allclose(regression, [2.225541, 0.548812], atol=1e-6)
    np.testing.assert_allclose(regression_loss, 2.660046, atol=1e-6)


class ReductionsTest(parameterized.TestCase):
  def _assert_same(self, name, other, batch, other_batch=None, **settings):
    other_batch = batch if other_batch is None else other_batch
    (loss, _), grad = _jitted(name, **settings)(*batch)
    (expected, _), expected_grad = _jitted(other, **settings)(*other_batch)
    np.testing.assert_array_equal(loss, expected)
    np.testing.assert_array_equal(grad, expected_grad)
    self.assertGreater(float(jnp.linalg.norm(grad)), 1e-3)

  def test_equal_policies(self):
    # The first step, when the policy is the reference.
    log_probs, _, rewards, advantages, mask = _float32(_batch(0))
    batch = [log_probs, log_probs, rewards, advantages, mask]
    self._assert_same("a_lol", "a_lol_ref_free", batch)
    self._assert_same("a_lol_seq", "a_lol_ref_free", batch)
    self._assert_same("r_lol", "wbc", batch)

  def test_values_of_zero(self):
    log_probs, ref_log_probs, rewards, _, mask = _float32(_batch(1))
    advantages = advantages_lib.sequence(rewards, jnp.zeros_like(rewards))
    batch = [log_probs, ref_log_probs, rewards, advantages, mask]
    self._assert_same("a_lol", "r_lol", batch)
    self._assert_same("a_lol", "r_lol", batch, clip_epsilon=None)

  def test_responses_of_one_token(self):
    *arrays, _ = _float32(_batch(2))
    mask = jnp.zeros((8, 5), bool).at[:, 0].set(True)
    self._assert_same("a_lol", "a_lol_seq", [*arrays, mask])
    self._assert_same("a_lol", "a_lol_seq", [*arrays, mask], clip_epsilon=None)

  def test_rewards_of_one(self):
    log_probs, ref_log_probs, rewards, advantages, mask = _float32(_batch(3))
    ones = jnp.ones_like(rewards)
    batch = [log_probs, ref_log_probs, ones, advantages, mask]
    self._assert_same("wbc", "nll", batch)

  def test_no_penalty(self):
    batch = _float32(_batch(4))
    for name, other in (("a_lol_kl", "a_lol_ref_free"), ("r_lol_kl", "wbc")):
      loss_and_grad = jax.value_and_grad(
        functools.partial(offline.offline_loss, name, kl_coef=0.0),
        has_aux=True,
      )
      (loss, _), grad = loss_and_grad(*batch)
      (expected, _), expected_grad = _jitted(other)(*batch)
      np.testing.assert_allclose(loss, expected, rtol=1e-6)
      np.testing.assert_allclose(grad, expected_grad, rtol=1e-6)

  def test_floor_above_one(self):
    batch = _float32(_batch(5))
    for floor in (1.0, 1.5):
      weights = offline.token_weights("r_gold", *batch, gold_floor=floor)
      expected = offline.token_weights("wbc", *batch)
      np.testing.assert_allclose(weights, floor * expected, rtol=1e-6)


class BehaviourTest(parameterized.TestCase):
  @parameterized.parameters(*_BY_ADVANTAGE[:3])
  def test_negative_advantages_teach_nothing(self, algorithm):
    log_probs, ref_log_probs, rewards, advantages, mask = _float32(_batch(6))
    (loss, _), grad = _jitted(algorithm)(
      log_probs, ref_log_probs, rewards, -jnp.abs(advantages), mask
    )
    self.assertEqual(float(loss), 0.0)
    np.testing.assert_array_equal(grad, np.zeros((8, 5)))

  @parameterized.parameters(*offline.ALGORITHMS)
  def test_padding_and_order_are_inert(self, algorithm):
    batch = _float32(_batch(7))
    (loss, _), grad = _jitted(algorithm)(*batch)
    order = np.random.default_rng(7).permutation(8)
    (actual, _), permuted = _jitted(algorithm)(*[x[order] for x in batch])
    np.testing.assert_allclose(actual, loss, rtol=1e-5)
    np.testing.assert_allclose(permuted, grad[order], rtol=1e-5, atol=1e-7)

    log_probs, ref_log_probs, rewards, advantages, mask = batch
    wider = [
      jnp.pad(log_probs, ((0, 0), (0, 3)), constant_values=-7.0),
      jnp.pad(ref_log_probs, ((0, 0), (0, 3)), constant_values=-9.0),
      rewards,
      advantages,
      jnp.pad(mask, ((0, 0), (0, 3))),
    ]
    (actual, _), padded = _value_and_grad(algorithm)(*wider)
    np.testing.assert_allclose(actual, loss, rtol=1e-5)
    np.testing.assert_allclose(padded[:, :5], grad, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(padded[:, 5:], 0.0)

  @parameterized.parameters(*_WITH_RATIO)
  def test_huge_ratios_stay_finite(self, algorithm):
    for difference in (500.0, -500.0):
      batch = (
        jnp.full((1, 5), -1.0),
        jnp.full((1, 5), -1.0 - difference / 5),
        jnp.ones((1,)),
        jnp.ones((1,)),
        jnp.ones((1, 5), bool),
      )
      (loss, metrics), grad = _value_and_grad(algorithm)(*batch)
      weight = 1.9 if difference > 0 else 0.1
      np.testing.assert_allclose(loss, 5 * weight, rtol=1e-6)
      np.testing.assert_allclose(grad, np.full((1, 5), -weight), rtol=1e-6)
      (loss, metrics), grad = _value_and_grad(algorithm, clip_epsilon=None)(
        *batch
      )
      chex.assert_tree_all_finite((loss, metrics, grad))
      limit = np.exp(20.0 if difference > 0 else -20.0)
      np.testing.assert_allclose(grad, np.full((1, 5), -limit), rtol=1e-5)

  def test_noise_moves_the_likelihood_and_not_the_advantage(self):
    # One good response and seven bad ones, each a token of its own kind.
    rewards = jnp.array([0.9, *[0.1] * 7])
    actions = jnp.array([0, *[1] * 7])

    def train(algorithm):
      @jax.jit
      @jax.grad
      def grad_fn(logits):
        log_probs = jax.nn.log_softmax(logits)[actions][:, None]
        return offline.offline_loss(
          algorithm,
          log_probs,
          jnp.full((8, 1), -jnp.log(2.0)),
          rewards,
          rewards - 0.4,
          jnp.ones((8, 1), bool),
        )[0]

      logits = jnp.zeros(2)
      for _ in range(20):
        logits -= grad_fn(logits)
      return float(jax.nn.softmax(logits)[0])

    self.assertLess(train("nll"), 0.3)
    self.assertGreater(train("a_lol"), 0.6)

  @parameterized.parameters(1, 2, 3)
  def test_no_gradient_to_constants(self, argnum):
    batch = _float32(_batch(8))
    for algorithm in offline.ALGORITHMS:
      grad = jax.grad(
        lambda *batch, algorithm=algorithm: offline.offline_loss(
          algorithm, *batch, **_settings(algorithm, 0.9)
        )[0],
        argnums=argnum,
      )(*batch)
      np.testing.assert_array_equal(grad, np.zeros(grad.shape))

  @parameterized.parameters(*offline.ALGORITHMS)
  def test_no_gradient_through_weights_and_metrics(self, algorithm):
    batch = _float32(_batch(9))

    def total(log_probs):
      weights = offline.token_weights(algorithm, log_probs, *batch[1:])
      _, metrics = offline.offline_loss(algorithm, log_probs, *batch[1:])
      return jnp.sum(weights) + sum(metrics.values())

    np.testing.assert_array_equal(jax.grad(total)(batch[0]), np.zeros((8, 5)))

  def test_the_loss_detaches_weights_too(self):
    log_probs, ref_log_probs, _, _, mask = _float32(_batch(10))
    grads = jax.grad(
      lambda weights, ref: offline.weighted_loss(
        log_probs, weights, mask, ref_log_probs=ref, kl_coef=0.5
      )[0],
      argnums=(0, 1),
    )(jnp.ones_like(log_probs), ref_log_probs)
    chex.assert_trees_all_equal(grads, jax.tree.map(jnp.zeros_like, grads))

  def test_empty_mask(self):
    *arrays, mask = _float32(_batch(11))
    for algorithm in ("nll", "a_lol", "a_lol_seq", "r_lol_kl"):
      (loss, metrics), grad = _jitted(algorithm)(*arrays, jnp.zeros_like(mask))
      chex.assert_trees_all_equal(
        (loss, metrics, grad),
        jax.tree.map(jnp.zeros_like, (loss, metrics, grad)),
      )

  def test_float32_inside(self):
    batch = [
      x.astype(jnp.bfloat16) if x.dtype != bool else x
      for x in _float32(_batch(12))
    ]
    wide = [x if x.dtype == bool else x.astype(jnp.float32) for x in batch]
    loss, metrics = offline.offline_loss("a_lol", *batch)
    expected, _ = offline.offline_loss("a_lol", *wide)
    chex.assert_type([loss, *metrics.values()], jnp.float32)
    np.testing.assert_array_equal(loss, expected)

  def test_numerical_gradient(self):
    batch = _float32(_batch(13))
    # The weights are constants of the step: hold them, then differentiate.
    weights = offline.token_weights("a_lol_seq", *batch)
    log_probs, ref_log_probs, mask = batch[0], batch[1], batch[4]
    chex.assert_numerical_grads(
      lambda x: offline.weighted_loss(
        x, weights, mask, ref_log_probs=ref_log_probs, kl_coef=0.3
      )[0],
      (log_probs,),
      order=1,
      atol=2e-3,
      rtol=1e-2,
    )


def _value_and_grad(algorithm, clip_epsilon=0.9):
  """Not compiled: for shapes that are met once."""
  return jax.value_and_grad(
    functools.partial(
      offline.offline_loss, algorithm, **_settings(algorithm, clip_epsilon)
    ),
    has_aux=True,
  )


class PropertiesTest(parameterized.TestCase):
  @parameterized.parameters(*offline.ALGORITHMS)
  def test_matches_oracle(self, algorithm):
    @hypothesis.given(seed=_SEEDS)
    def check(seed):
      batch = _batch(seed)
      (loss, _), grad = _jitted(algorithm)(*_float32(batch))
      weights = oracles.token_weights(algorithm, *batch, 0.9)
      log_probs, ref_log_probs, _, _, mask = batch
      kl_coef = _settings(algorithm, 0.9)["kl_coef"]
      expected = oracles.weighted_loss(
        log_probs, weights, ref_log_probs, mask, kl_coef
      )
      np.testing.assert_allclose(loss, expected, rtol=1e-4, atol=1e-5)
      num_rows = np.any(mask, axis=1).sum()
      np.testing.assert_allclose(
        grad,
        np.where(mask, kl_coef - weights, 0.0) / num_rows,
        rtol=1e-4,
        atol=1e-6,
      )

    check()

  @parameterized.parameters(*offline.ALGORITHMS)
  def test_masked_entries_are_inert(self, algorithm):
    @hypothesis.given(seed=_SEEDS)
    @hypothesis.settings(max_examples=5)
    def check(seed):
      log_probs, ref_log_probs, rewards, advantages, mask = _float32(
        _batch(seed)
      )
      expected = _jitted(algorithm)(
        log_probs, ref_log_probs, rewards, advantages, mask
      )
      counts = jnp.any(mask, axis=1)
      poisoned = [
        jnp.where(mask, log_probs, jnp.nan),
        jnp.where(mask, ref_log_probs, jnp.nan),
        jnp.where(counts, rewards, jnp.nan),
        jnp.where(counts, advantages, jnp.nan),
      ]
      actual = _jitted(algorithm)(*poisoned, mask)
      chex.assert_trees_all_equal(actual, expected)
      np.testing.assert_array_equal(np.asarray(actual[1])[~mask], 0.0)

    check()

  @parameterized.parameters("nll", "r_gold", "r_lol_kl", "a_lol", "a_lol_seq")
  def test_split_batch(self, algorithm):
    _, ref_log_probs, rewards, advantages, mask = _float32(_batch(14))
    rng = np.random.default_rng(14)
    features = jnp.float32(rng.normal(0.0, 0.3, size=(8, 5, 3)))
    features = features.at[..., 0].set(ref_log_probs)
    params = jnp.array([1.1, 0.7, -0.4])
    batch = (features, ref_log_probs, rewards, advantages, mask)

    def step(axis_name, params, features, *batch):
      def of_params(params):
        log_probs = jnp.einsum("btf,f->bt", features, params)
        return offline.offline_loss(
          algorithm,
          log_probs,
          *batch,
          axis_name=axis_name,
          **_settings(algorithm, 0.9),
        )

      (loss, metrics), grads = jax.value_and_grad(of_params, has_aux=True)(
        params
      )
      if axis_name is not None:
        grads = jax.lax.pmean(grads, axis_name)
      return loss, metrics, grads

    expected = jax.jit(functools.partial(step, None))(params, *batch)
    shards = [x.reshape(4, 2, *x.shape[1:]) for x in batch]
    split = jax.vmap(
      functools.partial(step, "data"), (None, *[0] * 5), axis_name="data"
    )
    results = jax.jit(split)(params, *shards)
    for shard in range(4):
      actual = jax.tree.map(lambda x, shard=shard: x[shard], results)
      chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-6)
    self.assertGreater(float(jnp.linalg.norm(expected[2])), 1e-3)


class BanditTest(parameterized.TestCase):
  """One prompt, four responses of one token, rewards 0.1, 0.3, 0.6, 0.9.

  The expected gradient is followed to its end, under a uniform reference and
  the exact value 0.475.
  """

  @parameterized.parameters(
    ("nll", None, 0.9, [0.25, 0.25, 0.25, 0.25]),
    ("wbc", None, 0.9, [0.052632, 0.157895, 0.315789, 0.473684]),
    # Drawn by reward and weighed by reward: as R².
    ("wbc", "reward", 0.9, [0.007874, 0.070866, 0.283465, 0.637795]),
    ("r_gold", None, 0.9, [0.011111, 0.033333, 0.066667, 0.888889]),
    ("r_lol", None, 0.9, [0.004167, 0.012500, 0.270833, 0.712500]),
    # The first two go to zero, but slowly: the last two are renormalized.
    ("a_lol_ref_free", None, 0.9, [0, 0, 0.227273, 0.772727]),
    ("a_lol_ref_free", "advantage", 0.9, [0, 0, 0.079618, 0.920382]),
    ("a_lol", "advantage", 0.2, [0, 0, 0.054526, 0.945474]),
    ("a_lol", "advantage", 0.9, [0, 0, 0.004532, 0.995468]),
    ("a_lol", "advantage", None, [0, 0, 0, 1]),
    ("a_lol_kl", "advantage", 0.9, [0, 0, 0.022125, 0.977875]),
  )
  def test_end_point(self, algorithm, priority, epsilon, expected):
    rewards = jnp.array([0.1, 0.3, 0.6, 0.9])
    advantages = advantages_lib.sequence(rewards, jnp.full((4,), 0.475))
    scores, mode = {
      None: (rewards, "none"),
      "reward": (rewards, "good_priority"),
      "advantage": (advantages, "good_priority"),
    }[priority]
    probabilities = advantages_lib.priority_weights(scores, mode=mode)

    def loss_fn(logits):
      def of_response(log_prob, reward, advantage):
        return offline.offline_loss(
          algorithm,
          log_prob[None, None],
          jnp.full((1, 1), -jnp.log(4.0)),
          reward[None],
          advantage[None],
          jnp.ones((1, 1), bool),
          **_settings(algorithm, epsilon),
        )[0]

      log_probs = jax.nn.log_softmax(logits)
      losses = jax.vmap(of_response)(log_probs, rewards, advantages)
      return jnp.sum(probabilities * losses)

    @jax.jit
    def train(logits):
      def step(_, logits):
        return logits - 0.5 * jax.grad(loss_fn)(logits)

      return jax.lax.fori_loop(0, 20_000, step, logits)

    policy = np.asarray(jax.nn.softmax(train(jnp.zeros(4))))
    if expected[0] == 0:
      self.assertLess(policy[:2].sum(), 0.01)
      policy = np.array([0, 0, *policy[2:] / policy[2:].sum()])
    np.testing.assert_allclose(policy, expected, atol=2e-3)


class BadInputTest(parameterized.TestCase):
  def test_settings(self):
    batch = _LOG_PROBS, _REF_LOG_PROBS, np.ones(2, np.float32), _VALUES, _FULL
    names = ", ".join(offline.ALGORITHMS)
    for algorithm, settings, message in (
      ("ppo", {}, f"algorithm must be one of {names}, got 'ppo'"),
      (
        "a_lol",
        {"clip_epsilon": 0.0},
        "clip_epsilon must be positive, or None for no clipping, got 0.0",
      ),
      (
        "r_gold",
        {"gold_floor": -0.1},
        "gold_floor must not be negative, got -0.1",
      ),
      ("a_lol_kl", {"kl_coef": -1.0}, "kl_coef must not be negative, got -1.0"),
      (
        "a_lol",
        {"kl_coef": 0.1},
        "kl_coef belongs to r_lol_kl and a_lol_kl; for a_lol it must be 0, "
        "got 0.1",
      ),
    ):
      with self.assertRaisesRegex(ValueError, message):
        offline.offline_loss(algorithm, *batch, **settings)

  def test_what_a_method_needs(self):
    ones = np.ones(2, np.float32)
    for algorithm in offline.ALGORITHMS:
      needed = set()
      if algorithm in _WITH_RATIO:
        needed.add("ref_log_probs")
      if algorithm in _BY_ADVANTAGE:
        needed.add("advantages")
      elif algorithm != "nll":
        needed.add("rewards")
      given = {
        "ref_log_probs": _REF_LOG_PROBS,
        "rewards": ones,
        "advantages": ones,
      }
      # What is not needed need not be there.
      only = {name: given[name] if name in needed else None for name in given}
      offline.offline_loss(algorithm, _LOG_PROBS, *only.values(), _FULL)
      for name in needed:
        lacking = {**given, name: None}
        with self.assertRaisesRegex(
          ValueError, f"{algorithm} needs {name}, got None"
        ):
          offline.offline_loss(algorithm, _LOG_PROBS, *lacking.values(), _FULL)
    with self.assertRaisesRegex(
      ValueError, "kl_coef 0.1 needs ref_log_probs, got None"
    ):
      offline.offline_loss(
        "a_lol_kl", _LOG_PROBS, None, None, ones, _FULL, kl_coef=0.1
      )

  def test_needed_arrays(self):
    self.assertEqual(offline.needed_arrays("nll"), ())
    self.assertEqual(offline.needed_arrays("wbc"), ("rewards",))
    self.assertEqual(
      offline.needed_arrays("a_lol"), ("advantages", "ref_log_probs")
    )
    given = {
      "ref_log_probs": _REF_LOG_PROBS,
      "rewards": np.ones(2, np.float32),
      "advantages": _VALUES,
    }

    @functools.partial(jax.jit, static_argnums=0)
    def loss(algorithm, arrays):
      # The penalty is what the methods with one need a reference for.
      arrays = [arrays.get(name) for name in given]
      settings = _settings(algorithm, 0.9)
      return offline.offline_loss(
        algorithm, _LOG_PROBS, *arrays, _FULL, **settings
      )[0]

    for algorithm in offline.ALGORITHMS:
      needed = offline.needed_arrays(algorithm)
      only = {name: given[name] for name in needed}
      # They suffice, and the others change nothing.
      np.testing.assert_array_equal(
        loss(algorithm, only), loss(algorithm, given), err_msg=algorithm
      )
      for name in needed:
        lacking = {other: given[other] for other in given if other != name}
        with self.assertRaisesRegex(ValueError, f"needs {name}, got None"):
          loss(algorithm, lacking)
    with self.assertRaisesRegex(
      ValueError, "algorithm must be one of nll, .*, a_lol_kl, got 'ppo'"
    ):
      offline.needed_arrays("ppo")

  def test_shapes_and_types(self):
    batch = _LOG_PROBS, _REF_LOG_PROBS, np.ones(2, np.float32), _VALUES, _FULL
    for position in range(5):
      wrong_shape, wrong_type = list(batch), list(batch)
      wrong_shape[position] = batch[position][..., :1]
      wrong_type[position] = np.ones(batch[position].shape, np.int32)
      for wrong in (wrong_shape, wrong_type):
        with self.assertRaises(AssertionError):
          offline.offline_loss("a_lol", *wrong)
    with self.assertRaises(AssertionError):
      offline.weighted_loss(_LOG_PROBS, _LOG_PROBS[:, :1], _FULL)
