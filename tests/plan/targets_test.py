"""Names of machines, and what they have."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from absl.testing import absltest, parameterized

from rljax.distributed import compiled, meshes, planning
from rljax.models import attention
from rljax.plan import targets


class ParseTest(parameterized.TestCase):
  @parameterized.parameters(
    ("v5e:2x4", "v5e", "2x4", 8),
    ("v5e-8", "v5e", "2x4", 8),
    ("v5litepod-16", "v5e", "4x4", 16),
    ("v6e-16", "v6e", "4x4", 16),
    ("v5e-1", "v5e", "1x1", 1),
    # Google counts the cores of a v5p, two on a chip, which is one device.
    ("v5p-8", "v5p", "2x2x1", 4),
    ("v5p:2x2x2", "v5p", "2x2x2", 8),
    ("tpu7x:2x2x1", "tpu7x", "2x2x1", 8),
    ("h100:8", "h100", "", 8),
    ("H200", "h200", "", 1),
    ("cpu:8", "cpu", "", 8),
  )
  def test_names(self, name, kind, topology, num_devices):
    target = targets.parse(name)
    self.assertEqual(
      (target.kind, target.topology, target.num_devices),
      (kind, topology, num_devices),
    )

  @parameterized.parameters(
    ("v9:8", "none of v5e, .* such as v5e:2x4"),
    ("", "none of v5e"),
    ("v5e:3", "no slice; there are v5e:1, v5e:4, v5e:8"),
    ("v5p-3", "no slice; there are v5p-8, v5p-16"),
    ("v5p:2x2", "no slice; there are v5p:2x2x1"),
    ("v5e:0x2", "no slice"),
    ("h100:0", "must be positive"),
    ("h100:2x2", "must be positive"),
  )
  def test_wrong_names(self, name, message):
    with self.assertRaisesRegex(ValueError, message):
      targets.parse(name)

  def test_simulated_devices(self):
    self.assertLen(targets.devices(targets.parse("cpu:8")), 8)
    with self.assertRaisesRegex(ValueError, "needs 16 simulated devices"):
      targets.devices(targets.parse("cpu:16"))

  @parameterized.parameters(
    ("v5e-4", "libtpu"), ("h100:2", "jax_cuda12_plugin")
  )
  def test_what_is_not_installed(self, name, module):
    if importlib.util.find_spec(module):
      self.skipTest(f"{module} is installed")
    with self.assertRaisesRegex(ValueError, "nothing here compiles for it"):
      targets.devices(targets.parse(name))


@pytest.mark.slow
class CompilersTest(parameterized.TestCase):
  @parameterized.parameters(
    ("v5e:1x1", "libtpu", 1),
    ("v5p:2x2x2", "libtpu", 8),
    ("h100:8", "jax_cuda12_plugin", 8),
  )
  def test_compiles_without_a_device(self, name, module, num_devices):
    if not importlib.util.find_spec(module):
      self.skipTest(f"needs {module}")
    devices = targets.devices(targets.parse(name))
    self.assertLen(devices, num_devices)
    mesh = jax.sharding.Mesh(devices, "x")
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    like = jax.ShapeDtypeStruct((256, 256), jnp.float32, sharding=rows)
    program = jax.jit(lambda x: x @ x.T).lower(like).compile()
    size = 256 * 256 * 4
    memory = program.memory_analysis()
    self.assertEqual(memory.argument_size_in_bytes, size // num_devices)

  @parameterized.parameters(
    ("v5e:1x1", "data:1", "libtpu", "splash"),
    ("v5e:2x2", "fsdp:2,tensor:2", "libtpu", "splash"),
    ("h100:1", "data:1", "jax_cuda12_plugin", "blocks"),
  )
  def test_attention(self, name, spec, module, form):
    if not importlib.util.find_spec(module):
      self.skipTest(f"needs {module}")
    length, chosen = 1024, []

    def loss(queries, keys, values, mask):
      chosen.append(attention.choose(queries, keys))
      found = attention.attend(queries, keys, values, mask)
      return jnp.sum(found.astype(jnp.float32))

    with planning.plan(targets.devices(targets.parse(name))) as plan:
      mesh = meshes.make(spec)
      heads = jax.sharding.PartitionSpec(("data", "fsdp"), None, "tensor")
      # cuDNN is not among the wheels that compile; with it, float32 is not.
      shapes = [((4, length, n, 64), jnp.float32) for n in (4, 2, 2)]
      operands = [
        planning.Absent(*x, sharding=jax.sharding.NamedSharding(mesh, heads))
        for x in shapes
      ]
      mask = planning.Absent(
        (4, length),
        jnp.bool_,
        sharding=jax.sharding.NamedSharding(
          mesh, jax.sharding.PartitionSpec(("data", "fsdp"))
        ),
      )
      gradient = compiled.Compiled("learn", jax.grad(loss, (0, 1, 2)))
      gradient(*operands, mask)
    self.assertEqual(chosen, [form])
    (program,) = plan.programs
    self.assertEqual(program.error, "")
    # The scores of one head of all rows would be as much.
    self.assertLess(program.memory["temporary"], 4 * length**2 * 4 * 2)


if __name__ == "__main__":
  absltest.main()
