"""Runs a script in a plan: as it is, two steps far, in a folder that goes."""

import contextlib
import io
import os
import runpy
import sys
import tempfile
import traceback
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags

from rljax import cli
from rljax.distributed import planning
from rljax.plan import flops, hlo, report, targets

# Flags of a script that a plan sets, where it has them: nothing is read from
# or written to the folder of a run, and nothing is drawn. All rows have the
# longest length, for it cannot know others.
_SET = {
  "slots": "0",
  "length_buckets": "1",
  "cpu_devices": "0",
  "compilation_cache": "",
  "preflight": "off",
  "wandb_project": "",
  "num_page_samples": "0",
}


class Script:
  """An experiment script, loaded once, whose main function runs in plans."""

  def __init__(self, path: str, arguments: Sequence[str]):
    """Loads the script and parses its flags.

    Args:
      path: of the script.
      arguments: its flags.

    Raises:
      ValueError: if there is no such script, or its flags are wrong.
    """
    if not os.path.isfile(path):
      raise ValueError(
        f"{path} is no script; write one behind --, as in "
        "-- experiments/grpo.py --policy=NAME."
      )
    self.path = path
    before = set(flags.FLAGS)
    self._main = runpy.run_path(path, run_name="script")["main"]
    self._own = {n: flags.FLAGS[n] for n in set(flags.FLAGS) - before}
    self._arguments = list(arguments)

  def close(self) -> None:
    """Takes the script's flags back, for another script in this process."""
    for name in self._own:
      if name in flags.FLAGS:
        delattr(flags.FLAGS, name)

  def plan(self, target: targets.Target, **options: Any) -> "Planned":
    """Runs the script for a target.

    Args:
      target: the machine.
      **options: of `planning.plan`.

    Returns:
      What was compiled.

    Raises:
      ValueError: if the script fails before it compiles anything.
    """
    with tempfile.TemporaryDirectory(prefix="rljax-plan-") as folder:
      values = self._parse(folder)
      devices = targets.devices(target)
      ended, argv = "", sys.argv
      kept = jax.config.jax_default_matmul_precision  # The script sets it.
      sys.argv = [self.path]
      options = {"inspect": _inspect, **options}
      with planning.plan(devices, **options) as found:
        try:
          with contextlib.redirect_stdout(io.StringIO()):
            self._main()
        except Exception as error:
          # A script may not be able to learn from what stands in for samples.
          if not found.programs:
            raise
          ended = f"{type(error).__name__}: {error}".splitlines()[0]
          if not isinstance(error, ValueError):
            place = traceback.extract_tb(error.__traceback__)[-1]
            ended += f" ({os.path.basename(place.filename)}:{place.lineno})"
        finally:
          sys.argv = argv
          jax.config.update("jax_default_matmul_precision", kept)
    return Planned(found, ended, values)

  def _parse(self, folder):
    """Parses the flags anew, as those of a run of its own."""
    values = flags.FLAGS
    for name, flag in self._own.items():
      flag.unparse()
      flag.value = flag.default
      assert name in values
    given = [f"--{n}={v}" for n, v in _SET.items() if n in self._own]
    words = [self.path, *self._arguments, *given, f"--workdir={folder}/run"]
    try:
      rest = values(words)
    except flags.Error as error:
      text = "; ".join(str(error).splitlines())
      raise ValueError(f"{self.path}: {text}") from error
    cli.check(values, rest[1:])
    return {n: values[n].value for n in self._own}


class Planned:
  """What a script compiled.

  Attributes:
    programs: see `planning.Program`.
    depths: layers of its models, by their own configs.
    ended: the error that ended it early; else "".
    tokens: response tokens of a step at most.
    num_steps: that it took.
  """

  def __init__(self, found: planning.Plan, ended: str, values: dict[str, Any]):
    """Takes a plan, and the flags that were in force."""
    self.programs = found.programs
    steps = [s for p in found.programs for s in p.calls if s != "before"]
    self.num_steps = len(set(steps))
    self._last = max(steps, default=0)
    self.depths = sorted(set(found.depths))
    self.ended = ended
    rows = values.get("batch_size", 0) * (values.get("num_samples") or 1)
    self.tokens = rows * (values.get("max_length") or 0)

  @property
  def rows(self) -> list[report.ProgramRow]:
    """What the programs take, with their calls in the last step."""
    return report.rows(self.programs, self._last)


def _inspect(traced, executable, args):
  counted = flops.count(traced.jaxpr)
  has_narrow = any("bf16" in str(x) for x in _product_types(traced.jaxpr.jaxpr))
  module = None
  if executable is not None:
    shapes = _parameter_shapes(args)
    vocab_size, rows = _logits_of(traced, args)
    module = hlo.measure(
      executable.as_text(),
      token_loops=counted.loops,
      shapes=shapes,
      vocab_size=vocab_size,
      rows=rows,
    )
  return report.Details(module, counted, has_narrow)


def _product_types(jaxpr):
  for equation in jaxpr.eqns:
    if equation.primitive.name == "dot_general":
      yield equation.invars[0].aval.str_short(short_dtypes=True)
    for inner in flops.inner_programs(equation.params):
      yield from _product_types(inner)


def _parameter_shapes(args):
  """Shapes of the parts of arrays that a device has of the arguments."""
  return [
    x.sharding.shard_shape(x.shape) if x.sharding is not None else x.shape
    for x in jax.tree.leaves(args)
    if isinstance(x, planning.Absent)
  ]


def _logits_of(traced, args):
  """A device's share of the vocabulary and of the rows of a sampler."""
  shape = None
  for path, leaf in jax.tree_util.tree_leaves_with_path(args):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    if _is_embedding(name) and isinstance(leaf, planning.Absent):
      shape, tensor = leaf.shape, leaf.sharding.mesh.shape
  out = traced.out_info
  rows = getattr(out, "response_ids", None)
  if shape is None or rows is None:
    return 0, 0
  share = tensor["data"] * tensor["fsdp"]
  return shape[0] // tensor["tensor"], -(-rows.shape[0] // share)


def _is_embedding(name: str) -> bool:
  """Whether a path of a parameter is that of the embedding of tokens."""
  return name.split("/")[-2:] in (
    ["embed_tokens", "embedding"],
    ["wte", "embedding"],
  )
