"""Supervised fine-tuning: next-token loss on prompts and responses.

Ten seconds on two CPU cores, the short warm start of the arithmetic study:

  python experiments/sft.py --flagfile=experiments/flags/padula/sft_cpu.flags \
    --workdir=runs/sft

A pretrained model on a file of rows, of which it learns the first reply, or all
turns of the assistant in a dialogue:

  python experiments/sft.py --policy=smollm2-135m --data=rows.jsonl \
    --workdir=runs/sft --steps=100

A step is one update on --batch_size rows. Prompts are read, and the tokens of
responses are learnt. To try an idea, copy this file and change `examples` (what
is learnt from) or `loss_fn` (how).
"""

import time

import jax
import numpy as np
from absl import flags

from rljax import cli, tasks
from rljax.distributed import meshes
from rljax.generation import rollouts
from rljax.losses import supervised
from rljax.models import fresh, hf
from rljax.text import encoding, feeds, keywords, logged, tokens
from rljax.training import microbatch, optimizers, runs

# Flags that scripts share; rljax/cli has their help and their bounds.
cli.define_run(steps=8, save_every=500, eval_every=50)
cli.define_task(num_eval_prompts=256, eval_split=None, scores=False)
cli.define_log()
cli.define_held_out()
cli.define_examples()
cli.define_lengths(max_response_length=512, too_long="error")
cli.define_models(required=False)
cli.require_examples()
cli.define_random_model(hidden_size=96, num_layers=2, max_positions=64)
cli.define_batches(64)
cli.define_packing()
cli.define_optimizer(2e-5, schedule="cosine", warmup=0.03, max_grad_norm=1.0)

# Flags of supervised fine-tuning.
flags.DEFINE_integer(
  "num_examples",
  256,
  "Training examples that the task draws, where there is no --data.",
  lower_bound=1,
)
flags.DEFINE_enum(
  "tokenizer",
  "word",
  ["word", "character", "grammar"],
  "Tokenizer of the task, for a model that starts from random weights.",
)
flags.DEFINE_integer(
  "vocab_size",
  0,
  "Vocabulary of a model that starts from random weights; 0 takes that of its "
  "tokenizer.",
  lower_bound=0,
)
flags.DEFINE_enum(
  "normalizer",
  "token_mean",
  supervised.NORMALIZERS,
  "What the loss is averaged over: all tokens of a batch, the tokens of each "
  "response and then the responses, or the sums of responses.",
)
flags.DEFINE_integer(
  "schedule_steps",
  0,
  "Updates over which the learning rate falls, --steps or more of them, so "
  "that a run may stop within its schedule; 0 takes --steps.",
  lower_bound=0,
)
flags.register_multi_flags_validator(
  ["schedule_steps", "steps"],
  lambda v: not v["schedule_steps"] or v["schedule_steps"] >= v["steps"],
  "--schedule_steps must not be fewer than --steps.",
)
FLAGS = flags.FLAGS

COLUMNS = ("nll/loss", "eval/loss", "tokens_per_second")


def main():
  run = runs.start(FLAGS, total_steps=FLAGS.steps)
  sizes = cli.batch_sizes(FLAGS, run.mesh)
  task = cli.load_task(FLAGS)

  # The model, and the texts that it learns from.
  if FLAGS.policy:
    loaded = cli.load_policy(FLAGS)
    model, params, tokenizer = loaded.model, loaded.params, loaded.tokenizer
    rules = hf.partition_rules(model, run.mesh)
  else:
    tokenizer = tasks.tokenizer(task, FLAGS.tokenizer)
    model = fresh.make(
      tokenizer=tokenizer,
      vocab_size=FLAGS.vocab_size,
      **cli.random_model_options(FLAGS),
    )
    rules = hf.partition_rules(model, run.mesh)
    # A mesh that cannot split them is an error before anything is compiled.
    meshes.shardings(fresh.shapes(model), rules, run.mesh)
    params = fresh.initial_params(model, FLAGS.seed)
  if FLAGS.stream:
    feed = cli.open_stream(FLAGS, tokenizer)
  else:
    data = examples(task, tokenizer)
    feed = feeds.Table(data, FLAGS.batch_size, FLAGS.seed)
  tokens.check_positions(feed.lengths.sum(), model.config.max_positions)
  pack = cli.pack_feed(FLAGS, run, sizes, feed)

  # What is differentiated.

  def learnt_mask(batch):
    """Which tokens are learnt: of a dialogue, the assistant's."""
    return batch.get("learnt_mask", batch["response_mask"])

  def loss_fn(params, batch):
    statistics, _ = rollouts.token_statistics(
      model,
      params["policy"],
      batch,
      temperature=1.0,
      chunk_size=FLAGS.chunk_size,
    )
    return supervised.nll_loss(
      statistics.log_probs, learnt_mask(batch), normalizer=FLAGS.normalizer
    )

  def weight(part):
    """What the loss of a micro-batch divides by: its tokens or responses."""
    mask = learnt_mask(part)
    is_over_tokens = FLAGS.normalizer == "token_mean"
    return (mask if is_over_tokens else mask.any(axis=1)).sum()

  gradients = microbatch.grad(
    loss_fn, sizes.num_parts, weigh=weight, sharding=run.rows_sharding
  )
  transform = optimizers.make(
    FLAGS.schedule_steps or FLAGS.steps, **cli.optimizer_options(FLAGS)
  )

  def update(state, batch):
    params = state["params"]
    grads, metrics = gradients(params, batch)
    params, optimizer_state, metrics = optimizers.step(
      transform, grads, state["optimizer"], params, metrics
    )
    return {"params": params, "optimizer": optimizer_state}, metrics

  # The state; a run that was stopped goes on from its last checkpoint.
  starts_from = {"policy": params if FLAGS.policy else None}
  state = run.restore({"policy": params}, rules, optimizer=transform)
  update = run.compile(update, returns_state=True)
  feed.go_to(run.meta.get("feed", {}))
  run.check_learner(gradients, state["params"], feed.first(), pack=pack.alone)
  held_out_loss = run.compile(
    lambda params, batch: (loss_fn(params, batch)[0], weight(batch)),
    name="held-out loss",
  )

  def evaluate(step):
    """Mean loss over the held-out rows, in parts that weigh as in training."""
    losses, weights = [], []
    for start in range(0, len(feed.held_out.rows), sizes.micro_batch):
      rows = np.arange(start, start + sizes.micro_batch)
      batch = run.shard(feed.held_out_batch(rows))
      loss, of = held_out_loss(state["params"], batch)
      losses.append(float(loss))
      weights.append(float(of))
    loss = np.average(losses, weights=weights)
    run.keep_best(step, -loss, state["params"])
    return {"eval/loss": loss}

  with run.training(model, tokenizer, starts_from, COLUMNS):
    run.has_read(feed)
    for step in run.steps(freeze=[update, held_out_loss]):
      # Row `step` of the metrics is about the policy after `step` updates.
      metrics = evaluate(step) if step % FLAGS.eval_every == 0 else {}
      started = time.perf_counter()
      batch = run.shard(pack(feed.batch(step)))
      state, learnt = update(state, batch)
      metrics |= feed.metrics | jax.device_get(learnt)
      seconds = time.perf_counter() - started
      metrics["tokens_per_second"] = metrics["nll/tokens"] / seconds
      run.log(step, metrics)
      run.save(step + 1, state, feed=feed.place)
    if run.is_complete:
      run.log(FLAGS.steps, evaluate(FLAGS.steps))
      run.summarise(["nll/loss"])
  return run.exit_status


def examples(task, tokenizer):
  """Rows to learn from and held-out ones as ids, and what was left out."""
  if not FLAGS.data:
    train, held_out = (
      encoding.prepare(
        tokenizer,
        logged.task_examples(
          task, split, FLAGS.seed, num, keywords.parse(FLAGS.task_options)
        ),
        **cli.example_options(FLAGS),
      )
      for split, num in (
        ("train", FLAGS.num_examples),
        ("validation", FLAGS.num_eval_prompts),
      )
    )
    skipped = [*train.skipped, *held_out.skipped]
    return encoding.Split(train, held_out, skipped, {}, [])
  return encoding.examples(
    tokenizer,
    FLAGS.data,
    FLAGS.eval_data,
    share=FLAGS.eval_share,
    most=FLAGS.num_eval_prompts,
    seed=FLAGS.seed,
    first_row=FLAGS.first_row,
    num_rows=FLAGS.num_rows,
    settings=cli.example_options(FLAGS),
  )


if __name__ == "__main__":
  cli.run(main)
