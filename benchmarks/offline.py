"""What a cache of the reference saves, and what drawing by priority costs.

  python -m benchmarks.offline --models=tiny,smollm2-135m

A step of A-LoL with reference log-probabilities and values that were read,
beside the same step that works them out, as the published code does: a forward
pass of the reference, and the value head on its prompt states. The sides take
turns, and the ratio is the median over pairs. A training step costs three
forward passes, so that nothing above 4 / 3 is to be had from this alone.

Then the host: advantages and priorities of a log, and drawing a batch, beside
`numpy.random.Generator.choice`.
"""

import functools
import json
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags

from benchmarks import generation, machine
from rljax.generation import rollouts
from rljax.losses import offline
from rljax.models import heads
from rljax.ops import advantages
from rljax.text import batches

flags.DEFINE_integer("rows", 16, "Replies in the step.")
flags.DEFINE_integer("response_tokens", 48, "Length of the replies.")
FLAGS = flags.FLAGS


def main(_):
  titles = {
    "step": "One A-LoL step, reference cached or inside",
    "host": "A log on the host, milliseconds",
  }
  machine.report("offline", titles, measure_all)


def measure_all():
  print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}")
  rows = []
  for name in FLAGS.models:
    model, params = generation.load(name)
    batch = make_batch(model)
    steps = {
      "cached": make_step(model, params, batch, inside=False),
      "inside": make_step(model, params, batch, inside=True),
    }
    losses = {key: run() for key, run in steps.items()}
    times = {key: [] for key in steps}
    for _ in range(FLAGS.repeats):
      for key, run in steps.items():
        times[key] += generation.timed(run)
    rows.append(
      {
        "model": name,
        "cached s": statistics.median(times["cached"]),
        "inside s": statistics.median(times["inside"]),
        "speed-up": machine.median_ratio(times["inside"], times["cached"]),
        "ceiling": 4 / 3,
        "first losses": " ".join(f"{x:.4f}" for x in losses.values()),
      }
    )
    print(json.dumps(rows[-1]), flush=True)
  host = [time_host(num_rows) for num_rows in (1_000, 100_000, 1_000_000)]
  return {"step": rows, "host": host}


def make_batch(model):
  rng = np.random.default_rng(0)
  vocab = model.config.vocab_size
  prompts = (FLAGS.rows, FLAGS.prompt_tokens)
  responses = (FLAGS.rows, FLAGS.response_tokens)
  return {
    "prompt_ids": rng.integers(3, vocab, prompts).astype(np.int32),
    "prompt_mask": np.ones(prompts, bool),
    "response_ids": rng.integers(3, vocab, responses).astype(np.int32),
    "response_mask": np.ones(responses, bool),
    "rewards": rng.uniform(0.5, 1, FLAGS.rows).astype(np.float32),
  }


def make_step(model, params, batch, *, inside):
  optimizer = optax.adamw(1e-6)
  head = heads.AttentionPoolingHead(num_heads=1)
  width = model.config.hidden_size
  head_params = head.init(
    jax.random.key(0), jnp.zeros((1, 1, width)), jnp.ones((1, 1), bool)
  )["params"]

  def look(params, batch):
    """What the reference says: log-probabilities and values."""
    ids = jnp.concatenate([batch["prompt_ids"], batch["response_ids"]], axis=1)
    mask = jnp.concatenate(
      [batch["prompt_mask"], batch["response_mask"]], axis=1
    )
    # One pass over prompt and reply serves both.
    hidden = model.apply({"params": params}, ids[:, :-1], mask[:, :-1])
    prompt_length = batch["prompt_ids"].shape[1]
    logits = model.apply(
      {"params": params}, hidden[:, prompt_length - 1 :], method="logits"
    )
    chosen = batch["response_ids"][:, :, None]
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
    return {
      "ref_log_probs": jnp.take_along_axis(log_probs, chosen, axis=2)[..., 0],
      "values": head.apply(
        {"params": head_params},
        hidden[:, :prompt_length],
        batch["prompt_mask"],
      ),
    }

  def loss_fn(params, batch):
    statistics_, _ = rollouts.token_statistics(
      model, params, batch, temperature=1.0
    )
    return offline.offline_loss(
      "a_lol",
      statistics_.log_probs,
      batch["ref_log_probs"],
      None,
      advantages.sequence(batch["rewards"], batch["values"]),
      batch["response_mask"],
    )

  @functools.partial(jax.jit, donate_argnums=0)
  def step(state, reference, batch):
    if inside:
      batch = batch | look(reference, batch)
    grads, metrics = jax.grad(loss_fn, has_aux=True)(state[0], batch)
    updates, optimizer_state = optimizer.update(grads, state[1], state[0])
    params = optax.apply_updates(state[0], updates)
    return (params, optimizer_state), metrics["offline/loss"]

  batch = jax.device_put(batch)
  if not inside:
    batch = batch | jax.jit(look)(params, batch)
  policy = jax.tree.map(jnp.copy, params)
  box = [(policy, optimizer.init(policy))]

  def run():
    box[0], loss = step(box[0], params, batch)
    jax.block_until_ready(box[0])
    return float(loss)

  return run


def time_host(num_rows):
  """Milliseconds of what a log of so many rows asks of the host."""
  rng = np.random.default_rng(0)
  rewards, values = rng.random((2, num_rows), np.float32)
  weigh = lambda: np.asarray(
    advantages.priority_weights(
      advantages.sequence(rewards, values), mode="good_priority"
    )
  )
  weights = weigh()
  sampler = batches.PrioritySampler(weights, seed=0)
  distinct = batches.PrioritySampler(weights, seed=0, replace=False)
  wide = weights.astype(np.float64)
  wide /= wide.sum()
  return {
    "rows": num_rows,
    "advantages, priorities": milliseconds(weigh),
    "sampler": milliseconds(lambda: batches.PrioritySampler(weights, seed=0)),
    "draw 16": milliseconds(lambda: sampler.draw(16, 3)),
    "draw 16 different": milliseconds(lambda: distinct.draw(16, 3)),
    "numpy choice": milliseconds(lambda: rng.choice(num_rows, 16, p=wide)),
  }


def milliseconds(run, repeats=20):
  run()
  times = []
  for _ in range(repeats):
    start = time.perf_counter()
    run()
    times.append(time.perf_counter() - start)
  return 1e3 * statistics.median(times)


if __name__ == "__main__":
  app.run(main)
