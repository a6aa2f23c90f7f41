"""The attention backend for TPU v4 and later: Pallas (Mosaic TPU) kernels.

Every grid step owns a query tile (forward, dQ) or a key block (dK, dV), and loops over the blocks
that meet it while it copies them from HBM; see `stream`.

B batch, Q/K query/key length, H query heads, G key/value heads, D head_dim.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from kernels.attention.backend import Backend
from kernels.attention.intervals import KeyIntervals
from kernels.attention.pallas_tpu import (
  backward as backward_kernels,
  forward as forward_kernel,
  parts,
  tiles,
)
from kernels.attention.pallas_tpu.block_sizes import BlockSizes, block_sizes
from kernels.attention.pallas_tpu.tiles import LANES, Tiling, round_up
from kernels.varying import vary_alike

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
  sizes: Mapping[str, BlockSizes] = {},
) -> tuple[jax.Array, jax.Array]:
  """See `kernels.attention.backend.Forward`."""
  tiling = choose_tiling("forward", query_BxQxHxD, key_BxKxGxD, sizes)
  intervals_BxNx2xR = tiles.interval_tiles(intervals, tiling)
  arrays = vary_alike(
    tiles.query_tiles(query_BxQxHxD, tiling),
    tiles.key_blocks(key_BxKxGxD, tiling),
    tiles.key_blocks(value_BxKxGxD, tiling),
    intervals_BxNx2xR,
    tiles.key_spans(intervals_BxNx2xR, tiling),
  )
  out_TxNxDxR, log_sum_exp_TxNx1xR = forward_kernel.forward(
    *arrays, tiling=tiling, scale=scale, soft_cap=soft_cap, out_dtype=out_dtype
  )
  return (
    tiles.from_query_tiles(out_TxNxDxR, tiling),
    tiles.from_query_tiles(log_sum_exp_TxNx1xR, tiling)[..., 0],
  )


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
  sizes: Mapping[str, BlockSizes] = {},
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """See `kernels.attention.backend.Backward`. dQ is one kernel, dK and dV are another."""
  base_2_BxQxH = log_sum_exp_BxQxH * parts.LOG2_E
  out_cotangent_BxQxHxD = out_cotangent_BxQxHxD.astype(query_BxQxHxD.dtype)

  def run(kernel, name):
    tiling = choose_tiling(name, query_BxQxHxD, key_BxKxGxD, sizes)
    intervals_BxNx2xR = tiles.interval_tiles(intervals, tiling)
    arrays = vary_alike(
      tiles.query_tiles(query_BxQxHxD, tiling),
      tiles.key_blocks(key_BxKxGxD, tiling),
      tiles.key_blocks(value_BxKxGxD, tiling),
      tiles.query_tiles(out_cotangent_BxQxHxD, tiling),
      tiles.row_statistics((base_2_BxQxH, delta_BxQxH), tiling),
      intervals_BxNx2xR,
      tiles.key_spans(intervals_BxNx2xR, tiling),
    )
    operands = backward_kernels.Operands(*arrays)
    return kernel(operands, tiling=tiling, scale=scale, soft_cap=soft_cap), tiling

  query_grad_TxNxDxR, tiling = run(backward_kernels.query_grad, "query_grad")
  query_grad_BxQxHxD = tiles.from_query_tiles(query_grad_TxNxDxR, tiling)
  key_grads_TxMxkxD, tiling = run(backward_kernels.key_grads, "key_grads")
  key_grad, value_grad = (tiles.from_key_blocks(grad, tiling) for grad in key_grads_TxMxkxD)
  return query_grad_BxQxHxD, key_grad, value_grad


def choose_tiling(
  kernel: str,
  query_BxQxHxD: jax.Array,
  key_BxKxGxD: jax.Array,
  sizes: Mapping[str, BlockSizes] = {},
) -> Tiling:
  """Equal tiles of at most the given sizes (else the table's), with as many heads as fit a tile."""
  B, Q, H, D = query_BxQxHxD.shape
  K, G = key_BxKxGxD.shape[1:3]
  kind, dtype = parts.device().device_kind, query_BxQxHxD.dtype
  most = sizes.get(kernel) or block_sizes(kernel, kind, D, dtype)
  group, most_heads = H // G, most.rows // LANES
  heads = max(n for n in range(1, group + 1) if group % n == 0 and n <= most_heads)
  queries = min(most.rows // heads // LANES * LANES, most.queries)
  cores = parts.num_cores() if B * H // heads % 2 else 1
  return Tiling(Q, K, H, G, heads, _even(Q, queries), _even(K, most.keys), cores)


def unsupported(query_BxQxHxD: jax.Array, _: Any) -> str | None:
  """Why these kernels do not run here, or None; see `kernels.attention.backend.Backend`."""
  if not pltpu.is_tpu_device():
    return "it needs a TPU; 'xla' runs everywhere"
  if pltpu.get_tpu_info().generation < 4:
    return "it needs a TPU v4 or later; use 'xla'"
  if query_BxQxHxD.dtype == jnp.float16:
    return "TPUs have no float16; use bfloat16 or 'xla'"
  if query_BxQxHxD.shape[-1] not in HEAD_DIMS:
    return f"it takes head_dim {HEAD_DIMS}, not {query_BxQxHxD.shape[-1]}; use 'xla'"
  return None


PALLAS_TPU = Backend("pallas_tpu", unsupported, forward, backward)


def _even(length: int, most: int) -> int:
  """The smallest multiple of LANES that divides `length` into as few blocks as `most` does."""
  return round_up(-(-length // -(-length // most)), LANES)
