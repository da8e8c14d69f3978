"""Blocks in stacks against the same blocks one by one."""

import collections
import dataclasses
import functools
import pathlib
import tempfile
import types
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from jax.sharding import PartitionSpec as P

from rljax.distributed import meshes, stored
from rljax.models import (
  configs,
  hf,
  language_models,
  lora,
  moe,
  peft,
  products,
  remat,
  stacked,
  value_branch,
)
from rljax.models import weights as weights_lib
from rljax.training import frozen, optimizers, precision
from tests import tiny

SLIDING, FULL = "sliding_attention", "full_attention"
# Changes of a golden config, and the names of what its layers become.
FAMILIES = {
  # Every second layer sees a window and turns in its own way; one is left.
  "gemma3": (
    {
      "num_hidden_layers": 5,
      "layer_types": [SLIDING, FULL, SLIDING, FULL, SLIDING],
    },
    ["blocks_0_3", "layers_4"],
  ),
  "qwen3_moe": (
    {"num_hidden_layers": 4, "mlp_only_layers": [0, 2]},
    ["blocks_0_3"],
  ),
  "gemma2": (
    {"num_hidden_layers": 4, "layer_types": [SLIDING, FULL] * 2},
    ["blocks_0_3"],
  ),
  "gpt_neox": ({"num_hidden_layers": 3}, ["blocks_0_2"]),
  "mixtral": ({"num_hidden_layers": 3}, ["blocks_0_2"]),
  "olmo2": ({"num_hidden_layers": 3}, ["blocks_0_2"]),
  "qwen2_window": (
    {
      "num_hidden_layers": 4,
      "max_window_layers": 2,
      "layer_types": [FULL, FULL, SLIDING, SLIDING],
    },
    ["blocks_0_1", "blocks_2_3"],
  ),
  # Every fourth layer turns nothing.
  "smollm3": (
    {
      "num_hidden_layers": 8,
      "no_rope_layers": [1, 1, 1, 0] * 2,
      "layer_types": [FULL] * 8,
    },
    ["blocks_0_7"],
  ),
}


def _config(name):
  changes, _ = FAMILIES[name]
  config = {**tiny.golden(name)["config"], **changes}
  settings = configs.settings("float32", "float32")
  return configs.build(config, pathlib.Path(name), settings).config


def _pair(config, seed=0):
  """A model and its parameters, unrolled and in stacks; arrays of the host."""
  model = language_models.module(config)
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    noise = rng.normal(size=leaf.shape).astype(np.float32)
    is_scale = path[-1].key == "scale"
    return 1 + 0.3 * noise if is_scale else 0.4 * noise

  params = jax.tree_util.tree_map_with_path(draw, weights_lib.shapes(model))
  in_stacks = dataclasses.replace(config, scan_layers=True)
  other = language_models.module(in_stacks), stacked.stack(params, in_stacks)
  return (model, params), other


@functools.partial(jax.jit, static_argnums=0)
def _everything(model, params):
  """Loss, gradients, and the logits of six tokens that are decoded."""
  ids, mask = tiny.batch(shape=(4, 12), vocab_size=model.config.vocab_size)
  loss, gradients = tiny.loss_and_gradients(model, params, ids, mask)
  apply = functools.partial(model.apply, {"params": params})

  def step(carry, token):
    hidden, cache = apply(token, carry, method="decode")
    return cache, apply(hidden, method="logits")

  prompt = jnp.arange(12)[None] >= jnp.array([0, 3, 0, 3])[:, None]
  _, cache = apply(ids, prompt, 2, 6, method="prefill")
  tokens = jnp.arange(48).reshape(6, 8) % 40
  _, logits = jax.lax.scan(step, cache, tokens)
  return loss, gradients, logits


def _llama(**fields):
  return tiny.llama_config(num_layers=3, **fields)


def _check(test, config, names):
  (model, params), (other, in_stacks) = _pair(config)
  is_block = lambda name: name.startswith(("blocks_", "layers_"))
  test.assertEqual(sorted(filter(is_block, in_stacks)), names)
  chex.assert_trees_all_equal_shapes(in_stacks, weights_lib.shapes(other))
  chex.assert_trees_all_equal(stacked.unstack(in_stacks), params)
  loss, gradients, logits = _everything(model, params)
  found = _everything(other, in_stacks)
  np.testing.assert_allclose(found[0], loss, rtol=1e-6)
  # The unit: the largest number of each array.
  scaled = lambda a, b: np.max(np.abs(a - b)) / max(np.max(np.abs(a)), 1e-6)
  gaps = jax.tree.map(scaled, gradients, stacked.unstack(found[1]))
  test.assertLess(max(jax.tree.leaves(gaps)), 5e-5)
  np.testing.assert_allclose(found[2], logits, rtol=1e-4, atol=1e-4)


class StackedTest(parameterized.TestCase):
  def test_stretches_by_hand(self):
    def cut(kinds):
      return [s.name for s in stacked._cut(kinds)]

    self.assertEqual(cut("aaaa"), ["blocks_0_3"])
    self.assertEqual(cut("abab"), ["blocks_0_3"])
    self.assertEqual(cut("aabb"), ["blocks_0_1", "blocks_2_3"])
    self.assertEqual(cut("aab" * 4 + "aa"), ["blocks_0_11", "blocks_12_13"])
    self.assertEqual(cut("abc"), ["layers_0", "layers_1", "layers_2"])
    self.assertEqual(cut("baaa"), ["layers_0", "blocks_1_3"])
    (one,) = stacked._cut("abcabc")
    self.assertEqual(one, stacked.Stretch(first=0, period=3, count=2))
    self.assertEqual(one.layer(1, 1), "layers_4")

  def test_the_same_numbers(self):
    _check(self, _config("gemma3"), FAMILIES["gemma3"][1])

  def test_layers_that_do_not_repeat_are_refused(self):
    config = tiny.golden("gemma2")["config"] | {"num_hidden_layers": 2}
    config["layer_types"] = [SLIDING, FULL]
    settings = configs.settings("float32", "float32", scan_layers=True)
    with self.assertRaisesRegex(ValueError, "--scan_layers needs layers that"):
      configs.build(config, pathlib.Path("gemma2"), settings)

  def test_rules_leave_the_layers_together(self):
    (model, params), (other, in_stacks) = _pair(_llama())
    mesh = meshes.make("data:2,fsdp:2,tensor:2")
    rules = hf.partition_rules(lora.Model(other, None), mesh)
    adapters = lora.adapt(other, in_stacks, LORA, base_dtype="int8")
    found = meshes.shardings(adapters, rules, mesh)
    layer = ("blocks_0_2", "layers_0", "mlp", "down_proj")
    at = lambda tree, name: functools.reduce(dict.get, (*layer, name), tree)
    self.assertEqual(at(found.base, "kernel").spec, P(None, "tensor", "fsdp"))
    self.assertEqual(at(found.lora, "lora_a").spec, P(None, "tensor", None))
    self.assertEqual(at(found.lora, "lora_b").spec, P(None, None, "fsdp"))
    self.assertEqual(at(found.scales, "kernel_scale").spec, P(None, "fsdp"))
    # As the layers lie that are unrolled.
    one = meshes.shardings(params, hf.partition_rules(model, mesh), mesh)
    for path, leaf in jax.tree_util.tree_leaves_with_path(found.base):
      name = stacked.path_of(path)
      wanted = one
      for key in stacked.layer_paths(name, _leaf(adapters.base, path))[0].split(
        "/"
      ):
        wanted = wanted[key]
      lead = (None,) * bool(stacked.in_stack(name) and wanted.spec)
      self.assertEqual(leaf.spec, P(*lead, *wanted.spec), name)

  def test_helpers_know_what_a_layer_has(self):
    (_, params), (_, in_stacks) = _pair(_llama())
    self.assertEqual(precision.depth(in_stacks), 3)
    self.assertEqual(precision.depth(params), 3)
    narrow = products.narrowed(in_stacks, jnp.bfloat16)
    expected = products.narrowed(params, jnp.bfloat16)
    chex.assert_trees_all_equal(stacked.unstack(narrow), expected)
    self.assertEqual(
      narrow["blocks_0_2"]["layers_0"]["input_layernorm"]["scale"].dtype,
      np.float32,
    )

  def test_frozen_layers(self):
    (_, params), (_, in_stacks) = _pair(_llama())
    for pattern in ("embed", r"layers_\d/mlp/"):
      learnt, others = frozen.split({"policy": params}, pattern)
      of_stacks = frozen.split({"policy": in_stacks}, pattern)
      for expected, found in zip((learnt, others), of_stacks, strict=True):
        names = [
          name
          for path in found
          for name in stacked.layer_paths(path, found[path])
        ]
        self.assertCountEqual(names, expected)
    with self.assertRaisesRegex(ValueError, "leave out --scan_layers"):
      frozen.split({"policy": in_stacks}, "layers_0/")


def _leaf(tree, path):
  return functools.reduce(lambda node, key: node[key.key], path, tree)


LORA = lora.Settings(rank=2, alpha=4.0, base="base")


class DoorTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    place = tempfile.TemporaryDirectory()
    self.addCleanup(place.cleanup)
    self.folder = pathlib.Path(place.name)

  @parameterized.parameters("gemma3", "qwen3_moe")
  def test_both_ways(self, name):
    (model, params), (other, in_stacks) = _pair(_config(name))
    for place, *one in (("one", model, params), ("all", other, in_stacks)):
      hf.save(self.folder / place, *one)
    files = [sorted((self.folder / x).iterdir()) for x in ("one", "all")]
    for one, of_stacks in zip(*files, strict=True):
      self.assertEqual(one.name, of_stacks.name)
      self.assertEqual(one.read_bytes(), of_stacks.read_bytes(), one.name)
    for lazy in (False, True):
      again = hf.load(
        self.folder / "one", scan_layers=True, tokenizer=False, lazy=lazy
      )
      self.assertEqual(again.model, other)
      chex.assert_trees_all_equal(
        jax.tree.map(np.asarray, again.params), in_stacks
      )
      # A part of what is on disk.
      if lazy:
        norm = again.params["norm"]["scale"]
        self.assertIsInstance(norm, stored.Stored)
        for path, leaf in jax.tree_util.tree_leaves_with_path(again.params):
          index = (slice(1, 2),) * leaf.ndim
          np.testing.assert_array_equal(
            leaf[index], _leaf(in_stacks, path)[index]
          )

  def test_checkpoints_of_either_layout(self):
    (model, params), (other, in_stacks) = _pair(_llama())
    saved = {"policy": params}, {"policy": in_stacks}
    for restored in saved:
      with mock.patch.object(
        weights_lib, "entry_of", lambda *_, found=restored: found["policy"]
      ):
        read = functools.partial(weights_lib.from_checkpoint, self.folder)
        chex.assert_trees_all_equal(read(model, None, "policy"), params)
        chex.assert_trees_all_equal(read(other, None, "policy"), in_stacks)

  def test_adapters(self):
    (model, params), (other, in_stacks) = _pair(_llama())
    self.assertEqual(lora.digest(in_stacks), lora.digest(params))
    for base_dtype in lora.BASE_DTYPES:
      one = lora.adapt(model, params, LORA, base_dtype=base_dtype)
      found = lora.adapt(other, in_stacks, LORA, base_dtype=base_dtype)
      for part in ("lora", "base", "scales"):
        chex.assert_trees_all_equal(
          stacked.unstack(getattr(found, part)), getattr(one, part)
        )
    noise = lambda x: np.random.default_rng(x.size).normal(size=x.shape)
    one = dataclasses.replace(one, lora=jax.tree.map(noise, one.lora))
    found = dataclasses.replace(
      found, lora=stacked.stack(one.lora, other.config)
    )
    for place, of, tree in (("one", model, one), ("all", other, found)):
      peft.write(self.folder / place, of, tree.lora, LORA)
    name = "adapter_model.safetensors"
    self.assertEqual(
      (self.folder / "one" / name).read_bytes(),
      (self.folder / "all" / name).read_bytes(),
    )
    ids, mask = tiny.batch()
    apply = lambda model, tree: lora.Model(model, LORA).apply(
      {"params": tree}, ids, mask
    )
    # Of an int8 base, with adapters that add something.
    np.testing.assert_allclose(
      apply(other, found), apply(model, one), rtol=1e-4, atol=1e-4
    )
    whole = lora.merged(found)
    chex.assert_trees_all_close(
      stacked.unstack(whole), lora.merged(one), rtol=1e-6
    )


class OptimizerTest(parameterized.TestCase):
  @parameterized.parameters(("adafactor", "float32"), ("muon", "bfloat16"))
  def test_a_layer_steps_as_by_itself(self, name, moment_dtype):
    self.enter_context(jax.numpy_dtype_promotion("standard"))
    config = types.SimpleNamespace(
      scan_layers=True, num_layers=3, layer_kind=lambda i: None
    )
    rng = np.random.default_rng(0)

    def draw():
      one = lambda *shape: rng.normal(size=shape).astype(np.float32)
      layers = {
        f"layers_{i}": {
          "mlp": {"kernel": one(130, 128), "experts": one(2, 4, 6)},
          "norm": {"scale": one(130)},
        }
        for i in range(3)
      }
      return {"policy": {**layers, "embed": {"embedding": one(8, 130)}}}

    params, grads = draw(), [draw(), draw()]
    optimizer = optimizers.make(
      4,
      name=name,
      learning_rate=0.1,
      weight_decay=0.1,
      moment_dtype=moment_dtype,
    )

    apply = jax.jit(optimizer.apply)

    def run(params, grads):
      state = optimizer.init(params)
      for gradient in grads:
        params, state = apply(gradient, state, params)
      return params, state

    expected, one = run(params, grads)
    stack = lambda tree: stacked.stack(tree, config)
    found, state = run(stack(params), [stack(x) for x in grads])
    # Moments in bfloat16 are rounded by chance, each array by its own draws.
    tolerance = 1e-5 if moment_dtype == "float32" else 0.02
    chex.assert_trees_all_close(
      stacked.unstack(found), expected, rtol=tolerance, atol=tolerance
    )
    # Moments of vectors stay in float32, those of matrices do not.
    count = lambda tree: collections.Counter(
      {
        kind: sum(x.size for x in jax.tree.leaves(tree) if x.dtype == kind)
        for kind in (jnp.float32, jnp.bfloat16)
      }
    )
    self.assertEqual(count(state)[jnp.bfloat16], count(one)[jnp.bfloat16])


def _check_remat(policy, scan_layers):
  one, both = _pair(_llama(remat=policy))
  model, params = both if scan_layers else one
  plain = dataclasses.replace(model.config, remat="none")
  ids, mask = tiny.batch()
  expected = tiny.loss_and_gradients(tiny.model(plain), params, ids, mask)
  found = tiny.loss_and_gradients(model, params, ids, mask)
  chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)


class RematTest(parameterized.TestCase):
  def test_the_same_gradients(self):
    _check_remat("dots", True)

  def test_names(self):
    self.assertEqual(remat.check(True), "nothing")
    self.assertEqual(remat.check(False), "none")
    self.assertEqual(remat.check("dots"), "dots")
    with self.assertRaisesRegex(ValueError, "remat must be one of none, "):
      remat.check("dotty")
    with self.assertRaisesRegex(ValueError, "on a CPU: use dots or nothing"):
      hf.load("anything", remat="offload")


@pytest.mark.slow
class MoreFamiliesTest(parameterized.TestCase):
  @parameterized.parameters(*sorted(FAMILIES.keys() - {"gemma3"}))
  def test_more_of_the_same_numbers(self, name):
    _check(self, _config(name), FAMILIES[name][1])

  @parameterized.parameters(("nothing", True), ("dots", False))
  def test_more_of_the_same_gradients(self, policy, scan_layers):
    _check_remat(policy, scan_layers)

  def test_routers_of_a_stack(self):
    ids, mask = tiny.batch()
    losses = []
    for model, params in _pair(_config("qwen3_moe")):
      _, left = model.apply({"params": params}, ids, mask, mutable=["router"])
      loss = moe.load_balance_loss(left["router"], mask, experts_per_token=2)
      losses.append(loss)
    chex.assert_trees_all_close(*losses, rtol=1e-5, atol=1e-6)

  def test_a_branch_and_a_classifier(self):
    (model, params), (other, in_stacks) = _pair(_llama())
    ids, mask = tiny.batch()
    hidden = model.apply({"params": params}, ids, mask)
    branch = value_branch.ValueBranch(other.config, 2)
    start = branch.init(jax.random.key(0), hidden, mask)["params"]
    self.assertIn("blocks_0_1", start["decoder"])
    found = branch.apply({"params": start}, hidden, mask)
    branch = value_branch.ValueBranch(model.config, 2)
    expected = branch.apply({"params": stacked.unstack(start)}, hidden, mask)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    loaded = hf.LanguageModel(other, in_stacks, None, "base", None)
    whole = hf.classifier_from(loaded)
    with tempfile.TemporaryDirectory() as folder:
      hf.save_classifier(folder, whole.model, whole.params)
      again = hf.load_classifier(folder, scan_layers=True, tokenizer=False)
      one = hf.load_classifier(folder, tokenizer=False)
    chex.assert_trees_all_equal(again.params, whole.params)
    chex.assert_trees_all_equal(one.params, stacked.unstack(whole.params))

  def test_the_same_numbers_gpt2(self):
    _check(self, tiny.gpt2_config(num_layers=3), ["blocks_0_2"])


if __name__ == "__main__":
  absltest.main()
