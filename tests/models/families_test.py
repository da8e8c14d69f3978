"""Every family of language models against transformers, and with itself."""

import dataclasses
import functools
import json
import shutil
import tempfile

import chex
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from absl.testing import absltest, parameterized

from rljax.distributed import meshes
from rljax.models import configs, hf, language_models
from rljax.models import weights as weights_lib
from tests import tiny

NAMES = (
  *("mistral_window", "qwen2_window", "gemma", "gemma2", "gemma3"),
  *("gpt_neox", "gpt_neox_serial", "granite", "mixtral", "olmo2", "opt"),
  *("phi3", "qwen3_moe", "smollm3"),
)
NUM_NEW = 10


@functools.cache
def _loaded(name):
  """The golden file, and what is read of it: model and parameters."""
  golden = tiny.golden(name)
  settings = configs.settings("float32", "float32", False)
  model = configs.build(golden["config"], name, settings)
  return golden, model, weights_lib.from_arrays(golden["weights"], model, name)


@functools.partial(jax.jit, static_argnums=0)
def _logits(model, params, ids, mask):
  variables = {"params": params}
  hidden = model.apply(variables, ids, mask)
  return model.apply(variables, hidden, method="logits")


@functools.partial(jax.jit, static_argnums=(0, 4))
def _greedy(model, params, ids, mask, length):
  """Greedy tokens `[B, T]` and the logits they are the largest of."""
  variables = {"params": params}

  def step(carry, _):
    hidden, cache = carry
    logits = model.apply(variables, hidden, method="logits")
    ids = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    carry = model.apply(variables, ids, cache, method="decode")
    return carry, (ids, logits)

  hidden, cache = model.apply(variables, ids, mask, 1, length, method="prefill")
  _, (ids, logits) = jax.lax.scan(step, (hidden[:, -1], cache), length=length)
  return ids.T, logits.swapaxes(0, 1)


class FamiliesTest(parameterized.TestCase):
  @parameterized.parameters(*NAMES)
  def test_logits(self, name):
    golden, model, params = _loaded(name)
    found = _logits(model, params, golden["ids"], golden["mask"])
    self.assertEqual(found.dtype, jnp.float32)
    chosen = golden["mask"]
    np.testing.assert_allclose(
      found[chosen], golden["logits"][chosen], atol=5e-5, rtol=2e-5
    )

  @parameterized.parameters(*NAMES)
  def test_greedy_text_and_cache(self, name):
    golden, model, params = _loaded(name)
    prompts, mask = golden["prompts"], golden["prompt_mask"]
    ids, logits = _greedy(model, params, prompts, mask, NUM_NEW)
    np.testing.assert_array_equal(ids, golden["greedy"])
    # The cache gives what whole rows do, the second of them padded.
    whole = np.concatenate([prompts, ids], axis=1)
    whole_mask = np.pad(mask, ((0, 0), (0, NUM_NEW)), constant_values=True)
    width = golden["ids"].shape[1]  # The shape that is compiled already.
    pad = ((0, 2), (0, width - whole.shape[1]))
    expected = _logits(
      model, params, np.pad(whole, pad), np.pad(whole_mask, pad)
    )[:2, prompts.shape[1] - 1 : whole.shape[1] - 1]
    np.testing.assert_allclose(logits, expected, atol=5e-5, rtol=2e-5)

  @parameterized.parameters(*NAMES)
  def test_padding_is_inert(self, name):
    golden, model, params = _loaded(name)
    ids, mask = golden["ids"].copy(), np.zeros_like(golden["mask"])
    for row, left in enumerate((0, 7, 3, 10)):
      ids[row, left : left + 14] = ids[0, :14]
      mask[row, left : left + 14] = True
    found = np.asarray(_logits(model, params, ids, mask))
    self.assertTrue(np.isfinite(found).all())
    for row, left in enumerate((0, 7, 3, 10)):
      np.testing.assert_allclose(
        found[row, left : left + 14], found[0, :14], atol=2e-5, rtol=2e-5
      )

  @parameterized.parameters(*NAMES)
  def test_export_is_what_was_read(self, name):
    golden, model, params = _loaded(name)
    folder = tempfile.mkdtemp()
    self.addCleanup(shutil.rmtree, folder)
    hf.save(folder, model, params)
    tensors = safetensors.numpy.load_file(f"{folder}/model.safetensors")
    expected = dict(golden["weights"])
    if model.config.tie_word_embeddings:
      expected.pop("lm_head.weight", None)
    if "embed_out.weight" in tensors:  # Either name is read by transformers.
      expected.setdefault(
        "embed_out.weight", expected.pop("lm_head.weight", None)
      )
    self.assertEqual(set(tensors), set(expected))
    for key, tensor in tensors.items():
      np.testing.assert_array_equal(tensor, np.float32(expected[key]), key)
    again = hf.load(folder, tokenizer=False)
    self.assertEqual(again.model, model)
    chex.assert_trees_all_equal(again.params, params)

  @parameterized.parameters(*NAMES)
  def test_transformers_reads_the_same_config(self, name):
    import transformers

    golden, model, _ = _loaded(name)
    fields = json.loads(json.dumps(model.config.to_hf()))
    theirs = transformers.AutoConfig.for_model(**fields).to_dict()
    original = transformers.AutoConfig.for_model(**golden["config"]).to_dict()
    for key in ("architectures", "dtype", "transformers_version"):
      theirs.pop(key, None), original.pop(key, None)
    sizes = original["hidden_size"], original["num_attention_heads"]
    if original.get("head_dim") is None and theirs.get("head_dim"):
      original["head_dim"] = sizes[0] // sizes[1]
    # What the lengths say: max_position_embeddings / original.
    theirs["rope_parameters"] = dict(theirs.get("rope_parameters") or {})
    if theirs["rope_parameters"].get("rope_type") == "longrope":
      self.assertEqual(theirs["rope_parameters"].pop("factor"), 64 / 40)
    original["rope_parameters"] = original.get("rope_parameters") or {}
    differing = {
      key: (original.get(key), theirs.get(key))
      for key in set(original) | set(theirs)
      if original.get(key) != theirs.get(key)
      # Without effect: dropout, and fields that others make up for.
      and key not in _WITHOUT_EFFECT
    }
    self.assertEmpty(differing)
    # And what transformers would write of ours is read as the same model.
    config = type(model.config)
    self.assertEqual(config.from_hf(theirs), model.config)

  @parameterized.parameters(*NAMES)
  def test_gradients_and_partition(self, name):
    golden, model, params = _loaded(name)
    rules = hf.partition_rules(model, meshes.make("fsdp:2,tensor:1"))
    mesh = meshes.make("data:2,fsdp:2,tensor:1")
    found = meshes.shardings(params, rules, mesh)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
      spec = functools.reduce(lambda t, k: t[k.key], path, found).spec
      text = "/".join(key.key for key in path)
      if leaf.ndim > 1 and not text.endswith(
        ("gate/kernel", "embed_positions/embedding")
      ):
        self.assertLessEqual({"fsdp", "tensor"}, set(spec), text)
    low = dataclasses.replace(model.config, remat=True)
    ids, mask = golden["ids"], golden["mask"]
    loss, gradients = tiny.loss_and_gradients(
      language_models.module(low), params, ids, jnp.asarray(mask)
    )
    self.assertTrue(np.isfinite(loss))
    chex.assert_tree_all_finite(gradients)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
      self.assertTrue(np.any(leaf), jax.tree_util.keystr(path))


CLASSIFIERS = (
  *("gemma2_classifier", "gpt_neox_classifier", "opt_classifier"),
  *("qwen3_classifier", "qwen3_moe_classifier", "xlm_roberta", "electra"),
  *("modernbert", "modernbert_cls"),
)


@functools.partial(jax.jit, static_argnums=0)
def _classify(model, params, ids, mask):
  return model.apply({"params": params}, ids, mask)


class ClassifiersTest(parameterized.TestCase):
  @parameterized.parameters(*CLASSIFIERS)
  def test_logits(self, name):
    golden, model, params = _loaded(name)
    ids, mask = golden["ids"], golden["mask"]
    found = _classify(model, params, ids, mask)
    np.testing.assert_allclose(found, golden["logits"], atol=2e-5, rtol=2e-5)
    self.assertLen(model.config.labels, golden["logits"].shape[1])
    # The same rows, all padded on the left.
    for row, row_mask in enumerate(mask):
      real = ids[row, row_mask]
      ids[row], mask[row] = 7, False
      ids[row, -len(real) :], mask[row, -len(real) :] = real, True
    np.testing.assert_allclose(
      _classify(model, params, ids, mask), found, atol=2e-5, rtol=2e-5
    )

  @parameterized.parameters(*CLASSIFIERS)
  def test_export_is_what_was_read(self, name):
    import transformers

    golden, model, params = _loaded(name)
    folder = tempfile.mkdtemp()
    self.addCleanup(shutil.rmtree, folder)
    hf.save_classifier(folder, model, params)
    tensors = safetensors.numpy.load_file(f"{folder}/model.safetensors")
    self.assertEqual(set(tensors), set(golden["weights"]))
    for key, tensor in tensors.items():
      expected = np.float32(golden["weights"][key])
      np.testing.assert_array_equal(tensor, expected, key)
    again = hf.load_classifier(folder, tokenizer=False)
    self.assertEqual(again.model, model)
    chex.assert_trees_all_equal(again.params, params)
    theirs = transformers.AutoConfig.for_model(**model.config.to_hf())
    config = type(model.config)
    fields = theirs.to_dict()
    self.assertEqual(fields["architectures"], golden["config"]["architectures"])
    self.assertEqual(config.from_hf(fields), model.config)


# Fields that two configs of one model may differ in.
_WITHOUT_EFFECT = (
  "dropout",
  "partial_rotary_factor",  # Stands in "rope_parameters" as well,
  "sliding_window_pattern",  # as this does in "layer_types".
  "_sliding_window_pattern",
)


if __name__ == "__main__":
  absltest.main()
