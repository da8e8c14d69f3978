"""Supervised fine-tuning: next-token loss on prompts and responses.

Ten seconds on two CPU cores; the short warm start of the arithmetic study:
  python experiments/sft.py --flagfile=experiments/flags/padula/sft_cpu.flags \
    --workdir=runs/sft

A pretrained model on a file of logged rows, of which it learns the first reply:
  python experiments/sft.py --policy=smollm2-135m --data=rows.jsonl \
    --workdir=runs/sft --steps=100
"""

import functools
import math
import os
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags

from rljax import tasks
from rljax.distributed import compiled, meshes, processes
from rljax.evaluation import curves
from rljax.generation import rollouts
from rljax.losses import supervised
from rljax.models import gpt2, hf, llama
from rljax.ops import log_probs
from rljax.storage import checkpoint
from rljax.text import batches, keywords, logged
from rljax.text import tokens as tokens_lib
from rljax.training import logs, runs

# Run.
flags.DEFINE_string("workdir", None, "Checkpoints and logs.", required=True)
flags.DEFINE_integer("seed", 0, "Seed of every source of randomness.")
flags.DEFINE_integer("steps", 8, "Optimizer updates.")
flags.DEFINE_integer("save_every", 500, "Steps between checkpoints.")
flags.DEFINE_integer("eval_every", 50, "Steps between held-out evaluations.")
flags.DEFINE_string("mesh", "data:-1", "Axes data, fsdp, tensor; -1: the rest.")
flags.DEFINE_string("compilation_cache", "~/.cache/rljax", "Empty for none.")
flags.DEFINE_string("wandb_project", "", "Also log to this project.")
# Data: a task's own examples, or a file.
flags.DEFINE_string("task", "arithmetic", "A module of rljax.tasks.")
flags.DEFINE_list("task_options", [], "name=value, handed to the task.")
flags.DEFINE_integer("num_examples", 256, "Of the task, for training.")
flags.DEFINE_integer("num_eval_prompts", 256, "Held-out prompts or rows.")
flags.DEFINE_string("data", "", "Logged rows, any format; replaces task.")
flags.DEFINE_enum("prompt_format", "plain", ["plain", "chat"], "Of prompts.")
flags.DEFINE_integer("max_prompt_length", 512, "Tokens.")
flags.DEFINE_integer("max_response_length", 512, "Tokens, end token included.")
flags.DEFINE_enum("too_long", "error", ["error", "skip", "cut"], "Longer rows.")
# Model: a trained one, or random weights of a given shape.
flags.DEFINE_string("policy", "", "Workdir, directory or name; empty: random.")
flags.DEFINE_enum("family", "gpt2", ["gpt2", "llama"], "Of a random model.")
flags.DEFINE_enum(
  "tokenizer", "word", ["word", "character", "grammar"], "Of the task."
)
flags.DEFINE_integer("vocab_size", 0, "Of a random model; 0: the tokenizer's.")
flags.DEFINE_integer("hidden_size", 96, "Of a random model.")
flags.DEFINE_integer("num_layers", 2, "Of a random model.")
flags.DEFINE_integer("num_heads", 4, "Of a random model.")
flags.DEFINE_integer("max_positions", 64, "Of a random model: its context.")
flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of compute.")
flags.DEFINE_bool("remat", False, "Recompute layers in the backward pass.")
flags.DEFINE_integer("chunk_size", 0, "Positions with logits; 0: what fits.")
# Updates.
flags.DEFINE_integer("batch_size", 64, "Rows per update.")
flags.DEFINE_enum(
  "normalizer",
  "token_mean",
  ["token_mean", "sequence_mean", "sequence_sum"],
  "What the loss is averaged over.",
)
flags.DEFINE_float("learning_rate", 1e-3, "Highest, of AdamW.")
flags.DEFINE_enum(
  "schedule", "cosine", ["constant", "linear", "cosine"], "After warm-up."
)
flags.DEFINE_integer("schedule_steps", 0, "It decays over these; 0: steps.")
flags.DEFINE_float("final_learning_rate", 0.0, "Where it ends.")
flags.DEFINE_integer("warmup_steps", 0, "Updates.")
flags.DEFINE_float("weight_decay", 0.1, "Of AdamW.")
flags.DEFINE_float("max_grad_norm", 1.0, "0: no clipping.")
FLAGS = flags.FLAGS

PANELS = {
  "Loss (nats a token)": ["nll/loss", "eval/loss"],
}


def main(_):
  processes.join()
  runs.check_positive(
    FLAGS, "steps", "batch_size", "eval_every", "save_every", "num_eval_prompts"
  )
  if FLAGS.schedule_steps and FLAGS.schedule_steps < FLAGS.steps:
    raise ValueError(
      f"--schedule_steps={FLAGS.schedule_steps} must not be fewer than the "
      f"--steps={FLAGS.steps}."
    )
  may_change = ("workdir", "mesh", "compilation_cache", "wandb_project")
  in_force = runs.start(FLAGS, may_change)
  mesh = meshes.make(FLAGS.mesh)
  meshes.check_divisible(FLAGS.batch_size, mesh, "--batch_size")
  task = tasks.load(FLAGS.task)

  # The model, and the texts that it learns from.
  if FLAGS.policy:
    loaded = hf.load(FLAGS.policy, dtype=FLAGS.dtype, remat=FLAGS.remat)
    model, params, tokenizer = loaded.model, loaded.params, loaded.tokenizer
  else:
    model, tokenizer = random_model(task)
    initial = functools.partial(
      model.init,
      jax.random.key(FLAGS.seed),
      jnp.zeros((1, 1), jnp.int32),
      jnp.ones((1, 1), bool),
    )
    params = jax.eval_shape(initial)["params"]
  rules = hf.partition_rules(model, mesh)
  meshes.shardings(params, rules, mesh)  # Else nothing is compiled.
  if not FLAGS.policy:
    params = jax.jit(initial)()["params"]
  train, held_out = examples(task, tokenizer)
  if len(train) < FLAGS.batch_size:
    raise ValueError(
      f"--batch_size={FLAGS.batch_size} is more than the {len(train)} examples."
    )
  # One shape for all batches, so that the update compiles once.
  lengths = [
    batches.bucket_length(max(len(row[part]) for row in train + held_out))
    for part in (0, 1)
  ]
  tokens_lib.check_positions(sum(lengths), model.config.max_positions)

  def batch_of(rows):
    return meshes.shard_batch(
      batches.supervised_batch(
        rows, prompt_length=lengths[0], response_length=lengths[1]
      ),
      mesh,
    )

  def loss_fn(params, batch):
    statistics, _ = rollouts.token_statistics(
      model,
      params,
      batch,
      temperature=1.0,
      chunk_size=FLAGS.chunk_size
      or log_probs.chunk_size(FLAGS.batch_size, model.config.vocab_size),
    )
    return supervised.nll_loss(
      statistics.log_probs, batch["response_mask"], normalizer=FLAGS.normalizer
    )

  schedule = learning_rates()
  optimizer = optax.chain(
    optax.clip_by_global_norm(FLAGS.max_grad_norm or math.inf),
    optax.adamw(schedule, weight_decay=FLAGS.weight_decay),
  )

  def update(state, batch):
    params = state["params"]["policy"]
    grads, metrics = jax.grad(loss_fn, has_aux=True)(params, batch)
    updates, optimizer_state = optimizer.update(
      grads, state["optimizer"], params
    )
    params = optax.apply_updates(params, updates)
    metrics["gradient_norm"] = optax.global_norm(grads)
    return {
      "params": {"policy": params},
      "optimizer": optimizer_state,
    }, metrics

  # State, placed on the mesh.
  params = {"policy": params}
  params = meshes.place(params, meshes.shardings(params, rules, mesh))
  state = {"params": params, "optimizer": optimizer.init(params["policy"])}
  state_shardings = meshes.shardings(state, rules, mesh)
  state = meshes.place(state, state_shardings)
  update = compiled.Compiled(
    "update", update, donate_argnums=0, out_shardings=(state_shardings, None)
  )
  held_out_loss = compiled.Compiled(
    "held-out loss", lambda params, batch: loss_fn(params, batch)[1]
  )

  # A run that was stopped goes on where its last checkpoint is.
  checkpoint.write_flags(FLAGS.workdir, in_force, may_change)
  checkpoints = checkpoint.Checkpoints(FLAGS.workdir)
  first_step = 0
  if restored := checkpoints.restore_latest(state):
    first_step, state, _ = restored
  hf.save_config(os.path.join(FLAGS.workdir, "model"), model, tokenizer)
  log = logs.Logs(
    FLAGS.workdir,
    total_steps=FLAGS.steps,
    first_step=first_step,
    columns=("nll/loss", "eval/loss", "tokens_per_second"),
    wandb_project=FLAGS.wandb_project,
  )
  for message in checkpoints.messages:
    log.note(message)
  log.curves(functools.partial(curves.curves, panels=PANELS))

  def evaluate():
    """Mean loss over the held-out rows; batches weigh by their tokens."""
    losses, tokens = [], []
    for start in range(0, len(held_out), FLAGS.batch_size):
      rows = held_out[start : start + FLAGS.batch_size]
      filling = [([0], [])] * (FLAGS.batch_size - len(rows))
      metrics = held_out_loss(
        state["params"]["policy"], batch_of([*rows, *filling])
      )
      losses.append(float(metrics["nll/loss"]))
      tokens.append(float(metrics["nll/tokens"]))
    return {"eval/loss": np.average(losses, weights=tokens)}

  with log, checkpoints, checkpoint.Preemption() as preemption:
    for step in range(first_step, FLAGS.steps):
      started = time.perf_counter()
      indices = batches.batch_indices(
        len(train), FLAGS.batch_size, step, seed=FLAGS.seed
      )
      state, metrics = update(state, batch_of([train[i] for i in indices]))
      metrics = jax.device_get(metrics)
      seconds = time.perf_counter() - started
      metrics["tokens_per_second"] = metrics["nll/tokens"] / seconds
      is_last = step + 1 == FLAGS.steps
      if (step + 1) % FLAGS.eval_every == 0 or is_last:
        metrics |= evaluate()
      log.write(step, metrics)
      stop = preemption.should_stop()
      if (step + 1) % FLAGS.save_every == 0 or is_last or stop:
        checkpoints.save(step + 1, state, {"step": step + 1})
      if stop and not is_last:
        log.note(f"Stopped by a signal after step {step + 1}; saved.")
        return preemption.exit_status
      if step > first_step:
        update.freeze()
    log.summary(
      {
        "held-out loss (nats a token)": evaluate()["eval/loss"],
        "policy": FLAGS.workdir,
      }
    )


def learning_rates():
  """The learning rate of each update."""
  steps = FLAGS.schedule_steps or FLAGS.steps
  first = 0.0 if FLAGS.warmup_steps else FLAGS.learning_rate
  if FLAGS.schedule == "linear":
    warmup = optax.linear_schedule(
      first, FLAGS.learning_rate, FLAGS.warmup_steps
    )
    then = optax.linear_schedule(
      FLAGS.learning_rate,
      FLAGS.final_learning_rate,
      max(steps - FLAGS.warmup_steps, 1),
    )
    return optax.join_schedules([warmup, then], [FLAGS.warmup_steps])
  return optax.schedules.warmup_cosine_decay_schedule(
    init_value=first,
    peak_value=FLAGS.learning_rate,
    warmup_steps=FLAGS.warmup_steps,
    decay_steps=steps,
    end_value=FLAGS.learning_rate
    if FLAGS.schedule == "constant"
    else FLAGS.final_learning_rate,
  )


def random_model(task):
  """A small model with random weights, and the tokenizer of the task."""
  tokenizer = getattr(task, f"{FLAGS.tokenizer}_tokenizer")()
  sizes = dict(
    vocab_size=FLAGS.vocab_size or len(tokenizer),
    hidden_size=FLAGS.hidden_size,
    num_layers=FLAGS.num_layers,
    num_heads=FLAGS.num_heads,
    max_positions=FLAGS.max_positions,
    dtype=FLAGS.dtype,
    remat=FLAGS.remat,
  )
  if FLAGS.family == "gpt2":
    return gpt2.GPT2(gpt2.GPT2Config(**sizes)), tokenizer
  return llama.Llama(llama.LlamaConfig(**sizes)), tokenizer


def examples(task, tokenizer):
  """(prompt ids, response ids) for training, and held-out ones."""
  limits = {
    "max_prompt_length": FLAGS.max_prompt_length,
    "max_response_length": FLAGS.max_response_length,
  }
  if not FLAGS.data:
    options = keywords.parse(FLAGS.task_options)
    return tuple(
      tokens_lib.encode_pairs(
        tokenizer,
        task.supervised(split, FLAGS.seed, num=num, **options),
        **limits,
      )
      for split, num in (
        ("train", FLAGS.num_examples),
        ("validation", FLAGS.num_eval_prompts),
      )
    )
  # Of a file, the reply of every row that is the one to learn from.
  rows, _ = logged.load(FLAGS.data)
  encoded = logged.prepare(
    tokenizer,
    logged.first_replies(rows),
    prompt_format=FLAGS.prompt_format,
    too_long=FLAGS.too_long,
    **limits,
  )
  replies = [candidates[0] for candidates in encoded.response_ids]
  pairs = list(zip(encoded.prompt_ids, replies, strict=True))
  if len(pairs) <= FLAGS.num_eval_prompts:
    raise ValueError(
      f"{FLAGS.data} has {len(pairs)} rows, of which --num_eval_prompts="
      f"{FLAGS.num_eval_prompts} are held out: nothing is left to train on."
    )
  cut = len(pairs) - FLAGS.num_eval_prompts
  return pairs[:cut], pairs[cut:]


if __name__ == "__main__":
  app.run(main)
