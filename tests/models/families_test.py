"""Every family of language models against transformers, and with itself."""

import dataclasses
import functools
import json
import shutil
import tempfile
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from absl.testing import absltest, parameterized

from rljax.distributed import meshes
from rljax.models import (
  attention,
  configs,
  families,
  fresh,
  hf,
  language_models,
  moe,
)
from rljax.models import weights as weights_lib
from rljax.ops import masking
from rljax.tasks import tokenizers
from tests import conftest, tiny

NAMES = (
  *("gpt2", "llama3", "qwen3"),
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
def _logits(model, params, ids, mask, segments=None):
  variables = {"params": params}
  hidden = model.apply(variables, ids, mask, segments)
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
      found[chosen], golden["logits"][chosen], atol=1e-4, rtol=2e-5
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
  def test_texts_of_one_row(self, name):
    golden, model, params = _loaded(name)
    shape = golden["ids"].shape
    texts = golden["ids"][0, :13], golden["ids"][1, : shape[1] - 15]
    ids, segments, alone, mask = np.zeros((4, *shape), np.int32)
    for i, (text, start) in enumerate(zip(texts, (1, 14), strict=True)):
      place = slice(start, start + len(text))  # Between one pad and another.
      ids[:, place], segments[:, place] = text, i + 1
      alone[i, : len(text)], mask[i, : len(text)] = text, 1
    expected = _logits(model, params, alone, mask > 0)
    found = _logits(model, params, ids, segments > 0, segments)
    self.assertTrue(np.isfinite(found).all())
    for i, text in enumerate(texts):
      np.testing.assert_allclose(
        found[2, segments[2] == i + 1],
        expected[i, : len(text)],
        atol=5e-5,
        rtol=2e-5,
      )

  @parameterized.parameters(*NAMES)
  def test_export_is_what_was_read(self, name):
    golden, model, params = _loaded(name)
    folder = tempfile.mkdtemp()
    self.addCleanup(shutil.rmtree, folder)
    hf.save(folder, model, params)
    tensors = safetensors.numpy.load_file(f"{folder}/model.safetensors")
    expected = dict(golden["weights"])
    if getattr(model.config, "tie_word_embeddings", True):  # GPT-2 always.
      expected.pop("lm_head.weight", None)
    self.assertEqual(set(tensors), set(expected))
    for key, tensor in tensors.items():
      np.testing.assert_array_equal(tensor, np.float32(expected[key]), key)
    again = hf.load(folder, tokenizer=False)
    self.assertEqual(again.model, model)
    chex.assert_trees_all_equal(again.params, params)

  @parameterized.parameters(*NAMES[1:])  # gpt2_test.py has GPT-2's.
  def test_transformers_reads_the_same_config(self, name):
    import transformers

    golden, model, _ = _loaded(name)
    fields = json.loads(json.dumps(model.config.to_hf()))
    theirs = transformers.AutoConfig.for_model(**fields).to_dict()
    original = transformers.AutoConfig.for_model(**golden["config"]).to_dict()
    for key in ("architectures", "dtype", "transformers_version"):
      theirs.pop(key, None), original.pop(key, None)
    if original.get("head_dim") is None and theirs.get("head_dim"):
      sizes = original["hidden_size"], original["num_attention_heads"]
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
        ("gate/kernel", "embed_positions/embedding", "wpe/embedding")
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
  *("gpt2_classifier", "llama_classifier", "mistral_classifier"),
  *("qwen2_classifier", "qwen3_classifier", "gemma_classifier"),
  *("gemma2_classifier", "gemma3_classifier", "gpt_neox_classifier"),
  *("mixtral_classifier", "qwen3_moe_classifier", "olmo2_classifier"),
  *("opt_classifier", "phi3_classifier", "smollm3_classifier"),
  *("bert", "roberta", "xlm_roberta", "distilbert", "electra"),
  *("modernbert", "modernbert_cls"),
)
GRADIENTS = (
  *("gemma2_classifier", "gpt_neox_classifier", "qwen3_moe_classifier"),
  *("opt_classifier", "xlm_roberta", "electra", "modernbert"),
)


def _texts(golden):
  """Copies of what a classifier reads: ids, mask, and perhaps token types."""
  names = ("ids", "mask", "token_type_ids")
  return [golden[name].copy() for name in names if name in golden]


@functools.partial(jax.jit, static_argnums=0)
def _classify(model, params, *texts):
  return model.apply({"params": params}, *texts)


@functools.partial(jax.jit, static_argnums=0)
def _classifier_gradients(model, params, ids, mask):
  """Gradients of a sum of squares of logits."""

  def loss(params):
    return jnp.sum(jnp.square(model.apply({"params": params}, ids, mask)))

  return jax.grad(loss)(params)


class WindowsTest(parameterized.TestCase):
  def test_mask_by_hand(self):
    mask = jnp.array([[False, True, True, True, True]])
    found = attention.seen(mask, window=2)[0].astype(int)
    np.testing.assert_array_equal(
      found,
      [
        [0, 0, 0, 0, 0],
        [0, 1, 0, 0, 0],
        [0, 1, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 0, 1, 1],
      ],
    )
    for window in (None, 5, 9):  # They hold the whole text.
      np.testing.assert_array_equal(
        attention.seen(mask, window=window), attention.seen(mask)
      )

  def test_cache_is_as_long_as_the_window(self):
    golden, model, params = _loaded("gemma2")  # Windows of 5 tokens.
    self.assertEqual(model.config.windows, (5, None, 5))
    _, cache = model.apply(
      {"params": params},
      golden["prompts"],
      golden["prompt_mask"],
      3,
      NUM_NEW,
      method="prefill",
    )
    lengths = [
      (layer["prompt_keys"].shape[2], layer["values"].shape[2])
      for layer in cache["layers"]
    ]
    self.assertEqual(lengths, [(4, 5), (11, NUM_NEW), (4, 5)])

  @parameterized.parameters(1, 2, 3, 4, 8, 30)
  def test_every_window_decodes_as_it_reads(self, window):
    config = tiny.llama_config(
      model_type="mistral", windows=(window, None), num_layers=2
    )
    model, params = tiny.model(config), tiny.params(config)
    prompts, mask = tiny.batch(1, (2, 6))
    ids, logits = _greedy(model, params, prompts, mask, 8)
    whole = jnp.concatenate([prompts, ids], axis=1)
    mask = jnp.pad(mask, ((0, 0), (0, 8)), constant_values=True)
    expected = _logits(model, params, whole, mask)[:, 5:-1]
    np.testing.assert_allclose(logits, expected, atol=3e-5, rtol=2e-5)

  def test_branch_may_have_any_number_of_layers(self):
    _, model, _ = _loaded("gemma3")
    config = dataclasses.replace(model.config, num_layers=9)
    self.assertEqual(
      [config.window(i) for i in range(9)],
      [6, 6, None, 6, 6, 6, None, 6, 6],
    )


class MixtureTest(parameterized.TestCase):
  @parameterized.parameters((1, 4, 1), (7, 4, 2), (40, 3, 2), (300, 4, 3))
  def test_products(self, num_rows, num_experts, num_chosen):
    rng = np.random.default_rng(num_rows)
    x = rng.normal(size=(num_rows, 6)).astype("float32")
    gate, up = rng.normal(size=(2, num_experts, 6, 5)).astype("float32")
    down = rng.normal(size=(num_experts, 5, 6)).astype("float32")
    # The last expert is chosen by nobody.
    chosen = np.argsort(rng.random((num_rows, num_experts - 1)), axis=1)
    chosen = chosen[:, :num_chosen].astype("int32")
    weights = rng.random(chosen.shape).astype("float32")
    expected = np.zeros_like(x)
    for row, experts in enumerate(chosen):
      for expert, weight in zip(experts, weights[row], strict=True):
        hidden = np.tanh(x[row] @ gate[expert]) * (x[row] @ up[expert])
        expected[row] += weight * (hidden @ down[expert])

    def mixed(platform, *arrays):
      with mock.patch.object(jax, "default_backend", lambda: platform):
        mix = functools.partial(moe.mix, activation=jnp.tanh)
        value, pullback = jax.vjp(
          lambda x, weights, *kernels: mix(x, chosen, weights, *kernels),
          *arrays,
        )
        return value, pullback(jnp.cos(value))

    arrays = x, weights, gate, up, down
    on_cpu, elsewhere = (mixed(name, *arrays) for name in ("cpu", "tpu"))
    np.testing.assert_allclose(on_cpu[0], expected, atol=2e-4, rtol=1e-4)
    chex.assert_trees_all_close(on_cpu, elsewhere, atol=2e-4, rtol=1e-4)

  @parameterized.parameters("mixtral", "qwen3_moe")
  def test_load_balance_loss(self, name):
    golden, model, params = _loaded(name)
    mask = jnp.asarray(golden["mask"])
    _, left = model.apply(
      {"params": params}, golden["ids"], mask, mutable=[moe.ROUTER]
    )
    loss, metrics = moe.load_balance_loss(
      left[moe.ROUTER],
      mask,
      experts_per_token=model.config.experts_per_token,
    )
    np.testing.assert_allclose(loss, golden["load_balance_loss"], rtol=1e-5)
    self.assertEqual(metrics["router/load_balance_loss"], loss)
    largest, smallest = (
      metrics[f"router/{kind}_share"] for kind in ("largest", "smallest")
    )
    even = 1 / model.config.num_experts
    self.assertBetween(smallest, 0, even)
    self.assertBetween(largest, even, 1)

  def test_even_router_has_the_least_loss(self):
    # Two tokens, two experts, one each: 2 (1/2 1/2 + 1/2 1/2) = 1.
    logits = jnp.array([[[20.0, -20.0], [-20.0, 20.0], [9.0, 0.0]]])
    mask = jnp.array([[True, True, False]])
    loss, metrics = moe.load_balance_loss(
      {"layer": (logits,)}, mask, experts_per_token=1
    )
    np.testing.assert_allclose(loss, 1.0, rtol=1e-6)
    np.testing.assert_allclose(metrics["router/entropy"], 0, atol=1e-6)

  def test_dense_models_have_no_router(self):
    with self.assertRaisesRegex(ValueError, "no logits of a router"):
      moe.load_balance_loss({}, jnp.ones((1, 1), bool), experts_per_token=1)


class RefusedTest(parameterized.TestCase):
  @parameterized.parameters(
    ("gemma", "use_bidirectional_attention", True, "use_bidirectional"),
    ("gemma2", "sliding_window", 0, '"sliding_window"'),
    ("gemma2", "layer_types", ["full_attention"], '"layer_types".*3 layers'),
    ("gemma2", "hidden_activation", "mish", '"hidden_activation".*mish'),
    ("gemma3", "layer_types", ["chunked_attention"] * 4, "chunked"),
    ("gpt_neox", "rotary_pct", 0.4, "partial_rotary_factor 0.4"),
    ("gpt_neox", "hidden_act", "gelu_10", '"hidden_act".*gelu_10'),
    ("opt", "do_layer_norm_before", False, '"do_layer_norm_before" must be'),
    ("opt", "word_embed_proj_dim", 7, '"word_embed_proj_dim" must be 20'),
    ("opt", "_remove_final_layer_norm", True, "_remove_final_layer_norm"),
    ("smollm3", "no_rope_layers", [1], '"no_rope_layers".*3 layers'),
    ("phi3", "rope_parameters", {"rope_type": "linear"}, "longrope"),
    ("granite", "logits_scaling", 0, '"logits_scaling"'),
    ("mixtral", "num_experts_per_tok", 9, "at most the 3 experts, got 9"),
    ("qwen3_moe", "num_experts", "many", '"num_experts"'),
    ("olmo2", "num_attention_heads", None, '"num_attention_heads" is missing'),
    ("mixtral", "vocab_size", 0, '"vocab_size"'),
    ("modernbert", "classifier_pooling", "max", '"classifier_pooling".*max'),
    ("electra", "hidden_act", "mish", '"hidden_act".*mish'),
  )
  def test_config(self, name, field, value, message):
    golden, _, _ = _loaded(name)
    settings = configs.settings("float32", "float32", False)
    config = {**golden["config"], field: value}
    if field in ("rotary_pct", "num_experts"):
      config.pop("rope_parameters", None)
      config.pop("num_local_experts", None)
    with self.assertRaisesRegex(ValueError, f"here: .*{message}"):
      configs.build(config, "here", settings)

  def test_longrope_factors_of_another_width(self):
    config = dict(tiny.golden("phi3")["config"])
    config["rope_parameters"] = {
      **config["rope_parameters"],
      "short_factor": [1.0],
    }
    with self.assertRaisesRegex(ValueError, "3 pairs of dimensions.*got 1"):
      configs.build(
        config, "here", configs.settings("float32", "float32", False)
      )

  def test_longrope_ends_at_the_pretraining_context(self):
    _, model, _ = _loaded("phi3")
    self.assertEqual(model.config.max_positions, 40)
    self.assertEqual(model.config.to_hf()["max_position_embeddings"], 64)

  def test_tied_output_layer_of_another_name(self):
    golden, model, _ = _loaded("gpt_neox_serial")
    other = golden["weights"]["gpt_neox.embed_in.weight"] + 1
    for name in ("lm_head.weight", "embed_out.weight"):
      with self.assertRaisesRegex(ValueError, f"{name} of its own"):
        weights_lib.from_arrays({**golden["weights"], name: other}, model, "x")


ON_MESH = (
  *("gemma2", "gemma3", "gpt_neox_serial", "granite", "mixtral", "olmo2"),
  *("opt", "phi3", "qwen3_moe", "smollm3", "mistral_window"),
)


class MeshTest(parameterized.TestCase):
  @parameterized.parameters(*ON_MESH)
  def test_logits(self, name):
    golden, model, params = _loaded(name)
    mesh = meshes.make("data:2,fsdp:2,tensor:2")
    rules = hf.partition_rules(model, mesh)
    params = meshes.place(params, meshes.shardings(params, rules, mesh))
    ids, mask = meshes.shard_batch((golden["ids"], golden["mask"]), mesh)
    found = _logits(model, params, ids, mask)
    chosen = golden["mask"]
    np.testing.assert_allclose(
      found[chosen], golden["logits"][chosen], atol=2e-4, rtol=2e-5
    )

  @parameterized.parameters("gpt2", "llama")
  def test_odd_vocabulary(self, family):
    make = tiny.gpt2_config if family == "gpt2" else tiny.llama_config
    config = make(vocab_size=41)
    if family == "llama":
      config = dataclasses.replace(config, tie_word_embeddings=False)
    model, params = tiny.model(config), tiny.params(config)
    ids, mask = tiny.batch(0)
    expected = _logits(model, params, ids, mask)
    mesh = meshes.make("data:2,fsdp:2,tensor:2")
    shardings = meshes.shardings(params, hf.partition_rules(model, mesh), mesh)
    params = meshes.place(params, shardings)
    table = params["wte" if family == "gpt2" else "embed_tokens"]["embedding"]
    self.assertEqual(table.sharding.shard_shape(table.shape), (41, 4))
    ids, mask = meshes.shard_batch((ids, mask), mesh)
    found = _logits(model, params, ids, mask)
    self.assertEqual(found.shape[-1], 41)
    np.testing.assert_allclose(found, expected, atol=2e-5, rtol=2e-5)


class ClassifiersTest(parameterized.TestCase):
  @parameterized.parameters(*CLASSIFIERS)
  def test_logits(self, name):
    golden, model, params = _loaded(name)
    arrays = _texts(golden)
    found = _classify(model, params, *arrays)
    np.testing.assert_allclose(found, golden["logits"], atol=2e-5, rtol=2e-5)
    self.assertLen(model.config.labels, golden["logits"].shape[1])
    # The same rows, all padded on the left.
    for row, mask in enumerate(golden["mask"]):
      for array, pad in zip(arrays, (7, False, 0), strict=False):
        real = array[row, mask]
        array[row] = pad
        array[row, -len(real) :] = real
    np.testing.assert_allclose(
      _classify(model, params, *arrays), found, atol=2e-5, rtol=2e-5
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
    release = tuple(map(int, transformers.__version__.split(".")[:2]))
    if "modernbert" in name and release < (5, 18):
      return  # It refuses what it writes itself: types beside those of layers.
    theirs = transformers.AutoConfig.for_model(**model.config.to_hf())
    config = type(model.config)
    fields = theirs.to_dict()
    (architecture,) = fields["architectures"]
    self.assertIn(golden["config"]["architectures"], (None, [architecture]))
    self.assertTrue(hasattr(transformers, architecture), architecture)
    self.assertEqual(config.from_hf(fields), model.config)

  @parameterized.parameters(*GRADIENTS)
  def test_gradients(self, name):
    golden, model, params = _loaded(name)
    gradients = _classifier_gradients(
      model, params, golden["ids"], golden["mask"]
    )
    chex.assert_tree_all_finite(gradients)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
      self.assertTrue(np.any(leaf), jax.tree_util.keystr(path))


class FreshTest(parameterized.TestCase):
  @parameterized.parameters(*fresh.FAMILIES)
  def test_random_model(self, family):
    letters = [chr(ord("a") + i) for i in range(26)]
    tokenizer = tokenizers.of_words([*letters, "1"], ".")
    model = fresh.make(
      family,
      tokenizer,
      hidden_size=32,
      num_layers=2,
      num_heads=4,
      max_positions=16,
      dtype="bfloat16",
    )
    config = model.config
    self.assertEqual(config.vocab_size, 30)
    self.assertEqual(config.dtype, jnp.bfloat16)
    self.assertIsNone(config.eos_token_id)
    shapes = fresh.shapes(model)
    paths = jax.tree_util.tree_leaves_with_path(shapes)
    names = language_models.parameter_names(config)
    self.assertEqual(
      {tuple(key.key for key in path) for path, _ in paths},
      {
        path[:-1] if isinstance(path[-1], int) else path
        for path, _ in names.values()
      },
    )
    again = type(config).from_hf(json.loads(json.dumps(config.to_hf())))
    self.assertEqual(dataclasses.replace(again, dtype=jnp.bfloat16), config)

  def test_sizes_that_do_not_fit(self):
    with self.assertRaisesRegex(ValueError, "divisible by the 4 heads, got 30"):
      fresh.make(
        "gpt_neox",
        tokenizers.of_words([*"abcdefg"], "."),
        hidden_size=30,
        num_layers=1,
        num_heads=4,
        max_positions=8,
      )


# One of each model type, and classifiers on two kinds of decoder.
STEPS = (
  *(name for name in NAMES if name != "gpt_neox_serial"),
  *("gpt2_classifier", "llama_classifier"),
  *("bert", "roberta", "xlm_roberta", "distilbert", "electra", "modernbert"),
)
# Tiny models whose heads two devices do not share: they have others here.
_UNEVEN = {
  "gemma": {"num_key_value_heads": 2},
  "gpt_neox": {"num_attention_heads": 4, "hidden_size": 32},
}


def _for_mesh(name):
  """What `_loaded` returns, with heads that two devices share."""
  golden, model, params = _loaded(name)
  if name not in _UNEVEN:
    return golden, model, params
  settings = configs.settings("float32", "float32", False)
  model = configs.build(golden["config"] | _UNEVEN[name], name, settings)
  rng = np.random.default_rng(0)
  draw = lambda x: np.float32(0.4 * rng.normal(size=x.shape))
  return golden, model, jax.tree.map(draw, weights_lib.shapes(model))


@functools.partial(jax.jit, static_argnums=0)
def _step(model, params, arrays):
  """A step down the gradient: loss, gradients and new parameters."""

  def loss_fn(params):
    variables = {"params": params}
    if families.is_classifier(model):
      return jnp.mean(jnp.square(model.apply(variables, *arrays)))
    ids, mask = arrays
    hidden = model.apply(variables, ids, mask)
    logits = model.apply(variables, hidden, method="logits")[:, :-1]
    found = jax.nn.log_softmax(logits)
    found = jnp.take_along_axis(found, ids[:, 1:, None], axis=-1)[..., 0]
    counts = mask[:, 1:] & mask[:, :-1]
    return -masking.masked_mean(found, counts)

  loss, gradients = jax.value_and_grad(loss_fn)(params)
  return (
    loss,
    gradients,
    jax.tree.map(lambda x, g: x - 0.1 * g, params, gradients),
  )


@pytest.mark.slow
class StepTest(parameterized.TestCase):
  @parameterized.parameters(*STEPS)
  def test_every_parameter_learns_and_a_mesh_learns_the_same(self, name):
    golden, model, params = _for_mesh(name)
    arrays = [jnp.asarray(x) for x in _texts(golden)]
    loss, gradients, learnt = _step(model, params, arrays)
    self.assertTrue(np.isfinite(loss))
    chex.assert_tree_all_finite(gradients)
    for path, leaf in jax.tree_util.tree_leaves_with_path(learnt):
      old = functools.reduce(lambda tree, key: tree[key.key], path, params)
      place = jax.tree_util.keystr(path)
      # A softmax does not see what is added to all keys alike.
      if not place.endswith("['key']['bias']"):
        self.assertTrue(np.any(leaf != old), place)
      if path[-2].key in ("wte", "embed_tokens", "word_embeddings"):
        # Of a language model, those that another token follows.
        ids, mask = golden["ids"], golden["mask"]
        if not families.is_classifier(model):
          ids, mask = ids[:, :-1], mask[:, 1:] & mask[:, :-1]
        self.assertTrue(np.any(leaf != old, axis=1)[ids[mask]].all())
    mesh = meshes.make("data:2,fsdp:2,tensor:2")
    rules = hf.partition_rules(model, mesh)
    placed = meshes.place(params, meshes.shardings(params, rules, mesh))
    found = _step(model, placed, meshes.shard_batch(arrays, mesh))
    np.testing.assert_allclose(found[0], loss, rtol=2e-5)
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(gradients))
    chex.assert_trees_all_close(found[1], gradients, atol=3e-5 * largest)
    chex.assert_trees_all_close(found[2], learnt, atol=3e-6 * largest)


def _types(names):
  return {tiny.golden(name)["config"]["model_type"] for name in names}


def table() -> str:
  """The table of docs/models.md: what is tested above, by model type.

  A mark is a model that a test reads; a dot one that no test does; a blank
  what a family has not.
  """
  writers, judges, steps = map(_types, (NAMES, CLASSIFIERS, STEPS))
  lines = [
    "| `model_type` | load | export | sample | train | classifier | mesh |",
    "|---|---|---|---|---|---|---|",
  ]
  for kind in dict.fromkeys([*families.LANGUAGE_MODELS, *families.CLASSIFIERS]):
    writes = kind in families.LANGUAGE_MODELS
    mark = lambda has, tested: ("✓" if tested else "·") if has else ""
    tested = kind in (writers if writes else judges)
    cells = [
      mark(True, tested),  # test_logits
      mark(True, tested),  # test_export_is_what_was_read
      mark(writes, kind in writers),  # test_greedy_text_and_cache
      mark(True, kind in steps),  # StepTest
      mark(kind in families.CLASSIFIERS, kind in judges),  # ClassifiersTest
      mark(True, kind in steps),  # StepTest
    ]
    lines.append(f"| `{kind}` | {' | '.join(cells)} |".replace("  ", " "))
  return "\n".join(lines)


class TableTest(absltest.TestCase):
  def test_page_shows_what_is_tested(self):
    page = (conftest.REPOSITORY / "docs" / "models.md").read_text()
    start = page.index("| `model_type` |")
    found = page[start : page.index("\n\n", start)]
    self.assertEqual(
      found, table(), "python docs/write_models.py writes the table."
    )

  def test_every_family_is_tested(self):
    self.assertNotIn("·", table())


# Fields that two configs of one model may differ in.
_WITHOUT_EFFECT = (
  "dropout",
  "partial_rotary_factor",  # Stands in "rope_parameters" as well,
  "sliding_window_pattern",  # as this does in "layer_types".
  "_sliding_window_pattern",
)


if __name__ == "__main__":
  absltest.main()
