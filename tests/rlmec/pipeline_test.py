"""Tests of RLMEC's stages, of what goes into them and what comes out."""

import contextlib
import functools
import io
import json
import os
import pathlib
import tempfile
from unittest import mock

import numpy as np
from absl.testing import absltest

from rljax.distributed import meshes
from rljax.generation import responses
from rljax.models import hf
from rljax.rlmec import pipeline, rewriters, targets
from rljax.scoring import scorers
from rljax.storage import signals
from rljax.tasks import chains, diversity, merge_sums
from rljax.text import files
from rljax.text import prompts as text_prompts
from tests import tiny

QUESTION = "Q12+5*3"
GOLD = "12+5=17|17*3=51;A51"
RIGHT = "12+5=17;3*17=51|A51"
# Right up to the second step; wrong from the first on; wrong in its answer.
SECOND = "12+5=17;3*17=54|A54"
FIRST = "12+5=18;3*18=54|A54"
LAST = "12+5=17;3*17=51|A52"
OTHER, OTHER_GOLD = "Q1+2*3", "1+2=3;3*3=9;A9"

TOKENIZER = chains.character_tokenizer()
SCORE = scorers.scorer("chains", {})


def _row(response, question=QUESTION):
  return {
    "prompt": question,
    "gold": GOLD,
    "response": response,
    "is_right": response == RIGHT,
  }


class FakeResponder:
  """Answers two prompts at a time from a table."""

  def __init__(self, table, prompts):
    self.num_prompts, self.num_samples = len(prompts), 1
    self._table, self._prompts = table, prompts

  def batches(self, params, *, first=0, draw=None):
    del params, draw
    for i in range(first, self.num_prompts, 2):
      rows = range(i, min(i + 2, self.num_prompts))
      replies = [self._table[self._prompts.texts[k]] for k in rows]
      yield rows, replies, np.ones(len(rows), bool)


class FakeSampler:
  """Makes responders, and counts them."""

  def __init__(self, table, **settings):
    self.settings = responses.Settings(max_length=24, **settings)
    self.num_made, self._table = 0, table

  def responder(self, prompts, *, batch_size):
    del batch_size
    self.num_made += 1
    return FakeResponder(self._table, prompts)


def _prompts(*texts):
  (found,) = text_prompts.encode(TOKENIZER, texts, max_length=99)
  return found


class FolderTest(absltest.TestCase):
  """Stages in a folder of their own."""

  def setUp(self):
    super().setUp()
    folder = tempfile.TemporaryDirectory()
    self.addCleanup(folder.cleanup)
    self.folder = pathlib.Path(folder.name)

  def sample(self, table, **options):
    sampler = options.pop("sampler", None) or FakeSampler(table)
    return pipeline.sample(
      self.folder,
      sampler,
      None,
      _prompts(*table),
      SCORE,
      batch_size=2,
      **options,
    )

  def rows(self, file):
    return files.read_jsonl(self.folder / file)


class RecordsTest(absltest.TestCase):
  def test_records_have_the_samples_own_verdict(self):
    rows = [
      {"prompt": "q", "response": "r", "parts": {"is_correct": ok}, "index": 0}
      for ok in (True, False)
    ]
    found = pipeline.records(rows, {"q": "g"})
    self.assertEqual([row["is_right"] for row in found], [True, False])
    self.assertEqual(found[0]["gold"], "g")

  def test_metrics(self):
    rows = [
      rewriters.unchanged(_row(RIGHT)),
      _row(SECOND) | {"rewrite": RIGHT, "is_verified": True},
      _row(FIRST) | {"rewrite": GOLD, "is_verified": True},
      _row(LAST) | {"rewrite": "", "is_verified": False},
    ]
    self.assertEqual(
      pipeline.metrics(rows, chains.rewrite),
      {
        "right": 1,
        "wrong": 3,
        "too long": 0,
        "verified": 2 / 3,
        "like the task's": 1 / 3,
      },
    )
    found = pipeline.metrics([rows[0] | {"too_long": True}])
    self.assertEqual(found, {"right": 1, "wrong": 0, "too long": 1})

  def test_settings_travel_with_the_model(self):
    with tempfile.TemporaryDirectory() as folder:
      self.assertEmpty(pipeline.load_settings(folder))
      pipeline.save_settings(folder, template="compact", locate=False)
      self.assertEqual(
        pipeline.load_settings(folder),
        {"template": "compact", "locate": False},
      )
      best = os.path.join(folder, "best")
      self.assertEqual(
        pipeline.load_settings(best), pipeline.load_settings(folder)
      )
      self.assertEmpty(pipeline.load_settings(os.path.join(folder, "other")))
    self.assertEmpty(pipeline.load_settings("some/hub-name"))

  def test_how_a_reward_model_is_asked(self):
    with tempfile.TemporaryDirectory() as folder:
      with self.assertRaisesRegex(ValueError, "give --template"):
        pipeline.how_asked(folder, "", None)
      self.assertEqual(
        pipeline.how_asked(folder, "lines", None), ("lines", True)
      )
      pipeline.save_settings(folder, template="compact", locate=False)
      self.assertEqual(pipeline.how_asked(folder, "", None), ("compact", False))
      self.assertEqual(
        pipeline.how_asked(folder, "lines", True), ("lines", True)
      )


class SampleTest(FolderTest):
  def test_samples_are_drawn_once(self):
    table = {QUESTION: RIGHT, OTHER: "1+2=3;3*3=9;A8"}
    sampler = FakeSampler(table)
    stage = self.sample(table, sampler=sampler, policy="a")
    self.assertEqual(stage.facts["samples"], 2)
    self.assertEqual(stage.facts["right"], 1)
    again = self.sample(table, sampler=sampler, policy="a")
    self.assertEqual(
      again.digest("samples.jsonl"), stage.digest("samples.jsonl")
    )
    self.assertEqual(sampler.num_made, 1)
    self.sample(table, sampler=sampler, policy="b")
    self.assertEqual(sampler.num_made, 2)
    self.assertIn("samples.old1", os.listdir(self.folder))

  def test_how_samples_are_drawn_is_an_input(self):
    table = {QUESTION: RIGHT}
    for number, settings in enumerate(({}, {"top_k": 3}, {"seed": 1})):
      self.sample(table, sampler=FakeSampler(table, **settings))
      self.assertLen(os.listdir(self.folder), number + 1)

  def test_a_signal_leaves_whole_batches(self):
    table = {QUESTION: RIGHT, OTHER: OTHER_GOLD, "Q7+2*2": "7+2=9;9*2=18;A18"}
    stop = mock.Mock(side_effect=signals.Stopped)
    with self.assertRaises(signals.Stopped):
      self.sample(table, progress=lambda name, num: stop)
    self.assertLen(self.rows("samples/samples.jsonl"), 2)
    stage = self.sample(table)
    self.assertEqual(stage.facts["samples"], 3)


class RewriteTest(FolderTest):
  def setUp(self):
    super().setUp()
    self.table = {QUESTION: SECOND, OTHER: OTHER_GOLD}
    self.solutions = [(QUESTION, GOLD), (OTHER, OTHER_GOLD)]
    self.sampled = self.sample(self.table)

  def rewrite(self, name="teacher", solutions=None, **options):
    return pipeline.rewrite(
      self.folder,
      name,
      self.sampled,
      self.solutions if solutions is None else solutions,
      rewriters.of_teacher("task", chains),
      SCORE,
      **options,
    )

  def test_rewrites_and_their_facts(self):
    stage = self.rewrite(own=chains.rewrite)
    rows = self.rows("teacher/rewrites.jsonl")
    self.assertEqual([row["is_right"] for row in rows], [False, True])
    self.assertEqual([row["gold"] for row in rows], [GOLD, OTHER_GOLD])
    self.assertEqual(rows[0]["rewrite"], RIGHT)
    facts = {k: v for k, v in stage.facts.items() if k != "finished_at"}
    self.assertEqual(
      facts,
      {
        "unfinished": 0,
        "duplicate": 0,
        "kept": 2,
        "right": 1,
        "wrong": 1,
        "too long": 0,
        "verified": 1.0,
        "like the task's": 1.0,
      },
    )
    inputs = json.loads((self.folder / "teacher/inputs.json").read_text())
    self.assertEqual(inputs["teacher"], "task")
    self.assertEqual(inputs["scored by"], {"task": "chains"})

  def test_the_first_questions_alone(self):
    self.rewrite(solutions=self.solutions[:1])
    (row,) = self.rows("teacher/rewrites.jsonl")
    self.assertEqual(row["prompt"], QUESTION)
    with contextlib.redirect_stdout(io.StringIO()) as said:
      self.rewrite()
    self.assertIn("teacher: gold changed; it starts over", said.getvalue())

  def test_records_for_learning_and_for_a_test(self):
    stage = pipeline.record(
      self.folder,
      self.rewrite(),
      [OTHER],
      "compact",
      seed=0,
      locate=True,
      step_ends=";|",
    )
    records = self.rows("records/records.jsonl")
    self.assertEqual([row["kind"] for row in records], ["locate", "rewrite"])
    self.assertEqual(records[1]["response"], RIGHT)
    self.assertEqual(stage.facts["records"]["rewrite"], 1)
    # No rewrite is held out, and so no identity either.
    self.assertEqual(stage.facts["held_out"]["not_drawn"], 1)
    self.assertEqual((self.folder / "records/held_out.jsonl").read_text(), "")

  def test_a_model_is_tested_on_unseen_questions(self):
    copies = lambda folder, rows, score, progress: [
      row | {"rewrite": row["response"], "is_verified": False, "error_step": 0}
      for row in rows
    ]
    student = rewriters.Rewriter(copies, {"model": "a"})
    found = pipeline.test(
      self.folder, self.rewrite(), [QUESTION], student, SCORE
    )
    self.assertEqual(
      found,
      {
        "wrong solutions": 1,
        "right rewrites": 0.0,
        "right rewrites of the teacher": 1.0,
        "the teacher's rewrite": 0.0,
        "the teacher's first wrong step": 0.0,
      },
    )
    (row,) = self.rows("test/rewrites.jsonl")
    self.assertEqual(row["prompt"], QUESTION)

  def test_of_right_solutions_there_is_nothing_to_compare(self):
    row = rewriters.unchanged(_row(RIGHT))
    self.assertEqual(pipeline.compare([row], [row]), {"wrong solutions": 0})


class SuperviseTest(FolderTest):
  def setUp(self):
    super().setUp()
    self.table = {QUESTION: SECOND, OTHER: OTHER_GOLD}
    self.rewritten = pipeline.rewrite(
      self.folder,
      "rewrites",
      self.sample(self.table),
      [(QUESTION, GOLD), (OTHER, OTHER_GOLD)],
      rewriters.of_teacher("task", chains),
      SCORE,
    )
    config = tiny.gpt2_config(vocab_size=len(TOKENIZER), max_positions=128)
    self.policy, self.reward_model = (
      hf.LanguageModel(
        tiny.model(config), tiny.params(config, seed), TOKENIZER, "", None
      )
      for seed in (0, 1)
    )

  def supervise(self, **options):
    options = {
      "template": "compact",
      "prompt_format": "plain",
      "alignment": "clean",
      "max_right": 0,
      "seed": 0,
      "limits": targets.Limits(32, 99),
      "batch_size": 2,
      "mesh": meshes.make("data:1"),
      **options,
    }
    return pipeline.supervise(
      self.folder, self.rewritten, self.policy, self.reward_model, **options
    )

  def test_rows_have_what_both_models_say(self):
    stage = self.supervise()
    wrong, right = self.rows("supervision/supervision.jsonl")
    self.assertEqual([wrong["is_right"], right["is_right"]], [False, True])
    num_tokens = len(SECOND) + 1
    for name in ("response_ids", "probs", "ref_log_probs", "dropped"):
      self.assertLen(wrong[name], num_tokens)
    self.assertTrue(all(0 < p < 1 for p in wrong["probs"]))
    self.assertTrue(all(x < 0 for x in wrong["ref_log_probs"]))
    # 54 becomes 51, twice.
    self.assertEqual(np.flatnonzero(wrong["dropped"]).tolist(), [14, 18])
    self.assertEqual(wrong["rewrite_distance"], 2)
    self.assertEqual(stage.facts["samples kept"], 1.0)
    self.assertEqual((stage.facts["wrong"], stage.facts["right"]), (1, 1))
    self.assertEqual(stage.facts["skipped"], [])
    self.assertEqual(
      self.rows("supervision/pairs.jsonl"),
      [{"prompt": QUESTION, "chosen": RIGHT, "rejected": SECOND}],
    )

  def test_is_made_once_for_the_same_models(self):
    first = self.supervise()
    with mock.patch.object(targets, "blamed", side_effect=AssertionError):
      again = self.supervise(batch_size=1)
      self.assertEqual(again.facts, first.facts)
      with self.assertRaises(AssertionError):
        self.policy = self.reward_model
        self.supervise()

  def test_long_samples_are_named(self):
    with self.assertRaisesRegex(ValueError, "is wrong and has a verified"):
      self.supervise(limits=targets.Limits(18, 99))


class QuestionsTest(absltest.TestCase):
  def test_questions_come_with_solutions(self):
    train, held_out = pipeline.questions(
      chains,
      TOKENIZER,
      SCORE,
      {"train": 2, "test": 1},
      seed=0,
      task_options=["num_steps=1"],
      max_length=99,
    )
    pairs = chains.supervised("train", 0, num=2, num_steps=1)
    self.assertEqual(train.solutions, pairs)
    self.assertEqual(train.prompts.texts, [question for question, _ in pairs])
    self.assertLen(held_out.prompts, 1)
    with self.assertRaisesRegex(ValueError, "tokens, the limit is 2"):
      pipeline.questions(
        chains, TOKENIZER, SCORE, {"train": 1}, seed=0, max_length=2
      )

  def test_tasks_must_have_solutions(self):
    ask = functools.partial(
      pipeline.questions,
      tokenizer=TOKENIZER,
      score=SCORE,
      splits={"train": 2},
      seed=0,
      max_length=99,
    )
    with self.assertRaisesRegex(ValueError, "has no option 'style'"):
      ask(chains, task_options=["style=1"])
    with self.assertRaisesRegex(
      ValueError, "--task=diversity has no solutions"
    ):
      ask(diversity)

  def test_solutions_of_the_task_must_be_right(self):
    pipeline.check_solution(SCORE, QUESTION, GOLD)
    with self.assertRaisesRegex(ValueError, "own solution .* scored as wrong"):
      pipeline.check_solution(SCORE, QUESTION, SECOND)
    partial = mock.Mock(return_value=(np.ones(1), [{"length": 3}]))
    with self.assertRaisesRegex(ValueError, "part is_correct, got length"):
      pipeline.check_solution(partial, QUESTION, GOLD)

  def test_templates_must_be_writable(self):
    pair = (QUESTION, GOLD)
    pipeline.check_template("compact", TOKENIZER, pair)
    for name in ("lines", "instruction"):
      with self.assertRaisesRegex(ValueError, f"--template={name} has"):
        pipeline.check_template(name, TOKENIZER, pair)
    merged = ("07+04=", "#11")
    pipeline.check_template("lines", merge_sums.character_tokenizer(), merged)


if __name__ == "__main__":
  absltest.main()
