"""Tests of the function that scores responses, whatever it is made of."""

import functools
import pathlib
import tempfile
import types

import jax
import numpy as np
import pytest
from absl.testing import parameterized

from rljax.distributed import meshes
from rljax.generation import responses
from rljax.models import classifier, hf
from rljax.scoring import reward_models, reward_terms, scorers
from rljax.tasks import word_lists
from tests import tiny

pytest.importorskip("tokenizers")
pytest.importorskip("safetensors")

PROMPTS = ["birds 2 not duck owl:", "fish 3 not cod eel:"]
REPLIES = [" dove hawk", " tuna sole"]


class TaskTest(parameterized.TestCase):
  def test_scores(self):
    score = scorers.scorer("word_lists", {})
    scores, parts = score(PROMPTS, REPLIES)
    np.testing.assert_allclose(scores, [1, 2 / 3], rtol=1e-6)
    self.assertEqual(scores.dtype, np.float32)
    self.assertEqual([part["is_correct"] for part in parts], [True, False])
    self.assertEqual(score.description, {"task": "word_lists"})

  def test_options(self):
    score = scorers.scorer("arithmetic", {"parse": "leading_integer"})
    self.assertEqual(
      score.description, {"task": "arithmetic", "parse": "leading_integer"}
    )
    # An error of 0 and of 1, read in front of the full stop.
    scores, _ = score(["3+4=", "3+4="], ["7", "8."])
    np.testing.assert_allclose(scores, [1, 0.95004], atol=1e-5)

  def test_options_of_a_reward_model_are_left_alone(self):
    # Scripts hand on their flags for both.
    score = scorers.scorer("word_lists", {}, "", transform="no such thing")
    self.assertEqual(score.description, {"task": "word_lists"})

  @parameterized.parameters(
    ("", {}, "name a --reward_model or a --task"),
    ("", {"parse": "last"}, "name a --reward_model or a --task"),
    ("chess", {}, "Unknown task 'chess'; known tasks are .*word_lists"),
    ("arithmetic", {"prase": "last"}, "has no option 'prase'; it has .*parse"),
  )
  def test_bad_input(self, task, options, message):
    with self.assertRaisesRegex(ValueError, message):
      scorers.scorer(task, options)


@functools.cache
def _classifier():
  """A classifier of word lists, and random parameters for it."""
  config = tiny.llama_config(vocab_size=120, num_layers=1)
  model = classifier.CausalClassifier(
    classifier.CausalClassifierConfig(config, ("reward",))
  )
  ids = np.zeros((1, 1), np.int32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), ids, ids == 0)
  rng = np.random.default_rng(0)
  draw = lambda leaf: np.float32(0.4 * rng.normal(size=leaf.shape))
  return model, jax.tree.map(draw, shapes["params"])


class RewardModelTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    folder = self.enter_context(tempfile.TemporaryDirectory())
    self.path = str(pathlib.Path(folder) / "classifier")
    hf.save_classifier(self.path, *_classifier(), word_lists.word_tokenizer())

  def test_scores(self):
    options = dict(transform="raw", max_length=16, batch_size=2)
    # The task, which prompts may come from, has no part in it.
    score = scorers.scorer("word_lists", {}, self.path, **options)
    scores, parts = score(PROMPTS, REPLIES)
    alone = reward_models.RewardModel(self.path, **options)
    expected, expected_parts = alone.score_batch(PROMPTS, REPLIES)
    np.testing.assert_array_equal(scores, expected)
    self.assertEqual(parts, expected_parts)
    self.assertNotEqual(scores[0], scores[1])
    self.assertEqual(
      score.description,
      {"reward_model": self.path, "fingerprint": alone.fingerprint},
    )
    # Another reading of the same file is another source of scores.
    other = scorers.scorer("", {}, self.path, **options | {"max_length": 15})
    self.assertNotEqual(other.description, score.description)

  def test_bad_input(self):
    with self.assertRaisesRegex(
      ValueError,
      r"--score_options belongs to a task's score; .* must be empty, got "
      r"\{'parse': 'last'\}",
    ):
      scorers.scorer("arithmetic", {"parse": "last"}, self.path)
    for options, message in (
      (dict(transform="tanh"), 'got "tanh"'),
      (dict(mesh=meshes.make(), batch_size=6), "batch_size .* got 6"),
    ):
      with self.assertRaisesRegex(ValueError, message):
        scorers.scorer("", {}, self.path, max_length=16, **options)
    with self.assertRaises(ValueError):
      scorers.scorer("word_lists", {}, self.path + "/nothing")


class OnceTest(parameterized.TestCase):
  def test_last_texts_are_not_scored_again(self):
    asked = []

    def score(prompts, responses):
      asked.append((list(prompts), list(responses)))
      lengths = np.float32([len(text) for text in responses])
      return lengths, [{"n": len(text)} for text in responses]

    score.description = {"by": "length"}
    once = scorers.once(score)
    self.assertEqual(once.description, score.description)
    texts = ["p", "q"], ["a", "bb"]
    scores, parts = once(*texts)
    scores[0], parts[0]["n"] = -1.0, -1  # A reader may change what it got.
    scores, parts = once(*map(list, texts))
    np.testing.assert_array_equal(scores, [1, 2])
    self.assertEqual(parts, [{"n": 1}, {"n": 2}])
    self.assertLen(asked, 1)
    once(["p", "q"], ["a", "c"])
    once(*texts)  # No longer the last.
    self.assertLen(asked, 3)

  def test_a_term_takes_the_scorer_that_there_is(self):
    calls = []

    def score(prompts, responses):
      calls.append(len(responses))
      return np.ones(len(responses), np.float32), [{} for _ in responses]

    score.description = {}
    score = scorers.once(score)
    config = types.SimpleNamespace(vocab_size=3)
    terms = reward_terms.load(
      types.SimpleNamespace(model=types.SimpleNamespace(config=config)),
      names=["reward_model"],
      mesh=meshes.make("data:1"),
      batch_size=2,
      reward_model="not/loaded",
      model_score=score,
    )
    prompts, texts = ["p", "q"], ["a", "b"]
    scores, _ = score(prompts, texts)  # As `Samples.scored` does.
    samples = types.SimpleNamespace(prompts=prompts, texts=texts, rollout=None)
    earned = terms.earn(samples)["reward_model"]
    np.testing.assert_array_equal(earned, scores)
    self.assertEqual(calls, [2])


class UnfinishedTest(parameterized.TestCase):
  def test_unfinished_are_wrong(self):
    part = {"is_correct": True, "is_valid": True, "answer": "7", "length": 3}
    scores, parts = responses.unfinished_are_wrong(
      [1.0, 1.0], [part, {"other": 1}], [False, True]
    )
    np.testing.assert_array_equal(scores, np.float32([0, 1]))
    self.assertEqual(
      parts,
      [
        {"is_correct": False, "is_valid": False, "answer": None, "length": 3},
        {"other": 1},
      ],
    )
    self.assertTrue(part["is_correct"])  # What was given stays as it is.
