"""The command `python -m rljax.plan`: does a script fit a machine, how fast?

  python -m rljax.plan --target=v5e:2x4 -- experiments/grpo.py \
    --flagfile=experiments/flags/grpo/qwen25_05b_gsm8k.flags --policy=FOLDER

The folder may hold a config.json alone. Nothing is downloaded but what the
script's own flags name, and no accelerator is used.
"""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence

from rljax.plan import targets


def main(arguments: Sequence[str]) -> int:
  """Plans a script, prints the plan, and returns 1 if it does not fit."""
  own, script = _split(list(arguments))
  parser = _parser()
  options = parser.parse_args(own)
  try:
    if not script:
      raise ValueError(
        "no script to plan: write it and its flags behind --, as in "
        "-- experiments/grpo.py --policy=NAME."
      )
    target = targets.parse(options.target)
    depths = _depths(options.layers)
    targets.prepare(target)
    return _plan(target, script, depths, options)
  except ValueError as error:
    print(f"plan: {error}", file=sys.stderr)
    return 2


def _split(arguments):
  if "--" not in arguments:
    return arguments, []
  place = arguments.index("--")
  return arguments[:place], arguments[place + 1 :]


def _parser():
  parser = argparse.ArgumentParser(
    prog="python -m rljax.plan",
    description="Compiles the programs of a script for a machine that is not "
    "there, without weights, and says whether they fit and how fast they can "
    "be at most. Exit status: 0 if all fit, 1 if not, 2 for wrong arguments.",
  )
  parser.add_argument(
    "--target",
    required=True,
    help="Machine: v5e:2x4, v6e-16, v5p-8, tpu7x:2x2x1, a100:8, h100:8, h200:1,"
    " b200:8 or cpu:8.",
  )
  parser.add_argument(
    "--layers",
    default="",
    help="Two numbers of layers, such as 2,4, that are compiled in place of "
    "all: the model's own number is extrapolated, which saves most of the "
    "time.",
  )
  parser.add_argument(
    "--tokenizer",
    default="",
    help="Model whose tokenizer stands in for a model that has none.",
  )
  parser.add_argument(
    "--programs",
    default="",
    help="Names of the programs to compile, separated by commas, such as "
    "optimizer,sample,learn; empty for all. The others are left out of the "
    "plan.",
  )
  parser.add_argument(
    "--json", default="", help="File that the plan is written to as well."
  )
  return parser


def _depths(text):
  if not text:
    return None
  words = text.split(",")
  if len(words) != 2 or not all(word.isdecimal() for word in words):
    raise ValueError(f"--layers must be two numbers, such as 2,4, got {text}.")
  shallow, deep = map(int, words)
  if not 0 < shallow < deep:
    raise ValueError(
      f"--layers must be two rising positive numbers, got {text}."
    )
  return shallow, deep


def _plan(target, script, depths, options):
  # After `prepare`: these ask JAX for its devices.
  from rljax.plan import report, scripts

  planned = scripts.Script(script[0], script[1:])
  try:
    found, ended, tokens, depth = _rows(target, planned, depths, options)
  finally:
    planned.close()
  summary = report.summarise(target, found, tokens)
  print(report.text(target, found, summary))
  if depths:
    print(f"Extrapolated from {depths[0]} and {depths[1]} to {depth} layers.")
  if ended:
    print(f"The script ended early: {ended}")
  if options.json:
    content = {
      "target": target.name,
      "script": [os.path.basename(script[0]), *script[1:]],
      "summary": dataclasses.asdict(summary),
      "programs": [dataclasses.asdict(row) for row in found],
    }
    with open(options.json, "w") as file:
      json.dump(content, file, indent=1)
      file.write("\n")
  return 0 if summary.fits else 1


def _rows(target, planned, depths, options):
  """Rows of the programs, why the script ended early, tokens and layers."""
  from rljax.plan import report

  more = {
    "tokenizer": options.tokenizer,
    "only": [name for name in options.programs.split(",") if name],
  }
  if not depths:
    found = planned.plan(target, **more)
    return found.rows, found.ended, found.tokens, None
  shallow, deep = (planned.plan(target, num_layers=n, **more) for n in depths)
  names = [[row.name for row in x.rows] for x in (shallow, deep)]
  if names[0] != names[1]:
    raise ValueError(
      f"with --layers={depths[0]},{depths[1]} the script compiles other "
      f"programs at either depth: {names[0]} and {names[1]}; leave it out."
    )
  depth = max(deep.depths)
  found = [
    report.extrapolate(a, b, depths, depth)
    for a, b in zip(shallow.rows, deep.rows, strict=True)
  ]
  return found, deep.ended, deep.tokens, depth
