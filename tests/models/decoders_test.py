"""Tests of what every decoder promises, whatever its family."""

import dataclasses
import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

from rljax.models import rope
from tests import tiny

_CONFIGS = (
  ("gpt2", tiny.gpt2_config()),
  (
    "llama",  # As much as one config can have.
    tiny.llama_config(
      model_type="qwen3",
      head_dim=10,
      attention_bias=True,
      tie_word_embeddings=False,
      rope=rope.Rope(theta=30.0, rope_type="linear", factor=1.5),
    ),
  ),
)
_NUM_SAMPLES = 3


@functools.partial(jax.jit, static_argnums=0)
def _apply(model, params, ids, mask):
  return model.apply({"params": params}, ids, mask)


def _hidden(config, params, ids, mask):
  return np.asarray(_apply(tiny.model(config), params, ids, mask))


@functools.partial(jax.jit, static_argnums=0)
def _decode_all(config, params, ids, mask, responses):
  """Hidden states of the prompts and of each response token.

  Args:
    config: of either family.
    params: the parameters.
    ids: `[B, P]` prompts.
    mask: `[B, P]`.
    responses: `[B * _NUM_SAMPLES, T]` ids.

  Returns:
    `[B, P, D]` and `[N, T, D]`, and the cache's last step.
  """
  model, variables = tiny.model(config), {"params": params}
  hidden, cache = model.apply(
    variables, ids, mask, _NUM_SAMPLES, responses.shape[1], method="prefill"
  )

  def step(cache, ids_t):
    hidden_t, cache = model.apply(variables, ids_t, cache, method="decode")
    return cache, hidden_t

  cache, rest = jax.lax.scan(step, cache, responses.T)
  return hidden, rest.swapaxes(0, 1), cache["step"]


class DecoderTest(parameterized.TestCase):
  @parameterized.named_parameters(*_CONFIGS)
  def test_prefill_and_decode_match_whole_rows(self, config):
    params = tiny.params(config)
    ids, mask = tiny.batch(0, (2, 6))
    self.assertFalse(bool(mask[1, 0]))  # A left-padded prompt is among them.
    responses, _ = tiny.batch(1, (2 * _NUM_SAMPLES, 5))
    hidden, rest, steps = _decode_all(config, params, ids, mask, responses)
    self.assertEqual(steps, 5)

    whole_ids = jnp.concatenate(
      [jnp.repeat(ids, _NUM_SAMPLES, axis=0), responses], axis=1
    )
    whole_mask = jnp.concatenate(
      [jnp.repeat(mask, _NUM_SAMPLES, axis=0), responses >= 0], axis=1
    )
    expected = _hidden(config, params, whole_ids, whole_mask)
    np.testing.assert_allclose(
      hidden[mask], expected[::_NUM_SAMPLES, :6][mask], atol=2e-5
    )
    np.testing.assert_allclose(rest, expected[:, 6:], atol=2e-5)

  @parameterized.named_parameters(*_CONFIGS)
  def test_padding_is_inert(self, config):
    params = tiny.params(config)
    ids, _ = tiny.batch(2, (1, 7))
    plain = _hidden(config, params, ids, jnp.ones(ids.shape, bool))
    # The same text with 4 columns around it, whatever stands in them.
    lefts = [4, 4, 0, 0, 3, 3]
    padded = np.tile(np.array([[0], [39]]), (3, 11))
    mask = np.zeros(padded.shape, bool)
    for row, left in enumerate(lefts):
      padded[row, left : left + 7] = ids[0]
      mask[row, left : left + 7] = True
    hidden = _hidden(config, params, jnp.int32(padded), jnp.asarray(mask))
    for row, left in enumerate(lefts):
      np.testing.assert_allclose(
        hidden[row, left : left + 7], plain[0], atol=2e-5
      )

  @parameterized.named_parameters(*_CONFIGS)
  def test_future_is_unseen(self, config):
    params = tiny.params(config)
    ids, _ = tiny.batch(3, (2, 8))
    mask = jnp.ones(ids.shape, bool)
    before = _hidden(config, params, ids, mask)
    after = _hidden(config, params, ids.at[:, 5].set(ids[:, 5] ^ 1), mask)
    np.testing.assert_allclose(after[:, :5], before[:, :5], atol=1e-6)
    changed = np.abs(after[:, 5:] - before[:, 5:]).max(axis=-1)
    self.assertTrue((changed > 1e-4).all())  # And the past is seen.

  @parameterized.named_parameters(*_CONFIGS)
  def test_rows_of_padding_give_no_nan(self, config):
    params = tiny.params(config)
    ids, mask = tiny.batch(4)
    mask = mask.at[0].set(False)
    self.assertTrue(np.isfinite(_hidden(config, params, ids, mask)).all())
    responses, _ = tiny.batch(5, (4 * _NUM_SAMPLES, 2))
    _, rest, _ = _decode_all(config, params, ids, mask, responses)
    self.assertTrue(np.isfinite(rest).all())
    _, gradients = tiny.loss_and_gradients(
      tiny.model(config), params, ids, mask
    )
    chex.assert_tree_all_finite(gradients)

  @parameterized.named_parameters(*_CONFIGS)
  def test_remat_gives_the_same_gradients(self, config):
    params = tiny.params(config)
    ids, mask = tiny.batch(6)
    found, expected = (
      tiny.loss_and_gradients(
        tiny.model(dataclasses.replace(config, remat=remat)), params, ids, mask
      )
      for remat in (True, False)
    )
    chex.assert_trees_all_close(found, expected, atol=1e-6)
    # The recomputation is there, and the parameters have the same names.
    rematted = dataclasses.replace(config, remat=True)
    chex.assert_trees_all_equal_shapes(tiny.shapes(rematted), params)
    for chosen in (rematted, config):
      forward = functools.partial(_apply, tiny.model(chosen))
      text = str(jax.make_jaxpr(forward)(params, ids, mask))
      self.assertEqual("prevent_cse" in text, chosen.remat is True)

  @parameterized.named_parameters(*_CONFIGS)
  def test_bfloat16_is_close_to_float32(self, config):
    params = tiny.params(config)
    ids, mask = tiny.batch(7)
    low = dataclasses.replace(config, dtype=jnp.bfloat16)
    hidden = _hidden(low, params, ids, mask)
    self.assertEqual(hidden.dtype, jnp.bfloat16)
    logits = tiny.model(low).apply(
      {"params": params}, jnp.asarray(hidden), method="logits"
    )
    self.assertEqual(logits.dtype, jnp.float32)
    expected = _hidden(config, params, ids, mask)
    error = np.abs(np.float32(hidden) - expected)[mask]
    self.assertLess(error.mean(), 0.03)
    self.assertGreater(error.mean(), 1e-4)  # It did compute in bfloat16.

    # Decoding in bfloat16 is as close.
    prompts, responses = ids[:2, :6], tiny.batch(8, (2 * _NUM_SAMPLES, 4))[0]
    mask = jnp.ones(prompts.shape, bool)
    _, found, _ = _decode_all(low, params, prompts, mask, responses)
    _, expected, _ = _decode_all(config, params, prompts, mask, responses)
    self.assertLess(np.abs(np.float32(found) - expected).mean(), 0.03)

  @parameterized.named_parameters(*_CONFIGS)
  def test_bfloat16_parameters(self, config):
    low = dataclasses.replace(
      config, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, num_layers=1
    )
    for leaf in jax.tree.leaves(tiny.shapes(low)):
      self.assertEqual(leaf.dtype, jnp.bfloat16)
    ids, mask = tiny.batch(9)
    loss, gradients = tiny.loss_and_gradients(
      tiny.model(low), tiny.params(low), ids, mask
    )
    self.assertEqual(loss.dtype, jnp.float32)
    chex.assert_tree_all_finite(gradients)

  @parameterized.named_parameters(*_CONFIGS)
  def test_names_cover_the_parameters(self, config):
    paths = [path for path, _ in tiny.parameter_names(config).values()]
    found = {
      tuple(key.key for key in path)
      for path, _ in jax.tree_util.tree_leaves_with_path(tiny.shapes(config))
    }
    self.assertLen(paths, len(found))
    self.assertEqual(set(paths), found)

  @parameterized.named_parameters(*_CONFIGS)
  def test_partition_rules_fit_the_parameters(self, config):
    rules = tiny.family(config).PARTITION_RULES
    used = set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tiny.shapes(config)):
      name = "/".join(key.key for key in path)
      i, spec = next(
        (i, spec)
        for i, (pattern, spec) in enumerate(rules)
        if re.search(pattern, name)
      )
      used.add(i)
      self.assertLessEqual(len(spec), leaf.ndim, name)
      if leaf.ndim == 2 and not name.startswith("wpe"):
        self.assertEqual(set(spec), {"fsdp", "tensor"}, name)
    self.assertIn(len(rules) - 1, used)  # The norms are replicated.

  def test_models_are_static_arguments(self):
    for _, config in _CONFIGS:
      self.assertEqual(hash(tiny.model(config)), hash(tiny.model(config)))
      self.assertEqual(tiny.model(config), tiny.model(config))


class CacheInPlaceTest(parameterized.TestCase):
  @parameterized.named_parameters(*_CONFIGS)
  def test_decoding_copies_no_cache(self, config):
    """The compiled loop may write into the cache but not copy it."""
    model = tiny.model(config)
    ids, mask = tiny.batch(0, (2, 6))
    length, rows = 37, 2 * _NUM_SAMPLES  # 37: no other array has that axis.

    @jax.jit
    def generate(variables, ids, mask):
      hidden, cache = model.apply(
        variables, ids, mask, _NUM_SAMPLES, length, method="prefill"
      )

      def body(carry):
        hidden, cache = carry
        logits = model.apply(variables, hidden, method="logits")
        ids = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return model.apply(variables, ids, cache, method="decode")

      start = jnp.repeat(hidden[:, -1], _NUM_SAMPLES, axis=0), cache
      return jax.lax.while_loop(
        lambda carry: carry[1]["step"] < length, body, start
      )[0]

    variables = {"params": tiny.params(config)}
    compiled = generate.lower(variables, ids, mask).compile().as_text()
    heads = getattr(config, "num_kv_heads", config.num_heads)
    shape = f"= f32[{rows},{heads},{length},"
    in_loop = [
      line
      for computation in compiled.split("\n\n")
      if not computation.lstrip().startswith("ENTRY")
      for line in computation.splitlines()
      if shape in line
    ]
    self.assertTrue(any("dynamic-update-slice" in line for line in in_loop))
    for line in in_loop:
      self.assertNotIn(" copy(", line)
