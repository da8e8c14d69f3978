"""Faults that are planted in copies of the scripts, and refused.

Each fault is one that such code has: a mask without the end token, or one token
short, pads that are read, rows that mix, a temperature that one side forgot,
micro-batches with wrong weights, a sampler that keeps its first weights.
"""

import json

import pytest
from absl.testing import absltest, parameterized

from rljax.tasks import word_lists
from rljax.text import files
from tests import conftest, scripts

WORDS = (
  "--task=word_lists",
  "--max_prompt_length=8",
  "--max_response_length=10",
)
LOG = (
  *WORDS,
  "--task_options=num=64",
  "--batch_size=8",
  "--micro_batch_size=4",
  "--steps=2",
)
OFFLINE = (*LOG, "--num_dev_prompts=8", "--sample_batch_size=8")
SUMS = (
  "--task=merge_sums",
  "--task_options=num_terms=3,max_term=5",
  "--num_prompts=8",
  "--num_eval_prompts=8",
  "--max_length=16",
  "--sample_batch_size=4",
  "--batch_size=8",
  "--micro_batch_size=4",
  "--epochs=1",
)
ONLINE = (
  "--task=word_lists",
  "--num_prompts=16",
  "--num_eval_prompts=8",
  "--batch_size=8",
  "--micro_batch_size=4",
  "--max_length=6",
  "--stop_at_eos",
  "--steps=4",
  "--learning_rate=1e-2",
  "--warmup=0",
  "--temperature=0.7",
)
# Script -> flags.
FLAGS = {
  "sft": (*WORDS, "--num_examples=32", "--num_eval_prompts=8")
  + ("--batch_size=8", "--micro_batch_size=4", "--steps=2"),
  "offline": (*OFFLINE, "--algorithm=a_lol"),
  "preference": OFFLINE,
  "outcome_reward_model": (*LOG, "--num_eval_rows=8"),
  "offline_value": (*WORDS, "--task_options=num=64", "--num_heads=4")
  + ("--num_value_prompts=32", "--sample_batch_size=8", "--epochs=1"),
  "expert_iteration": (*SUMS, "--num_examples=8", "--num_samples=1")
  + ("--rounds=1", "--example_options=slot=true"),
  "return_conditioned": (*SUMS, "--blank_slot"),
  "ppo": ONLINE,
  "grpo": (*ONLINE, "--num_samples=4", "--normalizer=sequence_mean"),
}
END = "the mask of a response decides about its end"
SHORT = "the last token of a response is learnt"
PADS = "pads change nothing"
ORDER = "order of rows changes nothing"
PARTS = "micro-batches equal one batch"
START = "the policy starts as its reference"
LEARNT = "the end of a response is learnt from"
AGREE = "sampler and trainer log-probs agree"
STALE = "Stale: step 3: sampler and trainer differ"

OF_CHAT = "learnt_mask(batch)"
MASK, LEARNT_MASK = 'batch["response_mask"]', 'batch["learnt_mask"]'
ENDS = 'batch["response_ids"] == tokenizer.eos_token_id'
ROLL = "jax.numpy.roll({0}, -1, axis=-1)"
LM = 'params["policy"],\n      batch,\n      temp'
PAD_LM = (
  'params["policy"], {**batch, "prompt_mask": '
  'batch["prompt_mask"] | True}, temp'
)
ROLLOUT = 'batch["rollout"].response_ids == tokenizer.eos_token_id'
FIRST = 'jax.tree.map(jax.numpy.copy, state["params"]["policy"])'


def _nll(mask, new, end=")"):
  """A likelihood loss whose mask is another."""
  return [
    f"statistics.log_probs, {mask}{end}",
    f"statistics.log_probs, {new}{end}",
  ]


# Script, the text that is replaced, what it becomes, and what is said.
FAULTS = [
  ("sft", *_nll(OF_CHAT, f"{OF_CHAT} & ~({ENDS})", ","), END),
  ("sft", *_nll(OF_CHAT, f"{OF_CHAT} & {ROLL.format(OF_CHAT)}", ","), SHORT),
  ("sft", LM, PAD_LM, PADS),
  ("sft", "weigh=weight,", "", PARTS),
  (
    *("sft", "statistics.log_probs, learnt"),
    *("statistics.log_probs + statistics.log_probs[:1], learnt", ORDER),
  ),
  ("offline", "temperature=1.0", "temperature=0.7", START),
  ("offline", LM, PAD_LM, PADS),
  (
    *("offline", '("ref_log_probs"), batch["response_mask"]'),
    *(f'("ref_log_probs"), {MASK} & ~({ENDS})', END),
  ),
  ("preference", "temperature=1.0", "temperature=0.7", START),
  (
    *("preference", 'mask = batch["response_mask"]\n    log_probs ='),
    *(f"mask = {MASK} & {ROLL.format(MASK)}\n    log_probs =", SHORT),
  ),
  (
    *("preference", "packed.texts(batch)"),
    "packed.texts(batch | {'prompt_mask': batch['prompt_mask'] | True})",
    PADS,
  ),
  (
    *("outcome_reward_model", "packed.texts(batch)"),
    "packed.texts(batch | {'prompt_mask': batch['prompt_mask'] | True})",
    PADS,
  ),
  (
    *("outcome_reward_model", "packed.texts(batch)"),
    f"packed.texts(batch | {{'response_mask': {MASK} & ~({ENDS})}})",
    END,
  ),
  (
    *("outcome_reward_model", 'scores.reshape(batch["present"].shape)'),
    "(scores + scores[:1] * jax.numpy.arange(scores.size)"
    '.reshape(scores.shape)).reshape(batch["present"].shape)',
    ORDER,
  ),
  ("expert_iteration", *_nll(MASK, f"{MASK} & ~({ENDS})"), END),
  ("expert_iteration", LM, PAD_LM, PADS),
  (
    *("expert_iteration", 'weigh=lambda part: part["response_mask"].sum(),'),
    *("", PARTS),
  ),
  ("return_conditioned", *_nll(LEARNT_MASK, f"{LEARNT_MASK} & ~({ENDS})"), END),
  ("return_conditioned", LM, PAD_LM, PADS),
  (
    *("return_conditioned", 'weigh=lambda part: part["learnt_mask"].sum(),'),
    *("", PARTS),
  ),
  (
    *("offline_value", 'head.apply({"params": head_params}, *batch)'),
    'head.apply({"params": head_params}, batch[0], batch[1] | True)',
    PADS,
  ),
  (
    *("ppo", "temperature=FLAGS.temperature,\n    allowed=sampler.allowed if"),
    *("temperature=1.0,\n    allowed=sampler.allowed if", AGREE),
  ),
  (
    *("ppo", "mask, old = rollout.response_mask,"),
    f"mask, old = rollout.response_mask & ~({ROLLOUT}),",
    LEARNT,
  ),
  (
    *("ppo", 'weigh=lambda part: part["rollout"].response_mask.sum(),'),
    *("", PARTS),
  ),
  (
    *("ppo", 'sample_key, state["params"]["policy"], train'),
    f'sample_key, roll_out.__dict__.setdefault("first", {FIRST}), train',
    STALE,
  ),
  (
    *("grpo", 'mask, weights = batch["rollout"].response_mask,'),
    f'mask, weights = batch["rollout"].response_mask & ~({ROLLOUT}),',
    LEARNT,
  ),
  (
    *("grpo", 'ppo.num_terms(part["rollout"].response_mask, **average)'),
    *('part["rollout"].response_mask.sum()', PARTS),
  ),
  (
    *("grpo", 'params = state["params"]["policy"]\n      return'),
    f'params = roll_out.__dict__.setdefault("first", {FIRST})\n      return',
    STALE,
  ),
]


def setUpModule():
  scripts.without_pictures()


def tearDownModule():
  scripts.remove_scratch()


def _labels(path):
  """Labelled solutions, as return_conditioned.py leaves them."""
  rows = [
    {
      "prompt": f"{i}+1+1=",
      "response": f" {i + 1}+1\n {i + 2}",
      "values": [1.0, float(i % 2)],
      "is_correct": bool(i % 2),
    }
    for i in range(8)
  ]
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


# What the quick tests plant; the slow ones plant the others, and none.
QUICK = [
  ("sft", END),
  ("offline", START),
  ("preference", PADS),
  ("ppo", AGREE),
  ("grpo", STALE),
]


def _is_quick(fault):
  return (fault[0], fault[-1]) in QUICK


def _logged(path):
  """Logged replies with the values that a reference would have."""
  rows = word_lists.logged("train", 0, num=64)
  files.write_jsonl(path, [{**row, "value": 0.0} for row in rows])
  return path


def _errors(cases, machine=None):
  """The errors of scripts, each with a fault or as it is.

  Args:
    cases: of name of the script, text, what it becomes, and what is said.
    machine: of tests/emulation.py, on which they compute; None: a CPU.
  """
  folder = scripts.scratch() / f"of{len(cases)}_{machine}"
  folder.mkdir()
  sft = {"script": "experiments/sft.py"}
  common = ("--hidden_size=16", "--num_layers=1", "--max_positions=48")
  common += ("--preflight=off", "--steps=20", "--num_eval_prompts=8")
  # No uniform distribution, which no temperature changes.
  common += ("--num_examples=16", "--batch_size=8", "--learning_rate=3e-2")
  sums = ("--task=merge_sums", SUMS[1] + ",slot=true", "--tokenizer=character")
  runs = [
    sft | {"flags": (folder / "words", "--task=word_lists", *common)},
    sft | {"flags": (folder / "sums", *sums, *common)},
  ]
  more = {
    "sft": [f"--policy={folder / 'words'}"],
    "offline": [f"--data={_logged(folder / 'logged.jsonl')}"],
    "return_conditioned": [f"--labels={_labels(folder / 'labels.jsonl')}"],
  }
  for i, (name, *fault) in enumerate(cases):
    flags = [folder / f"run{i}", *FLAGS[name], *more.get(name, [])]
    if name != "sft":
      policy = "sums" if "--task=merge_sums" in flags else "words"
      flags.append(f"--policy={folder / policy}")
    run = {"script": f"experiments/{name}.py", "flags": flags}
    if machine:
      flags.append("--matmul_precision=default")
      run["machine"] = machine
    runs.append(run | ({"replace": [fault[:2]]} if fault[0] else {}))
  errors = scripts.drive("-", runs)
  assert errors[:2] == [None, None], errors[:2]
  return errors[2:]


class PlantedFaultsTest(absltest.TestCase):
  def test_refused(self):
    cases = [fault for fault in FAULTS if _is_quick(fault)]
    self.assertLen(cases, len(QUICK))
    for fault, error in zip(cases, _errors(cases), strict=True):
      with self.subTest(f"{fault[0]}: {fault[-1]}"):
        self.assertIn(fault[-1], str(error))


class TextsTest(absltest.TestCase):
  def test_every_fault_can_be_planted(self):
    for name, old, *_ in FAULTS:
      with self.subTest(f"{name}: {old}"):
        source = conftest.REPOSITORY / "experiments" / f"{name}.py"
        self.assertEqual(source.read_text().count(old), 1)


@pytest.mark.slow
class AllFaultsTest(parameterized.TestCase):
  @parameterized.parameters(None, "tpu", "gpu")
  def test_refused(self, machine):
    cases = [(name, "", "", None) for name in FLAGS]
    cases += [fault for fault in FAULTS if machine or not _is_quick(fault)]
    for fault, error in zip(cases, _errors(cases, machine), strict=True):
      with self.subTest(f"{fault[0]}: {fault[-1]}"):
        if fault[-1] is None:
          self.assertIsNone(error)
        else:
          self.assertIn(fault[-1], str(error))


if __name__ == "__main__":
  absltest.main()
