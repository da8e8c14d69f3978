"""Workdirs in buckets: a folder of this machine, and a mirror of it at a URL.

`folder_of(url)` names the folder, in the cache of `buckets`; everything that
writes a workdir writes there, and knows nothing of the bucket but this:

- `start` takes the lease, and makes the folder what the bucket holds.
- A checkpoint is uploaded before it counts as saved on this machine. Before it
  go the rows that it knows of, behind it its `checksums.json`, without which
  nobody reads it: that object is the commit.
- Files are uploaded when a checkpoint is, every five minutes, and at the end,
  however that comes; the older ones first, so that one which says that another
  is finished comes behind it.

Why not Orbax's own CheckpointManager on the URL (0.12.8)? It has no checksums
of files, so that damage is found only where a format has its own, and `meta`
has none. It keeps whole states by a metric, where `best` is parameters. It
refuses "s3://b/x" (the path loses a slash), passes on no endpoint, and knows
neither memory:// nor anything else of fsspec; its gs:// takes tensorstore's
credentials, not those that data and models come with. And it mirrors neither
metrics nor samples, without which a checkpoint does not resume a run. A folder
of this machine keeps the one code path, with the same bits; its price is the
disk for the checkpoints that are kept.
"""

import contextlib
import json
import os
import pathlib
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterable, Sequence

from absl import logging

from rljax.storage import buckets, leases, locks, paths

MARKER = "checksums.json"  # Of a checkpoint, written last.
_PARTS = "checksums-{}.json"  # What the other hosts have written of it.
_CHECKPOINT = re.compile(r"((?:.*/)?checkpoints/[^/]+)/(.+)")
_OWNER = "mirror-owner.json"
# Without them a run goes on, and a person has less to look at.
_PICTURES = re.compile(r"(.*/)?(tensorboard/.*|[^/]*\.(png|html))")
_SECONDS_BETWEEN_UPLOADS = 300.0
_SECONDS_FOR_OTHERS = 1200.0  # Until the other hosts have written their part.

_OPEN: dict[str, "Mirror"] = {}  # Folder -> its mirror.


def folder_of(url: str) -> str:
  """Returns the folder on this machine that stands for a workdir at a URL.

  Raises:
    ValueError: if the URL cannot be reached at all.
  """
  url = url.rstrip("/")
  folder = buckets.cache_folder() / "workdirs" / buckets.local_name(url)
  folder = os.path.realpath(folder)
  if folder not in _OPEN:
    _OPEN[folder] = Mirror(url, folder)
  return folder


def of(path: str | os.PathLike[str]) -> "Mirror | None":
  """Returns the mirror of the workdir that a path lies in; None for most."""
  if not _OPEN:
    return None
  path = pathlib.Path(os.path.realpath(path))
  for place in (path, *path.parents):
    if (found := _OPEN.get(os.fspath(place))) is not None:
      return found
  return None


def shown(path: str | os.PathLike[str]) -> str:
  """Returns a path as a person named it: the URL, for a workdir at one."""
  found = of(path)
  return os.fspath(path) if found is None else found.url_of(path)


def check_one_disk(path: str | os.PathLike[str]) -> None:
  """Raises ValueError where processes that share files have none in common.

  Args:
    path: below a workdir, of files that one process writes and others read.
  """
  found = of(path)
  if found is not None and found.own_disk:
    raise ValueError(
      f"{found.url_of(path)}: the processes of this script read files of each "
      "other, and their hosts have only a bucket in common. Give a --workdir "
      "on a file system that all hosts mount, or start it on one host."
    )


@contextlib.contextmanager
def closing():
  """Uploads, at the end of the block, what all open mirrors still hold.

  Raises:
    BucketError: if that fails, unless the block has raised already.
  """
  try:
    yield
  except BaseException:
    for mirror in list(_OPEN.values()):
      try:
        mirror.close()
      except (OSError, ValueError) as error:
        logging.error("%s", error)
    _OPEN.clear()
    raise
  mirrors = list(_OPEN.values())
  _OPEN.clear()
  for mirror in mirrors:
    mirror.close()


class Mirror:
  """A workdir at a URL, and the folder that stands for it.

  Attributes:
    url: of the workdir.
    folder: on this machine.
    own_disk: whether the processes of the run see different folders, so that
      each uploads what it writes of a checkpoint.
  """

  def __init__(self, url: str, folder: str | os.PathLike[str]):
    """See `folder_of`; asks the store for nothing yet."""
    self.url, self.folder = url, pathlib.Path(folder)
    self.own_disk = False
    self._bucket = buckets.Bucket(url, "--workdir")
    self._lease: leases.Lease | None = None
    self._lock: locks.Lock | None = None
    self._known: dict[str, tuple[int, int] | None] = {}
    self._is_pushing = threading.Lock()
    self._ended = threading.Event()
    self._thread: threading.Thread | None = None  # Once the folder is whole.
    self._lacks: set[str] = set()

  def url_of(self, path: str | os.PathLike[str]) -> str:
    """Returns the URL of a file or folder of the workdir."""
    name = self.name_of(path)
    return f"{self.url}/{name}" if name else self.url

  def name_of(self, path: str | os.PathLike[str]) -> str:
    """Returns the name in the bucket of a file or folder of the workdir."""
    name = pathlib.Path(os.path.realpath(path)).relative_to(self.folder)
    return "" if name == pathlib.PurePath() else name.as_posix()

  def start(self, *, writes: bool = True) -> None:
    """Makes the folder what the bucket holds, but for checkpoints.

    Those are fetched when they are asked for. What was last written from this
    very folder is the newer one: it is kept, and uploaded with the next files.

    Args:
      writes: whether this is the one process that writes to the bucket. It
        takes the lease, and deletes checkpoints that a kill has left half
        uploaded.

    Raises:
      ValueError: if another process holds the lease, or nothing can be read.
      BucketError: if nothing can be written.
    """
    owner = self.folder / _OWNER
    is_ours = False
    self.folder.mkdir(parents=True, exist_ok=True)
    try:
      if not writes:
        held = leases.owner(self._bucket)
        self.own_disk = held is None or _read_owner(owner) != held
        if not self.own_disk:  # The first process has filled it.
          return
      if writes and self._lease is None:
        # Who runs on this machine is told at once.
        self._lock = locks.take(self.folder)
        self._lease = leases.Lease(self._bucket)
        is_ours = self._lease.previous is not None and (
          _read_owner(owner) == self._lease.previous
        )
      objects = self._bucket.objects()
    except buckets.BucketError as error:
      raise ValueError(
        f"--workdir={self.url} cannot be used: "
        f"{buckets.described(error.__cause__ or error)}."
      ) from error
    steps: dict[str, set[str]] = {}
    for name in objects:
      if match := _CHECKPOINT.fullmatch(name):
        steps.setdefault(match[1], set()).add(match[2])
    shared = [name for name in objects if _is_shared(name)]
    is_ours = is_ours and (
      "flags.json" not in shared or (self.folder / "flags.json").is_file()
    )
    if not is_ours:
      for name in self._files():
        if name not in shared:
          (self.folder / name).unlink()
      self._bucket.download({x: self.folder / paths.below(x) for x in shared})
      self._known = {x: _signature(self.folder / x) for x in shared}
    else:  # What is in both is uploaded anew; what is gone here goes there.
      self._known = dict.fromkeys(shared)
    if not writes:
      return
    for name, files in steps.items():
      is_step = name.rpartition("/")[2].isdecimal()
      if is_step and MARKER not in files:
        self._bucket.delete(f"{name}/{file}" for file in files)
    paths.write_whole(owner, json.dumps({"owner": self._lease.owner}) + "\n")
    self._thread = threading.Thread(target=self._keep_pushing, daemon=True)
    self._thread.start()

  def push(self) -> None:
    """Uploads the files that have changed since, but for checkpoints.

    Raises:
      BucketError: if that fails for a file that a run must keep. A picture is
        left out with a warning, once.
    """
    if self._thread is None:
      return  # What lies here may be older than the bucket.
    with self._is_pushing:
      found = {}
      for name in self._files():
        with contextlib.suppress(FileNotFoundError):  # Written anew just now.
          found[name] = _signature(self.folder / name)
      changed = [x for x, y in found.items() if self._known.get(x) != y]
      if changed or self._known.keys() - found.keys():
        self._lease.check()
      for name in sorted(changed, key=lambda x: found[x][1]):
        try:
          self._bucket.upload({name: self.folder / name})
          self._known[name] = found[name]
        except FileNotFoundError:
          continue
        except buckets.BucketError as error:
          if not _PICTURES.fullmatch(name):
            if not (self.folder / name).exists():
              continue
            raise
          if name not in self._lacks:
            logging.warning("%s", error)
            self._lacks.add(name)
      gone = [x for x in self._known if not (self.folder / x).exists()]
      self._bucket.delete(gone)
      for name in gone:
        del self._known[name]

  def close(self) -> None:
    """Uploads what has changed, and gives the lease back."""
    self._ended.set()
    if self._thread is not None:
      self._thread.join()
    if self._lease is None:
      return
    try:
      self.push()
    finally:
      lease, self._lease = self._lease, None
      lease.close()
      self._lock = None

  # Checkpoints, by the folder they have or will have on this machine.

  def steps(self, folder: pathlib.Path) -> list[str]:
    """Returns the names of the whole checkpoints of a folder, unsorted."""
    objects = self._bucket.objects(self.name_of(folder))
    found = (_CHECKPOINT.fullmatch(name) for name in objects)
    return [
      match[1].rpartition("/")[2]
      for match in found
      if match and match[2] == MARKER
    ]

  def fetch(self, path: pathlib.Path) -> None:
    """Makes a checkpoint on this machine the one that the bucket holds."""
    name = self.name_of(path)
    objects = self._bucket.objects(name)
    marker = objects.pop(f"{name}/{MARKER}", None)
    if marker is None:
      raise ValueError(f"{self.url}/{name} is no checkpoint that is whole.")
    commit = self._bucket.read(f"{name}/{MARKER}")
    with contextlib.suppress(OSError):
      if (path / MARKER).read_bytes() != commit:
        shutil.rmtree(path)  # Of another time.
    targets = {x: self.folder / paths.below(x) for x in objects}
    self._bucket.download(
      {
        x: target
        for x, target in targets.items()
        if not target.is_file() or target.stat().st_size != objects[x].size
      }
    )
    path.mkdir(parents=True, exist_ok=True)
    paths.write_whole(path / MARKER, commit, shared=True)

  def upload_part(
    self, unfinished: pathlib.Path, path: pathlib.Path, process: int
  ) -> None:
    """Uploads what one of the other hosts has written of a checkpoint.

    Args:
      unfinished: where it lies.
      path: of the checkpoint, once it is whole.
      process: which one this is.
    """
    name = self.name_of(path)
    own = {x: y for x, y in _files_of(unfinished).items() if _is_own(x)}
    self._bucket.upload({f"{name}/{x}": y for x, y in own.items()})
    content = json.dumps({x: paths.checksum(y) for x, y in own.items()})
    self._bucket.write(f"{name}/{_PARTS.format(process)}", content.encode())

  def parts(self, path: pathlib.Path, processes: Iterable[int]) -> dict:
    """Waits for what the other hosts have uploaded; returns its checksums."""
    name, found = self.name_of(path), {}
    deadline = time.monotonic() + _SECONDS_FOR_OTHERS
    for process in processes:
      part = f"{name}/{_PARTS.format(process)}"
      while (content := self._bucket.read(part)) is None:
        if time.monotonic() > deadline:
          raise buckets.BucketError(
            f"{self.url}/{name}",
            f"process {process} did not upload its part",
            "written",
          )
        time.sleep(0.2)
      found |= json.loads(content)
    return found

  def commit(self, unfinished: pathlib.Path, path: pathlib.Path) -> None:
    """Uploads a checkpoint, the rows before it and its marker behind it.

    Args:
      unfinished: where it lies, with its `checksums.json`.
      path: where it will lie.

    Raises:
      BucketError: if not all of it is there afterwards.
    """
    self.push()
    name, files = self.name_of(path), _files_of(unfinished)
    del files[MARKER]
    old = self._bucket.objects(name)
    self._bucket.delete({f"{name}/{MARKER}"} & old.keys())
    self._bucket.upload({f"{name}/{x}": y for x, y in files.items()})
    self._lease.check()
    self._bucket.write(f"{name}/{MARKER}", (unfinished / MARKER).read_bytes())
    expected = json.loads((unfinished / MARKER).read_text())["files"]
    stale = old.keys() - {f"{name}/{x}" for x in (*expected, MARKER)}
    self._bucket.delete(stale)

  def remove(self, path: pathlib.Path) -> None:
    """Deletes a checkpoint, its marker first."""
    name = self.name_of(path)
    objects = self._bucket.objects(name)
    marker = f"{name}/{MARKER}"
    self._bucket.delete({marker} & objects.keys())
    self._bucket.delete(objects.keys() - {marker})

  def rename(self, path: pathlib.Path, target: pathlib.Path) -> None:
    """Gives a checkpoint another name, under which nobody resumes from it."""
    name, new = self.name_of(path), self.name_of(target)
    for old in self._bucket.objects(name):
      self._bucket.copy(old, new + old[len(name) :])
    self.remove(path)

  def _keep_pushing(self):
    """Uploads files now and then, in a thread."""
    while not self._ended.wait(_SECONDS_BETWEEN_UPLOADS):
      try:
        self.push()
      except (OSError, ValueError) as error:  # A save would raise it.
        logging.warning("%s", error)

  def _files(self) -> list[str]:
    """Returns the names of all files that are mirrored as they are."""
    return [x for x in _files_of(self.folder) if _is_shared(x)]


def _files_of(folder: pathlib.Path) -> dict[str, pathlib.Path]:
  """Returns the files below a folder, by their names in it."""
  found = {}
  for place, _, names in os.walk(folder):
    for name in names:
      path = pathlib.Path(place, name)
      found[path.relative_to(folder).as_posix()] = path
  return found


def _is_shared(name: str) -> bool:
  """Tells whether a file is mirrored when it changes."""
  is_hidden = any(part.startswith(".") for part in name.split("/"))
  return not (is_hidden or name == _OWNER or _CHECKPOINT.fullmatch(name))


def _is_own(name: str) -> bool:
  """Tells whether a file of a checkpoint differs between hosts, by its name.

  They are the chunks of arrays (`<array>/c/0/1`) and what describes them.
  """
  parts = name.split("/")
  return "c" in parts[1:] or parts[-1].startswith("process_")


def _signature(path: pathlib.Path) -> tuple[int, int]:
  found = path.stat()
  return found.st_size, found.st_mtime_ns


def main(arguments: Sequence[str]) -> int:
  """Prints the folder that stands for the workdir at a URL, for launchers."""
  (url,) = arguments
  print(folder_of(url))
  return 0


def _read_owner(path: pathlib.Path) -> str | None:
  try:
    return json.loads(path.read_text())["owner"]
  except (OSError, ValueError, KeyError, TypeError):
    return None


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
