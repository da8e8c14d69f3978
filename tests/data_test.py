import gzip
import json
import logging
import math
import os
import pathlib
import subprocess
import sys
import tempfile
from unittest import mock

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import tokenizers
import transformers
from absl.testing import parameterized

from rljax import data
from rljax.tasks import arithmetic
from rljax.tasks import tokenizers as words_tokenizers
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
  tokens = [(t, tokenizer.convert_tokens_to_ids(t)) for t in ("<bos>", "<eos>")]
  tokenizer.backend_tokenizer.post_processor = (
    tokenizers.processors.TemplateProcessing(
      single=template, special_tokens=tokens
    )
  )
  return tokenizer


WORDS = arithmetic.word_tokenizer()
BYTES = _byte_level_bpe()
PIECES = _metaspace()


class FilesTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self._temporary = tempfile.TemporaryDirectory()
    self.addCleanup(self._temporary.cleanup)
    self.folder = pathlib.Path(self._temporary.name)

  def _write(self, content, name="logged.jsonl"):
    path = self.folder / name
    path.write_bytes(content)
    return path

  def test_read(self):
    path = self._write(b'{"a": 1}\r\n\n{"a": "\xc3\xa9\xe2\x80\xa8", "b": 2}')
    rows = data.read_jsonl(path, required=["a"], optional={"b": 0})
    self.assertEqual(rows, [{"a": 1, "b": 0}, {"a": "é\u2028", "b": 2}])

  @parameterized.parameters(
    (b'{"reward": 1}\n\n{"r": 1}\n', r'logged.jsonl:3: "reward" is missing\.'),
    (b'{"reward": 1}\n{"reward"', r"logged.jsonl:2: not JSON"),
    (b'{"reward": "\xff"}', r"logged.jsonl:1: not JSON"),
    (b"[1, 2]\n", r"logged.jsonl:1: expected a JSON object, got \[1, 2\]"),
    (b"", r"logged.jsonl: no rows"),
    (b"\n \n", r"logged.jsonl: no rows"),
  )
  def test_bad_files(self, content, message):
    path = self._write(content)
    with self.assertRaisesRegex(ValueError, message):
      data.read_jsonl(path, required=["reward"])

  @parameterized.parameters("rows.jsonl", "rows.jsonl.gz")
  def test_round_trip(self, name):
    path = self.folder / "new" / name
    rows = [{"text": "é\n\u2028🙂"}, {"ids": [1, 2], "x": 0.1}]
    data.write_jsonl(path, [{"old": 1}])
    data.write_jsonl(path, rows)
    self.assertEqual(data.read_jsonl(path), rows)
    self.assertEqual(os.listdir(path.parent), [name])

  def test_numpy_values(self):
    path = self.folder / "rows.jsonl"
    data.write_jsonl(
      path, [{"ids": np.arange(2), "x": np.float32(0.5), "b": np.bool_(True)}]
    )
    self.assertEqual(
      data.read_jsonl(path), [{"ids": [0, 1], "x": 0.5, "b": True}]
    )

  def test_failed_write_leaves_the_old_file(self):
    path = self._write(b'{"a": 1}\n')
    with self.assertRaisesRegex(TypeError, "object cannot be written"):
      data.write_jsonl(path, [{"a": 2}, {"a": object()}])
    self.assertEqual(data.read_jsonl(path), [{"a": 1}])
    self.assertEqual(os.listdir(self.folder), ["logged.jsonl"])

  def test_failed_replacement_leaves_nothing_behind(self):
    path = self._write(b'{"a": 1}\n')
    with (
      mock.patch.object(os, "replace", side_effect=OSError("disk full")),
      self.assertRaisesRegex(OSError, "disk full"),
    ):
      data.write_jsonl(path, [{"a": 2}])
    self.assertEqual(data.read_jsonl(path), [{"a": 1}])
    self.assertEqual(os.listdir(self.folder), ["logged.jsonl"])

  def test_append(self):
    path = self.folder / "new" / "rows.jsonl"
    data.append_jsonl(path, [{"a": 1}])
    data.append_jsonl(path, [])
    data.append_jsonl(path, [{"a": 2}, {"a": 3}])
    self.assertEqual(data.read_jsonl(path), [{"a": 1}, {"a": 2}, {"a": 3}])

  @parameterized.parameters((b'{"a": 1}\n{"a": 2', [1, 3]), (b'{"a', [3]))
  def test_append_behind_a_killed_writer(self, content, expected):
    path = self._write(content)
    with self.assertLogs("absl", logging.WARNING) as logs:
      data.append_jsonl(path, [{"a": 3}])
    self.assertIn("half-written", logs.output[0])
    self.assertEqual([row["a"] for row in data.read_jsonl(path)], expected)

  def test_append_to_gz(self):
    with self.assertRaisesRegex(ValueError, "uncompressed"):
      data.append_jsonl(self.folder / "rows.jsonl.gz", [{"a": 1}])


class LoadRowsTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self._temporary = tempfile.TemporaryDirectory()
    self.addCleanup(self._temporary.cleanup)
    self.folder = pathlib.Path(self._temporary.name)

  @parameterized.parameters(".jsonl", ".jsonl.gz", ".json", ".json.gz")
  def test_files_and_folders(self, ending):
    rows = [{"split": "train"}, {"é": 1}]
    lines = map(json.dumps, rows)
    text = "\n".join(lines) if "jsonl" in ending else json.dumps(rows)
    content = text.encode()
    if ending.endswith(".gz"):
      content = gzip.compress(content)
    (self.folder / f"train{ending}").write_bytes(content)
    for name in (".", f"train{ending}", f"{{split}}{ending}"):
      loaded = data.load_rows(name, "train", data_dir=self.folder)
      self.assertEqual(loaded, rows)
    absolute = str(self.folder / f"train{ending}")
    self.assertEqual(data.load_rows(absolute, "train"), rows)

  @parameterized.parameters(
    ("", None, r"no file for split 'test' \(looked for test.jsonl"),
    ("none.jsonl", None, "no such file or folder"),
    ("rows.csv", b"a,b", "expected .jsonl or .json"),
    ("rows.json", b'{"a": 1}', "expected a list of JSON objects"),
    ("rows.json", b"[{}, 1]", r"rows.json, row 1: expected a JSON obj.*got 1"),
    ("rows.json", b"[]", "no rows"),
    ("rows.json", b"[", "not JSON"),
    ("rows.jsonl", b"", "no rows"),
    ("rows.jsonl.gz", b"plain", "not a gzip file"),
  )
  def test_bad_names(self, name, content, message):
    if content is not None:
      (self.folder / name).write_bytes(content)
    with self.assertRaisesRegex(ValueError, message):
      data.load_rows(name, "test", data_dir=self.folder)

  def test_places(self):
    path = self.folder / "rows.jsonl"
    path.write_bytes(b'\n{"a": 1}\n{\n{"a": 2}\n')
    placed = list(
      data.load_placed_rows("rows.jsonl", "train", data_dir=path.parent)
    )
    self.assertEqual(placed[0], (f"{path}:2", {"a": 1}))
    self.assertEqual(placed[2], (f"{path}:4", {"a": 2}))
    place, error = placed[1]
    self.assertEqual(place, f"{path}:3")
    with self.assertRaisesRegex(ValueError, ":3: not JSON") as caught:
      data.load_rows(str(path), "train")
    self.assertEqual(str(error), str(caught.exception))

  def test_shared_data(self):
    folder = conftest.shared("data/reasoning")
    rows = data.load_rows("gsm8k_{split}.jsonl", "test", data_dir=folder)
    self.assertLen(rows, 1319)

  def test_tfds(self):
    tfds = pytest.importorskip("tensorflow_datasets")

    with tfds.core.registered.skip_registration():

      class Rows(tfds.core.GeneratorBasedBuilder):
        name = "rljax_rows"
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
          return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(
              {"text": tfds.features.Text(), "label": np.int64}
            )
          )

        def _split_generators(self, dl_manager):
          return {"train": self._generate_examples()}

        def _generate_examples(self):
          for i, text in enumerate(("né", "b", "c")):
            yield i, {"text": text, "label": i}

    folder = str(self.folder)
    Rows(data_dir=folder, file_format="array_record").download_and_prepare()
    rows = data.load_rows("tfds:rljax_rows", "train", data_dir=folder)
    self.assertCountEqual(
      [(r["text"], r["label"]) for r in rows], [("né", 0), ("b", 1), ("c", 2)]
    )
    self.assertIsInstance(rows[0]["label"], int)
    self.assertLen(
      data.load_rows("tfds:rljax_rows", "train[:2]", data_dir=folder), 2
    )
    with self.assertRaisesRegex(ValueError, "no prepared split 'test'"):
      data.load_rows("tfds:rljax_rows", "test", data_dir=folder)
    with self.assertRaisesRegex(ValueError, '"tfds:gsm8k" has no prepared'):
      data.load_rows("tfds:gsm8k", "train", data_dir=folder)


class RequireTokensTest(parameterized.TestCase):
  def test_complete(self):
    data.require_tokens(WORDS, eos=True, pad=True, text="10+9*8=")
    data.require_tokens(BYTES, text="".join(TEXTS))
    data.require_tokens(PIECES, text="12 = b")

  def test_missing(self):
    with self.assertRaisesRegex(ValueError, r"lacks a padding token \(pad_to"):
      data.require_tokens(BYTES, pad=True)
    bare = transformers.PreTrainedTokenizerFast(
      tokenizer_object=WORDS.backend_tokenizer
    )
    with self.assertRaisesRegex(ValueError, "an end token .*, a padding tok"):
      data.require_tokens(bare, pad=True)
    data.require_tokens(bare, eos=False)

  def test_text(self):
    with self.assertRaisesRegex(ValueError, "lacks a way to write '-'"):
      data.require_tokens(WORDS, text="1-2")
    # All characters have words, the number has none.
    with self.assertRaisesRegex(ValueError, "lacks a way to write '123'"):
      data.require_tokens(WORDS, text="123")

  def test_words_of_many_characters(self):
    words = words_tokenizers.of_words(["end", "of", "(", ")"], r"\w+|\S")
    # It has no token for a letter of them, and does not need one.
    data.require_tokens(words, text="(end)of(of)end")
    with self.assertRaisesRegex(
      ValueError, r"lacks a way to write 'start', a way to write 'xy'\.$"
    ):
      data.require_tokens(words, text="(end)start(xy)(xy)")

  def test_unknown_token_is_no_way_to_write(self):
    lossy = _metaspace(byte_fallback=False)
    with self.assertRaisesRegex(ValueError, "lacks a way to write 'z'"):
      data.require_tokens(lossy, text="bz")


class EncodePromptsTest(parameterized.TestCase):
  def test_ids(self):
    self.assertEqual(
      data.encode_prompts(WORDS, ["1+2=", ""], max_length=5),
      [[103, 1, 100, 2, 102], [103]],
    )

  def test_one_start_token(self):
    # Chat templates write it; a tokenizer without one adds none.
    ids = data.encode_prompts(WORDS, ["<bos>1=", "1<bos>"], max_length=5)
    self.assertEqual(ids, [[103, 1, 102], [103, 1, 103]])
    pairs = data.encode_pairs(
      WORDS, [("<bos>1=", "1")], max_prompt_length=5, max_response_length=5
    )
    self.assertEqual(pairs, [([103, 1, 102], [1, 104])])

  def test_too_long(self):
    prompt = "1+" * 40 + "2="
    with self.assertRaisesRegex(
      ValueError, r"'1\+1.*\.\.\. has 83 tokens, the limit is 82\."
    ):
      data.encode_prompts(WORDS, [prompt], max_length=82)
    self.assertLen(data.encode_prompts(WORDS, [prompt], max_length=83)[0], 83)

  @parameterized.parameters(
    (5, [103, 1, 100, 2, 102]),
    (4, [103, 100, 2, 102]),
    (2, [103, 102]),
    (1, [102]),  # No room for it.
  )
  def test_truncate_keeps_the_start_token(self, max_length, expected):
    ids = data.encode_prompts(
      WORDS, ["1+2="], max_length=max_length, truncate="left"
    )
    self.assertEqual(ids, [expected])

  def test_truncate_without_start_token(self):
    whole = BYTES.encode(TEXTS[0])
    with self.assertLogs("absl", logging.WARNING) as logs:
      ids = data.encode_prompts(
        BYTES, [TEXTS[0], "x"], max_length=4, truncate="left"
      )
    self.assertEqual(ids[0], whole[-4:])
    self.assertIn("1 of 2 prompts were cut on the left to 4", logs.output[0])

  def test_no_tokens(self):
    with self.assertRaisesRegex(ValueError, "prompt '' has no tokens"):
      data.encode_prompts(BYTES, ["x", ""], max_length=5)

  def test_cannot_encode(self):
    with self.assertRaisesRegex(ValueError, r"cannot encode '100\+1=': Word"):
      data.encode_prompts(WORDS, ["1+1=", "100+1="], max_length=5)

  def test_unknown_tokens_are_counted(self):
    lossy = _metaspace(byte_fallback=False)
    with self.assertLogs("absl", logging.WARNING) as logs:
      data.encode_prompts(lossy, ["b", "z", "bz"], max_length=9)
    self.assertIn("2 of 3 prompts hold the unknown token", logs.output[0])

  def test_end_token_behind_prompts(self):
    ending = _ending(arithmetic.word_tokenizer(), "<bos> $A <eos>")
    with self.assertRaisesRegex(ValueError, "puts an end token behind"):
      data.encode_prompts(ending, ["1+1="], max_length=9)
    # In the text itself it is the user's choice.
    ids = data.encode_prompts(WORDS, ["1+1=<eos>"], max_length=9)
    self.assertEqual(ids[0][-1], 104)

  @parameterized.parameters(
    ({"max_length": 0}, "max_length must be positive, got 0"),
    ({"max_length": 3, "truncate": "right"}, 'must be False or "left"'),
  )
  def test_bad_settings(self, settings, message):
    with self.assertRaisesRegex(ValueError, message):
      data.encode_prompts(WORDS, ["1="], **settings)


class EncodePairsTest(parameterized.TestCase):
  def _encode(self, tokenizer, pairs, limit=99):
    return data.encode_pairs(
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
    self.assertEqual(data.decode(WORDS, ids, mask), ["30", "20+10", "", ""])
    self.assertEqual(
      data.decode(WORDS, ids, mask, skip_special_tokens=False)[0], "30<eos>"
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
    ids, mask = data.pad_right([[0, 1, 2, 1, 0]])
    self.assertEqual(data.decode(tokenizer, ids, mask), ["a , a"])

  def test_bad_input(self):
    ids = np.zeros((2, 3), np.int32)
    with self.assertRaisesRegex(ValueError, r"bool mask of one \[B, T\]"):
      data.decode(WORDS, ids, ids)
    with self.assertRaisesRegex(ValueError, r"\(2, 3\) and bool \(3, 2\)"):
      data.decode(WORDS, ids, np.ones((3, 2), np.bool_))


class SamplerSettingsTest(parameterized.TestCase):
  def test_stop_and_pad_ids(self):
    self.assertEqual((data.stop_ids(WORDS), data.pad_id(WORDS)), ((104,), 105))
    # Without a padding token the end token fills rows; masks tell them apart.
    self.assertEqual(data.pad_id(BYTES), BYTES.eos_token_id)
    bare = transformers.PreTrainedTokenizerFast(
      tokenizer_object=WORDS.backend_tokenizer
    )
    self.assertEqual(data.pad_id(bare), 0)
    with self.assertRaisesRegex(ValueError, "lacks an end token"):
      data.stop_ids(bare)

  def test_allowed_tokens(self):
    allowed = data.allowed_tokens(WORDS, 109)
    np.testing.assert_array_equal(allowed, np.arange(109) < 103)
    ending = data.allowed_tokens(WORDS, 109, stop_ids=[104])
    np.testing.assert_array_equal(np.flatnonzero(ending != allowed), [104])
    with self.assertRaisesRegex(ValueError, "largest id 105, got 105"):
      data.allowed_tokens(WORDS, 105)

  def test_allowed_tokens_counts_added_special_tokens(self):
    tokenizer = _byte_level_bpe()
    tokenizer.add_tokens(["<tool>"], special_tokens=True)
    allowed = data.allowed_tokens(tokenizer, len(tokenizer))
    token_id = tokenizer.convert_tokens_to_ids
    self.assertFalse(allowed[token_id("<tool>")])
    self.assertTrue(allowed[token_id("<think>")])
    self.assertFalse(allowed[tokenizer.eos_token_id])
    self.assertEqual(data.token_bytes(tokenizer)[token_id("<tool>")], b"")

  def test_check_positions(self):
    data.check_positions(64, 64)
    with self.assertRaisesRegex(ValueError, "up to 65 tokens .* 64 positions"):
      data.check_positions(65, 64)


class TokenBytesTest(parameterized.TestCase):
  def _check(self, tokenizer, texts):
    contributions = data.token_bytes(tokenizer)
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
    contributions = data.token_bytes(BYTES)
    self.assertEqual(contributions[BYTES.eos_token_id], b"")
    self.assertEqual(
      contributions[BYTES.convert_tokens_to_ids("<think>")], b"<think>"
    )
    self.assertEqual(contributions[BYTES.convert_tokens_to_ids("a b")], b"a b")
    singles = [piece for piece in contributions if len(piece) == 1]
    self.assertLen(set(singles), 256)

  def test_byte_fallback(self):
    self._check(PIECES, TEXTS)
    contributions = data.token_bytes(PIECES)
    self.assertEqual(contributions[:4], [b"", b"", b"", b"\0"])
    self.assertEqual(contributions[3 + 0xFF], b"\xff")
    self.assertEqual(contributions[3 + 256 : 3 + 258], [b" ", b" a"])

  def test_words(self):
    contributions = data.token_bytes(WORDS, vocab_size=109)
    self.assertLen(contributions, 109)
    self.assertEqual(contributions[99:103], [b"99", b"+", b"*", b"="])
    self.assertEqual(contributions[103:], [b""] * 6)

  @hypothesis.given(text=st.text(st.characters(exclude_categories=["Cs"])))
  def test_any_text(self, text):
    hypothesis.assume("<|end|>" not in text)
    contributions = data.token_bytes(BYTES)
    joined = b"".join(contributions[i] for i in BYTES.encode(text))
    self.assertEqual(joined.decode("utf-8"), text)

  def test_single_ids_decode_alike(self):
    contributions = data.token_bytes(BYTES)
    for token_id, piece in enumerate(contributions):
      self.assertEqual(
        piece.decode("utf-8", errors="replace"),
        BYTES.decode([token_id], skip_special_tokens=True),
      )

  def test_stories(self):
    folder = conftest.shared("data/models/stories260k")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    self._check(tokenizer, TEXTS)
    contributions = data.token_bytes(tokenizer)
    self.assertEqual(contributions[3 + 0x0A], b"\n")
    self.assertEqual(contributions[:3], [b""] * 3)

  def test_real_texts(self):
    folder = conftest.shared("data/models/stories260k")
    rows = data.load_rows(
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
      data.token_bytes(WORDS, vocab_size=105)
    other = arithmetic.word_tokenizer()
    other.backend_tokenizer.decoder = tokenizers.decoders.WordPiece()
    with self.assertRaisesRegex(ValueError, "decoder 'WordPiece'"):
      data.token_bytes(other)
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}))
    blanks = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
    with self.assertRaisesRegex(ValueError, "has no decoder"):
      data.token_bytes(blanks)
    with self.assertRaisesRegex(ValueError, "is not a fast one"):
      data.token_bytes(object())


class PaddingTest(parameterized.TestCase):
  def test_buckets(self):
    lengths = [data.bucket_length(n) for n in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9)]
    self.assertEqual(lengths, [1, 1, 2, 3, 4, 6, 6, 8, 8, 12])
    self.assertEqual(data.bucket_length(97), 128)
    self.assertEqual(data.bucket_length(129), 192)
    self.assertEqual(data.bucket_length(5, [64, 16]), 16)
    with self.assertRaisesRegex(ValueError, r"65 .* largest .* \[16, 64\]"):
      data.bucket_length(65, [64, 16])

  @hypothesis.given(length=st.integers(1, 10**6))
  def test_bucket_properties(self, length):
    bucket = data.bucket_length(length)
    self.assertBetween(bucket, length, max(2 * length - 1, length * 1.5))
    self.assertEqual(data.bucket_length(bucket), bucket)
    self.assertIn(bucket / 2 ** int(math.log2(bucket)), (1, 1.5))

  def test_hand_computed(self):
    rows = [[7, 0], [], [1, 2, 3]]
    ids, mask = data.pad_left(rows)
    np.testing.assert_array_equal(ids, [[0, 7, 0], [0, 0, 0], [1, 2, 3]])
    # The real token 0 counts.
    np.testing.assert_array_equal(mask, [[0, 1, 1], [0, 0, 0], [1, 1, 1]])
    ids, mask = data.pad_right(rows, length=4, pad_id=9)
    np.testing.assert_array_equal(
      ids, [[7, 0, 9, 9], [9, 9, 9, 9], [1, 2, 3, 9]]
    )
    np.testing.assert_array_equal(
      mask, [[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 0]]
    )
    self.assertEqual((ids.dtype, mask.dtype), (np.int32, np.bool_))

  @hypothesis.given(
    rows=st.lists(st.lists(st.integers(0, 3), max_size=9), max_size=5),
    left=st.booleans(),
  )
  def test_mask_gives_the_rows_back(self, rows, left):
    pad = data.pad_left if left else data.pad_right
    ids, mask = pad(rows, buckets=(4, 9), pad_id=3)
    self.assertEqual(ids.shape, mask.shape)
    self.assertIn(ids.shape[1], (4, 9))
    self.assertEqual(
      [r[m].tolist() for r, m in zip(ids, mask, strict=True)], rows
    )
    edge = mask[:, -1] if left else mask[:, 0]
    np.testing.assert_array_equal(edge, [len(row) > 0 for row in rows])

  def test_too_long(self):
    with self.assertRaisesRegex(ValueError, "Row 1 has 3 tokens.* is 2"):
      data.pad_left([[1], [1, 2, 3]], length=2)

  def test_longest_in_bucket(self):
    for limit in range(1, 300):
      longest = data.longest_in_bucket(limit)
      self.assertLessEqual(data.bucket_length(longest), limit)
      self.assertGreater(data.bucket_length(longest + 1), limit)
    self.assertEqual(data.longest_in_bucket(127), 96)
    self.assertEqual(
      (data.longest_in_bucket(0), data.longest_in_bucket(-5)), (0, 0)
    )


class BatchesTest(parameterized.TestCase):
  def test_supervised_batch(self):
    batch = data.supervised_batch(
      [([1, 2], [3, 9]), ([4], [9])], prompt_length=3, pad_id=9
    )
    np.testing.assert_array_equal(batch["prompt_ids"], [[9, 1, 2], [9, 9, 4]])
    np.testing.assert_array_equal(
      batch["prompt_mask"], [[False, True, True], [False, False, True]]
    )
    np.testing.assert_array_equal(batch["response_ids"], [[3, 9], [9, 9]])
    # The end token counts although it is the padding token.
    np.testing.assert_array_equal(
      batch["response_mask"], [[True, True], [True, False]]
    )

  def test_empty_batch(self):
    with self.assertRaisesRegex(ValueError, "at least one row"):
      data.supervised_batch([])

  @hypothesis.given(
    num_rows=st.integers(1, 12),
    batch_size=st.integers(1, 12),
    seed=st.integers(0, 99),
  )
  def test_every_row_once_per_epoch(self, num_rows, batch_size, seed):
    hypothesis.assume(batch_size <= num_rows)
    steps = [
      data.batch_indices(num_rows, batch_size, step, seed=seed)
      for step in range(2 * num_rows)
    ]
    self.assertTrue(all(len(batch) == batch_size for batch in steps))
    epochs = np.concatenate(steps).reshape(2 * batch_size, num_rows)
    for epoch, order in enumerate(epochs):
      np.testing.assert_array_equal(
        order, data.epoch_order(num_rows, seed=seed, epoch=epoch)
      )
      np.testing.assert_array_equal(np.sort(order), np.arange(num_rows))

  def test_orders_differ(self):
    orders = {
      tuple(data.epoch_order(20, seed=seed, epoch=epoch))
      for seed in range(3)
      for epoch in range(3)
    }
    self.assertLen(orders, 9)

  @parameterized.parameters(0, 6)
  def test_bad_batch_size(self, batch_size):
    with self.assertRaisesRegex(
      ValueError, f"between 1 and the 5 rows of data, got {batch_size}"
    ):
      data.batch_indices(5, batch_size, 0, seed=0)


class ImportTest(parameterized.TestCase):
  def test_text_side_is_light(self):
    code = (
      "import sys; from rljax import data, evaluation, tasks;"
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
