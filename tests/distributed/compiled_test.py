"""A program that would compile again says so, and why."""

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


if __name__ == "__main__":
  absltest.main()
