"""RLMEC: RL with token-level rewards of a generative reward model.

Three minutes on two thirds of a CPU core, after
`experiments/rlmec_reward_model.py` has made the model of the same policy:
  python experiments/rlmec.py \
    --flagfile=experiments/flags/rlmec/chains_rlmec.flags \
    --policy=runs/base --reward_model=runs/grm --stages=runs/stages \
    --workdir=runs/rlmec

The stages, each in a folder of --stages (the workdir, if none is given):

  samples/       samples.jsonl: the policy's solutions, each with its verdict
  rewrites/      rewrites.jsonl: what the reward model makes of the wrong ones,
                 and whether that is right
  supervision/   supervision.jsonl: tokens, probabilities under the reward model
                 and the policy, edited tokens; and what other methods learn
                 from the same samples: right.jsonl, gold.jsonl, pairs.jsonl
  (training)     checkpoints, metrics, curves and tokens.html in the workdir

A stage whose inputs are as before is not repeated, so that runs which differ in
the training alone can share --stages; one that was stopped goes on.

The loss is that of Chen et al., not PPO's: see losses/token_level.py.
--token_rewards, --rl_mode, --imitation_coef, --edited_weight and --imitate are
the method's parts, to be taken away one by one.

Source: Chen et al. (2024), arXiv 2401.06081, after the authors' code.
Departures: whether a sample is right, its own verdict says, also where the
reward model names no wrong step; the last step of a sample can be the wrong
one; whole numbers of steps are read; blanks between kept and new steps are not
edits; solutions without an end are left out; equal texts are taken once per
question (those that differ in blanks are not equal); a rewrite is no longer
than a sample may be; masks are those of the tokens, whatever the padding; sums
and counts are over the whole batch, not averaged over parts of it; no count is
0; all numbers are float32; a solution has the same tokens behind the policy's
prompt and the reward model's.
What stays as it is: the reward model reads the right solution, so that there
are no rewards without one; behind the first wrong token it reads what it would
not have written; samples whose rewrite is not right are dropped, which leaves
fewer hard questions (the share that is kept is reported); solutions are drawn
at --temperature and --top_p, while the ratio is to the policy at temperature 1.
A sample that a stop string has ended is scored with an end token that the
policy did not write.
"""

import functools
import math
import os
import sys
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
from rljax.losses import token_level
from rljax.models import hf
from rljax.ops import log_probs, sampling
from rljax.rlmec import pipeline, targets
from rljax.rlmec import prompts as prompts_lib
from rljax.scoring import cached, scorers
from rljax.storage import checkpoint
from rljax.text import alignment as alignment_lib
from rljax.text import batches, files, keywords, logged, tokens
from rljax.training import logs, runs

# Run.
flags.DEFINE_string("workdir", None, "Checkpoints and logs.", required=True)
flags.DEFINE_string("stages", "", "Folder of the stages; empty: workdir.")
flags.DEFINE_integer("seed", 0, "Seed of every source of randomness.")
flags.DEFINE_integer("steps", 0, "Optimizer updates; 0: what --epochs make.")
flags.DEFINE_float("epochs", 3.0, "Passes over the supervision.")
flags.DEFINE_integer("save_every", 500, "Steps between checkpoints.")
flags.DEFINE_integer("eval_every", 100, "Steps between evaluations.")
flags.DEFINE_string("mesh", "data:-1", "Axes data, fsdp, tensor; -1: the rest.")
flags.DEFINE_string("compilation_cache", "~/.cache/rljax", "Empty for none.")
flags.DEFINE_string("wandb_project", "", "Also log to this project.")
flags.DEFINE_integer("num_page_samples", 16, "Of tokens.html; 0: no page.")
# Task.
flags.DEFINE_string("task", "chains", "A module of rljax.tasks.")
flags.DEFINE_list("task_options", [], "name=value, handed to the task.")
flags.DEFINE_list("score_options", [], "name=value, handed to task.score.")
flags.DEFINE_integer("num_prompts", 2000, "Training questions to sample.")
flags.DEFINE_integer("num_eval_prompts", 200, "Of --eval_split.")
flags.DEFINE_enum(
  "eval_split", "validation", ["validation", "test"], "Of the task."
)
flags.DEFINE_integer("max_prompt_length", 512, "Tokens; longer is an error.")
flags.DEFINE_enum("prompt_format", "plain", ["plain", "chat"], "Of prompts.")
# Models.
flags.DEFINE_string("policy", None, "It starts as this.", required=True)
flags.DEFINE_string("reward_model", None, "Generative.", required=True)
flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of compute.")
flags.DEFINE_bool("remat", False, "Recompute layers in the backward pass.")
flags.DEFINE_integer("chunk_size", 0, "Positions with logits; 0: what fits.")
flags.DEFINE_enum(
  "template",
  "",
  ["", *sorted(prompts_lib.TEMPLATES)],
  "Of the reward model's questions; empty: as it was trained.",
)
flags.DEFINE_bool("locate", None, "Ask for the first wrong step, too.")
flags.DEFINE_integer("max_question_length", 2000, "Tokens; longer is left out.")
# Samples, and their rewrites.
flags.DEFINE_integer("num_samples", 5, "Of each question.")
flags.DEFINE_integer("sample_batch_size", 64, "Questions at the same time.")
flags.DEFINE_integer("max_length", 32, "Tokens of a solution, with its end.")
flags.DEFINE_float("temperature", 0.7, "Of the samples.")
flags.DEFINE_float("top_p", 0.95, "1: off.")
flags.DEFINE_list("stop_strings", [], r"Texts that end a sample; \n in them.")
flags.DEFINE_integer("max_right", 0, "Right samples of a question; 0: all.")
flags.DEFINE_enum(
  "alignment", "clean", alignment_lib.MODES, "What counts as edited."
)
# Method.
flags.DEFINE_enum(
  "token_rewards",
  "model",
  targets.TOKEN_REWARDS,
  "By the reward model; of edited tokens; one for all tokens; or none.",
)
flags.DEFINE_float("threshold", 0.5, "Probability that earns nothing.")
flags.DEFINE_float("max_reward", 0.5, "Of a token in a right solution.")
flags.DEFINE_float("max_penalty", 0.1, "Of a token in a wrong solution.")
flags.DEFINE_enum("rl_mode", "rlmec", token_level.MODES, "Of the loss.")
flags.DEFINE_float("clip_epsilon", 0.3, "Of the ratio.")
flags.DEFINE_float("imitation_coef", 1.0, "Of the regulariser; 0: without.")
flags.DEFINE_enum(
  "imitate", "rewrite", targets.IMITATED, "Where the sample is wrong."
)
flags.DEFINE_float("edited_weight", 1.0, "Of edited tokens, in imitation.")
flags.DEFINE_float("kept_weight", 0.5, "Of the other tokens.")
# Updates.
flags.DEFINE_integer("batch_size", 64, "Samples per update.")
flags.DEFINE_integer("micro_batch_size", 0, "Rows per pass; 0: a batch.")
flags.DEFINE_float("learning_rate", 2e-4, "Highest, of AdamW; cosine to 0.")
flags.DEFINE_float("warmup", 0.03, "Share of the updates.")
flags.DEFINE_float("weight_decay", 0.0, "Of AdamW.")
flags.DEFINE_float("max_grad_norm", 1.0, "0: no clipping.")
FLAGS = flags.FLAGS

COLUMNS = ("loss", "token/loss", "imitation/loss", "eval/is_correct")
PANELS = {
  "Correct, greedily": ["eval/is_correct"],
  "Loss": ["token/loss", "imitation/loss"],
  "Ratio to the first policy": ["token/ratio_mean"],
  "Lowest log-probability of a penalised token": [
    "token/penalized_log_prob_min"
  ],
}


def main(_):
  processes.join()
  validate()
  may_change = (
    *("workdir", "stages", "mesh", "compilation_cache", "wandb_project"),
    *("sample_batch_size", "num_page_samples"),
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
  task = tasks.load(FLAGS.task)
  score = scorers.scorer(FLAGS.task, keywords.parse(FLAGS.score_options))

  # The models, which share their tokens.
  loaded = hf.load(FLAGS.policy, dtype=FLAGS.dtype, remat=FLAGS.remat)
  model, tokenizer = loaded.model, loaded.tokenizer
  reward_model = hf.load(FLAGS.reward_model, dtype=FLAGS.dtype)
  runs.check_same_tokens(
    f"--reward_model={FLAGS.reward_model}", reward_model, loaded
  )
  rules = hf.partition_rules(model, mesh)

  def place(tree, rules=rules):
    return meshes.place(tree, meshes.shardings(tree, rules, mesh))

  policy = place(loaded.params)
  judge_params = place(
    reward_model.params, hf.partition_rules(reward_model.model, mesh)
  )
  asked_as = pipeline.load_settings(FLAGS.reward_model)
  template_name = FLAGS.template or asked_as.get("template")
  if template_name is None:
    raise ValueError(
      f"--reward_model={FLAGS.reward_model} does not say how it is asked: give "
      "--template."
    )
  template = prompts_lib.TEMPLATES[template_name]
  locate = FLAGS.locate
  if locate is None:
    locate = asked_as.get("locate", True)

  # Questions with their solutions.
  options = keywords.parse(FLAGS.task_options)
  pairs, held_out = (
    pipeline.solved(task, split, FLAGS.seed, num, options)
    for split, num in (
      ("train", FLAGS.num_prompts),
      (FLAGS.eval_split, FLAGS.num_eval_prompts),
    )
  )
  prompts, gold = [prompt for prompt, _ in pairs], dict(pairs)
  eval_prompts = [prompt for prompt, _ in held_out]
  pipeline.check_solution(score, *pairs[0])
  pipeline.check_template(template, template_name, tokenizer, pairs[0])
  step_ends = getattr(task, "STEP_ENDS", "\n")

  def render(texts):
    return logged.render_prompts(
      texts, FLAGS.task, tokenizer, FLAGS.prompt_format
    )

  def encode(texts):
    return tokens.encode_prompts(
      tokenizer, render(texts), max_length=FLAGS.max_prompt_length
    )

  responder = functools.partial(
    samplers.Responder,
    model,
    tokenizer,
    max_length=FLAGS.max_length,
    batch_size=FLAGS.sample_batch_size,
    mesh=mesh,
    seed=FLAGS.seed,
    stop_strings=runs.unescaped(FLAGS.stop_strings),
  )
  answer = responder(
    encode(eval_prompts), settings=sampling.Settings(greedy=True)
  )

  folder = FLAGS.stages or FLAGS.workdir
  with checkpoint.Preemption() as preemption:
    try:
      # Stage 1: samples of the policy.
      sampled = pipeline.sample(
        folder,
        lambda: responder(
          encode(prompts),
          settings=sampling.Settings(
            temperature=FLAGS.temperature, top_p=FLAGS.top_p
          ),
          num_samples=FLAGS.num_samples,
        ),
        policy,
        prompts,
        score,
        seed=FLAGS.seed,
        should_stop=preemption.should_stop,
        policy=checkpoint.fingerprint(loaded.params),
        asked=pipeline.digest(render(prompts)),
        **pipeline.values(
          FLAGS,
          *("num_samples", "max_length", "temperature", "top_p"),
          *("stop_strings", "dtype"),
        ),
      )

      # Stage 2: the reward model rewrites all wrong ones.
      rewritten = pipeline.stage(
        folder,
        "rewrites",
        {
          "samples": sampled.digest("samples.jsonl"),
          "gold": pipeline.digest(pairs),
          "reward model": checkpoint.fingerprint(reward_model.params),
          "scored by": score.description,
          "template": template_name,
          "locate": locate,
          "step_ends": step_ends,
          **pipeline.values(
            FLAGS, "max_length", "max_question_length", "dtype"
          ),
        },
      )
      if rewritten.facts is None:
        rows, counts = prompts_lib.distinct(
          files.read_jsonl(sampled.path("samples.jsonl"))
        )
        rows = pipeline.by_model(
          rewritten.folder,
          pipeline.records(rows, gold),
          reward_model.model,
          tokenizer,
          judge_params,
          template,
          score,
          mesh=mesh,
          batch_size=FLAGS.sample_batch_size,
          max_length=FLAGS.max_length,
          max_prompt_length=FLAGS.max_question_length,
          locate=locate,
          step_ends=step_ends,
          should_stop=preemption.should_stop,
        )
        if processes.is_first():
          files.write_jsonl(rewritten.path("rewrites.jsonl"), rows)
        rewritten.finish(
          **counts,
          **pipeline.metrics(rows, getattr(task, "rewrite", None)),
        )
    except pipeline.Stopped:
      print("Stopped by a signal; all is saved.")
      return preemption.exit_status

  # Stage 3: what the policy learns from.
  supervising = pipeline.stage(
    folder,
    "supervision",
    {
      "rewrites": rewritten.digest("rewrites.jsonl"),
      "policy": checkpoint.fingerprint(loaded.params),
      "reward model": checkpoint.fingerprint(reward_model.params),
      "asked": pipeline.digest(render(prompts)),
      "template": template_name,
      **pipeline.values(
        FLAGS,
        *("max_right", "alignment", "seed", "max_length", "dtype"),
        "max_question_length",
      ),
    },
  )
  if supervising.facts is None:
    supervise(
      supervising,
      files.read_jsonl(rewritten.path("rewrites.jsonl")),
      (model, policy, tokenizer, render),
      (reward_model.model, judge_params, template),
      mesh,
    )
  rows = files.read_jsonl(supervising.path("supervision.jsonl"))
  blame = localization(rows)
  del reward_model, judge_params  # It has said all that it has to say.
  if len(rows) < FLAGS.batch_size:
    raise ValueError(
      f"--batch_size={FLAGS.batch_size} is more than the {len(rows)} rows of "
      f"{supervising.folder}: sample more, or take a smaller batch."
    )

  # The supervision as arrays. Both texts of a row have one shape, so that one
  # pass reads them.
  lengths = [
    batches.bucket_length(max(len(row[name]) for row in rows for name in names))
    for names in (["prompt_ids"], ["response_ids", f"{FLAGS.imitate}_ids"])
  ]
  tokens.check_positions(sum(lengths), model.config.max_positions)
  arrays = targets.arrays(
    rows,
    prompt_length=lengths[0],
    response_length=lengths[1],
    token_rewards=FLAGS.token_rewards,
    threshold=FLAGS.threshold,
    max_reward=FLAGS.max_reward,
    max_penalty=FLAGS.max_penalty,
    imitate=FLAGS.imitate,
    edited_weight=FLAGS.edited_weight,
    kept_weight=FLAGS.kept_weight,
  )
  num_rows = len(rows)
  steps = FLAGS.steps or math.ceil(num_rows * FLAGS.epochs / FLAGS.batch_size)

  # What is differentiated.
  chunk_size = FLAGS.chunk_size or log_probs.chunk_size(
    2 * micro_batch_size, model.config.vocab_size
  )
  texts = [
    name
    for name, is_read in (
      ("response", FLAGS.token_rewards != "none"),
      ("imitated", FLAGS.imitation_coef != 0),
    )
    if is_read
  ]

  def loss_fn(params, batch, counts):
    """Of a part of the batch, whose counts are those of all of it."""
    both = {
      name: jnp.concatenate([batch[x] for x in sources])
      for name, sources in (
        ("prompt_ids", ["prompt_ids"] * len(texts)),
        ("prompt_mask", ["prompt_mask"] * len(texts)),
        ("response_ids", [f"{text}_ids" for text in texts]),
        ("response_mask", [f"{text}_mask" for text in texts]),
      )
    }
    statistics, _ = rollouts.token_statistics(
      model, params, both, temperature=1.0, chunk_size=chunk_size
    )
    found = dict(
      zip(texts, jnp.split(statistics.log_probs, len(texts)), strict=True)
    )
    loss, metrics = jnp.float32(0), {}
    if "response" in found:
      loss, metrics = token_level.token_level_loss(
        found["response"],
        batch["ref_log_probs"],
        batch["rewards"],
        batch["response_mask"],
        clip_epsilon=FLAGS.clip_epsilon,
        mode=FLAGS.rl_mode,
        count=counts["rewards"],
      )
    if "imitated" in found:
      imitation, more = token_level.imitation_loss(
        found["imitated"],
        batch["weights"],
        batch["imitated_mask"],
        count=counts["weights"],
      )
      loss += FLAGS.imitation_coef * imitation
      metrics |= more
    return loss, {"loss": loss, **metrics}

  rows_sharding = meshes.batch_sharding(mesh)
  num_micro_batches = FLAGS.batch_size // micro_batch_size

  def gradients(params, batch):
    """The parts are divided by the counts of the whole, and so add up to it."""
    counts = {
      name: jnp.count_nonzero(batch[name]).astype(jnp.float32)
      for name in ("rewards", "weights")
    }
    gradient = jax.grad(loss_fn, has_aux=True)
    if num_micro_batches == 1:
      return gradient(params, batch, counts)
    # Every micro-batch takes its rows from all devices.
    parts = jax.tree.map(
      lambda x: x.reshape(-1, num_micro_batches, *x.shape[1:]).swapaxes(0, 1),
      batch,
    )

    def add(total, part):
      part = jax.lax.with_sharding_constraint(part, rows_sharding)
      grads, metrics = gradient(params, part, counts)
      return jax.tree.map(jnp.add, total, grads), metrics

    zeros = jax.tree.map(jnp.zeros_like, params)
    grads, metrics = jax.lax.scan(add, zeros, parts)
    return grads, over_parts(metrics)

  schedule = optax.schedules.warmup_cosine_decay_schedule(
    init_value=0.0,
    peak_value=FLAGS.learning_rate,
    warmup_steps=max(1, int(FLAGS.warmup * steps)),
    decay_steps=max(2, steps),
  )
  optimizer = optax.chain(
    optax.clip_by_global_norm(FLAGS.max_grad_norm or math.inf),
    optax.adamw(schedule, weight_decay=FLAGS.weight_decay),
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

  state = {"params": {"policy": policy}, "optimizer": optimizer.init(policy)}
  state_shardings = meshes.shardings(state, rules, mesh)
  state = meshes.place(state, state_shardings)
  update = compiled.Compiled(
    "update", update, donate_argnums=0, out_shardings=(state_shardings, None)
  )

  def batch_of(step):
    rows = batches.batch_indices(
      num_rows, FLAGS.batch_size, step, seed=FLAGS.seed
    )
    return {name: array[rows] for name, array in arrays.items()}

  # A run that was stopped goes on where its last checkpoint is.
  runs.check_models(
    FLAGS.workdir,
    {"policy": loaded.params},
    {"The rows of supervision": supervising.digest("supervision.jsonl")},
  )
  checkpoint.write_flags(FLAGS.workdir, in_force, may_change)
  checkpoints = checkpoint.Checkpoints(FLAGS.workdir)
  first_step = 0
  if restored := checkpoints.restore_latest(state):
    first_step, state, _ = restored
  hf.save_config(os.path.join(FLAGS.workdir, "model"), model, tokenizer)
  log = logs.Logs(
    FLAGS.workdir,
    total_steps=steps,
    first_step=first_step,
    columns=COLUMNS,
    wandb_project=FLAGS.wandb_project,
  )
  for message in checkpoints.messages:
    log.note(message)
  log.skipped(supervising.facts["skipped"])
  log.note(
    f"Of {pipeline.shown(sampled.facts)}: "
    f"{pipeline.shown(rewritten.facts)}. Supervision of "
    f"{pipeline.shown(supervising.facts)}; {steps} steps."
  )
  log.curves(functools.partial(curves.curves, panels=PANELS))
  if FLAGS.num_page_samples and processes.is_first():
    write_page(rows, arrays["rewards"], tokenizer)

  def evaluate(step):
    """Greedy answers to the evaluation prompts."""
    answers = samplers.answers(
      answer, state["params"]["policy"], eval_prompts, score
    )
    log.samples(step, answers)
    means = tasks.mean_parts([row["parts"] for row in answers])
    return {f"eval/{name}": value for name, value in means.items()}

  with log, checkpoints, checkpoint.Preemption() as preemption:
    for step in range(first_step, steps):
      # Row `step` of the metrics is about the policy after `step` updates.
      metrics = evaluate(step) if step % FLAGS.eval_every == 0 else {}
      started = time.perf_counter()
      state, learnt = update(state, meshes.shard_batch(batch_of(step), mesh))
      metrics |= jax.device_get(learnt)
      metrics["update_seconds"] = time.perf_counter() - started
      if step == 0:
        check_first(metrics)
      log.write(step, metrics)
      done, stop = step + 1, preemption.should_stop()
      if done % FLAGS.save_every == 0 or done == steps or stop:
        checkpoints.save(done, state, {"step": done})
      if stop and done < steps:
        log.note(f"Stopped by a signal after step {done}; saved.")
        return preemption.exit_status
      if step > first_step:
        update.freeze()
    final = evaluate(steps)
    log.write(steps, final)
    log.summary(
      {
        "correct, greedily": final["eval/is_correct"],
        "samples kept": supervising.facts["samples kept"],
        **{
          f"blamed tokens, own rewrites: {name}": blame[name]
          for name in ("precision", "recall", "chance", "flagged")
        },
        "policy": FLAGS.workdir,
      }
    )


def over_parts(metrics):
  """Metrics of a batch from those of its micro-batches.

  Losses and counts add up; shares and means weigh by the tokens that they are
  of. What is a share of all response tokens weighs by rewarded ones as well.
  """
  found = {}
  for name, values in metrics.items():
    kind = name.split("/")[0]
    if name.endswith(("loss", "count")):
      found[name] = values.sum()
    elif name.endswith("_min"):
      found[name] = values.min()
    else:
      counts = metrics[f"{kind}/count"]
      total = jnp.maximum(counts.sum(), 1.0)
      found[name] = (values * counts).sum() / total
  return found


def validate():
  """Says what is wrong with the flags before anything is loaded."""
  runs.check_positive(
    FLAGS,
    *("save_every", "eval_every", "num_prompts", "num_eval_prompts"),
    *("num_samples", "sample_batch_size", "max_length", "batch_size"),
  )
  for name in ("steps", "max_right", "num_page_samples"):
    if FLAGS[name].value < 0:
      raise ValueError(
        f"--{name} must not be negative, got {FLAGS[name].value}."
      )
  if not FLAGS.steps and not FLAGS.epochs > 0:
    raise ValueError(
      f"Without --steps, --epochs must be positive, got {FLAGS.epochs}."
    )
  if not 0 <= FLAGS.warmup < 1:
    raise ValueError(f"--warmup must lie in [0, 1), got {FLAGS.warmup}.")
  if not 0 <= FLAGS.threshold <= 1:
    raise ValueError(f"--threshold must lie in [0, 1], got {FLAGS.threshold}.")
  if not FLAGS.clip_epsilon > 0:
    raise ValueError(
      f"--clip_epsilon must be positive, got {FLAGS.clip_epsilon}."
    )
  for name in (
    *("max_reward", "max_penalty", "imitation_coef"),
    *("edited_weight", "kept_weight"),
  ):
    if not FLAGS[name].value >= 0:
      raise ValueError(
        f"--{name} must not be negative, got {FLAGS[name].value}."
      )
  if FLAGS.imitation_coef and not (FLAGS.edited_weight or FLAGS.kept_weight):
    raise ValueError(
      "--edited_weight=0 and --kept_weight=0 leave nothing to imitate: give "
      "--imitation_coef=0 instead."
    )
  if FLAGS.token_rewards == "none" and not FLAGS.imitation_coef:
    raise ValueError(
      "--token_rewards=none and --imitation_coef=0 leave nothing to learn."
    )


def supervise(stage, rewritten, policy, judge, mesh):
  """Writes what the policy learns from, and what other methods would."""
  model, params, tokenizer, render = policy
  judge_model, judge_params, template = judge
  verified = [row for row in rewritten if row["is_verified"]]
  kept = prompts_lib.at_most_right(verified, FLAGS.max_right, FLAGS.seed)

  # Prompts and texts become tokens once; one text has the same tokens behind
  # the policy's prompt and the reward model's.
  unlimited = functools.partial(
    tokens.encode_prompts, tokenizer, max_length=sys.maxsize
  )
  # What fits into the reward model behind the longest sample.
  question_limit = batches.longest_in_bucket(
    judge_model.config.max_positions - batches.bucket_length(FLAGS.max_length)
  )
  rows, questions, skipped = [], [], []
  rendered = render([row["prompt"] for row in kept])
  for row, prompt, prompt_ids, question_ids in zip(
    kept,
    rendered,
    unlimited(rendered),
    unlimited(
      [
        template.rewrite_prompt(row["prompt"], row["gold"], row["response"])
        for row in kept
      ]
    ),
    strict=True,
  ):
    ids = {
      f"{name}_ids": tokens.encode_response(
        tokenizer, prompt, prompt_ids, row[name]
      )[0]
      for name in ("response", "rewrite", "gold")
    }
    too_long = (
      len(question_ids) + len(ids["response_ids"]) > FLAGS.max_question_length
      or len(question_ids) > question_limit
      or max(len(ids["response_ids"]), len(ids["rewrite_ids"]))
      > FLAGS.max_length
    )
    if too_long:
      skipped.append(
        f"{row['prompt'][:80]!r}: the reward model's question has "
        f"{len(question_ids)} tokens, the sample {len(ids['response_ids'])} "
        f"and the rewrite {len(ids['rewrite_ids'])}. Limits are "
        f"{FLAGS.max_question_length} for the first two together, "
        f"{question_limit} for the question, {FLAGS.max_length} for the others."
      )
      continue
    rows.append(row | {"prompt_ids": prompt_ids} | ids)
    questions.append(question_ids)
  if not any(not row["is_right"] for row in rows):
    raise ValueError(
      f"None of {len(rewritten)} samples in {stage.folder} is wrong and has a "
      "verified rewrite: there is nothing to learn."
    )

  # One pass over the samples for each model, nothing is decoded.
  replies = [row["response_ids"] for row in rows]
  log_probs_of = functools.partial(
    cached.pair_log_probs, batch_size=FLAGS.sample_batch_size, mesh=mesh
  )
  judged = log_probs_of(
    judge_model, judge_params, list(zip(questions, replies, strict=True))
  )
  first = log_probs_of(
    model,
    params,
    [(row["prompt_ids"], row["response_ids"]) for row in rows],
  )
  for name in ("rewrite", "gold"):
    alignments = alignment_lib.align_pairs(
      replies, [row[f"{name}_ids"] for row in rows], mode=FLAGS.alignment
    )
    for row, alignment in zip(rows, alignments, strict=True):
      row[f"{name}_edited"] = alignment.edited.tolist()
      row[f"{name}_distance"] = alignment.distance
      row[f"{name}_dropped"] = alignment.dropped.tolist()
  for row, judged_row, first_row in zip(rows, judged, first, strict=True):
    row["probs"] = np.exp(judged_row).tolist()
    row["ref_log_probs"] = first_row.tolist()

  for row in rows:
    row["dropped"] = row["rewrite_dropped"]
  wrong = [row for row in rows if not row["is_right"]]
  right = [row for row in rows if row["is_right"]]
  pair = lambda row, name: {"prompt": row["prompt"], "response": row[name]}
  golden = {row["prompt"]: pair(row, "gold") for row in rewritten}
  if processes.is_first():
    files.write_jsonl(stage.path("supervision.jsonl"), rows)
    # For sft.py and preference.py.
    files.write_jsonl(
      stage.path("right.jsonl"), [pair(row, "response") for row in right]
    )
    files.write_jsonl(stage.path("gold.jsonl"), golden.values())
    files.write_jsonl(
      stage.path("pairs.jsonl"),
      [
        {
          "prompt": row["prompt"],
          "chosen": row["rewrite"],
          "rejected": row["response"],
        }
        for row in wrong
      ],
    )
  stage.finish(
    **{"samples kept": len(verified) / len(rewritten)},
    wrong=len(wrong),
    right=len(right),
    skipped=skipped,
    **{
      "edits of a rewrite": mean_of(wrong, "rewrite_distance"),
      "edits to the gold solution": mean_of(wrong, "gold_distance"),
    },
  )


def mean_of(rows, name):
  return float(np.mean([row[name] for row in rows]))


def localization(rows):
  """Whether blamed tokens are those that the model's own rewrites drop."""
  wrong = [row for row in rows if not row["is_right"]]
  return metrics_lib.localization(
    [np.array(row["probs"]) < FLAGS.threshold for row in wrong],
    [np.array(row["dropped"]) for row in wrong],
  )


def check_first(metrics):
  """The first ratios are 1, or the supervision is not of this policy."""
  limit = 1e-3 if FLAGS.dtype == "float32" else 0.05
  ratio = metrics.get("token/ratio_mean", 1.0)
  if metrics.get("token/count", 1) and not abs(ratio - 1) <= limit:
    raise ValueError(
      f"The mean ratio of the first batch is {ratio:.4f} instead of 1: the "
      "log-probabilities of the supervision are not those of --policy."
    )


def write_page(rows, token_rewards, tokenizer):
  """Some samples as a page: the token rewards, and what was edited."""
  wrong = [i for i, row in enumerate(rows) if not row["is_right"]]
  right = [i for i, row in enumerate(rows) if row["is_right"]]
  num_right = min(len(right), FLAGS.num_page_samples // 4)
  chosen = wrong[: FLAGS.num_page_samples - num_right] + right[:num_right]
  samples = []
  for i in chosen:
    row = rows[i]
    facts = {"right": row["is_right"]}
    rewrite = None
    if not row["is_right"]:
      facts |= {
        "first wrong step": row["error_step"],
        "edits": row[f"{FLAGS.imitate}_distance"],
        "edits to the gold solution": row["gold_distance"],
      }
      rewrite = token_pages.from_ids(
        tokenizer,
        row[f"{FLAGS.imitate}_ids"],
        marked=np.array(row[f"{FLAGS.imitate}_edited"]),
      )
    samples.append(
      token_pages.Sample(
        row["prompt"],
        token_pages.from_ids(
          tokenizer,
          row["response_ids"],
          values=token_rewards[i, : len(row["response_ids"])],
          marked=np.array(row[f"{FLAGS.imitate}_dropped"]),
        ),
        rewrite,
        facts,
      )
    )
  token_pages.write(
    os.path.join(FLAGS.workdir, "tokens.html"),
    "RLMEC: which tokens are blamed",
    samples,
    value_name="reward",
    scale=(FLAGS.max_penalty or 1.0, FLAGS.max_reward or 1.0),
    notes=[
      "Underlined in a sample: what is dropped or replaced in the text beside "
      f"it, a {FLAGS.imitate}. Underlined there: what is new.",
    ],
    limit=FLAGS.num_page_samples,
    num_in_all=len(rows),
  )


if __name__ == "__main__":
  app.run(main)
