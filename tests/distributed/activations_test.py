"""Activations keep their rows on a mesh, whatever parameters do."""

import re

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from rljax.distributed import activations, compiled, meshes
from rljax.generation import rollouts
from rljax.models import hf, llama
from tests import tiny

WIDTH, INNER = 24, 40


def _arrays(mesh, rows=16):
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  return meshes.place(
    (draw(rows, 3, WIDTH), draw(WIDTH, INNER)),
    tuple(NamedSharding(mesh, spec) for spec in (P(), P("fsdp", "tensor"))),
  )


def _collectives(text):
  """Kind and shape of what is sent."""
  return set(
    re.findall(r"= \w+\[([\d,]*)\]\S* (all-[a-z]+|reduce-scatter)\(", text)
  )


class RowsTest(parameterized.TestCase):
  @parameterized.parameters(
    ("fsdp:8", (2, 3, INNER)),
    ("data:2,fsdp:2,tensor:2", (4, 3, INNER // 2)),
    ("tensor:8", (16, 3, INNER // 8)),
  )
  def test_parameters_are_sent_and_no_rows(self, spec, shard):
    mesh = meshes.make(spec)
    x, w = _arrays(mesh)
    product = lambda x, w: activations.rows(activations.rows(x) @ w, tensor=-1)
    program = compiled.Compiled("learn", product)
    found = program(x, w)
    self.assertEqual(found.sharding.shard_shape(found.shape), shard)
    np.testing.assert_allclose(found, np.asarray(x) @ np.asarray(w), 1e-4, 1e-5)
    sent = _collectives(program.compile(x, w).as_text())
    kernel = f"{WIDTH},{INNER // mesh.shape['tensor']}"
    is_split = mesh.shape["fsdp"] > 1
    self.assertEqual(sent, {(kernel, "all-gather")} if is_split else set())

  def test_what_stays_as_it_is(self):
    x = jnp.ones((16, 3, 4))
    self.assertIs(activations.rows(x), x)  # In no program of a mesh.
    mesh = meshes.make("fsdp:8")
    seen = []

    def program(x, odd, flat):
      for y in (odd, flat):
        seen.append(activations.rows(y) is y)
      seen.append(activations.rows(x, tensor=1) is x)
      with activations.left_to_compiler():
        seen.append(activations.rows(x) is x)
      seen.append(activations.share(16, 100))
      return x

    arrays = x, jnp.ones((3, 3, 4)), jnp.ones((16, 4))
    compiled.Compiled("learn", program)(*meshes.replicate(arrays, mesh))
    self.assertEqual(seen, [True, True, False, True, (2, 100)])
    self.assertEqual(activations.share(16, 100), (16, 100))

  def test_share_of_the_vocabulary(self):
    mesh, seen = meshes.make("data:2,fsdp:2,tensor:2"), []
    program = lambda x: seen.append(activations.share(16, 101)) or x
    compiled.Compiled("learn", program)(meshes.replicate(jnp.ones(2), mesh))
    self.assertEqual(seen, [(4, 51)])


class GatheredTest(parameterized.TestCase):
  @parameterized.parameters("fsdp:8", "fsdp:4,tensor:2")
  def test_rounds_once_and_adds_up_in_float32(self, spec):
    mesh = meshes.make(spec)
    _, w = _arrays(mesh)

    def loss(w):
      whole = activations.gathered(w, 1, jnp.bfloat16)
      add = lambda _, total: total + whole.astype(jnp.bfloat16).sum()
      # In bfloat16, a sum of ones ends at 256.
      return jax.lax.fori_loop(0, 300, add, jnp.bfloat16(0)), whole

    program = compiled.Compiled("learn", jax.grad(loss, has_aux=True))
    gradient, whole = program(w)
    np.testing.assert_array_equal(gradient, np.full(w.shape, 300.0))
    np.testing.assert_array_equal(whole, w.astype(jnp.bfloat16))
    self.assertEqual(whole.dtype, w.dtype)
    text = program.compile(w).as_text()
    kernel = f"{WIDTH},{INNER // mesh.shape['tensor']}"
    self.assertIn((kernel, "all-gather"), _collectives(text))


class StatisticsTest(parameterized.TestCase):
  def test_output_layer_is_gathered_once(self):
    """The same statistics and gradient, with no gather in the loop."""
    config = llama.LlamaConfig(
      vocab_size=104,
      hidden_size=16,
      num_layers=1,
      num_heads=2,
      max_positions=32,
      tie_word_embeddings=False,
    )
    model, params = llama.Llama(config), tiny.params(config)
    ids, mask = tiny.batch(0, (8, 12))
    names = ("prompt_ids", "prompt_mask", "response_ids", "response_mask")
    cut = (ids[:, :4], mask[:, :4], ids[:, 4:], mask[:, 4:])
    batch = dict(zip(names, cut, strict=True))

    def loss(params, batch):
      found, _ = rollouts.token_statistics(
        model, params, batch, temperature=1.0, chunk_size=2
      )
      return jnp.sum(found.log_probs) + jnp.sum(found.entropies)

    both = jax.value_and_grad(loss)
    expected, alone = both(params, batch)
    mesh = meshes.make("fsdp:8")
    rules = hf.partition_rules(model, mesh)
    placed = meshes.place(params, meshes.shardings(params, rules, mesh))
    batch = meshes.shard_batch(batch, mesh)
    program = compiled.Compiled("learn", both)
    found, gradient = program(placed, batch)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3),
      gradient,
      alone,
    )
    text = program.compile(placed, batch).as_text()
    inside = [x for x in text.splitlines() if "logits" in x and "while" in x]
    sent = _collectives("\n".join(inside))
    self.assertNotIn(("16,104", "all-gather"), sent)
    self.assertNotIn(("8,2,104", "all-reduce"), sent)


if __name__ == "__main__":
  absltest.main()
