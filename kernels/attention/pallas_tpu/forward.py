"""The attention forward kernel for TPU: online softmax (arXiv 2205.14135), with queries on lanes.

Scores are computed keys first, [k, R]. Maxima and sums then run over sublanes, row statistics and
intervals are plain [1, R] vectors (no 128-fold copies), and the mask of a row is two comparisons.

T rows of tiles, U rows of key blocks, N query tiles, M key blocks, R rows per tile, k keys per
block, D head_dim.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.attention.pallas_tpu.parts import (
  LOWEST,
  KeyWalk,
  TileSpecs,
  compiler_params,
  dot,
  key_copies,
  mask,
  normalised,
  scores,
  varying,
)
from kernels.attention.pallas_tpu.stream import stream
from kernels.attention.pallas_tpu.tiles import Tiling

# Rows of a tile that the kernel works on at once. The scores of the next part come before the
# weights of the current one, so that matrix and vector units work in parallel.
PART_ROWS = 512


def forward(
  query_TxNxRxD: jax.Array,
  key_UxMxkxD: jax.Array,
  value_UxMxkxD: jax.Array,
  intervals_BxNx2xR: jax.Array,
  spans_Bx1xN4: jax.Array,
  *,
  tiling: Tiling,
  scale: float,
  soft_cap: float | None,
  out_dtype: jnp.dtype,
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
    compiler_params=compiler_params(),
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
  row = pl.program_id(0)
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
    add,
    count_ref,
  )
  out_DxR, log_sum_exp_ref[0, 0] = normalised(sum_out_ref[...], maximum_ref[...], sum_ref[...])
  out_ref[0, 0] = out_DxR.astype(out_ref.dtype)
