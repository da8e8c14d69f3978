"""PPO with rewards of several terms, run as a user runs it, on tiny models."""

import functools
import shutil

import numpy as np
from absl.testing import absltest

from rljax.models import hf
from rljax.storage import checkpoint
from rljax.tasks import tokenizers
from tests import scripts

SFT = "experiments/sft.py"
PPO = "experiments/ppo.py"
TASK = ("--task=merge_sums", "--task_options=num_terms=3,max_term=5")
ALL_TERMS = "score,steps,reward_model,dense_reward_model"
# A right response has ten tokens: "05+04", a line feed, "#09", the end.
TINY = (
  *TASK,
  "--num_prompts=24",
  "--num_eval_prompts=12",
  "--eval_split=validation",
  "--batch_size=16",
  "--steps=4",
  "--save_every=2",
  "--eval_every=2",
  "--samples_every=1",
  "--max_length=10",
  "--stop_at_eos",
  "--learning_rate=3e-4",
  "--preflight=off",
  # As the numbers below were found.
  "--warmup=0",
  "--max_grad_norm=0",
)


def setUpModule():
  scripts.without_pictures()


def tearDownModule():
  scripts.remove_scratch()


@functools.cache
def _policy():
  workdir = scripts.scratch() / "policy"
  scripts.run(
    SFT,
    workdir,
    *TASK,
    "--tokenizer=character",
    "--num_examples=24",
    "--num_eval_prompts=12",
    "--hidden_size=32",
    "--num_layers=1",
    "--max_positions=32",
    "--batch_size=24",
    "--steps=80",
    "--eval_every=80",
    "--learning_rate=5e-3",
  )
  return workdir


def _classifier(name, num_labels=1, tokenizer=None):
  """A folder with a classifier that starts as the policy, and knows nothing."""
  folder = scripts.scratch() / name
  if not folder.exists():
    loaded = hf.load(_policy())
    made = hf.classifier_from(loaded, num_labels, seed=3)
    tokenizer = tokenizer or loaded.tokenizer
    hf.save_classifier(folder, made.model, made.params, tokenizer)
  return folder


@functools.cache
def _finished():
  """A run with all terms that nothing interrupted."""
  workdir = scripts.scratch() / "finished"
  scripts.run(PPO, workdir, *_all_terms())
  return workdir


def _all_terms():
  return (
    *TINY,
    f"--policy={_policy()}",
    f"--reward_terms={ALL_TERMS}",
    f"--reward_model={_classifier('outcomes')}",
    "--reward_length=32",
    "--step_reward=0.2",
    "--step_coef=0.5",
    "--unfinished_score=-0.5",
    "--temperature=2",
    "--num_samples=2",
    "--minibatch_size=16",
    "--critic=branch:1",
    "--kl=initial",
    "--kl_coef=0.05",
    "--keep_best",
  )


class TermsTest(absltest.TestCase):
  def test_terms_are_what_the_samples_say(self):
    rows = scripts.rows(_finished())
    samples = scripts.rows(_finished(), "samples.jsonl")
    self.assertLen(samples, 4 * 32)
    for step, row in enumerate(rows[:4]):
      drawn = [sample for sample in samples if sample["step"] == step]
      finished = np.array([sample["finished"] for sample in drawn])
      # Both kinds are there, and steps that match, for this to say something.
      self.assertIn(finished.mean(), np.arange(1, 32) / 32)
      scores = [
        float(sample["parts"]["is_correct"]) if sample["finished"] else -0.5
        for sample in drawn
      ]
      np.testing.assert_allclose([s["reward"] for s in drawn], scores)
      np.testing.assert_allclose(row["reward/mean"], np.mean(scores), atol=1e-6)
      np.testing.assert_allclose(row["reward/std"], np.std(scores), atol=1e-6)
      matches = [sum(sample["parts"]["step_matches"]) for sample in drawn]
      steps = np.minimum(0.2 * np.array(matches), 0.5) * finished
      np.testing.assert_allclose(row["reward/steps"], steps.mean(), atol=1e-6)
      # The dense term adds up to c * (last - first): what the same model says
      # of the same text. No response without an end earns it.
      np.testing.assert_allclose(
        row["reward/dense_reward_model"],
        0.5 * (row["reward/reward_model"] - 0.5 * finished.mean()),
        atol=1e-5,
      )
      np.testing.assert_allclose(
        row["reward/total"],
        row["reward/mean"]
        + row["reward/steps"]
        + row["reward/reward_model"]
        + row["reward/dense_reward_model"],
        atol=1e-5,
      )
    self.assertGreater(max(row["reward/steps"] for row in rows[:4]), 0)
    self.assertGreater(rows[0]["reward/reward_model"], 0)

  def test_whitened_rewards_keep_their_mean(self):
    workdir = scripts.scratch() / "whitened"
    scripts.run(PPO, workdir, *_all_terms(), "--whiten_rewards", "--steps=1")
    found, first = scripts.rows(workdir)[0], scripts.rows(_finished())[0]
    self.assertEqual(found["reward/with_kl"], first["reward/with_kl"])
    # The critic begins at 0: its loss is the mean square of the returns.
    self.assertNotAlmostEqual(found["value/loss"], first["value/loss"])

  def test_rollouts_are_counted(self):
    counts = [row["rollouts"] for row in scripts.rows(_finished())]
    self.assertEqual(counts, [0, 32, 64, 96, 128])

  def test_branch_learns_and_is_saved(self):
    rows = scripts.rows(_finished())
    self.assertEqual(rows[0]["values/mean"], 0.0)
    self.assertNotEqual(rows[3]["values/mean"], 0.0)
    params = checkpoint.restore_params(_finished())
    self.assertEqual(set(params), {"policy", "critic"})
    decoder = params["critic"]["branch"]["decoder"]
    self.assertEqual(set(decoder), {"layers_0", "ln_f"})

  def test_best_is_that_of_the_evaluations(self):
    rows = [r for r in scripts.rows(_finished()) if "eval/is_correct" in r]
    self.assertEqual([row["step"] for row in rows], [0, 2, 4])
    values = [row["eval/is_correct"] for row in rows]
    best = 4  # If nothing beats the start, the last.
    if max(values[1:]) > values[0]:
      best = rows[1 + int(np.argmax(values[1:]))]["step"]
    folder = _finished() / "best" / "checkpoints"
    self.assertEqual([path.name for path in folder.iterdir()], [str(best)])
    kept, last = (
      checkpoint.fingerprint(checkpoint.restore_params(_finished(), step=best)),
      checkpoint.fingerprint(checkpoint.restore_params(_finished() / "best")),
    )
    self.assertEqual(kept, last)
    self.assertEqual(hf.load(_finished() / "best").model.config.num_layers, 1)

  def test_stopped_run_ends_with_the_same_bits(self):
    again = scripts.scratch() / "again"
    shutil.copytree(_finished(), again)
    shutil.rmtree(again / "checkpoints" / "4")
    shutil.rmtree(again / "best" / "checkpoints")
    scripts.run(PPO, again, *_all_terms())
    self.assertEqual(
      scripts.fingerprint(again), scripts.fingerprint(_finished())
    )
    self.assertEqual(
      scripts.steady(scripts.rows(again)),
      scripts.steady(scripts.rows(_finished())),
    )

  def test_reward_model_alone_and_no_room_for_an_end(self):
    workdir = scripts.scratch() / "alone"
    scripts.run(
      PPO,
      workdir,
      *TINY,
      f"--policy={_policy()}",
      "--reward_terms=reward_model",
      f"--reward_model={_classifier('outcomes')}",
      "--reward_length=32",
      "--unfinished_score=0",
      "--max_length=4",
      "--steps=1",
    )
    first, last = scripts.rows(workdir)
    # Nothing ends: that is the score of greedy answers too.
    for row in (first, last):
      self.assertEqual(row["eval/reward"], 0.0)
      self.assertEqual(row["eval/is_correct"], 0.0)
    self.assertEqual(first["response/finished"], 0.0)
    # Without a score among the terms, the reward is their sum.
    for name in ("mean", "total", "reward_model", "with_kl"):
      self.assertEqual(first[f"reward/{name}"], 0.0)
    self.assertNotIn("reward/steps", first)
    self.assertFalse((workdir / "best").exists())


class BadInputTest(absltest.TestCase):
  def test_each_says_what_would_do(self):
    policy = f"--policy={_policy()}"
    model = f"--reward_model={_classifier('outcomes')}"
    several = f"--reward_model={_classifier('several', num_labels=2)}"
    letters = tokenizers.of_words([*"abcdefgh"], ".")
    other = f"--reward_model={_classifier('other', tokenizer=letters)}"
    dense = "--reward_terms=score,dense_reward_model"
    cases = [
      (["--reward_terms=score,length"], "must be some of score.*each once"),
      (["--reward_terms=score,score"], "each once, got score,score"),
      (["--reward_terms="], "each once, got none"),
      (["--reward_terms=reward_model"], "need each other, got none"),
      ([model], "need each other.* and score"),
      (["--critic=branch"], "such as branch:4, got branch"),
      (["--critic=branch:0"], "such as branch:4, got branch:0"),
      (["--unfinished_score=nan"], "must be a finite number.* got nan"),
      (
        ["--reward_terms=reward_model", model, "--unfinished_score=-1"],
        "stands in for the score",
      ),
      (["--unfinished_score=0", "--nostop_at_eos"], "as all do without"),
      ([dense, several], "one label; .* has LABEL_0, LABEL_1"),
      ([dense, other], "another vocabulary than --policy=.*reads texts"),
      (
        ["--task=arithmetic", "--task_options=", "--reward_terms=steps"],
        "say step_matches.* of this one are is_correct",
      ),
    ]
    workdir = scripts.scratch() / "bad"
    runs = [[workdir, *TINY, policy, *flags] for flags, _ in cases]
    errors = scripts.drive(PPO, runs)
    for (flags, message), error in zip(cases, errors, strict=True):
      with self.subTest(flags[-1]):
        self.assertIsNotNone(error, flags)
        self.assertRegex(
          error, f"^(ValueError|IllegalFlagValueError): .*{message}"
        )


if __name__ == "__main__":
  absltest.main()
