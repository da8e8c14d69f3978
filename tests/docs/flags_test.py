"""The page of flags is that of the scripts."""

import subprocess
import sys

from absl.testing import absltest

from tests.docs import markdown


class FlagsTest(absltest.TestCase):
  def test_page_is_up_to_date(self):
    done = subprocess.run(
      [sys.executable, "docs/write_flags.py", "--check"],
      cwd=markdown.ROOT,
      env=markdown.environment(),
      capture_output=True,
      text=True,
      check=False,
    )
    self.assertEqual(done.returncode, 0, done.stdout + done.stderr)

  def test_flags_are_found_wherever_they_are_defined(self):
    ppo = markdown.flags()["experiments/ppo.py"]
    self.assertEqual(ppo["workdir"]["default"], "required")
    self.assertEqual(ppo["kl"]["values"], "none, initial, old")
    self.assertEqual(ppo["num_page_samples"]["kind"], "int ≥ 0")
    for name in ("help", "flagfile", "verbosity", "chex_n_cpu_devices"):
      self.assertNotIn(name, ppo)


if __name__ == "__main__":
  absltest.main()
