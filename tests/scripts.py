"""Runs experiment scripts as a user does, for tests."""

import contextlib
import functools
import json
import os
import pathlib
import runpy
import shutil
import subprocess
import tempfile
import time
import unittest
from unittest import mock

import jax
import numpy as np
from absl import flags

from rljax.storage import checkpoint
from tests import conftest, warm

# Two orders of summation differ by this much in float32, after Adam has
# magnified it: a step of the learning rate at most where a gradient is noise.
ROUNDING = 2e-5
# Sums whose answer is one token, as PPO, GRPO and evaluations ask them.
SUMS = (
  "--task=arithmetic",
  "--task_options=style=last",
  "--max_length=1",
  "--stop_at_eos=false",
)
# Supervised examples of them, and a rate for random weights.
LEARN_SUMS = (
  "--task=arithmetic",
  "--task_options=style=last,whole=true",
  "--learning_rate=1e-3",
  "--warmup=0",
  "--weight_decay=0.1",
)


@functools.cache
def scratch():
  """A folder for this process's runs."""
  return pathlib.Path(tempfile.mkdtemp(prefix="rljax-experiments-"))


def remove_scratch():
  """For a module's `tearDownModule`; the next module gets a new folder."""
  shutil.rmtree(scratch(), ignore_errors=True)
  scratch.cache_clear()


def without_pictures():
  """For a module's `setUpModule`: its runs draw no curves.

  Half of the time of a tiny run goes to drawing, which it does without.
  """
  folder = scratch() / "no_pictures"
  folder.mkdir()
  (folder / "matplotlib.py").write_text("raise ImportError('not in this test')")
  kept = os.environ.get("PYTHONPATH", "")
  found = os.pathsep.join(filter(None, [str(folder), kept]))
  no_pictures = mock.patch.dict(os.environ, PYTHONPATH=found)
  no_pictures.start()
  unittest.addModuleCleanup(no_pictures.stop)


def environment(devices=1, optimize=False):
  variables = dict(os.environ)
  xla_flags = f"--xla_force_host_platform_device_count={devices}"
  if not optimize:
    xla_flags += f" {conftest.COMPILE_FAST}"
  variables["XLA_FLAGS"] = xla_flags
  variables["JAX_PLATFORMS"] = "cpu"
  return variables


# Their checks take as long as a tiny run: planted_faults_test.py has them.
UNCHECKED = (
  *("sft", "offline", "offline_value", "preference", "expert_iteration"),
  *("return_conditioned", "outcome_reward_model"),
  *("rlmec", "rlmec_reward_model"),
)


# Tiny models from random weights; the defaults are for pretrained ones.
RATES = {
  "sft": ("--learning_rate=1e-3", "--warmup=0", "--weight_decay=0.1"),
  "outcome_reward_model": ("--learning_rate=1e-4", "--warmup=0"),
}


def _as_needed(script, flags):
  """The flags, without the checks of a script that are tested elsewhere."""
  name = pathlib.Path(script).stem
  if name not in UNCHECKED:
    return flags
  return ["--preflight=off", *RATES.get(name, ()), *flags]


def arguments(workdir, *flags):
  return [
    f"--workdir={workdir}",
    f"--compilation_cache={os.environ['RLJAX_TEST_CACHE']}",
    *map(str, flags),
  ]


def run(script, workdir, *flags, devices=1, ok=True, optimize=False):
  """A finished process; one that failed is an error unless `ok` is False."""
  command = [script, *arguments(workdir, *_as_needed(script, flags))]
  if script.endswith("ppo_pmap.py"):  # It has the fewest flags of all.
    command = [part for part in command if "compilation_cache" not in part]
  done = _finish(command, environment(devices, optimize), 1800)
  if ok and done.returncode:
    raise AssertionError(f"{command} failed:\n{done.stdout}\n{done.stderr}")
  return done


def _finish(command, env, timeout, stdin=""):
  """Runs a script to its end, as `subprocess.run` does."""
  with tempfile.TemporaryDirectory() as folder:
    files = [pathlib.Path(folder, name) for name in ("in", "out", "err")]
    files[0].write_text(stdin)
    process = warm.start(
      command,
      cwd=conftest.REPOSITORY,
      env=env,
      **dict(zip(("stdin", "stdout", "stderr"), files, strict=True)),
    )
    try:
      process.wait(timeout)
    finally:
      process.kill()
    texts = [path.read_text(errors="replace") for path in files[1:]]
  return subprocess.CompletedProcess(command, process.returncode, *texts)


def drive(script, runs, devices=1):
  """The errors of runs in one process, None where there was none.

  Args:
    script: path from the repository; "-" if each run is of its own.
    runs: lists of flags, of which the first is the workdir; or the dicts of
      tests/drive.py, with such lists.
    devices: simulated ones.
  """
  runs = [
    run | {"flags": arguments(*run["flags"])}
    if script == "-"
    else arguments(run[0], *_as_needed(script, run[1:]))
    for run in runs
  ]
  done = _finish(
    ["tests/drive.py", script],
    environment(devices),
    900,
    json.dumps(runs, default=str),
  )
  for line in done.stdout.splitlines():
    if line.startswith("RESULTS "):
      return [r["error"] for r in json.loads(line.removeprefix("RESULTS "))]
  raise AssertionError(f"{script} died:\n{done.stdout}\n{done.stderr}")


def run_until_killed(script, workdir, *flags, num_rows, name="metrics.jsonl"):
  """Starts a script and ends it with -9 once a file has so many rows."""
  process = warm.start(
    [script, *arguments(workdir, *_as_needed(script, flags))],
    cwd=conftest.REPOSITORY,
    env=environment(),
  )
  try:
    wait_for_rows(process, workdir, num_rows, name)
  finally:
    process.kill()
    process.wait()


def wait_for_rows(process, workdir, count, name="metrics.jsonl"):
  path = pathlib.Path(workdir) / name
  deadline = time.monotonic() + 300
  while time.monotonic() < deadline:
    if path.exists() and path.read_text().count("\n") >= count:
      return
    if process.poll() is not None:
      raise AssertionError("the run ended before it could be stopped")
    time.sleep(0.01)
  raise AssertionError(f"the run did not write {count} rows of {name}")


def rows(workdir, name="metrics.jsonl"):
  lines = (pathlib.Path(workdir) / name).read_text().splitlines()
  return [json.loads(line) for line in lines]


def steady(rows):
  """Metrics without what a clock measured."""
  clocks = ("_per_second", "_seconds")
  return [
    {name: x for name, x in row.items() if not name.endswith(clocks)}
    for row in rows
  ]


def fingerprint(workdir):
  """A name for the bits of the parameters that a run ended with."""
  return checkpoint.fingerprint(checkpoint.restore_params(workdir))


def largest_gap(workdir, other):
  """Between the parameters that two runs ended with."""
  gaps = jax.tree.map(
    lambda a, b: float(np.max(np.abs(a - b))),
    checkpoint.restore_params(workdir),
    checkpoint.restore_params(other),
  )
  return max(jax.tree.leaves(gaps))


@functools.cache
def flags_of(script):
  """The flags that a script defines, by itself or by groups of rljax.cli."""
  before = set(flags.FLAGS)
  runpy.run_path(
    str(conftest.REPOSITORY / script), run_name="script"
  )  # No further than them.
  own = {name: flags.FLAGS[name] for name in set(flags.FLAGS) - before}
  for name in own:
    delattr(flags.FLAGS, name)
  return own


def parse_flags(script, words):
  """Parses a command as the script does, by the flags that it defines."""
  own = flags_of(script)
  for name, flag in own.items():
    flag.unparse()
    flags.FLAGS[name] = flag  # Where conditions over several look for them.
  try:
    with contextlib.chdir(conftest.REPOSITORY):
      return flags.FLAGS([script, *words])
  finally:
    for name in own:
      delattr(flags.FLAGS, name)
