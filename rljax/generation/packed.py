"""Reads batches whose texts are joined to packed rows.

`text/packing.py` writes them: beside the B replies of a batch, which losses
read, stand the same texts in fewer rows of one length. A model reads those, in
which a token sees its own text alone, and what it says of response tokens is
brought back into the places of the batch: it is that of unpacked rows up to
rounding, and so are losses and gradients.
"""

from collections.abc import Mapping
from typing import Any

import chex
import jax.numpy as jnp

from rljax.text import packing

Array = chex.Array
Batch = Mapping[str, Array]

ROWS = ("packed_ids", "packed_segments", "packed_reads")


def is_packed(batch: Batch) -> bool:
  """Whether a batch has packed rows beside its texts."""
  return "packed_ids" in batch


def without(batch: Batch) -> dict[str, Array]:
  """Returns a batch without packed rows, as when its texts are replaced."""
  return {n: x for n, x in batch.items() if not n.startswith("packed_")}


def texts(batch: Batch) -> dict[str, Array]:
  """Takes the texts of a batch, K replies of each row as rows of their own.

  Args:
    batch: texts `[B, ..., T]`, with packed rows beside them or not.

  Returns:
    The texts `[N, T]`, and the packed rows as they are.
  """
  fold = lambda x: x.reshape(-1, x.shape[-1])
  found = {name: fold(batch[name]) for name in packing.TEXTS}
  if is_packed(batch):
    found |= {name: batch[name] for name in ROWS}
    found["packed_places"] = fold(batch["packed_places"])
  return found


def apply(model: Any, params: Any, batch: Batch, **options: Any) -> Array:
  """Calls a model on packed rows.

  Args:
    model: module, called on ids, mask and segments.
    params: its parameters.
    batch: from `packing.Packer`.
    **options: of `model.apply`, such as `method`.

  Returns:
    `[R, S, ...]`.
  """
  segments = batch["packed_segments"]
  chex.assert_equal_shape([batch["packed_ids"], segments])
  return model.apply(
    {"params": params}, batch["packed_ids"], segments > 0, segments, **options
  )


def responses(batch: Batch) -> Array:
  """Returns the response tokens of packed rows, `[R, U]` int."""
  return jnp.take_along_axis(batch["packed_ids"], batch["packed_reads"], axis=1)


def read(states: Array, batch: Batch, *, before: int) -> Array:
  """Selects from packed rows what belongs to response tokens.

  Args:
    states: `[R, S, ...]`, one for each token that was read.
    batch: from `packing.Packer`.
    before: 1 for the state from which a token is drawn, 0 for its own.

  Returns:
    `[R, U, ...]`.
  """
  at = jnp.maximum(batch["packed_reads"] - before, 0)
  at = at.reshape(*at.shape, *[1] * (states.ndim - 2))
  return jnp.take_along_axis(states, at, axis=1)


def in_places(values: Array, batch: Batch) -> Array:
  """Brings numbers of response tokens into the places of the batch.

  Args:
    values: `[R, U, ...]`.
    batch: from `packing.Packer`, with `response_mask` `[N, T]`.

  Returns:
    `[N, T, ...]`, 0 where masked.
  """
  mask = batch["response_mask"]
  found = values.reshape(-1, *values.shape[2:])[batch["packed_places"]]
  mask = mask.reshape(*mask.shape, *[1] * (values.ndim - 2))
  return jnp.where(mask, found, 0)
