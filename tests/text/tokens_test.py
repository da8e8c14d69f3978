import logging
import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import numpy as np
import tokenizers
import transformers
from absl.testing import parameterized

from rljax.models import tokenizers as model_tokenizers
from rljax.tasks import arithmetic
from rljax.tasks import tokenizers as words_tokenizers
from rljax.text import (
  batches,
  chat,
  encoding,
  files,
  forms,
  prompts,
  steps,
  tokens,
)
from tests import conftest

TEXTS = (
  "Once upon a time, there was a little girl named Lily.",
  "  two  blanks,\ttab\nline\r\n\n12 + 3.14 = 15.14",
  "naïve café – “quotes” … 漢字 🙂👩‍🚀 Ελλάδα",
  "don't we'll I'm <0x0A> Ġ",
  "x",
  "",
)


def _byte_level_bpe():
  """A GPT-2-like tokenizer, trained on a few lines."""
  backend = tokenizers.Tokenizer(tokenizers.models.BPE())
  backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
    add_prefix_space=False
  )
  backend.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=320,
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    special_tokens=["<|end|>"],
    show_progress=False,
  )
  backend.train_from_iterator(TEXTS * 3, trainer)
  tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend, eos_token="<|end|>"
  )
  # Added, not special: one inside the alphabet of bytes, one outside.
  tokenizer.add_tokens(["<think>", "a b"])
  return tokenizer


def _metaspace(byte_fallback=True):
  """A Llama-2-like tokenizer of single characters and a few words."""
  words = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
  words += ["▁", "▁a", "b", "1", "2", "=", "."]
  backend = tokenizers.Tokenizer(
    tokenizers.models.BPE(
      {word: i for i, word in enumerate(words)},
      [],
      unk_token="<unk>",
      byte_fallback=byte_fallback,
    )
  )
  backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
  backend.decoder = tokenizers.decoders.Sequence(
    [
      tokenizers.decoders.ByteFallback(),
      tokenizers.decoders.Metaspace(),
    ]
  )
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend,
    unk_token="<unk>",
    bos_token="<s>",
    eos_token="</s>",
  )


def _ending(tokenizer, template):
  """The tokenizer with another post-processor."""
  specials = [
    (t, tokenizer.convert_tokens_to_ids(t)) for t in ("<bos>", "<eos>")
  ]
  tokenizer.backend_tokenizer.post_processor = (
    tokenizers.processors.TemplateProcessing(
      single=template, special_tokens=specials
    )
  )
  return tokenizer


WORDS = arithmetic.word_tokenizer()
BYTES = _byte_level_bpe()
PIECES = _metaspace()


class RequireTokensTest(parameterized.TestCase):
  def test_complete(self):
    tokens.require_tokens(WORDS, eos=True, pad=True, text="10+9*8=")
    tokens.require_tokens(BYTES, text="".join(TEXTS))
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
    lossy = _metaspace(byte_fallback=False)
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
    whole = BYTES.encode(TEXTS[0])
    with self.assertLogs("absl", logging.WARNING) as logs:
      ids = tokens.encode_prompts(
        BYTES, [TEXTS[0], "x"], max_length=4, truncate="left"
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
    lossy = _metaspace(byte_fallback=False)
    with self.assertLogs("absl", logging.WARNING) as logs:
      tokens.encode_prompts(lossy, ["b", "z", "bz"], max_length=9)
    self.assertIn("2 of 3 prompts hold the unknown token", logs.output[0])

  def test_end_token_behind_prompts(self):
    ending = _ending(arithmetic.word_tokenizer(), "<bos> $A <eos>")
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


class SingleIdTest(parameterized.TestCase):
  def test_one_token(self):
    self.assertEqual(tokens.single_id(WORDS, "="), 102)
    self.assertEqual(tokens.single_id(WORDS, "12"), 12)

  @parameterized.parameters(("", 0), ("1=", 2))
  def test_another_number(self, text, number):
    with self.assertRaisesRegex(ValueError, f"'{text}' is {number} tokens"):
      tokens.single_id(WORDS, text)


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


class EndTokensTest(parameterized.TestCase):
  TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|turn|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
  )

  def _tokenizer(self, template=TEMPLATE):
    tokenizer = _byte_level_bpe()
    tokenizer.add_special_tokens(
      {"additional_special_tokens": ["<|start|>", "<|turn|>"]}
    )
    tokenizer.chat_template = template
    return tokenizer

  def test_the_end_of_a_turn(self):
    tokenizer = self._tokenizer()
    turn = tokenizer.convert_tokens_to_ids("<|turn|>")
    self.assertEqual(tokens.turn_end(tokenizer), turn)
    eos = tokenizer.eos_token_id
    self.assertEqual(tokens.stop_ids(tokenizer), (eos, turn))
    self.assertEqual(
      tokens.stop_ids(tokenizer, (7, eos), None, 9), (eos, turn, 7, 9)
    )
    self.assertIsNone(tokens.turn_end(self._tokenizer(None)))

  @parameterized.parameters(
    "{{ raise_exception('no') }}",
    "{% for m in messages %}{{ m.role }}{% endfor %}",
    "{% for m in messages %}{{ m.content }}\n{% endfor %}",
    "{% for m in messages %}{{ m.content }}<think>{% endfor %}",
    "{{",
  )
  def test_templates_without_one(self, template):
    self.assertIsNone(tokens.turn_end(self._tokenizer(template)))

  def test_a_config_may_have_the_only_end(self):
    tokenizer = words_tokenizers.of_words(["a"], ".")
    tokenizer.eos_token = None
    self.assertEqual(tokens.stop_ids(tokenizer, [1, 2]), (1, 2))
    with self.assertRaisesRegex(ValueError, r"an end token \(eos_token\)"):
      tokens.stop_ids(tokenizer, None)

  def test_rows_of_a_chat_end_in_the_end_of_a_turn(self):
    tokenizer = self._tokenizer()
    turn = tokenizer.convert_tokens_to_ids("<|turn|>")
    rows = [forms.Row("a", ("b",), None, None, None, "it:1", None)]
    limits = {"max_prompt_length": 99, "max_response_length": 99}
    pairs = {"pairs": [("a", "b")], "max_length": 99}
    for prompt_format, end in (
      ("chat", turn),
      (chat.describe("chat", options={"x": 1}), turn),
      ("plain", tokenizer.eos_token_id),
    ):
      encoded = encoding.prepare(
        tokenizer, rows, prompt_format=prompt_format, **limits
      )
      self.assertEqual(encoded.response_ids[0][0][-1], end)
      ((_, response),) = prompts.encode_pairs(
        tokenizer, prompt_format=prompt_format, **pairs
      )
      self.assertEqual(response[-1], end)
      self.assertEqual(response.count(end), 1)

  def test_an_end_that_the_config_alone_names(self):
    tokenizer = self._tokenizer(None)
    turn = tokenizer.convert_tokens_to_ids("<|turn|>")
    ids = tokens.encode_prompts(tokenizer, ["a"], max_length=9)[0]
    encode = lambda: (
      tokens.encode_response(tokenizer, "a", ids, "b<|turn|>").ids
    )
    self.assertEqual(encode()[-2:], [turn, tokenizer.eos_token_id])
    model_tokenizers.add_ends(tokenizer, [turn, 10**6])
    self.assertEqual(encode()[1:], [turn])
    self.assertEqual(tokens.stop_ids(tokenizer), (tokenizer.eos_token_id, turn))

  def test_the_last_step_ends_once(self):
    tokenizer = self._tokenizer()
    turn, tag = tokenizer.convert_tokens_to_ids(["<|turn|>", "<|start|>"])
    pairs = [("t", "1\n"), ("t", "2<|turn|>\n")]
    encode = lambda pairs, **options: steps.encode_tagged(
      tokenizer, pairs, {"t": tag}, **options
    )[0]
    self.assertEqual(encode(pairs).count(turn), 1)
    self.assertEqual(encode(pairs)[-1], turn)
    self.assertEqual(encode(pairs[:1])[-1], tokenizer.eos_token_id)
    self.assertEqual(encode(pairs[:1], end_id=turn)[-1], turn)

  def test_named_ids(self):
    tokenizer = self._tokenizer()
    turn = tokenizer.convert_tokens_to_ids("<|turn|>")
    newline = tokenizer.encode("\n")
    self.assertEqual(
      tokens.named_ids(tokenizer, ["<|turn|>", "\n", "<think>", "7", "7"]),
      (turn, *newline, tokenizer.convert_tokens_to_ids("<think>"), 7),
    )
    self.assertEqual(tokens.named_ids(tokenizer, []), ())
    for name in ("<|none|>", "999999", "9" * 99, "", "漢", "-1"):
      with self.assertRaisesRegex(ValueError, "tokens of|no token with the id"):
        tokens.named_ids(tokenizer, [name])
    with self.assertRaisesRegex(ValueError, "tokens of"):
      tokens.named_ids(WORDS, ["neverseen"])

  def test_ids_beyond_the_model(self):
    with self.assertRaisesRegex(ValueError, "has the id 120, and the model"):
      tokens.allowed_tokens(WORDS, 120, (104, 120))


class SamplerSettingsTest(parameterized.TestCase):
  def test_stop_and_pad_ids(self):
    self.assertEqual(
      (tokens.stop_ids(WORDS), tokens.pad_id(WORDS)), ((104,), 105)
    )
    # Without a padding token the end token fills rows; masks tell them apart.
    self.assertEqual(tokens.pad_id(BYTES), BYTES.eos_token_id)
    bare = transformers.PreTrainedTokenizerFast(
      tokenizer_object=WORDS.backend_tokenizer
    )
    self.assertEqual(tokens.pad_id(bare), 0)
    with self.assertRaisesRegex(ValueError, "lacks an end token"):
      tokens.stop_ids(bare)

  def test_allowed_tokens(self):
    allowed = tokens.allowed_tokens(WORDS, 109)
    np.testing.assert_array_equal(allowed, np.arange(109) < 103)
    ending = tokens.allowed_tokens(WORDS, 109, stop_ids=[104])
    np.testing.assert_array_equal(np.flatnonzero(ending != allowed), [104])
    with self.assertRaisesRegex(ValueError, "largest id 105, got 105"):
      tokens.allowed_tokens(WORDS, 105)

  def test_allowed_tokens_counts_added_special_tokens(self):
    tokenizer = _byte_level_bpe()
    tokenizer.add_tokens(["<tool>"], special_tokens=True)
    allowed = tokens.allowed_tokens(tokenizer, len(tokenizer))
    token_id = tokenizer.convert_tokens_to_ids
    self.assertFalse(allowed[token_id("<tool>")])
    self.assertTrue(allowed[token_id("<think>")])
    self.assertFalse(allowed[tokenizer.eos_token_id])
    self.assertEqual(tokens.token_bytes(tokenizer)[token_id("<tool>")], b"")

  def test_check_positions(self):
    tokens.check_positions(64, 64)
    with self.assertRaisesRegex(ValueError, "up to 65 tokens .* 64 positions"):
      tokens.check_positions(65, 64)


class TokenBytesTest(parameterized.TestCase):
  def _check(self, tokenizer, texts):
    contributions = tokens.token_bytes(tokenizer)
    for text in texts:
      ids = tokenizer.encode(text)
      expected = tokenizer.decode(
        ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
      )
      joined = b"".join(contributions[i] for i in ids).decode("utf-8")
      self.assertEqual(joined.lstrip(" "), expected.lstrip(" "))
      self.assertEqual(expected.strip(), text.strip())

  def test_byte_level(self):
    self._check(BYTES, (*TEXTS, "say <think> a b aa bb"))
    contributions = tokens.token_bytes(BYTES)
    self.assertEqual(contributions[BYTES.eos_token_id], b"")
    self.assertEqual(
      contributions[BYTES.convert_tokens_to_ids("<think>")], b"<think>"
    )
    self.assertEqual(contributions[BYTES.convert_tokens_to_ids("a b")], b"a b")
    singles = [piece for piece in contributions if len(piece) == 1]
    self.assertLen(set(singles), 256)

  def test_byte_fallback(self):
    self._check(PIECES, TEXTS)
    contributions = tokens.token_bytes(PIECES)
    self.assertEqual(contributions[:4], [b"", b"", b"", b"\0"])
    self.assertEqual(contributions[3 + 0xFF], b"\xff")
    self.assertEqual(contributions[3 + 256 : 3 + 258], [b" ", b" a"])

  def test_words(self):
    contributions = tokens.token_bytes(WORDS, vocab_size=109)
    self.assertLen(contributions, 109)
    self.assertEqual(contributions[99:103], [b"99", b"+", b"*", b"="])
    self.assertEqual(contributions[103:], [b""] * 6)

  @hypothesis.given(text=st.text(st.characters(exclude_categories=["Cs"])))
  def test_any_text(self, text):
    hypothesis.assume("<|end|>" not in text)
    contributions = tokens.token_bytes(BYTES)
    joined = b"".join(contributions[i] for i in BYTES.encode(text))
    self.assertEqual(joined.decode("utf-8"), text)

  def test_single_ids_decode_alike(self):
    contributions = tokens.token_bytes(BYTES)
    for token_id, piece in enumerate(contributions):
      self.assertEqual(
        piece.decode("utf-8", errors="replace"),
        BYTES.decode([token_id], skip_special_tokens=True),
      )

  def test_stories(self):
    folder = conftest.shared("data/models/stories260k")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    self._check(tokenizer, TEXTS)
    contributions = tokens.token_bytes(tokenizer)
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
      tokens.token_bytes(WORDS, vocab_size=105)
    other = arithmetic.word_tokenizer()
    other.backend_tokenizer.decoder = tokenizers.decoders.WordPiece()
    with self.assertRaisesRegex(ValueError, "decoder 'WordPiece'"):
      tokens.token_bytes(other)
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}))
    blanks = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
    with self.assertRaisesRegex(ValueError, "has no decoder"):
      tokens.token_bytes(blanks)
    with self.assertRaisesRegex(ValueError, "needs a fast tokenizer, got"):
      tokens.token_bytes(object())


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
