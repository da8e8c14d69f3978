"""Checks of the models that a run starts from."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from rljax.distributed import processes
from rljax.storage import checkpoint, mirrors, paths, workdirs


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
    name: checkpoint.fingerprint(params)
    for name, params in models.items()
    if params is not None
  } | digests
  processes.check_same("The models or the data of the processes", found)

  def first_start():
    if path.exists():
      return workdirs.read_object(path)
    paths.write_whole(path, json.dumps(found, indent=2) + "\n")
    return found

  known = processes.from_first(first_start)
  for name, value in found.items():
    if known.get(name) != value:
      what = f"--{name} holds other weights"
      if name in digests:
        what = f"{name} are others"
      raise ValueError(
        f"{what} than when the run in {mirrors.shown(workdir)} began; choose "
        "another workdir, or bring them back."
      )


def check_same_kind(name: str, other: Any, policy: Any) -> None:
  """Raises ValueError unless a model can stand in for the policy.

  Args:
    name: of the model, with its flag.
    other: the model, its `model` and `tokenizer`, as `hf.load` gives them.
    policy: likewise.
  """
  if _without_ids(other.model.config) != _without_ids(policy.model.config):
    raise ValueError(
      f"{name} is another architecture than the policy: {other.model.config} "
      f"and {policy.model.config}."
    )
  check_same_tokens(name, other, policy)


def _without_ids(config: Any) -> Any:
  """A config but for special ids, of which an export names more."""
  if not dataclasses.is_dataclass(config):
    return config
  names = ("bos_token_id", "eos_token_id", "pad_token_id")
  known = {field.name for field in dataclasses.fields(config)}
  return dataclasses.replace(
    config, **{name: None for name in names if name in known}
  )


def check_same_tokens(name: str, other: Any, policy: Any) -> None:
  """Raises ValueError unless two models have the same tokens; see above."""
  same = other.tokenizer.get_vocab() == policy.tokenizer.get_vocab()
  if not same or other.tokenizer.eos_token_id != policy.tokenizer.eos_token_id:
    raise ValueError(
      f"{name} has another vocabulary or end token than the policy: they must "
      "share both."
    )
