"""Tests of rollouts: alignment, statistics, records."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from rljax.generation import rollouts
from rljax.models import classifier
from rljax.ops import sampling
from tests import stand_in, tiny
from tests.generation import drawing


class RolloutTest(parameterized.TestCase):
  def test_prompts_stand_beside_their_samples(self):
    params = stand_in.random_params(np.random.default_rng(0))
    rollout = drawing.rollout(stand_in.model(), params, num_samples=2)
    self.assertEqual(rollout.prompt_ids.shape, (6, 3))
    np.testing.assert_array_equal(
      rollout.prompt_ids[0::2], rollout.prompt_ids[1::2]
    )
    self.assertEqual(rollout.response_ids.shape, (6, 4))

  def test_hidden_is_what_the_token_was_drawn_from(self):
    # The stand-in's hidden state is its row of logits: known without a model.
    params = stand_in.random_params(np.random.default_rng(0))
    model = stand_in.model()
    rollout = drawing.rollout(model, params)
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
    rollout = drawing.rollout(
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
    rollout = drawing.rollout(model, params)
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
    rollout = drawing.rollout(model, params, stop_ids=(4,))
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
    rollout = drawing.rollout(policy, params, stop_ids=(4,))
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

  def test_wrong_shapes_are_told(self):
    params = stand_in.random_params(np.random.default_rng(0))
    rollout = drawing.rollout(stand_in.model(), params)
    bad = rollout.replace(response_mask=rollout.response_mask[:, :-1])
    with self.assertRaises(AssertionError):
      rollouts.response_hidden(stand_in.model(), params, bad)


if __name__ == "__main__":
  absltest.main()
