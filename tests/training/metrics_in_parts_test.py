"""The metrics of every loss: in micro-batches as of the whole batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from rljax.losses import offline, ppo, preference, supervised, token_level
from rljax.training import microbatch

ROWS, LENGTH = 12, 5
NUM_TOKENS = lambda batch: batch["mask"].sum()


def _batch(seed=0, shape=(ROWS, LENGTH)):
  """Rows whose lengths, rewards and drifts differ from part to part."""
  rng = np.random.default_rng(seed)
  lengths = rng.integers(1, LENGTH + 1, shape[:-1])
  lengths[::4] = LENGTH
  drift = np.linspace(0.2, 1.5, ROWS).reshape(-1, *[1] * (len(shape) - 1))
  batch = {
    "log_probs": -rng.exponential(size=shape),
    "old": -rng.exponential(size=shape) * drift,
    "advantages": rng.normal(size=shape) + drift,
    "returns": rng.normal(size=shape) * drift + drift,
    "values": rng.normal(size=shape),
    "scores": rng.normal(size=shape[:2]),
    "rewards": np.abs(rng.normal(size=shape[:1])),
  }
  batch = {name: jnp.float32(x) for name, x in batch.items()}
  mask = np.arange(LENGTH) < lengths[..., None]
  batch["mask"] = jnp.asarray(mask)
  batch["is_good"] = jnp.asarray(rng.random(ROWS) < np.linspace(0, 1, ROWS))
  batch["sparse"] = jnp.where(jnp.asarray(rng.random(shape) < 0.4), 1.0, 0.0)
  return batch


def _ppo(loss, shift, batch):
  policy, metrics = loss(shift + batch["log_probs"], batch)
  value, more = ppo.clipped_value_loss(
    shift + batch["values"],
    0.5 * batch["values"],
    batch["returns"],
    batch["mask"],
    clip_epsilon=0.2,
  )
  return policy + value, {"loss": policy + value, **metrics, **more}


def _clipped(normalizer):
  return lambda log_probs, batch: ppo.clipped_policy_loss(
    log_probs,
    batch["old"],
    batch["advantages"],
    batch["mask"],
    clip_epsilon=0.2,
    normalizer=normalizer,
  )


def _offline(algorithm, shift, batch):
  scores = {"rewards": batch["rewards"], "advantages": batch["rewards"] - 0.5}
  return offline.offline_loss(
    algorithm,
    shift + batch["log_probs"],
    batch["old"],
    *scores.values(),
    batch["mask"],
  )


def _rlmec(mode, shift, batch, counts):
  loss, metrics = token_level.token_level_loss(
    shift + batch["log_probs"],
    batch["old"],
    batch["sparse"] * batch["advantages"],
    batch["mask"],
    mode=mode,
    count=counts[0],
  )
  imitation, more = token_level.imitation_loss(
    shift + batch["log_probs"],
    batch["sparse"],
    batch["mask"],
    count=counts[1],
  )
  loss += imitation
  return loss, {"loss": loss, **metrics, **more}


def _kto(shift, batch):
  return preference.kto_loss(
    shift + batch["log_probs"],
    batch["old"],
    jnp.float32(0.1),
    batch["is_good"],
    batch["mask"],
    beta=0.1,
  )


ROW_LOSSES = {
  "ppo": (functools.partial(_ppo, _clipped("token_mean")), NUM_TOKENS),
  **{
    normalizer: (
      lambda shift, batch, normalizer=normalizer: _clipped(normalizer)(
        shift + batch["log_probs"], batch
      ),
      None,
    )
    for normalizer in ("sequence_mean", "constant")
  },
  "gspo": (
    lambda shift, batch: ppo.gspo_loss(
      shift + batch["log_probs"],
      batch["old"],
      batch["advantages"][:, 0],
      batch["mask"],
      clip_epsilon=0.2,
    ),
    None,
  ),
  "cispo": (
    lambda shift, batch: ppo.cispo_loss(
      shift + batch["log_probs"],
      batch["old"],
      batch["advantages"],
      batch["mask"],
      max_ratio=1.2,
    ),
    NUM_TOKENS,
  ),
  "kto": (_kto, None),
  **{
    f"offline {name}": (functools.partial(_offline, name), None)
    for name in offline.ALGORITHMS
  },
  **{
    f"nll {name}": (
      lambda shift, batch, name=name: supervised.nll_loss(
        shift + batch["log_probs"], batch["mask"], normalizer=name
      ),
      NUM_TOKENS if name == "token_mean" else None,
    )
    for name in supervised.NORMALIZERS
  },
  **{
    f"bce {name}": (
      lambda shift, batch, name=name: supervised.outcome_loss(
        shift + batch["values"],
        batch["sparse"],
        batch["mask"],
        normalizer=name,
      ),
      NUM_TOKENS if name == "token_mean" else None,
    )
    for name in supervised.NORMALIZERS[:2]
  },
}
# Of comparisons, `[B, K, T]`.
PAIR_LOSSES = {
  "dpo": lambda log_probs, batch: preference.dpo_loss(
    log_probs, batch["old"], batch["mask"], beta=0.1
  ),
  "ipo": lambda log_probs, batch: preference.dpo_loss(
    log_probs, batch["old"], batch["mask"], beta=0.1, loss_type="ipo"
  ),
  "pro": lambda log_probs, batch: preference.pro_loss(
    log_probs, batch["scores"], batch["mask"]
  ),
  "simpo": lambda log_probs, batch: preference.simpo_loss(
    log_probs, batch["mask"], beta=2.0, margin=1.0
  ),
  "orpo": lambda log_probs, batch: preference.orpo_loss(
    log_probs, batch["mask"], odds_weight=0.1
  ),
  "pairwise": lambda log_probs, batch: supervised.pairwise_loss(
    log_probs[..., 0], batch["mask"][..., 0]
  ),
}


def _check(loss_fn, batch, *more, **options):
  shift = jnp.float32(0.1)
  gradient = microbatch.grad(loss_fn, 1, **options)
  whole = jax.jit(gradient)(shift, batch, *more)
  found = jax.jit(gradient.in_parts(4))(shift, batch, *more)
  np.testing.assert_allclose(found[0], whole[0], rtol=2e-4, atol=1e-5)
  assert found[1].keys() == whole[1].keys()
  for name, value in whole[1].items():
    np.testing.assert_allclose(
      found[1][name], value, rtol=2e-4, atol=1e-5, err_msg=name
    )


class MetricsInPartsTest(parameterized.TestCase):
  @parameterized.parameters(*ROW_LOSSES)
  def test_rows(self, name):
    loss_fn, weigh = ROW_LOSSES[name]
    _check(loss_fn, _batch(), weigh=weigh)

  @parameterized.parameters(*PAIR_LOSSES)
  def test_pairs(self, name):
    loss_fn = lambda shift, batch: PAIR_LOSSES[name](
      shift * batch["log_probs"], batch
    )
    _check(loss_fn, _batch(shape=(ROWS, 2, LENGTH)))

  @parameterized.parameters(*token_level.MODES)
  def test_losses_that_add_up(self, mode):
    batch = _batch()
    counts = [
      jnp.sum(batch["mask"] & (x != 0), dtype=jnp.float32)
      for x in (batch["sparse"] * batch["advantages"], batch["sparse"])
    ]
    loss_fn = functools.partial(_rlmec, mode)
    _check(loss_fn, batch, counts, adds_up=True)

  def test_a_part_without_a_token_has_no_extremes(self):
    batch = _batch()
    batch["mask"] = batch["mask"].at[1::4].set(False)
    loss_fn, weigh = ROW_LOSSES["ppo"]
    _check(loss_fn, batch, weigh=weigh)

  def test_extremes_and_means(self):
    # Ratios 3, 1, 1 and 1/4 in two parts and in four updates.
    history = {
      "ppo/ratio_max": jnp.array([3.0, 1.0, 1.0, 0.25]),
      "ppo/ratio_min": jnp.array([3.0, 1.0, 1.0, 0.25]),
      "ppo/ratio_mean": jnp.array([3.0, 1.0, 1.0, 0.25]),
      "ppo/count": jnp.array([1.0, 1.0, 1.0, 5.0]),
      "updates/skipped": jnp.array([4, 4, 5, 6]),
    }
    expected = {"ppo/ratio_max": 3.0, "ppo/ratio_min": 0.25}
    parts = {n: x for n, x in history.items() if n.startswith("ppo")}
    found = microbatch.combine(parts, jnp.full(4, 0.25))
    for name, value in expected.items():
      self.assertEqual(found[name], value)
    # (3 + 1 + 1 + 5 / 4) / 8.
    np.testing.assert_allclose(found["ppo/ratio_mean"], 0.78125)
    for epochs, mean, count in (
      (None, 1.3125, 2.0),
      (4, 1.3125, 2.0),
      (1, 0.78125, 8.0),
      (2, (2.0 + 2.25 / 6) / 2, 4.0),
    ):
      found = microbatch.over_updates(history, epochs)
      for name, value in expected.items():
        self.assertEqual(found[name], value)
      np.testing.assert_allclose(found["ppo/ratio_mean"], mean, rtol=1e-6)
      self.assertEqual(found["ppo/count"], count)
      self.assertEqual(found["updates/skipped"], 6)

  def test_variances_of_minibatches(self):
    # Returns 0, 2 and 10, 12; errors 1, -1 and 1, -1: variances 1 within each,
    # and 26 of the four returns together.
    one = jnp.ones(2)
    history = {
      "value/returns_mean": jnp.array([1.0, 11.0]),
      "value/returns_variance": one,
      "value/errors_mean": 0 * one,
      "value/errors_variance": one,
      "value/explained_variance": 0 * one,
      "value/count": 2 * one,
    }
    found = microbatch.over_updates(history, epochs=1)
    self.assertEqual(found["value/returns_variance"], 26.0)
    np.testing.assert_allclose(
      found["value/explained_variance"], 1 - 1 / 26, rtol=1e-6
    )
    # Two epochs over the same rows: the mean of what each has seen.
    found = microbatch.over_updates(history, epochs=2)
    self.assertEqual(found["value/explained_variance"], 0.0)


if __name__ == "__main__":
  absltest.main()
