import itertools
import math
import pathlib
import random
import re
import tempfile
import time

import hypothesis
import hypothesis.strategies as st
import numpy as np
import transformers
from absl.testing import parameterized

from rljax import tasks
from rljax.evaluation import answers
from rljax.tasks import chains
from rljax.text import alignment, batches, keywords, tokens
from rljax.text import steps as steps_lib

PROMPT = "Q12+5*3"
RIGHT = "12+5=17;3*17=51|A51"
ALPHABET = "0123456789+-*=;|A"


def _execute(prompt):
  """(left, operation, operand, result) of each step."""
  start, *moves = re.findall(r"\d+|[+*-]\d", prompt)
  value, steps = int(start), []
  for op, operand in moves:
    number = {
      "+": value + int(operand),
      "-": value - int(operand),
      "*": value * int(operand),
    }[op]
    steps.append((value, op, int(operand), number % 100))
    value = number % 100
  return steps


def _step_is_right(text, left, op, operand, result):
  sides = [f"{left}{op}{operand}"]
  if op != "-":
    sides.append(f"{operand}{op}{left}")
  return text[:-1] in [f"{side}={result}" for side in sides] and (
    text[-1:] in (";", "|")
  )


def _is_valid(prompt, response):
  steps = _execute(prompt)
  texts = re.split(r"(?<=[;|])", response)
  return (
    len(texts) == len(steps) + 1
    and all(map(_step_is_right, texts, *zip(*steps, strict=True)))
    and texts[-1] == f"A{steps[-1][-1]}"
  )


def _distances(sample, texts):
  ids = [*map(ord, sample)]
  return alignment.distances(
    [ids] * len(texts), [[*map(ord, t)] for t in texts]
  )


def _corrupted(text, rng):
  for _ in range(rng.randint(1, 3)):
    i, kind = rng.randrange(len(text) + 1), rng.random()
    new = "" if kind < 0.2 else rng.choice(ALPHABET)
    text = text[:i] + new + text[i + (kind < 0.8) :]
  # Now and then one that ends early.
  return text[: rng.randrange(len(text) + 1)] if rng.random() < 0.1 else text


def _wrong_samples(num, num_steps, seed=0):
  """Pairs of a prompt and a corrupted response that is not valid."""
  rng = random.Random(seed)
  pairs = chains.supervised("train", seed, num=num, num_steps=num_steps)
  samples = [(p, _corrupted(response, rng)) for p, response in pairs]
  return [(p, text) for p, text in samples if not _is_valid(p, text)]


class PromptsTest(parameterized.TestCase):
  def test_form(self):
    prompts = chains.prompts("train", 0, num=3000)
    self.assertLen(set(prompts), 3000)
    starts, moves = [], []
    for prompt in prompts:
      self.assertRegex(prompt, r"^Q(0|[1-9]\d?)([+*-][2-9]){2}$")
      start, *found = re.findall(r"\d+|[+*-]\d", prompt)
      starts.append(int(start))
      moves += found
    self.assertEqual(set(starts), set(range(100)))
    # Uniform on 0..99: deviation 28.9, by 3000 draws 0.53.
    self.assertAlmostEqual(np.mean(starts), 49.5, delta=2)
    _, counts = np.unique(moves, return_counts=True)
    # 250 of each, with a deviation of 16.
    self.assertLen(counts, 24)
    np.testing.assert_allclose(counts, 250, atol=70)

  @parameterized.parameters(1, 2, 3, 4, 6)
  def test_seeds_and_prefixes(self, num_steps):
    prompts = chains.prompts("test", 5, num=200, num_steps=num_steps)
    self.assertEqual(
      prompts[:30], chains.prompts("test", 5, num=30, num_steps=num_steps)
    )
    self.assertNotEqual(
      prompts, chains.prompts("test", 6, num=200, num_steps=num_steps)
    )
    self.assertLen(set(prompts), 200)
    for prompt in prompts:
      self.assertLen(_execute(prompt), num_steps)
    self.assertEqual(chains.prompts("test", 5, num=0, num_steps=num_steps), [])

  def test_splits_share_no_problem(self):
    parts = []
    for split, share in (("train", 3), ("validation", 1), ("test", 2)):
      with self.assertRaisesRegex(ValueError, "different .* of 2 steps") as e:
        chains.prompts(split, 0, num=57_600)
      num = int(re.search(r"There are (\d+)", str(e.exception))[1])
      expected = 57_600 * share / 16
      # Three standard deviations.
      tolerance = 3 * math.sqrt(expected * (1 - share / 16))
      self.assertAlmostEqual(num, expected, delta=tolerance)
      self.assertGreater(num, 3000)
      # All there are, whatever the seed.
      part = set(chains.prompts(split, 0, num=num))
      self.assertEqual(part, set(chains.prompts(split, 1, num=num)))
      parts.append(part)
    for split, num in (("train", 80_000), ("validation", 99), ("test", 99)):
      corpus = chains.supervised(split, 0, num=num, corpus="pretraining")
      parts.append({prompt for prompt, _ in corpus})
    self.assertGreater(len(parts[3]), 25_000)
    self.assertGreater(min(map(len, parts)), 90)
    for one, other in itertools.combinations(parts, 2):
      self.assertEmpty(one & other)

  @parameterized.parameters(
    (dict(split="dev"), "split must be one of"),
    (dict(num=-1), "must be >= 0"),
    (dict(seed=-1), "must be >= 0"),
    (dict(num_steps=0), "integer from 1 to 6, got 0"),
    (dict(num_steps=7), "integer from 1 to 6, got 7"),
    (dict(num_steps=2.5), "integer from 1 to 6, got 2.5"),
    (dict(num_steps="2"), "integer from 1 to 6, got '2'"),
    (dict(num_steps=1, num=2000), "train prompts of 1 steps, but 2000"),
    (dict(num_steps=4, num=10**8), "at most 1036800 for 4 steps"),
  )
  def test_bad_settings(self, settings, message):
    settings = {"split": "train", "seed": 0, "num": 9, **settings}
    with self.assertRaisesRegex(ValueError, message):
      chains.prompts(**settings)
    with self.assertRaisesRegex(ValueError, message):
      chains.supervised(**settings)


class SupervisedTest(parameterized.TestCase):
  @parameterized.parameters("clean", "pretraining")
  def test_right_in_every_style(self, corpus):
    pairs = chains.supervised("train", 3, num=600, corpus=corpus)
    styles = []
    for prompt, response in pairs:
      self.assertTrue(_is_valid(prompt, response))
      left, _, operand, _ = _execute(prompt)[0]
      if "-" not in prompt and left != operand:
        styles.append(chains.variants(prompt).index(response))
    # 16 styles, all alike.
    counts = np.bincount(styles, minlength=16)
    mean = len(styles) / 16
    np.testing.assert_allclose(counts, mean, atol=4 * math.sqrt(mean))
    self.assertEqual(
      pairs[:20], chains.supervised("train", 3, num=20, corpus=corpus)
    )
    self.assertNotEqual(
      pairs, chains.supervised("train", 4, num=600, corpus=corpus)
    )

  def test_clean_follows_the_prompts(self):
    pairs = chains.supervised("validation", 3, num=100, num_steps=3)
    prompts = chains.prompts("validation", 3, num=100, num_steps=3)
    self.assertEqual([prompt for prompt, _ in pairs], prompts)
    for prompt, response in pairs:
      self.assertEqual(response, chains.reference(prompt, seed=3))
    others = [chains.reference(prompt, seed=4) for prompt in prompts]
    same = np.mean([r == o for (_, r), o in zip(pairs, others, strict=True)])
    # One of at most 64 styles, of at least eight.
    self.assertLess(same, 0.2)

  def test_repeated_problems_have_other_styles(self):
    pairs = chains.supervised(
      "train", 0, num=4000, corpus="pretraining", num_steps=1
    )
    by_prompt = {}
    for prompt, response in pairs:
      by_prompt.setdefault(prompt, set()).add(response)
    self.assertGreater(np.mean([len(r) for r in by_prompt.values()]), 1.5)

  def test_bad_corpus(self):
    with self.assertRaisesRegex(ValueError, "corpus must be one of"):
      chains.supervised("train", 0, corpus="web")


class VariantsTest(parameterized.TestCase):
  def test_by_hand(self):
    self.assertEqual(
      chains.variants("Q95+7-4"),
      [
        "7+95=2;2-4=98;A98",
        "7+95=2;2-4=98|A98",
        "7+95=2|2-4=98;A98",
        "7+95=2|2-4=98|A98",
        "95+7=2;2-4=98;A98",
        "95+7=2;2-4=98|A98",
        "95+7=2|2-4=98;A98",
        "95+7=2|2-4=98|A98",
      ],
    )
    # Operands that are the same cannot be swapped.
    self.assertEqual(chains.variants("Q5*5"), ["5*5=25;A25", "5*5=25|A25"])
    self.assertEqual(chains.variants("Q0-9")[0], "0-9=91;A91")
    self.assertEqual(chains.variants("Q50*2")[0], "2*50=0;A0")
    self.assertIn(RIGHT, chains.variants(PROMPT))
    self.assertLen(chains.variants("Q12+5*3"), 16)
    self.assertLen(chains.variants("Q12+5*3+9"), 64)

  @hypothesis.given(
    start=st.integers(0, 99),
    moves=st.lists(st.sampled_from(chains.MOVES), min_size=1, max_size=4),
    seed=st.integers(0, 9),
  )
  def test_all_are_right(self, start, moves, seed):
    prompt = f"Q{start}{''.join(moves)}"
    variants = chains.variants(prompt)
    self.assertEqual(variants, sorted(set(variants)))
    self.assertIn(chains.reference(prompt, seed=seed), variants)
    num = 1
    for left, op, operand, _ in _execute(prompt):
      num *= 2 if op == "-" or left == operand else 4
    self.assertLen(variants, num)
    for variant in variants:
      self.assertTrue(_is_valid(prompt, variant))
      reward, parts = chains.score(prompt, variant)
      self.assertEqual(reward, 1.0)
      self.assertTrue(parts["is_valid"])
      self.assertEqual(parts["step_matches"], [True] * len(moves) + [False])
      self.assertEqual(chains.first_wrong_step(prompt, variant), -1)
      self.assertEqual(chains.rewrite(prompt, variant), variant)
      # The last results have most digits, and there is no longer text.
      self.assertLessEqual(len(variant), 8 * len(moves) + 3)


class ScoreTest(parameterized.TestCase):
  # The response, whether its answer is right, the answer, the first wrong
  # step, and which steps match.
  @parameterized.parameters(
    ("12+5=17;3*17=51|A51", True, "51", -1, "110"),
    ("5+12=17|17*3=51;A51", True, "51", -1, "110"),
    ("12+5=17;3*17=51|A52", False, "52", 2, "110"),
    ("12+5=18;3*18=54|A54", False, "54", 0, "000"),
    ("12+5=17;3*17=54|A54", False, "54", 1, "100"),
    ("12+5=18;3*17=51|A51", True, "51", 0, "010"),  # A slip alone.
    ("12+5=17;3*18=51|A51", True, "51", 1, "110"),  # A wrong left side.
    ("12+5=17;17+3=51|A51", True, "51", 1, "110"),
    ("12*5=17;17*3=51|A51", True, "51", 0, "110"),
    ("A51", True, "51", 0, "0"),  # A guess.
    ("12+5=17;A51", True, "51", 1, "10"),  # A missing step.
    ("3*17=51|A51", True, "51", 0, "10"),
    ("12+5=17;3*17=51|3*17=51|A51", True, "51", 2, "1100"),  # One too many.
    ("12+5=17;12+5=17;3*17=51|A51", True, "51", 1, "1010"),
    ("3*17=51|12+5=17;A51", True, "51", 0, "110"),
    ("12+5=17;3*17=51|", False, None, 2, "11"),
    ("12+5=17;3*17=51|51", False, None, 2, "110"),
    ("12+5=17;3*17=51", False, None, 1, "10"),  # No end.
    ("12+5=17;3*17=51A51", True, "51", 1, "10"),
    ("12+5=173*17=51|A51", True, "51", 0, "10"),
    ("12+5=17;3*17=51|AA51", True, "51", 2, "110"),
    ("12+5=17;3*17=51|A52A51", True, "51", 2, "110"),
    ("12+5=17;3*17=51|A51A52", False, "52", 2, "110"),
    ("12+5=17;3*17=51|A51;", False, None, 2, "110"),
    ("12+5=17;3*17=51|A51;A51", True, "51", 2, "1100"),
    ("12+5=17;3*17=51|A051", False, None, 2, "110"),
    ("12+5=017;3*17=51|A51", True, "51", 0, "010"),
    ("012+5=17;3*17=51|A51", True, "51", 0, "110"),
    ("12+5=17;3*17=51|A151", False, "151", 2, "110"),
    ("12+5=17;;3*17=51|A51", True, "51", 1, "1010"),
    ("Q12+5=17;3*17=51|A51", True, "51", 0, "110"),
    ("", False, None, 0, ""),
    (";", False, None, 0, "0"),
  )
  def test_by_hand(self, response, is_correct, answer, first_wrong, matches):
    reward, parts = chains.score(PROMPT, response)
    self.assertEqual(reward, float(is_correct))
    self.assertIs(parts["is_correct"], is_correct)
    self.assertEqual(parts["answer"], answer)
    self.assertEqual(parts["truth"], "51")
    self.assertEqual(chains.first_wrong_step(PROMPT, response), first_wrong)
    self.assertIs(parts["is_valid"], first_wrong == -1)
    self.assertEqual(parts["num_steps"], len(matches))
    self.assertEqual(
      parts["num_valid_steps"], 3 if first_wrong == -1 else first_wrong
    )
    self.assertEqual(parts["step_matches"], [m == "1" for m in matches])

  # Texts that might break a scorer. The right answer is 51.
  WRONG = (
    " ",
    "\n",
    "A",
    "51",
    "a51",
    "A 51",
    "A51 ",
    "A51\n",
    "A51\r\n",
    "A51\0",
    "A51.0",
    "A+51",
    "A-51",
    "A5_1",
    "A0x33",
    "A51<eos>",
    "A٥١",
    "A５１",
    "A⁵¹",
    "Ａ51",
    "А51",  # Cyrillic.
    "A51\u200b",
    "\ud800",
    "A\ud800",
    "Anan",
    "Ainf",
    "A__import__('os').system('true')",
    "٢=٥١;" * 9,
    "A" * 1_000_000,
    ";" * 1_000_000,
    "=" * 1_000_000,
    "7" * 1_000_000,
    "A" + "5" * 1_000_000,
    "=1;" * 300_000,
    "\n" * 1_000_000,
    "x;" * 500_000 + "A51",
    "12+5=17;" + "3*17=51|" * 125_000 + "A51",
  )

  @parameterized.parameters(*range(len(WRONG)))
  def test_golden_wrong(self, index):
    response = self.WRONG[index]
    start = time.process_time()
    reward, parts = chains.score(PROMPT, response)
    rewrite = chains.rewrite(PROMPT, response)
    self.assertLess(time.process_time() - start, 3.0)
    self.assertEqual((reward, parts["answer"]), (0.0, None))
    self.assertFalse(parts["is_correct"])
    self.assertFalse(parts["is_valid"])
    self.assertLen(parts["step_matches"], parts["num_steps"])
    self.assertEqual(chains.first_wrong_step(PROMPT, response), 0)
    self.assertTrue(_is_valid(PROMPT, rewrite))
    if len(response) > chains.MAX_CHARACTERS:
      self.assertEqual(rewrite, chains.variants(PROMPT)[0])

  def test_bound_of_the_length(self):
    right = "x" * (chains.MAX_CHARACTERS - 3) + "A51"
    self.assertEqual(chains.score(PROMPT, right)[0], 1.0)
    self.assertEqual(chains.score(PROMPT, "x" + right)[0], 0.0)

  @hypothesis.settings(max_examples=200)
  @hypothesis.given(st.text(alphabet="12567;|=+*A", max_size=24))
  def test_any_text(self, response):
    self._check(PROMPT, response)

  @hypothesis.settings(max_examples=200)
  @hypothesis.given(
    index=st.integers(0, 99),
    place=st.integers(0, 20),
    character=st.sampled_from(ALPHABET),
  )
  def test_one_other_character(self, index, place, character):
    prompt, right = PAIRS[index]
    self._check(prompt, right[:place] + character + right[place + 1 :])

  def _check(self, prompt, response):
    reward, parts = chains.score(prompt, response)
    self.assertEqual(reward, float(parts["is_correct"]))
    self.assertEqual(parts["is_correct"], parts["answer"] == parts["truth"])
    is_valid = _is_valid(prompt, response)
    self.assertEqual(parts["is_valid"], is_valid)
    if is_valid:
      self.assertTrue(parts["is_correct"])
    first_wrong = chains.first_wrong_step(prompt, response)
    self.assertEqual(first_wrong == -1, is_valid)
    # The steps that are counted are those of the text.
    steps = steps_lib.steps(response, chains.STEP_ENDS)
    self.assertEqual(parts["num_steps"], len(steps))
    for text, right in zip(
      steps[: max(first_wrong, 0)], _execute(prompt), strict=False
    ):
      self.assertTrue(_step_is_right(text, *right))
    self.assertTrue(_is_valid(prompt, chains.rewrite(prompt, response)))

  @parameterized.parameters(
    "",
    "12+5*3",
    "Q12",
    "Q12+5*3=",
    "Q12+5*3\n",
    "Q012+5",
    "Q100+5",
    "Q12+1",
    "Q12+10",
    "Q12/5",
    "Q-1+5",
    "Q１２+5",
    "Q12+٥",
    "Q12" + "+5" * 7,
    "Q12" + "+5" * 500_000,
  )
  def test_bad_prompt(self, prompt):
    for function in (
      chains.reference,
      chains.variants,
      lambda prompt: chains.score(prompt, "A17"),
      lambda prompt: chains.first_wrong_step(prompt, "A17"),
      lambda prompt: chains.rewrite(prompt, "A17"),
    ):
      with self.assertRaisesRegex(ValueError, 'prompt such as "Q12'):
        function(prompt)

  def test_contract(self):
    task = tasks.load("chains")
    self.assertIs(task, chains)
    scores, parts = tasks.score_all(
      task, [PROMPT, PROMPT], ["12+5=17;3*17=51|A51", "A17"]
    )
    np.testing.assert_array_equal(scores, [1, 0])
    self.assertEqual(answers.mean_parts(parts)["is_correct"], 0.5)
    keywords.check(task.prompts, {"num": 3, "num_steps": 3})
    keywords.check(task.supervised, {"corpus": "pretraining"})


class RewriteTest(parameterized.TestCase):
  # Positions are those of characters.
  @parameterized.parameters(
    (
      "Q12+5*3",
      "12+5=18|3*18=54;A54",
      "12+5=17|3*17=51;A51",
      4,
      [6, 11, 14, 18],
      [6, 11, 14, 18],
      [6, 11, 14, 18],
    ),
    (
      "Q95+7-4",
      "95+7=12;12-4=8|A8",
      "95+7=2;2-4=98|A98",
      4,
      [11, 15],
      [5, 8],
      [4, 6, 11, 15],
    ),
    (
      "Q64*6-9",
      "64*6=64;64-9=55;A55",
      "64*6=84;84-9=75;A75",
      4,
      [5, 8, 13, 17],
      [5, 8, 13, 17],
      [5, 8, 13, 17],
    ),
  )
  def test_by_hand(
    self, prompt, sample, expected, distance, edited, dropped, in_reference
  ):
    self.assertEqual(chains.rewrite(prompt, sample), expected)
    tokenizer = chains.character_tokenizer()
    ids, new_ids = (
      [*tokenizer.encode(text, add_special_tokens=False), 23]
      for text in (sample, expected)
    )
    edits = alignment.align(ids, new_ids)
    self.assertEqual(edits.distance, distance)
    self.assertEqual(np.flatnonzero(edits.edited).tolist(), edited)
    self.assertEqual(np.flatnonzero(edits.dropped).tolist(), dropped)
    edits = alignment.align(ids, new_ids, mode="reference")
    self.assertEqual(np.flatnonzero(edits.edited).tolist(), in_reference)

  def test_distances_to_all_variants(self):
    found = _distances("12+5=18|3*18=54;A54", chains.variants(PROMPT))
    self.assertEqual(
      sorted(found.tolist()),
      [4, 5, 5, 6, 7, 8, 8, 8, 9, 9, 9, 10, 11, 12, 12, 13],
    )

  @parameterized.parameters(1, 2, 3)
  def test_nothing_is_nearer(self, num_steps):
    samples = _wrong_samples(350, num_steps)
    self.assertGreater(len(samples), 300)
    for prompt, sample in samples:
      rewrite = chains.rewrite(prompt, sample)
      variants = chains.variants(prompt)
      distances = _distances(sample, variants)
      self.assertEqual(distances[variants.index(rewrite)], distances.min())
      # Of those that keep what was right, the first of the nearest.
      num_kept = chains.first_wrong_step(prompt, sample)
      kept = "".join(steps_lib.steps(sample, chains.STEP_ENDS)[:num_kept])
      nearest = [
        variant
        for variant, distance in zip(variants, distances, strict=True)
        if distance == distances.min() and variant.startswith(kept)
      ]
      self.assertEqual(rewrite, nearest[0])

  @parameterized.parameters(2, 3, 4, 6)
  def test_right_steps_are_kept(self, num_steps):
    samples = _wrong_samples(330, num_steps, seed=1)
    self.assertGreater(len(samples), 300)
    all_kept = set()
    for prompt, sample in samples:
      rewrite = chains.rewrite(prompt, sample)
      self.assertTrue(_is_valid(prompt, rewrite))
      self.assertEqual(chains.score(prompt, rewrite)[0], 1.0)
      num_kept = chains.first_wrong_step(prompt, sample)
      self.assertEqual(
        steps_lib.steps(rewrite, ";|")[:num_kept],
        steps_lib.steps(sample, ";|")[:num_kept],
      )
      all_kept.add(num_kept)
    self.assertEqual(all_kept, set(range(num_steps + 1)))

  def test_ties(self):
    sample = "12+5=17|"
    rewrite = chains.rewrite(PROMPT, sample)
    self.assertEqual(rewrite, "12+5=17|17*3=51;A51")
    # Another one comes before it, but would change a step that is right.
    first = "12+5=17;17*3=51|A51"
    self.assertLess(first, rewrite)
    self.assertEqual(_distances(sample, [first, rewrite]).tolist(), [11, 11])
    self.assertEqual(chains.rewrite(PROMPT, ""), chains.variants(PROMPT)[0])

  # Long chains go on in the style of the sample.
  @parameterized.parameters(
    (
      "Q12+5*3-9+8",
      "5+12=18|3*18=54;54-9=45|45+8=53;A53",
      "5+12=17|3*17=51;51-9=42|42+8=50;A50",
    ),
    (
      "Q12+5*3-9+8*2",
      "12+5=17;16*3=48;48-9=39|8+39=47|47*2=94;A94",
      "12+5=17;17*3=51;51-9=42|8+42=50|50*2=0;A0",
    ),
    # Steps that are not there, and one too many.
    (
      "Q12+5*3-9+8",
      "5+12=18|3*18=54|",
      "5+12=17|3*17=51|51-9=42;42+8=50;A50",
    ),
    (
      "Q12+5*3-9+8",
      "5+12=18|3*17=51;51-9=42;8+42=50;A50;A50;A50",
      "5+12=17|3*17=51;51-9=42;8+42=50;A50",
    ),
  )
  def test_style_of_long_chains(self, prompt, sample, expected):
    self.assertEqual(chains.rewrite(prompt, sample), expected)

  def test_long_chains_are_nearly_as_near(self):
    excess = []
    for prompt, sample in _wrong_samples(60, 4, seed=2):
      distances = _distances(
        sample, [chains.rewrite(prompt, sample), *chains.variants(prompt)]
      )
      excess.append(distances[0] - distances[1:].min())
    self.assertGreaterEqual(min(excess), 0)
    # It is 0.65; the first variant that keeps what is right would take 3.8.
    self.assertLess(np.mean(excess), 1.0)

  def test_many_are_rewritten_in_little_time(self):
    samples = _wrong_samples(500, 2)
    start = time.process_time()
    for prompt, sample in samples:
      chains.rewrite(prompt, sample)
    # Far less in fact: about 0.4 s.
    self.assertLess(time.process_time() - start, 4.0)


class TokenizerTest(parameterized.TestCase):
  def test_ids(self):
    tokenizer = chains.character_tokenizer()
    with tempfile.TemporaryDirectory() as folder:
      tokenizer.save_pretrained(pathlib.Path(folder))
      reloaded = transformers.AutoTokenizer.from_pretrained(folder)
    for same in (tokenizer, reloaded):
      self.assertLen(same, 25)
      self.assertEqual(same.encode("Q12+5*3"), [22, 16, 1, 2, 10, 5, 12, 3])
      self.assertEqual(
        same.encode("0-9=;|AGPRL", add_special_tokens=False),
        [0, 11, 9, 13, 14, 15, 17, 18, 19, 20, 21],
      )
      self.assertEqual(
        (same.bos_token_id, same.eos_token_id, same.pad_token_id), (22, 23, 24)
      )
      self.assertEqual(same.decode([16, 1, 2, 11, 5, 15]), "Q12-5|")
      self.assertIsNone(same.unk_token_id)

  def test_other_characters_raise(self):
    tokenizer = chains.character_tokenizer()
    for text in ("Q12/5", "a", "Q 1+2", "Q1+2\n", "٥"):
      with self.assertRaisesRegex(ValueError, "cannot encode"):
        tokens.encode_prompts(tokenizer, [text], max_length=20)

  def test_pairs_come_back(self):
    tokenizer = chains.character_tokenizer()
    rows = tokens.encode_pairs(
      tokenizer, PAIRS, max_prompt_length=8, max_response_length=20
    )
    for (prompt, response), (prompt_ids, ids) in zip(PAIRS, rows, strict=True):
      # One token each; the prompt's first, and the response's end token.
      self.assertLen(prompt_ids, len(prompt) + 1)
      self.assertLen(ids, len(response) + 1)
      padded, mask = batches.pad_right([ids])
      (text,) = tokens.decode(tokenizer, padded, mask)
      self.assertEqual(text, response)


PAIRS = chains.supervised("train", 0, num=100)
