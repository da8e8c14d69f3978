"""The worked fork of docs/forking.md applies to ppo.py, and trains."""

import json
import os
import pathlib
import subprocess
import sys
import tempfile

import jax
import jax.numpy as jnp
from absl.testing import absltest

from rljax.models import gpt2, hf
from rljax.tasks import arithmetic
from tests import scripts
from tests.docs import markdown

ROOT = markdown.ROOT
PAGE = (ROOT / "docs" / "forking.md").read_text()


def apply(diff: str, source: str) -> str:
  """Applies a block of a diff, whose context must be there once."""
  lines = diff.splitlines()
  before = [line[1:] for line in lines if line[:1] in " -"]
  after = [line[1:] for line in lines if line[:1] in " +"]
  before, after = ("\n" + "\n".join(x) + "\n" for x in (before, after))
  assert source.count(before) == 1, f"{before} is there {source.count(before)}x"
  return source.replace(before, after)


def environment():
  """That of script tests, for a script outside of this checkout."""
  found = scripts.environment()
  path = os.pathsep.join([str(ROOT), found.get("PYTHONPATH", "")])
  return found | {"PYTHONPATH": path}


def setUpModule():
  scripts.without_pictures()


def tearDownModule():
  scripts.remove_scratch()


class ForkingTest(absltest.TestCase):
  def test_fork_of_ppo_trains(self):
    source = (ROOT / "experiments" / "ppo.py").read_text()
    blocks = markdown.blocks(PAGE, "diff")
    self.assertLen(blocks, 3)
    num_lines = sum(line[:1] == "+" for x in blocks for line in x.splitlines())
    self.assertLessEqual(num_lines, 15)  # As its title says.
    for block in blocks:
      source = apply(block, source)

    folder = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))
    fork = folder / "ppo_floor.py"
    fork.write_text(source)
    config = gpt2.GPT2Config(
      vocab_size=109,
      hidden_size=16,
      num_layers=1,
      num_heads=2,
      max_positions=64,
    )
    model = gpt2.GPT2(config)
    ids = jnp.zeros((1, 2), jnp.int32)
    params = model.init(jax.random.key(0), ids, ids == 0)["params"]
    policy = folder / "policy"
    hf.save(policy, model, params, arithmetic.word_tokenizer())
    done = subprocess.run(
      [
        *(sys.executable, fork, f"--workdir={folder / 'run'}"),
        *(f"--policy={policy}", "--entropy_floor_coef=0.3"),
        *("--entropy_floor=5", *scripts.SUMS, "--steps=2"),
        *("--batch_size=8", "--num_prompts=64", "--num_eval_prompts=8"),
        *("--epochs=1", "--preflight=off", "--num_page_samples=0"),
        f"--compilation_cache={folder / 'cache'}",
      ],
      env=environment(),
      capture_output=True,
      text=True,
      check=False,
    )
    self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
    rows = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    # The floor is above the entropy of 106 equal tokens: all pay.
    first = json.loads(rows[0])
    self.assertAlmostEqual(
      first["entropy/shortfall"], 5 - first["entropy/token"], delta=0.1
    )


if __name__ == "__main__":
  absltest.main()
