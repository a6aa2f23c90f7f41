"""The attention backward kernels for TPU: dQ loops over keys, dK and dV loop over queries.

Both recompute the weights from the log-sum-exp (arXiv 2205.14135). As in the forward kernel, scores
are computed keys first, so that no product needs a transposed block of weights.

T rows of tiles, U rows of key blocks, N query tiles, M key blocks, R rows per tile, k keys per
block, D head_dim.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.attention.block_tables import FIRST, FULL_FIRST, FULL_STOP, STOP
from kernels.attention.pallas_tpu.parts import (
  KeyWalk,
  TileSpecs,
  compiler_params,
  dot,
  key_copies,
  mask,
  scores,
  varying,
)
from kernels.attention.pallas_tpu.stream import stream
from kernels.attention.pallas_tpu.tiles import Tiling, query_spans


class Operands(NamedTuple):
  """What both kernels read.

  The statistics of a row are log_sum_exp in units of log 2, +inf in empty rows so that all their
  weights are 0, and delta.
  """

  query_TxNxRxD: jax.Array
  key_UxMxkxD: jax.Array
  value_UxMxkxD: jax.Array
  out_cotangent_TxNxRxD: jax.Array
  statistics_TxNx2xR: jax.Array
  intervals_BxNx2xR: jax.Array
  spans_Bx1xN4: jax.Array


def query_grad(
  operands: Operands, *, tiling: Tiling, scale: float, soft_cap: float | None
) -> jax.Array:
  """Returns the cotangent of the query, float32 [T, N, D, R]."""
  query_TxNxRxD, spans_Bx1xN4 = operands.query_TxNxRxD, operands.spans_Bx1xN4
  T, N, R, D = query_TxNxRxD.shape
  k, dtype = tiling.keys, query_TxNxRxD.dtype
  specs = TileSpecs(tiling, T // spans_Bx1xN4.shape[0])
  return pl.pallas_call(
    functools.partial(_query_kernel, tiling=tiling, scale=scale, soft_cap=soft_cap),
    grid=(T * tiling.cores, N // tiling.cores),
    in_specs=[
      specs.query(R, D),
      pl.BlockSpec(memory_space=pl.ANY),
      pl.BlockSpec(memory_space=pl.ANY),
      specs.query(R, D),
      specs.query(2, R),
      specs.intervals(),
      specs.table(spans_Bx1xN4),
    ],
    out_specs=specs.query(D, R),
    out_shape=varying((T, N, D, R), jnp.float32, query_TxNxRxD),
    scratch_shapes=[
      pltpu.VMEM((2, k, D), dtype),
      pltpu.VMEM((2, k, D), dtype),
      pltpu.SemaphoreType.DMA((2, 2)),
      pltpu.SMEM((1,), jnp.int32),
    ],
    compiler_params=compiler_params(),
    name="attention_query_grad",
  )(*operands)


def _query_kernel(
  query_ref,
  key_hbm_ref,
  value_hbm_ref,
  out_cotangent_ref,
  statistics_ref,
  intervals_ref,
  spans_ref,
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
  row = pl.program_id(0)
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
    add,
    count_ref,
  )
  grad_ref[...] *= scale


class QueryWalk:
  """The query tiles that read the key block of each step; a `stream.Walk`."""

  def __init__(self, spans_ref: jax.Ref, key_spans_ref: jax.Ref, core: jax.Array, cores: int):
    self.spans_ref, self.core, self.cores = spans_ref, core, cores
    self.key_spans_ref = key_spans_ref

  def block(self, step: jax.Array) -> jax.Array:
    return step * self.cores + self.core

  def first(self, step: jax.Array) -> jax.Array:
    return self.spans_ref[0, 0, 2 * self.block(step)]

  def stop(self, step: jax.Array) -> jax.Array:
    return self.spans_ref[0, 0, 2 * self.block(step) + 1]

  def following(self, step: jax.Array, index: jax.Array) -> jax.Array:
    block, stop = self.block(step), self.stop(step)
    return jax.lax.while_loop(
      lambda tile: (tile < stop) & jnp.logical_not(self._reads(tile, block)),
      lambda tile: tile + 1,
      index + 1,
    )

  def is_full(self, step: jax.Array, index: jax.Array) -> jax.Array:
    return self._within(index, self.block(step), FULL_FIRST, FULL_STOP)

  def _reads(self, tile, block):
    # The loop condition also looks one tile past the last, where the result does not matter.
    last = self.key_spans_ref.shape[2] // 4 - 1
    return self._within(jnp.minimum(tile, last), block, FIRST, STOP)

  def _within(self, tile, block, first, stop):
    return (self.key_spans_ref[0, 0, 4 * tile + first] <= block) & (
      block < self.key_spans_ref[0, 0, 4 * tile + stop]
    )


def key_grads(
  operands: Operands, *, tiling: Tiling, scale: float, soft_cap: float | None
) -> tuple[jax.Array, jax.Array]:
  """Returns the cotangents of key and value, float32 [T, M, k, D].

  The caller sums them over the rows of T that share keys.
  """
  query_TxNxRxD, spans_Bx1xN4 = operands.query_TxNxRxD, operands.spans_Bx1xN4
  T, _, R, D = query_TxNxRxD.shape
  M, k, cores = tiling.num_key_blocks, tiling.keys, tiling.cores
  dtype = query_TxNxRxD.dtype
  query_spans_Bx1xM2 = query_spans(spans_Bx1xN4, tiling)
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
      pl.BlockSpec(memory_space=pl.ANY),
      key_spec,
      key_spec,
      pl.BlockSpec(memory_space=pl.ANY),
      pl.BlockSpec(memory_space=pl.ANY),
      pl.BlockSpec(memory_space=pl.ANY),
      specs.table(spans_Bx1xN4),
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
    compiler_params=compiler_params(),
    name="attention_key_grads",
  )(query_spans_Bx1xM2, *operands)


def _key_kernel(
  query_spans_ref,
  query_hbm_ref,
  key_ref,
  value_ref,
  out_cotangent_hbm_ref,
  statistics_hbm_ref,
  intervals_hbm_ref,
  key_spans_ref,
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

  stream(walk, copies, add, count_ref)
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
  """The weights, and the cotangent of the scores before `scale`, [k, R] in the operands' dtype."""
  scores_kxR, tanh_kxR = scores(key_kxD, query_RxD, scale, soft_cap)
  weights_kxR = jnp.exp2(scores_kxR - statistics_2xR[0:1])
  if masked_block is not None:
    weights_kxR = jnp.where(mask(intervals_2xR, masked_block, weights_kxR.shape), weights_kxR, 0.0)
  weights_grad_kxR = dot(value_kxD, out_cotangent_RxD, (1, 1))
  scores_grad_kxR = weights_kxR * (weights_grad_kxR - statistics_2xR[1:2])
  if tanh_kxR is not None:
    scores_grad_kxR *= 1.0 - tanh_kxR * tanh_kxR
  return weights_kxR.astype(key_kxD.dtype), scores_grad_kxR.astype(key_kxD.dtype)
