"""Tests of advantages that compare the responses to one prompt."""

import functools

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized
from hypothesis import strategies as st

from rljax.ops import advantages, rewards

_SEEDS = st.integers(0, 2**32 - 1)
_jit_and_not = chex.variants(with_jit=True, without_jit=True)
# Two prompts with three responses each; one and two of them are right.
_SCORES = np.float32([[1, 0, 0], [1, 1, 0]])


def _scores(seed, shape=(8, 4)):
  """Scores of eight groups, of which the first are all equal; float64."""
  scores = np.random.default_rng(seed).normal(size=shape)
  scores[0] = scores[0, 0]
  return scores


def _oracle(scores, scale, ddof, epsilon):
  """Group-relative advantages in float64, one at a time."""
  result = np.zeros(scores.shape)
  for b, group in enumerate(scores):
    mean = sum(group) / len(group)
    for j, score in enumerate(group):
      result[b, j] = score - mean
  everything = list(result.ravel())
  for b, group in enumerate(scores):
    of = {"none": None, "group": list(result[b]), "batch": everything}[scale]
    if of is not None and len(set(group)) > 1:
      variance = sum(x * x for x in of) / (len(of) - ddof)
      result[b] /= variance**0.5 + epsilon
    elif len(set(group)) == 1:
      result[b] = 0.0
  return result


class CountsTest(parameterized.TestCase):
  @_jit_and_not
  @parameterized.parameters("none", "group", "batch")
  def test_scores_that_do_not_count_change_nothing(self, scale):
    relative = self.variant(
      functools.partial(advantages.group_relative, scale=scale)
    )
    scores = jnp.float32(_scores(3, (4, 3)))
    expected = relative(scores)
    more = jnp.array([[jnp.nan], [9.0], [-9.0], [jnp.inf]], jnp.float32)
    counts = jnp.array([[False, True, True, True]] * 4)
    found = relative(jnp.concatenate([more, scores], axis=1), counts)
    np.testing.assert_allclose(found[:, 1:], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found[:, 0], 0)

  @_jit_and_not
  def test_leave_one_out(self):
    # 2 - 4 and 4 - 2; a single score has no other to be compared with.
    scores = jnp.array([[jnp.nan, 2.0, 4.0], [7.0, jnp.nan, jnp.nan]])
    leave_one_out = self.variant(advantages.leave_one_out)
    found = leave_one_out(scores, ~jnp.isnan(scores))
    np.testing.assert_allclose(found, [[0, -2, 2], [0, 0, 0]])


class GroupRelativeTest(parameterized.TestCase):
  @_jit_and_not
  @parameterized.parameters(
    # 1 - 1/3 = .666667; 1 - 2/3 = .333333.
    ("none", 0, 0.0, (0.666667, -0.333333), (0.333333, -0.666667)),
    # The variance of both groups is 1/3 * 2/3: std .471405.
    ("group", 0, 0.0, (1.414214, -0.707107), (0.707107, -1.414214)),
    ("group", 0, 1e-4, (1.413914, -0.706957), (0.706957, -1.413914)),
    # The sample's: 1/3, std .577350.
    ("group", 1, 0.0, (1.154701, -0.57735), (0.57735, -1.154701)),
    ("group", 1, 1e-4, (1.154501, -0.57725), (0.57725, -1.154501)),
    # Of all six: 4/3 by 6, and by 5.
    ("batch", 0, 0.0, (1.414214, -0.707107), (0.707107, -1.414214)),
    ("batch", 1, 0.0, (1.290994, -0.645497), (0.645497, -1.290994)),
  )
  def test_hand_computed(self, scale, ddof, epsilon, one_right, two_right):
    actual = self.variant(
      functools.partial(
        advantages.group_relative, scale=scale, ddof=ddof, epsilon=epsilon
      )
    )(_SCORES)
    (right, wrong), (also_right, also_wrong) = one_right, two_right
    np.testing.assert_allclose(
      actual,
      [[right, wrong, wrong], [also_right, also_right, also_wrong]],
      atol=1e-6,
    )

  @hypothesis.given(
    seed=_SEEDS,
    scale=st.sampled_from(advantages.GROUP_SCALES),
    ddof=st.integers(0, 1),
  )
  def test_matches_oracle(self, seed, scale, ddof):
    scores = _scores(seed)
    actual = advantages.group_relative(
      jnp.float32(scores), scale=scale, ddof=ddof, epsilon=1e-3
    )
    np.testing.assert_allclose(
      actual, _oracle(scores, scale, ddof, 1e-3), rtol=1e-4, atol=1e-5
    )

  @parameterized.product(
    scale=advantages.GROUP_SCALES, epsilon=(0.0, 1e-4), score=(0.0, 1.0, 0.1)
  )
  def test_equal_scores_say_nothing(self, scale, epsilon, score):
    # A float32 mean of three 0.1 differs from 0.1.
    scores = np.float32([[score] * 3, [1, 1, 0]])
    for rows in (scores, scores[:1]):
      actual = advantages.group_relative(rows, scale=scale, epsilon=epsilon)
      np.testing.assert_array_equal(actual[0], np.zeros(3))
      chex.assert_tree_all_finite(actual)

  def test_two_responses_of_which_one_is_right(self):
    actual = advantages.group_relative(
      np.float32([[0, 1]]), scale="group", ddof=0, epsilon=0.0
    )
    np.testing.assert_allclose(actual, [[-1.0, 1.0]], rtol=1e-6)

  @hypothesis.given(seed=_SEEDS, scale=st.sampled_from(advantages.GROUP_SCALES))
  def test_shift_scale_and_order(self, seed, scale):
    scores = jnp.float32(_scores(seed))
    function = functools.partial(
      advantages.group_relative, scale=scale, epsilon=0.0
    )
    expected = function(scores)
    shifts = jnp.arange(8.0)[:, None]
    np.testing.assert_allclose(
      function(scores + shifts), expected, rtol=1e-3, atol=1e-4
    )
    factor = 3.0 if scale == "none" else 1.0
    np.testing.assert_allclose(
      function(3 * scores), factor * expected, rtol=1e-4, atol=1e-5
    )
    order = np.random.default_rng(seed).permutation(4)
    np.testing.assert_allclose(
      function(scores[:, order]), expected[:, order], rtol=1e-4, atol=1e-5
    )

  @parameterized.parameters(*advantages.GROUP_SCALES)
  def test_split_batch(self, scale):
    scores = jnp.float32(_scores(1))
    expected = advantages.group_relative(scores, scale=scale)
    actual = jax.vmap(
      functools.partial(
        advantages.group_relative, scale=scale, axis_name="data"
      ),
      axis_name="data",
    )(scores.reshape(4, 2, 4))
    np.testing.assert_allclose(
      actual.reshape(8, 4), expected, rtol=1e-5, atol=1e-6
    )

  @parameterized.parameters(*advantages.GROUP_SCALES)
  def test_no_gradient(self, scale):
    grads = jax.grad(lambda x: advantages.group_relative(x, scale=scale)[0, 0])(
      _SCORES
    )
    np.testing.assert_array_equal(grads, np.zeros((2, 3)))

  def test_bad_input(self):
    for settings, message in (
      ({"scale": "std"}, "scale must be one of group, batch, none, got 'std'"),
      ({"scale": "group", "ddof": -1}, "must not be negative, got -1"),
      ({"scale": "group", "epsilon": -0.1}, "must not be negative.*-0.1"),
    ):
      with self.assertRaisesRegex(ValueError, message):
        advantages.group_relative(_SCORES, **settings)
    for wrong in (_SCORES[0], np.ones((2, 3), np.int32)):
      with self.assertRaises(AssertionError):
        advantages.group_relative(wrong, scale="none")


class LeaveOneOutTest(parameterized.TestCase):
  @_jit_and_not
  def test_hand_computed(self):
    # 1 - (0 + 0) / 2, 0 - (1 + 0) / 2; 1 - (1 + 0) / 2, 0 - (1 + 1) / 2.
    actual = self.variant(advantages.leave_one_out)(_SCORES)
    np.testing.assert_allclose(
      actual, [[1.0, -0.5, -0.5], [0.5, 0.5, -1.0]], atol=1e-6
    )
    # Scores 1, 0, 0 less 0.05 times the KL .4, .1, -.2 of each response.
    shaped = np.float32([[0.98, -0.005, 0.01]])
    np.testing.assert_allclose(
      advantages.leave_one_out(shaped), [[0.9775, -0.5, -0.4775]], atol=1e-6
    )

  @hypothesis.given(seed=_SEEDS)
  def test_is_a_multiple_of_the_centred_scores(self, seed):
    scores = jnp.float32(_scores(seed))
    np.testing.assert_allclose(
      advantages.leave_one_out(scores),
      4 / 3 * advantages.group_relative(scores, scale="none"),
      rtol=1e-6,
    )
    others = np.asarray(scores).sum(axis=1, keepdims=True) - scores
    np.testing.assert_allclose(
      advantages.leave_one_out(scores),
      scores - others / 3,
      rtol=1e-4,
      atol=1e-5,
    )

  def test_equal_scores_and_gradient(self):
    equal = np.full((2, 3), 0.1, np.float32)
    np.testing.assert_array_equal(
      advantages.leave_one_out(equal), np.zeros((2, 3))
    )
    grads = jax.grad(lambda x: advantages.leave_one_out(x)[0, 0])(_SCORES)
    np.testing.assert_array_equal(grads, np.zeros((2, 3)))

  def test_bad_input(self):
    with self.assertRaisesRegex(ValueError, "at least 2, got 1"):
      advantages.leave_one_out(np.ones((2, 1), np.float32))


class ReinforcePPTest(parameterized.TestCase):
  @_jit_and_not
  def test_hand_computed(self):
    # Score 1, β .05, k1 .2, -.1, .3: rewards -.01, .005, .985, whose returns
    # are .98, .99, .985. Their mean is .985, their variance 2.5e-5.
    mask = np.array([[True, True, True, False]])
    token_rewards = rewards.place_score(np.float32([1.0]), mask)
    token_rewards += rewards.kl_penalty(
      np.float32([[-1.0, -0.5, -0.2, 0.0]]),
      np.float32([[-1.2, -0.4, -0.5, 0.0]]),
      mask,
      kl_coef=0.05,
    )
    np.testing.assert_allclose(
      advantages.returns_to_go(token_rewards, mask, discount=1.0),
      [[0.98, 0.99, 0.985, 0.0]],
      atol=1e-6,
    )
    actual = self.variant(
      functools.partial(advantages.reinforce_pp, epsilon=1e-12)
    )(token_rewards, mask)
    np.testing.assert_allclose(actual, [[-1.0, 1.0, 0.0, 0.0]], atol=1e-4)

  def test_one_token_responses(self):
    # Mean and std of 1, 0, 0, 1, 1, 0 are both a half.
    actual = advantages.reinforce_pp(
      _SCORES.reshape(-1, 1), np.ones((6, 1), bool), ddof=0
    )
    np.testing.assert_allclose(actual[:, 0], [1, -1, -1, 1, 1, -1], atol=1e-6)

  @hypothesis.given(seed=_SEEDS)
  def test_is_normal_over_the_batch_and_blind_to_padding(self, seed):
    rng = np.random.default_rng(seed)
    mask = rng.random((8, 5)) < 0.7
    token_rewards = jnp.float32(rng.normal(size=(8, 5)))
    actual = advantages.reinforce_pp(token_rewards, mask)
    np.testing.assert_allclose(np.asarray(actual)[mask].mean(), 0, atol=1e-5)
    np.testing.assert_allclose(
      np.asarray(actual)[mask].std(ddof=1), 1, rtol=1e-4
    )
    poisoned = jnp.where(mask, token_rewards, jnp.nan)
    np.testing.assert_array_equal(
      advantages.reinforce_pp(poisoned, mask), actual
    )
    split = jax.vmap(
      functools.partial(advantages.reinforce_pp, axis_name="data"),
      axis_name="data",
    )(token_rewards.reshape(4, 2, 5), mask.reshape(4, 2, 5))
    np.testing.assert_allclose(split.reshape(8, 5), actual, atol=1e-4)

  def test_no_gradient(self):
    mask = np.ones((2, 3), bool)
    grads = jax.grad(lambda x: advantages.reinforce_pp(x, mask)[0, 0])(_SCORES)
    np.testing.assert_array_equal(grads, np.zeros((2, 3)))
