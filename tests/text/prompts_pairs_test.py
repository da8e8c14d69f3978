"""Tests of prompts with responses, or their beginnings, behind them."""

import types

from absl.testing import absltest

from rljax.tasks import arithmetic, merge_sums
from rljax.text import prompts

# 103 is the start token, 104 the end token, 100 "+" and 102 "=".
WORDS = arithmetic.word_tokenizer()


def _chat():
  """The same with a chat template, which puts "=" behind a prompt."""
  tokenizer = arithmetic.word_tokenizer()
  tokenizer.chat_template = "{{ messages[0]['content'] }}="
  return tokenizer


class EncodePairsTest(absltest.TestCase):
  def test_ids(self):
    self.assertEqual(
      prompts.encode_pairs(WORDS, [("1+2=", "3"), ("4=", "")], max_length=9),
      [([103, 1, 100, 2, 102], [3, 104]), ([103, 4, 102], [104])],
    )
    self.assertEqual(prompts.encode_pairs(WORDS, [], max_length=9), [])

  def test_chat_format(self):
    found = prompts.encode_pairs(
      _chat(), [("1+2", "3")], max_length=9, prompt_format="chat"
    )
    self.assertEqual(found, [([103, 1, 100, 2, 102], [3, 104])])

  def test_a_token_across_the_border(self):
    # "1" + "0" together are the one word "10".
    found = prompts.encode_pairs(WORDS, [("1", "0")], max_length=9)
    self.assertEqual(found, [([103, 1], [0, 104])])

  def test_too_long(self):
    with self.assertRaisesRegex(ValueError, "has 5 tokens, the limit is 4"):
      prompts.encode_pairs(WORDS, [("1+2=", "3")], max_length=4)


class WithinTest(absltest.TestCase):
  def test_what_is_too_long_is_counted(self):
    pairs, notes = [([1], [2, 3]), ([1], [2, 3, 4]), ([1, 2, 3], [4])], []
    self.assertEqual(
      prompts.within(pairs, 2, notes.append), [pairs[0], pairs[2]]
    )
    self.assertLen(notes, 1)
    self.assertIn("1 of 3 responses are left out", notes[0])
    self.assertIn("more than 2 tokens", notes[0])
    self.assertEqual(prompts.within(pairs, 3, notes.append), pairs)
    self.assertLen(notes, 1)

  def test_none_is_left(self):
    with self.assertRaisesRegex(
      ValueError, "fits into 1 tokens: give a larger"
    ):
      prompts.within([([1], [2, 3])], 1, lambda text: None)


class EncodePrefixesTest(absltest.TestCase):
  PAIRS = (("1+2=", "3+"), ("1+2=", "3+4="), ("5=", ""))

  def test_ids(self):
    ids, num_tokens = prompts.encode_prefixes(WORDS, self.PAIRS, max_length=9)
    self.assertEqual(
      ids,
      [
        [103, 1, 100, 2, 102, 3, 100],
        [103, 1, 100, 2, 102, 3, 100, 4, 102],
        [103, 5, 102],
      ],
    )
    self.assertEqual(num_tokens, [2, 4, 0])

  def test_chat_format(self):
    ids, num_tokens = prompts.encode_prefixes(
      _chat(), [("1+2", "3+")], max_length=9, prompt_format="chat"
    )
    self.assertEqual(ids, [[103, 1, 100, 2, 102, 3, 100]])
    self.assertEqual(num_tokens, [2])

  def test_too_long(self):
    with self.assertRaisesRegex(ValueError, "has 9 tokens, the limit is 8"):
      prompts.encode_prefixes(WORDS, self.PAIRS, max_length=8)


class SolvedTest(absltest.TestCase):
  def test_pairs_of_the_task(self):
    options = {"num_terms": 2, "slot": True}
    found = prompts.solved(
      merge_sums, "train", num=4, seed=3, task_options=options
    )
    self.assertEqual(found, merge_sums.supervised("train", 3, num=4, **options))
    self.assertLen(found, 4)

  def test_none(self):
    task = types.SimpleNamespace(__name__="tasks.mine")
    self.assertEqual(prompts.solved(task, "train", num=0, seed=0), [])

  def test_bad_input(self):
    task = types.SimpleNamespace(__name__="tasks.mine")
    with self.assertRaisesRegex(ValueError, "--task=mine has no solutions"):
      prompts.solved(task, "train", num=1, seed=0)
    with self.assertRaisesRegex(ValueError, "no option 'slots'"):
      prompts.solved(
        merge_sums, "train", num=1, seed=0, task_options={"slots": 1}
      )


if __name__ == "__main__":
  absltest.main()
