"""Tests of what is only for looking at, and may fail or hang."""

import io
import pathlib
import resource
import sys
import tempfile
import threading
import time
from unittest import mock

from absl.testing import absltest, parameterized

from rljax.training import trackers


class _Test(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    folder = self.enter_context(tempfile.TemporaryDirectory())
    self.folder = pathlib.Path(folder)
    self.notes = []
    self.release = threading.Event()
    self.addCleanup(self.release.set)

  def tracker(self, start=list, write=None, close=None, **options):
    write = write or (lambda target, *row: target.append(row))
    close = close or (lambda target: None)
    return trackers.Tracker(
      "It", start, write, close, self.notes.append, **options
    )


class TrackerTest(_Test):
  def test_rows_arrive_in_order(self):
    seen, closed = [], []
    tracker = self.tracker(lambda: seen, close=closed.append)
    for step in range(100):
      tracker.write(step, {"x": step})
    tracker.close()
    self.assertEqual(seen, [(step, {"x": step}) for step in range(100)])
    self.assertEqual(closed, [seen])
    self.assertEqual(self.notes, [])

  @parameterized.product(
    where=["start", "write", "close"],
    error=[OSError(28, "No space left on device"), SystemExit(3)],
  )
  def test_an_error_is_said_once(self, where, error):
    fail = mock.Mock(side_effect=error)
    tracker = self.tracker(**{where: fail})
    for step in range(30):
      tracker.write(step, {"x": 1.0})
      time.sleep(0.001)
    tracker.close()
    tracker.close()
    (note,) = self.notes
    self.assertStartsWith(note, "It is left out from here on: ")
    self.assertIn(str(error), note)
    self.assertEqual(fail.call_count, 1)

  @parameterized.parameters("start", "write", "close")
  def test_one_that_hangs_is_not_waited_for(self, where):
    wait = lambda *_: self.release.wait(60)
    tracker = self.tracker(**{where: wait}, seconds_to_close=0.2)
    started = time.monotonic()
    for step in range(300):
      tracker.write(step, {"x": 1.0})
    tracker.close()
    self.assertLess(time.monotonic() - started, 5)
    self.assertEqual(
      self.notes,
      ["It is left out from here on: it does not end within 0.2 s."],
    )

  def test_one_that_is_far_behind(self):
    self.enter_context(mock.patch.object(trackers, "_MOST_WAITING", 5))
    tracker = self.tracker(lambda: self.release.wait(60), seconds_to_close=0.2)
    for step in range(30):
      tracker.write(step, {"x": 1.0})
    tracker.close()
    (note,) = self.notes
    self.assertIn("it is 5 rows behind", note)


class TensorBoardTest(_Test):
  def test_a_full_disk(self):
    """Also a second time: neither a row nor the end waits for the disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    self.addCleanup(resource.setrlimit, resource.RLIMIT_FSIZE, (soft, hard))
    printed = io.StringIO()
    self.enter_context(mock.patch.object(sys, "stderr", printed))
    tracker = trackers.tensorboard(
      self.folder / "tensorboard", 0, self.notes.append
    )
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, hard))
    started = time.monotonic()
    for step in range(500):
      tracker.write(step, {"loss": 1.0})
    tracker.close()
    self.assertLess(time.monotonic() - started, 10)
    (note,) = self.notes
    self.assertRegex(note, "TensorBoard is left out from here on: .*large")
    self.assertEqual(printed.getvalue(), "")

  @parameterized.parameters("file", "folder")
  def test_no_place_to_write_to(self, kind):
    place = self.folder / "tensorboard"
    if kind == "file":
      place.touch()
    else:
      self.enter_context(
        mock.patch("os.makedirs", side_effect=PermissionError(13, "denied"))
      )
    tracker = trackers.tensorboard(place, 0, self.notes.append)
    tracker.write(0, {"x": 1.0})
    tracker.close()
    (note,) = self.notes
    self.assertStartsWith(note, "TensorBoard is left out from here on: ")


class WandbTest(_Test):
  @parameterized.parameters("init", "log", "finish")
  def test_one_that_hangs(self, where):
    library = mock.MagicMock()
    target = library if where == "init" else library.init.return_value
    getattr(target, where).side_effect = lambda *_, **__: self.release.wait(60)
    quickly = {"seconds_to_close": 0.2}
    start = trackers.Tracker.__init__
    self.enter_context(mock.patch.object(start, "__kwdefaults__", quickly))
    with mock.patch.dict(sys.modules, {"wandb": library}):
      tracker = trackers.wandb("p", self.folder, self.notes.append)
      started = time.monotonic()
      tracker.write(0, {"x": 1.0})
      tracker.close()
    self.assertLess(time.monotonic() - started, 5)
    (note,) = self.notes
    self.assertStartsWith(note, "Weights & Biases is left out from here on")


class CurvesTest(_Test):
  def test_a_picture_that_hangs(self):
    curves = trackers.Curves(
      lambda: self.release.wait(60), 0.0, self.notes.append
    )
    curves.changed.set()
    started = time.monotonic()
    curves.close(seconds=0.2)
    self.assertLess(time.monotonic() - started, 5)
    (note,) = self.notes
    self.assertIn("curves.png could not be drawn: it is not drawn", note)


if __name__ == "__main__":
  absltest.main()
