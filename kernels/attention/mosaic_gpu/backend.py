"""The attention backend for NVIDIA Hopper GPUs: Pallas (Mosaic GPU) kernels with TMA and wgmma.

B batch, Q/K query/key length, H query heads, G key/value heads, D head_dim, N tiles of queries.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as pallas_triton

from kernels.attention import block_tables
from kernels.attention.backend import Backend
from kernels.attention.intervals import KeyIntervals
from kernels.attention.mosaic_gpu.block_sizes import BLOCKS, TILE
from kernels.nvidia import compute_capability
from kernels.varying import vary_as

HEAD_DIMS = (64, 128, 256)
# From this head_dim on, the registers do not hold the gradients of key and value together.
SEPARATE_GRADS = 256


def forward(
  query_BxQxHxD: jax.Array,
  key_BxKxGxD: jax.Array,
  value_BxKxGxD: jax.Array,
  intervals: KeyIntervals,
  *,
  scale: float,
  soft_cap: float | None,
  out_dtype: jnp.dtype,
  sizes: Mapping[str, tuple[int, int]] = {},
) -> tuple[jax.Array, jax.Array]:
  """See `kernels.attention.backend.Forward`."""
  from kernels.attention.mosaic_gpu import forward as kernel  # Mosaic GPU is slow to import.

  Q = query_BxQxHxD.shape[1]
  k, slots = sizes.get("forward") or BLOCKS["forward"][query_BxQxHxD.shape[3]]
  arrays = tuple(map(_whole_tiles, (query_BxQxHxD, key_BxKxGxD, value_BxKxGxD, *intervals)))
  tables = block_tables.of_queries(KeyIntervals(*arrays[3:]), arrays[1].shape[1], TILE, k)
  out_BxQxHxD, log_sum_exp_BxHxQ = kernel.forward(
    *(*arrays, tables), k=k, slots=slots, scale=scale, soft_cap=soft_cap, out_dtype=out_dtype
  )
  return vary_as(arrays, (out_BxQxHxD[:, :Q], jnp.swapaxes(log_sum_exp_BxHxQ, 1, 2)[:, :Q]))


def backward(
  query_BxQxHxD: jax.Array,
  key_BxKxGxD: jax.Array,
  value_BxKxGxD: jax.Array,
  intervals: KeyIntervals,
  log_sum_exp_BxQxH: jax.Array,
  delta_BxQxH: jax.Array,
  out_cotangent_BxQxHxD: jax.Array,
  *,
  scale: float,
  soft_cap: float | None,
  sizes: Mapping[str, tuple[int, int]] = {},
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """See `kernels.attention.backend.Backward`. dQ is one kernel, dK and dV are one or two more."""
  from kernels.attention.mosaic_gpu import backward as kernels  # Mosaic GPU is slow to import.

  Q, (K, _, D) = query_BxQxHxD.shape[1], key_BxKxGxD.shape[1:]
  query, key, value, start, stop, out_cotangent, delta = map(
    _whole_tiles,
    (
      query_BxQxHxD,
      key_BxKxGxD,
      value_BxKxGxD,
      *intervals,
      out_cotangent_BxQxHxD.astype(query_BxQxHxD.dtype),
      delta_BxQxH,
    ),
  )
  log_sum_exp = _whole_tiles(log_sum_exp_BxQxH * math.log2(math.e), jnp.inf)
  statistics = (jnp.swapaxes(array, 1, 2) for array in (log_sum_exp, delta))
  arrays = kernels.Operands(query, key, value, start, stop, out_cotangent, *statistics)

  k, slots = sizes.get("query_grad") or BLOCKS["query_grad"][D]
  tables = block_tables.of_queries(KeyIntervals(start, stop), key.shape[1], TILE, k)
  query_grad_BxQxHxD = kernels.query_grad(
    arrays, tables, k=k, slots=slots, scale=scale, soft_cap=soft_cap
  )
  q, slots = sizes.get("key_value_grad") or BLOCKS["key_value_grad"][D]
  tables = block_tables.of_queries(KeyIntervals(start, stop), key.shape[1], q, TILE)
  tables = block_tables.of_keys(tables, key.shape[1] // TILE)
  passes = (("key",), ("value",)) if D >= SEPARATE_GRADS else (("key", "value"),)
  key_grad_BxKxGxD, value_grad_BxKxGxD = (
    grad
    for wanted in passes
    for grad in kernels.key_value_grads(
      arrays, tables, wanted=wanted, q=q, slots=slots, scale=scale, soft_cap=soft_cap
    )
  )
  return vary_as(
    arrays, (query_grad_BxQxHxD[:, :Q], key_grad_BxKxGxD[:, :K], value_grad_BxKxGxD[:, :K])
  )


def unsupported(query_BxQxHxD: jax.Array, _: Any) -> str | None:
  """Why Mosaic GPU does not run here, or None; see `kernels.attention.backend.Backend`."""
  if not pallas_triton.is_gpu_device() or compute_capability() != 90:
    return "it needs an NVIDIA Hopper GPU (H100, H200); 'triton' runs on others, 'xla' everywhere"
  if query_BxQxHxD.dtype.itemsize != 2:
    return f"it takes bfloat16 and float16, not {query_BxQxHxD.dtype}; 'triton' takes float32"
  if query_BxQxHxD.shape[-1] not in HEAD_DIMS:
    return f"it takes head_dim {HEAD_DIMS}, not {query_BxQxHxD.shape[-1]}; 'xla' takes any"
  return None


MOSAIC_GPU = Backend("mosaic_gpu", unsupported, forward, backward)


def _whole_tiles(array: jax.Array, value: float = 0) -> jax.Array:
  """Pads axis 1 to whole tiles: with zeros, queries are empty, and no query sees padding keys."""
  padding = [(0, 0)] * array.ndim
  padding[1] = (0, -array.shape[1] % TILE)
  return jnp.pad(array, padding, constant_values=value)
