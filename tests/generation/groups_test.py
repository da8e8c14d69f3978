"""Tests of groups of responses, and of drawing enough that differ."""

import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from rljax.generation import groups, responses, rollouts

_SIZE = 3


def _samples(number, scores):
  """Samples whose every array tells their round, group and place."""
  scores = np.float32(scores).ravel()
  ids = 100 * number + np.arange(len(scores))[:, None] + np.zeros((1, 2), int)
  mask = np.ones(ids.shape, bool)
  zeros = np.zeros(ids.shape, np.float32)
  return responses.Samples(
    rollout=rollouts.Rollout(
      prompt_ids=jnp.asarray(ids),
      prompt_mask=jnp.asarray(mask),
      response_ids=jnp.asarray(ids),
      response_mask=jnp.asarray(mask),
      log_probs=jnp.asarray(zeros),
      truncated_log_probs=jnp.asarray(zeros),
      finished=jnp.asarray(mask[:, 0]),
    ),
    prompts=[f"prompt {i}" for i in ids[:, 0]],
    texts=[f"text {i}" for i in ids[:, 0]],
    settings=responses.Settings(max_length=2, num_samples=_SIZE),
    policy_step=7,
    tokenizer=None,
    scores=scores,
    parts=[{"id": int(i)} for i in ids[:, 0]],
  )


# Of two groups in each round, whether their scores differ.
_ALIKE, _DIFFER = [1, 1, 1], [0, 1, 1]


class CollectTest(parameterized.TestCase):
  def collect(self, rounds, **options):
    """Groups from rounds of two, and the numbers of those that were asked."""
    asked = []

    def draw(number):
      asked.append(number)
      return _samples(number, rounds[number])

    return groups.collect(draw, 2, **options), asked

  def ids(self, found):
    """What the samples say of their origin, which all columns agree on."""
    ids = np.asarray(found.samples.rollout.response_ids)[:, 0]
    np.testing.assert_array_equal(found.samples.rollout.prompt_ids[:, 1], ids)
    self.assertEqual(found.samples.texts, [f"text {i}" for i in ids])
    self.assertEqual(found.samples.prompts, [f"prompt {i}" for i in ids])
    self.assertEqual(found.samples.parts, [{"id": i} for i in ids])
    return list(ids)

  def test_one_round_is_taken_as_it_is(self):
    found, asked = self.collect([[_ALIKE, _DIFFER]])
    self.assertEqual(asked, [0])
    self.assertEqual(self.ids(found), [0, 1, 2, 3, 4, 5])
    np.testing.assert_array_equal(found.samples.scores, _ALIKE + _DIFFER)
    metrics = found.metrics()
    self.assertEqual(metrics["groups/rounds"], 1)
    self.assertEqual(metrics["groups/acceptance"], 0.5)
    self.assertEqual(metrics["groups/without_signal"], 0.5)
    np.testing.assert_allclose(metrics["reward/mean"], 5 / 6, rtol=1e-6)
    np.testing.assert_allclose(metrics["reward/std"], np.sqrt(5) / 6, rtol=1e-6)

  def test_no_more_rounds_than_are_needed(self):
    rounds = [[_ALIKE, _DIFFER], [_DIFFER, _DIFFER], [_DIFFER, _DIFFER]]
    found, asked = self.collect(rounds, max_rounds=3)
    self.assertEqual(asked, [0, 1])
    # The first two that differ: group 1 of round 0, and group 0 of round 1.
    self.assertEqual(self.ids(found), [3, 4, 5, 100, 101, 102])
    np.testing.assert_array_equal(found.samples.scores, _DIFFER + _DIFFER)
    self.assertLen(found.drawn.texts, 12)
    metrics = found.metrics()
    self.assertEqual(metrics["groups/rounds"], 2)
    self.assertEqual(metrics["groups/acceptance"], 0.75)
    self.assertEqual(metrics["groups/without_signal"], 0.0)
    # Of all that was drawn: 3 + 2 + 2 + 2 of 12.
    np.testing.assert_allclose(metrics["reward/mean"], 0.75, rtol=1e-6)

  def test_others_fill_up(self):
    rounds = [[_ALIKE, _ALIKE], [_ALIKE, _DIFFER], [_ALIKE, _ALIKE]]
    found, asked = self.collect(rounds, max_rounds=3)
    self.assertEqual(asked, [0, 1, 2])
    # The first group that was drawn fills up, and stands where it was drawn.
    self.assertEqual(self.ids(found), [0, 1, 2, 103, 104, 105])
    metrics = found.metrics()
    self.assertEqual(metrics["groups/rounds"], 3)
    self.assertEqual(metrics["groups/without_signal"], 0.5)
    np.testing.assert_allclose(metrics["groups/acceptance"], 1 / 6, rtol=1e-6)

  @parameterized.parameters(np, jnp)
  def test_differ(self, library):
    scores = library.array([[1.0, 1.0], [0.1, 0.2], [-1.0, -1.0]])
    np.testing.assert_array_equal(groups.differ(scores), [False, True, False])
    nan = float("nan")
    scores = library.array([[nan, 1.0], [0.1, 0.2], [nan, nan]])
    np.testing.assert_array_equal(groups.differ(scores), [False, True, False])

  def test_deviation(self):
    scores = jnp.array([[1.0, 3.0, jnp.nan], [5.0, jnp.nan, jnp.nan]])
    found = groups.deviation(scores, ~jnp.isnan(scores))
    np.testing.assert_allclose(found, 0.5)  # Of 1 and 0.


if __name__ == "__main__":
  absltest.main()
