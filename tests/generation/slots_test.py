"""Tests of slots: the samples are those of rows that wait for each other."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from rljax.distributed import meshes
from rljax.generation import decode, grammars, slots, stops
from rljax.ops import sampling
from tests import stand_in, tiny
from tests.generation import drawing, grammars_test

VOCAB = 7
PIECES = [b"a", b"b", b"c", b"d", b"ab", b"x", b""]


def _prompts(rng, batch, length=4, vocab=VOCAB):
  """Left-padded prompts of 1..length tokens."""
  lengths = rng.integers(1, length + 1, size=batch)
  mask = np.arange(length)[None, :] >= length - lengths[:, None]
  ids = np.where(mask, rng.integers(0, vocab, size=(batch, length)), 0)
  return jnp.asarray(ids, jnp.int32), jnp.asarray(mask)


def _draw(model, params, prompts, num_slots, **options):
  options = {"max_length": 9, "settings": sampling.Settings()} | options
  run = jax.jit(
    functools.partial(decode.sample, model=model, slots=num_slots, **options)
  )
  return run(
    jax.random.key(3),
    params=params,
    prompt_ids=prompts[0],
    prompt_mask=prompts[1],
  )


def _assert_same(found, expected):
  for name, value in expected.items():
    if value is None:
      continue
    if value.dtype == jnp.float32:
      np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6)
    else:
      np.testing.assert_array_equal(found[name], value, name)


class SlotsTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ("all_lengths", 3, {"lengths": np.arange(20) % 9 + 1}),
    ("no_limits", 5, {}),
    ("one_slot", 1, {"stop_ids": (2,)}),
    ("as_many_as_rows", 20, {"stop_ids": (2, 5)}),
    ("more_than_rows", 99, {"stop_ids": (2, 5)}),
    ("late_ends", 4, {"stop_ids": (2, 5, 6), "min_new_tokens": 3}),
    (
      "truncated",
      4,
      {"settings": sampling.Settings(top_k=4, top_p=0.8), "stop_ids": (2,)},
    ),
    ("greedy", 4, {"settings": sampling.Settings(greedy=True)}),
    (
      "strings",
      4,
      {"stop_strings": stops.table(["ab", "dx"], PIECES), "pad_id": 6},
    ),
    (
      "forced",
      4,
      {"forced": np.array([-1, 3, -1, -1, 1, -1, -1, 4]), "stop_ids": (2,)},
    ),
    ("one_token", 4, {"max_length": 1}),
  )
  def test_samples_are_the_same(self, num_slots, options):
    rng = np.random.default_rng(5)
    params, prompts = stand_in.random_params(rng), _prompts(rng, 10)
    draw = functools.partial(
      *(_draw, stand_in.model(), params, prompts), num_samples=2, **options
    )
    expected = draw(0)
    _assert_same(draw(num_slots), expected)
    lengths = np.asarray(expected.response_mask).sum(axis=1)
    if options.get("stop_ids"):
      self.assertGreater(len(set(lengths.tolist())), 2)

  @parameterized.parameters("gpt2", "llama", "stacks")
  def test_caches(self, name):
    config = tiny.gpt2_config(vocab_size=32)
    if name == "llama":  # One layer has a window, whose slots are few.
      config = tiny.llama_config(
        vocab_size=32, num_layers=2, windows=(3, None), dtype=jnp.bfloat16
      )
    if name == "stacks":  # Every second layer has one.
      config = tiny.llama_config(
        vocab_size=32, num_layers=4, windows=(3, None), scan_layers=True
      )
    model = tiny.model(config)
    rng = np.random.default_rng(0)
    draw = functools.partial(
      _draw,
      model,
      tiny.params(model.config),
      _prompts(rng, 4, length=6, vocab=32),
      num_samples=4,
      stop_ids=(1, 2, 3),
      lengths=np.arange(16) % 9 + 1,
    )
    # Sixteen slots go on as a block of four in the end.
    expected = draw(0)
    for num_slots in (3, 16):
      _assert_same(draw(num_slots), expected)
    self.assertGreater(np.unique(expected.response_mask.sum(axis=1)).size, 3)

  def test_constraint(self):
    vocab_size, num_rows = 8, 6
    tables = grammars_test._tables()
    vocab_size = tables.terminals.shape[1]
    within = grammars.constraint(
      tables,
      stack=np.zeros((num_rows, 8), np.int32),
      size=np.ones(num_rows, np.int32),
      seconds=np.random.default_rng(0).random((num_rows, vocab_size)) < 0.9,
    )
    rng = np.random.default_rng(1)
    draw = functools.partial(
      _draw,
      stand_in.model(vocab_size),
      stand_in.random_params(rng, vocab_size, scale=1.0),
      _prompts(rng, num_rows, vocab=vocab_size),
      num_samples=2,
      constraint=within,
      stop_ids=tuple(np.flatnonzero(tables.ends).tolist()),
    )
    expected = draw(0)
    _assert_same(draw(3), expected)
    self.assertFalse(np.asarray(expected.allowed).all())

  def test_few_rows_at_a_time(self):
    sizes = []

    class Recorded(stand_in.TableModel):
      def decode(self, ids, cache):
        sizes.append(len(ids))
        return super().decode(ids, cache)

    rng = np.random.default_rng(0)
    model = Recorded(stand_in.Config(VOCAB, VOCAB, max_positions=32))
    params, prompts = stand_in.random_params(rng), _prompts(rng, 40)
    _draw(model, params, prompts, 17)
    self.assertEqual(set(sizes), {17, 4})
    sizes.clear()
    _draw(model, params, prompts, 0)
    self.assertEqual(set(sizes), {40})

  @parameterized.parameters(1, 7, 16, 200)
  def test_blocks(self, num_slots):
    sizes = slots._blocks(num_slots)
    self.assertEqual(sizes[0], num_slots)
    self.assertEqual(list(sizes), sorted(sizes, reverse=True))
    self.assertLess(sizes[-1], 16)


class SamplersTest(parameterized.TestCase):
  @parameterized.parameters("data:1", "data:2", "data:2,tensor:2", "tensor:2")
  def test_sampler(self, spec):
    mesh, rows = meshes.make(spec), np.array([5, 0, 3, 1, 6, 2])
    options = {"num_samples": 2, "min_length": 2}
    asked, key = drawing.encoded(), jax.random.key(8)
    expected = drawing.sampler("data:1", **options).draw(
      key, drawing.params(), asked, rows, step=4
    )
    found = drawing.sampler(spec, slots=4, **options).draw(
      key, meshes.replicate(drawing.params(), mesh), asked, rows, step=4
    )
    self.assertEqual(found.texts, expected.texts)
    _assert_same(found.rollout, expected.rollout)
    self.assertGreater(len(set(found.texts)), 6)

  @parameterized.parameters("data:1", "data:2")
  def test_responder(self, spec):
    mesh = meshes.make(spec)
    params = meshes.replicate(drawing.params(), mesh)
    draw = functools.partial(
      drawing.responder, settings=drawing.SAMPLED, num_samples=3
    )
    self.assertEqual(draw(mesh=mesh, slots=4)(params), draw()(drawing.params()))

  def test_the_settings_decide_for_responders(self):
    with mock.patch.object(slots, "on_mesh", wraps=slots.on_mesh) as asked:
      drawing.sampler(slots=3).greedy(drawing.encoded(), batch_size=7)
    self.assertEqual([call.args[0] for call in asked.call_args_list], [3, 3])

  def test_bad_meshes(self):
    with self.assertRaisesRegex(ValueError, "the 2 devices of fsdp share"):
      drawing.sampler("fsdp:2", slots=4)
    drawing.sampler("fsdp:2")
    with self.assertRaisesRegex(ValueError, "divisible by the 2 devices of da"):
      drawing.responder(mesh=meshes.make("data:2"), slots=3)


if __name__ == "__main__":
  absltest.main()
