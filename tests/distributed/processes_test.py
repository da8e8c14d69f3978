"""Two real processes over gloo, compared with one."""

import contextlib
import functools
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from unittest import mock

import jax
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from rljax.distributed import meshes, processes
from rljax.generation import forced, responders
from rljax.models import hf
from rljax.rlmec import pipeline, rewriters
from rljax.storage import checkpoint, stages
from rljax.tasks import arithmetic, word_lists
from tests import conftest, processes_job, scripts, tiny
from tests.experiments import grammar_test as on_grammar
from tests.experiments import meshes_test as on_meshes

ROOT = conftest.REPOSITORY
LAUNCHER = ROOT / "launch" / "local_processes.sh"
PPO = "experiments/ppo.py"
TINY_PPO = (
  *scripts.SUMS,
  "--num_prompts=256",
  "--num_eval_prompts=24",
  "--batch_size=8",
  "--steps=3",
  "--save_every=2",
  "--eval_every=2",
  "--samples_every=1",
  "--learning_rate=3e-4",
  "--epochs=1",
  "--num_page_samples=0",
  "--preflight=off",
  # As the numbers below were found.
  "--warmup=0",
  "--max_grad_norm=0",
)
WORDS = (
  "--task=word_lists",
  "--max_prompt_length=16",
  "--max_response_length=16",
)
LOGGED = (*WORDS, "--task_options=num=96", "--sample_batch_size=16")
UPDATES = (
  *LOGGED,
  "--num_dev_prompts=16",
  "--batch_size=8",
  "--steps=6",
  "--eval_every=3",
  "--save_every=3",
  "--learning_rate=1e-3",
)
SECONDS = 1500  # For what takes a few on a quiet machine.


def setUpModule():
  scripts.without_pictures()


def tearDownModule():
  scripts.remove_scratch()


def environment(**variables):
  """Of one process with one device, unless a launcher says more."""
  kept = {
    name: value
    for name, value in scripts.environment().items()
    if not name.startswith("RLJAX_")
  }
  path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
  return kept | {"PYTHONPATH": path} | variables


def start_two(*command, logs):
  """`command` in two processes, by the launcher; its output is a pipe."""
  return subprocess.Popen(
    ["bash", LAUNCHER, "2", "--", sys.executable, *map(str, command)],
    cwd=ROOT,
    env=environment(LOGS=str(logs)),
    stdin=subprocess.DEVNULL,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def run_two(script, workdir, *flags):
  """A script in two processes to its end; returns what process 1 printed."""
  logs = pathlib.Path(f"{workdir}-logs")
  process = start_two(script, *scripts.arguments(workdir, *flags), logs=logs)
  output, _ = process.communicate(timeout=SECONDS)
  log = (logs / "1.log").read_text()
  if process.returncode:
    raise AssertionError(f"{script} failed:\n{output}\nProcess 1:\n{log}")
  return log


@contextlib.contextmanager
def two_alone(*command, folder):
  """The same without a launcher: nobody ends one because the other ended."""
  with socket.create_server(("127.0.0.1", 0)) as server:
    port = server.getsockname()[1]
  started = []
  for number in range(2):
    with open(folder / f"log-{number}", "w") as log:
      started.append(
        subprocess.Popen(
          [sys.executable, *map(str, command)],
          cwd=ROOT,
          env=environment(
            RLJAX_COORDINATOR=f"127.0.0.1:{port}",
            RLJAX_NUM_PROCESSES="2",
            RLJAX_PROCESS_ID=str(number),
          ),
          stdout=log,
          stderr=subprocess.STDOUT,
        )
      )
  try:
    yield started
  finally:
    for process in started:
      process.kill()
      process.wait()


def save_model(name, tokenizer):
  """The directory of a tiny model with the words of a task."""
  folder = scripts.scratch() / name
  # The size of its vocabulary may be split over two devices.
  config = tiny.llama_config(vocab_size=len(tokenizer) + len(tokenizer) % 2)
  hf.save(folder, tiny.model(config), tiny.params(config), tokenizer)
  return folder


@functools.cache
def policy():
  return save_model("policy", arithmetic.word_tokenizer())


@functools.cache
def reference():
  return save_model("reference", word_lists.word_tokenizer())


@functools.cache
def trained(name, *more):
  """Workdir of a model that the scripts of `on_meshes` start from."""
  workdir = scripts.scratch() / f"{name}-{len(more)}"
  if name == "corrector":
    flags = [x.format(chains=trained("chains")) for x in on_meshes.CORRECTOR]
    scripts.run("experiments/rlmec_reward_model.py", workdir, *flags)
    return workdir
  scripts.run(
    *("experiments/sft.py", workdir, *on_meshes.POLICIES[name]),
    *("--num_examples=256", "--num_eval_prompts=16", "--hidden_size=32"),
    *("--num_layers=1", "--batch_size=32", "--steps=60", "--eval_every=60"),
    *("--learning_rate=5e-3", *more),
  )
  return workdir


@functools.cache
def classifier():
  """A reward model that knows nothing, but has an opinion."""
  folder = scripts.scratch() / "classifier"
  made = hf.classifier_from(hf.load(trained("sums")), seed=1)
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: x + np.float32(0.3 * rng.normal(size=x.shape)), made.params
  )
  hf.save_classifier(folder, made.model, params, made.tokenizer)
  return folder


def flags_of(name, *models):
  """Tiny flags of a script, with the models that it names."""
  folders = {model: trained(model) for model in models}
  return [flag.format(**folders) for flag in on_meshes.RUNS[name]]


def ppo_flags(*more):
  return (*TINY_PPO, f"--policy={policy()}", *more)


@functools.cache
def ppo_by_one():
  workdir = scripts.scratch() / "ppo-one"
  scripts.run(PPO, workdir, *ppo_flags())
  return workdir


class OneProcessTest(parameterized.TestCase):
  """What the functions do where there is nobody to talk to."""

  def test_the_cpu_is_divided_before_the_first_array(self):
    program = (
      "import jax; from rljax.distributed import processes as p; "
      "p.divide_cpu(0); p.divide_cpu(3); p.join(); print(jax.device_count())"
    )
    done = subprocess.run(
      [sys.executable, "-c", program],
      check=False,
      capture_output=True,
      text=True,
    )
    self.assertEqual(done.stdout, "3\n", done.stderr)
    processes.divide_cpu(jax.device_count())
    with self.assertRaisesRegex(ValueError, "=3 comes too late, for this pro"):
      processes.divide_cpu(3)

  def test_nothing_happens(self):
    processes.join()
    processes.check_joined()
    self.assertTrue(processes.is_first())
    value = {"a": (1, 2)}
    self.assertIs(processes.exchange(value)[0], value)
    self.assertIs(processes.from_first(lambda: value), value)
    self.assertEqual(processes.share(3, lambda own: own), [slice(0, 3)])
    mesh = meshes.make("data:8")
    rows = meshes.shard_batch(np.arange(16), mesh)
    gathered = processes.gather({"rows": rows})
    self.assertIsInstance(gathered["rows"], np.ndarray)
    np.testing.assert_array_equal(gathered["rows"], np.arange(16))

  def test_errors_are_the_functions_own(self):
    with self.assertRaises(ZeroDivisionError):
      processes.from_first(lambda: 1 / 0)
    with self.assertRaises(ZeroDivisionError):
      processes.share(1, lambda own: 1 / 0)


class AloneTest(parameterized.TestCase):
  """Scripts that a launcher must not start twice."""

  @parameterized.parameters(
    ("examples/ppo_pmap", "--workdir=x", "--policy=x", "--task=arithmetic"),
    ("games/expand", "--output=x"),
    ("games/draw", "--samples=x", "--output=x"),
  )
  def test_refuses_to_be_one_of_several(self, name, *flags):
    done = subprocess.run(
      [sys.executable, f"experiments/{name}.py", *flags],
      cwd=ROOT,
      env=environment(
        RLJAX_COORDINATOR="127.0.0.1:1",
        RLJAX_NUM_PROCESSES="2",
        RLJAX_PROCESS_ID="1",
      ),
      capture_output=True,
      text=True,
      timeout=120,
      check=False,
    )
    self.assertNotEqual(done.returncode, 0)
    self.assertIn("this script runs in one process", done.stderr)
    self.assertFalse((ROOT / "x").exists())


class NotFirstTest(absltest.TestCase):
  """What is left to the first process."""

  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(tempfile.mkdtemp(prefix="rljax-processes-"))
    self.addCleanup(shutil.rmtree, self.folder, ignore_errors=True)

  def test_another_process_writes_nothing(self):
    def write():
      forced.save(self.folder, np.array([-1, 0, 1], np.int32))
      pipeline.save_settings(self.folder, template="compact", locate=True)
      return sorted(path.name for path in self.folder.iterdir())

    shown = responders.Progress("samples", 1)
    with mock.patch.object(jax, "process_index", return_value=1):
      self.assertEmpty(write())
      with mock.patch("builtins.print") as said:
        shown(1, [])
    said.assert_not_called()
    self.assertEqual(write(), ["forced.json", "rewriting.json"])

  def test_a_stage_is_opened_by_one_and_known_to_all(self):
    told = [None, {"rows": 5}]
    stage = stages.Stage(self.folder, "s", {}, once=lambda _: told.pop(0))
    self.assertIsNone(stage.facts)
    stage.finish(rows=4)  # The first process said 5.
    self.assertEqual(stage.facts, {"rows": 5})
    self.assertEmpty(list(self.folder.iterdir()))
    pipeline.stage(self.folder, "s", {"seed": 1}).finish(rows=5)
    again = pipeline.stage(self.folder, "s", {"seed": 1})
    self.assertEqual(again.facts["rows"], 5)

  def test_a_teacher_is_asked_about_shares(self):
    rows = [
      {"prompt": p, "gold": "", "response": "1\n2", "is_right": p == "b"}
      for p in "abcd"
    ]
    score = lambda prompts, _: (
      None,
      [{"is_correct": p < "d"} for p in prompts],
    )
    rewrite = functools.partial(
      rewriters.by_function, rows, lambda p, _, wrong: f"{wrong}{p}", score
    )
    expected = rewrite()
    self.assertEqual([r["rewrite"] for r in expected][1:3], ["1\n2", "1\n2c"])
    parts = lambda num, ask: [ask(slice(0, 1)), ask(slice(1, num))]
    with mock.patch.object(processes, "share", parts):
      self.assertEqual(rewrite(), expected)


class TalkTest(absltest.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    folder = pathlib.Path(tempfile.mkdtemp(prefix="rljax-processes-"))
    cls.addClassCleanup(shutil.rmtree, folder, ignore_errors=True)
    cls.folder = folder
    # Saved by one process with eight devices.
    cls.state = processes_job.state_on(meshes.make("fsdp:2,tensor:4"))
    with checkpoint.Checkpoints(folder / "one") as checkpoints:
      checkpoints.save(5, cls.state, {"position": 9})
    process = start_two(
      "-m", "tests.processes_job", "talk", folder, logs=folder
    )
    output, _ = process.communicate(timeout=SECONDS)
    log = (folder / "1.log").read_text()
    assert process.returncode == 0, f"{output}\nProcess 1:\n{log}"
    cls.found = [
      json.loads((folder / f"found-{number}.json").read_text())
      for number in range(2)
    ]

  def both(self, name):
    """What both processes found, which must be the same."""
    self.assertEqual(self.found[0][name], self.found[1][name])
    return self.found[0][name]

  def test_values_reach_everybody(self):
    self.assertEqual([f["is_first"] for f in self.found], [True, False])
    texts = [said["text"] for said in self.both("exchange")]
    self.assertEqual(texts, ["é", "é" * 5001])
    scores = [said["score"] for said in self.both("exchange")]
    self.assertEqual(scores, [0.0, float(np.float32(1 / 3))])
    self.assertEqual(self.both("from_first"), [0, None])
    self.assertEqual(self.both("share"), [["a", "b"], ["c", "d", "e"]])
    self.assertEqual(self.both("share_of_one"), [["a"]])

  def test_a_failure_is_known_to_all(self):
    for name, where in (("from_first_fails", 0), ("share_fails", 1)):
      own = "ZeroDivisionError: division by zero"
      other = f"RuntimeError: process {where} failed with {own}"
      found = [f[name] for f in self.found]
      self.assertEqual(found[where], own)
      self.assertEqual(found[1 - where], other)

  def test_what_must_be_the_same_is_compared(self):
    self.assertIsNone(self.both("same"))
    self.assertIn(
      "ValueError: Flags differ: steps is 0 in process 0 and 1 in process 1",
      self.both("differ"),
    )
    self.assertIn("policy is", self.both("models"))
    self.assertIn("The models or the data", self.both("models"))

  def test_a_folder_is_seen_by_all(self):
    for number, found in enumerate(self.found):
      ours, other = found["shared"]
      self.assertIsNone(ours)
      own = self.folder / f"own-{number}"
      self.assertStartsWith(other, f"ValueError: {own} is not one folder")
      self.assertIn("not seen by 1. Give a --workdir", other)
      self.assertEqual(found["left"], [])

  def test_arrays_are_gathered(self):
    self.assertFalse(self.both("addressable"))
    gathered = self.both("gather")
    self.assertEqual(gathered["rows"], list(range(0, 16, 2)))
    self.assertEqual(gathered["here"], [0, 1])
    self.assertEqual(self.both("map_batches"), [1, 2, 3])

  def test_each_scores_its_own_responses(self):
    self.assertEqual([f["asked"] for f in self.found], [["p"], ["q", "r"]])
    thirds = np.float32([1, 2, 4]) / np.float32(3)
    self.assertEqual(self.both("scores"), ["float32", *thirds.tolist()])
    self.assertEqual(
      self.both("parts"),
      [
        {"reply": "a", "is_correct": False},
        {"reply": "bb", "is_correct": True},
        {"reply": "\nc\u2028c", "is_correct": False},
      ],
    )
    self.assertIsNone(self.both("no_scores"))

  def test_checkpoints_of_one_and_of_two(self):
    same = checkpoint.fingerprint(self.state)
    self.assertEqual(self.both("restored"), [5, same, {"position": 9}])
    self.assertEqual(self.both("steps"), [8])
    zeros = jax.tree.map(lambda x: 0 * x, self.state)
    with checkpoint.Checkpoints(self.folder / "two") as checkpoints:
      step, state, meta = checkpoints.restore_latest(zeros)
    self.assertEqual((step, meta), (8, {"position": 8}))
    self.assertEqual(checkpoint.fingerprint(state), same)

  def test_a_signal_to_one_stops_all(self):
    self.assertEqual(self.both("stopped"), [[3, 0], [3, 130]])


class EndTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(tempfile.mkdtemp(prefix="rljax-processes-"))
    self.addCleanup(shutil.rmtree, self.folder, ignore_errors=True)

  def wait(self, how, *more):
    """Lets process 1 end; returns its status, that of the other, and when."""
    command = ("-m", "tests.processes_job", how, self.folder, *more)
    with two_alone(*command, folder=self.folder) as (other, own):
      if how == "SIGSTOP":
        path = f"/proc/{own.pid}/stat"
        while pathlib.Path(path).read_text().split()[2] != "T":
          self.assertIsNone(own.poll())
          time.sleep(0.05)
      else:
        own.wait(SECONDS)
      started = time.monotonic()
      other.wait(SECONDS)
      seconds = time.monotonic() - started
      statuses = own.poll(), other.returncode
    print(f"{how}: the other process ended {seconds:.1f} s later", flush=True)
    return *statuses, seconds, (self.folder / "log-0").read_text()

  @parameterized.parameters("SIGKILL", "raise")
  def test_one_that_ends_takes_the_other_with_it(self, how):
    own, other, seconds, log = self.wait(how)
    self.assertNotEqual(own, 0)
    self.assertNotEqual(other, 0)
    self.assertLess(seconds, 60)
    # In the words of jax's own thread, if that is faster.
    self.assertRegex(
      log, "Process 0 of 2 ends, and so will the others|JAX distributed service"
    )
    if how == "raise":
      self.assertEqual(own, 1)
      log = (self.folder / "log-1").read_text()
      self.assertIn("ValueError: this process is out of luck", log)
      self.assertIn("Process 1 of 2 ends", log)

  @pytest.mark.slow
  def test_one_that_hangs_takes_the_other_with_it(self):
    _, other, seconds, log = self.wait("SIGSTOP", 10)
    self.assertNotEqual(other, 0)
    self.assertLess(seconds, 120)
    self.assertIn("heartbeat", log)


class PpoTest(parameterized.TestCase):
  def assert_same_run(self, two, one, gap=scripts.ROUNDING):
    """Two runs that differ by rounding alone."""
    for name in ("prompt", "response", "response_ids", "reward", "parts"):
      found = [
        [row[name] for row in scripts.rows(workdir, "samples.jsonl")]
        for workdir in (two, one)
      ]
      self.assertEqual(*found, name)
    rows = [scripts.steady(scripts.rows(workdir)) for workdir in (two, one)]
    for own, expected in zip(*rows, strict=True):
      self.assertEqual(own.keys(), expected.keys())
      for name, value in expected.items():
        np.testing.assert_allclose(
          own[name], value, rtol=1e-3, atol=1e-4, err_msg=name
        )
    self.assertLess(scripts.largest_gap(two, one), gap)

  def test_two_processes_are_as_one(self):
    two = scripts.scratch() / "ppo-two"
    log = run_two(PPO, two, *ppo_flags())
    self.assert_same_run(two, ppo_by_one())
    # Process 0 alone writes, and tells.
    self.assertEqual(
      sorted(path.name for path in two.iterdir()),
      sorted(path.name for path in ppo_by_one().iterdir()),
    )
    self.assertNotRegex(log, r"step \d|Preflight|Summary")
    rows = scripts.rows(two)
    self.assertEqual([row["step"] for row in rows], [0, 1, 2, 3])

  @pytest.mark.slow
  def test_one_goes_on_where_two_were_killed_and_two_where_one(self):
    """Each half of a run by another number of processes."""
    whole = scripts.scratch() / "ppo-whole"
    flags = ppo_flags("--steps=6", "--save_every=1")
    scripts.run(PPO, whole, *flags)
    for first in (1, 2):
      workdir = scripts.scratch() / f"ppo-first-{first}"
      if first == 1:
        scripts.run_until_killed(PPO, workdir, *flags, num_rows=3)
        run_two(PPO, workdir, *flags)
      else:
        logs = pathlib.Path(f"{workdir}-logs-killed")
        arguments = scripts.arguments(workdir, *flags)
        process = start_two(PPO, *arguments, logs=logs)
        scripts.wait_for_rows(process, workdir, 3)
        self.kill_process(1, workdir)
        output, _ = process.communicate(timeout=SECONDS)
        self.assertEqual(process.returncode, 128 + signal.SIGKILL, output)
        self.assertIn("Process 1 of 2 was killed by SIGKILL", output)
        self.assertIn("the same command goes on", output)
        self.assertLess(len(scripts.rows(workdir)), 7)
        scripts.run(PPO, workdir, *flags)
      self.assertEqual(
        [row["step"] for row in scripts.rows(workdir)], list(range(7))
      )
      self.assert_same_run(workdir, whole, 2 * scripts.ROUNDING)

  @pytest.mark.slow
  def test_sigterm_to_one_process_stops_both_and_they_go_on(self):
    workdir = scripts.scratch() / "ppo-stopped"
    logs = pathlib.Path(f"{workdir}-logs-stopped")
    flags = ppo_flags("--save_every=1000", "--steps=80")
    arguments = scripts.arguments(workdir, *flags)
    process = start_two(PPO, *arguments, logs=logs)
    scripts.wait_for_rows(process, workdir, 3)
    self.kill_process(1, workdir, signal.SIGTERM)
    output, _ = process.communicate(timeout=SECONDS)
    self.assertEqual(process.returncode, 0, output)
    self.assertIn("Stopped by a signal after step", output)
    last = scripts.rows(workdir)[-1]["step"]
    self.assertTrue((workdir / "checkpoints" / str(last + 1)).exists())
    self.assertFalse((workdir / "summary.json").exists())
    # The same command goes on where they were.
    run_two(PPO, workdir, *flags)
    steps = [row["step"] for row in scripts.rows(workdir)]
    self.assertEqual(steps, list(range(81)))
    self.assertTrue((workdir / "summary.json").exists())

  @pytest.mark.slow
  def test_all_that_a_run_can_do_is_the_same(self):
    """The checks, several samples and epochs, the page, the best, a KL.

    And parameters that are split over the processes.
    """
    flags = ppo_flags(
      *("--num_samples=2", "--epochs=2", "--batch_entropy_coef=0.3"),
      *("--preflight=strict", "--num_page_samples=4", "--keep_best"),
      *("--kl=initial", "--micro_batch_size=8"),
    )
    one, two = (scripts.scratch() / f"ppo-all-{n}" for n in ("one", "two"))
    scripts.run(PPO, one, *flags)
    run_two(PPO, two, *flags, "--mesh=fsdp:2")
    self.assert_same_run(two, one, 1e-4)
    for name in ("tokens.html", "best/checkpoints", "best/model/config.json"):
      self.assertTrue((two / name).exists(), name)

  def kill_process(self, number, workdir, sent=signal.SIGKILL):
    """Sends a signal to one of the processes that work in a folder."""
    for path in pathlib.Path("/proc").glob("[0-9]*/environ"):
      with contextlib.suppress(OSError):
        command = path.with_name("cmdline").read_bytes().split(b"\0")
        is_ours = f"--workdir={workdir}".encode() in command
        variables = path.read_bytes().split(b"\0")
        if is_ours and f"RLJAX_PROCESS_ID={number}".encode() in variables:
          os.kill(int(path.parent.name), sent)
          return
    self.fail(f"process {number} was not found")


@pytest.mark.slow
class ScriptsTest(parameterized.TestCase):
  """Other scripts, each by one process and by two."""

  def compare(self, script, name, *flags, gap=scripts.ROUNDING):
    one, two = (scripts.scratch() / f"{name}-{n}" for n in ("one", "two"))
    scripts.run(script, one, *flags)
    log = run_two(script, two, *flags)
    # Process 0 alone tells how far they are.
    self.assertNotRegex(log, r"step \d|of \d+ prompts|Summary")
    for own, expected in zip(
      *(scripts.steady(scripts.rows(workdir)) for workdir in (two, one)),
      strict=True,
    ):
      self.assertEqual(own.keys(), expected.keys())
      for key, value in expected.items():
        np.testing.assert_allclose(
          own[key], value, rtol=1e-3, atol=1e-4, err_msg=key
        )
    if (one / "checkpoints").exists():
      self.assertLess(scripts.largest_gap(two, one), gap)
    self.assertEqual(
      sorted(path.name for path in two.iterdir()),
      sorted(path.name for path in one.iterdir()),
    )
    return one, two

  def assert_same_rows(self, two, one, *names):
    """Files of rows that differ by rounding alone, in numbers."""
    for name in names:
      rows = [scripts.rows(workdir, name) for workdir in (two, one)]
      self.assertNotEmpty(rows[1], name)
      self.assert_same_values(*rows, name)

  def assert_same_values(self, own, expected, path):
    if isinstance(expected, dict):
      self.assertEqual(own.keys(), expected.keys(), path)
      for name, value in expected.items():
        self.assert_same_values(own[name], value, f"{path}/{name}")
    elif isinstance(expected, list):
      self.assertEqual(len(own), len(expected), path)
      for i, value in enumerate(expected):
        self.assert_same_values(own[i], value, f"{path}/{i}")
    elif isinstance(expected, float):
      np.testing.assert_allclose(own, expected, 1e-3, 1e-4, err_msg=path)
    else:
      self.assertEqual(own, expected, path)

  def assert_same_evaluation(self, two, one):
    self.assert_same_rows(two, one, "samples.jsonl")
    for name in ("summary.json", "metrics.json", "differences.json"):
      if (one / name).exists():
        found = [json.loads((x / name).read_text()) for x in (two, one)]
        self.assert_same_values(*found, name)

  def test_ppo_with_a_reward_model(self):
    self.compare(
      *(PPO, "judged", *ppo_flags()),
      *(f"--reward_model={classifier()}", "--reward_length=32"),
      "--reward_terms=reward_model",
    )

  @on_grammar.pytestmark
  def test_ppo_within_a_grammar(self):
    one, two = self.compare(
      *(PPO, "grammar", *on_grammar.PPO_FLAGS),
      f"--policy={on_grammar.policy()}",
      # The bias of keys has a gradient of 0, and Adam would enlarge its noise.
      "--adam_epsilon=1e-4",
    )
    self.assert_same_rows(two, one, "samples.jsonl")

  def test_grpo(self):
    one, two = self.compare(
      "experiments/grpo.py",
      "grpo",
      "--algorithm=grpo",
      *scripts.SUMS,
      *("--num_prompts=256", "--num_eval_prompts=24", "--batch_size=8"),
      *("--num_samples=4", "--steps=3", "--eval_every=2", "--samples_every=1"),
      *("--save_every=2", "--learning_rate=3e-4", f"--policy={policy()}"),
      gap=1e-4,
    )
    for name in ("response_ids", "reward"):
      found = [
        [row[name] for row in scripts.rows(workdir, "samples.jsonl")]
        for workdir in (two, one)
      ]
      self.assertEqual(*found)

  def test_offline(self):
    """The values that the reference gives, and A-LoL with them."""
    values = self.compare(
      *("experiments/offline_value.py", "values", *LOGGED),
      *("--num_value_prompts=64", "--num_heads=4", "--epochs=2"),
      *("--learning_rate=1e-3", f"--policy={reference()}"),
    )
    one, two = (np.load(workdir / "reference.npz") for workdir in values)
    self.assertEqual(one.files, two.files)
    for name in one.files:
      np.testing.assert_allclose(two[name], one[name], rtol=1e-3, atol=1e-4)
    self.compare(
      *("experiments/offline.py", "a_lol", *UPDATES),
      *("--algorithm=a_lol", f"--cache={values[1]}", "--noscale_steps"),
      f"--policy={reference()}",
      gap=1e-4,
    )

  def test_preference(self):
    self.compare(
      *("experiments/preference.py", "dpo", *UPDATES, "--algorithm=dpo"),
      f"--policy={reference()}",
      gap=1e-4,
    )

  def test_supervised_and_reward_model(self):
    start, _ = self.compare(
      *("experiments/sft.py", "sft", *WORDS),
      *("--num_examples=200", "--num_eval_prompts=16", "--batch_size=8"),
      *("--hidden_size=32", "--max_positions=32", "--steps=4"),
      *("--eval_every=2", "--learning_rate=5e-3"),
    )
    self.compare(
      *("experiments/outcome_reward_model.py", "reward", *WORDS),
      "--task_options=num=96",
      *("--num_eval_rows=40", "--batch_size=8", "--steps=4"),
      *("--eval_every=2", "--save_every=2", f"--policy={start}"),
      gap=1e-4,
    )

  def test_expert_iteration(self):
    """Rounds until there is no new best, and what the best one writes."""
    flags = flags_of("expert_iteration", "sums")
    one, two = self.compare(
      *("experiments/expert_iteration.py", "ei", *flags),
      *("--rounds=4", "--patience=2", "--save_every=1"),
    )
    rounds = sorted(path.name for path in (one / "rounds").iterdir())
    self.assertEqual(
      sorted(path.name for path in (two / "rounds").iterdir()), rounds
    )
    self.assertContainsSubset(["1", "2"], rounds)
    for number in rounds[1:]:
      names = [f"rounds/{number}/{x}.jsonl" for x in ("samples", "data")]
      self.assert_same_rows(two, one, *names)
      found = [
        json.loads((workdir / f"rounds/{number}/round.json").read_text())
        for workdir in (two, one)
      ]
      self.assertEqual(*(row["fit/start"] for row in found))
    for folder in ("best", "rounds/1", "rounds/2"):
      gap = scripts.largest_gap(two / folder, one / folder)
      self.assertLess(gap, 1e-4, folder)
    flags = (
      *flags_of("evaluate", "sums"),
      f"--policies=sft={trained('sums')},ei={one / 'rounds/2'}",
      *("--new_vs=sft", f"--reference={trained('sums')}"),
      *(f"--rerank_model={classifier()}", "--reward_length=32"),
    )
    one, two = self.compare("experiments/evaluate.py", "reasoning", *flags)
    self.assert_same_evaluation(two, one)
    self.assert_same_rows(two, one, "questions.jsonl")
    # Again: samples that are there are not drawn, but those of one policy.
    kept = {path: path.read_text() for path in two.glob("samples/*")}
    (gone,) = two.glob("samples/ei-0-sampled.jsonl")
    gone.unlink()
    run_two("experiments/evaluate.py", two, *flags)
    self.assertEqual({path: path.read_text() for path in kept}, kept)
    self.assert_same_evaluation(two, one)

  def test_return_conditioned(self):
    steps = "num_terms=3,max_term=5"  # The first of two steps is completed.
    start = trained(
      *("sums", "--num_examples=2000", "--batch_size=64", "--steps=150"),
      f"--task_options={steps},corpus=pretraining,slot=true,corruption=0.3",
      *("--learning_rate=1e-2", "--weight_decay=0", "--eval_every=150"),
    )
    one, two = self.compare(
      *("experiments/return_conditioned.py", "rcrl"),
      *flags_of("return_conditioned", "sums"),
      *(f"--task_options={steps}", f"--policy={start}", f"--base={start}"),
      gap=1e-4,
    )
    completions = sorted(path.name for path in (one / "completions").iterdir())
    self.assertNotEmpty(completions)
    self.assertEqual(
      sorted(path.name for path in (two / "completions").iterdir()), completions
    )
    names = [f"completions/{name}" for name in completions]
    self.assert_same_rows(
      *(two, one, "solutions.jsonl", "labels.jsonl", "data.jsonl"),
      *("forced.json", *names),
    )

  def test_generative_reward_model(self):
    one, two = self.compare(
      *("experiments/rlmec_reward_model.py", "grm"),
      *flags_of("rlmec_reward_model", "chains"),
      gap=1e-4,
    )
    self.assert_same_rows(
      *(two, one, "samples/samples.jsonl", "teacher/rewrites.jsonl"),
      *("records/records.jsonl", "records/held_out.jsonl"),
      *("test/rewrites.jsonl", "rewriting.json"),
    )

  def test_a_model_as_teacher(self):
    """One that knows nothing: what it writes is kept, and a run ends early."""
    flags = (
      *flags_of("rlmec_reward_model", "chains"),
      *("--teacher=model", "--teacher_format=plain", "--teacher_length=8"),
      # It tells stories: nothing of it is verified.
      f"--teacher_model={conftest.shared('data/models/stories260k')}",
    )
    one, two = (scripts.scratch() / f"teacher-{n}" for n in ("one", "two"))
    script = "experiments/rlmec_reward_model.py"
    done = scripts.run(script, one, *flags, ok=False)
    self.assertIn("There are 0 records to learn from", done.stderr)
    with self.assertRaisesRegex(AssertionError, "are 0 records to learn from"):
      run_two(script, two, *flags)
    self.assert_same_rows(
      *(two, one, "samples/samples.jsonl", "teacher/rewrites.jsonl"),
      "teacher/locations.jsonl",
    )

  def test_rlmec(self):
    flags = flags_of("rlmec", "chains", "corrector")
    one, two = self.compare("experiments/rlmec.py", "rlmec", *flags, gap=1e-4)
    self.assert_same_rows(
      *(two, one, "samples/samples.jsonl", "rewrites/rewrites.jsonl"),
      *("supervision/supervision.jsonl", "supervision/right.jsonl"),
      *("supervision/gold.jsonl", "supervision/pairs.jsonl", "samples.jsonl"),
    )
    self.assertTrue((two / "tokens.html").exists())

  def test_evaluate(self):
    """Texts, logged replies and perplexity."""
    one, two = self.compare(
      *("experiments/evaluate.py", "texts", "--task=word_lists"),
      *("--num_prompts=21", "--batch_size=8", "--max_length=8"),
      *("--max_prompt_length=16", "--max_response_length=16", "--nogreedy"),
      *("--metrics=text,log,perplexity", f"--reference={reference()}"),
      f"--policies=words={trained('words')},start={reference()}",
    )
    self.assert_same_evaluation(two, one)


if __name__ == "__main__":
  absltest.main()
