"""The decode backend for NVIDIA GPUs since Ampere: flash-decoding in Triton, through jax-triton.

The kernel reads one layer of the cache in place, in as many splits as keep every multiprocessor
loading. The results of the splits are merged by log-sum-exp.

L layers, P splits, B batch, Q query length, K cached positions, H query heads, G key/value heads,
D head_dim.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from kernels.attention.intervals import KeyIntervals
from kernels.attention.merge import weights
from kernels.attention.triton import backend as attention_backend
from kernels.attention.triton.block_sizes import Blocks, blocks_for, decode_programs, decode_splits
from kernels.decode.backend import Backend
from kernels.decode.cache import Cached, Quantized
from kernels.nvidia import compute_capability

# The fewest rows of a matrix instruction.
LEAST_ROWS = 16


def partial(
  query_BxQxHxD: jax.Array,
  key_LxBxKxGxD: Cached,
  value_LxBxKxGxD: Cached,
  layer: jax.Array,
  intervals: KeyIntervals,
  *,
  scale: float,
  soft_cap: float | None,
  sizes: Mapping[str, Any] = {},
) -> tuple[jax.Array, jax.Array]:
  """See `kernels.decode.backend.Partial`."""
  from kernels.decode.triton import kernel  # Only GPU installs have Triton.

  B, Q, H, D = query_BxQxHxD.shape
  is_quantized = isinstance(key_LxBxKxGxD, Quantized)
  # The kernel reads the scales only of quantized caches; others take their places.
  both = jax.tree.leaves(key_LxBxKxGxD), jax.tree.leaves(value_LxBxKxGxD)
  caches = [leaves[i] for i in (0, -1) for leaves in both]
  K, G = caches[0].shape[2:4]
  blocks, P = _sizes(query_BxQxHxD, key_LxBxKxGxD, sizes)
  rows = min(blocks.query, max(LEAST_ROWS, 1 << (Q * H // G - 1).bit_length()))
  arrays = query_BxQxHxD, *caches, layer.astype(jnp.int32).reshape(1), *intervals
  out_PxBxQxHxD, log_sum_exp_PxBxQxH = attention_backend.call(
    kernel.partial,
    arrays,
    (Q, K, G),
    (
      jax.ShapeDtypeStruct((P, B, Q, H, D), jnp.float32),
      jax.ShapeDtypeStruct((P, B, Q, H), jnp.float32),
    ),
    grid=(G * -(-Q * H // G // rows), P, B),
    blocks=blocks,
    group=H // G,
    scale=scale,
    soft_cap=soft_cap,
    ROW_BLOCK=rows,
    IS_QUANTIZED=is_quantized,
  )
  weight_PxBxQxH, log_sum_exp_BxQxH = weights(log_sum_exp_PxBxQxH)
  return jnp.sum(weight_PxBxQxH[..., None] * out_PxBxQxHxD, axis=0), log_sum_exp_BxQxH


def unsupported(query_BxQxHxD: jax.Array, key_LxBxKxGxD: Any) -> str | None:
  """Why Triton does not run here, or None; see `kernels.decode.backend.Backend`."""
  return attention_backend.unsupported(query_BxQxHxD, key_LxBxKxGxD)


TRITON = Backend("triton", unsupported, partial)


def _sizes(query_BxQxHxD, key_LxBxKxGxD: Cached, sizes) -> tuple[Blocks, int]:
  """Block sizes, and the number of splits."""
  capability = compute_capability()
  kernel = "decode_int8" if isinstance(key_LxBxKxGxD, Quantized) else "decode"
  D, dtype = query_BxQxHxD.shape[3], query_BxQxHxD.dtype
  blocks = sizes.get(kernel) or blocks_for(kernel, capability, D, dtype)
  _, B, K, G = jax.tree.leaves(key_LxBxKxGxD)[0].shape[:4]
  programs = sizes.get("decode_programs") or decode_programs(capability)
  return blocks, decode_splits(programs, B * G, -(-K // blocks.key))
