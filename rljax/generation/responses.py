"""Responses: how they are drawn, what they say, and what they earned."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from rljax.distributed import processes
from rljax.generation import rollouts
from rljax.ops import sampling
from rljax.text import (
  asked,
  tokens,
  vocabularies,
)


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
      `end_tokens.named_ids`.
    constraint: "grammar", to keep responses within the task's, or "none".
    mask_unfinished: whether nothing is learnt from a response that ran out of
      length.
    unfinished_score: score of a response that ran out of length, which is then
      never right; None: it is scored as any other.
    seed: of the limits of length.
    slots: rows that are decoded at the same time, see `generation.slots`; 0:
      all of them.
    length_buckets: widths at which prompts are read, see `rollouts.sample`.
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
  slots: int = 0
  length_buckets: int = 1

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
    pieces: of `vocabularies.token_bytes`, if they are at hand.

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
  behind = vocabularies.has_text(tokenizer, prompt_ids, prompt_mask)
  texts = tokens.decode(tokenizer, ids, mask, behind=behind)
  if not stop_strings:
    return texts
  pieces = pieces or vocabularies.token_bytes(tokenizer)
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
