"""Tests of new games, made by changing known ones."""

import importlib.util
import pathlib
import tempfile
import zlib

import numpy as np
import pytest
from absl.testing import absltest, parameterized

from rljax.tasks import games, sandbox
from rljax.tasks.games import boards, rules, variants
from rljax.text import files
from tests.tasks.games import task_test

pytestmark = pytest.mark.skipif(
  importlib.util.find_spec("ludax") is None,
  reason="needs ludax: pip install ludax==1.0.0 lark",
)


def _measure(text, *unused):
  """Some games are bad: those with an odd number of words. All differ."""
  if len(rules.words(text)) % 2:
    return task_test.always(first=1.0, second=0.0)()
  return task_test.always(branching=zlib.crc32(text.encode()) / 2**32)()


class ExpandTest(parameterized.TestCase):
  def _expand(self, measure=_measure, **options):
    with tempfile.TemporaryDirectory() as folder:
      path = pathlib.Path(folder) / "games.jsonl"
      with task_test.measuring(measure):
        rows = variants.expand(**options)
      variants.write(path, rows)
      self.assertEqual(files.read_jsonl(path), rows)
      self.notice = path.with_name("games.jsonl.NOTICE").read_text()
      if rows:
        self.texts = games.texts(options.get("split", "train"), corpus=path)
    return rows

  def test_rows(self):
    rows = self._expand(num=60)
    self.assertLen(rows, 60)
    self.assertIn("Apache License", self.notice)
    self.assertIn("ludax", self.notice)
    texts = [row["text"] for row in rows]
    self.assertEqual(self.texts, texts)  # All sound, of one split, different.
    shipped = games.texts("train", max_sites=37)
    self.assertEqual(texts[: len(shipped)], shipped)
    names = [row["name"] for row in rows]
    self.assertEqual(names, [f"train_{i}" for i in range(60)])
    for i, row in enumerate(rows):
      self.assertEqual(row["licence"], "Apache-2.0")
      self.assertStartsWith(row["source"], "ludax 1.")
      self.assertContainsSubset(row["roots"], games.shipped("train"))
      shape, sizes = boards.board(row["text"])
      self.assertLessEqual(rules.dimensions(shape, sizes)[2], 37)
      if i < len(shipped):
        self.assertEqual(row["parents"], row["roots"])
        self.assertEmpty(row["changes"])
        continue
      self.assertNotEmpty(row["changes"])
      self.assertContainsSubset(
        row["parents"], set(names[:i]) | set(games.shipped("train"))
      )
      self.assertEqual(len(rules.words(row["text"])) % 2, 0)
      self.assertGreater(row["quality"], 0.9)
    kinds = {kind for row in rows for kind in row["changes"]}
    self.assertEqual(kinds, {"swap", "integer", "board", "word"})
    # Games are changed again.
    self.assertTrue(
      any(
        parent in names[len(shipped) :]
        for row in rows[len(shipped) :]
        for parent in row["parents"]
      )
    )

  def test_seeds_and_splits(self):
    first, again, other, test = (
      [row["text"] for row in self._expand(num=20, **options)]
      for options in ({}, {}, {"seed": 1}, {"split": "test"})
    )
    self.assertEqual(first, again)
    self.assertNotEqual(first, other)
    self.assertEmpty(set(first) & set(test))

  def test_games_that_play_the_same_count_once(self):
    rows = self._expand(task_test.always(), num=20, max_tries=100)
    self.assertLen(rows, 1)

  def test_games_of_other_splits_are_not_made_again(self):
    rows = self._expand(num=20)
    others = [row["text"].replace("piece_1", "stone") for row in rows[1:]]
    again = self._expand(num=20, apart_from=others)
    self.assertEqual(again[0]["text"], rows[0]["text"])
    known = rules.Novelty(others)
    self.assertGreater(min(known(row["text"]) for row in again), 0)

  def test_games_that_are_large_are_changed_first(self):
    rows = self._expand(
      lambda text, *_: task_test.always(plies=50.0 + len(text) / 100)(),
      num=4,
      split="test",
    )
    self.assertEqual(
      [(row["parents"], boards.board(row["text"])) for row in rows],
      [
        (["hex"], ("hex_rectangle", (6, 6))),
        (["reversi"], ("square", (6,))),
      ]
      + [(row["parents"], boards.board(row["text"])) for row in rows[2:]],
    )

  def test_progress(self):
    told = []
    rows = self._expand(
      num=30, progress=lambda kept, played: told.append((kept, played))
    )
    self.assertEqual(told[-1][0], len(rows))
    self.assertEqual(told, sorted(told))
    self.assertGreaterEqual(told[-1][1], 30)

  def test_a_run_that_was_stopped_goes_on(self):
    class Stop(Exception):
      pass

    def measure(text, *unused):
      calls.append(text)
      if len(calls) == stop_at:
        raise Stop
      # A limit depends on the machine: it must be remembered, too.
      if len(calls) % 7 == 3:
        return sandbox.Outcome(failure="timeout")
      return _measure(text)

    def expand(cache):
      with task_test.measuring(measure):
        return variants.expand(num=30, cache=cache)

    with (
      tempfile.TemporaryDirectory() as one,
      tempfile.TemporaryDirectory() as other,
    ):
      calls, stop_at = [], None
      whole = expand(one)
      num_calls = len(calls)
      calls, stop_at = [], 40
      with self.assertRaises(Stop):
        expand(other)
      num_known = len(list(pathlib.Path(other).rglob("*.json")))
      self.assertBetween(num_known, 1, 39)
      calls = calls[:num_known]  # Those of the batch that was lost.
      stop_at = None
      self.assertEqual(expand(other), whole)
      self.assertLen(calls, num_calls)

  def test_no_game_is_good_enough(self):
    rows = self._expand(
      task_test.always(first=1.0, second=0.0), num=20, max_tries=50
    )
    self.assertEqual(
      [row["text"] for row in rows], games.texts("train", max_sites=37)
    )

  def test_bad_options(self):
    for options, message in (
      ({"split": "dev"}, "splits train"),
      ({"max_sites": 8}, "max_sites must be from 9 to 121, got 8"),
      ({"num": 0}, "num must be positive"),
      ({"min_quality": 1.5}, "min_quality .* got 1.5"),
    ):
      with self.assertRaisesRegex(ValueError, message):
        self._expand(**{"num": 3} | options)


class ChangedTest(absltest.TestCase):
  def test_a_swap_keeps_the_first_word(self):
    donors = variants._Donors()
    donors.add("(game (end (x) (y 1)))", 0)
    donors.add("(game (end (x) (y 2)) (z))", 1)
    self.assertEqual(donors.like("(y 3)"), [("(y 1)", 0), ("(y 2)", 1)])
    self.assertEqual(donors.like("(x)"), [("(x)", 0)])
    self.assertEqual(donors.like("(w)"), [])
    rng = np.random.default_rng(0)
    found = {
      text
      for text, changes, others in (
        variants._changed("(game (y 3))", donors, rng, 37) for _ in range(200)
      )
      if changes == ["swap"]
    }
    self.assertEqual(found, {"(game (y 1))", "(game (y 2))"})


if __name__ == "__main__":
  absltest.main()
