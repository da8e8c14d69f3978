import json
import pathlib
import shutil
import time
from unittest import mock

import numpy as np
from absl.testing import absltest, parameterized

from rljax.storage import buckets, checkpoint, leases, locks, mirrors, workdirs
from tests.storage import buckets_test


def state(number):
  return {"params": {"x": np.full(3, number, np.float32)}}


class _Case(parameterized.TestCase):
  url = "memory://b/run"

  def setUp(self):
    super().setUp()
    self.cache = buckets_test.clean_cache(self) / "cache"
    self.enter_context(mock.patch.dict(mirrors._OPEN, clear=True))
    self.bucket = buckets.Bucket(self.url)

  def open(self):
    """Opens the workdir; returns the folder that stands for it."""
    folder = mirrors.folder_of(self.url)
    workdirs.prepare(folder)
    mirror = mirrors.of(folder)
    self.addCleanup(mirror._ended.set)  # Its threads.
    self.addCleanup(mirror._lease._ended.set)
    return pathlib.Path(folder)

  def leave(self, *, empty=True):
    """Leaves it as kill -9 does: nothing is closed, and the thread ends."""
    for mirror in mirrors._OPEN.values():
      mirror._ended.set()
      mirror._lease._ended.set()
      mirror._lock = None
      # Of a process that is no more.
      lease = mirror._lease
      content = json.loads(lease._content()) | {"pid": 2**22 + 1}
      self.bucket.write(
        leases._name(lease._number), json.dumps(content).encode()
      )
    mirrors._OPEN.clear()
    if empty:
      shutil.rmtree(self.cache)

  def names(self):
    return {x for x in self.bucket.objects() if not x.startswith(".lease")}


class MirrorTest(_Case):
  def test_files_go_there_and_come_back(self):
    with mirrors.closing():
      folder = self.open()
      (folder / "metrics.jsonl").write_text("1\n")
      (folder / "tensorboard").mkdir()
      (folder / "tensorboard/x").write_text("t")
      (folder / ".x.partial").write_text("half")
      (folder / "gone").write_text("x")
      mirrors.of(folder).push()
      (folder / "gone").unlink()
    self.assertEqual(self.names(), {"metrics.jsonl", "tensorboard/x"})
    self.assertEqual(mirrors._OPEN, {})
    shutil.rmtree(self.cache)
    with mirrors.closing():
      folder = self.open()
      self.assertEqual((folder / "metrics.jsonl").read_text(), "1\n")
      self.assertEqual(mirrors.shown(folder / "best"), f"{self.url}/best")

  def test_files_are_uploaded_when_the_block_fails(self):
    with self.assertRaisesRegex(KeyError, "boom"), mirrors.closing():
      (self.open() / "samples.jsonl").write_text("1\n")
      raise KeyError("boom")
    self.assertEqual(self.names(), {"samples.jsonl"})

  def test_what_is_newer_here_stays(self):
    folder = self.open()
    (folder / "flags.json").write_text("{}")
    (folder / "rows").write_text("1\n")
    mirrors.of(folder).push()
    (folder / "rows").write_text("1\n2\n")
    self.leave(empty=False)
    folder = self.open()  # The same machine goes on: rows 2 was paid for.
    self.assertEqual((folder / "rows").read_text(), "1\n2\n")
    self.leave(empty=False)
    self.cache.rename(self.cache.with_name("first"))
    with mirrors.closing():  # Another machine.
      (self.open() / "rows").write_text("3\n")
    shutil.rmtree(self.cache)
    self.cache.with_name("first").rename(self.cache)
    self.assertEqual((self.open() / "rows").read_text(), "3\n")

  def test_a_picture_that_fails_is_left_out_and_rows_are_not(self):
    folder = self.open()
    for name in ("curves.png", "metrics.jsonl"):
      (folder / name).write_text("x")
    upload = buckets.Bucket._upload

    def fails(bucket, name, path):
      if name in failing:
        raise buckets.BucketError(name, OSError("no"), "written")
      upload(bucket, name, path)

    with mock.patch.object(buckets.Bucket, "_upload", fails):
      failing = {"curves.png"}
      mirrors.of(folder).push()
      self.assertEqual(self.names(), {"metrics.jsonl"})
      failing = {"metrics.jsonl"}
      (folder / "metrics.jsonl").write_text("xy")
      with self.assertRaisesRegex(buckets.BucketError, "metrics.jsonl"):
        mirrors.of(folder).push()


class CheckpointTest(_Case):
  def test_an_empty_machine_goes_on(self):
    folder = self.open()
    with checkpoint.Checkpoints(folder) as saved:
      for step in (1, 2, 3):
        (folder / "metrics.jsonl").write_text(f"{step}\n")
        saved.save(step, state(step), {"step": step})
    self.assertEqual(checkpoint.steps(folder), [2, 3])
    self.leave()
    folder = self.open()
    self.assertEqual((folder / "metrics.jsonl").read_text(), "3\n")
    self.assertEqual(checkpoint.steps(folder), [2, 3])
    self.assertEqual(checkpoint.restore_params(folder)["x"][0], 3)
    with checkpoint.Checkpoints(folder) as saved:
      step, found, meta = saved.restore_latest(state(0))
      self.assertEqual((step, meta), (3, {"step": 3}))
      np.testing.assert_array_equal(found["params"]["x"], np.full(3, 3))
      saved.forget_after(2)
      self.assertEqual(checkpoint.steps(folder), [2])

  @parameterized.parameters(0, 1, 3, 6)
  def test_a_kill_while_it_is_uploaded(self, at):
    folder = self.open()
    saved = checkpoint.Checkpoints(folder)
    saved.save(1, state(1), {})
    saved.wait()
    calls, upload = [], buckets.Bucket.write

    def killed(bucket, name, content):
      if "/2/" in name:
        calls.append(name)
        if len(calls) > at:
          raise buckets.BucketError(name, OSError("killed"), "written")
      upload(bucket, name, content)

    with mock.patch.object(buckets.Bucket, "write", killed):
      saved.save(2, state(2), {})
      with self.assertRaisesRegex(buckets.BucketError, "killed"):
        saved.wait()
    self.assertEqual(saved.all_steps(), [1])  # Here, too, it does not count.
    saved.close()
    self.leave()
    folder = self.open()
    self.assertFalse([x for x in self.names() if "checkpoints/2/" in x])
    with checkpoint.Checkpoints(folder) as saved:
      self.assertEqual(saved.restore_latest(state(0))[0], 1)

  def test_the_rows_come_first_and_the_marker_last(self):
    folder, order = self.open(), []
    write = buckets.Bucket.write

    def note(bucket, name, content):
      if not name.startswith(".lease"):
        order.append(name)
      write(bucket, name, content)

    (folder / "metrics.jsonl").write_text("1\n")
    with (
      mock.patch.object(buckets.Bucket, "write", note),
      checkpoint.Checkpoints(folder) as saved,
    ):
      saved.save(1, state(1), {})
    self.assertEqual(order[0], "metrics.jsonl")
    self.assertEqual(order[-1], "checkpoints/1/checksums.json")
    self.assertGreater(len(order), 5)

  def test_damage_in_the_bucket_is_set_aside(self):
    folder = self.open()
    with checkpoint.Checkpoints(folder) as saved:
      for step in (1, 2):
        saved.save(step, state(step), {})
    name = next(
      x for x in self.names() if x.startswith("checkpoints/2/state/d")
    )
    content = self.bucket.read(name)
    self.bucket.write(name, bytes(len(content)))
    self.leave()
    with checkpoint.Checkpoints(self.open()) as saved:
      self.assertEqual(saved.restore_latest(state(0))[0], 1)
      self.assertEqual(saved.unreadable, [2])
    self.assertEqual(
      {x.split("/")[1] for x in self.names() if x.startswith("checkpoints/")},
      {"1", "2.unreadable"},
    )

  def test_a_checkpoint_of_another_time_is_fetched_anew(self):
    folder = self.open()
    with checkpoint.Checkpoints(folder) as saved:
      saved.save(1, state(1), {})
    self.leave(empty=False)
    kept = self.cache.with_name("first")
    self.cache.rename(kept)
    folder = self.open()
    checkpoint.Checkpoints(folder).forget_after(0)
    with checkpoint.Checkpoints(folder) as saved:
      saved.save(1, state(7), {})
    self.leave()
    kept.rename(self.cache)
    with checkpoint.Checkpoints(self.open()) as saved:
      found = saved.restore_latest(state(0))[1]
      np.testing.assert_array_equal(found["params"]["x"], np.full(3, 7))

  def test_parts_of_other_hosts(self):
    folder = self.open()
    mirror = mirrors.of(folder)
    part, final = folder / "part", folder / "checkpoints/1"
    for name in ("state/a/c/1/0", "state/a/zarr.json", "meta/x"):
      (part / name).parent.mkdir(parents=True, exist_ok=True)
      (part / name).write_text(name)
    with (
      mock.patch.object(mirrors, "_SECONDS_FOR_OTHERS", 0.1),
      self.assertRaisesRegex(buckets.BucketError, "process 1 did not"),
    ):
      mirror.parts(final, [1])
    mirror.upload_part(part, final, 1)
    found = mirror.parts(final, [1])
    self.assertEqual(list(found), ["state/a/c/1/0"])  # The rest is the first's.
    self.assertEqual(found["state/a/c/1/0"][0], len("state/a/c/1/0"))
    self.assertEqual(checkpoint.steps(folder), [])


class LeaseTest(_Case):
  def test_one_at_a_time(self):
    held = leases.Lease(self.bucket, seconds=0.4)
    with self.assertRaisesRegex(ValueError, "is being written by process"):
      leases.Lease(self.bucket, seconds=0.4)
    held.close()
    other = leases.Lease(self.bucket, seconds=0.4)
    self.assertEqual(other.previous, held.owner)
    other.close()

  def test_one_that_is_silent_is_taken_and_learns_of_it(self):
    held = leases.Lease(self.bucket, seconds=0.3)
    held._ended.set()  # Its thread is stopped: no sign of life.
    held._thread.join()
    other = leases.Lease(self.bucket, seconds=0.3)
    with self.assertRaisesRegex(buckets.BucketError, "has taken it"):
      held.check()
    other.check()
    other.close()

  def test_of_two_who_wait_one_gets_it(self):
    held = leases.Lease(self.bucket, seconds=0.3)
    held._ended.set()
    held._thread.join()
    create = buckets.Bucket.create

    def late(bucket, name, content):
      if not others:  # Another one is quicker.
        others.append(0)
        others[0] = leases.Lease(bucket, seconds=0.3)
      return create(bucket, name, content)

    others = []
    with (
      mock.patch.object(buckets.Bucket, "create", late),
      self.assertRaisesRegex(ValueError, "is being written by"),
    ):
      leases.Lease(self.bucket, seconds=0.3)
    others[0].check()
    others[0].close()

  def test_on_this_machine_it_is_known_at_once(self):
    self.open()
    started = time.monotonic()
    other = mirrors.Mirror(self.url, mirrors.folder_of(self.url))
    held = ValueError("is being written by process 1 on host")
    with (
      mock.patch.object(locks, "take", side_effect=held),
      self.assertRaisesRegex(ValueError, "is being written by"),
    ):
      other.start()
    self.assertLess(time.monotonic() - started, 1)
    self.leave()  # A process of this host that is gone.
    started = time.monotonic()
    self.open()
    self.assertLess(time.monotonic() - started, 5)


if __name__ == "__main__":
  absltest.main()
