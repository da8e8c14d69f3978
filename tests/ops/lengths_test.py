"""Tests of widths at which padded rows are read."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from rljax.ops import lengths

P, T = 20, 12


def _batch(prompts, responses):
  """Rows with so many tokens; columns that do not count hold NaN."""
  prompts, responses = np.array(prompts), np.array(responses)
  prompt_mask = np.arange(P) >= P - prompts[:, None]
  response_mask = np.arange(T) < responses[:, None]
  rng = np.random.default_rng(0)
  fill = lambda mask: np.where(mask, rng.random(mask.shape), np.nan)
  return {
    "rollout": {
      "prompt_ids": fill(prompt_mask),
      "prompt_mask": prompt_mask,
      "response_mask": response_mask,
      "finished": responses > 3,
    },
    "advantages": fill(response_mask),
    "allowed": np.repeat(response_mask[..., None], 3, axis=2),
  }


class LengthsTest(parameterized.TestCase):
  @parameterized.parameters(
    (229, 1, (229,)),
    (229, 4, (64, 120, 176, 229)),  # 57.25, 114.5 and 171.75, rounded up.
    (9, 2, (8, 9)),
    (8, 3, (8,)),
    (1, 8, (1,)),
  )
  def test_widths(self, length, num_buckets, expected):
    self.assertEqual(lengths.widths(length, num_buckets), expected)

  @chex.variants(with_jit=True, without_jit=True)
  @parameterized.parameters((0, 0), (8, 0), (9, 1), (16, 1), (17, 2), (20, 2))
  def test_bucket(self, longest, expected):
    mask = np.arange(20) < np.array([[1], [longest]])
    for left, where in ((False, mask), (True, mask[:, ::-1])):
      found = self.variant(
        lambda mask, left=left: lengths.bucket(mask, (8, 16, 20), left=left)
      )(jnp.asarray(where))
      self.assertEqual(found, expected)

  @parameterized.parameters(
    ([3, 8], [2, 7], (8, 8)),
    ([3, 9], [2, 9], (16, 12)),
    ([17, 1], [0, 0], (20, 8)),
    ([20, 1], [12, 0], (20, 12)),
  )
  def test_at_width(self, prompts, responses, expected):
    batch = _batch(prompts, responses)

    def read(batch):
      rollout, advantages = batch["rollout"], batch["advantages"]
      mask = rollout["response_mask"]
      chex.assert_equal_shape_prefix([mask, batch["allowed"]], 2)
      shape = (rollout["prompt_mask"].shape[1], mask.shape[1])
      prompts = jnp.where(rollout["prompt_mask"], rollout["prompt_ids"], 0)
      return {
        "shape": jnp.array(shape),
        "kept": jnp.where(mask, advantages, 0),
        "sum": prompts.sum(axis=1),
        "finished": rollout["finished"],
      }

    found = jax.jit(lambda batch: lengths.at_width(read, batch, 3))(batch)
    self.assertEqual(tuple(found.pop("shape").tolist()), expected)
    whole = lengths.at_width(read, batch, 1)
    self.assertEqual(tuple(whole.pop("shape").tolist()), (P, T))
    chex.assert_trees_all_close(found, whole, rtol=1e-6)

  def test_a_mask_of_another_name_counts(self):
    batch = _batch([1, 2], [1, 1]) | {"learnt_mask": np.ones((2, T), bool)}
    width = lambda batch: jnp.array(batch["learnt_mask"].shape[1])
    self.assertEqual(lengths.at_width(width, batch, 3), T)

  def test_by_length(self):
    batch = _batch([9, 1, 5, 2, 8, 3], [1, 1, 5, 0, 0, 0])
    # Totals are 10, 2, 10, 2, 8, 3; parts are every second row of the order.
    order = np.asarray(lengths.by_length(batch, 2))
    self.assertEqual(order[0::2].tolist(), [1, 3, 5])
    self.assertEqual(order[1::2].tolist(), [4, 0, 2])

  def test_bad_batch(self):
    with self.assertRaisesRegex(ValueError, "must have one prompt_mask, got 0"):
      lengths.at_width(lambda batch: batch, {"x": jnp.ones(3)}, 2)


if __name__ == "__main__":
  absltest.main()
