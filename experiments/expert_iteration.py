"""Expert iteration: sample, keep what is right, fit to it, sample again.

A minute on two CPU cores, on merge sums, after launch/reasoning_study.sh or
experiments/sft.py has made the two models:

  python experiments/expert_iteration.py \
    --flagfile=experiments/flags/havrilla/merge_sums_ei.flags \
    --policy=runs/sft --base=runs/base --workdir=runs/ei

A round draws --num_samples responses to every training prompt, keeps the right
ones, each different one once, beside those of all rounds before, and fits the
*base* weights to the union anew. It leaves in <workdir>/rounds/<i>/:

  samples.jsonl   every sample with its verdict
  data.jsonl      what is fitted: D_i = R_i ∪ D_{i-1}
  checkpoints/    the policy after the round; --policy takes the folder
  round.json      the round in numbers

The best round by greedy accuracy on held-out prompts is in <workdir>/best. To
try another rule of what is kept, change `keep_rule`; another fit, `loss_fn`.

Source: Havrilla et al. (2024), arXiv 2403.04642, section 3: union over rounds,
exact duplicates removed, every fit from the pretrained weights. Whether their
data hold the supervised pairs is not known; ours do if --num_examples says so.
Kept texts are encoded anew: what was sampled in an odd tokenisation is taught
in the usual one.
"""

import contextlib
import functools
import os
import time

import jax.numpy as jnp
import numpy as np
from absl import flags

from rljax import cli, tasks
from rljax.distributed import processes
from rljax.evaluation import answers
from rljax.generation import responders, rollouts, samplers
from rljax.losses import supervised
from rljax.models import hf, lora
from rljax.storage import checkpoint, stages
from rljax.text import batches, files, prompts, steps, tokens
from rljax.training import microbatch, optimizers, runs

# Flags that scripts share; rljax/cli has their help and their bounds.
cli.define_run(save_every=500)
cli.define_task(num_prompts=300, num_eval_prompts=100, eval_split="validation")
cli.define_prompts()
cli.define_models(policy="Language model that samples in round 1.")
cli.define_sampler(max_length=256, num_samples=16, sample_batch_size=16)
cli.define_reward_model("Classifier for --filter=reward_model and both.")
cli.define_batches(64, epochs=8)
cli.define_packing()
cli.define_optimizer(2e-5, schedule="cosine", warmup=0.03, max_grad_norm=1.0)

# Flags of expert iteration.
flags.DEFINE_integer("rounds", 3, "Rounds of sampling and fitting.", 1)
flags.DEFINE_integer(
  "patience", 0, "Rounds without a new best that end a run; 0: never.", 0
)
flags.DEFINE_string(
  "base",
  "",
  "Model whose weights every fit starts from, in the forms of --policy; empty: "
  "the policy.",
)
flags.DEFINE_bool(
  "restart",
  True,
  "Whether a fit starts from --base; if not, from the policy that sampled.",
)
flags.DEFINE_integer(
  "num_examples", 0, "Supervised pairs of the task in the data; 0: none.", 0
)
flags.DEFINE_integer(
  "shots", 0, "Solved examples in front of a prompt, in round 1 alone.", 0
)
flags.DEFINE_list(
  "example_options",
  [],
  "Further options of the task's supervised pairs, for --num_examples and "
  "--shots: name=value, separated by commas.",
)
flags.DEFINE_enum(
  "filter",
  "truth",
  ["truth", "valid", "reward_model", "both"],
  "Which samples are kept: truth, the right ones; valid, those whose steps are "
  "valid too; reward_model, those it trusts; both, right ones that it trusts.",
)
flags.DEFINE_float(
  "reward_threshold", 0.5, "Lowest score at which --reward_model trusts a text."
)
flags.DEFINE_enum(
  "key",
  "text",
  sorted(steps.KEYS),
  "What makes two solutions of a prompt the same: text, but for blanks, or "
  "equations, in their order.",
)
flags.DEFINE_integer(
  "max_per_prompt", 0, "Solutions of a prompt that are kept; 0: no limit.", 0
)
cli.may_grow("rounds", kind="parts")
FLAGS = flags.FLAGS

COLUMNS = ("samples/is_correct", "data/new", "data/size", "eval/is_correct")
# What the task must say of a sample, beside whether it is right.
NEEDED = {"truth": [], "valid": ["is_valid"]}
NEEDED |= {"reward_model": ["answer"], "both": ["answer"]}


def main():
  run = runs.start(FLAGS, total_steps=FLAGS.rounds + 1)
  sizes = cli.batch_sizes(FLAGS, run.mesh)
  check_flags()

  # Models: the policy samples in round 1; fits start from the base.
  loaded = cli.load_policy(FLAGS)
  base = cli.load_like(FLAGS, "base", loaded) if FLAGS.restart else loaded
  policy, tokenizer = loaded.model, loaded.tokenizer
  rules = hf.partition_rules(policy, run.mesh)

  # Text: prompts, supervised pairs, and what scores responses.
  task = cli.load_task(FLAGS)
  train, held_out = prompts.load(task, tokenizer, **cli.prompt_options(FLAGS))
  score = cli.task_scorer(FLAGS, task)
  _, parts = score(held_out.texts[:1], [""])
  tasks.check_parts(
    score.description, parts, "is_correct", *NEEDED[FLAGS.filter]
  )
  trust = cli.load_reward_model(FLAGS, run.mesh, batch_size=FLAGS.batch_size)
  solved = functools.partial(prompts.solved, task, **cli.solved_options(FLAGS))
  examples = solved("train", num=FLAGS.num_examples)

  # What is asked: every training prompt, in round 1 behind the shots, which are
  # of another split: no prompt is asked beside its own solution.
  settings = cli.sampler_settings(FLAGS, unfinished_score=0.0)
  sampler = samplers.Sampler(policy, tokenizer, settings, mesh=run.mesh)
  sizes_of_sampling = {"batch_size": FLAGS.sample_batch_size}
  sample = first_sample = sampler.responder(train, **sizes_of_sampling)
  answer = sampler.greedy(held_out, **sizes_of_sampling)
  if FLAGS.shots:
    shots = solved("validation", num=FLAGS.shots)
    shown = "".join(f"{p}{r}\n\n" for p, r in shots)
    asked = [shown + prompt for prompt in train.texts]
    (asked,) = prompts.encode(tokenizer, asked, **cli.encode_options(FLAGS))
    first_sample = sampler.responder(asked, **sizes_of_sampling)

  def encode(pairs):
    return prompts.encode_pairs(tokenizer, pairs, **cli.encode_options(FLAGS))

  # All fits have batches of one shape.
  shape = batches.supervised_shape(
    encode(examples),
    prompt_length=max(map(len, train.encoded)),
    response_length=FLAGS.max_length,
  )
  tokens.check_positions(sum(shape.values()), policy.config.max_positions)

  # A fit: supervised learning on the data of a round. Fits differ in length and
  # share a program, which is told the learning rate of each update.
  transform = optimizers.make(None, **cli.optimizer_options(FLAGS))

  def loss_fn(params, batch):
    statistics, _ = rollouts.token_statistics(
      policy,
      params["policy"],
      batch,
      temperature=1.0,
      chunk_size=FLAGS.chunk_size,
    )
    return supervised.nll_loss(statistics.log_probs, batch["response_mask"])

  gradients = microbatch.grad(
    *(loss_fn, sizes.num_parts),
    weigh=lambda part: part["response_mask"].sum(),
    sharding=run.rows_sharding,
    buckets=sizes.buckets,
  )

  def update(state, batch, learning_rate):
    grads, metrics = gradients(state["params"], batch)
    params, optimizer_state, metrics = optimizers.step(
      *(transform, grads, state["optimizer"], state["params"], metrics),
      rate=learning_rate,
    )
    return {"params": params, "optimizer": optimizer_state}, metrics

  run.expect({"policy": base.params}, rules, optimizer=transform)
  update = run.compile(update, returns_state=True)

  def fit(number, rows, start):
    """Fits the weights `start` to the data of a round."""
    pairs = encode([(row["prompt"], row["response"]) for row in rows])
    pairs = prompts.within(pairs, shape["response_length"], run.note)
    total = batches.num_updates(len(pairs), FLAGS.batch_size, FLAGS.epochs)
    rates = optimizers.schedule(total, **cli.schedule_options(FLAGS))
    about = {"fit/start": checkpoint.fingerprint(start)}
    with run.part(
      f"rounds/{number}", base.model, tokenizer, total_steps=total
    ) as part:
      state = part.restore({"policy": start}, rules, optimizer=transform)
      losses = part.meta.get("losses", [])
      # Every round has an order, and a number of packed rows, of its own.
      draw = lambda step: batches.indices_or_all(
        len(pairs), FLAGS.batch_size, step, seed=FLAGS.seed * 1000 + number
      )
      pack = cli.pack_pairs(FLAGS, part, sizes, pairs, draw)
      update.thaw(pack.num_rows, pack.num_reads)
      for step in part.steps(freeze=[update]):
        batch = batches.supervised_batch(
          [pairs[i] for i in draw(step)], num_rows=FLAGS.batch_size, **shape
        )
        part.check_learner(gradients, state["params"], batch, pack=pack.alone)
        rate = jnp.float32(rates(step))
        state, metrics = update(state, run.shard(pack(batch)), rate)
        if part.watch(step, metrics):  # Else it was skipped.
          losses = [*losses, float(metrics["nll/loss"])][-50:]
        part.save(step + 1, state, losses=losses)
    about |= {"fit/steps": total, "fit/loss": np.mean(losses)}
    return state["params"]["policy"], about

  def evaluate(params):
    """Greedy answers to the held-out prompts; maj@1."""
    return answers.means(answers.evaluate(answer, params, score))

  def restore(number):
    """The policy that a round left, bit for bit."""
    if not number:
      return run.place(loaded.params, rules)
    params = checkpoint.restore_params(rounds.path(number))["policy"]
    return run.place(lora.with_learnt(base.params, params), rules)

  def one_round(number, sampled_by):
    """Samples, keeps and fits; the new policy, and the round in numbers."""
    started = time.perf_counter()
    samples = responders.collect(
      rounds.path(number, "samples.jsonl"),
      first_sample if number == 1 else sample,
      sampled_by,
      train.texts,
      score,
      draw=number,
      progress=run.progress(f"round {number}", len(train)),
    )
    sampled = time.perf_counter()
    data = [{"prompt": p, "response": r} for p, r in examples]
    if number > 1:
      data = train.read(rounds.path(number - 1, "data.jsonl"))
    data, counts = steps.add_distinct(
      data,
      samples,
      keep=keep_rule(samples, trust),
      key=steps.KEYS[FLAGS.key],
      max_per_prompt=FLAGS.max_per_prompt,
    )
    if not data:
      raise ValueError(
        f"No sample of round {number} was kept, of {len(samples)} that are in "
        f"{rounds.path(number)}: more --num_samples, a better --policy, or "
        "--num_examples would give the fit something to learn."
      )
    data = [{key: row[key] for key in ("prompt", "response")} for row in data]
    path = rounds.path(number, "data.jsonl")
    processes.from_first(lambda: files.write_jsonl(path, data))
    start = base.params if FLAGS.restart else lora.copied(sampled_by)
    fitted, metrics = fit(number, data, start)
    return fitted, {
      "rollouts": rounds.finished[-1]["rollouts"] + len(samples),
      **answers.of_several(samples, num_prompts=len(train)),
      **{f"data/{name.replace(' ', '_')}": n for name, n in counts.items()},
      "data/size": len(data),
      **metrics,
      **evaluate(fitted),
      "sampling_seconds": sampled - started,
      "fitting_seconds": time.perf_counter() - sampled,
    }

  def finish(number, row):
    """Logs a round, and files it as finished."""
    row = {"round": number, **row}
    run.log(number, {k: v for k, v in row.items() if not isinstance(v, str)})
    rounds.finish(**row)

  run.file({"policy": loaded.params, "base": base.params})
  rounds = stages.Rounds(run.workdir, once=processes.from_first)
  run.first_step = len(rounds.finished)
  with contextlib.ExitStack() as stack, run.signals():
    run.open_log(stack, COLUMNS)
    params = restore(max(0, run.first_step - 1))
    if not rounds.finished:
      finish(0, {"rollouts": 0, **evaluate(params)})
    for number in range(len(rounds.finished), FLAGS.rounds + 1):
      best = rounds.best("eval/is_correct")
      if FLAGS.patience and number - 1 - best >= FLAGS.patience:
        run.note(f"No new best in {FLAGS.patience} rounds: stopped.")
        break
      params, row = one_round(number, params)
      finish(number, row)
      if number > 1:
        for program in (update, answer, sample):
          program.freeze()

    best = rounds.best("eval/is_correct")
    of = base.model if best else policy
    with run.part("best", of, tokenizer, total_steps=best) as part:
      part.save(best, {"params": {"policy": restore(best)}}, round=best)
    shown = ("rollouts", *COLUMNS)
    run.finish(
      {
        f"round {row['round']}": {n: row[n] for n in shown if n in row}
        for row in rounds.finished
      },
      title=f"{FLAGS.data or FLAGS.task}: round {best} is the best, and in "
      + os.path.join(run.workdir, "best"),
    )
  return run.exit_status


def keep_rule(samples, trust):
  """Which samples are demonstrations, by the truth or by a reward model."""
  if trust is not None:
    columns = ([row[key] for row in samples] for key in ("prompt", "response"))
    scores, _ = trust(*columns)
    for row, value in zip(samples, scores, strict=True):
      row["reward_model"] = float(value)
  is_trusted = functools.partial(
    steps.is_trusted, threshold=FLAGS.reward_threshold
  )
  return {
    "truth": steps.is_kept,
    "valid": steps.is_valid,
    "reward_model": is_trusted,
    "both": lambda row: is_trusted(row) and steps.is_kept(row),
  }[FLAGS.filter]


def check_flags():
  """Raises ValueError for flags of expert iteration that do not fit."""
  if (FLAGS.filter in ("reward_model", "both")) != bool(FLAGS.reward_model):
    raise ValueError(
      f"--filter={FLAGS.filter} and --reward_model={FLAGS.reward_model!r} do "
      "not fit: a reward model is named exactly where the filter uses it."
    )
  if FLAGS.shots and not FLAGS.stop_strings:
    raise ValueError(
      "--shots separates examples by an empty line, and the policy may go on "
      r"with further ones: give --stop_strings=\n\n."
    )


if __name__ == "__main__":
  cli.run(main)
