"""Writes the logits that the tests of classifiers compare with.

Like `write_models.py`, for the `...ForSequenceClassification` models. Rows are
padded as these models find their padding: the causal ones on either side, by
the id 0, the encoders on the right.

  python tests/golden/write_classifiers.py    (needs torch and transformers)
"""

import json

import numpy as np
import torch
import transformers
import write_models

_LABELS = {0: "no", 1: "perhaps", 2: "yes"}
_BERT = {
  **{k: write_models._SIZES[k] for k in ("vocab_size", "hidden_size")},
  "intermediate_size": 24,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "max_position_embeddings": 32,
}

CONFIGS = {
  "llama_classifier": {
    **write_models.CONFIGS["llama3"],
    "pad_token_id": 0,
    "id2label": {0: "reward"},
  },
  "gpt2_classifier": {
    **write_models.CONFIGS["gpt2"],
    "pad_token_id": 0,
    "id2label": _LABELS,
  },
  "bert": {
    "model_type": "bert",
    **_BERT,
    "layer_norm_eps": 1e-3,
    "id2label": _LABELS,
  },
  "roberta": {
    "model_type": "roberta",
    **_BERT,
    "pad_token_id": 3,
    "type_vocab_size": 1,
    "hidden_act": "relu",
    "id2label": {0: "reward"},
    "problem_type": "regression",
  },
  # With two labels of no name, which transformers leaves out of the file.
  "distilbert": {
    "model_type": "distilbert",
    "vocab_size": write_models.VOCAB,
    "dim": 16,
    "hidden_dim": 24,
    "n_layers": 2,
    "n_heads": 4,
    "max_position_embeddings": 32,
  },
}


def inputs(rng, config, is_causal):
  """Four rows, in which the padding id stands in padding alone."""
  ids, mask = write_models.inputs(rng)
  if not is_causal:
    mask = np.arange(mask.shape[1]) < mask.sum(axis=1, keepdims=True)
  pad_id = config.pad_token_id
  others = np.setdiff1d(np.arange(config.vocab_size), [pad_id])
  ids = others[ids % len(others)]
  return np.where(mask, ids, pad_id), mask


def main():
  torch.set_num_threads(1)
  for seed, (name, fields) in enumerate(CONFIGS.items()):
    rng = np.random.default_rng(100 + seed)
    fields = dict(fields)
    model_type = fields.pop("model_type")
    config = transformers.AutoConfig.for_model(
      model_type, **fields, attn_implementation="eager"
    )
    cls = transformers.AutoModelForSequenceClassification
    model = cls.from_config(config).eval().float()
    write_models.fill(model, rng)
    is_causal = name.endswith("_classifier")
    ids, mask = inputs(rng, config, is_causal)
    arrays = {"ids": ids.astype(np.int32), "mask": mask}
    more = {}
    if is_causal:
      positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
      more["position_ids"] = torch.tensor(positions)
    if model_type == "bert":
      types = np.sort(rng.integers(0, 2, size=ids.shape), axis=1)
      arrays["token_type_ids"] = types.astype(np.int32)
      more["token_type_ids"] = torch.tensor(types)
    with torch.no_grad():
      logits = model(
        input_ids=torch.tensor(ids),
        attention_mask=torch.tensor(mask.astype(np.int64)),
        **more,
      ).logits.numpy()
    content = {
      "config": json.dumps(
        {
          **model.config.to_diff_dict(),
          "architectures": [type(model).__name__],
        },
        default=str,
      ),
      "versions": json.dumps(
        {
          "torch": torch.__version__,
          "transformers": transformers.__version__,
          "numpy": np.__version__,
        }
      ),
      "logits": logits,
      **arrays,
    }
    for key, tensor in model.named_parameters():
      content[f"weight/{key}"] = tensor.detach().numpy()
    np.savez_compressed(write_models.FOLDER / f"{name}.npz", **content)
    print(name, logits.round(3).tolist())


if __name__ == "__main__":
  main()
