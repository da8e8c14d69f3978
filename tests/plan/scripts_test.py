"""Scripts that are planned for eight simulated devices, and for others."""

import contextlib
import functools
import importlib.util
import io
import json
import os
import pathlib
import shutil
import tempfile

import jax
import pytest
from absl.testing import absltest, parameterized

from rljax import tasks
from rljax.models import fresh, hf
from rljax.plan import command, report, scripts, targets
from tests import conftest
from tests.experiments import meshes_test

MESH = ("--mesh=data:2,fsdp:2,tensor:2", "--dtype=bfloat16")
# Models that are a config and a tokenizer, no more.
POLICIES = {
  "words": ("word_lists", "word", 32),
  "sums": ("merge_sums", "character", 48),
  "chains": ("chains", "character", 128),
  "corrector": ("chains", "character", 160),
  "wide": ("merge_sums", "character", 48),
}
# What a script needs that a plan has no run of another one for.
INSTEAD = {
  "offline": {"--cache": "--algorithm=nll"},
  "rlmec": {"--eval_every": "--template=compact"},
}
# Of the programs that a run has, those that a plan must have met.
PROGRAMS = {
  "sft": ["held-out loss", "optimizer", "update"],
  "grpo": ["learn", "optimizer", "respond", "sample"],
  "ppo": ["learn", "optimizer", "respond", "sample"],
  "evaluate": ["respond"],
  "preference": ["optimizer", "reference", "respond", "update"],
  "offline": ["optimizer", "respond", "update"],
  "offline_value": ["hidden states", "reference", "respond", "update"],
  "outcome_reward_model": ["optimizer", "score", "update"],
  "expert_iteration": ["optimizer", "respond", "update"],
  "return_conditioned": ["optimizer", "respond", "update"],
  "rlmec_reward_model": ["held-out loss", "optimizer", "respond", "update"],
  "rlmec": ["optimizer", "reference", "respond", "update"],
}
QUICK = (
  *("sft", "grpo", "ppo", "evaluate", "preference", "rlmec_reward_model"),
)


@functools.cache
def _scratch():
  return pathlib.Path(tempfile.mkdtemp(prefix="rljax-plans-"))


def tearDownModule():
  shutil.rmtree(_scratch(), ignore_errors=True)


@functools.cache
def _policy(name):
  task, kind, max_positions = POLICIES[name]
  tokenizer = tasks.tokenizer(tasks.load(task), kind)
  model = fresh.make(
    "llama",
    tokenizer,
    vocab_size=2048,  # A size that nothing else has.
    hidden_size=256 if name == "wide" else 32,  # 32 is too few for a GPU.
    num_layers=1,
    num_heads=4,
    max_positions=max_positions,
  )
  hf.save_config(_scratch() / name, model, tokenizer)
  return _scratch() / name


def _flags(name):
  flags = {**meshes_test.RUNS, "sft": meshes_test.TINY_SFT}[name]
  for start, other in INSTEAD.get(name, {}).items():
    flags = [x if not x.startswith(start) else other for x in flags]
  folders = {policy: _policy(policy) for policy in POLICIES}
  return [x.format(**folders) for x in flags]


def _plan(name, *flags, target="cpu:8", **options):
  """Plans a script as it is run: with the types that JAX mixes by default."""
  path = str(conftest.REPOSITORY / "experiments" / f"{name}.py")
  with contextlib.ExitStack() as stack:
    stack.enter_context(jax.numpy_dtype_promotion("standard"))
    stack.enter_context(jax.numpy_rank_promotion("allow"))
    stack.enter_context(contextlib.chdir(conftest.REPOSITORY))
    script = scripts.Script(path, [*_flags(name), *flags])
    try:
      return script.plan(targets.parse(target), **options)
    finally:
      script.close()


def _foreign_calls(traced, executable, args):
  del executable, args
  calls = {}
  for platform in ("tpu", "cuda"):
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert "stablehlo" in text
    calls[platform] = [x for x in text.splitlines() if "custom_call" in x]
  return calls


def _check(case, name, *flags):
  found = _plan(name, *MESH, *flags, inspect=_foreign_calls, compiles=False)
  case.assertEqual(found.ended, "")
  names = {program.name for program in found.programs}
  case.assertLessEqual(set(PROGRAMS[name]), names)
  for program in found.programs:
    for platform, calls in program.details.items():
      case.assertEqual(calls, [], f"{program.name} on {platform}")


class LoweringTest(parameterized.TestCase):
  @parameterized.parameters(*QUICK)
  def test_programs_lower_for_tpu_and_cuda(self, name):
    _check(self, name)

  def test_adapters(self):
    _check(self, "preference", "--lora_rank=2", "--base_dtype=int8")

  def test_no_script_is_left_out(self):
    self.assertEqual(set(PROGRAMS), {*meshes_test.RUNS, "sft"})


@pytest.mark.slow
class OtherLoweringTest(parameterized.TestCase):
  @parameterized.parameters(*sorted(set(PROGRAMS) - set(QUICK)))
  def test_programs_lower_for_tpu_and_cuda(self, name):
    _check(self, name)


@pytest.mark.slow
class MachinesTest(parameterized.TestCase):
  """Whole programs, by the compilers of machines that are not there."""

  @parameterized.parameters(
    ("v5e:1x1", "data:1", "libtpu"),
    ("v5p:2x2x2", "fsdp:8", "libtpu"),
    ("h100:8", "fsdp:8", "jax_cuda12_plugin"),
  )
  def test_grpo(self, target, mesh, module):
    if not importlib.util.find_spec(module):
      self.skipTest(f"needs {module}")
    flags = (f"--mesh={mesh}", "--dtype=bfloat16", "--batch_size=8")
    flags += (f"--policy={_policy('wide')}",)
    found = _plan("grpo", *flags, target=target)
    self.assertEqual(found.ended, "")
    rows = {row.name: row for row in found.rows}
    self.assertEqual([row.error for row in found.rows], [""] * len(rows))
    learn, sample = rows["learn"], rows["sample"]
    self.assertGreater(learn.peak, 0)
    self.assertEqual(sample.rounds, 12)
    summary = report.summarise(targets.parse(target), found.rows, found.tokens)
    self.assertTrue(summary.fits)
    self.assertBetween(summary.mfu, 0, 1)
    parameters = learn.memory["alias"] / 3
    # Each pass gathers the parameters, and gradients are summed once. Partial
    # sums of activations are twice as much, of these few tokens.
    most = 0 if mesh == "data:1" else 24 * parameters
    self.assertLessEqual(learn.sent, most)


class CompiledTest(parameterized.TestCase):
  """What holds of programs on a mesh of two, two and two devices."""

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.found = _plan("grpo", *MESH, "--kl=none")
    cls.rows = {row.name: row for row in cls.found.rows}

  def test_programs_and_calls(self):
    self.assertEqual(self.found.ended, "")
    self.assertEqual(list(self.rows), PROGRAMS["grpo"][1:] + ["learn"])
    calls = {row.name: row.calls for row in self.found.rows}
    self.assertEqual(calls["sample"], 1)
    self.assertEqual(calls["learn"], 1)
    self.assertEqual(calls["respond"], 0)  # Not in every step.
    self.assertEqual(self.found.tokens, 4 * 4 * 12)

  def test_sampler(self):
    sample = self.rows["sample"]
    self.assertEqual(sample.rounds, 12)
    self.assertGreater(sample.token_flops, 0)
    self.assertGreater(sample.token_traffic, 0)
    self.assertEqual(sample.warnings, [])

  def test_update(self):
    learn = self.rows["learn"]
    self.assertEqual(learn.warnings, [])
    self.assertGreater(learn.flops, 0)
    # Parameters and moments are given and taken back in their place.
    self.assertGreater(
      learn.memory["alias"], 0.99 * learn.memory["argument"] / 2
    )
    self.assertGreaterEqual(
      learn.memory["alias"], learn.memory["output"] - 2048
    )

  def test_what_lies_beside_the_sampler(self):
    """The moments of Adam, twice the parameters."""
    sample, learn = self.rows["sample"], self.rows["learn"]
    ratio = sample.beside / (learn.memory["alias"] / 3)
    self.assertBetween(ratio, 1.9, 2.1)


class CommandTest(absltest.TestCase):
  def _run(self, *words):
    output, errors = io.StringIO(), io.StringIO()
    environment = dict(os.environ)
    with (
      contextlib.redirect_stdout(output),
      contextlib.redirect_stderr(errors),
      jax.numpy_dtype_promotion("standard"),
      jax.numpy_rank_promotion("allow"),
      contextlib.chdir(conftest.REPOSITORY),
    ):
      try:
        status = command.main(words)
      finally:
        os.environ.clear()
        os.environ.update(environment)
    return status, output.getvalue(), errors.getvalue()

  def test_extrapolates_and_writes(self):
    path = _scratch() / "plan.json"
    status, output, errors = self._run(
      *("--target=cpu:8", "--layers=1,2", f"--json={path}"),
      *("--programs=optimizer,held-out loss", "--", "experiments/sft.py"),
      *(*_flags("sft"), *MESH),
    )
    self.assertEqual(status, 0, errors)
    self.assertIn("held-out loss: compiled in", output)
    self.assertIn("Extrapolated from 1 and 2 to 1 layers.", output)
    content = json.loads(path.read_text())
    names = [row["name"] for row in content["programs"]]
    self.assertEqual(names, ["optimizer", "held-out loss"])
    self.assertTrue(content["summary"]["fits"])

  def test_wrong_arguments(self):
    for words, message in (
      (["--target=cpu:8"], "no script to plan"),
      (["--target=v9", "--", "experiments/sft.py"], "--target=v9 is none of"),
      (["--target=cpu:8", "--", "nothing.py"], "nothing.py is no script"),
      (
        ["--target=cpu:8", "--layers=4,2", "--", "experiments/sft.py"],
        "two rising positive numbers",
      ),
      (
        ["--target=cpu:8", "--", "experiments/sft.py", "--nothing=1"],
        "Unknown command line flag 'nothing'",
      ),
      (
        [
          *("--target=cpu:8", "--", "experiments/grpo.py"),
          *("--policy=nowhere/x/y", "--task=arithmetic"),
        ],
        "neither a directory",
      ),
    ):
      with self.subTest(words):
        status, _, errors = self._run(*words)
        self.assertEqual(status, 2)
        self.assertIn(message, errors)
        self.assertEqual(errors.count("\n"), 1, errors)


if __name__ == "__main__":
  absltest.main()
