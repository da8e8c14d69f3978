"""Calls functions of untrusted input in processes with limits.

Verifying the text of a language model may take forever, use up all memory or
crash the interpreter. A `Pool` calls a function in worker processes, and
returns for every call its value or why there is none:

  with sandbox.Pool("math:factorial", timeout=1.0) as pool:
    for outcome in pool.map([(3,), (10**9,)]):
      print(outcome.value, outcome.failure)  # 6 None, then None timeout

A worker serves many calls; it is killed and replaced when a call runs out of
time or memory, or ends the process. A call is not blamed for what earlier ones
left: if it runs out of memory, dies or has a bad reply in a worker that has
served others, it is made once more, in a new worker. Workers are new
interpreters, never forks: a fork of a process that runs jax may hang. They
import only the function's module, not the script that made the pool. POSIX
systems only.

Arguments and values travel as JSON: nothing that a worker sends is executed
here, whatever has become of it. A reply that is not JSON, that is cut or too
large, or that answers another call, is a failure of its call.

For each worker waits a shell that reads a pipe of this process. When this
process ends, however that happens, the pipe closes, and the shell kills the
worker with its children, also in the midst of an operation that no thread of
the worker's could interrupt.
"""

import collections
import contextlib
import dataclasses
import importlib
import json
import math
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from multiprocessing import connection
from typing import Any

_SIZE = struct.Struct(">Q")  # In front of every message.
_MAX_BYTES = 2**26  # Of a message.
_POLL_SECONDS = 0.25
_MAX_CHARACTERS = 200  # Of an error's message.
# The parent's search path, then this module, which may not be installed.
_PROGRAM = (
  "import json, sys; settings = json.loads(sys.argv[1]); "
  "sys.path[:] = settings.pop('path'); from rljax.tasks import sandbox; "
  "sandbox._serve(**settings)"
)
# Waits for the end of its input, which only the parent can write to, and kills
# the group of a worker.
_GUARD = 'read -r line; kill -s KILL -- "-$1"'


@dataclasses.dataclass(frozen=True)
class Outcome:
  """Holds the result of one call, or why there is none.

  Attributes:
    value: what the function returned; None if it failed.
    failure: None, or why there is no value: "timeout", "memory", "died" (the
      process ended: a crash, `os._exit`, the system's memory killer), or
      "error: " and an exception's type and message; `sys.exit` is an "error:
      SystemExit", and a reply that cannot be read an "error: BadReply". A call
      has run out of "memory" even if the function caught
      the MemoryError: its value would depend on the memory left.
  """

  value: Any = None
  failure: str | None = None


class Pool:
  """Calls one function in worker processes with limits.

  Workers start at the first `map`, live until `close` (or the end of the `with`
  block, of the pool or of the program) and end with their children within a
  second if this process is killed. A Ctrl-C only reaches this process, and
  stops the calls under way; workers ignore the SIGTERM that a scheduler sends
  to all processes of a job. Threads may share a pool; their calls of `map`
  wait for each other.
  """

  def __init__(
    self,
    function: str | Callable[..., Any],
    *,
    timeout: float,
    setup: str | Callable[..., Any] | None = None,
    setup_arguments: Sequence[str] = (),
    num_workers: int = 1,
    max_memory_bytes: int | None = 2**30,
    start_timeout: float = 120.0,
  ):
    """Stores what to call; starts nothing yet.

    Args:
      function: "module:function", or a function at the top level of a module
        other than the running script. Arguments and values are what JSON
        holds, and numpy's numbers and arrays, which arrive as Python's; a tuple
        arrives as a list.
      timeout: wall-clock seconds that a call may take; > 0.
      setup: called once in a new worker, outside the limits, to import or warm
        up what the first call needs.
      setup_arguments: texts that it is called with.
      num_workers: calls at the same time.
      max_memory_bytes: address space that a worker may take beyond what it
        has after `setup`, where the system knows such a limit; or None.
      start_timeout: seconds that a worker may take to start.

    Raises:
      ValueError: if a number is not positive, or a function cannot be imported
        by its name.
    """
    for name, value in (
      ("timeout", timeout),
      ("num_workers", num_workers),
      ("start_timeout", start_timeout),
      ("max_memory_bytes", 1 if max_memory_bytes is None else max_memory_bytes),
    ):
      if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}.")
    self._timeout, self._num_workers = timeout, num_workers
    self._start_timeout = start_timeout
    self._settings = {
      "function": _name(function),
      "setup": None if setup is None else _name(setup),
      "setup_arguments": list(setup_arguments),
      # Several threads may use several seconds of processor time per second.
      "max_seconds": timeout * (os.cpu_count() or 1) + 1,
      "max_memory_bytes": max_memory_bytes,
    }
    self._lock = threading.Lock()
    self._workers: list[_Worker] = []
    self._has_started = False  # Any worker, ever.
    # Runs at the end of the program too.
    self._finalizer = weakref.finalize(self, _stop, self._workers, os.getpid())

  def map(self, items: Sequence[tuple]) -> list[Outcome]:
    """Calls the function with each tuple of arguments.

    Args:
      items: N tuples.

    Returns:
      N outcomes, in the order of the items.

    Raises:
      RuntimeError: if no worker can start, with the last one's error. A pool
        whose workers have started before tries twice, and goes on with those
        that live.
      TypeError or ValueError: if an item is nothing that JSON holds, or is too
        large.
    """
    with self._lock:
      try:
        return self._map(list(items))
      except BaseException:
        # A worker in the middle of a call would give its answer to the next
        # one.
        _stop(self._workers, os.getpid())
        raise

  def close(self) -> None:
    """Ends the workers; a later `map` starts new ones."""
    with self._lock:
      _stop(self._workers, os.getpid())

  def __enter__(self) -> "Pool":
    return self

  def __exit__(self, *unused: Any) -> None:
    self.close()

  def _map(self, items: list[tuple]) -> list[Outcome]:
    outcomes: list[Outcome] = [Outcome()] * len(items)
    waiting = collections.deque(range(len(items)))
    num_done, lost, again = 0, set(), set()
    capacity, num_failed_starts = self._num_workers, 0
    while num_done < len(items):
      while len(self._workers) < min(capacity, len(items) - num_done):
        self._workers.append(_Worker(self._settings, self._start_timeout))
      for worker in list(self._workers):
        if worker.is_idle and (waiting or worker.reserved is not None):
          index = worker.reserved
          if index is None:
            index = waiting.popleft()
          worker.reserved = None
          if not worker.give(index, items[index], self._timeout):
            self._drop(worker)
            # It was gone before it got the item, which is not to blame; but
            # workers that never stay must not be started for ever.
            if index in lost:
              outcomes[index] = Outcome(failure="died")
              num_done += 1
            else:
              lost.add(index)
              waiting.appendleft(index)
      busy = [w for w in self._workers if not w.is_idle]
      if not busy:
        continue
      patience = min(w.deadline for w in busy) - time.monotonic()
      ready = connection.wait([w.channel for w in busy], max(0.0, patience))
      for worker in busy:
        index = worker.item
        is_overdue = time.monotonic() >= worker.deadline
        # Answers may have come while another one was read.
        if worker.channel in ready or (
          is_overdue and connection.wait([worker.channel], 0)
        ):
          outcome = worker.take()
        elif is_overdue:
          outcome = Outcome(failure="timeout")
        else:
          continue
        if index is None:  # It was starting.
          if outcome.failure is None:
            self._has_started = True
            continue
          if worker.reserved is not None:
            waiting.appendleft(worker.reserved)
          self._drop(worker)
          num_failed_starts += 1
          if num_failed_starts > 1:
            capacity = len(self._workers)
          if not self._has_started or not capacity:
            raise RuntimeError(
              f"A worker for {self._settings['function']} cannot start: "
              f"{outcome.failure}."
            )
          continue
        if worker.is_broken or outcome.failure in ("timeout", "memory", "died"):
          self._drop(worker)
          if (
            outcome.failure != "timeout"
            and worker.num_given > 1
            and index not in again
          ):
            again.add(index)
            self._workers.append(
              _Worker(self._settings, self._start_timeout, reserved=index)
            )
            continue
        outcomes[index] = outcome
        num_done += 1
    return outcomes

  def _drop(self, worker: "_Worker") -> None:
    self._workers.remove(worker)
    worker.kill()


# In the parent.


class _Worker:
  """Holds a process, and what it is doing: starting, one item, or nothing."""

  def __init__(
    self,
    settings: dict[str, Any],
    start_timeout: float,
    reserved: int | None = None,
  ):
    self.channel, theirs = socket.socketpair()
    settings = settings | {
      "path": sys.path,
      "parent": os.getpid(),
      "channel": theirs.fileno(),
    }
    try:
      # In its own session no Ctrl-C reaches it, and its children die with it.
      self._process = subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, json.dumps(settings)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        pass_fds=[theirs.fileno()],
        start_new_session=True,
      )
    finally:
      theirs.close()
    self._guard = None
    with contextlib.suppress(OSError):  # Without a shell, `_watch` is left.
      self._guard = subprocess.Popen(
        ["/bin/sh", "-c", _GUARD, "guard", str(self._process.pid)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
      )
    self.is_idle = False
    self.is_broken = False  # What it sends cannot be understood.
    self.item: int | None = None
    self.reserved = reserved  # The item to begin with.
    self.num_given = 0
    self.deadline = time.monotonic() + start_timeout

  def give(self, index: int, arguments: tuple, timeout: float) -> bool:
    """Starts a call; returns False if the worker is gone."""
    message = _encode([self.num_given + 1, *arguments])
    # An idle worker sends nothing: if something can be read, it has ended.
    if connection.wait([self.channel], 0):
      return False
    try:
      self.channel.settimeout(max(timeout, 1.0))
      self.channel.sendall(_SIZE.pack(len(message)) + message)
    except OSError:
      return False
    self.is_idle, self.item = False, index
    self.num_given += 1
    self.deadline = time.monotonic() + timeout
    return True

  def take(self) -> Outcome:
    """Reads the answer that is ready."""
    self.is_idle, self.item = True, None
    # A long answer may take a second more.
    deadline = max(self.deadline, time.monotonic() + 1.0)
    try:
      return _outcome(_receive(self.channel, deadline), self.num_given)
    except TimeoutError:
      return Outcome(failure="timeout")
    except (EOFError, OSError):
      return Outcome(failure="died")
    except Exception as error:  # Also one that is nested too deeply.
      self.is_broken = True
      return Outcome(failure=_describe(BadReply(error)))

  def kill(self) -> None:
    # Until `wait` the id of a dead process is not given to another one.
    if self._process.returncode is None:
      try:
        os.killpg(self._process.pid, signal.SIGKILL)
      except (ProcessLookupError, PermissionError):
        self._process.kill()
    if self._guard is not None:
      self._guard.kill()
      self._guard.wait()
      self._guard.stdin.close()
    self._process.wait()
    self.channel.close()


class BadReply(Exception):
  """A worker has sent something that is no answer to its call."""


def _outcome(message: bytes, number: int) -> Outcome:
  """Reads a reply to the call of this number."""
  found = json.loads(message.decode("ascii"))
  if not isinstance(found, list) or len(found) != 3 or found[0] != number:
    raise ValueError("it answers no call that was made")
  _, value, failure = found
  if failure is not None and not isinstance(failure, str):
    raise ValueError("its failure is no text")
  return Outcome(value, failure)


def _stop(workers: list[_Worker], owner: int) -> None:
  # A fork of the owner has the list, but not the workers.
  if os.getpid() == owner:
    while workers:
      workers.pop().kill()


def _name(function: str | Callable[..., Any]) -> str:
  if isinstance(function, str):
    module, _, name = function.partition(":")
  else:
    module = getattr(function, "__module__", None) or ""
    name = getattr(function, "__qualname__", "")
  is_path = all(part.isidentifier() for part in f"{module}.{name}".split("."))
  if not is_path or module == "__main__":
    raise ValueError(
      'A worker needs "module:function" or a function at the top level of a '
      f"module other than the running script, got {function!r}."
    )
  return f"{module}:{name}"


# In the worker.


def _serve(
  function: str,
  setup: str | None,
  setup_arguments: Sequence[str],
  max_seconds: float,
  max_memory_bytes: int | None,
  parent: int,
  channel: int,
) -> None:
  """Answers calls until the parent closes the connection."""
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  signal.signal(signal.SIGTERM, signal.SIG_IGN)
  threading.Thread(target=_watch, args=(parent,), daemon=True).start()
  pipe = socket.socket(fileno=channel)
  try:
    call = _find(function)
    if setup is not None:
      _find(setup)(*setup_arguments)
    peak_of_exhausted = _limit_memory(max_memory_bytes)
    errors = _MemoryErrors()
  except BaseException as error:
    _reply(pipe, 0, failure=_describe(error))
    os._exit(1)
  _reply(pipe, 0)
  number, own = 0, os.getpid()
  while True:
    number += 1
    try:
      message = _receive(pipe)
    except MemoryError:
      _reply(pipe, number, failure="memory")
      continue  # To be killed.
    except (EOFError, OSError):
      os._exit(0)  # Also if the function has left threads behind.
    _limit_time(max_seconds)
    reply = _answer(call, message, errors)
    if os.getpid() != own:  # A fork that returned: the answer is not its own.
      os._exit(0)
    # Also if the function caught the error, or C code continued without memory.
    if errors.num or _peak_bytes() > peak_of_exhausted:
      reply = [number, None, "memory"]
    _send(pipe, reply if isinstance(reply, bytes) else _encode(reply))


def _answer(
  call: Callable[..., Any], message: bytes, errors: "_MemoryErrors"
) -> list | bytes:
  number = None
  try:
    number, *arguments = json.loads(message)
    with errors:
      value = call(*arguments)
    return _encode([number, value, None])
  except MemoryError:
    return [number, None, "memory"]
  except BaseException as error:
    return [number, None, _describe(error)]


class _MemoryErrors:
  """Counts the MemoryErrors that are raised, also those that are caught."""

  def __init__(self):
    self.num = 0
    if sys.version_info >= (3, 12):
      tool, raised = 3, sys.monitoring.events.RAISE
      sys.monitoring.use_tool_id(tool, __name__)
      sys.monitoring.register_callback(tool, raised, self._raised)
      sys.monitoring.set_events(tool, raised)

  # Older interpreters have no other way, though calls take up to three times as
  # long.

  def __enter__(self) -> None:
    if sys.version_info < (3, 12):
      sys.settrace(self._traced)

  def __exit__(self, *unused: Any) -> None:
    if sys.version_info < (3, 12):
      sys.settrace(None)

  def _raised(self, code: Any, offset: int, error: BaseException) -> None:
    self.num += isinstance(error, MemoryError)

  def _traced(self, frame: Any, event: str, argument: Any) -> Callable:
    if event == "call":
      frame.f_trace_lines = False
    elif event == "exception":
      self.num += issubclass(argument[0], MemoryError)
    return self._traced


def _describe(error: BaseException) -> str:
  try:
    message = str(error)
  except BaseException:  # Its message may fail to print.
    message = ""
  text = " ".join(message[:_MAX_CHARACTERS].split())
  return f"error: {type(error).__name__}: {text}".removesuffix(": ")


def _encode(value: Any) -> bytes:
  """Writes a message as ASCII; raises for what JSON does not hold."""
  message = json.dumps(value, default=_plain).encode("ascii")
  if len(message) > _MAX_BYTES:
    raise ValueError(
      f"a message has {len(message)} bytes, and at most {_MAX_BYTES} may pass"
    )
  return message


def _plain(value: Any) -> Any:
  """Turns numpy's numbers and arrays into Python's."""
  if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
    return value.tolist()
  raise TypeError(f"{type(value).__name__} is nothing that JSON holds")


def _reply(
  pipe: socket.socket, number: int, failure: str | None = None
) -> None:
  """Answers a call, or says that the worker is there, without a value."""
  _send(pipe, _encode([number, None, failure]))


def _send(pipe: socket.socket, message: bytes) -> None:
  try:
    pipe.sendall(_SIZE.pack(len(message)))
    pipe.sendall(message)
  except OSError:
    os._exit(0)


def _receive(pipe: socket.socket, deadline: float | None = None) -> bytes:
  (size,) = _SIZE.unpack(_read(pipe, _SIZE.size, deadline))
  if size > _MAX_BYTES:
    raise ValueError(f"it says that it has {size} bytes")
  return bytes(_read(pipe, size, deadline))


def _read(pipe: socket.socket, size: int, deadline: float | None) -> bytearray:
  data = bytearray()
  while len(data) < size:
    if deadline is not None:
      # Of all pieces together.
      patience = deadline - time.monotonic()
      if patience <= 0:
        raise TimeoutError
      pipe.settimeout(patience)
    piece = pipe.recv(min(size - len(data), 2**20))
    if not piece:
      raise EOFError
    data += piece
  return data


def _find(name: str) -> Callable[..., Any]:
  module, _, path = name.partition(":")
  found = importlib.import_module(module)
  for part in path.split("."):
    found = getattr(found, part)
  return found


def _watch(parent: int) -> None:
  """Ends this process and its children when the parent is gone."""
  while os.getppid() == parent:
    time.sleep(_POLL_SECONDS)
  os.killpg(0, signal.SIGKILL)


def _limit_memory(max_memory_bytes: int | None) -> float:
  """Sets the limit; returns the peak that means memory has run out."""
  _set_limit("RLIMIT_CORE", 0)
  if max_memory_bytes is None:
    return math.inf
  try:
    with open("/proc/self/statm") as file:
      used = int(file.read().split()[0]) * resource.getpagesize()
  except OSError:  # Not on Linux.
    used = 0
  _set_limit("RLIMIT_AS", used + max_memory_bytes)
  # `setup` may have had its own peak.
  return max(used + max_memory_bytes - max_memory_bytes // 16, _peak_bytes())


def _peak_bytes() -> float:
  """Returns the most address space of this process so far; 0 if unknown."""
  try:
    with open("/proc/self/status") as file:
      for line in file:
        if line.startswith("VmPeak:"):
          return int(line.split()[1]) * 1024
  except OSError:
    pass
  except MemoryError:
    return math.inf
  return 0


def _limit_time(max_seconds: float) -> None:
  # One long operation of the interpreter, such as a power of large integers,
  # keeps `_watch` from running. Then the system's limit ends the process.
  _set_limit("RLIMIT_CPU", math.ceil(time.process_time() + max_seconds))


def _set_limit(name: str, value: int) -> None:
  kind = getattr(resource, name, None)
  if kind is None:
    return
  _, most = resource.getrlimit(kind)
  if most != resource.RLIM_INFINITY:
    value = min(value, most)
  # Some systems have the name but not the limit.
  with contextlib.suppress(ValueError, OSError):
    resource.setrlimit(kind, (value, most))
