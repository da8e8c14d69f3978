"""Tests of BERT, RoBERTa and DistilBERT against Hugging Face."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized
from flax import traverse_util

from rljax.models import encoder
from tests import tiny

_GOLDEN = ("bert", "roberta", "distilbert")


@functools.partial(jax.jit, static_argnums=0)
def _apply(model, params, *arrays):
  return model.apply({"params": params}, *arrays)


def _loaded(name):
  """A golden file, its model, and its parameters."""
  golden = tiny.golden(name)
  config = encoder.EncoderConfig.from_hf(golden["config"])
  params = traverse_util.unflatten_dict(
    {
      path: jnp.asarray(
        golden["weights"][n].T if flip else golden["weights"][n]
      )
      for n, (path, flip) in encoder.parameter_names(config).items()
    }
  )
  return golden, encoder.Encoder(config), params


def _hf_fields(model_type="bert", **fields):
  """A config.json of the smallest kind, with some fields replaced."""
  sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads")
  if model_type == "distilbert":
    sizes = ("dim", "n_layers", "n_heads")
  wide = "hidden_dim" if model_type == "distilbert" else "intermediate_size"
  return {
    "model_type": model_type,
    "vocab_size": 40,
    **dict(zip(sizes, (16, 2, 4), strict=True)),
    wide: 24,
    "max_position_embeddings": 32,
  } | fields


class GoldenTest(parameterized.TestCase):
  @parameterized.parameters(*_GOLDEN)
  def test_logits(self, name):
    golden, model, params = _loaded(name)
    self.assertEqual(
      set(encoder.parameter_names(model.config)), set(golden["weights"])
    )
    logits = _apply(
      model,
      params,
      golden["ids"],
      golden["mask"],
      golden.get("token_type_ids"),
    )
    self.assertEqual(logits.dtype, jnp.float32)
    # Or a model that reads nothing would pass.
    self.assertGreater(golden["logits"].std(axis=0).min(), 0.1)
    np.testing.assert_allclose(logits, golden["logits"], atol=2e-5, rtol=1e-5)

  @parameterized.parameters(*_GOLDEN)
  def test_parameters_are_those_of_the_table(self, name):
    golden, model, params = _loaded(name)
    ids = jnp.zeros((1, 2), jnp.int32)
    expected = jax.eval_shape(model.init, jax.random.key(0), ids, ids == 0)
    self.assertEqual(
      jax.tree.map(jnp.shape, params),
      jax.tree.map(jnp.shape, expected["params"]),
    )

  @parameterized.parameters(*_GOLDEN)
  def test_left_padding(self, name):
    golden, model, params = _loaded(name)
    roll = lambda x: np.stack(
      [np.roll(row, sum(~m)) for row, m in zip(x, golden["mask"], strict=True)]
    )
    arrays = [golden["ids"], golden["mask"]]
    if name == "bert":
      arrays.append(golden["token_type_ids"])
    logits = _apply(model, params, *map(roll, arrays))
    np.testing.assert_allclose(logits, golden["logits"], atol=2e-5, rtol=1e-5)

  @parameterized.parameters(*_GOLDEN)
  def test_padding_is_inert(self, name):
    golden, model, params = _loaded(name)
    ids, mask = golden["ids"], golden["mask"]
    forward = lambda ids: _apply(model, params, ids, mask)
    other = np.where(mask, ids, 17)
    np.testing.assert_array_equal(forward(ids), forward(other))

  @parameterized.parameters(*_GOLDEN)
  def test_bfloat16_and_remat(self, name):
    golden, model, params = _loaded(name)
    config = dataclasses.replace(model.config, dtype=jnp.bfloat16, remat=True)
    logits = _apply(
      encoder.Encoder(config),
      params,
      golden["ids"],
      golden["mask"],
      golden.get("token_type_ids"),
    )
    self.assertEqual(logits.dtype, jnp.float32)
    np.testing.assert_allclose(logits, golden["logits"], atol=0.3)

  def test_token_types_matter(self):
    golden, model, params = _loaded("bert")
    forward = lambda *types: _apply(
      model, params, golden["ids"], golden["mask"], *types
    )
    zeros = np.zeros_like(golden["ids"])
    np.testing.assert_allclose(forward(), forward(zeros), rtol=1e-5)
    self.assertGreater(np.abs(forward() - golden["logits"]).max(), 0.1)

  def test_no_token_types(self):
    golden, model, params = _loaded("distilbert")
    with self.assertRaisesRegex(ValueError, "distilbert has no token types"):
      _apply(model, params, golden["ids"], golden["mask"], golden["ids"])

  def test_rows_without_a_token_and_too_long_ones(self):
    for name in _GOLDEN:
      golden, model, params = _loaded(name)
      rows = model.config.max_positions + 1
      ids = jnp.full((3, rows), 5, jnp.int32)
      mask = jnp.arange(rows)[None] < jnp.array([[0], [rows - 1], [rows]])
      logits = _apply(model, params, ids, mask)
      self.assertEqual(
        jnp.isfinite(logits).all(axis=1).tolist(), [True, True, False], name
      )


class ConfigTest(parameterized.TestCase):
  @parameterized.parameters(*_GOLDEN)
  def test_round_trip(self, name):
    config = encoder.EncoderConfig.from_hf(tiny.golden(name)["config"])
    written = json.loads(json.dumps(config.to_hf()))
    self.assertEqual(encoder.EncoderConfig.from_hf(written), config)
    hash(config)

  @parameterized.parameters(*_GOLDEN)
  def test_transformers_reads_what_we_write(self, name):
    import transformers

    config = encoder.EncoderConfig.from_hf(tiny.golden(name)["config"])
    theirs = transformers.AutoConfig.for_model(**config.to_hf())
    self.assertEqual(encoder.EncoderConfig.from_hf(theirs.to_dict()), config)
    self.assertEqual(tuple(theirs.id2label.values()), config.labels)
    (architecture,) = theirs.architectures
    self.assertTrue(hasattr(transformers, architecture), architecture)

  def test_positions_of_roberta(self):
    config = encoder.EncoderConfig.from_hf(_hf_fields("roberta"))
    # The table has 32 rows, of which the padding id 1 leaves two unused.
    self.assertEqual((config.max_positions, config.position_offset), (30, 2))
    config = encoder.EncoderConfig.from_hf(_hf_fields("bert", pad_token_id=9))
    self.assertEqual((config.max_positions, config.position_offset), (32, 0))

  @parameterized.parameters(
    ("bert", "model_type", "albert", '"model_type".*bert, roberta.*albert'),
    ("bert", "vocab_size", None, '"vocab_size" is missing'),
    ("distilbert", "dim", None, '"dim" is missing'),
    (
      "bert",
      "hidden_act",
      "silu",
      '"hidden_act" must be one of gelu, relu.*si',
    ),
    ("distilbert", "activation", "tanh", '"activation" must be one .*tanh'),
    ("bert", "position_embedding_type", "relative_key", "must be 'absolute'"),
    ("bert", "is_decoder", True, '"is_decoder" must be False'),
    ("bert", "quantization_config", {"bits": 4}, "quantization_config"),
    ("bert", "num_attention_heads", 3, "divisible by the 3 heads"),
    ("roberta", "pad_token_id", None, '"pad_token_id" is missing'),
    ("roberta", "max_position_embeddings", 2, "max_positions must be positive"),
  )
  def test_unsupported(self, model_type, field, value, message):
    fields = _hf_fields(model_type) | {field: value}
    with self.assertRaisesRegex(ValueError, message):
      encoder.EncoderConfig.from_hf(fields)

  @parameterized.parameters(
    (dict(model_type="albert"), "model_type must be one of bert"),
    (dict(activation="silu"), "activation must be one of gelu"),
    (dict(labels=()), "at least one label"),
    (dict(model_type="distilbert"), "type_vocab_size must be 0"),
    (dict(type_vocab_size=0), "and positive for others"),
    (dict(model_type="roberta", pad_token_id=None), "pad_token_id"),
  )
  def test_bad_settings(self, settings, message):
    config = encoder.EncoderConfig.from_hf(_hf_fields())
    with self.assertRaisesRegex(ValueError, message):
      dataclasses.replace(config, **settings)

  def test_an_epsilon_that_no_file_can_hold(self):
    config = encoder.EncoderConfig.from_hf(_hf_fields("distilbert"))
    with self.assertRaisesRegex(ValueError, "layer_norm_eps must be 1e-12"):
      dataclasses.replace(config, layer_norm_eps=1e-5).to_hf()
