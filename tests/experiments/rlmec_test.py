"""Runs RLMEC as a user does: reward model, stages, training, stops, errors."""

import functools
import json
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest
from absl.testing import absltest, parameterized

from rljax.tasks import merge_sums
from tests import conftest, scripts

pytest.importorskip("tokenizers")

SFT = "experiments/sft.py"
GRM = "experiments/rlmec_reward_model.py"
RLMEC = "experiments/rlmec.py"

TASK = ("--task=chains", "--task_options=num_steps=1")
SAMPLES = (
  *TASK,
  "--num_prompts=20",
  "--num_samples=2",
  "--sample_batch_size=8",
  "--max_length=16",
)
GRM_FLAGS = (
  *SAMPLES,
  "--num_held_out=2",
  "--batch_size=16",
  "--learning_rate=3e-3",
  "--max_positions=96",
)
# Enough to know its records by heart.
TRAINED = ("--steps=220", "--save_every=100", "--eval_every=110")
RLMEC_FLAGS = (
  *SAMPLES,
  "--num_eval_prompts=8",
  "--steps=6",
  "--save_every=2",
  "--eval_every=3",
  "--batch_size=8",
)


def setUpModule():
  scripts.without_pictures()


def tearDownModule():
  scripts.remove_scratch()


@functools.cache
def policy():
  """A policy that knows what a solution looks like, and no more."""
  workdir = scripts.scratch() / "policy"
  scripts.run(
    SFT, workdir, "--task=chains",
    "--task_options=corpus=pretraining,num_steps=1",
    "--tokenizer=character", "--num_examples=256", "--num_eval_prompts=16",
    "--steps=60", "--batch_size=32", "--hidden_size=32", "--num_layers=1",
    "--learning_rate=5e-3",
  )  # fmt: skip
  return workdir


@functools.cache
def trained():
  """Workdir of a reward model, and of the stages that made it."""
  workdir = scripts.scratch() / "grm"
  scripts.run(
    GRM, workdir, *GRM_FLAGS, *TRAINED, f"--policy={policy()}",
    f"--stages={workdir / 'stages'}",
  )  # fmt: skip
  return workdir, workdir / "stages"


def rlmec_flags(*more, stages=None):
  workdir, own = trained()
  return (
    *RLMEC_FLAGS,
    f"--policy={policy()}",
    f"--reward_model={workdir}",
    f"--stages={stages or own}",
    *more,
  )


@functools.cache
def whole():
  """Workdir of a whole run, with stages of its own."""
  workdir = scripts.scratch() / "whole"
  flags = rlmec_flags("--preflight=strict", stages=workdir)
  scripts.run(RLMEC, workdir, *flags)
  return workdir


def done(folder, stage):
  return json.loads((pathlib.Path(folder) / stage / "done.json").read_text())


class RewardModelTest(parameterized.TestCase):
  def test_records_are_those_of_the_samples(self):
    workdir, stages = trained()
    samples = scripts.rows(stages / "samples", "samples.jsonl")
    rewrites = scripts.rows(stages / "teacher", "rewrites.jsonl")
    records = scripts.rows(stages / "records", "records.jsonl")
    self.assertLen(samples, 40)
    finished = {
      (row["prompt"], row["response"]) for row in samples if row["finished"]
    }
    self.assertEqual(
      {(row["prompt"], row["response"]) for row in rewrites}, finished
    )
    self.assertTrue(all(row["is_verified"] for row in rewrites))
    wrong = [row for row in rewrites if not row["is_right"]]
    self.assertGreater(len(wrong), 10)
    kinds = [row["kind"] for row in records]
    held_out = scripts.rows(stages / "records", "held_out.jsonl")
    kinds += [row["kind"] for row in held_out]
    self.assertEqual(kinds.count("rewrite"), len(wrong))
    self.assertEqual(kinds.count("locate"), len(wrong))
    asked = {row["prompt"] for row in records}
    self.assertTrue(asked.isdisjoint(row["prompt"] for row in held_out))

  def test_summary_tests_rewrites_of_unseen_questions(self):
    workdir, _ = trained()
    summary = json.loads((workdir / "summary.json").read_text())
    tested = scripts.rows(workdir / "test", "rewrites.jsonl")
    wrong = [row for row in tested if not row["is_right"]]
    self.assertEqual(summary["wrong solutions"], len(wrong))
    self.assertLen({row["prompt"] for row in tested}, 2)
    self.assertEqual(
      summary["right rewrites"], np.mean([row["is_verified"] for row in wrong])
    )
    self.assertEqual(summary["right rewrites of the teacher"], 1.0)
    *rows, last = scripts.rows(workdir)
    self.assertLess(rows[-1]["nll/loss"], 0.1)
    self.assertEqual(summary["held-out loss (nats a token)"], last["eval/loss"])
    self.assertLess(last["eval/loss"], rows[0]["eval/loss"])

  @parameterized.parameters(
    ("stages/samples/samples.jsonl", 16), ("metrics.jsonl", 3)
  )
  def test_killed_and_resumed_is_the_same(self, name, num_rows):
    flags = (
      *GRM_FLAGS, f"--policy={policy()}", "--steps=6", "--save_every=2",
      "--eval_every=3",
    )  # fmt: skip
    base = scripts.scratch() / f"grm_killed_{num_rows}"
    once, again = base / "once", base / "again"
    scripts.run(GRM, once, *flags, f"--stages={once / 'stages'}")
    flags = (*flags, f"--stages={again / 'stages'}")
    scripts.run_until_killed(GRM, again, *flags, num_rows=num_rows, name=name)
    scripts.run(GRM, again, *flags)
    self.assertEqual(scripts.fingerprint(once), scripts.fingerprint(again))
    self.assertEqual(
      scripts.steady(scripts.rows(once)), scripts.steady(scripts.rows(again))
    )
    for file in ("samples/samples.jsonl", "records/records.jsonl"):
      self.assertEqual(
        (once / "stages" / file).read_text(),
        (again / "stages" / file).read_text(),
      )

  def test_own_function_as_a_teacher(self):
    workdir = scripts.scratch() / "own_teacher"
    scripts.run(
      GRM, workdir, *GRM_FLAGS, f"--policy={policy()}", "--steps=1",
      "--teacher=tests.own_teacher:rewrite", "--packed_length=192",
      "--preflight=strict",
    )  # fmt: skip
    rows = scripts.rows(workdir / "teacher", "rewrites.jsonl")
    wrong = [row for row in rows if not row["is_right"]]
    self.assertTrue(all(row["rewrite"] == row["gold"] for row in wrong))

  @pytest.mark.slow
  def test_gold_as_a_teacher(self):
    workdir = scripts.scratch() / "gold_teacher"
    flags = (*GRM_FLAGS, f"--policy={policy()}", "--steps=1", "--teacher=gold")
    self.assertEqual(scripts.drive(GRM, [(workdir, *flags)]), [None])
    rows = scripts.rows(workdir / "teacher", "rewrites.jsonl")
    self.assertTrue(all(row["is_verified"] for row in rows))

  @pytest.mark.slow
  def test_a_model_as_a_teacher(self):
    # It tells stories: that nothing of it is verified is part of the test.
    model = conftest.shared("data/models/stories260k")
    workdir = scripts.scratch() / "model_teacher"
    flags = (
      *GRM_FLAGS, f"--policy={policy()}", "--steps=1", "--teacher=model",
      f"--teacher_model={model}", "--teacher_format=plain",
      "--teacher_length=8",
    )  # fmt: skip
    (error,) = scripts.drive(GRM, [(workdir, *flags)])
    self.assertIn("There are 0 records to learn from", error)
    rows = scripts.rows(workdir / "teacher", "rewrites.jsonl")
    wrong = [row for row in rows if not row["is_right"]]
    self.assertFalse(any(row["is_verified"] for row in wrong))
    asked = scripts.rows(workdir / "teacher", "locations.jsonl")
    self.assertLen(asked, len(wrong))
    self.assertIn("Prediction, step by step:\n[0] ", asked[0]["prompt"])


class PipelineTest(parameterized.TestCase):
  def test_supervision(self):
    rows = scripts.rows(whole() / "supervision", "supervision.jsonl")
    facts = done(whole(), "supervision")
    wrong = [row for row in rows if not row["is_right"]]
    self.assertLen(wrong, facts["wrong"])
    self.assertGreater(len(wrong), 5)
    for row in rows:
      n = len(row["response_ids"])
      for name in ("probs", "ref_log_probs", "dropped"):
        self.assertLen(row[name], n)
      self.assertLen(row["rewrite_edited"], len(row["rewrite_ids"]))
      if row["is_right"]:
        self.assertEqual(row["rewrite_ids"], row["response_ids"])
        self.assertFalse(any(row["dropped"]))
    # A reward model that knows its records by heart goes along with a sample up
    # to the first token that it would change, and no further.
    _, stages = trained()
    known = {
      row["prompt"]
      for row in scripts.rows(stages / "records", "held_out.jsonl")
    }
    is_sharp = []
    for row in wrong:
      if any(row["prompt"] in prompt for prompt in known):
        continue
      first = row["dropped"].index(True) if any(row["dropped"]) else None
      if first is not None:
        before = min(row["probs"][:first], default=1.0)
        is_sharp.append(before > 0.9 and row["probs"][first] < 0.1)
    self.assertGreater(np.mean(is_sharp), 0.7)
    summary = json.loads((whole() / "summary.json").read_text())
    blame = lambda name: summary[f"blamed tokens, own rewrites: {name}"]
    self.assertGreater(blame("precision"), blame("chance") + 0.2)
    # Flags thrown at random would hit this share of the edited tokens.
    self.assertGreater(blame("recall"), blame("flagged") + 0.2)

  def test_files_for_other_methods(self):
    folder = whole() / "supervision"
    rows = scripts.rows(folder, "supervision.jsonl")
    right = scripts.rows(folder, "right.jsonl")
    pairs = scripts.rows(folder, "pairs.jsonl")
    self.assertLen(right, sum(row["is_right"] for row in rows))
    wrong = [row for row in rows if not row["is_right"]]
    self.assertEqual(
      pairs,
      [
        {
          "prompt": row["prompt"],
          "chosen": row["rewrite"],
          "rejected": row["response"],
        }
        for row in wrong
      ],
    )
    gold = scripts.rows(folder, "gold.jsonl")
    self.assertEqual(
      {row["prompt"]: row["response"] for row in gold},
      {
        row["prompt"]: row["gold"]
        for row in scripts.rows(whole() / "rewrites", "rewrites.jsonl")
      },
    )

  def test_training_starts_at_the_policy_and_is_written_down(self):
    rows = scripts.rows(whole())
    self.assertLen(rows, 7)
    self.assertAlmostEqual(rows[0]["token/ratio_mean"], 1.0, places=4)
    self.assertGreater(abs(rows[5]["token/ratio_mean"] - 1), 1e-4)
    self.assertIn("eval/is_correct", rows[6])
    page = (whole() / "tokens.html").read_text()
    self.assertIn("which tokens are blamed", page)
    row = scripts.rows(whole() / "supervision", "supervision.jsonl")[0]
    self.assertIn(row["prompt"], page)

  @parameterized.parameters(
    ("samples/samples.jsonl", 16),
    ("rewrites/locations.jsonl", 8),
    ("rewrites/rewritings.jsonl", 8),
    ("metrics.jsonl", 3),
  )
  def test_killed_and_resumed_is_the_same(self, name, num_rows):
    workdir = scripts.scratch() / f"killed_{pathlib.Path(name).stem}"
    flags = rlmec_flags(stages=workdir)
    scripts.run_until_killed(
      RLMEC, workdir, *flags, num_rows=num_rows, name=name
    )
    scripts.run(RLMEC, workdir, *flags)
    self.assertEqual(scripts.fingerprint(workdir), scripts.fingerprint(whole()))
    for file in ("rewrites/rewrites.jsonl", "supervision/supervision.jsonl"):
      self.assertEqual(
        (workdir / file).read_text(), (whole() / file).read_text()
      )
    self.assertEqual(
      scripts.steady(scripts.rows(workdir)),
      scripts.steady(scripts.rows(whole())),
    )

  def test_a_signal_between_batches_ends_well(self):
    workdir = scripts.scratch() / "signalled"
    flags = rlmec_flags(stages=workdir)
    process = subprocess.Popen(
      [sys.executable, RLMEC, *scripts.arguments(workdir, *flags)],
      cwd=conftest.REPOSITORY,
      env=scripts.environment(),
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL,
      text=True,
    )
    name = "rewrites/locations.jsonl"
    scripts.wait_for_rows(process, workdir, 8, name)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=300)
    self.assertEqual(process.returncode, 130)
    self.assertIn("Stopped by a signal; everything so far is saved.", said)
    self.assertFalse((workdir / "rewrites" / "done.json").exists())
    self.assertFalse((workdir / "flags.json").exists())
    scripts.run(RLMEC, workdir, *flags)
    self.assertEqual(scripts.fingerprint(workdir), scripts.fingerprint(whole()))

  def test_arms_share_stages_and_redo_what_changed(self):
    stages = scripts.scratch() / "shared"
    arms = scripts.scratch() / "arms"
    flags = rlmec_flags(stages=stages)
    variants = (
      ("full",),
      ("no_rewards", "--token_rewards=none"),
      ("no_imitation", "--imitation_coef=0", "--rl_mode=ppo"),
      ("oracle", "--token_rewards=alignment", "--imitate=gold"),
      (
        *("sequence", "--token_rewards=sequence", "--edited_weight=0.5"),
        "--keep_best",
      ),
      ("reference", "--alignment=reference"),
    )
    runs = [(arms / name, *flags, *more) for name, *more in variants]
    self.assertEqual(scripts.drive(RLMEC, runs[:1]), [None])
    before = {
      name: done(stages, name)
      for name in ("samples", "rewrites", "supervision")
    }
    self.assertEqual(scripts.drive(RLMEC, runs[1:]), [None] * 5)
    for name in ("samples", "rewrites"):
      self.assertEqual(done(stages, name), before[name])
    self.assertEqual(done(stages, "supervision.old1"), before["supervision"])
    # Nothing beat the start: the last parameters are the best.
    self.assertEqual(
      scripts.fingerprint(arms / "sequence" / "best"),
      scripts.fingerprint(arms / "sequence"),
    )
    prints = {scripts.fingerprint(run[0]) for run in runs[:5]}
    self.assertLen(prints, 5)
    metrics = {run[0].name: scripts.rows(run[0])[0] for run in runs}
    self.assertNotIn("token/loss", metrics["no_rewards"])
    self.assertNotIn("imitation/loss", metrics["no_imitation"])
    # One reward for every token of the sequence, right or wrong.
    self.assertAlmostEqual(
      metrics["sequence"]["token/positive_fraction"]
      + metrics["sequence"]["token/negative_fraction"],
      1.0,
      places=5,
    )

  def test_micro_batches_and_devices_change_nothing_but_rounding(self):
    flags = rlmec_flags()
    base = scripts.scratch() / "layouts"
    one, parts, mesh = base / "one", base / "parts", base / "mesh"
    scripts.run(RLMEC, one, *flags)
    # The samples are those that the reward model was made of.
    _, stages = trained()
    self.assertFalse((stages / "samples.old1").exists())
    scripts.run(RLMEC, parts, *flags, "--micro_batch_size=1")
    scripts.run(RLMEC, mesh, *flags, "--mesh=data:2,fsdp:2", devices=4)
    # Parts without a reward have no ratio, and do not count in the mean.
    self.assertAlmostEqual(
      scripts.rows(parts)[0]["token/ratio_mean"], 1.0, places=4
    )
    for other in (parts, mesh):
      self.assertLess(scripts.largest_gap(one, other), 5 * scripts.ROUNDING)
      for a, b in zip(scripts.rows(one), scripts.rows(other), strict=True):
        for name in ("token/loss", "imitation/loss", "token/count"):
          if name in a:
            np.testing.assert_allclose(a[name], b[name], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
class MergeSumsTest(absltest.TestCase):
  def test_the_task_of_the_other_papers(self):
    base = scripts.scratch() / "merge_sums"
    task = ("--task=merge_sums", "--task_options=num_terms=3,max_term=9")
    scripts.run(
      SFT, base / "policy", "--task=merge_sums",
      "--task_options=num_terms=3,max_term=9,corpus=pretraining",
      "--tokenizer=character", "--num_examples=128", "--num_eval_prompts=16",
      "--steps=80", "--batch_size=32", "--hidden_size=32", "--num_layers=1",
      "--learning_rate=5e-3",
      optimize=True,
    )  # fmt: skip
    flags = (
      *task, "--num_prompts=10", "--num_samples=2", "--sample_batch_size=5",
      "--max_length=16", f"--policy={base / 'policy'}",
      f"--stages={base / 'stages'}",
    )  # fmt: skip
    scripts.run(
      GRM, base / "grm", *flags, "--num_held_out=1", "--batch_size=16",
      "--template=lines", "--steps=150", "--learning_rate=5e-3",
      optimize=True,
    )  # fmt: skip
    scripts.run(
      RLMEC, base / "rlmec", *flags, f"--reward_model={base / 'grm'}",
      "--num_eval_prompts=5", "--steps=2", "--batch_size=4", "--max_right=1",
    )  # fmt: skip
    rows = scripts.rows(base / "stages" / "supervision", "supervision.jsonl")
    self.assertNotEmpty(rows)
    for row in rows:
      _, parts = merge_sums.score(row["prompt"], row["rewrite"])
      self.assertTrue(parts["is_correct"])


class PlantedFaultsTest(absltest.TestCase):
  """See planted_faults_test.py, which has the other scripts."""

  def test_refused(self):
    ends = '{0} & (batch["{1}_ids"] != tokenizer.eos_token_id)'
    faults = [
      (RLMEC, "temperature=1.0", "temperature=0.7", "starts as its reference"),
      (RLMEC, "adds_up=True, ", "", "micro-batches equal one batch"),
      *(
        (
          *(RLMEC, f'batch["{text}_mask"],'),
          ends.format(f'batch["{text}_mask"]', text) + ",",
          f"the mask of a {text} decides about its end",
        )
        for text in ("response", "imitated")
      ),
      (
        *(GRM, 'statistics.log_probs, batch["response_mask"])'),
        "statistics.log_probs, "
        + ends.format('batch["response_mask"]', "response")
        + ")",
        "the mask of a response decides about its end",
      ),
    ]
    workdir = scripts.scratch() / "fault"
    given = {
      RLMEC: rlmec_flags("--micro_batch_size=4"),
      GRM: (*GRM_FLAGS, f"--policy={policy()}", f"--stages={trained()[1]}"),
    }
    errors = scripts.drive(
      "-",
      [
        {
          "script": script,
          "flags": (f"{workdir}{i}", *given[script]),
          "replace": [(old, new)],
        }
        for i, (script, old, new, _) in enumerate(faults)
      ],
    )
    for error, (*_, name) in zip(errors, faults, strict=True):
      self.assertRegex(error or "", f"Refused: .*{name}")


class ErrorsTest(absltest.TestCase):
  def test_flags_are_checked_before_anything_is_drawn(self):
    workdir = scripts.scratch() / "errors"
    flags = rlmec_flags(stages=workdir / "stages")
    cases = (
      (("--steps=-1",), "--steps=-1: -1 is not a non-negative integer"),
      (("--epochs=0", "--steps=0"), "--epochs=0: 0.0 is not number >= 1e-06"),
      (("--warmup=-1",), "--warmup=-1: -1.0 is not a non-negative number"),
      (("--token_rewards=none", "--imitation_coef=0"), "nothing to learn"),
      (("--threshold=1.5",), "1.5 is not a number in the range [0.0, 1.0]"),
      (("--clip_epsilon=0",), "--clip_epsilon=0: 0.0 is not number >= 1e-06"),
      (("--max_penalty=-0.1",), "-0.1 is not a non-negative number"),
      (("--edited_weight=0", "--kept_weight=0"), "nothing to imitate"),
      (("--template=instruction",), "--template=instruction has characters"),
      (("--micro_batch_size=3",), "--micro_batch_size=3 does not divide"),
      (("--reward_model=" + str(policy()),), "give --template"),
      (("--task=sentiment",), "has no option 'num_steps'"),
      (("--batch_size=64", "--micro_batch_size=0"), "is more than the"),
    )
    errors = scripts.drive(
      RLMEC,
      [(workdir / str(i), *flags, *case[0]) for i, case in enumerate(cases)],
    )
    for (case, text), error in zip(cases, errors, strict=True):
      self.assertIn(text, error or "no error", case)

  def test_reward_model_flags(self):
    workdir = scripts.scratch() / "grm_errors"
    flags = (*GRM_FLAGS, f"--policy={policy()}")
    cases = (
      (("--epochs=0",), "--epochs=0: 0.0 is not number >= 1e-06"),
      (("--num_held_out=20",), "--num_held_out=20 must be fewer than the 20"),
      (("--num_teacher_prompts=30",), "no more than --num_prompts=20"),
      (("--teacher=model",), "--teacher=model and --teacher_model=''"),
      (("--template=lines",), "--template=lines has characters that"),
      (("--teacher=nobody:rewrite",), "can be imported"),
      (("--teacher=json:rewrite",), "can be imported"),
      (
        (
          "--task=word_lists",
          "--task_options=",
        ),
        "cannot repair solutions",
      ),
      (("--max_positions=32", "--steps=1"), "a longer context"),
      (("--batch_size=640",), "records to learn from"),
    )
    errors = scripts.drive(
      GRM,
      [(workdir / str(i), *flags, *case[0]) for i, case in enumerate(cases)],
    )
    for (case, text), error in zip(cases, errors, strict=True):
      self.assertIn(text, error or "no error", case)

  def test_other_supervision_than_at_first_is_refused(self):
    workdir = scripts.scratch() / "other_supervision"
    flags = rlmec_flags(stages=workdir / "stages")
    scripts.run(RLMEC, workdir, *flags)
    path = workdir / "stages" / "samples" / "samples.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-2]))
    failed = scripts.run(RLMEC, workdir, *flags, ok=False)
    self.assertIn("rewrites: samples changed; it starts over", failed.stdout)
    self.assertIn(
      "The rows of supervision are others than when the run", failed.stderr
    )
    # The results of the first run lie aside.
    self.assertTrue((workdir / "stages" / "rewrites.old1").exists())


if __name__ == "__main__":
  absltest.main()
