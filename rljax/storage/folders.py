"""Replaces the files of a folder at once, so that a reader never meets a mix.

`replaced` yields an empty folder to write to. At the end of the block the files
take the place of those that stood in the target before. If the block raises, if
the disk is full, or if the process is killed at any moment, then `current`
returns a folder that holds all of the old files or all of the new ones.

Where it can be, the two folders change names in one system call. A mount point,
or a folder with files of somebody else, stays where it is: the new files are
kept whole in `.export` within it until all of them stand in the target. A URL
is written by `buckets.upload_folder`, which can promise less.
"""

import contextlib
import ctypes
import errno
import os
import pathlib
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator

from rljax.storage import buckets, locks, paths

_WHOLE = ".export"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def current(directory: str | os.PathLike[str]) -> pathlib.Path:
  """Returns the folder to read: `directory`, or what a kill left to move.

  Args:
    directory: a folder that `replaced` writes, or any other.
  """
  directory = pathlib.Path(directory)
  whole = directory / _WHOLE
  return whole if whole.is_dir() else directory


def inside(directory: str | os.PathLike[str], name: str) -> pathlib.Path:
  """Returns the path of a file in a folder, once it is known to lie there.

  The snapshots of the Hugging Face hub's cache are links to the blobs beside
  them, which counts as inside.

  Args:
    directory: the folder.
    name: of the file.

  Raises:
    ValueError: if the name is a path, or a link that leads out of the folder.
  """
  directory = pathlib.Path(directory)
  if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
    raise ValueError(f"{name!r} is not the name of a file in {directory}.")
  path = directory / name
  try:
    target, root = path.resolve(), directory.resolve()
  except (OSError, RuntimeError) as error:  # Links in a circle.
    raise ValueError(f"{path} leads nowhere: {error}.") from error
  if root.parent.name == "snapshots":
    root = root.parent.parent
  if root not in target.parents:
    raise ValueError(
      f"{path} is a link to {target}, outside of its folder; only files within "
      "are opened: copy it there."
    )
  return path


@contextlib.contextmanager
def replaced(
  directory: str | os.PathLike[str],
  is_stale: Callable[[str], bool],
  *,
  last: str,
) -> Iterator[pathlib.Path]:
  """Yields a folder to write to, whose files then replace those of another.

  Args:
    directory: the target, created if need be. If it is a link, so is the target
      afterwards. It may be a URL of a bucket.
    is_stale: name -> whether an entry of the target belongs to what is
      replaced, so that it goes if no new one has its name. Others stay.
    last: file without which nobody reads the folder: where files have to be
      moved one by one, it goes first and comes last.

  Yields:
    The folder that the block writes; files only, or folders of files.

  Raises:
    ValueError: if the target is a file, or no path of this machine, or another
      process is writing there.
    OSError: if files cannot be written or moved.
  """
  if buckets.is_url(directory):
    buckets.check(directory, "The folder")
    with tempfile.TemporaryDirectory() as stage:
      yield pathlib.Path(stage)
      buckets.upload_folder(stage, os.fspath(directory), is_stale, last=last)
    return
  paths.check_local(directory, "directory")
  directory = pathlib.Path(directory).expanduser()
  if directory.exists() and not directory.is_dir():
    raise ValueError(f"{directory} is a file, and must be a folder.")
  try:
    directory = directory.resolve()
  except (OSError, RuntimeError) as error:  # Links in a circle.
    raise ValueError(f"{directory} leads nowhere: {error}.") from error
  is_new = not directory.exists()
  directory.parent.mkdir(parents=True, exist_ok=True)
  # Beside it, where its own files are all replaced; a mount point may stand in
  # a folder that is not ours.
  may_stand_beside = os.access(directory.parent, os.W_OK)
  lock = (locks.beside if may_stand_beside else locks.take)(directory)
  _remove_left_over(directory)
  stage = _stage(directory)
  try:
    yield stage
    _flush(stage)
    if is_new and not directory.exists():
      os.rename(stage, directory)
    elif not _swap(stage, directory, is_stale):
      _move_in(stage, directory, is_stale, last)
  finally:
    shutil.rmtree(stage, ignore_errors=True)
    lock.close()


def _stage(directory: pathlib.Path) -> pathlib.Path:
  """Makes the folder to write to, on the file system of the target."""
  prefix = f".{directory.name}.{_owner()}-"
  if not (directory.is_dir() and _is_mount(directory)):
    with contextlib.suppress(PermissionError):
      return _made(prefix, directory.parent)
  return _made(prefix, directory)


def _made(prefix: str, parent: pathlib.Path) -> pathlib.Path:
  return pathlib.Path(tempfile.mkdtemp(prefix=prefix, dir=parent))


def _owner() -> str:
  return f"{socket.gethostname()}-{os.getpid()}"


def _remove_left_over(directory: pathlib.Path) -> None:
  """Removes what killed processes of this host were writing."""
  prefix = f".{directory.name}.{socket.gethostname()}-"
  for parent in (directory.parent, directory):
    if not parent.is_dir():
      continue
    for path in parent.glob(f"{prefix}*-*"):
      pid = path.name.removeprefix(prefix).split("-")[0]
      if pid.isdecimal() and not _is_alive(int(pid)):
        shutil.rmtree(path, ignore_errors=True)


def _is_alive(pid: int) -> bool:
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  except OSError:
    return True
  return True


def _is_mount(directory: pathlib.Path) -> bool:
  return (
    os.path.ismount(directory)
    or directory.stat().st_dev != directory.parent.stat().st_dev
  )


def _flush(folder: pathlib.Path) -> None:
  """Gives files the modes of any other, and waits until they are on disk."""
  mask = os.umask(0)
  os.umask(mask)
  folder.chmod(0o777 & ~mask)
  for path in folder.rglob("*"):
    path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
    if path.is_file():
      with path.open("rb+") as file:
        os.fsync(file.fileno())


def _swap(
  stage: pathlib.Path,
  directory: pathlib.Path,
  is_stale: Callable[[str], bool],
) -> bool:
  """Lets two folders change names; False where that cannot be done."""
  here = pathlib.Path.cwd()
  if (
    stage.parent != directory.parent
    or not all(is_stale(name) for name in os.listdir(directory))
    or here == directory
    or directory in here.parents
  ):
    return False
  try:
    shutil.copymode(directory, stage)
    libc = ctypes.CDLL(None, use_errno=True)
    failed = libc.renameat2(
      _AT_FDCWD,
      os.fsencode(stage),
      _AT_FDCWD,
      os.fsencode(directory),
      _RENAME_EXCHANGE,
    )
  except (AttributeError, OSError):
    return False  # Not Linux, or not a folder of ours.
  return not failed


def _move_in(
  stage: pathlib.Path,
  directory: pathlib.Path,
  is_stale: Callable[[str], bool],
  last: str,
) -> None:
  """Moves files into a folder that has to stay where it is."""
  whole = directory / _WHOLE
  if stage.parent != directory:
    inside = _made(f".{directory.name}.{_owner()}-", directory)
    try:
      os.rename(stage, inside)
    except OSError as error:
      if error.errno not in (errno.EXDEV, errno.EBUSY):
        raise
      shutil.copytree(stage, inside, dirs_exist_ok=True)
      _flush(inside)
    stage = inside
  try:
    if not whole.is_dir():
      whole.unlink(missing_ok=True)
    if whole.is_dir():  # A killed call got as far as here; this one is newer.
      _settle(whole, directory, is_stale, last)
    os.rename(stage, whole)  # From here on, the new files count.
  except OSError:
    shutil.rmtree(stage, ignore_errors=True)
    raise
  _settle(whole, directory, is_stale, last)


def _settle(
  whole: pathlib.Path,
  directory: pathlib.Path,
  is_stale: Callable[[str], bool],
  last: str,
) -> None:
  """Puts the files of `.export` into the folder around it, and removes it."""
  names = sorted(os.listdir(whole), key=lambda name: (name == last, name))
  _remove(directory / last)
  for name in os.listdir(directory):
    if name != _WHOLE and name not in names and is_stale(name):
      _remove(directory / name)
  for name in names:
    partial = directory / f".{name}.partial"
    _remove(partial)
    if (whole / name).is_dir():
      shutil.copytree(whole / name, partial)
      _remove(directory / name)
    else:
      try:
        os.link(whole / name, partial)
      except OSError:  # Not every file system has links.
        shutil.copy2(whole / name, partial)
    os.replace(partial, directory / name)
  done = _made(f".{directory.name}.{_owner()}-", directory)
  os.rename(whole, done)
  shutil.rmtree(done, ignore_errors=True)


def _remove(path: pathlib.Path) -> None:
  if path.is_dir() and not path.is_symlink():
    shutil.rmtree(path)
  else:
    path.unlink(missing_ok=True)
