"""Tests of the causal classifiers against Hugging Face."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized
from flax import traverse_util

from rljax.distributed import meshes
from rljax.models import classifier, gpt2, llama
from tests import tiny

_GOLDEN = ("llama_classifier", "gpt2_classifier")


@functools.partial(jax.jit, static_argnums=0, static_argnames="method")
def _apply(model, params, *arrays, method=None):
  return model.apply({"params": params}, *arrays, method=method)


def _params(names, tensors):
  """Hugging Face tensors, by name, as the parameters of a model."""
  return traverse_util.unflatten_dict(
    {
      path: jnp.asarray(tensors[name].T if transpose else tensors[name])
      for name, (path, transpose) in names.items()
    }
  )


def _random(config, seed=0):
  """A model, and parameters large enough that every part of it matters."""
  model = classifier.CausalClassifier(config)
  ids = jnp.zeros((1, 2), jnp.int32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), ids, ids == 0)
  rng = np.random.default_rng(seed)
  draw = lambda x: jnp.asarray(0.4 * rng.normal(size=x.shape), x.dtype)
  return model, jax.tree.map(draw, shapes["params"])


class GoldenTest(parameterized.TestCase):
  @parameterized.parameters(*_GOLDEN)
  def test_logits(self, name):
    golden = tiny.golden(name)
    config = classifier.CausalClassifierConfig.from_hf(golden["config"])
    names = classifier.parameter_names(config)
    self.assertEqual(set(names), set(golden["weights"]))
    logits = _apply(
      classifier.CausalClassifier(config),
      _params(names, golden["weights"]),
      golden["ids"],
      golden["mask"],
    )
    self.assertEqual(logits.dtype, jnp.float32)
    np.testing.assert_allclose(logits, golden["logits"], atol=2e-5, rtol=1e-5)

  @parameterized.parameters(*_GOLDEN)
  def test_parameters_are_those_of_the_table(self, name):
    golden = tiny.golden(name)
    config = classifier.CausalClassifierConfig.from_hf(golden["config"])
    names = classifier.parameter_names(config)
    found = _params(names, golden["weights"])
    _, expected = _random(config)
    self.assertEqual(
      jax.tree.map(jnp.shape, found), jax.tree.map(jnp.shape, expected)
    )
    self.assertNotIn("lm_head", expected["backbone"])


class ConfigTest(parameterized.TestCase):
  @parameterized.parameters(*_GOLDEN)
  def test_round_trip(self, name):
    config = classifier.CausalClassifierConfig.from_hf(
      tiny.golden(name)["config"]
    )
    written = json.loads(json.dumps(config.to_hf()))
    self.assertEqual(classifier.CausalClassifierConfig.from_hf(written), config)

  @parameterized.parameters("gpt2", "llama", "mistral", "qwen2", "qwen3")
  def test_transformers_reads_what_we_write(self, model_type):
    import transformers

    if model_type == "gpt2":
      backbone = tiny.gpt2_config(pad_token_id=3)
    else:
      backbone = tiny.llama_config(model_type=model_type, pad_token_id=3)
    config = classifier.CausalClassifierConfig(
      backbone, ("bad", "good", "better"), "regression"
    )
    fields = config.to_hf()
    theirs = transformers.AutoConfig.for_model(**fields)
    self.assertEqual(theirs.num_labels, 3)
    self.assertEqual(theirs.id2label, {0: "bad", 1: "good", 2: "better"})
    self.assertEqual(theirs.problem_type, "regression")
    self.assertEqual(theirs.pad_token_id, 3)
    (architecture,) = theirs.architectures
    self.assertTrue(hasattr(transformers, architecture), architecture)

  def test_labels(self):
    def labels(**fields):
      return classifier.labels_from_hf(fields)

    self.assertEqual(labels(), ("LABEL_0", "LABEL_1"))
    self.assertEqual(labels(num_labels=1), ("LABEL_0",))
    self.assertEqual(labels(id2label={"0": "reward"}), ("reward",))
    names = {str(i): f"n{i}" for i in (10, 2, 0, 1, *range(3, 10))}
    self.assertEqual(labels(id2label=names), tuple(f"n{i}" for i in range(11)))
    with self.assertRaisesRegex(ValueError, '"id2label" must number.*got 1, 2'):
      labels(id2label={"1": "a", "2": "b"})

  def test_an_output_layer_is_left_out(self):
    backbone = tiny.llama_config(tie_word_embeddings=False)
    config = classifier.CausalClassifierConfig(backbone)
    self.assertTrue(config.backbone.tie_word_embeddings)
    hash(config)

  def test_no_labels(self):
    with self.assertRaisesRegex(ValueError, "at least one label"):
      classifier.CausalClassifierConfig(tiny.gpt2_config(), ())

  def test_unsupported(self):
    with self.assertRaisesRegex(ValueError, '"model_type" must be one of'):
      classifier.CausalClassifierConfig.from_hf({"model_type": "bert"})


class CausalClassifierTest(parameterized.TestCase):
  @parameterized.parameters(tiny.gpt2_config(), tiny.llama_config())
  def test_reads_the_last_real_token(self, backbone):
    config = classifier.CausalClassifierConfig(backbone, ("a", "b"))
    model, params = _random(config)
    ids, mask = tiny.batch()
    logits = _apply(model, params, ids, mask)
    family = gpt2.GPT2 if backbone == tiny.gpt2_config() else llama.Llama
    hidden = _apply(family(backbone), params["backbone"], ids, mask)
    for row in range(len(ids)):
      last = np.flatnonzero(mask[row])[-1]
      np.testing.assert_allclose(
        logits[row],
        hidden[row, last] @ params["score"]["kernel"],
        rtol=1e-5,
        atol=1e-5,
      )

  def test_padding_on_either_side(self):
    model, params = _random(
      classifier.CausalClassifierConfig(tiny.llama_config())
    )
    ids = jax.random.randint(jax.random.key(0), (1, 5), 0, 40)
    alone = _apply(model, params, ids, jnp.ones((1, 5), bool))
    for left in range(4):
      width = ((0, 0), (left, 3 - left))
      padded = jnp.pad(ids, width, constant_values=7)
      mask = jnp.pad(jnp.ones((1, 5), bool), width)
      logits = _apply(model, params, padded, mask)
      np.testing.assert_allclose(logits, alone, rtol=1e-5, atol=1e-6)

  @parameterized.product(
    backbone=(tiny.gpt2_config(), tiny.llama_config()),
    padding=("left", "right"),
  )
  def test_token_logits_are_those_of_the_beginnings(self, backbone, padding):
    config = classifier.CausalClassifierConfig(backbone, ("a", "b"))
    model, params = _random(config)
    lengths, width = (4, 1, 0, 6), 6
    rng = np.random.default_rng(1)
    ids = jnp.asarray(rng.integers(0, 40, (len(lengths), width)), jnp.int32)
    mask = np.arange(width) < np.array(lengths)[:, None]
    if padding == "left":
      mask = mask[:, ::-1]
    found = _apply(model, params, ids, mask, method="token_logits")
    self.assertEqual(found.shape, (len(lengths), width, 2))
    self.assertEqual(found.dtype, jnp.float32)
    np.testing.assert_array_equal(found[~mask], 0.0)
    self.assertGreater(np.abs(found[mask]).min(), 0.0)
    for end in range(width):
      seen = mask & (np.arange(width) <= end)
      expected = _apply(model, params, ids, seen)
      rows = mask[:, end]
      np.testing.assert_allclose(
        found[rows, end], expected[rows], rtol=1e-5, atol=1e-5
      )

  @parameterized.parameters(tiny.gpt2_config(), tiny.llama_config())
  def test_last_token_logits_are_those_of_the_text(self, backbone):
    model, params = _random(classifier.CausalClassifierConfig(backbone))
    ids, mask = tiny.batch()
    found = _apply(model, params, ids, mask, method="token_logits")
    last = [np.flatnonzero(row)[-1] for row in mask]
    np.testing.assert_allclose(
      found[np.arange(len(ids)), last],
      _apply(model, params, ids, mask),
      rtol=1e-5,
      atol=1e-5,
    )

  @parameterized.parameters(tiny.gpt2_config(), tiny.llama_config())
  def test_partition_rules_are_those_of_the_backbone(self, backbone):
    _, params = _random(classifier.CausalClassifierConfig(backbone))
    mesh = meshes.make("data:2,fsdp:2,tensor:2")
    found = meshes.shardings(params, classifier.PARTITION_RULES, mesh)
    rules = tiny.family(backbone).PARTITION_RULES
    self.assertEqual(
      found["backbone"], meshes.shardings(params["backbone"], rules, mesh)
    )
    self.assertTrue(found["score"]["kernel"].is_fully_replicated)

  def test_bfloat16(self):
    backbone = tiny.llama_config()
    model, params = _random(classifier.CausalClassifierConfig(backbone))
    backbone = dataclasses.replace(backbone, dtype=jnp.bfloat16)
    coarse = classifier.CausalClassifier(
      classifier.CausalClassifierConfig(backbone)
    )
    ids, mask = tiny.batch()
    logits = _apply(coarse, params, ids, mask)
    self.assertEqual(logits.dtype, jnp.float32)
    expected = _apply(model, params, ids, mask)
    np.testing.assert_allclose(logits, expected, atol=0.1)
