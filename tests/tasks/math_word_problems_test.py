"""Tests of the word problems: what is asked, and what an answer is worth."""

import collections
import importlib.util
import json
import pathlib
import tempfile
import time
from unittest import mock

import hypothesis
import hypothesis.strategies as st
import pytest
from absl.testing import parameterized

from rljax import tasks
from rljax.tasks import math_word_problems, sandbox
from rljax.tasks.answers import (
  comparison,
  expressions,
  extraction,
  normalisation,
  numbers,
)
from rljax.text import files, keywords
from tests import conftest

QUESTION = "How many clips has Natalia?"
SOLUTION = (
  "She sold 48/2 = <<48/2=24>>24 clips in May.\n"
  "That is $48+24 = $<<48+24=72>>72 altogether.\n"
  "#### 72"
)

# (truth, response, answer, rule, verdict); right if the answer is the truth.
ANSWERS = (
  # Behind the last ####, whatever stands elsewhere.
  ("42", "#### 42", "42", "hashes", "exact"),
  ("42", "41 or so\n####42\nThe answer is 43", "42", "hashes", "exact"),
  ("43", "#### 42\n#### 43", "43", "hashes", "exact"),
  ("42", "#### 42\n#### 43", "43", "hashes", "exact"),
  ("42", "\\boxed{41}\n#### $42.00 in all.", "42", "hashes", "exact"),
  ("42", "#### so she has 42 clips", "42", "hashes", "exact"),
  ("42", "#### 6*7 = 42", "42", "hashes", "exact"),
  # Nothing, or not enough.
  ("42", "", None, None, "none"),
  ("42", " \n ", None, None, "none"),
  ("42", "#### ", None, "hashes", "none"),
  ("42", "It is 42.\n#### ", None, "hashes", "none"),
  ("42", "\\boxed{42", None, "boxed", "none"),
  ("42", "\\boxed 42", None, "boxed", "none"),
  ("42", "#### forty-two", "42", "hashes", "exact"),
  # Hedging.
  ("44", "42 or 43 or 44", None, None, "none"),
  ("44", "#### 42 or 43 or 44", None, "hashes", "none"),
  ("44", "#### 42, 43, 44", None, "hashes", "none"),
  ("44", "#### 44 or forty-five", None, "hashes", "none"),
  ("44", "The answer is 42, 43 or 44.", None, "answer_is", "none"),
  ("44", "\\boxed{43 \\text{ or } 44}", None, "boxed", "none"),
  ("44", "either 42 clips or maybe 44", None, None, "none"),
  ("44", "42, 43, 44", None, None, "none"),
  ("44", "42 and 44", None, None, "none"),
  ("44", "A or B or C", None, None, "none"),
  # A list with blanks is no mixed number, which would be 85.
  ("85", "#### 42 43", None, "hashes", "none"),
  ("85", "42 43", None, None, "none"),
  ("85", "\\boxed{42 43 \\text{ clips}}", None, "boxed", "none"),
  # Boxes nest; the last one counts.
  ("1/2", "$\\boxed{\\frac{1}{2}}$", "1/2", "boxed", "exact"),
  ("42", "\\boxed{41} no, \\boxed{ {42} }.", "42", "boxed", "exact"),
  ("42", "\\boxed{x = 42}", "42", "boxed", "exact"),
  ("42", "\\boxed{42\\text{ cm}^2}", "42", "boxed", "exact"),
  ("42", "The final answer is $\\boxed{42}$.", "42", "boxed", "exact"),
  # Words.
  ("42", "The answer is **42**. There are 7 more.", "42", "answer_is", "exact"),
  ("42", "**Answer:** 6*7 = $42", "42", "answer_is", "exact"),
  ("42", "THE ANSWER IS:\n\n42 clips", "42", "answer_is", "exact"),
  ("3.5", "The answer is 3.50 (in dollars).", "7/2", "answer_is", "exact"),
  ("42", "The answer is easy. 6 times 7 makes 42", "42", "number", "exact"),
  # The last number: one hidden in the middle is not it.
  ("42", "so she has 42 clips.", "42", "number", "exact"),
  ("42", "I say 42, and there are 7 days.", "7", "number", "exact"),
  ("42", "Step 2: 42", "42", "number", "exact"),
  ("42", "6 * 7=42", "42", "number", "exact"),
  ("3", "10 - 3", None, None, "none"),
  ("2", "2 \\pi", None, None, "none"),
  ("2", "2 pi", None, None, "none"),
  ("3", "x<=3", None, None, "none"),
  ("5", "at 5:30", None, None, "none"),
  ("42", "41-42", None, None, "none"),
  ("42", "42/43/44", None, None, "none"),
  # Echoes, and talking on.
  ("7", QUESTION + " 7?", "7", "number", "exact"),
  ("48", f"Question: {QUESTION}\nAnswer:\n", None, None, "none"),
  (
    "42",
    f"Question: {QUESTION}\nAnswer:\n#### 42\n\nQuestion: 7?\nAnswer:\n#### 7",
    "42",
    "hashes",
    "exact",
  ),
  ("42", "Question: 42?", None, None, "none"),
  # A model that asks itself the same question again has answered before.
  (
    "42",
    f"#### 42\n\nQuestion: {QUESTION}\nAnswer:\n",
    "42",
    "hashes",
    "exact",
  ),
  (
    "42",
    f"#### 41\n\nQuestion: {QUESTION}\nAnswer:\n#### 42",
    "41",
    "hashes",
    "exact",
  ),
  ("42", f"**Question:** {QUESTION}\n#### 42", "42", "hashes", "exact"),
  ("42", f"41 {QUESTION} 42", "41", "number", "exact"),
  # Blanks of LaTeX are blanks.
  *(
    ("42", f"\\boxed{{40{blank}2}}", None, "boxed", "none")
    for blank in (
      *("\\quad ", " \\qquad ", " \\\\ ", "\\: ", "\\;", "\\,", "\\!", "\\>"),
      *("\\enspace ", "~", "\\ ", "\\hspace{1em}", "\\hspace*{-1em} "),
    )
  ),
  ("42", "\\boxed{42\\,\\text{cm}}", "42", "boxed", "exact"),
  ("10000", "\\boxed{10\\,000}", "10000", "boxed", "exact"),
  # Numbers that words change.
  *(
    (truth, text, None, None, "none")
    for truth, text in (
      ("42", "10 minus 42"),
      ("42", "It is not 42."),
      ("42", "It isn't 42."),
      ("42", "zero point 42"),
      ("42", "half of 42"),
      ("42", "42 five"),
      ("42", "42 squared"),
      ("42", "42 dozen"),
      ("4200", "42 hundred thousand"),
    )
  ),
  *(
    ("42", text, None, "answer_is", "none")
    for text in (
      "The answer is x = 43 or x = 42",
      "The answer is not 42.",
    )
  ),
  # Words may make it negative.
  ("42", "minus 42", "-42", "number", "exact"),
  ("42", "it is negative $42.", "-42", "number", "exact"),
  ("42", "The answer is minus 42.", "-42", "answer_is", "exact"),
  *(
    (truth, f"#### {text}", None, "hashes", "none")
    for truth, text in (
      ("42", "x=41, y=42"),
      ("42", "x = 41 and x = 42"),
      ("42", "zero point 42"),
      ("42", "42 point five"),
      ("42", "42 five"),
      ("42", "42 squared"),
      ("42", "42 thousandths"),
      ("42", "half of 42"),
      ("42", "42 millions"),
      ("42", "42 dozen"),
      ("4200", "42 hundred thousand"),
      ("4200000", "42 hundred thousand"),
      # Not worked out.
      ("72", "48+24"),
      ("72", "$48 + $24"),
      ("72", "x = 96 - 24"),
      ("72", "48+24\\text{ clips}"),
      ("1", "\\frac{1}{2} + \\frac{1}{2}"),
      ("72", "6*7+30"),
    )
  ),
  ("42", "half of 84 is 42", "42", "number", "exact"),
  ("42", "#### half of 84 = 42", "42", "hashes", "exact"),
  ("42", "#### a total of 42 square feet", "42", "hashes", "exact"),
  # Headings.
  ("42", "#### Step 3: done\n\\boxed{42}", "42", "boxed", "exact"),
  ("42", "#### **Step 3**\n\\boxed{42}", "42", "boxed", "exact"),
  ("42", "#### 3. Add up\nThe answer is 42.", "42", "answer_is", "exact"),
  ("42", "#### Final 2 steps\n\\boxed{42}", "42", "boxed", "exact"),
  ("42", "#### Conclusion\nThe answer is 42.", "42", "answer_is", "exact"),
  ("42", "#### 42\n#### Step 3: done", "42", "hashes", "exact"),
  ("3", "#### Step 3: done", None, None, "none"),
)
# (text, number).
NUMBERS = (
  ("1,560", "1560"),
  ("1560.0", "1560"),
  ("1{,}560", "1560"),
  ("1,\\!560", "1560"),
  ("12,345,678.50", "24691357/2"),
  ("1,56", None),
  ("1,5600", None),
  ("1 560", "1560"),
  ("156.", "156"),
  ("156.00", "156"),
  ("007", "7"),
  ("-0", "0"),
  (".5", "1/2"),
  ("0.5", "1/2"),
  ("1/2", "1/2"),
  ("2/4", "1/2"),
  ("-1/2", "-1/2"),
  ("\\frac{1}{2}", "1/2"),
  ("-\\dfrac{1}{2}", "-1/2"),
  ("\\frac{-1}{2}", "-1/2"),
  ("\\frac12", "1/2"),
  ("\\frac1{10}", "1/10"),
  ("\\frac{10}3", "10/3"),
  ("\\frac{1}23", None),
  ("1 1/2", "3/2"),
  ("-1 1/2", "-3/2"),
  ("1\\frac{1}{2}", "3/2"),
  ("0.333333", "333333/1000000"),
  ("50%", "50"),
  ("50\\%", "50"),
  ("50 percent", "50"),
  ("$50", "50"),
  ("-$50", "-50"),
  ("$-50", "-50"),
  ("\\$50", "50"),
  ("$50$", "50"),
  ("\\(50\\)", "50"),
  ("50€", "50"),
  ("**50**", "50"),
  ("(50)", "50"),
  ("\\text{50}", "50"),
  ("50 clips", "50"),
  ("50 km/h", "50"),
  ("50cm", "50"),
  ("50 cm^2", "50"),
  ("50^\\circ", "50"),
  ("0.\\overline{6}", "2/3"),
  ("-1.2\\overline{34}", "-611/495"),
  ("0.\\overline{}", None),
  ("90°", "90"),
  ("50th", "50"),
  ("5!", "5"),
  ("3 million dollars", "3000000"),
  ("3x", None),
  ("3i", None),
  ("3 x", None),
  ("3 pi", None),
  ("3\\pi", None),
  ("3^2", None),
  ("-3", "-3"),
  ("−3", "-3"),
  ("- 3", "-3"),
  ("--3", None),
  ("+3", "3"),
  ("1e3", "1000"),
  ("1.5E-1", "3/20"),
  ("1e999", None),
  ("٣", None),
  ("³", None),
  ("nan", None),
  ("inf", None),
  ("1/0", None),
  ("0/0", None),
  ("\\frac{1}{0}", None),
  ("1.2.3", None),
  ("1/2/3", None),
  ("", None),
  (".", None),
  ("/", None),
  ("9" * 100, "9" * 100),
  ("9" * 101, None),
  ("9" * 10_000, None),
)
# (truth, expression, whether they are equal): one for math-verify.
EXPRESSIONS = (
  ("42", "6*7", True),
  ("42", "6 \\times 7", True),
  ("42", "6(7)", True),
  ("13", "6(7)", False),
  ("2", "\\sqrt{4}", True),
  ("1/2", "\\frac{\\sqrt{4}}{4}", True),
  ("-3", "-\\frac{\\sqrt{9}}{1}", True),
  ("3", "\\pi", False),
  ("42", "\\{42, 43\\}", False),
  ("42", "42 \\pm 1", False),
  ("42", "7^{12000}", False),
)


def remember(truth, results=None):
  """A prompt that has this answer."""
  prompt = f"Is it {truth}?"
  math_word_problems._PROBLEMS[prompt] = math_word_problems._Problem(
    truth, QUESTION, "Question:", results
  )
  return prompt


def require_math_verify():
  pytest.importorskip("math_verify")


class ScoreTest(parameterized.TestCase):
  @parameterized.parameters(*ANSWERS)
  def test_answers(self, truth, response, answer, rule, verdict):
    truth = numbers.number(truth)
    with mock.patch.object(comparison, "verify_all") as verify:
      score, parts = math_word_problems.score(remember(truth), response)
    verify.assert_not_called()
    self.assertEqual(score, float(answer == truth))
    self.assertEqual(
      parts,
      {
        "is_correct": answer == truth,
        "answer": answer,
        "truth": truth,
        "format": rule,
        "verdict": verdict,
        "has_answer": answer is not None,
        "is_unverified": False,
      },
    )

  @parameterized.parameters(*NUMBERS)
  def test_numbers(self, text, expected):
    self.assertEqual(numbers.number(text), expected)

  def test_equal_numbers(self):
    for truth, response, expected in (
      ("1560", "#### 1,560", 1.0),
      ("156", "#### 156.0", 1.0),
      ("1/2", "#### 0.5", 1.0),
      ("50", "#### 50%", 1.0),
      ("1/2", "#### 50%", 0.0),
      ("1/3", "#### 0.333333", 0.0),
      ("156", "#### 1560", 0.0),
      ("1560", "#### 156", 0.0),
    ):
      self.assertEqual(
        math_word_problems.score(remember(truth), response)[0], expected
      )

  @parameterized.parameters(
    ("#### 42", 1.0),
    ("\\boxed{42}", 0.0),
    ("The answer is 42.", 0.0),
    ("42", 0.0),
  )
  def test_strict(self, response, expected):
    score, parts = math_word_problems.score(
      remember("42"), response, extract="strict"
    )
    self.assertEqual(score, expected)
    self.assertEqual(parts["has_answer"], expected == 1)

  @hypothesis.given(
    st.fractions(max_denominator=10**6),
    st.sampled_from(["{}", "${}", "**{}**", "{} clips", " {}. ", "\\({}\\)"]),
  )
  def test_reads_what_it_writes(self, value, form):
    text = numbers.number(form.format(value))
    self.assertEqual(text, str(value))
    self.assertEqual(numbers.number(text), text)

  @hypothesis.given(
    st.text(alphabet="0123456789.,/-$%#\\{}boxed =\n", max_size=60)
  )
  def test_any_text(self, text):
    found = extraction.extract(text, question=QUESTION, turn="Question:")
    _, verdict = comparison.compare("42", found.text, found.rule or "")
    self.assertIn(verdict, ("exact", "none", "unsettled"))

  @parameterized.parameters(
    "x" * 1_000_000,
    "7" * 1_000_000,
    "7 " * 500_000,
    "=7" * 500_000,
    "= " * 500_000,
    "=" + " " * 1_000_000,
    "\n" * 1_000_000,
    "\\boxed{" * 150_000,
    "\\boxed" + "{" * 1_000_000,
    "####" * 250_000,
    "answer is " * 100_000,
    "\\frac{1}{" * 100_000,
    "#### " + "9" * 10_000,
    "#### 1e" + "9" * 10_000,
    "1," * 500_000,
    f"Question: {QUESTION}" * 20_000,
  )
  def test_long_texts_take_no_time(self, response):
    prompt = remember("43", results=("1", "2"))
    start = time.monotonic()
    score, parts = math_word_problems.score(prompt, response)
    self.assertLess(time.monotonic() - start, 1.0)
    self.assertEqual(score, 0.0)
    self.assertLen(parts["step_matches"], response.count("\n") + 1)

  def test_long_answers_are_counted(self):
    for response in ("#### " + "9" * 1000, "\\boxed{" + "1+" * 300 + "1}"):
      _, parts = math_word_problems.score(remember("42"), response)
      self.assertEqual(parts["verdict"], "too_long")
      self.assertTrue(parts["is_unverified"])
      self.assertIsNone(parts["answer"])

  def test_late_answer_of_a_long_text(self):
    response = "Well, 41. " * 100_000 + "#### 42"
    self.assertEqual(math_word_problems.score(remember("42"), response)[0], 1.0)

  def test_never_drawn(self):
    with self.assertRaisesRegex(ValueError, "has drawn .* got 'Nobody asked"):
      math_word_problems.score("Nobody asked this.", "42")

  def test_unknown_rule(self):
    with self.assertRaisesRegex(ValueError, "extract must be .* got \"?'loose"):
      math_word_problems.score(remember("42"), "42", extract="loose")


class StepMatchesTest(parameterized.TestCase):
  @parameterized.parameters(
    # Each result of the reference matches once.
    ("7+8=15\n15+13=28\n15+27=42\n6*7=42\n#### 42", [1, 0, 1, 0, 0]),
    ("1+14 = <<1+14=15>>15 clips, 3*9 = $27.00\n= 27", [1, 0]),
    ("15\n\n#### 42", [0, 0, 0]),
    ("", [0]),
    ("= 1,5\n=\\$15\n=  42.", [0, 1, 1]),
    ("=15" + " " * 2**14 + "\n=27", [1, 0]),
  )
  def test_hand_computed(self, response, expected):
    self.assertEqual(
      math_word_problems.step_matches(["15", "27", "42"], response),
      list(map(bool, expected)),
    )


class MathVerifyTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    require_math_verify()
    comparison._VERDICTS.clear()

  def test_expressions(self):
    truths, texts, expected = zip(*EXPRESSIONS, strict=True)
    scores, parts = math_word_problems.score_batch(
      [remember(truth) for truth in truths],
      [f"\\boxed{{{text}}}" for text in texts],
    )
    self.assertEqual(scores, [float(is_equal) for is_equal in expected])
    for truth, text, part in zip(truths, texts, parts, strict=True):
      self.assertEqual(part["verdict"], "verified", text)
      # What is equal votes together.
      self.assertEqual(part["answer"], truth if part["is_correct"] else text)

  @parameterized.parameters("#### 1/0", "\\boxed{\\frac{1}{0}}", "#### x = (")
  def test_no_answer(self, response):
    _, parts = math_word_problems.score(remember("1"), response)
    self.assertEqual(parts["verdict"], "none")
    self.assertIsNone(parts["answer"])
    self.assertFalse(parts["has_answer"])

  def test_truths_that_are_no_numbers(self):
    for truth, text, verdict in (
      ("\\sqrt{2}", "\\sqrt{2}", "exact"),
      ("\\sqrt{2}", "\\frac{2}{\\sqrt{2}}", "verified"),
      ("x+1", "1 + x", "verified"),
      ("x+1", "x + 4 - 3", "verified"),
      ("x=5", "5", "verified"),
      ("2^{10}", "1024", "verified"),
      ("2^{10}", "2^{10} = 1024.0", "verified"),
      ("Evelyn", "\\text{Evelyn}", "exact"),
    ):
      score, parts = math_word_problems.score(
        remember(truth), f"\\boxed{{{text}}}"
      )
      self.assertEqual((score, parts["verdict"]), (1.0, verdict))
      self.assertEqual(parts["answer"], truth)

  def test_truths_that_are_no_numbers_wrong(self):
    for truth, text, verdict in (
      ("x=5", "y = 5", "verified"),
      ("x=5", "6", "verified"),
      ("2^{10}", "1025", "verified"),
      # Letters commute.
      ("Evelyn", "nylevE", "exact"),
      ("BAC", "CAB", "exact"),
      ("BAC", "5", "exact"),
    ):
      score, parts = math_word_problems.score(
        remember(truth), f"\\boxed{{{text}}}"
      )
      self.assertEqual((score, parts["verdict"]), (0.0, verdict))
      self.assertEqual(parts["answer"], text)

  def test_memory_that_math_verify_makes_do_without(self):
    with sandbox.Pool(
      expressions.verify,
      setup=expressions.warm_up,
      timeout=10.0,
      max_memory_bytes=8 * 2**20,
    ) as pool:
      outcomes = pool.map(
        [("42", text) for text in ("6*7", "2^{3\\cdot 10^8}", "2*21")]
      )
    self.assertEqual([o.value for o in outcomes], [True, None, True])
    self.assertEqual([o.failure for o in outcomes], [None, "memory", None])

  def test_duplicates_are_asked_once(self):
    pool = mock.Mock(wraps=comparison.pool())
    with mock.patch.object(comparison, "pool", return_value=pool):
      scores, _ = tasks.score_all(
        math_word_problems,
        [remember("42"), remember("42"), remember("43"), remember("42")],
        ["#### 2*21", "\\boxed{2*21}", "#### 2*21", "#### 42"],
      )
      self.assertEqual(scores.tolist(), [1, 1, 0, 1])
      math_word_problems.score(remember("42"), "#### 2*21")
    pool.map.assert_called_once_with([("42", "2*21"), ("43", "2*21")])

  def test_nothing_hangs(self):
    responses = (
      "#### 9^{9^{9^{9}}}",
      "#### " + "(" * 80 + "6*7" + ")" * 80,
      "#### 42*1",
    )
    start = time.monotonic()
    with self.assertLogs(level="WARNING") as logs:
      scores, parts = math_word_problems.score_batch(
        [remember("42")] * 3, responses
      )
    self.assertLess(time.monotonic() - start, 60)
    self.assertEqual(scores, [0, 0, 1])
    self.assertEqual(parts[0]["verdict"], "timeout")
    self.assertTrue(parts[0]["is_unverified"])
    self.assertFalse(parts[2]["is_unverified"])
    self.assertRegex(logs.output[0], "[12] of 3 answers could not be verified")
    # It is not tried again.
    start = time.monotonic()
    math_word_problems.score(remember("42"), responses[0])
    self.assertLess(time.monotonic() - start, 1)

  @parameterized.parameters("memory", "died", "error: ValueError: no")
  def test_failures(self, failure):
    pool = mock.Mock()
    pool.map.return_value = [mock.Mock(failure=failure, value=None)]
    with mock.patch.object(comparison, "pool", return_value=pool):
      _, parts = math_word_problems.score(remember("42"), "#### 2*21")
    self.assertEqual(parts["verdict"], failure.split(":")[0])
    self.assertTrue(parts["is_unverified"])


def gsm8k_rows(num, first=0):
  return [
    {
      "question": f"What is {i}+1?",
      "answer": f"It is {i}+1 = <<{i}+1={i + 1}>>{i + 1}.\n#### {i + 1:,}",
    }
    for i in range(first, first + num)
  ]


class DataTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    require_math_verify()  # `prompts` does.
    folder = self.enter_context(tempfile.TemporaryDirectory())
    self.folder = pathlib.Path(folder)
    files.write_jsonl(self.folder / "gsm8k_train.jsonl", gsm8k_rows(40))
    files.write_jsonl(self.folder / "gsm8k_test.jsonl", gsm8k_rows(10, 990))
    svamp = [
      {"Body": f"{i} dogs. ", "Question": "How many? ", "Answer": float(i)}
      for i in range(50)
    ]
    (self.folder / "svamp.json").write_text(json.dumps(svamp))
    math = [
      {"problem": "P", "solution": "So $\\boxed{\\frac{1}{2}}$.", "answer": ""},
      {"problem": "Q", "solution": "So $\\boxed{\\sqrt{2}}$."},
    ]
    math[0].pop("answer")
    files.write_jsonl(self.folder / "math_test_short500.jsonl", math)

  def _prompts(self, split="train", seed=0, **options):
    options = {"data": str(self.folder), **options}
    return math_word_problems.prompts(split, seed, **options)

  def test_splits_of_gsm8k(self):
    splits = {name: self._prompts(name) for name in math_word_problems.SPLITS}
    self.assertEqual(
      {name: len(texts) for name, texts in splits.items()},
      {"train": 36, "validation": 4, "test": 10},
    )
    questions = {f"Question: What is {i}+1?\nAnswer:\n" for i in range(40)}
    self.assertEqual({*splits["train"], *splits["validation"]}, questions)

  def test_a_question_that_stands_twice(self):
    path = self.folder / "gsm8k_train.jsonl"
    whole = self._prompts("train") + self._prompts("validation")
    path.write_text(path.read_text() * 2)
    math_word_problems._rows.cache_clear()
    with self.assertLogs("absl", "WARNING") as logs:
      again = self._prompts("train"), self._prompts("validation")
    self.assertRegex(logs.output[0], "questions stand there already")
    self.assertEqual(again[0] + again[1], whole)
    self.assertFalse(set(again[0]) & set(again[1]))

  def test_splits_of_svamp(self):
    splits = [
      self._prompts(name, dataset="svamp") for name in ("train", "test")
    ] + [self._prompts("validation", dataset="svamp", seed=9)]
    self.assertEqual(list(map(len, splits)), [32, 15, 3])
    self.assertLen({text for texts in splits for text in texts}, 50)
    prompt = "Question: 7 dogs. How many?\nAnswer:\n"
    self.assertEqual(math_word_problems.score(prompt, "7 dogs")[0], 1.0)
    _, parts = math_word_problems.score(prompt, "8")
    self.assertEqual(parts["truth"], "7")
    self.assertNotIn("step_matches", parts)

  def test_math(self):
    prompts = self._prompts("test", dataset="math", template="{question}")
    self.assertCountEqual(prompts, ["P", "Q"])
    self.assertEqual(math_word_problems.score("P", "0.5")[1]["truth"], "1/2")
    self.assertEqual(
      math_word_problems.score("Q", "\\boxed{\\sqrt{2}}")[0], 1.0
    )

  def test_order(self):
    first = self._prompts(seed=1)
    self.assertEqual(first, self._prompts(seed=1))
    self.assertEqual(first[:5], self._prompts(seed=1, num=5))
    self.assertNotEqual(first, self._prompts(seed=2))
    self.assertCountEqual(first, self._prompts(seed=2))
    self.assertEqual(self._prompts(num=0), [])

  def test_supervised(self):
    load = lambda **options: math_word_problems.supervised(
      "train", 3, num=7, data=str(self.folder), **options
    )
    dropped, kept = load(), load(notes="keep")
    self.assertEqual(
      [prompt for prompt, _ in dropped], self._prompts(seed=3)[:7]
    )
    for (prompt, without), (_, noted) in zip(dropped, kept, strict=True):
      n = int(prompt.split()[3].split("+")[0])
      self.assertEqual(without, f"It is {n}+1 = {n + 1}.\n#### {n + 1}")
      self.assertEqual(
        noted, f"It is {n}+1 = <<{n}+1={n + 1}>>{n + 1}.\n#### {n + 1}"
      )
      for text in (without, noted):
        score, parts = math_word_problems.score(prompt, text)
        self.assertEqual(score, 1.0)
        self.assertEqual(parts["step_matches"], [True, False])

  def test_shots(self):
    (prompt,) = self._prompts("test", num=1, shots=2)
    *shots, asked = prompt.split("\n\n")
    self.assertLen(shots, 2)
    self.assertRegex(
      shots[0],
      r"^Question: What is (\d+)\+1\?\nAnswer:\nIt is \1\+1 = \d+\.\n#### \d+$",
    )
    self.assertRegex(asked, r"^Question: What is 99\d\+1\?\nAnswer:\n$")
    self.assertIn("<<", self._prompts("test", num=1, shots=2, notes="keep")[0])
    # No prompt shows the answer to what it asks.
    for prompt in self._prompts("train", shots=3):
      *shots, asked = prompt.split("\n\n")
      self.assertLen(shots, 3)
      for shot in shots:
        self.assertNotStartsWith(shot, asked)
    # Other data sets are shown the same.
    (prompt,) = self._prompts("test", num=1, shots=1, dataset="svamp")
    self.assertRegex(prompt, r"(?s)What is .*####.*dogs. How many\?\nAnswer")

  def test_template(self):
    (prompt,) = self._prompts(num=1, template="Q: {question}\\nA {x}:")
    self.assertRegex(prompt, r"^Q: What is \d+\+1\?\nA {x}:$")
    _, parts = math_word_problems.score(prompt, "42\nQ: What is 6?\nA: 7")
    self.assertEqual(parts["answer"], "42")

  def test_names_of_data(self):
    name = str(self.folder / "gsm8k_{split}.jsonl")
    self.assertEqual(self._prompts(), self._prompts(data=name))
    name = str(self.folder / "svamp.json")
    self.assertLen(self._prompts("test", dataset="svamp", data=name), 15)
    with mock.patch.object(
      math_word_problems.files, "load_rows", return_value=gsm8k_rows(20)
    ) as load:
      self.assertLen(self._prompts(data="tfds:gsm8k"), 18)
    load.assert_called_once_with(
      "tfds:gsm8k", "train", required=("question", "answer")
    )

  def test_two_answers_to_one_prompt(self):
    rows = gsm8k_rows(20, 500)
    rows[0]["answer"] = "#### 7"
    rows[1] |= {"question": rows[0]["question"], "answer": "#### 8"}
    path = self.folder / "test.jsonl"
    files.write_jsonl(path, rows)
    with self.assertRaisesRegex(ValueError, "has two answers: [78] and [78]"):
      self._prompts("test", data=str(path))

  @parameterized.parameters(
    ({"split": "dev"}, "splits train, validation, test, got 'dev'"),
    ({"dataset": "aqua"}, "one of gsm8k, svamp, math, got 'aqua'"),
    ({"dataset": "math"}, "evaluation only: .* got 'train'"),
    ({"dataset": "math", "split": "validation"}, "evaluation only"),
    ({"data": ""}, "data is missing: give the folder with gsm8k_train.jsonl"),
    ({"data": "/nowhere"}, "/nowhere: no such file or folder"),
    ({"num": 37}, "train split of gsm8k has 36 prompts, but 37 were asked for"),
    ({"num": -1}, "must be >= 0"),
    ({"shots": 36}, "rows of gsm8k, but there are 36"),
    ({"template": "Q"}, "template needs \"{question}\" once, got 'Q'"),
    ({"notes": "hide"}, "notes must be .* got 'hide'"),
  )
  def test_bad_options(self, options, message):
    with self.assertRaisesRegex(ValueError, message):
      self._prompts(**options)

  def test_bad_files(self):
    path = self.folder / "bad"
    path.mkdir()
    with self.assertRaisesRegex(
      ValueError, "no file of gsm8k .looked for gsm8"
    ):
      self._prompts(data=str(path))
    for row, message in (
      ({"question": "Q?", "answer": "72"}, 'row 1: expected "#### <number>"'),
      ({"question": "Q?", "answer": "#### x"}, "row 1: expected .* '#### x'"),
      ({"question": 1, "answer": "#### 1"}, "row 1: 'int' object has no"),
      ({"question": "Q?"}, '"answer" is missing'),
    ):
      files.write_jsonl(path / "gsm8k_train.jsonl", [row])
      with self.assertRaisesRegex(ValueError, message):
        self._prompts(data=str(path))

  @parameterized.parameters("svamp", "math")
  def test_nothing_to_learn_from(self, dataset):
    with self.assertRaisesRegex(ValueError, f'dataset="{dataset}" has nothing'):
      math_word_problems.supervised(
        "test", 0, dataset=dataset, data=str(self.folder)
      )

  def test_without_math_verify(self):
    with (
      mock.patch.object(importlib.util, "find_spec", return_value=None),
      self.assertRaisesRegex(ValueError, "pip install math-verify"),
    ):
      self._prompts()

  def test_known_as_a_task(self):
    task = tasks.load("math_word_problems")
    self.assertIs(task, math_word_problems)
    keywords.check(task.prompts, {"num": 3, "dataset": "svamp"})
    keywords.check(task.supervised, {"num": 3, "shots": 2})
    keywords.check(task.score, {"extract": "strict"})


class RealDataTest(parameterized.TestCase):
  """Every reference of the published files is right."""

  def setUp(self):
    super().setUp()
    require_math_verify()
    self.folder = str(conftest.shared("data/reasoning"))

  def test_gsm8k(self):
    num_rows, num_matched, num_notes = 0, 0, 0
    for split, num in (("train", 6726), ("validation", 747), ("test", 1319)):
      for notes in ("keep", "drop"):
        pairs = math_word_problems.supervised(
          split, 0, data=self.folder, notes=notes
        )
        self.assertLen({prompt for prompt, _ in pairs}, num)
        scores, parts = math_word_problems.score_batch(
          *zip(*pairs, strict=True), extract="strict"
        )
        self.assertEqual(sum(scores), num)
        self.assertEqual({part["verdict"] for part in parts}, {"exact"})
        if notes == "keep":
          num_rows += num
          num_notes += sum(text.count("<<") for _, text in pairs)
          num_matched += sum(sum(part["step_matches"]) for part in parts)
        else:
          self.assertNotIn("<<", "".join(text for _, text in pairs))
    self.assertEqual(num_rows, 8792)
    # Lines with several notes match once.
    self.assertBetween(num_matched / num_notes, 0.95, 1.0)

  def test_svamp(self):
    for split, num in (("train", 630), ("validation", 70), ("test", 300)):
      prompts = math_word_problems.prompts(
        split, 0, dataset="svamp", data=self.folder
      )
      self.assertLen(prompts, num)
      truths = [math_word_problems._PROBLEMS[text].truth for text in prompts]
      for form in ("#### {}", "So it is {}.0.", "\\boxed{{{}}}"):
        scores, _ = math_word_problems.score_batch(
          prompts, [form.format(truth) for truth in truths]
        )
        self.assertEqual(sum(scores), num)

  def test_math(self):
    prompts = math_word_problems.prompts(
      "test", 0, dataset="math", data=self.folder
    )
    self.assertLen(prompts, 500)
    solutions = {
      row["problem"].strip(): row["solution"]
      for row in files.load_rows(
        "math_test_short500.jsonl", "test", data_dir=self.folder
      )
    }
    scores, parts = math_word_problems.score_batch(
      prompts,
      [
        solutions[math_word_problems._PROBLEMS[prompt].question]
        for prompt in prompts
      ],
    )
    self.assertEqual(sum(scores), 500)
    counts = collections.Counter(part["verdict"] for part in parts)
    self.assertEqual(counts, {"exact": 500})
    # math-verify says the same of what the authors wrote.
    pairs = []
    for prompt in prompts[:60]:
      problem = math_word_problems._PROBLEMS[prompt]
      _, _, rest = solutions[problem.question].rpartition("\\boxed")
      text = normalisation.normalise(extraction.braced(rest))
      pairs.append((problem.truth, text))
    outcomes = comparison.pool().map(pairs)
    self.assertEqual({outcome.value for outcome in outcomes}, {True})
