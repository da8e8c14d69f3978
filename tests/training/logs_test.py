"""Tests of rljax.training.logs."""

import contextlib
import csv
import functools
import io
import json
import math
import os
import pathlib
import re
import sys
import tempfile
import threading
import time
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from rljax.evaluation import curves
from rljax.training import logs


class HistogramsTest(parameterized.TestCase):
  def test_rows_and_resume(self):
    with tempfile.TemporaryDirectory() as workdir:
      with logs.Logs(workdir, total_steps=4, tensorboard=False) as log:
        log.histograms(0, {"answer": {25: 3, None: 1}})
        log.histograms(3, {"answer": {26: 4}})
      with logs.Logs(
        workdir, total_steps=4, first_step=2, tensorboard=False
      ) as log:
        log.histograms(2, {"answer": {27: 4}})
      lines = (pathlib.Path(workdir) / "histograms.jsonl").read_text()
    self.assertEqual(
      [json.loads(line) for line in lines.splitlines()],
      [
        {"step": 0, "answer": {"25": 3, "None": 1}},
        {"step": 2, "answer": {"27": 4}},
      ],
    )


class _LogsTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.workdir = pathlib.Path(
      self.enter_context(tempfile.TemporaryDirectory())
    )
    self.printed = self.enter_context(contextlib.redirect_stdout(io.StringIO()))

  def _logs(self, **options):
    options = {"total_steps": 10, "tensorboard": False} | options
    return logs.Logs(self.workdir, **options)

  def _rows(self, name="metrics.jsonl"):
    text = (self.workdir / name).read_text()
    self.assertTrue(text.endswith("\n") or not text)
    # `parse_constant` is what json calls for NaN, which is not JSON.
    return [
      json.loads(line, parse_constant=self.fail) for line in text.splitlines()
    ]

  def _table(self):
    with open(self.workdir / "metrics.csv", newline="") as file:
      return list(csv.DictReader(file))


class MetricsTest(_LogsTest):
  def test_files_as_the_run_goes_on(self):
    with self._logs() as log:
      log.write(0, {"loss": jnp.float32(0.5), "count": np.int64(7)})
      # On disk at once, not only at the end.
      self.assertEqual(self._rows(), [{"step": 0, "loss": 0.5, "count": 7}])
      self.assertEqual(
        self._table(), [{"step": "0", "loss": "0.5", "count": "7"}]
      )
      log.write(1, {"loss": jnp.bfloat16(0.25), "count": True})
      self.assertEqual(self._rows()[1], {"step": 1, "loss": 0.25, "count": 1})
      self.assertLen(self._table(), 2)

  def test_skipped_rows_are_named(self):
    with self._logs() as log:
      log.skipped([])
      self.assertFalse((self.workdir / "skipped.txt").exists())
      log.skipped(["rows.jsonl:2: too long.", "rows.jsonl:9: empty."])
    self.assertEqual(
      (self.workdir / "skipped.txt").read_text(),
      "rows.jsonl:2: too long.\nrows.jsonl:9: empty.\n",
    )

  def test_table_gets_new_columns(self):
    with self._logs() as log:
      log.write(0, {"a": 1.0})
      log.write(1, {"b": 2.0, "a": 3.0})
      log.write(2, {"c": 4.0})
      log.write(3, {"a": 5.0})
    header = (self.workdir / "metrics.csv").read_text().splitlines()[0]
    self.assertEqual(header, "step,a,b,c")
    self.assertEqual(
      self._table(),
      [
        {"step": "0", "a": "1.0", "b": "", "c": ""},
        {"step": "1", "a": "3.0", "b": "2.0", "c": ""},
        {"step": "2", "a": "", "b": "", "c": "4.0"},
        {"step": "3", "a": "5.0", "b": "", "c": ""},
      ],
    )

  def test_not_finite(self):
    with self._logs() as log:
      log.write(0, {"kl": math.nan, "loss": 1.0})
      log.write(1, {"kl": jnp.inf, "loss": -math.inf})
    self.assertEqual(
      self._rows(),
      [
        {"step": 0, "kl": None, "loss": 1.0},
        {"step": 1, "kl": None, "loss": None},
      ],
    )
    self.assertEqual(self._table()[0]["kl"], "nan")
    printed = self.printed.getvalue()
    self.assertEqual(printed.count("step 0: kl is nan; written as null"), 1)
    self.assertEqual(printed.count("step 1: loss is -inf"), 1)
    self.assertNotIn("kl is inf", printed)
    self.assertIn("kl was not finite in 2 rows", printed)

  @parameterized.parameters(
    (np.ones(3), r"shape \(3,\)"), ("high", 'metric "x" must be one number')
  )
  def test_not_a_number(self, value, message):
    with self._logs() as log, self.assertRaisesRegex(ValueError, message):
      log.write(0, {"x": value})

  def test_only_the_first_process_writes(self):
    with mock.patch.object(jax, "process_index", return_value=1):
      log = self._logs(wandb_project="p")
    log.write(0, {"x": np.ones(3)})
    log.samples(0, [{}])
    log.note("text")
    log.curves(self.fail)
    log.summary({"x": 1})
    log.close()
    self.assertEqual(os.listdir(self.workdir), [])
    self.assertEqual(self.printed.getvalue(), "")


class ResumeTest(_LogsTest):
  def _write(self, steps, first_step=0):
    with self._logs(first_step=first_step) as log:
      for step in steps:
        log.write(step, {"x": float(step), f"only_{first_step}": 1.0})
        log.samples(step, [{"prompt": "p", "score": step}])

  def test_rows_to_be_computed_again_are_dropped(self):
    self._write(range(6))
    # The last checkpoint was of 4 finished steps: 0 to 3.
    self._write(range(4, 8), first_step=4)
    for name in ("metrics.jsonl", "samples.jsonl"):
      steps = [row["step"] for row in self._rows(name)]
      self.assertEqual(steps, list(range(8)))
    self.assertEqual([row["x"] for row in self._rows()], list(range(8)))
    table = self._table()
    self.assertEqual([row["step"] for row in table], [str(i) for i in range(8)])
    self.assertEqual(table[3]["only_0"], "1.0")
    self.assertEqual(table[4]["only_0"], "")
    self.assertIn(
      "metrics.jsonl: dropped 2 rows of step 4 and later",
      self.printed.getvalue(),
    )

  def test_files_are_cut_when_opened(self):
    self._write(range(6))
    with self._logs(first_step=2):
      self.assertLen(self._rows(), 2)
      self.assertLen(self._rows("samples.jsonl"), 2)
      self.assertEqual([row["x"] for row in self._table()], ["0.0", "1.0"])

  def test_start_anew_drops_all(self):
    self._write(range(3))
    self._write(range(2))
    self.assertLen(self._rows(), 2)
    self.assertLen(self._table(), 2)

  def test_torn_last_line(self):
    self._write(range(3))
    for name in ("metrics.jsonl", "samples.jsonl", "metrics.csv"):
      with open(self.workdir / name, "rb+") as file:
        file.truncate(os.path.getsize(self.workdir / name) - 4)
    self._write([2], first_step=2)
    self.assertEqual([row["step"] for row in self._rows()], [0, 1, 2])
    self.assertEqual(
      [row["step"] for row in self._rows("samples.jsonl")], [0, 1, 2]
    )
    self.assertEqual([row["step"] for row in self._table()], ["0", "1", "2"])
    self.assertIn(
      "metrics.jsonl: dropped a last line that was cut short",
      self.printed.getvalue(),
    )

  def test_unreadable_line(self):
    self._write(range(2))
    path = self.workdir / "metrics.jsonl"
    path.write_text(path.read_text() + "\0\0\0\n" + '{"x": 1}\n')
    self._write([2], first_step=2)
    self.assertEqual([row["step"] for row in self._rows()], [0, 1, 2])
    self.assertIn("dropped 2 lines that cannot be", self.printed.getvalue())


class SamplesTest(_LogsTest):
  def test_rows(self):
    rows = [
      {"prompt": "é\n1+1", "score": np.float32(0.5), "parts": {"n": math.nan}},
      {"prompt": "b", "ids": np.arange(2)},
    ]
    with self._logs() as log:
      log.samples(3, rows)
      self.assertEqual(
        self._rows("samples.jsonl"),
        [
          {"step": 3, "prompt": "é\n1+1", "score": 0.5, "parts": {"n": None}},
          {"step": 3, "prompt": "b", "ids": [0, 1]},
        ],
      )
    # Text stays legible in the file.
    self.assertIn("é", (self.workdir / "samples.jsonl").read_text())


class ProgressTest(_LogsTest):
  def test_plain_lines(self):
    clock = self.enter_context(mock.patch.object(time, "monotonic"))
    clock.return_value = 100.0
    columns = {"reward/mean": "reward", "tokens": "tokens/s", "gone": "gone"}
    with self._logs(columns=columns, total_steps=1000) as log:
      log.write(0, {"reward/mean": 0.12345, "tokens": 12_345.6})
      clock.return_value = 104.0
      log.write(2, {"reward/mean": 0.2})
      clock.return_value = 110.0
      log.write(5, {"reward/mean": 0.3})
      log.note("[a note]")
      clock.return_value = 111.0
      log.write(6, {"reward/mean": 0.4})
    # Step 2 came too soon after the first line. At step 5, five steps had
    # taken 10 s since the first ended: 994 are left, at 2 s each.
    self.assertEqual(
      self.printed.getvalue().splitlines(),
      [
        "step 1/1000  reward 0.123  tokens/s 12.3k  left ?",
        "step 6/1000  reward 0.3  tokens/s 12.3k  left 33:08",
        "[a note]",
        "step 7/1000  reward 0.4  tokens/s 12.3k  left 30:20",
      ],
    )

  def test_terminal(self):
    self.printed.isatty = lambda: True
    with (
      mock.patch.dict(os.environ, {"COLUMNS": "100", "TERM": "xterm"}),
      self._logs(columns=["reward"], total_steps=20, first_step=4) as log,
    ):
      log.write(4, {"reward": 0.5})
      log.note("a [note] above")
      log.write(5, {"reward": math.nan})
    printed = self.printed.getvalue()
    self.assertIn("a [note] above", printed)
    self.assertRegex(printed, r"step 6/20 .*reward nan.* left 0:0")

  @parameterized.parameters(
    (0.5, "0.5"), (1234.5, "1.23e+03"), (3, "3"), (1234, "1234"),
    (12_345, "12.3k"), (-2.5e6, "-2.5M"), (3e9, "3G"), (math.inf, "inf"),
  )  # fmt: skip
  def test_short_numbers(self, value, expected):
    self.assertEqual(logs._short(value), expected)


class SummaryTest(_LogsTest):
  def test_columns(self):
    values = {
      "accuracy": {"before": 0.123456, "after": jnp.float32(0.5)},
      "[kl]": {"after": math.nan},
    }
    with self._logs() as log:
      log.summary(values, title="Numbers")
    printed = self.printed.getvalue()
    for word in ("Numbers", "before", "after", "0.1235", "0.5", "[kl]"):
      self.assertIn(word, printed)
    written = json.loads((self.workdir / "summary.json").read_text())
    self.assertEqual(
      written,
      {
        "accuracy": {"before": 0.123456, "after": 0.5},
        "[kl]": {"after": None},
      },
    )

  def test_one_value_each(self):
    with self._logs() as log:
      log.summary({"steps": 3, "workdir": self.workdir})
    written = json.loads((self.workdir / "summary.json").read_text())
    self.assertEqual(written, {"steps": 3, "workdir": str(self.workdir)})

  def _tables(self, width):
    """The printed tables: per table, {row: {column: cell}}."""
    tables = []
    # A terminal gets colours, and the cursor is moved about.
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self.printed.getvalue())
    for line in text.splitlines():
      self.assertLessEqual(len(line), width)
      cells = [cell.strip() for cell in re.split("[┃│]", line)[1:-1]]
      if "┃" in line:
        header = cells[1:]
        tables.append({})
      elif "│" in line:
        # A cell that was folded would go on in a row without a name.
        self.assertNotIn(cells[0], ["", *tables[-1]])
        tables[-1][cells[0]] = dict(zip(header, cells[1:], strict=True))
    return tables

  @parameterized.parameters((True, 60, 7), (True, 80, 5), (False, 120, 3))
  def test_many_columns(self, is_terminal, width, num_tables):
    columns = [f"column/{i}" + "x" * (i % 7) for i in range(20)]
    values = {
      f"model {row}": {
        column: 10**i if i % 5 == 0 else (-1) ** row * (i + row / 7)
        for i, column in enumerate(columns)
        if row == 0 or (i + row) % 4
      }
      for row in range(5)
    }
    self.printed.isatty = lambda: is_terminal
    environment = {"COLUMNS": str(width), "TERM": "xterm"}
    with (
      mock.patch.dict(os.environ, environment),
      self._logs() as log,
    ):
      log.summary(values, title="Many")
      tables = self._tables(width)
    self.assertEqual(self.printed.getvalue().count("Many"), 1)
    found = {row: {} for row in values}
    for table in tables:
      self.assertEqual(list(table), list(values))
      for row, cells in table.items():
        self.assertNoCommonElements(cells, found[row])
        found[row] |= cells
    for row, cells in values.items():
      # In order, and every number as it would stand alone.
      self.assertEqual(list(found[row]), columns)
      for column in columns:
        expected = logs._cell(cells[column]) if column in cells else ""
        self.assertEqual(found[row][column], expected)
    self.assertLen(tables, num_tables)

  def test_fitting(self):
    # A table takes the name of the row and each column with three more, and
    # one in all: "name" 8, columns of 4, 6 and 4 characters 7, 9 and 7.
    columns, rows = ["a", "bb", "cccc"], {"name": ["1234", "123456", ""]}
    for width, expected in (
      (31, [[0, 1, 2]]),
      (30, [[0, 1], [2]]),
      (24, [[0, 1], [2]]),
      (23, [[0], [1], [2]]),
      (1, [[0], [1], [2]]),
    ):
      self.assertEqual(logs._fitting(columns, rows, width), expected)
    # A value without columns stands in the first.
    self.assertEqual(logs._fitting([""], {"name": ["1"]}, 9), [[0]])


class CurvesTest(_LogsTest):
  def test_last_picture_has_the_last_row(self):
    seen = []

    def render(metrics_path, png_path):
      self.assertEqual(png_path, self.workdir / "curves.png")
      rows = metrics_path.read_text().count("\n")
      seen.append((rows, threading.current_thread()))

    with self._logs() as log:
      log.curves(render, every_seconds=1000)
      for step in range(50):
        log.write(step, {"x": 1.0})
    self.assertEqual(seen[-1][0], 50)
    # One while it ran (the next would have been much later), and the last.
    self.assertLessEqual(len(seen), 2)

  def test_drawing_does_not_hold_up_the_loop(self):
    drawing, release = threading.Event(), threading.Event()

    def render(*_):
      drawing.set()
      release.wait(10)

    with self._logs() as log:
      log.curves(render, every_seconds=0)
      log.write(0, {"x": 1.0})
      self.assertTrue(drawing.wait(10))
      started = time.monotonic()
      for step in range(20):
        log.write(step, {"x": 1.0})
      self.assertLess(time.monotonic() - started, 5)
      release.set()

  def test_failure_to_draw_is_said_once(self):
    def render(*_):
      raise RuntimeError("no font")

    with self._logs() as log:
      log.curves(render, every_seconds=0)
      for step in range(5):
        log.write(step, {"x": 1.0})
        time.sleep(0.01)
    printed = self.printed.getvalue()
    self.assertEqual(printed.count("curves.png could not be drawn"), 1)
    self.assertIn("no font", printed)

  def test_with_report(self):
    draw = functools.partial(curves.curves, panels={"X": ["x"]})
    with self._logs() as log:
      log.curves(draw)
      log.write(0, {"x": 1.0})
    self.assertStartsWith(
      (self.workdir / "curves.png").read_bytes(), b"\x89PNG"
    )


class ElsewhereTest(_LogsTest):
  def test_tensorboard(self):
    writer = mock.MagicMock()
    fake = types.SimpleNamespace(SummaryWriter=mock.Mock(return_value=writer))
    with (
      mock.patch.dict(sys.modules, {"tensorboardX": fake}),
      self._logs(tensorboard=True, first_step=3) as log,
    ):
      log.write(3, {"x": 0.5, "y": math.nan})
    fake.SummaryWriter.assert_called_once_with(
      str(self.workdir / "tensorboard"), purge_step=3
    )
    writer.add_scalar.assert_called_once_with("x", 0.5, 3)
    writer.close.assert_called_once()

  def test_tensorboard_files(self):
    had_torch = "torch" in sys.modules
    with self._logs(tensorboard=True) as log:
      log.write(0, {"group/metric": 0.5})
    (events,) = (self.workdir / "tensorboard").iterdir()
    self.assertIn(b"group/metric", events.read_bytes())
    # It takes seconds to import, and nothing needs it.
    self.assertEqual("torch" in sys.modules, had_torch)

  def test_without_tensorboard(self):
    with (
      mock.patch.dict(sys.modules, {"tensorboardX": None}),
      self._logs(tensorboard=True) as log,
    ):
      log.write(0, {"x": 0.5})
    self.assertIn("tensorboardX is not installed", self.printed.getvalue())

  def test_wandb_goes_on_with_its_run(self):
    fake = mock.MagicMock()
    ids = []
    with mock.patch.dict(sys.modules, {"wandb": fake}):
      for step in range(2):
        with self._logs(wandb_project="p", first_step=step) as log:
          log.write(step, {"x": 0.5})
        ids.append(fake.init.call_args.kwargs["id"])
        self.assertEqual(fake.init.call_args.kwargs["project"], "p")
        fake.init.return_value.log.assert_called_with({"x": 0.5}, step=step)
    self.assertEqual(fake.init.return_value.finish.call_count, 2)
    self.assertEqual(ids[0], ids[1])

  def test_wandb_is_not_imported_unasked(self):
    with self._logs():
      self.assertNotIn("wandb", sys.modules)

  def test_wandb_missing(self):
    with (
      mock.patch.dict(sys.modules, {"wandb": None}),
      self.assertRaisesRegex(
        ValueError, "--wandb_project needs the package wandb"
      ),
    ):
      self._logs(wandb_project="p")


if __name__ == "__main__":
  absltest.main()
