"""Drawing while a slow reward is scored, beside one after the other.

  python -m benchmarks.overlap

A small model answers prompts batch by batch, into a file, as in
experiments/expert_iteration.py; the reward sleeps for as long as a batch takes
to be drawn, in the place of a service that is asked, and for a quarter and for
four times of it. The sides take turns, and write the same rows.
"""

import os
import pathlib
import statistics
import tempfile
import time
from unittest import mock

import jax
import numpy as np
from absl import app, flags

from benchmarks import generation, machine
from rljax.distributed import meshes
from rljax.generation import ahead, responders
from rljax.ops import sampling
from rljax.tasks import tokenizers

flags.DEFINE_integer("prompts", 256, "Prompts that are answered.")
flags.DEFINE_integer("at_a_time", 32, "Prompts of a batch.")
FLAGS = flags.FLAGS


def main(_):
  machine.report("overlap", {"": "Slow rewards"}, measure_all)


def measure_all():
  model, params = generation.load("tiny")
  words = [chr(97 + i // 26) + chr(97 + i % 26) for i in range(500)]
  tokenizer = tokenizers.of_words(words, "..")
  rng = np.random.default_rng(0)
  prompts = ["".join(rng.choice(words, 16)) for _ in range(FLAGS.prompts)]
  responder = responders.Responder(
    model,
    tokenizer,
    [tokenizer.encode(prompt)[:16] for prompt in prompts],
    max_length=FLAGS.new_tokens,
    settings=sampling.Settings(),
    batch_size=FLAGS.at_a_time,
    mesh=meshes.make("data:1"),
    stop_at_eos=False,
  )
  params = jax.device_put(params)
  draw_all = lambda: list(responder.batches(params))
  of_batch = statistics.median(machine.seconds(draw_all)) / (
    FLAGS.prompts / FLAGS.at_a_time
  )
  return [
    measure(responder, params, prompts, of_batch, share)
    for share in (0.25, 1.0, 4.0)
  ]


def measure(responder, params, prompts, of_batch, share):
  """Seconds of both ways, for a reward that sleeps a share of a draw."""

  def score(asked, texts):
    time.sleep(of_batch * share)
    return np.float32([len(text) for text in texts]), [{} for _ in asked]

  times, written = {"waits": [], "ahead": []}, {}
  for _ in range(FLAGS.repeats):
    for name, found in times.items():
      items = ahead.items if name == "ahead" else lambda source: source
      with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(ahead, "items", items),
      ):
        path = pathlib.Path(folder, "samples.jsonl")
        started = time.perf_counter()
        responders.collect(path, responder, params, prompts, score)
        found.append(time.perf_counter() - started)
        written[name] = path.read_bytes()
  assert written["waits"] == written["ahead"]
  return {
    "batches": FLAGS.prompts // FLAGS.at_a_time,
    "draw s": of_batch,
    "score s": of_batch * share,
    "one by one s": statistics.median(times["waits"]),
    "ahead s": statistics.median(times["ahead"]),
    "speed-up": machine.median_ratio(times["waits"], times["ahead"]),
    "cores": os.cpu_count(),
  }


if __name__ == "__main__":
  app.run(main)
