import importlib.util
import json
import pathlib
import runpy
import shutil
import tempfile

import jax
import numpy as np
import pytest
import safetensors.numpy
from absl.testing import absltest, parameterized

from rljax.models import hf, lora, peft
from tests import tiny

GOLDEN = tiny.GOLDEN / "adapters"
NAMES = ("llama3", "gpt2", "gpt_neox", "phi3")
KINDS = {
  "llama": "LlamaForCausalLM",
  "gpt2": "GPT2LMHeadModel",
  "gpt_neox": "GPTNeoXForCausalLM",
  "phi3": "Phi3ForCausalLM",
}


def _base(folder, name):
  """Writes the model of a golden file; returns that."""
  golden = tiny.golden(name)
  kind = KINDS[golden["config"]["model_type"]]
  folder.mkdir()
  config = golden["config"] | {"architectures": [kind]}
  (folder / "config.json").write_text(json.dumps(config))
  weights = {k: np.ascontiguousarray(v) for k, v in golden["weights"].items()}
  safetensors.numpy.save_file(weights, folder / "model.safetensors")
  return golden


class AdapterTestCase(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.place = pathlib.Path(tempfile.mkdtemp())
    self.addCleanup(shutil.rmtree, self.place)

  def adapter(self, name):
    """A golden adapter beside its base."""
    self.golden = _base(self.place / "base", name)
    self.folder = self.place / "adapter"
    shutil.copytree(GOLDEN / name, self.folder)
    self.edit(base_model_name_or_path=str(self.place / "base"))

  def edit(self, **changed):
    path = self.folder / "adapter_config.json"
    config = json.loads(path.read_text()) | changed
    path.write_text(json.dumps(config))

  def logits(self, loaded):
    @jax.jit
    def of(params, ids, mask):
      hidden = loaded.model.apply({"params": params}, ids, mask)
      variables = {"params": params}
      return loaded.model.apply(variables, hidden, method="logits")

    ids, mask = self.golden["ids"], self.golden["mask"]
    params = jax.tree.map(np.asarray, loaded.params)
    return np.where(mask[..., None], of(params, ids, mask), 0)


class GoldenTest(AdapterTestCase):
  @parameterized.parameters(*NAMES)
  def test_logits_are_those_of_peft(self, name):
    self.adapter(name)
    mask = self.golden["mask"][..., None]
    with np.load(self.folder / "logits.npz") as file:
      expected = np.where(mask, file["logits"], 0)
    loaded = hf.load(self.folder, tokenizer=False)
    found = self.logits(loaded)
    np.testing.assert_allclose(found, expected, atol=2e-4)
    base = np.where(mask, self.golden["logits"], 0)
    self.assertGreater(np.abs(expected - base).max(), 0.1)
    # Read part by part, as it is placed.
    lazily = hf.load(self.folder, tokenizer=False, lazy=True)
    for one, other in zip(
      *map(jax.tree.leaves, (loaded.params, lazily.params)), strict=True
    ):
      np.testing.assert_array_equal(one, np.asarray(other))

  @parameterized.parameters(*NAMES)
  def test_what_is_written_is_what_was_read(self, name):
    self.adapter(name)
    settings = peft.read_settings(self.folder)
    base = hf.load(self.place / "base", tokenizer=False)
    factors, noted = peft.read(self.folder, base.model, settings)
    self.assertEqual(noted, "")
    written = self.place / "written"
    peft.write(written, base.model, factors, settings)
    self.assertEqual(peft.read_settings(written), settings)
    tensors = [
      safetensors.numpy.load_file(folder / "adapter_model.safetensors")
      for folder in (self.folder, written)
    ]
    self.assertEqual(*map(sorted, tensors))
    for key in tensors[0]:
      np.testing.assert_array_equal(tensors[0][key], tensors[1][key])
    known = json.loads((self.folder / "adapter_config.json").read_text())
    config = json.loads((written / "adapter_config.json").read_text())
    config["inference_mode"] = known["inference_mode"]
    self.assertContainsSubset(config, known)  # PEFT takes no other fields.
    self.assertEqual(config["fan_in_fan_out"], known["fan_in_fan_out"])


class RefusedTest(AdapterTestCase):
  def setUp(self):
    super().setUp()
    self.adapter("llama3")
    self.file = self.folder / "adapter_model.safetensors"
    self.tensors = safetensors.numpy.load_file(self.file)
    self.name = next(iter(self.tensors))

  def refused(self, message):
    with self.assertRaisesRegex(ValueError, message):
      hf.load(self.folder, tokenizer=False)

  def save(self, **changed):
    tensors = self.tensors | changed
    tensors = {k: x for k, x in tensors.items() if x is not None}
    safetensors.numpy.save_file(tensors, self.file)

  @parameterized.parameters(
    ({"peft_type": "IA3"}, '"peft_type" is \'IA3\', and only LORA'),
    ({"task_type": "SEQ_CLS"}, '"task_type" is \'SEQ_CLS\''),
    ({"bias": "all"}, '"bias" is \'all\', and only .* without trained biases'),
    ({"modules_to_save": ["lm_head"]}, '"modules_to_save" .*not implemented'),
    ({"use_dora": True}, '"use_dora" is True, and that is not implemented'),
    ({"rank_pattern": {"q_proj": 4}}, '"rank_pattern" is .*not implemented'),
    ({"layers_to_transform": [0]}, '"layers_to_transform" is .*not implemente'),
    ({"alpha_pattern": {"q_proj": 4}}, '"alpha_pattern" is .*not implemented'),
    ({"never_heard_of": 1}, '"never_heard_of" is 1, .*not implemented'),
    ({"init_lora_weights": "pissa"}, "adapters that change their base"),
    ({"r": 0}, 'json: "r" is 0, and a whole number above 0 .* needed.$'),
    ({"r": None}, '"r" is missing, and a whole number above 0'),
    ({"lora_alpha": None}, 'json: "lora_alpha" is missing, and a number above'),
    ({"lora_alpha": 10**400}, '"lora_alpha" is 10+.*below 1,000,000 is needed'),
    ({"use_rslora": "no"}, '"use_rslora" is \'no\', and true or false'),
    ({"r": 4}, r"shape \(3, 16\), expected \(4, 16\).*another rank than 4"),
    ({"target_modules": ".*_proj"}, "a list of names is needed"),
    (
      {"target_modules": ["c_attn"]},
      r"base is .*/base, names 'c_attn', which is no .* \(llama\); it has",
    ),
    ({"target_modules": ["q_proj"]}, "tensors .*no place for: .*and .* more"),
    ({"base_model_name_or_path": ""}, "it must name the base model"),
    ({"base_model_name_or_path": "no/w/x"}, "the base of the adapter .*no/w"),
  )  # fmt: skip
  def test_configs(self, changed, message):
    self.edit(**changed)
    self.refused(message)

  def test_tensors(self):
    self.save(**{self.name: None})
    self.refused("lacks base_model.model.model.layers.0.*lora_A.weight, of the")
    self.save(**{"base_model.model.lm_head.weight": np.zeros((40, 16))})
    self.refused("no place for: base_model.model.lm_head.weight.*another base")
    self.save(**{self.name: np.zeros((3, 17), np.float32)})
    self.refused(r"has shape \(3, 17\), expected .*another base than")
    whole = self.tensors[self.name]
    self.save(**{self.name: whole.astype(np.int32)})
    self.refused("lora_A.weight is of dtype int32; adapters are floats")
    for bad in (np.nan, 1e39):  # The latter is none of float32.
      numbers = whole.astype(np.float64)
      numbers[:, 5] = bad
      self.save(**{self.name: numbers})
      self.refused("safetensors: 3 of the 72 numbers of .* are not finite")
    self.file.write_bytes(b"no tensors")
    self.refused("adapter_model.safetensors is damaged")
    self.file.rename(self.folder / "adapter_model.bin")
    self.refused("has no adapter_model.safetensors, only a pickle")

  def test_no_base(self):
    self.edit(base_model_name_or_path="/not/there")
    for load in (hf.load, hf.load_module, hf.load_tokenizer):
      with self.assertRaisesRegex(
        ValueError, "base of the adapter in .*/adapter cannot.*: /not/there is"
      ):
        load(self.folder)

  def test_bases_that_lead_back(self):
    self.edit(base_model_name_or_path=str(self.folder))
    self.refused("leads back to itself as its base: .*/adapter -> .*/adapter")
    other = self.place / "other"
    shutil.copytree(self.folder, other)
    self.edit(base_model_name_or_path=str(other))
    self.refused('adapter -> .*/other -> .*/adapter. Set "base_model_name')

  def test_adapters_of_another_family(self):
    _base(self.place / "gpt2", "gpt2")
    self.edit(base_model_name_or_path=str(self.place / "gpt2"))
    self.refused(r"base is .*/gpt2, names 'model.layers.*this model \(gpt2\)")

  def test_another_base(self):
    settings = peft.read_settings(self.folder)
    base = hf.load(self.place / "base", tokenizer=False)
    factors, _ = peft.read(self.folder, base.model, settings)
    noted = lora.Settings(
      **vars(settings) | {"digest": lora.digest(base.params)}
    )
    peft.write(self.folder, base.model, factors, noted)
    hf.load(self.folder, tokenizer=False)
    base.params["norm"]["scale"] = base.params["norm"]["scale"] * 1.5
    hf.save(self.place / "base", base.model, base.params)
    self.refused("holds other weights than the base that the adapters of")


@pytest.mark.slow
class PeftTest(AdapterTestCase):
  @parameterized.parameters(
    *("llama3", "gpt2", "gpt_neox", "phi3", "mistral", "qwen2", "qwen3"),
    *("gemma", "gemma2", "gemma3", "granite", "olmo2", "opt", "smollm3"),
    *("mixtral", "qwen3_moe"),
  )
  def test_both_ways(self, name):
    if not all(map(importlib.util.find_spec, ("peft", "torch"))):
      self.skipTest("needs peft and torch")
    import peft as theirs
    import transformers

    write = runpy.run_path(str(tiny.GOLDEN / "write_adapters.py"))
    base, folder = self.place / "base", self.place / "adapter"
    ids, mask = write["write_base"](name, base)
    self.golden = {"ids": ids, "mask": mask}
    targets = "all-linear"
    if name in ("mixtral", "qwen3_moe"):
      # Else PEFT adapts experts and routers as well, which is refused.
      targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    model = write["adapted"](base, {"target_modules": targets}, 0)
    model.save_pretrained(folder)
    found = self.logits(hf.load(folder, tokenizer=False))
    expected = np.where(
      mask[..., None], write["logits_of"](model, ids, mask), 0
    )
    np.testing.assert_allclose(found, expected, atol=5e-4)
    # And back: adapters of ours in a model of theirs.
    loaded = hf.load(base, tokenizer=False)
    settings = lora.Settings(rank=2, alpha=3.0, rslora=True, base=str(base))
    rng = np.random.default_rng(0)
    ours = lora.adapt(loaded.model, loaded.params, settings)
    factors = jax.tree.map(lambda x: 0.3 * rng.normal(size=x.shape), ours.lora)
    peft.write(self.place / "ours", loaded.model, factors, settings)
    causal = transformers.AutoModelForCausalLM.from_pretrained(
      base, attn_implementation="eager"
    )
    model = theirs.PeftModel.from_pretrained(causal, self.place / "ours")
    expected = np.where(
      mask[..., None], write["logits_of"](model.eval(), ids, mask), 0
    )
    found = self.logits(hf.load(self.place / "ours", tokenizer=False))
    np.testing.assert_allclose(found, expected, atol=5e-4)


if __name__ == "__main__":
  absltest.main()
