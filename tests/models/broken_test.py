"""Folders and files that are damaged, hostile or something else."""

import atexit
import functools
import itertools
import json
import os
import pathlib
import shutil
import struct
import tempfile
from unittest import mock

import jax
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from rljax.models import fresh, gguf_header, hf, sources, tokenizers
from rljax.tasks import tokenizers as word_tokenizers
from tests.models import hf_test

safetensors_numpy = pytest.importorskip("safetensors.numpy")

NASTY = (None, True, 0, -1, 2**60, 1.5, "", "x", [], [1], {}, {"a": 1}, [[[]]])
INDEX = "model.safetensors.index.json"


@functools.cache
def _saved(most_bytes):
  """An export with its tokenizer, the model and its parameters."""
  path = pathlib.Path(tempfile.mkdtemp()) / "saved"
  atexit.register(shutil.rmtree, path.parent)
  model, params = hf_test._tiny(path)
  tokenizer = hf_test._tokenizer()
  hf.save(path, model, params, tokenizer, max_shard_bytes=most_bytes)
  return path, model, params


class FolderTestCase(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(
      self.enter_context(tempfile.TemporaryDirectory())
    )
    self.path = self.folder / "exported"
    saved, self.model, self.params = _saved(self.MOST_BYTES)
    shutil.copytree(saved, self.path)

  MOST_BYTES = 2**30

  def refused(self, message, **options):
    with self.assertRaisesRegex(ValueError, message):
      hf.load(self.path, **options)

  def edit(self, name, **changes):
    path = self.path / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


class IndexTest(FolderTestCase):
  MOST_BYTES = 9_000

  def setUp(self):
    super().setUp()
    self.map = json.loads((self.path / INDEX).read_text())["weight_map"]

  def test_the_index_says_which_file_a_tensor_is_read_from(self):
    name, file = next(iter(self.map.items()))
    other = next(f for f in self.map.values() if f != file)
    tensors = safetensors_numpy.load_file(self.path / other)
    wrong = safetensors_numpy.load_file(self.path / file)[name] + 1
    safetensors_numpy.save_file(tensors | {name: wrong}, self.path / other)
    loaded = hf.load(self.path).params
    hf_test._assert_same_bits(loaded, self.params)

  def test_a_tensor_that_is_not_where_the_index_says(self):
    name, file = next(iter(self.map.items()))
    other = next(f for f in self.map.values() if f != file)
    self.edit(INDEX, weight_map=self.map | {name: other})
    self.refused(f"{other} has no tensor {name}, which {INDEX}")

  def test_nothing_outside_of_the_folder_is_named(self):
    name = next(iter(self.map))
    for path in (self.folder, self.path / "sub"):
      path.mkdir(exist_ok=True)
      safetensors_numpy.save_file(
        {"a": np.ones(1)}, path / "secret.safetensors"
      )
    for file in (
      *("../secret.safetensors", "/etc/secret.safetensors", "..", ""),
      *("sub/secret.safetensors", "secret.bin", "*.safetensors", *NASTY),
    ):
      self.edit(INDEX, weight_map=self.map | {name: file})
      self.refused('index.json: "weight_map" puts|which is missing')

  def test_an_index_that_is_none(self):
    for value in NASTY:
      self.edit(INDEX, weight_map=value)
      self.refused("index.json")

  def test_links_out_of_the_folder_are_not_followed(self):
    file = next(iter(self.map.values()))
    os.rename(self.path / file, self.folder / file)
    (self.path / file).symlink_to(self.folder / file)
    self.refused("is a link to .*, outside of its folder")

  def test_the_cache_of_the_hub_links_to_its_blobs(self):
    root = self.folder / "models--org--name"
    (root / "blobs").mkdir(parents=True)
    snapshot = root / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for file in self.path.iterdir():
      os.rename(file, root / "blobs" / file.name)
      (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    hf_test._assert_same_bits(hf.load(snapshot).params, self.params)


class WeightsTest(FolderTestCase):
  def setUp(self):
    super().setUp()
    self.file = self.path / "model.safetensors"
    self.content = self.file.read_bytes()

  def test_damaged_files(self):
    length = struct.unpack("<Q", self.content[:8])[0]
    for content in (
      b"",
      self.content[:4],
      self.content[:-1],
      self.content[: 8 + length // 2],
      struct.pack("<Q", 2**60) + self.content[8:],
      struct.pack("<Q", length + 1) + self.content[8:],
      struct.pack("<Q", 2) + b"[]",
      b"\xff" * 100,
      bytes(1000),
    ):
      self.file.write_bytes(content)
      self.refused("model.safetensors is damaged|lacks")

  def test_what_is_not_finite_is_not_saved(self):
    for value, message in (
      (np.float32(np.nan), "hold.* numbers that are not finite"),
      (np.float32(1e39), "hold.* numbers that are not finite"),
      (np.int32(1), "is of int32, and must be of floats"),
    ):
      params = jax.tree.map(lambda x, v=value: np.full(x.shape, v), self.params)
      with self.assertRaisesRegex(ValueError, message):
        hf.save(self.path, self.model, params)
    hf_test._assert_same_bits(hf.load(self.path).params, self.params)

  def test_a_folder_in_place_of_the_file(self):
    self.file.unlink()
    self.file.mkdir()
    self.refused("has no model.safetensors|neither model.safetensors")

  def test_names_that_programs_put_in_front(self):
    tensors = safetensors_numpy.load_file(self.file)
    for prefix, writer in (
      ("_orig_mod.", "torch.compile"),
      ("module.", "DataParallel"),
      ("base_model.model.", "adapter of peft"),
    ):
      safetensors_numpy.save_file(
        {prefix + name: array for name, array in tensors.items()}, self.file
      )
      self.refused(f"lacks .*{writer}.* leaves there. Save the model in")
    safetensors_numpy.save_file(
      {name.replace("model.layers", "h"): a for name, a in tensors.items()},
      self.file,
    )
    self.refused("names such as h.0.* not those of this model_type")

  def test_other_dtypes(self):
    tensors = safetensors_numpy.load_file(self.file)
    name = "model.norm.weight"
    for dtype in ("int8", "uint8", "int64", "bool"):
      changed = tensors | {name: tensors[name].astype(dtype)}
      safetensors_numpy.save_file(changed, self.file)
      self.refused(f"{name} is stored as")

  def test_a_model_of_very_many_layers_is_refused_quickly(self):
    self.edit("config.json", num_hidden_layers=10_000)
    self.refused("lacks model.layers.2.input_layernorm")


class FolderTest(FolderTestCase):
  def setUp(self):
    super().setUp()
    (self.path / "model.safetensors").unlink()

  def test_adapters(self):
    (self.path / "adapter_config.json").write_text("{}")
    self.refused('"peft_type" is missing, and only LORA')
    (self.path / "config.json").unlink()
    self.refused('"peft_type" is missing, and only LORA')

  def test_weights_by_another_name(self):
    (self.path / "consolidated.safetensors").write_bytes(b"")
    self.refused("has consolidated.safetensors, but neither")

  def test_a_sentencepiece_model_alone(self):
    for name in ("tokenizer.json", "tokenizer_config.json"):
      (self.path / name).unlink()
    (self.path / "tokenizer.model").write_bytes(b"x")
    self.refused("a SentencePiece model alone .*Convert it once")

  def test_hub_names_with_an_index_that_leads_elsewhere(self):
    import huggingface_hub

    (self.path / INDEX).write_text(
      json.dumps({"weight_map": {"a": "../../x.safetensors"}})
    )
    with (
      mock.patch.object(
        huggingface_hub, "snapshot_download", return_value=str(self.path)
      ) as download,
      self.assertRaisesRegex(ValueError, '"weight_map" puts'),
    ):
      hf.load("org/name")
    download.assert_called_once()

  @parameterized.parameters(
    "org/name@", "org/name@a b", "@x", "a@b@c", "o/n@.."
  )
  def test_what_is_no_hub_name(self, name):
    with (
      mock.patch.object(sources, "_fetch", side_effect=OSError) as fetch,
      self.assertRaisesRegex(ValueError, "is neither a directory"),
    ):
      hf.load(name)
    if name != "o/n@..":
      fetch.assert_not_called()


class TokenizersTest(FolderTestCase):
  def test_settings(self):
    names = (
      *("eos_token", "bos_token", "pad_token", "unk_token", "tokenizer_class"),
      *("chat_template", "model_max_length", "added_tokens_decoder"),
      *("extra_special_tokens", "auto_map", "clean_up_tokenization_spaces"),
      *("padding_side", "add_bos_token", "special_tokens_map_file"),
    )
    before = (self.path / "tokenizer_config.json").read_text()
    for name, value in itertools.product(names, NASTY):
      (self.path / "tokenizer_config.json").write_text(before)
      self.edit("tokenizer_config.json", **{name: value})
      try:
        tokenizers.read(self.path)
      except ValueError as error:
        self.assertLess(len(str(error)), 600)

  def test_tokenizer_json(self):
    names = (
      *("version", "truncation", "padding", "added_tokens", "normalizer"),
      *("pre_tokenizer", "post_processor", "decoder", "model"),
    )
    before = (self.path / "tokenizer.json").read_text()
    for name, value in itertools.product(names, NASTY):
      (self.path / "tokenizer.json").write_text(before)
      self.edit("tokenizer.json", **{name: value})
      try:
        tokenizers.read(self.path)
      except ValueError as error:
        self.assertLess(len(str(error)), 600)

  @parameterized.parameters(
    (b"",), (b"[]",), (b"[" * 100_000,), (b"\xff\xfe{}",), (b'{"a": 1}',)
  )
  def test_whole_files(self, content):
    for name in ("tokenizer.json", "tokenizer_config.json"):
      before = (self.path / name).read_bytes()
      (self.path / name).write_bytes(content)
      try:
        tokenizers.read(self.path)
      except ValueError as error:
        self.assertRegex(str(error), "exported")
      (self.path / name).write_bytes(before)

  def test_tokenizers_of_a_few_words(self):
    words = word_tokenizers.of_words(["owl"], "\\w+")
    words.save_pretrained(self.path)
    self.assertIn("owl", tokenizers.read(self.path).get_vocab())

  def test_byte_order_marks_are_read_over(self):
    template = self.path / "chat_template.jinja"
    template.write_text("{{ messages[0].content }}")
    names = ("config.json", "tokenizer.json", "tokenizer_config.json")
    for path in (*(self.path / name for name in names), template):
      path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    tokenizer = hf.load(self.path).tokenizer
    self.assertEqual(tokenizer.get_vocab(), hf_test._tokenizer().get_vocab())
    self.assertEqual(tokenizer.chat_template, "{{ messages[0].content }}")
    self.assertEqual(tokenizer.name_or_path, str(self.path))

  def test_code_of_the_folder_is_never_run(self):
    ran = self.folder / "ran"
    (self.path / "own.py").write_text(f"open({str(ran)!r}, 'w')\n")
    self.edit(
      "tokenizer_config.json",
      tokenizer_class="Own",
      auto_map={"AutoTokenizer": ["own.Own", "own.Own"]},
    )
    self.edit("config.json", auto_map={"AutoConfig": "own.Own"})
    with mock.patch("builtins.input", side_effect=AssertionError("a prompt")):
      try:
        tokenizers.read(self.path)
      except ValueError as error:
        self.assertRegex(str(error), "cannot be read")
    self.assertFalse(ran.exists())

  def test_links_out_of_the_folder(self):
    for name in ("tokenizer.json", "tokenizer_config.json"):
      os.rename(self.path / name, self.folder / name)
      (self.path / name).symlink_to(self.folder / name)
      self.refused("outside of its folder")
      (self.path / name).unlink()
      os.rename(self.folder / name, self.path / name)

  def test_the_largest_id_counts(self):
    # 47 tokens, of which one has the id 60: the embedding has 48 rows.
    content = json.loads((self.path / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    token = max(vocabulary, key=vocabulary.get)
    vocabulary[token] = 60
    self.edit("tokenizer.json", model=content["model"])
    self.refused("has 48 tokens, and the model embeds 48: the largest id is 60")
    tokenizer = tokenizers.read(self.path)
    with self.assertRaisesRegex(ValueError, "the largest id is 60"):
      hf.save(self.folder / "new", self.model, self.params, tokenizer)
    self.assertFalse((self.folder / "new").exists())
    sizes = dict(hidden_size=8, num_layers=1, num_heads=2, max_positions=8)
    made = fresh.make("llama", tokenizer, **sizes)
    self.assertEqual(made.config.vocab_size, 61)
    with self.assertRaisesRegex(ValueError, "vocab_size must be 61"):
      fresh.make("llama", tokenizer, vocab_size=48, **sizes)


def _text(text):
  return struct.pack("<Q", len(text)) + text.encode()


def _gguf(num_tensors=0, num_fields=0, body=b"", version=3):
  return b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_fields) + body


class GgufTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ("empty", b""),
    ("magic", b"GGUF"),
    ("tensors", _gguf(num_tensors=2**60)),
    ("fields", _gguf(num_fields=2**60)),
    ("none", _gguf()),
    ("name", _gguf(0, 1, struct.pack("<Q", 2**60) + b"ab" * 20)),
    (
      "array",
      _gguf(0, 1, _text("a") + struct.pack("<IIQ", 9, 4, 2**60) + b"ab" * 20),
    ),
    (
      "texts",
      _gguf(0, 1, _text("a") + struct.pack("<IIQ", 9, 8, 2**60) + b"ab" * 20),
    ),
    (
      "nested",
      _gguf(
        0,
        1,
        _text("a") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 1000,
      ),
    ),
    ("type", _gguf(0, 1, _text("a") + struct.pack("<I", 77) + b"ab" * 20)),
    (
      "dimensions",
      _gguf(1, 0, _text("a") + struct.pack("<I", 2**31) + b"ab" * 20),
    ),
    (
      "size",
      _gguf(1, 0, _text("a") + struct.pack("<IQQIQ", 2, 2**40, 2**40, 0, 0)),
    ),
    ("utf8", _gguf(0, 1, struct.pack("<Q", 2) + b"\xff\xfe" + bytes(40))),
    (
      "architecture",
      _gguf(0, 1, _text("general.architecture") + struct.pack("<If", 6, 1.0)),
    ),
    ("version", _gguf(version=9)),
  )
  def test_damaged(self, content):
    pytest.importorskip("gguf")
    with tempfile.TemporaryDirectory() as folder:
      path = pathlib.Path(folder) / "model.gguf"
      path.write_bytes(content)
      with self.assertRaises(ValueError):
        hf.load(path)

  def test_a_truncated_file(self):
    pytest.importorskip("gguf")
    from tests.models import gguf_test

    with tempfile.TemporaryDirectory() as folder:
      path = gguf_test._write(
        pathlib.Path(folder) / "model.gguf", gguf_test._hf_tensors()
      )
      gguf_header.check(path)
      content = pathlib.Path(path).read_bytes()
      for part in (0.01, 0.1, 0.2, 0.5, 0.9):
        path.write_bytes(content[: int(part * len(content))])
        with self.assertRaises(ValueError):
          hf.load(path)


if __name__ == "__main__":
  absltest.main()
