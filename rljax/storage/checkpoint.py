"""Saves the state of a run, so that a killed run resumes exactly.

A workdir holds

  checkpoints/<step>/state  every array: parameters, optimizer, controller, keys
  checkpoints/<step>/meta   a small JSON object: step, place in the data, ...
  checkpoints/<step>/checksums.json

Orbax writes arrays from a thread while training goes on. A checkpoint is
written under another name, gets the checksum of each of its files, and is then
renamed in one operation: `checkpoints/<step>` is there whole or not at all, and
later damage on disk is found before it is loaded.

With several processes, all call the same methods in the same order and share
the file system that `workdir` is on. A workdir in a bucket is a folder of this
machine with a mirror, see `mirrors`: a checkpoint is in the bucket before it is
here. Hosts that share no folder then write and upload their own chunks.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import re
import shutil
import threading
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from absl import logging

from rljax.storage import buckets, locks, mirrors, paths, workdirs

Tree = Any
Workdir = str | os.PathLike[str]

_CHECKSUMS = mirrors.MARKER  # Without it no checkpoint is whole.
_STEP = re.compile(r"0|[1-9][0-9]*")  # Names of checkpoints.
_UNFINISHED = ".saving"
_REMOVED = ".removed"
_UNREADABLE = ".unreadable"
_SECONDS_AFTER_AN_ERROR = 30


class Checkpoints:
  """Saves and restores the checkpoints of one run, their only writer.

  The constructor deletes what a killed run left half-written. Use it in a
  `with` block, or call `close`: only then is the last save certain to be on
  disk.

  Attributes:
    messages: sentences on what was deleted or skipped, in order; they are also
      logged as warnings.
    unreadable: steps whose checkpoints were set aside, as they are damaged.
  """

  def __init__(self, workdir: Workdir, *, keep: int = 2):
    """Opens `<workdir>/checkpoints`.

    Args:
      workdir: folder of the run.
      keep: how many checkpoints stay, the latest ones; >= 1.

    Raises:
      ValueError: if `keep` is not positive, or another process writes there.
    """
    if keep < 1:
      raise ValueError(f"keep must be positive, got {keep}.")
    self.messages, self.unreadable = [], []
    self._folder = _folder(workdir)
    self._keep = keep
    self._saved = set()
    self._mirror = mirrors.of(workdir)
    self._thread = self._failure = self._lock = None
    if _is_first():
      with paths.writing(workdir):
        os.makedirs(workdir, exist_ok=True)
      self._lock = locks.take(workdir)
      self._clear()

  def save(self, step: int, state: Tree, meta: Mapping[str, Any]) -> None:
    """Starts to write a checkpoint and returns when its arrays are copied.

    The caller may donate or overwrite `state` as soon as this returns. A save
    that is still under way is waited for first; a step that this object has
    already saved is not saved again.

    Args:
      step: number of finished updates, which names the checkpoint.
      state: pytree of jax arrays (typed keys too), numpy arrays and numbers.
      meta: what is not an array: anything that `json` can write.

    Raises:
      ValueError: if a leaf is empty or not an array, or `meta` is not JSON.
      DiskError: if the save before this one failed, or this one cannot begin.
    """
    from orbax.checkpoint import v1 as ocp

    step = int(step)
    if step in self._saved:
      return
    meta = workdirs.plain_json(dict(meta), "meta")
    leaves = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(state):
      shape, dtype = _shape_and_dtype(_path(keys), leaf)
      leaves[_path(keys)] = {"shape": shape, "dtype": dtype}
    self.wait()
    # Named by its step, so that the leftovers of a kill can be told.
    unfinished = self._folder / f"{step}{_UNFINISHED}"
    logging.get_absl_logger().addFilter(_is_ours)
    with self._writing(step):
      if _is_first() or self._has_own_disk():
        self._folder.mkdir(parents=True, exist_ok=True)
      with _context(own_disk=self._has_own_disk()):
        response = ocp.save_checkpointables_async(
          unfinished, {"state": jax.tree.map(_to_disk, state), "meta": meta}
        )
    self._saved.add(step)
    self._thread = threading.Thread(
      target=self._commit, args=(step, unfinished, response, leaves)
    )
    self._thread.start()

  def restore_latest(
    self, state_like: Tree
  ) -> tuple[int, Tree, dict[str, Any]] | None:
    """Loads the latest checkpoint that is whole.

    A damaged one is renamed to `<step>.unreadable`, with a message, and the one
    before it is loaded. The mesh may differ from the one that saved.

    Args:
      state_like: the state of a fresh run. Each array comes back with the
        sharding and dtype that it has here. An array that is not bound to a
        device, or is weakly typed, comes back so: otherwise functions of it
        would be compiled twice.

    Returns:
      `(step, state, meta)`, or None if there is no whole checkpoint.

    Raises:
      ValueError: if the checkpoint is whole but holds other arrays than
        `state_like`, naming them.
    """
    from orbax.checkpoint import v1 as ocp

    self.wait()
    step = _agree(self._latest_whole() if _is_first() else None)
    if step is None:
      return None
    path = self._folder / str(step)
    self._fetch_own(path)
    saved = json.loads((path / _CHECKSUMS).read_text())["leaves"]
    self._compare(path, saved, state_like)
    with _context():
      loaded = ocp.load_checkpointables(
        path, {"state": jax.tree.map(_wanted, state_like), "meta": None}
      )
    state = jax.tree.map(_from_disk, loaded["state"], state_like)
    self._saved.add(step)
    return step, state, loaded["meta"]

  def all_steps(self) -> list[int]:
    """Returns the steps of the checkpoints on disk, the earliest first."""
    return _steps(self._folder, self._mirror)

  def read_meta(self, step: int) -> dict[str, Any] | None:
    """Returns `meta` of a checkpoint; None if there is none that is whole."""
    from orbax.checkpoint import v1 as ocp

    self.wait()
    path, found = self._folder / str(step), None
    if _is_first() and step in self.all_steps():
      self._fetch(path)
      found = step if _problem(path) is None else None
    if _agree(found) is None:
      return None
    self._fetch_own(path)
    with _context():
      return ocp.load_checkpointables(path, {"meta": None})["meta"]

  def forget_after(self, step: int, *, keep: bool = False) -> None:
    """Deletes the checkpoints of later steps.

    A killed run may have saved steps that it is about to repeat, which need not
    give the same result on every device.

    Args:
      step: the last one that stays.
      keep: whether they are renamed instead, as more was lost than by a kill.
    """
    self.wait()
    for later in self.all_steps():
      if later > step:
        self._saved.discard(later)
        path = self._folder / str(later)
        if _is_first() and keep:
          self._fetch(path)
          aside = paths.set_aside(path)
          if self._mirror is not None:
            self._mirror.rename(path, aside)
          self._say(f"{path} is now {aside.name}.")
        elif _is_first():
          self._remove(path)

  def wait(self) -> None:
    """Waits until no save is under way, in any process.

    Raises:
      DiskError: if the save failed.
    """
    if self._thread is None:
      return
    self._thread.join()
    self._thread = None
    # Before any exception, or the other processes would wait for ever.
    if jax.process_count() > 1:
      from jax.experimental import multihost_utils

      multihost_utils.sync_global_devices("rljax checkpoint")
    failure, self._failure = self._failure, None
    if failure is not None:
      self._remove_unfinished()  # Orbax may have written on for a while.
      raise failure

  def check(self) -> None:
    """Raises what `wait` would, if the save has failed already.

    With several processes it does nothing: they learn of it together.
    """
    is_over = self._thread is not None and not self._thread.is_alive()
    if is_over and jax.process_count() == 1:
      self.wait()

  def close(self) -> None:
    """Waits for the last save, and gives the lock back."""
    self.wait()
    self._lock = None

  def __enter__(self):
    return self

  def __exit__(self, kind, *error):
    if kind is None or jax.process_count() == 1:
      self.close()
    elif self._thread is not None:
      # The other processes may be gone: do not wait for ever. A save that all
      # have started is on disk soon.
      self._thread.join(_SECONDS_AFTER_AN_ERROR)

  def _commit(self, step, unfinished, response, leaves):
    """Ends a save, in its thread."""
    try:
      with self._writing(step):
        self._finish(step, unfinished, response, leaves)
    except BaseException as error:
      self._failure = error

  @contextlib.contextmanager
  def _writing(self, step):
    """Makes what fails within the block a `DiskError`, and tidies up."""
    try:
      yield
    except BaseException as error:
      self._saved.discard(step)
      self._remove_unfinished()
      if isinstance(error, buckets.BucketError):
        raise
      if not isinstance(error, Exception):
        raise
      name = f"The checkpoint {self._folder / str(step)}"
      raise paths.DiskError(name, error) from error

  def _finish(self, step, unfinished, response, leaves):
    """Waits for the arrays, adds checksums, and renames the folder."""
    response.result()
    final, files = self._folder / str(step), {}
    if not _is_first():
      if self._has_own_disk():
        self._mirror.upload_part(unfinished, final, jax.process_index())
        shutil.rmtree(unfinished)
      return
    if self._has_own_disk():
      files = self._mirror.parts(final, range(1, jax.process_count()))
    checksums = {"files": files | _checksums(unfinished), "leaves": leaves}
    with open(unfinished / _CHECKSUMS, "w") as file:
      json.dump(checksums, file, indent=1)
      file.flush()
      os.fsync(file.fileno())
    if self._mirror is not None:  # What is here is in the bucket, too.
      self._mirror.commit(unfinished, final)
    if final.exists():
      _remove(final)
    os.rename(unfinished, final)
    # Later steps, of an earlier run in this folder, do not count.
    done = [old for old in self.all_steps() if old <= step]
    for old in done[: -self._keep]:
      self._remove(self._folder / str(old))

  def _has_own_disk(self):
    """Whether the processes see different folders, and share a bucket."""
    return self._mirror is not None and self._mirror.own_disk

  def _fetch(self, path):
    """Brings a checkpoint here, if it lies in a bucket."""
    if self._mirror is not None:
      self._mirror.fetch(path)

  def _fetch_own(self, path):
    """Does so in the other processes, where their disk is not the first's."""
    if _is_first() or not self._has_own_disk():
      return
    self._fetch(path)
    if (problem := _problem(path)) is not None:
      raise ValueError(f"{path} did not come whole: {problem}.")

  def _remove(self, path):
    """Deletes a checkpoint, here and in a bucket."""
    if self._mirror is not None:
      self._mirror.remove(path)
    if path.exists():
      _remove(path)

  def _remove_unfinished(self):
    """Deletes what a failed save has left, which may be what fills the disk."""
    if _is_first():
      for left in self._folder.glob(f"*{_UNFINISHED}*"):
        shutil.rmtree(left, ignore_errors=True)

  def _clear(self):
    """Deletes what a killed run left behind."""
    if not self._folder.is_dir():
      return
    known = set(map(str, self.all_steps()))
    for path in sorted(self._folder.iterdir()):
      if _STEP.fullmatch(path.name) and path.name not in known:
        _remove(path)  # Of a bucket that has moved on.
      match = re.match(rf"(\d+)({_UNFINISHED}|{_REMOVED})", path.name)
      if not match:
        continue
      shutil.rmtree(path, ignore_errors=True)
      if match[2] == _UNFINISHED:
        self._say(
          f"removed the unfinished checkpoint of step {match[1]}: the run was "
          "stopped while writing it."
        )

  def _latest_whole(self):
    """Finds the latest undamaged step; sets damaged checkpoints aside."""
    for step in reversed(self.all_steps()):
      path = self._folder / str(step)
      self._fetch(path)
      problem = _problem(path)
      if problem is None:
        return step
      aside = path.with_name(path.name + _UNREADABLE)
      if aside.exists():
        paths.set_aside(aside)
      os.rename(path, aside)
      if self._mirror is not None:
        self._mirror.rename(path, aside)
      self.unreadable.append(step)
      self._say(
        f"skipped the checkpoint of step {step}: {problem}; it is now "
        f"{aside.name}."
      )
    return None

  def _compare(self, path, saved, state_like):
    """Raises if the arrays on disk are not those of `state_like`."""
    wanted = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(state_like):
      shape, dtype = _shape_and_dtype(_path(keys), leaf)
      wanted[_path(keys)] = {"shape": shape, "dtype": dtype}
    lines = []
    for name in sorted(saved.keys() | wanted.keys()):
      if name not in wanted:
        lines.append(f"  {name}: saved, but this run has none")
      elif name not in saved:
        lines.append(f"  {name}: not saved, but this run has it")
      elif saved[name]["shape"] != wanted[name]["shape"]:
        lines.append(
          f"  {name}: saved as {saved[name]['shape']}, in this run "
          f"{wanted[name]['shape']}"
        )
      elif saved[name]["dtype"] != wanted[name]["dtype"]:
        self._say(
          f"{name} was saved as {saved[name]['dtype']} and is cast to "
          f"{wanted[name]['dtype']}."
        )
    if lines:
      shown = "\n".join(lines[:10])
      if len(lines) > 10:
        shown += f"\n  ... and {len(lines) - 10} more"
      raise ValueError(
        f"the checkpoint {path} is not of this model and optimizer:\n{shown}\n"
        "Start with the flags that it was saved with, or another --workdir."
      )

  def _say(self, message):
    self.messages.append(message)
    logging.warning("%s", message)


def restore_params(workdir: Workdir, step: int | None = None) -> dict[str, Any]:
  """Reads the parameters of a run, whatever their shapes.

  The run may still be going on.

  Args:
    workdir: folder of the run that saved them.
    step: which checkpoint; None is the latest that is whole.

  Returns:
    The entry "params" of the saved state: nested dicts of numpy arrays.

  Raises:
    ValueError: if there is no such checkpoint, naming the workdir.
  """
  from orbax.checkpoint import v1 as ocp

  folder, mirror = _folder(workdir), mirrors.of(workdir)
  steps = _steps(folder, mirror)
  if step is not None:
    if step not in steps:
      raise ValueError(
        f"{workdir} has no checkpoint of step {step}; it has "
        f"{steps or 'none at all'}."
      )
    steps = [step]
  problems = ""
  for candidate in reversed(steps):
    path = folder / str(candidate)
    if mirror is not None:
      mirror.fetch(path)
    problem = _problem(path)
    if problem is not None:
      problems += f" Step {candidate} is damaged: {problem}."
      logging.warning("skipped %s: %s.", path, problem)
      continue
    saved = ocp.metadata(path, checkpointable_name="state").metadata
    if not isinstance(saved, dict) or "params" not in saved:
      raise ValueError(f'the state in {path} has no entry "params".')
    # A placeholder with the shape and dtype of each array, without memory.
    wanted = jax.tree.map(
      lambda leaf: np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape),
      saved["params"],
    )
    with _context(partial=True):
      return ocp.load(path, {"params": wanted}, checkpointable_name="state")[
        "params"
      ]
  raise ValueError(
    f"{workdir} has no checkpoint to read parameters from.{problems}"
  )


def holds_run(workdir: Workdir) -> bool:
  """Tells whether a folder has checkpoints, or a place for them."""
  return os.path.exists(os.path.join(workdir, "checkpoints")) or bool(
    steps(workdir)
  )


def steps(workdir: Workdir) -> list[int]:
  """Returns the steps of the checkpoints of a run, the earliest first."""
  return _steps(_folder(workdir), mirrors.of(workdir))


def fingerprint(tree: Tree) -> str:
  """Hashes the exact bits of a tree.

  Args:
    tree: arrays, typed keys among them, however they are sharded.

  Returns:
    SHA-256, in hexadecimal, of the path, dtype, shape and bytes of every leaf,
    in the order of the paths. A leaf without a value, as a plan has them,
    counts by path, dtype and shape.
  """
  leaves = {
    _path(keys): leaf
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }
  digest = hashlib.sha256()
  for path in sorted(leaves):  # One after another: together they may not fit.
    leaf = leaves[path]
    if not isinstance(leaf, jax.ShapeDtypeStruct):
      leaf = _on_host(leaf)
    digest.update(f"{path} {leaf.dtype.name} {leaf.shape}\n".encode())
    if isinstance(leaf, np.ndarray):
      digest.update(leaf.tobytes())
  return digest.hexdigest()


def _on_host(leaf: Any) -> np.ndarray:
  """Returns an array that may be spread over several processes."""
  leaf = _to_disk(leaf)
  if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
    from jax.experimental import multihost_utils

    leaf = multihost_utils.process_allgather(leaf, tiled=True)
  return np.asarray(leaf)


def _is_first():
  return jax.process_index() == 0


def _is_ours(record):
  """Leaves out the tracebacks of Orbax's threads, which raise as well."""
  is_shown = logging.get_verbosity() >= logging.DEBUG
  return is_shown or not (record.exc_info and "orbax" in record.pathname)


def _agree(step):
  """Broadcasts the step that process 0 found."""
  if jax.process_count() == 1:
    return step
  from jax.experimental import multihost_utils

  step = np.int32(-1 if step is None else step)
  step = int(multihost_utils.broadcast_one_to_all(step))
  return None if step < 0 else step


def _folder(workdir):
  # Orbax needs absolute paths that are the same in all processes, without links
  # from the home of each.
  return pathlib.Path(os.path.realpath(workdir)) / "checkpoints"


def _steps(folder, mirror=None):
  if mirror is not None:
    names = mirror.steps(folder)
  elif folder.is_dir():
    names = [path.name for path in folder.iterdir() if path.is_dir()]
  else:
    names = []
  return sorted(int(name) for name in names if _STEP.fullmatch(name))


def _remove(path):
  """Deletes a folder, so that a kill cannot leave half of it in its place."""
  gone = path.with_name(path.name + _REMOVED)
  shutil.rmtree(gone, ignore_errors=True)
  os.rename(path, gone)
  shutil.rmtree(gone, ignore_errors=True)


def _checksums(folder):
  """Returns `{file: [bytes, SHA-256]}` of every file below a folder."""
  found = {}
  for path in sorted(folder.rglob("*")):
    if path.is_file():
      found[path.relative_to(folder).as_posix()] = paths.checksum(path)
  return found


def _problem(path):
  """Says what is wrong with a checkpoint; None if it is whole."""
  try:
    expected = json.loads((path / _CHECKSUMS).read_text())["files"]
  except FileNotFoundError:
    return f"{_CHECKSUMS} is missing"
  except (OSError, ValueError, KeyError, TypeError) as error:
    return f"{_CHECKSUMS} cannot be read ({error})"
  for name, (size, digest) in expected.items():
    try:
      found = (path / name).stat().st_size
      if found != size:
        return f"{name} has {found} bytes, and had {size} when it was saved"
      with open(path / name, "rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != digest:
          return f"{name} has changed since it was saved"
    except OSError as error:
      return f"{name} cannot be read ({error.strerror})"
  return None


@contextlib.contextmanager
def _context(partial=False, own_disk=False):
  """Sets how Orbax stores and loads.

  Args:
    partial: whether to load part of a tree.
    own_disk: whether processes write to different disks. Each array then lies
      in files of its own, its chunks on the disk of who has them.
  """
  from orbax.checkpoint import v1 as ocp

  registry = ocp.handlers.local_registry(include_global_registry=True)
  registry.add(ocp.handlers.JsonHandler, checkpointable_name="meta")
  context = ocp.Context()
  context.checkpointables.registry = registry
  context.pytree.loading.partial_load = partial
  if own_disk:
    context.multiprocessing.primary_host = None
    context.asynchronous.create_directories_asynchronously = False
    context.array.saving.use_ocdbt = False
    context.array.saving.use_replica_parallel = False
  with context:
    yield


def _path(keys):
  return jax.tree_util.keystr(keys, simple=True, separator="/")


def _is_key(leaf):
  dtype = getattr(leaf, "dtype", None)
  return dtype is not None and jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key)


def _shape_and_dtype(path, leaf):
  """Returns `([int, ...], name)` of a leaf as it is stored."""
  if _is_key(leaf):
    leaf = jax.eval_shape(jax.random.key_data, leaf)
  elif not hasattr(leaf, "shape"):
    if not isinstance(leaf, (bool, int, float)):
      raise ValueError(
        f'a checkpoint holds arrays and numbers, but "{path}" is a '
        f"{type(leaf).__name__}."
      )
    leaf = np.asarray(leaf)
  if 0 in leaf.shape:
    raise ValueError(
      f'a checkpoint holds no empty arrays, but "{path}" has shape '
      f"{tuple(leaf.shape)}."
    )
  return list(leaf.shape), np.dtype(leaf.dtype).name


def _to_disk(leaf):
  """Returns a leaf as Orbax takes it."""
  if _is_key(leaf):
    return jax.random.key_data(leaf)
  return leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)


def _is_bound(like):
  """Tells whether a leaf is a jax array that is bound to devices."""
  if isinstance(like, jax.ShapeDtypeStruct):
    return like.sharding is not None
  return isinstance(like, jax.Array) and like.committed


def _wanted(like):
  """Returns what to ask of Orbax for a leaf of the state."""
  data = jax.eval_shape(jax.random.key_data, like) if _is_key(like) else like
  if _is_bound(like):
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=like.sharding)
  data = data if hasattr(data, "shape") else np.asarray(data)
  # A numpy array of this shape and dtype, without memory.
  return np.broadcast_to(np.zeros((), data.dtype), data.shape)


def _from_disk(data, like):
  """Converts a loaded leaf to what `like` is."""
  if not isinstance(like, (jax.Array, jax.ShapeDtypeStruct)):
    return data if hasattr(like, "shape") else type(like)(data.item())
  if not _is_bound(like):
    data = jax.numpy.asarray(data)
  if _is_key(like):
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(like))
  if getattr(like, "weak_type", False) and not data.shape:
    weak = jax.numpy.asarray(data.item())
    data = jax.device_put(weak, like.sharding) if _is_bound(like) else weak
  return data
