"""A language model whose every logit is known: a look-up in a table."""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Config:
  vocab_size: int
  hidden_size: int
  num_layers: int = 1
  max_positions: int = 1024


class TableModel(nn.Module):
  """`logits = table[position of the token, token]`.

  The hidden state is the row of logits itself, so `logits` is the identity.
  Follows the protocol of `rljax.models`.
  """

  config: Config

  def setup(self):
    shape = (
      self.config.max_positions,
      self.config.vocab_size,
      self.config.vocab_size,
    )
    self.table = self.param("table", nn.initializers.normal(2.0), shape)

  def __call__(self, ids, mask):
    return self.table[_positions(mask), ids]

  def prefill(self, ids, mask, num_samples, response_length):
    del response_length
    lengths = jnp.repeat(jnp.sum(mask, axis=1, dtype=jnp.int32), num_samples)
    return self(ids, mask), {"lengths": lengths, "step": jnp.zeros((), int)}

  def decode(self, ids, cache):
    position = cache["lengths"] + cache["step"]
    return self.table[position, ids], {**cache, "step": cache["step"] + 1}

  def logits(self, hidden):
    return hidden


def _positions(mask):
  return jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)


def model(vocab_size=7, max_positions=32):
  return TableModel(Config(vocab_size, vocab_size, max_positions=max_positions))


def params(table):
  return {"table": jnp.asarray(table, jnp.float32)}


def random_params(rng, vocab_size=7, max_positions=32, scale=2.0):
  shape = (max_positions, vocab_size, vocab_size)
  return params(scale * rng.normal(size=shape))
