"""Learns from comparisons of logged replies: DPO, IPO, PRO, KTO, SimPO, ORPO.

Half a minute on two CPU cores, after `experiments/sft.py` has made the
reference:
  python experiments/preference.py --algorithm=dpo --policy=runs/reference \
    --flagfile=experiments/flags/a_lol/word_lists_preference.flags \
    --workdir=runs/dpo

Rows of the log have two replies or more. Which is the better one, their order
says, as people made it, or their rewards do (--order). PRO ranks all replies of
a row, by rewards that are the raw logits of a reward model: the sigmoid that
other methods see would flatten its temperatures. The others set the best reply
against the worst one; KTO learns from each of the two by itself.

The policy starts as the reference. The parameters with the best reward on the
prompts of --dev_data lie in <workdir>/best, the last ones in <workdir>.

A loss is a mean over rows that count alike, so micro-batches change nothing but
rounding. KTO's reference point is found for the whole batch first. With
--kto_threshold, a micro-batch may lack good or bad replies, and
"kto/desirable_reward" and "kto/undesirable_reward" are then means of unlike
means.

Source: see the losses. DPO and PRO have the settings of Baheti et al. (2024),
arXiv 2305.14718. Departures: reference log-probabilities are read or worked out
once; gradients of micro-batches are averaged, not summed; PRO scores the tokens
of replies, unless --pro_mask=published; no layer has dropout, so that the
policy is the reference at first.
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
from rljax.evaluation import metrics as metrics_lib
from rljax.generation import rollouts, samplers
from rljax.losses import preference
from rljax.models import hf
from rljax.ops import log_probs, sampling
from rljax.scoring import cached, scorers
from rljax.storage import checkpoint
from rljax.text import batches, files, keywords, logged, tokens
from rljax.training import logs, runs

ALGORITHMS = ("dpo", "ipo", "pro", "kto", "simpo", "orpo")

# Run.
flags.DEFINE_string("workdir", None, "Checkpoints and logs.", required=True)
flags.DEFINE_integer("seed", 0, "Seed of every source of randomness.")
flags.DEFINE_integer("steps", 9000, "Updates.")
flags.DEFINE_integer("save_every", 500, "Steps between checkpoints.")
flags.DEFINE_integer("eval_every", 900, "Steps.")
flags.DEFINE_string("mesh", "data:-1", "Axes data, fsdp, tensor; -1: the rest.")
flags.DEFINE_string("compilation_cache", "~/.cache/rljax", "Empty for none.")
flags.DEFINE_string("wandb_project", "", "Also log to this project.")
# Data: the log, what the reference says of it, and prompts to select by.
flags.DEFINE_string("data", "", "Logged rows, any format; empty: the task's.")
flags.DEFINE_string("cache", "", "Workdir of offline_value.py.")
flags.DEFINE_string("dev_data", "", "Prompts; empty: the task's validation.")
flags.DEFINE_string("task", "", "A module of rljax.tasks.")
flags.DEFINE_list("task_options", [], "name=value, handed to the task.")
flags.DEFINE_integer("first_row", 0, "Of the log; earlier rows are not read.")
flags.DEFINE_integer("num_rows", 0, "From there on; 0: all.")
flags.DEFINE_integer("num_dev_prompts", 280, "The first ones.")
flags.DEFINE_enum("prompt_format", "plain", ["plain", "chat"], "Of prompts.")
flags.DEFINE_integer("max_prompt_length", 512, "Tokens.")
flags.DEFINE_integer("max_response_length", 128, "Tokens, end token included.")
flags.DEFINE_enum("too_long", "skip", ["skip", "cut", "error"], "Longer rows.")
flags.DEFINE_enum(
  "order",
  "",
  ["", "logged", "reward"],
  "What ranks replies; empty: reward for pro with rewards, else logged.",
)
# Reward of the replies to the dev prompts.
flags.DEFINE_list("score_options", [], "name=value, handed to task.score.")
flags.DEFINE_string("reward_model", "", "Replaces the score of the task.")
flags.DEFINE_string("reward_transform", "sigmoid", "Of its logits.")
flags.DEFINE_string("reward_template", "{prompt}{response}", "What it reads.")
flags.DEFINE_integer("reward_length", 512, "Tokens that it reads.")
# Policy, and its replies.
flags.DEFINE_string("policy", None, "It starts as this.", required=True)
flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of compute.")
flags.DEFINE_bool("remat", False, "Recompute layers in the backward pass.")
flags.DEFINE_integer("chunk_size", 0, "Positions with logits; 0: what fits.")
flags.DEFINE_integer("sample_batch_size", 64, "Texts at the same time.")
flags.DEFINE_bool("greedy", True, "Else sampled at temperature 1.")
flags.DEFINE_list("stop_strings", [], r"Texts that end a reply; \n in them.")
# Method.
flags.DEFINE_enum("algorithm", "dpo", ALGORITHMS, "See the losses.")
flags.DEFINE_float(
  "beta", None, "Of dpo, ipo, kto: 0.1 if left out; of simpo: 2."
)
flags.DEFINE_enum(
  "dpo_loss_type", "sigmoid", ["sigmoid", "robust", "hinge"], "Of dpo."
)
flags.DEFINE_float("label_smoothing", 0.0, "Share of wrong labels, for dpo.")
flags.DEFINE_bool("reference_free", False, "Dpo without the reference.")
flags.DEFINE_bool("ipo_per_token", False, "Means over tokens instead of sums.")
flags.DEFINE_float("kto_threshold", None, "Least reward of a good reply.")
flags.DEFINE_float("desirable_weight", 1.0, "Of good replies, for kto.")
flags.DEFINE_float("undesirable_weight", 1.0, "Of bad replies, for kto.")
flags.DEFINE_bool("pro_rewards", True, "False: every temperature is 1.")
flags.DEFINE_enum("pro_mask", "correct", ["correct", "published"], "Of pro.")
flags.DEFINE_float("sft_weight", 0.05, "Of the best reply's NLL, for pro.")
flags.DEFINE_float("simpo_gamma", 1.0, "Margin of simpo.")
flags.DEFINE_float("orpo_lambda", 0.1, "Of the odds ratio, for orpo.")
# Updates.
flags.DEFINE_integer("batch_size", 16, "Rows per update, with all replies.")
flags.DEFINE_integer("micro_batch_size", 0, "Rows per pass; 0: a batch.")
flags.DEFINE_float("learning_rate", 2e-4, "Of AdamW.")
flags.DEFINE_enum("schedule", "constant", ["constant", "linear"], "Down to 0.")
flags.DEFINE_float("adam_epsilon", 1e-8, "")
flags.DEFINE_float("weight_decay", 0.0, "")
flags.DEFINE_float("max_grad_norm", 0.3, "0: no clipping.")
FLAGS = flags.FLAGS

# Which methods read a flag; the others refuse it.
READ_BY = {
  "beta": ("dpo", "ipo", "kto", "simpo"),
  "dpo_loss_type": ("dpo",),
  "label_smoothing": ("dpo",),
  "reference_free": ("dpo",),
  "ipo_per_token": ("ipo",),
  "kto_threshold": ("kto",),
  "desirable_weight": ("kto",),
  "undesirable_weight": ("kto",),
  "pro_rewards": ("pro",),
  "pro_mask": ("pro",),
  "sft_weight": ("pro",),
  "simpo_gamma": ("simpo",),
  "orpo_lambda": ("orpo",),
}
# Under which names the losses report; ipo is one of the losses of dpo.
LOSSES = ("dpo", "pro", "kto", "simpo", "orpo")
COLUMNS = (
  *(f"{name}/{metric}" for name in LOSSES for metric in ("loss", "accuracy")),
  *("dev/reward", "dev/words", "tokens_per_second"),
)
PANELS = {
  "Reward of the dev prompts": ["dev/reward"],
  "Loss": [f"{name}/loss" for name in LOSSES],
  "Share of rows in order": [f"{name}/accuracy" for name in LOSSES],
  "Log-probability of a reply": [
    f"{name}/{which}_log_prob"
    for name in LOSSES
    for which in ("chosen", "rejected")
  ],
  "Implicit reward of a reply": [
    "dpo/chosen_reward",
    "dpo/rejected_reward",
    "kto/desirable_reward",
    "kto/undesirable_reward",
  ],
  "Different pairs of words (dev)": ["dev/distinct_2"],
  "Words of a reply (dev)": ["dev/words"],
}


def main(_):
  processes.join()
  runs.check_positive(
    FLAGS,
    *("steps", "save_every", "eval_every", "batch_size", "sample_batch_size"),
    *("max_response_length", "num_dev_prompts"),
  )
  check_method()
  may_change = ("workdir", "mesh", "compilation_cache", "wandb_project")
  in_force = runs.start(FLAGS, may_change)
  mesh = meshes.make(FLAGS.mesh)
  micro_batch_size = FLAGS.micro_batch_size or FLAGS.batch_size
  if micro_batch_size < 1 or FLAGS.batch_size % micro_batch_size:
    raise ValueError(
      f"--micro_batch_size={micro_batch_size} does not divide the batch of "
      f"{FLAGS.batch_size} rows."
    )
  meshes.check_divisible(micro_batch_size, mesh, "--micro_batch_size")
  meshes.check_divisible(FLAGS.sample_batch_size, mesh, "--sample_batch_size")
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

  # The policy, the log, and what is known of it.
  loaded = hf.load(FLAGS.policy, dtype=FLAGS.dtype, remat=FLAGS.remat)
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
  if FLAGS.dev_data:
    prompts, _ = logged.load_prompts(FLAGS.dev_data, "validation")
  else:
    prompts = logged.task_prompts(
      tasks.load(FLAGS.task), "validation", FLAGS.seed, FLAGS.num_dev_prompts
    )
  prompts = prompts[: FLAGS.num_dev_prompts]
  prompts = logged.prepare(tokenizer, prompts, **settings)
  lengths = cached.lengths(encoded)
  tokens.check_positions(sum(lengths), model.config.max_positions)
  known = {}
  if FLAGS.cache:
    made_of = cached.describe(
      encoded,
      loaded.params,
      tokenizer,
      **settings,
      dtype=FLAGS.dtype,
    )
    known = cached.load(FLAGS.cache, made_of, arrays_needed())

  # Which replies are compared; M comparisons of K replies, the best one first.
  rewards = rewards_of(encoded.rows, known) if needs_rewards() else None
  compared, ranked, notes = compare(encoded.rows, rewards)  # [M], [M, K]
  if FLAGS.batch_size > len(compared):
    raise ValueError(
      f"--batch_size={FLAGS.batch_size} is more than the {len(compared)} "
      "rows that can be compared."
    )
  if needs_reference() and not FLAGS.cache:
    known["ref_log_probs"] = cached.response_log_probs(
      model,
      params,
      encoded,
      batch_size=FLAGS.sample_batch_size,
      mesh=mesh,
    )
  numbers = {}
  prompt_numbers = np.array(
    [numbers.setdefault(row.prompt, len(numbers)) for row in encoded.rows]
  )

  def batch_of(step):
    """Arrays `[B, K, ...]`; prompts stand before each of their replies."""
    drawn = batches.batch_indices(
      len(compared), FLAGS.batch_size, step, seed=FLAGS.seed
    )
    rows, candidates = compared[drawn], ranked[drawn]
    batch = logged.batch(
      encoded,
      np.repeat(rows, candidates.shape[1]),
      candidates.ravel(),
      prompt_length=lengths[0],
      response_length=lengths[1],
      pad_id=tokens.pad_id(tokenizer),
    )
    batch = {k: x.reshape(*candidates.shape, -1) for k, x in batch.items()}
    at = (rows[:, None], candidates)
    if needs_reference():
      batch["ref_log_probs"] = known["ref_log_probs"][at]
    if FLAGS.algorithm == "pro" and FLAGS.pro_rewards:
      batch["rewards"] = rewards[at]
    if FLAGS.algorithm == "kto":
      batch["is_desirable"] = (
        np.broadcast_to([True, False], candidates.shape)
        if FLAGS.kto_threshold is None
        else rewards[at] >= FLAGS.kto_threshold
      )
      # Behind each prompt the replies of the next one, if it is another.
      follows = np.roll(np.arange(len(rows)), -1)
      is_other = prompt_numbers[rows] != prompt_numbers[rows[follows]]
      batch["other_ids"] = batch["response_ids"][follows]
      batch["other_mask"] = (
        batch["response_mask"][follows] & is_other[:, None, None]
      )
    return batch

  # What is differentiated.
  chunk_size = FLAGS.chunk_size or log_probs.chunk_size(
    micro_batch_size * ranked.shape[1], model.config.vocab_size
  )
  beta = strength()

  def fold(x):
    return x.reshape(-1, x.shape[-1])  # [B, K, T] -> [B * K, T]

  def response_log_probs(params, batch):
    names = ("prompt_ids", "prompt_mask", "response_ids", "response_mask")
    statistics, _ = rollouts.token_statistics(
      model,
      params,
      {name: fold(batch[name]) for name in names},
      temperature=1.0,
      chunk_size=chunk_size,
    )
    return statistics.log_probs.reshape(batch["response_mask"].shape)

  def loss_fn(params, batch, reference_point):
    mask = batch["response_mask"]
    found = response_log_probs(params, batch)  # [B, K, T]
    if FLAGS.algorithm in ("dpo", "ipo"):
      is_ipo = FLAGS.algorithm == "ipo"
      return preference.dpo_loss(
        found,
        batch.get("ref_log_probs"),
        mask,
        beta=beta,
        loss_type="ipo" if is_ipo else FLAGS.dpo_loss_type,
        label_smoothing=FLAGS.label_smoothing,
        reference_free=FLAGS.reference_free,
        per_token=FLAGS.ipo_per_token,
      )
    if FLAGS.algorithm == "pro":
      return preference.pro_loss(
        found,
        batch.get("rewards"),
        mask,
        sft_weight=FLAGS.sft_weight,
        published_mask=FLAGS.pro_mask == "published",
      )
    if FLAGS.algorithm == "kto":
      return preference.kto_loss(
        fold(found),
        fold(batch["ref_log_probs"]),
        reference_point,
        batch["is_desirable"].ravel(),
        fold(mask),
        beta=beta,
        desirable_weight=FLAGS.desirable_weight,
        undesirable_weight=FLAGS.undesirable_weight,
      )
    if FLAGS.algorithm == "simpo":
      return preference.simpo_loss(
        found, mask, beta=beta, margin=FLAGS.simpo_gamma
      )
    return preference.orpo_loss(found, mask, odds_weight=FLAGS.orpo_lambda)

  rows_sharding = meshes.batch_sharding(mesh)
  num_micro_batches = FLAGS.batch_size // micro_batch_size

  def split(batch):
    """Every micro-batch takes its rows from all devices."""
    return jax.tree.map(
      lambda x: x.reshape(-1, num_micro_batches, *x.shape[1:]).swapaxes(0, 1),
      batch,
    )

  def reference_point_of(params, ref_params, batch):
    """KTO's z: what replies gain behind prompts that are not theirs."""
    others = {
      "prompt_ids": batch["prompt_ids"],
      "prompt_mask": batch["prompt_mask"],
      "response_ids": batch["other_ids"],
      "response_mask": batch["other_mask"],
    }

    def both(part):
      part = jax.lax.with_sharding_constraint(part, rows_sharding)
      mask = part["response_mask"]
      return *(response_log_probs(p, part) for p in (params, ref_params)), mask

    return preference.kto_reference_point(
      *map(fold, jax.lax.map(both, split(others)))
    )

  def gradients(params, batch, reference_point):
    """The loss is a mean over rows, so equal parts add up to the batch."""
    gradient = jax.grad(loss_fn, has_aux=True)
    if num_micro_batches == 1:
      return gradient(params, batch, reference_point)
    parts = split(batch)

    def add(total, part):
      part = jax.lax.with_sharding_constraint(part, rows_sharding)
      found = gradient(params, part, reference_point)
      return jax.tree.map(
        lambda a, b: a + b / num_micro_batches, total, found
      ), None

    first = jax.tree.map(lambda x: x[0], parts)
    shapes = jax.eval_shape(gradient, params, first, reference_point)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.scan(add, zeros, parts)[0]

  optimizer = optax.chain(
    optax.clip_by_global_norm(FLAGS.max_grad_norm or math.inf),
    optax.adamw(
      optax.linear_schedule(
        FLAGS.learning_rate,
        FLAGS.learning_rate if FLAGS.schedule == "constant" else 0.0,
        FLAGS.steps,
      ),
      eps=FLAGS.adam_epsilon,
      weight_decay=FLAGS.weight_decay,
    ),
  )

  def update(state, ref_params, batch):
    params = state["params"]["policy"]
    reference_point = None
    if FLAGS.algorithm == "kto":
      reference_point = reference_point_of(params, ref_params, batch)
    grads, metrics = gradients(params, batch, reference_point)
    updates, optimizer_state = optimizer.update(
      grads, state["optimizer"], params
    )
    metrics["gradient_norm"] = optax.global_norm(grads)
    params = optax.apply_updates(params, updates)
    return {
      "params": {"policy": params},
      "optimizer": optimizer_state,
    }, metrics

  # Mismatched pairs are new in every step: KTO keeps the reference itself. A
  # copy, for the policy's own arrays are given away to the update.
  ref_params = None
  if FLAGS.algorithm == "kto":
    ref_params = jax.tree.map(jnp.copy, params)
  state = {"params": {"policy": params}, "optimizer": optimizer.init(params)}
  state_shardings = meshes.shardings(state, rules, mesh)
  state = meshes.place(state, state_shardings)
  update = compiled.Compiled(
    "update", update, donate_argnums=0, out_shardings=(state_shardings, None)
  )

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
  texts = [row.prompt for row in prompts.rows]

  def evaluate(step):
    """The dev reward, which selects; samples are written down."""
    replies = respond(state["params"]["policy"])
    scores, parts = score(texts, replies)
    log.samples(step, samplers.records(texts, replies, scores, parts))
    return {
      "dev/reward": float(scores.mean()),
      "dev/words": metrics_lib.mean_words(replies),
      "dev/distinct_2": metrics_lib.distinct_n(replies, 2),
      **{f"dev/{k}": v for k, v in tasks.mean_parts(parts).items()},
    }

  # A run that was stopped goes on where its last checkpoint is.
  checkpoint.write_flags(FLAGS.workdir, in_force, may_change)
  checkpoints = checkpoint.Checkpoints(FLAGS.workdir)
  best_dir = os.path.join(FLAGS.workdir, "best")
  best_checkpoints = checkpoint.Checkpoints(best_dir, keep=1)
  first_step, best = 0, None
  if restored := checkpoints.restore_latest(state):
    first_step, state, meta = restored
    best = meta["best"]
  best_checkpoints.forget_after(best["step"] if best else 0)
  for folder in (FLAGS.workdir, best_dir):
    hf.save_config(os.path.join(folder, "model"), model, tokenizer)
  log = logs.Logs(
    FLAGS.workdir,
    total_steps=FLAGS.steps,
    first_step=first_step,
    columns=COLUMNS,
    wandb_project=FLAGS.wandb_project,
  )
  for message in (*checkpoints.messages, *best_checkpoints.messages, *notes):
    log.note(message)
  log.skipped([*unusable, *encoded.skipped, *prompts.skipped])
  log.curves(functools.partial(curves.curves, panels=PANELS))

  def keep_best(step):
    best_checkpoints.save(
      step, {"params": state["params"]}, {"reward": best["reward"]}
    )
    # Before the state that says so: a kill between them repeats these steps.
    best_checkpoints.wait()

  with (
    log,
    checkpoints,
    best_checkpoints,
    checkpoint.Preemption() as preemption,
  ):

    def judge(step):
      """Evaluates, and keeps the parameters if they are the best so far."""
      nonlocal best
      metrics = evaluate(step)
      # The first are the reference's, which are to be beaten.
      if best is None:
        best = {"step": step, "reward": metrics["dev/reward"]}
      elif metrics["dev/reward"] > best["reward"]:
        best = {"step": step, "reward": metrics["dev/reward"]}
        keep_best(step)
      return metrics

    for step in range(first_step, FLAGS.steps):
      # Row `step` of the metrics is about the policy after `step` updates.
      metrics = judge(step) if step % FLAGS.eval_every == 0 else {}
      started = time.perf_counter()
      batch = batch_of(step)
      state, learnt = update(state, ref_params, meshes.shard_batch(batch, mesh))
      metrics |= jax.device_get(learnt)
      seconds = time.perf_counter() - started
      metrics["tokens_per_second"] = batch["response_mask"].sum() / seconds
      log.write(step, metrics)
      done = step + 1
      stop = preemption.should_stop()
      if done % FLAGS.save_every == 0 or done == FLAGS.steps or stop:
        checkpoints.save(done, state, {"step": done, "best": best})
      if stop and done < FLAGS.steps:
        log.note(f"Stopped by a signal after step {done}; all is saved.")
        return preemption.exit_status
      for program in (update, respond.program):
        program.freeze()
    log.write(FLAGS.steps, judge(FLAGS.steps))
    if not best["step"]:
      log.note("Nothing beat the reference: the last parameters are the best.")
      keep_best(FLAGS.steps)
    if not processes.is_first():
      return
    rows = files.read_jsonl(os.path.join(FLAGS.workdir, "metrics.jsonl"))
    evaluations = [row for row in rows if "dev/reward" in row]
    log.summary(
      {
        name: {
          "reference": evaluations[0][name],
          "last": evaluations[-1][name],
        }
        for name in evaluations[0]
        if name.startswith("dev/") and name in evaluations[-1]
      }
      | {"step": {"reference": 0, "last": FLAGS.steps}},
      title=f"{FLAGS.algorithm}: the best, of step {best['step']}, is in "
      f"{best_dir}",
    )


def check_method():
  """Refuses flags that do not go together."""
  for name, algorithms in READ_BY.items():
    flag = FLAGS[name]
    if flag.value != flag.default and FLAGS.algorithm not in algorithms:
      raise ValueError(
        f"--{name}={flag.value} belongs to --algorithm="
        f"{' or '.join(algorithms)}; leave it out for {FLAGS.algorithm}."
      )
  positive = {"beta": strength()}
  for name in ("desirable_weight", "undesirable_weight", "orpo_lambda"):
    positive[name] = FLAGS[name].value
  for name, value in positive.items():
    if not value > 0:
      raise ValueError(f"--{name} must be positive, got {value}.")
  if not FLAGS.sft_weight >= 0:
    raise ValueError(
      f"--sft_weight must not be negative, got {FLAGS.sft_weight}."
    )
  if not 0 <= FLAGS.label_smoothing < 0.5:
    raise ValueError(
      f"--label_smoothing must lie in [0, 0.5), got {FLAGS.label_smoothing}."
    )
  if FLAGS.label_smoothing and FLAGS.dpo_loss_type == "hinge":
    raise ValueError(
      "--label_smoothing belongs to --dpo_loss_type=sigmoid or robust; leave "
      "it out for hinge."
    )
  if FLAGS.algorithm == "pro" and FLAGS.pro_rewards and order() == "logged":
    raise ValueError(
      "--algorithm=pro takes temperatures from rewards, which push the first "
      "reply down where another has more: use --order=reward, or "
      "--pro_rewards=false with --order=logged."
    )
  if FLAGS.kto_threshold is not None and FLAGS.order:
    raise ValueError(
      f"--kto_threshold={FLAGS.kto_threshold} alone says which replies are "
      f"good; leave out --order={FLAGS.order}."
    )
  if FLAGS.algorithm == "kto" and FLAGS.batch_size < 2:
    raise ValueError(
      "--algorithm=kto sets prompts before the replies of others: --batch_size "
      "must be 2 or more, got 1."
    )
  if not FLAGS.task and not (FLAGS.data and FLAGS.dev_data):
    raise ValueError("Without a --task, give --data and --dev_data.")


def strength():
  if FLAGS.beta is not None:
    return FLAGS.beta
  return 2.0 if FLAGS.algorithm == "simpo" else 0.1


def order():
  """What ranks replies."""
  by_reward = FLAGS.algorithm == "pro" and FLAGS.pro_rewards
  return FLAGS.order or ("reward" if by_reward else "logged")


def needs_reference():
  return FLAGS.algorithm in ("dpo", "ipo", "kto") and not FLAGS.reference_free


def needs_rewards():
  return order() == "reward" or FLAGS.kto_threshold is not None


def takes_cached_rewards():
  """PRO wants logits; a cache holds rewards that are not negative."""
  return needs_rewards() and FLAGS.algorithm != "pro"


def arrays_needed():
  """What a cache must hold."""
  return [
    *(["ref_log_probs"] if needs_reference() else []),
    *(["rewards"] if takes_cached_rewards() else []),
  ]


def rewards_of(rows, known):
  """Rewards `[N, K + 1]`; 0 for replies that are not there, as all K + 1st."""
  rewards, present = logged.reward_array(rows), logged.present(rows)
  if FLAGS.cache and takes_cached_rewards():
    rewards = known["rewards"]
  unknown = np.isnan(rewards[present]).sum()
  if unknown:
    flag = "--order=reward" if order() == "reward" else "--kto_threshold"
    raise ValueError(
      f"{flag} needs rewards, which {unknown} of {present.sum()} logged "
      "replies lack."
    )
  return np.pad(np.where(present, rewards, 0.0), ((0, 0), (0, 1)))


def compare(rows, rewards):
  """Which replies are set against each other.

  Args:
    rows: N logged rows.
    rewards: `[N, K + 1]` float, or None if they are not needed.

  Returns:
    Row numbers `[M]`; candidate numbers `[M, K]`, the best one first, in which
    one that the row does not have stands for a missing reply; and notes.
  """
  compared, ranked, few, tied = [], [], [], []
  most = max(len(row.candidates) for row in rows)
  fewest = 2 if FLAGS.kto_threshold is None else 1
  for i, row in enumerate(rows):
    candidates = list(range(len(row.candidates)))
    if len(candidates) < fewest:
      few.append(row.place)
      continue
    if FLAGS.kto_threshold is not None:
      # Good or bad by itself: nothing to compare with.
      compared += [i] * len(candidates)
      ranked += [[k] for k in candidates]
      continue
    if order() == "reward":
      candidates.sort(key=lambda k: -rewards[i, k])
    if FLAGS.algorithm == "pro":
      candidates += [most] * (most - len(candidates))
    else:
      candidates = [candidates[0], candidates[-1]]
      if order() == "reward" and np.ptp(rewards[i, candidates]) == 0:
        tied.append(row.place)
        continue
    compared.append(i)
    ranked.append(candidates)
  left_out = [
    f"{len(places)} of {len(rows)} rows have {what}: {', '.join(places[:3])}"
    + (", ..." if len(places) > 3 else ".")
    for places, what in (
      (few, "fewer than two replies" if fewest == 2 else "no reply"),
      (tied, "replies of equal reward"),
    )
    if places
  ]
  if not compared:
    raise ValueError(f"Nothing can be compared: {' '.join(left_out)}")
  compared, ranked = np.array(compared), np.array(ranked)
  notes = [f"{len(compared)} comparisons out of {len(rows)} rows.", *left_out]
  if FLAGS.kto_threshold is not None:
    good = rewards[compared, ranked[:, 0]] >= FLAGS.kto_threshold
    notes[0] = f"{good.sum()} of {len(good)} replies are good ones."
    if good.all() or not good.any():
      raise ValueError(
        f"--kto_threshold={FLAGS.kto_threshold} makes all replies alike: "
        f"{notes[0]}"
      )
  return compared, ranked, notes


if __name__ == "__main__":
  app.run(main)
