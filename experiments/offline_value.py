"""Fits the value of a reference policy, and scores a log by it, once.

A minute on two CPU cores, after experiments/sft.py has made the reference:

  python experiments/offline_value.py --policy=runs/reference \
    --flagfile=experiments/flags/a_lol/word_lists_value.flags \
    --workdir=runs/values

One reply of the reference to each validation prompt is scored, a head on its
frozen hidden states learns the scores, and every row of the log gets its
reference log-probabilities, value and advantage: `reference.npz`, which
experiments/offline.py reads with --cache.

Source: Baheti et al. (2024), arXiv 2305.14718, after the authors' code: one
reply per prompt, attention pooling, the epoch with the lowest training error.
Departures: the head does not see padding, is switched to evaluation before it
is used, and is evaluated on prompts that it was not fitted to.
"""

import contextlib
import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from rljax import cli
from rljax.distributed import meshes
from rljax.evaluation import answers, metrics
from rljax.models import heads, hf
from rljax.scoring import cached
from rljax.text import batches, logged, splits, tokens
from rljax.training import optimizers, runs

# Flags that scripts share; rljax/cli has their help and their bounds.
cli.define_run(save_every=None)
cli.define_task()
cli.define_log()
cli.define_lengths(max_response_length=128, too_long="skip")
cli.define_dev("value", "Prompts whose replies the value is fitted to")
cli.define_reward_model()
cli.define_models(policy="The reference, whose value is fitted.", remat=False)
cli.define_replies()
cli.define_batches(16, text="Prompts of an update.", micro_batches=False)
cli.define_optimizer(1e-5)

# Flags of the value.
flags.DEFINE_integer("epochs", 10, "Passes over the value prompts.", 1)
flags.DEFINE_bool(
  "rescore",
  False,
  "Whether logged replies that have a reward are scored again; those without "
  "one always are.",
)
flags.DEFINE_float(
  "max_value", 1.0, "Largest possible reward, which bounds the value.", 0
)
flags.DEFINE_integer("num_heads", 8, "Attention heads of the value head.", 1)
flags.DEFINE_float(
  "dropout", 0.1, "Dropout rate of hidden and pooled states.", 0, 1
)
flags.DEFINE_bool(
  "value_pad_mask",
  True,
  "Whether the value head is kept from padding; false reproduces the paper's "
  "code.",
)
flags.DEFINE_float(
  "heldout_fraction",
  0.2,
  "Share of the value prompts, between 0 and 1, on which the value is "
  "evaluated instead of fitted.",
)
flags.register_validator(
  "heldout_fraction",
  lambda x: 0 < x < 1,
  "It must lie between 0 and 1, or nobody knows what the value is worth.",
)
FLAGS = flags.FLAGS

COLUMNS = ("value/mse", "value/heldout_mse", "value/heldout_correlation")


def main():
  run = runs.start(FLAGS, total_steps=FLAGS.epochs)
  cli.batch_sizes(FLAGS, run.mesh)
  score = cli.load_scorer(FLAGS, run.mesh, batch_size=FLAGS.sample_batch_size)

  # The reference, the log, and the prompts that the head is fitted to.
  loaded = cli.load_policy(FLAGS)
  model, tokenizer = loaded.model, loaded.tokenizer
  log = cli.read_log(FLAGS, tokenizer)
  asked = cli.read_dev(FLAGS, tokenizer, "value")
  tokens.check_positions(sum(log.lengths), model.config.max_positions)
  answer = cli.load_responder(FLAGS, loaded, asked, run.mesh)
  params = run.place(loaded.params, hf.partition_rules(model, run.mesh))
  heldout, fitted = splits.shuffled(
    asked.texts, FLAGS.heldout_fraction, seed=FLAGS.seed
  )
  num_heldout, num_fitted = len(heldout), len(fitted)
  if num_heldout < 2 or num_fitted < FLAGS.batch_size:
    raise ValueError(
      f"Of {len(asked)} value prompts, {num_heldout} would be held out and "
      f"{num_fitted} fitted to, in batches of {FLAGS.batch_size}: give more "
      "prompts or another --heldout_fraction."
    )
  steps_per_epoch = num_fitted // FLAGS.batch_size

  def in_batches(function, arrays, batch_size=FLAGS.sample_batch_size):
    return meshes.map_batches(function, arrays, batch_size, run.mesh)

  run.file_flags()
  with contextlib.ExitStack() as stack:
    run.open_log(stack, COLUMNS)
    run.has_read(log, asked)
    rewards, num_scored = cached.score(log, score, again=FLAGS.rescore)
    logged.check_rewards(rewards, FLAGS.max_value)
    if num_scored:
      run.note(
        f"{num_scored} of {log.present.sum()} logged replies are scored."
      )

    # Targets: what the reference itself earns, once per prompt.
    replies = answers.evaluate(answer, params, score)
    targets = np.array([row["reward"] for row in replies], np.float32)
    logged.check_rewards(targets, FLAGS.max_value)
    run.samples(0, replies)

    # The head sees hidden states of prompts, which no reply can change.
    prompt_length = max(log.lengths[0], asked.ids.shape[1])
    pad = lambda ids: batches.pad_left(ids, length=prompt_length)
    hidden_of = run.compile(
      lambda params, batch: model.apply({"params": params}, *batch),
      name="hidden states",
    )
    ids, mask = pad(asked.encoded)
    hidden = in_batches(functools.partial(hidden_of, params), (ids, mask))
    head = heads.AttentionPoolingHead(
      max_value=FLAGS.max_value,
      num_heads=FLAGS.num_heads,
      dropout_rate=FLAGS.dropout,
      pad_mask=FLAGS.value_pad_mask,
    )
    key = jax.random.key(FLAGS.seed)
    head_params = head.init(key, hidden[:1], mask[:1])["params"]
    transform = optimizers.make(
      FLAGS.epochs * steps_per_epoch, **cli.optimizer_options(FLAGS)
    )
    state = meshes.replicate(
      (head_params, transform.init(head_params)), run.mesh
    )

    def values_of(head_params, batch):
      return head.apply({"params": head_params}, *batch)

    if FLAGS.value_pad_mask:
      few = slice(FLAGS.batch_size)
      values_at_first = functools.partial(values_of, head_params)
      run.check_rows(values_at_first, hidden[few], mask[few])

    def loss_fn(head_params, batch, targets, key):
      values = head.apply(
        {"params": head_params},
        *batch,
        deterministic=False,
        rngs={"dropout": key},
      )
      return jnp.mean(jnp.square(values - targets))

    def update(state, batch, targets, key):
      head_params, optimizer_state = state
      loss, grads = jax.value_and_grad(loss_fn)(
        head_params, batch, targets, key
      )
      head_params, optimizer_state, metrics = optimizers.step(
        transform, grads, optimizer_state, head_params, {"loss": loss}
      )
      return (head_params, optimizer_state), metrics

    update, values_of = run.compile(update), run.compile(values_of)
    best = (np.inf, None, None)
    for epoch in range(FLAGS.epochs):
      for step in range(epoch * steps_per_epoch, (epoch + 1) * steps_per_epoch):
        rows = fitted[
          batches.batch_indices(
            num_fitted, FLAGS.batch_size, step, seed=FLAGS.seed
          )
        ]
        batch = run.shard((hidden[rows], mask[rows]))
        step_key = jax.random.fold_in(key, step)
        state, learnt = update(state, batch, targets[rows], step_key)
        run.watch(step, learnt)
      # In batches, for the states of all prompts may fill the memory.
      values = in_batches(
        functools.partial(values_of, state[0]),
        (hidden, mask),
        FLAGS.batch_size,
      )
      errors = np.square(values - targets)
      quality = {
        "updates/skipped": learnt["updates/skipped"],
        "value/mse": np.mean(errors[fitted]),
        "value/heldout_mse": np.mean(errors[heldout]),
        "value/heldout_correlation": metrics.correlation(
          values[heldout], targets[heldout]
        ),
      }
      run.log(epoch, quality)
      if quality["value/mse"] < best[0]:
        best = (quality["value/mse"], state[0], quality)
    _, head_params, quality = best
    if head_params is None:
      raise ValueError(
        "The error of the value was never a finite number; lower "
        f"--learning_rate={FLAGS.learning_rate}."
      )

    # Of the log: rewards, values, advantages, reference log-probabilities.
    values = in_batches(
      lambda batch: values_of(
        head_params, (hidden_of(params, batch), batch[1])
      ),
      pad(log.encoded.prompt_ids),
    )
    # A candidate that is not there is no better than expected.
    advantages = np.where(log.present, rewards - values[:, None], 0.0)
    arrays = {
      "rewards": rewards,
      "values": values,
      "advantages": advantages.astype(np.float32),
      "ref_log_probs": cached.response_log_probs(
        model,
        params,
        log.encoded,
        batch_size=FLAGS.sample_batch_size,
        mesh=run.mesh,
      ),
    }
    table = {
      "reference, mean reward": targets.mean(),
      "reward variance, held out": targets[heldout].var(),
      "value mse, fitted": quality["value/mse"],
      "value mse, held out": quality["value/heldout_mse"],
      "correlation of V and R, held out": quality["value/heldout_correlation"],
      "correlation of V and R, log": metrics.correlation(values, rewards[:, 0]),
      "log, mean reward": rewards[:, 0].mean(),
      "positive share": np.mean(advantages[:, 0] > 0),
      "rows": len(rewards),
      "rows left out": len(log.skipped),
      "value prompts": len(asked),
    }
    numbers = {name: float(value) for name, value in table.items()}
    cached.save(
      FLAGS.workdir,
      arrays,
      cached.describe_log(log, loaded, dtype=FLAGS.dtype),
      {"policy": FLAGS.policy, "reward": score.description, **numbers},
    )
    run.finish(table, title=os.path.join(FLAGS.workdir, cached.ARRAYS))


if __name__ == "__main__":
  cli.run(main)
