"""Return-conditioned RL: solutions whose steps say beforehand if they are good.

A minute on two CPU cores, with the best policy of expert iteration:
  python experiments/return_conditioned.py --workdir=runs/rcrl \
    --flagfile=experiments/flags/havrilla/merge_sums_rcrl.flags \
    --policy=runs/ei/best --base=runs/base

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
every line feed (forced.json says how; `evaluate.py` follows it).

Prefixes are completed in batches of one padded length, those that several
solutions share once, and the completions of one share its keys and values.

Source: Havrilla et al. (2024), arXiv 2403.04642, section 3. Their labels are
--label=value at 0.5; --label=advantage and the mix of right and wrong
solutions are ours to choose (--right_share).
"""

import collections
import functools
import math
import os
import time

import jax
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
flags.DEFINE_string("workdir", None, "All stages, and logs.", required=True)
flags.DEFINE_integer("seed", 0, "Seed of every source of randomness.")
flags.DEFINE_integer("save_every", 500, "Updates between checkpoints.")
flags.DEFINE_integer("eval_every", 100, "Updates between evaluations.")
flags.DEFINE_string("mesh", "data:-1", "Axes data, fsdp, tensor; -1: the rest.")
flags.DEFINE_string("compilation_cache", "~/.cache/rljax", "Empty for none.")
flags.DEFINE_string("wandb_project", "", "Also log to this project.")
# Task.
flags.DEFINE_string("task", "merge_sums", "A module of rljax.tasks.")
flags.DEFINE_list("task_options", [], "name=value, handed to task.prompts.")
flags.DEFINE_list("score_options", [], "name=value, handed to task.score.")
flags.DEFINE_integer("num_prompts", 300, "Training prompts.")
flags.DEFINE_integer("num_eval_prompts", 100, "Of the validation split.")
flags.DEFINE_integer("max_prompt_length", 512, "Tokens; longer is an error.")
flags.DEFINE_enum("prompt_format", "plain", ["plain", "chat"], "Of prompts.")
# Models.
flags.DEFINE_string("policy", None, "Samples and completes.", required=True)
flags.DEFINE_string("base", "", "The fit starts from it; empty: the policy.")
flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of compute.")
flags.DEFINE_bool("remat", False, "Recompute layers in the backward pass.")
flags.DEFINE_integer("chunk_size", 0, "Positions with logits; 0: what fits.")
# Solutions and the values of their steps.
flags.DEFINE_list("data", [], "Files of samples; empty: drawn from the policy.")
flags.DEFINE_integer("num_solutions", 16, "Drawn for each prompt.")
flags.DEFINE_integer("max_per_prompt", 4, "Right ones, and wrong ones; 0: all.")
flags.DEFINE_integer("num_completions", 4, "K, of each prefix.")
flags.DEFINE_integer("sample_batch_size", 64, "Prompts at the same time.")
flags.DEFINE_integer("max_length", 40, "Response tokens.")
flags.DEFINE_float("temperature", 1.0, "Of solutions and completions.")
flags.DEFINE_list("stop_strings", [], r"Texts that end a response; \n too.")
flags.DEFINE_string("labels", "", "labels.jsonl of another run; no sampling.")
# Labels and tags.
flags.DEFINE_enum("label", "value", ["value", "advantage"], "Of a good step.")
flags.DEFINE_float("threshold", 0.5, "Of --label=value, inclusive.")
flags.DEFINE_string("good_tag", "G", "One token, in front of good steps.")
flags.DEFINE_string("bad_tag", "B", "One token, in front of the others.")
flags.DEFINE_bool("blank_slot", False, "Tags replace a step's first blank.")
flags.DEFINE_float("right_share", 0.5, "Of right solutions in the data.")
flags.DEFINE_integer("num_rows", 0, "Solutions in the data; 0: all that fit.")
# Fit.
flags.DEFINE_integer("epochs", 8, "Passes over the data.")
flags.DEFINE_integer("batch_size", 64, "Rows per update.")
flags.DEFINE_float("learning_rate", 1e-3, "Highest, of AdamW.")
flags.DEFINE_float("final_learning_rate", 0.0, "Of the last update.")
flags.DEFINE_float("weight_decay", 0.0, "Of AdamW.")
flags.DEFINE_float("max_grad_norm", 1.0, "0: no clipping.")
FLAGS = flags.FLAGS

COLUMNS = ("nll/loss", "eval/good", "eval/bad", "eval/free")
PANELS = {
  "Loss (nats a token)": ["nll/loss"],
  "Correct, by the tag that is forced": ["eval/good", "eval/bad", "eval/free"],
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

  # The policy is asked; the base learns.
  loaded = hf.load(FLAGS.policy, dtype=FLAGS.dtype, remat=FLAGS.remat)
  model, tokenizer = loaded.model, loaded.tokenizer
  vocab_size = model.config.vocab_size
  rules = hf.partition_rules(model, mesh)
  place = lambda tree: meshes.place(tree, meshes.shardings(tree, rules, mesh))
  policy = place(loaded.params)
  base = loaded.params
  if FLAGS.base:
    other = hf.load(FLAGS.base, dtype=FLAGS.dtype, remat=FLAGS.remat)
    runs.check_same_kind(f"--base={FLAGS.base}", other, loaded)
    base = other.params
  models = {"policy": loaded.params, "base": base}
  tags = (FLAGS.good_tag, FLAGS.bad_tag)
  tag_ids = [one_token(tokenizer, tag) for tag in tags]

  def forced(tag):
    """The sampler's table that puts a tag in front of every step."""
    table = np.full(vocab_size + 1, -1, np.int32)
    for token, text in enumerate(
      tokens.token_bytes(tokenizer, vocab_size=vocab_size)
    ):
      if text.endswith(b"\n"):
        table[token] = tag_ids[tags.index(tag)]
    table[vocab_size] = tag_ids[tags.index(tag)]
    return table

  prompts, eval_prompts = (
    task.prompts(split, FLAGS.seed, num=num, **options)
    for split, num in (
      ("train", FLAGS.num_prompts),
      ("validation", FLAGS.num_eval_prompts),
    )
  )
  # Bad options and tasks show here, not after hours of sampling.
  _, parts = score(eval_prompts[:1], [""])
  tasks.check_parts(FLAGS.task, parts, "is_correct")

  def encode(texts, continued=None):
    """Prompts in their format, and behind each what it is continued with."""
    texts = logged.render_prompts(
      texts, FLAGS.task, tokenizer, FLAGS.prompt_format
    )
    max_length = FLAGS.max_prompt_length
    if continued is not None:
      texts = [a + b for a, b in zip(texts, continued, strict=True)]
      max_length += FLAGS.max_length
    return tokens.encode_prompts(tokenizer, texts, max_length=max_length)

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
    responder, settings=sampling.Settings(temperature=FLAGS.temperature)
  )
  answer = functools.partial(
    responder,
    encode(eval_prompts),
    settings=sampling.Settings(greedy=True),
  )
  answers = {
    "good": answer(forced=forced(FLAGS.good_tag)),
    "bad": answer(forced=forced(FLAGS.bad_tag)),
    "free": answer(),
  }

  check_positions(max(map(len, encode(prompts))), model.config.max_positions)
  runs.check_models(FLAGS.workdir, models)
  checkpoint.write_flags(FLAGS.workdir, in_force, may_change)
  path_of = functools.partial(os.path.join, FLAGS.workdir)
  with checkpoint.Preemption() as preemption:

    def progress_of(name, num_prompts):
      shown = samplers.Progress(name, num_prompts)

      def progress(done, rows):
        shown(done, rows)
        if preemption.should_stop():
          raise Stopped

      return progress

    def solve():
      """Solutions to the training prompts, right and wrong."""
      if FLAGS.data:
        required = ("prompt", "response", "finished", "parts")
        return [
          row
          for path in FLAGS.data
          for row in files.read_jsonl(path, required=required)
        ]
      return samplers.collect(
        path_of("solutions.jsonl"),
        ask(encode(prompts), num_samples=FLAGS.num_solutions),
        policy,
        prompts,
        score,
        progress=progress_of("solutions", len(prompts)),
      )

    def complete(solutions):
      """(prompt, prefix) -> share of right completions."""
      pairs = {
        (row["prompt"], prefix): None
        for row in solutions
        for prefix in steps_lib.prefixes(row["response"])
      }
      values, num_drawn = {}, 0
      encoded = encode([p for p, _ in pairs], [prefix for _, prefix in pairs])
      bare = {
        p: len(ids)
        for p, ids in zip(
          prompts_of(pairs), encode(prompts_of(pairs)), strict=True
        )
      }
      by_length = collections.defaultdict(list)
      for pair, ids in zip(pairs, encoded, strict=True):
        by_length[batches.bucket_length(len(ids))].append((pair, ids))
      for length, group in sorted(by_length.items()):
        texts = {
          prompt + prefix: (prompt, prefix) for (prompt, prefix), _ in group
        }

        # The whole may be as long as a solution, and no longer.
        rest = [
          max(1, FLAGS.max_length - len(ids) + bare[prompt])
          for (prompt, _), ids in group
        ]

        def score_whole(asked, completions, texts=texts):
          prompts, starts = zip(*(texts[text] for text in asked), strict=True)
          whole = [a + b for a, b in zip(starts, completions, strict=True)]
          return score(prompts, whole)

        rows = samplers.collect(
          path_of("completions", f"{length}.jsonl"),
          ask(
            [ids for _, ids in group],
            num_samples=FLAGS.num_completions,
            max_length=max(rest),
            max_lengths=rest,
          ),
          policy,
          list(texts),
          score_whole,
          draw=length,  # Groups have random numbers of their own.
          progress=progress_of(f"completions, {length} tokens", len(group)),
        )
        num_drawn += len(rows)
        for i, (pair, _) in enumerate(group):
          own = rows[
            i * FLAGS.num_completions : (i + 1) * FLAGS.num_completions
          ]
          values[pair] = float(np.mean([steps_lib.is_kept(row) for row in own]))
      return values, num_drawn

    num_drawn = 0
    try:
      if FLAGS.labels:
        required = ["prompt", "response", "values", "is_correct"]
        if FLAGS.label == "advantage":
          required.append("start_value")
        labelled = files.read_jsonl(FLAGS.labels, required=required)
      else:
        found = solve()
        chosen = distinct_solutions(found)
        values, num_drawn = complete(chosen)
        if not FLAGS.data:
          num_drawn += len(found)
        labelled = label(found, chosen, values)
        if processes.is_first():
          files.write_jsonl(path_of("labels.jsonl"), labelled)
    except Stopped:
      print("Stopped by a signal while sampling; all is saved.")
      return preemption.exit_status

    rows = training_rows(labelled, tags)
    if processes.is_first():
      files.write_jsonl(path_of("data.jsonl"), rows)
    encoded = [
      (prompt_ids, *with_tags(tokenizer, row["tagged"], tags, tag_ids))
      for row, prompt_ids in zip(
        rows, encode([row["prompt"] for row in rows]), strict=True
      )
    ]
    lengths = [
      batches.bucket_length(max(len(row[part]) for row in encoded))
      for part in (0, 1)
    ]
    tokens.check_positions(sum(lengths), model.config.max_positions)

    def batch_of(step):
      indices = range(len(encoded))
      if len(encoded) > FLAGS.batch_size:
        indices = batches.batch_indices(
          len(encoded), FLAGS.batch_size, step, seed=FLAGS.seed
        )
      empty = [([0], [], [])] * max(0, FLAGS.batch_size - len(encoded))
      chosen = [*(encoded[i] for i in indices), *empty]
      batch = batches.supervised_batch(
        [row[:2] for row in chosen],
        prompt_length=lengths[0],
        response_length=lengths[1],
      )
      is_tag, _ = batches.pad_right(
        [row[2] for row in chosen], length=lengths[1]
      )
      return batch | {"learnt": batch["response_mask"] & (is_tag == 0)}

    # Tags are read, and not learnt: what follows depends on them.
    def loss_fn(params, batch):
      statistics, _ = rollouts.token_statistics(
        model,
        params,
        batch,
        temperature=1.0,
        chunk_size=FLAGS.chunk_size
        or log_probs.chunk_size(FLAGS.batch_size, vocab_size),
      )
      return supervised.nll_loss(statistics.log_probs, batch["learnt"])

    # Where there are fewer rows than a batch holds, an update has them all.
    num_updated = min(FLAGS.batch_size, len(encoded))
    steps = math.ceil(len(encoded) * FLAGS.epochs / num_updated)
    optimizer = optax.chain(
      optax.clip_by_global_norm(FLAGS.max_grad_norm or math.inf),
      optax.adamw(
        optax.schedules.cosine_decay_schedule(
          FLAGS.learning_rate,
          steps,
          alpha=FLAGS.final_learning_rate / FLAGS.learning_rate,
        ),
        weight_decay=FLAGS.weight_decay,
      ),
    )

    def update(state, batch):
      params = state["params"]["policy"]
      grads, metrics = jax.grad(loss_fn, has_aux=True)(params, batch)
      updates, optimizer_state = optimizer.update(
        grads, state["optimizer"], params
      )
      metrics["gradient_norm"] = optax.global_norm(grads)
      params = optax.apply_updates(params, updates)
      return {
        "params": {"policy": params},
        "optimizer": optimizer_state,
      }, metrics

    state = {"params": {"policy": base}, "optimizer": optimizer.init(base)}
    state_shardings = meshes.shardings(state, rules, mesh)
    state = meshes.place(state, state_shardings)
    update = compiled.Compiled(
      "update", update, donate_argnums=0, out_shardings=(state_shardings, None)
    )

    def evaluate():
      """Greedy accuracy on the validation prompts under each tag."""
      metrics = {}
      for name, respond in answers.items():
        _, parts = samplers.judge(
          respond, state["params"]["policy"], eval_prompts, score
        )
        metrics[f"eval/{name}"] = float(
          np.mean([part["is_correct"] for part in parts])
        )
      return metrics

    checkpoints = checkpoint.Checkpoints(FLAGS.workdir)
    first_step = 0
    if restored := checkpoints.restore_latest(state):
      first_step, state, _ = restored
    hf.save_config(path_of("model"), model, tokenizer)
    samplers.save_forced(
      FLAGS.workdir,
      forced(FLAGS.good_tag),
      one_token(tokenizer, " ") if FLAGS.blank_slot else None,
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
    log.note(describe(rows))
    log.curves(functools.partial(curves.curves, panels=PANELS))
    with log, checkpoints:
      for step in range(first_step, steps):
        metrics = evaluate() if step and step % FLAGS.eval_every == 0 else {}
        started = time.perf_counter()
        state, learnt = update(state, meshes.shard_batch(batch_of(step), mesh))
        metrics |= jax.device_get(learnt)
        seconds = time.perf_counter() - started
        metrics["tokens_per_second"] = metrics["nll/tokens"] / seconds
        log.write(step, metrics)
        done, stop = step + 1, preemption.should_stop()
        if done % FLAGS.save_every == 0 or done == steps or stop:
          checkpoints.save(done, state, {"step": done})
        if stop and done < steps:
          log.note(f"Stopped by a signal after step {done}; all is saved.")
          return preemption.exit_status
        if step > first_step:
          update.freeze()
      metrics = evaluate()
      log.write(steps, metrics)
      checkpoints.wait()  # Where a summary is, everything is.
      log.summary(
        {
          "correct, good steps asked for": metrics["eval/good"],
          "correct, bad steps asked for": metrics["eval/bad"],
          "correct, without a tag": metrics["eval/free"],
          "solutions": len(rows),
          "samples drawn for them": num_drawn,
          "policy": FLAGS.workdir,
        }
      )


class Stopped(Exception):
  """A signal came between two batches of samples."""


def validate():
  """Says what is wrong with the flags before anything is loaded."""
  runs.check_positive(
    FLAGS,
    *("num_prompts", "num_eval_prompts", "num_solutions", "num_completions"),
    *("max_length", "epochs", "batch_size", "sample_batch_size"),
    *("save_every", "eval_every"),
  )
  for name in ("threshold", "right_share"):
    if not 0 <= FLAGS[name].value <= 1:
      raise ValueError(f"--{name} must lie in [0, 1], got {FLAGS[name].value}.")
  if FLAGS.good_tag == FLAGS.bad_tag:
    raise ValueError(
      f"--good_tag and --bad_tag must differ, both are {FLAGS.good_tag!r}."
    )
  if not FLAGS.learning_rate > 0:
    raise ValueError(
      f"--learning_rate must be positive, got {FLAGS.learning_rate}."
    )


def check_positions(prompt_length, max_positions):
  """Says now if a prefix could turn out too long for its completion."""
  shortest = {}  # Padded length -> tokens of the shortest prefix with it.
  for num_tokens in range(FLAGS.max_length):
    padded = batches.bucket_length(prompt_length + num_tokens)
    shortest.setdefault(padded, num_tokens)
  tokens.check_positions(
    max(padded + FLAGS.max_length - n for padded, n in shortest.items()),
    max_positions,
  )


def prompts_of(pairs):
  """The prompts of (prompt, prefix), each once."""
  return list(dict.fromkeys(prompt for prompt, _ in pairs))


def one_token(tokenizer, tag):
  """The id of a tag."""
  ids = tokenizer.encode(tag, add_special_tokens=False)
  if len(ids) != 1:
    raise ValueError(
      f"The tag {tag!r} is {len(ids)} tokens of the tokenizer, and must be "
      "one: choose a rare word, or add it to the tokenizer."
    )
  return ids[0]


def distinct_solutions(samples):
  """Each different finished solution once, at most so many of each kind."""
  right, _ = steps_lib.add_distinct(
    [], samples, max_per_prompt=FLAGS.max_per_prompt
  )
  wrong, _ = steps_lib.add_distinct(
    [],
    samples,
    keep=lambda row: row["finished"] and not steps_lib.is_kept(row),
    max_per_prompt=FLAGS.max_per_prompt,
  )
  return [row for row in (*right, *wrong) if steps_lib.steps(row["response"])]


def label(samples, solutions, values):
  """Rows of solutions with the values of their steps."""
  of_prompt = collections.defaultdict(list)
  for row in samples:
    of_prompt[row["prompt"]].append(steps_lib.is_kept(row))
  rows = []
  for row in solutions:
    prompt, is_correct = row["prompt"], steps_lib.is_kept(row)
    inner = [
      values[prompt, prefix] for prefix in steps_lib.prefixes(row["response"])
    ]
    rows.append(
      {
        "prompt": prompt,
        "response": row["response"],
        "reward": float(is_correct),
        "steps": steps_lib.steps(row["response"]),
        "values": [*inner, float(is_correct)],
        "start_value": float(np.mean(of_prompt[prompt])),
        "num_completions": FLAGS.num_completions,
        "is_correct": is_correct,
        "finished": True,
      }
    )
  return rows


def training_rows(labelled, tags):
  """The solutions that are learnt from, with their tags."""
  chosen = steps_lib.mix(
    [row["is_correct"] for row in labelled],
    share=FLAGS.right_share,
    num_rows=FLAGS.num_rows,
    seed=FLAGS.seed,
  )
  rows = []
  for row in (labelled[i] for i in chosen):
    if FLAGS.label == "value":
      labels = steps_lib.value_labels(row["values"], threshold=FLAGS.threshold)
    else:
      labels = steps_lib.advantage_labels(
        row["values"], start_value=row["start_value"]
      )
    slot = " " if FLAGS.blank_slot else ""
    pairs = steps_lib.tagged(row["response"], labels, tags=tags, slot=slot)
    rows.append({**row, "good": labels, "tagged": pairs})
  return rows


def with_tags(tokenizer, pairs, tags, tag_ids):
  """Ids of tag, step, tag, step, ..., end; and which of them are tags."""
  ids, is_tag = [], []
  for tag, step in pairs:
    step_ids = tokenizer.encode(step, add_special_tokens=False)
    ids += [tag_ids[tags.index(tag)], *step_ids]
    is_tag += [1, *[0] * len(step_ids)]
  return [*ids, tokenizer.eos_token_id], [*is_tag, 0]


def describe(rows):
  """The data in one line."""
  right = sum(row["is_correct"] for row in rows)
  most = max(len(row["good"]) for row in rows)
  bad = [
    np.mean([not row["good"][i] for row in rows if i < len(row["good"])])
    for i in range(most)
  ]
  return (
    f"{len(rows)} solutions, {right} right; share of bad steps by position: "
    + " ".join(f"{share:.2f}" for share in bad[:8])
  )


if __name__ == "__main__":
  app.run(main)
