"""Tests of critics: where values come from, and what learns through them."""

import functools
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from jax.sharding import PartitionSpec

from rljax.distributed import meshes
from rljax.models import critics, hf
from rljax.tasks import word_lists
from tests import tiny

KINDS = ("shared", "detached", "separate", "branch:2")
IDS, MASK = tiny.batch(shape=(4, 6))


@functools.cache
def _loaded(family="gpt2", **fields):
  make = tiny.gpt2_config if family == "gpt2" else tiny.llama_config
  config = make(**{"num_layers": 1, **fields})
  return hf.LanguageModel(
    tiny.model(config), tiny.params(config), None, "tiny", None
  )


def _hidden(loaded, params=None):
  params = loaded.params if params is None else params
  return jax.jit(loaded.model.apply)({"params": params}, IDS, MASK)


def _make(kind, loaded=None, seed=0):
  return critics.make(kind, loaded or _loaded(), seed, meshes.make("data:1"))


def _shaken(params):
  """Parameters that are no longer those of the start, the head's among them."""
  rng = np.random.default_rng(1)
  shake = lambda x: np.float32(x + rng.normal(0, 0.3, np.shape(x)))
  return jax.tree.map(shake, params)


class ValuesTest(parameterized.TestCase):
  @parameterized.parameters(
    *((kind, "gpt2") for kind in KINDS), ("branch:1", "llama")
  )
  def test_values_start_at_0_and_move(self, kind, family):
    loaded = _loaded(family)
    critic = _make(kind, loaded)
    hidden = _hidden(loaded)
    values_of = jax.jit(critic.values)
    values = values_of(critic.params, hidden, IDS, MASK)
    self.assertEqual((values.shape, values.dtype), (IDS.shape, jnp.float32))
    np.testing.assert_array_equal(values, 0)
    values = values_of(_shaken(critic.params), hidden, IDS, MASK)
    self.assertGreater(np.abs(values[MASK]).min(), 0)

  def test_head_on_the_states_of_the_policy(self):
    critic = _make("shared")
    kernel = jnp.arange(16.0)[:, None]
    params = {"head": {"dense": {"kernel": kernel, "bias": jnp.float32([2])}}}
    self.assertEqual(
      jax.tree.map(jnp.shape, critic.params), jax.tree.map(jnp.shape, params)
    )
    hidden = _hidden(_loaded())
    np.testing.assert_allclose(
      critic.values(params, hidden, IDS, MASK),
      hidden @ kernel[:, 0] + 2,
      rtol=1e-5,
    )

  @parameterized.parameters(
    ("shared", True),
    ("detached", False),
    ("separate", False),
    ("branch:1", False),
  )
  def test_gradient_into_the_policy(self, kind, flows):
    loaded = _loaded()
    critic = _make(kind)
    params = _shaken(critic.params)

    def total(policy, params):
      hidden = _hidden(loaded, policy)
      values = critic.values(params, hidden, IDS, MASK)
      return jnp.where(MASK, values, 0.0).sum()

    gradient = jax.jit(jax.grad(total, argnums=(0, 1)))
    policy, own = gradient(loaded.params, params)
    sizes = [float(jnp.abs(x).max()) for x in jax.tree.leaves(policy)]
    self.assertEqual(max(sizes) > 0, flows)
    # All of the critic learns; a bias of keys alone has no effect.
    for path, leaf in jax.tree_util.tree_leaves_with_path(own):
      if leaf.ndim > 1:
        name = jax.tree_util.keystr(path)
        self.assertGreater(float(jnp.abs(leaf).max()), 0, name)

  @parameterized.parameters(*KINDS)
  def test_values_see_the_text_before_them_alone(self, kind):
    critic = _make(kind)
    params = _shaken(critic.params)

    @jax.jit
    def values(ids):
      loaded = _loaded()
      hidden = loaded.model.apply({"params": loaded.params}, ids, MASK)
      return critic.values(params, hidden, ids, MASK)

    changed = IDS.at[:, 4:].set((IDS[:, 4:] + 1) % 40)
    gaps = np.abs(np.where(MASK, values(IDS) - values(changed), 0))
    self.assertLess(gaps[:, :4].max(), 1e-5)
    self.assertGreater(gaps[:, 4:].max(), 1e-3)

  def test_separate_starts_as_the_policy(self):
    loaded = _loaded()
    critic = _make("separate")
    jax.tree.map(
      np.testing.assert_array_equal, critic.params["model"], loaded.params
    )

  def test_new_weights_depend_on_the_seed(self):
    first, again, other = (
      _make("branch:1", seed=seed).params["branch"] for seed in (0, 0, 1)
    )
    jax.tree.map(np.testing.assert_array_equal, first, again)
    gaps = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), first, other)
    self.assertGreater(max(jax.tree.leaves(gaps)), 0)


class RulesTest(parameterized.TestCase):
  @parameterized.parameters(*KINDS)
  def test_policy_and_critic_are_split_alike(self, kind):
    loaded = _loaded()
    mesh = meshes.make("data:2,tensor:4")
    critic = critics.make(kind, loaded, 0, mesh)
    tree = {"policy": loaded.params, "critic": critic.params}
    found = meshes.shardings(tree, critic.rules, mesh)
    alone = meshes.shardings(
      loaded.params, hf.partition_rules(loaded.model, mesh), mesh
    )
    self.assertEqual(found["policy"], alone)
    if kind == "separate":
      self.assertEqual(found["critic"]["model"], alone)
    if kind == "branch:2":
      specs = {x.spec for x in jax.tree.leaves(found["critic"]["branch"])}
      self.assertIn(PartitionSpec(None, "tensor"), {_short(s) for s in specs})

  def test_heads_that_the_devices_cannot_share(self):
    mesh = meshes.make("tensor:8")
    with self.assertRaisesRegex(ValueError, "4 query heads of a GPT2"):
      critics.make("shared", _loaded(), 0, mesh)


def _short(spec):
  """A spec without what stands for copies."""
  return PartitionSpec(*(axis if axis == "tensor" else None for axis in spec))


class OtherModelTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    pytest.importorskip("tokenizers")
    self.folder = self.enter_context(tempfile.TemporaryDirectory())
    tokenizer = word_lists.word_tokenizer()
    self.config = tiny.llama_config(
      vocab_size=len(tokenizer), hidden_size=32, max_positions=48
    )
    params = tiny.params(self.config)
    hf.save(self.folder, tiny.model(self.config), params, tokenizer)

  def test_model_of_another_family_and_width(self):
    loaded = _loaded(vocab_size=self.config.vocab_size)
    critic = _make(self.folder, loaded)
    self.assertEqual(critic.max_positions, 48)
    self.assertEqual(critic.params["head"]["dense"]["kernel"].shape, (32, 1))
    hidden = _hidden(loaded)
    values = critic.values(_shaken(critic.params), hidden, IDS, MASK)
    self.assertEqual(values.shape, IDS.shape)
    # It reads the text itself.
    np.testing.assert_array_equal(
      critic.values(_shaken(critic.params), 2 * hidden, IDS, MASK), values
    )
    mesh = meshes.make("data:4,tensor:2")
    critic = critics.make(self.folder, loaded, 0, mesh)
    tree = {"policy": loaded.params, "critic": critic.params}
    found = meshes.shardings(tree, critic.rules, mesh)
    for params in (found["policy"], found["critic"]):
      specs = [x.spec for x in jax.tree.leaves(params)]
      self.assertTrue(any("tensor" in spec for spec in specs), specs)

  def test_other_tokens(self):
    with self.assertRaisesRegex(
      ValueError, f"--critic=.* has {self.config.vocab_size} tokens, the policy"
    ):
      _make(self.folder)

  def test_options_are_handed_on(self):
    loaded = _loaded(vocab_size=self.config.vocab_size)
    critic = critics.make(
      self.folder, loaded, 0, meshes.make("data:1"), dtype="bfloat16"
    )
    # Values stay float32.
    values = critic.values(critic.params, _hidden(loaded), IDS, MASK)
    self.assertEqual(values.dtype, jnp.float32)

  def test_nothing_by_that_name(self):
    with self.assertRaisesRegex(ValueError, "no/such/model"):
      _make("/no/such/model")


class PositionsTest(absltest.TestCase):
  def test_length_of_a_text(self):
    critic = _make("shared")
    self.assertEqual(critic.max_positions, 64)
    critic.check_positions(64)
    with self.assertRaisesRegex(
      ValueError, "reads 64 tokens at most, .* have up to 65; shorten"
    ):
      critic.check_positions(65)


class BranchLayersTest(parameterized.TestCase):
  @parameterized.parameters(
    *(("shared", 0), ("detached", 0), ("separate", 0), ("runs/critic", 0)),
    *(("branch:1", 1), ("branch:12", 12), ("branches:2", 0)),
  )
  def test_number(self, kind, expected):
    self.assertEqual(critics.branch_layers(kind), expected)

  @parameterized.parameters(
    "branch", "branch:", "branch:0", "branch:x", "branch:-1", "branch:1.5"
  )
  def test_bad_number(self, kind):
    with self.assertRaisesRegex(
      ValueError, f"needs a number of layers, such as branch:4, got {kind}"
    ):
      critics.branch_layers(kind)


if __name__ == "__main__":
  absltest.main()
