"""Compared replies of a log in memory, and of a stream."""

import collections
import json
import pathlib
import tempfile

import numpy as np
from absl.testing import absltest, parameterized

from rljax.tasks import tokenizers
from rljax.text import logged, paired

TOKENIZER = tokenizers.of_words([*"0123456789=+ "], ".")
SETTINGS = {
  "prompt_format": "plain",
  "max_prompt_length": 6,
  "max_response_length": 5,
  "too_long": "skip",
}
NUM = 24


def _pair(i):
  return {"prompt": f"{i}+1=", "chosen": f"{i + 1}", "rejected": f"{i}"}


class StreamTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    folder = self.enter_context(tempfile.TemporaryDirectory())
    self.path = pathlib.Path(folder, "rows.jsonl")

  def write(self, rows):
    self.path.write_text("".join(json.dumps(row) + "\n" for row in rows))

  def open(self, function=paired.stream, **options):
    options = {
      **({"share": None, "most": 9, "seed": 1, "batch_size": 4, "buffer": 7}),
      **options,
    }
    return function(TOKENIZER, str(self.path), settings=SETTINGS, **options)

  def said(self, batch):
    """Prompt and replies of every row, in a text."""
    found = []
    for i in range(len(batch["response_ids"])):
      parts = [batch["prompt_ids"][i, 0][batch["prompt_mask"][i, 0]]]
      parts += [
        ids[keep]
        for ids, keep in zip(
          batch["response_ids"][i], batch["response_mask"][i], strict=True
        )
      ]
      texts = [
        TOKENIZER.decode(x, skip_special_tokens=True).replace(" ", "")
        for x in parts
      ]
      found.append(" ".join(texts))
    return found

  def epoch(self, stream, num):
    return collections.Counter(
      text for _ in range(num // 4) for text in self.said(stream.batch(0))
    )

  def test_every_pair_once_an_epoch(self):
    rows = [_pair(i) for i in range(NUM)]
    rows.insert(5, {"prompt": "5", "response": "6"})  # Alone.
    self.write(rows)
    stream = self.open(by_reward=False, threshold=None)
    self.assertEqual(stream.num_held_out, 0)
    self.assertEqual(stream.first()["response_ids"].shape, (4, 2, 5))
    expected = collections.Counter(f"{i}+1= {i + 1} {i}" for i in range(NUM))
    self.assertEqual(self.epoch(stream, NUM), expected)
    self.assertEqual(stream.metrics["data/left_out"], 1)
    self.assertIn("1 of them are left out: ", "".join(stream.notes))

  def test_by_reward(self):
    rows = [
      {"prompt": f"{i}", "candidates": ["1", "2", "3"], "rewards": [2, 3, i]}
      for i in (0, 1, 4, 5)
    ]
    rows.append({"prompt": "9", "candidates": ["1", "2"], "rewards": [1, 1]})
    self.write(rows)
    found = self.epoch(self.open(by_reward=True, threshold=None), 4)
    self.assertEqual(set(found), {"0 2 3", "1 2 3", "4 3 1", "5 3 1"})
    found = self.epoch(self.open(by_reward=False, threshold=None), 8)
    every = {"0 1 3", "1 1 3", "4 1 3", "5 1 3", "9 1 2"}
    self.assertEqual(set(found), every)

  def test_every_reply_by_itself(self):
    rows = [
      {"prompt": f"{i}", "candidates": ["1", "2"], "rewards": [i, 7 - i]}
      for i in range(8)
    ]
    self.write(rows)
    stream = self.open(by_reward=False, threshold=3.5)
    found = []
    for _ in range(4):
      batch = stream.batch(0)
      self.assertEqual(batch["rewards"].shape, (4, 1))
      found += zip(self.said(batch), batch["rewards"][:, 0], strict=True)
    expected = [(f"{i} 1", i) for i in range(8)]
    expected += [(f"{i} 2", 7 - i) for i in range(8)]
    self.assertCountEqual(found, expected)
    with self.assertRaisesRegex(ValueError, "16 replies 0 are good ones"):
      self.open(by_reward=False, threshold=9)
    self.assertEqual(paired.of_first_labels(None, str(self.path)), None)

  def test_goes_on_from_a_place(self):
    self.write([_pair(i) for i in range(NUM)])
    options = {"by_reward": False, "threshold": None, "share": 0.3}
    stream, other = self.open(**options), self.open(**options)
    self.assertBetween(stream.num_held_out, 2, 12)
    held_out = self.said(stream.held_out_batch(np.arange(stream.num_held_out)))
    for _ in range(9):
      batch = stream.batch(0)
      self.assertFalse(set(self.said(batch)) & set(held_out))
    other.go_to(json.loads(json.dumps(stream.place)))
    for _ in range(6):
      self.assertEqual(self.said(stream.batch(0)), self.said(other.batch(0)))

  def test_all_replies_in_order(self):
    rows = [
      {"prompt": f"{i}", "candidates": ["1", "2", "3"], "rewards": [2, 3, 1]}
      for i in range(4)
    ]
    rows[1] = _pair(1)
    self.write(rows)
    stream = self.open(paired.ranked_stream, order="")
    batch = stream.batch(0)
    self.assertCountEqual(
      self.said(batch), ["0 2 1 3", "1+1= 2 1 ", "2 2 1 3", "3 2 1 3"]
    )
    self.assertEqual(batch["present"].sum(), 11)
    # Of the pair, whose order is all there is, they are 0 and -1.
    best = sorted(batch["rewards"][:, 0].tolist())
    self.assertEqual(best, [0, 3, 3, 3])

  @parameterized.parameters(
    ([{"prompt": "1", "response": "2"}], {}, "can be used: .*nothing to compa"),
    (
      [_pair(1)],
      {"by_reward": True},
      '"reward" is missing, for --order=reward',
    ),
    ([_pair(1)], {"threshold": 0.5}, '"reward" is missing, for --kto_thr'),
  )
  def test_bad_input(self, rows, options, message):
    self.write(rows)
    options = {"by_reward": False, "threshold": None} | options
    with self.assertRaisesRegex(ValueError, message):
      self.open(**options)


class BestFirstTest(absltest.TestCase):
  def test_ends_go_with_their_replies(self):
    (row,) = logged.from_rows(
      [
        {
          "prompt": "a",
          "candidates": ["p", "q", "r"],
          "rewards": [1, 3, 2],
          "finished": [True, False, True],
        }
      ],
      "log",
    )
    self.assertEqual(logged.best_first(row).finished, (False, True, True))


if __name__ == "__main__":
  absltest.main()
