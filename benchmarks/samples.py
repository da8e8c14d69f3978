"""What K samples of a prompt save by sharing its keys and values.

  python -m benchmarks.samples --models=tiny,smollm2-135m

K samples of each prompt by one prefill of the prompt, as expert iteration draws
them, beside the same number of rows that each hold the prompt. The samples are
equal but for rounding; the sides take turns, and the ratio is the median over
pairs. By counting, the shared side multiplies the body of the model with
B (P + K T) tokens instead of B K (P + T); the ceiling is the ratio of the two.
"""

import functools
import json
import statistics

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks import generation as generation_benchmark
from benchmarks import machine
from rljax.generation import decode
from rljax.ops import sampling

flags.DEFINE_integer("prompts", 8, "B.")
flags.DEFINE_list("samples", ["4", "16"], "K.")
flags.DEFINE_list("lengths", ["64", "256"], "P, tokens of a prompt.")
FLAGS = flags.FLAGS


def main(_):
  machine.report("samples", {"": "Samples of one prompt"}, measure_all)


def measure_all():
  print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}")
  rows = []
  for name in FLAGS.models:
    model, params = generation_benchmark.load(name)
    for length in map(int, FLAGS.lengths):
      if length + FLAGS.new_tokens > model.config.max_positions:
        continue
      for num_samples in map(int, FLAGS.samples):
        rows.append(
          {"model": name} | measure(model, params, length, num_samples)
        )
        print(json.dumps(rows[-1]), flush=True)
  return rows


def measure(model, params, length, num_samples):
  rng = np.random.default_rng(0)
  vocab_size = model.config.vocab_size
  ids = rng.integers(3, vocab_size, (FLAGS.prompts, length)).astype(np.int32)
  sample = functools.partial(
    decode.sample,
    model=model,
    max_length=FLAGS.new_tokens,
    settings=sampling.Settings(),
  )
  shared = jax.jit(functools.partial(sample, num_samples=num_samples))
  apart = jax.jit(sample)

  def run(function, ids):
    found = function(
      jax.random.key(0),
      params=params,
      prompt_ids=ids,
      prompt_mask=jnp.ones(ids.shape, bool),
    )
    found.response_ids.block_until_ready()

  sides = {
    "shared": functools.partial(run, shared, ids),
    "apart": functools.partial(run, apart, np.repeat(ids, num_samples, 0)),
  }
  times = {name: [] for name in sides}
  for side in sides.values():
    side()
  for _ in range(FLAGS.repeats):
    for name, side in sides.items():
      times[name] += generation_benchmark.timed(side)
  new = num_samples * FLAGS.new_tokens
  return {
    "prompt tokens": length,
    "K": num_samples,
    "shared s": statistics.median(times["shared"]),
    "repeated s": statistics.median(times["apart"]),
    "speed-up": machine.median_ratio(times["apart"], times["shared"]),
    "ceiling": (num_samples * length + new) / (length + new),
  }


if __name__ == "__main__":
  app.run(main)
