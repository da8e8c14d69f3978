"""Tests of runs that go on: longer, or with files that are gone or damaged."""

import json
import os
import shutil
import signal
from unittest import mock

import numpy as np
from absl.testing import absltest, parameterized

from rljax.storage import calls, checkpoint, paths, signals
from rljax.training import runs
from tests.training import runs_test


class _RunTest(runs_test._RunTest):
  def start(self, *arguments, **options):
    """With flags of an optimizer, and those that may change and grow."""
    values = self.flags(*arguments, **options)
    return runs.start(values, total_steps=values.steps)

  def flags(
    self, *arguments, schedule="constant", warmup=0.0, schedule_steps=0
  ):
    values = runs_test._flags(f"--workdir={self.workdir}", *arguments)
    for name, value in (
      ("schedule", schedule),
      ("warmup", warmup),
      ("schedule_steps", schedule_steps),
    ):
      runs_test.flags.DEFINE_string(name, "", "Text.", flag_values=values)
      values[name].value = value
      values.register_key_flag_for_module(runs_test.SCRIPT, values[name])
    values["steps"].may_grow = "steps"
    values["save_every"].may_change = True
    return values


class LongerTest(_RunTest):
  @parameterized.product(eval_every=[1, 4], best=[0, 2, 3, 9])
  def test_same_bits_as_one_longer_run(self, eval_every, best):
    """Whether or not the end of the shorter run is evaluated by the longer."""
    values = [1.0 if step == best else 0.5 - step / 100 for step in range(13)]
    evaluate = {s: x for s, x in enumerate(values) if s % eval_every == 0}
    longer = self.workdir
    self.train(
      self.start("--steps=12", "--keep_best"), evaluate=_Sparse(evaluate)
    )
    rows = self.rows()
    self.workdir = self.workdir.with_name("shorter")
    for steps in (6, 12):
      printed = self.train(
        self.start(f"--steps={steps}", "--keep_best"),
        evaluate=_Sparse(evaluate | {6: values[6]}),
      )
    for folder in (".", "best"):
      np.testing.assert_array_equal(
        self.params(folder),
        checkpoint.restore_params(longer / folder)["policy"]["w"],
      )
    self.assertEqual(
      [row for row in self.rows() if row["step"] != 6],
      [row for row in rows if row["step"] != 6],
    )
    self.assertIn("dropped 1 rows of step 6", printed)
    filed = json.loads((self.workdir / "flags.json").read_text())
    self.assertEqual(filed["steps"], 12)

  def test_the_end_of_the_shorter_run_may_be_the_best(self):
    evaluate = _Sparse({0: 0.0, 6: 2.0, 12: 1.0})
    for steps in (6, 12):
      printed = self.train(
        self.start(f"--steps={steps}", "--keep_best"), evaluate=evaluate
      )
    self.assertEqual(self.steps_saved("best"), [6])
    self.assertIn("thebest,step6,isinbest", "".join(printed.split()))

  @parameterized.parameters(
    ({"schedule": "cosine"}, "--schedule=cosine is spread over all of them"),
    ({"schedule": "linear"}, "--schedule=linear is spread over all of them"),
    ({"warmup": 0.1}, "--warmup=0.1 is a share of all of them"),
  )
  def test_steps_that_depend_on_the_number_of_all(self, options, reason):
    self.train(self.start("--steps=6", **options))
    before = sorted(os.listdir(self.workdir))
    with self.assertRaisesRegex(
      ValueError, f"--steps=6, now 12: {reason}.*Give --steps=6, or start ano"
    ):
      self.start("--steps=12", **options)
    self.assertEqual(sorted(os.listdir(self.workdir)), before)
    # They may, within a schedule of a length of its own.
    self.workdir = self.workdir.with_name("other")
    for steps in (6, 8):
      self.train(self.start(f"--steps={steps}", **options, schedule_steps=20))
    self.assertEqual(self.rows()[-1]["step"], 8)

  def test_fewer_steps(self):
    self.train(self.start("--steps=6"))
    with self.assertRaisesRegex(
      ValueError, "may grow, not fall. Give --steps=6"
    ):
      self.start("--steps=5")

  def test_fewer_steps_than_are_done(self):
    run = self.start("--steps=6")
    run.total_steps = 6
    self.train(run)
    run = self.start("--steps=6")
    run.total_steps = 5  # As it may come of other data.
    with self.assertRaisesRegex(
      ValueError, "has done 6 steps, and is to have 5"
    ):
      self.train(run)

  @parameterized.parameters(1, 3, 100)
  def test_how_often_it_saves_may_change(self, save_every):
    self.train(self.start("--steps=10"), steps=5)
    self.train(self.start("--steps=10", f"--save_every={save_every}"))
    params = self.params()
    self.workdir = self.workdir.with_name("whole")
    self.train(self.start("--steps=10"))
    np.testing.assert_array_equal(params, self.params())


class _Sparse(dict):
  """Values of an evaluation; what is not there is very low."""

  def __missing__(self, step):
    return -1e9


class DamageTest(_RunTest):
  def _resume(self, damage, at=9, total=10):
    """A run that is killed, damaged and resumed; what is printed."""
    self.train(self.start(f"--steps={total}"), steps=at)
    damage()
    return self.train(self.start(f"--steps={total}"))

  def _params(self):
    """Of a run that nothing happened to."""
    kept, self.workdir = self.workdir, self.workdir.with_name("whole")
    self.train(self.start("--steps=10"))
    params, self.workdir = self.params(), kept
    return params

  def _aside(self):
    return {
      name.partition(".old")[0]
      for name in os.listdir(self.workdir)
      if ".old" in name
    }

  def test_rows_are_deleted(self):
    printed = self._resume((self.workdir / "metrics.jsonl").unlink)
    self.assertIn("metrics.jsonl: all 8 rows that this run had", printed)
    self.assertIn("metrics.csv has 8 steps that are not in the rows", printed)
    table = (self.workdir / "metrics.csv.old1").read_text()
    self.assertLen(table.splitlines(), 10)
    self.assertEqual([row["step"] for row in self.rows()], [8, 9, 10])
    np.testing.assert_array_equal(self.params(), self._params())
    # No row is taken for the one before training.
    summary = json.loads((self.workdir / "summary.json").read_text())
    self.assertEqual(summary, {"sum": {"after": self.rows()[1]["sum"]}})
    self.assertIn("Rows of the first steps are missing", printed)

  def test_rows_are_cut(self):
    def cut():
      path = self.workdir / "metrics.jsonl"
      os.truncate(path, path.stat().st_size // 2)

    printed = self._resume(cut)
    self.assertRegex(printed, "metrics.jsonl: . of 8 rows that this run had")
    self.assertEqual(self._aside(), {"metrics.jsonl", "metrics.csv"})
    summary = json.loads((self.workdir / "summary.json").read_text())
    self.assertIn("before", summary["sum"])

  def test_a_finished_run_without_its_logs(self):
    self.train(self.start("--steps=6"))
    for path in self.workdir.iterdir():
      if path.is_file() and path.name not in ("flags.json", "models.json"):
        path.unlink()
    printed = self.train(self.start("--steps=6"))
    self.assertIn("metrics.jsonl: all 6 rows", printed)
    self.assertTrue((self.workdir / "summary.json").exists())

  def test_no_checkpoint_can_be_read(self):
    def spoil():
      for path in self.workdir.glob("checkpoints/*/checksums.json"):
        path.write_text("{")

    printed = self._resume(spoil)
    rows = (self.workdir / "metrics.jsonl.old1").read_text().splitlines()
    self.assertLen(rows, 9)
    self.assertIn("8.unreadable", printed)
    self.assertContainsSubset(
      ["4.unreadable", "8.unreadable", "8", "10"],
      os.listdir(self.workdir / "checkpoints"),
    )
    np.testing.assert_array_equal(self.params(), self._params())

  def test_checkpoints_are_deleted(self):
    self._resume(lambda: shutil.rmtree(self.workdir / "checkpoints"))
    rows = (self.workdir / "metrics.jsonl.old1").read_text().splitlines()
    self.assertLen(rows, 9)

  def test_a_kill_sets_nothing_aside(self):
    self._resume(lambda: None)
    self.assertEqual(self._aside(), set())

  def test_a_second_damage_does_not_replace_the_first(self):
    for number in (1, 2):
      self.train(self.start("--steps=10"), steps=9)
      for path in self.workdir.glob("checkpoints/8/checksums.json"):
        path.write_text("{" * number)
    self.train(self.start("--steps=10"))
    found = {
      path.parent.name: path.read_text()
      for path in self.workdir.glob("checkpoints/8.unr*/checksums.json")
    }
    self.assertEqual(found, {"8.unreadable": "{{", "8.unreadable.old1": "{"})

  @parameterized.parameters(b"{", b"", b"[]", b"\xff\0")
  def test_files_of_the_run_that_cannot_be_read(self, content):
    self.train(
      self.start("--steps=2"), starts_from={"policy": {"w": np.ones(2)}}
    )
    for name in ("models.json", "flags.json"):
      (self.workdir / name).write_bytes(content)
      with self.assertRaisesRegex(
        ValueError, f"{name} cannot be read .*delete"
      ):
        self.train(
          self.start("--steps=2"), starts_from={"policy": {"w": np.ones(2)}}
        )
      (self.workdir / name).unlink()


class DiskTest(_RunTest):
  @parameterized.parameters("metrics.jsonl", "metrics.csv")
  def test_what_must_be_kept_stops_the_run_and_it_goes_on(self, name):
    fail = mock.Mock(side_effect=OSError(28, "No space left on device"))

    run = self.start("--steps=10")

    def fill():
      file = {**run._log._files, "metrics.csv": run._log._csv}[name]
      file._file = mock.Mock(wraps=file._file, write=fail)

    with self.assertRaisesRegex(
      paths.DiskError, f"{name} cannot be written: No space.*Free some space"
    ):
      self.train(run, at={5: fill})
    run = None  # Which gives its lock back.
    self.train(self.start("--steps=10"))
    self.assertEqual([row["step"] for row in self.rows()], list(range(11)))
    params = self.params()
    self.workdir = self.workdir.with_name("whole")
    self.train(self.start("--steps=10"))
    np.testing.assert_array_equal(params, self.params())

  def test_a_checkpoint_that_cannot_be_saved(self):
    full = OSError(28, "No space left on device")
    run = self.start("--steps=40")
    finish = checkpoint.Checkpoints._finish

    def once(self, step, *arguments):
      if step == 8:
        arguments[1].result()  # Until the arrays are written.
        raise full
      return finish(self, step, *arguments)

    with (
      mock.patch.object(checkpoint.Checkpoints, "_finish", once),
      self.assertRaisesRegex(
        paths.DiskError, "checkpoints/8 cannot be written: No space.*Free some"
      ),
    ):
      self.train(run)
    # It is told of in one of the next steps, and the one before is whole.
    self.assertLess(len(self.rows()), 13)
    self.assertEqual(self.steps_saved(), [4])
    run = None  # Which gives its lock back.
    self.train(self.start("--steps=40"))

  def test_a_page_that_cannot_be_written(self):
    run = self.start("--steps=3")
    page = mock.patch.object(
      runs.token_pages, "write", side_effect=OSError(28, "No space left")
    )
    show = lambda: run.page("Title", lambda limit: [])
    with page:
      printed = self.train(run, at={0: show, 1: show})
    self.assertEqual(printed.count("The page could not be written"), 1)


class _Failing(dict):
  """Evaluations, of which that of step 6 fails."""

  def __init__(self, error):
    super().__init__()
    self._error = error

  def __missing__(self, step):
    if step == 6:
      raise self._error
    return 0.0


class UserTest(_RunTest):
  """Functions of the user's own, in the midst of a step."""

  @parameterized.parameters(calls.CallError("no answer"), signals.Stopped())
  def test_the_steps_before_are_saved(self, error):
    run = self.start("--steps=10", "--save_every=100")
    evaluate = _Failing(error)
    if isinstance(error, calls.CallError):
      with self.assertRaisesRegex(ValueError, "no answer"):
        self.train(run, evaluate=evaluate)
    else:
      self.train(run, evaluate=evaluate)
      self.assertTrue(run.is_stopped)
    self.assertEqual(self.steps_saved(), [6])
    run = None  # Which gives its lock back.
    self.train(self.start("--steps=10", "--save_every=100"))
    params = self.params()
    self.workdir = self.workdir.with_name("whole")
    self.train(self.start("--steps=10"))
    np.testing.assert_array_equal(params, self.params())

  def test_the_batch_that_failed_is_filed(self):
    error = calls.CallError("no answer")
    error.rows = [
      {"prompt": "p", "response": "r", "reward": np.float32(0.5), "parts": {}},
      {"prompt": "p", "response": "s"},
    ]
    for _ in range(2):
      with self.assertRaises(calls.CallError):
        self.train(self.start(), evaluate=_Failing(error))
    expected = {"prompt": "p", "response": "r", "reward": 0.5, "parts": {}}
    found = self.rows("answered.jsonl")
    self.assertEqual(found[0], expected)
    self.assertLen(found, 4)

  def test_nothing_is_saved_behind_an_error_of_the_script(self):
    run = self.start("--steps=10", "--save_every=100")
    with self.assertRaises(KeyError):
      self.train(run, evaluate=_Failing(KeyError("x")))
    self.assertFalse((self.workdir / "checkpoints").exists())


class HangupTest(_RunTest):
  def test_a_closed_terminal_saves_as_a_scheduler_does(self):
    run = self.start("--steps=10")
    kill = lambda: os.kill(os.getpid(), signal.SIGHUP)
    self.train(run, at={5: kill})
    self.assertTrue(run.is_stopped)
    self.assertEqual(run.exit_status, 0)
    self.assertEqual(self.steps_saved(), [4, 6])

  def test_behind_nohup_it_goes_on(self):
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    self.addCleanup(signal.signal, signal.SIGHUP, previous)
    run = self.start("--steps=10")
    kill = lambda: os.kill(os.getpid(), signal.SIGHUP)
    self.train(run, at={5: kill})
    self.assertTrue(run.is_complete)
    self.assertEqual(signal.getsignal(signal.SIGHUP), signal.SIG_IGN)


if __name__ == "__main__":
  absltest.main()
