"""Projections of gradients keep distances, and equal ones stay equal."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest

from rljax.training import sketches


def _tree(seed):
  rng = np.random.default_rng(seed)
  shapes = {
    "w": (300, 500),
    "e": (2, 200, 3),
    "b": (400,),
    "s": (),
    "m": (3, 5),
  }
  return {k: jnp.float32(rng.normal(size=s)) for k, s in shapes.items()}


def _norm(tree):
  return np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(tree)))


class SketchTest(absltest.TestCase):
  def test_small_leaves_stay(self):
    tree = _tree(0)
    found = sketches.sketch(tree)
    shapes = {k: x.shape for k, x in found.items()}
    self.assertEqual(
      shapes,
      {"w": (128, 128), "e": (2, 128, 3), "b": (128,), "s": (), "m": (3, 5)},
    )
    np.testing.assert_array_equal(found["m"], tree["m"])

  def test_distances(self):
    sketch = jax.jit(sketches.sketch)
    tree, noise = _tree(0), _tree(1)
    for scale in (1e-4, 1e-2, 1.0):
      other = jax.tree.map(lambda a, b, s=scale: a + s * b, tree, noise)
      expected = scale * _norm(noise) / _norm(tree)
      found = sketches.relative_gap(sketch(tree), sketch(other))
      np.testing.assert_allclose(found, expected, rtol=0.1)
    self.assertEqual(sketches.relative_gap(sketch(tree), sketch(tree)), 0)

  def test_one_number_of_many(self):
    """A change of a single entry keeps its size, wherever it is."""
    tree = _tree(0)
    other = {**tree, "w": tree["w"].at[7, 9].add(3.0)}
    found = sketches.relative_gap(sketches.sketch(tree), sketches.sketch(other))
    np.testing.assert_allclose(found, 3.0 / _norm(tree), rtol=0.1)

  def test_relative_gap(self):
    one = {"a": jnp.ones(3), "b": jnp.zeros(2)}
    other = {"a": jnp.ones(3), "b": jnp.array([0.3, 0.0])}
    np.testing.assert_allclose(
      sketches.relative_gap(one, other), 0.3 / np.sqrt(3), rtol=1e-6
    )
    self.assertTrue(np.isnan(sketches.relative_gap({"a": jnp.nan}, {"a": 1.0})))

  def test_no_gradient_leaves_its_program(self):
    tree = _tree(0)
    program = jax.jit(lambda t: sketches.sketch(jax.tree.map(jnp.sin, t)))
    memory = program.lower(tree).compile().memory_analysis()
    size = sum(x.nbytes for x in jax.tree.leaves(tree))
    self.assertLess(memory.output_size_in_bytes, 0.2 * size)


if __name__ == "__main__":
  absltest.main()
