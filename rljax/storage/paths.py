"""Writes files whole or not at all, on the disks of this machine.

A reader, and a run that starts after a kill, sees the old file or the new one,
never half of one.
"""

import contextlib
import errno
import hashlib
import os
import pathlib
import re
import shutil
import uuid
from collections.abc import Iterator

# Such as gs: of gs://bucket, also where pathlib has folded its two slashes.
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CLOSED = (errno.EROFS, errno.EACCES, errno.EPERM)
# How text is stored. Half a surrogate pair, which UTF-8 has no bytes for, and
# which functions of a user's may return, becomes what JSON writes for it.
TEXT = ("utf-8", "backslashreplace")


class DiskError(OSError):
  """A file that a run must keep cannot be written; says which, and what to do.

  Attributes:
    errno: the system's number of the error, such as `errno.ENOSPC`.
  """

  def __init__(self, path: str | os.PathLike[str], error: BaseException):
    """Takes the file or folder, and what the system said."""
    number = getattr(error, "errno", None)
    reason = getattr(error, "strerror", None) or _first_line(error)
    if number is None and "No space left" in str(error):
      number = errno.ENOSPC  # A library says it in its own words.
      reason = os.strerror(number)
    if number in _FULL:
      advice = "Free some space on its disk"
    elif number in _CLOSED:
      advice = "Make it writable"
    else:
      advice = "See to its disk"
    super().__init__(
      f"{os.fspath(path)} cannot be written: {reason}. {advice} and give the "
      "same command again: what was saved before is whole, and goes on."
    )
    self.errno = number


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
  """Turns an error of the system within the block into a `DiskError`.

  Args:
    path: what the block writes.
  """
  try:
    yield
  except DiskError:
    raise
  except OSError as error:
    raise DiskError(path, error) from error


def is_full_or_closed(error: OSError) -> bool:
  """Tells whether a disk is full, or nothing may be written there."""
  return error.errno in (*_FULL, *_CLOSED[:1])


def check_local(path: str | os.PathLike[str], name: str) -> None:
  """Raises ValueError for a path that is no path of this machine.

  Otherwise gs://bucket/run would become a folder that is called gs: here.

  Args:
    path: of a file or folder, or a text that may hold one, such as name=path.
    name: what it is, for the message, such as --workdir.
  """
  text = os.fspath(path)
  if "://" not in text and not _SCHEME.match(text):
    return
  hint = ""
  if match := re.match(r"https?://huggingface\.co/([\w.-]+/[\w.-]+)", text):
    hint = f" (or the hub name {match[1]}, where a model is meant)"
  raise ValueError(
    f"{name}={text} is not a path of this machine, and must be one{hint}; a "
    "workdir, models and data may lie in a bucket."
  )


def below(name: str) -> pathlib.PurePosixPath:
  """Returns the name of an object as a path that stays below its folder.

  Raises:
    ValueError: if it leads elsewhere, as "../x" does.
  """
  path = pathlib.PurePosixPath(name)
  if path.is_absolute() or ".." in path.parts or not path.parts:
    raise ValueError(f"{name!r} is not the name of a file below a folder.")
  return path


def write_whole(
  path: str | os.PathLike[str],
  content: str | bytes,
  *,
  fsync: bool = False,
  shared: bool = False,
) -> None:
  """Writes a file whole or not at all.

  Args:
    path: file to write or to replace; its folder exists.
    content: text, which is stored as UTF-8, or bytes.
    fsync: see `whole`; likewise `shared`.
    shared: whether several processes may write the file at once.

  Raises:
    DiskError: if the file cannot be written; the old one then stays.
  """
  if isinstance(content, str):
    content = content.encode(*TEXT)
  with whole(path, fsync=fsync, shared=shared) as partial:
    partial.write_bytes(content)


@contextlib.contextmanager
def whole(
  path: str | os.PathLike[str], *, fsync: bool = False, shared: bool = False
) -> Iterator[pathlib.Path]:
  """Yields a path to write to, and renames that file at the end of the block.

  For a file that a library writes itself. If the block raises, what it wrote
  is deleted and the old file stays. A kill may leave the hidden
  `.<name>.partial` behind, which the next write replaces.

  Args:
    path: file to write or to replace; its folder exists.
    fsync: whether to wait until the content is on disk before the file is
      renamed, so that a power failure does not lose it either.
    shared: whether several processes may write the file at once: each then
      writes under a name of its own, and the last rename wins. What a kill
      leaves of such a name stays.

  Yields:
    The path beside `path` that the block writes.

  Raises:
    DiskError: if the file cannot be written; the old one then stays.
    ValueError: if the path is none of this machine.
  """
  check_local(path, "The path")
  path = pathlib.Path(path)
  owner = f".{uuid.uuid4().hex}" if shared else ""
  partial = path.with_name(f".{path.name}{owner}.partial")
  try:
    with writing(path):
      yield partial
      if fsync:
        with partial.open("rb+") as file:
          os.fsync(file.fileno())
      os.replace(partial, path)
  finally:
    with contextlib.suppress(OSError):
      partial.unlink(missing_ok=True)


def checksum(path: str | os.PathLike[str]) -> list[int | str]:
  """Returns `[bytes, SHA-256]` of a file."""
  with open(path, "rb") as file:
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    return [os.fstat(file.fileno()).st_size, digest]


def set_aside(path: str | os.PathLike[str]) -> pathlib.Path:
  """Renames a file or folder to `<path>.old<n>`, the first that is free.

  Returns:
    Where it is now.
  """
  aside = _free_name(pathlib.Path(path))
  with writing(path):
    os.replace(path, aside)
  return aside


def keep_copy(path: str | os.PathLike[str]) -> pathlib.Path:
  """Keeps a file that is about to be replaced, as `<path>.old<n>`.

  Returns:
    Where it is kept.
  """
  path = pathlib.Path(path)
  aside = _free_name(path)
  with writing(aside):
    try:
      os.link(path, aside)
    except OSError:  # Some disks know no second name of a file.
      with whole(aside) as partial:
        shutil.copyfile(path, partial)
  return aside


def _free_name(path: pathlib.Path) -> pathlib.Path:
  """Returns the first of `<path>.old1`, `<path>.old2`, ... that is free."""
  number = 1
  while os.path.lexists(aside := path.with_name(f"{path.name}.old{number}")):
    number += 1
  return aside


def _first_line(error: BaseException) -> str:
  """Returns what an error says, in one line."""
  return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
