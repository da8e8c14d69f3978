"""Samples as rows of a file."""

import dataclasses
import json

import numpy as np
from absl.testing import absltest

from rljax.generation import responses
from tests import stand_in
from tests.generation import drawing


class RecordsTest(absltest.TestCase):
  def test_records_hold_what_offline_scripts_read(self):
    params = stand_in.random_params(np.random.default_rng(0))
    rollout = drawing.rollout(stand_in.model(), params, stop_ids=(3,), pad_id=3)
    samples = responses.Samples(
      rollout=rollout,
      prompts=[f"p{i}" for i in range(6)],
      texts=[f"r{i}" for i in range(6)],
      scores=np.arange(6.0),
      parts=[{"is_correct": True}] * 6,
      settings=responses.Settings(max_length=4, top_k=3),
      policy_step=7,
      tokenizer=None,
    )
    rows = samples.records()
    rows = [json.loads(json.dumps(row)) for row in rows]
    for i, row in enumerate(rows):
      self.assertEqual((row["prompt"], row["response"]), (f"p{i}", f"r{i}"))
      self.assertEqual(row["reward"], i)
      self.assertEqual(row["policy_step"], 7)
      self.assertEqual((row["temperature"], row["top_k"]), (1.0, 3))
      length = int(rollout.response_mask[i].sum())
      self.assertLen(row["response_ids"], length)
      np.testing.assert_allclose(
        row["log_probs"], rollout.log_probs[i, :length], rtol=1e-6
      )
    with self.assertRaises(ValueError):
      dataclasses.replace(samples, texts=["r", "s"]).records()


if __name__ == "__main__":
  absltest.main()
