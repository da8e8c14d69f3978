"""--packed_length and --stream, in scripts that are run as a user runs them."""

import functools
import shutil

import numpy as np
import pytest
from absl.testing import absltest, parameterized

from rljax.tasks import word_lists
from rljax.text import files
from tests import scripts

SFT = "experiments/sft.py"
PREFERENCE = "experiments/preference.py"
REWARD_MODEL = "experiments/outcome_reward_model.py"
SHAPE = (
  *("--batch_size=8", "--steps=4", "--save_every=2", "--eval_every=100"),
  # What is rounding in a gradient of 0 must not become a step.
  *("--learning_rate=1e-3", "--adam_epsilon=1e-4"),
)
DATA = (
  *("--task=word_lists", "--task_options=num=32"),
  *("--max_prompt_length=8", "--max_response_length=12"),
)
LOG = (*DATA, *SHAPE, "--num_dev_prompts=8", "--sample_batch_size=8")
# One micro-batch and two; the devices share the rows.
PACKED = ("--packed_length=48", "--mesh=data:2", "--micro_batch_size=4")
RUNS = {
  "sft": (SFT, "--policy={}", "--task=word_lists", *SHAPE),
  "r_lol": (
    *("experiments/offline.py", "--policy={}", "--algorithm=r_lol", *LOG),
    "--scale_steps=false",
  ),
  "dpo": ("experiments/preference.py", "--policy={}", *LOG),
  "kto": (
    *("experiments/preference.py", "--policy={}", "--algorithm=kto"),
    *("--undesirable_weight=0.01", *LOG),
  ),
  "pairwise": (
    *("experiments/outcome_reward_model.py", "--policy={}", *DATA, *SHAPE),
    "--num_eval_rows=16",
  ),
}


def setUpModule():
  scripts.without_pictures()


def tearDownModule():
  scripts.remove_scratch()


@functools.cache
def _policy():
  workdir = scripts.scratch() / "policy"
  scripts.run(
    *(SFT, workdir, "--task=word_lists", "--steps=10", "--num_layers=1"),
    *("--hidden_size=32", "--max_positions=32", "--learning_rate=3e-3"),
    "--num_eval_prompts=16",
  )
  return workdir


@functools.cache
def _runs(name):
  """Folders of the run without packing, and with it, whose checks passed."""
  script, *flags = RUNS[name]
  flags = [flag.format(_policy()) for flag in flags]
  plain, packed = (scripts.scratch() / f"{name}-{x}" for x in ("plain", "rows"))
  errors = scripts.drive(
    script,
    [
      [plain, *flags],
      [packed, *flags, *PACKED, "--preflight=strict"],
    ],
    devices=2,
  )
  assert errors == [None, None], errors
  return plain, packed


def _check_same(case, name):
  plain, packed = _runs(name)
  case.assertLess(scripts.largest_gap(plain, packed), scripts.ROUNDING)
  losses = [
    [x for row in scripts.rows(run) for k, x in row.items() if "loss" in k]
    for run in (plain, packed)
  ]
  np.testing.assert_allclose(*losses, rtol=1e-4, atol=1e-5)
  case.assertGreater(np.ptp(losses[0]), 1e-4)  # Something is learnt.


@pytest.mark.slow
class OthersTest(parameterized.TestCase):
  @parameterized.parameters(*sorted(RUNS.keys() - {"sft", "dpo"}))
  def test_learns_the_same(self, name):
    _check_same(self, name)


class PackedLengthTest(parameterized.TestCase):
  @parameterized.parameters("sft", "dpo")
  def test_learns_the_same(self, name):
    _check_same(self, name)

  def test_goes_on_bit_for_bit(self):
    _, packed = _runs("sft")
    again = scripts.scratch() / "again"
    shutil.copytree(packed, again)
    shutil.rmtree(again / "checkpoints" / "4")
    script, *flags = RUNS["sft"]
    flags = [flag.format(_policy()) for flag in flags]
    run = [again, *flags, *PACKED, "--preflight=strict"]
    self.assertEqual(scripts.drive(script, [run], devices=2), [None])
    self.assertEqual(scripts.fingerprint(packed), scripts.fingerprint(again))

  def test_rows_that_are_too_short(self):
    script, *flags = RUNS["sft"]
    flags = [flag.format(_policy()) for flag in flags]
    (error,) = scripts.drive(
      script, [[scripts.scratch() / "short", *flags, "--packed_length=4"]]
    )
    self.assertRegex(error, "--packed_length=4 is less than the [0-9]+ tokens")


def _write(path, num):
  pairs = word_lists.supervised("train", 0, num=num)
  files.write_jsonl(path, [{"prompt": p, "response": r} for p, r in pairs])


@functools.cache
def _pairs():
  """Files of eight pairs and four, and of six replies with labels and eight."""
  rows = [
    {"prompt": row["prompt"], "chosen": good, "rejected": bad}
    for row in word_lists.logged("train", 1, num=15)
    for good, bad in [row["candidates"][:2]]
  ]
  labels = lambda some: [
    {"prompt": row["prompt"], "completion": row[side], "label": is_good}
    for row in some
    for side, is_good in (("chosen", True), ("rejected", False))
  ]
  found = []
  for name, some in (
    ("pairs", rows[:8]),
    ("others", rows[8:12]),
    ("labels", labels(rows[12:])),
    ("other_labels", labels(rows[8:12])),
  ):
    found.append(scripts.scratch() / f"{name}.jsonl")
    files.write_jsonl(found[-1], some)
  return found


def _kto():
  """Flags of a stream of labelled replies."""
  _, _, labels, held_out = _pairs()
  return [
    *("--algorithm=kto", "--batch_size=4", f"--data={labels}"),
    f"--eval_data={held_out}",
  ]


def _stream_flags():
  """Flags of eight pairs, all of which are in every batch, and of a stream."""
  pairs, other, *_ = _pairs()
  flags = [
    *(f"--policy={_policy()}", f"--data={pairs}", f"--eval_data={other}"),
    *("--max_prompt_length=12", "--max_response_length=20", *SHAPE),
    *("--eval_every=2", "--steps=4"),
  ]
  return flags, [*flags, "--stream", "--stream_buffer=8"]


def _check_stream(case, script, *others, checks="off"):
  """The pairs of a stream teach what they teach in memory."""
  flags, stream = _stream_flags()
  plain, whole, kto = (
    scripts.scratch() / f"{name}-{script[12:16]}-{checks}"
    for name in ("plain", "whole", "kto")
  )
  runs = [[plain, *flags], [whole, *stream, f"--preflight={checks}"]]
  runs += [[kto, *stream, *more] for more in others]
  case.assertEqual(scripts.drive(script, runs), [None] * len(runs))
  # The order of rows is rounding.
  case.assertLess(scripts.largest_gap(plain, whole), scripts.ROUNDING)
  one, two = scripts.rows(plain), scripts.rows(whole)
  for name in ("eval/loss", "eval/accuracy"):
    found = [[r[name] for r in x if name in r] for x in (one, two)]
    case.assertLen(found[0], 3)
    if name == "eval/accuracy":  # All margins of the first are rounding.
      found = [values[1:] for values in found]
    np.testing.assert_allclose(*found, atol=1e-4)
  case.assertEqual(two[-2]["data/epoch"], 3)
  if others:
    losses = [r["eval/loss"] for r in scripts.rows(kto) if "eval/loss" in r]
    case.assertAlmostEqual(losses[0], 0.5, places=4)
    case.assertNotEqual(losses[-1], losses[0])
  return whole


def _check_again(case, script, whole):
  """A run that is stopped goes on to the bit."""
  again = whole.with_name(f"again-{whole.name}")
  shutil.copytree(whole, again)
  shutil.rmtree(again / "checkpoints" / "4")
  run = [again, *_stream_flags()[1], "--preflight=strict"]
  case.assertEqual(scripts.drive(script, [run]), [None])
  case.assertEqual(scripts.fingerprint(whole), scripts.fingerprint(again))


@pytest.mark.slow
class CheckedStreamTest(absltest.TestCase):
  def test_dpo_and_kto(self):
    whole = _check_stream(self, PREFERENCE, _kto(), checks="strict")
    _check_again(self, PREFERENCE, whole)

  def test_reward_model(self):
    whole = _check_stream(self, REWARD_MODEL, checks="strict")
    _check_again(self, REWARD_MODEL, whole)


class StreamTest(parameterized.TestCase):
  def test_goes_on_bit_for_bit(self):
    path = scripts.scratch() / "rows.jsonl"
    _write(path, 60)
    flags = [
      *(f"--policy={_policy()}", f"--data={path}", "--stream"),
      *("--stream_buffer=16", "--num_eval_prompts=8", "--eval_share=0.2"),
      *("--max_prompt_length=12", "--max_response_length=20", *SHAPE),
      *("--too_long=skip", "--packed_length=32", "--preflight=strict"),
      *("--steps=10", "--save_every=4"),
    ]
    whole, again = (scripts.scratch() / f"stream-{i}" for i in range(2))
    apart = [scripts.scratch() / "apart", *flags, "--packed_length=0"]
    apart += ["--steps=2", "--preflight=off"]
    self.assertEqual(scripts.drive(SFT, [[whole, *flags], apart]), [None, None])
    shutil.copytree(whole, again)
    shutil.rmtree(again / "checkpoints" / "10")
    self.assertEqual(scripts.drive(SFT, [[again, *flags]]), [None])
    self.assertEqual(scripts.fingerprint(whole), scripts.fingerprint(again))
    one, two = (scripts.rows(folder)[-4:] for folder in (whole, again))
    self.assertEqual(scripts.steady(one), scripts.steady(two))
    self.assertGreaterEqual(one[-2]["data/epoch"], 1)

  def test_comparisons(self):
    _check_stream(self, PREFERENCE)

  def test_what_needs_the_whole_log(self):
    pairs, other, labels, held_out = _pairs()
    kto = ["--algorithm=kto", f"--data={labels}", f"--eval_data={held_out}"]
    for script, cases in (
      (
        PREFERENCE,
        [
          (["--algorithm=pro"], "--algorithm=pro ranks as many"),
          (["--cache=x"], "--cache .*--stream and --cache"),
          (["--packed_length=40"], "--stream and --packed_length"),
          ([f"--data={labels}"], "rows of .* can be used: .*compare"),
          ([*kto, "--kto_threshold=-1"], "6 replies 6 are good ones"),
        ],
      ),
      (REWARD_MODEL, [(["--loss=bce"], "--loss=bce .* leave out --stream")]),
    ):
      runs = [
        [
          *(scripts.scratch() / "bad", f"--policy={_policy()}", "--stream"),
          *(f"--data={pairs}", f"--eval_data={other}", *flags),
        ]
        for flags, _ in cases
      ]
      for error, (_, words) in zip(
        scripts.drive(script, runs), cases, strict=True
      ):
        self.assertRegex(str(error), words)

  def test_bad_input(self):
    path = scripts.scratch() / "few.jsonl"
    _write(path, 40)
    cases = [
      (["--task=word_lists", "--stream"], "--stream reads a file"),
      (
        [f"--data={path}", "--stream", "--packed_length=9"],
        "must be 32 or more",
      ),
    ]
    runs = [
      [
        *(scripts.scratch() / f"bad-{i}", f"--policy={_policy()}", *flags),
        *("--max_prompt_length=12", "--max_response_length=20"),
      ]
      for i, (flags, _) in enumerate(cases)
    ]
    for error, (_, words) in zip(scripts.drive(SFT, runs), cases, strict=True):
      self.assertRegex(str(error), words)


if __name__ == "__main__":
  absltest.main()
