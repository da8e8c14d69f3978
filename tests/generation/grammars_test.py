"""Tests of grammars as arrays, on a grammar whose parser is made by hand."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from rljax.generation import decode, grammars, rollouts
from rljax.ops import sampling
from tests import stand_in

# Tokens. Two of them are the same terminal, and one is none.
END, PAD, OPEN, HEAD, CLOSE, ITEM, OTHER = range(7)


def _tables():
  """E -> ( a L ), L -> L T, L -> T, T -> n, T -> E; states numbered by hand.

  0 .E    1 (.aL)   3 (a.L)   4 (aL.) L.T   8 (aL).
  5 n.    6 L->T.   7 T->E.   9 L->LT.      2 E., where nothing follows
  """
  num_states, num_terminals = 10, 4  # ( a ) n
  next_states = np.full((num_states, num_terminals), -1, np.int16)
  next_states[0, 0] = next_states[3, 0] = next_states[4, 0] = 1
  next_states[1, 1] = 3
  next_states[4, 2] = 8
  next_states[3, 3] = next_states[4, 3] = 5
  reduces = np.zeros((num_states, num_terminals), bool)
  rules = np.zeros(num_states, np.int16)
  for state, rule in ((8, 0), (9, 1), (6, 2), (5, 3), (7, 4)):
    reduces[state, [0, 2, 3]] = True
    rules[state] = rule
  gotos = np.full((num_states, 3), -1, np.int16)  # E L T
  gotos[0, 0] = 2
  gotos[3] = 7, 4, 6
  gotos[4, [0, 2]] = 7, 9
  terminals = np.full(7, num_terminals, np.int16)
  terminals[[OPEN, HEAD, CLOSE, ITEM, OTHER]] = 0, 1, 2, 3, 3
  depths = np.zeros(7, np.int32)
  depths[[OPEN, CLOSE]] = 1, -1
  return grammars.Tables(
    terminals=np.tile(terminals, (num_states, 1)),
    next_states=next_states,
    reduces=reduces,
    rules=rules,
    lengths=np.array([4, 2, 1, 1, 1]),
    heads=np.array([0, 1, 1, 2, 2]),
    gotos=gotos,
    depths=depths,
    ends=np.arange(7) == END,
  )


def _constraint(num_rows, stack_size=24, **options):
  stack = np.zeros((num_rows, stack_size), np.int32)
  return grammars.constraint(
    _tables(),
    **{
      "stack": stack,
      "size": np.ones(num_rows, np.int32),
      "seconds": np.ones((num_rows, 7), bool),
    }
    | options,
  )


@functools.cache
def _expressions(length):
  """All expressions of so many tokens, by the grammar itself."""
  return [(OPEN, HEAD, *items, CLOSE) for items in _lists(length - 3)]


@functools.cache
def _lists(length):
  """All sequences of one or more items of so many tokens."""
  if length < 1:
    return []
  found = []
  for first in range(1, length + 1):
    heads = _expressions(first) if first > 1 else [(ITEM,), (OTHER,)]
    tails = _lists(length - first) if first < length else [()]
    found += [head + tail for head, tail in itertools.product(heads, tails)]
  return found


class AllowedTest(parameterized.TestCase):
  def test_all_short_texts(self):
    # Every beginning of a text continues to one of at most four tokens more
    # for each open bracket.
    texts = [text for n in range(4, 13) for text in _expressions(n)]
    following = {}
    for text in texts:
      for i in range(len(text)):
        following.setdefault(text[:i], set()).add(text[i])
      following.setdefault(text, set()).add(END)
    # A beginning of so many tokens has all its continuations in the list.
    known = [
      start
      for start in following
      if len(start) + 3 + 4 * (start.count(OPEN) - start.count(CLOSE)) <= 12
    ]
    self.assertGreater(len(known), 200)
    run = jax.jit(grammars.Constraint.allowed)
    step = jax.jit(grammars.Constraint.advance)
    for length in range(max(map(len, known)) + 1):
      group = [start for start in known if len(start) == length]
      if not group:
        continue
      constraint = _constraint(len(group))
      place = jax.tree.map(jnp.asarray, constraint.start)
      for column in zip(*group, strict=True):
        place = step(constraint, place, jnp.asarray(column))
      for start, row in zip(
        group, np.asarray(run(constraint, place)), strict=True
      ):
        self.assertEqual(set(np.flatnonzero(row)), following[start], start)

  def test_full_stack_can_only_close(self):
    constraint = _constraint(1, stack_size=7)
    place = constraint.start
    # 0 ( a ( a leaves two of seven states; an item makes it six, a list six.
    for token in (OPEN, HEAD, OPEN, HEAD, ITEM):
      place = constraint.advance(place, jnp.array([token]))
    found = constraint.allowed(place)[0]
    self.assertEqual(set(np.flatnonzero(found)), {OPEN, CLOSE, ITEM, OTHER})
    place = constraint.advance(place, jnp.array([OPEN]))
    self.assertEqual(int(place.size[0]), 7)
    # Nothing closes behind an opening bracket: all that is left is to end.
    found = constraint.allowed(place)[0]
    self.assertEqual(set(np.flatnonzero(found)), {END})

  def test_second_token(self):
    constraint = _constraint(2, seconds=np.eye(7, dtype=bool)[[HEAD, ITEM]])
    place = constraint.start
    first = constraint.allowed(place)
    np.testing.assert_array_equal(first[0], np.eye(7, dtype=bool)[OPEN])
    place = constraint.advance(place, jnp.array([OPEN, OPEN]))
    second = constraint.allowed(place)
    np.testing.assert_array_equal(second[0], np.eye(7, dtype=bool)[HEAD])
    # A contradiction leaves the end alone, or no token could be drawn.
    np.testing.assert_array_equal(second[1], np.eye(7, dtype=bool)[END])

  def test_forbidden_token_is_not_read(self):
    constraint = _constraint(1)
    place = constraint.advance(constraint.start, jnp.array([OPEN]))
    for token in (END, PAD, CLOSE, ITEM):
      after = constraint.advance(place, jnp.array([token]))
      chex.assert_trees_all_equal(
        after._replace(position=place.position), place
      )

  @parameterized.named_parameters(
    ("empty_rule", {}, "has no symbols"),
    ("seconds", {"seconds": np.ones((2, 6), bool)}, "V = 7 tokens"),
    ("stack", {"stack": np.full((2, 24), 10, np.int32)}, "10 states"),
    ("size", {"size": np.zeros(2, np.int32)}, "one or more of the 10"),
  )
  def test_errors(self, options, message):
    with self.assertRaisesRegex(ValueError, message):
      if options:
        _constraint(2, **options)
      else:
        tables = _tables()._replace(lengths=np.array([4, 0, 1, 1, 1]))
        grammars.constraint(
          tables,
          stack=np.zeros((2, 24), np.int32),
          size=np.ones(2, np.int32),
          seconds=np.ones((2, 7), bool),
        )


class SampleTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.params = stand_in.random_params(np.random.default_rng(0))
    self.ids = jnp.array([[PAD, OPEN], [HEAD, OPEN], [OPEN, HEAD]])
    self.mask = jnp.array([[False, True], [True, True], [True, True]])

  def _sample(self, constraint, num_samples=40, **options):
    run = functools.partial(
      decode.sample,
      model=stand_in.model(),
      max_length=16,
      settings=sampling.Settings(),
      stop_ids=(END,),
      num_samples=num_samples,
      **options,
    )
    return jax.jit(run)(
      jax.random.key(0),
      params=self.params,
      prompt_ids=self.ids,
      prompt_mask=self.mask,
      constraint=constraint,
    )

  def test_all_that_end_are_expressions(self):
    samples = self._sample(_constraint(3))
    finished = np.asarray(samples.finished)
    self.assertBetween(finished.mean(), 0.15, 0.9)
    lengths = np.asarray(samples.response_mask).sum(1)
    for row, length in zip(
      np.asarray(samples.response_ids)[finished],
      lengths[finished],
      strict=True,
    ):
      self.assertEqual(row[length - 1], END)
      self.assertIn(tuple(row[: length - 1]), _expressions(length - 1))
    # Without it hardly any is.
    free = self._sample(None)
    self.assertIsNone(free.allowed)
    self.assertLess(np.mean(np.asarray(free.response_ids)[:, 0] == OPEN), 0.6)

  def test_log_probs_are_those_within_the_grammar(self):
    vocabulary = jnp.arange(7) != OTHER
    samples = self._sample(_constraint(3), num_samples=2, allowed=vocabulary)
    self.assertFalse(bool(jnp.any(samples.response_ids == OTHER)))
    table = np.asarray(self.params["table"], np.float64)
    mask = np.asarray(samples.response_mask)
    for row in range(6):
      token = int(self.ids[row // 2, -1])
      position = int(self.mask[row // 2].sum()) - 1
      for t in range(mask[row].sum()):
        logits = table[position, token]
        kept = np.asarray(samples.allowed[row, t])
        self.assertFalse(kept[OTHER])
        token = int(samples.response_ids[row, t])
        self.assertTrue(kept[token])
        expected = logits[token] - np.log(np.exp(logits[kept]).sum())
        self.assertAlmostEqual(
          float(samples.log_probs[row, t]), expected, places=5
        )
        position += 1
    # The trainer finds the same, however it cuts the responses.
    rollout = rollouts.Rollout(
      prompt_ids=jnp.repeat(self.ids, 2, axis=0),
      prompt_mask=jnp.repeat(self.mask, 2, axis=0),
      **samples,
    )
    for chunk_size in (None, 5, 16):
      found, _ = rollouts.token_statistics(
        stand_in.model(),
        self.params,
        rollout,
        temperature=1.0,
        chunk_size=chunk_size,
      )
      np.testing.assert_allclose(
        found.log_probs[mask], samples.log_probs[mask], atol=1e-5
      )
    # Behind the end all are allowed: no row is without a token.
    self.assertTrue(bool(jnp.all(samples.allowed[~samples.response_mask])))


if __name__ == "__main__":
  absltest.main()
