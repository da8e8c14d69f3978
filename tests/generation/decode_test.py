"""Tests of the sampler, with a stand-in whose logits are known."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from rljax.generation import decode, stops
from rljax.ops import sampling
from rljax.plan import flops
from tests import stand_in, tiny

VOCAB = 7


def _prompts(rng, batch=3, length=4):
  """Left-padded prompts of 1..length tokens."""
  lengths = rng.integers(1, length + 1, size=batch)
  mask = np.arange(length)[None, :] >= length - lengths[:, None]
  ids = np.where(mask, rng.integers(0, VOCAB, size=(batch, length)), 0)
  return jnp.asarray(ids, jnp.int32), jnp.asarray(mask)


def _sample(seed=0, *, params, ids, mask, model=None, **options):
  options = {"max_length": 6, "settings": sampling.Settings()} | options
  model = model or stand_in.model()
  run = jax.jit(functools.partial(decode.sample, model=model, **options))
  return run(
    jax.random.key(seed), params=params, prompt_ids=ids, prompt_mask=mask
  )


def _log_softmax(x):
  x = x - x.max(-1, keepdims=True)
  return x - np.log(np.exp(x).sum(-1, keepdims=True))


class SampleTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.rng = np.random.default_rng(1)
    self.params = stand_in.random_params(self.rng)
    self.ids, self.mask = _prompts(self.rng)

  def test_greedy_follows_the_table(self):
    samples = _sample(
      params=self.params,
      ids=self.ids,
      mask=self.mask,
      settings=sampling.Settings(greedy=True),
      num_samples=2,
    )
    table = np.asarray(self.params["table"])
    for row in range(6):
      prompt = row // 2
      token = int(self.ids[prompt, -1])
      position = int(self.mask[prompt].sum()) - 1
      for t in range(6):
        log_probs = _log_softmax(table[position, token].astype(np.float64))
        token = int(log_probs.argmax())
        self.assertEqual(int(samples.response_ids[row, t]), token)
        np.testing.assert_allclose(
          samples.log_probs[row, t], log_probs[token], rtol=1e-5
        )
        position += 1
    self.assertTrue(bool(samples.response_mask.all()))
    self.assertFalse(bool(samples.finished.any()))

  def test_frequencies(self):
    # 4000 first tokens of one prompt: a share p has the standard error
    # sqrt(p (1 - p) / 4000) < 0.008; 4 of them are 0.032.
    samples = _sample(
      params=self.params,
      ids=self.ids[:1],
      mask=self.mask[:1],
      num_samples=4000,
      max_length=2,
    )
    table = np.asarray(self.params["table"])
    length = int(self.mask[0].sum())
    expected = np.exp(_log_softmax(table[length - 1, int(self.ids[0, -1])]))
    first = np.asarray(samples.response_ids[:, 0])
    shares = np.bincount(first, minlength=VOCAB) / len(first)
    np.testing.assert_allclose(shares, expected, atol=0.032)
    # And the second token given the most frequent first one.
    common = int(shares.argmax())
    second = np.asarray(samples.response_ids[first == common, 1])
    expected = np.exp(_log_softmax(table[length, common]))
    shares = np.bincount(second, minlength=VOCAB) / len(second)
    np.testing.assert_allclose(shares, expected, atol=0.06)

  def test_temperature_and_allowed_tokens(self):
    allowed = jnp.array([False, True, True, False, True, True, False])
    settings = sampling.Settings(temperature=0.5)
    samples = _sample(
      params=self.params,
      ids=self.ids,
      mask=self.mask,
      settings=settings,
      allowed=allowed,
      num_samples=50,
      max_length=1,
    )
    drawn = np.asarray(samples.response_ids[:, 0])
    self.assertTrue(np.asarray(allowed)[drawn].all())
    table = np.asarray(self.params["table"])
    for row in range(0, 150, 50):
      prompt = row // 50
      position = int(self.mask[prompt].sum()) - 1
      logits = table[position, int(self.ids[prompt, -1])] / 0.5
      logits = np.where(np.asarray(allowed), logits, -np.inf)
      np.testing.assert_allclose(
        samples.log_probs[row, 0], _log_softmax(logits)[drawn[row]], rtol=1e-5
      )

  def test_forced_tokens(self):
    # 5 comes first and behind every 2; all else is drawn as it would be.
    forced = np.full(VOCAB + 1, -1, np.int32)
    forced[VOCAB] = forced[2] = 5
    options = dict(
      params=self.params,
      ids=self.ids,
      mask=self.mask,
      num_samples=20,
      stop_ids=(0,),
      pad_id=2,  # What follows the end is not forced.
    )
    samples = _sample(forced=forced, **options)
    ids = np.asarray(samples.response_ids)
    alive = np.asarray(samples.response_mask)
    after_two = (ids[:, :-1] == 2) & alive[:, 1:]
    self.assertGreater(after_two.sum(), 4)
    self.assertTrue((ids[:, 0] == 5).all())
    self.assertTrue((ids[:, 1:][after_two] == 5).all())
    self.assertTrue((ids[~alive] == 2).all())
    is_forced = np.zeros_like(alive)
    is_forced[:, 0], is_forced[:, 1:] = True, after_two
    table = np.asarray(self.params["table"], np.float64)
    for row, step in np.argwhere(alive):
      found = float(samples.log_probs[row, step])
      if is_forced[row, step]:
        self.assertEqual(found, 0.0)
        continue
      position = int(self.mask[row // 20].sum()) + step - 1
      expected = _log_softmax(table[position, ids[row, step - 1]])
      self.assertAlmostEqual(found, expected[ids[row, step]], places=4)
    # A table that forces nothing changes nothing.
    free = _sample(forced=np.full(VOCAB + 1, -1, np.int32), **options)
    np.testing.assert_array_equal(
      free.response_ids, _sample(**options).response_ids
    )

  def test_truncation_is_told_apart(self):
    samples = _sample(
      params=self.params,
      ids=self.ids,
      mask=self.mask,
      settings=sampling.Settings(top_k=2),
      num_samples=20,
    )
    full = np.asarray(samples.log_probs)
    truncated = np.asarray(samples.truncated_log_probs)
    self.assertTrue((truncated >= full).all())
    self.assertGreater((truncated - full).max(), 0.01)
    # Two tokens are left, so each step has at most two different ones.
    first = np.asarray(samples.response_ids[:20, 0])
    self.assertLessEqual(len(set(first.tolist())), 2)

  def test_stop_id_ends_a_row_and_counts(self):
    samples = _sample(
      params=self.params,
      ids=self.ids,
      mask=self.mask,
      stop_ids=(3,),
      num_samples=40,
      max_length=8,
      pad_id=5,
    )
    ids = np.asarray(samples.response_ids)
    mask = np.asarray(samples.response_mask)
    some_ended, some_ran_out = False, False
    for row_ids, row_mask, finished in zip(
      ids, mask, np.asarray(samples.finished), strict=True
    ):
      stops = np.flatnonzero(row_ids[row_mask] == 3)
      length = row_mask.sum()
      self.assertTrue(row_mask[:length].all())
      if finished:
        some_ended = True
        np.testing.assert_array_equal(stops, [length - 1])
        self.assertTrue((row_ids[length:] == 5).all())
      else:
        some_ran_out = True
        self.assertEqual(length, 8)
        self.assertEqual(len(stops), 0)
    self.assertTrue(some_ended and some_ran_out)
    self.assertTrue((np.asarray(samples.log_probs)[~mask] == 0).all())

  def test_a_least_length_before_the_stop_id(self):
    options = {
      "params": self.params,
      "ids": self.ids,
      "mask": self.mask,
      "stop_ids": (3,),
      "num_samples": 40,
      "max_length": 8,
      "min_new_tokens": 4,
    }
    samples = _sample(**options)
    mask = np.asarray(samples.response_mask)
    lengths, finished = mask.sum(1), np.asarray(samples.finished)
    # Four tokens, then the stop id at the earliest.
    self.assertTrue((np.asarray(samples.response_ids)[:, :4] != 3).all())
    self.assertEqual(lengths[finished].min(), 5)
    # The policy's own probabilities are as without; what was drawn from is not.
    full = np.asarray(samples.log_probs)
    truncated = np.asarray(samples.truncated_log_probs)
    self.assertGreater((truncated - full)[:, :4].min(), 0)
    np.testing.assert_allclose(
      full[:, 4:][mask[:, 4:]], truncated[:, 4:][mask[:, 4:]], rtol=1e-5
    )
    greedy = _sample(**options | {"settings": sampling.Settings(greedy=True)})
    self.assertTrue((np.asarray(greedy.response_ids)[:, :4] != 3).all())

  def test_lengths_limit_each_row(self):
    lengths = jnp.array([1, 4, 6], jnp.int32)
    samples = _sample(
      params=self.params, ids=self.ids, mask=self.mask, lengths=lengths
    )
    np.testing.assert_array_equal(
      np.asarray(samples.response_mask).sum(1), lengths
    )
    self.assertFalse(bool(samples.finished.any()))

  def test_pad_id_that_is_the_stop_id_stays_in_the_mask(self):
    # Peers lose the end token when the pad token is the same token.
    samples = _sample(
      params=self.params,
      ids=self.ids,
      mask=self.mask,
      stop_ids=(3,),
      pad_id=3,
      num_samples=40,
    )
    ids = np.asarray(samples.response_ids)
    mask = np.asarray(samples.response_mask)
    last = mask.sum(1) - 1
    ended = np.asarray(samples.finished)
    self.assertTrue((ids[np.arange(len(ids)), last][ended] == 3).all())
    self.assertTrue(ended.any())

  def test_early_exit(self):
    # A table that sends every token to 3 at once: one draw ends all rows, and
    # the loop must not run on to max_length.
    table = np.full((32, VOCAB, VOCAB), -50.0)
    table[:, :, 3] = 50.0
    calls = []

    class Counting(stand_in.TableModel):
      def decode(self, ids, cache):
        jax.debug.callback(lambda: calls.append(1))
        return super().decode(ids, cache)

    model = Counting(stand_in.model().config)
    samples = _sample(
      params=stand_in.params(table),
      ids=self.ids,
      mask=self.mask,
      model=model,
      stop_ids=(3,),
      max_length=20,
    )
    jax.block_until_ready(samples.response_ids)
    jax.effects_barrier()
    np.testing.assert_array_equal(np.asarray(samples.response_mask).sum(1), 1)
    self.assertEmpty(calls)

  def test_samples_do_not_depend_on_the_batch(self):
    whole = _sample(
      params=self.params, ids=self.ids, mask=self.mask, num_samples=3
    )
    # One prompt alone, under its own index, and the batch in another order.
    alone = _sample(
      params=self.params,
      ids=self.ids[1:2],
      mask=self.mask[1:2],
      num_samples=3,
      prompt_indices=jnp.array([1]),
    )
    np.testing.assert_array_equal(whole.response_ids[3:6], alone.response_ids)
    order = np.array([2, 0, 1])
    turned = _sample(
      params=self.params,
      ids=self.ids[order],
      mask=self.mask[order],
      num_samples=3,
      prompt_indices=jnp.asarray(order),
    )
    rows = (order[:, None] * 3 + np.arange(3)).reshape(-1)
    np.testing.assert_array_equal(whole.response_ids[rows], turned.response_ids)
    # More samples leave the first ones as they are; pads leave all.
    more = _sample(
      params=self.params, ids=self.ids, mask=self.mask, num_samples=5
    )
    np.testing.assert_array_equal(
      whole.response_ids.reshape(3, 3, -1),
      more.response_ids.reshape(3, 5, -1)[:, :3],
    )
    padded = _sample(
      params=self.params,
      ids=jnp.pad(self.ids, ((0, 0), (3, 0))),
      mask=jnp.pad(self.mask, ((0, 0), (3, 0))),
      num_samples=3,
    )
    np.testing.assert_array_equal(whole.response_ids, padded.response_ids)
    other = _sample(
      1, params=self.params, ids=self.ids, mask=self.mask, num_samples=3
    )
    self.assertTrue(bool((whole.response_ids != other.response_ids).any()))

  def test_devices_do_not_change_samples(self):
    ids, mask = _prompts(self.rng, batch=8)
    single = _sample(params=self.params, ids=ids, mask=mask, num_samples=2)
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    spread = _sample(
      params=self.params,
      ids=jax.device_put(ids, rows),
      mask=jax.device_put(mask, rows),
      num_samples=2,
    )
    np.testing.assert_array_equal(single.response_ids, spread.response_ids)
    np.testing.assert_array_equal(single.response_mask, spread.response_mask)

  def test_bad_numbers(self):
    with self.assertRaisesRegex(ValueError, "num_samples must be positive"):
      _sample(params=self.params, ids=self.ids, mask=self.mask, num_samples=0)
    with self.assertRaisesRegex(ValueError, "max_length"):
      _sample(params=self.params, ids=self.ids, mask=self.mask, max_length=0)
    with self.assertRaisesRegex(ValueError, "cache_parts must be positive"):
      _sample(params=self.params, ids=self.ids, mask=self.mask, cache_parts=0)


class RealModelTest(parameterized.TestCase):
  """The log-probabilities that the sampler returns are the trainer's."""

  def test_parameters_are_narrowed_once(self):
    """The loop reads bfloat16 matrices, and draws as before."""
    config = tiny.llama_config(dtype=jnp.bfloat16)
    model, params = tiny.model(config), tiny.params(config)
    ids, mask = _prompts(np.random.default_rng(0))
    options = {"max_length": 4, "settings": sampling.Settings()}

    def run(params):
      return decode.sample(
        jax.random.key(0), model, params, ids, mask, **options
      )

    (loop,) = (
      e for e in jax.make_jaxpr(run)(params).eqns if e.primitive.name == "while"
    )
    matrices = [
      x.aval.dtype
      for x in loop.invars
      if x.aval.shape
      in {p.shape for p in jax.tree.leaves(params) if p.ndim > 1}
    ]
    self.assertGreaterEqual(len(matrices), 14)
    self.assertEqual(set(matrices), {jnp.dtype(jnp.bfloat16)})

  @parameterized.parameters("gpt2", "llama")
  def test_log_probs_are_the_full_forward_passes(self, family):
    config = {"gpt2": tiny.gpt2_config, "llama": tiny.llama_config}[family]()
    model, params = tiny.model(config), tiny.params(config)
    vocab = model.config.vocab_size
    rng = np.random.default_rng(0)
    lengths = np.array([2, 5, 3])
    mask = jnp.asarray(np.arange(5)[None] >= 5 - lengths[:, None])
    ids = jnp.asarray(rng.integers(0, vocab, (3, 5)), jnp.int32)
    allowed = jnp.asarray(rng.random(vocab) < 0.8)
    samples = _sample(
      params=params,
      ids=ids,
      mask=mask,
      model=model,
      settings=sampling.Settings(temperature=0.7),
      allowed=allowed,
      num_samples=4,
      max_length=6,
      stop_ids=(int(np.flatnonzero(allowed)[0]),),
    )
    repeat = lambda x: jnp.repeat(x, 4, axis=0)
    full_ids = jnp.concatenate([repeat(ids), samples.response_ids], axis=1)
    full_mask = jnp.concatenate([repeat(mask), samples.response_mask], axis=1)
    hidden = model.apply({"params": params}, full_ids, full_mask)
    logits = model.apply({"params": params}, hidden, method="logits")
    logits = np.asarray(logits, np.float64)[:, 4:-1] / 0.7
    logits = np.where(np.asarray(allowed), logits, -np.inf)
    expected = np.take_along_axis(
      _log_softmax(logits), np.asarray(samples.response_ids)[..., None], -1
    )[..., 0]
    gap = np.where(samples.response_mask, samples.log_probs - expected, 0.0)
    self.assertLess(np.abs(gap).max(), 1e-5)


class CacheRoomsTest(parameterized.TestCase):
  """The cache of responses grows in parts."""

  @parameterized.parameters(
    ("gpt2", {}, (16,)),
    ("llama", {}, (3, 7, 11)),
    ("llama", {"windows": (12, None)}, (3, 7, 11)),  # One is filled in turns.
    ("llama", {"scan_layers": True, "num_layers": 4}, (3, 7, 11)),
  )
  def test_samples_are_those_of_one_part(self, family, fields, stop_ids):
    config = {"gpt2": tiny.gpt2_config, "llama": tiny.llama_config}[family]
    config = config(**fields)
    ids, mask = _prompts(np.random.default_rng(0), batch=3, length=5)
    sample = functools.partial(
      _sample,
      params=tiny.params(config),
      ids=ids,
      mask=mask,
      model=tiny.model(config),
      num_samples=4,
      max_length=27,
      stop_ids=stop_ids,
      min_new_tokens=3,
      lengths=jnp.array([27, 9, 16, 17] * 3, jnp.int32),
    )
    whole, parts = sample(cache_parts=1), sample(cache_parts=4)
    ends = np.asarray(whole.response_mask).sum(1)
    self.assertGreater(len({-(-end // 8) for end in ends}), 2)  # Parts end in.
    self.assertTrue(bool(whole.finished.any()))
    self.assertIn(27, ends)
    for name in ("response_ids", "response_mask", "finished"):
      np.testing.assert_array_equal(whole[name], parts[name])
    for name in ("log_probs", "truncated_log_probs"):
      np.testing.assert_allclose(whole[name], parts[name], rtol=2e-5, atol=1e-5)

  @parameterized.parameters(
    (27, 4, (8, 16, 24, 27)),
    (32, 4, (8, 16, 24, 32)),
    (5, 4, (5,)),
    (9, 9, (8, 9)),
    (1, None, (1,)),
    (1023, None, (1023,)),
    (1024, None, (512, 1024)),
    (1500, None, (752, 1500)),
    (4096, None, (1024, 2048, 3072, 4096)),
  )
  def test_rooms(self, max_length, num_parts, rooms):
    self.assertEqual(decode.cache_rooms(max_length, num_parts), rooms)

  def test_a_step_reads_the_room_that_there_is(self):
    config = tiny.llama_config(max_positions=4096)
    ids, mask = _prompts(np.random.default_rng(0))
    run = functools.partial(
      decode.sample,
      model=tiny.model(config),
      max_length=2000,
      settings=sampling.Settings(),
    )
    traced = jax.make_jaxpr(run)(
      jax.random.key(0),
      params=tiny.params(config),
      prompt_ids=ids,
      prompt_mask=mask,
    )
    loops = [x for x in traced.eqns if x.primitive.name == "while"]
    rooms = [
      {x.aval.shape[2] for x in loop.outvars if x.aval.ndim == 4}
      for loop in loops
    ]
    self.assertEqual(rooms, [{672}, {1344}, {2000}])
    counted = flops.count(traced)
    self.assertEqual(counted.loops, [672, 672, 656])
    self.assertEqual(counted.rounds, 2000)


class StopTableTest(parameterized.TestCase):
  TOKENS = (b"a", b"b", b"ab", b"c\n\nd", b"\n", b"", b"Que", b"stion:")

  def _found(self, strings, ids):
    """Index of the token that completes a stop string, or None."""
    table = stops.table(strings, self.TOKENS)
    state = 0
    for i, token in enumerate(ids):
      state = table[state, token]
      if state == table.shape[0] - 1:
        return i
    return None

  @parameterized.parameters(
    (["ab"], [0, 1], 1),
    (["ab"], [0, 0, 1], 2),
    (["ab"], [1, 0, 0], None),
    (["aab"], [0, 0, 0, 1], 3),  # Falls back from aa to a.
    (["bab"], [1, 2], 1),  # Across a token border.
    (["\n\n"], [3], 0),  # Inside a token.
    (["\n\n"], [4, 5, 4], 2),  # A special token adds nothing.
    (["zz", "b"], [0, 0, 1], 2),
    (["xab", "b"], [2], 0),  # A suffix of another one.
    (["Question:"], [6, 7], 1),
    (["Question:"], [7, 6], None),
  )
  def test_by_hand(self, strings, ids, expected):
    self.assertEqual(self._found(strings, ids), expected)

  def test_equals_search_in_the_text(self):
    rng = np.random.default_rng(0)
    tokens = [b"a", b"b", b"ab", b"ba", b"aab", b"", b"c"]
    hits = 0
    for _ in range(300):
      strings = [
        "".join(rng.choice(list("abc"), size=rng.integers(1, 5)))
        for _ in range(rng.integers(1, 4))
      ]
      table = stops.table(strings, tokens)
      state, text, found = 0, b"", False
      for token in rng.integers(0, len(tokens), size=8):
        text += tokens[token]
        state = table[state, token]
        found = any(s.encode() in text for s in strings)
        self.assertEqual(bool(state == table.shape[0] - 1), found)
      hits += found
    self.assertBetween(hits, 50, 299)

  def test_sampler_stops_at_strings(self):
    rng = np.random.default_rng(3)
    params = stand_in.random_params(rng)
    ids, mask = _prompts(rng)
    tokens = [b"a", b"b", b"c", b"d", b"ab", b"x", b""]
    table = stops.table(["ab", "dx"], tokens)
    samples = _sample(
      params=params,
      ids=ids,
      mask=mask,
      stop_strings=table,
      num_samples=40,
      max_length=8,
    )
    for row_ids, row_mask, finished in zip(
      np.asarray(samples.response_ids),
      np.asarray(samples.response_mask),
      np.asarray(samples.finished),
      strict=True,
    ):
      pieces = [tokens[i] for i in row_ids[row_mask]]
      text, before = b"".join(pieces), b"".join(pieces[:-1])
      has_end = lambda t: b"ab" in t or b"dx" in t
      self.assertEqual(has_end(text), bool(finished))
      self.assertFalse(has_end(before))
    self.assertTrue(bool(samples.finished.any()))

  def test_bad_strings(self):
    with self.assertRaisesRegex(ValueError, "non-empty"):
      stops.table([], self.TOKENS)
    with self.assertRaisesRegex(ValueError, "non-empty"):
      stops.table(["a", ""], self.TOKENS)


if __name__ == "__main__":
  absltest.main()
