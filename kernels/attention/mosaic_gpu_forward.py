"""Attention over key intervals on Hopper: the forward kernel (Pallas, Mosaic GPU).

A block of the grid has three warpgroups. Two compute, each for 64 of the tile's 128 queries; the
third streams blocks of keys and values into shared memory (TMA) ahead of them, and only those
that meet an interval of the tile: the ones that a boundary crosses first, with a mask, then those
inside every interval, without. The two take turns, so that one's softmax runs under the other's
matrix products (FlashAttention-3, arXiv 2407.08608; the structure follows JAX's attention_mgpu).

B batch, Q/K query/key length, H query heads, G = H / R key/value heads, D head_dim, N tiles;
q/k queries of a warpgroup / keys of a block. Q and K are whole tiles and blocks.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.attention.mosaic_gpu_parts import (
  COMPUTE_REGISTERS,
  COMPUTE_WARPGROUPS,
  LOWEST,
  MATRIX,
  ROWS,
  STREAM_REGISTERS,
  TILE,
  WARPGROUP_ROWS,
  Steps,
  accumulate,
  along_rows,
  base_2_scores,
  launch,
  products,
  seen,
  tiled_memory,
)


def forward(
  query_BxQxHxD,
  key_BxKxGxD,
  value_BxKxGxD,
  start_BxQ,
  stop_BxQ,
  tables_Bx4xN,
  *,
  k: int,
  slots: int,
  scale: float,
  soft_cap: float | None,
  out_dtype: jnp.dtype,
):
  """Returns out [B, Q, H, D] and log-sum-exp [B, H, Q] float32."""
  B, Q, H, D = query_BxQxHxD.shape
  R = H // key_BxKxGxD.shape[2]
  dtype = query_BxQxHxD.dtype
  q = WARPGROUP_ROWS

  def kernel(query, key, value, start, stop, tables, out, log_sum_exp, *scratch):
    query_2xqxD, keys, values, query_barriers, filled, consumed, turn = scratch
    batch, head = lax.axis_index("batch"), lax.axis_index("head")
    tile = Q // TILE - 1 - lax.axis_index("tile")  # The longest first, under a causal mask.
    steps = Steps(tables, batch, tile)
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup < COMPUTE_WARPGROUPS)
    def _compute():
      plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
      rows = pl.ds(tile * TILE + warpgroup * q, q)
      query_qxD = query_2xqxD.at[warpgroup]
      query_barrier = query_barriers.at[warpgroup]
      plgpu.copy_gmem_to_smem(query.at[batch, rows, head], query_qxD, query_barrier)
      start_q = plgpu.load(start.at[batch, rows], layout=ROWS, optimized=False)
      stop_q = plgpu.load(stop.at[batch, rows], layout=ROWS, optimized=False)
      plgpu.barrier_wait(query_barrier)

      def take_turn():
        plgpu.barrier_arrive(turn)
        plgpu.barrier_wait(turn)

      def step(index, carry, is_full):
        out_qxD, maximum_q, sum_q = carry
        slot = lax.rem(index, slots)
        plgpu.barrier_wait(filled[0].at[slot])
        key_Dxk = keys.at[slot].transpose((1, 0))
        (products_qxk,) = products((query_qxD, key_Dxk), after=take_turn)
        plgpu.barrier_arrive(consumed[0].at[slot])
        scores_qxk, _ = base_2_scores(products_qxk, scale, soft_cap)
        if not is_full:
          is_seen_qxk = seen(start_q, stop_q, steps.block(index) * k, (q, k), key_axis=1)
          scores_qxk = jnp.where(is_seen_qxk, scores_qxk, -jnp.inf)
        new_maximum_q = jnp.maximum(maximum_q, scores_qxk.max(axis=1))
        decay_q = jnp.exp2(maximum_q - new_maximum_q)
        weights_qxk = jnp.exp2(scores_qxk - along_rows(new_maximum_q, (q, k)))
        out_qxD *= along_rows(decay_q, (q, D))
        sum_q = sum_q * decay_q + weights_qxk.sum(axis=1)
        weights_qxk = weights_qxk.astype(dtype)
        plgpu.barrier_arrive(turn)
        plgpu.barrier_wait(filled[1].at[slot])
        plgpu.barrier_wait(turn)
        (out_qxD,) = accumulate((out_qxD, weights_qxk, values.at[slot]))
        plgpu.barrier_arrive(consumed[1].at[slot])
        return out_qxD, new_maximum_q, sum_q

      carry = (
        plgpu.layout_cast(jnp.zeros((q, D), jnp.float32), MATRIX),
        plgpu.layout_cast(jnp.full((q,), LOWEST, jnp.float32), ROWS),
        plgpu.layout_cast(jnp.zeros((q,), jnp.float32), ROWS),
      )
      pl.when(warpgroup == 1)(take_turn)
      carry = lax.fori_loop(0, steps.num_crossed, functools.partial(step, is_full=False), carry)
      carry = lax.fori_loop(
        steps.num_crossed, steps.num, functools.partial(step, is_full=True), carry
      )
      pl.when(warpgroup == 0)(take_turn)

      out_qxD, maximum_q, sum_q = carry
      # A row with an empty interval has gone through the full blocks of its neighbours.
      is_empty_q = stop_q <= start_q
      sum_q = jnp.where(is_empty_q, 1.0, sum_q)
      inverse_q = jnp.where(is_empty_q, 0.0, 1 / sum_q)
      out[batch, rows, head] = (out_qxD * along_rows(inverse_q, (q, D))).astype(out_dtype)
      natural_q = maximum_q * math.log(2) + jnp.log(sum_q)
      log_sum_exp[batch, head, rows] = jnp.where(is_empty_q, -jnp.inf, natural_q)

    @pl.when(warpgroup == COMPUTE_WARPGROUPS)
    def _stream():
      plgpu.set_max_registers(STREAM_REGISTERS, action="decrease")

      @pl.loop(0, steps.num + slots)
      def _(index):
        slot = lax.rem(index, slots)
        block = batch, pl.ds(steps.block(index) * k, k), lax.div(head, R)
        for i, (source, target) in enumerate(((key, keys), (value, values))):
          pl.when(index >= slots)(lambda: plgpu.barrier_wait(consumed[i].at[slot]))

          @pl.when(index < steps.num)
          def _():
            plgpu.copy_gmem_to_smem(source.at[block], target.at[slot], filled[i].at[slot])

  return launch(
    kernel,
    (
      jax.ShapeDtypeStruct(query_BxQxHxD.shape, out_dtype),
      jax.ShapeDtypeStruct((B, H, Q), jnp.float32),
    ),
    (
      tiled_memory((COMPUTE_WARPGROUPS, q, D), dtype, k),
      tiled_memory((slots, k, D), dtype, k),
      tiled_memory((slots, k, D), dtype, k),
      plgpu.Barrier(num_barriers=COMPUTE_WARPGROUPS),
      2 * (plgpu.Barrier(num_barriers=slots),),
      2 * (plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=slots),),
      plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS),
    ),
    (H, Q // TILE, B),
  )(query_BxQxHxD, key_BxKxGxD, value_BxKxGxD, start_BxQ, stop_BxQ, tables_Bx4xN)
