"""Token rewards that are sums of named terms.

  score               what the task says of a response, on its last token
  reward_model        what a reward model says of it, likewise
  steps               something for every step that matches the reference
  dense_reward_model  by how much a step changes what an outcome model expects

A step is a line. It ends with the token that holds its line feed, or with the
last token of the response.

Source:
  Havrilla et al. (2024), "Teaching Large Language Models to Reason with
  Reinforcement Learning". The scale of the step rewards and their limit, and
  the outcome model as a potential, are our choice.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from rljax.distributed import compiled, meshes, processes
from rljax.generation import responses, rollouts
from rljax.models import classifier, hf
from rljax.ops import masking, rewards
from rljax.scoring import scorers
from rljax.text import (
  tokens,
  vocabularies,
)

Array = chex.Array

TERMS = ("score", "reward_model", "steps", "dense_reward_model")
# What an outcome model expects before the first step.
INITIAL_POTENTIAL = 0.5


def step_rewards(
  step_matches: Sequence[Sequence[bool]],
  line_feeds: np.ndarray,
  *,
  reward: float,
  limit: float,
) -> np.ndarray:
  """What the steps of each response earn, in the order of their end tokens.

    R_i = min(a M_i, b) - min(a M_{i-1}, b),   M_i = number of matches up to i

  Lines that one token ends, which has several line feeds, are one step.

  Args:
    step_matches: N lists, with a truth value for each line of a response.
    line_feeds: `[N, T]` int, line feeds in each token; 0 where masked.
    reward: a, of a step that matches.
    limit: b, the most that a response earns.

  Returns:
    `[N, T + 1]` float32, for `rewards.place_step_rewards`; the steps are the
    tokens with a line feed, and what follows the last of them.
  """
  num_rows, length = line_feeds.shape
  earned = np.zeros((num_rows, length + 1), np.float32)
  for row, matches, feeds in zip(earned, step_matches, line_feeds, strict=True):
    so_far = np.minimum(reward * np.cumsum([0, *matches]), limit)
    ended = np.cumsum(feeds[feeds > 0])  # Lines, by the end of each step.
    lines = np.arange(len(matches))
    np.add.at(row, np.searchsorted(ended, lines, "right"), np.diff(so_far))
  return earned


def token_rewards(
  earned: Mapping[str, Array],
  step_ends: Array,
  mask: Array,
  *,
  counts: Array | None = None,
  step_coef: float = 1.0,
) -> dict[str, Array]:
  """Places what responses have earned on their tokens, term by term.

  Args:
    earned: by term: "score" and "reward_model", `[N]` each; "steps",
      `[N, S]`, in the order of their ends; and "dense_reward_model",
      `[N, T]`, the probability that the text up to and with token t leads to
      a right answer.
    step_ends: `[N, T]` bool, True on tokens that end a step.
    mask: `[N, T]` bool, True on response tokens.
    counts: `[N]` bool, rows that earn anything but their score; None: all.
    step_coef: c of `rewards.potential_rewards`.

  Returns:
    By term: `[N, T]` float32, 0 where masked. The rewards are their sum.

  Raises:
    ValueError: if there is no such term.
  """
  placed = {}
  for name, array in earned.items():
    if name in ("score", "reward_model"):
      placed[name] = rewards.place_score(array, mask)
    elif name == "steps":
      placed[name] = rewards.place_step_rewards(array, step_ends, mask)
    elif name == "dense_reward_model":
      placed[name] = rewards.potential_rewards(
        array, step_ends, mask, initial=INITIAL_POTENTIAL, scale=step_coef
      )
    else:
      raise ValueError(
        f"There is no reward term {name!r}; there are {', '.join(TERMS)}."
      )
    if counts is not None and name != "score":
      placed[name] = jnp.where(counts[:, None], placed[name], 0.0)
  return placed


class Terms:
  """The reward terms of a run: what responses earn, and on which tokens."""

  def __init__(
    self,
    names: Sequence[str],
    *,
    step_reward: float,
    step_reward_limit: float,
    step_coef: float,
    unfinished_earns: bool,
    line_feeds: np.ndarray,
    model_score: Any = None,
    expect: compiled.Compiled | None = None,
    expect_params: Any = None,
    mesh: Any = None,
  ):
    """See `load`, which makes the parts."""
    self._names = tuple(names)
    self._step_reward, self._step_reward_limit = step_reward, step_reward_limit
    self._step_coef = step_coef
    self._unfinished_earns = unfinished_earns
    self._line_feeds = line_feeds
    self._model_score = model_score
    self._expect, self._expect_params = expect, expect_params
    self._mesh = mesh

  @property
  def compilations(self) -> list[dict[str, Any]]:
    """Of the program that reads an outcome model; see `compiled.Compiled`."""
    return self._expect.compilations if self._expect else []

  def freeze(self) -> None:
    """Makes another compilation an error."""
    if self._expect:
      self._expect.freeze()

  def check(self, score: scorers.Scorer, prompt: str) -> None:
    """Scores an empty response, so that bad options show at once.

    Raises:
      ValueError: if the task cannot score it, or says too little for a term.
    """
    _, parts = score([prompt], [""])
    if "steps" in self._names and "step_matches" not in parts[0]:
      raise ValueError(
        "--reward_terms=steps needs a score whose parts say step_matches, line "
        "by line, such as that of merge_sums; the parts of this one are "
        f"{', '.join(parts[0]) or 'none'}."
      )

  def earn(self, samples: responses.Samples) -> dict[str, Array]:
    """Returns what each term needs of the responses, on the devices.

    Args:
      samples: N scored responses.
    """
    earned: dict[str, Any] = {}
    rollout = samples.rollout
    for name in self._names:
      if name == "score":
        earned[name] = samples.scores
      elif name == "steps":
        ids, mask = processes.gather(
          (rollout.response_ids, rollout.response_mask)
        )
        earned[name] = step_rewards(
          [part["step_matches"] for part in samples.parts],
          np.where(mask, self._line_feeds[ids], 0),
          reward=self._step_reward,
          limit=self._step_reward_limit,
        )
      elif name == "reward_model":
        earned[name], _ = self._model_score(samples.prompts, samples.texts)
      else:
        earned[name] = self._expect(self._expect_params, rollout)
    return meshes.shard_batch(earned, self._mesh)

  def place(
    self, earned: Mapping[str, Array], rollout: rollouts.Rollout
  ) -> tuple[Array, dict[str, Array]]:
    """Adds the terms up, token by token; for use under jit.

    Args:
      earned: from `earn`; a score is NaN where a response has none.
      rollout: N rows. One without a token that counts is left out.

    Returns:
      `[N, T]` float32, and metrics over the responses: "reward/mean" and
      "reward/std" of the score, or of the sum where the score is no term;
      "reward/total", the sum of the terms; "reward/<term>" for each other one.
    """
    by_term = token_rewards(
      # Where nothing scores a response, its tokens earn nothing.
      {k: jnp.nan_to_num(x) if k == "score" else x for k, x in earned.items()},
      jnp.asarray(self._line_feeds > 0)[rollout.response_ids],
      rollout.response_mask,
      counts=None if self._unfinished_earns else rollout.finished,
      step_coef=self._step_coef,
    )
    placed = functools.reduce(jnp.add, by_term.values())
    counts = rollout.response_mask.any(axis=1)
    totals = placed.sum(axis=1)
    outcomes = earned.get("score", jnp.where(counts, totals, jnp.nan))
    metrics = {
      "reward/mean": jnp.nanmean(outcomes),
      "reward/std": jnp.nanstd(outcomes),
      "reward/total": masking.masked_mean(totals, counts),
    }
    for name, term in by_term.items():
      if name != "score":
        metrics[f"reward/{name}"] = masking.masked_mean(
          term.sum(axis=1), counts
        )
    return placed, metrics


def load(
  loaded: hf.LanguageModel,
  *,
  names: Sequence[str],
  mesh: Any,
  batch_size: int,
  map_rows: Callable[[Any, Any], Any] = lambda function, batch: function(batch),
  dtype: str = "float32",
  step_reward: float = 0.1,
  step_reward_limit: float = 0.5,
  step_coef: float = 1.0,
  unfinished_earns: bool = True,
  reward_model: str = "",
  model_score: scorers.Scorer | None = None,
  **reward_options: Any,
) -> Terms:
  """Loads what the terms need: a reward model, or the line feeds of tokens.

  Args:
    loaded: the policy with its tokenizer.
    names: of the terms, some of `TERMS`.
    mesh: from `meshes.make`.
    batch_size: texts at the same time, for a reward model of texts.
    map_rows: calls a function of rows for one part of a rollout after another,
      such as `training.microbatch.map_rows`; for an outcome model of tokens.
    dtype: of the outcome model's computation.
    step_reward: what a line that matches the reference earns.
    step_reward_limit: the most that a response earns so.
    step_coef: scale of the term dense_reward_model.
    unfinished_earns: whether a response without an end earns more than its
      score.
    reward_model: a classifier, for the terms that have one.
    model_score: its scorer, where it scores the responses already; None: it
      is loaded.
    **reward_options: of `reward_models.RewardModel`.

  Raises:
    ValueError: if a name is unknown or given twice, or the terms and the
      reward model do not fit each other.
  """
  names = list(names)
  if not names or sorted(names) != sorted(set(names) & set(TERMS)):
    raise ValueError(
      f"--reward_terms must be some of {', '.join(TERMS)}, each once, got "
      f"{','.join(names) or 'none'}."
    )
  uses_model = {"reward_model", "dense_reward_model"} & set(names)
  if bool(uses_model) != bool(reward_model):
    raise ValueError(
      "--reward_model and the terms reward_model and dense_reward_model of "
      f"--reward_terms need each other, got {reward_model or 'none'} and "
      f"{','.join(names)}."
    )
  vocab_size = loaded.model.config.vocab_size
  line_feeds = np.zeros(vocab_size, np.int32)  # In each token.
  if {"steps", "dense_reward_model"} & set(names):
    token_bytes = vocabularies.token_bytes(
      loaded.tokenizer, vocab_size=vocab_size
    )
    line_feeds[:] = [piece.count(b"\n") for piece in token_bytes]
  more = {}
  if "reward_model" in names:
    more["model_score"] = model_score or scorers.scorer(
      "",
      {},
      reward_model,
      batch_size=batch_size,
      mesh=mesh,
      **reward_options,
    )
  if "dense_reward_model" in names:
    outcome = _outcome_model(reward_model, loaded, dtype)
    rules = hf.partition_rules(outcome.model, mesh)
    more["expect_params"] = meshes.place(
      outcome.params, meshes.shardings(outcome.params, rules, mesh)
    )

    def expect(params, rollout):
      length = rollout.prompt_ids.shape[1] + rollout.response_ids.shape[1]
      tokens.check_positions(length, outcome.model.config.max_positions)

      # The model has one label, "right": this is its probability.
      def one(part):
        logits = rollouts.prefix_logits(outcome.model, params, part)
        return jax.nn.sigmoid(logits[:, :, 0])

      return map_rows(one, rollout)

    more["expect"] = compiled.Compiled("expect", expect)
  return Terms(
    names,
    step_reward=step_reward,
    step_reward_limit=step_reward_limit,
    step_coef=step_coef,
    unfinished_earns=unfinished_earns,
    line_feeds=line_feeds,
    mesh=mesh,
    **more,
  )


def _outcome_model(name: str, policy: hf.LanguageModel, dtype: str) -> Any:
  """Loads a reward model that reads the policy's own tokens."""
  loaded = hf.load_classifier(name, dtype=dtype)
  if not isinstance(loaded.model, classifier.CausalClassifier):
    raise ValueError(
      "--reward_terms=dense_reward_model needs a causal classifier, which sees "
      f"no later tokens; --reward_model={name} is of the type "
      f"{type(loaded.model).__name__}."
    )
  if len(loaded.labels) != 1:
    raise ValueError(
      "--reward_terms=dense_reward_model needs a classifier with one label; "
      f"--reward_model={name} has {', '.join(loaded.labels)}."
    )
  if loaded.tokenizer.get_vocab() != policy.tokenizer.get_vocab():
    raise ValueError(
      "--reward_terms=dense_reward_model reads the policy's own tokens, but "
      f"--reward_model={name} has another vocabulary than "
      f"--policy={policy.source}; --reward_terms=reward_model reads texts."
    )
  return loaded
