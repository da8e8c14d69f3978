"""Checks that the processes of a run fit together, and says how to fix it.

For one process, for two on one host, and for all hosts of a TPU slice:

  python -m rljax.doctor
  bash launch/local_processes.sh 2 -- python -m rljax.doctor
  bash launch/tpu_vm.sh doctor

Checks Python and package versions, settings and commit, which must be equal on
all hosts; that all processes reach the port of process 0; the devices; one sum
over all of them; and, with `--workdir`, that all see the same folder, or use
the same bucket.
`RLJAX_COORDINATOR` (host:port of process 0), `RLJAX_NUM_PROCESSES` and
`RLJAX_PROCESS_ID` say which process this is. The exit status is 0 if all checks
pass.
"""

import argparse
import contextlib
import dataclasses
import errno
import glob
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import secrets
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rljax.distributed import launchers
from rljax.storage import buckets, paths

OLDEST_PYTHON = (3, 11)
# Packages of accelerators; compared where they are installed.
_PLUGINS = (
  "jaxlib",
  "libtpu",
  "jax-cuda12-plugin",
  "jax-cuda12-pjrt",
  "jax-cuda13-plugin",
  "jax-cuda13-pjrt",
)
# Variables that change what is compiled or how it is sent.
_SETTINGS = re.compile(r"(XLA_|JAX_|LIBTPU_|TPU_|NCCL_)")
# These differ between processes.
_OWN_SETTINGS = ("TPU_WORKER_ID", "JAX_PROCESS_ID", "JAX_LOCAL_DEVICE_IDS")
_MAX_BYTES = 2**20


@dataclasses.dataclass(frozen=True)
class Finding:
  """Holds what one check found.

  Attributes:
    name: of the check.
    text: what was found.
    fix: what to do about it; empty if nothing is wrong.
  """

  name: str
  text: str
  fix: str = ""

  def __str__(self):
    if not self.fix:
      return f"ok    {self.name:<9} {self.text}"
    return f"FAIL  {self.name:<9} {self.text}\n      {'':<9} -> {self.fix}"


def describe() -> dict[str, Any]:
  """Describes what must be equal on all hosts, for this one.

  Returns:
    JSON: `host`, `python`, `packages` (name to version, None if missing),
    `too_old` (sentences), `commit` (None outside of a checkout), `changes`
    since then (a name for their content, or empty) and `settings`.
  """
  packages, too_old = {}, []
  try:
    requirements = importlib.metadata.requires("rljax-lm") or []
  except importlib.metadata.PackageNotFoundError:
    requirements = []
    packages["rljax"] = None
  for requirement in requirements:
    if "extra ==" in requirement:
      continue
    name, least = re.match(
      r"([\w.-]+)[^>\w]*(?:>=\s*([\d.]+))?", requirement
    ).groups()
    packages[name] = _version(name)
    if least and packages[name] and _older(packages[name], least):
      too_old.append(f"{name} {packages[name]} is older than {least}")
  for name in _PLUGINS:
    if _version(name):
      packages[name] = _version(name)
  changes = _git("diff", "HEAD", "--binary") or ""
  return {
    "host": socket.gethostname(),
    "python": platform.python_version(),
    "packages": packages,
    "too_old": too_old,
    "commit": _git("rev-parse", "HEAD"),
    "changes": changes and hashlib.sha256(changes.encode()).hexdigest()[:8],
    "settings": {
      name: value
      for name, value in sorted(os.environ.items())
      if _SETTINGS.match(name) and name not in _OWN_SETTINGS
    },
  }


def compare(hosts: Sequence[Mapping[str, Any]]) -> list[Finding]:
  """Compares the descriptions of all processes.

  Args:
    hosts: results of `describe`, in the order of the processes.

  Returns:
    A finding each on Python, packages, settings and commit.
  """
  sync = "install the same on every host; `launch/tpu_vm.sh sync` does"
  found = []

  pythons = [host["python"] for host in hosts]
  oldest = min(pythons, key=_numbers)
  if _numbers(oldest) < OLDEST_PYTHON:
    fix = f"use Python {'.'.join(map(str, OLDEST_PYTHON))} or later"
    found.append(Finding("python", _where(pythons), fix))
  elif len(set(pythons)) > 1:
    found.append(Finding("python", _where(pythons), sync))
  else:
    found.append(Finding("python", oldest + _on_all(hosts)))

  lines = []
  for name in sorted({name for host in hosts for name in host["packages"]}):
    versions = [host["packages"].get(name) or "missing" for host in hosts]
    if len(set(versions)) > 1:
      lines.append(f"{name} is {_where(versions)}")
    elif versions[0] == "missing":
      lines.append(f"{name} is missing")
  lines += sorted({line for host in hosts for line in host["too_old"]})
  if lines:
    fix = "pip install -e . in the checkout, with its extra for the accelerator"
    if any(" on process " in line for line in lines):
      fix = sync
    found.append(Finding("packages", "; ".join(lines), fix))
  else:
    packages = hosts[0]["packages"]
    text = ", ".join(
      f"{name} {packages[name]}"
      for name in ("jax", *_PLUGINS, "flax")
      if packages.get(name)
    )
    text += f" and {len(packages)} in all" + _on_all(hosts)
    found.append(Finding("packages", text))

  lines = []
  for name in sorted({name for host in hosts for name in host["settings"]}):
    values = [host["settings"].get(name, "not set") for host in hosts]
    if len(set(values)) > 1:
      lines.append(f"{name} is {_where(values)}")
  if lines:
    fix = "set the same on every host, or compiled programs will differ"
    found.append(Finding("settings", "; ".join(lines), fix))
  else:
    shown = [f"{name}={x}" for name, x in hosts[0]["settings"].items()]
    found.append(Finding("settings", " ".join(shown) or "none"))

  commits = [
    (host["commit"] or "none")[:12]
    + (f" with changes {host['changes']}" if host["changes"] else "")
    for host in hosts
  ]
  if len(set(commits)) > 1:
    found.append(Finding("commit", _where(commits), sync))
  else:
    found.append(Finding("commit", commits[0] + _on_all(hosts)))
  return found


def gather(
  coordinator: str, num_processes: int, host: Mapping[str, Any], seconds: float
) -> tuple[dict[int, Any], Finding, Callable[[Any], None]]:
  """Collects, in process 0, what the other processes send to its port.

  Args:
    coordinator: host:port.
    num_processes: how many are expected, this one among them.
    host: what `describe` returns here.
    seconds: how long to wait for the others.

  Returns:
    The descriptions that came, by process; the finding on the port; and a
    function that sends one JSON value to all and closes the connections.
  """
  port = launchers.split_address(coordinator)[1]
  hosts, sockets, doubles = {0: host}, [], []

  def reply(message):
    for connection in sockets:
      # A process that is gone has said why.
      with connection, contextlib.suppress(OSError):
        connection.sendall(json.dumps(message).encode() + b"\n")

  try:
    listener = _listen(port)
  except OSError as error:
    fix = "choose another port"
    if error.errno == errno.EADDRINUSE:
      fix = f"end the run that holds it (`ss -ltnp | grep {port}` names it)"
    text = f"process 0 cannot listen at port {port}: {error.strerror}"
    return hosts, Finding("port", text, fix), reply
  deadline = time.monotonic() + seconds
  with listener:
    while len(hosts) < num_processes and time.monotonic() < deadline:
      listener.settimeout(max(deadline - time.monotonic(), 0.01))
      try:
        connection = listener.accept()[0]
        connection.settimeout(5)
        said = _read_line(connection)
        index = said["process_id"]
        if not 0 < index < num_processes or index in hosts:
          doubles.append(str(index))
          connection.close()
          continue
        hosts[index] = said["host"]
        sockets.append(connection)
      except (OSError, ValueError, KeyError, TypeError):
        continue  # Not a process of this run.
  missing = sorted(set(range(num_processes)) - set(hosts))
  if not missing:
    text = f"{port} of {coordinator.rsplit(':', 1)[0]} reached by all"
    return hosts, Finding("port", text), reply
  text = (
    f"process {', '.join(map(str, missing))} of {num_processes} did not come "
    f"to port {port} in {seconds:g} s"
  )
  fix = (
    f"start the doctor on all hosts at the same time, and let TCP port {port} "
    "pass between them (firewall)"
  )
  if doubles:
    text += f"; {len(doubles)} came as process {', '.join(doubles)}"
    fix = "give every process a RLJAX_PROCESS_ID of its own"
  return hosts, Finding("port", text, fix), reply


def report(
  coordinator: str, process_id: int, host: Mapping[str, Any], seconds: float
) -> tuple[Any, Finding]:
  """Sends, in the other processes, a description to process 0.

  Args:
    coordinator: host:port of process 0.
    process_id: index of this process.
    host: what `describe` returns here.
    seconds: how long to try.

  Returns:
    The reply of process 0, or None, and the finding on the port.
  """
  deadline = time.monotonic() + seconds
  error = None
  while time.monotonic() < deadline:
    try:
      with socket.create_connection(
        launchers.split_address(coordinator), 5
      ) as connection:
        message = {"process_id": process_id, "host": host}
        connection.sendall(json.dumps(message).encode() + b"\n")
        connection.settimeout(max(deadline - time.monotonic(), 0.01) + 5)
        reply = _read_line(connection)
        return reply, Finding("port", f"{coordinator} answers")
    except OSError as problem:
      error = problem
      time.sleep(0.2)
    except ValueError as problem:
      text = f"{coordinator} hung up on process {process_id}: {problem}"
      fix = "see what process 0 says; another program may use that port"
      return None, Finding("port", text, fix)
  text = f"process {process_id} does not reach {coordinator}: {error}"
  fix = "start process 0, and let its TCP port pass between hosts (firewall)"
  return None, Finding("port", text, fix)


def check_devices(
  expected_platform: str | None, expected_devices: int | None
) -> Finding:
  """Checks the devices of all processes.

  Args:
    expected_platform: "cpu", "gpu" or "tpu"; None takes any.
    expected_devices: how many there should be in all; None takes any number.

  Returns:
    The finding.
  """
  import jax

  try:
    devices = jax.devices()
  except RuntimeError as error:
    fix = "install the extra of setup.cfg for the accelerator, such as '.[tpu]'"
    return Finding("devices", f"jax finds none: {error}".strip(), fix)
  counts = [0] * jax.process_count()
  for device in devices:
    counts[device.process_index] += 1
  kinds = sorted({device.device_kind for device in devices})
  text = f"{len(devices)} of kind {', '.join(kinds)}"
  if len(set(counts)) > 1:
    text += f" ({_where([str(count) for count in counts])})"
  elif len(counts) > 1:
    text += f", {counts[0]} on each of {len(counts)} processes"
  found = devices[0].platform
  wanted = os.environ.get("JAX_PLATFORMS", "")
  if expected_platform not in (None, found) or (
    found == "cpu" and "cpu" not in wanted and _has_accelerator()
  ):
    extra = "tpu" if expected_platform == "tpu" else "cuda13"
    fix = (
      f"pip install -e '.[{extra}]', and see what jax says on "
      "`python -c 'import jax; jax.devices()'`"
    )
    return Finding("devices", text + ", and no accelerator", fix)
  if len(kinds) > 1 or len(set(counts)) > 1:
    fix = "run on hosts of one kind, each with all of its devices"
    return Finding("devices", text, fix)
  if expected_devices not in (None, len(devices)):
    fix = (
      f"{expected_devices} were expected: end other runs that use devices, "
      "and look for failed ones"
    )
    return Finding("devices", text, fix)
  return Finding("devices", text)


def check_sum() -> Finding:
  """Sums a different number from every device, on every device.

  Returns:
    The finding.
  """
  import jax

  started = time.monotonic()
  num_devices = jax.device_count()
  total = _sum(lambda index: index + 1)
  expected = num_devices * (num_devices + 1) // 2
  seconds = time.monotonic() - started
  text = (
    f"sum over {num_devices} devices of {jax.process_count()} processes is "
    f"{total}, in {seconds:.1f} s"
  )
  if total != expected:
    fix = f"{expected} was expected: a device or a link is broken"
    return Finding("sum", text, fix)
  return Finding("sum", text)


def check_workdir(workdir: str, nonce: str) -> Finding:
  """Checks that a file of process 0 is seen by every process.

  Args:
    workdir: the folder, which is made if it is not there, or its URL.
    nonce: of this call, the same in all processes.

  Returns:
    The finding, the same in all processes.
  """
  import jax

  if buckets.is_url(workdir):
    return _check_bucket(workdir, nonce)
  try:
    paths.check_local(workdir, "--workdir")
  except ValueError as error:
    return Finding("workdir", str(error), "name a folder that all hosts mount")
  workdir = os.path.expanduser(workdir)
  path = pathlib.Path(workdir, f".doctor-{nonce}")
  problem = ""
  if jax.process_index() == 0:
    try:
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_text("Written by rljax.doctor; may be deleted.\n")
    except OSError as error:
      problem = f" ({error})"
  _sum(lambda index: 0)  # No process looks before it is written.
  deadline = time.monotonic() + 10
  while not path.exists() and time.monotonic() < deadline and not problem:
    time.sleep(0.2)
  num_blind = _sum(lambda index: int(not path.exists()))
  if jax.process_index() == 0:
    with contextlib.suppress(OSError):
      path.unlink()
  if num_blind:
    text = f"{workdir} is not one folder for all processes{problem}"
    fix = "name a folder on a file system that all hosts mount and may write to"
    return Finding("workdir", text, fix)
  return Finding("workdir", f"{workdir} is seen by all")


def _check_bucket(url, nonce):
  """Writes, reads and deletes objects where a workdir is to lie."""
  import jax

  fix = (
    "give every host the right to create, read, list and delete objects there, "
    "and credentials (for a bucket of another cloud, by --env of the launcher)"
  )
  own, problem = f".doctor-{nonce}-{jax.process_index()}", ""
  try:
    bucket = buckets.Bucket(url, "--workdir")
    bucket.write(own, nonce.encode())
    if bucket.read(own) != nonce.encode():
      problem = f"{own} does not read as it was written"
  except (OSError, ValueError) as error:
    problem = buckets.described(error.__cause__ or error)
    if isinstance(error, ValueError):
      fix, problem = "install or name what it asks for", str(error)
  # All ask in the same order, whatever has failed here.
  num_failed = _sum(lambda index: int(bool(problem)))
  if not num_failed:
    try:
      first = f".doctor-{nonce}-0"
      if bucket.read(first) is None:
        problem = f"{first}, which process 0 has written, is not seen"
      elif bucket.create(own, b"again"):
        problem = "the store creates an object that is there already"
    except OSError as error:
      problem = buckets.described(error.__cause__ or error)
    num_failed = _sum(lambda index: int(bool(problem)))
    try:
      bucket.delete([own])
      if own in bucket.objects():
        problem = problem or f"{own} is still there after its deletion"
    except OSError as error:
      problem = problem or buckets.described(error.__cause__ or error)
    num_failed += _sum(lambda index: int(bool(problem)))
  if num_failed:
    problem = problem or "another process says why"
    return Finding("workdir", f"{url} cannot be used: {problem}", fix)
  return Finding(
    "workdir",
    f"{url}: all write, read and delete objects, and the store creates one "
    "only once",
  )


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs all checks and prints what they found; returns the exit status."""
  parser = argparse.ArgumentParser(
    prog="python -m rljax.doctor",
    description=__doc__.split("\n")[0],
  )
  parser.add_argument("--platform", choices=["cpu", "gpu", "tpu"])
  parser.add_argument("--devices", type=int, help="How many in all.")
  parser.add_argument("--workdir", help="Folder or bucket that all must see.")
  parser.add_argument(
    "--seconds",
    type=float,
    default=60,
    help="How long to wait for other processes, in seconds.",
  )
  options = parser.parse_args(arguments)
  try:
    coordinator, num_processes, process_id = launchers.place(os.environ)
  except ValueError as error:
    return _print([Finding("place", str(error), "use a script in launch/")])
  is_first = process_id == 0

  host = describe()
  nonce = secrets.token_hex(8)
  if num_processes == 1:
    findings = compare([host])
  elif is_first:
    hosts, finding, reply = gather(
      coordinator, num_processes, host, options.seconds
    )
    findings = [*compare([hosts[i] for i in sorted(hosts)]), finding]
    is_well = not any(finding.fix for finding in findings)
    reply({"is_well": is_well, "nonce": nonce})
  else:
    answer, finding = report(coordinator, process_id, host, options.seconds)
    if answer is None:
      return _print([finding])
    if not answer["is_well"]:
      print(f"Process {process_id} stops; process 0 says what is wrong.")
      return 1
    nonce, findings = answer["nonce"], compare([host])
  if any(finding.fix for finding in findings):
    if num_processes > 1:
      print("No devices are checked before that is fixed:")
    return _print(findings)

  # A collective that some process does not join never returns.
  watch = threading.Timer(options.seconds + 60, _give_up, [findings])
  watch.daemon = True
  watch.start()
  if num_processes > 1:
    from rljax.distributed import processes  # It imports this module, and jax.

    processes.connect(
      coordinator,
      num_processes,
      process_id,
      initialization_timeout=int(options.seconds),
    )
  findings.append(check_devices(options.platform, options.devices))
  if not findings[-1].text.startswith("jax finds none"):
    findings.append(check_sum())
    if options.workdir:
      findings.append(check_workdir(options.workdir, nonce))
  watch.cancel()
  if is_first or any(finding.fix for finding in findings):
    return _print(findings)
  print(f"Process {process_id} agrees.")
  return 0


def _print(findings):
  """Prints findings; returns the exit status."""
  for finding in findings:
    print(finding)
  num_failed = sum(bool(finding.fix) for finding in findings)
  if num_failed:
    print(f"{num_failed} of {len(findings)} checks failed.", flush=True)
    return 1
  print("All is well.", flush=True)
  return 0


def _give_up(findings):
  text = "the processes did not finish in time"
  fix = (
    "run the doctor without one host to find the one that hangs, and look "
    "for other runs that use its devices"
  )
  _print([*findings, Finding("sum", text, fix)])
  os._exit(1)


def _sum(value_at):
  """Sums `value_at(index)` over the indices of all devices."""
  import jax
  import numpy as np
  from jax.sharding import NamedSharding, PartitionSpec

  from rljax.distributed import meshes

  mesh = meshes.make("data:-1")
  numbers = jax.make_array_from_callback(
    (jax.device_count(),),
    NamedSharding(mesh, PartitionSpec("data")),
    lambda index: np.array(
      [value_at(i) for i in range(jax.device_count())[index[0]]], np.int32
    ),
  )
  add = jax.shard_map(
    lambda x: jax.lax.psum(x[0], "data"),
    mesh=mesh,
    in_specs=PartitionSpec("data"),
    out_specs=PartitionSpec(),
  )
  return int(np.asarray(jax.jit(add)(numbers).addressable_data(0)))


def _listen(port):
  """Opens a socket at the port, for both kinds of addresses if possible."""
  both = socket.has_dualstack_ipv6()
  return socket.create_server(
    ("", port),
    family=socket.AF_INET6 if both else socket.AF_INET,
    dualstack_ipv6=both,
  )


def _read_line(connection):
  """Reads one line of JSON from a socket."""
  text = b""
  while not text.endswith(b"\n"):
    if len(text) > _MAX_BYTES:
      raise ValueError("the line has no end")
    part = connection.recv(65536)
    if not part:
      raise ValueError("there was no answer")
    text += part
  return json.loads(text)


def _version(package):
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return None


def _numbers(version):
  """Returns `(0, 10, 2)` of "0.10.2" or "0.10.2.dev1"."""
  return tuple(int(x) for x in re.match(r"[\d.]*\d", version)[0].split("."))


def _older(version, least):
  return _numbers(version) < _numbers(least)


def _git(*arguments):
  """Returns what git says of this checkout, or None."""
  folder = pathlib.Path(__file__).resolve().parent.parent
  try:
    return subprocess.run(
      ["git", "-C", str(folder), *arguments],
      capture_output=True,
      text=True,
      errors="replace",
      check=True,
      timeout=60,
    ).stdout.strip()
  except (OSError, subprocess.SubprocessError):
    return None


def _has_accelerator():
  nodes = glob.glob("/dev/nvidia[0-9]*") + glob.glob("/dev/accel*")
  return bool(nodes) or shutil.which("nvidia-smi") is not None


def _where(values):
  """Writes `a on process 0, 2 and b on process 1`, the most common first."""
  groups = {}
  for index, value in enumerate(values):
    groups.setdefault(value, []).append(str(index))
  ordered = sorted(groups.items(), key=lambda group: -len(group[1]))
  return " and ".join(
    f"{value} on process {', '.join(indices)}" for value, indices in ordered
  )


def _on_all(hosts):
  return f", on all {len(hosts)} processes" if len(hosts) > 1 else ""


if __name__ == "__main__":
  sys.exit(main())
