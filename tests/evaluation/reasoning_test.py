"""Tests of the analysis of several samples of a question."""

import json
import pathlib
import tempfile

import numpy as np
from absl.testing import parameterized

from rljax.evaluation import metrics, reasoning
from rljax.text import files


def row(response, answer, *, right, finished=True, **parts):
  """A row of `responders.collect`."""
  if not finished:
    right, answer = False, None
  return {
    "prompt": "q",
    "response": response,
    "finished": finished,
    "parts": {"answer": answer, "is_correct": right} | parts,
  }


# Two questions with three samples each; the answers 5 and 9 are right.
GREEDY = (row("5", 5, right=True), row("8", 8, right=False))
SAMPLES = (
  *(row("2+3=5", 5, right=True), row("2+3 =5", 5, right=True)),
  row("4", 4, right=False),
  *(row("9", 9, right=True), row("8", 8, right=False)),
  row("9...", 9, right=True, finished=False),
)


class CountTest(parameterized.TestCase):
  def test_hand_computed(self):
    counts, traces = reasoning.count(GREEDY, SAMPLES)
    expected = {
      "greedy": [True, False],
      "correct": [2, 1],
      # 5 wins; 9 and 8 have a vote each, and the unfinished one has none.
      "vote": [1, 0.5],
      # Texts that differ in blanks within words are two traces.
      "unique": [2, 1],
      "unfinished": [0, 1],
      "no_answer": [0, 0],
      "characters": [5 + 6 + 1, 1 + 1 + 4],
    }
    self.assertEqual(counts.keys(), expected.keys())
    for name, values in expected.items():
      np.testing.assert_array_equal(counts[name], values, name)
    self.assertEqual(counts["greedy"].dtype, bool)
    self.assertEqual(traces, [["2+3=5", "2+3 =5"], ["9"]])

  def test_options(self):
    counts, traces = reasoning.count(
      GREEDY, SAMPLES, ties="first_seen", trace_key="equations"
    )
    # The first seen of 9 and 8 is right; both traces calculate the same.
    np.testing.assert_array_equal(counts["vote"], [1, 1])
    np.testing.assert_array_equal(counts["unique"], [1, 1])
    self.assertEqual(traces, [["2+3=5"], ["9"]])

  def test_scores(self):
    scores = np.array([0.1, 0.2, 0.9, 0.2, 0.8, 1.0])
    counts, _ = reasoning.count(GREEDY, SAMPLES, scores=scores)
    # The best are the wrong 4 and the wrong 8: what did not end has no answer.
    np.testing.assert_array_equal(counts["rerank"], [0, 0])
    # 5 has 0.3 and 4 has 0.9; 9 has 0.2 and 8 has 0.8.
    np.testing.assert_array_equal(counts["weighted_vote"], [0, 0])
    counts, _ = reasoning.count(
      GREEDY, SAMPLES, scores=-scores, scores_vote=False
    )
    np.testing.assert_array_equal(counts["rerank"], [1, 1])
    self.assertNotIn("weighted_vote", counts)

  def test_validity_and_known_traces(self):
    samples = [
      row("a", 1, right=True, is_valid=True),
      row("b", 1, right=True, is_valid=True),
      row("a", 1, right=True, is_valid=True),
      row("c", 1, right=True, is_valid=False),
      row("d", 2, right=False, is_valid=False),
    ]
    counts, _ = reasoning.count(
      GREEDY[:1], samples, known=[["b ", "d", "e", "e"]]
    )
    np.testing.assert_array_equal(counts["valid"], [3])
    np.testing.assert_array_equal(counts["unique_valid"], [2])
    # Of a, b and c one is known.
    np.testing.assert_array_equal(counts["new"], [2])
    np.testing.assert_array_equal(counts["unique"], [3])


class TraceLogProbsTest(parameterized.TestCase):
  @parameterized.parameters((True, [-6.5, 0.0]), (False, [-3.5, 0.0]))
  def test_sums(self, with_end, expected):
    log_probs = [[np.float32([-1, -2]), np.float32([-2.5, -1])], []]
    found = reasoning.trace_log_probs(log_probs, with_end=with_end)
    np.testing.assert_allclose(found["trace_log_prob"], expected)
    np.testing.assert_array_equal(found["scored_traces"], [2, 0])


class RatiosTest(parameterized.TestCase):
  def numbers(self, counts, **options):
    return {
      name: float(np.sum(parts) / np.sum(wholes))
      for name, (parts, wholes) in reasoning.ratios(counts, **options).items()
    }

  def test_hand_computed(self):
    counts, _ = reasoning.count(GREEDY, SAMPLES)
    found = self.numbers(counts, num_samples=3, ks=[1, 2])
    expected = {
      "maj@1": 1 / 2,
      "p@1": 3 / 6,
      "maj@3": 1.5 / 2,
      "pass@1": 3 / 6,
      # C(1, 2) / C(3, 2) = 0 and C(2, 2) / C(3, 2) = 1/3 fail.
      "pass@2": (1 + 2 / 3) / 2,
      "solved": 1,
      "unique correct": 1.5,
      "no answer": 0,
      "unfinished": 1 / 6,
      "characters": 18 / 6,
    }
    self.assertEqual(found.keys(), expected.keys())
    for name, value in expected.items():
      self.assertAlmostEqual(found[name], value, msg=name)
    self.assertIn("pass@3", reasoning.ratios(counts, num_samples=3))

  def test_ratios_of_two_counts(self):
    counts = reasoning.count(GREEDY, SAMPLES)[0] | {
      "rerank": np.array([1, 0.5]),
      "weighted_vote": np.array([0, 0.5]),
      "valid": np.array([2, 0]),
      "unique_valid": np.array([1, 0]),
      "new": np.array([1, 1]),
      "trace_log_prob": np.array([-6.0, -3.0]),
      "scored_traces": np.array([2.0, 1.0]),
    }
    found = self.numbers(counts, num_samples=3)
    for name, value in {
      "rerank@3": 0.75,
      "weighted maj@3": 0.25,
      "unique valid": 0.5,
      "valid of correct": 2 / 3,
      "new traces": 2 / 3,
      "reference log-prob": -3,
    }.items():
      self.assertAlmostEqual(found[name], value, msg=name)


class CompareTest(parameterized.TestCase):
  def counts(self, greedy, correct, **more):
    """Of four samples a question; the rest does not matter here."""
    zeros = np.zeros(len(correct), int)
    names = ("vote", "unique", "no_answer", "unfinished", "characters")
    return dict.fromkeys(names, zeros) | {
      "greedy": np.array(greedy),
      "correct": np.array(correct),
      **{name: np.array(values) for name, values in more.items()},
    }

  def test_hand_computed(self):
    first = self.counts([True, True, False], [4, 2, 0], new=[0, 0, 0])
    seeds = [
      self.counts(
        [True, False, False], [4, 4, 0], new=[1, 0, 0], unique=[2, 2, 0]
      ),
      self.counts(
        [True, True, True], [2, 2, 4], new=[0, 0, 1], unique=[1, 1, 2]
      ),
    ]
    found = reasoning.compare(
      {"sft": [first], "ei": seeds}, num_samples=4, ks=[1], num_known=9
    )
    self.assertEqual(list(found.by_seed), ["sft", "ei"])
    self.assertAlmostEqual(found.by_seed["sft"]["p@1"][0], 6 / 12)
    np.testing.assert_allclose(found.by_seed["ei"]["p@1"], [8 / 12, 8 / 12])
    np.testing.assert_allclose(
      found.by_seed["ei"]["new traces"], [1 / 4, 1 / 4]
    )
    # The first policy has no right trace at all: 0 / 0.
    self.assertEqual(found.by_seed["sft"]["new traces"], [None])
    self.assertEqual(found.table["sft"]["new traces"], "-")
    self.assertNotIn("new traces", found.differences["ei"])
    # Seeds count together, and questions are resampled: 16 of 24.
    expected = metrics.ratio_interval(np.array([6, 6, 4]) / 4, np.full(3, 2.0))
    self.assertEqual(
      found.table["ei"]["p@1"], "{:.3f} [{:.3f}, {:.3f}]".format(*expected)
    )
    self.assertStartsWith(found.table["ei"]["p@1"], "0.667 [")
    self.assertStartsWith(found.differences["ei"]["p@1"], "0.167 [")
    self.assertEqual(list(found.differences), ["ei"])
    self.assertEqual(found.table["sft"]["seeds"], 1)
    self.assertEqual(found.table["ei"]["seeds"], 2)
    self.assertEqual(found.table["ei"]["K' of new traces"], 9)
    # Each seed against the only one of the first policy.
    self.assertEqual(
      found.greedy,
      {
        "ei 0, sft 0": {
          "both right": 1,
          "only the former": 0,
          "only the latter": 1,
          "neither": 1,
          "p (McNemar, exact)": 1.0,
        },
        "ei 1, sft 0": {
          "both right": 2,
          "only the former": 1,
          "only the latter": 0,
          "neither": 0,
          "p (McNemar, exact)": 1.0,
        },
      },
    )

  def test_seeds_stand_against_seeds(self):
    right, wrong = self.counts([True], [1]), self.counts([False], [1])
    found = reasoning.compare(
      {"a": [right, wrong], "b": [right, right]}, num_samples=4
    )
    self.assertEqual(list(found.greedy), ["b 0, a 0", "b 1, a 1"])
    self.assertEqual(found.greedy["b 0, a 0"]["both right"], 1)
    self.assertEqual(found.greedy["b 1, a 1"]["only the former"], 1)

  def test_one_policy_is_compared_with_nothing(self):
    found = reasoning.compare({"a": [self.counts([True], [1])]}, num_samples=4)
    self.assertEqual((found.differences, found.greedy), ({}, {}))

  def test_notes(self):
    (note,) = reasoning.notes(7, 2)
    self.assertIn("K' = 7 samples", note)
    self.assertIn("less than 4 K = 8", note)
    self.assertEqual(reasoning.notes(8, 2), [])
    self.assertEqual(reasoning.notes(0, 2), [])


class FilesTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    folder = tempfile.TemporaryDirectory()
    self.addCleanup(folder.cleanup)
    self.folder = pathlib.Path(folder.name)

  def test_samples_of_one_policy(self):
    path = self.folder / "samples.jsonl"
    rows = [
      {"prompt": "a", "response": "1", "greedy": True},
      {"prompt": "a", "response": "2", "greedy": False},
      {"prompt": "b", "response": "3"},
    ]
    files.write_jsonl(path, rows)
    self.assertEqual(reasoning.read_samples(path), rows[1:])
    files.write_jsonl(path, [{**r, "arm": r["prompt"]} for r in rows])
    with self.assertRaisesRegex(ValueError, "holds several policies"):
      reasoning.read_samples(path)
    files.write_jsonl(path, [{"prompt": "a"}])
    with self.assertRaisesRegex(ValueError, "response"):
      reasoning.read_samples(path)

  def test_texts_by_prompt(self):
    rows = [{"prompt": p, "response": r} for p, r in ("b1", "a2", "b3", "c4")]
    texts = lambda *prompts: reasoning.texts_by_prompt(
      rows, prompts, name="--new_vs_samples=x"
    )
    self.assertEqual(texts("a", "b", "a"), [["2"], ["1", "3"], ["2"]])
    with self.assertRaisesRegex(
      ValueError, "--new_vs_samples=x has no sample for the prompt 'd'"
    ):
      texts("a", "d")

  def test_sample_rows(self):
    found = reasoning.sample_rows(
      {"arm": "x"}, [{"response": "g"}], [{"response": "s"}], np.float32([0.5])
    )
    self.assertEqual(
      list(found),
      [
        {"arm": "x", "greedy": True, "response": "g"},
        {"arm": "x", "greedy": False, "response": "s", "rerank_score": 0.5},
      ],
    )
    found = reasoning.sample_rows({}, [], [{"response": "s"}])
    self.assertEqual(list(found), [{"greedy": False, "response": "s"}])

  def test_write(self):
    counts = {"a": [reasoning.count(GREEDY, SAMPLES)[0]]}
    by_seed = {"a": {"maj@1": [0.5], "new traces": [None]}}
    reasoning.write(self.folder, counts, ["q0", "q1"], by_seed)
    found = json.loads((self.folder / "metrics.json").read_text())
    self.assertEqual(found, by_seed)
    self.assertEqual(
      files.read_jsonl(self.folder / "questions.jsonl"),
      [
        {
          "index": i,
          "prompt": f"q{i}",
          "policies": {"a": [{"greedy": g, "correct": c, "vote": v}]},
        }
        for i, (g, c, v) in enumerate([(True, 2, 1.0), (False, 1, 0.5)])
      ],
    )
