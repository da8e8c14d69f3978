"""Tests of rewrites: labels, templates, gold repairs and records."""

import collections
import re

import hypothesis
import numpy as np
from absl.testing import absltest, parameterized
from hypothesis import strategies as st

from rljax import rewriting, traces

GOLD = (
  "Natalia sold 48/2 = 24 clips in May.\n"
  "She sold 48+24 = 72 clips altogether.\n"
  "#### 72"
)

# What texts of models are made of, in any order.
PIECES = (
  *("1", "24", "0", "1,250", ".5", "3.14", "9" * 31, "$", "%", "-", "−"),
  *("+", "*", "/", " x ", "×", "(", ")", "=", " = ", " ", "\n", "\n\n", "."),
  *("####", "#### 12", "clips", " of ", "2+3 = 5", "48/2 = 25", "5*5 = 25"),
)


def _from_gold(gold, sample, **options):
  return rewriting.from_gold(
    traces.steps(gold), traces.steps(sample), **options
  )


class LabelsTest(parameterized.TestCase):
  def test_labelled(self):
    self.assertEqual(
      rewriting.labelled(traces.steps("a b\n\nc\n")), "[0] a b\n[1] c"
    )
    self.assertEqual(rewriting.labelled([]), "")

  @parameterized.parameters(
    ("[3]", 3),
    ("step 12", 12),
    ("Correct.", -1),
    ("", -1),
    ("12", 12),
    ("[ 4 ]", 4),
    ("Step #4: 3+4=8", 4),
    ("[2] 3+4=8", 2),
    ("The first error step is [12]", 12),
    ("[-1]", -1),
    ("[-7]", -1),
    # The word is in others that say the opposite.
    ("Step 3 is incorrect.", 3),
    ("incorrect", -1),
    ("Step 2 is not correct", 2),
    ("That isn't quite correct: step 6", 6),
    ("Correct up to step 3, which is wrong", 3),
    # Numbers beside the word.
    ("All 5 steps are correct", -1),
    ("The steps [0], [1] and [2] are correct", -1),
    ("There are no errors in the 3 steps.", -1),
    ("No step is wrong in all 4.", -1),
    # Where the fault is.
    ("[0] is correct, [1] is wrong", 1),
    ("The answer 12 is wrong; the mistake is in [1].", 1),
    ("I found an error. Step 4.", 4),
    # No labels.
    ("3.5", -1),
    ("1,234", -1),
    ("٣", -1),
    ("9" * 50, -1),
  )
  def test_parse_step_label(self, text, expected):
    self.assertEqual(rewriting.parse_step_label(text), expected)

  @parameterized.parameters(
    "9", "[", "[1", "no ", "step ", "not a ", "(1+", "1=1 ", "1,", "is wrong. "
  )
  def test_time_is_bounded(self, piece):
    text = piece * (2_000_000 // len(piece))
    rewriting.parse_step_label(text)
    rewriting.last_result(text)
    rewriting.corrupted(text, np.random.default_rng(0))
    gold = ["1+1=2\n", "#### 2"]
    self.assertEqual(rewriting.from_gold(gold, [text]), (0, "1+1=2\n#### 2"))
    _, rewrite = rewriting.from_gold(gold, [text[:2000]])
    self.assertTrue(rewrite.endswith("#### 2"))


class RetainedTest(parameterized.TestCase):
  STEPS = ("a\n", "b\n", "c")

  @parameterized.parameters((-1, ""), (0, ""), (1, "a\n"), (2, "a\nb\n"))
  def test_retained(self, error_step, expected):
    self.assertEqual(rewriting.retained(self.STEPS, error_step), expected)

  @parameterized.parameters(3, 12, -2)
  def test_no_such_step(self, error_step):
    with self.assertRaisesRegex(ValueError, f"3 steps.*got {error_step}"):
      rewriting.retained(self.STEPS, error_step)

  def test_sample_without_steps(self):
    self.assertEqual(rewriting.retained([], -1), "")

  @parameterized.parameters(
    ("", "\nb", "b"),
    ("", " b\n", "b\n"),
    ("a\n", "b", "a\nb"),
    ("a\n", "\n\nb", "a\nb"),
    ("a\n", " b", "a\nb"),
    ("a\n\n", "b", "a\n\nb"),
    ("a", "\n\n b", "a\nb"),
    ("a", " b", "a b"),
    ("1+1=2;", "2*3=6|A6", "1+1=2;2*3=6|A6"),
    ("a\n", "", "a\n"),
    ("a\n", "\n", "a\n"),
    ("", "", ""),
  )
  def test_join(self, prefix, continuation, expected):
    self.assertEqual(rewriting.join(prefix, continuation), expected)

  @parameterized.parameters(0, 1, 2)
  def test_rewrites_begin_with_the_samples_steps(self, error_step):
    kept = rewriting.retained(self.STEPS, error_step)
    for reply in ("x\ny", "\nx\ny", " x\ny"):
      steps = traces.steps(rewriting.join(kept, reply))
      self.assertEqual(steps[:error_step], list(self.STEPS[:error_step]))
      self.assertEqual(steps[error_step:], ["x\n", "y"])
      self.assertEqual(
        rewriting.first_changed_step(self.STEPS, steps), error_step
      )

  @parameterized.parameters(
    ("a\nb\nc", "a\nb\nc", -1),
    ("a\nb\nc", "a\nb\nc\nd", -1),
    ("a\nb\nc", "a\nb", 2),
    ("a\nb", "a\nbc", 1),
    ("", "a", -1),
    ("a", "", 0),
  )
  def test_first_changed_step(self, sample, rewrite, expected):
    found = rewriting.first_changed_step(
      traces.steps(sample), traces.steps(rewrite)
    )
    self.assertEqual(found, expected)


class TemplateTest(parameterized.TestCase):
  def test_compact(self):
    template = rewriting.TEMPLATES["compact"]
    steps = ["12+5=18|", "3*18=54;", "A54"]
    gold = "12+5=17;3*17=51|A51"
    self.assertEqual(
      template.locate_prompt("Q12+5*3", gold, steps),
      "Q12+5*3G12+5=17;3*17=51|A51P12+5=18|3*18=54;A54L",
    )
    self.assertEqual(template.locate_target(12), "12")
    self.assertEqual(
      template.rewrite_prompt("Q12+5*3", gold, "".join(steps)),
      "Q12+5*3G12+5=17;3*17=51|A51P12+5=18|3*18=54;A54R",
    )

  def test_instruction(self):
    template = rewriting.TEMPLATES["instruction"]
    prompt = template.locate_prompt("How many?", GOLD, ["a 25\n", "#### 25"])
    self.assertIn("[0] a 25\n[1] #### 25\n", prompt)
    self.assertIn("another way than the reference", " ".join(prompt.split()))
    self.assertEqual(template.locate_target(3), "The first error step is [3]")
    prompt = template.rewrite_prompt("How many?", GOLD, "a 25\n#### 25")
    for text in ("How many?", GOLD, "a 25\n#### 25", "another way than the"):
      self.assertIn(text, prompt)
    self.assertNotIn("[0]", prompt)
    self.assertEndsWith(prompt, "Correct prediction:\n")

  @parameterized.parameters(*rewriting.TEMPLATES)
  def test_what_is_kept_stands_where_the_rewrite_begins(self, name):
    """A model meets kept steps as it has met them in training."""
    template = rewriting.TEMPLATES[name]
    prompt = template.rewrite_prompt("q", "g", "a\nb")
    self.assertEqual(
      template.rewrite_prompt("q", "g", "a\nb", "a\n"), f"{prompt}a\n"
    )

  @parameterized.parameters(*rewriting.TEMPLATES)
  def test_reads_its_own_target(self, name):
    template = rewriting.TEMPLATES[name]
    for step in (0, 1, 9, 10, 123):
      self.assertEqual(
        template.parse_location(template.locate_target(step)), step
      )
    with self.assertRaisesRegex(ValueError, "got -1"):
      template.locate_target(-1)

  @parameterized.parameters(*rewriting.TEMPLATES)
  def test_braces_are_texts(self, name):
    template = rewriting.TEMPLATES[name]
    text = r"\frac{1}{2} {gold} {0}"
    self.assertIn(text, template.rewrite_prompt(text, "g", "r"))
    self.assertIn(text, template.locate_prompt("q", text, ["r"]))

  def test_teacher_of_the_documentation(self):
    """The two calls in the module's docstring, with a scripted model."""
    replies = iter(["[1]", "\nShe sold 48+24 = 72 clips.\n#### 72"])
    asked = []

    def ask(prompt):
      asked.append(prompt)
      return next(replies)

    start = rewriting.__doc__.index("  def teacher")
    end = rewriting.__doc__.index("What a teacher returns")
    names = {"rewriting": rewriting, "traces": traces, "ask": ask}
    lines = rewriting.__doc__[start:end].splitlines()
    exec("\n".join(line[2:] for line in lines), names)
    wrong = "In May 24 clips.\nShe sold 48+24 = 74 clips.\n#### 74"
    self.assertEqual(
      names["teacher"]("q", GOLD, wrong),
      "In May 24 clips.\nShe sold 48+24 = 72 clips.\n#### 72",
    )
    self.assertEndsWith(asked[1], "Correct prediction:\nIn May 24 clips.\n")


class LastResultTest(parameterized.TestCase):
  @parameterized.parameters(
    ("48/2 = 24 clips", 24),
    ("48/2 = 24 and 48+24=$1,072.50.", 1072.5),
    ("3 - 5 = -2", -2),
    ("3 - 5 = $-2", -2),
    ("3 - 5 = -$-2", -2),
    ("15*240 = \\$3600", 3600),
    ("a = b", None),
    ("#### 72", None),
    ("48/2 = 24*3 = 72", 72),
    ("so 72 = 24*3", None),
    ("= " + "9" * 31, None),
  )
  def test_last_result(self, step, expected):
    self.assertEqual(rewriting.last_result(step), expected)


class FromGoldTest(parameterized.TestCase):
  def test_splice_keeps_what_stands(self):
    step, rewrite = _from_gold(
      "48/2 = 24 in May.\n24+48 = 72.\nSo it is 72.\n#### 72",
      "May: 48 / 2 = 24.\nBoth: 24 * 2 = 48, 48 * 24 = 1152.\n#### 1152",
    )
    self.assertEqual(step, 1)
    self.assertEqual(
      rewrite, "May: 48 / 2 = 24.\n24+48 = 72.\nSo it is 72.\n#### 72"
    )

  def test_repair_works_out_the_samples_own_way(self):
    step, rewrite = _from_gold(
      GOLD,
      "Twice 48 is 48*2 = 98, minus a half of 48.\n"
      "That is 48/2 = 24, so 98-24 = 74.\n"
      "Altogether 74.\n#### 74",
    )
    # Another method than the gold's, whose 96 the gold does not have.
    self.assertEqual(step, 0)
    self.assertEqual(
      rewrite,
      "Twice 48 is 48*2 = 96, minus a half of 48.\n"
      "That is 48/2 = 24, so 96-24 = 72.\n"
      "Altogether 72.\n#### 72",
    )

  def test_repair_needs_the_golds_answer(self):
    """A right calculation of something else is no repair."""
    _, rewrite = _from_gold(GOLD, "She sold 48*2 = 98 clips.\n#### 98")
    self.assertNotIn("96", rewrite)
    self.assertTrue(rewrite.endswith("#### 72"))

  def test_only_the_answer_is_wrong(self):
    sample = GOLD.replace("#### 72", "#### 27")
    self.assertEqual(_from_gold(GOLD, sample), (2, GOLD))

  def test_only_the_answer_is_missing(self):
    sample = "48/2 = 24.\n48+24 = 72."
    self.assertEqual(
      _from_gold(GOLD, sample), (-1, "48/2 = 24.\n48+24 = 72.\n#### 72")
    )

  def test_graft_keeps_the_sentence(self):
    step, rewrite = _from_gold(
      "136 - 27 = 109\n#### 109",
      "On this day he sold 27*136 = 3128 books.\n#### 3128",
    )
    self.assertEqual(
      (step, rewrite),
      (0, "On this day he sold 136 - 27 = 109 books.\n#### 109"),
    )

  def test_graft_wants_as_many_calculations(self):
    gold = "8*2 = 16\n16+3 = 19\n#### 19"
    _, rewrite = _from_gold(gold, "He has 8+2 = 10 books.\n#### 10")
    self.assertEqual(rewrite, gold)

  def test_results_in_another_order(self):
    gold = "2*5 = 10\n3*7 = 21\n10+21 = 31\n#### 31"
    # The second result first: the first one is still needed.
    step, rewrite = _from_gold(
      gold, "Sevens make 3*7 = 21 of them.\nAll: 21+5 = 27\n#### 27"
    )
    self.assertEqual(step, 1)
    self.assertEqual(
      rewrite, "Sevens make 3*7 = 21 of them.\n2*5 = 10\n10+21 = 31\n#### 31"
    )
    # Both there, and nothing said again.
    step, rewrite = _from_gold(
      gold, "Sevens: 3*7 = 21.\nFives: 2*5 = 10.\nAll: 21-10 = 11\n#### 11"
    )
    self.assertEqual(step, 2)
    self.assertEqual(
      rewrite, "Sevens: 3*7 = 21.\nFives: 2*5 = 10.\n10+21 = 31\n#### 31"
    )

  def test_result_by_chance(self):
    """A wrong step with a later result of the gold's is not worth keeping."""
    gold = (
      "Rooms: 4*10 = 40.\nHours: 40*6 = 240.\nPay: 15*240 = 3600.\n#### 3600"
    )
    sample = (
      "Rooms: 4*60 = 240.\nHours: 240*6 = 1440.\nPay: 15*1440 = 21600.\n"
      "#### 21600"
    )
    self.assertEqual(_from_gold(gold, sample), (0, gold))

  def test_a_wrong_calculation_with_a_right_result(self):
    step, _ = _from_gold(GOLD, "48/3 = 24\nAll 48+24 = 73\n#### 73")
    self.assertEqual(step, 0)

  def test_a_result_counts_once(self):
    sample = "May: 48/2 = 24.\nAgain 48/2 = 24.\nAll: 24+24 = 48.\n#### 48"
    step, rewrite = _from_gold(GOLD, sample)
    self.assertEqual(step, 1)
    self.assertEqual(
      rewrite, "May: 48/2 = 24.\n" + "".join(GOLD.splitlines(True)[1:])
    )

  def test_a_result_that_is_there_is_not_needed_again(self):
    step, rewrite = _from_gold(
      "2*5 = 10\n3+4 = 7\n7+3 = 10\n10+7 = 17\n#### 17",
      "So 3+4 = 7.\nThen 7+3 = 10.\nNow 10*7 = 71.\n#### 71",
    )
    self.assertEqual(step, 2)
    self.assertEqual(
      rewrite, "So 3+4 = 7.\nThen 7+3 = 10.\nNow 10+7 = 17.\n#### 17"
    )

  def test_rounded_results_are_right(self):
    gold = "100/3 = 33.33\n33.33*2 = 66.66\n#### 66.66"
    sample = (
      "A third is 100/3 = 33.33 here.\nThen 33.33*3 = 99.99, 99.99-1 = 98.99\n"
      "#### 98.99"
    )
    step, rewrite = _from_gold(gold, sample)
    self.assertEqual(step, 1)
    self.assertTrue(rewrite.startswith("A third is 100/3 = 33.33 here.\n"))

  def test_steps_without_a_result(self):
    # They stand in front of a calculation,
    step, rewrite = _from_gold(
      GOLD, "Let us begin.\nMay: 48/3 = 16.\nAll: 48+16 = 64.\n#### 64"
    )
    self.assertEqual(step, 1)
    self.assertTrue(rewrite.startswith("Let us begin.\n"))
    # but if there are no others, what is wrong lies in them.
    gold = "24+48 = 72\n#### 72"
    step, rewrite = _from_gold(
      gold, "It must be about seventy of them, I guess.\n#### 70"
    )
    self.assertEqual((step, rewrite), (0, gold))

  @parameterized.parameters(
    ("The answer is 12", "So the answer is 11.", True),
    ("A51", "A54", True),
    ("A51", "12+5=17|", False),
    ("7", "11", True),
    ("7", "11 of them", False),
    ("#### 7", "so #### 11", True),
  )
  def test_steps_that_state_the_answer(self, gold, step, is_answer):
    """They never stand, and nothing behind them does."""
    found, rewrite = rewriting.from_gold(
      ["1+1=2;", gold], [step, " 1+1=3;", gold], result_of=lambda step: None
    )
    self.assertEqual(rewrite.endswith(gold), True)
    self.assertEqual(found, 0 if is_answer else 1)

  def test_own_results_and_ends(self):
    """Steps as a task has them, here with results in words."""
    results = {"eins;": "one", "one|": "one", "zwei;": "two", "four|": "four"}
    step, rewrite = rewriting.from_gold(
      ["eins;", "zwei;", "A2"],
      ["one|", "four|", "A4"],
      result_of=results.get,
    )
    self.assertEqual((step, rewrite), (1, "one|zwei;A2"))

  @parameterized.parameters(
    ("Here 1+1=2", "Here 1+1=2;2+2=4;A4"),
    ("Here 1+1=2 ", "Here 1+1=2 ;2+2=4;A4"),
    ("Here 1+1=2;\n", "Here 1+1=2;\n2+2=4;A4"),
  )
  def test_unfinished_last_step_is_ended(self, sample, expected):
    _, rewrite = rewriting.from_gold(["1+1=2;", "2+2=4;", "A4"], [sample])
    self.assertEqual(rewrite, expected)

  def test_nothing_to_keep(self):
    self.assertEqual(_from_gold(GOLD, ""), (-1, GOLD))
    self.assertEqual(_from_gold(GOLD, "#### 3"), (0, GOLD))
    self.assertEqual(_from_gold("#### 51", "76/25 = 3\n#### 3")[1], "#### 51")
    with self.assertRaisesRegex(ValueError, "one step at least"):
      _from_gold("", "a")

  @parameterized.parameters(
    "1/0 = 5", "(((1+2 = 4", "1+2)))) = 4", "5 / (3 - 3) = 1", "1+1 = ",
    "- - - 5 = 6", "2 x x 3 = 6", "50% - 20% = 30%", "= = 7", "1.2.3+1 = 4",
  )  # fmt: skip
  def test_odd_calculations(self, sample):
    step, rewrite = _from_gold(GOLD, f"{sample}\n#### 5")
    self.assertTrue(rewrite.endswith("#### 72"))
    steps = traces.steps(f"{sample}\n#### 5")
    self.assertTrue(rewrite.startswith(rewriting.retained(steps, step)))

  @hypothesis.given(
    st.lists(st.sampled_from(PIECES), max_size=24),
    st.lists(st.sampled_from(PIECES), max_size=24),
  )
  @hypothesis.settings(max_examples=150)
  def test_any_text(self, gold, sample):
    gold, sample = "".join(gold) + "\n#### 12", "".join(sample)
    step, rewrite = _from_gold(gold, sample)
    self.assertTrue(rewrite.endswith(traces.steps(gold)[-1]))
    steps = traces.steps(sample)
    self.assertBetween(step, -1, max(len(steps) - 1, -1))
    kept = steps if step < 0 else steps[:step]
    for old, new in zip(kept, traces.steps(rewrite), strict=False):
      self.assertEqual(old.rstrip(), new.rstrip())
    wrong = rewriting.corrupted(gold, np.random.default_rng(len(sample)))
    self.assertNotEqual(wrong, gold)
    self.assertNotEmpty(wrong)

  def test_splice_with(self):
    teacher = rewriting.splice_with()
    sample = GOLD.replace("#### 72", "#### 27")
    self.assertEqual(teacher("q", GOLD, sample), GOLD)
    teacher = rewriting.splice_with(step_ends=";")
    self.assertEqual(teacher("q", "1+1=2;A2", "1+1=2;A3"), "1+1=2;A2")


class CorruptedTest(parameterized.TestCase):
  def _draws(self, gold, number=60):
    rng = np.random.default_rng(0)
    return [rewriting.corrupted(gold, rng) for _ in range(number)]

  def test_changes_are_carried(self):
    found = collections.Counter(self._draws(GOLD, 300))
    self.assertNotIn(GOLD, found)
    # A result in error, an operand in error, and the answer alone are there.
    for pattern in (
      r".* 48/2 = (?!24)(\d+) .*\n.* 48\+\1 = (\d+) .*\n#### \2",
      r".* 48/(?!2)\d+ = (\d+) .*\n.* 48\+\1 = (\d+) .*\n#### \2",
      r".* 48/2 = 24 .*\n.* 48\+24 = (?!72)(\d+) .*\n#### \1",
    ):
      self.assertTrue(any(re.fullmatch(pattern, w) for w in found), pattern)
    for wrong in found:
      # All but one calculation are right, and so is the answer behind them.
      numbers = re.findall(r"([\d.]+)([/+])([\d.]+) = ([\d.]+)", wrong)
      (a, _, b, first), (c, _, d, second) = numbers
      answer = wrong.rpartition("#### ")[2]
      self.assertNotEqual(answer, "72")
      num_wrong = (
        (float(a) / float(b) != float(first))
        + (float(c) + float(d) != float(second))
        + (second != answer)
      )
      self.assertLessEqual(num_wrong, 1)
      # One number of four is another than the gold's or follows from one.
      changed = [a != "48", b != "2", c != "48", d != first]
      self.assertLessEqual(sum(changed) + num_wrong, 1)

  def test_the_gold_is_the_rewrite(self):
    """Numbers alone are changed, and `from_gold` finds the way back."""
    gold = (
      "In June there were 17 * 30 = 510 cups.\n"
      "In July they sold 510 / 2 = 255 cups fewer.\n"
      "In all they sold 510 + 255 = 765 cups.\n#### 765"
    )
    for wrong in self._draws(gold, 30):
      without_numbers = [re.sub(r"[\d.]+", "", t) for t in (wrong, gold)]
      self.assertEqual(*without_numbers)
      step, rewrite = _from_gold(gold, wrong)
      self.assertEqual(rewrite, gold)
      steps = traces.steps(wrong)
      self.assertEqual(steps[:step], traces.steps(gold)[:step])
      self.assertNotEqual(steps[step], traces.steps(gold)[step])

  def test_numbers_that_cannot_be_told_apart(self):
    """The 4 of the first sum is not the 4 that was there before."""
    gold = "He has 4 cats.\n2+2 = 4 dogs, and 4 cats.\nSo 4+4 = 8.\n#### 8"
    for wrong in self._draws(gold):
      self.assertStartsWith(wrong, "He has 4 cats.\n2+2 = 4 dogs, and 4 cats.")

  def test_results_that_cannot_be_told_apart(self):
    """A result that follows from the change is the number of the cats, too."""
    gold = (
      "He has 4 cats.\n1+1 = 2 dogs.\n2+2 = 4 mice.\n4 cats, so 4+1 = 5\n#### 5"
    )
    for wrong in self._draws(gold):
      self.assertIn("\n4 cats, so ", wrong)

  def test_changes_that_do_not_reach_the_answer(self):
    for wrong in self._draws("By the way, 5*2 = 10.\n3+4 = 7.\n#### 7"):
      self.assertNotEqual(wrong.rpartition("#### ")[2], "7")

  @parameterized.parameters("", "none", "9" * 31)
  def test_nothing_to_change(self, gold):
    self.assertEqual(self._draws(gold, 3), [None] * 3)

  def test_without_calculations(self):
    for wrong in self._draws("There are 12 of them.\n#### 12"):
      self.assertRegex(wrong, r"There are (?!12)(\d\d) of them.\n#### \1$")

  def test_format_of_numbers(self):
    gold = "It costs 2*$1,250.50 = $2,501.00 now.\n#### 2501"
    found = [w for w in self._draws(gold) if "2,501.00" not in w]
    self.assertNotEmpty(found)
    for wrong in found:
      self.assertRegex(wrong, r"= \$(\d{1,3},)?\d{3}(\.\d\d)? now")

  def test_depends_on_the_generator_alone(self):
    self.assertEqual(self._draws(GOLD, 5), self._draws(GOLD, 5))


def _row(response, *, is_right, error_step=-1, rewrite="R", is_verified=True):
  return {
    "prompt": "q",
    "gold": "g",
    "response": response,
    "is_right": is_right,
    "error_step": error_step,
    "rewrite": rewrite,
    "is_verified": is_verified,
  }


class RecordsTest(parameterized.TestCase):
  COMPACT = rewriting.TEMPLATES["compact"]

  def _records(self, rows, **options):
    options = {"seed": 0} | options
    return rewriting.reward_model_records(rows, self.COMPACT, **options)

  def test_wrong_sample(self):
    records, counts = self._records(
      [_row("a\nb\n", is_right=False, error_step=1)]
    )
    self.assertEqual(
      records,
      [
        {"kind": "locate", "prompt": "qGgPa\nb\nL", "response": "1"},
        {"kind": "rewrite", "prompt": "qGgPa\nb\nR", "response": "R"},
      ],
    )
    self.assertEqual(
      counts,
      {
        "locate": 1,
        "rewrite": 1,
        "identity": 0,
        "unverified": 0,
        "not_drawn": 0,
        "without_step": 0,
        "theta": 1.0,
      },
    )

  def test_a_wrong_sample_said_to_be_correct_is_wrong(self):
    """No step is named, and its rewrite is right: no identity of it."""
    step = self.COMPACT.parse_location("correct")
    rows = [_row(f"{i}", is_right=False, error_step=step) for i in range(9)]
    records, counts = self._records(rows)
    self.assertEqual({r["kind"] for r in records}, {"rewrite"})
    self.assertEqual({r["response"] for r in records}, {"R"})
    self.assertEqual((counts["without_step"], counts["identity"]), (9, 0))
    rows = rewriting.at_most_right(rows, 1, seed=0)
    self.assertLen(rows, 9)

  def test_a_right_sample_with_a_step_is_right(self):
    records, _ = self._records(
      [_row("a", is_right=False), _row("b", is_right=False)]
      + [_row(f"{i}", is_right=True, error_step=0) for i in range(30)]
    )
    kinds = collections.Counter(r["kind"] for r in records)
    self.assertNotIn("locate", kinds)
    self.assertEqual(kinds["rewrite"], 2)
    for r in records[2:]:
      self.assertEqual(r["prompt"], f"qGgP{r['response']}R")

  def test_theta(self):
    rows = (
      [_row(f"w{i}", is_right=False) for i in range(300)]
      + [_row(f"u{i}", is_right=False, is_verified=False) for i in range(200)]
      + [_row(f"r{i}", is_right=True) for i in range(500)]
    )
    records, counts = self._records(rows)
    self.assertEqual(counts["theta"], 0.3)
    self.assertEqual(counts["unverified"], 200)
    self.assertEqual(counts["rewrite"], 300)
    # 150 are expected; the standard deviation is 10.2.
    self.assertBetween(counts["identity"], 110, 190)
    self.assertEqual(counts["identity"] + counts["not_drawn"], 500)
    self.assertLen(records, 300 + counts["identity"])
    # The draw is the seed's.
    self.assertEqual(self._records(rows)[0], records)
    self.assertNotEqual(self._records(rows, seed=1)[0], records)

  def test_steps_that_are_not_there(self):
    rows = [_row("a\nb", is_right=False, error_step=k) for k in (2, 12)]
    records, counts = self._records(rows)
    self.assertEqual([r["kind"] for r in records], ["rewrite"] * 2)
    self.assertEqual(counts["without_step"], 2)

  def test_without_locating(self):
    rows = [_row("a", is_right=False, error_step=0)]
    records, counts = self._records(rows, locate=False)
    self.assertEqual([r["kind"] for r in records], ["rewrite"])
    self.assertEqual(counts["without_step"], 0)

  def test_step_ends(self):
    rows = [_row("1+1=2;2*3=7|A7", is_right=False, error_step=1)]
    self.assertEqual(self._records(rows)[1]["locate"], 0)
    records, _ = self._records(rows, step_ends=";|")
    self.assertEqual(records[0]["response"], "1")

  def test_no_rows(self):
    records, counts = self._records([])
    self.assertEqual((records, counts["theta"]), ([], 0.0))


class SamplesTest(absltest.TestCase):
  def test_distinct(self):
    rows = [
      {"prompt": prompt, "response": text, "finished": finished}
      for prompt, text, finished in (
        ("q", "#7", True),
        ("q", "#7", True),
        ("r", "#7", True),  # The same short answer to another question.
        ("q", "#8", False),
        ("q", "#8", True),
        ("q", "#7 ", True),  # Another text.
      )
    ]
    kept, counts = rewriting.distinct(rows)
    self.assertEqual(kept, [rows[i] for i in (0, 2, 4, 5)])
    self.assertEqual(counts, {"unfinished": 1, "duplicate": 1, "kept": 4})

  def test_samples_without_any_end_are_an_error(self):
    rows = [{"prompt": "q", "response": "#7", "finished": False}]
    with self.assertRaisesRegex(ValueError, "None of the 1 samples has an end"):
      rewriting.distinct(rows)
    self.assertEqual(rewriting.distinct([])[0], [])

  def test_at_most_right(self):
    rows = [
      {"prompt": prompt, "is_right": is_right, "response": str(i)}
      for i, (prompt, is_right) in enumerate(
        [("q", True), ("q", False), ("r", True)] * 10
      )
    ]
    kept = rewriting.at_most_right(rows, 2, seed=0)
    counts = collections.Counter((r["prompt"], r["is_right"]) for r in kept)
    self.assertEqual(counts, {("q", True): 2, ("q", False): 10, ("r", True): 2})
    self.assertEqual(kept, sorted(kept, key=lambda row: int(row["response"])))
    self.assertEqual(kept, rewriting.at_most_right(rows, 2, seed=0))
    self.assertGreater(
      len({str(rewriting.at_most_right(rows, 2, seed=s)) for s in range(5)}), 1
    )
    self.assertEqual(rewriting.at_most_right(rows, 0, seed=0), rows)
    self.assertEqual(rewriting.at_most_right(rows, 10, seed=0), rows)
    with self.assertRaisesRegex(ValueError, "got -1"):
      rewriting.at_most_right(rows, -1, seed=0)


if __name__ == "__main__":
  absltest.main()
