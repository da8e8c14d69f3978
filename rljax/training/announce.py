"""Says in five lines what a run will do, before anything is loaded."""

import pathlib

import jax
from absl import flags

from rljax.models import fresh, hf
from rljax.storage import checkpoint, mirrors

_SUFFIXES = ((1e9, "billion"), (1e6, "million"), (1e3, "thousand"))


def lines(values: flags.FlagValues, mesh: jax.sharding.Mesh) -> list[str]:
  """Describes a training run by its flags alone.

  Args:
    values: parsed flags of a training script.
    mesh: its devices.

  Returns:
    The model, what it learns from, the steps, the tokens of a step, and where
    the results go.
  """
  get = lambda name, default=None: (
    values[name].value if name in values else default
  )
  return [
    f"Model: {_model(get)}",
    f"Learns from: {_source(get)}",
    f"Steps: {_steps(get)}",
    f"A step: {_step(get)}, on {_devices(mesh)}",
    f"Writes: {_folder(values.workdir)}",
  ]


def _model(get):
  name = get("policy")
  if not name:
    return (
      f"random weights, {get('family')} of {get('num_layers')} layers, width "
      f"{get('hidden_size')}"
    )
  model = hf.load_module(name)
  shapes = jax.tree.leaves(fresh.shapes(model))
  num = sum(x.size for x in shapes)
  return (
    f"{name}, {type(model).__name__} of {_short(num)} parameters, computes in "
    f"{get('dtype', 'float32')}"
  )


def _source(get):
  names, most = [], get("num_prompts")
  data = get("data")
  if data:
    rows = _num_rows(data)
    names.append(data + (f" ({rows} rows)" if rows else ""))
  elif get("task"):
    num = most or get("num_examples")
    names.append(
      f"the task {get('task')}" + (f" ({num} prompts)" if num else "")
    )
  if get("rewards"):
    names.append(f"scored by {', '.join(get('rewards'))}")
  elif get("reward_model"):
    names.append(f"with the reward model {get('reward_model')}")
  return ", ".join(names) or "what its flags name"


def _num_rows(data) -> int | None:
  path = pathlib.Path(data)
  if not (path.is_file() and path.suffix == ".jsonl"):
    return None
  with path.open("rb") as file:
    return sum(1 for line in file if line.strip())


def _steps(get):
  if get("rounds"):
    return f"{get('rounds')} rounds of sampling and fitting"
  if get("steps"):
    text = f"{get('steps')}"
  else:
    text = f"as many as --epochs={get('epochs')} make"
  return (
    f"{text}, learning rate {get('learning_rate', 0):g} "
    f"({get('schedule', 'constant')}, warm-up {get('warmup', 0):g})"
  )


def _step(get):
  rows, num_samples = get("batch_size", 1), get("num_samples")
  online = "minibatch_size" if get("minibatch_size") is not None else None
  length = get("max_length") if online else get("max_response_length")
  text = f"{rows} rows"
  if online:
    text = f"{rows} prompts with {num_samples} responses each"
    rows *= num_samples
  limit = get("max_prompt_length")
  if length and limit:
    text += (
      f", at most {rows * length:,} tokens of responses and "
      f"{rows * (length + limit):,} in all"
    )
  return text


def _devices(mesh):
  kind = mesh.devices.flat[0].device_kind
  return f"{mesh.size} device{'s' * (mesh.size > 1)} ({kind})"


def _folder(workdir):
  steps = checkpoint.steps(workdir)
  going_on = f", going on after step {max(steps)}" if steps else ""
  return mirrors.shown(workdir) + going_on


def _short(num: int) -> str:
  for size, name in _SUFFIXES:
    if num >= size:
      return f"{num / size:.3g} {name}"
  return str(num)
