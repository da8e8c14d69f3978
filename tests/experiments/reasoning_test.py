"""Expert iteration and return-conditioned RL, run as a user runs them."""

import functools
import json
import math
import shutil

import numpy as np
import pytest
from absl.testing import absltest

from rljax.generation import forced
from rljax.models import hf
from rljax.storage import checkpoint
from rljax.tasks import merge_sums
from rljax.text import steps
from tests import scripts

SFT = "experiments/sft.py"
EI = "experiments/expert_iteration.py"
RCRL = "experiments/return_conditioned.py"
ORM = "experiments/outcome_reward_model.py"

# One step, and two of them.
SHORT, LONG = "num_terms=2,max_term=9", "num_terms=3,max_term=5"
TASK = (
  "--task=merge_sums",
  "--num_prompts=16",
  "--num_eval_prompts=8",
  "--max_length=16",
  "--sample_batch_size=4",
  "--batch_size=16",
  "--learning_rate=3e-3",
  # As the numbers below were found.
  "--warmup=0",
)
TINY_EI = (
  *TASK,
  f"--task_options={SHORT}",
  "--example_options=slot=true",
  "--num_samples=6",
  "--rounds=2",
  "--epochs=2",
  "--save_every=1",
)
TINY_RCRL = (
  *TASK,
  f"--task_options={LONG}",
  "--num_solutions=8",
  "--num_completions=2",
  "--max_per_prompt=2",
  "--blank_slot",
  "--epochs=4",
  "--eval_every=3",
  "--save_every=1",
)


def setUpModule():
  scripts.without_pictures()


def tearDownModule():
  scripts.remove_scratch()


@functools.cache
def base_of(options=SHORT):
  """A model that knows the format, and some of the sums."""
  workdir = scripts.scratch() / f"base_{options[:11]}"
  scripts.run(
    SFT,
    workdir,
    "--task=merge_sums",
    f"--task_options={options},corpus=pretraining,slot=true,corruption=0.3",
    "--tokenizer=character",
    "--num_examples=2000",
    "--num_eval_prompts=16",
    "--hidden_size=32",
    "--num_layers=1",
    "--max_positions=48",
    "--batch_size=64",
    "--steps=150",
    "--eval_every=150",
    "--learning_rate=1e-2",
    "--weight_decay=0",
  )
  return workdir


@functools.cache
def policy_of(options=SHORT):
  """The base after another moment: not the same weights."""
  workdir = scripts.scratch() / f"policy_{options[:11]}"
  scripts.run(
    SFT,
    workdir,
    "--task=merge_sums",
    f"--task_options={options},slot=true",
    f"--policy={base_of(options)}",
    "--num_examples=16",
    "--num_eval_prompts=8",
    "--batch_size=16",
    "--steps=4",
    "--learning_rate=1e-3",
  )
  return workdir


def models(options=SHORT):
  return f"--policy={policy_of(options)}", f"--base={base_of(options)}"


@functools.cache
def _iterated():
  """A run of expert iteration that nothing interrupted."""
  workdir = scripts.scratch() / "ei"
  scripts.run(EI, workdir, *TINY_EI, *models())
  return workdir


@functools.cache
def _conditioned():
  workdir = scripts.scratch() / "rcrl"
  scripts.run(RCRL, workdir, *TINY_RCRL, *models(LONG))
  return workdir


def _round(workdir, number):
  return json.loads((workdir / f"rounds/{number}/round.json").read_text())


def _fingerprint_of_policy(workdir):
  return checkpoint.fingerprint(checkpoint.restore_params(workdir)["policy"])


class ExpertIterationTest(absltest.TestCase):
  def test_every_fit_starts_from_the_base_bit_for_bit(self):
    base = _fingerprint_of_policy(base_of())
    self.assertNotEqual(base, _fingerprint_of_policy(policy_of()))
    for number in (1, 2):
      self.assertEqual(_round(_iterated(), number)["fit/start"], base)
      # And ends elsewhere.
      folder = _iterated() / f"rounds/{number}"
      self.assertNotEqual(_fingerprint_of_policy(folder), base)

  @pytest.mark.slow
  def test_packed_rows_teach_the_same(self):
    plain, packed = (scripts.scratch() / f"ei_{x}" for x in ("plain", "packed"))
    # What is rounding in a gradient of 0 must not become a step.
    flags = [*TINY_EI, *models(), "--adam_epsilon=1e-4"]
    pack = ["--packed_length=64", "--micro_batch_size=8", "--preflight=strict"]
    errors = scripts.drive(EI, [[plain, *flags], [packed, *flags, *pack]])
    self.assertEqual(errors, [None, None])
    for number in (1, 2):
      gap = scripts.largest_gap(
        plain / f"rounds/{number}", packed / f"rounds/{number}"
      )
      self.assertLess(gap, scripts.ROUNDING)
      one, two = _round(plain, number), _round(packed, number)
      np.testing.assert_allclose(one["fit/loss"], two["fit/loss"], rtol=1e-4)
    # The rounds have more and more data, and rows that are packed anew.
    self.assertGreater(two["data/size"], _round(packed, 1)["data/size"])

  def test_without_restart_a_fit_starts_from_its_sampler(self):
    workdir = scripts.scratch() / "ei_continued"
    scripts.run(EI, workdir, *TINY_EI, *models(), "--norestart")
    for number, sampler in ((1, policy_of()), (2, workdir / "rounds/1")):
      self.assertEqual(
        _round(workdir, number)["fit/start"], _fingerprint_of_policy(sampler)
      )

  def test_data_is_the_union_of_distinct_right_samples(self):
    prompts = merge_sums.prompts("train", 0, num=16, num_terms=2, max_term=9)
    union = set()
    for number in (1, 2):
      folder = _iterated() / f"rounds/{number}"
      samples = scripts.rows(folder, "samples.jsonl")
      self.assertEqual(
        [row["prompt"] for row in samples], np.repeat(prompts, 6).tolist()
      )
      for row in samples:
        score, _ = merge_sums.score(row["prompt"], row["response"])
        self.assertEqual(row["reward"], score * row["finished"])
        if row["reward"]:
          key = steps.whitespace_key(row["response"])
          union.add((row["prompt"], key))
      kept = scripts.rows(folder, "data.jsonl")
      keys = [
        (row["prompt"], steps.whitespace_key(row["response"])) for row in kept
      ]
      self.assertLen(keys, len(set(keys)))
      self.assertEqual(set(keys), union)
      found = _round(_iterated(), number)
      self.assertEqual(found["data/size"], len(union))
      self.assertEqual(found["rollouts"], 96 * number)
      # Some were wrong, and some came twice: the filter had work to do.
      self.assertGreater(found["data/wrong"], 0)
      self.assertGreater(found["data/duplicate"], 0)
      self.assertAlmostEqual(
        found["samples/is_correct"], np.mean([r["reward"] for r in samples])
      )

  def test_it_learns(self):
    first, last = (_round(_iterated(), number) for number in (1, 2))
    self.assertGreater(last["samples/is_correct"], first["samples/is_correct"])

  def test_best_round_is_a_policy(self):
    scores = [_round(_iterated(), i)["eval/is_correct"] for i in range(3)]
    best = int(np.argmax(scores))
    folder = _iterated() / f"rounds/{best}" if best else policy_of()
    self.assertEqual(
      _fingerprint_of_policy(_iterated() / "best"),
      _fingerprint_of_policy(folder),
    )
    self.assertEqual(
      hf.load(str(_iterated() / "best")).model.config.num_layers, 1
    )

  @pytest.mark.slow
  def test_reward_model_as_a_filter(self):
    judge = scripts.scratch() / "judge"
    scripts.run(
      ORM,
      judge,
      "--loss=bce",
      f"--policy={base_of()}",
      f"--data={_iterated() / 'rounds/1/samples.jsonl'}",
      "--eval_share=0.3",
      "--steps=3",
      "--batch_size=2",
    )
    flags = (
      *TINY_EI,
      *models(),
      "--rounds=1",
      f"--reward_model={judge}",
      "--reward_length=32",
    )
    # Everything reaches 0: what is right is left.
    workdir = scripts.scratch() / "ei_both"
    scripts.run(EI, workdir, *flags, "--filter=both", "--reward_threshold=0")
    self.assertEqual(
      (workdir / "rounds/1/data.jsonl").read_bytes(),
      (_iterated() / "rounds/1/data.jsonl").read_bytes(),
    )
    # Nothing is above 1, and what was drawn is not lost.
    workdir = scripts.scratch() / "ei_nothing"
    done = scripts.run(
      EI,
      workdir,
      *flags,
      "--filter=reward_model",
      "--reward_threshold=1.1",
      ok=False,
    )
    self.assertIn("No sample of round 1 was kept, of 96", done.stderr)
    self.assertLen(scripts.rows(workdir / "rounds/1", "samples.jsonl"), 96)

  def _resumed_like_uninterrupted(self, workdir):
    scripts.run(EI, workdir, *TINY_EI, *models())
    for name in ("rounds/1", "rounds/2", "best"):
      self.assertEqual(
        scripts.fingerprint(workdir / name),
        scripts.fingerprint(_iterated() / name),
      )
    for name in ("rounds/1/samples.jsonl", "rounds/2/data.jsonl"):
      self.assertEqual(
        (workdir / name).read_bytes(), (_iterated() / name).read_bytes()
      )
    self.assertEqual(
      scripts.steady(scripts.rows(workdir)),
      scripts.steady(scripts.rows(_iterated())),
    )

  def test_killed_while_sampling(self):
    _iterated()
    workdir = scripts.scratch() / "ei_killed"
    scripts.run_until_killed(
      EI,
      workdir,
      *TINY_EI,
      *models(),
      num_rows=24,
      name="rounds/2/samples.jsonl",
    )
    drawn = (workdir / "rounds/2/samples.jsonl").read_bytes()
    started = (workdir / "rounds/1/round.json").stat().st_mtime_ns
    self._resumed_like_uninterrupted(workdir)
    # What was finished is not repeated.
    self.assertEqual(
      (workdir / "rounds/1/round.json").stat().st_mtime_ns, started
    )
    whole = (workdir / "rounds/2/samples.jsonl").read_bytes()
    self.assertStartsWith(whole.decode(), drawn.decode())

  def test_killed_while_fitting(self):
    workdir = scripts.scratch() / "ei_killed_2"
    shutil.copytree(_iterated(), workdir)
    shutil.rmtree(workdir / "best")
    (workdir / "rounds/2/round.json").unlink()
    last = max((workdir / "rounds/2/checkpoints").iterdir())
    self.assertGreater(int(last.name), 1)
    # As if the second update had not been saved: there is one checkpoint only.
    shutil.rmtree(last)
    self._resumed_like_uninterrupted(workdir)

  def test_bad_input(self):
    workdir = scripts.scratch() / "bad"
    cases = (
      ("reward model is named exactly where", "--filter=both"),
      ("reward model is named exactly where", "--reward_model=x"),
      ("give --stop_strings", "--shots=2"),
      ("--warmup=-1", "--warmup=-1"),
      ("--rounds=0", "--rounds=0"),
      ("has no option 'slot'", f"--task_options={SHORT},slot=true"),
      ("no option 'slots'", "--example_options=slots=1", "--num_examples=2"),
    )
    errors = scripts.drive(
      EI,
      [(workdir, *TINY_EI, *models(), *flags) for _, *flags in cases],
    )
    for (message, *_), error in zip(cases, errors, strict=True):
      self.assertIn(message, str(error))
    self.assertFalse((workdir / "rounds").exists())


class LearningTest(absltest.TestCase):
  @pytest.mark.slow
  def test_one_round_after_a_hundred_traces(self):
    """The end-to-end check of the specification: two minutes or so."""
    options = "num_terms=3,max_term=9"
    base, sft, workdir = (
      scripts.scratch() / name for name in ("learn_base", "learn_sft", "learn")
    )
    task = ("--task=merge_sums", "--weight_decay=0", "--eval_every=1000")
    scripts.run(
      SFT,
      base,
      *task,
      f"--task_options={options},corpus=pretraining,slot=true",
      "--tokenizer=character",
      "--num_examples=20000",
      "--hidden_size=64",
      "--num_layers=3",
      "--batch_size=96",
      "--steps=300",
      "--learning_rate=2e-3",
      "--warmup=30",
      optimize=True,
    )
    scripts.run(
      SFT,
      sft,
      *task,
      f"--task_options={options},slot=true",
      f"--policy={base}",
      "--num_examples=100",
      "--num_eval_prompts=50",
      "--steps=13",
      "--batch_size=64",
      optimize=True,
    )
    scripts.run(
      EI,
      workdir,
      "--task=merge_sums",
      f"--task_options={options}",
      "--example_options=slot=true",
      "--num_examples=100",
      f"--policy={sft}",
      f"--base={base}",
      "--num_prompts=100",
      "--num_eval_prompts=80",
      "--num_samples=8",
      "--max_length=16",
      "--rounds=2",
      optimize=True,
    )
    before, first, last = (_round(workdir, number) for number in range(3))
    self.assertGreater(first["eval/is_correct"], before["eval/is_correct"])
    # What round 2 samples, round 1 has learnt.
    self.assertGreater(last["samples/is_correct"], first["samples/is_correct"])
    self.assertGreater(last["samples/solved"], first["samples/solved"])


class ReturnConditionedTest(absltest.TestCase):
  def test_labels_are_the_completions(self):
    folder = _conditioned() / "completions"
    right = {}
    for path in folder.iterdir():
      for row in scripts.rows(folder, path.name):
        right.setdefault(row["prompt"], []).append(row["reward"])
        prompt, equals, prefix = row["prompt"].partition("=")
        score, _ = merge_sums.score(prompt + equals, prefix + row["response"])
        self.assertEqual(row["reward"], score * row["finished"])
    labelled = scripts.rows(_conditioned(), "labels.jsonl")
    kinds = {row["is_correct"] for row in labelled}
    self.assertEqual(kinds, {True, False})
    num_inner = 0
    for row in labelled:
      self.assertEqual("".join(row["steps"]), row["response"])
      self.assertEqual(row["values"][-1], float(row["is_correct"]))
      for prefix, value in zip(
        steps.prefixes(row["response"]), row["values"][:-1], strict=True
      ):
        completions = right[row["prompt"] + prefix]
        self.assertLen(completions, 2)
        self.assertEqual(value, np.mean(completions))
        num_inner += 1
    self.assertGreater(num_inner, 0)

  def test_training_rows(self):
    rows = scripts.rows(_conditioned(), "data.jsonl")
    right = [row["is_correct"] for row in rows]
    self.assertEqual(sum(right), len(rows) - sum(right))
    tokens = 0
    for row in rows:
      self.assertEqual(row["good"], [value >= 0.5 for value in row["values"]])
      for (tag, text), is_good in zip(row["tagged"], row["good"], strict=True):
        self.assertEqual(tag, "G" if is_good else "B")
        self.assertNotStartsWith(text, " ")
        tokens += len(text)
      tokens += 1  # The end token.
    # Characters are tokens. Of each update all but the tags are learnt.
    metrics = [
      row for row in scripts.rows(_conditioned()) if "nll/tokens" in row
    ]
    self.assertLen(metrics, math.ceil(4 * len(rows) / min(16, len(rows))))
    if len(rows) <= 16:
      self.assertEqual({row["nll/tokens"] for row in metrics}, {tokens})
    else:
      learnt = sum(row["nll/tokens"] for row in metrics)
      passes = len(metrics) * 16 / len(rows)
      self.assertAlmostEqual(learnt / tokens, passes, delta=0.3)

  def test_policy_brings_its_tags(self):
    loaded = hf.load(str(_conditioned()))
    found = forced.load(_conditioned())
    ids = loaded.tokenizer.convert_tokens_to_ids(["G", "\n", " "])
    self.assertEqual(found["forced"][-1], ids[0])
    self.assertEqual(found["forced"][ids[1]], ids[0])
    self.assertEqual((found["forced"] >= 0).sum(), 2)
    self.assertEqual(found["forced_as"], ids[2])

  def test_labels_of_another_run(self):
    workdir = scripts.scratch() / "rcrl_labels"
    scripts.run(
      RCRL,
      workdir,
      *TINY_RCRL,
      *models(LONG),
      f"--labels={_conditioned() / 'labels.jsonl'}",
    )
    self.assertFalse((workdir / "solutions.jsonl").exists())
    self.assertEqual(
      scripts.fingerprint(workdir), scripts.fingerprint(_conditioned())
    )

  def test_packed_rows(self):
    workdir = scripts.scratch() / "rcrl_packed"
    scripts.run(
      RCRL,
      workdir,
      *(*TINY_RCRL, *models(LONG), "--packed_length=96"),
      *(f"--labels={_conditioned() / 'labels.jsonl'}", "--preflight=strict"),
    )
    one, two = (scripts.rows(x)[-2] for x in (workdir, _conditioned()))
    self.assertAlmostEqual(one["nll/loss"], two["nll/loss"], delta=1e-3)

  @pytest.mark.slow
  def test_killed_at_every_stage(self):
    whole = _conditioned()
    for name, num_rows in (
      ("solutions.jsonl", 8),
      (f"completions/{min((whole / 'completions').iterdir()).name}", 2),
      ("metrics.jsonl", 1),
    ):
      workdir = scripts.scratch() / f"rcrl_{num_rows}"
      scripts.run_until_killed(
        RCRL, workdir, *TINY_RCRL, *models(LONG), num_rows=num_rows, name=name
      )
      scripts.run(RCRL, workdir, *TINY_RCRL, *models(LONG))
      self.assertEqual(scripts.fingerprint(workdir), scripts.fingerprint(whole))
      self.assertEqual(
        (workdir / "labels.jsonl").read_bytes(),
        (whole / "labels.jsonl").read_bytes(),
      )

  def test_bad_input(self):
    workdir = scripts.scratch() / "bad_rcrl"
    cases = (
      ("must be one", "--good_tag=GG"),
      ("must differ", "--good_tag=B"),
      ("--threshold=2", "--threshold=2"),
      ("--learning_rate=-1", "--learning_rate=-1"),
      ("the model has 48 positions", "--max_length=40"),
    )
    errors = scripts.drive(
      RCRL,
      [(workdir, *TINY_RCRL, *models(LONG), *flags) for _, *flags in cases],
    )
    for (message, *_), error in zip(cases, errors, strict=True):
      self.assertIn(message, str(error))
    self.assertFalse((workdir / "solutions.jsonl").exists())

  def test_other_weights_under_the_same_name(self):
    workdir, policy = (
      scripts.scratch() / name for name in ("rcrl_other", "policy_other")
    )
    shutil.copytree(_conditioned(), workdir)
    shutil.copytree(base_of(LONG), policy)
    flags = json.loads((workdir / "flags.json").read_text())
    flags["policy"] = str(policy)
    (workdir / "flags.json").write_text(json.dumps(flags))
    base = f"--base={base_of(LONG)}"
    done = scripts.run(
      RCRL, workdir, *TINY_RCRL, f"--policy={policy}", base, ok=False
    )
    self.assertIn("--policy holds other weights", done.stderr)


if __name__ == "__main__":
  absltest.main()
