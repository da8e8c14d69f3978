"""Tests of samplers: prompts in, texts out, however they are batched."""

import collections
import functools
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from rljax.distributed import meshes
from rljax.generation import responses, rollouts, samplers
from rljax.ops import sampling
from rljax.text import (
  vocabularies,
)
from tests import stand_in
from tests.generation import drawing, grammars_test

pytest.importorskip("tokenizers")


def _assert_same(found, expected):
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5),
    found,
    expected,
  )


class SamplerTest(parameterized.TestCase):
  @parameterized.parameters(
    ("data:1", {}),
    ("data:2,fsdp:2", {"num_samples": 2, "min_length": 2}),
    ("data:1", {"temperature": 0.7, "top_k": 5, "stop_at_eos": False}),
  )
  def test_draw_is_sample_with_the_same_key(self, spec, options):
    sampler, asked = drawing.sampler(spec, **options), drawing.encoded()
    rows, key = np.array([5, 0, 3, 3]), jax.random.key(8)
    num_samples = options.get("num_samples", 1)
    params = meshes.replicate(drawing.params(), meshes.make(spec))
    drawn = sampler.draw(key, params, asked, rows, step=4)
    limits = sampler.settings.lengths(4 * num_samples, 4, 1)
    expected = jax.jit(
      lambda params, ids, mask, lengths: rollouts.sample(
        key,
        drawing.MODEL,
        params,
        ids,
        mask,
        max_length=drawing.MAX_LENGTH,
        settings=sampler.settings.distribution,
        num_samples=num_samples,
        allowed=jnp.asarray(
          vocabularies.allowed_tokens(drawing.WORDS, 120, sampler.stop_ids)
        ),
        stop_ids=sampler.stop_ids,
        lengths=lengths,
        pad_id=vocabularies.pad_id(drawing.WORDS),
      )
    )(drawing.params(), asked.ids[rows], asked.mask[rows], limits)
    _assert_same(drawn.rollout, expected)
    texts = np.repeat([drawing.PROMPTS[i] for i in rows], num_samples).tolist()
    self.assertEqual(drawn.prompts, texts)
    self.assertEqual(drawn.texts, responses.read(drawing.WORDS, expected))
    self.assertEqual(drawn.policy_step, 4)
    self.assertEqual(drawn.settings, sampler.settings)
    # Equal prompts at different places have responses of their own.
    self.assertNotEqual(
      drawn.texts[-num_samples], drawn.texts[-2 * num_samples]
    )
    stops = (
      []
      if options.get("stop_at_eos") is False
      else [drawing.WORDS.eos_token_id]
    )
    self.assertEqual(list(sampler.stop_ids), stops)

  @parameterized.parameters(("data:1", 1, 1), ("data:2", 2, 2))
  def test_in_parts(self, spec, at_once, num_samples):
    sampler = drawing.sampler(spec, num_samples=num_samples, min_length=2)
    params = meshes.replicate(drawing.params(), meshes.make(spec))
    rows = np.array([5, 0, 3, 3])
    scored = []

    def score(prompts, texts):
      scored.append(len(texts))
      return np.float32([len(x) for x in texts]), [{"n": x} for x in texts]

    whole, parts = (
      sampler.draw_scored(
        *(jax.random.key(8), params, drawing.encoded(), rows),
        step=4,
        number=2,
        score=score,
        at_once=number,
      )
      for number in (0, at_once)
    )
    _assert_same(parts.rollout, whole.rollout)
    np.testing.assert_array_equal(parts.scores, whole.scores)
    for name in ("prompts", "texts", "parts"):
      self.assertEqual(getattr(parts, name), getattr(whole, name))
    size = at_once * num_samples
    self.assertEqual(
      scored, [4 * num_samples] + [size] * (4 * num_samples // size)
    )

  def test_it_compiles_once(self):
    sampler, asked = drawing.sampler(), drawing.encoded()
    texts = []
    for step in range(3):
      rows = np.arange(4) + step
      key = jax.random.key(step)
      texts += [
        sampler.draw(key, drawing.params(step), asked, rows, step=step).texts
      ]
      sampler.freeze()
    self.assertLen(sampler.compilations, 1)
    self.assertNotEqual(texts[0], texts[1])
    with self.assertRaisesRegex(RuntimeError, "would compile again"):
      sampler.draw(key, drawing.params(), asked, np.arange(5), step=0)

  def test_limits(self):
    # A policy that never ends by itself.
    table = np.zeros((32, len(drawing.WORDS), len(drawing.WORDS)), np.float32)
    table[..., drawing.WORDS.convert_tokens_to_ids("crow")] = 20.0
    sampler = drawing.sampler(
      model=stand_in.model(len(drawing.WORDS)), min_length=2, num_samples=3
    )
    lengths = []
    for step in range(2):
      drawn = sampler.draw(
        jax.random.key(0),
        stand_in.params(table),
        drawing.encoded(),
        np.arange(7),
        step=step,
      )
      lengths.append(np.asarray(drawn.rollout.response_mask.sum(axis=1)))
      expected = sampler.settings.lengths(21, step, 1)
      np.testing.assert_array_equal(lengths[-1], expected)
      self.assertFalse(np.any(drawn.rollout.finished))
    # Those of another step are others.
    self.assertTrue((lengths[0] != lengths[1]).any())

  def test_stop_strings(self):
    asked = drawing.encoded(
      [f"{i}+{i + 1}=" for i in range(40, 56)], drawing.NUMBERS
    )
    table = np.zeros(
      (32, len(drawing.NUMBERS), len(drawing.NUMBERS)), np.float32
    )
    table[..., :10] = table[..., drawing.NUMBERS.convert_tokens_to_ids("=")] = (
      6.0
    )
    stops = ("=3", "9")
    drawn = drawing.sampler(
      tokenizer=drawing.NUMBERS,
      model=stand_in.model(len(drawing.NUMBERS)),
      max_length=12,
      stop_strings=stops,
    ).draw(
      jax.random.key(0), stand_in.params(table), asked, np.arange(16), step=0
    )
    ends = collections.Counter()
    whole = responses.read(drawing.NUMBERS, drawn.rollout)
    for text, short in zip(whole, drawn.texts, strict=True):
      # The first of them ended it: nothing was drawn behind, and it is cut off.
      self.assertStartsWith(text, short)
      self.assertIn(text.removeprefix(short), ("", *stops))
      for stop in stops:
        self.assertNotIn(stop, short)
      ends[text.removeprefix(short)] += 1
    for stop in stops:
      self.assertGreater(ends[stop], 0)

  def test_several_end_tokens(self):
    # The config names one besides that of the tokenizer, a flag two more.
    own, by_id, by_name = drawing.NUMBERS.convert_tokens_to_ids(["7", "8", "="])
    config = types.SimpleNamespace(
      vocab_size=len(drawing.NUMBERS), max_positions=1024, eos_token_id=(own,)
    )
    model = mock.Mock(wraps=stand_in.model(len(drawing.NUMBERS)), config=config)
    table = np.zeros(
      (32, len(drawing.NUMBERS), len(drawing.NUMBERS)), np.float32
    )
    table[..., [own, by_id, by_name]] = 2.0
    asked = drawing.encoded(
      [f"{i}+{i + 1}=" for i in range(40, 56)], drawing.NUMBERS
    )
    named = (str(by_id), "=")
    for stop_at_eos, ends in (
      (True, [drawing.NUMBERS.eos_token_id, own, by_id, by_name]),
      (False, [by_id, by_name]),
    ):
      sampler = drawing.sampler(
        tokenizer=drawing.NUMBERS,
        model=model,
        max_length=24,
        stop_tokens=named,
        stop_at_eos=stop_at_eos,
      )
      self.assertEqual(list(sampler.stop_ids), ends)
      drawn = sampler.draw(
        jax.random.key(0), stand_in.params(table), asked, np.arange(16), step=0
      )
      rollout = jax.tree.map(np.asarray, drawn.rollout)
      last = rollout.response_mask.sum(axis=1) - 1
      found = set()
      for row, text in enumerate(drawn.texts):
        ids = rollout.response_ids[row, : last[row] + 1]
        # It ends the response, and is no part of its text.
        self.assertFalse(np.isin(ids[:-1], ends).any())
        if rollout.finished[row]:
          self.assertIn(ids[-1], ends)
          found.add(int(ids[-1]))
          self.assertEqual(text, drawing.NUMBERS.decode(ids[:-1]))
        if not stop_at_eos:  # An end that is not to end it is never drawn.
          self.assertNotIn(own, ids)
      self.assertLessEqual({by_id, by_name}, found)
      responder = sampler.responder(asked, batch_size=8)
      ((_, texts, _), _) = responder.batches(stand_in.params(table))
      self.assertNotIn("=", "".join(texts))
    with self.assertRaisesRegex(ValueError, "and must be one that it knows"):
      drawing.sampler(
        tokenizer=drawing.NUMBERS, model=model, stop_tokens=["12="]
      )

  def test_responses_from_nan_are_counted(self):
    asked = drawing.encoded(["1+2="] * 4, drawing.NUMBERS)
    sampler = drawing.sampler(
      tokenizer=drawing.NUMBERS, model=stand_in.model(len(drawing.NUMBERS))
    )
    table = np.full(
      (32, len(drawing.NUMBERS), len(drawing.NUMBERS)), np.nan, np.float32
    )
    with self.assertLogs("absl", "WARNING") as logs:
      drawn = sampler.draw(
        jax.random.key(0), stand_in.params(table), asked, np.arange(4), step=0
      )
    self.assertIn("4 of 4 responses were drawn from logits", logs.output[0])
    ids = np.asarray(drawn.rollout.response_ids)
    self.assertTrue(np.asarray(sampler.allowed)[ids].all())

  def _bracketed(self, vocab_size):
    """A task whose responses are the expressions of a small grammar."""
    words = ("+", "=", "*", "1", "2")  # ( a ) n n
    ids = drawing.NUMBERS.convert_tokens_to_ids(words)
    tables = grammars_test._tables()
    terminals = np.full((10, vocab_size), 4, np.int16)
    terminals[:, ids] = [0, 1, 2, 3, 3]
    depths = np.zeros(vocab_size, np.int32)
    depths[ids[0]], depths[ids[2]] = 1, -1
    ends = np.arange(vocab_size) == drawing.NUMBERS.eos_token_id
    tables = tables._replace(terminals=terminals, depths=depths, ends=ends)
    places = mock.Mock(
      side_effect=lambda texts, tokenizer, size: {
        "stack": np.zeros((len(texts), 16), np.int32),
        "size": np.ones(len(texts), np.int32),
        "seconds": np.ones((len(texts), size), bool),
      }
    )
    return types.SimpleNamespace(
      __name__="tasks.brackets",
      grammar=lambda tokenizer, size: tables._asdict(),
      places=places,
    )

  def test_constraint_only_where_the_settings_ask(self):
    vocab_size = len(drawing.NUMBERS)
    task = self._bracketed(vocab_size)
    model = stand_in.model(vocab_size)
    params = stand_in.random_params(
      np.random.default_rng(0), vocab_size, scale=1.0
    )
    asked = drawing.encoded(["1+1=", "2+2=", "3+3=", "4+4="], drawing.NUMBERS)
    make = functools.partial(
      *(drawing.sampler, "data:2", drawing.NUMBERS, model, task), max_length=12
    )
    draw = lambda sampler: sampler.draw(
      jax.random.key(0),
      meshes.replicate(params, meshes.make("data:2")),
      asked,
      np.arange(4),
      step=0,
    )
    free = make()
    self.assertFalse(free.has_constraint)
    drawn = draw(free)
    self.assertIsNone(drawn.rollout.allowed)
    self.assertFalse(any(text.startswith("+=") for text in drawn.texts))
    task.places.assert_not_called()
    bound = make(constraint="grammar")
    self.assertTrue(bound.has_constraint)
    for found in (
      draw(bound).texts,
      bound.greedy(asked, batch_size=4)(
        meshes.replicate(params, meshes.make("data:2"))
      ),
    ):
      for text in found:
        self.assertRegex(text, r"^\+=[+=*12]*$")
    self.assertEqual(draw(bound).rollout.allowed.shape, (4, 12, vocab_size))
    self.assertEqual(task.places.call_args.args[0], asked.texts)
    with self.assertRaisesRegex(ValueError, "brackets has no grammar"):
      task = types.SimpleNamespace(__name__="tasks.brackets")
      drawing.sampler(
        tokenizer=drawing.NUMBERS, model=model, task=task, constraint="grammar"
      )

  def test_responder_draws_as_the_settings_say(self):
    sampler = drawing.sampler(
      num_samples=2, temperature=0.8, min_length=3, seed=5, unfinished_score=0.5
    )
    found = sampler.responder(drawing.encoded(), batch_size=3)
    expected = drawing.responder(
      settings=sampling.Settings(temperature=0.8),
      num_samples=2,
      seed=5,
      batch_size=7,
      max_lengths=sampler.settings.lengths(7, 0, 2),
    )
    self.assertEqual(found(drawing.params()), expected(drawing.params()))
    self.assertEqual(found.texts, list(drawing.PROMPTS))
    self.assertEqual(found.unfinished_score, 0.5)
    # Options stand in for settings.
    other = sampler.responder(
      drawing.encoded(), batch_size=7, num_samples=1, seed=5
    )
    self.assertLen(other(drawing.params()), 7)

  def test_every_draw_of_a_step_has_limits_of_its_own(self):
    settings = responses.Settings(
      max_length=6, min_length=1, num_samples=4, stop_at_eos=False, seed=3
    )
    mesh = meshes.make("data:1")
    sampler = samplers.Sampler(
      drawing.MODEL, drawing.WORDS, settings, mesh=mesh
    )
    encoded = drawing.encoded()
    found = []
    for step, number in ((2, 0), (2, 1), (3, 0)):
      samples = sampler.draw(
        jax.random.key(0),
        meshes.replicate(drawing.params(), mesh),
        encoded,
        np.array([0, 3, 5]),
        step=step,
        number=number,
      )
      # The rows of a prompt lie next to each other.
      asked = [drawing.PROMPTS[i] for i in (0, 3, 5) for _ in range(4)]
      self.assertEqual(samples.prompts, asked)
      self.assertEqual(samples.policy_step, step)
      found.append(np.asarray(samples.rollout.response_mask).sum(axis=1))
    np.testing.assert_array_equal(found[0], settings.lengths(12, 2, 1))
    np.testing.assert_array_equal(found[1], settings.lengths(12, 2, 1, 1))
    for other in found[1:]:
      self.assertTrue(np.any(other != found[0]))
    self.assertLen(sampler.compilations, 1)

  def test_greedy(self):
    found = drawing.sampler(num_samples=3, temperature=2.0).greedy(
      drawing.encoded(), batch_size=3
    )
    self.assertEqual(
      found(drawing.params()),
      [drawing.greedily(0, prompt) for prompt in drawing.PROMPTS],
    )
    self.assertIsNone(found.unfinished_score)
    forced = np.full(121, -1, np.int32)
    forced[120] = drawing.WORDS.convert_tokens_to_ids("crow")
    self.assertFalse(found.has_forced)
    found = drawing.sampler().greedy(
      drawing.encoded(), batch_size=7, forced=forced
    )
    self.assertTrue(found.has_forced)
    expected = drawing.responder(forced=forced)
    self.assertEqual(found(drawing.params()), expected(drawing.params()))
