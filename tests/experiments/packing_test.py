"""--packed_length in the scripts that have it, run as a user runs them."""

import functools
import shutil

import numpy as np
from absl.testing import absltest, parameterized

from tests import scripts

SFT = "experiments/sft.py"
SHAPE = (
  *("--batch_size=8", "--steps=4", "--save_every=2", "--eval_every=100"),
  # What is rounding in a gradient of 0 must not become a step.
  *("--learning_rate=1e-3", "--adam_epsilon=1e-4"),
)
DATA = (
  *("--task=word_lists", "--task_options=num=32"),
  *("--max_prompt_length=8", "--max_response_length=12"),
)
LOG = (*DATA, *SHAPE, "--num_dev_prompts=8", "--sample_batch_size=8")
# One micro-batch and two; the devices share the rows.
PACKED = ("--packed_length=48", "--mesh=data:2", "--micro_batch_size=4")
RUNS = {
  "sft": (SFT, "--policy={}", "--task=word_lists", *SHAPE),
  "r_lol": (
    *("experiments/offline.py", "--policy={}", "--algorithm=r_lol", *LOG),
    "--scale_steps=false",
  ),
  "dpo": ("experiments/preference.py", "--policy={}", *LOG),
  "kto": (
    *("experiments/preference.py", "--policy={}", "--algorithm=kto"),
    *("--undesirable_weight=0.01", *LOG),
  ),
  "pairwise": (
    *("experiments/outcome_reward_model.py", "--policy={}", *DATA, *SHAPE),
    "--num_eval_rows=16",
  ),
}


def setUpModule():
  scripts.without_pictures()


def tearDownModule():
  scripts.remove_scratch()


@functools.cache
def _policy():
  workdir = scripts.scratch() / "policy"
  scripts.run(
    *(SFT, workdir, "--task=word_lists", "--steps=10", "--num_layers=1"),
    *("--hidden_size=32", "--max_positions=32", "--learning_rate=3e-3"),
    "--num_eval_prompts=16",
  )
  return workdir


@functools.cache
def _runs(name):
  """Folders of the run without packing, and with it, whose checks passed."""
  script, *flags = RUNS[name]
  flags = [flag.format(_policy()) for flag in flags]
  plain, packed = (scripts.scratch() / f"{name}-{x}" for x in ("plain", "rows"))
  errors = scripts.drive(
    script,
    [
      [plain, *flags],
      [packed, *flags, *PACKED, "--preflight=strict"],
    ],
    devices=2,
  )
  assert errors == [None, None], errors
  return plain, packed


class PackedLengthTest(parameterized.TestCase):
  @parameterized.parameters(*RUNS)
  def test_learns_the_same(self, name):
    plain, packed = _runs(name)
    self.assertLess(scripts.largest_gap(plain, packed), scripts.ROUNDING)
    losses = [
      [x for row in scripts.rows(run) for k, x in row.items() if "loss" in k]
      for run in (plain, packed)
    ]
    np.testing.assert_allclose(*losses, rtol=1e-4, atol=1e-5)
    self.assertGreater(np.ptp(losses[0]), 1e-4)  # Something is learnt.

  def test_goes_on_bit_for_bit(self):
    _, packed = _runs("sft")
    again = scripts.scratch() / "again"
    shutil.copytree(packed, again)
    shutil.rmtree(again / "checkpoints" / "4")
    script, *flags = RUNS["sft"]
    flags = [flag.format(_policy()) for flag in flags]
    scripts.run(
      *(script, again, *flags, *PACKED, "--preflight=strict"), devices=2
    )
    self.assertEqual(scripts.fingerprint(packed), scripts.fingerprint(again))

  def test_rows_that_are_too_short(self):
    script, *flags = RUNS["sft"]
    flags = [flag.format(_policy()) for flag in flags]
    (error,) = scripts.drive(
      script, [[scripts.scratch() / "short", *flags, "--packed_length=4"]]
    )
    self.assertRegex(error, "--packed_length=4 is less than the [0-9]+ tokens")


if __name__ == "__main__":
  absltest.main()
