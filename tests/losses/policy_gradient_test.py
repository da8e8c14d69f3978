"""The policy loss learns: a problem of one token, whose answer is known.

Two arms, reward 1 for the first, softmax logits from 0, plain gradient ascent.
Exact values: sigmoid recursions of the expected gradient, worked out by hand.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from rljax.losses import ppo
from rljax.ops import rewards

STEP = 0.5
REWARDS = jnp.array([1.0, 0.0])
UNIFORM = math.log(0.5)


def _loss(logits, arms, kl_coef):
  """Policy loss of `arms` `[N]`, drawn under these very logits."""
  log_probs = jax.nn.log_softmax(logits)[arms][:, None]  # [N, 1]
  mask = jnp.ones_like(log_probs, bool)
  token_rewards = rewards.place_score(REWARDS[arms], mask)
  token_rewards += rewards.kl_penalty(
    log_probs, jnp.full_like(log_probs, UNIFORM), mask, kl_coef=kl_coef
  )
  loss, _ = ppo.clipped_policy_loss(
    log_probs, log_probs, token_rewards, mask, clip_epsilon=0.2
  )
  return loss


def _exact_gradient(logits, kl_coef):
  """The expectation of the gradient over both arms."""
  each = jax.vmap(lambda arm: jax.grad(_loss)(logits, arm[None], kl_coef))(
    jnp.arange(2)
  )
  return jax.nn.softmax(logits) @ each


@functools.partial(jax.jit, static_argnums=(0, 1))
def _ascend(num_steps, num_samples, key, kl_coef):
  """P(first arm) after each step; exact if `num_samples` is 0."""

  def step(logits, key):
    if num_samples:
      arms = jax.random.categorical(key, logits, shape=(num_samples,))
      gradient = jax.grad(_loss)(logits, arms, kl_coef)
    else:
      gradient = _exact_gradient(logits, kl_coef)
    logits = logits - STEP * gradient
    return logits, jax.nn.softmax(logits)[0]

  keys = jax.random.split(key, num_steps)
  return jax.lax.scan(step, jnp.zeros(2), keys)[1]


class PolicyGradientTest(parameterized.TestCase):
  def test_exact_ascent(self):
    found = _ascend(50, 0, jax.random.key(0), 0.0)
    np.testing.assert_allclose(
      found[jnp.array([0, 1, 9, 49])],
      [0.562177, 0.621550, 0.870671, 0.977627],
      atol=1e-5,
    )

  def test_fixed_point_under_a_kl_penalty(self):
    # The best policy is proportional to exp(R / β): σ(1 / 0.5).
    found = _ascend(400, 0, jax.random.key(0), 0.5)
    np.testing.assert_allclose(found[-1], 0.880797, atol=1e-4)

  @parameterized.parameters((50, 0.0, 0.977627), (400, 0.5, 0.880797))
  def test_sampled_ascent_ends_there(self, num_steps, kl_coef, expected):
    found = _ascend(num_steps, 1024, jax.random.key(1), kl_coef)
    np.testing.assert_allclose(found[-1], expected, atol=0.02)


if __name__ == "__main__":
  absltest.main()
