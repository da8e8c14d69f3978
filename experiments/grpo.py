"""GRPO and its kin: policy gradients that compare responses to one prompt.

A minute or two on two CPU cores, after `experiments/sft.py` has made the
policy with experiments/flags/padula/sft_cpu.flags:
  python experiments/grpo.py --policy=runs/sft --workdir=runs/grpo \
    --flagfile=experiments/flags/grpo/arithmetic.flags

There is no critic: a group of --num_samples responses to a prompt is its own
baseline. --algorithm names a preset: it gives the flags in its row a value
unless they are given explicitly. All else has one default for all of them.

  --algorithm            --advantage  --normalizer   --kl    and
  grpo                   grpo         sequence_mean  loss    --kl_coef=0.04
  dr_grpo                dr_grpo      constant       none
  dapo                   grpo         token_mean     none    [1]
  rloo                   rloo         constant       reward  --kl_coef=0.05
  reinforce_pp           the same     token_mean     reward  --kl_coef=0.01
  reinforce_pp_baseline  the same     token_mean     loss    [2]
  gspo                   grpo         sequence_mean  none    [3]
  cispo                  grpo         token_mean     none    --surrogate=cispo

  [1] --clip_epsilon_high=0.28 --dynamic_sampling
      --overlong_buffer=MAX_LENGTH/5 (rounded down)
  [2] --kl_estimator=k2 --kl_coef=0.01
  [3] --surrogate=gspo --clip_epsilon=3e-4 --clip_epsilon_high=4e-4

The --kl_coef of REINFORCE++ is ours: its paper gives none that we know of. The
flags in force, the preset's among them, are in flags.json.

Sources: GRPO, Shao et al. (2024), arXiv 2402.03300; Dr. GRPO, Liu et al.
(2025), arXiv 2503.20783; DAPO, Yu et al. (2025), arXiv 2503.14476; RLOO,
Ahmadian et al. (2024), arXiv 2402.14740; REINFORCE++, Hu et al. (2025), arXiv
2501.03262; GSPO, Zheng et al. (2025), arXiv 2507.18071; CISPO, MiniMax (2025),
arXiv 2506.13585. Departures: RLOO divides its sum over tokens by MAX_LENGTH,
which Adam takes back, and where several updates follow a rollout it clips the
ratio of each token. REINFORCE++ with baseline has the same advantage on all
tokens of a response, scaled by the batch's responses rather than its tokens.
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
from rljax.generation import decode, rollouts, samplers
from rljax.losses import ppo
from rljax.models import hf
from rljax.ops import advantages, log_probs, masking, rewards, sampling
from rljax.scoring import scorers
from rljax.storage import checkpoint
from rljax.text import batches, files, keywords
from rljax.text import tokens as tokens_lib
from rljax.training import logs, preflight, runs

PRESETS = {  # --advantage, --normalizer, --kl and others.
  "grpo": ("grpo", "sequence_mean", "loss", {"kl_coef": 0.04}),
  "dr_grpo": ("dr_grpo", "constant", "none", {}),
  "dapo": (
    *("grpo", "token_mean", "none"),
    {
      "clip_epsilon_high": 0.28,
      "dynamic_sampling": True,
      "overlong_buffer": lambda: FLAGS.max_length // 5,
    },
  ),
  "rloo": ("rloo", "constant", "reward", {"kl_coef": 0.05}),
  "reinforce_pp": ("reinforce_pp", "token_mean", "reward", {"kl_coef": 0.01}),
  "reinforce_pp_baseline": (
    *("reinforce_pp_baseline", "token_mean", "loss"),
    {"kl_estimator": "k2", "kl_coef": 0.01},
  ),
  "gspo": (
    *("grpo", "sequence_mean", "none"),
    {"surrogate": "gspo", "clip_epsilon": 3e-4, "clip_epsilon_high": 4e-4},
  ),
  "cispo": ("grpo", "token_mean", "none", {"surrogate": "cispo"}),
}
# Flags of a preset that go with another one.
PAIRED = {"kl_estimator": "kl", "clip_epsilon_high": "clip_epsilon"}
# What advantages.group_relative scales by.
SCALES = {"grpo": "group", "dr_grpo": "none", "reinforce_pp_baseline": "batch"}

# Run.
flags.DEFINE_string("workdir", None, "Checkpoints, logs, plots.", required=True)
flags.DEFINE_integer("seed", 0, "Seed of every source of randomness.")
flags.DEFINE_integer("steps", 1024, "Rollouts, each followed by its updates.")
flags.DEFINE_integer("save_every", 200, "Steps between checkpoints.")
flags.DEFINE_integer("eval_every", 100, "Steps between held-out evaluations.")
flags.DEFINE_integer("samples_every", 50, "Steps between sample tables.")
flags.DEFINE_integer("samples_logged", 32, "Rows of a sample table.")
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
flags.DEFINE_string("reference", "", "Of the KL; default: the policy.")
flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of compute.")
flags.DEFINE_bool("remat", False, "Recompute layers in the backward pass.")
flags.DEFINE_integer("chunk_size", 0, "Positions with logits; 0: what fits.")
# Rollout.
flags.DEFINE_integer("batch_size", 16, "Prompts per step.")
flags.DEFINE_integer("num_samples", 8, "Responses per prompt: its group.")
flags.DEFINE_integer("max_length", 1, "Response tokens.")
flags.DEFINE_float("temperature", 1.0, "Of sampler and trainer.")
flags.DEFINE_integer("top_k", 0, "0: off.")
flags.DEFINE_float("top_p", 1.0, "1: off.")
flags.DEFINE_float("min_p", 0.0, "0: off.")
flags.DEFINE_bool("stop_at_eos", False, "Else the end token is never drawn.")
flags.DEFINE_list("stop_strings", [], r"Texts that end a response; \n too.")
flags.DEFINE_bool(
  "dynamic_sampling",
  False,
  "Replace groups of equal scores by those of further prompts.",
)
flags.DEFINE_integer(
  "max_sampling_rounds", 10, "Batches of prompts a step may draw for that."
)
# Rewards.
flags.DEFINE_float(
  "unfinished_score",
  None,
  "Of responses that ran out of length, which are then never right; unset: "
  "scored as any other.",
)
flags.DEFINE_integer(
  "overlong_buffer", 0, "Tokens before the limit that are priced; 0: none."
)
flags.DEFINE_enum("kl", "loss", ["none", "reward", "loss"], "Where it stands.")
flags.DEFINE_enum(
  "kl_estimator",
  "",
  ["", "k1", "k2", "k3"],
  "Default: k1 in the reward, k3 in the loss.",
)
flags.DEFINE_float("kl_coef", 0.04, "Weight of the KL to the reference.")
flags.DEFINE_enum(
  "advantage", "grpo", [*SCALES, "rloo", "reinforce_pp"], "Of the responses."
)
# Loss.
flags.DEFINE_enum("algorithm", "grpo", list(PRESETS), "Preset; see above.")
flags.DEFINE_enum(
  "surrogate", "clipped", ["clipped", "gspo", "cispo"], "Policy loss."
)
flags.DEFINE_enum(
  "normalizer", "sequence_mean", ppo.NORMALIZERS, "Average of token losses."
)
flags.DEFINE_float("clip_epsilon", 0.2, "How far the ratio may fall below 1.")
flags.DEFINE_float(
  "clip_epsilon_high", 0.0, "How far it may rise above; 0: as far."
)
# Updates.
flags.DEFINE_integer("epochs", 1, "Passes over a rollout.")
flags.DEFINE_integer("minibatch_size", 0, "Rows per update; 0: all.")
flags.DEFINE_integer("micro_batch_size", 0, "Rows per pass; 0: a minibatch.")
flags.DEFINE_float("learning_rate", 1e-6, "Of Adam.")
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
  "groups/acceptance",
  "entropy/token",
  "ppo/approx_kl",
  "tokens_per_second",
)
PANELS = {
  "Reward": ["reward/mean", "eval/reward"],
  "Correct": ["task/is_correct", "eval/is_correct"],
  "Groups": ["groups/acceptance", "groups/without_signal"],
  "Entropy (nats)": ["entropy/token"],
  "Length (tokens)": ["response/length"],
  "KL (nats)": ["kl/sequence_k1", "ppo/approx_kl"],
  "Clip fraction": ["ppo/clip_fraction"],
}


def main(_):
  processes.join()
  *three, others = PRESETS[FLAGS.algorithm]
  names = ("advantage", "normalizer", "kl")
  preset = dict(zip(names, three, strict=True)) | others
  for name, value in preset.items():
    # Half of a pair that was given explicitly would not fit the other half.
    given = FLAGS[name].present or FLAGS[PAIRED.get(name, name)].present
    if not given:
      FLAGS[name].value = value() if callable(value) else value
  num_rows = FLAGS.batch_size * FLAGS.num_samples
  minibatch_size = FLAGS.minibatch_size or num_rows
  micro_batch_size = FLAGS.micro_batch_size or minibatch_size
  clip_epsilon_high = FLAGS.clip_epsilon_high or FLAGS.clip_epsilon
  kl_estimator = FLAGS.kl_estimator or ("k3" if FLAGS.kl == "loss" else "k1")
  mesh = meshes.make(FLAGS.mesh)
  validate(num_rows, minibatch_size, micro_batch_size, mesh)
  may_change = (
    *("workdir", "mesh", "preflight", "compilation_cache"),
    *("wandb_project", "samples_logged"),
  )
  in_force = runs.start(FLAGS, may_change)
  task = tasks.load(FLAGS.task)
  task_options = keywords.parse(FLAGS.task_options)
  keywords.check(task.prompts, task_options)
  score = scorers.scorer(FLAGS.task, keywords.parse(FLAGS.score_options))
  settings = sampling.Settings(
    temperature=FLAGS.temperature,
    top_k=FLAGS.top_k,
    top_p=FLAGS.top_p,
    min_p=FLAGS.min_p,
  )

  # Models.
  loaded = hf.load(FLAGS.policy, dtype=FLAGS.dtype, remat=FLAGS.remat)
  policy, tokenizer = loaded.model, loaded.tokenizer
  params, reference = {"policy": loaded.params}, None
  if FLAGS.kl != "none":
    reference = loaded.params
    if FLAGS.reference:
      other = hf.load(FLAGS.reference, dtype=FLAGS.dtype, remat=FLAGS.remat)
      runs.check_same_kind(f"--reference={FLAGS.reference}", other, loaded)
      reference = other.params
  models = {"policy": loaded.params, "reference": reference}

  # Prompts become ids here, once. All batches have one shape.
  vocab_size = policy.config.vocab_size
  stop_ids = tokens_lib.stop_ids(tokenizer) if FLAGS.stop_at_eos else ()
  # Other special tokens and unused rows of the vocabulary are never drawn.
  allowed = jnp.asarray(
    tokens_lib.allowed_tokens(tokenizer, vocab_size, stop_ids)
  )
  stop_strings = None
  ends = runs.unescaped(FLAGS.stop_strings)
  if ends:
    token_bytes = tokens_lib.token_bytes(tokenizer, vocab_size=vocab_size)
    stop_strings = decode.stop_table(ends, token_bytes)
  prompts, eval_prompts = (
    task.prompts(split, FLAGS.seed, num=num, **task_options)
    for split, num in (
      ("train", FLAGS.num_prompts),
      (FLAGS.eval_split, FLAGS.num_eval_prompts),
    )
  )
  score(eval_prompts[:1], [""])  # Bad options show here, not after a rollout.
  tokens_lib.require_tokens(
    tokenizer, eos=FLAGS.stop_at_eos, text=prompts[0] if prompts else None
  )
  encoded = tokens_lib.encode_prompts(
    tokenizer, [*prompts, *eval_prompts], max_length=FLAGS.max_prompt_length
  )
  prompt_ids, prompt_mask = batches.pad_left(
    encoded, length=max(map(len, encoded))
  )
  tokens_lib.check_positions(
    prompt_ids.shape[1] + FLAGS.max_length, policy.config.max_positions
  )

  # What is differentiated.
  chunk_size = FLAGS.chunk_size or log_probs.chunk_size(
    micro_batch_size, vocab_size
  )

  def statistics_of(params, rollout):
    statistics, _ = rollouts.token_statistics(
      policy,
      params,
      rollout,
      temperature=FLAGS.temperature,
      allowed=allowed,
      chunk_size=chunk_size,
    )
    return statistics

  def loss_fn(params, batch):
    mask = batch["rollout"].response_mask
    now = statistics_of(params["policy"], batch["rollout"]).log_probs
    old = batch["old_log_probs"]
    if FLAGS.surrogate == "clipped":
      loss, metrics = ppo.clipped_policy_loss(
        now,
        old,
        batch["advantages"],
        mask,
        clip_epsilon=FLAGS.clip_epsilon,
        clip_epsilon_high=clip_epsilon_high,
        normalizer=FLAGS.normalizer,
      )
    elif FLAGS.surrogate == "gspo":
      loss, metrics = ppo.gspo_loss(
        now,
        old,
        batch["advantages"][:, 0],  # The same on all tokens of a response.
        mask,
        clip_epsilon=FLAGS.clip_epsilon,
        clip_epsilon_high=clip_epsilon_high,
      )
    else:
      loss, metrics = ppo.cispo_loss(
        now,
        old,
        batch["advantages"],
        mask,
        max_ratio=1.0 + clip_epsilon_high,
        normalizer=FLAGS.normalizer,
      )
    if FLAGS.kl == "loss":
      drift = ppo.kl_to_reference(
        now,
        batch["ref_log_probs"],
        mask,
        kind=kl_estimator,
        normalizer=FLAGS.normalizer,
      )
      loss += FLAGS.kl_coef * drift
      metrics["kl/loss"] = jax.lax.stop_gradient(drift)
    return loss, {"loss": loss, **metrics}

  def gradients(params, batch, num_micro_batches):
    """Gradients of one minibatch, in pieces that fit into memory.

    The weight of a micro-batch is its share of what the normalizer divides by:
    of the minibatch's tokens, or of its rows.
    """
    gradient = jax.grad(loss_fn, has_aux=True)
    if num_micro_batches == 1:
      return gradient(params, batch)
    # Every micro-batch takes its rows from all devices.
    parts = jax.tree.map(
      lambda x: x.reshape(-1, num_micro_batches, *x.shape[1:]).swapaxes(0, 1),
      batch,
    )
    counts = jnp.ones(num_micro_batches)
    if FLAGS.normalizer == "token_mean":
      tokens = parts["rollout"].response_mask.sum((1, 2))
      counts = tokens.astype(jnp.float32)
    weights = counts / jnp.maximum(counts.sum(), 1.0)

    def add(total, inputs):
      weight, part = inputs
      part = jax.lax.with_sharding_constraint(part, rows_sharding)
      found = gradient(params, part)
      return jax.tree.map(lambda a, b: a + weight * b, total, found), None

    first = jax.tree.map(lambda x: x[0], parts)
    shapes = jax.eval_shape(gradient, params, first)
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
  rules = hf.partition_rules(policy, mesh)
  params = meshes.place(params, meshes.shardings(params, rules, mesh))
  if reference is not None:
    reference = meshes.place(
      reference, meshes.shardings(reference, rules, mesh)
    )
  state = {"params": params, "optimizer": optimizer.init(params)}
  state_shardings = meshes.shardings(state, rules, mesh)
  state = meshes.place(state, state_shardings)

  def in_parts(params, rollout):
    """Token statistics of all rows, in no more memory than an update takes."""
    read = functools.partial(statistics_of, params)
    return rollouts.in_parts(read, rollout, num_parts, rows_sharding)

  def prepare(state, reference, rollout, scores):
    """What stays fixed while a rollout is learnt from, and its metrics."""
    mask = rollout.response_mask
    old = in_parts(state["params"]["policy"], rollout)
    lengths = mask.sum(axis=1)
    shaped = scores
    if FLAGS.overlong_buffer:
      shaped += rewards.overlong_penalty(
        lengths, max_length=FLAGS.max_length, buffer=FLAGS.overlong_buffer
      )
    token_rewards = rewards.place_score(shaped, mask)
    batch = {"rollout": rollout, "old_log_probs": old.log_probs}
    metrics = {}
    if FLAGS.kl != "none":
      ref = in_parts(reference, rollout).log_probs
      drift = log_probs.kl_estimate(old.log_probs, ref, kind="k1")
      metrics["kl/sequence_k1"] = masking.masked_sum(drift, mask, axis=1).mean()
      if FLAGS.kl == "loss":
        batch["ref_log_probs"] = ref
      else:
        token_rewards += rewards.kl_penalty(
          old.log_probs, ref, mask, kl_coef=FLAGS.kl_coef, kind=kl_estimator
        )
    # The rows of a group lie next to each other.
    groups = token_rewards.sum(axis=1).reshape(-1, FLAGS.num_samples)
    if FLAGS.advantage == "reinforce_pp":
      batch["advantages"] = advantages.reinforce_pp(token_rewards, mask)
    else:
      if FLAGS.advantage == "rloo":
        relative = advantages.leave_one_out(groups)
      else:
        relative = advantages.group_relative(
          groups, scale=SCALES[FLAGS.advantage]
        )
      if FLAGS.dynamic_sampling:
        # Where they had to fill the batch, groups of equal scores teach
        # nothing, whatever their lengths or drifts add to the rewards.
        raw = scores.reshape(groups.shape)
        differ = raw.max(axis=1) > raw.min(axis=1)
        relative = jnp.where(differ[:, None], relative, 0.0)
      batch["advantages"] = jnp.where(mask, relative.reshape(-1, 1), 0.0)
    gap = jnp.abs(rollout.log_probs - old.log_probs)
    metrics |= {
      "entropy/token": masking.masked_mean(old.entropies, mask),
      "reward/shaped": groups.mean(),
      "reward/group_std": groups.std(axis=1).mean(),
      "advantage/abs": masking.masked_mean(jnp.abs(batch["advantages"]), mask),
      "response/length": lengths.astype(jnp.float32).mean(),
      "response/finished": rollout.finished.astype(jnp.float32).mean(),
      "sampler/log_prob_gap": jnp.where(mask, gap, 0.0).max(),
    }
    return jax.lax.stop_gradient(batch), metrics

  def learn(state, reference, rollout, scores, key):
    """All epochs of one rollout, without leaving the devices."""
    batch, metrics = prepare(state, reference, rollout, scores)

    def update(carry, rows):
      params, optimizer_state = carry
      # A gather of rows in random order would leave them on every device.
      minibatch = jax.lax.with_sharding_constraint(
        jax.tree.map(lambda x: x[rows], batch), rows_sharding
      )
      grads, metrics = gradients(params, minibatch, num_micro_batches)
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
    metrics |= {name: values.mean() for name, values in updates.items()}
    metrics["ppo/ratio_max"] = updates["ppo/ratio_max"].max()
    return {"params": params, "optimizer": optimizer_state}, metrics

  sample = compiled.Compiled(
    "sample",
    lambda key, params, ids, mask: rollouts.sample(
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
      split_cache=meshes.cache_splitter(mesh),
      pad_id=tokens_lib.pad_id(tokenizer),
    ),
  )
  learn = compiled.Compiled(
    "learn", learn, donate_argnums=0, out_shardings=(state_shardings, None)
  )

  # A run that was stopped goes on where its last checkpoint is. `position`
  # counts the batches of prompts that were drawn, one or more a step.
  checkpoints = checkpoint.Checkpoints(FLAGS.workdir)
  first_step = position = 0
  if restored := checkpoints.restore_latest(state):
    first_step, state, meta = restored
    position = meta["position"]

  read = functools.partial(samplers.read, tokenizer, stop_strings=ends)

  def judge(asked, replies, finished):
    """Scores `[N]` and their parts."""
    scores, parts = score(asked, replies)
    if FLAGS.unfinished_score is not None:
      _, parts = samplers.unfinished_are_wrong(scores, parts, finished)
      scores = np.where(finished, scores, np.float32(FLAGS.unfinished_score))
    return scores, parts

  def draw(key, position):
    """One batch of prompts, with the policy's responses and their scores."""
    rows = batches.batch_indices(
      len(prompts), FLAGS.batch_size, position, seed=FLAGS.seed
    )
    ids, mask = meshes.shard_batch((prompt_ids[rows], prompt_mask[rows]), mesh)
    rollout = processes.gather(
      sample(key, state["params"]["policy"], ids, mask)
    )
    asked = [prompts[i] for i in rows for _ in range(FLAGS.num_samples)]
    replies = read(rollout)
    return rollout, asked, replies, *judge(asked, replies, rollout.finished)

  def collect(step, position):
    """The groups that a step learns from, drawn in one round or more.

    A group whose scores are all equal has nothing to tell. With dynamic
    sampling further prompts are asked until there are enough others; if the
    rounds run out before, such groups fill the batch.
    """
    key = jax.random.fold_in(jax.random.key(FLAGS.seed), step)
    sample_key, learn_key = jax.random.split(key)
    max_rounds = FLAGS.max_sampling_rounds if FLAGS.dynamic_sampling else 1
    rounds, useful, idle = [], [], []
    while len(rounds) < max_rounds and len(useful) < FLAGS.batch_size:
      number = len(rounds)
      rounds.append(
        draw(jax.random.fold_in(sample_key, number), position + number)
      )
      scores = rounds[-1][3].reshape(-1, FLAGS.num_samples)
      for group, row in enumerate(scores, number * FLAGS.batch_size):
        (useful if row.min() < row.max() else idle).append(group)
    arrays, *columns = (
      [(rollout, scores) for rollout, _, _, scores, _ in rounds],
      *([x for found in rounds for x in found[i]] for i in (1, 2, 4)),
    )
    rollout, scores = jax.tree.map(lambda *x: np.concatenate(x), *arrays)
    metrics = {
      # Of all that was drawn: the groups below are a choice among them.
      "reward/mean": scores.mean(),
      "reward/std": scores.std(),
      **{f"task/{k}": v for k, v in tasks.mean_parts(columns[2]).items()},
      "groups/rounds": len(rounds),
      "groups/acceptance": len(useful) / (len(useful) + len(idle)),
      "groups/without_signal": max(0.0, 1 - len(useful) / FLAGS.batch_size),
      "tokens": rollout.response_mask.sum(),
    }
    chosen = np.sort((useful + idle)[: FLAGS.batch_size])
    rows = chosen[:, None] * FLAGS.num_samples + np.arange(FLAGS.num_samples)
    rows = rows.ravel()
    rollout, scores = jax.tree.map(lambda x: x[rows], (rollout, scores))
    columns = [[column[i] for i in rows] for column in columns]
    return rollout, scores, columns, metrics, learn_key

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
  )

  def evaluate():
    """Greedy answers to the held-out prompts."""
    replies, finished = [], []
    for _, texts, ended in answer.batches(state["params"]["policy"]):
      replies += texts
      finished += list(ended)
    scores, parts = judge(eval_prompts, replies, finished)
    means = {"reward": scores.mean(), **tasks.mean_parts(parts)}
    return {f"eval/{name}": float(value) for name, value in means.items()}

  # Before anything is trained: do sampler and learner agree?
  if FLAGS.preflight != "off":
    rollout, scores, _, _, learn_key = collect(first_step, position)
    rollout, scores = meshes.shard_batch((rollout, scores), mesh)
    batch, _ = jax.jit(prepare)(state, reference, rollout, scores)
    rows = jax.tree.map(lambda x: x[:micro_batch_size], batch)
    # The gradient of groups without signal would be noise.
    signs = jnp.where(jnp.arange(micro_batch_size) % 2, -1.0, 1.0)[:, None]
    rows["advantages"] = jnp.where(rows["rollout"].response_mask, signs, 0.0)
    run = jax.jit(gradients, static_argnums=2)
    checks = preflight.check(
      policy,
      state["params"]["policy"],
      rollout,
      settings=settings,
      allowed=allowed,
      stop_ids=stop_ids,
      has_stop_strings=stop_strings is not None,
      chunk_size=chunk_size,
      num_parts=num_parts,
      rows_sharding=rows_sharding,
      gradients=lambda n: run(state["params"], rows, n),
      # Parts of which every device still has a row.
      num_micro_batches=smallest_divisor(
        micro_batch_size // meshes.num_batch_shards(mesh)
      ),
      tolerance=1e-4 if FLAGS.dtype == "float32" else 0.2,
      gradient_tolerance=1e-3 if FLAGS.dtype == "float32" else 0.1,
    )
    learn.compile(state, reference, rollout, scores, learn_key)
    preflight.show(
      checks,
      sample.compilations + learn.compilations,
      state | {"reference": reference},
    )
    preflight.judge(checks, FLAGS.preflight)

  runs.check_models(FLAGS.workdir, models)
  checkpoint.write_flags(FLAGS.workdir, in_force, may_change)
  hf.save_config(os.path.join(FLAGS.workdir, "model"), policy, tokenizer)
  log = logs.Logs(
    FLAGS.workdir,
    total_steps=FLAGS.steps,
    first_step=first_step,
    columns=COLUMNS,
    wandb_project=FLAGS.wandb_project,
  )
  for message in checkpoints.messages:
    log.note(message)
  shown = " ".join(f"--{name}={FLAGS[name].value}" for name in preset)
  log.note(f"--algorithm={FLAGS.algorithm} with {shown}")
  log.curves(functools.partial(curves.curves, panels=PANELS))
  with log, checkpoints, checkpoint.Preemption() as preemption:
    for step in range(first_step, FLAGS.steps):
      # Row `step` of the metrics is about the policy after `step` steps, for
      # which so many responses were drawn, learnt from or not.
      metrics = {"rollouts": position * num_rows}
      if step % FLAGS.eval_every == 0:
        metrics |= evaluate()
      started = time.perf_counter()
      rollout, scores, columns, found, learn_key = collect(step, position)
      position += found["groups/rounds"]
      state, learnt = learn(
        state,
        reference,
        *meshes.shard_batch((rollout, scores), mesh),
        learn_key,
      )
      metrics |= jax.device_get(learnt)
      seconds = time.perf_counter() - started
      num_tokens = found.pop("tokens")
      texts, replies, parts = columns
      metrics |= found | {
        "answers/distinct": metrics_lib.distinct_answers(
          part.get("answer", text)
          for part, text in zip(parts, replies, strict=True)
        ),
        "tokens_per_second": num_tokens / seconds,
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
        checkpoints.save(done, state, {"step": done, "position": position})
      if stop and done < FLAGS.steps:
        log.note(f"Stopped by a signal after step {done}; all is saved.")
        return preemption.exit_status
      for program in (sample, answer.program, learn):
        program.freeze()

    # The numbers before and after, and where everything lies.
    metrics = {"rollouts": position * num_rows, **evaluate()}
    log.write(FLAGS.steps, metrics)
    if not processes.is_first():
      return
    rows = files.read_jsonl(os.path.join(FLAGS.workdir, "metrics.jsonl"))
    shown = ("reward/mean", "entropy/token", "groups/acceptance", *metrics)
    table = {
      name: {
        "before": rows[0].get(name),
        "after": (rows[-2] | rows[-1]).get(name),
      }
      for name in shown
    }
    log.summary(table, title=f"{FLAGS.task}: {FLAGS.workdir}")


def validate(num_rows, minibatch_size, micro_batch_size, mesh):
  """Says what is wrong with the flags before anything is loaded."""
  runs.check_positive(
    FLAGS,
    *("steps", "save_every", "eval_every", "samples_every", "epochs"),
    *("batch_size", "num_samples", "max_length", "max_sampling_rounds"),
    *("num_prompts", "num_eval_prompts"),
  )
  if FLAGS.batch_size > FLAGS.num_prompts:
    raise ValueError(
      f"--batch_size={FLAGS.batch_size} is more than the {FLAGS.num_prompts} "
      "of --num_prompts."
    )
  for name in ("minibatch_size", "micro_batch_size"):
    if FLAGS[name].value < 0:
      raise ValueError(
        f"--{name} must not be negative, got {FLAGS[name].value}."
      )
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
  meshes.check_divisible(FLAGS.batch_size, mesh, "--batch_size")
  meshes.check_divisible(micro_batch_size, mesh, "--micro_batch_size")
  for name in ("clip_epsilon", "kl_coef", "clip_epsilon_high"):
    least = "be positive" if name == "clip_epsilon" else "not be negative"
    value = FLAGS[name].value
    if value < 0 or (name == "clip_epsilon" and not value):
      raise ValueError(f"--{name} must {least}, got {value}.")
  if FLAGS.num_samples < 2:
    for name, value in (
      ("advantage", FLAGS.advantage != "reinforce_pp"),
      ("dynamic_sampling", FLAGS.dynamic_sampling),
    ):
      if value:
        raise ValueError(
          f"--{name}={FLAGS[name].value} compares responses to one prompt: "
          f"--num_samples must be at least 2, got {FLAGS.num_samples}."
        )
  if FLAGS.surrogate == "gspo":
    if FLAGS.advantage == "reinforce_pp":
      raise ValueError(
        "--surrogate=gspo has one advantage for a response, but "
        "--advantage=reinforce_pp one for each token."
      )
    if FLAGS.normalizer != "sequence_mean":
      raise ValueError(
        "--surrogate=gspo is a mean over responses: --normalizer must be "
        f"sequence_mean, got {FLAGS.normalizer}."
      )
  if FLAGS.kl == "none" and FLAGS.reference:
    raise ValueError("--reference has no meaning for --kl=none.")
  if FLAGS.kl == "loss" and FLAGS.kl_estimator == "k1":
    raise ValueError(
      "--kl_estimator=k1 has a gradient of mean 0 as a loss; take k2 or k3, or "
      "--kl=reward."
    )
  if not 0 <= FLAGS.overlong_buffer <= FLAGS.max_length:
    raise ValueError(
      f"--overlong_buffer must lie between 0 and --max_length="
      f"{FLAGS.max_length}, got {FLAGS.overlong_buffer}."
    )
  ends = FLAGS.stop_at_eos or FLAGS.stop_strings
  if FLAGS.unfinished_score is not None and not ends:
    raise ValueError(
      "--unfinished_score would be the score of every response: without "
      "--stop_at_eos or --stop_strings none ever ends."
    )
  if FLAGS.unfinished_score is not None:
    if not math.isfinite(FLAGS.unfinished_score):
      raise ValueError(
        f"--unfinished_score must be finite, got {FLAGS.unfinished_score}."
      )
    if FLAGS.dynamic_sampling and FLAGS.unfinished_score:
      raise ValueError(
        "--dynamic_sampling keeps the groups whose scores differ, and a "
        f"--unfinished_score={FLAGS.unfinished_score} would tell wrong "
        "responses apart: it must be 0."
      )
  if FLAGS.overlong_buffer and not ends:
    raise ValueError(
      "--overlong_buffer would price every response alike: without "
      "--stop_at_eos or --stop_strings all have --max_length tokens."
    )


def smallest_divisor(number):
  """The smallest divisor above 1; 1 for 1."""
  return next((n for n in range(2, number + 1) if number % n == 0), 1)


if __name__ == "__main__":
  app.run(main)
