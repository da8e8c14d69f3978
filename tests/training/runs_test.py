"""Tests of what every script shares: how a run opens, goes on, and ends."""

import contextlib
import io
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import tempfile
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags, logging
from absl.testing import absltest, parameterized

from rljax.distributed import processes
from rljax.storage import checkpoint, signals
from rljax.training import runs
from tests import conftest, tiny

SCRIPT = "experiments/script.py"
MAY_CHANGE = ("workdir", "mesh", "compilation_cache", "wandb_project")
MODEL = tiny.model(tiny.gpt2_config(num_layers=1))
# Holds the lock of a folder until its input ends.
HOLDER = """
import sys
from rljax.storage import locks
file = locks.take(sys.argv[1])
print("taken", flush=True)
sys.stdin.read()
"""


def _flags(*arguments, may_change=()):
  """The flags of a script, and one that a library brought along."""
  values = flags.FlagValues()
  for define, name, default in (
    (flags.DEFINE_string, "workdir", None),
    (flags.DEFINE_string, "compilation_cache", ""),
    (flags.DEFINE_string, "mesh", "data:1"),
    (flags.DEFINE_string, "wandb_project", ""),
    (flags.DEFINE_integer, "seed", 0),
    (flags.DEFINE_integer, "batch_size", 8),
    (flags.DEFINE_integer, "steps", 10),
    (flags.DEFINE_integer, "save_every", 4),
    (flags.DEFINE_integer, "num_page_samples", 2),
    (flags.DEFINE_bool, "keep_best", False),
    (flags.DEFINE_list, "stop_strings", []),
  ):
    define(name, default, "Text.", flag_values=values)
    # As a script that absl runs: its module goes by the name of its file.
    values.register_key_flag_for_module(SCRIPT, values[name])
  for name in (*MAY_CHANGE, *may_change):
    values[name].may_change = True
  for name in ("verbosity", "verbosity_of_a_library"):
    flags.DEFINE_integer(name, 0, "Text.", flag_values=values)
  values([SCRIPT, *arguments])
  return values


class _RunTest(parameterized.TestCase):
  """With a workdir that is not there yet, and settings of the process kept."""

  def setUp(self):
    super().setUp()
    folder = self.enter_context(tempfile.TemporaryDirectory())
    self.workdir = pathlib.Path(folder) / "deep" / "run"
    self.enter_context(mock.patch.object(sys, "argv", [SCRIPT]))
    # Pictures would take longer than all the rest.
    self.enter_context(mock.patch("rljax.evaluation.curves.curves"))
    self.addCleanup(logging.set_verbosity, logging.get_verbosity())

  def start(self, *arguments, may_change=()):
    values = _flags(
      f"--workdir={self.workdir}", *arguments, may_change=may_change
    )
    return runs.start(values, total_steps=values.steps)

  def train(self, run, *, starts_from=None, steps=None, evaluate=None, at=None):
    """Trains as a script does.

    Args:
      run: from `start`.
      starts_from: of `run.training`.
      steps: after which the run dies, as by a kill; None: it ends.
      evaluate: value of an evaluation by its step; None: there is none.
      at: what is called in the steps of these numbers.

    Returns:
      What was printed.
    """
    state = run.restore(
      {"policy": {"w": jnp.float32([4.0, -2.0])}},
      (),
      optimizer=optax.sgd(0.1, momentum=0.5),
      count=jnp.int32(0),
    )

    def update(state, batch):
      gradient = jax.grad(lambda params: params["policy"]["w"] ** 2 @ batch)
      updates, optimizer = optax.sgd(0.1, momentum=0.5).update(
        gradient(state["params"]), state["optimizer"]
      )
      params = optax.apply_updates(state["params"], updates)
      count = state["count"] + 1
      state = {"params": params, "optimizer": optimizer, "count": count}
      return state, {"sum": params["policy"]["w"].sum()}

    update = run.compile(update, returns_state=True)
    printed = io.StringIO()

    def check(step, state):
      if evaluate is None:
        return {}
      run.keep_best(step, evaluate[step], state["params"])
      return {"eval/value": evaluate[step]}

    with (
      contextlib.redirect_stdout(printed),
      run.training(MODEL, None, starts_from or {}, ["sum"]),
    ):
      for step in run.steps(freeze=[update]):
        if step == steps:
          # Nothing of a process that was killed runs any further.
          run._checkpoints.wait()
          return printed.getvalue()
        metrics = check(step, state)
        noise = jax.random.uniform(run.keys(step)[0], (2,))
        state, found = update(state, run.shard(noise))
        run.log(step, metrics | jax.device_get(found))
        if at and step in at:
          at[step]()
        run.save(step + 1, state, drawn=3 * step)
      if run.is_complete:
        run.log(run.total_steps, check(run.total_steps, state))
        run.summarise(["sum"])
    return printed.getvalue()

  def rows(self, name="metrics.jsonl"):
    lines = (self.workdir / name).read_text().splitlines()
    return [json.loads(line) for line in lines]

  def steps_saved(self, folder="."):
    path = self.workdir / folder / "checkpoints"
    return sorted(int(found.name) for found in path.iterdir())

  def params(self, folder="."):
    return checkpoint.restore_params(self.workdir / folder)["policy"]["w"]


class StartTest(_RunTest):
  def test_flags_are_filed_once_training_begins(self):
    self.train(self.start("--steps=3", "--stop_strings=a,b"))
    self.assertEqual(
      json.loads((self.workdir / "flags.json").read_text()),
      {
        "workdir": str(self.workdir),
        "compilation_cache": "",
        "mesh": "data:1",
        "wandb_project": "",
        "seed": 0,
        "batch_size": 8,
        "steps": 3,
        "save_every": 4,
        "num_page_samples": 2,
        "keep_best": False,
        "stop_strings": ["a", "b"],
      },
    )

  def test_the_folder_alone_is_there_at_first(self):
    with mock.patch.object(jax.config, "update", autospec=True) as config:
      run = self.start()
    self.assertEqual(os.listdir(self.workdir), [".lock"])
    config.assert_not_called()
    self.assertEqual(logging.get_verbosity(), logging.WARNING)
    self.assertEqual((run.first_step, run.meta, run.best), (0, {}, None))
    self.assertFalse(run.is_complete)

  def test_verbosity_that_is_asked_for_stays(self):
    logging.set_verbosity(logging.DEBUG)
    self.start("--verbosity=1")
    self.assertEqual(logging.get_verbosity(), logging.DEBUG)

  def test_several_processes_meet_first(self):
    place = dict(RLJAX_COORDINATOR="127.0.0.1:1", RLJAX_PROCESS_ID="0")
    with (
      mock.patch.dict(os.environ, place, RLJAX_NUM_PROCESSES="2"),
      mock.patch.object(processes, "connect", side_effect=OSError) as connect,
      mock.patch.object(sys, "excepthook", sys.excepthook),
    ):
      # Before it looks at the workdir, or at a device.
      with self.assertRaises(OSError):
        self.start()
      connect.assert_called_once()
      self.assertEqual(connect.call_args.args, ("127.0.0.1:1", 2, 0, None))
      self.assertFalse(self.workdir.exists())
      # A script for one process refuses to be one of several.
      with self.assertRaisesRegex(
        ValueError, "PROCESSES=2, but .* in one process"
      ):
        processes.check_joined()
    with mock.patch.dict(os.environ, place, RLJAX_NUM_PROCESSES="1"):
      self.start()

  def test_started_again(self):
    may_change = ("steps",)
    self.train(self.start("--steps=2"))
    self.start("--steps=2")
    changed = self.start("--steps=20", may_change=may_change)
    self.assertEqual(changed.total_steps, 20)
    self.start("--steps=2", "--compilation_cache=", "--mesh=data:2")
    with self.assertRaisesRegex(ValueError, "steps: was 2, now 20"):
      self.start("--steps=20")
    with self.assertRaisesRegex(ValueError, "batch_size: was 8, now 16"):
      self.start("--steps=2", "--batch_size=16", may_change=may_change)
    # What was filed is untouched.
    filed = json.loads((self.workdir / "flags.json").read_text())
    self.assertEqual((filed["batch_size"], filed["steps"]), (8, 2))

  def test_compilation_cache(self):
    with mock.patch.object(jax.config, "update", autospec=True) as config:
      self.start("--compilation_cache=~/cache")
    config.assert_called_once_with(
      "jax_compilation_cache_dir", os.path.expanduser("~/cache")
    )

  def test_workdir_is_a_file(self):
    self.workdir.parent.mkdir()
    self.workdir.write_text("")
    with self.assertRaisesRegex(ValueError, "cannot be written to"):
      self.start()

  def test_mesh_that_does_not_fit(self):
    with self.assertRaisesRegex(ValueError, "--mesh=rows:1"):
      self.start("--mesh=rows:1")

  def test_second_process_is_refused(self):
    self.workdir.mkdir(parents=True)
    process = subprocess.Popen(
      [sys.executable, "-c", HOLDER, self.workdir],
      cwd=conftest.REPOSITORY,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )
    with process:
      self.assertEqual(process.stdout.readline(), "taken\n")
      holder = re.escape(f"process {process.pid} on {socket.gethostname()};")
      with self.assertRaisesRegex(ValueError, f"is being written by {holder}"):
        self.start()
      process.stdin.close()
      process.wait()
    self.start()

  def test_a_run_keeps_its_workdir(self):
    run = self.start()
    done = subprocess.run(
      [sys.executable, "-c", HOLDER, self.workdir],
      cwd=conftest.REPOSITORY,
      input="",
      capture_output=True,
      text=True,
      check=False,
    )
    self.assertEqual(done.returncode, 1)
    self.assertIn(f"is being written by process {os.getpid()} on", done.stderr)
    del run


class GoOnTest(_RunTest):
  def test_saves_every_so_many_steps_and_at_the_end(self):
    run = self.start("--steps=10")
    with mock.patch.object(
      checkpoint.Checkpoints, "save", autospec=True
    ) as save:
      self.train(run)
    self.assertEqual([call.args[1] for call in save.call_args_list], [4, 8, 10])
    files = ("samples.jsonl", "histograms.jsonl", "evaluations.jsonl")
    rows = {"metrics.jsonl": 10} | dict.fromkeys(files, 0)
    self.assertEqual(
      save.call_args.args[3],
      {"step": 10, "best": None, "drawn": 27, "rows": rows},
    )
    self.assertTrue(run.is_complete)
    self.assertFalse(run.is_stopped)
    self.assertEqual(run.exit_status, 0)

  @parameterized.parameters(3, 5, 9)
  def test_killed_run_ends_as_one_that_was_not(self, steps):
    self.train(self.start())
    expected, rows = self.params(), self.rows()
    self.workdir = self.workdir.with_name("killed")
    self.train(self.start(), steps=steps)
    run = self.start()
    self.train(run)
    self.assertEqual(run.first_step, steps // 4 * 4)
    if run.first_step:
      self.assertEqual(run.meta["drawn"], 3 * (run.first_step - 1))
    np.testing.assert_array_equal(self.params(), expected)
    self.assertEqual(self.rows(), rows)
    self.assertEqual([row["step"] for row in rows], list(range(11)))

  def test_finished_run_stays_as_it_is(self):
    self.train(self.start())
    expected, rows = self.params(), self.rows()
    run = self.start()
    self.train(run)
    self.assertTrue(run.is_complete)
    self.assertEqual(run.first_step, 10)
    np.testing.assert_array_equal(self.params(), expected)
    self.assertEqual(self.rows(), rows)

  def test_state_of_another_optimizer_is_refused(self):
    self.train(self.start())
    run = self.start()
    with self.assertRaisesRegex(ValueError, "is not of this model and optim"):
      run.restore({"policy": {"w": jnp.zeros(2)}}, (), optimizer=optax.sgd(0.1))

  @parameterized.parameters((signal.SIGTERM, 0), (signal.SIGINT, 130))
  def test_signal_saves_and_ends(self, number, status):
    run = self.start()
    kill = lambda: os.kill(os.getpid(), number)
    printed = self.train(run, at={5: kill})
    self.assertTrue(run.is_stopped)
    self.assertFalse(run.is_complete)
    self.assertEqual(run.exit_status, status)
    self.assertEqual(self.steps_saved(), [4, 6])
    self.assertIn("Stopped by a signal after step 6; all is saved.", printed)
    self.assertEqual([row["step"] for row in self.rows()], list(range(6)))
    self.assertFalse((self.workdir / "summary.json").exists())

  def test_signal_in_the_last_step_changes_nothing(self):
    run = self.start()
    printed = self.train(
      run, at={9: lambda: os.kill(os.getpid(), signal.SIGTERM)}
    )
    self.assertTrue(run.is_complete)
    self.assertNotIn("Stopped", printed)
    self.assertTrue((self.workdir / "summary.json").exists())

  def test_signal_before_training(self):
    run = self.start()
    with run.signals():
      self.assertFalse(run.should_stop())
      os.kill(os.getpid(), signal.SIGINT)
      self.assertTrue(run.should_stop())
      raise signals.Stopped
    self.assertTrue(run.is_stopped)
    self.assertEqual(run.exit_status, 130)

  def test_keys_depend_on_seed_and_step(self):
    run, other = self.start(), self.start("--seed=1")
    data = lambda run, *step: jax.random.key_data(run.keys(*step)).tolist()
    self.assertEqual(run.keys(3).shape, (2,))
    self.assertEqual(run.keys(3, 5).shape, (5,))
    self.assertEqual(data(run, 3), data(run, 3))
    self.assertNotEqual(data(run, 3), data(run, 4))
    self.assertNotEqual(data(run, 3), data(other, 3))
    key = jax.random.fold_in(jax.random.key(0), 3)
    expected = jax.random.key_data(jax.random.split(key)).tolist()
    self.assertEqual(data(run, 3), expected)


class ProgramsTest(_RunTest):
  def test_a_program_may_not_compile_again_once_it_is_warm(self):
    run = self.start("--steps=3")
    run.restore({"a": jnp.zeros(2)}, (), optimizer=optax.sgd(0.1))
    double = run.compile(lambda x: 2 * x, name="double")
    with run.training(MODEL, None, {}):
      with self.assertRaisesRegex(RuntimeError, "double would compile again"):
        for step in run.steps(freeze=[double]):
          double(np.zeros(4 if step == 2 else 3, np.float32))
          run._stopped = False
      self.assertLen(double.compilations, 1)

  def test_state_stays_where_it_lies(self):
    mesh = "--mesh=data:2,tensor:2"
    run = self.start(mesh)
    tensor = jax.sharding.PartitionSpec("tensor")
    state = run.restore(
      {"wide": jnp.zeros((4, 2)), "odd": jnp.zeros(3)},
      [("wide", tensor)],
      optimizer=optax.sgd(0.1, momentum=0.5),
    )
    specs = jax.tree.map(lambda x: x.sharding.spec, state["params"])
    self.assertEqual(specs["wide"], tensor)
    self.assertEqual(specs["odd"], jax.sharding.PartitionSpec())
    self.assertEqual(state["optimizer"][0].trace["wide"].sharding.spec, tensor)
    update = run.compile(lambda state: (state, 0), returns_state=True)
    found, _ = update(state)
    self.assertEqual(found["params"]["wide"].sharding.spec, tensor)
    self.assertTrue(state["params"]["wide"].is_deleted())
    self.assertEqual(run.shard(np.zeros((4, 3))).sharding, run.rows_sharding)
    placed = run.place({"wide": np.zeros((4, 2))}, [("wide", tensor)])
    self.assertEqual(placed["wide"].sharding.spec, tensor)

  def test_moments_are_made_where_they_lie(self):
    """Inside a program: whole, they need not fit a device or the host."""
    inner, made = optax.adam(1e-3), []

    def init(params):
      made.extend(jax.tree.leaves(params))
      return inner.init(params)

    tensor = jax.sharding.PartitionSpec("tensor")
    state = self.start("--mesh=data:2,tensor:2").restore(
      {"wide": np.ones((4, 2), np.float32)},
      [("wide", tensor)],
      optimizer=optax.GradientTransformation(init, inner.update),
    )
    self.assertNotEmpty(made)
    for leaf in made:
      self.assertIsInstance(leaf, jax.core.Tracer)
    moments = state["optimizer"][0].mu["wide"]
    self.assertEqual(moments.sharding.spec, tensor)
    self.assertEqual(moments.addressable_shards[0].data.shape, (2, 2))


class KeepBestTest(_RunTest):
  """One evaluation before every step, and one at the end."""

  def _kept(self, values, *arguments, **options):
    run = self.start("--keep_best", f"--steps={len(values) - 1}", *arguments)
    printed = self.train(run, evaluate=values, **options)
    return run, printed

  def _params_after(self, step):
    """What the updates before a step have made of the parameters."""
    workdir, self.workdir = self.workdir, self.workdir.with_name("reference")
    run = self.start(f"--steps={step}", "--save_every=100")
    self.train(run)
    found, self.workdir = self.params(), workdir
    return found

  def test_the_best_is_kept(self):
    run, _ = self._kept([0.0, 2.0, 3.0, 1.0, 2.5])
    self.assertEqual(run.best, {"step": 2, "value": 3.0, "kept": 2})
    self.assertEqual(self.steps_saved("best"), [2])
    np.testing.assert_array_equal(self.params("best"), self._params_after(2))
    # A folder that any flag which names a model takes.
    self.assertTrue((self.workdir / "best/model/config.json").exists())

  def test_an_equal_one_is_no_better(self):
    run, _ = self._kept([0.0, 2.0, 2.0, 1.0])
    self.assertEqual(run.best, {"step": 1, "value": 2.0, "kept": 1})

  def test_the_start_is_to_be_beaten(self):
    run, printed = self._kept([1.0, 0.5, 1.0, 0.0])
    self.assertEqual(run.best, {"step": 0, "value": 1.0, "kept": 3})
    self.assertEqual(self.steps_saved("best"), [3])
    np.testing.assert_array_equal(self.params("best"), self.params())
    self.assertIn("Nothing beat the start: the last parameters are", printed)

  def test_the_last_one_may_be_the_best(self):
    run, printed = self._kept([1.0, 0.5, 1.5])
    self.assertEqual(run.best, {"step": 2, "value": 1.5, "kept": 2})
    self.assertNotIn("Nothing beat", printed)

  def test_not_asked_for(self):
    run = self.start("--steps=2")
    self.train(run, evaluate=[0.0, 1.0, 2.0])
    self.assertIsNone(run.best)
    self.assertFalse((self.workdir / "best").exists())

  @parameterized.parameters(5, 6, 7)
  def test_killed_run_forgets_what_it_is_about_to_repeat(self, steps):
    # Saved at 4; what is kept at 5 and 6 is of steps that are done again.
    values = [0.0, 0.0, 3.0, 1.0, 1.0, 4.0, 5.0, 2.0, 2.0]
    self._kept(values, steps=steps)
    run, _ = self._kept(values)
    self.assertEqual(run.best, {"step": 6, "value": 5.0, "kept": 6})
    self.assertEqual(self.steps_saved("best"), [6])
    np.testing.assert_array_equal(self.params("best"), self._params_after(6))

  def test_repeated_steps_may_come_out_otherwise(self):
    values = [0.0, 0.0, 3.0, 1.0, 1.0, 2.0, 2.5, 2.0, 2.0]
    self._kept(values, steps=5)
    run, _ = self._kept(values)
    self.assertEqual(run.best, {"step": 2, "value": 3.0, "kept": 2})
    self.assertEqual(self.steps_saved("best"), [2])
    np.testing.assert_array_equal(self.params("best"), self._params_after(2))
    # Where a lost one had replaced the best, the last parameters stand in.
    self.workdir = self.workdir.with_name("other")
    self._kept([*values[:5], 4.0, *values[6:]], steps=6)
    self.assertEqual(self.steps_saved("best"), [5])
    run, _ = self._kept(values)
    self.assertEqual(run.best, {"step": 2, "value": 3.0, "kept": 8})
    self.assertEqual(self.steps_saved("best"), [8])


class LogsTest(_RunTest):
  def test_notes_before_the_log_opens_are_printed_then(self):
    run = self.start("--steps=1")
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
      run.note("This is early.")
    self.assertEqual(out.getvalue(), "")
    printed = self.train(run)
    self.assertEqual(printed.count("This is early.\n"), 1)

  def test_what_a_killed_save_left_is_told(self):
    self.train(self.start(), steps=5)
    (self.workdir / "checkpoints" / "8.saving").mkdir()
    printed = self.train(self.start())
    self.assertIn("removed the unfinished checkpoint of step 8", printed)

  def test_summary(self):
    run = self.start("--steps=3", "--keep_best")
    printed = self.train(run, evaluate=[0.5, 2.0, 1.0, 0.75])
    summary = json.loads((self.workdir / "summary.json").read_text())
    sums = [row["sum"] for row in self.rows()[:3]]
    self.assertEqual(
      summary,
      {
        "sum": {"before": sums[0], "after": sums[2], "best": sums[1]},
        "eval/value": {"before": 0.5, "after": 0.75, "best": 2.0},
      },
    )
    title = f"{self.workdir}, step 3; the best, step 1, is in best"
    # A narrow terminal breaks the title.
    self.assertIn("".join(title.split()), "".join(printed.split()))

  def test_summary_of_the_scripts_own(self):
    run = self.start("--steps=1")
    run.restore({"a": jnp.zeros(2)}, (), optimizer=optax.sgd(0.1))
    out = io.StringIO()
    with contextlib.redirect_stdout(out), run.training(MODEL, None, {}):
      run.finish({"answers": 3}, title="What there is")
    summary = json.loads((self.workdir / "summary.json").read_text())
    self.assertEqual(summary, {"answers": 3})
    self.assertIn("What there is", out.getvalue())

  def test_samples_and_rows_that_were_left_out(self):
    run = self.start("--steps=1")
    run.restore({"a": jnp.zeros(2)}, (), optimizer=optax.sgd(0.1))
    out = io.StringIO()
    with contextlib.redirect_stdout(out), run.training(MODEL, None, {}):
      run.skipped(["log:1: is bad.", "log:2: is worse."])
      run.samples(0, [{"prompt": "1+1=", "response": "2"}])
    self.assertEqual(
      (self.workdir / "skipped.txt").read_text(),
      "log:1: is bad.\nlog:2: is worse.\n",
    )
    self.assertIn("2 rows were left out", out.getvalue())
    self.assertEqual(
      self.rows("samples.jsonl"),
      [{"step": 0, "prompt": "1+1=", "response": "2"}],
    )

  @parameterized.parameters(0, 3)
  def test_page(self, number):
    run = self.start(f"--num_page_samples={number}")
    samples = mock.Mock(return_value=["a sample"])
    with mock.patch("rljax.evaluation.token_pages.write") as write:
      run.page("A title", samples, value_name="advantage")
    if not number:
      samples.assert_not_called()
      write.assert_not_called()
      return
    samples.assert_called_once_with(number)
    write.assert_called_once_with(
      str(self.workdir / "tokens.html"),
      "A title",
      ["a sample"],
      limit=number,
      value_name="advantage",
    )


class CheckModelsTest(_RunTest):
  def test_a_run_holds_its_models_to_it(self):
    weights = {"a": np.float32([1, 2])}
    starts_from = {"policy": weights, "reference": None}
    self.train(self.start("--steps=1"), starts_from=starts_from)
    filed = json.loads((self.workdir / "models.json").read_text())
    self.assertEqual(filed, {"policy": checkpoint.fingerprint(weights)})
    self.train(self.start("--steps=1"), starts_from=starts_from)
    other = {"policy": {"a": np.float32([1, 3])}}
    with self.assertRaisesRegex(ValueError, "--policy holds other weights"):
      self.train(self.start("--steps=1"), starts_from=other)


if __name__ == "__main__":
  absltest.main()
