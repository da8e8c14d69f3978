"""The grammar of board games as arrays, to constrain a sampler.

`grammar` turns the parser of `rules` into the tables of `grammars.Tables`;
`places` returns where in it the responses to prompts begin, and what may begin
there. The arrays are numpy's: nothing here needs jax.

The grammar has words and their order, but not which pieces were defined: a text
of it may fail the checks of `rules`.
"""

import functools
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from rljax.tasks.games import rules

MAX_STACK = 96  # States of the parser; the games of ludax need 32.


def grammar(tokenizer: Any, vocab_size: int) -> dict[str, np.ndarray]:
  """Makes the tables of the parser, over the tokens of a tokenizer.

  Args:
    tokenizer: of words, as of `rules.grammar_tokenizer`: each token is a word
      of the language, or is never drawn.
    vocab_size: V of the model, which may have more tokens.

  Returns:
    The fields of `grammars.Tables`.

  Raises:
    ValueError: if ludax is not installed, the tokenizer lacks words, or has no
      end token.
  """
  vocabulary = tokenizer.get_vocab()
  # A tokenizer of natural text has only some of the words, and could write no
  # game.
  words = dict.fromkeys(("(", ")", "game", *rules.vocabulary()))
  missing = [word for word in words if word not in vocabulary]
  if missing or tokenizer.eos_token_id is None:
    lost = ", ".join(missing[:5]) or "an end token"
    if len(missing) > 5:
      lost += f" and {len(missing) - 5} more"
    raise ValueError(
      "The grammar of games needs a tokenizer with its words as tokens and an "
      f"end token; this one lacks {lost}. experiments/sft.py --task=games "
      "--tokenizer=grammar makes one."
    )
  from lark.parsers.lalr_analysis import Shift

  parser = rules._parser()
  states = _table().states
  terminals = {t.name: i for i, t in enumerate(parser.terminals)}
  productions = {rule: i for i, rule in enumerate(parser.rules)}
  heads: dict[str, int] = {}
  for rule in productions:
    heads.setdefault(rule.origin.name, len(heads))
  shape = (len(states), len(terminals))
  found = {
    "terminals": np.full((len(states), vocab_size), len(terminals), np.int16),
    "next_states": np.full(shape, -1, np.int16),
    "reduces": np.zeros(shape, bool),
    "rules": np.zeros(len(states), np.int16),
    "lengths": np.array(
      [len(rule.expansion) for rule in productions], np.int32
    ),
    "heads": np.array(
      [heads[rule.origin.name] for rule in productions], np.int32
    ),
    "gotos": np.full((len(states), len(heads)), -1, np.int16),
    "depths": np.zeros(vocab_size, np.int32),
    "ends": np.zeros(vocab_size, bool),
  }
  found["depths"][vocabulary["("]] = 1
  found["depths"][vocabulary[")"]] = -1
  found["ends"][tokenizer.eos_token_id] = True
  for state, actions in states.items():
    for word, name in _words(state).items():
      found["terminals"][state, vocabulary[word]] = terminals[name]
    by = set()
    for symbol, (action, argument) in actions.items():
      if symbol in heads:
        found["gotos"][state, heads[symbol]] = argument
      elif symbol in terminals and action is Shift:
        found["next_states"][state, terminals[symbol]] = argument
      elif symbol in terminals:
        found["reduces"][state, terminals[symbol]] = True
        by.add(productions[argument])
    if len(by) > 1:
      raise ValueError(
        f"State {state} of the parser reduces by {len(by)} rules, but the "
        "sampler can follow one; the grammar of ludax 1.0.0 has no such state."
      )
    found["rules"][state] = next(iter(by), 0)
  return found


def places(
  prompts: Sequence[str], tokenizer: Any, vocab_size: int
) -> dict[str, np.ndarray]:
  """Returns where the responses to prompts begin.

  Args:
    prompts: N texts as `rules.gap` makes them.
    tokenizer: as for `grammar`.
    vocab_size: V of the model.

  Returns:
    `stack` [N, D], `size` [N] and `seconds` [N, V], see `grammars.constraint`.
    A word may be second if a shortest expression that begins with it fits the
    text on both sides of the gap.

  Raises:
    ValueError: if a prompt has no gap, the text before it does not follow the
      grammar, or nothing fits.
  """
  vocabulary = tokenizer.get_vocab()
  stack = np.zeros((len(prompts), MAX_STACK), np.int32)
  size = np.zeros(len(prompts), np.int32)
  seconds = np.zeros((len(prompts), vocab_size), bool)
  for i, prompt in enumerate(prompts):
    states, words = _place(prompt)
    if len(states) >= MAX_STACK:
      raise ValueError(
        f"The prompt {prompt[:60]!r} is nested too deeply: the parser needs "
        f"{len(states)} states, but has room for {MAX_STACK}."
      )
    stack[i, : len(states)] = states
    size[i] = len(states)
    seconds[i, [vocabulary[word] for word in words]] = True
  return {"stack": stack, "size": size, "seconds": seconds}


# A parser that keeps its stack, but builds no tree.

Stack = tuple[int, ...]


@functools.lru_cache(2**16)
def _place(prompt: str) -> tuple[Stack, tuple[str, ...]]:
  """Returns the stack before the gap, and words that may be second."""
  parts = rules.around(prompt)
  if parts is None:
    raise ValueError(
      f"A prompt has the marks {', '.join(rules.MARKERS)} once each, in "
      f"this order, got {prompt[:100]!r}."
    )
  prefix, suffix = map(rules.words, parts)
  before = _feed((_table().start_states["game"],), prefix)
  if before is None:
    raise ValueError(
      f"The text before the gap does not follow the grammar: {parts[0]!r}."
    )
  fits = {}  # By the stack after an expression: few differ.
  terminals = set()
  for expression in _shortest():
    after = _feed(before, expression)
    if after is None:
      continue
    if after not in fits:
      fits[after] = _feed(after, suffix, is_end=True) is not None
    if fits[after]:
      terminals.add(_words(_feed(before, expression[:1])[-1])[expression[1]])
  if not terminals:
    raise ValueError(f"No expression fits into the gap of {prompt[:100]!r}.")
  bracket = _feed(before, ["("])
  words = _words(bracket[-1])
  return before, tuple(word for word in words if words[word] in terminals)


def _feed(
  stack: Stack, words: Sequence[str], *, is_end: bool = False
) -> Stack | None:
  """Returns the stack after more words; None if they break the grammar."""
  from lark.parsers.lalr_analysis import Shift

  table = _table()
  states, end = table.states, table.end_states["game"]
  stack = list(stack)
  for word in [*words, *([None] if is_end else [])]:
    name = "$END" if word is None else _words(stack[-1]).get(word)
    while True:
      action, argument = states[stack[-1]].get(name, (None, None))
      if action is None:
        return None
      if action is Shift:
        stack.append(argument)
        break
      del stack[-len(argument.expansion) :]
      stack.append(states[stack[-1]][argument.origin.name][1])
      if word is None and stack[-1] == end:
        break
  return tuple(stack)


@functools.cache
def _table() -> Any:
  return rules._parser().parser.parser.parser.parse_table


@functools.cache
def _words(state: int) -> dict[str, str]:
  """Maps each word of the language to its terminal in a state."""
  parser = rules._parser()
  return _read(
    parser.parser.lexer.lexers[state],
    frozenset(name for name in _table().states[state] if name.isupper()),
  )


@functools.cache
def _read(lexer: Any, names: frozenset[str]) -> dict[str, str]:
  """Maps each word to its terminal for a lexer that expects these names."""
  import lark
  from lark.utils import TextSlice

  fixed, patterns = {}, []
  for terminal in rules._parser().terminals:
    if terminal.name not in names:
      continue
    if type(terminal.pattern).__name__ == "PatternStr":
      fixed[terminal.pattern.value] = terminal.name
    else:
      patterns.append(terminal.pattern.to_regexp())
  found = {}
  for word in rules.vocabulary():
    if word in fixed:
      found[word] = fixed[word]
    elif any(re.fullmatch(pattern, word) for pattern in patterns):
      # Several may fit: the lexer decides which one it is, and whether it reads
      # the whole word.
      text = TextSlice.cast_from(word)
      try:
        token = lexer.next_token(lexer.make_lexer_state(text))
      except lark.UnexpectedInput:
        continue
      if len(token) == len(word):
        found[word] = token.type
  return found


@functools.cache
def _shortest() -> tuple[tuple[str, ...], ...]:
  """Returns the shortest expressions of each beginning, bracket and word.

  One for each rule and each terminal that may be second: the same word may
  begin expressions of several kinds.
  """
  parser = rules._parser()
  words = {
    terminal.name: terminal.pattern.value
    if type(terminal.pattern).__name__ == "PatternStr"
    else next(
      word
      for word in (rules.GAME, "3")
      if re.fullmatch(terminal.pattern.to_regexp(), word)
    )
    for terminal in parser.terminals
    if terminal.name != "WS"
  }
  # By nonterminal and first terminal; shorter ones replace longer ones.
  best = {name: {name: (word,)} for name, word in words.items()}
  changes = True
  while changes:
    changes = False
    for rule in parser.rules:
      known = best.setdefault(rule.origin.name, {})
      for first, expression in _derived(rule.expansion, best).items():
        if first not in known or len(expression) < len(known[first]):
          known[first] = expression
          changes = True
  return tuple(
    dict.fromkeys(
      (words["LPAR"], *expression)
      for rule in parser.rules
      if rule.expansion[0].name == "LPAR"
      for expression in _derived(rule.expansion[1:], best).values()
    )
  )


def _derived(
  symbols: Sequence[Any], best: dict[str, dict[str, tuple[str, ...]]]
) -> dict[str, tuple[str, ...]]:
  """Returns the shortest words of symbols, by their first terminal."""
  rest: tuple[str, ...] = ()
  for symbol in symbols[1:]:
    known = best.get(symbol.name)
    if not known:
      return {}
    rest += min(known.values(), key=len)
  return {
    first: expression + rest
    for first, expression in best.get(symbols[0].name, {}).items()
  }
