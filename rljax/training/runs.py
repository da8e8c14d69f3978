"""What every script does before its own work begins."""

import json
import os
import pathlib
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
from absl import flags, logging

from rljax.distributed import processes
from rljax.storage import checkpoint


def start(
  values: flags.FlagValues, may_change: Collection[str] = ()
) -> dict[str, Any]:
  """Opens the workdir of a script and holds its flags against it.

  Reads two flags that all scripts have: `workdir`, and `compilation_cache`,
  where compiled programs are kept between runs. A script files its flags by
  `checkpoint.write_flags` once all else that may be wrong with them is known.

  Args:
    values: the absl flags of the script.
    may_change: flags that may differ when the run is started again.

  Returns:
    Name to value of the script's own flags.

  Raises:
    ValueError: if the workdir cannot be written to, is not seen by all
      processes, or holds a run with other flags; if the flags of several
      processes differ; or if a launcher has started several of a script that
      does not call `processes.join`.
  """
  processes.check_joined()
  logging.set_verbosity(logging.WARNING)  # Orbax has much to say.
  if values.compilation_cache:
    cache = os.path.expanduser(values.compilation_cache)
    jax.config.update("jax_compilation_cache_dir", cache)
  in_force = {
    flag.name: flag.value
    for flag in values.get_key_flags_for_module(sys.argv[0])
  }
  # The first that they tell each other, now that the cache is known.
  folder = os.path.realpath(values.workdir)
  processes.check_same(
    "The flags of the processes", in_force | {"the folder of --workdir": folder}
  )
  checkpoint.prepare_workdir(values.workdir)
  processes.check_shared(values.workdir)
  checkpoint.check_flags(values.workdir, in_force, may_change)
  return in_force


def check_models(
  workdir: str,
  models: Mapping[str, Any],
  digests: Mapping[str, str] | None = None,
) -> None:
  """Holds the models that a run starts from against those of its first start.

  The flags name folders, whose content may change between two starts. Files
  the fingerprints in `models.json` the first time.

  Args:
    workdir: of the run.
    models: name of the flag -> parameters.
    digests: what else it starts from -> its SHA-256, such as a data file.

  Raises:
    ValueError: if a model, or something else, is another than when the run
      began.
  """
  path = pathlib.Path(workdir, "models.json")
  digests = dict(digests or {})
  found = {
    name: checkpoint.fingerprint(params) for name, params in models.items()
  } | digests
  processes.check_same("The models or the data of the processes", found)

  def first_start():
    if path.exists():
      return json.loads(path.read_text())
    partial = path.with_name(".models.json.partial")
    partial.write_text(json.dumps(found, indent=2) + "\n")
    os.replace(partial, path)
    return found

  known = processes.from_first(first_start)
  for name, value in found.items():
    if known.get(name) != value:
      what = f"--{name} holds other weights"
      if name in digests:
        what = f"{name} are others"
      raise ValueError(
        f"{what} than when the run in {workdir} began; choose another workdir, "
        "or bring them back."
      )


def check_same_kind(name: str, other: Any, policy: Any) -> None:
  """Raises ValueError unless a model can stand in for the policy.

  Args:
    name: of the model, with its flag.
    other: the model, its `model` and `tokenizer`, as `hf.load` gives them.
    policy: likewise.
  """
  if other.model.config != policy.model.config:
    raise ValueError(
      f"{name} is another architecture than the policy: {other.model.config} "
      f"and {policy.model.config}."
    )
  check_same_tokens(name, other, policy)


def check_same_tokens(name: str, other: Any, policy: Any) -> None:
  """Raises ValueError unless two models have the same tokens; see above."""
  same = other.tokenizer.get_vocab() == policy.tokenizer.get_vocab()
  if not same or other.tokenizer.eos_token_id != policy.tokenizer.eos_token_id:
    raise ValueError(
      f"{name} has another vocabulary or end token than the policy: they must "
      "share both."
    )


def unescaped(texts: Sequence[str]) -> list[str]:
  """Texts of a flag, in which a backslash and an n are a line feed."""
  return [text.replace("\\n", "\n") for text in texts]


def check_positive(values: flags.FlagValues, *names: str) -> None:
  """Raises ValueError if one of the named flags is below 1."""
  for name in names:
    if values[name].value < 1:
      raise ValueError(f"--{name} must be positive, got {values[name].value}.")
