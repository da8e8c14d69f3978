"""Reads the variables that a launcher sets for its processes."""

import re
from collections.abc import Mapping


def place(environment: Mapping[str, str]) -> tuple[str | None, int, int]:
  """Reads from the environment which process this is.

  Args:
    environment: such as `os.environ`.

  Returns:
    `(host:port of process 0 or None, number of processes, index of this one)`;
    `(None, 1, 0)` if nothing is set.

  Raises:
    ValueError: if the three variables are incomplete or do not fit together.
  """
  names = ("RLJAX_COORDINATOR", "RLJAX_NUM_PROCESSES", "RLJAX_PROCESS_ID")
  values = [environment.get(name, "") for name in names]
  if not any(values):
    return None, 1, 0
  for name, value in zip(names, values, strict=True):
    if not value:
      raise ValueError(
        f"{name} is not set, but another one of {', '.join(names)} is; set all "
        "three, or none for a single process."
      )
  coordinator, num_processes, process_id = values
  for name, value in zip(names[1:], values[1:], strict=True):
    if not re.fullmatch(r"[0-9]{1,9}", value):
      raise ValueError(f"{name} must be a whole number, got {value!r}.")
  num_processes, process_id = int(num_processes), int(process_id)
  if not process_id < num_processes:
    raise ValueError(
      f"RLJAX_PROCESS_ID must be below RLJAX_NUM_PROCESSES={num_processes}, "
      f"got {process_id}."
    )
  split_address(coordinator)
  return coordinator, num_processes, process_id


def num_started(environment: Mapping[str, str]) -> int:
  """Counts the processes that a cluster says it has started of one program.

  Asks nobody: these are variables of Slurm's `srun`, of Open MPI, and of the
  pods of a TPU slice on GKE.

  Args:
    environment: such as `os.environ`.

  Returns:
    Their number; 1 if nothing is said of others.
  """
  counts = [1]
  if environment.get("SLURM_STEP_NODELIST"):  # Not in the script of a job.
    counts.append(_number(environment.get("SLURM_NTASKS")))
  counts.append(_number(environment.get("OMPI_COMM_WORLD_SIZE")))
  hosts = environment.get("TPU_WORKER_HOSTNAMES", "").split(",")
  counts.append(len([host for host in hosts if host.strip()]))
  return max(counts)


def has_host_alone(environment: Mapping[str, str]) -> bool:
  """Tells whether Slurm or Open MPI has started one process on each host."""
  nodes = _number(environment.get("SLURM_STEP_NUM_NODES"))
  tasks = _number(environment.get("SLURM_NTASKS"))
  if environment.get("SLURM_STEP_NODELIST") and tasks:
    return nodes == tasks
  return _number(environment.get("OMPI_COMM_WORLD_LOCAL_SIZE")) == 1


def _number(text: str | None) -> int:
  return int(text) if text and re.fullmatch(r"[0-9]{1,9}", text) else 0


def split_address(address):
  """Splits `host:port` into host and port."""
  host, _, port = address.rpartition(":")
  if not host or not re.fullmatch(r"[0-9]{1,5}", port):
    raise ValueError(
      f'RLJAX_COORDINATOR must be "host:port", such as 10.0.0.2:8476, got '
      f"{address!r}."
    )
  return host.strip("[]"), int(port)
