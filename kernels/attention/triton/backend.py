"""The attention backend for all NVIDIA GPUs since Ampere: Triton kernels, through jax-triton.

float32 inputs are multiplied as three TensorFloat-32 products ("tf32x3"), as accurate as float32.

B batch, Q/K query/key length, H query heads, G key/value heads, D head_dim, N/M query/key blocks.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kernels.attention import block_tables
from kernels.attention.backend import Backend
from kernels.attention.intervals import KeyIntervals
from kernels.attention.triton.block_sizes import Blocks, blocks_for
from kernels.nvidia import TRITON_OPTIONS, compute_capability, triton_is_missing
from kernels.varying import vary_as

HEAD_DIMS = (64, 128, 256)


def forward(
  query_BxQxHxD: jax.Array,
  key_BxKxGxD: jax.Array,
  value_BxKxGxD: jax.Array,
  intervals: KeyIntervals,
  *,
  scale: float,
  soft_cap: float | None,
  out_dtype: jnp.dtype,
  sizes: Mapping[str, Blocks] = {},
) -> tuple[jax.Array, jax.Array]:
  """See `kernels.attention.backend.Forward`."""
  from kernels.attention.triton import forward as kernel  # Only GPU installs have Triton.

  B, Q, H, _ = query_BxQxHxD.shape
  options: dict[str, Any] = dict(group=H // key_BxKxGxD.shape[2], scale=scale, soft_cap=soft_cap)
  blocks = _blocks("forward", query_BxQxHxD, sizes)
  out_BxQxHxD, log_sum_exp_BxHxQ = call(
    kernel.forward,
    (query_BxQxHxD, key_BxKxGxD, value_BxKxGxD, *intervals),
    (Q, key_BxKxGxD.shape[1], H),
    (
      jax.ShapeDtypeStruct(query_BxQxHxD.shape, out_dtype),
      jax.ShapeDtypeStruct((B, H, Q), jnp.float32),
    ),
    grid=(-(-Q // blocks.query), H, B),
    blocks=blocks,
    QUERY_BLOCK=blocks.query,
    **options,
  )
  return out_BxQxHxD, jnp.swapaxes(log_sum_exp_BxHxQ, 1, 2)


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
  sizes: Mapping[str, Blocks] = {},
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """See `kernels.attention.backend.Backward`. dQ is one kernel, dK and dV are another."""
  from kernels.attention.triton import backward as kernels  # Only GPU installs have Triton.

  B, Q, H, _ = query_BxQxHxD.shape
  K, G = key_BxKxGxD.shape[1:3]
  options: dict[str, Any] = dict(group=H // G, scale=scale, soft_cap=soft_cap)
  arrays = (
    query_BxQxHxD,
    key_BxKxGxD,
    value_BxKxGxD,
    *intervals,
    out_cotangent_BxQxHxD.astype(query_BxQxHxD.dtype),
    jnp.swapaxes(log_sum_exp_BxQxH * math.log2(math.e), 1, 2),
    jnp.swapaxes(delta_BxQxH, 1, 2),
  )
  key_grad_type = jax.ShapeDtypeStruct(key_BxKxGxD.shape, jnp.float32)

  blocks = _blocks("query_grad", query_BxQxHxD, sizes)
  (query_grad_BxQxHxD,) = call(
    kernels.query_grad,
    arrays,
    (Q, K, H),
    (jax.ShapeDtypeStruct(query_BxQxHxD.shape, jnp.float32),),
    grid=(-(-Q // blocks.query), H, B),
    blocks=blocks,
    QUERY_BLOCK=blocks.query,
    **options,
  )
  blocks = _blocks("key_value_grad", query_BxQxHxD, sizes)
  num_key_blocks = -(-K // blocks.key)
  tables_Bx4xN = block_tables.of_queries(intervals, K, blocks.query, blocks.key)
  tables_Bx4xM = block_tables.of_keys(tables_Bx4xN, num_key_blocks)
  key_grad_BxKxGxD, value_grad_BxKxGxD = call(
    kernels.key_value_grad,
    (*arrays, tables_Bx4xM),
    (Q, K, H),
    (key_grad_type, key_grad_type),
    grid=(num_key_blocks, G, B),
    blocks=blocks,
    QUERY_BLOCK=blocks.query,
    **options,
  )
  return query_grad_BxQxHxD, key_grad_BxKxGxD, value_grad_BxKxGxD


def unsupported(query_BxQxHxD: jax.Array, _: Any) -> str | None:
  """Why Triton does not run here, or None; see `kernels.attention.backend.Backend`."""
  if problem := triton_is_missing("xla"):
    return problem
  if query_BxQxHxD.shape[-1] not in HEAD_DIMS:
    return f"it takes head_dim {HEAD_DIMS}, not {query_BxQxHxD.shape[-1]}; 'xla' takes any"
  return None


TRITON = Backend("triton", unsupported, forward, backward)


def _blocks(kernel: str, query_BxQxHxD, sizes: Mapping[str, Blocks]) -> Blocks:
  if kernel in sizes:
    return sizes[kernel]
  return blocks_for(kernel, compute_capability(), query_BxQxHxD.shape[-1], query_BxQxHxD.dtype)


def call(
  kernel: Any,
  arrays: Sequence[jax.Array],
  sizes: Sequence[int],
  out_type: tuple[jax.ShapeDtypeStruct, ...],
  *,
  grid: tuple[int, ...],
  blocks: Blocks,
  group: int,
  scale: float,
  soft_cap: float | None,
  **constants: Any,
) -> tuple[jax.Array, ...]:
  """Launches a kernel of attention or decode, whose first array is the query."""
  import jax_triton

  results = jax_triton.triton_call(
    *arrays,
    *sizes,
    kernel=kernel,
    out_type=out_type,
    grid=grid,
    num_warps=blocks.num_warps,
    num_stages=blocks.num_stages,
    backend_options=TRITON_OPTIONS,
    HEAD_DIM=arrays[0].shape[3],
    GROUP=group,
    KEY_BLOCK=blocks.key,
    SCALE=float(scale),
    SOFT_CAP=None if soft_cap is None else float(soft_cap),
    PRECISION="tf32x3" if arrays[0].dtype == jnp.float32 else None,
    **constants,
  )
  return vary_as(arrays, results)
