"""Tests of samplers: prompts in, texts out, however they are batched."""

import collections
import contextlib
import dataclasses
import functools
import io
import pathlib
import tempfile
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from absl.testing import parameterized

from rljax.distributed import meshes
from rljax.evaluation import answers
from rljax.generation import rollouts, samplers
from rljax.ops import sampling
from rljax.storage import calls
from rljax.tasks import arithmetic, word_lists
from rljax.text import asked, batches, files, prompts, tokens
from tests import conftest, stand_in, tiny
from tests.generation import grammars_test

pytest.importorskip("tokenizers")

WORDS = word_lists.word_tokenizer()
NUMBERS = arithmetic.word_tokenizer()  # Its tokens are joined without blanks.
PROMPTS = (
  "birds 4 not duck owl:",
  "fish 2 not cod eel:",
  "birds 5 not duck owl:",
  "birds 4 not dove owl:",
  "birds",
  "trees 3 not ash elm:",
  "metals 6 not iron lead: iron",
)
MAX_LENGTH = 6
MODEL = tiny.model(tiny.llama_config(vocab_size=120, num_layers=1))
SAMPLED, GREEDY = sampling.Settings(), sampling.Settings(greedy=True)


def setUpModule():
  # Most of the time goes to compiling samplers.
  jax.config.update("jax_disable_most_optimizations", True)


def tearDownModule():
  jax.config.update("jax_disable_most_optimizations", False)


@functools.cache
def _params(seed=0):
  return tiny.params(MODEL.config, seed)


def _responder(prompts=PROMPTS, tokenizer=WORDS, model=MODEL, **options):
  options = {
    "max_length": MAX_LENGTH,
    "settings": GREEDY,
    "batch_size": 8,
    "mesh": meshes.make("data:1"),
    **options,
  }
  ids = tokens.encode_prompts(tokenizer, prompts, max_length=99)
  return samplers.Responder(model, tokenizer, ids, **options)


@functools.partial(jax.jit, static_argnums=0)
def _logits(model, params, ids, mask):
  hidden = model.apply({"params": params}, ids, mask)
  return model.apply({"params": params}, hidden, method="logits")


@functools.cache
def _greedy(seed, prompt):
  """The likeliest words one by one, without pads, caches or batches."""
  ids = WORDS.encode(prompt)
  start = len(ids)
  banned = {WORDS.bos_token_id, WORDS.pad_token_id, *range(len(WORDS), 120)}
  allowed = [i for i in range(120) if i not in banned]
  for _ in range(MAX_LENGTH):
    padded = jnp.zeros((1, 16), jnp.int32).at[0, : len(ids)].set(jnp.array(ids))
    mask = jnp.arange(16)[None] < len(ids)
    logits = np.asarray(_logits(MODEL, _params(seed), padded, mask))
    ids.append(max(allowed, key=logits[0, len(ids) - 1].__getitem__))
    if ids[-1] == WORDS.eos_token_id:
      break
  return WORDS.decode(ids[start:], skip_special_tokens=True)


class RecordsTest(parameterized.TestCase):
  def test_rows(self):
    rows = samplers.records(
      ["a", "b"], ["c", "d"], np.float32([0.5, 1]), [{"x": 1}, {}]
    )
    self.assertEqual(
      rows,
      [
        {"prompt": "a", "response": "c", "reward": 0.5, "parts": {"x": 1}},
        {"prompt": "b", "response": "d", "reward": 1.0, "parts": {}},
      ],
    )
    with self.assertRaises(ValueError):
      samplers.records(["a"], ["b", "c"], [1.0], [{}])


class SettingsTest(parameterized.TestCase):
  def test_lengths(self):
    settings = samplers.Settings(max_length=9, min_length=4, seed=3)
    found = settings.lengths(500, 7, 1)
    self.assertEqual((found.shape, found.dtype), ((500,), np.int32))
    # Both ends are drawn, and all between them about as often.
    counts = collections.Counter(found.tolist())
    self.assertEqual(sorted(counts), list(range(4, 10)))
    self.assertBetween(min(counts.values()), 50, max(counts.values()))
    # They are those of the seed and the place.
    np.testing.assert_array_equal(settings.lengths(500, 7, 1), found)
    np.testing.assert_array_equal(settings.lengths(20, 7, 1), found[:20])
    for other in (
      settings.lengths(500, 8, 1),
      settings.lengths(500, 7, 2),
      settings._replace(seed=4).lengths(500, 7, 1),
    ):
      self.assertTrue((other != found).any())

  def test_without_a_least_length_all_have_the_whole(self):
    found = samplers.Settings(max_length=9).lengths(5, 0)
    np.testing.assert_array_equal(found, [9] * 5)

  def test_distribution(self):
    settings = samplers.Settings(
      max_length=9, temperature=0.5, top_k=3, top_p=0.9, min_p=0.1
    )
    self.assertEqual(
      settings.distribution,
      sampling.Settings(temperature=0.5, top_k=3, top_p=0.9, min_p=0.1),
    )
    # What the likeliest token is depends on nothing else.
    greedy = settings._replace(greedy=True).distribution
    self.assertEqual(greedy, sampling.Settings(greedy=True))


class ScoreResponsesTest(parameterized.TestCase):
  ASKED, TEXTS = ["a", "b", "c"], ["1", "22", "333"]
  FINISHED = np.array([True, False, True])

  def score(self, asked, texts):
    self.assertEqual((asked, texts), (self.ASKED, self.TEXTS))
    parts = [{"is_correct": True, "answer": text} for text in texts]
    return np.float32([len(text) for text in texts]), parts

  def _found(self, unfinished):
    return samplers.score_responses(
      self.score,
      tuple(self.ASKED),
      tuple(self.TEXTS),
      self.FINISHED,
      unfinished=unfinished,
    )

  def test_without_a_score_of_their_own(self):
    scores, parts = self._found(None)
    np.testing.assert_array_equal(scores, [1, 2, 3])
    self.assertEqual([part["answer"] for part in parts], self.TEXTS)

  @parameterized.parameters(0.0, -1.5)
  def test_those_without_an_end_are_never_right(self, unfinished):
    scores, parts = self._found(unfinished)
    np.testing.assert_array_equal(scores, [1, unfinished, 3])
    self.assertEqual(scores.dtype, np.float32)
    self.assertEqual([p["is_correct"] for p in parts], [True, False, True])
    self.assertEqual([p["answer"] for p in parts], ["1", None, "333"])


def _samples(**options):
  """Three responses of at most four tokens, the second of them cut short."""
  ids = jnp.array([[3, 104, 0, 0], [1, 2, 3, 4], [104, 0, 0, 0]])
  mask = jnp.arange(4)[None] < jnp.array([[2], [4], [1]])
  log_probs = jnp.where(mask, -jnp.arange(12.0).reshape(3, 4) / 4, 0.0)
  rollout = rollouts.Rollout(
    prompt_ids=ids + 1,
    prompt_mask=mask,
    response_ids=ids,
    response_mask=mask,
    log_probs=log_probs,
    truncated_log_probs=log_probs / 2,
    finished=jnp.array([True, False, True]),
  )
  settings = samplers.Settings(max_length=4, temperature=0.5, top_p=0.9)
  return samplers.Samples(
    rollout=rollout,
    prompts=["a", "a", "b"],
    texts=["3", "1234", ""],
    settings=settings._replace(**options),
    policy_step=6,
    tokenizer=NUMBERS,
  )


def _length(asked, texts):
  del asked
  parts = [{"is_correct": True, "answer": text} for text in texts]
  return np.float32([len(text) for text in texts]), parts


class SamplesTest(parameterized.TestCase):
  def test_scored(self):
    samples = _samples()
    self.assertIsNone(samples.scores)
    scored = samples.scored(_length)
    np.testing.assert_array_equal(scored.scores, [1, 4, 0])
    self.assertEqual(scored.parts[1], {"is_correct": True, "answer": "1234"})
    # The settings say what those without an end are worth.
    scored = _samples(unfinished_score=-1.0).scored(_length)
    np.testing.assert_array_equal(scored.scores, [1, -1, 0])
    self.assertEqual(scored.parts[1], {"is_correct": False, "answer": None})
    # The samples themselves are as they were.
    self.assertIsNone(samples.scores)
    self.assertIsNone(samples.parts)

  def test_what_is_learnt_from(self):
    nothing = lambda prompts, texts: (np.array([1, np.nan, 0]), [{}] * 3)
    for options, counts in (
      ({}, [True, False, True]),
      # The second one has no end, and the first is all that has a score.
      ({"mask_unfinished": True}, [True, False, True]),
    ):
      samples = _samples(**options).scored(nothing)
      np.testing.assert_array_equal(~np.isnan(samples.learnt_scores), counts)
      np.testing.assert_array_equal(
        samples.learnt.response_mask,
        samples.rollout.response_mask & np.array(counts)[:, None],
      )
      self.assertIsNone(samples.records()[1]["reward"])
    # Of those with a score, the one without an end is left out if asked.
    samples = _samples(mask_unfinished=True).scored(_length)
    np.testing.assert_array_equal(samples.scores, [1, 4, 0])
    np.testing.assert_array_equal(samples.learnt_scores, [1, np.nan, 0])
    samples = _samples().scored(_length)
    np.testing.assert_array_equal(samples.learnt_scores, [1, 4, 0])

  def test_columns_of_the_data_are_kept(self):
    samples = _samples()
    columns = {"gold": 4, "reward": "not ours"}
    given = [{"role": "user", "content": "a"}]
    named = [asked.Prompt(p, given, columns) for p in samples.prompts]
    samples = dataclasses.replace(samples, prompts=named).scored(_length)
    (row, *_) = samples.records()
    self.assertEqual((row["gold"], row["reward"]), (4, 1.0))
    with tempfile.TemporaryDirectory() as folder:
      path = pathlib.Path(folder, "x.jsonl")
      files.write_jsonl(path, [row])
      (found,) = files.read_jsonl(path)
    self.assertEqual(found["prompt"], given)
    (attached,) = asked.attach([found], named)
    self.assertEqual(asked.columns(attached["prompt"]), columns)
    self.assertEqual(attached["prompt"], "a")

  def test_take(self):
    rows = [2, 0, 2]
    for samples in (_samples(), _samples().scored(_length)):
      taken = samples.take(rows)
      self.assertEqual(taken.prompts, ["b", "a", "b"])
      self.assertEqual(taken.texts, ["", "3", ""])
      jax.tree.map(
        lambda new, old: np.testing.assert_array_equal(
          new, old[np.array(rows)]
        ),
        taken.rollout,
        samples.rollout,
      )
      self.assertEqual(taken.policy_step, 6)
    np.testing.assert_array_equal(taken.scores, [0, 1, 0])
    self.assertEqual([part["answer"] for part in taken.parts], ["", "3", ""])
    self.assertIsNone(_samples().take(rows).scores)
    self.assertIsNone(_samples().take(rows).parts)

  def test_concatenate(self):
    samples = _samples().scored(_length)
    parts = [samples.take([0, 1]), samples.take([2])]
    joined = samples.concatenate(parts)
    self.assertEqual(joined.prompts, samples.prompts)
    self.assertEqual(joined.texts, samples.texts)
    self.assertEqual(joined.parts, samples.parts)
    self.assertEqual(joined.settings, samples.settings)
    np.testing.assert_array_equal(joined.scores, samples.scores)
    jax.tree.map(np.testing.assert_array_equal, joined.rollout, samples.rollout)

  def test_records(self):
    rows = _samples().scored(_length).records()
    # Quarters, of which halves are exact: masked places are left out.
    self.assertEqual(
      rows[0],
      {
        "prompt": "a",
        "response": "3",
        "reward": 1.0,
        "parts": {"is_correct": True, "answer": "3"},
        "response_ids": [3, 104],
        "log_probs": [0.0, -0.25],
        "truncated_log_probs": [0.0, -0.125],
        "finished": True,
        "temperature": 0.5,
        "top_k": 0,
        "top_p": 0.9,
        "min_p": 0.0,
        "policy_step": 6,
      },
    )
    self.assertEqual(rows[1]["response_ids"], [1, 2, 3, 4])
    self.assertEqual(rows[1]["log_probs"], [-1.0, -1.25, -1.5, -1.75])
    self.assertEqual([row["finished"] for row in rows], [True, False, True])
    self.assertEqual([row["response_ids"] for row in rows][2], [104])
    with tempfile.TemporaryDirectory() as folder:
      path = pathlib.Path(folder, "x.jsonl")
      files.write_jsonl(path, rows)
      self.assertEqual(files.read_jsonl(path), rows)


def _asked(texts=PROMPTS, tokenizer=WORDS):
  return prompts.encode(tokenizer, texts, max_length=99)[0]


def _sampler(spec="data:1", tokenizer=WORDS, model=MODEL, task=None, **options):
  settings = samplers.Settings(**{"max_length": MAX_LENGTH, **options})
  return samplers.Sampler(
    model, tokenizer, settings, mesh=meshes.make(spec), task=task
  )


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
    sampler, asked = _sampler(spec, **options), _asked()
    rows, key = np.array([5, 0, 3, 3]), jax.random.key(8)
    num_samples = options.get("num_samples", 1)
    params = meshes.replicate(_params(), meshes.make(spec))
    drawn = sampler.draw(key, params, asked, rows, step=4)
    limits = sampler.settings.lengths(4 * num_samples, 4, 1)
    expected = jax.jit(
      lambda params, ids, mask, lengths: rollouts.sample(
        key,
        MODEL,
        params,
        ids,
        mask,
        max_length=MAX_LENGTH,
        settings=sampler.settings.distribution,
        num_samples=num_samples,
        allowed=jnp.asarray(
          tokens.allowed_tokens(WORDS, 120, sampler.stop_ids)
        ),
        stop_ids=sampler.stop_ids,
        lengths=lengths,
        pad_id=tokens.pad_id(WORDS),
      )
    )(_params(), asked.ids[rows], asked.mask[rows], limits)
    _assert_same(drawn.rollout, expected)
    texts = np.repeat([PROMPTS[i] for i in rows], num_samples).tolist()
    self.assertEqual(drawn.prompts, texts)
    self.assertEqual(drawn.texts, samplers.read(WORDS, expected))
    self.assertEqual(drawn.policy_step, 4)
    self.assertEqual(drawn.settings, sampler.settings)
    # Equal prompts at different places have responses of their own.
    self.assertNotEqual(
      drawn.texts[-num_samples], drawn.texts[-2 * num_samples]
    )
    stops = [] if options.get("stop_at_eos") is False else [WORDS.eos_token_id]
    self.assertEqual(list(sampler.stop_ids), stops)

  def test_it_compiles_once(self):
    sampler, asked = _sampler(), _asked()
    texts = []
    for step in range(3):
      rows = np.arange(4) + step
      key = jax.random.key(step)
      texts += [sampler.draw(key, _params(step), asked, rows, step=step).texts]
      sampler.freeze()
    self.assertLen(sampler.compilations, 1)
    self.assertNotEqual(texts[0], texts[1])
    with self.assertRaisesRegex(RuntimeError, "would compile again"):
      sampler.draw(key, _params(), asked, np.arange(5), step=0)

  def test_limits(self):
    # A policy that never ends by itself.
    table = np.zeros((32, len(WORDS), len(WORDS)), np.float32)
    table[..., WORDS.convert_tokens_to_ids("crow")] = 20.0
    sampler = _sampler(
      model=stand_in.model(len(WORDS)), min_length=2, num_samples=3
    )
    lengths = []
    for step in range(2):
      drawn = sampler.draw(
        jax.random.key(0),
        stand_in.params(table),
        _asked(),
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
    asked = _asked([f"{i}+{i + 1}=" for i in range(40, 56)], NUMBERS)
    table = np.zeros((32, len(NUMBERS), len(NUMBERS)), np.float32)
    table[..., :10] = table[..., NUMBERS.convert_tokens_to_ids("=")] = 6.0
    stops = ("=3", "9")
    drawn = _sampler(
      tokenizer=NUMBERS,
      model=stand_in.model(len(NUMBERS)),
      max_length=12,
      stop_strings=stops,
    ).draw(
      jax.random.key(0), stand_in.params(table), asked, np.arange(16), step=0
    )
    ends = collections.Counter()
    whole = samplers.read(NUMBERS, drawn.rollout)
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
    own, by_id, by_name = NUMBERS.convert_tokens_to_ids(["7", "8", "="])
    config = types.SimpleNamespace(
      vocab_size=len(NUMBERS), max_positions=1024, eos_token_id=(own,)
    )
    model = mock.Mock(wraps=stand_in.model(len(NUMBERS)), config=config)
    table = np.zeros((32, len(NUMBERS), len(NUMBERS)), np.float32)
    table[..., [own, by_id, by_name]] = 2.0
    asked = _asked([f"{i}+{i + 1}=" for i in range(40, 56)], NUMBERS)
    named = (str(by_id), "=")
    for stop_at_eos, ends in (
      (True, [NUMBERS.eos_token_id, own, by_id, by_name]),
      (False, [by_id, by_name]),
    ):
      sampler = _sampler(
        tokenizer=NUMBERS,
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
          self.assertEqual(text, NUMBERS.decode(ids[:-1]))
        if not stop_at_eos:  # An end that is not to end it is never drawn.
          self.assertNotIn(own, ids)
      self.assertLessEqual({by_id, by_name}, found)
      responder = sampler.responder(asked, batch_size=8)
      ((_, texts, _), _) = responder.batches(stand_in.params(table))
      self.assertNotIn("=", "".join(texts))
    with self.assertRaisesRegex(ValueError, "and must be one that it knows"):
      _sampler(tokenizer=NUMBERS, model=model, stop_tokens=["12="])

  def test_responses_from_nan_are_counted(self):
    asked = _asked(["1+2="] * 4, NUMBERS)
    sampler = _sampler(tokenizer=NUMBERS, model=stand_in.model(len(NUMBERS)))
    table = np.full((32, len(NUMBERS), len(NUMBERS)), np.nan, np.float32)
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
    ids = NUMBERS.convert_tokens_to_ids(words)
    tables = grammars_test._tables()
    terminals = np.full((10, vocab_size), 4, np.int16)
    terminals[:, ids] = [0, 1, 2, 3, 3]
    depths = np.zeros(vocab_size, np.int32)
    depths[ids[0]], depths[ids[2]] = 1, -1
    ends = np.arange(vocab_size) == NUMBERS.eos_token_id
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
    vocab_size = len(NUMBERS)
    task = self._bracketed(vocab_size)
    model = stand_in.model(vocab_size)
    params = stand_in.random_params(
      np.random.default_rng(0), vocab_size, scale=1.0
    )
    asked = _asked(["1+1=", "2+2=", "3+3=", "4+4="], NUMBERS)
    make = functools.partial(
      *(_sampler, "data:2", NUMBERS, model, task), max_length=12
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
      _sampler(tokenizer=NUMBERS, model=model, task=task, constraint="grammar")

  def test_responder_draws_as_the_settings_say(self):
    sampler = _sampler(
      num_samples=2, temperature=0.8, min_length=3, seed=5, unfinished_score=0.5
    )
    found = sampler.responder(_asked(), batch_size=3)
    expected = _responder(
      settings=sampling.Settings(temperature=0.8),
      num_samples=2,
      seed=5,
      batch_size=7,
      max_lengths=sampler.settings.lengths(7, 0, 2),
    )
    self.assertEqual(found(_params()), expected(_params()))
    self.assertEqual(found.texts, list(PROMPTS))
    self.assertEqual(found.unfinished_score, 0.5)
    # Options stand in for settings.
    other = sampler.responder(_asked(), batch_size=7, num_samples=1, seed=5)
    self.assertLen(other(_params()), 7)

  def test_every_draw_of_a_step_has_limits_of_its_own(self):
    settings = samplers.Settings(
      max_length=6, min_length=1, num_samples=4, stop_at_eos=False, seed=3
    )
    mesh = meshes.make("data:1")
    sampler = samplers.Sampler(MODEL, WORDS, settings, mesh=mesh)
    encoded = _asked()
    found = []
    for step, number in ((2, 0), (2, 1), (3, 0)):
      samples = sampler.draw(
        jax.random.key(0),
        meshes.replicate(_params(), mesh),
        encoded,
        np.array([0, 3, 5]),
        step=step,
        number=number,
      )
      # The rows of a prompt lie next to each other.
      asked = [PROMPTS[i] for i in (0, 3, 5) for _ in range(4)]
      self.assertEqual(samples.prompts, asked)
      self.assertEqual(samples.policy_step, step)
      found.append(np.asarray(samples.rollout.response_mask).sum(axis=1))
    np.testing.assert_array_equal(found[0], settings.lengths(12, 2, 1))
    np.testing.assert_array_equal(found[1], settings.lengths(12, 2, 1, 1))
    for other in found[1:]:
      self.assertTrue(np.any(other != found[0]))
    self.assertLen(sampler.compilations, 1)

  def test_greedy(self):
    found = _sampler(num_samples=3, temperature=2.0).greedy(
      _asked(), batch_size=3
    )
    self.assertEqual(
      found(_params()), [_greedy(0, prompt) for prompt in PROMPTS]
    )
    self.assertIsNone(found.unfinished_score)
    forced = np.full(121, -1, np.int32)
    forced[120] = WORDS.convert_tokens_to_ids("crow")
    self.assertFalse(found.has_forced)
    found = _sampler().greedy(_asked(), batch_size=7, forced=forced)
    self.assertTrue(found.has_forced)
    expected = _responder(forced=forced)
    self.assertEqual(found(_params()), expected(_params()))


class ResponderTest(parameterized.TestCase):
  @parameterized.parameters((1, "data:1"), (3, "data:1"), (8, "data:4,fsdp:2"))
  def test_greedy_replies(self, batch_size, spec):
    mesh = meshes.make(spec)
    responder = _responder(batch_size=batch_size, mesh=mesh)
    self.assertEqual(responder.num_prompts, 7)
    for seed in range(2):
      found = responder(meshes.replicate(_params(seed), mesh))
      self.assertEqual(found, [_greedy(seed, prompt) for prompt in PROMPTS])
      self.assertGreater(len(set(found)), 4)
    # The last batch is filled up, and new parameters change no shape.
    self.assertLen(responder.program.compilations, 1)

  def test_sampled_replies(self):
    asked = [*PROMPTS, PROMPTS[0]]
    found = []
    for batch_size, spec, seed in (
      (3, "data:1", 5),
      (8, "data:8", 5),
      (8, "data:1", 6),
    ):
      mesh = meshes.make(spec)
      responder = _responder(
        asked, settings=SAMPLED, batch_size=batch_size, mesh=mesh, seed=seed
      )
      params = meshes.replicate(_params(), mesh)
      found.append(responder(params))
      # Asked again, it says the same.
      self.assertEqual(responder(params), found[-1])
      self.assertLen(responder.program.compilations, 1)
    first, other_batches, other_seed = found
    self.assertEqual(first, other_batches)
    for one, other in zip(first, other_seed, strict=True):
      self.assertNotEqual(one, other)
    # Equal prompts have replies of their own.
    self.assertNotEqual(first[0], first[-1])

  def test_stop_strings(self):
    asked = [f"{i}+{i + 1}=" for i in range(40, 56)]
    # The numbers below ten and "=" are likely, all else is not.
    table = np.zeros((32, len(NUMBERS), len(NUMBERS)), np.float32)
    table[..., :10] = table[..., NUMBERS.convert_tokens_to_ids("=")] = 6.0
    params = stand_in.params(table)
    stops = ("=3", "9")
    responder = _responder(
      asked,
      NUMBERS,
      stand_in.model(len(NUMBERS)),
      settings=SAMPLED,
      max_length=12,
      batch_size=16,
      stop_strings=stops,
    )
    replies = responder(params)
    # What was drawn, with the strings.
    ids, mask = batches.pad_left(
      tokens.encode_prompts(NUMBERS, asked, max_length=9)
    )
    indices = np.arange(16, dtype=np.int32)
    batch = {"ids": ids, "mask": mask, "indices": indices}
    batch["lengths"] = np.full(16, 12, np.int32)
    drawn = responder.program(jax.random.key(0), params, batch)
    ends = collections.Counter()
    for text, reply in zip(samplers.read(NUMBERS, drawn), replies, strict=True):
      # The first of them ended it: nothing was drawn behind.
      self.assertStartsWith(text, reply)
      end = text.removeprefix(reply)
      self.assertIn(end, ("", *stops))
      for stop in stops:
        self.assertNotIn(stop, reply)
      ends[end] += 1
    for end in stops:
      self.assertGreater(ends[end], 0)

  def test_end_token(self):
    # A policy that wants to end, else to say "crow", else anything.
    table = np.zeros((32, len(WORDS), len(WORDS)), np.float32)
    table[..., WORDS.eos_token_id] = 9.0
    table[..., WORDS.convert_tokens_to_ids("crow")] = 6.0
    params = stand_in.params(table)
    ask = functools.partial(_responder, model=stand_in.model(len(WORDS)))
    self.assertEqual(ask()(params), [""] * 7)
    for reply in ask(stop_at_eos=False, settings=SAMPLED)(params):
      self.assertLen(reply.split(), MAX_LENGTH)
      self.assertIn("crow", reply)

  def test_forced_tokens_are_no_part_of_the_texts(self):
    # A policy that says "owl" after "crow", else "crow"; "dove" is forced first
    # and behind every "owl".
    ids = {w: WORDS.convert_tokens_to_ids(w) for w in ("crow", "owl", "dove")}
    table = np.zeros((32, len(WORDS), len(WORDS)), np.float32)
    table[..., ids["crow"]] = 5.0
    table[:, ids["crow"], ids["owl"]] = 9.0
    forced = np.full(len(WORDS) + 1, -1, np.int32)
    forced[[len(WORDS), ids["owl"]]] = ids["dove"]
    ask = functools.partial(_responder, model=stand_in.model(len(WORDS)))
    params = stand_in.params(table)
    self.assertEqual(ask()(params)[0].split(), ["crow", "owl"] * 3)
    self.assertEqual(ask(forced=forced)(params)[0].split(), ["crow", "owl"] * 2)

  def test_bad_input(self):
    # Eight columns hold the longest prompt.
    _responder(max_length=56)
    with self.assertRaisesRegex(
      ValueError, "take up to 65 tokens .* the model has 64 positions"
    ):
      _responder(max_length=57)
    with self.assertRaisesRegex(
      ValueError, "batch_size must be divisible by the 8 devices .* got 12"
    ):
      _responder(batch_size=12, mesh=meshes.make())
    with self.assertRaisesRegex(ValueError, "no decoder"):
      _responder(stop_strings=["owl"])
    no_end = word_lists.word_tokenizer()
    no_end.eos_token = None
    with self.assertRaisesRegex(ValueError, "end token"):
      _responder(tokenizer=no_end)
    _responder(tokenizer=no_end, stop_at_eos=False)


class CollectTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.params = _params()
    self.folder = self.enter_context(tempfile.TemporaryDirectory())
    self.path = pathlib.Path(self.folder, "a", "x.jsonl")
    self.asked = []

  def score(self, prompts, replies):
    self.asked += prompts
    scores = np.float32([len(reply) for reply in replies])
    return scores, [{"is_correct": True, "answer": reply} for reply in replies]

  def collect(self, num_samples=3, prompts=PROMPTS, **options):
    responder = _responder(
      prompts, settings=SAMPLED, batch_size=2, num_samples=num_samples
    )
    return samplers.collect(
      self.path, responder, self.params, prompts, self.score, **options
    )

  def test_rows(self):
    seen = []
    rows = self.collect(progress=lambda done, batch: seen.append(done))
    self.assertEqual(seen, [2, 4, 6, 7])
    places = [(row["index"], row["sample"]) for row in rows]
    self.assertEqual(places, [(i, j) for i in range(7) for j in range(3)])
    self.assertEqual(
      [row["prompt"] for row in rows], np.repeat(PROMPTS, 3).tolist()
    )
    self.assertEqual(files.read_jsonl(self.path), rows)
    # They are those that the responder gives.
    responder = _responder(settings=SAMPLED, batch_size=7, num_samples=3)
    self.assertEqual([row["response"] for row in rows], responder(self.params))
    ended = [
      bool(ended)
      for *_, batch in responder.batches(self.params)
      for ended in batch
    ]
    self.assertEqual([row["finished"] for row in rows], ended)
    self.assertContainsSubset([True, False], ended)
    for row in rows:
      # What ran out of length earned nothing and has no answer.
      self.assertEqual(row["parts"]["is_correct"], row["finished"])
      expected = row["response"] if row["finished"] else None
      self.assertEqual(row["parts"]["answer"], expected)
      self.assertEqual(row["reward"], len(row["response"]) * row["finished"])

  def test_evaluate_is_collect_without_a_file(self):
    rows = self.collect(num_samples=1)
    responder = _responder(settings=SAMPLED, batch_size=2, texts=PROMPTS)
    found = answers.evaluate(responder, self.params, self.score)
    places = [{"index": i, "sample": 0} for i in range(len(PROMPTS))]
    self.assertEqual(
      [place | row for place, row in zip(places, found, strict=True)], rows
    )
    self.assertEqual([row["response"] for row in found], responder(self.params))
    self.assertEqual({type(row["finished"]) for row in found}, {bool})

  @parameterized.parameters(0, 1, 2, 3, 5, 6)
  def test_killed_and_called_again(self, num_rows):
    whole = self.collect()
    content = self.path.read_bytes()
    lines = content.splitlines(keepends=True)
    # Killed within a row.
    self.path.write_bytes(b"".join(lines[:num_rows]) + lines[num_rows][:20])
    self.asked = []
    self.assertEqual(self.collect(), whole)
    self.assertEqual(self.path.read_bytes(), content)
    # Prompts that were answered in full are not asked again.
    self.assertLen(self.asked, 21 - 3 * (num_rows // 3))
    self.asked = []
    self.assertEqual(self.collect(), whole)
    self.assertEqual(self.asked, [])

  @parameterized.parameters(0, 2, 3, 5)
  def test_what_was_scored_before_an_error_is_kept(self, num_scored):
    whole = self.collect()
    content = self.path.read_bytes()
    self.path.unlink()
    self.asked = []
    batches = []

    def fail(prompts, replies):
      """Answers a part of the second batch."""
      batches.append(len(prompts))
      if len(batches) != 2:
        return self.score(prompts, replies)
      scores, parts = self.score(prompts[:num_scored], replies[:num_scored])
      done = list(zip(scores, parts, strict=True))
      raise calls.CallError("no answer.", done)

    fail.source = "each by itself"
    responder = _responder(settings=SAMPLED, batch_size=2, num_samples=3)
    arguments = self.path, responder, self.params, PROMPTS, fail
    with self.assertRaisesRegex(
      calls.CallError,
      f"no answer. {6 + num_scored} responses .*x.jsonl: the same command"
      if num_scored
      else "no answer.$",
    ):
      samplers.collect(*arguments)
    self.assertLen(files.read_jsonl(self.path), 6 + num_scored)
    self.assertEqual(samplers.collect(*arguments), whole)
    self.assertEqual(self.path.read_bytes(), content)
    self.assertLen(self.asked, 21)  # None twice.

  def test_a_damaged_file_is_set_aside(self):
    whole = self.collect()
    content = self.path.read_bytes()
    lines = content.splitlines(keepends=True)
    damaged = b"".join([*lines[:6], b"\0\0\n", *lines[7:]])
    self.path.write_bytes(damaged)
    with contextlib.redirect_stdout(io.StringIO()) as said:
      self.assertEqual(self.collect(), whole)
    self.assertRegex(said.getvalue(), "x.jsonl:7: not JSON .*x.jsonl.old1")
    self.assertEqual(self.path.read_bytes(), content)
    aside = self.path.with_name("x.jsonl.old1")
    self.assertEqual(aside.read_bytes(), damaged)

  def test_further_draws(self):
    first = self.collect(draw=1)
    self.path.unlink()
    self.assertNotEqual(self.collect(draw=2), first)
    self.path.unlink()
    self.assertEqual(self.collect(draw=1), first)

  def test_file_of_something_else(self):
    self.collect()
    with self.assertRaisesRegex(ValueError, "has 7 prompts, and 6 texts"):
      samplers.collect(
        self.path, _responder(), self.params, PROMPTS[1:], self.score
      )
    for options in (
      {"num_samples": 2},
      {"prompts": PROMPTS[1:]},
      {"prompts": PROMPTS[:-1]},
    ):
      with self.assertRaisesRegex(ValueError, "samples of other prompts, from"):
        self.collect(**options)

  def test_forced_tokens_are_filed(self):
    self.assertEqual(samplers.load_forced(self.folder), {})
    self.assertEqual(samplers.load_forced("smollm2-135m"), {})
    forced = np.full(8, -1, np.int32)
    forced[[2, 7]] = 5
    for shown_as in (None, 3):
      samplers.save_forced(self.folder, forced, shown_as)
      found = samplers.load_forced(self.folder)
      np.testing.assert_array_equal(found["forced"], forced)
      self.assertEqual(found["forced_as"], shown_as)


class ProgressTest(parameterized.TestCase):
  def test_prints_now_and_then_and_at_the_end(self):
    rows = [{"parts": {"is_correct": i < 3}} for i in range(4)]
    progress = samplers.Progress("round 1", 9, seconds=1000)
    with mock.patch("builtins.print") as printed:
      for done in (4, 8, 9):
        progress(done, rows)
    lines = [call.args[0] for call in printed.call_args_list]
    self.assertEqual(
      lines,
      [
        "round 1: 4 of 9 prompts, 75% of the last right",
        "round 1: 9 of 9 prompts, 75% of the last right",
      ],
    )


class ReadTest(parameterized.TestCase):
  def _drawn(self, tokenizer, ids):
    ids = np.array([ids])
    prompt = np.array([tokenizer.encode("Once")])
    return rollouts.Rollout(
      prompt_ids=prompt,
      prompt_mask=prompt >= 0,
      response_ids=ids,
      response_mask=ids >= 0,
      log_probs=np.zeros(ids.shape),
      truncated_log_probs=np.zeros(ids.shape),
      finished=np.array([True]),
    )

  def test_cut_where_the_sampler_stopped(self):
    folder = conftest.shared("data/models/stories260k")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False)
    byte = lambda i: tokenizer.convert_tokens_to_ids(f"<0x{i:02X}>")
    # A blank in front of the first token, which SentencePiece would take off.
    for ids, stops, expected in (
      (encode("upon a"), [" upon"], ""),
      (encode("upon a"), [], " upon a"),
      (encode("upon a"), [" a"], " upon"),
      # Bytes that are no UTF-8, in one run with a stop string and without.
      ([byte(0xC3), byte(0x0A), byte(0x41)], ["\n"], "\ufffd"),
      ([byte(0xC3), byte(0xA9), byte(0x0A)], ["\n"], "é"),
      ([*encode("a"), byte(0x0A), byte(0xFF)], ["\n"], " a"),
    ):
      drawn = self._drawn(tokenizer, ids)
      self.assertEqual(samplers.read(tokenizer, drawn, stops), [expected])

  def test_texts(self):
    # "3+4=7" with the end token, "12" cut short, nothing, and "=+".
    ids = [[3, 100, 4, 102, 7, 104], [1, 2, 9, 9, 9, 9], [104] + [9] * 5]
    ids = jnp.array([*ids, [102, 100, 9, 9, 9, 9]])
    mask = jnp.arange(6)[None] < jnp.array([[6], [2], [1], [2]])
    empty = jnp.zeros((4, 6))
    drawn = rollouts.Rollout(
      prompt_ids=ids,
      prompt_mask=mask,
      response_ids=ids,
      response_mask=mask,
      log_probs=empty,
      truncated_log_probs=empty,
      finished=mask[:, 0],
    )
    for stops, expected in (
      ((), ["3+4=7", "12", "", "=+"]),
      (("+",), ["3", "12", "", "="]),
      # In front of the first of them, in whatever order they are given.
      (("=", "+4"), ["3", "12", "", ""]),
      (("+4", "="), ["3", "12", "", ""]),
      (("4=7",), ["3+", "12", "", "=+"]),
      # One that begins first may lie in what another would cut off.
      (("4=", "+4"), ["3", "12", "", "=+"]),
      (("+4", "4="), ["3", "12", "", "=+"]),
    ):
      self.assertEqual(samplers.read(NUMBERS, drawn, stops), expected)
