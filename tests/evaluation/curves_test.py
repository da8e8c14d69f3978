"""Tests of rljax.evaluation.curves."""

import io
import json
import os
import pathlib
import sys
import tempfile
import threading
import time
from unittest import mock

import numpy as np
from absl.testing import absltest, parameterized

from rljax.evaluation import curves


class _ReportTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(
      self.enter_context(tempfile.TemporaryDirectory())
    )
    self.png = self.folder / "picture.png"

  def _write(self, rows, name="metrics.jsonl"):
    path = self.folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path

  def _run(self, seed=0, steps=50, name="metrics.jsonl"):
    rng = np.random.default_rng(seed)
    rows = [
      {"step": step, "reward": step + rng.normal(), "kl/k1": rng.normal()}
      for step in range(steps)
    ]
    rows[0]["accuracy"] = 0.5
    return self._write(rows, name)

  def _figure(self):
    """Records the figure that the next picture is made of."""
    figures = []

    def save(figure, path):
      figures.append(figure)
      return original(figure, path)

    original = curves._save
    self.enter_context(mock.patch.object(curves, "_save", save))
    return figures


class ReadMetricsTest(_ReportTest):
  def test_series(self):
    path = self._write([
      {"step": 0, "a": 1.0, "b": None},
      {"step": 2, "a": 3},
      {"step": 1, "a": None, "b": 0.5},
      {"step": 2, "c": 4.0},
      {"step": 1, "c": 5.0},
    ])  # fmt: skip
    # A line that is being written, and one that a disk lost.
    path.write_text(path.read_text() + '\0\0\n{"step": 3, "a": 1')
    found = curves.read_metrics(path)
    self.assertCountEqual(found, ["a", "b", "c"])
    np.testing.assert_array_equal(found["a"][0], [0, 2])
    np.testing.assert_array_equal(found["a"][1], [1.0, 3.0])
    np.testing.assert_array_equal(found["b"], [[1], [0.5]])
    np.testing.assert_array_equal(found["c"], [[1, 2], [5.0, 4.0]])

  def test_no_file(self):
    self.assertEqual(curves.read_metrics(self.folder / "none"), {})


class SmoothTest(parameterized.TestCase):
  def test_hand_computed(self):
    values = np.array([0.0, 3.0, 6.0, 0.0])
    # (0+3)/2, (0+3+6)/3, (3+6+0)/3, (6+0)/2.
    expected = [1.5, 3.0, 3.0, 3.0]
    np.testing.assert_allclose(curves.smooth(values, 3), expected)
    np.testing.assert_allclose(curves.smooth(values, 2), expected)
    np.testing.assert_array_equal(curves.smooth(values, 1), values)
    np.testing.assert_array_equal(curves.smooth(values, 0), values)
    np.testing.assert_allclose(curves.smooth(values, 99), [2.25] * 4)

  def test_does_not_lag(self):
    line = np.arange(100.0)
    np.testing.assert_allclose(curves.smooth(line, 11)[5:-5], line[5:-5])


class CurvesTest(_ReportTest):
  def test_panels(self):
    figures = self._figure()
    curves.curves(
      self._run(),
      self.png,
      {
        "Reward": ["reward"],
        "Absent": ["nothing"],
        "KL": ["kl/k1", "kl/k3"],
        "Both": ["reward", "accuracy"],
      },
    )
    self.assertStartsWith(self.png.read_bytes(), b"\x89PNG")
    panels = [axes for axes in figures[0].axes if axes.axison]
    titles = [axes.get_title(loc="left") for axes in panels]
    self.assertEqual(titles, ["Reward", "KL", "Both"])
    raw, line = panels[0].lines
    self.assertEqual(raw.get_linestyle(), "None")
    np.testing.assert_array_equal(raw.get_xdata(), np.arange(50))
    self.assertLess(np.std(line.get_ydata() - raw.get_ydata()), 2)
    self.assertIsNone(panels[0].get_legend())
    self.assertEqual(
      [text.get_text() for text in panels[2].get_legend().get_texts()],
      ["reward", "accuracy"],
    )
    self.assertCountEqual(
      os.listdir(self.folder), ["metrics.jsonl", "picture.png"]
    )

  def test_nothing_recorded(self):
    curves.curves(self.folder / "none", self.png, {"Reward": ["reward"]})
    curves.curves(self._run(), self.png, {"Absent": ["nothing"]})
    self.assertFalse(self.png.exists())

  def test_long_run_is_thinned_and_fast(self):
    figures = self._figure()
    path = self._run(steps=4003)
    panels = {f"Panel {i}": ["reward", "kl/k1"] for i in range(6)}
    curves.curves(path, self.png, panels)  # Matplotlib is imported here.
    started = time.process_time()
    curves.curves(path, self.png, panels)
    self.assertLess(time.process_time() - started, 2)
    _, line, *_ = figures[0].axes[0].lines
    self.assertLessEqual(len(line.get_xdata()), 400)
    # Means of neighbours: a straight line stays one, from end to end.
    np.testing.assert_allclose(line.get_ydata(), line.get_xdata(), atol=60)
    self.assertLess(line.get_xdata()[0], 10)
    self.assertGreater(line.get_xdata()[-1], 3990)

  def test_in_threads(self):
    had_pyplot = "matplotlib.pyplot" in sys.modules
    path = self._run()
    pngs = [self.folder / f"{i}.png" for i in range(3)]
    threads = [
      threading.Thread(
        target=curves.curves, args=(path, png, {"R": ["reward"]})
      )
      for png in pngs
    ]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
    first = pngs[0].read_bytes()
    self.assertTrue(all(png.read_bytes() == first for png in pngs))
    # Its state would be shared by the threads.
    self.assertEqual("matplotlib.pyplot" in sys.modules, had_pyplot)

  def test_failure_leaves_the_old_picture(self):
    from matplotlib.figure import Figure

    path = self._run()
    self.png.write_bytes(b"old")
    with (
      mock.patch.object(Figure, "savefig", side_effect=OSError("disk full")),
      self.assertRaises(OSError),
    ):
      curves.curves(path, self.png, {"R": ["reward"]})
    self.assertEqual(self.png.read_bytes(), b"old")


class CompareTest(_ReportTest):
  def test_mean_and_band_of_seeds(self):
    figures = self._figure()
    for name, values in (("a", [1, 2, 3]), ("b", [3, 6]), ("c", [0, 0, 0])):
      self._write(
        [{"step": 10 * i, "x": value} for i, value in enumerate(values)], name
      )
    runs = {
      "one": [self.folder / "a", self.folder / "b"],
      "other": [self.folder / "c"],
    }
    curves.compare(runs, self.png, {"X": ["x"], "Absent": ["y"]})
    (panel,) = (axes for axes in figures[0].axes if axes.axison)
    one, other = panel.lines
    # Step 20 was reached by one of the two seeds.
    np.testing.assert_array_equal(one.get_xdata(), [0, 10, 20])
    np.testing.assert_array_equal(one.get_ydata(), [2, 4, 3])
    np.testing.assert_array_equal(other.get_ydata(), [0, 0, 0])
    self.assertNotEqual(one.get_color(), other.get_color())
    (band,) = panel.collections
    corners = band.get_paths()[0].vertices
    self.assertEqual(corners[corners[:, 0] == 10][:, 1].min(), 2)
    self.assertEqual(corners[corners[:, 0] == 10][:, 1].max(), 6)
    (legend,) = figures[0].legends
    self.assertEqual(
      [text.get_text() for text in legend.get_texts()],
      ["one (2 seeds)", "other (1 seed)"],
    )
    self.assertStartsWith(self.png.read_bytes(), b"\x89PNG")

  def test_second_metric_is_dashed_and_named(self):
    figures = self._figure()
    runs = {"arm": [self._run(), self._run(1, name="second")]}
    curves.compare(runs, self.png, {"X": ["reward", "kl/k1"]})
    panel = figures[0].axes[0]
    self.assertEqual(
      [line.get_linestyle() for line in panel.lines[:2]], ["-", "--"]
    )
    self.assertEqual(
      [text.get_text() for text in panel.get_legend().get_texts()],
      ["reward", "kl/k1"],
    )

  def test_nothing_recorded(self):
    curves.compare({"arm": [self.folder / "none"]}, self.png, {"X": ["x"]})
    self.assertFalse(self.png.exists())


class SamplesTableTest(_ReportTest):
  def test_last_rows(self):
    from rich import console

    path = self._write(
      [
        {"score": 0.123456, "step": i, "response": f"[bold]r{i}", "prompt": "p"}
        for i in range(5)
      ]
      + [{"step": 5, "prompt": "q", "parts": {"sign": 1, "size": None}}]
    )
    path.write_text(path.read_text() + '{"step": 6')
    table = curves.samples_table(path, limit=2)
    self.assertEqual(
      [str(column.header) for column in table.columns],
      ["step", "prompt", "response", "score", "sign", "size"],
    )
    self.assertEqual(table.row_count, 2)
    stream = io.StringIO()
    console.Console(file=stream, width=100).print(table)
    for words in ("[bold]r4", "0.123", " 5 "):
      self.assertIn(words, stream.getvalue())
    self.assertNotIn("r3", stream.getvalue())

  def test_no_file(self):
    with self.assertRaisesRegex(ValueError, "the run has written no samples"):
      curves.samples_table(self.folder / "none")


if __name__ == "__main__":
  absltest.main()
