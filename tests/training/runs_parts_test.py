"""Tests of runs whose work has parts, and of signals in the midst of it."""

import contextlib
import os
import pathlib
import signal
import sys
import tempfile
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags, logging
from absl.testing import parameterized

from rljax.distributed import meshes
from rljax.models import hf
from rljax.storage import signals
from rljax.tasks import word_lists
from rljax.training import runs
from tests import tiny

SCRIPT = "experiments/script.py"
WORDS = word_lists.word_tokenizer()
MODEL = tiny.model(tiny.llama_config(vocab_size=120, num_layers=1))


def _flags(**given):
  values = flags.FlagValues()
  defaults = {
    "workdir": "",
    "compilation_cache": "",
    "mesh": "data:1",
    "seed": 0,
    "save_every": 2,
    "verbosity": 0,
  }
  for name, default in (defaults | given).items():
    kind = "integer" if isinstance(default, int) else "string"
    define = getattr(flags, f"DEFINE_{kind}")
    define(name, default, "Text.", flag_values=values)
    values.register_key_flag_for_module(SCRIPT, values[name])
  values([SCRIPT])
  return values


class PartsTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    folder = self.enter_context(tempfile.TemporaryDirectory())
    self.workdir = pathlib.Path(folder) / "run"
    self.enter_context(mock.patch.object(sys, "argv", [SCRIPT]))
    # Both are set for the whole process.
    self.addCleanup(logging.set_verbosity, logging.get_verbosity())
    self.params = jax.tree.map(np.asarray, tiny.params(MODEL.config, 0))

  def start(self, **given):
    return runs.start(_flags(workdir=str(self.workdir), **given))

  def fit(self, run, name, num_steps, kill_at=None, number=signal.SIGTERM):
    """Adds 1 to every parameter in each step; the steps, and the result."""
    done, optimizer = [], optax.sgd(-1.0)
    rules = hf.partition_rules(MODEL, run.mesh)
    with run.part(name, MODEL, WORDS, total_steps=num_steps) as part:
      state = part.restore({"policy": self.params}, rules, optimizer=optimizer)
      seen = part.meta.get("seen", [])
      for step in part.steps():
        done.append(step)
        state["params"] = jax.tree.map(lambda x: x + 1.0, state["params"])
        seen = [*seen, step]
        if step == kill_at:
          os.kill(os.getpid(), number)
        part.save(step + 1, state, seen=seen)
    return done, seen, state["params"]["policy"]

  def test_a_part_is_a_policy_of_its_own(self):
    run = self.start()
    with run.signals():
      for i in range(2):
        done, seen, _ = self.fit(run, f"fits/{i}", 3 + i)
        self.assertEqual(done, list(range(3 + i)))
        self.assertEqual(seen, done)
        folder = self.workdir / "fits" / str(i)
        # The latest alone is kept.
        self.assertEqual(os.listdir(folder / "checkpoints"), [str(3 + i)])
        loaded = hf.load(str(folder))
        self.assertEqual(loaded.model.config.vocab_size, 120)
        jax.tree.map(
          lambda x, y, i=i: np.testing.assert_allclose(x, y + 3 + i, rtol=1e-5),
          loaded.params,
          self.params,
        )
    # The run around them is as it was.
    self.assertEqual(run.workdir, str(self.workdir))
    self.assertEqual((run.first_step, run.meta, run.best), (0, {}, None))
    self.assertFalse(run.is_stopped)
    self.assertEqual(run.exit_status, 0)
    self.assertFalse((self.workdir / "checkpoints").exists())

  @parameterized.parameters((signal.SIGTERM, 0), (signal.SIGINT, 130))
  def test_a_signal_ends_the_work_once_the_part_is_saved(self, number, status):
    run, reached = self.start(), []
    with contextlib.redirect_stdout(mock.Mock()) as printed, run.signals():
      self.fit(run, "fits/0", 5, kill_at=2, number=number)
      reached.append("the next part")
    self.assertEqual(reached, [])
    self.assertTrue(run.is_stopped)
    self.assertEqual(run.exit_status, status)
    said = "".join(call.args[0] for call in printed.write.call_args_list)
    self.assertIn("Stopped by a signal; everything so far is saved.", said)
    folder = self.workdir / "fits/0"
    self.assertEqual(os.listdir(folder / "checkpoints"), ["3"])
    self.assertFalse((folder / "model").exists())  # It is not whole.
    del run
    # Another start goes on with it.
    run = self.start()
    with run.signals():
      done, seen, params = self.fit(run, "fits/0", 5)
      self.assertEqual((done, seen), ([3, 4], [0, 1, 2, 3, 4]))
      jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y + 5, rtol=1e-5),
        params,
        self.params,
      )
      # And a part that is done has nothing to do.
      self.assertEqual(self.fit(run, "fits/0", 5)[:2], ([], seen))

  def test_a_signal_in_the_last_step_of_a_part_does_not_stop_it(self):
    run = self.start()
    with run.signals():
      self.fit(run, "fits/0", 3, kill_at=2)
      self.assertFalse(run.is_stopped)
      # The work behind it looks, and ends.
      with self.assertRaises(signals.Stopped):
        run.check_signals()
    self.assertTrue((self.workdir / "fits/0/model").exists())

  def test_sampling_ends_behind_a_batch(self):
    run, asked = self.start(), []
    with run.signals():
      progress = run.progress("samples", 3)
      for done in (1, 2, 3):
        asked.append(done)
        if done == 2:
          os.kill(os.getpid(), signal.SIGTERM)
        progress(done, [{"parts": {}}])
    self.assertEqual(asked, [1, 2])
    self.assertTrue(run.is_stopped)

  def test_parts_share_a_program(self):
    run = self.start(mesh="data:2,fsdp:4")
    rules, optimizer = hf.partition_rules(MODEL, run.mesh), optax.trace(0.9)
    run.expect({"policy": self.params}, rules, optimizer=optimizer)

    def update(state, rate):
      grads = jax.tree.map(jnp.ones_like, state["params"])
      updates, moments = optimizer.update(grads, state["optimizer"])
      updates = jax.tree.map(lambda x: rate * x, updates)
      params = optax.apply_updates(state["params"], updates)
      return {"params": params, "optimizer": moments}, rate

    update = run.compile(update, returns_state=True)
    with run.signals():
      for i in range(2):
        with run.part(f"{i}", MODEL, WORDS, total_steps=2) as part:
          params = {"policy": self.params}
          state = part.restore(params, rules, optimizer=optimizer)
          expected = meshes.shardings(state, rules, run.mesh)
          for step in part.steps(freeze=[update]):
            state, _ = update(state, jnp.float32(step))
            self.assertEqual(
              jax.tree.map(lambda x: x.sharding, state), expected
            )
            part.save(step + 1, state)
    self.assertLen(update.compilations, 1)

  def test_where_a_summary_is_everything_is(self):
    run = self.start()
    run.total_steps = 1
    rules = hf.partition_rules(MODEL, run.mesh)
    state = run.restore(
      {"policy": self.params}, rules, optimizer=optax.sgd(1.0)
    )
    with run.training(MODEL, WORDS, {"policy": self.params}):
      for step in run.steps():
        run.save(step + 1, state)
      run.finish({"steps": 1})
      self.assertTrue((self.workdir / "summary.json").exists())
      self.assertEqual(os.listdir(self.workdir / "checkpoints"), ["1"])
