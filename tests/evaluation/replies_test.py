"""Tests of the columns of a table about replies."""

import math

import numpy as np
from absl.testing import parameterized

from rljax.evaluation import metrics, replies, tables


class TablesTest(parameterized.TestCase):
  def test_cells(self):
    self.assertEqual(tables.interval((0.5, -0.25, 1)), "0.500 [-0.250, 1.000]")
    self.assertEqual(
      tables.mean_and_range(iter([{"x": 1, "y": 2.0}, {"x": 4, "y": 2.0}])),
      {"x": "2.500 [1.000, 4.000]", "y": "2.000 [2.000, 2.000]"},
    )
    self.assertEqual(tables.mean_and_range([{"x": math.nan}]), {"x": "nan"})


class RewardsTest(parameterized.TestCase):
  def test_prompts_count_with_their_mean_over_seeds(self):
    seeds = [np.array([1.0, 0.0]), np.array([0.0, 1.0])]
    # Both prompts have 1/2 on average: the interval has no width.
    self.assertEqual(
      replies.rewards(seeds),
      {
        "reward": "0.500 [0.500, 0.500]",
        "seeds": 2,
        "reward by seed": "0.500 0.500",
      },
    )
    found = replies.rewards(seeds[:1])
    self.assertEqual(found["reward"], "0.500 [0.000, 1.000]")
    self.assertEqual(found["seeds"], 1)


class AnswersTest(parameterized.TestCase):
  def test_hand_computed(self):
    right, wrong = {"is_correct": True}, {"is_correct": False}
    found = replies.answers(
      [[right, right], [right, wrong]], [["7", "7"], ["7", "8"]]
    )
    # 1 and 1/2 are right by prompt; 2/2 and 1/2 by seed.
    self.assertStartsWith(found["correct"], "0.750 [0.500, 1.000]")
    self.assertEqual(found["correct by seed"], "1.000 0.500")
    self.assertEqual(found["different answers"], "1 2")

  def test_scores_that_do_not_say_what_is_right(self):
    with self.assertRaisesRegex(ValueError, "take --metrics=text"):
      replies.answers([[{"logit": 1.0}]], [["a"]])


class WordsTest(parameterized.TestCase):
  def test_hand_computed(self):
    found = replies.words(["a b c", "x"], ["b c d", "b c e f"])
    self.assertEqual(found["words"], 3.5)
    # Words b c d e f of 7; pairs bc cd ce ef of 5; triples bcd bce cef of 3.
    for name, value in (
      ("distinct-1", 5 / 7),
      ("distinct-2", 4 / 5),
      ("distinct-3", 3 / 3),
      ("distinct-1 per word", 5 / 7),
      ("distinct-2 per word", 4 / 7),
      ("distinct-3 per word", 3 / 7),
      # "b c" of three words is copied, and nothing of the other reply.
      ("prompt coverage", (2 / 3 + 0) / 2),
      ("prompt density", (4 / 3 + 0) / 2),
    ):
      self.assertAlmostEqual(found[name], value, msg=name)
    self.assertLen(found, 9)


class LikelihoodTest(parameterized.TestCase):
  # Replies of 2 and 1 tokens, the last of each its end; none to one prompt.
  LOG_PROBS = (
    [np.float32([-1.0, -3.0])],
    [],
    [np.float32([-2.0])],
  )

  def test_perplexity(self):
    found = replies.perplexity(self.LOG_PROBS, of="of them")
    # Over tokens (1 + 3 + 2) / 3, over replies (4 / 2 + 2) / 2: both are 2.
    self.assertEqual(
      list(found), ["perplexity of them", "perplexity_per_reply of them"]
    )
    for value in found.values():
      self.assertAlmostEqual(value, math.exp(2), places=5)
    # Without ends the first token of the first reply is left.
    found = replies.perplexity(self.LOG_PROBS, of="of them", with_end=False)
    for value in found.values():
      self.assertAlmostEqual(value, math.exp(1), places=5)

  @parameterized.parameters(([],), ([[], []],), ([[np.zeros(1)]], False))
  def test_perplexity_of_nothing(self, log_probs, with_end=True):
    found = replies.perplexity(log_probs, of="x", with_end=with_end)
    self.assertTrue(all(map(math.isnan, found.values())))
    self.assertLen(found, 2)

  def test_ratios_at_bounds(self):
    half, double = math.log(0.5), math.log(2)
    reference = [[np.zeros(2)], [np.zeros(1)], [np.zeros(3)], [np.zeros(1)]]
    log_probs = [
      [np.array([half, double])],  # The reply is as likely as it was.
      [np.array([double])],
      [np.array([half, 0.0, half])],  # A quarter as likely.
      [np.array([0.1])],
    ]
    found = replies.logged(log_probs, reference, clip_epsilon=0.5)
    shares = {name: x for name, x in found.items() if "bound" in name}
    self.assertEqual(
      shares,
      {
        # Of 4 replies the third is at most half as likely, the second 1.5
        # times or more. Of 7 tokens 3 and 2 are.
        "replies at the lower bound": 1 / 4,
        "replies at the upper bound": 1 / 4,
        "tokens at the lower bound": 3 / 7,
        "tokens at the upper bound": 2 / 7,
      },
    )
    self.assertEqual(
      {name: x for name, x in found.items() if name not in shares},
      replies.perplexity(log_probs, of="of logged replies"),
    )

  def test_without_bounds_or_reference_none_is_counted(self):
    expected = replies.perplexity(self.LOG_PROBS, of="of logged replies")
    for reference, epsilon in ((self.LOG_PROBS, 0), (None, 0.5)):
      found = replies.logged(self.LOG_PROBS, reference, clip_epsilon=epsilon)
      self.assertEqual(found, expected)

  def test_bounds_of_epsilon(self):
    # Nothing is at most 0 times as likely.
    found = replies.logged(
      [[np.array([-90.0])]], [[np.zeros(1)]], clip_epsilon=1
    )
    self.assertEqual(found["tokens at the lower bound"], 0)
    for epsilon in (-0.1, 1.5):
      with self.assertRaisesRegex(ValueError, rf"in \[0, 1\], got {epsilon}"):
        replies.logged(self.LOG_PROBS, clip_epsilon=epsilon)

  def test_padding_is_that_of_the_metric(self):
    rng = np.random.default_rng(0)
    rows = [[rng.normal(size=n).astype(np.float32)] for n in (3, 1, 5)]
    mask = np.arange(5) < np.array([[3], [1], [5]])
    values = np.full(mask.shape, np.nan)
    values[mask] = np.concatenate([row for (row,) in rows])
    expected = metrics.perplexity(values, mask)
    found = replies.perplexity(rows, of="x")
    for name, value in expected.items():
      self.assertAlmostEqual(found[f"{name} x"], value)
