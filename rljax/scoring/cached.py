"""What a frozen reference says of logged responses, worked out once.

Reference, values and rewards do not change while a policy is trained on a log:
their numbers are kept in `reference.npz`, with a manifest of what they were
made of. A training that was given another log, reference, tokenizer or length
refuses them and says which.
"""

import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rljax.distributed import compiled, meshes, processes
from rljax.generation import rollouts
from rljax.models import hf, lora, products
from rljax.scoring import scorers
from rljax.storage import buckets, checkpoint, paths
from rljax.text import batches, encoding, logged, tokens

ARRAYS, MANIFEST = "reference.npz", "manifest.json"

# What the parts of a manifest are, in words.
_PARTS = {
  "data": "the logged rows (--data)",
  "reference": "the parameters of the reference (--policy)",
  "tokenizer": "the tokenizer",
  "ids": "the token ids of the rows",
  "max_prompt_length": "--max_prompt_length",
  "max_response_length": "--max_response_length",
  "too_long": "--too_long",
  "prompt_format": "--prompt_format",
  "dtype": "--dtype",
  "matmul_precision": "--matmul_precision",
}

# Where one of these differs, so do the ids: nothing more to say about them.
_DECIDE_IDS = set(_PARTS) - {"ids", "reference", "dtype", "matmul_precision"}
# Of what does not say: as `precision` leaves it out.
_EXACT = {"matmul_precision": "highest"}


def known(
  log: encoding.Log,
  loaded: hf.LanguageModel,
  needed: Sequence[str],
  *,
  cache: str | os.PathLike,
  dtype: str,
  batch_size: int,
  mesh: Any,
  reader: str = "The training",
  firsts_alone: bool = False,
  own_rewards: bool = False,
) -> dict[str, np.ndarray]:
  """Returns what a learner needs to know of a log, beside its tokens.

  Args:
    log: N rows of up to K replies.
    loaded: the reference.
    needed: some of "rewards", "advantages" and "ref_log_probs".
    cache: workdir of `experiments/offline_value.py`, from which all of them
      are read; empty: rewards and advantages are those of the rows, and the
      reference's log-probabilities are computed.
    dtype: of the reference's computation, as its flag has it.
    batch_size: replies at the same time.
    mesh: from `meshes.make`.
    reader: the flag that needs rewards or advantages, for messages.
    firsts_alone: see `of_rows`.
    own_rewards: whether rewards are always those of the rows, whatever a cache
      holds.

  Returns:
    By name: `[N, K]` float32, or `[N, K, T]` of log-probabilities; 0 where
    there is no reply.

  Raises:
    ValueError: if the cache does not fit, or as `of_rows`.
  """
  found = {}
  if cache:
    made_of = describe_log(log, loaded, dtype=dtype)
    read = [x for x in needed if not (own_rewards and x == "rewards")]
    arrays = load(cache, made_of, read)
    found = {name: arrays[name] for name in read}
  hint = ": run experiments/offline_value.py and give its workdir as --cache"
  for name in needed:
    if name not in ("ref_log_probs", *found):
      found[name] = of_rows(
        log,
        name,
        reader=reader,
        firsts_alone=firsts_alone,
        hint="" if own_rewards else hint,
      )
  if "ref_log_probs" in needed and not cache:
    rules = hf.partition_rules(loaded.model, mesh)
    found["ref_log_probs"] = response_log_probs(
      loaded.model,
      meshes.place(loaded.params, meshes.shardings(loaded.params, rules, mesh)),
      log.encoded,
      batch_size=batch_size,
      mesh=mesh,
    )
  return found


def of_rows(
  log: encoding.Log,
  name: str,
  *,
  reader: str,
  firsts_alone: bool = False,
  hint: str = "",
) -> np.ndarray:
  """Returns the rewards or advantages that the rows of a log have themselves.

  Args:
    log: N rows of up to K replies.
    name: "rewards" or "advantages".
    reader: the flag that needs them, for messages.
    firsts_alone: whether the first reply of each row is used alone; the others
      get 0, known or not.
    hint: end of the message.

  Returns:
    `[N, K]` float32, 0 where there is no reply.

  Raises:
    ValueError: if a reply that is used has none.
  """
  make = {
    "rewards": logged.reward_array,
    "advantages": logged.advantage_array,
  }[name]
  array = make(log.rows)
  used = log.present.copy()
  if firsts_alone:
    used[:, 1:] = False
  num_unknown = np.isnan(array[used]).sum()
  if num_unknown:
    raise ValueError(
      f"{reader} needs {name}, which {num_unknown} of {used.sum()} logged "
      f"replies lack{hint}."
    )
  return np.where(used, array, 0.0)


def score(
  log: encoding.Log,
  scorer: scorers.Scorer,
  *,
  again: bool = False,
) -> tuple[np.ndarray, int]:
  """Scores the replies of a log that nobody has scored yet.

  Args:
    log: N rows of up to K replies.
    scorer: `(prompts, responses) -> (scores, parts)`.
    again: whether the others are scored as well.

  Returns:
    Rewards of all replies, `[N, K]` float32, 0 where there is none, and how
    many the scorer has scored.
  """
  rewards = logged.reward_array(log.rows)
  unscored = np.argwhere(log.present & (np.isnan(rewards) | again))
  if len(unscored):
    scores, _ = scorer(
      [log.rows[i].prompt for i, _ in unscored],
      [log.rows[i].candidates[k] for i, k in unscored],
    )
    rewards[tuple(unscored.T)] = scores
  return np.where(log.present, rewards, 0.0), len(unscored)


def response_log_probs(
  model: Any,
  params: Any,
  encoded: encoding.Encoded,
  *,
  batch_size: int,
  mesh: Any,
  chunk_size: int | None = None,
) -> np.ndarray:
  """Log-probabilities of all candidates of all rows, at temperature 1.

  Args:
    model: module.
    params: its parameters, on the mesh.
    encoded: N rows of up to K candidates.
    batch_size: responses at the same time.
    mesh: from `meshes.make`.
    chunk_size: response positions with logits at the same time; None for what
      fits.

  Returns:
    `[N, K, T]` float32, with T of `lengths`; 0 where there is no token.
  """
  prompt_length, response_length = encoding.lengths(encoded)
  num_candidates = max(map(len, encoded.response_ids))
  pairs = [
    (row, candidate)
    for row, responses in enumerate(encoded.response_ids)
    for candidate in range(len(responses))
  ]
  rows, candidates = np.transpose(pairs)
  arrays = encoding.batch(
    encoded,
    rows,
    candidates,
    prompt_length=prompt_length,
    response_length=response_length,
  )
  found = _log_probs(model, params, arrays, batch_size, mesh, chunk_size)
  result = np.zeros(
    (len(encoded.response_ids), num_candidates, response_length), np.float32
  )
  result[rows, candidates] = found
  return result


def pair_log_probs(
  model: Any,
  params: Any,
  pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
  *,
  batch_size: int,
  mesh: Any,
  chunk_size: int | None = None,
) -> list[np.ndarray]:
  """Log-probabilities of responses, each behind its prompt, at temperature 1.

  One forward pass over given tokens; nothing is decoded.

  Args:
    model: module.
    params: its parameters, on the mesh.
    pairs: N prompts and responses, as ids.
    batch_size: responses at the same time.
    mesh: from `meshes.make`.
    chunk_size: as in `response_log_probs`.

  Returns:
    N arrays `[n]` float32, one entry per token of the response.

  Raises:
    ValueError: if the longest prompt and response are longer than the model's
      context.
  """
  arrays = batches.supervised_batch(pairs)
  length = arrays["prompt_ids"].shape[1] + arrays["response_ids"].shape[1]
  tokens.check_positions(length, model.config.max_positions)
  found = _log_probs(model, params, arrays, batch_size, mesh, chunk_size)
  return [
    row[: len(response)]
    for row, (_, response) in zip(found, pairs, strict=True)
  ]


def describe(
  encoded: encoding.Encoded, params: Any, tokenizer: Any, **settings: Any
) -> dict[str, Any]:
  """What the numbers of a reference depend on, as a manifest holds it.

  Args:
    encoded: the logged rows.
    params: parameters of the reference.
    tokenizer: its tokenizer.
    **settings: plain values by the names of their flags.

  Returns:
    JSON values: fingerprints of rows, ids, parameters and tokenizer, and the
    settings.
  """
  words = json.dumps(
    [sorted(tokenizer.get_vocab().items()), tokenizer.eos_token_id]
  )
  return {
    "data": logged.fingerprint(encoded.rows),
    "ids": encoding.fingerprint_ids(encoded),
    "reference": fingerprint(params),
    "tokenizer": hashlib.sha256(words.encode()).hexdigest(),
    **settings,
  }


def fingerprint(params: Any) -> str:
  """Hashes the weights of a model as it begins: adapters add nothing yet."""
  return checkpoint.fingerprint(lora.start(params))


def precision(dtype: Any) -> dict[str, str]:
  """Says how products round float32 operands, where they do.

  Numbers of a model depend on it as on its dtype. Where all bits are read, as
  --matmul_precision=auto has it, nothing is said, and what was made before
  this was noted stays valid.

  Args:
    dtype: of the model's computation. A narrower one is all there is to say.

  Returns:
    "matmul_precision", as a part of what a file is made of; or nothing.
  """
  if jnp.dtype(dtype) != jnp.float32 or products.is_exact(dtype):
    return {}
  asked = jax.config.jax_default_matmul_precision or "default"
  return {"matmul_precision": f"{asked} on {jax.default_backend()}"}


def describe_log(
  log: encoding.Log, loaded: hf.LanguageModel, *, dtype: str
) -> dict[str, Any]:
  """As `describe`, of a log, which holds the settings, and a reference."""
  return describe(
    log.encoded,
    loaded.params,
    loaded.tokenizer,
    **log.settings,
    dtype=dtype,
    **precision(dtype),
  )


def save(
  directory: str | os.PathLike,
  arrays: Mapping[str, np.ndarray],
  made_of: Mapping[str, Any],
  notes: Mapping[str, Any],
) -> None:
  """Writes arrays with their manifest, which is written last.

  Of several processes, the first one does.

  Args:
    directory: made if it is missing.
    arrays: by name, each with one entry a row.
    made_of: from `describe`.
    notes: more for the reader of the manifest; nothing is checked by it.
  """
  if not processes.is_first():
    return
  directory = pathlib.Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  (directory / MANIFEST).unlink(missing_ok=True)
  with paths.whole(directory / ARRAYS, fsync=True) as partial:
    with partial.open("wb") as file:  # Of a name, numpy would add ".npz".
      np.savez(file, **arrays)
    digest = hashlib.sha256(partial.read_bytes()).hexdigest()
  manifest = {
    "made_of": dict(made_of),
    "notes": dict(notes),
    "sha256": digest,
  }
  paths.write_whole(directory / MANIFEST, json.dumps(manifest, indent=2) + "\n")


def load(
  directory: str | os.PathLike,
  made_of: Mapping[str, Any],
  needed: Sequence[str],
) -> dict[str, np.ndarray]:
  """Reads arrays that were made of the same things.

  Args:
    directory: where `save` wrote them.
    made_of: from `describe`, of what is about to be trained.
    needed: arrays that must be among them.

  Returns:
    The arrays by name.

  Raises:
    ValueError: if there is no whole cache, it is damaged, it was made of
      something else, naming every part that differs, or lacks an array.
  """
  directory = _here(directory)
  again = "Make it again with experiments/offline_value.py."
  try:
    manifest = json.loads((directory / MANIFEST).read_text())
    content = (directory / ARRAYS).read_bytes()
  except (OSError, ValueError) as error:
    raise ValueError(
      f"{directory} holds no whole cache of a reference ({error}). {again}"
    ) from error
  if hashlib.sha256(content).hexdigest() != manifest["sha256"]:
    raise ValueError(
      f"{directory / ARRAYS} is damaged: its checksum is not that of "
      f"{MANIFEST}. {again}"
    )
  found, made_of = (_EXACT | dict(x) for x in (manifest["made_of"], made_of))
  differing = [
    name
    for name in dict.fromkeys([*_PARTS, *found, *made_of])
    if found.get(name) != made_of.get(name)
  ]
  if set(differing) & _DECIDE_IDS:
    differing = [name for name in differing if name != "ids"]
  lines = [
    f"  {_PARTS.get(name, name)}: the cache has {_short(found.get(name))}, "
    f"this run {_short(made_of.get(name))}"
    for name in differing
  ]
  if lines:
    raise ValueError(
      f"The cache {directory} does not fit this run:\n"
      + "\n".join(lines)
      + f"\nGive what it was made of, or another --cache. {again}"
    )
  with np.load(directory / ARRAYS) as file:
    arrays = dict(file)
  missing = [name for name in needed if name not in arrays]
  if missing:
    raise ValueError(f"{directory} lacks {', '.join(missing)}. {again}")
  return arrays


def notes(directory: str | os.PathLike) -> dict[str, Any]:
  """What `save` noted beside the arrays, of a cache that `load` has read."""
  return json.loads((_here(directory) / MANIFEST).read_text())["notes"]


def _here(directory):
  """The folder of a cache, of which a URL is fetched."""
  names = (MANIFEST, ARRAYS)
  wanted = lambda objects: [name for name in names if name in objects]
  return buckets.here(directory, wanted, name="--cache")


def other_scorer(
  directory: str | os.PathLike, scorer: scorers.Scorer | None
) -> list[str]:
  """Notes that a cache's rewards are by another scorer than this one.

  Args:
    directory: of a cache that `load` has read; empty if there is none.
    scorer: with the attribute `description`; None: there is nothing to note.

  Returns:
    A sentence, or nothing if they are by the same.
  """
  if scorer is None:
    return []
  scored_by = notes(directory)["reward"] if directory else None
  if not directory or scored_by == scorer.description:
    return []
  return [
    f"Rewards of the cache {directory} are by {scored_by}, and those of the "
    f"dev prompts by {scorer.description}."
  ]


def _log_probs(model, params, arrays, batch_size, mesh, chunk_size):
  """`[N, T]` float32 of the responses in `arrays`, batch by batch."""

  def forward(params, batch):
    statistics, _ = rollouts.token_statistics(
      model,
      params,
      batch,
      temperature=1.0,
      chunk_size=chunk_size or 0,
    )
    return jnp.where(batch["response_mask"], statistics.log_probs, 0.0)

  program = compiled.Compiled("reference", forward)
  return meshes.map_batches(
    lambda batch: program(params, batch), arrays, batch_size, mesh
  )


def _short(value: Any) -> str:
  text = str(value)
  return f"{text[:12]}..." if len(text) == 64 else text
