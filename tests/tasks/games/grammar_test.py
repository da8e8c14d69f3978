"""Tests of the grammar of board games as arrays."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from rljax.generation import decode, grammars
from rljax.ops import sampling
from rljax.tasks import games, tokenizers
from rljax.tasks.games import rules
from rljax.text import (
  batches,
  tokens,
  vocabularies,
)
from tests import tiny

pytestmark = pytest.mark.skipif(
  importlib.util.find_spec("ludax") is None,
  reason="needs ludax: pip install ludax==1.0.0 lark",
)


@functools.cache
def _tokenizer():
  return games.grammar_tokenizer()


@functools.cache
def _grammar():
  # A model may have more tokens than its tokenizer.
  return grammars.Tables(**games.grammar(_tokenizer(), vocab_size=384))


def _constraint(prompts):
  places = games.places(prompts, _tokenizer(), vocab_size=384)
  return grammars.constraint(_grammar(), **places)


def _words(row):
  names = {i: word for word, i in _tokenizer().get_vocab().items()}
  return {names[i] for i in np.flatnonzero(row)}


_allowed = jax.jit(grammars.Constraint.allowed)
_advance = jax.jit(grammars.Constraint.advance)


class TablesTest(parameterized.TestCase):
  def test_all_that_was_cut_out_may_be_written(self):
    rows = games.supervised("train", 0, min_share=0)
    rows += games.supervised("test", 0, form="whole")
    self.assertGreater(len(rows), 150)
    prompts, middles = zip(*rows, strict=True)
    ids = [
      [*_tokenizer()(middle, add_special_tokens=False).input_ids, None]
      for middle in middles
    ]
    constraint = _constraint(prompts)
    place = jax.tree.map(jnp.asarray, constraint.start)
    end = _tokenizer().eos_token_id
    for t in range(max(map(len, ids))):
      found = np.asarray(_allowed(constraint, place))
      drawn = np.full(len(rows), end, np.int32)
      for i, row in enumerate(ids):
        if t < len(row) - 1:
          drawn[i] = row[t]
          self.assertFalse(found[i, end], (prompts[i], middles[i], t))
        if t < len(row):
          self.assertTrue(found[i, drawn[i]], (prompts[i], middles[i], t))
        if t == len(row) - 1:
          self.assertEqual(found[i].sum(), 1)
      place = _advance(constraint, place, drawn)

  def test_allows_what_the_parser_of_texts_reads(self):
    # What `rules.progress` says of a text with one more word.
    text = games.texts("train")[3]
    lexemes = rules.words(text)
    constraint = _constraint([games.WHOLE])
    place = jax.tree.map(jnp.asarray, constraint.start)
    rng = np.random.default_rng(0)
    looked_at = set(rng.choice(np.arange(2, len(lexemes)), 10, replace=False))
    vocabulary = _tokenizer().get_vocab()
    total = 0
    for t, lexeme in enumerate(lexemes):
      if t in looked_at:
        start = rules.join(lexemes[:t])
        expected = set()
        for word in rules.vocabulary()[len(rules.MARKERS) :]:
          longer = rules.join([*lexemes[:t], word])
          if rules.progress(longer)[0] == len(longer):
            expected.add(word)
        found = _words(np.asarray(_allowed(constraint, place))[0])
        self.assertEqual(found, expected, start)
        total += len(found)
      place = _advance(constraint, place, jnp.array([vocabulary[lexeme]]))
    self.assertGreater(total, 50)

  def test_what_may_begin_fits_on_both_sides(self):
    text = next(t for t in games.texts("train") if "(full_board)" in t)
    seconds = {}
    for prefix, middle, suffix in rules.cuts(text):
      constraint = _constraint([rules.gap(prefix, suffix)])
      found = _words(constraint.seconds[0])
      self.assertIn(rules.words(middle)[1], found)
      seconds[rules.words(middle)[1]] = found
    # The rules have a play and an end, and nothing but a start before them.
    self.assertEqual(seconds["play"], {"play"})
    self.assertEqual(seconds["end"], {"end"})
    self.assertEqual(seconds["equipment"], {"equipment"})
    self.assertEqual(seconds["rules"], {"rules"})
    self.assertEqual(
      seconds["board"], {"board"}, "what stands behind needs a board before it"
    )
    self.assertTrue({"and", "line", "passed"} <= seconds["full_board"])
    self.assertFalse({"empty", "win", "game"} & seconds["full_board"])
    self.assertTrue({"empty", "occupied", "line"} <= seconds["empty"])
    self.assertNotIn("full_board", seconds["empty"])


class SampleTest(absltest.TestCase):
  def test_a_policy_without_a_notion_writes_games_that_parse(self):
    prompts = games.prompts("train", 0, num=23) + [games.WHOLE]
    encoded = tokens.encode_prompts(_tokenizer(), prompts, max_length=512)
    ids, mask = batches.pad_left(encoded)
    config = tiny.gpt2_config(vocab_size=384, max_positions=600)
    end = _tokenizer().eos_token_id
    run = functools.partial(
      decode.sample,
      model=tiny.model(config),
      max_length=64,
      settings=sampling.Settings(),
      allowed=jnp.asarray(
        vocabularies.allowed_tokens(_tokenizer(), 384, (end,))
      ),
      stop_ids=(end,),
      num_samples=2,
    )

    def shares(constraint):
      samples = jax.jit(run)(
        jax.random.key(0),
        params=tiny.params(config),
        prompt_ids=jnp.asarray(ids),
        prompt_mask=jnp.asarray(mask),
        constraint=constraint,
      )
      texts = tokens.decode(
        _tokenizer(),
        np.asarray(samples.response_ids),
        np.asarray(samples.response_mask),
      )
      composed = [
        rules.compose(prompts[i // 2], text) or ""
        for i, text in enumerate(texts)
      ]
      parse = [
        rules.progress(rules.canonical(text) or "")[1] for text in composed
      ]
      return np.asarray(parse), np.asarray(samples.finished)

    parse, finished = shares(_constraint(prompts))
    self.assertGreater(finished.mean(), 0.3)
    np.testing.assert_array_equal(parse, finished)
    parse, _ = shares(None)
    self.assertLess(parse.mean(), 0.05)


class ErrorsTest(parameterized.TestCase):
  def test_tokenizer_without_the_words(self):
    other = tokenizers.of_words(["(", ")"], ".")
    with self.assertRaisesRegex(ValueError, "this one lacks game"):
      games.grammar(other, vocab_size=8)
    # As tokenizers of natural text have them.
    words = ["(", ")", "game", "players", "board", *map(str, range(10))]
    other = tokenizers.of_words(words, r"\w+|.")
    with self.assertRaisesRegex(ValueError, "lacks .*, <=, .* more"):
      games.grammar(other, vocab_size=20)

  @parameterized.named_parameters(
    ("no_gap", "(game", "has the marks"),
    ("wrong_start", rules.gap("(players 2) ", ")"), "does not follow"),
    ("nothing_fits", rules.gap("(game ", ")"), "No expression fits"),
    (
      "too_deep",
      rules.gap(
        '(game "game" (players 2) (equipment (board (square 3)) (pieces '
        '("piece_1" both))) (rules (play (repeat (P1 P2) (place "piece_1" '
        f"(destination {'(not ' * 60}",
        f"{')' * 60})))) (end (if (full_board) (draw)))))",
      ),
      "nested too deeply",
    ),
  )
  def test_prompts(self, prompt, message):
    with self.assertRaisesRegex(ValueError, message):
      games.places([prompt], _tokenizer(), vocab_size=384)

  def test_size(self):
    size = sum(table.nbytes for table in _grammar())
    self.assertLess(size, 2**21)  # It is sent to every device.


if __name__ == "__main__":
  absltest.main()
