"""Rows are held out by distinct prompt."""

import pathlib
import tempfile

import numpy as np
from absl.testing import parameterized

from rljax.tasks import arithmetic
from rljax.text import batches, encoding, files, forms, splits

WORDS = arithmetic.word_tokenizer()


def _row(prompt, response="3"):
  return forms.Row(prompt, (response,), None, None, None, prompt, None)


class HeldOutTest(parameterized.TestCase):
  def test_no_prompt_is_on_both_sides(self):
    prompts = [f"{i % 20}+1=" for i in range(100)]
    for seed in range(3):
      chosen = splits.held_out(prompts, 0.1, seed=seed)
      apart = {p for p, x in zip(prompts, chosen, strict=True) if x}
      left = {p for p, x in zip(prompts, chosen, strict=True) if not x}
      self.assertLen(apart, 2)
      self.assertFalse(apart & left)
      np.testing.assert_array_equal(
        chosen, splits.held_out(prompts, 0.1, seed=seed)
      )
    self.assertLess(
      (chosen & splits.held_out(prompts, 0.1, seed=0)).sum(), chosen.sum()
    )

  def test_messages_and_limits(self):
    ask = lambda text: ({"role": "user", "content": text},)
    prompts = [ask("a"), ask("b"), ask("a"), ask("c")]
    chosen = splits.held_out(prompts, 0.9, seed=0)
    self.assertEqual(chosen[0], chosen[2])
    self.assertFalse(chosen.all())
    self.assertTrue(chosen.any())
    many = [str(i) for i in range(99)]
    self.assertEqual(splits.held_out(many, 0.5, seed=0, most=3).sum(), 3)

  def test_blanks_and_messages_make_no_other_question(self):
    ask = lambda text: ({"role": "user", "content": text},)
    same = ["a b", "a  b\n", "a\r\nb", ask("a b"), ask(" a b")]
    prompts = [x for text in "cdefg" for x in (*same, f"{text} b")]
    for seed in range(3):
      for chosen in (
        splits.held_out(prompts, 0.5, seed=seed),
        np.isin(
          range(len(prompts)), splits.shuffled(prompts, 0.5, seed=seed)[0]
        ),
      ):
        of_same = [x for p, x in zip(prompts, chosen, strict=True) if p in same]
        self.assertLen(set(of_same), 1)

  @parameterized.parameters(0.0, 1.0, -1.0)
  def test_bad_shares(self, share):
    with self.assertRaisesRegex(ValueError, "--eval_share must lie between"):
      splits.held_out(["a", "b"], share, seed=0)

  def test_one_prompt(self):
    with self.assertRaisesRegex(ValueError, "one prompt, of which none can"):
      splits.held_out(["a", "a"], 0.5, seed=0)

  def test_shuffled(self):
    prompts = [f"{i}+1=" for i in range(10)]
    apart, left = splits.shuffled(prompts, 0.2, seed=3)
    order = batches.epoch_order(10, seed=3, epoch=0)
    np.testing.assert_array_equal(np.concatenate([apart, left]), order)
    self.assertLen(apart, 2)
    apart, left = splits.shuffled(prompts * 3, 0.2, seed=3)
    self.assertEqual((len(apart), len(left)), (6, 24))
    self.assertFalse({i % 10 for i in apart} & {i % 10 for i in left})

  def test_without(self):
    rows = [_row("a"), _row("b"), _row("a", "4")]
    self.assertEqual(splits.without(rows, [_row("a", "5")]), rows[1:2])
    with self.assertRaisesRegex(ValueError, "All prompts"):
      splits.without(rows[:1], rows)


class ExamplesTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self._temporary = tempfile.TemporaryDirectory()
    self.addCleanup(self._temporary.cleanup)
    self.path = str(pathlib.Path(self._temporary.name) / "rows.jsonl")

  def _read(self, rows, eval_rows=(), **options):
    files.write_jsonl(self.path, rows)
    other = ""
    if eval_rows:
      other = self.path.replace("rows", "other")
      files.write_jsonl(other, eval_rows)
    limits = {"max_prompt_length": 9, "max_response_length": 9}
    return encoding.examples(
      WORDS,
      self.path,
      other,
      settings={"prompt_format": "plain", **limits},
      **{"share": 0.2, "most": 99, "seed": 0} | options,
    )

  def test_one_file_is_enough(self):
    rows = [{"prompt": f"{i % 10}+1=", "completion": str(i)} for i in range(30)]
    found = self._read(rows)
    asked = [
      {row.prompt for row in part.rows}
      for part in (found.train, found.held_out)
    ]
    self.assertFalse(asked[0] & asked[1])
    self.assertEqual([len(found.train.rows), len(found.held_out.rows)], [24, 6])
    self.assertIn("30 of 30 rows are used, as completions", found.notes[0])

  def test_prompts_of_another_file_are_left_out(self):
    rows = [{"prompt": f"{i}+1=", "response": "3"} for i in range(4)]
    found = self._read(rows, rows[1:2])
    self.assertEqual(
      [row.prompt for row in found.train.rows], ["0+1=", "2+1=", "3+1="]
    )
    self.assertIn("1 rows are left out", found.notes[-1])
