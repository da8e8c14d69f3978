"""Values of the beginnings of responses: how often completions are right."""

import collections
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rljax.generation import responders, samplers
from rljax.text import batches, steps, tokens
from rljax.text import prompts as prompts_lib

Pair = tuple[str, str]


def values(
  folder: str | os.PathLike[str],
  sampler: samplers.Sampler,
  params: Any,
  pairs: Sequence[Pair],
  encoded: tuple[Sequence[Sequence[int]], Sequence[int]],
  score: Callable[..., tuple[np.ndarray, list[dict[str, Any]]]],
  *,
  num_samples: int,
  batch_size: int,
  progress: Callable[[str, int], Callable[..., None]],
) -> tuple[dict[Pair, float], int]:
  """Estimates the values of prefixes from completions of them.

    V(x, p) = mean over K completions c of [p c is right and ended]

  Prefixes are completed in groups of one padded length, each of which has
  random numbers of its own, and the completions of one share its keys and
  values. Completions are on disk, in `<folder>/<length>.jsonl`, before the next
  batch is drawn: a call that was stopped goes on.

  Args:
    folder: of the completions.
    sampler: of the policy; a prefix and its completion have `max_length` tokens
      of its settings at most.
    params: of the policy.
    pairs: N different (prompt, prefix).
    encoded: of `prompts.encode_prefixes`, for the N.
    score: `(prompts, responses) -> (scores, parts)`, of whole responses.
    num_samples: K.
    batch_size: prefixes at the same time.
    progress: makes what `responders.collect` calls after a batch, from a name
      and a number of prefixes.

  Returns:
    V of every pair, and how many completions there are.
  """
  groups = collections.defaultdict(list)
  for pair, ids, num_tokens in zip(pairs, *encoded, strict=True):
    room = max(1, sampler.settings.max_length - num_tokens)
    groups[batches.bucket_length(len(ids))].append((pair, ids, room))
  found, num_drawn = {}, 0
  for length, group in sorted(groups.items()):
    asked, ids, room = zip(*group, strict=True)
    parts = {prompt + prefix: (prompt, prefix) for prompt, prefix in asked}

    def score_whole(texts, completions, parts=parts):
      prompts, prefixes = zip(*(parts[text] for text in texts), strict=True)
      whole = [p + c for p, c in zip(prefixes, completions, strict=True)]
      return score(prompts, whole)

    rows = responders.collect(
      os.path.join(folder, f"{length}.jsonl"),
      sampler.responder(
        prompts_lib.Prompts(list(parts), list(ids), *batches.pad_left(ids)),
        batch_size=batch_size,
        num_samples=num_samples,
        max_length=max(room),
        max_lengths=room,
      ),
      params,
      list(parts),
      score_whole,
      draw=length,
      progress=progress(f"completions, {length} tokens", len(group)),
    )
    num_drawn += len(rows)
    is_right = np.reshape(
      [steps.is_kept(row) for row in rows], (-1, num_samples)
    )
    found |= zip(asked, is_right.mean(axis=1).tolist(), strict=True)
  return found, num_drawn


def check_positions(
  prompt_length: int, max_length: int, max_positions: int
) -> None:
  """Checks beforehand that no prefix can be too long for its completion.

  Args:
    prompt_length: tokens of the longest prompt.
    max_length: most tokens of a response.
    max_positions: of the model.

  Raises:
    ValueError: if a padded prefix and what may follow take more positions.
  """
  shortest = {}  # Padded length -> tokens of the shortest prefix with it.
  for num_tokens in range(max_length):
    padded = batches.bucket_length(prompt_length + num_tokens)
    shortest.setdefault(padded, num_tokens)
  tokens.check_positions(
    max(padded + max_length - n for padded, n in shortest.items()),
    max_positions,
  )
