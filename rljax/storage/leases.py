"""Leases: locks on folders of buckets, which no kernel gives back.

The holder writes the object `.lease-<n>` anew every few seconds. One that has
not changed for `SECONDS`, by the clock of whoever waits for it, has no holder.
Whoever takes it creates `.lease-<n+1>`, which the store lets only one do, and a
holder that finds a higher number than its own has lost the folder: it writes no
more.
"""

import json
import os
import pathlib
import re
import socket
import threading
import time
import uuid
from typing import Any

from absl import logging

from rljax.storage import buckets

SECONDS = 45.0
_NAME = re.compile(r"\.lease-(\d+)")


class Lease:
  """A lease on a folder of a bucket.

  Attributes:
    previous: who held it before, as `owner` of that one; None if nobody did.
    owner: a name of this lease, different for each.
  """

  def __init__(self, bucket: buckets.Bucket, *, seconds: float = SECONDS):
    """Waits until the lease is free, and takes it.

    Args:
      bucket: the folder.
      seconds: without a sign of life, after which a holder counts as dead.

    Raises:
      ValueError: if another process holds it, naming host and process.
    """
    self.owner = uuid.uuid4().hex
    self.previous: str | None = None
    self._bucket, self._seconds = bucket, seconds
    self._beat, self._problem = 0, ""
    self._number = self._take()
    self._ended = threading.Event()
    self._thread = threading.Thread(target=self._renew, daemon=True)
    self._thread.start()

  def check(self) -> None:
    """Raises BucketError if somebody else holds the folder by now."""
    if not self._problem and max(self._numbers(), default=0) > self._number:
      self._problem = "another process has taken it, as this one seemed dead"
    if self._problem:
      raise buckets.BucketError(self._bucket.url, self._problem, "written")

  def close(self) -> None:
    """Gives the lease back, if it is still ours; a second call does nothing."""
    if self._ended.is_set():
      return
    self._ended.set()
    self._thread.join()
    if not self._problem:
      self._write(released=True)

  def _take(self):
    """Creates the next number once the last one is free; returns it."""
    seen, deadline = None, 0.0
    while True:
      number = max(self._numbers(), default=0)
      found = self._read(number) if number else {"released": True}
      if found != seen:
        if seen is not None and seen.get("owner") == found.get("owner"):
          if not found.get("released"):
            raise ValueError(
              f"{self._bucket.url} is being written by process "
              f"{found.get('pid', 'unknown')} on "
              f"{found.get('host', 'some host')}; wait for its end, or choose "
              "another folder."
            )
        elif not _is_free(found):
          logging.warning(
            "%s was left by process %s on %s, or is in use: waiting %g s for a "
            "sign of life.",
            self._bucket.url,
            *(found.get("pid"), found.get("host"), self._seconds),
          )
        seen, deadline = found, time.monotonic() + self._seconds
      if _is_free(found) or time.monotonic() >= deadline:
        self.previous = found.get("owner")
        if self._bucket.create(_name(number + 1), self._content()):
          self._bucket.delete(map(_name, self._numbers(below=number + 1)))
          return number + 1
      else:
        time.sleep(min(1.0, self._seconds / 10))

  def _numbers(self, below: int | None = None):
    """Lists the leases that are there, or those before a number."""
    found = _numbers(self._bucket)
    return [x for x in found if below is None or x < below]

  def _read(self, number):
    return _read(self._bucket, number)

  def _content(self, released=False):
    content = {
      "owner": self.owner,
      "host": socket.gethostname(),
      "machine": _machine(),
      "pid": os.getpid(),
      "beat": self._beat,
      "released": released,
    }
    return json.dumps(content).encode()

  def _write(self, released=False):
    self._bucket.write(_name(self._number), self._content(released))

  def _renew(self):
    """Gives signs of life, in a thread."""
    while not self._ended.wait(self._seconds / 4):
      self._beat += 1
      try:
        self.check()
        self._write()
      except (OSError, ValueError) as error:  # The next save says so, too.
        logging.warning("The lease is not renewed: %s", error)


def owner(bucket: buckets.Bucket) -> str | None:
  """Returns the owner of the last lease on a folder; None if there is none."""
  number = max(_numbers(bucket), default=0)
  return _read(bucket, number).get("owner") if number else None


def _numbers(bucket):
  names = map(_NAME.fullmatch, bucket.list_here())
  return [int(match[1]) for match in names if match]


def _read(bucket, number) -> dict[str, Any]:
  try:
    return dict(json.loads(bucket.read(_name(number)) or b"{}"))
  except (ValueError, TypeError):
    return {}


def _name(number: int) -> str:
  return f".lease-{number}"


def _machine() -> str:
  """Returns a name for where process ids mean the same; empty if unknown.

  Names of hosts are not enough: they come again in other containers.
  """
  try:
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return (
      f"{socket.gethostname()} {boot} {os.stat('/proc/self/ns/pid').st_ino}"
    )
  except OSError:
    return ""


def _is_free(found: dict[str, Any]) -> bool:
  """Tells whether a lease was given back, or its process is gone from here."""
  if found.get("released"):
    return True
  if not (machine := _machine()) or found.get("machine") != machine:
    return False
  pid = found.get("pid")
  if not isinstance(pid, int) or pid <= 0:
    return False
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return True
  except OSError:
    return False
  return False
