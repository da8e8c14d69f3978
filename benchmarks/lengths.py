"""What a token costs in rows of different lengths.

  python -m benchmarks.lengths --lengths=32,128,256,512,1024,2048

Three tables: the gradient of attention alone, in one piece and by blocks; the
gradient of a model, with attention in one piece and in the form that the
library chooses; the sampler. As many rows as make up `--tokens` are taken, so
that every length does the same work but for attention. The sides take turns,
and the ratio is the median over pairs. Memory is that of the compiler's
temporaries. The model has the layers of SmolLM2, fewer of them and random
weights.

  python -m benchmarks.lengths --parts=growth --tokens=4096 --repeats=3 \
    --lengths=256,512,1024,2048,4096

How much more a token costs in longer rows, for the learner and the sampler, in
the form that the library chooses. All lengths take turns, and ratios are over
the first: of the time, and of the CPU time of the process, which others move
less. The last ratio is that of the FLOPs (learner) and of the bytes (sampler)
that the arithmetic needs, if attention reads no token that it masks.
"""

import functools
import json
import os
import statistics
import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks import machine
from rljax.generation import decode, rollouts
from rljax.models import attention, llama
from rljax.ops import sampling

flags.DEFINE_list(
  "lengths",
  ["32", "64", "128", "256", "512", "1024", "2048"],
  "Tokens of a row.",
)
flags.DEFINE_integer("tokens", 2048, "Tokens of all rows; at least one row.")
flags.DEFINE_integer("layers", 4, "Of the model.")
flags.DEFINE_integer("rows", 4, "Rows of the sampler.")
flags.DEFINE_integer("repeats", 5, "Timed pairs of runs.")
flags.DEFINE_list(
  "parts", ["attention", "learner", "sampler"], "Tables to measure."
)
FLAGS = flags.FLAGS

_TITLES = {
  "attention": "Gradient of attention, microseconds per token",
  "learner": "Gradient of a model, microseconds per token",
  "sampler": "Sampling, microseconds per token",
  "growth": "Time per token in rows of several lengths",
}
_HEADS, _KV_HEADS, _WIDTH = 9, 3, 64


def main(_):
  titles = {part: _TITLES[part] for part in FLAGS.parts}
  if FLAGS.from_results:
    parts = ("attention", "learner", "growth")
    titles = {part: _TITLES[part] for part in parts}
  machine.report("lengths", titles, measure_all)


def measure_all():
  measures = {
    "attention": attention_row,
    "learner": learner_row,
    "sampler": sampler_row,
  }
  found = {}
  for part in FLAGS.parts:
    if part == "growth":
      found[part] = [*growth_rows("learner"), *growth_rows("sampler")]
      continue
    found[part] = []
    for length in map(int, FLAGS.lengths):
      found[part].append(measures[part](length))
      print(json.dumps(found[part][-1]), flush=True)
  return found


def attention_row(length):
  """Both forms of one layer's attention, forwards and backwards."""
  rows = max(1, FLAGS.tokens // length)
  draw = lambda seed, heads: jax.random.normal(
    jax.random.key(seed), (rows, length, heads, _WIDTH)
  )
  operands = draw(0, _HEADS), draw(1, _KV_HEADS), draw(2, _KV_HEADS)
  mask = jnp.ones((rows, length), bool)

  def program(form):
    run = functools.partial(attention.attend, form=form)
    loss = lambda *x: jnp.sum(run(*x, mask) * operands[0])
    return jax.jit(jax.grad(loss, (0, 1, 2))).lower(*operands).compile()

  return _compare(length, rows, program, operands, ("plain", "blocks"))


def learner_row(length):
  """The gradient of a model's log-probabilities."""
  rows, program, arguments = _learner(length)
  return _compare(length, rows, program, arguments, ("plain", "chosen"))


def _learner(length):
  """Rows, what compiles the gradient for a form of attention, its input."""
  rows = max(1, FLAGS.tokens // length)
  model, params = _model()
  ids = (
    np.random.default_rng(0).integers(3, 512, (rows, length)).astype("int32")
  )
  batch = {
    "prompt_ids": ids[:, :16],
    "prompt_mask": np.ones((rows, 16), bool),
    "response_ids": ids[:, 16:],
    "response_mask": np.ones((rows, length - 16), bool),
  }
  chosen = attention.choose

  def program(form):
    def loss(params, batch):
      found, _ = rollouts.token_statistics(
        model, params, batch, temperature=1.0
      )
      return jnp.mean(found.log_probs)

    choose = chosen if form == "chosen" else lambda *_, **__: form
    with mock.patch.object(attention, "choose", choose):
      return jax.jit(jax.grad(loss)).lower(params, batch).compile()

  return rows, program, (params, batch)


def sampler_row(length):
  """Prompts of 16 tokens and responses that fill the length."""
  program, params = _sampler(length)
  run = lambda: jax.block_until_ready(program(params))
  times = machine.seconds(run, FLAGS.repeats)
  return {
    "length": length,
    "rows": FLAGS.rows,
    "us": statistics.median(times) / (length - 16) / FLAGS.rows * 1e6,
    "MB": program.memory_analysis().temp_size_in_bytes / 1e6,
  }


def _sampler(length):
  """The compiled sampler, and the parameters that it takes."""
  model, params = _model()
  ids = np.full((FLAGS.rows, 16), 5, np.int32)

  def draw(params):
    return decode.sample(
      jax.random.key(0),
      model,
      params,
      ids,
      np.ones_like(ids, bool),
      max_length=length - 16,
      settings=sampling.Settings(),
    )

  return jax.jit(draw).lower(params).compile(), params


def growth_rows(part):
  """A row for each length, of the learner or the sampler."""
  lengths, runs, sizes = list(map(int, FLAGS.lengths)), {}, {}
  for length in lengths:
    if part == "learner":
      rows, program, arguments = _learner(length)
      program, sizes[length] = program("chosen"), rows * length
    else:
      program, params = _sampler(length)
      arguments, sizes[length] = (params,), FLAGS.rows * (length - 16)
    runs[length] = functools.partial(program, *arguments)
    jax.block_until_ready(runs[length]())
  times = {length: [] for length in lengths}
  cpu_times = {length: [] for length in lengths}
  for _ in range(FLAGS.repeats):
    for length, run in runs.items():
      call = lambda run=run: jax.block_until_ready(run())
      began = time.process_time()
      (seconds,) = machine.seconds(call, 1, warm=False)
      spent = time.process_time() - began
      times[length].append(seconds / sizes[length] * 1e6)
      cpu_times[length].append(spent / sizes[length] * 1e6)
  least = {"learner": _flops_of_token, "sampler": _bytes_of_token}[part]
  found = []
  for length in lengths:
    row = {
      "of": part,
      "length": length,
      "us a token": statistics.median(times[length]),
      f"over {lengths[0]}": machine.median_ratio(
        times[length], times[lengths[0]]
      ),
      "CPU us a token": statistics.median(cpu_times[length]),
      "CPU over it": machine.median_ratio(
        cpu_times[length], cpu_times[lengths[0]]
      ),
      "by counting": least(length) / least(lengths[0]),
      "load": os.getloadavg()[0],
    }
    found.append(row)
    print(json.dumps(row), flush=True)
  return found


def _flops_of_token(length):
  """Of a forward pass, on average; a backward pass takes twice that."""
  _, params = _model()
  size = sum(x.size for x in jax.tree.leaves(params))
  # Queries with keys, and weights with values, of the tokens before.
  return 2 * size + 4 * FLAGS.layers * _HEADS * _WIDTH * length / 2


def _bytes_of_token(length):
  """That a step reads, on average: the parameters once, and what was cached."""
  _, params = _model()
  size = sum(x.size for x in jax.tree.leaves(params))
  cached = 2 * FLAGS.layers * _KV_HEADS * _WIDTH * length / 2
  return 4 * (size / FLAGS.rows + cached)


def _model():
  model = llama.Llama(
    llama.LlamaConfig(
      vocab_size=512,
      hidden_size=_HEADS * _WIDTH,
      num_layers=FLAGS.layers,
      num_heads=_HEADS,
      num_kv_heads=_KV_HEADS,
      intermediate_size=1536,
      max_positions=8192,
    )
  )
  ids = jnp.zeros((1, 1), jnp.int32)
  return model, model.init(jax.random.key(0), ids, ids == 0)["params"]


def _compare(length, rows, program, arguments, forms):
  programs = {form: program(form) for form in forms}
  times = {form: [] for form in forms}
  for run in programs.values():
    jax.block_until_ready(run(*arguments))
  for _ in range(FLAGS.repeats):
    for form, run in programs.items():
      call = lambda run=run: jax.block_until_ready(run(*arguments))
      times[form] += machine.seconds(call, 1, warm=False)
  row = {"length": length, "rows": rows}
  for form in forms:
    row[f"{form} us"] = statistics.median(times[form]) / rows / length * 1e6
  row["speed-up"] = machine.median_ratio(*(times[form] for form in forms))
  for form, run in programs.items():
    row[f"{form} MB"] = run.memory_analysis().temp_size_in_bytes / 1e6
  return row


if __name__ == "__main__":
  app.run(main)
