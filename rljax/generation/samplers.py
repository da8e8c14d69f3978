"""Samplers: prompts as ids in, responses as texts out, compiled once.

`Sampler` draws the responses that a script learns from, with its settings,
limits and constraint. `Responder` answers the same prompts again and again
while a policy is trained. `collect` draws into a file, and goes on with it
after a kill.
"""

import dataclasses
import functools
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from rljax.distributed import compiled, meshes, planning, processes
from rljax.generation import ahead, answered, decode, grammars, rollouts
from rljax.ops import sampling
from rljax.text import asked, files, tokens
from rljax.text import batches as batches_lib
from rljax.text import prompts as prompts_lib


def read(
  tokenizer: Any,
  rollout: rollouts.Rollout,
  stop_strings: Sequence[str] = (),
  stop_ids: Sequence[int] = (),
  pieces: Sequence[bytes] = (),
) -> list[str]:
  """The responses of a rollout as texts, without the strings that ended them.

  Responses with a probability that is no number, which a policy with NaN in its
  parameters gives, are counted in a warning.

  Args:
    tokenizer: Hugging Face tokenizer.
    rollout: N rows.
    stop_strings: texts that end a response: it is cut in front of the one that
      begins first, among the bytes by which the sampler found it.
    stop_ids: tokens that end a response, and are no part of its text, even
      where they are no special tokens.
    pieces: of `tokens.token_bytes`, if they are at hand.

  Returns:
    N texts, each as it stands behind its prompt.
  """
  ids, mask, prompt_ids, prompt_mask, log_probs = processes.gather(
    (
      *(rollout.response_ids, rollout.response_mask),
      *(rollout.prompt_ids, rollout.prompt_mask, rollout.log_probs),
    )
  )
  num_nan = int((np.isnan(log_probs) & mask).any(axis=1).sum())
  if num_nan:
    logging.warning(
      "%d of %d responses were drawn from logits that are not finite: check "
      "the parameters of the policy.",
      num_nan,
      len(mask),
    )
  mask = mask & ~np.isin(ids, stop_ids)
  behind = tokens.has_text(tokenizer, prompt_ids, prompt_mask)
  texts = tokens.decode(tokenizer, ids, mask, behind=behind)
  if not stop_strings:
    return texts
  pieces = pieces or tokens.token_bytes(tokenizer)
  stops = [stop.encode("utf-8") for stop in stop_strings]
  for n, text in enumerate(texts):
    written = b"".join(
      pieces[token] for token in ids[n][mask[n]] if token < len(pieces)
    )
    places = [place for stop in stops if (place := written.find(stop)) >= 0]
    if places:
      cut = written[: min(places)].decode("utf-8", errors="replace")
      # A tokenizer may take a blank off the front, which the bytes have.
      is_stripped = cut.startswith(" ") and not text.startswith(" ")
      texts[n] = cut[1:] if is_stripped else cut
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
    N dicts with `prompt` as the data have it, `response`, `reward` (None
    without a score) and `parts`, and the columns that prompts remember.
  """
  return [
    {
      "prompt": asked.given(prompt),
      "response": reply,
      "reward": None if np.isnan(score) else float(score),
      "parts": part,
    }
    | asked.kept_columns(prompt)
    for prompt, reply, score, part in zip(
      prompts, replies, scores, parts, strict=True
    )
  ]


def known(scores: Any) -> np.ndarray:
  """Returns the scores of responses that have one; NaN if none has."""
  scores = np.asarray(scores, np.float32)
  found = scores[~np.isnan(scores)]
  return found if len(found) else np.full(1, np.nan, np.float32)


def unfinished_are_wrong(
  scores: Sequence[float],
  parts: Sequence[Mapping[str, Any]],
  finished: Sequence[bool],
) -> tuple[np.ndarray, list[dict[str, Any]]]:
  """Takes back what responses earned that ran out of length.

  Such a response is never right, even if an answer stands in it: its score is
  0, it is not correct, and it has no answer to vote with.

  Args:
    scores: N numbers.
    parts: N dicts.
    finished: N truth values, False where a response was cut.

  Returns:
    `[N]` float32 scores and N dicts.
  """
  judged = []
  for part, is_finished in zip(parts, finished, strict=True):
    judged.append(dict(part))
    if not is_finished:
      for name in ("is_correct", "is_valid"):
        if name in part:
          judged[-1][name] = False
      if "answer" in part:
        judged[-1]["answer"] = None
  scores = np.asarray(scores, np.float32)
  return np.where(np.asarray(finished, bool), scores, np.float32(0)), judged


class Settings(NamedTuple):
  """How responses are drawn, and where they end.

  Attributes:
    max_length: tokens of a response at most, its end token included.
    min_new_tokens: tokens of a response before its end token may be drawn.
    min_length: 0, or each response has a limit of its own, drawn from here to
      `max_length`.
    num_samples: responses to each prompt.
    temperature: divides the logits; of sampler and trainer.
    top_k: keeps the k likeliest tokens; 0 keeps all.
    top_p: keeps the likeliest tokens of this total probability; 1 keeps all.
    min_p: keeps tokens of at least this share of the largest probability.
    greedy: whether the likeliest token is taken.
    stop_at_eos: whether the end token ends a response; else it is never drawn.
    stop_strings: texts that end a response, and are cut off it.
    stop_tokens: further tokens that end a response, as texts or ids; see
      `tokens.named_ids`.
    constraint: "grammar", to keep responses within the task's, or "none".
    mask_unfinished: whether nothing is learnt from a response that ran out of
      length.
    unfinished_score: score of a response that ran out of length, which is then
      never right; None: it is scored as any other.
    seed: of the limits of length.
  """

  max_length: int
  min_new_tokens: int = 0
  min_length: int = 0
  num_samples: int = 1
  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  min_p: float = 0.0
  greedy: bool = False
  stop_at_eos: bool = True
  stop_strings: tuple[str, ...] = ()
  stop_tokens: tuple[str, ...] = ()
  constraint: str = "none"
  unfinished_score: float | None = None
  mask_unfinished: bool = False
  seed: int = 0

  @property
  def distribution(self) -> sampling.Settings:
    """What `ops.sampling` takes; if it is greedy, the rest has no say."""
    if self.greedy:
      return sampling.Settings(greedy=True)
    return sampling.Settings(
      temperature=self.temperature,
      top_k=self.top_k,
      top_p=self.top_p,
      min_p=self.min_p,
    )

  def lengths(self, num_responses: int, *place: int) -> np.ndarray:
    """Draws the limits of responses; `place` tells draws of a seed apart.

    Returns:
      `[num_responses]` int32.
    """
    return np.random.default_rng([self.seed, *place]).integers(
      self.min_length or self.max_length,
      self.max_length,
      num_responses,
      np.int32,
      endpoint=True,
    )


@dataclasses.dataclass(frozen=True)
class Samples:
  """Responses with what is known of them; N rows, on the host but `rollout`.

  Attributes:
    rollout: arrays, `[N, ...]`.
    prompts: N texts.
    texts: N responses, without the strings that ended them.
    scores: `[N]` float32, once scored; NaN where a response has no score.
    parts: N dicts of what the scores are made of.
    settings: of the sampler.
    policy_step: rollouts that the policy had learnt from.
    tokenizer: of the policy.
  """

  rollout: rollouts.Rollout
  prompts: list[str]
  texts: list[str]
  settings: Settings
  policy_step: int
  tokenizer: Any
  scores: np.ndarray | None = None
  parts: list[dict[str, Any]] | None = None

  @property
  def learnt_scores(self) -> np.ndarray:
    """The scores, NaN also where nothing is to be learnt from a response."""
    if not self.settings.mask_unfinished:
      return self.scores
    finished = processes.gather(self.rollout.finished)
    return np.where(finished, self.scores, np.float32(np.nan))

  @property
  def learnt(self) -> rollouts.Rollout:
    """The rollout that is learnt from.

    A response that is left out, for it has no score or has no end where the
    settings ask for one, has no token that counts.
    """
    counts = ~np.isnan(self.learnt_scores)
    mask = self.rollout.response_mask
    if not counts.all():
      library = np if isinstance(mask, np.ndarray) else jnp
      mask = library.where(counts[:, None], mask, False)
    return self.rollout.replace(response_mask=mask)

  def scored(self, score: Callable[..., Any]) -> "Samples":
    """Returns the samples with their scores; see `score_responses`."""
    finished = processes.gather(self.rollout.finished)
    scores, parts = score_responses(
      score,
      self.prompts,
      self.texts,
      finished,
      unfinished=self.settings.unfinished_score,
    )
    return dataclasses.replace(self, scores=scores, parts=parts)

  def take(self, rows: Sequence[int]) -> "Samples":
    """Returns some rows, with the rollout on the host."""
    pick = lambda column: column and [column[i] for i in rows]
    rollout = processes.gather(self.rollout)
    return dataclasses.replace(
      self,
      rollout=jax.tree.map(lambda x: x[rows], rollout),
      prompts=pick(self.prompts),
      texts=pick(self.texts),
      scores=None if self.scores is None else self.scores[rows],
      parts=pick(self.parts),
    )

  @staticmethod
  def concatenate(several: Sequence["Samples"]) -> "Samples":
    """Joins scored samples of one sampler, with the rollout on the host."""
    joined = lambda name: [x for s in several for x in getattr(s, name)]
    return dataclasses.replace(
      several[0],
      rollout=jax.tree.map(
        lambda *x: np.concatenate(x),
        *(processes.gather(s.rollout) for s in several),
      ),
      prompts=joined("prompts"),
      texts=joined("texts"),
      scores=np.concatenate([s.scores for s in several]),
      parts=joined("parts"),
    )

  def records(self) -> list[dict[str, Any]]:
    """Returns rows for a jsonl file, which offline scripts read.

    Returns:
      N dicts with `prompt`, `response`, `reward`, `parts`, the ids and
      log-probabilities of the response, and the sampler's settings.
    """
    names = (
      *("response_ids", "response_mask", "finished"),
      *("log_probs", "truncated_log_probs"),
    )
    host = processes.gather(
      {name: getattr(self.rollout, name) for name in names}
    )
    rows = records(self.prompts, self.texts, self.scores, self.parts)
    settings = {
      name: getattr(self.settings, name)
      for name in ("temperature", "top_k", "top_p", "min_p")
    }
    for i, row in enumerate(rows):
      mask = host["response_mask"][i]
      for name in ("response_ids", "log_probs", "truncated_log_probs"):
        row[name] = host[name][i][mask].tolist()
      row["finished"] = bool(host["finished"][i])
      row |= settings | {"policy_step": self.policy_step}
    return rows


def ends(
  model: Any, tokenizer: Any, stop_at_eos: bool, stop_tokens: Sequence[str] = ()
) -> tuple[tuple[int, ...], np.ndarray]:
  """Returns the tokens that end a response, and those that may be drawn.

  Args:
    model: the policy's module, whose config names end tokens of its own.
    tokenizer: its tokenizer.
    stop_at_eos: whether the end tokens of model and tokenizer end a response;
      else they are never drawn.
    stop_tokens: further ones, which do in any case; see `tokens.named_ids`.

  Returns:
    The ids, and `[V]` bool.

  Raises:
    ValueError: if there is no end token though it is asked for, or one of
      `stop_tokens` is none of the tokenizer's.
  """
  own = getattr(model.config, "eos_token_id", None)
  more = tokens.named_ids(tokenizer, stop_tokens)
  if stop_at_eos:
    stop_ids, never = tokens.stop_ids(tokenizer, own, more), ()
  else:
    stop_ids, never = more, () if own is None else own
  allowed = tokens.allowed_tokens(tokenizer, model.config.vocab_size, stop_ids)
  never = [never] if isinstance(never, int) else list(never)
  allowed[[id_ for id_ in never if id_ not in stop_ids]] = False
  return stop_ids, allowed


class Sampler:
  """Draws responses to batches of prompts while a policy is trained.

  It compiles once. A response depends on the key, on the prompt's place in the
  batch and on the number of the sample, and not on the mesh.

  Attributes:
    settings: see `Settings`.
    allowed: `[V]` bool, the tokens that may be drawn: no other special tokens,
      no unused rows of the vocabulary.
    stop_ids: token ids that end a response.
    program: the compiled sampler.
  """

  def __init__(
    self,
    model: Any,
    tokenizer: Any,
    settings: Settings,
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
    self.stop_ids, allowed = ends(
      model, tokenizer, settings.stop_at_eos, settings.stop_tokens
    )
    self.allowed = jnp.asarray(allowed)
    self._model, self._tokenizer, self._mesh = model, tokenizer, mesh
    self._task, self._grammar, self._pieces = task, None, ()
    if settings.constraint == "grammar":
      grammar = grammars.of_task(task, tokenizer, vocab_size, self.stop_ids)
      self._grammar = meshes.replicate(grammar, mesh)
    stop_table = None
    if settings.stop_strings:
      self._pieces = tokens.token_bytes(tokenizer, vocab_size=vocab_size)
      stop_table = decode.stop_table(settings.stop_strings, self._pieces)

    def sample(key, params, ids, mask, lengths, within):
      return rollouts.sample(
        key,
        model,
        params,
        ids,
        mask,
        max_length=settings.max_length,
        settings=distribution,
        num_samples=settings.num_samples,
        allowed=self.allowed,
        stop_ids=self.stop_ids,
        stop_strings=stop_table,
        min_new_tokens=settings.min_new_tokens,
        lengths=lengths,
        constraint=within,
        split_cache=meshes.cache_splitter(mesh),
        split_logits=meshes.logits_splitter(mesh),
        pad_id=tokens.pad_id(tokenizer),
      )

    self.program = compiled.Compiled("sample", sample)

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
  ) -> Samples:
    """Draws responses to some of the prompts.

    Args:
      key: typed key of the step.
      params: of the policy, on the mesh.
      prompts: from `text.prompts.load`.
      rows: `[B]` int, which of them.
      step: rollouts that the policy has learnt from; decides the limits of
        length, where they differ.
      number: of the draw, if a step has several, for the same.

    Returns:
      B * num_samples responses; row b * num_samples + j is sample j of b.
    """
    num_samples = self.settings.num_samples
    place = (step, 1, number) if number else (step, 1)
    lengths = self.settings.lengths(len(rows) * num_samples, *place)
    ids, mask, lengths = meshes.shard_batch(
      (prompts.ids[rows], prompts.mask[rows], lengths), self._mesh
    )
    texts = [prompts.texts[i] for i in rows]
    within = self._constraint(texts)
    if within is not None:
      within = within._replace(
        start=meshes.shard_batch(within.start, self._mesh),
        seconds=meshes.shard_batch(within.seconds, self._mesh),
      )
    rollout = self.program(key, params, ids, mask, lengths, within)
    return Samples(
      rollout=rollout,
      prompts=[text for text in texts for _ in range(num_samples)],
      texts=read(
        self._tokenizer,
        rollout,
        self.settings.stop_strings,
        self.stop_ids,
        self._pieces,
      ),
      settings=self.settings,
      policy_step=step,
      tokenizer=self._tokenizer,
    )

  def responder(
    self, prompts: prompts_lib.Prompts, *, batch_size: int, **options: Any
  ) -> "Responder":
    """Makes a responder that draws as the sampler does, for these prompts.

    Args:
      prompts: which it answers.
      batch_size: prompts at the same time.
      **options: of `Responder`, in place of what the settings say.
    """
    settings = self.settings
    return Responder(
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
  ) -> "Responder":
    """Makes a responder that answers prompts greedily, within the same limits.

    Args:
      prompts: which it answers.
      batch_size: prompts at the same time.
      **options: of `Responder`, in place of what the settings say.
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


def score_responses(
  score: Callable[..., Any],
  prompts: Sequence[str],
  texts: Sequence[str],
  finished: np.ndarray,
  *,
  unfinished: float | None = None,
) -> tuple[np.ndarray, list[dict[str, Any]]]:
  """Scores responses, with a score of their own for those without an end.

  Args:
    score: `(prompts, responses) -> (scores, parts)`.
    prompts: N texts.
    texts: N responses.
    finished: `[N]` bool, False where a response ran out of length.
    unfinished: score of those, which are then never right; None: they are
      scored as any other.

  Returns:
    `[N]` float32 scores and N dicts.
  """
  scores, parts = score(list(prompts), list(texts))
  if unfinished is not None:
    _, parts = unfinished_are_wrong(scores, parts, finished)
    scores = np.where(finished, scores, np.float32(unfinished))
  return scores, parts


class Responder:
  """Answers the same prompts again and again while a policy is trained.

  It compiles once. A response does not depend on the batch that it is drawn
  in, nor on the mesh.

  Attributes:
    num_prompts: N.
    num_samples: K.
    texts: the prompts as they are scored, or None.
    unfinished_score: of an answer without an end; None: as any other.
    has_forced: whether tokens are forced.
    program: the compiled sampler, a `compiled.Compiled`.
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
    min_new_tokens: int = 0,
    stop_tokens: Sequence[str] = (),
    num_samples: int = 1,
    forced: np.ndarray | None = None,
    forced_as: int | None = None,
    max_lengths: Sequence[int] | None = None,
    constraint: Any = None,
    texts: Sequence[str] | None = None,
    unfinished_score: float | None = 0.0,
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
      min_new_tokens: tokens before the end token may be drawn.
      stop_tokens: further tokens that end a response, as texts or ids.
      num_samples: K, responses to each prompt. They share its keys and values.
      forced: `[V + 1]` int, tokens that must follow others; see
        `generation.sample`.
      forced_as: the token that stands for them in the texts; None: they are
        left out, for the policy did not choose them.
      max_lengths: N limits of the responses to each prompt, `max_length` at
        most.
      constraint: `grammars.Constraint` of N rows, or None; see
        `generation.sample`.
      texts: N prompts as they are scored, or None.
      unfinished_score: of an answer that ran out of length, which is then never
        right; None: it is scored as any other.

    Raises:
      ValueError: if prompts and responses are longer than the context, or the
        batch does not fit the mesh.
    """
    meshes.check_divisible(batch_size, mesh, "batch_size")
    ids, mask = batches_lib.pad_left(prompt_ids)
    tokens.check_positions(
      ids.shape[1] + max_length, model.config.max_positions
    )
    vocab_size = model.config.vocab_size
    stop_ids, allowed = ends(model, tokenizer, stop_at_eos, stop_tokens)
    stop_table, self._pieces = None, ()
    if stop_strings:
      self._pieces = tokens.token_bytes(tokenizer, vocab_size=vocab_size)
      stop_table = decode.stop_table(stop_strings, self._pieces)

    def sample(key, params, batch):
      within = None
      if constraint is not None:
        within = constraint._replace(
          start=batch["start"], seconds=batch["seconds"]
        )
      rollout = rollouts.sample(
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
        min_new_tokens=min_new_tokens,
        num_samples=num_samples,
        lengths=jnp.repeat(batch["lengths"], num_samples),
        forced=forced,
        constraint=within,
        split_cache=meshes.cache_splitter(mesh),
        split_logits=meshes.logits_splitter(mesh),
        pad_id=tokens.pad_id(tokenizer),
      )

      # Nobody reads it: it need not leave the devices.
      return rollout.replace(allowed=None)

    self.num_prompts, self.num_samples = len(ids), num_samples
    self.texts, self.unfinished_score = texts, unfinished_score
    self.has_forced = forced is not None
    self.program = compiled.Compiled("respond", sample)
    self._arrays = {
      "ids": ids,
      "mask": mask,
      "indices": np.arange(len(ids), dtype=np.int32),
      "lengths": np.full(len(ids), max_length, np.int32)
      if max_lengths is None
      else np.minimum(np.asarray(max_lengths, np.int32), max_length),
    }
    if constraint is not None:
      self._arrays["start"] = constraint.start
      self._arrays["seconds"] = constraint.seconds
    self._key = jax.random.key(seed)
    self._tokenizer = tokenizer
    self._forced, self._forced_as = forced, forced_as
    self._stop_strings, self._stop_ids = tuple(stop_strings), stop_ids
    self._batch_size, self._mesh = batch_size, mesh

  def freeze(self) -> None:
    """Makes another compilation an error."""
    self.program.freeze()

  def __call__(self, params: Any) -> list[str]:
    """The responses of the policy with these parameters.

    Returns:
      N K texts; that of sample j to prompt i is number i K + j.
    """
    return [text for _, texts, _ in self.batches(params) for text in texts]

  def batches(
    self, params: Any, *, first: int = 0, draw: int | None = None
  ) -> Iterator[tuple[range, list[str], np.ndarray]]:
    """The same batch by batch, to be written down before the next is drawn.

    Args:
      params: parameters of the policy.
      first: prompts that are not asked again. What the others are answered
        does not depend on it.
      draw: number of a further set of samples, or None for the first.

    Yields:
      Indices of n prompts, n K texts, and `[n K]` bool: which of them the
      policy ended itself, rather than that they ran out of length.
    """
    key = self._key if draw is None else jax.random.fold_in(self._key, draw)
    for start in range(first, self.num_prompts, self._batch_size):
      end = min(start + self._batch_size, self.num_prompts)
      # The last batch is filled up, with prompts whose answers are cut off.
      rows = np.arange(start, start + self._batch_size) % self.num_prompts
      batch = jax.tree.map(lambda x, rows=rows: x[rows], self._arrays)
      rollout = self.program(key, params, meshes.shard_batch(batch, self._mesh))
      num_rows = (end - start) * self.num_samples
      rollout = processes.gather(rollout)
      rollout = jax.tree.map(lambda x, n=num_rows: x[:n], rollout)
      if self._forced is not None:
        rollout = self._without_forced(rollout)
      texts = read(
        self._tokenizer,
        rollout,
        self._stop_strings,
        self._stop_ids,
        self._pieces,
      )
      yield range(start, end), texts, rollout.finished

  def _without_forced(self, rollout: rollouts.Rollout) -> rollouts.Rollout:
    """The same with other tokens, or none, where the policy had no choice."""
    ids = rollout.response_ids
    last = np.roll(ids, 1, axis=1)
    last[:, 0] = len(self._forced) - 1  # What comes before the first token.
    is_forced = self._forced[last] >= 0
    if self._forced_as is not None:
      return rollout.replace(
        response_ids=np.where(is_forced, self._forced_as, ids)
      )
    return rollout.replace(response_mask=rollout.response_mask & ~is_forced)


class Progress:
  """Prints how far a call of `collect` has come, every few seconds at most."""

  def __init__(self, name: str, num_prompts: int, seconds: float = 5.0):
    """Takes the name of what is drawn, and how many prompts there are."""
    self._name, self._num_prompts = name, num_prompts
    self._seconds, self._next = seconds, 0.0

  def __call__(self, done: int, rows: Sequence[dict[str, Any]]) -> None:
    """Says that `done` prompts are answered, the last of them by `rows`."""
    if not processes.is_first():
      return
    if time.monotonic() < self._next and done < self._num_prompts:
      return
    self._next = time.monotonic() + self._seconds
    text = f"{self._name}: {done} of {self._num_prompts} prompts"
    if all("is_correct" in row["parts"] for row in rows):
      right = np.mean([bool(row["parts"]["is_correct"]) for row in rows])
      text += f", {right:.0%} of the last right"
    print(text, flush=True)


def collect(
  path: str | os.PathLike[str],
  responder: Responder,
  params: Any,
  prompts: Sequence[str],
  score: Callable[..., tuple[np.ndarray, list[dict[str, Any]]]],
  *,
  draw: int | None = None,
  progress: Callable[[int, list[dict[str, Any]]], None] = lambda n, rows: None,
) -> list[dict[str, Any]]:
  """Draws and scores the responses to all prompts, into a file.

  The next batch is drawn while one is scored. Every batch is on disk before the
  next is scored, and so is what was scored of a batch before its scorer failed.
  If the file is there already, from a call that was stopped, the prompts that
  it answers in full are not asked again; the outcome is the same. A response
  that ran out of length is never right.

  Args:
    path: the file, of JSON lines.
    responder: for N prompts, K responses to each.
    params: parameters of the policy; those of the call that was stopped.
    prompts: N texts, which are scored.
    score: `(prompts, responses) -> (scores, parts)`; with an attribute
      `source`, as `scoring.scorers` gives it, if it scores each by itself.
    draw: see `Responder.batches`.
    progress: called after each batch with the number of prompts that are
      answered, and the batch's rows.

  Returns:
    N K rows of `records` with `index` and `sample`, in this order, and
    `finished`.

  Raises:
    ValueError: if the file holds rows of other prompts or another K.
  """
  num_samples = responder.num_samples
  if responder.num_prompts != len(prompts):
    raise ValueError(
      f"The responder has {responder.num_prompts} prompts, and {len(prompts)} "
      "texts were given."
    )
  rows = processes.from_first(lambda: answered.so_far(path))
  for number, row in enumerate(rows):
    index, sample = divmod(number, num_samples)
    expected = (index, sample, *map(asked.given, prompts[index : index + 1]))
    if (row.get("index"), row.get("sample"), row.get("prompt")) != expected:
      raise ValueError(
        f"{path} holds samples of other prompts, from row {number + 1} on; "
        "delete it or choose another workdir."
      )
    row["prompt"] = prompts[index]
  first = len(rows) // num_samples
  rows, left = rows[: first * num_samples], rows[first * num_samples :]
  drawn = ahead.items(responder.batches(params, first=first, draw=draw))
  for indices, texts, finished in drawn:
    repeated = [prompts[i] for i in indices for _ in range(num_samples)]
    # Of a prompt that was not answered in full, what is there was scored; it
    # counts where each response is scored by itself.
    is_same = [row["response"] for row in left] == texts[: len(left)]
    is_alone = isinstance(getattr(score, "source", None), str)
    known = left if is_same and is_alone else []
    rows_of = functools.partial(
      *(_scored_rows, repeated, texts, finished),
      place=(indices[0], num_samples, len(known)),
    )
    try:
      scores, parts = score(repeated[len(known) :], texts[len(known) :])
    except Exception as error:
      if done := getattr(error, "done", None):
        batch = known + rows_of(*zip(*done, strict=True))
        answered.keep(path, rows + max(batch, left, key=len), error)
      raise
    batch = known + rows_of(scores, parts)
    # All wait for it: the file is whole for everybody when this returns.
    write = functools.partial(files.append_jsonl, path, batch)
    if left:
      write = functools.partial(files.write_jsonl, path, rows + batch)
    processes.from_first(write)
    for row, prompt in zip(batch, repeated, strict=True):
      row["prompt"] = prompt  # With what it remembers.
    rows, left = rows + batch, []
    progress(indices[-1] + 1, batch)
  return rows


def _scored_rows(asked, texts, finished, scores, parts, *, place):
  """Rows of a batch, from a place on and as far as they are scored."""
  first, num_samples, start = place
  some = slice(start, start + len(scores))
  scores, parts = unfinished_are_wrong(scores, parts, finished[some])
  if planning.current():  # Some must be right for what comes behind them.
    parts = [
      {k: k == "is_correct" and i % 2 == 0 or v for k, v in part.items()}
      for i, part in enumerate(parts)
    ]
  return [
    {"index": first + i // num_samples, "sample": i % num_samples}
    | row
    | {"finished": bool(finished[i])}
    for i, row in enumerate(
      records(asked[some], texts[some], scores, parts), start
    )
  ]


_FORCED = "forced.json"


def save_forced(
  workdir: str | os.PathLike[str],
  forced: np.ndarray,
  forced_as: int | None = None,
) -> None:
  """Files which tokens a policy is to be sampled with.

  Of several processes, the first one does.

  Args:
    workdir: of the policy.
    forced: `[V + 1]` int, see `generation.sample`.
    forced_as: the token that stands for them in texts, or None.
  """
  if not processes.is_first():
    return
  after = {str(i): int(forced[i]) for i in np.flatnonzero(forced[:-1] >= 0)}
  files.write_jsonl(
    os.path.join(workdir, _FORCED),
    [
      {
        "vocab_size": len(forced) - 1,
        "first": int(forced[-1]),
        "after": after,
        "shown_as": forced_as,
      }
    ],
  )


def load_forced(name: str | os.PathLike[str]) -> dict[str, Any]:
  """The tokens that a policy is to be sampled with, if there are any.

  Args:
    name: of the policy, in any form that a flag --policy takes.

  Returns:
    `forced` and `forced_as` for a `Responder`; nothing where there are none.
  """
  path = os.path.join(name, _FORCED)
  if not os.path.isfile(path):
    return {}
  (found,) = files.read_jsonl(path)
  forced = np.full(found["vocab_size"] + 1, -1, np.int32)
  forced[-1] = found["first"]
  for token, following in found["after"].items():
    forced[int(token)] = following
  return {"forced": forced, "forced_as": found["shown_as"]}
