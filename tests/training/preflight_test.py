"""Every check must turn red for the bug that it is there to find."""

import contextlib
import functools
import io
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from rljax.generation import rollouts
from rljax.losses import ppo
from rljax.ops import sampling
from rljax.training import microbatch, precision, preflight
from tests import tiny

STOP_IDS = tuple(range(5, 20))


def _setting(**options):
  config = tiny.gpt2_config()
  model, params = tiny.model(config), tiny.params(config)
  rng = np.random.default_rng(0)
  lengths = np.array([1, 3, 2, 3])
  mask = jnp.asarray(np.arange(3)[None] >= 3 - lengths[:, None])
  ids = jnp.asarray(rng.integers(5, 40, (4, 3)), jnp.int32)
  settings = options.pop("settings", sampling.Settings(temperature=0.7))
  rollout = rollouts.sample(
    jax.random.key(0),
    model,
    params,
    ids,
    mask,
    max_length=5,
    settings=settings,
    num_samples=2,
    **{"stop_ids": STOP_IDS, **options},
  )
  return model, params, rollout, settings


def _check(model, params, rollout, *, settings, allowed=None, **options):
  """The checks of a trainer with these settings."""

  def log_probs_of(params, rollout):
    statistics, _ = rollouts.token_statistics(
      model, params, rollout, temperature=settings.temperature, allowed=allowed
    )
    return statistics.log_probs

  return preflight.check(log_probs_of, params, rollout, **options)


def _red(checks):
  return [check.name for check in checks if not check.passed]


class CheckTest(parameterized.TestCase):
  def test_all_green(self):
    model, params, rollout, settings = _setting()
    checks = _check(
      model, params, rollout, settings=settings, stop_ids=STOP_IDS
    )
    self.assertEmpty(_red(checks))
    self.assertLen(checks, 6)
    preflight.enforce(checks, "strict")

  def test_forgotten_temperature(self):
    model, params, rollout, _ = _setting()
    checks = _check(
      model, params, rollout, settings=sampling.Settings(), stop_ids=STOP_IDS
    )
    self.assertEqual(_red(checks), ["sampler and trainer log-probs agree"])

  def test_forgotten_mask(self):
    allowed = jnp.arange(40) % 2 == 1
    model, params, rollout, settings = _setting(allowed=allowed)
    checks = _check(
      model, params, rollout, settings=settings, stop_ids=STOP_IDS
    )
    self.assertEqual(_red(checks), ["sampler and trainer log-probs agree"])
    checks = _check(
      model,
      params,
      rollout,
      settings=settings,
      stop_ids=STOP_IDS,
      allowed=allowed,
    )
    self.assertEmpty(_red(checks))

  def test_pads_that_are_attended_to(self):
    model, params, rollout, settings = _setting()

    class Inattentive(type(model)):
      def __call__(self, ids, mask):
        return super().__call__(ids, jnp.ones_like(mask))

    checks = _check(
      Inattentive(model.config),
      params,
      rollout,
      settings=settings,
      stop_ids=STOP_IDS,
    )
    self.assertIn("pads change nothing", _red(checks))

  def test_rows_that_mix(self):
    model, params, rollout, settings = _setting()

    class Mixing(type(model)):
      def __call__(self, ids, mask):
        hidden = super().__call__(ids, mask)
        return hidden + 0.1 * hidden[:1]

    checks = _check(
      Mixing(model.config),
      params,
      rollout,
      settings=settings,
      stop_ids=STOP_IDS,
    )
    self.assertIn("order of rows changes nothing", _red(checks))

  def test_dropout(self):
    model, params, rollout, settings = _setting()
    state = {"calls": 0}

    class Noisy(type(model)):
      def __call__(self, ids, mask):
        def noise():
          state["calls"] += 1
          return np.float32(0.01 * state["calls"])

        shape = jax.ShapeDtypeStruct((), jnp.float32)
        factor = 1 + jax.pure_callback(noise, shape)
        return super().__call__(ids, mask) * factor

    checks = _check(
      Noisy(model.config), params, rollout, settings=settings, stop_ids=STOP_IDS
    )
    self.assertIn("dropout is off", _red(checks))
    self.assertIn("KL of the policy to itself is 0", _red(checks))

  def test_end_token_outside_the_mask(self):
    model, params, rollout, settings = _setting()
    mask = np.asarray(rollout.response_mask).copy()
    row = int(np.flatnonzero(mask.sum(1) < 5)[0])
    mask[row, mask[row].sum() - 1] = False  # As `ids != pad` would do.
    checks = _check(
      model,
      params,
      rollout.replace(response_mask=jnp.asarray(mask)),
      settings=settings,
      stop_ids=STOP_IDS,
    )
    self.assertEqual(_red(checks), ["masks end with the end token"])

  def test_mask_that_goes_on_behind_the_end(self):
    model, params, rollout, settings = _setting()
    mask = np.ones_like(np.asarray(rollout.response_mask))
    checks = _check(
      model,
      params,
      rollout.replace(response_mask=jnp.asarray(mask)),
      settings=settings,
      stop_ids=STOP_IDS,
    )
    self.assertIn("masks end with the end token", _red(checks))

  def test_ratio_and_accumulation(self):
    model, params, rollout, settings = _setting()
    gradients = {1: {"w": jnp.ones(3)}, 2: {"w": jnp.ones(3)}}
    one = jnp.float32(1.0)
    metrics = {"ppo/ratio_mean": one, "ppo/approx_kl": 0 * one}

    def check():
      return _check(
        model,
        params,
        rollout,
        settings=settings,
        stop_ids=STOP_IDS,
        gradients=lambda n: (gradients[n], metrics),
      )

    self.assertEmpty(_red(check()))
    gradients[2] = {"w": jnp.array([1.0, 1.0, 1.1])}
    self.assertEqual(_red(check()), ["2 micro-batches equal one batch"])
    # One token may be rounded far; many that are show in the means.
    metrics |= {"ppo/ratio_max": jnp.float32(1.3)}
    gradients[2] = gradients[1]
    self.assertEmpty(_red(check()))
    for name, value in (("ppo/ratio_mean", 0.99), ("ppo/approx_kl", 0.01)):
      metrics = {"ppo/ratio_mean": one, "ppo/approx_kl": 0 * one}
      metrics[name] = jnp.float32(value)
      self.assertIn("first ratio is 1", _red(check()))
    metrics = {}  # Nothing known is not good news.
    self.assertIn("first ratio is 1", _red(check()))

  def test_enforce(self):
    red = [preflight.Check("a thing", 2.0, 1.0), preflight.Check("b", 0.0, 1.0)]
    with self.assertRaisesRegex(
      preflight.Refused, "1 of 2 checks red .a thing: 2"
    ):
      preflight.enforce(red, "strict")
    preflight.enforce(red, "warn")
    self.assertFalse(preflight.Check("nan", float("nan"), 1.0).passed)

  def run_preflight(self, mode, fault=None, num_rows=6, **options):
    """What a script's preflight prints, of a rollout that no row has ended."""
    model, params, rollout, settings = _setting(stop_ids=())
    rollout = jax.tree.map(lambda x: x[:num_rows], rollout)
    drawn = set(np.asarray(rollout.response_ids).ravel().tolist())
    end = next(i for i in range(40) if i not in drawn)
    sampler = mock.Mock(stop_ids=() if fault == "no stops" else (end,))
    sampler.settings.stop_strings = ()

    def log_probs_of(params, rollout):
      temperature = 1.0 if fault == "temperature" else settings.temperature
      statistics, _ = rollouts.token_statistics(
        model, params, rollout, temperature=temperature
      )
      return statistics.log_probs

    def prepare(state, reference, rollout, earned):
      # All scores are equal: the advantages are 0.
      mask = rollout.response_mask
      return {
        "rollout": rollout,
        "old_log_probs": log_probs_of(state["params"], rollout),
        "advantages": jnp.where(mask, earned[:, None], 0.0),
      }, {}

    def loss_fn(params, batch, scale):
      mask = batch["rollout"].response_mask
      ids = batch["rollout"].response_ids
      if fault == "end":
        mask &= ids != end
      if fault == "short":
        mask &= jnp.roll(mask, -1, axis=1)
      loss, metrics = ppo.clipped_policy_loss(
        log_probs_of(params, batch["rollout"]),
        batch["old_log_probs"],
        batch["advantages"],
        mask,
        clip_epsilon=0.2,
      )
      return scale * loss, metrics

    weigh = lambda part: part["rollout"].response_mask.sum()
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
      preflight.run(
        *(mode, prepare, {"params": params}, None, rollout),
        jnp.zeros(num_rows),
        sampler=sampler,
        gradients=functools.partial(
          microbatch.grad, loss_fn, weigh=None if fault == "weights" else weigh
        ),
        more=[jnp.float32(2.0)],
        micro_batch=num_rows,
        tolerance=precision.tolerance("float32", params, 0.7),
        **options,
      )
    return out.getvalue()

  def test_run_of_a_sound_script(self):
    shown = self.run_preflight("strict")
    self.assertIn("2 micro-batches equal one", shown)
    self.assertNotIn("RED", shown)
    self.assertIn("3 micro-batches", self.run_preflight("strict", num_rows=3))
    # One row has no parts.
    self.assertNotIn("micro-batches", self.run_preflight("strict", num_rows=1))
    self.run_preflight("strict", "no stops")

  @parameterized.parameters(
    ("temperature", "sampler and trainer log-probs agree"),
    ("end", "the end of a response is learnt from"),
    ("short", "the end of a response is learnt from"),
    ("weights", "2 micro-batches equal one batch"),
  )
  def test_run_refuses(self, fault, name):
    # With equal scores, and no row that has ended by itself.
    with self.assertRaisesRegex(preflight.Refused, name):
      self.run_preflight("strict", fault)
    self.assertIn("RED", self.run_preflight("warn", fault))

  def test_parts_that_need_not_add_up(self):
    shown = self.run_preflight("strict", "weights", parts_add_up=False)
    self.assertIn("entropies differ", shown)

  def test_show(self):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
      preflight.show(
        [preflight.Check("a thing", 2.0, 1.0, "nats")],
        [
          {
            "name": "learn",
            "seconds": 1.5,
            "argument_bytes": 2**20,
            "output_bytes": 0,
            "temporary_bytes": 0,
          }
        ],
        {"params": jnp.zeros((3, 2**18)), "reference": None},
      )
    for part in ("a thing", "RED", "learn", "1.5", "params", "3.0 MB"):
      self.assertIn(part, out.getvalue())


class MemoryTest(absltest.TestCase):
  def test_tree_bytes(self):
    tree = {"a": jnp.zeros((2, 3)), "b": jnp.zeros(4, jnp.bfloat16)}
    self.assertEqual(preflight.tree_bytes(tree), 24 + 8)
    self.assertEqual(preflight.tree_bytes(None), 0)
    # Of the 64 and 6 bytes, a device has an eighth and all of them.
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    spread = lambda *spec: jax.sharding.NamedSharding(mesh, jax.P(*spec))
    tree = {
      "a": jax.device_put(jnp.zeros((2, 8)), spread(None, "data")),
      "b": jax.device_put(jnp.zeros(3, jnp.bfloat16), spread()),
    }
    self.assertEqual(preflight.tree_bytes(tree), 64 + 6)
    self.assertEqual(preflight.device_bytes(tree), 8 + 6)


if __name__ == "__main__":
  absltest.main()
