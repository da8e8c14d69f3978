"""GRPO and its kin, run as a user runs them, on CPU with tiny flags."""

import functools
import itertools
import json

import numpy as np
import pytest
from absl.testing import absltest

from tests import scripts

SFT = "experiments/sft.py"
GRPO = "experiments/grpo.py"
TINY = (
  "--task=arithmetic_format",
  "--task_options=style=last",
  "--num_prompts=512",
  "--num_eval_prompts=40",
  "--batch_size=4",
  "--num_samples=4",
  "--steps=6",
  "--save_every=2",
  "--eval_every=4",
  "--samples_every=3",
  "--learning_rate=3e-4",
  "--preflight=off",
)
# Most of its groups are all right: some rounds are needed to fill a batch.
DYNAMIC = (
  *TINY,
  "--algorithm=dapo",
  "--max_sampling_rounds=40",
  "--epochs=2",
  "--minibatch_size=8",
  "--micro_batch_size=4",
  "--warmup_steps=2",
  "--clip_epsilon_high=0.3",
)


def setUpModule():
  scripts.without_pictures()


def tearDownModule():
  scripts.remove_scratch()


@functools.cache
def _policy():
  """Untrained: it answers with a number at random, or not at all."""
  workdir = scripts.scratch() / "policy"
  scripts.run(
    SFT,
    workdir,
    "--task_options=style=last,whole=true",
    "--num_eval_prompts=64",
    "--hidden_size=32",
    "--num_layers=1",
    "--vocab_size=109",
    "--steps=1",
    "--learning_rate=1e-6",
  )
  return f"--policy={workdir}"


@functools.cache
def _finished():
  """A run with dynamic sampling that nothing interrupted."""
  workdir = scripts.scratch() / "finished"
  scripts.run(GRPO, workdir, *DYNAMIC, _policy())
  return workdir


class RunTest(absltest.TestCase):
  def test_dynamic_sampling_fills_the_batch(self):
    rows = scripts.rows(_finished())
    self.assertEqual([row["step"] for row in rows], list(range(7)))
    rounds = [row["groups/rounds"] for row in rows[:-1]]
    self.assertGreater(max(rounds), 1)
    # 16 responses a round; a row counts those of the steps before it.
    self.assertEqual(
      [row["rollouts"] for row in rows],
      [16 * n for n in itertools.accumulate(rounds, initial=0)],
    )
    for row in rows[:-1]:
      self.assertEqual(row["groups/without_signal"], 0.0)
      self.assertBetween(row["groups/acceptance"], 0.0, 1.0)
      # As many as are needed, and no more.
      groups = 4 * row["groups/rounds"]
      self.assertGreaterEqual(round(row["groups/acceptance"] * groups), 4)
      self.assertLess(row["groups/acceptance"] * groups, 8)
    samples = scripts.rows(_finished(), "samples.jsonl")
    for step in (0, 3):
      rewards = [row["reward"] for row in samples if row["step"] == step]
      groups = np.reshape(rewards, (4, 4))
      self.assertTrue(np.all(np.ptp(groups, axis=1) > 0), groups)
    for name in ("eval/reward", "reward/mean", "ppo/clip_fraction"):
      self.assertIn(name, rows[4])
    self.assertNotIn("eval/reward", rows[3])

  def test_killed_run_ends_with_the_same_bits(self):
    workdir = scripts.scratch() / "killed"
    # Before step 4 is over, the checkpoint of step 2 is on disk.
    scripts.run_until_killed(GRPO, workdir, *DYNAMIC, _policy(), num_rows=5)
    self.assertTrue((workdir / "checkpoints" / "2").exists())
    scripts.run(GRPO, workdir, *DYNAMIC, _policy())
    self.assertEqual(
      scripts.fingerprint(workdir), scripts.fingerprint(_finished())
    )
    for name in ("metrics.jsonl", "samples.jsonl"):
      self.assertEqual(
        scripts.steady(scripts.rows(workdir, name)),
        scripts.steady(scripts.rows(_finished(), name)),
      )

  def test_presets_give_way_to_explicit_flags(self):
    in_force = json.loads((_finished() / "flags.json").read_text())
    for name, value in (
      ("algorithm", "dapo"),
      ("advantage", "grpo"),
      ("normalizer", "token_mean"),
      ("kl", "none"),
      ("clip_epsilon_high", 0.3),  # Explicit; the preset says 0.28.
      ("dynamic_sampling", True),
      ("overlong_buffer", 0),  # A fifth of one token.
    ):
      self.assertEqual(in_force[name], value, name)

  @pytest.mark.slow
  def test_other_algorithms(self):
    cases = {
      # Further flags, and whether there is a KL and a KL in the loss.
      "gspo": (
        [
          *("--kl=loss", "--preflight=strict", "--unfinished_score=-1"),
          # Two words in ten: responses differ in length.
          *("--stop_strings=1", "--max_length=3", "--overlong_buffer=1"),
        ],
        True,
        True,
      ),
      "reinforce_pp": (
        ["--num_samples=1", "--batch_size=8", "--surrogate=cispo"],
        True,
        False,
      ),
    }
    workdirs = {name: scripts.scratch() / name for name in cases}
    flags = (
      *TINY,
      _policy(),
      "--task=arithmetic",
      "--batch_size=2",
      "--steps=2",
      "--minibatch_size=4",
    )
    errors = scripts.drive(
      GRPO,
      [
        [workdirs[name], *flags, f"--algorithm={name}", *more]
        for name, (more, _, _) in cases.items()
      ],
    )
    self.assertEqual(errors, [None] * len(cases))
    for name, (_, has_kl, in_loss) in cases.items():
      first, second, _ = scripts.rows(workdirs[name])
      self.assertEqual("kl/sequence_k1" in second, has_kl)
      self.assertEqual("kl/loss" in second, in_loss)
      # Nothing has moved yet: the policy is the reference.
      self.assertEqual(first.get("kl/sequence_k1", 0.0), 0.0)
      if name != "gspo":  # None of whose responses may have scored.
        self.assertGreater(first["gradient_norm"], 0.0)
    samples = scripts.rows(workdirs["gspo"], "samples.jsonl")
    cut = [row for row in samples if not row["finished"]]
    self.assertNotEmpty(cut)
    for row in cut:
      self.assertEqual(row["reward"], -1.0)
      self.assertFalse(row["parts"]["is_correct"])

  def test_bad_flags(self):
    nowhere = scripts.scratch() / "nowhere"
    cases = [
      (["--num_samples=1"], "--advantage=grpo compares .* at least 2, got 1"),
      (
        ["--num_samples=1", "--algorithm=reinforce_pp", "--dynamic_sampling"],
        "--dynamic_sampling=True compares .* at least 2",
      ),
      (["--minibatch_size=5"], "minibatch_size=5 does not divide the 16 rows"),
      (["--micro_batch_size=5"], "micro_batch_size=5 does not divide"),
      (["--max_sampling_rounds=0"], "max_sampling_rounds must be positive"),
      (["--kl=none", "--reference=x"], "--reference has no meaning"),
      (["--kl_estimator=k1"], "gradient of mean 0"),
      (["--overlong_buffer=2"], "between 0 and --max_length=1, got 2"),
      (["--unfinished_score=0"], "none ever ends"),
      (
        ["--algorithm=gspo", "--normalizer=constant"],
        "must be sequence_mean, got constant",
      ),
      (
        ["--algorithm=gspo", "--advantage=reinforce_pp"],
        "one advantage for a response",
      ),
      (
        ["--stop_at_eos", "--unfinished_score=nan"],
        "unfinished_score must be finite",
      ),
      (
        ["--stop_at_eos", "--dynamic_sampling", "--unfinished_score=-1"],
        "would tell wrong responses apart",
      ),
      (["--overlong_buffer=1"], "would price every response alike"),
      (["--minibatch_size=-8"], "minibatch_size must not be negative"),
      (["--clip_epsilon=0"], "clip_epsilon must be positive, got 0.0"),
      (["--kl_coef=-1"], "kl_coef must not be negative, got -1.0"),
      (["--num_prompts=3"], "batch_size=4 is more than the 3 of --num_prompts"),
      (["--task=chess"], "Unknown task 'chess'"),
    ]
    errors = scripts.drive(
      GRPO, [[nowhere, *TINY, _policy(), *flags] for flags, _ in cases]
    )
    for (flags, message), error in zip(cases, errors, strict=True):
      with self.subTest(flags[-1]):
        self.assertRegex(str(error), f"^ValueError: .*{message}")
    self.assertFalse((nowhere / "flags.json").exists())


class LearningTest(absltest.TestCase):
  def test_format_reward_is_learnt_within_tens_of_updates(self):
    workdir = scripts.scratch() / "format"
    scripts.run(
      GRPO,
      workdir,
      *TINY,
      _policy(),
      "--algorithm=rloo",
      "--batch_size=32",
      "--steps=80",
      "--save_every=100",
      "--eval_every=100",
      "--learning_rate=1e-3",
      optimize=True,
    )
    rewards = [row["reward/mean"] for row in scripts.rows(workdir)[:60]]
    self.assertLess(np.mean(rewards[:5]), 0.97)
    self.assertGreater(np.mean(rewards[-10:]), 0.99)


if __name__ == "__main__":
  absltest.main()
