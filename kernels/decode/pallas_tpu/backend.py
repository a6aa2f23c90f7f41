"""The decode backend for TPU v4 and later: one Pallas (Mosaic TPU) kernel, with no cache copies.

L layers, B batch, Q query length, K cached positions, H query heads, G key/value heads, D head_dim,
R rows of queries (Q * H and padding), k positions per block, C cores.
"""

from typing import Any

import jax
import jax.numpy as jnp

from kernels.attention import block_tables
from kernels.attention.intervals import KeyIntervals
from kernels.attention.merge import merge
from kernels.attention.pallas_tpu import backend as attention_backend
from kernels.attention.pallas_tpu.block_sizes import DECODE_BLOCK_BYTES
from kernels.decode.backend import Backend
from kernels.decode.cache import STRETCH, Cached, cache_length
from kernels.decode.pallas_tpu import kernel
from kernels.decode.pallas_tpu.layouts import layout_of, view

# Scores per block. The kernel unrolls their computation, so more take longer to compile; beyond the
# maximum, XLA is the better choice.
BLOCK_SCORES = 2**18
MOST_SCORES = 2**21


def partial(
  query_BxQxHxD: jax.Array,
  key_LxBxKxGxD: Cached,
  value_LxBxKxGxD: Cached,
  layer: jax.Array,
  intervals: KeyIntervals,
  *,
  scale: float,
  soft_cap: float | None,
) -> tuple[jax.Array, jax.Array]:
  """See `kernels.decode.backend.Partial`."""
  B, Q, H, _ = query_BxQxHxD.shape
  K, k = cache_length(key_LxBxKxGxD), block_positions(key_LxBxKxGxD, Q, H)
  layout = layout_of(key_LxBxKxGxD)
  assert layout is not None  # `unsupported` refuses such caches.
  group_H = jnp.arange(H, dtype=jnp.int32) // (H // layout.num_key_heads)
  facts = (*(bound_BxQ[..., None] for bound_BxQ in intervals), group_H[None, None])
  facts_BxQxHx3 = jnp.stack([jnp.broadcast_to(fact, (B, Q, H)) for fact in facts], axis=3)
  # The kernel relies on the mask for rows that see nothing.
  tables_Bx4x1 = block_tables.of_queries(intervals, K, Q, k, full_with_empty_rows=False)
  out_CxBxRxD, log_sum_exp_CxBxRx1 = kernel.partial(
    layout.query_rows(query_BxQxHxD),
    view(key_LxBxKxGxD, layout),
    view(value_LxBxKxGxD, layout),
    layout.query_rows(facts_BxQxHx3),
    jnp.concatenate([tables_Bx4x1.reshape(-1), layer[None]]),
    layout=layout,
    positions=k,
    length=K,
    scale=scale,
    soft_cap=soft_cap,
  )
  per_core = [
    (
      layout.from_query_rows(out_BxRxD, Q, H),
      layout.from_query_rows(log_sum_exp_BxRx1, Q, H)[..., 0],
    )
    for out_BxRxD, log_sum_exp_BxRx1 in zip(out_CxBxRxD, log_sum_exp_CxBxRx1)
  ]
  return per_core[0] if len(per_core) == 1 else merge(per_core)


def block_positions(key_LxBxKxGxD: Cached, Q: int, H: int) -> int:
  """Positions per block, a multiple of STRETCH."""
  num_bytes, num_scores = _stretch_costs(key_LxBxKxGxD, Q, H)
  fit = min(DECODE_BLOCK_BYTES // num_bytes, BLOCK_SCORES // num_scores)
  return min(cache_length(key_LxBxKxGxD), max(fit, 1) * STRETCH)


def unsupported(query_BxQxHxD: jax.Array, key_LxBxKxGxD: Any) -> str | None:
  """Why this kernel does not run here, or None; see `kernels.decode.backend.Backend`."""
  numbers = jax.tree.leaves(key_LxBxKxGxD)[0]
  K, G, D = numbers.shape[2:]
  reason = attention_backend.unsupported(query_BxQxHxD, key_LxBxKxGxD)
  if reason is not None:
    return reason
  if K % STRETCH:
    return f"{K} cached positions are not a multiple of {STRETCH}; allocate more or use 'xla'"
  if layout_of(key_LxBxKxGxD) is None:
    return f"it would copy a cache of {G} {numbers.dtype} heads of {D}; use 'xla'"
  num_bytes, num_scores = _stretch_costs(key_LxBxKxGxD, *query_BxQxHxD.shape[1:3])
  shares = query_BxQxHxD.dtype.itemsize // 2  # float32 products take several registers.
  if num_bytes * shares > 2 * DECODE_BLOCK_BYTES or num_scores * shares > MOST_SCORES:
    return f"{G} key heads on one device overflow its vector memory; shard them or use 'xla'"
  return None


def _stretch_costs(key_LxBxKxGxD: Cached, Q: int, H: int) -> tuple[int, int]:
  """Bytes of keys, and number of scores, per STRETCH positions, the smallest block."""
  numbers, layout = jax.tree.leaves(key_LxBxKxGxD)[0], layout_of(key_LxBxKxGxD)
  assert layout is not None
  G, D = numbers.shape[3:]
  scores = sum(
    (piece.rows.stop - piece.rows.start) * (piece.columns.stop - piece.columns.start)
    for piece in layout.pieces(layout.num_rows(Q, H), STRETCH)
  )
  return STRETCH * G * D * numbers.dtype.itemsize, scores


PALLAS_TPU = Backend("pallas_tpu", unsupported, partial)
