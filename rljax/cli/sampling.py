"""Flags of how responses are drawn and where they end."""

from collections.abc import Mapping
from typing import Any

from absl import flags

from rljax.cli import entry
from rljax.distributed import meshes
from rljax.generation import responders, responses
from rljax.models import hf
from rljax.ops import sampling
from rljax.text import prompts

# Flags that are defined below belong to the script that calls the group.
flags.disclaim_key_flags()


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
  flags.DEFINE_integer(
    "min_new_tokens",
    0,
    "Tokens of a response before its end token may be drawn.",
    lower_bound=0,
  )
  entry.require(
    ["min_new_tokens", "max_length"],
    lambda v: v["min_new_tokens"] < v["max_length"],
    "--min_new_tokens must be less than --max_length, or no response ends.",
  )
  define_stop_strings()
  define_slots()
  flags.DEFINE_integer(
    "length_buckets",
    1,
    "Widths K of prompts, and where a script learns from them of responses, at "
    "which rows are read: no wider than the longest of a pass needs. With "
    "--micro_batch_size, the rows of a pass have about one length. 1 reads all "
    "at the longest of the data set. Samplers compile K times as long, and "
    "learners K * K times.",
    lower_bound=1,
    upper_bound=8,
  )
  if sample_batch_size is not None:
    flags.DEFINE_integer(
      "sample_batch_size",
      sample_batch_size,
      "Prompts that are answered at the same time.",
      lower_bound=1,
    )
  if online:
    flags.DEFINE_integer(
      "draw_batch_size",
      0,
      "Prompts of a step that are answered at the same time, a divisor of "
      "--batch_size; the next ones are answered while these responses are "
      "scored, which pays where rewards are slow. 0 answers all at once.",
      lower_bound=0,
    )
    define_ends()
    _define_limits()


def sampler_settings(
  values: flags.FlagValues, **settings: Any
) -> responses.Settings:
  """Returns how responses are drawn.

  Args:
    values: parsed flags.
    **settings: fields of `responses.Settings` that no flag decides.
  """
  found = {
    name: values[name].value
    for name in responses.Settings._fields
    if name in values and name not in ("stop_strings", "stop_tokens")
  }
  found["stop_strings"] = tuple(entry.unescaped(values.stop_strings))
  found["stop_tokens"] = tuple(entry.unescaped(values.stop_tokens))
  return responses.Settings(**found | settings)


def define_ends() -> None:
  """Defines whether the end token and a grammar end responses."""
  flags.DEFINE_bool(
    "stop_at_eos",
    True,
    "Whether the end token ends a response; if not, it is never drawn.",
  )
  flags.DEFINE_enum(
    "constraint",
    "none",
    ["none", "grammar"],
    "What responses must follow: grammar keeps them within that of the task.",
  )
  entry.require(
    ["constraint", "stop_at_eos"],
    lambda v: v["constraint"] == "none" or v["stop_at_eos"],
    "--constraint=grammar lets a response end where its expression does: it "
    "needs --stop_at_eos.",
  )

  entry.require(
    ["min_new_tokens", "constraint"],
    lambda v: not v["min_new_tokens"] or v["constraint"] == "none",
    "--min_new_tokens forbids the end where --constraint=grammar may allow "
    "nothing else.",
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
  flags.DEFINE_bool(
    "mask_unfinished",
    False,
    "Whether nothing is learnt from a response that runs out of length: it is "
    "left out of the loss and of the baseline of its group, and counted.",
  )
  entry.require(
    ["mask_unfinished", "stop_at_eos", "stop_strings"],
    lambda v: not v["mask_unfinished"] or v["stop_at_eos"] or v["stop_strings"],
    "--mask_unfinished would leave out every response: without --stop_at_eos "
    "or --stop_strings all run out of length.",
  )
  entry.require(
    ["min_length", "max_length"],
    lambda v: v["min_length"] <= v["max_length"],
    "--min_length must not be more than --max_length.",
  )
  entry.require(
    ["unfinished_score", "stop_at_eos", "stop_strings", "stop_tokens"],
    lambda v: v["unfinished_score"] is None or _has_end(v),
    "--unfinished_score is for responses that run out of length, as all do "
    "without --stop_at_eos, --stop_strings or --stop_tokens.",
  )


def has_end(values: flags.FlagValues) -> bool:
  """Returns whether anything but the limit of length ends a response."""
  return _has_end(values.flag_values_dict())


def _has_end(values: Mapping[str, Any]) -> bool:
  names = ("stop_at_eos", "stop_strings", "stop_tokens")
  return any(values[name] for name in names)


def define_stop_strings() -> None:
  """Defines the texts and the further tokens that end a response."""
  flags.DEFINE_list(
    "stop_strings",
    [],
    r"Texts that end a response and are cut off it, separated by commas; \n is "
    "a line feed.",
  )
  flags.DEFINE_list(
    "stop_tokens",
    [],
    "Tokens that end a response besides the end tokens of tokenizer and model, "
    r"as texts or ids, separated by commas; \n is a line feed.",
  )


def define_slots() -> None:
  """Defines how many responses are decoded at the same time."""
  flags.DEFINE_integer(
    "slots",
    0,
    "Responses that are decoded at the same time: when one ends, the next of "
    "its batch takes its place, which saves time where lengths differ much. 0 "
    "decodes all of a batch at the same time, until the longest has ended.",
    lower_bound=0,
  )


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
  entry.require(
    ["dynamic_sampling", "num_samples"],
    lambda v: not v["dynamic_sampling"] or v["num_samples"] > 1,
    "--dynamic_sampling compares responses to one prompt: --num_samples must "
    "be at least 2.",
  )
  entry.require(
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
  entry.require(
    ["overlong_buffer", "max_length"],
    lambda v: v["overlong_buffer"] <= v["max_length"],
    "--overlong_buffer must lie between 0 and --max_length.",
  )
  entry.require(
    ["overlong_buffer", "stop_at_eos", "stop_strings", "stop_tokens"],
    lambda v: not v["overlong_buffer"] or _has_end(v),
    "--overlong_buffer would price every response alike: without "
    "--stop_at_eos, --stop_strings or --stop_tokens all have --max_length "
    "tokens.",
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
  define_slots()


def load_responder(
  values: flags.FlagValues,
  loaded: hf.LanguageModel,
  asked: prompts.Prompts,
  mesh: Any,
) -> responders.Responder:
  """Makes what replies to dev prompts, up to --max_response_length.

  Raises:
    ValueError: if prompts and replies do not fit the model's context, or the
      devices cannot share --sample_batch_size.
  """
  meshes.check_divisible(values.sample_batch_size, mesh, "--sample_batch_size")
  return responders.Responder(
    loaded.model,
    loaded.tokenizer,
    asked.encoded,
    max_length=values.max_response_length,
    settings=sampling.Settings(greedy=values.greedy),
    batch_size=values.sample_batch_size,
    mesh=mesh,
    seed=values.seed,
    stop_strings=entry.unescaped(values.stop_strings),
    stop_tokens=entry.unescaped(values.stop_tokens),
    texts=asked.texts,
    unfinished_score=None,
    slots=values.slots,
  )
