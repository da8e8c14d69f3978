"""One supervised update of all weights, and of LoRA adapters beside them.

  python -m benchmarks.lora --json=benchmarks/results/lora.json

The same rows, loss and AdamW, in float32. Memory is the compiler's: what a
program holds while it runs, arguments included. The variants take turns. Of
LoRA, "merged" adds the adapters to the kernels within the loss, instead of
applying them beside; and a rollout is drawn with either.
"""

import json
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks import machine
from rljax.distributed import compiled
from rljax.generation import decode, rollouts
from rljax.losses import supervised
from rljax.models import hf, lora
from rljax.ops import sampling
from rljax.training import adapted, microbatch, optimizers

flags.DEFINE_list("models", ["smollm2-135m"], "Models, as hf.load takes them.")
flags.DEFINE_integer("repeats", 5, "Updates of every variant that are timed.")
flags.DEFINE_integer("rank", 8, "Rank of the adapters.")
flags.DEFINE_integer("rows", 4, "Texts of an update.")
flags.DEFINE_integer("tokens", 48, "Tokens of a prompt, and of a response.")
flags.DEFINE_integer("sampled_tokens", 24, "Tokens of a drawn response.")
FLAGS = flags.FLAGS

VARIANTS = {
  "all weights": None,
  "LoRA": "float32",
  "LoRA, merged": "float32",
  "LoRA, bfloat16 base": "bfloat16",
  "LoRA, int8 base": "int8",
}


def main(_):
  titles = {"updates": "One update with LoRA", "rollouts": "A rollout"}
  machine.report("lora", titles, measure_all)


def measure_all():
  rows, drawn = [], []
  for name in FLAGS.models:
    loaded = hf.load(name)
    batch = make_batch(loaded.model.config.vocab_size)
    runs = {
      label: make(loaded, label, dtype, batch)
      for label, dtype in VARIANTS.items()
    }
    times = {label: [] for label in runs}
    for _ in range(FLAGS.repeats + 1):
      for label, (step, _) in runs.items():
        times[label].append(step())
    for label, (_, numbers) in runs.items():
      seconds = statistics.median(times[label][1:])  # The first one warms up.
      row = {"model": name, "update": label, **numbers, "seconds": seconds}
      print(json.dumps(row), flush=True)
      rows.append(row)
    drawn += sample(loaded)
  return {"updates": rows, "rollouts": drawn}


def make_batch(vocab_size):
  rng = np.random.default_rng(0)
  shape = (FLAGS.rows, FLAGS.tokens)
  draw = lambda: jnp.asarray(rng.integers(0, vocab_size, shape), jnp.int32)
  mask = jnp.ones(shape, bool)
  texts = {f"{name}_ids": draw() for name in ("prompt", "response")}
  return texts | {"prompt_mask": mask, "response_mask": mask}


def start(loaded, base_dtype):
  """The module and its parameters, with adapters or without."""
  if base_dtype is None:
    return loaded.model, loaded.params
  settings = lora.Settings(rank=FLAGS.rank, alpha=FLAGS.rank)
  params = lora.adapt(
    loaded.model, loaded.params, settings, base_dtype=base_dtype
  )
  return lora.Model(loaded.model, settings), params


def make(loaded, label, base_dtype, batch):
  """A function that takes a step and returns its seconds, and its memory."""
  model, params = start(loaded, base_dtype)
  is_merged = label.endswith("merged")

  def loss_fn(params, batch):
    policy = params["policy"]
    if is_merged:
      policy = lora.merged(policy)
    statistics, _ = rollouts.token_statistics(
      model, policy, batch, temperature=1.0
    )
    return supervised.nll_loss(statistics.log_probs, batch["response_mask"])

  gradients = microbatch.grad(loss_fn, 1)
  transform = optimizers.make(None, learning_rate=1e-5)

  def update(state, batch):
    grads, metrics = gradients(state["params"], batch)
    params, optimizer, metrics = optimizers.step(
      transform, grads, state["optimizer"], state["params"], metrics, rate=1e-5
    )
    return {"params": params, "optimizer": optimizer}, metrics

  params = {"policy": jax.tree.map(jnp.asarray, params)}
  held = [{"params": params, "optimizer": transform.init(params)}]
  if base_dtype is None:
    program = compiled.Compiled("update", update, donate_argnums=0)
  else:
    program = adapted.Program("update", update, None, out_shardings=None)

  def step():
    started = time.perf_counter()
    held[0], metrics = program(held[0], batch)
    jax.block_until_ready(metrics)
    return time.perf_counter() - started

  memory = program.compile(held[0], batch).memory_analysis()
  own = sum(x.nbytes for x in jax.tree.leaves(held[0]))
  return step, {
    "state MB": own / 2**20,
    "temporary MB": memory.temp_size_in_bytes / 2**20,
    "held MB": (
      memory.argument_size_in_bytes
      + memory.output_size_in_bytes
      - memory.alias_size_in_bytes
      + memory.temp_size_in_bytes
    )
    / 2**20,
    "compile s": program.compilations[0]["seconds"],
  }


def sample(loaded):
  """Seconds of a rollout with merged adapters, and with adapters beside."""
  model, params = start(loaded, "float32")
  params = jax.tree.map(jnp.asarray, params)
  batch = make_batch(loaded.model.config.vocab_size)
  settings = sampling.Settings()
  draws = {}
  for label, module in (("merged", loaded.model), ("beside", _Beside(model))):

    def draw(params, batch, module=module, label=label):
      return decode.sample(
        jax.random.key(0),
        module,
        lora.merged(params) if label == "merged" else params,
        batch["prompt_ids"],
        batch["prompt_mask"],
        max_length=FLAGS.sampled_tokens,
        settings=settings,
      ).response_ids

    draws[label] = jax.jit(draw)
  times = {label: [] for label in draws}
  for _ in range(FLAGS.repeats + 1):
    for label, draw in draws.items():
      started = time.perf_counter()
      jax.block_until_ready(draw(params, batch))
      times[label].append(time.perf_counter() - started)
  rows = [
    {
      "model": loaded.source,
      "rollout": f"adapters {label}",
      "seconds": statistics.median(times[label][1:]),
    }
    for label in draws
  ]
  for row in rows:
    print(json.dumps(row), flush=True)
  return rows


class _Beside:
  """A model with adapters that the sampler does not merge."""

  def __init__(self, model):
    self.config, self.apply = model.config, model.apply


if __name__ == "__main__":
  app.run(main)
