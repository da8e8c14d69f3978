"""Every script on a mesh of two, two and two devices, beside one device."""

import functools
import json
import shutil

import numpy as np
import pytest
from absl.testing import absltest, parameterized

from tests import conftest, scripts

SFT = "experiments/sft.py"
ONE, MESH = "--mesh=data:1", "--mesh=data:-1,fsdp:2,tensor:2"
TINY_SFT = (
  "--task=word_lists",
  "--family=llama",
  "--num_examples=256",
  "--num_eval_prompts=16",
  "--hidden_size=32",
  "--num_layers=1",
  "--max_positions=32",
  "--batch_size=16",
  "--steps=4",
  "--save_every=2",
  "--eval_every=2",
  "--learning_rate=3e-3",
)
SUMS = "num_terms=2,max_term=9"
# Models to start from, and what each script makes of them. What stands in
# braces is the workdir of another run.
POLICIES = {
  "words": ("--task=word_lists", "--max_positions=32"),
  "sums": (
    "--task=merge_sums",
    f"--task_options={SUMS},corpus=pretraining,slot=true",
    "--tokenizer=character",
    "--max_positions=48",
  ),
  "chains": (
    "--task=chains",
    "--task_options=corpus=pretraining,num_steps=1",
    "--tokenizer=character",
    "--vocab_size=64",
    "--max_positions=128",
  ),
}
WORDS = (
  "--policy={words}",
  "--task=word_lists",
  "--task_options=num=64",
  "--max_prompt_length=16",
  "--max_response_length=16",
)
TRACES = (
  "--policy={sums}",
  "--base={sums}",
  "--task=merge_sums",
  f"--task_options={SUMS}",
  "--num_prompts=8",
  "--num_eval_prompts=8",
  "--max_length=16",
  "--sample_batch_size=4",
  "--batch_size=8",
  "--epochs=1",
  "--learning_rate=1e-4",
)
CHAINS = (
  "--policy={chains}",
  "--task=chains",
  "--task_options=num_steps=1",
  "--num_prompts=20",
  "--num_samples=2",
  "--sample_batch_size=8",
  "--batch_size=8",
  "--max_length=16",
  "--learning_rate=1e-4",
)
RUNS = {
  "offline_value": (
    *WORDS,
    "--num_value_prompts=32",
    "--sample_batch_size=16",
    "--num_heads=4",
    "--epochs=1",
    "--learning_rate=1e-4",
  ),
  "offline": (
    *WORDS,
    "--cache={offline_value}",
    "--num_dev_prompts=16",
    "--sample_batch_size=16",
    "--batch_size=8",
    "--steps=3",
    "--eval_every=3",
    "--learning_rate=1e-4",
  ),
  "preference": (
    *WORDS,
    "--num_dev_prompts=16",
    "--sample_batch_size=16",
    "--batch_size=8",
    "--steps=3",
    "--eval_every=3",
    "--learning_rate=1e-4",
  ),
  "outcome_reward_model": (
    *WORDS,
    "--num_eval_rows=16",
    "--batch_size=8",
    "--steps=3",
    "--eval_every=3",
    "--learning_rate=1e-4",
  ),
  "expert_iteration": (
    *TRACES,
    "--example_options=slot=true",
    "--num_samples=4",
    "--rounds=1",
  ),
  "return_conditioned": (
    *TRACES,
    "--num_solutions=8",
    "--num_completions=2",
    "--max_per_prompt=2",
    "--blank_slot",
    "--eval_every=3",
  ),
  "grpo": (
    "--policy={sums}",
    "--task=merge_sums",
    f"--task_options={SUMS}",
    "--num_prompts=8",
    "--num_eval_prompts=8",
    "--batch_size=4",
    "--num_samples=4",
    "--max_length=12",
    "--stop_at_eos",
    "--steps=2",
    "--eval_every=2",
    "--learning_rate=1e-4",
  ),
  "ppo": (
    "--policy={sums}",
    "--task=merge_sums",
    f"--task_options={SUMS}",
    "--num_prompts=8",
    "--num_eval_prompts=8",
    "--batch_size=8",
    "--critic=branch:1",
    "--kl=initial",
    "--max_length=12",
    "--stop_at_eos",
    "--steps=2",
    "--eval_every=2",
    "--learning_rate=1e-4",
  ),
  "evaluate": (
    "--policies=words={sums}",
    "--task=merge_sums",
    f"--task_options={SUMS}",
    "--split=train",
    "--num_prompts=8",
    "--num_samples=2",
    "--k=1,2",
    "--batch_size=8",
    "--max_length=12",
    "--stop_at_eos",
  ),
  "rlmec_reward_model": (
    *CHAINS,
    "--base={chains}",
    "--num_held_out=2",
    "--steps=3",
    "--eval_every=3",
  ),
  "rlmec": (
    *CHAINS,
    "--reward_model={corrector}",
    "--num_eval_prompts=8",
    "--steps=3",
    "--eval_every=3",
  ),
}


def setUpModule():
  scripts.without_pictures()


def tearDownModule():
  scripts.remove_scratch()


def _drive(script, *runs):
  errors = scripts.drive(script, runs, devices=8)
  if any(errors):
    raise AssertionError(f"{script}: {errors}")


@functools.cache
def _trained():
  """Workdirs of the same training on one device and on the mesh."""
  one, mesh = (scripts.scratch() / name for name in ("sft-one", "sft-mesh"))
  _drive(SFT, (one, *TINY_SFT, ONE), (mesh, *TINY_SFT, MESH))
  return one, mesh


def _assert_same_run(workdir, other):
  """Rows and parameters agree to rounding."""
  rows = [scripts.steady(scripts.rows(path)) for path in (workdir, other)]
  for a, b in zip(*rows, strict=True):
    assert a.keys() == b.keys(), (a, b)
    for name in a:
      np.testing.assert_allclose(a[name], b[name], rtol=1e-4, err_msg=name)
  gap = scripts.largest_gap(workdir, other)
  assert gap < 5 * scripts.ROUNDING, gap


class TrainingTest(parameterized.TestCase):
  def test_mesh_changes_rounding_alone(self):
    one, mesh = _trained()
    _assert_same_run(one, mesh)
    rows = scripts.rows(one)
    self.assertLess(rows[-1]["eval/loss"], rows[2]["eval/loss"] - 0.005)

  def test_goes_on_on_another_mesh(self):
    """A checkpoint of eight devices on one, and the other way round."""
    one, mesh = _trained()
    runs = []
    for source, flag in ((mesh, ONE), (one, MESH)):
      workdir = scripts.scratch() / f"{source.name}-and-on"
      shutil.copytree(source, workdir)
      shutil.rmtree(workdir / "checkpoints" / "4")
      runs.append((workdir, *TINY_SFT, flag))
    _drive(SFT, *runs)
    for workdir, *_ in runs:
      self.assertTrue((workdir / "checkpoints" / "4").exists())
      steps = [row["step"] for row in scripts.rows(workdir)]
      self.assertEqual(steps, [0, 1, 2, 3, 4])
      _assert_same_run(one, workdir)

  def test_what_does_not_fit(self):
    cases = [
      ("--mesh=tensor:8", "4 query heads of a Llama .* tensor in --mesh to 1"),
      (
        "--vocab_size=115 --hidden_size=20 --num_heads=2 "
        "--mesh=fsdp:4,tensor:2",
        "embed_tokens/embedding, of size 20, .* fsdp or tensor in --mesh",
      ),
      ("--batch_size=6", "--batch_size must be divisible by the 4 devices"),
      ("--mesh=data:16", "asks for 16 devices, but 8 were found; lower a size"),
    ]
    workdir = scripts.scratch() / "bad"
    errors = scripts.drive(
      SFT,
      [(workdir, *TINY_SFT, MESH, *flag.split()) for flag, _ in cases],
      devices=8,
    )
    for (flag, message), error in zip(cases, errors, strict=True):
      with self.subTest(flag):
        self.assertRegex(str(error), f"^ValueError: .*{message}")


# Knows its records by heart, so that some of its rewrites are right.
CORRECTOR = (
  *CHAINS,
  "--num_held_out=2",
  "--batch_size=16",
  "--max_positions=96",
  "--steps=220",
  "--save_every=220",
  "--eval_every=220",
  "--learning_rate=3e-3",
)


@functools.cache
def _policy(name):
  workdir = scripts.scratch() / name
  if name == "corrector":
    flags = [flag.format(chains=_policy("chains")) for flag in CORRECTOR]
    scripts.run("experiments/rlmec_reward_model.py", workdir, *flags)
    return workdir
  scripts.run(
    SFT,
    workdir,
    *POLICIES[name],
    "--num_examples=256",
    "--num_eval_prompts=16",
    "--hidden_size=32",
    "--num_layers=1",
    "--batch_size=32",
    "--steps=60",
    "--eval_every=60",
    "--learning_rate=5e-3",
  )
  return workdir


@functools.cache
def _both(name):
  """Workdirs of a script on one device and on the mesh, and its flags."""
  wanted = {}
  text = " ".join(RUNS[name])
  for other in ("corrector", *POLICIES, *RUNS):
    if f"{{{other}}}" in text:
      is_policy = other not in RUNS
      wanted[other] = _policy(other) if is_policy else _both(other)[0]
  flags = [flag.format(**wanted) for flag in RUNS[name]]
  one, mesh = (scripts.scratch() / f"{name}-{kind}" for kind in ("one", "mesh"))
  _drive(f"experiments/{name}.py", (one, *flags, ONE), (mesh, *flags, MESH))
  return one, mesh


def _numbers(workdir):
  """All numbers of the summary and the metrics but those of clocks."""
  found = {}
  for name in ("metrics.jsonl", "summary.json"):
    if (workdir / name).exists():
      text = (workdir / name).read_text()
      rows = map(json.loads, text.splitlines() if name[-1] == "l" else [text])
      for i, row in enumerate(rows):
        found |= dict(_leaves(row, f"{name}:{i}"))
  return found


def _leaves(tree, path):
  if isinstance(tree, dict):
    for name, value in tree.items():
      if not name.endswith(("_per_second", "seconds")):
        yield from _leaves(value, f"{path}/{name}")
  elif isinstance(tree, (int, float)) and not isinstance(tree, bool):
    yield path, tree


@pytest.mark.slow
class ScriptsTest(parameterized.TestCase):
  @parameterized.parameters(*RUNS)
  def test_same_numbers(self, name):
    samples = [
      [row["response"] for row in scripts.rows(workdir, "samples.jsonl")]
      for workdir in _both(name)
      if (workdir / "samples.jsonl").exists()
    ]
    if samples:
      self.assertEqual(*samples)
    one, mesh = map(_numbers, _both(name))
    # Before the first update both replies of a pair have reward 0, or nearly.
    one.pop("metrics.jsonl:0/dpo/accuracy", None)
    mesh.pop("metrics.jsonl:0/dpo/accuracy", None)
    self.assertNotEmpty(one)
    self.assertEqual(one.keys(), mesh.keys())
    for path, number in one.items():
      np.testing.assert_allclose(
        mesh[path], number, rtol=2e-3, atol=1e-4, err_msg=path
      )

  def test_no_script_is_left_out(self):
    paths = (conftest.REPOSITORY / "experiments").glob("*.py")
    names = {
      path.stem
      for path in paths
      if "mesh" in scripts.flags_of(f"experiments/{path.name}")
    }
    self.assertEqual(names, {*RUNS, "sft"})


if __name__ == "__main__":
  absltest.main()
