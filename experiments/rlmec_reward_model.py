"""Trains a generative reward model, which corrects wrong solutions.

Twelve minutes on two thirds of a CPU core, after `experiments/sft.py` has made
the policy:
  python experiments/rlmec_reward_model.py --workdir=runs/grm \
    --flagfile=experiments/flags/rlmec/chains_grm.flags --policy=runs/base \
    --stages=runs/stages

The stages before the training, each in a folder of --stages (the workdir, if
none is given), with files to open and with what they were made of:

  samples/   samples.jsonl: the policy's solutions, each with its verdict
  teacher/   rewrites.jsonl: of the wrong ones, what the teacher makes of them
  records/   records.jsonl: what is learnt, three kinds of prompt and response

and behind it test/ in the workdir: rewrites of questions that were held out. A
stage whose inputs are as before is not repeated; one that was stopped goes on.
With the same flags of sampling, `experiments/rlmec.py` finds the samples there.

--teacher says who rewrites: "task" for the task itself, which knows which step
went wrong; "gold" for a splice of the sample's good steps and the solution's
others; "package.module:name" for your own function `(question, gold, wrong) ->
text`, such as one that asks a large model; or "model" for the one that
--teacher_model names, which is asked in two calls.

Source: Chen et al. (2024), arXiv 2401.06081, after the authors' code: records
of three kinds in one file, prompts masked, right solutions kept with
probability (rewrites / all samples). Departures: whether a solution is right,
its own verdict says, not the teacher's; equal texts are taken once per
question, not once at all, and texts that differ in blanks are not equal;
solutions without an end are left out; the draw of right solutions is seeded;
the teacher need not be a language model.
"""

import functools
import importlib
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
from rljax.evaluation import curves
from rljax.generation import rollouts, samplers
from rljax.losses import supervised
from rljax.models import gpt2, hf, llama
from rljax.ops import log_probs, sampling
from rljax.rlmec import pipeline, teachers
from rljax.rlmec import prompts as prompts_lib
from rljax.scoring import scorers
from rljax.storage import checkpoint
from rljax.text import batches, files, keywords, logged
from rljax.text import tokens as tokens_lib
from rljax.training import logs, runs

# Run.
flags.DEFINE_string("workdir", None, "Checkpoints and logs.", required=True)
flags.DEFINE_string("stages", "", "Folder of the stages; empty: workdir.")
flags.DEFINE_integer("seed", 0, "Seed of every source of randomness.")
flags.DEFINE_integer("steps", 0, "Optimizer updates; 0: what --epochs make.")
flags.DEFINE_float("epochs", 3.0, "Passes over the records.")
flags.DEFINE_integer("save_every", 500, "Steps between checkpoints.")
flags.DEFINE_integer("eval_every", 250, "Steps between held-out evaluations.")
flags.DEFINE_string("mesh", "data:-1", "Axes data, fsdp, tensor; -1: the rest.")
flags.DEFINE_string("compilation_cache", "~/.cache/rljax", "Empty for none.")
flags.DEFINE_string("wandb_project", "", "Also log to this project.")
# Task.
flags.DEFINE_string("task", "chains", "A module of rljax.tasks.")
flags.DEFINE_list("task_options", [], "name=value, handed to the task.")
flags.DEFINE_list("score_options", [], "name=value, handed to task.score.")
flags.DEFINE_integer("num_prompts", 2000, "Training questions to sample.")
flags.DEFINE_integer("num_teacher_prompts", 0, "The first ones; 0: all.")
flags.DEFINE_integer("num_held_out", 100, "The last ones of these: a test.")
flags.DEFINE_integer("max_prompt_length", 512, "Tokens; longer is an error.")
flags.DEFINE_enum("prompt_format", "plain", ["plain", "chat"], "Of the policy.")
# Samples of the policy.
flags.DEFINE_string("policy", None, "It writes the samples.", required=True)
flags.DEFINE_integer("num_samples", 5, "Of each question.")
flags.DEFINE_integer("sample_batch_size", 64, "Questions at the same time.")
flags.DEFINE_integer("max_length", 32, "Tokens of a solution, with its end.")
flags.DEFINE_float("temperature", 0.7, "Of the samples.")
flags.DEFINE_float("top_p", 0.95, "1: off.")
flags.DEFINE_list("stop_strings", [], r"Texts that end a sample; \n in them.")
# Teacher.
flags.DEFINE_string("teacher", "task", "task, gold, model or module:function.")
flags.DEFINE_string("teacher_model", "", "Of --teacher=model.")
flags.DEFINE_enum(
  "teacher_format", "chat", ["plain", "chat"], "It is asked so."
)
flags.DEFINE_integer("teacher_batch_size", 8, "Questions at the same time.")
flags.DEFINE_integer("teacher_length", 350, "Tokens of its rewrite.")
# Reward model: trained weights to start from, or random ones.
flags.DEFINE_string("base", "", "Workdir, directory or name; empty: random.")
flags.DEFINE_enum("family", "gpt2", ["gpt2", "llama"], "Of a random model.")
flags.DEFINE_integer("hidden_size", 64, "Of a random model.")
flags.DEFINE_integer("num_layers", 3, "Of a random model.")
flags.DEFINE_integer("num_heads", 4, "Of a random model.")
flags.DEFINE_integer("max_positions", 128, "Of a random model: its context.")
flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of compute.")
flags.DEFINE_bool("remat", False, "Recompute layers in the backward pass.")
flags.DEFINE_integer("chunk_size", 0, "Positions with logits; 0: what fits.")
flags.DEFINE_enum(
  "template", "compact", sorted(prompts_lib.TEMPLATES), "Of its questions."
)
flags.DEFINE_bool("locate", True, "Learn to name the first wrong step, too.")
flags.DEFINE_integer("max_question_length", 2000, "Tokens; longer is left out.")
# Updates.
flags.DEFINE_integer("batch_size", 32, "Records per update.")
flags.DEFINE_float("learning_rate", 1e-3, "Highest, of AdamW; cosine to 0.")
flags.DEFINE_float("warmup", 0.03, "Share of the updates.")
flags.DEFINE_float("weight_decay", 0.0, "Of AdamW.")
flags.DEFINE_float("max_grad_norm", 1.0, "0: no clipping.")
FLAGS = flags.FLAGS

COLUMNS = ("nll/loss", "eval/loss", "tokens_per_second")
PANELS = {"Loss (nats a token)": ["nll/loss", "eval/loss"]}


def main(_):
  processes.join()
  runs.check_positive(
    FLAGS,
    *("save_every", "eval_every", "batch_size", "num_prompts"),
    *("num_samples", "sample_batch_size", "max_length", "num_held_out"),
    *("teacher_batch_size", "teacher_length"),
  )
  if FLAGS.steps < 0 or not (FLAGS.steps or FLAGS.epochs > 0):
    raise ValueError(
      f"--steps={FLAGS.steps} or --epochs={FLAGS.epochs} must be positive."
    )
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
  if not 0 <= FLAGS.warmup < 1:
    raise ValueError(f"--warmup must lie in [0, 1), got {FLAGS.warmup}.")
  may_change = (
    *("workdir", "stages", "mesh", "compilation_cache", "wandb_project"),
    *("sample_batch_size", "teacher_batch_size"),
  )
  in_force = runs.start(FLAGS, may_change)
  mesh = meshes.make(FLAGS.mesh)
  for name in ("batch_size", "sample_batch_size", "teacher_batch_size"):
    meshes.check_divisible(FLAGS[name].value, mesh, f"--{name}")
  task = tasks.load(FLAGS.task)
  score = scorers.scorer(FLAGS.task, keywords.parse(FLAGS.score_options))
  teacher, teacher_inputs = find_teacher(task)

  # The policy, and questions with their solutions.
  loaded = hf.load(FLAGS.policy, dtype=FLAGS.dtype)
  tokenizer = loaded.tokenizer
  place = lambda tree, rules: meshes.place(
    tree, meshes.shardings(tree, rules, mesh)
  )
  options = keywords.parse(FLAGS.task_options)
  pairs = pipeline.solved(task, "train", FLAGS.seed, FLAGS.num_prompts, options)
  prompts, gold = [prompt for prompt, _ in pairs], dict(pairs)
  pipeline.check_solution(score, *pairs[0])
  step_ends = getattr(task, "STEP_ENDS", "\n")

  # The model that learns: its tokens are the policy's, as its probabilities
  # become rewards of the policy's tokens.
  if FLAGS.base:
    base = hf.load(FLAGS.base, dtype=FLAGS.dtype, remat=FLAGS.remat)
    runs.check_same_tokens(f"--base={FLAGS.base}", base, loaded)
    model, params = base.model, base.params
  else:
    model = random_model(loaded.model.config.vocab_size)
    params = jax.jit(model.init)(
      jax.random.key(FLAGS.seed),
      jnp.zeros((1, 1), jnp.int32),
      jnp.ones((1, 1), bool),
    )["params"]
  rules = hf.partition_rules(model, mesh)
  meshes.shardings(params, rules, mesh)  # Else nothing is drawn.
  template = prompts_lib.TEMPLATES[FLAGS.template]
  pipeline.check_template(template, FLAGS.template, tokenizer, pairs[0])

  # Stage 1: samples of the policy.
  folder = FLAGS.stages or FLAGS.workdir
  rendered = logged.render_prompts(
    prompts, FLAGS.task, tokenizer, FLAGS.prompt_format
  )
  with checkpoint.Preemption() as preemption:
    try:
      samples = pipeline.sample(
        folder,
        lambda: samplers.Responder(
          loaded.model,
          tokenizer,
          tokens_lib.encode_prompts(
            tokenizer, rendered, max_length=FLAGS.max_prompt_length
          ),
          max_length=FLAGS.max_length,
          settings=sampling.Settings(
            temperature=FLAGS.temperature, top_p=FLAGS.top_p
          ),
          num_samples=FLAGS.num_samples,
          batch_size=FLAGS.sample_batch_size,
          mesh=mesh,
          seed=FLAGS.seed,
          stop_strings=runs.unescaped(FLAGS.stop_strings),
        ),
        place(loaded.params, hf.partition_rules(loaded.model, mesh)),
        prompts,
        score,
        seed=FLAGS.seed,
        should_stop=preemption.should_stop,
        policy=checkpoint.fingerprint(loaded.params),
        asked=pipeline.digest(rendered),
        **pipeline.values(
          FLAGS,
          *("num_samples", "max_length", "temperature", "top_p"),
          *("stop_strings", "dtype"),
        ),
      )
      found = files.read_jsonl(samples.path("samples.jsonl"))

      # Stage 2: the teacher rewrites what is wrong.
      asked = prompts[:num_questions]
      teaching = pipeline.stage(
        folder,
        "teacher",
        {
          "samples": samples.digest("samples.jsonl"),
          "gold": pipeline.digest([gold[prompt] for prompt in asked]),
          "step_ends": step_ends,
          "scored by": score.description,
          **teacher_inputs,
        },
      )
      if teaching.facts is None:
        rows, counts = prompts_lib.distinct(
          [row for row in found if row["index"] < num_questions]
        )
        rows = pipeline.records(rows, gold)
        rows = teacher(
          teaching.folder, rows, score, mesh, preemption.should_stop
        )
        if processes.is_first():
          files.write_jsonl(teaching.path("rewrites.jsonl"), rows)
        teaching.finish(**counts, **pipeline.metrics(rows))
    except pipeline.Stopped:
      print("Stopped by a signal; all is saved.")
      return preemption.exit_status
  rewrites = files.read_jsonl(teaching.path("rewrites.jsonl"))

  # Stage 3: what is learnt, of all questions but those held out.
  held_out = set(asked[-FLAGS.num_held_out :])
  recording = pipeline.stage(
    folder,
    "records",
    {
      "rewrites": teaching.digest("rewrites.jsonl"),
      "held_out": pipeline.digest(sorted(held_out)),
      "step_ends": step_ends,
      **pipeline.values(FLAGS, "seed", "template", "locate"),
    },
  )
  if recording.facts is None:
    facts = {}
    for name in ("records", "held_out"):
      records, counts = prompts_lib.reward_model_records(
        [
          row
          for row in rewrites
          if (row["prompt"] in held_out) == (name == "held_out")
        ],
        template,
        seed=FLAGS.seed,
        locate=FLAGS.locate,
        step_ends=step_ends,
      )
      if processes.is_first():
        files.write_jsonl(recording.path(f"{name}.jsonl"), records)
      facts[name] = counts
    recording.finish(**facts)
  train, held_out_rows, skipped = [], [], []
  for name, rows in (("records", train), ("held_out", held_out_rows)):
    path = recording.path(f"{name}.jsonl")
    for row in files.read_jsonl(path) if os.path.getsize(path) else []:
      (prompt_ids,) = tokens_lib.encode_prompts(
        tokenizer, [row["prompt"]], max_length=2**31
      )
      ids, _ = tokens_lib.encode_response(
        tokenizer, row["prompt"], prompt_ids, row["response"]
      )
      limit = min(
        FLAGS.max_question_length,
        batches.longest_in_bucket(
          model.config.max_positions - batches.bucket_length(len(ids))
        ),
      )
      if len(prompt_ids) > limit:
        skipped.append(
          f"{name}: a question has {len(prompt_ids)} tokens, the limit is "
          f"{limit} (--max_question_length, and the context of the model)."
        )
        continue
      rows.append((prompt_ids, ids))
  if len(train) < FLAGS.batch_size or not held_out_rows:
    raise ValueError(
      f"There are {len(train)} records to learn from and "
      f"{len(held_out_rows)} held-out ones, of {len(rewrites)} rewrites in "
      f"{teaching.folder}; {len(skipped)} were left out for their length. "
      f"--batch_size={FLAGS.batch_size} needs more questions or samples, a "
      "longer context, or a teacher that succeeds more often."
    )
  lengths = [
    batches.bucket_length(max(len(row[part]) for row in train + held_out_rows))
    for part in (0, 1)
  ]
  tokens_lib.check_positions(sum(lengths), model.config.max_positions)

  # The training: plain next-token loss, on responses alone.
  steps = FLAGS.steps or math.ceil(len(train) * FLAGS.epochs / FLAGS.batch_size)
  chunk_size = FLAGS.chunk_size or log_probs.chunk_size(
    FLAGS.batch_size, model.config.vocab_size
  )

  def batch_of(rows):
    batch = batches.supervised_batch(
      rows, prompt_length=lengths[0], response_length=lengths[1]
    )
    return meshes.shard_batch(batch, mesh)

  def loss_fn(params, batch):
    statistics, _ = rollouts.token_statistics(
      model, params, batch, temperature=1.0, chunk_size=chunk_size
    )
    return supervised.nll_loss(statistics.log_probs, batch["response_mask"])

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
    grads, metrics = jax.grad(loss_fn, has_aux=True)(params, batch)
    updates, optimizer_state = optimizer.update(
      grads, state["optimizer"], params
    )
    params = optax.apply_updates(params, updates)
    metrics["gradient_norm"] = optax.global_norm(grads)
    return {
      "params": {"policy": params},
      "optimizer": optimizer_state,
    }, metrics

  started_from = params
  params = place({"policy": params}, rules)
  state = {"params": params, "optimizer": optimizer.init(params["policy"])}
  state_shardings = meshes.shardings(state, rules, mesh)
  state = meshes.place(state, state_shardings)
  update = compiled.Compiled(
    "update", update, donate_argnums=0, out_shardings=(state_shardings, None)
  )
  held_out_loss = compiled.Compiled(
    "held-out loss", lambda params, batch: loss_fn(params, batch)[1]
  )

  # A run that was stopped goes on where its last checkpoint is.
  runs.check_models(
    FLAGS.workdir,
    {"policy": loaded.params, "base": started_from},
    {"The records": recording.digest("records.jsonl", "held_out.jsonl")},
  )
  checkpoint.write_flags(FLAGS.workdir, in_force, may_change)
  checkpoints = checkpoint.Checkpoints(FLAGS.workdir)
  first_step = 0
  if restored := checkpoints.restore_latest(state):
    first_step, state, _ = restored
  hf.save_config(os.path.join(FLAGS.workdir, "model"), model, tokenizer)
  pipeline.save_settings(
    FLAGS.workdir, template=FLAGS.template, locate=FLAGS.locate
  )
  log = logs.Logs(
    FLAGS.workdir,
    total_steps=steps,
    first_step=first_step,
    columns=COLUMNS,
    wandb_project=FLAGS.wandb_project,
  )
  for message in checkpoints.messages:
    log.note(message)
  log.skipped(skipped)
  log.note(
    f"Of {len(found)} samples: {pipeline.shown(teaching.facts)}. Records: "
    f"{pipeline.shown(recording.facts['records'])}."
  )
  log.curves(functools.partial(curves.curves, panels=PANELS))

  def evaluate():
    """Mean loss over the held-out records; batches weigh by their tokens."""
    losses, tokens = [], []
    for start in range(0, len(held_out_rows), FLAGS.batch_size):
      rows = held_out_rows[start : start + FLAGS.batch_size]
      filling = [([0], [])] * (FLAGS.batch_size - len(rows))
      metrics = held_out_loss(
        state["params"]["policy"], batch_of([*rows, *filling])
      )
      losses.append(float(metrics["nll/loss"]))
      tokens.append(float(metrics["nll/tokens"]))
    return {"eval/loss": np.average(losses, weights=tokens)}

  with log, checkpoints, checkpoint.Preemption() as preemption:
    for step in range(first_step, steps):
      started = time.perf_counter()
      indices = batches.batch_indices(
        len(train), FLAGS.batch_size, step, seed=FLAGS.seed
      )
      state, metrics = update(state, batch_of([train[i] for i in indices]))
      metrics = jax.device_get(metrics)
      seconds = time.perf_counter() - started
      metrics["tokens_per_second"] = metrics["nll/tokens"] / seconds
      is_last = step + 1 == steps
      if (step + 1) % FLAGS.eval_every == 0 or is_last:
        metrics |= evaluate()
      log.write(step, metrics)
      stop = preemption.should_stop()
      if (step + 1) % FLAGS.save_every == 0 or is_last or stop:
        checkpoints.save(step + 1, state, {"step": step + 1})
      if stop and not is_last:
        log.note(f"Stopped by a signal after step {step + 1}; saved.")
        return preemption.exit_status
      if step > first_step:
        update.freeze()

    # What it is for: rewrites of wrong solutions that it has never seen.
    rows = [row for row in rewrites if row["prompt"] in held_out]
    test = pipeline.stage(
      FLAGS.workdir,
      "test",
      {"rewrites": teaching.digest("rewrites.jsonl"), "steps": steps},
    )
    try:
      answers = pipeline.by_model(
        test.folder,
        rows,
        model,
        tokenizer,
        state["params"]["policy"],
        template,
        score,
        mesh=mesh,
        batch_size=FLAGS.batch_size,
        max_length=lengths[1],
        max_prompt_length=FLAGS.max_question_length,
        locate=FLAGS.locate,
        step_ends=step_ends,
        should_stop=preemption.should_stop,
      )
    except pipeline.Stopped:
      log.note("Stopped by a signal while it is tested; all is saved.")
      return preemption.exit_status
    if processes.is_first():
      files.write_jsonl(test.path("rewrites.jsonl"), answers)
    found = test_metrics(answers, rows)
    test.finish(**found)
    log.summary(
      {
        "held-out loss (nats a token)": evaluate()["eval/loss"],
        **found,
        "reward model": FLAGS.workdir,
      }
    )


def test_metrics(answers, rows):
  """How well wrong solutions are rewritten, beside the teacher."""
  pairs = [
    (answer, row)
    for answer, row in zip(answers, rows, strict=True)
    if not row["is_right"]
  ]
  if not pairs:
    return {"wrong solutions": 0}
  share = lambda same: float(np.mean([same(a, row) for a, row in pairs]))
  return {
    "wrong solutions": len(pairs),
    "right rewrites": share(lambda a, row: a["is_verified"]),
    "right rewrites of the teacher": share(lambda a, row: row["is_verified"]),
    "the teacher's rewrite": share(
      lambda a, row: a["rewrite"] == row["rewrite"]
    ),
    "the teacher's first wrong step": share(
      lambda a, row: a["error_step"] == row["error_step"]
    ),
  }


def find_teacher(task):
  """A function of folder, records, score, mesh and signal that rewrites.

  Returns:
    It, and what its rewrites depend on.
  """
  ends, locate = getattr(task, "STEP_ENDS", "\n"), None
  inputs = {"teacher": FLAGS.teacher}
  if FLAGS.teacher == "model":
    loaded = hf.load(FLAGS.teacher_model, dtype=FLAGS.dtype)
    inputs |= {"model": checkpoint.fingerprint(loaded.params)}
    inputs |= pipeline.values(
      FLAGS,
      *("teacher_format", "teacher_length", "max_question_length", "dtype"),
    )
    return functools.partial(by_teacher_model, loaded, ends), inputs
  if FLAGS.teacher == "task":
    if not hasattr(task, "rewrite"):
      raise ValueError(
        f"--task={FLAGS.task} cannot repair solutions: give --teacher=gold, "
        "model, or module:function."
      )
    function = lambda question, _, wrong: task.rewrite(question, wrong)
    locate = getattr(task, "first_wrong_step", None)
  elif FLAGS.teacher == "gold":
    function = teachers.splice_with(step_ends=ends)
  else:
    module, _, name = FLAGS.teacher.partition(":")
    sys.path.append(os.getcwd())  # Where a user's own file may lie.
    try:
      module = importlib.import_module(module)
      function = getattr(module, name)
      with open(module.__file__) as file:
        inputs["source"] = pipeline.digest(file.read())
    except (ImportError, AttributeError, ValueError) as error:
      raise ValueError(
        f"--teacher={FLAGS.teacher} is none of task, gold and model, and no "
        f"module:function that can be imported: {error}."
      ) from error

  def rewrite(folder, rows, score, mesh, should_stop):
    return pipeline.by_function(
      rows, function, score, locate=locate, step_ends=ends
    )

  return rewrite, inputs


def by_teacher_model(loaded, step_ends, folder, rows, score, mesh, should_stop):
  """Rewrites by --teacher_model, which is asked in two calls."""
  shardings = meshes.shardings(
    loaded.params, hf.partition_rules(loaded.model, mesh), mesh
  )
  return pipeline.by_model(
    folder,
    rows,
    loaded.model,
    loaded.tokenizer,
    meshes.place(loaded.params, shardings),
    prompts_lib.TEMPLATES["instruction"],
    score,
    mesh=mesh,
    batch_size=FLAGS.teacher_batch_size,
    max_length=FLAGS.teacher_length,
    max_prompt_length=FLAGS.max_question_length,
    step_ends=step_ends,
    render=lambda texts: logged.render_prompts(
      texts, FLAGS.teacher_model, loaded.tokenizer, FLAGS.teacher_format
    ),
    should_stop=should_stop,
  )


def random_model(vocab_size):
  """A small model with random weights."""
  sizes = dict(
    vocab_size=vocab_size,
    hidden_size=FLAGS.hidden_size,
    num_layers=FLAGS.num_layers,
    num_heads=FLAGS.num_heads,
    max_positions=FLAGS.max_positions,
    dtype=FLAGS.dtype,
    remat=FLAGS.remat,
  )
  if FLAGS.family == "gpt2":
    return gpt2.GPT2(gpt2.GPT2Config(**sizes))
  return llama.Llama(llama.LlamaConfig(**sizes))


if __name__ == "__main__":
  app.run(main)
