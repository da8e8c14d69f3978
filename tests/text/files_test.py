import gzip
import json
import logging
import os
import pathlib
import tempfile
from unittest import mock

import numpy as np
import pytest
from absl.testing import parameterized

from rljax.storage import buckets
from rljax.text import files
from tests import conftest
from tests.storage import buckets_test


class FilesTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self._temporary = tempfile.TemporaryDirectory()
    self.addCleanup(self._temporary.cleanup)
    self.folder = pathlib.Path(self._temporary.name)

  def _write(self, content, name="logged.jsonl"):
    path = self.folder / name
    path.write_bytes(content)
    return path

  def test_read(self):
    path = self._write(b'{"a": 1}\r\n\n{"a": "\xc3\xa9\xe2\x80\xa8", "b": 2}')
    rows = files.read_jsonl(path, required=["a"], optional={"b": 0})
    self.assertEqual(rows, [{"a": 1, "b": 0}, {"a": "é\u2028", "b": 2}])

  @parameterized.parameters(
    (b'{"reward": 1}\n\n{"r": 1}\n', r'logged.jsonl:3: "reward" is missing\.'),
    (b'{"reward": 1}\n{"reward"', r"logged.jsonl:2: not JSON"),
    (b'{"reward": "\xff"}', r"logged.jsonl:1: not JSON"),
    (b'{"reward": 1, "reward": 2}', r'not JSON \("reward" stands twice'),
    (b'{"reward": {"a": 1, "a": 2}}', r'not JSON \("a" stands twice'),
    (b"[1, 2]\n", r"logged.jsonl:1: expected a JSON object, got \[1, 2\]"),
    (b"", r"logged.jsonl: no rows"),
    (b"\n \n", r"logged.jsonl: no rows"),
  )
  def test_bad_files(self, content, message):
    path = self._write(content)
    with self.assertRaisesRegex(ValueError, message):
      files.read_jsonl(path, required=["reward"])

  @parameterized.parameters("rows.jsonl", "rows.jsonl.gz")
  def test_round_trip(self, name):
    path = self.folder / "new" / name
    rows = [{"text": "é\n\u2028🙂"}, {"ids": [1, 2], "x": 0.1}]
    files.write_jsonl(path, [{"old": 1}])
    files.write_jsonl(path, rows)
    self.assertEqual(files.read_jsonl(path), rows)
    self.assertEqual(os.listdir(path.parent), [name])

  def test_half_a_surrogate_pair_is_written_as_json_has_it(self):
    path = self.folder / "rows.jsonl"
    files.write_jsonl(path, [{"answer": "\ud800é"}])
    files.append_jsonl(path, [{"answer": "\udfff"}])
    self.assertEqual(
      files.read_jsonl(path), [{"answer": "\ud800é"}, {"answer": "\udfff"}]
    )

  def test_numpy_values(self):
    path = self.folder / "rows.jsonl"
    files.write_jsonl(
      path, [{"ids": np.arange(2), "x": np.float32(0.5), "b": np.bool_(True)}]
    )
    self.assertEqual(
      files.read_jsonl(path), [{"ids": [0, 1], "x": 0.5, "b": True}]
    )

  def test_failed_write_leaves_the_old_file(self):
    path = self._write(b'{"a": 1}\n')
    with self.assertRaisesRegex(TypeError, "object cannot be written"):
      files.write_jsonl(path, [{"a": 2}, {"a": object()}])
    self.assertEqual(files.read_jsonl(path), [{"a": 1}])
    self.assertEqual(os.listdir(self.folder), ["logged.jsonl"])

  def test_failed_replacement_leaves_nothing_behind(self):
    path = self._write(b'{"a": 1}\n')
    with (
      mock.patch.object(os, "replace", side_effect=OSError("disk full")),
      self.assertRaisesRegex(OSError, "disk full"),
    ):
      files.write_jsonl(path, [{"a": 2}])
    self.assertEqual(files.read_jsonl(path), [{"a": 1}])
    self.assertEqual(os.listdir(self.folder), ["logged.jsonl"])

  def test_append(self):
    path = self.folder / "new" / "rows.jsonl"
    files.append_jsonl(path, [{"a": 1}])
    files.append_jsonl(path, [])
    files.append_jsonl(path, [{"a": 2}, {"a": 3}])
    self.assertEqual(files.read_jsonl(path), [{"a": 1}, {"a": 2}, {"a": 3}])

  @parameterized.parameters((b'{"a": 1}\n{"a": 2', [1, 3]), (b'{"a', [3]))
  def test_append_behind_a_killed_writer(self, content, expected):
    path = self._write(content)
    with self.assertLogs("absl", logging.WARNING) as logs:
      files.append_jsonl(path, [{"a": 3}])
    self.assertIn("half-written", logs.output[0])
    self.assertEqual([row["a"] for row in files.read_jsonl(path)], expected)

  def test_append_to_gz(self):
    with self.assertRaisesRegex(ValueError, "uncompressed"):
      files.append_jsonl(self.folder / "rows.jsonl.gz", [{"a": 1}])


class BucketTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    buckets_test.clean_cache(self)
    self.bucket = buckets.Bucket("memory://b")

  def test_a_file(self):
    self.bucket.write("x.jsonl.gz", gzip.compress(b'{"a": 1}\n'))
    url = "memory://b/x.jsonl.gz"
    self.assertEqual(files.load_rows(url, "train"), [{"a": 1}])
    self.assertEqual(files.read_jsonl(url), [{"a": 1}])

  def test_a_folder_of_splits(self):
    for split in ("train", "test"):
      self.bucket.write(f"{split}.jsonl", b'{"a": "%s"}' % split.encode())
    self.assertEqual(files.load_rows("memory://b", "test"), [{"a": "test"}])
    (cached,) = buckets.cache_folder().rglob("*.jsonl")
    self.assertEqual(cached.name, "test.jsonl")  # The other is not fetched.
    with self.assertRaisesRegex(ValueError, "no file for split 'dev'"):
      files.load_rows("memory://b", "dev")
    with self.assertRaisesRegex(ValueError, "there is nothing at this URL"):
      files.load_rows("memory://b/none.jsonl", "train")


class LoadRowsTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self._temporary = tempfile.TemporaryDirectory()
    self.addCleanup(self._temporary.cleanup)
    self.folder = pathlib.Path(self._temporary.name)

  @parameterized.parameters(".jsonl", ".jsonl.gz", ".json", ".json.gz")
  def test_files_and_folders(self, ending):
    rows = [{"split": "train"}, {"é": 1}]
    lines = map(json.dumps, rows)
    text = "\n".join(lines) if "jsonl" in ending else json.dumps(rows)
    content = text.encode()
    if ending.endswith(".gz"):
      content = gzip.compress(content)
    (self.folder / f"train{ending}").write_bytes(content)
    for name in (".", f"train{ending}", f"{{split}}{ending}"):
      loaded = files.load_rows(name, "train", data_dir=self.folder)
      self.assertEqual(loaded, rows)
    absolute = str(self.folder / f"train{ending}")
    self.assertEqual(files.load_rows(absolute, "train"), rows)

  @parameterized.parameters(
    ("", None, r"no file for split 'test' \(looked for test.jsonl"),
    ("none.jsonl", None, "no such file or folder"),
    ("rows.txt", b"a,b", "expected .jsonl, .json or .csv"),
    ("rows.csv", b"a,b", "no rows"),
    ("rows.csv", b"a,b\n\xff,c", "not a .csv file in UTF-8"),
    ("rows.csv.gz", b"plain", "not a gzip file"),
    ("rows.parquet", b"PAR1", "not a .parquet file that pyarrow reads"),
    ("rows.json", b'{"a": 1}', "expected a list of JSON objects"),
    (
      "rows.json",
      b'{"data": []}',
      "JSON objects, such as what it has under 'd",
    ),
    (
      "rows.jsonl",
      gzip.compress(b"{}"),
      "packed by gzip; name it .*rows.jsonl.gz",
    ),
    ("rows.csv", "a,b\n1,2".encode("utf-16"), "is UTF-16, and must be UTF-8"),
    ("rows.json", b"[{}, 1]", r"rows.json, row 1: expected a JSON obj.*got 1"),
    ("rows.json", b"[]", "no rows"),
    ("rows.json", b"[", "not JSON"),
    ("rows.jsonl", b"", "no rows"),
    ("rows.jsonl.gz", b"plain", "not a gzip file"),
  )
  def test_bad_names(self, name, content, message):
    if content is not None:
      (self.folder / name).write_bytes(content)
    with self.assertRaisesRegex(ValueError, message):
      files.load_rows(name, "test", data_dir=self.folder)

  def test_places(self):
    path = self.folder / "rows.jsonl"
    path.write_bytes(b'\n{"a": 1}\n{\n{"a": 2}\n')
    placed = list(
      files.load_placed_rows("rows.jsonl", "train", data_dir=path.parent)
    )
    self.assertEqual(placed[0], (f"{path}:2", {"a": 1}))
    self.assertEqual(placed[2], (f"{path}:4", {"a": 2}))
    place, error = placed[1]
    self.assertEqual(place, f"{path}:3")
    with self.assertRaisesRegex(ValueError, ":3: not JSON") as caught:
      files.load_rows(str(path), "train")
    self.assertEqual(str(error), str(caught.exception))

  def test_shared_data(self):
    folder = conftest.shared("data/reasoning")
    rows = files.load_rows("gsm8k_{split}.jsonl", "test", data_dir=folder)
    self.assertLen(rows, 1319)

  def test_tfds(self):
    tfds = pytest.importorskip("tensorflow_datasets")

    with tfds.core.registered.skip_registration():

      class Rows(tfds.core.GeneratorBasedBuilder):
        name = "rljax_rows"
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
          return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(
              {"text": tfds.features.Text(), "label": np.int64}
            )
          )

        def _split_generators(self, dl_manager):
          return {"train": self._generate_examples()}

        def _generate_examples(self):
          for i, text in enumerate(("né", "b", "c")):
            yield i, {"text": text, "label": i}

    folder = str(self.folder)
    Rows(data_dir=folder, file_format="array_record").download_and_prepare()
    rows = files.load_rows("tfds:rljax_rows", "train", data_dir=folder)
    self.assertCountEqual(
      [(r["text"], r["label"]) for r in rows], [("né", 0), ("b", 1), ("c", 2)]
    )
    self.assertIsInstance(rows[0]["label"], int)
    self.assertLen(
      files.load_rows("tfds:rljax_rows", "train[:2]", data_dir=folder), 2
    )
    with self.assertRaisesRegex(ValueError, "no prepared split 'test'"):
      files.load_rows("tfds:rljax_rows", "test", data_dir=folder)
    with self.assertRaisesRegex(ValueError, '"tfds:gsm8k" has no prepared'):
      files.load_rows("tfds:gsm8k", "train", data_dir=folder)
