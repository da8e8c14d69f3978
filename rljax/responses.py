"""Responses of a policy to a fixed set of prompts, as texts."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rljax import data, generation, meshes, preflight, sampling
from rljax import rollout as rollouts


def read(
  tokenizer: Any, rollout: rollouts.Rollout, stop_strings: Sequence[str] = ()
) -> list[str]:
  """The responses of a rollout as texts, without the strings that ended them.

  Args:
    tokenizer: Hugging Face tokenizer.
    rollout: N rows.
    stop_strings: texts that end a response: it is cut in front of the first.

  Returns:
    N texts.
  """
  texts = data.decode(
    tokenizer,
    np.asarray(rollout.response_ids),
    np.asarray(rollout.response_mask),
  )
  for stop in stop_strings:
    texts = [text.split(stop)[0] for text in texts]
  return texts


def records(
  prompts: Sequence[str],
  replies: Sequence[str],
  scores: Sequence[float],
  parts: Sequence[dict[str, Any]],
) -> list[dict[str, Any]]:
  """Rows for `samples.jsonl`: what was asked, answered and scored.

  Args:
    prompts: N texts.
    replies: N texts.
    scores: N numbers.
    parts: N dicts, what the score is made of.

  Returns:
    N dicts with `prompt`, `response`, `reward` and `parts`.
  """
  return [
    {"prompt": prompt, "response": reply, "reward": float(score), "parts": part}
    for prompt, reply, score, part in zip(
      prompts, replies, scores, parts, strict=True
    )
  ]


class Responder:
  """Answers the same prompts again and again while a policy is trained.

  It compiles once. A response does not depend on the batch that it is drawn
  in, nor on the mesh.

  Attributes:
    num_prompts: N.
    program: the compiled sampler, a `preflight.Compiled`.
  """

  def __init__(
    self,
    model: Any,
    tokenizer: Any,
    prompt_ids: Sequence[Sequence[int]],
    *,
    max_length: int,
    settings: sampling.Settings,
    batch_size: int,
    mesh: Any,
    seed: int = 0,
    stop_at_eos: bool = True,
    stop_strings: Sequence[str] = (),
  ):
    """Pads the prompts and prepares the sampler.

    Args:
      model: a model with its parameters left out.
      tokenizer: its tokenizer.
      prompt_ids: N prompts.
      max_length: tokens of a response, the end token included.
      settings: of the sampler.
      batch_size: prompts at the same time.
      mesh: from `meshes.make`.
      seed: of the samples; unused where they are greedy.
      stop_at_eos: whether the end token ends a response; else it is never
        drawn.
      stop_strings: texts that end a response, and are cut off it.

    Raises:
      ValueError: if prompts and responses are longer than the context, or the
        batch does not fit the mesh.
    """
    meshes.check_divisible(batch_size, mesh, "batch_size")
    ids, mask = data.pad_left(prompt_ids)
    data.check_positions(ids.shape[1] + max_length, model.config.max_positions)
    vocab_size = model.config.vocab_size
    stop_ids = data.stop_ids(tokenizer) if stop_at_eos else ()
    allowed = data.allowed_tokens(tokenizer, vocab_size, stop_ids)
    stop_table = None
    if stop_strings:
      stop_table = generation.stop_table(
        stop_strings, data.token_bytes(tokenizer, vocab_size=vocab_size)
      )

    def sample(key, params, batch):
      return rollouts.sample(
        key,
        model,
        params,
        batch["ids"],
        batch["mask"],
        max_length=max_length,
        settings=settings,
        prompt_indices=batch["indices"],
        allowed=jnp.asarray(allowed),
        stop_ids=stop_ids,
        stop_strings=stop_table,
        pad_id=data.pad_id(tokenizer),
      )

    self.num_prompts = len(ids)
    self.program = preflight.Compiled("respond", sample)
    self._arrays = {
      "ids": ids,
      "mask": mask,
      "indices": np.arange(len(ids), dtype=np.int32),
    }
    self._key = jax.random.key(seed)
    self._tokenizer = tokenizer
    self._stop_strings = tuple(stop_strings)
    self._batch_size, self._mesh = batch_size, mesh

  def __call__(self, params: Any) -> list[str]:
    """The responses of the policy with these parameters, N texts."""
    rollout = meshes.map_batches(
      lambda batch: self.program(self._key, params, batch),
      self._arrays,
      self._batch_size,
      self._mesh,
    )
    return read(self._tokenizer, rollout, self._stop_strings)
