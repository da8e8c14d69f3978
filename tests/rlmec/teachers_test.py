"""Tests of rewrites that are made of gold solutions."""

import collections
import re

import hypothesis
import numpy as np
from absl.testing import absltest, parameterized
from hypothesis import strategies as st

from rljax.rlmec import prompts, teachers
from rljax.text import steps

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
  return teachers.from_gold(steps.steps(gold), steps.steps(sample), **options)


class LastResultTest(parameterized.TestCase):
  @parameterized.parameters(
    "9", "[", "[1", "no ", "step ", "not a ", "(1+", "1=1 ", "1,", "is wrong. "
  )
  def test_time_is_bounded(self, piece):
    text = piece * (2_000_000 // len(piece))
    teachers.last_result(text)
    teachers.corrupted(text, np.random.default_rng(0))
    gold = ["1+1=2\n", "#### 2"]
    self.assertEqual(teachers.from_gold(gold, [text]), (0, "1+1=2\n#### 2"))
    _, rewrite = teachers.from_gold(gold, [text[:2000]])
    self.assertTrue(rewrite.endswith("#### 2"))

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
    self.assertEqual(teachers.last_result(step), expected)


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
    found, rewrite = teachers.from_gold(
      ["1+1=2;", gold], [step, " 1+1=3;", gold], result_of=lambda step: None
    )
    self.assertEqual(rewrite.endswith(gold), True)
    self.assertEqual(found, 0 if is_answer else 1)

  def test_own_results_and_ends(self):
    """Steps as a task has them, here with results in words."""
    results = {"eins;": "one", "one|": "one", "zwei;": "two", "four|": "four"}
    step, rewrite = teachers.from_gold(
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
    _, rewrite = teachers.from_gold(["1+1=2;", "2+2=4;", "A4"], [sample])
    self.assertEqual(rewrite, expected)

  def test_nothing_to_keep(self):
    self.assertEqual(_from_gold(GOLD, ""), (-1, GOLD))
    self.assertEqual(_from_gold(GOLD, "#### 3"), (0, GOLD))
    self.assertEqual(_from_gold("#### 51", "76/25 = 3\n#### 3")[1], "#### 51")
    with self.assertRaisesRegex(ValueError, "at least one step"):
      _from_gold("", "a")

  @parameterized.parameters(
    "1/0 = 5", "(((1+2 = 4", "1+2)))) = 4", "5 / (3 - 3) = 1", "1+1 = ",
    "- - - 5 = 6", "2 x x 3 = 6", "50% - 20% = 30%", "= = 7", "1.2.3+1 = 4",
  )  # fmt: skip
  def test_odd_calculations(self, sample):
    step, rewrite = _from_gold(GOLD, f"{sample}\n#### 5")
    self.assertTrue(rewrite.endswith("#### 72"))
    wrong_steps = steps.steps(f"{sample}\n#### 5")
    self.assertTrue(rewrite.startswith(prompts.retained(wrong_steps, step)))

  @hypothesis.given(
    st.lists(st.sampled_from(PIECES), max_size=24),
    st.lists(st.sampled_from(PIECES), max_size=24),
  )
  @hypothesis.settings(max_examples=150)
  def test_any_text(self, gold, sample):
    gold, sample = "".join(gold) + "\n#### 12", "".join(sample)
    step, rewrite = _from_gold(gold, sample)
    self.assertTrue(rewrite.endswith(steps.steps(gold)[-1]))
    wrong_steps = steps.steps(sample)
    self.assertBetween(step, -1, max(len(wrong_steps) - 1, -1))
    kept = wrong_steps if step < 0 else wrong_steps[:step]
    for old, new in zip(kept, steps.steps(rewrite), strict=False):
      self.assertEqual(old.rstrip(), new.rstrip())
    wrong = teachers.corrupted(gold, np.random.default_rng(len(sample)))
    self.assertNotEqual(wrong, gold)
    self.assertNotEmpty(wrong)

  def test_splice_with(self):
    teacher = teachers.splice_with()
    sample = GOLD.replace("#### 72", "#### 27")
    self.assertEqual(teacher("q", GOLD, sample), GOLD)
    teacher = teachers.splice_with(step_ends=";")
    self.assertEqual(teacher("q", "1+1=2;A2", "1+1=2;A3"), "1+1=2;A2")


class CorruptedTest(parameterized.TestCase):
  def _draws(self, gold, number=60):
    rng = np.random.default_rng(0)
    return [teachers.corrupted(gold, rng) for _ in range(number)]

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
      wrong_steps = steps.steps(wrong)
      self.assertEqual(wrong_steps[:step], steps.steps(gold)[:step])
      self.assertNotEqual(wrong_steps[step], steps.steps(gold)[step])

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


if __name__ == "__main__":
  absltest.main()
