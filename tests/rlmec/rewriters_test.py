"""Tests of who rewrites: a function, and a model in two calls."""

import dataclasses
import functools
import os
import pathlib
import signal
import tempfile
import time
from unittest import mock

import numpy as np
from absl.testing import absltest, parameterized

from rljax.distributed import meshes
from rljax.generation import responders
from rljax.models import hf
from rljax.rlmec import prompts as prompts_lib
from rljax.rlmec import rewriters
from rljax.scoring import scorers
from rljax.storage import calls, signals
from rljax.tasks import chains, sentiment
from rljax.text import files
from tests import tiny

QUESTION = "Q12+5*3"
GOLD = "12+5=17|17*3=51;A51"
RIGHT = "12+5=17;3*17=51|A51"
# Right up to the second step; wrong from the first on; wrong in its answer.
SECOND = "12+5=17;3*17=54|A54"
FIRST = "12+5=18;3*18=54|A54"
LAST = "12+5=17;3*17=51|A52"

TOKENIZER = chains.character_tokenizer()
COMPACT = prompts_lib.TEMPLATES["compact"]
SCORE = scorers.scorer("chains", {})
MODEL = mock.Mock(**{"config.max_positions": 192})


def _row(response, question=QUESTION):
  return {
    "prompt": question,
    "gold": GOLD,
    "response": response,
    "is_right": response == RIGHT,
  }


class FakeResponder:
  """Answers prompts from a table, and remembers what it was asked."""

  asked = []

  def __init__(self, table, model, tokenizer, prompt_ids, **options):
    self.prompts = [
      tokenizer.decode(ids, skip_special_tokens=True) for ids in prompt_ids
    ]
    self.num_prompts, self.num_samples = len(prompt_ids), 1
    self.options, self._table = options, table

  def batches(self, params, *, first=0, draw=None):
    del params, draw
    for i in range(first, self.num_prompts, 2):
      rows = range(i, min(i + 2, self.num_prompts))
      prompts = [self.prompts[k].replace(" ", "") for k in rows]
      FakeResponder.asked += prompts
      replies = [self._table(prompt) for prompt in prompts]
      finished = np.array([not reply.endswith("...") for reply in replies])
      yield rows, replies, finished


class ByModelTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    folder = tempfile.TemporaryDirectory()
    self.addCleanup(folder.cleanup)
    self.folder = pathlib.Path(folder.name)
    FakeResponder.asked = []

  def rewrite(self, table, rows, **options):
    options = {
      "mesh": meshes.make("data:1"),
      "batch_size": 2,
      "max_length": 32,
      "max_prompt_length": 99,
      "step_ends": ";|",
      **options,
    }
    fake = functools.partial(FakeResponder, table)
    with mock.patch.object(responders, "Responder", fake):
      return rewriters.by_model(
        self.folder, rows, MODEL, TOKENIZER, None, COMPACT, SCORE, **options
      )

  def test_two_calls_keep_the_steps_before_the_first_wrong_one(self):
    def table(prompt):
      if prompt.endswith("L"):
        return "0" if FIRST in prompt else "1"
      if prompt.endswith(f"{SECOND}R12+5=17;"):
        return "3*17=51|A51"
      self.assertEndsWith(prompt, f"{FIRST}R")
      return "12+5=17;3*17=50|A50"

    found = self.rewrite(table, [_row(SECOND), _row(RIGHT), _row(FIRST)])
    self.assertEqual([row["error_step"] for row in found], [1, -1, 0])
    self.assertEqual([row["is_verified"] for row in found], [True, True, False])
    self.assertEqual(found[0]["rewrite"], RIGHT)
    self.assertEqual(found[1]["rewrite"], RIGHT)
    self.assertEqual(found[2]["rewrite"], "12+5=17;3*17=50|A50")
    # Nobody asks about a right sample.
    self.assertNotIn(f"P{RIGHT}", "".join(FakeResponder.asked))
    self.assertLen(FakeResponder.asked, 4)

  def test_the_last_step_can_be_the_wrong_one(self):
    def table(prompt):
      return "2" if prompt.endswith("L") else "A51"

    (row,) = self.rewrite(table, [_row(LAST)])
    self.assertEqual(row["rewrite"], RIGHT)
    self.assertEndsWith(FakeResponder.asked[-1], "R12+5=17;3*17=51|")

  @parameterized.parameters("", "L", "7", "99999999", "1...")
  def test_a_wrong_sample_stays_wrong_whatever_step_is_named(self, reply):
    def table(prompt):
      return reply if prompt.endswith("L") else RIGHT

    (row,) = self.rewrite(table, [_row(SECOND)])
    self.assertEqual(row["error_step"], -1)
    self.assertFalse(row["is_right"])
    self.assertTrue(row["is_verified"])
    self.assertEndsWith(FakeResponder.asked[-1], f"{SECOND}R")

  def test_rewrites_without_an_end_are_not_right(self):
    def table(prompt):
      return "1" if prompt.endswith("L") else "3*17=51|A51..."

    (row,) = self.rewrite(table, [_row(SECOND)])
    self.assertFalse(row["is_verified"])
    self.assertEqual(row["rewrite"], "")

  def test_long_questions_are_told_and_not_asked(self):
    rows = [_row(SECOND), _row("1" * 60)]
    found = self.rewrite(
      lambda prompt: "1" if prompt.endswith("L") else "3*17=51|A51",
      rows,
      max_prompt_length=60,
    )
    self.assertEqual([row.get("too_long", False) for row in found], [0, 1])
    self.assertEqual([row["is_verified"] for row in found], [True, False])
    self.assertLen(FakeResponder.asked, 2)

  def test_questions_that_do_not_fit_the_context_are_not_asked(self):
    # 192 positions, 32 of a rewrite: buckets of 128 fit, and not those of 192.
    rows = [_row(SECOND), _row("1" * 100)]
    found = self.rewrite(
      lambda prompt: "1" if prompt.endswith("L") else "3*17=51|A51",
      rows,
      max_prompt_length=999,
    )
    self.assertEqual([row.get("too_long", False) for row in found], [0, 1])

  def test_without_locating_there_is_one_call(self):
    found = self.rewrite(lambda _: RIGHT, [_row(SECOND)], locate=False)
    self.assertLen(FakeResponder.asked, 1)
    self.assertEqual(found[0]["error_step"], -1)

  def test_only_right_samples_need_no_model(self):
    found = self.rewrite(None, [_row(RIGHT)])
    self.assertEqual(found[0]["rewrite"], RIGHT)
    self.assertEmpty(FakeResponder.asked)

  # Two batches to a call, of two questions and of one. The second of them is
  # drawn ahead of a stop in the first one, and asked once more.
  @parameterized.parameters((1, 3, 7), (2, 3, 6), (3, 6, 7))
  def test_a_stopped_call_goes_on_where_it_was(self, num_batches, done, total):
    def table(prompt):
      return "0" if prompt.endswith("L") else RIGHT

    rows = [_row(f"12+5={n};3*{n}={3 * n}|A{3 * n}") for n in (18, 19, 20)]
    calls = iter(range(99))

    def stop(done, batch):
      if next(calls) + 1 == num_batches:
        raise signals.Stopped

    with self.assertRaises(signals.Stopped):
      self.rewrite(table, rows, progress=lambda name, num: stop)
    self.assertLen(FakeResponder.asked, done)
    found = self.rewrite(table, rows)
    self.assertLen(FakeResponder.asked, total)
    self.assertEqual([row["rewrite"] for row in found], [RIGHT] * 3)
    written = files.read_jsonl(self.folder / "rewritings.jsonl")
    self.assertLen(written, 3)

  def test_chat_prompts_begin_the_answer_with_what_is_kept(self):
    def table(prompt):
      return "1" if prompt.endswith("LA") else "3*17=51|A51"

    self.rewrite(
      table, [_row(SECOND)], render=lambda texts: [f"{x}A" for x in texts]
    )
    self.assertEndsWith(FakeResponder.asked[-1], f"{SECOND}RA12+5=17;")


class ByFunctionTest(absltest.TestCase):
  def test_rewrites_are_verified_and_located(self):
    answers = {SECOND: RIGHT, FIRST: LAST}
    rows = [_row(RIGHT), _row(SECOND), _row(FIRST)]
    found = rewriters.by_function(
      rows,
      lambda question, gold, wrong: answers[wrong],
      SCORE,
      step_ends=";|",
    )
    self.assertEqual([row["is_verified"] for row in found], [True, True, False])
    self.assertEqual([row["error_step"] for row in found], [-1, 1, 0])
    self.assertEqual(found[1]["rewrite"], RIGHT)

  def test_the_task_may_say_where_it_went_wrong(self):
    found = rewriters.by_function(
      [_row(LAST)],
      lambda question, gold, wrong: gold,
      SCORE,
      locate=chains.first_wrong_step,
    )
    self.assertEqual(found[0]["error_step"], 2)

  def test_teachers_are_asked_with_question_gold_and_sample(self):
    teacher = mock.Mock(return_value=RIGHT)
    rewriters.by_function([_row(SECOND), _row(RIGHT)], teacher, SCORE)
    teacher.assert_called_once_with(QUESTION, GOLD, SECOND)

  def test_an_empty_rewrite_is_never_right(self):
    always = mock.Mock(return_value=(np.ones(1), [{"is_correct": True}]))
    found = rewriters.by_function([_row(SECOND)], lambda *_: " ", always)
    self.assertFalse(found[0]["is_verified"])

  def test_rewrites_have_the_white_space_of_their_samples(self):
    for sample, rewrite in ((f" {SECOND}\n", RIGHT), (SECOND, f"\n{RIGHT} ")):
      (row,) = rewriters.by_function(
        [_row(sample)], lambda *_, text=rewrite: text, SCORE
      )
      expected = f" {RIGHT}\n" if sample[0] == " " else RIGHT
      self.assertEqual(row["rewrite"], expected)

  def test_teachers_must_return_texts(self):
    with self.assertRaisesRegex(ValueError, "must return a text, got None"):
      rewriters.by_function([_row(SECOND)], lambda *_: None, SCORE)


class OwnTeacherTest(parameterized.TestCase):
  """A function of the user's own fails, hangs or is stopped after hours."""

  def setUp(self):
    super().setUp()
    self.folder = self.enter_context(tempfile.TemporaryDirectory())
    self.asked = []
    self.rows = [_row(text) for text in (SECOND, FIRST, RIGHT, LAST)]

  def rewrite(self, fail=None, **options):
    def teacher(question, gold, wrong):
      self.asked.append(wrong)
      if fail and wrong == LAST:
        return fail()
      return RIGHT

    return rewriters.by_function(
      self.rows, teacher, SCORE, folder=self.folder, **options
    )

  def fails(self):
    raise ConnectionError("no credit")

  def hangs(self):
    time.sleep(60)

  def stops(self):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)

  @parameterized.parameters("fails", "hangs", "stops")
  def test_what_it_has_answered_is_on_disk(self, how):
    self.enter_context(mock.patch.object(calls, "SECONDS_TO_GIVE_UP", 0.3))
    error = signals.Stopped if how == "stops" else calls.CallError
    with signals.Preemption(), self.assertRaises(error) as caught:
      self.rewrite(getattr(self, how), seconds=0.3 if how == "hangs" else 0.0)
    if how != "stops":
      reason = "no credit" if how == "fails" else "more than 0.3 seconds"
      self.assertRegex(str(caught.exception), reason)
      named = f"for the question {QUESTION!r} and the response {LAST!r}"
      self.assertIn(named, str(caught.exception))
    rows = files.read_jsonl(pathlib.Path(self.folder, "answers.jsonl"))
    self.assertEqual([row["response"] for row in rows], [SECOND, FIRST])
    self.asked.clear()
    found = self.rewrite()
    self.assertEqual(self.asked, [LAST])
    self.assertEqual([row["rewrite"] for row in found], [RIGHT] * 4)

  def test_a_killed_one_goes_on_with_whole_answers(self):
    self.rewrite()
    path = pathlib.Path(self.folder, "answers.jsonl")
    os.truncate(path, path.stat().st_size - 5)
    self.asked.clear()
    found = self.rewrite()
    self.assertEqual(self.asked, [LAST])
    self.assertEqual([row["rewrite"] for row in found], [RIGHT] * 4)


class RewriterTest(parameterized.TestCase):
  """What `pipeline.rewrite` takes: who rewrites, and what it depends on."""

  def rewrite(self, name, rows, task=chains):
    rewriter = rewriters.of_teacher(name, task)
    return rewriter.rewrite(None, rows, SCORE, None), rewriter.made_of

  def test_a_task_repairs_and_locates(self):
    found, made_of = self.rewrite("task", [_row(RIGHT), _row(LAST)])
    self.assertEqual([row["is_verified"] for row in found], [True, True])
    self.assertEqual([row["error_step"] for row in found], [-1, 2])
    self.assertEqual(made_of, {"teacher": "task", "step_ends": ";|"})

  def test_gold_is_spliced(self):
    (row,), _ = self.rewrite("gold", [_row(SECOND)])
    self.assertTrue(row["is_verified"])
    self.assertStartsWith(row["rewrite"], "12+5=17;")

  def test_a_function_of_the_users_own(self):
    (row,), made_of = self.rewrite("tests.own_teacher:rewrite", [_row(SECOND)])
    self.assertEqual(row["rewrite"], GOLD)
    # Another source is another teacher.
    self.assertLen(made_of["source"], 64)

  @parameterized.parameters(
    ("task", sentiment, "sentiment cannot repair solutions"),
    ("nobody:rewrite", chains, "--teacher=nobody:rewrite .* can be imported"),
    ("json:rewrite", chains, "can be imported"),
    ("golden", chains, "is none of task, gold and model"),
  )
  def test_no_such_teacher(self, name, task, message):
    with self.assertRaisesRegex(ValueError, message):
      rewriters.of_teacher(name, task)

  def test_a_model_is_known_by_its_weights_and_by_how_it_is_asked(self):
    config = tiny.gpt2_config(vocab_size=len(TOKENIZER), max_positions=192)
    loaded = hf.LanguageModel(
      tiny.model(config), tiny.params(config), TOKENIZER, "a model", None
    )
    make = functools.partial(
      rewriters.of_model,
      mesh=meshes.make("data:1"),
      batch_size=2,
      max_length=8,
      max_prompt_length=99,
    )
    made_of = make(loaded, "compact").made_of
    self.assertEqual(made_of["model"]["dtype"], "float32")
    self.assertEqual(make(loaded, "compact", locate=True).made_of, made_of)
    others = (
      make(loaded, "lines"),
      make(loaded, "compact", locate=False),
      make(
        dataclasses.replace(loaded, params=tiny.params(config, seed=1)),
        "compact",
      ),
    )
    for other in others:
      self.assertNotEqual(other.made_of, made_of)

  def test_a_model_is_asked_with_its_settings(self):
    def table(prompt):
      return "1" if prompt.endswith("L") else "3*17=51|A51"

    FakeResponder.asked = []
    loaded = mock.Mock(tokenizer=TOKENIZER, params={"a": np.zeros(1)})
    loaded.model.config.max_positions = 192
    loaded.model.config.dtype = "bfloat16"
    rewriter = rewriters.of_model(
      loaded,
      "compact",
      mesh=None,
      batch_size=2,
      max_length=32,
      max_prompt_length=99,
      step_ends=";|",
    )
    fake = functools.partial(FakeResponder, table)
    with (
      tempfile.TemporaryDirectory() as folder,
      mock.patch.object(responders, "Responder", fake),
    ):
      (row,) = rewriter.rewrite(
        folder, [_row(SECOND)], SCORE, responders.Progress
      )
    self.assertEqual(row["rewrite"], RIGHT)
    self.assertLen(FakeResponder.asked, 2)
    self.assertEqual(rewriter.made_of["model"]["dtype"], "bfloat16")


if __name__ == "__main__":
  absltest.main()
