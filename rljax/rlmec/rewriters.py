"""Who rewrites wrong solutions: a function, or a language model in two calls.

The model is asked which step is the first wrong one; the steps before it are
written into its answer, and it goes on from there. So a rewrite begins as the
solution did. The same two calls serve a teacher and a generative reward model.

Source:
  Chen et al. (2024), "Improving Large Language Models via Fine-grained
  Reinforcement Learning with Minimum Editing Constraint". Departures: the
  whole number of a step is read; a step that does not exist keeps nothing;
  blanks between the kept steps and the rest are as in the solution.
"""

import functools
import hashlib
import importlib
import json
import os
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rljax.distributed import planning, processes
from rljax.generation import responders
from rljax.ops import sampling
from rljax.rlmec import prompts as prompts_lib
from rljax.rlmec import teachers
from rljax.scoring import cached
from rljax.storage import calls
from rljax.text import batches, chats, files, tokens
from rljax.text import steps as steps_lib

Rows = list[dict[str, Any]]
Score = Callable[..., tuple[np.ndarray, list[dict[str, Any]]]]
# (name of what is drawn, number of prompts) -> what `responders.collect` calls.
Progress = Callable[[str, int], Callable[[int, Rows], None]]


class Rewriter(NamedTuple):
  """Who rewrites wrong samples, as `pipeline.rewrite` and `test` take it.

  Attributes:
    rewrite: `(folder, rows, score, progress) -> rows`: adds `error_step`,
      `rewrite` and `is_verified` to records, see `by_function`. In the folder
      it may leave files, to go on with after a stop.
    made_of: all that its rewrites depend on, but the records, as values that
      `json` can write.
  """

  rewrite: Callable[..., Rows]
  made_of: Mapping[str, Any]


def of_teacher(name: str, task: Any, seconds: float = 0.0) -> Rewriter:
  """Makes a rewriter of a plain function.

  Args:
    name: "task" for the task's own `rewrite`, which knows the step that went
      wrong; "gold" for a splice of a sample's good steps and the solution's
      others; "package.module:name" for a function of the user's, see
      `prompts.Teacher`.
    task: a module of `rljax.tasks`.
    seconds: that a rewrite may take; 0: no limit.

  Raises:
    ValueError: if there is no such function.
  """
  step_ends, locate = prompts_lib.step_ends(task), None
  made_of = {"teacher": name, "step_ends": step_ends}
  if name == "task":
    if not hasattr(task, "rewrite"):
      name = getattr(task, "__name__", "A file of prompts")
      raise ValueError(
        f"{name} cannot repair solutions, which --teacher=task asks for: give "
        "--teacher=gold, model, or module:function."
      )
    teacher = lambda question, _, wrong: task.rewrite(question, wrong)
    locate = getattr(task, "first_wrong_step", None)
  elif name == "gold":
    teacher = teachers.splice_with(step_ends=step_ends)
  else:
    teacher, source = _imported(name)
    made_of["source"] = hashlib.sha256(source).hexdigest()

  def rewrite(folder, rows, score, progress):
    del progress  # It is not divided into batches.
    return by_function(
      rows,
      teacher,
      score,
      locate=locate,
      step_ends=step_ends,
      # What the others say costs nothing.
      folder=None if name in ("task", "gold") else folder,
      seconds=seconds,
    )

  return Rewriter(rewrite, made_of)


def of_model(
  loaded: Any,
  template: str,
  *,
  mesh: Any,
  batch_size: int,
  max_length: int,
  max_prompt_length: int,
  locate: bool = True,
  step_ends: str = "\n",
  prompt_format: str = "plain",
  slots: int = 0,
) -> Rewriter:
  """Makes a rewriter of a language model.

  Args:
    loaded: its `model`, `tokenizer` and `source`, and its `params`, on the
      mesh, as `Run.place_model` gives them.
    template: of the questions, a name of `prompts.TEMPLATES`.
    mesh: from `meshes.make`.
    batch_size: see `by_model`; likewise `max_length`, `max_prompt_length`,
      `locate` and `step_ends`.
    max_length: of a rewrite.
    max_prompt_length: of a question.
    locate: whether it is asked for the first wrong step.
    step_ends: characters that end a step.
    prompt_format: "plain", or "chat" for the model's own chat template.
    slots: replies that are decoded at the same time, see `generation.slots`.
  """
  # Where it runs is no part of what it says; all else is.
  settings = {
    "max_length": max_length,
    "max_prompt_length": max_prompt_length,
    "locate": locate,
    "step_ends": step_ends,
  }
  made_of = {
    "model": identity(loaded),
    "template": template,
    "prompt_format": prompt_format,
    **settings,
  }

  def rewrite(folder, rows, score, progress):
    return by_model(
      folder,
      rows,
      loaded.model,
      loaded.tokenizer,
      loaded.params,
      prompts_lib.TEMPLATES[template],
      score,
      mesh=mesh,
      batch_size=batch_size,
      slots=slots,
      render=lambda texts: chats.render_prompts(
        texts, loaded.source, loaded.tokenizer, prompt_format
      ),
      progress=progress,
      **settings,
    )

  return Rewriter(rewrite, made_of)


def identity(loaded: Any) -> dict[str, str]:
  """Returns what a language model's numbers depend on, as plain values.

  Args:
    loaded: its `model` and `params`, wherever they lie.
  """
  dtype = jnp.dtype(loaded.model.config.dtype)
  return {
    "fingerprint": cached.fingerprint(loaded.params),
    "dtype": dtype.name,
    **cached.precision(dtype),
  }


def unchanged(row: dict[str, Any]) -> dict[str, Any]:
  """Returns the record of a right solution: it is its own rewrite."""
  kept = {"error_step": -1, "rewrite": row["response"], "is_verified": True}
  return row | kept


def verified(
  rows: Rows, rewrites: Sequence[str], steps: Sequence[int], score: Score
) -> Rows:
  """Scores the rewrites of wrong solutions: which of them are right?

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
      "is_verified": bool(text.strip())
      and bool(part["is_correct"] or planning.current()),
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
  folder: str | os.PathLike[str] | None = None,
  seconds: float = 0.0,
) -> Rows:
  """Rewrites by a plain function; every process asks it about its share.

  With a folder, each answer is on disk before the next is asked for, and a call
  that failed, hung or was stopped goes on where it was.

  Args:
    rows: records with `prompt`, `gold`, `response` and `is_right`.
    teacher: `(question, gold, wrong) -> text`.
    score: decides whether a rewrite is right.
    locate: `(prompt, response) -> step`, the first wrong one; None: the first
      one that the rewrite changes.
    step_ends: characters that end a step.
    folder: where `answers.jsonl` goes, or, of a further process of this number,
      `answers-<number>.jsonl`; None: nowhere.
    seconds: that an answer may take; 0: no limit.

  Returns:
    The records in their order, with `error_step`, `rewrite`, `is_verified`.

  Raises:
    ValueError: `calls.CallError` if the teacher fails, takes too long or
      returns something else than a text, naming question and response.
    Exception: `signals.Stopped`, if a signal asked for the end meanwhile.
  """
  wrong = [row for row in rows if not row["is_right"]]
  known = {}
  if folder is not None:
    known = dict(processes.from_first(lambda: _answers(folder)))

  def ask(row):
    """The teacher's answer, which is on disk when this returns."""
    text = teacher(row["prompt"], row["gold"], row["response"])
    if not isinstance(text, str):
      raise ValueError(f"it must return a text, got {text!r}")
    if folder is not None:
      files.append_jsonl(_answers_path(folder), [{**_asked(row), "text": text}])
    return text

  def ask_all(own):
    new = [row for row in own if _key(row) not in known]
    texts = calls.one_by_one(
      ask,
      [(row,) for row in new],
      what="The teacher",
      about=lambda i: (
        f"for the question {calls.shown(new[i]['prompt'])} and the response "
        f"{calls.shown(new[i]['response'])}"
      ),
      seconds=seconds,
    )
    found = known | dict(zip(map(_key, new), texts, strict=True))
    return [rewrite(row, found[_key(row)]) for row in own]

  def rewrite(row, text):
    if locate:
      return text, int(locate(row["prompt"], row["response"]))
    step = prompts_lib.first_changed_step(
      steps_lib.steps(row["response"], step_ends),
      steps_lib.steps(text, step_ends),
    )
    return text, step

  parts = processes.share(len(wrong), lambda own: ask_all(wrong[own]))
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
  progress: Progress = responders.Progress,
  slots: int = 0,
) -> Rows:
  """Rewrites by a language model, greedily, in one call or in two.

  Every batch is written down before the next is asked for: a call that was
  stopped goes on where it was.

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
    render: turns questions into texts as the model is asked, such as by a chat
      template.
    progress: makes what is called after every batch, such as `Run.progress`.
    slots: replies that are decoded at the same time, see `generation.slots`.

  Returns:
    The records in their order, with `error_step`, `rewrite`, `is_verified`.

  Raises:
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
    slots=slots,
    max_prompt_length=max_prompt_length,
    progress=progress,
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
    # One that ran out of length is no rewrite.
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


def _asked(row: Mapping[str, Any]) -> dict[str, str]:
  """What a teacher is asked."""
  return {name: row[name] for name in ("prompt", "gold", "response")}


def _key(row: Mapping[str, Any]) -> str:
  """A name for what a teacher is asked."""
  asked = json.dumps(_asked(row), sort_keys=True)
  return hashlib.sha256(asked.encode()).hexdigest()


def _answers_path(folder: str | os.PathLike[str]) -> pathlib.Path:
  """Where this process files what a teacher answers."""
  number = "" if processes.is_first() else f"-{jax.process_index()}"
  return pathlib.Path(folder, f"answers{number}.jsonl")


def _answers(folder: str | os.PathLike[str]) -> list[tuple[str, str]]:
  """What a teacher has answered before: names of questions, and texts."""
  found = []
  for path in sorted(pathlib.Path(folder).glob("answers*.jsonl")):
    files.append_jsonl(path, [])  # Cuts off what a killed writer left behind.
    if path.stat().st_size:
      found += [(_key(row), row["text"]) for row in files.read_jsonl(path)]
  return found


def _imported(name: str) -> tuple[prompts_lib.Teacher, bytes]:
  """A function by the name `module:function`, and the source of its module."""
  module, _, attribute = name.partition(":")
  sys.path.append(os.getcwd())  # Where a user's own file may lie.
  try:
    module = importlib.import_module(module)
    function = getattr(module, attribute)
    return function, pathlib.Path(module.__file__).read_bytes()
  except (ImportError, AttributeError, ValueError) as error:
    raise ValueError(
      f"--teacher={name} is none of task, gold and model, and no "
      f"module:function that can be imported: {error}."
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
  progress: Progress,
  slots: int = 0,
) -> list[dict[str, Any] | None]:
  """Asks a model greedily; files its replies in `<folder>/<name>.jsonl`.

  Returns:
    For each question a row of `responders.collect`, or None if it is too long.
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
  responder = responders.Responder(
    model,
    tokenizer,
    [ids[i] for i in fits],
    max_length=max_length,
    settings=sampling.Settings(greedy=True),
    batch_size=batch_size,
    mesh=mesh,
    slots=slots,
  )
  found = responders.collect(
    pathlib.Path(folder, f"{name}.jsonl"),
    responder,
    params,
    [questions[i] for i in fits],
    # The caller scores them all together: a reply is part of a rewrite.
    lambda prompts, replies: (np.zeros(len(replies)), [{} for _ in replies]),
    progress=progress(name, len(fits)),
  )
  for i, row in zip(fits, found, strict=True):
    replies[i] = row
  return replies


def _longest_location(
  template: prompts_lib.Template, tokenizer: Any, num_steps: int
) -> int:
  """Tokens of the longest reply that names one of `num_steps` steps."""
  targets = [template.locate_target(step) for step in (0, num_steps)]
  return max(
    len(tokens.encode_response(tokenizer, "", [], target).ids)
    for target in targets
  )


def _located(
  template: prompts_lib.Template, reply: dict[str, Any] | None, num_steps: int
) -> int:
  """The step that a reply names, -1 if it names none of `num_steps` steps."""
  if not reply or not reply["finished"]:
    return -1
  step = template.parse_location(reply["response"])
  return step if 0 <= step < num_steps else -1


def _as_in(sample: str, text: str) -> str:
  """A rewrite with the white space that its sample begins and ends with.

  It would count as an edit otherwise.
  """
  start = sample[: len(sample) - len(sample.lstrip())]
  end = sample[len(sample.rstrip()) :]
  return f"{start}{text.strip()}{end}" if text.strip() else ""


def _in_order(rows: Rows, wrong: Rows) -> Rows:
  following = iter(wrong)
  return [
    unchanged(row) if row["is_right"] else next(following) for row in rows
  ]
