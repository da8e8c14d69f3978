"""Files of other programs: .csv, .parquet, shards, the layout of the hub."""

import gzip
import json
import pathlib
import sys
import tempfile
from unittest import mock

import pytest
from absl.testing import parameterized

from rljax.text import files

ROWS = [
  {"prompt": 'Löwe, "quoted"\n2', "response": "a", "reward": 0.5},
  {"prompt": "[1, 2] is a list", "response": "12", "reward": 1},
]


class FilesOfOthersTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self._temporary = tempfile.TemporaryDirectory()
    self.addCleanup(self._temporary.cleanup)
    self.folder = pathlib.Path(self._temporary.name)

  def _load(self, name, split="train"):
    return files.load_rows(name, split, data_dir=self.folder)

  def _parquet(self, name, rows):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = self.folder / name
    path.parent.mkdir(exist_ok=True)
    parquet.write_table(arrow.Table.from_pylist(rows), path)

  @parameterized.parameters("train.csv", "train.csv.gz")
  def test_csv(self, name):
    text = (
      "\ufeffprompt,response,reward,empty,label,messages\r\n"
      '"Löwe, ""quoted""\n2",a,0.5,,True,"[{""role"": ""user""}]"\r\n'
      '"[1, 2] is a list",12,1,,false,\r\n'
    )
    content = text.encode()
    (self.folder / name).write_bytes(
      gzip.compress(content) if name.endswith(".gz") else content
    )
    expected = [
      ROWS[0] | {"label": True, "messages": [{"role": "user"}]},
      ROWS[1] | {"label": False},
    ]
    self.assertEqual(self._load(name), expected)
    self.assertEqual(self._load("."), expected)

  def test_cells_that_are_no_numbers_stay_as_they_are(self):
    (self.folder / "a.csv").write_text("prompt,reward,gold\n5,x,7\n6,1,[8]\n")
    self.assertEqual(
      self._load("a.csv"),
      [
        {"prompt": "5", "reward": "x", "gold": "7"},
        {"prompt": "6", "reward": 1, "gold": "[8]"},
      ],
    )

  def test_a_csv_row_with_too_many_cells_is_named(self):
    (self.folder / "a.csv").write_text("prompt\n1\n2,3\n")
    placed = list(files.load_placed_rows(str(self.folder / "a.csv"), "train"))
    self.assertEqual(placed[0][1], {"prompt": "1"})
    self.assertRegex(str(placed[1][1]), "a.csv, row 1: more cells than columns")

  @parameterized.parameters(
    ("prompt,response,response\na,b,c\n", "two columns are called 'response'"),
    ("prompt;response\na;b\n", "separated by semicolons"),
    ("prompt\tresponse\na\tb\n", "separated by tabs"),
    # A quote that is never closed would swallow all rows behind it.
    ('prompt,response\na,"b\nc,d\ne,f\n', "unexpected end of data"),
  )
  def test_csv_files_of_which_a_part_would_be_lost(self, content, message):
    path = self.folder / "rows.csv"
    path.write_text(content)
    with self.assertRaisesRegex(ValueError, message):
      files.load_rows(str(path), "train")

  def test_empty_columns_of_spreadsheets(self):
    path = self.folder / "rows.csv"
    path.write_text("prompt,response,,\na,b,,\n")
    self.assertEqual(
      files.load_rows(str(path), "train"), [{"prompt": "a", "response": "b"}]
    )

  def test_long_cells(self):
    (self.folder / "a.csv").write_text(f"prompt\n{'x' * 300_000}\n")
    self.assertLen(self._load("a.csv")[0]["prompt"], 300_000)

  def test_parquet(self):
    rows = [
      {"messages": [{"role": "user", "content": "é"}], "label": True},
      {"messages": None, "label": False},
    ]
    self._parquet("train.parquet", rows)
    self.assertEqual(self._load("."), rows)
    with (
      mock.patch.dict(sys.modules, {"pyarrow": None}),
      self.assertRaisesRegex(ValueError, "pyarrow, which is not installed"),
    ):
      self._load("train.parquet")

  def test_shards(self):
    for i, row in enumerate(ROWS):
      self._parquet(f"data/train-{i:05}-of-00002.parquet", [row])
    self.assertEqual(self._load("."), ROWS)
    with self.assertRaisesRegex(
      ValueError, "for split 'test' .*there are data"
    ):
      self._load(".", "test")

  def test_json_lines_under_another_ending(self):
    lines = "\n".join(map(json.dumps, ROWS))
    (self.folder / "a.json").write_text(lines)
    self.assertEqual(self._load("a.json"), ROWS)
    (self.folder / "b.jsonl").write_text("\ufeff" + lines)
    self.assertEqual(self._load("b.jsonl"), ROWS)

  def test_a_file_is_read_as_far_as_it_is_asked_for(self):
    (self.folder / "a.jsonl").write_text('{"a": 1}\n' * 3)
    read = mock.Mock(side_effect=json.loads)
    with mock.patch.object(files.json, "loads", read):
      next(files.load_placed_rows("a.jsonl", "train", data_dir=self.folder))
    self.assertEqual(read.call_count, 1)

  def test_no_such_file(self):
    with self.assertRaisesRegex(
      ValueError, "org/name: no such file.*parquet.*hub:org/name would be"
    ):
      files.load_rows("org/name", "train")

  def test_hub_without_the_package(self):
    with (
      mock.patch.dict(sys.modules, {"datasets": None}),
      self.assertRaisesRegex(ValueError, "pip install datasets"),
    ):
      files.load_rows("hub:org/name", "train")

  def test_local_folders_of_the_hub(self):
    datasets = pytest.importorskip("datasets")
    for split, rows in (("train", ROWS), ("test", ROWS[:1])):
      text = "".join(json.dumps(row) + "\n" for row in rows)
      (self.folder / f"{split}.jsonl").write_text(text)
    cache = str(self.folder / "cache")
    with mock.patch.object(datasets.config, "HF_DATASETS_CACHE", cache):
      name = f"hub:{self.folder}"
      self.assertEqual(files.load_rows(name, "train"), ROWS)
      self.assertEqual(files.load_rows(name, "train[:1]"), ROWS[:1])
      with self.assertRaisesRegex(ValueError, "no split 'dev' that datasets"):
        files.load_rows(name, "dev")
    saved = self.folder / "saved"
    one = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": one}).save_to_disk(str(saved))
    self.assertEqual(files.load_rows(str(saved), "train"), ROWS)
    with self.assertRaisesRegex(ValueError, "no split 'dev'; there are train"):
      files.load_rows(str(saved), "dev")
