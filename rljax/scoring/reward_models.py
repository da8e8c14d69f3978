"""A classifier of texts as a reward: `score_batch` for `tasks.score_all`."""

import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import logging
from jax.sharding import Mesh

from rljax.distributed import compiled, meshes
from rljax.models import classifier, hf
from rljax.storage import checkpoint
from rljax.text import (
  batches,
  end_tokens,
  tokens,
  vocabularies,
)

_TRANSFORMS = ("raw", "sigmoid", "softmax")
_FIELDS = re.compile(r"\{(prompt|response)\}")
# Below this, texts are padded alike: a shape more would gain nothing.
_SHORTEST = 16


class RewardModel:
  """Scores texts with a classifier.

    R = f(logits(template(prompt, response)))

  A causal classifier reads the text behind the start token, if its tokenizer
  puts one there, and with the end token appended: that token's hidden state
  is scored. An encoder reads it between the special tokens of its tokenizer.
  A text that is too long loses its beginning, so that the response stays; of
  a pair, the prompt is cut first. How many were cut is logged.

  Every text is padded to a length that depends on it alone, and run in
  batches of one size: its score does not depend on the texts it comes with.

  Attributes:
    labels: names of the classifier's labels, in the order of the logits.
    fingerprint: a name for what decides a score: the exact parameters, the
      architecture, the tokenizer and the settings. Neither the folder nor the
      batch size is part of it.

  Source:
    Baheti et al. (2024), "Leftover Lunch: Advantage-based Offline
    Reinforcement Learning for Language Models", for the sigmoid and the cut
    on the left.
  """

  def __init__(
    self,
    name: str,
    *,
    dtype: str = "float32",
    transform: str = "sigmoid",
    template: str = "{prompt}{response}",
    max_length: int = 512,
    batch_size: int = 16,
    mesh: Mesh | None = None,
  ):
    """Loads a classifier.

    Args:
      name: what `hf.load_classifier` takes.
      dtype: of the computation, "float32" or "bfloat16".
      transform: "raw", the logit itself; "sigmoid" of it; and for classifiers
        with several labels "softmax:<label>", "sigmoid:<label>" or
        "raw:<label>", with the name of a label or its place, from 0.
      template: text with {prompt} and {response} in it; or "pair", for
        encoders: the two as the text pair of the tokenizer.
      max_length: longest text in tokens, special ones included.
      batch_size: texts per call, which the devices of `mesh` share evenly.
      mesh: from `meshes.make`; None: one device.

    Raises:
      ValueError: if there is no such classifier or label, or a setting does
        not fit it; the message names what would do.
    """
    if batch_size < 1:
      raise ValueError(f"batch_size must be positive, got {batch_size}.")
    if template != "pair" and "{response}" not in template:
      raise ValueError(
        'template must be "pair" or a text with {response} and usually '
        f"{{prompt}} in it, got {template!r}."
      )
    self._mesh = meshes.make("data:1") if mesh is None else mesh
    meshes.check_divisible(batch_size, self._mesh, "batch_size")
    loaded = hf.load_classifier(name, dtype=dtype)
    self.labels = loaded.labels
    self._transform, self._label = _parse(transform, loaded.labels, name)
    self._is_causal = isinstance(loaded.model, classifier.CausalClassifier)
    self._tokenizer = loaded.tokenizer
    self._template = template
    self._max_length = max_length
    self._batch_size = batch_size
    self._has_types = False
    if self._is_causal:
      if template == "pair":
        raise ValueError(
          f'template="pair" needs an encoder such as BERT, and {name} is a '
          "causal classifier; write a text with {prompt} and {response}."
        )
      tokens.require_tokens(loaded.tokenizer, eos=True)
      backbone = loaded.model.config.backbone
      self._ends = end_tokens.stop_ids(loaded.tokenizer, backbone.eos_token_id)
      num_special = 1
    else:
      backend = getattr(loaded.tokenizer, "backend_tokenizer", None)
      if backend is None:
        raise ValueError(f"{name} has no fast tokenizer (tokenizer.json).")
      # Its file may ask for both, to lengths of its own.
      backend.no_truncation()
      backend.no_padding()
      num_special = backend.num_special_tokens_to_add(template == "pair")
      self._has_types = loaded.model.config.type_vocab_size > 1
    positions = loaded.model.config.max_positions
    if not num_special < max_length <= positions:
      raise ValueError(
        f"max_length must be above the {num_special} special tokens and at "
        f"most the {positions} positions of {name}, got {max_length}."
      )

    config = loaded.model.config
    settings = {
      "config": config.to_hf(),
      "dtype": dtype,
      "label": self._label,
      "max_length": max_length,
      "template": template,
      "tokenizer": _tokenizer_text(loaded.tokenizer),
      "transform": self._transform,
    }
    as_bytes = json.dumps(settings, sort_keys=True, default=str).encode()
    self.fingerprint = checkpoint.fingerprint(
      {
        "params": loaded.params,
        "settings": np.frombuffer(as_bytes, np.uint8),
      }
    )
    rules = hf.partition_rules(loaded.model, self._mesh)
    self._params = meshes.place(
      loaded.params, meshes.shardings(loaded.params, rules, self._mesh)
    )
    apply = loaded.model.apply
    self._program = compiled.Compiled(
      "reward model", lambda params, batch: apply({"params": params}, **batch)
    )

  def score_batch(
    self, prompts: Sequence[str], responses: Sequence[str]
  ) -> tuple[np.ndarray, list[dict[str, float]]]:
    """Scores responses to prompts.

    Args:
      prompts: N texts.
      responses: N texts.

    Returns:
      `[N]` float32 scores, and N dicts with the "logit", or with
      "logit_<label>" for each of several labels.

    Raises:
      ValueError: if there are not as many prompts as responses, or a text
        makes no tokens.
    """
    if len(prompts) != len(responses):
      raise ValueError(
        f"There are {len(prompts)} prompts, but {len(responses)} responses."
      )
    encode = self._encode_causal if self._is_causal else self._encode
    rows, num_cut = [], 0
    for prompt, response in zip(prompts, responses, strict=True):
      ids, types, is_cut = encode(prompt, response)
      if not ids:
        raise ValueError(
          f"The prompt {prompt[-60:]!r} and the response {response[:60]!r} "
          "make no tokens."
        )
      rows.append((ids, types))
      num_cut += is_cut
    if num_cut:
      logging.warning(
        "%d of %d texts were cut on the left to %d tokens for the reward "
        "model.",
        num_cut,
        len(rows),
        self._max_length,
      )

    logits = np.zeros((len(rows), len(self.labels)), np.float32)
    groups = {}
    for i, (ids, _) in enumerate(rows):
      groups.setdefault(self._padded_length(len(ids)), []).append(i)
    for length, indices in sorted(groups.items()):
      batch = self._batch([rows[i] for i in indices], length)
      logits[indices] = meshes.map_batches(
        self._logits, batch, self._batch_size, self._mesh
      )
    names = ["logit"]
    if len(self.labels) > 1:
      names = [f"logit_{label}" for label in self.labels]
    parts = [dict(zip(names, map(float, row), strict=True)) for row in logits]
    return self._scores(logits), parts

  def _logits(self, batch):
    logits = self._program(self._params, batch)
    return meshes.replicate(logits, self._mesh)  # For every process to read.

  def _padded_length(self, length: int) -> int:
    bucket = batches.bucket_length(max(length, _SHORTEST))
    return min(bucket, self._max_length)

  def _batch(self, rows, length: int) -> dict[str, np.ndarray]:
    """The arguments of the model, `[N, length]` each."""
    ids, types = zip(*rows, strict=True)
    pad_id = vocabularies.pad_id(self._tokenizer)
    ids, mask = batches.pad_right(ids, length=length, pad_id=pad_id)
    batch = {"ids": ids, "mask": mask}
    if self._has_types:
      batch["token_type_ids"], _ = batches.pad_right(types, length=length)
    return batch

  def _scores(self, logits: np.ndarray) -> np.ndarray:
    """`[N, L]` logits to `[N]` scores."""
    logits = logits.astype(np.float64)
    chosen = logits[:, self._label]
    if self._transform == "sigmoid":
      chosen = np.exp(-np.logaddexp(0, -chosen))
    elif self._transform == "softmax":
      chosen = np.exp(chosen - np.logaddexp.reduce(logits, axis=1))
    return chosen.astype(np.float32)

  def _text(self, prompt: str, response: str) -> str:
    # In one pass: a prompt that speaks of {response} is left alone.
    texts = {"prompt": prompt, "response": response}
    return _FIELDS.sub(lambda field: texts[field[1]], self._template)

  def _encode_causal(self, prompt: str, response: str):
    """Ids, no types, and whether they were cut."""
    text, tokenizer = self._text(prompt, response), self._tokenizer
    has_start = bool(tokenizer.bos_token) and text.startswith(
      tokenizer.bos_token
    )
    ids = tokenizer(text, add_special_tokens=not has_start, verbose=False)
    ids = list(ids["input_ids"])
    end = tokenizer.eos_token_id
    while ids and ids[-1] in self._ends:
      end = ids.pop()  # Tokenizers, chat templates and texts put it there.
    room = self._max_length - 1
    is_cut = len(ids) > room
    ids = tokens.cut_prompt(tokenizer, ids, room)
    return [*ids, end], None, is_cut

  def _encode(self, prompt: str, response: str):
    """Ids, token types, and whether they were cut, for an encoder."""
    backend = self._tokenizer.backend_tokenizer
    is_pair = self._template == "pair"
    texts = [self._text(prompt, response)]
    if is_pair:
      texts = [prompt, response]
    pieces = [backend.encode(text, add_special_tokens=False) for text in texts]
    room = self._max_length - backend.num_special_tokens_to_add(is_pair)
    is_cut = sum(map(len, pieces)) > room
    if is_cut:
      # The last piece, the response, gets its room first.
      for piece in reversed(pieces):
        piece.truncate(room, direction="left")
        room -= len(piece)
    found = backend.post_process(*pieces, add_special_tokens=True)
    return found.ids, found.type_ids, is_cut


def _parse(transform: str, labels: Sequence[str], name: str) -> tuple[str, int]:
  """The kind of a transform, and which logit it is of."""
  kind, colon, label = transform.partition(":")
  has = f"{name} has the labels {', '.join(labels)}"
  if kind not in _TRANSFORMS:
    raise ValueError(
      "transform must be raw or sigmoid, or softmax:, sigmoid: or raw: with a "
      f'label behind it, got "{transform}"; {has}.'
    )
  if kind == "softmax" and len(labels) == 1:
    raise ValueError(
      f'transform="{transform}" would be 1 for every text: {has} alone; '
      "use sigmoid or raw."
    )
  if not colon:
    if len(labels) > 1 or kind == "softmax":
      raise ValueError(
        f'transform="{transform}" does not say of which label: {has}; write '
        f'"{kind}:{labels[-1]}", say.'
      )
    return kind, 0
  if label in labels:
    return kind, list(labels).index(label)
  if label.isdecimal() and int(label) < len(labels):
    return kind, int(label)
  raise ValueError(f'transform="{transform}" names no label: {has}.')


def _tokenizer_text(tokenizer: Any) -> str:
  """All that decides the ids of a text, as text."""
  backend = getattr(tokenizer, "backend_tokenizer", None)
  if backend is None:
    return repr(sorted(tokenizer.get_vocab().items()))
  content = json.loads(backend.to_str())
  # Set anew by every call, not by the tokenizer.
  content.pop("truncation", None)
  content.pop("padding", None)
  special = (tokenizer.bos_token_id, tokenizer.eos_token_id)
  return json.dumps(
    [content, special, vocabularies.pad_id(tokenizer)], sort_keys=True
  )
