"""The text side: files, text to ids, padding, and which rows make a batch.

Text becomes ids here, once, and ids become text here, once. Tokenizers are
Hugging Face fast tokenizers. Everything is numpy; nothing imports jax.
"""

import bisect
import gzip
import json
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from absl import logging

Row = dict[str, Any]


# Files.


def read_jsonl(
  path: str | os.PathLike,
  *,
  required: Sequence[str] = (),
  optional: Mapping[str, Any] | None = None,
) -> list[Row]:
  """Reads one JSON object per line; a name ending in `.gz` is unpacked.

  Blank lines are stepped over. Fields that nobody asked for are kept.

  Args:
    path: file to read.
    required: fields that every row must have.
    optional: field -> value to give to the rows that lack it.

  Returns:
    The rows in the file's order.

  Raises:
    ValueError: naming the line, if it is no JSON object or lacks a field; or
      if there are no rows at all.
  """
  return [
    _checked(_raised(row), place, required, optional)
    for place, row in _placed_lines(path)
  ]


def write_jsonl(path: str | os.PathLike, rows: Iterable[Mapping]) -> None:
  """Writes one JSON object per line; a reader sees the old file or the new.

  Args:
    path: file to replace; its folder is made if it is missing. A name ending
      in `.gz` is packed.
    rows: mappings of JSON values and numpy scalars or arrays.
  """
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  content = "".join(map(_json_line, rows)).encode("utf-8")
  if path.suffix == ".gz":
    content = gzip.compress(content, mtime=0)
  temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  try:
    with temporary.open("wb") as file:
      file.write(content)
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


def append_jsonl(path: str | os.PathLike, rows: Iterable[Mapping]) -> None:
  """Adds rows at the end of a file, which need not exist yet.

  A last line without its line feed is what a killed writer leaves behind: it
  is cut off, with a warning, so that the new rows stay readable.

  Args:
    path: uncompressed file to add to.
    rows: as for `write_jsonl`.
  """
  path = pathlib.Path(path)
  if path.suffix == ".gz":
    raise ValueError(f"append_jsonl writes uncompressed files, got {path}.")
  path.parent.mkdir(parents=True, exist_ok=True)
  content = "".join(map(_json_line, rows)).encode("utf-8")
  with path.open("a+b") as file:
    end = file.seek(0, os.SEEK_END)
    if end and _last_byte(file) != b"\n":
      file.seek(0)
      kept = file.read().rfind(b"\n") + 1
      file.truncate(kept)
      logging.warning("%s: cut off a half-written last line.", path)
    file.write(content)


def load_rows(
  name: str,
  split: str,
  *,
  data_dir: str | os.PathLike | None = None,
  required: Sequence[str] = (),
) -> list[Row]:
  """Loads the rows of a data set from a file, a folder or tfds.

  Args:
    name: one of
      a `.jsonl` or `.json` file, possibly with `.gz` behind (a `.json` file
      holds one list of objects); "{split}" in its name is replaced, and
      without it the whole file is the split;
      a folder with a file named after the split;
      "tfds:<name>", a tensorflow-datasets data set that was prepared with
      `file_format="array_record"`. Nothing is downloaded.
    split: such as "train"; tfds also understands "train[:10%]".
    data_dir: folder that relative paths start from; for tfds its data folder.
    required: fields that every row must have.

  Returns:
    One dict per row; tfds bytes are decoded to text.

  Raises:
    ValueError: if there is no such file, split or prepared data set.
  """
  return [
    _checked(_raised(row), place, required, None)
    for place, row in load_placed_rows(name, split, data_dir=data_dir)
  ]


def load_placed_rows(
  name: str, split: str, *, data_dir: str | os.PathLike | None = None
) -> Iterator[tuple[str, Row | ValueError]]:
  """Loads rows with the place each comes from, for who can spare a bad one.

  Args:
    name: see `load_rows`; likewise `split` and `data_dir`.
    split: such as "train".
    data_dir: folder that relative paths start from.

  Yields:
    A place such as "logged.jsonl:17", and the row. A row that cannot be read
    comes as the ValueError that `load_rows` would raise, which names its
    place.

  Raises:
    ValueError: if there is no such file, split or prepared data set, or it
      holds no rows at all.
  """
  if name.startswith("tfds:"):
    yield from _placed_tfds(name.removeprefix("tfds:"), split, data_dir)
    return
  path = pathlib.Path(data_dir or "") / name.replace("{split}", split)
  if path.is_dir():
    endings = (".jsonl", ".jsonl.gz", ".json", ".json.gz")
    candidates = [path / f"{split}{ending}" for ending in endings]
    found = [file for file in candidates if file.is_file()]
    if not found:
      raise ValueError(
        f"{path}: no file for split {split!r} (looked for "
        f"{', '.join(file.name for file in candidates)})."
      )
    path = found[0]
  if not path.is_file():
    raise ValueError(f"{path}: no such file or folder.")
  stem = path.name.removesuffix(".gz")
  if stem.endswith(".jsonl"):
    yield from _placed_lines(path)
  elif stem.endswith(".json"):
    yield from _placed_items(path)
  else:
    raise ValueError(f"{path}: expected .jsonl or .json, possibly with .gz.")


# Text to ids and back.


def require_tokens(
  tokenizer,
  *,
  eos: bool = True,
  pad: bool = False,
  text: str | None = None,
) -> None:
  """Checks that a tokenizer has what a script is going to use.

  Args:
    tokenizer: Hugging Face fast tokenizer.
    eos: whether an end token is needed.
    pad: whether a padding token is needed. Masks are made from lengths, so
      that it may be the end token.
    text: text that must survive encoding and decoding, blanks aside, such as
      the symbols of a task.

  Raises:
    ValueError: naming everything that is missing.
  """
  missing = []
  if eos and tokenizer.eos_token_id is None:
    missing.append("an end token (eos_token)")
  if pad and tokenizer.pad_token_id is None:
    missing.append("a padding token (pad_token)")
  if text and not _survives(tokenizer, text):
    lost = [repr(part) for part in _lost_parts(tokenizer, text)]
    missing += [f"a way to write {part}" for part in lost or [_shorten(text)]]
  if missing:
    raise ValueError(
      f"The tokenizer {_name(tokenizer)} lacks {', '.join(missing)}."
    )


def encode_prompts(
  tokenizer,
  texts: Sequence[str],
  *,
  max_length: int,
  truncate: Literal[False, "left"] = False,
) -> list[list[int]]:
  """Turns prompts into ids, with the start token if the tokenizer has one.

  A prompt that begins with the text of the start token, as chat templates
  write it, gets no second one.

  Args:
    tokenizer: Hugging Face fast tokenizer.
    texts: B prompts.
    max_length: tokens that a prompt may have, the start token included; > 0.
    truncate: False to refuse longer prompts; "left" to keep the end of them,
      behind the start token. How many were cut is logged.

  Returns:
    B lists of ids, none of them empty.

  Raises:
    ValueError: naming the prompt, if it is too long, holds what the tokenizer
      cannot write, or comes out without any token; or if the tokenizer puts
      its end token behind prompts.
  """
  if max_length < 1:
    raise ValueError(f"max_length must be positive, got {max_length}.")
  if truncate not in (False, "left"):
    raise ValueError(f'truncate must be False or "left", got {truncate!r}.')
  # A model would take an end token behind the prompt for its own.
  added = _encode(tokenizer, "", add_special_tokens=True)
  if added[:1] == [tokenizer.bos_token_id]:
    added = added[1:]
  if added[-1:] == [tokenizer.eos_token_id]:
    raise ValueError(
      f"The tokenizer {_name(tokenizer)} puts an end token behind prompts; "
      "save it with a post-processor that does not."
    )
  rows, num_truncated, num_unknown = [], 0, 0
  for text in texts:
    ids = _encode_start(tokenizer, text)
    if not ids:
      raise ValueError(
        f"The prompt {_shorten(text)} has no tokens, and the tokenizer "
        f"{_name(tokenizer)} adds no start token."
      )
    if len(ids) > max_length:
      if not truncate:
        raise ValueError(
          f"The prompt {_shorten(text)} has {len(ids)} tokens, the limit is "
          f"{max_length}."
        )
      num_truncated += 1
      ids = cut_prompt(tokenizer, ids, max_length)
    num_unknown += _has_unknown(tokenizer, ids)
    rows.append(ids)
  if num_truncated:
    logging.warning(
      "%d of %d prompts were cut on the left to %d tokens.",
      num_truncated,
      len(rows),
      max_length,
    )
  if num_unknown:
    logging.warning(
      "%d of %d prompts hold the unknown token.", num_unknown, len(rows)
    )
  return rows


def cut_prompt(
  tokenizer, prompt_ids: Sequence[int], max_length: int
) -> list[int]:
  """The end of a prompt, behind its start token if it has one.

  Args:
    tokenizer: Hugging Face fast tokenizer.
    prompt_ids: ids of a prompt.
    max_length: tokens that are kept at most, the start token included; > 0.
  """
  ids = list(prompt_ids)
  if len(ids) <= max_length:
    return ids
  start = ids[:1] if ids[0] == tokenizer.bos_token_id else []
  start = start[: max_length - 1]
  return start + ids[len(ids) - max_length + len(start) :]


def encode_pairs(
  tokenizer,
  pairs: Sequence[tuple[str, str]],
  *,
  max_prompt_length: int,
  max_response_length: int,
) -> list[tuple[list[int], list[int]]]:
  """Turns prompts and their responses into ids; responses end in the end token.

  A prompt gets the ids that `encode_prompts` gives it, because these are what
  the sampler will continue; a response those of `encode_response`. How many
  were encoded apart is logged.

  Args:
    tokenizer: Hugging Face fast tokenizer with an end token.
    pairs: (prompt, response) texts.
    max_prompt_length: tokens that a prompt may have.
    max_response_length: tokens that a response may have, end token included.

  Returns:
    (prompt ids, response ids) per pair.

  Raises:
    ValueError: naming the text that is too long or cannot be written.
  """
  require_tokens(tokenizer, eos=True)
  prompts = encode_prompts(
    tokenizer, [prompt for prompt, _ in pairs], max_length=max_prompt_length
  )
  rows, num_apart = [], 0
  for (prompt, response), prompt_ids in zip(pairs, prompts, strict=True):
    response_ids, apart = encode_response(
      tokenizer, prompt, prompt_ids, response
    )
    num_apart += apart
    if len(response_ids) > max_response_length:
      raise ValueError(
        f"The response {_shorten(response)} has {len(response_ids)} tokens "
        f"with its end token, the limit is {max_response_length}."
      )
    rows.append((prompt_ids, response_ids))
  if num_apart:
    logging.warning(
      "%d of %d responses were encoded apart from their prompts.",
      num_apart,
      len(rows),
    )
  return rows


def encode_response(
  tokenizer, prompt: str, prompt_ids: Sequence[int], response: str
) -> tuple[list[int], bool]:
  """The ids of a response behind its prompt, the end token among them.

  They are the rest of the ids of the two texts together where those begin
  with the prompt's, and otherwise (a token would cross the border) the ids of
  the response's own text.

  Args:
    tokenizer: Hugging Face fast tokenizer with an end token.
    prompt: text.
    prompt_ids: all its ids, from `encode_prompts`, before any cut.
    response: text.

  Returns:
    The ids, and whether they were encoded apart from the prompt.
  """
  joint = _encode_start(tokenizer, prompt + response)
  apart = joint[: len(prompt_ids)] != list(prompt_ids)
  if apart:
    ids = _encode(tokenizer, response, add_special_tokens=False)
  else:
    ids = joint[len(prompt_ids) :]
  return [*ids, tokenizer.eos_token_id], apart


def decode(
  tokenizer,
  response_ids: np.ndarray,
  response_mask: np.ndarray,
  *,
  skip_special_tokens: bool = True,
) -> list[str]:
  """Turns the unmasked ids of each row into text.

  Args:
    tokenizer: Hugging Face fast tokenizer.
    response_ids: `[B, T]` int. An id that the tokenizer does not know, such as
      an unused row of a padded vocabulary, becomes nothing.
    response_mask: `[B, T]` bool.
    skip_special_tokens: whether the end token and its kin become nothing.

  Returns:
    B texts.
  """
  ids, mask = np.asarray(response_ids), np.asarray(response_mask)
  if ids.ndim != 2 or ids.shape != mask.shape or mask.dtype != np.bool_:
    raise ValueError(
      f"decode needs ids and a bool mask of one [B, T] shape, got {ids.shape} "
      f"and {mask.dtype} {mask.shape}."
    )
  return [
    tokenizer.decode(
      row[keep].tolist(),
      skip_special_tokens=skip_special_tokens,
      clean_up_tokenization_spaces=False,
    )
    for row, keep in zip(ids, mask, strict=True)
  ]


def stop_ids(tokenizer) -> tuple[int, ...]:
  """The ids that end a response: the tokenizer's end token.

  Raises:
    ValueError: if it has none.
  """
  require_tokens(tokenizer, eos=True)
  return (tokenizer.eos_token_id,)


def pad_id(tokenizer) -> int:
  """What to fill rows with: the pad token, else the end token, else 0."""
  for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
    if token_id is not None:
      return token_id
  return 0


def allowed_tokens(
  tokenizer, vocab_size: int, stop_ids: Sequence[int] = ()
) -> np.ndarray:
  """Which ids a policy may sample.

  Special tokens other than the stop ids, and rows of the model's vocabulary
  that no token uses, are out of it. The sampler and every loss take the same
  mask: a policy that may put mass on a token that is never drawn defeats an
  entropy bonus with it.

  Args:
    tokenizer: Hugging Face tokenizer.
    vocab_size: V of the model.
    stop_ids: special tokens that may be drawn, because they end a response.

  Returns:
    `[V]` bool.

  Raises:
    ValueError: if the tokenizer has ids that the model has no row for.
  """
  used = list(tokenizer.get_vocab().values())
  if vocab_size <= max(used):
    raise ValueError(
      f"vocab_size must be above the tokenizer's largest id {max(used)}, got "
      f"{vocab_size}."
    )
  special = set(tokenizer.all_special_ids)
  special |= {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
  allowed = np.zeros(vocab_size, np.bool_)
  allowed[used] = True
  allowed[list(special)] = False
  allowed[list(stop_ids)] = True
  return allowed


def check_positions(length: int, max_positions: int) -> None:
  """Raises ValueError if prompts and responses are longer than the context."""
  if length > max_positions:
    raise ValueError(
      f"Prompt and response take up to {length} tokens with their padding, but "
      f"the model has {max_positions} positions; shorten --max_length or the "
      "prompts."
    )


def token_bytes(tokenizer, *, vocab_size: int | None = None) -> list[bytes]:
  """The bytes that each id adds to the decoded text.

  The text of a sequence of ids is the UTF-8 text of their bytes, one after
  the other. Three things may differ from the tokenizer's own `decode`: a
  blank that some tokenizers take off the front of the text, bytes that are no
  valid UTF-8, and tidying up.

  Args:
    tokenizer: Hugging Face fast tokenizer: byte-level BPE (GPT-2, Llama 3,
      Qwen, SmolLM2), SentencePiece-like with or without byte fallback
      (Llama 2, Mistral), or words that are joined without blanks.
    vocab_size: length of the result, for models with unused rows; the
      tokenizer's own size by default.

  Returns:
    One `bytes` per id; b"" for special and unused ids.

  Raises:
    ValueError: if the tokenizer's decoder is of another kind.
  """
  backend = getattr(tokenizer, "backend_tokenizer", None)
  if backend is None:
    raise ValueError(f"The tokenizer {_name(tokenizer)} is not a fast one.")
  decoder = json.loads(backend.to_str())["decoder"]
  if decoder is None:
    raise ValueError(
      f"The tokenizer {_name(tokenizer)} has no decoder, so that its tokens "
      "are joined with blanks; rljax needs the bytes of each token."
    )
  special = set(tokenizer.all_special_ids)
  special |= {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
  vocabulary = tokenizer.get_vocab()
  size = max(vocabulary.values()) + 1 if vocab_size is None else vocab_size
  if size <= max(vocabulary.values()):
    raise ValueError(
      f"vocab_size must be above the tokenizer's largest id "
      f"{max(vocabulary.values())}, got {size}."
    )
  result = [b""] * size
  for token, token_id in vocabulary.items():
    if token_id not in special:
      piece = _decode_piece(token, decoder)
      result[token_id] = piece.encode() if isinstance(piece, str) else piece
  return result


# Padding.


def bucket_length(length: int, buckets: Sequence[int] | None = None) -> int:
  """The smallest allowed length that is not below the given one.

  A compiled function is compiled once per shape. Buckets keep the number of
  shapes down: 1, 2, 3, 4, 6, 8, 12, ... (powers of two and one and a half
  times them) pad by less than a half, and number two per doubling.

  Args:
    length: number of tokens; >= 0.
    buckets: allowed lengths in any order; the ones above by default.

  Raises:
    ValueError: if every bucket is too short.
  """
  if buckets is not None:
    enough = [bucket for bucket in buckets if bucket >= length]
    if not enough:
      raise ValueError(
        f"Length {length} is above the largest bucket of {sorted(buckets)}."
      )
    return min(enough)
  power = 1
  while power < length:
    power *= 2
  return power * 3 // 4 if power >= 4 and power * 3 // 4 >= length else power


def longest_in_bucket(limit: int) -> int:
  """The longest row that `pad_left` and `pad_right` pad to `limit` at most."""
  length = max(limit, 0)
  while length and bucket_length(length) > limit:
    length -= 1
  return length


def pad_left(
  ids: Sequence[Sequence[int]],
  *,
  length: int | None = None,
  buckets: Sequence[int] | None = None,
  pad_id: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
  """Lines rows up at their right ends, as prompts are.

  Args:
    ids: B sequences of ids.
    length: P; by default the bucket of the longest row.
    buckets: see `bucket_length`.
    pad_id: what fills the rest. The mask is made from lengths, so that it may
      be the id of a real token.

  Returns:
    `[B, P]` int32 ids and `[B, P]` bool mask, True for real tokens.

  Raises:
    ValueError: if a row is longer than `length` or than every bucket.
  """
  return _pad(ids, length, buckets, pad_id, left=True)


def pad_right(
  ids: Sequence[Sequence[int]],
  *,
  length: int | None = None,
  buckets: Sequence[int] | None = None,
  pad_id: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
  """Lines rows up at their left ends, as responses are; see `pad_left`."""
  return _pad(ids, length, buckets, pad_id, left=False)


# Batches.


def supervised_batch(
  rows: Sequence[tuple[Sequence[int], Sequence[int]]],
  *,
  prompt_length: int | None = None,
  response_length: int | None = None,
  pad_id: int = 0,
) -> dict[str, np.ndarray]:
  """Pads (prompt ids, response ids) to a batch.

  Args:
    rows: B pairs of id sequences; the response includes its end token.
    prompt_length: P; by default the bucket of the longest prompt.
    response_length: T, likewise.
    pad_id: what fills the rest.

  Returns:
    `prompt_ids`, `prompt_mask` `[B, P]`, left-padded, and `response_ids`,
    `response_mask` `[B, T]`, right-padded.
  """
  if not rows:
    raise ValueError("A batch needs at least one row.")
  prompts, responses = zip(*rows, strict=True)
  prompt_ids, prompt_mask = pad_left(
    prompts, length=prompt_length, pad_id=pad_id
  )
  response_ids, response_mask = pad_right(
    responses, length=response_length, pad_id=pad_id
  )
  return {
    "prompt_ids": prompt_ids,
    "prompt_mask": prompt_mask,
    "response_ids": response_ids,
    "response_mask": response_mask,
  }


def epoch_order(num_rows: int, *, seed: int, epoch: int) -> np.ndarray:
  """The order in which an epoch visits the rows: a permutation, int64."""
  return np.random.default_rng([seed, epoch]).permutation(num_rows)


def batch_indices(
  num_rows: int, batch_size: int, step: int, *, seed: int
) -> np.ndarray:
  """The rows that make the batch of a step, without the steps before it.

  Epochs follow each other without a gap: a batch may hold the end of one and
  the start of the next, and every row is seen once per epoch.

  Args:
    num_rows: rows of the data set.
    batch_size: B; at most `num_rows`.
    step: 0 for the first batch.
    seed: of the orders.

  Returns:
    `[B]` int64 row numbers.

  Raises:
    ValueError: if the batch is larger than the data set.
  """
  if not 0 < batch_size <= num_rows:
    raise ValueError(
      f"batch_size must lie between 1 and the {num_rows} rows of data, got "
      f"{batch_size}."
    )
  epoch, start = divmod(step * batch_size, num_rows)
  rows = epoch_order(num_rows, seed=seed, epoch=epoch)[
    start : start + batch_size
  ]
  missing = batch_size - len(rows)
  if missing:
    following = epoch_order(num_rows, seed=seed, epoch=epoch + 1)
    rows = np.concatenate([rows, following[:missing]])
  return rows


# Priorities.


class PrioritySampler:
  """Draws rows in proportion to their weights.

  A draw is made from the seed and the step alone: a resumed run needs no
  saved state, and any step's rows can be told again. Its cost grows with the
  logarithm of the number of rows; only making the sampler visits all of them.

  With replacement, every draw is independent of the others. Without it, the
  rows of a batch differ: each is drawn in proportion to the weights among
  those that are left. Batches are independent of each other either way.

  Attributes:
    num_rows: rows with a positive weight, which alone are ever drawn.

  Source:
    Baheti et al. (2024), "Leftover Lunch: Advantage-based Offline
    Reinforcement Learning for Language Models", whose code seeds another
    generator than it draws from.
  """

  def __init__(self, weights: np.ndarray, *, seed: int, replace: bool = True):
    """Adds up the weights, in float64.

    Args:
      weights: `[N]` numbers >= 0, not all 0; they need not sum to 1. A matrix
        of candidates is given as `weights.ravel()`, and the rows drawn are
        taken apart by `np.unravel_index`.
      seed: of the draws.
      replace: whether a batch may hold a row twice.

    Raises:
      ValueError: naming the first weight that is negative or not finite; or
        if none is positive.
    """
    # In float32, the sum of a hundred thousand rows forgets the small ones.
    weights = np.asarray(weights, np.float64)
    if weights.ndim != 1:
      raise ValueError(f"weights must be a vector, got shape {weights.shape}.")
    bad = np.flatnonzero(~(np.isfinite(weights) & (weights >= 0)))
    if bad.size:
      raise ValueError(
        "weights must be finite and not negative, got "
        f"{weights[bad[0]]} in row {bad[0]}."
      )
    self._rows = np.flatnonzero(weights > 0)
    if not self._rows.size:
      raise ValueError(
        f"None of the {weights.size} weights is positive: no response is "
        "better than expected. Check the rewards and the values, or sample "
        "without priorities."
      )
    self._weights = weights[self._rows]
    self._ends = np.cumsum(self._weights)
    self._seed = seed
    self._replace = replace
    self.num_rows = self._rows.size

  def draw(self, batch_size: int, step: int) -> np.ndarray:
    """The rows that make the batch of a step, without the steps before it.

    Args:
      batch_size: B; without replacement at most `num_rows`.
      step: 0 for the first batch.

    Returns:
      `[B]` int64 row numbers.

    Raises:
      ValueError: if the batch is empty, or larger than there are rows to draw
        without replacement.
    """
    if batch_size < 1:
      raise ValueError(f"batch_size must be positive, got {batch_size}.")
    if not self._replace and batch_size > self.num_rows:
      raise ValueError(
        f"batch_size must be at most {self.num_rows}, the rows with a positive "
        f"weight, to draw without replacement, got {batch_size}."
      )
    uniforms = np.random.default_rng([self._seed, step]).random(batch_size)
    return self._rows[self._select(uniforms)]

  def _select(self, uniforms: np.ndarray) -> np.ndarray:
    """Positions among the positive weights, for numbers in [0, 1)."""
    if self._replace:
      return self._position(uniforms * self._ends[-1])
    taken = []  # In order.
    chosen = np.empty(uniforms.size, np.int64)
    remaining = self._ends[-1]
    for i, uniform in enumerate(uniforms):
      # A point of what is left, moved past the rows that were taken out.
      point = uniform * max(remaining, 0.0)
      for row in taken:
        if point < self._ends[row] - self._weights[row]:
          break
        point += self._weights[row]
      row = int(self._position(point))
      # Rounding may leave the point on the edge of a row that is gone.
      while row in taken:
        row = (row + 1) % self.num_rows
      bisect.insort(taken, row)
      remaining -= self._weights[row]
      chosen[i] = row
    return chosen

  def _position(self, points: np.ndarray) -> np.ndarray:
    # The right side: a point on the border of two rows is in the second.
    found = np.searchsorted(self._ends, points, side="right")
    return np.minimum(found, self.num_rows - 1)


def scale_steps(
  num_steps: int, weights: np.ndarray, *, num_rows: int | None = None
) -> int:
  """Steps in proportion to the share ρ of rows that can be drawn: ⌊ρ n⌋.

  Args:
    num_steps: n, for all rows.
    weights: any shape, as for `PrioritySampler`.
    num_rows: rows of the data set; the number of weights by default. For
      `[N, K]` candidates it is N, so that ρ adds up over the K.

  Returns:
    The number of steps, counted in integers: the product with a rounded
    share may fall just short.
  """
  weights = np.asarray(weights)
  if num_rows is None:
    num_rows = weights.size
  return num_steps * int(np.count_nonzero(weights > 0)) // num_rows


# Helpers.


def _read_bytes(path: str | os.PathLike) -> bytes:
  """The content of a file, unpacked if its name ends in `.gz`."""
  content = pathlib.Path(path).read_bytes()
  if not str(path).endswith(".gz"):
    return content
  try:
    return gzip.decompress(content)
  except (OSError, EOFError) as error:
    raise ValueError(f"{path}: not a gzip file ({error}).") from error


def _placed_lines(
  path: str | os.PathLike,
) -> Iterator[tuple[str, Row | ValueError]]:
  """The rows of a .jsonl file, see `load_placed_rows`."""
  place = None
  for number, line in enumerate(_read_bytes(path).split(b"\n"), start=1):
    if not line.strip():
      continue
    place = f"{path}:{number}"
    try:
      row = json.loads(line.decode("utf-8"))
    except ValueError as error:  # Bad UTF-8 as well as bad JSON.
      yield place, ValueError(f"{place}: not JSON ({error}).")
    else:
      yield place, _object(row, place)
  if place is None:
    raise ValueError(f"{path}: no rows.")


def _placed_items(
  path: pathlib.Path,
) -> Iterator[tuple[str, Row | ValueError]]:
  """The rows of a .json file, see `load_placed_rows`."""
  try:
    rows = json.loads(_read_bytes(path).decode("utf-8"))
  except ValueError as error:
    raise ValueError(f"{path}: not JSON ({error}).") from error
  if not isinstance(rows, list):
    raise ValueError(f"{path}: expected a list of JSON objects.")
  if not rows:
    raise ValueError(f"{path}: no rows.")
  for i, row in enumerate(rows):
    yield f"{path}, row {i}", _object(row, f"{path}, row {i}")


def _object(row: Any, place: str) -> Row | ValueError:
  if isinstance(row, dict):
    return row
  return ValueError(f"{place}: expected a JSON object, got {_shorten(row)}.")


def _raised(row: Row | ValueError) -> Row:
  if isinstance(row, ValueError):
    raise row
  return row


def _last_byte(file) -> bytes:
  file.seek(-1, os.SEEK_END)
  return file.read(1)


def _json_line(row: Mapping) -> str:
  def plain(value):
    if isinstance(value, (np.ndarray, np.generic)):
      return value.tolist()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON.")

  return json.dumps(dict(row), ensure_ascii=False, default=plain) + "\n"


def _checked(
  row: Row,
  place: str,
  required: Sequence[str],
  optional: Mapping[str, Any] | None,
) -> Row:
  for field in required:
    if field not in row:
      raise ValueError(f'{place}: "{field}" is missing.')
  return {**(optional or {}), **row}


def _placed_tfds(
  name: str, split: str, data_dir: str | os.PathLike | None
) -> Iterator[tuple[str, Row | ValueError]]:
  """The rows of a tfds data set, see `load_placed_rows`."""
  try:
    import tensorflow_datasets as tfds
    import tensorflow_datasets.text  # Registers gsm8k and its like.
  except ImportError as error:
    raise ValueError(
      f'"tfds:{name}" needs `pip install tensorflow-datasets` ({error}).'
    ) from error
  try:
    source = tfds.data_source(
      name,
      split=split,
      data_dir=data_dir,
      download=False,
      builder_kwargs={"file_format": "array_record"},
    )
  except Exception as error:  # tfds raises a dozen unrelated types here.
    raise ValueError(
      f'"tfds:{name}" has no prepared split {split!r} in '
      f"{data_dir or 'the default folder of tfds'} "
      f"({type(error).__name__}: {_first_line(error)}). Prepare it once with "
      f'tfds.builder("{name}", file_format="array_record")'
      ".download_and_prepare()."
    ) from error
  if not len(source):
    raise ValueError(f'"tfds:{name}": split {split!r} has no rows.')
  for i in range(len(source)):
    place = f"tfds:{name}, row {i}"
    try:
      row = _plain(source[i])
    except UnicodeDecodeError as error:
      row = ValueError(f"{place}: not UTF-8 ({error}).")
    yield place, row


def _plain(value: Any) -> Any:
  """Numpy and bytes, as tfds gives them, to what JSON would hold."""
  if isinstance(value, Mapping):
    return {key: _plain(item) for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [_plain(item) for item in value]
  if isinstance(value, (np.ndarray, np.generic)):
    return _plain(value.tolist())
  return value.decode("utf-8") if isinstance(value, bytes) else value


def _encode(tokenizer, text: str, *, add_special_tokens: bool) -> list[int]:
  try:
    return tokenizer.encode(text, add_special_tokens=add_special_tokens)
  except Exception as error:  # The backend raises bare Exceptions.
    raise ValueError(
      f"The tokenizer {_name(tokenizer)} cannot encode {_shorten(text)}: "
      f"{_first_line(error)}."
    ) from error


def _encode_start(tokenizer, text: str) -> list[int]:
  """The ids of a text that stands at the start, with one start token."""
  start = tokenizer.bos_token
  has_start = bool(start) and text.startswith(start)
  return _encode(tokenizer, text, add_special_tokens=not has_start)


def _survives(tokenizer, text: str) -> bool:
  try:
    ids = _encode(tokenizer, text, add_special_tokens=False)
  except ValueError:
    return False
  back = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
  # Tokenizers of the SentencePiece kind may add or drop a blank in front, and
  # those of words set their own between them.
  return "".join(back.split()) == "".join(text.split())


def _lost_parts(tokenizer, text: str) -> list[str]:
  """Words of a text that a tokenizer cannot write, or characters of them."""
  splitter = tokenizer.backend_tokenizer.pre_tokenizer
  spans = splitter.pre_tokenize_str(text) if splitter else [(text, (0, None))]
  found = {}
  for _, (start, end) in spans:
    word = text[start:end].strip()
    if word and not _survives(tokenizer, word):
      lost = [c for c in word if not _survives(tokenizer, c)]
      # A tokenizer of words has no characters to name.
      found |= dict.fromkeys(lost if 0 < len(lost) < len(word) else [word])
  return list(found)


def _has_unknown(tokenizer, ids: Sequence[int]) -> bool:
  unknown = tokenizer.unk_token_id
  # Byte-level tokenizers name an unknown token that they never produce, and
  # that may be the start or end token.
  if unknown in (None, tokenizer.bos_token_id, tokenizer.eos_token_id):
    return False
  return unknown in ids


def _name(tokenizer) -> str:
  return repr(
    getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
  )


def _shorten(value: Any, limit: int = 60) -> str:
  text = repr(value)
  return text if len(text) <= limit else f"{text[: limit - 3]}..."


def _first_line(error: Exception) -> str:
  return (str(error).splitlines() or [""])[0].rstrip(".")


def _pad(
  ids: Sequence[Sequence[int]],
  length: int | None,
  buckets: Sequence[int] | None,
  pad_id: int,
  *,
  left: bool,
) -> tuple[np.ndarray, np.ndarray]:
  lengths = np.array([len(row) for row in ids], np.int64)
  longest = int(lengths.max(initial=0))
  if length is None:
    length = bucket_length(longest, buckets)
  if longest > length:
    raise ValueError(
      f"Row {int(lengths.argmax())} has {longest} tokens, the length is "
      f"{length}."
    )
  columns = np.arange(length)
  if left:
    mask = columns >= length - lengths[:, None]  # [B, P]
  else:
    mask = columns < lengths[:, None]
  padded = np.full(mask.shape, pad_id, np.int32)
  # True entries are visited row by row, which is the order of the tokens.
  padded[mask] = [token for row in ids for token in row]
  return padded, mask


def _byte_level_alphabet() -> dict[str, int]:
  """Character -> byte in the vocabularies of byte-level BPE.

  Printable characters of Latin-1 stand for their own code; the other bytes,
  in order, for the characters from U+0100 on.

  Source:
    Radford et al. (2019), "Language Models are Unsupervised Multitask
    Learners", section 2.2, as their released vocabulary spells it.
  """
  printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
  others = [byte for byte in range(256) if byte not in printable]
  alphabet = {chr(byte): byte for byte in printable}
  alphabet.update({chr(0x100 + i): byte for i, byte in enumerate(others)})
  return alphabet


_ALPHABET = _byte_level_alphabet()
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _decode_piece(piece: str | bytes, decoder: Mapping) -> str | bytes:
  """What one decoder of a tokenizer.json makes of one token."""
  kind = decoder["type"]
  if kind == "Sequence":
    for inner in decoder["decoders"]:
      piece = _decode_piece(piece, inner)
    return piece
  # Fuse joins; Strip trims the front of the whole text, not of each token.
  if isinstance(piece, bytes) or kind in ("Fuse", "Strip"):
    return piece
  if kind == "ByteLevel":
    # Added tokens may hold characters outside the alphabet: then they are
    # text as it stands.
    if all(character in _ALPHABET for character in piece):
      return bytes(_ALPHABET[character] for character in piece)
    return piece.encode("utf-8")
  if kind == "ByteFallback":
    match = _BYTE_TOKEN.fullmatch(piece)
    return bytes([int(match[1], 16)]) if match else piece
  if kind == "Metaspace":
    return piece.replace(decoder["replacement"], " ")
  if kind == "Replace" and "String" in decoder["pattern"]:
    return piece.replace(decoder["pattern"]["String"], decoder["content"])
  raise ValueError(
    f"token_bytes does not know the decoder {kind!r} of this tokenizer."
  )
