"""Attention over key intervals for TPU v4 and later: Pallas (Mosaic) kernels.

Every grid step owns a query tile (forward, dQ) or a key block (dK, dV) and loops over the blocks
that meet it, copying them from HBM as it goes; see `pallas_tpu_stream`.

B batch, Q/K query/key length, H query heads, G key/value heads, D head_dim.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from kernels.attention import pallas_tpu_backward, pallas_tpu_forward, pallas_tpu_tiles as tiles
from kernels.attention.backend import Backend
from kernels.attention.block_sizes_tpu import BlockSizes, block_sizes, vmem_bytes
from kernels.attention.intervals import KeyIntervals
from kernels.attention.pallas_tpu_tiles import LANES, Tiling, round_up
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
  sizes: Mapping[str, BlockSizes] = {},
):
  """See `kernels.attention.backend.Forward`."""
  tiling = choose_tiling("forward", query_BxQxHxD, key_BxKxGxD, sizes)
  intervals_BxNx2xR = tiles.interval_tiles(intervals, tiling)
  out_TxNxDxR, log_sum_exp_TxNx1xR = pallas_tpu_forward.forward(
    *vary_alike(
      tiles.query_tiles(query_BxQxHxD, tiling),
      tiles.key_blocks(key_BxKxGxD, tiling),
      tiles.key_blocks(value_BxKxGxD, tiling),
      intervals_BxNx2xR,
      tiles.key_spans(intervals_BxNx2xR, tiling),
    ),
    tiling,
    scale=scale,
    soft_cap=soft_cap,
    out_dtype=out_dtype,
    vmem_limit=vmem_bytes(device().device_kind),
  )
  return (
    tiles.from_query_tiles(out_TxNxDxR, tiling),
    tiles.from_query_tiles(log_sum_exp_TxNx1xR, tiling)[..., 0],
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
  sizes: Mapping[str, BlockSizes] = {},
):
  """See `kernels.attention.backend.Backward`; dQ is one kernel, dK and dV are another."""
  is_empty_BxQxH = log_sum_exp_BxQxH == -jnp.inf
  base_2_BxQxH = jnp.where(is_empty_BxQxH, jnp.inf, log_sum_exp_BxQxH * pallas_tpu_forward.LOG2_E)
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
    vmem_limit = vmem_bytes(device().device_kind)
    grads = kernel(*arrays, tiling, scale=scale, soft_cap=soft_cap, vmem_limit=vmem_limit)
    return grads, tiling

  query_grad_TxNxDxR, tiling = run(pallas_tpu_backward.query_grad, "query_grad")
  query_grad_BxQxHxD = tiles.from_query_tiles(query_grad_TxNxDxR, tiling)
  key_grads_TxMxkxD, tiling = run(pallas_tpu_backward.key_grads, "key_grads")
  return query_grad_BxQxHxD, *(tiles.from_key_blocks(grad, tiling) for grad in key_grads_TxMxkxD)


def choose_tiling(
  kernel: str,
  query_BxQxHxD: jax.Array,
  key_BxKxGxD: jax.Array,
  sizes: Mapping[str, BlockSizes] = {},
) -> Tiling:
  """Equal tiles of at most those sizes, or the table's; as many heads to a tile as fit its rows."""
  B, Q, H, D = query_BxQxHxD.shape
  K, G = key_BxKxGxD.shape[1:3]
  kind, dtype = device().device_kind, query_BxQxHxD.dtype
  sizes = sizes.get(kernel) or block_sizes(kernel, kind, D, dtype)
  group, most_heads = H // G, sizes.rows // LANES
  heads = max(n for n in range(1, group + 1) if group % n == 0 and n <= most_heads)
  queries = min(sizes.rows // heads // LANES * LANES, sizes.queries)
  cores = num_cores() if B * H // heads % 2 else 1
  return Tiling(Q, K, H, G, heads, _even(Q, queries), _even(K, sizes.keys), cores)


def unsupported(query_BxQxHxD, key_BxKxGxD) -> str | None:
  """What stands against these kernels here, or None; see `kernels.attention.backend.Backend`."""
  if not pltpu.is_tpu_device():
    return "it needs a TPU; 'xla' runs everywhere"
  if pltpu.get_tpu_info().generation < 4:
    return "it needs a TPU v4 or later; use 'xla'"
  if query_BxQxHxD.dtype == jnp.float16:
    return "TPUs have no float16; use bfloat16 or 'xla'"
  if query_BxQxHxD.shape[-1] not in HEAD_DIMS:
    return f"head_dim {query_BxQxHxD.shape[-1]} is none of {HEAD_DIMS}; use 'xla'"
  return None


PALLAS_TPU = Backend("pallas_tpu", unsupported, forward, backward)


def _even(length: int, most: int) -> int:
  """The smallest multiple of a vector register's lanes that cuts `length` into as few blocks."""
  return round_up(-(-length // -(-length // most)), LANES)


def device():
  """What the program will run on: the mesh's devices (also ahead of time), else the default."""
  return jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]


def num_cores() -> int:
  """TensorCores that share a device's kernels: two on v4 and v5p. Other platforms do not say."""
  return getattr(device(), "num_cores", None) or 1
