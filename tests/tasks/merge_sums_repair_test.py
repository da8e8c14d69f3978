"""Tests of how merge sums are repaired from their first wrong line on."""

import itertools
import random
import time

import hypothesis
import hypothesis.strategies as st
import numpy as np
from absl.testing import parameterized

from rljax.tasks import merge_sums
from rljax.text import alignment, steps

PROMPT = "07+04+02+10="
RIGHT = "11+02+10\n13+10\n#23"


def _lines(prompt, places, errors=(), tags=("", "", "", "", "")):
  """A solution that merges at these places; errors are carried on."""
  terms = [int(term) for term in prompt.removesuffix("=").split("+")]
  lines = []
  for i, place in enumerate(places):
    result = terms[place] + terms[place + 1]
    result += errors[i] if errors else 0
    terms[place : place + 2] = [min(max(result, 0), 99)]
    lines.append("+".join(f"{term:02d}" for term in terms))
  lines[-1] = "#" + lines[-1]
  return [tag + line for tag, line in zip(tags, lines, strict=False)]


def _corrupted(text, rng):
  for _ in range(rng.randint(1, 3)):
    i, kind = rng.randrange(len(text) + 1), rng.random()
    new = "" if kind < 0.2 else rng.choice("0123456789+#\n GB")
    text = text[:i] + new + text[i + (kind < 0.8) :]
  # Now and then one that ends early.
  return text[: rng.randrange(len(text) + 1)] if rng.random() < 0.1 else text


def _distances(samples, texts):
  return alignment.distances(
    [[*map(ord, text)] for text in samples], [[*map(ord, t)] for t in texts]
  )


class FirstWrongStepTest(parameterized.TestCase):
  @parameterized.parameters(
    (RIGHT, -1),
    (" 11+02+10\nG13+10\nB#23\n ", -1),
    ("12+02+10\n14+10\n#24", 0),
    ("11+02+10\n14+10\n#24", 1),
    ("11+02+10\n13+10\n#24", 2),
    ("11+02+10\n13+10", 2),  # Its answer is missing.
    ("11+02+10", 1),
    ("11+02+10\n#23", 1),  # A merge is missing.
    ("#23", 0),
    ("11+02+10\n13+10\n23\n#23", 2),
    ("11+02+10\n13+10\n\n#23", 2),
    ("07+04+02+10\n11+02+10\n13+10\n#23", 0),
    ("", 0),
    ("\n\n", 0),
    ("11+02+10\n" * 200, 0),
  )
  def test_by_hand(self, response, expected):
    self.assertEqual(merge_sums.first_wrong_step(PROMPT, response), expected)

  def test_steps_end_with_lines(self):
    lines = steps.steps(RIGHT, merge_sums.STEP_ENDS)
    self.assertEqual(
      [step.strip("\n") for step in lines], merge_sums.steps(RIGHT)
    )


class RewriteTest(parameterized.TestCase):
  @parameterized.parameters(
    # The sample's merges, whatever it made of them.
    ("12+02+10\n14+10\n#24", "11+02+10\n13+10\n#23"),
    ("11+02+10\n14+10\n#24", "11+02+10\n13+10\n#23"),
    ("11+02+10\n13+10\n#24", "11+02+10\n13+10\n#23"),
    ("07+04+13\n07+17\n#24", "07+04+12\n07+16\n#23"),
    ("07+07+10\n07+17\n#24", "07+06+10\n07+16\n#23"),
    ("07+07+10\n14+10\n#24", "07+06+10\n13+10\n#23"),
    # A right answer behind a wrong line.
    ("07+07+10\n13+10\n#23", "07+06+10\n13+10\n#23"),
    # A line that merges, but copies another number wrongly.
    ("07+06+11\n07+17\n#24", "07+06+10\n07+16\n#23"),
    # Merges that are not there, or cannot be read.
    ("", "11+02+10\n13+10\n#23"),
    ("07+04+12\n#23", "07+04+12\n11+12\n#23"),
    ("07+04+12", "07+04+12\n11+12\n#23"),
    ("07+04+12\n07+16", "07+04+12\n07+16\n#23"),
    ("07+4+12\n07+16\n#23", "07+04+12\n07+16\n#23"),
    ("07+04+12\n7+16\n#23", "07+04+12\n07+16\n#23"),
    ("nonsense\n#23", "11+02+10\n13+10\n#23"),
    # Too many of them.
    ("07+04+12\n07+16\n#23\n#23", "07+04+12\n07+16\n#23"),
    ("07+04+12\n07+16\n23\n#23", "07+04+12\n07+16\n#23"),
    ("07+04+02+10\n07+04+12\n07+16\n#23", "07+04+12\n07+16\n#23"),
    # Tags: those of the sample's lines, or else of the line before.
    (" 12+02+10\n 14+10\n #24", " 11+02+10\n 13+10\n #23"),
    ("G07+04+12\nB07+17\nB#24", "G07+04+12\nB07+16\nB#23"),
    ("G07+04+12\nB07+17", "G07+04+12\nB07+16\nB#23"),
    (" 07+04+12", " 07+04+12\n 11+12\n #23"),
    ("07+04+12\nB07+17\n#24", "07+04+12\nB07+16\nB#23"),
    ("12+02+10\nG14+10\n#24 \n ", "11+02+10\nG13+10\nG#23"),
  )
  def test_by_hand(self, response, expected):
    self.assertEqual(merge_sums.rewrite(PROMPT, response), expected)
    self.assertTrue(merge_sums.score(PROMPT, expected)[1]["is_valid"])

  def test_merges_are_read_from_the_samples_own_lines(self):
    # "21+35" merges the first two of "13+09+35", wrongly. Beside the right
    # "13+09+26" it would look like "13+35".
    self.assertEqual(
      merge_sums.rewrite("13+09+10+16=", "13+09+35\n21+35\n#56"),
      "13+09+26\n22+26\n#48",
    )

  @parameterized.parameters(2, 3, 4, 5)
  def test_right_responses_stay(self, num_terms):
    prompts = merge_sums.prompts(
      "train", 0, num=5, num_terms=num_terms, max_term=19
    )
    for prompt, slot in itertools.product(prompts, (False, True)):
      for trace in merge_sums.traces(prompt, slot=slot):
        for response in (trace, trace + "\n", trace.replace(" ", "G")):
          self.assertEqual(merge_sums.rewrite(prompt, response), response)

  @hypothesis.settings(max_examples=100)
  @hypothesis.given(
    place=st.integers(0, 2),
    second=st.integers(0, 1),
    wrong=st.integers(0, 2),
    error=st.sampled_from((-2, -1, 1, 2)),
    tags=st.lists(st.sampled_from(merge_sums.TAGS), min_size=3, max_size=3),
    index=st.integers(0, 99),
  )
  def test_order_of_merges_is_followed(
    self, place, second, wrong, error, tags, index
  ):
    # Odd and even numbers: only one of the merges agrees with a line.
    prompt = f"{2 * index % 23 + 3:02d}+31+{index % 7 + 12:02d}+05="
    places = (place, second, 0)
    errors = [error if i == wrong else 0 for i in range(3)]
    sample = "\n".join(_lines(prompt, places, errors, tags))
    right = "\n".join(_lines(prompt, places, tags=tags))
    self.assertEqual(merge_sums.first_wrong_step(prompt, sample), wrong)
    self.assertEqual(merge_sums.rewrite(prompt, sample), right)

  @parameterized.parameters(3, 4, 6)
  def test_corrupted(self, num_terms):
    rng = random.Random(num_terms)
    pairs = merge_sums.supervised(
      "train", 0, num=350, num_terms=num_terms, max_term=16
    )
    samples = [(p, _corrupted(response, rng)) for p, response in pairs]
    # One without a first wrong line is right: see the tests of `score`.
    samples = [
      (prompt, sample)
      for prompt, sample in samples
      if not merge_sums.score(prompt, sample)[1]["is_valid"]
    ]
    self.assertGreater(len(samples), 300)
    all_kept, rewrites = set(), []
    for prompt, sample in samples:
      rewrite = merge_sums.rewrite(prompt, sample)
      reward, parts = merge_sums.score(prompt, rewrite)
      self.assertEqual(reward, 1.0)
      self.assertTrue(parts["is_valid"])
      num_kept = merge_sums.first_wrong_step(prompt, sample)
      all_kept.add(num_kept)
      self.assertEqual(
        rewrite.split("\n")[:num_kept], sample.split("\n")[:num_kept]
      )
      rewrites.append(rewrite)
    self.assertEqual(all_kept, set(range(num_terms - 1)))
    # Few edits: 3 to 15 % more than to the nearest right response.
    texts = [sample for _, sample in samples]
    taken = _distances(texts, rewrites)
    fewest = [
      min(_distances([sample] * len(found), found))
      for prompt, sample in samples[:40]
      for found in [merge_sums.traces(prompt)]
    ]
    self.assertLess(np.mean(taken[:40]), 1.3 * np.mean(fewest))
    others = [merge_sums.reference(prompt, seed=1) for prompt, _ in samples]
    self.assertLess(np.mean(taken), 0.7 * np.mean(_distances(texts, others)))

  def test_corpus_with_carried_errors(self):
    num_wrong = 0
    for prompt, sample in merge_sums.supervised(
      "test", 0, num=200, corpus="pretraining", corruption=0.3, slot=True
    ):
      rewrite = merge_sums.rewrite(prompt, sample)
      self.assertTrue(merge_sums.score(prompt, rewrite)[1]["is_valid"])
      self.assertLen(rewrite, len(sample))
      self.assertEqual(
        [line[0] for line in rewrite.split("\n")],
        [line[0] for line in sample.split("\n")],
      )
      num_wrong += rewrite != sample
    self.assertGreater(num_wrong, 50)

  @hypothesis.settings(max_examples=200)
  @hypothesis.given(st.text(alphabet="01236#+\n GB", max_size=40))
  def test_any_text(self, response):
    prompt = "01+02+03="
    rewrite = merge_sums.rewrite(prompt, response)
    self.assertTrue(merge_sums.score(prompt, rewrite)[1]["is_valid"])
    num_kept = merge_sums.first_wrong_step(prompt, response)
    if num_kept == -1:
      self.assertEqual(rewrite, response)
    else:
      self.assertNotEqual(rewrite, response)
      self.assertEqual(
        rewrite.split("\n")[:num_kept], response.split("\n")[:num_kept]
      )

  @parameterized.parameters(
    "7" * 1_000_000,
    "+" * 1_000_000,
    "#" * 1_000_000,
    "\n" * 1_000_000,
    "01+" * 300_000 + "01",
    "11+02+10\n" * 100_000,
    "٠٧+٠٦+١٠\n٠٧+١٦\n#٢٣",
    "０７+０６",
    "G" * 1000,
    "\ud800\n\0",
    "+" * 1024,
    "\n" * 1024,
    "#23\n#24",
  )
  def test_hostile(self, response):
    start = time.process_time()
    rewrite = merge_sums.rewrite(PROMPT, response)
    self.assertLess(time.process_time() - start, 1.0)
    self.assertEqual(rewrite.replace("G", ""), RIGHT)

  def test_bad_prompt(self):
    for function in (merge_sums.first_wrong_step, merge_sums.rewrite):
      with self.assertRaisesRegex(ValueError, 'prompt such as "07'):
        function("7+4=", "#11")
