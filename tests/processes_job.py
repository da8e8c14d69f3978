"""What each of two processes does for tests/distributed/processes_test.py.

  python -m tests.processes_job WHAT FOLDER

Writes what it found to FOLDER/found-<process>.json.
"""

import json
import os
import pathlib
import signal
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app
from jax.sharding import NamedSharding, PartitionSpec

from rljax.distributed import meshes, processes
from rljax.scoring import scorers
from rljax.storage import checkpoint, signals
from rljax.training import origins


def state_on(mesh):
  """A state whose arrays lie on a mesh in three ways, and a number."""
  rng = np.random.default_rng(0)
  arrays = {
    "fsdp": rng.normal(size=(8, 4)).astype(np.float32),
    "tensor": rng.normal(size=(4, 8)).astype(np.float32),
    "whole": np.arange(3, dtype=np.int32),
  }
  specs = {
    "fsdp": PartitionSpec("fsdp"),
    "tensor": PartitionSpec(None, "tensor"),
    "whole": PartitionSpec(),
  }
  placed = {
    name: meshes.place(array, NamedSharding(mesh, specs[name]))
    for name, array in arrays.items()
  }
  return {"params": placed, "number": 3}


def error_of(function):
  try:
    function()
  except Exception as error:
    return f"{type(error).__name__}: {error}"
  return None


def talk(folder):
  """Everything that processes tell each other."""
  number = jax.process_index()
  found = {
    "is_first": processes.is_first(),
    # Of different lengths, and longer than the least.
    "exchange": processes.exchange(
      {"text": "é" * (1 + 5000 * number), "score": np.float32(number / 3)}
    ),
    "from_first": processes.from_first(lambda: [number, None]),
    "from_first_fails": error_of(lambda: processes.from_first(lambda: 1 / 0)),
    "share": processes.share(5, lambda own: list("abcde")[own]),
    "share_of_one": processes.share(1, lambda own: list("a")[own]),
    "share_fails": error_of(
      lambda: processes.share(2, lambda own: 1 / (1 - number))
    ),
    "same": error_of(lambda: processes.check_same("Flags", {"seed": 1})),
    "differ": error_of(
      lambda: processes.check_same("Flags", {"seed": 1, "steps": number})
    ),
  }

  # Each sees the one, and process 1 has another at the path of the other.
  folders = [folder, folder / f"own-{number}"]
  folders[1].mkdir()
  found["shared"] = [error_of(lambda: processes.check_shared(folders[0]))]
  found["shared"] += [error_of(lambda: processes.check_shared(folders[1], 0.3))]
  processes.exchange(None)  # Process 0 deletes its file behind the check.
  found["left"] = [x.name for x in folder.glob("**/.seen*")]

  # Arrays that no process holds in full.
  mesh = meshes.make("data:2")
  rows = meshes.shard_batch(np.arange(8, dtype=np.int32), mesh)
  gathered = processes.gather(
    {"rows": jax.jit(lambda x: 2 * x)(rows), "here": np.arange(2)}
  )
  found["gather"] = {name: x.tolist() for name, x in gathered.items()}
  found["addressable"] = rows.is_fully_addressable
  found["map_batches"] = meshes.map_batches(
    lambda x: x + 1, np.arange(3, dtype=np.int32), 2, mesh
  ).tolist()

  # Each scores its own responses, and all know the scores.
  asked = []

  def score(prompts, replies):
    asked.extend(prompts)
    return np.float32([len(x) / 3 for x in replies]), [
      {"reply": reply, "is_correct": np.bool_(reply == "bb")}
      for reply in replies
    ]

  scores, parts = scorers.divided(score)(
    ["p", "q", "r"], ["a", "bb", "\nc\u2028c"]
  )
  found["asked"] = asked
  found["scores"] = [str(scores.dtype), *scores.tolist()]
  found["parts"] = parts
  found["no_scores"] = error_of(lambda: scorers.divided(score)([], []))

  # What the flags name is the same everywhere, and filed once.
  models = {"policy": {"a": np.float32([1, 2])}}
  origins.check_models(folder, models)
  origins.check_models(folder, models)
  models["policy"]["a"][0] += number
  found["models"] = error_of(lambda: origins.check_models(folder, models))

  # A checkpoint of one process with other devices, and one for it.
  mesh = meshes.make("fsdp:2")
  zeros = jax.tree.map(lambda x: 0 * x, state_on(mesh))
  with checkpoint.Checkpoints(folder / "one") as checkpoints:
    step, state, meta = checkpoints.restore_latest(zeros)
  found["restored"] = [step, checkpoint.fingerprint(state), meta]
  with checkpoint.Checkpoints(folder / "two", keep=1) as checkpoints:
    for step in (7, 8):
      checkpoints.save(step, state, {"position": step})
  found["steps"] = checkpoints.all_steps()

  # A signal to one process stops all, after the same step.
  found["stopped"] = []
  for sent in (signal.SIGTERM, signal.SIGINT):
    with signals.Preemption() as preemption:
      for step in range(6):
        if (step, number) == (3, 1):
          os.kill(os.getpid(), sent)
        if preemption.should_stop():
          break
    found["stopped"].append([step, preemption.exit_status])
  return found


def wait(folder, how):
  """Process 1 ends in some way while process 0 waits for it."""
  mesh = meshes.make()
  mean = jax.jit(jnp.mean)
  # In a `with` block, as a script is when something goes wrong.
  with checkpoint.Checkpoints(folder) as checkpoints:
    for step in range(100_000):
      value = float(mean(meshes.shard_batch(np.full(2, float(step)), mesh)))
      if processes.is_first():
        (folder / "step").write_text(f"{step} {value}")
      if how == "raise" and step == 20:
        checkpoints.save(step, {"step": step}, {})
      if step == 20 and not processes.is_first():
        if how == "raise":
          raise ValueError("this process is out of luck")
        os.kill(os.getpid(), signal.Signals[how])
      time.sleep(0.001)


def main(arguments):
  what, folder, *more = arguments[1:]
  folder = pathlib.Path(folder)
  processes.join(*map(int, more))
  processes.join()  # Once more does nothing.
  found = talk(folder) if what == "talk" else wait(folder, what)
  path = folder / f"found-{jax.process_index()}.json"
  path.write_text(
    json.dumps(found, default=lambda x: x.item() if x.ndim == 0 else x.tolist())
  )


if __name__ == "__main__":
  app.run(main, argv=[sys.argv[0], "--", *sys.argv[1:]])
