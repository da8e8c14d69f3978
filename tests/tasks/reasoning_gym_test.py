import collections
import itertools
import json
import re
import sys
import time
from unittest import mock

import numpy as np
import pytest
from absl.testing import parameterized

from rljax import tasks
from rljax.evaluation import answers
from rljax.tasks import reasoning_gym
from rljax.text import keywords, tokens

pytest.importorskip("reasoning_gym")

TINY = dict(generator="chain_sum", min_terms=2, max_terms=2, max_digits=1)
SUMS = dict(generator="chain_sum", template="{expression}=")


def _entry(prompt):
  return reasoning_gym._drawn[prompt][1]


def _one(generator, **options):
  """A prompt of a generator, and its problem."""
  (prompt,) = reasoning_gym.prompts(
    "train", 0, num=1, generator=generator, **options
  )
  return prompt, _entry(prompt)


class PromptsTest(parameterized.TestCase):
  def test_questions_and_expressions(self):
    questions = reasoning_gym.prompts("train", 0, num=20)
    for prompt in questions:
      self.assertEqual(prompt, _entry(prompt)["question"])
    for prompt in reasoning_gym.prompts("train", 0, num=20, **SUMS):
      self.assertRegex(prompt, r"^\d+( [+-] \d+)+=$")
      self.assertEqual(
        int(_entry(prompt)["answer"]),
        sum(map(int, re.sub(r" ([+-]) ", r" \1", prompt[:-1]).split())),
      )

  def test_options_reach_the_generator(self):
    for prompt in reasoning_gym.prompts(
      "test", 0, num=20, min_terms=3, max_terms=3, max_digits=1, **SUMS
    ):
      self.assertRegex(prompt, r"^\d [+-] \d [+-] \d=$")
    for prompt in reasoning_gym.prompts(
      "test", 0, num=10, generator="basic_arithmetic", operators="+ *",
      template="{expression}", allow_parentheses=False, allow_negation=False,
    ):  # fmt: skip
      self.assertNotRegex(prompt, r" [-/] |\(")

  def test_seeds_and_prefixes(self):
    # More than the 1024 problems of one data set.
    prompts = reasoning_gym.prompts("train", 5, num=700, **SUMS)
    self.assertLen(set(prompts), 700)
    self.assertEqual(
      prompts[:30], reasoning_gym.prompts("train", 5, num=30, **SUMS)
    )
    # Neighbouring seeds have nothing in common but chance hits.
    other = reasoning_gym.prompts("train", 6, num=700, **SUMS)
    self.assertLess(len(set(prompts) & set(other)), 70)
    self.assertEqual(reasoning_gym.prompts("train", 5, num=0), [])

  def test_splits_share_no_prompt_of_a_tiny_range(self):
    # 200 problems: "a + b" and "a - b" with one digit each.
    parts = collections.defaultdict(set)
    for seed, split in itertools.product((0, 1), reasoning_gym.SPLITS):
      with self.assertRaisesRegex(ValueError, "has [0-9]+ different") as caught:
        reasoning_gym.prompts(
          split, seed, num=201, template="{expression}=", **TINY
        )
      num = int(re.search(r"has (\d+)", str(caught.exception))[1])
      prompts = reasoning_gym.prompts(
        split, seed, num=num, template="{expression}=", **TINY
      )
      self.assertLen(set(prompts), num)
      parts[split] |= set(prompts)
    sizes = [len(parts[split]) for split in reasoning_gym.SPLITS]
    self.assertEqual(sum(sizes), 200)
    # Half, a quarter and a quarter, within three standard deviations.
    np.testing.assert_allclose(sizes, [100, 50, 50], atol=21)
    self.assertLen(set().union(*parts.values()), 200)

  @parameterized.parameters(
    (dict(split="dev"), "split must be one of"),
    (dict(num=-1), "must be >= 0"),
    (dict(seed=-1), "must be >= 0"),
    (dict(generator="chess"), "Unknown generator 'chess'; .*chain_sum, "),
    (dict(terms=3), "'chain_sum' has no option 'terms'; it has min_terms, "),
    (dict(size=3), "no option 'size'"),
    (dict(max_terms=0), "does not accept .*: max_terms must be >= min_t"),
    (dict(max_terms="three"), "does not accept the options"),
    (dict(template="Sum:"), r"template must hold \{question\}"),
    (dict(template="{answer}"), "nothing else in curly brackets"),
    (dict(template="{question.__class__}"), "nothing else in curly brackets"),
    (dict(template="{question!r}"), "nothing else in curly brackets"),
    (dict(template="{question"), "template is '{question': "),
    (
      dict(generator="gcd", template="{expression}"),
      "'gcd' have no expression",
    ),
    (
      dict(generator="countdown", template="{expression}"),
      "'countdown' is the answer; use {question}",
    ),
    (dict(generator="rush_hour"), "cannot be used: it gives no answers"),
    (dict(generator="puzzle24"), "cannot be used: its scorer accepts any numb"),
    (dict(generator="composite"), "cannot be used: its parts"),
    (dict(generator="coin_flip"), "cannot be used: its scorer accepts any pre"),
    (
      dict(generator="number_sorting", direction="up"),
      "no option 'direction'",
    ),
    (
      dict(generator="letter_counting", min_words="few"),
      "does not accept",
    ),
  )
  def test_bad_settings(self, settings, message):
    settings = {"split": "train", "seed": 0, "num": 3, **settings}
    with self.assertRaisesRegex(ValueError, message):
      reasoning_gym.prompts(**settings)

  def test_missing_package(self):
    message = "pip install reasoning-gym"
    self.enter_context(mock.patch.dict(sys.modules, {"reasoning_gym": None}))
    with self.assertRaisesRegex(ValueError, message):
      reasoning_gym.prompts("train", 0, num=1)

  def test_two_truths(self):
    options = dict(SUMS, num=1, max_digits=2)
    (prompt,) = reasoning_gym.prompts("train", 7, **options)
    dataset, entry = reasoning_gym._drawn[prompt]
    other = {prompt: (dataset, {**entry, "answer": "12345"})}
    self.enter_context(mock.patch.dict(reasoning_gym._drawn, other))
    with self.assertRaisesRegex(ValueError, "has the answers '12345' and"):
      reasoning_gym.prompts("train", 7, **options)
    # One that is as right is no other truth.
    other[prompt][1]["answer"] = f"{entry['answer']}.0"
    self.assertEqual(reasoning_gym.prompts("train", 7, **options), [prompt])

  def test_problems_that_nobody_can_solve_are_left_out(self):
    prompts = reasoning_gym.prompts("train", 9, num=40, **SUMS)
    dataset, entry = reasoning_gym._drawn[prompts[0]]
    # A scorer that does not see signs, as that of gsm_symbolic.
    self.enter_context(
      mock.patch.object(
        type(dataset),
        "score_answer",
        lambda self, answer, entry: float(answer == entry["answer"].strip("-")),
      )
    )
    solvable = [p for p in prompts if int(_entry(p)["answer"]) >= 0]
    self.assertBetween(len(solvable), 10, 39)
    with self.assertLogs(level="WARNING") as logs:
      found = reasoning_gym.prompts("train", 9, num=len(solvable), **SUMS)
    self.assertEqual(found, solvable)
    self.assertRegex(
      logs.output[0], "[0-9]+ problems of chain_sum are left out"
    )
    # An equation without solutions, for which "none at all" would be right.
    is_answerable = reasoning_gym._is_answerable
    self.assertFalse(is_answerable(dataset, {**entry, "answer": ""}))

  def test_unrepeatable_generators_warn(self):
    with self.assertLogs(level="WARNING") as logs:
      reasoning_gym.prompts("train", 0, num=1, generator="ransom_note")
    self.assertRegex(logs.output[0], "unless PYTHONHASHSEED is set")


class SupervisedTest(parameterized.TestCase):
  def test_worked_solutions(self):
    pairs = reasoning_gym.supervised("validation", 0, num=60)
    self.assertEqual(
      [prompt for prompt, _ in pairs],
      reasoning_gym.prompts("validation", 0, num=60, generator="gsm_symbolic"),
    )
    for prompt, response in pairs:
      self.assertRegex(response, "#### [0-9.]+$")
      reward, parts = reasoning_gym.score(prompt, response, answer_after="####")
      self.assertEqual(reward, 1.0)
      self.assertEqual(parts["answer"], parts["truth"])

  def test_contradictions_are_left_out(self):
    prompts = reasoning_gym.prompts("train", 1, num=5, generator="gsm_symbolic")
    entry = _entry(prompts[2])
    metadata = {**entry["metadata"], "answer_cot": "Well,\n#### 1234567"}
    dataset = reasoning_gym._drawn[prompts[2]][0]
    wrong = {prompts[2]: (dataset, {**entry, "metadata": metadata})}
    self.enter_context(mock.patch.dict(reasoning_gym._drawn, wrong))
    with self.assertLogs(level="WARNING") as logs:
      pairs = reasoning_gym.supervised("train", 1, num=5)
    self.assertEqual([p for p, _ in pairs], prompts[:2] + prompts[3:])
    self.assertIn("1 of 5 solutions of gsm_symbolic contradict", logs.output[0])

  def test_no_solutions(self):
    with self.assertRaisesRegex(ValueError, "'gcd' has no worked solutions"):
      reasoning_gym.supervised("train", 0, num=2, generator="gcd")


class ScoreTest(parameterized.TestCase):
  @parameterized.parameters(
    ("{}", True),
    (" {}\n", True),
    ("{}.0", True),
    ("0{}", True),
    ("+{}", True),
    ("{}0", False),
    ("{}.5", False),
    ("-{}", False),
    ("The answer is {}", False),
    ("{} apples", False),
    ("{} {}", False),
    ("", False),
  )
  def test_numbers(self, form, is_correct):
    prompt, entry = _one("products")
    truth = entry["answer"]
    reward, parts = reasoning_gym.score(prompt, form.replace("{}", truth))
    self.assertEqual(reward, float(is_correct))
    self.assertIs(parts["is_correct"], is_correct)
    self.assertEqual(parts["truth"], truth)

  def test_partial_credit_counts_for_nothing(self):
    prompt, entry = _one("gcd")
    dataset, _ = reasoning_gym._drawn[prompt]
    near = entry["answer"] + "0"
    self.assertGreater(dataset.score_answer(answer=near, entry=entry), 0.3)
    self.assertEqual(reasoning_gym.score(prompt, near)[0], 0.0)

  @parameterized.parameters(
    ("7", "7"),
    ("+007.50", "7.5"),
    ("-0012", "-12"),
    ("-0", "0"),
    ("0.0", "0"),
    ("-0.50", "-0.5"),
    ("1,234", "1234"),
    (" a  b\nc ", "a b c"),
    ("٣", "٣"),
    ("7.", "7"),
    (".5", ".5"),
    ("", ""),
  )
  def test_normalized(self, text, expected):
    self.assertEqual(reasoning_gym._normalized(text), expected)

  def test_answers_vote(self):
    prompt, entry = _one("products")
    truth = entry["answer"]
    for response, answer in (
      (f"+0{truth}.0", truth),
      (f"0{truth}1", f"{truth}1"),
      ("many", None),
      ("", None),
      (f"{truth} apples", None),
    ):
      _, parts = reasoning_gym.score(prompt, response)
      self.assertEqual(parts["answer"], answer)
    # This scorer takes no other text: what is wrong must not vote as right.
    prompt, entry = _one("leg_counting")
    _, parts = reasoning_gym.score(prompt, f"0{entry['answer']}")
    self.assertFalse(parts["is_correct"])
    self.assertIsNone(parts["answer"])
    prompt, entry = _one("spell_backward")
    _, parts = reasoning_gym.score(prompt, " some  word")
    self.assertEqual(parts["answer"], "some word")
    # Another right answer votes for the same.
    prompt, entry = _one("countdown")
    response = f"({entry['answer']})"
    _, parts = reasoning_gym.score(prompt, response)
    self.assertTrue(parts["is_correct"])
    self.assertEqual(parts["answer"], parts["truth"])

  @parameterized.parameters(
    ("steps #### {}", "####", True),
    ("#### 1 #### {}", "####", True),
    ("####{}\n", "####", True),
    ("{}", "####", False),
    ("#### {} ####", "####", False),
    ("11\n#{}", "#", True),
    ("#### {}", "", False),
  )
  def test_answer_after(self, form, marker, is_correct):
    prompt, entry = _one("leg_counting")
    reward, parts = reasoning_gym.score(
      prompt, form.replace("{}", entry["answer"]), answer_after=marker
    )
    self.assertEqual(reward, float(is_correct))
    self.assertEqual(parts["answer"], entry["answer"] if is_correct else None)

  @parameterized.parameters(*reasoning_gym.ALPHABETS)
  def test_alphabets_let_right_answers_through(self, generator):
    options = {"countdown": dict(max_numbers=4)}.get(generator, {})
    for prompt in reasoning_gym.prompts(
      "test", 0, num=3, generator=generator, **options
    ):
      answer = _entry(prompt)["answer"]
      reward, parts = reasoning_gym.score(prompt, answer)
      self.assertEqual((reward, parts["error"]), (1.0, None), answer)

  # A beginning of the truth that is right says the same with fewer digits,
  # signs or units.
  ABBREVIATED = {
    "advanced_geometry": "(-8.000, 0",
    "decimal_arithmetic": "2.8163 for 2.81633281972",
    "decimal_chain_sum": "8142.3 for 8142.30",
    "fraction_simplification": "no closing $",
    "knights_knaves": "no full stop",
    "number_format": "917760785.49 for 917760785.492",
    "polynomial_equations": "0 for 0.0",
    "pool_matrix": "4 for 4.0 in the end",
    "time_intervals": "95 for 95 days, 13:0 for 13:00",
  }
  # Too slow for this, or without an answer; they compare the whole text.
  SKIPPED = ("boxnet", "futoshiki", "graph_color", "knight_swap", "rush_hour",
    "sokoban", "sudoku", "zebra_puzzles")  # fmt: skip

  def test_beginnings_of_the_truth_are_wrong(self):
    from reasoning_gym import factory

    num = 0
    for generator in sorted(set(factory.DATASETS) - {*reasoning_gym.REFUSED}):
      if generator in self.SKIPPED or generator in self.ABBREVIATED:
        continue
      for prompt in reasoning_gym.prompts(
        "test", 0, num=3, generator=generator
      ):
        truth = _entry(prompt)["answer"].strip()
        for end in sorted({*range(1, min(len(truth), 10))} | {
          *range(max(1, len(truth) - 10), len(truth))
        }):  # fmt: skip
          reward, _ = reasoning_gym.score(prompt, truth[:end])
          self.assertEqual(reward, 0.0, (generator, truth[:end], truth))
          num += 1
    self.assertGreater(num, 500)

  @parameterized.parameters(
    ("{}", True),
    ("{} apples", True),
    ("-{}", False),
    ("−{}", False),
    ("- {}", False),
    ("-${}", False),
    ("minus {}", False),
    ("It is -{}", False),
    ("{} - 3", True),
  )
  def test_signs_of_gsm_symbolic(self, form, is_correct):
    prompt, entry = _one("gsm_symbolic")
    reward, _ = reasoning_gym.score(prompt, form.format(entry["answer"]))
    self.assertEqual(reward, float(is_correct))

  @parameterized.parameters(
    ("{}", True), ("{}, zebra", False), ("{},", False), ("{} zebra", False)
  )
  def test_length_of_word_sorting(self, form, is_correct):
    prompt, entry = _one("word_sorting")
    reward, _ = reasoning_gym.score(prompt, form.format(entry["answer"]))
    self.assertEqual(reward, float(is_correct))

  # What these scorers would run, work on for ever, or take for right.
  @parameterized.parameters(
    ("binary_matrix", "__import__('os').abort()"),
    ("spiral_matrix", "__import__('os').abort()"),
    ("n_queens", "[__import__('os').abort()]"),
    ("string_insertion", "__import__('os').abort()"),
    ("countdown", "__import__('os').abort()"),
    ("countdown", "9**9**9**9"),
    ("countdown", "9* *9"),
    ("countdown", "(" * 190 + "9" + ")" * 5),
    ("countdown", "1" + "-" * 198 + "1"),
    ("countdown", "factorial(99999999)"),
    ("complex_arithmetic", "nan"),
    ("number_sorting", json.dumps([float("nan")] * 8)),
    ("chain_sum", "٣"),
  )
  def test_harmful_answers(self, generator, response):
    options = dict(min_numbers=8, max_numbers=8)
    options = options if generator == "number_sorting" else {}
    prompt, _ = _one(generator, **options)
    start = time.process_time()
    reward, parts = reasoning_gym.score(prompt, response)
    self.assertLess(time.process_time() - start, 2.0)
    self.assertEqual(reward, 0.0)
    self.assertFalse(parts["is_correct"])

  GOLDEN = (
    "",
    " ",
    "\0",
    "\ud800",
    "9" * 9_999,
    "9" * 1_000_000,
    "[" * 9_999,
    "-" * 9_999,
    '{"a":' * 1_900,
    "1e999999999",
    "0x" + "f" * 9_000,
    "nan",
    "NaN",
    "-inf",
    "None",
    "9**9**9",
    "1/0",
    "1," * 4_999,
    "a\n" * 4_999,
    "x" * 10_001,
    "#" * 10_000,
    "__import__('os').abort()",
  )

  @parameterized.parameters(
    "basic_arithmetic",
    "chain_sum",
    "decimal_arithmetic",
    "dice",
    "fraction_simplification",
    "game_of_life",
    "gsm_symbolic",
    "palindrome_generation",
    "prime_factorization",
    "products",
    "simple_equations",
    "sudoku",
    "time_intervals",
  )
  def test_golden_wrong(self, generator):
    prompt, _ = _one(generator)
    for response in self.GOLDEN:
      start = time.process_time()
      reward, parts = reasoning_gym.score(prompt, response)
      self.assertLess(time.process_time() - start, 1.0)
      self.assertEqual(reward, 0.0, response[:40])
      self.assertFalse(parts["is_correct"])

  def test_length(self):
    prompt, entry = _one("leg_counting")
    blanks = 10_000 - len(entry["answer"])
    right = entry["answer"] + " " * blanks
    self.assertEqual(reasoning_gym.score(prompt, right)[0], 1.0)
    reward, parts = reasoning_gym.score(prompt, right + " ")
    self.assertEqual((reward, parts["answer"]), (0.0, None))
    self.assertIn("more than 10000 characters", parts["error"])

  def test_failing_scorers_are_counted(self):
    prompt, entry = _one("prime_factorization")
    reward, parts = reasoning_gym.score(prompt, "two × three")
    self.assertEqual(reward, 0.0)
    self.assertIn("ValueError: invalid literal", parts["error"])
    dataset, _ = reasoning_gym._drawn[prompt]
    with mock.patch.object(
      type(dataset), "score_answer", side_effect=RecursionError("deep")
    ):
      reward, parts = reasoning_gym.score(prompt, entry["answer"])
    self.assertEqual((reward, parts["error"]), (0.0, "RecursionError: deep"))

  def test_unknown_prompt(self):
    with self.assertRaisesRegex(
      ValueError, "has drawn in this process, got '2\\+2"
    ):
      reasoning_gym.score("2+2=", "4")

  def test_contract(self):
    task = tasks.load("reasoning_gym")
    prompts = task.prompts("train", 0, num=2)
    responses = [_entry(prompts[0])["answer"], "?"]
    scores, parts = tasks.score_all(task, prompts, responses)
    np.testing.assert_array_equal(scores, [1, 0])
    self.assertEqual(answers.mean_parts(parts), {"is_correct": 0.5})
    keywords.check(task.prompts, {"max_terms": 3})
    keywords.check(task.score, {"answer_after": "#"})


class TokenizerTest(parameterized.TestCase):
  def test_characters(self):
    tokenizer = reasoning_gym.character_tokenizer()
    self.assertLen(tokenizer, 99)
    self.assertEqual(tokenizer.encode(" !~\n"), [96, 0, 1, 94, 95])
    prompts = reasoning_gym.prompts("train", 0, num=10)
    ids = tokens.encode_prompts(tokenizer, prompts, max_length=200)
    for prompt, row in zip(prompts, ids, strict=True):
      self.assertLen(row, len(prompt) + 1)
      self.assertEqual(tokenizer.decode(row[1:]), prompt)
