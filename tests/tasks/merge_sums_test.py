import collections
import itertools
import math
import pathlib
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
from rljax.tasks import merge_sums
from rljax.text import batches, tokens

PROMPT = "07+04+02+10="


def _terms(prompt):
  return [int(term) for term in prompt.removesuffix("=").split("+")]


def _is_valid(prompt, response):
  """Whether every line is right, by trying all merges of the line before."""
  line = prompt.removesuffix("=")
  lines = response.split("\n")
  for i, found in enumerate(lines):
    terms = line.split("+")
    nexts = []
    for j in range(len(terms) - 1):
      result = str(int(terms[j]) + int(terms[j + 1])).zfill(len(terms[0]))
      nexts.append("+".join([*terms[:j], result, *terms[j + 2 :]]))
    if i == len(lines) - 1:
      return len(terms) == 2 and found == f"#{nexts[0]}"
    if found not in nexts:
      return False
    line = found
  return False


class PromptsTest(parameterized.TestCase):
  def test_form(self):
    prompts = merge_sums.prompts("train", 0, num=500)
    for prompt in prompts:
      self.assertRegex(prompt, r"^(\d\d\+){3}\d\d=$")
      self.assertTrue(all(1 <= term <= 24 for term in _terms(prompt)))
    self.assertLen(set(prompts), 500)
    terms = np.array(list(map(_terms, prompts)))
    # Uniform on 1..24: mean 12.5, deviation 6.92, by 500 draws 0.31.
    np.testing.assert_allclose(terms.mean(axis=0), 12.5, atol=1.0)
    self.assertEqual((terms.min(), terms.max()), (1, 24))

  @parameterized.parameters(
    (2, 49, 2), (3, 9, 2), (6, 16, 2), (6, 166, 3), (2, 499, 3), (2, 1, 2)
  )
  def test_knobs(self, num_terms, max_term, digits):
    num = 0 if max_term == 1 else 20
    prompts = merge_sums.prompts(
      "train", 1, num=num, num_terms=num_terms, max_term=max_term, digits=digits
    )
    self.assertLen(set(prompts), num)
    for prompt in prompts:
      self.assertLen(prompt, num_terms * (digits + 1))
      self.assertLen(_terms(prompt), num_terms)
      self.assertLessEqual(max(_terms(prompt)), max_term)

  def test_seeds_and_prefixes(self):
    for num_terms, max_term in ((4, 24), (5, 19)):  # Shuffled, drawn.
      options = dict(num_terms=num_terms, max_term=max_term)
      prompts = merge_sums.prompts("test", 5, num=200, **options)
      self.assertEqual(
        prompts[:30], merge_sums.prompts("test", 5, num=30, **options)
      )
      self.assertNotEqual(
        prompts, merge_sums.prompts("test", 6, num=200, **options)
      )

  def test_splits_share_the_whole_space(self):
    options = dict(num_terms=3, max_term=9)
    parts = []
    for split, share in (("train", 4), ("validation", 2), ("test", 2)):
      with self.assertRaisesRegex(ValueError, "There are [0-9]+ different"):
        merge_sums.prompts(split, 0, num=729, **options)
      try:
        merge_sums.prompts(split, 0, num=729, **options)
      except ValueError as error:
        num = int(re.search(r"There are (\d+)", str(error))[1])
      # Three standard deviations of the share of 729 problems.
      tolerance = 3 * math.sqrt(729 * share / 16 * (1 - share / 16))
      self.assertAlmostEqual(num, 729 * share / 16, delta=tolerance)
      first = merge_sums.prompts(split, 0, num=num, **options)
      # All there are, whatever the seed.
      self.assertCountEqual(
        first, merge_sums.prompts(split, 1, num=num, **options)
      )
      parts.append(set(first))
    for one, other in itertools.combinations(parts, 2):
      self.assertEmpty(one & other)
    for split in merge_sums.SPLITS:
      corpus = merge_sums.supervised(
        split, 0, num=3000, corpus="pretraining", **options
      )
      seen = {prompt for prompt, _ in corpus if prompt.count("+") == 2}
      self.assertGreater(len(seen), 20)
      for part in parts:
        self.assertEmpty(part & seen)
      parts.append(seen)

  def test_width_changes_no_split(self):
    wide = merge_sums.prompts("test", 0, num=300, digits=3)
    narrow = merge_sums.prompts("test", 0, num=300)
    self.assertEqual(
      [_terms(prompt) for prompt in wide], [_terms(p) for p in narrow]
    )

  @parameterized.parameters(
    (dict(split="dev"), "split must be one of"),
    (dict(num=-1), "must be >= 0"),
    (dict(seed=-1), "must be >= 0"),
    (dict(digits=4), r"digits must be one of \(2, 3\), got 4"),
    (dict(num_terms=7), "integer from 2 to 6, got 7"),
    (dict(num_terms=1), "integer from 2 to 6, got 1"),
    (dict(num_terms=2.5), "integer from 2 to 6, got 2.5"),
    (dict(max_term=25), "integer from 1 to 24, .* 4 terms .* 2 digits, got 25"),
    (dict(max_term=0), "integer from 1 to 24"),
    (dict(max_term="9"), "integer from 1 to 24"),
    (dict(num_terms=2, max_term=2), "different train prompts of 2 terms up"),
    (dict(num_terms=5, max_term=19, num=10**6), "at most 154756 for 5 terms"),
  )
  def test_bad_settings(self, settings, message):
    settings = {"split": "train", "seed": 0, "num": 9, **settings}
    with self.assertRaisesRegex(ValueError, message):
      merge_sums.prompts(**settings)
    with self.assertRaisesRegex(ValueError, message):
      merge_sums.supervised(**settings)


class ReferenceTest(parameterized.TestCase):
  def test_traces_by_hand(self):
    self.assertCountEqual(
      merge_sums.traces(PROMPT),
      [
        "11+02+10\n13+10\n#23",
        "11+02+10\n11+12\n#23",
        "07+06+10\n13+10\n#23",
        "07+06+10\n07+16\n#23",
        "07+04+12\n11+12\n#23",
        "07+04+12\n07+16\n#23",
      ],
    )
    self.assertEqual(merge_sums.traces("07+04="), ["#11"])
    self.assertEqual(merge_sums.traces("199+800=", slot=True), [" #999"])
    self.assertLen(merge_sums.traces("01+02+04+08+16="), 24)
    # Equal terms do not make lines equal, zeros do.
    self.assertEqual(
      merge_sums.traces("02+02+02="), ["04+02\n#06", "02+04\n#06"]
    )
    self.assertLen(merge_sums.traces("01+01+01+01="), 6)
    self.assertEqual(merge_sums.traces("00+00+00="), ["00+00\n#00"])

  @hypothesis.given(
    terms=st.lists(st.integers(0, 16), min_size=2, max_size=6),
    digits=st.sampled_from([2, 3]),
    seed=st.integers(0, 9),
  )
  def test_references_are_valid(self, terms, digits, seed):
    prompt = "+".join(f"{term:0{digits}d}" for term in terms) + "="
    reference = merge_sums.reference(prompt, seed=seed)
    self.assertTrue(_is_valid(prompt, reference))
    traces = merge_sums.traces(prompt)
    self.assertIn(reference, traces)
    self.assertLessEqual(len(traces), math.factorial(len(terms) - 1))
    self.assertLen(set(traces), len(traces))
    for trace in traces:
      self.assertTrue(_is_valid(prompt, trace))
      reward, parts = merge_sums.score(prompt, trace)
      self.assertEqual(reward, 1.0)
      self.assertTrue(parts["is_valid"])
      self.assertEqual(parts["num_valid_steps"], len(terms) - 1)
      self.assertLess(len(trace), 80)

  def test_one_order_for_each_prompt(self):
    prompts = merge_sums.prompts("train", 0, num=1200)
    first = [merge_sums.reference(prompt) for prompt in prompts]
    self.assertEqual(first, [merge_sums.reference(p) for p in prompts])
    other = [merge_sums.reference(p, seed=1) for p in prompts]
    # One order of six is the same by chance.
    same = np.mean([a == b for a, b in zip(first, other, strict=True)])
    self.assertAlmostEqual(same, 1 / 6, delta=0.04)
    # The first merge is one of three, all alike.
    places = [
      [a == b for a, b in zip(p.split("+"), r.split("+"), strict=False)].index(
        False
      )
      for p, r in zip(prompts, first, strict=True)
    ]
    np.testing.assert_allclose(np.bincount(places) / 1200, 1 / 3, atol=0.05)

  def test_steps(self):
    self.assertEqual(
      merge_sums.steps("11+02+10\n13+10\n#23"), ["11+02+10", "13+10", "#23"]
    )
    self.assertEqual(
      merge_sums.steps(" 11\nG13\nB#23 \n "), ["11", "13", "#23"]
    )
    self.assertEqual(merge_sums.steps("GG1\n\n#2"), ["G1", "", "#2"])
    self.assertEqual(merge_sums.steps(""), [])
    self.assertEqual(merge_sums.steps(" \n\n "), [])


class SupervisedTest(parameterized.TestCase):
  def test_clean_follows_the_prompts(self):
    pairs = merge_sums.supervised("validation", 3, num=100)
    self.assertEqual(
      [prompt for prompt, _ in pairs],
      merge_sums.prompts("validation", 3, num=100),
    )
    for prompt, response in pairs:
      self.assertEqual(response, merge_sums.reference(prompt))
      self.assertTrue(merge_sums.score(prompt, response)[1]["is_valid"])
      self.assertLen(response, 18)

  @parameterized.parameters("clean", "pretraining")
  def test_slot(self, corpus):
    without = merge_sums.supervised("train", 0, num=50, corpus=corpus)
    pairs = merge_sums.supervised("train", 0, num=50, corpus=corpus, slot=True)
    for (prompt, text), (same, slotted) in zip(without, pairs, strict=True):
      self.assertEqual(prompt, same)
      self.assertEqual(slotted, " " + text.replace("\n", "\n "))
      for blank in " GB":
        tagged = slotted.replace(" ", blank)
        self.assertEqual(
          merge_sums.score(prompt, text), merge_sums.score(prompt, tagged)
        )

  def test_corpus_is_as_corrupt_as_told(self):
    pairs = merge_sums.supervised("train", 0, num=4000, corpus="pretraining")
    lengths = np.array([prompt.count("+") + 1 for prompt, _ in pairs])
    self.assertEqual(set(lengths), {2, 4})
    self.assertAlmostEqual(np.mean(lengths == 2), 0.3, delta=0.02)
    is_valid = np.array(
      [merge_sums.score(*pair)[1]["is_valid"] for pair in pairs]
    )
    self.assertAlmostEqual(is_valid[lengths == 2].mean(), 0.85, delta=0.03)
    # Three merges; clipping puts a few errors right.
    self.assertAlmostEqual(is_valid[lengths == 4].mean(), 0.85**3, delta=0.03)
    errors = []
    for (prompt, response), num in zip(pairs, lengths, strict=True):
      self.assertRegex(response, r"^((\d\d\+){2}\d\d\n\d\d\+\d\d\n)?#\d\d$")
      if num == 2:
        errors.append(int(response[1:]) - sum(_terms(prompt)))
    shares = {e: np.mean(np.array(errors) == e) for e in set(errors)}
    self.assertAlmostEqual(shares.pop(0), 0.85, delta=0.03)
    # Small sums are clipped at 0, which makes errors of other sizes.
    for error in merge_sums.ERRORS:
      self.assertAlmostEqual(shares[error], 0.15 / 12, delta=0.01)
    magnitudes = {abs(error) for error in shares}
    self.assertLessEqual(max(magnitudes), 20)

  def test_errors_are_carried_on(self):
    for prompt, response in merge_sums.supervised(
      "train", 1, num=200, corpus="pretraining", corruption=1.0
    ):
      parts = merge_sums.score(prompt, response)[1]
      self.assertEqual(parts["num_valid_steps"], 0)
      # Every line merges something, if wrongly.
      before = _terms(prompt)
      for line in response.split("\n"):
        terms = [int(term) for term in line.removeprefix("#").split("+")]
        self.assertTrue(
          any(
            terms[:i] == before[:i] and terms[i + 1 :] == before[i + 2 :]
            for i in range(len(terms))
          )
        )
        self.assertTrue(all(0 <= term <= 99 for term in terms))
        before = terms

  def test_without_corruption_all_is_valid(self):
    pairs = merge_sums.supervised(
      "test",
      0,
      num=100,
      corpus="pretraining",
      corruption=0.0,
      num_terms=5,
      max_term=100,
      digits=3,
    )
    traces = set()
    for prompt, response in pairs:
      self.assertTrue(_is_valid(prompt, response))
      traces.add(response == merge_sums.reference(prompt))
    self.assertEqual(traces, {True, False})  # Orders of their own.

  def test_corpus_repeats_with_its_seed(self):
    options = dict(corpus="pretraining")
    pairs = merge_sums.supervised("train", 4, num=90, **options)
    self.assertEqual(
      pairs[:20], merge_sums.supervised("train", 4, num=20, **options)
    )
    self.assertNotEqual(
      pairs, merge_sums.supervised("train", 5, num=90, **options)
    )

  @parameterized.parameters(
    (dict(corpus="web"), "corpus must be one of"),
    (dict(corruption=1.5), r"corruption must lie in \[0, 1\], got 1.5"),
    (dict(max_term=1), "No problem of . terms up to 1 belongs to the test"),
  )
  def test_bad_settings(self, settings, message):
    settings = {"corpus": "pretraining", "num": 3, **settings}
    with self.assertRaisesRegex(ValueError, message):
      merge_sums.supervised("test", 0, **settings)


class ScoreTest(parameterized.TestCase):
  # The response, whether its answer is right, the answer, whether all lines
  # are valid, and how many are before the first that is not.
  @parameterized.parameters(
    ("11+02+10\n13+10\n#23", True, "23", True, 3),
    ("07+06+10\n07+16\n#23", True, "23", True, 3),
    (" 11+02+10\nG13+10\nB#23", True, "23", True, 3),
    ("11+02+10\n13+10\n#23 \n ", True, "23", True, 3),
    ("#23", True, "23", False, 0),  # A guess.
    ("11+02+10\n#23", True, "23", False, 1),  # Two merges in one line.
    ("12+02+10\n14+10\n#23", True, "23", False, 0),
    ("12+02+10\n14+10\n#24", False, "24", False, 0),
    ("11+02+10\n13+10\n#24", False, "24", False, 2),
    ("11+02+10\n14+10\n#23", True, "23", False, 1),
    ("11+10+02\n21+02\n#23", True, "23", False, 0),  # Terms swapped.
    ("07+04+02+10\n11+02+10\n13+10\n#23", True, "23", False, 0),
    ("09+04+10\n13+10\n#23", True, "23", False, 0),  # Not adjacent.
    ("11+02+10\n13+10\n23", False, None, False, 2),
    ("11+02+10\n13+10\n23\n#23", True, "23", False, 2),
    ("11+02+10\n13+10\n\n#23", True, "23", False, 2),
    ("11+02+10\n13+10", False, None, False, 2),
    ("nonsense\n#23", True, "23", False, 0),
  )
  def test_by_hand(self, response, is_correct, answer, is_valid, num_valid):
    reward, parts = merge_sums.score(PROMPT, response)
    self.assertEqual(reward, float(is_correct))
    self.assertIs(parts["is_correct"], is_correct)
    self.assertEqual(parts["answer"], answer)
    self.assertEqual(parts["truth"], "23")
    self.assertIs(parts["is_valid"], is_valid)
    self.assertEqual(parts["num_valid_steps"], num_valid)
    self.assertEqual(parts["num_steps"], len(merge_sums.steps(response)))
    self.assertLen(parts["step_matches"], parts["num_steps"])

  # Texts that once broke some scorer, or might. The right answer is 23.
  WRONG = (
    "",
    " ",
    "\n",
    "G",
    "#",
    "#\n",
    "23",
    "#2",
    "#3",
    "#023",
    "#0023",
    "#230",
    "#2 3",
    "# 23",
    "#+23",
    "#-23",
    "#23.",
    "#23.0",
    "#23=",
    "#23#",
    "##23",
    "#23#23",
    "#23\n#23",
    "#23\n#24",
    "#24\n#23",
    "#11\n13+10\n#23",
    "#23\n11+02",
    "#23 23",
    "#23G",
    "#23\nG",
    "GG#23",
    "  #23",
    "g#23",
    "x#23",
    "11+02+10 #23",
    "\t#23",
    "#23\t",
    "#23\r",
    "#23\r\n",
    "#23\0",
    "\0#23",
    "#23<pad>",
    "#23<eos>",
    "<bos>#23",
    "#٢٣",
    "#２３",
    "#²³",
    "#2३",
    "＃23",
    "#23\u200b",
    "\ufeff#23",
    "#23\u2028",
    "#23\x0b",
    "\ud800",
    "#0x17",
    "#2_3",
    "#nan",
    "#inf",
    "#1e1",
    "#None",
    "#13+10",
    "#int('23')",
    "#__import__('os').system('true')",
    "#" * 1000,
    "#" * 1_000_000,
    "#23\n" * 250_000,
    "7" * 1_000_000,
    "+" * 1_000_000,
    "01+" * 300_000 + "01",
    "\n" * 1_000_000,
    " " * 1_000_000,
    "a\n" * 500_000 + "#23",
    " " * 1_000_000 + "\n#23",
    "#23" + "\n" * 1_000_000,
    "11+02+10\n13+10\n" * 70 + "#23",
  )

  @parameterized.parameters(*range(len(WRONG)))
  def test_golden_wrong(self, index):
    response = self.WRONG[index]
    start = time.process_time()
    reward, parts = merge_sums.score(PROMPT, response)
    self.assertLess(time.process_time() - start, 1.0)
    self.assertEqual(reward, 0.0)
    self.assertFalse(parts["is_correct"])
    self.assertFalse(parts["is_valid"])
    self.assertIn(parts["answer"], (None, "24"))
    self.assertLen(parts["step_matches"], parts["num_steps"])

  @parameterized.parameters(
    "#23",
    "G#23",
    " #23\n",
    "#23" + " \n" * 500,
    "\n#23",
    "٠٧\n#23",
    "<pad>\n#23",
    "a\n" * 500 + "#23",
    "11+02+10\n13+10\n" * 60 + "#23",
  )
  def test_golden_right_by_answer_alone(self, response):
    reward, parts = merge_sums.score(PROMPT, response)
    self.assertEqual((reward, parts["answer"]), (1.0, "23"))
    self.assertFalse(parts["is_valid"])

  def test_answers_have_no_leading_zeros(self):
    for prompt, response, answer in (
      ("01+02=", "#03", "3"),
      ("001+020=", "#021", "21"),
      ("00+00=", "#00", "0"),
    ):
      reward, parts = merge_sums.score(prompt, response)
      self.assertEqual((reward, parts["answer"]), (1.0, answer))
      self.assertEqual(parts["truth"], answer)
      self.assertTrue(parts["is_valid"])
    self.assertEqual(merge_sums.score("001+020=", "#21")[0], 0.0)

  def _prompt_solved_by(self, merges):
    """A prompt of five terms whose reference merges at the given places."""
    for prompt in merge_sums.prompts(
      "train", 0, num=999, num_terms=5, max_term=9
    ):
      terms, lines = _terms(prompt), []
      for i in merges:
        terms[i : i + 2] = [sum(terms[i : i + 2])]
        lines.append("+".join(f"{term:02d}" for term in terms))
      lines[-1] = "#" + lines[-1]
      if merge_sums.reference(prompt) == "\n".join(lines):
        return prompt, _terms(prompt)
    raise AssertionError("Another seed, please.")

  def test_step_matches(self):
    prompt, (a, b, c, d, e) = self._prompt_solved_by([0, 0, 0, 0])

    # The reference has a+b, a+b+c and a+b+c+d; all are different.
    def matches(*lines):
      text = "\n".join(
        "+".join(f"{term:02d}" for term in line) for line in lines[:-1]
      )
      return merge_sums.score(prompt, f"{text}\n{lines[-1]}")[1]["step_matches"]

    ab, abc, abcd = a + b, a + b + c, a + b + c + d
    answer = f"#{abcd + e:02d}"
    self.assertEqual(
      matches([ab, c, d, e], [abc, d, e], [abcd, e], answer),
      [True, True, True, False],
    )
    # A wrong second result, then the right third one.
    wrong = next(n for n in range(99) if n not in (ab, abc, abcd))
    self.assertEqual(
      matches([ab, c, d, e], [wrong, d, e], [abcd, e], answer),
      [True, False, True, False],
    )
    # Each reference result matches once.
    self.assertEqual(
      matches([ab, c, d, e], [ab, d, e], [ab, e], answer),
      [True, False, False, False],
    )
    # Out of order, and the total where the reference has none.
    self.assertEqual(
      matches([abc, c, d, e], [ab, d, e], [abcd + e, e], answer),
      [True, True, False, False],
    )
    # Lines that merge nothing have no result.
    self.assertEqual(
      matches([ab, c, d], [abc, d, e], [abcd], answer), [False] * 4
    )

  def test_results_match_as_often_as_the_reference_has_them(self):
    counts = set()
    pairs = ("01+03", "02+02", "03+01")
    for left, right in itertools.product(pairs, pairs):
      prompt = f"{left}+{right}="
      # What each line of the reference has that the line before has not.
      texts = [prompt[:-1], *merge_sums.reference(prompt).split("\n")[:-1]]
      terms = [collections.Counter(text.split("+")) for text in texts]
      count = sum((b - a)["04"] for a, b in itertools.pairwise(terms))
      response = f"04+{right}\n04+04\n#08"
      _, parts = merge_sums.score(prompt, response)
      self.assertTrue(parts["is_valid"])
      self.assertEqual(parts["step_matches"], [count >= 1, count == 2, False])
      counts.add(count)
    self.assertEqual(counts, {0, 1, 2})

  @hypothesis.given(st.text(alphabet="0123#+\n GB", max_size=40))
  def test_any_text(self, response):
    reward, parts = merge_sums.score("01+02+03=", response)
    self.assertEqual(reward, float(parts["is_correct"]))
    self.assertEqual(parts["is_correct"], parts["answer"] == parts["truth"])
    self.assertLen(parts["step_matches"], parts["num_steps"])
    self.assertBetween(parts["num_valid_steps"], 0, 2)
    text = "\n".join(merge_sums.steps(response))
    self.assertEqual(parts["is_valid"], text in merge_sums.traces("01+02+03="))

  @hypothesis.given(
    index=st.integers(0, 99),
    place=st.integers(0, 17),
    character=st.sampled_from("0123456789+#\n GB"),
  )
  def test_one_other_character(self, index, place, character):
    prompt, right = PAIRS[index]
    response = right[:place] + character + right[place + 1 :]
    parts = merge_sums.score(prompt, response)[1]
    text = "\n".join(merge_sums.steps(response))
    self.assertEqual(parts["is_valid"], _is_valid(prompt, text))

  @parameterized.parameters(
    "",
    "7+4=",
    "07+04",
    "07=",
    "07+4=",
    "007+04=",
    "0007+0004=",
    "07+04=\n",
    "07-04=",
    "٠٧+٠٤=",
    "01+01+01+01+01+01+01=",
  )
  def test_bad_prompt(self, prompt):
    for function in (
      merge_sums.reference,
      merge_sums.traces,
      lambda prompt: merge_sums.score(prompt, "#11"),
    ):
      with self.assertRaisesRegex(ValueError, 'prompt such as "07'):
        function(prompt)

  def test_sum_too_large(self):
    with self.assertRaisesRegex(ValueError, "does not fit into 2 digits"):
      merge_sums.score("99+01=", "#00")

  def test_contract(self):
    scores, parts = tasks.score_all(
      tasks.load("merge_sums"), [PROMPT, PROMPT], ["#23", "#24"]
    )
    np.testing.assert_array_equal(scores, [1, 0])
    self.assertEqual(answers.mean_parts(parts)["is_correct"], 0.5)


class TokenizerTest(parameterized.TestCase):
  def test_ids(self):
    tokenizer = merge_sums.character_tokenizer()
    with tempfile.TemporaryDirectory() as folder:
      tokenizer.save_pretrained(pathlib.Path(folder))
      reloaded = transformers.AutoTokenizer.from_pretrained(folder)
    for same in (tokenizer, reloaded):
      self.assertLen(same, 20)
      self.assertEqual(same.encode("07+10="), [17, 0, 7, 10, 1, 0, 11])
      self.assertEqual(
        same.encode("#\n GB", add_special_tokens=False), [12, 13, 14, 15, 16]
      )
      self.assertEqual(
        (same.bos_token_id, same.eos_token_id, same.pad_token_id), (17, 18, 19)
      )
      self.assertEqual(same.decode([15, 12, 2, 3, 13, 14, 1]), "G#23\n 1")
      self.assertIsNone(same.unk_token_id)

  def test_other_characters_raise(self):
    tokenizer = merge_sums.character_tokenizer()
    for text in ("07-04=", "a", "٧", "\t"):
      with self.assertRaisesRegex(ValueError, "cannot encode"):
        tokens.encode_prompts(tokenizer, [text], max_length=20)

  @parameterized.parameters(False, True)
  def test_pairs_come_back(self, slot):
    tokenizer = merge_sums.character_tokenizer()
    for corpus in merge_sums.CORPORA:
      pairs = merge_sums.supervised(
        "train", 0, num=50, corpus=corpus, slot=slot
      )
      rows = tokens.encode_pairs(
        tokenizer, pairs, max_prompt_length=13, max_response_length=22
      )
      for (prompt, response), (prompt_ids, ids) in zip(
        pairs, rows, strict=True
      ):
        # One token each; the prompt's first, and the response's end token.
        self.assertLen(prompt_ids, len(prompt) + 1)
        self.assertLen(ids, len(response) + 1)
        padded, mask = batches.pad_right([ids])
        (text,) = tokens.decode(tokenizer, padded, mask)
        self.assertEqual(text, response)


PAIRS = merge_sums.supervised("train", 0, num=100)
