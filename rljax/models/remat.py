"""What the backward pass keeps of a block, and what it computes again."""

from typing import Any

import flax.linen as nn
import jax

from rljax.distributed import planning

# none: all that the gradient reads. nothing: the input of each block alone.
# dots: also the products with parameters, so that none is computed again.
# offload: those, in the memory of the host.
POLICIES = ("none", "nothing", "dots", "offload")


def check(remat: str | bool) -> str:
  """Returns the name of a policy; True is "nothing" and False "none".

  Raises:
    ValueError: if there is no such policy, or not on this machine.
  """
  name = _name(remat)
  if name not in POLICIES:
    raise ValueError(
      f"remat must be one of {', '.join(POLICIES)}, got {remat!r}."
    )
  if name == "offload" and planning.machine() == "cpu":
    raise ValueError(
      "--remat=offload keeps activations of a GPU or TPU in the memory of its "
      "host, and this machine computes on a CPU: use dots or nothing."
    )
  return name


def block(module: Any, remat: str | bool, *, in_scan: bool = False) -> Any:
  """Returns a class of blocks whose gradient follows a policy.

  Args:
    module: class, whose `__call__` is recomputed.
    remat: one of `POLICIES`, or a bool, see `check`.
    in_scan: whether a scan runs it; the two passes are then loops of their own,
      which no compiler joins.
  """
  name = _name(remat)
  if name == "none":
    return module
  policies = jax.checkpoint_policies
  policy = {
    "nothing": None,
    "dots": policies.dots_with_no_batch_dims_saveable,
    "offload": policies.offload_dot_with_no_batch_dims("device", "pinned_host"),
  }[name]
  return nn.remat(module, policy=policy, prevent_cse=not in_scan)


def _name(remat):
  """The name of a policy, which a bool may stand for."""
  return {True: "nothing", False: "none"}.get(remat, remat)
