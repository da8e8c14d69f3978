"""Flags of tasks, prompts and logged replies, and their readers."""

import types
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import flags

from rljax import tasks
from rljax.cli import entry
from rljax.generation import grammars
from rljax.models import hf
from rljax.scoring import cached
from rljax.text import encoding, keywords, prompts

# Flags that are defined below belong to the script that calls the group.
flags.disclaim_key_flags()


def define_task(
  task: str,
  *,
  num_prompts: int | None = None,
  num_eval_prompts: int | None = None,
  eval_split: str | None = "test",
  scores: bool = True,
) -> None:
  """Defines the flags of a task, and how its prompts are put to the policy.

  Args:
    task: default of --task; "": it may be empty.
    num_prompts: default of --num_prompts; None: no flag.
    num_eval_prompts: default of --num_eval_prompts; None: no flag.
    eval_split: default of --eval_split, where there is --num_eval_prompts;
      None: no flag.
    scores: whether the task scores responses.
  """
  flags.DEFINE_string(
    "task",
    task,
    "Task that writes prompts and scores responses: a module of rljax.tasks."
    + ("" if task else " Empty for none."),
  )
  flags.DEFINE_list(
    "task_options",
    [],
    "Options of the task's prompts, name=value, separated by commas; "
    "docs/tasks.md lists them.",
  )
  if scores:
    flags.DEFINE_list(
      "score_options",
      [],
      "Options of the task's score, name=value, separated by commas; "
      "docs/tasks.md lists them.",
    )
  if num_prompts is not None:
    flags.DEFINE_integer(
      "num_prompts",
      num_prompts,
      "Training prompts that the task draws.",
      lower_bound=1,
    )
  if num_eval_prompts is not None:
    flags.DEFINE_integer(
      "num_eval_prompts",
      num_eval_prompts,
      "Held-out prompts or rows of an evaluation.",
      lower_bound=1,
    )
  if num_eval_prompts is not None and eval_split is not None:
    flags.DEFINE_enum(
      "eval_split",
      eval_split,
      ["test", "validation"],
      "Split of the task that evaluations use.",
    )
  flags.DEFINE_integer(
    "max_prompt_length",
    512,
    "Most tokens of a prompt; --too_long, where a script has it, says what "
    "happens to a longer one, which else is an error.",
    lower_bound=1,
  )
  flags.DEFINE_enum(
    "prompt_format",
    "plain",
    ["plain", "chat"],
    "How prompts are put to the policy: plain as they are, chat in its "
    "tokenizer's chat template.",
  )


def load_task(values: flags.FlagValues) -> types.ModuleType | None:
  """Returns the module that --task names; None where it may be empty and is."""
  if not (values.task or values["task"].default):
    return None
  task = tasks.load(values.task)
  if "constraint" in values and values.constraint == "grammar":
    grammars.check_task(task)
  return task


def prompt_options(values: flags.FlagValues) -> dict[str, Any]:
  """Returns keyword arguments of `text.prompts.load`."""
  return {
    "seed": values.seed,
    "num_prompts": values.num_prompts,
    "num_eval_prompts": values.num_eval_prompts,
    "eval_split": values.eval_split,
    "max_length": values.max_prompt_length,
    "prompt_format": values.prompt_format,
    "task_options": keywords.parse(values.task_options),
    "eos": "stop_at_eos" not in values or values.stop_at_eos,
  }


def solved_options(values: flags.FlagValues) -> dict[str, Any]:
  """Returns keyword arguments of `text.prompts.solved`."""
  options = keywords.parse(values.task_options)
  if "example_options" in values:
    options |= keywords.parse(values.example_options)
  return {"seed": values.seed, "task_options": options}


def encode_options(values: flags.FlagValues) -> dict[str, Any]:
  """Returns keyword arguments of `text.prompts.encode` and its like."""
  return {
    "max_length": values.max_prompt_length,
    "prompt_format": values.prompt_format,
    "name": values.task,
  }


def define_lengths(*, max_response_length: int, too_long: str) -> None:
  """Defines the limits of logged rows."""
  flags.DEFINE_integer(
    "max_response_length",
    max_response_length,
    "Most tokens of a logged reply, its end token included.",
    lower_bound=1,
  )
  flags.DEFINE_enum(
    "too_long",
    too_long,
    ["error", "skip", "cut"],
    "What happens to a row that is too long: error stops, skip leaves it out "
    "and counts it, cut shortens it.",
  )


def length_options(values: flags.FlagValues) -> dict[str, Any]:
  """Returns keyword arguments of `encoding.prepare`."""
  return {
    "max_prompt_length": values.max_prompt_length,
    "max_response_length": values.max_response_length,
    "too_long": values.too_long,
    "prompt_format": values.prompt_format,
  }


def define_log() -> None:
  """Defines the flags of logged replies."""
  flags.DEFINE_string(
    "data",
    "",
    "Logged replies: a .jsonl or .json file, a folder of splits or "
    "tfds:<name>; docs/data.md shows the fields. Empty: those of the task.",
  )
  flags.DEFINE_integer(
    "first_row",
    0,
    "Number of rows of the log that are passed over at its beginning.",
    lower_bound=0,
  )
  flags.DEFINE_integer(
    "num_rows",
    0,
    "Number of rows of the log that are used, from --first_row on; 0 uses all.",
    lower_bound=0,
  )


def read_log(values: flags.FlagValues, tokenizer: Any) -> encoding.Log:
  """Reads --data, or the log of --task.

  Raises:
    ValueError: as `encoding.read`.
  """
  return encoding.read(
    tokenizer,
    name=values.data,
    task=values.task and load_task(values),
    seed=values.seed,
    task_options=keywords.parse(values.task_options),
    first_row=values.first_row,
    num_rows=values.num_rows,
    **length_options(values),
  )


def define_cache() -> None:
  """Defines where numbers of a log are read from."""
  flags.DEFINE_string(
    "cache",
    "",
    "Workdir of offline_value.py, from which rewards, advantages and "
    "reference log-probabilities of the log are read. Empty: rewards and "
    "advantages are those of its rows, and the rest is computed.",
  )


def load_known(
  values: flags.FlagValues,
  log: encoding.Log,
  loaded: hf.LanguageModel,
  needed: Sequence[str],
  mesh: Any,
  **options: Any,
) -> dict[str, np.ndarray]:
  """Returns what is known of a log, from --cache; see `cached.known`."""
  return cached.known(
    log,
    loaded,
    needed,
    cache=values.cache,
    dtype=values.dtype,
    batch_size=values.sample_batch_size,
    mesh=mesh,
    **options,
  )


def define_dev(
  name: str = "dev",
  text: str = "Prompts by whose replies the best parameters are selected",
) -> None:
  """Defines prompts that the policy answers, after the task and the log.

  Args:
    name: of the prompts: the flags are --<name>_data and --num_<name>_prompts.
    text: what they are.
  """
  flags.DEFINE_string(
    f"{name}_data",
    "",
    f"{text}, in the forms of --data; empty: the task's validation split. "
    "Replies have --max_response_length tokens at most.",
  )
  flags.DEFINE_integer(
    f"num_{name}_prompts",
    280,
    f"Number of {name} prompts that are used, the first ones.",
    lower_bound=1,
  )
  entry.require(
    ["task", "data", f"{name}_data"],
    lambda v: v["task"] or (v["data"] and v[f"{name}_data"]),
    f"Without a --task, give --data and --{name}_data.",
  )


def read_dev(
  values: flags.FlagValues, tokenizer: Any, name: str = "dev"
) -> prompts.Prompts:
  """Reads the prompts that `define_dev` defines.

  Raises:
    ValueError: as `prompts.read`.
  """
  return prompts.read(
    tokenizer,
    name=values[f"{name}_data"].value,
    task=values.task and load_task(values),
    seed=values.seed,
    num_prompts=values[f"num_{name}_prompts"].value,
    **length_options(values),
  )
