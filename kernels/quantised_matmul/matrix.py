"""Matrices on a grid of 8-bit or 4-bit codes, with one scale per group of inputs.

The number that a code stands for is code * scale, or code * scale + minimum on a grid with
minimums. Codes of 4 bits are stored in pairs: byte r of a group of g inputs holds the code of input
r in its low half and that of input r + g / 2 in its high half. Codes are two's complement, or
unsigned on a grid with minimums.

Groups of 32 inputs are three formats of GGUF, bit for bit: "int8_32" is Q8_0, "int4_symmetric" is
Q4_0 (which stores code + 8) and "int4" is Q4_1. GGUF has no equal of the other grids. Q4_1 takes 5
bits per weight and Q4_0 takes 4.5, but Q4_1 loses less.

L layers, K inputs, N outputs, P rows of codes (K, or K / 2 if packed), J groups, g inputs per
group, h = g / 2.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Grid(NamedTuple):
  """The numbers that a weight may have.

  Attributes:
    bits: 8 or 4.
    group: inputs that share a scale, stored in float16. None: all inputs of an output share one,
      stored in float32 ("per channel").
    has_minimums: whether each group of 4-bit codes also has a minimum, stored in float16.
  """

  bits: int
  group: int | None = None
  has_minimums: bool = False


# The grids, by name.
GRIDS = {
  "int8": Grid(8),
  "int8_32": Grid(8, 32),
  "int4": Grid(4, 32, has_minimums=True),
  "int4_64": Grid(4, 64, has_minimums=True),
  "int4_128": Grid(4, 128, has_minimums=True),
  "int4_symmetric": Grid(4, 32),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedMatrix:
  """One matrix per layer, K inputs by N outputs; or the partitions of its arrays.

  Attributes:
    grid: of the codes.
    codes: int8 [L, P, N].
    scales: [L, J, N], float32 if the grid has no groups (J = 1), else the bits of float16 in int16,
      because TPU kernels take no float16.
    minimums: likewise, or None.
  """

  grid: Grid = dataclasses.field(metadata=dict(static=True))
  codes: Any
  scales: Any
  minimums: Any = None

  @property
  def num_inputs(self) -> int:
    """K."""
    return self.codes.shape[1] * 8 // self.grid.bits


def quantize(weight_KxN: np.ndarray, grid: Grid) -> tuple[np.ndarray, ...]:
  """Rounds a matrix to the nearest numbers of a grid.

  It runs on the host, in NumPy: XLA's division and fused multiply-add may differ in the last bit,
  and the codes would then differ from those of `gguf.quants`.

  With 8 bits, the scale of a group is its largest magnitude / 127. With 4 bits, it is the number of
  the largest magnitude / -8, so that this number is exact. With minimums, codes 0 and 15 are the
  smallest and the largest number.

  Args:
    weight_KxN: float; the group divides K.
    grid: to round to.

  Returns:
    (codes [P, N], scales [J, N]), and minimums [J, N] if the grid has them: one layer of a
    `QuantizedMatrix`.
  """
  K, N = weight_KxN.shape
  g = grid.group or K
  weight_JxgxN = np.asarray(weight_KxN, np.float32).reshape(K // g, g, N)
  minimum_Jx1xN = np.min(weight_JxgxN, axis=1, keepdims=True)
  if grid.has_minimums:
    scale_Jx1xN = (np.max(weight_JxgxN, axis=1, keepdims=True) - minimum_Jx1xN) / 15
  else:
    largest_Jx1xN = np.abs(weight_JxgxN).argmax(axis=1, keepdims=True)
    largest_Jx1xN = np.take_along_axis(weight_JxgxN, largest_Jx1xN, axis=1)
    scale_Jx1xN = np.abs(largest_Jx1xN) / 127 if grid.bits == 8 else largest_Jx1xN / -8
  with np.errstate(divide="ignore", over="ignore"):
    inverse_Jx1xN = np.where(scale_Jx1xN == 0, 0, 1 / scale_Jx1xN)
  if grid.bits == 8:
    # Halves are rounded away from zero.
    scaled_JxgxN = weight_JxgxN * inverse_Jx1xN
    magnitude_JxgxN = np.abs(scaled_JxgxN)
    floor_JxgxN = np.floor(magnitude_JxgxN)
    rounded_JxgxN = floor_JxgxN + np.floor(2 * (magnitude_JxgxN - floor_JxgxN))
    codes_JxpxN = (np.sign(scaled_JxgxN) * rounded_JxgxN).astype(np.int8)
  else:
    if grid.has_minimums:
      rounded_JxgxN = np.trunc((weight_JxgxN - minimum_Jx1xN) * inverse_Jx1xN + np.float32(0.5))
      code_JxgxN = rounded_JxgxN.astype(np.int8).clip(0, 15)
    else:
      # The largest positive code is 7.
      rounded_JxgxN = np.trunc(weight_JxgxN * inverse_Jx1xN + np.float32(8.5))
      code_JxgxN = rounded_JxgxN.astype(np.int8).clip(0, 15) - np.int8(8)
    low_JxhxN, high_JxhxN = code_JxgxN[:, : g // 2], code_JxgxN[:, g // 2 :]
    codes_JxpxN = (low_JxhxN & np.int8(15)) | (high_JxhxN << np.int8(4))
  codes_PxN = codes_JxpxN.reshape(-1, N)
  if grid.group is None:
    return codes_PxN, scale_Jx1xN[:, 0]
  scale_JxN, minimum_JxN = (
    array[:, 0].astype(np.float16).view(np.int16) for array in (scale_Jx1xN, minimum_Jx1xN)
  )
  return (codes_PxN, scale_JxN, *((minimum_JxN,) if grid.has_minimums else ()))


def dequantize(matrix: QuantizedMatrix) -> jax.Array:
  """The numbers of a matrix, float32 [L, K, N]."""
  L, J, N = matrix.scales.shape
  codes = matrix.codes.reshape(L, J, -1, N)
  if matrix.grid.bits == 4:
    codes = jnp.concatenate(unpack(codes, matrix.grid), axis=2)
  numbers = codes.astype(jnp.float32) * float_scales(matrix.scales)[:, :, None]
  if matrix.minimums is not None:
    numbers += float_scales(matrix.minimums)[:, :, None]
  return numbers.reshape(L, -1, N)


def float_scales(scales: jax.Array) -> jax.Array:
  """The scales or minimums of a matrix in float32."""
  if scales.dtype == jnp.float32:
    return scales
  bits = scales.astype(jnp.int32)
  # Exponent and mantissa, where float32 has them, and with its bias.
  magnitude = ((bits & 0x7FFF) << 13) + ((127 - 15) << 23)
  # A subnormal number lacks the implicit one: add it, and subtract it again.
  lowest = 1 << 23
  is_subnormal = (bits & 0x7C00) == 0
  normal = jax.lax.bitcast_convert_type(magnitude + lowest * is_subnormal, jnp.float32)
  absolute = jnp.where(is_subnormal, normal - 2.0**-14, normal)
  return jnp.where(bits < 0, -absolute, absolute)


def unpack(packed: jax.Array, grid: Grid) -> tuple[jax.Array, jax.Array]:
  """The codes in the low and in the high halves of bytes: int8, or int32 that hold int8."""
  if grid.has_minimums:
    return packed & 15, (packed >> 4) & 15
  shift = 8 * packed.dtype.itemsize - 4
  return (packed << shift) >> shift, packed >> 4


def columns(matrix: QuantizedMatrix, index: jax.Array) -> jax.Array:
  """The weights of some outputs of a matrix of one layer, float32 [..., K].

  Args:
    matrix: L is 1. As an embedding, its outputs are the ids.
    index: int32 [...], outputs; those outside of [0, N) have weights 0.
  """
  taken = jax.tree.map(
    lambda array: array.at[:, :, index.reshape(-1)].get(
      mode="fill", fill_value=0, wrap_negative_indices=False
    ),
    matrix,
  )
  return dequantize(taken)[0].T.reshape(*index.shape, -1)
