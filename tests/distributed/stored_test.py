"""Arrays on disk, of which each device gets its part."""

import tempfile

import jax
import numpy as np
from absl.testing import absltest
from jax.sharding import PartitionSpec as P

from rljax.distributed import meshes, stored
from rljax.models import hf
from rljax.storage import checkpoint
from tests import tiny


class StoredTest(absltest.TestCase):
  def test_each_device_reads_its_part(self):
    array, asked = np.arange(24.0, dtype=np.float32).reshape(8, 3), []

    def read(index):
      asked.append(array[index].shape)
      return array[index]

    leaf = stored.Stored(array.shape, array.dtype, read)
    mesh = meshes.make("fsdp:4")
    placed = meshes.place(
      {"rows": leaf, "all": leaf, "here": array},
      {
        "rows": jax.sharding.NamedSharding(mesh, P("fsdp")),
        "all": jax.sharding.NamedSharding(mesh, P()),
        "here": jax.sharding.NamedSharding(mesh, P()),
      },
    )
    for found in placed.values():
      np.testing.assert_array_equal(found, array)
    self.assertEqual(placed["rows"].sharding.spec, P("fsdp"))
    self.assertIn((2, 3), asked)
    self.assertEqual(asked.count((8, 3)), len(asked) - 4)

  def test_numpy_reads_it_whole(self):
    array = np.arange(6.0).reshape(2, 3)
    leaf = stored.Stored((2, 3), np.float64, array.__getitem__)
    np.testing.assert_array_equal(np.asarray(leaf), array)
    self.assertEqual(np.asarray(leaf, np.float32).dtype, np.float32)
    self.assertEqual((leaf.ndim, leaf.size, leaf.nbytes), (2, 6, 48))


class LazyModelTest(absltest.TestCase):
  def test_same_weights(self):
    """Transposed, converted, in several files; by parts and as a whole."""
    folder = self.enter_context(tempfile.TemporaryDirectory())
    for config in (tiny.gpt2_config(), tiny.llama_config()):
      model, params = tiny.model(config), tiny.params(config)
      hf.save(folder, model, params, dtype="bfloat16", max_shard_bytes=4000)
      options = {"tokenizer": False, "param_dtype": "float32"}
      plain = hf.load(folder, **options)
      lazy = hf.load(folder, lazy=True, **options)
      is_leaf = lambda x: isinstance(x, stored.Stored)
      for leaf in jax.tree.leaves(lazy.params, is_leaf=is_leaf):
        self.assertIsInstance(leaf, stored.Stored)
      self.assertEqual(
        checkpoint.fingerprint(lazy.params),
        checkpoint.fingerprint(plain.params),
      )
      mesh = meshes.make("data:2,fsdp:2,tensor:2")
      rules = hf.partition_rules(model, mesh)
      shardings = meshes.shardings(lazy.params, rules, mesh)
      found = meshes.place(lazy.params, shardings)
      jax.tree.map(np.testing.assert_array_equal, found, plain.params)
      specs = jax.tree.map(lambda x: x.sharding.spec, found)
      self.assertEqual(specs, jax.tree.map(lambda x: x.spec, shardings))


if __name__ == "__main__":
  absltest.main()
