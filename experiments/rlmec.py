"""RLMEC: RL with token-level rewards of a generative reward model.

Three minutes on two thirds of a CPU core, after
experiments/rlmec_reward_model.py has made the reward model of the same policy:

  python experiments/rlmec.py \
    --flagfile=experiments/flags/rlmec/chains_rlmec.flags \
    --policy=runs/base --reward_model=runs/grm --stages=runs/stages \
    --workdir=runs/rlmec

The policy answers questions; the reward model rewrites the wrong answers with
few edits, and says of every token whether it would have written it. From both,
fixed during training, the policy learns by a loss with a reward for each token
and by imitating the rewrites. A step is one update. To try an idea, copy this
file and change `targets.arrays` (what is learnt from) or `loss_fn` (how).

What is made before training is kept in --stages, so that runs which differ in
the training alone share it: samples/, rewrites/ and supervision/, which
rljax/rlmec/pipeline.py describes.

Source: Chen et al. (2024), arXiv 2401.06081, after the authors' code.
Departures: whether a sample is right, its own verdict says, also where the
reward model names no wrong step; solutions without an end are left out; equal
texts are taken once per question (those that differ in blanks are not equal);
blanks between kept and new steps are not edits; a rewrite is no longer than a
sample may be; sums and counts are over the whole batch, not averaged over
parts of it; all numbers are float32; a solution has the same tokens behind the
policy's prompt and the reward model's. The functions of rljax/rlmec name more.
As published: the reward model reads the right solution, so that there are no
rewards without one; behind the first wrong token it reads what it would not
have written; samples whose rewrite is not right are dropped, which leaves
fewer hard questions (the share that is kept is reported); solutions are drawn
at --temperature and --top_p, while the ratio is to the policy at temperature 1.
A sample that a stop string has ended is scored with an end token that the
policy did not write.
"""

import time

import jax
import jax.numpy as jnp
from absl import flags

from rljax import cli
from rljax.evaluation import answers, token_pages
from rljax.evaluation import metrics as metrics_lib
from rljax.generation import rollouts, samplers
from rljax.losses import token_level
from rljax.models import hf, products
from rljax.rlmec import pipeline, rewriters, targets
from rljax.rlmec import prompts as rewriting
from rljax.text import alignment, batches, files, tokens
from rljax.training import microbatch, optimizers, origins, runs

# Flags that scripts share; rljax/cli has their help and their bounds.
cli.define_run(
  steps=0, epochs=3.0, save_every=500, eval_every=100, num_page_samples=16
)
cli.define_task(num_prompts=2000, num_eval_prompts=200, eval_split="validation")
cli.define_prompts(solutions=True)
cli.define_models()
cli.define_sampler(
  max_length=256,
  num_samples=5,
  temperature=0.7,
  top_p=0.95,
  sample_batch_size=64,
)
cli.define_rewriting("", locate=None)
cli.define_batches(64, text="Samples of an update.")
cli.define_optimizer(5e-6, schedule="cosine", warmup=0.03, max_grad_norm=1.0)

# Flags of RLMEC.
flags.DEFINE_string(
  "reward_model",
  None,
  "Generative reward model with the policy's tokens: a workdir of "
  "rlmec_reward_model.py, or another model in the forms of --policy.",
  required=True,
)
flags.DEFINE_integer(
  "max_right", 0, "Most right samples of a question to learn from; 0: all.", 0
)
flags.DEFINE_enum(
  "alignment",
  "clean",
  alignment.MODES,
  "Which tokens count as edited; see rljax/text/alignment.py.",
)
flags.DEFINE_enum(
  "token_rewards",
  "model",
  targets.TOKEN_REWARDS,
  "What a token earns: by the reward model's probability of it (model), by "
  "whether the rewrite drops it (alignment), as all of its sample (sequence), "
  "or nothing (none).",
)
flags.DEFINE_float(
  "threshold", 0.5, "Probability of a token that earns nothing.", 0, 1
)
flags.DEFINE_float(
  "max_reward", 0.5, "Largest reward of a token in a right sample.", 0
)
flags.DEFINE_float(
  "max_penalty", 0.1, "Largest penalty of a token in a wrong sample.", 0
)
flags.DEFINE_enum(
  "rl_mode",
  "rlmec",
  token_level.MODES,
  "Loss of the token rewards: that of RLMEC, or PPO's clipped surrogate.",
)
flags.DEFINE_float(
  "clip_epsilon",
  0.3,
  "How far the probability ratio to the first policy may move from 1.",
  1e-6,
)
flags.DEFINE_float(
  "imitation_coef", 1.0, "Weight of the imitation loss; 0 leaves it out.", 0
)
flags.DEFINE_enum(
  "imitate",
  "rewrite",
  targets.IMITATED,
  "What is imitated in place of a wrong sample: its rewrite, or the task's "
  "solution.",
)
flags.DEFINE_float(
  "edited_weight", 1.0, "Weight of new tokens in the imitation loss.", 0
)
flags.DEFINE_float(
  "kept_weight", 0.5, "Weight of all other tokens in the imitation loss.", 0
)
cli.may_change("sample_batch_size")
FLAGS = flags.FLAGS

COLUMNS = ("loss", "token/loss", "imitation/loss", "eval/is_correct")


def main():
  run = runs.start(FLAGS)
  sizes = cli.batch_sizes(FLAGS, run.mesh)
  check_flags()

  # The models, which share their tokens.
  loaded = cli.load_policy(FLAGS)
  model, tokenizer = loaded.model, loaded.tokenizer
  reward_model = hf.load(FLAGS.reward_model, dtype=FLAGS.dtype)
  origins.check_same_tokens(
    f"--reward_model={FLAGS.reward_model}", reward_model, loaded
  )
  policy, reward_model = map(run.place_model, (loaded, reward_model))

  # Questions with their solutions, and what samples, scores and rewrites.
  task = cli.load_task(FLAGS)
  score = cli.task_scorer(FLAGS, task)
  train, held_out = pipeline.questions(
    task,
    tokenizer,
    score,
    {"train": FLAGS.num_prompts, FLAGS.eval_split: FLAGS.num_eval_prompts},
    seed=FLAGS.seed,
    task_options=FLAGS.task_options,
    **cli.file_options(FLAGS),
    **cli.encode_options(FLAGS),
  )
  sampler = samplers.Sampler(
    model,
    tokenizer,
    cli.sampler_settings(FLAGS, unfinished_score=0.0),
    mesh=run.mesh,
  )
  answer = sampler.greedy(held_out.prompts, batch_size=FLAGS.sample_batch_size)
  template, locate = pipeline.how_asked(
    FLAGS.reward_model, FLAGS.template, FLAGS.locate
  )
  pipeline.check_template(template, tokenizer, train.solutions[0])
  rewriter = rewriters.of_model(
    reward_model,
    template,
    mesh=run.mesh,
    batch_size=FLAGS.sample_batch_size,
    slots=FLAGS.slots,
    max_length=FLAGS.max_length,
    max_prompt_length=FLAGS.max_question_length,
    locate=locate,
    step_ends=rewriting.step_ends(task),
  )

  # The stages: samples, rewrites of the wrong ones, and what is learnt.
  folder = FLAGS.stages or FLAGS.workdir
  with run.signals():
    sampled = pipeline.sample(
      folder,
      sampler,
      policy.params,
      train.prompts,
      score,
      batch_size=FLAGS.sample_batch_size,
      progress=run.progress,
      policy=rewriters.identity(loaded),
    )
    rewritten = pipeline.rewrite(
      folder,
      "rewrites",
      sampled,
      train.solutions,
      rewriter,
      score,
      own=getattr(task, "rewrite", None),
      progress=run.progress,
    )
  if run.is_stopped:
    return run.exit_status
  supervised = pipeline.supervise(
    folder,
    rewritten,
    policy,
    reward_model,
    template=template,
    prompt_format=cli.prompt_format(FLAGS),
    alignment=FLAGS.alignment,
    max_right=FLAGS.max_right,
    seed=FLAGS.seed,
    limits=targets.Limits(FLAGS.max_length, FLAGS.max_question_length),
    batch_size=FLAGS.sample_batch_size,
    mesh=run.mesh,
  )
  del reward_model, rewriter  # It has said all that it has to say.

  # Token rewards and weights, `[N, T]`. Both texts of a row have one shape, so
  # that one pass reads them.
  rows = files.read_jsonl(supervised.path("supervision.jsonl"))
  if len(rows) < FLAGS.batch_size:
    raise ValueError(
      f"--batch_size={FLAGS.batch_size} is more than the {len(rows)} rows of "
      f"{supervised.folder}: sample more, or take a smaller batch."
    )
  shape = targets.shape(rows, FLAGS.imitate)
  tokens.check_positions(sum(shape.values()), model.config.max_positions)
  arrays = targets.arrays(
    rows,
    **shape,
    token_rewards=FLAGS.token_rewards,
    threshold=FLAGS.threshold,
    max_reward=FLAGS.max_reward,
    max_penalty=FLAGS.max_penalty,
    imitate=FLAGS.imitate,
    edited_weight=FLAGS.edited_weight,
    kept_weight=FLAGS.kept_weight,
  )
  run.total_steps = FLAGS.steps or batches.num_updates(
    len(rows), FLAGS.batch_size, FLAGS.epochs
  )

  # What is differentiated.
  texts = []  # What is read of a row.
  if FLAGS.token_rewards != "none":
    texts.append("response")
  if FLAGS.imitation_coef:
    texts.append("imitated")

  def log_probs_of(params, batch):
    """Of the tokens of samples and of imitated texts, `[B, T]` each."""
    joined = lambda *names: jnp.concatenate([batch[name] for name in names])
    statistics, _ = rollouts.token_statistics(
      model,
      params["policy"],
      {
        "prompt_ids": joined(*["prompt_ids"] * len(texts)),
        "prompt_mask": joined(*["prompt_mask"] * len(texts)),
        "response_ids": joined(*(f"{text}_ids" for text in texts)),
        "response_mask": joined(*(f"{text}_mask" for text in texts)),
      },
      temperature=1.0,
      chunk_size=FLAGS.chunk_size,
    )
    parts = jnp.split(statistics.log_probs, len(texts))
    return dict(zip(texts, parts, strict=True))

  def loss_fn(params, batch, counts):
    """Of a part of a batch, divided by the counts of all of it."""
    found = log_probs_of(params, batch)
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

  apart = {"sharding": run.rows_sharding, "buckets": sizes.buckets}
  gradients = microbatch.grad(loss_fn, sizes.num_parts, adds_up=True, **apart)
  transform = optimizers.make(run.total_steps, **cli.optimizer_options(FLAGS))

  def update(state, batch):
    grads, metrics = gradients(state["params"], batch, counts_of(batch))
    params, optimizer_state, metrics = optimizers.step(
      transform, grads, state["optimizer"], state["params"], metrics
    )
    return {"params": params, "optimizer": optimizer_state}, metrics

  # The state; a run that was stopped goes on from its last checkpoint.
  state = run.restore(
    {"policy": policy.params},
    hf.partition_rules(model, run.mesh),
    optimizer=transform,
  )
  del policy
  update = run.compile(update, returns_state=True)
  run.check_learner(
    gradients,
    state["params"],
    {name: x[: FLAGS.batch_size] for name, x in arrays.items()},
    more=lambda batch: (counts_of(batch),),
    texts=texts,
  )

  def evaluate(step):
    """Greedy answers to the held-out questions; --keep_best keeps the best."""
    found = answers.evaluate(answer, state["params"]["policy"], score)
    run.samples(step, found)
    metrics = answers.means(found)
    run.keep_best(step, metrics["eval/is_correct"], state["params"])
    return metrics

  starts_from = {"policy": loaded.params}
  digests = {"The rows of supervision": supervised.digest("supervision.jsonl")}
  with run.training(model, tokenizer, starts_from, COLUMNS, digests):
    run.skipped(supervised.facts["skipped"])
    run.note(
      f"Of {pipeline.shown(sampled.facts)}: "
      f"{pipeline.shown(rewritten.facts)}. Supervision of "
      f"{pipeline.shown(supervised.facts)}; {run.total_steps} steps."
    )
    run.page(
      "RLMEC: which tokens are blamed",
      lambda limit: token_pages.with_rewrites(
        tokenizer,
        targets.shown(
          rows, arrays["rewards"], imitate=FLAGS.imitate, limit=limit
        ),
      ),
      value_name="reward",
      scale=(FLAGS.max_penalty or 1.0, FLAGS.max_reward or 1.0),
      notes=[
        "Underlined in a sample: what is dropped or replaced in the text "
        f"beside it, a {FLAGS.imitate}. Underlined there: what is new."
      ],
      num_in_all=len(rows),
    )
    for step in run.steps(freeze=[update, answer]):
      # Row `step` of the metrics is about the policy after `step` updates.
      metrics = evaluate(step) if step % FLAGS.eval_every == 0 else {}
      started = time.perf_counter()
      order = batches.batch_indices(
        len(rows), FLAGS.batch_size, step, seed=FLAGS.seed
      )
      batch = {name: array[order] for name, array in arrays.items()}
      state, learnt = update(state, run.shard(batch))
      metrics |= jax.device_get(learnt)
      metrics["update_seconds"] = time.perf_counter() - started
      if step == 0:
        dtypes = (FLAGS.dtype, FLAGS.param_dtype)
        is_exact = all(map(products.is_exact, dtypes))
        targets.check_first_ratio(metrics, is_exact=is_exact)
      run.log(step, metrics)
      run.save(step + 1, state)
    if run.is_complete:
      blame = metrics_lib.localization(*targets.blame(rows, FLAGS.threshold))
      metrics = evaluate(run.total_steps)
      run.log(run.total_steps, metrics)
      run.finish(
        {
          "correct, greedily": metrics["eval/is_correct"],
          "samples kept": supervised.facts["samples kept"],
          **{f"blamed tokens, own rewrites: {x}": blame[x] for x in blame},
          "policy": FLAGS.workdir,
        }
      )
  return run.exit_status


def counts_of(batch):
  """What the losses of a whole batch divide by."""
  return {
    name: jnp.count_nonzero(batch[name]).astype(jnp.float32)
    for name in ("rewards", "weights")
  }


def check_flags():
  """Raises ValueError for flags of RLMEC that do not fit each other."""
  if FLAGS.imitation_coef and not (FLAGS.edited_weight or FLAGS.kept_weight):
    raise ValueError(
      "--edited_weight=0 and --kept_weight=0 leave nothing to imitate: give "
      "--imitation_coef=0 instead."
    )
  if FLAGS.token_rewards == "none" and not FLAGS.imitation_coef:
    raise ValueError(
      "--token_rewards=none and --imitation_coef=0 leave nothing to learn."
    )


if __name__ == "__main__":
  cli.run(main)
