"""Tests of scores that are kept until the work is done."""

import contextlib
import io
import os
import pathlib
import signal
import sys
import tempfile
import time
from unittest import mock

import numpy as np
from absl.testing import absltest, parameterized

from rljax.scoring import kept, scorers
from rljax.storage import calls, signals
from rljax.text import files

TASK = """
def score(prompt, response):
  asked.append(response)
  if fail is not None and response == fail[0]:
    fail[1]()
  return len(response), {"length": len(response)}
"""
PROMPTS = ["p"] * 4 + ["q"] * 3
RESPONSES = ["", "a", "bb", "bb", "a", "ccc", "dddd"]


class KeptTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    folder = self.enter_context(tempfile.TemporaryDirectory())
    self.folder = pathlib.Path(folder)
    self.path = self.folder / "scores.jsonl"
    self.enter_context(mock.patch.object(sys, "path", [folder, *sys.path]))
    self.enter_context(mock.patch.dict(sys.modules))
    (self.folder / "own.py").write_text(TASK)
    import own

    own.asked, own.fail = [], None
    self.task = own

  def scorer(self, **options):
    return kept.scorer(scorers.of_task(self.task, **options), self.folder)

  def _check(self, found):
    scores, parts = found
    self.assertEqual(scores.dtype, np.float32)
    self.assertEqual(scores.tolist(), [0, 1, 2, 2, 1, 3, 4])
    self.assertEqual(parts[6], {"length": 4})

  def test_the_same_scores_and_each_is_asked_once(self):
    score = self.scorer()
    self.assertEqual(score.description, {"task": "own"})
    self._check(score(PROMPTS, RESPONSES))
    self._check(score(PROMPTS, RESPONSES))
    self.assertEqual(self.task.asked, RESPONSES)
    # Another process goes on with them.
    self._check(self.scorer()(PROMPTS, RESPONSES))
    self.assertEqual(self.task.asked, RESPONSES)

  def fails(self):
    raise KeyError("no answer")

  def hangs(self):
    time.sleep(60)

  def stops(self):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)

  def test_a_signal_ends_it_behind_what_is_on_disk(self):
    self.task.fail = "ccc", lambda: os.kill(os.getpid(), signal.SIGTERM)
    with self.assertRaises(signals.Stopped):
      self.scorer()(PROMPTS, RESPONSES)
    self.assertLen(files.read_jsonl(self.path), 7)
    self._check(self.scorer()(PROMPTS, RESPONSES))
    self.assertEqual(self.task.asked, RESPONSES)

  @parameterized.parameters("fails", "hangs", "stops")
  def test_what_was_answered_is_on_disk(self, how):
    self.enter_context(mock.patch.object(calls, "SECONDS_TO_GIVE_UP", 0.3))
    self.task.fail = "ccc", getattr(self, how)
    error = signals.Stopped if how == "stops" else calls.CallError
    with self.assertRaises(error) as caught:
      self.scorer(seconds=0 if how == "stops" else 0.3)(PROMPTS, RESPONSES)
    if how != "stops":
      self.assertRegex(
        str(caught.exception),
        "The score of own .*prompt 'q' and the response 'ccc'.*scores.jsonl",
      )
    rows = files.read_jsonl(self.path)
    self.assertLen(rows, 7)  # Also those that nobody has scored.
    self.assertLen([row for row in rows if "reward" in row], 5)
    self.task.fail = None
    self.task.asked.clear()
    self._check(self.scorer()(PROMPTS, RESPONSES))
    self.assertEqual(self.task.asked, ["ccc", "dddd"])

  def test_a_task_that_has_changed_is_asked_anew(self):
    self.scorer()(PROMPTS, RESPONSES)
    content = self.path.read_bytes()
    (self.folder / "own.py").write_text(TASK + "# Now it does otherwise.\n")
    self.task.asked.clear()
    with contextlib.redirect_stdout(io.StringIO()) as said:
      self._check(self.scorer()(PROMPTS, RESPONSES))
    aside = "is of another score, and now scores.jsonl.old1"
    self.assertIn(aside, said.getvalue())
    self.assertEqual(self.task.asked, RESPONSES)
    self.assertEqual((self.folder / "scores.jsonl.old1").read_bytes(), content)

  def test_scores_of_a_batch_are_not_taken_apart(self):
    def score_batch(prompts, responses):
      self.task.asked.append(len(responses))
      return [len(responses)] * len(responses), [{} for _ in responses]

    self.task.score_batch = score_batch
    score = self.scorer()
    for number in (7, 3):
      scores, _ = score(PROMPTS[:number], RESPONSES[:number])
      self.assertEqual(scores.tolist(), [number] * number)
    self.assertEqual(self.task.asked, [7, 3])
    self.task.score_batch = mock.Mock(side_effect=KeyError("x"))
    with self.assertRaisesRegex(
      calls.CallError, "prompt 'p' and the response '', the first of 7: KeyErr"
    ):
      self.scorer()(PROMPTS, RESPONSES)
    self.assertLen(files.read_jsonl(self.path), 7)


if __name__ == "__main__":
  absltest.main()
