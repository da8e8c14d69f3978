"""A whole GRPO step beside TRL's GRPOTrainer: rollout, rewards and update.

  python -m benchmarks.step --models=../shared/data/models/stories260k \
    --prompts=16 --new_tokens=64
  python -m benchmarks.step --models=smollm2-135m --prompts=2 --new_tokens=64

All sides begin with the same weights and prompts, draw as many responses of
`--new_tokens` tokens (temperature 1, no end before), score them by one function
and take one AdamW step without a KL penalty, in float32; TRL once more by its
default, bfloat16 autocast. rljax is experiments/grpo.py itself, logging
included, and once more with the pass over the policy before the update that it
leaves out where a rollout has one update.

  python -m benchmarks.step --models=../shared/data/models/stories260k \
    --prompts=8 --nopeer --variant=--cpu_devices=2

Further sides are the script with other flags: one for each --variant, all with
those of --common.

Every side is a process of its own, and they take turns, so that a busy machine
hits all of them. Ratios are those of a side's time over that of rljax, medians
over pairs. Threads of torch wait without turning (OMP_WAIT_POLICY). The second
table counts FLOPs and bytes: see `least_seconds`.
"""

import contextlib
import json
import os
import pathlib
import random
import statistics
import subprocess
import sys
import tempfile

import jax
from absl import app, flags

from benchmarks import generation, machine
from rljax.models import hf

flags.DEFINE_integer("prompts", 16, "Prompts of a step.")
flags.DEFINE_integer("samples", 8, "Responses to a prompt.")
flags.DEFINE_string("common", "", "Flags of the script on all its sides.")
flags.DEFINE_multi_string("variant", [], "Flags of a further side.")
FLAGS = flags.FLAGS

ROOT = pathlib.Path(__file__).parent.parent
# Of times; the last is the CPU time of the process, which others move less.
PHASES = ("step", "rollout", "update", "CPU")


def main(_):
  titles = {"sides": "A GRPO step", "bounds": "What it takes at least"}
  name = "step_variants" if FLAGS.variant else "step"
  machine.report(name, titles, measure_all)


def measure_all():
  peak, bandwidth = machine.matmul_peak(), machine.memory_bandwidth()
  print(f"{peak / 1e9:.0f} GFLOP/s float32 matmul, {bandwidth / 1e9:.1f} GB/s")
  found = {"sides": [], "bounds": []}
  for name in FLAGS.models:
    loaded = hf.load(name)
    with tempfile.TemporaryDirectory() as folder:
      times = measure(loaded, pathlib.Path(folder))
    for table, rows in tables(name, loaded, times, peak, bandwidth).items():
      found[table] += rows
      for row in rows:
        print(json.dumps(row), flush=True)
  return found


def measure(loaded, folder):
  """Side -> its timed steps, in turns."""
  hf.save(folder / "model", loaded.model, loaded.params, loaded.tokenizer)
  texts = stories(loaded.tokenizer, 64)
  lines = (json.dumps({"prompt": text}) + "\n" for text in texts)
  (folder / "prompts.jsonl").write_text("".join(lines))
  times = {}
  with contextlib.ExitStack() as stack:
    sides = {
      name: stack.enter_context(side(kind, **options))
      for name, kind, options in all_sides(folder, texts)
    }
    for number in range(-2, FLAGS.repeats):  # Two compile and warm up.
      for name, take in sides.items():
        found = take()
        print(f"{name} {number}: {found}", flush=True)
        if number >= 0:
          times.setdefault(name, []).append(found)
  return times


def all_sides(folder, texts):
  """Names, kinds and options of the sides."""
  sides = {"rljax": "", "rljax with the pass": ""}
  sides |= dict(zip(FLAGS.variant, FLAGS.variant, strict=True))
  for number, (name, more) in enumerate(sides.items()):
    given = {
      "policy": folder / "model",
      "workdir": folder / f"run_{number}",
      "data": folder / "prompts.jsonl",
      "rewards": "benchmarks.sides:vowels",
      "num_eval_prompts": FLAGS.prompts,
      "kl": "none",
      "batch_size": FLAGS.prompts,
      "num_samples": FLAGS.samples,
      "max_prompt_length": FLAGS.prompt_tokens,
      "max_length": FLAGS.new_tokens,
      "stop_at_eos": "false",
      "learning_rate": 1e-6,
      "schedule": "constant",
      "warmup": 0,
      "weight_decay": 0,
      "preflight": "off",
      "num_page_samples": 0,
      "steps": 10_000,
      **dict.fromkeys(("eval_every", "save_every", "samples_every"), 10_000),
    }
    arguments = [f"--{flag}={value}" for flag, value in given.items()]
    arguments += [*FLAGS.common.split(), *more.split()]
    options = {"arguments": arguments, "with_pass": name.endswith("the pass")}
    yield name, "rljax", options
  if not FLAGS.peer:
    return
  for name, bf16 in (("TRL float32", False), ("TRL bfloat16", True)):
    yield (
      name,
      "trl",
      {
        "model": os.fspath(folder / "model"),
        "prompts": texts,
        "threads": FLAGS.torch_threads,
        "rows": FLAGS.prompts * FLAGS.samples,
        "num_generations": FLAGS.samples,
        "max_completion_length": FLAGS.new_tokens,
        "generation_kwargs": {"min_new_tokens": FLAGS.new_tokens},
        "output_dir": os.fspath(folder / "trl"),
        "bf16": bf16,
      },
    )


@contextlib.contextmanager
def side(kind, **options):
  """A function that lets a side take a step, and returns its times."""
  wait, go = os.pipe()
  done, tell = os.pipe()
  variables = {
    **os.environ,
    "OMP_WAIT_POLICY": "passive",
    "JAX_PLATFORMS": "cpu",
    "PYTHONPATH": os.pathsep.join([str(ROOT), os.getenv("PYTHONPATH", "")]),
  }
  command = [sys.executable, "-m", "benchmarks.sides", str(wait), str(tell)]
  process = subprocess.Popen(
    [*command, kind, json.dumps(options)],
    cwd=ROOT,
    env=variables,
    pass_fds=(wait, tell),
    stdout=subprocess.DEVNULL,
  )
  os.close(wait), os.close(tell)
  with os.fdopen(go, "w") as go, os.fdopen(done) as done:

    def answer():
      line = done.readline()
      if not line:
        raise RuntimeError(f"{command} {kind} ended: see above.")
      return json.loads(line)

    def take():
      print(file=go, flush=True)
      return answer()

    try:
      answer()
      yield take
    finally:
      process.kill()
      process.wait()


def stories(tokenizer, num):
  """Beginnings of stories, each of --prompt_tokens tokens."""
  draw, found = random.Random(0), set()
  names = ["Lily", "Tom", "Anna", "Ben", "Mia", "Sam", "Sue", "Max"]
  things = ["ball", "dog", "cat", "tree", "box", "bird", "car", "cake"]
  while len(found) < num:
    text = "Once upon a time"
    while len(tokenizer(text)["input_ids"]) < 2 * FLAGS.prompt_tokens:
      who, what = draw.choice(names), draw.choice(things)
      text += f", {who} saw a {what}"
    for end in range(len(text)):
      if len(tokenizer(text[:end])["input_ids"]) == FLAGS.prompt_tokens:
        found.add(text[:end])
        break
  return sorted(found)


def tables(name, loaded, times, peak, bandwidth):
  """Rows of the two tables."""
  common = {
    "model": name.rstrip("/").rpartition("/")[2],
    "responses": FLAGS.prompts * FLAGS.samples,
    "tokens": f"{FLAGS.prompt_tokens} + {FLAGS.new_tokens}",
  }
  of = lambda side, phase: [x[phase] for x in times[side]]
  sides = []
  for side in times:
    row = {**common, "side": side}
    for phase in PHASES:
      row[f"{phase} s"] = statistics.median(of(side, phase))
      row[f"{phase} ratio"] = machine.median_ratio(
        of(side, phase), of("rljax", phase)
      )
    sides.append(row | {"load": os.getloadavg()[0]})
  least = least_seconds(loaded.model, loaded.params, peak, bandwidth)
  bounds = [
    {**common, "phase": phase, "GFLOP": flops / 1e9, "least s": seconds}
    for phase, (flops, seconds) in least.items()
  ]
  return {"sides": sides, "bounds": bounds}


def least_seconds(model, params, peak, bandwidth):
  """FLOPs and seconds of the phases at the machine's measured peaks.

  A rollout reads each prompt once, whatever the number of its responses, and
  then takes a step for each token, bound by products or by bytes. An update is
  a forward pass and twice that backwards: all tokens through the layers, those
  of the responses through the output layer.
  """
  rows = FLAGS.prompts * FLAGS.samples
  body = generation.body_size(params)
  size = sum(x.size for x in jax.tree.leaves(params))
  flops, num_bytes = generation.step_cost(model, params, rows)
  prompt = 2 * body * FLAGS.prompts * FLAGS.prompt_tokens
  steps = FLAGS.new_tokens - 1
  rollout = prompt / peak + steps * max(flops / peak, num_bytes / bandwidth)
  update = 6 * rows * FLAGS.new_tokens * size
  update += 6 * rows * FLAGS.prompt_tokens * body
  return {
    "rollout": (prompt + steps * flops, rollout),
    "update": (update, update / peak),
  }


if __name__ == "__main__":
  app.run(main)
