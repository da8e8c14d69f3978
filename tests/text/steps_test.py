"""Tests of traces: duplicates, steps, labels, tags and mixes."""

import collections

import numpy as np
from absl.testing import absltest, parameterized

from rljax.tasks import merge_sums
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


class RulesTest(parameterized.TestCase):
  @parameterized.product(
    is_correct=(False, True), is_valid=(False, True), finished=(False, True)
  )
  def test_by_the_truth(self, is_correct, is_valid, finished):
    row = _sample("a", is_correct=is_correct, finished=finished)
    self.assertEqual(steps.is_kept(row), is_correct and finished)
    row["parts"]["is_valid"] = is_valid
    self.assertEqual(steps.is_valid(row), is_correct and is_valid and finished)

  @parameterized.parameters(
    (True, "3", 0.5, True),
    (True, "3", 0.4, False),
    (True, None, 0.9, False),
    (False, "3", 0.9, False),
  )
  def test_by_a_reward_model(self, finished, answer, value, expected):
    # What is right is not asked.
    row = _sample("a", is_correct=False, finished=finished)
    row["parts"]["answer"] = answer
    row["reward_model"] = value
    self.assertEqual(steps.is_trusted(row, threshold=0.5), expected)
    self.assertFalse(steps.is_trusted(row | {"parts": {}}, threshold=0.5))


class SolutionsTest(absltest.TestCase):
  SAMPLES = (
    _sample("a\nb"),
    _sample("c", is_correct=False),
    _sample("a \nb"),
    _sample("d"),
    _sample("e"),
    _sample("c", is_correct=False),
    _sample("f", is_correct=False),
    _sample("g", finished=False),
    _sample(" ", is_correct=False),
    _sample("c", is_correct=False, prompt="r"),
  )

  def test_each_kind_once(self):
    found = steps.solutions(self.SAMPLES)
    self.assertEqual(
      [row["response"] for row in found], ["a\nb", "d", "e", "c", "f", "c"]
    )
    self.assertEqual([row["prompt"] for row in found], ["q"] * 5 + ["r"])

  def test_limit_is_of_each_kind(self):
    found = steps.solutions(self.SAMPLES, max_per_prompt=2)
    self.assertEqual(
      [row["response"] for row in found], ["a\nb", "d", "c", "f", "c"]
    )

  def test_with_values(self):
    samples = [
      _sample("a\nb\nc"),
      _sample("a\nd", is_correct=False),
      _sample("e", is_correct=False),
      _sample("f", finished=False),
    ]
    values = {("q", "a\n"): 0.75, ("q", "a\nb\n"): 0.25}
    right, wrong, short = steps.with_values(samples[:3], samples, values)
    self.assertEqual(
      right,
      {
        "prompt": "q",
        "response": "a\nb\nc",
        "reward": 1.0,
        "steps": ["a\n", "b\n", "c"],
        "values": [0.75, 0.25, 1.0],
        # One of four samples is right: the last has no end.
        "start_value": 0.25,
        "is_correct": True,
        "finished": True,
      },
    )
    self.assertEqual(wrong["values"], [0.75, 0.0])
    self.assertEqual((wrong["reward"], wrong["is_correct"]), (0.0, False))
    self.assertEqual(short["values"], [0.0])
    with self.assertRaises(KeyError):
      steps.with_values(samples[:1], samples, {})


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

  def test_ids_and_what_is_learnt(self):
    tokenizer = merge_sums.character_tokenizer()
    ids = lambda text: tokenizer.convert_tokens_to_ids(list(text))
    good, bad = ids("GB")
    found, is_learnt = steps.encode_tagged(
      tokenizer,
      [("G", "1+2\n"), ("B", "#3")],
      {"G": good, "B": bad},
    )
    self.assertEqual(
      found, [good, *ids("1+2\n"), bad, *ids("#3"), tokenizer.eos_token_id]
    )
    # All but the two tags; the end is learnt.
    self.assertEqual(is_learnt, [False, *[True] * 4, False, *[True] * 2, True])
    self.assertEqual(
      steps.encode_tagged(tokenizer, [], {}), ([tokenizer.eos_token_id], [True])
    )

  def test_forced_tag(self):
    found = steps.forced_tag([b"a", b"\n", b"b\n", b"\nb", b""], 7)
    # Behind what ends in a line feed, and at the start.
    np.testing.assert_array_equal(found, [-1, 7, 7, -1, -1, 7])
    self.assertEqual(found.dtype, np.int32)

  def test_labels_in_words(self):
    rows = [
      {"is_correct": True, "good": [True, True, True]},
      {"is_correct": False, "good": [True, False]},
    ]
    self.assertEqual(
      steps.describe_labels(rows),
      "2 solutions, 1 right; share of bad steps by position: 0.00 0.50 0.00",
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
