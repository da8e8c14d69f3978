"""Flags that scripts share: their bounds, their help and their readers.

A script calls the groups that it needs, with its own defaults, and defines what
is its algorithm's alone:

  cli.define_run(steps=1024, save_every=200, eval_every=100)
  cli.define_models()
  flags.DEFINE_float("discount", 1.0, "γ of the returns, per response token.")
  FLAGS = flags.FLAGS

  def main():
    run = runs.start(FLAGS, total_steps=FLAGS.steps)
    loaded = hf.load(FLAGS.policy, **cli.model_options(FLAGS))
    ...

  if __name__ == "__main__":
    cli.run(main)

A default that differs from script to script is an argument of the group. This
is the one module of the library that knows flags by their names.
"""

import os
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import app, flags

from rljax import tasks
from rljax.distributed import meshes
from rljax.generation import grammars, samplers
from rljax.models import hf
from rljax.ops import sampling
from rljax.rlmec import prompts as rewriting
from rljax.scoring import cached, reward_terms, scorers
from rljax.text import keywords, logged, prompts, steps
from rljax.training import microbatch, optimizers, preflight, runs

# Flags that are defined below belong to the script that calls the group.
flags.disclaim_key_flags()

_LARGEST = float(np.finfo(np.float32).max)

# Flags of the groups below whose default, or help, the script chooses. All
# others are the same in all scripts.
SCRIPTS_CHOOSE = frozenset(
  (
    *("steps", "save_every", "eval_every", "samples_every", "keep_best"),
    *("num_page_samples", "task", "num_prompts", "num_eval_prompts"),
    *("eval_split", "max_response_length", "too_long", "policy"),
    *("hidden_size", "num_layers", "max_positions", "max_length"),
    *("num_samples", "temperature", "top_p", "sample_batch_size"),
    *("reward_model", "kl", "kl_coef", "kl_estimator", "batch_size", "epochs"),
    *("learning_rate", "schedule", "warmup", "weight_decay", "max_grad_norm"),
    *("template", "locate"),
  )
)


def run(main: Callable[[], int | None]) -> None:
  """Parses the flags, runs a script's main function, and exits.

  A flag that cannot be parsed, a word that is no flag, a number that is not
  finite, and a ValueError of the script are one line on standard error, and the
  exit status is 1; `--verbosity=1` shows where the error came from. A path that
  begins with ~ is expanded.

  Args:
    main: takes nothing, and returns the exit status.
  """

  def checked(argv):
    values = flags.FLAGS
    try:
      check(values, argv[1:])
      return main()
    except (ValueError, preflight.Refused) as error:
      if values.verbosity >= 1:
        raise
      _print_error(argv[0], f"{error} (--verbosity=1 shows where.)")
      if jax.distributed.is_initialized():
        os._exit(1)  # The other processes would wait for this one.
      return 1

  app.run(checked, flags_parser=_parse)


def _parse(argv):
  """Parses the flags, or prints what is wrong with them and exits."""
  try:
    return flags.FLAGS(argv)
  except flags.Error as error:
    text = "; ".join(str(error).splitlines())
    _print_error(argv[0], f"{text.rstrip('.')}. (--help lists the flags.)")
    sys.exit(1)


def _print_error(script, text):
  sys.stdout.flush()
  print(f"{os.path.basename(script)}: {text}", file=sys.stderr, flush=True)


def check(values: flags.FlagValues, words: Sequence[str] = ()) -> None:
  """Expands paths, and refuses what cannot be meant.

  Args:
    values: parsed flags.
    words: of the command line that are no flags.

  Raises:
    ValueError: if there are any, or a number is not finite.
  """
  if words:
    name = words[0].partition("=")[0]
    hint = f"; write --{words[0]}" if name in values else ""
    raise ValueError(
      f"{words[0]!r} on the command line is not a flag: flags begin with "
      f"-- and look like --name=value{hint}."
    )
  for name in values:
    flag = values[name]
    if isinstance(flag.value, str) and flag.value.startswith("~"):
      flag.value = os.path.expanduser(flag.value)
    if isinstance(flag.value, float) and not abs(flag.value) <= _LARGEST:
      raise ValueError(
        f"--{flag.name} must be a finite number, as float32 holds it, got "
        f"{flag.value}."
      )


def may_change(*names: str) -> None:
  """Marks flags that may differ when a run is started again."""
  for name in names:
    flags.FLAGS[name].may_change = True


# Groups of flags, in the order of the data's journey.


def define_presets(
  algorithm: str,
  presets: Mapping[str, str],
  *,
  paired: Mapping[str, str] | None = None,
) -> None:
  """Defines --algorithm, which sets other flags unless they are given.

  It does so while the command line is parsed, before any condition over flags
  that is defined after this: call it first.

  Args:
    algorithm: default of --algorithm.
    presets: algorithm -> flags of the script, "name=value name=value". A value
      such as max_length/5 is that share of another flag, rounded down.
    paired: flag of a preset -> another one that speaks for it: if that is
      given, the preset leaves both alone, for half of a pair would not fit the
      other half.
  """
  paired = paired or {}

  def apply(name):
    values = flags.FLAGS
    for flag, text in _preset(presets[name]):
      is_given = any(values[x].present for x in (flag, paired.get(flag, flag)))
      whole, _, divisor = text.partition("/")
      if is_given:
        continue
      if divisor:
        values[flag].value = values[whole].value // int(divisor)
      else:
        values[flag].value = values[flag].parser.parse(text)
    return True

  flags.DEFINE_enum(
    "algorithm",
    algorithm,
    list(presets),
    "Algorithm, which sets other flags unless they are given; "
    + "; ".join(f"{name}: {text}" for name, text in presets.items())
    + ".",
  )
  flags.register_validator("algorithm", apply)


def _preset(text):
  """Splits the flags of a preset into names and values."""
  return [word.split("=") for word in text.split()]


def define_run(
  *,
  steps: int | None = None,
  epochs: float | None = None,
  save_every: int | None = 500,
  eval_every: int | None = None,
  samples_every: int | None = None,
  keep_best: bool | None = None,
  num_page_samples: int | None = None,
  logs: bool = True,
) -> None:
  """Defines the flags of a run.

  Args:
    steps: default of --steps; 0: as many as --epochs make; None: no flag.
    epochs: default of --epochs, the passes over all data, for --steps=0; None:
      no flag here.
    save_every: default of --save_every; None: no flag.
    eval_every: default of --eval_every; None: no flag, nor --keep_best.
    samples_every: default of --samples_every, for scripts that draw samples in
      every step; None: no flag.
    keep_best: default of --keep_best; None: off, where there is --eval_every.
    num_page_samples: default of --num_page_samples; None: 8 where there is
      --samples_every, else no flag.
    logs: whether metrics are logged.
  """
  if eval_every is not None:
    keep_best = bool(keep_best)
  if samples_every is not None and num_page_samples is None:
    num_page_samples = 8
  flags.DEFINE_string(
    "workdir",
    None,
    "Folder of the run: flags, metrics, samples, checkpoints. A run that was "
    "stopped goes on when the same command is given again.",
    required=True,
  )
  flags.DEFINE_integer(
    "seed", 0, "Seed of every source of randomness.", lower_bound=0
  )
  if steps is not None:
    flags.DEFINE_integer(
      "steps",
      steps,
      "Steps of training, as the script's first lines define a step."
      + (" 0: as many as --epochs make." if not steps else ""),
      lower_bound=0 if not steps else 1,
    )
  if epochs is not None:
    flags.DEFINE_float(
      "epochs",
      epochs,
      "Passes over the training data, where --steps is 0; above 0.",
      lower_bound=1e-6,
    )
  if save_every is not None:
    flags.DEFINE_integer(
      "save_every", save_every, "Steps between checkpoints.", lower_bound=1
    )
  if eval_every is not None:
    flags.DEFINE_integer(
      "eval_every",
      eval_every,
      "Steps between evaluations on held-out data.",
      lower_bound=1,
    )
  if keep_best is not None:
    flags.DEFINE_bool(
      "keep_best",
      keep_best,
      "Whether <workdir>/best keeps the parameters of the best evaluation.",
    )
  if samples_every is not None:
    flags.DEFINE_integer(
      "samples_every",
      samples_every,
      "Steps between samples that are written to samples.jsonl.",
      lower_bound=1,
    )
    flags.DEFINE_integer(
      "samples_logged",
      32,
      "Samples that are written to samples.jsonl at a time.",
      lower_bound=0,
    )
    may_change("samples_every", "samples_logged")
  if num_page_samples is not None:
    flags.DEFINE_integer(
      "num_page_samples",
      num_page_samples,
      "Samples that the page tokens.html shows, token by token; 0 writes no "
      "page.",
      lower_bound=0,
    )
    may_change("num_page_samples")
  _define_devices()
  if logs:
    flags.DEFINE_string(
      "wandb_project",
      "",
      "Weights & Biases project to which metrics are sent as well; empty for "
      "none.",
    )
    may_change("wandb_project")


def _define_devices():
  """Defines the mesh and the cache of compiled programs."""
  flags.DEFINE_string(
    "mesh",
    "data:-1",
    "Devices by axis, such as data:2,fsdp:4: data copies the parameters, fsdp "
    "splits them and the rows of a batch, tensor splits the parameters; one "
    "size may be -1, for all devices that are left.",
  )
  flags.DEFINE_string(
    "compilation_cache",
    "~/.cache/rljax",
    "Folder in which compiled programs are kept for later runs; empty for "
    "none.",
  )
  may_change("workdir", "mesh", "compilation_cache")


def define_preflight() -> None:
  """Defines what the preflight does."""
  flags.DEFINE_enum(
    "preflight",
    "strict",
    ["strict", "warn", "off"],
    "What to do if sampler and trainer disagree before the first update: "
    "strict stops, warn continues, off skips the check.",
  )
  may_change("preflight")


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


def define_cache() -> None:
  """Defines where numbers of a log are read from."""
  flags.DEFINE_string(
    "cache",
    "",
    "Workdir of offline_value.py, from which rewards, advantages and "
    "reference log-probabilities of the log are read. Empty: rewards and "
    "advantages are those of its rows, and the rest is computed.",
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
  _require(
    ["task", "data", f"{name}_data"],
    lambda v: v["task"] or (v["data"] and v[f"{name}_data"]),
    f"Without a --task, give --data and --{name}_data.",
  )


def define_replies() -> None:
  """Defines how replies to dev prompts are drawn; see `load_responder`."""
  flags.DEFINE_bool(
    "greedy",
    True,
    "Whether a reply takes the likeliest token everywhere; false samples it at "
    "temperature 1.",
  )
  flags.DEFINE_integer(
    "sample_batch_size",
    64,
    "Texts that are answered or scored at the same time.",
    lower_bound=1,
  )
  define_stop_strings()


def define_models(
  *,
  policy: str | None = None,
  required: bool = True,
  remat: bool = True,
  logits: bool = True,
) -> None:
  """Defines the policy and how models compute.

  Args:
    policy: what --policy is to the script, as a sentence; None: it starts as
      this model.
    required: whether it must be named; else it may be empty.
    remat: whether the script has a backward pass.
    logits: see `define_compute`.
  """
  flags.DEFINE_string(
    "policy",
    None if required else "",
    (policy or "Language model that the policy starts as.")
    + " The workdir of a run, a Hugging Face directory, a packaged model, a "
    "GGUF file or a hub name"
    + ("." if required else "; empty for random weights."),
    required=required,
  )
  define_compute(remat=remat, logits=logits)


def define_compute(*, remat: bool = True, logits: bool = True) -> None:
  """Defines how models compute.

  Args:
    remat: whether the script has a backward pass.
    logits: whether that goes through logits of all tokens.
  """
  flags.DEFINE_enum(
    "dtype",
    "float32",
    ["float32", "bfloat16"],
    "Number format of the models' computation; parameters stay float32.",
  )
  if remat:
    flags.DEFINE_bool(
      "remat",
      False,
      "Whether the backward pass recomputes the layers: less memory, more "
      "time.",
    )
  if remat and logits:
    flags.DEFINE_integer(
      "chunk_size",
      0,
      "Response positions whose logits exist at the same time; 0 takes as many "
      "as fit into 256 MB.",
      lower_bound=0,
    )


def define_random_model(
  *, hidden_size: int, num_layers: int, max_positions: int
) -> None:
  """Defines the shape of a model with random weights."""
  flags.DEFINE_enum(
    "family",
    "gpt2",
    ["gpt2", "llama"],
    "Architecture of a model that starts from random weights.",
  )
  for name, default, text in (
    ("hidden_size", hidden_size, "Width"),
    ("num_layers", num_layers, "Layers"),
    ("num_heads", 4, "Attention heads"),
    ("max_positions", max_positions, "Longest text, in tokens,"),
  ):
    flags.DEFINE_integer(
      name,
      default,
      f"{text} of a model that starts from random weights.",
      lower_bound=1,
    )


def define_sampler(
  *,
  max_length: int,
  num_samples: int | None = None,
  temperature: float = 1.0,
  top_p: float = 1.0,
  sample_batch_size: int | None = None,
  online: bool = False,
) -> None:
  """Defines how responses are drawn.

  Args:
    max_length: default of --max_length.
    num_samples: default of --num_samples; None: no flag.
    temperature: default of --temperature.
    top_p: default of --top_p.
    sample_batch_size: default of --sample_batch_size; None: no flag.
    online: whether the script learns from the responses of every step as they
      are: it then says where they end, and what they are worth without an end.
  """
  flags.DEFINE_integer(
    "max_length",
    max_length,
    "Most tokens of a response, its end token included.",
    lower_bound=1,
  )
  if num_samples is not None:
    flags.DEFINE_integer(
      "num_samples", num_samples, "Responses to each prompt.", lower_bound=1
    )
  flags.DEFINE_float(
    "temperature",
    temperature,
    "Temperature τ of the sampler, which divides the logits; above 0.",
    lower_bound=1e-6,
  )
  flags.DEFINE_float(
    "top_p",
    top_p,
    "Samples from the likeliest tokens that together have this probability; 1 "
    "samples from all.",
    lower_bound=1e-6,
    upper_bound=1.0,
  )
  flags.DEFINE_integer(
    "top_k",
    0,
    "Samples from this many of the likeliest tokens; 0 samples from all.",
    lower_bound=0,
  )
  flags.DEFINE_float(
    "min_p",
    0.0,
    "Samples from tokens of at least this share of the largest probability; 0 "
    "samples from all.",
    lower_bound=0.0,
    upper_bound=1.0,
  )
  define_stop_strings()
  if sample_batch_size is not None:
    flags.DEFINE_integer(
      "sample_batch_size",
      sample_batch_size,
      "Prompts that are answered at the same time.",
      lower_bound=1,
    )
  if online:
    define_ends()
    _define_limits()


def define_ends() -> None:
  """Defines whether the end token and a grammar end responses."""
  flags.DEFINE_bool(
    "stop_at_eos",
    False,
    "Whether the end token ends a response; if not, it is never drawn.",
  )
  flags.DEFINE_enum(
    "constraint",
    "none",
    ["none", "grammar"],
    "What responses must follow: grammar keeps them within that of the task.",
  )
  _require(
    ["constraint", "stop_at_eos"],
    lambda v: v["constraint"] == "none" or v["stop_at_eos"],
    "--constraint=grammar lets a response end where its expression does: it "
    "needs --stop_at_eos.",
  )


def _define_limits():
  """Defines limits of their own, and what responses without an end earn."""
  flags.DEFINE_integer(
    "min_length",
    0,
    "Least limit of a response: each has a limit of its own, drawn from here "
    "to --max_length; 0 gives all of them --max_length.",
    lower_bound=0,
  )
  flags.DEFINE_float(
    "unfinished_score",
    None,
    "Score of a response that runs out of length, which is then never right; "
    "unset, it is scored as any other.",
  )
  _require(
    ["min_length", "max_length"],
    lambda v: v["min_length"] <= v["max_length"],
    "--min_length must not be more than --max_length.",
  )
  _require(
    ["unfinished_score", "stop_at_eos", "stop_strings"],
    lambda v: (
      v["unfinished_score"] is None or v["stop_at_eos"] or v["stop_strings"]
    ),
    "--unfinished_score is for responses that run out of length, as all do "
    "without --stop_at_eos or --stop_strings.",
  )


def _require(names, holds, message):
  """Registers a condition over several flags."""
  flags.register_multi_flags_validator(names, holds, message)


def define_dynamic_sampling() -> None:
  """Defines what happens to groups of responses that are scored alike."""
  flags.DEFINE_bool(
    "dynamic_sampling",
    False,
    "Whether groups of equal scores, which teach nothing, are replaced by "
    "those of further prompts.",
  )
  flags.DEFINE_integer(
    "max_sampling_rounds",
    10,
    "Batches of prompts that a step draws at most, with --dynamic_sampling.",
    lower_bound=1,
  )
  _require(
    ["dynamic_sampling", "num_samples"],
    lambda v: not v["dynamic_sampling"] or v["num_samples"] > 1,
    "--dynamic_sampling compares responses to one prompt: --num_samples must "
    "be at least 2.",
  )
  _require(
    ["dynamic_sampling", "unfinished_score"],
    lambda v: not v["dynamic_sampling"] or not v["unfinished_score"],
    "--dynamic_sampling keeps the groups whose scores differ, and "
    "--unfinished_score would tell wrong responses apart: it must be 0.",
  )


def define_overlong_penalty() -> None:
  """Defines a price of long responses."""
  flags.DEFINE_integer(
    "overlong_buffer",
    0,
    "Last tokens before --max_length, over which a penalty grows from 0 to 1; "
    "0: no penalty.",
    lower_bound=0,
  )
  _require(
    ["overlong_buffer", "max_length"],
    lambda v: v["overlong_buffer"] <= v["max_length"],
    "--overlong_buffer must lie between 0 and --max_length.",
  )
  _require(
    ["overlong_buffer", "stop_at_eos", "stop_strings"],
    lambda v: not v["overlong_buffer"] or v["stop_at_eos"] or v["stop_strings"],
    "--overlong_buffer would price every response alike: without --stop_at_eos "
    "or --stop_strings all have --max_length tokens.",
  )


def define_stop_strings() -> None:
  """Defines the texts that end a response."""
  flags.DEFINE_list(
    "stop_strings",
    [],
    r"Texts that end a response and are cut off it, separated by commas; \n is "
    "a line feed.",
  )


def define_reward_model(text: str = "") -> None:
  """Defines a classifier that scores responses.

  Args:
    text: what it does in the script, as a sentence.
  """
  flags.DEFINE_string(
    "reward_model",
    "",
    (text or "Classifier whose reward replaces the task's score.")
    + " A workdir of outcome_reward_model.py, a Hugging Face directory or a "
    "hub name; empty for none.",
  )
  flags.DEFINE_string(
    "reward_transform",
    "sigmoid",
    "What the reward model's logit becomes: sigmoid or raw; for several labels "
    "softmax:<label>, sigmoid:<label> or raw:<label>.",
  )
  flags.DEFINE_string(
    "reward_template",
    "{prompt}{response}",
    'Text that the reward model reads, with {prompt} and {response}; "pair" '
    "for encoders that read two texts.",
  )
  flags.DEFINE_integer(
    "reward_length",
    512,
    "Most tokens that the reward model reads; longer texts lose their "
    "beginning.",
    lower_bound=1,
  )


def define_reasoning() -> None:
  """Defines how several samples of a question are judged."""
  flags.DEFINE_list(
    "k",
    [],
    "Numbers k of samples for pass@k, separated by commas; empty: "
    "--num_samples alone.",
  )
  flags.DEFINE_enum(
    "ties",
    "expected",
    ["expected", "first_seen"],
    "Which answer wins a tied vote: expected is one at random, on average; "
    "first_seen is the first.",
  )
  flags.DEFINE_enum(
    "trace_key",
    "text",
    sorted(steps.KEYS),
    "What makes two reasoning traces the same: their text, or their equations.",
  )
  flags.DEFINE_string(
    "rerank_model",
    "",
    "Classifier that ranks the samples of a question, in the forms of "
    "--reward_model and read as the flags --reward_* say; empty for none.",
  )
  flags.DEFINE_string(
    "new_vs",
    "",
    "Label of the policy whose samples make a trace of others known; empty for "
    "none.",
  )
  flags.DEFINE_string(
    "new_vs_samples",
    "",
    "File whose samples make a trace known, at least 4 times --num_samples of "
    "each prompt; empty for none.",
  )
  _require(
    ["k", "num_samples"],
    lambda v: all(
      k.isdecimal() and 1 <= int(k) <= v["num_samples"] for k in v["k"]
    ),
    "--k must be whole numbers from 1 to --num_samples.",
  )
  _require(
    ["new_vs", "new_vs_samples"],
    lambda v: not (v["new_vs"] and v["new_vs_samples"]),
    "Give --new_vs or --new_vs_samples, not both.",
  )


def define_reward_terms() -> None:
  """Defines the sum of rewards that a response earns."""
  flags.DEFINE_list(
    "reward_terms",
    ["score"],
    "Terms whose sum is the reward: score (of the task, on the last token), "
    "steps (--step_reward for each line that matches the reference), "
    "reward_model (on the last token), dense_reward_model (by how much each "
    "line changes what --reward_model expects).",
  )
  flags.DEFINE_float(
    "step_reward",
    0.1,
    "Reward of a line that matches, for the reward term steps.",
  )
  flags.DEFINE_float(
    "step_reward_limit",
    0.5,
    "Most that the lines of a response earn, for the reward term steps.",
  )
  flags.DEFINE_float(
    "step_coef", 1.0, "Scale of the reward term dense_reward_model."
  )
  define_reward_model(
    "Classifier for the reward terms reward_model and dense_reward_model."
  )


def define_rewriting(template: str, *, locate: bool | None) -> None:
  """Defines how a generative reward model is asked for rewrites.

  Args:
    template: default of --template; "": as the model was trained.
    locate: default of --locate; None: likewise.
  """
  flags.DEFINE_string(
    "stages",
    "",
    "Folder of the stages before training, which several runs may share; empty "
    "takes --workdir.",
  )
  may_change("stages")
  flags.DEFINE_enum(
    "template",
    template,
    [*([] if template else [""]), *sorted(rewriting.TEMPLATES)],
    "How the reward model is asked: compact for a model of characters, lines "
    "for a vocabulary without letters, instruction for a model of words"
    + ("." if template else "; empty: as it was trained."),
  )
  flags.DEFINE_bool(
    "locate",
    locate,
    "Whether the reward model names the first wrong step, so that its rewrite "
    "keeps the steps before that one"
    + ("." if locate is not None else "; unset: as it was trained."),
  )
  flags.DEFINE_integer(
    "max_question_length",
    2000,
    "Most tokens of a question to a model that rewrites, the wrong solution "
    "included; longer ones are left out.",
    lower_bound=1,
  )


def define_kl(
  kl: str,
  choices: Sequence[str],
  text: str,
  *,
  kl_coef: float,
  estimator: str = "k1",
) -> None:
  """Defines a KL penalty.

  Args:
    kl: default of --kl.
    choices: of --kl.
    text: help of --kl.
    kl_coef: default of --kl_coef.
    estimator: default of --kl_estimator; "" where --kl decides.
  """
  flags.DEFINE_enum(
    "kl_estimator",
    estimator,
    [*([] if estimator else [""]), "k1", "k2", "k3"],
    "Estimator of the KL divergence; see ops/log_probs.py."
    + ("" if estimator else " Empty: k3 in the loss, else k1."),
  )
  flags.DEFINE_enum("kl", kl, choices, text)
  flags.DEFINE_float(
    "kl_coef",
    kl_coef,
    "Weight β of the KL penalty; the first one, if it adapts.",
    lower_bound=0.0,
  )
  flags.DEFINE_string(
    "reference",
    "",
    "Model that the KL penalty compares the policy with, in the forms of "
    "--policy; empty: the policy before its first update.",
  )
  if not estimator:
    _require(
      ["kl", "kl_estimator"],
      lambda v: (v["kl"], v["kl_estimator"]) != ("loss", "k1"),
      "--kl_estimator=k1 has a gradient of mean 0 as a loss; take k2 or k3, or "
      "--kl=reward.",
    )
    _require(
      ["kl", "reference"],
      lambda v: v["kl"] != "none" or not v["reference"],
      "--reference has no meaning for --kl=none.",
    )


def define_adaptive_kl() -> None:
  """Defines a controller of the KL coefficient."""
  flags.DEFINE_float(
    "kl_target",
    0.0,
    "KL divergence of a response, in nats, to which the KL coefficient adapts; "
    "0 keeps --kl_coef.",
    lower_bound=0.0,
  )
  flags.DEFINE_float(
    "kl_horizon",
    10_000.0,
    "Responses over which the KL coefficient adapts.",
    lower_bound=1.0,
  )


def define_batches(
  batch_size: int,
  *,
  epochs: int | None = None,
  text: str = "Rows of every update.",
  minibatches: bool = False,
  micro_batches: bool = True,
) -> None:
  """Defines the sizes of a step."""
  flags.DEFINE_integer("batch_size", batch_size, text, lower_bound=1)
  if minibatches:
    flags.DEFINE_integer(
      "minibatch_size",
      0,
      "Responses of an update; 0 takes all of a step at once.",
      lower_bound=0,
    )
  if micro_batches:
    flags.DEFINE_integer(
      "micro_batch_size",
      0,
      "Rows of a forward and backward pass, whose gradients are accumulated; 0 "
      "takes an update's rows at once.",
      lower_bound=0,
    )
  if epochs is not None:
    flags.DEFINE_integer(
      "epochs", epochs, "Passes over the data of a step or fit.", lower_bound=1
    )


def define_optimizer(
  learning_rate: float,
  *,
  schedule: str = "constant",
  warmup: float = 0.0,
  weight_decay: float = 0.0,
  max_grad_norm: float = 0.0,
) -> None:
  """Defines AdamW."""
  flags.DEFINE_float(
    "learning_rate",
    learning_rate,
    "Highest learning rate of AdamW.",
    lower_bound=0.0,
  )
  flags.DEFINE_enum(
    "schedule",
    schedule,
    list(optimizers.SCHEDULES),
    "How the learning rate goes on after the warm-up: constant, or linear or "
    "cosine down to --final_learning_rate.",
  )
  flags.DEFINE_float(
    "final_learning_rate",
    0.0,
    "Learning rate to which --schedule=linear or cosine falls by the end.",
    lower_bound=0.0,
  )
  flags.DEFINE_float(
    "warmup",
    warmup,
    "Updates over which the learning rate rises from 0; below 1, a share of "
    "all updates.",
    lower_bound=0.0,
  )
  flags.DEFINE_float(
    "adam_b1",
    0.9,
    "Decay β1 of Adam's first moment, in [0, 1].",
    lower_bound=0.0,
    upper_bound=1.0,
  )
  flags.DEFINE_float(
    "adam_b2",
    0.999,
    "Decay β2 of Adam's second moment, in [0, 1].",
    lower_bound=0.0,
    upper_bound=1.0,
  )
  flags.DEFINE_float(
    "adam_epsilon",
    1e-8,
    "Number ε that is added to Adam's denominator.",
    lower_bound=0.0,
  )
  flags.DEFINE_float(
    "weight_decay",
    weight_decay,
    "Decoupled weight decay of AdamW, times the learning rate.",
    lower_bound=0.0,
  )
  flags.DEFINE_float(
    "max_grad_norm",
    max_grad_norm,
    "Norm to which a larger gradient is cut; 0 cuts none.",
    lower_bound=0.0,
  )


# Readers. Each takes the parsed flags of a script that called the group.


def preset(values: flags.FlagValues, presets: Mapping[str, str]) -> str:
  """Returns --algorithm, and what is in force of the flags that it sets."""
  names = [name for name, _ in _preset(presets[values.algorithm])]
  return " ".join(f"--{n}={values[n].value}" for n in ("algorithm", *names))


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


def random_model_options(values: flags.FlagValues) -> dict[str, Any]:
  """Returns keyword arguments of `models.fresh.make`."""
  return {
    "family": values.family,
    "hidden_size": values.hidden_size,
    "num_layers": values.num_layers,
    "num_heads": values.num_heads,
    "max_positions": values.max_positions,
    **model_options(values),
  }


def length_options(values: flags.FlagValues) -> dict[str, Any]:
  """Returns keyword arguments of `logged.prepare`."""
  return {
    "max_prompt_length": values.max_prompt_length,
    "max_response_length": values.max_response_length,
    "too_long": values.too_long,
    "prompt_format": values.prompt_format,
  }


def read_log(values: flags.FlagValues, tokenizer: Any) -> logged.Log:
  """Reads --data, or the log of --task.

  Raises:
    ValueError: as `logged.read`.
  """
  return logged.read(
    tokenizer,
    name=values.data,
    task=values.task and load_task(values),
    seed=values.seed,
    task_options=keywords.parse(values.task_options),
    first_row=values.first_row,
    num_rows=values.num_rows,
    **length_options(values),
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


def load_known(
  values: flags.FlagValues,
  log: logged.Log,
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


def load_responder(
  values: flags.FlagValues,
  loaded: hf.LanguageModel,
  asked: prompts.Prompts,
  mesh: Any,
) -> samplers.Responder:
  """Makes what replies to dev prompts, up to --max_response_length.

  Raises:
    ValueError: if prompts and replies do not fit the model's context, or the
      devices cannot share --sample_batch_size.
  """
  meshes.check_divisible(values.sample_batch_size, mesh, "--sample_batch_size")
  return samplers.Responder(
    loaded.model,
    loaded.tokenizer,
    asked.encoded,
    max_length=values.max_response_length,
    settings=sampling.Settings(greedy=values.greedy),
    batch_size=values.sample_batch_size,
    mesh=mesh,
    seed=values.seed,
    stop_strings=runs.unescaped(values.stop_strings),
    texts=asked.texts,
    unfinished_score=None,
  )


def model_options(values: flags.FlagValues) -> dict[str, Any]:
  """Returns keyword arguments of `hf.load`."""
  return {
    "dtype": values.dtype,
    "remat": "remat" in values and values.remat,
  }


def load_reference(
  values: flags.FlagValues, loaded: hf.LanguageModel
) -> hf.LanguageModel:
  """Loads --reference; the policy itself if there is none.

  Raises:
    ValueError: if it is another architecture, or has other tokens.
  """
  return load_like(values, "reference", loaded)


def load_like(
  values: flags.FlagValues, name: str, loaded: hf.LanguageModel
) -> hf.LanguageModel:
  """Loads the model that a flag names; the policy itself if it names none.

  Args:
    values: parsed flags.
    name: of the flag.
    loaded: the policy.

  Raises:
    ValueError: if it is another architecture, or has other tokens.
  """
  path = values[name].value
  if not path:
    return loaded
  other = hf.load(path, **model_options(values))
  runs.check_same_kind(f"--{name}={path}", other, loaded)
  return other


def sampler_settings(
  values: flags.FlagValues, **settings: Any
) -> samplers.Settings:
  """Returns how responses are drawn.

  Args:
    values: parsed flags.
    **settings: fields of `samplers.Settings` that no flag decides.
  """
  found = {
    name: values[name].value
    for name in samplers.Settings._fields
    if name in values and name != "stop_strings"
  }
  stop_strings = runs.unescaped(values.stop_strings)
  return samplers.Settings(
    **found | {"stop_strings": tuple(stop_strings)} | settings
  )


def reward_model_options(values: flags.FlagValues) -> dict[str, Any]:
  """Returns keyword arguments of `reward_models.RewardModel`."""
  return {
    "transform": values.reward_transform,
    "template": values.reward_template,
    "max_length": values.reward_length,
  }


def load_reward_model(
  values: flags.FlagValues,
  mesh: Any,
  *,
  batch_size: int,
  name: str = "reward_model",
) -> scorers.Scorer | None:
  """Loads a reward model as a scorer beside the task's; None if none is named.

  Args:
    values: parsed flags.
    mesh: from `meshes.make`.
    batch_size: texts at the same time.
    name: of the flag that names it; it is read as the flags --reward_* say.
  """
  if not values[name].value:
    return None
  return scorers.scorer(
    "",
    {},
    values[name].value,
    **reward_model_options(values),
    batch_size=batch_size,
    mesh=mesh,
  )


def load_scorer(
  values: flags.FlagValues, mesh: Any, *, batch_size: int
) -> scorers.Scorer:
  """Returns what scores responses: --reward_model, or --task.

  Args:
    values: parsed flags.
    mesh: from `meshes.make`.
    batch_size: texts at the same time, for a reward model.

  Raises:
    ValueError: if neither is named, or an option does not fit.
  """
  return scorers.scorer(
    values.task,
    keywords.parse(values.score_options),
    values.reward_model,
    **reward_model_options(values),
    batch_size=batch_size,
    mesh=mesh,
  )


def load_reward_terms(
  values: flags.FlagValues,
  loaded: hf.LanguageModel,
  mesh: Any,
  **options: Any,
) -> reward_terms.Terms:
  """Loads --reward_terms; see `reward_terms.load` for the options.

  Raises:
    ValueError: if the terms do not fit each other, their reward model or
      --unfinished_score.
  """
  if values.unfinished_score and "score" not in values.reward_terms:
    raise ValueError(
      f"--unfinished_score={values.unfinished_score} stands in for the score, "
      "which is none of the --reward_terms: give 0, or the term."
    )
  return reward_terms.load(
    loaded,
    names=values.reward_terms,
    mesh=mesh,
    batch_size=values.batch_size,
    dtype=values.dtype,
    step_reward=values.step_reward,
    step_reward_limit=values.step_reward_limit,
    step_coef=values.step_coef,
    unfinished_earns=values.unfinished_score is None,
    reward_model=values.reward_model,
    **reward_model_options(values),
    **options,
  )


def check_read(
  values: flags.FlagValues, chooser: str, reads: Mapping[str, Sequence[str]]
) -> None:
  """Refuses flags that are set, and that the chosen method does not read.

  Args:
    values: parsed flags.
    chooser: name of the flag that chooses the method.
    reads: method -> names of flags that it reads. Flags that no method names
      are read by all.

  Raises:
    ValueError: naming the flag and its methods.
  """
  chosen = values[chooser].value
  for name in sorted({name for names in reads.values() for name in names}):
    flag = values[name]
    if flag.value != flag.default and name not in reads[chosen]:
      methods = [method for method, names in reads.items() if name in names]
      raise ValueError(
        f"--{name}={flag.value} belongs to --{chooser}="
        f"{' or '.join(methods)}; leave it out for {chosen}."
      )


def batch_sizes(
  values: flags.FlagValues, mesh: Any, *, num_samples: int | None = None
) -> microbatch.Sizes:
  """Returns the rows of a step, of an update and of a pass.

  Args:
    values: parsed flags.
    mesh: from `meshes.make`.
    num_samples: rows for each of --batch_size prompts; None: those are rows.

  Raises:
    ValueError: if one does not divide the other, the devices cannot share
      them, or there are fewer prompts.
  """
  if num_samples is not None and values.batch_size > values.num_prompts:
    raise ValueError(
      f"--batch_size must lie between 1 and the {values.num_prompts} prompts "
      f"of --num_prompts, got {values.batch_size}."
    )
  rows = values.batch_size * (num_samples or 1)
  minibatch = ("minibatch_size" in values and values.minibatch_size) or rows
  micro_batch = (
    "micro_batch_size" in values and values.micro_batch_size
  ) or minibatch
  if rows % minibatch:
    raise ValueError(
      f"--minibatch_size={minibatch} does not divide the {rows} rows of a "
      "step (batch_size x num_samples)."
    )
  if minibatch % micro_batch:
    raise ValueError(
      f"--micro_batch_size={micro_batch} does not divide the {minibatch} rows "
      "of an update."
    )
  meshes.check_divisible(values.batch_size, mesh, "--batch_size")
  if "sample_batch_size" in values:
    name = "--sample_batch_size"
    meshes.check_divisible(values.sample_batch_size, mesh, name)
  meshes.check_divisible(micro_batch, mesh, "--micro_batch_size")
  if "sample_batch_size" in values:
    name = "--sample_batch_size"
    meshes.check_divisible(values.sample_batch_size, mesh, name)
  return microbatch.Sizes(rows, minibatch, micro_batch)


def optimizer_options(values: flags.FlagValues) -> dict[str, Any]:
  """Returns keyword arguments of `optimizers.adamw`."""
  return schedule_options(values) | {
    "b1": values.adam_b1,
    "b2": values.adam_b2,
    "epsilon": values.adam_epsilon,
    "weight_decay": values.weight_decay,
    "max_grad_norm": values.max_grad_norm,
  }


def schedule_options(values: flags.FlagValues) -> dict[str, Any]:
  """Returns keyword arguments of `optimizers.schedule`."""
  return {
    "learning_rate": values.learning_rate,
    "kind": values.schedule,
    "warmup": values.warmup,
    "final_learning_rate": values.final_learning_rate,
  }
