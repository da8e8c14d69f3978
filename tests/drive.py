"""Runs experiment scripts several times in one process.

  python tests/drive.py experiments/ppo.py < list_of_flag_lists.json
  python tests/drive.py - < list_of_objects.json

Of the second form each object is a run of its own script: `{"script": path,
"replace": [[old, new], ...], "flags": [...], "machine": name}`, where the texts
are replaced in the source of the script, and the machine, if there is one, is
that of tests/emulation.py.

Prints one JSON object a run: {"error": null, or "ValueError: ..."}. Tests use
it where a process of its own for each run would only cost imports.
"""

import contextlib
import json
import os
import runpy
import sys
import tempfile


def main():
  runs = json.load(sys.stdin)
  sys.path.insert(0, os.getcwd())
  from absl import flags

  path, results = sys.argv[1], []
  if path != "-":
    script = runpy.run_path(path, run_name="script")
    results = [_run(path, script, arguments) for arguments in runs]
  else:
    from absl import app, logging

    from rljax import cli

    assert app and logging and cli  # They have flags of their own.
    own = set(flags.FLAGS)
    for run in runs:
      for name in set(flags.FLAGS) - own:
        delattr(flags.FLAGS, name)
      with _machine(run.pop("machine", None)):
        results.append(_run(*_changed(**run)))
  print("RESULTS " + json.dumps(results))


def _machine(name):
  if name is None:
    return contextlib.nullcontext()
  from tests import emulation

  return emulation.machine(name)


def _changed(script, flags, replace=()):
  """The path, globals and flags of a script whose source is changed."""
  with open(script) as file:
    source = file.read()
  for old, new in replace:
    if source.count(old) != 1:
      raise ValueError(f"{script} has {source.count(old)} times: {old}")
    source = source.replace(old, new)
  with tempfile.NamedTemporaryFile("w", suffix=".py") as file:
    file.write(source)
    file.flush()
    return script, runpy.run_path(file.name, run_name="script"), flags


def _run(path, script, arguments):
  from absl import flags

  from rljax import cli

  for name in list(flags.FLAGS):
    flags.FLAGS[name].unparse()
    flags.FLAGS[name].value = flags.FLAGS[name].default
  error = None
  try:
    words = flags.FLAGS([path, *arguments])
    sys.argv = [path]
    cli.check(flags.FLAGS, words[1:])
    script["main"]()
  except Exception as caught:
    error = f"{type(caught).__name__}: {caught}"
  return {"error": error}


if __name__ == "__main__":
  main()
