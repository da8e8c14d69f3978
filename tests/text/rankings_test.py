"""Comparisons that reward models learn from, and held-out ones."""

import pathlib
import tempfile

from absl.testing import parameterized

from rljax.tasks import arithmetic, word_lists
from rljax.text import files, rankings

WORDS = arithmetic.word_tokenizer()
SETTINGS = {
  "prompt_format": "plain",
  "max_prompt_length": 9,
  "max_response_length": 9,
}


class ReadTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self._temporary = tempfile.TemporaryDirectory()
    self.addCleanup(self._temporary.cleanup)
    self.folder = pathlib.Path(self._temporary.name)

  def _file(self, name, rows):
    path = self.folder / name
    files.write_jsonl(path, rows)
    return str(path)

  def _read(self, data, eval_data="", **options):
    return rankings.read(
      WORDS,
      data,
      eval_data,
      num_eval_rows=99,
      seed=0,
      options={},
      **SETTINGS | options,
    )

  def test_a_question_that_stands_twice_is_on_one_side(self):
    rows = [
      {"prompt": f"{i % 10}+1=", "chosen": str(i % 10), "rejected": "12"}
      for i in range(30)
    ]
    found = self._read(self._file("a.jsonl", rows), eval_share=0.3)
    asked = [
      {row.prompt for row in part.rows}
      for part in (found.train, found.held_out)
    ]
    self.assertFalse(asked[0] & asked[1])
    self.assertLen(found.held_out.rows, 9)
    other = self._file("b.jsonl", rows[:2])
    found = self._read(self._file("a.jsonl", rows), other)
    self.assertLen(found.train.rows, 24)
    self.assertEqual(
      found.counts, {"comparisons of held-out prompts left out": 6}
    )

  def test_the_splits_of_a_task_are_its_own(self):
    tokenizer = word_lists.word_tokenizer()
    found = rankings.read(
      tokenizer,
      "",
      num_eval_rows=99,
      task=word_lists,
      seed=0,
      options={"num": 16},
      **SETTINGS,
    )
    self.assertLen(found.train.rows, 14)  # Two have equal rewards.
    self.assertEqual(set(found.counts.values()), {0})
