"""The attention backward kernels for Hopper: the gradient of query, and those of key and value.

Two warpgroups compute, each for 64 queries (gradient of query) or keys (gradients of key and
value). A third streams the blocks of the other side that meet an interval into shared memory, as in
`forward`. With p = exp(score - log_sum_exp) and ds = p * (dp - delta): dvalue = p^T dout, dkey =
ds^T query, dquery = ds key (arXiv 2205.14135, 2407.08608). Nothing is added atomically, so
gradients are the same in every run.

B batch, Q/K query/key length, H query heads, G = H / R key/value heads, D head_dim, N/M tiles of
queries/keys, q/k queries/keys per warpgroup or block. Q and K are multiples of the tile and of the
blocks.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.attention.mosaic_gpu import parts


class Operands(NamedTuple):
  """What all backward kernels read.

  log_sum_exp is in units of log 2, and +inf for queries with an empty interval.
  """

  query_BxQxHxD: jax.Array
  key_BxKxGxD: jax.Array
  value_BxKxGxD: jax.Array
  start_BxQ: jax.Array
  stop_BxQ: jax.Array
  out_cotangent_BxQxHxD: jax.Array
  log_sum_exp_BxHxQ: jax.Array
  delta_BxHxQ: jax.Array


def query_grad(
  operands: Operands,
  tables_Bx4xN: jax.Array,
  *,
  k: int,
  slots: int,
  scale: float,
  soft_cap: float | None,
) -> jax.Array:
  """Returns the cotangent of the query [B, Q, H, D] in float32.

  `slots` key blocks are in flight. `tables_Bx4xN` is `block_tables.of_queries` for tiles and blocks
  of `k` keys.
  """
  B, Q, H, D = operands.query_BxQxHxD.shape
  R = H // operands.key_BxKxGxD.shape[2]
  dtype = operands.query_BxQxHxD.dtype
  q = parts.WARPGROUP_ROWS

  def kernel(
    query, key, value, start, stop, out_cotangent, log_sum_exp, delta, tables, grad, *scratch
  ):
    own_query, own_cotangent, keys, values, ready, filled, consumed = scratch
    batch, head = lax.axis_index("batch"), lax.axis_index("head")
    # The last tile first: a causal mask gives it the most work.
    tile = Q // parts.TILE - 1 - lax.axis_index("tile")
    steps = parts.Steps(tables, batch, tile)
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup < parts.COMPUTE_WARPGROUPS)
    def _compute():
      plgpu.set_max_registers(parts.COMPUTE_REGISTERS, action="increase")
      rows = pl.ds(tile * parts.TILE + warpgroup * q, q)
      query_qxD, cotangent_qxD = own_query.at[warpgroup], own_cotangent.at[warpgroup]
      is_ready = ready.at[warpgroup]
      plgpu.copy_gmem_to_smem(query.at[batch, rows, head], query_qxD, is_ready)
      plgpu.copy_gmem_to_smem(out_cotangent.at[batch, rows, head], cotangent_qxD, is_ready)
      start_q, stop_q = (
        plgpu.load(array.at[batch, rows], layout=parts.ROWS, optimized=False)
        for array in (start, stop)
      )
      log_sum_exp_q, delta_q = (
        plgpu.load(array.at[batch, head, rows], layout=parts.ROWS, optimized=False)
        for array in (log_sum_exp, delta)
      )
      plgpu.barrier_wait(is_ready)

      def step(index, grad_qxD, is_full):
        slot = lax.rem(index, slots)
        key_kxD, value_kxD = keys.at[slot], values.at[slot]
        plgpu.barrier_wait(filled.at[slot])
        products_qxk, weights_grad_qxk = parts.products(
          (query_qxD, key_kxD.transpose((1, 0))), (cotangent_qxD, value_kxD.transpose((1, 0)))
        )
        scores_qxk, slope_qxk = parts.base_2_scores(products_qxk, scale, soft_cap)
        weights_qxk = jnp.exp2(scores_qxk - parts.along_rows(log_sum_exp_q, (q, k)))
        if not is_full:
          first_key = steps.block(index) * k
          is_seen_qxk = parts.seen(start_q, stop_q, first_key, (q, k), key_axis=1)
          weights_qxk = jnp.where(is_seen_qxk, weights_qxk, 0.0)
        scores_grad_qxk = (
          weights_qxk * (weights_grad_qxk - parts.along_rows(delta_q, (q, k))) * slope_qxk
        )
        (grad_qxD,) = parts.accumulate((grad_qxD, scores_grad_qxk.astype(dtype), key_kxD))
        plgpu.barrier_arrive(consumed.at[slot])
        return grad_qxD

      grad_qxD = plgpu.layout_cast(jnp.zeros((q, D), jnp.float32), parts.MATRIX)
      grad[batch, rows, head] = steps.fold(step, grad_qxD) * scale

    @pl.when(warpgroup == parts.COMPUTE_WARPGROUPS)
    def _stream():
      def copies(index):
        block = batch, pl.ds(steps.block(index) * k, k), lax.div(head, R)
        return [[(key.at[block], keys), (value.at[block], values)]]

      parts.stream(steps.num, slots, copies, (filled,), (consumed,))

  return parts.launch(
    kernel,
    jax.ShapeDtypeStruct(operands.query_BxQxHxD.shape, jnp.float32),
    (
      parts.tiled_memory((parts.COMPUTE_WARPGROUPS, q, D), dtype, k),
      parts.tiled_memory((parts.COMPUTE_WARPGROUPS, q, D), dtype, k),
      parts.tiled_memory((slots, k, D), dtype, k),
      parts.tiled_memory((slots, k, D), dtype, k),
      plgpu.Barrier(num_arrivals=2, num_barriers=parts.COMPUTE_WARPGROUPS),
      plgpu.Barrier(num_arrivals=2, num_barriers=slots),
      plgpu.Barrier(num_arrivals=parts.COMPUTE_WARPGROUPS, num_barriers=slots),
    ),
    (H, Q // parts.TILE, B),
  )(*operands, tables_Bx4xN)


def key_value_grads(
  operands: Operands,
  tables_Bx4xM: jax.Array,
  *,
  wanted: tuple[str, ...],
  q: int,
  slots: int,
  scale: float,
  soft_cap: float | None,
) -> Sequence[jax.Array]:
  """Returns the cotangents of those of "key" and "value" that are `wanted`, in float32.

  At head_dim 256 the registers hold only one of the two, which takes two passes. `slots` query
  blocks are in flight. `tables_Bx4xM` is `block_tables.of_keys`, for blocks of `q` queries.
  """
  B, K, G, D = operands.key_BxKxGxD.shape
  R = operands.query_BxQxHxD.shape[2] // G
  dtype = operands.query_BxQxHxD.dtype
  k = parts.WARPGROUP_ROWS

  def kernel(
    query, key, value, start, stop, out_cotangent, log_sum_exp, delta, tables, *outputs_and_scratch
  ):
    outputs = dict(zip(wanted, outputs_and_scratch))
    scratch = outputs_and_scratch[len(wanted) :]
    own_key, own_value, queries, cotangents, *vectors, ready, filled, consumed = scratch
    batch, kv_head = lax.axis_index("batch"), lax.axis_index("head")
    tile = lax.axis_index("tile")
    steps = parts.Steps(tables, batch, tile, repeats=R)
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup < parts.COMPUTE_WARPGROUPS)
    def _compute():
      plgpu.set_max_registers(parts.COMPUTE_REGISTERS, action="increase")
      first_key = tile * parts.TILE + warpgroup * k
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
        # Keys first, so that weights and score gradients are left operands without a transpose.
        pairs = [(key_kxD, query_qxD.transpose((1, 0)))]
        if "key" in wanted:
          pairs.append((value_kxD, cotangent_qxD.transpose((1, 0))))
        products_kxq, *weights_grad_kxq = parts.products(*pairs)
        start_q, stop_q, log_sum_exp_q, delta_q = (
          plgpu.load(vector.at[slot], layout=parts.COLUMNS) for vector in vectors
        )
        scores_kxq, slope_kxq = parts.base_2_scores(products_kxq, scale, soft_cap)
        weights_kxq = jnp.exp2(scores_kxq - parts.along_columns(log_sum_exp_q, (k, q)))
        if not is_full:
          is_seen_kxq = parts.seen(start_q, stop_q, first_key, (k, q), key_axis=0)
          weights_kxq = jnp.where(is_seen_kxq, weights_kxq, 0.0)
        terms = []
        if "key" in wanted:
          scores_grad_kxq = weights_grad_kxq[0] - parts.along_columns(delta_q, (k, q))
          scores_grad_kxq *= weights_kxq * slope_kxq
          terms.append((scores_grad_kxq.astype(dtype), query_qxD))
        if "value" in wanted:
          terms.append((weights_kxq.astype(dtype), cotangent_qxD))
        grads = parts.accumulate(*((total, *term) for total, term in zip(grads, terms)))
        plgpu.commit_smem()  # Threads have read the vectors, which TMA will overwrite.
        plgpu.barrier_arrive(consumed.at[slot])
        return grads

      grads = len(wanted) * [plgpu.layout_cast(jnp.zeros((k, D), jnp.float32), parts.MATRIX)]
      grads = steps.fold(step, grads)
      for name, grad in zip(wanted, grads):
        outputs[name][rows] = grad * scale if name == "key" else grad

    @pl.when(warpgroup == parts.COMPUTE_WARPGROUPS)
    def _stream():
      def copies(index):
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
        return [zip(sources, (queries, cotangents, *vectors))]

      parts.stream(steps.num, slots, copies, (filled,), (consumed,))

  grad_type = jax.ShapeDtypeStruct(operands.key_BxKxGxD.shape, jnp.float32)
  return parts.launch(
    kernel,
    (grad_type,) * len(wanted),
    (
      parts.tiled_memory((parts.COMPUTE_WARPGROUPS, k, D), dtype, q),
      parts.tiled_memory((parts.COMPUTE_WARPGROUPS, k, D), dtype, q),
      parts.tiled_memory((slots, q, D), dtype, q),
      parts.tiled_memory((slots, q, D), dtype, q),
      plgpu.SMEM((slots, q), jnp.int32),
      plgpu.SMEM((slots, q), jnp.int32),
      plgpu.SMEM((slots, q), jnp.float32),
      plgpu.SMEM((slots, q), jnp.float32),
      plgpu.Barrier(num_arrivals=2, num_barriers=parts.COMPUTE_WARPGROUPS),
      plgpu.Barrier(num_arrivals=6, num_barriers=slots),
      plgpu.Barrier(num_arrivals=parts.COMPUTE_WARPGROUPS, num_barriers=slots),
    ),
    (G, K // parts.TILE, B),
  )(*operands, tables_Bx4xM)
