"""An update on packed rows beside one on padded rows, on texts of real lengths.

  python -m benchmarks.packing --model=../shared/data/models/stories260k \
    --data=../shared/data/hh_rlhf/harmless_base_train.jsonl.gz

Both sides learn from the same replies, batch by batch, by the loss of
experiments/sft.py: forward, backward and AdamW in float32. Padded rows are as
long as the longest prompt and reply of the data, as in the script; packed ones
have --packed_length tokens. The sides take turns, so that a busy machine hits
both, and the ratio is the median over pairs.
"""

import functools
import json
import os
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks import machine
from rljax.generation import rollouts
from rljax.losses import supervised
from rljax.models import hf
from rljax.ops import log_probs
from rljax.text import batches, encoding, logged, packing
from rljax.training import optimizers

flags.DEFINE_string("model", "", "Model, in the forms of --policy.")
flags.DEFINE_list("data", [], "Files of replies, each a row of the table.")
flags.DEFINE_integer("num_rows", 1000, "Rows of a file that are used.")
flags.DEFINE_integer("batch_size", 32, "Replies of an update.")
flags.DEFINE_integer("packed_length", 512, "Tokens of a packed row.")
flags.DEFINE_integer("max_length", 256, "Most tokens of a prompt or a reply.")
flags.DEFINE_integer("steps", 5, "Timed pairs of updates.")
FLAGS = flags.FLAGS


def main(_):
  machine.report("packing", {"": "An update, padded and packed"}, measure_all)


def measure_all():
  loaded = hf.load(FLAGS.model)
  rows = [measure(loaded, name) for name in FLAGS.data]
  for row in rows:
    print(json.dumps(row), flush=True)
  return rows


def measure(loaded, name):
  """Times of updates on the rows of one file, in both ways."""
  rows = logged.first_replies(logged.load(name, limit=FLAGS.num_rows).rows)
  encoded = encoding.prepare(
    loaded.tokenizer,
    rows,
    prompt_format="plain",
    max_prompt_length=FLAGS.max_length,
    max_response_length=FLAGS.max_length,
    too_long="skip",
  )
  prompt_length, response_length = encoding.lengths(encoded)
  asked, said = encoding.counts(encoded)
  draw = lambda step: batches.batch_indices(
    len(encoded.rows), FLAGS.batch_size, step, seed=0
  )
  pack = packing.plan(
    FLAGS.packed_length,
    ((asked[draw(step)], said[draw(step), 0]) for step in range(1000)),
  )

  def batch_of(step):
    return encoding.batch(
      encoded,
      draw(step),
      np.zeros(FLAGS.batch_size, int),
      prompt_length=prompt_length,
      response_length=response_length,
    )

  start, update = make_update(loaded.model)
  states = [start(loaded.params), start(loaded.params)]
  times, losses = ([], []), ([], [])
  for step in range(FLAGS.steps + 1):  # The first one compiles.
    for side in (0, 1):
      started = time.perf_counter()
      batch = batch_of(step)
      batch = pack(batch) if side else batch
      states[side], loss = update(states[side], batch)
      losses[side].append(float(loss))
      times[side].append(time.perf_counter() - started)
  padded, packed = (x[1:] for x in times)
  columns = FLAGS.batch_size * (prompt_length + response_length)
  tokens = np.mean(
    [(asked[draw(s)] + said[draw(s), 0]).sum() for s in range(1000)]
  )
  return {
    "model": os.path.basename(FLAGS.model),
    "data": os.path.basename(name).split(".")[0],
    "replies": FLAGS.batch_size,
    "tokens": float(tokens),
    "padded columns": columns,
    "packed columns": pack.num_rows * pack.length,
    "padded s": statistics.median(padded),
    "packed s": statistics.median(packed),
    "speed-up": machine.median_ratio(padded, packed),
    "last losses": " ".join(f"{x[-1]:.6f}" for x in losses),
  }


def make_update(model):
  """The update of experiments/sft.py, for batches of either kind."""
  transform = optimizers.make(1000, learning_rate=1e-5, max_grad_norm=1.0)

  def loss_fn(params, batch):
    statistics_, _ = rollouts.token_statistics(
      model,
      params,
      batch,
      temperature=1.0,
      chunk_size=log_probs.chunk_size(
        FLAGS.batch_size, model.config.vocab_size
      ),
    )
    return supervised.nll_loss(statistics_.log_probs, batch["response_mask"])

  @functools.partial(jax.jit, donate_argnums=0)
  def update(state, batch):
    params, optimizer_state = state
    grads, metrics = jax.grad(loss_fn, has_aux=True)(params, batch)
    params, optimizer_state, metrics = optimizers.step(
      transform, grads, optimizer_state, params, metrics
    )
    return (params, optimizer_state), metrics["nll/loss"]

  def start(params):
    params = jax.tree.map(jnp.array, params)
    return params, transform.init(params)

  return start, update


if __name__ == "__main__":
  app.run(main)
