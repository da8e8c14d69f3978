"""Opens the folder of a run, and holds its flags against those it began with.

`flags.json` in it has the flags that the run was started with. A workdir in a
bucket is a folder of this machine with a mirror; see `mirrors`.
"""

import errno
import json
import os
import pathlib
import tempfile
from collections.abc import Collection, Mapping
from typing import Any

import jax
import numpy as np

from rljax.storage import mirrors, paths

Workdir = str | os.PathLike[str]


def prepare(workdir: Workdir) -> None:
  """Makes the folder of a run and checks that it can be written to.

  One that stands for a workdir in a bucket gets what the bucket holds, and the
  bucket's lease. All processes call it.

  Args:
    workdir: the folder, which may exist.

  Raises:
    ValueError: if it cannot be made or written to, with the system's reason, is
      no path of this machine, or another process writes to its bucket.
  """
  paths.check_local(workdir, "workdir")
  try:
    os.makedirs(workdir, exist_ok=True)
    with tempfile.TemporaryFile(dir=workdir) as file:
      file.write(b"x")
    folder = os.path.join(workdir, "checkpoints")
    if os.path.lexists(folder) and not os.path.isdir(folder):
      raise NotADirectoryError(errno.ENOTDIR, "checkpoints is no folder")
  except OSError as error:
    raise ValueError(
      f"workdir {os.fspath(workdir)} cannot be written to: {error.strerror}; "
      "choose another --workdir."
    ) from error
  if (mirror := mirrors.of(workdir)) is not None:
    _start_mirror(mirror)


def write_flags(
  workdir: Workdir, flags: Mapping[str, Any], ignore: Collection[str] = ()
) -> None:
  """Writes the flags of a run, unless the folder has a run with others.

  Args:
    workdir: folder of the run.
    flags: name to value; anything that `json` can write.
    ignore: names that may change between two starts of one run.

  Raises:
    ValueError: as `check_flags`.
  """
  check_flags(workdir, flags, ignore)
  if jax.process_index() == 0:
    text = json.dumps(
      plain_json(dict(flags), "flags"), indent=2, sort_keys=True
    )
    paths.write_whole(pathlib.Path(workdir, "flags.json"), text + "\n")


def check_flags(
  workdir: Workdir, flags: Mapping[str, Any], ignore: Collection[str] = ()
) -> None:
  """Compares flags with those that the run in `workdir` began with.

  Args:
    workdir: folder of a run; one without flags passes.
    flags: name to value.
    ignore: names that may differ.

  Raises:
    ValueError: if any other flag differs, with a line for each.
  """
  path = pathlib.Path(workdir) / "flags.json"
  if not path.exists():
    return
  old = read_object(path)
  new = plain_json(dict(flags), "flags")
  lines = []
  for name in sorted((old.keys() | new.keys()) - set(ignore)):
    if name not in new:
      lines.append(f"  {name}: was {_shown(old[name])}, now absent")
    elif name not in old:
      lines.append(f"  {name}: was absent, now {_shown(new[name])}")
    elif old[name] != new[name]:
      lines.append(
        f"  {name}: was {_shown(old[name])}, now {_shown(new[name])}"
      )
  if lines:
    raise ValueError(
      f"{mirrors.shown(workdir)} belongs to a run with other flags:\n"
      + "\n".join(lines)
      + "\nGive the old flags to go on with it, or another --workdir."
    )


def read_object(path: str | os.PathLike[str]) -> dict[str, Any]:
  """Reads a file that holds one JSON object of a run.

  Raises:
    ValueError: if it holds something else.
  """
  try:
    found = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    if not isinstance(found, dict):
      raise ValueError("it is no JSON object")
  except (ValueError, OSError, RecursionError) as error:
    raise ValueError(
      f"{path} cannot be read ({error}); delete it if the run is yours, or "
      "choose another --workdir."
    ) from error
  return found


def plain_json(value: Any, what: str) -> Any:
  """Returns a value as it would come back from a JSON file.

  Args:
    value: anything that `json` can write.
    what: what it is, for the error.

  Raises:
    ValueError: if it is something else.
  """
  try:
    return json.loads(json.dumps(value))
  except (TypeError, ValueError) as error:
    raise ValueError(f"{what} must be JSON: {error}.") from error


def _start_mirror(mirror):
  """Opens a workdir in a bucket, in all processes; the first writes."""
  if jax.process_index() == 0:
    mirror.start()
  if jax.process_count() == 1:
    return
  from jax.experimental import multihost_utils

  multihost_utils.sync_global_devices("rljax mirror")
  if jax.process_index() != 0:
    mirror.start(writes=False)
  own = multihost_utils.process_allgather(np.int32(mirror.own_disk))[1:]
  if own.any() != own.all():
    raise ValueError(
      f"Some of the processes share {mirror.folder} and others do not: start "
      "one process on each host, or give each its own RLJAX_BUCKETS."
    )
  mirror.own_disk = bool(own.all())


def _shown(value):
  return json.dumps(value, ensure_ascii=False)
