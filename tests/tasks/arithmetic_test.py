import collections
import itertools
import math
import pathlib
import tempfile
import time

import hypothesis
import hypothesis.strategies as st
import numpy as np
import transformers
from absl.testing import parameterized

from rljax.tasks import arithmetic
from rljax.text import batches, tokens

INFINITE = 2 / (1 + math.exp(50))  # The reward of e = 500: 3.9e-22.


def _value(expression):
  return sum(map(int, expression.split("+")))


def _reward(error):
  return 2 / (1 + np.exp(np.minimum(error, 500) / 10))


def _values_of_all_problems():
  """The values that problems can have, and their exact probabilities."""
  counts = collections.Counter()
  for operands in itertools.product(range(11), repeat=5):
    counts[_value("+".join(map(str, operands))[:10].removesuffix("+"))] += 1
  values = np.array(sorted(counts))
  return values, np.array([counts[v] for v in values]) / 11**5


class ProblemTest(parameterized.TestCase):
  def test_facts(self):
    rng = np.random.default_rng(0)
    problems = [arithmetic.problem(rng) for _ in range(100_000)]
    values = np.array([_value(problem) for problem in problems])
    self.assertAlmostEqual(values.mean(), 24.55, delta=0.1)
    self.assertAlmostEqual(values.std(), 6.67, delta=0.05)
    self.assertEqual(np.median(values), 25)
    self.assertBetween(values.max(), 44, 46)
    five = np.mean([problem.count("+") == 4 for problem in problems])
    self.assertAlmostEqual(five, 0.957, delta=0.003)
    self.assertTrue(all(9 <= len(problem) <= 10 for problem in problems))

  def test_exact_distribution(self):
    values, shares = _values_of_all_problems()
    # 10+9+9+9+9 fills the ten characters.
    self.assertEqual((values.min(), values.max(), len(values)), (0, 46, 47))
    self.assertEqual(values[shares.argmax()], 25)
    self.assertAlmostEqual(shares.max(), 0.058, delta=5e-4)
    self.assertAlmostEqual(-shares @ np.log(shares), 3.313, delta=2e-3)


class WorkOutTest(parameterized.TestCase):
  def test_hand_computed(self):
    rng = np.random.default_rng(0)
    chains = {arithmetic.work_out("4+6+10", rng) for _ in range(50)}
    self.assertEqual(chains, {"4+6+10=10+10=20", "4+6+10=4+16=20"})

  def test_products_come_first(self):
    rng = np.random.default_rng(0)
    chains = {arithmetic.work_out("2+3*4", rng) for _ in range(20)}
    self.assertEqual(chains, {"2+3*4=2+12=14"})

  def test_reductions_are_uniform(self):
    rng = np.random.default_rng(0)
    first = collections.Counter(
      arithmetic.work_out("1+2+4+8", rng).split("=")[1] for _ in range(3000)
    )
    self.assertLen(first, 3)
    for count in first.values():
      self.assertAlmostEqual(count / 3000, 1 / 3, delta=0.04)

  @hypothesis.given(
    seed=st.integers(0, 2**32 - 1),
    numbers=st.lists(st.integers(0, 10), min_size=1, max_size=5),
    signs=st.lists(st.sampled_from("+*"), min_size=5, max_size=5),
  )
  def test_every_chain_is_right(self, seed, numbers, signs):
    expression = "".join(
      f"{sign}{number}" for sign, number in zip(signs, numbers, strict=False)
    )[1:]
    chain = arithmetic.work_out(expression, np.random.default_rng(seed))
    links = chain.split("=")
    value, num_operators = arithmetic.evaluate(expression)
    self.assertLen(links, num_operators + 1)
    for i, link in enumerate(links):
      self.assertEqual(arithmetic.evaluate(link), (value, num_operators - i))

  @parameterized.parameters("", "4+", "4-2", "a+b", "-1+2", "4++2")
  def test_bad_expression(self, expression):
    with self.assertRaisesRegex(ValueError, "Expected a sum or product"):
      arithmetic.work_out(expression, np.random.default_rng(0))


class PromptsTest(parameterized.TestCase):
  def test_chain(self):
    prompts = arithmetic.prompts("train", 3, num=500)
    for prompt in prompts:
      links = prompt.split("=")
      # Ends in "=", k signs for k operators, and one operator to go.
      self.assertEqual(links[-1], "")
      self.assertLen(links, links[0].count("+") + 1)
      self.assertEqual(links[-2].count("+"), 1)
      self.assertLen({_value(link) for link in links[:-1]}, 1)

  def test_last_is_the_end_of_chain(self):
    chains = arithmetic.prompts("test", 0, num=50)
    lasts = arithmetic.prompts("test", 0, num=50, style="last")
    self.assertEqual(lasts, [c.split("=")[-2] + "=" for c in chains])

  def test_expression_is_the_start_of_chain(self):
    chains = arithmetic.prompts("test", 0, num=50)
    starts = arithmetic.prompts("test", 0, num=50, style="expression")
    self.assertEqual(starts, [c.split("=")[0] + "=" for c in chains])

  def test_same_length_after_padding(self):
    tokenizer = arithmetic.word_tokenizer()
    texts = arithmetic.prompts("train", 0, num=64)
    ids, mask = batches.pad_left(
      tokens.encode_prompts(tokenizer, texts, max_length=63),
      length=63,
      pad_id=tokenizer.pad_token_id,
    )
    self.assertEqual(ids.shape, (64, 63))
    self.assertTrue((ids[:, -1] == 102).all())
    starts = np.argmax(mask, axis=1)
    self.assertTrue((ids[np.arange(64), starts] == 103).all())
    self.assertTrue((ids[~mask] == 105).all())

  def test_splits_share_no_problem(self):
    problems = [
      {p.split("=")[0] for p in arithmetic.prompts(split, seed, num=num)}
      for split, num in (("train", 8000), ("validation", 1000), ("test", 1000))
      for seed in (0, 1)
    ]
    for i, j in itertools.combinations(range(6), 2):
      if i // 2 != j // 2:
        self.assertEmpty(problems[i] & problems[j])

  def test_seeds_and_prefixes(self):
    prompts = arithmetic.prompts("train", 5, num=40)
    self.assertEqual(prompts[:10], arithmetic.prompts("train", 5, num=10))
    self.assertNotEqual(prompts, arithmetic.prompts("train", 6, num=40))

  @parameterized.parameters("chain", "last")
  def test_holdout(self, style):
    def pairs(split):
      prompts = arithmetic.prompts(split, 0, num=600, style=style, holdout=0.3)
      return {
        frozenset(map(int, prompt.split("=")[-2].split("+")))
        for prompt in prompts
      }

    self.assertEmpty(pairs("train") & pairs("test"))
    self.assertEmpty(pairs("train") & pairs("validation"))

  @parameterized.parameters(
    (dict(split="dev"), "split must be one of"),
    (dict(style="whole"), "style must be one of"),
    (dict(num=-1), "must be >= 0"),
    (dict(holdout=1.0), r"holdout must lie in \[0, 1\)"),
    (dict(holdout=0.1, style="expression"), "holdout needs a prompt"),
    (dict(split="test", holdout=1e-9), "leaves the split 'test' without"),
  )
  def test_bad_settings(self, settings, message):
    with self.assertRaisesRegex(ValueError, message):
      arithmetic.prompts(**{"split": "train", "seed": 0, "num": 3, **settings})


class SolutionTest(parameterized.TestCase):
  @parameterized.parameters(*arithmetic.STYLES)
  def test_supervised_pairs_earn_the_maximum(self, style):
    pairs = arithmetic.supervised("train", 1, num=100, style=style)
    self.assertEqual(
      [prompt for prompt, _ in pairs],
      arithmetic.prompts("train", 1, num=100, style=style),
    )
    for prompt, response in pairs:
      reward, parts = arithmetic.score(prompt, response)
      self.assertEqual(reward, 1.0)
      self.assertTrue(parts["is_correct"])
      self.assertEqual(parts["answer"], parts["truth"])

  @parameterized.parameters(*arithmetic.STYLES)
  def test_solutions_earn_the_maximum(self, style):
    rng = np.random.default_rng(0)
    for prompt in arithmetic.prompts("test", 0, num=100, style=style):
      response = arithmetic.solution(prompt, rng)
      self.assertEqual(arithmetic.score(prompt, response)[0], 1.0)

  def test_whole(self):
    pairs = arithmetic.supervised("train", 1, num=5)
    whole = arithmetic.supervised("train", 1, num=5, whole=True)
    self.assertEqual(whole, [("", prompt + answer) for prompt, answer in pairs])


class ScoreTest(parameterized.TestCase):
  @parameterized.parameters(
    (0, 1.0),
    (1, 0.95004),
    (2, 0.90033),
    (3, 0.85111),
    (5, 0.75508),
    (10, 0.53788),
    (20, 0.23841),
    (30, 0.09485),
    (50, 0.01339),
  )
  def test_table(self, error, expected):
    for answer in (30 + error, 30 - error):
      reward, parts = arithmetic.score("4+16+10=20+10=", str(answer))
      self.assertAlmostEqual(reward, expected, delta=5e-6)
      self.assertEqual(parts["error"], error)
      self.assertEqual(parts["is_correct"], error == 0)
      self.assertEqual((parts["answer"], parts["truth"]), (answer, 30))
      self.assertEqual(parts["format"], 1.0)

  @parameterized.parameters("530", "999999", "", "x")
  def test_error_is_capped(self, response):
    reward, parts = arithmetic.score("20+10=", response)
    np.testing.assert_allclose(reward, 3.9e-22, rtol=0.02)
    self.assertEqual(parts["error"], 500)

  @parameterized.parameters(
    ("6*7*9=42*9=", "378", 1.0),
    ("6*7*9=42*9=", "377", 0.95004),
    ("6*7*9=", "378", INFINITE),  # Too few operators in the first step.
    ("6*7*9=!42*9=", "378", INFINITE),
    ("6*7*9=42*9=", "378=", INFINITE),  # A trailing sign.
    ("6*7*9=42*9=", "378=378", INFINITE),
    ("6*7*9=", "42*9=378", 1.0),
    ("6*7*9=", "6*63=378", 1.0),
    ("6*7*9=", "42*9", INFINITE),  # Stops before the answer: ours.
    ("1+1+1=", "1+3=4", 0.90033),  # Errors of 1 and 1 add up.
    ("1+1+1=1+3=", "4", 0.90033),
    ("1+1+1=1+3=", "3", 0.95004),  # A right answer to a wrong step.
    (" 2 0+1 0 = ", " 3 0\n", 1.0),
    ("3-5=", "-2", 1.0),
    ("7/2=", "3.5", 1.0),
    ("2**3**2=2**9=", "512", 1.0),
    ("", "", INFINITE),
    ("", "5", INFINITE),
    ("a+b=", "5", INFINITE),
  )
  def test_chains(self, prompt, response, expected):
    reward, _ = arithmetic.score(prompt, response)
    np.testing.assert_allclose(reward, expected, rtol=5e-6)

  # Each of these once broke some scorer. The right answer is 7.
  GOLDEN = (
    "[" * 1_000_000,
    "(" * 1_000_000,
    "(" * 500 + "7" + ")" * 500,
    "-" * 1000 + "7",
    "7" + " " * 1_000_000 + "8",
    "7" * 1_000_000,
    "=" * 1_000_000,
    "9**9**9",
    "9**9**9**9",
    "(9**9)**(9**9)",
    "2**-9**9",
    "*".join(["9" * 15] * 60),
    "**".join(["2"] * 300),
    "0**-1",
    "(-8)**0.5",
    "7/0",
    "1e309",
    "7e0",
    "1" + "0" * 400,
    "²٣",
    "٧",
    "７",
    "nan",
    "NaN",
    "inf",
    "-inf",
    "Infinity",
    "7j",
    "0x7",
    "0b111",
    "7_",
    "1_0",
    "007",
    "+7",
    "--7",
    "-(-7)",
    "3+4",
    "~7",
    "7 if 1 else 0",
    "7;7",
    "7,0",
    "7\n8",
    "7.",
    ".7",
    "7)",
    "(7",
    "True",
    "None",
    "[7]",
    "'7'",
    "int('7')",
    "__import__('os')",
    "__import__('os').system('true')",
    "lambda:7",
    "",
    "\0",
    "7\0",
    "\ud800",
    "7=7",
    "=7",
    "7=",
    "3+4=7",
    "7 or 8 or 9",
    "8-1",
    "seven",
    "7\u200b",
  )

  @parameterized.parameters(*range(len(GOLDEN)))
  def test_golden(self, index):
    response = self.GOLDEN[index]
    for parse in ("faithful", "leading_integer"):
      start = time.process_time()
      reward, parts = arithmetic.score("3+4=", response, parse=parse)
      self.assertLess(time.process_time() - start, 0.05)
      self.assertTrue(math.isfinite(reward) and math.isfinite(parts["error"]))
      if parse == "faithful":
        self.assertEqual(reward, INFINITE)
        self.assertFalse(parts["is_correct"])

  def test_golden_as_a_prompt(self):
    for prompt in self.GOLDEN:
      start = time.process_time()
      reward, _ = arithmetic.score(f"{prompt}=", "7")
      self.assertLess(time.process_time() - start, 0.05)
      self.assertBetween(reward, 0, 1)

  @parameterized.parameters(
    ("7", 7),
    (" 7.", 7),
    ("7\n8", 7),
    ("7 or 8", 7),
    ("7, I think", 7),
    ("7=7", 7),
    ("-7)", -7),
    ("7+1", 7),
    ("7.5", None),
    ("7,500", None),
    ("7th", None),
    ("7_0", None),
    ("7²", None),
    ("07", None),
    ("the answer is 7", None),
    ("--7", None),
    ("7" * 16, None),
  )
  def test_leading_integer(self, response, answer):
    reward, parts = arithmetic.score("3+4=", response, parse="leading_integer")
    self.assertEqual(parts["answer"], answer)
    self.assertEqual(parts["format"], float(answer is not None))
    expected = INFINITE if answer is None else _reward(abs(answer - 7))
    self.assertAlmostEqual(reward, expected)

  def test_unknown_parse(self):
    with self.assertRaisesRegex(ValueError, "parse must be"):
      arithmetic.score("3+4=", "7", parse="eval")

  @hypothesis.given(response=st.text(max_size=60))
  def test_any_text_scores(self, response):
    reward, parts = arithmetic.score("3+4=", response)
    self.assertBetween(reward, INFINITE, 1)
    self.assertEqual(parts["is_correct"], reward == 1)

  @hypothesis.given(
    response=st.text("0123456789+-*/=(). ", min_size=1, max_size=12)
  )
  def test_evaluates_as_python_does(self, response):
    # Our language is a part of Python's, so that on this alphabet, which is
    # safe to evaluate, both must agree wherever ours has a value.
    try:
      value, _ = arithmetic.evaluate(response)
    except ValueError:
      return
    np.testing.assert_allclose(value, eval(response))

  @parameterized.parameters(
    ("1+2*3", 7, 2),
    ("(1+2)*3", 9, 2),
    ("2**3**2", 512, 2),
    ("-2**2", -4, 2),
    ("2**-1", 0.5, 1),
    ("8/2/2", 2, 2),
    ("5-3-1", 1, 2),
    ("-5", -5, 0),
    ("--5", 5, 1),
    ("5--3", 8, 1),
    ("0.5*4", 2, 1),
  )
  def test_evaluate(self, expression, value, num_operators):
    self.assertEqual(arithmetic.evaluate(expression), (value, num_operators))

  @parameterized.parameters(
    "(-8)**0.5",
    "0**-1",
    "7/0",
    "0.5**65",
    "2**64",
    "1000000000000001",
    "1e309",
    "(" * 40 + "7" + ")" * 40,
    "-" * 40 + "7",
    "2**" * 40 + "1",
    "(7",
    "7)",
    "7 8",
    "7+",
    "**7",
    "",
    "1" * 1025,
  )
  def test_not_evaluable(self, expression):
    with self.assertRaises(ValueError):
      arithmetic.evaluate(expression)

  @parameterized.parameters(
    ("3+4=", "99", 1.0),
    ("3+4=", "-1", 1.0),
    ("3+4=", "7=8", 1.0),
    ("3+4=", "7=", 0.0),
    ("3+4=", "+", 0.0),
    ("3+4=", "7.0", 0.0),
    ("3+4=", "", 0.0),
    ("3+4", "", 0.0),
    ("3+4=", "٧", 0.0),
  )
  def test_format_score(self, prompt, response, expected):
    reward, parts = arithmetic.format_score(prompt, response)
    self.assertEqual((reward, parts["format"]), (expected, expected))


class LandmarksTest(parameterized.TestCase):
  def test_constant_and_uniform_policies(self):
    rng = np.random.default_rng(0)
    counts = collections.Counter(
      _value(arithmetic.problem(rng)) for _ in range(100_000)
    )

    def mean_reward(answer):
      # A prompt with the same value stands for all of them.
      return sum(
        count * arithmetic.score(f"0+{value}=", str(answer))[0]
        for value, count in counts.items()
      ) / sum(counts.values())

    self.assertAlmostEqual(mean_reward(25), 0.748, delta=0.002)
    uniform = np.mean([mean_reward(answer) for answer in range(100)])
    self.assertAlmostEqual(uniform, 0.258, delta=0.003)

  def test_landmarks(self):
    values, shares = _values_of_all_problems()

    def landmark(policy, answers):
      rewards = _reward(np.abs(values[:, None] - answers))
      right = values[:, None] == answers
      entropy = -policy @ np.log(np.maximum(policy, 1e-300))
      return shares @ rewards @ policy, shares @ right @ policy, entropy

    numbers = np.arange(100)
    uniform = landmark(np.full(100, 0.01), numbers)
    expected = {
      "uniform over 106 ids": (
        uniform[0] / 1.06,
        uniform[1] / 1.06,
        math.log(106),
      ),
      "uniform over 0..99": uniform,
      "true answers of other prompts": landmark(shares, values),
      "always 25": landmark(np.ones(1), np.array([25])),
      "exact": (1, 1, -shares @ np.log(shares)),
    }
    self.assertEqual(set(expected), set(arithmetic.LANDMARKS))
    for name, numbers in expected.items():
      np.testing.assert_allclose(
        arithmetic.LANDMARKS[name], numbers, atol=5e-4, err_msg=name
      )

  def test_entropy_of_right_answers_in_a_batch(self):
    values, shares = _values_of_all_problems()
    rng = np.random.default_rng(0)
    entropies = []
    for _ in range(200):
      counts = np.bincount(rng.choice(values, 128, p=shares)) / 128
      counts = counts[counts > 0]
      entropies.append(-counts @ np.log(counts))
    self.assertAlmostEqual(np.mean(entropies), 3.16, delta=0.02)

  def test_staircase(self):
    values, shares = _values_of_all_problems()
    num = len(values)
    rewards = shares[:, None] * _reward(np.abs(values[:, None] - values))
    sums = np.concatenate([np.zeros((1, num)), np.cumsum(rewards, axis=0)])
    # Answers split the values into intervals; best[j] is the best reward on
    # the first j values with as many answers as the loop has come to.
    best = np.array([0.0] + [-np.inf] * num)
    for num_answers in range(1, 9):
      best = np.array(
        [-np.inf]
        + [
          max(best[i] + (sums[j] - sums[i]).max() for i in range(j))
          for j in range(1, num + 1)
        ]
      )
      self.assertAlmostEqual(
        arithmetic.STAIRCASE[num_answers], best[num], delta=1e-4
      )


class TokenizerTest(parameterized.TestCase):
  def _reload(self, tokenizer):
    with tempfile.TemporaryDirectory() as folder:
      tokenizer.save_pretrained(pathlib.Path(folder))
      return transformers.AutoTokenizer.from_pretrained(folder)

  def test_word_ids(self):
    tokenizer = arithmetic.word_tokenizer()
    for same in (tokenizer, self._reload(tokenizer)):
      self.assertLen(same, 106)
      self.assertEqual(same.encode("10+9*0="), [103, 10, 100, 9, 101, 0, 102])
      self.assertEqual(
        (same.bos_token_id, same.eos_token_id, same.pad_token_id),
        (103, 104, 105),
      )
      self.assertEqual(same.decode([20, 100, 10, 102, 30]), "20+10=30")
      self.assertIsNone(same.unk_token_id)

  def test_character_ids(self):
    tokenizer = arithmetic.character_tokenizer()
    for same in (tokenizer, self._reload(tokenizer)):
      self.assertLen(same, 16)
      self.assertEqual(same.encode("10+9*0="), [13, 1, 0, 10, 9, 11, 0, 12])
      self.assertEqual(
        (same.bos_token_id, same.eos_token_id, same.pad_token_id),
        (13, 14, 15),
      )

  def test_unused_ids_decode_to_nothing(self):
    tokenizer = arithmetic.word_tokenizer()
    self.assertEqual(tokenizer.decode([106, 107, 108]), "")

  @parameterized.parameters("100+2=", "1 + 2=", "1-2=", "007=", "٣+1=")
  def test_unknown_words_raise(self, text):
    with self.assertRaisesRegex(ValueError, "cannot encode"):
      tokens.encode_prompts(arithmetic.word_tokenizer(), [text], max_length=9)

  @hypothesis.given(
    seed=st.integers(0, 10_000), split=st.sampled_from(arithmetic.SPLITS)
  )
  def test_round_trip(self, seed, split):
    (pair,) = arithmetic.supervised(split, seed, num=1)
    for tokenizer in (WORDS, CHARACTERS):
      ids = tokenizer.encode("".join(pair), add_special_tokens=False)
      self.assertEqual(tokenizer.decode(ids), "".join(pair))
      self.assertLess(len(ids), 63 if tokenizer is WORDS else 80)

  def test_answers_are_one_word(self):
    rows = tokens.encode_pairs(
      WORDS,
      arithmetic.supervised("train", 0, num=50),
      max_prompt_length=63,
      max_response_length=2,
    )
    self.assertTrue(all(response[1] == 104 for _, response in rows))


WORDS = arithmetic.word_tokenizer()
CHARACTERS = arithmetic.character_tokenizer()
