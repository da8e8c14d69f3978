"""Samples as rows of a file."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest

from rljax.generation import responses, rollouts
from rljax.ops import sampling
from tests import stand_in


def _rollout(model, params, *, num_samples=2, max_length=4, **options):
  rng = np.random.default_rng(0)
  lengths = np.array([1, 3, 2])
  mask = jnp.asarray(np.arange(3)[None] >= 3 - lengths[:, None])
  vocab = model.config.vocab_size
  ids = jnp.asarray(rng.integers(0, vocab, (3, 3)), jnp.int32)
  return rollouts.sample(
    jax.random.key(0),
    model,
    params,
    ids,
    mask,
    max_length=max_length,
    settings=options.pop("settings", sampling.Settings()),
    num_samples=num_samples,
    **options,
  )


class RecordsTest(absltest.TestCase):
  def test_records_hold_what_offline_scripts_read(self):
    params = stand_in.random_params(np.random.default_rng(0))
    rollout = _rollout(stand_in.model(), params, stop_ids=(3,), pad_id=3)
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
