"""Parameters of which some learn, and the others are left as they are.

  split = functools.partial(frozen.split, pattern="embed|layers_0/")
  learnt, others = split(params)
  grads = jax.grad(lambda learnt: loss(frozen.join(learnt, others)))(learnt)

Only what learns is differentiated: no gradient is worked out below it.
"""

import re
from typing import Any

from flax import traverse_util

from rljax.models import stacked

Params = dict[str, Any]


def split(params: Params, pattern: str) -> tuple[Params, Params]:
  """Splits parameters into those that learn and the others.

  Args:
    params: nested dict of arrays, or of what stands for them.
    pattern: regular expression; what it finds anywhere in the path of a
      parameter ("policy/layers_0/attention/query/kernel") does not learn; of
      a stack, the paths that its layers have in an unrolled model count.
      Empty: all of them do.

  Returns:
    Two flat dicts, from path to array.

  Raises:
    ValueError: if the pattern is no regular expression, fits no parameter,
      leaves none, or fits some layers of a stack and not others.
  """
  try:
    is_frozen = re.compile(pattern or r"(?!)").search
  except re.error as error:
    raise ValueError(
      f"--frozen={pattern} is no regular expression: {error}."
    ) from error
  paths = traverse_util.flatten_dict(params, sep="/")
  learnt = {}
  for path, x in paths.items():
    frozen = {bool(is_frozen(name)) for name in stacked.layer_paths(path, x)}
    if len(frozen) > 1:
      raise ValueError(
        f"--frozen={pattern} matches some layers of the stack {path} and not "
        "others, which learn or not as one: leave out --scan_layers, or match "
        "all of them."
      )
    if frozen == {False}:
      learnt[path] = x
  others = {path: x for path, x in paths.items() if path not in learnt}
  if not learnt or (pattern and not others):
    raise ValueError(
      f"--frozen={pattern} matches {len(others)} of {len(paths)} parameters, "
      f"such as {next(iter(paths))}; it must match some and leave some."
    )
  return learnt, others


def join(learnt: Params, others: Params) -> Params:
  """Makes the nested dict again that was split."""
  return traverse_util.unflatten_dict({**learnt, **others}, sep="/")
