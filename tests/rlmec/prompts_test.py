"""Tests of rewrites: labels, templates, gold repairs and records."""

import collections

from absl.testing import absltest, parameterized

from rljax.rlmec import prompts
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
  return prompts.from_gold(steps.steps(gold), steps.steps(sample), **options)


class LabelsTest(parameterized.TestCase):
  def test_labelled(self):
    self.assertEqual(
      prompts.labelled(steps.steps("a b\n\nc\n")), "[0] a b\n[1] c"
    )
    self.assertEqual(prompts.labelled([]), "")

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
    self.assertEqual(prompts.parse_step_label(text), expected)

  @parameterized.parameters(
    "9", "[", "[1", "no ", "step ", "not a ", "(1+", "1=1 ", "1,", "is wrong. "
  )
  def test_time_is_bounded(self, piece):
    text = piece * (2_000_000 // len(piece))
    self.assertLess(prompts.parse_step_label(text), 10)


class RetainedTest(parameterized.TestCase):
  STEPS = ("a\n", "b\n", "c")

  @parameterized.parameters((-1, ""), (0, ""), (1, "a\n"), (2, "a\nb\n"))
  def test_retained(self, error_step, expected):
    self.assertEqual(prompts.retained(self.STEPS, error_step), expected)

  @parameterized.parameters(3, 12, -2)
  def test_no_such_step(self, error_step):
    with self.assertRaisesRegex(ValueError, f"3 steps.*got {error_step}"):
      prompts.retained(self.STEPS, error_step)

  def test_sample_without_steps(self):
    self.assertEqual(prompts.retained([], -1), "")

  @parameterized.parameters(
    ("", "\nb", "b"),
    ("", " b\n", "b\n"),
    ("a\n", "b", "a\nb"),
    ("a\n", "\n\nb", "a\nb"),
    ("a\n", " b", "a\n b"),  # A slot, such as merge sums have.
    ("a\n", "\n b", "a\n b"),
    ("a ", " b", "a b"),
    ("a\n\n", "b", "a\n\nb"),
    ("a", "\n\n b", "a\nb"),
    ("a", " b", "a b"),
    ("1+1=2;", "2*3=6|A6", "1+1=2;2*3=6|A6"),
    ("a\n", "", "a\n"),
    ("a\n", "\n", "a\n"),
    ("", "", ""),
  )
  def test_join(self, prefix, continuation, expected):
    self.assertEqual(prompts.join(prefix, continuation), expected)

  @parameterized.parameters(0, 1, 2)
  def test_rewrites_begin_with_the_samples_steps(self, error_step):
    kept = prompts.retained(self.STEPS, error_step)
    for reply in ("x\ny", "\nx\ny"):
      rewritten = steps.steps(prompts.join(kept, reply))
      self.assertEqual(rewritten[:error_step], list(self.STEPS[:error_step]))
      self.assertEqual(rewritten[error_step:], ["x\n", "y"])
      self.assertEqual(
        prompts.first_changed_step(self.STEPS, rewritten), error_step
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
    found = prompts.first_changed_step(
      steps.steps(sample), steps.steps(rewrite)
    )
    self.assertEqual(found, expected)


class TemplateTest(parameterized.TestCase):
  def test_compact(self):
    template = prompts.TEMPLATES["compact"]
    sample_steps = ["12+5=18|", "3*18=54;", "A54"]
    gold = "12+5=17;3*17=51|A51"
    self.assertEqual(
      template.locate_prompt("Q12+5*3", gold, sample_steps),
      "Q12+5*3G12+5=17;3*17=51|A51P12+5=18|3*18=54;A54L",
    )
    self.assertEqual(template.locate_target(12), "12")
    self.assertEqual(
      template.rewrite_prompt("Q12+5*3", gold, "".join(sample_steps)),
      "Q12+5*3G12+5=17;3*17=51|A51P12+5=18|3*18=54;A54R",
    )

  def test_instruction(self):
    template = prompts.TEMPLATES["instruction"]
    prompt = template.locate_prompt("How many?", GOLD, ["a 25\n", "#### 25"])
    self.assertIn("[0] a 25\n[1] #### 25\n", prompt)
    self.assertIn("another way than the reference", " ".join(prompt.split()))
    self.assertEqual(template.locate_target(3), "The first error step is [3]")
    prompt = template.rewrite_prompt("How many?", GOLD, "a 25\n#### 25")
    for text in ("How many?", GOLD, "a 25\n#### 25", "another way than the"):
      self.assertIn(text, prompt)
    self.assertNotIn("[0]", prompt)
    self.assertEndsWith(prompt, "Correct prediction:\n")

  @parameterized.parameters(*prompts.TEMPLATES)
  def test_what_is_kept_stands_where_the_rewrite_begins(self, name):
    """A model meets kept steps as it has met them in training."""
    template = prompts.TEMPLATES[name]
    prompt = template.rewrite_prompt("q", "g", "a\nb")
    self.assertEqual(
      template.rewrite_prompt("q", "g", "a\nb", "a\n"), f"{prompt}a\n"
    )

  @parameterized.parameters(*prompts.TEMPLATES)
  def test_reads_its_own_target(self, name):
    template = prompts.TEMPLATES[name]
    for step in (0, 1, 9, 10, 123):
      self.assertEqual(
        template.parse_location(template.locate_target(step)), step
      )
    with self.assertRaisesRegex(ValueError, "got -1"):
      template.locate_target(-1)

  @parameterized.parameters(*prompts.TEMPLATES)
  def test_braces_are_texts(self, name):
    template = prompts.TEMPLATES[name]
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

    start = prompts.__doc__.index("  def teacher")
    end = prompts.__doc__.index("What a teacher returns")
    names = {"prompts": prompts, "steps": steps, "ask": ask}
    lines = prompts.__doc__[start:end].splitlines()
    exec("\n".join(line[2:] for line in lines), names)
    wrong = "In May 24 clips.\nShe sold 48+24 = 74 clips.\n#### 74"
    self.assertEqual(
      names["teacher"]("q", GOLD, wrong),
      "In May 24 clips.\nShe sold 48+24 = 72 clips.\n#### 72",
    )
    self.assertEndsWith(asked[1], "Correct prediction:\nIn May 24 clips.\n")


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
  COMPACT = prompts.TEMPLATES["compact"]

  def _records(self, rows, **options):
    options = {"seed": 0} | options
    return prompts.reward_model_records(rows, self.COMPACT, **options)

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
    rows = prompts.at_most_right(rows, 1, seed=0)
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
    kept, counts = prompts.distinct(rows)
    self.assertEqual(kept, [rows[i] for i in (0, 2, 4, 5)])
    self.assertEqual(counts, {"unfinished": 1, "duplicate": 1, "kept": 4})

  def test_samples_without_any_end_are_an_error(self):
    rows = [{"prompt": "q", "response": "#7", "finished": False}]
    with self.assertRaisesRegex(ValueError, "None of the 1 samples has an end"):
      prompts.distinct(rows)
    self.assertEqual(prompts.distinct([])[0], [])

  def test_at_most_right(self):
    rows = [
      {"prompt": prompt, "is_right": is_right, "response": str(i)}
      for i, (prompt, is_right) in enumerate(
        [("q", True), ("q", False), ("r", True)] * 10
      )
    ]
    kept = prompts.at_most_right(rows, 2, seed=0)
    counts = collections.Counter((r["prompt"], r["is_right"]) for r in kept)
    self.assertEqual(counts, {("q", True): 2, ("q", False): 10, ("r", True): 2})
    self.assertEqual(kept, sorted(kept, key=lambda row: int(row["response"])))
    self.assertEqual(kept, prompts.at_most_right(rows, 2, seed=0))
    self.assertGreater(
      len({str(prompts.at_most_right(rows, 2, seed=s)) for s in range(5)}), 1
    )
    self.assertEqual(prompts.at_most_right(rows, 0, seed=0), rows)
    self.assertEqual(prompts.at_most_right(rows, 10, seed=0), rows)
    with self.assertRaisesRegex(ValueError, "got -1"):
      prompts.at_most_right(rows, -1, seed=0)


if __name__ == "__main__":
  absltest.main()
