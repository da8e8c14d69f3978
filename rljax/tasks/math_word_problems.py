r"""Word problems with a known answer: GSM8K, SVAMP, and problems of MATH.

  Question: Natalia sold clips to 48 of her friends in April, and then ...
  Answer:
  Natalia sold 48/2 = 24 clips in May.
  Natalia sold 48+24 = 72 clips altogether in April and May.
  #### 72

A response is right if its final answer equals the known one. Numbers are
compared exactly, by integer arithmetic; anything else (6\times 7, \sqrt{4}) by
math-verify and sympy, in worker processes with limits, because a model's
expression may take forever: 9^{9^{9^9}}. No text of a model is ever executed.

Sources:
  Cobbe et al. (2021), "Training Verifiers to Solve Math Word Problems": GSM8K.
  Patel, Bhattamishra and Goyal (2021), "Are NLP Models really able to Solve
  Simple Math Word Problems?": SVAMP.
  Hendrycks et al. (2021), "Measuring Mathematical Problem Solving With the
  MATH Dataset".
"""

import collections
import dataclasses
import functools
import hashlib
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
from absl import logging

from rljax.tasks.answers import comparison, extraction, numbers
from rljax.text import files

SPLITS = ("train", "validation", "test")
DATASETS = ("gsm8k", "svamp", "math")
TEMPLATE = "Question: {question}\nAnswer:\n"

# Names that the files of a folder may have; the first one is taken.
_FILES = {
  "gsm8k": ("gsm8k_{split}.jsonl", "{split}.jsonl"),
  "svamp": ("svamp.json", "SVAMP.json"),
  "math": ("math_test_short500.jsonl", "math_test.jsonl", "test.jsonl"),
}

_MAX_STEPS = 2**14  # Characters of a response that are searched for steps.
_CACHE_SIZE = 2**16

# Verdicts on the cost of an answer, not on the answer.
_UNVERIFIED = ("too_long", "timeout", "memory", "died", "error")


@dataclasses.dataclass(frozen=True)
class _Row:
  """Holds a problem of a data set: question, answer and solution."""

  question: str
  truth: str
  solution: str  # With calculator notes; empty if there is no reasoning.


@dataclasses.dataclass(frozen=True)
class _Problem:
  """Holds what is remembered of a prompt."""

  truth: str
  question: str
  turn: str  # What precedes the next question, if a model asks one.
  results: tuple[str, ...] | None  # Of the reference's calculator notes.


# Bounded blanks: two unbounded runs next to each other take quadratic time.
_RESULT = re.compile(r"=[ ]{0,4}([-−]?[ ]?(?:\\?[$£€¥₹])?[0-9.][0-9.,/]{0,99})")
_NOTE = re.compile(r"<<.*?>>")

# Prompt -> problem, for all prompts of `prompts` and `supervised`.
_PROBLEMS: dict[str, _Problem] = {}


# Problems.


def prompts(
  split: str,
  seed: int,
  *,
  num: int | None = None,
  dataset: Literal["gsm8k", "svamp", "math"] = "gsm8k",
  data: str = "",
  template: str = TEMPLATE,
  shots: int = 0,
  notes: Literal["drop", "keep"] = "drop",
) -> list[str]:
  """Draws different prompts of a data set, shuffled by the seed.

  A smaller `num` gives the first of the same prompts. `score` only knows the
  answers of prompts that were drawn in this process.

  GSM8K and SVAMP keep a tenth of their training rows for validation: those
  whose questions have the lowest hashes. SVAMP is one file: the 30 % with the
  lowest hashes are its test split (300 of 1000), 70 rows are for validation and
  630 for training. MATH has only test rows.

  Args:
    split: "train", "validation" or "test".
    seed: of the order; >= 0.
    num: how many; None for all.
    dataset: "gsm8k", "svamp" or "math".
    data: a folder with gsm8k_train.jsonl, gsm8k_test.jsonl, svamp.json and
      math_test_short500.jsonl (those that are used); one such file, "{split}"
      in its name replaced; or "tfds:gsm8k".
    template: of a prompt, with "{question}" in it. A backslash and an n mean a
      line feed, for use in a flag.
    shots: worked examples of GSM8K's training split before the question, the
      same for all prompts, except that none is the prompt's own question.
    notes: see `supervised`; of the shots.

  Returns:
    `num` texts.

  Raises:
    ValueError: if an option is unknown, a file is missing or not as expected,
      there are fewer than `num` rows, the split may not be used so, or
      math-verify is not installed.
  """
  comparison.require_math_verify()
  return [
    prompt
    for prompt, _ in _drawn(
      split, seed, num, dataset, data, template, shots, notes
    )
  ]


def supervised(
  split: str,
  seed: int,
  *,
  num: int | None = None,
  dataset: Literal["gsm8k", "svamp", "math"] = "gsm8k",
  data: str = "",
  template: str = TEMPLATE,
  shots: int = 0,
  notes: Literal["drop", "keep"] = "drop",
) -> list[tuple[str, str]]:
  """Draws the prompts of `prompts` with GSM8K's own solutions.

  Args:
    split: see `prompts`; likewise `seed`, `num`, `data`, `template`, `shots`.
    seed: see `prompts`.
    num: see `prompts`.
    dataset: "gsm8k"; the others have no reasoning to learn from.
    data: see `prompts`.
    template: see `prompts`.
    shots: see `prompts`.
    notes: "drop" removes calculator notes such as <<48/2=24>> from the
      solutions, "keep" leaves them in.

  Returns:
    `num` pairs (prompt, response); responses end in a line "#### 72".

  Raises:
    ValueError: as `prompts`; or if the data set has no solutions.
  """
  if dataset in ("svamp", "math"):
    reason = {
      "svamp": "it has answers, but no reasoning text",
      "math": "it is for evaluation only",
    }[dataset]
    raise ValueError(
      f'dataset="{dataset}" has nothing to learn from: {reason}; '
      'dataset="gsm8k" has.'
    )
  drawn = _drawn(split, seed, num, dataset, data, template, shots, notes)
  return [(prompt, _written(row, notes)) for prompt, row in drawn]


# Scores.


def score(
  prompt: str,
  response: str,
  *,
  extract: Literal["flexible", "strict"] = "flexible",
) -> tuple[float, dict[str, Any]]:
  r"""Scores 1 for the right final answer, else 0.

  Three functions decide, each with a table of what it does: where the answer
  stands (`answers.extraction.extract`: "####", <answer>, \boxed{}, "answer
  is", else the last number), what it means (`answers.numbers.number`, over
  `answers.normalisation.normalise`: 1,560.0, 3/4, $5, forty-two) and whether it
  is the truth (`answers.comparison.compare`). Numbers are compared as exact
  rationals: 0.333333 is not 1/3. An answer that hedges ("42 or 43", two boxes),
  or whose words change it ("not 42", "less than 42", "42 dozen", "10 times
  42"), is none: to accept a wrong answer is worse than to refuse a right one.

  Other expressions of at most 200 characters are read by math-verify and
  compared by sympy, with 3 seconds and a gigabyte each, and are wrong if that
  is not enough, or not enough for a proof. A truth in words is compared as
  text.

  Args:
    prompt: one of `prompts`, drawn in this process.
    response: what the model wrote.
    extract: "flexible" for all rules, "strict" for only "####".

  Returns:
    1.0 or 0.0, and its parts:
      is_correct: bool.
      answer: str or None. Equal plain numbers have equal texts (a whole number,
        or a fraction in lowest terms such as "1/2"); what math-verify found
        equal to the truth has its text; other expressions are as written.
      truth: str, likewise.
      format: the rule that decided, or None.
      verdict: "exact" (by arithmetic), "verified" (by math-verify: equal or
        not), "none" (there is no usable answer), "too_long", "timeout",
        "memory", "died" or "error".
      has_answer: bool, whether there is an `answer`.
      is_unverified: bool, True for the last five verdicts.
      step_matches: for GSM8K, one bool per line of the response: whether a
        number after an equality sign in it is the result of a calculator note
        of the reference solution, each of which matches once.

  Raises:
    ValueError: if the prompt was never drawn, or the rule is unknown.
  """
  (value,), (parts,) = score_batch([prompt], [response], extract=extract)
  return value, parts


def score_batch(
  prompts: Sequence[str],
  responses: Sequence[str],
  *,
  extract: Literal["flexible", "strict"] = "flexible",
) -> tuple[list[float], list[dict[str, Any]]]:
  """Scores N responses, asking math-verify once for each different answer.

  Args:
    prompts: N texts.
    responses: N texts.
    extract: see `score`.

  Returns:
    N scores and N parts, see `score`.

  Raises:
    ValueError: as `score`.
  """
  if extract not in ("flexible", "strict"):
    raise ValueError(
      f'extract must be "flexible" or "strict", got {extract!r}.'
    )
  parts, unsettled = [], {}
  for prompt, response in zip(prompts, responses, strict=True):
    problem = _PROBLEMS.get(prompt)
    if problem is None:
      raise ValueError(
        "score only knows prompts that this process has drawn by `prompts` or "
        f"`supervised`, got {prompt[-60:]!r}."
      )
    is_number = numbers.number(problem.truth) == problem.truth
    said = extraction.extract(
      response,
      question=problem.question,
      turn=problem.turn,
      is_strict=extract == "strict",
      is_number=is_number,
    )
    rule = said.rule
    found, verdict = comparison.compare(problem.truth, said.text, rule or "")
    if found is None and verdict == "none" and rule in ("number", "line"):
      rule = None
    if verdict == "unsettled":
      unsettled.setdefault((problem.truth, found), []).append(len(parts))
    is_correct = verdict == "exact" and found == problem.truth
    part = {
      "is_correct": is_correct,
      "answer": found,
      "truth": problem.truth,
      "format": rule,
      "verdict": verdict,
      "has_answer": found is not None,
      "is_unverified": verdict == "too_long",
    }
    if problem.results is not None:
      part["step_matches"] = step_matches(problem.results, response)
    parts.append(part)
  if unsettled:
    verdicts = comparison.verify_all(list(unsettled))
    for (truth, found), (verdict, is_equal) in verdicts.items():
      answer = truth if is_equal else found if verdict == "verified" else None
      for i in unsettled[truth, found]:
        parts[i].update(
          is_correct=is_equal,
          answer=answer,
          verdict=verdict,
          has_answer=answer is not None,
          is_unverified=verdict in _UNVERIFIED,
        )
    unverified = collections.Counter(
      part["verdict"] for part in parts if part["is_unverified"]
    )
    if unverified:
      logging.warning(
        "%d of %d answers could not be verified, and count as wrong: %s.",
        unverified.total(),
        len(parts),
        ", ".join(f"{n} {name}" for name, n in sorted(unverified.items())),
      )
  return [float(part["is_correct"]) for part in parts], parts


def step_matches(results: Iterable[str], response: str) -> list[bool]:
  """Finds the lines of a response with a reference's intermediate results.

  Args:
    results: of the reference, as `number` writes them. Each matches once.
    response: text; a line's results are the numbers after equality signs. Those
      in the first 16384 characters count.

  Returns:
    One bool per line.

  Source:
    Havrilla et al. (2024), "Teaching Large Language Models to Reason with
    Reinforcement Learning": the dense heuristic reward.
  """
  left = list(results)
  matches = [False] * (response.count("\n") + 1)
  line = end = 0
  for match in _RESULT.finditer(response, 0, _MAX_STEPS):
    result = match[1]
    if result not in left:  # As it is written, to be quick.
      result = numbers.number(result)
      if result not in left:
        continue
    # Every result of a line is used up, also those that a later line repeats.
    left.remove(result)
    start = match.start()
    line += response.count("\n", end, start)
    end = start
    matches[line] = True
    if not left:
      break
  return matches


# Data.


def _drawn(
  split: str,
  seed: int,
  num: int | None,
  dataset: str,
  data: str,
  template: str,
  shots: int,
  notes: str,
) -> list[tuple[str, _Row]]:
  """Returns prompts with their rows, and remembers the prompts."""
  if notes not in ("drop", "keep"):
    raise ValueError(f'notes must be "drop" or "keep", got {notes!r}.')
  if seed < 0 or shots < 0 or (num or 0) < 0:
    raise ValueError(
      f"seed, shots and num must be >= 0, got {seed}, {shots} and {num}."
    )
  template = template.replace("\\n", "\n")
  if template.count("{question}") != 1:
    raise ValueError(f'template needs "{{question}}" once, got {template!r}.')
  rows = _rows_of_split(split, dataset, data)
  if num is not None and num > len(rows):
    raise ValueError(
      f"The {split} split of {dataset} has {len(rows)} prompts, but {num} were "
      "asked for."
    )
  examples = _examples(shots, data)
  turn = template.partition("{question}")[0].strip().rpartition("\n")[2]
  rng = np.random.default_rng([seed, SPLITS.index(split)])
  drawn = []
  for i in rng.permutation(len(rows))[:num]:
    row = rows[i]
    shown = [e for e in examples if e.question != row.question][:shots]
    prompt = "".join(
      f"{template.replace('{question}', e.question)}{_written(e, notes)}\n\n"
      for e in shown
    ) + template.replace("{question}", row.question)
    _remember(
      prompt,
      _Problem(
        row.truth,
        row.question,
        turn,
        _results(row.solution) if dataset == "gsm8k" else None,
      ),
    )
    drawn.append((prompt, row))
  return drawn


def _examples(shots: int, data: str) -> list[_Row]:
  """Returns rows to show, with a spare one to replace one that is asked."""
  if not shots:
    return []
  examples = _rows_of_split("train", "gsm8k", data)[: shots + 1]
  if len(examples) <= shots:
    raise ValueError(
      f"shots={shots} needs {shots + 1} training rows of gsm8k, but there are "
      f"{len(examples)}."
    )
  return examples


def _remember(prompt: str, problem: _Problem) -> None:
  known = _PROBLEMS.setdefault(prompt, problem)
  if known.truth != problem.truth:
    raise ValueError(
      f"The prompt {prompt[-60:]!r} has two answers: {known.truth} and "
      f"{problem.truth}."
    )
  # Of several solutions of one problem, the latest draw counts.
  _PROBLEMS[prompt] = problem


def _rows_of_split(split: str, dataset: str, data: str) -> list[_Row]:
  if split not in SPLITS:
    raise ValueError(
      f"The task math_word_problems has the splits {', '.join(SPLITS)}, got "
      f"{split!r}."
    )
  if dataset not in DATASETS:
    raise ValueError(
      f"dataset must be one of {', '.join(DATASETS)}, got {dataset!r}."
    )
  if dataset == "math" and split != "test":
    raise ValueError(
      'dataset="math" is for evaluation only: its rows are of the test split, '
      f"got {split!r}."
    )
  if not data:
    raise ValueError(
      "data is missing: give the folder with gsm8k_train.jsonl and the other "
      'files, or "tfds:gsm8k".'
    )
  if dataset == "math" or (dataset == "gsm8k" and split == "test"):
    return list(_rows(dataset, str(data), "test"))
  rows = sorted(_rows(dataset, str(data), "train"), key=_hash)
  if dataset == "svamp":
    num_test = len(rows) * 3 // 10
    if split == "test":
      return rows[:num_test]
    rows = rows[num_test:]
  num_validation = len(rows) // 10
  if split == "validation":
    return rows[:num_validation]
  return rows[num_validation:]


def _hash(row: _Row) -> bytes:
  return hashlib.sha256(row.question.encode()).digest()


@functools.lru_cache(8)
def _rows(dataset: str, data: str, split: str) -> tuple[_Row, ...]:
  """Returns the rows of a file, read once."""
  path = pathlib.Path(data)
  name = data
  if path.is_dir():
    names = [name.format(split=split) for name in _FILES[dataset]]
    names += [f"{name}.gz" for name in names]
    found = [name for name in names if (path / name).is_file()]
    if not found:
      raise ValueError(
        f"{path}: no file of {dataset} (looked for {', '.join(names)})."
      )
    name = str(path / found[0])
  read, fields = {
    "gsm8k": (_gsm8k_row, ("question", "answer")),
    "svamp": (_svamp_row, ("Body", "Question", "Answer")),
    "math": (_math_row, ("problem", "solution")),
  }[dataset]
  rows = []
  for i, row in enumerate(files.load_rows(name, split, required=fields)):
    try:
      rows.append(read(row))
    except (AttributeError, TypeError, ValueError) as error:
      raise ValueError(f"{name}, row {i + 1}: {error}") from error
  # A question that stands twice would be drawn twice, and on two sides of a
  # split.
  distinct = {}
  for row in rows:
    distinct.setdefault((row.question, str(row.truth)), row)
  if len(distinct) < len(rows):
    logging.warning(
      "%s: %d of %d questions stand there already, and are left out.",
      name,
      len(rows) - len(distinct),
      len(rows),
    )
  return tuple(distinct.values())


def _gsm8k_row(row: dict[str, Any]) -> _Row:
  solution, mark, answer = row["answer"].rpartition("####")
  truth = numbers.number(answer.strip())
  if not mark or truth is None:
    raise ValueError(f'expected "#### <number>", got {row["answer"][-60:]!r}.')
  return _Row(row["question"].strip(), truth, row["answer"].strip())


def _svamp_row(row: dict[str, Any]) -> _Row:
  truth = numbers.number(str(row["Answer"]))
  if truth is None:
    raise ValueError(f"Answer must be a number, got {row['Answer']!r}.")
  question = f"{row['Body'].strip()} {row['Question'].strip()}"
  return _Row(question, truth, "")


def _math_row(row: dict[str, Any]) -> _Row:
  answer = row.get("answer")
  if answer is None:
    _, mark, rest = row["solution"].rpartition("\\boxed")
    answer = extraction.braced(rest) if mark else ""
  truth = comparison.true_answer(answer)
  if not truth:
    raise ValueError(f"no answer in {row['solution'][-60:]!r}.")
  return _Row(row["problem"].strip(), truth, row["solution"])


def _written(row: _Row, notes: str) -> str:
  """Writes the solution of a row as a response."""
  return _NOTE.sub("", row.solution) if notes == "drop" else row.solution


@functools.lru_cache(_CACHE_SIZE)
def _results(solution: str) -> tuple[str, ...]:
  """Returns the results of a solution's calculator notes, in order."""
  found = (
    numbers.number(note[2:-2].rpartition("=")[2])
    for note in _NOTE.findall(solution)
  )
  return tuple(result for result in found if result is not None)
