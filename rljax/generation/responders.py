"""Responders: answers to the same prompts while a policy is trained.

`Responder` answers the same prompts again and again. `collect` draws into a
file, and goes on with it after a kill.
"""

import functools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rljax.distributed import compiled, meshes, planning, processes
from rljax.generation import ahead, answered, responses, rollouts, stops
from rljax.generation import slots as slots_lib
from rljax.ops import sampling
from rljax.text import (
  asked,
  files,
  tokens,
  vocabularies,
)
from rljax.text import batches as batches_lib


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
    slots: int = 0,
    length_buckets: int = 1,
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
        `decode.sample`.
      forced_as: the token that stands for them in the texts; None: they are
        left out, for the policy did not choose them.
      max_lengths: N limits of the responses to each prompt, `max_length` at
        most.
      constraint: `grammars.Constraint` of N rows, or None; see
        `decode.sample`.
      texts: N prompts as they are scored, or None.
      unfinished_score: of an answer that ran out of length, which is then never
        right; None: it is scored as any other.
      slots: rows that are decoded at the same time, see `generation.slots`; 0:
        all of a batch.
      length_buckets: widths at which prompts are read, see `rollouts.sample`.

    Raises:
      ValueError: if prompts and responses are longer than the context, or batch
        or slots do not fit the mesh.
    """
    meshes.check_divisible(batch_size, mesh, "batch_size")
    ids, mask = batches_lib.pad_left(prompt_ids)
    tokens.check_positions(
      ids.shape[1] + max_length, model.config.max_positions
    )
    ends = self._ends = stops.ends(
      model,
      tokenizer,
      stop_at_eos=stop_at_eos,
      stop_tokens=stop_tokens,
      stop_strings=stop_strings,
    )
    on_mesh = slots_lib.on_mesh(slots, mesh)

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
        allowed=jnp.asarray(ends.allowed),
        stop_ids=ends.ids,
        stop_strings=ends.table,
        min_new_tokens=min_new_tokens,
        num_samples=num_samples,
        lengths=jnp.repeat(batch["lengths"], num_samples),
        forced=forced,
        constraint=within,
        pad_id=vocabularies.pad_id(tokenizer),
        length_buckets=length_buckets,
        **on_mesh.options,
      )

      # Nobody reads it: it need not leave the devices.
      return rollout.replace(allowed=None)

    self.num_prompts, self.num_samples = len(ids), num_samples
    self.texts, self.unfinished_score = texts, unfinished_score
    self.has_forced = forced is not None
    self.program = compiled.Compiled("respond", on_mesh.split(sample, 2))
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
      if planning.current():
        rollout = _stand_in(rollout, start * self.num_samples)
      if self._forced is not None:
        rollout = self._without_forced(rollout)
      ends = self._ends
      texts = responses.read(
        self._tokenizer, rollout, ends.strings, ends.ids, ends.pieces
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


def _stand_in(rollout: rollouts.Rollout, first: int) -> rollouts.Rollout:
  """Puts answers into a plan's rollout, which has drawn none.

  An answer repeats the tokens of its prompt, which any tokenizer can read back,
  up to a length of its own. The lengths go from 1 to the longest and begin
  again: the samples of a prompt differ, and whatever limit there is behind
  them, some just keep it.

  Args:
    rollout: n rows, on the host.
    first: number of its first row among all.
  """
  ids, mask = np.asarray(rollout.prompt_ids), np.asarray(rollout.prompt_mask)
  rows, length = rollout.response_mask.shape
  lengths = 1 + np.arange(first, first + rows) % length
  return rollout.replace(
    response_ids=np.stack(
      [
        np.resize(row[real], length)
        for row, real in zip(ids, mask, strict=True)
      ]
    ),
    response_mask=np.arange(length) < lengths[:, None],
  )


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
    N K rows of `responses.records` with `index` and `sample`, in this order,
    and `finished`.

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
  scores, parts = responses.unfinished_are_wrong(scores, parts, finished[some])
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
      responses.records(asked[some], texts[some], scores, parts), start
    )
  ]
