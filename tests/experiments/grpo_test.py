"""GRPO and its kin, run as a user runs them, on CPU with tiny flags."""

import functools
import itertools
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from absl.testing import absltest

from tests import conftest, scripts

SFT = "experiments/sft.py"
GRPO = "experiments/grpo.py"
TINY = (
  *scripts.SUMS,
  "--task=arithmetic_format",
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
  # As the numbers below were found.
  "--warmup=0",
  "--max_grad_norm=0",
)
# Most of its groups are all right: some rounds are needed to fill a batch.
DYNAMIC = (
  *TINY,
  "--algorithm=dapo",
  "--max_sampling_rounds=40",
  "--epochs=2",
  "--minibatch_size=8",
  "--micro_batch_size=4",
  "--warmup=2",
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
    *scripts.LEARN_SUMS,
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


def _in_force(command_lines):
  """The flags of several command lines, once they are parsed."""
  code = """
import json, runpy, sys
runpy.run_path(sys.argv[1], run_name="script")
from absl import flags
values = flags.FLAGS
for words in json.load(sys.stdin):
  for name in list(values):
    values[name].unparse()
    values[name].value = values[name].default
  values([sys.argv[1], "--workdir=x", "--policy=x", "--task=x", *words])
  print(json.dumps({name: values[name].value for name in values}))
"""
  done = subprocess.run(
    [sys.executable, "-c", code, GRPO],
    cwd=conftest.REPOSITORY,
    env=scripts.environment(),
    input=json.dumps(list(command_lines)),
    capture_output=True,
    text=True,
    check=True,
  )
  return [json.loads(line) for line in done.stdout.splitlines()]


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

  def test_one_update_needs_no_pass_before_it(self):
    """It reads the policy before it, and teaches and tells the same."""
    flags = (*TINY, "--steps=2", "--micro_batch_size=4", "--length_buckets=2")
    line = "reads_old = sizes.num_updates(FLAGS.epochs) > 1 or"
    with_pass = [line, "reads_old = True or"]
    folders = [scripts.scratch() / name for name in ("without", "with")]
    errors = scripts.drive(
      "-",
      [
        {
          "script": GRPO,
          "flags": [folder, *flags, "--max_length=10", _policy()],
          "replace": [with_pass] if folder == folders[1] else [],
        }
        for folder in folders
      ],
      devices=2,
    )
    self.assertEqual(errors, [None, None])
    rows, others = map(scripts.rows, folders)
    ours, theirs = scripts.steady(rows), scripts.steady(others)
    for found, expected in zip(ours, theirs, strict=True):
      self.assertEqual(found.keys(), expected.keys())
      for name, value in expected.items():
        np.testing.assert_allclose(
          found[name], value, rtol=1e-4, atol=2e-5, err_msg=name
        )
    for name in ("sampler/log_prob_gap_99", "kl/sequence_k1", "entropy/token"):
      self.assertIn(name, ours[0])
    np.testing.assert_allclose(ours[0]["ppo/ratio_max"], 1.0, rtol=1e-7)
    self.assertLess(scripts.largest_gap(*folders), scripts.ROUNDING)

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

  def test_presets(self):
    others = {"kl_coef": 0.04, "kl_estimator": "", "clip_epsilon": 0.2}
    others |= {"clip_epsilon_high": 0.0, "surrogate": "clipped"}
    others |= {"dynamic_sampling": False, "overlong_buffer": 0}
    dapo = {"clip_epsilon_high": 0.28, "dynamic_sampling": True}
    ends = ("--stop_at_eos", "--max_length=19")
    cases = [
      # Flags, then advantage, normalizer and kl, and what is not as in others.
      (["grpo"], "grpo", "sequence_mean", "loss", {}),
      (["dr_grpo"], "dr_grpo", "constant", "none", {}),
      (
        *(["dapo", *ends], "grpo", "token_mean", "none"),
        dapo | {"overlong_buffer": 3},
      ),
      (["rloo"], "rloo", "constant", "reward", {"kl_coef": 0.05}),
      (
        *(["reinforce_pp"], "reinforce_pp", "token_mean", "reward"),
        {"kl_coef": 0.01},
      ),
      (
        *(["reinforce_pp_baseline"], "reinforce_pp_baseline", "token_mean"),
        *("loss", {"kl_estimator": "k2", "kl_coef": 0.01}),
      ),
      (
        *(["gspo"], "grpo", "sequence_mean", "none"),
        {"surrogate": "gspo", "clip_epsilon": 3e-4, "clip_epsilon_high": 4e-4},
      ),
      (["cispo"], "grpo", "token_mean", "none", {"surrogate": "cispo"}),
      # What is given stays, and takes what it is paired with along.
      (
        *(["gspo", "--clip_epsilon=0.1"], "grpo", "sequence_mean", "none"),
        {"surrogate": "gspo", "clip_epsilon": 0.1},
      ),
      (
        *(["reinforce_pp_baseline", "--kl=reward"], "reinforce_pp_baseline"),
        *("token_mean", "reward", {"kl_coef": 0.01}),
      ),
      (
        *(["dapo", *ends, "--normalizer=constant"], "grpo", "constant", "none"),
        dapo | {"overlong_buffer": 3},
      ),
      # A preset is there before conditions are checked.
      (
        *(["rloo", "--kl_estimator=k1"], "rloo", "constant", "reward"),
        {"kl_coef": 0.05, "kl_estimator": "k1"},
      ),
      (
        *(["reinforce_pp", "--num_samples=1"], "reinforce_pp", "token_mean"),
        *("reward", {"kl_coef": 0.01}),
      ),
    ]
    found = _in_force([f"--algorithm={a}", *more] for (a, *more), *_ in cases)
    for in_force, case in zip(found, cases, strict=True):
      (name, *more), advantage, normalizer, kl, changed = case
      expected = {"algorithm": name, "advantage": advantage, "kl": kl}
      expected |= {"normalizer": normalizer} | others | changed
      self.assertEqual(
        {name: in_force[name] for name in expected}, expected, (name, more)
      )

  @pytest.mark.slow
  def test_other_algorithms(self):
    cases = {
      # Further flags, and whether there is a KL and a KL in the loss.
      "gspo": (
        [
          *("--kl=loss", "--preflight=strict", "--unfinished_score=-1"),
          # Two words in ten: responses differ in length.
          *("--stop_strings=1", "--max_length=3", "--overlong_buffer=1"),
          *("--min_length=2", "--keep_best", "--eval_every=1"),
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
      # Each has a limit of its own.
      self.assertIn(len(row["response_ids"]), (2, 3))
    self.assertLen({len(row["response_ids"]) for row in cut}, 2)
    self.assertTrue((workdirs["gspo"] / "best" / "checkpoints").exists())
    page = (workdirs["gspo"] / "tokens.html").read_text()
    self.assertIn("<h1>arithmetic: a rollout after 1 steps</h1>", page)
    self.assertIn("8 of 8 shown", page)
    for article in page.split("<article>")[1:]:
      # A group tells whole responses apart.
      values = re.findall(r'title="advantage (\S+), token \d+"', article)
      self.assertLen(set(values), 1)

  def test_bad_flags(self):
    nowhere = scripts.scratch() / "nowhere"
    cases = [
      (
        ["--num_samples=1"],
        "advantage=grpo, num_samples=1: .* compares .* at least 2",
      ),
      (
        ["--num_samples=1", "--algorithm=reinforce_pp", "--dynamic_sampling"],
        "dynamic_sampling=True, num_samples=1: .* compares .* at least 2",
      ),
      (["--minibatch_size=5"], "minibatch_size=5 does not divide the 16 rows"),
      (["--micro_batch_size=5"], "micro_batch_size=5 does not divide"),
      (["--max_sampling_rounds=0"], "max_sampling_rounds=0: .*positive"),
      (["--kl=none", "--reference=x"], "--reference has no meaning"),
      (["--algorithm=dapo", "--reference=x"], "--reference has no meaning"),
      (["--kl_estimator=k1"], "gradient of mean 0"),
      (
        ["--overlong_buffer=2", "--stop_at_eos"],
        "overlong_buffer=2, max_length=1: .* between 0 and --max_length",
      ),
      (["--unfinished_score=0"], "run out of length, as all do"),
      (
        ["--algorithm=gspo", "--normalizer=constant"],
        "normalizer=constant: .* must be sequence_mean",
      ),
      (
        ["--algorithm=gspo", "--advantage=reinforce_pp"],
        "with one advantage each",
      ),
      (
        ["--stop_at_eos", "--unfinished_score=nan"],
        "unfinished_score must be a finite number",
      ),
      (
        ["--stop_at_eos", "--dynamic_sampling", "--unfinished_score=-1"],
        "would tell wrong responses apart",
      ),
      (["--overlong_buffer=1"], "would price every response alike"),
      (["--minibatch_size=-8"], "minibatch_size=-8: .*non-negative"),
      (["--clip_epsilon=0"], "clip_epsilon=0: .*number >= 1e-09"),
      (["--kl_coef=-1"], "kl_coef=-1: .*non-negative"),
      (["--min_length=2"], "min_length must not be more than --max_length"),
      (["--constraint=grammar"], "it needs --stop_at_eos"),
      (
        ["--num_prompts=3"],
        "batch_size must lie between 1 and the 3 prompts of --num_prompts",
      ),
      (["--task=chess"], "Unknown task 'chess'"),
    ]
    errors = scripts.drive(
      GRPO, [[nowhere, *TINY, _policy(), *flags] for flags, _ in cases]
    )
    for (flags, message), error in zip(cases, errors, strict=True):
      with self.subTest(flags[-1]):
        kind = "(ValueError|IllegalFlagValueError)"
        self.assertRegex(str(error), f"(?s)^{kind}: .*{message}")
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
    )
    rewards = [row["reward/mean"] for row in scripts.rows(workdir)[:60]]
    self.assertLess(np.mean(rewards[:5]), 0.97)
    self.assertGreater(np.mean(rewards[-10:]), 0.99)


if __name__ == "__main__":
  absltest.main()
