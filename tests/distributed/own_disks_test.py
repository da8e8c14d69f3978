"""Two hosts that share a bucket and no folder, by mounts of their own."""

import os
import pathlib
import shutil
import socket
import subprocess
import sys
import tempfile
import unittest

import pytest
from absl.testing import absltest

from rljax.storage import buckets
from tests import conftest, scripts
from tests.distributed import processes_test

SFT = "experiments/sft.py"
FLAGS = (
  *scripts.LEARN_SUMS,
  *("--save_every=2", "--eval_every=2", "--keep_best", "--preflight=off"),
  *("--batch_size=4", "--num_examples=32", "--num_eval_prompts=8"),
  *("--schedule=constant", "--mesh=fsdp:2"),
  *("--hidden_size=16", "--num_layers=1", "--num_heads=2"),
)


def _can_mount():
  try:
    done = subprocess.run(
      ["unshare", "-rm", "true"], capture_output=True, check=False, timeout=20
    )
  except OSError:
    return False
  return done.returncode == 0


@unittest.skipUnless(_can_mount(), "needs unshare -rm, for mounts of its own")
@pytest.mark.slow
class OwnDisksTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(
      self.enter_context(tempfile.TemporaryDirectory())
    )
    (self.folder / "cache").mkdir()

  def run_two(self, *flags, shares=False):
    """Runs a script on two hosts, each with an empty disk of its own.

    With `shares`, it runs in two processes of one host.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
      port = server.getsockname()[1]
    started = []
    for number in range(2):
      disk = self.folder / f"disk-{number * (not shares)}"
      if not (shares and number):
        shutil.rmtree(disk, ignore_errors=True)
      disk.mkdir(exist_ok=True)
      command = [sys.executable, SFT, *scripts.arguments(*flags)]
      mount = f'mount --bind "{disk}" "{self.folder}/cache" && exec "$@"'
      started.append(
        subprocess.Popen(
          ["unshare", "-rm", "bash", "-c", mount, "host", *command],
          cwd=conftest.REPOSITORY,
          env=processes_test.environment(
            RLJAX_BUCKETS=f"{self.folder}/cache",
            RLJAX_COORDINATOR=f"127.0.0.1:{port}",
            RLJAX_NUM_PROCESSES="2",
            RLJAX_PROCESS_ID=str(number),
          ),
          stdout=subprocess.PIPE,
          stderr=subprocess.STDOUT,
          text=True,
        )
      )
    for process in started:
      self.addCleanup(process.kill)
    for process in started:
      output = process.communicate(timeout=600)[0]
      self.assertEqual(process.returncode, 0, output)

  def test_each_uploads_its_part_and_fetches_all(self):
    url = f"file://{self.folder}/bucket/run"
    self.run_two(url, *FLAGS, "--steps=4")
    names = set(buckets.Bucket(url).objects("checkpoints/4"))
    for number in range(2):  # Neither disk has all of it.
      place = (self.folder / f"disk-{number}").glob("*/*/run/checkpoints/4")
      whole = [x for y in place for x in y.rglob("*") if x.is_file()]
      self.assertLess(len(whole), len(names))
    self.assertIn(
      "checkpoints/4/state/array_metadatas/process_1", names, sorted(names)
    )
    self.run_two(url, *FLAGS, "--steps=8")
    whole = f"file://{self.folder}/bucket/whole"
    self.run_two(whole, *FLAGS, "--steps=8")
    shared = f"file://{self.folder}/bucket/shared"
    for steps in (4, 8):
      self.run_two(shared, *FLAGS, f"--steps={steps}", shares=True)
    there, other = buckets.fetch(url), buckets.fetch(whole)
    self.assertEqual(scripts.fingerprint(there), scripts.fingerprint(other))
    self.assertEqual(
      scripts.fingerprint(buckets.fetch(shared)), scripts.fingerprint(other)
    )
    self.assertEqual(
      scripts.steady(scripts.rows(there)), scripts.steady(scripts.rows(other))
    )
    # One host goes on with it, too.
    os.environ["RLJAX_BUCKETS"] = str(self.folder / "one")
    self.addCleanup(os.environ.pop, "RLJAX_BUCKETS")
    scripts.run(SFT, url, *FLAGS, "--mesh=data:-1", "--steps=10")


if __name__ == "__main__":
  absltest.main()
