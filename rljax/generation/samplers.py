"""Samplers: prompts as ids in, responses as texts out, compiled once.

`Sampler` draws the responses that a script learns from, with its settings,
limits and constraint.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rljax.distributed import compiled, meshes
from rljax.generation import (
  ahead,
  grammars,
  responders,
  responses,
  rollouts,
  slots,
  stops,
)
from rljax.ops import sampling
from rljax.text import (
  prompts as prompts_lib,
)
from rljax.text import (
  vocabularies,
)


class Sampler:
  """Draws responses to batches of prompts while a policy is trained.

  It compiles once. A response depends on the key, on the prompt's place in the
  batch and on the number of the sample, and not on the mesh.

  Attributes:
    settings: see `responses.Settings`.
    allowed: `[V]` bool, the tokens that may be drawn: no other special tokens,
      no unused rows of the vocabulary.
    stop_ids: token ids that end a response.
    program: the compiled sampler.
  """

  def __init__(
    self,
    model: Any,
    tokenizer: Any,
    settings: responses.Settings,
    *,
    mesh: Any,
    task: Any = None,
  ):
    """Prepares the sampler.

    Args:
      model: the policy's module.
      tokenizer: its tokenizer.
      settings: how responses are drawn.
      mesh: from `meshes.make`.
      task: a module with the grammar that responses follow, where the settings
        ask for it.

    Raises:
      ValueError: if the task has no grammar, or the tokenizer lacks its words.
    """
    vocab_size = model.config.vocab_size
    distribution = settings.distribution
    self.settings = settings
    ends = self._ends = stops.ends(
      model,
      tokenizer,
      stop_at_eos=settings.stop_at_eos,
      stop_tokens=settings.stop_tokens,
      stop_strings=settings.stop_strings,
    )
    self.stop_ids, self.allowed = ends.ids, jnp.asarray(ends.allowed)
    self._model, self._tokenizer, self._mesh = model, tokenizer, mesh
    self._task, self._grammar = task, None
    if settings.constraint == "grammar":
      grammar = grammars.of_task(task, tokenizer, vocab_size, self.stop_ids)
      self._grammar = meshes.replicate(grammar, mesh)
    on_mesh = slots.on_mesh(settings.slots, mesh)

    def sample(key, params, tables, ids, mask, lengths, indices, places):
      within = None
      if tables is not None:
        within = grammars.Constraint(tables, *places)
      return rollouts.sample(
        key,
        model,
        params,
        ids,
        mask,
        prompt_indices=indices,
        length_buckets=settings.length_buckets,
        max_length=settings.max_length,
        settings=distribution,
        num_samples=settings.num_samples,
        allowed=self.allowed,
        stop_ids=ends.ids,
        stop_strings=ends.table,
        min_new_tokens=settings.min_new_tokens,
        lengths=lengths,
        constraint=within,
        pad_id=vocabularies.pad_id(tokenizer),
        **on_mesh.options,
      )

    self.program = compiled.Compiled("sample", on_mesh.split(sample, 3))

  @property
  def has_constraint(self) -> bool:
    """Whether the tokens that may be drawn differ from place to place."""
    return self._grammar is not None

  @property
  def compilations(self) -> list[dict[str, Any]]:
    """Of the program; see `compiled.Compiled`."""
    return self.program.compilations

  def freeze(self) -> None:
    """Makes another compilation an error."""
    self.program.freeze()

  def draw(
    self,
    key: jax.Array,
    params: Any,
    prompts: prompts_lib.Prompts,
    rows: np.ndarray,
    *,
    step: int,
    number: int = 0,
    part: slice | None = None,
  ) -> responses.Samples:
    """Draws responses to some of the prompts.

    Args:
      key: typed key of the step.
      params: of the policy, on the mesh.
      prompts: from `text.prompts.load`.
      rows: `[B]` int, which of them.
      step: rollouts that the policy has learnt from; decides the limits of
        length, where they differ.
      number: of the draw, if a step has several, for the same.
      part: of the rows, which is drawn alone, as it would be among all; None:
        all.

    Returns:
      B * num_samples responses; row b * num_samples + j is sample j of b.
    """
    ends, num_samples = self._ends, self.settings.num_samples
    place = (step, 1, number) if number else (step, 1)
    lengths = self.settings.lengths(len(rows) * num_samples, *place)
    indices = np.arange(len(rows), dtype=np.int32)
    if part is not None:
      lengths = lengths.reshape(len(rows), -1)[part].ravel()
      indices, rows = indices[part], rows[part]
    ids, mask, lengths, indices = meshes.shard_batch(
      (prompts.ids[rows], prompts.mask[rows], lengths, indices), self._mesh
    )
    texts = [prompts.texts[i] for i in rows]
    within = self._constraint(texts)
    tables, places = self._grammar, None
    if within is not None:
      places = meshes.shard_batch((within.start, within.seconds), self._mesh)
    rollout = self.program(
      key, params, tables, ids, mask, lengths, indices, places
    )
    return responses.Samples(
      rollout=rollout,
      prompts=[text for text in texts for _ in range(num_samples)],
      texts=responses.read(
        self._tokenizer, rollout, ends.strings, ends.ids, ends.pieces
      ),
      settings=self.settings,
      policy_step=step,
      tokenizer=self._tokenizer,
    )

  def draw_scored(
    self,
    *inputs: Any,
    score: Callable[..., Any],
    at_once: int = 0,
    **options: Any,
  ) -> responses.Samples:
    """Draws responses to some of the prompts, and scores them.

    Args:
      *inputs: of `draw`.
      score: of `Samples.scored`.
      at_once: prompts that are drawn at the same time, a divisor of B, while
        the responses to those before are scored; 0: all.
      **options: of `draw`.

    Returns:
      The samples, the same to the bit for every `at_once` if a score does not
      depend on the responses to other prompts.
    """
    *_, rows = inputs
    if at_once in (0, len(rows)):
      return self.draw(*inputs, **options).scored(score)
    parts = (
      self.draw(*inputs, part=slice(i, i + at_once), **options)
      for i in range(0, len(rows), at_once)
    )
    return responses.Samples.concatenate(
      [samples.scored(score) for samples in ahead.items(parts)]
    )

  def responder(
    self, prompts: prompts_lib.Prompts, *, batch_size: int, **options: Any
  ) -> responders.Responder:
    """Makes a responder that draws as the sampler does, for these prompts.

    Args:
      prompts: which it answers.
      batch_size: prompts at the same time.
      **options: of `responders.Responder`, in place of what the settings say.
    """
    settings = self.settings
    return responders.Responder(
      self._model,
      self._tokenizer,
      prompts.encoded,
      batch_size=batch_size,
      mesh=self._mesh,
      texts=prompts.texts,
      **{
        "max_length": settings.max_length,
        "min_new_tokens": settings.min_new_tokens,
        "max_lengths": settings.lengths(len(prompts.texts), 0, 2),
        "settings": settings.distribution,
        "num_samples": settings.num_samples,
        "seed": settings.seed,
        "slots": settings.slots,
        "length_buckets": settings.length_buckets,
        "stop_at_eos": settings.stop_at_eos,
        "stop_strings": settings.stop_strings,
        "stop_tokens": settings.stop_tokens,
        "constraint": self._constraint(prompts.texts),
        "unfinished_score": settings.unfinished_score,
        **options,
      },
    )

  def greedy(
    self, prompts: prompts_lib.Prompts, *, batch_size: int, **options: Any
  ) -> responders.Responder:
    """Makes a responder that answers prompts greedily, within the same limits.

    Args:
      prompts: which it answers.
      batch_size: prompts at the same time.
      **options: of `responders.Responder`, in place of what the settings say.
    """
    return self.responder(
      prompts,
      batch_size=batch_size,
      settings=sampling.Settings(greedy=True),
      num_samples=1,
      **options,
    )

  def _constraint(self, texts):
    """What the responses to prompts must follow; None without a grammar."""
    if self._grammar is None:
      return None
    places = self._task.places(
      texts, self._tokenizer, self._model.config.vocab_size
    )
    return grammars.constraint(self._grammar, **places)
