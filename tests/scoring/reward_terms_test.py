"""Tests of rewards that are sums of named terms."""

import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from rljax.scoring import reward_terms
from rljax.tasks import merge_sums


def _step_rewards(matches, feeds, reward=0.1, limit=0.5):
  return reward_terms.step_rewards(
    matches, np.array(feeds), reward=reward, limit=limit
  )


class StepRewardsTest(parameterized.TestCase):
  def test_by_hand(self):
    # Four lines, of which the third does not match; the last has no feed.
    feeds = [[0, 1, 0, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0, 0]]
    found = _step_rewards([[True, True, False, True], []], feeds)
    self.assertEqual(found.dtype, np.float32)
    np.testing.assert_allclose(
      found, [[0.1, 0.1, 0, 0.1, 0, 0, 0, 0], [0] * 8], rtol=1e-6
    )

  def test_limit(self):
    found = _step_rewards([[True] * 8], np.ones((1, 8), int))
    # Five times 0.1, and then no more.
    np.testing.assert_allclose(found[0, :5], 0.1, rtol=1e-6)
    np.testing.assert_array_equal(found[0, 5:], 0)
    # Of the second, what is left.
    found = _step_rewards([[True] * 3], [[1, 1, 1]], reward=0.4, limit=0.5)
    np.testing.assert_allclose(found, [[0.4, 0.1, 0, 0]], rtol=1e-6)

  def test_token_with_two_line_feeds_ends_both_lines(self):
    # "a", "\n\n", "c", "\n", "d": the lines a, "", c and d.
    found = _step_rewards([[True, False, True, True]], [[0, 2, 0, 1, 0]])
    np.testing.assert_allclose(found, [[0.1, 0.1, 0.1, 0, 0, 0]], rtol=1e-6)
    found = _step_rewards([[True, True, False, True]], [[0, 2, 0, 1, 0]])
    np.testing.assert_allclose(found, [[0.2, 0, 0.1, 0, 0, 0]], rtol=1e-6)

  def test_reference_results_match_once(self):
    # Results 15, 27, 42 in the reference; 15, 28, 42, 42 are generated.
    found = _step_rewards([[True, False, True, False]], [[1, 1, 1, 0, 0]])
    np.testing.assert_allclose(found, [[0.1, 0, 0.1, 0, 0, 0]], rtol=1e-6)


class TokenRewardsTest(parameterized.TestCase):
  def test_rollout_by_hand(self):
    tokenizer = merge_sums.character_tokenizer()
    end = tokenizer.eos_token_id
    prompt = "02+03+04="
    texts = ["05+04\n#09", "02+07\n#10", "05+04\n#09"]
    # The first two end, the third runs out of length. T = 10.
    ids = np.full((3, 10), tokenizer.pad_token_id)
    mask = np.zeros((3, 10), bool)
    for row, text in enumerate(texts):
      encoded = tokenizer(text, add_special_tokens=False)["input_ids"]
      encoded += [end] if row < 2 else []
      ids[row, : len(encoded)] = encoded
      mask[row, : len(encoded)] = True
    finished = jnp.array([True, True, False])
    feeds = (ids == tokenizer.convert_tokens_to_ids("\n")).astype(int)
    scores, parts = zip(
      *[merge_sums.score(prompt, t) for t in texts], strict=True
    )
    self.assertEqual(scores, (1.0, 0.0, 1.0))
    # Whichever order the reference takes, one of the first lines has it.
    matches = [part["step_matches"] for part in parts]
    self.assertEqual(matches[0][0] + matches[1][0], 1)
    potentials = np.full((3, 10), np.nan)
    potentials[:, 5] = [0.6, 0.3, 0.8]  # At the line feed,
    potentials[:, 9] = [0.9, 0.2, np.nan]  # and at the end token.
    potentials[2, 8] = 0.7
    earned = {
      "score": jnp.float32([1.0, 0.0, -1.0]),
      "reward_model": jnp.float32([0.5, 0.25, 0.125]),
      "steps": jnp.asarray(_step_rewards(matches, np.where(mask, feeds, 0))),
      "dense_reward_model": jnp.float32(potentials),
    }
    found = reward_terms.token_rewards(
      earned, jnp.asarray(feeds > 0), jnp.asarray(mask), step_coef=2.0
    )
    self.assertEqual(list(found), list(earned))
    expected = {name: np.zeros((3, 10)) for name in earned}
    expected["score"][[0, 2], [9, 8]] = [1.0, -1.0]
    expected["reward_model"][[0, 1, 2], [9, 9, 8]] = [0.5, 0.25, 0.125]
    expected["steps"][:, 5] = [0.1 * row[0] for row in matches]
    expected["dense_reward_model"][:, 5] = [0.2, -0.4, 0.6]
    expected["dense_reward_model"][[0, 1, 2], [9, 9, 8]] = [0.6, -0.2, -0.2]
    for name, rewards in expected.items():
      np.testing.assert_allclose(found[name], rewards, atol=1e-6, err_msg=name)

    # The row without an end keeps its score alone.
    found = reward_terms.token_rewards(
      earned,
      jnp.asarray(feeds > 0),
      jnp.asarray(mask),
      counts=finished,
      step_coef=2.0,
    )
    for name, rewards in expected.items():
      if name != "score":
        rewards[2] = 0.0
      np.testing.assert_allclose(found[name], rewards, atol=1e-6, err_msg=name)

  def test_potential_of_the_spec(self):
    # 0.5 -> 0.6 -> 0.3 -> 0.9: 0.1, -0.3 and 0.6, together 0.4.
    found = reward_terms.token_rewards(
      {"dense_reward_model": jnp.float32([[0.6, 0.0, 0.3, 0.9, 0.0]])},
      jnp.array([[True, False, True, False, True]]),
      jnp.array([[True, True, True, True, False]]),
    )["dense_reward_model"]
    np.testing.assert_allclose(found, [[0.1, 0, -0.3, 0.6, 0]], atol=1e-6)

  def test_unknown_term(self):
    ends = jnp.ones((1, 2), bool)
    with self.assertRaisesRegex(ValueError, "no reward term 'length'.*score"):
      reward_terms.token_rewards({"length": jnp.zeros(1)}, ends, ends)


if __name__ == "__main__":
  absltest.main()
