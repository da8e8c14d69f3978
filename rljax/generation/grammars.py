"""Constrains the sampler to a grammar: an LR parser as arrays.

Most errors of a policy that writes a formal language are brackets and words in
the wrong place. Here the parser of a grammar is a few tables, its stacks are
rows of integers, and the tokens that may come next are found on the device,
inside the decode loop, for all rows at once:

  grammar = grammars.of_task(task, tokenizer, vocab_size)
  places = task.places(prompts, tokenizer, vocab_size)
  constraint = grammars.constraint(grammar, **places)
  rollouts.sample(..., constraint=constraint)

An LR parser reads a token by some reductions and one shift. A reduction by a
rule of k symbols pops k states and pushes one. If no rule is empty, a chain of
reductions leaves a lower part of the stack with one new state on top: two
integers. So a chain is followed without copying a stack, and for all tokens at
once where a state reduces by only one rule; the tokens that end in a shift may
come next.

Source:
  Knuth (1965), "On the translation of languages from left to right"; the
  tables are those of any LALR(1) parser generator.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

Array = chex.Array


class Tables(NamedTuple):
  """Holds a parser of S states, T terminals, R rules, K nonterminals, V tokens.

  Attributes:
    terminals: `[S, V]` int, the terminal that a token is in a state of the
      parser; T if it cannot be read there.
    next_states: `[S, T]` int, the state after reading a terminal; -1 where the
      parser does not read, but reduces or fails.
    reduces: `[S, T]` bool, whether it reduces before it reads the terminal.
    rules: `[S]` int, by which rule it does; 0 where it never does.
    lengths: `[R]` int, symbols of a rule; >= 1.
    heads: `[R]` int, the nonterminal of a rule.
    gotos: `[S, K]` int, the state after a nonterminal; -1 if there is none.
    depths: `[V]` int, 1 for a token that opens a bracket, -1 for one that
      closes one, else 0.
    ends: `[V]` bool, the tokens that end a response.
  """

  terminals: Array
  next_states: Array
  reduces: Array
  rules: Array
  lengths: Array
  heads: Array
  gotos: Array
  depths: Array
  ends: Array


def of_task(
  task: Any, tokenizer: Any, vocab_size: int, stop_ids: Sequence[int] = ()
) -> Tables:
  """Makes the tables of a task's grammar for a tokenizer.

  Args:
    task: a module with the functions `grammar` and `places`, such as
      `tasks.games`.
    tokenizer: of the policy.
    vocab_size: V of the policy.
    stop_ids: further tokens that end a response.

  Raises:
    ValueError: if the task has no grammar, or the tokenizer does not fit it.
  """
  check_task(task)
  tables = Tables(**task.grammar(tokenizer, vocab_size))
  ends = np.array(tables.ends)
  ends[list(stop_ids)] = True
  return tables._replace(ends=ends)


def check_task(task: Any) -> None:
  """Raises ValueError for a task without a grammar."""
  if not hasattr(task, "grammar"):
    raise ValueError(
      f"The task {task.__name__.rpartition('.')[2]} has no grammar for its "
      "responses; the task games has one."
    )


class Place(NamedTuple):
  """Holds where N responses are in the grammar.

  Attributes:
    stack: `[N, D]` int32, the states of a parser, the lowest first.
    size: `[N]` int32, how many of them count.
    depth: `[N]` int32, brackets that the response has opened but not closed.
    position: `[N]` int32, tokens that it has.
  """

  stack: Array
  size: Array
  depth: Array
  position: Array


class Constraint(NamedTuple):
  """Keeps `decode.sample` within a grammar.

  Attributes:
    tables: of the parser.
    start: the place where each response begins.
    seconds: `[N, V]` bool, which tokens may be second: the word after the
      bracket says what an expression is, and not all that may begin here fit
      what follows the gap.
  """

  tables: Tables
  start: Place
  seconds: Array

  def repeat(self, num: int) -> "Constraint":
    """Repeats each row `num` times."""
    start, seconds = jax.tree.map(
      lambda x: jnp.repeat(jnp.asarray(x), num, axis=0),
      (self.start, self.seconds),
    )
    return self._replace(start=start, seconds=seconds)

  def take(self, index: Array) -> "Constraint":
    """Selects rows; an index past the last gives the last."""
    start, seconds = jax.tree.map(
      lambda x: jnp.asarray(x).at[index].get(mode="clip"),
      (self.start, self.seconds),
    )
    return self._replace(start=start, seconds=seconds)

  def allowed(self, place: Place) -> Array:
    """Returns `[N, V]` bool: see `allowed`, and `seconds` for token two."""
    among = self.seconds | (place.position != 1)[:, None]
    return allowed(self.tables, place, among)

  def advance(self, place: Place, tokens: Array) -> Place:
    """Reads one token of each row, see `advance`."""
    return advance(self.tables, place, tokens)


def constraint(
  tables: Tables, *, stack: Array, size: Array, seconds: Array
) -> Constraint:
  """Makes a constraint on responses that are one bracketed expression each.

  Args:
    tables: of the parser, numpy or jax arrays.
    stack: `[N, D]` int32, of the parser after the text before the response.
    size: `[N]` int32.
    seconds: `[N, V]` bool, tokens that may be second.

  Returns:
    A pytree, for `decode.sample`.

  Raises:
    ValueError: if a rule of the grammar is empty, or shapes do not fit.
  """
  if int(np.min(tables.lengths)) < 1:
    raise ValueError(
      "A rule of the grammar has no symbols; write the grammar without empty "
      "rules."
    )
  num_states, vocab_size = tables.terminals.shape
  if seconds.shape != (len(size), vocab_size) or stack.shape[0] != len(size):
    raise ValueError(
      f"stack {stack.shape}, size {size.shape} and seconds {seconds.shape} are "
      f"not [N, D], [N] and [N, V] with V = {vocab_size} tokens."
    )
  if int(np.max(stack)) >= num_states or int(np.min(size)) < 1:
    raise ValueError(
      f"A stack must hold one or more of the {num_states} states and nothing "
      "else."
    )
  zeros = np.zeros(len(size), np.int32)
  return Constraint(
    tables=tables,
    start=Place(stack=stack, size=size, depth=zeros, position=zeros),
    seconds=seconds,
  )


def allowed(tables: Tables, place: Place, among: Array | None = None) -> Array:
  """Returns which tokens may come next.

  A response is one expression: it begins with a bracket, ends when its brackets
  are closed, and does not end before. Where no other token is allowed (the
  stack is full, or no token of the vocabulary may follow), it may also end.

  Args:
    tables: of the parser.
    place: N rows.
    among: `[N, V]` bool, tokens to choose from; None for all. End tokens must
      be among them.

  Returns:
    `[N, V]` bool, at least one True in a row if there is an end token.
  """
  tables = Tables(*map(jnp.asarray, tables))
  num_rows, stack_size = place.stack.shape
  num_terminals = tables.next_states.shape[1]
  shifts = tables.next_states >= 0  # [S, T]
  top = _top(place.stack, place.size)

  def reduce(carry):
    pending, found, top, below = carry
    found |= pending & shifts[top]
    pending &= tables.reduces[top]
    top, below = _reduce(
      tables, place.stack, top, below, jnp.any(pending, axis=1)
    )
    return pending, found, top, below

  everything = jnp.ones((num_rows, num_terminals), bool)
  _, found, _, _ = jax.lax.while_loop(
    lambda carry: jnp.any(carry[0]),
    reduce,
    (everything, ~everything, top, place.size - 1),
  )
  # What is not a terminal here is never found.
  found = jnp.pad(found, ((0, 0), (0, 1)))
  found = jnp.take_along_axis(
    found, tables.terminals[top].astype(jnp.int32), axis=1
  )
  # Reading a token adds at most one state.
  closes = (tables.depths < 0)[None]
  found &= closes | (place.size < stack_size)[:, None]
  is_first = place.position == 0
  found &= (tables.depths > 0)[None] | ~is_first[:, None]
  is_over = ~is_first & (place.depth == 0)
  found &= ~is_over[:, None] & ~tables.ends[None]
  if among is not None:
    found &= among
  ends = tables.ends[None] & ~jnp.any(found, axis=1, keepdims=True)
  return found | ends


def advance(tables: Tables, place: Place, tokens: Array) -> Place:
  """Reads one token of each row.

  Args:
    tables: of the parser.
    place: N rows.
    tokens: `[N]` int. A token that `allowed` forbids, and an end token, leave
      the stack of a row as it was.

  Returns:
    The N places after the tokens.
  """
  tables = Tables(*map(jnp.asarray, tables))
  num_rows, stack_size = place.stack.shape
  num_terminals = tables.next_states.shape[1]
  first = _top(place.stack, place.size)
  terminals = tables.terminals[first, tokens].astype(jnp.int32)
  is_known = terminals < num_terminals
  terminals = jnp.where(is_known, terminals, 0)

  def reduce(carry):
    _, top, below = carry
    pending = is_known & tables.reduces[top, terminals]
    top, below = _reduce(tables, place.stack, top, below, pending)
    return pending, top, below

  _, top, below = jax.lax.while_loop(
    lambda carry: jnp.any(carry[0]),
    reduce,
    (jnp.ones(num_rows, bool), first, place.size - 1),
  )
  following = tables.next_states[top, terminals].astype(jnp.int32)
  is_read = is_known & (following >= 0) & (below + 1 < stack_size)
  column = jnp.arange(stack_size)[None]
  stack = jnp.where(column == below[:, None], top[:, None], place.stack)
  stack = jnp.where(column == below[:, None] + 1, following[:, None], stack)
  return Place(
    stack=jnp.where(is_read[:, None], stack, place.stack),
    size=jnp.where(is_read, below + 2, place.size),
    depth=place.depth + jnp.where(is_read, tables.depths[tokens], 0),
    position=place.position + 1,
  )


def _top(stack: Array, size: Array) -> Array:
  return jnp.take_along_axis(stack, size[:, None] - 1, axis=1)[:, 0]


def _reduce(
  tables: Tables, stack: Array, top: Array, below: Array, where: Array
) -> tuple[Array, Array]:
  """Reduces once in the rows `where`; `below` states are under the top."""
  rule = tables.rules[top]
  left = below - (tables.lengths[rule] - 1)
  uncovered = jnp.take_along_axis(
    stack, jnp.maximum(left, 1)[:, None] - 1, axis=1
  )[:, 0]
  goto = tables.gotos[uncovered, tables.heads[rule]].astype(jnp.int32)
  return jnp.where(where, goto, top), jnp.where(where, left, below)
