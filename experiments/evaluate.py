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

Reasoning by 32 samples of a question and a greedy one: how many are right, how
their vote is, and what is among them that the first policy does not write:
  python experiments/evaluate.py --workdir=runs/evaluation --stop_at_eos \
    --policies=sft=runs/sft,ei=runs/ei,ei=runs/ei_1 --task=merge_sums \
    --max_length=24 --num_samples=32 --k=1,8,32 --temperature=0.7 \
    --reference=runs/sft --new_vs=sft --rerank_model=runs/outcome_reward_model

What a reward has done to a policy: how diverse its samples are, and how likely
the model finds them that it started from:
  python experiments/evaluate.py --workdir=runs/evaluation \
    --policies=start=smollm2-135m,none=runs/none,initial=runs/initial \
    --task=sentiment --task_options=data=../shared/data/sentiment --nogreedy \
    --max_length=15 --metrics=text,perplexity --reference=smollm2-135m

Writes every response with its score (`samples.jsonl`), the table
(`summary.json`), and, where the policies are workdirs of training runs, their
learning curves in one picture (`arms.png`). Of reasoning also every metric by
seed (`metrics.json`), what differs from the first policy (`differences.json`,
`greedy.json`), and every question by itself (`questions.jsonl`). Its samples
are kept under `samples/`: a run that is started again draws those that are
missing, or whose policy or settings have changed.
"""

import collections
import dataclasses
import functools
import json
import math
import os
import pathlib
import re

import numpy as np
from absl import app, flags

from rljax import tasks
from rljax.distributed import meshes, processes
from rljax.evaluation import curves
from rljax.evaluation import metrics as metrics_lib
from rljax.generation import grammars, samplers
from rljax.models import hf
from rljax.ops import sampling
from rljax.scoring import cached, scorers
from rljax.text import files as files_lib
from rljax.text import keywords, logged, steps, tokens
from rljax.training import logs, runs

METRICS = ("answers", "text", "perplexity", "log", "reasoning")

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
flags.DEFINE_integer("num_samples", 1, "K of reasoning, beside a greedy one.")
flags.DEFINE_float("temperature", 1.0, "Where not greedy.")
flags.DEFINE_float("top_p", 1.0, "1: off.")
flags.DEFINE_bool("stop_at_eos", False, "Else the end token is never drawn.")
flags.DEFINE_list("stop_strings", [], r"Texts that end a response; \n too.")
flags.DEFINE_enum(
  "constraint", "none", ["none", "grammar"], "The task's, on responses."
)
flags.DEFINE_bool("forced_tags", True, "Of policies that bring some along.")
# What is measured beside the reward.
flags.DEFINE_list(
  "metrics",
  [],
  f"Some of {', '.join(METRICS)}; empty: reasoning if there are several "
  "samples, text with a classifier, else answers.",
)
flags.DEFINE_integer("max_response_length", 512, "Tokens of logged replies.")
flags.DEFINE_list(
  "reference",
  [],
  "Of perplexity, log and reasoning: one, or one for each seed.",
)
flags.DEFINE_float("clip_epsilon", 0.9, "Of log: the bounds of ratios.")
flags.DEFINE_list("k", [], "Of pass@k; empty: --num_samples.")
flags.DEFINE_enum(
  "ties",
  "expected",
  ["expected", "first_seen"],
  "Of votes: one of the winners at random, on average, or the first.",
)
flags.DEFINE_enum(
  "trace_key", "text", sorted(steps.KEYS), "What makes two traces the same."
)
flags.DEFINE_string(
  "rerank_model", "", "A classifier that weighs samples, read as --reward_*."
)
flags.DEFINE_string(
  "new_vs", "", "The label whose samples make a trace of others known."
)
flags.DEFINE_string(
  "new_vs_samples", "", "Or a file of samples, at least 4 K of each prompt."
)
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
  processes.join()
  runs.check_positive(
    FLAGS, "num_prompts", "batch_size", "max_length", "num_samples"
  )
  arms = collections.defaultdict(list)
  for entry in FLAGS.policies or []:
    label, equals, name = entry.rpartition("=")
    arms[label if equals else entry].append(name)
  if not arms:
    raise ValueError("--policies names no model; give label=model,...")
  if not FLAGS.metrics:
    FLAGS.metrics = ["text" if FLAGS.reward_model else "answers"]
    if FLAGS.num_samples > 1:
      FLAGS.metrics = ["reasoning"]
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
  if "perplexity" in FLAGS.metrics and not FLAGS.reference:
    raise ValueError(
      "--metrics=perplexity needs a --reference: the model that says how "
      "likely the replies are."
    )
  if FLAGS.constraint == "grammar" and not FLAGS.stop_at_eos:
    raise ValueError(
      "--constraint=grammar lets a response end where its expression does: it "
      "needs --stop_at_eos."
    )
  if "reasoning" in FLAGS.metrics or FLAGS.num_samples != 1:
    check_reasoning_flags(arms)
  if os.path.exists(os.path.join(FLAGS.workdir, "checkpoints")):
    raise ValueError(
      f"--workdir={FLAGS.workdir} holds a training run, whose files an "
      "evaluation would replace; choose another."
    )
  runs.start(FLAGS)
  mesh = meshes.make(FLAGS.mesh)
  meshes.check_divisible(FLAGS.batch_size, mesh, "--batch_size")
  score = scorers.scorer(
    FLAGS.task,
    keywords.parse(FLAGS.score_options),
    FLAGS.reward_model,
    transform=FLAGS.reward_transform,
    template=FLAGS.reward_template,
    max_length=FLAGS.reward_length,
    batch_size=FLAGS.batch_size,
    mesh=mesh,
  )
  rows = prompts_of()
  if "reasoning" in FLAGS.metrics:
    compare_reasoning(arms, rows, score, mesh)
    return

  table, samples, scores_of = {}, [], {}
  for label, names in arms.items():
    seeds, prompts = [], None
    references = references_of(label, names)
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
        for record in samplers.records(prompts, replies, scores, parts)
      ]
    # Seeds answer the same prompts: average them first, then resample prompts.
    scores_of[label] = np.mean([seed[0] for seed in seeds], axis=0)
    table[label] = {
      "reward": interval(metrics_lib.mean_interval(scores_of[label])),
      "seeds": len(seeds),
      "reward by seed": " ".join(f"{seed[0].mean():.3f}" for seed in seeds),
    }
    if "answers" in FLAGS.metrics:
      table[label] |= answer_metrics(seeds)
    if "text" in FLAGS.metrics:
      table[label] |= mean_and_range(
        [text_metrics(prompts, seed[2]) for seed in seeds]
      )
    table[label] |= mean_and_range([seed[3] for seed in seeds])
    first = next(iter(scores_of))
    if label != first:
      if len(scores_of[label]) != len(scores_of[first]):
        raise ValueError(
          f"{label} and {first} were asked different prompts; give "
          "--too_long=cut or a larger --max_prompt_length."
        )
      table[label][f"reward - {first}"] = interval(
        metrics_lib.paired_interval(scores_of[label], scores_of[first])
      )
  with logs.Logs(FLAGS.workdir, total_steps=1, tensorboard=False) as log:
    log.samples(0, samples)
    note_repeated(prompts, log)
    log.summary(table, title=title_of(prompts))
    training(arms, log)


def note_repeated(prompts, log):
  """Says if prompts are asked twice."""
  if len(set(prompts)) < len(prompts):
    log.note(
      f"{len(set(prompts))} of {len(prompts)} prompts are different, and the "
      "others repeat them: intervals are narrower than they should be."
    )


def title_of(prompts):
  """Of the table of all policies."""
  return (
    f"{FLAGS.data or f'{FLAGS.task}, {FLAGS.split}'}: {len(prompts)} prompts, "
    "mean and 95 % bootstrap interval over prompts"
  )


def training(arms, log):
  """The learning curves of the policies, and where they ended."""
  if not processes.is_first():
    return
  histories = {
    label: [history_of(name) for name in names] for label, names in arms.items()
  }
  # Policies that were not trained by reinforcement have no curve of reward.
  histories = {
    label: paths
    for label, paths in histories.items()
    if all(map(has_rewards, paths))
  }
  ends = tails(histories)
  if any(ends.values()):
    log.summary(
      ends,
      title=f"Samples of the last {TAIL} steps: mean and range over seeds",
      file="training.json",
    )
  if histories:
    picture = os.path.join(FLAGS.workdir, "arms.png")
    curves.compare(histories, picture, PANELS)
    log.note(f"Learning curves: {picture}")


def references_of(label, names):
  """The reference of each seed: its own, or the one that all have."""
  references = FLAGS.reference or [""]
  if len(references) not in (1, len(names)):
    raise ValueError(
      f"--reference names {len(references)} models, and {label} has "
      f"{len(names)} seeds; give one for all, or one for each."
    )
  return references * (len(names) // len(references))


def prompts_of():
  """The rows that are asked, with the logged replies if they are needed."""
  load = logged.load if "log" in FLAGS.metrics else logged.load_prompts
  if FLAGS.data:
    rows, _ = load(FLAGS.data, FLAGS.split)
    return logged.first_replies(rows[: FLAGS.num_prompts])
  task, options = tasks.load(FLAGS.task), keywords.parse(FLAGS.task_options)
  options["num"] = FLAGS.num_prompts
  if "log" in FLAGS.metrics:
    rows = logged.task_rows(
      tasks.load(FLAGS.task), FLAGS.split, FLAGS.seed, options
    )
    return logged.first_replies(rows)
  prompts = task.prompts(FLAGS.split, FLAGS.seed, **options)
  return logged.from_prompts(prompts, FLAGS.task)


def respond(name, rows, ratios_to, mesh):
  """Prompts and responses of one model, and how likely replies are."""
  loaded = hf.load(name, dtype=FLAGS.dtype)
  params = place(loaded, mesh)
  encoded = encode(loaded.tokenizer, rows, FLAGS.too_long)
  answer = responder_of(name, loaded, encoded, mesh, greedy=FLAGS.greedy)
  more = {}
  if "log" in FLAGS.metrics:
    more = log_metrics(loaded, params, encoded, ratios_to, mesh)
  replies = answer(params)
  if "perplexity" in FLAGS.metrics:
    more |= reply_perplexity(ratios_to, encoded.rows, replies, mesh)
  return [row.prompt for row in encoded.rows], replies, more


def encode(tokenizer, rows, too_long):
  """Prompts, and replies if there are any, as ids."""
  return logged.prepare(
    tokenizer,
    rows,
    prompt_format=FLAGS.prompt_format,
    max_prompt_length=FLAGS.max_prompt_length,
    max_response_length=FLAGS.max_response_length,
    too_long=too_long,
  )


def responder_of(name, loaded, encoded, mesh, *, greedy, num_samples=1):
  """What answers the prompts."""
  num_shards = meshes.num_batch_shards(mesh)
  num_prompts = max(FLAGS.batch_size // num_samples // num_shards, 1)
  return samplers.Responder(
    loaded.model,
    loaded.tokenizer,
    encoded.prompt_ids,
    max_length=FLAGS.max_length,
    settings=sampling.Settings(
      greedy=greedy,
      temperature=1.0 if greedy else FLAGS.temperature,
      top_p=1.0 if greedy else FLAGS.top_p,
    ),
    batch_size=num_prompts * num_shards,
    mesh=mesh,
    seed=FLAGS.seed,
    stop_at_eos=FLAGS.stop_at_eos,
    stop_strings=runs.unescaped(FLAGS.stop_strings),
    num_samples=num_samples,
    constraint=constraint_on(loaded, encoded),
    **tags_of(name),
  )


def constraint_on(loaded, encoded):
  """What the responses must follow; None without a grammar."""
  if FLAGS.constraint == "none":
    return None
  task, tokenizer = tasks.load(FLAGS.task), loaded.tokenizer
  vocab_size = loaded.model.config.vocab_size
  grammar = grammars.of_task(task, tokenizer, vocab_size)
  texts = [row.prompt for row in encoded.rows]
  return grammars.constraint(
    grammar, **task.places(texts, tokenizer, vocab_size)
  )


def tags_of(name):
  """The tags of a return-conditioned policy, which it brings along."""
  return samplers.load_forced(name) if FLAGS.forced_tags else {}


def place(loaded, mesh):
  """The parameters of a model on the mesh."""
  rules = hf.partition_rules(loaded.model, mesh)
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
    "correct": interval(metrics_lib.mean_interval(np.mean(correct, axis=0))),
    "correct by seed": " ".join(f"{np.mean(seed):.3f}" for seed in correct),
    "different answers": " ".join(
      str(metrics_lib.distinct_answers(seed[2])) for seed in seeds
    ),
  }


def text_metrics(prompts, replies):
  """Of replies of several words: length, diversity, and overlap."""
  overlap = [
    metrics_lib.coverage_and_density(prompt, reply)
    for prompt, reply in zip(prompts, replies, strict=True)
  ]
  coverage, density = np.mean(overlap, axis=0)
  metrics = {"words": metrics_lib.mean_words(replies)}
  # Both definitions: distinct n-grams over n-grams, and over words.
  for n in (1, 2, 3):
    metrics[f"distinct-{n}"] = metrics_lib.distinct_n(replies, n)
  for n in (1, 2, 3):
    metrics[f"distinct-{n} per word"] = metrics_lib.distinct_n(
      replies, n, definition="words"
    )
  return metrics | {"prompt coverage": coverage, "prompt density": density}


def reply_perplexity(name, asked, replies, mesh):
  """How likely another policy finds replies; their ends are not asked about."""
  rows = [
    dataclasses.replace(
      row, candidates=(reply,), rewards=None, response_ids=None
    )
    for row, reply in zip(asked, replies, strict=True)
    if reply
  ]
  titles = {
    kind: f"{kind} under the reference"
    for kind in ("perplexity", "perplexity_per_reply")
  }
  if not rows:
    return dict.fromkeys(titles.values(), math.nan)
  loaded, params = reference_of(name, mesh)
  encoded = encode(loaded.tokenizer, rows, "error")
  tokens.check_positions(
    sum(cached.lengths(encoded)), loaded.model.config.max_positions
  )
  log_probs = cached.response_log_probs(
    loaded.model, params, encoded, batch_size=FLAGS.batch_size, mesh=mesh
  )[:, 0]  # [N, T]
  counts = np.array([len(ids) - 1 for (ids,) in encoded.response_ids])
  mask = np.arange(log_probs.shape[1]) < counts[:, None]
  found = metrics_lib.perplexity(log_probs, mask)
  return {title: found[kind] for kind, title in titles.items()}


def log_metrics(loaded, params, encoded, ratios_to, mesh):
  """How likely a policy finds logged replies, and how far that has moved."""
  tokens.check_positions(
    sum(cached.lengths(encoded)), loaded.model.config.max_positions
  )
  log_probs_of = functools.partial(
    cached.response_log_probs,
    encoded=encoded,
    batch_size=FLAGS.batch_size,
    mesh=mesh,
  )
  log_probs = log_probs_of(loaded.model, params)[:, 0]  # [N, T]
  counts = np.array([len(ids) for (ids,) in encoded.response_ids])
  mask = np.arange(log_probs.shape[1]) < counts[:, None]
  metrics = {
    f"{name} of logged replies": value
    for name, value in metrics_lib.perplexity(log_probs, mask).items()
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


# Reasoning: several samples of a question, each right or wrong.


def check_reasoning_flags(arms):
  """Raises ValueError if they do not fit together."""
  if FLAGS.metrics != ["reasoning"]:
    raise ValueError(
      f"--num_samples={FLAGS.num_samples} is for --metrics=reasoning, which "
      f"stands alone; got --metrics={','.join(FLAGS.metrics)}."
    )
  if FLAGS.num_samples < 2:
    raise ValueError(
      "--metrics=reasoning needs several --num_samples, got "
      f"{FLAGS.num_samples}."
    )
  if not FLAGS.stop_at_eos and not FLAGS.stop_strings:
    raise ValueError(
      "A response that does not end is never right, and nothing ends one: "
      "give --stop_at_eos or --stop_strings."
    )
  if FLAGS.reward_model:
    raise ValueError(
      "--reward_model does not say what is right: leave the score to --task, "
      "and give --rerank_model."
    )
  for k in FLAGS.k:
    if not k.isdecimal() or not 1 <= int(k) <= FLAGS.num_samples:
      raise ValueError(
        f"--k must be numbers from 1 to --num_samples={FLAGS.num_samples}, "
        f"got {k!r}."
      )
  if FLAGS.new_vs and FLAGS.new_vs_samples:
    raise ValueError("Give --new_vs or --new_vs_samples, not both.")
  if FLAGS.new_vs and FLAGS.new_vs not in arms:
    raise ValueError(
      f"--new_vs must be one of {', '.join(arms)}, got {FLAGS.new_vs}."
    )
  if len({file_name(label) for label in arms}) < len(arms):
    raise ValueError(
      f"The labels {', '.join(arms)} would share files; give others."
    )


def compare_reasoning(arms, rows, score, mesh):
  """Draws the samples of all policies, and sets them beside each other."""
  references = {label: references_of(label, arms[label]) for label in arms}
  if isinstance(rows[0].prompt, str):
    _, (parts,) = score([rows[0].prompt], [""])  # What does it speak of?
    if not {"is_correct", "answer"} <= parts.keys():
      raise ValueError(
        "--metrics=reasoning needs a task whose score says is_correct and "
        f"answer; {FLAGS.task}'s says {', '.join(parts) or 'nothing'}."
      )
  reranker = None
  if FLAGS.rerank_model:
    reranker = scorers.scorer(
      "",
      {},
      FLAGS.rerank_model,
      transform=FLAGS.reward_transform,
      template=FLAGS.reward_template,
      max_length=FLAGS.reward_length,
      batch_size=FLAGS.batch_size,
      mesh=mesh,
    )
  from_file = read_known() if FLAGS.new_vs_samples else None
  # Models one after another, then what they wrote, a policy at a time.
  asked, files = None, {}
  for label, names in arms.items():
    for seed, name in enumerate(names):
      found, files[label, seed] = draw(name, label, seed, rows, score, mesh)
      if asked not in (None, found):
        raise ValueError(
          f"{name} was left {len(found)} prompts that are not those of "
          "another policy; give --too_long=cut or a larger "
          "--max_prompt_length."
        )
      asked = found
  prompts = [row.prompt for row in asked]
  known, num_known = None, 0
  if FLAGS.new_vs or FLAGS.new_vs_samples:
    known = known_traces(arms, files, prompts, from_file)
    num_known = min(map(len, known))

  if processes.is_first():
    pathlib.Path(FLAGS.workdir, "samples.jsonl").unlink(missing_ok=True)
  columns = collections.defaultdict(list)  # Label -> by seed, name -> [N].
  with logs.Logs(FLAGS.workdir, total_steps=1, tensorboard=False) as log:
    note_repeated(prompts, log)
    for label, names in arms.items():
      for seed, name in enumerate(names):
        greedy, samples = map(files_lib.read_jsonl, files[label, seed])
        scores = None
        if reranker:
          scores, _ = reranker(
            [row["prompt"] for row in samples],
            [row["response"] for row in samples],
          )
        found, right = questions(
          greedy, samples, scores, None if label == FLAGS.new_vs else known
        )
        other = references[label][seed]
        if other:
          found |= trace_log_probs(other, asked, right, mesh)
        columns[label].append(found)
        about = {"arm": label, "model": name, "seed": seed}
        log.samples(0, ({**about, "greedy": True, **row} for row in greedy))
        log.samples(0, sample_records(about, samples, scores))
    write_reasoning(columns, prompts, num_known, log)
    training(arms, log)


def draw(name, label, seed, rows, score, mesh):
  """Draws what the workdir lacks of the greedy and the sampled responses.

  Returns:
    The rows that were asked, and the two files.
  """
  loaded = hf.load(name, dtype=FLAGS.dtype)
  params = place(loaded, mesh)
  encoded = encode(loaded.tokenizer, rows, FLAGS.too_long)
  # As they were asked: the task does not know of a chat template.
  as_asked = {row.place: row for row in rows}
  asked = [as_asked[row.place] for row in encoded.rows]
  if not all(isinstance(row.prompt, str) for row in asked):
    asked = encoded.rows
  files = []
  for kind, num_samples in (("greedy", 1), ("sampled", FLAGS.num_samples)):
    path = pathlib.Path(
      FLAGS.workdir, "samples", f"{file_name(label)}-{seed}-{kind}.jsonl"
    )
    is_greedy = kind == "greedy"
    made_of = cached.describe(
      encoded,
      params,
      loaded.tokenizer,
      config=loaded.model.config.to_hf(),
      asked=logged.fingerprint(asked),
      score=score.description,
      num_samples=num_samples,
      temperature=None if is_greedy else FLAGS.temperature,
      top_p=None if is_greedy else FLAGS.top_p,
      seed=None if is_greedy else FLAGS.seed,
      max_length=FLAGS.max_length,
      stop_at_eos=FLAGS.stop_at_eos,
      stop_strings=FLAGS.stop_strings,
      has_tags=bool(tags_of(name)),
      dtype=FLAGS.dtype,
    )
    processes.from_first(functools.partial(forget_others, path, made_of))
    samplers.collect(
      path,
      responder_of(
        name,
        loaded,
        encoded,
        mesh,
        greedy=is_greedy,
        num_samples=num_samples,
      ),
      params,
      [row.prompt for row in asked],
      score,
      progress=samplers.Progress(path.stem, len(asked)),
    )
    files.append(path)
  return asked, files


def file_name(label):
  """A label as part of a file's name."""
  return re.sub(r"[^\w.-]+", "_", label)


def forget_others(path, made_of):
  """Removes samples that were made of something else than what is named."""
  manifest = path.with_suffix(".json")
  text = json.dumps(made_of, indent=2, sort_keys=True, default=str) + "\n"
  if path.exists() and manifest.exists() and manifest.read_text() == text:
    return
  if path.exists():
    print(f"{path} is of another policy or other flags: drawn again.")
    path.unlink()
  # Before the first sample: no sample is ever beside another's manifest.
  path.parent.mkdir(parents=True, exist_ok=True)
  manifest.write_text(text)


def read_known():
  """The rows of a file of samples, of one policy."""
  name = FLAGS.new_vs_samples
  rows = files_lib.read_jsonl(name, required=("prompt", "response"))
  if len({row.get("arm") for row in rows}) > 1:
    raise ValueError(
      f"--new_vs_samples={name} holds several policies; name a file of one, "
      "such as those of samples/."
    )
  return [row for row in rows if not row.get("greedy")]


def known_traces(arms, files, prompts, rows):
  """Per prompt what the other policy wrote: by these rows, or by its files."""
  if rows is None:
    seeds = range(len(arms[FLAGS.new_vs]))
    rows = sum(
      (files_lib.read_jsonl(files[FLAGS.new_vs, s][1]) for s in seeds), []
    )
  written = collections.defaultdict(list)
  for row in rows:
    written[row["prompt"]].append(row["response"])
  for prompt in prompts:
    if prompt not in written:
      raise ValueError(
        f"--new_vs_samples={FLAGS.new_vs_samples} has no sample for the prompt "
        f"{prompt[:60]!r}."
      )
  return [written[prompt] for prompt in prompts]


def questions(greedy, samples, scores, known):
  """What the samples of one policy say of each question.

  Args:
    greedy: N rows.
    samples: N K rows.
    scores: `[N K]` of the classifier, or None.
    known: per question the texts of another policy, or None.

  Returns:
    Name to `[N]` numbers, and per question its different right traces.
  """
  columns, right = collections.defaultdict(list), []
  num_samples, key = FLAGS.num_samples, steps.KEYS[FLAGS.trace_key]
  for i, first in enumerate(greedy):
    group = slice(i * num_samples, (i + 1) * num_samples)
    texts = [row["response"] for row in samples[group]]
    parts = [row["parts"] for row in samples[group]]
    finished = [row["finished"] for row in samples[group]]
    answers = [part["answer"] for part in parts]
    # A response that did not end is wrong and does not vote; see `collect`.
    is_correct = [part["is_correct"] for part in parts]
    vote = functools.partial(
      metrics_lib.majority_vote, answers, is_correct, ties=FLAGS.ties
    )
    right.append(metrics_lib.correct_traces(texts, is_correct, key=key))
    found = {
      "greedy": first["parts"]["is_correct"],
      "correct": sum(is_correct),
      "vote": vote(),
      "unique": len(right[-1]),
      "unfinished": num_samples - sum(finished),
      "no_answer": sum(
        ended and answer is None
        for ended, answer in zip(finished, answers, strict=True)
      ),
      "characters": sum(map(len, texts)),
    }
    if scores is not None:
      found["rerank"] = metrics_lib.rerank(answers, is_correct, scores[group])
      if not FLAGS.reward_transform.startswith("raw"):  # Votes are >= 0.
        found["weighted_vote"] = vote(weights=scores[group])
    if "is_valid" in samples[0]["parts"]:
      is_valid = [part["is_valid"] for part in parts]
      found["valid"] = sum(is_valid)
      found["unique_valid"] = metrics_lib.unique_correct(
        texts, is_valid, key=key
      )
    if known is not None:
      found["new"], _ = metrics_lib.new_traces(
        texts, is_correct, known[i], key=key
      )
    for name, value in found.items():
      columns[name].append(value)
  return {n: np.array(values) for n, values in columns.items()}, right


def trace_log_probs(name, asked, right, mesh):
  """How likely another policy finds right traces, summed by question."""
  sums, counts = np.zeros(len(right)), np.zeros(len(right))
  rows = [
    dataclasses.replace(
      row,
      candidates=tuple(candidates),
      rewards=None,
      response_ids=None,
      place=str(i),
    )
    for i, (row, candidates) in enumerate(zip(asked, right, strict=True))
    if candidates
  ]
  if rows:
    loaded, params = reference_of(name, mesh)
    encoded = encode(loaded.tokenizer, rows, "skip")
    tokens.check_positions(
      sum(cached.lengths(encoded)), loaded.model.config.max_positions
    )
    log_probs = cached.response_log_probs(
      loaded.model, params, encoded, batch_size=FLAGS.batch_size, mesh=mesh
    )
    for row, candidates, found in zip(
      encoded.rows, encoded.response_ids, log_probs, strict=True
    ):
      counts[int(row.place)] = len(candidates)
      for ids, values in zip(candidates, found, strict=False):
        # Where no end token is drawn, it is not asked about.
        length = len(ids) if FLAGS.stop_at_eos else len(ids) - 1
        sums[int(row.place)] += values[:length].sum(dtype=np.float64)
  return {"trace_log_prob": sums, "scored_traces": counts}


@functools.lru_cache(maxsize=1)
def reference_of(name, mesh):
  """A model and its parameters on the mesh."""
  loaded = hf.load(name, dtype=FLAGS.dtype)
  return loaded, place(loaded, mesh)


def sample_records(about, samples, scores):
  """Lines for `samples.jsonl`, one after another."""
  for i, row in enumerate(samples):
    more = {} if scores is None else {"rerank_score": float(scores[i])}
    yield {**about, "greedy": False, **row, **more}


def reasoning_metrics(columns):
  """Metrics as ratios of sums over questions: name to parts and wholes."""
  num_samples = FLAGS.num_samples
  one = np.ones(len(columns["greedy"]))
  metrics = {
    "maj@1": (columns["greedy"], one),
    "p@1": (columns["correct"] / num_samples, one),
    f"maj@{num_samples}": (columns["vote"], one),
  }
  for name, title in (("rerank", "rerank"), ("weighted_vote", "weighted maj")):
    if name in columns:
      metrics[f"{title}@{num_samples}"] = columns[name], one
  for k in map(int, FLAGS.k or [num_samples]):
    passed = metrics_lib.pass_at_k(num_samples, columns["correct"], k)
    metrics[f"pass@{k}"] = passed, one
  metrics["solved"] = columns["correct"] > 0, one
  metrics["unique correct"] = columns["unique"], one
  if "valid" in columns:
    metrics["unique valid"] = columns["unique_valid"], one
    metrics["valid of correct"] = columns["valid"], columns["correct"]
  for name in ("no_answer", "unfinished", "characters"):
    metrics[name.replace("_", " ")] = columns[name] / num_samples, one
  if "new" in columns:
    metrics["new traces"] = columns["new"], columns["unique"]
  if "trace_log_prob" in columns:
    metrics["reference log-prob"] = (
      columns["trace_log_prob"],
      columns["scored_traces"],
    )
  return metrics


def write_reasoning(columns, prompts, num_known, log):
  """Tables and files of what was found, from label to columns by seed."""
  if not processes.is_first():
    return
  by_seed = {
    label: [reasoning_metrics(seed) for seed in seeds]
    for label, seeds in columns.items()
  }
  # Seeds answer the same questions: add them up first, then resample those.
  summed = {
    label: {
      name: tuple(sum(seed[name][i] for seed in seeds) for i in range(2))
      for name in seeds[0]
    }
    for label, seeds in by_seed.items()
  }
  first = next(iter(columns))
  table, differences, outcomes, single = {}, {}, {}, {}
  for label, metrics in summed.items():
    table[label] = {"seeds": len(columns[label])}
    differences[label], single[label] = {}, {}
    for name, (parts, wholes) in metrics.items():
      single[label][name] = [ratio(*seed[name]) for seed in by_seed[label]]
      table[label][name] = "-"
      if not np.any(wholes):
        continue
      table[label][name] = interval(metrics_lib.ratio_interval(parts, wholes))
      baseline = summed[first].get(name)
      if label != first and baseline and np.any(baseline[1]):
        differences[label][name] = interval(
          metrics_lib.ratio_interval(parts, wholes, baseline=baseline)
        )
    if "new traces" in metrics:
      table[label]["K' of new traces"] = num_known
    if label == first:
      continue
    for seed, found in enumerate(columns[label]):
      # Against the seed in its place, or the only one.
      other = seed % len(columns[first])
      counts, p_value = metrics_lib.mcnemar(
        found["greedy"], columns[first][other]["greedy"]
      )
      outcomes[f"{label} {seed}, {first} {other}"] = {
        "both right": counts["both"],
        "only the former": counts["only_first"],
        "only the latter": counts["only_second"],
        "neither": counts["neither"],
        "p (McNemar, exact)": p_value,
      }
  del differences[first]
  path = pathlib.Path(FLAGS.workdir, "metrics.json")
  path.write_text(json.dumps(single, indent=2, ensure_ascii=False) + "\n")
  files_lib.write_jsonl(
    path.with_name("questions.jsonl"),
    (
      {
        "index": i,
        "prompt": prompt,
        "policies": {
          label: [
            {
              "greedy": bool(seed["greedy"][i]),
              "correct": int(seed["correct"][i]),
              "vote": float(seed["vote"][i]),
            }
            for seed in seeds
          ]
          for label, seeds in columns.items()
        },
      }
      for i, prompt in enumerate(prompts)
    ),
  )
  # The summary comes last: where it is, everything is.
  settings = f"{FLAGS.num_samples} samples, temperature {FLAGS.temperature:g}"
  if differences:
    log.summary(
      differences,
      title=f"The same minus {first}, question by question",
      file="differences.json",
    )
    log.summary(
      outcomes, title="Greedy answers, by question", file="greedy.json"
    )
  log.summary(table, title=f"{title_of(prompts)}; {settings}")
  if 0 < num_known < 4 * FLAGS.num_samples:
    log.note(
      f"New traces are those that K' = {num_known} samples lack. That is less "
      f"than 4 K = {4 * FLAGS.num_samples}: many are new by chance alone."
    )


def ratio(parts, wholes):
  """Of two sums; None where there is nothing to divide by."""
  return float(np.sum(parts) / np.sum(wholes)) if np.any(wholes) else None


# Tables and curves.


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
      seeds = [curves.read_metrics(path).get(name) for path in paths]
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
    curves.read_metrics(path)
  )


if __name__ == "__main__":
  app.run(main)
