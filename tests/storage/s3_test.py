"""Workdirs in a bucket of a real object store: moto's S3 server."""

import os
import socket
import unittest
from unittest import mock

import pytest
from absl.testing import absltest

from rljax.storage import buckets
from tests.storage import mirrors_test

pytest.importorskip("s3fs")
server = pytest.importorskip("moto.server")

CREDENTIALS = {
  "AWS_ACCESS_KEY_ID": "id",
  "AWS_SECRET_ACCESS_KEY": "secret",
  "AWS_DEFAULT_REGION": "us-east-1",
}


def setUpModule():
  with socket.socket() as one:
    one.bind(("127.0.0.1", 0))
    port = one.getsockname()[1]
  moto = server.ThreadedMotoServer("127.0.0.1", port, verbose=False)
  moto.start()
  unittest.addModuleCleanup(moto.stop)
  environment = mock.patch.dict(
    os.environ, CREDENTIALS | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}
  )
  environment.start()
  unittest.addModuleCleanup(environment.stop)
  import boto3

  boto3.client("s3").create_bucket(Bucket="bucket")


class _S3:
  """Puts a case into a folder of the bucket that no other one has."""

  def setUp(self):
    self.url = f"s3://bucket/{self.id()}/run"
    super().setUp()


class MirrorTest(_S3, mirrors_test.MirrorTest):
  pass


class CheckpointTest(_S3, mirrors_test.CheckpointTest):
  pass


class LeaseTest(_S3, mirrors_test.LeaseTest):
  pass


class BucketTest(absltest.TestCase):
  def test_objects(self):
    bucket = buckets.Bucket(f"s3://bucket/{self.id()}")
    self.assertEqual(bucket.objects(), {})
    self.assertIsNone(bucket.read("a/x"))
    bucket.write("a/x", b"1")
    bucket.write("ab", b"22")
    found = {name: x.size for name, x in bucket.objects().items()}
    self.assertEqual(found, {"a/x": 1, "ab": 2})
    self.assertEqual(list(bucket.objects("a")), ["a/x"])
    self.assertEqual(bucket.list_here(), ["a", "ab"])
    # The store says who was first.
    self.assertTrue(bucket.create("lock", b"mine"))
    self.assertFalse(bucket.create("lock", b"yours"))
    self.assertEqual(bucket.read("lock"), b"mine")
    # What is replaced has another tag.
    before = bucket.objects()["ab"].tag
    bucket.write("ab", b"33")
    self.assertNotEqual(bucket.objects()["ab"].tag, before)
    bucket.copy("a/x", "c/x")
    bucket.delete(["a/x", "gone"])
    self.assertEqual(set(bucket.objects()), {"ab", "c/x", "lock"})


if __name__ == "__main__":
  absltest.main()
