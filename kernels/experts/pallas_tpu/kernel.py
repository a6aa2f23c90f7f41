"""The TPU kernels of the grouped product: grids over visits (`kernels.experts.visits`).

Pallas copies the blocks of the next step from HBM while a kernel computes this one. Consecutive
visits of one block of rows, or of one group, leave the block of the result in vector memory.

R rows, K inputs, N outputs, E groups (experts); b rows, c inputs and n outputs per block.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.attention.pallas_tpu import parts
from kernels.attention.pallas_tpu.block_sizes import DEFAULT_VMEM_BYTES, vmem_bytes
from kernels.experts.visits import Visits, visits

LANES = 128
BLOCK_ROWS = 512
# The most bytes of a row of a block, of inputs or of outputs. v4, with half the memory, takes half.
ROW_BYTES = 4096


def product(
  x: jax.Array, weight_ExKxN: jax.Array, sizes_E: jax.Array, *, transposed: bool
) -> jax.Array:
  """See `kernels.experts.backend.Product`. R is a multiple of BLOCK_ROWS.

  Rows of blocks without groups, and of the last block after the last group, are not defined.
  """
  own = visits(sizes_E, x.shape[0] // BLOCK_ROWS, BLOCK_ROWS)
  num_inputs, num_outputs = weight_ExKxN.shape[1:][:: -1 if transposed else 1]
  c = _divisor(num_inputs, _most(x.dtype))
  n = _even(num_outputs, _most(x.dtype), parts.num_cores())

  def weight_block(output, visit, step, group_V, *_):
    return (group_V[visit], *((output, step) if transposed else (step, output)))

  return pl.pallas_call(
    functools.partial(_product, contract=(1, 1 if transposed else 0)),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=4,
      grid=(pl.cdiv(num_outputs, n), jnp.maximum(own.num_visits, 1), num_inputs // c),
      in_specs=[
        pl.BlockSpec(
          (BLOCK_ROWS, c), lambda output, visit, step, group_V, block_V, *_: (block_V[visit], step)
        ),
        pl.BlockSpec((1, n, c) if transposed else (1, c, n), weight_block),
      ],
      out_specs=pl.BlockSpec(
        (BLOCK_ROWS, n), lambda output, visit, step, group_V, block_V, *_: (block_V[visit], output)
      ),
      scratch_shapes=[pltpu.VMEM((BLOCK_ROWS, n), jnp.float32)],
    ),
    out_shape=parts.varying((x.shape[0], num_outputs), x.dtype, x),
    compiler_params=_compiler_params("parallel", "arbitrary", "arbitrary"),
    name="grouped_matmul",
  )(*_tables(own), x, weight_ExKxN)


def outer(x_RxK: jax.Array, y_RxN: jax.Array, sizes_E: jax.Array) -> jax.Array:
  """See `kernels.experts.backend.Outer`. R is a multiple of BLOCK_ROWS.

  The results of empty groups are not defined.
  """
  own = visits(sizes_E, x_RxK.shape[0] // BLOCK_ROWS, BLOCK_ROWS)
  K, N = x_RxK.shape[1], y_RxN.shape[1]
  # The block of results is in float32.
  c = _even(K, _most(x_RxK.dtype) // 2, parts.num_cores())
  n = _even(N, _most(y_RxN.dtype))
  return pl.pallas_call(
    _outer,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=4,
      grid=(pl.cdiv(K, c), pl.cdiv(N, n), jnp.maximum(own.num_visits, 1)),
      in_specs=[
        pl.BlockSpec(
          (BLOCK_ROWS, c), lambda i, j, visit, group_V, block_V, *_: (block_V[visit], i)
        ),
        pl.BlockSpec(
          (BLOCK_ROWS, n), lambda i, j, visit, group_V, block_V, *_: (block_V[visit], j)
        ),
      ],
      out_specs=pl.BlockSpec((1, c, n), lambda i, j, visit, group_V, *_: (group_V[visit], i, j)),
    ),
    out_shape=parts.varying((sizes_E.shape[0], K, N), jnp.float32, x_RxK),
    compiler_params=_compiler_params("parallel", "parallel", "arbitrary"),
    name="grouped_outer",
  )(*_tables(own), x_RxK, y_RxN)


def _product(
  group_ref, block_ref, start_ref, stop_ref, x_ref, weight_ref, out_ref, sum_ref, *, contract
):
  visit, step = pl.program_id(1), pl.program_id(2)

  @pl.when(step == 0)
  def _():
    sum_ref[...] = jnp.zeros_like(sum_ref)

  sum_ref[...] += parts.dot(x_ref[...], weight_ref[0], contract)

  @pl.when(step == pl.num_programs(2) - 1)
  def _():
    is_own = _is_own(visit, group_ref, block_ref, start_ref, stop_ref, out_ref.shape)
    out_ref[...] = jnp.where(is_own, sum_ref[...].astype(out_ref.dtype), out_ref[...])


def _outer(group_ref, block_ref, start_ref, stop_ref, x_ref, y_ref, out_ref):
  visit = pl.program_id(2)
  previous = group_ref[jnp.maximum(visit - 1, 0)]

  @pl.when((visit == 0) | (group_ref[visit] != previous))
  def _():
    out_ref[...] = jnp.zeros_like(out_ref)

  own = functools.partial(_is_own, visit, group_ref, block_ref, start_ref, stop_ref)
  x_bxc = jnp.where(own(x_ref.shape), x_ref[...], 0)
  y_bxn = jnp.where(own(y_ref.shape), y_ref[...], 0)
  out_ref[0] += parts.dot(x_bxc, y_bxn, (0, 0))


def _is_own(visit, group_ref, block_ref, start_ref, stop_ref, shape):
  """Which rows of a block belong to the group of the visit, broadcast to the block's shape."""
  group = group_ref[visit]
  row = block_ref[visit] * BLOCK_ROWS + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
  return (row >= start_ref[group]) & (row < stop_ref[group])


def _tables(own: Visits) -> tuple[jax.Array, ...]:
  return own.group_V, own.block_V, own.start_E, own.stop_E


def _most(dtype: jnp.dtype) -> int:
  """The most inputs or outputs per block."""
  row_bytes = ROW_BYTES * vmem_bytes(parts.device().device_kind) // DEFAULT_VMEM_BYTES
  return row_bytes // jnp.dtype(dtype).itemsize


def _divisor(size: int, most: int) -> int:
  """The largest multiple of LANES that divides a size and is at most `most`."""
  return next(block for block in range(most // LANES * LANES, 0, -LANES) if size % block == 0)


def _even(size: int, most: int, cores: int = 1) -> int:
  """The size of the fewest equal blocks, a multiple of LANES and at most `most`.

  All cores compute the same number of blocks. The last block may be partly outside the array. Wide
  blocks matter because the rows are read once for each of them.
  """
  lanes = -(-size // LANES)
  num_blocks = cores * -(-lanes // (cores * max(most // LANES, 1)))
  return LANES * -(-lanes // num_blocks)


def _compiler_params(*semantics: Literal["parallel", "arbitrary"]) -> pltpu.CompilerParams:
  return pltpu.CompilerParams(
    dimension_semantics=semantics, vmem_limit_bytes=vmem_bytes(parts.device().device_kind)
  )
