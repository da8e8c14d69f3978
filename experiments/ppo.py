"""PPO on a language model with programmed or learnt rewards.

A minute on two CPU cores, after `experiments/sft.py` has made the policy:
  python experiments/ppo.py \
    --flagfile=experiments/flags/padula/arithmetic_cpu.flags \
    --policy=runs/sft --workdir=runs/ppo --batch_entropy_coef=0.3

Source: Padula and Soemers (2024), arXiv 2410.17126, section by section as in
their code: rollout, token rewards, GAE, whitening, epochs of clipped updates.
Departures: one mask of allowed tokens for sampler and loss (--mask_in_loss),
the KL modes have names, and the ratio guard stops the entropy terms too.

The token rewards are the sum of the --reward_terms:
  score               what the task says of a response, on its last token
  steps               --step_reward for every line that matches the reference
  reward_model        what --reward_model says, on the last token
  dense_reward_model  by how much each line changes what --reward_model, with
                      the policy's tokens, expects: --step_coef * difference
The rows of Havrilla et al. (2024), arXiv 2403.04642: sparse is score; dense
heuristic is score,steps; sparse ORM is score,reward_model (or reward_model
alone); dense ORM is score,dense_reward_model. Their critic is
--critic=branch:4, layers of its own that send no gradient into the policy.
"""

import contextlib
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
from rljax.generation import decode, grammars, rollouts, samplers
from rljax.losses import entropy, ppo
from rljax.models import classifier, heads, hf, value_branch
from rljax.ops import advantages, log_probs, masking, rewards, sampling
from rljax.scoring import reward_terms, scorers
from rljax.storage import checkpoint
from rljax.text import batches as batches_lib
from rljax.text import files, keywords
from rljax.text import tokens as tokens_lib
from rljax.training import logs, preflight, runs

# Run.
flags.DEFINE_string("workdir", None, "Checkpoints, logs, plots.", required=True)
flags.DEFINE_integer("seed", 0, "Seed of every source of randomness.")
flags.DEFINE_integer("steps", 1024, "Rollouts, each followed by its updates.")
flags.DEFINE_integer("save_every", 200, "Steps between checkpoints.")
flags.DEFINE_integer("eval_every", 100, "Steps between held-out evaluations.")
flags.DEFINE_bool("keep_best", False, "In best: the best of evaluations.")
flags.DEFINE_integer("samples_every", 50, "Steps between sample tables.")
flags.DEFINE_integer("samples_logged", 32, "Rows of a sample table.")
flags.DEFINE_integer(
  "num_page_samples", 8, "In tokens.html; 0: no page.", lower_bound=0
)
flags.DEFINE_string("mesh", "data:-1", "Axes data, fsdp, tensor; -1: the rest.")
flags.DEFINE_enum("preflight", "strict", ["strict", "warn", "off"], "On red.")
flags.DEFINE_string("compilation_cache", "~/.cache/rljax", "Empty for none.")
flags.DEFINE_string("wandb_project", "", "Also log to this project.")
# Task.
flags.DEFINE_string("task", "arithmetic", "A module of rljax.tasks.")
flags.DEFINE_list("task_options", [], "name=value, handed to task.prompts.")
flags.DEFINE_list("score_options", [], "name=value, handed to task.score.")
flags.DEFINE_integer("num_prompts", 131_072, "Training prompts to draw from.")
flags.DEFINE_integer("num_eval_prompts", 512, "Held-out prompts.")
flags.DEFINE_enum("eval_split", "test", ["test", "validation"], "Of the task.")
flags.DEFINE_integer("max_prompt_length", 512, "Tokens; longer is an error.")
# Models.
flags.DEFINE_string(
  "policy", None, "Workdir, directory or name.", required=True
)
flags.DEFINE_string("reference", "", "Of --kl=initial; default: the policy.")
flags.DEFINE_string(
  "critic", "shared", "shared, separate, branch:<layers>, or a model."
)
flags.DEFINE_bool("detach_values", False, "No value gradient in the trunk.")
flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of compute.")
flags.DEFINE_bool("remat", False, "Recompute layers in the backward pass.")
flags.DEFINE_integer("chunk_size", 0, "Positions with logits; 0: what fits.")
# Rollout.
flags.DEFINE_integer("batch_size", 128, "Prompts per step.")
flags.DEFINE_integer("num_samples", 1, "Responses per prompt.")
flags.DEFINE_integer("max_length", 1, "Response tokens.")
flags.DEFINE_integer(
  "min_length",
  0,
  "Each response has a limit of its own, drawn from here to --max_length; 0: "
  "all have that.",
)
flags.DEFINE_float("temperature", 1.0, "Of sampler and trainer.")
flags.DEFINE_integer("top_k", 0, "0: off.")
flags.DEFINE_float("top_p", 1.0, "1: off.")
flags.DEFINE_float("min_p", 0.0, "0: off.")
flags.DEFINE_bool("stop_at_eos", False, "Else the end token is never drawn.")
flags.DEFINE_list("stop_strings", [], r"Texts that end a response; \n too.")
flags.DEFINE_enum(
  "constraint", "none", ["none", "grammar"], "The task's, on responses."
)
# Rewards.
flags.DEFINE_list("reward_terms", ["score"], "Their sum is the reward.")
flags.DEFINE_float(
  "unfinished_score", None, "Of responses without an end; unset: as any other."
)
flags.DEFINE_float("step_reward", 0.1, "Of a line that matches.")
flags.DEFINE_float("step_reward_limit", 0.5, "Of all such lines together.")
flags.DEFINE_float("step_coef", 1.0, "Of dense_reward_model.")
flags.DEFINE_string("reward_model", "", "A classifier of texts.")
flags.DEFINE_string("reward_transform", "sigmoid", "Of its logits.")
flags.DEFINE_string("reward_template", "{prompt}{response}", "What it reads.")
flags.DEFINE_integer("reward_length", 512, "Tokens that it reads.")
flags.DEFINE_enum("kl", "none", ["none", "initial", "old"], "KL penalty.")
flags.DEFINE_enum("kl_estimator", "k1", ["k1", "k2", "k3"], "Of --kl=initial.")
flags.DEFINE_float("kl_coef", 0.2, "First or fixed coefficient.")
flags.DEFINE_float("kl_target", 0.0, "Nats a sequence; 0: fixed coefficient.")
flags.DEFINE_float("kl_horizon", 10_000.0, "Samples.")
flags.DEFINE_float("discount", 1.0, "Per response token.")
flags.DEFINE_float("gae_lambda", 0.95, "1: Monte-Carlo returns.")
flags.DEFINE_bool("whiten_advantages", True, "Over the whole batch.")
# Loss.
flags.DEFINE_float("clip_epsilon", 0.2, "Of the probability ratio.")
flags.DEFINE_float("value_clip_epsilon", 0.2, "Of the value, in units of it.")
flags.DEFINE_float("value_coef", 0.1, "Weight of the value loss.")
flags.DEFINE_float("entropy_coef", 0.0, "Weight of the token entropy.")
flags.DEFINE_float("batch_entropy_coef", 0.0, "Weight of the batch entropy.")
flags.DEFINE_enum(
  "batch_entropy_mode",
  "per_step",
  ["last", "per_step", "pooled", "mi"],
  "Axes.",
)
flags.DEFINE_bool("mask_in_loss", True, "False: as in the paper's code.")
flags.DEFINE_float("ratio_guard", 10.0, "No loss above this mean; 0: off.")
# Updates.
flags.DEFINE_integer("epochs", 4, "Passes over a rollout.")
flags.DEFINE_integer("minibatch_size", 0, "Rows per update; 0: all.")
flags.DEFINE_integer("micro_batch_size", 0, "Rows per pass; 0: a minibatch.")
flags.DEFINE_float("learning_rate", 1.41e-5, "Of Adam.")
flags.DEFINE_enum("schedule", "constant", ["constant", "linear"], "Down to 0.")
flags.DEFINE_integer("warmup_steps", 0, "Updates.")
flags.DEFINE_float("adam_b1", 0.9, "")
flags.DEFINE_float("adam_b2", 0.999, "")
flags.DEFINE_float("adam_epsilon", 1e-8, "")
flags.DEFINE_float("weight_decay", 0.0, "")
flags.DEFINE_float("max_grad_norm", 0.0, "0: no clipping.")
FLAGS = flags.FLAGS

COLUMNS = (
  "reward/mean",
  "task/is_correct",
  "entropy/token",
  "entropy/batch",
  "ppo/approx_kl",
  "tokens_per_second",
)
PANELS = {
  "Reward": ["reward/mean", "eval/reward"],
  "Reward terms": [f"reward/{name}" for name in reward_terms.TERMS[1:]],
  "Correct": ["task/is_correct", "eval/is_correct"],
  "Entropy (nats)": ["entropy/token", "entropy/batch"],
  "Answers": ["answers/distinct"],
  "KL (nats)": ["kl/sequence_k1", "ppo/approx_kl"],
  "Clip fraction": ["ppo/clip_fraction", "value/clip_fraction"],
}


def main(_):
  processes.join()
  num_rows = FLAGS.batch_size * FLAGS.num_samples
  minibatch_size = FLAGS.minibatch_size or num_rows
  micro_batch_size = FLAGS.micro_batch_size or minibatch_size
  mesh = meshes.make(FLAGS.mesh)
  validate(num_rows, minibatch_size, micro_batch_size, mesh)
  may_change = (
    *("workdir", "mesh", "preflight", "compilation_cache"),
    *("wandb_project", "samples_logged", "num_page_samples"),
  )
  in_force = runs.start(FLAGS, may_change)
  task = tasks.load(FLAGS.task)
  task_options = keywords.parse(FLAGS.task_options)
  keywords.check(task.prompts, task_options)
  score_options = keywords.parse(FLAGS.score_options)
  keywords.check(task.score, score_options)
  score = scorers.divided(
    functools.partial(tasks.score_all, task, **score_options)
  )
  settings = sampling.Settings(
    temperature=FLAGS.temperature,
    top_k=FLAGS.top_k,
    top_p=FLAGS.top_p,
    min_p=FLAGS.min_p,
  )

  # Models. A shared critic is a linear head on the policy's hidden states; a
  # branch has layers of its own between the two.
  loaded = hf.load(FLAGS.policy, dtype=FLAGS.dtype, remat=FLAGS.remat)
  policy, tokenizer = loaded.model, loaded.tokenizer
  rules = hf.partition_rules(policy, mesh)
  meshes.shardings(loaded.params, rules, mesh)  # Else nothing is compiled.
  if task_options.get("tokenizer") == "policy":  # Prompts of so many tokens.
    task_options["tokenizer"] = tokenizer
  critic, params = policy, {"policy": loaded.params}
  if num_layers := branch_layers():
    branch = value_branch.ValueBranch(policy.config, num_layers)
    params["value_branch"] = jax.jit(branch.init)(
      jax.random.key(FLAGS.seed),
      jnp.zeros((1, 1, policy.config.hidden_size)),
      jnp.ones((1, 1), bool),
    )["params"]
  elif FLAGS.critic == "separate":
    params["critic"] = loaded.params
  elif FLAGS.critic != "shared":
    other = hf.load(FLAGS.critic, dtype=FLAGS.dtype, remat=FLAGS.remat)
    critic, params["critic"] = other.model, other.params
    if critic.config.vocab_size != policy.config.vocab_size:
      raise ValueError(
        f"--critic={FLAGS.critic} has {critic.config.vocab_size} tokens, the "
        f"policy {policy.config.vocab_size}: they must share a tokenizer."
      )
  value_head = heads.ValueHead()
  params["value_head"] = value_head.init(
    jax.random.key(FLAGS.seed), jnp.zeros((1, critic.config.hidden_size))
  )["params"]
  reference = None
  if FLAGS.kl == "initial":
    reference = loaded.params
    if FLAGS.reference:
      other = hf.load(FLAGS.reference, dtype=FLAGS.dtype, remat=FLAGS.remat)
      runs.check_same_kind(f"--reference={FLAGS.reference}", other, loaded)
      reference = other.params
  first_weights = {"policy": loaded.params, "reference": reference}

  # Models that reward: one reads texts, the other the policy's own tokens.
  if "reward_model" in FLAGS.reward_terms:
    model_score = scorers.scorer(
      "",
      {},
      FLAGS.reward_model,
      transform=FLAGS.reward_transform,
      template=FLAGS.reward_template,
      max_length=FLAGS.reward_length,
      batch_size=FLAGS.batch_size,
      mesh=mesh,
    )
  outcome_model = None
  if "dense_reward_model" in FLAGS.reward_terms:
    outcome_model = load_outcome_model(tokenizer)

  # Prompts become ids here, once. All batches have one shape.
  vocab_size = policy.config.vocab_size
  stop_ids = tokens_lib.stop_ids(tokenizer) if FLAGS.stop_at_eos else ()
  # Other special tokens and unused rows of the vocabulary are never drawn.
  allowed = jnp.asarray(
    tokens_lib.allowed_tokens(tokenizer, vocab_size, stop_ids)
  )
  loss_allowed = allowed if FLAGS.mask_in_loss else None
  grammar = None
  if FLAGS.constraint == "grammar":
    grammar = grammars.of_task(task, tokenizer, vocab_size)
    grammar = meshes.replicate(grammar, mesh)
  stop_strings = None
  ends = runs.unescaped(FLAGS.stop_strings)
  has_steps = {"steps", "dense_reward_model"} & set(FLAGS.reward_terms)
  line_feeds = np.zeros(vocab_size, np.int32)  # In each token.
  if ends or has_steps:
    token_bytes = tokens_lib.token_bytes(tokenizer, vocab_size=vocab_size)
  if ends:
    stop_strings = decode.stop_table(ends, token_bytes)
  if has_steps:
    line_feeds[:] = [piece.count(b"\n") for piece in token_bytes]
  prompts, eval_prompts = (
    task.prompts(split, FLAGS.seed, num=num, **task_options)
    for split, num in (
      ("train", FLAGS.num_prompts),
      (FLAGS.eval_split, FLAGS.num_eval_prompts),
    )
  )
  # Bad options show here, not after a rollout.
  _, parts = score(eval_prompts[:1], [""])
  if "steps" in FLAGS.reward_terms and "step_matches" not in parts[0]:
    raise ValueError(
      "--reward_terms=steps needs a task whose parts say step_matches, line by "
      f"line, such as reasoning; those of --task={FLAGS.task} are "
      f"{', '.join(parts[0]) or 'none'}."
    )
  tokens_lib.require_tokens(
    tokenizer, eos=FLAGS.stop_at_eos, text=prompts[0] if prompts else None
  )
  encoded = tokens_lib.encode_prompts(
    tokenizer, [*prompts, *eval_prompts], max_length=FLAGS.max_prompt_length
  )
  prompt_ids, prompt_mask = batches_lib.pad_left(
    encoded, length=max(map(len, encoded))
  )
  models = [policy, critic] + ([outcome_model.model] if outcome_model else [])
  for model in models:
    tokens_lib.check_positions(
      prompt_ids.shape[1] + FLAGS.max_length, model.config.max_positions
    )

  # What is differentiated.
  chunk_size = FLAGS.chunk_size or log_probs.chunk_size(
    micro_batch_size, vocab_size
  )
  statistics_of = functools.partial(
    rollouts.token_statistics,
    policy,
    temperature=FLAGS.temperature,
    allowed=loss_allowed,
    chunk_size=chunk_size,
  )

  def forward(params, rollout):
    """Token statistics, hidden states and values, `[N, T, ...]` each."""
    text, mask = rollouts.text_hidden(policy, params["policy"], rollout)
    features = hidden = rollouts.at_responses(text, rollout)
    statistics, _ = statistics_of(params["policy"], rollout, hidden=hidden)
    if "value_branch" in params:
      variables = {"params": params["value_branch"]}
      features = branch.apply(variables, text, mask)
      features = rollouts.at_responses(features, rollout)
    elif "critic" in params:
      features = rollouts.response_hidden(critic, params["critic"], rollout)
    elif FLAGS.detach_values:
      features = jax.lax.stop_gradient(hidden)
    values = value_head.apply({"params": params["value_head"]}, features)
    return statistics, hidden, values

  def batch_entropy(params, hidden, mask):
    return entropy.batch_entropy_from_hidden(
      lambda h: policy.apply({"params": params["policy"]}, h, method="logits"),
      hidden,
      mask,
      # Of all rows at a time, or of those of a micro-batch.
      chunk_size=FLAGS.chunk_size
      or log_probs.chunk_size(hidden.shape[0], vocab_size),
      mode=FLAGS.batch_entropy_mode,
      temperature=FLAGS.temperature,
      allowed=allowed,
      mask_in_loss=FLAGS.mask_in_loss,
    )

  def loss_fn(params, batch, kl_coef):
    rollout = batch["rollout"]
    mask = rollout.response_mask
    statistics, hidden, values = forward(params, rollout)
    policy_loss, metrics = ppo.clipped_policy_loss(
      statistics.log_probs,
      batch["old_log_probs"],
      batch["advantages"],
      mask,
      clip_epsilon=FLAGS.clip_epsilon,
    )
    value_loss, value_metrics = ppo.clipped_value_loss(
      values,
      batch["old_values"],
      batch["returns"],
      mask,
      clip_epsilon=FLAGS.value_clip_epsilon,
    )
    loss = policy_loss + FLAGS.value_coef * value_loss
    if FLAGS.entropy_coef:
      token_entropy = masking.masked_mean(statistics.entropies, mask)
      loss -= FLAGS.entropy_coef * token_entropy
    if FLAGS.batch_entropy_coef:
      spread, _ = batch_entropy(params, hidden, mask)
      loss -= FLAGS.batch_entropy_coef * spread
    if FLAGS.kl == "old":
      loss += kl_coef * ppo.kl_from_old(
        statistics.log_probs, batch["old_log_probs"], mask
      )
    if FLAGS.ratio_guard:
      loss *= ppo.ratio_guard(
        statistics.log_probs,
        batch["old_log_probs"],
        mask,
        threshold=FLAGS.ratio_guard,
      )
    return loss, {"loss": loss, **metrics, **value_metrics}

  def gradients(params, batch, kl_coef, num_micro_batches):
    """Gradients of one minibatch, in pieces that fit into memory.

    The means of a micro-batch are over its own tokens: its share of the
    minibatch's tokens is its weight. Two things are not sums over rows, and
    are those of a micro-batch: the ratio guard, and the batch entropy, which
    is low by about (K - 1) / 2b for K answers and b rows.
    """
    gradient = jax.grad(loss_fn, has_aux=True)
    if num_micro_batches == 1:
      return gradient(params, batch, kl_coef)
    # Every micro-batch takes its rows from all devices.
    parts = jax.tree.map(
      lambda x: x.reshape(-1, num_micro_batches, *x.shape[1:]).swapaxes(0, 1),
      batch,
    )
    tokens = parts["rollout"].response_mask.sum((1, 2)).astype(jnp.float32)
    weights = tokens / jnp.maximum(tokens.sum(), 1.0)

    def add(total, inputs):
      weight, part = inputs
      part = jax.lax.with_sharding_constraint(part, rows_sharding)
      found = gradient(params, part, kl_coef)
      return jax.tree.map(lambda a, b: a + weight * b, total, found), None

    first = jax.tree.map(lambda x: x[0], parts)
    shapes = jax.eval_shape(gradient, params, first, kl_coef)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    total, _ = jax.lax.scan(add, zeros, (weights, parts))
    return total

  # Optimizer, and the state on its mesh.
  rows_sharding = meshes.batch_sharding(mesh)
  num_minibatches = num_rows // minibatch_size
  num_micro_batches = minibatch_size // micro_batch_size
  num_parts = num_rows // micro_batch_size if FLAGS.micro_batch_size else 1
  num_updates = FLAGS.steps * FLAGS.epochs * num_minibatches
  warmup = optax.linear_schedule(
    0.0 if FLAGS.warmup_steps else FLAGS.learning_rate,
    FLAGS.learning_rate,
    FLAGS.warmup_steps,
  )
  then = optax.linear_schedule(
    FLAGS.learning_rate,
    FLAGS.learning_rate if FLAGS.schedule == "constant" else 0.0,
    max(1, num_updates - FLAGS.warmup_steps),
  )
  optimizer = optax.chain(
    optax.clip_by_global_norm(FLAGS.max_grad_norm or math.inf),
    optax.adamw(
      optax.join_schedules([warmup, then], [FLAGS.warmup_steps]),
      b1=FLAGS.adam_b1,
      b2=FLAGS.adam_b2,
      eps=FLAGS.adam_epsilon,
      weight_decay=FLAGS.weight_decay,
    ),
  )
  # A critic may be of another family.
  rules = (*rules[:-1], *hf.partition_rules(critic, mesh))
  params = meshes.place(params, meshes.shardings(params, rules, mesh))
  if reference is not None:
    reference = meshes.place(
      reference, meshes.shardings(reference, rules, mesh)
    )
  if outcome_model is not None:
    outcome_rules = hf.partition_rules(outcome_model.model, mesh)
    outcome_params = meshes.place(
      outcome_model.params,
      meshes.shardings(outcome_model.params, outcome_rules, mesh),
    )
  state = {
    "params": params,
    "optimizer": optimizer.init(params),
    "kl": rewards.AdaptiveKL.create(FLAGS.kl_coef),
  }
  state_shardings = meshes.shardings(state, rules, mesh)
  state = meshes.place(state, state_shardings)

  # All rows, in no more memory than an update takes.
  in_parts = functools.partial(
    rollouts.in_parts, num_parts=num_parts, sharding=rows_sharding
  )

  def prepare(state, reference, rollout, earned):
    """What stays fixed while a rollout is learnt from, and its metrics."""
    mask = rollout.response_mask
    old, hidden, old_values = in_parts(
      lambda part: forward(state["params"], part), rollout
    )
    by_term = reward_terms.token_rewards(
      earned,
      jnp.asarray(line_feeds > 0)[rollout.response_ids],
      mask,
      counts=None if FLAGS.unfinished_score is None else rollout.finished,
      step_coef=FLAGS.step_coef,
    )
    token_rewards = functools.reduce(jnp.add, by_term.values())
    totals = token_rewards.sum(axis=1)
    # What is logged as the reward: the score, where it is a term.
    outcomes = earned.get("score", totals)
    metrics = {}
    if FLAGS.constraint == "none":  # It knows no masks of single tokens.
      _, metrics = batch_entropy(state["params"], hidden, mask)
    if FLAGS.kl == "initial":
      ref = in_parts(lambda part: statistics_of(reference, part)[0], rollout)
      token_rewards += rewards.kl_penalty(
        old.log_probs,
        ref.log_probs,
        mask,
        kl_coef=state["kl"].coef,
        kind=FLAGS.kl_estimator,
      )
      log_ratios = log_probs.kl_estimate(
        old.log_probs, ref.log_probs, kind="k1"
      )
      metrics |= {
        "kl/sequence_k1": masking.masked_sum(log_ratios, mask, axis=1).mean(),
        "kl/coef": state["kl"].coef,
      }
    token_advantages, returns = advantages.gae(
      token_rewards,
      old_values,
      mask,
      discount=FLAGS.discount,
      gae_lambda=FLAGS.gae_lambda,
    )
    if FLAGS.whiten_advantages:
      token_advantages = masking.masked_whiten(token_advantages, mask)
    batch = {
      "rollout": rollout,
      "old_log_probs": old.log_probs,
      "old_values": old_values,
      "advantages": token_advantages,
      "returns": returns,
    }
    gap = jnp.abs(rollout.log_probs - old.log_probs)
    metrics |= {
      "entropy/token": masking.masked_mean(old.entropies, mask),
      "reward/mean": outcomes.mean(),
      "reward/std": outcomes.std(),
      "reward/total": totals.mean(),
      "reward/with_kl": token_rewards.sum(axis=1).mean(),
      "values/mean": masking.masked_mean(old_values, mask),
      "response/length": mask.sum(axis=1).astype(jnp.float32).mean(),
      "response/finished": rollout.finished.astype(jnp.float32).mean(),
      "sampler/log_prob_gap": jnp.where(mask, gap, 0.0).max(),
    } | {
      f"reward/{name}": placed.sum(axis=1).mean()
      for name, placed in by_term.items()
      if name != "score"
    }
    return jax.lax.stop_gradient(batch), metrics

  def learn(state, reference, rollout, earned, key):
    """All epochs of one rollout, without leaving the devices."""
    batch, metrics = prepare(state, reference, rollout, earned)

    def update(carry, rows):
      params, optimizer_state = carry
      # A gather of rows in random order would leave them on every device.
      minibatch = jax.lax.with_sharding_constraint(
        jax.tree.map(lambda x: x[rows], batch), rows_sharding
      )
      grads, metrics = gradients(
        params, minibatch, state["kl"].coef, num_micro_batches
      )
      updates, optimizer_state = optimizer.update(
        grads, optimizer_state, params
      )
      metrics["gradient_norm"] = optax.global_norm(grads)
      return (optax.apply_updates(params, updates), optimizer_state), metrics

    shuffle = lambda key: jax.random.permutation(key, num_rows)
    orders = jax.vmap(shuffle)(jax.random.split(key, FLAGS.epochs))
    (params, optimizer_state), updates = jax.lax.scan(
      update,
      (state["params"], state["optimizer"]),
      orders.reshape(-1, minibatch_size),
    )
    controller = state["kl"]
    if FLAGS.kl_target:
      controller = controller.update(
        metrics["kl/sequence_k1"],
        num_rows,
        target=FLAGS.kl_target,
        horizon=FLAGS.kl_horizon,
      )
    metrics |= {name: values.mean() for name, values in updates.items()}
    metrics["ppo/ratio_max"] = updates["ppo/ratio_max"].max()
    state = {
      "params": params,
      "optimizer": optimizer_state,
      "kl": controller,
    }
    return state, metrics

  sample = compiled.Compiled(
    "sample",
    lambda key, params, ids, mask, lengths, within: rollouts.sample(
      key,
      policy,
      params,
      ids,
      mask,
      max_length=FLAGS.max_length,
      settings=settings,
      num_samples=FLAGS.num_samples,
      allowed=allowed,
      stop_ids=stop_ids,
      stop_strings=stop_strings,
      lengths=lengths,
      constraint=within,
      split_cache=meshes.cache_splitter(mesh),
      pad_id=tokens_lib.pad_id(tokenizer),
    ),
  )
  expect = compiled.Compiled(
    "expect",
    # The model has one label, "right": this is its probability.
    lambda params, rollout: in_parts(
      lambda part: jax.nn.sigmoid(
        rollouts.prefix_logits(outcome_model.model, params, part)[:, :, 0]
      ),
      rollout,
    ),
  )
  # Not an output of `learn`, whose numbers must not depend on a page.
  weigh = compiled.Compiled(
    "weigh", lambda *args: prepare(*args)[0]["advantages"]
  )
  learn = compiled.Compiled(
    "learn", learn, donate_argnums=0, out_shardings=(state_shardings, None)
  )

  # A run that was stopped goes on where its last checkpoint is.
  checkpoints = checkpoint.Checkpoints(FLAGS.workdir)
  best_checkpoints = contextlib.nullcontext()
  best_dir = os.path.join(FLAGS.workdir, "best")
  if FLAGS.keep_best:  # Of --eval_every, by eval/is_correct or eval/reward.
    best_checkpoints = checkpoint.Checkpoints(best_dir, keep=1)
  first_step, best = 0, None
  if restored := checkpoints.restore_latest(state):
    first_step, state, meta = restored
    best = meta.get("best")
  if FLAGS.keep_best:
    best_checkpoints.forget_after(best["step"] if best else 0)

  def constraint_on(texts):
    """What the responses to prompts must follow; None without a grammar."""
    if grammar is None:
      return None
    places = task.places(texts, tokenizer, vocab_size)
    return grammars.constraint(grammar, **places)

  def rollout_of(step):
    """The prompts of a step and the policy's responses to them."""
    rows = batches_lib.batch_indices(
      len(prompts), FLAGS.batch_size, step, seed=FLAGS.seed
    )
    ids, mask, lengths = meshes.shard_batch(
      (prompt_ids[rows], prompt_mask[rows], draw_lengths(num_rows, step, 1)),
      mesh,
    )
    key = jax.random.fold_in(jax.random.key(FLAGS.seed), step)
    sample_key, learn_key = jax.random.split(key)
    within = constraint_on([prompts[i] for i in rows])
    if within is not None:
      within = within._replace(
        start=meshes.shard_batch(within.start, mesh),
        seconds=meshes.shard_batch(within.seconds, mesh),
      )
    rollout = sample(
      sample_key, state["params"]["policy"], ids, mask, lengths, within
    )
    texts = [prompts[i] for i in rows for _ in range(FLAGS.num_samples)]
    return rollout, texts, learn_key

  read = functools.partial(samplers.read, tokenizer, stop_strings=ends)
  answer = samplers.Responder(
    policy,
    tokenizer,
    encoded[len(prompts) :],
    max_length=FLAGS.max_length,
    settings=sampling.Settings(greedy=True),
    batch_size=FLAGS.batch_size,
    mesh=mesh,
    stop_at_eos=FLAGS.stop_at_eos,
    stop_strings=ends,
    max_lengths=draw_lengths(len(eval_prompts), 0, 2),
    constraint=constraint_on(eval_prompts),
  )

  def judge(texts, replies, finished):
    """What the task says, or --unfinished_score where a reply has no end."""
    scores, parts = score(texts, replies)
    if FLAGS.unfinished_score is not None:
      _, parts = samplers.unfinished_are_wrong(scores, parts, finished)
      scores = np.where(finished, scores, np.float32(FLAGS.unfinished_score))
    return scores, parts

  def earn(rollout, texts, replies):
    """The scores and their parts, and what each term needs on the devices."""
    scores, parts = judge(texts, replies, processes.gather(rollout.finished))
    earned = {}
    for name in FLAGS.reward_terms:
      if name == "score":
        earned[name] = scores
      elif name == "steps":
        ids, mask = processes.gather(
          (rollout.response_ids, rollout.response_mask)
        )
        earned[name] = reward_terms.step_rewards(
          [part["step_matches"] for part in parts],
          np.where(mask, line_feeds[ids], 0),
          reward=FLAGS.step_reward,
          limit=FLAGS.step_reward_limit,
        )
      elif name == "reward_model":
        earned[name], _ = model_score(texts, replies)
      else:
        earned[name] = expect(outcome_params, rollout)
    return scores, parts, meshes.shard_batch(earned, mesh)

  def show_tokens(step, rollout, texts, scores, parts, earned):
    """A page of responses and the advantages that are learnt from next."""
    ids, mask, weights = processes.gather(
      (
        rollout.response_ids,
        rollout.response_mask,
        weigh(state, reference, rollout, earned),
      )
    )
    if not processes.is_first():
      return
    facts = zip(scores.tolist(), parts, strict=True)
    token_pages.write(
      os.path.join(FLAGS.workdir, "tokens.html"),
      f"{FLAGS.task}: a rollout after {step} steps",
      token_pages.from_arrays(
        tokenizer,
        texts,
        ids,
        mask,
        weights,
        facts=[{"reward": reward} | part for reward, part in facts],
        limit=FLAGS.num_page_samples,
      ),
      value_name="advantage",
      limit=FLAGS.num_page_samples,
      num_in_all=num_rows,
    )

  def evaluate(step):
    """Greedy answers to the held-out prompts."""
    batches = list(answer.batches(state["params"]["policy"]))
    replies = [text for _, texts, _ in batches for text in texts]
    finished = np.concatenate([ended for _, _, ended in batches])
    scores, parts = judge(eval_prompts, replies, finished)
    means = {"reward": scores.mean(), **tasks.mean_parts(parts)}
    metrics = {f"eval/{name}": float(value) for name, value in means.items()}
    if FLAGS.keep_best:
      keep_if_best(step, metrics)
    return metrics

  def keep_if_best(step, metrics):
    """Saves the parameters that beat all evaluations before, the start's too.

    If none does, the last ones count as the best.
    """
    nonlocal best
    value = metrics.get("eval/is_correct", metrics["eval/reward"])
    best = best or {"step": 0, "value": value}
    is_better = value > best["value"]
    if is_better:
      best = {"step": step, "value": value}
    is_last_choice = step == FLAGS.steps and not best["step"]
    if is_last_choice:
      log.note("Nothing beat the start: the last parameters are the best.")
    if is_better or is_last_choice:
      best_checkpoints.save(step, {"params": state["params"]}, best)
      # Before the state that says so: a kill between them repeats these steps.
      best_checkpoints.wait()

  # Before anything is trained: do sampler and learner agree?
  if FLAGS.preflight != "off":
    rollout, texts, learn_key = rollout_of(first_step)
    _, _, earned = earn(rollout, texts, read(rollout))
    batch, _ = jax.jit(prepare)(state, reference, rollout, earned)
    rows = jax.tree.map(lambda x: x[:micro_batch_size], batch)
    run = jax.jit(gradients, static_argnums=3)
    checks = preflight.check(
      policy,
      state["params"]["policy"],
      rollout,
      settings=settings,
      allowed=loss_allowed,
      stop_ids=stop_ids,
      has_stop_strings=stop_strings is not None,
      chunk_size=chunk_size,
      num_parts=num_parts,
      rows_sharding=rows_sharding,
      gradients=lambda n: run(state["params"], rows, state["kl"].coef, n),
      # Parts of which every device still has a row.
      num_micro_batches=smallest_divisor(
        micro_batch_size // meshes.num_batch_shards(mesh)
      ),
      tolerance=1e-4 if FLAGS.dtype == "float32" else 0.2,
      gradient_tolerance=None
      if FLAGS.batch_entropy_coef
      else (1e-3 if FLAGS.dtype == "float32" else 0.1),
    )
    learn.compile(state, reference, rollout, earned, learn_key)
    preflight.show(
      checks,
      sample.compilations + expect.compilations + learn.compilations,
      state | {"reference": reference},
    )
    preflight.judge(checks, FLAGS.preflight)

  runs.check_models(FLAGS.workdir, first_weights)
  checkpoint.write_flags(FLAGS.workdir, in_force, may_change)
  for folder in [FLAGS.workdir] + ([best_dir] if FLAGS.keep_best else []):
    hf.save_config(os.path.join(folder, "model"), policy, tokenizer)
  log = logs.Logs(
    FLAGS.workdir,
    total_steps=FLAGS.steps,
    first_step=first_step,
    columns=COLUMNS,
    wandb_project=FLAGS.wandb_project,
  )
  for kept in (checkpoints, best_checkpoints):
    for message in getattr(kept, "messages", ()):
      log.note(message)
  log.curves(functools.partial(curves.curves, panels=PANELS))
  with (
    log,
    checkpoints,
    best_checkpoints,
    checkpoint.Preemption() as preemption,
  ):
    for step in range(first_step, FLAGS.steps):
      # Row `step` of the metrics is about the policy after `step` rollouts.
      metrics = {"rollouts": step * num_rows}
      if step % FLAGS.eval_every == 0:
        metrics |= evaluate(step)
      started = time.perf_counter()
      rollout, texts, learn_key = rollout_of(step)
      replies = read(rollout)
      scores, parts, earned = earn(rollout, texts, replies)
      is_shown = step % FLAGS.eval_every == 0 or step + 1 == FLAGS.steps
      if FLAGS.num_page_samples and is_shown:
        paused = time.perf_counter()
        show_tokens(step, rollout, texts, scores, parts, earned)
        started += time.perf_counter() - paused
      state, learnt = learn(state, reference, rollout, earned, learn_key)
      metrics |= jax.device_get(learnt)
      seconds = time.perf_counter() - started
      metrics |= {f"task/{k}": v for k, v in tasks.mean_parts(parts).items()}
      metrics |= {
        "answers/distinct": metrics_lib.distinct_answers(
          part.get("answer", text)
          for part, text in zip(parts, replies, strict=True)
        ),
        "tokens_per_second": processes.gather(rollout.response_mask).sum()
        / seconds,
        "step_seconds": seconds,
      }
      log.write(step, metrics)
      if step % FLAGS.samples_every == 0:
        rows = rollouts.records(
          rollout,
          texts,
          replies,
          scores,
          parts,
          settings=settings,
          policy_step=step,
        )
        log.samples(step, rows[: FLAGS.samples_logged])
        log.histograms(
          step,
          {
            name: metrics_lib.answer_histogram(part[name] for part in parts)
            for name in ("answer", "truth")
            if name in parts[0]
          },
        )
      done = step + 1
      stop = preemption.should_stop()
      if done % FLAGS.save_every == 0 or done == FLAGS.steps or stop:
        checkpoints.save(done, state, {"step": done, "best": best})
      if stop and done < FLAGS.steps:
        log.note(f"Stopped by a signal after step {done}; all is saved.")
        return preemption.exit_status
      for program in (sample, expect, answer.program, weigh, learn):
        program.freeze()

    # The numbers before and after, and where everything lies.
    metrics = evaluate(FLAGS.steps)
    log.write(FLAGS.steps, metrics | {"rollouts": FLAGS.steps * num_rows})
    if not processes.is_first():
      return
    rows = files.read_jsonl(os.path.join(FLAGS.workdir, "metrics.jsonl"))
    shown = ("reward/mean", "entropy/token", "entropy/batch", *metrics)
    table = {
      name: {
        "before": rows[0].get(name),
        "after": (rows[-2] | rows[-1]).get(name),
      }
      for name in shown
    }
    title = f"{FLAGS.task}: {FLAGS.workdir}"
    if FLAGS.keep_best:
      title += f"; the best, of step {best['step'] or FLAGS.steps}, in best"
    log.summary(table, title=title)


def validate(num_rows, minibatch_size, micro_batch_size, mesh):
  """Says what is wrong with the flags before anything is loaded."""
  for name in (
    *("steps", "save_every", "eval_every", "samples_every", "epochs"),
    *("batch_size", "num_samples", "max_length"),
    *("num_prompts", "num_eval_prompts"),
  ):
    if FLAGS[name].value < 1:
      raise ValueError(f"--{name} must be positive, got {FLAGS[name].value}.")
  if num_rows % minibatch_size:
    raise ValueError(
      f"--minibatch_size={minibatch_size} does not divide the {num_rows} rows "
      "of a rollout (batch_size x num_samples)."
    )
  if minibatch_size % micro_batch_size:
    raise ValueError(
      f"--micro_batch_size={micro_batch_size} does not divide the minibatches "
      f"of {minibatch_size} rows."
    )
  if not 0 <= FLAGS.min_length <= FLAGS.max_length:
    raise ValueError(
      f"--min_length must lie between 0 and --max_length={FLAGS.max_length}, "
      f"got {FLAGS.min_length}."
    )
  if FLAGS.constraint == "grammar":
    if not FLAGS.stop_at_eos:
      raise ValueError(
        "--constraint=grammar lets a response end where its expression does: "
        "it needs --stop_at_eos."
      )
    if FLAGS.batch_entropy_coef or not FLAGS.mask_in_loss:
      raise ValueError(
        "--constraint=grammar allows other tokens in every row: it goes "
        "neither with --batch_entropy_coef nor with --nomask_in_loss."
      )
  meshes.check_divisible(FLAGS.batch_size, mesh, "--batch_size")
  meshes.check_divisible(micro_batch_size, mesh, "--micro_batch_size")
  for name in ("kl_target", "reference"):
    if FLAGS[name].value and FLAGS.kl != "initial":
      raise ValueError(f"--{name} has a meaning for --kl=initial alone.")
  branch_layers()
  if FLAGS.unfinished_score is not None:
    if not (FLAGS.stop_at_eos or FLAGS.stop_strings):
      raise ValueError(
        "--unfinished_score is for responses that run out of length, as all "
        "do without --stop_at_eos or --stop_strings."
      )
    if not math.isfinite(FLAGS.unfinished_score):
      raise ValueError(
        f"--unfinished_score must be finite, got {FLAGS.unfinished_score}."
      )
    if FLAGS.unfinished_score and "score" not in FLAGS.reward_terms:
      raise ValueError(
        f"--unfinished_score={FLAGS.unfinished_score} stands in for the score, "
        "which is none of the --reward_terms: give 0, or the term."
      )
  terms, known = FLAGS.reward_terms, reward_terms.TERMS
  if not terms or sorted(terms) != sorted(set(terms) & set(known)):
    raise ValueError(
      f"--reward_terms must be some of {', '.join(known)}, each once, got "
      f"{','.join(terms) or 'none'}."
    )
  uses_model = {"reward_model", "dense_reward_model"} & set(terms)
  if bool(uses_model) != bool(FLAGS.reward_model):
    raise ValueError(
      "--reward_model and the terms reward_model and dense_reward_model of "
      f"--reward_terms need each other, got {FLAGS.reward_model or 'none'} "
      f"and {','.join(terms)}."
    )


def draw_lengths(num_responses, *place):
  """How many tokens each response may have; `place` tells draws apart."""
  return np.random.default_rng([FLAGS.seed, *place]).integers(
    FLAGS.min_length or FLAGS.max_length,
    FLAGS.max_length,
    num_responses,
    np.int32,
    endpoint=True,
  )


def branch_layers():
  """N of --critic=branch:N; 0 for other critics."""
  kind, colon, number = FLAGS.critic.partition(":")
  if kind != "branch":
    return 0
  if not (number.isdecimal() and int(number)):
    raise ValueError(
      "--critic=branch needs a number of layers, such as branch:4, got "
      f"{FLAGS.critic}."
    )
  return int(number)


def load_outcome_model(tokenizer):
  """--reward_model, to be read on the policy's own tokens."""
  name = FLAGS.reward_model
  loaded = hf.load_classifier(name, dtype=FLAGS.dtype)
  if not isinstance(loaded.model, classifier.CausalClassifier):
    raise ValueError(
      "--reward_terms=dense_reward_model needs a causal classifier, which sees "
      f"no later tokens; --reward_model={name} is of the type "
      f"{type(loaded.model).__name__}."
    )
  if len(loaded.labels) != 1:
    raise ValueError(
      "--reward_terms=dense_reward_model needs a classifier with one label; "
      f"--reward_model={name} has {', '.join(loaded.labels)}."
    )
  if loaded.tokenizer.get_vocab() != tokenizer.get_vocab():
    raise ValueError(
      "--reward_terms=dense_reward_model reads the policy's own tokens, but "
      f"--reward_model={name} has another vocabulary than "
      f"--policy={FLAGS.policy}; --reward_terms=reward_model reads texts."
    )
  return loaded


def smallest_divisor(number):
  """The smallest divisor above 1; 1 for 1."""
  return next((n for n in range(2, number + 1) if number % n == 0), 1)


if __name__ == "__main__":
  app.run(main)
