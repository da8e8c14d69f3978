"""Tests of new games, made by changing known ones."""

import importlib.util
import pathlib
import tempfile

import numpy as np
import pytest
from absl.testing import absltest, parameterized

from rljax import data
from rljax.tasks import game_rules, game_variants, games
from tests.tasks import games_test

pytestmark = pytest.mark.skipif(
  importlib.util.find_spec("ludax") is None,
  reason='needs ludax: pip install "rljax[games]"',
)


def _measure(text, *unused):
  """Some games are bad: those with an odd number of words."""
  is_bad = len(game_rules.words(text)) % 2
  changes = {"first": 1.0, "second": 0.0} if is_bad else {}
  return games_test.always(**changes)()


class ExpandTest(parameterized.TestCase):
  def _expand(self, measure=_measure, **options):
    with tempfile.TemporaryDirectory() as folder:
      path = pathlib.Path(folder) / "games.jsonl"
      with games_test.measuring(measure):
        rows = game_variants.expand(path, **options)
      self.assertEqual(data.read_jsonl(path), rows)
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
    shipped = games.texts("train")
    self.assertEqual(texts[: len(shipped)], shipped)
    for i, row in enumerate(rows):
      self.assertEqual(row["licence"], "Apache-2.0")
      self.assertStartsWith(row["source"], "ludax 1.")
      self.assertContainsSubset(row["roots"], games.shipped("train"))
      if i < len(shipped):
        self.assertEqual(row["parents"], row["roots"])
        self.assertEmpty(row["changes"])
        continue
      self.assertNotEmpty(row["changes"])
      self.assertLess(max(row["parents"]), i)
      # What it has been made of is in its parents, up to the changed words.
      self.assertEqual(len(game_rules.words(row["text"])) % 2, 0)
      self.assertGreater(row["quality"], 0.9)
    kinds = {kind for row in rows for kind in row["changes"]}
    self.assertEqual(kinds, {"swap", "integer", "shape", "word"})
    # Games are changed again.
    self.assertTrue(
      any(
        parent >= len(shipped)
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

  def test_no_game_is_good_enough(self):
    rows = self._expand(
      games_test.always(first=1.0, second=0.0), num=20, max_tries=50
    )
    self.assertEqual([row["text"] for row in rows], games.texts("train"))

  def test_bad_options(self):
    for options, message in (
      ({"split": "dev"}, "splits train"),
      ({"max_sites": 3}, "No shipped game .* at most 3 sites"),
    ):
      with self.assertRaisesRegex(ValueError, message):
        self._expand(num=3, **options)


class ChangedTest(absltest.TestCase):
  def test_a_swap_keeps_the_first_word(self):
    donors = game_variants._Donors()
    donors.add("(game (end (x) (y 1)))", 0)
    donors.add("(game (end (x) (y 2)) (z))", 1)
    self.assertEqual(donors.like("(y 3)"), [("(y 1)", 0), ("(y 2)", 1)])
    self.assertEqual(donors.like("(x)"), [("(x)", 0)])
    self.assertEqual(donors.like("(w)"), [])
    rng = np.random.default_rng(0)
    found = {
      text
      for text, changes, others in (
        game_variants._changed("(game (y 3))", donors, rng) for _ in range(200)
      )
      if changes == ["swap"]
    }
    self.assertEqual(found, {"(game (y 1))", "(game (y 2))"})


if __name__ == "__main__":
  absltest.main()
