"""Trains a reward model on logged replies: comparisons, or outcomes.

A minute on two CPU cores, on the log of the study of offline methods:
  python experiments/outcome_reward_model.py --policy=runs/reference \
    --task=word_lists --task_options=num=2000 --workdir=runs/reward_model

A language model with a fresh linear head reads a prompt and a reply, and the
score at the last token of the better reply is to be above that of the other.
That is the end token, but for replies which --too_long=cut has shortened; a
RewardModel appends it always. Any flag --reward_model takes the workdir.

--loss=bce learns how likely a solution is right, from samples with rewards in
[0, 1], such as the samples.jsonl of expert_iteration.py:
  python experiments/outcome_reward_model.py --policy=runs/sft \
    --flagfile=experiments/flags/havrilla/merge_sums_orm.flags \
    --data=runs/ei/rounds/1/samples.jsonl --workdir=runs/orm

It reads prefixes as well. With --labels=outcome the label of the whole
solution is that of all its steps, its lines; with --labels=sorm a step is good
if a completion of the prefix that ends in it, or of a later one, was right, by
the "values" in the labels.jsonl of return_conditioned.py. --targets says at
which tokens. The held-out prompts have none in common with training. Held-out
loss is over the targets, everything else is of the last token; all held-out
samples count, balanced or not.

Source of --loss=pairwise: Ouyang et al. (2022), arXiv 2203.02155, section 3.5.
Of --loss=bce: Havrilla et al. (2024), arXiv 2403.04642; of --labels=sorm:
Havrilla et al. (2024), arXiv 2402.10963, without the check that a completion
uses the result of the step.
"""

import collections
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

from rljax import tasks
from rljax.distributed import compiled, meshes, processes
from rljax.evaluation import curves
from rljax.evaluation import metrics as metrics_lib
from rljax.losses import supervised
from rljax.models import hf
from rljax.scoring import cached
from rljax.storage import checkpoint
from rljax.text import batches, keywords, logged, tokens
from rljax.text import solutions as solutions_lib
from rljax.training import logs, runs

# Run.
flags.DEFINE_string("workdir", None, "Checkpoints and logs.", required=True)
flags.DEFINE_integer("seed", 0, "Seed of every source of randomness.")
flags.DEFINE_integer("steps", 200, "Optimizer updates.")
flags.DEFINE_integer("save_every", 500, "Steps between checkpoints.")
flags.DEFINE_integer("eval_every", 100, "Steps between held-out evaluations.")
flags.DEFINE_string("mesh", "data:-1", "Axes data, fsdp, tensor; -1: the rest.")
flags.DEFINE_string("compilation_cache", "~/.cache/rljax", "Empty for none.")
flags.DEFINE_string("wandb_project", "", "Also log to this project.")
# Data: comparisons, or with --loss=bce scored solutions.
flags.DEFINE_string("data", "", "Logged rows, any format; empty: the task's.")
flags.DEFINE_string("eval_data", "", "Held-out rows; empty: the task's.")
flags.DEFINE_float("eval_share", 0.0, "Or this share of the prompts in --data.")
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
flags.DEFINE_enum(
  "loss", "pairwise", ["pairwise", "bce"], "Bradley-Terry; cross-entropy."
)
flags.DEFINE_float("margin", 0.0, "By which the better reply is to lead.")
flags.DEFINE_enum(
  "labels", "outcome", solutions_lib.LABELS, "Of steps, for bce."
)
flags.DEFINE_enum("targets", "tokens", solutions_lib.TARGETS, "What bce reads.")
flags.DEFINE_bool("balance", True, "As many good as bad ones, for bce.")
flags.DEFINE_enum(
  "normalizer",
  "token_mean",
  ["token_mean", "sequence_mean"],
  "What bce is averaged over.",
)
flags.DEFINE_integer("batch_size", 16, "Prompts or solutions per update.")
flags.DEFINE_float("learning_rate", 1e-4, "Highest, of AdamW.")
flags.DEFINE_enum("schedule", "cosine", ["constant", "cosine"], "Down to 0.")
flags.DEFINE_integer("warmup_steps", 0, "Updates.")
flags.DEFINE_float("weight_decay", 0.0, "Of AdamW.")
flags.DEFINE_float("max_grad_norm", 1.0, "0: no clipping.")
FLAGS = flags.FLAGS

# Flags that one of the losses has no use for.
BELONG = {
  "pairwise": ("order", "margin"),
  "bce": ("eval_share", "labels", "targets", "balance", "normalizer"),
}
PANELS = {
  "pairwise": {
    "Loss (nats a comparison)": ["pairwise/loss", "eval/loss"],
    "Comparisons in the right order": ["pairwise/accuracy", "eval/accuracy"],
  },
  "bce": {
    "Loss (nats a target)": ["bce/loss", "eval/loss"],
    "Right": ["bce/accuracy", "eval/accuracy", "eval/auc"],
    "Samples of a prompt": ["eval/rerank", "eval/sample_accuracy"],
  },
}
# Below this, a policy that is trained against the model finds its errors.
LEAST_AUC = 0.8


def main(_):
  processes.join()
  runs.check_positive(
    FLAGS,
    *("steps", "save_every", "eval_every", "batch_size", "num_eval_rows"),
  )
  is_bce = FLAGS.loss == "bce"
  for loss, names in BELONG.items():
    for name in names:
      if loss != FLAGS.loss and FLAGS[name].value != FLAGS[name].default:
        raise ValueError(
          f"--{name}={FLAGS[name].value} belongs to --loss={loss}."
        )
  if FLAGS.eval_share and (not FLAGS.data or FLAGS.eval_data):
    raise ValueError("--eval_share needs --data, and no --eval_data.")
  if bool(FLAGS.data) != bool(FLAGS.eval_data or FLAGS.eval_share) or not (
    FLAGS.data or FLAGS.task
  ):
    or_share = " (or --eval_share)" if is_bce else ""
    raise ValueError(
      f"Give --data and --eval_data{or_share}, or a --task and neither."
    )
  may_change = ("workdir", "mesh", "compilation_cache", "wandb_project")
  in_force = runs.start(FLAGS, may_change)
  mesh = meshes.make(FLAGS.mesh)
  meshes.check_divisible(FLAGS.batch_size, mesh, "--batch_size")

  # The model, in two parts: what learns, and what is left alone.
  loaded = hf.classifier_from(
    hf.load(FLAGS.policy, dtype=FLAGS.dtype, remat=FLAGS.remat), seed=FLAGS.seed
  )
  model, tokenizer = loaded.model, loaded.tokenizer
  rules = hf.partition_rules(model, mesh)
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

  # What it learns from, as ids.
  read = solutions if is_bce else comparisons
  train, held_out, skipped, counts = read(tokenizer)
  unit = "solutions" if is_bce else "comparisons"
  if len(train.rows) < FLAGS.batch_size:
    raise ValueError(
      f"--batch_size={FLAGS.batch_size} is more than the {len(train.rows)} "
      f"{unit}."
    )
  lengths = np.max([cached.lengths(part) for part in (train, held_out)], 0)
  tokens.check_positions(lengths.sum(), model.config.max_positions)
  if is_bce:
    batch_of = functools.partial(solution_batch, lengths)
  else:
    num_candidates = max(
      len(row.candidates) for part in (train, held_out) for row in part.rows
    )
    batch_of = functools.partial(comparison_batch, lengths, num_candidates)

  def score(learnt, frozen, batch):
    """The score of every text `[B, K]`, or of its prefixes `[B, T]`."""
    variables = {"params": joined(learnt, frozen)}
    ids, mask = batch["ids"], batch["mask"]
    if is_bce:
      logits = model.apply(variables, ids, mask, method="token_logits")
      return logits[:, -lengths[1] :, 0]  # Those of responses.
    texts = (ids.shape[0] * ids.shape[1], ids.shape[2])
    logits = model.apply(variables, ids.reshape(texts), mask.reshape(texts))
    return logits.reshape(batch["present"].shape)

  def loss_fn(learnt, frozen, batch):
    scores = score(learnt, frozen, batch)
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
  update = compiled.Compiled(
    "update", update, donate_argnums=0, out_shardings=(state_shardings, None)
  )
  judge = compiled.Compiled(
    "judge",
    score
    if is_bce
    else lambda learnt, frozen, batch: loss_fn(learnt, frozen, batch)[1],
  )

  def evaluate():
    """Metrics on the held-out rows; batches weigh by their rows."""
    num_rows = len(held_out.rows)
    if is_bce:
      arrays = batch_of(held_out, np.arange(num_rows))
      logits = meshes.map_batches(
        lambda batch: meshes.replicate(
          judge(state["learnt"], frozen, batch), mesh
        ),
        arrays,
        FLAGS.batch_size,
        mesh,
      )
      return verdict(held_out, arrays, logits)
    found, weights = [], []
    for start in range(0, num_rows, FLAGS.batch_size):
      rows = np.arange(start, start + FLAGS.batch_size)
      batch = batch_of(held_out, rows % num_rows)
      batch["present"] &= (rows < num_rows)[:, None]
      batch = meshes.shard_batch(batch, mesh)
      found.append(jax.device_get(judge(state["learnt"], frozen, batch)))
      weights.append(np.sum(rows < num_rows))
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
    columns=(
      f"{FLAGS.loss}/loss",
      "eval/auc" if is_bce else "eval/accuracy",
      f"{unit}_per_second",
    ),
    wandb_project=FLAGS.wandb_project,
  )
  for message in checkpoints.messages:
    log.note(message)
  log.skipped(skipped)
  for name, count in counts.items():
    log.note(f"{name}: {count}.")
  log.curves(functools.partial(curves.curves, panels=PANELS[FLAGS.loss]))
  with log, checkpoints, checkpoint.Preemption() as preemption:
    for step in range(first_step, FLAGS.steps):
      metrics = evaluate() if step and step % FLAGS.eval_every == 0 else {}
      started = time.perf_counter()
      rows = batches.batch_indices(
        len(train.rows), FLAGS.batch_size, step, seed=FLAGS.seed
      )
      batch = meshes.shard_batch(batch_of(train, rows), mesh)
      state, found = update(state, frozen, batch)
      metrics |= jax.device_get(found)
      seconds = time.perf_counter() - started
      metrics[f"{unit}_per_second"] = FLAGS.batch_size / seconds
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
    if is_bce and (doubts := doubts_about(metrics)):
      log.note(f"WARNING: not fit to be a reward: {'; '.join(doubts)}.")
    names = ("auc", "rerank", "samples_per_prompt", "sample_accuracy")
    log.summary(
      {
        f"held-out {unit}": len(held_out.rows),
        "held-out accuracy": metrics["eval/accuracy"],
        "held-out loss (nats)": metrics["eval/loss"],
        **{
          f"held-out {name.replace('_', ' ')}": metrics[f"eval/{name}"]
          for name in names
          if f"eval/{name}" in metrics
        },
        unit: len(train.rows),
        **counts,
        "rows left out": len(skipped),
        "reward model": FLAGS.workdir,
      }
    )


# Comparisons.


def comparisons(tokenizer):
  """Training and held-out rows as ids, and what was left out."""
  options = keywords.parse(FLAGS.task_options)
  skipped = []

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
      tokenizer, kept, prompt_format=FLAGS.prompt_format, **limits()
    )
    skipped.extend([*unusable, *encoded.skipped])
    return encoded

  train = compared(FLAGS.data, "train", FLAGS.first_row, FLAGS.num_rows)
  held_out = compared(FLAGS.eval_data, "validation", 0, FLAGS.num_eval_rows)
  return train, held_out, skipped, {}


def comparison_batch(lengths, num_candidates, part, rows):
  """Whole texts `[B, K, S]`, padded on both sides, and which there are."""
  batch = logged.batch(
    part,
    np.repeat(rows, num_candidates),
    np.tile(np.arange(num_candidates), len(rows)),
    prompt_length=lengths[0],
    response_length=lengths[1],
  )
  shape = (len(rows), num_candidates)
  rewards = [  # Where a row's own order counts, it has no ties.
    row.rewards if by_reward(row) else -np.arange(len(row.candidates))
    for row in (part.rows[i] for i in rows)
  ]
  return {
    **{name: x.reshape(*shape, -1) for name, x in whole(batch).items()},
    "present": batch["response_mask"].any(axis=1).reshape(shape),
    "rewards": np.float32(
      [np.pad(r, (0, num_candidates - len(r))) for r in rewards]
    ),
  }


def by_reward(row):
  """Whether rewards say which reply is better; else their order does."""
  if FLAGS.order == "reward" and row.rewards is None:
    raise ValueError(f'{row.place}: "reward" is missing, for --order=reward.')
  return row.rewards is not None and FLAGS.order != "logged"


# Outcomes.


def solutions(tokenizer):
  """Training and held-out solutions as ids, and what was left out."""
  options = keywords.parse(FLAGS.task_options)

  def scored(name, split):
    if name:
      found, unusable = solutions_lib.load(name.split(","), split, FLAGS.labels)
    else:
      rows = logged.task_rows(
        tasks.load(FLAGS.task), split, FLAGS.seed, options
      )
      found, unusable = solutions_lib.from_rows(rows), []
    skipped.extend(unusable)
    return found

  def rendered(rows):
    rows, unusable = logged.render(rows, tokenizer, FLAGS.prompt_format)
    skipped.extend(unusable)
    return rows

  def labelled(rows):
    encoded = logged.encode(tokenizer, rows, **limits())
    skipped.extend(encoded.skipped)
    return solutions_lib.label_tokens(encoded, tokenizer, FLAGS.targets)

  if FLAGS.labels == "sorm" and not FLAGS.data:
    raise ValueError("--labels=sorm needs --data with values of steps.")
  skipped = []
  rows = scored(FLAGS.data, "train")[FLAGS.first_row :]
  rows = rendered(rows[: FLAGS.num_rows or None])
  if FLAGS.eval_share:
    rows, held_out = solutions_lib.split_prompts(
      rows, FLAGS.eval_share, seed=FLAGS.seed
    )
    num_shared = 0
  else:
    held_out = rendered(scored(FLAGS.eval_data, "validation"))
    asked = {row.prompt for row in held_out}
    num_rows = len(rows)
    rows = [row for row in rows if row.prompt not in asked]
    num_shared = num_rows - len(rows)
    if not rows:
      raise ValueError("All prompts of the training rows are held out.")
  # Samples of the held-out prompts count as often as they were drawn.
  held_out = labelled(held_out[: FLAGS.num_eval_rows])
  if len({row.is_positive for row in held_out.rows}) < 2:
    raise ValueError(
      f"All {len(held_out.rows)} held-out solutions have the same outcome; "
      "give more (--num_eval_rows)."
    )
  distinct = solutions_lib.distinct(rows)
  train = labelled(distinct)
  num_rows, num_targets = len(train.rows), int(train.is_target.sum())
  if FLAGS.balance:
    train = solutions_lib.balance(
      train, by_step=FLAGS.labels == "sorm", seed=FLAGS.seed
    )
  return (
    train,
    held_out,
    skipped,
    {
      "solutions of held-out prompts left out": num_shared,
      "duplicates left out": len(rows) - len(distinct),
      "solutions left out for balance": num_rows - len(train.rows),
      "targets left out for balance": num_targets - int(train.is_target.sum()),
      "good solutions": sum(row.is_positive for row in train.rows),
      "targets": int(train.is_target.sum()),
      "good targets": int(np.sum(train.labels[train.is_target] >= 0.5)),
    },
  )


def solution_batch(lengths, part, rows):
  """Whole texts `[B, S]`, padded on both sides, and labels `[B, T]`."""
  batch = logged.batch(
    part,
    rows,
    np.zeros(len(rows), int),
    prompt_length=lengths[0],
    response_length=lengths[1],
  )
  missing = ((0, 0), (0, lengths[1] - part.labels.shape[1]))
  return {
    **whole(batch),
    "labels": np.pad(part.labels[rows], missing),
    "is_target": np.pad(part.is_target[rows], missing),
  }


def verdict(part, arrays, logits):
  """How well logits `[N, T]` tell right solutions from wrong ones."""
  loss, _ = supervised.outcome_loss(
    logits, arrays["labels"], arrays["is_target"], normalizer=FLAGS.normalizer
  )
  last = [len(ids) - 1 for (ids,) in part.response_ids]
  scores = np.float64(logits[np.arange(len(last)), last])
  is_right = np.array([row.is_positive for row in part.rows])
  metrics = {
    "eval/loss": float(loss),
    "eval/accuracy": np.mean((scores > 0) == is_right),
    "eval/auc": np.nan,
  }
  samples = collections.defaultdict(list)
  for i, row in enumerate(part.rows):
    samples[row.prompt].append(i)
  several = [found for found in samples.values() if len(found) > 1]
  if several:
    metrics |= {
      "eval/rerank": np.nan,
      "eval/sample_accuracy": np.mean([is_right[i].mean() for i in several]),
      "eval/samples_per_prompt": np.mean(list(map(len, several))),
    }
  if not np.all(np.isfinite(scores)):
    return metrics
  metrics["eval/auc"] = metrics_lib.area_under_curve(scores, is_right)
  if several:
    # A sample without an answer is never chosen; the answers do not matter.
    answers = [part.rows[i].has_answer or None for i in range(len(last))]
    metrics["eval/rerank"] = np.mean(
      [
        metrics_lib.rerank([answers[i] for i in of], is_right[of], scores[of])
        for of in several
      ]
    )
  return metrics


def doubts_about(metrics):
  """Why a policy should not be trained against the model."""
  doubts = []
  if not metrics["eval/auc"] > LEAST_AUC:
    doubts.append(
      f"the held-out AUC is {metrics['eval/auc']:.3f}, not above {LEAST_AUC}"
    )
  if "eval/rerank" in metrics:
    rerank, mean = metrics["eval/rerank"], metrics["eval/sample_accuracy"]
    if not rerank > mean:
      doubts.append(
        f"the sample with the highest score is right on {rerank:.3f} of the "
        f"prompts, a sample by chance on {mean:.3f}"
      )
  return doubts


# Both.


def limits():
  """How long rows may be."""
  return {
    "max_prompt_length": FLAGS.max_prompt_length,
    "max_response_length": FLAGS.max_response_length,
    "too_long": FLAGS.too_long,
  }


def whole(batch):
  """Prompts and their responses in one row."""
  return {
    name: np.concatenate(
      [batch[f"prompt_{name}"], batch[f"response_{name}"]], axis=1
    )
    for name in ("ids", "mask")
  }


if __name__ == "__main__":
  app.run(main)
