"""Tests of what RLMEC's policy learns from, on two rows made by hand."""

import numpy as np
from absl.testing import absltest, parameterized

from rljax.rlmec import targets

RIGHT = {
  "is_right": True,
  "prompt_ids": [7, 8],
  "response_ids": [1, 2, 3],
  "probs": [0.9, 0.5, 0.2],
  "ref_log_probs": [-1.0, -2.0, -3.0],
  "dropped": [False, False, False],
  "rewrite_ids": [1, 2, 3],
  "rewrite_edited": [False, False, False],
  # The gold solution has another style: a right sample is not to lose its own.
  "gold_ids": [4, 4, 4, 4],
  "gold_edited": [True, True, True, True],
}
WRONG = {
  "is_right": False,
  "prompt_ids": [9],
  "response_ids": [5, 6, 3, 3],
  "probs": [0.99, 0.45, 0.01, 0.6],
  "ref_log_probs": [-0.5, -1.5, -2.5, -3.5],
  "dropped": [False, True, True, False],
  "rewrite_ids": [5, 2, 3],
  "rewrite_edited": [False, True, False],
  "gold_ids": [1, 2],
  "gold_edited": [True, False],
}


def _arrays(rows=(RIGHT, WRONG), **options):
  return targets.arrays(rows, prompt_length=3, response_length=5, **options)


class ArraysTest(parameterized.TestCase):
  @parameterized.parameters(
    ("model", [[0.4, 0, 0, 0, 0], [0, -0.05, -0.1, 0, 0]]),
    ("alignment", [[0.5, 0.5, 0.5, 0, 0], [0, -0.1, -0.1, 0, 0]]),
    ("sequence", [[0.5, 0.5, 0.5, 0, 0], [-0.1, -0.1, -0.1, -0.1, 0]]),
    ("none", [[0] * 5, [0] * 5]),
  )
  def test_rewards(self, name, expected):
    found = _arrays(token_rewards=name)
    self.assertEqual(found["rewards"].dtype, np.float32)
    np.testing.assert_allclose(found["rewards"], expected, atol=1e-6)

  @parameterized.parameters("model", "alignment", "sequence")
  def test_bounds(self, name):
    found = _arrays(
      token_rewards=name, threshold=0.3, max_reward=0.25, max_penalty=0.2
    )["rewards"]
    self.assertAlmostEqual(found.max(), 0.25, places=6)
    self.assertAlmostEqual(found.min(), -0.2, places=6)

  def test_threshold_moves_the_models_rewards(self):
    found = _arrays(threshold=0.1, max_reward=1.0)["rewards"]
    np.testing.assert_allclose(found[0], [0.8, 0.4, 0.1, 0, 0], atol=1e-6)
    np.testing.assert_allclose(found[1], [0, 0, -0.09, 0, 0], atol=1e-6)

  def test_rewrites_are_imitated(self):
    found = _arrays()
    np.testing.assert_array_equal(
      found["imitated_ids"], [[1, 2, 3, 0, 0], [5, 2, 3, 0, 0]]
    )
    np.testing.assert_allclose(
      found["weights"], [[0.5, 0.5, 0.5, 0, 0], [0.5, 1, 0.5, 0, 0]]
    )

  def test_gold_is_imitated_where_the_sample_is_wrong(self):
    found = _arrays(imitate="gold")
    np.testing.assert_array_equal(
      found["imitated_ids"], [[1, 2, 3, 0, 0], [1, 2, 0, 0, 0]]
    )
    np.testing.assert_allclose(
      found["weights"], [[0.5, 0.5, 0.5, 0, 0], [1, 0.5, 0, 0, 0]]
    )
    np.testing.assert_array_equal(found["imitated_mask"].sum(axis=1), [3, 2])

  def test_weights(self):
    found = _arrays(edited_weight=3.0, kept_weight=0.0)["weights"]
    np.testing.assert_allclose(found, [[0] * 5, [0, 3, 0, 0, 0]])

  def test_samples_and_their_first_log_probs(self):
    found = _arrays()
    np.testing.assert_array_equal(
      found["response_ids"], [[1, 2, 3, 0, 0], [5, 6, 3, 3, 0]]
    )
    np.testing.assert_array_equal(found["response_mask"].sum(axis=1), [3, 4])
    # Prompts are padded on the left.
    np.testing.assert_array_equal(
      found["prompt_mask"], [[False, True, True], [False, False, True]]
    )
    np.testing.assert_allclose(
      found["ref_log_probs"],
      [[-1, -2, -3, 0, 0], [-0.5, -1.5, -2.5, -3.5, 0]],
    )

  def test_rows_do_not_depend_on_each_other(self):
    both = _arrays()
    for i, row in enumerate((RIGHT, WRONG)):
      for name, array in _arrays([row]).items():
        np.testing.assert_array_equal(array[0], both[name][i], err_msg=name)

  @parameterized.parameters(
    ({"token_rewards": "oracle"}, "token_rewards must be one of model, "),
    ({"imitate": "sample"}, "imitate must be one of rewrite, gold"),
  )
  def test_unknown_names(self, options, message):
    with self.assertRaisesRegex(ValueError, message):
      _arrays(**options)


if __name__ == "__main__":
  absltest.main()
