"""Imports modules of the user's own: files, or modules by their names."""

import hashlib
import importlib
import importlib.util
import os
import pathlib
import sys
import types


def is_file(source: str) -> bool:
  """Returns whether a source is written as a path rather than as a module."""
  return source.endswith(".py") or "/" in source or os.sep in source


def load(source: str, flag: str) -> types.ModuleType:
  """Imports a file, or a module of the folder one is in or of the environment.

  The folder of a file goes to the end of the search path, for the files beside
  it, and for workers that import it.

  Args:
    source: a path that ends in .py, or a module's name.
    flag: that names it, for messages.

  Raises:
    ValueError: if there is none, or it cannot be imported, saying why.
  """
  try:
    return _of_file(source) if is_file(source) else _of_name(source)
  except FileNotFoundError as error:
    raise ValueError(f"{flag}={source}: there is no such file.") from error
  except ModuleNotFoundError as error:
    if error.name and (source + ".").startswith(error.name + "."):
      raise ValueError(
        f"{flag}={source}: there is no such module, neither in "
        f"{os.getcwd()} nor installed; a file is named by its path, such as "
        "./my_file.py."
      ) from error
    raise _broken(flag, source, error) from error
  except (Exception, SystemExit) as error:  # A module may raise anything.
    raise _broken(flag, source, error) from error


def digest(source: str) -> str:
  """Returns the SHA-256 of a source's file; "" if it has none."""
  path = pathlib.Path(source)
  if not is_file(source):
    _search(os.getcwd())
    try:
      found = importlib.util.find_spec(source)
    except (ImportError, ValueError):
      found = None
    path = pathlib.Path((found and found.origin) or "")
  return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def _broken(flag, source, error):
  text = " ".join(str(error).split())[:500]
  return ValueError(
    f"{flag}={source} cannot be imported: {type(error).__name__}: {text}"
  )


def _search(folder: str) -> None:
  if folder not in sys.path:
    sys.path.append(folder)


def _of_name(name: str) -> types.ModuleType:
  _search(os.getcwd())
  return importlib.import_module(name)


def _of_file(source: str) -> types.ModuleType:
  path = os.path.realpath(source)
  if not os.path.isfile(path):
    raise FileNotFoundError(path)
  folder, file = os.path.split(path)
  _search(folder)
  name = file.removesuffix(".py")
  known = sys.modules.get(name)
  if known is not None and os.path.realpath(known.__file__ or "") == path:
    return known
  if known is not None or not _finds(name, path):
    # Another module has the name: this one gets a name of its own.
    name = f"{name}_{hashlib.sha256(path.encode()).hexdigest()[:8]}"
    if name in sys.modules:
      return sys.modules[name]
  spec = importlib.util.spec_from_file_location(name, path)
  module = importlib.util.module_from_spec(spec)
  sys.modules[name] = module
  try:
    spec.loader.exec_module(module)
  except BaseException:
    del sys.modules[name]
    raise
  return module


def _finds(name: str, path: str) -> bool:
  """Whether an import of the name would find the file."""
  try:
    found = importlib.util.find_spec(name)
  except (ImportError, ValueError):
    return False
  return bool(found and os.path.realpath(found.origin or "") == path)
