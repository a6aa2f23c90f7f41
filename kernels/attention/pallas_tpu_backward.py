"""Attention backward on TPU: dQ by a loop over keys, dK and dV by a loop over queries.

Both recompute the weights from the log-sum-exp (arXiv 2205.14135) and, as in the forward kernel,
hold scores keys first, so that no product needs a transposed block of weights.

T rows of tiles, N query tiles, M key blocks, R rows in a tile, k keys in a block, D head_dim.
`statistics_TxNx2xR` holds, for each row, log_sum_exp in units of log 2 (+inf in empty rows, so that
all weights are 0) and delta.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.attention import pallas_tpu_tiles as tiles
from kernels.attention.pallas_tpu_forward import (
  KeyWalk,
  TileSpecs,
  by_mask,
  dot,
  key_copies,
  mask,
  scores,
  varying,
)
from kernels.attention.pallas_tpu_stream import stream
from kernels.attention.pallas_tpu_tiles import Tiling


def query_grad(
  query_TxNxRxD: jax.Array,
  key_UxMxkxD: jax.Array,
  value_UxMxkxD: jax.Array,
  out_cotangent_TxNxRxD: jax.Array,
  statistics_TxNx2xR: jax.Array,
  intervals_BxNx2xR: jax.Array,
  spans_Bx1xN4: jax.Array,
  tiling: Tiling,
  *,
  scale: float,
  soft_cap: float | None,
  vmem_limit: int,
) -> jax.Array:
  """The cotangent of the query, float32 [T, N, D, R]."""
  T, N, R, D = query_TxNxRxD.shape
  k, dtype = tiling.keys, query_TxNxRxD.dtype
  specs = TileSpecs(tiling, T // spans_Bx1xN4.shape[0])
  return pl.pallas_call(
    functools.partial(_query_kernel, tiling=tiling, scale=scale, soft_cap=soft_cap),
    grid=(T * tiling.cores, N // tiling.cores),
    in_specs=[
      specs.table(spans_Bx1xN4),
      specs.intervals(),
      specs.query(R, D),
      specs.query(R, D),
      specs.query(2, R),
      pl.BlockSpec(memory_space=pl.ANY),
      pl.BlockSpec(memory_space=pl.ANY),
    ],
    out_specs=specs.query(D, R),
    out_shape=varying((T, N, D, R), jnp.float32, query_TxNxRxD),
    scratch_shapes=[
      pltpu.VMEM((2, k, D), dtype),
      pltpu.VMEM((2, k, D), dtype),
      pltpu.SemaphoreType.DMA((2, 2)),
      pltpu.SMEM((1,), jnp.int32),
    ],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=vmem_limit
    ),
    name="attention_query_grad",
  )(
    spans_Bx1xN4,
    intervals_BxNx2xR,
    query_TxNxRxD,
    out_cotangent_TxNxRxD,
    statistics_TxNx2xR,
    key_UxMxkxD,
    value_UxMxkxD,
  )


def _query_kernel(
  spans_ref,
  intervals_ref,
  query_ref,
  out_cotangent_ref,
  statistics_ref,
  key_hbm_ref,
  value_hbm_ref,
  grad_ref,
  key_ref,
  value_ref,
  semaphores,
  count_ref,
  *,
  tiling: Tiling,
  scale: float,
  soft_cap: float | None,
):
  row, step = pl.program_id(0), pl.program_id(1)
  key_row = row // (tiling.cores * tiling.key_sharing)
  walk = KeyWalk(spans_ref, row % tiling.cores, tiling.cores)
  grad_ref[...] = jnp.zeros_like(grad_ref)

  def add(index, slot, is_masked):
    _, scores_grad_kxR = _weights(
      key_ref[slot],
      value_ref[slot],
      query_ref[0, 0],
      out_cotangent_ref[0, 0],
      statistics_ref[0, 0],
      intervals_ref[0, 0],
      index if is_masked else None,
      scale,
      soft_cap,
    )
    grad_ref[0, 0] += dot(key_ref[slot], scores_grad_kxR, (0, 0))

  stream(
    walk,
    lambda index, slot: key_copies(
      (key_hbm_ref, value_hbm_ref), (key_ref, value_ref), semaphores, key_row, index, slot
    ),
    lambda index, slot: by_mask(walk.is_full(step, index), index, slot, add),
    count_ref,
    axis=1,
  )
  grad_ref[...] *= scale


class QueryWalk:
  """The query tiles that read the key block of each step."""

  def __init__(self, spans_ref, key_spans_ref, core: jax.Array, cores: int):
    self.spans_ref, self.core, self.cores = spans_ref, core, cores
    self.key_spans_ref = key_spans_ref

  def block(self, step):
    return step * self.cores + self.core

  def first(self, step):
    return self.spans_ref[0, 0, 2 * self.block(step)]

  def stop(self, step):
    return self.spans_ref[0, 0, 2 * self.block(step) + 1]

  def following(self, step, index):
    block, stop = self.block(step), self.stop(step)
    return jax.lax.while_loop(
      lambda tile: (tile < stop) & jnp.logical_not(self._reads(tile, block)),
      lambda tile: tile + 1,
      index + 1,
    )

  def is_full(self, step, index):
    return self._within(index, self.block(step), tiles.FULL_FIRST, tiles.FULL_STOP)

  def _reads(self, tile, block):
    # The loop's condition looks at one tile past the last: any tile's numbers will do there.
    last = self.key_spans_ref.shape[2] // 4 - 1
    return self._within(jnp.minimum(tile, last), block, tiles.FIRST, tiles.STOP)

  def _within(self, tile, block, first, stop):
    return (self.key_spans_ref[0, 0, 4 * tile + first] <= block) & (
      block < self.key_spans_ref[0, 0, 4 * tile + stop]
    )


def key_grads(
  query_TxNxRxD: jax.Array,
  key_UxMxkxD: jax.Array,
  value_UxMxkxD: jax.Array,
  out_cotangent_TxNxRxD: jax.Array,
  statistics_TxNx2xR: jax.Array,
  intervals_BxNx2xR: jax.Array,
  spans_Bx1xN4: jax.Array,
  tiling: Tiling,
  *,
  scale: float,
  soft_cap: float | None,
  vmem_limit: int,
) -> tuple[jax.Array, jax.Array]:
  """The cotangents of key and value, float32 [T, M, k, D], to be added where rows share keys."""
  T, _, R, D = query_TxNxRxD.shape
  M, k, cores = tiling.num_key_blocks, tiling.keys, tiling.cores
  dtype = query_TxNxRxD.dtype
  query_spans_Bx1xM2 = tiles.query_spans(spans_Bx1xN4, tiling)
  specs = TileSpecs(tiling, T // spans_Bx1xN4.shape[0])
  rows_per_key_row = cores * tiling.key_sharing
  key_spec = pl.BlockSpec(
    (1, 1, k, D), lambda row, step: (row // rows_per_key_row, specs.tile(row, step), 0, 0)
  )
  return pl.pallas_call(
    functools.partial(
      _key_kernel,
      tiling=tiling,
      rows_per_batch=T // spans_Bx1xN4.shape[0],
      scale=scale,
      soft_cap=soft_cap,
    ),
    grid=(T * cores, M // cores),
    in_specs=[
      specs.table(query_spans_Bx1xM2),
      specs.table(spans_Bx1xN4),
      key_spec,
      key_spec,
      pl.BlockSpec(memory_space=pl.ANY),
      pl.BlockSpec(memory_space=pl.ANY),
      pl.BlockSpec(memory_space=pl.ANY),
      pl.BlockSpec(memory_space=pl.ANY),
    ],
    out_specs=[specs.query(k, D), specs.query(k, D)],
    out_shape=[varying((T, M, k, D), jnp.float32, query_TxNxRxD)] * 2,
    scratch_shapes=[
      pltpu.VMEM((2, R, D), dtype),
      pltpu.VMEM((2, R, D), dtype),
      pltpu.VMEM((2, 2, R), jnp.float32),
      pltpu.VMEM((2, 2, R), jnp.int32),
      pltpu.SemaphoreType.DMA((4, 2)),
      pltpu.SMEM((1,), jnp.int32),
    ],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=vmem_limit
    ),
    name="attention_key_grads",
  )(
    query_spans_Bx1xM2,
    spans_Bx1xN4,
    key_UxMxkxD,
    value_UxMxkxD,
    query_TxNxRxD,
    out_cotangent_TxNxRxD,
    statistics_TxNx2xR,
    intervals_BxNx2xR,
  )


def _key_kernel(
  query_spans_ref,
  key_spans_ref,
  key_ref,
  value_ref,
  query_hbm_ref,
  out_cotangent_hbm_ref,
  statistics_hbm_ref,
  intervals_hbm_ref,
  key_grad_ref,
  value_grad_ref,
  query_ref,
  out_cotangent_ref,
  statistics_ref,
  intervals_ref,
  semaphores,
  count_ref,
  *,
  tiling: Tiling,
  rows_per_batch: int,
  scale: float,
  soft_cap: float | None,
):
  step = pl.program_id(1)
  row = pl.program_id(0) // tiling.cores
  walk = QueryWalk(query_spans_ref, key_spans_ref, pl.program_id(0) % tiling.cores, tiling.cores)
  key_grad_ref[...] = jnp.zeros_like(key_grad_ref)
  value_grad_ref[...] = jnp.zeros_like(value_grad_ref)

  def copies(index, slot):
    sources = (query_hbm_ref, out_cotangent_hbm_ref, statistics_hbm_ref)
    buffers = (query_ref, out_cotangent_ref, statistics_ref)
    interval_copy = pltpu.make_async_copy(
      intervals_hbm_ref.at[row // rows_per_batch, index],
      intervals_ref.at[slot],
      semaphores.at[3, slot],
    )
    return [*key_copies(sources, buffers, semaphores, row, index, slot), interval_copy]

  def add(_, slot, is_masked):
    weights_kxR, scores_grad_kxR = _weights(
      key_ref[0, 0],
      value_ref[0, 0],
      query_ref[slot],
      out_cotangent_ref[slot],
      statistics_ref[slot],
      intervals_ref[slot],
      walk.block(step) if is_masked else None,
      scale,
      soft_cap,
    )
    value_grad_ref[0, 0] += dot(weights_kxR, out_cotangent_ref[slot], (1, 0))
    key_grad_ref[0, 0] += dot(scores_grad_kxR, query_ref[slot], (1, 0))

  stream(
    walk,
    copies,
    lambda index, slot: by_mask(walk.is_full(step, index), index, slot, add),
    count_ref,
    axis=1,
  )
  key_grad_ref[...] *= scale


def _weights(
  key_kxD,
  value_kxD,
  query_RxD,
  out_cotangent_RxD,
  statistics_2xR,
  intervals_2xR,
  masked_block,
  scale: float,
  soft_cap: float | None,
):
  """Weights and the cotangent of the scores before `scale`, [k, R] in the operands' dtype."""
  scores_kxR, tanh_kxR = scores(key_kxD, query_RxD, scale, soft_cap)
  weights_kxR = jnp.exp2(scores_kxR - statistics_2xR[0:1])
  if masked_block is not None:
    weights_kxR = jnp.where(mask(intervals_2xR, masked_block, weights_kxR.shape), weights_kxR, 0.0)
  weights_grad_kxR = dot(value_kxD, out_cotangent_RxD, (1, 1))
  scores_grad_kxR = weights_kxR * (weights_grad_kxR - statistics_2xR[1:2])
  if soft_cap is not None:
    scores_grad_kxR *= 1.0 - tanh_kxR * tanh_kxR
  return weights_kxR.astype(key_kxD.dtype), scores_grad_kxR.astype(key_kxD.dtype)
