"""Evaluation by many samples of a question, run as a user runs it."""

import collections
import functools
import json
import math

import jax
import numpy as np
from absl.testing import absltest

from rljax.models import hf
from rljax.scoring import reward_models
from rljax.storage import locks
from rljax.tasks import merge_sums
from rljax.text import files as files_lib
from rljax.text import tokens
from tests import scripts

SFT = "experiments/sft.py"
EVALUATE = "experiments/evaluate.py"

SUMS = "num_terms=3,max_term=5"
NUM_PROMPTS, NUM_SAMPLES = 12, 6
TINY = (
  "--task=merge_sums",
  f"--task_options={SUMS}",
  "--split=train",
  f"--num_prompts={NUM_PROMPTS}",
  "--batch_size=30",  # Five prompts at a time: the last batch is not full.
  "--max_length=10",  # Nine characters and the end, no more.
  "--stop_at_eos",
  f"--num_samples={NUM_SAMPLES}",
  "--k=1,2,6",
)


def setUpModule():
  scripts.without_pictures()


def tearDownModule():
  scripts.remove_scratch()


@functools.cache
def _policy():
  """A model that gets some sums right."""
  workdir = scripts.scratch() / "policy"
  scripts.run(
    SFT,
    workdir,
    "--task=merge_sums",
    f"--task_options={SUMS}",
    "--tokenizer=character",
    "--num_examples=24",
    "--num_eval_prompts=8",
    "--hidden_size=32",
    "--num_layers=1",
    "--max_positions=32",
    "--batch_size=24",
    "--steps=100",
    "--eval_every=100",
    "--save_every=100",
    "--learning_rate=1e-2",
  )
  return workdir


@functools.cache
def _other(seed):
  """The same one with a little noise, the more the larger the seed."""
  directory = scripts.scratch() / f"other-{seed}"
  loaded = hf.load(_policy())
  rng = np.random.default_rng(seed)
  params = jax.tree.map(
    lambda x: x + np.float32(0.03 * seed * rng.normal(size=x.shape)),
    loaded.params,
  )
  hf.save(directory, loaded.model, params, loaded.tokenizer)
  return directory


@functools.cache
def _classifier():
  """A reward model that knows nothing, but has an opinion."""
  directory = scripts.scratch() / "classifier"
  made = hf.classifier_from(hf.load(_policy()), seed=1)
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: x + np.float32(0.3 * rng.normal(size=x.shape)), made.params
  )
  hf.save_classifier(directory, made.model, params, made.tokenizer)
  return directory


def _flags():
  noisy = f"noisy={_other(1)},noisy={_other(2)}"
  return (
    *TINY,
    f"--policies=start={_policy()},{noisy}",
    f"--reference={_policy()}",
    f"--rerank_model={_classifier()}",
    "--reward_length=32",
    "--new_vs=start",
  )


@functools.cache
def _evaluation():
  workdir = scripts.scratch() / "evaluation"
  return workdir, scripts.run(EVALUATE, workdir, *_flags())


def _json(workdir, name):
  return json.loads((workdir / name).read_text())


def _groups(rows):
  """(label, seed) -> question -> its samples; greedy ones apart."""
  greedy, sampled = (
    collections.defaultdict(lambda: collections.defaultdict(list))
    for _ in range(2)
  )
  for row in rows:
    side = greedy if row["greedy"] else sampled
    side[row["arm"], row["seed"]][row["index"]].append(row)
  return greedy, sampled


def _vote(samples, weights):
  """By hand: the expected accuracy of a random one of the winners."""
  votes = collections.Counter()
  for sample, weight in zip(samples, weights, strict=True):
    if sample["parts"]["answer"] is not None:
      votes[sample["parts"]["answer"]] += weight
  winners = [
    answer
    for answer in votes
    if math.isclose(votes[answer], max(votes.values()), rel_tol=1e-12)
  ]
  truth = samples[0]["parts"]["truth"]
  return sum(answer == truth for answer in winners) / max(len(winners), 1)


class ReasoningTest(absltest.TestCase):
  def test_samples_are_what_the_task_says_of_them(self):
    workdir, _ = _evaluation()
    rows = scripts.rows(workdir, "samples.jsonl")
    self.assertLen(rows, 3 * NUM_PROMPTS * (1 + NUM_SAMPLES))
    prompts = merge_sums.prompts(
      "train", 0, num=NUM_PROMPTS, num_terms=3, max_term=5
    )
    kinds = collections.Counter()
    for row in rows:
      self.assertEqual(row["prompt"], prompts[row["index"]])
      score, parts = merge_sums.score(row["prompt"], row["response"])
      right = parts["is_correct"] and row["finished"]
      self.assertEqual(row["parts"]["is_correct"], right)
      self.assertEqual(row["reward"], score if row["finished"] else 0)
      if not row["finished"]:
        self.assertIsNone(row["parts"]["answer"])
      kinds[right, row["finished"]] += 1
    # There is something to tell apart.
    for kind in ((True, True), (False, True), (False, False)):
      self.assertGreater(kinds[kind], 0, kinds)
    _, sampled = _groups(rows)
    for questions in sampled.values():
      self.assertEqual(sorted(questions), list(range(NUM_PROMPTS)))
      for samples in questions.values():
        numbers = [row["sample"] for row in samples]
        self.assertEqual(numbers, list(range(NUM_SAMPLES)))

  def test_metrics_by_hand(self):
    workdir, _ = _evaluation()
    metrics = _json(workdir, "metrics.json")
    self.assertEqual(list(metrics), ["start", "noisy"])
    greedy, sampled = _groups(scripts.rows(workdir, "samples.jsonl"))
    seen = {
      i: {r["response"] for r in s} for i, s in sampled["start", 0].items()
    }
    for (label, seed), questions in sampled.items():
      expected = collections.defaultdict(list)
      pooled = collections.Counter()
      for i, samples in questions.items():
        ok = [row["parts"]["is_correct"] for row in samples]
        valid = [row["parts"]["is_valid"] for row in samples]
        scores = [row["rerank_score"] for row in samples]
        (first,) = greedy[label, seed][i]
        expected["maj@1"].append(first["parts"]["is_correct"])
        expected["p@1"].append(np.mean(ok))
        expected["pass@1"].append(np.mean(ok))
        wrong = NUM_SAMPLES - sum(ok)
        expected["pass@2"].append(1 - math.comb(wrong, 2) / 15)
        expected["pass@6"].append(any(ok))
        expected["solved"].append(any(ok))
        expected["maj@6"].append(_vote(samples, [1] * NUM_SAMPLES))
        expected["weighted maj@6"].append(_vote(samples, scores))
        best = max(
          (row for row in samples if row["parts"]["answer"] is not None),
          key=lambda row: row["rerank_score"],
          default=None,
        )
        expected["rerank@6"].append(bool(best and best["parts"]["is_correct"]))
        traces = {
          row["response"] for row in samples if row["parts"]["is_correct"]
        }
        expected["unique correct"].append(len(traces))
        expected["unique valid"].append(
          len({row["response"] for row in samples if row["parts"]["is_valid"]})
        )
        expected["unfinished"].append(
          np.mean([not r["finished"] for r in samples])
        )
        expected["no answer"].append(
          np.mean(
            [r["finished"] and r["parts"]["answer"] is None for r in samples]
          )
        )
        expected["characters"].append(
          np.mean([len(r["response"]) for r in samples])
        )
        pooled["correct"] += sum(ok)
        pooled["valid"] += sum(valid)
        pooled["traces"] += len(traces)
        pooled["new"] += len(traces - seen[i])
      expected = {name: np.mean(values) for name, values in expected.items()}
      expected["valid of correct"] = pooled["valid"] / pooled["correct"]
      if label != "start":
        expected["new traces"] = pooled["new"] / pooled["traces"]
      found = {name: values[seed] for name, values in metrics[label].items()}
      found.pop("reference log-prob")
      self.assertEqual(found.keys(), expected.keys())
      for name, value in expected.items():
        self.assertAlmostEqual(found[name], value, places=6, msg=name)

  def test_scores_and_log_probs(self):
    workdir, _ = _evaluation()
    _, sampled = _groups(scripts.rows(workdir, "samples.jsonl"))
    questions = sampled["noisy", 1]
    scorer = reward_models.RewardModel(str(_classifier()), max_length=32)
    rows = [row for samples in questions.values() for row in samples][:8]
    scores, _ = scorer.score_batch(
      [row["prompt"] for row in rows], [row["response"] for row in rows]
    )
    np.testing.assert_allclose(
      [row["rerank_score"] for row in rows], scores, rtol=1e-4
    )
    # The log-probability of a trace, its end token included, by one pass.
    loaded = hf.load(_policy())

    @jax.jit
    def log_softmax(ids):
      variables = {"params": loaded.params}
      hidden = loaded.model.apply(variables, ids, ids >= 0)
      logits = loaded.model.apply(variables, hidden, method="logits")
      return jax.nn.log_softmax(logits[0])

    log_probs = []
    for samples in questions.values():
      for text in {r["response"] for r in samples if r["parts"]["is_correct"]}:
        ((prompt, response),) = tokens.encode_pairs(
          loaded.tokenizer,
          [(samples[0]["prompt"], text)],
          max_prompt_length=32,
          max_response_length=32,
        )
        table = np.asarray(log_softmax(np.array([prompt + response])))
        rows = range(len(prompt) - 1, len(prompt) + len(response) - 1)
        log_probs.append(table[rows, response].sum())
    found = _json(workdir, "metrics.json")["noisy"]["reference log-prob"][1]
    self.assertAlmostEqual(found, np.mean(log_probs), places=3)

  def test_tables(self):
    workdir, done = _evaluation()
    metrics, summary = (
      _json(workdir, "metrics.json"),
      _json(workdir, "summary.json"),
    )
    self.assertEqual(summary["noisy"]["seeds"], 2)
    self.assertEqual(summary["noisy"]["K' of new traces"], NUM_SAMPLES)
    self.assertNotIn("new traces", summary["start"])
    differences = _json(workdir, "differences.json")
    self.assertEqual(list(differences), ["noisy"])
    for name in ("maj@1", "p@1", "maj@6", "pass@2", "unique correct"):
      mean = np.mean(metrics["noisy"][name])
      self.assertStartsWith(summary["noisy"][name], f"{mean:.3f} [")
      difference = mean - metrics["start"][name][0]
      self.assertStartsWith(differences["noisy"][name], f"{difference:.3f} [")
    # More samples than these would be needed to call a trace new.
    self.assertRegex(" ".join(done.stdout.split()), "less than 4 K = 24")

  def test_questions(self):
    workdir, _ = _evaluation()
    rows = scripts.rows(workdir, "questions.jsonl")
    self.assertLen(rows, NUM_PROMPTS)
    metrics = _json(workdir, "metrics.json")
    for label, num_seeds in (("start", 1), ("noisy", 2)):
      for seed in range(num_seeds):
        found = [row["policies"][label][seed] for row in rows]
        mean = lambda name, found=found: np.mean([row[name] for row in found])
        value = lambda name, a=label, s=seed: metrics[a][name][s]
        self.assertAlmostEqual(mean("greedy"), value("maj@1"))
        self.assertAlmostEqual(mean("vote"), value("maj@6"))
        self.assertAlmostEqual(mean("correct") / NUM_SAMPLES, value("p@1"))
    greedy = _json(workdir, "greedy.json")
    self.assertEqual(list(greedy), ["noisy 0, start 0", "noisy 1, start 0"])
    self.assertNotEqual(*greedy.values())
    for seed, counts in enumerate(greedy.values()):
      pairs = [
        tuple(
          row["policies"][a][s]["greedy"]
          for a, s in (("noisy", seed), ("start", 0))
        )
        for row in rows
      ]
      only, other = pairs.count((True, False)), pairs.count((False, True))
      self.assertEqual(counts["both right"], pairs.count((True, True)))
      self.assertEqual(counts["only the former"], only)
      self.assertEqual(counts["only the latter"], other)
      self.assertEqual(counts["neither"], pairs.count((False, False)))
      n = only + other
      tail = sum(math.comb(n, i) for i in range(min(only, other) + 1))
      self.assertAlmostEqual(
        counts["p (McNemar, exact)"], min(1, 2 * tail / 2**n)
      )

  def test_starts_again_where_it_was_stopped(self):
    workdir, _ = _evaluation()
    names = ("samples.jsonl", "metrics.json", "summary.json", "questions.jsonl")
    before = {name: (workdir / name).read_bytes() for name in names}
    drawn = workdir / "samples"
    files = sorted(path.name for path in drawn.iterdir())
    self.assertLen(files, 12)  # Greedy, sampled; a manifest for each.
    self.assertIn("noisy-1-sampled.jsonl", files)
    # Torn in the middle of a line, missing, and of another policy.
    torn = drawn / "noisy-1-sampled.jsonl"
    torn.write_bytes(torn.read_bytes()[:3000])
    (drawn / "noisy-0-greedy.jsonl").unlink()
    manifest = drawn / "noisy-0-sampled.json"
    made_of = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**made_of, "reference": "another"}))
    # Nothing else is drawn: a mark in a file that is whole stays.
    marked = drawn / "start-0-greedy.jsonl"
    rows = scripts.rows(drawn, marked.name)
    files_lib.write_jsonl(marked, [{**row, "mark": 1} for row in rows])
    done = scripts.run(EVALUATE, workdir, *_flags())
    self.assertNotIn("start-0", done.stdout)
    self.assertIn(
      "noisy-0-sampled.jsonl is of another policy or other flags", done.stdout
    )
    self.assertEqual(json.loads(manifest.read_text()), made_of)
    files_lib.write_jsonl(marked, rows)
    text = (workdir / "samples.jsonl").read_bytes()
    self.assertEqual(
      text.replace(b', "mark": 1', b""), before.pop("samples.jsonl")
    )
    for name, content in before.items():
      self.assertEqual((workdir / name).read_bytes(), content, name)

  def test_other_temperature_and_a_file_of_known_traces(self):
    # Its own samples are all known; at another temperature it is not itself.
    first, _ = _evaluation()
    known = first / "samples" / "start-0-sampled.jsonl"
    runs = [
      (
        scripts.scratch() / f"again-{name}",
        *TINY,
        f"--policies=again={_policy()}",
        f"--new_vs_samples={known}",
        *flags,
      )
      for name, flags in (
        ("same", ["--ties=first_seen", "--k="]),
        ("hot", ["--temperature=3", "--batch_size=6"]),
        # One token less than a right response and its end have.
        ("cut", ["--max_length=9"]),
      )
    ]
    other = scripts.scratch() / "other.jsonl"
    files_lib.write_jsonl(other, [{"prompt": "01+01=", "response": "#02"}])
    # What only shows when all is drawn.
    runs.append((*runs[0], f"--new_vs_samples={other}"))
    *errors, error = scripts.drive(EVALUATE, runs)
    self.assertEqual(errors, [None] * 3)
    self.assertIn("other.jsonl has no sample for the prompt '0", error)
    same, hot, cut = (
      _json(run[0], "metrics.json")["again"] for run in runs[:3]
    )
    start = _json(first, "metrics.json")["start"]
    self.assertEqual(same["new traces"], [0.0])
    self.assertIn("pass@6", same)
    self.assertNotIn("pass@2", same)
    self.assertNotIn("rerank@6", same)
    for name in ("maj@1", "p@1", "unique correct", "characters"):
      self.assertEqual(same[name], start[name])
    self.assertEqual(hot["maj@1"], start["maj@1"])
    self.assertLess(hot["p@1"][0], start["p@1"][0])
    # The answers are there, but the responses have not ended.
    rows = scripts.rows(runs[2][0], "samples.jsonl")
    right = [merge_sums.score(r["prompt"], r["response"])[0] for r in rows]
    self.assertGreater(sum(right), 0)
    for name in ("maj@1", "p@1", "maj@6", "pass@6", "unique correct"):
      self.assertEqual(cut[name], [0.0])
    self.assertGreater(cut["unfinished"][0], 0.5)
    self.assertEqual(cut["valid of correct"], [None])
    summary = _json(runs[2][0], "summary.json")["again"]
    self.assertEqual(summary["new traces"], "-")

  def test_bad_input(self):
    several = scripts.scratch() / "several.jsonl"
    rows = [{"prompt": "01+01=", "response": "#02", "arm": arm} for arm in "ab"]
    files_lib.write_jsonl(several, rows)
    policy = f"--policies=a={_policy()}"
    cases = [
      (
        ["--metrics=reasoning", "--num_samples=1", "--k="],
        "several --num_sampl",
      ),
      (["--metrics=text"], "got --metrics=text, --num_samples=6"),
      (["--metrics=reasoning,text"], "--metrics=reasoning stands alone"),
      (["--nostop_at_eos"], "give --stop_at_eos or --stop_strings"),
      (["--k=1,7"], "'7'.*: --k must be whole numbers from 1 to --num_samples"),
      (["--k=0"], "'0'.*: --k must be"),
      (["--k=all"], "'all'.*: --k must be"),
      (["--new_vs=b"], "--new_vs must be one of a, got b"),
      (["--new_vs=a", f"--new_vs_samples={several}"], "not both"),
      ([f"--reward_model={_classifier()}"], "give --rerank_model"),
      (["--reference=x,y"], "--reference names 2 models, and a has 1 seeds"),
      ([policy + f",a/b={_policy()},a_b={_policy()}"], "would share files"),
      (["--num_samples=0"], "--num_samples=0: .*a positive integer"),
      (["--task=word_lists", "--task_options="], "score has the parts answer"),
      ([f"--new_vs_samples={several}"], "holds several policies"),
      (["--task_options=num_term=3"], "no option 'num_term'; it has "),
      (["--policies=a"], "a is neither"),
      (["--policies=a="], "got 'a=' without a label or without a model"),
    ]
    runs = [
      (scripts.scratch() / f"bad-{i}", *TINY, policy, *flags)
      for i, (flags, _) in enumerate(cases)
    ]
    errors = scripts.drive(EVALUATE, runs)
    for (flags, message), error in zip(cases, errors, strict=True):
      with self.subTest(" ".join(map(str, flags))):
        self.assertRegex(
          str(error), f"(?s)^(IllegalFlag)?ValueError: .*{message}"
        )


class WorkdirTest(absltest.TestCase):
  FLAGS = (
    "--task=merge_sums",
    f"--task_options={SUMS}",
    "--split=train",
    "--num_prompts=6",
    "--batch_size=6",
    "--max_length=10",
    "--stop_at_eos",
  )

  def test_another_evaluation_is_refused_as_another_run_is(self):
    workdir, _ = _evaluation()
    texts = scripts.scratch() / "texts"
    flags = (*self.FLAGS, f"--policies=start={_policy()}")

    def content(folder):
      return {
        path: path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
      }

    # A mistake leaves nothing behind that would keep the right flags out.
    gone = scripts.scratch() / "gone"
    done = scripts.run(
      EVALUATE, texts, *self.FLAGS, f"--policies=a={gone}", ok=False
    )
    self.assertRegex(done.stderr, f"^evaluate.py: .*{gone}")
    self.assertEqual(done.returncode, 1)
    self.assertEqual(content(texts), {})
    scripts.run(EVALUATE, texts, *flags)
    before = content(texts)
    names = {path.name for path in before}
    self.assertContainsSubset(("flags.json", "summary.json"), names)
    # Nothing is logged step by step, and no folder is made for it.
    self.assertFalse((texts / "tensorboard").exists())
    scripts.run(EVALUATE, texts, *flags)
    self.assertEqual(content(texts), before)
    for folder, other, messages in (
      (texts, (*flags, "--nogreedy"), ["greedy: was true, now false"]),
      (
        workdir,
        (*_flags(), "--temperature=2", "--ties=first_seen"),
        ["temperature: was 1.0, now 2.0", "ties: was"],
      ),
    ):
      before = content(folder)
      done = scripts.run(EVALUATE, folder, *other, ok=False)
      self.assertEqual(done.returncode, 1)
      self.assertNotIn("Traceback", done.stderr)
      for message in ("belongs to a run with other flags", *messages):
        self.assertIn(message, done.stderr)
      self.assertEqual(content(folder), before)

  def test_two_at_once_are_refused(self):
    workdir = scripts.scratch() / "held"
    workdir.mkdir()
    with locks.take(workdir):
      (error,) = scripts.drive(
        EVALUATE, [(workdir, *self.FLAGS, f"--policies=a={_policy()}")]
      )
    self.assertRegex(error, "^ValueError: .*is being written by process")
    self.assertEqual([path.name for path in workdir.iterdir()], [".lock"])


if __name__ == "__main__":
  absltest.main()
