"""The scripts of offline RL, run as a user runs them, with tiny flags."""

import functools
import gzip
import json
import os
from unittest import mock

import jax
import numpy as np
from absl.testing import absltest, parameterized
from flax import traverse_util

from rljax.losses import offline
from rljax.models import hf
from rljax.scoring import cached
from rljax.storage import checkpoint
from rljax.tasks import word_lists
from rljax.text import files
from tests import scripts

SFT = "experiments/sft.py"
VALUE = "experiments/offline_value.py"
OFFLINE = "experiments/offline.py"
REWARD = "experiments/outcome_reward_model.py"
EVALUATE = "experiments/evaluate.py"

DATA = (
  "--task=word_lists",
  "--task_options=num=96",
  "--max_prompt_length=16",
  "--max_response_length=16",
)
TINY_VALUE = (
  *DATA,
  "--num_value_prompts=64",
  "--sample_batch_size=32",
  "--num_heads=4",
  "--epochs=3",
  "--learning_rate=1e-3",
)
TINY = (
  *DATA,
  "--num_dev_prompts=16",
  "--sample_batch_size=16",
  "--batch_size=8",
  "--steps=8",
  "--eval_every=4",
  "--save_every=3",
  "--learning_rate=1e-3",
  # As the numbers below were found.
  *("--schedule=constant", "--warmup=0", "--max_grad_norm=0.3"),
)
TINY_REWARD = (
  *DATA,
  "--num_eval_rows=40",
  "--batch_size=16",
  "--steps=6",
  "--eval_every=3",
  "--save_every=2",
  # As the numbers below were found.
  *("--learning_rate=1e-4", "--warmup=0"),
)


def setUpModule():
  scripts.without_pictures()


def tearDownModule():
  scripts.remove_scratch()


@functools.cache
def _policy():
  """A model that has seen the log for a moment."""
  workdir = scripts.scratch() / "policy"
  scripts.run(
    SFT,
    workdir,
    "--task=word_lists",
    "--num_examples=2000",
    "--num_eval_prompts=64",
    "--hidden_size=32",
    "--max_positions=32",
    "--batch_size=64",
    "--steps=150",
    "--eval_every=150",
    # As the numbers below were found.
    *("--learning_rate=5e-3", "--warmup=0", "--weight_decay=0.1"),
  )
  return workdir


@functools.cache
def _cache():
  workdir = scripts.scratch() / "values"
  scripts.run(VALUE, workdir, *TINY_VALUE, f"--policy={_policy()}")
  return workdir


@functools.cache
def _finished():
  """An A-LoL run that nothing interrupted."""
  workdir = scripts.scratch() / "finished"
  scripts.run(OFFLINE, workdir, *_flags())
  return workdir


def _flags(*more):
  return (*TINY, f"--policy={_policy()}", f"--cache={_cache()}", *more)


class ValueTest(absltest.TestCase):
  def test_cache_holds_what_training_needs(self):
    with np.load(_cache() / cached.ARRAYS) as file:
      arrays = dict(file)
    rows = word_lists.logged("train", 0, num=96)
    rewards = np.array([row["rewards"] for row in rows])
    np.testing.assert_allclose(arrays["rewards"], rewards, rtol=1e-6)
    np.testing.assert_allclose(
      arrays["advantages"], rewards - arrays["values"][:, None], atol=1e-6
    )
    self.assertTrue(np.all((arrays["values"] > 0) & (arrays["values"] < 1)))
    self.assertGreater(np.ptp(arrays["values"]), 0.01)
    # T tokens and an end token have log-probabilities, the rest has none.
    counts = [[len(c.split()) + 1 for c in row["candidates"]] for row in rows]
    np.testing.assert_array_equal(
      (arrays["ref_log_probs"] < 0).sum(axis=2), counts
    )
    notes = json.loads((_cache() / cached.MANIFEST).read_text())["notes"]
    self.assertEqual(notes["reward"], {"task": "word_lists"})
    self.assertEqual(notes["rows"], 96)
    self.assertLessEqual(abs(notes["correlation of V and R, held out"]), 1)
    np.testing.assert_allclose(
      notes["positive share"], np.mean(arrays["advantages"][:, 0] > 0)
    )

  def test_replies_are_the_reference_s_and_scored(self):
    rows = scripts.rows(_cache(), "samples.jsonl")
    self.assertLen(rows, 64)
    for row in rows:
      score, _ = word_lists.score(row["prompt"], row["response"])
      self.assertAlmostEqual(row["reward"], score, places=6)

  def test_bad_input(self):
    policy = f"--policy={_policy()}"
    cases = [
      (
        ["--heldout_fraction=0"],
        "heldout_fraction=0.0: It must lie between 0 a",
      ),
      (["--num_value_prompts=8"], "give more prompts"),
      (["--max_value=0.1"], r"must lie in \[0, 0.1\], got 0 to 1"),
      (["--learning_rate=nan"], "learning_rate must be a finite number"),
      (["--learning_rate=1e38"], "error of the value was never a finite"),
      (["--num_heads=5"], "num_heads must divide the width 32"),
      (["--data=/no/such.jsonl"], "no/such.jsonl"),
      (["--max_prompt_length=3"], "No row is left"),
    ]
    errors = scripts.drive(
      VALUE,
      [
        [scripts.scratch() / f"bad-value-{i}", *TINY_VALUE, policy, *flags]
        for i, (flags, _) in enumerate(cases)
      ],
    )
    for (flags, message), error in zip(cases, errors, strict=True):
      with self.subTest(flags[-1]):
        kinds = "IllegalFlagValueError|ValueError|NoRowLeft"
        self.assertRegex(str(error), f"^({kinds}): .*{message}")


class OfflineTest(parameterized.TestCase):
  def test_every_algorithm_runs(self):
    runs = {}
    for algorithm in offline.ALGORITHMS:
      more = ("--kl_coef=0.05",) if algorithm.endswith("_kl") else ()
      runs[algorithm] = (
        scripts.scratch() / f"run-{algorithm}",
        *_flags(f"--algorithm={algorithm}", "--steps=3", *more),
      )
    # Likelihood of the better replies alone; both candidates; no priority.
    runs["filtered"] = (
      scripts.scratch() / "run-filtered",
      *_flags("--algorithm=nll", "--priority=good_random", "--steps=3"),
    )
    runs["both"] = (
      scripts.scratch() / "run-both",
      *_flags("--priority=all_priority", "--noreplace", "--steps=3"),
    )
    runs["unclipped"] = (
      scripts.scratch() / "run-unclipped",
      *_flags("--priority=none", "--clip_epsilon=0", "--steps=3"),
    )
    errors = scripts.drive(OFFLINE, list(runs.values()))
    self.assertEqual(errors, [None] * len(runs))

    first = {name: scripts.rows(flags[0])[0] for name, flags in runs.items()}
    # At the reference all ratios are 1, and the same rows are drawn.
    for name in ("a_lol", "a_lol_seq"):
      self.assertAlmostEqual(first[name]["offline/ratio_mean"], 1, places=4)
      self.assertEqual(first[name]["offline/clip_high_fraction"], 0)
      np.testing.assert_allclose(
        first[name]["offline/loss"],
        first["a_lol_ref_free"]["offline/loss"],
        rtol=1e-4,
      )
    np.testing.assert_allclose(
      first["r_lol"]["offline/loss"], first["wbc"]["offline/loss"], rtol=1e-4
    )
    # Without bounds none is reached.
    for row in scripts.rows(runs["unclipped"][0])[:-1]:
      for bound in ("low", "high"):
        self.assertEqual(row[f"offline/clip_{bound}_fraction"], 0)
    # Every draw by priority is better than expected.
    self.assertEqual(first["a_lol"]["offline/zero_advantage_fraction"], 0)
    with np.load(_cache() / cached.ARRAYS) as file:
      advantages = file["advantages"]
    self.assertGreater(
      first["a_lol"]["offline/advantage_mean"],
      np.maximum(advantages[:, 0], 0).mean(),
    )
    # Steps are scaled by the share of rows that are better.
    share = int((advantages[:, 0] > 0).sum())
    self.assertLen(scripts.rows(_finished()), 8 * share // 96 + 1)

  def test_best_parameters_are_kept_apart(self):
    rows = scripts.rows(_finished())
    judged = {r["step"]: r["dev/reward"] for r in rows if "dev/reward" in r}
    best = max(judged, key=judged.get)
    steps = [int(p.name) for p in (_finished() / "best/checkpoints").iterdir()]
    # If nothing beats the reference, the last parameters are kept.
    self.assertEqual(steps, [best or rows[-1]["step"]])
    # It says which step its parameters are of.
    path = _finished() / "best/checkpoints" / str(steps[0]) / "meta/data.json"
    meta = json.loads(path.read_text())
    self.assertEqual(meta["kept"], steps[0])
    self.assertEqual(meta["value"], judged[best])
    loaded = hf.load(_finished() / "best")
    jax.tree.map(
      np.testing.assert_array_equal,
      loaded.params,
      checkpoint.restore_params(_finished() / "best")["policy"],
    )

  @parameterized.parameters(2, 4)
  def test_killed_run_ends_with_the_same_bits(self, num_rows):
    workdir = scripts.scratch() / f"killed-{num_rows}"
    scripts.run_until_killed(OFFLINE, workdir, *_flags(), num_rows=num_rows)
    scripts.run(OFFLINE, workdir, *_flags())
    for folder in ("", "best"):
      self.assertEqual(
        scripts.fingerprint(workdir / folder),
        scripts.fingerprint(_finished() / folder),
      )
    self.assertEqual(
      scripts.steady(scripts.rows(workdir)),
      scripts.steady(scripts.rows(_finished())),
    )

  def test_layout_does_not_change_the_run(self):
    # Where a gradient is nothing but rounding, Adam would blow it up.
    steady = ("--adam_epsilon=1e-3", "--steps=5")
    runs = {
      "whole": ("--mesh=data:1",),
      "micro": ("--mesh=data:1", "--micro_batch_size=2"),
      "both": ("--mesh=data:2,fsdp:2,tensor:2", "--micro_batch_size=4"),
    }
    workdirs = {name: scripts.scratch() / f"layout-{name}" for name in runs}
    errors = scripts.drive(
      OFFLINE,
      [
        (workdirs[name], *_flags(*steady, *flags))
        for name, flags in runs.items()
      ],
      devices=8,
    )
    self.assertEqual(errors, [None] * 3)
    for name in ("micro", "both"):
      gap = scripts.largest_gap(workdirs[name], workdirs["whole"])
      self.assertLess(gap, scripts.ROUNDING, name)
    self.assertGreater(
      scripts.largest_gap(workdirs["whole"], _policy()), 10 * scripts.ROUNDING
    )

  def test_a_file_with_advantages_needs_no_cache(self):
    with np.load(_cache() / cached.ARRAYS) as file:
      values = file["values"]
    path = scripts.scratch() / "valued.jsonl"
    rows = word_lists.logged("train", 0, num=96)
    files.write_jsonl(
      path,
      [
        {**row, "value": float(value)}
        for row, value in zip(rows, values, strict=True)
      ],
    )
    workdir = scripts.scratch() / "from-file"
    scripts.run(
      OFFLINE, workdir, *TINY, f"--policy={_policy()}", f"--data={path}"
    )
    # The same numbers by another way.
    one, two = (scripts.rows(path) for path in (workdir, _finished()))
    for name in ("offline/loss", "gradient_norm", "offline/weight_mean"):
      found = [[r[name] for r in x if name in r] for x in (one, two)]
      self.assertLen(found[0], 6)
      np.testing.assert_allclose(*found, rtol=1e-4, err_msg=name)
    if jax.__version_info__ > (0, 10, 0):  # Where Adam magnifies other digits.
      gap = scripts.largest_gap(workdir, _finished())
      self.assertLess(gap, scripts.ROUNDING)

  def test_a_cache_that_does_not_fit_is_refused(self):
    other = scripts.scratch() / "other-policy"
    scripts.run(
      SFT,
      other,
      "--task=word_lists",
      "--num_eval_prompts=64",
      "--hidden_size=32",
      "--max_positions=32",
      "--steps=2",
    )
    cases = [
      (["--task_options=num=95"], "the logged rows"),
      (["--max_response_length=15"], "--max_response_length: the cache has 16"),
      (["--dtype=bfloat16"], "--dtype: the cache has float32"),
      ([f"--policy={other}"], "the parameters of the reference"),
      ([f"--cache={scripts.scratch() / 'nowhere'}"], "holds no whole cache"),
    ]
    self._check(cases)

  def test_bad_input(self):
    rows = scripts.scratch() / "unscored.jsonl"
    files.write_jsonl(
      rows, [{"prompt": "birds 2 not duck owl:", "response": " crow dove"}]
    )
    unknown = ["--cache=", f"--data={rows}"]
    negative = scripts.scratch() / "negative.jsonl"
    files.write_jsonl(
      negative,
      [
        {"prompt": "birds 2 not duck owl:", "response": " crow", "reward": r}
        for r in (-0.5, 1)
      ],
    )
    cases = [
      ([*unknown, "--algorithm=wbc"], "wbc needs rewards, which 1 of 1"),
      ([*unknown, "--algorithm=a_lol"], "a_lol needs advantages, which 1 of 1"),
      (["--micro_batch_size=3"], "--micro_batch_size=3 does not divide"),
      (["--micro_batch_size=-1"], "-1 is not a non-negative"),
      (["--clip_epsilon=wide"], "--clip_epsilon=wide: could not convert"),
      (["--clip_epsilon=-0.1"], "-0.1 is not a non-negative number"),
      (["--kl_coef=0.1"], "kl_coef belongs to r_lol_kl and a_lol_kl"),
      (["--batch_size=99", "--noreplace"], "without replacement"),
      (["--task=", "--cache="], "Without a --task, give --data"),
      (["--score_options=x=1"], "no option 'x'"),
      (["--algorithm=a_lol_kl"], "a_lol_kl, which need a positive one"),
      (
        ["--cache=", f"--data={negative}", "--algorithm=wbc"],
        "got -0.5 to 1",
      ),
    ]
    self._check(cases)

  def _check(self, cases):
    errors = scripts.drive(
      OFFLINE,
      [
        [scripts.scratch() / f"bad-{id(flags)}", *_flags(*flags)]
        for flags, _ in cases
      ],
    )
    for (flags, message), error in zip(cases, errors, strict=True):
      with self.subTest(" ".join(map(str, flags))):
        self.assertRegex(
          str(error), f"(?s)^(IllegalFlag)?ValueError: .*{message}"
        )


class RewardModelTest(absltest.TestCase):
  def test_learns_comparisons_and_scores(self):
    workdir, half, led = (
      scripts.scratch() / name for name in ("rm", "rm-half", "rm-led")
    )
    flags = (*TINY_REWARD, f"--policy={_policy()}")
    learning = (
      "--task_options=num=600",
      "--order=reward",
      "--steps=60",
      "--learning_rate=3e-3",
    )
    errors = scripts.drive(
      REWARD,
      [
        (workdir, *flags, *learning),
        (half, *flags, "--frozen=wte|block_0"),
        (led, *flags, "--margin=0.5", "--reward_margin=1", "--center_coef=1"),
      ],
    )
    self.assertEqual(errors, [None, None, None])
    # At first scores hardly differ, so that the loss is about log(1 + exp(m)):
    # the margin is 0, or .5 and the difference of two rewards.
    losses = [scripts.rows(path)[0]["pairwise/loss"] for path in (half, led)]
    self.assertAlmostEqual(losses[0], np.log(2), delta=0.05)
    self.assertGreater(losses[1], np.log1p(np.exp(0.5)))
    rows = scripts.rows(workdir)
    self.assertGreater(rows[-1]["eval/accuracy"], 0.6)
    # What is frozen keeps its bits, and the rest does not.
    before = traverse_util.flatten_dict(hf.load(_policy()).params, sep="/")
    after = checkpoint.restore_params(half)["reward_model"]["backbone"]
    after = traverse_util.flatten_dict(after, sep="/")
    for name, leaf in before.items():
      if "wte" in name or "block_0" in name:
        np.testing.assert_array_equal(leaf, after[name], name)
      elif leaf.ndim > 1:  # Some biases have no gradient.
        self.assertFalse(np.array_equal(leaf, after[name]), name)

    # Every flag --reward_model takes it.
    evaluation = scripts.scratch() / "rm-evaluation"
    scripts.run(
      EVALUATE,
      evaluation,
      "--task=word_lists",
      "--num_prompts=24",
      "--batch_size=8",
      "--max_length=10",
      "--stop_at_eos",
      f"--policies=start={_policy()}",
      f"--reward_model={workdir}",
      "--reward_length=32",
      "--metrics=text",
    )
    rewards = [r["reward"] for r in scripts.rows(evaluation, "samples.jsonl")]
    self.assertGreater(np.ptp(rewards), 0)
    self.assertTrue(all(0 < reward < 1 for reward in rewards))

  def test_killed_run_ends_with_the_same_bits(self):
    flags = (*TINY_REWARD, f"--policy={_policy()}", "--frozen=wte")
    whole, killed = (scripts.scratch() / f"rm-{i}" for i in range(2))
    scripts.run(REWARD, whole, *flags)
    scripts.run_until_killed(REWARD, killed, *flags, num_rows=4)
    scripts.run(REWARD, killed, *flags)
    self.assertEqual(scripts.fingerprint(killed), scripts.fingerprint(whole))
    self.assertEqual(
      scripts.steady(scripts.rows(killed)), scripts.steady(scripts.rows(whole))
    )

  def test_bad_input(self):
    rows = scripts.scratch() / "single.jsonl"
    files.write_jsonl(
      rows,
      [{"prompt": "birds 2 not duck owl:", "response": " crow", "reward": 1}],
    )
    cases = [
      (
        [f"--data={rows}", f"--eval_data={rows}"],
        "holds no comparison: .*single.jsonl:1",
      ),
      ([f"--data={rows}"], "holds no comparison: .*single.jsonl:1"),
      (["--frozen=no_such_layer"], "--frozen=no_such_layer matches 0 of"),
      (["--batch_size=97"], "more than the 86 comparisons"),
    ]
    errors = scripts.drive(
      REWARD,
      [
        (
          scripts.scratch() / f"bad-rm-{i}",
          *TINY_REWARD,
          f"--policy={_policy()}",
          *flags,
        )
        for i, (flags, _) in enumerate(cases)
      ],
    )
    for (flags, message), error in zip(cases, errors, strict=True):
      with self.subTest(" ".join(flags)):
        self.assertRegex(str(error), f"^ValueError: .*{message}")


class EvaluateTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    # Evaluations do draw.
    self.enter_context(mock.patch.dict(os.environ))
    del os.environ["PYTHONPATH"]

  def test_text_and_log_metrics(self):
    workdir = scripts.scratch() / "evaluation"
    scripts.run(
      EVALUATE,
      workdir,
      "--task=word_lists",
      "--num_prompts=40",
      "--batch_size=16",
      "--max_length=10",
      "--stop_at_eos",
      "--nogreedy",
      f"--policies=start={_policy()},trained={_finished() / 'best'}",
      f"--reference={_policy()}",
      "--metrics=answers,text,log",
    )
    table = json.loads((workdir / "summary.json").read_text())
    start, trained = table["start"], table["trained"]
    replies = [
      row["response"]
      for row in scripts.rows(workdir, "samples.jsonl")
      if row["arm"] == "start"
    ]
    words = [len(reply.split()) for reply in replies]
    self.assertEqual(start["words"], f"{np.mean(words):.3f}")
    single = {word for reply in replies for word in reply.lower().split()}
    self.assertEqual(start["distinct-1"], f"{len(single) / sum(words):.3f}")
    # The reference itself is at no bound; another policy has other numbers.
    for name in ("replies", "tokens"):
      for bound in ("lower", "upper"):
        self.assertEqual(start[f"{name} at the {bound} bound"], "0.000")
    name = "perplexity of logged replies"
    self.assertNotEqual(start[name], trained[name])
    self.assertIn("reward - start", trained)
    # The curves are those of the run that the best parameters come from.
    self.assertTrue((workdir / "arms.png").exists())

  def test_transcripts_are_prompts(self):
    # The form of the helpful-harmless data, in words that the model knows.
    path = scripts.scratch() / "heldout.jsonl.gz"
    transcript = "\n\nHuman: birds 2 : \n\nAssistant:"
    rows = [{"chosen": f"{transcript} crow", "rejected": f"{transcript} duck"}]
    with gzip.open(path, "wt") as file:
      file.write("\n".join(map(json.dumps, rows)) + "\n\n[]\n")
    done = scripts.run(
      EVALUATE,
      scripts.scratch() / "transcripts",
      f"--data={path}",
      "--task=word_lists",
      "--metrics=log",
      f"--policies={_policy()}",
      ok=False,
    )
    # "Human" is no word of this tokenizer: named, rather than dropped.
    self.assertRegex(
      done.stderr, "No row is left: .*heldout.jsonl.gz:1: .* cannot encode"
    )
    self.assertIn("heldout.jsonl.gz:3", done.stderr)

  def test_a_file_needs_a_scorer(self):
    (error,) = scripts.drive(
      EVALUATE,
      [
        (
          scripts.scratch() / "no-scorer",
          f"--policies={_policy()}",
          "--data=rows.jsonl",
        )
      ],
    )
    self.assertRegex(error, "Nothing scores the responses: give --rewards")

  def test_bad_input(self):
    cases = [
      (["--metrics=text,colour"], "--metrics must be some of .*, got colour"),
      (
        ["--metrics=log", "--task=arithmetic"],
        "The task arithmetic has no logged replies",
      ),
      (["--reference=a,b"], "--reference names 2 models"),
      (["--clip_epsilon=1.5"], r"--clip_epsilon=1.5: .*range \[0.0, 1.0\]"),
    ]
    errors = scripts.drive(
      EVALUATE,
      [
        (
          scripts.scratch() / f"bad-evaluation-{i}",
          "--task=word_lists",
          "--num_prompts=4",
          f"--policies={_policy()}",
          *flags,
        )
        for i, (flags, _) in enumerate(cases)
      ],
    )
    for (flags, message), error in zip(cases, errors, strict=True):
      with self.subTest(" ".join(flags)):
        kinds = "IllegalFlagValueError|ValueError|NoRowLeft"
        self.assertRegex(str(error), f"^({kinds}): .*{message}")


class LearningTest(absltest.TestCase):
  def test_a_lol_rises_where_likelihood_does_not(self):
    # Enough of a log that nothing is learnt by heart; its value is known.
    path = scripts.scratch() / "long.jsonl"
    rows = word_lists.logged("train", 0, num=2000)
    value = float(np.mean([row["rewards"] for row in rows]))
    files.write_jsonl(path, [{**row, "value": value} for row in rows])
    workdirs = {
      algorithm: scripts.scratch() / f"learning-{algorithm}"
      for algorithm in ("nll", "a_lol")
    }
    flags = (
      *TINY,
      f"--policy={_policy()}",
      f"--data={path}",
      "--steps=150",
      "--noscale_steps",
      "--eval_every=150",
      "--save_every=150",
      "--num_dev_prompts=256",
      "--sample_batch_size=128",
      "--nogreedy",
    )
    errors = scripts.drive(
      OFFLINE,
      [
        (workdir, *flags, f"--algorithm={algorithm}")
        for algorithm, workdir in workdirs.items()
      ],
    )
    self.assertEqual(errors, [None, None])
    rewards = {
      algorithm: [
        row["dev/reward"]
        for row in scripts.rows(workdir)
        if "dev/reward" in row
      ]
      for algorithm, workdir in workdirs.items()
    }
    start, end = rewards["a_lol"]
    self.assertGreater(end, start + 0.1)
    self.assertGreater(end, rewards["nll"][-1] + 0.1)


if __name__ == "__main__":
  absltest.main()
