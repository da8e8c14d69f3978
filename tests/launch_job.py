"""A job for tests of the launchers: counts to a number, and can be stopped.

Appends every step to `<workdir>/steps-<process>.txt`; after SIGTERM it leaves
at the end of a step, and goes on from the next one when it is started again.
With `--hold_at` it waits before that step until there is `<workdir>/go`.
"""

import argparse
import os
import pathlib
import signal
import sys
import time

parser = argparse.ArgumentParser()
parser.add_argument("--workdir", type=pathlib.Path, required=True)
parser.add_argument("--steps", type=int, default=1)
parser.add_argument("--seconds", type=float, default=0.05, help="Of a step.")
parser.add_argument("--fail", type=int, help="Which process fails.")
parser.add_argument("--fail_at", type=int, default=0, help="At which step.")
parser.add_argument("--hold_at", type=int, help="Before which step it waits.")
parser.add_argument("--stubborn", action="store_true", help="Ignores SIGTERM.")
args = parser.parse_args()

stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(not args.stubborn))
process = int(os.environ["RLJAX_PROCESS_ID"])
name = f"process {process} of {os.environ['RLJAX_NUM_PROCESSES']}"
args.workdir.mkdir(parents=True, exist_ok=True)
(args.workdir / "flags.json").touch()
(args.workdir / f"coordinator-{process}").write_text(
  os.environ["RLJAX_COORDINATOR"]
)
path = args.workdir / f"steps-{process}.txt"
first = len(path.read_text().splitlines()) if path.exists() else 0
print(f"{name} starts at step {first}", flush=True)
for step in range(first, args.steps):
  time.sleep(args.seconds)
  if step == args.hold_at:
    while not any(stopped) and not (args.workdir / "go").exists():
      time.sleep(0.02)
  if process == args.fail and step == args.fail_at:
    sys.exit(f"{name} fails at step {step}")
  with open(path, "a") as file:
    file.write(f"{step}\n")
  if any(stopped):
    print(f"{name} was stopped after step {step}", flush=True)
    sys.exit(0)
print(f"{name} has finished", flush=True)
if process == 0:
  (args.workdir / "summary.json").write_text("{}\n")
