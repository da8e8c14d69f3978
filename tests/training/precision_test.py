"""What rounding may do, and what it may not hide."""

import contextlib
import dataclasses
import functools
import math
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from absl.testing import absltest, parameterized

from rljax.distributed import planning
from rljax.generation import rollouts
from rljax.models import hf
from rljax.ops import log_probs, sampling
from rljax.training import precision, preflight
from tests import conftest, emulation, tiny


def _on(machine):
  return mock.patch.object(planning, "machine", lambda: machine)


class ChoiceTest(parameterized.TestCase):
  @parameterized.parameters(
    ("cpu", "auto", "float32", None, 18),
    ("tpu", "auto", "float32", "highest", 18),
    ("tpu", "auto", "bfloat16", None, 7),
    ("tpu", "default", "float32", "default", 7),
    ("tpu", "high", "float32", "high", 16),
    ("gpu", "auto", "float32", "highest", 18),
    ("gpu", "default", "float32", "default", 10),
    ("gpu", "high", "bfloat16", "high", 7),
    ("cpu", "default", "float32", "default", 18),
  )
  def test_of_machine_and_dtype(self, machine, asked, dtype, expected, bits):
    kept = jax.config.jax_default_matmul_precision
    self.addCleanup(jax.config.update, "jax_default_matmul_precision", kept)
    with _on(machine):
      self.assertEqual(precision.choose(asked, dtype), expected)
      precision.apply(asked, dtype)
      self.assertEqual(precision.operand_bits(dtype), bits)

  def test_what_jax_was_told_stays(self):
    with _on("tpu"), mock.patch.object(precision, "_OWN", "high"):
      self.assertEqual(precision.choose("auto", "float32"), "high")
      self.assertEqual(precision.choose("default", "float32"), "default")

  def test_names_of_platforms(self):
    for name, expected in (("cuda", "gpu"), ("tpu", "tpu"), ("cpu", "cpu")):
      platform = "rljax.distributed.planning.platform"
      with mock.patch(platform, return_value=name):
        self.assertEqual(planning.machine(), expected)


class ToleranceTest(parameterized.TestCase):
  def test_by_hand(self):
    # One layer, bfloat16: 1.5 * 2^-7 * √3 = 0.0203.
    found = precision.tolerance("bfloat16")
    np.testing.assert_allclose(found.mean, 1.5 * math.sqrt(3) / 128)
    np.testing.assert_allclose(found.kl, 2 * found.mean**2)
    np.testing.assert_allclose(found.quantile, 8 * found.mean)
    # Logits over a temperature of a half differ by twice as much.
    warm = precision.tolerance("bfloat16", temperature=0.5)
    np.testing.assert_allclose(warm.mean, 2 * found.mean)
    hot = precision.tolerance("bfloat16", temperature=2.0)
    self.assertEqual(hot, found)

  def test_of_flags(self):
    values = flags.FlagValues()
    for name, value in (("dtype", "float32"), ("param_dtype", "bfloat16")):
      flags.DEFINE_string(name, value, "Text.", flag_values=values)
    flags.DEFINE_float("temperature", 0.5, "Text.", flag_values=values)
    values(["script"])
    found = precision.of_flags(values)
    self.assertEqual(found, precision.tolerance("bfloat16", temperature=0.5))
    none = precision.of_flags(flags.FlagValues())
    self.assertEqual(none, precision.tolerance("float32"))

  def test_depth(self):
    self.assertEqual(precision.depth(None), 1)
    params = {"policy": tiny.shapes(tiny.llama_config(num_layers=3))}
    self.assertEqual(precision.depth(params), 3)
    deep = precision.tolerance("float32", params)
    flat = precision.tolerance("float32")
    np.testing.assert_allclose(deep.mean / flat.mean, math.sqrt(7 / 3))


class GapsTest(parameterized.TestCase):
  def test_by_hand(self):
    sampled = np.log(np.float32([[0.5, 0.25], [0.1, 1.0]]))
    other = np.log(np.float32([[0.25, 0.5], [0.1, np.nan]]))
    mask = np.array([[True, True], [True, False]])
    found = precision.gaps(sampled, other, mask)
    # |log 2| twice and 0; k3 is 1/2 - 1 + log 2, and 2 - 1 - log 2.
    np.testing.assert_allclose(found.mean, 2 * math.log(2) / 3, rtol=1e-6)
    np.testing.assert_allclose(found.kl, 0.5 / 3, rtol=1e-5)
    np.testing.assert_allclose(found.quantile, math.log(2), rtol=1e-6)
    np.testing.assert_allclose(found.largest, math.log(2), rtol=1e-6)
    none = precision.gaps(sampled, other, np.zeros_like(mask))
    self.assertEqual(none, precision.Gaps(0.0, 0.0, 0.0, 0.0))

  def test_one_far_token_is_not_judged_alone(self):
    limit = precision.Tolerance(0.01, 0.001, 0.1, 0.1, 0.1)
    gaps = precision.Gaps(0.001, 1e-4, 0.05, largest=3.0)
    _, value, most = gaps.worst(limit)
    self.assertLess(value, most)
    for field in ("mean", "kl", "quantile"):
      for bad in (3.0, math.nan):
        worse = dataclasses.replace(gaps, **{field: bad})
        _, value, most = worse.worst(limit)
        self.assertFalse(value <= most, (field, bad))

  def test_metrics_of_a_rollout_are_the_same(self):
    rng = np.random.default_rng(0)
    sampled, other = rng.normal(size=(2, 40, 9)).astype(np.float32) / 10
    mask = rng.random((40, 9)) < 0.7
    rollout = mock.Mock(
      response_mask=jnp.asarray(mask),
      log_probs=jnp.asarray(sampled),
      finished=jnp.ones(40, bool),
    )
    statistics = log_probs.TokenStatistics(
      log_probs=jnp.asarray(other), entropies=jnp.zeros((40, 9))
    )
    metrics = rollouts.metrics(rollout, statistics)
    gaps = precision.gaps(sampled, other, mask)
    for name, field in (
      ("gap_mean", "mean"),
      ("gap_99", "quantile"),
      ("k3", "kl"),
      ("gap", "largest"),
    ):
      np.testing.assert_allclose(
        metrics[f"sampler/log_prob_{name}"], getattr(gaps, field), rtol=1e-5
      )


class RoundingTest(parameterized.TestCase):
  """A real model that writes 64 tokens, with products that round."""

  def checks(self, machine, dtype, fault="", num_rows=4):
    policy = hf.load(conftest.shared("data/models/stories260k"), dtype=dtype)
    model, params = policy.model, policy.params
    rng = np.random.default_rng(0)
    ids = jnp.asarray(rng.integers(5, 400, (num_rows, 6)), jnp.int32)
    mask = jnp.arange(6)[None] >= jnp.arange(num_rows)[:, None] % 4
    on = emulation.machine(machine) if machine else contextlib.nullcontext()
    with on, jax.numpy_dtype_promotion("standard"):
      precision.apply("default" if machine else "auto", dtype)
      settings = sampling.Settings(temperature=0.7)
      draw = functools.partial(
        rollouts.sample, max_length=64, settings=settings, stop_ids=(2,)
      )
      rollout = jax.jit(lambda p: draw(jax.random.key(0), model, p, ids, mask))(
        _moved(params) if fault == "stale" else params
      )

      def log_probs_of(params, rollout):
        if fault == "shift":
          rollout = rollout.replace(
            response_ids=jnp.roll(rollout.response_ids, 1, axis=1)
          )
        statistics, _ = rollouts.token_statistics(
          model,
          params,
          rollout,
          temperature=1.0 if fault == "temperature" else 0.7,
          chunk_size=16,
        )
        return statistics.log_probs

      return preflight.check(
        log_probs_of,
        params,
        rollout,
        stop_ids=(2,),
        tolerance=precision.tolerance(dtype, params, 0.7),
      )

  def red(self, *args):
    return [x.name for x in self.checks(*args) if not x.passed]

  def test_passes_in_bfloat16(self):
    self.assertEqual(self.red(None, "bfloat16"), [])


@pytest.mark.slow
class AllRoundingTest(RoundingTest):
  def test_all(self):
    agree = "sampler and trainer log-probs agree"
    for setting in (
      ("tpu", "float32"),
      ("gpu", "float32"),
      (None, "bfloat16"),
      (None, "float32"),
    ):
      for fault in ("", "temperature", "shift", "stale"):
        with self.subTest(f"{setting}, {fault}"):
          expected = [agree] if fault else []
          self.assertEqual(self.red(*setting, fault, 16), expected)


def _moved(params):
  """The parameters before an update of two percent."""
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda x: x * (1 + 0.02 * rng.choice([-1, 1], x.shape).astype(x.dtype)),
    params,
  )


if __name__ == "__main__":
  absltest.main()
