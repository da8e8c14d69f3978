"""Updates that are not finite: skipped, counted, and the end of a run."""

import contextlib
import io
import json
import pathlib
import sys
import tempfile
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags, logging
from absl.testing import absltest, parameterized

from rljax.storage import checkpoint
from rljax.training import guards, optimizers, precision, runs
from tests import tiny

SCRIPT = "experiments/script.py"
MODEL = tiny.model(tiny.gpt2_config(num_layers=1))
ADAMW = dict(learning_rate=0.1, b1=0.5, weight_decay=0.01, max_grad_norm=1.0)


def _bits(tree):
  return checkpoint.fingerprint(tree)


class GuardedTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    # optax raises decays to the power of an integer.
    self.enter_context(jax.numpy_dtype_promotion("standard"))
    self.params = {"w": jnp.float32([1.0, -0.0, 3.0]), "b": jnp.float32([0.0])}
    self.grads = jax.tree.map(jnp.ones_like, self.params)

  def step(self, transform, grads, metrics=None, state=None, **options):
    state = transform.init(self.params) if state is None else state
    return jax.jit(
      lambda *arrays: optimizers.step(transform, *arrays, **options)
    )(grads, state, self.params, metrics or {"nll/loss": jnp.float32(1.0)})

  def test_a_finite_update_is_that_of_optax(self):
    plain = optax.chain(
      optax.clip_by_global_norm(1.0),
      optax.adamw(0.1, b1=0.5, weight_decay=0.01),
    )
    params, state, metrics = self.step(optimizers.make(10, **ADAMW), self.grads)
    updates, inner = plain.update(
      self.grads, plain.init(self.params), self.params
    )
    expected = optax.apply_updates(self.params, updates)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), params, expected
    )
    self.assertEqual(metrics["gradient_norm"], 2.0)
    self.assertEqual(metrics["updates/skipped"], 0)
    self.assertEqual(metrics["updates/skipped_in_a_row"], 0)
    self.assertEqual(state.inner[1][0].count, inner[1][0].count)

  @parameterized.parameters(("adamw", True), ("muon", False))
  def test_what_is_cheap_is_computed_twice(self, name, is_twice):
    """So that no second parameters and moments wait for the verdict."""
    transform = optimizers.make(10, name=name, learning_rate=0.1)
    state = transform.init(self.params)
    program = str(
      jax.make_jaxpr(transform.apply)(self.grads, state, self.params)
    )
    self.assertEqual("optimization_barrier" in program, is_twice)

  @parameterized.named_parameters(
    ("gradient", {"grad": np.nan}, {}),
    ("infinite gradient", {"grad": np.inf}, {}),
    # Its square is beyond float32.
    ("norm", {"grad": 1e20}, {}),
    ("loss", {}, {"nll/loss": jnp.float32(np.nan)}),
    ("one loss of two", {}, {"loss": 1.0, "kl/loss": jnp.float32(np.inf)}),
    # The gradient is finite, and so is the loss; what it would make is not.
    ("parameter", {"rate": np.inf}, {}),
  )
  def test_an_update_that_is_not_finite_changes_no_bit(self, how, metrics):
    transform = optimizers.make(10, **ADAMW)
    _, state, _ = self.step(transform, self.grads)
    grads = dict(self.grads)
    if "grad" in how:
      grads["b"] = jnp.float32([how["grad"]])
    options = {"rate": jnp.float32(how["rate"])} if "rate" in how else {}
    for count in (1, 2):
      before = _bits(state.inner)
      params, state, found = self.step(
        transform, grads, metrics, state, **options
      )
      self.assertEqual(_bits(params), _bits(self.params))
      self.assertEqual(_bits(state.inner), before)
      self.assertEqual(found["updates/skipped"], count)
      self.assertEqual(found["updates/skipped_in_a_row"], count)
    # A good one ends the row; the count of the run stays.
    _, state, found = self.step(transform, self.grads, None, state)
    self.assertEqual(found["updates/skipped"], 2)
    self.assertEqual(found["updates/skipped_in_a_row"], 0)

  def test_other_metrics_may_be_anything(self):
    metrics = {"nll/loss": jnp.float32(1), "nll/perplexity": jnp.float32("inf")}
    _, _, found = self.step(optimizers.make(10, **ADAMW), self.grads, metrics)
    self.assertEqual(found["updates/skipped"], 0)

  def test_as_any_optimizer_of_optax(self):
    transform = optimizers.guarded(optax.sgd(0.5, momentum=0.9))
    state = transform.init(self.params)
    bad = jax.tree.map(lambda x: x * jnp.nan, self.grads)
    updates, state = jax.jit(transform.update)(bad, state, self.params)
    params = optax.apply_updates(self.params, updates)
    self.assertEqual(_bits(params), _bits(self.params))
    updates, state = jax.jit(transform.update)(self.grads, state, self.params)
    np.testing.assert_array_equal(updates["w"], [-0.5] * 3)

  def test_a_state_that_overflows(self):
    transform = optimizers.guarded(optax.sgd(1e-30, momentum=0.9))
    state = transform.init(self.params)
    state = state._replace(
      inner=jax.tree.map(lambda x: x - 3.4e38, state.inner)
    )
    grads = jax.tree.map(lambda x: x * -1e18, self.grads)
    for _ in range(3):
      params, state, _ = self.step(transform, grads, None, state)
    self.assertTrue(bool(optimizers.all_finite((params, state))))


class WatchTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.notes = []

  def watch(self, **options):
    return guards.Watch(self.notes.append, **{"max_skipped": 3, **options})

  def test_names_the_first_metric_and_its_step(self):
    watch = self.watch()
    good = {"updates/skipped_in_a_row": 0, "nll/loss": np.float32(1)}
    bad = {"gradient_norm": np.float32("nan"), "nll/loss": np.float32("inf")}
    watch.look(4, good | {"updates/skipped_in_a_row": 0})
    watch.look(5, bad | {"updates/skipped_in_a_row": 1})
    self.assertIn("step 5: nll/loss is inf", self.notes[0])
    watch.look(6, good)  # Ends the row.
    self.assertEqual(watch.state, {})
    watch.look(7, bad | {"updates/skipped_in_a_row": 1})
    state = json.loads(json.dumps(watch.state))
    watch = self.watch()  # As after a kill.
    watch.restore(state)
    watch.look(8, bad | {"updates/skipped_in_a_row": 2})
    with self.assertRaisesRegex(
      guards.NotFinite,
      r"nll/loss was inf in step 7, .* 3 in a row were skipped .*max_skipped=3",
    ):
      watch.look(9, {"updates/skipped_in_a_row": 3})

  @parameterized.parameters(0, 1)
  def test_stops_at_the_first(self, max_skipped):
    watch = self.watch(max_skipped=max_skipped)
    watch.look(0, {"reward/mean": 1.0})  # Says nothing of updates.
    watch.look(1, {"updates/skipped_in_a_row": 0})
    with self.assertRaisesRegex(
      guards.NotFinite, "a parameter that the update"
    ):
      watch.look(2, {"updates/skipped_in_a_row": 1, "loss": 1.0})

  def test_an_end_in_the_midst_of_it(self):
    watch = self.watch()
    watch.look(8, {"updates/skipped_in_a_row": 1, "loss": np.nan})
    watch.check_end(8)  # One bad step is none.
    with self.assertRaisesRegex(
      guards.NotFinite, "nan in step 8, .* has ended"
    ):
      watch.check_end(9)

  def test_a_stale_sampler(self):
    gap = "sampler/log_prob_gap_mean"
    tolerance = precision.tolerance("float32")
    watch = self.watch(tolerance=tolerance, is_strict=True)
    for step, value in enumerate((1e-6, 1e-3, 1e-3, 1e-6, 1e-3, np.nan)):
      watch.look(step, {gap: value})
    self.assertIn("differ by 0.001 nats", self.notes[0])
    self.assertEqual(watch.num_gaps, 2)
    with self.assertRaisesRegex(guards.Stale, "3 steps in a row"):
      watch.look(6, {gap: 1e-3})
    watch = self.watch(tolerance=tolerance)  # Under --preflight=warn.
    self.notes.clear()
    for step in range(5):
      watch.look(step, {gap: 1.0})
    self.assertLen(self.notes, 1)
    self.watch().look(0, {gap: 9.0})  # Under --preflight=off.

  def test_all_measures_are_watched_but_the_largest(self):
    watch = self.watch(tolerance=precision.tolerance("float32"))
    watch.look(0, {"sampler/log_prob_gap": 1.0})
    self.assertEqual(watch.num_gaps, 0)
    for name in ("log_prob_gap_mean", "log_prob_gap_99", "log_prob_k3"):
      watch.look(1, {"sampler/log_prob_gap_mean": 0.0})
      watch.look(2, {f"sampler/{name}": 1.0})
      self.assertEqual(watch.num_gaps, 1)

  def test_first_not_finite(self):
    tree = {"a": jnp.ones(2), "b": {"c": jnp.float32([1, np.nan])}}
    self.assertEqual(guards.first_not_finite(tree), "b/c")
    self.assertIsNone(guards.first_not_finite({"a": jnp.int32([1, 2])}))
    half = {"w": jnp.asarray([np.inf], jnp.bfloat16)}
    self.assertEqual(guards.first_not_finite(half), "w")


class RunTest(parameterized.TestCase):
  """A parameter that learns to be 0, from noise that may be NaN."""

  def setUp(self):
    super().setUp()
    folder = self.enter_context(tempfile.TemporaryDirectory())
    self.workdir = pathlib.Path(folder) / "run"
    self.enter_context(mock.patch.object(sys, "argv", [SCRIPT]))
    self.enter_context(mock.patch("rljax.evaluation.curves.curves"))
    self.addCleanup(logging.set_verbosity, logging.get_verbosity())
    self.enter_context(jax.numpy_dtype_promotion("standard"))

  def start(self, *arguments):
    values = flags.FlagValues()
    for define, name, default in (
      (flags.DEFINE_string, "workdir", str(self.workdir)),
      (flags.DEFINE_string, "compilation_cache", ""),
      (flags.DEFINE_string, "mesh", "data:1"),
      (flags.DEFINE_string, "wandb_project", ""),
      (flags.DEFINE_integer, "seed", 0),
      (flags.DEFINE_integer, "save_every", 2),
      (flags.DEFINE_integer, "max_skipped", 4),
      (flags.DEFINE_bool, "keep_best", True),
      (flags.DEFINE_integer, "verbosity", 0),
    ):
      define(name, default, "Text.", flag_values=values)
      values.register_key_flag_for_module(SCRIPT, values[name])
    values([SCRIPT, *arguments])
    return runs.start(values, total_steps=12)

  def train(self, run, bad=(), values=None, kill_at=None, start=4.0):
    """Trains 12 steps, of which those in `bad` learn from NaN."""
    transform = optimizers.make(12, learning_rate=0.5)
    state = run.restore(
      {"w": jnp.float32([start, -2.0])}, (), optimizer=transform
    )

    def loss_fn(params, noise):
      loss = jnp.sum(params["w"] ** 2 * noise)
      return loss, {"loss": loss}

    def update(state, noise):
      grads, metrics = jax.grad(loss_fn, has_aux=True)(state["params"], noise)
      params, optimizer, metrics = optimizers.step(
        transform, grads, state["optimizer"], state["params"], metrics
      )
      return {"params": params, "optimizer": optimizer}, metrics

    update = run.compile(update, returns_state=True)
    printed = io.StringIO()
    with (
      contextlib.redirect_stdout(printed),
      run.training(MODEL, None, {}, ["loss"]),
    ):
      for step in run.steps(freeze=[update]):
        if step == kill_at:
          run._checkpoints.wait()
          return printed.getvalue()
        noise = np.float32(np.nan if step in bad else 1.0 + 0.1 * step)
        run.keep_best(step, (values or {}).get(step, 0.0), state["params"])
        state, metrics = update(state, noise)
        run.log(step, jax.device_get(metrics))
        run.save(step + 1, state)
      if run.is_complete:
        run.summarise(["loss"])
    return printed.getvalue()

  def saved(self, folder="."):
    path = self.workdir / folder / "checkpoints"
    return sorted(int(found.name) for found in path.iterdir())

  def test_stops_and_keeps_the_last_finite_checkpoint(self):
    run = self.start()
    with self.assertRaisesRegex(guards.NotFinite, "loss was nan in step 5"):
      self.train(run, bad=range(5, 12))
    self.assertEqual(self.saved(), [2, 4])  # Not 6, in the midst of it.
    rows = [
      json.loads(line)
      for line in (self.workdir / "metrics.jsonl").read_text().splitlines()
    ]
    self.assertEqual(
      [row["updates/skipped"] for row in rows[4:]], [0, 1, 2, 3, 4]
    )
    self.assertIsNone(rows[5]["loss"])
    # The same command comes to the same end.
    with self.assertRaisesRegex(guards.NotFinite, "loss was nan in step 5"):
      self.train(self.start(), bad=range(5, 12))
    self.assertEqual(self.saved(), [2, 4])

  @parameterized.parameters((), (4,), (1, 3, 4, 8), (11,))
  def test_killed_run_ends_with_the_same_bits(self, *bad):
    self.train(self.start(), bad=bad)
    expected = checkpoint.restore_params(self.workdir)
    rows = (self.workdir / "metrics.jsonl").read_text()
    self.assertEqual(
      json.loads(rows.splitlines()[-1])["updates/skipped"], len(bad)
    )
    self.workdir = self.workdir.with_name("killed")
    self.train(self.start(), bad=bad, kill_at=6)
    self.train(self.start(), bad=bad)
    self.assertEqual(
      _bits(checkpoint.restore_params(self.workdir)), _bits(expected)
    )
    self.assertEqual((self.workdir / "metrics.jsonl").read_text(), rows)

  def test_a_save_that_is_due_waits_for_the_end_of_the_row(self):
    self.train(self.start(), bad=(6, 7, 8), kill_at=11)
    self.assertEqual(self.saved(), [6, 10])

  def test_the_end_of_a_run_within_a_row_is_no_success(self):
    with self.assertRaisesRegex(guards.NotFinite, "step 10, .* has ended"):
      self.train(self.start("--max_skipped=20"), bad=(10, 11))
    self.assertEqual(self.saved(), [8, 10])

  def test_a_value_that_is_not_finite_is_never_the_best(self):
    values = {0: np.nan, 1: -3.0, 2: np.inf, 3: -2.0, 4: -5.0, 5: np.nan}
    values |= dict.fromkeys(range(6, 12), -9.0)
    run = self.start()
    printed = self.train(run, values=values)
    self.assertEqual(run.best, {"step": 3, "value": -2.0, "kept": 3})
    self.assertEqual(self.saved("best"), [3])
    self.assertIn("step 2: the evaluation is inf", printed)
    self.workdir = self.workdir.with_name("other")
    run = self.start()
    self.train(run, values=dict.fromkeys(range(12), np.nan))
    self.assertIsNone(run.best["kept"])
    self.assertFalse((self.workdir / "best" / "checkpoints").exists())

  def test_nothing_that_is_not_finite_is_saved(self):
    run = self.start()
    bad = {"w": jnp.float32([np.inf, 1.0])}
    run.restore({"w": jnp.ones(2)}, (), optimizer=optax.sgd(0.1))
    with run.training(MODEL, None, {}):
      with self.assertRaisesRegex(guards.NotFinite, "w is not finite"):
        run.save(2, {"params": bad, "optimizer": ()})
      run.keep_best(0, 0.0, bad)
      with self.assertRaisesRegex(guards.NotFinite, "best of step 1 is not"):
        run.keep_best(1, 1.0, bad)

  def test_parameters_that_are_not_finite_are_refused_at_the_start(self):
    with self.assertRaisesRegex(ValueError, "not finite: params/w"):
      self.train(self.start(), start=np.nan)


if __name__ == "__main__":
  absltest.main()
