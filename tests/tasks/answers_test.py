"""Tests of how answers are found, read and compared."""

import json
import pathlib
import signal
import time
from unittest import mock

import hypothesis
import hypothesis.strategies as st
import pytest
from absl.testing import parameterized

from rljax import tasks
from rljax.tasks import math_word_problems
from rljax.tasks.answers import (
  clauses,
  comparison,
  expressions,
  extraction,
  normalisation,
  numbers,
  surroundings,
  words,
)
from tests import conftest
from tests.tasks import answer_rows

# (response, text, rule): what is read of a response that is asked for a number.
EXTRACTS = (
  ("so\n#### 42", "42", "hashes"),
  ("#### Final Answer\n\n\\boxed{42}", "42", "boxed"),
  ("#### Final Answer:\n42", "42", "number"),
  ("#### 42 ####", "42", "hashes"),
  ("#### 42\n####", "42", "hashes"),
  ("#### ", None, "hashes"),
  ("#### The answer is 42", "42", "answer_is"),
  ("#### 41 or\n#### 42", None, "hashes"),
  ("<answer> 42 </answer>", "42", "tag"),
  ("<answer>\\boxed{42}</answer>", "42", "tag"),
  ("<answer>41</answer> or <answer>42</answer>", None, "tag"),
  ("<answer>42", "42", "tag"),
  ("\\boxed{\\boxed{42}}", "42", "boxed"),
  ("\\fbox{42}", "42", "boxed"),
  ("\\boxed{41} or \\boxed{42}", None, "boxed"),
  ("\\boxed{41}. Twice that is \\boxed{82}", "82", "boxed"),
  ("It is not \\boxed{42}.", None, "boxed"),
  ("\\boxed{42} is wrong.", None, "boxed"),
  ("-\\boxed{42}", None, "boxed"),
  ("- \\boxed{42}", "42", "boxed"),
  ("The answer is 42. No 43.", "42. No 43.", "answer_is"),
  ("I doubt that the answer is 42.", None, "answer_is"),
  ("The answer is\n$$\n42\n$$", "42", "answer_is"),
  ("答案：42", "42", "answer_is"),
  ("It is 42 clips.", "It is 42 clips", "number"),
  ("4 or\n5", None, None),
  ("1\n2\n3", None, None),
  ("I do not know. 42", None, None),
  ("<think>41</think>42", "42", "number"),
  ("<think>42</think>", None, None),
  ("#### 42</s>43", "42", "hashes"),
)
# (gold, what others are compared to).
GOLDS = (
  ("1,000", "1000"),
  ("\\$18", "18"),
  ("10\\%", "10"),
  ("90^\\circ", "90"),
  ("\\frac{6}{8}", "3/4"),
  ("2\\frac12", "5/2"),
  ("72\\text{ cm}", "72"),
  ("\\text{(C)}", "C"),
  ("\\text{June 20}", "June 20"),
  ("x=5", "x=5"),
  ("(1,2)", "(1,2)"),
  ("2516_8", "2516_8"),
  ("12:00", "12:00"),
  ("4!", "4!"),
  ("5 \\text{ or } 6", "5 or 6"),
)
# (text, in digits).
NUMBER_WORDS = (
  ("forty-two", "42"),
  ("one hundred and five", "105"),
  ("two thousand five hundred", "2500"),
  ("twelve hundred", "1200"),
  ("a million", "1000000"),
  ("three million two hundred thousand and one", "3200001"),
  ("two thirds", "2/3"),
  ("one half", "1/2"),
  ("half", "1/2"),
  ("two and a half", "2 1/2"),
  ("zero point nine", "0.9"),
  ("each one", "each one"),
  ("half of it", "half of it"),
)
HOSTILE = (
  *("x", "7", "7 ", "7. ", "=7", "= ", "\n", "####", "#### 7\n", "\\boxed{"),
  *("\\boxed{7} or ", "answer is ", "answer: 7 or ", "<answer>", "</think>"),
  *("\\frac{1}{", "1,", "one hundred and ", "a hundred thousand ", "not ", "("),
  *("\\text{", "*", "**", "$", "½", "²", "é", "五", "\u200b", "| ", "- 7\n"),
  *("<|im_end|>", "[", "<", "7/", "7^", "minus ", "or ", "答案", "\\\\", "'"),
  *("~~", "<<1=", "<think>", "\n- ", "| 7 |\n", "\\color{", "{1\\over", "if "),
  *("The answer is 6. ", "That is wrong. ", "Wait, 7 ", "\\text{a}", "٣", "१"),
  *(", who is ", "not 7 but ", " in 7 days", "8,00 €", "²₃", "x/", "Check: 7 "),
  *(".", ",", "{", "the answer is", "7.x", "has 7, ", "^ ", "\t"),
)


def _settle(gold, response):
  """Truth, answer and verdict, before math-verify."""
  truth = comparison.true_answer(gold)
  said = extraction.extract(
    response,
    question=answer_rows.QUESTION,
    turn="Question:",
    is_number=numbers.number(truth) == truth,
  )
  return truth, *comparison.compare(truth, said.text, said.rule or "")


def _misjudged(rows):
  """The rows whose verdict is another, after math-verify."""
  settled = [_settle(gold, response) for gold, response, _ in rows]
  verdicts = comparison.verify_all(
    list(dict.fromkeys((t, a) for t, a, v in settled if v == "unsettled"))
  )
  return [
    (row, answer)
    for row, (truth, answer, verdict) in zip(rows, settled, strict=True)
    if row[2]
    != (
      verdicts[truth, answer][1]
      if verdict == "unsettled"
      else verdict == "exact" and answer == truth
    )
  ]


class RowsTest(parameterized.TestCase):
  def test_plain(self):
    rows = [(row, _settle(row[0], row[1])) for row in answer_rows.ROWS]
    settled = [
      (row, answer == truth)
      for row, (truth, answer, verdict) in rows
      if verdict != "unsettled"
    ]
    self.assertGreater(len(settled), 1000)
    self.assertEqual(
      [row for row, is_right in settled if is_right != bool(row[2])], []
    )

  def _expressions(self):
    pytest.importorskip("math_verify")
    return [
      row for row in answer_rows.ROWS if _settle(*row[:2])[2] == "unsettled"
    ]

  def test_expressions(self):
    self.assertEqual(_misjudged(self._expressions()[::10]), [])

  @pytest.mark.slow
  def test_all_expressions(self):
    self.assertEqual(_misjudged(self._expressions()), [])

  def test_shared_answers(self):
    path = conftest.shared("data/verdicts/answers.jsonl")
    pytest.importorskip("math_verify")
    with path.open(encoding="utf-8") as file:
      rows = [json.loads(line) for line in file]
    self.assertGreaterEqual(len(rows), 283)
    self.assertEqual(
      _misjudged([(r["gold"], r["response"], r["right"]) for r in rows]), []
    )

  def test_hard_answers(self):
    """Judged by hand; a third was misjudged before the tables had its kind."""
    pytest.importorskip("math_verify")
    path = pathlib.Path(__file__).with_name("answers_hard.jsonl")
    with path.open(encoding="utf-8") as file:
      rows = [json.loads(line) for line in file]
    self.assertGreater(len(rows), 150)
    self.assertEqual(
      _misjudged([(r["gold"], r["response"], r["right"]) for r in rows]), []
    )


class ExtractTest(parameterized.TestCase):
  @parameterized.parameters(*EXTRACTS)
  def test_number(self, response, text, rule):
    said = extraction.extract(
      response, question=answer_rows.QUESTION, turn="Question:"
    )
    self.assertEqual((said.text, said.rule), (text, rule))

  @parameterized.parameters(
    ("The answer is Monday.", "Monday", "answer_is"),
    ("#### Monday", "Monday", "hashes"),
    ("Well.\nMonday", "Monday", "line"),
    ("#### Answer\nMonday", "Monday", "line"),
  )
  def test_words(self, response, text, rule):
    said = extraction.extract(response, is_number=False)
    self.assertEqual((said.text, said.rule), (text, rule))

  @parameterized.parameters(
    # Asked again in words of its own, before or behind an answer.
    ("You ask: {}\n#### 42", "42"),
    ("In 2 steps: {} 40+2 = 42", "42"),
    ("Question: {}\nThe answer is 42.", "42"),
    ("42. {} 43", "42"),
    ("#### 42\nQuestion: {}\n#### 43", "42"),
    ("\\boxed{{42}}\n{}\n\\boxed{{43}}", "42"),
    ("Question: what?\n#### 42", "42"),
    ("#### 42\n\nQuestion: And now?\n#### 43", "42"),
  )
  def test_question(self, form, text):
    said = extraction.extract(
      form.format(answer_rows.QUESTION),
      question=answer_rows.QUESTION,
      turn="Question:",
    )
    self.assertEqual(said.text.strip(), text)

  @parameterized.parameters("", " ", "7", "How?")
  def test_questions_that_say_nothing(self, question):
    said = extraction.extract("How? 7. #### 42", question=question, turn="")
    self.assertEqual(said.text, "42")

  @parameterized.parameters(*HOSTILE)
  def test_long_texts_take_no_time(self, part):
    response = part * (200_000 // len(part))
    for text in (response, response + "\n7", "#### " + response):
      start = time.monotonic()
      for is_number in (True, False):
        said = extraction.extract(
          text,
          question=answer_rows.QUESTION,
          turn="Question:",
          is_number=is_number,
        )
        comparison.compare("43" if is_number else "x+1", said.text, "hashes")
      self.assertLess(time.monotonic() - start, 2.0)

  @parameterized.parameters(*HOSTILE)
  def test_no_function_hangs(self, part):
    text = part * (100_000 // len(part))
    for function in (
      *(clauses.last_clause, normalisation.characters, numbers.number),
      *(normalisation.cut_at_end_token, normalisation.normalise),
      *(surroundings.takes_back, surroundings.is_hedge, surroundings.changes),
      extraction.braced,
      lambda text: clauses.is_offered(text, len(text)),
      lambda text: surroundings.withdraws(text, "43"),
      lambda text: math_word_problems.step_matches(["43"], text),
      lambda text: extraction.extract(text, is_strict=True),
    ):
      start = time.process_time()
      function(text)
      self.assertLess(time.process_time() - start, 2.0, function)

  def test_sums_are_read_as_the_long_way(self):
    """The short way is for speed: whatever it reads means the same."""
    texts = [response for _, response, _ in answer_rows.ROWS]
    texts += [
      f"{above}{start} {ended}{behind}"
      for above in ("", "She has 3.\n", "41 or\n", "Is it 4?\n", "41 +\n")
      for start in ("So", "If", "Not", "I am not sure, but", "She needs", "Or")
      for ended in ("40 + 2 = 42", "50-8=$42", "2x+40 = 42", "4*.5 = -2.5")
      for behind in (
        *(
          "",
          ".",
          " clips.",
          " or",
          " by",
          " dozen",
          " are left.",
          " to go.\n",
        ),
        *(" because he said so", " in two days", " is wrong.", " or more."),
        *(" thousand", " is too many.", " and\n", ", and up.", " to 50."),
      )
    ]
    short = {text: clauses._after_sum(text) for text in texts}
    short = {text: clause for text, clause in short.items() if clause}
    self.assertGreater(len(short), 50)
    with mock.patch.object(clauses, "_after_sum", return_value=None):
      for text, clause in short.items():
        self.assertEqual(
          numbers.number(clause),
          numbers.number(clauses.last_clause(text) or ""),
          text,
        )


class NumbersTest(parameterized.TestCase):
  @parameterized.parameters(*NUMBER_WORDS)
  def test_words(self, text, expected):
    self.assertEqual(words.with_digits(text).strip(), expected)

  @parameterized.parameters(
    ("#### 5 = 6", None),
    ("12 = 5 + 7", "12"),
    ("12 = 5 + 8", None),
    ("x = y = 12", "12"),
    ("x = 11, y = 12", None),
    ("0.333...", "1/3"),
    ("0.123...", None),
    ("5...", "5"),
    ("1 3/2", None),
    ("5e101", None),
    ("5 x 10^101", None),
  )
  def test_read(self, text, expected):
    self.assertEqual(numbers.number(text.removeprefix("#### ")), expected)

  @hypothesis.given(st.text(max_size=200))
  def test_any_text(self, text):
    value = numbers.number(text)
    if value is not None:
      self.assertEqual(numbers.number(value), value)

  @hypothesis.given(
    st.integers(0, 10**9),
    st.sampled_from(
      ["not {}", "{} or 6", "less than {}", "{} is wrong", "{}, {}1", "{}!={}"]
      + ["twice {}", "{} dozen", "{} squared", "{}-{}1", "{}:00", "{}x", "v{}"]
    ),
  )
  def test_never_read(self, value, form):
    self.assertIsNone(numbers.number(form.replace("{}", str(value))))


class NormaliseTest(parameterized.TestCase):
  @parameterized.parameters(
    ("１２", "12"),
    ("x² + y₁", "x^{2} + y_{1}"),
    ("**12**", "12"),
    ("2**3", "2^3"),
    ("\\(x\\)", "x"),
    ("$$x$$", "x"),
    ("\\text{12}", "12"),
    ("\\dfrac{1}{2}", "\\frac{1}{2}"),
    ("1{,}560", "1,560"),
    ("90^\\circ", "90"),
    ("50\\%", "50%"),
    ("1\u200b2<|im_end|>", "12"),
    ("sqrt(5)", "\\sqrt{5}"),
  )
  def test_hand_computed(self, text, expected):
    self.assertEqual(normalisation.normalise(text), expected)


class CompareTest(parameterized.TestCase):
  @parameterized.parameters(*GOLDS)
  def test_true_answers(self, gold, expected):
    self.assertEqual(comparison.true_answer(gold), expected)

  @parameterized.parameters(
    ("5", "5", "hashes", ("5", "exact")),
    ("5", None, "hashes", (None, "none")),
    ("42", "6*7", "hashes", ("6*7", "unsettled")),
    ("72", "48+24", "hashes", (None, "none")),
    ("5", "5 " + "blah " * 100, "hashes", ("5", "exact")),
    ("5", "5 " + "blah " * 100 + "or 6", "hashes", (None, "too_long")),
    ("C", "(C) 42", "answer_is", ("C", "exact")),
    ("C", "c", "boxed", ("c", "exact")),
    ("June 20", "june 20", "boxed", ("June 20", "exact")),
    ("x+1", "so it goes", "line", (None, "none")),
  )
  def test_arithmetic(self, truth, text, rule, expected):
    self.assertEqual(comparison.compare(truth, text, rule), expected)

  @parameterized.parameters(
    ("1", "1+10^{-9}", False),
    ("0", "2^{-999}", False),
    ("(1,2)", "(2,1)", False),
    ("1, 2", "2, 1", True),
    ("[0,1)", "0 \\leq x < 1", True),
    ("x=5", "y=5", False),
    ("x+y=3", "2x+2y=6", True),
    ("x^2-1", "(x-1)(x+1)", True),
    ("5", "\\frac{1}{0}", None),
    ("5", "(" * 90 + "5", None),
  )
  def test_expressions(self, truth, text, expected):
    pytest.importorskip("math_verify")
    self.assertEqual(expressions.verify(truth, text), expected)


class BoundsTest(parameterized.TestCase):
  """Nothing in a task loops without bound."""

  def setUp(self):
    super().setUp()

    def stop(*_):
      raise TimeoutError("It takes too long.")

    before = signal.signal(signal.SIGALRM, stop)
    self.addCleanup(signal.signal, signal.SIGALRM, before)
    self.addCleanup(signal.alarm, 0)
    signal.alarm(30)

  @parameterized.parameters("", " ", "\n", "?")
  def test_blank_questions(self, question):
    prompt = f"Blank {question!r}"
    math_word_problems._PROBLEMS[prompt] = math_word_problems._Problem(
      "42", question.strip(), "", None
    )
    score, _ = math_word_problems.score(prompt, "Is it? #### 42")
    self.assertEqual(score, 1.0)

  @parameterized.parameters(
    *("arithmetic", "arithmetic_format", "chains", "merge_sums", "word_lists")
  )
  def test_long_responses(self, name):
    task = tasks.load(name)
    for prompt in [*task.prompts("train", 0, num=1), ""]:
      for part in HOSTILE:
        try:
          task.score(prompt, part * (30_000 // len(part)))
        except ValueError:
          self.assertEqual(prompt, "")

  def test_splits_without_problems(self):
    for task, message, options in (
      ("merge_sums", "0 different train", {"num_terms": 6, "max_term": 16}),
      ("chains", "0 different train", {"num_steps": 6}),
    ):
      task = tasks.load(task)
      with (
        mock.patch.object(task, "_cell", return_value="another"),
        mock.patch.object(task, "_MAX_REJECTED", 1000),
        self.assertRaisesRegex(ValueError, message),
      ):
        task.prompts("train", 0, num=1, **options)
    with (
      mock.patch.object(task, "_cell", return_value="another"),
      mock.patch.object(task, "_MAX_REJECTED", 1000),
      self.assertRaisesRegex(ValueError, "no prompt of the corpus"),
    ):
      task.supervised("train", 0, num=1, corpus="pretraining")
