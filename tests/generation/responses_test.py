"""Tests of responses: their settings, texts, scores and columns."""

import collections
import dataclasses
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from absl.testing import parameterized

from rljax.generation import responses, rollouts
from rljax.ops import sampling
from rljax.text import asked, files
from tests import conftest
from tests.generation import drawing

pytest.importorskip("tokenizers")


class RecordsTest(parameterized.TestCase):
  def test_rows(self):
    rows = responses.records(
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
      responses.records(["a"], ["b", "c"], [1.0], [{}])


class SettingsTest(parameterized.TestCase):
  def test_lengths(self):
    settings = responses.Settings(max_length=9, min_length=4, seed=3)
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
    found = responses.Settings(max_length=9).lengths(5, 0)
    np.testing.assert_array_equal(found, [9] * 5)

  def test_distribution(self):
    settings = responses.Settings(
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
    return responses.score_responses(
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
  settings = responses.Settings(max_length=4, temperature=0.5, top_p=0.9)
  return responses.Samples(
    rollout=rollout,
    prompts=["a", "a", "b"],
    texts=["3", "1234", ""],
    settings=settings._replace(**options),
    policy_step=6,
    tokenizer=drawing.NUMBERS,
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
      self.assertEqual(responses.read(tokenizer, drawn, stops), [expected])

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
      self.assertEqual(responses.read(drawing.NUMBERS, drawn, stops), expected)
