"""Tests of responses: prompts in, texts out, however they are batched."""

import collections
import functools
import pathlib
import tempfile
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from rljax.distributed import meshes
from rljax.generation import rollouts, samplers
from rljax.ops import sampling
from rljax.tasks import arithmetic, word_lists
from rljax.text import batches, files, tokens
from rljax.text import prompts as prompts_lib
from tests import stand_in, tiny

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


class SamplerTest(parameterized.TestCase):
  def test_every_draw_of_a_step_has_limits_of_its_own(self):
    settings = samplers.Settings(
      max_length=6, min_length=1, num_samples=4, stop_at_eos=False, seed=3
    )
    mesh = meshes.make("data:1")
    sampler = samplers.Sampler(MODEL, WORDS, settings, mesh=mesh)
    (prompts,) = prompts_lib.encode(WORDS, PROMPTS, max_length=99)
    found = []
    for step, number in ((2, 0), (2, 1), (3, 0)):
      samples = sampler.draw(
        jax.random.key(0),
        meshes.replicate(_params(), mesh),
        prompts,
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
    prompts = [*PROMPTS, PROMPTS[0]]
    found = []
    for batch_size, spec, seed in (
      (3, "data:1", 5),
      (8, "data:8", 5),
      (8, "data:1", 6),
    ):
      mesh = meshes.make(spec)
      responder = _responder(
        prompts, settings=SAMPLED, batch_size=batch_size, mesh=mesh, seed=seed
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
    prompts = [f"{i}+{i + 1}=" for i in range(40, 56)]
    # The numbers below ten and "=" are likely, all else is not.
    table = np.zeros((32, len(NUMBERS), len(NUMBERS)), np.float32)
    table[..., :10] = table[..., NUMBERS.convert_tokens_to_ids("=")] = 6.0
    params = stand_in.params(table)
    stops = ("=3", "9")
    responder = _responder(
      prompts,
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
      tokens.encode_prompts(NUMBERS, prompts, max_length=9)
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

  def test_answers_are_what_judge_judges(self):
    responder = _responder()
    scores, parts = samplers.judge(responder, self.params, PROMPTS, self.score)
    rows = samplers.answers(responder, self.params, PROMPTS, self.score)
    self.assertEqual([row["parts"] for row in rows], parts)
    np.testing.assert_array_equal([row["reward"] for row in rows], scores)
    self.assertEqual([row["prompt"] for row in rows], list(PROMPTS))
    self.assertEqual([row["response"] for row in rows], responder(self.params))
    self.assertEqual({type(row["finished"]) for row in rows}, {bool})

  def test_judge_is_collect_without_a_file(self):
    rows = self.collect(num_samples=1)
    responder = _responder(settings=SAMPLED, batch_size=2)
    scores, parts = samplers.judge(responder, self.params, PROMPTS, self.score)
    self.assertEqual(scores.tolist(), [row["reward"] for row in rows])
    self.assertEqual(parts, [row["parts"] for row in rows])

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
    ):
      self.assertEqual(samplers.read(NUMBERS, drawn, stops), expected)
