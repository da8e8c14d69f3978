"""Tests of rows that are asked: as given, encoded, and as they are scored."""

import os
import tempfile
import types

import pytest
from absl.testing import absltest

from rljax.tasks import arithmetic, word_lists
from rljax.text import encoding, files, logged, prompts

pytest.importorskip("tokenizers")

TEMPLATE = (
  "{% for message in messages %}{{ message['content'] }}{% endfor %}"
  "{% if add_generation_prompt %} crow{% endif %}"
)
LIMITS = {"max_prompt_length": 4, "max_response_length": 8}


def _prepare(rows, prompt_format="plain", too_long="skip"):
  tokenizer = word_lists.word_tokenizer()
  tokenizer.chat_template = TEMPLATE
  return encoding.prepare(
    tokenizer, rows, prompt_format=prompt_format, too_long=too_long, **LIMITS
  )


class RowsTest(absltest.TestCase):
  def test_rows_that_are_left(self):
    # The second one is too long.
    rows = logged.from_prompts(["owl", "owl " * 9, "duck"], "here")
    encoded = _prepare(rows)
    self.assertEqual(encoding.as_given(rows, encoded), [rows[0], rows[2]])
    asked = prompts.of_rows(rows, encoded, templated=False)
    self.assertEqual(asked.texts, ["owl", "duck"])
    self.assertEqual(asked.encoded, encoded.prompt_ids)
    self.assertEqual(asked.ids.shape, asked.mask.shape)
    self.assertEqual(asked.mask.sum(), sum(map(len, encoded.prompt_ids)))

  def test_a_task_scores_what_it_has_written(self):
    rows = logged.from_prompts(["owl", "duck"], "here")
    encoded = _prepare(rows, "chat")
    self.assertEqual(encoding.as_given(rows, encoded), rows)
    asked = prompts.of_rows(rows, encoded, templated=False)
    self.assertEqual(asked.texts, ["owl", "duck"])
    # The policy and a reward model read the template.
    self.assertEqual(asked.encoded, encoded.prompt_ids)
    self.assertLen(encoded.prompt_ids[0], 2 + 1)  # With the start token.
    asked = prompts.of_rows(rows, encoded, templated=True)
    self.assertEqual(asked.texts, ["owl crow", "duck crow"])

  def test_messages_are_in_the_template(self):
    message = {"role": "user", "content": "owl"}
    rows = logged.from_prompts(["duck", [message]], "here")
    asked = prompts.of_rows(rows, _prepare(rows, "chat"), templated=False)
    self.assertEqual(asked.texts, ["duck crow", "owl crow"])


class LoadOrAskTest(absltest.TestCase):
  def test_a_file_or_a_task(self):
    folder = self.enter_context(tempfile.TemporaryDirectory())
    path = os.path.join(folder, "rows.jsonl")
    files.write_jsonl(path, [{"prompt": "a", "response": "b"}, {"x": 1}])
    rows, unusable, _ = logged.load_or_ask(path, None, "test", 0, {})
    self.assertEqual([(r.prompt, r.candidates) for r in rows], [("a", ())])
    self.assertLen(unusable, 1)
    rows, unusable, _ = logged.load_or_ask(
      "", arithmetic, "test", 3, {"num": 5, "style": "last"}
    )
    expected = arithmetic.prompts("test", 3, num=5, style="last")
    self.assertEqual([row.prompt for row in rows], expected)
    self.assertEqual(rows[4].place, "arithmetic, test, row 4")
    self.assertEqual(unusable, [])

  def test_unknown_option(self):
    task = types.SimpleNamespace(
      __name__="tasks.few", prompts=lambda split, seed, *, num: []
    )
    with self.assertRaisesRegex(ValueError, "no option 'style'; it has num"):
      logged.load_or_ask("", task, "test", 0, {"style": "last"})


if __name__ == "__main__":
  absltest.main()
