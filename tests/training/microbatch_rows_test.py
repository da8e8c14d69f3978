"""Rows that are read in parts: the same numbers, in less memory."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from rljax.distributed import meshes
from rljax.generation import rollouts
from rljax.ops import sampling
from rljax.training import microbatch
from tests import stand_in


def _rollout(model, params, *, num_samples=2, max_length=4, **options):
  rng = np.random.default_rng(0)
  lengths = np.array([1, 3, 2])
  mask = jnp.asarray(np.arange(3)[None] >= 3 - lengths[:, None])
  vocab = model.config.vocab_size
  ids = jnp.asarray(rng.integers(0, vocab, (3, 3)), jnp.int32)
  return rollouts.sample(
    jax.random.key(0),
    model,
    params,
    ids,
    mask,
    max_length=max_length,
    settings=options.pop("settings", sampling.Settings()),
    num_samples=num_samples,
    **options,
  )


class MapRowsTest(parameterized.TestCase):
  @parameterized.parameters(2, 3, 6)
  def test_parts_of_a_batch(self, num_parts):
    params = stand_in.random_params(np.random.default_rng(0))
    model = stand_in.model()
    rollout = _rollout(model, params)

    @functools.partial(jax.jit, static_argnums=0)
    def read(num_parts):
      return microbatch.map_rows(
        lambda part: rollouts.token_statistics(
          model, params, part, temperature=1.0
        ),
        rollout,
        num_parts,
      )

    chex.assert_trees_all_close(read(num_parts), read(1), rtol=1e-6)

  def test_parts_on_a_mesh_take_less_memory(self):
    mesh = meshes.make("data:8")
    sharding = meshes.batch_sharding(mesh)
    rows = meshes.shard_batch(np.arange(64.0)[:, None], mesh)

    def read(part):
      self.assertEqual(part.shape[1], 1)
      spread = jnp.sin(part * jnp.arange(2.0**12)[None])  # [rows, 4096]
      return jnp.sort(spread, axis=1)[:, 0]

    memory, found = [], []
    for num_parts in (1, 8):
      part = functools.partial(
        microbatch.map_rows, read, num_parts=num_parts, sharding=sharding
      )
      compiled = jax.jit(part).lower(rows).compile()
      memory.append(compiled.memory_analysis().temp_size_in_bytes)
      found.append(compiled(rows))
    np.testing.assert_allclose(*found, rtol=1e-6)
    self.assertLess(memory[1], memory[0] / 6)
    self.assertTrue(found[1].sharding.is_equivalent_to(sharding, 1))


if __name__ == "__main__":
  absltest.main()
