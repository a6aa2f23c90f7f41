"""Decode attention for NVIDIA GPUs since Ampere: flash-decoding in Triton through jax-triton.

The cache is read where it lies, layer and all, in as many splits as keep every multiprocessor
loading; what a split returns is merged by log-sum-exp.

L layers, P splits, B batch, Q query length, K cached positions, H query heads, G key/value heads,
D head_dim.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as pallas_triton

from kernels.attention import triton as attention_triton
from kernels.attention.block_sizes_gpu import Blocks, decode_programs, decode_splits, triton_blocks
from kernels.attention.intervals import KeyIntervals
from kernels.attention.merge import weights
from kernels.decode.backend import Backend
from kernels.decode.cache import Cached, Quantized
from kernels.varying import vary_alike

# A matrix instruction takes that many rows at least.
LEAST_ROWS = 16


def partial(
  query_BxQxHxD,
  key_LxBxKxGxD: Cached,
  value_LxBxKxGxD: Cached,
  layer,
  intervals: KeyIntervals,
  *,
  scale: float,
  soft_cap: float | None,
  sizes: Mapping[str, Blocks | int] = {},
):
  """See `kernels.decode.backend.Partial`."""
  import jax_triton  # Triton is there on GPU installs only.

  from kernels.decode import triton_partial

  B, Q, H, D = query_BxQxHxD.shape
  is_quantized = isinstance(key_LxBxKxGxD, Quantized)
  caches = key_LxBxKxGxD, value_LxBxKxGxD
  if is_quantized:
    caches = *(cache.value for cache in caches), *(cache.scale for cache in caches)
  else:
    caches *= 2  # In place of scales, which the kernel does not read.
  K, G = caches[0].shape[2:4]
  blocks, P = _sizes(query_BxQxHxD, key_LxBxKxGxD, sizes)
  rows = min(blocks.query, max(LEAST_ROWS, 1 << (Q * H // G - 1).bit_length()))
  arrays = query_BxQxHxD, *caches, layer.astype(jnp.int32).reshape(1), *intervals
  results = jax_triton.triton_call(
    *arrays,
    Q,
    K,
    G,
    kernel=triton_partial.partial,
    out_type=(
      jax.ShapeDtypeStruct((P, B, Q, H, D), jnp.float32),
      jax.ShapeDtypeStruct((P, B, Q, H), jnp.float32),
    ),
    grid=(G * -(-Q * H // G // rows), P, B),
    num_warps=blocks.num_warps,
    num_stages=blocks.num_stages,
    backend_options=dict(enable_fp_fusion=True),
    GROUP=H // G,
    HEAD_DIM=D,
    ROW_BLOCK=rows,
    KEY_BLOCK=blocks.key,
    IS_QUANTIZED=is_quantized,
    SCALE=float(scale),
    SOFT_CAP=None if soft_cap is None else float(soft_cap),
    PRECISION="tf32x3" if query_BxQxHxD.dtype == jnp.float32 else None,
  )
  # jax-triton says nothing of axes of a surrounding shard_map.
  out_PxBxQxHxD, log_sum_exp_PxBxQxH = vary_alike(*arrays, *results)[len(arrays) :]
  weight_PxBxQxH, log_sum_exp_BxQxH = weights(log_sum_exp_PxBxQxH)
  return jnp.sum(weight_PxBxQxH[..., None] * out_PxBxQxHxD, axis=0), log_sum_exp_BxQxH


def unsupported(query_BxQxHxD, key_LxBxKxGxD: Cached) -> str | None:
  """What stands against Triton here, or None; see `kernels.decode.backend.Backend`."""
  return attention_triton.unsupported(query_BxQxHxD, key_LxBxKxGxD)


TRITON = Backend("triton", unsupported, partial)


def _sizes(query_BxQxHxD, key_LxBxKxGxD: Cached, sizes) -> tuple[Blocks, int]:
  """Blocks and the number of splits."""
  capability = pallas_triton.get_gpu_info().compute_capability
  kernel = "decode_int8" if isinstance(key_LxBxKxGxD, Quantized) else "decode"
  D, dtype = query_BxQxHxD.shape[3], query_BxQxHxD.dtype
  blocks = sizes.get(kernel) or triton_blocks(kernel, capability, D, dtype)
  _, B, K, G = jax.tree.leaves(key_LxBxKxGxD)[0].shape[:4]
  programs = sizes.get("decode_programs") or decode_programs(capability)
  return blocks, decode_splits(programs, B * G, -(-K // blocks.key))
