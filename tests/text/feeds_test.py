"""Batches of rows in memory, and of a stream."""

import collections
import gzip
import itertools
import json
import pathlib
import shutil
import tempfile
from unittest import mock

import numpy as np
import pytest
from absl.testing import absltest, parameterized

from rljax.tasks import tokenizers
from rljax.text import encoding, feeds, files

TOKENIZER = tokenizers.of_words([*"0123456789=+ "], ".")
NUM = 60  # Rows; two of each prompt.
SETTINGS = {
  "prompt_format": "plain",
  "max_prompt_length": 6,
  "max_response_length": 5,
  "too_long": "skip",
}


def _rows():
  """Sums, a row without a reply, and one that is too long."""
  rows = [
    {"prompt": f"{i // 2}+1=", "response": f"{i // 2 + 1} {i % 2}"}
    for i in range(NUM)
  ]
  rows[7] = {"prompt": "7+1="}
  rows[20]["response"] = "1" * 9
  return rows


def _write(folder, name):
  path = pathlib.Path(folder, name)
  lines = "".join(json.dumps(row) + "\n" for row in _rows())
  if name.endswith(".gz"):
    path.write_bytes(gzip.compress(lines.encode()))
  elif name.endswith(".parquet"):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(_rows()), path)
  else:
    path.write_text(lines)
  return str(path)


class StreamTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = tempfile.mkdtemp()
    self.addCleanup(shutil.rmtree, self.folder)

  def stream(self, name="rows.jsonl", settings=(), **options):
    path = name if ":" in name else _write(self.folder, name)
    options = {
      "share": 0.3,
      "most": 100,
      "seed": 1,
      "batch_size": 4,
      "buffer": 16,
    } | options
    return feeds.stream(
      TOKENIZER, path, settings=SETTINGS | dict(settings), **options
    )

  def texts(self, batch):
    ids = np.concatenate([batch["prompt_ids"], batch["response_ids"]], 1)
    mask = np.concatenate([batch["prompt_mask"], batch["response_mask"]], 1)
    return [
      TOKENIZER.decode(row[keep], skip_special_tokens=True).replace(" ", "")
      for row, keep in zip(ids, mask, strict=True)
    ]

  def epoch(self, stream):
    """Texts of the first epoch, and of its batches, in order."""
    found = []
    while stream.place["epoch"] == 0:
      place = stream.place
      found += [(place, text) for text in self.texts(stream.batch(0))]
    return [text for _, text in found]

  def test_every_row_once_an_epoch(self):
    stream = self.stream()
    held_out = {row.prompt for row in stream.held_out.rows}
    self.assertBetween(len(held_out), 4, 15)
    expected = collections.Counter(
      f"{row['prompt']}{row['response']}".replace(" ", "")
      for i, row in enumerate(_rows())
      if i not in (7, 20) and row["prompt"] not in held_out
    )
    total = expected.total()
    drawn = []
    for _ in range(3 * total // 4 + 1):
      drawn += self.texts(stream.batch(0))
    for epoch in range(3):
      some = drawn[epoch * total : (epoch + 1) * total]
      self.assertEqual(collections.Counter(some), expected)
    self.assertNotEqual(drawn[:total], drawn[total : 2 * total])
    # Rows stay within their buffer, and are shuffled there.
    number = lambda text: int(text.split("+")[0])
    self.assertLess(max(map(number, drawn[:6])), 8)
    self.assertNotEqual(
      [*map(number, drawn[:6])], sorted(map(number, drawn[:6]))
    )
    self.assertGreaterEqual(stream.metrics["data/left_out"], 3)
    self.assertEqual(stream.metrics["data/epoch"], 3)

  def test_every_buffer_has_an_order_of_its_own(self):
    other = pathlib.Path(self.folder, "other.jsonl")
    other.write_text(json.dumps({"prompt": "9", "response": "9"}) + "\n")
    stream = self.stream(eval_data=str(other), buffer=8)
    orders = [
      tuple(int(x.place.rpartition(":")[2]) - row for x in rows)
      for _, row, rows, _ in itertools.islice(stream._buffers(0, 0), 14)
      if len(rows) == 8
    ]
    self.assertGreater(len(orders), 10)  # Of two epochs.
    self.assertLen(set(orders), len(orders))

  @parameterized.parameters(0, 1, 5, 12, 40)
  def test_goes_on_from_a_place(self, num_steps):
    stream, other = self.stream(), self.stream()
    first = stream.first()
    for name, array in stream.batch(0).items():
      np.testing.assert_array_equal(array, first[name])
    stream.go_to({})
    for step in range(num_steps):
      stream.batch(step)
    other.go_to(json.loads(json.dumps(stream.place)))
    for step in range(6):
      one, two = stream.batch(step), other.batch(step)
      for name in one:
        np.testing.assert_array_equal(one[name], two[name])
      self.assertEqual(stream.place, other.place)

  @parameterized.parameters("rows.jsonl.gz", "rows.parquet", "hub:")
  def test_files(self, name):
    expected = self.texts(self.stream().batch(0))
    if name == "hub:":
      datasets = pytest.importorskip("datasets")
      folder = pathlib.Path(self.folder, "hub")
      folder.mkdir()
      _write(folder, "train.jsonl")
      name = f"hub:{folder}"
      real = datasets.load_dataset
      with mock.patch.object(
        datasets, "load_dataset", side_effect=real
      ) as load:
        found = self.texts(self.stream(name).batch(0))
      for call in load.call_args_list:
        self.assertTrue(call.kwargs["streaming"])
    else:
      found = self.texts(self.stream(name).batch(0))
    self.assertEqual(found, expected)

  def test_reads_no_further_than_it_must(self):
    path = _write(self.folder, "rows.jsonl")
    num_read = 0
    real = files.load_placed_rows

    def counted(*args, **options):
      nonlocal num_read
      for found in real(*args, **options):
        num_read += 1
        yield found

    rows = pathlib.Path(path).read_text()
    pathlib.Path(path).write_text(rows * 100)
    with (
      mock.patch.object(files, "load_placed_rows", counted),
      mock.patch.object(feeds, "HEAD", 50),
      mock.patch("rljax.text.forms._NUM_DECIDING", 50),
    ):
      stream = feeds.stream(
        TOKENIZER,
        path,
        settings=SETTINGS,
        **{"share": 0.3, "most": 3, "seed": 1},
        batch_size=4,
        buffer=16,
      )
      stream.batch(0)
      self.assertLess(num_read, 50 + feeds._CHUNK + 16 + 2)

  def test_held_out_file_and_whole_texts(self):
    other = pathlib.Path(self.folder, "other.jsonl")
    other.write_text(json.dumps(_rows()[10]) + "\n")
    stream = self.stream(
      settings={"assistant_only": False}, eval_data=str(other), buffer=1
    )
    self.assertLen(stream.held_out.rows, 1)
    batch = stream.batch(0)
    self.assertEqual(batch["prompt_ids"].shape, (4, 1))
    self.assertEqual(batch["response_ids"].shape, (4, 11))
    texts = self.texts(batch) + self.texts(stream.batch(1))
    # In order; row 7 has no reply.
    self.assertEqual(texts[:4], ["0+1=10", "0+1=11", "1+1=20", "1+1=21"])
    drawn = [text for _ in range(20) for text in self.texts(stream.batch(0))]
    self.assertNotIn("5+1=60", drawn)

  def test_rows_that_do_not_fit_wait(self):
    stream, plain = self.stream(), self.stream()
    stream.fits = lambda part: len(part.rows) <= 3
    batch = stream.batch(0)
    self.assertFalse(batch["response_mask"][3].any())
    found = self.texts(batch)[:3] + self.texts(stream.batch(1))[:3]
    expected = self.texts(plain.batch(0)) + self.texts(plain.batch(1))
    self.assertEqual(found, expected[:6])

  @parameterized.parameters(
    ({"share": 0.0}, "--eval_share must lie between 0 and 1"),
    ({"share": 1e-6}, "holds out none of the first 60 rows"),
    ({"settings": {"max_response_length": 1}}, "can be encoded"),
    ({"settings": {"too_long": "error"}}, "the limits are 6 and 5"),
  )
  def test_bad_input(self, options, message):
    with self.assertRaisesRegex(ValueError, message):
      stream = self.stream(**options)
      for step in range(20):
        stream.batch(step)

  def test_file_has_become_shorter(self):
    stream = self.stream()
    with self.assertRaisesRegex(ValueError, "must be the same file"):
      stream.go_to({"row": 1000, "taken": 1})
      stream.batch(0)


class TableTest(absltest.TestCase):
  def test_too_few(self):
    encoded = encoding.Encoded([[1]], [[[2, 3]]], [None], [], learnt=[None])
    split = encoding.Split(encoded, encoded, [], {}, [])
    with self.assertRaisesRegex(ValueError, "more than the 1 examples"):
      feeds.Table(split, 2, 0)
    table = feeds.Table(split, 1, 0)
    np.testing.assert_array_equal(table.lengths, [1, 2])
    self.assertEqual(table.batch(3)["response_ids"].tolist(), [[2, 3]])
    self.assertEqual(table.counts(5)[1].tolist(), [[2]])


if __name__ == "__main__":
  absltest.main()
