"""Evaluates policies on the same prompts, beside each other.

The arms of the arithmetic study; a label given twice is another seed of it:
  python experiments/evaluate.py --workdir=runs/evaluation \
    --policies=start=runs/sft,none=runs/none,batch=runs/batch \
    --task_options=style=last

Replies to the prompts of a file, scored by a classifier, as texts and beside
the logged ones:
  python experiments/evaluate.py --workdir=runs/evaluation --stop_at_eos \
    --policies=reference=runs/reference,a_lol=runs/a_lol/best \
    --data=test.jsonl --reward_model=runs/reward_model --metrics=text,log \
    --reference=runs/reference --max_length=128

Writes every response with its score (`samples.jsonl`), the table
(`summary.json`), and, where the policies are workdirs of training runs, their
learning curves in one picture (`arms.png`).
"""

import collections
import functools
import os

import numpy as np
from absl import app, flags

from rljax import (
  data,
  evaluation,
  logged,
  logs,
  meshes,
  reference,
  report,
  responses,
  runs,
  sampling,
  scoring,
  tasks,
)
from rljax.models import hf

METRICS = ("answers", "text", "log")

# Run.
flags.DEFINE_string("workdir", None, "Where results go.", required=True)
flags.DEFINE_integer("seed", 0, "Of prompts and samples.")
flags.DEFINE_string("mesh", "data:-1", "Axes data, fsdp, tensor; -1: the rest.")
flags.DEFINE_string("compilation_cache", "~/.cache/rljax", "Empty for none.")
# Policies.
flags.DEFINE_list("policies", None, "label=model; a model alone is its label.")
flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of compute.")
# Prompts: a task's, or a file's.
flags.DEFINE_string("task", "arithmetic", "A module of rljax.tasks.")
flags.DEFINE_list("task_options", [], "name=value, handed to task.prompts.")
flags.DEFINE_string("split", "test", "Of the task.")
flags.DEFINE_string(
  "data", "", "Prompts, answered or not; replaces the task's."
)
flags.DEFINE_integer("num_prompts", 2000, "The first ones.")
flags.DEFINE_enum("prompt_format", "plain", ["plain", "chat"], "Of prompts.")
flags.DEFINE_integer("max_prompt_length", 512, "Tokens.")
flags.DEFINE_enum("too_long", "error", ["error", "skip", "cut"], "Prompts.")
# Reward.
flags.DEFINE_list("score_options", [], "name=value, handed to task.score.")
flags.DEFINE_string("reward_model", "", "Replaces the score of the task.")
flags.DEFINE_string("reward_transform", "sigmoid", "Of its logits.")
flags.DEFINE_string("reward_template", "{prompt}{response}", "What it reads.")
flags.DEFINE_integer("reward_length", 512, "Tokens that it reads.")
# Sampling.
flags.DEFINE_integer("batch_size", 256, "Texts at the same time.")
flags.DEFINE_integer("max_length", 1, "Response tokens.")
flags.DEFINE_bool("greedy", True, "Else sampled with the settings below.")
flags.DEFINE_float("temperature", 1.0, "Where not greedy.")
flags.DEFINE_float("top_p", 1.0, "1: off.")
flags.DEFINE_bool("stop_at_eos", False, "Else the end token is never drawn.")
flags.DEFINE_list("stop_strings", [], r"Texts that end a response; \n too.")
# What is measured beside the reward.
flags.DEFINE_list(
  "metrics",
  [],
  f"Some of {', '.join(METRICS)}; empty: answers, or text with a classifier.",
)
flags.DEFINE_integer("max_response_length", 512, "Tokens of logged replies.")
flags.DEFINE_list("reference", [], "Of log: one, or one for each seed.")
flags.DEFINE_float("clip_epsilon", 0.9, "Of log: the bounds of ratios.")
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
REWARDS = {"reward/mean", "dev/reward"}
PANELS = {
  "Reward of samples": ["reward/mean"],
  "Reward of replies to dev prompts": ["dev/reward"],
  "Different pairs of words (dev)": ["dev/distinct_2"],
  "Words of a reply (dev)": ["dev/words"],
  "Correct, greedy, on test prompts": ["eval/is_correct"],
  "Entropy of an answer (nats)": ["entropy/token"],
  "Entropy of the batch's answers (nats)": ["entropy/batch"],
  "Different answers in a batch": ["answers/distinct"],
  "Largest share of one answer": ["entropy/batch_max_prob"],
}


def main(_):
  runs.check_positive(FLAGS, "num_prompts", "batch_size", "max_length")
  arms = collections.defaultdict(list)
  for entry in FLAGS.policies or []:
    label, equals, name = entry.rpartition("=")
    arms[label if equals else entry].append(name)
  if not arms:
    raise ValueError("--policies names no model; give label=model,...")
  if not FLAGS.metrics:
    FLAGS.metrics = ["text" if FLAGS.reward_model else "answers"]
  scorer_is_named = FLAGS.reward_model or not FLAGS["task"].using_default_value
  if FLAGS.data and not scorer_is_named:
    raise ValueError(
      "Nothing says how replies to the prompts of --data are scored: give "
      "--task or --reward_model."
    )
  unknown = set(FLAGS.metrics) - set(METRICS)
  if unknown:
    raise ValueError(
      f"--metrics must be some of {', '.join(METRICS)}, got "
      f"{', '.join(sorted(unknown))}."
    )
  if not 0 < FLAGS.clip_epsilon < 1:
    raise ValueError(
      f"--clip_epsilon must lie between 0 and 1, got {FLAGS.clip_epsilon}."
    )
  if os.path.exists(os.path.join(FLAGS.workdir, "checkpoints")):
    raise ValueError(
      f"--workdir={FLAGS.workdir} holds a training run, whose files an "
      "evaluation would replace; choose another."
    )
  runs.start(FLAGS)
  mesh = meshes.make(FLAGS.mesh)
  meshes.check_divisible(FLAGS.batch_size, mesh, "--batch_size")
  score = scoring.scorer(
    FLAGS.task,
    tasks.options(FLAGS.score_options),
    FLAGS.reward_model,
    transform=FLAGS.reward_transform,
    template=FLAGS.reward_template,
    max_length=FLAGS.reward_length,
    batch_size=FLAGS.batch_size,
    mesh=mesh,
  )
  rows = prompts_of()

  table, samples, scores_of = {}, [], {}
  for label, names in arms.items():
    seeds, prompts = [], None
    if len(FLAGS.reference) not in (0, 1, len(names)):
      raise ValueError(
        f"--reference names {len(FLAGS.reference)} models, and {label} has "
        f"{len(names)} seeds; give one for all, or one for each."
      )
    # Every seed has its own reference, or all have the same.
    references = FLAGS.reference or [""]
    references *= len(names) // len(references)
    for name, ratios_to in zip(names, references, strict=True):
      asked, replies, more = respond(name, rows, ratios_to, mesh)
      if prompts not in (None, asked):
        raise ValueError(
          f"{name} was left {len(asked)} prompts that are not those of "
          "another policy; give --too_long=cut or a larger "
          "--max_prompt_length."
        )
      prompts = asked
      scores, parts = score(prompts, replies)
      seeds.append((scores, parts, replies, more))
      samples += [
        {"arm": label, "model": name, **record}
        for record in responses.records(prompts, replies, scores, parts)
      ]
    # Seeds answer the same prompts: average them first, then resample prompts.
    scores_of[label] = np.mean([seed[0] for seed in seeds], axis=0)
    table[label] = {
      "reward": interval(evaluation.mean_interval(scores_of[label])),
      "seeds": len(seeds),
      "reward by seed": " ".join(f"{seed[0].mean():.3f}" for seed in seeds),
    }
    if "answers" in FLAGS.metrics:
      table[label] |= answer_metrics(seeds)
    if "text" in FLAGS.metrics:
      table[label] |= mean_and_range(
        [text_metrics(prompts, seed[2]) for seed in seeds]
      )
    if "log" in FLAGS.metrics:
      table[label] |= mean_and_range([seed[3] for seed in seeds])
    first = next(iter(scores_of))
    if label != first:
      if len(scores_of[label]) != len(scores_of[first]):
        raise ValueError(
          f"{label} and {first} were asked different prompts; give "
          "--too_long=cut or a larger --max_prompt_length."
        )
      table[label][f"reward - {first}"] = interval(
        evaluation.paired_interval(scores_of[label], scores_of[first])
      )
  histories = {
    label: [history_of(name) for name in names] for label, names in arms.items()
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
    if len(set(prompts)) < len(prompts):
      log.note(
        f"{len(set(prompts))} of {len(prompts)} prompts are different, and the "
        "others repeat them: intervals are narrower than they should be."
      )
    log.summary(
      table,
      title=f"{FLAGS.data or f'{FLAGS.task}, {FLAGS.split}'}: {len(prompts)} "
      "prompts, mean and 95 % bootstrap interval over prompts",
    )
    ends = tails(histories)
    if any(ends.values()):
      log.summary(
        ends,
        title=f"Samples of the last {TAIL} steps: mean and range over seeds",
        file="training.json",
      )
    if histories:
      log.note(f"Learning curves: {picture}")


def prompts_of():
  """The rows that are asked, with the logged replies if they are needed."""
  load = logged.load if "log" in FLAGS.metrics else logged.load_prompts
  if FLAGS.data:
    rows, _ = load(FLAGS.data, FLAGS.split)
    return logged.first_replies(rows[: FLAGS.num_prompts])
  task, options = tasks.load(FLAGS.task), tasks.options(FLAGS.task_options)
  options["num"] = FLAGS.num_prompts
  if "log" in FLAGS.metrics:
    rows = logged.task_rows(FLAGS.task, FLAGS.split, FLAGS.seed, options)
    return logged.first_replies(rows)
  prompts = task.prompts(FLAGS.split, FLAGS.seed, **options)
  return logged.from_prompts(prompts, FLAGS.task)


def respond(name, rows, ratios_to, mesh):
  """Prompts and responses of one model, and what it says of logged replies."""
  loaded = hf.load(name, dtype=FLAGS.dtype)
  model, tokenizer = loaded.model, loaded.tokenizer
  params = place(loaded, mesh)
  encoded = logged.prepare(
    tokenizer,
    rows,
    prompt_format=FLAGS.prompt_format,
    max_prompt_length=FLAGS.max_prompt_length,
    max_response_length=FLAGS.max_response_length,
    too_long=FLAGS.too_long,
  )
  answer = responses.Responder(
    model,
    tokenizer,
    encoded.prompt_ids,
    max_length=FLAGS.max_length,
    settings=sampling.Settings(
      greedy=FLAGS.greedy,
      temperature=1.0 if FLAGS.greedy else FLAGS.temperature,
      top_p=1.0 if FLAGS.greedy else FLAGS.top_p,
    ),
    batch_size=FLAGS.batch_size,
    mesh=mesh,
    seed=FLAGS.seed,
    stop_at_eos=FLAGS.stop_at_eos,
    stop_strings=runs.unescaped(FLAGS.stop_strings),
  )
  more = {}
  if "log" in FLAGS.metrics:
    more = log_metrics(loaded, params, encoded, ratios_to, mesh)
  return [row.prompt for row in encoded.rows], answer(params), more


def place(loaded, mesh):
  """The parameters of a model on the mesh."""
  rules = hf.partition_rules(loaded.model)
  return meshes.place(
    loaded.params, meshes.shardings(loaded.params, rules, mesh)
  )


def answer_metrics(seeds):
  """Of replies that are right or wrong: how many, and how many there are."""
  if "is_correct" not in seeds[0][1][0]:
    raise ValueError(
      "--metrics=answers needs replies that are right or wrong, which the "
      "scorer does not say; take --metrics=text."
    )
  correct = [[part["is_correct"] for part in seed[1]] for seed in seeds]
  return {
    "correct": interval(evaluation.mean_interval(np.mean(correct, axis=0))),
    "correct by seed": " ".join(f"{np.mean(seed):.3f}" for seed in correct),
    "different answers": " ".join(
      str(evaluation.distinct_answers(seed[2])) for seed in seeds
    ),
  }


def text_metrics(prompts, replies):
  """Of replies of several words: length, diversity, and overlap."""
  overlap = [
    evaluation.coverage_and_density(prompt, reply)
    for prompt, reply in zip(prompts, replies, strict=True)
  ]
  coverage, density = np.mean(overlap, axis=0)
  metrics = {"words": evaluation.mean_words(replies)}
  # Both definitions: distinct n-grams over n-grams, and over words.
  for n in (1, 2, 3):
    metrics[f"distinct-{n}"] = evaluation.distinct_n(replies, n)
  for n in (1, 2, 3):
    metrics[f"distinct-{n} per word"] = evaluation.distinct_n(
      replies, n, definition="words"
    )
  return metrics | {"prompt coverage": coverage, "prompt density": density}


def log_metrics(loaded, params, encoded, ratios_to, mesh):
  """How likely a policy finds logged replies, and how far that has moved."""
  data.check_positions(
    sum(reference.lengths(encoded)), loaded.model.config.max_positions
  )
  log_probs_of = functools.partial(
    reference.response_log_probs,
    encoded=encoded,
    batch_size=FLAGS.batch_size,
    mesh=mesh,
  )
  log_probs = log_probs_of(loaded.model, params)[:, 0]  # [N, T]
  counts = np.array([len(ids) for (ids,) in encoded.response_ids])
  mask = np.arange(log_probs.shape[1]) < counts[:, None]
  metrics = {
    f"{name} of logged replies": value
    for name, value in evaluation.perplexity(log_probs, mask).items()
  }
  if ratios_to:
    other = hf.load(ratios_to, dtype=FLAGS.dtype)
    if other.tokenizer.get_vocab() != loaded.tokenizer.get_vocab():
      raise ValueError(
        f"--reference={ratios_to} has another tokenizer than {loaded.source}."
      )
    ratios = log_probs - log_probs_of(other.model, place(other, mesh))[:, 0]
    low, high = np.log1p([-FLAGS.clip_epsilon, FLAGS.clip_epsilon])
    sequence = np.where(mask, ratios, 0.0).sum(axis=1)
    metrics |= {
      "replies at the lower bound": np.mean(sequence <= low),
      "replies at the upper bound": np.mean(sequence >= high),
      "tokens at the lower bound": np.mean(ratios[mask] <= low),
      "tokens at the upper bound": np.mean(ratios[mask] >= high),
    }
  return metrics


def mean_and_range(seeds):
  """Means over seeds, with the lowest and highest where there are several."""
  table = {}
  for name in seeds[0]:
    values = [float(seed[name]) for seed in seeds]
    table[name] = f"{np.mean(values):.3f}"
    if len(values) > 1:
      table[name] += f" [{min(values):.3f}, {max(values):.3f}]"
  return table


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
      table[label] |= mean_and_range([{title: mean} for mean in means])
  return table


def interval(numbers):
  """Mean, low and high end, as text."""
  mean, low, high = numbers
  return f"{mean:.3f} [{low:.3f}, {high:.3f}]"


def history_of(name):
  """The metrics of the run that a policy comes from."""
  folder, best = os.path.split(os.path.normpath(name))
  if best != "best":  # Where offline scripts keep the best parameters.
    folder = name
  return os.path.join(folder, "metrics.jsonl")


def has_rewards(path):
  """Whether a run logged rewards of its replies."""
  return os.path.exists(path) and not REWARDS.isdisjoint(
    report.read_metrics(path)
  )


if __name__ == "__main__":
  app.run(main)
