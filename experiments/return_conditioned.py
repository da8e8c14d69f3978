"""Return-conditioned RL: solutions whose steps say beforehand if they are good.

A minute on two CPU cores, with the best policy of expert iteration:

  python experiments/return_conditioned.py \
    --flagfile=experiments/flags/havrilla/merge_sums_rcrl.flags \
    --policy=runs/ei/best --base=runs/base --workdir=runs/rcrl

Five stages, each of which writes a file that can be opened, and goes on where
it was stopped:

  solutions.jsonl   --num_solutions of --policy to each training prompt
  completions/      --num_completions from the end of every inner step
  labels.jsonl      each distinct solution with the values of its steps
  data.jsonl        the solutions that are learnt from, with their tags
  checkpoints/      the base weights, fitted to tag, step, tag, step, ...

The value of a step is the share of completions of the prefix that *includes*
it which come out right; that of the last is its own verdict. A step is good if
its value reaches --threshold (--label=value), or does not fall below that of
the prefix before (--label=advantage). Tags are inputs: the loss leaves them
out. At inference the sampler puts the tag of good steps at the start and behind
every line feed (forced.json says how; evaluate.py follows it).

Source: Havrilla et al. (2024), arXiv 2403.04642, section 3. Their labels are
--label=value at 0.5; --label=advantage and the mix of right and wrong
solutions are ours to choose (--right_share).
"""

import functools
import os
import time

import jax
from absl import flags

from rljax import cli, tasks
from rljax.distributed import processes
from rljax.evaluation import answers
from rljax.generation import completions, forced, responders, rollouts, samplers
from rljax.losses import supervised
from rljax.models import hf
from rljax.text import (
  batches,
  end_tokens,
  files,
  prompts,
  steps,
  tokens,
  vocabularies,
)
from rljax.training import microbatch, optimizers, runs

# Flags that scripts share; rljax/cli has their help and their bounds.
cli.define_run(save_every=500, eval_every=100)
cli.define_task(num_prompts=300, num_eval_prompts=100, eval_split="validation")
cli.define_prompts()
cli.define_models(policy="Language model that writes and completes solutions.")
cli.define_sampler(max_length=256, sample_batch_size=64)
cli.define_batches(64, epochs=8)
cli.define_packing()
cli.define_optimizer(2e-5, schedule="cosine", warmup=0.03, max_grad_norm=1.0)

# Flags of return-conditioned RL: solutions and the values of their steps.
flags.DEFINE_string(
  "base",
  "",
  "Model whose weights the fit starts from, in the forms of --policy; empty: "
  "the policy.",
)
flags.DEFINE_list(
  "solutions",
  [],
  "Files of samples, such as the samples.jsonl of expert iteration, separated "
  "by commas, whose solutions are labelled; empty: --policy writes them.",
)
flags.DEFINE_string(
  "labels",
  "",
  "File labels.jsonl of another run, instead of all sampling; or empty.",
)
flags.DEFINE_integer(
  "num_solutions", 16, "Solutions that --policy writes to each prompt.", 1
)
flags.DEFINE_integer(
  "max_per_prompt",
  4,
  "Most right solutions of a prompt that are labelled, and most wrong ones; 0: "
  "no limit.",
  0,
)
flags.DEFINE_integer(
  "num_completions", 4, "Completions of each prefix, K of its value.", 1
)
# Labels and tags.
flags.DEFINE_enum(
  "label",
  "value",
  ["value", "advantage"],
  "What makes a step good: a value of --threshold or more, or an advantage of "
  "0 or more.",
)
flags.DEFINE_float(
  "threshold", 0.5, "Lowest value of a good step, for --label=value.", 0, 1
)
flags.DEFINE_string("good_tag", "G", "Tag of good steps: one token.")
flags.DEFINE_string("bad_tag", "B", "Tag of the other steps: one token.")
flags.register_multi_flags_validator(
  ["good_tag", "bad_tag"],
  lambda values: values["good_tag"] != values["bad_tag"],
  "--good_tag and --bad_tag must differ.",
)
flags.DEFINE_bool(
  "blank_slot",
  False,
  "Whether a tag takes the place of the blank at the head of its step.",
)
flags.DEFINE_float(
  "right_share", 0.5, "Share of right solutions in the data.", 0, 1
)
flags.DEFINE_integer(
  "num_rows", 0, "Solutions in the data; 0: as many as --right_share allows.", 0
)
cli.may_grow("epochs")
FLAGS = flags.FLAGS

COLUMNS = ("nll/loss", "eval/good", "eval/bad", "eval/free")


def main():
  run = runs.start(FLAGS)
  sizes = cli.batch_sizes(FLAGS, run.mesh)

  # Models: the policy is asked; the base learns.
  loaded = cli.load_policy(FLAGS)
  base = cli.load_like(FLAGS, "base", loaded)
  policy, tokenizer = loaded.model, loaded.tokenizer
  config = policy.config
  rules = hf.partition_rules(policy, run.mesh)

  # Text: prompts, what scores responses, and tags.
  task = cli.load_task(FLAGS)
  train, held_out = prompts.load(task, tokenizer, **cli.prompt_options(FLAGS))
  score = cli.task_scorer(FLAGS, task)
  _, parts = score(held_out.texts[:1], [""])
  tasks.check_parts(score.description, parts, "is_correct")
  tags = (FLAGS.good_tag, FLAGS.bad_tag)
  tag_ids = {tag: vocabularies.single_id(tokenizer, tag) for tag in tags}

  # What is asked: training prompts, their prefixes, and held-out prompts with
  # either tag in front of every step, or none.
  settings = cli.sampler_settings(FLAGS, unfinished_score=0.0)
  sampler = samplers.Sampler(policy, tokenizer, settings, mesh=run.mesh)
  at_once = {"batch_size": FLAGS.sample_batch_size}
  texts_of = vocabularies.token_bytes(tokenizer, vocab_size=config.vocab_size)
  good, bad = (steps.forced_tag(texts_of, tag_ids[tag]) for tag in tags)
  answer = {
    "good": sampler.greedy(held_out, forced=good, **at_once),
    "bad": sampler.greedy(held_out, forced=bad, **at_once),
    "free": sampler.greedy(held_out, **at_once),
  }
  longest = max(map(len, train.encoded))
  completions.check_positions(longest, FLAGS.max_length, config.max_positions)

  def solve(params):
    """Solutions to the training prompts, right and wrong."""
    if FLAGS.solutions:
      required = ("prompt", "response", "finished", "parts")
      found = [files.read_jsonl(p, required=required) for p in FLAGS.solutions]
      return train.attach(sum(found, []))
    return responders.collect(
      os.path.join(run.workdir, "solutions.jsonl"),
      sampler.responder(train, num_samples=FLAGS.num_solutions, **at_once),
      params,
      train.texts,
      score,
      progress=run.progress("solutions", len(train)),
    )

  def label(params):
    """Solutions with the values of their steps, and how many were drawn."""
    if FLAGS.labels:
      required = ["prompt", "response", "values", "is_correct"]
      if FLAGS.label == "advantage":
        required.append("start_value")
      rows = files.read_jsonl(FLAGS.labels, required=required)
      return train.attach(rows), 0
    samples = solve(params)
    chosen = steps.solutions(samples, max_per_prompt=FLAGS.max_per_prompt)
    prefixes = dict.fromkeys(
      (row["prompt"], prefix)
      for row in chosen
      for prefix in steps.prefixes(row["response"])
    )
    limits = cli.encode_options(FLAGS)
    limits["max_length"] += FLAGS.max_length
    values, num_drawn = completions.values(
      os.path.join(run.workdir, "completions"),
      sampler,
      params,
      list(prefixes),
      prompts.encode_prefixes(tokenizer, list(prefixes), **limits),
      score,
      num_samples=FLAGS.num_completions,
      progress=run.progress,
      **at_once,
    )
    rows = [
      row | {"num_completions": FLAGS.num_completions}
      for row in steps.with_values(chosen, samples, values)
    ]
    write("labels.jsonl", rows)
    return rows, num_drawn + (0 if FLAGS.solutions else len(samples))

  def with_tags(row):
    """A solution with a tag in front of each of its steps."""
    if FLAGS.label == "value":
      labels = steps.value_labels(row["values"], threshold=FLAGS.threshold)
    else:
      labels = steps.advantage_labels(
        row["values"], start_value=row["start_value"]
      )
    slot = " " if FLAGS.blank_slot else ""
    tagged = steps.tagged(row["response"], labels, tags=tags, slot=slot)
    return {**row, "good": labels, "tagged": tagged}

  def write(name, rows):
    path = os.path.join(run.workdir, name)
    processes.from_first(lambda: files.write_jsonl(path, rows))

  starts_from = {"policy": loaded.params, "base": base.params}
  run.file(starts_from)
  with run.signals():
    labelled, num_drawn = label(run.place(loaded.params, rules))
    run.check_signals()
  if run.is_stopped:
    return run.exit_status

  # The data: right and wrong solutions in the shares that were asked for.
  chosen = steps.mix(
    [row["is_correct"] for row in labelled],
    share=FLAGS.right_share,
    num_rows=FLAGS.num_rows,
    seed=FLAGS.seed,
  )
  rows = [with_tags(labelled[i]) for i in chosen]
  write("data.jsonl", rows)
  (asked,) = prompts.encode(
    tokenizer, [row["prompt"] for row in rows], **cli.encode_options(FLAGS)
  )
  end_id = end_tokens.end_id(tokenizer, cli.prompt_format(FLAGS))
  encoded = [
    (
      ids,
      *steps.encode_tagged(tokenizer, row["tagged"], tag_ids, end_id=end_id),
    )
    for ids, row in zip(asked.encoded, rows, strict=True)
  ]
  shape = batches.supervised_shape(encoded)
  tokens.check_positions(sum(shape.values()), config.max_positions)

  # The fit: tags are read, and not learnt; what follows depends on them.

  def loss_fn(params, batch):
    statistics, _ = rollouts.token_statistics(
      policy,
      params["policy"],
      batch,
      temperature=1.0,
      chunk_size=FLAGS.chunk_size,
    )
    return supervised.nll_loss(statistics.log_probs, batch["learnt_mask"])

  gradients = microbatch.grad(
    loss_fn,
    sizes.num_parts,
    weigh=lambda part: part["learnt_mask"].sum(),
    sharding=run.rows_sharding,
    buckets=sizes.buckets,
  )
  run.total_steps = batches.num_updates(
    len(encoded), FLAGS.batch_size, FLAGS.epochs
  )
  transform = optimizers.make(run.total_steps, **cli.optimizer_options(FLAGS))

  def update(state, batch):
    grads, metrics = gradients(state["params"], batch)
    params, optimizer_state, metrics = optimizers.step(
      transform, grads, state["optimizer"], state["params"], metrics
    )
    return {"params": params, "optimizer": optimizer_state}, metrics

  # The state; a run that was stopped goes on from its last checkpoint.
  state = run.restore({"policy": base.params}, rules, optimizer=transform)
  update = run.compile(update, returns_state=True)
  save_forced = functools.partial(
    forced.save,
    forced=good,
    forced_as=vocabularies.single_id(tokenizer, " ")
    if FLAGS.blank_slot
    else None,
  )

  draw = lambda step: batches.indices_or_all(
    len(encoded), FLAGS.batch_size, step, seed=FLAGS.seed
  )
  pack = cli.pack_pairs(FLAGS, run, sizes, encoded, draw)

  def batch_of(step):
    return batches.supervised_batch(
      [encoded[i] for i in draw(step)], num_rows=FLAGS.batch_size, **shape
    )

  run.check_learner(gradients, state["params"], batch_of(0), pack=pack.alone)

  def evaluate(step):
    """Greedy accuracy under each tag; --keep_best goes by the good one."""
    metrics = {}
    for name, respond in answer.items():
      found = answers.evaluate(respond, state["params"]["policy"], score)
      metrics[f"eval/{name}"] = answers.means(found)["eval/is_correct"]
    run.keep_best(step, metrics["eval/good"], state["params"])
    return metrics

  with run.training(base.model, tokenizer, starts_from, COLUMNS):
    save_forced(run.workdir)
    if FLAGS.keep_best:
      save_forced(os.path.join(run.workdir, "best"))
    run.note(steps.describe_labels(rows))
    for step in run.steps(freeze=[update]):
      metrics = evaluate(step) if step % FLAGS.eval_every == 0 else {}
      started = time.perf_counter()
      state, learnt = update(state, run.shard(pack(batch_of(step))))
      metrics |= jax.device_get(learnt)
      seconds = time.perf_counter() - started
      metrics["tokens_per_second"] = metrics["nll/tokens"] / seconds
      run.log(step, metrics)
      run.save(step + 1, state)
    if run.is_complete:
      metrics = evaluate(run.total_steps)
      run.log(run.total_steps, metrics)
      run.finish(
        {
          "correct, good steps asked for": metrics["eval/good"],
          "correct, bad steps asked for": metrics["eval/bad"],
          "correct, without a tag": metrics["eval/free"],
          "solutions": len(rows),
          "samples drawn for them": num_drawn,
          "policy": FLAGS.workdir,
        }
      )
  return run.exit_status


if __name__ == "__main__":
  cli.run(main)
