"""Tests of rljax.storage.signals."""

import os
import signal
import tempfile
import threading

import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from rljax.storage import checkpoint, signals


class PreemptionTest(parameterized.TestCase):
  @parameterized.parameters(signal.SIGTERM, signal.SIGINT)
  def test_first_signal_asks_second_raises(self, number):
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    with signals.Preemption() as preemption:
      self.assertFalse(preemption.requested)
      self.assertFalse(preemption.should_stop())
      with self.assertLogs(level="WARNING") as logged:
        os.kill(os.getpid(), number)
      self.assertTrue(preemption.requested)
      self.assertTrue(preemption.should_stop())
      # A shell script must stop at Ctrl-C; a scheduler wants a clean exit.
      self.assertEqual(
        preemption.exit_status, 130 if number == signal.SIGINT else 0
      )
      self.assertIn(number.name, logged.output[0])
      with self.assertRaises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    for n, handler in before.items():
      self.assertIs(signal.getsignal(n), handler)

  def test_save_survives_it(self):
    """A signal while a save is under way neither stops nor spoils it."""
    with tempfile.TemporaryDirectory() as workdir:
      state = {"x": jnp.arange(2_000_000)}
      with (
        signals.Preemption() as preemption,
        checkpoint.Checkpoints(workdir) as checkpoints,
      ):
        timer = threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGTERM))
        timer.start()
        checkpoints.save(1, state, {})
        timer.join()
      self.assertTrue(preemption.requested)
      with checkpoint.Checkpoints(workdir) as checkpoints:
        _, restored, _ = checkpoints.restore_latest(state)
      np.testing.assert_array_equal(restored["x"], state["x"])


if __name__ == "__main__":
  absltest.main()
