"""Tests of what a policy answers, and of what its samples are like."""

import functools
import pathlib
import tempfile

import numpy as np
import pytest
from absl.testing import absltest

from rljax.distributed import meshes
from rljax.evaluation import answers
from rljax.generation import responders, responses, rollouts
from rljax.ops import sampling
from rljax.tasks import word_lists
from rljax.text import tokens
from tests import tiny

pytest.importorskip("tokenizers")

WORDS = word_lists.word_tokenizer()
PROMPTS = (
  "birds 4 not duck owl:",
  "fish 2 not cod eel:",
  "birds 5 not duck owl:",
  "birds 4 not dove owl:",
  "birds",
  "trees 3 not ash elm:",
  "metals 6 not iron lead: iron",
)
MODEL = tiny.model(tiny.llama_config(vocab_size=120, num_layers=1))


@functools.cache
def _params():
  return tiny.params(MODEL.config, 0)


def _responder(**options):
  ids = tokens.encode_prompts(WORDS, PROMPTS, max_length=99)
  return responders.Responder(
    MODEL,
    WORDS,
    ids,
    max_length=6,
    settings=sampling.Settings(),
    batch_size=2,
    mesh=meshes.make("data:1"),
    texts=PROMPTS,
    **options,
  )


def _score(prompts, replies):
  scores = np.float32([len(reply) for reply in replies])
  return scores, [{"is_correct": True, "answer": reply} for reply in replies]


class EvaluateTest(absltest.TestCase):
  def test_rows(self):
    responder = _responder()
    rows = answers.evaluate(responder, _params(), _score)
    texts = responder(_params())
    self.assertEqual([row["prompt"] for row in rows], list(PROMPTS))
    self.assertEqual([row["response"] for row in rows], texts)
    self.assertEqual({type(row["finished"]) for row in rows}, {bool})
    ended = [
      bool(ended)
      for *_, batch in responder.batches(_params())
      for ended in batch
    ]
    self.assertEqual([row["finished"] for row in rows], ended)
    self.assertContainsSubset([True, False], ended)
    scores, parts = responses.score_responses(
      _score, PROMPTS, texts, np.array(ended), unfinished=0.0
    )
    np.testing.assert_array_equal([row["reward"] for row in rows], scores)
    self.assertEqual([row["parts"] for row in rows], parts)
    for row in rows:
      # What ran out of length earned nothing and has no answer.
      self.assertEqual(row["reward"], len(row["response"]) * row["finished"])
      self.assertEqual(row["parts"]["is_correct"], row["finished"])

  def test_is_collect_without_a_file(self):
    with tempfile.TemporaryDirectory() as folder:
      collected = responders.collect(
        pathlib.Path(folder, "x.jsonl"),
        _responder(),
        _params(),
        PROMPTS,
        _score,
      )
    rows = answers.evaluate(_responder(), _params(), _score)
    for name in ("prompt", "response", "reward", "parts", "finished"):
      self.assertEqual(
        [row[name] for row in rows], [row[name] for row in collected]
      )

  def test_answers_without_an_end_may_be_scored_as_any_other(self):
    rows = answers.evaluate(
      _responder(unfinished_score=None), _params(), _score
    )
    self.assertFalse(all(row["finished"] for row in rows))
    for row in rows:
      self.assertEqual(row["reward"], len(row["response"]))
      self.assertTrue(row["parts"]["is_correct"])
      self.assertEqual(row["parts"]["answer"], row["response"])


class MeansTest(absltest.TestCase):
  ROWS = (
    {
      "response": "owl duck",
      "reward": 1.0,
      "parts": {"is_correct": True, "steps": 3, "answer": "a", "odd": 1},
    },
    {
      "response": "Owl duck hawk",
      "reward": 0.5,
      "parts": {"is_correct": False, "steps": 1, "answer": None, "odd": None},
    },
  )

  def test_means(self):
    # (1 + 0.5) / 2, (1 + 0) / 2 and (3 + 1) / 2; the others are no numbers
    # everywhere.
    self.assertEqual(
      answers.means(self.ROWS),
      {"eval/reward": 0.75, "eval/is_correct": 0.5, "eval/steps": 2.0},
    )
    self.assertEqual(
      answers.means(self.ROWS[1:], prefix="dev/"),
      {"dev/reward": 0.5, "dev/is_correct": 0.0, "dev/steps": 1.0},
    )

  def test_mean_parts(self):
    parts = [
      {"a": np.float32(0.5), "b": np.int64(2), "c": np.True_},
      {"a": 1.5, "b": 4, "c": False, "d": 1},
    ]
    self.assertEqual(
      answers.mean_parts(parts, prefix="task/"),
      {"task/a": 1.0, "task/b": 3.0, "task/c": 0.5},
    )
    self.assertEqual(answers.mean_parts([]), {})

  def test_mean_parts_that_are_numbers_everywhere(self):
    parts = [
      {"is_correct": True, "error": 1.0, "answer": 7, "text": "a"},
      {"is_correct": False, "error": 4, "answer": None, "text": "b"},
    ]
    # Answers are not all numbers, texts never are.
    self.assertEqual(
      answers.mean_parts(parts), {"is_correct": 0.5, "error": 2.5}
    )

  def test_wording(self):
    # 2 and 3 words; of the pairs owl-duck, owl-duck and duck-hawk two differ.
    found = answers.wording(self.ROWS, prefix="dev/")
    self.assertEqual(found.keys(), {"dev/words", "dev/distinct_2"})
    self.assertEqual(found["dev/words"], 2.5)
    np.testing.assert_allclose(found["dev/distinct_2"], 2 / 3)


class OfSamplesTest(absltest.TestCase):
  def test_hand_computed(self):
    mask = np.array([[True, True, False], [True, True, True], [True] * 3])
    ids = np.zeros((3, 3), np.int32)
    samples = responses.Samples(
      rollout=rollouts.Rollout(
        prompt_ids=ids,
        prompt_mask=mask,
        response_ids=ids,
        response_mask=mask,
        log_probs=np.zeros((3, 3)),
        truncated_log_probs=np.zeros((3, 3)),
        finished=mask[:, 0],
      ),
      prompts=["p"] * 3,
      texts=["3", "4", "3."],
      settings=responses.Settings(max_length=3),
      policy_step=0,
      tokenizer=WORDS,
      scores=np.float32([1, 0, 1]),
      parts=[{"answer": 3, "ok": True}, {"ok": False}, {"answer": 3, "ok": 1}],
    )
    found = answers.of_samples(samples, 2.0)
    # 2 + 3 + 3 tokens in two seconds; the answers are 3, "4" and 3.
    self.assertEqual(found["tokens_per_second"], 4.0)
    self.assertEqual(found["step_seconds"], 2.0)
    self.assertEqual(found["answers/distinct"], 2)
    np.testing.assert_allclose(found["task/ok"], 2 / 3)
    self.assertNotIn("task/answer", found)
    # A choice among what was drawn: of that are the tokens and the parts.
    found = answers.of_samples(samples.take([1]), 2.0, drawn=samples)
    self.assertEqual(found["tokens_per_second"], 4.0)
    self.assertEqual(found["answers/distinct"], 1)
    np.testing.assert_allclose(found["task/ok"], 2 / 3)


if __name__ == "__main__":
  absltest.main()
