"""The TPU kernel of the quantized product: a grid over blocks of outputs.

Pallas copies the codes of the next block from HBM while the kernel computes this one. The kernel
turns a few rows of codes at a time into floats, which never leave the chip.

L layers, R rows, K inputs, N outputs, n outputs per block, P rows of codes (K, or K / 2 if packed),
J groups, C steps per block, H halves of a byte (1 or 2), p rows of codes per step, j groups per
step.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.attention.pallas_tpu import parts
from kernels.attention.pallas_tpu.block_sizes import vmem_bytes
from kernels.quantised_matmul.matrix import Grid, QuantizedMatrix, float_scales, unpack

LANES = 128
# Rows of codes per tile of memory.
TILE_ROWS = 32
# Size of a block of codes. Two are in memory, so that one can arrive while the kernel computes the
# other.
BLOCK_BYTES = 2**21
# The most rows of codes that the kernel turns into floats at once.
STEP_ROWS = 256


def product(x_RxK: jax.Array, matrix: QuantizedMatrix, layer: jax.Array) -> jax.Array:
  """The product with the matrix of one layer, float32 [R, N]."""
  R, (_, P, N), J = x_RxK.shape[0], matrix.codes.shape, matrix.scales.shape[1]
  p, n, halves = step_rows(matrix), block_outputs(matrix), 8 // matrix.grid.bits
  # Bytes hold the codes of the two halves of a group.
  x_RxJxHxr = x_RxK.reshape(R, J, halves, -1)
  x_CxHxRxp = x_RxJxHxr.transpose(2, 0, 1, 3).reshape(halves, R, P // p, p).transpose(2, 0, 1, 3)
  coefficients = [matrix.scales, *([] if matrix.minimums is None else [matrix.minimums])]
  return pl.pallas_call(
    functools.partial(_kernel, grid=matrix.grid),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(pl.cdiv(N, n),),
      in_specs=[
        pl.BlockSpec(x_CxHxRxp.shape, lambda block, layer: (0, 0, 0, 0)),
        pl.BlockSpec((1, P, n), lambda block, layer: (layer[0], 0, block)),
        *[pl.BlockSpec((1, J, n), lambda block, layer: (layer[0], 0, block)) for _ in coefficients],
      ],
      out_specs=pl.BlockSpec((R, n), lambda block, layer: (0, block)),
      scratch_shapes=[
        pltpu.VMEM((P // p, max(J * p // P, 1), n), jnp.float32) for _ in coefficients
      ],
    ),
    out_shape=parts.varying((R, N), jnp.float32, x_RxK),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel",), vmem_limit_bytes=vmem_bytes(parts.device().device_kind)
    ),
    name="quantised_matmul",
  )(layer[None], x_CxHxRxp, matrix.codes, *coefficients)


def block_outputs(matrix: QuantizedMatrix) -> int:
  """n, a multiple of LANES, or N."""
  _, P, N = matrix.codes.shape
  return min(max(BLOCK_BYTES // P // LANES, 1) * LANES, N)


def step_rows(matrix: QuantizedMatrix) -> int:
  """p, the most rows that divide P and are whole tiles and groups; 0 if there are none."""
  P, grid = matrix.codes.shape[1], matrix.grid
  unit = math.lcm(TILE_ROWS, (grid.group or 1) * grid.bits // 8)
  most = max(STEP_ROWS, unit)
  return next((rows for rows in range(most - most % unit, 0, -unit) if P % rows == 0), 0)


def _kernel(layer_ref, x_ref, codes_ref, *refs, grid: Grid):
  del layer_ref
  num_coefficients = len(refs) // 2
  # Scales, and minimums if the grid has them; the result; the coefficients in float32, by step.
  coefficient_refs, out_ref = refs[:num_coefficients], refs[num_coefficients]
  float_refs = refs[num_coefficients + 1 :]
  steps, halves, _, p = x_ref.shape
  if grid.group:
    j = float_refs[0].shape[1]
    for coefficient_ref, float_ref in zip(coefficient_refs, float_refs):
      floats_Jxn = float_scales(coefficient_ref[0])
      for index in range(steps):
        float_ref[index] = floats_Jxn[index * j : (index + 1) * j]

  def step(index, out_Rxn):
    # Registers have no int8 arithmetic.
    codes_pxn = codes_ref[0, pl.ds(pl.multiple_of(index * p, TILE_ROWS), p)].astype(jnp.int32)
    for half, numbers_pxn in enumerate(unpack(codes_pxn, grid) if halves == 2 else (codes_pxn,)):
      weight_pxn = numbers_pxn.astype(jnp.float32)
      if grid.group:
        weight_jxrxn = weight_pxn.reshape(j, p // j, -1) * float_refs[0][index][:, None]
        if grid.has_minimums:
          weight_jxrxn += float_refs[1][index][:, None]
        weight_pxn = weight_jxrxn.reshape(weight_pxn.shape)
      out_Rxn += parts.dot(x_ref[index, half], weight_pxn.astype(x_ref.dtype), (1, 0))
    return out_Rxn

  out_Rxn = jax.lax.fori_loop(0, steps, step, jnp.zeros(out_ref.shape, jnp.float32))
  out_ref[...] = out_Rxn if grid.group else out_Rxn * coefficient_refs[0][0]
