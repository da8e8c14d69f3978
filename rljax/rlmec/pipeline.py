"""Rewrites of wrong solutions by a language model, in two calls.

The model is asked which step is the first wrong one. Its rewrite is then
started with the steps before that one, so that it begins as the solution does.
The same two calls serve a teacher and a generative reward model.

Source:
  Chen et al. (2024), "Improving Large Language Models via Fine-grained
  Reinforcement Learning with Minimum Editing Constraint". Departures: the
  number of a step is read whole; a step that does not exist keeps nothing;
  blanks after the kept steps are as in the solution.
"""

import functools
import hashlib
import json
import os
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from rljax.distributed import processes
from rljax.generation import samplers
from rljax.ops import sampling
from rljax.rlmec import prompts as prompts_lib
from rljax.storage import stages
from rljax.text import batches, files, keywords, tokens
from rljax.text import steps as steps_lib

Rows = list[dict[str, Any]]
Score = Callable[..., tuple[np.ndarray, list[dict[str, Any]]]]

_SETTINGS = "rewriting.json"


class Stopped(Exception):
  """Signals a stop between two batches; all results so far are on disk."""


def digest(values: Any) -> str:
  """Returns the SHA-256 of values that `json` can write, such as texts."""
  return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def values(flags: Any, *names: str) -> dict[str, Any]:
  """Returns the values of flags by name, as the inputs of a stage."""
  return {name: flags[name].value for name in names}


def shown(facts: Mapping[str, Any]) -> str:
  """Formats the numbers that a stage was finished with as one line."""
  return ", ".join(
    f"{value:.3g} {name}" if isinstance(value, float) else f"{value} {name}"
    for name, value in facts.items()
    if isinstance(value, int | float) and name != "finished_at"
  )


def stage(
  workdir: str | os.PathLike[str], name: str, inputs: Mapping[str, Any]
) -> stages.Stage:
  """Opens a stage that all processes share and process 0 writes.

  All must call it and its `finish`, which waits for process 0; see
  `stages.Stage`.
  """
  processes.check_same(f"The inputs of the stage {name}", dict(inputs))
  return stages.Stage(workdir, name, inputs, once=processes.from_first)


def sample(
  workdir: str | os.PathLike[str],
  make_responder: Callable[..., samplers.Responder],
  params: Any,
  prompts: Sequence[str],
  score: Score,
  *,
  seed: int,
  should_stop: Callable[[], bool] = lambda: False,
  **settings: Any,
) -> stages.Stage:
  """Runs the stage of samples: draws a policy's answers and scores them.

  Two scripts that call it with the same arguments share its files.

  Args:
    workdir: folder of the stages.
    make_responder: makes the responder of the prompts, if it is needed.
    params: of the policy, on the mesh.
    prompts: N texts, which are scored.
    score: `(prompts, responses) -> (scores, parts)`, with `description`.
    seed: of the samples.
    should_stop: asked after every batch.
    **settings: all else that the samples depend on, the policy's fingerprint
      among them, as values that `json` can write.

  Returns:
    The finished stage; its file is `samples.jsonl`, of `samplers.collect`.

  Raises:
    Stopped: if `should_stop` said so.
  """
  sampled = stage(
    workdir,
    "samples",
    {
      "prompts": digest(list(prompts)),
      "scored by": score.description,
      "seed": seed,
      **settings,
    },
  )
  if sampled.facts is None:
    rows = samplers.collect(
      sampled.path("samples.jsonl"),
      make_responder(),
      params,
      prompts,
      score,
      progress=_progress("samples", len(prompts), should_stop),
    )
    sampled.finish(
      samples=len(rows),
      right=sum(bool(row["parts"]["is_correct"]) for row in rows),
      finished=sum(row["finished"] for row in rows),
    )
  return sampled


def records(rows: Rows, gold: Mapping[str, str]) -> Rows:
  """Joins samples, with their own verdicts, to gold solutions.

  Args:
    rows: of `samplers.collect`.
    gold: prompt -> its solution.

  Returns:
    Records with `prompt`, `gold`, `response` and `is_right`.
  """
  return [
    {
      "prompt": row["prompt"],
      "gold": gold[row["prompt"]],
      "response": row["response"],
      "is_right": bool(row["parts"]["is_correct"]),
    }
    for row in rows
  ]


def metrics(
  rows: Rows, rewrite: Callable[[str, str], str] | None = None
) -> dict[str, float]:
  """Counts what became of the wrong solutions.

  Args:
    rows: records with rewrites.
    rewrite: the task's own `(prompt, response) -> text`, to compare with.

  Returns:
    Numbers of right and wrong solutions, and of those that were too long to ask
    about; of the wrong ones the share whose rewrite is right, and with
    `rewrite` the share that equals the task's own.
  """
  wrong = [row for row in rows if not row["is_right"]]
  found = {
    "right": len(rows) - len(wrong),
    "wrong": len(wrong),
    "too long": sum(row.get("too_long", False) for row in rows),
  }
  if wrong:
    found["verified"] = float(np.mean([row["is_verified"] for row in wrong]))
    if rewrite:
      own = [rewrite(row["prompt"], row["response"]) for row in wrong]
      same = [a["rewrite"] == b for a, b in zip(wrong, own, strict=True)]
      found["like the task's"] = float(np.mean(same))
  return found


def unchanged(row: dict[str, Any]) -> dict[str, Any]:
  """Returns the record of a right solution, which is its own rewrite."""
  kept = {"error_step": -1, "rewrite": row["response"], "is_verified": True}
  return row | kept


def verified(
  rows: Rows, rewrites: Sequence[str], steps: Sequence[int], score: Score
) -> Rows:
  """Scores the rewrites of wrong solutions.

  Args:
    rows: N records with `prompt`.
    rewrites: N texts; an empty one is never right.
    steps: N numbers of the first wrong step; -1 where none is named.
    score: `(prompts, responses) -> (scores, parts)`.

  Returns:
    The records with `error_step`, `rewrite` and `is_verified`.
  """
  rewrites = [
    _as_in(row["response"], text)
    for row, text in zip(rows, rewrites, strict=True)
  ]
  _, parts = score([row["prompt"] for row in rows], rewrites)
  return [
    row
    | {
      "error_step": int(step),
      "rewrite": text,
      "is_verified": bool(part["is_correct"]) and bool(text.strip()),
    }
    for row, text, step, part in zip(rows, rewrites, steps, parts, strict=True)
  ]


def by_function(
  rows: Rows,
  teacher: prompts_lib.Teacher,
  score: Score,
  *,
  locate: Callable[[str, str], int] | None = None,
  step_ends: str = "\n",
) -> Rows:
  """Rewrites by a plain function; processes divide the rows.

  Args:
    rows: records with `prompt`, `gold`, `response` and `is_right`.
    teacher: `(question, gold, wrong) -> text`.
    score: decides whether a rewrite is right.
    locate: `(prompt, response) -> step`, the first wrong one; None: the first
      one that the rewrite changes.
    step_ends: characters that end a step.

  Returns:
    The records in their order, with `error_step`, `rewrite`, `is_verified`.

  Raises:
    ValueError: if the teacher does not return a text.
  """
  wrong = [row for row in rows if not row["is_right"]]

  def rewrite(row):
    text = teacher(row["prompt"], row["gold"], row["response"])
    if not isinstance(text, str):
      raise ValueError(
        f"The teacher must return a text, got {text!r} for {row['prompt']!r}."
      )
    if locate:
      return text, int(locate(row["prompt"], row["response"]))
    step = prompts_lib.first_changed_step(
      steps_lib.steps(row["response"], step_ends),
      steps_lib.steps(text, step_ends),
    )
    return text, step

  parts = processes.share(
    len(wrong), lambda own: [rewrite(row) for row in wrong[own]]
  )
  found = [pair for part in parts for pair in part]
  texts, steps = [text for text, _ in found], [step for _, step in found]
  return _in_order(rows, verified(wrong, texts, steps, score))


def by_model(
  folder: str | os.PathLike[str],
  rows: Rows,
  model: Any,
  tokenizer: Any,
  params: Any,
  template: prompts_lib.Template,
  score: Score,
  *,
  mesh: Any,
  batch_size: int,
  max_length: int,
  max_prompt_length: int,
  locate: bool = True,
  step_ends: str = "\n",
  render: Callable[[list[str]], list[str]] = list,
  should_stop: Callable[[], bool] = lambda: False,
) -> Rows:
  """Rewrites by a language model, greedily, in one call or in two.

  Every batch is saved before the next one: a call that was stopped continues
  where it was.

  Args:
    folder: where `locations.jsonl` and `rewritings.jsonl` go.
    rows: records with `prompt`, `gold`, `response` and `is_right`. Right ones
      are not asked about.
    model: module.
    tokenizer: its tokenizer.
    params: its parameters, on the mesh.
    template: of the questions.
    score: decides whether a rewrite is right.
    mesh: from `meshes.make`.
    batch_size: questions at the same time.
    max_length: tokens of a rewrite.
    max_prompt_length: tokens of a question; a solution whose question is
      longer, or does not fit the model's context beside a rewrite, gets no
      rewrite, and its record has `too_long`.
    locate: whether to ask for the first wrong step; False: rewrite all.
    step_ends: characters that end a step.
    render: renders questions as the model is asked, such as by a chat template.
    should_stop: asked after every batch.

  Returns:
    The records in their order, with `error_step`, `rewrite`, `is_verified`.

  Raises:
    Stopped: if `should_stop` said so.
    ValueError: if the folder holds answers to other questions.
  """

  ask = functools.partial(
    _ask,
    folder,
    model,
    tokenizer,
    params,
    mesh=mesh,
    batch_size=batch_size,
    max_prompt_length=max_prompt_length,
    should_stop=should_stop,
  )
  wrong = [row for row in rows if not row["is_right"]]
  if not wrong:
    return _in_order(rows, [])
  steps_of = [steps_lib.steps(row["response"], step_ends) for row in wrong]
  error_steps = [-1] * len(wrong)
  if locate:
    questions = [
      template.locate_prompt(row["prompt"], row["gold"], steps)
      for row, steps in zip(wrong, steps_of, strict=True)
    ]
    longest = _longest_location(template, tokenizer, max(map(len, steps_of)))
    replies = ask("locations", render(questions), max_length=longest)
    error_steps = [
      _located(template, reply, len(steps))
      for reply, steps in zip(replies, steps_of, strict=True)
    ]

  kept = list(map(prompts_lib.retained, steps_of, error_steps))
  questions = render(
    [
      template.rewrite_prompt(row["prompt"], row["gold"], row["response"])
      for row in wrong
    ]
  )
  questions = [a + b for a, b in zip(questions, kept, strict=True)]
  replies = ask("rewritings", questions, max_length=max_length)
  rewrites = [
    # A reply that ran out of length is not a rewrite.
    prompts_lib.join(start, reply["response"])
    if reply and reply["finished"]
    else ""
    for start, reply in zip(kept, replies, strict=True)
  ]
  answered = verified(wrong, rewrites, error_steps, score)
  for row, reply in zip(answered, replies, strict=True):
    if reply is None:
      row["too_long"] = True
  return _in_order(rows, answered)


def save_settings(
  workdir: str | os.PathLike[str], *, template: str, locate: bool
) -> None:
  """Saves the template and mode that a reward model was trained with."""
  if not processes.is_first():
    return
  row = {"template": template, "locate": locate}
  files.write_jsonl(os.path.join(workdir, _SETTINGS), [row])


def load_settings(name: str | os.PathLike[str]) -> Mapping[str, Any]:
  """Loads the template and mode of a reward model, if they were saved.

  Args:
    name: of the model, in any form that a flag --reward_model takes.

  Returns:
    `template` and `locate`, or an empty mapping.
  """
  path = os.path.join(name, _SETTINGS)
  return files.read_jsonl(path)[0] if os.path.isfile(path) else {}


def solved(
  task: Any, split: str, seed: int, num: int, options: Mapping[str, Any]
) -> list[tuple[str, str]]:
  """Returns questions of a task with their solutions.

  Args:
    task: a module of `rljax.tasks`.
    split: of the task.
    seed: of the draw.
    num: how many.
    options: keyword arguments of the task's `supervised`.

  Raises:
    ValueError: if the task has no solutions, or no such option.
  """
  if not hasattr(task, "supervised"):
    raise ValueError(
      f"The task {task.__name__} has no solutions, which the reward model "
      "reads; choose another --task."
    )
  keywords.check(task.supervised, options)
  return task.supervised(split, seed, num=num, **options)


def check_solution(score: Score, prompt: str, solution: str) -> None:
  """Raises ValueError unless a task's own solution is scored as right."""
  _, (parts,) = score([prompt], [solution])
  if "is_correct" not in parts:
    raise ValueError(
      "The score of the task must have the part is_correct, got "
      f"{', '.join(parts)}."
    )
  if not parts["is_correct"]:
    raise ValueError(
      f"The task's own solution {solution[:200]!r} is scored as wrong: "
      "--task_options and --score_options do not fit each other."
    )


def check_template(
  template: prompts_lib.Template, name: str, tokenizer: Any, pair: Sequence[str]
) -> None:
  """Raises ValueError unless a tokenizer can write what a template asks.

  Args:
    template: of the questions.
    name: of the template, for the message.
    tokenizer: of the model that is asked.
    pair: a prompt and its solution, to try with.
  """
  prompt, solution = pair
  for text in (
    template.locate_prompt(prompt, solution, [solution]),
    template.locate_target(0),
    template.rewrite_prompt(prompt, solution, solution),
  ):
    try:
      tokens.encode_prompts(tokenizer, [text], max_length=sys.maxsize)
    except ValueError as error:
      raise ValueError(
        f"--template={name} has characters that the model's tokenizer cannot "
        f"write; others are {', '.join(sorted(prompts_lib.TEMPLATES))}. {error}"
      ) from error


def _ask(
  folder: str | os.PathLike[str],
  model: Any,
  tokenizer: Any,
  params: Any,
  name: str,
  questions: Sequence[str],
  *,
  mesh: Any,
  batch_size: int,
  max_length: int,
  max_prompt_length: int,
  should_stop: Callable[[], bool],
) -> list[dict[str, Any] | None]:
  """Asks a model greedily; files its replies in `<folder>/<name>.jsonl`.

  Returns:
    For each question a row of `samplers.collect`, or None if it is too long.
  """
  ids = tokens.encode_prompts(tokenizer, questions, max_length=sys.maxsize)
  limit = min(
    max_prompt_length,
    batches.longest_in_bucket(model.config.max_positions - max_length),
  )
  fits = [i for i, x in enumerate(ids) if len(x) <= limit]
  replies = [None] * len(questions)
  if not fits:
    return replies
  responder = samplers.Responder(
    model,
    tokenizer,
    [ids[i] for i in fits],
    max_length=max_length,
    settings=sampling.Settings(greedy=True),
    batch_size=batch_size,
    mesh=mesh,
  )
  found = samplers.collect(
    pathlib.Path(folder, f"{name}.jsonl"),
    responder,
    params,
    [questions[i] for i in fits],
    # The caller scores them all together: a reply is part of a rewrite.
    lambda prompts, replies: (np.zeros(len(replies)), [{} for _ in replies]),
    progress=_progress(name, len(fits), should_stop),
  )
  for i, row in zip(fits, found, strict=True):
    replies[i] = row
  return replies


def _longest_location(
  template: prompts_lib.Template, tokenizer: Any, num_steps: int
) -> int:
  """Returns the tokens of the longest reply for `num_steps` steps."""
  targets = [template.locate_target(step) for step in (0, num_steps)]
  return max(
    len(tokens.encode_response(tokenizer, "", [], target)[0])
    for target in targets
  )


def _located(
  template: prompts_lib.Template, reply: dict[str, Any] | None, num_steps: int
) -> int:
  """Returns the step that a reply names; -1 if it names no existing one."""
  if not reply or not reply["finished"]:
    return -1
  step = template.parse_location(reply["response"])
  return step if 0 <= step < num_steps else -1


def _progress(name: str, num_prompts: int, should_stop: Callable[[], bool]):
  """Returns a callback that shows progress and stops between batches."""
  shown = samplers.Progress(name, num_prompts)

  def progress(done, batch):
    shown(done, batch)
    if should_stop():
      raise Stopped

  return progress


def _as_in(sample: str, text: str) -> str:
  """Gives a rewrite the outer white space of its sample, which is no edit."""
  start = sample[: len(sample) - len(sample.lstrip())]
  end = sample[len(sample.rstrip()) :]
  return f"{start}{text.strip()}{end}" if text.strip() else ""


def _in_order(rows: Rows, wrong: Rows) -> Rows:
  following = iter(wrong)
  return [
    unchanged(row) if row["is_right"] else next(following) for row in rows
  ]
