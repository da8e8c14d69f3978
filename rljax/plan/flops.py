"""Counts the floating-point operations of the products of a program.

The count is that of the whole program, as it was traced, on all devices
together: a product of `[m, k]` and `[k, n]` is 2 m k n.
"""

import dataclasses
import math
from typing import Any

import numpy as np


@dataclasses.dataclass
class Products:
  """Floating-point operations of the products of a program.

  Attributes:
    outside: of all but the loops over tokens.
    tokens: of the loops over tokens, all rounds.
    loops: rounds at most of each of those, which follow one another.
    wide: of products with a float32 operand, everywhere.
    widest: shapes of the largest such product, as text.
  """

  outside: float = 0.0
  tokens: float = 0.0
  loops: list[int] = dataclasses.field(default_factory=list)
  wide: float = 0.0
  widest: str = ""
  _largest: float = 0.0

  @property
  def total(self) -> float:
    """Of all products."""
    return self.outside + self.tokens

  @property
  def rounds(self) -> int:
    """Of all loops over tokens; 0 where there is none."""
    return sum(self.loops)


def count(jaxpr: Any) -> Products:
  """Counts the products of a traced program.

  Args:
    jaxpr: closed, from `jax.jit(...).trace(...).jaxpr`.
  """
  found = Products()
  _add(found, jaxpr.jaxpr, 1.0, None)
  return found


def _add(found, jaxpr, times, rounds):
  for equation in jaxpr.eqns:
    name = equation.primitive.name
    if name == "dot_general":
      _add_product(found, equation, times, rounds)
    elif name == "pallas_call":
      _add_kernel(found, equation, times, rounds)
    elif name.startswith("dot_product_attention"):
      _add_attention(found, equation, times, rounds)
    elif name == "while":
      inner = equation.params["body_jaxpr"].jaxpr
      trips = _most_rounds(equation.params["cond_jaxpr"].jaxpr)
      within = rounds
      if rounds is None and _ends_early(equation.params["cond_jaxpr"].jaxpr):
        within = trips
        found.loops.append(trips)
      _add(found, inner, times * trips, within)
    else:
      repeats = equation.params.get("length", 1) if name == "scan" else 1
      for inner in inner_programs(equation.params):
        _add(found, inner, times * repeats, rounds)


def _add_product(found, equation, times, rounds):
  (contracting, _), _ = equation.params["dimension_numbers"]
  left = equation.invars[0].aval
  size = math.prod(left.shape[i] for i in contracting)
  flops = 2.0 * times * size * math.prod(equation.outvars[0].aval.shape)
  _add_flops(found, flops, rounds)
  operands = [x.aval for x in equation.invars]
  if any(x.dtype == np.float32 for x in operands):
    found.wide += flops
    if flops > found._largest:
      found._largest = flops
      found.widest = " x ".join(
        f"{x.dtype.name}{list(x.shape)}" for x in operands
      )


def _add_flops(found, flops, rounds):
  if rounds is None:
    found.outside += flops
  else:
    found.tokens += flops


def _add_kernel(found, equation, times, rounds):
  """Adds a kernel of Pallas, as if it left out no place of its grid.

  Which of its products are wide is its own business.
  """
  inside = Products()
  for inner in inner_programs(equation.params):
    _add(inside, inner, 1.0, None)
  grid = equation.params["grid_mapping"].grid
  _add_flops(found, times * math.prod(grid) * inside.total, rounds)


def _add_attention(found, equation, times, rounds):
  """Adds the attention of cuDNN, whose operands are `[B, S, H, d]`.

  Of pairs of tokens there are two products forwards, and five backwards.
  """
  queries, keys = (x.aval.shape for x in equation.invars[:2])
  products = 5 if "bwd" in equation.primitive.name else 2
  flops = 2.0 * products * math.prod(queries) * keys[1]
  _add_flops(found, times * flops, rounds)


def inner_programs(params):
  """Yields the programs that an equation calls."""
  for value in params.values():
    for one in value if isinstance(value, (list, tuple)) else (value,):
      inner = getattr(one, "jaxpr", one)
      if hasattr(inner, "eqns"):
        yield inner


def _most_rounds(condition) -> int:
  """Returns the largest integer that a condition compares with, or 1."""
  largest = 1
  for equation in condition.eqns:
    for operand in equation.invars:
      value = np.asarray(getattr(operand, "val", 0.0))
      if not value.ndim and np.issubdtype(value.dtype, np.integer):
        largest = max(largest, int(value))
    for inner in inner_programs(equation.params):
      largest = max(largest, _most_rounds(inner))
  return largest


def _ends_early(condition) -> bool:
  """Whether a loop looks at more than a counter, as that of the sampler."""
  return any(e.primitive.name == "reduce_or" for e in condition.eqns) or any(
    _ends_early(inner)
    for equation in condition.eqns
    for inner in inner_programs(equation.params)
  )
