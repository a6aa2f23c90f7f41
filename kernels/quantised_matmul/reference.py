"""The definition of a product with a quantized matrix.

L layers, B rows, K inputs, N outputs.
"""

import jax
import jax.numpy as jnp

from kernels.quantised_matmul.matrix import QuantizedMatrix, dequantize


def quantised_matmul(
  x_BxK: jax.Array, matrix: QuantizedMatrix, layer: jax.Array | int
) -> jax.Array:
  """x times the numbers of one layer's matrix, float32 [B, N]."""
  weight_KxN = dequantize(matrix)[layer]
  return jnp.dot(x_BxK.astype(jnp.float32), weight_KxN, precision=jax.lax.Precision.HIGHEST)
