"""Sampling speed beside Hugging Face `generate`, on the same weights.

  python -m benchmarks.generation --models=tiny,smollm2-135m --batches=1,16,64

Both sides sample (temperature 1, nothing truncated) exactly `--new_tokens`
tokens after a prompt of `--prompt_tokens`, in float32; torch once more in
bfloat16, its best case. The sides take turns, so that a busy machine hits both,
and the ratio is the median over pairs. The last columns count a decode step's
FLOPs and bytes, and say how close prompts and steps together come to what
`machine.py` measures.

  python -m benchmarks.generation --workload=skewed --models=tiny --batches=64

The same batches with responses of different lengths, of which few are long:
all rows until the longest has ended, beside `--slots` rows at a time. The sides
take turns and draw the same samples. `--workload=even` gives every response the
same length, where slots have nothing to save.

torch is an optional extra (`pip install -e ".[bench]"`); without it the columns
of Hugging Face are left out.
"""

import functools
import json
import os
import statistics
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks import machine
from rljax.generation import decode
from rljax.models import gpt2, hf
from rljax.ops import sampling

flags.DEFINE_list("models", ["tiny", "smollm2-135m"], "tiny, or any model.")
flags.DEFINE_list("batches", ["1", "16", "64"], "Rows at the same time.")
flags.DEFINE_integer("prompt_tokens", 16, "Length of the prompts.")
flags.DEFINE_integer("new_tokens", 32, "Tokens sampled per row.")
flags.DEFINE_integer("repeats", 3, "Timed pairs of runs.")
flags.DEFINE_integer("torch_threads", 2, "")
flags.DEFINE_enum(
  "workload",
  "peers",
  ["peers", "skewed", "even"],
  "peers: beside Hugging Face; skewed, even: slots beside rows that wait.",
)
flags.DEFINE_list("slots", ["8", "16", "32"], "Rows at a time.")
flags.DEFINE_bool("peer", True, "Run Hugging Face too, if torch is there.")
FLAGS = flags.FLAGS


def main(_):
  if FLAGS.workload == "peers":
    machine.report("generation", {"": "Sampling"}, measure_all)
  else:
    titles = {"": "Slots beside rows that wait"}
    machine.report(f"slots_{FLAGS.workload}", titles, measure_slots)


def measure_slots():
  rows = []
  for name in FLAGS.models:
    model, params = load(name)
    for batch in map(int, FLAGS.batches):
      rows += of_slots(name, model, params, batch)
  return rows


def of_slots(name, model, params, batch):
  """A row for each number of slots."""
  rng = np.random.default_rng(0)
  ids = rng.integers(3, model.config.vocab_size, (batch, FLAGS.prompt_tokens))
  lengths = np.full(batch, FLAGS.new_tokens)
  if FLAGS.workload == "skewed":  # Their median is a tenth of the most.
    drawn = rng.lognormal(np.log(FLAGS.new_tokens / 10), 1.0, batch)
    lengths = np.clip(drawn.astype(int), 1, FLAGS.new_tokens)
  sides, compiled = {}, {}
  for slots in (0, *map(int, FLAGS.slots)):
    sample = jax.jit(
      functools.partial(
        decode.sample,
        model=model,
        max_length=FLAGS.new_tokens,
        settings=sampling.Settings(),
        slots=slots,
      )
    )
    sides[slots] = lambda sample=sample: jax.block_until_ready(
      sample(
        jax.random.key(0),
        params=params,
        prompt_ids=jnp.asarray(ids, jnp.int32),
        prompt_mask=jnp.ones(ids.shape, bool),
        lengths=jnp.asarray(lengths, jnp.int32),
      )
    )
    (compiled[slots],) = timed(sides[slots])
  times, found = {slots: [] for slots in sides}, {}
  for _ in range(FLAGS.repeats):
    for slots, side in sides.items():
      start = time.perf_counter()
      found[slots] = side()
      times[slots].append(time.perf_counter() - start)
  rows = []
  for slots in list(sides)[1:]:
    row = {
      "model": name,
      "batch": batch,
      "mean length": lengths.mean(),
      "longest": int(lengths.max()),
      "slots": slots,
      "first call s": compiled[slots],
      "of all rows s": compiled[0],
      "tokens/s": lengths.sum() / statistics.median(times[slots]),
      "speed-up": machine.median_ratio(times[0], times[slots]),
      "same samples": bool(
        (found[0].response_ids == found[slots].response_ids).all()
      ),
      "load": os.getloadavg()[0],
    }
    rows.append(row)
    print(json.dumps(row), flush=True)
  return rows


def measure_all():
  peak, bandwidth = machine.matmul_peak(), machine.memory_bandwidth()
  print(
    f"jax {jax.__version__} on {jax.devices()[0].device_kind}: "
    f"{peak / 1e9:.0f} GFLOP/s float32 matmul, {bandwidth / 1e9:.1f} GB/s read"
  )
  rows = []
  for name in FLAGS.models:
    model, params = load(name)
    peers = load_peers(model, params)
    for batch in map(int, FLAGS.batches):
      rows.append(measure(name, model, params, peers, batch, peak, bandwidth))
      print(json.dumps(rows[-1]), flush=True)
  return rows


def load(name):
  if name != "tiny":
    loaded = hf.load(name, tokenizer=False)
    return loaded.model, jax.device_put(loaded.params)
  model = gpt2.GPT2(
    gpt2.GPT2Config(
      vocab_size=512,
      hidden_size=128,
      num_layers=4,
      num_heads=4,
      max_positions=128,
    )
  )
  ids = jnp.zeros((1, 1), jnp.int32)
  params = model.init(jax.random.key(0), ids, ids == 0)["params"]
  return model, params


def load_peers(model, params):
  """The same weights as torch models, float32 and bfloat16."""
  if not FLAGS.peer:
    return {}
  try:
    import torch
    import transformers
  except ImportError:
    print("torch is not installed: Hugging Face is left out.")
    return {}
  torch.set_num_threads(FLAGS.torch_threads)
  with tempfile.TemporaryDirectory() as folder:
    hf.save(folder, model, params)
    return {
      dtype: transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype)
      ).eval()
      for dtype in ("float32", "bfloat16")
    }


def measure(name, model, params, peers, batch, peak, bandwidth):
  rng = np.random.default_rng(0)
  vocab = model.config.vocab_size
  ids = rng.integers(3, vocab, (batch, FLAGS.prompt_tokens)).astype(np.int32)
  sample = jax.jit(
    functools.partial(
      decode.sample,
      model=model,
      max_length=FLAGS.new_tokens,
      settings=sampling.Settings(),
    )
  )

  def ours(new_tokens=None):
    del new_tokens
    found = sample(
      jax.random.key(0),
      params=params,
      prompt_ids=ids,
      prompt_mask=np.ones_like(ids, bool),
    )
    found.response_ids.block_until_ready()

  def theirs(peer):
    import torch

    with torch.inference_mode():
      peer.generate(
        torch.tensor(ids, dtype=torch.long),
        attention_mask=torch.ones(ids.shape, dtype=torch.long),
        do_sample=True,
        top_k=0,
        max_new_tokens=FLAGS.new_tokens,
        min_new_tokens=FLAGS.new_tokens,
        pad_token_id=0,
      )

  start = time.perf_counter()
  ours()
  first = time.perf_counter() - start
  times = {"rljax": [], **{dtype: [] for dtype in peers}}
  for peer in peers.values():
    theirs(peer)
  for _ in range(FLAGS.repeats):
    times["rljax"] += timed(ours)
    for dtype, peer in peers.items():
      times[dtype] += timed(functools.partial(theirs, peer))
  tokens = batch * FLAGS.new_tokens
  median = statistics.median(times["rljax"])
  row = {
    "model": name,
    "batch": batch,
    "first call s": first,
    "rljax tokens/s": tokens / median,
  }
  for dtype in peers:
    row[f"HF {dtype} tokens/s"] = tokens / statistics.median(times[dtype])
  for dtype in peers:
    ratio = machine.median_ratio(times[dtype], times["rljax"])
    row[f"rljax / HF {dtype}"] = ratio
  flops, num_bytes = step_cost(model, params, batch)
  prompt_flops = 2 * body_size(params) * batch * FLAGS.prompt_tokens
  # The first token comes with the prompts; the others take a step each.
  roofline = prompt_flops / peak + (FLAGS.new_tokens - 1) * max(
    flops / peak, num_bytes / bandwidth
  )
  row |= {
    "GFLOP/step": flops / 1e9,
    "MB/step": num_bytes / 1e6,
    "share of roofline": roofline / median,
  }
  return row


def timed(run):
  start = time.perf_counter()
  run()
  return [time.perf_counter() - start]


def body_size(params):
  """Parameters that a token of the prompt is multiplied with: no embeddings."""
  flat = jax.tree_util.tree_flatten_with_path(params)[0]
  return sum(
    x.size for path, x in flat if "embedding" not in jax.tree_util.keystr(path)
  )


def step_cost(model, params, batch):
  """FLOPs of one decode step's matmuls, and bytes that it must read.

  Every weight is read once and multiplied with every row; the input embedding
  is looked up, not multiplied, unless it is the output layer as well. The
  cache holds half of the response on average.
  """
  config = model.config
  size = sum(x.size for x in jax.tree.leaves(params))
  num_kv_heads = getattr(config, "num_kv_heads", None) or config.num_heads
  head_dim = getattr(config, "head_dim", None)
  head_dim = head_dim or config.hidden_size // config.num_heads
  positions = FLAGS.prompt_tokens + FLAGS.new_tokens / 2
  cached = 2 * config.num_layers * num_kv_heads * head_dim * positions
  attention = 4 * config.num_layers * config.num_heads * head_dim * positions
  return batch * (2 * size + attention), 4 * (size + batch * cached)


if __name__ == "__main__":
  app.run(main)
