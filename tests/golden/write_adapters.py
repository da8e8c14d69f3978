"""Writes adapters of PEFT, and the logits of models with them.

Each folder of tests/golden/adapters is what PEFT saves of a LoRA adapter with
random factors on a model of another golden file, with logits.npz beside it.

  python tests/golden/write_adapters.py    (needs peft, torch and transformers)
"""

import json
import pathlib
import shutil
import tempfile

import numpy as np
import peft
import safetensors.numpy
import torch
import transformers

GOLDEN = pathlib.Path(__file__).parent
FOLDER = GOLDEN / "adapters"

# Golden file -> settings of its adapter.
ADAPTERS = {
  "llama3": {"target_modules": "all-linear"},
  "gpt2": {"target_modules": "all-linear", "use_rslora": True},
  "gpt_neox": {"target_modules": ["query_key_value", "dense"]},
  "phi3": {"target_modules": "all-linear", "r": 2, "lora_alpha": 5},
}


def write_base(name, folder):
  """Writes the model of a golden file as transformers does.

  Returns:
    The ids and the mask of the file.
  """
  with np.load(GOLDEN / f"{name}.npz") as file:
    content = dict(file)
  config = json.loads(str(content["config"]))
  auto = transformers.AutoConfig.for_model(config.pop("model_type"), **config)
  causal = transformers.AutoModelForCausalLM
  kind = causal._model_mapping[type(auto)].__name__
  folder.mkdir()
  config = {**auto.to_dict(), "architectures": [kind], "dtype": "float32"}
  (folder / "config.json").write_text(json.dumps(config, default=str))
  weights = {
    key.removeprefix("weight/"): np.ascontiguousarray(array)
    for key, array in content.items()
    if key.startswith("weight/")
  }
  path = folder / "model.safetensors"
  safetensors.numpy.save_file(weights, path, {"format": "pt"})
  return content["ids"], content["mask"]


def logits_of(model, ids, mask):
  """The logits of left-padded rows, by positions that the mask decides."""
  positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
  with torch.no_grad():
    found = model(
      input_ids=torch.tensor(ids.astype(np.int64)),
      attention_mask=torch.tensor(mask.astype(np.int64)),
      use_cache=False,
      **(
        {}
        if model.config.model_type == "opt"
        else {"position_ids": torch.tensor(positions)}
      ),
    )
  return found.logits.float().numpy()


def adapted(base, settings, seed):
  """A model of PEFT with random factors."""
  model = transformers.AutoModelForCausalLM.from_pretrained(
    base, attn_implementation="eager", dtype=torch.float32
  )
  config = peft.LoraConfig(
    **{"r": 3, "lora_alpha": 6, "task_type": "CAUSAL_LM"} | settings
  )
  model = peft.get_peft_model(model.eval(), config)
  rng = np.random.default_rng(seed)
  with torch.no_grad():
    for name, tensor in model.named_parameters():
      if "lora_" in name:
        tensor.copy_(torch.tensor(0.3 * rng.normal(size=tuple(tensor.shape))))
  return model


def main():
  torch.set_num_threads(1)
  for seed, (name, settings) in enumerate(ADAPTERS.items()):
    with tempfile.TemporaryDirectory() as scratch:
      base = pathlib.Path(scratch, "base")
      ids, mask = write_base(name, base)
      model = adapted(base, settings, seed)
      target = FOLDER / name
      shutil.rmtree(target, ignore_errors=True)
      model.save_pretrained(target)
      (target / "README.md").unlink()
      path = target / "adapter_config.json"
      config = json.loads(path.read_text())
      config["base_model_name_or_path"] = name
      path.write_text(json.dumps(config, indent=2) + "\n")
      logits = logits_of(model, ids, mask)
      versions = {
        x.__name__: x.__version__ for x in (peft, torch, transformers)
      }
      np.savez_compressed(
        target / "logits.npz", logits=logits, versions=json.dumps(versions)
      )
      print(name, float(np.abs(logits).max()))


if __name__ == "__main__":
  main()
