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
