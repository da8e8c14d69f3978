"""Tests of worker processes, with functions that misbehave in every way."""

import ctypes
import gc
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from unittest import mock

from absl.testing import absltest, parameterized

from rljax.tasks import sandbox

ROOT = pathlib.Path(__file__).resolve().parents[2]
ME = "tests.tasks.sandbox_test"


# What the workers are asked to call.


def double(x, seconds=0.0):
  time.sleep(seconds)
  return 2 * x


def process(unused=None):
  return os.getpid()


def hang():
  while True:
    pass


def hang_alone():
  """One operation that nobody in the process can interrupt."""
  return 3 ** (10**9)


def eat(megabytes):
  return len(bytearray(megabytes * 2**20))


def eat_and_hide(megabytes):
  try:
    return eat(megabytes)
  except Exception:
    return 0


kept = []


def keep(megabytes):
  kept.append(bytearray(megabytes * 2**20))


def die_if_not_new():
  kept.append(0)
  if len(kept) > 1:
    os._exit(1)
  return os.getpid()


def trickle():
  """Answers a byte at a time, for longer than anybody waits."""
  pipe = _pipe()
  pipe.sendall((100).to_bytes(8, "big"))
  while True:
    pipe.sendall(b"x")
    time.sleep(0.3)


def start_if_allowed():
  """Fails while there is a file of this name."""
  if os.path.exists(os.environ["RLJAX_NO_START"]):
    with open(os.environ["RLJAX_NO_START"], "a") as file:
      file.write("x")
    raise OSError("not now")


def leave_once(path):
  if not os.path.exists(path):
    pathlib.Path(path).touch()
    os._exit(1)
  return "left"


def leave(code):
  os._exit(code)


def overrun():
  ctypes.string_at(0)


def fail(message):
  raise KeyError(message)


class _Unprintable(Exception):
  def __str__(self):
    raise RuntimeError


def fail_in_silence():
  raise _Unprintable


def stop():
  sys.exit(3)


def _pipe():
  """The socket of this worker."""
  (pipe,) = [
    found
    for found in gc.get_objects()
    if type(found) is socket.socket and found.fileno() >= 0
  ]
  return pipe


def say(text, size=None):
  """Sends something else than an answer, of any announced size."""
  data = text.encode()
  _pipe().sendall((size or len(data)).to_bytes(8, "big") + data)
  if size:
    os._exit(0)
  hang()


def say_twice():
  """Answers twice: the second time to a call that is not made yet."""
  for _ in range(2):
    data = b'[1, "forged", null]'
    _pipe().sendall(len(data).to_bytes(8, "big") + data)
  return "honest"


def values():
  import numpy as np

  return {
    "tuple": (1, None, True),
    "text": "é\ud800\u2028",
    "numbers": [np.float32(0.5), np.int64(2**62), np.bool_(True)],
    "array": np.arange(4).reshape(2, 2),
    "large": 2**80,
    "infinite": float("-inf"),
  }


class Boom:
  """Unpickled, it would run a command."""

  def __reduce__(self):
    return os.system, ("touch " + os.environ["RLJAX_NO_START"],)


def send_object():
  return Boom()


def misbehave(how, *arguments):
  return globals()[how](*arguments)


def unpicklable():
  return lambda: 0


def broken_setup():
  raise OSError("no such library")


def slow_setup():
  time.sleep(0.7)


def with_child():
  """Starts a process of its own, says so, and hangs."""
  child = subprocess.Popen(
    [sys.executable, "-c", "import time; time.sleep(60)"]
  )
  print(child.pid, file=sys.stderr, flush=True)
  hang()


def hang_alone_with_child():
  """Starts a process of its own, and cannot be interrupted."""
  child = subprocess.Popen(["sleep", "60"])
  pathlib.Path(os.environ["RLJAX_CHILD"]).write_text(str(child.pid))
  hang_alone()


def is_alive(pid):
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  if not pathlib.Path("/proc/self/stat").exists():
    return True
  try:
    state = pathlib.Path(f"/proc/{pid}/stat").read_text()
  except (FileNotFoundError, ProcessLookupError):
    return False
  # A zombie whose parent was killed waits for the system to collect it.
  return state.rpartition(") ")[2][0] != "Z"


def wait_for_death(pids, seconds=10):
  end = time.monotonic() + seconds
  while any(map(is_alive, pids)) and time.monotonic() < end:
    time.sleep(0.05)
  return [pid for pid in pids if is_alive(pid)]


class PoolTest(parameterized.TestCase):
  def _pool(self, function, **options):
    options = {"timeout": 10.0, **options}
    pool = sandbox.Pool(f"{ME}:{function}", **options)
    self.addCleanup(pool.close)
    return pool

  def test_values_in_order(self):
    pool = self._pool("double", num_workers=2)
    # The first takes longest.
    items = [(0, 0.3), *((i,) for i in range(1, 30))]
    outcomes = pool.map(items)
    self.assertEqual([o.value for o in outcomes], [2 * i for i in range(30)])
    self.assertEqual({o.failure for o in outcomes}, {None})
    self.assertEqual(pool.map([]), [])

  def test_function_object(self):
    with sandbox.Pool(os.path.join, timeout=10) as pool:
      self.assertEqual(pool.map([("a", "b")]), [sandbox.Outcome("a/b")])

  def test_reuse(self):
    pool = self._pool("process", num_workers=2)
    first = {o.value for o in pool.map([()] * 20)}
    second = {o.value for o in pool.map([()] * 20)}
    self.assertLessEqual(len(first | second), 2)
    self.assertNotIn(os.getpid(), first)
    pool.close()
    self.assertEmpty(wait_for_death(first | second))
    # A closed pool starts anew.
    third = {o.value for o in pool.map([()])}
    self.assertEmpty(third & (first | second))

  def test_starts_late_and_no_more_than_needed(self):
    pool = self._pool("process", num_workers=4)
    self.assertEmpty(pool._workers)
    pool.map([()])
    self.assertLen(pool._workers, 1)

  def test_failures(self):
    pool = self._pool(
      "misbehave", timeout=1.5, num_workers=2, max_memory_bytes=2**28
    )
    items = [
      ("double", 1),
      ("hang",),
      ("double", 2),
      ("eat", 1024),
      ("eat", 16),
      ("leave", 0),
      ("overrun",),
      ("fail", "a\nb" + "c" * 1000),
      ("fail_in_silence",),
      ("stop",),
      ("unpicklable",),
      ("hang_alone",),
      ("double", 3),
    ]
    start = time.monotonic()
    outcomes = pool.map(items)
    self.assertLess(time.monotonic() - start, 20)
    values = [o.value for o in outcomes]
    failures = [o.failure for o in outcomes]
    self.assertEqual(values[:5], [2, None, 4, None, 16 * 2**20])
    self.assertEqual(values[5:], [None] * 7 + [6])
    self.assertEqual(
      failures[:7], [None, "timeout", None, "memory", None, "died", "died"]
    )
    self.assertStartsWith(failures[7], "error: KeyError: 'a")
    self.assertNotIn("\n", failures[7])
    self.assertLess(len(failures[7]), 250)
    self.assertEqual(failures[8], "error: _Unprintable")
    self.assertEqual(failures[9], "error: SystemExit: 3")
    self.assertRegex(failures[10], "error: TypeError: .*nothing that JSON ho")
    self.assertEqual(failures[11:], ["timeout", None])

  def test_errors_keep_the_worker(self):
    pool = self._pool("misbehave")
    items = [("process",), ("fail", "x"), ("process",), ("leave", 1)]
    first, _, second, _, third = pool.map([*items, ("process",)])
    self.assertEqual(first, second)
    self.assertNotEqual(first, third)

  @parameterized.parameters(1024, 255)
  def test_caught_memory_errors_are_told(self, megabytes):
    pool = self._pool("misbehave", max_memory_bytes=2**28)
    items = [("process",), ("eat_and_hide", megabytes), ("process",)]
    first, second, third = pool.map([*items, ("eat_and_hide", 10)])[:3]
    self.assertEqual(second, sandbox.Outcome(failure="memory"))
    self.assertIsNone(third.failure)
    self.assertNotEqual(first, third)

  def test_memory_that_earlier_calls_kept(self):
    pool = self._pool("misbehave", max_memory_bytes=2**28)
    items = [("process",), ("keep", 200), ("eat", 100), ("process",)]
    first, second, third, fourth = pool.map(items)
    self.assertIsNone(second.failure)
    self.assertEqual(third, sandbox.Outcome(100 * 2**20))
    self.assertNotEqual(first, fourth)

  def test_second_chance_in_a_new_worker(self):
    pool = self._pool("misbehave", num_workers=2)
    # The idle worker, which has served others as well, must not take it.
    outcomes = pool.map([("die_if_not_new",)] * 6)
    self.assertEqual({o.failure for o in outcomes}, {None})
    self.assertLen({o.value for o in outcomes}, 6)

  def test_trickling_answers(self):
    pool = self._pool("misbehave", timeout=1.0)
    start = time.monotonic()
    first, second = pool.map([("trickle",), ("double", 1)])
    self.assertLess(time.monotonic() - start, 8)
    self.assertEqual(first.failure, "timeout")
    self.assertEqual(second.value, 2)

  def test_answers_that_come_while_another_is_read(self):
    pool = self._pool("double", timeout=1.0, num_workers=2)
    pool.map([(0, 0.2), (0, 0.2)])
    take = sandbox._Worker.take

    def late(worker):
      outcome = take(worker)
      if outcome.value == 2:
        time.sleep(1.5)  # The other's answer is there, its time is over.
      return outcome

    with mock.patch.object(sandbox._Worker, "take", late):
      outcomes = pool.map([(1,), (2, 0.5)])
    self.assertEqual([o.value for o in outcomes], [2, 4])

  def test_failed_starts_in_mid_run(self):
    folder = self.enter_context(tempfile.TemporaryDirectory())
    path = pathlib.Path(folder) / "no"
    self.enter_context(
      mock.patch.dict(os.environ, {"RLJAX_NO_START": str(path)})
    )
    pool = self._pool(
      "misbehave", num_workers=2, setup=f"{ME}:start_if_allowed"
    )
    pool.map([("double", 0, 0.3)] * 2)
    path.write_text("")
    # One worker goes, and cannot be replaced; the other one does the rest.
    leave = ("leave_once", str(path.parent / "left"))
    outcomes = pool.map([("double", 1, 3.0), leave, ("double", 2)])
    self.assertEqual([o.value for o in outcomes], [2, "left", 4])
    self.assertLen(path.read_text(), 2)
    pool.close()
    with self.assertRaisesRegex(RuntimeError, "cannot start.*not now"):
      pool.map([("double", 1)])
    path.unlink()
    self.assertEqual(pool.map([("double", 1)])[0].value, 2)

  def test_items_that_cannot_be_sent(self):
    pool = self._pool("double")
    with self.assertRaisesRegex(TypeError, "nothing that JSON holds"):
      pool.map([(lambda: 0,)])
    with (
      mock.patch.object(sandbox, "_MAX_BYTES", 50),
      self.assertRaisesRegex(ValueError, "at most 50 may pass"),
    ):
      pool.map([("x" * 50,)])
    self.assertEqual(pool.map([(1,)])[0].value, 2)

  def test_values_travel_as_data(self):
    folder = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))
    path = str(folder / "executed")
    self.enter_context(mock.patch.dict(os.environ, RLJAX_NO_START=path))
    pool = self._pool("misbehave")
    plain, loaded = pool.map([("values",), ("send_object",)])
    self.assertEqual(
      plain.value,
      {
        "tuple": [1, None, True],
        "text": "é\ud800\u2028",
        "numbers": [0.5, 2**62, True],
        "array": [[0, 1], [2, 3]],
        "large": 2**80,
        "infinite": float("-inf"),
      },
    )
    self.assertRegex(loaded.failure, "error: TypeError: Boom")
    self.assertEmpty(os.listdir(folder))

  @parameterized.parameters(
    ("say", "not JSON"),
    ("say", "[2, 7, null]"),  # Of another call.
    ("say", '[1, 7, {"a": 1}]'),
    ("say", "7"),
    ("say", "[" * 200_000),
    ("say", "9" * 10_000),
    ("say", "x", 2**60),
    ("say", '[1, "x', 1000),  # Cut.
    ("say_twice",),
  )
  def test_replies_that_are_none(self, *call):
    pool = self._pool("misbehave", timeout=5.0)
    start = time.monotonic()
    first, second = pool.map([call, ("double", 1)])
    self.assertLess(time.monotonic() - start, 5)
    if call[0] == "say_twice":  # Only the forger's own call is forged.
      self.assertEqual(first.value, "forged")
    else:
      self.assertIsNone(first.value)
      self.assertRegex(first.failure, "error: BadReply|died")
    self.assertEqual(second, sandbox.Outcome(2))

  def test_hanging_workers_are_killed(self):
    pool = self._pool("misbehave", timeout=1.0)
    first, second, third = pool.map([("process",), ("hang",), ("process",)])
    self.assertEqual(second.failure, "timeout")
    self.assertNotEqual(first, third)
    self.assertEmpty(wait_for_death([first.value], 5))
    self.assertTrue(is_alive(third.value))

  def test_terminate_is_not_heeded(self):
    pool = self._pool("misbehave")
    (first,) = pool.map([("process",)])
    os.kill(first.value, signal.SIGTERM)
    self.assertEqual(pool.map([("process",)]), [first])

  def test_worker_that_dies_between_calls(self):
    pool = self._pool("process")
    (first,) = pool.map([()])
    os.kill(first.value, signal.SIGKILL)
    time.sleep(0.2)
    (second,) = pool.map([()])
    self.assertIsNone(second.failure)
    self.assertNotEqual(first, second)

  def test_large_messages(self):
    pool = self._pool("double")
    (outcome,) = pool.map([("x" * 3_000_000,)])
    self.assertLen(outcome.value, 6_000_000)

  def test_setup_is_outside_the_limits(self):
    pool = self._pool("double", timeout=0.3, setup=f"{ME}:slow_setup")
    self.assertEqual(pool.map([(1,)]), [sandbox.Outcome(2)])

  def test_children_of_a_worker_end_with_it(self):
    program = (
      "from rljax.tasks import sandbox\n"
      f'with sandbox.Pool("{ME}:with_child", timeout=2.0) as pool:\n'
      "  print(pool.map([()])[0].failure)\n"
    )
    done = subprocess.run(
      [sys.executable, "-c", program],
      cwd=ROOT,
      capture_output=True,
      text=True,
      check=True,
      # The child would hold the pipes open.
      timeout=30,
    )
    self.assertEqual(done.stdout.strip(), "timeout")
    self.assertEmpty(wait_for_death([int(done.stderr.split()[0])]))

  def test_threads_take_turns(self):
    pool = self._pool("double")
    found = {}

    def ask(i):
      found[i] = [o.value for o in pool.map([(i,)] * 20)]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
    self.assertEqual(found, {i: [2 * i] * 20 for i in range(4)})

  @parameterized.parameters(
    ({"function": "rljax.nothing:f"}, "nothing:f cannot start.*nothing"),
    ({"function": "math:nothing"}, "cannot start: error: AttributeError"),
    (
      {"function": "math:sin", "setup": f"{ME}:broken_setup"},
      "cannot start: error: OSError: no such library",
    ),
    ({"function": "math:sin", "setup": f"{ME}:stop"}, "cannot start.*Exit: 3"),
  )
  def test_cannot_start(self, options, message):
    with sandbox.Pool(timeout=5.0, **options) as pool:
      with self.assertRaisesRegex(RuntimeError, message):
        pool.map([(1.0,)])
      self.assertEmpty(pool._workers)

  @parameterized.parameters(
    ({"timeout": 0.0}, "timeout must be positive and finite, got 0"),
    ({"timeout": float("inf")}, "timeout must be positive and finite"),
    ({"num_workers": 0}, "num_workers must be positive"),
    ({"max_memory_bytes": 0}, "max_memory_bytes must be positive"),
    ({"function": "math"}, "got 'math'"),
    ({"function": "__main__:f"}, "other than the running script"),
    ({"function": lambda: 0}, 'needs "module:function" or a function'),
  )
  def test_bad_settings(self, options, message):
    with self.assertRaisesRegex(ValueError, message):
      sandbox.Pool(**{"function": "math:sin", "timeout": 1.0, **options})


# What a script does that is about to be killed: its workers hang. With one
# processor to count, their own limit on processor time comes soon.
DRIVER = f"""
import os, sys
from rljax.tasks import sandbox
os.cpu_count = lambda: 1
pool = sandbox.Pool("{ME}:misbehave", timeout=float(sys.argv[2]),
  num_workers=int(sys.argv[3]))
found = {{o.value for o in pool.map([("process",)] * 40)}}
print(*found, flush=True)
try:
  pool.map([(sys.argv[1],)] * int(sys.argv[3]))
except KeyboardInterrupt:
  print("interrupted", flush=True)
  # A pool works on after a Ctrl-C.
  print(pool.map([("double", 4)])[0].value, flush=True)
"""


class EndTest(parameterized.TestCase):
  def _drive(self, how, timeout, number, num_workers=2):
    """Starts the driver, signals it, and returns it and its workers."""
    driver = subprocess.Popen(
      [sys.executable, "-c", DRIVER, how, str(timeout), str(num_workers)],
      cwd=ROOT,
      stdout=subprocess.PIPE,
      text=True,
      start_new_session=True,
    )
    self.addCleanup(driver.wait)
    self.addCleanup(driver.kill)
    pids = list(map(int, driver.stdout.readline().split()))
    self.assertNotEmpty(pids)
    time.sleep(0.5)  # Until they hang.
    os.killpg(driver.pid, number)
    return driver, pids

  def test_parent_killed(self):
    driver, pids = self._drive("hang", 60, signal.SIGKILL)
    driver.wait()
    self.assertEmpty(wait_for_death(pids))

  def test_parent_killed_while_a_worker_cannot_be_interrupted(self):
    driver, pids = self._drive("hang_alone", 600, signal.SIGKILL, 1)
    driver.wait()
    self.assertEmpty(wait_for_death(pids, 1))

  def test_children_end_when_the_parent_is_killed(self):
    folder = self.enter_context(tempfile.TemporaryDirectory())
    path, how = f"{folder}/child", "hang_alone_with_child"
    with mock.patch.dict(os.environ, RLJAX_CHILD=path):
      driver, pids = self._drive(how, 600, signal.SIGKILL, 1)
    driver.wait()
    child = int(pathlib.Path(path).read_text())
    self.assertEmpty(wait_for_death([*pids, child], 1))

  def test_interrupted(self):
    driver, pids = self._drive("hang", 60, signal.SIGINT)
    rest, _ = driver.communicate(timeout=30)
    self.assertEqual(rest.split(), ["interrupted", "8"])
    self.assertEqual(driver.returncode, 0)
    self.assertEmpty(wait_for_death(pids))


if __name__ == "__main__":
  absltest.main()
