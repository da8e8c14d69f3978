"""The scripts, run as a user runs them, on CPU with tiny flags."""

import functools
import json
import re
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from rljax.storage import checkpoint
from tests import conftest, scripts

ROOT = conftest.REPOSITORY
SFT = "experiments/sft.py"
PPO = "experiments/ppo.py"
TASK = scripts.SUMS
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
  # As the numbers below were found.
  "--warmup=0",
  "--max_grad_norm=0",
)
TINY_SFT = (
  *scripts.LEARN_SUMS,
  "--num_eval_prompts=64",
  "--hidden_size=32",
  "--vocab_size=109",
)


def tearDownModule():
  scripts.remove_scratch()


@functools.cache
def _policy():
  workdir = scripts.scratch() / "policy"
  scripts.run(SFT, workdir, *TINY_SFT)
  return workdir


@functools.cache
def _finished():
  """A PPO run that nothing interrupted."""
  workdir = scripts.scratch() / "finished"
  scripts.run(PPO, workdir, *TINY_PPO, f"--policy={_policy()}")
  return workdir


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
    rows = scripts.rows(workdir)
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
    samples = scripts.rows(workdir, "samples.jsonl")
    self.assertEqual({row["step"] for row in samples}, {0, 3})
    histograms = scripts.rows(workdir, "histograms.jsonl")
    self.assertEqual([row["step"] for row in histograms], [0, 3])
    self.assertEqual(sum(histograms[0]["truth"].values()), 16)
    self.assertTrue(samples[0]["prompt"].endswith("="))

  def test_evaluate_compares_arms(self):
    workdir = scripts.scratch() / "evaluation"
    arms = f"start={_policy()},ppo={_finished()},ppo={_finished()}"
    done = scripts.run(
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
    self.assertLen(scripts.rows(workdir, "samples.jsonl"), 150)
    self.assertTrue((workdir / "arms.png").exists())

  @pytest.mark.slow
  def test_character_level_answers_take_several_tokens(self):
    policy, workdir = (
      scripts.scratch() / "characters",
      scripts.scratch() / "multi",
    )
    scripts.run(
      SFT,
      policy,
      *TINY_SFT,
      "--vocab_size=0",
      "--tokenizer=character",
      "--steps=60",
    )
    scripts.run(
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
    rows = scripts.rows(workdir)
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

  @pytest.mark.slow
  def test_pretrained_model_learns_the_same_task_as_text(self):
    model = conftest.shared("data/models/stories260k")
    workdir = scripts.scratch() / "stories"
    scripts.run(
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
    self.assertLess(scripts.rows(workdir)[0]["sampler/log_prob_gap"], 1e-4)


class ResumeTest(parameterized.TestCase):
  @parameterized.parameters(1, 3, 5)
  def test_killed_run_ends_with_the_same_bits(self, rows_before_kill):
    workdir = scripts.scratch() / f"killed-{rows_before_kill}"
    flags = (*TINY_PPO, f"--policy={_policy()}")
    reference = _finished()
    scripts.run_until_killed(PPO, workdir, *flags, num_rows=rows_before_kill)
    scripts.run(PPO, workdir, *flags)
    self.assertEqual(
      scripts.fingerprint(workdir),
      scripts.fingerprint(reference),
    )
    self.assertEqual(
      scripts.steady(scripts.rows(workdir)),
      scripts.steady(scripts.rows(reference)),
    )
    self.assertEqual(
      scripts.rows(workdir, "samples.jsonl"),
      scripts.rows(reference, "samples.jsonl"),
    )

  @pytest.mark.slow
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
      "--warmup=3",
      "--max_grad_norm=1",
      "--top_p=0.9",
      "--steps=4",
    )
    whole, killed = (
      scripts.scratch() / "all-whole",
      scripts.scratch() / "all-killed",
    )
    scripts.run(PPO, whole, *flags)
    scripts.run_until_killed(PPO, killed, *flags, num_rows=3)
    scripts.run(PPO, killed, *flags)
    self.assertEqual(
      scripts.fingerprint(whole),
      scripts.fingerprint(killed),
    )
    self.assertEqual(
      scripts.steady(scripts.rows(whole)), scripts.steady(scripts.rows(killed))
    )
    row = scripts.rows(whole, "samples.jsonl")[0]
    self.assertGreater(row["truncated_log_probs"][0], row["log_probs"][0])

  def test_sigterm_saves_and_exits(self):
    workdir = scripts.scratch() / "terminated"
    flags = (*TINY_PPO, f"--policy={_policy()}", "--save_every=100")
    process = subprocess.Popen(
      [
        sys.executable,
        PPO,
        *scripts.arguments(workdir, *flags, "--steps=100000"),
      ],
      cwd=ROOT,
      env=scripts.environment(),
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL,
      text=True,
    )
    try:
      scripts.wait_for_rows(process, workdir, 3)
      process.send_signal(signal.SIGTERM)
      out, _ = process.communicate(timeout=60)
    finally:
      process.kill()
    self.assertEqual(process.returncode, 0)
    self.assertIn("Stopped by a signal", out)
    last = scripts.rows(workdir)[-1]["step"]
    self.assertTrue((workdir / "checkpoints" / str(last + 1)).exists())

  def test_other_flags_are_refused_with_the_difference(self):
    done = scripts.run(
      PPO,
      _finished(),
      *TINY_PPO,
      f"--policy={_policy()}",
      "--learning_rate=0.5",
      ok=False,
    )
    self.assertNotEqual(done.returncode, 0)
    self.assertRegex(done.stderr, "learning_rate: was 0.0003, now 0.5")

  def test_finished_run_goes_on_with_more_steps(self):
    longer, whole = (scripts.scratch() / x for x in ("longer", "whole"))
    flags = (*TINY_PPO, f"--policy={_policy()}", "--warmup=0")
    errors = scripts.drive(
      PPO,
      [
        (whole, *flags),
        (longer, *flags, "--steps=3", "--save_every=1", "--eval_every=3"),
        (longer, *flags),
        (longer, *flags, "--steps=5"),
      ],
    )
    self.assertEqual(errors[:3], [None] * 3)
    self.assertRegex(errors[3], "has done 6 steps, and is to have 5")
    self.assertEqual(scripts.fingerprint(longer), scripts.fingerprint(whole))
    # The longer run evaluates steps 0 and 4, the shorter one 0 and 3.
    self.assertEqual(
      scripts.steady(scripts.rows(longer)), scripts.steady(scripts.rows(whole))
    )

  def test_finished_run_stays_as_it_is(self):
    before = scripts.rows(_finished())
    scripts.run(PPO, _finished(), *TINY_PPO, f"--policy={_policy()}")
    self.assertEqual(
      scripts.steady(scripts.rows(_finished())), scripts.steady(before)
    )


class SupervisedTest(parameterized.TestCase):
  """Warm starts: parts of a batch, the best, and going on."""

  FLAGS = (
    *TINY_SFT,
    "--num_examples=96",
    "--batch_size=16",
    "--steps=6",
    "--eval_every=2",
    "--save_every=2",
    "--learning_rate=3e-3",
    "--warmup=2",
  )

  @classmethod
  @functools.cache
  def _runs(cls):
    """Workdirs of runs in one process, by their names."""
    # Lists of words have all lengths.
    lists = ("--task=word_lists", "--task_options=", "--vocab_size=0")
    flags = {
      "whole": (),
      "parts": ("--micro_batch_size=4",),
      "lists": lists,
      "lists_in_parts": (*lists, "--micro_batch_size=4"),
      "sequences": (*lists, "--normalizer=sequence_mean"),
      "sequences_in_parts": (
        *(*lists, "--normalizer=sequence_mean", "--micro_batch_size=4"),
      ),
      "best": ("--keep_best", "--learning_rate=1", "--max_grad_norm=0"),
      "improves": ("--keep_best",),
      "constant": ("--keep_best", "--schedule=constant"),
      "longer": ("--keep_best", "--schedule=constant"),
    }
    found = {name: scripts.scratch() / f"sft-{name}" for name in flags}
    runs = [(found[name], *cls.FLAGS, *more) for name, more in flags.items()]
    # It has ended once before.
    runs.insert(-1, (*runs[-1], "--steps=3", "--save_every=5"))
    errors = scripts.drive(SFT, runs)
    if any(errors):
      raise AssertionError(errors)
    return found

  def test_rows_are_about_the_policy_after_so_many_updates(self):
    rows = scripts.rows(self._runs()["whole"])
    self.assertEqual([row["step"] for row in rows], list(range(7)))
    evaluated = [row["step"] for row in rows if "eval/loss" in row]
    self.assertEqual(evaluated, [0, 2, 4, 6])
    summary = json.loads((self._runs()["whole"] / "summary.json").read_text())
    self.assertEqual(
      summary["eval/loss"],
      {"before": rows[0]["eval/loss"], "after": rows[6]["eval/loss"]},
    )
    self.assertLess(rows[6]["eval/loss"], rows[0]["eval/loss"])

  @parameterized.parameters(
    ("whole", "parts"),
    ("lists", "lists_in_parts"),
    ("sequences", "sequences_in_parts"),
  )
  def test_parts_of_a_batch_make_the_same_updates(self, whole, parts):
    runs = self._runs()
    gap = scripts.largest_gap(runs[whole], runs[parts])
    self.assertLess(gap, 10 * scripts.ROUNDING)  # The steps are large.
    rows = [scripts.rows(runs[name]) for name in (whole, parts)]
    for a, b in zip(*map(scripts.steady, rows), strict=True):
      self.assertEqual(a.keys(), b.keys())
      for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=1e-4, err_msg=name)

  def test_normalizers_differ(self):
    runs = self._runs()
    gap = scripts.largest_gap(runs["lists"], runs["sequences"])
    self.assertGreater(gap, 50 * scripts.ROUNDING)

  def test_the_lowest_loss_is_kept(self):
    # A rate of 1 spoils everything, and the last parameters stand in.
    spoilt, improves = (self._runs()[x] for x in ("best", "improves"))
    losses = {
      row["step"]: row["eval/loss"]
      for row in scripts.rows(improves)
      if "eval/loss" in row
    }
    best = min(losses, key=losses.get)
    self.assertTrue((improves / "best" / "checkpoints" / str(best)).exists())
    self.assertTrue((improves / "best" / "model" / "config.json").exists())
    self.assertTrue((spoilt / "best" / "checkpoints" / "6").exists())
    self.assertEqual(
      scripts.fingerprint(spoilt / "best"), scripts.fingerprint(spoilt)
    )

  def test_killed_run_ends_with_the_same_bits(self):
    whole, killed = self._runs()["improves"], scripts.scratch() / "sft-killed"
    flags = (*self.FLAGS, "--keep_best")
    scripts.run_until_killed(SFT, killed, *flags, num_rows=4)
    scripts.run(SFT, killed, *flags)
    for folder in (".", "best"):
      self.assertEqual(
        scripts.fingerprint(killed / folder),
        scripts.fingerprint(whole / folder),
      )
    self.assertEqual(
      scripts.steady(scripts.rows(killed)), scripts.steady(scripts.rows(whole))
    )

  def test_a_longer_run_ends_with_the_same_bits(self):
    runs = self._runs()
    for folder in (".", "best"):
      self.assertEqual(
        scripts.fingerprint(runs["longer"] / folder),
        scripts.fingerprint(runs["constant"] / folder),
      )
    self.assertEqual(
      scripts.steady(scripts.rows(runs["longer"])),
      scripts.steady(scripts.rows(runs["constant"])),
    )

  def test_rows_of_a_file(self):
    rows = scripts.scratch() / "sums.jsonl"
    lines = [{"prompt": f"{i}+1=", "response": str(i + 1)} for i in range(40)]
    lines.insert(3, {"prompt": "1+1="})
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    workdir = scripts.scratch() / "sft-file"
    (error,) = scripts.drive(
      SFT,
      [
        (
          *(workdir, f"--policy={_policy()}", f"--data={rows}", "--steps=2"),
          *("--batch_size=8", "--num_eval_prompts=10", "--first_row=2"),
          *("--num_rows=20", "--eval_every=2"),
        )
      ],
    )
    self.assertIsNone(error)
    # The row without a reply is named; of the others 20 are used, 10 held out.
    skipped = (workdir / "skipped.txt").read_text()
    self.assertRegex(skipped, r"sums.jsonl:4: .*\n$")
    filed = json.loads((workdir / "models.json").read_text())
    start = checkpoint.restore_params(_policy())["policy"]
    self.assertEqual(filed["policy"], checkpoint.fingerprint(start))


class DevicesTest(parameterized.TestCase):
  @pytest.mark.slow
  def test_mesh_does_not_change_the_run(self):
    self.compare_with_one_device("data:2,fsdp:2,tensor:2")

  @pytest.mark.slow
  def test_copies_do_not_change_the_run(self):
    self.compare_with_one_device("data:8")

  def compare_with_one_device(self, mesh):
    # 112 rows of vocabulary and widths that the axes divide.
    policy = scripts.scratch() / "even-policy"
    if not policy.exists():
      scripts.run(SFT, policy, *TINY_SFT, "--vocab_size=112")
    single = scripts.scratch() / "even-single"
    flags = (*TINY_PPO, f"--policy={policy}", "--steps=3")
    if not single.exists():
      scripts.run(PPO, single, *flags)
    spread = (
      scripts.scratch() / f"even-{mesh.replace(':', '').replace(',', '')}"
    )
    scripts.run(
      PPO, spread, *flags, f"--mesh={mesh}", "--preflight=strict", devices=8
    )
    samples = lambda w: [
      r["response_ids"] for r in scripts.rows(w, "samples.jsonl")
    ]
    self.assertEqual(samples(single), samples(spread))
    self.assertLess(scripts.largest_gap(single, spread), scripts.ROUNDING)
    # And the parameters have moved much further than that.
    start = {"policy": checkpoint.restore_params(policy)["policy"]}
    moved = jax.tree.map(
      lambda a, b: float(np.abs(a - b).max()),
      start,
      {"policy": checkpoint.restore_params(single)["policy"]},
    )
    self.assertGreater(max(jax.tree.leaves(moved)), 50 * scripts.ROUNDING)

  @pytest.mark.slow
  def test_devices_share_the_work(self):
    # Rows that a random gather spreads over all devices must be split again:
    # then the update's scratch memory falls.
    policy = scripts.scratch() / "even-policy"
    if not policy.exists():
      scripts.run(SFT, policy, *TINY_SFT, "--vocab_size=112")
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
      done = scripts.run(
        PPO, scripts.scratch() / f"work-{devices}", *flags, devices=devices
      )
      (line,) = re.findall(r"learn .*", done.stdout)
      temporary[devices] = float(re.findall(r"([\d.,]+) MB", line)[-1])
    self.assertLess(temporary[8], temporary[1] / 3)

  def test_draws_in_parts(self):
    workdir = scripts.scratch() / "draws"
    flags = (*TINY_PPO, f"--policy={_policy()}", "--draw_batch_size=4")
    scripts.run(PPO, workdir, *flags)
    self.assertEqual(
      scripts.fingerprint(workdir), scripts.fingerprint(_finished())
    )

  def test_pmap_matches_jit(self):
    mapped = scripts.scratch() / "pmap"
    scripts.run(
      "experiments/examples/ppo_pmap.py",
      mapped,
      *(flag for flag in TASK if "stop_at_eos" not in flag),
      f"--policy={_policy()}",
      "--num_prompts=512",
      "--batch_size=16",
      "--steps=6",
      devices=8,
    )
    self.assertLess(scripts.largest_gap(mapped, _finished()), scripts.ROUNDING)


class BadInputTest(absltest.TestCase):
  """Each gets one line that says what is wrong, before anything compiles."""

  def test_ppo(self):
    policy = f"--policy={_policy()}"
    empty = scripts.scratch() / "empty"
    empty.mkdir(exist_ok=True)
    in_the_way = scripts.scratch() / "file"
    in_the_way.write_text("")
    nan_task = scripts.scratch() / "nan"
    cases = [
      (["--task=chess", policy], "Unknown task 'chess'.*arithmetic"),
      (["--policy=/no/such/model"], "no/such/model"),
      ([f"--policy={empty}"], "config.json"),
      ([policy, "--max_prompt_length=2"], "tokens, the limit is 2"),
      ([policy, "--draw_batch_size=3"], "draw_batch_size=3 does not divide"),
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
    runs = [[nan_task, *TINY_PPO, *flags] for flags, _ in cases]
    errors = scripts.drive(PPO, runs)
    for (flags, message), error in zip(cases, errors, strict=True):
      with self.subTest(flags[-1]):
        self.assertIsNotNone(error, flags)
        # A task that is asked for a score says what is wrong with its options.
        kind = r"^((IllegalFlag)?ValueError|CallError): "
        self.assertRegex(error, f"{kind}.*{message}")

  def test_evaluation_does_not_write_over_a_run(self):
    before = (_finished() / "metrics.jsonl").read_text()
    (error,) = scripts.drive(
      "experiments/evaluate.py",
      [[_finished(), f"--policies=a={_finished()}", *TASK]],
    )
    self.assertRegex(error, "ValueError: .* holds a training run")
    self.assertEqual((_finished() / "metrics.jsonl").read_text(), before)

  def test_batch_must_fit_the_devices(self):
    (error,) = scripts.drive(
      PPO,
      [
        [
          scripts.scratch() / "uneven",
          *TINY_PPO,
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
    rows = scripts.scratch() / "rows.jsonl"
    rows.write_text('{"prompt": "1+1=", "response": ""}\n{"prompt": "1+1="}\n')
    workdir = scripts.scratch() / "bad-sft"
    cases = [
      ([f"--data={rows}"], r"No row is left: 2 of 2 .*rows.jsonl:1: .*empty"),
      (["--data=/no/such.jsonl"], "no/such.jsonl"),
      (["--num_examples=10"], "batch_size=64 is more than the 10 examples"),
      (["--max_response_length=2"], "the limits are 512 and 2"),
      (
        ["--tokenizer=grammar"],
        "arithmetic has no tokenizer 'grammar'; it has",
      ),
      (["--task_options=stlye=last"], "no option 'stlye'"),
      (["--vocab_size=5"], "vocab_size must be [0-9]+, the size of the token"),
      (["--micro_batch_size=7"], "micro_batch_size=7 does not divide the 64"),
      (["--steps=9", "--schedule_steps=8"], "--schedule_steps must not be few"),
      (["--steps=0"], "--steps=0"),
    ]
    errors = scripts.drive(
      SFT, [[workdir, *TINY_SFT, *flags] for flags, _ in cases]
    )
    for (flags, message), error in zip(cases, errors, strict=True):
      with self.subTest(flags[-1]):
        self.assertRegex(str(error), f"^(IllegalFlag)?ValueError: .*{message}")


class LearningTest(absltest.TestCase):
  def test_format_reward_is_learnt_within_tens_of_updates(self):
    # Untrained, the model answers with a number at random or not at all.
    policy, workdir = (
      scripts.scratch() / "untrained",
      scripts.scratch() / "format",
    )
    scripts.run(SFT, policy, *TINY_SFT, "--steps=1", "--learning_rate=1e-6")
    scripts.run(
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
    rewards = [row["reward/mean"] for row in scripts.rows(workdir)[:100]]
    self.assertLess(rewards[0], 0.98)
    self.assertGreater(np.mean(rewards[-10:]), 0.99)

  @pytest.mark.slow
  def test_batch_entropy_prevents_the_staircase(self):
    policy = scripts.scratch() / "study"
    sft = "--flagfile=experiments/flags/padula/sft_cpu.flags"
    scripts.run(SFT, policy, sft, optimize=True)
    last = {}
    for name, coefficient in (("none", 0.0), ("batch", 0.3)):
      workdir = scripts.scratch() / f"study-{name}"
      scripts.run(
        PPO,
        workdir,
        "--flagfile=experiments/flags/padula/arithmetic_cpu.flags",
        f"--policy={policy}",
        f"--batch_entropy_coef={coefficient}",
        "--steps=1000",
        optimize=True,
      )
      rows = scripts.rows(workdir)[-51:-1]
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
