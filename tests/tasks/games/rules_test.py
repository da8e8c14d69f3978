"""Tests of what is said of a game's text: its form, grammar and meaning."""

import importlib.util
import tempfile
import time

import hypothesis
import hypothesis.strategies as st
import lark
import numpy as np
import pytest
import transformers
from absl.testing import absltest, parameterized

from rljax.tasks.games import rules
from rljax.text import tokens

pytestmark = pytest.mark.skipif(
  importlib.util.find_spec("ludax") is None,
  reason="needs ludax: pip install ludax==1.0.0 lark",
)


def _levenshtein(a, b):
  """Edit distance, by the textbook."""
  costs = list(range(len(b) + 1))
  for i, x in enumerate(a):
    row = [i + 1]
    for j, y in enumerate(b):
      row.append(min(costs[j] + (x != y), costs[j + 1] + 1, row[j] + 1))
    costs = row
  return costs[-1]


class CanonicalTest(parameterized.TestCase):
  def test_hand_computed(self):
    self.assertEqual(
      rules.canonical(
        '\n( game "A  b"\t(players 2) exclude: ( ( row 7 )(row 8))<= P1up'
      ),
      '(game "A  b" (players 2) exclude:((row 7) (row 8)) <= P1 up',
    )

  def test_shipped_games(self):
    games = rules.shipped()
    self.assertLen(games, 17)
    # Lengths of one line each, and words, by hand.
    self.assertEqual(sum(map(len, games.values())), 6976)
    self.assertLen(games["tic_tac_toe"], 222)
    self.assertLen(rules.words(games["tic_tac_toe"]), 72)
    for text in games.values():
      self.assertEqual(rules.canonical(text), text)

  def test_too_long(self):
    self.assertIsNone(rules.canonical("(" * 1501))
    self.assertEqual(rules.canonical("(" * 1500), "(" * 1500)
    self.assertIsNone(rules.canonical(" " * 10**6))

  @hypothesis.given(st.text('ab1"\\(): \n', max_size=60))
  def test_is_its_own_form(self, text):
    once = rules.canonical(text)
    self.assertEqual(rules.canonical(once), once)

  def test_hostile_text_takes_no_time(self):
    start = time.process_time()
    for text in ('"' * 9999, '"\\' * 5000, '("' * 5000, "(" * 10**6):
      rules.canonical(text)
      rules.trim(text)
      rules.progress(text[:1500])
    self.assertLess(time.process_time() - start, 5)


class ProgressTest(parameterized.TestCase):
  def test_shipped_games_follow_both_grammars(self):
    folder = rules._folder()
    original = lark.Lark((folder / "grammar.lark").read_text(), start="game")
    for name, text in rules.shipped().items():
      self.assertEqual(rules.progress(text), (len(text), True), name)
      original.parse(text)

  def test_hand_computed(self):
    text = rules.shipped()["tic_tac_toe"]
    used, complete = rules.progress(text.replace("destination", "destinatoin"))
    self.assertAlmostEqual(used / len(text), 0.5946, places=4)
    self.assertFalse(complete)
    # All of it fits, but it is no game.
    self.assertEqual(rules.progress(text[:-5]), (217, False))
    self.assertEqual(rules.progress(text + ")"), (222, False))
    self.assertEqual(rules.progress(""), (0, False))
    self.assertEqual(rules.progress("(game (players"), (5, False))

  @hypothesis.settings(max_examples=30)
  @hypothesis.given(st.data())
  def test_every_beginning_is_accepted_up_to_its_last_word(self, draw):
    name = draw.draw(st.sampled_from(sorted(rules.shipped())))
    lexemes = rules.words(rules.shipped()[name])
    num = draw.draw(st.integers(0, len(lexemes) - 1))
    text = rules.join(lexemes[:num])
    self.assertEqual(rules.progress(text), (len(text), False))
    wrong = rules.canonical(f"{text} nonsense")
    self.assertEqual(rules.progress(wrong)[0], len(text))


TEXT = (
  '(game "x" (players 2 (set_forward (P1 up) (P2 down))) (equipment (board '
  '(square 5)) (pieces ("a" both) ("b" P1)) (regions ("r" (1 24)) ("s" (row '
  '4)))) (rules (start (place "a" P1 (0 24))) (play (repeat (P1 P2) (place "a" '
  '(destination (or (empty) (edge forward))) (effects (promote "a" "b" '
  "(edge forward))))"
  ' (force_pass))) (end (if (line "a" 5) (mover win)) (if (exists (region "r"))'
  " (draw)) (if (passed both) (by_score)) (if (exists (promoted)) (draw)) (if "
  '(pattern "a" (2 (0 99)) rotate:true) (draw)) (if (exists (row 4)) (draw)))) '
  "(rendering (color P1 black)))"
)


class ChecksTest(parameterized.TestCase):
  def _failed(self, text, **options):
    text = rules.canonical(text)
    self.assertTrue(rules.progress(text)[1], text)
    found = rules.checks(text, **options)
    self.assertLen(found, 16)
    return [name for name, passes in found.items() if not passes]

  def test_nothing_wrong(self):
    self.assertEqual(self._failed(TEXT), [])

  @parameterized.parameters(
    ("(players 2 ", "(players 3 ", "two_players"),
    ("(repeat (P1 P2)", "(repeat (P1)", "both_move"),
    ('("b" P1)', '("a" P1)', "known_pieces", "unique_pieces"),
    ('("b" P1)', " ".join(f'("{c}" P1)' for c in "bcdef"), "few_pieces"),
    ('(line "a"', '(line "c"', "known_pieces"),
    ('promote "a" "b"', 'promote "a" "c"', "known_pieces"),
    ('(region "r")', '(region "a")', "known_regions"),
    ('("s" (row', '("r" (row', "unique_regions"),
    ("(1 24)", "(1 25)", "indices_on_board"),
    ("(0 24)", "(0 25)", "indices_on_board"),
    (" (set_forward (P1 up) (P2 down))", "", "forward_is_set"),
    ("(force_pass)", "", "pass_is_forced"),
    ('(promote "a" "b" (edge forward))', "(flip (row 1))", "promotion_exists"),
    ('(line "a" 5)', '(line "a" 6)', "line_fits"),
    ("(exists (row 4))", "(exists (row 5))", "rows_on_board"),
    ("(exists (row 4))", "(exists (column 9))", "rows_on_board"),
    ("(square 5)", "(rectangle 12 11)", "small_board"),
    ("(square 5)", f"(square {'9' * 99})", "small_board"),
    # A hexagon has no columns; of (hexagon 5) there are 19 sites.
    (
      "(square 5)",
      "(hexagon 5)",
      "indices_on_board",
    ),
  )
  def test_each_one(self, old, new, *expected):
    self.assertIn(old, TEXT)
    failed = self._failed(TEXT.replace(old, new))
    self.assertEqual(sorted(failed), sorted(expected))

  def test_score_needs_effects(self):
    text = TEXT.replace(' (effects (promote "a" "b" (edge forward)))', "")
    self.assertEqual(
      self._failed(text), ["score_has_effect", "promotion_exists"]
    )

  def test_slides_are_for_small_boards(self):
    games = rules.shipped()
    self.assertEqual(self._failed(games["hasami_shogi"]), ["short_slides"])
    self.assertEqual(self._failed(games["gridworld"]), ["both_move"])
    self.assertEqual(self._failed(games["gomoku"]), ["small_board"])
    self.assertEqual(self._failed(games["gomoku"], max_sites=225), [])

  @parameterized.parameters(
    ("square", (7,), (7, 7, 49)),
    ("rectangle", (6, 7), (6, 7, 42)),
    ("hex_rectangle", (3, 4), (3, 4, 12)),
    ("hexagon", (1,), (1, 0, 1)),
    ("hexagon", (9,), (9, 0, 61)),
  )
  def test_sites(self, shape, sizes, expected):
    self.assertEqual(rules.dimensions(shape, sizes), expected)


class NeutralTest(absltest.TestCase):
  def test_hand_computed(self):
    text = rules.neutral(rules.canonical(TEXT))
    self.assertStartsWith(text, '(game "game" (players 2 (set_forward')
    self.assertIn('(pieces ("piece_1" both) ("piece_2" P1))', text)
    self.assertIn('("region_1" (1 24)) ("region_2" (row 4))', text)
    self.assertIn('(promote "piece_1" "piece_2" (edge forward))', text)
    self.assertIn('(exists (region "region_1"))', text)
    self.assertNotIn("rendering", text)
    self.assertTrue(rules.progress(text)[1])
    self.assertEqual(rules.neutral(text), text)

  def test_a_piece_and_a_region_of_one_name(self):
    text = TEXT.replace('"r"', '"a"')
    self.assertEqual(
      rules.neutral(rules.canonical(text)),
      rules.neutral(rules.canonical(TEXT)),
    )


class GapTest(parameterized.TestCase):
  @parameterized.parameters(
    ("(a (b) ) c)", "(a (b) )"),
    ("{(x)} y", "{(x)}"),
    ("((a)", "((a)"),
    ("atom (b) c", "atom (b)"),
    ("", ""),
    ("a) b", "a) b"),
    ("({)}", "({)}"),
  )
  def test_trim(self, text, expected):
    self.assertEqual(rules.trim(text), expected)

  def test_every_cut_of_every_game_round_trips(self):
    num, fifth = 0, 0
    for text in rules.shipped().values():
      for prefix, middle, suffix in rules.cuts(text):
        prompt = rules.gap(prefix, suffix)
        self.assertEqual(rules.compose(prompt, middle), text)
        self.assertEqual(rules.trim(middle + " (more)"), middle)
        num += 1
        fifth += len(middle) >= 0.2 * (len(prefix) + len(suffix))
    # Inner brackets of the corpus; those of a fifth of the rest.
    self.assertEqual((num, fifth), (533, 104))

  def test_markers(self):
    prompt = rules.gap("(game ", " (end))")
    self.assertEqual(prompt, "### PRE:(game ### SUF:  (end))### MID:")
    self.assertEqual(rules.compose(prompt, "(x)"), "(game (x) (end))")
    for mark in ("### PRE:", "### SUF:", "### MID:"):
      self.assertIsNone(rules.compose(prompt, f"(x {mark})"))
      self.assertIsNone(rules.compose(prompt.replace(mark, ""), "(x)"))
    self.assertIsNone(rules.compose("### MID:### PRE:### SUF: ", ""))
    self.assertIsNone(rules.compose("a" + prompt, ""))


class NoveltyTest(parameterized.TestCase):
  def test_hand_computed(self):
    games = rules.shipped()
    novelty = rules.Novelty(list(games.values()))
    for text in games.values():
      self.assertEqual(novelty(text), 0)
    text = games["tic_tac_toe"]
    # One of 72 words.
    self.assertAlmostEqual(novelty(text.replace('" 3)', '" 2)')), 1 / 72)
    # Names and looks do not count; nor does what changes nothing.
    for old, new in (
      ("token", "stone"),
      ("Tic", "T"),
      ("(empty)", "(not (not (empty)))"),
      ("(empty)", "(and (or (empty) (empty)))"),
      ("(if (full_board) (draw))", "(if (full_board) (draw)) " * 2),
    ):
      changed = rules.canonical(text.replace(old, new))
      self.assertNotEqual(changed, text)
      self.assertTrue(rules.progress(changed)[1])
      self.assertEqual(novelty(changed), 0, new)
    self.assertGreater(novelty(text.replace("(empty)", "(not (empty))")), 0)

  @hypothesis.settings(max_examples=20)
  @hypothesis.given(seed=st.integers(0, 2**32 - 1))
  def test_matches_oracle(self, seed):
    rng = np.random.default_rng(seed)
    games = list(rules.shipped().values())
    some = [games[i] for i in rng.choice(17, 3, replace=False)]
    *corpus, text = some
    rows = [rules.words(rules.neutral(t)) for t in some]
    expected = min(
      _levenshtein(rows[-1], row) / max(len(row), len(rows[-1]))
      for row in rows[:-1]
    )
    self.assertAlmostEqual(rules.Novelty(corpus)(text), expected)

  def test_nothing_to_compare_with(self):
    with self.assertRaisesRegex(ValueError, "corpus .* is empty"):
      rules.Novelty([])


class TokenizerTest(parameterized.TestCase):
  def test_round_trip(self):
    with tempfile.TemporaryDirectory() as folder:
      rules.grammar_tokenizer().save_pretrained(folder)
      tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokens.require_tokens(tokenizer, pad=True)
    for text in rules.shipped().values():
      text = rules.neutral(text)
      ids = tokenizer(text)["input_ids"]
      self.assertEqual(ids[0], tokenizer.bos_token_id)
      self.assertLen(ids, 1 + len(rules.words(text)))
      self.assertEqual(tokenizer.decode(ids[1:]), text)

  def test_prompts_and_responses(self):
    tokenizer = rules.grammar_tokenizer()
    text = rules.neutral(rules.shipped()["reversi"])
    for prefix, middle, suffix in rules.cuts(text):
      prompt = rules.gap(prefix, suffix)
      ((prompt_ids, ids),) = tokens.encode_pairs(
        tokenizer,
        [(prompt, middle)],
        max_prompt_length=256,
        max_response_length=256,
      )
      self.assertEqual(tokenizer.decode(ids, skip_special_tokens=True), middle)
      marks = [m.strip() for m in rules.MARKERS]
      for mark in tokenizer.convert_tokens_to_ids(marks):
        self.assertEqual(prompt_ids.count(mark), 1)
      # A marker that a model writes is seen.
      self.assertEqual(tokenizer.decode(prompt_ids[-1:]), marks[-1])

  def test_other_words_are_errors(self):
    tokenizer = rules.grammar_tokenizer()
    for text in ("destinatoin", '"token"', "225"):
      with self.assertRaisesRegex(ValueError, "cannot encode"):
        tokens.encode_prompts(tokenizer, [text], max_length=9)


class NoticeTest(absltest.TestCase):
  def test_names_source_and_licence(self):
    text = rules.notice()
    self.assertIn("ludax", text)
    self.assertIn("Apache License", text)
    self.assertIn("TERMS AND CONDITIONS", text)


if __name__ == "__main__":
  absltest.main()
