"""Offline RL on logged replies with rewards: A-LoL and its kin, nine methods.

Half a minute on two CPU cores, after experiments/sft.py has made the reference
and experiments/offline_value.py its values:

  python experiments/offline.py \
    --flagfile=experiments/flags/a_lol/word_lists.flags \
    --policy=runs/reference --cache=runs/values --algorithm=a_lol \
    --workdir=runs/a_lol

The policy starts as the reference. The parameters with the best reward on the
prompts of --dev_data lie in <workdir>/best, the last ones in <workdir>; where
nothing scores new replies, those with the lowest held-out loss. To try
a method, copy this file and change `weights_of`: what the log-likelihood of
each logged token is multiplied by.

Source: Baheti et al. (2024), arXiv 2305.14718, after the authors' code.
Departures: reference log-probabilities and values are read, not computed in
every step; gradients of micro-batches are averaged, not summed; draws are
seeded; the ratio of a padded token is 1; no layer has dropout, so that the
ratio starts at 1.
"""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from rljax import cli
from rljax.distributed import meshes
from rljax.evaluation import token_pages
from rljax.generation import rollouts
from rljax.losses import offline
from rljax.models import hf
from rljax.ops import advantages
from rljax.scoring import cached
from rljax.text import batches, logged, splits, tokens
from rljax.training import microbatch, optimizers, runs

# Flags that scripts share; rljax/cli has their help and their bounds.
cli.define_run(
  steps=9000, save_every=500, eval_every=900, keep_best=True, num_page_samples=8
)
cli.define_task()
cli.define_log()
cli.define_held_out()
cli.define_lengths(max_response_length=128, too_long="skip")
cli.define_cache()
cli.define_dev(needed=False)
cli.define_reward_model()
cli.define_models()
cli.define_replies()
cli.define_batches(16)
cli.define_packing()
cli.define_optimizer(1e-5, schedule="cosine", warmup=0.03, max_grad_norm=1.0)

# Flags of offline RL.
flags.DEFINE_enum(
  "algorithm",
  "a_lol",
  offline.ALGORITHMS,
  "Method, which decides what multiplies the log-likelihood of each logged "
  "token; see losses/offline.py.",
)
flags.DEFINE_enum(
  "priority",
  "",
  ["", *advantages.PRIORITY_MODES],
  "How logged replies are drawn; see ops/advantages.py. Empty: none for nll, "
  "else good_priority.",
)
flags.DEFINE_bool(
  "replace", True, "Whether a batch may hold the same reply twice."
)
flags.DEFINE_bool(
  "double_weighting",
  True,
  "Whether replies that are drawn by their advantage are weighted by it as "
  "well, as published; false weights by it once.",
)
flags.DEFINE_bool(
  "scale_steps",
  True,
  "Whether --steps and --eval_every are multiplied by the share of logged "
  "replies that can be drawn.",
)
flags.DEFINE_float(
  "clip_epsilon",
  0.9,
  "How far the probability ratio to the reference may move from 1; 0 leaves it "
  "as it is.",
  0,
)
flags.DEFINE_float(
  "gold_floor", 0.1, "Least probability that r_gold weights a token by.", 0
)
flags.DEFINE_float(
  "kl_coef",
  0.0,
  "Weight β of the penalty of r_lol_kl and a_lol_kl; 0 for other methods.",
  0,
)
flags.register_multi_flags_validator(
  ["algorithm", "kl_coef"],
  lambda v: v["algorithm"].endswith("_kl") == bool(v["kl_coef"]),
  "--kl_coef belongs to r_lol_kl and a_lol_kl, which need a positive one, such "
  "as 0.1; for other methods it must be 0.",
)
FLAGS = flags.FLAGS

COLUMNS = ("offline/loss", "dev/reward", "eval/loss", "tokens_per_second")


def main():
  run = runs.start(FLAGS)
  sizes = cli.batch_sizes(FLAGS, run.mesh)
  # The policy, the log, and the prompts whose replies select parameters.
  loaded = cli.load_policy(FLAGS)
  policy, tokenizer = loaded.model, loaded.tokenizer
  log = cli.read_log(FLAGS, tokenizer)
  tokens.check_positions(sum(log.lengths), policy.config.max_positions)
  selection = cli.load_selection(FLAGS, loaded, run)

  # What methods weigh by: rewards, advantages `[N, K]` and reference
  # log-probabilities `[N, K, T]` of up to K replies to each of N prompts.
  needed = offline.needed_arrays(FLAGS.algorithm)
  if FLAGS.algorithm == "nll" and priority() != "none":
    needed = ("advantages",)  # The filter without the weight.
  known = cli.load_known(
    *(FLAGS, log, loaded, needed, run.mesh),
    reader=f"--algorithm={FLAGS.algorithm}",
    firsts_alone=priority() != "all_priority",
  )
  if "rewards" in known:
    logged.check_rewards(known["rewards"])
  for text in cached.other_scorer(FLAGS.cache, selection.score):
    run.note(text)

  # Which replies are drawn, and how often.
  weigh_by = "advantages" if "advantages" in known else "rewards"
  scores = known.get(weigh_by, log.present.astype(np.float32))
  shares = np.asarray(advantages.priority_weights(scores, mode=priority()))
  known[weigh_by] = np.asarray(
    advantages.drawn_scores(
      scores, shares, double_weighting=FLAGS.double_weighting
    )
  )
  shares, held_out = splits.of_shares(shares, log.is_held_out)
  draws = batches.PrioritySampler(
    shares.ravel(), seed=FLAGS.seed, replace=FLAGS.replace
  )
  run.total_steps, eval_every = FLAGS.steps, FLAGS.eval_every
  if FLAGS.scale_steps:
    run.total_steps, eval_every = (
      max(1, batches.scale_steps(number, shares, num_rows=len(shares)))
      for number in (FLAGS.steps, FLAGS.eval_every)
    )

  place = lambda replies: np.unravel_index(replies, shares.shape)  # In N x K.
  draw = lambda step: place(draws.draw(FLAGS.batch_size, step))
  pack = cli.packer(FLAGS, run, sizes, log.encoded, draw)

  def batch_of(at):
    """The logged replies at these places."""
    return log.batch(*at) | {name: x[at] for name, x in known.items()}

  # What is differentiated.
  clip_epsilon = FLAGS.clip_epsilon or None

  def log_probs_of(params, batch):
    statistics, _ = rollouts.token_statistics(
      policy,
      params["policy"],
      batch,
      temperature=1.0,
      chunk_size=FLAGS.chunk_size,
    )
    return statistics.log_probs  # [B, T]

  def weights_of(log_probs, batch):
    """What multiplies the log-likelihood of each token, `[B, T]`."""
    return offline.token_weights(
      FLAGS.algorithm,
      log_probs,
      batch.get("ref_log_probs"),
      batch.get("rewards"),
      batch.get("advantages"),
      batch["response_mask"],
      clip_epsilon=clip_epsilon,
      gold_floor=FLAGS.gold_floor,
    )

  def loss_fn(params, batch):
    log_probs = log_probs_of(params, batch)
    ref_log_probs, mask = batch.get("ref_log_probs"), batch["response_mask"]
    loss, metrics = offline.weighted_loss(
      log_probs,
      weights_of(log_probs, batch),
      mask,
      ref_log_probs=ref_log_probs,
      kl_coef=FLAGS.kl_coef,
    )
    return loss, metrics | offline.weight_metrics(
      FLAGS.algorithm,
      log_probs,
      ref_log_probs,
      batch.get("advantages"),
      mask,
      clip_epsilon=clip_epsilon,
    )

  # The loss is a mean over rows, so equal parts add up to the batch.
  gradients = microbatch.grad(
    loss_fn, sizes.num_parts, sharding=run.rows_sharding
  )
  transform = optimizers.make(run.total_steps, **cli.optimizer_options(FLAGS))

  def update(state, batch):
    grads, metrics = gradients(state["params"], batch)
    params, optimizer_state, metrics = optimizers.step(
      transform, grads, state["optimizer"], state["params"], metrics
    )
    return {"params": params, "optimizer": optimizer_state}, metrics

  # The state; a run that was stopped goes on from its last checkpoint.
  state = run.restore(
    {"policy": loaded.params},
    hf.partition_rules(policy, run.mesh),
    optimizer=transform,
  )
  update = run.compile(update, returns_state=True)
  selection.by_loss(
    lambda params, batch: loss_fn(params, batch)[1],
    lambda rows: batch_of(place(held_out[rows])),
    len(held_out),
  )

  def weigh(params, batch):
    """What multiplies the gradient of each token, with the penalty."""
    weights = weights_of(log_probs_of(params, batch), batch)
    return jnp.where(batch["response_mask"], weights - FLAGS.kl_coef, 0.0)

  weigh = run.compile(weigh)

  def show_tokens(step):
    """A page of logged replies from all over the log, and their weights."""
    drawable = np.flatnonzero(shares)
    watched = token_pages.spread(drawable, FLAGS.num_page_samples)
    batch = batch_of(at := place(watched))
    weigh_rows = functools.partial(weigh, state["params"])
    weights = meshes.map_batches(weigh_rows, batch, sizes.micro_batch, run.mesh)
    facts = {name: x for name, x in batch.items() if x.ndim == 1}
    run.page(
      f"{FLAGS.algorithm}: logged replies after {step} updates",
      lambda limit: token_pages.from_log(tokenizer, log, *at, weights, facts),
      value_name="weight",
      notes=["A weight multiplies the gradient of a token's log-probability."],
      num_in_all=len(drawable),
    )

  def evaluate(step):
    """The dev reward or held-out loss, by which --keep_best selects."""
    if FLAGS.num_page_samples:
      show_tokens(step)
    return selection.evaluate(step, state["params"])

  with run.training(policy, tokenizer, {"policy": loaded.params}, COLUMNS):
    run.note(
      f"{draws.num_rows} of {log.present.sum()} replies can be drawn; "
      f"{run.total_steps} steps."
    )
    run.has_read(log, *selection.dev)
    for step in run.steps(freeze=[update, selection.program, weigh]):
      # Row `step` of the metrics is about the policy after `step` updates.
      metrics = evaluate(step) if step % eval_every == 0 else {}
      started = time.perf_counter()
      batch = batch_of(draw(step))
      run.check_learner(gradients, state["params"], batch, pack=pack.alone)
      state, learnt = update(state, run.shard(pack(batch)))
      metrics |= jax.device_get(learnt)
      seconds = time.perf_counter() - started
      metrics["tokens_per_second"] = batch["response_mask"].sum() / seconds
      run.log(step, metrics)
      run.save(step + 1, state)
    if run.is_complete:
      run.log(run.total_steps, evaluate(run.total_steps))
      selection.summarise()
  return run.exit_status


def priority():
  """How replies are drawn; plain likelihood takes all alike by default."""
  default = "none" if FLAGS.algorithm == "nll" else "good_priority"
  return FLAGS.priority or default


if __name__ == "__main__":
  cli.run(main)
