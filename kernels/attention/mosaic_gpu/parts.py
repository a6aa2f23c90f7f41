"""What the Hopper kernels share: loops over blocks, memory, matrix products and scores.

B batch, N tiles, D head_dim, q/k queries/keys per block.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.attention.mosaic_gpu.block_sizes import TILE

MATRIX = plgpu.Layout.WGMMA
ROWS = plgpu.Layout.WGMMA.reduce(1)
COLUMNS = plgpu.Layout.WGMMA.reduce(0)
# Rows of one warpgroup's matrix instruction.
WARPGROUP_ROWS = 64
COMPUTE_WARPGROUPS = TILE // WARPGROUP_ROWS
# Registers per thread, after the streaming warpgroup has released those that it does not need.
COMPUTE_REGISTERS, STREAM_REGISTERS = 240, 24
# Below every score, and finite because -inf - -inf is NaN.
LOWEST = -3.0e38


class Steps:
  """The order in which a tile visits blocks: those that need a mask, then the full ones.

  Each block is visited `repeats` times in a row, once per query head of a group.
  """

  def __init__(self, tables_Bx4xN: jax.Ref, batch: jax.Array, tile: jax.Array, repeats: int = 1):
    self.first, stop, self.full_first, self.full_stop = (
      tables_Bx4xN[batch, i, tile] for i in range(4)
    )
    self.repeats = repeats
    self.num = (stop - self.first) * repeats
    self.num_masked = self.num - (self.full_stop - self.full_first) * repeats

  def block(self, index: jax.Array) -> jax.Array:
    """The block of step `index`."""
    masked = self.first + lax.div(index, self.repeats)
    masked += jnp.where(masked < self.full_first, 0, self.full_stop - self.full_first)
    full = self.full_first + lax.div(index - self.num_masked, self.repeats)
    return jnp.where(index < self.num_masked, masked, full)

  def fold(self, step: Callable[[jax.Array, Any, bool], Any], carry: Any) -> Any:
    """Folds `step(index, carry, is_full)` over all steps."""

    def masked(index, carry):
      return step(index, carry, False)

    def full(index, carry):
      return step(index, carry, True)

    carry = lax.fori_loop(0, self.num_masked, masked, carry)
    return lax.fori_loop(self.num_masked, self.num, full, carry)


def stream(
  num_steps: jax.Array,
  slots: int,
  copies: Callable[[jax.Array], Sequence[Iterable[tuple[Any, Any]]]],
  filled: Sequence[jax.Ref],
  consumed: Sequence[jax.Ref],
) -> None:
  """Copies the blocks of all steps into shared memory (TMA) as soon as their slots are free.

  One warpgroup runs this, until the computing warpgroups have used all blocks. `copies(index)`
  returns groups of pairs (block, buffer with a slot axis). Each group has its own barriers.
  """
  plgpu.set_max_registers(STREAM_REGISTERS, action="decrease")

  @pl.loop(0, num_steps + slots)
  def _(index):
    slot = lax.rem(index, slots)
    for group, (arrived, used) in enumerate(zip(filled, consumed)):
      pl.when(index >= slots)(lambda: plgpu.barrier_wait(used.at[slot]))

      @pl.when(index < num_steps)
      def _():
        for source, target in copies(index)[group]:
          plgpu.copy_gmem_to_smem(source, target.at[slot], arrived.at[slot])


def launch(
  kernel: Callable, out_type: Any, scratch: Sequence[Any], grid: tuple[int, int, int]
) -> Callable:
  """A kernel over a grid of (heads, tiles, batch rows), with one warpgroup more than compute."""
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


def tiled_memory(shape: tuple[int, ...], dtype: jnp.dtype, block: int) -> Any:
  """Shared memory in the order that TMA writes and matrix instructions read.

  Rows of a tile have 128 bytes, or fewer if a product sums over fewer than 64 elements, namely over
  a `block` of rows, which may be 32 or a multiple of 64.
  """
  columns = min(block, 64)
  # JAX's base class has methods without a body, which mypy takes for abstract ones.
  transforms = plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(2 * columns)  # type: ignore[abstract]
  return plgpu.SMEM(shape, dtype, transforms=transforms)


def products(
  *pairs: tuple[jax.Ref, jax.Ref], after: Callable[[], None] = lambda: None
) -> Sequence[jax.Array]:
  """left @ right of each pair in float32. Calls `after` when all are issued, and then waits."""
  shapes = [(left.shape[0], right.shape[1]) for left, right in pairs]

  def multiply(*accumulators):
    for accumulator, (left, right) in zip(accumulators, pairs):
      plgpu.wgmma(accumulator, left, right)
    after()
    return [accumulator[...] for accumulator in accumulators]

  return pl.run_scoped(multiply, *(plgpu.ACC(shape, jnp.float32) for shape in shapes))


def accumulate(*terms: tuple[jax.Array, jax.Array, jax.Ref]) -> Sequence[jax.Array]:
  """total + left @ right of each term; total and left are in registers, right in shared memory."""

  def multiply(accumulators):
    for accumulator, (_, left, right) in zip(accumulators, terms):
      plgpu.wgmma(accumulator, left, right)

  return pl.run_state(multiply)([plgpu.ACC.init(total) for total, _, _ in terms])


def along_rows(array_q: jax.Array, shape: tuple[int, int]) -> jax.Array:
  """Repeats one value per row over the columns."""
  return lax.broadcast_in_dim(array_q, shape, [0])


def along_columns(array_k: jax.Array, shape: tuple[int, int]) -> jax.Array:
  """Repeats one value per column over the rows."""
  return lax.broadcast_in_dim(array_k, shape, [1])


def seen(
  start_q: jax.Array, stop_q: jax.Array, first_key: jax.Array, shape: tuple[int, int], key_axis: int
) -> jax.Array:
  """Which of the keys from `first_key` on each query sees: [q, k], or [k, q] if `key_axis` is 0."""
  key = plgpu.broadcasted_iota(jnp.int32, shape, key_axis, layout=MATRIX) + first_key
  repeat = (along_columns, along_rows)[key_axis]
  return (key >= repeat(start_q, shape)) & (key < repeat(stop_q, shape))


def base_2_scores(
  products: jax.Array, scale: float, soft_cap: float | None
) -> tuple[jax.Array, jax.Array | float]:
  """Scores in units of log 2, and the derivative of the soft cap (1 without one)."""
  if soft_cap is None:
    return products * (scale * math.log2(math.e)), 1.0
  # tanh(x) = 1 - 2 / (1 + e^2x). The GPU's tanh instruction has only 11 bits.
  tanh = 1 - 2 / (1 + jnp.exp2(products * (2 * math.log2(math.e) * scale / soft_cap)))
  return tanh * (soft_cap * math.log2(math.e)), 1 - tanh * tanh
