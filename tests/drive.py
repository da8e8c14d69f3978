"""Runs one experiment script several times in one process.

  python tests/drive.py experiments/ppo.py < list_of_flag_lists.json

Prints one JSON object a run: {"error": null, or "ValueError: ..."}. Tests use
it where a process of its own for each run would only cost imports.
"""

import json
import os
import runpy
import sys


def main():
  path = sys.argv[1]
  runs = json.load(sys.stdin)
  sys.path.insert(0, os.getcwd())
  script = runpy.run_path(path, run_name="script")
  from absl import flags

  from rljax import cli

  results = []
  for arguments in runs:
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
    results.append({"error": error})
  print("RESULTS " + json.dumps(results))


if __name__ == "__main__":
  main()
