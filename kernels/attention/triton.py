"""Attention over key intervals for NVIDIA GPUs of any kind since Ampere: Triton through jax-triton.

float32 inputs multiply as three TensorFloat-32 products ("tf32x3"), whose error is that of float32.

B batch, Q/K query/key length, H query heads, G key/value heads, D head_dim, N/M query/key blocks.
"""

import importlib.util
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as pallas_triton

from kernels.attention import block_tables
from kernels.attention.backend import Backend
from kernels.attention.block_sizes_gpu import Blocks, triton_blocks
from kernels.attention.intervals import KeyIntervals
from kernels.varying import vary_alike

HEAD_DIMS = (64, 128, 256)


def forward(
  query_BxQxHxD,
  key_BxKxGxD,
  value_BxKxGxD,
  intervals: KeyIntervals,
  *,
  scale: float,
  soft_cap: float | None,
  out_dtype: jnp.dtype,
  sizes: Mapping[str, Blocks] = {},
):
  """See `kernels.attention.backend.Forward`."""
  from kernels.attention import triton_forward  # Triton is there on GPU installs only.

  B, Q, H, _ = query_BxQxHxD.shape
  blocks = _blocks("forward", query_BxQxHxD, sizes)
  out_BxQxHxD, log_sum_exp_BxHxQ = _call(
    triton_forward.forward,
    (query_BxQxHxD, key_BxKxGxD, value_BxKxGxD, *intervals),
    (Q, key_BxKxGxD.shape[1], H),
    (
      jax.ShapeDtypeStruct(query_BxQxHxD.shape, out_dtype),
      jax.ShapeDtypeStruct((B, H, Q), jnp.float32),
    ),
    grid=(-(-Q // blocks.query), H, B),
    blocks=blocks,
    scale=scale,
    soft_cap=soft_cap,
  )
  return out_BxQxHxD, jnp.swapaxes(log_sum_exp_BxHxQ, 1, 2)


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
  sizes: Mapping[str, Blocks] = {},
):
  """See `kernels.attention.backend.Backward`; dQ is one kernel, dK and dV are another."""
  from kernels.attention import triton_backward  # Triton is there on GPU installs only.

  B, Q, H, _ = query_BxQxHxD.shape
  K, G = key_BxKxGxD.shape[1:3]
  is_empty_BxQx1 = (intervals.stop_BxQ <= intervals.start_BxQ)[..., None]
  base_2_BxQxH = jnp.where(is_empty_BxQx1, jnp.inf, log_sum_exp_BxQxH * math.log2(math.e))
  arrays = (
    query_BxQxHxD,
    key_BxKxGxD,
    value_BxKxGxD,
    *intervals,
    out_cotangent_BxQxHxD.astype(query_BxQxHxD.dtype),
    jnp.swapaxes(base_2_BxQxH, 1, 2),
    jnp.swapaxes(delta_BxQxH, 1, 2),
  )
  key_grad_type = jax.ShapeDtypeStruct(key_BxKxGxD.shape, jnp.float32)

  blocks = _blocks("query_grad", query_BxQxHxD, sizes)
  (query_grad_BxQxHxD,) = _call(
    triton_backward.query_grad,
    arrays,
    (Q, K, H),
    (jax.ShapeDtypeStruct(query_BxQxHxD.shape, jnp.float32),),
    grid=(-(-Q // blocks.query), H, B),
    blocks=blocks,
    scale=scale,
    soft_cap=soft_cap,
  )
  blocks = _blocks("key_value_grad", query_BxQxHxD, sizes)
  num_key_blocks = -(-K // blocks.key)
  tables_Bx4xN = block_tables.of_queries(intervals, K, blocks.query, blocks.key)
  tables_Bx4xM = block_tables.of_keys(tables_Bx4xN, num_key_blocks)
  key_grad_BxKxGxD, value_grad_BxKxGxD = _call(
    triton_backward.key_value_grad,
    (*arrays, tables_Bx4xM),
    (Q, K, H),
    (key_grad_type, key_grad_type),
    grid=(num_key_blocks, G, B),
    blocks=blocks,
    scale=scale,
    soft_cap=soft_cap,
  )
  return query_grad_BxQxHxD, key_grad_BxKxGxD, value_grad_BxKxGxD


def unsupported(query_BxQxHxD, key_BxKxGxD) -> str | None:
  """What stands against Triton here, or None; see `kernels.attention.backend.Backend`."""
  if not pallas_triton.is_gpu_device():
    return "it needs an NVIDIA GPU; 'xla' runs everywhere"
  if importlib.util.find_spec("jax_triton") is None:
    return "it needs jax-triton: pip install 'lwm[gpu]'"
  if compute_capability() < 80:
    return "it needs an NVIDIA GPU of compute capability 8.0 (Ampere) or later; use 'xla'"
  if query_BxQxHxD.shape[-1] not in HEAD_DIMS:
    return f"it takes head_dim {HEAD_DIMS}, not {query_BxQxHxD.shape[-1]}; 'xla' takes any"
  return None


def compute_capability() -> int:
  """Of the GPU that the program will run on, times ten; 0 if JAX has no name for it."""
  try:
    return pallas_triton.get_gpu_info().compute_capability
  except ValueError:  # Names without "NVIDIA" in front are older than Ampere.
    return 0


TRITON = Backend("triton", unsupported, forward, backward)


def _blocks(kernel: str, query_BxQxHxD, sizes: Mapping[str, Blocks]) -> Blocks:
  if kernel in sizes:
    return sizes[kernel]
  return triton_blocks(kernel, compute_capability(), query_BxQxHxD.shape[-1], query_BxQxHxD.dtype)


def _call(kernel, arrays, sizes, out_type, *, grid, blocks, scale, soft_cap):
  """Launches a kernel; its results vary over the mesh axes that its arguments vary over."""
  import jax_triton

  query_BxQxHxD, key_BxKxGxD = arrays[:2]
  results = jax_triton.triton_call(
    *arrays,
    *sizes,
    kernel=kernel,
    out_type=out_type,
    grid=grid,
    num_warps=blocks.num_warps,
    num_stages=blocks.num_stages,
    backend_options=dict(enable_fp_fusion=True),
    GROUP=query_BxQxHxD.shape[2] // key_BxKxGxD.shape[2],
    HEAD_DIM=query_BxQxHxD.shape[3],
    QUERY_BLOCK=blocks.query,
    KEY_BLOCK=blocks.key,
    SCALE=float(scale),
    SOFT_CAP=None if soft_cap is None else float(soft_cap),
    PRECISION="tf32x3" if query_BxQxHxD.dtype == jnp.float32 else None,
  )
  # jax-triton says nothing of axes of a surrounding shard_map.
  return vary_alike(*arrays, *results)[len(arrays) :]
