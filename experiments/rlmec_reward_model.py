"""Trains a generative reward model, which corrects wrong solutions.

Twelve minutes on two thirds of a CPU core, after experiments/sft.py has made
the policy:

  python experiments/rlmec_reward_model.py --workdir=runs/grm \
    --flagfile=experiments/flags/rlmec/chains_grm.flags --policy=runs/base \
    --stages=runs/stages

The policy answers questions, a teacher rewrites the wrong answers with few
edits, and a model learns to do the same. A step is one update. What comes
before training is kept in --stages: samples/, teacher/ and records/, which
rljax/rlmec/pipeline.py describes; with the same flags of sampling,
experiments/rlmec.py finds the samples there. After training, test/ in the
workdir has the model's rewrites of unseen questions. To try an idea, copy this
file and change `pipeline.record` (what is learnt from) or `loss_fn` (how).

Source: Chen et al. (2024), arXiv 2401.06081, after the authors' code: records
of three kinds in one file, prompts masked, right solutions kept with
probability (rewrites / all samples). Departures: whether a solution is right,
its own verdict says, not the teacher's; equal texts are taken once per
question, not once at all, and texts that differ in blanks are not equal;
solutions without an end are left out; the draw of right solutions is seeded;
the teacher need not be a language model.
"""

import time

import jax
import numpy as np
from absl import flags

from rljax import cli
from rljax.distributed import meshes
from rljax.generation import rollouts, samplers
from rljax.losses import supervised
from rljax.models import fresh, hf
from rljax.rlmec import pipeline, rewriters, targets
from rljax.rlmec import prompts as rewriting
from rljax.text import batches, tokens
from rljax.training import microbatch, optimizers, origins, runs

# Flags that scripts share; rljax/cli has their help and their bounds.
cli.define_run(steps=0, epochs=3.0, save_every=500, eval_every=250)
cli.define_task(num_prompts=2000)
cli.define_prompts(solutions=True)
cli.define_models(policy="Language model that writes the samples.")
cli.define_sampler(
  max_length=256,
  num_samples=5,
  temperature=0.7,
  top_p=0.95,
  sample_batch_size=64,
)
cli.define_rewriting("compact", locate=True, teacher=True)
cli.define_random_model(hidden_size=64, num_layers=3, max_positions=128)
cli.define_batches(32, text="Records of an update.", micro_batches=False)
cli.define_packing()
cli.define_optimizer(2e-5, schedule="cosine", warmup=0.03, max_grad_norm=1.0)

# Flags of the teacher, and of what learns from it.
flags.DEFINE_integer(
  "num_teacher_prompts",
  0,
  "Questions whose samples are rewritten, the first ones of --num_prompts; 0 "
  "takes all.",
  0,
)
flags.DEFINE_integer(
  "num_held_out",
  100,
  "Questions that are not learnt from, the last ones that are rewritten.",
  1,
)
flags.DEFINE_string(
  "teacher",
  "task",
  "Who rewrites wrong samples: task, which knows the step that went wrong; "
  "gold, a splice of a sample's good steps and the solution's others; model, "
  "--teacher_model; or module:function, a function (question, gold, wrong) -> "
  "text of your own.",
)
flags.DEFINE_string(
  "teacher_model", "", "Model of --teacher=model, in the forms of --policy."
)
flags.DEFINE_enum(
  "teacher_format",
  "chat",
  ["plain", "chat"],
  "How --teacher_model is asked: plain, or chat in its tokenizer's template.",
)
flags.DEFINE_integer(
  "teacher_batch_size", 8, "Questions to --teacher_model at the same time.", 1
)
flags.DEFINE_integer(
  "teacher_length", 350, "Most tokens of a rewrite by --teacher_model.", 1
)
flags.DEFINE_string(
  "base",
  "",
  "Model that the reward model starts as, in the forms of --policy and with "
  "its tokens; empty for random weights.",
)
cli.may_change("sample_batch_size", "teacher_batch_size")
FLAGS = flags.FLAGS

COLUMNS = ("nll/loss", "eval/loss", "tokens_per_second")


def main():
  run = runs.start(FLAGS)
  sizes = cli.batch_sizes(FLAGS, run.mesh)
  num_questions = check_flags()
  meshes.check_divisible(
    FLAGS.teacher_batch_size, run.mesh, "--teacher_batch_size"
  )

  # The policy, questions with their solutions, and what scores and rewrites.
  loaded = hf.load(FLAGS.policy, **cli.model_options(FLAGS))
  tokenizer = loaded.tokenizer
  task = cli.load_task(FLAGS)
  score = cli.task_scorer(FLAGS, task)
  teacher = load_teacher(task, run)
  (questions,) = pipeline.questions(
    task,
    tokenizer,
    score,
    {"train": FLAGS.num_prompts},
    seed=FLAGS.seed,
    task_options=FLAGS.task_options,
    **cli.file_options(FLAGS),
    **cli.encode_options(FLAGS),
  )
  pipeline.check_template(FLAGS.template, tokenizer, questions.solutions[0])
  sampler = samplers.Sampler(
    loaded.model,
    tokenizer,
    cli.sampler_settings(FLAGS, unfinished_score=0.0),
    mesh=run.mesh,
  )

  # The model that learns: its tokens are the policy's, as its probabilities
  # become rewards of the policy's tokens.
  if FLAGS.base:
    base = cli.load_policy(FLAGS, "base")
    origins.check_same_tokens(f"--base={FLAGS.base}", base, loaded)
    model, params = base.model, base.params
  else:
    model = fresh.make(
      tokenizer=tokenizer,
      vocab_size=loaded.model.config.vocab_size,
      **cli.random_model_options(FLAGS),
    )
    params = fresh.initial_params(model, FLAGS.seed)
  rules = hf.partition_rules(model, run.mesh)
  meshes.shardings(params, rules, run.mesh)  # Else nothing is drawn.

  # The stages: samples, the teacher's rewrites, and records of them. The last
  # questions are held out.
  folder, step_ends = FLAGS.stages or FLAGS.workdir, rewriting.step_ends(task)
  solutions = questions.solutions[:num_questions]
  held_out = [question for question, _ in solutions[-FLAGS.num_held_out :]]
  with run.signals():
    sampled = pipeline.sample(
      folder,
      sampler,
      run.place_model(loaded).params,
      questions.prompts,
      score,
      batch_size=FLAGS.sample_batch_size,
      progress=run.progress,
      policy=rewriters.identity(loaded),
    )
    taught = pipeline.rewrite(
      *(folder, "teacher", sampled, solutions, teacher, score),
      progress=run.progress,
    )
  if run.is_stopped:
    return run.exit_status
  recorded = pipeline.record(
    folder,
    taught,
    held_out,
    FLAGS.template,
    seed=FLAGS.seed,
    locate=FLAGS.locate,
    step_ends=step_ends,
  )
  train, unseen, skipped = targets.encode_records(
    recorded.folder,
    tokenizer,
    max_question_length=FLAGS.max_question_length,
    max_positions=model.config.max_positions,
  )
  if len(train) < FLAGS.batch_size or not unseen:
    raise ValueError(
      f"There are {len(train)} records to learn from and {len(unseen)} "
      f"held-out ones of the rewrites in {taught.folder}; {len(skipped)} were "
      f"left out for their length. --batch_size={FLAGS.batch_size} needs more "
      "questions or samples, a longer context, or a teacher that succeeds more "
      "often."
    )
  shape = batches.supervised_shape(train + unseen)
  tokens.check_positions(sum(shape.values()), model.config.max_positions)
  run.total_steps = FLAGS.steps or batches.num_updates(
    len(train), FLAGS.batch_size, FLAGS.epochs
  )

  draw = lambda step: batches.batch_indices(
    len(train), FLAGS.batch_size, step, seed=FLAGS.seed
  )
  pack = cli.pack_pairs(FLAGS, run, sizes, train, draw)

  def batch_of(rows):
    """Rows of one shape; those that are missing are empty."""
    return batches.supervised_batch(rows, **shape, num_rows=sizes.rows)

  # What is differentiated: plain next-token loss, on responses alone.

  def loss_fn(params, batch):
    statistics, _ = rollouts.token_statistics(
      model,
      params["policy"],
      batch,
      temperature=1.0,
      chunk_size=FLAGS.chunk_size,
    )
    return supervised.nll_loss(statistics.log_probs, batch["response_mask"])

  gradients = microbatch.grad(loss_fn, 1)
  transform = optimizers.make(run.total_steps, **cli.optimizer_options(FLAGS))

  def update(state, batch):
    params = state["params"]
    grads, metrics = gradients(params, batch)
    params, optimizer_state, metrics = optimizers.step(
      transform, grads, state["optimizer"], params, metrics
    )
    return {"params": params, "optimizer": optimizer_state}, metrics

  # The state; a run that was stopped goes on from its last checkpoint.
  state = run.restore({"policy": params}, rules, optimizer=transform)
  update = run.compile(update, returns_state=True)
  first = batch_of(train[: FLAGS.batch_size])
  run.check_learner(
    gradients, state["params"], first, num_parts=1, pack=pack.alone
  )
  held_out_loss = run.compile(
    lambda params, batch: loss_fn(params, batch)[1], name="held-out loss"
  )

  def evaluate(step):
    """Mean loss over the held-out records; batches weigh by their tokens."""
    losses, num_tokens = [], []
    for start in range(0, len(unseen), sizes.rows):
      rows = unseen[start : start + sizes.rows]
      batch = run.shard(batch_of(rows))
      metrics = held_out_loss(state["params"], batch)
      losses.append(float(metrics["nll/loss"]))
      num_tokens.append(float(metrics["nll/tokens"]))
    loss = np.average(losses, weights=num_tokens)
    run.keep_best(step, -loss, state["params"])
    return {"eval/loss": loss}

  starts_from = {"policy": loaded.params, "base": params}
  digests = {"The records": recorded.digest("records.jsonl", "held_out.jsonl")}
  with run.training(model, tokenizer, starts_from, COLUMNS, digests):
    pipeline.save_settings(
      FLAGS.workdir, template=FLAGS.template, locate=FLAGS.locate
    )
    run.skipped(skipped)
    run.note(
      f"Of {pipeline.shown(sampled.facts)}: {pipeline.shown(taught.facts)}. "
      f"Records: {pipeline.shown(recorded.facts['records'])}; "
      f"{run.total_steps} steps."
    )
    for step in run.steps(freeze=[update, held_out_loss]):
      # Row `step` of the metrics is about the model after `step` updates.
      metrics = evaluate(step) if step % FLAGS.eval_every == 0 else {}
      started = time.perf_counter()
      batch = pack(batch_of([train[i] for i in draw(step)]))
      state, learnt = update(state, run.shard(batch))
      metrics |= jax.device_get(learnt)
      seconds = time.perf_counter() - started
      metrics["tokens_per_second"] = metrics["nll/tokens"] / seconds
      run.log(step, metrics)
      run.save(step + 1, state)
    if run.is_complete:
      metrics = evaluate(run.total_steps)
      run.log(run.total_steps, metrics)
      # What it is for: rewrites of wrong solutions that it has never seen.
      student = rewriters.of_model(
        hf.LanguageModel(
          model, state["params"]["policy"], tokenizer, FLAGS.workdir, None
        ),
        FLAGS.template,
        mesh=run.mesh,
        batch_size=FLAGS.batch_size,
        slots=FLAGS.slots,
        max_length=shape["response_length"],
        max_prompt_length=FLAGS.max_question_length,
        locate=FLAGS.locate,
        step_ends=step_ends,
      )
      found = pipeline.test(
        FLAGS.workdir,
        taught,
        held_out,
        student,
        score,
        progress=run.progress,
      )
      run.finish(
        {
          "held-out loss (nats a token)": metrics["eval/loss"],
          **found,
          "reward model": FLAGS.workdir,
        }
      )
  return run.exit_status


def load_teacher(task, run):
  """Who rewrites the wrong samples of the policy."""
  if FLAGS.teacher != "model":
    return rewriters.of_teacher(FLAGS.teacher, task, FLAGS.teacher_seconds)
  return rewriters.of_model(
    run.place_model(hf.load(FLAGS.teacher_model, dtype=FLAGS.dtype)),
    "instruction",
    **{"mesh": run.mesh, "slots": FLAGS.slots},
    batch_size=FLAGS.teacher_batch_size,
    max_length=FLAGS.teacher_length,
    max_prompt_length=FLAGS.max_question_length,
    step_ends=rewriting.step_ends(task),
    prompt_format=FLAGS.teacher_format,
  )


def check_flags():
  """Returns how many questions the teacher sees.

  Raises:
    ValueError: if flags do not fit each other.
  """
  num_questions = FLAGS.num_teacher_prompts or FLAGS.num_prompts
  if not FLAGS.num_held_out < num_questions <= FLAGS.num_prompts:
    raise ValueError(
      f"--num_held_out={FLAGS.num_held_out} must be fewer than the "
      f"{num_questions} questions of the teacher, and these no more than "
      f"--num_prompts={FLAGS.num_prompts}."
    )
  if (FLAGS.teacher == "model") != bool(FLAGS.teacher_model):
    raise ValueError(
      f"--teacher={FLAGS.teacher} and --teacher_model={FLAGS.teacher_model!r} "
      "do not fit: a model is named exactly where it is the teacher."
    )
  return num_questions


if __name__ == "__main__":
  cli.run(main)
