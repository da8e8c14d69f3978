"""Packed rows give the losses and gradients of rows by themselves."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from rljax.generation import packed, rollouts
from rljax.losses import preference, supervised
from rljax.models import classifier, heads
from rljax.text import batches, packing
from rljax.training import microbatch
from tests import tiny

# Prompts and responses; of the last but one row there is no response.
COUNTS = ((3, 6), (1, 1), (5, 2), (2, 9), (4, 3), (1, 4), (2, 0), (6, 5))


@functools.cache
def _model(name):
  config = tiny.gpt2_config() if name == "gpt2" else tiny.llama_config()
  model = tiny.model(config)
  ids = jnp.ones((1, 2), jnp.int32)
  return model, model.init(jax.random.key(0), ids, ids > 0)["params"]


@functools.cache
def _batch(parts=1):
  """Eight replies, and the same beside packed rows."""
  rng = np.random.default_rng(0)
  draw = lambda size: rng.integers(0, 40, size).tolist()
  batch = batches.supervised_batch([(draw(p), draw(t)) for p, t in COUNTS])
  pack = packing.plan(
    *(20, [np.array(COUNTS).T]), num_parts=parts, multiple=parts
  )
  return batch, pack(batch)


def _nll(normalizer, model, params, batch):
  statistics, _ = rollouts.token_statistics(
    model, params, batch, temperature=1.0, chunk_size=4
  )
  return supervised.nll_loss(
    statistics.log_probs, batch["response_mask"], normalizer=normalizer
  )


def _dpo(model, params, batch):
  """The sums of four pairs of replies."""
  statistics, _ = rollouts.token_statistics(
    model, params, packed.texts(batch), temperature=1.0
  )
  mask = batch["response_mask"]
  log_probs = statistics.log_probs.reshape(mask.shape)
  return preference.dpo_loss(log_probs, log_probs - 0.1, mask, beta=0.5)


LOSSES = {
  "token_mean": functools.partial(_nll, "token_mean"),
  "sequence_mean": functools.partial(_nll, "sequence_mean"),
  "dpo": _dpo,
}


class PackedTest(parameterized.TestCase):
  @parameterized.product(name=("gpt2", "llama"), loss=tuple(LOSSES))
  def test_loss_and_gradient(self, name, loss):
    model, params = _model(name)
    plain, joined = _batch()
    self.assertLessEqual(joined["packed_ids"].size, 8 * 15 // 2)
    if loss == "dpo":
      pair = lambda x: x.reshape(4, 2, -1)
      plain, joined = (
        {n: x if n in packed.ROWS else pair(x) for n, x in batch.items()}
        for batch in (plain, joined)
      )
    function = jax.jit(
      jax.value_and_grad(functools.partial(LOSSES[loss], model), has_aux=True)
    )
    (value, metrics), grads = function(params, plain)
    (other, found), others = function(params, joined)
    np.testing.assert_allclose(other, value, rtol=1e-5)
    jax.tree.map(
      functools.partial(np.testing.assert_allclose, atol=1e-6, rtol=1e-4),
      (others, found),
      (grads, metrics),
    )

  def test_micro_batches(self):
    model, params = _model("llama")
    loss = functools.partial(_nll, "token_mean", model)
    weigh = lambda part: part["response_mask"].sum()
    of = lambda batch, parts: jax.jit(
      microbatch.grad(loss, parts, weigh=weigh)
    )(params, batch)
    jax.tree.map(
      functools.partial(np.testing.assert_allclose, atol=1e-6, rtol=1e-4),
      of(_batch(2)[1], 2),
      of(_batch()[0], 1),
    )

  def test_hidden_states(self):
    model, params = _model("gpt2")
    plain, joined = (
      rollouts.response_hidden(model, params, batch) for batch in _batch()
    )
    mask = _batch()[0]["response_mask"]
    np.testing.assert_allclose(joined[mask], plain[mask], atol=1e-5)
    self.assertFalse(np.any(joined[~mask]))

  def test_logits_of_a_classifier(self):
    backbone, params = _model("llama")
    model = classifier.CausalClassifier(
      classifier.CausalClassifierConfig(backbone.config, ("a",))
    )
    head = heads.LabelHead(1).init(
      jax.random.key(1), jnp.ones((1, 1, 16)), jnp.ones((1, 1), bool)
    )
    params = {"backbone": params, "score": head["params"]}
    plain, joined = _batch()
    has_text = plain["response_mask"].any(axis=1)
    for function, chosen in (
      (rollouts.prefix_logits, plain["response_mask"]),
      (rollouts.text_logits, has_text),
    ):
      one, other = (function(model, params, x) for x in (plain, joined))
      self.assertGreater(np.std(one[chosen]), 1e-3)
      np.testing.assert_allclose(other[chosen], one[chosen], atol=1e-5)

  def test_tokens_allowed_by_position(self):
    model, params = _model("gpt2")
    batch = _batch()[1] | {"allowed": np.ones((8, 9, 40), bool)}
    with self.assertRaisesRegex(ValueError, "allowed by position"):
      rollouts.token_statistics(model, params, batch, temperature=1.0)


if __name__ == "__main__":
  absltest.main()
