"""The stages of RLMEC, from samples to what is learnt from them.

  samples      what a policy answers to questions           (sample)
  rewrites     what becomes of the wrong ones               (rewrite)
  records      what a generative reward model learns from   (record)
  supervision  what RLMEC's policy learns from              (supervise)
  test         how well a reward model rewrites             (test)

Each has a folder of its own beside its inputs, see `storage.stages`: it is not
repeated while these are as before, and goes on after a stop. Of several
processes, the first one writes.
"""

import hashlib
import json
import os
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rljax.distributed import processes
from rljax.generation import responders, samplers
from rljax.rlmec import prompts as prompts_lib
from rljax.rlmec import rewriters, targets
from rljax.storage import stages
from rljax.text import (
  asked,
  chats,
  end_tokens,
  files,
  keywords,
  tokens,
)
from rljax.text import prompts as text_prompts

Rows = list[dict[str, Any]]
Score = Callable[..., tuple[np.ndarray, list[dict[str, Any]]]]
Pairs = Sequence[tuple[str, str]]

_SETTINGS = "rewriting.json"


class Questions(NamedTuple):
  """Questions of a task.

  Attributes:
    prompts: N of them, as the policy reads them.
    solutions: N pairs of a question and its solution.
  """

  prompts: text_prompts.Prompts
  solutions: list[tuple[str, str]]


def digest(values: Any) -> str:
  """Returns the SHA-256 of values that `json` can write, such as texts."""
  return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def shown(facts: Mapping[str, Any]) -> str:
  """Writes the numbers that a stage was finished with as a line."""
  return ", ".join(
    f"{value:.3g} {name}" if isinstance(value, float) else f"{value} {name}"
    for name, value in facts.items()
    if isinstance(value, int | float) and name != "finished_at"
  )


def stage(
  workdir: str | os.PathLike[str], name: str, inputs: Mapping[str, Any]
) -> stages.Stage:
  """Opens a stage of all processes, whose files the first one writes.

  All must call it and its `finish`, which waits for what the first has written
  before; see `stages.Stage`.
  """
  processes.check_same(f"The inputs of the stage {name}", dict(inputs))
  return stages.Stage(workdir, name, inputs, once=processes.from_first)


# Stages.


def sample(
  workdir: str | os.PathLike[str],
  sampler: samplers.Sampler,
  params: Any,
  prompts: text_prompts.Prompts,
  score: Score,
  *,
  batch_size: int,
  progress: rewriters.Progress = responders.Progress,
  **inputs: Any,
) -> stages.Stage:
  """Draws samples of a policy, with their verdicts.

  Two scripts that call it with the same arguments share what it wrote.

  Args:
    workdir: folder of the stages.
    sampler: of the policy; its settings have the seed.
    params: of the policy, on the mesh.
    prompts: N of them.
    score: `(prompts, responses) -> (scores, parts)`, with `description`.
    batch_size: prompts at the same time.
    progress: makes what is called after every batch, such as `Run.progress`.
    **inputs: what else the samples depend on, the policy's fingerprint among
      it, as values that `json` can write.

  Returns:
    The finished stage; its file is `samples.jsonl`, of `responders.collect`.
  """
  sampled = stage(
    workdir,
    "samples",
    {
      "prompts": digest(prompts.texts),
      "asked": digest(prompts.encoded),
      "scored by": score.description,
      **sampler.settings._asdict(),
      **inputs,
    },
  )
  if sampled.facts is None:
    rows = responders.collect(
      sampled.path("samples.jsonl"),
      sampler.responder(prompts, batch_size=batch_size),
      params,
      prompts.texts,
      score,
      progress=progress("samples", len(prompts)),
    )
    sampled.finish(
      samples=len(rows),
      right=sum(bool(row["parts"]["is_correct"]) for row in rows),
      finished=sum(row["finished"] for row in rows),
    )
  return sampled


def rewrite(
  workdir: str | os.PathLike[str],
  name: str,
  sampled: stages.Stage,
  solutions: Pairs,
  rewriter: rewriters.Rewriter,
  score: Score,
  *,
  own: Callable[[str, str], str] | None = None,
  progress: rewriters.Progress = responders.Progress,
) -> stages.Stage:
  """Rewrites the wrong ones of the different samples that have an end.

  Args:
    workdir: folder of the stages.
    name: of the stage.
    sampled: from `sample`.
    solutions: questions and their solutions, as many as are rewritten: the
      first ones of those that were sampled.
    rewriter: who does it.
    score: decides whether a rewrite is right.
    own: the task's own rewrite, to compare with; see `metrics`.
    progress: see `sample`.

  Returns:
    The finished stage; its file is `rewrites.jsonl`, of records with rewrites.
  """
  rewritten = stage(
    workdir,
    name,
    {
      "samples": sampled.digest("samples.jsonl"),
      "gold": digest(list(solutions)),
      "scored by": score.description,
      **rewriter.made_of,
    },
  )
  if rewritten.facts is None:
    samples = asked.attach(
      files.read_jsonl(sampled.path("samples.jsonl")), dict(solutions)
    )
    rows, counts = prompts_lib.distinct(
      [row for row in samples if row["index"] < len(solutions)]
    )
    rows = records(rows, dict(solutions))
    rows = rewriter.rewrite(rewritten.folder, rows, score, progress)
    _write(rewritten, "rewrites.jsonl", rows)
    rewritten.finish(**counts, **metrics(rows, own))
  return rewritten


def record(
  workdir: str | os.PathLike[str],
  taught: stages.Stage,
  held_out: Sequence[str],
  template: str,
  *,
  seed: int,
  locate: bool,
  step_ends: str,
) -> stages.Stage:
  """Writes what a generative reward model learns from, and what tests it.

  Args:
    workdir: folder of the stages.
    taught: from `rewrite`.
    held_out: questions whose records are for a test.
    template: name of the one that questions are asked by.
    seed: see `prompts.reward_model_records`; likewise the others.
    locate: whether it learns to name the first wrong step.
    step_ends: characters that end a step.

  Returns:
    The finished stage; its files are `records.jsonl` and `held_out.jsonl`, and
    its facts the counts of either.
  """
  settings = {"seed": seed, "locate": locate, "step_ends": step_ends}
  recorded = stage(
    workdir,
    "records",
    {
      "rewrites": taught.digest("rewrites.jsonl"),
      "held_out": digest(sorted(held_out)),
      "template": template,
      **settings,
    },
  )
  if recorded.facts is None:
    rows, facts = files.read_jsonl(taught.path("rewrites.jsonl")), {}
    held_out = frozenset(held_out)
    for name in ("records", "held_out"):
      found, facts[name] = prompts_lib.reward_model_records(
        [
          row
          for row in rows
          if (row["prompt"] in held_out) == (name == "held_out")
        ],
        prompts_lib.TEMPLATES[template],
        **settings,
      )
      _write(recorded, f"{name}.jsonl", found)
    recorded.finish(**facts)
  return recorded


def supervise(
  workdir: str | os.PathLike[str],
  rewritten: stages.Stage,
  policy: Any,
  reward_model: Any,
  *,
  template: str,
  prompt_format: str,
  alignment: str,
  max_right: int,
  seed: int,
  limits: targets.Limits,
  batch_size: int,
  mesh: Any,
) -> stages.Stage:
  """Writes what RLMEC's policy learns from, and what other methods would.

  Samples whose rewrite is not right are left out.

  Args:
    workdir: folder of the stages.
    rewritten: from `rewrite`.
    policy: language model that training starts from, its parameters on the
      mesh, as `Run.place_model` gives it.
    reward_model: the generative one, likewise.
    template: name of the one that it is asked by.
    prompt_format: "plain" or "chat", how the policy is asked.
    alignment: see `alignment.align_pairs`.
    max_right: see `prompts.at_most_right`; likewise `seed`.
    seed: of that draw.
    limits: of length; what is longer is skipped, and named in the facts.
    batch_size: samples at the same time.
    mesh: from `meshes.make`.

  Returns:
    The finished stage; its file is `supervision.jsonl`, with rows as
    `targets.arrays` takes them. Beside it lie `right.jsonl` and `gold.jsonl`
    for supervised learning, and `pairs.jsonl` for preferences.

  Raises:
    ValueError: if no wrong sample is left.
  """
  rows = files.read_jsonl(rewritten.path("rewrites.jsonl"))
  verified = [row for row in rows if row["is_verified"]]
  kept = prompts_lib.at_most_right(verified, max_right, seed)
  rendered = chats.render_prompts(
    [row["prompt"] for row in kept],
    "samples",
    policy.tokenizer,
    prompt_format,
  )
  supervised = stage(
    workdir,
    "supervision",
    {
      "rewrites": rewritten.digest("rewrites.jsonl"),
      "asked": digest(rendered),
      "policy": rewriters.identity(policy),
      "reward model": rewriters.identity(reward_model),
      "template": template,
      "alignment": alignment,
      "max_right": max_right,
      "seed": seed,
      **limits._asdict(),
    },
  )
  if supervised.facts is not None:
    return supervised
  found, questions, skipped = targets.encode(
    kept,
    rendered,
    policy.tokenizer,
    prompts_lib.TEMPLATES[template],
    limits=limits,
    max_positions=reward_model.model.config.max_positions,
    end_id=end_tokens.end_id(policy.tokenizer, prompt_format),
  )
  if all(row["is_right"] for row in found):
    raise ValueError(
      f"None of {len(rows)} samples in {supervised.folder} is wrong and has a "
      "verified rewrite: there is nothing to learn."
    )
  found = targets.blamed(
    found, questions, policy, reward_model, batch_size=batch_size, mesh=mesh
  )
  found = targets.edited(found, mode=alignment)
  _write(supervised, "supervision.jsonl", found)
  for name, others in targets.for_other_methods(rows, found).items():
    _write(supervised, f"{name}.jsonl", others)
  supervised.finish(
    **{"samples kept": len(verified) / len(rows)},
    **targets.facts(found),
    skipped=skipped,
  )
  return supervised


def test(
  workdir: str | os.PathLike[str],
  taught: stages.Stage,
  held_out: Sequence[str],
  rewriter: rewriters.Rewriter,
  score: Score,
  *,
  progress: rewriters.Progress = responders.Progress,
) -> dict[str, float]:
  """Compares how a model rewrites samples of unseen questions with a teacher.

  The stage "test" is asked again after every start, and goes on with what it
  has been answered.

  Args:
    workdir: where the folder of the stage lies.
    taught: from `rewrite`, by the teacher.
    held_out: the questions.
    rewriter: the model.
    score: decides whether a rewrite is right.
    progress: see `sample`.

  Returns:
    See `compare`.
  """
  tested = stage(
    workdir,
    "test",
    {"rewrites": taught.digest("rewrites.jsonl"), **rewriter.made_of},
  )
  held_out = frozenset(held_out)
  rows = files.read_jsonl(taught.path("rewrites.jsonl"))
  rows = [row for row in rows if row["prompt"] in held_out]
  answers = rewriter.rewrite(tested.folder, rows, score, progress)
  _write(tested, "rewrites.jsonl", answers)
  found = compare(answers, rows)
  tested.finish(**found)
  return found


# Records, and what became of them.


def records(rows: Rows, gold: Mapping[str, str]) -> Rows:
  """Makes what is rewritten: samples with their own verdicts and solutions.

  Args:
    rows: of `responders.collect`.
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
  rows: Rows, own: Callable[[str, str], str] | None = None
) -> dict[str, float]:
  """Counts what became of the wrong solutions.

  Args:
    rows: records with rewrites.
    own: the task's own rewrite, `(prompt, response) -> text`, to compare with.

  Returns:
    Numbers of right and wrong solutions, and of those that were too long to be
    asked about; of the wrong ones the share whose rewrite is right, and with
    `own` the share that is the task's own.
  """
  wrong = [row for row in rows if not row["is_right"]]
  found = {
    "right": len(rows) - len(wrong),
    "wrong": len(wrong),
    "too long": sum(row.get("too_long", False) for row in rows),
  }
  if wrong:
    found["verified"] = float(np.mean([row["is_verified"] for row in wrong]))
    if own:
      texts = [own(row["prompt"], row["response"]) for row in wrong]
      same = [a["rewrite"] == b for a, b in zip(wrong, texts, strict=True)]
      found["like the task's"] = float(np.mean(same))
  return found


def compare(answers: Rows, rows: Rows) -> dict[str, float]:
  """Compares the rewrites of wrong solutions with a teacher's.

  Args:
    answers: N records with rewrites.
    rows: the same records with those of the teacher.

  Returns:
    The number of wrong solutions, and shares of them: of right rewrites, by
    the model and by the teacher, and of rewrites and first wrong steps that
    are the teacher's.
  """
  pairs = [
    (answer, row)
    for answer, row in zip(answers, rows, strict=True)
    if not row["is_right"]
  ]
  if not pairs:
    return {"wrong solutions": 0}
  share = lambda same: float(np.mean([same(a, row) for a, row in pairs]))
  return {
    "wrong solutions": len(pairs),
    "right rewrites": share(lambda a, row: a["is_verified"]),
    "right rewrites of the teacher": share(lambda a, row: row["is_verified"]),
    "the teacher's rewrite": share(
      lambda a, row: a["rewrite"] == row["rewrite"]
    ),
    "the teacher's first wrong step": share(
      lambda a, row: a["error_step"] == row["error_step"]
    ),
  }


# How a reward model is asked.


def save_settings(
  workdir: str | os.PathLike[str], *, template: str, locate: bool
) -> None:
  """Files how a generative reward model was asked in its training."""
  if not processes.is_first():
    return
  row = {"template": template, "locate": locate}
  files.write_jsonl(os.path.join(workdir, _SETTINGS), [row])


def load_settings(name: str | os.PathLike[str]) -> Mapping[str, Any]:
  """Reads how a reward model is to be asked; nothing if nobody filed it.

  Args:
    name: of the model, in any form that a flag --reward_model takes.

  Returns:
    `template` and `locate`, or an empty mapping.
  """
  folder = pathlib.Path(name)
  # The best parameters of a run were asked as the run was.
  for place in (folder, *([folder.parent] if folder.name == "best" else [])):
    if (place / _SETTINGS).is_file():
      return files.read_jsonl(place / _SETTINGS)[0]
  return {}


def how_asked(
  name: str | os.PathLike[str], template: str, locate: bool | None
) -> tuple[str, bool]:
  """Returns how a reward model is asked: as it is told, else as was filed.

  Args:
    name: see `load_settings`.
    template: name of one; empty: as the model was trained.
    locate: whether it is asked for the first wrong step; None: likewise.

  Returns:
    The name of a template, and whether to locate.

  Raises:
    ValueError: if nobody says by which template.
  """
  filed = load_settings(name)
  template = template or filed.get("template")
  if template is None:
    raise ValueError(
      f"--reward_model={name} does not say how it is asked: give --template."
    )
  return template, filed.get("locate", True) if locate is None else locate


# Checks, before anything is drawn.


def questions(
  task: Any,
  tokenizer: Any,
  score: Score,
  splits: Mapping[str, int],
  *,
  seed: int,
  task_options: Sequence[str] = (),
  data: str = "",
  eval_data: str = "",
  eval_share: float = 0.1,
  solution_column: str = "solution",
  **encode_options: Any,
) -> list[Questions]:
  """Draws questions with solutions, which their score must find right.

  Args:
    task: a module such as those of `rljax.tasks`, unless a file is named.
    tokenizer: of the policy.
    score: `(prompts, responses) -> (scores, parts)`.
    splits: name of a split -> how many: "train", and one that is held out.
    seed: of the draw.
    task_options: keyword arguments of the task's `supervised`, as texts.
    data: file of questions with solutions; see `text.prompts.split_rows`,
      likewise `eval_data` and `eval_share`.
    eval_data: may be empty.
    eval_share: of the questions of one file.
    solution_column: of the file.
    **encode_options: of `text.prompts.encode`.

  Returns:
    One `Questions` for each split.

  Raises:
    ValueError: as `text.prompts.solved` and `encode`, and `check_solution`.
  """
  options = keywords.parse(task_options)
  found = {}
  if data:
    found = _of_file(
      data,
      eval_data,
      splits,
      eval_split=[*splits, "test"][1],
      share=eval_share,
      seed=seed,
      column=solution_column,
    )
  pairs = [
    found[split]
    if data
    else text_prompts.solved(
      task, split, num=num, seed=seed, task_options=options
    )
    for split, num in splits.items()
  ]
  check_solution(score, *pairs[0][0])
  encoded = text_prompts.encode(
    tokenizer, *([q for q, _ in some] for some in pairs), **encode_options
  )
  return [Questions(*both) for both in zip(encoded, pairs, strict=True)]


def _of_file(data, eval_data, splits, *, column, **options):
  """Pairs of a question and its solution of the rows of files, by split."""
  sides = text_prompts.split_rows(data, eval_data, **options)
  found = {}
  for (split, num), loaded in zip(splits.items(), sides, strict=False):
    found[split] = []
    for row in loaded.rows[:num]:
      solution = row.columns.get(column)
      if not isinstance(row.prompt, str):
        raise ValueError(
          f"{row.place}: a model that rewrites reads questions that are texts, "
          "and this prompt is a list of messages."
        )
      if not isinstance(solution, str) or not solution:
        raise ValueError(
          f"{row.place}: there is no text in the column "
          f"--solution_column={column}; the columns are "
          f"{', '.join(row.columns) or 'none'}."
        )
      prompt = asked.Prompt(row.prompt, row.prompt, row.columns)
      found[split].append((prompt, solution))
  return found


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


def check_template(name: str, tokenizer: Any, pair: Sequence[str]) -> None:
  """Raises ValueError unless a tokenizer can write what a template asks.

  Args:
    name: of the template.
    tokenizer: of the model that is asked.
    pair: a prompt and its solution, to try with.
  """
  template, (prompt, solution) = prompts_lib.TEMPLATES[name], pair
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


def _write(written: stages.Stage, file: str, rows: Sequence[Any]) -> None:
  """Writes a file of a stage, in the first process."""
  if processes.is_first():
    files.write_jsonl(written.path(file), rows)
