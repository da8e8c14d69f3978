"""Tests of the losses with a reward or a weight for each token."""

import functools
import math

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized
from hypothesis import strategies as st

from rljax.losses import supervised, token_level
from rljax.ops import log_probs as log_probs_lib
from rljax.ops import rewards as rewards_lib

_SEEDS = st.integers(0, 2**32 - 1)

# The worked batch: a wrong response, then a right one; and what to imitate,
# a corrected text and the right response, which is shorter.
_LOG_PROBS = np.log(np.float32([[0.7, 0.8, 0.3, 0.95], [0.5, 0.6, 0.5, 0.7]]))
_REF_LOG_PROBS = np.log(
  np.float32([[0.7, 0.5, 0.6, 0.9], [0.8, 0.4, 0.5, 0.6]])
)
_REWARDS = np.float32([[0.0, -0.08, -0.1, 0.0], [0.4, 0.1, 0.2, 0.0]])
_TEXT_LOG_PROBS = np.log(
  np.float32([[0.7, 0.3, 0.2, 0.9], [0.5, 0.6, 0.5, 0.7]])
)
_WEIGHTS = np.float32([[0.5, 0.5, 1.0, 0.5], [0.5, 0.5, 0.5, 0.0]])
_ALL = np.ones((2, 4), bool)
# The last token of the shorter text is padding.
_TEXT_MASK = np.array([[True] * 4, [True] * 3 + [False]])

_BATCH = (_LOG_PROBS, _REF_LOG_PROBS, _REWARDS, _ALL)
_TEXTS = (_TEXT_LOG_PROBS, _WEIGHTS, _TEXT_MASK)

_LOSS = 0.053097
_GRAD = [[0, 0.0256, 0.014, 0], [-0.05, -0.026, -0.04, 0]]
_IMITATION_LOSS = 0.484429
_IMITATION_GRAD = [
  [-0.071429, -0.071429, -0.142857, -0.071429],
  [-0.071429, -0.071429, -0.071429, 0],
]

# Of the affine policy in the tests of split batches.
_PARAMS = np.float32([0.9, -0.05])


def _token_batch(seed, shape=(8, 5)):
  """Log-probabilities, reference ones, rewards and a mask; numpy.

  Ratios lie on both sides of 0.7 and of 1.3, a third of the rewards are 0,
  and one row has no token.
  """
  rng = np.random.default_rng(seed)
  log_probs = -0.1 - rng.exponential(size=shape)
  ref_log_probs = log_probs + rng.normal(0.0, 0.5, size=shape)
  signs = rng.choice([-1.0, 0.0, 1.0], size=shape)
  mask = rng.random(shape) < 0.7
  mask[rng.integers(shape[0])] = False
  return log_probs, ref_log_probs, signs * rng.random(shape), mask


def _text_batch(seed, shape=(8, 5)):
  """Log-probabilities, weights of 0, 0.5 and 1, and a mask; numpy."""
  rng = np.random.default_rng(seed)
  mask = rng.random(shape) < 0.7
  mask[rng.integers(shape[0])] = False
  weights = rng.choice([0.0, 0.5, 1.0], size=shape)
  return -rng.exponential(size=shape), weights, mask


def _float32(batch):
  """The batch with floats in float32, on the device."""
  return [jnp.array(x) if x.dtype == bool else jnp.float32(x) for x in batch]


def _oracle(log_probs, ref_log_probs, rewards, mask, mode, epsilon):
  """Loss and gradient, token by token."""
  num = sum(1 for i in np.ndindex(mask.shape) if mask[i] and rewards[i] != 0)
  loss, grad = 0.0, np.zeros(mask.shape)
  for i in np.ndindex(mask.shape):
    if not mask[i] or rewards[i] == 0:
      continue
    ratio, reward = math.exp(log_probs[i] - ref_log_probs[i]), rewards[i]
    bound = min(max(ratio, 1 - epsilon), 1 + epsilon)
    coefficient = min(ratio * reward, bound * reward)
    is_clipped = bound * reward < ratio * reward
    if mode == "rlmec":
      loss -= coefficient * log_probs[i] / num
      grad[i] = -coefficient / num
    else:
      loss -= coefficient / num
      grad[i] = 0.0 if is_clipped else -ratio * reward / num
  return loss, grad


@functools.cache
def _jitted(**settings):
  """Value and gradient, compiled once for each shape."""
  loss_fn = functools.partial(token_level.token_level_loss, **settings)
  return jax.jit(jax.value_and_grad(loss_fn, has_aux=True))


@functools.cache
def _jitted_imitation():
  return jax.jit(jax.value_and_grad(token_level.imitation_loss, has_aux=True))


@functools.cache
def _jitted_total(mode="rlmec", axis_name=None):
  """Sum of both losses, its metrics and gradients, for an affine policy.

  Takes the parameters, the arrays of both losses and, to divide by, the two
  counts or None.
  """

  def step(params, batch, texts, counts=(None, None)):
    def loss_fn(params):
      def outputs(x):
        return x * params[0] + params[1]

      loss, metrics = token_level.token_level_loss(
        outputs(batch[0]),
        *batch[1:],
        mode=mode,
        count=counts[0],
        axis_name=axis_name,
      )
      more, more_metrics = token_level.imitation_loss(
        outputs(texts[0]), *texts[1:], count=counts[1], axis_name=axis_name
      )
      return loss + 0.5 * more, {**metrics, **more_metrics}

    results, grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    if axis_name is not None:
      grads = jax.lax.pmean(grads, axis_name)
    return results, grads

  return step if axis_name is not None else jax.jit(step)


def _spread(how, step, params, batch, texts):
  """Results of the last of eight shards, with one row of the arrays each."""
  if how == "shard_map":
    mesh = jax.make_mesh(
      (8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)
    )
    whole = jax.sharding.PartitionSpec()
    rows = jax.sharding.PartitionSpec("data")
    sharded = jax.shard_map(
      step, mesh=mesh, in_specs=(whole, rows, rows), out_specs=whole
    )
    return jax.jit(sharded)(params, batch, texts)
  transform = {"vmap": jax.vmap, "pmap": jax.pmap}[how]
  shards = jax.tree.map(lambda x: x[:, None], (batch, texts))
  transformed = transform(step, axis_name="data", in_axes=(None, 0, 0))
  if how == "vmap":
    transformed = jax.jit(transformed)
  results = transformed(params, *shards)
  return jax.tree.map(lambda x: x[-1], results)


class TokenLevelLossTest(parameterized.TestCase):
  @chex.all_variants
  def test_hand_computed(self):
    # Ratios 1, 1.6, .5, 1.055556 and .625, 1.5, 1, 1.166667. Coefficients 0,
    # -.128, -.07 (the floor), 0 and .25, .13 (the ceiling), .2, 0. Times
    # -log π: 0, -.028562, -.084278, 0 and .173287, .066407, .138629, 0.
    (loss, metrics), grad = self.variant(
      jax.value_and_grad(token_level.token_level_loss, has_aux=True)
    )(*_BATCH)
    np.testing.assert_allclose(loss, _LOSS, atol=1e-6)
    np.testing.assert_allclose(grad, _GRAD, atol=1e-6)
    expected_metrics = {
      "token/loss": _LOSS,
      "token/ratio_mean": 1.045,  # 5.225 / 5
      "token/clip_fraction_high": 0.2,
      "token/clip_fraction_low": 0.2,
      "token/positive_fraction": 3 / 8,
      "token/negative_fraction": 2 / 8,
      "token/penalized_log_prob_min": math.log(0.3),
      "token/tokens": 8.0,
      "token/count": 5.0,
    }
    self.assertEqual(set(metrics), set(expected_metrics))
    for name, value in expected_metrics.items():
      np.testing.assert_allclose(metrics[name], value, atol=1e-6, err_msg=name)

  @chex.variants(with_jit=True)
  def test_terms(self):
    # Each token by itself, over a count of 1.
    @self.variant
    def terms(masks):
      return jax.vmap(
        lambda mask: (
          token_level.token_level_loss(*_BATCH[:3], mask, count=1)[0],
          token_level.imitation_loss(*_TEXTS[:2], mask, count=1)[0],
        )
      )(masks)

    of_samples, of_texts = terms(np.eye(8, dtype=bool).reshape(8, 2, 4))
    np.testing.assert_allclose(
      of_samples,
      [0, -0.028562, -0.084278, 0, 0.173287, 0.066407, 0.138629, 0],
      atol=1e-6,
    )
    np.testing.assert_allclose(
      of_texts,
      [0.178337, 0.601986, 1.609438, 0.05268, 0.346574, 0.255413, 0.346574, 0],
      atol=1e-6,
    )

  @chex.all_variants
  def test_hand_computed_surrogate(self):
    (loss, metrics), grad = self.variant(
      jax.value_and_grad(
        functools.partial(token_level.token_level_loss, mode="ppo"),
        has_aux=True,
      )
    )(*_BATCH)
    np.testing.assert_allclose(loss, -0.0764, atol=1e-6)
    np.testing.assert_allclose(
      grad, [[0, 0.0256, 0, 0], [-0.05, 0, -0.04, 0]], atol=1e-6
    )
    np.testing.assert_allclose(metrics["token/loss"], loss)
    # What was measured is the same in both modes.
    _, expected = token_level.token_level_loss(*_BATCH)
    del metrics["token/loss"], expected["token/loss"]
    chex.assert_trees_all_close(metrics, expected, rtol=1e-6)

  @chex.all_variants
  @parameterized.parameters(
    (0.4, [0.08, 0.2, 0.28, 0.4, 0.52, 0.52, 0.52]),
    (-0.1, [-0.07, -0.07, -0.07, -0.1, -0.13, -0.2, -0.5]),
  )
  def test_coefficients(self, reward, expected):
    ratios = np.float32([[0.2, 0.5, 0.7, 1.0, 1.3, 2.0, 5.0]])
    (loss, _), grad = self.variant(
      jax.value_and_grad(token_level.token_level_loss, has_aux=True)
    )(
      np.full((1, 7), -2.0, np.float32),
      -2.0 - np.log(ratios),
      np.full((1, 7), reward, np.float32),
      np.ones((1, 7), bool),
    )
    np.testing.assert_allclose(-7 * grad[0], expected, atol=1e-6)
    np.testing.assert_allclose(loss, 2 * np.mean(expected), atol=1e-6)

  @parameterized.parameters(
    ("rlmec", [1.3 * 0.4, 0.7 * -0.1]), ("ppo", [0.0, 0.0])
  )
  def test_every_row_of_the_table(self, mode, clipped):
    # The two where the clip binds, the two others beyond a bound, between.
    ratios = [2.0, 0.5, 0.5, 2.0, 1.0, 1.0, 1.2, 0.8]
    rewards = [0.4, -0.1, 0.4, -0.1, 0.4, -0.1, 0.4, -0.1]
    _, grad = _jitted(mode=mode)(
      np.log(np.float32([ratios])) - 3,
      np.full((1, 8), -3.0, np.float32),
      np.float32([rewards]),
      np.ones((1, 8), bool),
    )
    expected = [*clipped, 0.2, -0.2, 0.4, -0.1, 0.48, -0.08]
    np.testing.assert_allclose(-8 * grad[0], expected, atol=1e-6)

  @chex.variants(with_jit=True)
  def test_from_logits(self):
    logits = np.float32(
      [
        [
          [1, 0, -1, 0.5, 0],
          [0, 2, 0, -1, 1],
          [0.5, 0.5, 0.5, 0.5, 0.5],
          [-1, 0, 3, 0, 1],
        ]
      ]
    )
    targets = np.int32([[0, 4, 2, 2]])
    ref_log_probs = np.float32([[-1.0, -1.0, -1.5, -0.3]])
    rewards = np.float32([[-0.1, -0.05, 0.0, -0.1]])
    mask = np.ones((1, 4), bool)

    def loss_fn(logits, targets, ref_log_probs, rewards, mask):
      log_probs = log_probs_lib.token_log_probs(logits, targets)
      loss, _ = token_level.token_level_loss(
        log_probs, ref_log_probs, rewards, mask
      )
      return loss, log_probs

    (loss, log_probs), grad = self.variant(
      jax.value_and_grad(loss_fn, has_aux=True)
    )(logits, targets, ref_log_probs, rewards, mask)
    np.testing.assert_allclose(
      log_probs, [[-0.9073, -1.523744, -1.609438, -0.22572]], atol=1e-6
    )
    np.testing.assert_allclose(loss, -0.059062, atol=1e-6)
    np.testing.assert_allclose(
      np.exp(log_probs - ref_log_probs),
      [[1.097132, 0.592299, 0.896338, 1.077108]],
      atol=1e-6,
    )
    # The second ratio is below 0.7, and held there.
    _, of_log_probs = _jitted()(log_probs, ref_log_probs, rewards, mask)
    np.testing.assert_allclose(
      -3 * of_log_probs, [[-0.109713, -0.035, 0, -0.107711]], atol=1e-6
    )
    expected = [
      [0.021811, -0.005430, -0.001998, -0.008953, -0.005430],
      [-0.000935, -0.006910, -0.000935, -0.000344, 0.009125],
      [0, 0, 0, 0, 0],
      [-0.000525, -0.001426, 0.007255, -0.001426, -0.003877],
    ]
    np.testing.assert_allclose(grad[0], expected, atol=1e-6)
    np.testing.assert_array_equal(grad[0, 2], np.zeros(5))

  @chex.variants(with_jit=True)
  def test_rewards_to_loss(self):
    @self.variant
    def loss_of(probs, is_right, log_probs, ref_log_probs, mask):
      rewards = rewards_lib.generative_rewards(probs, is_right, mask)
      return token_level.token_level_loss(
        log_probs, ref_log_probs, rewards, mask
      )[0]

    probs = np.float32([[0.95, 0.42, 0.05, 0.8], [0.9, 0.6, 0.7, 0.3]])
    loss = loss_of(
      probs, np.array([False, True]), _LOG_PROBS, _REF_LOG_PROBS, _ALL
    )
    np.testing.assert_allclose(loss, _LOSS, atol=1e-6)

  @hypothesis.given(
    seed=_SEEDS,
    mode=st.sampled_from(token_level.MODES),
    epsilon=st.sampled_from([0.3, 0.8]),
  )
  def test_matches_oracle(self, seed, mode, epsilon):
    batch = _token_batch(seed)
    (loss, metrics), grad = _jitted(mode=mode, clip_epsilon=epsilon)(
      *_float32(batch)
    )
    expected, expected_grad = _oracle(*batch, mode, epsilon)
    np.testing.assert_allclose(loss, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(grad, expected_grad, rtol=1e-4, atol=1e-6)

    log_probs, ref_log_probs, rewards, mask = batch
    counts = mask & (rewards != 0)
    ratio = np.exp(log_probs - ref_log_probs)
    high = counts & (rewards > 0) & (ratio > 1 + epsilon)
    low = counts & (rewards < 0) & (ratio < 1 - epsilon)
    for name, value in (
      ("ratio_mean", ratio[counts].mean()),
      ("clip_fraction_high", high.sum() / counts.sum()),
      ("clip_fraction_low", low.sum() / counts.sum()),
      ("positive_fraction", (mask & (rewards > 0)).sum() / mask.sum()),
      ("negative_fraction", (mask & (rewards < 0)).sum() / mask.sum()),
      ("penalized_log_prob_min", log_probs[mask & (rewards < 0)].min()),
      ("count", counts.sum()),
    ):
      np.testing.assert_allclose(
        metrics[f"token/{name}"], value, rtol=1e-5, err_msg=name
      )

  @hypothesis.given(
    seed=_SEEDS,
    mode=st.sampled_from(token_level.MODES),
    filling=st.sampled_from([np.nan, np.inf, -np.inf]),
  )
  def test_masked_entries_and_order_are_inert(self, seed, mode, filling):
    *arrays, mask = _float32(_token_batch(seed))
    loss_and_grad = _jitted(mode=mode)
    expected, expected_grad = loss_and_grad(*arrays, mask)
    poisoned = [jnp.where(mask, x, filling) for x in arrays]
    actual, grad = loss_and_grad(*poisoned, mask)
    chex.assert_trees_all_equal((actual, grad), (expected, expected_grad))
    np.testing.assert_array_equal(np.asarray(grad)[~mask], 0.0)
    # Neither does anything come of an unmasked token without a reward.
    counts = mask & (arrays[2] != 0)
    poisoned = [jnp.where(counts, x, filling) for x in arrays[:2]]
    actual, grad = loss_and_grad(*poisoned, arrays[2], mask)
    chex.assert_trees_all_equal((actual, grad), (expected, expected_grad))

    order = np.random.default_rng(seed).permutation(mask.shape[0])
    actual, grad = loss_and_grad(*[x[order] for x in arrays], mask[order])
    chex.assert_trees_all_close(
      (actual, grad), (expected, expected_grad[order]), rtol=1e-4, atol=1e-6
    )

  @parameterized.product(mode=token_level.MODES, columns=((0, 2), (3, 0)))
  def test_more_padding_changes_nothing(self, mode, columns):
    (expected, metrics), expected_grad = _jitted(mode=mode)(*_BATCH)
    padded = [np.pad(x, ((0, 1), columns)) for x in _BATCH]
    (loss, padded_metrics), grad = _jitted(mode=mode)(*padded)
    chex.assert_trees_all_close(
      (loss, padded_metrics), (expected, metrics), rtol=1e-6
    )
    np.testing.assert_allclose(
      grad, np.pad(expected_grad, ((0, 1), columns)), rtol=1e-6
    )

  def test_left_padding(self):
    # Prompts of two and four tokens, responses of five and of one, right
    # aligned: columns 2 to 6, and column 6 of the second row.
    is_response = np.array([[False] * 2 + [True] * 5, [False] * 6 + [True]])
    rng = np.random.default_rng(0)
    log_probs = np.float32(-rng.exponential(size=(2, 7)))
    # As stored: 0 on prompt and padding, whatever the policy says there.
    ref_log_probs = np.where(is_response, log_probs - np.float32(0.2), 0)
    rewards = np.where(is_response, np.float32(0.3), 0)
    rewards[0, 3] = -0.1
    (loss, metrics), grad = _jitted()(
      log_probs, ref_log_probs, rewards, is_response
    )
    np.testing.assert_allclose(metrics["token/count"], 6)
    np.testing.assert_array_equal(np.asarray(grad) != 0, is_response)

    # The same responses, each from the first column.
    def align(x):
      return np.stack([x[0, 2:], np.pad(x[1, 6:], (0, 4))])

    (aligned, _), _ = _jitted()(
      *map(align, (log_probs, ref_log_probs, rewards, is_response))
    )
    np.testing.assert_allclose(loss, aligned, rtol=1e-6)
    # A mask that takes the prompts' columns from a batch of prompts alone
    # would drop columns 2 and 3, the first two tokens of the response.
    faulty = is_response & ~np.isin(np.arange(7), (2, 3))[None]
    (wrong, _), _ = _jitted(count=6)(log_probs, ref_log_probs, rewards, faulty)
    self.assertGreater(abs(float(wrong - loss)), 1e-3)

  @parameterized.parameters(*token_level.MODES)
  def test_equal_policies(self, mode):
    # Ratio 1: the gradient is that of the plain policy gradient.
    log_probs, _, rewards, mask = _float32(_token_batch(3))
    (_, metrics), grad = _jitted(mode=mode)(log_probs, log_probs, rewards, mask)
    counts = mask & (rewards != 0)
    np.testing.assert_allclose(
      grad,
      jnp.where(counts, -rewards / float(counts.sum()), 0.0),
      rtol=1e-6,
    )
    for name, expected in (
      ("ratio_mean", 1),
      ("clip_fraction_high", 0),
      ("clip_fraction_low", 0),
    ):
      np.testing.assert_allclose(metrics[f"token/{name}"], expected, rtol=1e-6)

  @parameterized.parameters(*token_level.MODES)
  def test_nothing_to_learn(self, mode):
    for rewards, mask in (
      (np.zeros_like(_REWARDS), _ALL),
      (_REWARDS, np.zeros_like(_ALL)),
    ):
      for count in (None, 0):
        (loss, metrics), grad = _jitted(mode=mode, count=count)(
          _LOG_PROBS, _REF_LOG_PROBS, rewards, mask
        )
        self.assertEqual(float(metrics.pop("token/tokens")), mask.sum())
        for value in (loss, grad, *metrics.values()):
          np.testing.assert_array_equal(value, np.zeros(value.shape))

  def test_mistakes_give_other_numbers(self):
    # What a slip would make of the worked batch: the numbers above tell.
    ratio = np.exp(_LOG_PROBS - _REF_LOG_PROBS)
    clipped = np.clip(ratio, 0.7, 1.3)
    coefficient = np.minimum(ratio * _REWARDS, clipped * _REWARDS)
    losses = -coefficient * _LOG_PROBS
    of_texts = -_WEIGHTS * _TEXT_LOG_PROBS
    for mistake, right, wrong in (
      ((losses.sum(1) / (_REWARDS != 0).sum(1)).mean(), _LOSS, 0.034844),
      (losses.mean(), _LOSS, 0.033185),
      (
        (of_texts.sum(1) / (_WEIGHTS != 0).sum(1)).mean(),
        _IMITATION_LOSS,
        0.463399,
      ),
      (of_texts.sum() / _WEIGHTS.sum(), _IMITATION_LOSS, 0.847751),
    ):
      np.testing.assert_allclose(mistake, wrong, atol=1e-6)
      self.assertGreater(abs(right - wrong), 1e-2)

    def attached(log_probs):
      ratio = jnp.exp(log_probs - _REF_LOG_PROBS)
      coefficient = jnp.minimum(
        ratio * _REWARDS, jnp.clip(ratio, 0.7, 1.3) * _REWARDS
      )
      return -jnp.sum(coefficient * log_probs) / 5

    value, grad = jax.jit(jax.value_and_grad(attached))(_LOG_PROBS)
    np.testing.assert_allclose(value, _LOSS, atol=1e-6)
    expected = [[0, 0.019888, 0.014, 0], [-0.015343, -0.026, -0.012274, 0]]
    np.testing.assert_allclose(grad, expected, atol=1e-6)
    self.assertGreater(np.max(np.abs(np.subtract(expected, _GRAD))), 1e-2)

  @parameterized.parameters(*token_level.MODES)
  def test_no_gradient_to_constants(self, mode):
    grads = jax.grad(
      jax.jit(lambda *args: token_level.token_level_loss(*args, mode=mode)[0]),
      argnums=(1, 2),
    )(*_BATCH)
    chex.assert_trees_all_equal(grads, (np.zeros((2, 4)), np.zeros((2, 4))))

  @parameterized.parameters(*token_level.MODES)
  def test_no_gradient_through_metrics(self, mode):
    grads = jax.grad(
      jax.jit(
        lambda *args: sum(
          token_level.token_level_loss(*args, mode=mode)[1].values()
        )
      ),
      argnums=(0, 1, 2),
    )(*_BATCH)
    for grad in grads:
      np.testing.assert_array_equal(grad, np.zeros((2, 4)))

  def test_numerical_gradient(self):
    # Of the surrogate: under "rlmec" the gradient is not that of the value.
    log_probs, _, rewards, mask = _float32(_token_batch(11))
    # Away from the kinks at 0.7 and 1.3, on both sides of each.
    ratios = jnp.array([0.5, 0.8, 1.0, 1.2, 1.5])
    ref_log_probs = log_probs - jnp.log(ratios)[None]
    chex.assert_numerical_grads(
      jax.jit(
        lambda x: token_level.token_level_loss(
          x, ref_log_probs, rewards, mask, mode="ppo"
        )[0]
      ),
      (log_probs,),
      order=1,
      atol=2e-3,
      rtol=1e-2,
    )

  @parameterized.product(mode=token_level.MODES, reward=(-0.1, 0.4))
  def test_extreme_ratios_stay_finite(self, mode, reward):
    # exp(1e9) is no float32, and the reference may exclude a token.
    for log_prob, ref_log_prob in ((-0.5, -1e9), (-1e9, -0.5), (0.0, -1e9)):
      (loss, metrics), grad = _jitted(mode=mode)(
        np.full((1, 1), log_prob, np.float32),
        np.full((1, 1), ref_log_prob, np.float32),
        np.full((1, 1), reward, np.float32),
        np.ones((1, 1), bool),
      )
      chex.assert_tree_all_finite((loss, metrics, grad))

  @parameterized.parameters(*token_level.MODES)
  def test_float32_inside(self, mode):
    # In bfloat16 -0.1 is -0.10009766 and -5.3 is -5.3125: what comes so is
    # taken as it is, and nothing is rounded again.
    *batch, mask = _token_batch(0)
    batch = [jnp.bfloat16(x) for x in batch]
    results = _jitted(mode=mode)(*batch, mask)
    (loss, metrics), grad = results
    (expected, expected_metrics), expected_grad = _jitted(mode=mode)(
      *[x.astype(jnp.float32) for x in batch], mask
    )
    chex.assert_type([loss, *metrics.values()], jnp.float32)
    chex.assert_trees_all_equal(
      (loss, metrics, grad),
      (expected, expected_metrics, expected_grad.astype(jnp.bfloat16)),
    )
    # Rewards and reference stay in float32 beside a bfloat16 policy.
    mixed = _jitted(mode=mode)(batch[0], *_float32(_token_batch(0))[1:])
    self.assertNotEqual(float(mixed[0][0]), float(loss))

  def test_bad_input(self):
    for settings, message in (
      ({"clip_epsilon": 0.0}, "clip_epsilon must be positive, got 0.0"),
      ({"clip_epsilon": math.nan}, "clip_epsilon must be positive, got nan"),
      ({"mode": "a2c"}, "mode must be one of rlmec, ppo, got 'a2c'"),
    ):
      with self.assertRaisesRegex(ValueError, message):
        token_level.token_level_loss(*_BATCH, **settings)
    with self.assertRaises(AssertionError):
      token_level.token_level_loss(*_BATCH, count=np.ones(2))
    for position in range(4):
      wrong_shape, wrong_type = list(_BATCH), list(_BATCH)
      wrong_shape[position] = _BATCH[position][:, :2]
      wrong_type[position] = np.ones((2, 4), np.int32)
      for wrong in (wrong_shape, wrong_type):
        with self.assertRaises(AssertionError):
          token_level.token_level_loss(*wrong)
    with self.assertRaises(AssertionError):
      token_level.token_level_loss(*[x[0] for x in _BATCH])


class ImitationLossTest(parameterized.TestCase):
  @chex.all_variants
  def test_hand_computed(self):
    # .178337 .601986 1.609438 .052680 and .346574 .255413 .346574, by 7.
    (loss, metrics), grad = self.variant(
      jax.value_and_grad(token_level.imitation_loss, has_aux=True)
    )(*_TEXTS)
    np.testing.assert_allclose(loss, _IMITATION_LOSS, atol=1e-6)
    np.testing.assert_allclose(grad, _IMITATION_GRAD, atol=1e-6)
    product = 0.7 * 0.3 * 0.2 * 0.9 * 0.5 * 0.6 * 0.5
    expected_metrics = {
      "imitation/loss": _IMITATION_LOSS,
      "imitation/perplexity": product ** (-1 / 7),
      "imitation/count": 7.0,
    }
    self.assertEqual(set(metrics), set(expected_metrics))
    for name, value in expected_metrics.items():
      np.testing.assert_allclose(metrics[name], value, rtol=2e-6, err_msg=name)

  @chex.variants(with_jit=True)
  def test_total(self):
    @self.variant
    def totals(batch, texts):
      loss, _ = token_level.token_level_loss(*batch)
      more, _ = token_level.imitation_loss(*texts)
      return loss + more, loss + 0.5 * more

    total, half = totals(_BATCH, _TEXTS)
    np.testing.assert_allclose(total, 0.537525, atol=1e-6)
    np.testing.assert_allclose(half, 0.295311, atol=1e-6)

  @hypothesis.given(seed=_SEEDS)
  def test_matches_oracle_and_nll(self, seed):
    log_probs, weights, mask = batch = _text_batch(seed)
    (loss, metrics), grad = _jitted_imitation()(*_float32(batch))
    total, plain, num = 0.0, 0.0, 0
    for i in np.ndindex(mask.shape):
      if mask[i] and weights[i] != 0:
        total -= weights[i] * log_probs[i]
        plain -= log_probs[i]
        num += 1
    np.testing.assert_allclose(loss, total / num, rtol=1e-5)
    np.testing.assert_allclose(
      grad, np.where(mask, -weights / num, 0.0), rtol=1e-5
    )
    np.testing.assert_allclose(
      metrics["imitation/perplexity"], math.exp(plain / num), rtol=1e-5
    )
    np.testing.assert_allclose(metrics["imitation/count"], num)
    nll, _ = supervised.nll_loss(
      jnp.float32(log_probs),
      mask & (weights != 0),
      weights=jnp.float32(weights),
    )
    np.testing.assert_allclose(loss, nll, rtol=1e-6)

  @hypothesis.given(
    seed=_SEEDS, filling=st.sampled_from([np.nan, np.inf, -np.inf])
  )
  def test_masked_entries_and_order_are_inert(self, seed, filling):
    log_probs, weights, mask = _float32(_text_batch(seed))
    expected, expected_grad = _jitted_imitation()(log_probs, weights, mask)
    actual, grad = _jitted_imitation()(
      jnp.where(mask & (weights != 0), log_probs, filling),
      jnp.where(mask, weights, filling),
      mask,
    )
    chex.assert_trees_all_equal((actual, grad), (expected, expected_grad))
    np.testing.assert_array_equal(np.asarray(grad)[~mask], 0.0)
    order = np.random.default_rng(seed).permutation(mask.shape[0])
    actual, grad = _jitted_imitation()(
      log_probs[order], weights[order], mask[order]
    )
    chex.assert_trees_all_close(
      (actual, grad), (expected, expected_grad[order]), rtol=1e-5, atol=1e-6
    )

  @parameterized.product(columns=((0, 2), (3, 0)))
  def test_more_padding_changes_nothing(self, columns):
    expected, expected_grad = _jitted_imitation()(*_TEXTS)
    padded = [np.pad(x, ((0, 1), columns)) for x in _TEXTS]
    actual, grad = _jitted_imitation()(*padded)
    chex.assert_trees_all_close(actual, expected, rtol=1e-6)
    np.testing.assert_allclose(
      grad, np.pad(expected_grad, ((0, 1), columns)), rtol=1e-6
    )

  def test_nothing_to_learn(self):
    for weights, mask in (
      (np.zeros_like(_WEIGHTS), _ALL),
      (_WEIGHTS, np.zeros_like(_ALL)),
    ):
      (loss, metrics), grad = _jitted_imitation()(
        _TEXT_LOG_PROBS, weights, mask
      )
      for value in (loss, grad, metrics["imitation/count"]):
        np.testing.assert_array_equal(value, np.zeros(value.shape))
      np.testing.assert_array_equal(metrics["imitation/perplexity"], 1.0)

  def test_gradient(self):
    log_probs, weights, mask = _float32(_text_batch(1))
    chex.assert_numerical_grads(
      jax.jit(lambda x: token_level.imitation_loss(x, weights, mask)[0]),
      (log_probs,),
      order=1,
      atol=2e-3,
      rtol=1e-2,
    )

  def test_no_gradient_to_weights_nor_through_metrics(self):
    grad = jax.grad(
      jax.jit(lambda *args: token_level.imitation_loss(*args)[0]), argnums=1
    )(*_TEXTS)
    np.testing.assert_array_equal(grad, np.zeros((2, 4)))
    grad = jax.grad(
      jax.jit(lambda *args: sum(token_level.imitation_loss(*args)[1].values()))
    )(*_TEXTS)
    np.testing.assert_array_equal(grad, np.zeros((2, 4)))

  def test_float32_inside(self):
    log_probs, weights, mask = _text_batch(0)
    arrays = [jnp.bfloat16(log_probs), jnp.bfloat16(weights)]
    (loss, metrics), _ = _jitted_imitation()(*arrays, mask)
    expected, _ = _jitted_imitation()(
      *[x.astype(jnp.float32) for x in arrays], mask
    )
    chex.assert_type([loss, *metrics.values()], jnp.float32)
    chex.assert_trees_all_equal((loss, metrics), expected)

  def test_bad_input(self):
    for position in range(3):
      wrong_shape, wrong_type = list(_TEXTS), list(_TEXTS)
      wrong_shape[position] = _TEXTS[position][:, :2]
      wrong_type[position] = np.ones((2, 4), np.int32)
      for wrong in (wrong_shape, wrong_type):
        with self.assertRaises(AssertionError):
          token_level.imitation_loss(*wrong)
    with self.assertRaises(AssertionError):
      token_level.imitation_loss(*[x[0] for x in _TEXTS])
    with self.assertRaises(AssertionError):
      token_level.imitation_loss(*_TEXTS, count=np.ones(2))


class SplitBatchTest(parameterized.TestCase):
  """Both losses on parts of a batch, in space and in time."""

  def setUp(self):
    super().setUp()
    # One row a shard: counts differ, and one shard has none.
    self.batch = _float32(_token_batch(7))
    self.texts = _float32(_text_batch(8))
    _, _, rewards, mask = self.batch
    _, weights, text_mask = self.texts
    self.counts = (
      jnp.sum(mask & (rewards != 0)),
      jnp.sum(text_mask & (weights != 0)),
    )

  @parameterized.parameters(
    ("vmap", "rlmec"), ("vmap", "ppo"), ("pmap", "rlmec"), ("shard_map", "ppo")
  )
  def test_devices(self, how, mode):
    expected = _jitted_total(mode)(_PARAMS, self.batch, self.texts)
    step = _jitted_total(mode, "data")
    actual = _spread(how, step, _PARAMS, self.batch, self.texts)
    chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-6)
    self.assertGreater(float(jnp.linalg.norm(expected[1])), 1e-2)

  def test_micro_batches(self):
    (expected, metrics), expected_grad = _jitted_total()(
      _PARAMS, self.batch, self.texts
    )
    for counts, matches in ((self.counts, True), ((None, None), False)):
      total, grad, parts = 0.0, 0.0, 0.0
      for i in range(4):
        batch, texts = jax.tree.map(
          lambda x, i=i: x[2 * i : 2 * i + 2], (self.batch, self.texts)
        )
        (loss, part), more = _jitted_total()(_PARAMS, batch, texts, counts)
        total, grad = total + loss, grad + more
        parts += part["token/loss"] + 0.5 * part["imitation/loss"]
      if matches:
        np.testing.assert_allclose(total, expected, rtol=1e-5)
        np.testing.assert_allclose(parts, expected, rtol=1e-5)
        np.testing.assert_allclose(grad, expected_grad, rtol=1e-5)
      else:
        # Neither are the means over micro-batches those of the batch.
        self.assertGreater(abs(float(total / 4 - expected)), 1e-3)
    for name, count in zip(("token", "imitation"), self.counts, strict=True):
      np.testing.assert_array_equal(metrics[f"{name}/count"], count)

  def test_means_over_micro_batches(self):
    # An optimizer that averages over two micro-batches: N / 2 may be below 1.
    batch = [jnp.asarray(x) for x in _BATCH]
    rows = [[x[i : i + 1] for x in batch] for i in range(2)]
    one = jnp.zeros((2, 4), bool).at[1, 0].set(True)
    (expected, _), _ = _jitted()(*batch[:3], one)
    losses = [
      _jitted(count=0.5)(*row[:3], one[i : i + 1])[0][0]
      for i, row in enumerate(rows)
    ]
    np.testing.assert_allclose(sum(losses) / 2, expected, rtol=1e-6)
    self.assertGreater(float(expected), 0.1)

  def test_micro_batches_on_devices(self):
    expected = _jitted_total()(_PARAMS, self.batch, self.texts)
    step = jax.jit(
      jax.vmap(
        _jitted_total("rlmec", "data"),
        axis_name="data",
        in_axes=(None, 0, 0, None),
      )
    )
    # Four micro-batches of two devices with one row each.
    parts = jax.tree.map(
      lambda x: x.reshape(4, 2, 1, -1), (self.batch, self.texts)
    )
    total, grad = 0.0, 0.0
    for i in range(4):
      batch, texts = jax.tree.map(lambda x, i=i: x[i], parts)
      (loss, _), more = step(_PARAMS, batch, texts, self.counts)
      np.testing.assert_array_equal(loss[0], loss[1])
      total, grad = total + loss[0], grad + more[0]
    np.testing.assert_allclose(total, expected[0][0], rtol=1e-5)
    np.testing.assert_allclose(grad, expected[1], rtol=1e-5)
