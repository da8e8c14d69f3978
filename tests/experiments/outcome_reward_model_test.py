"""outcome_reward_model.py --loss=bce, run as a user runs it, on CPU.

A solution is right if its last line is "#1". The first line of a bad one may
hold a 9, from which no completion is right.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from rljax.evaluation import metrics
from rljax.models import gpt2, hf
from rljax.scoring import reward_models
from rljax.tasks import tokenizers
from tests import scripts

SCRIPT = "experiments/outcome_reward_model.py"
BCE = (
  "--loss=bce",
  "--max_prompt_length=8",
  "--max_response_length=8",
  "--num_eval_rows=64",
  "--batch_size=16",
  "--steps=4",
  "--eval_every=2",
  "--save_every=2",
  "--learning_rate=1e-2",
)
NUM_SAMPLES = 8


def setUpModule():
  scripts.without_pictures()


def tearDownModule():
  scripts.remove_scratch()


@functools.cache
def _policy():
  """A model that knows nothing, and its tokenizer of characters."""
  folder = scripts.scratch() / "policy"
  tokenizer = tokenizers.of_words([*"0123456789=#\n"], r"[\s\S]")
  model = gpt2.GPT2(
    gpt2.GPT2Config(
      vocab_size=len(tokenizer),
      hidden_size=16,
      num_layers=1,
      num_heads=2,
      max_positions=32,
    )
  )
  ids = jnp.zeros((1, 2), jnp.int32)
  params = model.init(jax.random.key(0), ids, ids == 0)["params"]
  hf.save(folder, model, params, tokenizer)
  return folder


# Data.


def _samples(prompts, seed):
  """NUM_SAMPLES samples of each prompt, a third of them right."""
  rng = np.random.default_rng(seed)
  rows = []
  for i in prompts:
    for number in range(NUM_SAMPLES):
      is_right = bool(rng.random() < 1 / 3)
      first = rng.integers(9) if is_right else rng.integers(10)
      answer = "1" if is_right else "0"
      rows.append(
        {
          "prompt": f"{i:02d}=",
          "response": f"{first}{rng.integers(9)}\n#{answer}",
          "reward": float(is_right),
          "parts": {"is_correct": is_right, "answer": answer},
          "finished": True,
          "index": i,
          "sample": number,
        }
      )
  return rows


def _step_labels(rows):
  """The same as rows with values of steps."""
  return [
    {
      "prompt": row["prompt"],
      "response": row["response"],
      "steps": row["response"].splitlines(keepends=True),
      "values": [float("9" not in row["response"]) / 4, row["reward"]],
      "num_completions": 4,
      "is_correct": row["reward"] == 1,
      "finished": True,
    }
    for row in rows
  ]


@functools.cache
def _content():
  """Rows by name of the file."""
  train, held_out = _samples(range(30), 0), _samples(range(30, 38), 1)
  return {
    "first": train[: len(train) // 2],
    # Two rows that cannot be used, a duplicate, and a held-out prompt.
    "second": [
      *train[len(train) // 2 :],
      {"prompt": "01=", "response": "1", "reward": None},
      {"prompt": "01=", "response": "a", "reward": 1.0},
      {**train[0], "reward": 1.0 - train[0]["reward"]},
      {**held_out[0], "response": "5\n#1", "reward": 1.0},
    ],
    "held_out": held_out,
    "steps": _step_labels(train),
    "held_out_steps": _step_labels(held_out),
    "all_right": [row for row in train if row["reward"] == 1],
    "raw": [{**row, "reward": row["reward"] - 0.5} for row in train],
    "singles": train[::NUM_SAMPLES],
  }


@functools.cache
def _files():
  files = {name: scripts.scratch() / f"{name}.jsonl" for name in _content()}
  for name, path in files.items():
    rows = _content()[name]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return files


def _data(train, held_out=""):
  names = ",".join(str(_files()[name]) for name in train.split(","))
  flags = [f"--policy={_policy()}", f"--data={names}"]
  return flags + ([f"--eval_data={_files()[held_out]}"] if held_out else [])


# The runs that the tests look at.


def _flags_of_runs():
  """Flags by name of the run; all go through one process."""
  samples = _data("first,second", "held_out")
  learning = ("--steps=60", "--eval_every=30", "--save_every=60")
  return {
    "learns": [*BCE, *samples, *learning],
    "step_ends": [*BCE, *samples, "--targets=step_ends"],
    "last": [*BCE, *samples, "--targets=last", "--nobalance"],
    "sorm": [
      *(*BCE, *_data("steps", "held_out_steps"), *learning),
      *("--labels=sorm", "--targets=step_ends"),
    ],
    "share": [
      *(*BCE, *_data("singles"), "--eval_share=0.25", "--batch_size=4"),
      "--normalizer=sequence_mean",
    ],
    "mesh": [*BCE, *samples, "--targets=step_ends", "--mesh=data:2"],
  }


def _bad_flags():
  """Flags, and what the error must say."""
  samples = _data("first", "held_out")
  pairwise = [*samples, *BCE[1:]]
  return [
    (
      [*BCE, *samples[:1], "--task="],
      r"Give --data \(--eval_data or --eval_share of it",
    ),
    (
      [*BCE, samples[0], samples[-1]],
      "--eval_share of it is held out., or a --task and neither",
    ),
    ([*BCE, *samples, "--eval_share=0.1"], "--eval_share needs --data, and no"),
    ([*BCE, *_data("first"), "--eval_share=1"], "share must lie between"),
    ([*BCE, *samples, "--margin=1"], "--margin=1.0 belongs to --loss=pairw"),
    ([*BCE, *samples, "--order=reward"], "--order=reward belongs to .*pairw"),
    ([*pairwise, "--labels=sorm"], "--labels=sorm belongs to --loss=bce"),
    ([*pairwise, "--nobalance"], "--balance=False belongs to --loss=bce"),
    (pairwise, "holds no comparison"),
    ([*BCE, *samples, "--labels=sorm"], 'no row .*"values" is missing'),
    (
      [*BCE, f"--policy={_policy()}", "--task=word_lists", "--labels=sorm"],
      "--labels=sorm needs --data",
    ),
    ([*BCE, *_data("raw", "held_out")], r"raw.jsonl:1: .* in \[0, 1\], got -0"),
    ([*BCE, *_data("all_right", "held_out")], "labels are positive: .*nothing"),
    ([*BCE, *_data("first", "all_right")], "All prompts of the training rows"),
    (
      [*BCE, *_data("held_out", "all_right")],
      r"All 64 held-out solutions .*\(--num_eval_rows\)",
    ),
    ([*BCE, *samples, "--batch_size=256"], "more than the [0-9]+ solutions"),
  ]


@functools.cache
def _outcomes():
  """Errors by run, None where there was none, and those of bad flags."""
  good, bad = _flags_of_runs(), _bad_flags()
  errors = scripts.drive(
    SCRIPT,
    [
      *(
        (scripts.scratch() / name, "--mesh=data:1", *flags)
        for name, flags in good.items()
      ),
      *((scripts.scratch() / "bad", *flags) for flags, _ in bad),
    ],
    devices=2,
  )
  return dict(zip(good, errors, strict=False)), errors[len(good) :]


def _workdir(name):
  errors, _ = _outcomes()
  if errors[name]:
    raise AssertionError(f"{name}: {errors[name]}")
  return scripts.scratch() / name


def _summary(name):
  return json.loads((_workdir(name) / "summary.json").read_text())


def _token_logits(workdir, texts):
  """Of texts of one length and the end token behind them, `[N, S]`."""
  loaded = hf.load_classifier(workdir)
  ids = loaded.tokenizer(texts)["input_ids"]
  ids = jnp.array([[*row, loaded.tokenizer.eos_token_id] for row in ids])
  apply = jax.jit(functools.partial(loaded.model.apply, method="token_logits"))
  logits = apply({"params": loaded.params}, ids, jnp.ones(ids.shape, bool))
  return np.asarray(logits)[..., 0]


class RunTest(parameterized.TestCase):
  def test_learns_what_decides(self):
    last = scripts.rows(_workdir("learns"))[-1]
    self.assertGreater(last["eval/auc"], 0.95)
    self.assertGreater(last["eval/accuracy"], 0.9)
    self.assertGreater(last["eval/rerank"], 0.9)
    held_out = _content()["held_out"]
    share = np.mean([row["reward"] for row in held_out])
    self.assertAlmostEqual(last["eval/sample_accuracy"], share, places=6)
    self.assertEqual(last["eval/samples_per_prompt"], NUM_SAMPLES)

  def test_a_reward_model_says_the_same(self):
    workdir, rows = _workdir("learns"), _content()["held_out"]
    model = reward_models.RewardModel(str(workdir), max_length=16)
    scores, _ = model.score_batch(
      [row["prompt"] for row in rows], [row["response"] for row in rows]
    )
    is_right = np.array([row["reward"] == 1 for row in rows])
    last = scripts.rows(workdir)[-1]
    self.assertAlmostEqual(
      last["eval/accuracy"], np.mean((scores > 0.5) == is_right), places=6
    )
    self.assertAlmostEqual(
      last["eval/auc"],
      metrics.area_under_curve(scores, is_right),
      places=2,  # The sigmoid makes ties of high logits.
    )
    # And so does the model at the end of every prefix.
    logits = _token_logits(
      workdir, [rows[i]["prompt"] + rows[i]["response"] for i in range(4)]
    )
    np.testing.assert_allclose(
      1 / (1 + np.exp(-logits[:, -1])), scores[:4], rtol=1e-4
    )

  def test_counts(self):
    rows = [*_content()["first"], *_content()["second"][:-4]]
    texts = {(row["prompt"], row["response"]): row["reward"] for row in rows}
    num_right = int(sum(texts.values()))
    summary = _summary("learns")
    self.assertEqual(summary["solutions of held-out prompts left out"], 1)
    # The last copy of the first row is the one that was added.
    copies = len(rows) + 1 - len(texts)
    # One row holds a character that the tokenizer cannot write.
    self.assertEqual(summary["duplicates left out"], copies)
    self.assertEqual(summary["good solutions"], num_right)
    self.assertEqual(summary["solutions"], 2 * num_right)
    self.assertEqual(
      summary["solutions left out for balance"], len(texts) - 2 * num_right
    )
    self.assertEqual(summary["held-out solutions"], len(_content()["held_out"]))
    # Two digits, a line feed, two characters and the end token.
    self.assertEqual(summary["targets"], 6 * summary["solutions"])
    self.assertEqual(summary["good targets"], 6 * num_right)
    skipped = (_workdir("learns") / "skipped.txt").read_text()
    self.assertEqual(skipped.count("\n"), summary["rows left out"])
    first = len(_content()["second"]) - 3
    for line in (first, first + 1):
      self.assertIn(f"second.jsonl:{line}:", skipped)

  @parameterized.parameters(("step_ends", 2), ("last", 1))
  def test_targets(self, name, number):
    summary = _summary(name)
    self.assertEqual(summary["targets"], number * summary["solutions"])
    if name == "last":  # Not balanced.
      self.assertEqual(summary["solutions left out for balance"], 0)
      self.assertLess(summary["good solutions"], 0.5 * summary["solutions"])
    first = scripts.rows(_workdir(name))[0]
    self.assertBetween(first["bce/loss"], 0.3, 2)

  def test_steps_are_told_apart(self):
    workdir = _workdir("sorm")
    summary = _summary("sorm")
    self.assertEqual(2 * summary["good targets"], summary["targets"])
    self.assertGreater(summary["targets left out for balance"], 0)
    self.assertGreater(scripts.rows(workdir)[-1]["eval/auc"], 0.9)
    # A 9 in the first line is fatal before the second is there.
    texts = ["30=94\n#0", "31=94\n#0", "30=34\n#0", "31=34\n#0"]
    logits = _token_logits(workdir, texts)[:, 6]  # At the line feed.
    self.assertLess(max(logits[:2]), min(logits[2:]))

  def test_a_share_of_the_prompts_is_held_out(self):
    summary = _summary("share")
    self.assertEqual(summary["held-out solutions"], 8)  # Of 30.
    self.assertLessEqual(
      summary["solutions"] + summary["solutions left out for balance"], 22
    )
    # With one sample of a prompt there is nothing to choose from.
    last = scripts.rows(_workdir("share"))[-1]
    self.assertNotIn("eval/rerank", last)
    self.assertIn("eval/auc", last)

  def test_mesh_changes_rounding_alone(self):
    gap = scripts.largest_gap(_workdir("mesh"), _workdir("step_ends"))
    self.assertLess(gap, 10 * scripts.ROUNDING)  # Steps are ten times as large.
    a, b = (scripts.rows(_workdir(n))[-1] for n in ("mesh", "step_ends"))
    for name in ("eval/loss", "eval/auc", "eval/rerank"):
      self.assertAlmostEqual(a[name], b[name], places=3)

  def test_killed_run_ends_with_the_same_bits(self):
    whole, killed = _workdir("step_ends"), scripts.scratch() / "killed"
    flags = ("--mesh=data:1", *_flags_of_runs()["step_ends"])
    scripts.run_until_killed(SCRIPT, killed, *flags, num_rows=3)
    out = scripts.run(SCRIPT, killed, *flags).stdout
    self.assertEqual(scripts.fingerprint(killed), scripts.fingerprint(whole))
    self.assertEqual(
      scripts.steady(scripts.rows(killed)), scripts.steady(scripts.rows(whole))
    )
    # Four steps are not enough, and it says so.
    last = scripts.rows(killed)[-1]
    self.assertEqual("not fit to be a reward" in out, last["eval/auc"] <= 0.8)


class BadInputTest(absltest.TestCase):
  def test_each_gets_a_line_that_says_what_is_wrong(self):
    _, errors = _outcomes()
    for (flags, message), error in zip(_bad_flags(), errors, strict=True):
      with self.subTest(message):
        self.assertRegex(str(error), f"(?s)^ValueError: .*{message}", flags)


if __name__ == "__main__":
  absltest.main()
