"""Flags of tasks, prompts and logged replies, and their readers."""

import types
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import flags

from rljax import tasks
from rljax.cli import entry, rewards
from rljax.distributed import processes
from rljax.generation import grammars
from rljax.models import hf
from rljax.scoring import cached
from rljax.text import chat, encoding, keywords, prompts

# Flags that are defined below belong to the script that calls the group.
flags.disclaim_key_flags()


def define_task(
  *,
  num_prompts: int | None = None,
  num_eval_prompts: int | None = None,
  eval_split: str | None = "test",
  scores: bool = True,
) -> None:
  """Defines the flags of a task, and how prompts are put to the policy.

  Args:
    num_prompts: default of --num_prompts; None: no flag.
    num_eval_prompts: default of --num_eval_prompts; None: no flag.
    eval_split: default of --eval_split, where there is --num_eval_prompts;
      None: no flag.
    scores: whether the task scores responses.
  """
  flags.DEFINE_string(
    "task",
    "",
    "Task that writes prompts and scores responses: one of rljax.tasks; or one "
    "of your own, by its path, such as ./my_task.py, or its module, such as "
    "my_package.my_task. Empty for none.",
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
    rewards.define_rewards()
  if num_prompts is not None:
    flags.DEFINE_integer(
      "num_prompts",
      num_prompts,
      "Training prompts that the task draws; of the prompts of a file, the "
      "most that are used.",
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
      "Split of the task, or of a data set that has splits, that evaluations "
      "use.",
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
  flags.DEFINE_string(
    "system_prompt",
    "",
    "System message in front of prompts that have none, with "
    r"--prompt_format=chat; \n is a line feed.",
  )
  flags.DEFINE_list(
    "template_options",
    [],
    "Variables of the chat template, name=value, separated by commas, such as "
    "enable_thinking=false, with --prompt_format=chat.",
  )
  entry.require(
    ["prompt_format", "system_prompt", "template_options"],
    lambda v: (
      v["prompt_format"] == "chat"
      or not (v["system_prompt"] or v["template_options"])
    ),
    "--system_prompt and --template_options belong to a chat template: give "
    "--prompt_format=chat.",
  )


def load_task(values: flags.FlagValues) -> types.ModuleType | None:
  """Returns the module that --task names, or None."""
  constraint = "constraint" in values and values.constraint
  if not values.task:
    if constraint == "grammar":
      raise ValueError(
        "--constraint=grammar keeps responses within the grammar of a task: "
        "give --task."
      )
    return None
  task = tasks.load(values.task)
  if constraint == "grammar":
    grammars.check_task(task)
  return task


def prompt_format(values: flags.FlagValues) -> str:
  """Returns how prompts are put to the policy, as `chat.describe` says it."""
  return chat.describe(
    values.prompt_format,
    system_prompt="".join(entry.unescaped([values.system_prompt])),
    options=keywords.parse(values.template_options),
  )


def define_prompts(*scorers: str, solutions: bool = False) -> None:
  """Defines files of prompts, after the task, in place of its own.

  Args:
    *scorers: flags that name what may score responses, beside --task and
      --rewards.
    solutions: whether rows of --data have a solution, too.
  """
  flags.DEFINE_string(
    "data",
    "",
    "Prompts to learn from: a .jsonl or .json file, a folder of splits or "
    "tfds:<name>, whose rows have a prompt, a text or messages, and any other "
    "columns, which the functions of --rewards are given. Empty: those of "
    "--task.",
  )
  flags.DEFINE_string(
    "eval_data",
    "",
    "Held-out prompts, in the forms of --data. Empty: the split --eval_split "
    "where --data has splits, else --eval_share of its prompts.",
  )
  flags.DEFINE_float(
    "eval_share",
    0.1,
    "Share of the different prompts of a --data of one file that is held out, "
    "chosen by --seed; above 0 and below 1.",
    lower_bound=1e-9,
    upper_bound=1 - 1e-9,
  )
  if solutions:
    flags.DEFINE_string(
      "solution_column",
      "solution",
      "Column of --data with the solution of a prompt.",
    )
  require_prompts(*scorers)
  entry.require(
    ["data", "eval_data"],
    lambda v: v["data"] or not v["eval_data"],
    "--eval_data holds out prompts for those of --data: give that, too.",
  )


def require_prompts(*scorers: str) -> None:
  """Asks for prompts and for what scores responses, once they have flags.

  Args:
    *scorers: see `define_prompts`.
  """
  entry.require(
    ["task", "data"],
    lambda v: v["task"] or v["data"],
    "There is nothing to ask the policy: give --data, a file of prompts, or "
    "--task.",
  )
  names = ("task", "rewards", *scorers)
  entry.require(
    list(names),
    lambda v: any(v[name] for name in names),
    "Nothing scores the responses: give --rewards, functions of your own"
    + "".join(f", --{name}" for name in scorers)
    + ", or a --task.",
  )


def file_options(values: flags.FlagValues) -> dict[str, Any]:
  """Returns what `text.prompts.load` and its like take of files of prompts."""
  names = ("data", "eval_data", "eval_share", "solution_column")
  return {name: values[name].value for name in names if name in values}


def prompt_options(values: flags.FlagValues) -> dict[str, Any]:
  """Returns keyword arguments of `text.prompts.load`."""
  return {
    "seed": values.seed,
    "num_prompts": values.num_prompts,
    "num_eval_prompts": values.num_eval_prompts,
    "eval_split": values.eval_split,
    "max_length": values.max_prompt_length,
    "prompt_format": prompt_format(values),
    "task_options": keywords.parse(values.task_options),
    "eos": "stop_at_eos" not in values or values.stop_at_eos,
    # Of each step, where a step asks so many.
    "at_least": values.batch_size if "minibatch_size" in values else 1,
    "note": print if processes.is_first() else lambda line: None,
    **file_options(values),
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
    "prompt_format": prompt_format(values),
    "name": values.task or "prompts",
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
    "prompt_format": prompt_format(values),
  }


def define_log() -> None:
  """Defines the flags of logged replies."""
  flags.DEFINE_string(
    "data",
    "",
    "Logged replies: a .jsonl, .json, .csv or .parquet file, a folder of "
    "splits, tfds:<name> or hub:<name>; docs/data.md shows the columns. Empty: "
    "those of the task.",
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


def define_held_out() -> None:
  """Defines which rows of a file are held out."""
  flags.DEFINE_string(
    "eval_data",
    "",
    "Held-out rows, in the forms of --data; empty: --eval_share of its "
    "prompts.",
  )
  flags.DEFINE_float(
    "eval_share",
    0.1,
    "Share of the different prompts of --data, between 0 and 1, that is held "
    "out where there is no --eval_data; the seed shuffles them.",
  )


def read_log(
  values: flags.FlagValues, tokenizer: Any, *, join: bool = False
) -> encoding.Log:
  """Reads --data, or the log of --task.

  Args:
    values: parsed flags.
    tokenizer: of the policy.
    join: see `encoding.read`.

  Raises:
    ValueError: as `encoding.read`.
  """
  held_out = {}
  if "eval_share" in values and not has_scorer(values):
    names = ("eval_data", "eval_share")
    held_out = {name: values[name].value for name in names}
  return encoding.read(
    tokenizer,
    name=values.data,
    task=values.task and load_task(values),
    seed=values.seed,
    task_options=keywords.parse(values.task_options),
    first_row=values.first_row,
    num_rows=values.num_rows,
    join=join,
    **held_out,
    **length_options(values),
  )


def has_scorer(values: flags.FlagValues) -> bool:
  """Whether something scores new replies: else held-out rows select.

  Raises:
    ValueError: if there are prompts to reply to, and nothing that scores.
  """
  found = bool(values.task or values.reward_model or values.rewards)
  if values.dev_data and not found:
    raise ValueError(
      f"Nothing scores the replies to --dev_data={values.dev_data}: give "
      "--rewards, a --reward_model or a --task; or leave it out, to select by "
      "the loss on held-out rows."
    )
  return found


def require_examples() -> None:
  """Asks for examples, and for words where a model starts anew."""
  entry.require(
    ["task", "data"],
    lambda v: v["task"] or v["data"],
    "There is nothing to learn from: give --data, or a --task that has "
    "examples.",
  )
  entry.require(
    ["task", "policy"],
    lambda v: v["task"] or v["policy"],
    "A model with random weights has the words of a task: give --task, or a "
    "--policy to start from.",
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
  *,
  needed: bool = True,
) -> None:
  """Defines prompts that the policy answers, after the task and the log.

  Args:
    name: of the prompts: the flags are --<name>_data and --num_<name>_prompts.
    text: what they are.
    needed: whether there must be such prompts; else rows can be held out.
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
    lambda v: v["task"] or (v["data"] and (v[f"{name}_data"] or not needed)),
    "Without a --task, give --data"
    + (f" and --{name}_data." if needed else ", a file of rows."),
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
