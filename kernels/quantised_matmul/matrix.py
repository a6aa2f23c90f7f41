"""Matrices on a grid of 8-bit or 4-bit codes, with one scale per group of inputs.

The number that a code stands for is code * scale. Codes of 4 bits are stored in pairs: byte r of a
group of g inputs holds the code of input r in its low half and that of input r + g / 2 in its high
half, both in two's complement.

Groups of 32 inputs are two formats of GGUF, bit for bit, in scales and codes: 8 bits are Q8_0,
4 bits are Q4_0 (which stores code + 8). GGUF has no equal of the other grids.

L layers, K inputs, N outputs, P rows of codes (K, or K / 2 if packed), J groups, g inputs per
group, h = g / 2.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Grid(NamedTuple):
  """The numbers that a weight may have.

  Attributes:
    bits: 8 or 4.
    group: inputs that share a scale, stored in float16. None: all inputs of an output share one,
      stored in float32 ("per channel").
  """

  bits: int
  group: int | None = None


# The grids, by name.
GRIDS = {
  "int8": Grid(8),
  "int8_32": Grid(8, 32),
  "int4": Grid(4, 32),
  "int4_64": Grid(4, 64),
  "int4_128": Grid(4, 128),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedMatrix:
  """One matrix per layer, K inputs by N outputs.

  Attributes:
    codes: int8 [L, P, N].
    scales: [L, J, N], float32 if the grid has no groups (J = 1), else the bits of float16 in int16,
      because TPU kernels take no float16.
    grid: of the codes.
  """

  codes: jax.Array
  scales: jax.Array
  grid: Grid = dataclasses.field(metadata=dict(static=True))

  @property
  def num_inputs(self) -> int:
    """K."""
    return self.codes.shape[1] * 8 // self.grid.bits


def quantize(weight_KxN: np.ndarray, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
  """Rounds a matrix to the nearest numbers of a grid.

  It runs on the host, in NumPy: XLA's division and fused multiply-add may differ in the last bit,
  and the codes would then differ from those of `gguf.quants`.

  With 8 bits, the scale of a group is its largest magnitude / 127. With 4 bits, it is the number of
  the largest magnitude / -8, so that this number is exact.

  Args:
    weight_KxN: float; the group divides K.
    grid: to round to.

  Returns:
    (codes [P, N], scales [J, N]), one layer of a `QuantizedMatrix`.
  """
  K, N = weight_KxN.shape
  g = grid.group or K
  weight_JxgxN = np.asarray(weight_KxN, np.float32).reshape(K // g, g, N)
  largest_Jx1xN = np.abs(weight_JxgxN).argmax(axis=1, keepdims=True)
  largest_Jx1xN = np.take_along_axis(weight_JxgxN, largest_Jx1xN, axis=1)
  scale_Jx1xN = np.abs(largest_Jx1xN) / 127 if grid.bits == 8 else largest_Jx1xN / -8
  with np.errstate(divide="ignore", over="ignore"):
    inverse_Jx1xN = np.where(scale_Jx1xN == 0, 0, 1 / scale_Jx1xN)
  scaled_JxgxN = weight_JxgxN * inverse_Jx1xN
  if grid.bits == 8:
    # Halves are rounded away from zero.
    magnitude_JxgxN = np.abs(scaled_JxgxN)
    floor_JxgxN = np.floor(magnitude_JxgxN)
    rounded_JxgxN = floor_JxgxN + np.floor(2 * (magnitude_JxgxN - floor_JxgxN))
    codes_JxpxN = (np.sign(scaled_JxgxN) * rounded_JxgxN).astype(np.int8)
  else:
    # The largest positive code is 7.
    rounded_JxgxN = np.trunc(scaled_JxgxN + np.float32(8.5))
    code_JxgxN = np.minimum(rounded_JxgxN, 15).astype(np.int8) - np.int8(8)
    low_JxhxN, high_JxhxN = code_JxgxN[:, : g // 2], code_JxgxN[:, g // 2 :]
    codes_JxpxN = (low_JxhxN & np.int8(15)) | (high_JxhxN << np.int8(4))
  scale_JxN = scale_Jx1xN[:, 0]
  if grid.group:
    scale_JxN = scale_JxN.astype(np.float16).view(np.int16)
  return codes_JxpxN.reshape(-1, N), scale_JxN


def dequantize(matrix: QuantizedMatrix) -> jax.Array:
  """The numbers of a matrix, float32 [L, K, N]."""
  L, J, N = matrix.scales.shape
  if matrix.grid.bits == 8:
    codes = matrix.codes.reshape(L, J, -1, N)
  else:
    packed = matrix.codes.reshape(L, J, -1, N)
    codes = jnp.concatenate(unpack(packed), axis=2)
  scales = float_scales(matrix.scales)[:, :, None]
  return (codes.astype(jnp.float32) * scales).reshape(L, -1, N)


def float_scales(scales: jax.Array) -> jax.Array:
  """The scales of a matrix in float32."""
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


def unpack(packed: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The codes in the low and in the high halves of bytes: int8, or int32 that hold int8."""
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
