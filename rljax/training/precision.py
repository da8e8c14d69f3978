"""How exactly models compute, and how far two passes of them may differ.

Sampler and trainer compute the same log-probabilities in programs of other
shapes, so they round differently. By how much depends on the bits that products
keep of their operands and on the layers that add up what they round: a fault
must stand out from that, and rounding alone must not stop a run.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rljax.distributed import planning

Tree = Any

# What --matmul_precision may be.
CHOICES = ("auto", "default", "high", "highest")

# Of float32 itself: what sums in another order lose, rather than 2^-23.
_FLOAT32_BITS = 18
# Bits of the mantissa that a product of float32 keeps of its operands: a pass
# in bfloat16 or three of them on a TPU, TF32 on a GPU.
_BITS = {
  "tpu": {"default": 7, "high": 16},
  "gpu": {"default": 10, "high": 10},
}
# The last number of a stack is that of its last layer.
_LAYER = re.compile(r"(layers?|blocks?|h)_(?:\d+_)?(\d+)")
# As JAX was configured before any run of this process.
_OWN = jax.config.jax_default_matmul_precision


def choose(asked: str, dtype: str) -> str | None:
  """Returns the precision of float32 products, as JAX names it.

  Args:
    asked: --matmul_precision. auto is what JAX is configured to do; where that
      is nothing, the highest for float32 on accelerators.
    dtype: in which models compute.

  Returns:
    A value of `jax_default_matmul_precision`; None leaves it to the machine.
  """
  if asked != "auto":
    return asked
  if _OWN is None and dtype == "float32" and planning.machine() != "cpu":
    return "highest"
  return _OWN


def apply(asked: str, dtype: str) -> None:
  """Sets the precision of float32 products in this process, see `choose`."""
  jax.config.update("jax_default_matmul_precision", choose(asked, dtype))


def operand_bits(dtype: str) -> int:
  """Returns the bits of mantissa that a product keeps of its operands.

  Args:
    dtype: in which models compute. For float32 it depends on the machine and
      on the precision in force.
  """
  if jnp.dtype(dtype) != jnp.float32:
    return jnp.finfo(dtype).nmant
  asked = jax.config.jax_default_matmul_precision or "default"
  return _BITS.get(planning.machine(), {}).get(asked, _FLOAT32_BITS)


@dataclasses.dataclass(frozen=True)
class Tolerance:
  """How far two passes of a model may differ by rounding.

  Attributes:
    mean: of |gap| over tokens, nats.
    kl: of the k3 estimate over tokens, nats.
    quantile: that 99 % of the gaps stay below, nats.
    gradient: relative difference of two gradients.
    values: relative difference of values of one pass.
  """

  mean: float
  kl: float
  quantile: float
  gradient: float
  values: float


def tolerance(
  dtype: str, params: Tree = None, temperature: float = 1.0
) -> Tolerance:
  """Returns what rounding may do, some three times what it was seen to do.

    mean = 1.5 ε √(1 + 2L) / min(τ, 1),   ε = 2^-bits

  Each of L layers adds two rounded terms to the residual stream, as if at
  random. A heavy tail is usual: one gap in a hundred is ten times the mean.

  Args:
    dtype: in which models compute.
    params: of the deepest model; None: of one layer.
    temperature: τ, by which logits, and so gaps, are divided.
  """
  epsilon = 2.0 ** -min(operand_bits(dtype), _FLOAT32_BITS)
  spread = epsilon * math.sqrt(1 + 2 * depth(params))
  mean = 1.5 * spread / min(temperature, 1.0)
  return Tolerance(
    mean=mean,
    kl=2 * mean**2,
    quantile=8 * mean,
    gradient=1e-3 + 4 * spread,
    values=1e-4 + 6 * epsilon,
  )


def of_flags(values: Mapping[str, Any], params: Tree = None) -> Tolerance:
  """Returns the tolerance of models that compute as flags of a script say.

  Args:
    values: parsed flags; --dtype, --param_dtype and --temperature are read
      where they are.
    params: see `tolerance`.
  """
  get = lambda name: values[name].value if name in values else None
  dtypes = [get("dtype") or "float32", get("param_dtype") or "float32"]
  narrowest = min(dtypes, key=operand_bits)
  return tolerance(narrowest, params, get("temperature") or 1.0)


def depth(params: Tree) -> int:
  """Returns the number of layers of the deepest model in a tree; 1 at least."""
  found = [0]
  for path, _ in jax.tree_util.tree_leaves_with_path(params):
    for key in path:
      if match := _LAYER.fullmatch(str(getattr(key, "key", ""))):
        found.append(int(match[2]))
  return 1 + max(found)


@dataclasses.dataclass(frozen=True)
class Gaps:
  """Differences of log-probabilities of tokens, nats.

  Attributes:
    mean: of |gap|.
    kl: mean of k3, as `ops.log_probs.kl_estimate`.
    quantile: that 99 % stay below.
    largest: one token alone; shown, and not compared with anything.
  """

  mean: float
  kl: float
  quantile: float
  largest: float

  def worst(self, tolerance: Tolerance) -> tuple[str, float, float]:
    """Returns name, value and limit of what is furthest beyond its limit."""
    measures = (
      ("mean", self.mean, tolerance.mean),
      ("k3", self.kl, tolerance.kl),
      ("99 %", self.quantile, tolerance.quantile),
    )
    # A NaN is larger than anything.
    share = lambda x: math.inf if math.isnan(x[1]) else x[1] / x[2]
    return max(measures, key=share)

  def __str__(self):
    return (
      f"mean {self.mean:.2g}, k3 {self.kl:.2g}, 99 % below "
      f"{self.quantile:.2g}, largest {self.largest:.2g}"
    )


def gaps(sampled: np.ndarray, other: np.ndarray, mask: np.ndarray) -> Gaps:
  """Compares log-probabilities of the same tokens.

  Args:
    sampled: `[N, T]`, under the policy that drew them.
    other: `[N, T]`, under the one that is held against it.
    mask: `[N, T]` bool; without a token there are no gaps.
  """
  mask = np.asarray(mask)
  difference = np.asarray(other, np.float64) - np.asarray(sampled, np.float64)
  difference = difference[mask]
  if not difference.size:
    return Gaps(0.0, 0.0, 0.0, 0.0)
  size = np.abs(difference)
  with np.errstate(over="ignore"):
    kl = np.mean(np.expm1(difference) - difference)
  quantile = np.quantile(size, 0.99, method="higher")
  return Gaps(*map(float, (size.mean(), kl, quantile, size.max())))
