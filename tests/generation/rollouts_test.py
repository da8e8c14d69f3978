"""Tests of rollouts: alignment, statistics, records."""

import functools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from rljax.distributed import meshes
from rljax.generation import rollouts
from rljax.models import classifier
from rljax.ops import sampling
from tests import stand_in, tiny


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


class RolloutTest(parameterized.TestCase):
  def test_prompts_stand_beside_their_samples(self):
    params = stand_in.random_params(np.random.default_rng(0))
    rollout = _rollout(stand_in.model(), params, num_samples=2)
    self.assertEqual(rollout.prompt_ids.shape, (6, 3))
    np.testing.assert_array_equal(
      rollout.prompt_ids[0::2], rollout.prompt_ids[1::2]
    )
    self.assertEqual(rollout.response_ids.shape, (6, 4))

  def test_hidden_is_what_the_token_was_drawn_from(self):
    # The stand-in's hidden state is its row of logits: known without a model.
    params = stand_in.random_params(np.random.default_rng(0))
    model = stand_in.model()
    rollout = _rollout(model, params)
    hidden = rollouts.response_hidden(model, params, rollout)
    table = np.asarray(params["table"])
    for row in range(6):
      position = int(rollout.prompt_mask[row].sum()) - 1
      token = int(rollout.prompt_ids[row, -1])
      for t in range(4):
        np.testing.assert_allclose(hidden[row, t], table[position, token])
        position, token = position + 1, int(rollout.response_ids[row, t])

  @parameterized.parameters((None,), (1,), (3,))
  def test_trainer_says_what_the_sampler_said(self, chunk_size):
    config = tiny.llama_config()
    model, params = tiny.model(config), tiny.params(config)
    allowed = jnp.arange(config.vocab_size) % 3 != 0
    settings = sampling.Settings(temperature=0.8)
    rollout = _rollout(
      model, params, settings=settings, allowed=allowed, stop_ids=(4,)
    )
    statistics, hidden = rollouts.token_statistics(
      model,
      params,
      rollout,
      temperature=0.8,
      allowed=allowed,
      chunk_size=chunk_size,
    )
    gap = np.where(
      rollout.response_mask, statistics.log_probs - rollout.log_probs, 0.0
    )
    self.assertLess(np.abs(gap).max(), 1e-5)
    self.assertEqual(hidden.shape, (6, 4, config.hidden_size))
    # Without the sampler's mask it would be another distribution.
    other, _ = rollouts.token_statistics(
      model, params, rollout, temperature=0.8, chunk_size=chunk_size
    )
    gap = np.where(
      rollout.response_mask, other.log_probs - rollout.log_probs, 0.0
    )
    self.assertGreater(np.abs(gap).max(), 0.01)

  def test_statistics_of_a_plain_dict(self):
    params = stand_in.random_params(np.random.default_rng(0))
    model = stand_in.model()
    rollout = _rollout(model, params)
    names = ("prompt_ids", "prompt_mask", "response_ids", "response_mask")
    statistics, _ = rollouts.token_statistics(
      model, params, {name: rollout[name] for name in names}, temperature=1.0
    )
    np.testing.assert_allclose(
      statistics.log_probs, rollout.log_probs, rtol=1e-5
    )

  def test_whole_text_and_its_responses(self):
    config = tiny.gpt2_config()
    model, params = tiny.model(config), tiny.params(config)
    rollout = _rollout(model, params, stop_ids=(4,))
    hidden, mask = rollouts.text_hidden(model, params, rollout)
    self.assertEqual(hidden.shape, (6, 3 + 4 - 1, config.hidden_size))
    np.testing.assert_array_equal(mask[:, :3], rollout.prompt_mask)
    np.testing.assert_array_equal(mask[:, 3:], rollout.response_mask[:, :-1])
    of_responses = rollouts.at_responses(hidden, rollout)
    np.testing.assert_array_equal(
      of_responses, rollouts.response_hidden(model, params, rollout)
    )
    # Handed in, they are not computed again.
    known, found = rollouts.token_statistics(
      model, params, rollout, temperature=1.0, hidden=2.0 * of_responses
    )
    np.testing.assert_array_equal(found, 2.0 * of_responses)
    own, _ = rollouts.token_statistics(model, params, rollout, temperature=1.0)
    self.assertGreater(np.abs(known.log_probs - own.log_probs).max(), 0.01)

  def test_classifier_reads_up_to_each_token(self):
    config = tiny.gpt2_config()
    policy, params = tiny.model(config), tiny.params(config)
    rollout = _rollout(policy, params, stop_ids=(4,))
    model = classifier.CausalClassifier(
      classifier.CausalClassifierConfig(config, ("right",))
    )
    kernel = jnp.float32(np.random.default_rng(2).normal(size=(16, 1)))
    judge = {"backbone": params, "score": {"kernel": kernel}}
    read = jax.jit(functools.partial(rollouts.prefix_logits, model))
    logits = read(judge, rollout)
    self.assertEqual(logits.shape, (6, 4, 1))
    whole = jax.jit(lambda ids, mask: model.apply({"params": judge}, ids, mask))
    ids, mask = (
      np.concatenate([rollout[f"prompt_{x}"], rollout[f"response_{x}"]], axis=1)
      for x in ("ids", "mask")
    )
    for t in range(4):
      # The text that ends with token t, and nothing behind it.
      expected = whole(ids, mask & (np.arange(7) <= 3 + t))
      is_real = rollout.response_mask[:, t]
      np.testing.assert_allclose(
        logits[is_real, t], expected[is_real], atol=2e-5
      )

  @parameterized.parameters(2, 3, 6)
  def test_parts_of_a_batch(self, num_parts):
    params = stand_in.random_params(np.random.default_rng(0))
    model = stand_in.model()
    rollout = _rollout(model, params)

    @functools.partial(jax.jit, static_argnums=0)
    def read(num_parts):
      return rollouts.in_parts(
        lambda part: rollouts.token_statistics(
          model, params, part, temperature=1.0
        ),
        rollout,
        num_parts,
      )

    chex.assert_trees_all_close(read(num_parts), read(1), rtol=1e-6)

  def test_parts_on_a_mesh_take_less_memory(self):
    mesh = meshes.make("data:8")
    sharding = meshes.batch_sharding(mesh)
    rows = meshes.shard_batch(np.arange(64.0)[:, None], mesh)

    def read(part):
      self.assertEqual(part.shape[1], 1)
      spread = jnp.sin(part * jnp.arange(2.0**12)[None])  # [rows, 4096]
      return jnp.sort(spread, axis=1)[:, 0]

    memory, found = [], []
    for num_parts in (1, 8):
      part = functools.partial(
        rollouts.in_parts, read, num_parts=num_parts, sharding=sharding
      )
      compiled = jax.jit(part).lower(rows).compile()
      memory.append(compiled.memory_analysis().temp_size_in_bytes)
      found.append(compiled(rows))
    np.testing.assert_allclose(*found, rtol=1e-6)
    self.assertLess(memory[1], memory[0] / 6)
    self.assertTrue(found[1].sharding.is_equivalent_to(sharding, 1))

  def test_wrong_shapes_are_told(self):
    params = stand_in.random_params(np.random.default_rng(0))
    rollout = _rollout(stand_in.model(), params)
    bad = rollout.replace(response_mask=rollout.response_mask[:, :-1])
    with self.assertRaises(AssertionError):
      rollouts.response_hidden(stand_in.model(), params, bad)

  def test_records_hold_what_offline_scripts_read(self):
    params = stand_in.random_params(np.random.default_rng(0))
    rollout = _rollout(stand_in.model(), params, stop_ids=(3,), pad_id=3)
    rows = rollouts.records(
      rollout,
      [f"p{i}" for i in range(6)],
      [f"r{i}" for i in range(6)],
      np.arange(6.0),
      [{"is_correct": True}] * 6,
      settings=sampling.Settings(),
      policy_step=7,
    )
    rows = [json.loads(json.dumps(row)) for row in rows]
    for i, row in enumerate(rows):
      self.assertEqual((row["prompt"], row["response"]), (f"p{i}", f"r{i}"))
      self.assertEqual(row["reward"], i)
      self.assertEqual(row["policy_step"], 7)
      length = int(rollout.response_mask[i].sum())
      self.assertLen(row["response_ids"], length)
      np.testing.assert_allclose(
        row["log_probs"], rollout.log_probs[i, :length], rtol=1e-6
      )
    with self.assertRaises(ValueError):
      rollouts.records(
        rollout, ["p"], ["r", "s"], [0.0], [{}],
        settings=sampling.Settings(), policy_step=0,
      )  # fmt: skip


if __name__ == "__main__":
  absltest.main()
