"""Trains a reward model on logged replies: comparisons, or outcomes.

A minute on two CPU cores, on the log of the study of offline methods:

  python experiments/outcome_reward_model.py --policy=runs/reference \
    --task=word_lists --task_options=num=2000 --workdir=runs/reward_model

A language model with a fresh linear head reads a prompt and a reply, and the
score at the last token of the better reply is to be above that of the other.
That is the end token, but for replies which --too_long=cut has shortened; a
RewardModel appends it always. Any flag --reward_model takes the workdir. A step
is one update on --batch_size prompts or solutions.

--loss=bce learns how likely a solution is right, from samples with rewards in
[0, 1], such as the samples.jsonl of expert_iteration.py:

  python experiments/outcome_reward_model.py --policy=runs/sft \
    --flagfile=experiments/flags/havrilla/merge_sums_orm.flags \
    --data=runs/ei/rounds/1/samples.jsonl --workdir=runs/orm

It reads prefixes as well. With --labels=outcome the label of the whole
solution is that of all its steps, its lines; with --labels=sorm a step is good
if a completion of the prefix that ends in it, or of a later one, was right, by
the "values" in the labels.jsonl of return_conditioned.py. Held-out loss is over
the targets, everything else is of the last token; all held-out samples count,
balanced or not, and none of their prompts is in the training.

Source of --loss=pairwise: Ouyang et al. (2022), arXiv 2203.02155, section 3.5.
Of --loss=bce: Havrilla et al. (2024), arXiv 2403.04642; of --labels=sorm:
Havrilla et al. (2024), arXiv 2402.10963, without the check that a completion
uses the result of the step.
"""

import functools
import time

import jax
import numpy as np
from absl import flags

from rljax import cli
from rljax.distributed import meshes
from rljax.evaluation import metrics as metrics_lib
from rljax.generation import packed, rollouts
from rljax.losses import supervised
from rljax.models import hf
from rljax.text import feeds, keywords, paired, rankings, solutions, tokens
from rljax.training import frozen, microbatch, optimizers, runs

# Flags that scripts share; rljax/cli has their help and their bounds.
cli.define_run(steps=200, save_every=500, eval_every=100)
cli.define_task(scores=False)
cli.define_log()
cli.define_held_out()
cli.define_lengths(max_response_length=128, too_long="skip")
cli.define_models(policy="Model that the reward model starts as.", logits=False)
cli.define_batches(16, text="Prompts, or for --loss=bce solutions, of a step.")
cli.define_packing()
cli.define_stream("packed_length")
cli.define_pairwise()
cli.define_optimizer(1e-5, schedule="cosine", warmup=0.03, max_grad_norm=1.0)

# Flags of reward models.
flags.DEFINE_integer(
  "num_eval_rows", 256, "Most held-out rows of an evaluation, the first.", 1
)
flags.DEFINE_string(
  "frozen",
  "",
  "Parameters that are left as they are: a regular expression that is searched "
  "in their paths; empty trains all.",
)
flags.DEFINE_enum(
  "loss",
  "pairwise",
  ["pairwise", "bce"],
  "What is learnt: pairwise, which of two replies is better (Bradley-Terry); "
  "bce, how likely a solution is right (binary cross-entropy).",
)
flags.DEFINE_enum(
  "order",
  "",
  rankings.ORDERS,
  "What ranks the replies of a row, for --loss=pairwise: its order in the log "
  "or their rewards; empty: rewards where a row has them, else the order.",
)
flags.DEFINE_enum(
  "labels",
  "outcome",
  solutions.LABELS,
  "Labels of the steps of a solution, for --loss=bce: that of its outcome, or "
  "whether a completion was right (sorm).",
)
flags.DEFINE_enum(
  "targets",
  "tokens",
  solutions.TARGETS,
  "Tokens that --loss=bce learns from: all of a solution, the ends of its "
  "steps, or the last one.",
)
flags.DEFINE_bool(
  "balance",
  True,
  "Whether --loss=bce learns from as many good as bad solutions (or steps, "
  "with --labels=sorm), by leaving some out.",
)
flags.DEFINE_enum(
  "normalizer",
  "token_mean",
  ["token_mean", "sequence_mean"],
  "What --loss=bce is averaged over: all targets of a batch, or the targets of "
  "each solution and then the solutions.",
)
FLAGS = flags.FLAGS

# Flags that one of the losses has no use for.
BELONG = {
  "pairwise": ("order", "margin", "reward_margin", "center_coef"),
  "bce": ("labels", "targets", "balance", "normalizer"),
}


def main():
  run = runs.start(FLAGS, total_steps=FLAGS.steps)
  sizes = cli.batch_sizes(FLAGS, run.mesh)
  check_flags()
  is_bce = FLAGS.loss == "bce"

  # The model; --frozen says which of its parameters do not learn.
  base = cli.load_policy(FLAGS)
  loaded = hf.classifier_from(base, seed=FLAGS.seed)
  model, tokenizer = loaded.model, loaded.tokenizer
  params = {"reward_model": loaded.params}
  split = functools.partial(frozen.split, pattern=FLAGS.frozen)
  split(params)

  # What it learns from, as ids.
  unit = "solutions" if is_bce else "comparisons"
  feed = (
    cli.open_rankings(FLAGS, tokenizer) if FLAGS.stream else read(tokenizer)
  )
  tokens.check_positions(feed.lengths.sum(), model.config.max_positions)
  pack = cli.pack_feed(FLAGS, run, sizes, feed)

  # What is differentiated.
  def score(params, batch):
    """The score of every reply `[B, K]`, or of its beginnings `[B, T]`."""
    params = params["reward_model"]
    if is_bce:
      return rollouts.prefix_logits(model, params, batch)[..., 0]
    # [B, K, S] -> [B * K, S]
    scores = rollouts.text_logits(model, params, packed.texts(batch))
    return scores.reshape(batch["present"].shape)

  def loss_of(scores, batch):
    if is_bce:
      return supervised.outcome_loss(
        scores,
        batch["labels"],
        batch["is_target"],
        normalizer=FLAGS.normalizer,
      )
    return supervised.pairwise_loss(
      scores,
      batch["present"],
      rewards=batch["rewards"],
      **cli.pairwise_options(FLAGS),
    )

  def weight(part):
    """What --loss=bce divides by: targets, or solutions that have any."""
    is_over_targets = FLAGS.normalizer == "token_mean"
    mask = part["is_target"]
    return (mask if is_over_targets else mask.any(axis=1)).sum()

  gradients = microbatch.grad(
    lambda learnt, batch, others: loss_of(
      score(frozen.join(learnt, others), batch), batch
    ),
    sizes.num_parts,
    weigh=weight if is_bce else None,
    sharding=run.rows_sharding,
  )
  transform = optimizers.make(FLAGS.steps, **cli.optimizer_options(FLAGS))

  def update(state, batch):
    learnt, others = split(state["params"])
    grads, metrics = gradients(learnt, batch, others)
    learnt, optimizer_state, metrics = optimizers.step(
      transform, grads, state["optimizer"], learnt, metrics
    )
    params = frozen.join(learnt, others)
    return {"params": params, "optimizer": optimizer_state}, metrics

  # The state; a run that was stopped goes on from its last checkpoint.
  state = run.restore(
    params,
    hf.partition_rules(model, run.mesh),
    optimizer=transform._replace(
      init=lambda params: transform.init(split(params)[0])
    ),
  )
  update = run.compile(update, returns_state=True)
  learnt, others = split(state["params"])
  feed.go_to(run.meta.get("feed", {}))
  run.check_learner(
    *(gradients, learnt, feed.first()),
    more=lambda batch: (others,),
    pack=pack.alone,
  )
  score_rows = run.compile(score, out_shardings=run.rows_sharding)
  held_out = feed.held_out
  questions = feed.held_out_batch(np.arange(len(held_out.rows)))

  def evaluate(step):
    """Metrics on the held-out rows; --keep_best keeps the lowest loss."""
    scores = meshes.map_batches(
      functools.partial(score_rows, state["params"]),
      questions,
      sizes.micro_batch,
      run.mesh,
    )
    _, metrics = loss_of(scores, questions)
    metrics = {
      f"eval/{name}": float(metrics[f"{FLAGS.loss}/{name}"])
      for name in ("loss", "accuracy")
    }
    if is_bce:  # Of whole solutions: the score at the last token.
      last = [len(ids) - 1 for (ids,) in held_out.response_ids]
      verdicts = metrics_lib.of_verdicts(
        scores[np.arange(len(last)), last],
        [row.is_positive for row in held_out.rows],
        [row.prompt for row in held_out.rows],
        [row.has_answer for row in held_out.rows],
      )
      metrics |= {f"eval/{name}": x for name, x in verdicts.items()}
    run.keep_best(step, -metrics["eval/loss"], state["params"])
    return metrics

  columns = (
    f"{FLAGS.loss}/loss",
    "eval/auc" if is_bce else "eval/accuracy",
    f"{unit}_per_second",
  )
  with run.training(model, tokenizer, {"policy": base.params}, columns):
    run.has_read(feed)
    for name, count in feed.known.items():
      run.note(f"{name}: {count}.")
    for step in run.steps(freeze=[update, score_rows]):
      # Row `step` of the metrics is about the model after `step` updates.
      metrics = evaluate(step) if step % FLAGS.eval_every == 0 else {}
      started = time.perf_counter()
      batch = pack(feed.batch(step))
      state, found = update(state, run.shard(batch))
      metrics |= feed.metrics | jax.device_get(found)
      seconds = time.perf_counter() - started
      metrics[f"{unit}_per_second"] = FLAGS.batch_size / seconds
      run.log(step, metrics)
      run.save(step + 1, state, feed=feed.place)
    if run.is_complete:
      metrics = evaluate(FLAGS.steps)
      run.log(FLAGS.steps, metrics)
      if is_bce and (doubts := metrics_lib.doubts(metrics, prefix="eval/")):
        run.note(f"WARNING: not fit to be a reward: {'; '.join(doubts)}.")
      run.finish(
        {
          unit: feed.size,
          f"held-out {unit}": len(held_out.rows),
          **feed.known,
          "rows left out": len(feed.skipped),
          **metrics,
          "reward model": FLAGS.workdir,
        }
      )
  return run.exit_status


def check_flags():
  """Raises ValueError for flags that do not fit each other."""
  if FLAGS.stream and FLAGS.loss == "bce":
    raise ValueError(
      "--loss=bce labels and balances solutions by the whole log, which a "
      "stream does not know: leave out --stream."
    )
  for loss, names in BELONG.items():
    for name in names:
      if loss != FLAGS.loss and FLAGS[name].value != FLAGS[name].default:
        raise ValueError(
          f"--{name}={FLAGS[name].value} belongs to --loss={loss}."
        )
  if FLAGS["eval_share"].present and (not FLAGS.data or FLAGS.eval_data):
    raise ValueError("--eval_share needs --data, and no --eval_data.")
  if FLAGS.eval_data and not FLAGS.data or not (FLAGS.data or FLAGS.task):
    raise ValueError(
      "Give --data (--eval_data or --eval_share of it is held out), or a "
      "--task and neither."
    )
  if FLAGS.labels == "sorm" and not FLAGS.data:
    raise ValueError("--labels=sorm needs --data with values of steps.")


def read(tokenizer):
  """Rows to learn from and held-out ones, as ids, in batches."""
  shared = {
    "eval_share": FLAGS.eval_share,
    "num_eval_rows": FLAGS.num_eval_rows,
    "first_row": FLAGS.first_row,
    "num_rows": FLAGS.num_rows,
    "task": cli.load_task(FLAGS),
    "seed": FLAGS.seed,
    "options": keywords.parse(FLAGS.task_options),
    **cli.length_options(FLAGS),
  }
  files = tokenizer, FLAGS.data, FLAGS.eval_data
  if FLAGS.loss == "pairwise":
    data = rankings.read(*files, order=FLAGS.order, **shared)
    return paired.ranked_table(data, FLAGS.batch_size, FLAGS.seed)
  data = solutions.read(
    *files,
    labels=FLAGS.labels,
    targets=FLAGS.targets,
    balance_labels=FLAGS.balance,
    **shared,
  )
  return feeds.Table(
    *(data, FLAGS.batch_size, FLAGS.seed),
    make=solutions.batch,
    unit="solutions",
  )


if __name__ == "__main__":
  cli.run(main)
