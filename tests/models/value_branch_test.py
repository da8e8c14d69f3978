"""Tests of the value branch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from rljax.distributed import meshes
from rljax.models import heads, hf, rope, value_branch
from tests import tiny

_CONFIGS = (
  ("gpt2", tiny.gpt2_config()),
  (
    "llama",
    tiny.llama_config(
      model_type="qwen3",
      head_dim=10,
      attention_bias=True,
      tie_word_embeddings=False,
      rope=rope.Rope(theta=30.0, rope_type="linear", factor=1.5),
    ),
  ),
)


_EXAMPLE = (jax.random.key(0), jnp.zeros((1, 2, 16)), jnp.ones((1, 2), bool))


@functools.cache
def _fresh(config):
  """A branch of one layer, and its first parameters."""
  branch = value_branch.ValueBranch(config, 1)
  return branch, jax.jit(branch.init)(*_EXAMPLE)["params"]


def _branch(config):
  """The same, with parameters so large that every part matters."""
  branch, params = _fresh(config)
  rng = np.random.default_rng(1)
  params = jax.tree.map(
    lambda x: x + jnp.float32(rng.normal(0, 0.3, x.shape)), params
  )
  return branch, params


@functools.partial(jax.jit, static_argnums=0)
def _apply(model, params, states, mask):
  return model.apply({"params": params}, states, mask)


def _hidden(seed, shape):
  rng = np.random.default_rng(seed)
  return jnp.float32(rng.normal(size=(*shape, 16)))


class ValueBranchTest(parameterized.TestCase):
  @parameterized.named_parameters(*_CONFIGS)
  def test_has_the_layers_of_the_family_and_no_more(self, config):
    branch = value_branch.ValueBranch(config, 3)
    params = jax.eval_shape(branch.init, *_EXAMPLE)["params"]
    found = params["decoder"]
    policy = tiny.shapes(config)
    norm = "ln_f" if "ln_f" in policy else "norm"
    self.assertEqual(set(found), {"layers_0", "layers_1", "layers_2", norm})
    shapes = lambda tree: jax.tree.map(jnp.shape, tree)
    for i in range(3):
      self.assertEqual(shapes(found[f"layers_{i}"]), shapes(policy["layers_0"]))
    # On a mesh they lie as the policy's do.
    mesh = meshes.make("data:2,fsdp:2,tensor:2")
    rules = hf.partition_rules(tiny.model(config), mesh)
    specs = lambda tree: meshes.shardings(tree, rules, mesh)
    placed = specs({"value_branch": params})["value_branch"]["decoder"]
    self.assertEqual(placed["layers_2"], specs(policy)["layers_0"])
    self.assertTrue(
      any(x.spec != jax.P() for x in jax.tree.leaves(placed["layers_2"]))
    )

  @parameterized.named_parameters(*_CONFIGS)
  def test_is_the_trunk_without_its_embeddings(self, config):
    # Two layers of the policy, run on its own embeddings.
    params = tiny.params(config)
    ids, mask = tiny.batch(0)
    positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    if "wte" in params:
      states = params["wte"]["embedding"][ids]
      states += params["wpe"]["embedding"][positions]
    else:
      states = params["embed_tokens"]["embedding"][ids]
    branch = value_branch.ValueBranch(config, 2)
    found = _apply(branch, {"decoder": params}, states, mask)
    expected = _apply(tiny.model(config), params, ids, mask)
    np.testing.assert_allclose(found[mask], expected[mask], atol=2e-5)

  @parameterized.named_parameters(*_CONFIGS)
  def test_later_tokens_are_unseen(self, config):
    branch, params = _branch(config)
    hidden = _hidden(0, (2, 8))
    mask = jnp.ones((2, 8), bool)
    before = _apply(branch, params, hidden, mask)
    after = _apply(branch, params, hidden.at[:, 5].multiply(-1), mask)
    np.testing.assert_array_equal(after[:, :5], before[:, :5])
    changed = np.abs(after[:, 5:] - before[:, 5:]).max(axis=-1)
    self.assertTrue((changed > 1e-4).all())  # And the earlier ones are seen.

  @parameterized.named_parameters(*_CONFIGS)
  def test_padding_is_inert(self, config):
    branch, params = _branch(config)
    hidden = _hidden(1, (1, 6))
    plain = _apply(branch, params, hidden, jnp.ones((1, 6), bool))
    lefts = (4, 0, 2)
    padded = np.array(_hidden(2, (3, 10)))  # Whatever stands there.
    mask = np.zeros((3, 10), bool)
    for row, left in enumerate(lefts):
      padded[row, left : left + 6] = hidden[0]
      mask[row, left : left + 6] = True
    found = _apply(branch, params, jnp.asarray(padded), jnp.asarray(mask))
    self.assertTrue(np.isfinite(found).all())
    for row, left in enumerate(lefts):
      np.testing.assert_allclose(
        found[row, left : left + 6], plain[0], atol=2e-5
      )

  @parameterized.named_parameters(*_CONFIGS)
  def test_no_gradient_reaches_the_trunk(self, config):
    branch, params = _branch(config)
    trunk = tiny.params(config)
    ids, mask = tiny.batch(0, (2, 6))

    def loss(params, trunk):
      hidden = tiny.model(config).apply({"params": trunk}, ids, mask)
      values = branch.apply({"params": params}, hidden, mask)
      return jnp.sum(jnp.where(mask[:, :, None], jnp.square(values), 0.0))

    own, below = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, trunk)
    for leaf in jax.tree.leaves(below):
      np.testing.assert_array_equal(leaf, np.zeros_like(leaf))
    for path, leaf in jax.tree_util.tree_leaves_with_path(own):
      # A bias of the keys shifts all scores alike, so that it has none.
      if "k_proj" not in str(path) or "kernel" in str(path):
        self.assertGreater(np.abs(leaf).max(), 1e-6, path)

  @parameterized.named_parameters(*_CONFIGS)
  def test_values_start_at_zero(self, config):
    branch, params = _fresh(config)
    hidden = _hidden(3, (2, 5))
    features = _apply(branch, params, hidden, jnp.ones((2, 5), bool))
    self.assertGreater(np.abs(features).max(), 0.1)
    values, _ = heads.ValueHead().init_with_output(jax.random.key(0), features)
    np.testing.assert_array_equal(values, np.zeros((2, 5)))

  def test_needs_a_layer(self):
    branch = value_branch.ValueBranch(tiny.gpt2_config(), 0)
    with self.assertRaisesRegex(ValueError, "num_layers must be positive"):
      branch.init(*_EXAMPLE)


if __name__ == "__main__":
  absltest.main()
