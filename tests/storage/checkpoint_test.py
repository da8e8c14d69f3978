"""Tests of rljax.storage.checkpoint."""

import collections
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import absltest, parameterized
from jax.sharding import PartitionSpec

from rljax.distributed import meshes
from rljax.storage import checkpoint
from tests import conftest


def _state(seed, mesh=None):
  """A little of everything that a run keeps, in all of its dtypes."""
  keys = jax.random.split(jax.random.key(seed), 4)
  params = {
    "layers": [
      {"kernel": jax.random.normal(keys[0], (8, 4))},
      {"kernel": jax.random.normal(keys[1], (4, 8), jnp.bfloat16)},
    ],
    "head/scale": jax.random.normal(keys[2], (3,), jnp.float16),
  }
  state = {
    "params": params,
    "optimizer": optax.adam(1e-3).init(params),
    "kl": {"coef": jnp.array(0.1), "steps": jnp.int32(seed)},
    "key": keys[3],
    "keys": jax.random.split(jax.random.key(seed, impl="rbg"), 2),
    "mask": np.array([True, False]),
    "counts": np.arange(5, dtype=np.int64) + 2**40 + seed,
    "epoch": seed,
    "nothing": None,
  }
  if mesh is not None:
    rules = ((r"kernel", PartitionSpec("fsdp", "tensor")),)
    for name in ("params", "optimizer"):
      shardings = meshes.shardings(state[name], rules, mesh)
      state[name] = meshes.place(state[name], shardings)
  return state


class _WorkdirTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.workdir = pathlib.Path(
      self.enter_context(tempfile.TemporaryDirectory())
    )
    self.folder = self.workdir / "checkpoints"

  def _save(self, *steps, **options):
    with checkpoint.Checkpoints(self.workdir, **options) as checkpoints:
      for step in steps:
        checkpoints.save(step, _state(step), {"step": step})

  def _assert_same(self, restored, expected):
    self.assertEqual(jax.tree.structure(restored), jax.tree.structure(expected))
    self.assertEqual(
      checkpoint.fingerprint(restored), checkpoint.fingerprint(expected)
    )


class RoundTripTest(_WorkdirTest):
  def test_bits_kinds_and_meta(self):
    state = _state(3)
    meta = {"step": 3, "cursor": {"epoch": 1, "row": 2**60}, "x": [None, "é"]}
    with checkpoint.Checkpoints(self.workdir) as checkpoints:
      self.assertIsNone(checkpoints.restore_latest(state))
      checkpoints.save(3, state, meta)
    with checkpoint.Checkpoints(self.workdir) as checkpoints:
      step, restored, found = checkpoints.restore_latest(_state(9))
      self.assertEqual(checkpoints.messages, [])
    self.assertEqual(step, 3)
    self.assertEqual(found, meta)
    self._assert_same(restored, state)

    def check(leaf, like):
      self.assertIs(type(leaf), type(like))
      if isinstance(like, jax.Array):
        self.assertEqual(leaf.dtype, like.dtype)
        # Either would make a compiled function compile once more.
        self.assertEqual(leaf.committed, like.committed)
        self.assertEqual(
          getattr(leaf, "weak_type", None), getattr(like, "weak_type", None)
        )

    jax.tree.map(check, restored, state)
    self.assertTrue((self.folder / "3" / "state").is_dir())
    written = (self.folder / "3" / "meta" / "data.json").read_text()
    self.assertEqual(json.loads(written), meta)

  def test_restored_state_does_not_compile_again(self):
    update = jax.jit(lambda state: jax.tree.map(lambda x: x, state))
    state = {"x": jnp.ones(3), "coef": jnp.array(0.5), "key": jax.random.key(0)}
    update(state)
    with checkpoint.Checkpoints(self.workdir) as checkpoints:
      checkpoints.save(1, state, {})
      _, restored, _ = checkpoints.restore_latest(state)
    update(restored)
    self.assertEqual(update._cache_size(), 1)

  @parameterized.parameters(
    ("fsdp:4,tensor:2", "data:2,fsdp:2,tensor:2"),
    ("fsdp:2,tensor:4", "data:1"),
    ("data:1", "fsdp:8"),
  )
  def test_other_mesh(self, first, second):
    # fsdp:8 splits 8 rows into 8; the other kernel has 4.
    state = _state(1, meshes.make(first))
    if second == "fsdp:8":
      del state["params"]["layers"][1], state["optimizer"]
    mesh = meshes.make(second)
    like = {**_state(2)}
    if second == "fsdp:8":
      del like["params"]["layers"][1], like["optimizer"]
    rules = ((r"kernel", PartitionSpec("fsdp", "tensor")),)
    shardings = meshes.shardings(like["params"], rules, mesh)
    like["params"] = meshes.place(like["params"], shardings)
    with checkpoint.Checkpoints(self.workdir) as checkpoints:
      checkpoints.save(1, state, {})
      _, restored, _ = checkpoints.restore_latest(like)
    self._assert_same(restored, state)
    jax.tree.map(
      lambda leaf, sharding: self.assertEqual(leaf.sharding, sharding),
      restored["params"],
      shardings,
    )

  def test_state_may_be_donated_and_overwritten_at_once(self):
    wipe = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    with checkpoint.Checkpoints(self.workdir) as checkpoints:
      for step in range(1, 4):
        device = jnp.arange(1_000_000, dtype=jnp.float32) * step
        host = np.arange(1_000_000, dtype=np.float32) * step
        state = {"device": device, "host": host}
        expected = checkpoint.fingerprint(state)
        checkpoints.save(step, state, {})
        wipe(device).block_until_ready()
        host[:] = -1
        like = {"device": jnp.zeros(1_000_000), "host": host}
        _, restored, _ = checkpoints.restore_latest(like)
        self.assertEqual(checkpoint.fingerprint(restored), expected)

  def test_keeps_the_latest(self):
    with checkpoint.Checkpoints(self.workdir) as checkpoints:
      for step in (2, 10, 9, 11):
        checkpoints.save(step, {"x": jnp.ones(2)}, {})
      checkpoints.wait()
      self.assertEqual(checkpoints.all_steps(), [10, 11])
    self._save(12, keep=1)
    self.assertEqual(os.listdir(self.folder), ["12"])

  def test_a_step_is_saved_once(self):
    with checkpoint.Checkpoints(self.workdir) as checkpoints:
      checkpoints.save(1, {"x": jnp.ones(2)}, {"n": 1})
      checkpoints.save(1, {"x": jnp.zeros(2)}, {"n": 2})
      _, restored, meta = checkpoints.restore_latest({"x": jnp.zeros(2)})
    self.assertEqual(meta, {"n": 1})
    np.testing.assert_array_equal(restored["x"], np.ones(2))

  def test_folders_that_are_no_checkpoints_stay(self):
    names = ("007", "٣", "-1", "1e2", "x")
    for name in names:
      pathlib.Path(self.workdir, "checkpoints", name).mkdir(parents=True)
    with checkpoint.Checkpoints(self.workdir) as checkpoints:
      self.assertEqual(checkpoints.all_steps(), [])
    there = os.listdir(pathlib.Path(self.workdir, "checkpoints"))
    self.assertCountEqual(there, names)

  def test_forget_after(self):
    self._save(2, 5, 9, keep=3)
    with checkpoint.Checkpoints(self.workdir, keep=3) as checkpoints:
      checkpoints.forget_after(5)
      self.assertEqual(checkpoints.all_steps(), [2, 5])
      # What was forgotten can be saved again.
      checkpoints.save(9, _state(1), {"step": 1})
      checkpoints.wait()
      _, state, meta = checkpoints.restore_latest(_state(0))
      self._assert_same(state, _state(1))
      self.assertEqual(meta, {"step": 1})
      checkpoints.forget_after(0)
      self.assertEqual(checkpoints.all_steps(), [])

  def test_a_run_begun_anew_replaces(self):
    self._save(1, 7)
    with checkpoint.Checkpoints(self.workdir, keep=1) as checkpoints:
      checkpoints.save(1, {"x": jnp.zeros(2)}, {"n": 2})
    self.assertEqual(checkpoint.Checkpoints(self.workdir).all_steps(), [1, 7])
    meta = self.folder / "1" / "meta" / "data.json"
    self.assertEqual(json.loads(meta.read_text()), {"n": 2})

  def test_failed_save_is_said(self):
    checkpoints = checkpoint.Checkpoints(self.workdir)
    with mock.patch.object(os, "rename", side_effect=OSError("disk full")):
      checkpoints.save(1, {"x": jnp.ones(2)}, {})
      with self.assertRaisesRegex(
        OSError, "checkpoints/1 cannot be written: disk full"
      ):
        checkpoints.wait()
    checkpoints.close()
    self.assertEqual(checkpoints.all_steps(), [])

  @parameterized.parameters(
    ({"a": {"b": jnp.zeros((0, 4))}}, {}, r'"a/b" has shape \(0, 4\)'),
    ({"a": "text"}, {}, '"a" is a str'),
    ({"a": jnp.ones(1)}, {"x": object()}, "meta must be JSON"),
  )
  def test_cannot_be_saved(self, state, meta, message):
    with (
      checkpoint.Checkpoints(self.workdir) as checkpoints,
      self.assertRaisesRegex(ValueError, message),
    ):
      checkpoints.save(1, state, meta)

  def test_keep_must_be_positive(self):
    with self.assertRaisesRegex(ValueError, "keep must be positive, got 0"):
      checkpoint.Checkpoints(self.workdir, keep=0)


class OtherStateTest(_WorkdirTest):
  """A whole checkpoint that is not of this run is no reason to start anew."""

  def _restore(self, state):
    with checkpoint.Checkpoints(self.workdir) as checkpoints:
      checkpoints.save(1, {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}, {})
      checkpoints.wait()
      return checkpoints, checkpoints.restore_latest(state)

  def test_differences_are_named(self):
    with self.assertRaises(ValueError) as raised:
      self._restore({"w": jnp.ones((2, 4)), "c": jnp.ones(3)})
    message = str(raised.exception)
    self.assertIn("checkpoints/1 is not of this model and optimizer", message)
    self.assertIn("\n  b: saved, but this run has none\n", message)
    self.assertIn("\n  c: not saved, but this run has it\n", message)
    self.assertIn("\n  w: saved as [2, 3], in this run [2, 4]\n", message)
    self.assertIn("another --workdir", message)

  def test_dtype_is_cast_and_said(self):
    like = {"w": jnp.ones((2, 3), jnp.bfloat16), "b": jnp.ones(3)}
    checkpoints, (_, restored, _) = self._restore(like)
    self.assertEqual(restored["w"].dtype, jnp.bfloat16)
    self.assertEqual(
      checkpoints.messages, ["w was saved as float32 and is cast to bfloat16."]
    )


# Saves as fast as it can. Every array of a step holds the number of the step.
_SAVER = """
    import sys
    import jax.numpy as jnp
    from rljax.storage import checkpoint
    checkpoints = checkpoint.Checkpoints(sys.argv[1])
    for step in range(1, 10_000):
      state = {f"x{i}": jnp.full((200_000,), step + i) for i in range(6)}
      checkpoints.save(step, state, {"step": step})
      if step == 3:
        print("ready", flush=True)
"""


class KillTest(_WorkdirTest):
  def test_kill_in_mid_save(self):
    """`kill -9` at any time leaves a whole checkpoint to go on from."""
    like = {f"x{i}": jnp.zeros((200_000,), jnp.int32) for i in range(6)}
    num_unfinished = 0
    for delay in (0.0, 0.017, 0.06, 0.11):
      shutil.rmtree(self.workdir)
      process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(_SAVER), str(self.workdir)],
        env=dict(os.environ, PYTHONPATH=str(conftest.REPOSITORY)),
        stdout=subprocess.PIPE,
        text=True,
      )
      self.assertEqual(process.stdout.readline(), "ready\n")
      time.sleep(delay)
      process.send_signal(signal.SIGKILL)
      process.communicate()
      with checkpoint.Checkpoints(self.workdir) as checkpoints:
        step, state, meta = checkpoints.restore_latest(like)
      self.assertGreaterEqual(step, 2)
      self.assertEqual(meta, {"step": step})
      for i in range(6):
        np.testing.assert_array_equal(state[f"x{i}"], step + i)
      # What was half-written is gone, and was said.
      num_unfinished += len(checkpoints.messages)
      for message in checkpoints.messages:
        self.assertRegex(message, r"removed the unfinished checkpoint of step")
      names = os.listdir(self.folder)
      self.assertTrue(all(name.isdigit() for name in names), names)
    self.assertGreater(num_unfinished, 0)

  def test_leftovers_of_every_stage(self):
    self._save(1, 2)
    for name in (
      "3.saving.orbax-checkpoint-tmp",
      "3.saving.orbax-checkpoint-tmp-123",
      "4.saving",
      "1.removed",
    ):
      shutil.copytree(self.folder / "2", self.folder / name)
    with checkpoint.Checkpoints(self.workdir) as checkpoints:
      self.assertLen(checkpoints.messages, 3)
      step, _, _ = checkpoints.restore_latest(_state(0))
    self.assertEqual(step, 2)
    self.assertCountEqual(os.listdir(self.folder), ["1", "2"])


def _halve(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip(path):
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)


class DamageTest(_WorkdirTest):
  @parameterized.product(
    damage=[_halve, _flip, os.remove],
    where=["state/ocdbt.process_0/d", "state/_METADATA", "meta/data.json"],
  )
  def test_damaged_checkpoint_is_skipped(self, damage, where):
    self._save(1, 2)
    path = self.folder / "2" / where
    if path.is_dir():  # The largest of the files with the arrays.
      path = max(path.iterdir(), key=lambda file: file.stat().st_size)
    damage(path)
    with (
      self.assertLogs(level="WARNING") as logged,
      checkpoint.Checkpoints(self.workdir) as checkpoints,
    ):
      step, state, meta = checkpoints.restore_latest(_state(0))
      self.assertEqual(step, 1)
      self.assertEqual(meta, {"step": 1})
      self._assert_same(state, _state(1))
      (message,) = checkpoints.messages
      self.assertStartsWith(message, "skipped the checkpoint of step 2: ")
      self.assertIn(path.name, message)
      self.assertIn(message, logged.output[0])
      # The run comes past step 2 again.
      checkpoints.save(2, _state(2), {"step": 2})
    self.assertCountEqual(os.listdir(self.folder), ["1", "2", "2.unreadable"])
    with checkpoint.Checkpoints(self.workdir) as checkpoints:
      self.assertEqual(checkpoints.restore_latest(_state(0))[0], 2)

  @parameterized.parameters((os.remove, "is missing"), (_halve, "cannot be"))
  def test_without_checksums(self, damage, message):
    self._save(1, 2)
    damage(self.folder / "2" / "checksums.json")
    with checkpoint.Checkpoints(self.workdir) as checkpoints:
      self.assertEqual(checkpoints.restore_latest(_state(0))[0], 1)
    self.assertRegex(checkpoints.messages[0], f"checksums.json {message}")

  def test_nothing_whole_is_left(self):
    self._save(1)
    _halve(self.folder / "1" / "meta" / "data.json")
    with checkpoint.Checkpoints(self.workdir) as checkpoints:
      self.assertIsNone(checkpoints.restore_latest(_state(0)))
    self.assertLen(checkpoints.messages, 1)


class RestoreParamsTest(_WorkdirTest):
  def test_latest_and_given_step(self):
    self._save(1, 2)
    for step, expected in ((None, 2), (1, 1), (2, 2)):
      params = checkpoint.restore_params(self.workdir, step)
      self._assert_same(params, _state(expected)["params"])
      for leaf in jax.tree.leaves(params):
        self.assertIsInstance(leaf, np.ndarray)

  def test_sharded(self):
    state = _state(1, meshes.make("fsdp:4,tensor:2"))
    with checkpoint.Checkpoints(self.workdir) as checkpoints:
      checkpoints.save(1, state, {})
    self._assert_same(
      checkpoint.restore_params(self.workdir), _state(1)["params"]
    )

  def test_damaged_is_skipped_and_left_alone(self):
    self._save(1, 2)
    _halve(self.folder / "2" / "meta" / "data.json")
    params = checkpoint.restore_params(self.workdir)
    self._assert_same(params, _state(1)["params"])
    self.assertCountEqual(os.listdir(self.folder), ["1", "2"])

  def test_none(self):
    message = f"{self.workdir} has no checkpoint to read parameters from"
    with self.assertRaisesRegex(ValueError, message):
      checkpoint.restore_params(self.workdir)
    self._save(1)
    with self.assertRaisesRegex(
      ValueError, r"has no checkpoint of step 5; it has \[1\]"
    ):
      checkpoint.restore_params(self.workdir, 5)
    _halve(self.folder / "1" / "meta" / "data.json")
    with self.assertRaisesRegex(
      ValueError, message + ". Step 1 is damaged: meta/data.json has 5 bytes"
    ):
      checkpoint.restore_params(self.workdir)

  def test_no_params(self):
    with checkpoint.Checkpoints(self.workdir) as checkpoints:
      checkpoints.save(1, {"weights": jnp.ones(2)}, {})
    with self.assertRaisesRegex(ValueError, 'has no entry "params"'):
      checkpoint.restore_params(self.workdir)


class FingerprintTest(parameterized.TestCase):
  def test_same_bits_same_name(self):
    name = checkpoint.fingerprint(_state(1))
    self.assertRegex(name, "^[0-9a-f]{64}$")
    self.assertEqual(checkpoint.fingerprint(_state(1)), name)
    mesh = meshes.make("data:2,fsdp:2,tensor:2")
    self.assertEqual(checkpoint.fingerprint(_state(1, mesh)), name)
    # jax sorts the keys of a dict, but not those of an OrderedDict.
    reordered = collections.OrderedDict(reversed(_state(1).items()))
    self.assertEqual(checkpoint.fingerprint(reordered), name)

  @parameterized.parameters(
    {"x": np.float32([1.0, 2.0]), "y": np.int32([3, 4])},
    {"x": np.float32([1.0, -0.0]), "y": np.int32([3])},
    {"x": np.float32([[1.0, 0.0]]), "y": np.int32([3])},
    {"x": np.float32([1.0, 0.0]).view(np.int32), "y": np.int32([3])},
    {"x": np.float32([1.0, 0.0]), "z": np.int32([3])},
  )
  def test_other_bits_other_name(self, **tree):
    base = {"x": np.float32([1.0, 0.0]), "y": np.int32([3])}
    self.assertNotEqual(
      checkpoint.fingerprint(tree), checkpoint.fingerprint(base)
    )

  def test_keys_count(self):
    self.assertNotEqual(
      checkpoint.fingerprint(jax.random.key(0)),
      checkpoint.fingerprint(jax.random.key(1)),
    )


if __name__ == "__main__":
  absltest.main()
