"""Offline RL on logged replies with rewards: A-LoL and its kin, nine methods.

Half a minute on two CPU cores, after `experiments/sft.py` has made the
reference and `experiments/offline_value.py` its values:
  python experiments/offline.py \
    --flagfile=experiments/flags/a_lol/word_lists.flags \
    --policy=runs/reference --cache=runs/values --algorithm=a_lol \
    --workdir=runs/a_lol

The policy starts as the reference. The parameters with the best reward on the
prompts of --dev_data lie in <workdir>/best, the last ones in <workdir>.

Source: Baheti et al. (2024), arXiv 2305.14718, after the authors' code.
Departures: reference log-probabilities and values are read, not computed in
every step; gradients of micro-batches are averaged, not summed; draws are
seeded; the ratio of a padded token is 1; no layer has dropout, so that the
ratio starts at 1.
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
from rljax.evaluation import curves, token_pages
from rljax.evaluation import metrics as metrics_lib
from rljax.generation import rollouts, samplers
from rljax.losses import offline
from rljax.models import hf
from rljax.ops import advantages, sampling
from rljax.ops import log_probs as log_probs_lib
from rljax.scoring import cached, scorers
from rljax.storage import checkpoint
from rljax.text import batches, files, keywords, logged, tokens
from rljax.training import logs, runs

# Run.
flags.DEFINE_string("workdir", None, "Checkpoints and logs.", required=True)
flags.DEFINE_integer("seed", 0, "Seed of every source of randomness.")
flags.DEFINE_integer("steps", 9000, "Updates, before they are scaled.")
flags.DEFINE_bool("scale_steps", True, "By the share of rows that are drawn.")
flags.DEFINE_integer("save_every", 500, "Steps between checkpoints.")
flags.DEFINE_integer("eval_every", 900, "Steps, scaled likewise.")
flags.DEFINE_integer(
  "num_page_samples", 8, "In tokens.html; 0: no page.", lower_bound=0
)
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
flags.DEFINE_enum("algorithm", "a_lol", offline.ALGORITHMS, "See the losses.")
flags.DEFINE_enum(
  "priority",
  "",
  ["", *advantages.PRIORITY_MODES],
  "How rows are drawn; empty: none for nll, else good_priority.",
)
flags.DEFINE_bool("replace", True, "A batch may hold a row twice.")
flags.DEFINE_bool("double_weighting", True, "False: drawn or weighted, once.")
flags.DEFINE_string("clip_epsilon", "0.9", "Of ratios; none: no clipping.")
flags.DEFINE_float("gold_floor", 0.1, "Lowest probability of r_gold.")
flags.DEFINE_float("kl_coef", 0.0, "Of r_lol_kl and a_lol_kl.")
# Updates.
flags.DEFINE_integer("batch_size", 16, "Rows per update.")
flags.DEFINE_integer("micro_batch_size", 0, "Rows per pass; 0: a batch.")
flags.DEFINE_float("learning_rate", 2e-4, "Of AdamW.")
flags.DEFINE_enum("schedule", "constant", ["constant", "linear"], "Down to 0.")
flags.DEFINE_float("adam_epsilon", 1e-8, "")
flags.DEFINE_float("weight_decay", 0.0, "")
flags.DEFINE_float("max_grad_norm", 0.3, "0: no clipping.")
FLAGS = flags.FLAGS

COLUMNS = ("offline/loss", "dev/reward", "dev/words", "tokens_per_second")
PANELS = {
  "Reward of the dev prompts": ["dev/reward"],
  "Loss": ["offline/loss"],
  "Log-probability of a drawn reply": ["offline/sequence_log_prob_mean"],
  "At the bounds of the ratio": [
    "offline/clip_low_fraction",
    "offline/clip_high_fraction",
  ],
  "Different pairs of words (dev)": ["dev/distinct_2"],
  "Words of a reply (dev)": ["dev/words"],
}


def main(_):
  processes.join()
  runs.check_positive(
    FLAGS,
    *("steps", "save_every", "eval_every", "batch_size", "sample_batch_size"),
    "max_response_length",
  )
  may_change = (
    *("workdir", "mesh", "compilation_cache", "wandb_project"),
    "num_page_samples",
  )
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
  clip_epsilon = parse_clip(FLAGS.clip_epsilon)
  if FLAGS.algorithm.endswith("_kl") and not FLAGS.kl_coef:
    raise ValueError(
      f"--algorithm={FLAGS.algorithm} is nothing without its penalty: give "
      "--kl_coef, such as 0.1."
    )
  if not FLAGS.task and not (FLAGS.data and FLAGS.dev_data):
    raise ValueError("Without a --task, give --data and --dev_data.")
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
  known = what_is_known(encoded, loaded, params, settings, mesh)

  # Which replies are drawn, and what multiplies their loss.
  weigh_by = "advantages" if "advantages" in known else "rewards"
  scores = known.get(weigh_by)
  if scores is None:
    scores = logged.present(encoded.rows).astype(np.float32)
  weights = np.asarray(advantages.priority_weights(scores, mode=priority()))
  sampler = batches.PrioritySampler(
    weights.ravel(), seed=FLAGS.seed, replace=FLAGS.replace
  )
  known[weigh_by] = np.asarray(
    advantages.drawn_scores(
      scores, weights, double_weighting=FLAGS.double_weighting
    )
  )
  steps, eval_every = FLAGS.steps, FLAGS.eval_every
  if FLAGS.scale_steps:
    steps, eval_every = (
      max(1, batches.scale_steps(number, weights, num_rows=len(weights)))
      for number in (steps, eval_every)
    )

  def batch_of(replies):
    """The logged replies of these numbers, N x K of them in all."""
    rows, candidates = np.unravel_index(replies, weights.shape)
    batch = logged.batch(
      encoded,
      rows,
      candidates,
      prompt_length=lengths[0],
      response_length=lengths[1],
    )
    return batch | {name: x[rows, candidates] for name, x in known.items()}

  # What is differentiated.
  chunk_size = FLAGS.chunk_size or log_probs_lib.chunk_size(
    micro_batch_size, model.config.vocab_size
  )

  def log_probs_of(params, batch):
    statistics, _ = rollouts.token_statistics(
      model, params, batch, temperature=1.0, chunk_size=chunk_size
    )
    return statistics.log_probs

  def loss_of(log_probs, batch):
    return offline.offline_loss(
      FLAGS.algorithm,
      log_probs,
      batch.get("ref_log_probs"),
      batch.get("rewards"),
      batch.get("advantages"),
      batch["response_mask"],
      clip_epsilon=clip_epsilon,
      gold_floor=FLAGS.gold_floor,
      kl_coef=FLAGS.kl_coef,
    )

  def loss_fn(params, batch):
    return loss_of(log_probs_of(params, batch), batch)

  def weigh(params, batch):
    """What multiplies the gradient of each token's log-probability, `[B, T]`.

      w_it = -B ∂L / ∂ log π(y_it),   B = number of replies with a token

    The loss is a mean over B replies. This is the w of `token_weights`, such
    as the advantage times the clipped ratio for a_lol, less the coefficient of
    a penalty; taken from the loss, it needs no word about the method.
    """
    gradient, _ = jax.grad(loss_of, has_aux=True)(
      log_probs_of(params, batch), batch
    )
    counts = batch["response_mask"].any(axis=1)
    return -gradient * counts.sum(dtype=jnp.float32)

  rows_sharding = meshes.batch_sharding(mesh)
  num_micro_batches = FLAGS.batch_size // micro_batch_size

  def gradients(params, batch):
    """The loss is a mean over rows, so equal parts add up to the batch."""
    gradient = jax.grad(loss_fn, has_aux=True)
    if num_micro_batches == 1:
      return gradient(params, batch)
    # Every micro-batch takes its rows from all devices.
    parts = jax.tree.map(
      lambda x: x.reshape(-1, num_micro_batches, *x.shape[1:]).swapaxes(0, 1),
      batch,
    )

    def add(total, part):
      part = jax.lax.with_sharding_constraint(part, rows_sharding)
      found = gradient(params, part)
      return jax.tree.map(
        lambda a, b: a + b / num_micro_batches, total, found
      ), None

    first = jax.tree.map(lambda x: x[0], parts)
    shapes = jax.eval_shape(gradient, params, first)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.scan(add, zeros, parts)[0]

  optimizer = optax.chain(
    optax.clip_by_global_norm(FLAGS.max_grad_norm or math.inf),
    optax.adamw(
      optax.linear_schedule(
        FLAGS.learning_rate,
        FLAGS.learning_rate if FLAGS.schedule == "constant" else 0.0,
        steps,
      ),
      eps=FLAGS.adam_epsilon,
      weight_decay=FLAGS.weight_decay,
    ),
  )

  def update(state, batch):
    params = state["params"]["policy"]
    grads, metrics = gradients(params, batch)
    updates, optimizer_state = optimizer.update(
      grads, state["optimizer"], params
    )
    metrics["gradient_norm"] = optax.global_norm(grads)
    params = optax.apply_updates(params, updates)
    return {
      "params": {"policy": params},
      "optimizer": optimizer_state,
    }, metrics

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

  # Of the replies that can be drawn, some to look at, from all over the log.
  weigh = compiled.Compiled("weigh", weigh)
  if FLAGS.num_page_samples:
    drawable = np.flatnonzero(weights)
    num = min(FLAGS.num_page_samples, len(drawable))
    watched = drawable[np.linspace(0, len(drawable) - 1, num).astype(int)]

  def show_tokens(step):
    """A page of logged replies and what multiplies their tokens' gradients."""
    params, batch = state["params"]["policy"], batch_of(watched)
    token_weights = meshes.map_batches(
      functools.partial(weigh, params), batch, micro_batch_size, mesh
    )
    if not processes.is_first():
      return
    places = np.transpose(np.unravel_index(watched, weights.shape))
    rows = [encoded.rows[i] for i, _ in places]
    token_pages.write(
      os.path.join(FLAGS.workdir, "tokens.html"),
      f"{FLAGS.algorithm}: logged replies after {step} updates",
      token_pages.from_arrays(
        tokenizer,
        [row.prompt for row in rows],
        batch["response_ids"],
        batch["response_mask"],
        token_weights,
        facts=[
          {"row": row.place, "reward": row.rewards and row.rewards[k]}
          | {name: x[i] for name, x in batch.items() if x.ndim == 1}
          for i, (row, (_, k)) in enumerate(zip(rows, places, strict=True))
        ],
      ),
      value_name="weight",
      notes=["A weight multiplies the gradient of a token's log-probability."],
      limit=FLAGS.num_page_samples,
      num_in_all=len(drawable),
    )

  def evaluate(step):
    """The dev reward, which selects; samples are written down."""
    replies = respond(state["params"]["policy"])
    scores, parts = score(texts, replies)
    log.samples(step, samplers.records(texts, replies, scores, parts))
    if FLAGS.num_page_samples:
      show_tokens(step)
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
    total_steps=steps,
    first_step=first_step,
    columns=COLUMNS,
    wandb_project=FLAGS.wandb_project,
  )
  for message in (*checkpoints.messages, *best_checkpoints.messages):
    log.note(message)
  log.note(
    f"{sampler.num_rows} of {logged.present(encoded.rows).sum()} replies can "
    f"be drawn; {steps} steps."
  )
  if FLAGS.cache:
    scored_by = cached.notes(FLAGS.cache)["reward"]
    if scored_by != score.description:
      log.note(
        f"Rewards of the cache are by {scored_by}, and those of the dev "
        f"prompts by {score.description}."
      )
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

    for step in range(first_step, steps):
      # Row `step` of the metrics is about the policy after `step` updates.
      metrics = judge(step) if step % eval_every == 0 else {}
      started = time.perf_counter()
      batch = batch_of(sampler.draw(FLAGS.batch_size, step))
      state, learnt = update(state, meshes.shard_batch(batch, mesh))
      metrics |= jax.device_get(learnt)
      seconds = time.perf_counter() - started
      metrics["tokens_per_second"] = batch["response_mask"].sum() / seconds
      log.write(step, metrics)
      done = step + 1
      stop = preemption.should_stop()
      if done % FLAGS.save_every == 0 or done == steps or stop:
        checkpoints.save(done, state, {"step": done, "best": best})
      if stop and done < steps:
        log.note(f"Stopped by a signal after step {done}; all is saved.")
        return preemption.exit_status
      for program in (update, respond.program, weigh):
        program.freeze()
    log.write(steps, judge(steps))
    if not best["step"]:
      log.note("Nothing beat the reference: the last parameters are the best.")
      keep_best(steps)
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
      | {"step": {"reference": 0, "last": steps}},
      title=f"{FLAGS.algorithm}: the best, of step {best['step']}, is in "
      f"{best_dir}",
    )


def priority():
  """How rows are drawn; plain likelihood weighs all alike by default."""
  default = "none" if FLAGS.algorithm == "nll" else "good_priority"
  return FLAGS.priority or default


def what_is_known(encoded, loaded, params, settings, mesh):
  """Rewards, advantages and reference log-probs, where a method needs them."""
  needed = offline.needed_arrays(FLAGS.algorithm)
  if FLAGS.algorithm == "nll" and priority() != "none":
    # Likelihood of the better replies alone: the filter without the weight.
    needed = ("advantages",)
  if FLAGS.cache:
    made_of = cached.describe(
      encoded,
      loaded.params,
      loaded.tokenizer,
      **settings,
      dtype=FLAGS.dtype,
    )
    arrays = cached.load(FLAGS.cache, made_of, needed)
    return {name: arrays[name] for name in needed}
  known = {}
  rewards, present = (
    f(encoded.rows) for f in (logged.reward_array, logged.present)
  )
  if "rewards" in needed:
    known["rewards"] = rewards
  if "advantages" in needed:
    known["advantages"] = logged.advantage_array(encoded.rows)
  if priority() != "all_priority":
    present = present & (np.arange(present.shape[1]) == 0)
  for name, array in known.items():
    unknown = np.isnan(array[present]).sum()
    if unknown:
      raise ValueError(
        f"--algorithm={FLAGS.algorithm} needs {name}, which {unknown} of "
        f"{present.sum()} logged replies lack: run "
        "experiments/offline_value.py and give its workdir as --cache."
      )
    if name == "rewards":
      logged.check_rewards(array)
    known[name] = np.where(present, array, 0.0)
  if "ref_log_probs" in needed:
    known["ref_log_probs"] = cached.response_log_probs(
      loaded.model,
      params,
      encoded,
      batch_size=FLAGS.sample_batch_size,
      mesh=mesh,
    )
  return known


def parse_clip(text):
  """A number, or None for "none"."""
  if text == "none":
    return None
  try:
    return float(text)
  except ValueError:
    raise ValueError(
      f"--clip_epsilon must be a number or none, got {text!r}."
    ) from None


if __name__ == "__main__":
  app.run(main)
