import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import absltest, parameterized
from flax import traverse_util
from jax.sharding import PartitionSpec as P

from rljax.distributed import meshes, stored
from rljax.models import fresh, hf, lora
from rljax.tasks import tokenizers
from rljax.training import adapted, microbatch, optimizers
from tests import tiny

SETTINGS = lora.Settings(rank=3, alpha=6.0)


def _model(config=None):
  config = config or tiny.llama_config()
  params = jax.tree.map(np.asarray, tiny.params(config))
  return tiny.model(config), params


def _random(params, seed=0):
  """The same parameters with adapters that add something."""
  rng = np.random.default_rng(seed)
  learnt, frozen = lora.split(params)
  noise = lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), jnp.float32)
  return lora.join(jax.tree.map(noise, learnt), frozen)


@functools.partial(jax.jit, static_argnums=0)
def _loss(model, params, ids, mask):
  hidden = model.apply({"params": params}, ids, mask)
  logits = model.apply({"params": params}, hidden, method="logits")
  return jnp.square(jnp.where(mask[..., None], logits, 0.0)).mean()


class AdaptedTest(parameterized.TestCase):
  @parameterized.parameters(tiny.llama_config, tiny.gpt2_config)
  def test_new_adapters_change_no_bit(self, config):
    model, params = _model(config(remat=True))
    ids, mask = tiny.batch()
    adapters = lora.adapt(model, params, SETTINGS)
    wrapped = lora.Model(model, SETTINGS)
    expected = model.apply({"params": params}, ids, mask)
    found = wrapped.apply({"params": adapters}, ids, mask)
    np.testing.assert_array_equal(found, expected)
    # Parameters without adapters are those of the module.
    plain = wrapped.apply({"params": params}, ids, mask)
    np.testing.assert_array_equal(plain, expected)

  @parameterized.product(
    base_dtype=lora.BASE_DTYPES, config=[tiny.llama_config, tiny.gpt2_config]
  )
  def test_beside_is_merged(self, base_dtype, config):
    model, params = _model(config())
    ids, mask = tiny.batch()
    adapters = _random(
      lora.adapt(model, params, SETTINGS, base_dtype=base_dtype)
    )
    wrapped = lora.Model(model, SETTINGS)
    gradient = jax.grad(
      lambda learnt, frozen, model, of: _loss(
        model, of(lora.join(learnt, frozen)), ids, mask
      )
    )
    learnt, frozen = lora.split(adapters)
    beside = gradient(learnt, frozen, wrapped, lambda x: x)
    merged = gradient(learnt, frozen, model, lora.merged)
    chex.assert_trees_all_close(beside, merged, rtol=1e-3, atol=1e-5)
    self.assertEqual(list(beside), ["lora"])

  def test_gradients_are_those_of_the_kernel(self):
    # W' = W + s A B: ∂L/∂B = s Aᵀ ∂L/∂W', and ∂L/∂A = s ∂L/∂W' Bᵀ.
    model, params = _model()
    ids, mask = tiny.batch()
    adapters = _random(lora.adapt(model, params, SETTINGS))
    learnt, frozen = lora.split(adapters)
    found = jax.grad(
      lambda learnt: _loss(
        lora.Model(model, SETTINGS), lora.join(learnt, frozen), ids, mask
      )
    )(learnt)["lora"]
    whole = jax.grad(
      lambda params: _loss(model, params, ids, mask)
    )(lora.merged(adapters))  # fmt: skip
    path = ("layers_0", "self_attn", "q_proj")
    of = lambda tree: functools.reduce(dict.get, path, tree)
    kernel, own = of(whole)["kernel"], of(adapters.lora)
    chex.assert_trees_all_close(
      of(found),
      {
        "lora_a": 2.0 * kernel @ own["lora_b"].T,
        "lora_b": 2.0 * own["lora_a"].T @ kernel,
      },
      rtol=1e-3,
      atol=1e-5,
    )

  def test_full_rank_is_full_training(self):
    """Trains B beside A = I, and all kernels; their weights stay the same.

    With r = D, s = 1 and A fixed at the identity, W' = W + B has the gradient
    of W in B. An optimizer that treats each number by itself, as Adam does,
    then takes the same steps. (Where A learns too, the paths differ: LoRA of
    full rank can reach what full training does, by another way.)
    """
    config = tiny.llama_config(intermediate_size=16)  # All D are 16.
    model, params = _model(config)
    ids, mask = tiny.batch()
    batch = {"ids": ids, "mask": mask}
    settings = lora.Settings(rank=16, alpha=16.0)
    adapters = lora.adapt(model, params, settings)
    identity = lambda path, x: np.eye(16) if path[-1].key == "lora_a" else x
    adapters = lora.join(
      jax.tree_util.tree_map_with_path(identity, lora.learnt(adapters)),
      lora.split(adapters)[1],
    )
    kernels = {path for path, _ in lora.layers(model).values()}

    def is_kernel(path, _):
      return path[:-1] in kernels

    def train(model, params, learns):
      labels = traverse_util.path_aware_map(
        lambda path, x: "adam" if learns(path, x) else "none",
        lora.learnt(params),
      )
      adam = optax.adam(1e-2, eps=1e-3)  # Rounding stays small.
      transform = optimizers.guarded(
        optax.multi_transform(
          {"adam": adam, "none": optax.set_to_zero()}, labels
        )
      )

      def loss_fn(params, batch):
        return _loss(model, params, batch["ids"], batch["mask"]), {}

      gradients = microbatch.grad(loss_fn, 2)

      @jax.jit
      def step(params, state):
        grads, _ = gradients(params, batch)
        return optimizers.step(transform, grads, state, params, {})[:2]

      state = transform.init(params)
      with jax.numpy_dtype_promotion("standard"):  # As scripts have it.
        for _ in range(3):
          params, state = step(params, state)
      return lora.merged(params)

    full = train(model, jax.tree.map(jnp.asarray, params), is_kernel)
    beside = train(
      lora.Model(model, settings),
      jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), adapters),
      lambda path, _: path[-1] == "lora_b",
    )
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), full, params)
    self.assertGreater(moved["layers_0"]["mlp"]["up_proj"]["kernel"], 0.01)
    chex.assert_trees_all_close(beside, full, atol=2e-4)

  def test_rslora(self):
    self.assertEqual(lora.Settings(rank=4, alpha=8).scaling, 2.0)
    self.assertEqual(lora.Settings(rank=4, alpha=8, rslora=True).scaling, 4.0)
    with self.assertRaisesRegex(ValueError, "positive rank and alpha"):
      lora.Settings(rank=0, alpha=1)

  def test_targets(self):
    model, _ = _model()
    names = lora.layers(model, ("q_proj", "0.mlp.down_proj"))
    self.assertEqual(
      sorted(names),
      [
        "model.layers.0.mlp.down_proj",
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
      ],
    )
    with self.assertRaisesRegex(ValueError, "'proj', which is no dense layer"):
      lora.layers(model, ("proj",))

  @parameterized.parameters(*fresh.FAMILIES)
  def test_families(self, family):
    model = fresh.make(
      family,
      tokenizers.of_words([*"abc"], "."),
      hidden_size=32,
      num_layers=2,
      num_heads=4,
      max_positions=32,
    )
    shapes = fresh.shapes(model)
    named = {path for path, _ in lora.layers(model).values()}
    # All layers that flax calls dense, but for the routers of mixtures.
    found = {
      path[:-1]
      for path in traverse_util.flatten_dict(shapes)
      if path[-1] == "kernel" and path[0] != "lm_head" and path[-2] != "gate"
    }
    self.assertEqual(named, found)
    applied = set()

    def note(call, args, kwargs, context):
      if isinstance(context.module, nn.Dense):
        applied.add(context.module.path)
      return call(*args, **kwargs)

    ids = jnp.zeros((1, 2), jnp.int32)
    with nn.intercept_methods(note):
      jax.eval_shape(model.apply, {"params": shapes}, ids, ids == 0)
    self.assertContainsSubset(named, applied)


class BaseTest(parameterized.TestCase):
  def test_int8_by_hand(self):
    kernel = np.float32([[1.27, 0.0], [-0.634, 0.0]])
    values, scale = lora.quantise(kernel)
    # The largest of the first column is 127 steps of 0.01; -63.4 is -63.
    np.testing.assert_array_equal(values, [[127, 0], [-63, 0]])
    np.testing.assert_allclose(scale, [0.01, 1.0], rtol=1e-6)

  @parameterized.parameters(0, 1, 2)
  def test_int8_error(self, seed):
    rng = np.random.default_rng(seed)
    kernel = rng.normal(size=(33, 7)) * 10.0 ** rng.integers(-6, 6, size=7)
    kernel = kernel.astype(np.float32)
    values, scale = lora.quantise(kernel)
    bound = np.abs(kernel).max(axis=0) / 254 * (1 + 1e-5)
    self.assertTrue((np.abs(values * scale - kernel) <= bound).all())

  def test_dtypes_and_weights_on_disk(self):
    model, params = _model()
    lazily = jax.tree.map(
      lambda x: stored.Stored(x.shape, x.dtype, x.__getitem__), params
    )
    for dtype in lora.BASE_DTYPES:
      expected = lora.adapt(model, params, None, base_dtype=dtype)
      found = lora.adapt(model, lazily, None, base_dtype=dtype)
      chex.assert_trees_all_equal(jax.tree.map(np.asarray, found), expected)
      layer = expected.base["layers_0"]["mlp"]["up_proj"]
      self.assertEqual(layer["kernel"].dtype.name, dtype)
      scale = expected.base["norm"]["scale"]
      self.assertEqual(scale.dtype.name, "float32")
    self.assertEqual(lora.digest(params), lora.digest(lazily))
    params["norm"]["scale"] = params["norm"]["scale"] + 0.1
    self.assertNotEqual(lora.digest(params), lora.digest(lazily))


class PlacesTest(absltest.TestCase):
  def test_meshes(self):
    model, params = _model()
    wrapped = lora.Model(model, SETTINGS)
    mesh = meshes.make("data:2,fsdp:2,tensor:2")
    rules = hf.partition_rules(wrapped, mesh)
    adapters = lora.adapt(model, params, SETTINGS, base_dtype="int8")
    places = jax.tree.map(
      lambda x: x.spec, meshes.shardings(adapters, rules, mesh)
    )
    layer = lambda tree, *path: functools.reduce(
      dict.get, ("layers_0", *path), tree
    )
    self.assertEqual(
      layer(places.lora, "self_attn", "q_proj"),
      {"lora_a": P("fsdp", None), "lora_b": P(None, "tensor")},
    )
    self.assertEqual(
      layer(places.lora, "mlp", "down_proj"),
      {"lora_a": P("tensor", None), "lora_b": P(None, "fsdp")},
    )
    scale = layer(places.scales, "mlp", "down_proj", "kernel_scale")
    self.assertEqual(scale, P("fsdp"))
    adapters = _random(adapters)
    placed = meshes.place(adapters, meshes.shardings(adapters, rules, mesh))
    ids, mask = tiny.batch()
    np.testing.assert_allclose(
      _loss(wrapped, placed, ids, mask),
      _loss(wrapped, adapters, ids, mask),
      rtol=1e-5,
    )

  def test_the_base_lies_there_once(self):
    model, params = _model()
    mesh = meshes.make("data:1")
    wrapped = lora.Model(model, SETTINGS)
    rules = hf.partition_rules(wrapped, mesh)
    adapters = lora.adapt(model, params, SETTINGS)
    frozen = adapted.Frozen()
    place = lambda tree: frozen.place(tree, meshes.shardings(tree, rules, mesh))
    policy, reference = place(adapters), place(lora.without_adapters(adapters))
    for one, other in zip(
      *map(jax.tree.leaves, (policy.base, reference.base)), strict=True
    ):
      self.assertIs(one, other)
    # A program that takes the state over leaves the base to others.
    state = {"params": {"policy": policy}}
    program = adapted.Program(
      "update",
      lambda state, reference: (
        jax.tree.map(lambda x: x + 1, state),
        reference.base["norm"]["scale"].sum(),
      ),
      meshes.shardings(state, rules, mesh),
    )
    new, _ = program(state, reference)
    self.assertIs(new["params"]["policy"].base["norm"]["scale"],
                  reference.base["norm"]["scale"])  # fmt: skip
    (old,) = jax.tree.leaves(policy.lora["layers_0"]["mlp"]["up_proj"])[:1]
    self.assertTrue(old.is_deleted())
    np.testing.assert_array_equal(
      reference.base["norm"]["scale"], params["norm"]["scale"]
    )


if __name__ == "__main__":
  absltest.main()
