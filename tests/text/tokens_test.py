"""Tests of texts that become ids, and ids that become texts."""

import logging
import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import numpy as np
import tokenizers
import transformers
from absl.testing import parameterized

from rljax.tasks import arithmetic
from rljax.tasks import tokenizers as words_tokenizers
from rljax.text import (
  batches,
  tokens,
)
from tests import conftest
from tests.text import toy_tokenizers

WORDS = arithmetic.word_tokenizer()
BYTES = toy_tokenizers.byte_level_bpe()
PIECES = toy_tokenizers.metaspace()


class RequireTokensTest(parameterized.TestCase):
  def test_complete(self):
    tokens.require_tokens(WORDS, eos=True, pad=True, text="10+9*8=")
    tokens.require_tokens(BYTES, text="".join(toy_tokenizers.TEXTS))
    tokens.require_tokens(PIECES, text="12 = b")

  def test_missing(self):
    with self.assertRaisesRegex(ValueError, r"lacks a padding token \(pad_to"):
      tokens.require_tokens(BYTES, pad=True)
    bare = transformers.PreTrainedTokenizerFast(
      tokenizer_object=WORDS.backend_tokenizer
    )
    with self.assertRaisesRegex(ValueError, "an end token .*, a padding tok"):
      tokens.require_tokens(bare, pad=True)
    tokens.require_tokens(bare, eos=False)

  def test_text(self):
    with self.assertRaisesRegex(ValueError, "lacks a way to write '-'"):
      tokens.require_tokens(WORDS, text="1-2")
    # All characters have words, the number has none.
    with self.assertRaisesRegex(ValueError, "lacks a way to write '123'"):
      tokens.require_tokens(WORDS, text="123")

  def test_words_of_many_characters(self):
    words = words_tokenizers.of_words(["end", "of", "(", ")"], r"\w+|\S")
    # It has no token for a letter of them, and does not need one.
    tokens.require_tokens(words, text="(end)of(of)end")
    with self.assertRaisesRegex(
      ValueError, r"lacks a way to write 'start', a way to write 'xy'\.$"
    ):
      tokens.require_tokens(words, text="(end)start(xy)(xy)")

  def test_unknown_token_is_no_way_to_write(self):
    lossy = toy_tokenizers.metaspace(byte_fallback=False)
    with self.assertRaisesRegex(ValueError, "lacks a way to write 'z'"):
      tokens.require_tokens(lossy, text="bz")


class EncodePromptsTest(parameterized.TestCase):
  def test_ids(self):
    self.assertEqual(
      tokens.encode_prompts(WORDS, ["1+2=", ""], max_length=5),
      [[103, 1, 100, 2, 102], [103]],
    )

  def test_one_start_token(self):
    # Chat templates write it; a tokenizer without one adds none.
    ids = tokens.encode_prompts(WORDS, ["<bos>1=", "1<bos>"], max_length=5)
    self.assertEqual(ids, [[103, 1, 102], [103, 1, 103]])
    pairs = tokens.encode_pairs(
      WORDS, [("<bos>1=", "1")], max_prompt_length=5, max_response_length=5
    )
    self.assertEqual(pairs, [([103, 1, 102], [1, 104])])

  def test_too_long(self):
    prompt = "1+" * 40 + "2="
    with self.assertRaisesRegex(
      ValueError, r"'1\+1.*\.\.\. has 83 tokens, the limit is 82\."
    ):
      tokens.encode_prompts(WORDS, [prompt], max_length=82)
    self.assertLen(tokens.encode_prompts(WORDS, [prompt], max_length=83)[0], 83)

  @parameterized.parameters(
    (5, [103, 1, 100, 2, 102]),
    (4, [103, 100, 2, 102]),
    (2, [103, 102]),
    (1, [102]),  # No room for it.
  )
  def test_truncate_keeps_the_start_token(self, max_length, expected):
    ids = tokens.encode_prompts(
      WORDS, ["1+2="], max_length=max_length, truncate="left"
    )
    self.assertEqual(ids, [expected])

  def test_truncate_without_start_token(self):
    whole = BYTES.encode(toy_tokenizers.TEXTS[0])
    with self.assertLogs("absl", logging.WARNING) as logs:
      ids = tokens.encode_prompts(
        BYTES, [toy_tokenizers.TEXTS[0], "x"], max_length=4, truncate="left"
      )
    self.assertEqual(ids[0], whole[-4:])
    self.assertIn("1 of 2 prompts were cut on the left to 4", logs.output[0])

  def test_no_tokens(self):
    with self.assertRaisesRegex(ValueError, "prompt '' has no tokens"):
      tokens.encode_prompts(BYTES, ["x", ""], max_length=5)

  def test_cannot_encode(self):
    with self.assertRaisesRegex(ValueError, r"cannot encode '100\+1=': Word"):
      tokens.encode_prompts(WORDS, ["1+1=", "100+1="], max_length=5)

  def test_unknown_tokens_are_counted(self):
    lossy = toy_tokenizers.metaspace(byte_fallback=False)
    with self.assertLogs("absl", logging.WARNING) as logs:
      tokens.encode_prompts(lossy, ["b", "z", "bz"], max_length=9)
    self.assertIn("2 of 3 prompts hold the unknown token", logs.output[0])

  def test_end_token_behind_prompts(self):
    ending = toy_tokenizers.ending(
      arithmetic.word_tokenizer(), "<bos> $A <eos>"
    )
    with self.assertRaisesRegex(ValueError, "puts an end token after"):
      tokens.encode_prompts(ending, ["1+1="], max_length=9)
    # In the text itself it is the user's choice.
    ids = tokens.encode_prompts(WORDS, ["1+1=<eos>"], max_length=9)
    self.assertEqual(ids[0][-1], 104)

  @parameterized.parameters(
    ({"max_length": 0}, "max_length must be positive, got 0"),
    ({"max_length": 3, "truncate": "right"}, 'must be False or "left"'),
  )
  def test_bad_settings(self, settings, message):
    with self.assertRaisesRegex(ValueError, message):
      tokens.encode_prompts(WORDS, ["1="], **settings)


class EncodePairsTest(parameterized.TestCase):
  def _encode(self, tokenizer, pairs, limit=99):
    return tokens.encode_pairs(
      tokenizer, pairs, max_prompt_length=99, max_response_length=limit
    )

  def test_ids(self):
    rows = self._encode(WORDS, [("1+2=", "3"), ("", "1=1")], limit=4)
    self.assertEqual(
      rows,
      [
        ([103, 1, 100, 2, 102], [3, 104]),
        ([103], [1, 102, 1, 104]),
      ],
    )

  def test_no_blank_sneaks_in(self):
    # Alone, "2" would be encoded with a blank in front.
    self.assertLen(PIECES.encode("2"), 2)
    ((prompt, response),) = self._encode(PIECES, [("1=", "2")])
    self.assertEqual(PIECES.convert_ids_to_tokens(response), ["2", "</s>"])
    self.assertEqual(PIECES.decode(prompt + response[:-1]), "1=2")

  def test_a_token_across_the_border(self):
    # "1" + "0" together are the one word "10".
    with self.assertLogs("absl", logging.WARNING) as logs:
      rows = self._encode(WORDS, [("1", "0"), ("2=", "2")])
    self.assertEqual(rows[0], ([103, 1], [0, 104]))
    self.assertIn("1 of 2 responses were encoded apart", logs.output[0])

  def test_too_long(self):
    with self.assertRaisesRegex(
      ValueError, r"response '1\+2' has 4 tokens with its end token.* is 3"
    ):
      self._encode(WORDS, [("3=", "1+2")], limit=3)

  @hypothesis.given(
    prompt=st.text("ab 12=\n", min_size=1), response=st.text("ab 12=\n")
  )
  def test_text_survives(self, prompt, response):
    ((prompt_ids, response_ids),) = self._encode(BYTES, [(prompt, response)])
    self.assertEqual(prompt_ids, BYTES.encode(prompt))
    self.assertEqual(response_ids.pop(), BYTES.eos_token_id)
    self.assertEqual(BYTES.decode(prompt_ids + response_ids), prompt + response)


class DecodeTest(parameterized.TestCase):
  def test_hand_computed(self):
    ids = np.array([[30, 104, 7], [20, 100, 10], [108, 106, 5], [1, 2, 3]])
    mask = np.array([[1, 1, 0], [1, 1, 1], [1, 1, 0], [0, 0, 0]], np.bool_)
    self.assertEqual(tokens.decode(WORDS, ids, mask), ["30", "20+10", "", ""])
    self.assertEqual(
      tokens.decode(WORDS, ids, mask, skip_special_tokens=False)[0],
      "30<eos>",
    )

  def test_no_tidying_up(self):
    # Tidied up, the blank in front of the comma would go.
    backend = tokenizers.Tokenizer(
      tokenizers.models.WordLevel({"a": 0, " ": 1, ",": 2})
    )
    backend.decoder = tokenizers.decoders.Fuse()
    tokenizer = transformers.PreTrainedTokenizerFast(
      tokenizer_object=backend, clean_up_tokenization_spaces=True
    )
    ids, mask = batches.pad_right([[0, 1, 2, 1, 0]])
    self.assertEqual(tokens.decode(tokenizer, ids, mask), ["a , a"])

  def test_bad_input(self):
    ids = np.zeros((2, 3), np.int32)
    with self.assertRaisesRegex(ValueError, r"bool mask of one \[B, T\]"):
      tokens.decode(WORDS, ids, ids)
    with self.assertRaisesRegex(ValueError, r"\(2, 3\) and bool \(3, 2\)"):
      tokens.decode(WORDS, ids, np.ones((3, 2), np.bool_))


class ImportTest(parameterized.TestCase):
  def test_text_side_is_light(self):
    code = (
      "import sys; from rljax import tasks;"
      "from rljax.evaluation import token_pages;"
      "from rljax.text import files, logged, tokens;"
      "tasks.load('arithmetic');"
      "print({'jax', 'torch', 'transformers', 'tensorflow_datasets'}"
      " & set(sys.modules))"
    )
    result = subprocess.run(
      [sys.executable, "-c", code],
      cwd=conftest.REPOSITORY,
      capture_output=True,
      text=True,
      check=True,
    )
    self.assertEqual(result.stdout.strip(), "set()")
