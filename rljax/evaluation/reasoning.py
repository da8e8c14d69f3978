"""Reasoning by several samples of a question, each right or wrong.

A policy answers N questions: once greedily, and K times by its probabilities.

  counts, traces = reasoning.count(greedy, samples)       # by question, [N]
  ratios = reasoning.ratios(counts, num_samples=K, ks=[1, K])
  comparison = reasoning.compare({"sft": [counts], "ei": [others]}, ...)

A metric is a ratio of two sums over questions, such as the valid samples over
the right ones; its interval comes from resampled questions.
"""

import collections
import functools
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rljax.evaluation import metrics, tables
from rljax.text import files, steps

Row = Mapping[str, Any]
Counts = dict[str, np.ndarray]  # Name -> `[N]`, by question.
Ratio = tuple[np.ndarray, np.ndarray]  # Parts and wholes, `[N]` each.


def read_samples(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
  """Reads the samples of one policy from a file, without greedy responses.

  Raises:
    ValueError: if it is no file of samples, or one of several policies.
  """
  rows = files.read_jsonl(path, required=("prompt", "response"))
  if len({row.get("arm") for row in rows}) > 1:
    raise ValueError(
      f"--new_vs_samples={path} holds several policies; name a file of one, "
      "such as those of samples/."
    )
  return [row for row in rows if not row.get("greedy")]


def texts_by_prompt(
  rows: Iterable[Row], prompts: Sequence[str], *, name: str
) -> list[list[str]]:
  """Collects what a policy wrote to each prompt.

  Args:
    rows: samples, with `prompt` and `response`, in any order.
    prompts: N texts.
    name: of the samples, for messages.

  Returns:
    N lists of responses.

  Raises:
    ValueError: if a prompt has no sample.
  """
  written = collections.defaultdict(list)
  for row in rows:
    written[row["prompt"]].append(row["response"])
  for prompt in prompts:
    if prompt not in written:
      raise ValueError(f"{name} has no sample for the prompt {prompt[:60]!r}.")
  return [written[prompt] for prompt in prompts]


def count(
  greedy: Sequence[Row],
  samples: Sequence[Row],
  *,
  scores: np.ndarray | None = None,
  scores_vote: bool = True,
  known: Sequence[Sequence[str]] | None = None,
  ties: str = "expected",
  trace_key: str = "text",
) -> tuple[Counts, list[list[str]]]:
  """Counts what the samples of a policy are like, question by question.

  A response that did not end is wrong and does not vote, as
  `responders.collect` has it.

  Args:
    greedy: N rows of `responders.collect`, whose score says `is_correct`.
    samples: N K rows, whose score says `is_correct` and `answer`.
    scores: `[N K]` of a classifier, by which samples are ranked; None: none.
    scores_vote: whether the scores are >= 0, and weigh votes.
    known: per question what another policy wrote; None: nothing is new.
    ties: of votes, see `metrics.majority_vote`.
    trace_key: what makes two traces the same, of `steps.KEYS`.

  Returns:
    By question: "greedy", "vote" and, with scores, "rerank" and
    "weighted_vote", how right each of them is; the numbers of samples that are
    "correct", "unfinished", or have "no_answer", and of their "characters"; the
    number of different right traces, "unique", and of those that are "new".
    Where the score says `is_valid`: "valid" samples and "unique_valid" ones.
    And the different right traces.
  """
  key = steps.KEYS[trace_key]
  num_samples = len(samples) // len(greedy)
  columns, traces = collections.defaultdict(list), []
  for i, first in enumerate(greedy):
    group = slice(i * num_samples, (i + 1) * num_samples)
    texts = [row["response"] for row in samples[group]]
    parts = [row["parts"] for row in samples[group]]
    finished = [row["finished"] for row in samples[group]]
    answers = [part["answer"] for part in parts]
    is_correct = [part["is_correct"] for part in parts]
    vote = functools.partial(
      metrics.majority_vote, answers, is_correct, ties=ties
    )
    traces.append(metrics.correct_traces(texts, is_correct, key=key))
    found = {
      "greedy": first["parts"]["is_correct"],
      "correct": sum(is_correct),
      "vote": vote(),
      "unique": len(traces[-1]),
      "unfinished": num_samples - sum(finished),
      "no_answer": sum(
        ended and answer is None
        for ended, answer in zip(finished, answers, strict=True)
      ),
      "characters": sum(map(len, texts)),
    }
    if scores is not None:
      found["rerank"] = metrics.rerank(answers, is_correct, scores[group])
      if scores_vote:
        found["weighted_vote"] = vote(weights=scores[group])
    if "is_valid" in samples[0]["parts"]:
      is_valid = [part["is_valid"] for part in parts]
      found["valid"] = sum(is_valid)
      found["unique_valid"] = metrics.unique_correct(texts, is_valid, key=key)
    if known is not None:
      found["new"], _ = metrics.new_traces(texts, is_correct, known[i], key=key)
    for name, value in found.items():
      columns[name].append(value)
  return {name: np.array(column) for name, column in columns.items()}, traces


def trace_log_probs(
  log_probs: Sequence[Sequence[np.ndarray]], *, with_end: bool
) -> Counts:
  """Sums how likely another policy finds the right traces of each question.

  Args:
    log_probs: per question and trace an array of one entry a token, in nats.
    with_end: whether the last token, the end of the trace, counts.

  Returns:
    "trace_log_prob", the sum over all traces, and "scored_traces", their
    number.
  """
  last = None if with_end else -1
  sums = [
    sum(trace[:last].sum(dtype=np.float64) for trace in traces)
    for traces in log_probs
  ]
  counts = [len(traces) for traces in log_probs]
  return {
    "trace_log_prob": np.array(sums, np.float64),
    "scored_traces": np.array(counts, np.float64),
  }


def ratios(
  counts: Counts, *, num_samples: int, ks: Sequence[int] = ()
) -> dict[str, Ratio]:
  """Makes metrics of the counts of one policy.

  Args:
    counts: of `count`, and of `trace_log_probs` if there are any.
    num_samples: K.
    ks: numbers of samples of pass@k; none: K.

  Returns:
    Metric to its parts and wholes by question: it is the sum of the former over
    the sum of the latter.
  """
  one = np.ones(len(counts["greedy"]))
  found = {
    "maj@1": (counts["greedy"], one),
    "p@1": (counts["correct"] / num_samples, one),
    f"maj@{num_samples}": (counts["vote"], one),
  }
  for name, title in (("rerank", "rerank"), ("weighted_vote", "weighted maj")):
    if name in counts:
      found[f"{title}@{num_samples}"] = counts[name], one
  for k in ks or [num_samples]:
    passed = metrics.pass_at_k(num_samples, counts["correct"], k)
    found[f"pass@{k}"] = passed, one
  found["solved"] = counts["correct"] > 0, one
  found["unique correct"] = counts["unique"], one
  if "valid" in counts:
    found["unique valid"] = counts["unique_valid"], one
    found["valid of correct"] = counts["valid"], counts["correct"]
  for name in ("no_answer", "unfinished", "characters"):
    found[name.replace("_", " ")] = counts[name] / num_samples, one
  if "new" in counts:
    found["new traces"] = counts["new"], counts["unique"]
  if "trace_log_prob" in counts:
    found["reference log-prob"] = (
      counts["trace_log_prob"],
      counts["scored_traces"],
    )
  return found


class Comparison(NamedTuple):
  """Policies beside each other, each label with all of its seeds.

  Attributes:
    by_seed: label to metric to a number for each seed; None for 0 / 0.
    table: label to columns, with intervals over questions.
    differences: likewise, of every label but the first, minus the first.
    greedy: pair of seeds to who answered which questions right.
  """

  by_seed: dict[str, dict[str, list[float | None]]]
  table: dict[str, dict[str, Any]]
  differences: dict[str, dict[str, str]]
  greedy: dict[str, dict[str, Any]]


def compare(
  counts: Mapping[str, Sequence[Counts]],
  *,
  num_samples: int,
  ks: Sequence[int] = (),
  num_known: int = 0,
) -> Comparison:
  """Sets policies that answered the same questions beside each other.

  Args:
    counts: label to the counts of each seed; the others are held against the
      first label.
    num_samples: see `ratios`, likewise `ks`.
    ks: numbers of samples of pass@k.
    num_known: K', samples of a question that make a trace known.
  """
  by_seed = {
    label: [ratios(seed, num_samples=num_samples, ks=ks) for seed in seeds]
    for label, seeds in counts.items()
  }
  # Seeds answer the same questions: add them up first, then resample those.
  summed = {
    label: {
      name: tuple(sum(seed[name][i] for seed in seeds) for i in range(2))
      for name in seeds[0]
    }
    for label, seeds in by_seed.items()
  }
  first = next(iter(summed))
  numbers, table, differences = {}, {}, {}
  for label, found in summed.items():
    numbers[label] = {}
    table[label] = {"seeds": len(by_seed[label])}
    if label != first:
      differences[label] = {}
    for name, (parts, wholes) in found.items():
      numbers[label][name] = [_ratio(*seed[name]) for seed in by_seed[label]]
      table[label][name] = "-"
      if not np.any(wholes):
        continue
      table[label][name] = tables.interval(
        metrics.ratio_interval(parts, wholes)
      )
      baseline = summed[first].get(name)
      if label != first and baseline and np.any(baseline[1]):
        differences[label][name] = tables.interval(
          metrics.ratio_interval(parts, wholes, baseline=baseline)
        )
    if "new traces" in found:
      table[label]["K' of new traces"] = num_known
  return Comparison(numbers, table, differences, _greedy(counts))


def notes(num_known: int, num_samples: int) -> list[str]:
  """Returns a sentence if traces are known by too few samples.

  Args:
    num_known: K', samples of a question that make a trace known; 0: none.
    num_samples: K, samples of which some are new.
  """
  if not 0 < num_known < 4 * num_samples:
    return []
  return [
    f"New traces are those that K' = {num_known} samples lack. That is less "
    f"than 4 K = {4 * num_samples}: many are new by chance alone."
  ]


def _greedy(counts):
  """Who answered which questions right, each seed against one of the first."""
  first, *others = counts
  outcomes = {}
  for label in others:
    for seed, found in enumerate(counts[label]):
      # Against the seed in its place, or the only one.
      other = seed % len(counts[first])
      both, p_value = metrics.mcnemar(
        found["greedy"], counts[first][other]["greedy"]
      )
      outcomes[f"{label} {seed}, {first} {other}"] = {
        "both right": both["both"],
        "only the former": both["only_first"],
        "only the latter": both["only_second"],
        "neither": both["neither"],
        "p (McNemar, exact)": p_value,
      }
  return outcomes


def _ratio(parts, wholes):
  """Of two sums; None where there is nothing to divide by."""
  return float(np.sum(parts) / np.sum(wholes)) if np.any(wholes) else None


def sample_rows(
  about: Row,
  greedy: Iterable[Row],
  samples: Iterable[Row],
  scores: np.ndarray | None = None,
) -> Iterator[dict[str, Any]]:
  """Yields rows for `samples.jsonl`: greedy ones, then samples with scores.

  Args:
    about: what stands in all of them, such as the label.
    greedy: N rows.
    samples: N K rows.
    scores: `[N K]` of a classifier, or None.
  """
  for row in greedy:
    yield {**about, "greedy": True, **row}
  for i, row in enumerate(samples):
    more = {} if scores is None else {"rerank_score": float(scores[i])}
    yield {**about, "greedy": False, **row, **more}


def write(
  folder: str | os.PathLike[str],
  counts: Mapping[str, Sequence[Counts]],
  prompts: Sequence[str],
  by_seed: Mapping[str, Any],
) -> None:
  """Writes `metrics.json`, numbers by seed, and `questions.jsonl`.

  Args:
    folder: where they go.
    counts: label to the counts of each seed.
    prompts: N texts.
    by_seed: of a `Comparison`.
  """
  text = json.dumps(by_seed, indent=2, ensure_ascii=False) + "\n"
  pathlib.Path(folder, "metrics.json").write_text(text, encoding="utf-8")
  files.write_jsonl(
    pathlib.Path(folder, "questions.jsonl"),
    (
      {
        "index": i,
        "prompt": prompt,
        "policies": {
          label: [_question(seed, i) for seed in seeds]
          for label, seeds in counts.items()
        },
      }
      for i, prompt in enumerate(prompts)
    ),
  )


def _question(counts, i):
  """What a policy makes of one question."""
  return {
    "greedy": bool(counts["greedy"][i]),
    "correct": int(counts["correct"][i]),
    "vote": float(counts["vote"][i]),
  }
