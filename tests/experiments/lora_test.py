"""LoRA in the scripts, run as a user runs them, with tiny flags."""

import functools
import json

import numpy as np
import pytest
from absl.testing import absltest

from rljax import export
from rljax.models import hf
from rljax.storage import checkpoint
from tests import scripts
from tests.experiments import reasoning_test, rlmec_test

SFT = "experiments/sft.py"
LORA = ("--lora_rank=2", "--learning_rate=1e-2")
SMALL = ("--hidden_size=16", "--num_layers=1", "--family=llama")
SUMS = (
  *scripts.SUMS,
  *("--num_prompts=32", "--num_eval_prompts=8", "--batch_size=8", "--steps=2"),
)
WORDS = (
  *("--task=word_lists", "--task_options=num=64", "--batch_size=8"),
  *("--max_prompt_length=8", "--max_response_length=10"),
)
REPLIES = ("--num_dev_prompts=16", "--sample_batch_size=16")


def setUpModule():
  scripts.without_pictures()
  _forget()


def tearDownModule():
  scripts.remove_scratch()
  _forget()


def _forget():
  """The models of other modules lie in a folder that goes with each of them."""
  for model in (
    *(rlmec_test.policy, rlmec_test.trained),
    *(reasoning_test.base_of, reasoning_test.policy_of),
  ):
    model.cache_clear()


@functools.cache
def _base(*flags):
  workdir = scripts.scratch() / f"base_{len(flags)}_{flags[0][7:12]}"
  scripts.run(SFT, workdir, *SMALL, "--steps=4", *flags)
  return workdir


def _sums():
  return _base(*scripts.LEARN_SUMS[:2], "--num_examples=32", "--batch_size=16")


def _sft(name, *flags):
  workdir = scripts.scratch() / name
  learnt = (*scripts.LEARN_SUMS[:2], "--num_examples=32", "--batch_size=16")
  scripts.run(
    SFT, workdir, *learnt, *LORA, f"--policy={_sums()}", "--steps=4", *flags
  )
  return workdir


def _logits(name):
  loaded = hf.load(name)
  ids = np.arange(12).reshape(2, 6)
  variables = {"params": loaded.params}
  hidden = loaded.model.apply(variables, ids, ids >= 0)
  return loaded.model.apply(variables, hidden, method="logits")


class SftTest(absltest.TestCase):
  def test_checkpoints_hold_adapters_and_go_on_bit_for_bit(self):
    whole = _sft("whole", "--save_every=2", "--base_dtype=int8")
    saved = checkpoint.restore_params(whole)["policy"]
    self.assertEqual(list(saved), ["lora"])
    # The last checkpoint is lost: the run goes on from the one before.
    again = _sft("again", "--save_every=2", "--base_dtype=int8")
    for path in (again / "checkpoints").iterdir():
      if path.name == "4":
        path.rename(again / "lost")
    _sft("again", "--save_every=2", "--base_dtype=int8")
    self.assertEqual(scripts.fingerprint(whole), scripts.fingerprint(again))
    config = json.loads((whole / "model" / "adapter_config.json").read_text())
    self.assertEqual(config["base_model_name_or_path"], str(_sums()))

  def test_a_run_is_a_name_and_is_exported_in_two_ways(self):
    workdir = _sft("export")
    expected, base = _logits(workdir), _logits(_sums())
    self.assertGreater(np.abs(expected - base).max(), 1e-3)
    for name, merge in (("adapter", False), ("merged", True)):
      folder = scripts.scratch() / name
      export.export(workdir, folder, merge=merge)
      np.testing.assert_allclose(_logits(folder), expected, atol=1e-5)
      files = {path.name for path in folder.iterdir()}
      self.assertEqual("adapter_model.safetensors" in files, not merge)
      self.assertEqual("model.safetensors" in files, merge)
    # Another base in the same place is noticed.
    config = workdir / "model" / "adapter_config.json"
    text = json.loads(config.read_text())
    config.write_text(json.dumps(text | {"rljax_base": "0" * 32}))
    with self.assertRaisesRegex(ValueError, "other weights than the base"):
      hf.load(workdir)

  def test_flags(self):
    refused = (
      (["--lora_alpha=2"], "have a meaning with --lora_rank alone"),
      (["--base_dtype=int8"], "have a meaning with --lora_rank alone"),
      (["--lora_rank=2"], "random ones would be lost: name a model"),
      (
        ["--lora_rank=2", "--lora_targets=q", f"--policy={_sums()}"],
        "--lora_targets names 'q', .*it has down_proj, .*q_proj",
      ),
    )
    task = scripts.LEARN_SUMS[:2]
    errors = scripts.drive(
      SFT, [[scripts.scratch() / "bad", *task, *flags] for flags, _ in refused]
    )
    for (flags, message), error in zip(refused, errors, strict=True):
      self.assertRegex(error, message, flags)


@pytest.mark.slow
class ScriptsTest(absltest.TestCase):
  """Every script trains adapters, and leaves a model that loads."""

  def run_all(self, *runs):
    place = scripts.scratch()
    errors = scripts.drive(
      "-",
      [
        {
          "script": f"experiments/{script}.py",
          "flags": [place / name, f"--policy={policy}", *flags],
        }
        for name, script, policy, flags in runs
      ],
    )
    self.assertEqual(errors, [None] * len(runs))

  def check(self, *names):
    for name in names:
      workdir = scripts.scratch() / name
      hf.load(workdir)
      saved = checkpoint.restore_params(workdir)["policy"]
      self.assertEqual(list(saved), ["lora"])

  def test_online(self):
    self.run_all(
      ("ppo", "ppo", _sums(), [*SUMS, *LORA, "--kl=initial"]),
      (
        "separate",
        "ppo",
        _sums(),
        [*SUMS, *LORA, "--critic=separate", "--base_dtype=int8"],
      ),
      (
        "grpo",
        "grpo",
        _sums(),
        [*SUMS, *LORA, "--num_samples=4", "--base_dtype=bfloat16"],
      ),
    )
    self.check("ppo", "separate", "grpo")

  def test_offline(self):
    policy = _base("--task=word_lists", "--num_eval_prompts=16")
    value = [*WORDS, "--num_value_prompts=32", "--sample_batch_size=16"]
    value += ["--num_heads=2", "--epochs=1", "--base_dtype=int8"]
    place = scripts.scratch()
    learn = [*WORDS, *REPLIES, *LORA, "--steps=2", "--eval_every=2"]
    narrow = "--base_dtype=int8"
    self.run_all(
      ("value", "offline_value", policy, value),
      (
        "a_lol",
        "offline",
        policy,
        [*learn, narrow, f"--cache={place / 'value'}", "--noscale_steps"],
      ),
      ("dpo", "preference", policy, learn),
      ("kto", "preference", policy, [*learn, "--algorithm=kto"]),
      (
        "reward",
        "outcome_reward_model",
        policy,
        [*WORDS, *LORA, "--steps=2", "--num_eval_rows=16"],
      ),
    )
    self.check("a_lol", "dpo", "kto")
    reward = checkpoint.restore_params(place / "reward")["reward_model"]
    self.assertEqual(list(reward["backbone"]), ["lora"])
    self.assertIn("score", reward)
    loaded = hf.load_classifier(place / "reward")
    self.assertIn("embed_tokens", loaded.params["backbone"])

  def test_rewriting(self):
    policy = rlmec_test.policy()
    wide = _base(
      "--task=chains",
      "--task_options=corpus=pretraining,num_steps=1",
      "--tokenizer=character",
      "--max_positions=96",
      "--num_examples=128",
    )
    few = [*LORA, "--steps=2", "--save_every=2", "--eval_every=2"]
    records = [*rlmec_test.GRM_FLAGS, *few, f"--base={wide}"]
    self.run_all(
      ("adapted_grm", "rlmec_reward_model", policy, records),
      ("adapted_rlmec", "rlmec", policy, [*rlmec_test.rlmec_flags(), *few]),
    )
    self.check("adapted_grm", "adapted_rlmec")

  def test_reasoning(self):
    short = reasoning_test.models(reasoning_test.SHORT)
    long = reasoning_test.models(reasoning_test.LONG)
    rounds = [*reasoning_test.TINY_EI, *LORA]
    policy, base = (flag.partition("=")[2] for flag in short)
    first, second = (flag.partition("=")[2] for flag in long)
    self.run_all(
      ("ei", "expert_iteration", policy, [*rounds, f"--base={base}"]),
      ("kept", "expert_iteration", policy, [*rounds, "--norestart"]),
      (
        "rcrl",
        "return_conditioned",
        first,
        [*reasoning_test.TINY_RCRL, *LORA, f"--base={second}"],
      ),
    )
    self.check("ei/rounds/2", "kept/rounds/2", "rcrl")
    # Round 0 is the policy itself, which is beside another base.
    hf.load(scripts.scratch() / "ei" / "best")
    for name, of in (("ei", base), ("kept", policy), ("rcrl", second)):
      folder = scripts.scratch() / name
      folder = folder / "rounds" / "2" if name != "rcrl" else folder
      config = json.loads((folder / "model/adapter_config.json").read_text())
      self.assertEqual(config["base_model_name_or_path"], of)


if __name__ == "__main__":
  absltest.main()
