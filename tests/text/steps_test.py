"""Tests of traces: duplicates, steps, labels, tags and mixes."""

import collections

import numpy as np
from absl.testing import absltest, parameterized

from rljax.text import steps


def _sample(response, *, is_correct=True, finished=True, prompt="q"):
  return {
    "prompt": prompt,
    "response": response,
    "finished": finished,
    "parts": {"is_correct": is_correct},
  }


class KeysTest(parameterized.TestCase):
  @parameterized.parameters(
    ("1+2=3\nso 3", "1 + 2 = 3, then\n3", True),
    ("3*4=12", "3*5=15", False),
    ("cost $1,200/2 = $600", "cost 1200/2=600.", True),
    ("48/2=24 and 24+48=72", "24+48=72 and 48/2=24", False),
    ("1. 48/2=24\n2. 48+24=72", "48/2=24;48+24=72", True),
    ("24\n48+24=72", "48+24=72", True),
    ("(4 + 1) x 3 = 15", "4 + 1 x 3 = 15", False),
    ("no sums", "no  sums", True),
    ("no sums", "none", False),
  )
  def test_equation_key(self, a, b, are_same):
    self.assertEqual(steps.equation_key(a) == steps.equation_key(b), are_same)

  def test_equation_key_is_bounded(self):
    steps.equation_key("1+" * 500_000)
    steps.equation_key("(" * 100_000)
    steps.equation_key("1" * 500_000)


class AddDistinctTest(absltest.TestCase):
  def test_values_of_the_specification(self):
    samples = [
      _sample("11+02\n#13"),
      _sample("11+02\n#13"),
      _sample("11+02\n#13 "),
      _sample("07+06\n#13", finished=False),
      _sample("#12", is_correct=False),
    ]
    kept, counts = steps.add_distinct([], samples)
    self.assertEqual([row["response"] for row in kept], ["11+02\n#13"])
    self.assertEqual(
      counts, {"wrong": 2, "duplicate": 2, "over the limit": 0, "new": 1}
    )
    # A second round with the same samples adds nothing.
    again, counts = steps.add_distinct(kept, samples)
    self.assertEqual(again, kept)
    self.assertEqual(counts["new"], 0)
    # Nor does a question without a right sample.
    wrong = [_sample("#1", is_correct=False, prompt="r")]
    self.assertEqual(steps.add_distinct(kept, wrong)[0], kept)

  def test_the_same_trace_of_two_prompts(self):
    kept, _ = steps.add_distinct([], [_sample("a"), _sample("a", prompt="r")])
    self.assertLen(kept, 2)

  def test_limit_counts_what_was_there(self):
    old = [_sample("a"), _sample("b", prompt="r")]
    new = [_sample(c) for c in "cde"] + [_sample("f", prompt="r")]
    kept, counts = steps.add_distinct(old, new, max_per_prompt=2)
    self.assertEqual([row["response"] for row in kept], ["a", "b", "c", "f"])
    self.assertEqual(counts["over the limit"], 2)

  def test_rule_and_key(self):
    kept, _ = steps.add_distinct(
      [],
      [_sample("1+1=2", is_correct=False), _sample("1 + 1 = 2!")],
      keep=lambda row: True,
      key=steps.equation_key,
    )
    self.assertLen(kept, 1)


class StepsTest(parameterized.TestCase):
  @parameterized.parameters(
    ("a\nb\n#c", ["a\n", "b\n", "#c"]),
    ("a\nb\n", ["a\n", "b\n"]),
    ("a\n\n \nb", ["a\n\n \n", "b"]),
    ("\na\nb", ["\na\n", "b"]),
    ("", []),
    (" \n\n", []),
  )
  def test_steps(self, text, expected):
    self.assertEqual(steps.steps(text), expected)
    if expected:
      self.assertEqual("".join(steps.steps(text)), text)

  @parameterized.parameters(
    ("12+5=17;3*17=51|A51", ";|", ["12+5=17;", "3*17=51|", "A51"]),
    ("1+1=2; \n", ";", ["1+1=2; \n"]),
    ("a;;b", ";", ["a;", ";", "b"]),
    ("\na;b", ";\n", ["\na;", "b"]),
    ("a;\nb", ";", ["a;", "\nb"]),
    ("a\n", ";", ["a\n"]),
    # Characters with a meaning within brackets of a pattern.
    ("a]b^c-d\\e", "^]-\\", ["a]", "b^", "c-", "d\\", "e"]),
  )
  def test_other_ends(self, text, ends, expected):
    self.assertEqual(steps.steps(text, ends), expected)
    self.assertEqual("".join(steps.steps(text, ends)), text)
    self.assertLen(steps.prefixes(text, ends), len(expected) - 1)

  def test_time_is_bounded(self):
    for text in ("\n" * 300_000, "a" + "\n" * 300_000, "a" * 300_000):
      self.assertEqual("".join(steps.steps(text + "b")), text + "b")

  def test_nothing_ends_a_step(self):
    with self.assertRaisesRegex(ValueError, "one or more characters"):
      steps.steps("a", "")

  def test_prefixes(self):
    self.assertEqual(
      steps.prefixes("1+1=2;2*3=6|A6", ";|"), ["1+1=2;", "1+1=2;2*3=6|"]
    )
    self.assertEqual(steps.prefixes("a\nb\n#c"), ["a\n", "a\nb\n"])
    self.assertEqual(steps.prefixes("a"), [])
    self.assertEqual(steps.prefixes(""), [])


class LabelsTest(parameterized.TestCase):
  def test_values_of_the_specification(self):
    # Rollouts of three prefixes, whose values are .75, .5 and .25.
    rollouts = [[1, 1, 0, 1], [1, 0, 0, 1], [0, 0, 1, 0]]
    values = np.mean(rollouts, axis=1)
    self.assertEqual(
      steps.value_labels(values, threshold=0.5), [True, True, False]
    )
    self.assertEqual(steps.possible_labels(values), [True] * 3)

  def test_possible_labels_make_earlier_steps_good(self):
    self.assertEqual(
      steps.possible_labels([0.0, 0.25, 0.0, 0.0]), [True, True, False, False]
    )
    self.assertEqual(steps.possible_labels([]), [])

  def test_advantage_labels(self):
    self.assertEqual(
      steps.advantage_labels([0.5, 0.25, 0.25, 1.0], start_value=0.75),
      [False, False, True, True],
    )

  @parameterized.parameters(
    (0.3, 0.194104), (0.5, 0.636719), (0.6, 0.826330), (0.8, 0.989594)
  )
  def test_share_of_good_labels(self, value, expected):
    """P(GOOD) with eight completions of a prefix with this true value."""
    rng = np.random.default_rng(0)
    found = rng.binomial(8, value, size=200_000) / 8
    share = np.mean(steps.value_labels(found, threshold=0.5))
    np.testing.assert_allclose(share, expected, atol=4e-3)


class TaggedTest(absltest.TestCase):
  def test_tags_take_the_slot(self):
    self.assertEqual(
      steps.tagged(
        " 11+02\n 13\n#13\n", [True, False, True], tags=("G", "B"), slot=" "
      ),
      [("G", "11+02\n"), ("B", "13\n"), ("G", "#13")],
    )

  def test_empty_lines_are_left_out(self):
    self.assertEqual(
      steps.tagged("a\n\n\nb", [False, True], tags=("G", "B")),
      [("B", "a\n"), ("G", "b")],
    )


class MixTest(parameterized.TestCase):
  RIGHT = [True] * 30 + [False] * 10

  @parameterized.parameters(
    (0.5, 0, 10, 10), (0.75, 0, 30, 10), (1.0, 0, 30, 0), (0.75, 8, 6, 2)
  )
  def test_shares(self, share, num_rows, num_right, num_wrong):
    rows = steps.mix(self.RIGHT, share=share, num_rows=num_rows, seed=3)
    self.assertLen(set(rows.tolist()), num_right + num_wrong)
    counts = collections.Counter(self.RIGHT[i] for i in rows)
    self.assertEqual(
      (counts[True], counts[False]), (num_right, num_wrong), counts
    )

  def test_too_few_of_a_kind(self):
    with self.assertRaisesRegex(ValueError, "need 20 wrong ones; there are 10"):
      steps.mix(self.RIGHT, share=0.5, num_rows=40, seed=0)
    with self.assertRaisesRegex(ValueError, "0 are right and 3 wrong"):
      steps.mix([False] * 3, share=1.0, num_rows=0, seed=0)
    with self.assertRaisesRegex(ValueError, "share must lie"):
      steps.mix(self.RIGHT, share=1.5, num_rows=4, seed=0)

  def test_depends_on_the_seed(self):
    a, b, c = (
      steps.mix(self.RIGHT, share=0.5, num_rows=8, seed=s).tolist()
      for s in (0, 0, 1)
    )
    self.assertEqual(a, b)
    self.assertNotEqual(a, c)


if __name__ == "__main__":
  absltest.main()
