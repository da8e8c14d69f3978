"""Where responses end: tokens and texts that end them."""

import collections
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from rljax.text import end_tokens, vocabularies


class Ends(NamedTuple):
  """Holds what ends the responses of a policy, and what it may draw.

  Attributes:
    ids: tokens that end a response.
    allowed: `[V]` bool, tokens that may be drawn.
    strings: texts that end a response.
    table: of the strings, see `table`; None without any.
    pieces: the bytes of each token, for `responses.read`; () without strings.
  """

  ids: tuple[int, ...]
  allowed: np.ndarray
  strings: tuple[str, ...]
  table: np.ndarray | None
  pieces: Sequence[bytes]


def ends(
  model: Any,
  tokenizer: Any,
  *,
  stop_at_eos: bool,
  stop_tokens: Sequence[str] = (),
  stop_strings: Sequence[str] = (),
) -> Ends:
  """Finds what ends a response, and the tokens that may be drawn.

  Args:
    model: the policy's module, whose config names end tokens of its own.
    tokenizer: its tokenizer.
    stop_at_eos: whether the end tokens of model and tokenizer end a response;
      else they are never drawn.
    stop_tokens: further ones, which do in any case; see `end_tokens.named_ids`.
    stop_strings: texts that do.

  Raises:
    ValueError: if there is no end token though it is asked for, or one of
      `stop_tokens` is none of the tokenizer's.
  """
  own = getattr(model.config, "eos_token_id", None)
  more = end_tokens.named_ids(tokenizer, stop_tokens)
  if stop_at_eos:
    stop_ids, never = end_tokens.stop_ids(tokenizer, own, more), ()
  else:
    stop_ids, never = more, () if own is None else own
  vocab_size = model.config.vocab_size
  allowed = vocabularies.allowed_tokens(tokenizer, vocab_size, stop_ids)
  never = [never] if isinstance(never, int) else list(never)
  allowed[[id_ for id_ in never if id_ not in stop_ids]] = False
  if not stop_strings:
    return Ends(stop_ids, allowed, (), None, ())
  pieces = vocabularies.token_bytes(tokenizer, vocab_size=vocab_size)
  strings = tuple(stop_strings)
  return Ends(stop_ids, allowed, strings, table(strings, pieces), pieces)


def table(strings: Sequence[str], token_bytes: Sequence[bytes]) -> np.ndarray:
  """Compiles stop strings to a table over token ids.

  The table is the Aho-Corasick automaton of the strings' bytes, run ahead over
  the bytes of each token. So a string is found wherever it begins and ends
  inside tokens, with one look-up per token.

  Args:
    strings: the stop strings, at least one, none empty.
    token_bytes: for each token id the bytes that it adds to the text.

  Returns:
    `[S, V]` int32. `table[s, v]` is the state after token v in state s. State
    0 is the start, the last state means that a string was found.

  Raises:
    ValueError: if there is no string or an empty one.

  Source:
    Aho and Corasick (1975), "Efficient string matching".
  """
  patterns = [string.encode("utf-8") for string in strings]
  if not patterns or not all(patterns):
    raise ValueError(
      f"stop strings must be one or more non-empty strings, got {strings!r}."
    )
  # The trie, then its failure links in breadth-first order.
  children, is_end = [{}], [False]
  for pattern in patterns:
    node = 0
    for byte in pattern:
      if byte not in children[node]:
        children[node][byte] = len(children)
        children.append({})
        is_end.append(False)
      node = children[node][byte]
    is_end[node] = True
  num_nodes = len(children)
  delta = np.zeros((num_nodes + 1, 256), np.int32)
  failure = [0] * num_nodes
  queue = collections.deque()
  for byte, child in children[0].items():
    delta[0, byte] = child
    queue.append(child)
  while queue:
    node = queue.popleft()
    is_end[node] = is_end[node] or is_end[failure[node]]
    delta[node] = delta[failure[node]]
    for byte, child in children[node].items():
      failure[child] = delta[failure[node], byte]
      delta[node, byte] = child
      queue.append(child)
  # One absorbing state stands for every node at which a string has ended.
  found = num_nodes
  ends = np.array([*is_end, True])
  delta = np.where(ends[delta], found, delta).astype(np.int32)
  delta[found] = found

  # Run all states over all tokens, one byte position at a time.
  lengths = np.array([len(b) for b in token_bytes])
  padded = np.zeros((len(token_bytes), max(1, lengths.max())), np.uint8)
  for row, token in zip(padded, token_bytes, strict=True):
    row[: len(token)] = np.frombuffer(token, np.uint8)
  states = np.repeat(np.arange(num_nodes + 1)[:, None], len(token_bytes), 1)
  for position in range(padded.shape[1]):
    stepped = delta[states, padded[None, :, position]]
    states = np.where(position < lengths[None, :], stepped, states)
  return states.astype(np.int32)
