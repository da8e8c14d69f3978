"""Scripts with optimizers and parameters that take less memory."""

import jax
import jax.numpy as jnp
from absl.testing import absltest, parameterized

from rljax.storage import checkpoint
from tests import scripts

SFT = "experiments/sft.py"
TINY = (
  *scripts.LEARN_SUMS,
  "--num_examples=64",
  "--num_eval_prompts=32",
  "--batch_size=32",
  "--micro_batch_size=16",
  "--hidden_size=128",
  "--num_layers=1",
  "--vocab_size=128",
  "--schedule=constant",
  "--eval_every=2",
  "--preflight=strict",
)
SMALL = ("--param_dtype=bfloat16", "--moment_dtype=bfloat16")


def setUpModule():
  scripts.without_pictures()


def tearDownModule():
  scripts.remove_scratch()


class OptimizersTest(parameterized.TestCase):
  def test_learn_and_go_on(self):
    folder = scripts.scratch()
    runs = {
      "adafactor": ("--optimizer=adafactor", *SMALL, "--steps=6"),
      "muon": ("--optimizer=muon", *SMALL, "--steps=6"),
      "whole": (*SMALL, "--steps=6"),
      "parts": (*SMALL, "--steps=3"),
    }
    for name, flags in runs.items():
      runs[name] = [folder / name, *TINY, *flags]
    again = [folder / "parts", *TINY, *SMALL, "--steps=6"]
    errors = scripts.drive(SFT, [*runs.values(), again])
    self.assertEqual(errors, [None] * 5)
    for name in runs:
      losses = [
        row["eval/loss"]
        for row in scripts.rows(folder / name)
        if "eval/loss" in row
      ]
      self.assertLess(losses[-1], losses[0] - 0.1, name)
    params = checkpoint.restore_params(folder / "whole")
    for x in jax.tree.leaves(params):
      self.assertEqual(x.dtype, jnp.bfloat16)
    self.assertEqual(
      scripts.fingerprint(folder / "whole"),
      scripts.fingerprint(folder / "parts"),
    )

  def test_settings_of_another_optimizer(self):
    with self.assertRaisesRegex(Exception, "has no --adam_b1"):
      scripts.parse_flags(
        SFT, ["--workdir=x", "--optimizer=adafactor", "--adam_b1=0.5"]
      )


if __name__ == "__main__":
  absltest.main()
