"""Attention by the kernels that GPUs and TPUs have for it.

On a GPU that of cuDNN, on a TPU splash attention, which JAX brings. Neither
makes an array of all pairs of tokens. Both were compiled for their machines and
held to the plain form by an interpreter or by hand, but have not been timed.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

Array = jax.Array

# A TPU's registers have so many lanes: lengths are filled up to multiples.
_LANES = 128
_BLOCKS = (512, 256, 128)
# Head widths that cuDNN takes on every GPU since Ampere, backwards too.
_WIDEST = 128


def can_split(mesh: Mesh | None, queries: Array, keys: Array) -> bool:
  """Returns whether a kernel can run on each device's part of its operands.

  Args:
    mesh: of the program; None where it is not known.
    queries: `[B, Q, H, d]`.
    keys: `[B, S, K, d]`.

  Returns:
    Whether rows and heads divide over the mesh. Without one, whether there is
    no other device that the compiler could put a part on.
  """
  if mesh is None:
    return jax.device_count() == 1
  rows = mesh.shape.get("data", 1) * mesh.shape.get("fsdp", 1)
  heads = mesh.shape.get("tensor", 1)
  return queries.shape[0] % rows == 0 and keys.shape[2] % heads == 0


def on_mesh(
  kernel: Callable[..., Array],
  mesh: Mesh | None,
  queries: Array,
  keys: Array,
  values: Array,
  mask: Array,
  segments: Array | None = None,
  **options,
) -> Array:
  """Runs a kernel on each device's rows and heads.

  Args:
    kernel: `cudnn` or `splash`.
    mesh: of the program; None: one device.
    queries: `[B, S, H, d]`.
    keys: `[B, S, K, d]`.
    values: `[B, S, K, d]`.
    mask: `[B, S]` bool.
    segments: `[B, S]` int, or None.
    **options: of the kernel.

  Returns:
    `[B, S, H, d]`.
  """
  run = functools.partial(kernel, **options)
  if mesh is None or mesh.size == 1:
    return run(queries, keys, values, mask, segments)
  rows = tuple(axis for axis in ("data", "fsdp") if axis in mesh.shape)
  heads = "tensor" if "tensor" in mesh.shape else None
  whole, flat = P(rows, None, heads, None), P(rows, None)
  return jax.shard_map(
    run,
    mesh=mesh,
    in_specs=(whole, whole, whole, flat, flat),
    out_specs=whole,
    check_vma=False,
  )(queries, keys, values, mask, segments)


def cudnn_knows(
  queries: Array,
  keys: Array,
  softcap: float | None,
  window: int | None,
  segments: Array | None,
  causal: bool = True,
) -> bool:
  """Returns whether `cudnn` can compute an attention.

  It takes 16-bit numbers, heads of up to 128 in steps of 8, and rows that are
  one text; it has no cap on scores. cuDNN must be installed. What its version
  and the GPU ask for beside that, JAX says when it traces it.

  Args:
    queries: `[B, Q, H, d]`.
    keys: `[B, S, K, d]`.
    softcap: of scores.
    window: tokens that a query sees.
    segments: of packed rows.
    causal: whether a query sees the tokens up to its own alone.
  """
  width = queries.shape[-1]
  if (
    queries.dtype not in (jnp.bfloat16, jnp.float16)
    or queries.shape[1] != keys.shape[1]
    or width % 8
    or width > _WIDEST
    or softcap is not None
    or segments is not None
  ):
    return False
  run = functools.partial(
    cudnn, scale=1.0, softcap=None, causal=causal, window=window
  )
  shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (queries, keys)]
  mask = jax.ShapeDtypeStruct(keys.shape[:2], bool)
  try:
    pulls = lambda q, k, mask: jax.vjp(lambda *x: run(*x, mask), q, k, k)[1]
    jax.eval_shape(pulls, *shapes, mask)
  except (RuntimeError, ValueError, NotImplementedError):
    return False
  return True


def cudnn(
  queries: Array,
  keys: Array,
  values: Array,
  mask: Array,
  segments: Array | None = None,
  *,
  scale: float,
  softcap: float | None,
  causal: bool,
  window: int | None,
) -> Array:
  """Computes attention by cuDNN; see `attention.attend`.

  The kernel takes rows that begin with their first token: tokens are moved in
  front of the padding, and back afterwards.

  Raises:
    ValueError: if there are segments or a cap.
    RuntimeError: if there is no cuDNN.
  """
  if segments is not None or softcap is not None:
    raise ValueError("cuDNN has no attention with segments or a cap of scores.")
  order = jnp.argsort(~mask, axis=1, stable=True)
  back = jnp.argsort(order, axis=1)
  # A row of padding alone reads its first column.
  lengths = jnp.maximum(jnp.sum(mask, axis=1, dtype=jnp.int32), 1)
  # What the kernel makes of the gradient at padding is not said: it stops here.
  there = jnp.take_along_axis(mask, order, axis=1)[:, :, None, None]
  found = jax.nn.dot_product_attention(
    *(
      jnp.where(there, _moved(x, order, back), 0)
      for x in (queries, keys, values)
    ),
    scale=scale,
    is_causal=causal,
    query_seq_lengths=lengths,
    key_value_seq_lengths=lengths,
    local_window_size=_reach(causal, window),
    implementation="cudnn",
  )
  return jnp.where(mask[:, :, None, None], _moved(found, back, order), 0)


def _reach(causal: bool, window: int | None) -> tuple[int, int] | None:
  """Returns how many tokens before its own and behind it a query sees."""
  if window is None:
    return None
  return (window - 1, 0) if causal else (window, window)


@jax.custom_vjp
def _moved(x: Array, order: Array, back: Array) -> Array:
  """Puts the columns `[B, S]` of an array in order; `back` undoes it."""
  del back
  return jnp.take_along_axis(x, order[:, :, None, None], axis=1)


def _moved_forward(x, order, back):
  return _moved(x, order, back), (order, back)


def _moved_backward(orders, cotangent):
  order, back = orders
  # A gather, where the gradient of a gather would be a sum over indices.
  return _moved(cotangent, back, order), None, None


_moved.defvjp(_moved_forward, _moved_backward)


def splash_knows(queries: Array, keys: Array) -> bool:
  """Returns whether `splash` can compute an attention.

  Args:
    queries: `[B, Q, H, d]`.
    keys: `[B, S, K, d]`.
  """
  return queries.shape[1] == keys.shape[1]


def splash(
  queries: Array,
  keys: Array,
  values: Array,
  mask: Array,
  segments: Array | None = None,
  *,
  scale: float,
  softcap: float | None,
  causal: bool,
  window: int | None,
  interpret: bool = False,
) -> Array:
  """Computes attention by the splash kernel; see `attention.attend`.

  Padding is a segment of its own, so that no query sees nothing.

  Args:
    queries: `[B, S, H, d]`.
    keys: `[B, S, K, d]`.
    values: `[B, S, K, d]`.
    mask: `[B, S]` bool.
    segments: `[B, S]` int, or None.
    scale: factor of q · k.
    softcap: c of c tanh(s / c); None: no cap.
    causal: whether a query sees the tokens up to its own alone.
    window: of `attention.attend`.
    interpret: whether to run it step by step on a CPU, for tests.

  Returns:
    `[B, S, H, d]` in the dtype of `values`.
  """
  # Pallas takes a second to import, and a CPU has no use for it.
  from jax.experimental.pallas.ops.tpu import splash_attention as lib

  length, num_heads = queries.shape[1:3]
  filled = -(-length // _LANES) * _LANES
  segments = jnp.where(mask, 1 if segments is None else segments, 0)
  segments = jnp.pad(segments, ((0, 0), (0, filled - length)))
  heads_first = lambda x: jnp.pad(
    x, ((0, 0), (0, filled - length), (0, 0), (0, 0))
  ).swapaxes(1, 2)

  square = (filled, filled)
  if window is not None:
    allowed = lib.LocalMask(square, _reach(causal, window), 0)
  else:
    allowed = (lib.CausalMask if causal else lib.FullMask)(square)
  size = next(n for n in _BLOCKS if filled % n == 0)
  sizes = dict.fromkeys(
    ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv")
    + ("block_kv_dkv_compute", "block_q_dq", "block_kv_dq"),
    size,
  )
  kernel = lib.make_splash_mha(
    mask=lib.MultiHeadMask([allowed] * num_heads),
    block_sizes=lib.BlockSizes(**sizes),
    attn_logits_soft_cap=softcap,
    head_shards=1,
    q_seq_shards=1,
    interpret=interpret,
  )
  found = jax.vmap(kernel)(
    heads_first((queries * scale).astype(queries.dtype)),
    heads_first(keys),
    heads_first(values),
    lib.SegmentIds(segments, segments),
  )
  return found.swapaxes(1, 2)[:, :length].astype(values.dtype)
