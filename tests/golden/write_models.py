"""Writes the logits and gradients that the model tests compare with.

Each file holds a tiny randomly filled model of Hugging Face transformers: its
config, weights and inputs, and what torch makes of them. Biases and the
scales of norms are random too, and weights large enough that a wrong mask or
rotation shows. The versions that wrote a file are recorded in it.

  python tests/golden/write_models.py [name ...]   (needs torch)
"""

import json
import pathlib
import sys

import numpy as np
import torch
import transformers

FOLDER = pathlib.Path(__file__).parent
VOCAB, LENGTH, NUM_NEW = 40, 24, 10

_SIZES = {
  "vocab_size": VOCAB,
  "hidden_size": 16,
  "intermediate_size": 24,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "max_position_embeddings": 64,
}

CONFIGS = {
  "llama3": {
    "model_type": "llama",
    **_SIZES,
    "rope_parameters": {
      "rope_type": "llama3",
      "rope_theta": 30.0,
      "factor": 4.0,
      "low_freq_factor": 1.0,
      "high_freq_factor": 4.0,
      "original_max_position_embeddings": 32,
    },
    "head_dim": 12,
    "tie_word_embeddings": False,
  },
  "llama_linear": {
    "model_type": "llama",
    **_SIZES,
    "rope_parameters": {
      "rope_type": "linear",
      "rope_theta": 100.0,
      "factor": 2.5,
    },
    "attention_bias": True,
    "mlp_bias": True,
    "tie_word_embeddings": True,
  },
  "llama_yarn": {
    "model_type": "llama",
    **_SIZES,
    "rope_parameters": {
      "rope_type": "yarn",
      "rope_theta": 30.0,
      "factor": 4.0,
      "beta_fast": 4.0,
      "original_max_position_embeddings": 16,
    },
    "head_dim": 12,
    "num_key_value_heads": 4,
    "tie_word_embeddings": True,
  },
  "mistral": {
    "model_type": "mistral",
    **_SIZES,
    "num_key_value_heads": 1,
    "head_dim": 6,
    "sliding_window": None,
    "tie_word_embeddings": False,
  },
  "qwen2": {
    "model_type": "qwen2",
    **_SIZES,
    "tie_word_embeddings": True,
  },
  "qwen3": {
    "model_type": "qwen3",
    **_SIZES,
    "head_dim": 10,
    "tie_word_embeddings": True,
  },
  "gpt2": {
    "model_type": "gpt2",
    "vocab_size": VOCAB,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 32,
    "bos_token_id": None,
    "eos_token_id": None,
  },
}

# Of these files, the tensors whose gradients are kept.
GRADIENTS = {
  "llama3": (
    "model.embed_tokens.weight",
    "model.layers.0.self_attn.k_proj.weight",
    "model.layers.0.input_layernorm.weight",
  ),
  "gpt2": (
    "transformer.wte.weight",
    "transformer.h.0.attn.c_attn.weight",
    "transformer.h.0.ln_1.bias",
  ),
}


def inputs(rng):
  """Four rows: no padding, left, right, and both."""
  ids = rng.integers(0, VOCAB, size=(4, LENGTH))
  mask = np.ones((4, LENGTH), bool)
  mask[1, :7] = False
  mask[2, -5:] = False
  mask[3, :4] = False
  mask[3, -9:] = False
  return ids, mask


def fill(model, rng):
  """Random weights, norm scales around 1, random biases."""
  with torch.no_grad():
    for name, tensor in model.named_parameters():
      noise = rng.normal(size=tuple(tensor.shape))
      is_norm = "norm" in name.lower() or ".ln_" in name
      if is_norm and name.endswith("weight"):
        value = 1 + 0.3 * noise
      else:
        value = 0.4 * noise
      tensor.copy_(torch.tensor(value, dtype=torch.float32))


def greedy(model, ids):
  """Greedy texts of two prompts, the second padded on the left."""
  prompts, mask = ids[:2, :11].copy(), np.ones((2, 11), bool)
  mask[1, :4] = False
  model.generation_config.eos_token_id = None
  text = model.generate(
    torch.tensor(prompts),
    attention_mask=torch.tensor(mask.astype(np.int64)),
    max_new_tokens=NUM_NEW,
    do_sample=False,
  )
  text = text[:, 11:].numpy()
  return {"prompts": prompts, "prompt_mask": mask, "greedy": text}


def main():
  torch.set_num_threads(1)
  for seed, (name, fields) in enumerate(CONFIGS.items()):
    if sys.argv[1:] and name not in sys.argv[1:]:
      continue
    rng = np.random.default_rng(seed)
    fields = dict(fields)
    config = transformers.AutoConfig.for_model(
      fields.pop("model_type"), **fields, attn_implementation="eager"
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.eval().float()
    fill(model, rng)
    ids, mask = inputs(rng)
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    logits = model(
      input_ids=torch.tensor(ids),
      attention_mask=torch.tensor(mask.astype(np.int64)),
      position_ids=torch.tensor(positions),
      use_cache=False,
    ).logits
    # Mean over the tokens whose predecessor is real too.
    counts = torch.tensor(mask[:, 1:] & mask[:, :-1])
    nll = -torch.log_softmax(logits[:, :-1], dim=-1)
    nll = nll.gather(-1, torch.tensor(ids[:, 1:, None]))[..., 0]
    loss = nll[counts].mean()
    loss.backward()

    parameters = dict(model.named_parameters())
    content = {
      "config": json.dumps(model.config.to_dict(), default=str),
      "versions": json.dumps(
        {
          "torch": torch.__version__,
          "transformers": transformers.__version__,
          "numpy": np.__version__,
        }
      ),
      "ids": ids.astype(np.int32),
      "mask": mask,
      "logits": logits.detach().numpy(),
      "loss": np.float32(loss.item()),
    }
    for key, array in greedy(model, ids).items():
      content[key] = array.astype(np.int32) if array.dtype != bool else array
    for key, tensor in parameters.items():
      content[f"weight/{key}"] = tensor.detach().numpy()
    for key in GRADIENTS.get(name, ()):
      content[f"gradient/{key}"] = parameters[key].grad.numpy()
    np.savez_compressed(FOLDER / f"{name}.npz", **content)
    print(name, round(loss.item(), 4), float(logits.detach().abs().max()))


if __name__ == "__main__":
  main()
