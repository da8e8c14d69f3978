"""Fits the value of a reference policy, and judges a log by it, once.

A minute on two CPU cores, after `experiments/sft.py` has made the reference:
  python experiments/offline_value.py --policy=runs/reference \
    --flagfile=experiments/flags/a_lol/word_lists_value.flags \
    --workdir=runs/values

One reply of the reference to each validation prompt is scored, a head on its
frozen hidden states learns the scores, and every row of the log gets its
reference log-probabilities, value and advantage: `reference.npz`, which
`experiments/offline.py --cache` reads.

Source: Baheti et al. (2024), arXiv 2305.14718, after the authors' code: one
reply per prompt, attention pooling, the epoch with the lowest training error.
Departures: the head does not see padding, is switched to evaluation before it
is used, and is judged on prompts that it was not fitted to.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags

from rljax import tasks
from rljax.distributed import meshes, processes
from rljax.generation import samplers
from rljax.models import heads, hf
from rljax.ops import sampling
from rljax.scoring import cached, scorers
from rljax.storage import checkpoint
from rljax.text import batches, keywords, logged, tokens
from rljax.training import logs, runs

# Run.
flags.DEFINE_string("workdir", None, "Where the results go.", required=True)
flags.DEFINE_integer("seed", 0, "Seed of every source of randomness.")
flags.DEFINE_string("mesh", "data:-1", "Axes data, fsdp, tensor; -1: the rest.")
flags.DEFINE_string("compilation_cache", "~/.cache/rljax", "Empty for none.")
# Data: the log, and prompts that the head is fitted to.
flags.DEFINE_string("data", "", "Logged rows, any format; empty: the task's.")
flags.DEFINE_string("value_data", "", "Prompts; empty: the task's validation.")
flags.DEFINE_string("task", "", "A module of rljax.tasks.")
flags.DEFINE_list("task_options", [], "name=value, handed to the task.")
flags.DEFINE_integer("first_row", 0, "Of the log; earlier rows are not read.")
flags.DEFINE_integer("num_rows", 0, "From there on; 0: all.")
flags.DEFINE_integer("num_value_prompts", 280, "The first ones.")
flags.DEFINE_enum("prompt_format", "plain", ["plain", "chat"], "Of prompts.")
flags.DEFINE_integer("max_prompt_length", 512, "Tokens.")
flags.DEFINE_integer("max_response_length", 128, "Tokens, end token included.")
flags.DEFINE_enum("too_long", "skip", ["skip", "cut", "error"], "Longer rows.")
# Reward: of the replies, and of rows without one.
flags.DEFINE_list("score_options", [], "name=value, handed to task.score.")
flags.DEFINE_string("reward_model", "", "Replaces the score of the task.")
flags.DEFINE_string("reward_transform", "sigmoid", "Of its logits.")
flags.DEFINE_string("reward_template", "{prompt}{response}", "What it reads.")
flags.DEFINE_integer("reward_length", 512, "Tokens that it reads.")
flags.DEFINE_bool("rescore", False, "Score rows that have rewards, too.")
# Reference, and its replies.
flags.DEFINE_string("policy", None, "The reference.", required=True)
flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of compute.")
flags.DEFINE_integer("sample_batch_size", 64, "Texts at the same time.")
flags.DEFINE_bool("greedy", True, "Else sampled at temperature 1.")
flags.DEFINE_list("stop_strings", [], r"Texts that end a reply; \n in them.")
# Head.
flags.DEFINE_float("max_value", 1.0, "The largest possible reward.")
flags.DEFINE_integer("num_heads", 8, "Of attention.")
flags.DEFINE_float("dropout", 0.1, "Of hidden and pooled states.")
flags.DEFINE_bool("value_pad_mask", True, "False: as in the paper's code.")
flags.DEFINE_float("heldout_fraction", 0.2, "Of the value prompts, to judge.")
flags.DEFINE_integer("epochs", 10, "Over the value prompts.")
flags.DEFINE_integer("batch_size", 16, "Prompts per update.")
flags.DEFINE_float("learning_rate", 1e-5, "Of AdamW, constant.")
FLAGS = flags.FLAGS


def main(_):
  processes.join()
  runs.check_positive(
    FLAGS, "epochs", "batch_size", "sample_batch_size", "max_response_length"
  )
  if not 0 < FLAGS.heldout_fraction < 1:
    raise ValueError(
      "--heldout_fraction must lie between 0 and 1, or nobody knows what the "
      f"value is worth, got {FLAGS.heldout_fraction}."
    )
  may_change = ("workdir", "mesh", "compilation_cache")
  in_force = runs.start(FLAGS, may_change)
  mesh = meshes.make(FLAGS.mesh)
  meshes.check_divisible(FLAGS.batch_size, mesh, "--batch_size")
  meshes.check_divisible(FLAGS.sample_batch_size, mesh, "--sample_batch_size")
  if not FLAGS.task and not (FLAGS.data and FLAGS.value_data):
    raise ValueError("Without a --task, give --data and --value_data.")
  score = scorers.scorer(
    FLAGS.task,
    keywords.parse(FLAGS.score_options),
    FLAGS.reward_model,
    transform=FLAGS.reward_transform,
    template=FLAGS.reward_template,
    max_length=FLAGS.reward_length,
    batch_size=FLAGS.sample_batch_size,
    mesh=mesh,
  )

  # The reference, the log and the prompts.
  loaded = hf.load(FLAGS.policy, dtype=FLAGS.dtype)
  model, tokenizer = loaded.model, loaded.tokenizer
  rules = hf.partition_rules(model, mesh)
  params = meshes.place(
    loaded.params, meshes.shardings(loaded.params, rules, mesh)
  )
  settings = {
    "max_prompt_length": FLAGS.max_prompt_length,
    "max_response_length": FLAGS.max_response_length,
    "too_long": FLAGS.too_long,
    "prompt_format": FLAGS.prompt_format,
  }
  task_options = keywords.parse(FLAGS.task_options)
  rows, unusable = logged.load_or_draw(
    FLAGS.data,
    FLAGS.task and tasks.load(FLAGS.task),
    "train",
    FLAGS.seed,
    task_options,
  )
  rows = rows[FLAGS.first_row :][: FLAGS.num_rows or None]
  encoded = logged.prepare(tokenizer, rows, **settings)
  if FLAGS.value_data:
    prompts, _ = logged.load_prompts(FLAGS.value_data, "validation")
  else:
    prompts = logged.task_prompts(
      tasks.load(FLAGS.task), "validation", FLAGS.seed, FLAGS.num_value_prompts
    )
  prompts = prompts[: FLAGS.num_value_prompts]
  prompts = logged.prepare(tokenizer, prompts, **settings)
  num_prompts = len(prompts.rows)
  num_heldout = round(FLAGS.heldout_fraction * num_prompts)
  if num_heldout < 2 or num_prompts - num_heldout < FLAGS.batch_size:
    raise ValueError(
      f"Of {num_prompts} value prompts, {num_heldout} would be held out and "
      f"{num_prompts - num_heldout} fitted to, in batches of "
      f"{FLAGS.batch_size}: give more prompts or another --heldout_fraction."
    )
  tokens.check_positions(
    sum(cached.lengths(encoded)), model.config.max_positions
  )
  checkpoint.write_flags(FLAGS.workdir, in_force, may_change)
  log = logs.Logs(
    FLAGS.workdir,
    total_steps=FLAGS.epochs,
    columns=("value/mse", "value/heldout_mse", "value/heldout_correlation"),
  )
  with log:
    log.skipped([*unusable, *encoded.skipped, *prompts.skipped])
    rewards = rewards_of(encoded.rows, score, log)

    # Targets: what the reference itself earns, once per prompt.
    respond = samplers.Responder(
      model,
      tokenizer,
      prompts.prompt_ids,
      max_length=FLAGS.max_response_length,
      settings=sampling.Settings(greedy=FLAGS.greedy),
      batch_size=FLAGS.sample_batch_size,
      mesh=mesh,
      seed=FLAGS.seed,
      stop_strings=runs.unescaped(FLAGS.stop_strings),
    )
    replies = respond(params)
    texts = [row.prompt for row in prompts.rows]
    targets, parts = score(texts, replies)
    logged.check_rewards(targets, FLAGS.max_value)
    log.samples(0, samplers.records(texts, replies, targets, parts))

    # The head sees hidden states of prompts, which no reply can change.
    prompt_length = batches.bucket_length(
      max(map(len, [*encoded.prompt_ids, *prompts.prompt_ids]))
    )
    pad = lambda encoded: batches.pad_left(
      encoded.prompt_ids, length=prompt_length
    )
    hidden_of = jax.jit(
      lambda params, batch: model.apply({"params": params}, *batch)
    )
    ids, mask = pad(prompts)
    hidden = meshes.map_batches(
      lambda batch: hidden_of(params, batch),
      (ids, mask),
      FLAGS.sample_batch_size,
      mesh,
    )
    head = heads.AttentionPoolingHead(
      max_value=FLAGS.max_value,
      num_heads=FLAGS.num_heads,
      dropout_rate=FLAGS.dropout,
      pad_mask=FLAGS.value_pad_mask,
    )
    key = jax.random.key(FLAGS.seed)
    head_params = head.init(key, hidden[:1], mask[:1])["params"]
    optimizer = optax.adamw(FLAGS.learning_rate, weight_decay=0.0)
    state = (head_params, optimizer.init(head_params))

    @jax.jit
    def values_of(head_params, batch):
      return head.apply({"params": head_params}, *batch)

    @jax.jit
    def update(state, batch, targets, key):
      def loss_fn(head_params):
        values = head.apply(
          {"params": head_params},
          *batch,
          deterministic=False,
          rngs={"dropout": key},
        )
        return jnp.mean(jnp.square(values - targets))

      head_params, optimizer_state = state
      grads = jax.grad(loss_fn)(head_params)
      updates, optimizer_state = optimizer.update(
        grads, optimizer_state, head_params
      )
      return optax.apply_updates(head_params, updates), optimizer_state

    def judge_prompts(head_params):
      """Values of all prompts, in batches: their states may fill the memory."""
      return meshes.map_batches(
        lambda batch: values_of(head_params, batch),
        (hidden, mask),
        FLAGS.batch_size,
        mesh,
      )

    order = batches.epoch_order(num_prompts, seed=FLAGS.seed, epoch=0)
    heldout, fitted = order[:num_heldout], order[num_heldout:]
    best = (np.inf, None, None)
    steps_per_epoch = len(fitted) // FLAGS.batch_size
    for epoch in range(FLAGS.epochs):
      for step in range(epoch * steps_per_epoch, (epoch + 1) * steps_per_epoch):
        rows = fitted[
          batches.batch_indices(
            len(fitted), FLAGS.batch_size, step, seed=FLAGS.seed
          )
        ]
        batch = meshes.shard_batch((hidden[rows], mask[rows]), mesh)
        state = update(
          state, batch, targets[rows], jax.random.fold_in(key, step)
        )
      values = judge_prompts(state[0])
      metrics = {
        "value/mse": np.mean(np.square(values - targets)[fitted]),
        "value/heldout_mse": np.mean(np.square(values - targets)[heldout]),
        "value/heldout_correlation": correlation(
          values[heldout], targets[heldout]
        ),
      }
      log.write(epoch, metrics)
      if metrics["value/mse"] < best[0]:
        best = (metrics["value/mse"], state[0], metrics)
    _, head_params, metrics = best
    if head_params is None:
      raise ValueError(
        "The error of the value was never a finite number; lower "
        f"--learning_rate={FLAGS.learning_rate}."
      )

    # The log, judged: rewards, values, advantages, reference log-probs.
    values = meshes.map_batches(
      lambda batch: values_of(
        head_params, (hidden_of(params, batch), batch[1])
      ),
      pad(encoded),
      FLAGS.sample_batch_size,
      mesh,
    )
    present = logged.present(encoded.rows)
    # A candidate that is not there is no better than expected.
    advantages = np.where(present, rewards - values[:, None], 0.0)
    arrays = {
      "rewards": rewards,
      "values": values,
      "advantages": advantages.astype(np.float32),
      "ref_log_probs": cached.response_log_probs(
        model,
        params,
        encoded,
        batch_size=FLAGS.sample_batch_size,
        mesh=mesh,
      ),
    }
    made_of = cached.describe(
      encoded,
      loaded.params,
      tokenizer,
      **settings,
      dtype=FLAGS.dtype,
    )
    first = advantages[:, 0]
    table = {
      "reference, mean reward": targets.mean(),
      "reward variance, held out": targets[heldout].var(),
      "value mse, fitted": metrics["value/mse"],
      "value mse, held out": metrics["value/heldout_mse"],
      "correlation of V and R, held out": metrics["value/heldout_correlation"],
      "correlation of V and R, log": correlation(values, rewards[:, 0]),
      "log, mean reward": rewards[:, 0].mean(),
      "positive share": np.mean(first > 0),
      "rows": len(first),
      "rows left out": len(unusable) + len(encoded.skipped),
      "value prompts": num_prompts,
    }
    cached.save(
      FLAGS.workdir,
      arrays,
      made_of,
      {
        "policy": FLAGS.policy,
        "reward": score.description,
        **{name: float(value) for name, value in table.items()},
      },
    )
    log.summary(table, title=os.path.join(FLAGS.workdir, cached.ARRAYS))


def rewards_of(rows, score, log):
  """Rewards of all candidates, `[N, K]`; 0 for one that is not there."""
  rewards, present = logged.reward_array(rows), logged.present(rows)
  unscored = np.argwhere(present & (np.isnan(rewards) | FLAGS.rescore))
  if len(unscored):
    log.note(f"{len(unscored)} of {present.sum()} logged replies are scored.")
    scores, _ = score(
      [rows[i].prompt for i, _ in unscored],
      [rows[i].candidates[k] for i, k in unscored],
    )
    rewards[tuple(unscored.T)] = scores
  logged.check_rewards(rewards, FLAGS.max_value)
  return np.where(present, rewards, 0.0)


def correlation(x, y):
  """Pearson's, or NaN where one of them does not vary."""
  if np.std(x) == 0 or np.std(y) == 0:
    return np.nan
  return float(np.corrcoef(x, y)[0, 1])


if __name__ == "__main__":
  app.run(main)
