"""Tests of the Llama family against Hugging Face and printed samples."""

import json

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

from rljax.models import decoder, llama, rope
from tests import conftest, tiny

_GOLDEN = ("llama3", "llama_linear", "llama_yarn", "mistral", "qwen2", "qwen3")


def _hf_fields(**fields):
  """A config.json of the smallest kind, with some fields replaced."""
  return {
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "hidden_act": "silu",
  } | fields


class LlamaGoldenTest(parameterized.TestCase):
  @parameterized.parameters(*_GOLDEN)
  def test_logits(self, name):
    golden = tiny.golden(name)
    config = llama.LlamaConfig.from_hf(golden["config"])
    model = llama.Llama(config)
    variables = {"params": tiny.params_from_tensors(config, golden["weights"])}
    hidden = model.apply(variables, golden["ids"], golden["mask"])
    logits = model.apply(variables, hidden, method="logits")
    chosen = golden["mask"]
    self.assertEqual(logits.dtype, jnp.float32)
    np.testing.assert_allclose(
      logits[chosen], golden["logits"][chosen], atol=2e-5, rtol=1e-5
    )

  @parameterized.parameters(*_GOLDEN)
  def test_parameter_names_are_complete(self, name):
    golden = tiny.golden(name)
    config = llama.LlamaConfig.from_hf(golden["config"])
    names = decoder.parameter_names(config)
    self.assertEqual(set(names), set(golden["weights"]))
    found = tiny.params_from_tensors(config, golden["weights"])
    expected = tiny.shapes(config)
    self.assertEqual(
      jax.tree.map(jnp.shape, found), jax.tree.map(jnp.shape, expected)
    )

  def test_gradients(self):
    golden = tiny.golden("llama3")
    config = llama.LlamaConfig.from_hf(golden["config"])
    model = llama.Llama(config)
    ids, mask = jnp.asarray(golden["ids"]), jnp.asarray(golden["mask"])
    loss, gradients = tiny.loss_and_gradients(
      model, tiny.params_from_tensors(config, golden["weights"]), ids, mask
    )
    np.testing.assert_allclose(loss, golden["loss"], rtol=1e-6)
    for name, expected in golden["gradients"].items():
      found = tiny.tensor(config, gradients, name)
      np.testing.assert_allclose(found, expected, atol=1e-6, rtol=1e-4)


class LlamaConfigTest(parameterized.TestCase):
  @parameterized.parameters(*_GOLDEN)
  def test_round_trip(self, name):
    config = llama.LlamaConfig.from_hf(tiny.golden(name)["config"])
    written = json.loads(json.dumps(config.to_hf()))
    self.assertEqual(written["model_type"], config.model_type)
    self.assertEqual(llama.LlamaConfig.from_hf(written), config)

  @parameterized.parameters(*_GOLDEN)
  def test_transformers_reads_what_we_write(self, name):
    import transformers

    config = llama.LlamaConfig.from_hf(tiny.golden(name)["config"])
    fields = config.to_hf()
    theirs = transformers.AutoConfig.for_model(**fields)
    for key in set(fields) - {"rope_theta", "rope_scaling", "dtype"}:
      if key != "rope_parameters":
        self.assertEqual(getattr(theirs, key), fields[key], key)
    # Back through their reader: they keep every setting of the rotation.
    self.assertEqual(llama.LlamaConfig.from_hf(theirs.to_dict()), config)

  def test_from_hf_reads_fields(self):
    config = llama.LlamaConfig.from_hf(
      _hf_fields(
        rms_norm_eps=1e-5,
        eos_token_id=[3, 4],
        attention_bias=True,
        tie_word_embeddings=True,
      )
    )
    self.assertEqual(
      (config.hidden_size, config.intermediate_size, config.num_layers),
      (16, 24, 2),
    )
    self.assertEqual((config.num_heads, config.num_kv_heads), (4, 2))
    self.assertEqual((config.head_dim, config.max_positions), (4, 64))
    self.assertEqual(config.eos_token_id, (3, 4))
    self.assertTrue(config.qkv_bias and config.output_bias)
    self.assertTrue(config.tie_word_embeddings)
    self.assertEqual(config.rope, rope.Rope())
    hash(config)

  def test_families_differ_as_they_should(self):
    qwen2 = llama.LlamaConfig.from_hf(_hf_fields(model_type="qwen2"))
    self.assertTrue(qwen2.qkv_bias)
    self.assertFalse(qwen2.output_bias or qwen2.qk_norm)
    qwen3 = llama.LlamaConfig.from_hf(_hf_fields(model_type="qwen3"))
    self.assertTrue(qwen3.qk_norm)
    self.assertFalse(qwen3.qkv_bias)
    self.assertEqual(qwen3.head_dim, 128)  # The family's default.

  def test_old_and_new_rope_fields_agree(self):
    scaling = {
      "rope_type": "llama3",
      "factor": 8.0,
      "low_freq_factor": 1.0,
      "high_freq_factor": 4.0,
      "original_max_position_embeddings": 32,
    }
    old = _hf_fields(rope_theta=5e5, rope_scaling=scaling)
    new = _hf_fields(rope_parameters={"rope_theta": 5e5, **scaling})
    self.assertEqual(
      llama.LlamaConfig.from_hf(old), llama.LlamaConfig.from_hf(new)
    )
    oldest = _hf_fields(rope_scaling={"type": "linear", "factor": 2.0})
    self.assertEqual(
      llama.LlamaConfig.from_hf(oldest).rope,
      rope.Rope(rope_type="linear", factor=2.0),
    )

  @parameterized.parameters(
    ("model_type", "bert", '"model_type".*bert'),
    ("vocab_size", None, '"vocab_size" is missing'),
    ("hidden_act", "gelu", '"hidden_act".*gelu'),
    ("quantization_config", {"bits": 4}, "quantization_config"),
    ("rope_scaling", {"rope_type": "longrope"}, '"rope_scaling".*longrope'),
    ("rope_parameters", {"rope_type": "dynamic"}, "rope_parameters.*dynamic"),
    ("rope_scaling", {"rope_type": "linear"}, '"factor" is missing'),
    ("partial_rotary_factor", 0.5, '"partial_rotary_factor" must be 1'),
    ("num_attention_heads", 3, "divisible by the 3 heads"),
    ("num_key_value_heads", 3, "divisible by the 3 key"),
  )
  def test_unsupported(self, field, value, message):
    with self.assertRaisesRegex(ValueError, message):
      llama.LlamaConfig.from_hf(_hf_fields(**{field: value}))

  @parameterized.parameters("mistral", "qwen2", "qwen3")
  def test_sliding_window(self, model_type):
    fields = _hf_fields(
      model_type=model_type, use_sliding_window=True, max_window_layers=1
    )
    windowed = fields | {"sliding_window": 5}
    expected = (5,) if model_type == "mistral" else (None, 5)
    config = llama.LlamaConfig.from_hf(windowed)
    self.assertEqual(config.windows, expected)
    self.assertEqual(llama.LlamaConfig.from_hf(config.to_hf()), config)
    found = llama.LlamaConfig.from_hf(fields | {"sliding_window": None})
    self.assertEqual(found.windows, (None,))
    for wrong in (0, "4096"):
      with self.assertRaisesRegex(ValueError, f'"sliding_window".*{wrong}'):
        llama.LlamaConfig.from_hf(fields | {"sliding_window": wrong})
    if model_type != "mistral":
      with self.assertRaisesRegex(ValueError, '"layer_types".*chunked'):
        kinds = ["chunked_attention", "full_attention"]
        llama.LlamaConfig.from_hf(windowed | {"layer_types": kinds})
      kinds[0], without = "sliding_attention", {"use_sliding_window": False}
      with self.assertRaisesRegex(ValueError, '"use_sliding_window" is false'):
        llama.LlamaConfig.from_hf(windowed | without | {"layer_types": kinds})

  def test_missing_sliding_window_is_that_of_transformers(self):
    fields = _hf_fields(model_type="mistral")
    self.assertEqual(llama.LlamaConfig.from_hf(fields).windows, (4096,))

  def test_sliding_window_that_is_off(self):
    for model_type in ("qwen2", "qwen3"):
      fields = _hf_fields(model_type=model_type, sliding_window=8)
      self.assertEqual(llama.LlamaConfig.from_hf(fields).windows, (None,))
      # No layer lies above the first windowed one.
      fields |= {"use_sliding_window": True, "max_window_layers": 2}
      self.assertEqual(llama.LlamaConfig.from_hf(fields).windows, (None,))

  def test_from_scratch(self):
    config = llama.LlamaConfig(
      vocab_size=109,
      hidden_size=96,
      num_layers=2,
      num_heads=4,
      max_positions=64,
    )
    ids = jnp.zeros((1, 2), jnp.int32)
    init = jax.jit(llama.Llama(config).init)
    params = init(jax.random.key(0), ids, ids == 0)["params"]
    self.assertEqual(config.intermediate_size, 256)
    self.assertNotIn("lm_head", params)
    attention = params["layers_0"]["self_attn"]
    np.testing.assert_allclose(
      jnp.std(attention["q_proj"]["kernel"]), 0.02, rtol=0.05
    )
    np.testing.assert_allclose(  # 0.02 / √(2 * 2)
      jnp.std(attention["o_proj"]["kernel"]), 0.01, rtol=0.05
    )
    np.testing.assert_array_equal(params["norm"]["scale"], jnp.ones(96))


class RopeTest(parameterized.TestCase):
  def test_rotation_by_hand(self):
    # One head of width 4 at position 2: pairs (0, 2) and (1, 3) turn by
    # 2 * 1 and 2 * 100^(-1/2) = 0.2.
    cos, sin = rope.angles(jnp.array([2]), rope.Rope(theta=100.0), 4)
    turned = rope.rotate(jnp.array([[[1.0, 0.0, 0.0, 3.0]]]), cos, sin)
    expected = [np.cos(2), -3 * np.sin(0.2), np.sin(2), 3 * np.cos(0.2)]
    np.testing.assert_allclose(turned[0, 0], expected, rtol=1e-6)

  def test_llama3_keeps_fast_and_stretches_slow_turns(self):
    settings = rope.Rope(
      theta=1e4,
      rope_type="llama3",
      factor=8.0,
      original_max_position_embeddings=64,
    )
    scaled, _ = rope.frequencies(settings, 32)
    plain, _ = rope.frequencies(rope.Rope(), 32)
    turns = 64 * plain / (2 * np.pi)
    np.testing.assert_allclose(scaled[turns > 4], plain[turns > 4])
    np.testing.assert_allclose(scaled[turns < 1], plain[turns < 1] / 8)
    between = (turns > 1) & (turns < 4)
    self.assertTrue(between.any())
    self.assertTrue((scaled[between] < plain[between]).all())
    self.assertTrue((scaled[between] > plain[between] / 8).all())


class Stories260kTest(parameterized.TestCase):
  def test_greedy_text_is_the_published_one(self):
    folder = conftest.shared("data/models/stories260k")
    import safetensors.numpy
    import tokenizers

    fields = json.loads((folder / "config.json").read_text())
    config = llama.LlamaConfig.from_hf(fields)
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    self.assertEqual(set(decoder.parameter_names(config)), set(tensors))
    model = llama.Llama(config)
    variables = {"params": tiny.params_from_tensors(config, tensors)}
    start = jnp.array([[config.bos_token_id]])

    def step(carry, _):
      hidden, cache = carry
      logits = model.apply(variables, hidden, method="logits")
      ids = jnp.argmax(logits, axis=-1).astype(jnp.int32)
      carry = model.apply(variables, ids, cache, method="decode")
      return carry, ids

    @jax.jit
    def greedy():
      hidden, cache = model.apply(
        variables, start, start > 0, 1, 72, method="prefill"
      )
      return jax.lax.scan(step, (hidden[:, -1], cache), length=72)[1][:, 0]

    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    # Printed in llama2.c's doc/stories260K.md.
    self.assertStartsWith(
      tokenizer.decode([int(i) for i in greedy()]),
      "Once upon a time, there was a little girl named Lily. She loved to "
      "play outside in the park. One day, she saw a big, red ball. She "
      "wanted to play with it, but it was too high.\nLily's mom said",
    )
