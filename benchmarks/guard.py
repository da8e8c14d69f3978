"""What it costs to skip updates that are not finite, on the device.

  python -m benchmarks.guard --json=benchmarks/results/guard.json
  python -m benchmarks.guard --from_results

Updates of AdamW with `optimizers.guarded` beside the same optimizer alone, and
beside a guard that computes the new parameters once and keeps them until it
knows its verdict. Forward, backward and optimizer are timed in turn; ratios are
medians over pairs. Bytes read and written, and memory beside the parameters and
moments, are those that the compiler counts of the optimizer's step for two
layers of the model, in units of the parameters' bytes: on this host, and on
--targets, which need no device (see `rljax.plan`).
"""

import dataclasses
import json
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags

from benchmarks import machine
from rljax.losses import supervised
from rljax.models import llama
from rljax.ops import log_probs
from rljax.plan import hlo, targets
from rljax.training import optimizers

flags.DEFINE_integer("rows", 4, "Texts in the update.", 1)
flags.DEFINE_integer("tokens", 128, "Length of the texts.", 2)
flags.DEFINE_integer("repeats", 9, "Updates of each kind.", 1)
flags.DEFINE_list("targets", [], "Devices to compile the optimizer for.")
FLAGS = flags.FLAGS

SHAPES = {
  "tiny": {
    **{"vocab_size": 512, "hidden_size": 64, "num_layers": 4, "num_heads": 4},
    **{"num_kv_heads": 2, "intermediate_size": 172},
  },
  # The first layers alone: on a CPU all 30 take long to compile.
  "smollm2-135m, 6 layers": {
    **{"vocab_size": 49152, "hidden_size": 576, "num_layers": 6},
    **{"num_heads": 9, "num_kv_heads": 3, "intermediate_size": 1536},
  },
}
TRANSFORM = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-5))
GUARD = optimizers.guarded(TRANSFORM)


def main(_):
  if FLAGS.targets:
    targets.prepare(targets.parse(FLAGS.targets[0]))
  titles = {"times": "An update, seconds", "bytes": "Optimizer's step alone"}
  machine.report("guard", titles, measure_all)


def alone(grads, state, params, metrics):
  """The optimizer without a guard."""
  updates, inner = TRANSFORM.update(grads, state.inner, params)
  metrics = metrics | {"gradient_norm": optax.global_norm(grads)}
  params = optax.apply_updates(params, updates)
  return params, state._replace(inner=inner), metrics


def guarded(grads, state, params, metrics):
  """As the scripts have it."""
  return optimizers.step(GUARD, grads, state, params, metrics)


def kept(grads, state, params, metrics):
  """A guard that computes once, and keeps that until its verdict."""
  new, after, metrics = alone(grads, state, params, metrics)
  is_finite = optimizers.all_finite((metrics, new, after.inner))
  new, inner = jax.tree.map(
    lambda a, b: jnp.where(is_finite, a, b),
    (new, after.inner),
    (params, state.inner),
  )
  return new, state._replace(inner=inner), metrics


SIDES = {"alone": alone, "guarded": guarded, "kept": kept}


def measure_all():
  results = {"times": [], "bytes": []}
  for name in SHAPES:
    config = llama.LlamaConfig(
      **SHAPES[name], max_positions=FLAGS.tokens, tie_word_embeddings=True
    )
    model = llama.Llama(config)
    results["times"].append({"model": name} | times(model))
    for target in ["here", *FLAGS.targets]:
      where = {"model": name, "device": target}
      results["bytes"].append(where | traffic(model, target))
    print(json.dumps({k: rows[-1] for k, rows in results.items()}), flush=True)
  return results


def times(model):
  """Seconds of an update of each side, which take turns."""
  shape = (FLAGS.rows, FLAGS.tokens)
  ids = jax.random.randint(jax.random.key(0), shape, 3, model.config.vocab_size)
  mask = jnp.ones(shape, bool)
  params = jax.jit(model.init)(jax.random.key(0), ids[:1], mask[:1])["params"]

  def loss_fn(params):
    hidden = model.apply({"params": params}, ids, mask)
    logits = model.apply({"params": params}, hidden, method="logits")
    found = log_probs.token_log_probs(logits[:, :-1], ids[:, 1:])
    return supervised.nll_loss(found, mask[:, 1:])

  runs, states = {}, {}
  for name, side in SIDES.items():

    def update(params, state, side=side):
      grads, metrics = jax.grad(loss_fn, has_aux=True)(params)
      return side(grads, state, params, metrics)

    runs[name] = jax.jit(update, donate_argnums=(0, 1))
    states[name] = jax.tree.map(jnp.copy, (params, GUARD.init(params)))
  seconds = {name: [] for name in runs}
  for i in range(FLAGS.repeats + 1):
    for name, run in runs.items():
      start = time.perf_counter()
      *states[name], _ = jax.block_until_ready(run(*states[name]))
      if i:  # The first one compiles.
        seconds[name].append(time.perf_counter() - start)
  first, *others = (jax.tree.leaves(state) for state in states.values())
  same = [
    np.array_equal(a, b)
    for other in others
    for a, b in zip(first, other, strict=True)
  ]
  return {
    **{f"{name} s": statistics.median(x) for name, x in seconds.items()},
    **{
      f"{name} / alone": machine.median_ratio(seconds[name], seconds["alone"])
      for name in ("guarded", "kept")
    },
    "same bits": all(same),
  }


def traffic(model, name):
  """Bytes that the step of each side moves and needs, over the parameters'."""
  place = None
  if name != "here":
    place = jax.sharding.SingleDeviceSharding(
      targets.devices(targets.parse(name))[0]
    )
  shaped = lambda tree: jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree
  )
  ids = jnp.zeros((1, 2), jnp.int32)
  # All layers are alike, and so is what an optimizer does to them.
  model = llama.Llama(dataclasses.replace(model.config, num_layers=2))
  shapes = jax.eval_shape(model.init, jax.random.key(0), ids, ids == 0)
  params = shapes["params"]
  state = jax.eval_shape(GUARD.init, params)
  loss = {"loss": jax.ShapeDtypeStruct((), jnp.float32)}
  size = sum(4 * x.size for x in jax.tree.leaves(params))
  found = {}
  for side, step in SIDES.items():
    compiled = (
      jax.jit(step, donate_argnums=(1, 2))
      .lower(*map(shaped, (params, state, params, loss)))
      .compile()
    )
    cost = compiled.cost_analysis() or {}
    moved = cost.get("bytes accessed")
    if moved is None:  # As of a GPU that is not there.
      moved = hlo.measure(compiled.as_text()).outside.traffic
    memory = compiled.memory_analysis().temp_size_in_bytes
    found |= {f"{side} moves": moved / size, f"{side} needs": memory / size}
  return found


if __name__ == "__main__":
  app.run(main)
