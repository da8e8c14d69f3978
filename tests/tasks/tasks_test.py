import fractions
import json
import math
import types

import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

from rljax import tasks
from rljax.tasks import arithmetic
from rljax.text import keywords


class Tensor:
  """As much of torch as a score takes."""

  def __init__(self, array):
    self.array = array

  def detach(self):
    return Tensor(self.array.astype(np.float32))

  def cpu(self):
    return self

  def float(self):
    return self

  def tolist(self):
    return self.array.tolist()


class LoadTest(parameterized.TestCase):
  def test_load(self):
    self.assertIs(tasks.load("arithmetic"), arithmetic)

  def test_unknown_task(self):
    with self.assertRaisesRegex(ValueError, "'chess'; known tasks.*arithmetic"):
      tasks.load("chess")


class OptionsTest(parameterized.TestCase):
  def test_values(self):
    found = keywords.parse(
      ["style=last", "num=12", "holdout=0.5", "whole=True", "x=a=b", "y="]
    )
    self.assertEqual(
      found,
      {
        "style": "last",
        "num": 12,
        "holdout": 0.5,
        "whole": True,
        "x": "a=b",
        "y": "",
      },
    )
    self.assertIs(type(found["num"]), int)

  @parameterized.parameters(
    (["style"], "Expected name=value, got 'style'"),
    (["=last"], "Expected name=value"),
    (["a b=1"], "Expected name=value"),
    (["a=1", "a=2"], "'a' is given twice"),
  )
  def test_bad_options(self, pairs, message):
    with self.assertRaisesRegex(ValueError, message):
      keywords.parse(pairs)


class CheckPartsTest(parameterized.TestCase):
  def test_missing_parts_are_named(self):
    tasks.check_parts(
      {"task": "sums"}, [{"is_correct": True, "x": 1}], "is_correct"
    )
    with self.assertRaisesRegex(
      ValueError, "score has the parts answer, is_valid; that of sums has x"
    ):
      tasks.check_parts({"task": "sums"}, [{"x": 1}], "x", "answer", "is_valid")


class ScoreAllTest(parameterized.TestCase):
  def test_one_by_one(self):
    scores, parts = tasks.score_all(
      arithmetic, ["3+4=", "3+4="], ["7", "8."], parse="leading_integer"
    )
    # Errors of 0 and 1.
    np.testing.assert_allclose(scores, [1, 0.95004], atol=1e-5)
    self.assertEqual(scores.dtype, np.float32)
    self.assertEqual([part["answer"] for part in parts], [7, 8])

  def test_batch(self):
    task = types.SimpleNamespace(
      score_batch=lambda prompts, responses: ([1, 2], [{}, {}])
    )
    scores, _ = tasks.score_all(task, ["a", "b"], ["c", "d"])
    np.testing.assert_array_equal(scores, [1, 2])
    with self.assertRaisesRegex(ValueError, "given 1 responses .* 2 scores"):
      tasks.score_all(task, ["a"], ["c"])

  @parameterized.parameters(
    *(math.nan, math.inf, None, "high", 1e39, -1e39, 10**400)
  )
  def test_not_finite(self, score):
    task = types.SimpleNamespace(score=lambda prompt, response: (score, {}))
    with self.assertRaisesRegex(ValueError, "finite number.* prompt '3"):
      tasks.score_all(task, ["3+4="], ["7"])

  @parameterized.named_parameters(
    ("column", lambda n: np.arange(n, dtype=np.float64)[:, None]),
    ("row", lambda n: np.arange(n)[None]),
    ("list", lambda n: [float(i) for i in range(n)]),
    ("columns_of_lists", lambda n: [[float(i)] for i in range(n)]),
    ("scalars", lambda n: [np.float32(i) for i in range(n)]),
    ("arrays", lambda n: tuple(np.array([i]) for i in range(n))),
    ("generator", lambda n: (i for i in range(n))),
    ("fractions", lambda n: [fractions.Fraction(i) for i in range(n)]),
    ("jax", jnp.arange),
    ("like_torch", lambda n: Tensor(np.arange(n)[:, None])),
  )
  def test_scores_of_many_kinds(self, make):
    for number in (1, 2, 3):
      asked = ["a"] * number
      for returned in (
        make,
        lambda n: (make(n), [{"i": i} for i in range(n)]),
        lambda n: (make(n), ({"i": i} for i in range(n))),
        lambda n: (make(n), [None] * n),
      ):
        task = types.SimpleNamespace(
          score_batch=lambda p, r, f=returned: f(len(p))
        )
        scores, parts = tasks.score_all(task, asked, asked)
        np.testing.assert_array_equal(scores, np.arange(number))
        self.assertEqual((scores.dtype, scores.ndim), (np.float32, 1))
        self.assertLen(parts, number)
        self.assertTrue(all(type(part) is dict for part in parts))

  @parameterized.parameters(
    *((x, 1.0) for x in (1, True, np.bool_(True), np.float32(1), [1.0])),
    (np.array([[1.0]]), 1.0),
    ((1.0, None), 1.0),
    ((np.array([1.0]), {}), 1.0),
  )
  def test_one_score_of_many_kinds(self, found, expected):
    task = types.SimpleNamespace(score=lambda prompt, response: found)
    scores, parts = tasks.score_all(task, ["a"], ["b"])
    self.assertEqual((scores.tolist(), parts), ([expected], [{}]))

  @parameterized.parameters(
    *(
      ([x, 0], "finite number.*prompt 'a1'") for x in (1e39, 10**400, math.nan)
    ),
    *(([x, 0], "finite number") for x in ("1.0", None, [1, 2], {}, 1j)),
    (5, "of Mine returned 5 as scores: score_batch.prompts, responses. ret"),
    ("high", "of Mine returned 'high' as scores"),
    (None, "of Mine returned None as scores"),
    ([1.0, 2.0, 3.0], "given 2 responses and returned 3 scores"),
    (([1, 2], [{}]), "2 scores and 1 parts: score_batch.*returns N scores"),
    (([1, 2], ["good", "bad"]), "of Mine are 'good', and must be a dict"),
    (([1, 2], "good"), "of Mine returned 'good' as its parts"),
    (([1, 2], [{}, {}], 3), "of Mine returned 3 values: score_batch"),
  )
  def test_what_cannot_be_meant(self, found, message):
    class Mine:
      def score_batch(self, prompts, responses):
        return found

    with self.assertRaisesRegex(ValueError, message):
      tasks.score_all(Mine(), ["a1", "a2"], ["b1", "b2"])

  def test_parts_that_files_cannot_hold(self):
    found = {
      "set": {"b", "a"},
      "bytes": b"a\xff",
      "array": np.arange(2),
      "number": np.float32(0.5),
      "object": fractions.Fraction(1, 2),
      "pair": (1, "a"),
      7: {"inner": {1}},
    }
    task = types.SimpleNamespace(score=lambda prompt, response: (1.0, found))
    _, (part,) = tasks.score_all(task, ["a"], ["b"])
    expected = {
      "set": ["a", "b"],
      "bytes": "a\ufffd",
      "array": [0, 1],
      "number": 0.5,
      "object": "1/2",
      "pair": (1, "a"),
      "7": {"inner": [1]},
    }
    self.assertEqual(part, expected)
    json.dumps(part)
    found["deep"] = found
    with self.assertRaisesRegex(ValueError, "nested too deeply"):
      tasks.score_all(task, ["a"], ["b"])

  def test_a_score_that_cannot_be_written_out(self):
    task = types.SimpleNamespace(score=lambda prompt, response: 10**5000)
    with self.assertRaisesRegex(ValueError, "thousands of digits .* '3"):
      tasks.score_all(task, ["3+4="], ["7"])

  def test_other_number_of_responses(self):
    with self.assertRaisesRegex(ValueError, "1 prompts, but 2 responses"):
      tasks.score_all(arithmetic, ["3+4="], ["7", "8"])


class CheckOptionsTest(parameterized.TestCase):
  def test_unknown_option_is_named_with_those_there_are(self):
    keywords.check(arithmetic.prompts, {"style": "last", "num": 3})
    with self.assertRaisesRegex(
      ValueError, "prompts of the task has no option 'stlye'; it has num, style"
    ):
      keywords.check(arithmetic.prompts, {"stlye": "last"})
    keywords.check(lambda p, **options: None, {"anything": 1})


class FormatTaskTest(parameterized.TestCase):
  def test_scores_the_form_alone(self):
    task = tasks.load("arithmetic_format")
    self.assertEqual(task.score("1+1=", "7")[0], 1.0)
    self.assertEqual(task.score("1+1=", "+")[0], 0.0)
    self.assertEqual(
      task.prompts("test", 0, num=3), arithmetic.prompts("test", 0, num=3)
    )
