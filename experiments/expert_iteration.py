"""Expert iteration: sample, keep what is right, fit to it, sample again.

A minute on two CPU cores, on merge sums, after launch/reasoning_study.sh or
`experiments/sft.py` has made the two models:
  python experiments/expert_iteration.py --workdir=runs/ei \
    --flagfile=experiments/flags/havrilla/merge_sums_ei.flags \
    --policy=runs/sft --base=runs/base

A round draws --num_samples responses to every training prompt, keeps the right
ones, each distinct trace once, beside those of all rounds before, and fits the
*base* weights to the union anew. What it leaves in <workdir>/rounds/<i>/:

  samples.jsonl   every sample with its verdict
  data.jsonl      what is fitted: D_i = R_i ∪ D_{i-1}
  checkpoints/    the policy after the round; any flag --policy takes the folder
  round.json      the round in numbers

The best round by greedy accuracy on validation prompts is in <workdir>/best.
A run that was stopped goes on inside the round: at most one batch of samples
is drawn again. Kept texts are encoded anew: a trace that was sampled in an odd
tokenisation is taught in the usual one.

Source: Havrilla et al. (2024), arXiv 2403.04642, section 3: union over rounds,
exact duplicates removed, every fit from the pretrained weights. Whether their
data hold the supervised pairs is not known; ours do if --num_examples says so.
"""

import functools
import json
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
from rljax.generation import rollouts, samplers
from rljax.losses import supervised
from rljax.models import hf
from rljax.ops import log_probs, sampling
from rljax.scoring import scorers
from rljax.storage import checkpoint
from rljax.text import batches, files, keywords, logged, tokens
from rljax.text import steps as steps_lib
from rljax.training import logs, runs

# Run.
flags.DEFINE_string("workdir", None, "Rounds, best, logs.", required=True)
flags.DEFINE_integer("seed", 0, "Seed of every source of randomness.")
flags.DEFINE_integer("rounds", 3, "Of sampling and fitting.")
flags.DEFINE_integer("patience", 0, "Rounds without a new best; 0: run all.")
flags.DEFINE_integer("save_every", 500, "Updates between checkpoints.")
flags.DEFINE_string("mesh", "data:-1", "Axes data, fsdp, tensor; -1: the rest.")
flags.DEFINE_string("compilation_cache", "~/.cache/rljax", "Empty for none.")
flags.DEFINE_string("wandb_project", "", "Also log to this project.")
# Task.
flags.DEFINE_string("task", "merge_sums", "A module of rljax.tasks.")
flags.DEFINE_list("task_options", [], "name=value, handed to task.prompts.")
flags.DEFINE_list("score_options", [], "name=value, handed to task.score.")
flags.DEFINE_list("example_options", [], "name=value, of --num_examples.")
flags.DEFINE_integer("num_prompts", 300, "Training prompts, all in each round.")
flags.DEFINE_integer("num_eval_prompts", 100, "Of the validation split.")
flags.DEFINE_integer("max_prompt_length", 512, "Tokens; longer is an error.")
flags.DEFINE_enum("prompt_format", "plain", ["plain", "chat"], "Of prompts.")
# Models.
flags.DEFINE_string("policy", None, "Samples in round 1.", required=True)
flags.DEFINE_string("base", "", "Weights that fits start from; empty: policy.")
flags.DEFINE_bool("restart", True, "False: a fit goes on from its sampler.")
flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of compute.")
flags.DEFINE_bool("remat", False, "Recompute layers in the backward pass.")
flags.DEFINE_integer("chunk_size", 0, "Positions with logits; 0: what fits.")
# Sampling.
flags.DEFINE_integer("num_samples", 16, "K, responses to each prompt.")
flags.DEFINE_integer("sample_batch_size", 16, "Prompts at the same time.")
flags.DEFINE_integer("max_length", 40, "Response tokens.")
flags.DEFINE_float("temperature", 1.0, "Of training samples.")
flags.DEFINE_float("top_p", 1.0, "1: off.")
flags.DEFINE_list("stop_strings", [], r"Texts that end a response; \n too.")
flags.DEFINE_integer("shots", 0, "Examples before a prompt, in round 1 alone.")
# What is kept.
flags.DEFINE_enum(
  "filter", "truth", ["truth", "valid", "reward_model", "both"], "Of samples."
)
flags.DEFINE_string("reward_model", "", "For the filter; an outcome model.")
flags.DEFINE_float("reward_threshold", 0.5, "Lowest score that is kept.")
flags.DEFINE_string("reward_transform", "sigmoid", "Of its logits.")
flags.DEFINE_string("reward_template", "{prompt}{response}", "What it reads.")
flags.DEFINE_integer("reward_length", 512, "Tokens that it reads.")
flags.DEFINE_enum("key", "text", sorted(steps_lib.KEYS), "What is a duplicate.")
flags.DEFINE_integer("max_per_prompt", 0, "Traces of a prompt; 0: no limit.")
flags.DEFINE_integer("num_examples", 0, "Supervised pairs in the data.")
# Fits.
flags.DEFINE_integer("epochs", 8, "Passes over the data of a round.")
flags.DEFINE_integer("batch_size", 64, "Rows per update.")
flags.DEFINE_float("learning_rate", 1e-3, "Highest, of AdamW.")
flags.DEFINE_float("final_learning_rate", 0.0, "Of the last update.")
flags.DEFINE_float("warmup", 0.0, "Share of the updates of a fit.")
flags.DEFINE_float("weight_decay", 0.0, "Of AdamW.")
flags.DEFINE_float("max_grad_norm", 1.0, "0: no clipping.")
FLAGS = flags.FLAGS

COLUMNS = ("samples/is_correct", "data/new", "data/size", "eval/is_correct")
PANELS = {
  "Correct": ["eval/is_correct", "samples/is_correct"],
  "Prompts with a right sample": ["samples/solved"],
  "Distinct right traces of a prompt": ["samples/distinct_traces"],
  "Traces in the data": ["data/size", "data/new"],
  "Loss of the fit (nats a token)": ["fit/loss"],
}


def main(_):
  processes.join()
  validate()
  may_change = ("workdir", "mesh", "compilation_cache", "wandb_project")
  in_force = runs.start(FLAGS, may_change)
  mesh = meshes.make(FLAGS.mesh)
  for name in ("batch_size", "sample_batch_size"):
    meshes.check_divisible(FLAGS[name].value, mesh, f"--{name}")
  task = tasks.load(FLAGS.task)
  options = keywords.parse(FLAGS.task_options)
  keywords.check(task.prompts, options)
  score = scorers.scorer(FLAGS.task, keywords.parse(FLAGS.score_options))
  judge = None
  if FLAGS.reward_model:
    judge = scorers.scorer(
      "",
      {},
      FLAGS.reward_model,
      transform=FLAGS.reward_transform,
      template=FLAGS.reward_template,
      max_length=FLAGS.reward_length,
      batch_size=FLAGS.batch_size,
      mesh=mesh,
    )

  # The policy samples in round 1; the base is what every fit starts from.
  loaded = hf.load(FLAGS.policy, dtype=FLAGS.dtype, remat=FLAGS.remat)
  model, tokenizer = loaded.model, loaded.tokenizer
  rules = hf.partition_rules(model, mesh)
  place = lambda tree: meshes.place(tree, meshes.shardings(tree, rules, mesh))
  policy = base = place(loaded.params)
  models = {"policy": loaded.params}
  if FLAGS.base:
    other = hf.load(FLAGS.base, dtype=FLAGS.dtype, remat=FLAGS.remat)
    runs.check_same_kind(f"--base={FLAGS.base}", other, loaded)
    base = place(other.params)
    models["base"] = other.params

  # Prompts, and the responders that answer them.
  prompts, eval_prompts = (
    task.prompts(split, FLAGS.seed, num=num, **options)
    for split, num in (
      ("train", FLAGS.num_prompts),
      ("validation", FLAGS.num_eval_prompts),
    )
  )
  # Bad options and tasks show here, not after hours of sampling.
  _, parts = score(eval_prompts[:1], [""])
  needed = {
    "valid": ["is_valid"],
    "reward_model": ["answer"],
    "both": ["answer"],
  }
  tasks.check_parts(
    FLAGS.task, parts, "is_correct", *needed.get(FLAGS.filter, [])
  )

  def supervised_pairs(split, num):
    """(prompt, response) pairs of the task."""
    if not num:
      return []
    if not hasattr(task, "supervised"):
      raise ValueError(f"--task={FLAGS.task} has no solutions to learn from.")
    more = options | keywords.parse(FLAGS.example_options)
    keywords.check(task.supervised, more)
    return task.supervised(split, FLAGS.seed, num=num, **more)

  examples = supervised_pairs("train", FLAGS.num_examples)
  # Shots are of another split: no prompt is asked beside its own solution.
  shots = supervised_pairs("validation", FLAGS.shots)

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
  ask = functools.partial(
    responder,
    settings=sampling.Settings(
      temperature=FLAGS.temperature, top_p=FLAGS.top_p
    ),
    num_samples=FLAGS.num_samples,
  )
  prompt_ids = encode(prompts)
  sample = first_sample = ask(prompt_ids)
  if FLAGS.shots:
    shown = "".join(f"{p}{r}\n\n" for p, r in shots)
    first_sample = ask(encode([shown + prompt for prompt in prompts]))
  answer = responder(
    encode(eval_prompts), settings=sampling.Settings(greedy=True)
  )

  # A fit: supervised learning on the data of a round.
  def encode_pairs(pairs):
    """(prompt ids, response ids) of pairs of texts."""
    texts = render([prompt for prompt, _ in pairs])
    prompt_ids = tokens.encode_prompts(
      tokenizer, texts, max_length=FLAGS.max_prompt_length
    )
    return [
      (ids, tokens.encode_response(tokenizer, text, ids, response)[0])
      for text, ids, (_, response) in zip(texts, prompt_ids, pairs, strict=True)
    ]

  encoded_examples = encode_pairs(examples)
  lengths = (
    batches.bucket_length(
      max(map(len, [*prompt_ids, *(ids for ids, _ in encoded_examples)]))
    ),
    batches.bucket_length(
      max([FLAGS.max_length, *(len(ids) for _, ids in encoded_examples)])
    ),
  )
  tokens.check_positions(sum(lengths), model.config.max_positions)
  chunk_size = FLAGS.chunk_size or log_probs.chunk_size(
    FLAGS.batch_size, model.config.vocab_size
  )
  optimizer = optax.chain(
    optax.clip_by_global_norm(FLAGS.max_grad_norm or math.inf),
    optax.scale_by_adam(),
    optax.add_decayed_weights(FLAGS.weight_decay),
  )

  def loss_fn(params, batch):
    statistics, _ = rollouts.token_statistics(
      model, params, batch, temperature=1.0, chunk_size=chunk_size
    )
    return supervised.nll_loss(statistics.log_probs, batch["response_mask"])

  def update(state, batch, learning_rate):
    grads, metrics = jax.grad(loss_fn, has_aux=True)(state["params"], batch)
    updates, optimizer_state = optimizer.update(
      grads, state["optimizer"], state["params"]
    )
    params = jax.tree.map(
      lambda p, u: p - (learning_rate * u).astype(p.dtype),
      state["params"],
      updates,
    )
    return {"params": params, "optimizer": optimizer_state}, metrics

  def fresh(params):
    """State of a fit that starts from a copy of these weights."""
    params = jax.tree.map(jnp.copy, params)
    return place({"params": params, "optimizer": optimizer.init(params)})

  state_shardings = meshes.shardings(fresh(base), rules, mesh)
  update = compiled.Compiled(
    "update", update, donate_argnums=0, out_shardings=(state_shardings, None)
  )

  # All that may be wrong with the flags has been said by now.
  runs.check_models(FLAGS.workdir, models)
  checkpoint.write_flags(FLAGS.workdir, in_force, may_change)
  finished = processes.from_first(read_rounds)
  log = logs.Logs(
    FLAGS.workdir,
    total_steps=FLAGS.rounds + 1,
    first_step=len(finished),
    columns=COLUMNS,
    wandb_project=FLAGS.wandb_project,
  )
  log.curves(functools.partial(curves.curves, panels=PANELS))

  def restore(folder):
    """The policy that a finished round left, bit for bit."""
    return place(checkpoint.restore_params(folder)["policy"])

  def evaluate(params):
    """Greedy answers to the validation prompts; maj@1."""
    _, parts = samplers.judge(answer, params, eval_prompts, score)
    return {
      f"eval/{name}": value for name, value in tasks.mean_parts(parts).items()
    }

  def fit(folder, rows, start, number, stopped):
    """Fits the weights `start` to the rows; None if a signal stopped it."""
    encoded = encode_pairs([(row["prompt"], row["response"]) for row in rows])
    # A trace can be longer in its usual tokens than in those it was drawn as.
    fitting = [pair for pair in encoded if len(pair[1]) <= lengths[1]]
    if len(fitting) < len(encoded):
      log.note(
        f"{len(encoded) - len(fitting)} of {len(encoded)} traces are left out: "
        f"encoded anew they have more than {lengths[1]} tokens."
      )
    if not fitting:
      raise ValueError(
        f"None of the traces fits into {lengths[1]} tokens: give a larger "
        "--max_length."
      )
    encoded = fitting
    # Where there are fewer rows than a batch holds, an update has them all.
    num_updated = min(FLAGS.batch_size, len(encoded))
    steps = math.ceil(len(encoded) * FLAGS.epochs / num_updated)
    schedule = optax.schedules.warmup_cosine_decay_schedule(
      init_value=0.0 if FLAGS.warmup else FLAGS.learning_rate,
      peak_value=FLAGS.learning_rate,
      warmup_steps=int(FLAGS.warmup * steps),
      decay_steps=steps,
      end_value=FLAGS.final_learning_rate,
    )
    state, losses = fresh(start), []
    saved = lambda state: {
      "params": {"policy": state["params"]},
      "optimizer": state["optimizer"],
    }
    with checkpoint.Checkpoints(folder, keep=1) as checkpoints:
      first = 0
      if restored := checkpoints.restore_latest(saved(state)):
        first, found, meta = restored
        losses = meta["losses"]
        state = {
          "params": found["params"]["policy"],
          "optimizer": found["optimizer"],
        }
      for message in checkpoints.messages:
        log.note(message)
      for step in range(first, steps):
        batch = batches.supervised_batch(
          [encoded[i] for i in batch_rows(len(encoded), step, number)]
          + [([0], [])] * max(0, FLAGS.batch_size - len(encoded)),
          prompt_length=lengths[0],
          response_length=lengths[1],
        )
        state, metrics = update(
          state,
          meshes.shard_batch(batch, mesh),
          jnp.float32(schedule(step)),
        )
        losses = [*losses, float(metrics["nll/loss"])][-50:]
        done, stop = step + 1, stopped()
        if done % FLAGS.save_every == 0 or done == steps or stop:
          checkpoints.save(done, saved(state), {"losses": losses})
        if stop and done < steps:
          return None
    hf.save_config(os.path.join(folder, "model"), model, tokenizer)
    return state["params"], {
      "fit/loss": float(np.mean(losses)),
      "fit/steps": steps,
      "fit/start": checkpoint.fingerprint(start),
    }

  with log, checkpoint.Preemption() as preemption:
    if not finished:
      finished.append({"round": 0, "rollouts": 0, **evaluate(policy)})
      log.write(0, numbers(finished[0]))
      write_round(finished[0])
    if len(finished) > 1:
      policy = restore(round_folder(len(finished) - 1))
    for number in range(len(finished), FLAGS.rounds + 1):
      if FLAGS.patience and number - 1 - best_of(finished) >= FLAGS.patience:
        log.note(f"No new best in {FLAGS.patience} rounds: stopped.")
        break
      folder = round_folder(number)
      started = time.perf_counter()

      shown = samplers.Progress(f"round {number}", len(prompts))

      def progress(done, batch, shown=shown):
        shown(done, batch)
        if preemption.should_stop():
          raise Stopped

      try:
        rows = samplers.collect(
          os.path.join(folder, "samples.jsonl"),
          first_sample if number == 1 else sample,
          policy,
          prompts,
          score,
          draw=number,
          progress=progress,
        )
      except Stopped:
        log.note("Stopped by a signal while sampling; all is saved.")
        return preemption.exit_status
      sampled = time.perf_counter()
      before = data_before(number, examples)
      kept, counts = steps_lib.add_distinct(
        before,
        rows,
        keep=keep_rule(rows, judge),
        key=steps_lib.KEYS[FLAGS.key],
        max_per_prompt=FLAGS.max_per_prompt,
      )
      kept = [
        {"prompt": row["prompt"], "response": row["response"]} for row in kept
      ]
      if not kept:
        raise ValueError(
          f"No sample of round {number} was kept, of {len(rows)} that are in "
          f"{folder}: more --num_samples, a better --policy, or "
          "--num_examples would give the fit something to learn."
        )
      write_rows(os.path.join(folder, "data.jsonl"), kept)
      start = base if FLAGS.restart else policy
      fitted = fit(folder, kept, start, number, preemption.should_stop)
      if fitted is None:
        log.note("Stopped by a signal while fitting; all is saved.")
        return preemption.exit_status
      policy, fit_metrics = fitted
      row = {
        "round": number,
        "rollouts": finished[-1]["rollouts"] + len(rows),
        **sample_metrics(rows),
        **{f"data/{name.replace(' ', '_')}": n for name, n in counts.items()},
        "data/size": len(kept),
        **fit_metrics,
        **evaluate(policy),
        "sampling_seconds": sampled - started,
        "fitting_seconds": time.perf_counter() - sampled,
      }
      finished.append(row)
      log.write(number, numbers(row))
      write_round(row)
      for program in (update, answer.program, sample.program):
        if number > 1:
          program.freeze()

    # The best round by validation, as a policy of its own.
    best = best_of(finished)
    best_folder = os.path.join(FLAGS.workdir, "best")
    chosen = place(loaded.params) if best == 0 else restore(round_folder(best))
    with checkpoint.Checkpoints(best_folder, keep=1) as checkpoints:
      checkpoints.save(best, {"params": {"policy": chosen}}, {"round": best})
    hf.save_config(os.path.join(best_folder, "model"), model, tokenizer)
    log.summary(
      {
        f"round {row['round']}": {
          name: row[name] for name in ("rollouts", *COLUMNS) if name in row
        }
        for row in finished
      },
      title=f"{FLAGS.task}: round {best} is the best, and in {best_folder}",
    )


class Stopped(Exception):
  """A signal came between two batches of samples."""


def validate():
  """Says what is wrong with the flags before anything is loaded."""
  runs.check_positive(
    FLAGS,
    *("rounds", "num_samples", "sample_batch_size", "batch_size", "epochs"),
    *("num_prompts", "num_eval_prompts", "max_length", "save_every"),
  )
  if (FLAGS.filter in ("reward_model", "both")) != bool(FLAGS.reward_model):
    raise ValueError(
      f"--filter={FLAGS.filter} and --reward_model={FLAGS.reward_model!r} do "
      "not fit: a reward model is named exactly where the filter uses it."
    )
  if not 0 <= FLAGS.warmup < 1:
    raise ValueError(f"--warmup must lie in [0, 1), got {FLAGS.warmup}.")
  if FLAGS.shots and not FLAGS.stop_strings:
    raise ValueError(
      "--shots separates examples by an empty line, and the policy may go on "
      r"with further ones: give --stop_strings=\n\n."
    )


def keep_rule(rows, judge):
  """Which samples are demonstrations, by the truth or by a reward model."""
  if FLAGS.filter == "truth":
    return steps_lib.is_kept
  if FLAGS.filter == "valid":
    return lambda row: steps_lib.is_kept(row) and row["parts"]["is_valid"]
  scores, _ = judge(
    [row["prompt"] for row in rows], [row["response"] for row in rows]
  )
  for row, value in zip(rows, scores, strict=True):
    row["reward_model"] = float(value)

  def keep(row):
    ended = row["finished"] and row["parts"].get("answer") is not None
    trusted = ended and row["reward_model"] >= FLAGS.reward_threshold
    return trusted and (
      FLAGS.filter == "reward_model" or steps_lib.is_kept(row)
    )

  return keep


def batch_rows(num_rows, step, number):
  """The rows of an update; all of them where they are fewer than a batch."""
  if num_rows <= FLAGS.batch_size:
    return range(num_rows)
  # Every round has an order of its own.
  return batches.batch_indices(
    num_rows, FLAGS.batch_size, step, seed=FLAGS.seed * 1000 + number
  )


def sample_metrics(rows):
  """What the samples of a round are like."""
  right = [row for row in rows if steps_lib.is_kept(row)]
  solved = {row["prompt"] for row in right}
  distinct = {
    (row["prompt"], steps_lib.whitespace_key(row["response"])) for row in right
  }
  means = tasks.mean_parts([row["parts"] for row in rows])
  return {
    **{f"samples/{name}": value for name, value in means.items()},
    "samples/is_correct": len(right) / len(rows),
    "samples/finished": float(np.mean([row["finished"] for row in rows])),
    "samples/solved": len(solved) / FLAGS.num_prompts,
    "samples/distinct_traces": len(distinct) / FLAGS.num_prompts,
  }


def data_before(number, examples):
  """D of the round before; in round 1 the supervised pairs, if there are."""
  if number == 1:
    return [{"prompt": p, "response": r} for p, r in examples]
  return files.read_jsonl(os.path.join(round_folder(number - 1), "data.jsonl"))


def round_folder(number):
  return os.path.join(FLAGS.workdir, "rounds", str(number))


def write_round(row):
  """Files a round as finished, at once or not at all."""
  write_rows(os.path.join(round_folder(row["round"]), "round.json"), [row])


def write_rows(path, rows):
  """Writes a file that all processes find when this returns."""
  processes.from_first(lambda: files.write_jsonl(path, rows))


def read_rounds():
  """The rounds that are finished, round 0 being the first sampler."""
  rows = []
  while True:
    path = os.path.join(round_folder(len(rows)), "round.json")
    if not os.path.exists(path):
      return rows
    with open(path) as file:
      rows.append(json.loads(file.read()))


def best_of(rows):
  """Number of the round that is best on validation; the first of ties."""
  scores = [row["eval/is_correct"] for row in rows]
  return int(np.argmax(scores))


def numbers(row):
  """What of a round can be drawn as a curve."""
  return {k: v for k, v in row.items() if isinstance(v, int | float)}


if __name__ == "__main__":
  app.run(main)
