"""Tests of rljax.distributed.meshes."""

import os
import socket
import subprocess
import sys
import tempfile
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import absltest, parameterized
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from rljax.distributed import meshes
from tests import conftest, scripts

_RULES = (
  (r"attention/(query|key)/kernel", PartitionSpec("fsdp", "tensor")),
  (r"embedding", PartitionSpec(("fsdp", "tensor"))),
  (r"kernel", PartitionSpec("fsdp")),
)


def _params():
  return {
    "embedding": jnp.ones((16, 4)),
    "layers": [
      {"attention": {"query": {"kernel": jnp.ones((8, 6))}}},
      {"mlp": {"kernel": jnp.ones((4, 3)), "bias": jnp.ones((3,))}},
    ],
  }


class MakeTest(parameterized.TestCase):
  @parameterized.parameters(
    ("data:-1", (8, 1, 1)),
    ("data:8", (8, 1, 1)),
    ("data:-1,fsdp:2,tensor:2", (2, 2, 2)),
    ("tensor:2,fsdp:-1", (1, 4, 2)),
    ("data:2, tensor:4", (2, 1, 4)),
    ("data:1", (1, 1, 1)),
    ("data:2,fsdp:2,tensor:2", (2, 2, 2)),
  )
  def test_sizes(self, spec, expected):
    mesh = meshes.make(spec)
    self.assertEqual(mesh.axis_names, ("data", "fsdp", "tensor"))
    self.assertEqual(mesh.devices.shape, expected)
    self.assertEqual(mesh.axis_types, (AxisType.Auto,) * 3)

  def test_default_takes_every_device(self):
    self.assertEqual(meshes.make().devices.size, 8)

  def test_idle_devices_are_said(self):
    with self.assertLogs(level="WARNING") as logged:
      meshes.make("data:3")
    self.assertIn("leaves 5 of 8 devices idle", logged.output[0])

  @parameterized.parameters(
    ("data:16", "--mesh=data:16 asks for 16 devices, but 8 were found"),
    ("data:4,fsdp:4", "asks for 16 devices, but 8 were found"),
    ("data:-1,fsdp:3", "fixes 3 devices, which does not divide the 8 found"),
    ("data:-1,fsdp:16", "fixes 16 devices, which does not divide the 8"),
    ("data:-1,fsdp:-1", "only one size may be -1"),
    ("batch:-1", '"batch" is not an axis; there are data, fsdp, tensor'),
    ("data:2,data:4", "gives data twice"),
    ("data:0", "must be positive, or -1 .* got 0"),
    ("data:-2", "must be positive, or -1 .* got -2"),
    ("data", '"data" is not "axis:size"'),
    ("data:two", '"data:two" is not "axis:size"'),
    ("", '"" is not "axis:size"'),
    ("data:2,", '"" is not "axis:size"'),
  )
  def test_bad_spec(self, spec, message):
    with self.assertRaisesRegex(ValueError, message):
      meshes.make(spec)


class ShardingsTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.mesh = meshes.make("data:2,fsdp:2,tensor:2")

  def _specs(self, tree, rules=_RULES):
    found = meshes.shardings(tree, rules, self.mesh)
    return jax.tree.map(lambda sharding: sharding.spec, found)

  def test_first_matching_rule(self):
    specs = self._specs(_params())
    self.assertEqual(
      specs["layers"][0]["attention"]["query"]["kernel"],
      PartitionSpec("fsdp", "tensor"),
    )
    self.assertEqual(specs["embedding"], PartitionSpec(("fsdp", "tensor")))
    self.assertEqual(specs["layers"][1]["mlp"]["kernel"], PartitionSpec("fsdp"))
    # No rule names it.
    self.assertEqual(specs["layers"][1]["mlp"]["bias"], PartitionSpec())

  def test_optimizer_state_lies_like_the_parameters(self):
    params = _params()
    optimizer = optax.chain(
      optax.clip_by_global_norm(1.0), optax.adamw(optax.constant_schedule(1.0))
    )
    specs = self._specs(params)
    state = self._specs(jax.eval_shape(optimizer.init, params))
    adam = state[1][0]
    self.assertEqual(adam.mu, specs)
    self.assertEqual(adam.nu, specs)
    self.assertEqual(adam.count, PartitionSpec())

  def test_factors_of_a_matrix_are_replicated(self):
    mesh = meshes.make("data:2,fsdp:2,tensor:2")
    params = {"layers_0": {"kernel": jnp.zeros((256, 128))}}
    rules = [("kernel", PartitionSpec("fsdp", "tensor"))]
    for transform, num_split in (
      (optax.scale_by_factored_rms(), 0),
      (optax.scale_by_factored_rms(factored=False), 1),
    ):
      state = jax.eval_shape(transform.init, params)
      found = jax.tree.leaves(meshes.shardings(state, rules, mesh))
      split = [x.spec for x in found if x.spec != PartitionSpec()]
      self.assertEqual(split, [PartitionSpec("fsdp", "tensor")] * num_split)

  def test_scalar_is_replicated_although_a_rule_matches(self):
    self.assertEqual(self._specs({"kernel": 1.0})["kernel"], PartitionSpec())

  def test_dimension_not_divisible(self):
    with self.assertRaisesRegex(
      ValueError,
      "dimension 1 of attention/key/kernel, of size 5, is not divisible by the "
      "2 devices of tensor; change tensor in --mesh",
    ):
      self._specs({"attention": {"key": {"kernel": jnp.ones((4, 5))}}})
    with self.assertRaisesRegex(
      ValueError, "size 6, .* by the 4 devices of fsdp x tensor; change fsdp or"
    ):
      self._specs({"embedding": jnp.ones((6, 4))})

  def test_more_dimensions_than_the_array_has(self):
    with self.assertRaisesRegex(
      ValueError, "attention/key/kernel has 1 dimensions, .* splits 2"
    ):
      self._specs({"attention": {"key": {"kernel": jnp.ones((4,))}}})

  @parameterized.parameters(
    ((("^kernel", PartitionSpec()),), '"\\^kernel" is anchored'),
    (
      (("kernel", PartitionSpec("model")),),
      "names the axis 'model', which is none of data, fsdp, tensor",
    ),
  )
  def test_bad_rule(self, rules, message):
    with self.assertRaisesRegex(ValueError, message):
      self._specs(_params(), rules)


class SharedSizeTest(parameterized.TestCase):
  @parameterized.parameters(
    ("data:1", 5, 5),
    ("data:4,fsdp:2", 17, 16),
    ("data:4,fsdp:2", 7, 8),  # A row for each device.
    ("data:2,tensor:4", 5, 4),  # Devices of tensor share no rows.
  )
  def test_rows_that_devices_share(self, spec, size, expected):
    mesh = meshes.make(spec)
    self.assertEqual(meshes.shared_size(size, mesh), expected)
    meshes.check_divisible(expected, mesh, "size")


class PlaceTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.mesh = meshes.make("data:2,fsdp:2,tensor:2")

  def test_place(self):
    params = _params()
    shardings = meshes.shardings(params, _RULES, self.mesh)
    placed = meshes.place(params, shardings)
    jax.tree.map(
      lambda leaf, sharding: self.assertEqual(leaf.sharding, sharding),
      placed,
      shardings,
    )
    jax.tree.map(np.testing.assert_array_equal, placed, params)
    kernel = placed["layers"][0]["attention"]["query"]["kernel"]
    self.assertEqual(kernel.addressable_shards[0].data.shape, (4, 3))

  def test_replicate(self):
    tree = {"x": np.arange(3), "key": jax.random.key(1)}
    placed = meshes.replicate(tree, self.mesh)
    for leaf in jax.tree.leaves(placed):
      self.assertEqual(leaf.sharding, NamedSharding(self.mesh, PartitionSpec()))
    np.testing.assert_array_equal(placed["x"], tree["x"])

  def test_shard_batch(self):
    batch = {"ids": np.arange(24).reshape(8, 3), "scale": np.float32(2)}
    placed = meshes.shard_batch(batch, self.mesh)
    np.testing.assert_array_equal(placed["ids"], batch["ids"])
    self.assertEqual(placed["ids"].sharding, meshes.batch_sharding(self.mesh))
    # data x fsdp = 4 devices share 8 rows; tensor copies them.
    for shard in placed["ids"].addressable_shards:
      self.assertEqual(shard.data.shape, (2, 3))
    self.assertEqual(placed["scale"].sharding.spec, PartitionSpec())

  def test_batch_not_divisible(self):
    mesh = meshes.make("data:4,fsdp:2")
    with self.assertRaisesRegex(
      ValueError,
      r"batch of 12 \(ids\) is not divisible by the 8 devices of data x fsdp; "
      "change --batch_size or --mesh",
    ):
      meshes.shard_batch({"ids": np.zeros((12, 3))}, mesh)


class CacheSplitterTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.mesh = meshes.make("data:2,fsdp:2,tensor:2")
    self.split = jax.jit(meshes.cache_splitter(self.mesh))

  def test_rows_and_heads(self):
    cache = {
      "layers": (
        {"keys": np.arange(96.0).reshape(8, 4, 3)},
        {"keys": np.zeros((8, 3, 4, 5, 2))},  # Three layers of a stack.
      ),
      "mask": np.ones((8, 3), bool),
      "lengths": np.arange(8),
      "step": np.int32(5),
    }
    found = self.split(cache)
    jax.tree.map(np.testing.assert_array_equal, found, cache)
    shapes = jax.tree.map(lambda x: x.sharding.shard_shape(x.shape), found)
    self.assertEqual(shapes["layers"][0]["keys"], (2, 2, 3))
    self.assertEqual(shapes["layers"][1]["keys"], (2, 3, 2, 5, 2))
    self.assertEqual(shapes["mask"], (2, 3))
    self.assertEqual(shapes["lengths"], (2,))
    self.assertEqual(shapes["step"], ())

  def test_what_does_not_divide_is_an_error(self):
    with self.assertRaisesRegex(
      ValueError,
      "dimension 1 of cache/keys, of size 3, is not divisible by the 2 devices "
      "of tensor; change tensor in --mesh",
    ):
      self.split({"keys": np.zeros((8, 3, 2))})


class MapBatchesTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.mesh = meshes.make("data:4,fsdp:2")

  @parameterized.parameters(1, 5, 8, 13, 16, 21)
  def test_all_rows_in_order(self, num_rows):
    arrays = {
      "ids": np.arange(3 * num_rows, dtype=np.int32).reshape(num_rows, 3),
      "rest": [np.arange(num_rows, dtype=np.float32)],
    }
    seen = []

    def function(batch):
      for leaf in jax.tree.leaves(batch):
        self.assertEqual(leaf.sharding, meshes.batch_sharding(self.mesh))
        self.assertLen(leaf.addressable_shards, 8)
        self.assertLen(leaf, 8)
      seen.append(np.asarray(batch["rest"][0]))
      return {"sum": jnp.sum(batch["ids"], axis=1), "x": batch["rest"][0] * 2}

    found = meshes.map_batches(function, arrays, 8, self.mesh)
    self.assertIsInstance(found["sum"], np.ndarray)
    np.testing.assert_array_equal(found["sum"], arrays["ids"].sum(axis=1))
    np.testing.assert_array_equal(found["x"], 2 * arrays["rest"][0])
    # As many calls as it takes, the last one filled up from the front.
    self.assertLen(seen, -(-num_rows // 8))
    np.testing.assert_array_equal(
      np.concatenate(seen), np.arange(8 * len(seen)) % num_rows
    )

  def test_batches_of_every_size_agree(self):
    rows = np.random.default_rng(0).normal(size=(11, 4)).astype(np.float32)
    function = jax.jit(lambda x: (jnp.sin(x), jnp.max(x, axis=1)))
    expected = np.sin(rows), rows.max(axis=1)
    for batch_size, spec in (
      (1, "data:1"),
      (3, "data:1"),
      (4, "data:2,fsdp:2"),
      (6, "tensor:4,data:2"),
      (16, "data:-1"),
    ):
      found = meshes.map_batches(function, rows, batch_size, meshes.make(spec))
      for actual, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-6)

  def test_bad_input(self):
    with self.assertRaisesRegex(ValueError, "no rows to make batches of"):
      meshes.map_batches(self.fail, np.zeros((0, 3)), 8, self.mesh)
    with self.assertRaisesRegex(ValueError, "batch of 4 is not divisible by"):
      meshes.map_batches(self.fail, np.zeros((9, 3)), 4, self.mesh)


_PROCESS = """
    import sys
    import jax
    import numpy as np
    port, rank, workdir = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    jax.distributed.initialize(f"localhost:{port}", 2, rank)
    import jax.numpy as jnp
    from jax.sharding import PartitionSpec
    from rljax.distributed import meshes
    from rljax.storage import checkpoint, signals

    mesh = meshes.make("fsdp:-1")
    assert mesh.devices.size == 4, mesh
    batch = meshes.shard_batch({"x": np.arange(8.0).reshape(8, 1)}, mesh)["x"]
    assert batch.shape == (8, 1) and not batch.is_fully_addressable
    rows = sorted(float(s.data[0, 0]) for s in batch.addressable_shards)
    assert rows == [4.0 * rank, 4.0 * rank + 2.0], rows

    params = {"kernel": np.arange(16, dtype=np.float32).reshape(8, 2)}
    rules = ((r"kernel", PartitionSpec("fsdp")),)
    shardings = meshes.shardings(params, rules, mesh)
    state = {
      "params": meshes.place(params, shardings),
      "key": meshes.replicate(jax.random.key(7), mesh),
    }
    moved = meshes.replicate(state["params"], mesh)["kernel"]
    np.testing.assert_array_equal(moved, params["kernel"])
    with checkpoint.Checkpoints(workdir) as checkpoints:
      assert checkpoints.restore_latest(state) is None
      checkpoints.save(3, state, {"step": 3})
    fresh = dict(state, params=jax.tree.map(jnp.zeros_like, state["params"]))
    with checkpoint.Checkpoints(workdir) as checkpoints:
      step, restored, meta = checkpoints.restore_latest(fresh)
    assert step == 3 and meta == {"step": 3}
    assert restored["params"]["kernel"].sharding == shardings["kernel"]
    print(checkpoint.fingerprint(restored))
    assert checkpoint.fingerprint(restored) == checkpoint.fingerprint(state)
    with signals.Preemption() as preemption:
      assert not preemption.should_stop()
      preemption.requested = rank == 1
      assert preemption.should_stop()
"""


class ProcessesTest(parameterized.TestCase):
  def test_two_processes(self):
    """Batches, parameters and checkpoints over processes that share nothing."""
    with socket.socket() as free:
      free.bind(("localhost", 0))
      port = free.getsockname()[1]
    environment = dict(
      os.environ,
      XLA_FLAGS=scripts.environment(2)["XLA_FLAGS"],
      PYTHONPATH=str(conftest.REPOSITORY),
    )
    workdir = self.enter_context(tempfile.TemporaryDirectory())
    processes = [
      subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(_PROCESS)]
        + [str(port), str(rank), workdir],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
      )
      for rank in range(2)
    ]
    try:
      results = [process.communicate(timeout=120) for process in processes]
    finally:
      for process in processes:
        process.kill()
    for process, (_, errors) in zip(processes, results, strict=True):
      self.assertEqual(process.returncode, 0, errors[-3000:])
    # Both print the same fingerprint, after what gloo has to say.
    prints = [output.split()[-1] for output, _ in results]
    self.assertEqual(prints[0], prints[1])


if __name__ == "__main__":
  absltest.main()
