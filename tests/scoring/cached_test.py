"""Tests of what a frozen reference says of logged responses."""

import dataclasses
import functools
import json
import pathlib
import tempfile
from typing import Any, NamedTuple
from unittest import mock

import jax
import numpy as np
import pytest
from absl.testing import parameterized

from rljax.distributed import meshes
from rljax.generation import rollouts
from rljax.rlmec import rewriters
from rljax.scoring import cached
from rljax.tasks import word_lists
from rljax.text import encoding, logged
from tests import tiny

pytest.importorskip("tokenizers")

WORDS = word_lists.word_tokenizer()
MODEL = tiny.model(tiny.llama_config(vocab_size=120, num_layers=1))
# Prompts of 7 tokens and of 2, replies of 3 and 5 with their end.
ROWS = (
  {
    "prompt": "birds 4 not duck owl:",
    "candidates": [" dove hawk wren lark", " fig axe", " owl owl"],
    "rewards": [1.0, 0.0, 0.25],
  },
  {"prompt": "fish", "candidates": [" eel cod"], "rewards": [0.5]},
  {
    "prompt": "fish 2 not cod eel:",
    "candidates": [" tuna sole", " pike perch bass carp"],
    "rewards": [1.0, 0.5],
  },
)


def _encode(rows=ROWS, tokenizer=WORDS, max_response_length=8):
  return encoding.encode(
    tokenizer,
    logged.from_rows(rows, "here"),
    max_prompt_length=8,
    max_response_length=max_response_length,
  )


@functools.cache
def _params(seed=0):
  return tiny.params(MODEL.config, seed)


@functools.partial(jax.jit, static_argnums=0)
def _statistics(model, params, batch):
  found, _ = rollouts.token_statistics(model, params, batch, temperature=1.0)
  return found.log_probs


class LogProbsTest(parameterized.TestCase):
  @parameterized.parameters(
    (4, "data:1", None), (1, "data:1", 2), (8, "data:4,fsdp:2", 100)
  )
  def test_each_reply_as_if_alone(self, batch_size, spec, chunk_size):
    encoded = _encode()
    mesh = meshes.make(spec)
    found = cached.response_log_probs(
      MODEL,
      meshes.replicate(_params(), mesh),
      encoded,
      batch_size=batch_size,
      mesh=mesh,
      chunk_size=chunk_size,
    )
    self.assertIsInstance(found, np.ndarray)
    self.assertEqual((found.shape, found.dtype), ((3, 3, 6), np.float32))
    expected = np.zeros((3, 3, 6))
    for row, responses in enumerate(encoded.response_ids):
      for candidate, ids in enumerate(responses):
        prompt = np.int32([encoded.prompt_ids[row]])
        response = np.int32([ids])
        batch = {
          "prompt_ids": prompt,
          "prompt_mask": np.ones(prompt.shape, bool),
          "response_ids": response,
          "response_mask": np.ones(response.shape, bool),
        }
        (alone,) = _statistics(MODEL, _params(), batch)
        expected[row, candidate, : len(ids)] = alone
    np.testing.assert_allclose(found, expected, atol=1e-5)
    # Exactly 0 behind the end and where there is no candidate.
    np.testing.assert_array_equal(found == 0, expected == 0)
    np.testing.assert_array_equal(found[1, 1:], np.zeros((2, 6)))
    self.assertLess(np.max(found[expected != 0]), 0)

  @parameterized.parameters((3, "data:1"), (4, "data:4"))
  def test_pairs_are_scored_as_next_tokens_one_by_one(self, batch_size, spec):
    pairs = [([3, 4, 5], [6, 7]), ([8], [9, 1, 2, 3, 4]), ([5, 5], [1])]
    mesh = meshes.make(spec)
    found = cached.pair_log_probs(
      MODEL,
      meshes.replicate(_params(), mesh),
      pairs,
      batch_size=batch_size,
      mesh=mesh,
    )
    self.assertEqual([len(row) for row in found], [2, 5, 1])
    for row, (prompt, response) in zip(found, pairs, strict=True):
      for t, token in enumerate(response):
        # One token behind all that comes before it.
        before = np.int32([prompt + response[:t]])
        batch = {
          "prompt_ids": before,
          "prompt_mask": np.ones(before.shape, bool),
          "response_ids": np.int32([[token]]),
          "response_mask": np.ones((1, 1), bool),
        }
        (alone,) = _statistics(MODEL, _params(), batch)
        np.testing.assert_allclose(row[t], alone[0], atol=1e-5)

  def test_pairs_must_fit_the_context(self):
    with self.assertRaisesRegex(ValueError, "64 positions"):
      cached.pair_log_probs(
        MODEL,
        _params(),
        [([1] * 40, [2] * 40)],
        batch_size=1,
        mesh=meshes.make("data:1"),
      )


class CacheTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(
      self.enter_context(tempfile.TemporaryDirectory())
    )
    self.cache = self.folder / "values"
    rng = np.random.default_rng(0)
    self.arrays = {
      "ref_log_probs": -rng.random((3, 3, 6), np.float32),
      "values": rng.random(3, np.float32),
    }

  def _made_of(self, rows=ROWS, tokenizer=WORDS, seed=0, **settings):
    settings = {
      "max_response_length": 8,
      "too_long": "skip",
      "dtype": "float32",
      **settings,
    }
    encoded = _encode(rows, tokenizer, settings["max_response_length"])
    return cached.describe(encoded, _params(seed), tokenizer, **settings)

  def _save(self):
    cached.save(self.cache, self.arrays, self._made_of(), {"value_mse": 0.25})

  def _refused(self, made_of, needed=()):
    with self.assertRaises(ValueError) as caught:
      cached.load(self.cache, made_of, needed)
    message = str(caught.exception)
    self.assertIn(str(self.cache), message)
    self.assertIn("Make it again with experiments/offline_value.py", message)
    return message

  def test_round_trip(self):
    self._save()
    found = cached.load(self.cache, self._made_of(), ["values"])
    self.assertEqual(found.keys(), self.arrays.keys())
    for name, array in self.arrays.items():
      np.testing.assert_array_equal(found[name], array)
      self.assertEqual(found[name].dtype, array.dtype)
    manifest = json.loads((self.cache / "manifest.json").read_text())
    self.assertEqual(manifest["notes"], {"value_mse": 0.25})
    self.assertEqual(cached.notes(self.cache), {"value_mse": 0.25})
    # No half-written file is left.
    self.assertCountEqual(
      [path.name for path in self.cache.iterdir()],
      ["manifest.json", "reference.npz"],
    )

  def test_saved_again(self):
    self._save()
    self.arrays = {"values": np.ones(3)}
    self._save()
    found = cached.load(self.cache, self._made_of(), ["values"])
    np.testing.assert_array_equal(found["values"], np.ones(3))

  def test_where_the_rows_come_from_is_no_part_of_them(self):
    self._save()
    encoded = _encode()
    moved = [dataclasses.replace(row, place="there") for row in encoded.rows]
    made_of = cached.describe(
      dataclasses.replace(encoded, rows=moved),
      jax.tree.map(np.asarray, _params()),
      word_lists.word_tokenizer(),
      max_response_length=8,
      too_long="skip",
      dtype="float32",
    )
    cached.load(self.cache, made_of, [])

  def _other_end(self):
    tokenizer = word_lists.word_tokenizer()
    tokenizer.eos_token = "yellow"
    return tokenizer

  def test_made_of_something_else(self):
    self._save()
    other_reward = [*ROWS[:2], ROWS[2] | {"rewards": [1.0, 0.4]}]
    for options, words in (
      (dict(rows=ROWS[:2]), "the logged rows (--data)"),
      (dict(rows=ROWS[::-1]), "the logged rows (--data)"),
      (dict(rows=other_reward), "the logged rows (--data)"),
      (dict(tokenizer=self._other_end()), "the tokenizer"),
      (dict(seed=1), "the parameters of the reference (--policy)"),
      (dict(max_response_length=7), "--max_response_length"),
      (dict(too_long="cut"), "--too_long"),
      (dict(dtype="bfloat16"), "--dtype"),
      (dict(prompt_format="chat"), "--prompt_format"),
      (dict(temperature=1.0), "temperature"),
    ):
      message = self._refused(self._made_of(**options))
      head, *lines, _ = message.splitlines()
      self.assertIn("does not fit this run", head)
      # The part that differs has a line, and no other has one.
      self.assertLen(lines, 1, message)
      self.assertStartsWith(lines[0], f"  {words}: the cache has ")

  def test_other_ids_are_named_alone(self):
    # The same rows, words and limits, encoded another way.
    self._save()
    made_of = self._made_of()
    message = self._refused(made_of | {"ids": "0" * 64})
    self.assertIn("  the token ids of the rows: the cache has ", message)
    self.assertIn(f", this run {'0' * 12}...", message)
    message = self._refused(made_of | {"ids": "0" * 64, "data": "1" * 64})
    self.assertNotIn("token ids", message)

  def test_every_part_that_differs_is_named(self):
    # A limit that skips two of the rows.
    self._save()
    message = self._refused(self._made_of(max_response_length=4, seed=1))
    for words in (
      "--max_response_length: the cache has 8, this run 4\n",
      "the parameters of the reference (--policy): the cache has ",
      "the logged rows (--data): the cache has ",
    ):
      self.assertIn(f"\n  {words}", message)

  def test_damaged(self):
    self._save()
    path = self.cache / "reference.npz"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    self.assertIn("is damaged", self._refused(self._made_of()))

  @parameterized.parameters("manifest.json", "reference.npz")
  def test_missing_file(self, name):
    # A save that was killed had written one of the two.
    self._save()
    (self.cache / name).unlink()
    self.assertIn("no whole cache", self._refused(self._made_of()))

  def test_torn_manifest(self):
    self._save()
    path = self.cache / "manifest.json"
    path.write_text(path.read_text()[:-20])
    self.assertIn("no whole cache", self._refused(self._made_of()))

  def test_killed_while_saving_again(self):
    self._save()
    for function in ("numpy.savez", "json.dumps"):
      with (
        mock.patch(function, side_effect=KeyboardInterrupt),
        self.assertRaises(KeyboardInterrupt),
      ):
        cached.save(self.cache, {"values": np.ones(3)}, {}, {})
      # The old manifest does not vouch for what was there.
      self.assertIn("no whole cache", self._refused({}))

  def test_nothing_there(self):
    self.assertIn("no whole cache", self._refused(self._made_of()))

  def test_missing_array(self):
    self._save()
    self.assertIn(
      "lacks rewards, advantages.",
      self._refused(self._made_of(), ["rewards", "values", "advantages"]),
    )


LIMITS = {
  "max_prompt_length": 8,
  "max_response_length": 8,
  "too_long": "skip",
  "prompt_format": "plain",
}


class _Loaded(NamedTuple):
  """As far as one needs to know a language model."""

  model: Any = MODEL
  params: Any = None
  tokenizer: Any = WORDS


def _log(rows=ROWS):
  encoded = encoding.prepare(WORDS, logged.from_rows(rows, "here"), **LIMITS)
  return encoding.Log(
    encoded=encoded,
    lengths=encoding.lengths(encoded),
    present=logged.present(encoded.rows),
    skipped=[],
    settings=LIMITS,
  )


def _scorer(prompts, replies):
  """A letter is worth a tenth."""
  return np.float32([len(reply) / 10 for reply in replies]), [{}] * len(replies)


class KnownTest(parameterized.TestCase):
  def _known(self, log, needed, **options):
    return cached.known(
      log,
      _Loaded(params=_params()),
      needed,
      **{
        "cache": "",
        "dtype": "float32",
        "batch_size": 4,
        "mesh": meshes.make("data:1"),
        "reader": "--algorithm=x",
        **options,
      },
    )

  def test_of_the_rows(self):
    log = _log([row | {"value": 0.25} for row in ROWS])
    found = self._known(log, ("rewards", "advantages"))
    # 0 where there is no reply, and the rewards less 0.25 elsewhere.
    np.testing.assert_array_equal(
      found["rewards"], [[1, 0, 0.25], [0.5, 0, 0], [1, 0.5, 0]]
    )
    np.testing.assert_array_equal(
      found["advantages"], [[0.75, -0.25, 0], [0.25, 0, 0], [0.75, 0.25, 0]]
    )
    self.assertEqual({x.dtype for x in found.values()}, {np.dtype("float32")})
    self.assertEqual(self._known(log, ()), {})

  def test_the_first_replies_alone(self):
    log = _log([row | {"advantage": 0.5} for row in ROWS])
    message = "--algorithm=x needs advantages, which 3 of 6 logged replies lack"
    with self.assertRaisesRegex(
      ValueError, f"{message}: run experiments/offline_value.py and give"
    ):
      self._known(log, ["advantages"])
    found = self._known(log, ["advantages"], firsts_alone=True)
    np.testing.assert_array_equal(
      found["advantages"], [[0.5, 0, 0], [0.5, 0, 0], [0.5, 0, 0]]
    )

  def test_what_the_rows_lack(self):
    rows = [*ROWS[:2], {"prompt": "fish", "response": " cod"}]
    with self.assertRaisesRegex(
      ValueError, "--x needs rewards, which 1 of 5 logged replies lack[.]$"
    ):
      cached.of_rows(_log(rows), "rewards", reader="--x")
    with self.assertRaisesRegex(ValueError, "which 6 of 6 .* as --cache"):
      self._known(_log(), ["advantages"])

  def test_of_the_reference(self):
    log, mesh = _log(), meshes.make("data:1")
    found = self._known(log, ("ref_log_probs",))
    expected = cached.response_log_probs(
      MODEL,
      meshes.replicate(_params(), mesh),
      log.encoded,
      batch_size=4,
      mesh=mesh,
    )
    np.testing.assert_array_equal(found["ref_log_probs"], expected)
    self.assertEqual(found.keys(), {"ref_log_probs"})

  def test_of_a_cache(self):
    log = _log()
    cache = self.enter_context(tempfile.TemporaryDirectory())
    arrays = {
      name: np.random.default_rng(i).random((3, 3), np.float32)
      for i, name in enumerate(("rewards", "advantages", "ref_log_probs"))
    }
    made_of = cached.describe_log(
      log, _Loaded(params=_params()), dtype="float32"
    )
    notes = {"reward": {"task": "word_lists"}}
    cached.save(cache, arrays, made_of, notes)
    with jax.default_matmul_precision("default"):
      with self.assertRaisesRegex(
        ValueError,
        "--matmul_precision: the cache has highest, this run default on cpu",
      ):
        self._known(log, ["advantages"], cache=cache)
      # Products of bfloat16 are the same.
      self.assertEmpty(cached.precision("bfloat16"))
      made_of = rewriters.identity(_Loaded(params=_params()))
      self.assertEqual(made_of["matmul_precision"], "default on cpu")
    for needed in (tuple(arrays), ("advantages",), ()):
      found = self._known(log, needed, cache=cache)
      self.assertEqual(found.keys(), set(needed))
      for name in needed:
        np.testing.assert_array_equal(found[name], arrays[name])
    # Rewards that are no probabilities are in no cache, which still must fit.
    found = self._known(log, ["rewards"], cache=cache, own_rewards=True)
    np.testing.assert_array_equal(
      found["rewards"], [[1, 0, 0.25], [0.5, 0, 0], [1, 0.5, 0]]
    )
    for options in ({"own_rewards": True}, {}):
      with self.assertRaisesRegex(ValueError, "--dtype: the cache has float32"):
        self._known(log, ["rewards"], cache=cache, dtype="bfloat16", **options)

    def scorer(task):
      return mock.Mock(description={"task": task})

    self.assertEqual(cached.other_scorer(cache, scorer("word_lists")), [])
    (message,) = cached.other_scorer(cache, scorer("sentiment"))
    self.assertRegex(message, "by .*word_lists.*dev prompts by .*sentiment")
    self.assertEqual(cached.other_scorer("", scorer("sentiment")), [])

  def test_replies_without_a_reward_are_scored(self):
    rows = [*ROWS[:2], {"prompt": "fish", "response": " cod"}]
    log = _log(rows)
    rewards, num_scored = cached.score(log, _scorer)
    # A blank and three letters.
    np.testing.assert_allclose(
      rewards, [[1, 0, 0.25], [0.5, 0, 0], [0.4, 0, 0]]
    )
    self.assertEqual((num_scored, rewards.dtype), (1, np.float32))
    rewards, num_scored = cached.score(log, _scorer, again=True)
    np.testing.assert_allclose(
      rewards,
      [[2.0, 0.8, 0.8], [0.8, 0, 0], [0.4, 0, 0]],
      rtol=1e-6,
    )
    self.assertEqual(num_scored, 5)
    _, num_scored = cached.score(_log(), None)
    self.assertEqual(num_scored, 0)
