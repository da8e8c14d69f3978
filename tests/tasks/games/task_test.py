"""Tests of the board-game task: prompts, rewards, limits and what is kept."""

import contextlib
import importlib.util
import math
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from unittest import mock

import pytest
from absl.testing import absltest, parameterized

from rljax.evaluation import answers
from rljax.tasks import games, sandbox
from rljax.tasks.games import pool, rewards, rules
from rljax.text import files, keywords

pytestmark = pytest.mark.skipif(
  importlib.util.find_spec("ludax") is None,
  reason="needs ludax: pip install ludax==1.0.0 lark",
)

ROOT = pathlib.Path(__file__).resolve().parents[3]
FAIR = {
  "stage": "played",
  "first": 0.5,
  "second": 0.5,
  "timeouts": 0.0,
  "stuck": 0.0,
  "plies": 100.0,
  "decisions": 1.0,
  "branching": 5.0,
}
NEW = (
  '(game "game" (players 2) (equipment (board (square 4)) (pieces ("piece_1" '
  'both))) (rules (play (repeat (P1 P2) (place "piece_1" (destination (empty)))'
  ')) (end (if (line "piece_1" 4) (mover win)) (if (line "piece_1" 3 '
  "orientation:diagonal) (mover lose)) (if (full_board) (draw)))))"
)


@contextlib.contextmanager
def measuring(measure):
  """Replaces the worker processes, and forgets what they said."""
  fake = mock.Mock()
  fake.map = lambda items: [measure(*item) for item in items]
  pool._MEASURED.clear()
  with mock.patch.object(pool, "_pool", lambda *unused: fake):
    yield fake
  pool._MEASURED.clear()


def always(**changes):
  return lambda *unused: sandbox.Outcome(value=FAIR | changes)


class LadderMeanTest(parameterized.TestCase):
  @parameterized.parameters(
    (1, 1, 1, 1),
    (0, 1, 0.6667, 0.2963),
    (1, 0, 0.3333, 0.0370),
    (1, 0.5, 0.8625, 0.6415),
    (0.5, 1, 0.9312, 0.8076),
  )
  def test_hand_computed(self, balance, decisive, code, true):
    for power_mean, expected in (("code", code), ("true", true)):
      found = rewards.ladder_mean(
        balance, decisive, decisive, power_mean=power_mean
      )
      self.assertAlmostEqual(found, expected, places=4)

  def test_no_numbers(self):
    for power_mean in ("code", "true"):
      mean = lambda x, p=power_mean: rewards.ladder_mean(
        x, 1.0, 1.0, power_mean=p
      )
      self.assertEqual(mean(math.nan), 0)
      self.assertEqual(mean(math.inf), 1)
    with self.assertRaisesRegex(ValueError, "got 'harmonic'"):
      rewards.ladder_mean(1, 1, 1, power_mean="harmonic")


class QualityTest(parameterized.TestCase):
  @parameterized.parameters(
    # A fair game of a hundred plies.
    ((1, 1, 0, 1, 100), 1.0),
    # Tic-tac-toe: sqrt(.71 .87) ((1 + .95^(1/3) + .45^(1/3)) / 3)³.
    ((0.71, 0.87, 0, 0.95, 7.6), 0.6050),
    # One side always wins; nobody does.
    ((0, 1, 0, 1, 100), 0.0),
    ((1, 0, 0, 1, 100), 0.0),
    # Half of the games are stopped: (2 + .5^(1/3))³ / 27; and at the length of
    # 250 of 300 plies, half of that term: (1 + 2 .5^(1/3))³ / 27.
    ((1, 1, 0.5, 1, 100), 0.8076),
    ((1, 1, 0.5, 1, 250), 0.6415),
    # No choice: ((2 + .01^(1/3)) / 3)³.
    ((1, 1, 0, 0, 100), 0.4027),
  )
  def test_hand_computed(self, numbers, expected):
    names = ("balance", "decisive", "timeouts", "decisions", "plies")
    found = rewards.quality(
      **dict(zip(names, numbers, strict=True)), max_plies=300
    )
    self.assertAlmostEqual(found, expected, delta=2e-4)


class PromptsTest(parameterized.TestCase):
  def test_splits_have_different_games(self):
    found = {
      split: set(games.texts(split, max_sites=999)) for split in games.SPLITS
    }
    # Sixteen, less gridworld, in which one side moves, and two slides.
    self.assertEqual([len(x) for x in found.values()], [9, 2, 2])
    self.assertEmpty(found["train"] & (found["validation"] | found["test"]))
    self.assertEmpty(found["validation"] & found["test"])

  def test_prompts_are_those_of_supervised(self):
    for options in ({}, {"form": "whole"}, {"min_share": 0.0}):
      pairs = games.supervised("train", 3, num=50, **options)
      self.assertLen(pairs, 50)
      self.assertEqual(
        games.prompts("train", 3, num=50, **options), [p for p, _ in pairs]
      )
      for prompt, middle in pairs:
        text = rules.compose(prompt, middle)
        self.assertIn(text, games.texts("train"))
        if not options:
          self.assertGreaterEqual(len(middle), 0.2 * len(prompt))
    self.assertNotEqual(
      games.prompts("train", 3, num=9), games.prompts("train", 4, num=9)
    )
    whole = games.prompts("train", 0, form="whole")
    self.assertEqual(set(whole), {"### PRE:### SUF: ### MID:"})

  def test_all_can_be_encoded(self):
    tokenizer = games.grammar_tokenizer()
    for prompt, middle in games.supervised("train", 0, min_share=0.0):
      tokenizer(prompt + middle)

  @parameterized.parameters(
    (("dev", 0), {}, "splits train, validation, test, got 'dev'"),
    (("train", 0), {"form": "end"}, "middle.*got 'end'"),
    (("train", 0), {"min_share": 9.0}, "no game .* min_share=9.0"),
    (("train", 0), {"max_sites": 3}, "no game of at most 3 sites"),
  )
  def test_bad_options(self, arguments, options, message):
    with self.assertRaisesRegex(ValueError, message):
      games.prompts(*arguments, **options)

  def test_corpus(self):
    with tempfile.TemporaryDirectory() as folder:
      path = pathlib.Path(folder) / "games.jsonl"
      files.write_jsonl(path, [{"text": NEW, "split": "train"}])
      self.assertEqual(games.texts("train", corpus=path), [NEW])
      self.assertEqual(games.texts("test", corpus=path), [])
      with measuring(always()):
        near, far = (
          games.score(games.WHOLE, NEW, corpus=corpus)[1]["novelty"]
          for corpus in (str(path), "")
        )
      self.assertEqual(near, 0)
      self.assertGreater(far, 0.1)
      for name, row, message in (
        ("bad", {"text": "(", "split": "train"}, r"row 1: '\(' is not a game"),
        ("number", {"text": 7, "split": "train"}, "row 1: '7' is not a game"),
        (
          "split",
          {"text": NEW, "split": 7},
          "row 1: the split must be .*got 7",
        ),
      ):
        path = path.with_name(f"{name}.jsonl")
        files.write_jsonl(path, [row])
        with self.assertRaisesRegex(ValueError, f"{name}.jsonl, {message}"):
          games.texts("train", corpus=path)


class ScoreTest(parameterized.TestCase):
  def _score(self, text, measure=None, **options):
    with measuring(measure or always()):
      return games.score(games.WHOLE, text, **options)

  def test_graded_by_hand(self):
    self.assertAlmostEqual(self._score(NEW)[0], 1.0)
    # Nothing of it is new: 0.35 + 0.65 * 0.2.
    copy = rules.shipped()["tic_tac_toe"]
    self.assertAlmostEqual(self._score(copy)[0], 0.48)
    # One word of 72: ν = 1/72/0.15.
    score, parts = self._score(copy.replace("square 3", "square 4"))
    self.assertAlmostEqual(parts["novelty"], 1 / 72)
    self.assertAlmostEqual(score, 0.48 + 0.65 * 0.8 / 72 / 0.15)
    # 132 of 222 characters.
    score, parts = self._score(copy.replace("destination", "destinatoin"))
    self.assertAlmostEqual(score, 0.14 * 132 / 200 * 132 / 222)
    self.assertEqual(parts["stage"], "syntax")
    # One check of sixteen fails.
    score, parts = self._score(NEW.replace("(players 2)", "(players 3)"))
    self.assertAlmostEqual(score, 0.15 + 0.1 * 15 / 16)
    self.assertEqual(parts["failed_checks"], ["two_players"])

  @parameterized.parameters(
    ({"stage": "construct_error"}, 0.25, 0.0),
    ({"stage": "trace_error"}, 0.28, 0.0),
    ({"stuck": 0.11}, 0.32, 0.05),
    ({"plies": 1.9}, 0.32, 0.05),
    ({"plies": 3.0}, 0.32, 1.0),
    ({"first": 1.0, "second": 0.0}, 0.35, 0.6667),
    ({"first": 0.0, "second": 0.0, "timeouts": 1.0}, 0.35, 0.3333),
  )
  def test_stages(self, changes, graded, ladder):
    self.assertAlmostEqual(self._score(NEW, always(**changes))[0], graded)
    score, _ = self._score(NEW, always(**changes), reward="ladder")
    self.assertAlmostEqual(score, ladder, places=4)

  @parameterized.parameters("timeout", "memory", "died", "error: OSError: x")
  def test_limits(self, failure):
    fails = lambda *unused: sandbox.Outcome(failure=failure)
    score, parts = self._score(NEW, fails)
    self.assertEqual(score, 0.28)
    self.assertFalse(parts["compiles"])
    self.assertEqual(self._score(NEW, fails, reward="ladder")[0], 0.01)

  def test_ladder(self):
    measure = always(first=0.75, second=0.25)
    for power_mean, expected in (("", 0.9312), ("true", 0.8076)):
      score, _ = self._score(
        NEW, measure, reward="ladder", power_mean=power_mean
      )
      self.assertAlmostEqual(score, expected, places=4)
    # The paper's reward knows no checks, and asks for longer games.
    asked = []
    measure = lambda *item: asked.append(item) or always()()
    self._score(NEW.replace("(players 2)", "(players 3)"), measure)
    self.assertEmpty(asked)
    self._score(
      NEW.replace("(players 2)", "(players 3)"), measure, reward="ladder"
    )
    self.assertEqual(asked[0][1:4], (0, 100, 500))
    self.assertEqual(self._score("(", measure, reward="ladder")[0], 0)

  def test_parts_are_the_same_everywhere(self):
    with measuring(always()):
      _, parts = games.score_batch(
        [games.WHOLE] * 4, [NEW, "", "### MID:", "(" * 10**6]
      )
    self.assertEqual(
      [part["stage"] for part in parts],
      ["played", "syntax", "invalid", "too_long"],
    )
    for part in parts:
      self.assertEqual(set(part), set(parts[0]))
    self.assertTrue(parts[0]["is_good"])
    self.assertEqual(answers.mean_parts(parts)["is_good"], 0.25)

  @parameterized.parameters('"token"', '"Tic-Tac-Toe"')
  def test_long_names(self, name):
    """The grammar of ludax has no limit for them."""
    text = rules.shipped()["tic_tac_toe"]
    for reward in ("graded", "ladder"):
      for letter in ("a", "(", '\\"'):
        for size in (100, 101):
          longer = text.replace(name, f'"{letter * size}"')
          score, parts = self._score(longer, reward=reward)
          self.assertEqual(parts["parses"], size == 100, longer)
          self.assertEqual(score > 0.3, size == 100)
          if reward == "graded" and size == 101:
            self.assertGreater(score, 0)

  def test_the_response_is_cut_and_put_into_the_gap(self):
    prefix, middle, suffix = rules.cuts(NEW)[3]
    prompt = rules.gap(prefix, suffix)
    with measuring(always()):
      _, parts = games.score(prompt, f" {middle} (and more")
    self.assertEqual(parts["game"], NEW)

  def test_duplicates_are_measured_once(self):
    asked = []
    measure = lambda *item: asked.append(item[0]) or always()()
    with measuring(measure):
      texts = [
        NEW,
        NEW.replace("(", " ( "),
        NEW.replace("(square 4)", "(square 5)"),
        NEW,
      ]
      scores, parts = games.score_batch([games.WHOLE] * 4, texts)
      self.assertLen(asked, 2)
      self.assertEqual(scores[0], scores[1])
      self.assertIsNot(parts[0], parts[3])
      games.score(games.WHOLE, NEW)
      self.assertLen(asked, 2)
      games.score(games.WHOLE, NEW, seed=1)
      self.assertLen(asked, 3)

  def test_disk(self):
    asked = []
    with tempfile.TemporaryDirectory() as folder:
      for changes in ({"plies": 50.0}, {"plies": 60.0}):
        measure = lambda *item, c=changes: asked.append(item) or always(**c)()
        _, parts = self._score(NEW, measure, cache=folder)
        self.assertEqual(parts["plies"], 50)
      self.assertLen(asked, 1)
      (path,) = pathlib.Path(folder).glob("*/*")
      path.write_text("{")  # The disk was full.
      self.assertEqual(self._score(NEW, measure, cache=folder)[1]["plies"], 60)
      # Limits are of this machine, on this day.
      path.unlink()
      fails = lambda *unused: sandbox.Outcome(failure="timeout")
      self._score(NEW, fails, cache=folder)
      self.assertEmpty(list(pathlib.Path(folder).glob("*/*")))

  def test_bad_options(self):
    for options, message in (
      ({"reward": "best"}, "reward must be .* got 'best'"),
      ({"power_mean": "best"}, "power_mean must be .* got 'best'"),
      ({"seed": -1}, "seed must be a whole number, 0 or more, got -1"),
      ({"seed": None}, "seed must be a whole number, 0 or more, got None"),
      ({"num_games": 2.5}, "num_games must be .*, 1 or more, got 2.5"),
      ({"max_plies": -2}, "max_plies must be"),
      ({"max_sites": 0}, "max_sites must be"),
      ({"num_workers": 0}, "num_workers must be"),
      ({"seconds": -1}, "seconds must be a positive number, got -1"),
      ({"memory_gb": "2"}, "memory_gb must be a positive number, got '2'"),
      ({"corpus": "/no/such.jsonl"}, "/no/such.jsonl"),
      ({"cache": "/proc/none"}, "cache=/proc/none: .* can be written to"),
    ):
      # As the scripts do at their start, where nothing would be played.
      with self.assertRaisesRegex(ValueError, message):
        games.score(games.WHOLE, "", **options)
    with self.assertRaisesRegex(ValueError, "prompt has the marks.*'.game'"):
      games.score("(game", NEW)
    keywords.check(games.score, {"cache": "", "seconds": 2})


@pytest.mark.slow
class PlayedTest(parameterized.TestCase):
  """With worker processes, which compile and play."""

  def test_every_stage_is_worth_more_than_the_one_before(self):
    copy = rules.shipped()["tic_tac_toe"]
    sheep = rules.shipped()["wolf_and_sheep"]
    cases = {
      "empty": ("", "syntax"),
      "misspelt": (copy.replace("full_board", "full_bord"), "syntax"),
      "undefined": (copy.replace('"token" 3', '"stone" 3'), "checks"),
      "construct": (
        copy.replace("(full_board)", '(>= (connected "token" (edge top)) 2)'),
        "construct_error",
      ),
      "trace": (
        sheep.replace(
          "(play (repeat",
          '(play (once_through (P1) (place "wolf" (destination (empty)))) '
          "(repeat",
        ),
        "trace_error",
      ),
      "stuck": (
        copy.replace("(empty)", "(and (empty) (edge top))"),
        "stuck",
      ),
      "one-sided": (
        copy.replace('(line "token" 3)', "(full_board)"),
        "played",
      ),
      "copy": (copy, "played"),
      "new": (NEW, "played"),
    }
    texts = [text for text, _ in cases.values()]
    scores, parts = games.score_batch(
      [games.WHOLE] * len(texts), texts, seconds=60.0
    )
    self.assertEqual(
      [part["stage"] for part in parts], [stage for _, stage in cases.values()]
    )
    for worse, better in zip(scores, scores[1:], strict=False):
      self.assertLess(worse, better)
    self.assertEqual(scores[6], 0.35)

  def test_hostile_games_cost_their_limit(self):
    text = NEW.replace("(square 4)", "(square 99)")
    start = time.monotonic()
    score, parts = games.score(
      games.WHOLE, text, reward="ladder", seconds=1.0, num_workers=1
    )
    self.assertEqual((score, parts["stage"]), (0.01, "timeout"))
    self.assertLess(time.monotonic() - start, 120)  # With the worker's start.

  def test_no_worker_is_left_behind(self):
    program = (
      "import signal, sys, threading, time\n"
      # A shell's background jobs are started deaf to it, and so are theirs.
      "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
      "from rljax.tasks import games\n"
      "from rljax.tasks.games import pool as pool_lib\n"
      "pool = pool_lib._pool(90.0, 2.0, 2)\n"
      "pool._settings['setup'] = None\n"
      "def tell():\n"
      "  while len(pool._workers) < 2 or not all(\n"
      "    w.item is not None for w in pool._workers):\n"
      "    time.sleep(0.1)\n"
      "  print(*[w._process.pid for w in pool._workers], flush=True)\n"
      "threading.Thread(target=tell, daemon=True).start()\n"
      f"texts = [{NEW!r}.replace('(square 4)', f'(square {{n}})')\n"
      "         for n in (98, 99)]\n"
      "games.score_batch([games.WHOLE] * 2, texts, reward='ladder',\n"
      "                  seconds=90.0, num_workers=2)\n"
    )
    driver = subprocess.Popen(
      [sys.executable, "-c", program],
      cwd=ROOT,
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL,
      text=True,
    )
    self.addCleanup(driver.wait)
    self.addCleanup(driver.kill)
    pids = list(map(int, driver.stdout.readline().split()))
    self.assertLen(pids, 2)
    for pid in pids:
      os.kill(pid, 0)
    driver.send_signal(signal.SIGINT)
    driver.communicate(timeout=60)
    self.assertNotEqual(driver.returncode, 0)
    deadline = time.monotonic() + 30
    alive = pids
    while alive and time.monotonic() < deadline:
      alive = [pid for pid in alive if pathlib.Path(f"/proc/{pid}").exists()]
      time.sleep(0.1)
    self.assertEmpty(alive)


if __name__ == "__main__":
  absltest.main()
