"""Evaluates policies on the prompts of another split, beside each other.

The arms of the arithmetic study; a label given twice is another seed of it:
  python experiments/evaluate.py --workdir=runs/evaluation \
    --policies=start=runs/sft,none=runs/none,batch=runs/batch \
    --task_options=style=last

Writes every response with its score (`samples.jsonl`), the table
(`summary.json`), and, where the policies are workdirs of training runs, their
learning curves in one picture (`arms.png`).
"""

import collections
import os

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

from rljax import (
  checkpoint,
  data,
  evaluation,
  logs,
  meshes,
  preflight,
  report,
  sampling,
  tasks,
)
from rljax import rollout as rollouts
from rljax.models import hf

# Run.
flags.DEFINE_string("workdir", None, "Where results go.", required=True)
flags.DEFINE_integer("seed", 0, "Of prompts and samples.")
flags.DEFINE_string("mesh", "data:-1", "Axes data, fsdp, tensor; -1: the rest.")
flags.DEFINE_string("compilation_cache", "~/.cache/rljax", "Empty for none.")
# Policies.
flags.DEFINE_list("policies", None, "label=model; a model alone is its label.")
flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of compute.")
# Task.
flags.DEFINE_string("task", "arithmetic", "A module of rljax.tasks.")
flags.DEFINE_list("task_options", [], "name=value, handed to task.prompts.")
flags.DEFINE_list("score_options", [], "name=value, handed to task.score.")
flags.DEFINE_string("split", "test", "Of the task.")
flags.DEFINE_integer("num_prompts", 2000, "Of that split.")
flags.DEFINE_integer("max_prompt_length", 512, "Tokens; longer is an error.")
# Sampling.
flags.DEFINE_integer("batch_size", 256, "Prompts at the same time.")
flags.DEFINE_integer("max_length", 1, "Response tokens.")
flags.DEFINE_bool("greedy", True, "Else sampled with the settings below.")
flags.DEFINE_float("temperature", 1.0, "Where not greedy.")
flags.DEFINE_float("top_p", 1.0, "1: off.")
flags.DEFINE_bool("stop_at_eos", False, "Else the end token is never drawn.")
FLAGS = flags.FLAGS

TAIL = 50
TAIL_METRICS = {
  "reward/mean": "reward",
  "task/is_correct": "correct",
  "entropy/token": "entropy of an answer",
  "entropy/batch": "batch entropy",
  "entropy/batch_max_prob": "top share",
  "answers/distinct": "answers in a batch",
}
PANELS = {
  "Reward of samples": ["reward/mean"],
  "Correct, greedy, on test prompts": ["eval/is_correct"],
  "Entropy of an answer (nats)": ["entropy/token"],
  "Entropy of the batch's answers (nats)": ["entropy/batch"],
  "Different answers in a batch": ["answers/distinct"],
  "Largest share of one answer": ["entropy/batch_max_prob"],
}


def main(_):
  logging.set_verbosity(logging.WARNING)  # Orbax has much to say.
  if FLAGS.compilation_cache:
    cache = os.path.expanduser(FLAGS.compilation_cache)
    jax.config.update("jax_compilation_cache_dir", cache)
  arms = collections.defaultdict(list)
  for entry in FLAGS.policies or []:
    label, equals, name = entry.rpartition("=")
    arms[label if equals else entry].append(name)
  if not arms:
    raise ValueError("--policies names no model; give label=model,...")
  mesh = meshes.make(FLAGS.mesh)
  meshes.check_divisible(FLAGS.batch_size, mesh, "--batch_size")
  task = tasks.load(FLAGS.task)
  prompts = task.prompts(
    FLAGS.split,
    FLAGS.seed,
    num=FLAGS.num_prompts,
    **tasks.options(FLAGS.task_options),
  )
  checkpoint.prepare_workdir(FLAGS.workdir)
  if os.path.exists(os.path.join(FLAGS.workdir, "checkpoints")):
    raise ValueError(
      f"--workdir={FLAGS.workdir} holds a training run, whose files an "
      "evaluation would replace; choose another."
    )

  table, samples, scores_of = {}, [], {}
  for label, names in arms.items():
    seeds = []
    for name in names:
      responses = respond(name, prompts, mesh)
      scores, parts = tasks.score_all(
        task, prompts, responses, **tasks.options(FLAGS.score_options)
      )
      seeds.append((scores, parts, responses))
      samples += [
        {
          "arm": label,
          "model": name,
          "prompt": prompt,
          "response": response,
          "reward": float(score),
          "parts": part,
        }
        for prompt, response, score, part in zip(
          prompts, responses, scores, parts, strict=True
        )
      ]
    # Seeds answer the same prompts: average them first, then resample prompts.
    scores_of[label] = np.mean([scores for scores, _, _ in seeds], axis=0)
    correct = np.mean(
      [[p["is_correct"] for p in parts] for _, parts, _ in seeds], axis=1
    )
    table[label] = {
      "reward": interval(evaluation.mean_interval(scores_of[label])),
      "correct": interval(
        evaluation.mean_interval(
          np.mean(
            [[p["is_correct"] for p in parts] for _, parts, _ in seeds], axis=0
          )
        )
      ),
      "seeds": len(seeds),
      "correct by seed": " ".join(f"{share:.3f}" for share in correct),
      "different answers": " ".join(
        str(evaluation.distinct_answers(responses)) for _, _, responses in seeds
      ),
    }
    first = next(iter(scores_of))
    if label != first:
      table[label][f"reward - {first}"] = interval(
        evaluation.paired_interval(scores_of[label], scores_of[first])
      )
  histories = {
    label: [os.path.join(name, "metrics.jsonl") for name in names]
    for label, names in arms.items()
  }
  # Policies that were not trained by reinforcement have no curve of reward.
  histories = {
    label: paths
    for label, paths in histories.items()
    if all(map(has_rewards, paths))
  }
  picture = os.path.join(FLAGS.workdir, "arms.png")
  if histories:
    report.compare(histories, picture, PANELS)
  with logs.Logs(FLAGS.workdir, total_steps=1, tensorboard=False) as log:
    log.samples(0, samples)
    log.summary(
      table,
      title=f"{FLAGS.task}, {FLAGS.split}: {len(prompts)} prompts, "
      "mean and 95 % bootstrap interval over prompts",
    )
    if histories:
      log.summary(
        tails(histories),
        title=f"Samples of the last {TAIL} steps: mean and range over seeds",
        file="training.json",
      )
      log.note(f"Learning curves: {picture}")


def respond(name, prompts, mesh):
  """The responses of one model, as texts."""
  loaded = hf.load(name, dtype=FLAGS.dtype)
  model, tokenizer = loaded.model, loaded.tokenizer
  params = meshes.place(
    loaded.params,
    meshes.shardings(loaded.params, hf.partition_rules(model), mesh),
  )
  encoded = data.encode_prompts(
    tokenizer, prompts, max_length=FLAGS.max_prompt_length
  )
  ids, mask = data.pad_left(encoded)
  data.check_positions(
    ids.shape[1] + FLAGS.max_length, model.config.max_positions
  )
  stop_ids = data.stop_ids(tokenizer) if FLAGS.stop_at_eos else ()
  allowed = data.allowed_tokens(tokenizer, model.config.vocab_size, stop_ids)
  settings = sampling.Settings(greedy=True)
  if not FLAGS.greedy:
    settings = sampling.Settings(
      temperature=FLAGS.temperature, top_p=FLAGS.top_p
    )
  sample = preflight.Compiled(
    "sample",
    lambda key, params, ids, mask, indices: rollouts.sample(
      key,
      model,
      params,
      ids,
      mask,
      max_length=FLAGS.max_length,
      settings=settings,
      prompt_indices=indices,
      allowed=jnp.asarray(allowed),
      stop_ids=stop_ids,
      pad_id=data.pad_id(tokenizer),
    ),
  )
  responses = []
  for start in range(0, len(prompts), FLAGS.batch_size):
    # The last batch is filled up from the front, and cut again.
    rows = np.arange(start, start + FLAGS.batch_size) % len(prompts)
    batch = meshes.shard_batch((ids[rows], mask[rows], rows), mesh)
    batch_ids, batch_mask, indices = batch
    rollout = sample(
      jax.random.key(FLAGS.seed), params, batch_ids, batch_mask, indices
    )
    responses += data.decode(
      tokenizer,
      np.asarray(rollout.response_ids),
      np.asarray(rollout.response_mask),
    )
  return responses[: len(prompts)]


def tails(histories):
  """What the last steps of training looked like, per arm."""
  table = {}
  for label, paths in histories.items():
    table[label] = {}
    for name, title in TAIL_METRICS.items():
      seeds = [report.read_metrics(path).get(name) for path in paths]
      means = [np.nanmean(s[1][-TAIL:]) for s in seeds if s is not None]
      if not means:
        continue
      text = f"{np.mean(means):.3f}"
      if len(means) > 1:
        text += f" [{min(means):.3f}, {max(means):.3f}]"
      table[label][title] = text
  return table


def interval(numbers):
  """Mean, low and high end, as text."""
  mean, low, high = numbers
  return f"{mean:.3f} [{low:.3f}, {high:.3f}]"


def has_rewards(path):
  """Whether a run logged rewards of its samples."""
  return os.path.exists(path) and "reward/mean" in report.read_metrics(path)


if __name__ == "__main__":
  app.run(main)
