"""experiments/preference.py, run as a user runs it, on CPU with tiny flags."""

import functools
import json
import shutil

import jax
import numpy as np
from absl.testing import absltest, parameterized

from rljax.models import hf
from rljax.storage import checkpoint
from rljax.tasks import word_lists
from rljax.text import batches
from tests import oracles_offline, scripts

SCRIPT = "experiments/preference.py"
ALGORITHMS = ("dpo", "ipo", "pro", "kto", "simpo", "orpo")
LOSSES = {name: f"{name}/loss" for name in ALGORITHMS} | {"ipo": "dpo/loss"}
TINY = (
  "--mesh=data:1",  # One of the two devices.
  "--task=word_lists",
  "--task_options=num=64",
  "--num_dev_prompts=16",
  "--max_prompt_length=8",
  "--max_response_length=10",
  "--sample_batch_size=16",
  "--batch_size=8",
  "--steps=6",
  "--eval_every=100",
  "--learning_rate=1e-3",
  # As the numbers below were found.
  *("--schedule=constant", "--warmup=0", "--max_grad_norm=0.3"),
)
OFTEN = ("--eval_every=2", "--save_every=2")
# All replies are to become more likely: else the reference point stays at 0.
KTO = ("--algorithm=kto", "--undesirable_weight=0.01", *OFTEN)
ALONE = (
  *("--task=", "--eval_share=0.3", "--batch_size=4", "--eval_every=3"),
  "--keep_best",
)
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def setUpModule():
  scripts.without_pictures()


def tearDownModule():
  scripts.remove_scratch()


# Models and data.


@functools.cache
def _policy():
  workdir = scripts.scratch() / "policy"
  scripts.run(
    "experiments/sft.py",
    workdir,
    "--task=word_lists",
    "--hidden_size=32",
    "--num_layers=1",
    "--max_positions=32",
    "--steps=20",
    "--learning_rate=3e-3",
    "--num_eval_prompts=64",
  )
  return workdir


@functools.cache
def _chat_policy():
  """The same with a chat template."""
  workdir = scripts.scratch() / "chat-policy"
  shutil.copytree(_policy(), workdir)
  path = workdir / "model" / "tokenizer_config.json"
  config = json.loads(path.read_text()) | {"chat_template": TEMPLATE}
  path.write_text(json.dumps(config))
  return workdir


@functools.cache
def _cache():
  """What offline_value.py says of the rows of the task."""
  workdir = scripts.scratch() / "values"
  scripts.run(
    "experiments/offline_value.py",
    workdir,
    f"--policy={_policy()}",
    "--task=word_lists",
    "--task_options=num=64",
    "--max_prompt_length=8",
    "--max_response_length=10",
    "--num_value_prompts=32",
    "--sample_batch_size=16",
    "--num_heads=2",
    "--epochs=1",
    "--batch_size=8",
  )
  return workdir


@functools.cache
def _content(name):
  """The rows of a file, of eight prompts."""
  # In the shapes of the task's own rows: then less is compiled.
  rows = word_lists.logged("train", 1, num=16)
  rows, others = rows[:8], rows[8:]
  if name == "ranked":  # Three replies, in one row two; rewards in no order.
    rng = np.random.default_rng(0)
    for row, other in zip(rows, others, strict=True):
      row["candidates"] = [*row["candidates"], other["candidates"][0]]
      noise = rng.normal(size=3) / 10
      row["rewards"] = list(rng.permutation([2.5, -1.0, 0.5]) + noise)
    for field in ("candidates", "rewards"):
      rows[4][field] = rows[4][field][:2]
    return rows
  if name == "tied":  # One of the nine.
    return [
      row | {"rewards": [1, 1] if i == 0 else [0, 1]}
      for i, row in enumerate([others[0], *rows])
    ]
  pairs = [
    {
      "prompt": row["prompt"],
      "chosen": row["candidates"][0],
      "rejected": row["candidates"][1],
    }
    for row in rows
  ]
  if name == "pairs":
    return pairs
  say = lambda role, content: {"role": role, "content": content.strip()}
  return [  # "messages"
    {
      side: [say("user", row["prompt"]), say("assistant", row[side])]
      for side in ("chosen", "rejected")
    }
    for row in pairs
  ]


@functools.cache
def _files():
  """Where the rows lie, by name."""
  names = ("pairs", "messages", "ranked", "tied")
  rows = {name: list(_content(name)) for name in names}
  single = {"prompt": rows["pairs"][0]["prompt"], "response": " crow dove"}
  rows["pairs"].insert(3, single)
  rows["singles"] = [single, single]
  rows["labels"] = [
    {"prompt": row["prompt"], "completion": row[side], "label": is_good}
    for row in _content("pairs")
    for side, is_good in (("chosen", True), ("rejected", False))
  ]
  rows["alike"] = [
    row | {"prompt": single["prompt"]} for row in _content("pairs")
  ]
  files = {name: scripts.scratch() / f"{name}.jsonl" for name in rows}
  for name, path in files.items():
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[name]))
  return files


# The runs that the tests look at.


def _flags_of_runs():
  """Flags by name of the run; all go through one process."""
  file = lambda name: f"--data={_files()[name]}"
  kto = [*KTO, file("pairs")]
  return {
    # On the task.
    "dpo": OFTEN,
    "ipo": ["--algorithm=ipo", "--ipo_per_token"],
    "pro": ["--algorithm=pro", "--pro_mask=published"],
    "kto": [
      *("--algorithm=kto", "--kto_threshold=0.5", "--undesirable_weight=3"),
      "--batch_size=16",
    ],
    "simpo": ["--algorithm=simpo"],
    "orpo": ["--algorithm=orpo", "--order=reward", f"--cache={_cache()}"],
    # From files.
    "dpo-ranked": [file("ranked")],
    "ipo-messages": [
      *("--algorithm=ipo", "--ipo_per_token", file("messages")),
      *("--prompt_format=chat", f"--policy={_chat_policy()}"),
    ],
    "pro-ranked": ["--algorithm=pro", file("ranked")],
    "kto-pairs": kto,
    "kto-alike": [*KTO, file("alike")],
    "simpo-pairs": ["--algorithm=simpo", file("pairs")],
    "orpo-tied": ["--algorithm=orpo", "--order=reward", file("tied")],
    # Without a scorer of replies.
    "dpo-alone": [file("pairs"), *ALONE],
    "kto-labels": ["--algorithm=kto", file("labels"), *ALONE],
    # The same in other ways.
    "dpo-micro": [*OFTEN, "--micro_batch_size=2"],
    "dpo-cache": [*OFTEN, f"--cache={_cache()}"],
    "kto-mesh": [*kto, "--mesh=data:2", "--micro_batch_size=4"],
    "learns": [
      *(
        "--task_options=num=256,agreement=1",
        "--steps=150",
        "--save_every=150",
      ),
      *("--learning_rate=1e-3", "--max_grad_norm=1"),
    ],
  }


def _bad_flags():
  """Flags, and what the error must say."""
  file = lambda name: f"--data={_files()[name]}"
  other = "--task_options=num=48"
  pro, kto = "--algorithm=pro", "--algorithm=kto"
  return [
    ([pro, "--order=logged"], "--algorithm=pro .*--order=reward, or --pro_rew"),
    (["--label_smoothing=0.1", kto], "--label_smoothing=0.1 .*=dpo; .* kto"),
    (
      ["--label_smoothing=0.5"],
      r"--label_smoothing=0.5 must lie in \[0, 0.5\)",
    ),
    (
      ["--label_smoothing=0.1", "--dpo_loss_type=hinge"],
      "--label_smoothing .*--dpo_loss_type=sigmoid or robust",
    ),
    (["--algorithm=orpo", "--beta=1"], "--beta=1.0 .*dpo or ipo or kto or sim"),
    (["--algorithm=ipo", "--reference_free"], "--reference_free=True .*=dpo"),
    (["--kto_threshold=0"], "--kto_threshold=0.0 .*=kto"),
    (["--pro_mask=published"], "--pro_mask=published belongs .*=pro"),
    (["--beta=0"], "--beta=0: 0.0 is not number >= 1e-06"),
    ([pro, "--sft_weight=-1"], "sft_weight=-1: -1.0 is not a non-negative"),
    ([kto, "--kto_threshold=1", "--order=reward"], "leave out --order=reward"),
    ([kto, "--batch_size=1"], "--batch_size must be 2 or more"),
    (
      [file("pairs"), "--task=", f"--dev_data={_files()['pairs']}"],
      "Nothing scores the replies to --dev_data=.*: give --rewards",
    ),
    ([file("pairs"), "--task=", "--eval_share=1"], "--eval_share must lie bet"),
    (["--micro_batch_size=3"], "--micro_batch_size=3 does not divide"),
    (["--mesh=data:2", "--batch_size=7"], "--batch_size must be divisible"),
    (["--task="], "Without a --task, give --data, a file of rows"),
    ([file("singles")], "2 of 2 rows .*: .*singles.jsonl:1, .*singles.jsonl:2"),
    ([file("pairs"), "--order=reward"], "--order=reward needs rewards, which"),
    ([file("pairs"), pro], "--order=reward needs rewards, which 17 of 17"),
    ([kto, "--kto_threshold=9"], "0 of 128 replies are good"),
    (
      [file("tied"), "--order=reward", "--batch_size=9"],
      "=9 is more than the 8 rows",
    ),
    ([file("pairs"), "--batch_size=9"], "=9 is more than the 8 rows"),
    ([f"--cache={_cache()}", other], r"the logged rows \(--data\)"),
    (
      [f"--cache={_cache()}", "--max_prompt_length=9"],
      "--max_prompt_length: the cache has 8, this run 9",
    ),
  ]


@functools.cache
def _outcomes():
  """Errors by run, None where there was none, and those of bad flags."""
  good, bad = _flags_of_runs(), _bad_flags()
  flags = (*TINY, f"--policy={_policy()}")
  errors = scripts.drive(
    SCRIPT,
    [
      *(
        (scripts.scratch() / name, *flags, *more) for name, more in good.items()
      ),
      *((scripts.scratch() / "bad", *flags, *more) for more, _ in bad),
    ],
    devices=2,
  )
  return dict(zip(good, errors, strict=False)), errors[len(good) :]


def _workdir(name):
  errors, _ = _outcomes()
  if errors[name]:
    raise AssertionError(f"{name}: {errors[name]}")
  return scripts.scratch() / name


@functools.cache
def _reference():
  return hf.load(str(_policy()))


@jax.jit
def _all_log_probs(params, ids, mask):
  model = _reference().model
  hidden = model.apply({"params": params}, ids, mask)
  logits = model.apply({"params": params}, hidden, method="logits")
  return jax.nn.log_softmax(logits)


def _log_probs(params, pairs):
  """Log-probabilities of the tokens of replies behind prompts, N lists."""
  tokenizer = _reference().tokenizer
  sequences, starts = [], []
  for prompt, reply in pairs:
    ids = tokenizer(prompt)["input_ids"]
    starts.append(len(ids))
    reply = tokenizer(reply, add_special_tokens=False)["input_ids"]
    sequences.append([*ids, *reply, tokenizer.eos_token_id])
  # One shape for all, which compiles once.
  ids, mask = batches.pad_right(sequences + [[]] * (32 - len(pairs)), length=32)
  found = np.asarray(_all_log_probs(params, ids, mask), np.float64)
  return [
    found[n, np.arange(start - 1, len(ids) - 1), ids[start:]]
    for n, (ids, start) in enumerate(zip(sequences, starts, strict=True))
  ]


def _arrays(pairs):
  """Log-probabilities and mask `[B, K, T]` of up to K pairs in each of B rows.

  Under the reference.
  """
  found = iter(_log_probs(_reference().params, [q for p in pairs for q in p]))
  log_probs = np.zeros((len(pairs), max(map(len, pairs)), 16))
  mask = np.zeros(log_probs.shape, bool)
  for i, of_row in enumerate(pairs):
    for k in range(len(of_row)):
      tokens = next(found)
      log_probs[i, k, : len(tokens)] = tokens
      mask[i, k, : len(tokens)] = True
  return log_probs, mask


class WithoutScorerTest(parameterized.TestCase):
  @parameterized.parameters(("dpo-alone", True), ("kto-labels", False))
  def test_held_out_loss_selects(self, name, has_accuracy):
    workdir = _workdir(name)
    rows = scripts.rows(workdir)
    steps = [row["step"] for row in rows if "eval/loss" in row]
    self.assertEqual(steps, [0, 3, 6])
    self.assertFalse(any("dev/reward" in row for row in rows))
    if has_accuracy:
      self.assertIn("eval/accuracy", rows[0])
    # The reference itself: log 2 of every pair, and half of what there is.
    expected = np.log(2) if name == "dpo-alone" else 0.5
    np.testing.assert_allclose(rows[0]["eval/loss"], expected, atol=1e-3)
    self.assertTrue((workdir / "best").exists())


class RunTest(parameterized.TestCase):
  @parameterized.parameters(*ALGORITHMS)
  def test_runs_on_the_task(self, name):
    workdir = _workdir(name)
    rows = scripts.rows(workdir)
    self.assertEqual([row["step"] for row in rows], list(range(len(rows))))
    for row in rows[:-1]:
      self.assertTrue(np.isfinite(row[LOSSES[name]]))
    self.assertIn("dev/reward", rows[-1])
    for path in ("summary.json", "samples.jsonl", "best/model/config.json"):
      self.assertTrue((workdir / path).exists(), path)
    self.assertLen(list((workdir / "best" / "checkpoints").iterdir()), 1)

  def test_first_losses_are_those_of_the_reference(self):
    first = {name: scripts.rows(_workdir(name))[0] for name in ALGORITHMS}
    # The policy is the reference: h is 0, and so is z.
    np.testing.assert_allclose(first["dpo"]["dpo/loss"], np.log(2), rtol=1e-5)
    np.testing.assert_allclose(
      first["ipo"]["dpo/loss"], (1 / (2 * 0.1)) ** 2, rtol=1e-5
    )
    np.testing.assert_allclose(
      scripts.rows(_workdir("ipo-messages"))[0]["dpo/loss"], 25.0, rtol=1e-5
    )
    kto = scripts.rows(_workdir("kto-pairs"))[0]
    np.testing.assert_allclose(kto["kto/loss"], 0.5 * 1.01 / 2, rtol=1e-5)
    np.testing.assert_allclose(kto["kto/reference_point"], 0, atol=1e-5)

  def test_replies_are_good_from_a_threshold_on(self):
    rows = word_lists.logged("train", 0, num=64)
    rewards = np.ravel([row["rewards"] for row in rows])
    good = rewards[batches.batch_indices(128, 16, 0, seed=0)] >= 0.5
    self.assertBetween(good.mean(), 0.1, 0.9)
    # 1 - σ(0) = 1/2, three times for a bad one.
    np.testing.assert_allclose(
      scripts.rows(_workdir("kto"))[0]["kto/loss"],
      0.5 * np.mean(np.where(good, 1, 3)),
      rtol=1e-5,
    )

  @parameterized.parameters(
    # Name of the file and how each row's candidates are ranked.
    ("dpo-ranked", "ranked", lambda rewards: [0, len(rewards) - 1]),
    ("pro-ranked", "ranked", lambda r: np.argsort(-np.array(r))),
    ("simpo-pairs", "pairs", lambda _: [0, 1]),
    ("orpo-tied", "tied", lambda r: None if r == [1, 1] else [1, 0]),
  )
  def test_replies_are_compared_in_the_order_asked_for(self, run, file, rank):
    pairs, rewards = [], []
    for row in _content(file):
      scores = row.get("rewards")
      replies = row.get("candidates") or [row["chosen"], row["rejected"]]
      order = rank(scores)
      if order is not None:
        pairs.append([(row["prompt"], replies[k]) for k in order])
        rewards.append([scores[k] for k in order] if scores else [0.0, 0.0])
    log_probs, mask = _arrays(pairs)
    first = scripts.rows(_workdir(run))[0]
    name = run.partition("-")[0]
    if name == "dpo":
      for k, metric in enumerate(("chosen_log_prob", "rejected_log_prob")):
        expected = log_probs[:, k].sum(axis=1).mean()
        np.testing.assert_allclose(first[f"dpo/{metric}"], expected, rtol=1e-5)
      return
    if name == "pro":
      rewards = np.array([[*row, 0.0][:3] for row in rewards])
      expected = oracles_offline.pro_loss(log_probs, rewards, mask, 0.05)
      self.assertEqual(first["pro/misordered_fraction"], 0)
    elif name == "simpo":
      expected = oracles_offline.simpo_loss(log_probs, mask, 2.0, 1.0)
    else:
      expected = oracles_offline.orpo_loss(log_probs, mask, 0.1)
    np.testing.assert_allclose(first[LOSSES[name]], expected, rtol=1e-5)

  def test_published_mask_scores_other_tokens(self):
    rows = word_lists.logged("train", 0, num=64)
    rows = [rows[i] for i in batches.batch_indices(64, 8, 0, seed=0)]
    orders = [np.argsort(-np.array(row["rewards"])) for row in rows]
    pairs = [
      [(row["prompt"], row["candidates"][k]) for k in order]
      for row, order in zip(rows, orders, strict=True)
    ]
    rewards = np.array([np.sort(row["rewards"])[::-1] for row in rows])
    log_probs, mask = _arrays(pairs)
    correct = oracles_offline.pro_loss(log_probs, rewards, mask, 0.05)
    first = scripts.rows(_workdir("pro"))[0]
    self.assertGreater(abs(first["pro/loss"] - correct), 0.001)

  def test_reference_point_is_that_of_other_prompts(self):
    workdir, rows = _workdir("kto-pairs"), _content("pairs")
    drawn = batches.batch_indices(8, 8, 4, seed=0)
    pairs = [
      (rows[i]["prompt"], rows[follows][reply])
      for i, follows in zip(drawn, np.roll(drawn, -1), strict=True)
      for reply in ("chosen", "rejected")
    ]
    self.assertLen({row["prompt"] for row in rows}, 8)
    after = checkpoint.restore_params(workdir, step=4)["policy"]
    gains = [
      a.sum() - b.sum()
      for a, b in zip(
        _log_probs(after, pairs),
        _log_probs(_reference().params, pairs),
        strict=True,
      )
    ]
    self.assertGreater(np.mean(gains), 0.001)
    np.testing.assert_allclose(
      scripts.rows(workdir)[4]["kto/reference_point"], np.mean(gains), rtol=1e-3
    )

  def test_reference_point_leaves_out_the_same_prompt(self):
    rows = scripts.rows(_workdir("kto-alike"))[:-1]
    self.assertEqual([row["kto/reference_point"] for row in rows], [0.0] * 6)
    self.assertGreater(rows[-1]["kto/desirable_reward"], 0.01)

  def test_learns_which_reply_is_better(self):
    rows = scripts.rows(_workdir("learns"))
    late = rows[-31:-1]
    self.assertLess(abs(rows[0]["dpo/margin"]), 1e-5)
    self.assertGreater(np.mean([row["dpo/margin"] for row in late]), 0.1)
    self.assertGreater(np.mean([row["dpo/accuracy"] for row in late]), 0.65)
    self.assertLess(np.mean([row["dpo/loss"] for row in late]), 0.66)

  def test_dev_reward_selects(self):
    workdir = _workdir("dpo")
    rows = [row for row in scripts.rows(workdir) if "dev/reward" in row]
    self.assertEqual([row["step"] for row in rows], [0, 2, 4, 6])
    # The first of the highest, unless none is better than the reference.
    rewards = [row["dev/reward"] for row in rows]
    best = rows[int(np.argmax(rewards))]["step"] or 6
    folder = workdir / "best" / "checkpoints"
    self.assertEqual([path.name for path in folder.iterdir()], [str(best)])
    found = hf.load(str(workdir / "best")).params
    kept = checkpoint.restore_params(workdir / "best", step=best)["policy"]
    self.assertEqual(
      checkpoint.fingerprint(found), checkpoint.fingerprint(kept)
    )


class SameTest(parameterized.TestCase):
  """What must not change a run does not."""

  @parameterized.parameters("dpo-micro", "kto-mesh")
  def test_splitting_changes_rounding_alone(self, run):
    name = {"dpo-micro": "dpo", "kto-mesh": "kto-pairs"}[run]
    whole, split = _workdir(name), _workdir(run)
    self.assertLess(scripts.largest_gap(whole, split), scripts.ROUNDING)
    self.assertGreater(
      scripts.largest_gap(whole, _policy()), 50 * scripts.ROUNDING
    )
    for a, b in zip(scripts.rows(whole), scripts.rows(split), strict=True):
      # A step has an accuracy once the policy is not the reference.
      clock = {"tokens_per_second", *(["dpo/accuracy"] * (a["step"] == 0))}
      for metric in set(a) - clock:
        np.testing.assert_allclose(a[metric], b[metric], rtol=1e-3, atol=1e-4)

  def test_cache_gives_the_same_bits(self):
    self.assertEqual(
      scripts.steady(scripts.rows(_workdir("dpo-cache"))),
      scripts.steady(scripts.rows(_workdir("dpo"))),
    )

  def test_killed_run_ends_with_the_same_bits(self):
    whole, killed = _workdir("kto-pairs"), scripts.scratch() / "killed"
    file = f"--data={_files()['pairs']}"
    flags = (*TINY, f"--policy={_policy()}", *KTO, file)
    scripts.run_until_killed(SCRIPT, killed, *flags, num_rows=4)
    self.assertLess(len(scripts.rows(killed)), 7)
    out = scripts.run(SCRIPT, killed, *flags).stdout
    self.assertRegex(out, "8 comparisons out of 9 rows")
    self.assertRegex(out, r"1 of 9 rows have fewer .*pairs.jsonl:4\.")
    self.assertEqual(
      scripts.steady(scripts.rows(killed)), scripts.steady(scripts.rows(whole))
    )
    for folder in (".", "best"):
      self.assertEqual(
        scripts.fingerprint(killed / folder),
        scripts.fingerprint(whole / folder),
      )


class BadInputTest(absltest.TestCase):
  def test_each_gets_a_line_that_says_what_is_wrong(self):
    _, errors = _outcomes()
    for (flags, message), error in zip(_bad_flags(), errors, strict=True):
      with self.subTest(" ".join(flags)):
        self.assertRegex(
          str(error), f"(?s)^(IllegalFlag)?ValueError: .*{message}"
        )


if __name__ == "__main__":
  absltest.main()
