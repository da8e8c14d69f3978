"""Rollouts: prompts, responses and the statistics of their tokens."""

import functools
from collections.abc import Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp

from rljax.distributed import activations
from rljax.generation import decode, packed
from rljax.models import language_models
from rljax.ops import lengths, log_probs, masking, sampling

Array = chex.Array
Batch = Mapping[str, Array]


@chex.dataclass(frozen=True)
class Rollout:
  """Holds prompts with one response each; N rows.

  Attributes:
    prompt_ids: `[N, P]` int32, left-padded.
    prompt_mask: `[N, P]` bool.
    response_ids: `[N, T]` int32, right-padded.
    response_mask: `[N, T]` bool, True up to and including the end token.
    log_probs: `[N, T]` float32, under the policy that drew the tokens, with
      its temperature and allowed tokens; 0 where masked.
    truncated_log_probs: `[N, T]` float32, the same after top-k, top-p and
      min-p.
    finished: `[N]` bool, True where a stop id or stop string ended the row.
    allowed: `[N, T, V]` bool, the tokens that each was drawn from, where that
      differs from row to row; else None.
  """

  prompt_ids: Array
  prompt_mask: Array
  response_ids: Array
  response_mask: Array
  log_probs: Array
  truncated_log_probs: Array
  finished: Array
  allowed: Array | None = None


def sample(
  key: Array,
  model: Any,
  params: Any,
  prompt_ids: Array,
  prompt_mask: Array,
  *,
  max_length: int,
  settings: sampling.Settings,
  num_samples: int = 1,
  length_buckets: int = 1,
  **options: Any,
) -> Rollout:
  """Draws `num_samples` responses to each prompt, with their prompts.

  Args:
    key: typed key of the step.
    model: module with `prefill`, `decode` and `logits`.
    params: its parameters.
    prompt_ids: `[B, P]` int32, left-padded.
    prompt_mask: `[B, P]` bool.
    max_length: T.
    settings: temperature and truncation.
    num_samples: responses per prompt.
    length_buckets: widths at which prompts may be read, see `ops.lengths`: the
      least that holds the longest of the batch. Each is compiled.
    **options: see `decode.sample`.

  Returns:
    A `Rollout` of `N = B * num_samples` rows; row `b * num_samples + j` is
    sample j of prompt b.
  """
  draw = functools.partial(
    decode.sample,
    max_length=max_length,
    settings=settings,
    num_samples=num_samples,
    **options,
  )
  widths = lengths.widths(prompt_ids.shape[1], length_buckets)
  samples = jax.lax.switch(
    lengths.bucket(prompt_mask, widths, left=True),
    [
      lambda params, ids, mask, width=width: draw(
        key, model, params, ids[:, -width:], mask[:, -width:]
      )
      for width in widths
    ],
    *(params, prompt_ids, prompt_mask),
  )
  return Rollout(
    prompt_ids=jnp.repeat(prompt_ids, num_samples, axis=0),
    prompt_mask=jnp.repeat(prompt_mask, num_samples, axis=0),
    **samples,
  )


def response_hidden(model: Any, params: Any, batch: Batch) -> Array:
  """Computes the hidden states that response tokens were drawn from.

  `hidden[:, t]` is the model's state after the prompt and the response tokens
  before t. Its logits are the distribution of `response_ids[:, t]`, and a value
  head on it gives V of the text before token t. Only this function makes that
  shift by one.

  Args:
    model: module, called on ids and mask.
    params: its parameters.
    batch: a `Rollout`, or a dict with `prompt_ids`, `prompt_mask` `[N, P]`,
      left-padded, and `response_ids`, `response_mask` `[N, T]`, right-padded.

  Returns:
    `[N, T, D]`.
  """
  if packed.is_packed(batch):
    hidden = packed.apply(model, params, batch)
    return packed.in_places(packed.read(hidden, batch, before=1), batch)
  hidden, _ = text_hidden(model, params, batch)
  return at_responses(hidden, batch)


def at_responses(states: Array, batch: Batch) -> Array:
  """Selects from `text_hidden` what the response tokens were drawn from.

  Args:
    states: `[N, P + T - 1, ...]`, one for each token that was read.
    batch: as for `response_hidden`.

  Returns:
    `[N, T, ...]`, whose entry t is the state before token t.
  """
  return states[:, batch["prompt_ids"].shape[1] - 1 :]


def text_hidden(model: Any, params: Any, batch: Batch) -> tuple[Array, Array]:
  """Computes hidden states of prompts and responses but for the last token.

  Args:
    model: module, called on ids and mask.
    params: its parameters.
    batch: as for `response_hidden`.

  Returns:
    `[N, P + T - 1, D]`, and the mask `[N, P + T - 1]` bool of real tokens.
  """
  ids, mask = text(batch)
  return model.apply({"params": params}, ids, mask), mask


def text(batch: Batch) -> tuple[Array, Array]:
  """Joins prompts and responses, all but the last token.

  Args:
    batch: as for `response_hidden`.

  Returns:
    `[N, P + T - 1]` int ids, and their mask, True at real tokens.
  """
  prompt_ids, prompt_mask = batch["prompt_ids"], batch["prompt_mask"]
  response_ids, response_mask = batch["response_ids"], batch["response_mask"]
  arrays = [prompt_ids, prompt_mask, response_ids, response_mask]
  chex.assert_rank(arrays, 2)
  chex.assert_type(arrays, [int, bool, int, bool])
  chex.assert_equal_shape(arrays[:2])
  chex.assert_equal_shape(arrays[2:])
  # Nothing is drawn after the last response token: it is not read.
  ids = jnp.concatenate([prompt_ids, response_ids[:, :-1]], axis=1)
  mask = jnp.concatenate([prompt_mask, response_mask[:, :-1]], axis=1)
  return ids, mask


def prefix_logits(model: Any, params: Any, batch: Batch) -> Array:
  """Computes a causal classifier's logits of each prefix of the responses.

  `logits[:, t]` is of the prompt and the response tokens up to and including t:
  nothing is shifted here.

  Args:
    model: a `classifier.CausalClassifier` with the policy's tokens.
    params: its parameters.
    batch: as for `response_hidden`.

  Returns:
    `[N, T, L]` float32, 0 where masked.
  """
  if packed.is_packed(batch):
    logits = packed.apply(model, params, batch, method="token_logits")
    return packed.in_places(packed.read(logits, batch, before=0), batch)
  logits = model.apply(
    {"params": params}, *_whole_text(batch), method="token_logits"
  )
  return logits[:, batch["prompt_ids"].shape[1] :]


def text_logits(model: Any, params: Any, batch: Batch) -> Array:
  """What a classifier says of prompts with their responses, as whole texts.

  Args:
    model: a classifier with the policy's tokens.
    params: its parameters.
    batch: as for `response_hidden`.

  Returns:
    `[N, L]` float32.
  """
  if packed.is_packed(batch):
    logits = prefix_logits(model, params, batch)
    last = jnp.maximum(batch["response_mask"].sum(axis=1) - 1, 0)
    return jnp.take_along_axis(logits, last[:, None, None], axis=1)[:, 0]
  return model.apply({"params": params}, *_whole_text(batch))


def _whole_text(batch: Batch) -> tuple[Array, Array]:
  """Ids and mask `[N, P + T]` of prompts and responses."""
  ids, mask = (
    jnp.concatenate(
      [batch[f"prompt_{name}"], batch[f"response_{name}"]], axis=1
    )
    for name in ("ids", "mask")
  )
  return ids, mask


def num_columns(model: Any, num_rows: int) -> int:
  """Returns of how many columns a device should have logits at a time.

  Args:
    model: language model.
    num_rows: of all devices of the program.

  Returns:
    `log_probs.chunk_size` of a device's rows and its part of the vocabulary.
  """
  return log_probs.chunk_size(
    *activations.share(num_rows, model.config.vocab_size)
  )


def token_statistics(
  model: Any,
  params: Any,
  batch: Batch,
  *,
  temperature: float,
  allowed: Array | None = None,
  chunk_size: int | None = None,
  hidden: Array | None = None,
) -> tuple[log_probs.TokenStatistics, Array]:
  """Computes log-probabilities and entropies of the response tokens.

  Computed as in the sampler: same temperature, same allowed tokens.

  Args:
    model: module, called on ids and mask.
    params: its parameters; gradients flow to them.
    batch: as for `response_hidden`; and `allowed` `[N, T, V]`, if it has one.
    temperature: of the sampler.
    allowed: `[V]` bool, tokens that may be drawn, or None.
    chunk_size: response positions whose logits exist at the same time; None
      for all of them, 0 for `num_columns`.
    hidden: `[N, T, D]` of `response_hidden`, where it is known already.

  Returns:
    The `TokenStatistics` `[N, T]` and the hidden states `[N, T, D]`.
  """
  if chunk_size == 0:
    chunk_size = num_columns(model, len(batch["response_ids"]))
  output = params
  if chunk_size is not None:
    output = language_models.with_whole_output(model, params)
  logits = lambda h: model.apply({"params": output}, h, method="logits")
  options = {"chunk_size": chunk_size, "temperature": temperature}
  by_position = batch.get("allowed")
  if packed.is_packed(batch) and hidden is None:
    if by_position is not None:
      raise ValueError("packed rows do not go with tokens allowed by position.")
    hidden = packed.apply(model, params, batch)
    hidden = packed.read(hidden, batch, before=1)  # [R, U, D]
    statistics = log_probs.from_hidden(
      logits, hidden, packed.responses(batch), allowed=allowed, **options
    )
    return jax.tree.map(
      lambda x: packed.in_places(x, batch), (statistics, hidden)
    )
  if hidden is None:
    hidden = response_hidden(model, params, batch)
  if by_position is not None:
    allowed = by_position if allowed is None else by_position & allowed
  statistics = log_probs.from_hidden(
    logits, hidden, batch["response_ids"], allowed=allowed, **options
  )
  return statistics, hidden


def metrics(
  rollout: Rollout,
  statistics: log_probs.TokenStatistics,
  ref_log_probs: Array | None = None,
) -> dict[str, Array]:
  """Describes a rollout, as the policy that drew it reads it.

  Args:
    rollout: N rows.
    statistics: `[N, T]`, of `token_statistics` before the first update.
    ref_log_probs: `[N, T]`, of a reference policy, if there is one.

  Returns:
    "entropy/token", nats, over the tokens; "response/length", tokens, over the
    responses with a token that counts, and "response/finished", over all;
    "sampler/log_prob_gap", the largest difference between sampler and trainer,
    nats, "sampler/log_prob_gap_mean" over the tokens,
    "sampler/log_prob_gap_99", which one token in a hundred exceeds, and
    "sampler/log_prob_k3", the estimate k3 of the KL divergence between them;
    with a reference "kl/sequence_k1", the estimate k1 of the KL divergence from
    it of a response, nats, a mean over responses.
  """
  mask, drift = rollout.response_mask, {}
  if ref_log_probs is not None:
    estimate = log_probs.kl_estimate(
      statistics.log_probs, ref_log_probs, kind="k1"
    )
    drift["kl/sequence_k1"] = masking.masked_sum(estimate, mask, axis=1).mean()
  difference = jnp.where(mask, statistics.log_probs - rollout.log_probs, 0.0)
  gap = jnp.abs(difference)
  # As `numpy.quantile` with method="higher", but of 0 without a token.
  num_tokens = jnp.sum(mask, dtype=jnp.int32)
  place = -(-99 * (num_tokens - 1) // 100)
  gaps = jnp.sort(jnp.where(mask, gap, -1.0).ravel())  # Masked ones come first.
  gap_99 = gaps[mask.size - num_tokens + jnp.maximum(place, 0)]
  return {
    "entropy/token": masking.masked_mean(statistics.entropies, mask),
    "response/length": masking.masked_mean(
      mask.sum(axis=1).astype(jnp.float32), mask.any(axis=1)
    ),
    "response/finished": rollout.finished.astype(jnp.float32).mean(),
    "sampler/log_prob_gap": gap.max(),
    "sampler/log_prob_gap_mean": masking.masked_mean(gap, mask),
    "sampler/log_prob_gap_99": jnp.where(mask.any(), gap_99, 0.0),
    "sampler/log_prob_k3": masking.masked_mean(
      jnp.expm1(difference) - difference, mask
    ),
    **drift,
  }
