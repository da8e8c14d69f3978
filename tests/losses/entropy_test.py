"""Tests of the token entropy and the batch entropy."""

import functools

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized
from hypothesis import strategies as st

from rljax.losses import entropy
from tests import oracles

SEEDS = st.integers(0, 2**32 - 1)
SHARDS = 8

# Rows of probabilities; their mean; H_bat, H_tok and the difference, in nats.
TABLE = (
  ([(1, 0), (0, 1)], (0.5, 0.5), 0.693147, 0.0, 0.693147),
  ([(1, 0), (1, 0)], (1, 0), 0.0, 0.0, 0.0),
  ([(0.5, 0.5), (0.5, 0.5)], (0.5, 0.5), 0.693147, 0.693147, 0.0),
  ([(0.9, 0.1), (0.1, 0.9)], (0.5, 0.5), 0.693147, 0.325083, 0.368064),
  (
    [(0.7, 0.2, 0.1), (0.1, 0.2, 0.7)],
    (0.4, 0.2, 0.4),
    1.054920,
    0.801819,
    0.253102,
  ),
  ([(0.8, 0.1, 0.1)] * 2, (0.8, 0.1, 0.1), 0.639032, 0.639032, 0.0),
  (np.eye(4), (0.25,) * 4, 1.386294, 0.0, 1.386294),
  (np.eye(4)[[0, 0, 0, 3]], (0.75, 0, 0, 0.25), 0.562335, 0.0, 0.562335),
)


def _logits(rows):
  """`[B, 1, 4]` logits ln p, -inf where p is 0 and where rows are shorter."""
  probs = np.zeros((len(rows), 1, 4))
  probs[:, 0, : len(rows[0])] = rows
  with np.errstate(divide="ignore"):
    return jnp.float32(np.log(probs))


def _batch(seed, shape=(5, 4), vocab_size=6):
  """Random logits, ragged mask (one row empty) and allowed tokens."""
  rng = np.random.default_rng(seed)
  logits = 2 * rng.normal(size=(*shape, vocab_size))
  lengths = rng.integers(1, shape[1] + 1, size=shape[0])
  lengths[rng.integers(shape[0])] = 0
  mask = np.arange(shape[1])[None, :] < lengths[:, None]
  allowed = rng.random(vocab_size) < 0.7
  allowed[rng.choice(vocab_size, 2, replace=False)] = True
  return logits, mask, allowed


def _all_modes(fn, x, mask, *, modes=entropy.MODES, **options):
  """A sum that weighs every mode differently, and all values and metrics."""
  results = [fn(x, mask, mode=mode, **options) for mode in modes]
  values = jnp.stack([value for value, _ in results])
  metrics = {mode: results[i][1] for i, mode in enumerate(modes)}
  weights = jnp.array([1.0, -2.0, 3.0, 0.5])[: len(modes)]
  return jnp.dot(weights, values), (values, metrics)


@functools.partial(
  jax.jit, static_argnames=("temperature", "epsilon", "mask_in_loss")
)
def _values(logits, mask, allowed, **options):
  """The values of all modes, `[4]`, and their metrics."""
  fn = functools.partial(entropy.batch_entropy, allowed=allowed, **options)
  return _all_modes(fn, logits, mask)[1]


@jax.jit
def _gradients(logits, mask, allowed):
  """The gradients of all modes, `[4, B, T, V]`."""
  return jax.jacrev(lambda z: _values(z, mask, allowed)[0])(logits)


class TokenEntropyTest(parameterized.TestCase):
  @chex.all_variants
  def test_hand_computed(self):
    fn = self.variant(entropy.token_entropy)
    rows = np.array([[[0.5, 0.5, 0.0], [0.9, 0.1, 0.0]], [[1, 0, 0]] * 2])
    logits = jnp.log(jnp.float32(rows))
    mask = jnp.array([[True, True], [True, False]])
    # Three tokens: .693147, .325083 and 0.
    found, metrics = fn(logits, mask)
    np.testing.assert_allclose(found, 0.339410, atol=1e-6)
    np.testing.assert_allclose(metrics["entropy/token"], 0.339410, atol=1e-6)
    found, _ = fn(logits, jnp.zeros((2, 2), bool))
    self.assertEqual(found, 0.0)

  @hypothesis.given(seed=SEEDS, temperature=st.floats(0.3, 3.0))
  def test_matches_oracle(self, seed, temperature):
    logits, mask, allowed = _batch(seed)
    found, _ = entropy.token_entropy(
      jnp.float32(logits), mask, temperature=temperature, allowed=allowed
    )
    tokens = oracles.entropies(logits, temperature, allowed)
    np.testing.assert_allclose(found, tokens[mask].mean(), rtol=1e-5, atol=1e-6)

  def test_masked_nan_is_inert(self):
    logits, mask, _ = _batch(0)
    fn = jax.value_and_grad(lambda z: entropy.token_entropy(z, mask)[0])
    clean = fn(jnp.float32(logits))
    dirty = fn(jnp.float32(np.where(mask[..., None], logits, np.nan)))
    chex.assert_trees_all_equal(clean, dirty)
    np.testing.assert_array_equal(dirty[1][~mask], 0.0)
    self.assertGreater(np.abs(dirty[1]).max(), 0.01)

  def test_one_step_up_raises_it(self):
    logits, mask, allowed = _batch(1)
    fn = lambda z: entropy.token_entropy(z, mask, allowed=allowed)[0]
    value, grads = jax.value_and_grad(fn)(jnp.float32(logits))
    self.assertGreater(fn(jnp.float32(logits) + 0.1 * grads), value + 1e-4)


class BatchEntropyTest(parameterized.TestCase):
  @chex.all_variants
  def test_table(self):
    fn = self.variant(
      lambda z, mask: _all_modes(entropy.batch_entropy, z, mask)[1]
    )
    for rows, mean, h_batch, h_token, information in TABLE:
      values, metrics = fn(_logits(rows), jnp.ones((len(rows), 1), bool))
      for i, mode in enumerate(entropy.MODES):
        expected = information if mode == "mi" else h_batch
        np.testing.assert_allclose(values[i], expected, atol=1e-6)
        found = metrics[mode]
        np.testing.assert_allclose(found["entropy/batch"], h_batch, atol=1e-6)
        np.testing.assert_allclose(found["entropy/token"], h_token, atol=1e-6)
        np.testing.assert_allclose(
          found["entropy/batch_max_prob"], max(mean), rtol=1e-6
        )
        # Where two tokens share the first place, rounding chooses.
        winner = mean[int(found["entropy/batch_argmax"])]
        np.testing.assert_allclose(winner, max(mean), rtol=1e-6)

  @parameterized.parameters(-3.0, 0.0, 40.0)
  def test_forbidden_columns(self, fill):
    everything = lambda z: jnp.ones(z.shape[-1:], bool)
    for rows, *_, information in TABLE:
      logits = _logits(rows)
      mask = jnp.ones((len(rows), 1), bool)
      extra = jnp.full((len(rows), 1, 3), fill)
      wide = jnp.concatenate([logits, extra], axis=-1)
      allowed = jnp.arange(wide.shape[-1]) < logits.shape[-1]
      expected, _ = _values(logits, mask, everything(logits))
      found, _ = _values(wide, mask, allowed)
      np.testing.assert_allclose(found, expected, atol=1e-6)
      # The paper's softmax runs over every column, and so sees them; equal
      # rows carry no information (the last value) with or without them.
      found, _ = _values(wide, mask, allowed, mask_in_loss=False)
      difference = np.abs(found - expected)
      self.assertGreater(difference[:3].min(), 1e-3)
      if information:
        self.assertGreater(difference[3], 1e-3)
      same, _ = _values(wide, mask, everything(wide))
      np.testing.assert_allclose(found, same, atol=1e-6)

  @chex.all_variants
  def test_gradient_by_hand(self):
    # p = (.75, .25), (.5, .5); pbar = (.625, .375).
    logits = jnp.array([[[np.log(3), 0.0]], [[0.0, 0.0]]], jnp.float32)
    mask = jnp.ones((2, 1), bool)
    fn = self.variant(
      lambda z: jax.value_and_grad(entropy.batch_entropy, has_aux=True)(z, mask)
    )
    (value, _), grads = fn(logits)
    np.testing.assert_allclose(value, 0.661563, atol=1e-6)
    np.testing.assert_allclose(
      grads[:, 0], [[-0.047890, 0.047890], [-0.063853, 0.063853]], atol=1e-6
    )
    np.testing.assert_allclose(grads.sum(axis=-1), 0.0, atol=1e-7)

  def test_numerical_gradient(self):
    logits, mask, allowed = _batch(7)
    chex.assert_numerical_grads(
      lambda z: _values(z, mask, allowed)[0],
      (jnp.float32(logits),),
      order=1,
      rtol=2e-2,
      atol=2e-2,
    )

  def test_saturated_rows_have_no_gradient(self):
    logits = jnp.array([[[40.0, 0.0]], [[40.0, 0.0]]])
    mask = jnp.ones((2, 1), bool)
    grads = jax.grad(lambda z: entropy.batch_entropy(z, mask)[0])(logits)
    self.assertLess(np.abs(grads).max(), 1e-15)

  @hypothesis.given(
    seed=SEEDS, options=st.sampled_from([(1.0, None), (0.5, 0.01)])
  )
  def test_matches_oracle(self, seed, options):
    temperature, epsilon = options
    logits, mask, allowed = _batch(seed)
    values, metrics = _values(
      jnp.float32(logits),
      mask,
      allowed,
      temperature=temperature,
      epsilon=epsilon,
    )
    for i, mode in enumerate(entropy.MODES):
      expected = oracles.batch_entropy(
        logits, mask, mode, temperature, allowed, epsilon
      )
      found = (
        values[i],
        metrics[mode]["entropy/batch"],
        metrics[mode]["entropy/batch_max_prob"],
        metrics[mode]["entropy/token"],
      )
      np.testing.assert_allclose(
        found, expected, rtol=1e-5, atol=1e-5, err_msg=mode
      )

  @hypothesis.given(seed=SEEDS)
  def test_relations_of_modes(self, seed):
    logits, mask, allowed = _batch(seed)
    (per_step, last, pooled, mi), metrics = _values(
      jnp.float32(logits), mask, allowed
    )
    for each in metrics.values():  # Concavity, and the size of the support.
      self.assertGreaterEqual(
        each["entropy/batch"], each["entropy/token"] - 1e-6
      )
      self.assertLessEqual(each["entropy/batch"], np.log(allowed.sum()) + 1e-6)
    np.testing.assert_allclose(
      mi, per_step - metrics["per_step"]["entropy/token"], atol=1e-6
    )
    self.assertGreaterEqual(pooled, per_step - 1e-6)  # Concavity once more.
    self.assertGreaterEqual(last, 0.0)

    # The order of the rows is irrelevant.
    order = np.random.default_rng(seed).permutation(5)
    permuted, _ = _values(jnp.float32(logits[order]), mask[order], allowed)
    np.testing.assert_allclose(
      permuted, (per_step, last, pooled, mi), atol=1e-5
    )

    # Equal rows: nothing but the token entropy, for one step.
    equal = jnp.broadcast_to(jnp.float32(logits[:1, :1]), (5, 4, 6))
    first = np.ones((5, 4), bool) & (np.arange(4) == 0)[None, :]
    values, metrics = _values(equal, first, allowed)
    h_token = metrics["per_step"]["entropy/token"]
    np.testing.assert_allclose(
      values, [h_token, h_token, h_token, 0.0], atol=2e-6
    )

  def test_modes_agree_on_one_column(self):
    logits, _, allowed = _batch(2, (6, 1))
    mask = np.array([[True]] * 5 + [[False]])
    values, metrics = _values(jnp.float32(logits), mask, allowed)
    np.testing.assert_allclose(values[1], values[0], rtol=1e-6)
    np.testing.assert_allclose(values[2], values[0], rtol=1e-6)
    np.testing.assert_allclose(
      values[3], values[0] - metrics["per_step"]["entropy/token"], atol=1e-6
    )

  def test_ragged_rows_by_hand(self):
    # Step 0: rows a, b, c are certain of tokens 0, 1, 0; step 1: b, c of 1, 1.
    rows = np.eye(2)[[[0, 1], [1, 1], [0, 1]]]
    logits = jnp.log(jnp.float32(rows))
    mask = jnp.array([[True, False], [True, True], [True, True]])
    h = lambda p: -p * np.log(p) - (1 - p) * np.log(1 - p)
    values, metrics = _values(logits, mask, jnp.ones(2, bool))
    for mode, expected, max_prob, winner in (
      # (3 H(2/3) + 2 H(1)) / 5 and (3 * 2/3 + 2 * 1) / 5; token 1 is 3 of 5.
      ("per_step", 3 * h(2 / 3) / 5, 0.8, 1),
      ("mi", 3 * h(2 / 3) / 5, 0.8, 1),  # Certain rows: H_tok = 0.
      ("last", h(2 / 3), 2 / 3, 1),  # a, b, c end on 0, 1, 1.
      ("pooled", h(2 / 5), 0.6, 1),
    ):
      np.testing.assert_allclose(
        values[entropy.MODES.index(mode)], expected, rtol=1e-5
      )
      found = metrics[mode]
      np.testing.assert_allclose(
        found["entropy/batch_max_prob"], max_prob, rtol=1e-6
      )
      self.assertEqual(found["entropy/batch_argmax"], winner)
      self.assertEqual(found["entropy/token"], 0.0)

  def test_a_fixed_sequence_fools_pooled_alone(self):
    logits = jnp.log(jnp.eye(4))[None] + jnp.zeros((5, 1, 1))
    logits = jnp.pad(logits, [(0, 0), (0, 0), (0, 2)])
    allowed = jnp.arange(6) < 4
    values, _ = _values(logits, jnp.ones((5, 4), bool), allowed)
    expected = [0.0, 0.0, np.log(4), 0.0]
    np.testing.assert_allclose(values, expected, atol=1e-6)

  def test_mean_of_probabilities_and_not_of_logits(self):
    mask = jnp.ones((2, 1), bool)
    symmetric = jnp.log(jnp.array([[[4.0, 1.0]], [[1.0, 4.0]]]))
    found, _ = entropy.batch_entropy(symmetric, mask)
    np.testing.assert_allclose(found, np.log(2), rtol=1e-6)
    # H(.7, .3); the mean of the logits would give H(.75, .25) = .562335.
    skewed = jnp.log(jnp.array([[[9.0, 1.0]], [[1.0, 1.0]]]))
    found, _ = entropy.batch_entropy(skewed, mask)
    np.testing.assert_allclose(found, 0.610864, atol=1e-6)

  def test_parity_form(self):
    logits, mask, _ = _batch(3, (8, 2), 109)
    logits = jnp.float32(4 * logits)
    guarded, _ = entropy.batch_entropy(logits, mask)
    parity, _ = entropy.batch_entropy(logits, mask, epsilon=1e-9)
    # In float32 the two differ by their rounding; the forms by 109e-9 at most.
    np.testing.assert_allclose(parity, guarded, rtol=0, atol=1e-6)
    # What ε adds inside the log is seen where it is not small.
    coarse, _ = entropy.batch_entropy(logits, mask, epsilon=1e-2)
    self.assertGreater(guarded - coarse, 1e-2)
    # In float64, where the bound can be checked.
    exact = oracles.batch_entropy(np.float64(logits), mask, "per_step")[0]
    other = oracles.batch_entropy(
      np.float64(logits), mask, "per_step", epsilon=1e-9
    )[0]
    self.assertLess(abs(exact - other), 2e-7)
    np.testing.assert_allclose(guarded, exact, rtol=1e-6)

  def test_masked_nan_is_inert(self):
    logits, mask, allowed = _batch(4)
    logits[..., ~allowed] = np.nan
    clean = jnp.float32(logits)
    dirty = jnp.float32(np.where(mask[..., None], logits, np.nan))
    chex.assert_trees_all_equal(
      _values(clean, mask, allowed), _values(dirty, mask, allowed)
    )
    grads = _gradients(dirty, mask, allowed)
    np.testing.assert_array_equal(grads, _gradients(clean, mask, allowed))
    np.testing.assert_array_equal(grads[:, ~mask], 0.0)
    self.assertGreater(np.abs(grads).max(axis=(1, 2, 3)).min(), 1e-3)

  def test_nothing_unmasked(self):
    arrays = (
      jnp.full((5, 4, 6), jnp.nan),
      jnp.zeros((5, 4), bool),
      jnp.ones(6, bool),
    )
    np.testing.assert_array_equal(_values(*arrays)[0], 0.0)
    np.testing.assert_array_equal(_gradients(*arrays), 0.0)

  def test_gradient_is_finite_at_hard_zeros(self):
    logits = jnp.zeros((5, 4, 6)).at[..., 0].set(-jnp.inf)
    logits = logits.at[0, 0, 1].set(1e4)
    arrays = (logits, jnp.ones((5, 4), bool), jnp.arange(6) != 2)
    self.assertTrue(np.isfinite(_values(*arrays)[0]).all())
    grads = _gradients(*arrays)
    self.assertTrue(np.isfinite(grads).all())
    np.testing.assert_array_equal(grads[..., [0, 2]], 0.0)

  def test_one_step_on_the_loss_raises_it(self):
    logits, mask, allowed = _batch(5)
    logits = jnp.float32(logits)
    before, _ = _values(logits, mask, allowed)
    # Of the loss -c H, downwards.
    grads = -0.3 * _gradients(logits, mask, allowed)
    for i in range(len(entropy.MODES)):
      after, _ = _values(logits - 0.1 * grads[i], mask, allowed)
      self.assertGreater(after[i], before[i] + 1e-5)

  def test_allowed_per_position(self):
    logits, mask, _ = _batch(6)
    allowed = np.random.default_rng(6).random((5, 4, 6)) < 0.6
    allowed[..., 2] = True
    found = _values(jnp.float32(logits), mask, allowed)
    zeros = jnp.float32(np.where(allowed, logits, -np.inf))
    expected = _values(zeros, mask, np.ones(6, bool))
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)

  def test_bad_settings(self):
    logits, mask = jnp.zeros((1, 1, 2)), jnp.ones((1, 1), bool)
    with self.assertRaisesRegex(ValueError, "per_step, last, .*got 'mean'"):
      entropy.batch_entropy(logits, mask, mode="mean")
    with self.assertRaisesRegex(ValueError, "epsilon must be positive.* got 0"):
      entropy.batch_entropy(logits, mask, epsilon=0.0)
    with self.assertRaisesRegex(ValueError, "chunk_size must be positive"):
      entropy.batch_entropy_from_hidden(
        lambda x: x, logits, mask, chunk_size=-1
      )


def _sharded(kind, fn):
  """`fn(head, hidden, mask)` with B split over eight shards of axis "data".

  Takes the whole arrays and returns what every shard holds, shards first.
  """
  if kind == "shard_map":
    mesh = jax.make_mesh(
      (SHARDS,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)
    )
    whole, split = (
      jax.sharding.PartitionSpec(),
      jax.sharding.PartitionSpec("data"),
    )
    mapped = jax.shard_map(
      fn, mesh=mesh, in_specs=(whole, split, split), out_specs=whole
    )

    def call(head, hidden, mask):
      # An unsharded result is proof that all shards hold the same.
      return jax.tree.map(
        lambda x: x[None], jax.jit(mapped)(head, hidden, mask)
      )

    return call
  mapping = {"vmap": jax.vmap, "pmap": jax.pmap}[kind]
  mapped = mapping(fn, in_axes=(None, 0, 0), axis_name="data")
  if kind == "vmap":
    mapped = jax.jit(mapped)

  def call(head, hidden, mask):
    cut = lambda x: x.reshape(SHARDS, -1, *x.shape[1:])
    return mapped(head, cut(hidden), cut(mask))

  return call


class DevicesTest(parameterized.TestCase):
  def _check(self, kind, fn):
    """Value, metrics and gradient of shards against those of one device."""
    rng = np.random.default_rng(0)
    hidden = jnp.float32(rng.normal(size=(2 * SHARDS, 3, 4)))
    head = jnp.float32(2 * rng.normal(size=(4, 5)))
    # Ragged, so that no shard has the same number of tokens at each step.
    lengths = rng.integers(0, 4, size=2 * SHARDS)
    mask = jnp.arange(3)[None, :] < lengths[:, None]

    def on_shard(head, hidden, mask):
      loss = functools.partial(fn, hidden=hidden, mask=mask, axis_name="data")
      grads, aux = jax.grad(loss, has_aux=True)(head)
      return jax.lax.pmean(grads, "data"), aux

    loss = functools.partial(fn, hidden=hidden, mask=mask, axis_name=None)
    expected_grads, expected = jax.jit(jax.grad(loss, has_aux=True))(head)
    self.assertGreater(np.abs(expected_grads).max(), 0.01)
    found_grads, found = _sharded(kind, on_shard)(head, hidden, mask)
    for shard in range(found_grads.shape[0]):
      np.testing.assert_allclose(
        found_grads[shard], expected_grads, rtol=1e-4, atol=1e-5
      )
      chex.assert_trees_all_close(
        jax.tree.map(lambda x, i=shard: x[i], found),
        expected,
        rtol=1e-5,
        atol=1e-6,
      )

  @parameterized.parameters("vmap", "pmap", "shard_map")
  def test_token_entropy(self, kind):
    def fn(head, hidden, mask, axis_name):
      return entropy.token_entropy(hidden @ head, mask, axis_name=axis_name)

    self._check(kind, fn)

  @parameterized.parameters("vmap", "pmap", "shard_map")
  def test_batch_entropy(self, kind):
    def fn(head, hidden, mask, axis_name):
      return _all_modes(
        entropy.batch_entropy, hidden @ head, mask, axis_name=axis_name
      )

    self._check(kind, fn)

  @parameterized.parameters("vmap", "pmap", "shard_map")
  def test_batch_entropy_from_hidden(self, kind):
    def fn(head, hidden, mask, axis_name):
      chunked = functools.partial(
        entropy.batch_entropy_from_hidden, lambda x: x @ head, chunk_size=2
      )
      return _all_modes(
        chunked,
        hidden,
        mask,
        modes=("per_step", "pooled"),
        axis_name=axis_name,
      )

    self._check(kind, fn)

  def test_sharded_inputs_under_jit(self):
    logits, mask, _ = _batch(0, (16, 3))
    fn = jax.jit(lambda z, m: _all_modes(entropy.batch_entropy, z, m))
    mesh = jax.make_mesh(
      (SHARDS,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)
    )
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    arrays = (jnp.float32(logits), jnp.asarray(mask))
    chex.assert_trees_all_close(
      fn(*jax.device_put(arrays, spec)), fn(*arrays), rtol=1e-5, atol=1e-6
    )


class FromHiddenTest(parameterized.TestCase):
  def _arrays(self):
    rng = np.random.default_rng(1)
    _, mask, _ = _batch(8, (4, 7))
    hidden = rng.normal(size=(4, 7, 3))
    hidden[~mask] = np.nan  # Reaches neither the value nor the head.
    head = 2 * rng.normal(size=(3, 9))
    return jnp.float32(hidden), jnp.float32(head), jnp.asarray(mask)

  # T = 7: one column at a time, a ragged end, one block.
  @parameterized.parameters((1, None), (3, 0.01), (8, None))
  def test_equals_whole_logits(self, chunk_size, epsilon):
    hidden, head, mask = self._arrays()
    options = dict(temperature=0.7, allowed=jnp.arange(9) > 1, epsilon=epsilon)

    def chunked(hidden, head):
      fn = functools.partial(
        entropy.batch_entropy_from_hidden,
        lambda x: x @ head,
        chunk_size=chunk_size,
      )
      return _all_modes(fn, hidden, mask, **options)

    def whole(hidden, head):
      hidden = jnp.where(mask[..., None], hidden, 0.0)
      return _all_modes(entropy.batch_entropy, hidden @ head, mask, **options)

    grad = lambda fn: jax.jit(jax.grad(fn, argnums=(0, 1), has_aux=True))
    found_grads, found = grad(chunked)(hidden, head)
    expected_grads, expected = grad(whole)(hidden, head)
    self.assertGreater(np.abs(expected_grads[1]).max(), 0.01)
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(
      found_grads, expected_grads, rtol=1e-4, atol=1e-5
    )

  def test_mask_in_loss(self):
    hidden, head, mask = self._arrays()
    fn = functools.partial(
      entropy.batch_entropy_from_hidden,
      lambda x: x @ head,
      hidden,
      mask,
      chunk_size=3,
    )
    allowed = jnp.arange(9) > 1
    chex.assert_trees_all_equal(fn(allowed=allowed, mask_in_loss=False), fn())
    self.assertGreater(abs(fn(allowed=allowed)[0] - fn()[0]), 1e-3)

  @parameterized.parameters("per_step", "pooled")
  def test_never_holds_the_logits_of_all_columns(self, mode):
    batch, length, width, vocab_size = 2, 64, 4, 512
    hidden = jnp.ones((batch, length, width))
    mask = jnp.ones((batch, length), bool)

    def memory(chunk_size):
      def loss(hidden, head):
        return entropy.batch_entropy_from_hidden(
          lambda x: x @ head, hidden, mask, mode=mode, chunk_size=chunk_size
        )[0]

      compiled = jax.jit(jax.grad(loss, (0, 1))).lower(
        hidden, jnp.ones((width, vocab_size))
      )
      return compiled.compile().memory_analysis().temp_size_in_bytes

    whole = 4 * batch * length * vocab_size
    self.assertLess(memory(4), whole / 2)
    self.assertGreater(memory(None), whole)
