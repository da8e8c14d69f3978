"""Tests of the scripts for board games: a corpus, training, and pictures."""

import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

import pytest
from absl.testing import absltest

from rljax.tasks import games
from rljax.tasks.games import rewards as rewards_lib
from rljax.tasks.games import rules
from rljax.text import files
from tests import scripts

pytestmark = pytest.mark.skipif(
  importlib.util.find_spec("ludax") is None,
  reason='needs ludax: pip install -e ".[games]"',
)

ROOT = pathlib.Path(__file__).resolve().parents[2]
EXPAND = "experiments/games/expand.py"
# Runs a script with games that are played by formula.
_PROGRAM = """
import runpy, sys, zlib
from unittest import mock
from tests.tasks.games import task_test
from rljax.tasks.games import boards, pool

def measure(text, *unused):
  number = zlib.crc32(text.encode()) / 2**32
  return task_test.always(branching=number)()

def positions(texts, plies, **unused):
  sites = [len(boards.positions(*boards.board(t))) for t in texts]
  played = [
    {"stage": "played", "plies": num + 1, "board": [[0, 1]] * n}
    for n, num in zip(sites, plies, strict=True)
  ]
  return [{"stage": "memory"}] * len(played[:1]) + played[1:]

sys.argv = sys.argv[1:]
with task_test.measuring(measure):
  with mock.patch.object(pool, "positions", positions):
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


def call(script, *flags):
  """Status and output of a script, without worker processes."""
  done = subprocess.run(
    [sys.executable, "-c", _PROGRAM, script, *map(str, flags)],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )
  return done.returncode, done.stdout + done.stderr


def setUpModule():
  scripts.without_pictures()


def tearDownModule():
  scripts.remove_scratch()


class CorpusTest(absltest.TestCase):
  def test_splits_in_one_file(self):
    with tempfile.TemporaryDirectory() as folder:
      path = pathlib.Path(folder, "new", "corpus.jsonl")
      numbers = {"train": 20, "validation": 6, "test": 5}
      status, output = call(
        EXPAND,
        f"--output={path}",
        *(f"--num_{split}={num}" for split, num in numbers.items()),
      )
      self.assertEqual(status, 0, output)
      self.assertRegex(output, r"train: 20 of 20 games, \d+ played, \d+ s")
      rows = files.read_jsonl(path)
      texts = [row["text"] for row in rows]
      self.assertLen(set(texts), len(rows))
      for split, num in numbers.items():
        self.assertLen([r for r in rows if r["split"] == split], num)
        self.assertLen(games.texts(split, corpus=str(path), max_sites=37), num)
        self.assertRegex(output, rf"{num} games for {split} with \d+ prompts")
      self.assertTrue(path.with_name("corpus.jsonl.NOTICE").exists())
      self.assertTrue(path.with_name("corpus.jsonl.cache").is_dir())

      # The best of them, drawn: those that ludax ships are known.
      samples = path.with_name("samples.jsonl")
      status, output = self._draw(samples, rows)
      self.assertEqual(status, 0, output)
      page = path.with_name("games.html").read_text()
      self.assertEqual(page.count("<svg"), 3)
      self.assertEqual(page.count("not played: out of memory"), 1)
      self.assertEqual(page.count("after 6 random moves"), 2)
      rewards = [
        float(text.partition("</dd>")[0])
        for text in page.split("<dt>reward</dt><dd>")[1:]
      ]
      self.assertLen(rewards, 3)
      self.assertEqual(rewards, sorted(rewards, reverse=True))
      # All of them are in this corpus.
      status, output = self._draw(samples, rows, f"--corpus={path}")
      self.assertEqual(status, 0, output)
      self.assertIn("0 games of", output)
      status, output = self._draw(samples, rows, "--arm=other")
      self.assertNotEqual(status, 0)
      self.assertIn("has no sample of the policy other", output)

  def _draw(self, samples, rows, *flags):
    """Pictures of games, among texts that are none."""
    parts = {"is_playable": True, "is_good": True, "balance": 1.0}
    parts |= {"decisive": 1.0, "plies": 9.0, "branching": 5.0}
    good = rewards_lib.unread("played") | parts
    files.write_jsonl(
      samples,
      [
        {"reward": i / 100, "step": 3, "parts": good | {"game": row["text"]}}
        for i, row in enumerate(rows)
      ]
      + [
        {"reward": 1.0, "parts": good | {"game": text}}
        for text in ("(((", "<script>", None, rows[0]["text"] + ")")
      ]
      + [{"reward": 1.0, "parts": rewards_lib.unread("syntax")}],
    )
    return call(
      "experiments/games/draw.py",
      f"--samples={samples}",
      f"--output={samples.with_name('games.html')}",
      "--num=3",
      *flags,
    )

  def test_bad_flags(self):
    cases = (
      (["--num_train=0", "--num_validation=0"], "are all 0"),
      (["--max_sites=5"], r"--max_sites=5: .*\[9, 121\]"),
      (["--min_quality=2"], r"--min_quality=2: .*\[0, 1\]"),
      (["--seconds=0"], "--seconds=0: "),
      (["--memory_gb=-1"], "--memory_gb=-1: "),
      (["--num_games=1"], "--num_games=1: "),
      (["num_train=3"], "'num_train=3' on the command line is not a flag"),
      (["--output=."], "is a folder"),
    )
    lists = [["--output=/nonexistent/x", *flags] for flags, _ in cases]
    done = subprocess.run(
      [sys.executable, "tests/drive.py", EXPAND],
      cwd=ROOT,
      input=json.dumps(lists),
      capture_output=True,
      text=True,
      timeout=300,
      check=True,
    )
    results = json.loads(done.stdout.partition("RESULTS ")[2])
    for (_, message), result in zip(cases, results, strict=True):
      self.assertRegex(
        result["error"], f"^(IllegalFlag)?ValueError: .*{message}"
      )
    self.assertNotIn("played", done.stdout)

  @pytest.mark.slow
  def test_ctrl_c_leaves_no_worker(self):
    with tempfile.TemporaryDirectory() as folder:
      script = subprocess.Popen(
        [
          *(sys.executable, "-c"),
          # A shell's background jobs are started deaf to it.
          "import runpy, signal, sys; sys.argv = sys.argv[1:]; "
          "signal.signal(signal.SIGINT, signal.default_int_handler); "
          "runpy.run_path(sys.argv[0], run_name='__main__')",
          *(EXPAND, f"--output={folder}/corpus.jsonl", "--num_workers=2"),
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
      )
      self.addCleanup(script.wait)
      self.addCleanup(script.kill)
      self.assertIn("validation: 4 of 24", script.stdout.readline())
      children = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(script.pid)],
        capture_output=True,
        text=True,
        check=False,
      ).stdout.split()
      self.assertLen(children, 2)
      script.send_signal(signal.SIGINT)
      script.communicate(timeout=60)
      self.assertNotEqual(script.returncode, 0)
      deadline = time.monotonic() + 30
      while any(os.path.exists(f"/proc/{pid}") for pid in children):
        self.assertLess(time.monotonic(), deadline)
        time.sleep(0.1)


class TrainingTest(absltest.TestCase):
  def test_supervised_then_ppo(self):
    folder = scripts.scratch()
    short = (
      *("--num_examples=16", "--num_eval_prompts=4", "--batch_size=8"),
      *("--steps=2", "--warmup=0", "--schedule=linear"),
    )
    scripts.run(
      "experiments/sft.py",
      folder / "base",
      "--flagfile=experiments/flags/padula/games_cpu_base.flags",
      "--task_options=form=whole,max_words=100",
      *("--hidden_size=16", "--num_layers=1", "--num_heads=2", *short),
    )
    scripts.run(
      "experiments/sft.py",
      folder / "sft",
      "--flagfile=experiments/flags/padula/games_cpu_sft.flags",
      f"--policy={folder / 'base'}",
      "--task_options=min_share=0,max_words=100,max_gap=15",
      *("--max_response_length=16", *short),
    )
    rows = files.read_jsonl(folder / "sft" / "metrics.jsonl")
    self.assertEqual([row["step"] for row in rows], [0, 1, 2])
    scripts.run(
      "experiments/ppo.py",
      folder / "ppo",
      "--flagfile=experiments/flags/padula/games_cpu_ppo.flags",
      f"--policy={folder / 'sft'}",
      "--task_options=min_share=0,max_words=100,max_gap=15",
      # No board is small enough: nothing is compiled.
      "--score_options=max_sites=1",
      *("--max_length=16", "--num_prompts=8", "--num_eval_prompts=4"),
      *("--batch_size=4", "--minibatch_size=4", "--epochs=1", "--steps=1"),
      *("--preflight=off", "--num_page_samples=0", "--kl=none"),
    )
    (row, *_) = files.read_jsonl(folder / "ppo" / "metrics.jsonl")
    self.assertBetween(row["reward/mean"], 0, 0.25)
    for name in ("parses", "compiles", "is_playable", "is_good", "novelty"):
      self.assertIn(f"task/{name}", row)
    samples = files.read_jsonl(folder / "ppo" / "samples.jsonl")
    self.assertLen(samples, 4)
    for sample in samples:
      self.assertIn(sample["parts"]["stage"], ("syntax", "checks", "invalid"))
      self.assertIsNotNone(rules.around(sample["prompt"]))
    self.assertTrue(json.loads((folder / "ppo" / "summary.json").read_text()))


if __name__ == "__main__":
  absltest.main()
