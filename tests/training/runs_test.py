"""Tests of what every script does first."""

import json
import os
import pathlib
import sys
import tempfile
from unittest import mock

import jax
import numpy as np
from absl import flags, logging
from absl.testing import parameterized

from rljax.storage import checkpoint
from rljax.training import runs

SCRIPT = "experiments/script.py"


def _flags(*arguments):
  """The flags of a script, and one that a library brought along."""
  values = flags.FlagValues()
  for define, name, default in (
    (flags.DEFINE_string, "workdir", None),
    (flags.DEFINE_string, "compilation_cache", ""),
    (flags.DEFINE_integer, "batch_size", 8),
    (flags.DEFINE_integer, "steps", 10),
    (flags.DEFINE_list, "stop_strings", []),
  ):
    define(name, default, "Text.", flag_values=values)
    # As a script that absl runs: its module goes by the name of its file.
    values.register_key_flag_for_module(SCRIPT, values[name])
  flags.DEFINE_integer("verbosity_of_a_library", 0, "", flag_values=values)
  values([SCRIPT, *arguments])
  return values


class StartTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    folder = self.enter_context(tempfile.TemporaryDirectory())
    self.workdir = pathlib.Path(folder) / "deep" / "run"
    self.enter_context(mock.patch.object(sys, "argv", [SCRIPT]))
    # Both are set for the whole process.
    self.addCleanup(logging.set_verbosity, logging.get_verbosity())
    self.config = self.enter_context(
      mock.patch.object(jax.config, "update", autospec=True)
    )

  def _start(self, *arguments, may_change=()):
    values = _flags(f"--workdir={self.workdir}", *arguments)
    return runs.start(values, may_change)

  def test_flags_in_force(self):
    self.assertEqual(
      self._start("--steps=3", "--stop_strings=a,b"),
      {
        "workdir": str(self.workdir),
        "compilation_cache": "",
        "batch_size": 8,
        "steps": 3,
        "stop_strings": ["a", "b"],
      },
    )
    # The folder is there; filing the flags is the script's part.
    self.assertEqual(os.listdir(self.workdir), [])
    self.config.assert_not_called()
    self.assertEqual(logging.get_verbosity(), logging.WARNING)

  def test_one_of_several_that_have_not_met_refuses(self):
    place = dict(RLJAX_COORDINATOR="127.0.0.1:1", RLJAX_PROCESS_ID="0")
    with (
      mock.patch.dict(os.environ, place, RLJAX_NUM_PROCESSES="2"),
      self.assertRaisesRegex(ValueError, "PROCESSES=2: .* in one process"),
    ):
      self._start()
    with mock.patch.dict(os.environ, place, RLJAX_NUM_PROCESSES="1"):
      self._start()

  def test_started_again(self):
    may_change = ("compilation_cache", "steps")
    in_force = self._start()
    checkpoint.write_flags(self.workdir, in_force, may_change)
    self.assertEqual(self._start(may_change=may_change), in_force)
    changed = self._start("--steps=20", may_change=may_change)
    self.assertEqual(changed["steps"], 20)
    with self.assertRaisesRegex(ValueError, "steps: was 10, now 20"):
      self._start("--steps=20")
    with self.assertRaisesRegex(ValueError, "batch_size: was 8, now 16"):
      self._start("--batch_size=16", may_change=may_change)
    # What was filed is untouched.
    filed = json.loads((self.workdir / "flags.json").read_text())
    self.assertEqual((filed["batch_size"], filed["steps"]), (8, 10))

  def test_compilation_cache(self):
    self._start("--compilation_cache=~/cache")
    self.config.assert_called_once_with(
      "jax_compilation_cache_dir", os.path.expanduser("~/cache")
    )

  def test_workdir_is_a_file(self):
    self.workdir.parent.mkdir()
    self.workdir.write_text("")
    with self.assertRaisesRegex(ValueError, "cannot be written to"):
      self._start()


class CheckPositiveTest(parameterized.TestCase):
  def test_named_flags(self):
    values = _flags("--steps=1", "--batch_size=0")
    runs.check_positive(values)
    runs.check_positive(values, "steps")
    for value in ("0", "-3"):
      values = _flags(f"--batch_size={value}")
      with self.assertRaisesRegex(
        ValueError, f"--batch_size must be positive, got {value}"
      ):
        runs.check_positive(values, "steps", "batch_size")


class CheckModelsTest(parameterized.TestCase):
  def test_weights_are_those_of_the_first_start(self):
    workdir = self.enter_context(tempfile.TemporaryDirectory())
    weights = {"a": np.float32([1, 2])}
    runs.check_models(workdir, {"policy": weights, "base": weights})
    runs.check_models(workdir, {"policy": weights, "base": weights})
    other = {"a": np.float32([1, 3])}
    with self.assertRaisesRegex(ValueError, "--base holds other weights than"):
      runs.check_models(workdir, {"policy": weights, "base": other})

  def test_other_things_to_start_from_are_those_of_the_first_start(self):
    workdir = self.enter_context(tempfile.TemporaryDirectory())
    weights = {"policy": {"a": np.float32([1, 2])}}
    runs.check_models(workdir, weights, {"The rows of data": "abc"})
    runs.check_models(workdir, weights, {"The rows of data": "abc"})
    with self.assertRaisesRegex(ValueError, "The rows of data are others than"):
      runs.check_models(workdir, weights, {"The rows of data": "abd"})

  def test_same_kind(self):
    policy = mock.Mock(**{"model.config": 1, "tokenizer.eos_token_id": 2})
    policy.tokenizer.get_vocab.return_value = {"a": 0}

    def other(config=1, end=2, vocabulary=("a",)):
      found = mock.Mock(
        **{"model.config": config, "tokenizer.eos_token_id": end}
      )
      found.tokenizer.get_vocab.return_value = {v: 0 for v in vocabulary}
      return found

    runs.check_same_kind("--base=x", other(), policy)
    with self.assertRaisesRegex(ValueError, "--base=x is another architecture"):
      runs.check_same_kind("--base=x", other(config=3), policy)
    for different in (other(end=3), other(vocabulary=("b",))):
      for check in (runs.check_same_kind, runs.check_same_tokens):
        with self.assertRaisesRegex(ValueError, "vocabulary or end token"):
          check("--base=x", different, policy)
    # Of a model that shares the tokens alone.
    runs.check_same_tokens("--base=x", other(config=3), policy)


class UnescapedTest(parameterized.TestCase):
  def test_line_feeds(self):
    self.assertEqual(
      runs.unescaped([r"\n\nHuman:", "###"]), ["\n\nHuman:", "###"]
    )
