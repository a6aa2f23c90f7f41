"""Attention over key intervals on Hopper: gradients of query, and of key and value (Mosaic GPU).

Two warpgroups compute, each for 64 queries (query's gradient) or keys (key's and value's), and
a third streams the blocks of the other side that meet an interval into shared memory, as in
`mosaic_gpu_forward`. With p = exp(score - log_sum_exp) and ds = p * (dp - delta): dvalue = p^T
dout, dkey = ds^T query, dquery = ds key (arXiv 2205.14135, 2407.08608). Nothing is added
atomically, so gradients are the same in every run.

B batch, Q/K query/key length, H query heads, G = H / R key/value heads, D head_dim, N/M tiles of
queries/keys; q/k queries/keys of a warpgroup or a block. Q and K are whole tiles and blocks.
log_sum_exp comes in units of log2, and as +inf for queries with an empty interval.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.attention.mosaic_gpu_parts import (
  COLUMNS,
  COMPUTE_REGISTERS,
  COMPUTE_WARPGROUPS,
  MATRIX,
  ROWS,
  STREAM_REGISTERS,
  TILE,
  WARPGROUP_ROWS,
  Steps,
  accumulate,
  along_columns,
  along_rows,
  base_2_scores,
  launch,
  products,
  seen,
  tiled_memory,
)


def query_grad(
  query_BxQxHxD,
  key_BxKxGxD,
  value_BxKxGxD,
  start_BxQ,
  stop_BxQ,
  out_cotangent_BxQxHxD,
  log_sum_exp_BxHxQ,
  delta_BxHxQ,
  tables_Bx4xN,
  *,
  k: int,
  slots: int,
  scale: float,
  soft_cap: float | None,
):
  """Returns the cotangent of the query [B, Q, H, D] in float32; key blocks have `k` keys."""
  B, Q, H, D = query_BxQxHxD.shape
  R = H // key_BxKxGxD.shape[2]
  dtype = query_BxQxHxD.dtype
  q = WARPGROUP_ROWS

  def kernel(
    query, key, value, start, stop, out_cotangent, log_sum_exp, delta, tables, grad, *scratch
  ):
    own_query, own_cotangent, keys, values, ready, filled, consumed = scratch
    batch, head = lax.axis_index("batch"), lax.axis_index("head")
    tile = Q // TILE - 1 - lax.axis_index("tile")  # The longest first, under a causal mask.
    steps = Steps(tables, batch, tile)
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup < COMPUTE_WARPGROUPS)
    def _compute():
      plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
      rows = pl.ds(tile * TILE + warpgroup * q, q)
      query_qxD, cotangent_qxD = own_query.at[warpgroup], own_cotangent.at[warpgroup]
      is_ready = ready.at[warpgroup]
      plgpu.copy_gmem_to_smem(query.at[batch, rows, head], query_qxD, is_ready)
      plgpu.copy_gmem_to_smem(out_cotangent.at[batch, rows, head], cotangent_qxD, is_ready)
      start_q, stop_q = (
        plgpu.load(array.at[batch, rows], layout=ROWS, optimized=False) for array in (start, stop)
      )
      log_sum_exp_q, delta_q = (
        plgpu.load(array.at[batch, head, rows], layout=ROWS, optimized=False)
        for array in (log_sum_exp, delta)
      )
      plgpu.barrier_wait(is_ready)

      def step(index, grad_qxD, is_full):
        slot = lax.rem(index, slots)
        key_kxD, value_kxD = keys.at[slot], values.at[slot]
        plgpu.barrier_wait(filled.at[slot])
        products_qxk, weights_grad_qxk = products(
          (query_qxD, key_kxD.transpose((1, 0))), (cotangent_qxD, value_kxD.transpose((1, 0)))
        )
        scores_qxk, slope_qxk = base_2_scores(products_qxk, scale, soft_cap)
        weights_qxk = jnp.exp2(scores_qxk - along_rows(log_sum_exp_q, (q, k)))
        if not is_full:
          first_key = steps.block(index) * k
          is_seen_qxk = seen(start_q, stop_q, first_key, (q, k), key_axis=1)
          weights_qxk = jnp.where(is_seen_qxk, weights_qxk, 0.0)
        scores_grad_qxk = weights_qxk * (weights_grad_qxk - along_rows(delta_q, (q, k))) * slope_qxk
        (grad_qxD,) = accumulate((grad_qxD, scores_grad_qxk.astype(dtype), key_kxD))
        plgpu.barrier_arrive(consumed.at[slot])
        return grad_qxD

      grad_qxD = plgpu.layout_cast(jnp.zeros((q, D), jnp.float32), MATRIX)
      crossed, full = (functools.partial(step, is_full=is_full) for is_full in (False, True))
      grad_qxD = lax.fori_loop(0, steps.num_crossed, crossed, grad_qxD)
      grad_qxD = lax.fori_loop(steps.num_crossed, steps.num, full, grad_qxD)
      grad[batch, rows, head] = grad_qxD * scale

    @pl.when(warpgroup == COMPUTE_WARPGROUPS)
    def _stream():
      plgpu.set_max_registers(STREAM_REGISTERS, action="decrease")

      @pl.loop(0, steps.num + slots)
      def _(index):
        slot = lax.rem(index, slots)
        pl.when(index >= slots)(lambda: plgpu.barrier_wait(consumed.at[slot]))

        @pl.when(index < steps.num)
        def _():
          block = batch, pl.ds(steps.block(index) * k, k), lax.div(head, R)
          plgpu.copy_gmem_to_smem(key.at[block], keys.at[slot], filled.at[slot])
          plgpu.copy_gmem_to_smem(value.at[block], values.at[slot], filled.at[slot])

  return launch(
    kernel,
    jax.ShapeDtypeStruct(query_BxQxHxD.shape, jnp.float32),
    (
      tiled_memory((COMPUTE_WARPGROUPS, q, D), dtype, k),
      tiled_memory((COMPUTE_WARPGROUPS, q, D), dtype, k),
      tiled_memory((slots, k, D), dtype, k),
      tiled_memory((slots, k, D), dtype, k),
      plgpu.Barrier(num_arrivals=2, num_barriers=COMPUTE_WARPGROUPS),
      plgpu.Barrier(num_arrivals=2, num_barriers=slots),
      plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=slots),
    ),
    (H, Q // TILE, B),
  )(
    query_BxQxHxD,
    key_BxKxGxD,
    value_BxKxGxD,
    start_BxQ,
    stop_BxQ,
    out_cotangent_BxQxHxD,
    log_sum_exp_BxHxQ,
    delta_BxHxQ,
    tables_Bx4xN,
  )


def key_value_grads(
  query_BxQxHxD,
  key_BxKxGxD,
  value_BxKxGxD,
  start_BxQ,
  stop_BxQ,
  out_cotangent_BxQxHxD,
  log_sum_exp_BxHxQ,
  delta_BxHxQ,
  tables_Bx4xM,
  *,
  wanted: tuple[str, ...],
  q: int,
  slots: int,
  scale: float,
  soft_cap: float | None,
):
  """Returns the cotangents of those `wanted` of "key" and "value", float32.

  Query blocks have `q` queries. At head_dim 256 the registers hold one of the two: two passes.
  """
  B, K, G, D = key_BxKxGxD.shape
  R = query_BxQxHxD.shape[2] // G
  dtype = query_BxQxHxD.dtype
  k = WARPGROUP_ROWS

  def kernel(
    query, key, value, start, stop, out_cotangent, log_sum_exp, delta, tables, *outputs_and_scratch
  ):
    outputs = dict(zip(wanted, outputs_and_scratch))
    scratch = outputs_and_scratch[len(wanted) :]
    own_key, own_value, queries, cotangents, *vectors, ready, filled, consumed = scratch
    batch, kv_head = lax.axis_index("batch"), lax.axis_index("head")
    tile = lax.axis_index("tile")
    steps = Steps(tables, batch, tile, repeats=R)
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup < COMPUTE_WARPGROUPS)
    def _compute():
      plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
      first_key = tile * TILE + warpgroup * k
      rows = batch, pl.ds(first_key, k), kv_head
      key_kxD, value_kxD = own_key.at[warpgroup], own_value.at[warpgroup]
      is_ready = ready.at[warpgroup]
      plgpu.copy_gmem_to_smem(key.at[rows], key_kxD, is_ready)
      plgpu.copy_gmem_to_smem(value.at[rows], value_kxD, is_ready)
      plgpu.barrier_wait(is_ready)

      def step(index, grads, is_full):
        slot = lax.rem(index, slots)
        query_qxD, cotangent_qxD = queries.at[slot], cotangents.at[slot]
        plgpu.barrier_wait(filled.at[slot])
        # Keys come first, so that weights and score gradients are left operands as they are.
        pairs = [(key_kxD, query_qxD.transpose((1, 0)))]
        if "key" in wanted:
          pairs.append((value_kxD, cotangent_qxD.transpose((1, 0))))
        products_kxq, *weights_grad_kxq = products(*pairs)
        start_q, stop_q, log_sum_exp_q, delta_q = (
          plgpu.load(vector.at[slot], layout=COLUMNS) for vector in vectors
        )
        scores_kxq, slope_kxq = base_2_scores(products_kxq, scale, soft_cap)
        weights_kxq = jnp.exp2(scores_kxq - along_columns(log_sum_exp_q, (k, q)))
        if not is_full:
          is_seen_kxq = seen(start_q, stop_q, first_key, (k, q), key_axis=0)
          weights_kxq = jnp.where(is_seen_kxq, weights_kxq, 0.0)
        terms = []
        if "key" in wanted:
          scores_grad_kxq = weights_grad_kxq[0] - along_columns(delta_q, (k, q))
          scores_grad_kxq *= weights_kxq * slope_kxq
          terms.append((scores_grad_kxq.astype(dtype), query_qxD))
        if "value" in wanted:
          terms.append((weights_kxq.astype(dtype), cotangent_qxD))
        grads = accumulate(*((total, *term) for total, term in zip(grads, terms)))
        plgpu.commit_smem()  # The vectors were read by threads; TMA is to write over them.
        plgpu.barrier_arrive(consumed.at[slot])
        return grads

      grads = len(wanted) * [plgpu.layout_cast(jnp.zeros((k, D), jnp.float32), MATRIX)]
      crossed, full = (functools.partial(step, is_full=is_full) for is_full in (False, True))
      grads = lax.fori_loop(0, steps.num_crossed, crossed, grads)
      grads = lax.fori_loop(steps.num_crossed, steps.num, full, grads)
      for name, grad in zip(wanted, grads):
        outputs[name][rows] = grad * scale if name == "key" else grad

    @pl.when(warpgroup == COMPUTE_WARPGROUPS)
    def _stream():
      plgpu.set_max_registers(STREAM_REGISTERS, action="decrease")

      @pl.loop(0, steps.num + slots)
      def _(index):
        slot = lax.rem(index, slots)
        pl.when(index >= slots)(lambda: plgpu.barrier_wait(consumed.at[slot]))

        @pl.when(index < steps.num)
        def _():
          head = kv_head * R + lax.rem(index, R)
          rows = pl.ds(steps.block(index) * q, q)
          sources = (
            query.at[batch, rows, head],
            out_cotangent.at[batch, rows, head],
            start.at[batch, rows],
            stop.at[batch, rows],
            log_sum_exp.at[batch, head, rows],
            delta.at[batch, head, rows],
          )
          for source, target in zip(sources, (queries, cotangents, *vectors)):
            plgpu.copy_gmem_to_smem(source, target.at[slot], filled.at[slot])

  grad_type = jax.ShapeDtypeStruct(key_BxKxGxD.shape, jnp.float32)
  return launch(
    kernel,
    (grad_type,) * len(wanted),
    (
      tiled_memory((COMPUTE_WARPGROUPS, k, D), dtype, q),
      tiled_memory((COMPUTE_WARPGROUPS, k, D), dtype, q),
      tiled_memory((slots, q, D), dtype, q),
      tiled_memory((slots, q, D), dtype, q),
      plgpu.SMEM((slots, q), jnp.int32),
      plgpu.SMEM((slots, q), jnp.int32),
      plgpu.SMEM((slots, q), jnp.float32),
      plgpu.SMEM((slots, q), jnp.float32),
      plgpu.Barrier(num_arrivals=2, num_barriers=COMPUTE_WARPGROUPS),
      plgpu.Barrier(num_arrivals=6, num_barriers=slots),
      plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=slots),
    ),
    (G, K // TILE, B),
  )(
    query_BxQxHxD,
    key_BxKxGxD,
    value_BxKxGxD,
    start_BxQ,
    stop_BxQ,
    out_cotangent_BxQxHxD,
    log_sum_exp_BxHxQ,
    delta_BxHxQ,
    tables_Bx4xM,
  )
