"""Lengths of prompts and responses in PPO, and what its samples are like."""

import collections
import functools
import importlib.util
import json
import pathlib
import shutil
import string

import jax
import numpy as np
import pytest
from absl.testing import absltest

from rljax.evaluation import metrics
from rljax.models import configs, fresh, gpt2, hf
from rljax.tasks import tokenizers, word_lists
from rljax.text import batches, files
from tests import conftest, scripts, tiny

PPO = "experiments/ppo.py"
EVALUATE = "experiments/evaluate.py"
TINY = (
  "--num_prompts=64",
  "--num_eval_prompts=30",
  "--batch_size=16",
  "--num_samples=2",
  "--steps=3",
  "--save_every=2",
  "--eval_every=3",
  "--samples_every=1",
  "--learning_rate=1e-3",
  "--stop_at_eos=false",
  # As the numbers below were found.
  "--warmup=0",
  "--max_grad_norm=0",
)
WORDS = (
  *TINY,
  "--task=word_lists",
  "--max_length=6",
  "--min_length=2",
)


def setUpModule():
  scripts.without_pictures()


def tearDownModule():
  scripts.remove_scratch()


@functools.cache
def _policy():
  """A model that writes words, so that a task tells how long a response is.

  Blanks belong to the word behind them. Pieces without one are for prompts.
  """
  words = [" not", *(f" {number}" for number in word_lists.LENGTHS)]
  for topic in word_lists.TOPICS.values():
    words += [f" {word}" for word in topic.split()]
  pieces = [*string.ascii_lowercase, *string.digits, ":", " "]
  pieces += word_lists.TOPICS
  tokenizer = tokenizers.of_words([*words, *pieces], " ?[a-z0-9]+|.")
  config = tiny.gpt2_config(vocab_size=len(tokenizer))
  params = tiny.params(config)
  # Its last norm adds 20 to one number, which says whether a token is a word.
  table = params["wte"]["embedding"].at[:, 0].set(-1.0)
  params["wte"]["embedding"] = table.at[: len(words), 0].set(1.0)
  params["ln_f"]["bias"] = params["ln_f"]["bias"].at[0].set(20.0)
  folder = scripts.scratch() / "policy"
  hf.save(folder, gpt2.GPT2(config), params, tokenizer)
  return folder


@functools.cache
def _letters():
  """A model that knows nothing; one token is one character."""
  characters = [chr(i) for i in range(32, 127)]
  tokenizer = tokenizers.of_words(characters, ".")
  config = tiny.gpt2_config(vocab_size=len(tokenizer))
  folder = scripts.scratch() / "letters"
  hf.save(folder, gpt2.GPT2(config), tiny.params(config), tokenizer)
  return folder


@functools.cache
def _pythia():
  """A random model with the config.json of Pythia-410m, but for its sizes.

  A sixteenth of its width and two of its 24 layers; of 128 rows of the
  vocabulary, as of its 50,304, the last are no tokens. Four tokens are words
  that VADER knows, the others letters.
  """
  characters = [chr(i) for i in range(32, 127)]
  words = [" good", " great", " bad", " awful"]
  tokenizer = tokenizers.of_words([*words, *characters], f"{'|'.join(words)}|.")
  config = {
    "architectures": ["GPTNeoXForCausalLM"],
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "gelu",
    "hidden_size": 1024 // 16,
    "initializer_range": 0.02,
    "intermediate_size": 4096 // 16,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 2048,
    "model_type": "gpt_neox",
    "num_attention_heads": 16 // 4,
    "num_hidden_layers": 2,
    "rotary_emb_base": 10000,
    "rotary_pct": 0.25,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "use_cache": True,
    "use_parallel_residual": True,
    "vocab_size": 128,
  }
  settings = configs.settings("float32", "float32", False)
  model = configs.build(config, "Pythia", settings)
  folder = scripts.scratch() / "pythia"
  hf.save(folder, model, fresh.initial_params(model, 0), tokenizer)
  return folder


@functools.cache
def _finished():
  workdir = scripts.scratch() / "finished"
  scripts.run(PPO, workdir, *WORDS, f"--policy={_policy()}")
  return workdir


@functools.cache
def _reviews():
  """A folder of made-up reviews."""
  folder = scripts.scratch() / "reviews"
  for split in ("train", "validation", "test"):
    texts = [
      f"review {i} of the {split} split is neither short nor long"
      for i in range(40)
    ]
    files.write_jsonl(
      folder / f"{split}.jsonl", [{"text": text} for text in texts]
    )
  return folder


def _lengths(workdir):
  """By step, the lengths of the responses that were written down."""
  lengths = collections.defaultdict(list)
  for sample in scripts.rows(workdir, "samples.jsonl"):
    lengths[sample["step"]].append(len(sample["response_ids"]))
  return lengths


class LengthsTest(absltest.TestCase):
  def test_each_response_has_a_limit_of_its_own(self):
    lengths = _lengths(_finished())
    self.assertEqual(sorted(lengths), [0, 1, 2])
    for step, row in enumerate(scripts.rows(_finished())[:3]):
      self.assertLen(lengths[step], 32)
      # Of 32 draws, one of five lengths is missing once in 250 times.
      self.assertEqual(set(lengths[step]), {2, 3, 4, 5, 6})
      self.assertAlmostEqual(
        row["response/length"], np.mean(lengths[step]), places=5
      )
      self.assertAlmostEqual(
        row["task/words"], np.mean(lengths[step]), places=5
      )
      self.assertEqual(row["response/finished"], 0.0)
    self.assertNotEqual(lengths[0], lengths[1])
    # Two samples of one prompt do not share theirs.
    self.assertNotEqual(lengths[0][::2], lengths[0][1::2])

  def test_held_out_replies_have_the_same_limits_every_time(self):
    words = [
      row["eval/words"]
      for row in scripts.rows(_finished())
      if "eval/words" in row
    ]
    self.assertLen(words, 2)
    self.assertEqual(words[0], words[1])
    # Uniform from 2 to 6: four standard deviations are 1.03.
    self.assertBetween(words[0], 2.97, 5.03)
    self.assertNotEqual(words[0], 4.0)  # All alike.

  @pytest.mark.slow
  def test_other_devices_and_a_stop_change_nothing(self):
    again = scripts.scratch() / "again"
    shutil.copytree(_finished(), again)
    shutil.rmtree(again / "checkpoints" / "3")
    scripts.run(PPO, again, *WORDS, f"--policy={_policy()}")
    self.assertEqual(
      scripts.fingerprint(again), scripts.fingerprint(_finished())
    )
    apart = scripts.scratch() / "apart"
    flags = (*WORDS, f"--policy={_policy()}", "--steps=1", "--preflight=off")
    scripts.run(PPO, apart, *flags, devices=4)
    self.assertEqual(_lengths(apart)[0], _lengths(_finished())[0])

  def test_from_the_longest_on_is_as_without(self):
    prints = []
    for shortest in (0, 6):
      workdir = scripts.scratch() / f"from_{shortest}"
      scripts.run(
        PPO,
        workdir,
        *WORDS,
        f"--policy={_policy()}",
        f"--min_length={shortest}",
        "--steps=2",
        "--preflight=off",
      )
      self.assertEqual(set(_lengths(workdir)[1]), {6})
      prints.append(scripts.fingerprint(workdir))
    self.assertEqual(*prints)

  def test_what_is_wrong(self):
    cases = [
      (
        ["--min_length=7"],
        "min_length=7, max_length=6: .* not be more than --max_length",
      ),
      (["--min_length=-1"], "min_length=-1: .*non-negative"),
      (
        ["--task_options=tokenizer=policy"],
        "no option 'tokenizer'; it has num",
      ),
    ]
    runs = [
      [scripts.scratch() / "bad", *WORDS, f"--policy={_policy()}", *flags]
      for flags, _ in cases
    ]
    errors = scripts.drive(PPO, runs)
    for (flags, message), error in zip(cases, errors, strict=True):
      with self.subTest(flags[-1]):
        self.assertRegex(
          error, f"^(ValueError|IllegalFlagValueError): .*{message}"
        )


@pytest.mark.skipif(
  importlib.util.find_spec("vaderSentiment") is None,
  reason='needs vaderSentiment: pip install -e ".[sentiment]"',
)
class SentimentTest(absltest.TestCase):
  @pytest.mark.slow
  def test_flagfile(self):
    """As for a CPU, but with a tiny model and reviews of our own."""
    workdir = scripts.scratch() / "sentiment"
    scripts.run(
      PPO,
      workdir,
      "--flagfile=experiments/flags/padula/sentiment_cpu.flags",
      *TINY,
      f"--policy={_letters()}",
      f"--task_options=data={_reviews()},tokenizer=policy",
      "--minibatch_size=0",
      "--micro_batch_size=0",
      "--steps=1",
      "--preflight=off",
    )
    samples = scripts.rows(workdir, "samples.jsonl")
    self.assertLen(samples, 32)
    for sample in samples:
      self.assertBetween(len(sample["prompt"]), 2, 7)
      self.assertStartsWith("review ", sample["prompt"])
      self.assertBetween(len(sample["response_ids"]), 4, 15)
      self.assertEqual(sample["reward"], sample["parts"]["compound"])
    row = scripts.rows(workdir)[0]
    self.assertAlmostEqual(row["reward/mean"], row["task/compound"], places=5)

  def _pythia_learns(self, policy, *flags):
    workdir = scripts.scratch() / f"pythia_{pathlib.Path(policy).name}"
    scripts.run(
      PPO,
      workdir,
      "--flagfile=experiments/flags/padula/sentiment.flags",
      f"--policy={policy}",
      f"--task_options=data={_reviews()},tokenizer=policy",
      *("--num_prompts=40", "--num_eval_prompts=8", "--samples_every=1"),
      *("--batch_size=16", "--minibatch_size=16", "--epochs=2"),
      *flags,
    )
    samples = scripts.rows(workdir, "samples.jsonl")
    for sample in samples:
      self.assertBetween(len(sample["response_ids"]), 4, 15)
      self.assertLess(max(sample["response_ids"]), 99)  # No unused rows.
    self.assertNotEmpty(samples)
    losses = [r["loss"] for r in scripts.rows(workdir) if "loss" in r]
    self.assertNotEmpty(losses)
    self.assertTrue(np.isfinite(losses).all())
    learnt = hf.load(workdir)
    self.assertEqual(learnt.model.config.architecture, "GPTNeoXForCausalLM")
    self.assertEqual(learnt.model.config.vocab_size, 128)
    old = hf.load(policy).params
    for path, leaf in jax.tree_util.tree_leaves_with_path(learnt.params):
      before = functools.reduce(lambda tree, key: tree[key.key], path, old)
      self.assertTrue(np.any(leaf != before), jax.tree_util.keystr(path))

  def test_a_model_like_pythia_takes_a_step(self):
    self._pythia_learns(_pythia(), "--steps=1", "--learning_rate=1e-3")

  @pytest.mark.slow
  def test_a_model_like_pythia_is_trained_by_both_phases(self):
    warm = scripts.scratch() / "warm"
    scripts.run(
      "experiments/sft.py",
      warm,
      f"--policy={_pythia()}",
      "--task=sentiment",
      f"--task_options=data={_reviews()}",
      *("--num_examples=40", "--num_eval_prompts=8", "--batch_size=8"),
      *("--max_prompt_length=48", "--max_response_length=64", "--steps=10"),
      *("--learning_rate=1e-3", "--warmup=0"),
    )
    losses = [row["nll/loss"] for row in scripts.rows(warm)[:10]]
    self.assertLess(losses[-1], 0.8 * losses[0])
    self._pythia_learns(warm, "--steps=4", "--kl=initial", "--kl_coef=0.2")
    self.assertLen(
      scripts.steady(scripts.rows(scripts.scratch() / "pythia_warm")), 5
    )

  @pytest.mark.slow
  def test_a_small_model_of_stories_learns_to_praise(self):
    workdir = scripts.scratch() / "stories"
    scripts.run(
      PPO,
      workdir,
      "--flagfile=experiments/flags/padula/sentiment_cpu.flags",
      f"--policy={conftest.shared('data/models/stories260k')}",
      f"--task_options=data={conftest.shared('data/sentiment')},"
      "tokenizer=policy",
      *("--batch_size=32", "--epochs=2", "--warmup=0"),
      *("--learning_rate=1e-3", "--steps=40"),
      optimize=True,
    )
    rows = scripts.rows(workdir)[:40]
    rewards = [row["reward/mean"] for row in rows]
    # 32 compounds with a deviation of 0.3, whose mean is about 0.
    self.assertLess(rewards[0], 0.25)
    self.assertGreater(np.mean(rewards[-8:]), 0.6)
    # In a few words, again and again.
    samples = scripts.rows(workdir, "samples.jsonl")
    distinct = [
      metrics.distinct_n(
        [s["response"] for s in samples if s["step"] == step], 1
      )
      for step in (0, 30)
    ]
    self.assertLess(distinct[1], distinct[0] / 2)

  def test_perplexity_of_samples(self):
    workdir = scripts.scratch() / "evaluation"
    scripts.run(
      EVALUATE,
      workdir,
      f"--policies=same={_letters()}",
      "--task=sentiment",
      f"--task_options=data={_reviews()}",
      "--num_prompts=20",
      "--batch_size=16",
      "--nogreedy",
      "--max_length=9",
      "--stop_at_eos=false",
      "--metrics=text,perplexity",
      f"--reference={_letters()}",
    )
    found = json.loads((workdir / "summary.json").read_text())["same"]
    rows = scripts.rows(workdir, "samples.jsonl")
    self.assertLen(rows, 20)
    replies = [row["response"] for row in rows]
    self.assertEqual({len(reply) for reply in replies}, {9})
    self.assertAlmostEqual(
      float(found["distinct-2"]), metrics.distinct_n(replies, 2), delta=6e-4
    )
    # The model's own log-probabilities of the nine letters behind the prompt.
    loaded = hf.load(_letters())
    ids, mask = batches.pad_left(
      [loaded.tokenizer.encode(r["prompt"] + r["response"]) for r in rows]
    )

    @jax.jit
    def log_softmax(params):
      hidden = loaded.model.apply({"params": params}, ids, mask)
      logits = loaded.model.apply({"params": params}, hidden, method="logits")
      return jax.nn.log_softmax(logits)

    table = np.asarray(log_softmax(loaded.params))[:, -10:-1]
    log_probs = np.take_along_axis(table, ids[:, -9:, None], axis=-1)
    expected = np.exp(-np.mean(log_probs))
    for name in ("perplexity", "perplexity_per_reply"):  # All of one length.
      self.assertAlmostEqual(
        float(found[f"{name} under the reference"]) / expected, 1, delta=1e-3
      )

  def test_perplexity_needs_a_reference(self):
    flags = ["--policies=x=y", "--metrics=perplexity", "--task=word_lists"]
    (error,) = scripts.drive(EVALUATE, [[scripts.scratch() / "bad2", *flags]])
    self.assertRegex(str(error), "^ValueError: .*needs a --reference")


if __name__ == "__main__":
  absltest.main()
