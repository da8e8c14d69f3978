"""Writes files whole or not at all.

A reader, and a run that starts after a kill, sees the old file or the new one,
never half of one.
"""

import contextlib
import os
import pathlib
import uuid
from collections.abc import Iterator


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
    OSError: if the file cannot be written; the old one then stays.
  """
  if isinstance(content, str):
    content = content.encode("utf-8")
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
    OSError: if the file cannot be written; the old one then stays.
  """
  path = pathlib.Path(path)
  owner = f".{uuid.uuid4().hex}" if shared else ""
  partial = path.with_name(f".{path.name}{owner}.partial")
  try:
    yield partial
    if fsync:
      with partial.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)
  finally:
    partial.unlink(missing_ok=True)
