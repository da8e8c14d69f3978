"""Tests of the forms of attention that are linear in memory."""

import functools
import math
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from jax import export

from rljax.distributed import compiled, meshes, planning
from rljax.models import attention, blockwise, fused

# What a call may ask for, beside its operands.
_SCORES = attention.Scores()
_OPTIONS = (
  {},
  {"window": 5},
  {"causal": False},
  {"causal": False, "window": 3},
  {"scores": attention.Scores(0.3, 2.0)},
  {"segments": True},
  {"segments": True, "window": 4, "scores": attention.Scores(None, 1.5)},
)


def _operands(seed, length, dtype=jnp.float32, num_queries=None, width=8):
  """Grouped heads, one row with left padding, one with right, one with none."""
  rng = np.random.default_rng(seed)
  num_queries = num_queries or length
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
  queries = draw(4, num_queries, 4, width) * 2
  keys, values = draw(4, length, 2, width) * 2, draw(4, length, 2, width)
  places = np.arange(length)
  third = length // 3
  mask = np.stack(
    [places >= third, places < 2 * third, places >= 0, places < 0]
  )
  return queries, keys, values, jnp.asarray(mask)


def _segments(mask):
  """Two texts in a row."""
  middle = mask.shape[1] // 2
  text = jnp.where(jnp.arange(mask.shape[1]) < middle, 1, 2)
  return jnp.where(mask, text[None], 0)


def _with_segments(options, mask):
  options = dict(options)
  if options.pop("segments", None):
    options["segments"] = _segments(mask)
  return options


def _value_and_gradients(run, operands, mask):
  """Of real tokens: what padding is given is not the same in all forms."""
  queries = operands[0]
  real = mask[:, mask.shape[1] - queries.shape[1] :, None, None]

  def loss(*operands):
    found = jnp.where(real, run(*operands).astype(jnp.float32), 0)
    weights = jnp.cos(jnp.arange(found.size, dtype=jnp.float32))
    return jnp.sum(found * weights.reshape(found.shape)), found

  gradients, found = jax.grad(loss, (0, 1, 2), has_aux=True)(*operands)
  return found, gradients


class _Case(parameterized.TestCase):
  def assert_like_plain(self, form, operands, mask, options, tolerance):
    options = _with_segments(options, mask)

    @jax.jit
    def both(*operands):
      plain = functools.partial(attention.attend, form="plain")
      found, expected = (
        functools.partial(run, mask=mask, **options) for run in (form, plain)
      )
      return [
        _value_and_gradients(found, operands, mask),
        _value_and_gradients(expected, operands, mask),
      ]

    found, expected = both(*operands)
    for x, y in zip(
      jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
    ):
      x, y = np.float32(x), np.float32(y)
      self.assertTrue(np.isfinite(x).all())
      np.testing.assert_allclose(x, y, atol=tolerance)

  def assert_splash(self, options):
    *operands, mask = _operands(7, 130)
    mask = mask.at[3, 0].set(True)

    def run(*operands, mask, scores=_SCORES, **more):
      scale = 1 / math.sqrt(8) if scores.scale is None else scores.scale
      more = {"causal": True, "window": None} | more
      return fused.splash(
        *operands,
        mask,
        scale=scale,
        softcap=scores.softcap,
        interpret=True,
        **more,
      )

    self.assert_like_plain(run, tuple(operands), mask, options, 2e-5)


class FormsTest(_Case):
  # Blocks that the tokens fill, and those that they do not.
  @parameterized.parameters(({}, 12), *((options, 21) for options in _OPTIONS))
  def test_blocks(self, options, length):
    *operands, mask = _operands(0, length)
    self.assert_like_plain(_small_blocks, tuple(operands), mask, options, 1e-5)

  @parameterized.parameters({}, {"window": 5})
  def test_queries_at_the_end_of_the_keys(self, **options):
    *operands, mask = _operands(1, 21, num_queries=9)
    self.assert_like_plain(_small_blocks, tuple(operands), mask, options, 1e-5)

  def test_bfloat16(self):
    *operands, mask = _operands(2, 21, jnp.bfloat16)
    self.assert_like_plain(_small_blocks, tuple(operands), mask, {}, 0.1)

  def test_nothing_to_see(self):
    *operands, mask = _operands(3, 9)
    mask = jnp.zeros_like(mask)
    found, gradients = _value_and_gradients(
      lambda *x: _small_blocks(*x, mask), tuple(operands), mask | True
    )
    for x in (found, *gradients):
      np.testing.assert_array_equal(x, 0)

  def test_padding_is_inert(self):
    *operands, mask = _operands(4, 21)
    run = jax.jit(
      lambda *x: _value_and_gradients(
        lambda *y: _small_blocks(*y, mask), x, mask
      )
    )
    there = mask[:, :, None, None]
    keys, values = (jnp.where(there, x, 1e6) for x in operands[1:])
    for x, y in zip(
      jax.tree.leaves(run(*operands)),
      jax.tree.leaves(run(operands[0], keys, values)),
      strict=True,
    ):
      np.testing.assert_array_equal(x, y)

  def test_under_vmap(self):
    *operands, mask = _operands(5, 21)
    whole = jax.jit(_small_blocks)(*operands, mask)
    split = jax.tree.map(lambda x: x.reshape(2, 2, *x.shape[1:]), operands)
    parts = jax.jit(jax.vmap(_small_blocks))(*split, mask.reshape(2, 2, -1))
    np.testing.assert_allclose(
      parts.reshape(whole.shape), whole, atol=1e-6, rtol=1e-6
    )

  def test_on_a_mesh(self):
    *operands, mask = _operands(6, 21)
    mesh = meshes.make("data:2,fsdp:2,tensor:2")
    spec = jax.sharding.PartitionSpec
    rows = spec(("data", "fsdp"), None, "tensor")
    run = jax.jit(
      lambda *x: _value_and_gradients(
        lambda *y: _small_blocks(*y, mask), x, mask
      )
    )
    placed = jax.device_put(operands, jax.sharding.NamedSharding(mesh, rows))
    for x, y in zip(
      jax.tree.leaves(run(*placed)),
      jax.tree.leaves(run(*operands)),
      strict=True,
    ):
      np.testing.assert_allclose(x, y, atol=1e-5)

  def test_no_array_of_all_pairs(self):
    length = 1024
    shape = lambda *x: jax.ShapeDtypeStruct(x, jnp.float32)
    operands = (shape(1, length, 4, 8), *[shape(1, length, 2, 8)] * 2)
    mask = jax.ShapeDtypeStruct((1, length), bool)

    def temporaries(form):
      run = lambda *x: jnp.sum(attention.attend(*x, form=form))
      program = jax.jit(jax.grad(run, (0, 1, 2))).lower(*operands, mask)
      return program.compile().memory_analysis().temp_size_in_bytes

    self.assertLess(temporaries("blocks"), length**2 * 4)
    self.assertGreater(temporaries("plain"), length**2 * 4 * 4)

  def test_splash_in_an_interpreter(self):
    self.assert_splash({"segments": True, "scores": attention.Scores(0.3, 2.0)})


@pytest.mark.slow
class SplashTest(_Case):
  @parameterized.parameters(
    {}, {"window": 5}, {"causal": False}, {"causal": False, "window": 3}
  )
  def test_splash_in_an_interpreter(self, **options):
    self.assert_splash(options)


class ChooseTest(parameterized.TestCase):
  def choose(self, platform, length=1024, dtype=jnp.float32, mesh=None, **more):
    shapes = [
      jax.ShapeDtypeStruct((8, length, heads, 64), dtype) for heads in (4, 2)
    ]
    with (
      mock.patch.object(planning, "platform", lambda: platform),
      mock.patch.object(compiled, "mesh", lambda: mesh),
    ):
      return attention.choose(*shapes, **more)

  def test_short_rows_stay_in_one_piece(self):
    for platform, shortest in attention.SHORTEST.items():
      self.assertEqual(self.choose(platform, shortest - 1), "plain")
      self.assertNotEqual(self.choose(platform, shortest), "plain")

  def test_by_machine(self):
    mesh = meshes.make("data:2,fsdp:2,tensor:2")
    self.assertEqual(self.choose("cpu", mesh=mesh), "blocks")
    self.assertEqual(self.choose("tpu", mesh=mesh), "splash")
    # Among several devices a kernel must know how its operands are split.
    self.assertEqual(self.choose("tpu"), "blocks")
    self.assertEqual(self.choose("tpu", mesh=meshes.make("tensor:8")), "blocks")
    # cuDNN is not installed here, and takes no float32.
    self.assertEqual(self.choose("cuda", mesh=mesh), "blocks")

  def test_another_form(self):
    *operands, mask = _operands(8, 7)
    with self.assertRaisesRegex(ValueError, "form must be one of plain, bl"):
      attention.attend(*operands, mask, form="flash")

  @parameterized.parameters("tpu", "cuda")
  def test_exports_without_callbacks(self, platform):
    shape = lambda *x: jax.ShapeDtypeStruct(x, jnp.float32)
    operands = (shape(2, 512, 4, 64), *[shape(2, 512, 2, 64)] * 2)
    mask = jax.ShapeDtypeStruct((2, 512), bool)
    forms = ("blocks", "splash") if platform == "tpu" else ("blocks",)
    for form in forms:
      run = lambda *x, form=form: jnp.sum(attention.attend(*x, form=form))
      gradient = jax.jit(jax.grad(run, (0, 1, 2)))
      exported = export.export(gradient, platforms=[platform])
      text = exported(*operands, mask).mlir_module()
      calls = set(re.findall(r"custom_call @(\w+)", text))
      self.assertEqual(
        calls, {"tpu_custom_call"} if form == "splash" else set()
      )


def _small_blocks(queries, keys, values, mask, scores=_SCORES, **options):
  """`attend(form="blocks")` in blocks of unequal sizes that do not divide."""
  scale = scores.scale
  if scale is None:
    scale = 1 / math.sqrt(queries.shape[-1])
  return blockwise.attend(
    queries,
    keys,
    values,
    mask,
    scale=scale,
    softcap=scores.softcap,
    block_q=4,
    block_k=6,
    **options,
  )


class MovedTest(parameterized.TestCase):
  def test_moves_tokens_in_front_and_back(self):
    x = jnp.arange(8.0).reshape(2, 4, 1, 1)
    mask = jnp.array([[False, True, False, True], [True, True, False, False]])
    order = jnp.argsort(~mask, axis=1, stable=True)
    back = jnp.argsort(order, axis=1)
    moved = fused._moved(x, order, back)
    np.testing.assert_array_equal(
      moved[..., 0, 0], [[1, 3, 0, 2], [4, 5, 6, 7]]
    )
    np.testing.assert_array_equal(fused._moved(moved, back, order), x)
    weights = jnp.cos(x)
    loss = lambda x: jnp.sum(fused._moved(x, order, back) * weights)
    np.testing.assert_array_equal(
      jax.grad(loss)(x), fused._moved(weights, back, order)
    )
