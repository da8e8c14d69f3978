"""Evaluates policies on the same prompts, beside each other.

The arms of the arithmetic study; a label given twice is another seed of it:
  python experiments/evaluate.py --workdir=runs/evaluation \
    --policies=start=runs/sft,none=runs/none,batch=runs/batch \
    --task=arithmetic --task_options=style=last --max_length=1 --nostop_at_eos

Replies to the prompts of a file, scored by a classifier, as texts and beside
the logged ones; the metric perplexity says how likely --reference finds them:
  python experiments/evaluate.py --workdir=runs/evaluation \
    --policies=reference=runs/reference,a_lol=runs/a_lol/best \
    --data=test.jsonl --reward_model=runs/reward_model --metrics=text,log \
    --reference=runs/reference --max_length=128

Reasoning by 32 samples of a question and a greedy one: how many are right, how
their vote is, and what is among them that the first policy does not write:
  python experiments/evaluate.py --workdir=runs/evaluation \
    --policies=sft=runs/sft,ei=runs/ei,ei=runs/ei_1 --task=merge_sums \
    --max_length=24 --num_samples=32 --k=1,8,32 --temperature=0.7 \
    --reference=runs/sft --new_vs=sft --rerank_model=runs/outcome_reward_model

Writes every response with its score (`samples.jsonl`), the table
(`summary.json`), and, for policies that were trained by rewards, their learning
curves (`arms.png`). Of reasoning also every metric by seed (`metrics.json`),
what differs from the first policy (`differences.json`, `greedy.json`), and
every question by itself (`questions.jsonl`). Its samples are kept under
`samples/`: started again, it draws what is missing, or of a changed policy.
"""

import functools
import os

from absl import flags

from rljax import cli, tasks
from rljax.distributed import meshes, processes
from rljax.evaluation import arms, curves, reasoning, replies, tables
from rljax.generation import forced, responses, samplers
from rljax.models import hf
from rljax.scoring import drawn, likelihood
from rljax.text import encoding, files, keywords, logged, prompts
from rljax.training import origins, runs

METRICS = ("answers", "text", "perplexity", "log", "reasoning")

# Flags that scripts share; rljax/cli has their help and their bounds.
cli.define_run(save_every=None, logs=False)
cli.define_task()
cli.define_lengths(max_response_length=512, too_long="error")
cli.define_reward_model()
cli.define_compute(remat=False)
cli.define_sampler(max_length=256, num_samples=1)
cli.define_ends()
cli.define_reasoning()

# Flags of an evaluation.
flags.DEFINE_list(
  "policies",
  None,
  "Policies, label=model, separated by commas: workdirs, Hugging Face "
  "directories, packaged models, GGUF files or hub names. A label given twice "
  "is another seed of it; a model alone is its own label.",
  required=True,
)
flags.DEFINE_string(
  "data",
  "",
  "Prompts, answered or not: a .jsonl or .json file, a folder of splits or "
  "tfds:<name>; docs/data.md shows the fields. Empty: the task's prompts.",
)
flags.DEFINE_string(
  "split", "test", "Split of the task or of --data whose prompts are asked."
)
flags.DEFINE_integer("num_prompts", 2000, "Prompts to ask, the first ones.", 1)
flags.DEFINE_integer(
  "batch_size", 256, "Texts that are written or read at the same time.", 1
)
flags.DEFINE_bool(
  "greedy",
  True,
  "Whether the likeliest token is taken everywhere; false samples. "
  "--metrics=reasoning does both.",
)
flags.DEFINE_bool(
  "forced_tags",
  True,
  "Whether return-conditioned policies are given the tags they bring along.",
)
flags.DEFINE_list(
  "metrics",
  [],
  f"What is measured beside the reward: some of {', '.join(METRICS)}. Empty: "
  "reasoning with several samples, text with a reward model, else answers.",
)
flags.DEFINE_list(
  "reference",
  [],
  "Models that say how likely responses are, for the metrics perplexity, log "
  "and reasoning: one for all policies, or one for each seed.",
)
flags.DEFINE_float(
  "clip_epsilon",
  0.9,
  "Bound ε in [0, 1] of the metric log, which counts ratios to --reference "
  "outside of 1 - ε and 1 + ε; 0: ratios are not clipped, none is counted.",
  0,
  1,
)
cli.require_prompts("reward_model")
FLAGS = flags.FLAGS


def main():
  seeds = arms.read(FLAGS.policies, FLAGS.reference)
  measured = check_flags(seeds)
  run = runs.start(FLAGS, trains=False)
  meshes.check_divisible(FLAGS.batch_size, run.mesh, "--batch_size")
  score = cli.load_scorer(FLAGS, run.mesh, batch_size=FLAGS.batch_size)
  read = logged.load_or_draw if "log" in measured else logged.load_or_ask
  options = keywords.parse(FLAGS.task_options) | {"num": FLAGS.num_prompts}
  task = cli.load_task(FLAGS)
  loaded = read(FLAGS.data, task, FLAGS.split, FLAGS.seed, options)
  run.has_read(loaded)
  rows = logged.first_replies(loaded.rows[: FLAGS.num_prompts])
  for name in arms.models(seeds):  # Before hours go into the first of them.
    hf.load_config(name)
  if measured == ["reasoning"]:
    compare_reasoning(run, seeds, rows, score)
  else:
    compare_replies(run, seeds, rows, score, measured)


def compare_replies(run, seeds, rows, score, measured):
  """One reply of every policy to each prompt."""
  found, samples, first_asked = {seed.label: [] for seed in seeds}, [], None
  for seed in seeds:
    asked, texts, replied, likely = reply(run, seed, rows, measured)
    arms.check_same_rows(seed.model, asked, first_asked)
    first_asked = asked
    scores, parts = score(texts, replied)
    found[seed.label].append((scores, parts, texts, replied, likely))
    samples += [
      {"arm": seed.label, "model": seed.model, **record}
      for record in responses.records(texts, replied, scores, parts)
    ]
  table, rewards = {}, {}
  for label, several in found.items():
    scores, parts, texts, replied, likely = zip(*several, strict=True)
    table[label] = replies.rewards(scores, parts)
    if "answers" in measured:
      table[label] |= replies.answers(parts, replied)
    if "text" in measured:
      table[label] |= tables.mean_and_range(map(replies.words, texts, replied))
    table[label] |= tables.mean_and_range(likely)
    # Seeds answer the same prompts: average them first, then resample prompts.
    rewards[label] = replies.mean_scores(scores)
    if label != seeds[0].label:
      table[label][f"reward - {seeds[0].label}"] = tables.interval(
        replies.paired_interval(rewards[label], rewards[seeds[0].label])
      )
  with run.reporting():
    run.samples(0, samples)
    show_training(run, seeds)
    finish(run, table, texts[-1])


def compare_reasoning(run, seeds, rows, score):
  """K samples of every policy for each question, and a greedy response."""
  if isinstance(rows[0].prompt, str):
    _, parts = score([rows[0].prompt], [""])  # What does it speak of?
    tasks.check_parts(score.description, parts, "is_correct", "answer")
  arms.check_file_names(seeds)
  rerank = cli.load_reward_model(
    FLAGS, run.mesh, batch_size=FLAGS.batch_size, name="rerank_model"
  )
  known, num_known = [], 0
  if FLAGS.new_vs_samples:
    known = reasoning.read_samples(FLAGS.new_vs_samples)
  # Models one after another, then what they wrote, a policy at a time.
  written, asked = {}, None
  for seed in seeds:
    others, (asked, texts, written[seed]) = asked, draw(run, seed, rows, score)
    arms.check_same_rows(seed.model, asked, others)
    if seed.label == FLAGS.new_vs:
      known += files.read_jsonl(written[seed][1])
  if FLAGS.new_vs or FLAGS.new_vs_samples:
    source = f"--new_vs_samples={FLAGS.new_vs_samples}"
    known = reasoning.texts_by_prompt(known, texts, name=source)
    num_known = min(map(len, known))

  counts = {seed.label: [] for seed in seeds}
  with run.reporting():
    for seed in seeds:
      greedy, samples = map(files.read_jsonl, written[seed])
      scores = None
      if rerank:
        scores, _ = rerank(
          [row["prompt"] for row in samples],
          [row["response"] for row in samples],
        )
      found, traces = reasoning.count(
        greedy,
        samples,
        scores=scores,
        scores_vote=not FLAGS.reward_transform.startswith("raw"),
        known=None if seed.label == FLAGS.new_vs else known or None,
        ties=FLAGS.ties,
        trace_key=FLAGS.trace_key,
      )
      if seed.reference:  # Where no end token is drawn, it is not asked about.
        found |= reasoning.trace_log_probs(
          log_probs(run, seed.reference, asked, traces, too_long="skip"),
          with_end=FLAGS.stop_at_eos,
        )
      counts[seed.label].append(found)
      about = {"arm": seed.label, "model": seed.model, "seed": seed.number}
      run.samples(0, reasoning.sample_rows(about, greedy, samples, scores))
    if not processes.is_first():
      return
    show_training(run, seeds)
    ks = [int(k) for k in FLAGS.k]
    compared = reasoning.compare(
      counts, num_samples=FLAGS.num_samples, ks=ks, num_known=num_known
    )
    reasoning.write(run.workdir, counts, texts, compared.by_seed)
    if compared.differences:
      title = f"The same minus {seeds[0].label}, question by question"
      run.finish(compared.differences, title=title, file="differences.json")
      title = "Greedy answers, by question"
      run.finish(compared.greedy, title=title, file="greedy.json")
    for note in reasoning.notes(num_known, FLAGS.num_samples):
      run.note(note)
    title = f"{FLAGS.num_samples} samples, temperature {FLAGS.temperature:g}"
    finish(run, compared.table, texts, title)


def ask(run, seed, rows):
  """A policy on the mesh, what it is asked as ids, and as scored prompts."""
  policy = run.place_model(hf.load(seed.model, **cli.model_options(FLAGS)))
  encoded = encoding.prepare(
    policy.tokenizer, rows, **cli.length_options(FLAGS)
  )
  templated = bool(FLAGS.reward_model)
  return policy, encoded, prompts.of_rows(rows, encoded, templated=templated)


def responder(run, seed, policy, asked, settings):
  """What answers prompts, --batch_size texts at a time."""
  task, mesh = cli.load_task(FLAGS), run.mesh
  sampler = samplers.Sampler(
    policy.model, policy.tokenizer, settings, mesh=mesh, task=task
  )
  tags = forced.load(seed.model) if FLAGS.forced_tags else {}
  num_together = FLAGS.batch_size // settings.num_samples
  return sampler.responder(
    asked, batch_size=meshes.shared_size(num_together, mesh), **tags
  )


def reply(run, seed, rows, measured):
  """Rows, prompts and replies of a policy, and how likely replies are."""
  policy, encoded, asked = ask(run, seed, rows)
  answer = responder(run, seed, policy, asked, cli.sampler_settings(FLAGS))
  likely = {}
  if "log" in measured:
    models = [policy]
    if seed.reference:
      models.append(load_reference(run, seed.reference))
      origins.check_same_tokens(
        f"--reference={models[1].source}", *models[::-1]
      )
    sizes = {"batch_size": FLAGS.batch_size, "mesh": run.mesh}
    likely |= replies.logged(
      *(likelihood.of_replies(model, encoded, **sizes) for model in models),
      clip_epsilon=FLAGS.clip_epsilon,
    )
  texts, given = answer(policy.params), encoding.as_given(rows, encoded)
  if "perplexity" in measured:
    candidates = [[text] if text else [] for text in texts]
    likely |= replies.perplexity(
      log_probs(run, seed.reference, given, candidates, too_long="error"),
      of="under the reference",
      with_end=False,
    )
  return given, asked.texts, texts, likely


def draw(run, seed, rows, score):
  """Rows, prompts, and files of greedy responses and samples, drawn once."""
  policy, encoded, asked = ask(run, seed, rows)
  given = encoding.as_given(rows, encoded)
  run.file_flags()
  paths, sampled = [], cli.sampler_settings(FLAGS, greedy=False)
  greedy = sampled._replace(greedy=True, num_samples=1)
  for kind, settings in (("greedy", greedy), ("sampled", sampled)):
    name = f"{seed.file_name}-{kind}.jsonl"
    paths.append(os.path.join(run.workdir, "samples", name))
    answer = responder(run, seed, policy, asked, settings)
    more = {"settings": settings, "dtype": FLAGS.dtype}
    drawn.collect(paths[-1], answer, policy, encoded, given, score, **more)
  return given, asked.texts, paths


@functools.lru_cache(maxsize=1)
def load_reference(run, name):
  """A reference, which several policies have."""
  return run.place_model(hf.load(name, **cli.model_options(FLAGS)))


def log_probs(run, name, rows, texts, *, too_long):
  """Log-probabilities of texts under a reference, by row and text."""
  return likelihood.of_texts(
    load_reference(run, name),
    rows,
    texts,
    batch_size=FLAGS.batch_size,
    mesh=run.mesh,
    **cli.length_options(FLAGS) | {"too_long": too_long},
  )


def show_training(run, seeds):
  """The learning curves of the policies, and where they ended."""
  histories = arms.histories(seeds)
  if ends := arms.tails(histories, num_steps=50):
    title = "Samples of the last 50 steps: mean and range over seeds"
    run.finish(ends, title=title, file="training.json")
  if histories and processes.is_first():
    picture = os.path.join(run.workdir, "arms.png")
    curves.compare(histories, picture, curves.ARM_PANELS)
    run.note(f"Learning curves: {picture}")


def finish(run, table, texts, *more):
  """The summary, which comes last: where it is, everything is."""
  for note in arms.notes(texts):
    run.note(note)
  source = FLAGS.data or f"{FLAGS.task}, {FLAGS.split}"
  title = f"{source}: {len(texts)} prompts, mean and 95 % bootstrap interval"
  run.finish(table, title="; ".join([f"{title} over prompts", *more]))


def check_flags(seeds):
  """Returns what is measured; raises ValueError for flags that do not fit."""
  several = FLAGS.num_samples > 1
  default = "text" if FLAGS.reward_model or FLAGS.rewards else "answers"
  measured = FLAGS.metrics or ["reasoning" if several else default]
  unknown = ", ".join(sorted(set(measured) - set(METRICS)))
  is_reasoning = measured == ["reasoning"]
  labels = dict.fromkeys(seed.label for seed in seeds)
  for is_wrong, message in (
    (
      unknown,
      f"--metrics must be some of {', '.join(METRICS)}, got {unknown}.",
    ),
    (
      "perplexity" in measured and not FLAGS.reference,
      "--metrics=perplexity needs a --reference to say how likely replies are.",
    ),
    (
      (several or "reasoning" in measured) and not (several and is_reasoning),
      "--metrics=reasoning stands alone and needs several --num_samples, only "
      f"for it; got {FLAGS.num_samples} and --metrics={','.join(measured)}.",
    ),
    (
      is_reasoning and not cli.has_end(FLAGS),
      "A response that does not end is never right, and nothing ends one: "
      "give --stop_at_eos or --stop_strings.",
    ),
    (
      is_reasoning and FLAGS.reward_model,
      "--reward_model does not say what is right: leave the score to --task, "
      "and give --rerank_model.",
    ),
    (
      FLAGS.new_vs and FLAGS.new_vs not in labels,
      f"--new_vs must be one of {', '.join(labels)}, got {FLAGS.new_vs}.",
    ),
  ):
    if is_wrong:
      raise ValueError(message)
  return measured


if __name__ == "__main__":
  cli.run(main)
