"""Reads and writes objects at URLs: gs://, s3:// and all else fsspec reaches.

A bucket has objects and no folders: nothing in it can be renamed at once, and
an object is there whole or not at all. `Bucket` is the one place where its
calls are made, tried again, and their errors put into words; `fetch` brings
what a URL holds into a cache on this machine, for those who only read.

`file:///mnt/bucket/x` treats a mounted folder as such a bucket: for a mount
that cannot rename folders, such as gcsfuse.
"""

import concurrent.futures
import contextlib
import hashlib
import json
import os
import pathlib
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from absl import logging

from rljax.storage import paths

# What a scheme needs that is not installed with us -> extra of setup.cfg.
EXTRAS = {"gs": "gcs", "gcs": "gcs", "s3": "s3", "s3a": "s3"}
_PACKAGES = {"gcs": "gcsfs", "s3": "s3fs"}
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
# Of one object, in the order in which they are asked for.
_TAGS = ("ETag", "etag", "md5Hash", "generation", "LastModified", "created")
_WAITS = (1.0, 2.0, 4.0)  # Seconds before a failed call is made again.
_FINAL = (FileNotFoundError, FileExistsError, PermissionError)
_THREADS = 8


class BucketError(paths.DiskError):
  """Something that must be kept did not get into a bucket, or out of it."""

  def __init__(self, url: str, error: BaseException | str, verb: str):
    """Takes the URL, what was said of it, and what was tried."""
    reason = error if isinstance(error, str) else described(error)
    OSError.__init__(
      self,
      f"{url} cannot be {verb}: {reason}. See to it, and give the same command "
      "again: what was saved before is whole, and goes on.",
    )
    self.errno = getattr(error, "errno", None)


class Object(NamedTuple):
  """An object of a bucket: its bytes, and a text that changes with them."""

  size: int
  tag: str


def is_url(path: str | os.PathLike[str]) -> bool:
  """Tells whether a path is a URL, such as gs://bucket/run."""
  return bool(_URL.match(os.fspath(path)))


def described(error: BaseException) -> str:
  """Returns what an error says, with its type, in one line."""
  text = (str(error).splitlines() or [""])[0].rstrip(".")
  return f"{type(error).__name__}: {text}" if text else type(error).__name__


def check(url: str | os.PathLike[str], name: str) -> None:
  """Raises ValueError for a URL that cannot be reached from here at all.

  Asks nobody: the scheme is known and its package is installed, or not.

  Args:
    url: any path; one of this machine passes.
    name: what it is, for the message, such as --policy.
  """
  if is_url(url):
    _filesystem(os.fspath(url), name)
  else:
    paths.check_local(url, name)


def cache_folder() -> pathlib.Path:
  """Returns where copies lie: $RLJAX_BUCKETS, or ~/.cache/rljax-buckets."""
  found = os.environ.get("RLJAX_BUCKETS") or "~/.cache/rljax-buckets"
  return pathlib.Path(found).expanduser().absolute()


def local_name(url: str) -> str:
  """Returns a relative path of its own for a URL, which ends as it does."""
  digest = hashlib.sha256(url.encode()).hexdigest()[:16]
  return f"{digest}/{url.rstrip('/').rpartition('/')[2] or 'root'}"


def _filesystem(url: str, name: str) -> tuple[Any, str]:
  """Returns fsspec's file system of a URL, and the path there."""
  import fsspec  # With transformers.

  scheme = _URL.match(url)[1].lower()
  hint = ""
  if match := re.match(r"https?://huggingface\.co/([\w.-]+/[\w.-]+)", url):
    hint = f" The hub name {match[1]} may be meant."
  if scheme in ("http", "https", "hf") or (
    scheme not in fsspec.available_protocols()
  ):
    raise ValueError(
      f"{name}={url}: {scheme}:// is no bucket that is read and written here; "
      f"gs://, s3://, file:// and others of fsspec are.{hint}"
    )
  if not url[len(scheme) + 3 :].strip("/"):
    raise ValueError(f"{name}={url} names no bucket: {scheme}://bucket/folder.")
  try:
    # Another machine may write there: nothing is taken from memory.
    fs, root = fsspec.core.url_to_fs(url, use_listings_cache=False)
  except ImportError as error:
    extra = EXTRAS.get(scheme)
    install = f"pip install -e '.[{extra}]' in the checkout, or "
    package = _PACKAGES.get(extra, "its package")
    raise ValueError(
      f"{name}={url} needs {package}, which is not installed: "
      f"{install if extra else ''}pip install "
      f"{package if extra else described(error)}."
    ) from error
  except Exception as error:  # Settings of the store's own package.
    raise ValueError(f"{name}={url}: {described(error)}.") from error
  return fs, root.rstrip("/")


class Bucket:
  """What lies below one URL.

  Names are relative, such as checkpoints/4/meta; "" is an object at the URL
  itself. A call that fails is made again, three times.
  """

  def __init__(self, url: str, name: str = "The bucket"):
    """Takes the URL, and what it is called in messages."""
    self.url = url.rstrip("/")
    self._fs, self._root = _filesystem(self.url, name)
    kinds = self._fs.protocol
    kinds = (kinds,) if isinstance(kinds, str) else kinds
    self._is_local = "file" in kinds

  def objects(self, prefix: str = "") -> dict[str, Object]:
    """Returns all objects whose path begins with `<prefix>/`, by name."""
    place = self._at(prefix)
    found = self._tried("read", prefix, lambda: self._listed(place))
    objects = {}
    for path, about in found.items():
      name = path[len(self._root) :].lstrip("/")
      if about.get("type", "file") != "file" or name.endswith("/"):
        continue
      tag = next((about[x] for x in _TAGS if about.get(x)), about.get("mtime"))
      objects[name] = Object(int(about.get("size") or 0), str(tag))
    return objects

  def _listed(self, place):
    self._fs.invalidate_cache()
    try:
      return self._fs.find(place, detail=True)
    except FileNotFoundError:
      return {}

  def list_here(self) -> list[str]:
    """Returns the names of the objects that lie in no folder below."""

    def names():
      self._fs.invalidate_cache()
      try:
        return self._fs.ls(self._root, detail=False)
      except FileNotFoundError:
        return []

    return [
      path.rstrip("/").rpartition("/")[2]
      for path in self._tried("read", "", names)
    ]

  def read(self, name: str) -> bytes | None:
    """Returns the bytes of an object; None if there is none."""
    try:
      return self._tried("read", name, lambda: self._cat(name))
    except FileNotFoundError:
      return None

  def _cat(self, name):
    self._fs.invalidate_cache()
    return self._fs.cat_file(self._at(name))

  def write(self, name: str, content: bytes) -> None:
    """Writes an object, whole or not at all."""

    def write():
      if self._is_local:
        path = pathlib.Path(self._at(name))
        path.parent.mkdir(parents=True, exist_ok=True)
        paths.write_whole(path, content, shared=True)
      else:
        self._fs.pipe_file(self._at(name), content)

    self._tried("written", name, write)

  def create(self, name: str, content: bytes) -> bool:
    """Writes an object unless there is another; returns whether it is there.

    The store decides, where it can. Where fsspec cannot ask it to, the object
    is looked for first, which leaves a gap of a moment.
    """
    if self._is_local:
      pathlib.Path(self._at(name)).parent.mkdir(parents=True, exist_ok=True)
    try:
      self._tried(
        "written",
        name,
        lambda: self._fs.pipe_file(self._at(name), content, mode="create"),
      )
    except FileExistsError:
      pass  # It may be ours, by a try that was answered too late.
    except BucketError as error:
      if not isinstance(
        error.__cause__, (NotImplementedError, TypeError, ValueError)
      ):
        raise
      if self.read(name) is not None:
        return False
      self.write(name, content)
    return self.read(name) == content

  def upload(self, files: Mapping[str, str | os.PathLike[str]]) -> None:
    """Writes objects from files of this machine, several at a time.

    Args:
      files: name -> path.

    Raises:
      BucketError: if one is not there with all of its bytes afterwards.
    """
    self._each(self._upload, files.items())

  def _upload(self, name, path):
    path = pathlib.Path(path)

    def put():
      most = size = path.stat().st_size
      if size < 2**23:
        content = path.read_bytes()
        self.write(name, content)
        most = size = len(content)
      elif self._is_local:
        pathlib.Path(self._at(name)).parent.mkdir(parents=True, exist_ok=True)
        with paths.whole(self._at(name), shared=True) as partial:
          shutil.copyfile(path, partial)
        most = path.stat().st_size
      else:
        self._fs.put_file(str(path), self._at(name))
        most = path.stat().st_size  # Rows may have been added meanwhile.
      self._fs.invalidate_cache()
      found = self._fs.info(self._at(name))["size"]
      if not size <= found <= most:
        raise OSError(f"{found} bytes have arrived of {size}")

    self._tried("written", name, put)

  def download(self, files: Mapping[str, str | os.PathLike[str]]) -> None:
    """Writes files of this machine from objects, each whole or not at all.

    Args:
      files: name -> path, whose folder is made.
    """
    self._each(self._download, files.items())

  def _download(self, name, path):
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)

    def get():  # What fails may be either side: it is tried again.
      partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
      try:
        self._fs.get_file(self._at(name), str(partial))
        os.replace(partial, path)
      finally:
        partial.unlink(missing_ok=True)

    self._tried("read", name, get)

  def copy(self, source: str, target: str) -> None:
    """Copies an object within the bucket."""
    if self._is_local:
      self.write(target, self._cat(source))
      return
    self._tried(
      "written",
      target,
      lambda: self._fs.cp_file(self._at(source), self._at(target)),
    )

  def delete(self, names: Iterable[str]) -> None:
    """Deletes objects; those that are gone already do not matter."""

    def delete(name):
      with contextlib.suppress(FileNotFoundError):
        self._tried("deleted", name, lambda: self._fs.rm_file(self._at(name)))

    self._each(delete, ((name,) for name in names))

  def _at(self, name):
    return f"{self._root}/{name}" if name else self._root

  def _each(self, function, arguments):
    """Calls a function for each tuple of arguments, in threads."""
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
      for done in [pool.submit(function, *each) for each in arguments]:
        done.result()

  def _tried(self, verb: str, name: str, function: Callable[[], Any]) -> Any:
    """Calls a function of the store, again if it fails.

    Raises:
      FileNotFoundError: at once, where something is read; likewise
        FileExistsError where something is created.
      BucketError: if the last try failed, too.
    """
    url = f"{self.url}/{name}" if name else self.url
    for wait in (*_WAITS, None):
      try:
        return function()
      except FileExistsError:
        raise
      except Exception as error:  # Of the network: every store has its own.
        if isinstance(error, FileNotFoundError) and verb != "written":
          raise
        no_use = (*_FINAL, NotImplementedError, TypeError, ValueError)
        if wait is None or isinstance(error, (*no_use, paths.DiskError)):
          raise BucketError(url, error, verb) from error
        logging.warning(
          "%s is not %s yet (%s); trying again in %g s.",
          *(url, verb, described(error), wait),
        )
        time.sleep(wait)


def fetch(
  url: str,
  wanted: Callable[[Mapping[str, Object]], Iterable[str]] | None = None,
  *,
  name: str = "The URL",
) -> pathlib.Path:
  """Copies what a URL holds into the cache, as far as it is not there.

  An object is known by its size and its tag, so that one which was replaced is
  fetched again.

  Args:
    url: of an object, or of a folder of them.
    wanted: listing of a folder -> names to fetch; None: all of them.
    name: what it is, for messages, such as --data.

  Returns:
    The file, or the folder, on this machine.

  Raises:
    ValueError: if nothing is there or it cannot be read, naming the URL.
  """
  try:
    bucket = Bucket(url, name)
    objects = bucket.objects()
    if not objects:
      raise ValueError(f"{name}={url}: there is nothing at this URL.")
    place = cache_folder() / "read" / local_name(bucket.url)
    if list(objects) == [""]:
      places, names = {"": place}, [""]
    else:
      names = list(objects if wanted is None else wanted(objects))
      places = {x: place / paths.below(x) for x in names}
    index = place.parent / "index.json"
    known = _index(index)
    stale = {
      x: places[x]
      for x in names
      if known.get(x) != list(objects[x]) or not places[x].is_file()
    }
    if stale:
      size = sum(objects[x].size for x in stale) / 2**20
      logging.info("Fetching %d files, %.1f MiB, of %s", len(stale), size, url)
    bucket.download(stale)
  except BucketError as error:
    reason = described(error.__cause__ or error)
    raise ValueError(f"{name}={url} cannot be read: {reason}.") from error
  for gone in known.keys() - objects.keys():
    with contextlib.suppress(OSError, ValueError):
      (place / paths.below(gone)).unlink()
  known = {x: y for x, y in known.items() if x in objects}
  known |= {x: list(objects[x]) for x in names}
  place.parent.mkdir(parents=True, exist_ok=True)
  paths.write_whole(index, json.dumps(known) + "\n", shared=True)
  return place


def here(
  path: str | os.PathLike[str],
  wanted: Callable[[Mapping[str, Object]], Iterable[str]] | None = None,
  *,
  name: str = "The URL",
) -> pathlib.Path:
  """Returns a path on this machine: `fetch` of a URL, or the path itself."""
  if is_url(path):
    return fetch(os.fspath(path), wanted, name=name)
  return pathlib.Path(path)


def _index(path: pathlib.Path) -> dict[str, Any]:
  try:
    return dict(json.loads(path.read_text(encoding="utf-8")))
  except (OSError, ValueError, TypeError):
    return {}


def upload_folder(
  folder: str | os.PathLike[str],
  url: str,
  is_stale: Callable[[str], bool],
  *,
  last: str,
) -> None:
  """Writes the files of a folder to a URL, whose old ones they replace.

  A bucket cannot change several objects at once. What nobody reads a folder
  without, such as config.json, is deleted first and written last, so that a
  reader finds the old files, nothing that loads, or the new ones.

  Args:
    folder: of this machine.
    url: where its files come to lie.
    is_stale: name of an object -> whether it goes if no new one has its name.
    last: that file.

  Raises:
    ValueError: if the URL cannot be reached at all.
    BucketError: if a file is not there afterwards.
  """
  folder, bucket = pathlib.Path(folder), Bucket(url, "The folder")
  files = {
    path.relative_to(folder).as_posix(): path
    for path in sorted(folder.rglob("*"))
    if path.is_file()
  }
  old = bucket.objects()
  bucket.delete({last} & old.keys())
  bucket.upload({name: path for name, path in files.items() if name != last})
  bucket.delete([x for x in old if x not in files and is_stale(x)])
  bucket.upload({name: path for name, path in files.items() if name == last})
