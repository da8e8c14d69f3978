"""Responses of a policy to a fixed set of prompts, as texts."""

import functools
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rljax.distributed import compiled, meshes, processes
from rljax.generation import decode, rollouts
from rljax.ops import sampling
from rljax.text import batches as batches_lib
from rljax.text import files, tokens


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
  texts = tokens.decode(
    tokenizer,
    *processes.gather((rollout.response_ids, rollout.response_mask)),
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


class Responder:
  """Answers the same prompts again and again while a policy is trained.

  It compiles once. A response does not depend on the batch that it is drawn
  in, nor on the mesh.

  Attributes:
    num_prompts: N.
    num_samples: K.
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
    num_samples: int = 1,
    forced: np.ndarray | None = None,
    forced_as: int | None = None,
    max_lengths: Sequence[int] | None = None,
    constraint: Any = None,
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
      num_samples: K, responses to each prompt. They share its keys and values.
      forced: `[V + 1]` int, tokens that must follow others; see
        `generation.sample`.
      forced_as: the token that stands for them in the texts; None: they are
        left out, for the policy did not choose them.
      max_lengths: N limits of the responses to each prompt, `max_length` at
        most.
      constraint: `grammars.Constraint` of N rows, or None; see
        `generation.sample`.

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
    stop_ids = tokens.stop_ids(tokenizer) if stop_at_eos else ()
    allowed = tokens.allowed_tokens(tokenizer, vocab_size, stop_ids)
    stop_table = None
    if stop_strings:
      stop_table = decode.stop_table(
        stop_strings, tokens.token_bytes(tokenizer, vocab_size=vocab_size)
      )

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
        num_samples=num_samples,
        lengths=jnp.repeat(batch["lengths"], num_samples),
        forced=forced,
        constraint=within,
        split_cache=meshes.cache_splitter(mesh),
        pad_id=tokens.pad_id(tokenizer),
      )

      # Nobody reads it: it need not leave the devices.
      return rollout.replace(allowed=None)

    self.num_prompts, self.num_samples = len(ids), num_samples
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
    self._stop_strings = tuple(stop_strings)
    self._batch_size, self._mesh = batch_size, mesh

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
      texts = read(self._tokenizer, rollout, self._stop_strings)
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


def judge(
  responder: Responder,
  params: Any,
  prompts: Sequence[str],
  score: Callable[..., tuple[np.ndarray, list[dict[str, Any]]]],
) -> tuple[np.ndarray, list[dict[str, Any]]]:
  """Scores one response to each prompt; one without an end is never right.

  Args:
    responder: for N prompts, one response to each.
    params: parameters of the policy.
    prompts: N texts, which are scored.
    score: `(prompts, responses) -> (scores, parts)`.

  Returns:
    `[N]` float32 scores and N dicts of what they are made of.
  """
  _, _, scores, parts = _judged(responder, params, prompts, score)
  return scores, parts


def answers(
  responder: Responder,
  params: Any,
  prompts: Sequence[str],
  score: Callable[..., tuple[np.ndarray, list[dict[str, Any]]]],
) -> list[dict[str, Any]]:
  """The same as rows for `samples.jsonl`; see `judge` and `records`.

  Returns:
    N rows of `records`, with `finished`.
  """
  texts, finished, scores, parts = _judged(responder, params, prompts, score)
  return [
    row | {"finished": bool(is_finished)}
    for row, is_finished in zip(
      records(prompts, texts, scores, parts), finished, strict=True
    )
  ]


def _judged(responder, params, prompts, score):
  """One response to each prompt: texts, finished, scores and parts."""
  _, texts, finished = zip(*responder.batches(params), strict=True)
  texts = [text for batch in texts for text in batch]
  finished = np.concatenate(finished)
  scores, parts = score(list(prompts), texts)
  return (
    texts,
    finished,
    *unfinished_are_wrong(scores, parts, finished),
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

  Every batch is on disk before the next is drawn. If the file is there
  already, from a call that was stopped, the prompts that it answers in full
  are not asked again; the outcome is the same. A response that ran out of
  length is never right.

  Args:
    path: the file, of JSON lines.
    responder: for N prompts, K responses to each.
    params: parameters of the policy; those of the call that was stopped.
    prompts: N texts, which are scored.
    score: `(prompts, responses) -> (scores, parts)`.
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
  rows = processes.from_first(lambda: _rows_so_far(path))
  for number, row in enumerate(rows):
    index, sample = divmod(number, num_samples)
    expected = (index, sample, *prompts[index : index + 1])
    if (row.get("index"), row.get("sample"), row.get("prompt")) != expected:
      raise ValueError(
        f"{path} holds samples of other prompts, from row {number + 1} on; "
        "delete it or choose another workdir."
      )
  first = len(rows) // num_samples
  if len(rows) % num_samples:
    rows = rows[: first * num_samples]
    processes.from_first(functools.partial(files.write_jsonl, path, rows))
  for indices, texts, finished in responder.batches(
    params, first=first, draw=draw
  ):
    asked = [prompts[i] for i in indices for _ in range(num_samples)]
    scores, parts = score(asked, texts)
    scores, parts = unfinished_are_wrong(scores, parts, finished)
    batch = [
      {"index": indices[0] + i // num_samples, "sample": i % num_samples}
      | row
      | {"finished": bool(finished[i])}
      for i, row in enumerate(records(asked, texts, scores, parts))
    ]
    # All wait for it: the file is whole for everybody when this returns.
    processes.from_first(functools.partial(files.append_jsonl, path, batch))
    rows += batch
    progress(indices[-1] + 1, batch)
  return rows


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


def _rows_so_far(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
  """Rows of a file that may be absent, or lack the end of its last line."""
  if not os.path.exists(path):
    return []
  files.append_jsonl(path, [])  # Cuts off what a killed writer left behind.
  return files.read_jsonl(path) if os.path.getsize(path) else []
