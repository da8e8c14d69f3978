"""Computes on a CPU with the products of an accelerator.

A TPU reads the operands of a float32 product as bfloat16, with 7 bits of
mantissa, and an NVIDIA GPU as TF32, with 10, unless a higher precision is asked
for. The sums are float32 ones. So is a product here, forwards and backwards:
the operands are rounded where products are lowered.
"""

import contextlib

import jax
from jax.interpreters import mlir

from rljax.distributed import planning

BITS = {"tpu": 7, "gpu": 10}


@contextlib.contextmanager
def machine(name):
  """Lets programs that are traced inside compute as on a machine.

  Args:
    name: of `BITS`.
  """
  product = jax.lax.dot_general_p
  # No public function says how a product is lowered.
  from jax._src.interpreters import mlir as lowerings

  kept = lowerings._platform_specific_lowerings["cpu"][product]
  plain = getattr(kept, "rule", kept)

  def rounded(ctx, left, right, *, precision, **params):
    of_both = precision if isinstance(precision, tuple) else (precision,)
    if not {jax.lax.Precision.HIGH, jax.lax.Precision.HIGHEST} & set(of_both):
      left, right = (
        _rounded(ctx, x, aval, BITS[name])
        for x, aval in zip((left, right), ctx.avals_in, strict=True)
      )
    return plain(ctx, left, right, precision=precision, **params)

  own, planning.machine = planning.machine, lambda: name
  asked = jax.config.jax_default_matmul_precision
  mlir.register_lowering(product, rounded, platform="cpu")
  jax.clear_caches()
  try:
    yield
  finally:
    lowerings._platform_specific_lowerings["cpu"][product] = kept
    planning.machine = own
    jax.config.update("jax_default_matmul_precision", asked)
    jax.clear_caches()


def _rounded(ctx, x, aval, bits):
  """`x` with so many bits of mantissa, if it is float32."""
  if aval.dtype != "float32":
    return x
  rounds = mlir.lower_fun(
    lambda x: jax.lax.reduce_precision(x, 8, bits), multiple_results=False
  )
  return rounds(ctx.replace(avals_in=[aval], avals_out=[aval]), x)[0]
