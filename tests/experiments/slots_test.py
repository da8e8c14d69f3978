"""Slots and length buckets in a script: the same samples, and the same loss."""

import numpy as np
import pytest
from absl.testing import absltest

from tests import scripts
from tests.experiments import grpo_test


def setUpModule():
  scripts.without_pictures()


def tearDownModule():
  scripts.remove_scratch()


@pytest.mark.slow
class SlotsTest(absltest.TestCase):
  def test_grpo(self):
    flags = (
      *grpo_test.TINY,
      "--steps=2",
      "--eval_every=2",
      "--samples_every=1",
      "--micro_batch_size=4",
    )
    rows, losses = [], []
    for name, more in {
      "plain": (),
      "few": ("--slots=3", "--length_buckets=2"),
    }.items():
      workdir = scripts.scratch() / f"slots-{name}"
      scripts.run(grpo_test.GRPO, workdir, *flags, grpo_test._policy(), *more)
      rows.append(scripts.rows(workdir, "samples.jsonl"))
      losses.append([x["loss"] for x in scripts.rows(workdir) if "loss" in x])
    plain, few = (
      [(x["prompt"], x["response"], x["response_ids"]) for x in some]
      for some in rows
    )
    self.assertEqual(few, plain)
    self.assertGreater(len({text for _, text, _ in plain}), 3)
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-3, atol=1e-5)


if __name__ == "__main__":
  absltest.main()
