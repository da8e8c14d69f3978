"""A program that would compile again says so, and why."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest

from rljax.distributed import compiled


class CompiledTest(absltest.TestCase):
  def test_compiles_once_per_shape(self):
    double = compiled.Compiled("double", lambda x: 2 * x)
    np.testing.assert_array_equal(double(jnp.arange(3)), [0, 2, 4])
    double(jnp.arange(3))
    self.assertLen(double.compilations, 1)
    double(jnp.arange(4))
    self.assertLen(double.compilations, 2)
    self.assertGreater(double.compilations[0]["seconds"], 0)

  def test_recompilation_names_the_argument(self):
    add = compiled.Compiled("add", lambda x, y: x + y["b"])
    add(jnp.zeros(3), {"b": jnp.ones(3)})
    add.freeze()
    add(jnp.zeros(3), {"b": jnp.zeros(3)})
    with self.assertRaisesRegex(
      RuntimeError, r"add would compile.*\['b'\].*float32\[3\].*float32\[1\]"
    ):
      add(jnp.zeros(3), {"b": jnp.ones(1)})
    with self.assertRaisesRegex(RuntimeError, "structure|PyTreeDef"):
      add(jnp.zeros(3), {"b": jnp.ones(3), "c": jnp.ones(3)})

  def test_thaws_once_for_another_size(self):
    double = compiled.Compiled("double", lambda x: 2 * x)
    for size in (3, 4, 3):
      double.thaw(size)
      double(jnp.zeros(size))
      double.freeze()
    double.thaw(0)
    double.thaw(4)
    with self.assertRaisesRegex(RuntimeError, "double would compile again"):
      double(jnp.zeros(5))

  def test_recompilation_by_sharding(self):
    double = compiled.Compiled("double", lambda x: 2 * x)
    double(jnp.arange(8))
    double.freeze()
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    spread = jax.device_put(
      jnp.arange(8),
      jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data")),
    )
    with self.assertRaisesRegex(RuntimeError, "was int32.8. on .*, now int32"):
      double(spread)

  def test_mesh_is_that_of_the_arguments(self):
    found = []

    def double(x):
      found.append(compiled.mesh())
      return 2 * x

    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    compiled.Compiled("double", double)(jax.device_put(jnp.arange(8), spread))
    compiled.Compiled("double", double)(np.arange(8))
    self.assertEqual(found, [mesh, None])
    self.assertIsNone(compiled.mesh())

  def test_recomputed_layers_save_memory(self):
    def loss(params, x, is_saving):
      layer = lambda x, w: jnp.tanh(jnp.tanh(x @ w) @ w)
      for w in params:
        x = (jax.checkpoint(layer) if is_saving else layer)(x, w)
      return jnp.sum(x)

    params = [jnp.eye(8) / n for n in range(1, 9)]
    x, found = jnp.ones((2048, 8)), []
    for is_saving in (False, True):
      run = functools.partial(loss, is_saving=is_saving)
      program = compiled.Compiled("gradient", jax.grad(run))
      found.append((program(params, x), program.compilations[0]))
    (all_kept, kept), (all_saved, saved) = found
    # Three arrays in a layer, or one.
    self.assertLess(saved["temporary_bytes"], 0.7 * kept["temporary_bytes"])
    for x, y in zip(all_saved, all_kept, strict=True):
      np.testing.assert_array_equal(x, y)


if __name__ == "__main__":
  absltest.main()
