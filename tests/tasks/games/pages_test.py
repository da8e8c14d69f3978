"""Tests of pages of games: the rules in lines, boards, and what is escaped."""

import importlib.util
import pathlib
import re
import tempfile
from xml.etree import ElementTree

import hypothesis
import pytest
from absl.testing import absltest, parameterized
from hypothesis import strategies as st

from rljax.tasks import games
from rljax.tasks.games import boards, pages, rules

pytestmark = pytest.mark.skipif(
  importlib.util.find_spec("ludax") is None,
  reason="needs ludax: pip install ludax==1.0.0 lark",
)


class PrettyTest(absltest.TestCase):
  def test_by_hand(self):
    text = (
      '(game "game" (players 2) (rules (play (repeat (P1 P2) (step "piece_1" '
      "direction:(up down) priority:1))) (end (if (full_board) (draw)))))"
    )
    self.assertEqual(
      pages.pretty(text, 40),
      '(game "game"\n'
      "  (players 2)\n"
      "  (rules\n"
      "    (play\n"
      "      (repeat (P1 P2)\n"
      '        (step "piece_1" direction:(up down)\n'
      "          priority:1)))\n"
      "    (end (if (full_board) (draw)))))",
    )

  @hypothesis.given(
    name=st.sampled_from(sorted(rules.shipped())),
    width=st.integers(1, 100),
  )
  def test_is_the_same_game(self, name, width):
    text = rules.shipped()[name]
    lines = pages.pretty(text, width)
    self.assertEqual(rules.canonical(lines), text)
    if width > 62:
      self.assertLess(max(map(len, lines.split("\n"))), width + 12)


class DrawTest(parameterized.TestCase):
  @parameterized.parameters(
    ("square", (4,), "rect", 17),
    ("rectangle", (3, 5), "rect", 16),
    ("hexagon", (5,), "polygon", 19),
    ("hex_rectangle", (3, 4), "polygon", 12),
  )
  def test_cells(self, shape, sizes, element, num):
    picture = ElementTree.fromstring(pages.draw(shape, sizes))
    self.assertLen(picture.findall(element), num)  # The wood is a rectangle.
    numbers = [int(text.text) for text in picture.findall("text")]
    self.assertEqual(numbers, list(range(len(numbers))))
    x, y, width, height = map(float, picture.get("viewBox").split())
    for text in picture.findall("text"):
      self.assertBetween(float(text.get("x")), x, x + width)
      self.assertBetween(float(text.get("y")), y, y + height)

  def test_neighbouring_cells_differ(self):
    for shape, sizes, near in (
      ("square", (5,), 1.1),
      ("hexagon", (5,), 1.1),
      ("hex_rectangle", (4, 4), 1.1),
    ):
      svg = pages.draw(shape, sizes)
      shades = re.findall(r'class="cell (s\d)"', svg)
      places = boards.positions(shape, sizes)
      for i, place in enumerate(places):
        for j in range(i):
          if abs(complex(*(place - places[j]))) < near:
            self.assertNotEqual(shades[i], shades[j], (shape, i, j))

  def test_pieces(self):
    pieces = [[], [0, 0], [0, 1], [1, 0], [2, 1], [3, 0], [4, 1], [], []]
    svg = pages.draw("square", (3,), pieces)
    picture = ElementTree.fromstring(svg)
    self.assertLen(picture.findall("circle"), 2)
    corners = [
      len(shape.get("points").split()) for shape in picture.findall("polygon")
    ]
    self.assertEqual(corners, [4, 3, 4, 10])
    self.assertEqual(svg.count('class="white"'), 3)
    self.assertEqual(svg.count('class="black"'), 3)
    numbers = [text.text for text in picture.findall("text")]
    self.assertEqual(numbers, ["0", "7", "8"])
    with self.assertRaisesRegex(ValueError, "9 sites .* got 2"):
      pages.draw("square", (3,), [[], []])


class WriteTest(absltest.TestCase):
  def test_page(self):
    text = rules.shipped()["tic_tac_toe"].replace("token", "<script>")
    self.assertIn('"<script>"', text)
    game = pages.Game(
      text,
      [[]] * 8 + [[0, 1]],
      "after 1 <move>",
      {"reward": 0.5, "<b>": "<i>"},
      games.shipped("train")["connect_four"],
      "connect <four>",
    )
    with tempfile.TemporaryDirectory() as folder:
      path = pathlib.Path(folder) / "games.html"
      pages.write(path, "A & <title>", [game], ["<note>"])
      page = path.read_text()
      self.assertLen(list(path.parent.iterdir()), 1)
    self.assertNotIn("script", page)
    for piece in (
      *("after 1 &lt;move&gt;", "<dd>0.50</dd>", "<dt>&lt;b&gt;</dt>"),
      *("connect &lt;four&gt;", "A &amp; &lt;title&gt;", "&lt;note&gt;"),
      *('class="black"', "default-src 'none'"),
    ):
      self.assertIn(piece, page)
    # What can be seen is the game, word for word.
    listing = re.search(r"<section><pre>(.*?)</pre>", page, re.S)[1]
    shown = re.sub(r"<[^>]+>", "", listing).replace("&quot;", '"')
    self.assertEqual(rules.canonical(shown), rules.neutral(text))

  def test_no_game(self):
    with tempfile.TemporaryDirectory() as folder:
      path = pathlib.Path(folder) / "games.html"
      pages.write(path, "None", [])
      self.assertIn("There is no such game.", path.read_text())


if __name__ == "__main__":
  absltest.main()
