"""What it costs to keep the sampler within a grammar.

  python -m benchmarks.constraint --json=benchmarks/results/constraint.json

A policy with random weights fills gaps in board games, with the grammar on the
device and without. Both draw the same number of tokens: nothing ends a row.
Beside it what one would do instead: ask the parser on the host, row by row,
which words may come next, between two steps of the device (the copies to and
fro are not counted). Milliseconds of one step of all rows, the best of some
runs, side by side in one process.
"""

import functools
import os
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks import machine
from rljax.generation import decode, grammars
from rljax.models import llama
from rljax.ops import sampling
from rljax.tasks import games
from rljax.tasks.games import rules
from rljax.text import (
  batches,
  tokens,
  vocabularies,
)

flags.DEFINE_list("rows", ["1", "32", "128"], "Responses at the same time.")
flags.DEFINE_integer("tokens", 64, "Of a response.")
flags.DEFINE_integer("repeats", 5, "Runs, of which the best one counts.")
FLAGS = flags.FLAGS

# That of experiments/flags/padula/games_cpu_base.flags.
SIZE = {"hidden_size": 128, "num_layers": 4, "num_heads": 4}


def main(_):
  machine.report("constraint", {"rows": "A step of the sampler"}, measure_all)


def measure_all():
  rows = [measure(int(num)) for num in FLAGS.rows]
  return {"load": os.getloadavg()[0], "rows": rows}


def measure(num_rows):
  """One number of rows, with the grammar and without."""
  tokenizer = games.grammar_tokenizer()
  vocab_size = len(tokenizer)
  prompts = games.prompts("train", 0, num=num_rows, max_words=126)
  encoded = tokens.encode_prompts(tokenizer, prompts, max_length=192)
  ids, mask = map(jnp.asarray, batches.pad_left(encoded, length=128))
  model = llama.Llama(
    llama.LlamaConfig(
      vocab_size=vocab_size,
      max_positions=128 + FLAGS.tokens,
      intermediate_size=4 * SIZE["hidden_size"],
      **SIZE,
    )
  )
  params = model.init(jax.random.key(0), ids, mask)["params"]
  allowed = vocabularies.allowed_tokens(
    tokenizer, vocab_size, (tokenizer.eos_token_id,)
  )

  def draw(key, params, constraint, max_length):
    return decode.sample(
      key,
      model,
      params,
      ids,
      mask,
      max_length=max_length,
      settings=sampling.Settings(),
      allowed=jnp.asarray(allowed),
      constraint=constraint,
    )

  grammar = grammars.of_task(games, tokenizer, vocab_size)
  places = games.places(prompts, tokenizer, vocab_size)
  constraint = jax.device_put(grammars.constraint(grammar, **places))
  run = jax.jit(draw, static_argnums=3)
  seconds = {}
  for name, within in (("none", None), ("grammar", constraint)):
    # The prompts' part is in both, and drops out of the difference.
    one, all_ = (
      best(functools.partial(run, jax.random.key(0), params, within, length))
      for length in (1, FLAGS.tokens)
    )
    seconds[name] = (all_ - one) / (FLAGS.tokens - 1)
  samples = run(jax.random.key(0), params, constraint, FLAGS.tokens)
  texts = tokens.decode(tokenizer, samples.response_ids, samples.response_mask)
  return {
    "rows": num_rows,
    "no grammar, ms": 1e3 * seconds["none"],
    "grammar on the device, ms": 1e3 * seconds["grammar"],
    "ratio": seconds["grammar"] / seconds["none"],
    "parser on the host, ms": 1e3 * num_rows * host(prompts[:32], texts[:32]),
  }


def best(function):
  """Seconds of the fastest of several calls, behind one that compiles."""
  jax.block_until_ready(function())
  times = []
  for _ in range(FLAGS.repeats):
    start = time.perf_counter()
    jax.block_until_ready(function())
    times.append(time.perf_counter() - start)
  return min(times)


def host(prompts, texts):
  """Seconds a token: which terminals may follow, then one is read."""
  import lark

  times = []
  for prompt, text in zip(prompts, texts, strict=True):
    prefix, _ = rules.around(prompt)
    parser = rules._parser().parse_interactive(f"{prefix} {text}")
    num_before = len(rules.words(prefix))
    lexer = parser.lexer_thread.lex(parser.parser_state)
    for number in range(num_before + len(rules.words(text))):
      start = time.perf_counter()
      if number >= num_before:
        parser.accepts()
      try:
        parser.feed_token(next(lexer))
      except (lark.UnexpectedInput, StopIteration):
        break
      if number >= num_before:
        times.append(time.perf_counter() - start)
  return float(np.median(times))


if __name__ == "__main__":
  app.run(main)
