import importlib.util
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import unittest
from unittest import mock

import pytest
from absl.testing import absltest, parameterized

from rljax import compare, export
from rljax.models import hf
from rljax.storage import buckets, checkpoint
from tests import conftest, scripts

SFT = "experiments/sft.py"
FLAGS = (
  *scripts.LEARN_SUMS,
  *("--steps=8", "--save_every=2", "--eval_every=4", "--keep_best"),
  *("--preflight=off", "--batch_size=4", "--num_examples=32"),
  *("--hidden_size=16", "--num_layers=1", "--num_heads=2"),
)
STORIES = (
  pathlib.Path(os.environ.get("RLJAX_SHARED", "../shared"))
  / "data/models/stories260k"
)


def setUpModule():
  scripts.without_pictures()


def tearDownModule():
  scripts.remove_scratch()


class _Case(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(
      self.enter_context(tempfile.TemporaryDirectory())
    )
    self.cache = self.folder / "cache"
    self.enter_context(
      mock.patch.dict(os.environ, RLJAX_BUCKETS=str(self.cache))
    )

  def killed(self, pattern, when, url, *flags):
    """Starts a run that dies as it uploads, and empties its machine."""
    done = subprocess.run(
      [sys.executable, "-m", "tests.killed_upload", SFT, pattern, when]
      + scripts.arguments(url, *scripts._as_needed(SFT, flags)),
      cwd=conftest.REPOSITORY,
      env=scripts.environment(),
      capture_output=True,
      text=True,
      check=False,
    )
    self.assertEqual(done.returncode, -signal.SIGKILL, done.stderr)
    shutil.rmtree(self.cache)

  def check_same(self, url, workdir):
    """Holds what a bucket has against a run that was never stopped."""
    there = buckets.fetch(url)
    for name in ("", "best"):
      self.assertEqual(
        scripts.fingerprint(there / name),
        scripts.fingerprint(pathlib.Path(workdir) / name),
        name,
      )
    for name in ("metrics.jsonl", "evaluations.jsonl"):
      if (pathlib.Path(workdir) / name).exists():
        self.assertEqual(
          scripts.steady(scripts.rows(there, name)),
          scripts.steady(scripts.rows(workdir, name)),
        )
    self.assertTrue((there / "summary.json").exists())
    self.assertEqual(
      json.loads((there / "flags.json").read_text())["workdir"], url
    )
    # Of what the run no longer keeps here, nothing is left there.
    for part in ("checkpoints", "best/checkpoints", "model"):
      self.assertEqual(
        sorted(x.name for x in (there / part).iterdir()),
        sorted(x.name for x in (pathlib.Path(workdir) / part).iterdir()),
      )


class FolderTest(_Case):
  """A mounted folder that is treated as a bucket."""

  def test_a_run_that_is_killed(self):
    url = f"file://{self.folder}/bucket/run"
    self.killed("checkpoints/4/checksums", "before", url, *FLAGS)
    names = set(buckets.Bucket(url).objects())
    self.assertIn("checkpoints/2/checksums.json", names)
    self.assertIn("checkpoints/4/meta/data.json", names)
    scripts.run(SFT, url, *FLAGS)
    scripts.run(SFT, self.folder / "whole", *FLAGS)
    self.check_same(url, self.folder / "whole")
    # Nothing trains into a run with other flags, wherever it lies.
    shutil.rmtree(self.cache)
    refused = scripts.run(SFT, url, *FLAGS, "--seed=1", ok=False)
    self.assertIn(f"{url} belongs to a run with other flags", refused.stderr)

    with self.assertRaisesRegex(ValueError, "holds the run itself"):
      export.export(f"{url}/best", url)
    out = f"file://{self.folder}/bucket/model"
    export.export(f"{url}/best", out)
    self.assertIn("README.md", buckets.Bucket(out).objects())
    self.assertEqual(
      checkpoint.fingerprint(hf.load(out).params),
      checkpoint.fingerprint(hf.load(self.folder / "whole" / "best").params),
    )
    arms = compare.parse([f"a={url}", f"b={self.folder}/whole"])
    self.assertEqual(list(arms), ["a", "b"])


def _free_port():
  with socket.socket() as one:
    one.bind(("127.0.0.1", 0))
    return one.getsockname()[1]


@unittest.skipUnless(
  all(map(importlib.util.find_spec, ("moto", "flask", "s3fs", "boto3"))),
  "needs pip install -e '.[test]'",
)
@unittest.skipUnless(STORIES.exists(), f"needs {STORIES}")
@pytest.mark.slow
class S3Test(_Case):
  """A server of S3 on this machine."""

  def setUp(self):
    super().setUp()
    port = _free_port()
    endpoint = f"http://127.0.0.1:{port}"
    server = subprocess.Popen(
      [sys.executable, "-m", "moto.server", "-p", str(port)],
      stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
    )
    self.addCleanup(server.wait)
    self.addCleanup(server.kill)
    self.enter_context(
      mock.patch.dict(
        os.environ,
        AWS_ACCESS_KEY_ID="id",
        AWS_SECRET_ACCESS_KEY="secret",
        AWS_DEFAULT_REGION="us-east-1",
        AWS_ENDPOINT_URL=endpoint,
      )
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
      try:
        socket.create_connection(("127.0.0.1", port), 1).close()
        break
      except OSError:
        time.sleep(0.2)
    import boto3

    boto3.client("s3").create_bucket(Bucket="bucket")

  def test_killed_at_several_points(self):
    bucket = buckets.Bucket("s3://bucket")
    bucket.upload({f"model/{x.name}": x for x in STORIES.iterdir()})
    rows = [
      {"prompt": f"Once there were {i} ", "response": "little dogs."}
      for i in range(40)
    ]
    bucket.write("x.jsonl", "".join(map(_line, rows)).encode())
    flags = (
      *("--policy=s3://bucket/model", "--data=s3://bucket/x.jsonl"),
      *("--steps=8", "--save_every=2", "--eval_every=4", "--keep_best"),
      *("--batch_size=4", "--eval_share=0.2"),
    )
    url = "s3://bucket/runs/sft"
    for pattern, when in (
      ("^flags.json", "before"),
      ("checkpoints/2/state", "before"),
      ("checkpoints/2/checksums", "before"),
      ("checkpoints/2/checksums", "after"),
      ("best/checkpoints/4/checksums", "after"),
      ("^checkpoints/6/meta", "after"),
      ("^metrics.jsonl", "after"),
      ("^summary.json", "before"),
    ):
      self.killed(pattern, when, url, *flags)
    scripts.run(SFT, url, *flags)
    scripts.run(SFT, self.folder / "whole", *flags)
    self.check_same(url, self.folder / "whole")


def _line(row):
  return json.dumps(row) + "\n"


if __name__ == "__main__":
  absltest.main()
