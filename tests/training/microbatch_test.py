"""Tests of batches in parts: gradients, metrics, rows and orders."""

import functools

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from rljax.distributed import meshes
from rljax.generation import rollouts
from rljax.ops import masking, sampling
from rljax.training import microbatch
from tests import stand_in

_SEEDS = st.integers(0, 2**32 - 1)
_ROWS, _LENGTH, _FEATURES = 24, 5, 3


def _batch(seed):
  """Features, targets and a mask; some rows have no token."""
  rng = np.random.default_rng(seed)
  mask = rng.random((_ROWS, _LENGTH)) < 0.6
  mask[rng.integers(_ROWS)] = False
  return {
    "features": jnp.float32(rng.normal(size=(_ROWS, _LENGTH, _FEATURES))),
    "targets": jnp.float32(rng.normal(size=(_ROWS, _LENGTH))),
    "mask": jnp.asarray(mask),
  }


def _params(seed):
  rng = np.random.default_rng([seed, 1])
  return {
    "kernel": jnp.float32(rng.normal(size=_FEATURES)),
    "bias": jnp.float32(rng.normal()),
  }


def _errors(params, batch):
  """Squared errors `[N, T]`."""
  values = batch["features"] @ params["kernel"] + params["bias"]
  return jnp.square(values - batch["targets"])


def _row_mean(params, batch):
  errors = jnp.where(batch["mask"], _errors(params, batch), 0.0)
  loss = errors.sum(axis=1).mean()
  return loss, {
    "loss": loss,
    "error_max": errors.max(),
    "error_min": errors.min(),
    "fit/tokens": batch["mask"].sum(),
    microbatch.ROWS: {"errors": errors, "sums": errors.sum(axis=1)},
  }


def _token_mean(params, batch):
  loss = masking.masked_mean(_errors(params, batch), batch["mask"])
  return loss, {"loss": loss}


def _num_tokens(part):
  return part["mask"].sum()


class GradTest(parameterized.TestCase):
  @chex.variants(with_jit=True, without_jit=True)
  def test_hand_computed(self):
    # L = mean over unmasked x of w x, so that ∇L is their mean. Part 0 has the
    # rows 0 and 2, part 1 the rows 1 and 3.
    batch = {
      "x": jnp.array([[1.0, 3.0], [5.0, 7.0], [2.0, 9.0], [9.0, 9.0]]),
      "mask": jnp.array(
        [[True, True], [True, False], [True, False], [False, False]]
      ),
    }

    def loss_fn(w, batch):
      mean = masking.masked_mean(batch["x"], batch["mask"])
      return w * mean, {"mean": mean}

    # Means of the parts: (1 + 3 + 2) / 3 = 2 and 5, of three tokens and one.
    for weigh, expected in ((None, 3.5), (_num_tokens, 2.75)):
      found, metrics = self.variant(
        microbatch.grad(loss_fn, 2, weigh=weigh),
      )(jnp.float32(1.0), batch)
      np.testing.assert_allclose(found, expected, rtol=1e-6)
      np.testing.assert_allclose(metrics["mean"], expected, rtol=1e-6)

  @hypothesis.given(seed=_SEEDS, num_parts=st.sampled_from([2, 3, 8, 24]))
  def test_parts_of_a_mean_over_rows(self, seed, num_parts):
    params, batch = _params(seed), _batch(seed)
    whole = microbatch.grad(_row_mean, 1)(params, batch)
    found = microbatch.grad(_row_mean, num_parts)(params, batch)
    chex.assert_trees_all_close(found, whole, rtol=2e-5, atol=1e-6)

  @hypothesis.given(seed=_SEEDS, num_parts=st.sampled_from([2, 3, 8, 24]))
  def test_parts_of_a_mean_over_tokens(self, seed, num_parts):
    # Of 24 parts, that of the row without tokens weighs nothing.
    params, batch = _params(seed), _batch(seed)
    whole = microbatch.grad(_token_mean, 1)(params, batch)
    found = microbatch.grad(_token_mean, num_parts, weigh=_num_tokens)(
      params, batch
    )
    chex.assert_trees_all_close(found, whole, rtol=2e-5, atol=1e-6)

  def test_a_mean_over_tokens_needs_its_weights(self):
    params, batch = _params(0), _batch(0)
    whole, _ = microbatch.grad(_token_mean, 1)(params, batch)
    found, _ = microbatch.grad(_token_mean, 8)(params, batch)
    gap = np.max(np.abs(found["kernel"] - whole["kernel"]))
    self.assertGreater(gap, 1e-3)

  @parameterized.parameters(2, 3, 8)
  def test_losses_that_add_up(self, num_parts):
    # Each part divides by the tokens of the whole batch.
    def loss_fn(params, batch, total):
      errors = jnp.where(batch["mask"], _errors(params, batch), 0.0)
      loss = errors.sum() / total
      return loss, {"loss": loss, "fit/nll_loss": loss, "fit/rows": 1.0 * total}

    params, batch = _params(0), _batch(0)
    total = batch["mask"].sum().astype(jnp.float32)
    whole = microbatch.grad(loss_fn, 1)(params, batch, total)
    for weigh in (None, _num_tokens):
      found = microbatch.grad(loss_fn, num_parts, weigh=weigh, adds_up=True)(
        params, batch, total
      )
      chex.assert_trees_all_close(found, whole, rtol=2e-5, atol=1e-6)

  def test_weights_may_be_small(self):
    # They count by their shares, even if all together are less than 1.
    batch = {"x": jnp.array([1.0, 5.0]), "weight": jnp.array([0.1, 0.3])}
    loss_fn = lambda w, batch: (w * batch["x"].mean(), {})
    weigh = lambda part: part["weight"].sum()
    found, _ = microbatch.grad(loss_fn, 2, weigh=weigh)(jnp.float32(1.0), batch)
    # (0.1 * 1 + 0.3 * 5) / 0.4 = 4.
    np.testing.assert_allclose(found, 4.0, rtol=1e-6)

  def test_nothing_counts(self):
    params, batch = _params(0), _batch(0)
    batch["mask"] = jnp.zeros_like(batch["mask"])
    found, metrics = microbatch.grad(_token_mean, 2, weigh=_num_tokens)(
      params, batch
    )
    chex.assert_trees_all_equal(found, jax.tree.map(jnp.zeros_like, params))
    self.assertEqual(metrics["loss"], 0.0)

  def test_sums_of_bfloat16_gradients_are_float32(self):
    # 256 + 1 + 1 is 258, which has a bfloat16; 256 + 1 has none.
    batch = {"x": jnp.array([256.0, 1.0, 1.0], jnp.bfloat16)}
    params = {"w": jnp.ones((), jnp.bfloat16)}
    loss_fn = lambda params, batch: (params["w"] * batch["x"].sum(), {})
    gradient = microbatch.grad(loss_fn, 3, adds_up=True)
    grads, _ = gradient(params, batch)
    self.assertEqual(grads["w"].dtype, jnp.float32)
    self.assertEqual(float(grads["w"]), 258.0)

  def test_devices_share_every_part(self):
    mesh = meshes.make("data:4,fsdp:2")
    sharding = meshes.batch_sharding(mesh)
    params = jax.tree.map(jnp.asarray, _params(0))
    batch = _batch(0)
    seen = []

    def loss_fn(params, batch):
      jax.debug.inspect_array_sharding(batch["targets"], callback=seen.append)
      return _token_mean(params, batch)

    gradient = jax.jit(
      microbatch.grad(loss_fn, 3, weigh=_num_tokens, sharding=sharding)
    )
    rows = meshes.shard_batch(batch, mesh)
    replicated = meshes.replicate(params, mesh)
    found = gradient(replicated, rows)
    self.assertNotEmpty(seen)
    for part in seen:
      # Eight rows of five tokens, a row on each of eight devices.
      self.assertEqual(part.shard_shape((8, 5)), (1, 5))
    whole = microbatch.grad(_token_mean, 1)(params, batch)
    chex.assert_trees_all_close(
      jax.device_get(found), jax.device_get(whole), rtol=2e-5, atol=1e-6
    )

  def test_memory_is_that_of_a_part(self):
    def loss_fn(w, batch):
      spread = jnp.sin(w * batch[:, None] * jnp.arange(2.0**12)[None])
      return jnp.sort(spread, axis=1)[:, 0].mean(), {}

    memory = []
    for num_parts in (1, 16):
      compiled = (
        jax.jit(microbatch.grad(loss_fn, num_parts))
        .lower(jnp.float32(1.0), jnp.arange(64.0))
        .compile()
      )
      memory.append(compiled.memory_analysis().temp_size_in_bytes)
    self.assertLess(memory[1], memory[0] / 6)


class CombineTest(absltest.TestCase):
  def test_by_name(self):
    weights = jnp.array([0.75, 0.25])
    metrics = {
      name: jnp.array([2.0, 6.0])
      for name in (
        *("loss", "ppo/ratio_max", "ppo/ratio_min", "nll/tokens", "nll/loss"),
        *("reward/mean", "max"),
      )
    }
    found = microbatch.combine(metrics, weights)
    expected = {
      "loss": 3.0,  # 0.75 * 2 + 0.25 * 6.
      "ppo/ratio_max": 6.0,
      "ppo/ratio_min": 2.0,
      "nll/tokens": 8.0,
      "nll/loss": 3.0,
      "reward/mean": 3.0,
      "max": 6.0,
    }
    chex.assert_trees_all_close(found, expected)
    expected |= {"loss": 8.0, "nll/loss": 8.0}
    found = microbatch.combine(metrics, weights, adds_up=True)
    chex.assert_trees_all_close(found, expected)

  def test_what_a_part_of_weight_0_holds_does_not_count(self):
    values = jnp.array([jnp.nan, 2.0, 3.0])
    names = ("x/loss", "x/a_max", "x/a_min", "x/a")
    expected = dict(zip(names, (2.5, 3.0, 2.0, 2.5), strict=True))
    weights = jnp.array([0.0, 0.5, 0.5])
    found = microbatch.combine(dict.fromkeys(names, values), weights)
    chex.assert_trees_all_close(found, expected)
    # In a part that counts, it shows.
    found = microbatch.combine(dict.fromkeys(names, values), weights[::-1])
    self.assertTrue(all(np.isnan(x) for x in found.values()))

  def test_means_over_a_subset_weigh_by_its_count(self):
    metrics = {
      "bce/count": jnp.array([1, 3]),
      "bce/accuracy": jnp.array([1.0, 0.0]),
      "bce/logit_max": jnp.array([-1.0, 4.0]),
      "kto/accuracy": jnp.array([1.0, 0.0]),
    }
    found = microbatch.combine(metrics, jnp.array([0.5, 0.5]))
    self.assertEqual(found["bce/count"], 4)
    self.assertEqual(found["bce/accuracy"], 0.25)
    self.assertEqual(found["bce/logit_max"], 4.0)
    self.assertEqual(found["kto/accuracy"], 0.5)

  def test_a_perplexity_is_that_of_all_tokens(self):
    # 2 of one token and 8 of two: (2 · 8 · 8) ^ (1/3) = 5.04.
    perplexity, counts = jnp.array([2.0, 8.0]), jnp.array([1.0, 2.0])
    for name in ("tokens", "count"):
      found = microbatch.combine(
        {"nll/perplexity": perplexity, f"nll/{name}": counts},
        jnp.array([0.5, 0.5]),
      )
      np.testing.assert_allclose(
        found["nll/perplexity"], 128 ** (1 / 3), rtol=1e-6
      )
    # Without a count the weights decide: (2 · 8) ^ (1/2).
    found = microbatch.combine(
      {"nll/perplexity": perplexity}, jnp.array([0.5, 0.5])
    )
    np.testing.assert_allclose(found["nll/perplexity"], 4.0, rtol=1e-6)

  def test_an_empty_subset_is_0(self):
    metrics = {
      "bce/count": jnp.array([0, 0]),
      "bce/accuracy": jnp.array([0.0, 0.0]),
    }
    found = microbatch.combine(metrics, jnp.array([0.5, 0.5]))
    self.assertEqual(found["bce/accuracy"], 0.0)

  def test_over_updates(self):
    history = {
      name: jnp.array([1.0, 2.0, 6.0])
      for name in ("ppo/ratio_max", "ppo/ratio_min", "loss", "nll/tokens")
    }
    chex.assert_trees_all_close(
      microbatch.over_updates(history),
      {"ppo/ratio_max": 6.0, "ppo/ratio_min": 1.0, "loss": 3.0}
      | {"nll/tokens": 3.0},
    )


class MapRowsTest(parameterized.TestCase):
  def test_parts_take_their_rows_in_turns(self):
    batch = {"x": jnp.arange(6), "y": jnp.arange(12).reshape(6, 2)}
    parts = microbatch.split(batch, 3)
    np.testing.assert_array_equal(parts["x"], [[0, 3], [1, 4], [2, 5]])
    np.testing.assert_array_equal(parts["y"][1], [[2, 3], [8, 9]])

  @parameterized.parameters(1, 2, 3, 6)
  def test_order_and_parts(self, num_parts):
    sizes = []

    def double(part):
      sizes.append(len(part["x"]))
      return 2 * part["x"], {"y": part["y"].sum(axis=1)}

    batch = {"x": jnp.arange(6), "y": jnp.arange(12).reshape(6, 2)}
    found, more = microbatch.map_rows(double, batch, num_parts)
    np.testing.assert_array_equal(found, [0, 2, 4, 6, 8, 10])
    np.testing.assert_array_equal(more["y"], [1, 5, 9, 13, 17, 21])
    self.assertEqual(set(sizes), {6 // num_parts})

  def test_one_part_is_a_plain_call(self):
    batch = object()
    self.assertIs(microbatch.map_rows(lambda part: part, batch, 1), batch)

  @parameterized.parameters(2, 3, 6)
  def test_statistics_of_a_rollout(self, num_parts):
    params = stand_in.random_params(np.random.default_rng(0))
    model = stand_in.model()
    lengths = np.array([1, 3, 2])
    rollout = rollouts.sample(
      jax.random.key(0),
      model,
      params,
      jnp.asarray(np.random.default_rng(0).integers(0, 7, (3, 3)), jnp.int32),
      jnp.asarray(np.arange(3)[None] >= 3 - lengths[:, None]),
      max_length=4,
      settings=sampling.Settings(),
      num_samples=2,
    )

    @functools.partial(jax.jit, static_argnums=0)
    def read(num_parts):
      return microbatch.map_rows(
        lambda part: rollouts.token_statistics(
          model, params, part, temperature=1.0
        ),
        rollout,
        num_parts,
      )

    chex.assert_trees_all_close(read(num_parts), read(1), rtol=1e-6)

  def test_parts_on_a_mesh_take_less_memory(self):
    mesh = meshes.make("data:8")
    sharding = meshes.batch_sharding(mesh)
    rows = meshes.shard_batch(np.arange(64.0)[:, None], mesh)

    def read(part):
      self.assertEqual(part.shape[1], 1)
      spread = jnp.sin(part * jnp.arange(2.0**12)[None])  # [rows, 4096]
      return jnp.sort(spread, axis=1)[:, 0]

    memory, found = [], []
    for num_parts in (1, 8):
      part = functools.partial(
        microbatch.map_rows, read, num_parts=num_parts, sharding=sharding
      )
      compiled = jax.jit(part).lower(rows).compile()
      memory.append(compiled.memory_analysis().temp_size_in_bytes)
      found.append(compiled(rows))
    np.testing.assert_allclose(*found, rtol=1e-6)
    self.assertLess(memory[1], memory[0] / 6)
    self.assertTrue(found[1].sharding.is_equivalent_to(sharding, 1))


class WidthsTest(parameterized.TestCase):
  """Rows that are read at several widths, sorted by length."""

  def _rollout(self):
    rng = np.random.default_rng(0)
    params = stand_in.random_params(rng, max_positions=64)
    mask = np.arange(20) >= 20 - rng.integers(1, 21, 12)[:, None]
    ids = jnp.asarray(rng.integers(0, 7, mask.shape), jnp.int32)
    draw = functools.partial(
      rollouts.sample,
      *(jax.random.key(1), stand_in.model(max_positions=64), params),
      *(ids, jnp.asarray(mask)),
      max_length=10,
      settings=sampling.Settings(),
      lengths=jnp.asarray(rng.integers(1, 11, 12)),
    )
    return params, draw

  def test_the_same_samples(self):
    _, draw = self._rollout()
    chex.assert_trees_all_close(
      jax.jit(functools.partial(draw, length_buckets=3))(), draw(), rtol=1e-6
    )

  @parameterized.parameters((1, "data:1"), (3, "data:1"), (3, "data:4"))
  def test_the_same_gradient_and_statistics(self, num_parts, spec):
    params, draw = self._rollout()
    mesh = meshes.make(spec)
    rollout = meshes.shard_batch(dict(draw()) | {"allowed": None}, mesh)
    model, widths = stand_in.model(max_positions=64), []
    names = ("prompt", "response")

    def loss_fn(params, batch):
      widths.append(sum(batch[f"{x}_ids"].shape[1] for x in names))
      found, _ = rollouts.token_statistics(
        model, params, batch, temperature=1.0
      )
      mask = batch["response_mask"]
      loss = -masking.masked_mean(found.log_probs, mask)
      rows = jnp.where(mask, found.log_probs, 0.0)
      metrics = {"loss": loss, "tokens": mask.sum(), microbatch.ROWS: rows}
      return loss, metrics

    def both(num_parts, **options):
      sharding = meshes.batch_sharding(mesh)
      gradient = microbatch.grad(
        loss_fn,
        num_parts,
        weigh=lambda part: part["response_mask"].sum(),
        sharding=sharding,
        **options,
      )
      return jax.jit(gradient)(params, rollout), jax.jit(
        lambda rollout: microbatch.map_rows(
          lambda part: jnp.where(
            part["response_mask"],
            rollouts.token_statistics(model, params, part, temperature=1.0)[
              0
            ].log_probs,
            0.0,
          ),
          *(rollout, num_parts, sharding),
          **options,
        )
      )(rollout)

    expected = both(1)
    # What the loss says of rows is in their order, as what `map_rows` reads.
    chex.assert_trees_all_close(expected[0][1][microbatch.ROWS], expected[1])
    self.assertEqual(set(widths), {30})
    chex.assert_trees_all_close(
      both(num_parts, buckets=2), expected, rtol=1e-5, atol=1e-6
    )
    # 16 or 20 columns of prompts, and 8 or 10 of responses.
    self.assertEqual(set(widths), {24, 26, 28, 30})


class RowsTest(parameterized.TestCase):
  def test_sizes(self):
    sizes = microbatch.Sizes(rows=48, minibatch=12, micro_batch=4)
    self.assertEqual(sizes.num_parts, 3)
    self.assertEqual(sizes.num_passes, 12)

  def test_take(self):
    batch = {"x": jnp.arange(4), "y": jnp.arange(8).reshape(4, 2)}
    found = microbatch.take(batch, jnp.array([3, 0]))
    np.testing.assert_array_equal(found["x"], [3, 0])
    np.testing.assert_array_equal(found["y"], [[6, 7], [0, 1]])

  def test_taken_rows_stay_spread(self):
    mesh = meshes.make("data:8")
    sharding = meshes.batch_sharding(mesh)
    rows = meshes.shard_batch(np.arange(32), mesh)
    order = np.random.default_rng(0).permutation(32)[:16]
    take = jax.jit(functools.partial(microbatch.take, sharding=sharding))
    found = take({"x": rows}, jnp.asarray(order))["x"]
    np.testing.assert_array_equal(found, order)
    self.assertTrue(found.sharding.is_equivalent_to(sharding, 1))
    self.assertNotEqual(sharding.spec, PartitionSpec())

  def test_orders(self):
    sizes = microbatch.Sizes(rows=12, minibatch=4, micro_batch=2)
    key = jax.random.key(3)
    found = np.asarray(microbatch.orders(key, sizes, epochs=2))
    self.assertEqual(found.shape, (6, 4))
    epochs = found.reshape(2, 12)
    for epoch, epoch_key in zip(epochs, jax.random.split(key, 2), strict=True):
      np.testing.assert_array_equal(np.sort(epoch), np.arange(12))
      # The key of an epoch is its share of the step's.
      np.testing.assert_array_equal(
        epoch, jax.random.permutation(epoch_key, 12)
      )
    self.assertTrue(np.any(epochs[0] != epochs[1]))
    again = microbatch.orders(key, sizes, epochs=2)
    np.testing.assert_array_equal(found, again)
    other = microbatch.orders(jax.random.key(4), sizes, epochs=2)
    self.assertTrue(np.any(found != np.asarray(other)))


if __name__ == "__main__":
  absltest.main()
