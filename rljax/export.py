"""Exports a run as a Hugging Face directory with a model card.

  python -m rljax.export runs/grpo exported --dtype=bfloat16
  python -m rljax.export runs/grpo/best exported --push=my-name/my-model

Writes the weights, the tokenizer, generation_config.json with the sampler of
the run, and a README.md: the base model, the data, the numbers before and
after, and all flags. `--push` sends the folder to the Hugging Face hub.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import pathlib
import re
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from rljax.models import export as hf_export
from rljax.models import hf
from rljax.storage import buckets, paths

# What the hub takes for the name of a repository.
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
# Flags of the sampler -> names in generation_config.json.
_SAMPLER = {
  "max_length": "max_new_tokens",
  "min_new_tokens": "min_new_tokens",
  "temperature": "temperature",
  "top_k": "top_k",
  "top_p": "top_p",
  "min_p": "min_p",
}
# Flags that say where a run was, rather than what it did.
_OF_THE_PLACE = ("workdir", "compilation_cache", "wandb_project", "mesh")


def export(
  source: str | os.PathLike[str],
  directory: str | os.PathLike[str],
  *,
  dtype: str = "float32",
  step: int | None = None,
  merge: bool = False,
) -> None:
  """Writes a run, or any other model that flags name, with a card.

  A run with LoRA adapters becomes a folder that PEFT reads beside its base.

  Args:
    source: workdir, its `best` folder, or a model in the forms of --policy.
    directory: is made; files of other names in it stay. It may be a URL, and
      so may `source`.
    dtype: of the weights in the file, "float32" or "bfloat16".
    step: of the checkpoint; None: the last.
    merge: whether adapters are added to their base, for a whole model.

  Raises:
    ValueError: if there is no such model or step, or the directory holds the
      run itself.
  """
  if buckets.is_url(directory):
    url = os.fspath(directory).rstrip("/")
    if url in (str(source).rstrip("/"), str(source).removesuffix("/best")):
      raise ValueError(
        f"{url} holds the run itself: choose another URL to export to."
      )
    with tempfile.TemporaryDirectory() as place:
      stage = pathlib.Path(place, url.rpartition("/")[2])
      export(source, stage, dtype=dtype, step=step)
      with hf_export.staged(directory, weights=True) as there:
        shutil.copytree(stage, there, dirs_exist_ok=True)
    return
  directory = pathlib.Path(directory)
  place = _run_of(source)
  if directory.resolve() in (pathlib.Path(source).resolve(), place.resolve()):
    raise ValueError(
      f"{directory} holds the run itself: choose another folder to export to."
    )
  is_adapter = not merge and hf.copy_adapter(
    source, directory, dtype=dtype, step=step
  )
  flags = _read(place / "flags.json")
  if not is_adapter:
    loaded = hf.load(source, step=step)
    hf.save(
      directory, loaded.model, loaded.params, loaded.tokenizer, dtype=dtype
    )
    path = directory / "generation_config.json"
    settings = generation_config(flags, loaded.tokenizer)
    settings |= _read(path)  # All end tokens of the model are in there.
    paths.write_whole(path, json.dumps(settings, indent=2) + "\n")
  card = model_card(
    directory.resolve().name,
    str(source),
    flags,
    _read(place / "summary.json"),
    library="peft" if is_adapter else "transformers",
  )
  paths.write_whole(directory / "README.md", card)


def generation_config(
  flags: Mapping[str, Any], tokenizer: Any
) -> dict[str, Any]:
  """Returns what transformers' `generate` takes from a run's sampler.

  Args:
    flags: of the run, as filed; those that are missing are left out.
    tokenizer: whose end and padding tokens are named.
  """
  found = {
    name: flags[flag] for flag, name in _SAMPLER.items() if flags.get(flag)
  }
  if "temperature" in found:
    found["do_sample"] = True
  for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
    value = getattr(tokenizer, name, None)
    if value is not None:
      found[name] = value
  return found


def model_card(
  title: str,
  source: str,
  flags: Mapping[str, Any],
  summary: Mapping[str, Any],
  *,
  library: str = "transformers",
) -> str:
  """Writes the README.md of an exported model.

  Args:
    title: of the page.
    source: what was exported.
    flags: of the run; may be empty.
    summary: its `summary.json`; may be empty.
    library: that reads the folder.
  """
  base = flags.get("policy") or ""
  of_hub = base.count("/") == 1 and not base.startswith((".", "/", "~"))
  is_hub = of_hub and not os.path.exists(base)
  head = ["---", f"library_name: {library}", "tags: [rljax]"]
  head += [f"base_model: {base}"] if is_hub else []
  lines = [*head, "---", "", f"# {title}", ""]
  version = ""
  with contextlib.suppress(importlib.metadata.PackageNotFoundError):
    version = f" {importlib.metadata.version('rljax-lm')}"
  lines += [f"Trained with rljax{version}; exported from `{source}`."]
  facts = {
    "Base model": base or (flags and "random weights"),
    "Data": flags.get("data") or flags.get("task"),
    "Rewards": flags.get("rewards") or flags.get("reward_model"),
    "Algorithm": flags.get("algorithm"),
  }
  shown = [f"- {name}: {_text(x)}" for name, x in facts.items() if x]
  lines += ["", *shown] if shown else []
  if summary:
    lines += ["", "## Numbers", "", *_table(summary)]
  if flags:
    kept = {k: v for k, v in flags.items() if k not in _OF_THE_PLACE}
    lines += ["", "## Flags", "", "```"]
    lines += [f"--{name}={_text(value)}" for name, value in kept.items()]
    lines += ["```"]
  return "\n".join(lines) + "\n"


def hub(name: str) -> Any:
  """Returns the hub's interface, once it is known that it can be asked.

  Args:
    name: of the repository that will be written, organisation/name.

  Raises:
    ValueError: if the name is none, huggingface_hub is missing, or there is no
      token.
  """
  if not _REPOSITORY.fullmatch(name):
    raise ValueError(
      f"--push={name} must be organisation/name, of letters, digits, dots, "
      "dashes and underscores."
    )
  try:
    import huggingface_hub
  except ImportError as error:
    raise ValueError(
      "--push needs the package huggingface_hub, which is not installed: "
      "pip install huggingface_hub."
    ) from error
  if not huggingface_hub.get_token():
    raise ValueError(
      f"--push={name}: there is no token of the hub. Set HF_TOKEN to one that "
      f"may write to {name.split('/')[0]}, or log in with `hf auth login`."
    )
  return huggingface_hub.HfApi()


def push(directory: str | os.PathLike[str], name: str, hub_: Any = None) -> str:
  """Sends a folder to the Hugging Face hub; returns its address.

  Args:
    directory: an exported model.
    name: of the repository there, organisation/name; it is made, private.
    hub_: of `hub`, if it has been called already.

  Raises:
    ValueError: as `hub`; or if the hub refuses, or cannot be reached.
  """
  hub_ = hub_ or hub(name)
  try:
    hub_.create_repo(name, private=True, exist_ok=True)
    hub_.upload_folder(repo_id=name, folder_path=str(directory))
  except Exception as error:  # Of the hub and of the network: many types.
    status = getattr(getattr(error, "response", None), "status_code", None)
    lines = str(error).splitlines()
    said = f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"
    if status is None:
      why = f"the hub cannot be reached ({said}): check the network"
    elif status in (401, 403):
      why = f"the token may not write there ({said}): set HF_TOKEN to another"
    else:
      why = f"the hub refuses with status {status} ({said})"
    raise ValueError(
      f"--push={name}: {why}. {directory} is whole: `hf upload {name} "
      f"{directory}` sends it later."
    ) from error
  return f"https://huggingface.co/{name}"


def _run_of(source: str | os.PathLike[str]) -> pathlib.Path:
  """The folder with the flags of a run, for its workdir or its `best`."""
  if buckets.is_url(source):
    url, _, last = os.fspath(source).rstrip("/").rpartition("/")
    names = ("flags.json", "summary.json")
    return buckets.fetch(
      url if last == "best" else os.fspath(source),
      lambda objects: [name for name in names if name in objects],
    )
  source = pathlib.Path(source)
  if not (source / "flags.json").is_file() and source.name == "best":
    return source.parent
  return source


def _read(path: pathlib.Path) -> dict[str, Any]:
  return json.loads(path.read_text()) if path.is_file() else {}


def _text(value: Any) -> str:
  if isinstance(value, (list, tuple)):
    return ",".join(map(str, value))
  if isinstance(value, bool):
    return str(value).lower()
  return "" if value is None else str(value)


def _number(value: Any) -> str:
  return f"{value:.4g}" if isinstance(value, float) else _text(value)


def _table(summary: Mapping[str, Any]) -> list[str]:
  """A table in Markdown, of numbers or of mappings to them."""
  rows = {
    name: value if isinstance(value, Mapping) else {"value": value}
    for name, value in summary.items()
  }
  columns = list(dict.fromkeys(key for row in rows.values() for key in row))
  lines = ["| | " + " | ".join(columns) + " |", "|---" * len(columns) + "|---|"]
  for name, row in rows.items():
    cells = (_number(row.get(column, "")) for column in columns)
    lines.append(f"| {name} | " + " | ".join(cells) + " |")
  return lines


def main(arguments: Sequence[str] | None = None) -> int:
  """Reads the command line; returns the exit status."""
  parser = argparse.ArgumentParser(
    prog="python -m rljax.export", description=__doc__.split("\n")[0]
  )
  parser.add_argument("source", help="Workdir of a run, or its best folder.")
  parser.add_argument("directory", help="Folder to write to.")
  parser.add_argument(
    "--dtype",
    default="float32",
    choices=["float32", "bfloat16"],
    help="Number format of the weights in the file.",
  )
  parser.add_argument(
    "--merge",
    action="store_true",
    help="Add LoRA adapters to their base, for a whole model; without it, they "
    "become a folder that PEFT reads.",
  )
  parser.add_argument("--step", type=int, help="Step of the checkpoint.")
  parser.add_argument(
    "--push", help="Repository on the Hugging Face hub, organisation/name."
  )
  options = parser.parse_args(arguments)
  try:
    # Before minutes of work, whether it can be sent.
    hub_ = hub(options.push) if options.push else None
    export(
      options.source,
      options.directory,
      dtype=options.dtype,
      step=options.step,
      merge=options.merge,
    )
    print(f"Wrote {options.directory}.")
    if options.push:
      pushed = buckets.here(options.directory)
      print(f"Pushed to {push(pushed, options.push, hub_)}.")
  except (ValueError, paths.DiskError) as error:
    print(f"rljax.export: {error}", file=sys.stderr)
    return 1
  return 0


if __name__ == "__main__":
  sys.exit(main())
