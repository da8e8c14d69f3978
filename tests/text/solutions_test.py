"""Tests of labels for outcome reward models."""

import functools
import json
import pathlib
import tempfile

import hypothesis
import numpy as np
from absl.testing import absltest, parameterized
from hypothesis import strategies as st

from rljax.evaluation import metrics
from rljax.tasks import tokenizers
from rljax.text import encoding, forms
from rljax.text import solutions as solutions_lib

_SAMPLE = {"prompt": "1+2=", "response": "3\n#3", "reward": 1.0}
# Completions per prefix [1,1,0,1], [1,0,0,1], [0,0,1,0] and the outcome 0.
_VALUES = {
  "prompt": "1+2=",
  "response": "1\n2\n3\n#4",
  "steps": ["1\n", "2\n", "3\n", "#4"],
  "values": [0.75, 0.5, 0.25, 0.0],
  "num_completions": 4,
  "is_correct": False,
  "finished": True,
}


@functools.cache
def _tokenizer(joined=False):
  """Characters; if `joined`, also a token that ends two lines, and one in two.

  "\\n\\n" and "3\\n4".
  """
  words = [*"0123456789+=# \n"]
  if joined:
    words += ["\n\n", "3\n4"]
    return tokenizers.of_words(words, r"\n\n|3\n4|[\s\S]")
  return tokenizers.of_words(words, r"[\s\S]")


def _parse(row, labels="outcome", **changes):
  return solutions_lib.parse({**row, **changes}, "log:1", labels)


def _labelled(solutions, targets, *, joined=False, max_response_length=40):
  encoded = encoding.encode(
    _tokenizer(joined),
    solutions,
    max_prompt_length=8,
    max_response_length=max_response_length,
    too_long="cut",
  )
  return solutions_lib.label_tokens(encoded, _tokenizer(joined), targets)


class ParseTest(parameterized.TestCase):
  def test_outcome_is_the_label_of_every_step(self):
    (solution,) = _parse(_SAMPLE)
    self.assertEqual(solution.labels, (1.0, 1.0))
    self.assertEqual(solution.candidates, ("3\n#3",))
    self.assertEqual(solution.rewards, (1.0,))
    self.assertTrue(solution.is_positive and solution.has_answer)

  def test_unfinished_is_wrong(self):
    (solution,) = _parse(_SAMPLE, finished=False)
    self.assertEqual(solution.labels, (0.0, 0.0))
    (solution,) = _parse(
      _VALUES, "sorm", values=[0.75, 0.0, 0.0, 1.0], finished=False
    )
    self.assertEqual(solution.labels, (1.0, 0.0, 0.0, 0.0))

  def test_answers(self):
    for answer, expected in (("3", True), (None, False)):
      (solution,) = _parse(_SAMPLE, parts={"answer": answer})
      self.assertEqual(solution.has_answer, expected)
    (solution,) = _parse(_SAMPLE, parts={"is_correct": True})
    self.assertTrue(solution.has_answer)

  def test_drawn_ids_are_not_kept(self):
    (solution,) = _parse(_SAMPLE, response_ids=[3, 14, 12, 3])
    self.assertIsNone(solution.response_ids)

  def test_every_candidate_is_a_solution(self):
    row = {"prompt": "1=", "candidates": ["1", "2\n3"], "rewards": [1, 0.25]}
    first, second = _parse(row)
    self.assertEqual(first.labels, (1.0,))
    self.assertEqual(second.labels, (0.25, 0.25))
    self.assertEqual(second.candidates, ("2\n3",))
    self.assertFalse(second.is_positive)
    rows = [forms.parse(row, "log:1")]
    self.assertEqual(solutions_lib.from_rows(rows), [first, second])

  def test_sorm_labels(self):
    (solution,) = _parse(_VALUES, "sorm")
    self.assertEqual(solution.labels, (1.0, 1.0, 1.0, 0.0))
    self.assertFalse(solution.is_positive)
    # A good step makes all earlier ones good.
    (solution,) = _parse(_VALUES, "sorm", values=[0.0, 0.0, 0.25, 0.0])
    self.assertEqual(solution.labels, (1.0, 1.0, 1.0, 0.0))
    (solution,) = _parse(_VALUES, "sorm", values=[0.5, 0.0, 0.0, 0.0])
    self.assertEqual(solution.labels, (1.0, 0.0, 0.0, 0.0))
    # As outcomes, the same rows are right or wrong as a whole.
    (solution,) = _parse(_VALUES)
    self.assertEqual(solution.labels, (0.0,) * 4)

  @parameterized.parameters(
    (_SAMPLE, "sorm", {}, '"values" is missing'),
    (_VALUES, "sorm", {"values": [1, 1, 1]}, "3 values, .* has 4 lines"),
    (_VALUES, "sorm", {"steps": ["1\n2\n", "3\n#4"]}, '"steps" are not its'),
    (_VALUES, "sorm", {"values": [1, 2, 0, 0]}, "be shares in .0, 1., got 2"),
    (
      _VALUES,
      "sorm",
      {"values": [1, None, 0, 0]},
      "in .0, 1., got None",
    ),
    (_VALUES, "outcome", {"is_correct": None}, '"reward" is missing'),
    (_SAMPLE, "outcome", {"reward": None}, '"reward" must be a finite number'),
    (_SAMPLE, "outcome", {"response": " "}, '"response" is empty'),
  )
  def test_bad_rows(self, row, labels, changes, message):
    with self.assertRaisesRegex(ValueError, f"^log:1: .*{message}"):
      _parse(row, labels, **changes)

  def test_bad_labels(self):
    with self.assertRaisesRegex(ValueError, "outcome or sorm, got 'prm'"):
      _parse(_SAMPLE, "prm")


class LoadTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    folder = tempfile.TemporaryDirectory()
    self.addCleanup(folder.cleanup)
    self._folder = pathlib.Path(folder.name)

  def _file(self, name, rows):
    path = self._folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)

  def test_files_follow_each_other_and_bad_rows_are_named(self):
    first = self._file("a.jsonl", [_SAMPLE, {"prompt": "1="}])
    second = self._file("b.jsonl", [_VALUES])
    found, skipped, _ = solutions_lib.load([first, second], "train", "outcome")
    self.assertEqual([x.labels[-1] for x in found], [1.0, 0.0])
    self.assertLen(skipped, 1)
    self.assertRegex(skipped[0], r"a\.jsonl:2: ")

  def test_bad_files(self):
    path = self._file("a.jsonl", [_SAMPLE])
    with self.assertRaisesRegex(ValueError, 'a.jsonl: no row .*"values" is'):
      solutions_lib.load([path], "train", "sorm")
    for reward in (-0.5, 1.5):
      rows = [_SAMPLE, {**_SAMPLE, "reward": reward}]
      path = self._file("b.jsonl", rows)
      with self.assertRaisesRegex(
        ValueError, rf"b.jsonl:2: .* \[0, 1\], got {reward}"
      ):
        solutions_lib.load([path], "train", "outcome")


class PromptsTest(parameterized.TestCase):
  @parameterized.parameters((0.25, 5), (0.01, 1), (0.99, 19))
  def test_prompts_are_not_split(self, share, number):
    rows = [{**_SAMPLE, "prompt": f"{i % 20}="} for i in range(60)]
    solutions = [solution for row in rows for solution in _parse(row)]
    left, apart = solutions_lib.split_prompts(solutions, share, seed=3)
    self.assertLen(left + apart, 60)
    prompts = [{x.prompt for x in side} for side in (left, apart)]
    self.assertLen(prompts[1], number)
    self.assertEmpty(prompts[0] & prompts[1])
    self.assertLen(apart, 3 * number)
    again = solutions_lib.split_prompts(solutions, share, seed=3)
    self.assertEqual(again, (left, apart))

  def test_bad_split(self):
    with self.assertRaisesRegex(ValueError, "between 0 and 1, got 1"):
      solutions_lib.split_prompts(_parse(_SAMPLE), 1, seed=0)
    with self.assertRaisesRegex(ValueError, "2 prompts or more, got 1"):
      solutions_lib.split_prompts(_parse(_SAMPLE) * 2, 0.5, seed=0)

  def test_distinct(self):
    rows = [_SAMPLE, {**_SAMPLE, "prompt": "2+1="}, {**_SAMPLE, "reward": 0.0}]
    rows.append({**_SAMPLE, "response": "3\n#3 "})
    solutions = [solution for row in rows for solution in _parse(row)]
    self.assertEqual(
      solutions_lib.distinct(solutions), [solutions[i] for i in (0, 1, 3)]
    )


class LabelTokensTest(parameterized.TestCase):
  @parameterized.parameters(
    #                1 \n 2 \n 3 \n #  4  end
    ("tokens", [1, 1, 1, 1, 1, 1, 1, 1, 1]),
    ("step_ends", [0, 1, 0, 1, 0, 1, 0, 0, 1]),
    ("last", [0, 0, 0, 0, 0, 0, 0, 0, 1]),
  )
  def test_targets(self, targets, expected):
    solutions = _parse(_VALUES, "sorm", values=[0.5, 0.5, 0.0, 0.0])
    solutions += _parse({**_SAMPLE, "response": "7"})
    part = _labelled(solutions, targets)
    self.assertEqual(part.is_target[0].tolist(), [bool(x) for x in expected])
    np.testing.assert_array_equal(part.steps[0], [0, 0, 1, 1, 2, 2, 3, 3, 3])
    np.testing.assert_array_equal(part.labels[0], [1, 1, 1, 1, 0, 0, 0, 0, 0])
    # A shorter row: "7" and the end token.
    first = targets == "tokens"
    self.assertEqual(part.is_target[1].tolist(), [first, True] + [False] * 7)
    np.testing.assert_array_equal(part.labels[1], [1, 1] + [0] * 7)

  @parameterized.parameters(
    # Steps "1\n\n" and "2\n": the first line feed does not end the first, and
    # the end token is of the last.
    ("1\n\n2\n", False, [0, 0, 0, 1, 1, 1], [0, 0, 1, 0, 1, 1]),
    # One token ends the step and its empty line.
    ("1\n\n2", True, [0, 0, 1, 1], [0, 1, 0, 1]),
    # "3\n4" belongs to the step that it ends.
    ("13\n42", True, [0, 0, 1, 1], [0, 1, 0, 1]),
    ("3\n4\n5", True, [0, 1, 2, 2], [1, 1, 0, 1]),
    # A blank last line belongs to the step before.
    ("1\n ", False, [0, 0, 0, 0], [0, 1, 0, 1]),
    # So does an empty first one to the step after.
    ("\n1\n", False, [0, 0, 0, 0], [0, 0, 1, 1]),
  )
  def test_lines_and_tokens(self, response, joined, steps, is_end):
    part = _labelled(
      _parse({**_SAMPLE, "response": response}), "step_ends", joined=joined
    )
    np.testing.assert_array_equal(part.steps[0], steps)
    self.assertEqual(part.is_target[0].tolist(), [bool(x) for x in is_end])

  def test_cut_response(self):
    solutions = _parse(_VALUES, "sorm", values=[0.5, 0.0, 0.0, 0.0])
    part = _labelled(solutions, "last", max_response_length=3)
    np.testing.assert_array_equal(part.is_target, [[False, False, True]])
    np.testing.assert_array_equal(part.labels, [[1, 1, 0]])

  def test_a_tokenizer_without_a_line_feed(self):
    tokenizer = tokenizers.of_words([*"0123456789"], r"[0-9]")
    encode = functools.partial(
      encoding.encode, tokenizer, max_prompt_length=4, max_response_length=4
    )
    row = {**_SAMPLE, "prompt": "1", "response": "2"}
    part = solutions_lib.label_tokens(
      encode(_parse(row)), tokenizer, "step_ends"
    )
    np.testing.assert_array_equal(part.is_target, [[False, True]])
    encoded = encode(_parse(row))
    (solution,) = _parse({**row, "response": "2\n3"})
    encoded.rows[0] = solution
    with self.assertRaisesRegex(ValueError, r"lacks a way to write '\\n'"):
      solutions_lib.label_tokens(encoded, tokenizer, "step_ends")

  def test_bad_targets(self):
    with self.assertRaisesRegex(ValueError, "step_ends, last, got 'first'"):
      _labelled(_parse(_SAMPLE), "first")


class BalanceTest(parameterized.TestCase):
  @hypothesis.given(seed=st.integers(0, 2**32 - 1))
  def test_every_group_is_balanced(self, seed):
    rng = np.random.default_rng(seed)
    is_positive, groups = rng.random(50) < 0.3, rng.integers(4, size=50)
    keep = solutions_lib.balanced(is_positive, groups, seed=seed)
    for group in range(4):
      for side in (True, False):
        items = is_positive[groups == group]
        kept = keep & (groups == group) & (is_positive == side)
        self.assertEqual(kept.sum(), min(items.sum(), (~items).sum()))

  def test_solutions(self):
    solutions = []
    for i in range(10):
      row = {**_SAMPLE, "reward": float(i % 3 == 2)}
      solutions += solutions_lib.parse(row, f"log:{i}", "outcome")
    part = solutions_lib.balance(
      _labelled(solutions, "tokens"), by_step=False, seed=0
    )
    self.assertEqual([row.is_positive for row in part.rows].count(True), 3)
    self.assertLen(part.rows, 6)
    self.assertEqual(part.labels.shape, (6, 5))
    # Rows, ids and labels go together.
    for row, labels in zip(part.rows, part.labels, strict=True):
      np.testing.assert_array_equal(labels, row.labels[0])
    other = solutions_lib.balance(
      _labelled(solutions, "tokens"), by_step=False, seed=1
    )
    self.assertNotEqual(part.rows, other.rows)

  @parameterized.parameters("tokens", "step_ends", "last")
  def test_steps(self, targets):
    rng = np.random.default_rng(0)
    solutions = []
    for i in range(40):
      number = int(rng.integers(5))  # Of good steps.
      values = [0.5] * number + [0.0] * (4 - number)
      solutions += solutions_lib.parse(
        {**_VALUES, "values": values}, f"log:{i}", "sorm"
      )
    whole = _labelled(solutions, targets)
    part = solutions_lib.balance(whole, by_step=True, seed=0)
    counts = np.zeros((4, 2), int)
    place = {row.place: n for n, row in enumerate(whole.rows)}
    for n, row in enumerate(part.rows):
      self.assertTrue(part.is_target[n].any())
      before = whole.is_target[place[row.place]]
      for step in range(4):
        # A step keeps all its targets or none.
        found = part.is_target[n][part.steps[n] == step]
        if found.any():
          np.testing.assert_array_equal(
            found, before[whole.steps[place[row.place]] == step]
          )
          counts[step, int(row.labels[step])] += 1
    np.testing.assert_array_equal(counts[:, 0], counts[:, 1])
    self.assertEqual(counts[:3].sum() > 0, targets != "last")
    self.assertGreater(counts[3, 0], 0)

  def test_nothing_to_balance(self):
    part = _labelled(_parse(_SAMPLE) * 2, "tokens")
    with self.assertRaisesRegex(ValueError, "2 of 2 labels are positive"):
      solutions_lib.balance(part, by_step=False, seed=0)
    with self.assertRaisesRegex(ValueError, "4 of 4 labels are positive"):
      solutions_lib.balance(part, by_step=True, seed=0)


class AreaUnderCurveTest(parameterized.TestCase):
  @parameterized.parameters(
    ([0.1, 0.9], [False, True], 1.0),
    ([0.9, 0.1], [False, True], 0.0),
    ([3.0, 3.0, 3.0], [False, True, True], 0.5),
    # Of 2 x 3 pairs four are right and one is a tie: 4.5 / 6.
    ([0.5, 0.8, 0.5, 0.1, 0.6], [True, True, False, False, False], 0.75),
  )
  def test_hand_computed(self, scores, is_positive, expected):
    found = metrics.area_under_curve(scores, is_positive)
    self.assertAlmostEqual(found, expected, places=12)

  @hypothesis.given(seed=st.integers(0, 2**32 - 1))
  def test_matches_all_pairs(self, seed):
    rng = np.random.default_rng(seed)
    scores = np.round(rng.normal(size=30), 1)
    is_positive = rng.random(30) < 0.4
    is_positive[:2] = True, False
    pairs = [
      0.5 * (1 + np.sign(a - b))
      for a in scores[is_positive]
      for b in scores[~is_positive]
    ]
    found = metrics.area_under_curve(scores, is_positive)
    self.assertAlmostEqual(found, np.mean(pairs), places=12)

  def test_bad_input(self):
    area = metrics.area_under_curve
    for is_positive in ([True, True], [False, False]):
      with self.assertRaisesRegex(ValueError, "items of both kinds"):
        area([0.0, 1.0], is_positive)
    with self.assertRaisesRegex(ValueError, "must be finite"):
      area([0.0, np.nan], [True, False])
    with self.assertRaisesRegex(ValueError, r"\(2,\) and \(3,\)"):
      area([0.0, 1.0], [True, False, True])


if __name__ == "__main__":
  absltest.main()
