import json
import os
import pathlib
import tempfile
from unittest import mock

import fsspec
from absl.testing import absltest, parameterized

from rljax.storage import buckets, folders


def clean_cache(test):
  """Gives a test an empty cache of buckets, and an empty memory://."""
  folder = tempfile.TemporaryDirectory()
  test.enter_context(folder)
  test.enter_context(
    mock.patch.dict(os.environ, RLJAX_BUCKETS=f"{folder.name}/cache")
  )
  memory = fsspec.filesystem("memory")
  memory.store.clear()
  memory.pseudo_dirs[:] = [""]
  test.enter_context(mock.patch.object(buckets, "_WAITS", (0.0, 0.0, 0.0)))
  return pathlib.Path(folder.name)


class BucketTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = clean_cache(self)

  def _bucket(self, scheme):
    place = {"memory": "memory://b", "file": f"file://{self.folder}/b"}[scheme]
    return buckets.Bucket(place)

  @parameterized.parameters("memory", "file")
  def test_objects(self, scheme):
    bucket = self._bucket(scheme)
    self.assertEqual(bucket.objects(), {})
    self.assertIsNone(bucket.read("a/x"))
    bucket.write("a/x", b"1")
    bucket.write("ab", b"22")
    self.assertEqual({k: v.size for k, v in bucket.objects().items()}, {
      "a/x": 1,
      "ab": 2,
    })  # fmt: skip
    self.assertEqual(list(bucket.objects("a")), ["a/x"])
    self.assertEqual(bucket.list_here(), ["a", "ab"])
    self.assertTrue(bucket.create("lock", b"mine"))
    self.assertFalse(bucket.create("lock", b"yours"))
    self.assertEqual(bucket.read("lock"), b"mine")
    bucket.copy("a/x", "c/x")
    bucket.delete(["a/x", "gone"])
    self.assertEqual(set(bucket.objects()), {"ab", "c/x", "lock"})
    self.assertEqual(list(buckets.Bucket(f"{bucket.url}/ab").objects()), [""])

  def test_upload_and_download(self):
    path, bucket = self.folder / "x", self._bucket("memory")
    path.write_bytes(b"content")
    bucket.upload({"d/x": path})
    bucket.download({"d/x": self.folder / "e/y"})
    self.assertEqual((self.folder / "e/y").read_bytes(), b"content")

  def test_a_download_is_tried_again(self):
    bucket = self._bucket("memory")
    bucket.write("x", b"1")
    get = bucket._fs.get_file
    answers = [ConnectionError("reset"), TimeoutError("slow"), None]

    def flaky(source, target):
      pathlib.Path(target).write_bytes(b"half")
      if answers and (error := answers.pop(0)):
        raise error
      return get(source, target)

    with mock.patch.object(bucket._fs, "get_file", flaky):
      bucket.download({"x": self.folder / "x"})
      self.assertEqual((self.folder / "x").read_bytes(), b"1")
      answers[:] = [OSError("reset")] * 4
      with self.assertRaisesRegex(buckets.BucketError, "cannot be read"):
        bucket.download({"x": self.folder / "x"})
    self.assertEqual([x.name for x in self.folder.iterdir()], ["x"])
    self.assertEqual((self.folder / "x").read_bytes(), b"1")

  def test_a_large_file(self):
    for scheme in ("memory", "file"):
      path, bucket = self.folder / "x", self._bucket(scheme)
      path.write_bytes(bytes(2**23))
      bucket.upload({"d/x": path})
      self.assertEqual(bucket.objects()["d/x"].size, 2**23)

  def test_a_failure_is_tried_again(self):
    bucket = self._bucket("memory")
    pipe = bucket._fs.pipe_file
    answers = [OSError("reset"), OSError("reset"), None]

    def flaky(*args, **options):
      if answers and (error := answers.pop(0)):
        raise error
      return pipe(*args, **options)

    with mock.patch.object(bucket._fs, "pipe_file", flaky):
      bucket.write("x", b"1")
      self.assertEqual(bucket.read("x"), b"1")
      answers[:] = [OSError("reset")] * 4
      with self.assertRaisesRegex(
        buckets.BucketError, "memory://b/x cannot be written: OSError: reset"
      ):
        bucket.write("x", b"2")
      answers[:] = [PermissionError("no"), None]
      with self.assertRaisesRegex(buckets.BucketError, "PermissionError: no"):
        bucket.write("x", b"2")  # At once.
    self.assertEqual(bucket.read("x"), b"1")

  def test_an_upload_that_lost_bytes_is_an_error(self):
    path, bucket = self.folder / "x", self._bucket("memory")
    path.write_bytes(b"content")
    with (
      mock.patch.object(bucket, "write", lambda name, content: None),
      self.assertRaises(buckets.BucketError),
    ):
      bucket.upload({"x": path})

  @parameterized.parameters(
    ("nowhere://b/x", "nowhere:// is no bucket"),
    ("https://host/x", "https:// is no bucket"),
    ("https://huggingface.co/org/name/x", "The hub name org/name"),
    ("gs://", "names no bucket"),
    ("file:/tmp/x", "is not a path of this machine"),
  )
  def test_what_cannot_be_reached(self, url, message):
    with self.assertRaisesRegex(ValueError, f"^--data={url}.*{message}"):
      buckets.check(url, "--data")

  @parameterized.parameters(("gs", "gcsfs", "gcs"), ("s3", "s3fs", "s3"))
  def test_a_package_that_is_missing(self, scheme, package, extra):
    with (
      mock.patch.object(
        fsspec.core, "url_to_fs", side_effect=ImportError("Install it")
      ),
      self.assertRaisesRegex(
        ValueError,
        rf"^--data={scheme}://b/x needs {package}, which is not installed: "
        rf"pip install -e '.\[{extra}\]'",
      ),
    ):
      buckets.check(f"{scheme}://b/x", "--data")
    buckets.check("runs/x", "--data")

  def test_fetch(self):
    bucket = self._bucket("memory")
    for name in ("x.jsonl", "sub/y", "sub/z"):
      bucket.write(name, b"1")
    folder = buckets.fetch("memory://b")
    self.assertEqual(folder.name, "b")
    self.assertEqual((folder / "sub/y").read_bytes(), b"1")
    file = buckets.fetch("memory://b/x.jsonl")
    self.assertEqual((file.name, file.read_bytes()), ("x.jsonl", b"1"))
    # Only what was replaced is fetched again, and what is gone is deleted.
    bucket.write("sub/y", b"2")
    bucket.delete(["sub/z"])
    fetched = []
    download = buckets.Bucket.download

    def count(bucket, files):
      fetched.extend(files)
      return download(bucket, files)

    with mock.patch.object(buckets.Bucket, "download", count):
      buckets.fetch("memory://b")
    self.assertEqual(fetched, ["sub/y"])
    self.assertEqual((folder / "sub/y").read_bytes(), b"2")
    self.assertFalse((folder / "sub/z").exists())

  def test_fetch_what_is_wanted_and_what_is_missing(self):
    self._bucket("memory").write("a", b"1")
    self._bucket("memory").write("b", b"1")
    folder = buckets.fetch("memory://b", lambda objects: ["a"])
    self.assertEqual([path.name for path in folder.iterdir()], ["a"])
    with self.assertRaisesRegex(ValueError, "memory://c: there is nothing"):
      buckets.fetch("memory://c", name="--policy")

  def test_names_stay_below_the_folder(self):
    objects = {"../../evil": buckets.Object(1, "")}
    with (
      mock.patch.object(buckets.Bucket, "objects", lambda bucket: objects),
      self.assertRaisesRegex(ValueError, "not the name of a file below"),
    ):
      buckets.fetch("memory://b")

  def test_a_folder_is_replaced(self):
    bucket = self._bucket("memory")
    for name in ("config.json", "old.safetensors", "README.md"):
      bucket.write(name, b"old")
    is_stale = lambda name: name.endswith(".safetensors")
    order, upload = [], buckets.Bucket._upload

    def note(bucket, name, path):
      order.append((name, bucket.read("config.json")))
      upload(bucket, name, path)

    with (
      mock.patch.object(buckets.Bucket, "_upload", note),
      folders.replaced("memory://b", is_stale, last="config.json") as stage,
    ):
      (stage / "config.json").write_text("new")
      (stage / "new.safetensors").write_text("new")
    # Nobody finds a config while its weights are not there.
    self.assertEqual(order, [("new.safetensors", None), ("config.json", None)])
    self.assertEqual(
      {name: bucket.read(name) for name in bucket.objects()},
      {
        "config.json": b"new",
        "new.safetensors": b"new",
        "README.md": b"old",
      },
    )

  def test_the_index_may_be_damaged(self):
    self._bucket("memory").write("x", b"1")
    folder = buckets.fetch("memory://b")
    (folder.parent / "index.json").write_text("{")
    buckets.fetch("memory://b")
    index = json.loads((folder.parent / "index.json").read_text())
    self.assertEqual(list(index), ["x"])


if __name__ == "__main__":
  absltest.main()
