"""Tests of prompts that are read from files and tasks."""

import pathlib
import tempfile

import numpy as np
import pytest
from absl.testing import absltest

from rljax.tasks import arithmetic, word_lists
from rljax.text import files, prompts

pytest.importorskip("tokenizers")

LIMITS = {
  "max_prompt_length": 5,
  "max_response_length": 4,
  "too_long": "skip",
  "prompt_format": "plain",
}


class LoadTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    folder = self.enter_context(tempfile.TemporaryDirectory())
    self.file = pathlib.Path(folder) / "prompts.jsonl"
    # Ten different prompts; each comes twice, with another column.
    self.rows = [
      {"prompt": f"{i}+{i}=", "answer": f"{i}{side}"}
      for side in "ab"
      for i in range(10)
    ]
    files.write_jsonl(self.file, self.rows)

  def load(self, data="", **options):
    return prompts.load(
      None,
      arithmetic.word_tokenizer(),
      **{
        "seed": 0,
        "num_prompts": 99,
        "num_eval_prompts": 99,
        "eval_split": "test",
        "max_length": 8,
        "data": data or str(self.file),
        **options,
      },
    )

  def test_one_file_is_split_by_distinct_prompts(self):
    train, held_out = self.load(eval_share=0.3)
    self.assertLen(train, 14)
    self.assertLen(held_out, 6)
    self.assertFalse(set(train.texts) & set(held_out.texts))
    self.assertEqual(train.ids.shape[1], held_out.ids.shape[1])
    # Equal prompts keep columns of their own.
    answers = {(str(t), t.columns["answer"]) for t in held_out.texts}
    self.assertLen(answers, 6)
    again, _ = self.load(eval_share=0.3)
    self.assertEqual(again.texts, train.texts)
    others, _ = self.load(eval_share=0.3, seed=1)
    self.assertNotEqual(others.texts, train.texts)

  def test_files_of_their_own_and_splits(self):
    train, held_out = self.load(eval_data=str(self.file), num_eval_prompts=3)
    self.assertEqual((len(train), len(held_out)), (20, 3))
    for split in ("train", "test"):
      files.write_jsonl(
        self.file.parent / f"{split}.jsonl", [{"prompt": "1"}, {"prompt": "2"}]
      )
    for data in (
      str(self.file.parent),
      str(self.file.parent / "{split}.jsonl"),
    ):
      train, held_out = self.load(data)
      self.assertEqual(train.texts, ["1", "2"])
      self.assertEqual(held_out.texts, ["1", "2"])

  def test_what_cannot_be_used_is_named(self):
    files.write_jsonl(
      self.file, [{"prompt": "1+" * 15}, {"prompt": ""}, *self.rows]
    )
    with self.assertLogs("absl", "WARNING"):
      train, held_out = self.load()
    self.assertEqual(len(train) + len(held_out), 20)
    self.assertRegex(" ".join(train.skipped + held_out.skipped), "31 tokens")
    self.assertRegex(" ".join(train.skipped), "prompts.jsonl:2: .* is empty")

  def test_too_few(self):
    with self.assertRaisesRegex(ValueError, "leaves 18 prompts .* asks 32"):
      self.load(at_least=32)
    files.write_jsonl(self.file, [{"prompt": "1"}, {"prompt": "1"}])
    with self.assertRaisesRegex(ValueError, "one prompt, of which none can"):
      self.load()


class ReadTest(absltest.TestCase):
  def test_a_file(self):
    folder = self.enter_context(tempfile.TemporaryDirectory())
    path = pathlib.Path(folder) / "dev.jsonl"
    texts = ["1", "", "1+2=", "1+2+3=", "2", "3"]
    files.write_jsonl(path, [{"prompt": text} for text in texts])
    found = prompts.read(
      arithmetic.word_tokenizer(),
      name=str(path),
      task=None,
      seed=0,
      num_prompts=4,
      **LIMITS,
    )
    # Of the first four that can be used, one is too long.
    self.assertEqual(found.texts, ["1", "1+2=", "2"])
    self.assertLen(found, 3)
    self.assertEqual(found.encoded, [[103, 1], [103, 1, 100, 2, 102], [103, 2]])
    np.testing.assert_array_equal(found.mask.sum(axis=1), [2, 5, 2])
    np.testing.assert_array_equal(found.ids[1][found.mask[1]], found.encoded[1])
    self.assertTrue(found.mask[:, -1].all())  # Padded on the left.
    self.assertRegex(found.skipped[0], 'dev.jsonl:2: "prompt" is empty')
    self.assertRegex(found.skipped[1], "dev.jsonl:4: the prompt has 7 tokens")
    self.assertLen(found.skipped, 2)

  def test_a_task(self):
    found = prompts.read(
      word_lists.word_tokenizer(),
      name="",
      task=word_lists,
      seed=2,
      num_prompts=3,
      split="test",
      **LIMITS | {"max_prompt_length": 16},
    )
    self.assertEqual(found.texts, word_lists.prompts("test", 2, num=3))
    self.assertEqual(found.skipped, [])


if __name__ == "__main__":
  absltest.main()
