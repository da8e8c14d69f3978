"""The scripts, run as a user runs them, on CPU with tiny flags."""

import functools
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from rljax import checkpoint
from tests import conftest

ROOT = conftest.REPOSITORY
SFT = "experiments/sft.py"
PPO = "experiments/ppo.py"
TASK = ("--task_options=style=last",)
TINY_PPO = (
  *TASK,
  "--num_prompts=512",
  "--num_eval_prompts=40",
  "--batch_size=16",
  "--steps=6",
  "--save_every=2",
  "--eval_every=4",
  "--samples_every=3",
  "--learning_rate=3e-4",
  "--preflight=off",
  "--batch_entropy_coef=0.3",
)
TINY_SFT = (
  "--task_options=style=last,whole=true",
  "--num_eval_prompts=64",
  "--hidden_size=32",
  "--vocab_size=109",
)
# Two orders of summation differ by this much in float32, after Adam has
# magnified it: a step of the learning rate at most where a gradient is noise.
ROUNDING = 2e-5


@functools.cache
def _scratch():
  """A folder for this process's runs, with the compilation cache in it."""
  return pathlib.Path(tempfile.mkdtemp(prefix="rljax-experiments-"))


def tearDownModule():
  shutil.rmtree(_scratch(), ignore_errors=True)


def _environment(devices=1):
  environment = dict(os.environ)
  environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
  environment["JAX_PLATFORMS"] = "cpu"
  return environment


def _command(script, workdir, *flags):
  return [
    sys.executable,
    script,
    f"--workdir={workdir}",
    f"--compilation_cache={_scratch() / 'cache'}",
    *map(str, flags),
  ]


def _run(script, workdir, *flags, devices=1, ok=True):
  command = _command(script, workdir, *flags)
  if script.endswith("ppo_pmap.py"):
    command = [part for part in command if "compilation_cache" not in part]
  done = subprocess.run(
    command,
    cwd=ROOT,
    env=_environment(devices),
    capture_output=True,
    text=True,
    timeout=600,
    check=False,
  )
  if ok and done.returncode:
    raise AssertionError(f"{command} failed:\n{done.stdout}\n{done.stderr}")
  return done


def _drive(script, runs, devices=1):
  """The errors of several runs in one process, None where there was none."""
  done = subprocess.run(
    [sys.executable, "tests/drive.py", script],
    cwd=ROOT,
    env=_environment(devices),
    input=json.dumps([list(map(str, flags)) for flags in runs]),
    capture_output=True,
    text=True,
    timeout=900,
    check=False,
  )
  for line in done.stdout.splitlines():
    if line.startswith("RESULTS "):
      return [r["error"] for r in json.loads(line.removeprefix("RESULTS "))]
  raise AssertionError(f"{script} died:\n{done.stdout}\n{done.stderr}")


@functools.cache
def _policy():
  workdir = _scratch() / "policy"
  _run(SFT, workdir, *TINY_SFT)
  return workdir


@functools.cache
def _finished():
  """A PPO run that nothing interrupted."""
  workdir = _scratch() / "finished"
  _run(PPO, workdir, *TINY_PPO, f"--policy={_policy()}")
  return workdir


def _rows(workdir, name="metrics.jsonl"):
  lines = (pathlib.Path(workdir) / name).read_text().splitlines()
  return [json.loads(line) for line in lines]


def _largest_gap(workdir, other):
  gaps = jax.tree.map(
    lambda a, b: float(np.abs(a - b).max()),
    checkpoint.restore_params(workdir),
    checkpoint.restore_params(other),
  )
  return max(jax.tree.leaves(gaps))


def _steady(rows):
  """Metrics without what a clock measured."""
  clocks = ("tokens_per_second", "step_seconds")
  return [{k: v for k, v in row.items() if k not in clocks} for row in rows]


def _wait_for_rows(process, workdir, count):
  path = pathlib.Path(workdir) / "metrics.jsonl"
  deadline = time.monotonic() + 300
  while time.monotonic() < deadline:
    if path.exists() and path.read_text().count("\n") >= count:
      return
    if process.poll() is not None:
      raise AssertionError("the run ended before it could be stopped")
    time.sleep(0.01)
  raise AssertionError("the run wrote no metrics")


def _run_until_killed(workdir, flags, num_rows):
  """Starts PPO and ends it with -9 once it has written so many rows."""
  process = subprocess.Popen(
    _command(PPO, workdir, *flags),
    cwd=ROOT,
    env=_environment(),
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
  )
  try:
    _wait_for_rows(process, workdir, num_rows)
  finally:
    process.kill()
    process.wait()


class RunTest(absltest.TestCase):
  def test_run_leaves_what_the_readme_says(self):
    workdir = _finished()
    for name in (
      "flags.json",
      "metrics.jsonl",
      "metrics.csv",
      "samples.jsonl",
      "curves.png",
      "summary.json",
      "model/config.json",
      "model/tokenizer.json",
      "checkpoints/6",
    ):
      self.assertTrue((workdir / name).exists(), name)
    self.assertNotEmpty(list((workdir / "tensorboard").iterdir()))
    rows = _rows(workdir)
    self.assertEqual([row["step"] for row in rows], list(range(7)))
    self.assertIn("eval/is_correct", rows[0])
    self.assertIn("eval/is_correct", rows[4])
    self.assertNotIn("eval/is_correct", rows[3])
    for name in (
      "reward/mean",
      "task/is_correct",
      "entropy/token",
      "entropy/batch",
      "entropy/batch_max_prob",
      "answers/distinct",
      "ppo/clip_fraction",
      "value/explained_variance",
    ):
      self.assertIn(name, rows[5])
    self.assertLess(rows[0]["sampler/log_prob_gap"], 1e-5)
    samples = _rows(workdir, "samples.jsonl")
    self.assertEqual({row["step"] for row in samples}, {0, 3})
    histograms = _rows(workdir, "histograms.jsonl")
    self.assertEqual([row["step"] for row in histograms], [0, 3])
    self.assertEqual(sum(histograms[0]["truth"].values()), 16)
    self.assertTrue(samples[0]["prompt"].endswith("="))

  def test_evaluate_compares_arms(self):
    workdir = _scratch() / "evaluation"
    arms = f"start={_policy()},ppo={_finished()},ppo={_finished()}"
    done = _run(
      "experiments/evaluate.py",
      workdir,
      *TASK,
      f"--policies={arms}",
      "--num_prompts=50",
      "--batch_size=32",
    )
    self.assertIn("reward - start", done.stdout)
    summary = json.loads((workdir / "summary.json").read_text())
    self.assertEqual(list(summary), ["start", "ppo"])
    self.assertEqual(summary["ppo"]["seeds"], 2)
    self.assertLen(_rows(workdir, "samples.jsonl"), 150)
    self.assertTrue((workdir / "arms.png").exists())

  def test_character_level_answers_take_several_tokens(self):
    policy, workdir = _scratch() / "characters", _scratch() / "multi"
    _run(
      SFT,
      policy,
      *TINY_SFT,
      "--vocab_size=0",
      "--tokenizer=character",
      "--steps=60",
    )
    _run(
      PPO,
      workdir,
      *TINY_PPO,
      f"--policy={policy}",
      "--max_length=3",
      "--stop_at_eos",
      "--num_samples=2",
      "--minibatch_size=16",
      "--micro_batch_size=8",
      "--entropy_coef=0.01",
      "--batch_entropy_coef=0",
      "--chunk_size=2",
      "--critic=separate",
      "--kl=initial",
      "--kl_coef=0.1",
      "--kl_target=0.5",
      "--preflight=strict",
      "--steps=3",
    )
    rows = _rows(workdir)
    self.assertGreater(rows[0]["response/length"], 1.0)
    self.assertGreater(rows[0]["response/finished"], 0.0)
    # Nothing has moved yet: the policy is the reference.
    self.assertEqual(rows[0]["kl/sequence_k1"], 0.0)
    self.assertNotEqual(rows[2]["kl/sequence_k1"], 0.0)
    np.testing.assert_allclose(rows[0]["kl/coef"], 0.1, rtol=1e-6)
    # KL is below its target, so the coefficient falls by 0.2 * 32 / 10000.
    np.testing.assert_allclose(
      rows[1]["kl/coef"], 0.1 * (1 - 0.2 * 32 / 10_000), rtol=1e-6
    )

  def test_pretrained_model_learns_the_same_task_as_text(self):
    model = conftest.shared("data/models/stories260k")
    workdir = _scratch() / "stories"
    _run(
      PPO,
      workdir,
      *TINY_PPO,
      f"--policy={model}",
      "--max_length=4",
      "--stop_at_eos",
      "--stop_strings=.",
      "--score_options=parse=leading_integer",
      "--kl=old",
      "--steps=2",
      "--preflight=strict",
    )
    self.assertLess(_rows(workdir)[0]["sampler/log_prob_gap"], 1e-4)


class ResumeTest(parameterized.TestCase):
  @parameterized.parameters(1, 3, 5)
  def test_killed_run_ends_with_the_same_bits(self, rows_before_kill):
    workdir = _scratch() / f"killed-{rows_before_kill}"
    flags = (*TINY_PPO, f"--policy={_policy()}")
    reference = _finished()
    _run_until_killed(workdir, flags, rows_before_kill)
    _run(PPO, workdir, *flags)
    self.assertEqual(
      checkpoint.fingerprint(checkpoint.restore_params(workdir)),
      checkpoint.fingerprint(checkpoint.restore_params(reference)),
    )
    self.assertEqual(_steady(_rows(workdir)), _steady(_rows(reference)))
    self.assertEqual(
      _rows(workdir, "samples.jsonl"), _rows(reference, "samples.jsonl")
    )

  def test_killed_run_with_everything_on(self):
    flags = (
      *TINY_PPO,
      f"--policy={_policy()}",
      "--preflight=strict",
      "--num_samples=3",
      "--minibatch_size=12",
      "--micro_batch_size=3",
      "--critic=separate",
      "--kl=initial",
      "--kl_target=0.1",
      "--schedule=linear",
      "--warmup_steps=3",
      "--max_grad_norm=1",
      "--top_p=0.9",
      "--steps=4",
    )
    whole, killed = _scratch() / "all-whole", _scratch() / "all-killed"
    _run(PPO, whole, *flags)
    _run_until_killed(killed, flags, 3)
    _run(PPO, killed, *flags)
    self.assertEqual(
      checkpoint.fingerprint(checkpoint.restore_params(whole)),
      checkpoint.fingerprint(checkpoint.restore_params(killed)),
    )
    self.assertEqual(_steady(_rows(whole)), _steady(_rows(killed)))
    row = _rows(whole, "samples.jsonl")[0]
    self.assertGreater(row["truncated_log_probs"][0], row["log_probs"][0])

  def test_sigterm_saves_and_exits(self):
    workdir = _scratch() / "terminated"
    flags = (*TINY_PPO, f"--policy={_policy()}", "--save_every=100")
    process = subprocess.Popen(
      _command(PPO, workdir, *flags, "--steps=100000"),
      cwd=ROOT,
      env=_environment(),
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL,
      text=True,
    )
    try:
      _wait_for_rows(process, workdir, 3)
      process.send_signal(signal.SIGTERM)
      out, _ = process.communicate(timeout=60)
    finally:
      process.kill()
    self.assertEqual(process.returncode, 0)
    self.assertIn("Stopped by a signal", out)
    last = _rows(workdir)[-1]["step"]
    self.assertTrue((workdir / "checkpoints" / str(last + 1)).exists())

  def test_other_flags_are_refused_with_the_difference(self):
    done = _run(
      PPO,
      _finished(),
      *TINY_PPO,
      f"--policy={_policy()}",
      "--learning_rate=0.5",
      ok=False,
    )
    self.assertNotEqual(done.returncode, 0)
    self.assertRegex(done.stderr, "learning_rate: was 0.0003, now 0.5")

  def test_finished_run_stays_as_it_is(self):
    before = _rows(_finished())
    _run(PPO, _finished(), *TINY_PPO, f"--policy={_policy()}")
    self.assertEqual(_steady(_rows(_finished())), _steady(before))


class DevicesTest(parameterized.TestCase):
  @parameterized.parameters("data:8", "data:2,fsdp:2,tensor:2")
  def test_mesh_does_not_change_the_run(self, mesh):
    # 112 rows of vocabulary and widths that the axes divide.
    policy = _scratch() / "even-policy"
    if not policy.exists():
      _run(SFT, policy, *TINY_SFT, "--vocab_size=112")
    single = _scratch() / "even-single"
    flags = (*TINY_PPO, f"--policy={policy}", "--steps=3")
    if not single.exists():
      _run(PPO, single, *flags)
    spread = _scratch() / f"even-{mesh.replace(':', '').replace(',', '')}"
    _run(PPO, spread, *flags, f"--mesh={mesh}", "--preflight=strict", devices=8)
    samples = lambda w: [r["response_ids"] for r in _rows(w, "samples.jsonl")]
    self.assertEqual(samples(single), samples(spread))
    self.assertLess(_largest_gap(single, spread), ROUNDING)
    # And the parameters have moved much further than that.
    start = {"policy": checkpoint.restore_params(policy)["policy"]}
    moved = jax.tree.map(
      lambda a, b: float(np.abs(a - b).max()),
      start,
      {"policy": checkpoint.restore_params(single)["policy"]},
    )
    self.assertGreater(max(jax.tree.leaves(moved)), 50 * ROUNDING)

  def test_devices_share_the_work(self):
    # Rows that a random gather spreads over all devices must be split again:
    # then the update's scratch memory falls.
    policy = _scratch() / "even-policy"
    if not policy.exists():
      _run(SFT, policy, *TINY_SFT, "--vocab_size=112")
    flags = (
      *TINY_PPO,
      f"--policy={policy}",
      "--batch_size=512",
      "--steps=1",
      "--eval_every=9",
      "--preflight=warn",
    )
    temporary = {}
    for devices in (1, 8):
      done = _run(PPO, _scratch() / f"work-{devices}", *flags, devices=devices)
      (line,) = re.findall(r"learn .*", done.stdout)
      temporary[devices] = float(re.findall(r"([\d.,]+) MB", line)[-1])
    self.assertLess(temporary[8], temporary[1] / 3)

  def test_pmap_matches_jit(self):
    mapped = _scratch() / "pmap"
    _run(
      "experiments/ppo_pmap.py",
      mapped,
      *TASK,
      f"--policy={_policy()}",
      "--num_prompts=512",
      "--batch_size=16",
      "--steps=6",
      devices=8,
    )
    self.assertLess(_largest_gap(mapped, _finished()), ROUNDING)


class BadInputTest(absltest.TestCase):
  """Each gets one line that says what is wrong, before anything compiles."""

  def test_ppo(self):
    policy = f"--policy={_policy()}"
    empty = _scratch() / "empty"
    empty.mkdir(exist_ok=True)
    in_the_way = _scratch() / "file"
    in_the_way.write_text("")
    nan_task = _scratch() / "nan"
    cases = [
      (["--task=chess", policy], "Unknown task 'chess'.*arithmetic"),
      (["--policy=/no/such/model"], "no/such/model"),
      ([f"--policy={empty}"], "config.json"),
      ([policy, "--max_prompt_length=2"], "tokens, the limit is 2"),
      ([policy, "--minibatch_size=7"], "minibatch_size=7 does not divide.* 16"),
      ([policy, "--micro_batch_size=5"], "micro_batch_size=5 does not divide"),
      ([policy, "--num_prompts=0"], "num_prompts"),
      ([policy, "--num_prompts=9"], "batch_size must lie between 1 and the 9"),
      ([policy, "--num_eval_prompts=0"], "num_eval_prompts"),
      ([policy, "--mesh=data:16"], "asks for 16 devices, but 1 "),
      ([policy, "--mesh=rows:1"], "rows"),
      ([policy, "--max_length=90"], "64 positions"),
      ([policy, "--kl_target=1"], "kl_target"),
      ([policy, "--temperature=0"], "temperature"),
      ([policy, "--reference=x"], "reference has a meaning for --kl=initial"),
      ([policy, "--task_options=style"], "Expected name=value"),
      ([policy, "--task_options=stlye=last"], "no option 'stlye'"),
      ([policy, "--score_options=parsing=no"], "no option 'parsing'"),
      ([policy, "--task_options=style=sideways"], "sideways"),
      ([policy, "--score_options=parse=maybe"], "parse must be"),
      ([policy, f"--workdir={in_the_way}/run"], "cannot be written to"),
    ]
    runs = [
      [
        *TINY_PPO,
        f"--workdir={nan_task}",
        f"--compilation_cache={_scratch() / 'cache'}",
        *flags,
      ]
      for flags, _ in cases
    ]
    errors = _drive(PPO, runs)
    for (flags, message), error in zip(cases, errors, strict=True):
      with self.subTest(flags[-1]):
        self.assertIsNotNone(error, flags)
        self.assertRegex(error, f"^ValueError: .*{message}")

  def test_evaluation_does_not_write_over_a_run(self):
    before = (_finished() / "metrics.jsonl").read_text()
    (error,) = _drive(
      "experiments/evaluate.py",
      [[f"--workdir={_finished()}", f"--policies=a={_finished()}", *TASK]],
    )
    self.assertRegex(error, "ValueError: .* holds a training run")
    self.assertEqual((_finished() / "metrics.jsonl").read_text(), before)

  def test_batch_must_fit_the_devices(self):
    (error,) = _drive(
      PPO,
      [
        [
          *TINY_PPO,
          f"--workdir={_scratch() / 'uneven'}",
          f"--policy={_policy()}",
          "--batch_size=12",
        ]
      ],
      devices=8,
    )
    self.assertRegex(
      error, "ValueError: --batch_size must be divisible by the 8 devices"
    )

  def test_sft(self):
    rows = _scratch() / "rows.jsonl"
    rows.write_text('{"prompt": "1+1=", "response": ""}\n{"prompt": "1+1="}\n')
    workdir = f"--workdir={_scratch() / 'bad-sft'}"
    cases = [
      ([f"--data={rows}"], r"No row is left: 2 of 2 .*rows.jsonl:1: .*empty"),
      (["--data=/no/such.jsonl"], "no/such.jsonl"),
      (["--num_examples=10"], "batch_size=64 is more than the 10 examples"),
      (["--max_response_length=2"], "the limit is 2"),
    ]
    errors = _drive(SFT, [[workdir, *TINY_SFT, *flags] for flags, _ in cases])
    for (flags, message), error in zip(cases, errors, strict=True):
      with self.subTest(flags[-1]):
        self.assertRegex(str(error), f"^ValueError: .*{message}")


class LearningTest(absltest.TestCase):
  def test_format_reward_is_learnt_within_tens_of_updates(self):
    # Untrained, the model answers with a number at random or not at all.
    policy, workdir = _scratch() / "untrained", _scratch() / "format"
    _run(SFT, policy, *TINY_SFT, "--steps=1", "--learning_rate=1e-6")
    _run(
      PPO,
      workdir,
      *TINY_PPO,
      f"--policy={policy}",
      "--task=arithmetic_format",
      "--batch_entropy_coef=0",
      "--batch_size=128",
      "--steps=100",
      "--save_every=100",
      "--eval_every=100",
      "--learning_rate=1e-3",
    )
    rewards = [row["reward/mean"] for row in _rows(workdir)[:100]]
    self.assertLess(rewards[0], 0.98)
    self.assertGreater(np.mean(rewards[-10:]), 0.99)

  @pytest.mark.slow
  def test_batch_entropy_prevents_the_staircase(self):
    policy = _scratch() / "study"
    _run(SFT, policy, "--flagfile=experiments/flags/sft_cpu.flags")
    last = {}
    for name, coefficient in (("none", 0.0), ("batch", 0.3)):
      workdir = _scratch() / f"study-{name}"
      _run(
        PPO,
        workdir,
        "--flagfile=experiments/flags/arithmetic_cpu.flags",
        f"--policy={policy}",
        f"--batch_entropy_coef={coefficient}",
        "--steps=1000",
      )
      rows = _rows(workdir)[-51:-1]
      last[name] = {
        key: np.mean([row[key] for row in rows])
        for key in ("answers/distinct", "task/is_correct")
      }
    self.assertLess(last["none"]["answers/distinct"], 15)
    self.assertGreater(last["batch"]["answers/distinct"], 20)
    self.assertGreater(
      last["batch"]["task/is_correct"], last["none"]["task/is_correct"]
    )


if __name__ == "__main__":
  absltest.main()
