"""Connects the processes of one run, and exchanges values between them.

A script is started once for every host, and each process runs the whole of it.
All of them draw the same prompts and call the same programs in the same order;
the devices share the rows of a batch, and the processes share work outside of
the devices, such as scoring. With one process, nothing here costs more than a
call.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import NamedSharding, PartitionSpec

from rljax.distributed import launchers

Tree = Any

# A process without a heartbeat for so long counts as dead. A thread sends them,
# however long the process compiles or scores.
HEARTBEAT_SECONDS = 60
_SECONDS_TO_FIND = 60  # The name of the first host, which may come up later.
# Exchanged values are padded to few sizes, as each size compiles a program.
_LEAST_BYTES = 4096


def divide_cpu(num_devices: int) -> None:
  """Divides the CPU of this process into devices, which share its cores.

  Must come before the first array. Where JAX computes on a GPU or a TPU it
  changes nothing that a mesh sees.

  Args:
    num_devices: of this process; 0 leaves one, or as many as XLA_FLAGS says.

  Raises:
    ValueError: if JAX is in use already, with another number of them.
  """
  if not num_devices:
    return
  try:
    jax.config.update("jax_num_cpu_devices", num_devices)
  except RuntimeError:
    found = len(jax.local_devices(backend="cpu"))
    if found != num_devices:
      raise ValueError(
        f"--cpu_devices={num_devices} comes too late, for this process has "
        f"divided its CPU into {found} already; set --cpu_devices=0."
      ) from None


def join(heartbeat_seconds: int = HEARTBEAT_SECONDS) -> None:
  """Joins the processes of a launcher; belongs in the first line of a main.

  Reads RLJAX_COORDINATOR, RLJAX_NUM_PROCESSES and RLJAX_PROCESS_ID; without
  them jax looks for itself whether it is on a TPU slice of GCE or GKE, or in a
  step of Slurm or Open MPI. Where there is one process, or when called again,
  it does nothing. From then on a process that fails ends at once, and the
  others notice and end too, instead of waiting for it. Checkpoints stay.

  Args:
    heartbeat_seconds: after which a process without heartbeat counts as dead.

  Raises:
    ValueError: if only some of the variables are set, or several processes
      were started and cannot find each other: each would train alone.
  """
  coordinator, num_processes, process_id = launchers.place(os.environ)
  if jax.distributed.is_initialized():
    return
  device_ids = None
  if coordinator is None:
    coordinator, num_processes, process_id, device_ids = _detected()
  if num_processes == 1:
    return
  logging.set_verbosity(logging.WARNING)  # jax logs where it connects to.
  connect(
    coordinator,
    num_processes,
    process_id,
    device_ids,
    heartbeat_timeout_seconds=heartbeat_seconds,
  )
  sys.excepthook = _end


def _detected() -> tuple[str | None, int, int, Sequence[int] | None]:
  """Returns what jax finds out of a cluster, as `join` needs it.

  Returns:
    `(host:port of process 0, number of processes, index of this one, its
    devices)`; None for the devices takes all of the host.

  Raises:
    ValueError: if there are several processes, and it finds no coordinator.
  """
  from jax._src import clusters  # What initialize() asks without arguments.

  alone = (None, 1, 0, None)
  started = launchers.num_started(os.environ)
  in_a_pod = "KUBERNETES_SERVICE_HOST" in os.environ
  if in_a_pod and started == 1 and "JOB_COMPLETION_INDEX" not in os.environ:
    return alone  # Of no job: jax would ask Kubernetes in vain.
  reason = "jax finds no coordinator"
  try:
    find = clusters.ClusterEnv.auto_detect_unset_distributed_params
    found = find(None, None, None, None, None, _SECONDS_TO_FIND)
  except Exception as error:  # Of whatever it has asked.
    found, reason = alone, f"jax finds no coordinator: {error}".splitlines()[0]
    if started == 1:
      logging.warning("%s; this process runs alone.", reason)
  coordinator, num_processes, process_id, device_ids = found
  if coordinator is None or num_processes is None:
    num_processes = 1
  if num_processes == 1 and started > 1:
    raise ValueError(
      f"This is one of {started} processes, by the variables of its cluster, "
      f"and {reason.rstrip('.')}. Each would train alone, into the same files. "
      "Set RLJAX_COORDINATOR, RLJAX_NUM_PROCESSES and RLJAX_PROCESS_ID, or "
      "start one process."
    )
  if num_processes == 1:
    return alone
  if launchers.has_host_alone(os.environ):
    device_ids = None  # jax would take one device for each process.
  return coordinator, num_processes, process_id, device_ids


def connect(
  coordinator: str,
  num_processes: int,
  process_id: int,
  device_ids: Sequence[int] | None = None,
  **timeouts: int,
) -> None:
  """Connects this process to the others, and changes nothing else of it.

  Args:
    coordinator: host:port of process 0.
    num_processes: how many there are.
    process_id: which one this is, from 0.
    device_ids: GPUs that it takes; None for all of its host.
    **timeouts: of `jax.distributed.initialize`, in seconds.
  """
  # It would catch SIGTERM, which `signals.Preemption` handles, and which
  # must end a process that waits for others.
  jax.config.update("jax_enable_preemption_service", False)
  jax.distributed.initialize(
    coordinator,
    num_processes,
    process_id,
    device_ids,
    # Otherwise Slurm's settings would give each process a single device.
    cluster_detection_method="deactivate",
    **timeouts,
  )


def check_joined() -> None:
  """Raises ValueError if a launcher started several processes in vain.

  Each would train alone, into the same files.
  """
  _, num_processes, _ = launchers.place(os.environ)
  what = f"RLJAX_NUM_PROCESSES={num_processes}"
  if num_processes == 1:
    num_processes = launchers.num_started(os.environ)
    what = f"This is one of {num_processes} processes"
  if num_processes > 1 and not jax.distributed.is_initialized():
    raise ValueError(
      f"{what}, but this script runs in one process. Start it on one host, "
      "whose devices --mesh shares."
    )


def is_first() -> bool:
  """Tells whether this is process 0, which writes."""
  return jax.process_index() == 0


def gather(tree: Tree) -> Tree:
  """All-gathers arrays as numpy arrays, whole in every process.

  All processes must call it.

  Args:
    tree: arrays, which may be spread over the devices of several processes.

  Returns:
    The same tree of numpy arrays.
  """
  if jax.process_count() > 1:
    tree = jax.tree.map(_replicated, tree)
  return jax.tree.map(np.asarray, tree)


def exchange(value: Any) -> list[Any]:
  """All-gathers one JSON value per process.

  All processes must call it.

  Args:
    value: anything that `json` can write, and numpy's numbers.

  Returns:
    One value per process, in their order, as read back from JSON. With one
    process it is the value itself.
  """
  if jax.process_count() == 1:
    return [value]
  from jax.experimental import multihost_utils

  text = json.dumps(value, default=lambda x: x.item()).encode()
  sizes = multihost_utils.process_allgather(np.int32(len(text)))
  room = max(_LEAST_BYTES, 1 << (int(sizes.max()) - 1).bit_length())
  padded = np.zeros(room, np.uint8)
  padded[: len(text)] = np.frombuffer(text, np.uint8)
  texts = multihost_utils.process_allgather(padded)
  return [
    json.loads(row[:size].tobytes())
    for row, size in zip(texts, sizes, strict=True)
  ]


def from_first(function: Callable[[], Any]) -> Any:
  """Runs a function on process 0 and broadcasts its result.

  Args:
    function: such as one that reads a file; returns what `exchange` takes.

  Returns:
    The same in every process.

  Raises:
    RuntimeError: in the others, if it failed in process 0.
  """
  if jax.process_count() == 1:
    return function()
  return _together(function if is_first() else lambda: None)[0]


def share(num_rows: int, function: Callable[[slice], Any]) -> list[Any]:
  """Divides rows among the processes, and all-gathers their results.

  The parts are as even as possible, and in the order of the processes.

  Args:
    num_rows: how many rows there are.
    function: takes the slice of its rows, and returns what `exchange` takes.
      A process without rows does not call it.

  Returns:
    What the function returned for each part, in order; with one process, what
    it returned for all rows.

  Raises:
    RuntimeError: in all processes, if the function failed in another one.
  """
  num_processes = jax.process_count()
  if num_processes == 1:
    return [function(slice(0, num_rows))]
  ends = [num_rows * i // num_processes for i in range(num_processes + 1)]
  first, last = ends[jax.process_index() :][:2]
  own = lambda: function(slice(first, last)) if first < last else None
  return [
    part
    for part, start, end in zip(_together(own), ends, ends[1:], strict=False)
    if start < end
  ]


def check_same(name: str, value: Any) -> None:
  """Raises ValueError unless all processes have the same value.

  Args:
    name: of the value, in the plural, for the message.
    value: JSON, a mapping of names to values.
  """
  found = exchange(value)
  for number, other in enumerate(found):
    for key in sorted(found[0].keys() | other.keys()):
      if found[0].get(key) != other.get(key):
        raise ValueError(
          f"{name} differ: {key} is {found[0].get(key)!r} in process 0 and "
          f"{other.get(key)!r} in process {number}. Start all with one command."
        )


def check_shared(folder: str, seconds: float = 15.0) -> None:
  """Raises ValueError unless all processes see one folder.

  Otherwise Orbax would wait for ever for files of the others.

  Args:
    folder: of process 0; the others may have another one at this path.
    seconds: to wait for a file of process 0, as network disks lag.
  """
  if jax.process_count() == 1:
    return

  def write():
    handle, path = tempfile.mkstemp(prefix=".seen-by-all-", dir=folder)
    os.close(handle)
    return os.path.basename(path)

  path = os.path.join(folder, from_first(write))
  deadline = time.monotonic() + seconds
  while not os.path.exists(path) and time.monotonic() < deadline:
    os.listdir(folder)  # Some network disks refresh only if they are listed.
    time.sleep(0.1)
  blind = [
    i for i, sees in enumerate(exchange(os.path.exists(path))) if not sees
  ]
  if is_first():
    os.unlink(path)
  if blind:
    raise ValueError(
      f"{folder} is not one folder for all processes: what process 0 writes is "
      f"not seen by {', '.join(map(str, blind))}. Give a --workdir on a file "
      "system that all hosts mount."
    )


def _together(function):
  """All-gathers each process's result; a failure raises in all."""
  failure = None
  try:
    found = {"value": function()}
  except Exception as error:
    failure, found = error, {"error": f"{type(error).__name__}: {error}"}
  everyone = exchange(found)
  if failure is not None:
    raise failure
  for number, other in enumerate(everyone):
    if "error" in other:
      raise RuntimeError(f"process {number} failed with {other['error']}")
  return [other["value"] for other in everyone]


def _replicated(leaf):
  """Returns an array that this process can read."""
  if (
    not isinstance(leaf, jax.Array)
    or leaf.is_fully_addressable
    or leaf.is_fully_replicated
  ):
    return leaf
  whole = NamedSharding(leaf.sharding.mesh, PartitionSpec())
  return jax.jit(_identity, out_shardings=whole)(leaf)


def _identity(x):
  return x


def _end(kind, error, trace):
  """Ends this process on an error, without waiting for the others."""
  sys.__excepthook__(kind, error, trace)
  logging.error(
    "Process %d of %d ends, and so will the others; the same command goes on "
    "from the last checkpoint.",
    jax.process_index(),
    jax.process_count(),
  )
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(130 if issubclass(kind, KeyboardInterrupt) else 1)
