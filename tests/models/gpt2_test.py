"""Tests of GPT-2 against Hugging Face."""

import json

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

from rljax.models import gpt2
from tests import tiny


def _hf_fields(**fields):
  """A config.json of the smallest kind, with some fields replaced."""
  return {
    "model_type": "gpt2",
    "vocab_size": 40,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 32,
  } | fields


class GPT2GoldenTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.golden = tiny.golden("gpt2")
    self.config = gpt2.GPT2Config.from_hf(self.golden["config"])
    self.model = gpt2.GPT2(self.config)
    self.params = tiny.params_from_tensors(self.config, self.golden["weights"])

  def test_logits(self):
    variables = {"params": self.params}
    ids, mask = self.golden["ids"], self.golden["mask"]
    hidden = self.model.apply(variables, ids, mask)
    logits = self.model.apply(variables, hidden, method="logits")
    self.assertEqual(logits.dtype, jnp.float32)
    np.testing.assert_allclose(
      logits[mask], self.golden["logits"][mask], atol=2e-5, rtol=1e-5
    )

  def test_parameter_names_are_complete(self):
    names = set(gpt2.parameter_names(self.config))
    self.assertEqual(names, set(self.golden["weights"]))
    self.assertEqual(
      jax.tree.map(jnp.shape, self.params),
      jax.tree.map(jnp.shape, tiny.shapes(self.config)),
    )

  def test_gradients(self):
    ids, mask = jnp.asarray(self.golden["ids"]), self.golden["mask"]
    loss, gradients = tiny.loss_and_gradients(
      self.model, self.params, ids, jnp.asarray(mask)
    )
    np.testing.assert_allclose(loss, self.golden["loss"], rtol=1e-6)
    for name, expected in self.golden["gradients"].items():
      found = tiny.tensor(self.config, gradients, name)
      np.testing.assert_allclose(found, expected, atol=1e-6, rtol=1e-4)


class GPT2ConfigTest(parameterized.TestCase):
  def test_round_trip(self):
    config = gpt2.GPT2Config.from_hf(
      _hf_fields(n_inner=24, activation_function="relu", eos_token_id=[1, 2])
    )
    written = json.loads(json.dumps(config.to_hf()))
    self.assertEqual(gpt2.GPT2Config.from_hf(written), config)
    self.assertEqual(config.intermediate_size, 24)
    self.assertEqual(config.eos_token_id, (1, 2))
    hash(config)

  def test_transformers_reads_what_we_write(self):
    import transformers

    config = gpt2.GPT2Config.from_hf(_hf_fields())
    theirs = transformers.AutoConfig.for_model(**config.to_hf())
    self.assertEqual(gpt2.GPT2Config.from_hf(theirs.to_dict()), config)

  @parameterized.parameters(
    ("model_type", "gptj", '"model_type" must be'),
    ("n_embd", None, '"n_embd" is missing'),
    ("n_head", 3, "divisible by the 3 heads"),
    ("activation_function", "silu", '"activation_function".*silu'),
    ("scale_attn_weights", False, '"scale_attn_weights" must be True'),
    ("scale_attn_by_inverse_layer_idx", True, "must be False"),
    ("reorder_and_upcast_attn", True, '"reorder_and_upcast_attn"'),
    ("add_cross_attention", True, '"add_cross_attention"'),
    ("tie_word_embeddings", False, '"tie_word_embeddings"'),
    ("quantization_config", {"bits": 4}, '"quantization_config"'),
  )
  def test_unsupported(self, field, value, message):
    with self.assertRaisesRegex(ValueError, message):
      gpt2.GPT2Config.from_hf(_hf_fields(**{field: value}))

  def test_from_scratch(self):
    config = gpt2.GPT2Config(
      vocab_size=109,
      hidden_size=96,
      num_layers=2,
      num_heads=4,
      max_positions=64,
    )
    ids = jnp.zeros((1, 2), jnp.int32)
    init = jax.jit(gpt2.GPT2(config).init)
    params = init(jax.random.key(0), ids, ids == 0)["params"]
    block = params["layers_1"]
    for kernel, std in (
      (params["wte"]["embedding"], 0.02),
      (params["wpe"]["embedding"], 0.02),
      (block["attn"]["c_attn"]["kernel"], 0.02),
      (block["attn"]["c_proj"]["kernel"], 0.01),  # 0.02 / √(2 * 2)
      (block["mlp"]["c_proj"]["kernel"], 0.01),
    ):
      np.testing.assert_allclose(jnp.std(kernel), std, rtol=0.05)
    np.testing.assert_array_equal(block["attn"]["c_attn"]["bias"], 0)

  def test_positions_past_the_table_are_loud(self):
    config = tiny.gpt2_config(max_positions=8)
    ids, mask = tiny.batch(shape=(4, 12))
    model, variables = gpt2.GPT2(config), {"params": tiny.params(config)}
    hidden = model.apply(variables, ids, mask)
    # Row 0 has 12 real tokens, row 1 has 8 behind 4 of padding.
    self.assertTrue(np.isnan(hidden[0]).all())
    self.assertTrue(np.isfinite(hidden[1]).all())
