"""Tests of attention over padded rows and from the cache."""

import math

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized
from hypothesis import strategies as st

from rljax.models import attention


def _oracle(queries, keys, values, mask):
  """Attention by loops over rows, heads and queries, in float64."""
  queries, keys, values = (
    np.asarray(x, np.float64) for x in (queries, keys, values)
  )
  batch, length, num_heads, width = queries.shape
  group = num_heads // keys.shape[2]
  out = np.full(queries.shape, np.nan)
  for b in range(batch):
    for h in range(num_heads):
      for s in range(length):
        seen = [t for t in range(s + 1) if mask[b, t]]
        if not seen:
          continue
        scores = np.array(
          [
            np.dot(queries[b, s, h], keys[b, t, h // group]) / math.sqrt(width)
            for t in seen
          ]
        )
        weights = np.exp(scores - scores.max())
        weights /= weights.sum()
        out[b, s, h] = sum(
          w * values[b, t, h // group]
          for w, t in zip(weights, seen, strict=True)
        )
  return out


def _arrays(seed, batch=3, length=7, num_heads=4, num_kv_heads=2, width=6):
  """Random queries, keys, values and a mask with padding anywhere."""
  rng = np.random.default_rng(seed)
  queries = rng.normal(size=(batch, length, num_heads, width)) * 2
  keys = rng.normal(size=(batch, length, num_kv_heads, width)) * 2
  values = rng.normal(size=(batch, length, num_kv_heads, width))
  mask = rng.random((batch, length)) < 0.7
  return *(jnp.float32(x) for x in (queries, keys, values)), jnp.asarray(mask)


class PositionsTest(parameterized.TestCase):
  @chex.variants(with_jit=True, without_jit=True)
  def test_hand_computed(self):
    padded = [[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [0, 1, 1, 0, 0]]
    whole_and_empty = [[1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]
    mask = jnp.array(padded + whole_and_empty) > 0
    positions = self.variant(attention.positions)(mask)
    self.assertEqual(positions.dtype, jnp.int32)
    np.testing.assert_array_equal(
      positions,
      [
        [0, 0, 0, 1, 2],
        [0, 1, 2, 2, 2],
        [0, 0, 1, 1, 1],
        [0, 1, 2, 3, 4],
        [0, 0, 0, 0, 0],
      ],
    )

  def test_what_is_seen_by_hand(self):
    allowed = attention.seen(jnp.array([[False, True, True]]))
    np.testing.assert_array_equal(allowed, [[[0, 0, 0], [0, 1, 0], [0, 1, 1]]])


class AttendTest(parameterized.TestCase):
  @hypothesis.given(seed=st.integers(0, 2**32 - 1))
  def test_matches_oracle(self, seed):
    queries, keys, values, mask = _arrays(seed)
    found = jax.jit(attention.attend)(queries, keys, values, mask)
    expected = _oracle(queries, keys, values, mask)
    sees = ~np.isnan(expected)
    np.testing.assert_allclose(found[sees], expected[sees], atol=1e-5)
    self.assertTrue(np.isfinite(found).all())

  def test_no_nan_gradient_in_a_padded_row(self):
    queries, keys, values, mask = _arrays(0)
    mask = mask.at[0].set(False)
    gradients = jax.grad(
      lambda *args: jnp.sum(attention.attend(*args, mask)[1:]),
      argnums=(0, 1, 2),
    )(queries, keys, values)
    for gradient in gradients:
      self.assertTrue(np.isfinite(gradient).all())
      np.testing.assert_array_equal(gradient[0], 0)

  @hypothesis.given(seed=st.integers(0, 2**32 - 1))
  def test_from_the_cache_matches_oracle(self, seed):
    queries, keys, values, mask = _arrays(seed, batch=4)
    # Two prompts of 4 columns, each continued by two rows of 3 tokens.
    columns, samples = 4, 2
    prompt_mask = mask[::samples, :columns]
    whole = {}
    for name, x in (("keys", keys), ("values", values)):
      prompts = jnp.repeat(x[::samples, :columns], samples, axis=0)
      whole[name] = jnp.concatenate([prompts, x[:, columns:]], axis=1)
    whole_mask = np.ones((4, 7), bool)
    whole_mask[:, :columns] = np.repeat(prompt_mask, samples, axis=0)
    expected = _oracle(queries, whole["keys"], whole["values"], whole_mask)

    cache = attention.start_cache(
      prompt_mask,
      [(keys[::samples, :columns], values[::samples, :columns])],
      num_samples=samples,
      response_length=3,
    )
    (layer,) = cache["layers"]
    for step in range(3):
      t = columns + step
      found, layer = _attend_cached(
        queries[:, t],
        keys[:, t],
        values[:, t],
        layer,
        prompt_mask,
        jnp.int32(step),
      )
      np.testing.assert_allclose(found, expected[:, t], atol=1e-5)
    np.testing.assert_array_equal(
      layer["keys"], keys[:, columns:].swapaxes(1, 2)
    )

  def test_a_sampler_rounds_what_a_trainer_rounds(self):
    queries, keys, values, _ = _arrays(0, batch=4, length=65)
    arrays = [x.astype(jnp.bfloat16) for x in (queries, keys, values)]
    mask = jnp.ones((4, 65), bool)
    prompt = mask[:, :-1]
    cache = attention.start_cache(
      prompt,
      [(arrays[1][:, :-1], arrays[2][:, :-1])],
      num_samples=1,
      response_length=1,
    )
    whole = attention.attend(*arrays, mask)[:, -1]
    last, _ = attention.attend_cached(
      *(x[:, -1] for x in arrays), cache["layers"][0], prompt, cache["step"]
    )
    # Sums of the same numbers fall on two sides of a half now and then; other
    # numbers do so in half of all places.
    self.assertLess(np.mean(np.asarray(whole != last)), 0.05)

  def test_cache_starts_empty(self):
    _, keys, values, mask = _arrays(3)
    cache = attention.start_cache(
      mask, [(keys, values)] * 2, num_samples=5, response_length=9
    )
    self.assertLen(cache["layers"], 2)
    chex.assert_shape(cache["layers"][0]["keys"], (15, 2, 9, 6))
    chex.assert_shape(cache["layers"][0]["prompt_values"], (3, 2, 7, 6))
    np.testing.assert_array_equal(cache["prompt_lengths"], np.sum(mask, axis=1))
    self.assertEqual(cache["step"], 0)

  @parameterized.parameters(
    ({"num_samples": 0, "response_length": 1}, "num_samples must be positive"),
    ({"num_samples": 1, "response_length": 0}, "response_length must be pos"),
  )
  def test_bad_sizes(self, sizes, message):
    with self.assertRaisesRegex(ValueError, message):
      attention.start_cache(jnp.ones((1, 1), bool), [], **sizes)


_attend_cached = jax.jit(attention.attend_cached)
