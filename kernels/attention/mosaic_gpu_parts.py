"""What the Hopper kernels of attention share: steps over blocks, matrix products and scores.

D head_dim; q/k queries/keys of one block.
"""

import math

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.attention.block_sizes_gpu import MOSAIC_GPU_TILE as TILE

MATRIX = plgpu.Layout.WGMMA
ROWS = plgpu.Layout.WGMMA.reduce(1)
COLUMNS = plgpu.Layout.WGMMA.reduce(0)
# Rows of a warpgroup's matrix instruction.
WARPGROUP_ROWS = 64
COMPUTE_WARPGROUPS = TILE // WARPGROUP_ROWS
# Of a thread, once the warpgroup that streams has given up what it does not need.
COMPUTE_REGISTERS, STREAM_REGISTERS = 240, 24
# Below every score, and finite: the difference of two -inf is no number.
LOWEST = -3.0e38


class Steps:
  """The order in which a tile visits blocks: those that a boundary crosses, then the full ones.

  Each block is visited `repeats` times in a row, once for each query head of a group.
  """

  def __init__(self, tables_Bx4xN, batch, tile, repeats=1):
    self.first, last, self.full_first, self.full_last = (
      tables_Bx4xN[batch, i, tile] for i in range(4)
    )
    self.repeats = repeats
    self.num = (last - self.first) * repeats
    self.num_crossed = self.num - (self.full_last - self.full_first) * repeats

  def block(self, index):
    """The block of step `index`."""
    crossed = self.first + lax.div(index, self.repeats)
    crossed += jnp.where(crossed < self.full_first, 0, self.full_last - self.full_first)
    full = self.full_first + lax.div(index - self.num_crossed, self.repeats)
    return jnp.where(index < self.num_crossed, crossed, full)


def launch(kernel, out_type, scratch, grid):
  """A grid of (heads, tiles, batch rows), each with the warpgroups that compute and one more."""
  return plgpu.kernel(
    kernel,
    out_type=out_type,
    scratch_types=scratch,
    grid=grid,
    grid_names=("head", "tile", "batch"),
    num_threads=COMPUTE_WARPGROUPS + 1,
    thread_name="warpgroup",
    compiler_params=plgpu.CompilerParams(approx_math=True),
  )


def tiled_memory(shape, dtype, block: int):
  """Shared memory in the order that TMA writes and matrix instructions read.

  Rows of a tile have 128 bytes, or less if one product is to sum over fewer than 64 elements: over
  a `block` of rows, which may be 32 or a multiple of 64.
  """
  columns = min(block, 64)
  transforms = plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(2 * columns)
  return plgpu.SMEM(shape, dtype, transforms=transforms)


def products(*pairs, after=lambda: None):
  """left @ right of each pair in float32; calls `after` once all are issued, and then waits."""
  shapes = [(left.shape[0], right.shape[1]) for left, right in pairs]

  def multiply(*accumulators):
    for accumulator, (left, right) in zip(accumulators, pairs):
      plgpu.wgmma(accumulator, left, right)
    after()
    return [accumulator[...] for accumulator in accumulators]

  return pl.run_scoped(multiply, *(plgpu.ACC(shape, jnp.float32) for shape in shapes))


def accumulate(*terms):
  """total + left @ right of each term; total and left in registers, right in shared memory."""

  def multiply(accumulators):
    for accumulator, (_, left, right) in zip(accumulators, terms):
      plgpu.wgmma(accumulator, left, right)

  return pl.run_state(multiply)([plgpu.ACC.init(total) for total, _, _ in terms])


def along_rows(array_q, shape):
  """Repeats one value a row over the columns."""
  return lax.broadcast_in_dim(array_q, shape, [0])


def along_columns(array_k, shape):
  """Repeats one value a column over the rows."""
  return lax.broadcast_in_dim(array_k, shape, [1])


def seen(start, stop, first_key, shape, key_axis: int):
  """Which of the keys from `first_key` on each query sees, [q, k] or (`key_axis` 0) [k, q]."""
  key = plgpu.broadcasted_iota(jnp.int32, shape, key_axis, layout=MATRIX) + first_key
  repeat = (along_columns, along_rows)[key_axis]
  return (key >= repeat(start, shape)) & (key < repeat(stop, shape))


def base_2_scores(products, scale: float, soft_cap: float | None):
  """Scores in units of log2, and the derivative of the capped by the uncapped ones."""
  if soft_cap is None:
    return products * (scale * math.log2(math.e)), 1.0
  # tanh(x) = 1 - 2 / (1 + e^2x); the GPU's own approximation of tanh has 11 bits.
  tanh = 1 - 2 / (1 + jnp.exp2(products * (2 * math.log2(math.e) * scale / soft_cap)))
  return tanh * (soft_cap * math.log2(math.e)), 1 - tanh * tanh
