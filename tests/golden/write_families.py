"""Writes the logits and texts that the tests of families compare with.

Like `write_models.py`, for the families beyond Llama's and GPT-2's. A file
holds what transformers saves of a tiny model, config.json and tensors under
the names they have in a checkpoint, so that reading is tested as well. Weights
are rounded to float16, to halve the files. Widths are odd ones on purpose.

  python tests/golden/write_families.py [name ...]   (needs torch)
"""

import json
import pathlib
import sys
import tempfile

import numpy as np
import safetensors.numpy
import torch
import transformers
import write_classifiers
import write_models

_BASE = {
  "vocab_size": write_models.VOCAB,
  "hidden_size": 20,
  "intermediate_size": 14,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "max_position_embeddings": 64,
  "bos_token_id": 1,
  "eos_token_id": 2,
  "pad_token_id": 0,
}
_GROUPED = {**_BASE, "num_key_value_heads": 2, "head_dim": 6}
_ROPE = {"rope_type": "default", "rope_theta": 30.0}

LANGUAGE_MODELS = {
  "mistral_window": {
    "model_type": "mistral",
    **_GROUPED,
    "sliding_window": 5,
    "rope_parameters": _ROPE,
  },
  "qwen2_window": {
    "model_type": "qwen2",
    **_BASE,
    "num_key_value_heads": 2,
    "hidden_size": 24,
    "use_sliding_window": True,
    "sliding_window": 7,
    "max_window_layers": 1,
    "tie_word_embeddings": True,
  },
  "gemma": {
    "model_type": "gemma",
    **_GROUPED,
    "num_key_value_heads": 1,
    "rope_parameters": _ROPE,
  },
  "gemma2": {
    "model_type": "gemma2",
    **_GROUPED,
    "num_hidden_layers": 3,
    "sliding_window": 5,
    "query_pre_attn_scalar": 9,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 3.0,
  },
  "gemma3": {
    "model_type": "gemma3_text",
    **_GROUPED,
    "num_hidden_layers": 4,
    "hidden_size": 16,
    "sliding_window": 6,
    "sliding_window_pattern": 3,
    "query_pre_attn_scalar": 7,
    "rope_parameters": {
      "full_attention": {
        "rope_type": "linear",
        "factor": 3.0,
        "rope_theta": 100.0,
      },
      "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
    },
  },
  "gpt_neox": {
    "model_type": "gpt_neox",
    **_BASE,
    "hidden_size": 24,
    "num_attention_heads": 3,
    "rotary_emb_base": 50,
    "layer_norm_eps": 1e-3,
  },
  "gpt_neox_serial": {
    "model_type": "gpt_neox",
    **_BASE,
    "rope_parameters": {
      "rope_type": "linear",
      "factor": 2.0,
      "rope_theta": 40.0,
      "partial_rotary_factor": 0.8,
    },
    "use_parallel_residual": False,
    "attention_bias": False,
    "hidden_act": "gelu_new",
    "tie_word_embeddings": True,
  },
  "opt": {
    "model_type": "opt",
    **{k: v for k, v in _BASE.items() if k != "intermediate_size"},
    "ffn_dim": 14,
    "word_embed_proj_dim": 20,
    "max_position_embeddings": 36,
  },
  "olmo2": {
    "model_type": "olmo2",
    **_GROUPED,
    "rms_norm_eps": 1e-2,
    "rope_parameters": _ROPE,
  },
  "smollm3": {
    "model_type": "smollm3",
    **_GROUPED,
    "num_hidden_layers": 3,
    "no_rope_layers": [1, 0, 1],
    "use_sliding_window": True,
    "sliding_window": 5,
    "rope_parameters": _ROPE,
  },
  "granite": {
    "model_type": "granite",
    **_GROUPED,
    "embedding_multiplier": 2.5,
    "logits_scaling": 3.0,
    "residual_multiplier": 0.4,
    "attention_multiplier": 0.3,
    "mlp_bias": True,
    "rope_parameters": _ROPE,
  },
  "phi3": {
    "model_type": "phi3",
    **_BASE,
    "num_key_value_heads": 2,
    "hidden_size": 32,
    "original_max_position_embeddings": 40,
    "sliding_window": 9,
    "rope_parameters": {
      "rope_type": "longrope",
      "rope_theta": 30.0,
      "partial_rotary_factor": 0.75,
      "short_factor": [1.0, 1.3, 2.0],
      "long_factor": [1.5, 4.0, 9.0],
    },
  },
  "mixtral": {
    "model_type": "mixtral",
    **_GROUPED,
    "intermediate_size": 10,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "rope_parameters": _ROPE,
  },
  "qwen3_moe": {
    "model_type": "qwen3_moe",
    **_GROUPED,
    "num_hidden_layers": 3,
    "moe_intermediate_size": 6,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "mlp_only_layers": [1],
    "router_aux_loss_coef": 0.01,
  },
}
LANGUAGE_MODELS["qwen3_moe"]["norm_topk_prob"] = True

ENCODERS = ("xlm-roberta", "electra", "modernbert")
_LABELS = {0: "no", 1: "perhaps", 2: "yes"}
_ENCODER = {**_BASE, "hidden_size": 24, "id2label": _LABELS}
CLASSIFIERS = {
  **{
    f"{name}_classifier": {**LANGUAGE_MODELS[name], "id2label": _LABELS}
    for name in ("gemma2", "gpt_neox", "opt", "qwen3_moe")
  },
  "qwen3_classifier": {
    "model_type": "qwen3",
    **_GROUPED,
    "id2label": {0: "reward"},
  },
  "xlm_roberta": {
    "model_type": "xlm-roberta",
    **_ENCODER,
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-3,
  },
  "electra": {
    "model_type": "electra",
    **_ENCODER,
    "embedding_size": 12,
    "hidden_act": "gelu",
  },
  "modernbert": {
    "model_type": "modernbert",
    **_ENCODER,
    "num_hidden_layers": 3,
    "global_attn_every_n_layers": 2,
    "local_attention": 6,
    "classifier_pooling": "mean",
    "cls_token_id": 1,
    "sep_token_id": 2,
  },
  "modernbert_cls": {
    "model_type": "modernbert",
    **_ENCODER,
    "global_attn_every_n_layers": 1,
    "norm_bias": True,
    "attention_bias": True,
    "mlp_bias": True,
    "classifier_bias": True,
    "cls_token_id": 1,
    "sep_token_id": 2,
  },
  **{
    f"{name.removesuffix('_window')}_classifier": {
      **LANGUAGE_MODELS[name],
      "id2label": {0: "reward"},
    }
    for name in (
      *("mistral_window", "qwen2_window", "gemma", "gemma3", "mixtral"),
      *("olmo2", "phi3", "smollm3"),
    )
  },
}


def make(fields, auto, rng):
  """A model with random weights that float16 holds exactly."""
  config = transformers.AutoConfig.for_model(
    **fields, attn_implementation="eager", experts_implementation="eager"
  )
  model = auto.from_config(config).eval().float()
  write_models.fill(model, rng)
  with torch.no_grad():
    for tensor in model.parameters():
      tensor.copy_(tensor.half().float())
  return model


def saved(model):
  """The config.json and the tensors that transformers writes."""
  with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    config = json.loads((pathlib.Path(folder) / "config.json").read_text())
    tensors = safetensors.numpy.load_file(f"{folder}/model.safetensors")
  return config, {
    name: array.astype("float16") for name, array in tensors.items()
  }


def language_model(fields, rng):
  model = make(fields, transformers.AutoModelForCausalLM, rng)
  ids, mask = write_models.inputs(rng)
  positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
  more = {}
  if "moe" in fields["model_type"] or fields["model_type"] == "mixtral":
    more["output_router_logits"] = True
  output = model(
    input_ids=torch.tensor(ids),
    attention_mask=torch.tensor(mask.astype(np.int64)),
    position_ids=torch.tensor(positions),
    use_cache=False,
    **more,
  )
  found = {"ids": ids, "mask": mask, "logits": output.logits.numpy()}
  if more:
    found["load_balance_loss"] = np.float32(output.aux_loss)
  return model, found | write_models.greedy(model, ids)


def classifier(fields, rng):
  model = make(fields, transformers.AutoModelForSequenceClassification, rng)
  is_causal = fields["model_type"] not in ENCODERS
  ids, mask = write_classifiers.inputs(rng, model.config, is_causal)
  more = {}
  if is_causal:
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    more["position_ids"] = torch.tensor(positions)
  output = model(
    input_ids=torch.tensor(ids),
    attention_mask=torch.tensor(mask.astype(np.int64)),
    **more,
  )
  return model, {"ids": ids, "mask": mask, "logits": output.logits.numpy()}


@torch.no_grad()
def main():
  torch.set_num_threads(1)
  chosen = sys.argv[1:] or [*LANGUAGE_MODELS, *CLASSIFIERS]
  for seed, name in enumerate([*LANGUAGE_MODELS, *CLASSIFIERS]):
    if name not in chosen:
      continue
    rng = np.random.default_rng(200 + seed)
    if name in LANGUAGE_MODELS:
      model, found = language_model(dict(LANGUAGE_MODELS[name]), rng)
    else:
      model, found = classifier(dict(CLASSIFIERS[name]), rng)
    config, tensors = saved(model)
    versions = {
      module.__name__: module.__version__
      for module in (torch, transformers, np)
    }
    for key in ("ids", "prompts", "greedy"):
      if key in found:
        found[key] = found[key].astype(np.int32)
    path = write_models.FOLDER / f"{name}.npz"
    np.savez_compressed(
      path,
      config=json.dumps(config),
      versions=json.dumps(versions),
      **found,
      **{f"weight/{key}": tensor for key, tensor in tensors.items()},
    )
    print(name, path.stat().st_size, np.abs(found["logits"]).max())


if __name__ == "__main__":
  main()
