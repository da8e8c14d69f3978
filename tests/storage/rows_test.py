"""Tests of files of rows that a run appends to and reads again."""

import errno
import json
import os
import pathlib
import resource
import tempfile

from absl.testing import absltest, parameterized

from rljax.storage import paths, rows


def _line(step, **more):
  return json.dumps({"step": step, **more}).encode() + b"\n"


FOUR = [_line(step, x=step / 2) for step in range(4)]


class _RowsTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    folder = self.enter_context(tempfile.TemporaryDirectory())
    self.folder = pathlib.Path(folder)
    self.path = self.folder / "metrics.jsonl"
    self.notes = []

  def reopen(self, first_step=4, num_rows=4, **options):
    found = rows.reopen(
      self.path, first_step, self.notes.append, num_rows=num_rows, **options
    )
    return [row["step"] for row in found]

  @property
  def said(self):
    return " ".join(self.notes)


class ReopenTest(_RowsTest):
  def test_a_whole_file_is_left_alone(self):
    self.path.write_bytes(b"".join(FOUR))
    before = self.path.stat()
    self.assertEqual(self.reopen(), [0, 1, 2, 3])
    self.assertEqual(self.path.stat().st_ino, before.st_ino)
    self.assertEqual(self.notes, [])
    self.assertEqual(os.listdir(self.folder), ["metrics.jsonl"])

  def test_what_a_kill_leaves_makes_no_copy(self):
    self.path.write_bytes(b"".join(FOUR) + _line(4) + _line(5)[:7])
    self.assertEqual(self.reopen(repeats=4), [0, 1, 2, 3])
    self.assertEqual(self.path.read_bytes(), b"".join(FOUR))
    self.assertIn("dropped 1 rows of step 4 and later", self.said)
    self.assertIn("dropped a last line that was cut short", self.said)
    self.assertEqual(os.listdir(self.folder), ["metrics.jsonl"])

  @parameterized.named_parameters(
    ("cut", b"".join(FOUR[:2]), [0, 1], "2 of 4 rows .* are missing"),
    ("cut_in_a_line", b"".join(FOUR)[:-9], [0, 1, 2], "1 of 4 .*cut short"),
    ("head_gone", b"".join(FOUR[2:]), [2, 3], "2 of 4 rows .* are missing"),
    ("empty", b"", [], "4 of 4 rows that this run had written are missing"),
    ("nul", b"".join(FOUR[:3]) + b"\0" * 99, [0, 1, 2], "1 of 4.*cut short"),
    (
      "nul_line",
      FOUR[0] + b"\0\0\0\n" + b"".join(FOUR[1:]),
      [0, 1, 2, 3],
      "dropped 1 lines that cannot be read",
    ),
    (
      "garbled",
      b"".join(FOUR[:2]) + b'{"step": 2, \xff}\n' + FOUR[3],
      [0, 1, 3],
      "1 of 4 rows .*dropped 1 lines",
    ),
    (
      "no_rows",
      b"".join(FOUR) + b'[1]\n{"x": 1}\n{"step": "1"}\n{"step": true}\n',
      [0, 1, 2, 3],
      "dropped 4 lines that cannot be read",
    ),
    (
      "nested",
      b"[" * 100_000 + b"\n" + b"".join(FOUR),
      [0, 1, 2, 3],
      "dropped 1 lines",
    ),
    ("reordered", b"".join(FOUR[::-1]), [0, 1, 2, 3], "out of order"),
  )
  def test_what_is_lost_is_said_and_kept_beside(self, content, steps, said):
    self.path.write_bytes(content)
    self.assertEqual(self.reopen(), steps)
    self.assertRegex(self.said, said)
    left = [json.loads(x)["step"] for x in self.path.read_text().splitlines()]
    self.assertEqual(left, steps)
    aside = self.folder / "metrics.jsonl.old1"
    if content in (b"", b"".join(FOUR[:2]), b"".join(FOUR[2:])):
      self.assertFalse(aside.exists())  # Nothing of it was changed.
    else:
      self.assertEqual(aside.read_bytes(), content)
      self.assertIn("as it was is now metrics.jsonl.old1", self.said)
    # Nothing is wrong with what is left.
    self.notes.clear()
    self.assertEqual(self.reopen(num_rows=None), steps)
    self.assertEqual(self.notes, [])

  @parameterized.parameters(b"\xef\xbb\xbf", b"\n\n")
  def test_a_mark_in_front_is_no_loss(self, mark):
    self.path.write_bytes(mark + b"".join(FOUR))
    self.assertEqual(self.reopen(), [0, 1, 2, 3])
    self.assertEqual(self.path.read_bytes(), b"".join(FOUR))
    self.assertEqual(self.notes, [])

  def test_a_missing_line_feed_is_no_loss(self):
    self.path.write_bytes(b"".join(FOUR)[:-1])
    self.assertEqual(self.reopen(), [0, 1, 2, 3])
    self.assertEqual(self.path.read_bytes(), b"".join(FOUR))
    self.assertEqual(self.notes, [])

  def test_a_file_that_is_gone(self):
    self.assertEqual(self.reopen(), [])
    self.assertIn("all 4 rows that this run had written are missing", self.said)
    self.notes.clear()
    self.assertEqual(self.reopen(num_rows=None), [])
    self.assertEqual(self.notes, [])

  def test_more_rows_than_a_kill_repeats_are_kept_beside(self):
    content = b"".join(_line(step) for step in range(9))
    self.path.write_bytes(content)
    self.assertEqual(self.reopen(0, None, repeats=4), [])
    aside = self.folder / "metrics.jsonl.old1"
    self.assertEqual(aside.read_bytes(), content)

  def test_rows_are_kept_beside_if_asked(self):
    self.path.write_bytes(b"".join(FOUR))
    self.assertEqual(self.reopen(3, 3, keep=True), [0, 1, 2])
    aside = self.folder / "metrics.jsonl.old1"
    self.assertEqual(aside.read_bytes(), b"".join(FOUR))

  def test_a_device_is_not_read_to_its_end(self):
    self.path.symlink_to("/dev/full")
    self.assertEqual(self.reopen(num_rows=None), [])


class ReadableTest(_RowsTest):
  @parameterized.parameters(
    (b"", []),
    (b"".join(FOUR)[:-3], [0, 1, 2]),
    (b"\xff\xfe" + b"".join(FOUR), [1, 2, 3]),
    (FOUR[2] + b"[]\n" + FOUR[1], [1, 2]),
  )
  def test_what_can_be_read(self, content, steps):
    self.path.write_bytes(content)
    found = rows.readable(self.path)
    self.assertEqual([row["step"] for row in found], steps)
    self.assertEqual(self.path.read_bytes(), content)

  def test_a_file_that_is_gone(self):
    self.assertEqual(rows.readable(self.path), [])


class TableTest(_RowsTest):
  def keep(self, text, steps, first_step=4):
    path = self.folder / "metrics.csv"
    path.write_text(text)
    found = [{"step": step} for step in steps]
    rows.keep_table(path, found, first_step, self.notes.append)
    return (self.folder / "metrics.csv.old1").exists()

  def test_a_table_with_rows_that_are_nowhere_else(self):
    text = "step,x\n0,0.5\n1,1.5\n2,nan\n"
    self.assertTrue(self.keep(text, [0, 2]))
    self.assertEqual((self.folder / "metrics.csv.old1").read_text(), text)
    self.assertRegex(self.said, "metrics.csv has 1 steps .*metrics.csv.old1")

  @parameterized.parameters(
    ("step,x\n0,0.5\n1,1.5\n", [0, 1]),
    ("step,x\n0,0.5\n4,1.5\n", [0, 1]),  # About to be computed again.
    ("", [0]),
    ("\0\0\0\n\0", [0]),
    ("a,b\n1,2\n", []),
    ('step,x\nx,1\n"', [0]),
  )
  def test_a_table_without_any(self, text, steps):
    self.assertFalse(self.keep(text, steps))
    self.assertEqual(self.notes, [])


class AppenderTest(_RowsTest):
  def test_lines_are_on_disk_at_once(self):
    self.path.write_text("old\n")
    appender = rows.Appender(self.path)
    appender.write("é\n")
    self.assertEqual(self.path.read_text(), "old\né\n")
    appender.close()
    appender.close()

  def test_a_file_that_is_deleted_is_made_again(self):
    appender = rows.Appender(self.path)
    appender.write("1\n")
    self.path.unlink()
    appender.write("2\n")
    self.assertEqual(self.path.read_text(), "2\n")
    appender.close()

  def test_a_full_disk_leaves_no_half_of_a_line(self):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    self.addCleanup(resource.setrlimit, resource.RLIMIT_FSIZE, (soft, hard))
    appender = rows.Appender(self.path)
    appender.write("12345\n")
    resource.setrlimit(resource.RLIMIT_FSIZE, (9, hard))
    for _ in range(2):
      with self.assertRaisesRegex(
        paths.DiskError, "metrics.jsonl cannot be written: .*Free some space"
      ):
        appender.write("67890\n")
      self.assertEqual(self.path.read_text(), "12345\n")
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    appender.write("67890\n")
    appender.close()
    self.assertEqual(self.path.read_text(), "12345\n67890\n")

  def test_a_device_that_is_full(self):
    self.path.symlink_to("/dev/full")
    appender = rows.Appender(self.path)
    with self.assertRaises(paths.DiskError) as caught:
      appender.write("x\n")
    self.assertEqual(caught.exception.errno, errno.ENOSPC)
    appender.close()

  def test_a_folder_in_its_place(self):
    self.path.mkdir()
    with self.assertRaisesRegex(paths.DiskError, "metrics.jsonl cannot be"):
      rows.Appender(self.path)


if __name__ == "__main__":
  absltest.main()
