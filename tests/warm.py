"""Starts Python scripts in processes that have imported the libraries already.

  process = warm.start(["experiments/sft.py", "--workdir=runs/x"], cwd=..., ...)

Half of the time of a tiny run is importing. Here a server imports what scripts
import, once, and forks for every script: each is a process of its own, with its
own arguments, environment, folder, files and signals, in which nothing has been
computed. `start` returns what behaves like a `subprocess.Popen`.
"""

import functools
import gc
import io
import json
import os
import pathlib
import runpy
import select
import signal
import subprocess
import sys
import threading
import time

# Variables with these beginnings are read while the libraries are imported.
AT_IMPORT = ("JAX_", "HF_", "TOKENIZERS_", "TRANSFORMERS_", "PYTHON")


class Process:
  """A script that the server has started."""

  def __init__(self, server, pid):
    self.pid, self.returncode = pid, None
    self._server = server

  def poll(self):
    if self.returncode is None:
      self.returncode = self._server.ended.get(self.pid)
    return self.returncode

  def wait(self, timeout=None):
    deadline = time.monotonic() + (timeout or 86_400)
    with self._server.news:
      while self.poll() is None:
        left = deadline - time.monotonic()
        if left <= 0:
          raise subprocess.TimeoutExpired(self.pid, timeout)
        self._server.news.wait(left)
    return self.returncode

  def send_signal(self, number):
    if self.poll() is None:
      os.kill(self.pid, number)

  def terminate(self):
    self.send_signal(signal.SIGTERM)

  def kill(self):
    self.send_signal(signal.SIGKILL)


class Server:
  """The process that forks; `ended` maps processes to their exit statuses."""

  def __init__(self):
    self.ended, self.news = {}, threading.Condition()
    self._started = None
    self._ask = threading.Lock()
    self._process = subprocess.Popen(
      [sys.executable, "-m", "tests.warm"],
      cwd=pathlib.Path(__file__).parents[1],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )
    threading.Thread(target=self._listen, daemon=True).start()

  def start(self, command, cwd, env, stdin, stdout, stderr):
    request = {
      "command": list(map(str, command)),
      "cwd": str(cwd),
      "env": env,
      "files": list(map(str, (stdin, stdout, stderr))),
    }
    with self._ask, self.news:
      self._started = None
      self._process.stdin.write(json.dumps(request) + "\n")
      self._process.stdin.flush()
      while self._started is None:
        if not self.news.wait(120):
          raise AssertionError("tests/warm.py does not start scripts any more.")
      return Process(self, self._started)

  def _listen(self):
    for line in self._process.stdout:
      news = json.loads(line)
      with self.news:
        if "started" in news:
          self._started = news["started"]
        else:
          self.ended[news["ended"]] = news["status"]
        self.news.notify_all()


@functools.cache
def _server():
  """The server of this process; it ends when its standard input does."""
  return Server()


def start(
  command, *, cwd, env, stdin=os.devnull, stdout=os.devnull, stderr=os.devnull
):
  """Starts a script; see `subprocess.Popen`.

  Args:
    command: path of the script, then its arguments.
    cwd: folder in which it runs.
    env: its environment.
    stdin: path of a file that it reads.
    stdout: path of a file that it writes, from the beginning.
    stderr: likewise.
  """
  imported = [
    name
    for name in {*env, *os.environ}
    if name.startswith(AT_IMPORT) and env.get(name) != os.environ.get(name)
  ]
  if set(imported) - {"PYTHONPATH"}:
    raise ValueError(f"{imported} act while libraries are imported.")
  return _server().start(command, cwd, env, stdin, stdout, stderr)


# In the server.


def _serve():
  """Forks for every line on standard input, and reports who has ended."""
  for name in _IMPORTS:
    __import__(name)
  gc.set_threshold(100_000, 50, 1_000)  # Tracing makes few circles.
  gc.freeze()  # Children look through none of this, and so share it.
  children = set()
  # A byte for every child that ends, so that waiting is for both.
  reader, writer = os.pipe()
  os.set_blocking(writer, False)
  signal.set_wakeup_fd(writer)
  signal.signal(signal.SIGCHLD, lambda *_: None)
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # The tests end this process.
  requests = io.FileIO(sys.stdin.fileno(), closefd=False)
  pending, is_open = b"", True
  while is_open:
    ready, _, _ = select.select([requests, reader], [], [])
    if reader in ready:
      os.read(reader, 4096)
    for pid in list(children):
      ended, status = os.waitpid(pid, os.WNOHANG)
      if ended:
        children.remove(pid)
        code = os.waitstatus_to_exitcode(status)
        _tell({"ended": pid, "status": code})
    if requests in ready:
      read = requests.read(1 << 20)
      is_open = bool(read)
      *lines, pending = (pending + (read or b"")).split(b"\n")
      for line in lines:
        pid = os.fork()
        if not pid:
          signal.set_wakeup_fd(-1)
          os.close(reader)
          os.close(writer)
          return json.loads(line)
        children.add(pid)
        _tell({"started": pid})
  for pid in children:
    os.kill(pid, signal.SIGKILL)
  return None


def _tell(news):
  sys.stdout.write(json.dumps(news) + "\n")
  sys.stdout.flush()


def _become(command, cwd, env, files):
  """Makes this process that of a script, and runs it."""
  signal.signal(signal.SIGCHLD, signal.SIG_DFL)
  signal.signal(signal.SIGINT, signal.default_int_handler)
  for number, path in enumerate(files):
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC if number else os.O_RDONLY
    opened = os.open(path, flags, 0o644)
    os.dup2(opened, number)
    os.close(opened)
  os.chdir(cwd)
  own, added = (
    list(filter(None, variables.get("PYTHONPATH", "").split(os.pathsep)))
    for variables in (os.environ, env)
  )
  sys.path[:] = [
    str(pathlib.Path(command[0]).resolve().parent),
    *added,
    *(path for path in sys.path[1:] if path not in own),
  ]
  os.environ.clear()
  os.environ.update(env)
  sys.argv = list(command)
  runpy.run_path(command[0], run_name="__main__")


_IMPORTS = (
  "rljax.cli",
  "rljax.training.runs",
  "optax",
  "flax.linen",
  "orbax.checkpoint",
  "safetensors.numpy",
  "tensorboardX",
  "tokenizers",
  "transformers.models.auto",
  "transformers.tokenization_utils_tokenizers",
)

if __name__ == "__main__":
  if (_request := _serve()) is not None:
    _become(**_request)
