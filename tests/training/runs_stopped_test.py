"""Tests of runs that a signal stops, before training and in it."""

import contextlib
import dataclasses
import io
import os
import pathlib
import signal
import sys
import tempfile
from unittest import mock

import jax
import numpy as np
import optax
from absl import flags, logging
from absl.testing import parameterized

from rljax.models import hf
from rljax.storage import checkpoint, signals
from rljax.tasks import chains
from rljax.training import runs
from tests import tiny

SCRIPT = "experiments/script.py"
TOKENIZER = chains.character_tokenizer()


def _flags(workdir):
  """The flags of a script that every run reads."""
  values = flags.FlagValues()
  for define, name, default in (
    (flags.DEFINE_string, "workdir", str(workdir)),
    (flags.DEFINE_integer, "seed", 0),
    (flags.DEFINE_integer, "save_every", 2),
    (flags.DEFINE_integer, "verbosity", -1),
    (flags.DEFINE_string, "mesh", "data:2"),
    (flags.DEFINE_string, "compilation_cache", ""),
    (flags.DEFINE_string, "wandb_project", ""),
  ):
    define(name, default, "Text.", flag_values=values)
    values.register_key_flag_for_module(SCRIPT, values[name])
  values([SCRIPT])
  return values


class StoppedTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    folder = self.enter_context(tempfile.TemporaryDirectory())
    self.workdir = pathlib.Path(folder)
    self.enter_context(mock.patch.object(sys, "argv", [SCRIPT]))
    self.addCleanup(logging.set_verbosity, logging.get_verbosity())
    config = tiny.gpt2_config(vocab_size=len(TOKENIZER))
    self.loaded = hf.LanguageModel(
      tiny.model(config), tiny.params(config), TOKENIZER, "", None
    )

  def start(self):
    return runs.start(_flags(self.workdir), total_steps=5)

  @parameterized.parameters((signal.SIGTERM, 0), (signal.SIGINT, 130))
  def test_work_before_training(self, number, status):
    run = self.start()
    with contextlib.redirect_stdout(io.StringIO()) as said, run.signals():
      self.assertFalse(run.should_stop())
      os.kill(os.getpid(), number)
      self.assertTrue(run.should_stop())
      raise signals.Stopped
    self.assertIn("Stopped by a signal; everything so far", said.getvalue())
    self.assertTrue(run.is_stopped)
    self.assertEqual(run.exit_status, status)
    self.assertFalse((self.workdir / "flags.json").exists())

  def test_work_that_is_not_stopped(self):
    run = self.start()
    with run.signals():
      pass
    self.assertFalse(run.is_stopped)
    self.assertEqual(run.exit_status, 0)
    with self.assertRaises(ValueError), run.signals():
      raise ValueError

  def test_work_after_the_last_step(self):
    run = self.start()
    state = run.restore(
      {"policy": self.loaded.params},
      hf.partition_rules(self.loaded.model, run.mesh),
      optimizer=optax.sgd(0.1),
    )
    models = {"policy": self.loaded.params}
    with run.training(self.loaded.model, TOKENIZER, models):
      for step in run.steps():
        run.log(step, {"loss": 1.0})
        run.save(step + 1, state)
      self.assertTrue(run.is_complete)
      os.kill(os.getpid(), signal.SIGINT)
      if run.should_stop():
        raise signals.Stopped
      self.fail("It was not stopped.")
    self.assertEqual(run.exit_status, 130)
    # What was trained is there, and so is the log.
    restored = checkpoint.restore_params(self.workdir, 5)["policy"]
    jax.tree.map(
      np.testing.assert_array_equal, restored, dict(self.loaded.params)
    )
    self.assertTrue((self.workdir / "metrics.jsonl").exists())

  def test_a_model_that_is_not_finite_is_refused(self):
    run = self.start()
    params = jax.tree.map(np.array, self.loaded.params)
    jax.tree.leaves(params)[-1].flat[-1] = np.nan
    broken = dataclasses.replace(self.loaded, params=params)
    with self.assertRaisesRegex(ValueError, "has weights that are not finite"):
      run.place_model(broken)

  def test_a_model_is_placed_by_its_own_rules(self):
    run = self.start()
    placed = run.place_model(self.loaded)
    self.assertIs(placed.model, self.loaded.model)
    for leaf in jax.tree.leaves(placed.params):
      self.assertEqual(leaf.sharding.mesh.shape["data"], 2)
    self.assertEqual(
      checkpoint.fingerprint(placed.params),
      checkpoint.fingerprint(self.loaded.params),
    )
