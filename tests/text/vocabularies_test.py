"""Tests of what tokens stand for."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import tokenizers
import transformers
from absl.testing import parameterized

from rljax.tasks import arithmetic
from rljax.text import (
  end_tokens,
  files,
  tokens,
  vocabularies,
)
from tests import conftest
from tests.text import toy_tokenizers

WORDS = arithmetic.word_tokenizer()
BYTES = toy_tokenizers.byte_level_bpe()
PIECES = toy_tokenizers.metaspace()


class SamplerSettingsTest(parameterized.TestCase):
  def test_stop_and_pad_ids(self):
    self.assertEqual(
      (end_tokens.stop_ids(WORDS), vocabularies.pad_id(WORDS)), ((104,), 105)
    )
    # Without a padding token the end token fills rows; masks tell them apart.
    self.assertEqual(vocabularies.pad_id(BYTES), BYTES.eos_token_id)
    bare = transformers.PreTrainedTokenizerFast(
      tokenizer_object=WORDS.backend_tokenizer
    )
    self.assertEqual(vocabularies.pad_id(bare), 0)
    with self.assertRaisesRegex(ValueError, "lacks an end token"):
      end_tokens.stop_ids(bare)

  def test_allowed_tokens(self):
    allowed = vocabularies.allowed_tokens(WORDS, 109)
    np.testing.assert_array_equal(allowed, np.arange(109) < 103)
    ending = vocabularies.allowed_tokens(WORDS, 109, stop_ids=[104])
    np.testing.assert_array_equal(np.flatnonzero(ending != allowed), [104])
    with self.assertRaisesRegex(ValueError, "largest id 105, got 105"):
      vocabularies.allowed_tokens(WORDS, 105)

  def test_allowed_tokens_counts_added_special_tokens(self):
    tokenizer = toy_tokenizers.byte_level_bpe()
    tokenizer.add_tokens(["<tool>"], special_tokens=True)
    allowed = vocabularies.allowed_tokens(tokenizer, len(tokenizer))
    token_id = tokenizer.convert_tokens_to_ids
    self.assertFalse(allowed[token_id("<tool>")])
    self.assertTrue(allowed[token_id("<think>")])
    self.assertFalse(allowed[tokenizer.eos_token_id])
    self.assertEqual(
      vocabularies.token_bytes(tokenizer)[token_id("<tool>")], b""
    )

  def test_check_positions(self):
    tokens.check_positions(64, 64)
    with self.assertRaisesRegex(ValueError, "up to 65 tokens .* 64 positions"):
      tokens.check_positions(65, 64)


class SingleIdTest(parameterized.TestCase):
  def test_one_token(self):
    self.assertEqual(vocabularies.single_id(WORDS, "="), 102)
    self.assertEqual(vocabularies.single_id(WORDS, "12"), 12)

  @parameterized.parameters(("", 0), ("1=", 2))
  def test_another_number(self, text, number):
    with self.assertRaisesRegex(ValueError, f"'{text}' is {number} tokens"):
      vocabularies.single_id(WORDS, text)


class TokenBytesTest(parameterized.TestCase):
  def _check(self, tokenizer, texts):
    contributions = vocabularies.token_bytes(tokenizer)
    for text in texts:
      ids = tokenizer.encode(text)
      expected = tokenizer.decode(
        ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
      )
      joined = b"".join(contributions[i] for i in ids).decode("utf-8")
      self.assertEqual(joined.lstrip(" "), expected.lstrip(" "))
      self.assertEqual(expected.strip(), text.strip())

  def test_byte_level(self):
    self._check(BYTES, (*toy_tokenizers.TEXTS, "say <think> a b aa bb"))
    contributions = vocabularies.token_bytes(BYTES)
    self.assertEqual(contributions[BYTES.eos_token_id], b"")
    self.assertEqual(
      contributions[BYTES.convert_tokens_to_ids("<think>")], b"<think>"
    )
    self.assertEqual(contributions[BYTES.convert_tokens_to_ids("a b")], b"a b")
    singles = [piece for piece in contributions if len(piece) == 1]
    self.assertLen(set(singles), 256)

  def test_byte_fallback(self):
    self._check(PIECES, toy_tokenizers.TEXTS)
    contributions = vocabularies.token_bytes(PIECES)
    self.assertEqual(contributions[:4], [b"", b"", b"", b"\0"])
    self.assertEqual(contributions[3 + 0xFF], b"\xff")
    self.assertEqual(contributions[3 + 256 : 3 + 258], [b" ", b" a"])

  def test_words(self):
    contributions = vocabularies.token_bytes(WORDS, vocab_size=109)
    self.assertLen(contributions, 109)
    self.assertEqual(contributions[99:103], [b"99", b"+", b"*", b"="])
    self.assertEqual(contributions[103:], [b""] * 6)

  @hypothesis.given(text=st.text(st.characters(exclude_categories=["Cs"])))
  def test_any_text(self, text):
    hypothesis.assume("<|end|>" not in text)
    contributions = vocabularies.token_bytes(BYTES)
    joined = b"".join(contributions[i] for i in BYTES.encode(text))
    self.assertEqual(joined.decode("utf-8"), text)

  def test_single_ids_decode_alike(self):
    contributions = vocabularies.token_bytes(BYTES)
    for token_id, piece in enumerate(contributions):
      self.assertEqual(
        piece.decode("utf-8", errors="replace"),
        BYTES.decode([token_id], skip_special_tokens=True),
      )

  def test_stories(self):
    folder = conftest.shared("data/models/stories260k")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    self._check(tokenizer, toy_tokenizers.TEXTS)
    contributions = vocabularies.token_bytes(tokenizer)
    self.assertEqual(contributions[3 + 0x0A], b"\n")
    self.assertEqual(contributions[:3], [b""] * 3)

  def test_real_texts(self):
    folder = conftest.shared("data/models/stories260k")
    rows = files.load_rows(
      "data/sentiment", "test", data_dir=folder.parent.parent.parent
    )
    texts = [
      next(v for v in row.values() if isinstance(v, str)) for row in rows
    ]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for each in (tokenizer, BYTES):
      self._check(each, texts[:300])

  def test_bad_input(self):
    with self.assertRaisesRegex(ValueError, "largest id 105, got 105"):
      vocabularies.token_bytes(WORDS, vocab_size=105)
    other = arithmetic.word_tokenizer()
    other.backend_tokenizer.decoder = tokenizers.decoders.WordPiece()
    with self.assertRaisesRegex(ValueError, "decoder 'WordPiece'"):
      vocabularies.token_bytes(other)
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}))
    blanks = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
    with self.assertRaisesRegex(ValueError, "has no decoder"):
      vocabularies.token_bytes(blanks)
    with self.assertRaisesRegex(ValueError, "needs a fast tokenizer, got"):
      vocabularies.token_bytes(object())
