"""Attention over key intervals on NVIDIA Hopper: Pallas kernels with TMA and wgmma.

The kernels have been interpreted and compiled for an H200, but not yet been run on one: `api`
takes them only by name, and Triton otherwise, until they have been measured.

B batch, Q/K query/key length, H query heads, G key/value heads, D head_dim, N/M tiles of
queries/keys.
"""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as pallas_triton

from kernels.attention import block_tables
from kernels.attention.backend import Backend
from kernels.attention.block_sizes_gpu import MOSAIC_GPU_BLOCKS as BLOCKS, MOSAIC_GPU_TILE as TILE
from kernels.attention.intervals import KeyIntervals
from kernels.attention.triton import compute_capability
from kernels.varying import vary_alike

HEAD_DIMS = (64, 128, 256)
# From here on the gradients of key and value do not fit the registers together.
SEPARATE_GRADS = 256


def forward(
  query_BxQxHxD,
  key_BxKxGxD,
  value_BxKxGxD,
  intervals: KeyIntervals,
  *,
  scale: float,
  soft_cap: float | None,
  out_dtype: jnp.dtype,
  sizes: Mapping[str, tuple[int, int]] = {},
):
  """See `kernels.attention.backend.Forward`."""
  from kernels.attention import mosaic_gpu_forward  # Loading Mosaic GPU takes a while.

  Q = query_BxQxHxD.shape[1]
  k, slots = sizes.get("forward") or BLOCKS["forward"][query_BxQxHxD.shape[3]]
  query, key, value, start, stop = map(
    _whole_tiles, (query_BxQxHxD, key_BxKxGxD, value_BxKxGxD, *intervals)
  )
  tables_Bx4xN = block_tables.of_queries(KeyIntervals(start, stop), key.shape[1], TILE, k)
  out_BxQxHxD, log_sum_exp_BxHxQ = mosaic_gpu_forward.forward(
    query,
    key,
    value,
    start,
    stop,
    tables_Bx4xN,
    k=k,
    slots=slots,
    scale=scale,
    soft_cap=soft_cap,
    out_dtype=out_dtype,
  )
  return _varying(
    (query_BxQxHxD, key_BxKxGxD, value_BxKxGxD, *intervals),
    (out_BxQxHxD[:, :Q], jnp.swapaxes(log_sum_exp_BxHxQ, 1, 2)[:, :Q]),
  )


def backward(
  query_BxQxHxD,
  key_BxKxGxD,
  value_BxKxGxD,
  intervals: KeyIntervals,
  log_sum_exp_BxQxH,
  delta_BxQxH,
  out_cotangent_BxQxHxD,
  *,
  scale: float,
  soft_cap: float | None,
  sizes: Mapping[str, tuple[int, int]] = {},
):
  """See `kernels.attention.backend.Backward`; dQ is one kernel, dK and dV one or two more."""
  from kernels.attention import mosaic_gpu_backward  # Loading Mosaic GPU takes a while.

  Q, K, D = query_BxQxHxD.shape[1], *key_BxKxGxD.shape[1::2]
  query, key, value, start, stop, out_cotangent, log_sum_exp, delta = map(
    _whole_tiles,
    (
      query_BxQxHxD,
      key_BxKxGxD,
      value_BxKxGxD,
      *intervals,
      out_cotangent_BxQxHxD.astype(query_BxQxHxD.dtype),
      log_sum_exp_BxQxH * math.log2(math.e),
      delta_BxQxH,
    ),
  )
  log_sum_exp = jnp.where((stop <= start)[..., None], jnp.inf, log_sum_exp)
  statistics = (jnp.swapaxes(array, 1, 2) for array in (log_sum_exp, delta))
  arrays = query, key, value, start, stop, out_cotangent, *statistics
  options = dict(scale=scale, soft_cap=soft_cap)

  k, slots = sizes.get("query_grad") or BLOCKS["query_grad"][D]
  tables = block_tables.of_queries(KeyIntervals(start, stop), key.shape[1], TILE, k)
  query_grad_BxQxHxD = mosaic_gpu_backward.query_grad(*arrays, tables, k=k, slots=slots, **options)
  q, slots = sizes.get("key_value_grad") or BLOCKS["key_value_grad"][D]
  tables = block_tables.of_queries(KeyIntervals(start, stop), key.shape[1], q, TILE)
  tables = block_tables.of_keys(tables, key.shape[1] // TILE)
  passes = (("key",), ("value",)) if D >= SEPARATE_GRADS else (("key", "value"),)
  key_grad_BxKxGxD, value_grad_BxKxGxD = (
    grad
    for wanted in passes
    for grad in mosaic_gpu_backward.key_value_grads(
      *arrays, tables, wanted=wanted, q=q, slots=slots, **options
    )
  )
  return _varying(
    arrays, (query_grad_BxQxHxD[:, :Q], key_grad_BxKxGxD[:, :K], value_grad_BxKxGxD[:, :K])
  )


def unsupported(query_BxQxHxD, key_BxKxGxD) -> str | None:
  """What stands against Mosaic GPU here, or None; see `kernels.attention.backend.Backend`."""
  if not pallas_triton.is_gpu_device() or compute_capability() != 90:
    return "it needs an NVIDIA Hopper GPU (H100, H200); 'triton' runs on others, 'xla' everywhere"
  if query_BxQxHxD.dtype.itemsize != 2:
    return f"it takes bfloat16 and float16, not {query_BxQxHxD.dtype}; 'triton' takes float32"
  if query_BxQxHxD.shape[-1] not in HEAD_DIMS:
    return f"it takes head_dim {HEAD_DIMS}, not {query_BxQxHxD.shape[-1]}; 'xla' takes any"
  return None


MOSAIC_GPU = Backend("mosaic_gpu", unsupported, forward, backward)


def _whole_tiles(array: jax.Array) -> jax.Array:
  """Pads axis 1 with zeros to whole tiles: queries with empty intervals, keys that none sees."""
  padding = [(0, 0)] * array.ndim
  padding[1] = (0, -array.shape[1] % TILE)
  return jnp.pad(array, padding)


def _varying(arrays, results):
  """The results, varying over what the arguments vary over, of which Mosaic GPU says nothing."""
  return vary_alike(*arrays, *results)[len(arrays) :]
