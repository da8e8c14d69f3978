"""Tests of values of prefixes, with completions that are known."""

import pathlib
import tempfile

import numpy as np
from absl.testing import parameterized

from rljax.distributed import meshes
from rljax.generation import completions, responses, samplers
from rljax.tasks import arithmetic
from rljax.text import batches, files, prompts
from tests import stand_in

NUMBERS = arithmetic.word_tokenizer()
LENGTH = 8


def _model():
  """Says 7 or 8 after "=", 1 after another word, and ends after those."""
  table = np.full((32, len(NUMBERS), len(NUMBERS)), -30.0, np.float32)
  equals, plus = NUMBERS.convert_tokens_to_ids(["=", "+"])
  table[:, equals, [7, 8]] = 1.0
  table[:, [1, 7, 8], NUMBERS.eos_token_id] = 1.0
  table[:, plus, plus] = 1.0  # It never ends.
  return stand_in.model(len(NUMBERS)), stand_in.params(table)


class ValuesTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = self.enter_context(tempfile.TemporaryDirectory())
    self.model, self.params = _model()
    self.asked, self.stop_after = [], None

  def score(self, asked, texts):
    """The whole response is right if it ends in 7."""
    self.asked += zip(asked, texts, strict=True)
    parts = [{"is_correct": text.endswith("=7")} for text in texts]
    return np.float32([part["is_correct"] for part in parts]), parts

  def progress(self, name, num):
    self.assertRegex(name, r"^completions, \d+ tokens$")
    self.assertGreater(num, 0)

    def after(done, rows):
      del rows
      if self.stop_after is not None:
        self.stop_after -= 1
        if self.stop_after < 0:
          raise KeyboardInterrupt

    return after

  def values(self, pairs, batch_size=2, num_samples=16):
    sampler = samplers.Sampler(
      self.model,
      NUMBERS,
      responses.Settings(max_length=LENGTH, unfinished_score=0.0, seed=1),
      mesh=meshes.make("data:1"),
    )
    return completions.values(
      self.folder,
      sampler,
      self.params,
      pairs,
      prompts.encode_prefixes(NUMBERS, pairs, max_length=30),
      self.score,
      num_samples=num_samples,
      batch_size=batch_size,
      progress=self.progress,
    )

  PAIRS = (
    ("1+2", "=3+4="),
    ("1+2", "=3+"),
    ("2+1", "=3+4="),
    ("5", "=3+4="),
  )

  def test_values_are_shares_of_right_completions(self):
    found, num_drawn = self.values(self.PAIRS)
    self.assertEqual(num_drawn, 4 * 16)
    self.assertEqual(set(found), set(self.PAIRS))
    rows = {}
    for path in pathlib.Path(self.folder).iterdir():
      for row in files.read_jsonl(path):
        rows.setdefault(row["prompt"], []).append(row)
    for (prompt, prefix), value in found.items():
      own = rows[prompt + prefix]
      self.assertLen(own, 16)
      is_right = [row["response"] == "7" for row in own]
      # What never ends is never right.
      self.assertEqual(value, 0.0 if prefix == "=3+" else np.mean(is_right))
    self.assertBetween(found[self.PAIRS[0]], 0.1, 0.9)
    # Whole responses are scored, behind their own prompts.
    for prompt, text in self.asked:
      self.assertIn(prompt, {p for p, _ in self.PAIRS})
      self.assertRegex(text, r"^=3\+(4=[78]|\+*)$")
    # There is a group for each padded length.
    ids, _ = prompts.encode_prefixes(NUMBERS, self.PAIRS, max_length=30)
    lengths = {batches.bucket_length(len(row)) for row in ids}
    names = {path.name for path in pathlib.Path(self.folder).iterdir()}
    self.assertEqual(names, {f"{length}.jsonl" for length in lengths})
    self.assertLen(names, 2)
    contents = {
      name: pathlib.Path(self.folder, name).read_bytes() for name in names
    }
    # Stopped in the second group, and called again with other batches.
    self.folder = self.enter_context(tempfile.TemporaryDirectory())
    self.stop_after = 2
    with self.assertRaises(KeyboardInterrupt):
      self.values(self.PAIRS, batch_size=1)
    self.assertLen(list(pathlib.Path(self.folder).iterdir()), 2)
    self.stop_after, self.asked = None, []
    self.assertEqual(self.values(self.PAIRS), (found, num_drawn))
    # One prefix of four was left.
    self.assertLen(self.asked, num_drawn // 4)
    for name, content in contents.items():
      self.assertEqual(pathlib.Path(self.folder, name).read_bytes(), content)

  def test_whole_responses_are_no_longer_than_the_limit(self):
    self.values([("1+2", "=3+"), ("2", "=2+3+4+5+")], num_samples=1)
    lengths = [len(text) for _, text in self.asked]
    # Of three tokens, up to eight; of nine, one more in any case.
    self.assertEqual(sorted(lengths), [LENGTH, len("=2+3+4+5+") + 1])


class CheckPositionsTest(parameterized.TestCase):
  def test_the_longest_padded_prefix(self):
    # 10 to 15 tokens are padded to 12 or 16; the worst prefix has 13 tokens,
    # 3 of them its own: 16, and 6 - 3 more.
    completions.check_positions(10, 6, 19)
    with self.assertRaisesRegex(ValueError, "19 tokens .* has 18 positions"):
      completions.check_positions(10, 6, 18)

  @parameterized.product(prompt_length=(1, 5, 13), max_length=(1, 4, 9))
  def test_every_prefix(self, prompt_length, max_length):
    needed = max(
      batches.bucket_length(prompt_length + n) + max_length - n
      for n in range(max_length)
    )
    completions.check_positions(prompt_length, max_length, needed)
    with self.assertRaises(ValueError):
      completions.check_positions(prompt_length, max_length, needed - 1)
