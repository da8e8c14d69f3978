"""Learns from comparisons of logged replies: DPO, IPO, PRO, KTO, SimPO, ORPO.

Half a minute on two CPU cores, after experiments/sft.py has made the reference:

  python experiments/preference.py --algorithm=dpo --policy=runs/reference \
    --flagfile=experiments/flags/a_lol/word_lists_preference.flags \
    --workdir=runs/dpo

Rows of the log have two replies or more, or one with its reward, as samples of
an online run do, of which those to one prompt are compared. Their order, as
people made it, or their rewards say which is the better one (--order). PRO
ranks all replies of a row, by raw logits of a reward model, not by sigmoids;
the others set the best against the worst; KTO learns from each alone.

The policy starts as the reference. The parameters with the best reward on the
prompts of --dev_data lie in <workdir>/best, the last ones in <workdir>. Where
nothing scores new replies, the best are those with the lowest held-out loss.

Source: see losses/preference.py. DPO and PRO have the settings of Baheti et al.
(2024), arXiv 2305.14718. Departures: reference log-probabilities are read or
computed once; gradients of micro-batches are averaged, not summed; PRO scores
the tokens of replies, unless --pro_mask=published; no layer has dropout.
"""

import time

import jax
import numpy as np
from absl import flags

from rljax import cli
from rljax.generation import packed, rollouts
from rljax.losses import preference
from rljax.models import hf
from rljax.text import comparisons, tokens
from rljax.training import microbatch, optimizers, runs

# Flags that scripts share; rljax/cli has their help and their bounds.
cli.define_run(steps=9000, save_every=500, eval_every=900, keep_best=True)
cli.define_task()
cli.define_log()
cli.define_held_out()
cli.define_lengths(max_response_length=128, too_long="skip")
cli.define_cache()
cli.define_dev(needed=False)
cli.define_reward_model()
cli.define_models()
cli.define_replies()
cli.define_batches(16, text="Comparisons of an update, with all their replies.")
cli.define_packing()
cli.define_stream("cache", "packed_length")
cli.define_optimizer(1e-6, schedule="cosine", warmup=0.1, max_grad_norm=1.0)

# Which flags of its own a method reads; the others are refused.
READS = {
  "dpo": ("beta", "dpo_loss_type", "label_smoothing", "reference_free"),
  "ipo": ("beta", "ipo_per_token"),
  "pro": ("pro_rewards", "pro_mask", "sft_weight"),
  "kto": ("beta", "kto_threshold", "desirable_weight", "undesirable_weight"),
  "simpo": ("beta", "simpo_gamma"),
  "orpo": ("orpo_lambda",),
}

# Flags of learning from comparisons.
flags.DEFINE_enum(
  "algorithm", "dpo", list(READS), "Method; see losses/preference.py."
)
flags.DEFINE_enum(
  "order",
  "",
  ["", "logged", "reward"],
  "What ranks replies: logged, the order in which they stand, or reward. "
  "Empty: reward for pro with --pro_rewards, else logged.",
)
flags.DEFINE_float(
  "beta",
  None,
  "Strength β of dpo, ipo, kto (0.1 if unset) and simpo (2), above 0.",
  1e-6,
)
flags.DEFINE_enum(
  "dpo_loss_type",
  "sigmoid",
  ["sigmoid", "robust", "hinge"],
  "Loss of a pair's margin, for dpo; see losses/preference.py.",
)
flags.DEFINE_float(
  "label_smoothing",
  0.0,
  "Share of pairs, below 0.5, that are labelled the wrong way, for dpo.",
  0,
)
flags.DEFINE_bool(
  "reference_free", False, "Whether dpo takes the reference for uniform."
)
flags.DEFINE_bool(
  "ipo_per_token", True, "Whether ipo takes means over tokens, not sums."
)
flags.DEFINE_float(
  "kto_threshold",
  None,
  "Least reward of a good reply, for kto, which then takes each reply by "
  "itself; unset: the best reply of a row is good, and the worst bad.",
)
flags.DEFINE_float(
  "desirable_weight", 1.0, "Weight of good replies, for kto, above 0.", 1e-6
)
flags.DEFINE_float(
  "undesirable_weight", 1.0, "Weight of bad replies, for kto, above 0.", 1e-6
)
flags.DEFINE_bool(
  "pro_rewards", True, "Whether rewards are pro's temperatures, or all are 1."
)
flags.DEFINE_enum(
  "pro_mask",
  "correct",
  ["correct", "published"],
  "Tokens that pro scores: correct, those of replies; published, those that "
  "the authors' code does.",
)
flags.DEFINE_float(
  "sft_weight", 0.05, "Weight of the best reply's likelihood, for pro.", 0
)
flags.DEFINE_float("simpo_gamma", 1.0, "Margin γ between replies, for simpo.")
flags.DEFINE_float(
  "orpo_lambda", 0.1, "Weight λ of the odds ratio, for orpo, above 0.", 1e-6
)
FLAGS = flags.FLAGS

COLUMNS = (
  *(f"{name}/{metric}" for name in READS for metric in ("loss", "accuracy")),
  *("dev/reward", "dev/words", "eval/loss", "eval/accuracy"),
  "tokens_per_second",
)


def main():
  run = runs.start(FLAGS, total_steps=FLAGS.steps)
  sizes = cli.batch_sizes(FLAGS, run.mesh)
  check_flags()
  # The policy, what is compared, and the prompts whose replies select: K
  # replies of every row, the best one first. PRO wants logits, and a cache
  # holds rewards that are not negative.
  loaded = cli.load_policy(FLAGS)
  policy, tokenizer = loaded.model, loaded.tokenizer
  is_pro, is_kto = (FLAGS.algorithm == name for name in ("pro", "kto"))
  needs_reference = FLAGS.algorithm in ("dpo", "ipo", "kto")
  needs_reference &= not FLAGS.reference_free
  feed = cli.open_comparisons(
    *(FLAGS, loaded, run.mesh),
    by_reward=order() == "reward",
    all_replies=is_pro,
    threshold=FLAGS.kto_threshold,
    labelled=is_kto,
    needs_reference=needs_reference,
  )
  tokens.check_positions(sum(feed.lengths), policy.config.max_positions)
  selection = cli.load_selection(FLAGS, loaded, run)
  pack = cli.pack_feed(FLAGS, run, sizes, feed)

  def labelled(batch):
    """A batch `[B, K, ...]`; of KTO, also what is good, and mismatched."""
    if is_kto:
      shape = batch["response_mask"].shape[:2]
      batch["is_desirable"] = (
        np.broadcast_to([True, False], shape)
        if feed.threshold is None
        else batch["rewards"] >= feed.threshold
      )
      batch |= comparisons.others(batch)
    return batch

  # What is differentiated.
  beta = FLAGS.beta or (2.0 if FLAGS.algorithm == "simpo" else 0.1)

  fold = lambda x: x.reshape(-1, x.shape[-1])  # [B, K, T] -> [B * K, T]

  def log_probs_of(params, batch):
    statistics, _ = rollouts.token_statistics(
      *(policy, params["policy"], packed.texts(batch)),
      temperature=1.0,
      chunk_size=FLAGS.chunk_size,
    )
    return statistics.log_probs.reshape(batch["response_mask"].shape)

  def loss_fn(params, batch, reference_point, ref_params):
    mask = batch["response_mask"]
    log_probs = log_probs_of(params, batch)  # [B, K, T]
    if FLAGS.stream and needs_reference:  # Of a log it is known, once for all.
      batch = batch | {"ref_log_probs": log_probs_of(ref_params, batch)}
    if FLAGS.algorithm in ("dpo", "ipo"):
      return preference.dpo_loss(
        log_probs,
        batch.get("ref_log_probs"),
        mask,
        beta=beta,
        loss_type=FLAGS.dpo_loss_type if FLAGS.algorithm == "dpo" else "ipo",
        label_smoothing=FLAGS.label_smoothing,
        reference_free=FLAGS.reference_free,
        per_token=FLAGS.algorithm == "ipo" and FLAGS.ipo_per_token,
      )
    if is_pro:
      return preference.pro_loss(
        log_probs,
        batch["rewards"] if FLAGS.pro_rewards else None,
        mask,
        sft_weight=FLAGS.sft_weight,
        published_mask=FLAGS.pro_mask == "published",
      )
    if is_kto:
      return preference.kto_loss(
        fold(log_probs),
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
        log_probs, mask, beta=beta, margin=FLAGS.simpo_gamma
      )
    return preference.orpo_loss(log_probs, mask, odds_weight=FLAGS.orpo_lambda)

  def reference_point_of(params, ref_params, batch):
    """KTO's z: what replies gain behind prompts that are not theirs."""
    mask = batch["other_mask"]
    others = packed.without(batch)
    others |= {"response_ids": batch["other_ids"], "response_mask": mask}
    found = microbatch.map_rows(
      lambda part: [log_probs_of(p, part) for p in (params, ref_params)],
      others,
      sizes.num_parts,
      run.rows_sharding,
    )
    return preference.kto_reference_point(*map(fold, (*found, mask)))

  # The loss is a mean over rows, so equal parts add up to the batch.
  gradients = microbatch.grad(
    loss_fn, sizes.num_parts, sharding=run.rows_sharding
  )
  transform = optimizers.make(FLAGS.steps, **cli.optimizer_options(FLAGS))

  def update(state, ref_params, batch):
    params = state["params"]
    point = reference_point_of(params, ref_params, batch) if is_kto else None
    grads, metrics = gradients(params, batch, point, ref_params)
    params, optimizer_state, metrics = optimizers.step(
      transform, grads, state["optimizer"], params, metrics
    )
    return {"params": params, "optimizer": optimizer_state}, metrics

  # The state; a run that was stopped goes on from its last checkpoint.
  rules = hf.partition_rules(policy, run.mesh)
  state = run.restore({"policy": loaded.params}, rules, optimizer=transform)
  # KTO keeps the reference, for its mismatched pairs are new in every step, as
  # is all that a stream has.
  keeps = is_kto or (FLAGS.stream and needs_reference)
  ref_params = run.place({"policy": loaded.params}, rules) if keeps else None
  update = run.compile(update, returns_state=True)
  feed.go_to(run.meta.get("feed", {}))
  run.check_learner(
    *(gradients, state["params"], labelled(feed.first())),
    more=lambda batch: (np.float32(0) if is_kto else None, ref_params),
    pack=pack.alone,
    pads_count=FLAGS.pro_mask == "published",
  )

  def held_out_metrics(params, batch, ref_params):
    point = reference_point_of(params, ref_params, batch) if is_kto else None
    return loss_fn(params, batch, point, ref_params)[1]

  selection.by_loss(
    held_out_metrics,
    lambda rows: labelled(feed.held_out_batch(rows)),
    feed.num_held_out,
    ref_params,
  )

  with run.training(policy, tokenizer, {"policy": loaded.params}, COLUMNS):
    run.has_read(feed, *selection.dev)
    for step in run.steps(freeze=[update, selection.program]):
      # Row `step` of the metrics is about the policy after `step` updates.
      is_due = step % FLAGS.eval_every == 0
      metrics = selection.evaluate(step, state["params"]) if is_due else {}
      started = time.perf_counter()
      batch = labelled(feed.batch(step))
      state, learnt = update(state, ref_params, run.shard(pack(batch)))
      metrics |= feed.metrics | jax.device_get(learnt)
      seconds = time.perf_counter() - started
      metrics["tokens_per_second"] = batch["response_mask"].sum() / seconds
      run.log(step, metrics)
      run.save(step + 1, state, feed=feed.place)
    if run.is_complete:
      run.log(FLAGS.steps, selection.evaluate(FLAGS.steps, state["params"]))
      selection.summarise()
  return run.exit_status


def order():
  """What ranks replies."""
  by_reward = FLAGS.algorithm == "pro" and FLAGS.pro_rewards
  return FLAGS.order or ("reward" if by_reward else "logged")


def check_flags():
  """Raises ValueError for flags that do not fit each other."""
  cli.check_read(FLAGS, "algorithm", READS)
  smoothing, takes_rewards = FLAGS.label_smoothing, FLAGS.pro_rewards
  if smoothing >= 0.5:
    raise ValueError(f"--label_smoothing={smoothing} must lie in [0, 0.5).")
  if smoothing and FLAGS.dpo_loss_type == "hinge":
    raise ValueError(
      "--label_smoothing belongs to --dpo_loss_type=sigmoid or robust; leave "
      "it out for hinge."
    )
  if FLAGS.algorithm == "pro" and takes_rewards and order() == "logged":
    raise ValueError(
      "--algorithm=pro takes temperatures from rewards, which push the first "
      "reply down where another has more: use --order=reward, or "
      "--pro_rewards=false with --order=logged."
    )
  if FLAGS.algorithm == "pro" and FLAGS.stream:
    raise ValueError(
      "--algorithm=pro ranks as many replies as the longest row of the log "
      "has, which a stream does not know: leave out --stream."
    )
  if FLAGS.pro_mask == "published" and FLAGS.packed_length:
    raise ValueError("--pro_mask=published needs --packed_length=0, and pads.")
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


if __name__ == "__main__":
  cli.run(main)
