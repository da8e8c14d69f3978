"""Trains a reward model on comparisons of logged replies.

A minute on two CPU cores, on the log of the study of offline methods:
  python experiments/outcome_reward_model.py --policy=runs/reference \
    --task=word_lists --task_options=num=2000 --workdir=runs/reward_model

A language model with a fresh linear head reads a prompt and a reply, and the
score at the last token of the better reply is to be above that of the other.
That is the end token, but for replies which --too_long=cut has shortened; a
RewardModel appends it always. Any flag --reward_model takes the workdir.

Source of --loss=pairwise: Ouyang et al. (2022), arXiv 2203.02155, section 3.5.
"""

import functools
import math
import os
import re
import time

import jax
import numpy as np
import optax
from absl import app, flags
from flax import traverse_util

from rljax import (
  checkpoint,
  data,
  logged,
  logs,
  meshes,
  preflight,
  reference,
  report,
  runs,
  tasks,
)
from rljax.losses import supervised
from rljax.models import hf

# Run.
flags.DEFINE_string("workdir", None, "Checkpoints and logs.", required=True)
flags.DEFINE_integer("seed", 0, "Seed of every source of randomness.")
flags.DEFINE_integer("steps", 200, "Optimizer updates.")
flags.DEFINE_integer("save_every", 500, "Steps between checkpoints.")
flags.DEFINE_integer("eval_every", 100, "Steps between held-out evaluations.")
flags.DEFINE_string("mesh", "data:-1", "Axes data, fsdp, tensor; -1: the rest.")
flags.DEFINE_string("compilation_cache", "~/.cache/rljax", "Empty for none.")
flags.DEFINE_string("wandb_project", "", "Also log to this project.")
# Data: comparisons.
flags.DEFINE_string("data", "", "Logged rows, any format; empty: the task's.")
flags.DEFINE_string("eval_data", "", "Held-out rows; empty: the task's.")
flags.DEFINE_string("task", "", "A module of rljax.tasks.")
flags.DEFINE_list("task_options", [], "name=value, handed to the task.")
flags.DEFINE_integer("first_row", 0, "Of the log; earlier rows are not read.")
flags.DEFINE_integer("num_rows", 0, "From there on; 0: all.")
flags.DEFINE_integer("num_eval_rows", 256, "First held-out rows.")
flags.DEFINE_enum(
  "order",
  "",
  ["", "logged", "reward"],
  "What ranks replies; empty: rewards where a row has them, else its order.",
)
flags.DEFINE_enum("prompt_format", "plain", ["plain", "chat"], "Of prompts.")
flags.DEFINE_integer("max_prompt_length", 512, "Tokens.")
flags.DEFINE_integer("max_response_length", 128, "Tokens, end token included.")
flags.DEFINE_enum("too_long", "skip", ["skip", "cut", "error"], "Longer rows.")
# Model.
flags.DEFINE_string("policy", None, "What it starts as.", required=True)
flags.DEFINE_string("frozen", "", "Parameters left alone: a pattern of paths.")
flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of compute.")
flags.DEFINE_bool("remat", False, "Recompute layers in the backward pass.")
# Loss and updates.
flags.DEFINE_enum("loss", "pairwise", ["pairwise"], "Bradley-Terry.")
flags.DEFINE_float("margin", 0.0, "By which the better reply is to lead.")
flags.DEFINE_integer("batch_size", 16, "Prompts per update.")
flags.DEFINE_float("learning_rate", 1e-4, "Highest, of AdamW.")
flags.DEFINE_enum("schedule", "cosine", ["constant", "cosine"], "Down to 0.")
flags.DEFINE_integer("warmup_steps", 0, "Updates.")
flags.DEFINE_float("weight_decay", 0.0, "Of AdamW.")
flags.DEFINE_float("max_grad_norm", 1.0, "0: no clipping.")
FLAGS = flags.FLAGS

PANELS = {
  "Loss (nats a comparison)": ["pairwise/loss", "eval/loss"],
  "Comparisons in the right order": ["pairwise/accuracy", "eval/accuracy"],
}


def main(_):
  runs.check_positive(
    FLAGS,
    *("steps", "save_every", "eval_every", "batch_size", "num_eval_rows"),
  )
  if bool(FLAGS.data) != bool(FLAGS.eval_data) or not (
    FLAGS.data or FLAGS.task
  ):
    raise ValueError("Give --data and --eval_data, or a --task and neither.")
  may_change = ("workdir", "mesh", "compilation_cache", "wandb_project")
  in_force = runs.start(FLAGS, may_change)
  mesh = meshes.make(FLAGS.mesh)
  meshes.check_divisible(FLAGS.batch_size, mesh, "--batch_size")

  # The model, in two parts: what learns, and what is left alone.
  loaded = hf.classifier_from(
    hf.load(FLAGS.policy, dtype=FLAGS.dtype, remat=FLAGS.remat), seed=FLAGS.seed
  )
  model, tokenizer = loaded.model, loaded.tokenizer
  rules = hf.partition_rules(model)
  paths = traverse_util.flatten_dict(loaded.params, sep="/")
  is_frozen = re.compile(FLAGS.frozen or r"(?!)").search
  frozen = {path: x for path, x in paths.items() if is_frozen(path)}
  learnt = {path: x for path, x in paths.items() if not is_frozen(path)}
  if not learnt or (FLAGS.frozen and not frozen):
    raise ValueError(
      f"--frozen={FLAGS.frozen} matches {len(frozen)} of {len(paths)} "
      f"parameters, such as {next(iter(paths))}; it must match some and leave "
      "some."
    )

  def joined(learnt, frozen):
    return traverse_util.unflatten_dict({**learnt, **frozen}, sep="/")

  # Comparisons, as ids.
  options = tasks.options(FLAGS.task_options)

  def compared(name, split, first, limit):
    rows, unusable = logged.load_or_draw(
      name, FLAGS.task, split, FLAGS.seed, options
    )
    kept = []
    for row in rows[first:][: limit or None]:
      if len(set(row.candidates)) < 2:
        unusable.append(f"{row.place}: there is nothing to compare.")
      elif by_reward(row) and len(set(row.rewards)) < 2:
        unusable.append(f"{row.place}: all rewards are the same.")
      else:
        kept.append(logged.best_first(row) if by_reward(row) else row)
    if not kept:
      raise ValueError(
        f"{name or FLAGS.task} holds no comparison: {' '.join(unusable[:3])}"
      )
    encoded = logged.prepare(
      tokenizer,
      kept,
      prompt_format=FLAGS.prompt_format,
      max_prompt_length=FLAGS.max_prompt_length,
      max_response_length=FLAGS.max_response_length,
      too_long=FLAGS.too_long,
    )
    skipped.extend([*unusable, *encoded.skipped])
    return encoded

  skipped = []
  train = compared(FLAGS.data, "train", FLAGS.first_row, FLAGS.num_rows)
  held_out = compared(FLAGS.eval_data, "validation", 0, FLAGS.num_eval_rows)
  if len(train.rows) < FLAGS.batch_size:
    raise ValueError(
      f"--batch_size={FLAGS.batch_size} is more than the {len(train.rows)} "
      "comparisons."
    )
  lengths = np.max([reference.lengths(part) for part in (train, held_out)], 0)
  data.check_positions(lengths.sum(), model.config.max_positions)
  num_candidates = max(
    len(row.candidates) for part in (train, held_out) for row in part.rows
  )

  def batch_of(part, rows):
    """Whole texts `[B, K, S]`, padded on both sides, and which there are."""
    batch = logged.batch(
      part,
      np.repeat(rows, num_candidates),
      np.tile(np.arange(num_candidates), len(rows)),
      prompt_length=lengths[0],
      response_length=lengths[1],
    )
    shape = (len(rows), num_candidates, -1)
    rewards = [  # Where a row's own order counts, it has no ties.
      row.rewards if by_reward(row) else -np.arange(len(row.candidates))
      for row in (part.rows[i] for i in rows)
    ]
    return {
      name: np.concatenate(
        [batch[f"prompt_{name}"], batch[f"response_{name}"]], axis=1
      ).reshape(shape)
      for name in ("ids", "mask")
    } | {
      "present": batch["response_mask"].any(axis=1).reshape(shape[:2]),
      "rewards": np.float32(
        [np.pad(r, (0, num_candidates - len(r))) for r in rewards]
      ),
    }

  def loss_fn(learnt, frozen, batch):
    ids, mask = (batch[name] for name in ("ids", "mask"))
    texts = (ids.shape[0] * ids.shape[1], ids.shape[2])
    logits = model.apply(
      {"params": joined(learnt, frozen)},
      ids.reshape(texts),
      mask.reshape(texts),
    )
    return supervised.pairwise_loss(
      logits.reshape(batch["present"].shape),
      batch["present"],
      rewards=batch["rewards"],
      margin=FLAGS.margin,
    )

  if not FLAGS.warmup_steps < FLAGS.steps:
    raise ValueError(
      f"--warmup_steps={FLAGS.warmup_steps} must be fewer than the "
      f"--steps={FLAGS.steps}."
    )
  schedule = optax.schedules.warmup_cosine_decay_schedule(
    init_value=0.0 if FLAGS.warmup_steps else FLAGS.learning_rate,
    peak_value=FLAGS.learning_rate,
    warmup_steps=FLAGS.warmup_steps,
    decay_steps=FLAGS.steps,
    end_value=FLAGS.learning_rate if FLAGS.schedule == "constant" else 0.0,
  )
  optimizer = optax.chain(
    optax.clip_by_global_norm(FLAGS.max_grad_norm or math.inf),
    optax.adamw(schedule, weight_decay=FLAGS.weight_decay),
  )

  # Only what learns is differentiated: no gradient is worked out below it.
  def update(state, frozen, batch):
    learnt = state["learnt"]
    grads, metrics = jax.grad(loss_fn, has_aux=True)(learnt, frozen, batch)
    updates, optimizer_state = optimizer.update(
      grads, state["optimizer"], learnt
    )
    metrics["gradient_norm"] = optax.global_norm(grads)
    return {
      "learnt": optax.apply_updates(learnt, updates),
      "optimizer": optimizer_state,
    }, metrics

  place = lambda tree: meshes.place(tree, meshes.shardings(tree, rules, mesh))
  learnt, frozen = place(learnt), place(frozen)
  state = {"learnt": learnt, "optimizer": optimizer.init(learnt)}
  state_shardings = meshes.shardings(state, rules, mesh)
  state = meshes.place(state, state_shardings)
  update = preflight.Compiled(
    "update", update, donate_argnums=0, out_shardings=(state_shardings, None)
  )
  judge = preflight.Compiled(
    "judge", lambda learnt, frozen, batch: loss_fn(learnt, frozen, batch)[1]
  )

  def evaluate():
    """Loss and accuracy on the held-out rows; batches weigh by their rows."""
    found, weights = [], []
    for start in range(0, len(held_out.rows), FLAGS.batch_size):
      rows = np.arange(start, start + FLAGS.batch_size)
      batch = batch_of(held_out, rows % len(held_out.rows))
      batch["present"] &= (rows < len(held_out.rows))[:, None]
      batch = meshes.shard_batch(batch, mesh)
      found.append(jax.device_get(judge(state["learnt"], frozen, batch)))
      weights.append(np.sum(rows < len(held_out.rows)))
    return {
      f"eval/{name}": np.average(
        [metrics[f"pairwise/{name}"] for metrics in found], weights=weights
      )
      for name in ("loss", "accuracy")
    }

  # A run that was stopped goes on where its last checkpoint is. What is saved
  # is the whole model, under the name that --reward_model looks for.
  checkpoint.write_flags(FLAGS.workdir, in_force, may_change)
  checkpoints = checkpoint.Checkpoints(FLAGS.workdir)

  def saved(state):
    return {
      "params": {"reward_model": joined(state["learnt"], frozen)},
      "optimizer": state["optimizer"],
    }

  first_step = 0
  if restored := checkpoints.restore_latest(saved(state)):
    first_step, whole, _ = restored
    paths = traverse_util.flatten_dict(whole["params"]["reward_model"], sep="/")
    state = {
      "learnt": {path: paths[path] for path in state["learnt"]},
      "optimizer": whole["optimizer"],
    }
  hf.save_config(os.path.join(FLAGS.workdir, "model"), model, tokenizer)
  log = logs.Logs(
    FLAGS.workdir,
    total_steps=FLAGS.steps,
    first_step=first_step,
    columns=("pairwise/loss", "eval/accuracy", "comparisons_per_second"),
    wandb_project=FLAGS.wandb_project,
  )
  for message in checkpoints.messages:
    log.note(message)
  log.skipped(skipped)
  log.curves(functools.partial(report.curves, panels=PANELS))
  with log, checkpoints, checkpoint.Preemption() as preemption:
    for step in range(first_step, FLAGS.steps):
      metrics = evaluate() if step and step % FLAGS.eval_every == 0 else {}
      started = time.perf_counter()
      rows = data.batch_indices(
        len(train.rows), FLAGS.batch_size, step, seed=FLAGS.seed
      )
      batch = meshes.shard_batch(batch_of(train, rows), mesh)
      state, found = update(state, frozen, batch)
      metrics |= jax.device_get(found)
      seconds = time.perf_counter() - started
      metrics["comparisons_per_second"] = FLAGS.batch_size / seconds
      log.write(step, metrics)
      done = step + 1
      stop = preemption.should_stop()
      if done % FLAGS.save_every == 0 or done == FLAGS.steps or stop:
        checkpoints.save(done, saved(state), {"step": done})
      if stop and done < FLAGS.steps:
        log.note(f"Stopped by a signal after step {done}; all is saved.")
        return preemption.exit_status
      if step > first_step:
        update.freeze()
    metrics = evaluate()
    log.write(FLAGS.steps, metrics)
    log.summary(
      {
        "held-out comparisons": len(held_out.rows),
        "held-out accuracy": metrics["eval/accuracy"],
        "held-out loss (nats)": metrics["eval/loss"],
        "comparisons": len(train.rows),
        "rows left out": len(skipped),
        "reward model": FLAGS.workdir,
      }
    )


def by_reward(row):
  """Whether rewards say which reply is better; else their order does."""
  if FLAGS.order == "reward" and row.rewards is None:
    raise ValueError(f'{row.place}: "reward" is missing, for --order=reward.')
  return row.rewards is not None and FLAGS.order != "logged"


if __name__ == "__main__":
  app.run(main)
