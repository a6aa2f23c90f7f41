"""The attention forward kernel for Hopper (Pallas, Mosaic GPU).

A block of the grid has three warpgroups. Two compute, each for 64 of the tile's 128 queries. The
third streams blocks of keys and values into shared memory (TMA) ahead of them, and only those that
meet an interval of the tile: first those that need a mask, then the full ones. The computing
warpgroups take turns, so that the softmax of one overlaps with the matrix products of the other
(FlashAttention-3, arXiv 2407.08608; the structure follows JAX's attention_mgpu).

B batch, Q/K query/key length, H query heads, G = H / R key/value heads, D head_dim, N tiles,
q queries per warpgroup, k keys per block. Q and K are multiples of the tile and of the blocks.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.attention.mosaic_gpu import parts


def forward(
  query_BxQxHxD: jax.Array,
  key_BxKxGxD: jax.Array,
  value_BxKxGxD: jax.Array,
  start_BxQ: jax.Array,
  stop_BxQ: jax.Array,
  tables_Bx4xN: jax.Array,
  *,
  k: int,
  slots: int,
  scale: float,
  soft_cap: float | None,
  out_dtype: jnp.dtype,
) -> tuple[jax.Array, jax.Array]:
  """Returns out [B, Q, H, D] and log_sum_exp [B, H, Q] float32.

  `slots` key blocks are in flight. `tables_Bx4xN` is `block_tables.of_queries` for tiles and blocks
  of `k` keys.
  """
  B, Q, H, D = query_BxQxHxD.shape
  R = H // key_BxKxGxD.shape[2]
  dtype = query_BxQxHxD.dtype
  q = parts.WARPGROUP_ROWS

  def kernel(query, key, value, start, stop, tables, out, log_sum_exp, *scratch):
    query_2xqxD, keys, values, query_barriers, filled, consumed, turn = scratch
    batch, head = lax.axis_index("batch"), lax.axis_index("head")
    # The last tile first: a causal mask gives it the most work.
    tile = Q // parts.TILE - 1 - lax.axis_index("tile")
    steps = parts.Steps(tables, batch, tile)
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup < parts.COMPUTE_WARPGROUPS)
    def _compute():
      plgpu.set_max_registers(parts.COMPUTE_REGISTERS, action="increase")
      rows = pl.ds(tile * parts.TILE + warpgroup * q, q)
      query_qxD = query_2xqxD.at[warpgroup]
      query_barrier = query_barriers.at[warpgroup]
      plgpu.copy_gmem_to_smem(query.at[batch, rows, head], query_qxD, query_barrier)
      start_q = plgpu.load(start.at[batch, rows], layout=parts.ROWS, optimized=False)
      stop_q = plgpu.load(stop.at[batch, rows], layout=parts.ROWS, optimized=False)
      plgpu.barrier_wait(query_barrier)

      def take_turn():
        plgpu.barrier_arrive(turn)
        plgpu.barrier_wait(turn)

      def step(index, carry, is_full):
        out_qxD, maximum_q, sum_q = carry
        slot = lax.rem(index, slots)
        plgpu.barrier_wait(filled[0].at[slot])
        key_Dxk = keys.at[slot].transpose((1, 0))
        (products_qxk,) = parts.products((query_qxD, key_Dxk), after=take_turn)
        plgpu.barrier_arrive(consumed[0].at[slot])
        scores_qxk, _ = parts.base_2_scores(products_qxk, scale, soft_cap)
        if not is_full:
          is_seen_qxk = parts.seen(start_q, stop_q, steps.block(index) * k, (q, k), key_axis=1)
          scores_qxk = jnp.where(is_seen_qxk, scores_qxk, -jnp.inf)
        new_maximum_q = jnp.maximum(maximum_q, scores_qxk.max(axis=1))
        decay_q = jnp.exp2(maximum_q - new_maximum_q)
        weights_qxk = jnp.exp2(scores_qxk - parts.along_rows(new_maximum_q, (q, k)))
        out_qxD *= parts.along_rows(decay_q, (q, D))
        sum_q = sum_q * decay_q + weights_qxk.sum(axis=1)
        weights_qxk = weights_qxk.astype(dtype)
        plgpu.barrier_arrive(turn)
        plgpu.barrier_wait(filled[1].at[slot])
        plgpu.barrier_wait(turn)
        (out_qxD,) = parts.accumulate((out_qxD, weights_qxk, values.at[slot]))
        plgpu.barrier_arrive(consumed[1].at[slot])
        return out_qxD, new_maximum_q, sum_q

      carry = (
        plgpu.layout_cast(jnp.zeros((q, D), jnp.float32), parts.MATRIX),
        plgpu.layout_cast(jnp.full((q,), parts.LOWEST, jnp.float32), parts.ROWS),
        plgpu.layout_cast(jnp.zeros((q,), jnp.float32), parts.ROWS),
      )
      pl.when(warpgroup == 1)(take_turn)
      carry = steps.fold(step, carry)
      pl.when(warpgroup == 0)(take_turn)

      out_qxD, maximum_q, sum_q = carry
      # Rows with an empty interval have collected the full blocks of their neighbours.
      is_empty_q = stop_q <= start_q
      sum_q = jnp.where(is_empty_q, 1.0, sum_q)
      inverse_q = jnp.where(is_empty_q, 0.0, 1 / sum_q)
      out[batch, rows, head] = (out_qxD * parts.along_rows(inverse_q, (q, D))).astype(out_dtype)
      natural_q = maximum_q * math.log(2) + jnp.log(sum_q)
      log_sum_exp[batch, head, rows] = jnp.where(is_empty_q, -jnp.inf, natural_q)

    @pl.when(warpgroup == parts.COMPUTE_WARPGROUPS)
    def _stream():
      def copies(index):
        block = batch, pl.ds(steps.block(index) * k, k), lax.div(head, R)
        return [(key.at[block], keys)], [(value.at[block], values)]

      parts.stream(steps.num, slots, copies, filled, consumed)

  return parts.launch(
    kernel,
    (
      jax.ShapeDtypeStruct(query_BxQxHxD.shape, out_dtype),
      jax.ShapeDtypeStruct((B, H, Q), jnp.float32),
    ),
    (
      parts.tiled_memory((parts.COMPUTE_WARPGROUPS, q, D), dtype, k),
      parts.tiled_memory((slots, k, D), dtype, k),
      parts.tiled_memory((slots, k, D), dtype, k),
      plgpu.Barrier(num_barriers=parts.COMPUTE_WARPGROUPS),
      2 * (plgpu.Barrier(num_barriers=slots),),
      2 * (plgpu.Barrier(num_arrivals=parts.COMPUTE_WARPGROUPS, num_barriers=slots),),
      plgpu.Barrier(num_arrivals=parts.COMPUTE_WARPGROUPS),
    ),
    (H, Q // parts.TILE, B),
  )(query_BxQxHxD, key_BxKxGxD, value_BxKxGxD, start_BxQ, stop_BxQ, tables_Bx4xN)
