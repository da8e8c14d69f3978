"""PPO, GRPO and evaluation within the grammar of a task."""

import functools
import importlib.util

import pytest
from absl.testing import absltest

from rljax.models import gpt2, hf
from rljax.tasks import games
from tests import scripts, tiny

pytestmark = pytest.mark.skipif(
  importlib.util.find_spec("ludax") is None,
  reason='needs ludax: pip install -e ".[games]"',
)

PPO = "experiments/ppo.py"
GRPO = "experiments/grpo.py"
EVALUATE = "experiments/evaluate.py"
SHORT = (
  "--task=games",
  "--score_options=max_sites=1",  # No board is so small: nothing is compiled.
  "--max_length=24",
  "--max_prompt_length=128",
  "--stop_at_eos",
  "--constraint=grammar",
)
PPO_FLAGS = (
  *SHORT,
  "--task_options=max_words=126,max_gap=23",
  "--num_prompts=32",
  "--num_eval_prompts=10",
  "--batch_size=8",
  "--num_samples=2",
  "--minibatch_size=8",
  "--micro_batch_size=4",
  "--chunk_size=10",
  "--steps=3",
  "--eval_every=3",
  "--samples_every=1",
  "--learning_rate=1e-3",
)


def setUpModule():
  scripts.without_pictures()


def tearDownModule():
  scripts.remove_scratch()


@functools.cache
def policy():
  tokenizer = games.grammar_tokenizer()
  # Some tokens more than the tokenizer has.
  config = tiny.gpt2_config(vocab_size=384, max_positions=160)
  folder = scripts.scratch() / "policy"
  hf.save(folder, gpt2.GPT2(config), tiny.params(config), tokenizer)
  return folder


class ConstraintTest(absltest.TestCase):
  def test_ppo(self):
    workdir = scripts.scratch() / "ppo"
    # Its preflight is strict: the trainer must find the sampler's numbers.
    scripts.run(PPO, workdir, *PPO_FLAGS, f"--policy={policy()}", devices=2)
    finished = unfinished = 0
    for row in scripts.rows(workdir, "samples.jsonl"):
      # Others may be whole, with no room for the end token.
      if row["finished"]:
        self.assertTrue(row["parts"]["parses"], row)
      finished += row["finished"]
      unfinished += not row["finished"]
    self.assertGreater(finished, 5)
    self.assertGreater(unfinished, 0)
    rows = scripts.rows(workdir, "metrics.jsonl")
    self.assertLess(rows[0]["sampler/log_prob_gap"], 1e-4)
    self.assertGreater(rows[-1]["eval/parses"], 0)

  @pytest.mark.slow
  def test_grpo(self):
    workdir = scripts.scratch() / "grpo"
    # Groups of several rounds, each token with those that it was drawn from.
    scripts.run(
      *(GRPO, workdir, *SHORT, f"--policy={policy()}", "--algorithm=dapo"),
      *("--task_options=max_words=126,max_gap=23", "--num_prompts=32"),
      *("--num_eval_prompts=4", "--batch_size=4", "--num_samples=4"),
      *("--max_sampling_rounds=2", "--overlong_buffer=8", "--steps=2"),
      *("--micro_batch_size=8", "--samples_every=1", "--learning_rate=1e-3"),
      devices=2,
    )
    rows = scripts.rows(workdir, "metrics.jsonl")
    self.assertLess(rows[0]["sampler/log_prob_gap"], 1e-4)
    samples = scripts.rows(workdir, "samples.jsonl")
    finished = [row for row in samples if row["finished"]]
    self.assertNotEmpty(finished)
    for row in finished:
      self.assertTrue(row["parts"]["parses"], row)

  def test_evaluation(self):
    # What a policy that knows nothing reaches, with the grammar and without.
    parses = {}
    for constraint in ("grammar", "none"):
      workdir = scripts.scratch() / f"evaluation_{constraint}"
      scripts.run(
        EVALUATE,
        workdir,
        *SHORT,
        f"--constraint={constraint}",
        "--task_options=max_words=126,max_gap=23",
        f"--policies=one={policy()}",
        "--num_prompts=12",
        "--batch_size=8",
        "--metrics=text",
        "--nogreedy",
      )
      rows = scripts.rows(workdir, "samples.jsonl")
      parses[constraint] = sum(row["parts"]["parses"] for row in rows)
    self.assertGreater(parses["grammar"], 3)
    self.assertEqual(parses["none"], 0)

  def test_errors(self):
    for flags, message in (
      (["--nostop_at_eos"], "it needs --stop_at_eos"),
      (["--batch_entropy_coef=0.1"], "neither with --batch_entropy_coef"),
      (["--nomask_in_loss"], "nor with --nomask_in_loss"),
    ):
      done = scripts.run(
        PPO,
        scripts.scratch() / "refused",
        *PPO_FLAGS,
        f"--policy={policy()}",
        *flags,
        ok=False,
      )
      self.assertNotEqual(done.returncode, 0)
      self.assertIn(message, done.stderr)

  def test_task_without_a_grammar(self):
    done = scripts.run(
      PPO,
      scripts.scratch() / "refused",
      f"--policy={policy()}",
      "--task=arithmetic",
      "--stop_at_eos",
      "--constraint=grammar",
      ok=False,
    )
    self.assertIn("The task arithmetic has no grammar", done.stderr)


if __name__ == "__main__":
  absltest.main()
