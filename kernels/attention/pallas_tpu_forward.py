"""Attention forward on TPU: online softmax (arXiv 2205.14135) with the queries on lanes.

Scores are held keys first, [k, R]: maxima and sums run over sublanes, row statistics and intervals
are plain [1, R] vectors (no 128-fold copies), and the mask of a row is two comparisons.

T rows of tiles, N query tiles, M key blocks, R rows in a tile, k keys in a block, D head_dim.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.attention import pallas_tpu_tiles as tiles
from kernels.attention.pallas_tpu_stream import stream
from kernels.attention.pallas_tpu_tiles import Tiling

LOG2_E = math.log2(math.e)
# Finite, since -inf - -inf is no number: a row without a key keeps a sum of 0.
LOWEST = float(jnp.finfo(jnp.float32).min)

# A tile's rows in parts: the scores of the next come before the weights of this one, so that matrix
# and vector units work at the same time.
PART_ROWS = 512


class KeyWalk:
  """The key blocks of the query tile of each step."""

  def __init__(self, spans_ref, core: jax.Array, cores: int):
    self.spans_ref, self.core, self.cores = spans_ref, core, cores

  def field(self, step, field):
    return self.spans_ref[0, 0, 4 * (step * self.cores + self.core) + field]

  def first(self, step):
    return self.field(step, tiles.FIRST)

  def following(self, step, index):
    return index + 1

  def stop(self, step):
    return self.field(step, tiles.STOP)

  def is_full(self, step, index):
    return (self.field(step, tiles.FULL_FIRST) <= index) & (
      index < self.field(step, tiles.FULL_STOP)
    )


def forward(
  query_TxNxRxD: jax.Array,
  key_UxMxkxD: jax.Array,
  value_UxMxkxD: jax.Array,
  intervals_BxNx2xR: jax.Array,
  spans_Bx1xN4: jax.Array,
  tiling: Tiling,
  *,
  scale: float,
  soft_cap: float | None,
  out_dtype: jnp.dtype,
  vmem_limit: int,
) -> tuple[jax.Array, jax.Array]:
  """Returns out [T, N, D, R] in `out_dtype` and log_sum_exp float32 [T, N, 1, R]."""
  T, N, R, D = query_TxNxRxD.shape
  k, dtype = tiling.keys, query_TxNxRxD.dtype
  specs = TileSpecs(tiling, T // spans_Bx1xN4.shape[0])
  return pl.pallas_call(
    functools.partial(_kernel, tiling=tiling, scale=scale, soft_cap=soft_cap),
    grid=(T * tiling.cores, N // tiling.cores),
    in_specs=[
      specs.table(spans_Bx1xN4),
      specs.intervals(),
      specs.query(R, D),
      pl.BlockSpec(memory_space=pl.ANY),
      pl.BlockSpec(memory_space=pl.ANY),
    ],
    out_specs=[specs.query(D, R), specs.query(1, R)],
    out_shape=[
      varying((T, N, D, R), out_dtype, query_TxNxRxD),
      varying((T, N, 1, R), jnp.float32, query_TxNxRxD),
    ],
    scratch_shapes=[
      pltpu.VMEM((2, k, D), dtype),
      pltpu.VMEM((2, k, D), dtype),
      pltpu.VMEM((D, R), jnp.float32),
      pltpu.VMEM((1, R), jnp.float32),
      pltpu.VMEM((1, R), jnp.float32),
      pltpu.SemaphoreType.DMA((2, 2)),
      pltpu.SMEM((1,), jnp.int32),
    ],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=vmem_limit
    ),
    name="attention_forward",
  )(spans_Bx1xN4, intervals_BxNx2xR, query_TxNxRxD, key_UxMxkxD, value_UxMxkxD)


def _kernel(
  spans_ref,
  intervals_ref,
  query_ref,
  key_hbm_ref,
  value_hbm_ref,
  out_ref,
  log_sum_exp_ref,
  key_ref,
  value_ref,
  sum_out_ref,
  maximum_ref,
  sum_ref,
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
  sum_out_ref[...] = jnp.zeros_like(sum_out_ref)
  maximum_ref[...] = jnp.full_like(maximum_ref, LOWEST)
  sum_ref[...] = jnp.zeros_like(sum_ref)

  R = tiling.rows
  parts = [slice(first, min(first + PART_ROWS, R)) for first in range(0, R, PART_ROWS)]

  def part_scores(part, index, slot, is_masked):
    scores_kxR, _ = scores(key_ref[slot], query_ref[0, 0, part], scale, soft_cap)
    if not is_masked:
      return scores_kxR
    mask_kxR = mask(intervals_ref[0, 0, :, part], index, scores_kxR.shape)
    return jnp.where(mask_kxR, scores_kxR, -jnp.inf)

  def add(index, slot, is_masked):
    next_scores_kxR = part_scores(parts[0], index, slot, is_masked)
    for part, next_part in zip(parts, [*parts[1:], None]):
      scores_kxR = next_scores_kxR
      if next_part is not None:
        next_scores_kxR = part_scores(next_part, index, slot, is_masked)
      old_maximum_1xR = maximum_ref[:, part]
      maximum_1xR = jnp.maximum(old_maximum_1xR, jnp.max(scores_kxR, axis=0, keepdims=True))
      weights_kxR = jnp.exp2(scores_kxR - maximum_1xR)
      decay_1xR = jnp.exp2(old_maximum_1xR - maximum_1xR)
      maximum_ref[:, part] = maximum_1xR
      sum_1xR = jnp.sum(weights_kxR, axis=0, keepdims=True)
      sum_ref[:, part] = decay_1xR * sum_ref[:, part] + sum_1xR
      weights_kxR = weights_kxR.astype(value_ref.dtype)
      out_DxR = dot(value_ref[slot], weights_kxR, (0, 0))
      sum_out_ref[:, part] = decay_1xR * sum_out_ref[:, part] + out_DxR

  stream(
    walk,
    lambda index, slot: key_copies(
      (key_hbm_ref, value_hbm_ref), (key_ref, value_ref), semaphores, key_row, index, slot
    ),
    lambda index, slot: by_mask(walk.is_full(step, index), index, slot, add),
    count_ref,
    axis=1,
  )
  out_DxR, log_sum_exp_ref[0, 0] = normalised(sum_out_ref[...], maximum_ref[...], sum_ref[...])
  out_ref[0, 0] = out_DxR.astype(out_ref.dtype)


class TileSpecs:
  """Block specifications of what belongs to the query tile of a grid step (row of T, step)."""

  def __init__(self, tiling: Tiling, rows_per_batch: int):
    self.cores, self.rows_per_batch = tiling.cores, rows_per_batch
    self.rows = tiling.rows

  def table(self, table_Bx1xL: jax.Array) -> pl.BlockSpec:
    return pl.BlockSpec(
      (1, 1, table_Bx1xL.shape[2]),
      lambda row, step: (self._batch(row), 0, 0),
      memory_space=pltpu.SMEM,
    )

  def intervals(self) -> pl.BlockSpec:
    return pl.BlockSpec(
      (1, 1, 2, self.rows), lambda row, step: (self._batch(row), self.tile(row, step), 0, 0)
    )

  def query(self, *shape: int) -> pl.BlockSpec:
    return pl.BlockSpec(
      (1, 1, *shape), lambda row, step: (row // self.cores, self.tile(row, step), 0, 0)
    )

  def tile(self, row, step):
    return step * self.cores + row % self.cores

  def _batch(self, row):
    return row // (self.cores * self.rows_per_batch)


def key_copies(sources, buffers, semaphores, row, index, slot) -> list:
  """Copies of block `index` of a row of each source into buffer `slot`."""
  return [
    pltpu.make_async_copy(source.at[row, index], buffer.at[slot], semaphores.at[number, slot])
    for number, (source, buffer) in enumerate(zip(sources, buffers))
  ]


def by_mask(is_full, index, slot, compute) -> None:
  """Runs `compute(index, slot, is_masked)`, without mask arithmetic if the block is full."""

  @pl.when(is_full)
  def _():
    compute(index, slot, False)

  @pl.when(jnp.logical_not(is_full))
  def _():
    compute(index, slot, True)


def scores(key_kxD, query_RxD, scale: float, soft_cap: float | None):
  """Scores [k, R] in units of log 2, and tanh of the soft cap (or None)."""
  return base_2(dot(key_kxD, query_RxD, (1, 1)), scale, soft_cap)


def base_2(products, scale, soft_cap: float | None):
  """Scores in units of log 2, and tanh of the soft cap (or None); `scale` may be an array."""
  if soft_cap is None:
    return products * (scale * LOG2_E), None
  tanh = jnp.tanh(products * (scale / soft_cap))
  return tanh * (soft_cap * LOG2_E), tanh


def normalised(sum_out, maximum, weight_sum):
  """out and log_sum_exp, from sums of exp2(score - maximum) with values and alone."""
  is_empty = weight_sum == 0
  weight_sum = jnp.where(is_empty, 1.0, weight_sum)
  log_sum_exp = jnp.where(is_empty, -jnp.inf, maximum / LOG2_E + jnp.log(weight_sum))
  return sum_out * (1.0 / weight_sum), log_sum_exp


def mask(intervals_2xR, index, shape: tuple[int, int]):
  """Which keys of block `index` each row sees, bool [k, R]."""
  start_1xR = intervals_2xR[0:1] - index * shape[0]
  stop_1xR = intervals_2xR[1:2] - index * shape[0]
  key_kxR = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
  return (key_kxR >= start_1xR) & (key_kxR < stop_1xR)


def dot(left, right, contract: tuple[int, int]):
  """A product accumulated in float32; float32 operands are not rounded to bfloat16."""
  precision = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
  dimensions = (((contract[0],), (contract[1],)), ((), ()))
  return jax.lax.dot_general(
    left, right, dimensions, precision=precision, preferred_element_type=jnp.float32
  )


def varying(shape: tuple[int, ...], dtype, like: jax.Array) -> jax.ShapeDtypeStruct:
  """An output that varies over the mesh axes that `like` varies over, for `shard_map`."""
  return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(like).manual_axis_type)
