"""Tests of boards: where sites are, and games that change their board."""

import importlib.util

import numpy as np
import pytest
from absl.testing import absltest, parameterized

from rljax.tasks import games
from rljax.tasks.games import boards, play, rules

pytestmark = pytest.mark.skipif(
  importlib.util.find_spec("ludax") is None,
  reason="needs ludax: pip install ludax==1.0.0 lark",
)


class PositionsTest(parameterized.TestCase):
  @parameterized.parameters(
    ("square", (3,), [(0, 0), (1, 0), (2, 0), (0, 1)]),
    ("rectangle", (2, 3), [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1)]),
    ("hex_rectangle", (2, 2), [(0, 0), (1, 0), (0.5, 0.866), (1.5, 0.866)]),
    ("hexagon", (3,), [(0.5, 0), (1.5, 0), (0, 0.866), (1, 0.866)]),
  )
  def test_hand_computed(self, shape, sizes, expected):
    found = boards.positions(shape, sizes)
    self.assertLen(found, rules.dimensions(shape, sizes)[2])
    np.testing.assert_allclose(found[: len(expected)], expected, atol=1e-3)

  @parameterized.parameters(
    ("square", (4,), 2**0.5, (4, 4)),
    ("rectangle", (3, 4), 2**0.5, (3, 4)),
    ("hexagon", (5,), 1, (5, 9)),
    ("hex_rectangle", (3, 4), 1, (3, 4)),
  )
  def test_neighbours_are_near(self, shape, sizes, far, dims):
    places = boards.positions(shape, sizes)
    gaps = np.linalg.norm(places[:, None] - places, axis=-1)
    near = (gaps > 0) & (gaps < far + 1e-6)
    # As the game itself counts neighbours.
    table = play.adjacency_table(f"{shape}_shape", dims).any(0)
    np.testing.assert_array_equal(near, table)


class OnBoardTest(parameterized.TestCase):
  def test_reversi_keeps_its_middle(self):
    text = games.shipped("test")["reversi"]
    small = boards.on_board(text, "square", (6,))
    self.assertIn("P1 (15 20)", small)
    self.assertIn("P2 (14 21)", small)
    self.assertEqual(boards.board(small), ("square", (6,)))
    rest = "(play (repeat (P1 P2)"
    self.assertEqual(small.partition(rest)[2], text.partition(rest)[2])

  def test_rows_lines_and_pieces(self):
    text = (
      '(game "game" (players 2) (equipment (board (square 8)) (pieces '
      '("piece_1" both)) (regions ("region_1" (7 56 57)))) (rules (start '
      '(place "piece_1" P1 ((row 7) (column 2))) (place "piece_1" P1 (0 1 63)) '
      '(place "piece_1" P2 (8 9 62))) (play (repeat (P1 P2) (place "piece_1" '
      '(destination (empty))))) (end (if (line "piece_1" 5) (mover win)) (if '
      '(pattern "piece_1" (2 (0 3))) (mover win)))))'
    )
    self.assertTrue(rules.progress(text)[1])
    expected = (
      text.replace("square 8", "square 4")
      .replace("(7 56 57)", "(3 12)")
      .replace("row 7", "row 3")
      .replace("column 2", "column 1")
      .replace("(0 1 63)", "(0 15)")
      .replace("(8 9 62)", "(0)")  # Taken, but a list may not be empty.
      .replace('1" 5)', '1" 3)')
    )
    self.assertEqual(boards.on_board(text, "square", (4,)), expected)
    # Lines of a larger board stay as long as they are.
    large = boards.on_board(text, "square", (9,))
    self.assertIn('(line "piece_1" 5)', large)
    self.assertIn('"piece_1" (2 (0 3))', large)

  def test_all_games_on_small_boards(self):
    for split in games.SPLITS:
      for name, text in games.shipped(split).items():
        for small in boards.smaller(text, 37):
          self.assertEqual(rules.canonical(small), small, name)
          self.assertTrue(rules.progress(small)[1], name)
          failed = [
            check
            for check, passes in rules.checks(small, max_sites=37).items()
            if not passes
          ]
          # In this one a single player moves.
          self.assertEqual(failed, ["both_move"] * (name == "gridworld"), name)

  def test_small_enough(self):
    text = games.shipped("train")["tic_tac_toe"]
    self.assertEmpty(boards.smaller(text, 37))
    self.assertEqual(boards.on_board(text, "square", (3,)), text)


class BoardsTest(absltest.TestCase):
  def test_sizes(self):
    found = boards.boards(37)
    self.assertEqual(found["square"], ((3,), (4,), (5,), (6,)))
    self.assertEqual(found["hexagon"], ((5,), (7,)))
    self.assertIn((5, 7), found["rectangle"])
    self.assertNotIn((6, 7), found["rectangle"])
    self.assertNotIn((6, 6), found["rectangle"])


if __name__ == "__main__":
  absltest.main()
